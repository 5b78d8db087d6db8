//! Runs the programs the lab is made of (apt-get, dpkg, depmod, cpio, xz, cargo), each with a deadline.
//!
//! Never leaves a child behind: a program that outlives its deadline, or the user's patience, is killed and
//! reaped before the error is returned. The virtual machine itself is not started here (`vm`).

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::interrupt;

/// How often a wait looks at its condition, its deadline and the interrupt flag.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Where Debian keeps programs; `sbin` is often missing from an ordinary user's PATH.
const PROGRAM_DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// What a finished program said.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

/// The path of `program`, looked for in PATH and in the system's own directories.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(PROGRAM_DIRECTORIES.iter().map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// A command for `program` wherever it is; running it fails by name if it is nowhere.
pub(crate) fn command(program: &str) -> Command {
    Command::new(find(program).unwrap_or_else(|| PathBuf::from(program)))
}

/// Runs a command to its end, whatever its exit status, with its output captured and stdin empty.
///
/// # Errors
/// It cannot be started, outlives `deadline` (it is killed), or the lab was interrupted.
pub(crate) fn finish(command: &mut Command, deadline: Duration) -> Result<Finished> {
    let name = name_of(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let stdout = child.stdout.take().map(|pipe| thread::spawn(move || read_all(pipe)));
    let stderr = child.stderr.take().map(|pipe| thread::spawn(move || read_all(pipe)));
    let status = wait(&mut child, deadline).with_context(|| name.clone())?;
    let collected = |reader: Option<thread::JoinHandle<Vec<u8>>>| {
        reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
    };
    let stdout = collected(stdout);
    let stderr = String::from_utf8_lossy(&collected(stderr)).into_owned();
    Ok(Finished { status, stdout, stderr })
}

/// Runs a command that must succeed, and returns what it printed on stdout.
///
/// # Errors
/// As [`finish`]; and an exit status that is not 0, with the end of what it printed on stderr.
pub(crate) fn output(command: &mut Command, deadline: Duration) -> Result<Vec<u8>> {
    let name = name_of(command);
    let finished = finish(command, deadline)?;
    if !finished.status.success() {
        bail!("{name}: {}\n{}", finished.status, finished.stderr.trim_end());
    }
    Ok(finished.stdout)
}

/// Waits for a child until `deadline` from now; a child that is late is killed.
///
/// # Errors
/// The deadline passed, or the lab was interrupted; the child is dead and reaped either way.
pub(crate) fn wait(child: &mut Child, deadline: Duration) -> Result<ExitStatus> {
    let started = Instant::now();
    let failure = loop {
        if let Some(status) = child.try_wait().context("waiting for a child process")? {
            return Ok(status);
        }
        if let Err(interrupted) = interrupt::check() {
            break interrupted;
        }
        if started.elapsed() > deadline {
            break anyhow::anyhow!("still running after {} s: killed", deadline.as_secs());
        }
        thread::sleep(POLL_INTERVAL);
    };
    kill_and_reap(child);
    Err(failure)
}

/// Hands the lines of `pipe` to `take` until there are no more; between lines, `None` several times a second.
///
/// # Errors
/// `take` failed, the deadline passed, or the lab was interrupted. The caller kills the writer then.
pub(crate) fn follow_lines(
    pipe: impl Read + Send + 'static,
    deadline: Duration,
    take: &mut dyn FnMut(Option<&str>) -> Result<()>,
) -> Result<()> {
    let started = Instant::now();
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(std::io::Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    loop {
        interrupt::check()?;
        ensure!(started.elapsed() < deadline, "still running after {} s", deadline.as_secs());
        match lines.recv_timeout(POLL_INTERVAL) {
            Ok(line) => take(Some(&String::from_utf8_lossy(&line)))?,
            Err(mpsc::RecvTimeoutError::Timeout) => take(None)?,
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// A process that does not outlive its value: an error of ours ends it.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        kill_and_reap(&mut self.0);
    }
}

/// Kills a child and reaps it; a child that has already ended is only reaped.
pub(crate) fn kill_and_reap(child: &mut Child) {
    // Both fail only for a child that is gone already, which is what is wanted.
    let _ = child.kill();
    let _ = child.wait();
}

/// The program's own name, for error messages.
fn name_of(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let name = program.file_name().unwrap_or_else(|| OsStr::new("?")).to_string_lossy().into_owned();
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    // Options come first and are the same for every call; the last words say what was wanted.
    let words: Vec<_> = arguments.filter(|argument| !argument.contains("::")).collect();
    format!("{name} {}", words.join(" ").replace("-o ", ""))
}

fn read_all(mut pipe: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A pipe that breaks has said all it will say; the exit status tells the rest.
    let _ = pipe.read_to_end(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_outlives_its_deadline_is_killed() {
        let started = Instant::now();
        let error = output(Command::new("sleep").arg("60"), Duration::from_millis(100)).unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(30));
        assert!(format!("{error:#}").contains("sleep 60"), "{error:#}");
    }

    #[test]
    fn a_failing_program_is_named_with_what_it_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo broken >&2; exit 3"]);
        let error = format!("{:#}", output(&mut command, Duration::from_secs(10)).unwrap_err());
        assert!(error.contains("broken") && error.contains('3'), "{error}");
    }
}
