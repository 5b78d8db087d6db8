//! A data server on a file system of its own, and what is asked of it here.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use server::catalog::VolumeRecord;
use server::data::config::DataServerConfig;
use server::volume::copying::{CopyError, CopyHandle, CopySource, CopyTarget, CopyWanted};
use uuid::Uuid;

use super::support::{DEADLINE, LoopFs, Server};

/// How a fragmented file is: so many bytes, and as many of a hole.
pub(crate) const EXTENT_BYTES: u64 = 4096;

pub(crate) struct Stage {
    // First, so that it ends before its storage.
    pub(crate) server: Server,
    pub(crate) fs: LoopFs,
}

impl Stage {
    /// `None`, with the reason said, where the storage cannot be made.
    pub(crate) fn new(kind: &str, bytes: u64, change: impl FnOnce(&mut DataServerConfig)) -> Option<Self> {
        let fs = LoopFs::new(kind, bytes)?;
        let server = start(&fs, change);
        Some(Self { server, fs })
    }

    pub(crate) fn begin(&self, wanted: &[CopyWanted]) -> Result<CopyHandle, CopyError> {
        self.server.data.begin_copies(wanted)
    }

    /// A snapshot that is ready.
    pub(crate) fn snapshot(&self, volume: &VolumeRecord) -> Uuid {
        let snapshot_uid = Uuid::new_v4();
        let handle = self.begin(&[snapshot_of(volume, snapshot_uid)]).unwrap();
        assert_eq!(handle.wait(DEADLINE), Some(Ok(())));
        let (done, total) = handle.progress();
        assert_eq!((done, total), (volume.capacity_bytes, volume.capacity_bytes));
        snapshot_uid
    }

    pub(crate) fn path(&self, target: CopyTarget) -> PathBuf {
        self.server.data.copy_files().path(target)
    }

    pub(crate) fn bytes_of(&self, snapshot_uid: Uuid) -> Vec<u8> {
        std::fs::read(self.path(CopyTarget::Snapshot(snapshot_uid))).unwrap()
    }

    /// Waits for the copy's end: with an error, and nothing left.
    pub(crate) fn fails(&self, handle: &CopyHandle, snapshot_uid: Uuid) -> CopyError {
        let error = handle.wait(DEADLINE).unwrap().unwrap_err();
        assert!(!self.path(CopyTarget::Snapshot(snapshot_uid)).exists(), "{error}");
        error
    }

    /// A new volume whose file has so many extents, each filled with one value, with holes as long between them.
    pub(crate) fn fragmented(&self, name: &str, extents: u64) -> VolumeRecord {
        let volume =
            self.server.create_with(name, extents * 2 * EXTENT_BYTES, |new| new.block_size_bytes = 4096);
        let file = OpenOptions::new().write(true).open(self.volume_path(&volume)).unwrap();
        fill(&file, extents);
        volume
    }

    pub(crate) fn volume_path(&self, volume: &VolumeRecord) -> PathBuf {
        self.server.volumes_dir.join(volume.volume_uid.to_string())
    }
}

/// Starts a server whose data is on the file system.
pub(crate) fn start(fs: &LoopFs, change: impl FnOnce(&mut DataServerConfig)) -> Server {
    let volumes_dir = fs.mount.join("volumes");
    let _ = std::fs::create_dir(&volumes_dir);
    Server::start_with(|config| {
        config.volumes_dir = volumes_dir;
        change(config);
    })
}

fn fill(file: &File, extents: u64) {
    for extent in 0..extents {
        let value = (extent % 255) as u8 + 1;
        file.write_all_at(&[value; EXTENT_BYTES as usize], extent * 2 * EXTENT_BYTES).unwrap();
    }
    file.sync_all().unwrap();
}

pub(crate) fn snapshot_of(volume: &VolumeRecord, snapshot_uid: Uuid) -> CopyWanted {
    CopyWanted {
        source: CopySource::Volume(volume.clone()),
        target: CopyTarget::Snapshot(snapshot_uid),
        capacity_bytes: volume.capacity_bytes,
    }
}

/// Long enough for whatever is under way to get on.
pub(crate) const MOMENT: Duration = Duration::from_millis(20);
