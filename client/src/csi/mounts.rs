//! Mounts at kubelet's paths: file systems, binds of them and of devices, and their end.
//!
//! Owns: the calls of the new mount API. What is to be seen is made out of sight, looked at, and only then moved to its place: no
//! path is looked up twice, nothing is ever seen writable that is to be read-only, and no option is a string with commas. Never: believes an
//! unmount before `mountinfo` does. The calls wait for as long as the device does: call them where that harms nobody.
//! Source: fsopen(2), fsconfig(2), move_mount(2), open_tree(2), mount_setattr(2), Linux 6.12.

#![allow(unsafe_code)] // mount_setattr, for which rustix has no function.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, fstat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};

use super::mount_options::MountOptions;
use super::mountinfo::{self, MountEntry};
use super::targets::{Target, TargetError};

/// More than anybody stacks at one place; a loop that somebody feeds ends.
const STACKED_MAX: usize = 64;
/// How often it is looked again where a mount comes or goes meanwhile.
const LOOKS_MAX: usize = 5;
/// How much the kernel's own words are shown, in bytes.
const SAID_BYTES_MAX: usize = 1000;

/// Why something is not mounted, or still is.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The path.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The name of the device is another one's by now.
    #[error("{device} is another device than the attached one; detach the volume and stage it again")]
    OtherDevice {
        /// Its name.
        device: String,
    },
    /// The file system was not unmounted in order, and its journal cannot be replayed.
    #[error(
        "the file system has writes in its journal that are to be replayed, and the volume is read-only; stage it once for writing"
    )]
    DirtyJournal,
    /// The kernel refuses.
    #[error("cannot {what}: {source}{said}")]
    Kernel {
        /// What was to be done, for people.
        what: &'static str,
        /// Why.
        source: io::Error,
        /// The file system's own words, after a colon; or nothing.
        said: String,
    },
    /// The kernel took the unmount, and still has the mount.
    #[error(
        "{0:?} is still mounted though its unmount succeeded; look in /proc/self/mountinfo who mounts it again"
    )]
    StillMounted(String),
    /// Something else lies over what is mounted there.
    #[error(
        "what is mounted at {0:?} cannot be reached: another mount lies over a directory on the way; unmount that"
    )]
    Hidden(String),
    /// What is mounted cannot be read.
    #[error("cannot read what is mounted: {0}")]
    Mountinfo(#[source] io::Error),
}

impl From<MountError> for io::Error {
    /// With the kind of the kernel's own error.
    fn from(error: MountError) -> Self {
        let kind = match &error {
            MountError::Kernel { source, .. } | MountError::Mountinfo(source) => source.kind(),
            MountError::DirtyJournal => io::ErrorKind::ReadOnlyFilesystem,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

fn kernel(what: &'static str) -> impl FnOnce(Errno) -> MountError {
    move |errno| MountError::Kernel { what, source: errno.into(), said: String::new() }
}

/// What is mounted at a target, the uppermost one last: the one that a walk along the path ends on.
///
/// # Errors
/// [`MountError::Mountinfo`], [`MountError::Target`]; [`MountError::Hidden`]
pub fn mounts_at(target: &Target) -> Result<Vec<MountEntry>, MountError> {
    for _ in 0..LOOKS_MAX {
        let mut entries = mountinfo::at(&target.kernel_path()?).map_err(MountError::Mountinfo)?;
        if entries.is_empty() {
            return Ok(entries);
        }
        let uppermost = mountinfo::mount_id(target.open()?).map_err(MountError::Mountinfo)?;
        if let Some(at) = entries.iter().position(|entry| entry.mount_id == uppermost) {
            let entry = entries.remove(at);
            entries.push(entry);
            return Ok(entries);
        }
        // It was mounted or unmounted between the two looks, or something lies over a directory on the way.
    }
    Err(MountError::Hidden(shown(target)))
}

/// Whether what is mounted in the target's directory is seen by kubelet and the workloads as well: in a container, only where the
/// directory is shared with the host.
///
/// # Errors
/// [`MountError::Mountinfo`]
pub fn is_seen_outside(directory: impl AsFd) -> Result<bool, MountError> {
    mountinfo::containing(directory).map(|mount| mount.is_shared).map_err(MountError::Mountinfo)
}

fn shown(target: &Target) -> String {
    target.path().chars().take(SAID_BYTES_MAX).collect()
}

/// Mounts the file system on `device`, a block device that is held open and known as `device_path`.
///
/// The kernel opens the device by its name, which is then what mount(8) and resize2fs show and look for. While the descriptor is open the
/// disk's number is nobody else's; and the name is compared before, the file system's number after, with the descriptor's.
///
/// # Errors
/// [`MountError`], by cause.
pub fn mount_file_system(
    device: impl AsFd,
    device_path: &Path,
    options: &MountOptions,
    target: &Target,
) -> Result<(), MountError> {
    let other_device = || MountError::OtherDevice { device: device_path.display().to_string() };
    let held = fstat(device).map_err(kernel("look at the device"))?;
    let named =
        rustix::fs::statat(CWD, device_path, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| other_device())?;
    let is_block = FileType::from_raw_mode(named.st_mode) == FileType::BlockDevice;
    if !is_block || named.st_rdev != held.st_rdev {
        return Err(other_device());
    }
    let context = fsopen(options.fs_type.name(), FsOpenFlags::FSOPEN_CLOEXEC);
    let context = context.map_err(kernel("use the file system; its kernel module may be missing"))?;
    configure(context.as_fd(), device_path, options).map_err(|errno| match errno {
        // Without the kernel's own words: they are of an option that is refused, because it shows what is half written.
        Errno::ROFS if options.is_read_only() => MountError::DirtyJournal,
        errno => MountError::Kernel {
            what: "mount the file system",
            source: errno.into(),
            said: said(context.as_fd()),
        },
    })?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, options.attributes);
    let mount = mount.map_err(kernel("make the mount"))?;
    if fstat(&mount).map_err(kernel("look at the mount"))?.st_dev != held.st_rdev {
        return Err(other_device());
    }
    move_to(&mount, target)
}

fn configure(context: BorrowedFd<'_>, device_path: &Path, options: &MountOptions) -> Result<(), Errno> {
    fsconfig_set_string(context, "source", device_path)?;
    if options.is_read_only() {
        fsconfig_set_flag(context, "ro")?;
    }
    for (key, value) in &options.parameters {
        match value {
            Some(value) => fsconfig_set_string(context, key.as_str(), value.as_str())?,
            None => fsconfig_set_flag(context, key.as_str())?,
        }
    }
    fsconfig_create(context)
}

/// What the file system says of its refusal: a message for each read.
fn said(context: BorrowedFd<'_>) -> String {
    let (mut said, mut buffer) = (String::new(), [0; 512]);
    while let Ok(bytes @ 1..) = rustix::io::read(context, &mut buffer) {
        if said.len() < SAID_BYTES_MAX {
            said.push_str(": ");
            // Behind a letter for how bad it is.
            said.push_str(
                String::from_utf8_lossy(&buffer[..bytes]).trim_start_matches(['e', 'w', 'i']).trim(),
            );
        }
    }
    said
}

/// Shows `source`, a directory of a mounted file system or a device, at the target as well.
///
/// # Errors
/// [`MountError`], by cause.
pub fn bind(source: impl AsFd, attributes: MountAttrFlags, target: &Target) -> Result<(), MountError> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(source, "", flags).map_err(kernel("take the mount"))?;
    if !attributes.is_empty() {
        set_attributes(&tree, attributes).map_err(|source| MountError::Kernel {
            what: "set the attributes of the mount",
            source,
            said: String::new(),
        })?;
    }
    move_to(&tree, target)
}

fn set_attributes(tree: &OwnedFd, attributes: MountAttrFlags) -> io::Result<()> {
    let atime =
        attributes.intersects(MountAttrFlags::MOUNT_ATTR_NOATIME | MountAttrFlags::MOUNT_ATTR_STRICTATIME);
    let wanted = libc::mount_attr {
        attr_set: u64::from(attributes.bits()),
        // The kernel wants the whole of the field cleared where a part of it is set.
        attr_clr: if atime { libc::MOUNT_ATTR__ATIME } else { 0 },
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is a string with its zero, `wanted` lives until the call is over, and its size is given.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn move_to(mount: &OwnedFd, target: &Target) -> Result<(), MountError> {
    let place = target.open()?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", &place, "", flags).map_err(kernel("put the mount in its place"))
}

/// Unmounts all that is stacked at the target, and says how many mounts these were. Nothing mounted is a success.
///
/// # Errors
/// [`MountError::Kernel`]: somebody uses it (`ResourceBusy`), say. [`MountError::StillMounted`]; [`MountError::Mountinfo`]
pub fn unmount_all(target: &Target) -> Result<usize, MountError> {
    for count in 0..STACKED_MAX {
        let Some(uppermost) = mounts_at(target)?.pop() else { return Ok(count) };
        // The parent by its descriptor, and the name itself even if it is a link by now.
        unmount(target.path_by_parent(), UnmountFlags::NOFOLLOW).map_err(kernel("unmount"))?;
        if mounts_at(target)?.iter().any(|entry| entry.mount_id == uppermost.mount_id) {
            break;
        }
    }
    match mounts_at(target)?.is_empty() {
        true => Ok(STACKED_MAX),
        false => Err(MountError::StillMounted(shown(target))),
    }
}

#[cfg(test)]
mod tests;
