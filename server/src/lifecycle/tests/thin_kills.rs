//! Volumes in a thin pool: a server that is killed before or after any change of the pool, in everything that is done to one. What the next
//! one finds, after it has finished what was begun, is as before the call or as after it, with no logical volume and no row too many.

use std::collections::BTreeMap;

use super::copies::finish;
use super::*;
use crate::backend::lvm::stand_in::{Pool, Volumes};
use crate::backend::lvm::{LvmError, PoolName};
use crate::catalog::SnapshotState;

const MIB: u64 = 1 << 20;

fn pool_name() -> PoolName {
    "vg/pool".parse().unwrap()
}

/// The logical volume of a copy.
pub(super) fn of(target: CopyTarget) -> Thin {
    match target {
        CopyTarget::Snapshot(uid) => Thin::Snapshot(uid),
        CopyTarget::Volume(uid) => Thin::Volume(uid),
        CopyTarget::Restored(uid) => Thin::Restoring(uid),
        CopyTarget::Nameless(_) => panic!("a pool has none without a name"),
    }
}

pub(super) fn volumes(lvm: &Lvm) -> Vec<Uuid> {
    let uid = |thin| if let Thin::Volume(uid) = thin { Some(uid) } else { None };
    lvm.list().unwrap().into_iter().filter_map(|found| uid(found.thin)).collect()
}

pub(super) fn copies(lvm: &Lvm) -> Vec<CopyTarget> {
    let target = |thin| match thin {
        Thin::Snapshot(uid) => Some(CopyTarget::Snapshot(uid)),
        Thin::Restoring(uid) => Some(CopyTarget::Restored(uid)),
        Thin::Volume(_) | Thin::Replaced(_) => None,
    };
    lvm.list().unwrap().into_iter().filter_map(|found| target(found.thin)).collect()
}

/// As the data side of the server does, but for the requests that it holds.
pub(super) fn begin_copies(lvm: &Lvm, wanted: &[CopyWanted]) -> Result<CopyHandle, CopyError> {
    let source = |source: &CopySource| match source {
        CopySource::Volume(volume) => Thin::Volume(volume.volume_uid),
        CopySource::Snapshot { snapshot_uid, .. } => Thin::Snapshot(*snapshot_uid),
    };
    let copied = match wanted {
        [one] => lvm.copy(source(&one.source), of(one.target), one.capacity_bytes),
        several => {
            let copies: Vec<_> =
                several.iter().map(|wanted| (source(&wanted.source), of(wanted.target))).collect();
            lvm.copy_together(&copies, || Ok::<_, LvmError>(()), Ok)
        }
    };
    copied?;
    let (handle, report) = copying::begin();
    report.end(Ok(()));
    Ok(handle)
}

/// What a server that is killed there leaves.
struct Left {
    data_dir: PathBuf,
    volumes: Volumes,
    at: String,
}

/// A server with its volumes in a pool.
struct Server {
    bench: Bench,
    pool: Pool,
}

impl Server {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = Self::start(dir.path(), Volumes::new());
        Self { bench: Bench { dir, ..server.bench }, ..server }
    }

    /// As the program starts: the pool first, then the rows.
    fn start(data_dir: &std::path::Path, volumes: Volumes) -> Self {
        let catalog = Catalog::open(data_dir).unwrap();
        catalog.set_thin_pool(pool_name().to_string());
        let pool = Pool::new(pool_name(), volumes);
        let lvm =
            Lvm::start_with(pool_name(), catalog.server_id(), data_dir, Box::new(pool.clone())).unwrap();
        let state = DoubleState {
            lvm: Some(Arc::new(lvm)),
            thin_pool: Some(PoolFill { data_percent: 1.0, metadata_percent: 1.0 }),
            ..DoubleState::default()
        };
        let double = Double { catalog: catalog.clone(), state: Mutex::new(state) };
        let lifecycle = Lifecycle::new(catalog, Arc::new(double)).with_snapshot_reserve(Some(0));
        let dir = tempfile::tempdir().unwrap();
        Self { bench: Bench { dir, lifecycle, locks: NameLocks::default() }, pool }
    }

    fn create(&self, name: &str) -> Uuid {
        self.bench.create_on(BackendKind::Lvm, name, MIB).unwrap().volume_uid
    }

    fn write(&self, name: &str, content: &str) {
        let uid = self.bench.lifecycle.volume(name).unwrap().volume_uid;
        self.pool.write(&Thin::Volume(uid).name(), content);
    }

    fn snapshot_uid(&self, volume_name: &str, name: &str) -> Uuid {
        let named = SnapshotNamed::Name { volume_name: volume_name.to_owned(), name: name.to_owned() };
        self.bench.lifecycle.snapshot(&named).unwrap().0.snapshot_uid
    }

    fn incarnations(&self) -> BTreeMap<String, u64> {
        let volumes = self.bench.lifecycle.catalog().all_volumes().unwrap();
        volumes.into_iter().map(|(volume, _)| (volume.name, volume.incarnation)).collect()
    }

    /// All that users see: names with sizes and bytes. What is seen has its logical volume, and nothing else has one.
    fn seen(&self) -> BTreeMap<String, (u64, String)> {
        let catalog = self.bench.lifecycle.catalog();
        let (mut stored, mut seen) = (self.pool.volumes(), BTreeMap::new());
        let mut take = |thin: Thin, name: String, capacity_bytes| {
            let volume = stored.remove(&thin.name()).unwrap_or_else(|| panic!("{name} has its bytes"));
            assert!(volume.bytes >= capacity_bytes, "{name} has {} bytes of {capacity_bytes}", volume.bytes);
            seen.insert(name, (capacity_bytes, volume.content));
        };
        for (volume, state) in catalog.all_volumes().unwrap() {
            assert_eq!(state, VolumeState::Ready, "{}", volume.name);
            take(Thin::Volume(volume.volume_uid), volume.name, volume.capacity_bytes);
        }
        for (snapshot, state) in catalog.all_snapshots().unwrap() {
            assert_eq!(state, SnapshotState::Ready, "{}", snapshot.name);
            take(Thin::Snapshot(snapshot.snapshot_uid), snapshot.export_name(), snapshot.capacity_bytes);
        }
        assert!(stored.is_empty(), "without a row: {:?}", stored.keys());
        seen
    }
}

/// Does something, killed at each change of the pool that it makes, and looks at what is there then; and that it can be done again.
fn killed_everywhere(what: &str, changes: usize, prepare: impl Fn(&Server), call: impl Fn(&Server)) {
    let server = Server::new();
    prepare(&server);
    let before = server.seen();
    let (left, dir) = (Arc::new(Mutex::new(Vec::new())), server.bench.dir.path().to_owned());
    let keeping = Arc::clone(&left);
    server.pool.at_change(move |at, volumes| {
        let mut left = keeping.lock().unwrap();
        let data_dir = dir.join(format!("left-{}", left.len()));
        std::fs::create_dir(&data_dir).unwrap();
        let db = rusqlite::Connection::open(dir.join(CATALOG_FILE_NAME)).unwrap();
        let into = data_dir.join(CATALOG_FILE_NAME);
        db.execute("VACUUM INTO ?1", [into.to_str().unwrap()]).unwrap();
        left.push(Left { data_dir, volumes: volumes.clone(), at: at.to_owned() });
    });
    call(&server);
    let after = server.seen();
    assert_ne!(before, after, "{what}");
    let left = std::mem::take(&mut *left.lock().unwrap());
    assert_eq!(left.len(), 2 * changes, "{what}: before and after each change");
    for Left { data_dir, volumes, at } in left {
        let at = format!("{what}, killed {at}");
        let again = Server::start(&data_dir, volumes);
        let recovered = again.bench.lifecycle.recover().unwrap();
        assert_eq!(recovered.orphans, 0, "{at}");
        let seen = again.seen();
        assert!(seen == before || seen == after, "{at}: {seen:?}, neither {before:?} nor {after:?}");
        if seen == after {
            // Whoever has the new bytes has the incarnation that they came with.
            assert_eq!(again.incarnations(), server.incarnations(), "{at}");
        } else {
            call(&again);
            assert_eq!(again.seen(), after, "{at}: done again");
        }
    }
}

fn two_volumes(server: &Server) {
    for name in ["a", "b"] {
        server.create(name);
        server.write(name, &format!("{name} of monday"));
    }
}

#[test]
fn a_volume_is_made_grown_and_deleted_or_not() {
    killed_everywhere("create", 1, |_| {}, |server| assert!(!server.create("a").is_nil()));
    let resize = |server: &Server| {
        let lock = server.bench.locks.blocking_lock("a");
        server.bench.lifecycle.resize_volume(&lock, 3 * MIB).unwrap();
    };
    killed_everywhere("resize", 1, two_volumes, resize);
    killed_everywhere("delete", 1, two_volumes, |server| assert!(server.bench.delete("a").unwrap()));
}

#[test]
fn snapshots_of_one_or_of_several_are_made_and_deleted_or_not() {
    let snapshot = |names: &'static [&'static str]| {
        move |server: &Server| drop(server.bench.snapshot(names, "s").unwrap())
    };
    killed_everywhere("snapshot", 1, two_volumes, snapshot(&["a"]));
    killed_everywhere("group", 2, two_volumes, snapshot(&["a", "b"]));
    let prepare = |server: &Server| {
        two_volumes(server);
        server.bench.snapshot(&["a", "b"], "s").unwrap();
        server.write("a", "a of tuesday");
    };
    killed_everywhere("delete of a snapshot", 1, prepare, |server| {
        assert!(server.bench.delete_snapshot(server.snapshot_uid("a", "s")).unwrap());
    });
}

#[test]
fn a_clone_has_all_its_bytes_and_its_size_or_is_not_there() {
    let prepare = |server: &Server| {
        two_volumes(server);
        server.bench.snapshot(&["a"], "s").unwrap();
        server.write("a", "a of tuesday");
    };
    killed_everywhere("clone of a volume", 1, prepare, |server| {
        let clone = server.bench.start_clone("c", CloneOf::Volume("a".to_owned()), 0).unwrap();
        finish(clone).unwrap();
    });
    killed_everywhere("larger clone of a snapshot", 2, prepare, |server| {
        let source = CloneOf::Snapshot(server.snapshot_uid("a", "s"));
        finish(server.bench.start_clone("c", source, 5 * MIB).unwrap()).unwrap();
    });
}

/// The volume has its former bytes or those of the snapshot, and whoever sees the latter sees another incarnation.
#[test]
fn a_restore_is_done_or_not() {
    let prepare = |server: &Server| {
        two_volumes(server);
        server.bench.snapshot(&["a"], "s").unwrap();
        server.write("a", "a of tuesday");
        let lock = server.bench.locks.blocking_lock("a");
        server.bench.lifecycle.resize_volume(&lock, 2 * MIB).unwrap();
    };
    // Copied, grown, the former put aside, the copy put in its place, the former removed.
    killed_everywhere("restore", 5, prepare, |server| {
        let before = server.incarnations();
        server.bench.restore("a", server.snapshot_uid("a", "s")).unwrap();
        assert!(server.incarnations()["a"] > before["a"]);
    });
}
