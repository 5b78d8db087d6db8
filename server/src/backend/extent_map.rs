//! Where a file system keeps the bytes of a file: its extent map, asked of the file system itself.
//!
//! Owns what the answer of FIEMAP (`fiemap.rs`) means for comparing two files. Never: compares (`volume/diff/` does), or
//! reads data. Called by: `data/copies.rs` (opens), `volume/diff/` (reads). Only files that nobody writes to are asked: what is on its
//! way from the page cache is in no map.
//! Invariants: an address is told only where equal addresses of two files of the file system mean equal bytes; all else with bytes
//! is [`Place::Unknown`]. Source: `Documentation/filesystems/fiemap.rst`, `include/uapi/linux/fiemap.h`, `include/uapi/linux/fs.h`.
#![allow(unsafe_code)] // One ioctl that no library has.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;

use rustix::fs::fstatfs;

use super::fiemap::{EXTENT_LAST, EXTENT_MERGED, EXTENT_SHARED, EXTENT_UNWRITTEN, Extent, FLAG_SYNC, Fiemap};
use crate::backend::reflink;

/// Where the bytes of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: a hole, or space that was never written. They read as zeroes.
    Nowhere,
    /// From this address on, in bytes. Within one file system an address has one byte at a time.
    At(u64),
    /// Somewhere: its address is not known, or does not tell which bytes it has (compressed, inline).
    Unknown,
}

/// Bytes of a file that are in one place, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Which bytes of the file; not empty.
    pub bytes: Range<u64>,
    /// Where they are.
    pub place: Place,
}

impl Run {
    /// The part of it inside of a range; `None`: there is none.
    pub fn within(&self, range: &Range<u64>) -> Option<Self> {
        let (start, end) = (self.bytes.start.max(range.start), self.bytes.end.min(range.end));
        let place = match self.place {
            Place::At(address) => Place::At(address.saturating_add(start - self.bytes.start)),
            other => other,
        };
        (start < end).then_some(Self { bytes: start..end, place })
    }
}

/// A file's extent map.
pub trait ExtentMap {
    /// The file's bytes; what is behind them reads as zeroes.
    fn capacity_bytes(&self) -> u64;

    /// Puts the runs with bytes in a range into `runs`, which is emptied, in order; between them is [`Place::Nowhere`]. Gives the
    /// offset up to which all are told: more than the range's start, and less than its end where there are many.
    ///
    /// # Errors
    /// The file system's.
    fn read(&self, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64>;
}

impl<M: ExtentMap + ?Sized> ExtentMap for Box<M> {
    fn capacity_bytes(&self) -> u64 {
        (**self).capacity_bytes()
    }

    fn read(&self, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64> {
        (**self).read(range, runs)
    }
}

impl<M: ExtentMap + ?Sized> ExtentMap for &M {
    fn capacity_bytes(&self) -> u64 {
        (**self).capacity_bytes()
    }

    fn read(&self, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64> {
        (**self).read(range, runs)
    }
}

/// Extents asked for at once: 14 KiB of answer. Each costs some microseconds, on btrfs more where blocks are shared.
const EXTENTS_MAX: usize = 256;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    others: [u32; 6],
}

const _: () = assert!(size_of::<Attributes>() == 28);

/// `_IOR('X', 31, struct fsxattr)`
const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801c_581f;
/// With no other flag than these, the bytes at the address are the file's.
const PLAIN: u32 = EXTENT_LAST | EXTENT_MERGED | EXTENT_SHARED;
/// The file is on XFS's real-time device, whose addresses begin anew.
const FS_XFLAG_REALTIME: u32 = 1 << 0;

/// The extent map of an open file that nobody writes to.
#[derive(Debug)]
pub struct FileMap<F> {
    file: F,
    capacity_bytes: u64,
    /// Whether addresses may be compared with those of other files.
    has_addresses: bool,
}

impl<F: AsRef<File>> FileMap<F> {
    /// Of a file, of which the first `capacity_bytes` count.
    ///
    /// # Errors
    /// `Unsupported`, with the file system's name: it is not known what its addresses mean. The file system's own.
    pub fn new(file: F, capacity_bytes: u64) -> io::Result<Self> {
        let has_addresses = match fstatfs(file.as_ref())?.f_type as u32 {
            reflink::XFS_SUPER_MAGIC => !is_realtime(file.as_ref())?,
            reflink::BTRFS_SUPER_MAGIC => true,
            _ => {
                let name = reflink::name_of(file.as_ref());
                let words = format!("what changed is not known on {name}: it is on XFS and btrfs");
                return Err(io::Error::new(io::ErrorKind::Unsupported, words));
            }
        };
        Ok(Self { file, capacity_bytes, has_addresses })
    }
}

impl<F: AsRef<File>> ExtentMap for FileMap<F> {
    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn read(&self, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64> {
        let mut map = Box::new(Fiemap::<EXTENTS_MAX>::new(range, FLAG_SYNC));
        let told = map.ask(self.file.as_ref())?;
        take(told, range, self.has_addresses, runs)
    }
}

fn is_realtime(file: &File) -> io::Result<bool> {
    let mut attributes = Attributes::default();
    // SAFETY: the descriptor is open as long as the file is borrowed, and the kernel writes a `struct fsxattr` there, of that size.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) };
    if result == 0 { Ok(attributes.flags & FS_XFLAG_REALTIME != 0) } else { Err(io::Error::last_os_error()) }
}

/// The runs of an answer, and up to where it tells all. One that is out of order, or brings nothing new, is `InvalidData`.
fn take(told: &[Extent], range: &Range<u64>, has_addresses: bool, runs: &mut Vec<Run>) -> io::Result<u64> {
    runs.clear();
    let mut told_end = 0;
    for extent in told {
        if extent.logical_bytes < told_end {
            return Err(io::ErrorKind::InvalidData.into());
        }
        told_end = extent.logical_bytes.saturating_add(extent.length_bytes);
        let place = match extent.flags & !PLAIN {
            EXTENT_UNWRITTEN => continue,
            0 if has_addresses => Place::At(extent.physical_bytes),
            _ => Place::Unknown,
        };
        runs.extend(Run { bytes: extent.logical_bytes..told_end, place }.within(range));
    }
    match told.last() {
        Some(last) if told.len() == EXTENTS_MAX && last.flags & EXTENT_LAST == 0 => {
            if told_end <= range.start {
                return Err(io::ErrorKind::InvalidData.into());
            }
            Ok(told_end.min(range.end))
        }
        _ => Ok(range.end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNKNOWN: u32 = 1 << 1;
    const DELALLOC: u32 = 1 << 2;
    const ENCODED: u32 = 1 << 3;
    const INLINE: u32 = 1 << 9 | 1 << 8;

    fn extent(logical_bytes: u64, physical_bytes: u64, length_bytes: u64, flags: u32) -> Extent {
        Extent { logical_bytes, physical_bytes, length_bytes, flags, ..Extent::default() }
    }

    fn taken(told: &[Extent], range: &Range<u64>, has_addresses: bool) -> (Vec<(Range<u64>, Place)>, u64) {
        let mut runs = vec![Run { bytes: 0..1, place: Place::Unknown }];
        let end = take(told, range, has_addresses, &mut runs).unwrap();
        (runs.into_iter().map(|run| (run.bytes, run.place)).collect(), end)
    }

    #[test]
    fn an_address_is_told_only_where_it_tells_which_bytes_there_are() {
        let told = [
            extent(0, 8192, 4096, EXTENT_SHARED),
            extent(4096, 65536, 4096, EXTENT_UNWRITTEN | EXTENT_SHARED),
            extent(8192, 8192, 4096, ENCODED | EXTENT_SHARED),
            extent(12288, 0, 4096, DELALLOC | UNKNOWN),
            extent(16384, 0, 4096, INLINE),
            // A flag of a later kernel.
            extent(20480, 4096, 4096, 1 << 20),
            extent(24576, 4096, 8192, EXTENT_LAST | EXTENT_MERGED),
        ];
        let (runs, end) = taken(&told, &(2048..28672), true);
        let unknown = |start: u64| (start..start + 4096, Place::Unknown);
        let expected = [
            (2048..4096, Place::At(10240)),
            unknown(8192),
            unknown(12288),
            unknown(16384),
            unknown(20480),
            (24576..28672, Place::At(4096)),
        ];
        assert_eq!((runs.as_slice(), end), (&expected[..], 28672));
        let (runs, _) = taken(&told[..1], &(0..4096), false);
        assert_eq!(runs, [(0..4096, Place::Unknown)], "on a device whose addresses begin anew");
    }

    #[test]
    fn a_full_answer_tells_no_more_than_up_to_its_last_extent() {
        let told: Vec<Extent> = (0..EXTENTS_MAX as u64).map(|at| extent(at * 8192, 0, 4096, 0)).collect();
        let last_end = (EXTENTS_MAX as u64 - 1) * 8192 + 4096;
        assert_eq!(taken(&told, &(0..1 << 40), true).1, last_end);
        assert_eq!(taken(&told[1..], &(0..1 << 40), true).1, 1 << 40, "there was room for more");
        let mut with_last = told.clone();
        with_last[EXTENTS_MAX - 1].flags = EXTENT_LAST;
        assert_eq!(taken(&with_last, &(0..1 << 40), true).1, 1 << 40);
        let wrong = |told: &[Extent]| take(told, &(4096..8192), true, &mut Vec::new()).unwrap_err().kind();
        assert_eq!(wrong(&vec![extent(0, 0, 0, 0); EXTENTS_MAX]), io::ErrorKind::InvalidData, "no progress");
        let backwards = [extent(8192, 0, 4096, 0), extent(4096, 0, 4096, 0)];
        assert_eq!(wrong(&backwards), io::ErrorKind::InvalidData, "out of order");
    }
}
