//! A volume's disk, held open or known by its number, and what is mounted where of it.
//!
//! Owns: the proof that a name in /dev is the attachment's disk, and telling its mounts from others'. A name may be another disk's a moment
//! later; so a disk that is read or written is held open, and then looked at once more. Never: writes, decides, or trusts a name. The calls
//! wait for as long as the disk does, unless they say otherwise. Called by: `stage`, `publish`, `unstage`, `usage`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::v1::NodeAttachment;
use rustix::fs::{AtFlags, CWD, FileType, OFlags, Stat, fstat, major, minor, statat};
use uuid::Uuid;

use super::plan::{Place, Shown};
use crate::csi::mountinfo::{self, MountEntry};
use crate::csi::mounts::{MountError, mounts_at};
use crate::csi::probe;
use crate::csi::targets::Target;
use crate::mapper::{self, Mapper};

/// Where the kernel has the block devices by name, and by number.
const SYS_BLOCK: &str = "/sys/class/block";
const SYS_NUMBERS: &str = "/sys/dev/block";
/// How long a disk may take to have the size that its device process has told.
const RESIZE_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at its size.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Why a disk is not used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It has no device yet, or the name is nobody's.
    #[error(
        "{device:?} of attachment {attachment_id} is no block device here: {why}; see volctl attachments"
    )]
    NotThere {
        /// As the node daemon tells it.
        device: String,
        /// Whose.
        attachment_id: String,
        /// What was seen.
        why: String,
    },
    /// The name is another disk's.
    #[error(
        "{device:?} is another disk than the one of attachment {attachment_id}; nothing was written to it"
    )]
    Other {
        /// As the node daemon tells it.
        device: String,
        /// Whose it should be.
        attachment_id: String,
    },
    /// It has not the size that was told.
    #[error(
        "{device:?} has {has} bytes and should have {wanted}; kernels before 6.16 (this is {kernel}) see another size once the volume is staged anew"
    )]
    Size {
        /// Its name.
        device: String,
        /// What it has.
        has: u64,
        /// What it should have.
        wanted: u64,
        /// The running kernel's release.
        kernel: String,
    },
    /// It cannot be read.
    #[error("cannot look at {device:?}: {source}")]
    Io {
        /// Its name.
        device: String,
        /// Why.
        source: io::Error,
    },
}

/// What a disk is to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The name in /dev.
    pub path: PathBuf,
    /// Major and minor number.
    pub number: (u32, u32),
    /// The number of the file system that the name is in.
    names: (u32, u32),
}

impl Identity {
    /// Of the disk that is used, by its name and the kernel's; the disk itself is not asked. Of an encrypted volume it is the clear disk, which
    /// the kernel calls by the attachment's id.
    ///
    /// # Errors
    /// [`DeviceError::NotThere`], [`DeviceError::Other`]
    pub fn of(attachment: &NodeAttachment) -> Result<Self, DeviceError> {
        let device = if attachment.is_encrypted {
            let device = device_of(attachment);
            let attachment_id = attachment.attachment_id.clone();
            let why = "it is not open; stage the volume, with its passphrase".to_owned();
            let found = clear_disk(attachment).ok_or(DeviceError::NotThere { device, attachment_id, why })?;
            Path::new("/dev").join(found.kernel_name).display().to_string()
        } else {
            attachment.device_path.clone()
        };
        let not_there = |why: String| DeviceError::NotThere {
            device: device.clone(),
            attachment_id: attachment.attachment_id.clone(),
            why,
        };
        let path = Path::new(&device);
        let name = path.file_name().filter(|_| path.parent() == Some(Path::new("/dev")));
        let name = name.ok_or_else(|| not_there("that is no name below /dev".to_owned()))?;
        let stat = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| not_there(io::Error::from(errno).to_string()))?;
        if !is_block_device(&stat) {
            return Err(not_there("it is something else".to_owned()));
        }
        let number = (major(stat.st_rdev), minor(stat.st_rdev));
        let told = std::fs::read_to_string(Path::new(SYS_BLOCK).join(name).join("dev"))
            .map_err(|error| not_there(format!("the kernel has no such disk: {error}")))?;
        if told.trim() != format!("{}:{}", number.0, number.1) {
            let attachment_id = attachment.attachment_id.clone();
            return Err(DeviceError::Other { device: device.clone(), attachment_id });
        }
        Ok(Self { path: path.to_owned(), number, names: (major(stat.st_dev), minor(stat.st_dev)) })
    }

    /// Whether the mount is of this disk: of its file system, or of its name.
    pub fn is_of(&self, mount: &MountEntry) -> bool {
        self.is_file_system(mount) || self.is_name(mount)
    }

    fn shown_in(&self, mounts: &[MountEntry]) -> Shown {
        Shown {
            as_file_system: mounts.iter().any(|mount| self.is_file_system(mount)),
            as_device: mounts.iter().any(|mount| self.is_name(mount)),
        }
    }

    fn is_file_system(&self, mount: &MountEntry) -> bool {
        mount.device == self.number
    }

    /// A container may be given the device at its own name, by a bind like any other: that shows it to nobody else.
    fn is_name(&self, mount: &MountEntry) -> bool {
        mount.device == self.names
            && mount.root.file_name() == self.path.file_name()
            && mount.mount_point != self.path
    }
}

/// What of an attachment is used, by the name that the node daemon tells.
fn device_of(attachment: &NodeAttachment) -> String {
    match attachment.clear_device_path.as_str() {
        "" => attachment.device_path.clone(),
        clear => clear.to_owned(),
    }
}

/// Of an encrypted volume, if it is open; the disk below may be gone.
fn clear_disk(attachment: &NodeAttachment) -> Option<Mapper> {
    mapper::find(Uuid::try_parse(&attachment.attachment_id).ok()?)
}

/// Whether what is used lies on the attachment's own disk.
fn is_on_its_disk(attachment: &NodeAttachment) -> bool {
    let disk = Path::new(&attachment.device_path).file_name().and_then(|name| name.to_str());
    let is_on = |clear: Mapper| disk.is_some_and(|disk| clear.is_on_disk(disk));
    !attachment.is_encrypted || clear_disk(attachment).is_some_and(is_on)
}

fn is_block_device(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice
}

/// A disk that is held open: its number is nobody else's meanwhile.
#[derive(Debug)]
pub struct HeldDevice {
    file: File,
    /// What it is.
    pub identity: Identity,
}

impl HeldDevice {
    /// Opens the attachment's disk to read. The attachment has to be looked at once more after this, see [`Self::is_still_of`].
    ///
    /// # Errors
    /// [`DeviceError`], by cause.
    pub fn open(attachment: &NodeAttachment) -> Result<Self, DeviceError> {
        let identity = Identity::of(attachment)?;
        let device = device_of(attachment);
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::options().read(true).custom_flags(flags.bits() as i32).open(&identity.path);
        let io_error = |source| DeviceError::Io { device: device.clone(), source };
        let file = file.map_err(io_error)?;
        let stat = fstat(&file).map_err(|errno| io_error(errno.into()))?;
        if !is_block_device(&stat) || (major(stat.st_rdev), minor(stat.st_rdev)) != identity.number {
            return Err(DeviceError::Other { device, attachment_id: attachment.attachment_id.clone() });
        }
        Ok(Self { file, identity })
    }

    /// Makes sure that the name is still the same attachment's now that the disk is held, and that the disk has its size.
    ///
    /// # Errors
    /// [`DeviceError::Other`], [`DeviceError::Size`]; [`DeviceError::Io`]
    pub fn is_still_of(
        &self,
        before: &NodeAttachment,
        now: Option<&NodeAttachment>,
    ) -> Result<(), DeviceError> {
        let is_same = |now: &NodeAttachment| {
            now.attachment_id == before.attachment_id && now.device_path == before.device_path
        };
        // A clear disk may have been closed and opened before this one was held, and its number been given to another.
        let is_ours = |now: &NodeAttachment| {
            let is_named_so = Identity::of(now).is_ok_and(|identity| identity == self.identity);
            !now.is_encrypted || is_named_so && is_on_its_disk(now)
        };
        let device = device_of(before);
        let Some(now) = now.filter(|now| is_same(now) && is_ours(now)) else {
            return Err(DeviceError::Other { device, attachment_id: before.attachment_id.clone() });
        };
        self.wait_for_bytes(now.capacity_bytes, |has| has == now.capacity_bytes)
    }

    /// Waits until the disk has at least this size.
    ///
    /// # Errors
    /// [`DeviceError::Size`], [`DeviceError::Io`]
    pub fn wait_until_grown(&self, wanted: u64) -> Result<(), DeviceError> {
        self.wait_for_bytes(wanted, |has| has >= wanted)
    }

    /// Its size in bytes.
    ///
    /// # Errors
    /// [`DeviceError::Io`]
    pub fn bytes(&self) -> Result<u64, DeviceError> {
        let device = self.identity.path.display().to_string();
        probe::device_bytes(&self.file).map_err(|source| DeviceError::Io { device, source })
    }

    fn wait_for_bytes(&self, wanted: u64, is_right: impl Fn(u64) -> bool) -> Result<(), DeviceError> {
        let over = Instant::now() + RESIZE_DEADLINE;
        loop {
            let has = self.bytes()?;
            if is_right(has) {
                return Ok(());
            }
            if Instant::now() >= over {
                let device = self.identity.path.display().to_string();
                let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
                return Err(DeviceError::Size { device, has, wanted, kernel });
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// The same disk, to write to, with nobody else who has it to themselves: a mounted one is refused.
    ///
    /// # Errors
    /// [`DeviceError::Io`]
    pub fn open_to_write(&self) -> Result<File, DeviceError> {
        use std::os::fd::AsRawFd as _;
        let held = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = OFlags::EXCL | OFlags::CLOEXEC;
        let opened = File::options().read(true).write(true).custom_flags(flags.bits() as i32).open(held);
        let device = self.identity.path.display().to_string();
        opened.map_err(|source| DeviceError::Io { device, source })
    }
}

impl AsFd for HeldDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What lies at the target, for whoever is to put the disk there. Does not wait for the disk.
///
/// # Errors
/// [`MountError`]: what is mounted cannot be read.
pub fn place_of(target: &Target, disk: &Identity) -> Result<Place, MountError> {
    let mounts = mounts_at(target)?;
    let Some(uppermost) = mounts.last() else { return Ok(Place::Free) };
    let is_whole = uppermost.root == Path::new("/");
    if disk.is_file_system(uppermost) && is_whole || disk.is_name(uppermost) {
        return Ok(Place::Volume { read_only: uppermost.is_read_only });
    }
    Ok(Place::Other(described(uppermost)))
}

/// What lies at the target, for whoever is to take the disk away from there: a mount of a disk that is gone is taken for the volume's, one
/// of another disk is not. Does not wait for any disk.
///
/// # Errors
/// As for [`place_of`].
pub fn place_to_free(
    target: &Target,
    disk: Option<&Identity>,
    others: &[Identity],
) -> Result<Place, MountError> {
    let mounts = mounts_at(target)?;
    let Some(uppermost) = mounts.last() else { return Ok(Place::Free) };
    let is_ours = |mount: &MountEntry| disk.is_some_and(|disk| disk.is_of(mount));
    let is_others = |mount: &MountEntry| others.iter().any(|other| other.is_of(mount));
    let has_disk = |(major, minor): (u32, u32)| {
        // A file system without a disk has a number of its own, with the major 0; such a one was never ours.
        major == 0 || Path::new(&format!("{SYS_NUMBERS}/{major}:{minor}")).exists()
    };
    let foreign = |mount: &&MountEntry| {
        let is_gone =
            || !has_disk(mount.device) || is_name_of_gone(mount) || is_of_clear_disk_without_disk(mount);
        !is_ours(mount) && (is_others(mount) || !is_gone())
    };
    match mounts.iter().find(foreign) {
        Some(mount) => Ok(Place::Other(described(mount))),
        None => Ok(Place::Volume { read_only: uppermost.is_read_only }),
    }
}

/// A bind of a name in /dev that the kernel has removed.
fn is_name_of_gone(mount: &MountEntry) -> bool {
    let root = mount.root.to_string_lossy();
    // The kernel's own mark of a removed file.
    mount.fs_type == "devtmpfs" && root.ends_with("//deleted")
}

/// A clear disk that was taken from under its users, which it waits for, or a bind of its name: its own disk is gone.
fn is_of_clear_disk_without_disk(mount: &MountEntry) -> bool {
    is_of_any(mount, mapper::all().iter().filter(|clear| !clear.has_disk()))
}

fn is_of_any<'a>(mount: &MountEntry, mut clear_disks: impl Iterator<Item = &'a Mapper>) -> bool {
    let name = (mount.fs_type == "devtmpfs").then(|| mount.root.file_name()).flatten();
    clear_disks.any(|clear| clear.number == mount.device || name == Some(clear.kernel_name.as_ref()))
}

/// Whether the disk is mounted anywhere but at these paths.
///
/// # Errors
/// [`MountError::Mountinfo`]
pub fn is_mounted_elsewhere(disk: &Identity, but: &[&Target]) -> Result<bool, MountError> {
    let mut known = Vec::new();
    for target in but {
        known.push(target.kernel_path()?);
    }
    let mounts = mountinfo::read().map_err(MountError::Mountinfo)?;
    Ok(mounts.iter().any(|mount| disk.is_of(mount) && !known.contains(&mount.mount_point)))
}

/// How the disk is mounted and shown on this node, wherever that is. Does not wait for the disk.
///
/// # Errors
/// [`MountError::Mountinfo`]
pub fn shown(disk: &Identity) -> Result<Shown, MountError> {
    Ok(disk.shown_in(&mountinfo::read().map_err(MountError::Mountinfo)?))
}

/// Whether nobody can write to the file system that is mounted at the target, whatever its mount says.
///
/// # Errors
/// As for [`place_of`].
pub fn is_file_system_read_only(target: &Target) -> Result<bool, MountError> {
    Ok(mounts_at(target)?.last().is_some_and(|uppermost| uppermost.is_file_system_read_only))
}

/// For people.
fn described(mount: &MountEntry) -> String {
    format!("an {} of device {}:{}", mount.fs_type, mount.device.0, mount.device.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(device_path: &str) -> NodeAttachment {
        NodeAttachment {
            attachment_id: "a".to_owned(),
            device_path: device_path.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn a_name_that_is_no_disk_is_not_taken() {
        for no_disk in
            ["", "/dev/null", "/dev/no-such-disk", "/etc/passwd", "dev/sda", "/dev/../dev/null", "/dev/"]
        {
            let error = Identity::of(&attachment(no_disk)).unwrap_err();
            assert!(matches!(error, DeviceError::NotThere { .. }), "{no_disk}: {error}");
        }
    }

    fn disk() -> Identity {
        Identity { path: PathBuf::from("/dev/ublkb3"), number: (259, 7), names: (0, 5) }
    }

    fn mount(device: (u32, u32), root: &str, fs_type: &str) -> MountEntry {
        MountEntry {
            mount_id: 1,
            device,
            root: PathBuf::from(root),
            mount_point: PathBuf::from("/x"),
            is_read_only: false,
            is_file_system_read_only: false,
            fs_type: fs_type.to_owned(),
            is_shared: false,
        }
    }

    #[test]
    fn a_mount_is_the_disks_by_number_or_by_name() {
        assert!(disk().is_of(&mount((259, 7), "/", "ext4")));
        assert!(disk().is_of(&mount((259, 7), "/sub", "ext4")));
        assert!(disk().is_of(&mount((0, 5), "/ublkb3", "devtmpfs")));
        for other in [
            mount((259, 8), "/", "ext4"),
            mount((0, 5), "/ublkb30", "devtmpfs"),
            mount((0, 5), "/", "devtmpfs"),
            mount((0, 6), "/ublkb3", "tmpfs"),
        ] {
            assert!(!disk().is_of(&other), "{other:?}");
            assert_eq!(disk().shown_in(&[other]), Shown::default());
        }
    }

    #[test]
    fn of_an_encrypted_volume_the_disk_below_is_never_taken() {
        let encrypted = NodeAttachment {
            attachment_id: Uuid::new_v4().to_string(),
            is_encrypted: true,
            clear_device_path: "/dev/mapper/volnode-x".to_owned(),
            ..attachment("/dev/null")
        };
        let id = || "no id at all".to_owned();
        for closed in [encrypted.clone(), NodeAttachment { attachment_id: id(), ..encrypted.clone() }] {
            let error = Identity::of(&closed).unwrap_err();
            assert!(error.to_string().contains("/dev/mapper/volnode-x"), "{error}");
            assert!(error.to_string().contains("is not open"), "{error}");
            assert!(!is_on_its_disk(&closed));
        }
        assert!(is_on_its_disk(&attachment("/dev/null")), "of others nothing is above it");
    }

    #[test]
    fn a_mount_of_a_clear_disk_is_known_by_number_or_by_name() {
        let clear = Mapper {
            attachment_id: Uuid::from_u128(7),
            kernel_name: "dm-3".to_owned(),
            number: (252, 3),
            bytes: 1 << 20,
        };
        let is_of = |mount: &MountEntry| is_of_any(mount, std::iter::once(&clear));
        assert!(is_of(&mount((252, 3), "/", "ext4")) && is_of(&mount((0, 5), "/dm-3", "devtmpfs")));
        for other in [
            mount((252, 4), "/", "ext4"),
            mount((0, 5), "/dm-30", "devtmpfs"),
            mount((0, 9), "/dm-3", "tmpfs"),
        ] {
            assert!(!is_of(&other), "{other:?}");
        }
    }

    #[test]
    fn a_disk_is_shown_as_a_file_system_as_a_device_or_as_both() {
        let (mounted, bound) = (mount((259, 7), "/", "ext4"), mount((0, 5), "/ublkb3", "devtmpfs"));
        let shown = |as_file_system, as_device| Shown { as_file_system, as_device };
        assert_eq!(disk().shown_in(std::slice::from_ref(&mounted)), shown(true, false));
        assert_eq!(disk().shown_in(std::slice::from_ref(&bound)), shown(false, true));
        let given = MountEntry { mount_point: disk().path, ..bound.clone() };
        assert_eq!(disk().shown_in(&[given]), shown(false, false), "to a container, at its own name");
        assert_eq!(disk().shown_in(&[bound, mounted]), shown(true, true));
    }
}
