//! Encrypted volumes: LUKS by cryptsetup and dm-crypt, above the disk that is sent to the server.
//!
//! - [`core`]: what is done next, from what the server knows and what is on the disk. No I/O.
//! - [`mapper`]: the clear disks that the kernel has, as sysfs tells of them.
//! - [`cryptsetup`]: one run of a program that is told a passphrase, or of one that takes a clear disk away.
//!
//! A clear disk is called by its attachment's id, so it is found again by whichever daemon comes next, and a forgotten one is known for
//! what it is. Never here: which step is carried out when (`supervisor/clear_disk.rs`).

pub mod core;
pub mod cryptsetup;
pub mod mapper;
