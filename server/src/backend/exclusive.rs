//! How much of its file system a file has alone: what no other file shares with it.
//!
//! Called by `data_side.rs`, on a thread that may wait. Never: asks what the other files are. Where a file system shares nothing, that is all
//! that the file takes. Source: `Documentation/filesystems/fiemap.rst`.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::fiemap::{EXTENT_LAST, EXTENT_SHARED, Extent, Fiemap};

/// Extents asked for at once: 14 KiB of answer.
const EXTENTS_MAX: usize = 256;

/// Bytes of a file's extents that are its alone; of one that is written to meanwhile, some may be told twice or not.
///
/// # Errors
/// The file system's; `TimedOut`: it has more extents than can be looked at in that time.
pub fn of_file(path: &Path, limit: Duration) -> io::Result<u64> {
    let (file, deadline) = (File::open(path)?, Instant::now() + limit);
    let (mut at, mut exclusive_bytes) = (0, 0);
    let mut map = Box::new(Fiemap::<EXTENTS_MAX>::new(&(0..u64::MAX), 0));
    loop {
        *map = Fiemap::new(&(at..u64::MAX), 0);
        let told = map.ask(&file)?;
        exclusive_bytes += alone(told, at);
        match told.last() {
            Some(last) if told.len() == EXTENTS_MAX && last.flags & EXTENT_LAST == 0 => {
                let end = last.logical_bytes.saturating_add(last.length_bytes);
                if end <= at {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                at = end;
            }
            _ => return Ok(exclusive_bytes),
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

/// Of what is at or behind an offset.
fn alone(told: &[Extent], at: u64) -> u64 {
    let behind = |extent: &Extent| {
        let end = extent.logical_bytes.saturating_add(extent.length_bytes);
        end.saturating_sub(extent.logical_bytes.max(at))
    };
    told.iter().filter(|extent| extent.flags & EXTENT_SHARED == 0).map(behind).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_is_not_alone_and_nothing_counts_twice() {
        let extent = |logical_bytes, length_bytes, flags| Extent {
            logical_bytes,
            length_bytes,
            flags,
            ..Extent::default()
        };
        let told = [extent(0, 8192, 0), extent(8192, 4096, EXTENT_SHARED), extent(65536, 4096, EXTENT_LAST)];
        assert_eq!((alone(&told, 0), alone(&told, 4096), alone(&told, 1 << 30)), (12288, 8192, 0));
        assert_eq!(alone(&[], 0), 0);
    }
}
