//! Grants beside the attachments that are made under them.

use super::*;

fn under_grant(volume: &VolumeRecord, node_id: &str, read_only: bool) -> NewAttachment {
    NewAttachment {
        volume_uid: volume.volume_uid,
        node_id: node_id.to_owned(),
        read_only,
        boot_id: String::new(),
        is_shared: false,
        only_if_granted: true,
    }
}

#[test]
fn an_attachment_is_made_under_a_grant_or_not_at_all_and_ends_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let uid = volume.volume_uid;
    let is_refused = |node_id: &str, read_only| {
        matches!(
            catalog.add_attachment(&under_grant(&volume, node_id, read_only)),
            Err(CatalogError::NotGranted(_))
        )
    };
    assert!(is_refused("node-a", true) && is_refused("node-a", false));
    let grant = catalog.add_grant(uid, "node-a", true).unwrap();
    assert!(is_refused("node-a", false) && is_refused("node-b", true));
    let attachment = catalog.add_attachment(&under_grant(&volume, "node-a", true)).unwrap();
    // The node's own detach takes nothing away.
    catalog.end_attachment(attachment.attachment_id, false).unwrap();
    catalog.remove_attachment(attachment.attachment_id).unwrap();
    assert_eq!(catalog.grants_of_volume(uid).unwrap(), [grant]);
    catalog.add_attachment(&under_grant(&volume, "node-a", true)).unwrap();
    let withdrawn = catalog.withdraw_grant(uid, "node-a").unwrap();
    assert_eq!(withdrawn, Withdrawn { existed: true, was_attached: true });
    drop(catalog);
    // As after a kill: there is nothing between the two.
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.grants_of_volume(uid).unwrap(), []);
    let held = catalog.attachments_of_volume(uid).unwrap();
    assert_eq!(held.iter().map(|(_, state)| *state).collect::<Vec<_>>(), [AttachmentState::Ending]);
    assert_eq!(catalog.remove_ending_attachments().unwrap(), 1);
    let again = catalog.withdraw_grant(uid, "node-a").unwrap();
    assert_eq!(again, Withdrawn { existed: false, was_attached: false });
    let unknown = catalog.add_grant(Uuid::new_v4(), "node-a", true);
    assert!(matches!(unknown, Err(CatalogError::VolumeNotFound(_))), "{unknown:?}");
}

#[test]
fn nobody_is_granted_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let volume_uid = snapshot_of(&catalog, &volume, "s");
    catalog.add_grant(volume.volume_uid, "node-a", true).unwrap();
    let new = NewAttachment { volume_uid, is_shared: true, ..under_grant(&volume, "node-a", true) };
    assert!(matches!(catalog.add_snapshot_attachment(&new), Err(CatalogError::NotGranted(_))));
}

#[test]
fn grants_are_listed_in_order_and_go_on_behind_one() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    for name in ["vol-b", "vol-a"] {
        let volume = ready_volume(&catalog, name);
        for node_id in ["node-2", "node-1"] {
            catalog.add_grant(volume.volume_uid, node_id, true).unwrap();
        }
    }
    let list = |filter: &GrantFilter, after: (&str, &str), limit| -> Vec<String> {
        let after = (after.0.to_owned(), after.1.to_owned());
        let found = catalog.list_grants(filter, &after, limit).unwrap();
        found.into_iter().map(|(name, grant)| format!("{name} {}", grant.node_id)).collect()
    };
    let all = GrantFilter::default();
    assert_eq!(list(&all, ("", ""), 3), ["vol-a node-1", "vol-a node-2", "vol-b node-1"]);
    assert_eq!(list(&all, ("vol-a", "node-1"), 9), ["vol-a node-2", "vol-b node-1", "vol-b node-2"]);
    let of_volume = GrantFilter { volume_name: Some("vol-b".to_owned()), ..GrantFilter::default() };
    assert_eq!(list(&of_volume, ("", ""), 9), ["vol-b node-1", "vol-b node-2"]);
    let of_both = GrantFilter { node_id: Some("node-2".to_owned()), ..of_volume };
    assert_eq!(list(&of_both, ("", ""), 9), ["vol-b node-2"]);
    assert!(catalog.node_has_grants("node-1").unwrap() && !catalog.node_has_grants("node-3").unwrap());
}

/// The fixture is of a program that knew no grants, and so is a catalog from which the table is taken away.
#[test]
fn a_catalog_of_before_grants_has_none_and_takes_them() {
    let dir = fixture_dir("");
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = catalog.volume_by_name("database").unwrap().unwrap();
    assert_eq!(catalog.grants_of_volume(volume.volume_uid).unwrap(), []);
    let held = catalog.attachments_of_volume(volume.volume_uid).unwrap();
    catalog.add_grant(volume.volume_uid, "node-a", false).unwrap();
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.execute_batch("DROP TABLE grants").unwrap();
    drop(db);
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.grants_of_volume(volume.volume_uid).unwrap(), []);
    assert_eq!(catalog.attachments_of_volume(volume.volume_uid).unwrap(), held);
    catalog.add_grant(volume.volume_uid, "node-a", false).unwrap();
}

/// What volserver 0.1.0 sends to the database, as it was then.
#[test]
fn a_volume_that_an_older_program_deletes_takes_its_grants_along() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let (volume, other) = (ready_volume(&catalog, "vol-1"), ready_volume(&catalog, "vol-2"));
    for volume in [&volume, &other] {
        catalog.add_grant(volume.volume_uid, "node-a", false).unwrap();
    }
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.pragma_update(None, "foreign_keys", true).unwrap();
    let uid = volume.volume_uid.to_string();
    db.execute("UPDATE volumes SET state = 'deleting' WHERE volume_uid = ?1", [&uid]).unwrap();
    db.execute("DELETE FROM volumes WHERE volume_uid = ?1 AND state IN ('creating', 'deleting')", [&uid])
        .unwrap();
    let left: u32 = db.query_row("SELECT count(*) FROM grants", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 1);
    drop(db);
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.grants_of_volume(other.volume_uid).unwrap().len(), 1);
}
