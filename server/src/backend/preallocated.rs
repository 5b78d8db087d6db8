//! Which holes of a file are preallocated: space that is the file's already, and reads as zeroes.
//!
//! Owns: what that is to a client. `lseek(SEEK_DATA)` counts preallocated space as a hole, because it holds no data; to a client the two
//! differ, because writing to preallocated space cannot fail for want of it. Never: decides what is data; this is asked only of
//! ranges that `lseek` has called a hole.
//! Called by: `block_status.rs`, on its own thread.

use std::fs::File;
use std::io;

use super::fiemap::{EXTENT_UNWRITTEN, Extent, Fiemap};

/// What space a range has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// None.
    Missing,
    /// Allocated and never written.
    Preallocated,
    /// Allocated, and maybe written.
    Written,
}

/// The first run of one kind in `start_bytes..end_bytes`, which is not empty: where it ends, and what it is. Where the file
/// system does not tell, all is missing.
pub(crate) fn first_run(file: &File, start_bytes: u64, end_bytes: u64) -> (u64, Space) {
    let Ok(Some(extent)) = first_extent(file, start_bytes, end_bytes) else {
        return (end_bytes, Space::Missing);
    };
    if extent.logical_bytes > start_bytes {
        return (extent.logical_bytes.min(end_bytes), Space::Missing);
    }
    let extent_end = extent.logical_bytes.saturating_add(extent.length_bytes).min(end_bytes);
    if extent_end <= start_bytes {
        return (end_bytes, Space::Missing); // Not an extent of the range: the file system is not to be believed.
    }
    let is_unwritten = extent.flags & EXTENT_UNWRITTEN != 0;
    (extent_end, if is_unwritten { Space::Preallocated } else { Space::Written })
}

fn first_extent(file: &File, start_bytes: u64, end_bytes: u64) -> io::Result<Option<Extent>> {
    let mut map = Fiemap::<1>::new(&(start_bytes..end_bytes), 0);
    Ok(map.ask(file)?.first().copied())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use rustix::fs::{FallocateFlags, fallocate};

    use super::*;

    const KIB: u64 = 1 << 10;

    /// A file of 1 MiB with 64 KiB of data at 128 KiB, and space for 64 KiB at 512 KiB; `None` where the file system has no
    /// such things.
    fn file() -> Option<File> {
        // Of the source, which is on a disk more often than temporary files are, if it can be written.
        let file = tempfile::tempfile_in(".").or_else(|_| tempfile::tempfile()).unwrap();
        file.set_len(1024 * KIB).unwrap();
        file.write_all_at(&[1; 64 << 10], 128 * KIB).unwrap();
        fallocate(&file, FallocateFlags::KEEP_SIZE, 512 * KIB, 64 * KIB).ok()?;
        file.sync_all().unwrap();
        first_extent(&file, 0, 1024 * KIB).ok()?;
        Some(file)
    }

    #[test]
    fn preallocated_space_is_told_from_holes_and_from_data() {
        let Some(file) = file() else { return println!("SKIP no FIEMAP here") };
        let mut at = 0;
        let mut runs = Vec::new();
        while at < 1024 * KIB {
            let (end, space) = first_run(&file, at, 1024 * KIB);
            assert!(end > at);
            runs.push((at / KIB, end / KIB, space));
            at = end;
        }
        let expected = [
            (0, 128, Space::Missing),
            (128, 192, Space::Written),
            (192, 512, Space::Missing),
            (512, 576, Space::Preallocated),
            (576, 1024, Space::Missing),
        ];
        assert_eq!(runs, expected);
        assert_eq!(first_run(&file, 520 * KIB, 530 * KIB), (530 * KIB, Space::Preallocated));
    }

    #[test]
    fn where_nobody_tells_space_is_missing() {
        let (pipe, _writer) = std::io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(pipe));
        assert_eq!(first_run(&file, 0, 4096), (4096, Space::Missing));
    }
}
