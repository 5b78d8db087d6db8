//! The tests that need no VM: `cargo test` over the workspace, its output shown as it comes and counted.
//!
//! The VM tests are part of the same workspace; here they say that the lab runs them elsewhere and count nothing.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use testlab::harness::{LAB_VARIABLE, RUN_ELSEWHERE, RUN_IN_VM_REASON};

use super::report::{PartReport, Report};
use super::tool;
use super::workspace::{PROFILE, Workspace};

/// Building all tests and running them, on two slow cores.
const DEADLINE: Duration = Duration::from_secs(45 * 60);

/// Runs them.
///
/// # Errors
/// Cargo cannot be run or hangs, or the lab was interrupted. Failing tests are no error but part of the report.
pub(crate) fn run(workspace: &Workspace, report: &mut Report) -> Result<()> {
    let mut part = report.begin("host");
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--quiet", "--profile", PROFILE, "--workspace", "--no-fail-fast", "--"]);
    // One line for each test, whatever cargo's own verbosity is.
    cargo.args(["--format", "pretty"]).args(report.filter.as_deref());
    cargo.env(LAB_VARIABLE, RUN_ELSEWHERE).env("PATH", workspace.search_path()?);
    let mut child =
        cargo.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run cargo test")?;
    let stdout = child.stdout.take().context("cargo's output")?;
    let outcome = tool::follow_lines(stdout, DEADLINE, &mut |line| {
        if let Some(line) = line {
            count_line(line, &mut part);
        }
        Ok(())
    });
    if outcome.is_err() {
        tool::kill_and_reap(&mut child);
    }
    outcome.context("cargo test")?;
    let status = tool::wait(&mut child, DEADLINE).context("cargo test")?;
    if !status.success() && !part.has_failed() {
        part.fail("cargo test", &format!("{status}: something does not build, or a test process died"));
    }
    report.add(part);
    Ok(())
}

/// Prints and counts one line of cargo's.
fn count_line(line: &str, part: &mut PartReport) {
    if line.contains("... ignored") && line.contains(RUN_IN_VM_REASON) {
        part.run_later();
        return;
    }
    let failed = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"));
    if let Some(name) = failed {
        part.count_cargo_failure(name);
    }
    let counted = part.count_cargo_result(line);
    if !counted && !line.is_empty() && !line.starts_with("running ") {
        println!("{line}");
    }
}
