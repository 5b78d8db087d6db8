//! `cargo lab test`: every phase of it, in order, and which of them run side by side.
//!
//! Set-up and builds, then the host's tests with the machine to themselves, then emulated machines, two at once: one by itself leaves
//! almost half of two processors idle, waiting for its own time-outs. The simulator has what is left all the while. Called by `commands`;
//! what came of it is `report`'s.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use testlab::kernel_series::KernelSeries;
use testlab::selection::{Selection, Shard};

use super::host_tests;
use super::vm_tests::{self, Given};
use crate::lab::interrupt;
use crate::lab::machine::kernels::Kernel;
use crate::lab::machine::{kernels, packages, systemd_machine, this_machine};
use crate::lab::measure::cost;
use crate::lab::programs::{self, BuildBeside};
use crate::lab::progress::Step;
use crate::lab::report::{PartReport, Report};
use crate::lab::workspace::Workspace;

/// Emulated machines at once. Each has two processors, which wait half of the time; more would make waits with deadlines of them.
const LANES: usize = 2;

/// Among how many machines the newest kernel's tests are divided, so that both lanes end at about the same time.
const SHARES_OF_NEWEST: u32 = 3;

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
    programs::build_all(&workspace)?;
    let built = host_tests::build(&workspace)?;
    report.add_phase("building", building.elapsed());

    let plans = match phases.contains(&Phase::Host) {
        true => host_tests::plan(&workspace, &built, &vm_tests::TARGETS, &selection)?,
        false => Vec::new(),
    };
    let given = Given {
        workspace: &workspace,
        binaries: &vm_tests::among(&built)?,
        selection: &selection,
        show_output: options.show_output,
    };
    let parts = thread::scope(|scope| {
        // It computes, and waits for nothing; all others leave processors idle.
        let beside = scope.spawn(|| host_tests::run_beside(&workspace, &plans));
        let mut parts = run_phases(&given, options, &phases, &plans, &kernels)?;
        let step = (!beside.is_finished()).then(|| Step::begin("waiting for what runs beside all others"));
        parts.extend(
            beside.join().map_err(|_| anyhow!("the thread of what runs beside all others panicked"))??,
        );
        step.into_iter().for_each(Step::end);
        Ok::<_, anyhow::Error>(parts)
    })?;
    parts.into_iter().for_each(|part| report.add(part));
    Ok(report.close(began.elapsed()))
}

/// Runs the phases, the host's first and with the machine to itself.
fn run_phases(
    given: &Given<'_>,
    options: &TestOptions,
    phases: &[Phase],
    plans: &[host_tests::Plan<'_>],
    kernels: &[(KernelSeries, Kernel)],
) -> Result<Vec<PartReport>> {
    let mut parts = Vec::new();
    if phases.contains(&Phase::Host) {
        parts.push(host_tests::run(given.workspace, plans, given.selection)?);
    }
    if options.host {
        parts.push(vm_tests::run_on_this_machine(given)?);
    }
    // The machines leave processors idle, and the shipped programs take minutes to build.
    let beside = phases.contains(&Phase::Cost) && phases.len() > 1 && !given.selection.leaves_out();
    let beside = beside.then(|| cost::build_beside(given.workspace)).transpose()?;
    parts.extend(run_jobs(given, &jobs(phases, given.selection), kernels, beside)?);
    Ok(parts)
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
    // What is fetched is fetched before machines run.
    if phases.contains(&Phase::Systemd) || phases.contains(&Phase::Cost) {
        kernels::ensure_cached(workspace, KernelSeries::V7)?;
    }
    let fetched = |series| Ok((series, kernels::ensure_cached(workspace, series)?));
    phases.iter().filter_map(|phase| phase.series()).map(fetched).collect()
}

/// What one emulated machine does, or one after another that have to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Job {
    phase: Phase,
    /// Only this share of the phase's tests.
    share: Option<Shard>,
}

/// The machines, the longest jobs first: whichever lane is free takes the next. The newest kernel has most of the tests, which are
/// divided among several machines, unless only some of them are wanted.
fn jobs(phases: &[Phase], selection: &Selection) -> Vec<Job> {
    let order = [Phase::V7, Phase::V6_12, Phase::Systemd, Phase::Cost];
    let mut jobs = Vec::new();
    for phase in order.into_iter().filter(|phase| phases.contains(phase)) {
        if phase == Phase::V7 && phases.len() > 1 && !selection.leaves_out() {
            jobs.extend(Shard::all(SHARES_OF_NEWEST).map(|share| Job { phase, share: Some(share) }));
        } else {
            jobs.push(Job { phase, share: None });
        }
    }
    jobs
}

/// Runs all jobs, [`LANES`] at once; gives their parts in the order of the jobs.
fn run_jobs(
    given: &Given<'_>,
    jobs: &[Job],
    kernels: &[(KernelSeries, Kernel)],
    beside: Option<BuildBeside>,
) -> Result<Vec<PartReport>> {
    let (next, beside) = (AtomicUsize::new(0), Mutex::new(beside));
    let lane = || {
        let mut parts = Vec::new();
        while let Some((number, job)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|number| Some((number, jobs.get(number)?)))
        {
            // What cannot be run is one part's failure; the others' results are worth as much.
            let part = run_job(given, *job, kernels, &beside).or_else(|error| {
                interrupt::check()?;
                let mut part = PartReport::begin(&format!("{job:?}"));
                part.fail("the machine", &format!("{error:#}"));
                Ok::<_, anyhow::Error>(Some(part.ended()))
            })?;
            parts.extend(part.map(|part| (number, part)));
        }
        Ok(parts)
    };
    let lanes: Vec<Result<Vec<(usize, PartReport)>>> = thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(lane)).collect();
        let joined = lanes.into_iter().map(|lane| lane.join());
        joined.map(|parts| parts.unwrap_or_else(|_| Err(anyhow!("a lane panicked")))).collect()
    });
    let mut parts = Vec::new();
    for lane in lanes {
        parts.extend(lane?);
    }
    parts.sort_by_key(|(number, _)| *number);
    Ok(parts.into_iter().map(|(_, part)| part).collect())
}

fn run_job(
    given: &Given<'_>,
    job: Job,
    kernels: &[(KernelSeries, Kernel)],
    beside: &Mutex<Option<BuildBeside>>,
) -> Result<Option<PartReport>> {
    match job.phase {
        Phase::Host => Ok(None),
        Phase::V7 | Phase::V6_12 => {
            let kernel = kernels.iter().find(|(series, _)| job.phase.series() == Some(*series));
            let (series, kernel) = kernel.context("a kernel that was not fetched")?;
            vm_tests::run_in_vm(given, *series, kernel, job.share).map(Some)
        }
        Phase::Systemd => systemd_machine::test(given.workspace, KernelSeries::V7, given.selection),
        Phase::Cost => {
            let build = beside.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(build) = build {
                let step = Step::begin("waiting for the build of the programs to measure");
                build.finish()?;
                step.end();
            }
            cost::gate::run(given.workspace, given.selection)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernels_tests_are_divided_and_nothing_is_left_out() {
        let jobs_of = |phases: &[Phase], selection: &Selection| -> Vec<(Phase, Option<String>)> {
            let jobs = jobs(phases, selection);
            jobs.into_iter().map(|job| (job.phase, job.share.map(|share| share.to_string()))).collect()
        };
        let all = Selection::default();
        let share = |text: &str| (Phase::V7, Some(text.to_owned()));
        let [sixth, systemd, cost] = [Phase::V6_12, Phase::Systemd, Phase::Cost].map(|phase| (phase, None));
        let everything = [share("1/3"), share("2/3"), share("3/3"), sixth.clone(), systemd, cost];
        assert_eq!(jobs_of(&Phase::ALL, &all), everything);
        assert_eq!(jobs_of(&[Phase::Host], &all), []);
        let filtered = Selection { filter: Some("x".to_owned()), ..Selection::default() };
        assert_eq!(jobs_of(&[Phase::V7, Phase::V6_12], &filtered), [(Phase::V7, None), sixth]);
    }
}
