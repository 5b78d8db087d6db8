//! The VM tests (`tests/vm/`): runs their binary in a machine, or on this one, under the report.
//!
//! One boot runs all tests of a kernel, or a share of them; several machines may run side by side. The binary and the lab talk by event lines (`testlab::events`).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use testlab::harness::{
    KERNEL_VARIABLE, LAB_VARIABLE, MACHINE_VARIABLE, PROGRAMS_VARIABLE, RUN_HERE, STORAGE_MACHINE_VARIABLE,
};
use testlab::kernel_series::KernelSeries;
use testlab::libtest_binary::BINARIES_VARIABLE;
use testlab::selection::{Selection, Shard};

use super::host_tests::{TestBinary, executable_of};
use crate::lab::machine::guest_command::GuestCommand;
use crate::lab::machine::kernels::Kernel;
use crate::lab::machine::storage_machine::StorageMachine;
use crate::lab::machine::this_machine;
use crate::lab::machine::vm::{self, Follower, Processors, Stream};
use crate::lab::report::{EventReader, PartReport};
use crate::lab::workspace::Workspace;
use crate::lab::{interrupt, tool};

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

/// The targets of [`TestBinaries`], which do not run on this machine with the others.
pub(crate) const TARGETS: [&str; 2] = ["vm", "ublk"];

/// Finds them among all that were built.
///
/// # Errors
/// Cargo named no executable for one.
pub(crate) fn among(built: &[TestBinary]) -> Result<TestBinaries> {
    let executable = |target| executable_of(built, target).map(Path::to_owned);
    Ok(TestBinaries { vm: executable(TARGETS[0])?, ublk_core: executable(TARGETS[1])? })
}

/// What every machine with tests is given.
pub(crate) struct Given<'a> {
    /// Where things are.
    pub(crate) workspace: &'a Workspace,
    /// What holds the tests.
    pub(crate) binaries: &'a TestBinaries,
    /// Which of them are wanted.
    pub(crate) selection: &'a Selection,
    /// Show passing tests' output.
    pub(crate) show_output: bool,
}

/// Runs the tests in a machine with `kernel`, of `series`, perhaps beside other machines. With a share, only that of them: another
/// machine runs the others.
///
/// # Errors
/// The lab was interrupted, or cannot prepare the machine. A machine that fails is part of the report.
pub(crate) fn run_in_vm(
    given: &Given<'_>,
    series: KernelSeries,
    kernel: &Kernel,
    share: Option<Shard>,
) -> Result<PartReport> {
    let of_share = share.map(|share| format!(" {share}")).unwrap_or_default();
    let title = format!("kernel {series}{of_share} ({})", kernel.release);
    let mut part = PartReport::begin(&title).beside_others(&format!("{series}{of_share}"));
    let storage_machine = StorageMachine::start(given.workspace)?;
    let selection = Selection { shard: share.or(given.selection.shard), ..given.selection.clone() };
    let command = test_command(given, &selection, series, "vm")?
        .with_variable(STORAGE_MACHINE_VARIABLE, &storage_machine.management_uri);
    let mut follower = TestFollower(EventReader::new(&mut part, given.show_output));
    let ended = vm::run(given.workspace, kernel, &command, Processors::Two, PART_DEADLINE, &mut follower);
    let finished = follower.0.close();
    interrupt::check()?;
    match ended {
        Err(error) => part.fail("the machine", &format!("{error:#}")),
        Ok(ended) => {
            part.say(&format!("(up after {:.1} s)", ended.boot_time.as_secs_f64()));
            check_exit(&mut part, finished, &format!("exit code {}", ended.exit_code), ended.exit_code == 0);
            if part.has_failed() && !ended.kernel_messages.is_empty() {
                let messages = ended.kernel_messages;
                part.say(&format!("---- console log ----\n{messages}\n---- end of console log ----"));
            }
        }
    }
    Ok(part.ended())
}

/// Runs the tests on this machine's own kernel.
///
/// # Errors
/// The lab was interrupted, or the binary cannot be run.
pub(crate) fn run_on_this_machine(given: &Given<'_>) -> Result<PartReport> {
    let release = this_machine::release();
    let series = KernelSeries::nearest_to_release(&release);
    let mut part = PartReport::begin(&format!("this machine's kernel {release}"));
    let mut command = test_command(given, given.selection, series, "host")?.on_this_machine()?;
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("running the tests")?;
    let stdout = child.stdout.take().context("the tests' output")?;
    let mut reader = EventReader::new(&mut part, given.show_output);
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
    Ok(part.ended())
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
    given: &Given<'_>,
    selection: &Selection,
    series: KernelSeries,
    machine: &str,
) -> Result<GuestCommand> {
    let (workspace, binaries) = (given.workspace, given.binaries);
    let mut words: Vec<String> = ["sh", "-c", "exec \"$0\" \"$@\" 2>&1"].map(str::to_owned).into();
    words.push(binaries.vm.display().to_string());
    words.extend(selection.filter.clone());
    let mut command = GuestCommand::new(workspace, words)?
        .in_directory(&workspace.root)
        .with_variable(LAB_VARIABLE, RUN_HERE)
        .with_variable(KERNEL_VARIABLE, series.name())
        .with_variable(MACHINE_VARIABLE, machine)
        .with_variable(BINARIES_VARIABLE, &format!("ublk-core={}", binaries.ublk_core.display()))
        .with_variable(PROGRAMS_VARIABLE, &workspace.programs().display().to_string())
        .with_variable("RUST_BACKTRACE", "0");
    for (name, value) in selection.variables() {
        command = command.with_variable(name, &value);
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::super::host_tests::{binaries, executable_of};

    #[test]
    fn the_executable_is_found_among_cargos_messages() {
        let artifact = |kind: &str, test: bool, executable: &str| {
            format!(
                "{{\"reason\":\"compiler-artifact\",\"manifest_path\":\"/w/t/Cargo.toml\",\"profile\":{{\"test\":{test}}},\
                 \"target\":{{\"name\":\"vm\",\"kind\":[\"{kind}\"]}},\"executable\":{executable}}}\n"
            )
        };
        let messages = [
            artifact("bin", false, "\"/no\""),
            "not json\n".to_owned(),
            artifact("test", true, "\"/t/vm-1\""),
            artifact("lib", true, "null"),
            "{\"reason\":\"build-finished\",\"success\":true}\n".to_owned(),
        ];
        let built = binaries(&messages.concat());
        assert_eq!(executable_of(&built, "vm").unwrap().to_str(), Some("/t/vm-1"));
        assert!(executable_of(&built, "ublk").is_err());
    }
}
