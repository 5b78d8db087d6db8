//! The extents of a file, as its file system tells them: the FIEMAP call.
//!
//! Owns: the call and its layout. Never: says what an extent means; `preallocated.rs` and `extent_map.rs` do, who call it.
//! Source: `Documentation/filesystems/fiemap.rst`, `include/uapi/linux/fiemap.h`, `include/uapi/linux/fs.h` (Linux 7.3); the layout
//! is checked below.
#![allow(unsafe_code)] // One ioctl that no safe wrapper has.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;

/// `FS_IOC_FIEMAP`: `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b;

/// What waits in the page cache is written first.
pub(super) const FLAG_SYNC: u32 = 1 << 0;
/// The extent with the file's end.
pub(super) const EXTENT_LAST: u32 = 1 << 0;
/// Allocated, and never written.
pub(super) const EXTENT_UNWRITTEN: u32 = 1 << 11;
/// Several of a file system that has no extents.
pub(super) const EXTENT_MERGED: u32 = 1 << 12;
/// Other files have it, too.
pub(super) const EXTENT_SHARED: u32 = 1 << 13;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Extent {
    pub(super) logical_bytes: u64,
    pub(super) physical_bytes: u64,
    pub(super) length_bytes: u64,
    pub(super) reserved64: [u64; 2],
    pub(super) flags: u32,
    pub(super) reserved: [u32; 3],
}

/// `struct fiemap`: a question, with room for so many extents of its answer.
#[repr(C)]
pub(super) struct Fiemap<const EXTENTS_MAX: usize> {
    start_bytes: u64,
    length_bytes: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS_MAX],
}

const _: () = assert!(size_of::<Extent>() == 56 && size_of::<Fiemap<1>>() == 32 + 56);

impl<const EXTENTS_MAX: usize> Fiemap<EXTENTS_MAX> {
    /// About the first extents of a range, which is not empty.
    pub(super) fn new(range: &Range<u64>, flags: u32) -> Self {
        Self {
            start_bytes: range.start,
            length_bytes: range.end - range.start,
            flags,
            mapped_extents: 0,
            extent_count: EXTENTS_MAX as u32,
            reserved: 0,
            extents: [Extent::default(); EXTENTS_MAX],
        }
    }

    /// The extents, as many as there is room for.
    ///
    /// # Errors
    /// The file system's; `InvalidData`: it tells of more than there is room for.
    pub(super) fn ask(&mut self, file: &File) -> io::Result<&[Extent]> {
        loop {
            // SAFETY: the descriptor is open as long as the file is borrowed, and the kernel writes no more extents into the
            // question, which is borrowed alone, than its count says that there is room for, and only during the call.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, std::ptr::from_mut(self)) };
            if result == 0 {
                let told = self.extents.get(..self.mapped_extents as usize);
                return told.ok_or(io::ErrorKind::InvalidData.into());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}
