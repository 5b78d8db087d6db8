//! What a file system can share between two files, asked of the file system itself.
//!
//! Called by: `copier.rs` (shares), `files.rs` (asks beforehand), `backend/file.rs` (whether blocks may come to be shared).
//! Source: ioctl_ficlonerange(2); `include/uapi/linux/magic.h` for the names.
#![allow(unsafe_code)] // One ioctl that no library has.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;

use rustix::fs::fstatfs;

/// Of XFS, as of the others in [`NAMES`].
pub(super) const XFS_SUPER_MAGIC: u32 = 0x5846_5342;
pub(super) const BTRFS_SUPER_MAGIC: u32 = 0x9123_683e;

/// Names that people know, of file systems that a data directory may be on.
const NAMES: [(u32, &str); 10] = [
    (XFS_SUPER_MAGIC, "xfs"),
    (BTRFS_SUPER_MAGIC, "btrfs"),
    (0xef53, "ext4"),
    (0x0102_1994, "tmpfs"),
    (0x794c_7630, "overlayfs"),
    (0xf2f5_2010, "f2fs"),
    (0x2fc1_2fc1, "zfs"),
    (0x6969, "nfs"),
    (0xff53_4d42, "cifs"),
    (0x6573_5546, "a FUSE file system"),
];

/// Has these bytes of `to` be those of `from`, without a copy of them: the file system keeps them once, until either file is written
/// to. What is in the page cache of `from` is written first. Nobody reads or writes the bytes meanwhile.
///
/// # Errors
/// The file system's: `EOPNOTSUPP` and `EXDEV` where it cannot, `ENOSPC`, `EIO`, `EINVAL` for a range that ends inside of a block
/// and not at the end of both files.
pub fn share(from: &File, to: &File, bytes: &Range<u64>) -> io::Result<()> {
    let argument = libc::file_clone_range {
        src_fd: i64::from(from.as_raw_fd()),
        src_offset: bytes.start,
        src_length: bytes.end - bytes.start,
        dest_offset: bytes.start,
    };
    loop {
        // SAFETY: both descriptors are open as long as their files are borrowed, and the kernel only reads the argument, which is
        // of the type that the request's number says.
        let result = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const argument) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether blocks of the file, which is open for writing, may come to be shared with another one. Changes nothing: it is asked to
/// share a block with itself, which is refused as nonsense only where sharing is known at all.
pub fn may_share(file: &File) -> bool {
    let Some(block_bytes) = block_bytes(file) else { return false };
    match share(file, file, &(0..u64::from(block_bytes))) {
        Ok(()) => true,
        Err(error) => error.raw_os_error() == Some(libc::EINVAL),
    }
}

/// The block of the file system that the file is on, in bytes.
pub fn block_bytes(file: &File) -> Option<u32> {
    u32::try_from(fstatfs(file).ok()?.f_bsize).ok().filter(|bytes| bytes.is_power_of_two())
}

/// What the file system is called, and why it cannot share, in words.
pub fn why_not(file: &File) -> String {
    match magic(file) {
        XFS_SUPER_MAGIC => "an XFS that was made without reflink".to_owned(),
        _ => format!("{}, which has no reflinks", name_of(file)),
    }
}

/// What the file system is called.
pub fn name_of(file: &File) -> String {
    let magic = magic(file);
    let known = NAMES.iter().find(|(known, _)| *known == magic);
    known.map_or_else(|| format!("a file system of type {magic:#x}"), |(_, name)| (*name).to_owned())
}

fn magic(file: &File) -> u32 {
    fstatfs(file).map_or(0, |stat| stat.f_type as u32)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    /// Whatever this machine keeps its temporary files on.
    #[test]
    fn a_file_system_does_what_it_says_it_can() {
        let file = || tempfile::tempfile().unwrap();
        let (from, to) = (file(), file());
        from.write_all_at(&[7; 65536], 0).unwrap();
        let shared = share(&from, &to, &(0..65536));
        assert_eq!(may_share(&from), shared.is_ok(), "{shared:?}");
        let mut read = [0; 65536];
        from.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(read, [7; 65536], "nothing was changed");
        if shared.is_ok() {
            to.read_exact_at(&mut read, 0).unwrap();
            assert_eq!(read, [7; 65536]);
        }
        assert!(!why_not(&from).is_empty());
    }
}
