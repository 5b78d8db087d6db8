//! Opening a volume's storage, on a thread of its own: the lock of a file is waited for as long as a predecessor's I/O takes.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use tracing::info;

use super::messages::{GateMessage, OpenError};
use crate::backend::file;
use crate::backend::memory::MemoryVolume;
use crate::catalog::{BackendKind, VolumeRecord};
use crate::data_config::DataServerConfig;
use crate::descriptors::Taken;
use crate::incarnation::Incarnations;
use crate::volume::{Backend, LossRecorder, Volume};

/// Opens a volume's storage and waits for its lock.
pub(super) fn open_volume(
    record: &VolumeRecord,
    config: &DataServerConfig,
    ring_count: usize,
    descriptors: Taken,
    incarnations: &Incarnations,
    gate: &Sender<GateMessage>,
) -> Result<Arc<Volume>, OpenError> {
    let backend = match record.backend {
        BackendKind::File => {
            let (uid, capacity_bytes) = (record.volume_uid, record.capacity_bytes);
            let file = file::open(&config.volumes_dir, uid, capacity_bytes, config.cache, ring_count)?;
            let began = Instant::now();
            file.lock()?;
            let waited = began.elapsed();
            if waited > Duration::from_millis(100) {
                info!(volume_uid = %uid, ?waited, "waited for a predecessor's I/O");
            }
            incarnations.admit(record, &file, &config.volumes_dir)?;
            Backend::File(file)
        }
        BackendKind::Memory => Backend::Memory(MemoryVolume::new(record.capacity_bytes)?),
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
    Ok(Arc::new(volume.with_descriptors(descriptors)))
}
