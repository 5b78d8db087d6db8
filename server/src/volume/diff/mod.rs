//! What changed between two files of one file system, told from their extent maps.
//!
//! ```text
//!   base's map ─┐ window  ┌─ base's map again: the same? ─► compare ─► changes ─► … the next window
//!   target's ───┴─────────┘
//! ```
//! `compare.rs` decides about a window, `walk.rs` goes from window to window; both without I/O: who calls brings the maps
//! ([`ExtentMap`](crate::backend::extent_map::ExtentMap)). Called by: `lifecycle/diffs.rs` (the API), `data/block_status.rs` (NBD).
//!
//! Why equal addresses are equal bytes. Neither file is written to, so the bytes of both stay what they are, and a file system keeps
//! one byte at an address at a time. What may move while they are compared are the extents (a balance, a defragmentation, a
//! deduplication). For bytes that differ to be taken for equal, both files have to be seen at one address, the base first: then the
//! base has left it in between, and the target has come there. So the base's map is read again, behind the target's. If it is the
//! same, the base has been away and is back, and the target has gone once more: moves of two files to and fro between two calls that follow
//! each other, each of them with a transaction of its own before its place may be used by another. If it is not the same, the window is
//! looked at anew, and after some times its bytes are told as changed. Zeroes have no address, and cannot become anything else.

pub mod compare;
pub mod walk;

pub use compare::{Change, Changed};
pub use walk::Walk;
