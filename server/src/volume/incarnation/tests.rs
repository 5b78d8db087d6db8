use std::os::unix::fs::FileExt as _;

use super::record::RECORD_BYTES;
use super::*;
use crate::backend::file::{self, CacheMode};
use crate::catalog::{BackendKind, NewVolume};

const BOOT: &str = "6f1d";

struct Fixture {
    dir: tempfile::TempDir,
    catalog: Catalog,
    volume_uid: Uuid,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path()).unwrap();
        let new = NewVolume {
            name: "vol".to_owned(),
            capacity_bytes: 1 << 20,
            block_size_bytes: 512,
            backend: BackendKind::File,
            write_cache_on: true,
            settings: Default::default(),
        };
        let volume_uid = catalog.begin_creating(&new).unwrap().volume_uid;
        file::create(&catalog.volumes_dir(), volume_uid, 1 << 20).unwrap();
        catalog.finish_creating(volume_uid).unwrap();
        Self { dir, catalog, volume_uid }
    }

    fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn process(&self, boot_id: &str) -> Incarnations {
        let runtime_dir = self.runtime_dir();
        Incarnations::open(self.catalog.clone(), boot_id.to_owned(), "p".to_owned(), Some(&runtime_dir))
            .unwrap()
    }

    fn volume(&self) -> VolumeRecord {
        self.catalog.volume_by_uid(self.volume_uid).unwrap().unwrap()
    }

    fn file(&self) -> FileVolume {
        file::open(&self.catalog.volumes_dir(), self.volume_uid, 1 << 20, 4096, CacheMode::Auto, 1).unwrap()
    }

    fn admit(&self, incarnations: &Incarnations) {
        incarnations.admit(&self.volume(), &self.file(), &self.catalog.volumes_dir()).unwrap();
    }

    fn record_path(&self) -> PathBuf {
        self.runtime_dir().join(self.catalog.server_id().to_string()).join(self.volume_uid.to_string())
    }
}

#[test]
fn a_server_that_is_killed_between_record_and_catalog_forgets_nothing() {
    let fixture = Fixture::new();
    {
        let incarnations = fixture.process(BOOT);
        fixture.admit(&incarnations);
        assert_eq!(incarnations.word(&fixture.volume()), "6f1d.1");
        assert!(incarnations.raise(fixture.volume_uid));
        assert_eq!(incarnations.word(&fixture.volume()), "6f1d.2");
    }
    assert_eq!(fixture.volume().incarnation, 1, "the catalog has not been told");
    let next = fixture.process(BOOT);
    assert_eq!(next.word(&fixture.volume()), "6f1d.2", "before anybody opens it");
    fixture.admit(&next);
    assert_eq!((next.word(&fixture.volume()).as_str(), fixture.volume().incarnation), ("6f1d.3", 3));
    fixture.admit(&next);
    assert_eq!(next.word(&fixture.volume()), "6f1d.3", "and that is all");
    drop(next);
    let after_a_reboot = fixture.process("7a2e");
    assert_eq!(after_a_reboot.word(&fixture.volume()), "7a2e.3");
}

#[test]
fn restarts_are_no_loss_and_other_files_and_writers_are() {
    let fixture = Fixture::new();
    let path = file::path(&fixture.catalog.volumes_dir(), fixture.volume_uid);
    let start = || {
        let incarnations = fixture.process(BOOT);
        fixture.admit(&incarnations);
        let told = incarnations.word(&fixture.volume());
        (incarnations, told)
    };
    let told = |expected: &str| {
        let (incarnations, told) = start();
        assert_eq!(told, expected);
        incarnations.closed(fixture.volume_uid, &fixture.file());
    };
    told("6f1d.1");
    told("6f1d.1");
    let copy = path.with_extension("copy");
    std::fs::copy(&path, &copy).unwrap();
    // As who moves a data directory does.
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
    File::options().write(true).open(&copy).unwrap().set_modified(modified).unwrap();
    std::fs::rename(&copy, &path).unwrap();
    told("6f1d.2");
    told("6f1d.2");
    // The server itself changes it.
    let before_it_is_opened = fixture.process(BOOT);
    before_it_is_opened.changes(fixture.volume_uid);
    drop(before_it_is_opened);
    file::grow(&fixture.catalog.volumes_dir(), fixture.volume_uid, 2 << 20).unwrap();
    told("6f1d.2");
    // Somebody else does.
    File::options().write(true).open(&path).unwrap().write_all_at(&[2; 512], 0).unwrap();
    let (incarnations, _) = {
        let incarnations = fixture.process(BOOT);
        let refused = incarnations.admit(&fixture.volume(), &fixture.file(), &fixture.catalog.volumes_dir());
        assert!(
            matches!(refused, Err(AdmitError::Withheld(Withheld::RolledBack(Loss::Modified)))),
            "whoever waits has no right to it"
        );
        (incarnations, ())
    };
    drop(incarnations);
    told("6f1d.3");
    // Killed: what it wrote last is not known, and no reason to tell anybody anything.
    drop(start());
    File::options().write(true).open(&path).unwrap().write_all_at(&[1; 512], 0).unwrap();
    told("6f1d.3");
}

#[test]
fn a_record_of_another_boot_or_of_none_is_no_loss_and_one_that_cannot_be_read_is() {
    let fixture = Fixture::new();
    fixture.admit(&fixture.process("earlier boot"));
    fixture.admit(&fixture.process(BOOT));
    assert_eq!(fixture.volume().incarnation, 1);
    std::fs::remove_dir_all(fixture.runtime_dir()).unwrap();
    fixture.admit(&fixture.process(BOOT));
    assert_eq!(fixture.volume().incarnation, 1, "as after an upgrade");
    std::fs::write(fixture.record_path(), "").unwrap();
    fixture.admit(&fixture.process(BOOT));
    assert_eq!(fixture.volume().incarnation, 1, "a record that was never written");
    std::fs::write(fixture.record_path(), "{").unwrap();
    fixture.admit(&fixture.process(BOOT));
    assert_eq!(fixture.volume().incarnation, 2);
    fixture.process(BOOT).forget(fixture.volume_uid);
    assert!(!fixture.record_path().exists());
}

#[test]
fn a_record_is_changed_in_its_place() {
    let fixture = Fixture::new();
    let incarnations = fixture.process(BOOT);
    fixture.admit(&incarnations);
    let length_bytes = || std::fs::metadata(fixture.record_path()).unwrap().len();
    let before = length_bytes();
    assert!(incarnations.raise(fixture.volume_uid));
    assert_eq!((before, length_bytes()), (RECORD_BYTES as u64, RECORD_BYTES as u64));
}

#[test]
fn a_copy_of_a_data_directory_is_not_served_beside_it() {
    let fixture = Fixture::new();
    let _first = fixture.process(BOOT);
    let runtime_dir = fixture.runtime_dir();
    let second =
        Incarnations::open(fixture.catalog.clone(), BOOT.to_owned(), "q".to_owned(), Some(&runtime_dir));
    assert!(matches!(second, Err(RuntimeDirError::InUse(_))));
}

#[test]
fn a_loss_of_a_volume_that_is_not_open_is_in_the_record_that_a_former_process_left() {
    let fixture = Fixture::new();
    fixture.admit(&fixture.process(BOOT));
    let incarnations = fixture.process(BOOT);
    assert!(incarnations.raise(fixture.volume_uid), "nobody has it open");
    drop(incarnations);
    assert_eq!(fixture.volume().incarnation, 1, "the catalog has not been told");
    assert_eq!(fixture.process(BOOT).word(&fixture.volume()), "6f1d.2");
}

#[test]
fn without_a_directory_for_records_a_loss_is_in_the_catalog_or_nowhere() {
    let fixture = Fixture::new();
    let incarnations =
        Incarnations::open(fixture.catalog.clone(), BOOT.to_owned(), "p".to_owned(), None).unwrap();
    fixture.admit(&incarnations);
    assert!(!incarnations.raise(fixture.volume_uid));
    assert!(!incarnations.is_recorded(fixture.volume_uid, false));
    incarnations.settle(fixture.volume_uid).unwrap();
    assert_eq!(fixture.volume().incarnation, 2);
    fixture.admit(&incarnations);
    assert_eq!(incarnations.word(&fixture.volume()), "6f1d.3", "opened anew");
}
