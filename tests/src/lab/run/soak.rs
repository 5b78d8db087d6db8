//! `cargo lab soak`: faults at random under the oracle, for as long as wanted, in the VM or on this machine.
//!
//! Builds, boots, and lets `lab guest-soak` run there; what that prints is passed on. With `--sim` the simulator runs instead,
//! in this process.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum as _};
use testlab::kernel_series::KernelSeries;
use testlab::seed;
use testlab::simulator::{Coverage, Stage};
use testlab::soak::Fault;

use crate::lab::machine::anywhere;
use crate::lab::machine::guest_command::GuestCommand;
use crate::lab::machine::vm::Processors;
use crate::lab::programs;
use crate::lab::workspace::Workspace;

/// Beside the minutes asked for: booting, and the last fault.
const SLACK: Duration = Duration::from_secs(15 * 60);

/// Options of `cargo lab soak`.
#[derive(Args)]
pub(crate) struct SoakOptions {
    /// How long
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    minutes: u32,
    /// What chooses the faults; printed where none is given
    #[arg(long)]
    seed: Option<u64>,
    /// The kernel to boot
    #[arg(long, value_enum, default_value = "7")]
    kernel: KernelSeries,
    /// Use this machine's own kernel and ublk driver instead of a VM
    #[arg(long, conflicts_with = "kernel")]
    host: bool,
    /// Let only this happen
    #[arg(long, value_enum)]
    fault: Option<Fault>,
    /// Run the simulator, which needs no kernel, instead
    #[arg(long, conflicts_with_all = ["kernel", "host", "minutes", "fault"])]
    sim: bool,
    /// How many simulations, from the seed on; a single one prints what happens in it
    #[arg(long, default_value_t = 100_000, requires = "sim", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
}

/// Runs it.
///
/// # Errors
/// It cannot be run; or a promise was broken, which has been printed.
pub(crate) fn run(workspace: &Workspace, options: &SoakOptions) -> Result<u8> {
    let seed = match options.seed {
        Some(seed) => seed,
        None => seed::choose()?,
    };
    if options.sim {
        return simulate(seed, options.seeds);
    }
    let programs = workspace.programs();
    let mut words = vec![workspace.own_program().display().to_string(), "guest-soak".to_owned()];
    words.extend([programs.display().to_string(), options.kernel.name().to_owned()]);
    words.extend([options.minutes.to_string(), seed.to_string()]);
    words.extend(options.host.then(|| "--host".to_owned()));
    if let Some(fault) = options.fault.and_then(|fault| fault.to_possible_value()) {
        words.extend(["--fault".to_owned(), fault.get_name().to_owned()]);
    }
    let command = GuestCommand::new(workspace, words)?;
    let series = (!options.host).then_some(options.kernel);
    let deadline = Duration::from_secs(u64::from(options.minutes) * 60) + SLACK;
    programs::build_all(workspace)?;
    let exit_code = anywhere::run(workspace, series, Processors::Two, &command, deadline)?;
    ensure!(exit_code == 0, "the soak failed; --seed {seed} chooses the same faults again");
    Ok(0)
}

/// Runs the simulations of `seeds` seeds.
fn simulate(seed: u64, seeds: u64) -> Result<u8> {
    let dir = std::env::temp_dir().join(format!("volnode-simulator-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let began = Instant::now();
    let outcome = Stage::new(&dir).map(|stage| match seeds {
        1 => {
            let mut coverage = Coverage::told();
            stage.run(seed, None, &mut coverage).map(|()| coverage).map_err(|failure| (seed, failure))
        }
        _ => stage.run_many(seed, seeds),
    });
    std::fs::remove_dir_all(&dir)?;
    match outcome? {
        Ok(coverage) => {
            for (situation, count) in coverage.counts() {
                println!("{count:>12}  {situation}");
            }
            println!("{seeds} simulations in {:.1} s, no promise broken", began.elapsed().as_secs_f64());
            Ok(0)
        }
        Err((seed, failure)) => {
            bail!("{failure}\n`cargo lab soak --sim --seeds 1 --seed {seed}` shows how it comes to that")
        }
    }
}
