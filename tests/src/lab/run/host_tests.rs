//! The tests that need no VM: every test binary of the workspace but those the VM runs, one after another on this machine, and one
//! that computes and waits for nothing, the simulator's, beside everything else at the lowest priority.
//!
//! Builds all test binaries (the VM's with them, so that everything is built once), asks each for its tests, runs those that are
//! wanted, and counts the lines it prints. That a program is missing counts as a failure: the lab has installed them all.

use std::collections::HashSet;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use testlab::harness::{LAB_VARIABLE, REPORT_TIME_VARIABLE, RUN_ELSEWHERE};
use testlab::selection::Selection;

use crate::lab::progress::Step;
use crate::lab::report::PartReport;
use crate::lab::workspace::{PROFILE, Workspace};
use crate::lab::{progress, tool};

/// Building all tests, on two slow cores.
const BUILD_DEADLINE: Duration = Duration::from_secs(45 * 60);

/// All tests of one binary, on two slow cores that others use.
const BINARY_DEADLINE: Duration = Duration::from_secs(20 * 60);

/// The target that runs beside all others: tests wait for time-outs that are real, and it has what they leave of the processors.
const BESIDE: &str = "simulator";

/// All of its tests, with what others leave.
const BESIDE_DEADLINE: Duration = Duration::from_secs(60 * 60);

/// A binary that lists its tests.
const LIST_DEADLINE: Duration = Duration::from_secs(60);

/// With this set a test that lacks a program fails rather than be skipped.
const TOOLS_VARIABLE: &str = "VOLNODE_LAB_TOOLS";

/// A built test binary.
#[derive(Debug)]
pub(crate) struct TestBinary {
    /// Where cargo would run it.
    package: PathBuf,
    /// The target's name, and its kind: `test`, `lib`, `bin`.
    target: String,
    kind: String,
    pub(crate) executable: PathBuf,
}

/// Builds every test binary of the workspace.
///
/// # Errors
/// One does not build; cargo has said why.
pub(crate) fn build(workspace: &Workspace) -> Result<Vec<TestBinary>> {
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--profile", PROFILE, "--workspace", "--no-run"]);
    cargo.arg("--message-format=json-render-diagnostics");
    let (status, messages) =
        progress::cargo(&mut cargo, "compiling the tests", Stdio::piped(), BUILD_DEADLINE)?;
    ensure!(status.success(), "the tests do not build");
    Ok(binaries(&String::from_utf8_lossy(&messages)))
}

/// The test binary of the integration test `target`.
///
/// # Errors
/// Cargo named none.
pub(crate) fn executable_of<'a>(binaries: &'a [TestBinary], target: &str) -> Result<&'a Path> {
    let mut wanted = binaries.iter().filter(|binary| binary.target == target && binary.kind == "test");
    let named = wanted.next().map(|binary| binary.executable.as_path());
    named.with_context(|| format!("cargo named no executable for {target}"))
}

/// The test binaries among cargo's messages.
pub(crate) fn binaries(messages: &str) -> Vec<TestBinary> {
    #[derive(Deserialize)]
    struct Artifact {
        executable: Option<PathBuf>,
        manifest_path: PathBuf,
        profile: ArtifactProfile,
        target: Target,
    }
    #[derive(Deserialize)]
    struct ArtifactProfile {
        test: bool,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Artifact>(line).ok());
    let mut binaries: Vec<TestBinary> = artifacts
        .filter(|artifact| artifact.profile.test)
        .filter_map(|artifact| {
            Some(TestBinary {
                package: artifact.manifest_path.parent()?.to_owned(),
                target: artifact.target.name,
                kind: artifact.target.kind.into_iter().next()?,
                executable: artifact.executable?,
            })
        })
        .collect();
    // Cargo names them as they get ready, which differs from run to run.
    binaries.sort_by(|one, other| (&one.package, &one.target).cmp(&(&other.package, &other.target)));
    binaries
}

/// What is wanted of a test binary.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    binary: &'a TestBinary,
    /// For people: its package, kind and target.
    name: String,
    wanted: Vec<String>,
    is_all: bool,
}

impl Plan<'_> {
    fn is_beside(&self) -> bool {
        self.binary.target == BESIDE
    }
}

/// Asks all binaries but those whose targets are `elsewhere` for their tests, and chooses.
///
/// # Errors
/// A binary cannot be run, or hangs.
pub(crate) fn plan<'a>(
    workspace: &Workspace,
    binaries: &'a [TestBinary],
    elsewhere: &[&str],
    selection: &Selection,
) -> Result<Vec<Plan<'a>>> {
    let mut positions = 0..;
    let mut plans = Vec::new();
    for binary in binaries.iter().filter(|binary| !elsewhere.contains(&binary.target.as_str())) {
        let of_package = binary.package.strip_prefix(&workspace.root).unwrap_or(&binary.package).display();
        let name = format!("{of_package}: {} {}", binary.kind, binary.target);
        let mut list = command(workspace, binary, &[])?;
        let listed = tool::output(list.args(["--list", "--format", "terse"]), LIST_DEADLINE);
        let listed = String::from_utf8_lossy(&listed.with_context(|| name.clone())?).into_owned();
        let all: Vec<&str> = listed.lines().filter_map(|line| line.strip_suffix(": test")).collect();
        let mut wants =
            |test: &&&str| selection.wants(test) && positions.next().is_some_and(|at| selection.has(at));
        let wanted: Vec<String> = all.iter().filter(&mut wants).map(|test| (*test).to_owned()).collect();
        let is_all = wanted.len() == all.len();
        if !wanted.is_empty() {
            plans.push(Plan { binary, name, wanted, is_all });
        }
    }
    Ok(plans)
}

/// Runs what is wanted, one binary after another, and the documentation's examples; but for what [`run_beside`] runs.
///
/// # Errors
/// A binary cannot be run or hangs, or the lab was interrupted. Failing tests are no error but part of the report.
pub(crate) fn run(workspace: &Workspace, plans: &[Plan<'_>], selection: &Selection) -> Result<PartReport> {
    let mut part = PartReport::begin("host");
    for plan in plans.iter().filter(|plan| !plan.is_beside()) {
        run_binary(workspace, plan, &mut part)?;
    }
    if !selection.leaves_out() {
        run_doc_tests(workspace, &mut part)?;
    }
    Ok(part.ended())
}

/// Runs what is wanted of the binary that runs beside all others; `None`: nothing.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_beside(workspace: &Workspace, plans: &[Plan<'_>]) -> Result<Option<PartReport>> {
    let Some(plan) = plans.iter().find(|plan| plan.is_beside()) else { return Ok(None) };
    let mut part = PartReport::begin(BESIDE).beside_others(BESIDE);
    run_binary(workspace, plan, &mut part)?;
    Ok(Some(part.ended()))
}

fn run_binary(workspace: &Workspace, plan: &Plan<'_>, part: &mut PartReport) -> Result<()> {
    let (binary, name) = (plan.binary, &plan.name);
    let step = Step::begin(&format!("testing {name}"));
    let (before, deadline): (&[&str], _) = match plan.is_beside() {
        true => (&["nice", "-n", "19"], BESIDE_DEADLINE),
        false => (&[], BINARY_DEADLINE),
    };
    let mut command = command(workspace, binary, before)?;
    command.args(["--format", "pretty", "-Z", "unstable-options", "--report-time"]);
    command.env(REPORT_TIME_VARIABLE, "1");
    if !plan.is_all {
        command.arg("--exact").args(&plan.wanted);
    }
    let mut missing: HashSet<&str> = plan.wanted.iter().map(String::as_str).collect();
    let (before, failures_before) = (part.results(), part.failures());
    let planned = missing.len();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Its servers are of this group, too.
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run {}", binary.executable.display()))?;
    let stdout = child.stdout.take().context("the tests' output")?;
    let followed = tool::follow_lines(stdout, deadline, &mut |line| {
        if let Some(line) = line {
            count_line(line, part, &mut missing);
            step.is_at(&format!("{} of {planned} tests", planned - missing.len()));
        }
        Ok(())
    });
    drop(step);
    if let Err(error) = followed {
        end_group(&mut child);
        crate::lab::interrupt::check()?;
        let unended: Vec<&str> = missing.into_iter().collect();
        part.fail(name, &format!("{error:#}; not ended: {}", unended.join(", ")));
        return Ok(());
    }
    let status = tool::wait(&mut child, LIST_DEADLINE).with_context(|| name.clone())?;
    if part.results() - before < planned {
        let unended: Vec<&str> = missing.into_iter().collect();
        part.fail(name, &format!("it ended ({status}) without a result of {}", unended.join(", ")));
    } else if !status.success() && part.failures() == failures_before {
        part.fail(name, &format!("every test passed, and yet it ended with {status}"));
    }
    Ok(())
}

/// Ends a test binary with all that it started.
fn end_group(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It fails if all of them are gone, which is what is wanted.
        let _ = kill_process_group(group, Signal::KILL);
    }
    tool::kill_and_reap(child);
}

/// The binary as cargo would run it, by the program whose words are `before` it, if there is one.
fn command(workspace: &Workspace, binary: &TestBinary, before: &[&str]) -> Result<Command> {
    let mut command = match before {
        [] => Command::new(&binary.executable),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(&binary.executable);
            command
        }
    };
    command.current_dir(&binary.package).env("CARGO_MANIFEST_DIR", &binary.package);
    command.env("CARGO", workspace.cargo().get_program()).env("PATH", workspace.search_path()?);
    command.env(LAB_VARIABLE, RUN_ELSEWHERE).env(TOOLS_VARIABLE, "1");
    // What other programs say is read in English.
    command.env("LC_ALL", "C.UTF-8");
    Ok(command)
}

/// The examples in the documentation, which only rustdoc finds.
fn run_doc_tests(workspace: &Workspace, part: &mut PartReport) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--profile", PROFILE, "--workspace", "--doc"]);
    let (status, said) =
        progress::cargo(&mut cargo, "testing the documentation's examples", Stdio::piped(), BUILD_DEADLINE)?;
    let mut none = HashSet::new();
    for line in String::from_utf8_lossy(&said).lines() {
        count_line(line, part, &mut none);
    }
    if !status.success() && !part.has_failed() {
        part.fail("the documentation's examples", &format!("{status}"));
    }
    Ok(())
}

/// Prints and counts one line of a test binary's; a test that has a result is taken out of `missing`.
fn count_line(line: &str, part: &mut PartReport, missing: &mut HashSet<&str>) {
    if let Some((name, result, seconds)) = result_of(line) {
        missing.remove(name);
        if let Some(seconds) = seconds {
            part.took(name, seconds);
        }
        if result == "FAILED" {
            part.count_cargo_failure(name);
        }
        // Here is everything that a test can need: what is ignored would never run anywhere.
        if result.starts_with("ignored") {
            part.fail(name, result);
        }
        let shown = seconds.map(|seconds| format!(" ({seconds:.1} s)")).unwrap_or_default();
        part.say(&format!("test {name} ... {result}{shown}"));
        return;
    }
    let counted = part.count_cargo_result(line);
    if !counted && !line.is_empty() && !line.starts_with("running ") {
        part.say(line);
    }
}

/// `test a::b ... ok <0.123s>` → its name, the result and the seconds.
fn result_of(line: &str) -> Option<(&str, &str, Option<f64>)> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let (result, time) = match rest.split_once(" <") {
        Some((result, time)) => (result, time.strip_suffix("s>").and_then(|time| time.parse().ok())),
        None => (rest, None),
    };
    // With a panic expected, libtest says so behind the name.
    let name = name.strip_suffix(" - should panic").unwrap_or(name);
    let is_result = result == "ok" || result == "FAILED" || result.starts_with("ignored");
    is_result.then_some((name, result, time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_told_from_what_a_test_prints() {
        assert_eq!(result_of("test a::b ... ok <0.123s>"), Some(("a::b", "ok", Some(0.123))));
        assert_eq!(result_of("test a::b ... FAILED <61.5s>"), Some(("a::b", "FAILED", Some(61.5))));
        assert_eq!(result_of("test a - should panic ... ok"), Some(("a", "ok", None)));
        assert_eq!(result_of("test a ... ignored, why"), Some(("a", "ignored, why", None)));
        assert_eq!(result_of("test a has been running for over 60 seconds"), None);
        assert_eq!(result_of("test said ... something else"), None);
    }

    #[test]
    fn a_failure_is_counted_once_and_named() {
        let mut part = PartReport::begin("host");
        let mut missing = HashSet::from(["a", "b"]);
        count_line("test a ... ok <0.1s>", &mut part, &mut missing);
        count_line("test b ... FAILED <0.2s>", &mut part, &mut missing);
        count_line("test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured", &mut part, &mut missing);
        assert!(missing.is_empty() && part.has_failed());
        assert_eq!(part.results(), 2);
    }

    #[test]
    fn a_test_that_is_ignored_is_a_failure() {
        let mut part = PartReport::begin("host");
        let mut missing = HashSet::from(["a"]);
        count_line("test a ... ignored, it takes minutes", &mut part, &mut missing);
        assert!(missing.is_empty() && part.has_failed());
    }
}
