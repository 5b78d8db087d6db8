//! Who has a snapshot, and what an older program makes of a catalog that has some.

use super::*;

#[test]
fn a_snapshot_has_attachments_of_its_own_which_go_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let writer = attach(&catalog, &volume, "node-a");
    let snapshot_uid = snapshot_of(&catalog, &volume, "s");
    let new = |node_id: &str| NewAttachment {
        volume_uid: snapshot_uid,
        node_id: node_id.to_owned(),
        read_only: true,
        boot_id: "boot".to_owned(),
        is_shared: true,
        only_if_granted: false,
    };
    let readers = ["node-a", "node-b"].map(|node_id| catalog.add_snapshot_attachment(&new(node_id)).unwrap());
    let unknown = NewAttachment { volume_uid: volume.volume_uid, ..new("node-a") };
    assert!(matches!(catalog.add_snapshot_attachment(&unknown), Err(CatalogError::SnapshotNotFound(_))));
    assert_eq!(catalog.attachment(readers[1].attachment_id).unwrap().as_ref(), Some(&readers[1]));
    assert_eq!(catalog.attachments_of_volume(volume.volume_uid).unwrap().len(), 1, "the writer's");
    assert_eq!(catalog.attached_snapshot(volume.volume_uid).unwrap(), Some(snapshot_uid));
    let listed = |filter: &AttachmentFilter, after: &ListedAttachment| {
        let found = catalog.list_attachments(filter, after, 9).unwrap();
        found.into_iter().map(|(name, (held, _))| format!("{name} {}", held.node_id)).collect::<BTreeSet<_>>()
    };
    let (all, first) = (AttachmentFilter::default(), ListedAttachment::default());
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(listed(&all, &first), names(&["vol-1 node-a", "vol-1@s node-a", "vol-1@s node-b"]));
    let behind =
        ListedAttachment { volume_name: "vol-1".to_owned(), attachment_id: writer.attachment_id.to_string() };
    assert_eq!(listed(&all, &behind), names(&["vol-1@s node-a", "vol-1@s node-b"]));
    let of_snapshot =
        AttachmentFilter { volume_name: Some("vol-1@s".to_owned()), ..AttachmentFilter::default() };
    assert_eq!(listed(&of_snapshot, &first).len(), 2);

    catalog.raise_session_epoch(readers[0].attachment_id, 3).unwrap();
    catalog.end_attachment(readers[0].attachment_id, true).unwrap();
    let listed = catalog.list_attachments(&of_snapshot, &first, 9).unwrap();
    let ending = listed.iter().filter(|(_, (_, state))| *state == AttachmentState::Ending);
    let ending: Vec<Uuid> = ending.map(|(_, (held, _))| held.attachment_id).collect();
    assert_eq!(ending, [readers[0].attachment_id]);
    assert_eq!(catalog.remove_ending_attachments().unwrap(), 1, "as at a start");
    assert!(catalog.attachment(readers[1].attachment_id).unwrap().is_some());
    drop(catalog);
    // An older program knows nothing of them, and takes the snapshot away.
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.pragma_update(None, "foreign_keys", true).unwrap();
    db.execute("DELETE FROM snapshots", []).unwrap();
    drop(db);
    let catalog = Catalog::open(dir.path()).unwrap();
    assert!(catalog.attachment(readers[1].attachment_id).unwrap().is_none());
    assert!(catalog.attachment(writer.attachment_id).unwrap().is_some());
}

/// What volserver 0.1.0 sends to the database, as it was then.
#[test]
fn an_older_program_goes_on_with_a_catalog_that_has_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let snapshot_uid = snapshot_of(&catalog, &volume, "s");
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.pragma_update(None, "foreign_keys", true).unwrap();
    let insert = "INSERT INTO volumes (volume_uid, name, state, capacity_bytes, block_size_bytes, backend, write_cache_on, \
                  incarnation, attach_generation, created_at_ms) \
                  VALUES ('a1b9a5c2-54f0-4f6b-8f34-3a8b8a1b0c09', 'older', 'ready', 4096, 512, 'file', 1, 1, 1, 0)";
    db.execute(insert, []).unwrap();
    let uid = volume.volume_uid.to_string();
    db.execute("UPDATE volumes SET state = 'deleting' WHERE volume_uid = ?1", [&uid]).unwrap();
    db.execute("DELETE FROM volumes WHERE volume_uid = ?1 AND state IN ('creating', 'deleting')", [&uid])
        .unwrap();
    drop(db);
    let catalog = Catalog::open(dir.path()).unwrap();
    let older = catalog.volume_by_name("older").unwrap().unwrap();
    assert_eq!(catalog.source_of(older.volume_uid).unwrap(), None);
    let kept = catalog.snapshot_by_uid(snapshot_uid).unwrap().unwrap();
    assert_eq!((kept.volume_name.as_str(), kept.volume_uid), ("", volume.volume_uid));
}
