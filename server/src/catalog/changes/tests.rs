//! What the triggers write down, on real catalogs: by this program's calls, and by the statements that an older program makes.

use std::path::Path;

use super::*;
use crate::catalog::{
    AttachmentRecord, BackendKind, CATALOG_FILE_NAME, NewAttachment, NewSnapshot, NewVolume, NodeFacts,
    VolumeRecord, VolumeSettings,
};
use crate::scope::Scope;
use uuid::Uuid;

const FIXTURE_V1: &str = include_str!("../../../tests/fixtures/catalog_v1.sql");

fn catalog() -> (tempfile::TempDir, Catalog) {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    (dir, catalog)
}

fn create(catalog: &Catalog, name: &str) -> VolumeRecord {
    let new = NewVolume {
        name: name.to_owned(),
        capacity_bytes: 1 << 20,
        block_size_bytes: 4096,
        backend: BackendKind::File,
        write_cache_on: true,
        settings: VolumeSettings {
            labels: [("app".to_owned(), "db".to_owned())].into(),
            ..VolumeSettings::default()
        },
    };
    let volume = catalog.begin_creating(&new).unwrap();
    catalog.finish_creating(volume.volume_uid).unwrap();
    volume
}

fn attach(catalog: &Catalog, volume_uid: Uuid, node_id: &str, is_shared: bool) -> AttachmentRecord {
    let node_id = node_id.to_owned();
    let new = NewAttachment {
        volume_uid,
        node_id,
        read_only: is_shared,
        boot_id: String::new(),
        is_shared,
        only_if_granted: false,
    };
    catalog.add_attachment(&new).unwrap()
}

fn detach(catalog: &Catalog, attachment: &AttachmentRecord) {
    catalog.end_attachment(attachment.attachment_id, false).unwrap();
    catalog.remove_attachment(attachment.attachment_id).unwrap();
}

/// All that came behind a point.
fn behind(catalog: &Catalog, point: &ChangePoint) -> Vec<Change> {
    catalog.changes_after(point, 1000).unwrap().unwrap()
}

/// As `created volume UID`.
fn lines(changes: &[Change]) -> Vec<String> {
    let line = |change: &Change| {
        let (happened, told) = change.told.as_ref().unwrap();
        format!("{happened:?} {} {}", told.facts.kind().as_str(), told.uid).to_lowercase()
    };
    changes.iter().map(line).collect()
}

#[test]
fn a_volume_is_told_when_it_is_ready_when_it_changes_and_when_it_is_not_any_more() {
    let (_dir, catalog) = catalog();
    let start = catalog.newest_change().unwrap();
    let volume = create(&catalog, "v");
    let uid = volume.volume_uid;
    let created = behind(&catalog, &start);
    assert_eq!(lines(&created), [format!("created volume {uid}")], "once, and not while it is made");
    let Some((_, told)) = &created[0].told else { panic!() };
    assert_eq!(told.volume_uid, uid.to_string());
    let Facts::Volume(facts) = &told.facts else { panic!("{told:?}") };
    assert_eq!((facts.name.as_str(), facts.backend.as_str(), facts.capacity_bytes), ("v", "file", 1 << 20));
    assert_eq!((facts.labels["app"].as_str(), facts.write_cache_on), ("db", 1));
    assert!((created[0].time_ms - crate::catalog::now_ms()).abs() < 60_000, "{}", created[0].time_ms);

    catalog.set_capacity(uid, 2 << 20).unwrap();
    let mut settings = volume.settings.clone();
    settings.is_protected = true;
    catalog.set_properties(uid, &settings).unwrap();
    // The same once more, and what nobody watches.
    catalog.set_properties(uid, &settings).unwrap();
    catalog.raise_incarnation_to(uid, 9).unwrap();
    catalog.begin_deleting(uid).unwrap();
    catalog.forget_volume(uid).unwrap();
    let changes = behind(&catalog, &created[0].point);
    assert_eq!(
        lines(&changes),
        [format!("updated volume {uid}"), format!("updated volume {uid}"), format!("deleted volume {uid}")]
    );
    let Some((_, Told { facts: Facts::Volume(facts), .. })) = &changes[2].told else { panic!() };
    assert_eq!((facts.capacity_bytes, facts.is_protected), (2 << 20, 1), "as it was last");
    // One that never was.
    let half = NewVolume { name: "half".to_owned(), settings, ..new_of(&volume) };
    let half = catalog.begin_creating(&half).unwrap();
    catalog.forget_volume(half.volume_uid).unwrap();
    assert_eq!(behind(&catalog, &changes[2].point), []);
}

fn new_of(volume: &VolumeRecord) -> NewVolume {
    NewVolume {
        name: volume.name.clone(),
        capacity_bytes: volume.capacity_bytes,
        block_size_bytes: volume.block_size_bytes,
        backend: volume.backend,
        write_cache_on: volume.write_cache_on,
        settings: volume.settings.clone(),
    }
}

#[test]
fn an_attachment_is_there_until_its_io_has_finished_in_whichever_table_it_is() {
    let (_dir, catalog) = catalog();
    let volume = create(&catalog, "v");
    let start = catalog.newest_change().unwrap();
    let first = attach(&catalog, volume.volume_uid, "a", true);
    let second = attach(&catalog, volume.volume_uid, "b", true);
    catalog.bind_attachment(first.attachment_id, "boot").unwrap();
    catalog.raise_session_epoch(first.attachment_id, 5).unwrap();
    catalog.end_attachment(first.attachment_id, false).unwrap();
    let changes = behind(&catalog, &start);
    let (one, two) = (first.attachment_id, second.attachment_id);
    let expected = [
        format!("created attachment {one}"),
        format!("created attachment {two}"),
        format!("updated attachment {one}"),
    ];
    assert_eq!(lines(&changes), expected, "neither the epoch nor the end that has begun is told");
    let Some((_, told)) = &changes[0].told else { panic!() };
    assert_eq!(told.volume_uid, volume.volume_uid.to_string());
    let Facts::Attachment(facts) = &told.facts else { panic!("{told:?}") };
    assert_eq!((facts.volume_name.as_str(), facts.node_id.as_str()), ("v", "a"));
    // The second takes the place of the first, which is no change.
    let point = catalog.newest_change().unwrap();
    catalog.remove_attachment(one).unwrap();
    assert_eq!(lines(&behind(&catalog, &point)), [format!("deleted attachment {one}")]);
    let page = catalog.present(WatchedKind::Attachment, None, "", 9).unwrap();
    assert_eq!(page.objects.len(), 1);
    let point = catalog.newest_change().unwrap();
    detach(&catalog, &second);
    assert_eq!(lines(&behind(&catalog, &point)), [format!("deleted attachment {two}")]);
}

#[test]
fn snapshots_their_attachments_and_nodes_are_told() {
    let (_dir, catalog) = catalog();
    let volume = create(&catalog, "v");
    let start = catalog.newest_change().unwrap();
    let (snapshot_uid, group_uid, freeze_id) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let new = [NewSnapshot { snapshot_uid, volume: volume.clone() }];
    catalog.begin_snapshots("s", group_uid, Some(freeze_id), &new).unwrap();
    assert_eq!(behind(&catalog, &start), [], "it is being made");
    catalog.finish_snapshots(group_uid).unwrap();
    catalog.mark_frozen(&Scope::All, freeze_id).unwrap();
    let new = NewAttachment {
        volume_uid: snapshot_uid,
        node_id: "n".to_owned(),
        read_only: true,
        boot_id: "b".to_owned(),
        is_shared: true,
        only_if_granted: false,
    };
    let attachment = catalog.add_snapshot_attachment(&new).unwrap();
    let node = NodeFacts { node_id: "n".to_owned(), ..NodeFacts::default() };
    catalog.put_node(&node).unwrap();
    catalog.put_node(&node).unwrap();
    catalog.put_node(&NodeFacts { version: "2".to_owned(), ..node }).unwrap();
    detach(&catalog, &attachment);
    assert!(catalog.forget_node("n").unwrap());
    catalog.begin_deleting_snapshot(snapshot_uid).unwrap();
    catalog.forget_snapshot(snapshot_uid).unwrap();
    let changes = behind(&catalog, &start);
    let id = attachment.attachment_id;
    assert_eq!(
        lines(&changes),
        [
            format!("created snapshot {snapshot_uid}"),
            format!("updated snapshot {snapshot_uid}"),
            format!("created attachment {id}"),
            "created node n".to_owned(),
            "updated node n".to_owned(),
            format!("deleted attachment {id}"),
            "deleted node n".to_owned(),
            format!("deleted snapshot {snapshot_uid}"),
        ]
    );
    let told = |index: usize| changes[index].told.clone().unwrap().1;
    let Facts::Snapshot(facts) = told(1).facts else { panic!() };
    assert_eq!(
        (facts.volume_name.as_str(), facts.is_frozen, facts.freeze_id),
        ("v", 1, freeze_id.to_string())
    );
    let Facts::Attachment(facts) = told(2).facts else { panic!() };
    assert_eq!((facts.volume_name.as_str(), facts.snapshot_uid), ("v@s", snapshot_uid.to_string()));
    let uid = volume.volume_uid.to_string();
    assert!([0, 1, 2, 5, 7].into_iter().all(|index| told(index).volume_uid == uid), "all are of the volume");
}

#[test]
fn no_secret_is_written_down() {
    let (dir, catalog) = catalog();
    let volume = create(&catalog, "v");
    let attachment = attach(&catalog, volume.volume_uid, "n", false);
    catalog.bind_attachment(attachment.attachment_id, "boot").unwrap();
    detach(&catalog, &attachment);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    let mut query = db.prepare("SELECT uid || volume_uid || facts FROM changes").unwrap();
    let rows: Vec<String> = query.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(rows.len(), 5, "{rows:?}");
    assert!(rows.iter().all(|row| !row.contains(attachment.secret.expose())));
}

#[test]
fn a_change_that_was_undone_was_none_and_who_waits_is_told_of_the_others() {
    let (_dir, catalog) = catalog();
    let mut count = catalog.changes_count();
    count.borrow_and_update();
    let volume = create(&catalog, "v");
    assert!(count.has_changed().unwrap());
    let point = catalog.newest_change().unwrap();
    {
        let mut state = catalog.state();
        let transaction = state.db.transaction().unwrap();
        let uid = volume.volume_uid.to_string();
        transaction.execute("UPDATE volumes SET name = 'w' WHERE volume_uid = ?1", [uid]).unwrap();
    }
    assert_eq!(behind(&catalog, &point), []);
    count.borrow_and_update();
    catalog.raise_incarnation_to(volume.volume_uid, 7).unwrap();
    assert!(!count.has_changed().unwrap(), "nobody is woken for what is no change");
}

#[test]
fn what_there_is_comes_in_pages_each_as_of_a_change() {
    let (_dir, catalog) = catalog();
    let mut uids: Vec<String> =
        (0..5).map(|number| create(&catalog, &format!("v{number}")).volume_uid.to_string()).collect();
    uids.sort();
    let half =
        catalog.begin_creating(&NewVolume { name: "half".to_owned(), ..new_of(&create(&catalog, "x")) });
    let x = catalog.volume_by_name("x").unwrap().unwrap();
    catalog.begin_deleting(x.volume_uid).unwrap();
    half.unwrap();
    let (mut found, mut after) = (Vec::new(), String::new());
    loop {
        let page = catalog.present(WatchedKind::Volume, None, &after, 2).unwrap();
        assert_eq!(page.as_of, catalog.newest_change().unwrap());
        let Some(last) = page.objects.last() else { break };
        after = last.uid.clone();
        found.extend(page.objects.into_iter().map(|told| told.uid));
    }
    assert_eq!(found, uids, "only what is ready");
    let one = catalog.present(WatchedKind::Volume, Some(&uids[3]), "", 9).unwrap();
    assert_eq!(one.objects.iter().map(|told| &told.uid).collect::<Vec<_>>(), [&uids[3]]);
    // The pages say the same as the changes.
    let told = |point: &ChangePoint| behind(&catalog, point).remove(0).told.unwrap().1;
    let begun = ChangePoint { seq: 1, mark: catalog.change_mark(1).unwrap().unwrap() };
    assert_eq!(
        catalog.present(WatchedKind::Volume, Some(&told(&begun).uid), "", 9).unwrap().objects,
        [told(&begun)]
    );
}

/// A database with the tables, in which so much is kept.
fn keeping(dir: &Path, changes: u32, milliseconds: i64) -> Connection {
    drop(Catalog::open(dir).unwrap());
    let mut db = Connection::open(dir.join(CATALOG_FILE_NAME)).unwrap();
    db.execute_batch("DROP TRIGGER changes_pruned").unwrap();
    prepare_keeping(&mut db, Kept { changes, milliseconds }).unwrap();
    db
}

fn add_node(db: &Connection, name: &str) {
    db.execute("INSERT INTO nodes (node_id, boot_id, version, labels, registered_at_ms) VALUES (?1, '', '', '{}', 0)", [name]).unwrap();
}

fn seqs(db: &Connection) -> Vec<i64> {
    let mut query = db.prepare("SELECT seq FROM changes ORDER BY seq").unwrap();
    query.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
}

#[test]
fn the_newest_changes_are_kept_and_a_point_before_them_is_known_to_be_gone() {
    let dir = tempfile::tempdir().unwrap();
    let db = keeping(dir.path(), 10, i64::MAX / 2);
    add_node(&db, "first");
    let point = newest(&db).unwrap();
    assert_eq!(point.seq, 2);
    (0..9).for_each(|number| add_node(&db, &format!("n{number}")));
    let found = changes_after(&db, &point, 99).unwrap().unwrap();
    assert_eq!((found.len(), seqs(&db).len()), (9, 10), "all of them are there");
    add_node(&db, "last");
    assert_eq!(seqs(&db), (3..=12).collect::<Vec<_>>());
    assert_eq!(changes_after(&db, &point, 99).unwrap(), None, "the point itself is gone");
    // The number is another change in another history; and one that is to come.
    let newest = newest(&db).unwrap();
    assert_eq!(changes_after(&db, &newest, 99).unwrap(), Some(Vec::new()));
    let other = ChangePoint { mark: "0".repeat(16), ..newest.clone() };
    assert_eq!(changes_after(&db, &other, 99).unwrap(), None);
    let future = ChangePoint { seq: newest.seq + 1, ..newest };
    assert_eq!(changes_after(&db, &future, 99).unwrap(), None);
}

#[test]
fn old_changes_go_in_small_steps_in_order_and_never_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let db = keeping(dir.path(), 1000, 60_000);
    (0..30).for_each(|number| add_node(&db, &format!("n{number}")));
    // A clock that was ahead: what comes behind it is older, and must not go first.
    db.execute("UPDATE changes SET time_ms = time_ms - 3600000 WHERE seq <= 20 AND seq <> 5", []).unwrap();
    add_node(&db, "a");
    assert_eq!(seqs(&db).first(), Some(&9), "eight at once, without a gap");
    add_node(&db, "b");
    assert_eq!(seqs(&db).first(), Some(&17));
    add_node(&db, "c");
    assert_eq!(seqs(&db), (21..=34).collect::<Vec<_>>());
    db.execute("UPDATE changes SET time_ms = 0", []).unwrap();
    assert_eq!(newest(&db).unwrap().seq, 34);
    // Nothing comes any more, and what is there is too old.
    assert_eq!(prune(&db, i64::MAX / 2, 5).unwrap(), 0);
    assert_eq!((prune(&db, 60_000, 5).unwrap(), seqs(&db).first()), (5, Some(&26)));
    while prune(&db, 60_000, 5).unwrap() > 0 {}
    assert_eq!(seqs(&db), [34], "but for the newest");
}

#[test]
fn on_a_full_file_system_the_oldest_changes_make_room() {
    let dir = tempfile::tempdir().unwrap();
    let db = keeping(dir.path(), 100_000, i64::MAX / 2);
    db.execute_batch("BEGIN").unwrap();
    (0..2000).for_each(|number| add_node(&db, &format!("n{number}")));
    db.execute_batch("COMMIT").unwrap();
    let free =
        |db: &Connection| db.pragma_query_value(None, "freelist_count", |row| row.get::<_, u32>(0)).unwrap();
    assert!(free(&db) < 8);
    let before = seqs(&db);
    let mut steps = 0;
    while give_up(&db, 16, 128, 256).unwrap() {
        steps += 1;
    }
    assert!((1..9).contains(&steps) && free(&db) >= 16, "{steps}, {}", free(&db));
    assert_eq!(seqs(&db), before[steps * 128..], "the oldest");
    // More than there can be: nothing is lost for it.
    let before = seqs(&db);
    assert!(!give_up(&db, u32::MAX, 128, 256).unwrap());
    assert_eq!(seqs(&db), before);
    while drop_oldest(&db, 128, 256).unwrap() > 0 {}
    assert_eq!(seqs(&db), (1746..=2001).collect::<Vec<_>>(), "those who watch go on");
    assert!(!give_up(&db, free(&db) + 1, 128, 256).unwrap());
    assert_eq!(seqs(&db).len(), 256);
    while drop_oldest(&db, 128, 1).unwrap() > 0 {}
    assert_eq!(seqs(&db), [2001], "the newest stays");
    // It is put back to what is needed, and the numbers go on.
    add_node(&db, "more");
    assert_eq!(seqs(&db), [2001, 2002]);
}

#[test]
fn where_there_is_no_page_more_what_takes_away_makes_room_and_what_adds_does_not() {
    let (_dir, catalog) = catalog();
    let count = 64;
    let volumes: Vec<VolumeRecord> =
        (0..count).map(|number| create(&catalog, &format!("v{number}"))).collect();
    let attachments: Vec<AttachmentRecord> =
        volumes.iter().map(|volume| attach(&catalog, volume.volume_uid, "n", false)).collect();
    {
        let state = catalog.state();
        state.db.execute_batch("BEGIN").unwrap();
        (0..1000).for_each(|number| add_node(&state.db, &format!("n{number}")));
        state.db.execute_batch("COMMIT").unwrap();
        let pages: u32 = state.db.pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
        state.db.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())).unwrap();
    }
    let refused = (0..200).find_map(|number| {
        let node = NodeFacts { node_id: format!("more-{number}"), ..NodeFacts::default() };
        catalog.put_node(&node).err()
    });
    assert!(refused.is_some_and(|error| error.is_out_of_space()), "it is full");
    let start = catalog.newest_change().unwrap();
    for attachment in &attachments {
        detach(&catalog, attachment);
    }
    for volume in &volumes {
        catalog.begin_deleting(volume.volume_uid).unwrap();
        catalog.forget_volume(volume.volume_uid).unwrap();
    }
    assert_eq!(catalog.newest_change().unwrap().seq, start.seq + 2 * count, "each was written down");
}

#[test]
fn what_is_of_one_volume_is_found_without_a_walk() {
    let (_dir, catalog) = catalog();
    let state = catalog.state();
    for source in SOURCES.iter().filter(|source| source.kind != "node") {
        let mut query = state.db.prepare(&format!("EXPLAIN QUERY PLAN {}", source.present(true))).unwrap();
        let steps = query.query_map(("", "u", 9), |row| row.get::<_, String>("detail")).unwrap();
        let steps: Vec<String> = steps.collect::<Result<_, _>>().unwrap();
        let search = format!("SEARCH {} USING ", source.table);
        let is_by_volume = |step: &String| step.starts_with(&search) && step.ends_with("(volume_uid=?)");
        assert!(steps.iter().any(is_by_volume), "{steps:#?}");
        assert!(!steps.iter().any(|step| step.starts_with(&format!("SCAN {}", source.table))), "{steps:#?}");
    }
}

/// As a program from before there was such a table does it: with statements that name none of it.
#[test]
fn what_an_older_program_does_is_written_down_as_well() {
    let dir = tempfile::tempdir().unwrap();
    Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap().execute_batch(FIXTURE_V1).unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let start = catalog.newest_change().unwrap();
    assert_eq!(start.seq, 1, "what was there before is no change");
    let ready = catalog.present(WatchedKind::Volume, None, "", 9).unwrap().objects;
    assert_eq!(ready.len(), 2);
    assert_eq!(catalog.present(WatchedKind::Attachment, None, "", 9).unwrap().objects.len(), 2);
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.pragma_update(None, "foreign_keys", true).unwrap();
    db.execute_batch(
        "INSERT INTO volumes (volume_uid, name, state, capacity_bytes, block_size_bytes, backend, write_cache_on, incarnation, \
                              attach_generation, created_at_ms) VALUES ('u', 'old', 'creating', 4096, 512, 'file', 1, 1, 1, 5);
         UPDATE volumes SET state = 'ready' WHERE volume_uid = 'u' AND state = 'creating';
         INSERT INTO attachments (attachment_id, volume_uid, node_id, state, read_only, secret, generation, session_epoch, created_at_ms) \
                          VALUES ('i', 'u', 'n', 'active', 0, 'hidden', 1, 0, 5);
         UPDATE attachments SET session_epoch = 3 WHERE attachment_id = 'i';
         UPDATE attachments SET state = 'ending' WHERE attachment_id = 'i';
         DELETE FROM attachments WHERE attachment_id = 'i' AND state = 'ending';
         INSERT INTO snapshots (snapshot_uid, volume_uid, name, group_uid, state, capacity_bytes, block_size_bytes, backend, \
                                write_cache_on, created_at_ms, content) \
                        VALUES ('s', 'u', 'snap', 'g', 'ready', 4096, 512, 'file', 1, 5, 'written');
         INSERT INTO snapshot_attachments (attachment_id, volume_uid, node_id, state, read_only, secret, generation, session_epoch, \
                                           created_at_ms, boot_id, is_shared, knows_content) \
                                   VALUES ('j', 's', 'n', 'active', 1, 'hidden', 1, 0, 5, '', 1, 1);
         DELETE FROM snapshots WHERE snapshot_uid = 's';
         UPDATE volumes SET state = 'deleting' WHERE volume_uid = 'u';
         DELETE FROM volumes WHERE volume_uid = 'u';",
    )
    .unwrap();
    drop(db);
    let catalog = Catalog::open(dir.path()).unwrap();
    let changes = behind(&catalog, &start);
    let expected = [
        "created volume u",
        "created attachment i",
        "deleted attachment i",
        "created snapshot s",
        "created attachment j",
        "deleted attachment j",
        "deleted snapshot s",
        "deleted volume u",
    ];
    assert_eq!(lines(&changes), expected);
    let told = |change: &Change| change.told.clone().unwrap().1;
    assert!(changes.iter().all(|change| told(change).volume_uid == "u"), "{changes:?}");
    let Facts::Attachment(facts) = told(&changes[5]).facts else { panic!() };
    assert_eq!(facts.volume_name, "old@snap", "what went with its snapshot");
}

#[test]
fn what_a_later_program_tells_is_passed_over_and_its_triggers_stay() {
    let (dir, catalog) = catalog();
    let start = catalog.newest_change().unwrap();
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    let later = "CREATE TRIGGER nodes_change_inserted AFTER INSERT ON nodes WHEN 1 BEGIN \
                 INSERT INTO changes (mark, time_ms, kind, change, uid, volume_uid, facts) VALUES \
                 ('m1', 1, 'node', 'created', NEW.node_id, '', json_object('version', '9', 'labels', '{}', 'mood', 'good')), \
                 ('m2', 1, 'tenant', 'created', 'x', '', '{}'), ('m3', 1, 'node', 'renamed', 'x', '', '{}'); END";
    db.execute_batch("DROP TRIGGER nodes_change_inserted").unwrap();
    db.execute_batch(later).unwrap();
    drop(db);
    let catalog = Catalog::open(dir.path()).unwrap();
    catalog.put_node(&NodeFacts { node_id: "n".to_owned(), ..NodeFacts::default() }).unwrap();
    let changes = behind(&catalog, &start);
    assert_eq!(lines(&changes[..1]), ["created node n"]);
    assert_eq!(changes.iter().map(|change| change.told.is_some()).collect::<Vec<_>>(), [true, false, false]);
    let Some((_, Told { facts: Facts::Node(facts), .. })) = &changes[0].told else { panic!() };
    assert_eq!(facts.version, "9");
}

const BEFORE_ENCRYPTION: &str = include_str!("../../../tests/fixtures/catalog_before_encryption.sql");

/// A directory with the catalog of a program that knew no encrypted volumes, changed by `sql`.
fn before_encryption(sql: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.execute_batch(BEFORE_ENCRYPTION).unwrap();
    db.execute_batch(sql).unwrap();
    dir
}

fn triggers_in(dir: &Path) -> std::collections::BTreeMap<String, String> {
    let db = Connection::open(dir.join(CATALOG_FILE_NAME)).unwrap();
    let mut query = db.prepare("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").unwrap();
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}

#[test]
fn triggers_of_the_program_before_are_replaced_by_those_of_this_one() {
    let (new, _) = catalog();
    let dir = before_encryption("");
    let before = triggers_in(dir.path());
    let is_blind = |sql: &&String| sql.contains("json_object('name'") && !sql.contains("is_encrypted");
    assert_eq!(before.values().filter(is_blind).count(), 10, "of volumes and snapshots");
    let catalog = Catalog::open(dir.path()).unwrap();
    let after = triggers_in(dir.path());
    assert_eq!(after.values().filter(is_blind).count(), 0);
    let now = triggers_in(new.path());
    assert!(after.keys().eq(now.keys()));
    // Those of attachments have been put in other words, and tell the same.
    let others: Vec<&String> = now.keys().filter(|&name| now[name] != after[name]).collect();
    assert!(others.iter().all(|name| name.contains("attachments_")), "{others:?}");

    catalog.put_node(&NodeFacts { node_id: "n".to_owned(), ..NodeFacts::default() }).unwrap();
    let start = catalog.newest_change().unwrap();
    let settings = VolumeSettings { is_encrypted: true, ..VolumeSettings::default() };
    let new = NewVolume {
        name: "secret".to_owned(),
        capacity_bytes: 32 << 20,
        block_size_bytes: 4096,
        backend: BackendKind::File,
        write_cache_on: true,
        settings: settings.clone(),
    };
    let volume = catalog.begin_creating(&new).unwrap();
    catalog.finish_creating(volume.volume_uid).unwrap();
    let described = VolumeSettings { description: "of the safe".to_owned(), ..settings };
    catalog.set_properties(volume.volume_uid, &described).unwrap();
    let group_uid = Uuid::new_v4();
    let snapshot = NewSnapshot { snapshot_uid: Uuid::new_v4(), volume };
    catalog.begin_snapshots("s", group_uid, None, &[snapshot]).unwrap();
    catalog.finish_snapshots(group_uid).unwrap();
    let told: Vec<(Happened, bool)> = behind(&catalog, &start)
        .into_iter()
        .map(|change| match change.told.unwrap() {
            (happened, Told { facts: Facts::Volume(facts), .. }) => (happened, facts.is_encrypted == 1),
            (happened, Told { facts: Facts::Snapshot(facts), .. }) => (happened, facts.is_encrypted == 1),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(told, [(Happened::Created, true), (Happened::Updated, true), (Happened::Created, true)]);
}

#[test]
fn a_trigger_that_is_not_letter_by_letter_that_of_the_program_before_stays() {
    let name = "volumes_change_updated";
    let sql = triggers_in(before_encryption("").path())[name].replace("'updated'", "'updated' || ''");
    let dir = before_encryption(&format!("DROP TRIGGER {name}; {sql};"));
    let before = triggers_in(dir.path());
    drop(Catalog::open(dir.path()).unwrap());
    let after = triggers_in(dir.path());
    assert_eq!(after[name], before[name]);
    assert!(after["volumes_change_ready"].contains("is_encrypted"), "each for itself");
}
