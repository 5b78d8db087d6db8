//! Running LVM's tools: with a limit of time, and nothing of our environment.
//!
//! A tool that takes too long is asked to end (SIGTERM), never killed: LVM holds signals back while devices are suspended, and one that
//! died there would leave them so, with all I/O waiting. Whoever called goes on with an error; the tool is waited for on its own thread.
//! Until it has ended no other is started: each would wait for the same.

use std::io;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::command::Call;

/// Where the tools are, and nowhere else.
const PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";
/// Of what a tool says, in an error.
const SAID_CHARS_MAX: usize = 500;

/// Why a tool did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be run.
    #[error("cannot run lvm: {0}")]
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

impl Tools {
    /// Runs the call, and returns what it wrote.
    ///
    /// # Errors
    /// [`ToolError`]; that of a former call, at once, while the tool of that one has not ended.
    pub(super) fn run(&self, call: &Call) -> Result<String, ToolError> {
        self.run_program("lvm", call)
    }

    fn run_program(&self, program: &str, call: &Call) -> Result<String, ToolError> {
        let hung = lock(&self.running).iter().find_map(|running| {
            let seconds = running.over_seconds?;
            Some(ToolError::TimedOut { tool: running.tool.clone(), seconds })
        });
        if let Some(error) = hung {
            return Err(error);
        }
        let tool = call.args.first().cloned().unwrap_or_default();
        let mut command = Command::new(program);
        command.args(&call.args).env_clear().envs([
            ("PATH", PATH),
            ("LC_ALL", "C"),
            ("LVM_SUPPRESS_FD_WARNINGS", "1"),
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(ToolError::Start)?;
        let process_id = child.id();
        // Of this very process, whatever becomes of its number.
        let process =
            Pid::from_raw(process_id as i32).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        lock(&self.running).push(Running { process_id, tool: tool.clone(), over_seconds: None });
        let (sender, ended) = mpsc::channel();
        let running = Arc::clone(&self.running);
        let waiting = std::thread::Builder::new().name("lvm".into()).spawn(move || {
            let output = child.wait_with_output();
            lock(&running).retain(|running| running.process_id != process_id);
            // Whoever asked may have gone.
            let _ = sender.send(output);
        });
        waiting.map_err(|error| {
            // Nobody would notice its end.
            lock(&self.running).retain(|running| running.process_id != process_id);
            ToolError::Start(error)
        })?;
        let Ok(output) = ended.recv_timeout(call.limit) else {
            let seconds = call.limit.as_secs();
            if let Some(it) = lock(&self.running).iter_mut().find(|it| it.process_id == process_id) {
                it.over_seconds = Some(seconds);
            }
            if let Some(process) = process {
                let _ = pidfd_send_signal(process, Signal::TERM);
            }
            return Err(ToolError::TimedOut { tool, seconds });
        };
        let output = output.map_err(ToolError::Start)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            let said = said.join("; ").chars().take(SAID_CHARS_MAX).collect();
            return Err(ToolError::Failed { tool, status: output.status.to_string(), said });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn lock(running: &Mutex<Vec<Running>>) -> MutexGuard<'_, Vec<Running>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn shell(script: &str, limit: Duration) -> Call {
        Call { args: vec!["-c".to_owned(), script.to_owned()], limit }
    }

    #[test]
    fn while_a_tool_hangs_no_other_is_started_and_after_that_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let go_on = dir.path().join("go-on");
        let tools = Tools::default();
        let long = Duration::from_secs(60);
        assert_eq!(tools.run_program("sh", &shell("echo it", long)).unwrap(), "it\n");
        // As LVM does, it holds the signal back.
        let script = format!("trap '' TERM; while ! test -e {}; do sleep 0.05; done", go_on.display());
        let hung = tools.run_program("sh", &shell(&script, Duration::from_millis(200))).unwrap_err();
        assert!(matches!(hung, ToolError::TimedOut { .. }), "{hung}");
        let before = lock(&tools.running).len();
        let next = tools.run_program("sh", &shell("echo it", long)).unwrap_err();
        assert!(matches!(next, ToolError::TimedOut { .. }), "{next}");
        assert_eq!((before, lock(&tools.running).len()), (1, 1));
        std::fs::write(&go_on, "").unwrap();
        let began = Instant::now();
        while tools.run_program("sh", &shell("echo it", long)).is_err() {
            assert!(began.elapsed() < long, "it has ended");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
