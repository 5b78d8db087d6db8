//! What each subcommand does, in order: prepare (packages, kernel, build), run, say what came of it.
//!
//! Called by `main`. Each returns the exit code of the lab.

use std::io::{IsTerminal, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use testlab::harness::Env;
use testlab::image_contents::{self, IMAGES};
use testlab::kernel_series::KernelSeries;
use testlab::soak::Fault;

use crate::kubernetes::{self, KubernetesOptions};
use crate::lab::machine::anywhere::{self, PassThrough};
use crate::lab::machine::boots::{self, BootsOptions};
use crate::lab::machine::guest_command::GuestCommand;
use crate::lab::machine::vm::{self, Processors, Terminal};
use crate::lab::machine::{kernels, packages, systemd_machine};
use crate::lab::measure::cost::{self, CostOptions};
use crate::lab::measure::{bench_api, bench_server, scale, zero_copy};
use crate::lab::programs;
use crate::lab::run::fresh::{self, FreshOptions};
use crate::lab::run::fuzz::{self, FuzzOptions};
use crate::lab::run::host_tests;
use crate::lab::run::soak::{self, SoakOptions};
use crate::lab::run::test_run::{self, TestOptions};
use crate::lab::workspace::Workspace;

/// The demo's promise: a fresh machine, builds included, within 15 minutes; the machine's part of it.
const DEMO_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// A shell ends when its user wants; a week means never.
const SHELL_DEADLINE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

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

/// Runs one command in the VM or, without a series, on this machine.
pub(crate) fn run(
    series: Option<KernelSeries>,
    processors: Processors,
    deadline_seconds: u64,
    words: Vec<String>,
) -> Result<u8> {
    let workspace = Workspace::locate()?;
    let command = GuestCommand::new(&workspace, words)?;
    anywhere::run(&workspace, series, processors, &command, Duration::from_secs(deadline_seconds))
}

/// Runs the demo.
pub(crate) fn demo(series: Option<KernelSeries>) -> Result<u8> {
    let workspace = Workspace::locate()?;
    let program = workspace.own_program().display().to_string();
    let command = GuestCommand::new(&workspace, vec![program, "guest-demo".to_owned()])?;
    let command = command.in_directory(&workspace.root);
    programs::build_all(&workspace)?;
    let exit_code = anywhere::run(&workspace, series, Processors::Two, &command, DEMO_DEADLINE)?;
    Ok(u8::from(exit_code != 0))
}

/// Measures what an I/O costs.
pub(crate) fn cost(options: &CostOptions) -> Result<u8> {
    cost::run(&Workspace::locate()?, options).map(|()| 0)
}

/// Measures the server beside its peers, on this machine; with `write`, keeps the results in the documentation.
pub(crate) fn bench_server(quick: bool, write: bool, directory: &Path) -> Result<u8> {
    bench_server::run(&Workspace::locate()?, quick, write, directory).map(|()| 0)
}

/// Measures the management API with a full catalog, on this machine; with `write`, keeps the results in the documentation.
pub(crate) fn bench_api(wanted: bench_api::BenchApiOptions<'_>) -> Result<u8> {
    bench_api::run(&Workspace::locate()?, wanted).map(|()| 0)
}

/// Measures idle attachments and many of them; with `write`, keeps the results in the documentation.
pub(crate) fn scale(write: bool) -> Result<u8> {
    scale::run(&Workspace::locate()?, write).map(|()| 0)
}

/// Installs, fetches and builds what the demo and the tests need; runs nothing.
pub(crate) fn setup() -> Result<u8> {
    let workspace = Workspace::locate()?;
    packages::ensure_installed(&workspace)?;
    packages::ensure_udev(&workspace)?;
    for series in KernelSeries::ALL {
        kernels::ensure_cached(&workspace, series)?;
    }
    programs::build_all(&workspace)?;
    packages::ensure_fsx(&workspace)?;
    host_tests::build(&workspace)?;
    println!("set up: `cargo lab demo` and `cargo lab test` have all they need");
    Ok(0)
}

/// Measures what a large WRITE costs both ways; with `write`, keeps the results in the documentation.
pub(crate) fn zero_copy(write: bool) -> Result<u8> {
    zero_copy::run(&Workspace::locate()?, write).map(|()| 0)
}

/// Makes the images of `deploy/kubernetes`.
pub(crate) fn images(directory: Option<PathBuf>) -> Result<u8> {
    let workspace = Workspace::locate()?;
    programs::build(&workspace, "release", &[&IMAGES[..], &["volctl"]].concat())?;
    let directory = directory.unwrap_or_else(|| workspace.target.join("images"));
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    for program in IMAGES {
        let archive = directory.join(format!("{program}.tar"));
        let image = image_contents::image(program, &workspace.target.join("release"))?;
        image.write(&archive)?;
        println!("{}: {}", image.name, archive.display());
    }
    println!(
        "load them on each node: `ctr --namespace k8s.io images import FILE`, or `docker load --input FILE`"
    );
    Ok(0)
}

/// Sets the project up on a bare Debian, and runs the host's tests there.
pub(crate) fn fresh(options: &FreshOptions) -> Result<u8> {
    fresh::run(&Workspace::locate()?, options).map(|has_passed| u8::from(!has_passed))
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

/// Makes a Kubernetes, and lets things happen to it.
pub(crate) fn kubernetes(options: &KubernetesOptions) -> Result<u8> {
    kubernetes::run(&Workspace::locate()?, options)
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
    let terminal = Terminal::Interactive;
    let mut follower = PassThrough;
    let ended =
        vm::run_on(&workspace, &kernel, &command, terminal, Processors::Two, SHELL_DEADLINE, &mut follower);
    drop(saved);
    Ok(ended?.exit_code)
}

/// Builds everything and runs the tests.
pub(crate) fn test(options: &TestOptions) -> Result<u8> {
    test_run::run(options).map(|has_passed| u8::from(!has_passed))
}

/// Boots machines, one after another or several at once, and counts those that came up.
pub(crate) fn boots(options: &BootsOptions) -> Result<u8> {
    boots::run(&Workspace::locate()?, options).map(|all_came_up| u8::from(!all_came_up))
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
