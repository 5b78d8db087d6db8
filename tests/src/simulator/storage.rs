//! What a process of the simulated storage node stands on: the catalog, which outlives it, and whatever else a step may touch.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fastrand::Rng;
use proto::export_name::Secret;
use proto::nbd::transmission::NbdError;
use server::catalog::{AttachmentRecord, BackendKind, VolumeLimits, VolumeRecord};
use server::data::gate::{CatalogFailed, Found};
use uuid::Uuid;

use super::coverage::Coverage;
use super::disk::Disk;
use super::network::Link;
use crate::block_history::BLOCK_BYTES;

/// The name of the volume that everything is about.
pub(super) const NAME: &str = "a";
/// A volume that only strangers open; no operation reaches it.
pub(super) const OTHER_NAME: &str = "b";
pub(super) const OTHER_UID: Uuid = Uuid::from_u128(3);

/// The right to open the volume.
#[derive(Debug, Clone)]
pub(super) struct Attachment {
    pub(super) attachment_id: Uuid,
    pub(super) secret: Secret,
    pub(super) generation: u64,
    pub(super) session_epoch: u64,
    /// Nothing new is opened under it.
    pub(super) is_ending: bool,
}

/// What the storage node keeps across its processes.
#[derive(Debug)]
pub(super) struct Catalog {
    pub(super) server_id: Uuid,
    pub(super) volume_uid: Uuid,
    pub(super) capacity_bytes: usize,
    pub(super) write_cache_on: bool,
    /// How much may be asked of the volume in a second.
    pub(super) limits: VolumeLimits,
    pub(super) boot: u64,
    pub(super) incarnation: u64,
    /// What is remembered outside of it, for this boot.
    pub(super) record: Arc<Mutex<RecordFile>>,
    /// The incarnation that the process knows, and tells; 0 without one.
    pub(super) known: Arc<AtomicU64>,
    pub(super) attachment: Option<Attachment>,
    /// Somebody has begun to write to the volume, or was about to.
    pub(super) is_written: bool,
    /// Of the last attachment, or higher.
    pub(super) attach_generation: u64,
    /// Where an empty file stands for the volume; no operation reaches it.
    pub(super) volumes_dir: PathBuf,
}

/// What a step of the server may touch.
pub(super) struct Surroundings<'a> {
    pub(super) catalog: &'a mut Catalog,
    pub(super) disk: &'a mut Disk,
    pub(super) links: &'a mut [Link],
    pub(super) rng: &'a mut Rng,
    pub(super) coverage: &'a mut Coverage,
    pub(super) now: Instant,
    pub(super) room_bytes: usize,
    /// Replies are sometimes sent twice.
    pub(super) lies: bool,
    /// The catalog may fail, and strangers come.
    pub(super) may_fail: bool,
}

impl Catalog {
    /// As it is told.
    pub(super) fn incarnation(&self) -> String {
        let (boot, number) = self.told();
        format!("{boot}.{number}")
    }

    /// The boot, and how often it was raised.
    pub(super) fn told(&self) -> (u64, u64) {
        let recorded = lock(&self.record).incarnation;
        (self.boot, self.incarnation.max(recorded).max(self.known.load(Ordering::Relaxed)))
    }

    /// The active attachment of that identity.
    pub(super) fn attachment(&self, attachment_id: Uuid) -> Option<AttachmentRecord> {
        let held = self.attachment.as_ref();
        let held = held.filter(|held| held.attachment_id == attachment_id && !held.is_ending)?;
        Some(AttachmentRecord {
            attachment_id,
            volume_uid: self.volume_uid,
            node_id: "node".to_owned(),
            read_only: false,
            secret: held.secret.clone(),
            generation: held.generation,
            session_epoch: held.session_epoch,
            created_at_ms: 0,
            boot_id: String::new(),
            is_shared: false,
        })
    }

    /// A volume of that identity.
    pub(super) fn volume(&self, volume_uid: Uuid) -> Option<VolumeRecord> {
        let name = if volume_uid == self.volume_uid { NAME } else { OTHER_NAME };
        self.volume_named(name).filter(|volume| volume.volume_uid == volume_uid)
    }

    /// A volume of that name.
    pub(super) fn volume_named(&self, name: &str) -> Option<VolumeRecord> {
        let volume_uid = match name {
            NAME => self.volume_uid,
            OTHER_NAME => OTHER_UID,
            _ => return None,
        };
        Some(VolumeRecord {
            name: name.to_owned(),
            volume_uid,
            capacity_bytes: self.capacity_bytes as u64,
            block_size_bytes: BLOCK_BYTES as u32,
            backend: BackendKind::File,
            write_cache_on: self.write_cache_on,
            incarnation: self.incarnation,
            created_at_ms: 0,
            settings: Default::default(),
        })
    }

    /// The epoch that is recorded of an attachment.
    pub(super) fn session_epoch(&mut self, attachment_id: Uuid) -> Option<&mut u64> {
        let held = self.attachment.as_mut().filter(|held| held.attachment_id == attachment_id);
        held.map(|held| &mut held.session_epoch)
    }
}

pub(super) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The record of the volume, which outlives a process, and mostly not the machine.
#[derive(Debug, Default)]
pub(super) struct RecordFile {
    pub(super) text: Option<Vec<u8>>,
    /// The number that it has for this boot.
    pub(super) incarnation: u64,
}

impl RecordFile {
    /// The machine has lost power; `is_kept`: the file is on a disk.
    pub(super) fn lose_power(&mut self, is_kept: bool) {
        self.incarnation = 0;
        self.text = self.text.take().filter(|_| is_kept);
    }
}

/// Looks something up in the catalog, which may fail.
pub(super) fn look_up<T>(world: &mut Surroundings<'_>, find: impl FnOnce(&Catalog) -> Option<T>) -> Found<T> {
    if world.may_fail && world.rng.u8(..) == 0 {
        world.coverage.count("the catalog fails");
        return Err(CatalogFailed);
    }
    Ok(find(world.catalog))
}

/// What a failed request is told where there is no better word.
pub(super) const EIO: i32 = NbdError::Eio as i32;
