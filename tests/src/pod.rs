//! A pod without a cluster: the mounts, the root and the cgroup that a container of `deploy/kubernetes` has, and an end as kubelet makes it.
//!
//! Owns its cgroup and its root, a directory with what the image of volclient has. The PID and network namespaces are the host's, as in
//! the chart's DaemonSet of the node daemon. Used by `StorageNode`, for its node daemon.
#![allow(unsafe_code)] // Code between fork and exec, and unshare in it: the child has one thread, and shares no memory.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::UnshareFlags;

use crate::image_contents::image;
use crate::oci_image::Entry;
use crate::shell::wait_for;

/// Where the image has the program.
pub const PROGRAM: &str = "/usr/local/bin/volclient";
/// Of a cgroup whose processes were killed.
const END_DEADLINE: Duration = Duration::from_secs(30);

/// A pod of the node daemon's.
#[derive(Debug)]
pub struct Pod {
    root: PathBuf,
    cgroup: PathBuf,
    shown: Vec<PathBuf>,
}

impl Pod {
    /// A pod whose root is made at `root` of the programs in `programs`, and that sees `/dev`, `/proc`, `/sys` and each of `shown` of
    /// the host, under its own path.
    ///
    /// # Errors
    /// A file or the cgroup cannot be made.
    pub fn new(root: PathBuf, programs: &Path, shown: &[&Path]) -> Result<Self> {
        for (path, entry) in image("volclient", programs)?.entries {
            put(&root.join(path), &entry)?;
        }
        let name = root.file_name().context("a name")?.to_string_lossy().into_owned();
        let cgroup = Path::new("/sys/fs/cgroup").join(name);
        fs::create_dir_all(&cgroup).with_context(|| cgroup.display().to_string())?;
        let always = ["/dev", "/proc", "/sys"].map(Path::new);
        let shown: Vec<PathBuf> =
            always.into_iter().chain(shown.iter().copied()).map(Path::to_owned).collect();
        for path in &shown {
            fs::create_dir_all(path)?;
            fs::create_dir_all(within(&root, path))?;
        }
        Ok(Self { root, cgroup, shown })
    }

    /// Has the command begin in the pod.
    pub fn enter(&self, command: &mut Command) {
        let (root, cgroup, shown) = (self.root.clone(), self.cgroup.clone(), self.shown.clone());
        let enter = move || -> io::Result<()> {
            fs::write(cgroup.join("cgroup.procs"), "0")?;
            // SAFETY: only the mount namespace and the file-system context are unshared; the process has one thread.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
            // What the host mounts from now on is seen (HostToContainer).
            mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
            mount_bind(&root, &root)?;
            for path in &shown {
                mount_bind_recursive(path, within(&root, path))?;
            }
            chdir(&root)?;
            pivot_root(".", ".")?;
            unmount(".", UnmountFlags::DETACH)?;
            Ok(chdir("/")?)
        };
        // SAFETY: it makes system calls, and allocates, which the C library allows after a fork.
        unsafe { command.pre_exec(enter) };
    }

    /// The pod's end: everything in its cgroup is killed, and then its root goes.
    ///
    /// # Errors
    /// It does not end.
    pub fn kill(self) -> Result<()> {
        fs::write(self.cgroup.join("cgroup.kill"), "1").context("cgroup.kill")?;
        let events = self.cgroup.join("cgroup.events");
        wait_for("the pod to be empty", END_DEADLINE, || {
            Ok(fs::read_to_string(&events)?.contains("populated 0").then_some(()))
        })?;
        fs::remove_dir(&self.cgroup)?;
        Ok(fs::remove_dir_all(&self.root)?)
    }
}

fn within(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn put(to: &Path, entry: &Entry) -> Result<()> {
    fs::create_dir_all(to.parent().context("a parent")?)?;
    match entry {
        Entry::Directory(mode) => {
            fs::create_dir_all(to)?;
            fs::set_permissions(to, fs::Permissions::from_mode(*mode))?;
        }
        Entry::Copy(from, mode) => {
            fs::copy(from, to).with_context(|| from.display().to_string())?;
            fs::set_permissions(to, fs::Permissions::from_mode(*mode))?;
        }
        Entry::Words(words) => fs::write(to, words)?,
        Entry::Link(target) => symlink(target, to)?,
    }
    Ok(())
}
