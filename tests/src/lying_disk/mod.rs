//! A disk that lies: it acknowledges writes that it holds in memory only, until a FLUSH or FUA makes them stable, and at a
//! power cut it drops, tears and reorders the rest. Killing a process proves nothing about flushing, because its page
//! cache lives on; this does.
//!
//! - `image`: the contents and what a power cut leaves of them, decided by a seed.
//! - `server`: the NBD server on loopback and the power switch: [`LyingDisk`].
//! - `file_system`: an XFS on it, through the kernel's own NBD client: [`LyingFileSystem`].
//!
//! Used by the VM tests in `vm/lying_disk/`; nothing here knows volnode.

mod file_system;
mod image;
mod server;

pub use file_system::LyingFileSystem;
pub use image::{Losses, SECTOR_BYTES};
pub use server::LyingDisk;
