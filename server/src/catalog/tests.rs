//! What the catalog promises, on a real database in a temporary directory.

use std::collections::BTreeSet;

use super::*;

const FIXTURE_V1: &str = include_str!("../../tests/fixtures/catalog_v1.sql");

fn new_volume(name: &str) -> NewVolume {
    NewVolume {
        name: name.to_owned(),
        capacity_bytes: 1 << 20,
        block_size_bytes: 4096,
        backend: BackendKind::File,
        write_cache_on: true,
    }
}

fn ready_volume(catalog: &Catalog, name: &str) -> VolumeRecord {
    let volume = catalog.begin_creating(&new_volume(name)).unwrap();
    catalog.finish_creating(volume.volume_uid).unwrap();
    volume
}

fn attach(catalog: &Catalog, volume: &VolumeRecord, node_id: &str) -> AttachmentRecord {
    let new = NewAttachment {
        volume_uid: volume.volume_uid,
        node_id: node_id.to_owned(),
        read_only: false,
        boot_id: String::new(),
    };
    catalog.add_attachment(&new).unwrap()
}

/// A data directory whose catalog is the fixture, changed by `sql`.
fn fixture_dir(sql: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.execute_batch(FIXTURE_V1).unwrap();
    db.execute_batch(sql).unwrap();
    dir
}

#[test]
fn what_was_returned_is_there_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("made/with/parents");
    let catalog = Catalog::open(&data_dir).unwrap();
    let server_id = catalog.server_id();
    let volume = ready_volume(&catalog, "vol-1");
    let attachment = attach(&catalog, &volume, "node-a");
    catalog.raise_session_epoch(attachment.attachment_id, 4).unwrap();
    for incarnation in [2, 1] {
        catalog.raise_incarnation_to(volume.volume_uid, incarnation).unwrap();
    }
    assert_eq!(catalog.attach_generation(volume.volume_uid).unwrap(), 1);
    drop(catalog);

    let catalog = Catalog::open(&data_dir).unwrap();
    assert_eq!(catalog.server_id(), server_id);
    let expected = VolumeRecord { incarnation: 2, ..volume };
    assert_eq!(catalog.volume_by_name("vol-1").unwrap(), Some(expected.clone()));
    assert_eq!(catalog.volume_by_uid(expected.volume_uid).unwrap(), Some(expected));
    let expected = AttachmentRecord { session_epoch: 4, ..attachment };
    assert_eq!(catalog.attachment(expected.attachment_id).unwrap(), Some(expected));
}

#[test]
fn files_are_private_to_their_owner() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let catalog = Catalog::open(&data_dir).unwrap();
    ready_volume(&catalog, "vol-1");
    let mode = |path: PathBuf| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(data_dir.clone()), 0o700);
    assert_eq!(mode(data_dir.join(CATALOG_FILE_NAME)), 0o600);
    assert_eq!(mode(data_dir.join(format!("{CATALOG_FILE_NAME}-wal"))), 0o600);
}

#[test]
fn commits_are_synced() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let state = catalog.state();
    let synchronous: u32 = state.db.pragma_query_value(None, "synchronous", |row| row.get(0)).unwrap();
    let journal: String = state.db.pragma_query_value(None, "journal_mode", |row| row.get(0)).unwrap();
    assert_eq!((synchronous, journal.as_str()), (2, "wal"), "2 is FULL");
}

#[test]
fn a_second_server_is_told_who_holds_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Catalog::open(dir.path()).unwrap();
    let error = Catalog::open(dir.path()).unwrap_err();
    assert!(matches!(error, CatalogError::DataDir(DataDirError::Locked { .. })), "{error}");
    assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
}

#[test]
fn format_version_1_is_opened() {
    let dir = fixture_dir("");
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.server_id().to_string(), "5f0c7a52-5a4e-4d1e-9f6b-0d9a5b1f3c11");
    let volume = catalog.volume_by_name("database").unwrap().unwrap();
    assert_eq!((volume.capacity_bytes, volume.block_size_bytes, volume.incarnation), (2 << 30, 4096, 3));
    assert_eq!((volume.backend, volume.write_cache_on), (BackendKind::File, true));
    let (attachment, state) = catalog.attachment_of_volume(volume.volume_uid).unwrap().unwrap();
    assert_eq!(
        (attachment.node_id.as_str(), attachment.read_only, state),
        ("node-a", false, AttachmentState::Active)
    );
    assert_eq!((attachment.generation, attachment.session_epoch), (2, 7));
    assert!(attachment.secret.expose().starts_with("000102"));
    assert_eq!(attachment.boot_id, "", "of before boot ids");
    catalog.bind_attachment(attachment.attachment_id, "boot").unwrap();
    assert!(catalog.bind_attachment(attachment.attachment_id, "other").is_err(), "once");
    assert_eq!(catalog.volume_by_name("half-made").unwrap(), None, "only ready volumes are visible");
    let scratch = catalog.volume_by_name("scratch").unwrap().unwrap();
    assert_eq!((scratch.backend, scratch.write_cache_on), (BackendKind::Memory, false));
}

#[test]
fn the_fixture_has_the_tables_that_this_version_makes() {
    let columns = |dir: &Path| -> BTreeSet<String> {
        let db = Connection::open(dir.join(CATALOG_FILE_NAME)).unwrap();
        let mut query = db
            .prepare("SELECT m.name || '.' || c.name || ':' || c.type FROM sqlite_schema m, pragma_table_info(m.name) c")
            .unwrap();
        query.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
    };
    let new = tempfile::tempdir().unwrap();
    drop(Catalog::open(new.path()).unwrap());
    let older = fixture_dir("");
    let added: BTreeSet<String> = ["attachments.boot_id:TEXT".to_owned()].into();
    assert_eq!(
        columns(new.path()).difference(&columns(older.path())).cloned().collect::<BTreeSet<_>>(),
        added
    );
    drop(Catalog::open(older.path()).unwrap());
    assert_eq!(columns(new.path()), columns(older.path()), "added when it is opened");
}

#[test]
fn a_newer_format_is_refused_unless_it_says_that_we_can_read_it() {
    let dir = fixture_dir("PRAGMA user_version = 3; UPDATE server SET oldest_reader = 2;");
    let error = Catalog::open(dir.path()).unwrap_err();
    assert!(matches!(error, CatalogError::NewerFormat { found: 3, needed: 2 }), "{error}");
    assert!(error.to_string().contains("upgrade volserver"), "{error}");

    let dir =
        fixture_dir("PRAGMA user_version = 2; ALTER TABLE volumes ADD COLUMN colour TEXT DEFAULT 'red';");
    let catalog = Catalog::open(dir.path()).unwrap();
    assert!(catalog.volume_by_name("database").unwrap().is_some());
    ready_volume(&catalog, "made-by-the-older-program");
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    let version: u32 = db.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    assert_eq!(version, 2, "the newer program finds its version again");
}

#[test]
fn another_database_or_file_is_not_taken_for_a_catalog() {
    let dir = tempfile::tempdir().unwrap();
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.execute_batch("CREATE TABLE music (title TEXT);").unwrap();
    drop(db);
    let error = Catalog::open(dir.path()).unwrap_err();
    assert!(matches!(error, CatalogError::Foreign(_)), "{error}");

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(CATALOG_FILE_NAME), [b'x'; 4096]).unwrap();
    assert!(matches!(Catalog::open(dir.path()).unwrap_err(), CatalogError::Sqlite(_)));
}

#[test]
fn a_new_catalog_is_not_made_beside_volumes_that_an_old_one_knew() {
    let dir = tempfile::tempdir().unwrap();
    drop(Catalog::open(dir.path()).unwrap());
    std::fs::write(dir.path().join(VOLUMES_DIR_NAME).join("some-volume"), "data").unwrap();
    std::fs::remove_file(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    // Refused however often it is tried: a supervisor that restarts the server must not get past it.
    for _ in 0..2 {
        assert!(matches!(Catalog::open(dir.path()).unwrap_err(), CatalogError::Lost(_)));
    }
    std::fs::remove_file(dir.path().join(VOLUMES_DIR_NAME).join("some-volume")).unwrap();
    // Where a file system of its own is mounted.
    std::fs::create_dir(dir.path().join(VOLUMES_DIR_NAME).join("lost+found")).unwrap();
    Catalog::open(dir.path()).unwrap();
}

#[test]
fn a_damaged_row_is_an_error_that_names_the_column_and_hides_the_value() {
    let dir = fixture_dir("UPDATE attachments SET secret = 'hunter2';");
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = catalog.volume_by_name("database").unwrap().unwrap();
    let error = catalog.attachment_of_volume(volume.volume_uid).unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(text.contains("secret") && !text.contains("hunter2"), "{text}");
}

#[test]
fn a_name_is_taken_in_every_state() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = catalog.begin_creating(&new_volume("vol-1")).unwrap();
    assert_eq!(catalog.volume_by_name("vol-1").unwrap(), None, "not ready yet");
    assert!(matches!(catalog.begin_creating(&new_volume("vol-1")), Err(CatalogError::VolumeExists)));
    catalog.finish_creating(volume.volume_uid).unwrap();
    assert!(matches!(catalog.begin_creating(&new_volume("vol-1")), Err(CatalogError::VolumeExists)));
    catalog.begin_deleting(volume.volume_uid).unwrap();
    assert_eq!(catalog.volume_by_name("vol-1").unwrap(), None, "not there any more");
    assert!(matches!(catalog.begin_creating(&new_volume("vol-1")), Err(CatalogError::VolumeExists)));
    catalog.forget_volume(volume.volume_uid).unwrap();
    assert_ne!(catalog.begin_creating(&new_volume("vol-1")).unwrap().volume_uid, volume.volume_uid);
}

#[test]
fn an_attached_volume_is_neither_deleted_nor_attached_again() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let attachment = attach(&catalog, &volume, "node-a");
    assert!(matches!(catalog.begin_deleting(volume.volume_uid), Err(CatalogError::VolumeAttached(_))));
    let other = NewAttachment {
        volume_uid: volume.volume_uid,
        node_id: "node-b".to_owned(),
        read_only: false,
        boot_id: String::new(),
    };
    assert!(matches!(catalog.add_attachment(&other), Err(CatalogError::VolumeAttached(_))));
    // An ending attachment still counts: its I/O may not have finished.
    catalog.end_attachment(attachment.attachment_id, false).unwrap();
    assert_eq!(catalog.attachment(attachment.attachment_id).unwrap(), None, "no new GO");
    assert!(catalog.volume_has_attachment(volume.volume_uid).unwrap());
    assert!(matches!(catalog.begin_deleting(volume.volume_uid), Err(CatalogError::VolumeAttached(_))));
    catalog.remove_attachment(attachment.attachment_id).unwrap();
    catalog.begin_deleting(volume.volume_uid).unwrap();
}

#[test]
fn an_active_attachment_is_not_removed_before_it_ended() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let attachment = attach(&catalog, &volume, "node-a");
    catalog.remove_attachment(attachment.attachment_id).unwrap();
    assert!(catalog.attachment(attachment.attachment_id).unwrap().is_some());
}

#[test]
fn generation_rises_by_force_and_outlives_the_attachment() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let end = |attachment: &AttachmentRecord, by_force| {
        catalog.end_attachment(attachment.attachment_id, by_force).unwrap();
        catalog.remove_attachment(attachment.attachment_id).unwrap();
    };
    let first = attach(&catalog, &volume, "node-a");
    end(&first, true);
    let second = attach(&catalog, &volume, "node-b");
    assert_eq!((first.generation, second.generation), (1, 2));
    assert_ne!(first.secret, second.secret);
    end(&second, false);
    assert_eq!(attach(&catalog, &volume, "node-b").generation, 2);
}

#[test]
fn session_epoch_never_goes_down() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let id = attach(&catalog, &volume, "node-a").attachment_id;
    catalog.raise_session_epoch(id, 5).unwrap();
    catalog.raise_session_epoch(id, 5).unwrap();
    let error = catalog.raise_session_epoch(id, 4).unwrap_err();
    assert!(matches!(error, CatalogError::StaleEpoch { epoch: 4, current: 5 }), "{error}");
    assert!(matches!(
        catalog.raise_session_epoch(id, u64::MAX),
        Err(CatalogError::TooLarge("session_epoch"))
    ));
    assert_eq!(catalog.attachment(id).unwrap().unwrap().session_epoch, 5);
    catalog.end_attachment(id, false).unwrap();
    assert!(matches!(catalog.raise_session_epoch(id, 6), Err(CatalogError::AttachmentNotFound(_))));
}

#[test]
fn a_concealed_volume_is_invisible_until_the_guard_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let concealed = catalog.conceal_volume(volume.volume_uid);
    assert_eq!(catalog.volume_by_uid(volume.volume_uid).unwrap(), None);
    assert_eq!(catalog.volume_by_name("vol-1").unwrap(), None);
    drop(concealed);
    assert_eq!(catalog.volume_by_uid(volume.volume_uid).unwrap(), Some(volume));
}

#[test]
fn lists_are_in_order_of_name_and_go_on_after_one() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    for name in ["c", "a", "d", "b", "B"] {
        let volume = ready_volume(&catalog, name);
        attach(&catalog, &volume, if name == "c" { "node-2" } else { "node-1" });
    }
    catalog.begin_creating(&new_volume("bb")).unwrap();
    let names = |after: &str, limit| -> Vec<String> {
        catalog.list_volumes(after, limit).unwrap().into_iter().map(|volume| volume.name).collect()
    };
    assert_eq!(names("", 10), ["B", "a", "b", "c", "d"]);
    assert_eq!(names("a", 2), ["b", "c"]);
    let attached = |filter: &AttachmentFilter, after: &str, limit| -> Vec<String> {
        catalog.list_attachments(filter, after, limit).unwrap().into_iter().map(|(name, _)| name).collect()
    };
    assert_eq!(attached(&AttachmentFilter::default(), "B", 3), ["a", "b", "c"]);
    let of_node = AttachmentFilter { node_id: Some("node-2".to_owned()), volume_name: None };
    assert_eq!(attached(&of_node, "", 10), ["c"]);
    let of_volume = AttachmentFilter { volume_name: Some("d".to_owned()), node_id: None };
    assert_eq!(attached(&of_volume, "", 10), ["d"]);
}
