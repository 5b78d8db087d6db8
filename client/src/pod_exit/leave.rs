//! The steps out of a pod, by a process that is to be a device process and is none yet.
//!
//! Never: returns into the pod. What fails ends the process, and the attach or the recovery with it. Called by: `volclient leave-pod`.
#![allow(unsafe_code)] // unshare, which is unsafe for what it could do to other threads; there are none.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_change, mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::UnshareFlags;

use super::host_root::{ALWAYS_KEPT, PROGRAM, below};
use super::{PodExit, PodExitError};

/// Leaves the pod, and becomes `volclient` with these arguments, under the same process id.
///
/// # Errors
/// [`PodExitError`]: a step failed. It does not return otherwise.
pub fn leave_and_run(exit: &PodExit, arguments: &[OsString]) -> PodExitError {
    if let Err(error) = leave(exit) {
        return error;
    }
    PodExitError::io(Path::new(PROGRAM))(Command::new(PROGRAM).args(arguments).exec())
}

fn leave(exit: &PodExit) -> Result<(), PodExitError> {
    // First: from here on the pod's end does not kill this process.
    std::fs::write(exit.cgroup.join("cgroup.procs"), "0")
        .map_err(|source| PodExitError::Cgroup { path: exit.cgroup.clone(), source })?;
    let root = exit.root.as_path();
    // SAFETY: only the mount namespace (and the file-system context) is unshared, no file descriptors and no memory;
    // the process has one thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(at(root))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(at(root))?;
    mount_bind(root, root).map_err(at(root))?;
    // Before the others, for some may be below it.
    mount_bind(&exit.etc, root.join("etc")).map_err(at(&exit.etc))?;
    // Not what is mounted in them: that is for others.
    for path in ALWAYS_KEPT.iter().map(Path::new).chain(exit.kept.iter().map(PathBuf::as_path)) {
        mount_bind(path, below(root, path)).map_err(at(path))?;
    }
    // A host may have mounted the directory with noexec; in this namespace it is of programs only.
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_remount(root, flags, "").map_err(at(root))?;
    chdir(root).map_err(at(root))?;
    // One over the other at the same place: the upper one, which is the pod's, goes.
    pivot_root(".", ".").map_err(at(root))?;
    unmount(".", UnmountFlags::DETACH).map_err(at(root))?;
    chdir("/").map_err(at(root))
}

fn at(path: &Path) -> impl FnOnce(rustix::io::Errno) -> PodExitError {
    |errno| PodExitError::io(path)(errno.into())
}
