//! Running LVM's tools: with a limit of time, and nothing of our environment.
//!
//! A tool that takes too long is asked to end (SIGTERM), never killed, unless it only reads: LVM holds signals back while devices are suspended, and one that
//! died there would leave them so, with all I/O waiting. Whoever called goes on with an error; the tool is waited for on its own thread.
//! Until it has ended no other is started: each would wait for the same.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::command::Call;

/// Where the tools are, and nowhere else.
const PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";
/// Of what a tool says, in an error.
const SAID_CHARS_MAX: usize = 500;
/// Of that, what is read.
const SAID_BYTES_MAX: u64 = 64 << 10;

/// Takes what a tool writes, line by line.
pub type TakeLine = Box<dyn FnMut(&str) + Send>;

/// What runs LVM's tools.
pub trait RunTools: Send + Sync + std::fmt::Debug {
    /// Runs the call, and hands over what it writes.
    ///
    /// # Errors
    /// [`ToolError`]; that of a former call, at once, while the tool of that one has not ended.
    fn run_lines(&self, call: &Call, take: TakeLine) -> Result<(), ToolError>;

    /// The same, and returns what it wrote.
    ///
    /// # Errors
    /// As [`Self::run_lines`].
    fn run(&self, call: &Call) -> Result<String, ToolError> {
        let text = Arc::new(Mutex::new(String::new()));
        let taken = Arc::clone(&text);
        let take = move |line: &str| {
            let mut text = lock(&taken);
            text.push_str(line);
            text.push('\n');
        };
        self.run_lines(call, Box::new(take))?;
        Ok(std::mem::take(&mut *lock(&text)))
    }
}

/// Why a tool did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be run.
    #[error("cannot run LVM's tools: {0}")]
    Start(io::Error),
    /// It has not ended yet.
    #[error("{tool} has not ended within {seconds} s")]
    TimedOut {
        /// Its name.
        tool: String,
        /// Its limit.
        seconds: u64,
    },
    /// It ended otherwise than it should.
    #[error("{tool} failed ({status}): {said}")]
    Failed {
        /// Its name.
        tool: String,
        /// How.
        status: String,
        /// What it said, in one line.
        said: String,
    },
}

impl ToolError {
    /// Whether what it did, or is still doing, is not known.
    pub(super) fn has_timed_out(&self) -> bool {
        matches!(self, Self::TimedOut { .. })
    }
}

/// From a signal to the end of a tool that only reads.
const READER_END_MAX: Duration = Duration::from_secs(5);

/// The tools that one server runs.
#[derive(Debug, Default)]
pub(super) struct Tools {
    running: Arc<Mutex<Vec<Running>>>,
}

/// A tool that has not ended.
#[derive(Debug)]
struct Running {
    process_id: u32,
    tool: String,
    /// Its limit, once it is over.
    over_seconds: Option<u64>,
}

impl RunTools for Tools {
    fn run_lines(&self, call: &Call, take: TakeLine) -> Result<(), ToolError> {
        let hung = lock(&self.running).iter().find_map(|running| {
            let seconds = running.over_seconds?;
            Some(ToolError::TimedOut { tool: running.tool.clone(), seconds })
        });
        if let Some(error) = hung {
            return Err(error);
        }
        let tool = call.name();
        let said = File::from(memfd_create("volnode-lvm", MemfdFlags::CLOEXEC).map_err(start_failed)?);
        let mut command = Command::new(call.program);
        command.args(&call.args).env_clear().envs([
            ("PATH", PATH),
            ("LC_ALL", "C"),
            ("LVM_SUPPRESS_FD_WARNINGS", "1"),
        ]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(said.try_clone().map_err(ToolError::Start)?);
        let child = command.spawn().map_err(ToolError::Start)?;
        let process_id = child.id();
        // Of this very process, whatever becomes of its number.
        let process =
            Pid::from_raw(process_id as i32).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        lock(&self.running).push(Running { process_id, tool: tool.clone(), over_seconds: None });
        let (sender, ended) = mpsc::channel();
        let running = Arc::clone(&self.running);
        let waiting = std::thread::Builder::new().name("lvm".into()).spawn(move || {
            let ended = wait_for(child, take);
            lock(&running).retain(|running| running.process_id != process_id);
            // Whoever asked may have gone.
            let _ = sender.send(ended);
        });
        waiting.map_err(|error| {
            // Nobody would notice its end.
            lock(&self.running).retain(|running| running.process_id != process_id);
            ToolError::Start(error)
        })?;
        let Ok(ended) = ended.recv_timeout(call.limit) else {
            let seconds = call.limit.as_secs();
            if let Some(it) = lock(&self.running).iter_mut().find(|it| it.process_id == process_id) {
                it.over_seconds = Some(seconds);
            }
            let end_it = |signal| {
                if let Some(process) = &process {
                    let _ = pidfd_send_signal(process, signal);
                }
                call.only_reads && ended.recv_timeout(READER_END_MAX).is_ok()
            };
            // Of what only reads the end is waited for: else it would keep others from the group.
            if !end_it(Signal::TERM) && call.only_reads {
                end_it(Signal::KILL);
            }
            return Err(ToolError::TimedOut { tool, seconds });
        };
        let status = ended.map_err(ToolError::Start)?;
        if !status.success() {
            return Err(ToolError::Failed { tool, status: status.to_string(), said: read_said(said) });
        }
        Ok(())
    }
}

fn start_failed(error: rustix::io::Errno) -> ToolError {
    ToolError::Start(error.into())
}

/// Takes what it writes until it has ended.
fn wait_for(mut child: Child, mut take: TakeLine) -> io::Result<ExitStatus> {
    let mut read = Ok(());
    if let Some(stdout) = child.stdout.take() {
        let (mut stdout, mut line) = (BufReader::new(stdout), Vec::new());
        loop {
            line.clear();
            match stdout.read_until(b'\n', &mut line) {
                Ok(0) => break,
                Ok(_) => take(String::from_utf8_lossy(&line).trim_end_matches('\n')),
                Err(error) => {
                    read = Err(error);
                    break;
                }
            }
        }
    }
    let status = child.wait()?;
    read.map(|()| status)
}

/// What it said, in one line.
fn read_said(mut said: File) -> String {
    let mut bytes = Vec::new();
    let read = said.rewind().and_then(|()| said.take(SAID_BYTES_MAX).read_to_end(&mut bytes));
    if let Err(error) = read {
        return format!("what it said cannot be read: {error}");
    }
    let said = String::from_utf8_lossy(&bytes);
    let said: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    said.join("; ").chars().take(SAID_CHARS_MAX).collect()
}

/// What is behind the mutex, whoever panicked with it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn shell(script: &str, limit: Duration) -> Call {
        Call { program: "sh", args: vec!["-c".to_owned(), script.to_owned()], limit, only_reads: false }
    }

    #[test]
    fn what_a_tool_writes_is_handed_over_and_what_it_says_is_in_the_error() {
        let tools = Tools::default();
        let limit = Duration::from_secs(60);
        assert_eq!(tools.run(&shell("echo a; printf b", limit)).unwrap(), "a\nb\n");
        // More than a pipe holds, before anything is written.
        let script = "i=0; while [ $i -lt 2000 ]; do echo 'a warning of some length, said again and again' >&2; i=$((i + 1)); done; echo it";
        assert_eq!(tools.run(&shell(script, limit)).unwrap(), "it\n");
        let error = tools.run(&shell("echo it; echo ' not  '>&2; echo so >&2; exit 5", limit)).unwrap_err();
        assert!(error.to_string().ends_with("not; so"), "{error}");
    }

    #[test]
    fn while_a_tool_hangs_no_other_is_started_and_after_that_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let go_on = dir.path().join("go-on");
        let tools = Tools::default();
        let long = Duration::from_secs(60);
        assert_eq!(tools.run(&shell("echo it", long)).unwrap(), "it\n");
        // As LVM does, it holds the signal back.
        let script = format!("trap '' TERM; while ! test -e {}; do sleep 0.05; done", go_on.display());
        let hung = tools.run(&shell(&script, Duration::from_millis(200))).unwrap_err();
        assert!(matches!(hung, ToolError::TimedOut { .. }), "{hung}");
        let before = lock(&tools.running).len();
        let next = tools.run(&shell("echo it", long)).unwrap_err();
        assert!(matches!(next, ToolError::TimedOut { .. }), "{next}");
        assert_eq!((before, lock(&tools.running).len()), (1, 1));
        std::fs::write(&go_on, "").unwrap();
        let began = Instant::now();
        while tools.run(&shell("echo it", long)).is_err() {
            assert!(began.elapsed() < long, "it has ended");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn a_tool_that_only_reads_is_ended_and_is_in_nobodys_way() {
        let tools = Tools::default();
        let endless = shell("trap '' TERM; while :; do sleep 0.05; done", Duration::from_millis(200));
        let late = tools.run(&Call { only_reads: true, ..endless }).unwrap_err();
        assert!(matches!(late, ToolError::TimedOut { .. }), "{late}");
        assert_eq!(lock(&tools.running).len(), 0);
        assert_eq!(tools.run(&shell("echo it", Duration::from_secs(60))).unwrap(), "it\n");
    }
}
