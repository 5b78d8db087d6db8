//! How SQLite finds a page of a list: by indexes, so that the last page of ten thousand costs what the first does.

use rusqlite::types::Null;

use super::super::{AttachmentFilter, Catalog, GrantFilter, SnapshotFilter, attachments, grants, snapshots};

/// The steps of a query, whatever its values.
fn plan(catalog: &Catalog, sql: &str) -> Vec<String> {
    let state = catalog.state();
    let mut query = state.db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
    let values = vec![Null; query.parameter_count()];
    let steps = query.query_map(rusqlite::params_from_iter(values), |row| row.get("detail")).unwrap();
    steps.collect::<Result<_, _>>().unwrap()
}

#[test]
fn no_page_of_a_list_is_found_by_looking_at_all_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(&dir.path().join("data")).unwrap();
    let node_id = Some("n".to_owned());
    let (all, of_node) = (AttachmentFilter::default(), AttachmentFilter { node_id, ..Default::default() });
    let node_id = Some("n".to_owned());
    let (all_grants, of_node_grants) =
        (GrantFilter::default(), GrantFilter { node_id, ..Default::default() });
    let of_name = SnapshotFilter { name: Some("s".to_owned()), ..Default::default() };
    for sql in [
        attachments::list_sql("attachments", &all),
        attachments::list_sql("attachments", &of_node),
        attachments::list_sql("shared_attachments", &all),
        attachments::list_sql("shared_attachments", &of_node),
        snapshots::list_sql(snapshots::OF_ALL_VOLUMES, &SnapshotFilter::default()),
        snapshots::list_sql(snapshots::OF_ALL_VOLUMES, &of_name),
        grants::list_sql(&all_grants),
        grants::list_sql(&of_node_grants),
    ] {
        let steps = plan(&catalog, &sql);
        assert!(steps.iter().any(|step| step.starts_with("SEARCH")), "{sql}: {steps:#?}");
        let reads_all = |step: &String| step.starts_with("SCAN") || step.starts_with("MATERIALIZE");
        assert!(!steps.iter().any(reads_all), "{sql}: {steps:#?}");
        // What is put in order behind an index is of one volume, of one node, or of one name.
        let sorts_all = steps.iter().any(|step| step == "USE TEMP B-TREE FOR ORDER BY");
        assert!(
            !sorts_all || sql.contains("node_id = ?4") || sql.contains("snapshots.name = ?6"),
            "{sql}: {steps:#?}"
        );
    }
}
