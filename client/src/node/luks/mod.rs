//! Encrypted volumes: LUKS by cryptsetup and dm-crypt, above the disk that is sent to the server.
//!
//! - [`cryptsetup`]: one run of a program that is told a passphrase, or of one that takes a clear disk away.
//!
//! A clear disk is called by its attachment's id, so it is found again by whichever daemon comes next, and a forgotten one is known for
//! what it is (`mapper.rs`). Never here: what is done next (`luks_plan.rs`), and its carrying out (`supervisor/clear_disk.rs`).

pub mod cryptsetup;
