//! Programs that are run for a volume: mkfs, fsck, a mount, an unmount. They outlive the call that started them.
//!
//! ```text
//!   call ─▶ start ─▶ running ─▶ ended, and the call is told
//!                      │  the call's time is over: it is told what runs, and since when
//!                      └▶ ended, nobody is told yet ─ the call's repeat ─▶ told
//! ```
//! Owns: one job at most for each volume, and the result of one that ended while nobody waited. Never: kills a job, or starts a second one
//! beside it: an fsck that is killed in the middle may leave the file system worse than it was, and an unmount cannot be killed.
//! A repeat is one of the same description, which the caller makes of all that matters: what is done, where, and for which attachment.
//! Called by: the Node service.

use std::collections::HashMap;
use std::io::{self, Read as _, Seek as _};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// How much of what a job says is kept, in bytes of each of its two streams.
const SAID_BYTES_MAX: u64 = 64 << 10;

/// What a job did.
#[derive(Debug, Clone)]
pub struct JobResult {
    /// How it ended.
    pub status: ExitStatus,
    /// The beginning of what it said on stdout.
    pub stdout: Vec<u8>,
    /// The same of stderr.
    pub stderr: Vec<u8>,
}

impl From<JobResult> for Output {
    fn from(result: JobResult) -> Self {
        Self { status: result.status, stdout: result.stdout, stderr: result.stderr }
    }
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// It goes on.
    #[error("{what} has been running for {} s and goes on; repeat the call to learn how it ends", .since.as_secs())]
    Running {
        /// What runs.
        what: String,
        /// For how long.
        since: Duration,
    },
    /// Another job runs for the volume.
    #[error("{what} has been running for {} s for this volume; repeat the call when it has ended", .since.as_secs())]
    Busy {
        /// What runs.
        what: String,
        /// For how long.
        since: Duration,
    },
    /// It could not be started, or waited for.
    #[error("cannot run {what}: {source}")]
    Failed {
        /// What was to run.
        what: String,
        /// Why.
        source: io::Error,
    },
}

type Ended = Option<Arc<Result<JobResult, io::Error>>>;

#[derive(Debug)]
struct Job {
    what: String,
    started: Instant,
    ended: watch::Receiver<Ended>,
}

/// The jobs of all volumes.
#[derive(Debug, Default)]
pub struct Jobs {
    by_volume: Mutex<HashMap<String, Job>>,
}

impl Jobs {
    /// Runs the command for the volume, or joins the job of the same description that runs already, or takes the result of the one that
    /// ended meanwhile. Waits for `at_most`.
    ///
    /// Within a tokio runtime.
    ///
    /// # Errors
    /// [`JobError`], by cause.
    pub async fn run(
        &self,
        volume_id: &str,
        what: &str,
        command: impl FnOnce() -> io::Result<Command>,
        at_most: Duration,
    ) -> Result<JobResult, JobError> {
        let (mut ended, started) = self.join_or_start(volume_id, what, command)?;
        let over = tokio::time::timeout(at_most, ended.wait_for(Option::is_some)).await;
        let outcome = match over {
            Err(_) => return Err(JobError::Running { what: what.to_owned(), since: started.elapsed() }),
            Ok(Err(_)) => None,
            Ok(Ok(ended)) => ended.clone(),
        };
        self.forget(volume_id, started);
        let failed = |source| JobError::Failed { what: what.to_owned(), source };
        match outcome.as_deref() {
            Some(Ok(result)) => Ok(result.clone()),
            Some(Err(error)) => Err(failed(io::Error::new(error.kind(), error.to_string()))),
            None => Err(failed(io::Error::other("the thread that waited for it has ended"))),
        }
    }

    /// What runs for the volume, and for how long it has.
    pub fn running(&self, volume_id: &str) -> Option<(String, Duration)> {
        let jobs = self.lock();
        let job = jobs.get(volume_id).filter(|job| job.ended.borrow().is_none())?;
        Some((job.what.clone(), job.started.elapsed()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Job>> {
        self.by_volume.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Once its result was told; unless another job has taken its place.
    fn forget(&self, volume_id: &str, started: Instant) {
        let mut jobs = self.lock();
        if jobs.get(volume_id).is_some_and(|job| job.started == started) {
            jobs.remove(volume_id);
        }
    }

    fn join_or_start(
        &self,
        volume_id: &str,
        what: &str,
        command: impl FnOnce() -> io::Result<Command>,
    ) -> Result<(watch::Receiver<Ended>, Instant), JobError> {
        let mut jobs = self.lock();
        if let Some(job) = jobs.get(volume_id) {
            if job.what == what {
                return Ok((job.ended.clone(), job.started));
            }
            if job.ended.borrow().is_none() {
                return Err(JobError::Busy { what: job.what.clone(), since: job.started.elapsed() });
            }
        }
        let failed = |source| JobError::Failed { what: what.to_owned(), source };
        let ended = command().and_then(start).map_err(failed)?;
        let started = Instant::now();
        jobs.insert(volume_id.to_owned(), Job { what: what.to_owned(), started, ended: ended.clone() });
        Ok((ended, started))
    }
}

/// Starts the program, and a thread that waits for it, which no call can cut off.
fn start(mut command: Command) -> io::Result<watch::Receiver<Ended>> {
    let (said, complained) = (tempfile::tempfile()?, tempfile::tempfile()?);
    // Files rather than pipes: it never waits for a reader, and says on when this process is gone.
    command.stdout(Stdio::from(said.try_clone()?)).stderr(Stdio::from(complained.try_clone()?));
    let (tell, ended) = watch::channel(None);
    let (hand_over, taken) = std::sync::mpsc::channel::<std::process::Child>();
    let wait = move || {
        let Ok(mut child) = taken.recv() else { return };
        let result = child.wait().map(|status| JobResult {
            status,
            stdout: beginning(said).unwrap_or_default(),
            stderr: beginning(complained).unwrap_or_default(),
        });
        tell.send_replace(Some(Arc::new(result)));
    };
    // Before the program: one that nobody waits for would be a second one beside its repeat.
    std::thread::Builder::new().name("volume job".to_owned()).spawn(wait)?;
    // A Ctrl-C on the terminal is not for it.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command.spawn()?;
    hand_over.send(child).map_err(|_| io::Error::other("the thread that waits for it has ended"))?;
    Ok(ended)
}

fn beginning(mut file: std::fs::File) -> io::Result<Vec<u8>> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(SAID_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::path::Path;

    use super::*;

    /// Long enough beyond doubt.
    const DEADLINE: Duration = Duration::from_secs(60);
    const AT_ONCE: Duration = Duration::from_millis(1);

    /// A program that ends when the file is there, and counts its starts.
    fn waits_for(dir: &Path, code: u8) -> Command {
        let mut command = Command::new("sh");
        let script = format!(
            "echo start >> starts; until [ -e go ]; do sleep 0.02; done; echo out; echo err >&2; exit {code}"
        );
        command.args(["-c", &script]).current_dir(dir).stdin(Stdio::null());
        command
    }

    fn starts(dir: &Path) -> usize {
        std::fs::read_to_string(dir.join("starts")).unwrap_or_default().lines().count()
    }

    fn ended(jobs: &Jobs) {
        let deadline = Instant::now() + DEADLINE;
        while jobs.running("v").is_some() {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[tokio::test]
    async fn a_job_outlives_its_call_and_is_joined_by_the_repeat() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::default();
        for _ in 0..3 {
            let error = jobs.run("v", "fsck", || Ok(waits_for(dir.path(), 1)), AT_ONCE).await.unwrap_err();
            assert!(matches!(&error, JobError::Running { what, .. } if what == "fsck"), "{error}");
        }
        std::fs::write(dir.path().join("go"), "").unwrap();
        let result = jobs.run("v", "fsck", || panic!("a second one"), DEADLINE).await.unwrap();
        assert_eq!(
            (result.status.code(), &result.stdout[..], &result.stderr[..]),
            (Some(1), &b"out\n"[..], &b"err\n"[..])
        );
        assert_eq!(starts(dir.path()), 1);
    }

    #[tokio::test]
    async fn a_result_is_kept_for_the_repeat_and_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::default();
        jobs.run("v", "mkfs", || Ok(waits_for(dir.path(), 0)), AT_ONCE).await.unwrap_err();
        std::fs::write(dir.path().join("go"), "").unwrap();
        ended(&jobs);
        jobs.run("v", "mkfs", || panic!("a second one"), DEADLINE).await.unwrap();
        jobs.run("v", "mkfs", || Ok(waits_for(dir.path(), 0)), DEADLINE).await.unwrap();
        assert_eq!(starts(dir.path()), 2);
    }

    #[tokio::test]
    async fn another_job_waits_for_its_turn_and_other_volumes_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::default();
        jobs.run("v", "mount", || Ok(waits_for(dir.path(), 0)), AT_ONCE).await.unwrap_err();
        let error = jobs.run("v", "umount", || panic!("beside it"), DEADLINE).await.unwrap_err();
        assert!(matches!(&error, JobError::Busy { what, .. } if what == "mount"), "{error}");
        assert_eq!(jobs.running("v").unwrap().0, "mount");
        let quick = || Ok(Command::new("true"));
        jobs.run("other", "umount", quick, DEADLINE).await.unwrap();
        std::fs::write(dir.path().join("go"), "").unwrap();
        ended(&jobs);
        // The result that nobody wanted is in nobody's way.
        jobs.run("v", "umount", quick, DEADLINE).await.unwrap();
        jobs.run("v", "mount", || Ok(waits_for(dir.path(), 0)), DEADLINE).await.unwrap();
        assert_eq!(starts(dir.path()), 2);
    }

    #[tokio::test]
    async fn two_calls_at_once_are_one_job() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::default();
        let call = || jobs.run("v", "fsck", || Ok(waits_for(dir.path(), 0)), DEADLINE);
        let go = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            std::fs::write(dir.path().join("go"), "").unwrap();
        };
        let (one, other, ()) = tokio::join!(call(), call(), go);
        assert!(one.unwrap().status.success() && other.unwrap().status.success());
        assert_eq!(starts(dir.path()), 1);
    }

    #[tokio::test]
    async fn what_cannot_start_is_told_and_may_be_tried_again() {
        let jobs = Jobs::default();
        let missing = || Ok(Command::new("/no/such/program"));
        let error = jobs.run("v", "mkfs", missing, DEADLINE).await.unwrap_err();
        assert!(matches!(error, JobError::Failed { .. }), "{error}");
        let killed = jobs.run(
            "v",
            "fsck",
            || {
                let mut command = Command::new("sh");
                command.args(["-c", "head -c 1000000 /dev/zero; kill -9 $$"]);
                Ok(command)
            },
            DEADLINE,
        );
        let killed = killed.await.unwrap();
        assert_eq!(killed.status.signal(), Some(9));
        assert_eq!(killed.stdout.len() as u64, SAID_BYTES_MAX);
    }
}
