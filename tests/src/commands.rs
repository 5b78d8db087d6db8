//! What each subcommand does, in order: prepare (packages, kernel, build), run, say what came of it.
//!
//! Called by `main`. Each returns the exit code of the lab.

use std::io::{IsTerminal, Write, stderr, stdin, stdout};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use testlab::harness::Env;
use testlab::kernel_series::KernelSeries;
use testlab::soak::Fault;

use crate::lab::bench;
use crate::lab::bench_server;
use crate::lab::cost::{self, CostOptions};
use crate::lab::fuzz::{self, FuzzOptions};
use crate::lab::guest_command::GuestCommand;
use crate::lab::report::Report;
use crate::lab::scale;
use crate::lab::soak::{self, SoakOptions};
use crate::lab::systemd_machine;
use crate::lab::vm::{self, Follower, Processors, Stream, Terminal, Vm};
use crate::lab::workspace::{PROFILE, Workspace};
use crate::lab::{host_tests, kernels, packages, this_machine, tool, vm_tests};

/// The demo's promise: a fresh machine, builds included, within 15 minutes; the machine's part of it.
const DEMO_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// A shell ends when its user wants; a week means never.
const SHELL_DEADLINE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A build of everything from nothing on two slow cores.
const BUILD_DEADLINE: Duration = Duration::from_secs(45 * 60);

/// Options of `cargo lab test`.
#[derive(Args)]
pub(crate) struct TestOptions {
    /// Run only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
    /// Run only one part
    #[arg(long, value_enum, conflicts_with_all = ["kernel", "host"])]
    only: Option<Part>,
    /// The kernel to boot, instead of all of them
    #[arg(long, value_enum, conflicts_with = "host")]
    kernel: Option<KernelSeries>,
    /// Run the VM tests on this machine's own kernel and ublk driver
    #[arg(long)]
    host: bool,
    /// Show what passing tests print, too
    #[arg(long)]
    show_output: bool,
}

/// Options of the soak's own command.
#[derive(Args)]
pub(crate) struct GuestSoak {
    /// The directory of the product's programs
    programs: PathBuf,
    /// The kernel it runs on
    #[arg(value_enum)]
    series: KernelSeries,
    /// How long
    minutes: u64,
    /// What chooses the faults
    seed: u64,
    /// This machine is somebody's
    #[arg(long)]
    host: bool,
    /// The only fault
    #[arg(long, value_enum)]
    fault: Option<Fault>,
}

/// A part of `cargo lab test`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Unit and integration tests that need no VM
    Host,
    /// The VM tests on kernel 7
    #[value(name = "7")]
    V7,
    /// The VM tests on kernel 6.12
    #[value(name = "6.12")]
    V6_12,
    /// A machine that systemd boots and shuts down
    Systemd,
    /// What an I/O costs, beside the floor
    Cost,
}

/// Copies the command's output to ours.
pub(crate) struct PassThrough;

impl Follower for PassThrough {
    fn output(&mut self, stream: Stream, bytes: &[u8]) -> Result<()> {
        match stream {
            Stream::Stdout => stdout().write_all(bytes).and_then(|()| stdout().flush()),
            Stream::Stderr => stderr().write_all(bytes),
        }
        .context("passing on the command's output")
    }
}

/// Runs one command in the VM or, without a series, on this machine.
pub(crate) fn run(
    series: Option<KernelSeries>,
    processors: Processors,
    deadline_seconds: u64,
    words: Vec<String>,
) -> Result<u8> {
    let workspace = Workspace::locate()?;
    let command = GuestCommand::new(&workspace, words)?;
    run_command(&workspace, series, processors, &command, Duration::from_secs(deadline_seconds))
}

/// Runs the demo.
pub(crate) fn demo(series: Option<KernelSeries>) -> Result<u8> {
    let workspace = Workspace::locate()?;
    let program = workspace.own_program().display().to_string();
    let command = GuestCommand::new(&workspace, vec![program, "guest-demo".to_owned()])?;
    let command = command.in_directory(&workspace.root);
    build(&workspace)?;
    let exit_code = run_command(&workspace, series, Processors::Two, &command, DEMO_DEADLINE)?;
    Ok(u8::from(exit_code != 0))
}

/// Measures what an I/O costs.
pub(crate) fn cost(options: &CostOptions) -> Result<u8> {
    cost::run(&Workspace::locate()?, options).map(|()| 0)
}

/// Measures speed, latency and CPU time beside the peers; with `write`, keeps the results in the documentation.
pub(crate) fn bench(quick: bool, write: bool) -> Result<u8> {
    bench::run(&Workspace::locate()?, quick, write).map(|()| 0)
}

/// Measures the server beside its peers, on this machine; with `write`, keeps the results in the documentation.
pub(crate) fn bench_server(quick: bool, write: bool, directory: &Path) -> Result<u8> {
    bench_server::run(&Workspace::locate()?, quick, write, directory).map(|()| 0)
}

/// Measures idle attachments and many of them; with `write`, keeps the results in the documentation.
pub(crate) fn scale(write: bool) -> Result<u8> {
    scale::run(&Workspace::locate()?, write).map(|()| 0)
}

/// Fuzzes the parsers that face the network.
pub(crate) fn fuzz(options: &FuzzOptions) -> Result<u8> {
    fuzz::run(&Workspace::locate()?, options).map(|has_passed| u8::from(!has_passed))
}

/// Lets faults happen under load, for as long as asked.
pub(crate) fn soak(options: &SoakOptions) -> Result<u8> {
    soak::run(&Workspace::locate()?, options)
}

/// What that runs where ublk is.
pub(crate) fn guest_soak(guest: &GuestSoak) -> Result<u8> {
    let directory = std::env::temp_dir().join(format!("volnode-soak-{}", std::process::id()));
    std::fs::create_dir_all(&directory).context("the soak's directory")?;
    let env = Env {
        series: guest.series,
        directory: directory.clone(),
        programs: guest.programs.clone(),
        in_vm: !guest.host,
    };
    let report = testlab::soak::run(&env, guest.seed, Duration::from_secs(guest.minutes * 60), guest.fault)?;
    println!("{report}");
    std::fs::remove_dir_all(&directory).context("the soak's directory")?;
    Ok(0)
}

/// Boots a machine under systemd, and shuts it down.
pub(crate) fn systemd(series: KernelSeries) -> Result<u8> {
    systemd_machine::run(&Workspace::locate()?, series).map(|()| 0)
}

/// Gives the terminal to a shell in the VM.
pub(crate) fn shell(series: KernelSeries) -> Result<u8> {
    ensure!(stdin().is_terminal() && stdout().is_terminal(), "shell needs a terminal: use `run -- CMD`");
    let workspace = Workspace::locate()?;
    let words = vec!["bash".to_owned(), "-i".to_owned()];
    let command = GuestCommand::new(&workspace, words)?.with_variable("PS1", "volnode-lab:\\w# ");
    packages::ensure_installed(&workspace)?;
    let kernel = kernels::ensure_cached(&workspace, series)?;
    let saved = TerminalSettings::save()?;
    let vm = Vm::start(&workspace, &kernel, &command, Terminal::Interactive)?;
    let ended = vm.run_to_end(SHELL_DEADLINE, &mut PassThrough);
    drop(saved);
    Ok(ended?.exit_code)
}

/// Builds everything and runs the tests.
pub(crate) fn test(options: &TestOptions) -> Result<u8> {
    let workspace = Workspace::locate()?;
    if options.host {
        this_machine::ensure_ublk()?;
    }
    let started = Instant::now();
    let wants = |part| options.only.is_none_or(|only| only == part);
    let series: Vec<KernelSeries> = KernelSeries::ALL
        .into_iter()
        .filter(|series| options.kernel.is_none_or(|only| only == *series))
        .filter(|series| wants(if *series == KernelSeries::V7 { Part::V7 } else { Part::V6_12 }))
        .collect();
    let mut report = Report::new(options.filter.clone(), options.show_output);
    if !options.host && (!series.is_empty() || wants(Part::Systemd)) {
        packages::ensure_installed(&workspace)?;
    } else if wants(Part::Host) {
        packages::ensure_tools(&workspace)?;
    }
    build(&workspace)?;
    if wants(Part::Host) && options.kernel.is_none() {
        host_tests::run(&workspace, &mut report)?;
    }
    let wants_cost = wants(Part::Cost) && options.kernel.is_none() && !options.host;
    // The machine leaves processors idle, and the shipped programs take minutes to build.
    let beside = wants_cost && !series.is_empty() && options.filter.is_none();
    let beside = beside.then(|| cost::build_beside(&workspace)).transpose()?;
    if options.host || !series.is_empty() {
        packages::ensure_fsx(&workspace)?;
        let binaries = vm_tests::build(&workspace)?;
        if options.host {
            vm_tests::run_on_this_machine(&workspace, &binaries, &mut report)?;
        } else {
            for series in series {
                vm_tests::run_in_vm(&workspace, series, &binaries, &mut report)?;
            }
        }
    }
    if wants(Part::Systemd) && options.kernel.is_none() && !options.host {
        systemd_machine::test(&workspace, KernelSeries::V7, &mut report)?;
    }
    if let Some(build) = beside {
        build.finish()?;
    }
    if wants_cost {
        cost::gate::run(&workspace, &mut report)?;
    }
    Ok(u8::from(!report.close(started.elapsed())))
}

pub(crate) fn run_command(
    workspace: &Workspace,
    series: Option<KernelSeries>,
    processors: Processors,
    command: &GuestCommand,
    deadline: Duration,
) -> Result<u8> {
    let Some(series) = series else {
        this_machine::ensure_ublk()?;
        let mut child =
            command.on_this_machine()?.stdin(Stdio::null()).spawn().context("cannot run the command")?;
        let status = tool::wait(&mut child, deadline)?;
        // As shells do: a command killed by signal N ends with 128 + N.
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        return u8::try_from(code).context("the command's exit code");
    };
    packages::ensure_installed(workspace)?;
    let kernel = kernels::ensure_cached(workspace, series)?;
    Ok(vm::run(workspace, &kernel, command, processors, deadline, &mut PassThrough)?.exit_code)
}

/// Builds every program of the workspace with the lab's profile.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--quiet", "--profile", PROFILE, "--workspace", "--bins"]).stdin(Stdio::null());
    let mut child = cargo.spawn().context("cannot run cargo")?;
    let status = tool::wait(&mut child, BUILD_DEADLINE).context("cargo build")?;
    ensure!(status.success(), "the workspace does not build");
    Ok(())
}

/// The terminal's settings, put back when dropped: QEMU sets raw mode, and may die before it can undo that.
struct TerminalSettings(String);

impl TerminalSettings {
    fn save() -> Result<Self> {
        let output =
            Command::new("stty").arg("-g").stdin(Stdio::inherit()).output().context("cannot run stty")?;
        ensure!(output.status.success(), "stty: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }
}

impl Drop for TerminalSettings {
    fn drop(&mut self) {
        if let Err(error) = Command::new("stty").arg(&self.0).status() {
            eprintln!("lab: cannot restore the terminal: {error}");
        }
    }
}
