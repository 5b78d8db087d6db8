//! The last resort of a machine that goes down: takes every disk away, whatever the server, the daemon or the users do.
//!
//! ```text
//!   each disk, all at once:  I/O that waits fails soon ─► unmount ─► detach ─ in use, or too slow ─► detach by force
//! ```
//! Invariants: the node daemon does not run (its lock is held meanwhile). Each step is bounded, and so is the whole, except by a
//! driver that does not answer. Needs no server: what it could not be told is told when the machine attaches again.
//! Called by: `volclient take-away`, which `deploy/volnode-shutdown.service` runs.

use std::ffi::OsStr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::error::NodeError;
use super::serve::{ServeError, ServeOptions, lock_run_dir, supervisor};
use super::supervisor::Supervisor;
use crate::causes::with_sources;
use crate::holders::mounted_on;

/// For how long an outage may go on before I/O fails: a server that is being restarted is not given up at once.
const STALL_MS: u64 = 10_000;
/// Writing back and unmounting; more than a stalled disk needs to fail.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(20);
/// Writing back what cannot be unmounted because files are open.
const SYNC_DEADLINE: Duration = Duration::from_secs(10);
/// A detach without force: the last flush, and telling the server.
const DETACH_DEADLINE: Duration = Duration::from_secs(20);

/// Why the disks could not be taken away.
#[derive(Debug, thiserror::Error)]
pub enum TakeAwayError {
    /// The run directory, or the options.
    #[error(transparent)]
    Setup(#[from] ServeError),
    /// The attachments cannot be read.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// What is left is in the log, by name.
    #[error("{0} disks are left; see the log")]
    Left(usize),
}

/// Takes every disk of the run directory away, all at once; no disk at all is a success.
///
/// # Errors
/// [`TakeAwayError`]: the node daemon runs, or disks are left.
pub async fn take_all_away(options: ServeOptions) -> Result<(), TakeAwayError> {
    if !options.run_dir.exists() {
        return Ok(());
    }
    let _lock = lock_run_dir(&options.run_dir)?;
    let supervisor = supervisor(&options, None)?;
    let mut work = JoinSet::new();
    for attachment in supervisor.list()? {
        let supervisor = Arc::clone(&supervisor);
        work.spawn(async move {
            let target = attachment.target.clone();
            take_away(&supervisor, attachment).await.inspect_err(|error| {
                tracing::error!(
                    target,
                    error = with_sources(error),
                    "a disk could not be detached and stays"
                );
            })
        });
    }
    let outcomes = work.join_all().await;
    match outcomes.iter().filter(|outcome| outcome.is_err()).count() {
        0 => Ok(()),
        left => Err(TakeAwayError::Left(left)),
    }
}

async fn take_away(supervisor: &Supervisor, attachment: v1::NodeAttachment) -> Result<(), NodeError> {
    let (target, id) = (attachment.target, attachment.attachment_id);
    let policy = v1::SetStallPolicyRequest {
        target: id.clone(),
        on_stall: v1::StallAction::Fail.into(),
        stall_fail_after_ms: STALL_MS,
    };
    // One without a process has no policy; it goes all the same.
    if let Err(error) = supervisor.set_stall_policy(&policy).await {
        tracing::warn!(target, error = with_sources(&error), "cannot change the policy");
    }
    if let Some(dev_id) = attachment.device_path.strip_prefix("/dev/ublkb").and_then(|id| id.parse().ok()) {
        unmount(&target, dev_id).await;
    }
    let detach = |force| v1::DetachRequest { target: id.clone(), force };
    match timeout(DETACH_DEADLINE, supervisor.detach(&detach(false))).await {
        Ok(outcome @ (Ok(_) | Err(NodeError::DetachUnfinished { .. }))) => {
            return untold_is_done(&target, outcome);
        }
        Ok(Err(error)) => {
            tracing::warn!(target, error = with_sources(&error), "the detach failed; detaching by force")
        }
        Err(_) => tracing::warn!(target, "the detach took too long; detaching by force"),
    }
    untold_is_done(&target, supervisor.detach(&detach(true)).await)
}

/// A server that was not told holds the attachment for this machine, which gets it again when it is up.
fn untold_is_done(target: &str, outcome: Result<bool, NodeError>) -> Result<(), NodeError> {
    match outcome {
        Err(NodeError::DetachUnfinished { cause, .. }) => {
            tracing::warn!(target, cause, "detached here; the storage server could not be told");
            Ok(())
        }
        outcome => outcome.map(drop),
    }
}

/// Unmounts what is mounted of a disk, or at least writes it back, as far as that ends in time: what is on the server then is
/// not lost.
async fn unmount(target: &str, dev_id: u32) {
    for mount_point in mounted_on(dev_id) {
        if run("umount", &[mount_point.as_os_str()], UNMOUNT_DEADLINE).await {
            tracing::info!(target, mount_point = %mount_point.display(), "unmounted");
            continue;
        }
        let is_written = run("sync", &["-f".as_ref(), mount_point.as_os_str()], SYNC_DEADLINE).await;
        tracing::warn!(target, mount_point = %mount_point.display(), is_written, "the file system stays mounted; a sync of it was tried");
        return;
    }
}

/// Whether the program succeeded in time. One that hangs in the kernel goes on: it ends when its disk is gone.
async fn run(program: &str, arguments: &[&OsStr], deadline: Duration) -> bool {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    matches!(timeout(deadline, command.status()).await, Ok(Ok(status)) if status.success())
}
