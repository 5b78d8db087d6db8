//! Memory maps: the driver's request descriptors, and the daemon's own data buffers.
//!
//! Owns: the life of one `mmap` region and every access to its bytes, system calls that copy them included. Never: knows tags or queues.
//! Called by: `queue` (shared, read-only, written by the driver) and `buffers` (private, written by the daemon and
//! by the kernel on its behalf).
//! Invariants: the region stays mapped from construction to drop; no Rust reference to its bytes is ever made,
//! because the kernel may write them at any time, so all access is by raw pointer and bounds are asserted.
#![allow(unsafe_code)] // mmap, munmap and raw access to memory that the kernel shares.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::abi::IoDesc;

/// Size and alignment of a huge page, in bytes, where there are such: x86-64's and aarch64's usual one.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// One mapped region.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the region belongs to the process, not to a thread, and this value is its only owner.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `len_bytes` of `file` from `offset_bytes`, readable only, with its pages present from the start.
    pub(crate) fn shared_read_only(file: &File, offset_bytes: u64, len_bytes: usize) -> io::Result<Self> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: without a fixed address the kernel picks unused address space, so no existing memory changes.
        let start = unsafe { mmap(ptr::null_mut(), len_bytes, ProtFlags::READ, flags, file, offset_bytes) }?;
        Self::adopt(start, len_bytes)
    }

    /// Maps `len_bytes` of zeroes, private to this process. Pages appear as they are touched, one by one: where few of
    /// many are ever used, huge ones would make megabytes resident for the first byte.
    pub(crate) fn anonymous(len_bytes: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without a fixed address the kernel picks unused address space, so no existing memory changes.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len_bytes, protection, MapFlags::PRIVATE) }?;
        let mapping = Self::adopt(start, len_bytes)?;
        // SAFETY: this advice changes no byte of the mapping, which is ours.
        match unsafe { madvise(start, len_bytes, Advice::LinuxNoHugepage) } {
            // A kernel without huge pages knows no such advice.
            Ok(()) | Err(Errno::INVAL) => Ok(mapping),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Maps a file, shared and writable, at a multiple of [`HUGE_PAGE_BYTES`], because only so can huge pages be mapped as
    /// such: the mapping, and where in it the file begins. Errors: mmap's.
    pub(crate) fn of_file(file: &File, len_bytes: usize) -> io::Result<(Self, usize)> {
        let room = Self::anonymous(len_bytes + HUGE_PAGE_BYTES)?;
        let start_bytes = room.start.as_ptr().align_offset(HUGE_PAGE_BYTES);
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
        let target = room.at(start_bytes, len_bytes).cast::<c_void>();
        // SAFETY: replaces a part of the room made above, of which nobody else knows.
        unsafe { mmap(target, len_bytes, protection, flags, file, 0) }?;
        Ok((room, start_bytes))
    }

    /// Asks for a huge page at `offset_bytes`, which [`Mapping::of_file`] aligned: memory files are of small pages otherwise,
    /// and each costs work when it is sent. Refused, they stay small.
    pub(crate) fn make_huge(&mut self, offset_bytes: usize) {
        let start = self.at(offset_bytes, HUGE_PAGE_BYTES);
        // The kernel makes a huge page only of memory of which a page was written.
        // SAFETY: `at` asserted that the byte lies inside the live, writable region, which is borrowed exclusively.
        unsafe { start.write_volatile(0) };
        // SAFETY: this advice changes no byte of the region.
        let _ = unsafe { libc::madvise(start.cast::<c_void>(), HUGE_PAGE_BYTES, libc::MADV_COLLAPSE) };
    }

    fn adopt(start: *mut c_void, len_bytes: usize) -> io::Result<Self> {
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, len_bytes })
    }

    /// Length, bytes.
    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Address of the byte at `offset_bytes`, for the kernel's use.
    pub(crate) fn address(&self, offset_bytes: usize) -> u64 {
        self.at(offset_bytes, 0).expose_provenance() as u64
    }

    /// Reads the `index`th of an array of descriptors that the driver writes.
    pub(crate) fn load_io_desc(&self, index: usize) -> IoDesc {
        let place = self.at(index * size_of::<IoDesc>(), size_of::<IoDesc>()).cast::<IoDesc>();
        // SAFETY: `at` asserted that the descriptor lies inside the live region; the region is page-aligned and 24 is
        // a multiple of 8, so it is aligned; any bytes are a valid `IoDesc`. The read is volatile because the driver
        // writes it; the acquire load of the completion queue's tail ordered that write before this read.
        unsafe { place.cast_const().read_volatile() }
    }

    /// Copies `data` into the region.
    pub(crate) fn copy_in(&mut self, offset_bytes: usize, data: &[u8]) {
        let place = self.at(offset_bytes, data.len());
        // SAFETY: `at` asserted that the target lies inside the live region, which is writable (only `buffers` calls
        // this, on an anonymous map); `data` is outside it, as no reference into the region exists.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), place, data.len()) };
    }

    /// Copies from the region to `data`.
    pub(crate) fn copy_out(&self, offset_bytes: usize, data: &mut [u8]) {
        let place = self.at(offset_bytes, data.len());
        // SAFETY: `at` asserted that the source lies inside the live region; `data` is outside it, as no reference
        // into the region exists.
        unsafe { ptr::copy_nonoverlapping(place.cast_const(), data.as_mut_ptr(), data.len()) };
    }

    /// Fills a part of the region from `file`. Errors: pread's; `UnexpectedEof` when the file ends before.
    pub(crate) fn read_from(
        &mut self,
        offset_bytes: usize,
        len_bytes: usize,
        file: &File,
        from_bytes: u64,
    ) -> io::Result<()> {
        let place = self.at(offset_bytes, len_bytes);
        each_part(len_bytes, |done_bytes| {
            let part = place.wrapping_add(done_bytes).cast::<c_void>();
            let from = (from_bytes + done_bytes as u64) as libc::off_t;
            // SAFETY: `at` asserted that the whole target lies inside the live region, which is writable (only
            // `buffers` and `staging` call this); no Rust reference to it exists.
            unsafe { libc::pread(file.as_raw_fd(), part, len_bytes - done_bytes, from) }
        })
    }

    /// Writes a part of the region to `file`. Errors: pwrite's; `UnexpectedEof` when the file takes no more.
    pub(crate) fn write_to(
        &self,
        offset_bytes: usize,
        len_bytes: usize,
        file: &File,
        to_bytes: u64,
    ) -> io::Result<()> {
        let place = self.at(offset_bytes, len_bytes);
        each_part(len_bytes, |done_bytes| {
            let part = place.wrapping_add(done_bytes).cast::<c_void>();
            let to = (to_bytes + done_bytes as u64) as libc::off_t;
            // SAFETY: `at` asserted that the whole source lies inside the live region; the call only reads it.
            unsafe { libc::pwrite(file.as_raw_fd(), part, len_bytes - done_bytes, to) }
        })
    }

    /// The place of `len_bytes` at `offset_bytes`; asserts that they are inside the region.
    fn at(&self, offset_bytes: usize, len_bytes: usize) -> *mut u8 {
        let end_bytes = offset_bytes.checked_add(len_bytes);
        assert!(
            end_bytes.is_some_and(|end| end <= self.len_bytes),
            "{len_bytes} bytes at {offset_bytes} are outside a map of {} bytes",
            self.len_bytes
        );
        self.start.as_ptr().wrapping_add(offset_bytes)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the region was mapped by a constructor with this start and length and is unmapped only here; the
        // owners drop it after the ring whose operations used its addresses.
        let result = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), self.len_bytes) };
        debug_assert!(result.is_ok(), "munmap of a region we mapped: {result:?}");
    }
}

/// Calls `transfer`, which gives what pread and pwrite give, with the bytes done so far until all of them are.
fn each_part(len_bytes: usize, mut transfer: impl FnMut(usize) -> isize) -> io::Result<()> {
    let mut done_bytes = 0;
    while done_bytes < len_bytes {
        match transfer(done_bytes) {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            moved if moved > 0 => done_bytes += moved as usize,
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// `bytes` rounded up to whole pages.
pub(crate) fn round_up_to_pages(bytes: usize) -> usize {
    bytes.next_multiple_of(rustix::param::page_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_land_where_they_were_put() {
        let mut mapping = Mapping::anonymous(8192).unwrap();
        mapping.copy_in(4090, b"straddles a page");
        let mut seen = [0; 16];
        mapping.copy_out(4090, &mut seen);
        assert_eq!(&seen, b"straddles a page");
        assert_eq!(mapping.address(4096) - mapping.address(0), 4096);
    }

    #[test]
    fn a_file_gives_back_what_it_was_given() {
        let fd = rustix::fs::memfd_create("copies", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        let mut mapping = Mapping::anonymous(8192).unwrap();
        mapping.copy_in(100, b"to the file and back");
        mapping.write_to(100, 20, &file, 3).unwrap();
        mapping.read_from(4090, 20, &file, 3).unwrap();
        let mut seen = [0; 20];
        mapping.copy_out(4090, &mut seen);
        assert_eq!(&seen, b"to the file and back");
        let error = mapping.read_from(0, 21, &file, 3).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "a file that ends is no full read");
    }

    #[test]
    #[should_panic(expected = "outside a map")]
    fn access_past_the_end_is_refused() {
        let mapping = Mapping::anonymous(4096).unwrap();
        mapping.copy_out(4090, &mut [0; 7]);
    }
}
