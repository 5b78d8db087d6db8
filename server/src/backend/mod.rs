//! Where a volume's bytes are: a sparse file, memory, or a library that completes by call-back.
//!
//! ```text
//!   volume.rs ─ VolumeOp ─► ring.rs ─┬─ an operation of the ring ─► file.rs, memory.rs: a descriptor
//!                                    └─ Operation ───────────────► callback.rs: threads of its own
//! ```
//! `volume/request.rs` decides which operations ([`VolumeOp`]) a request takes, in which order and what a result means; `ring.rs` has them
//! done. What a backend with a descriptor is asked for goes to the kernel as it is; what the others are asked for comes back
//! through the mailbox. Which parts are allocated is asked by `block_status.rs`, of all of them on a thread that may wait.
//! Backends never touch a socket, and never wait on a ring's thread.
//! Called by: `gate/opener.rs` (open) and `volume/request.rs`.

mod background;
pub mod callback;
pub mod device;
mod discard;
pub mod exclusive;
pub mod extent_map;
mod fiemap;
pub mod file;
pub mod lvm;
pub mod marks;
pub mod memory;
pub mod page_cache;
pub(crate) mod preallocated;
pub mod reflink;

use std::ops::Range;

/// What becomes of a range's space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// It is given back, and the range reads as zeroes: a hole.
    Punch,
    /// The range reads as zeroes, and keeps or gets its space.
    Zero,
    /// The range gets the space that it lacks, and keeps its bytes.
    Fill,
    /// Of a device that has no holes: what of its space can be given back is. What the range reads as then is not told.
    Discard,
}

/// One operation of a volume. Ranges are in bytes of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeOp {
    /// Fill the request's buffer, from `buffer_offset_bytes` on.
    Read {
        /// Where in the volume.
        offset_bytes: u64,
        /// How much.
        length_bytes: u32,
        /// Where in the buffer.
        buffer_offset_bytes: u32,
    },
    /// Write the request's buffer, from `buffer_offset_bytes` on.
    Write {
        /// Where in the volume.
        offset_bytes: u64,
        /// How much.
        length_bytes: u32,
        /// Where in the buffer.
        buffer_offset_bytes: u32,
        /// On stable storage when done (`RWF_DSYNC`).
        durable: bool,
    },
    /// Write zeroes, at most [`crate::limits::ZEROES_BYTES_MAX`] at a time.
    WriteZeroes {
        /// Where in the volume.
        offset_bytes: u64,
        /// How much.
        length_bytes: u32,
    },
    /// Everything written so far to stable storage; without `metadata` only what is needed to read it back.
    Sync {
        /// fsync rather than fdatasync.
        metadata: bool,
    },
    /// Have a range read as zeroes, or have space, without writing it (`fallocate(2)`).
    Allocate {
        /// Which of these.
        mode: Allocation,
        /// Where in the volume.
        offset_bytes: u64,
        /// How much.
        length_bytes: u64,
    },
    /// Read the range into the page cache, in the background (`POSIX_FADV_WILLNEED`).
    Prefetch {
        /// Where in the volume.
        offset_bytes: u64,
        /// How much.
        length_bytes: u32,
    },
}

impl VolumeOp {
    /// The bytes of the volume that it may change.
    pub fn changes(&self) -> Option<Range<u64>> {
        match *self {
            Self::Write { offset_bytes, length_bytes, .. }
            | Self::WriteZeroes { offset_bytes, length_bytes } => {
                Some(offset_bytes..offset_bytes.saturating_add(u64::from(length_bytes)))
            }
            Self::Allocate { offset_bytes, length_bytes, .. } => {
                Some(offset_bytes..offset_bytes.saturating_add(length_bytes))
            }
            Self::Read { .. } | Self::Sync { .. } | Self::Prefetch { .. } => None,
        }
    }
}
