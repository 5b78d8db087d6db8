//! What the catalog promises, on a real database in a temporary directory.

mod adopted;
mod grants;
mod nodes;
mod plans;

use std::collections::BTreeSet;

use super::*;
use crate::scope::Scope;

mod snapshots;
mod tenants;

const FIXTURE_V1: &str = include_str!("../../tests/fixtures/catalog_v1.sql");

fn new_volume(name: &str) -> NewVolume {
    NewVolume {
        name: name.to_owned(),
        capacity_bytes: 1 << 20,
        block_size_bytes: 4096,
        backend: BackendKind::File,
        write_cache_on: true,
        settings: Default::default(),
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
        is_shared: false,
        only_if_granted: false,
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
    [2, 1].into_iter().for_each(|number| catalog.raise_incarnation_to(volume.volume_uid, number).unwrap());
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
    let (attachment, state) = catalog.attachments_of_volume(volume.volume_uid).unwrap().remove(0);
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
    let added = [
        "attachments.boot_id:TEXT",
        "attachments.is_shared:INTEGER",
        "attachments.knows_content:INTEGER",
        "volumes.burst_seconds:INTEGER",
        "volumes.content:TEXT",
        "volumes.description:TEXT",
        "volumes.initialising_attachment_id:TEXT",
        "volumes.is_encrypted:INTEGER",
        "volumes.is_protected:INTEGER",
        "volumes.is_read_only:INTEGER",
        "volumes.is_shared:INTEGER",
        "volumes.labels:TEXT",
        "volumes.read_bytes_per_second:INTEGER",
        "volumes.read_iops:INTEGER",
        "volumes.source_uid:TEXT",
        "volumes.write_bytes_per_second:INTEGER",
        "volumes.write_iops:INTEGER",
    ];
    let has_table = |column: &&String| column.starts_with("volumes.") || column.starts_with("attachments.");
    let (new_columns, older_columns) = (columns(new.path()), columns(older.path()));
    let difference = new_columns.difference(&older_columns).filter(has_table);
    assert_eq!(difference.cloned().collect::<BTreeSet<_>>(), added.map(str::to_owned).into());
    // As the first table, column by column.
    let of_table = |table: &str| -> BTreeSet<String> {
        let prefix = format!("{table}.");
        new_columns.iter().filter_map(|column| column.strip_prefix(&prefix).map(str::to_owned)).collect()
    };
    assert_eq!(of_table("attachments"), of_table("shared_attachments"));
    drop(Catalog::open(older.path()).unwrap());
    assert_eq!(columns(new.path()), columns(older.path()), "added when it is opened");
}

/// What a program does that knows version 1 alone, with a catalog of this one.
#[test]
fn an_older_program_makes_volumes_and_attachments_that_have_the_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let settings = VolumeSettings { content: Content::NeverWritten, ..VolumeSettings::default() };
    let own = catalog.begin_creating(&NewVolume { settings, ..new_volume("own") }).unwrap();
    catalog.finish_creating(own.volume_uid).unwrap();
    let readers = ["node-a", "node-b"].map(|node_id| share(&catalog, &own, node_id).unwrap());
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.pragma_update(None, "foreign_keys", true).unwrap();
    let old = Uuid::new_v4();
    db.execute_batch(&format!(
        "INSERT INTO volumes (volume_uid, name, state, capacity_bytes, block_size_bytes, backend, write_cache_on, incarnation, \
                              attach_generation, created_at_ms) VALUES ('{old}', 'old', 'ready', 4096, 512, 'file', 1, 1, 1, 0); \
         DELETE FROM attachments; \
         INSERT INTO attachments (attachment_id, volume_uid, node_id, state, read_only, secret, generation, session_epoch, \
                                  created_at_ms) VALUES ('{0}', '{1}', 'node-c', 'active', 0, '{2}', 1, 0, 0);",
        Uuid::new_v4(),
        own.volume_uid,
        "ab".repeat(32)
    ))
    .unwrap();
    drop(db);
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.volume_by_uid(old).unwrap().unwrap().settings, VolumeSettings::default());
    catalog.remove_ending_attachments().unwrap();
    let held = catalog.attachments_of_volume(own.volume_uid).unwrap();
    let nodes: Vec<&str> = held.iter().map(|(held, _)| held.node_id.as_str()).collect();
    assert_eq!(nodes, ["node-c"], "the older program gave the volume to a writer");
    let content = catalog.volume_by_uid(own.volume_uid).unwrap().unwrap().settings.content;
    assert_eq!(content, Content::Written, "who heeds no content may have written");
    assert!(readers.iter().all(|gone| catalog.attachment(gone.attachment_id).unwrap().is_none()));
}

#[test]
fn who_shared_a_volume_that_an_older_program_took_away_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let readers = ["node-a", "node-b"].map(|node_id| share(&catalog, &volume, node_id).unwrap());
    drop(catalog);
    // It detaches the one that it knows; a writer may have come and gone since.
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    drop(db.execute_batch("DELETE FROM attachments").map(|()| db).unwrap());
    let catalog = Catalog::open(dir.path()).unwrap();
    catalog.remove_ending_attachments().unwrap();
    assert!(readers.iter().all(|gone| catalog.attachment(gone.attachment_id).unwrap().is_none()));
}

fn share(catalog: &Catalog, volume: &VolumeRecord, node_id: &str) -> Result<AttachmentRecord, CatalogError> {
    catalog.add_attachment(&NewAttachment {
        volume_uid: volume.volume_uid,
        node_id: node_id.to_owned(),
        read_only: true,
        boot_id: String::new(),
        is_shared: true,
        only_if_granted: false,
    })
}

#[test]
fn several_share_a_volume_and_one_of_them_is_always_where_older_programs_look() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let volume = ready_volume(&catalog, "vol-1");
    let mut readers: Vec<AttachmentRecord> =
        (0..3).map(|number| share(&catalog, &volume, &format!("node-{number}")).unwrap()).collect();
    let writer = NewAttachment {
        volume_uid: volume.volume_uid,
        node_id: "node-w".to_owned(),
        read_only: false,
        boot_id: String::new(),
        is_shared: false,
        only_if_granted: false,
    };
    while let Some(reader) = readers.first().cloned() {
        assert!(matches!(catalog.add_attachment(&writer), Err(CatalogError::VolumeAttached(_))));
        assert!(catalog.volume_has_attachment(volume.volume_uid).unwrap());
        catalog.raise_session_epoch(reader.attachment_id, 7).unwrap();
        catalog.bind_attachment(reader.attachment_id, "boot").unwrap();
        let is = catalog.attachment(reader.attachment_id).unwrap().unwrap();
        assert_eq!((is.session_epoch, is.boot_id.as_str(), is.is_shared), (7, "boot", true));
        let after = ListedAttachment::default();
        let listed = catalog.list_attachments(&AttachmentFilter::default(), &after, 9).unwrap();
        assert_eq!(listed.len(), readers.len());
        let first = ListedAttachment {
            volume_name: "vol-1".to_owned(),
            attachment_id: listed[0].1.0.attachment_id.to_string(),
        };
        let rest = catalog.list_attachments(&AttachmentFilter::default(), &first, 9).unwrap();
        assert_eq!(rest, listed[1..]);
        catalog.end_attachment(reader.attachment_id, true).unwrap();
        assert_eq!(catalog.attachment(reader.attachment_id).unwrap(), None);
        catalog.remove_attachment(reader.attachment_id).unwrap();
        readers.remove(0);
        assert_eq!(catalog.attachments_of_volume(volume.volume_uid).unwrap().len(), readers.len());
    }
    assert_eq!(catalog.attach_generation(volume.volume_uid).unwrap(), 4);
    catalog.add_attachment(&writer).unwrap();
    assert!(matches!(share(&catalog, &volume, "node-0"), Err(CatalogError::VolumeAttached(_))));
}

#[test]
fn settings_are_there_after_opening_again_and_labels_are_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let attachment_id = Uuid::from_u128(7);
    let settings = VolumeSettings {
        labels: [("app", "db"), ("a.b/tier", "1")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        description: "with \"quotes\", '{' and ü".to_owned(),
        is_protected: true,
        is_read_only: true,
        is_shared: true,
        is_encrypted: true,
        content: Content::NeverWritten,
        limits: VolumeLimits {
            read_iops: 1,
            write_iops: 2,
            read_bytes_per_second: 3,
            write_bytes_per_second: 4,
            burst_seconds: 5,
        },
    };
    let made = catalog.begin_creating(&NewVolume { settings, ..new_volume("vol-1") }).unwrap();
    catalog.finish_creating(made.volume_uid).unwrap();
    ready_volume(&catalog, "vol-0");
    let to = Content::Initialising { attachment_id };
    assert!(!catalog.change_content(made.volume_uid, Content::Written, to).unwrap(), "it is not that");
    assert!(catalog.change_content(made.volume_uid, Content::NeverWritten, to).unwrap());
    drop(catalog);
    let catalog = Catalog::open(dir.path()).unwrap();
    let mut expected = made.clone();
    expected.settings.content = to;
    assert_eq!(catalog.volume_by_name("vol-1").unwrap().unwrap(), expected);
    let names = |labels: &[(&str, &str)]| -> Vec<String> {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        catalog
            .list_volumes(&Scope::All, &labels, "", 1)
            .unwrap()
            .into_iter()
            .map(|volume| volume.name)
            .collect()
    };
    assert_eq!(names(&[]), ["vol-0"]);
    assert_eq!(names(&[("app", "db"), ("a.b/tier", "")]), ["vol-1"], "not by what was left out before it");
    assert_eq!(names(&[("app", "web")]), [""; 0]);
    catalog.mark_written(made.volume_uid).unwrap();
    catalog.end_rolled_back(made.volume_uid, 1).unwrap();
    assert_eq!(catalog.volume_by_name("vol-1").unwrap().unwrap().settings.content, Content::Written);
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
    let error = catalog.attachments_of_volume(volume.volume_uid).unwrap_err();
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
        is_shared: false,
        only_if_granted: false,
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
        catalog
            .list_volumes(&Scope::All, &Default::default(), after, limit)
            .unwrap()
            .into_iter()
            .map(|volume| volume.name)
            .collect()
    };
    assert_eq!(names("", 10), ["B", "a", "b", "c", "d"]);
    assert_eq!(names("a", 2), ["b", "c"]);
    let attached = |filter: &AttachmentFilter, after: &str, limit| -> Vec<String> {
        let after = ListedAttachment { volume_name: after.to_owned(), attachment_id: "~".to_owned() };
        catalog.list_attachments(filter, &after, limit).unwrap().into_iter().map(|(name, _)| name).collect()
    };
    assert_eq!(attached(&AttachmentFilter::default(), "B", 3), ["a", "b", "c"]);
    let of_node = AttachmentFilter { node_id: Some("node-2".to_owned()), ..AttachmentFilter::default() };
    assert_eq!(attached(&of_node, "", 10), ["c"]);
    let of_volume = AttachmentFilter { volume_name: Some("d".to_owned()), ..AttachmentFilter::default() };
    assert_eq!(attached(&of_volume, "", 10), ["d"]);
}

fn snapshot_of(catalog: &Catalog, volume: &VolumeRecord, name: &str) -> Uuid {
    let (snapshot_uid, group_uid) = (Uuid::new_v4(), Uuid::new_v4());
    let new = NewSnapshot { snapshot_uid, volume: volume.clone() };
    catalog.begin_snapshots(name, group_uid, None, &[new]).unwrap();
    catalog.finish_snapshots(group_uid).unwrap();
    snapshot_uid
}

#[test]
fn a_new_catalog_is_not_made_beside_snapshots_either() {
    let dir = tempfile::tempdir().unwrap();
    drop(Catalog::open(dir.path()).unwrap());
    let snapshots = dir.path().join(SNAPSHOTS_DIR_NAME);
    std::fs::create_dir(&snapshots).unwrap();
    std::fs::write(snapshots.join("some-snapshot"), "data").unwrap();
    std::fs::remove_file(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    let error = Catalog::open(dir.path()).unwrap_err();
    assert!(matches!(&error, CatalogError::Lost(found) if *found == snapshots), "{error}");
}

#[test]
fn snapshots_of_one_instant_are_written_down_together_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let (first, second) = (ready_volume(&catalog, "a"), ready_volume(&catalog, "b"));
    snapshot_of(&catalog, &second, "s");
    let new = [first, second].map(|volume| NewSnapshot { snapshot_uid: Uuid::new_v4(), volume });
    let refused = catalog.begin_snapshots("s", Uuid::new_v4(), None, &new);
    assert!(matches!(refused, Err(CatalogError::SnapshotExists)));
    assert_eq!(catalog.all_snapshots().unwrap().len(), 1);
    let group_uid = Uuid::new_v4();
    catalog.begin_snapshots("t", group_uid, None, &new).unwrap();
    assert_eq!(catalog.snapshot_by_export_name("a@t").unwrap(), None, "only ready ones are visible");
    catalog.finish_snapshots(group_uid).unwrap();
    assert!(catalog.finish_snapshots(group_uid).is_err(), "once");
    let found = catalog.snapshot_by_export_name("a@t").unwrap().unwrap();
    assert_eq!(found.group_uid, group_uid);
    let by_uid = format!("@{}", found.snapshot_uid);
    assert_eq!(catalog.snapshot_by_export_name(&by_uid).unwrap(), Some(found.clone()));
    for unknown in ["a", "a@", "@", "@t", "a@u", "c@t"] {
        assert_eq!(catalog.snapshot_by_export_name(unknown).unwrap(), None, "{unknown}");
    }
    catalog.forget_snapshot(found.snapshot_uid).unwrap();
    assert_eq!(catalog.all_snapshots().unwrap().len(), 3, "only one that is being deleted is forgotten");
}

#[test]
fn snapshots_are_listed_in_order_and_go_on_behind_one() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let (a, b) = (ready_volume(&catalog, "a"), ready_volume(&catalog, "b"));
    for (volume, name) in [(&b, "x"), (&a, "z"), (&a, "x")] {
        snapshot_of(&catalog, volume, name);
    }
    for _ in 0..2 {
        let gone = ready_volume(&catalog, "gone");
        snapshot_of(&catalog, &gone, "x");
        catalog.begin_deleting(gone.volume_uid).unwrap();
        catalog.forget_volume(gone.volume_uid).unwrap();
    }
    let (mut names, mut after) = (Vec::new(), SnapshotKey::default());
    loop {
        let page = catalog.list_snapshots(&SnapshotFilter::default(), &after, 2).unwrap();
        let Some((last, _)) = page.last() else { break };
        after = last.key();
        names.extend(page.iter().map(|(snapshot, _)| format!("{}@{}", snapshot.volume_name, snapshot.name)));
    }
    assert_eq!(names, ["@x", "@x", "a@x", "a@z", "b@x"]);
    let filter = SnapshotFilter { volume_name: Some("b".to_owned()), ..SnapshotFilter::default() };
    assert_eq!(catalog.list_snapshots(&filter, &SnapshotKey::default(), 9).unwrap().len(), 1);
    let group_uid = Some(catalog.snapshot_by_export_name("a@z").unwrap().unwrap().group_uid);
    let filter = SnapshotFilter { group_uid, ..SnapshotFilter::default() };
    assert_eq!(catalog.list_snapshots(&filter, &SnapshotKey::default(), 9).unwrap().len(), 1);
    for (name, volume_name, count) in [("x", None, 4), ("z", None, 1), ("y", None, 0), ("x", Some("a"), 1)] {
        let (name, volume_name) = (Some(name.to_owned()), volume_name.map(str::to_owned));
        let filter = SnapshotFilter { name, volume_name, ..SnapshotFilter::default() };
        assert_eq!(catalog.list_snapshots(&filter, &SnapshotKey::default(), 9).unwrap().len(), count);
    }
    assert_eq!(catalog.snapshot_count(a.volume_uid).unwrap(), 2);
}
