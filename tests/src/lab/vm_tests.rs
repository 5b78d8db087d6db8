//! The VM tests (`tests/vm/`): builds their binary and runs it in a machine, or on this one, under the report.
//!
//! One boot runs all tests of a kernel. The binary and the lab talk by event lines (`testlab::events`).

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use testlab::harness::{
    KERNEL_VARIABLE, LAB_VARIABLE, MACHINE_VARIABLE, PROGRAMS_VARIABLE, RUN_HERE, STORAGE_MACHINE_VARIABLE,
};
use testlab::kernel_series::KernelSeries;
use testlab::libtest_binary::BINARIES_VARIABLE;

use super::guest_command::GuestCommand;
use super::report::{EventReader, PartReport, Report};
use super::storage_machine::StorageMachine;
use super::vm::{self, Follower, Processors, Stream};
use super::workspace::{PROFILE, Workspace};
use super::{interrupt, kernels, this_machine, tool};

/// Building one test binary whose dependencies are built.
const BUILD_DEADLINE: Duration = Duration::from_secs(30 * 60);

/// From the end of a test process's output to its own.
const EXIT_DEADLINE: Duration = Duration::from_secs(60);

/// All tests of one kernel; each test has its own, shorter deadline.
const PART_DEADLINE: Duration = Duration::from_secs(40 * 60);

/// The binaries that hold tests which need ublk.
pub(crate) struct TestBinaries {
    /// `tests/vm/`, which runs the others' tests, too.
    vm: PathBuf,
    /// The device tests of `ublk-core`.
    ublk_core: PathBuf,
}

/// Builds them.
///
/// # Errors
/// One does not build; cargo has said why.
pub(crate) fn build(workspace: &Workspace) -> Result<TestBinaries> {
    let mut cargo = workspace.cargo();
    // The whole workspace, like the host's tests, so that dependencies are built with the same features once.
    cargo.args(["test", "--quiet", "--profile", PROFILE, "--workspace", "--test", "vm", "--test", "ublk"]);
    cargo.args(["--no-run", "--message-format=json-render-diagnostics"]);
    let messages = tool::output(&mut cargo, BUILD_DEADLINE).context("building the VM tests")?;
    let messages = String::from_utf8_lossy(&messages);
    let executable = |target: &str| {
        executable_of(&messages, target).with_context(|| format!("cargo named no executable for {target}"))
    };
    Ok(TestBinaries { vm: executable("vm")?, ublk_core: executable("ublk")? })
}

/// Runs the tests in a machine with a kernel of `series`.
///
/// # Errors
/// The lab was interrupted, or cannot prepare the machine. A machine that fails is part of the report.
pub(crate) fn run_in_vm(
    workspace: &Workspace,
    series: KernelSeries,
    binaries: &TestBinaries,
    report: &mut Report,
) -> Result<()> {
    let kernel = kernels::ensure_cached(workspace, series)?;
    let mut part = report.begin(&format!("kernel {series} ({})", kernel.release));
    let storage_machine = StorageMachine::start(workspace)?;
    let command = test_command(workspace, binaries, report, series, "vm")?
        .with_variable(STORAGE_MACHINE_VARIABLE, &storage_machine.management_uri);
    let mut follower = TestFollower(EventReader::new(&mut part, report.show_output));
    let ended = vm::run(workspace, &kernel, &command, Processors::Two, PART_DEADLINE, &mut follower);
    let finished = follower.0.close();
    interrupt::check()?;
    match ended {
        Err(error) => part.fail("the machine", &format!("{error:#}")),
        Ok(ended) => {
            println!("(up after {:.1} s)", ended.boot_time.as_secs_f64());
            check_exit(&mut part, finished, &format!("exit code {}", ended.exit_code), ended.exit_code == 0);
            if part.has_failed() && !ended.kernel_messages.is_empty() {
                println!("---- console log ----\n{}\n---- end of console log ----", ended.kernel_messages);
            }
        }
    }
    report.add(part);
    Ok(())
}

/// Runs the tests on this machine's own kernel.
///
/// # Errors
/// The lab was interrupted, or the binary cannot be run.
pub(crate) fn run_on_this_machine(
    workspace: &Workspace,
    binaries: &TestBinaries,
    report: &mut Report,
) -> Result<()> {
    let release = this_machine::release();
    let series = KernelSeries::nearest_to_release(&release);
    let mut part = report.begin(&format!("this machine's kernel {release}"));
    let mut command = test_command(workspace, binaries, report, series, "host")?.on_this_machine()?;
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("running the tests")?;
    let stdout = child.stdout.take().context("the tests' output")?;
    let mut reader = EventReader::new(&mut part, report.show_output);
    let followed = tool::follow_lines(stdout, PART_DEADLINE, &mut |line| match line {
        Some(line) => reader.read(format!("{line}\n").as_bytes()),
        None => reader.check_deadlines(),
    });
    let finished = reader.close();
    if let Err(error) = followed {
        tool::kill_and_reap(&mut child);
        interrupt::check()?;
        part.fail("the test process", &format!("{error:#}"));
    }
    let status = tool::wait(&mut child, EXIT_DEADLINE)?;
    check_exit(&mut part, finished, &status.to_string(), status.success());
    report.add(part);
    Ok(())
}

struct TestFollower<'a>(EventReader<'a>);

impl Follower for TestFollower<'_> {
    fn output(&mut self, _stream: Stream, bytes: &[u8]) -> Result<()> {
        self.0.read(bytes)
    }

    fn tick(&mut self) -> Result<()> {
        self.0.check_deadlines()
    }
}

/// A test process must say that it finished, and end with 0 exactly if no test failed.
fn check_exit(part: &mut PartReport, finished: bool, status: &str, success: bool) {
    if !finished {
        part.fail("the test process", &format!("ended before its tests did ({status})"));
    } else if !success && !part.has_failed() {
        part.fail("the test process", &format!("every test passed, and yet it ended with {status}"));
    }
}

/// The command that runs the tests, with stderr in stdout so that lines keep their order.
fn test_command(
    workspace: &Workspace,
    binaries: &TestBinaries,
    report: &Report,
    series: KernelSeries,
    machine: &str,
) -> Result<GuestCommand> {
    let mut words: Vec<String> = ["sh", "-c", "exec \"$0\" \"$@\" 2>&1"].map(str::to_owned).into();
    words.push(binaries.vm.display().to_string());
    words.extend(report.filter.clone());
    Ok(GuestCommand::new(workspace, words)?
        .in_directory(&workspace.root)
        .with_variable(LAB_VARIABLE, RUN_HERE)
        .with_variable(KERNEL_VARIABLE, series.name())
        .with_variable(MACHINE_VARIABLE, machine)
        .with_variable(BINARIES_VARIABLE, &format!("ublk-core={}", binaries.ublk_core.display()))
        .with_variable(PROGRAMS_VARIABLE, &workspace.programs().display().to_string())
        .with_variable("RUST_BACKTRACE", "0"))
}

/// The executable of the test target `name` among cargo's messages.
fn executable_of(messages: &str, name: &str) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Artifact {
        executable: Option<PathBuf>,
        target: Target,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Artifact>(line).ok());
    let mut wanted =
        artifacts.filter(|artifact| artifact.target.name == name && artifact.target.kind == ["test"]);
    wanted.find_map(|artifact| artifact.executable)
}

#[cfg(test)]
mod tests {
    use super::executable_of;

    #[test]
    fn the_executable_is_found_among_cargos_messages() {
        let messages = "{\"reason\":\"x\",\"target\":{\"name\":\"vm\",\"kind\":[\"bin\"]},\"executable\":\"/no\"}\n\
                        not json\n\
                        {\"reason\":\"x\",\"target\":{\"name\":\"vm\",\"kind\":[\"test\"]},\"executable\":\"/t/vm-1\"}\n\
                        {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(executable_of(messages, "vm").unwrap().to_str(), Some("/t/vm-1"));
        assert!(executable_of(messages, "ublk").is_none());
    }
}
