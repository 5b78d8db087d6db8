//! What is done for a volume and may take long: mkfs, fsck, a mount, an unmount. It outlives the call that started it.
//!
//! ```text
//!   call ─▶ start ─▶ running ─▶ ended, and the call is told
//!                      │  the call's time is over: it is told what runs, and since when
//!                      └▶ ended, nobody is told yet ─ the call's repeat ─▶ told
//! ```
//! Owns: one job at most for each volume, and for a while the result of one that ended while nobody waited. Never: kills a job, or starts a
//! second one beside it: an fsck that is killed in the middle may leave the file system worse than it was, and an unmount cannot be killed.
//! A repeat is one of the same description, which the caller makes of all that matters: what is done, where, and for which attachment.
//! A job that goes on when the plugin was killed is seen by the next one: it holds the volume's lock file, which it has inherited.
//! Called by: the Node service.

#![allow(unsafe_code)] // What a program is to inherit is settled between fork and exec.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom, fcntl_add_seals, memfd_create, seek};
use rustix::io::{FdFlags, fcntl_setfd};
use tokio::sync::watch;

use super::lock_file::{self, LockFile};

/// How much of what a job says is kept, in bytes of each of its two streams.
const SAID_BYTES_MAX: u64 = 64 << 10;
/// For how long a result is the answer to a repeat: longer than kubelet's longest pause between two, which is two minutes and two.
const RESULT_KEPT: Duration = Duration::from_secs(300);
/// Between two looks at a job that nobody tells of.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

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

/// What a job consists of.
pub enum Work {
    /// A program.
    Program(Command),
    /// A call that waits in the kernel; its result says nothing.
    Call(Box<dyn FnOnce() -> io::Result<()> + Send>),
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
    /// It could not be started, or waited for, or a call in the kernel failed.
    #[error("{what} failed: {source}")]
    Failed {
        /// What was to be done.
        what: String,
        /// Why.
        source: io::Error,
    },
}

#[derive(Debug)]
struct Outcome {
    result: Result<JobResult, io::Error>,
    at: Instant,
}

type Ended = Option<Arc<Outcome>>;

#[derive(Debug)]
struct Job {
    what: String,
    started: Instant,
    ended: watch::Receiver<Ended>,
}

impl Job {
    fn is_running(&self) -> bool {
        self.ended.borrow().is_none()
    }

    /// Whether it runs, or ended less than so long ago.
    fn is_known(&self, kept: Duration) -> bool {
        self.ended.borrow().as_ref().is_none_or(|outcome| outcome.at.elapsed() < kept)
    }
}

/// The jobs of all volumes.
#[derive(Debug)]
pub struct Jobs {
    by_volume: Mutex<HashMap<String, Job>>,
    lock_dir: PathBuf,
    result_kept: Duration,
}

impl Jobs {
    /// With lock files in this directory, which is made when it is needed. It has to be the same for every plugin of this machine.
    pub fn new(lock_dir: PathBuf) -> Self {
        Self { by_volume: Mutex::default(), lock_dir, result_kept: RESULT_KEPT }
    }

    /// Does the work for the volume, or joins the job of the same description that runs already, or takes the result of the one that
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
        work: impl FnOnce() -> io::Result<Work>,
        at_most: Duration,
    ) -> Result<JobResult, JobError> {
        let over = Instant::now() + at_most;
        self.former_ended(volume_id, over).await?;
        let (mut ended, started) = self.join_or_start(volume_id, what, work)?;
        let waited = tokio::time::timeout_at(over.into(), ended.wait_for(Option::is_some)).await;
        let outcome = match waited {
            Err(_) => return Err(JobError::Running { what: what.to_owned(), since: started.elapsed() }),
            Ok(Err(_)) => None,
            Ok(Ok(ended)) => ended.clone(),
        };
        self.forget(volume_id, started);
        let failed = |source| JobError::Failed { what: what.to_owned(), source };
        match outcome.as_deref().map(|outcome| &outcome.result) {
            Some(Ok(result)) => Ok(result.clone()),
            Some(Err(error)) => Err(failed(io::Error::new(error.kind(), error.to_string()))),
            None => Err(failed(io::Error::other("the thread that waited for it has ended"))),
        }
    }

    /// Waits until nothing runs for the volume, for `at_most`. A result that nobody was told is kept.
    ///
    /// # Errors
    /// [`JobError::Busy`]: what still runs.
    pub async fn settled(&self, volume_id: &str, at_most: Duration) -> Result<(), JobError> {
        let over = Instant::now() + at_most;
        let running = {
            let jobs = self.lock();
            let job = jobs.get(volume_id).filter(|job| job.is_running());
            job.map(|job| (job.what.clone(), job.started, job.ended.clone()))
        };
        if let Some((what, started, mut ended)) = running {
            let waited = tokio::time::timeout_at(over.into(), ended.wait_for(Option::is_some)).await;
            if waited.is_err() {
                return Err(JobError::Busy { what, since: started.elapsed() });
            }
        }
        self.former_ended(volume_id, over).await
    }

    /// What runs for the volume, and for how long it has; also where a former process started it.
    pub fn running(&self, volume_id: &str) -> Option<(String, Duration)> {
        {
            let jobs = self.lock();
            if let Some(job) = jobs.get(volume_id).filter(|job| job.is_running()) {
                return Some((job.what.clone(), job.started.elapsed()));
            }
        }
        self.of_former_process(volume_id)
    }

    /// All that run and were started by this process: the volume, what is done, and for how long.
    pub fn all_running(&self) -> Vec<(String, String, Duration)> {
        let jobs = self.lock();
        let running = jobs.iter().filter(|(_, job)| job.is_running());
        running.map(|(volume, job)| (volume.clone(), job.what.clone(), job.started.elapsed())).collect()
    }

    /// Waits until none of them runs any more, nor one that was started meanwhile; the results are kept.
    pub async fn all_ended(&self) {
        while !self.all_running().is_empty() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Job>> {
        self.by_volume.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_path(&self, volume_id: &str) -> PathBuf {
        self.lock_dir.join(format!("{volume_id}.job"))
    }

    /// A job that no job of this process is, and that still holds the volume's lock.
    fn of_former_process(&self, volume_id: &str) -> Option<(String, Duration)> {
        let path = self.lock_path(volume_id);
        let jobs = self.lock();
        if jobs.get(volume_id).is_some_and(Job::is_running) || !path.exists() {
            return None;
        }
        match LockFile::take(&path) {
            // Where it cannot be looked at, the start of a job says why.
            Ok(Some(_)) | Err(_) => None,
            Ok(None) => Some(read_note(&lock_file::note_of(&path))),
        }
    }

    async fn former_ended(&self, volume_id: &str, over: Instant) -> Result<(), JobError> {
        while let Some((what, since)) = self.of_former_process(volume_id) {
            if Instant::now() >= over {
                return Err(JobError::Busy { what, since });
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(())
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
        work: impl FnOnce() -> io::Result<Work>,
    ) -> Result<(watch::Receiver<Ended>, Instant), JobError> {
        let mut jobs = self.lock();
        // Nobody asks for them any more.
        jobs.retain(|_, job| job.is_known(self.result_kept));
        if let Some(job) = jobs.get(volume_id) {
            if job.what == what {
                return Ok((job.ended.clone(), job.started));
            }
            if job.is_running() {
                return Err(JobError::Busy { what: job.what.clone(), since: job.started.elapsed() });
            }
        }
        let failed = |source| JobError::Failed { what: what.to_owned(), source };
        let lock = take_lock(&self.lock_dir, &self.lock_path(volume_id), what).map_err(failed)?;
        let Some(lock) = lock else {
            let (what, since) = read_note(&lock_file::note_of(&self.lock_path(volume_id)));
            return Err(JobError::Busy { what, since });
        };
        let ended = work().and_then(|work| start(work, lock)).map_err(failed)?;
        let started = Instant::now();
        jobs.insert(volume_id.to_owned(), Job { what: what.to_owned(), started, ended: ended.clone() });
        Ok((ended, started))
    }
}

/// Takes the lock and notes for whom; `None`: somebody else has it.
fn take_lock(dir: &Path, path: &Path, what: &str) -> io::Result<Option<LockFile>> {
    std::fs::create_dir_all(dir)?;
    let lock = LockFile::take(path)?;
    if let Some(lock) = &lock {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        lock.note(&format!("{} {what}\n", now.as_secs()))?;
    }
    Ok(lock)
}

/// What runs, and for how long it has, by the note in a lock file.
fn read_note(note: &str) -> (String, Duration) {
    let (seconds, what) = note.trim_end().split_once(' ').unwrap_or(("", ""));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let since = seconds.parse().map(|began| now.saturating_sub(Duration::from_secs(began)));
    let what = if what.is_empty() { "a job of a former volcsi" } else { what };
    (what.to_owned(), since.unwrap_or_default())
}

/// Starts the work, and a thread that waits for it, which no call can cut off.
fn start(work: Work, lock: LockFile) -> io::Result<watch::Receiver<Ended>> {
    let (tell, ended) = watch::channel(None);
    let tell = move |result| drop(tell.send_replace(Some(Arc::new(Outcome { result, at: Instant::now() }))));
    let thread = std::thread::Builder::new().name("volume job".to_owned());
    match work {
        Work::Call(call) => {
            let wait = move || {
                let result = call();
                // First, so that whoever is told may start the next one.
                drop(lock);
                let nothing = || JobResult { status: ExitStatus::default(), stdout: vec![], stderr: vec![] };
                tell(result.map(|()| nothing()));
            };
            thread.spawn(wait)?;
        }
        Work::Program(mut command) => {
            let said = [Said::new()?, Said::new()?];
            // Files rather than pipes: it never waits for a reader, and says on when this process is gone.
            command.stdout(said[0].writer()?).stderr(said[1].writer()?);
            // A Ctrl-C on the terminal is not for it.
            command.process_group(0);
            inherit(&mut command, &lock)?;
            let (hand_over, taken) = std::sync::mpsc::channel::<Child>();
            let wait = move || {
                let Ok(mut child) = taken.recv() else { return };
                let status = child.wait();
                drop(lock);
                let result = status.map(|status| {
                    let [stdout, stderr] = said.map(|said| said.read().unwrap_or_default());
                    JobResult { status, stdout, stderr }
                });
                tell(result);
            };
            // Before the program: one that nobody waits for would be a second one beside its repeat.
            thread.spawn(wait)?;
            let child = command.spawn()?;
            hand_over.send(child).map_err(|_| io::Error::other("the thread that waits for it has ended"))?;
        }
    }
    Ok(ended)
}

/// Has the program hold the lock for as long as it runs.
fn inherit(command: &mut Command, lock: &LockFile) -> io::Result<()> {
    // Dropped with the command, when the program has its own.
    let lock = lock.as_fd().try_clone_to_owned()?;
    let keep_open = move || fcntl_setfd(&lock, FdFlags::empty()).map_err(io::Error::from);
    // SAFETY: what runs between fork and exec is one system call on a descriptor that both have; it allocates and locks nothing.
    unsafe { command.pre_exec(keep_open) };
    Ok(())
}

/// What a program says on one of its streams: the beginning of it, in memory. Writing more fails there, and harms nobody.
#[derive(Debug)]
struct Said(File);

impl Said {
    fn new() -> io::Result<Self> {
        let file = memfd_create("said", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, SAID_BYTES_MAX)?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK)?;
        Ok(Self(File::from(file)))
    }

    fn writer(&self) -> io::Result<Stdio> {
        Ok(Stdio::from(self.0.try_clone()?))
    }

    fn read(self) -> io::Result<Vec<u8>> {
        // Both have one position.
        let bytes = seek(&self.0, SeekFrom::Current(0))?.min(SAID_BYTES_MAX);
        let mut said = vec![0; bytes as usize];
        self.0.read_exact_at(&mut said, 0)?;
        Ok(said)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    /// Long enough beyond doubt.
    const DEADLINE: Duration = Duration::from_secs(60);
    const AT_ONCE: Duration = Duration::from_millis(1);

    /// A program that ends when the file is there, and counts its starts.
    fn waits_for(dir: &Path, code: u8) -> Work {
        let mut command = Command::new("sh");
        let script = format!(
            "echo start >> starts; until [ -e go ]; do sleep 0.02; done; echo out; echo err >&2; exit {code}"
        );
        command.args(["-c", &script]).current_dir(dir).stdin(Stdio::null());
        Work::Program(command)
    }

    fn program(name: &str) -> Work {
        Work::Program(Command::new(name))
    }

    fn jobs_in(dir: &Path) -> Jobs {
        Jobs::new(dir.join("locks"))
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
        let jobs = jobs_in(dir.path());
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
        let jobs = jobs_in(dir.path());
        jobs.run("v", "mkfs", || Ok(waits_for(dir.path(), 0)), AT_ONCE).await.unwrap_err();
        std::fs::write(dir.path().join("go"), "").unwrap();
        ended(&jobs);
        jobs.run("v", "mkfs", || panic!("a second one"), DEADLINE).await.unwrap();
        jobs.run("v", "mkfs", || Ok(waits_for(dir.path(), 0)), DEADLINE).await.unwrap();
        assert_eq!(starts(dir.path()), 2);
    }

    #[tokio::test]
    async fn the_end_waits_for_all_that_runs() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = jobs_in(dir.path());
        jobs.all_ended().await;
        let work = || Ok(waits_for(dir.path(), 0));
        jobs.run("v", "fsck", work, Duration::from_millis(1)).await.unwrap_err();
        let running = jobs.all_running();
        assert_eq!((running.len(), running[0].0.as_str(), running[0].1.as_str()), (1, "v", "fsck"));
        let short = Duration::from_millis(300);
        assert!(tokio::time::timeout(short, jobs.all_ended()).await.is_err(), "it runs");
        std::fs::write(dir.path().join("go"), "").unwrap();
        tokio::time::timeout(DEADLINE, jobs.all_ended()).await.unwrap();
        assert_eq!(jobs.all_running(), []);
    }

    #[tokio::test]
    async fn another_job_waits_for_its_turn_and_other_volumes_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = jobs_in(dir.path());
        jobs.run("v", "mount", || Ok(waits_for(dir.path(), 0)), AT_ONCE).await.unwrap_err();
        let error = jobs.run("v", "umount", || panic!("beside it"), DEADLINE).await.unwrap_err();
        assert!(matches!(&error, JobError::Busy { what, .. } if what == "mount"), "{error}");
        assert_eq!(jobs.running("v").unwrap().0, "mount");
        let quick = || Ok(program("true"));
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
        let jobs = jobs_in(dir.path());
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
        let dir = tempfile::tempdir().unwrap();
        let jobs = jobs_in(dir.path());
        let missing = || Ok(program("/no/such/program"));
        let error = jobs.run("v", "mkfs", missing, DEADLINE).await.unwrap_err();
        assert!(matches!(error, JobError::Failed { .. }), "{error}");
        let killed = jobs.run(
            "v",
            "fsck",
            || {
                let mut command = Command::new("sh");
                command.args(["-c", "head -c 1000000 /dev/zero; kill -9 $$"]);
                Ok(Work::Program(command))
            },
            DEADLINE,
        );
        let killed = killed.await.unwrap();
        assert_eq!(killed.status.signal(), Some(9));
        assert_eq!(killed.stdout.len() as u64, SAID_BYTES_MAX);
    }

    #[tokio::test]
    async fn a_job_of_a_killed_process_is_seen_and_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let former = jobs_in(dir.path());
        former.run("v", "mkfs of x", || Ok(waits_for(dir.path(), 0)), AT_ONCE).await.unwrap_err();
        let next = jobs_in(dir.path());
        assert_eq!(next.running("v").unwrap().0, "mkfs of x");
        assert!(next.running("other").is_none());
        let error = next.run("v", "mkfs of x", || panic!("a second one"), AT_ONCE).await.unwrap_err();
        assert!(matches!(&error, JobError::Busy { what, .. } if what == "mkfs of x"), "{error}");
        assert!(next.settled("v", AT_ONCE).await.is_err());
        let go = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            std::fs::write(dir.path().join("go"), "").unwrap();
        };
        let (settled, ()) = tokio::join!(next.settled("v", DEADLINE), go);
        settled.unwrap();
        next.run("v", "mkfs of x", || Ok(waits_for(dir.path(), 0)), DEADLINE).await.unwrap();
        assert_eq!(starts(dir.path()), 2);
        assert_eq!(std::fs::read_dir(dir.path().join("locks")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_program_holds_the_lock_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = LockFile::take(&path).unwrap().unwrap();
        let Work::Program(mut command) = waits_for(dir.path(), 0) else { panic!("it is a program") };
        inherit(&mut command, &lock).unwrap();
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        drop(command);
        // As if this process were gone; dropping removes the file, so it is held by another name.
        let other_name = dir.path().join("other");
        std::fs::hard_link(&path, &other_name).unwrap();
        drop(lock);
        assert!(LockFile::take(&other_name).unwrap().is_none());
        std::fs::write(dir.path().join("go"), "").unwrap();
        child.wait().unwrap();
        assert!(LockFile::take(&other_name).unwrap().is_some());
    }

    #[tokio::test]
    async fn an_old_result_answers_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs { result_kept: Duration::ZERO, ..jobs_in(dir.path()) };
        jobs.run("v", "mkfs", || Ok(waits_for(dir.path(), 1)), AT_ONCE).await.unwrap_err();
        std::fs::write(dir.path().join("go"), "").unwrap();
        ended(&jobs);
        let result = jobs.run("v", "mkfs", || Ok(waits_for(dir.path(), 0)), DEADLINE).await.unwrap();
        assert!(result.status.success());
        assert_eq!(starts(dir.path()), 2);
    }

    #[tokio::test]
    async fn a_call_in_the_kernel_is_a_job_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = jobs_in(dir.path());
        let (go, told) = std::sync::mpsc::channel::<()>();
        let waits = || {
            let call = move || told.recv().map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy));
            Ok(Work::Call(Box::new(call)))
        };
        let error = jobs.run("v", "umount", waits, AT_ONCE).await.unwrap_err();
        assert!(matches!(error, JobError::Running { .. }), "{error}");
        drop(go);
        let error = jobs.run("v", "umount", || panic!("a second one"), DEADLINE).await.unwrap_err();
        let busy = |source: &io::Error| source.kind() == io::ErrorKind::ResourceBusy;
        assert!(matches!(&error, JobError::Failed { source, .. } if busy(source)), "{error}");
        jobs.run("v", "umount", || Ok(Work::Call(Box::new(|| Ok(())))), DEADLINE).await.unwrap();
        assert!(jobs.settled("v", AT_ONCE).await.is_ok());
    }
}
