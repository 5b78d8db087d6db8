//! What of a file the page cache holds.
//!
//! Owns: an address range that stands for the file and is never touched; mincore(2) tells of it which pages are in memory and read,
//! and not only on their way. Called by: `file.rs` (at open) and `page_pipes.rs`.
//! Source: mincore(2); it tells this of files that the caller may write (`mm/mincore.c`), as volumes are.
#![allow(unsafe_code)] // A question to the kernel, about a mapping that nobody can read or write.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{SeekFrom, fstatfs};
use rustix::mm::ProtFlags;

use crate::region::Region;

/// Pages that can be asked about at once: those of 1 MiB, wherever it begins.
const PAGES_MAX: usize = 257;

/// File systems whose `splice_read` takes no lock. Others would have the caller, who must not wait, stand behind whoever
/// writes: XFS takes the inode's lock, which a throttled write or a hole being punched holds for hundreds of milliseconds; NFS
/// also asks its server. Source: `include/uapi/linux/magic.h`, and each one's `file.c`.
const SPLICED_WITHOUT_LOCK: [u32; 3] = [EXT4_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC];
pub(crate) const EXT4_SUPER_MAGIC: u32 = 0xEF53;
pub(crate) const BTRFS_SUPER_MAGIC: u32 = 0x9123_683E;
const TMPFS_MAGIC: u32 = 0x0102_1994;

/// Address space that all views together may take, in bytes: a quarter of what a process has, so that volumes that are
/// large and nearly empty leave enough for everything else.
const VIEWS_BYTES_MAX: u64 = 32 << 40;
static VIEWS_BYTES: AtomicU64 = AtomicU64::new(0);

/// A view of a file's part of the page cache.
pub struct PageCacheView {
    range: Region,
    /// As long as the view.
    share: Share,
}

/// So many bytes of [`VIEWS_BYTES_MAX`], given back when it is dropped.
#[derive(Debug)]
struct Share(u64);

impl Share {
    fn take(bytes: u64) -> Option<Self> {
        let take = |taken_bytes: u64| taken_bytes.checked_add(bytes).filter(|sum| *sum <= VIEWS_BYTES_MAX);
        VIEWS_BYTES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok().map(|_| Self(bytes))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        VIEWS_BYTES.fetch_sub(self.0, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for PageCacheView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageCacheView").field("share", &self.share).finish()
    }
}

impl PageCacheView {
    /// Of the file's first `length_bytes`, at least one.
    ///
    /// # Errors
    /// `Unsupported`: of another file system than those that splice without a lock. `OutOfMemory`: there are views of too much.
    /// Those of mmap(2).
    pub fn new(file: &File, length_bytes: u64) -> io::Result<Self> {
        if !SPLICED_WITHOUT_LOCK.contains(&(fstatfs(file)?.f_type as u32)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let share = Share::take(length_bytes).ok_or(io::ErrorKind::OutOfMemory)?;
        let length_bytes = usize::try_from(length_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Self { range: Region::of_file(file, length_bytes, ProtFlags::empty())?, share })
    }

    /// Whether all of the range can be read without waiting, as of now. False also where that cannot be told.
    pub fn holds(&self, offset_bytes: u64, length_bytes: u32) -> bool {
        let page_bytes = rustix::param::page_size();
        let Ok(offset_bytes) = usize::try_from(offset_bytes) else { return false };
        let Some(end_bytes) = offset_bytes.checked_add(length_bytes as usize) else { return false };
        let begin_bytes = offset_bytes - offset_bytes % page_bytes;
        let mut residency = [0u8; PAGES_MAX];
        let pages = end_bytes.div_ceil(page_bytes) - begin_bytes / page_bytes;
        if end_bytes as u64 > self.share.0 || pages > residency.len() {
            return false;
        }
        let start = self.range.address(begin_bytes, end_bytes - begin_bytes).cast();
        // SAFETY: the range is inside the mapping, which is only asked about; a byte is written for each of its pages, and
        // there are so many.
        let result = unsafe { libc::mincore(start, end_bytes - begin_bytes, residency.as_mut_ptr()) };
        result == 0 && residency[..pages].iter().all(|page| page & 1 == 1)
    }
}

/// So much of a file is mapped and asked about at once, in bytes.
const LOOK_BYTES: u64 = 1 << 30;

/// Whether the page cache holds anything of the file's data, now. Takes long for a large one.
///
/// # Errors
/// The system's: it cannot be told.
pub(super) fn is_any_cached(file: &File) -> io::Result<bool> {
    let length_bytes = file.metadata()?.len();
    let mut residency = vec![0u8; (LOOK_BYTES / rustix::param::page_size() as u64) as usize];
    let mut offset_bytes = 0;
    // What was never written, and is not about to be, has no pages that say otherwise than the disk.
    while let Some(data_bytes) = next_data(file, offset_bytes)? {
        let begin_bytes = data_bytes - data_bytes % rustix::param::page_size() as u64;
        let end_bytes = (begin_bytes + LOOK_BYTES).min(length_bytes);
        let range_bytes = usize::try_from(end_bytes - begin_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let range = Region::of_file_at(file, begin_bytes, range_bytes, ProtFlags::empty())?;
        let start = range.address(0, range_bytes).cast();
        // SAFETY: the range is the mapping, which is only asked about; a byte is written for each of its pages, and there are
        // so many.
        if unsafe { libc::mincore(start, range_bytes, residency.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let pages = range_bytes.div_ceil(rustix::param::page_size());
        if residency[..pages].iter().any(|page| page & 1 == 1) {
            return Ok(true);
        }
        offset_bytes = end_bytes;
    }
    Ok(false)
}

/// Where the next data is; `None` behind the last.
fn next_data(file: &File, offset_bytes: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(offset_bytes)) {
        Ok(found_bytes) => Ok(Some(found_bytes)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    /// A file that can be looked at: where temporary files lie on another file system, one in memory.
    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        if SPLICED_WITHOUT_LOCK.contains(&(fstatfs(&file).unwrap().f_type as u32)) {
            return file;
        }
        File::from(rustix::fs::memfd_create("cached", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
    }

    #[test]
    fn what_was_written_is_held_and_what_was_evicted_is_not() {
        let file = file();
        file.write_all_at(&[7; 2 << 20], 0).unwrap();
        let view = PageCacheView::new(&file, 2 << 20).unwrap();
        assert!(view.holds(0, 1 << 20) && view.holds(2048, 1 << 20) && view.holds((2 << 20) - 1, 1));
        file.sync_all().unwrap();
        let evicted_bytes = std::num::NonZero::new(4096);
        rustix::fs::fadvise(&file, 64 << 10, evicted_bytes, rustix::fs::Advice::DontNeed).unwrap();
        // A file system in memory, or one with large pages in its cache, evicts nothing or more.
        if view.holds(64 << 10, 4096) {
            return println!("nothing was evicted");
        }
        assert!(!view.holds(0, 1 << 20) && !view.holds(60 << 10, 8192));
        assert!(view.holds(1 << 20, 1 << 20));
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, 64 << 10).unwrap();
        // A machine short of memory may have evicted others meanwhile.
        assert!(view.holds(64 << 10, 4096), "it was read again");
    }

    #[test]
    fn views_leave_address_space_to_others() {
        assert!(Share::take(VIEWS_BYTES_MAX + 1).is_none() && Share::take(u64::MAX).is_none());
        // Other tests take some at the same time, and none that would matter.
        let half = Share::take(VIEWS_BYTES_MAX / 2).unwrap();
        assert!(Share::take(VIEWS_BYTES_MAX / 2 + 1).is_none());
        drop(half);
        assert!(Share::take(VIEWS_BYTES_MAX / 2 + 1).is_some());
    }

    #[test]
    fn a_file_system_that_is_not_known_has_no_view() {
        let file = File::open("/proc/self/stat").unwrap();
        assert_eq!(PageCacheView::new(&file, 4096).unwrap_err().kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn what_is_outside_or_too_long_cannot_be_told() {
        let file = file();
        file.write_all_at(&[7; 4 << 20], 0).unwrap();
        let view = PageCacheView::new(&file, (3 << 20) + 100).unwrap();
        assert!(view.holds(2 << 20, 1 << 20) && view.holds(3 << 20, 100));
        assert!(!view.holds(3 << 20, 101) && !view.holds(u64::MAX, 1) && !view.holds(0, 2 << 20));
    }
}
