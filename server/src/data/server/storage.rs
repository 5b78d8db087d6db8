//! What is asked of the volumes' storage beside their I/O: how large it is, and how much of it is taken.

use std::io;

use uuid::Uuid;

use super::DataServer;
use crate::backend::file;
use crate::catalog::{BackendKind, VolumeRecord};
use crate::data::gate::GateMessage;
use crate::volume::Backend;

impl DataServer {
    /// Bytes of storage that the volume takes up now.
    pub fn allocated_bytes(&self, volume: &VolumeRecord) -> u64 {
        let volume_uid = volume.volume_uid;
        match volume.backend {
            BackendKind::File => file::allocated_bytes(&self.volumes_dir, volume_uid),
            // Whatever is below it is not ours to know, or LVM's to tell.
            BackendKind::Device | BackendKind::Lvm => volume.capacity_bytes,
            BackendKind::Memory => {
                self.ask(|reply| GateMessage::MemoryAllocated { volume_uid, reply }).unwrap_or(0)
            }
        }
    }

    /// Whether a sync of the volume failed since it was opened; false where it is not open.
    pub fn has_lost_writes(&self, volume_uid: Uuid) -> bool {
        let volume = self.ask(|reply| GateMessage::OpenVolume { volume_uid, reply }).flatten();
        volume.is_some_and(|volume| volume.has_lost_writes())
    }

    /// How large the storage of an open volume is now, in bytes; `None`: it is not open, or in no file or device. May wait where a
    /// file's file system does.
    pub fn measure_volume(&self, volume_uid: Uuid) -> Option<io::Result<u64>> {
        let volume = self.ask(|reply| GateMessage::OpenVolume { volume_uid, reply })??;
        match &volume.backend {
            Backend::File(file) => Some(file.measure()),
            Backend::Memory(_) | Backend::Callback(_) => None,
        }
    }
}
