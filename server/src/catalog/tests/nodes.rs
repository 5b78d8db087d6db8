//! What nodes say of themselves, in catalogs of older programs as well.

use super::*;

#[test]
fn nodes_of_a_catalog_of_before_there_were_limits_have_none() {
    let dir = tempfile::tempdir().unwrap();
    let facts = NodeFacts { node_id: "n".to_owned(), max_volumes: 7, ..NodeFacts::default() };
    Catalog::open(dir.path()).unwrap().put_node(&facts).unwrap();
    let kept = Catalog::open(dir.path()).unwrap().node("n").unwrap().unwrap();
    assert_eq!(kept.facts, facts);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.execute_batch("ALTER TABLE nodes DROP COLUMN max_volumes").unwrap();
    drop(db);
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.node("n").unwrap().unwrap().facts.max_volumes, 0);
    assert_eq!(catalog.put_node(&facts).unwrap().facts.max_volumes, 7);
}
