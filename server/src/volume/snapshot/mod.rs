//! Copies of a volume's file that share its blocks (reflinks): snapshots, clones, and what a volume is restored from.
//!
//! ```text
//!   begin ─► every source holds changes ─► step ─► step ─► … ─► sources synced ─► copies synced ─► end
//!            (the instant)                  ▲ a piece that a request waits for comes first
//! ```
//! `copy_before_write.rs` decides which requests wait and which piece is next, without I/O, so that the simulator drives it too;
//! `copier.rs` is the thread that copies; `files.rs` has the files and where they are, `backend/reflink.rs` what a file system can do.
//! `data/copies.rs` brings them together with the gate and the rings.

pub mod copier;
pub mod copy_before_write;
pub mod files;
