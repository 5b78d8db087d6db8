//! Runs a fresh machine: a tree becomes the root of namespaces of its own, a newcomer's steps run in it, and what they say is
//! passed on and read.
//!
//! Mounts, processes and, for the tests, the network are in namespaces: they end with the machine's first process, which ends when
//! `unshare` does, which ends when the lab does, however that ends. Nothing outlives it and no mount is seen outside.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::tree::HOME;
use super::{Combination, name, network};
use crate::lab::tool::{self, Running};
use crate::lab::workspace::Workspace;

/// Mounts, then the steps.
const ENTER: &str = include_str!("enter.sh");

/// What a newcomer does.
const STEPS: &str = include_str!("steps.sh");

/// Packages, kernels, a build of everything, and all tests, on two slow cores.
const DEADLINE: Duration = Duration::from_secs(120 * 60);

/// From the end of the machine's output to its own.
const EXIT_DEADLINE: Duration = Duration::from_secs(60);

/// Before each line that the machine prints, so that no line of its can be taken for the lab's own.
const PREFIX: &str = "| ";

/// Asking rustc where it is.
const SYSROOT_DEADLINE: Duration = Duration::from_secs(60);

/// Cargo names each crate that it fetches and builds; one of them now and then shows that it goes on.
const CRATE_WORDS: [&str; 2] = ["Downloaded ", "Compiling "];
const CRATE_INTERVAL: Duration = Duration::from_secs(5);

/// The steps' own first words, `steps.sh`.
const STEP: &str = "fresh-step: ";
const SYSCTLS: &str = "fresh-sysctls: ";

/// What came of a machine.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The last step it began.
    pub(super) step: String,
    /// How it ended, for the reader.
    pub(super) status: String,
    pub(super) has_succeeded: bool,
    /// What could be set for the tests, in the kernel's words.
    pub(super) sysctls: Option<String>,
    /// The tests' closing line, if they came to it.
    pub(super) counts: Option<Counts>,
    /// From the start until the last crate that was shown.
    crate_shown_at: Duration,
}

/// A closing line of `cargo lab test`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) passed: usize,
    pub(super) failed: usize,
    pub(super) skipped: usize,
}

/// Runs it to its end.
///
/// # Errors
/// It cannot be started, hangs, or the lab was interrupted; it is gone then. What fails inside is part of the outcome.
pub(super) fn run(
    workspace: &Workspace,
    root: &Path,
    combination: Combination,
    tests: &str,
) -> Result<Outcome> {
    let toolchain = toolchain(workspace)?;
    let mut child =
        Running(command(root, &toolchain, combination, tests).spawn().context("cannot run unshare")?);
    let stdout = child.0.stdout.take().context("the machine's output")?;
    let mut outcome = Outcome::starting();
    let began = Instant::now();
    tool::follow_lines(stdout, DEADLINE, &mut |line| {
        if let Some(line) = line {
            outcome.read(line.trim_end_matches('\r'), began.elapsed());
        }
        Ok(())
    })
    .context("the fresh machine")?;
    let status = tool::wait(&mut child.0, EXIT_DEADLINE).context("the fresh machine")?;
    outcome.has_succeeded = status.success();
    outcome.status = status.to_string();
    Ok(outcome)
}

/// The directory of the toolchain that runs us, which holds nothing else.
fn toolchain(workspace: &Workspace) -> Result<PathBuf> {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(&workspace.root).args(["--print", "sysroot"]);
    let sysroot = tool::output(&mut rustc, SYSROOT_DEADLINE).context("where is the Rust toolchain?")?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&sysroot).trim());
    let is_systems = ["/", "/usr", "/usr/local"].iter().any(|path| Path::new(path) == sysroot);
    ensure!(
        !is_systems && sysroot.join("bin/cargo").is_file() && sysroot.join("bin/rustc").is_file(),
        "{} is no toolchain with a directory of its own, as rustup installs them: it cannot be lent to a fresh machine",
        sysroot.display()
    );
    Ok(sysroot)
}

fn command(root: &Path, toolchain: &Path, combination: Combination, tests: &str) -> Command {
    let mut command = tool::command("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--pid", "--fork", "--kill-child"]);
    command.args(["--propagation", "private", "sh", "-c", ENTER, "enter"]);
    command.arg(root).arg(toolchain).arg(STEPS).arg(environment());
    command.arg(name(&combination.umask)).arg(tests).args(combination.congestion.candidates());
    // enter.sh joins stderr to it.
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// The whole environment, one variable a line: a login's on a bare Debian, without a language, and the way to the network.
fn environment() -> String {
    let login = [
        ("HOME", HOME),
        ("USER", "root"),
        ("LOGNAME", "root"),
        ("SHELL", "/bin/sh"),
        ("TERM", "dumb"),
        ("PATH", "/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ];
    let login = login.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let variables = login.into_iter().chain(network::environment());
    variables.map(|(name, value)| format!("{name}={value}\n")).collect()
}

impl Outcome {
    /// Of a machine that has said nothing yet.
    pub(super) fn starting() -> Self {
        Self {
            step: "enter.sh".to_owned(),
            status: String::new(),
            has_succeeded: false,
            sysctls: None,
            counts: None,
            crate_shown_at: Duration::ZERO,
        }
    }

    /// Takes a line of the machine's, `elapsed` after its start.
    fn read(&mut self, line: &str, elapsed: Duration) {
        if let Some(step) = line.strip_prefix(STEP) {
            println!("fresh: {step} ({} s after the start)", elapsed.as_secs());
            step.clone_into(&mut self.step);
        } else if let Some(sysctls) = line.strip_prefix(SYSCTLS) {
            println!("fresh: {sysctls}");
            self.sysctls = Some(sysctls.to_owned());
        } else if CRATE_WORDS.iter().any(|word| line.trim_start().starts_with(word)) {
            if elapsed > self.crate_shown_at + CRATE_INTERVAL {
                println!("{PREFIX}{line}");
                self.crate_shown_at = elapsed;
            }
        } else {
            println!("{PREFIX}{line}");
            self.counts = closing_counts(line).or(self.counts);
        }
    }
}

/// `N passed, N failed`, or with `, N skipped`, and nothing else.
fn closing_counts(line: &str) -> Option<Counts> {
    let mut parts = line.split(", ");
    let mut count = |word: &str| {
        let (number, kind) = parts.next()?.split_once(' ')?;
        if kind == word { number.parse().ok() } else { None }
    };
    let (passed, failed) = (count("passed")?, count("failed")?);
    let skipped = match parts.next() {
        None => 0,
        Some(skipped) => skipped.strip_suffix(" skipped")?.parse().ok()?,
    };
    parts.next().is_none().then_some(Counts { passed, failed, skipped })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_closing_line_is_counted() {
        let counts = |passed, failed, skipped| Some(Counts { passed, failed, skipped });
        assert_eq!(closing_counts("812 passed, 0 failed"), counts(812, 0, 0));
        assert_eq!(closing_counts("812 passed, 1 failed, 3 skipped"), counts(812, 1, 3));
        for line in
            ["host    812 passed, 0 failed (200 s)", "812 passed", "", "1 passed, 2 failed, 3 skipped, 4 x"]
        {
            assert_eq!(closing_counts(line), None, "{line}");
        }
    }

    #[test]
    fn the_machines_steps_settings_and_closing_line_are_read() {
        let mut outcome = Outcome::starting();
        let said =
            "fresh-step: one\n1 passed, 0 failed\nfresh-step: two\nfresh-sysctls: x\n7 passed, 0 failed\ny";
        for line in said.lines() {
            outcome.read(line, Duration::ZERO);
        }
        assert_eq!((outcome.step.as_str(), outcome.sysctls.as_deref()), ("two", Some("x")));
        assert_eq!(outcome.counts, Some(Counts { passed: 7, failed: 0, skipped: 0 }));
    }

    #[test]
    fn both_scripts_are_read_by_a_shell_to_their_ends() {
        for script in [ENTER, STEPS] {
            let shell = Command::new("sh").args(["-n", "-c", script]).output().unwrap();
            assert!(shell.status.success(), "{}", String::from_utf8_lossy(&shell.stderr));
        }
    }

    #[test]
    fn the_steps_say_what_is_read() {
        for word in [STEP, SYSCTLS] {
            assert!(STEPS.contains(word), "{word}");
        }
    }
}
