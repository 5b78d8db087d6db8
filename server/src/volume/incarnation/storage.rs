//! What can be told of the storage below a volume: which file system it is, as mounted now, and which file.
//!
//! Only asks. A file system has no number that every mount of it has anew, but most have a directory below /sys/fs, made when one
//! is mounted and gone when it is unmounted, and the kernel numbers these directories in order. Mount ids are of no use: they belong
//! to a mount namespace, and a service manager gives every start a new one.
//! Called by `mod.rs`, on threads that may wait.
#![allow(unsafe_code)] // One ioctl that no library has.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags, fstatfs};

use super::history::DISK;
use crate::backend::file::FileVolume;
use crate::backend::marks::DeviceMarks;
use crate::backend::page_cache::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC};

/// Source: `include/uapi/linux/magic.h`; the names are those below /sys/fs.
const WITH_DIRECTORY: [(u32, &str); 4] =
    [(EXT4_SUPER_MAGIC, "ext4"), (0x5846_5342, "xfs"), (0xF2F5_2010, "f2fs"), (BTRFS_SUPER_MAGIC, "btrfs")];

/// `BTRFS_IOC_FS_INFO`, and where in its answer of 1,024 bytes the file system's UUID is. Source: `include/uapi/linux/btrfs.h`.
const BTRFS_IOC_FS_INFO: libc::Ioctl = 0x8400_941f_u32 as libc::Ioctl;
const BTRFS_FS_INFO_BYTES: usize = 1024;
const BTRFS_FSID_RANGE: std::ops::Range<usize> = 16..32;

/// The file system that the file is in, as mounted now; `None` where that cannot be told from what is mounted after it.
fn superblock(file: &File) -> Option<String> {
    let magic = fstatfs(file).ok()?.f_type as u32;
    let (_, kind) = WITH_DIRECTORY.iter().find(|(known, _)| *known == magic)?;
    let name = if magic == BTRFS_SUPER_MAGIC { btrfs_uuid(file) } else { device_name(file) }.ok()?;
    let directory = PathBuf::from("/sys/fs").join(kind).join(&name);
    let number = std::fs::metadata(directory).ok()?.ino();
    Some(format!("{kind}/{name}:{number}"))
}

/// The name that the kernel has for the block device below.
fn device_name(file: &File) -> io::Result<String> {
    let device = file.metadata()?.dev();
    let link = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let target = std::fs::read_link(link)?;
    let name = target.file_name().and_then(|name| name.to_str());
    Ok(name.ok_or(io::ErrorKind::InvalidData)?.to_owned())
}

fn btrfs_uuid(file: &File) -> io::Result<String> {
    let mut answer = [0u8; BTRFS_FS_INFO_BYTES];
    // SAFETY: the kernel writes at most so many bytes, as the request's number says.
    if unsafe { libc::ioctl(file.as_raw_fd(), BTRFS_IOC_FS_INFO, answer.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let uuid = uuid::Uuid::from_slice(&answer[BTRFS_FSID_RANGE]).map_err(io::Error::other)?;
    Ok(uuid.to_string())
}

/// Which file it is: a copy, a restored one, or one of another subvolume is another.
fn identity(file: &File) -> io::Result<String> {
    let told = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::BTIME)?;
    let born = if told.stx_mask & StatxFlags::BTIME.bits() == 0 {
        String::new()
    } else {
        format!("{}.{:09}", told.stx_btime.tv_sec, told.stx_btime.tv_nsec)
    };
    // Where there is no device below (NFS, overlay), the number is made up at each mount; subvolumes of btrfs are told by theirs.
    let is_numbered = told.stx_dev_major != 0 || superblock(file).is_some();
    let device = if is_numbered { (told.stx_dev_major, told.stx_dev_minor) } else { (0, 0) };
    Ok(format!("{}:{}:{}:{born}", device.0, device.1, told.stx_ino))
}

/// When the file was last written to.
fn modified(file: &File) -> io::Result<String> {
    let metadata = file.metadata()?;
    Ok(format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec()))
}

/// What there is to compare of a volume's storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Marks {
    /// See [`super::Record::superblock`].
    pub(super) superblock: Option<String>,
    /// See [`super::Record::file`].
    pub(super) file: String,
    /// See [`super::Record::modified`].
    pub(super) modified: String,
}

/// Of a file.
pub(super) fn of_file(file: &File) -> io::Result<Marks> {
    Ok(Marks { superblock: superblock(file), file: identity(file)?, modified: modified(file)? })
}

/// Of a volume's open storage.
pub(super) fn of_volume(volume: &FileVolume) -> io::Result<Marks> {
    volume.device_marks().map_or_else(|| of_file(volume.file()), |device| Ok(of_device(device)))
}

/// Of an adopted device.
pub(super) fn of_device(device: &DeviceMarks) -> Marks {
    Marks {
        superblock: device.disk_sequence().map(|sequence| format!("{DISK}{sequence}")),
        file: format!("block/{}", device.identity),
        modified: device.written().unwrap_or_default(),
    }
}

/// Writes back what the file system of the directory has in memory. Fails also for what could not be written back before, if
/// nobody has been told of it: `s_wb_err` in the kernel, which outlives the inodes that it is about.
pub(super) fn sync_file_system(directory: &Path) -> io::Result<()> {
    match File::open(directory) {
        Ok(directory) => sync_file_system_of(&directory),
        // That it cannot be asked is no loss.
        Err(error) => {
            tracing::warn!(%error, "cannot tell whether the volumes' file system failed to write something back");
            Ok(())
        }
    }
}

/// The same of the file system that an open file is in.
pub(super) fn sync_file_system_of(file: &File) -> io::Result<()> {
    Ok(rustix::fs::syncfs(file)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_another_file_and_a_renamed_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("a"), "1").unwrap();
        std::fs::copy(path("a"), path("b")).unwrap();
        let identity_of = |name: &str| identity(&File::open(path(name)).unwrap()).unwrap();
        let first = identity_of("a");
        assert_ne!(first, identity_of("b"));
        std::fs::rename(path("a"), path("c")).unwrap();
        assert_eq!(first, identity_of("c"));
    }

    #[test]
    fn a_file_system_without_a_directory_of_its_own_is_not_told() {
        assert_eq!(superblock(&File::open("/proc/self/stat").unwrap()), None);
        sync_file_system(Path::new("/proc")).unwrap();
    }
}
