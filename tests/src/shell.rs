//! Running programs whose failure is the test's failure, and waiting for conditions with a deadline.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How often a wait looks.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Runs a program that must succeed; gives its stdout.
///
/// # Errors
/// It cannot be run, or it failed: with all it said.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}\n{stdout}{stderr}", line(program, arguments), output.status);
    Ok(stdout)
}

/// Runs a line of shell that must succeed (`set -e`, `pipefail`); gives its stdout.
///
/// # Errors
/// As [`run`].
pub fn sh(script: &str) -> Result<String> {
    run("bash", &["-euo", "pipefail", "-c", script])
}

/// Waits until `condition` gives a value.
///
/// # Errors
/// It did not within `deadline`, or it failed itself.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if started.elapsed() >= deadline {
            bail!("waited {} s in vain for {what}", deadline.as_secs());
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn line<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> String {
    let words: Vec<_> = arguments.iter().map(|word| word.as_ref().to_string_lossy()).collect();
    format!("{program} {}", words.join(" "))
}
/// Where programs are looked for, with a folder before all others.
pub fn path_with(folder: &Path) -> String {
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default())
}
