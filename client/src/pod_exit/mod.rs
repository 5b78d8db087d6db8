//! Device processes that outlive the pod of their node daemon: where no service manager of the host can run it.
//!
//! ```text
//!   node daemon (pod) ──▶ volclient leave-pod ──exec──▶ volclient device
//!                           own cgroup, mounts           root: DIRECTORY/program-HASH, on the host
//! ```
//! The end of a pod kills what is in its cgroup and, if it has a PID namespace of its own, what is in that; then its root and its
//! private files go. So a device process goes into a cgroup beside those of pods, and gets a small root on the host: this program with
//! its libraries, files by which names are looked up, and the host's directories that it uses. Of the pod nothing is left to it. The PID
//! namespace has to be the host's (`hostPID`): no process leaves its own.
//!
//! Invariant: nothing here is done unless `volclient serve --outlive-pod` asks for it.
//! - [`host_root`]: the small root, and the directories of the pod that stay in sight.
//! - [`leave`]: the steps out, in a process that does nothing else.
//!
//! Source: cgroups(7), mount_namespaces(7), pid_namespaces(7), pivot_root(2).

pub mod host_root;
pub mod leave;

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The subcommand of `volclient` that leaves the pod.
pub const SUBCOMMAND: &str = "leave-pod";

/// What device processes are to outlive, and by what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlivePod {
    /// Directory of the host, for the roots of device processes.
    pub directory: PathBuf,
    /// The cgroup that they go into; it is made.
    pub cgroup: PathBuf,
}

/// Why device processes would end with the pod.
#[derive(Debug, thiserror::Error)]
pub enum PodExitError {
    /// Process 1 is in this mount namespace: it is the container's own first process, or there is no container.
    #[error(
        "device processes cannot outlive this pod: process 1 is of the same container. A pod needs hostPID: true; without a pod, leave --outlive-pod out"
    )]
    NotOnHostPids,
    /// No cgroup can be made, or no process be put into it.
    #[error("{}: device processes cannot have a cgroup of their own: {source}; the pod needs the host's /sys/fs/cgroup (version 2) there, and privileged: true", .path.display())]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory that device processes use is the whole root.
    #[error("{} lies in the pod's root, which goes with the pod: put it into a directory of the host's", .0.display())]
    InRoot(PathBuf),
    /// A file or a directory cannot be used.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl PodExitError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Io { path: path.to_owned(), source }
    }
}

/// A way out that is prepared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodExit {
    /// What becomes the root.
    pub root: PathBuf,
    /// What becomes `/etc` in it.
    pub etc: PathBuf,
    /// The cgroup to go into.
    pub cgroup: PathBuf,
    /// Directories that stay where they are; `/dev`, `/proc` and `/sys` need not be named.
    pub kept: Vec<PathBuf>,
}

impl PodExit {
    /// Prepares the way out: the cgroup, and the root on the host for this version of the program. `used` are the directories that
    /// device processes use, which are mounts of the host's in this pod. Roots of other versions go if nobody runs in them.
    ///
    /// # Errors
    /// [`PodExitError`], by cause.
    pub fn prepare(wanted: &OutlivePod, used: &[PathBuf]) -> Result<Self, PodExitError> {
        if !are_pids_the_hosts()? {
            return Err(PodExitError::NotOnHostPids);
        }
        make_cgroup(&wanted.cgroup)
            .map_err(|source| PodExitError::Cgroup { path: wanted.cgroup.clone(), source })?;
        let kept = host_root::outermost(used);
        if let Some(path) = kept.iter().find(|path| path.parent().is_none()) {
            return Err(PodExitError::InRoot(path.clone()));
        }
        let made = host_root::make(&wanted.directory, &kept)?;
        host_root::remove_unused(&wanted.directory, &made.root);
        Ok(Self { root: made.root, etc: made.etc, cgroup: wanted.cgroup.clone(), kept })
    }

    /// The command that leaves the pod, and runs `volclient` on the host with the arguments that are added to it.
    pub fn command(&self) -> Command {
        // Of this very program, as the root has it.
        let mut command = Command::new("/proc/self/exe");
        command.arg(SUBCOMMAND).arg("--root").arg(&self.root).arg("--etc").arg(&self.etc);
        command.arg("--cgroup").arg(&self.cgroup);
        for path in &self.kept {
            command.arg("--keep").arg(path);
        }
        command.arg("--");
        command
    }
}

/// Whether process 1 is another's than this container's.
fn are_pids_the_hosts() -> Result<bool, PodExitError> {
    let namespace = |path: &str| fs::read_link(path).map_err(PodExitError::io(Path::new(path)));
    Ok(namespace("/proc/1/ns/mnt")? != namespace("/proc/self/ns/mnt")?)
}

/// Makes the cgroup, and sees that processes can be put into it.
fn make_cgroup(cgroup: &Path) -> io::Result<()> {
    fs::create_dir_all(cgroup)?;
    OpenOptions::new().write(true).open(cgroup.join("cgroup.procs")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_no_cgroup_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = make_cgroup(&folder.path().join("volnode")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_run_gets_its_own_arguments_behind_those_of_the_way_out() {
        let exit = PodExit {
            root: "/host/program-1".into(),
            etc: "/host/etc".into(),
            cgroup: "/sys/fs/cgroup/volnode".into(),
            kept: vec!["/run/volnode".into(), "/etc/volnode/tls".into()],
        };
        let mut command = exit.command();
        command.arg("device");
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_str().unwrap()).collect();
        assert_eq!(
            arguments.join(" "),
            "leave-pod --root /host/program-1 --etc /host/etc --cgroup /sys/fs/cgroup/volnode \
             --keep /run/volnode --keep /etc/volnode/tls -- device"
        );
    }
}
