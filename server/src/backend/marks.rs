//! What is looked at of a block device to see whether it is what it was: its identity, the number of its disk, what was written to it.
//!
//! Only asks sysfs, which has all of this for every device. The inode of a device's name in /dev tells nothing of the kind: it is made
//! anew with each name, and its times are also set by udev. Asked by the volume's incarnation (`volume/incarnation/`), through
//! [`super::file::FileVolume`].
//! Source: Documentation/ABI/stable/sysfs-block (`diskseq`, Linux 5.15; `stat`).

use std::path::PathBuf;

/// Where in `stat` the sectors are that were written, and those that were discarded.
const SECTORS_WRITTEN: usize = 6;
const SECTORS_DISCARDED: usize = 13;

/// What is looked at of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceMarks {
    /// By what it was found; its path where it has no identity.
    pub identity: String,
    /// Of the device, in sysfs.
    pub sysfs_dir: PathBuf,
}

impl DeviceMarks {
    /// The number that the kernel gave to this appearance of the disk: one that was taken away and comes back has another. `None` on
    /// kernels that do not number them.
    pub fn disk_sequence(&self) -> Option<String> {
        // A partition is of its disk.
        let paths = [self.sysfs_dir.join("diskseq"), self.sysfs_dir.join("../diskseq")];
        let text = paths.iter().find_map(|path| std::fs::read_to_string(path).ok())?;
        Some(text.trim().to_owned())
    }

    /// How much was written to the device since it appeared; `None` where that is not known.
    pub fn written(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.sysfs_dir.join("stat")).ok()?;
        let fields: Vec<&str> = text.split_whitespace().collect();
        let written = fields.get(SECTORS_WRITTEN)?;
        let discarded = fields.get(SECTORS_DISCARDED).copied().unwrap_or("0");
        Some(format!("{written}+{discarded} sectors"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_has_its_disks_number_and_its_own_count() {
        let dir = tempfile::tempdir().unwrap();
        let partition = dir.path().join("sda/sda1");
        std::fs::create_dir_all(&partition).unwrap();
        let marks = DeviceMarks { identity: "a".to_owned(), sysfs_dir: partition.clone() };
        assert_eq!((marks.disk_sequence(), marks.written()), (None, None));
        std::fs::write(dir.path().join("sda/diskseq"), "9\n").unwrap();
        std::fs::write(partition.join("stat"), "  1 2 3 4 5 6 77 8 9 10 11 12 13 88 15 16 17\n").unwrap();
        assert_eq!(marks.disk_sequence().as_deref(), Some("9"));
        assert_eq!(marks.written().as_deref(), Some("77+88 sectors"));
        std::fs::write(partition.join("stat"), "1 2 3 4 5 6 77 8 9 10 11\n").unwrap();
        assert_eq!(marks.written().as_deref(), Some("77+0 sectors"), "an older kernel");
    }
}
