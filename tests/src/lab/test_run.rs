//! `cargo lab test`: every phase of it, in order, and which of them run side by side.
//!
//! Set-up and builds, then the host's tests with the machine to themselves, then two lanes of emulated machines at once: a machine
//! of two processors leaves almost half of them idle, waiting for its own time-outs. One lane has the newest kernel, the
//! other all the rest. Called by `commands`; what came of it is `report`'s.

use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use testlab::kernel_series::KernelSeries;
use testlab::selection::{Selection, Shard};

use super::kernels::Kernel;
use super::measurement::BuildBeside;
use super::progress::Step;
use super::report::{PartReport, Report};
use super::vm_tests::{self, Given};
use super::workspace::Workspace;
use super::{cost, host_tests, kernels, packages, systemd_machine, this_machine};
use crate::commands;

/// Options of `cargo lab test`.
#[derive(Args)]
pub(crate) struct TestOptions {
    /// Run only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
    /// Run only the I-th of N shares of the tests, such as 1/3
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Run only this phase; may be given more than once
    #[arg(long, value_enum, value_name = "PHASE", conflicts_with_all = ["kernel", "host"])]
    only: Vec<Phase>,
    /// The kernel to boot, instead of all of them
    #[arg(long, value_enum, conflicts_with = "host")]
    kernel: Option<KernelSeries>,
    /// Run the VM tests on this machine's own kernel and ublk driver
    #[arg(long)]
    host: bool,
    /// Also run the tests that take longer than every run should
    #[arg(long)]
    long: bool,
    /// Show what passing tests print, too
    #[arg(long)]
    show_output: bool,
}

/// A phase of `cargo lab test`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Phase {
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

impl Phase {
    const ALL: [Self; 5] = [Self::Host, Self::V7, Self::V6_12, Self::Systemd, Self::Cost];

    /// The kernel of a phase that runs the VM tests.
    fn series(self) -> Option<KernelSeries> {
        match self {
            Self::V7 => Some(KernelSeries::V7),
            Self::V6_12 => Some(KernelSeries::V6_12),
            _ => None,
        }
    }

    /// True for what runs in an emulated machine.
    fn needs_vm(self) -> bool {
        self != Self::Host
    }
}

impl TestOptions {
    /// The phases that were asked for, in order.
    fn phases(&self) -> Vec<Phase> {
        Phase::ALL.into_iter().filter(|phase| self.wants(*phase)).collect()
    }

    fn wants(&self, phase: Phase) -> bool {
        if self.host {
            return phase == Phase::Host;
        }
        match self.kernel {
            Some(kernel) => phase.series() == Some(kernel),
            None => self.only.is_empty() || self.only.contains(&phase),
        }
    }
}

/// Builds everything and runs the tests; true if all is well.
///
/// # Errors
/// Something cannot be installed or built, or the lab was interrupted. Failing tests are in the report.
pub(crate) fn run(options: &TestOptions) -> Result<bool> {
    let began = Instant::now();
    let workspace = Workspace::locate()?;
    let phases = options.phases();
    let selection = Selection { filter: options.filter.clone(), shard: options.shard, long: options.long };
    let mut report = Report::new(selection.clone());
    let kernels = set_up(&workspace, options, &phases)?;
    report.add_phase("set-up: packages and kernels", began.elapsed());

    let building = Instant::now();
    commands::build(&workspace)?;
    let built = host_tests::build(&workspace)?;
    report.add_phase("building", building.elapsed());

    if phases.contains(&Phase::Host) {
        host_tests::run(&workspace, &built, &vm_tests::TARGETS, &selection, &mut report)?;
    }
    let given = Given {
        workspace: &workspace,
        binaries: &vm_tests::among(&built)?,
        selection: &selection,
        show_output: options.show_output,
    };
    if options.host {
        report.add(vm_tests::run_on_this_machine(&given)?);
    }
    // The machines leave processors idle, and the shipped programs take minutes to build.
    let beside = phases.contains(&Phase::Cost) && phases.len() > 1 && !selection.leaves_out();
    let beside = beside.then(|| cost::build_beside(&workspace)).transpose()?;
    for part in run_lanes(&given, lanes(&phases), &kernels, beside)? {
        report.add(part);
    }
    Ok(report.close(began.elapsed()))
}

/// Makes sure of programs and kernels.
fn set_up(
    workspace: &Workspace,
    options: &TestOptions,
    phases: &[Phase],
) -> Result<Vec<(KernelSeries, Kernel)>> {
    if options.host {
        this_machine::ensure_ublk()?;
    }
    if !phases.iter().any(|phase| phase.needs_vm()) {
        packages::ensure_tools(workspace)?;
    } else {
        packages::ensure_installed(workspace)?;
    }
    let runs_vm_tests = options.host || phases.iter().any(|phase| phase.series().is_some());
    if runs_vm_tests {
        packages::ensure_fsx(workspace)?;
    }
    if phases.contains(&Phase::Systemd) {
        packages::ensure_udev(workspace)?;
    }
    let fetched = |series| Ok((series, kernels::ensure_cached(workspace, series)?));
    phases.iter().filter_map(|phase| phase.series()).map(fetched).collect()
}

/// The phases that need a machine, divided into two lanes of about the same length.
fn lanes(phases: &[Phase]) -> [Vec<Phase>; 2] {
    let machines = phases.iter().copied().filter(|phase| phase.needs_vm());
    let (newest, others) = machines.partition(|phase| *phase == Phase::V7);
    [newest, others]
}

/// Runs both lanes to their ends.
fn run_lanes(
    given: &Given<'_>,
    lanes: [Vec<Phase>; 2],
    kernels: &[(KernelSeries, Kernel)],
    beside: Option<BuildBeside>,
) -> Result<Vec<PartReport>> {
    let mut beside = beside;
    let [first, second] = lanes;
    thread::scope(|scope| {
        let first = scope.spawn(|| run_lane(given, &first, kernels, &mut None));
        let second = run_lane(given, &second, kernels, &mut beside);
        let first = first.join().map_err(|_| anyhow!("a lane panicked"))?;
        let mut parts = first?;
        parts.extend(second?);
        Ok(parts)
    })
}

fn run_lane(
    given: &Given<'_>,
    phases: &[Phase],
    kernels: &[(KernelSeries, Kernel)],
    beside: &mut Option<BuildBeside>,
) -> Result<Vec<PartReport>> {
    let mut parts = Vec::new();
    for phase in phases {
        let part = match phase {
            Phase::Host => None,
            Phase::V7 | Phase::V6_12 => {
                let kernel = kernels.iter().find(|(series, _)| phase.series() == Some(*series));
                let (series, kernel) = kernel.context("a kernel that was not fetched")?;
                Some(vm_tests::run_in_vm(given, *series, kernel)?)
            }
            Phase::Systemd => systemd_machine::test(given.workspace, KernelSeries::V7, given.selection)?,
            Phase::Cost => {
                if let Some(build) = beside.take() {
                    let step = Step::begin("waiting for the build of the programs to measure");
                    build.finish()?;
                    step.end();
                }
                cost::gate::run(given.workspace, given.selection)?
            }
        };
        parts.extend(part);
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_but_the_hosts_is_in_one_lane() {
        let [first, second] = lanes(&Phase::ALL);
        assert_eq!(first, [Phase::V7]);
        assert_eq!(second, [Phase::V6_12, Phase::Systemd, Phase::Cost]);
        assert_eq!(lanes(&[Phase::Host]), [vec![], vec![]]);
    }
}
