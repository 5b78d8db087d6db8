//! What is kept of adopted volumes, and what an older program makes of it.

use super::*;

fn adopted(path: &str, identity: &str) -> Adopted {
    Adopted { kind: AdoptedKind::BlockDevice, path: path.to_owned(), identity: identity.to_owned() }
}

#[test]
fn an_adopted_volume_is_there_with_what_it_adopted_after_opening_again() {
    let dir = fixture_dir("");
    let catalog = Catalog::open(dir.path()).unwrap();
    let new = NewVolume { backend: BackendKind::Device, ..new_volume("disk") };
    let volume = catalog.begin_creating(&new).unwrap();
    assert_eq!(catalog.add_adopted(volume.volume_uid, &adopted("/dev/sda", "wwid:1")).unwrap(), None);
    catalog.finish_creating(volume.volume_uid).unwrap();
    catalog.set_adopted_path(volume.volume_uid, "/dev/sdb").unwrap();
    drop(catalog);
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.volume_by_name("disk").unwrap().unwrap().backend, BackendKind::Device);
    assert_eq!(catalog.adopted(volume.volume_uid).unwrap(), Some(adopted("/dev/sdb", "wwid:1")));
    assert_eq!(catalog.adopted_uids().unwrap(), [volume.volume_uid]);
    let ours = catalog.volume_by_name("database").unwrap().unwrap();
    assert_eq!((ours.backend, catalog.adopted(ours.volume_uid).unwrap()), (BackendKind::File, None));
}

/// What a program from before there were adopted volumes does with the catalog: it reads these columns, and deletes rows.
#[test]
fn an_older_program_takes_an_adopted_volume_for_one_whose_file_is_missing() {
    let dir = fixture_dir("");
    let catalog = Catalog::open(dir.path()).unwrap();
    let new = NewVolume { backend: BackendKind::Device, ..new_volume("disk") };
    let volume = catalog.begin_creating(&new).unwrap();
    catalog.add_adopted(volume.volume_uid, &adopted("/dev/sda", "")).unwrap();
    catalog.finish_creating(volume.volume_uid).unwrap();
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.pragma_update(None, "foreign_keys", true).unwrap();
    let (version, oldest_reader): (u32, u32) = db
        .query_row("SELECT user_version, oldest_reader FROM pragma_user_version, server", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert_eq!((version, oldest_reader), (1, 1));
    let mut query = db.prepare("SELECT name || ' ' || backend FROM volumes ORDER BY name").unwrap();
    let told: Vec<String> = query.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(told, ["database file", "disk file", "half-made file", "scratch memory"]);
    db.execute("DELETE FROM volumes WHERE name = 'disk'", []).unwrap();
    let left: u32 = db.query_row("SELECT count(*) FROM adopted_volumes", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 0);
}

#[test]
fn a_device_is_adopted_once() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let adopt = |name: &str, path: &str, identity: &str| {
        let volume = catalog.begin_creating(&new_volume(name)).unwrap();
        catalog.add_adopted(volume.volume_uid, &adopted(path, identity)).unwrap()
    };
    let taken = |name: &str| Some(name.to_owned());
    assert_eq!(adopt("known", "/dev/sda", "wwid:1"), None);
    assert_eq!(adopt("same", "/dev/sdb", "wwid:1"), taken("known"));
    assert_eq!(adopt("in-its-place", "/dev/sda", "wwid:2"), None, "the first has another name by now");
    assert_eq!(adopt("nameless", "/dev/loop0", ""), None);
    assert_eq!(adopt("again", "/dev/loop0", ""), taken("nameless"));
    assert_eq!(adopt("other", "/dev/loop1", ""), None);
}

#[test]
fn a_volume_in_a_thin_pool_is_there_with_its_pool_and_is_a_file_for_older_programs() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let new = NewVolume { backend: BackendKind::Lvm, ..new_volume("thin") };
    assert!(matches!(catalog.begin_creating(&new), Err(CatalogError::NoThinPool)));
    catalog.set_thin_pool("vg0/pool".to_owned());
    let volume = catalog.begin_creating(&new).unwrap();
    catalog.finish_creating(volume.volume_uid).unwrap();
    let file = ready_volume(&catalog, "file");
    let [thin_snapshot, file_snapshot] = [&volume, &file].map(|volume| {
        let new = [NewSnapshot { snapshot_uid: Uuid::new_v4(), volume: volume.clone() }];
        catalog.begin_snapshots("s", Uuid::new_v4(), None, &new).unwrap();
        new[0].snapshot_uid
    });
    drop(catalog);
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.thin_pool_of_snapshot(thin_snapshot).unwrap().as_deref(), Some("vg0/pool"));
    assert_eq!(catalog.thin_pool_of_snapshot(file_snapshot).unwrap(), None);
    assert_eq!(catalog.volume_by_name("thin").unwrap().unwrap().backend, BackendKind::Lvm);
    assert_eq!(catalog.thin_pool_of(volume.volume_uid).unwrap().as_deref(), Some("vg0/pool"));
    assert_eq!(catalog.thin_pool_of(file.volume_uid).unwrap(), None);
    drop(catalog);
    let db = Connection::open(dir.path().join(CATALOG_FILE_NAME)).unwrap();
    db.pragma_update(None, "foreign_keys", true).unwrap();
    let told: String =
        db.query_row("SELECT backend FROM volumes WHERE name = 'thin'", [], |row| row.get(0)).unwrap();
    assert_eq!(told, "file");
    db.execute("DELETE FROM volumes WHERE name = 'thin'", []).unwrap();
    let left: u32 = db.query_row("SELECT count(*) FROM thin_volumes", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 0);
}
