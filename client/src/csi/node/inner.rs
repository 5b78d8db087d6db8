//! What all calls of the Node service share: the daemon, the server, the paths, the jobs.
//!
//! Owns: looking at a path, running a job, and a place for what waits in the kernel. Never: decides; `plan` does. Called by: `service` and
//! the calls' own modules.

use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::io;
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use proto::v1::NodeAttachment;
use tonic::Status;

use super::content::ContentApi;
use super::daemon::{Daemon, is_anothers_of, is_of};
use super::device::Identity;
use super::operations::Operations;
use super::request::VolumeId;
use super::status;
use crate::csi::jobs::{JobError, JobResult, Jobs, Work};
use crate::csi::mounts::{MountError, is_seen_outside};
use crate::csi::targets::{KubeletDir, Target};
use crate::csi::usage::UsageQueries;

/// How long a call waits for a job; less than kubelet's two minutes for a call.
const JOB_AT_MOST: Duration = Duration::from_secs(60);

/// What the calls share.
#[derive(Debug)]
pub struct Inner {
    /// The node daemon.
    pub daemon: Daemon,
    /// The storage server.
    pub content: ContentApi,
    /// Where all paths are.
    pub kubelet: KubeletDir,
    /// Nobody else need see the mounts: the tests' own namespaces.
    pub may_be_private: bool,
    /// What runs.
    pub jobs: Jobs,
    /// Who is asked how full it is.
    pub usage: UsageQueries,
    /// Who has which volume.
    pub operations: Operations,
    /// What kubelet is told that this node can have; 0 leaves it to kubelet.
    pub max_volumes: u32,
}

/// What is attached to this machine, seen from one volume.
#[derive(Debug)]
pub struct Attached {
    /// The volume's.
    pub own: Option<NodeAttachment>,
    /// What the disks of all others are to the kernel.
    pub others: Vec<Identity>,
    /// An administrator has attached the volume for themselves.
    pub is_anothers: bool,
}

impl Attached {
    /// What the volume's disk is to the kernel; `None`: it has no device.
    pub fn identity(&self) -> Option<Identity> {
        self.own.as_ref().and_then(|own| Identity::of(own).ok())
    }
}

impl Inner {
    /// A path that something is to be mounted at.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, FAILED_PRECONDITION: see [`status::of_target`]; nobody would see the mount.
    pub fn target_to_mount(&self, path: &str) -> Result<Target, Status> {
        let target = self.kubelet.target(path).map_err(|error| status::of_target(&error))?;
        let is_seen = self.may_be_private
            || is_seen_outside(target.parent()).map_err(|error| status::of_mount(&error))?;
        if is_seen {
            return Ok(target);
        }
        Err(Status::failed_precondition(format!(
            "what is mounted below {} is seen by volcsi alone: mount kubelet's directories into its container with mountPropagation: Bidirectional",
            self.kubelet.path().display()
        )))
    }

    /// What is attached, and whose it is.
    ///
    /// # Errors
    /// UNAVAILABLE; the daemon's.
    pub async fn attached(&self, volume: VolumeId) -> Result<Attached, Status> {
        let all = self.daemon.attachments().await?;
        blocking(move || {
            let (own, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| is_of(one, volume));
            let is_anothers = others.iter().any(|other| is_anothers_of(other, volume));
            // One whose device is not there has no mounts that could be told from others'.
            let others = others.iter().filter_map(|other| Identity::of(other).ok()).collect();
            Ok(Attached { own: own.into_iter().next(), others, is_anothers })
        })
        .await
    }

    /// Runs a program for the volume, or joins it.
    ///
    /// # Errors
    /// ABORTED: it goes on. INTERNAL: it could not be run.
    pub async fn run_program(
        &self,
        volume: VolumeId,
        what: &str,
        command: impl FnOnce() -> io::Result<std::process::Command>,
    ) -> Result<Output, Status> {
        let work = || command().map(Work::Program);
        self.run(volume, what, work).await.map(Output::from)
    }

    /// Makes a call that waits in the kernel for the volume, or joins it.
    ///
    /// # Errors
    /// ABORTED: it goes on. What the call says.
    pub async fn run_call(
        &self,
        volume: VolumeId,
        what: &str,
        call: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<(), Status> {
        self.run(volume, what, || Ok(Work::Call(Box::new(call)))).await.map(drop)
    }

    async fn run(
        &self,
        volume: VolumeId,
        what: &str,
        work: impl FnOnce() -> io::Result<Work>,
    ) -> Result<JobResult, Status> {
        let ran = self.jobs.run(&volume.to_string(), what, work, JOB_AT_MOST).await;
        ran.map_err(|error: JobError| status::of_job(&error))
    }

    /// Waits until no job of a former call runs for the volume.
    ///
    /// # Errors
    /// ABORTED: one still does.
    pub async fn settled(&self, volume: VolumeId) -> Result<(), Status> {
        let settled = self.jobs.settled(&volume.to_string(), JOB_AT_MOST).await;
        settled.map_err(|error| status::of_job(&error))
    }
}

/// By what two jobs of other options are told apart. CSI has options for confidential: what a job is called is logged, and shown to callers.
pub fn mark_of(options: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    options.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Runs what may wait in the kernel where it is in nobody's way.
///
/// # Errors
/// What the work says.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|_| Err(Status::internal("a thread of volcsi's has ended; see its log")))
}

/// Looks at what is mounted at the target.
///
/// # Errors
/// See [`status::of_mount`].
pub async fn look<T: Send + 'static>(
    target: &Arc<Target>,
    look: impl FnOnce(&Target) -> Result<T, MountError> + Send + 'static,
) -> Result<T, Status> {
    let target = Arc::clone(target);
    blocking(move || look(&target).map_err(|error| status::of_mount(&error))).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_options_have_another_mark_and_no_value_is_shown() {
        let label = |value: &str| (1u64, vec![("context".to_owned(), Some(value.to_owned()))]);
        assert_eq!(mark_of(&label("a:b:c")), mark_of(&label("a:b:c")));
        assert_ne!(mark_of(&label("a:b:c")), mark_of(&label("a:b:d")));
        assert_ne!(mark_of(&1u64), mark_of(&2u64));
        assert!(!mark_of(&label("a:b:c")).contains("a:b"));
    }
}
