//! `cargo lab boots N`: boots N machines, several at once so that all processors are busy, and counts those that came up.
//!
//! The emulator has accidents of its own: this says how often, and that [`super::vm::run`] gets over them. Each machine runs one
//! command, which looks whether both of its processors are there. Kernels take turns.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use testlab::kernel_series::KernelSeries;

use super::guest_command::GuestCommand;
use super::kernels::{self, Kernel};
use super::packages;
use super::vm::{self, Follower, Processors, Stream};
use crate::lab::workspace::Workspace;
use crate::lab::{interrupt, progress};

/// A boot and nearly nothing else, on processors that others use.
const DEADLINE: Duration = Duration::from_secs(10 * 60);

/// What each machine runs.
const COMMAND: &str = "uname -r && test \"$(nproc)\" = 2";

/// Options of `cargo lab boots`.
#[derive(Args)]
pub(crate) struct BootsOptions {
    /// How many machines
    machines: usize,
    /// How many at once
    #[arg(long, default_value_t = 2)]
    at_once: usize,
    /// The kernel to boot, instead of all of them by turns
    #[arg(long, value_enum)]
    kernel: Option<KernelSeries>,
}

/// What has come of the machines so far.
#[derive(Default)]
struct Tally {
    came_up: usize,
    /// Machines that were booted more often than once.
    booted_again: usize,
    boot_seconds: Vec<f64>,
    failures: Vec<String>,
}

/// Boots them; true if all came up.
///
/// # Errors
/// The lab cannot prepare a machine, or was interrupted.
pub(crate) fn run(workspace: &Workspace, options: &BootsOptions) -> Result<bool> {
    packages::ensure_installed(workspace)?;
    let wanted =
        KernelSeries::ALL.into_iter().filter(|series| options.kernel.is_none_or(|only| only == *series));
    let kernels: Vec<Kernel> =
        wanted.map(|series| kernels::ensure_cached(workspace, series)).collect::<Result<_>>()?;
    let (next, tally) = (AtomicUsize::new(0), Mutex::new(Tally::default()));
    thread::scope(|scope| {
        for _ in 0..options.at_once.max(1) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= options.machines || interrupt::check().is_err() {
                        return;
                    }
                    let outcome = boot(workspace, &kernels[number % kernels.len()]);
                    note(
                        &mut tally.lock().unwrap_or_else(PoisonError::into_inner),
                        options.machines,
                        outcome,
                    );
                }
            });
        }
    });
    interrupt::check()?;
    let tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    for failure in &tally.failures {
        eprintln!("lab: {failure}");
    }
    let mean = tally.boot_seconds.iter().sum::<f64>() / tally.boot_seconds.len().max(1) as f64;
    let longest = tally.boot_seconds.iter().copied().fold(0.0, f64::max);
    println!(
        "{} of {} machines came up, {} of them not with their first boot; up after {mean:.1} s, the slowest after {longest:.1} s",
        tally.came_up, options.machines, tally.booted_again
    );
    Ok(tally.came_up == options.machines)
}

/// One machine: how often it was booted, and how long the last boot took.
fn boot(workspace: &Workspace, kernel: &Kernel) -> Result<(usize, f64)> {
    let words = ["sh", "-c", COMMAND].map(str::to_owned).to_vec();
    let command = GuestCommand::new(workspace, words)?;
    let mut release = Release::default();
    let ended = vm::run(workspace, kernel, &command, Processors::Two, DEADLINE, &mut release)?;
    let told = String::from_utf8_lossy(&release.0).trim().to_owned();
    if ended.exit_code != 0 || told != kernel.release {
        bail!("it came up as {told:?}, wanted {}; exit code {}", kernel.release, ended.exit_code);
    }
    Ok((ended.boots, ended.boot_time.as_secs_f64()))
}

fn note(tally: &mut Tally, of: usize, outcome: Result<(usize, f64)>) {
    match outcome.context("a machine") {
        Ok((boots, seconds)) => {
            tally.came_up += 1;
            tally.booted_again += usize::from(boots > 1);
            tally.boot_seconds.push(seconds);
        }
        Err(error) => tally.failures.push(format!("{error:#}")),
    }
    let done = tally.came_up + tally.failures.len();
    let last = tally.boot_seconds.last().copied().unwrap_or_default();
    let failed = done - tally.came_up;
    progress::say(&format!("lab: {} of {of} came up, {failed} failed ({last:.1} s)", tally.came_up));
}

/// What the command printed.
#[derive(Default)]
struct Release(Vec<u8>);

impl Follower for Release {
    fn output(&mut self, _: Stream, bytes: &[u8]) -> Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}
