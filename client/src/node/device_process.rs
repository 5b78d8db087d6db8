//! One device process, seen from outside: claiming its folder, finding it, starting it, waiting for it, stopping it.
//!
//! Invariants: at most one process works on a folder: it holds the write lock on `device.lock` for its whole life,
//! from before it does anything. The kernel drops the lock when the process ends, however it ends, and tells its pid
//! to whoever asks, so no pid is ever believed from a file. The process is in a process group of its own with nothing
//! on stdin and stdout: neither the daemon's end nor ctrl-C on its terminal touches it.
//! Never: reads what the device process does beyond its status file and its answer to `stop`.
//! Called by: `supervisor`, and `volclient device` for [`claim`].
//! Source: fcntl(2) `F_SETLK`, `F_GETLK`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FlockOperation;
use rustix::process::{Flock, FlockType, Pid, PidfdFlags, Signal, fcntl_getlk, kill_process};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::oneshot;
use tokio::time::{Instant, interval, timeout};

use super::error::NodeError;
use crate::contract::{
    self, AttachmentDir, CONTRACT_VERSION, ControlCommand, ControlRequest, ControlResponse, DeviceState,
    DeviceStatus,
};
use crate::pod_exit::PodExit;

/// Making a device: connecting, ADD_DEV, START_DEV with its partition scan, on a slow machine.
const START_DEADLINE: Duration = Duration::from_secs(90);
/// Stopping a device: what is in flight, dirty pages included; more than the driver's own deadline (120 s).
const STOP_DEADLINE: Duration = Duration::from_secs(150);
/// The same by force, where nothing is waited for but the driver.
pub(super) const FORCE_DEADLINE: Duration = Duration::from_secs(20);
/// Anything else: at most a stop that somebody else has asked for is in the way.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// The end of a process that has said it is done, or was killed.
pub(super) const EXIT_DEADLINE: Duration = Duration::from_secs(15);
/// Of a thread that calls poll(2) and nothing else.
const WATCH_STACK_BYTES: usize = 64 << 10;
/// How long a process takes to end that has said that it failed.
const FAILED_PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks at a file or a lock that no event tells of.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

fn lock_path(dir: &AttachmentDir) -> PathBuf {
    dir.path().join("device.lock")
}

/// Makes this process the folder's device process, until the file is closed.
///
/// # Errors
/// `WouldBlock` or `PermissionDenied`: another process is. Others: the folder cannot be written.
pub fn claim(dir: &AttachmentDir) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(lock_path(dir))?;
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// The folder's device process; `None` if there is none.
///
/// # Errors
/// [`NodeError::Io`]: the lock cannot be read.
pub fn running_pid(dir: &AttachmentDir) -> Result<Option<Pid>, NodeError> {
    let path = lock_path(dir);
    let io_error = |source| NodeError::Io { what: format!("cannot read {}", path.display()), source };
    let file = match OpenOptions::new().read(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(error)),
    };
    // A read lock is asked about, since the file is open for reading only; the process's write lock conflicts with it.
    let conflict = fcntl_getlk(&file, &Flock::from(FlockType::ReadLock));
    Ok(conflict.map_err(|errno| io_error(errno.into()))?.and_then(|lock| lock.pid))
}

/// Starts a device process on the folder, whose spec is written; it logs what `log_filter` lets through. With `pod_exit` it leaves
/// the daemon's pod first; its log reaches the pod's for as long as this daemon lives.
///
/// # Errors
/// [`NodeError::Io`]: this program's file cannot be run.
pub fn spawn(dir: &AttachmentDir, log_filter: &str, pod_exit: Option<&PodExit>) -> Result<Child, NodeError> {
    let io_error = |source| NodeError::Io { what: "cannot start a device process".to_owned(), source };
    let mut command = pod_exit.map_or_else(|| Command::new(program()), |exit| exit.command().into());
    command.args(["device", "--log", log_filter, "--dir"]).arg(dir.path());
    // Its working directory must not keep a file system busy that is mounted on its own device.
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    if pod_exit.is_some() {
        // A process that outlives the pod must not hold the pod's log open.
        command.stderr(Stdio::piped());
    }
    let mut child = command.spawn().map_err(io_error)?;
    if let Some(stderr) = child.stderr.take() {
        tokio::spawn(pass_log_on(stderr));
    }
    Ok(child)
}

/// Passes the lines of a device process's log on as they are, until it ends.
async fn pass_log_on(stderr: ChildStderr) {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line).await, Ok(1..)) {
        daemon_log::pass_on(&line);
        line.clear();
    }
}

/// The program that is installed now: after an upgrade in place, the file that took our own one's name. Where there is
/// none any more, our own file can still be run.
pub(super) fn program() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let own = own.to_string_lossy();
    // What the kernel adds to the name of a file that was deleted or replaced.
    let installed = PathBuf::from(own.strip_suffix(" (deleted)").unwrap_or(&own));
    if installed.is_file() { installed } else { PathBuf::from("/proc/self/exe") }
}

/// Waits until a process has ended, whoever started it; at once if there is none. A thread sleeps on it meanwhile. Errors:
/// pidfd's and poll's.
pub async fn wait_until_ended(pid: Pid) -> io::Result<()> {
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    let (sender, ended) = oneshot::channel();
    let watch = move || {
        let outcome = loop {
            // Readable once the process has ended, a zombie or not.
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None) {
                Err(rustix::io::Errno::INTR) => {}
                outcome => break outcome,
            }
        };
        // Nobody listens any more only where the daemon ends.
        let _ = sender.send(outcome);
    };
    let name = format!("watch-{}", pid.as_raw_nonzero());
    std::thread::Builder::new().name(name).stack_size(WATCH_STACK_BYTES).spawn(watch)?;
    match ended.await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(errno)) => Err(errno.into()),
        Err(_) => Err(io::Error::other("the watching thread ended")),
    }
}

/// The status that the folder's present process wrote; `None` before its first.
///
/// # Errors
/// [`NodeError::StateFile`]
pub fn status(dir: &AttachmentDir) -> Result<Option<DeviceStatus>, NodeError> {
    match contract::read_file(&dir.status()) {
        Ok(status) => Ok(Some(status)),
        Err(contract::ContractError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// How the wait for a device ended.
#[derive(Debug)]
pub enum Started {
    /// The device is there, and serves I/O as well as its server lets it.
    Live(Box<DeviceStatus>),
    /// It does not; why, for people.
    Failed(String),
}

/// Waits until the device process has a live device, gives up, or ends. `child` is given where this daemon started it.
///
/// # Errors
/// [`NodeError::TimedOut`], [`NodeError::StateFile`], [`NodeError::Io`]
pub async fn wait_until_live(
    dir: &AttachmentDir,
    target: &str,
    mut child: Option<&mut Child>,
) -> Result<Started, NodeError> {
    let give_up = Instant::now() + START_DEADLINE;
    let mut look = interval(LOOK_INTERVAL);
    let mut failed_since = None;
    while Instant::now() < give_up {
        look.tick().await;
        // In this order: whatever the process wrote before its end is seen.
        let ended = match child.as_deref_mut() {
            Some(child) => child.try_wait().ok().flatten().map(|status| status.to_string()),
            None => running_pid(dir)?.is_none().then(|| "it is gone".to_owned()),
        };
        let status = status(dir)?;
        match status {
            Some(status)
                if matches!(status.state, DeviceState::Live | DeviceState::Stalled) && ended.is_none() =>
            {
                return Ok(Started::Live(Box::new(status)));
            }
            Some(status) if status.state == DeviceState::Failed && ended.is_some() => {
                return Ok(Started::Failed(status.state_reason));
            }
            // A process that could make no device ends; one that goes on answers EIO on a device that is there.
            Some(status)
                if status.state == DeviceState::Failed
                    && failed_since.get_or_insert_with(Instant::now).elapsed() > FAILED_PATIENCE =>
            {
                return Ok(Started::Live(Box::new(status)));
            }
            Some(status) if ended.is_some() && !status.state_reason.is_empty() => {
                return Ok(Started::Failed(status.state_reason));
            }
            _ => {}
        }
        if let Some(how) = ended {
            return Ok(Started::Failed(format!("the device process ended ({how})")));
        }
    }
    Err(NodeError::TimedOut { target: target.to_owned(), what: "making the device", after: START_DEADLINE })
}

/// Asks the device process; `None` if it ended without an answer.
///
/// # Errors
/// [`NodeError::TimedOut`]: it does not answer.
pub async fn ask(
    dir: &AttachmentDir,
    target: &str,
    command: ControlCommand,
) -> Result<Option<ControlResponse>, NodeError> {
    let (deadline, what) = match &command {
        ControlCommand::Stop => (STOP_DEADLINE, "stopping the device"),
        ControlCommand::ForceStop => (FORCE_DEADLINE, "stopping the device by force"),
        ControlCommand::Status | ControlCommand::SetStallPolicy(_) | ControlCommand::SetAddresses(_) => {
            (ANSWER_DEADLINE, "the device process's answer")
        }
    };
    let conversation = async {
        let mut stream = UnixStream::connect(dir.control_socket()).await?;
        let request = ControlRequest { version: CONTRACT_VERSION, command };
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).await?;
        Ok::<_, io::Error>(serde_json::from_str(&answer)?)
    };
    match timeout(deadline, conversation).await {
        Ok(Ok(response)) => Ok(Some(response)),
        Ok(Err(error)) => {
            tracing::warn!(target, %error, "the device process did not answer");
            Ok(None)
        }
        Err(_) => Err(NodeError::TimedOut { target: target.to_owned(), what, after: deadline }),
    }
}

/// Waits until the folder has no device process.
///
/// # Errors
/// [`NodeError::TimedOut`]
pub async fn wait_until_gone(dir: &AttachmentDir, target: &str) -> Result<(), NodeError> {
    let give_up = Instant::now() + EXIT_DEADLINE;
    let mut look = interval(LOOK_INTERVAL);
    while Instant::now() < give_up {
        look.tick().await;
        if running_pid(dir)?.is_none() {
            return Ok(());
        }
    }
    let what = "the end of the device process";
    Err(NodeError::TimedOut { target: target.to_owned(), what, after: EXIT_DEADLINE })
}

/// Kills the folder's device process, if there is one, and waits for its end.
///
/// # Errors
/// [`NodeError::TimedOut`], [`NodeError::Io`]
pub async fn kill(dir: &AttachmentDir, target: &str) -> Result<(), NodeError> {
    if let Some(pid) = running_pid(dir)? {
        // It may have ended meanwhile, which is what is wanted.
        kill_process(pid, Signal::KILL).ok();
    }
    wait_until_gone(dir, target).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_nobody_claimed_has_no_process() {
        let folder = tempfile::tempdir().unwrap();
        let dir = AttachmentDir::from_path(folder.path());
        assert_eq!(running_pid(&dir).unwrap(), None);
        // A lock file alone, left by a process that ended, is not one either.
        drop(claim(&dir).unwrap());
        assert_eq!(running_pid(&dir).unwrap(), None);
    }

    #[tokio::test]
    async fn an_end_without_a_word_is_told_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let dir = AttachmentDir::from_path(folder.path());
        let mut child = Command::new("false").spawn().unwrap();
        let started = wait_until_live(&dir, "vol-1", Some(&mut child)).await.unwrap();
        assert!(matches!(&started, Started::Failed(why) if why.contains("exit status: 1")), "{started:?}");
    }

    #[tokio::test]
    async fn a_process_that_does_not_listen_gives_no_answer() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let dir = AttachmentDir::from_path(folder.path());
        assert_eq!(ask(&dir, "vol-1", ControlCommand::Stop).await.unwrap(), None);
    }
}
