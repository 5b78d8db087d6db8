//! Why there is no snapshot, clone or restored volume.
//!
//! Only says what is wrong; what its callers are told to do is in `status.rs`.

use uuid::Uuid;

use super::{OperationKind, StillOpen};
use crate::backend::lvm::PoolFill;
use crate::volume::copying::CopyError;

/// Why there is no snapshot, clone or restored volume.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No snapshot of that name or uid.
    #[error("there is no snapshot {0}")]
    NotFound(String),
    /// Some of the volumes have a snapshot of that name, or theirs are not of one instant.
    #[error("there is a snapshot {export_name} already, {why}")]
    Exists {
        /// `VOLUME@NAME`.
        export_name: String,
        /// Why it is not the one that was asked for.
        why: &'static str,
    },
    /// The volume's storage has no snapshots.
    #[error("volume {name} cannot be copied: {reason}")]
    Unsupported {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The volume is being formatted.
    #[error("volume {name} is being initialised by attachment {attachment_id}")]
    Initialising {
        /// Its name.
        name: String,
        /// Which formats it.
        attachment_id: Uuid,
    },
    /// Less is free than is kept for the volumes that have snapshots.
    #[error(
        "the server's file system has {} MiB free of {} MiB, and keeps {} MiB for what is written to volumes that have snapshots",
        .free_bytes >> 20, .total_bytes >> 20, .reserve_bytes >> 20
    )]
    Reserve {
        /// What is free.
        free_bytes: u64,
        /// What there is in all.
        total_bytes: u64,
        /// What is kept free.
        reserve_bytes: u64,
    },
    /// The thin pool is nearly full.
    #[error(
        "the thin pool's data is {:.1} % full and its metadata {:.1} %, and new copies are made below {most_percent:.0} %",
        .fill.data_percent, .fill.metadata_percent
    )]
    ThinPool {
        /// How full it is.
        fill: PoolFill,
        /// How full it may be.
        most_percent: f64,
    },
    /// A clone is at least as large as what it is made of.
    #[error("must be at least {source_bytes} bytes, which its source has")]
    Smaller {
        /// What the source has.
        source_bytes: u64,
    },
    /// The size of a clone is no whole number of blocks.
    #[error("must be a multiple of the block size, {block_size_bytes} bytes")]
    Unaligned {
        /// The source's.
        block_size_bytes: u32,
    },
    /// A copy of or into it goes on.
    #[error("{name} is in use by the {} operation {operation_id}, which goes on", .kind.as_str())]
    InProgress {
        /// Of a volume or a snapshot.
        name: String,
        /// What it makes.
        kind: OperationKind,
        /// Which.
        operation_id: Uuid,
    },
    /// A snapshot that somebody has open.
    #[error("snapshot {export_name} is open ({still_open})")]
    Open {
        /// `VOLUME@NAME`.
        export_name: String,
        /// By how many.
        still_open: StillOpen,
    },
    /// A snapshot that is attached to nodes.
    #[error("snapshot {export_name} is attached to {node_ids}")]
    Attached {
        /// `VOLUME@NAME`.
        export_name: String,
        /// Which.
        node_ids: String,
    },
    /// Somebody wants to write to a snapshot.
    #[error("{0} is a snapshot, which nobody writes to")]
    NeverChanges(String),
    /// The volume has snapshots, and they were not to be kept.
    #[error("volume {name} has snapshots: {count}")]
    VolumeHasSnapshots {
        /// Its name.
        name: String,
        /// How many.
        count: u32,
    },
    /// What changed is asked for from behind the target's end on.
    #[error("must be at most {target_bytes}, where the target ends")]
    BehindEnd {
        /// The target's size.
        target_bytes: u64,
    },
    /// Nobody takes what is told.
    #[error("what changed was not taken for {0:?}")]
    NotTaken(std::time::Duration),
    /// No operation of that id; or it ended long ago.
    #[error("there is no operation {0}: it is not known any more, or was another server process's")]
    OperationNotFound(String),
    /// Too many operations at once.
    #[error("{running} copies go on already, which is as many as there may be")]
    Busy {
        /// How many.
        running: usize,
    },
    /// The server stops.
    #[error("the server is stopping")]
    Stopping,
    /// The copy itself.
    #[error(transparent)]
    Copy(#[from] CopyError),
}

/// What is kept free on a file system of that size, in bytes: `percent` of it; by default the larger of 5 % and 1 GiB, the latter
/// at most 10 %.
pub(super) fn reserve_bytes(total_bytes: u64, percent: Option<u8>) -> u64 {
    let part = |percent: u64| total_bytes / 100 * percent;
    percent.map_or_else(|| part(5).max(part(10).min(1 << 30)), |percent| part(percent.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_a_part_of_the_file_system() {
        let gib = |gib: u64| gib << 30;
        assert_eq!(reserve_bytes(gib(100), None), gib(100) / 100 * 5, "5 % is more than 1 GiB");
        assert_eq!(reserve_bytes(gib(15), None), gib(1), "1 GiB is more than 5 %, and no more than 10 %");
        assert_eq!(reserve_bytes(gib(1), None), gib(1) / 100 * 10);
        assert_eq!(reserve_bytes(gib(100), Some(0)), 0);
        assert_eq!(reserve_bytes(gib(100), Some(30)), gib(100) / 100 * 30);
    }
}
