//! The data side as the lifecycle sees it: the data server, and the backing files it serves.
//!
//! Owns no state: it translates. A `memory` volume has no storage to make or remove; it begins when it is first opened and
//! ends when it is released. Called by `lifecycle/`.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::backend::file::{self, FileError};
use crate::catalog::{BackendKind, VolumeRecord};
use crate::data_server::DataServer;
use crate::lifecycle::{DataSide, Holder, StillOpen};
use crate::machine_memory::{Allowed, ForVolumes};

/// A running data server with the directory of its backing files.
#[derive(Debug)]
pub(crate) struct ServedData {
    server: Arc<DataServer>,
    volumes_dir: PathBuf,
    /// Volumes whose storage is being synced, by a thread that may be stuck in that, and since when.
    syncing: Arc<Mutex<HashMap<Uuid, Instant>>>,
}

/// So long a call waits for a volume's storage. What does not answer then may never, and is not to hold up the calls for others.
const SYNC_LIMIT: Duration = Duration::from_secs(25);
/// So many calls may wait for so long: half of those that the API has at once.
const SYNCS_PATIENT_MAX: usize = 16;
/// So long the others wait, and only where no sync has taken longer yet: storage that is stuck is not asked by everybody.
const SYNC_LIMIT_MANY: Duration = Duration::from_secs(5);

/// How long one more sync is waited for, beside those that have taken so long already; `None`: it is not begun.
fn sync_limit(ages: impl Iterator<Item = Duration>) -> Option<Duration> {
    let (mut syncs, mut oldest) = (0, Duration::ZERO);
    for age in ages {
        syncs += 1;
        oldest = oldest.max(age);
    }
    match syncs {
        ..SYNCS_PATIENT_MAX => Some(SYNC_LIMIT),
        _ => (oldest < SYNC_LIMIT_MANY).then_some(SYNC_LIMIT_MANY),
    }
}

impl ServedData {
    /// `volumes_dir` is the one that the server was started with.
    pub(crate) fn new(server: Arc<DataServer>, volumes_dir: PathBuf) -> Self {
        Self { server, volumes_dir, syncing: Arc::default() }
    }
}

/// A sync that fails tells, once, that acknowledged writes may be lost: the clients are to know.
fn noticed(server: &DataServer, volume: &VolumeRecord, error: FileError) -> io::Error {
    if let FileError::Sync { source, .. } = &error {
        let errno = source.raw_os_error().unwrap_or(libc::EIO);
        if let Err(unrecorded) = server.sync_failed(volume, errno) {
            return io::Error::other(format!("{error}; {unrecorded}"));
        }
    }
    io_error(error)
}

impl ServedData {
    fn syncing(&self) -> MutexGuard<'_, HashMap<Uuid, Instant>> {
        self.syncing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Syncs on a thread of its own, which is left behind where it gets stuck.
    fn sync_file(&self, volume: &VolumeRecord) -> io::Result<()> {
        let volume_uid = volume.volume_uid;
        let limit = {
            let mut syncing = self.syncing();
            let limit = sync_limit(syncing.values().map(Instant::elapsed));
            let Some(limit) = limit.filter(|_| !syncing.contains_key(&volume_uid)) else {
                return Err(io::ErrorKind::TimedOut.into());
            };
            syncing.insert(volume_uid, Instant::now());
            limit
        };
        let (sender, synced) = mpsc::channel();
        let (server, syncing) = (Arc::clone(&self.server), Arc::clone(&self.syncing));
        let (volumes_dir, volume) = (self.volumes_dir.clone(), volume.clone());
        let spawned = std::thread::Builder::new().name("volume-sync".into()).spawn(move || {
            let result =
                file::sync(&volumes_dir, volume_uid).map_err(|error| noticed(&server, &volume, error));
            syncing.lock().unwrap_or_else(PoisonError::into_inner).remove(&volume_uid);
            // Nobody may be waiting any more.
            let _ = sender.send(result);
        });
        if let Err(error) = spawned {
            self.syncing().remove(&volume_uid);
            return Err(error);
        }
        synced.recv_timeout(limit).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// The system's error behind a file's, with its kind; what has no such is `InvalidData`.
fn io_error(error: FileError) -> io::Error {
    match &error {
        FileError::Io { source, .. } | FileError::Sync { source, .. } => {
            io::Error::new(source.kind(), error.to_string())
        }
        _ => io::Error::new(io::ErrorKind::InvalidData, error.to_string()),
    }
}

impl DataSide for ServedData {
    fn create_storage(&self, volume: &VolumeRecord) -> io::Result<()> {
        match volume.backend {
            BackendKind::File => {
                file::create(&self.volumes_dir, volume.volume_uid, volume.capacity_bytes).map_err(io_error)
            }
            BackendKind::Memory => Ok(()),
        }
    }

    fn memory_for_volumes(&self) -> ForVolumes {
        ForVolumes { allowed: Allowed::of_this_process(), data_side_bytes: self.server.memory_bytes_max() }
    }

    fn delete_storage(&self, volume_uid: Uuid) -> io::Result<()> {
        file::delete(&self.volumes_dir, volume_uid).map_err(io_error)?;
        self.server.forget_volume(volume_uid);
        Ok(())
    }

    fn stored_volumes(&self) -> io::Result<Vec<Uuid>> {
        file::list_uids(&self.volumes_dir).map_err(io_error)
    }

    fn grow_storage(&self, volume: &VolumeRecord, capacity_bytes: u64) -> io::Result<()> {
        self.server.changes_file(volume.volume_uid);
        let grown = file::grow(&self.volumes_dir, volume.volume_uid, capacity_bytes);
        grown.map_err(|error| noticed(&self.server, volume, error))
    }

    fn sync_storage(&self, volume: &VolumeRecord) -> io::Result<()> {
        match volume.backend {
            BackendKind::File => self.sync_file(volume),
            BackendKind::Memory => Ok(()),
        }
    }

    fn reopen_attachments(&self, volume_uid: Uuid) {
        self.server.reopen_attachments(volume_uid);
    }

    fn fence_attachment(&self, attachment_id: Uuid) -> Result<(), String> {
        self.server.fence_attachment(attachment_id).map_err(|error| error.to_string())
    }

    fn fence_named_writers(&self, volume_uid: Uuid) -> Result<(), String> {
        self.server.fence_named_writers(volume_uid).map_err(|error| error.to_string())
    }

    fn release_volume(&self, volume_uid: Uuid) -> Result<(), StillOpen> {
        self.server.release_volume(volume_uid).map_err(|busy| StillOpen { connections: busy.connections })
    }

    fn connections_of(&self, attachment_id: Uuid) -> u32 {
        self.server.connections_of(attachment_id)
    }

    fn holder_seen(&self, attachment_id: Uuid) {
        self.server.holder_seen(attachment_id);
    }

    fn holder(&self, attachment_id: Uuid) -> Holder {
        let (connections, gone_for) = self.server.holder_of(attachment_id);
        Holder { connections, gone_for }
    }

    fn allocated_bytes(&self, volume: &VolumeRecord) -> u64 {
        self.server.allocated_bytes(volume)
    }

    fn storage_incarnation(&self, volume: &VolumeRecord) -> String {
        self.server.storage_incarnation(volume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit_beside(syncs: usize, oldest_s: u64) -> Option<Duration> {
        sync_limit((0..syncs).map(|index| Duration::from_secs(if index == 0 { oldest_s } else { 0 })))
    }

    #[test]
    fn storage_that_is_stuck_does_not_take_every_call() {
        assert_eq!(limit_beside(0, 0), Some(SYNC_LIMIT));
        // Slow, or stuck for one volume.
        assert_eq!(limit_beside(SYNCS_PATIENT_MAX - 1, 600), Some(SYNC_LIMIT));
        // Many at once, on storage that answers.
        assert_eq!(limit_beside(SYNCS_PATIENT_MAX, 4), Some(SYNC_LIMIT_MANY));
        assert_eq!(limit_beside(SYNCS_PATIENT_MAX, 5), None);
        assert_eq!(limit_beside(100, 600), None);
    }
}
