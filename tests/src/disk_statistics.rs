//! What a disk has done, as the kernel counts it.
//!
//! Used by the VM tests. Source: `Documentation/block/stat.rst`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// What the kernel calls a sector here, whatever the disk's own are.
const SECTOR_BYTES: u64 = 512;

/// Requests that a disk has completed since it is there, and their sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskStatistics {
    /// Reads.
    pub reads: u64,
    /// Sectors of 512 bytes that were read.
    pub sectors_read: u64,
    /// Writes.
    pub writes: u64,
    /// Sectors of 512 bytes that were written.
    pub sectors_written: u64,
    /// Discards.
    pub discards: u64,
}

impl DiskStatistics {
    /// Of a whole disk, such as `/dev/ublkb0`.
    ///
    /// # Errors
    /// It is not there.
    pub fn of(device: &Path) -> Result<Self> {
        let name = device.file_name().context("a device's name")?;
        let file = Path::new("/sys/block").join(name).join("stat");
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        Self::parse(&text).with_context(|| text.clone())
    }

    /// Bytes read and written.
    pub fn bytes_done(&self) -> u64 {
        (self.sectors_read + self.sectors_written) * SECTOR_BYTES
    }

    fn parse(text: &str) -> Option<Self> {
        let fields: Vec<&str> = text.split_whitespace().collect();
        let field = |number: usize| -> Option<u64> { fields.get(number - 1)?.parse().ok() };
        Some(Self {
            reads: field(1)?,
            sectors_read: field(3)?,
            writes: field(5)?,
            sectors_written: field(7)?,
            discards: field(12)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_of_a_device_are_added_up() {
        let text = "  11  2  1600  40  5  0  80  7  3  90  99  4 0 0 0 0 0\n";
        let statistics = DiskStatistics::parse(text).unwrap();
        assert_eq!(statistics.bytes_done(), 1680 * 512);
        assert_eq!((statistics.reads, statistics.writes, statistics.discards), (11, 5, 4));
        assert_eq!(DiskStatistics::parse("11 2 1600"), None);
    }
}
