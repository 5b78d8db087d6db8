//! Where a volume's bytes are: a sparse file, or memory.
//!
//! A backend says what has to be done for a request ([`VolumeOp`]); `volume.rs` decides the order and what an answer means,
//! `ring.rs` does it. Backends never touch a socket and never wait.
//! Called by: `gate/opener.rs` (open) and `volume.rs`.

pub mod file;
pub mod memory;
pub mod page_cache;
pub(crate) mod preallocated;

/// One operation of a volume, as the ring can do it. Ranges are in bytes of the volume.
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
    /// `fallocate(2)`.
    Allocate {
        /// `FALLOC_FL_*`
        mode: i32,
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
