//! Whose name space what is in, also when its volume is gone, and with a program that knows no tenants.

use super::*;

fn scope(tenant: &str) -> Scope {
    Scope::Tenants(std::sync::Arc::new(BTreeSet::from([tenant.to_owned()])))
}

fn tenants_told(catalog: &Catalog, since: &ChangePoint) -> Vec<String> {
    let changes = catalog.changes_after(since, 99).unwrap().unwrap();
    changes.into_iter().filter_map(|change| change.told).map(|(_, told)| told.tenant).collect()
}

#[test]
fn lists_have_what_is_in_the_scope_and_pages_of_it_are_full() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    for name in ["acme", "acme+a", "acme+b", "acme.x+c", "b+a", "z"] {
        let volume = ready_volume(&catalog, name);
        attach(&catalog, &volume, &format!("node-of-{name}"));
        catalog.put_node(&NodeFacts { node_id: format!("node-of-{name}"), ..NodeFacts::default() }).unwrap();
        catalog.add_grant(volume.volume_uid, "granted", false).unwrap();
        snapshot_of(&catalog, &volume, "s");
    }
    catalog.put_node(&NodeFacts { node_id: "granted".to_owned(), ..NodeFacts::default() }).unwrap();
    catalog.put_node(&NodeFacts { node_id: "idle".to_owned(), ..NodeFacts::default() }).unwrap();
    let acme = scope("acme");
    let volumes = |scope: &Scope, after: &str, limit| -> Vec<String> {
        let found = catalog.list_volumes(scope, &Default::default(), after, limit).unwrap();
        found.into_iter().map(|volume| volume.name).collect()
    };
    assert_eq!(volumes(&acme, "", 1), ["acme+a"]);
    assert_eq!(volumes(&acme, "acme+a", 9), ["acme+b"]);
    assert_eq!(volumes(&scope("acme.x"), "", 9), ["acme.x+c"]);
    assert_eq!(volumes(&scope("none"), "", 9), [""; 0]);
    assert_eq!(volumes(&Scope::All, "", 9).len(), 6);

    let filter = SnapshotFilter::default().within(&acme);
    let found = catalog.list_snapshots(&filter, &SnapshotKey::default(), 9).unwrap();
    let names: Vec<String> = found.iter().map(|(snapshot, _)| snapshot.export_name()).collect();
    assert_eq!(names, ["acme+a@s", "acme+b@s"]);
    assert!(found.iter().all(|(snapshot, _)| snapshot.tenant == "acme"));

    let filter = AttachmentFilter::default().within(&acme);
    let found = catalog.list_attachments(&filter, &ListedAttachment::default(), 9).unwrap();
    assert_eq!(found.into_iter().map(|(name, _)| name).collect::<Vec<_>>(), ["acme+a", "acme+b"]);
    let found = catalog.list_grants(&GrantFilter::default().within(&acme), &Default::default(), 9).unwrap();
    assert_eq!(found.into_iter().map(|(name, _)| name).collect::<Vec<_>>(), ["acme+a", "acme+b"]);

    let nodes = |scope: &Scope| -> Vec<String> {
        let found = catalog.list_nodes(scope, "", 99).unwrap();
        found.into_iter().map(|node| node.facts.node_id).collect()
    };
    assert_eq!(nodes(&acme), ["granted", "node-of-acme+a", "node-of-acme+b"]);
    assert_eq!(nodes(&Scope::All).len(), 8);
    assert!(catalog.node_has_of(&acme, "granted").unwrap() && !catalog.node_has_of(&acme, "idle").unwrap());
    assert!(!catalog.node_has_of(&acme, "node-of-b+a").unwrap());
}

#[test]
fn the_snapshots_of_a_freeze_are_marked_in_the_scope_alone() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let freeze_id = Uuid::from_u128(7);
    let new: Vec<NewSnapshot> = ["acme+a", "b+a"]
        .map(|name| NewSnapshot { snapshot_uid: Uuid::new_v4(), volume: ready_volume(&catalog, name) })
        .into();
    catalog.begin_snapshots("s", Uuid::new_v4(), Some(freeze_id), &new).unwrap();
    assert!(catalog.mark_frozen(&scope("none"), freeze_id).unwrap().is_empty());
    assert_eq!(catalog.mark_frozen(&scope("acme"), freeze_id).unwrap(), [new[0].snapshot_uid]);
    assert_eq!(catalog.mark_frozen(&Scope::All, freeze_id).unwrap().len(), 2);
}

#[test]
fn what_was_a_tenant_s_is_told_as_its_when_it_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let start = catalog.newest_change().unwrap();
    let volume = ready_volume(&catalog, "acme+a");
    let snapshot_uid = snapshot_of(&catalog, &volume, "s");
    catalog.begin_deleting(volume.volume_uid).unwrap();
    catalog.forget_volume(volume.volume_uid).unwrap();
    ready_volume(&catalog, "plain");
    drop(catalog);
    // Nothing but the snapshot is left of it.
    let catalog = Catalog::open(dir.path()).unwrap();
    let present = catalog.present(WatchedKind::Snapshot, None, "", 9).unwrap().objects;
    assert_eq!(present.iter().map(|told| told.tenant.as_str()).collect::<Vec<_>>(), ["acme"]);
    catalog.begin_deleting_snapshot(snapshot_uid).unwrap();
    catalog.forget_snapshot(snapshot_uid).unwrap();
    drop(catalog);
    // Nothing but its changes.
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(tenants_told(&catalog, &start), ["acme", "acme", "acme", "", "acme"]);
    assert_eq!(catalog.tenant("acme").unwrap(), None);
    assert_eq!(catalog.list_tenants(&Scope::All, "", 9).unwrap(), []);
    catalog.state().db.execute("DELETE FROM changes WHERE seq < (SELECT max(seq) FROM changes)", []).unwrap();
    drop(catalog);
    let catalog = Catalog::open(dir.path()).unwrap();
    let left: i64 =
        catalog.state().db.query_row("SELECT count(*) FROM volume_tenants", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 1, "the newest change, which stays, is of the snapshot");
    ready_volume(&catalog, "other");
    catalog.state().db.execute("DELETE FROM changes WHERE seq < (SELECT max(seq) FROM changes)", []).unwrap();
    drop(catalog);
    let catalog = Catalog::open(dir.path()).unwrap();
    let left: i64 =
        catalog.state().db.query_row("SELECT count(*) FROM volume_tenants", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 0);
}

/// With statements that name none of the tables.
#[test]
fn an_older_program_s_volumes_have_the_tenant_that_their_names_say() {
    let dir = fixture_dir("");
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.list_tenants(&Scope::All, "", 9).unwrap(), [], "the fixture's are in no name space");
    let renamed = ready_volume(&catalog, "acme+renamed");
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.execute_batch(
        "INSERT INTO volumes (volume_uid, name, state, capacity_bytes, block_size_bytes, backend, write_cache_on, incarnation, \
                              attach_generation, created_at_ms) \
                      VALUES ('00000000-0000-0000-0000-000000000007', 'acme+new', 'ready', 4096, 512, 'file', 1, 1, 1, 5);",
    )
    .unwrap();
    db.execute("UPDATE volumes SET name = 'plain' WHERE volume_uid = ?1", [renamed.volume_uid.to_string()])
        .unwrap();
    drop(db);
    let catalog = Catalog::open(dir.path()).unwrap();
    let found = catalog.list_volumes(&scope("acme"), &Default::default(), "", 9).unwrap();
    assert_eq!(found.into_iter().map(|volume| volume.name).collect::<Vec<_>>(), ["acme+new"]);
    assert_eq!(
        catalog.tenant("acme").unwrap().unwrap().usage,
        Usage { volumes: 1, bytes: 4096, snapshots: 0 }
    );
}
