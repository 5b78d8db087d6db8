//! Opening a volume's storage, on a thread of its own: the lock of a file is waited for as long as a predecessor's I/O takes.

use std::sync::mpsc::Sender;

use tracing::warn;

use super::messages::{GateMessage, OpenError};
use crate::backend::device::{self, AdoptError, Found};
use crate::backend::file::{self, FileVolume};
use crate::backend::lvm::{LvmError, Thin};
use crate::backend::memory::MemoryVolume;
use crate::catalog::{BackendKind, Catalog, CatalogError, SNAPSHOTS_DIR_NAME, VolumeRecord};
use crate::data::config::DataServerConfig;
use crate::descriptors::Taken;
use crate::volume::incarnation::Incarnations;
use crate::volume::{Backend, LossRecorder, Volume};

/// What is to be opened.
#[derive(Debug)]
pub(super) struct Served {
    /// As it is served.
    pub(super) record: VolumeRecord,
    /// It is a snapshot, which nobody writes to: it has no lock, and no losses that anybody has to know of.
    pub(super) is_snapshot: bool,
}

/// Opens a volume's storage and waits for its lock; or a snapshot's.
pub(super) fn open_volume(
    Served { record, is_snapshot }: &Served,
    config: &DataServerConfig,
    ring_count: usize,
    descriptors: Taken,
    incarnations: &Incarnations,
    catalog: &Catalog,
    gate: &Sender<GateMessage>,
) -> Result<Volume, OpenError> {
    let backend = match record.backend {
        BackendKind::File if *is_snapshot => {
            let snapshots_dir = config.volumes_dir.with_file_name(SNAPSHOTS_DIR_NAME);
            let VolumeRecord { volume_uid, capacity_bytes, block_size_bytes, .. } = *record;
            Backend::File(file::open_snapshot(
                &snapshots_dir,
                volume_uid,
                capacity_bytes,
                block_size_bytes,
                config.cache,
                ring_count,
            )?)
        }
        BackendKind::File => {
            let (uid, capacity_bytes) = (record.volume_uid, record.capacity_bytes);
            let block_size_bytes = record.block_size_bytes;
            let volumes_dir = &config.volumes_dir;
            let file =
                file::open(volumes_dir, uid, capacity_bytes, block_size_bytes, config.cache, ring_count)?;
            incarnations.admit(record, &file, &config.volumes_dir)?;
            Backend::File(file)
        }
        BackendKind::Memory => Backend::Memory(MemoryVolume::new(record.capacity_bytes)?),
        BackendKind::Lvm => {
            Backend::File(open_thin(record, *is_snapshot, config, ring_count, incarnations, catalog)?)
        }
        BackendKind::Device => {
            Backend::File(open_adopted(record, config, ring_count, incarnations, catalog)?)
        }
    };
    // Only now: the file, which is let go of again, is what tells of a predecessor on this machine and of what was lost.
    let backend = match &config.opener {
        Some(opener) => Backend::Callback(opener.open(record.volume_uid, record.capacity_bytes)?),
        None => backend,
    };
    let (volume_uid, incarnations, gate) = (record.volume_uid, incarnations.clone(), gate.clone());
    let recorder = LossRecorder::new(move || {
        let is_recorded = incarnations.raise(volume_uid);
        let _ = gate.send(GateMessage::LostWrites { volume_uid });
        is_recorded
    });
    let (capacity_bytes, write_cache_on) = (record.capacity_bytes, record.write_cache_on);
    let volume = Volume::new(volume_uid, capacity_bytes, backend, write_cache_on, config.faults, recorder);
    Ok(volume.with_descriptors(descriptors))
}

/// Opens an adopted device or file, wherever it is now; what has grown since is the volume's.
fn open_adopted(
    record: &VolumeRecord,
    config: &DataServerConfig,
    ring_count: usize,
    incarnations: &Incarnations,
    catalog: &Catalog,
) -> Result<FileVolume, OpenError> {
    let VolumeRecord { name, volume_uid, capacity_bytes, block_size_bytes, .. } = record;
    let (volume_uid, capacity_bytes) = (*volume_uid, *capacity_bytes);
    let adopted = catalog.adopted(volume_uid)?.ok_or(CatalogError::VolumeNotFound(volume_uid))?;
    let adoptable = &config.adoptable;
    let (file, found) =
        device::open(adoptable, &adopted, capacity_bytes, *block_size_bytes, config.cache, ring_count)?;
    check_blocks(record, &found)?;
    let path = &found.adopted.path;
    if *path != adopted.path {
        warn!(%name, %volume_uid, %path, before = %adopted.path, "an adopted device has another name now");
        catalog.set_adopted_path(volume_uid, path)?;
    }
    incarnations.admit(record, &file, &config.volumes_dir)?;
    let whole_bytes = found.size_bytes - found.size_bytes % u64::from(*block_size_bytes);
    if whole_bytes > capacity_bytes {
        warn!(%name, %volume_uid, capacity_bytes = whole_bytes, before = capacity_bytes, "an adopted device has grown");
        catalog.raise_capacity(volume_uid, whole_bytes)?;
    }
    Ok(file)
}

/// Opens a thin volume's device, or a snapshot's, which is made active for that.
fn open_thin(
    record: &VolumeRecord,
    is_snapshot: bool,
    config: &DataServerConfig,
    ring_count: usize,
    incarnations: &Incarnations,
    catalog: &Catalog,
) -> Result<FileVolume, OpenError> {
    let VolumeRecord { volume_uid, capacity_bytes, block_size_bytes, .. } = *record;
    let lvm = config.lvm.as_deref().ok_or(LvmError::NotConfigured)?;
    let thin = if is_snapshot {
        lvm.check_pool(catalog.thin_pool_of_snapshot(volume_uid)?)?;
        Thin::Snapshot(volume_uid)
    } else {
        lvm.check_pool(catalog.thin_pool_of(volume_uid)?)?;
        Thin::Volume(volume_uid)
    };
    let (adoptable, located) = (lvm.adoptable(), lvm.locate(thin)?);
    let (file, found) =
        device::open(adoptable, &located, capacity_bytes, block_size_bytes, config.cache, ring_count)?;
    lvm.check_name(thin, &located)?;
    check_blocks(record, &found)?;
    if !is_snapshot {
        incarnations.admit(record, &file, &config.volumes_dir)?;
    }
    Ok(file)
}

/// A device whose blocks are larger than the volume's cannot be written as its clients expect.
fn check_blocks(record: &VolumeRecord, found: &Found) -> Result<(), AdoptError> {
    let VolumeRecord { block_size_bytes, .. } = record;
    if found.block_size_bytes <= *block_size_bytes {
        return Ok(());
    }
    let why = format!("has blocks of {} bytes now, the volume of {block_size_bytes}", found.block_size_bytes);
    Err(AdoptError::Unsuitable { path: found.adopted.path.clone(), why })
}
