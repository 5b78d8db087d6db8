//! What lies at both ends of a disk, and their erasing, by a process of its own: reading may wait for the server.
//!
//! ```text
//!   node daemon ──▶ volclient look-at-ends DISK ──▶ exit code: Found
//!               ──▶ volclient erase-ends DISK
//! ```
//! Never: decides (`node/luks_plan.rs`). Called by `node/luks/cryptsetup.rs`; `volclient` is the process.
//! Source: the LUKS headers' magic, LUKS2 On-Disk Format Specification 1.1.0, section 2.1.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::csi::blank::Ends;
use crate::csi::probe;

/// The subcommand of `volclient` that looks.
pub const LOOK_SUBCOMMAND: &str = "look-at-ends";
/// The one that erases.
pub const ERASE_SUBCOMMAND: &str = "erase-ends";
/// Both versions of the header begin with it.
const LUKS_MAGIC: [u8; 6] = *b"LUKS\xba\xbe";

/// What is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// A LUKS header.
    Luks,
    /// Zeros, at both ends.
    Zeros,
    /// Something else.
    Other,
}

impl Found {
    /// How the process ends that has found it; none of those with which a program fails.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Luks => 40,
            Self::Zeros => 41,
            Self::Other => 42,
        }
    }

    /// What a process has found that ended so; `None`: it has failed.
    pub fn of_exit_code(code: i32) -> Option<Self> {
        [Self::Luks, Self::Zeros, Self::Other].into_iter().find(|found| i32::from(found.exit_code()) == code)
    }
}

/// Looks at both ends. Waits for as long as the disk does.
///
/// # Errors
/// The disk's.
pub fn look(disk: &Path) -> io::Result<Found> {
    let disk = File::open(disk)?;
    let mut magic = [0; LUKS_MAGIC.len()];
    disk.read_exact_at(&mut magic, 0)?;
    if magic == LUKS_MAGIC {
        return Ok(Found::Luks);
    }
    Ok(match probe::ends(&disk)? {
        Ends::Zeros => Found::Zeros,
        Ends::Data => Found::Other,
    })
}

/// Writes zeros over both ends, durably. Waits for as long as the disk does.
///
/// # Errors
/// The disk's.
pub fn erase(disk: &Path) -> io::Result<()> {
    // None is made where there is no disk. One that is mounted, or that something else has for itself, is not erased.
    let alone = rustix::fs::OFlags::EXCL.bits().cast_signed();
    probe::erase_ends(&OpenOptions::new().read(true).write(true).custom_flags(alone).open(disk)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_zeros_and_all_else_are_told_apart_and_erased() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        assert_eq!(look(&path).unwrap(), Found::Zeros);
        file.write_all_at(&LUKS_MAGIC, 0).unwrap();
        assert_eq!(look(&path).unwrap(), Found::Luks);
        file.write_all_at(b"X", 0).unwrap();
        assert_eq!(look(&path).unwrap(), Found::Other);
        erase(&path).unwrap();
        assert_eq!(look(&path).unwrap(), Found::Zeros);
        file.write_all_at(b"X", (64 << 20) - 1).unwrap();
        assert_eq!(look(&path).unwrap(), Found::Other);
        assert!(
            look(&folder.path().join("absent")).is_err() && erase(&folder.path().join("absent")).is_err()
        );
        assert!(!folder.path().join("absent").exists());
    }

    #[test]
    fn an_exit_code_says_what_was_found_or_that_nothing_was() {
        for found in [Found::Luks, Found::Zeros, Found::Other] {
            assert_eq!(Found::of_exit_code(found.exit_code().into()), Some(found));
        }
        for failed in [0, 1, 2, 101, 134] {
            assert_eq!(Found::of_exit_code(failed), None, "{failed}");
        }
    }
}
