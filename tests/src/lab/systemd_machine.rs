//! `cargo lab systemd`, and a part of `cargo lab test`: a machine that systemd boots and shuts down, with the units of `deploy/` installed as
//! `docs/systemd.md` says, and a storage server on another machine.
//!
//! Three boots: a volume is made and mounted by its line in fstab; it is there after a reboot, and then the network goes
//! before the machine does; and all is well after that. Each has to power off within a bound. What runs in each boot is in
//! `guest/systemd/`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testlab::kernel_series::KernelSeries;
use testlab::selection::Selection;

use super::guest_command::GuestCommand;
use super::interrupt;
use super::progress::Step;
use super::report::PartReport;
use super::storage_machine::StorageMachine;
use super::vm::{self, Follower, Processors, Stream};
use super::workspace::Workspace;
use super::{kernels, packages};
use crate::commands::{self, PassThrough};

/// One boot.
struct Boot {
    name: &'static str,
    script: &'static str,
    /// From the end of the script to the machine's.
    power_off_max: Duration,
}

/// The sum of the units' bounds is longer; without a network a minute is usual.
const BOOTS: [Boot; 3] = [
    Boot {
        name: "a first boot",
        script: include_str!("guest/systemd/first.sh"),
        power_off_max: Duration::from_secs(90),
    },
    Boot {
        name: "a boot with a disk in fstab, and a shutdown without a network",
        script: concat!(include_str!("guest/systemd/rebooted.sh"), include_str!("guest/systemd/second.sh")),
        power_off_max: Duration::from_secs(240),
    },
    Boot {
        name: "a boot after that",
        script: concat!(include_str!("guest/systemd/rebooted.sh"), include_str!("guest/systemd/third.sh")),
        power_off_max: Duration::from_secs(90),
    },
];

/// Booting, and what runs there.
const BOOT_DEADLINE: Duration = Duration::from_secs(400);

/// The name of all boots together as a test.
const TEST_NAME: &str = "systemd::three_boots";

/// Boots the machine three times, and shows what runs there.
///
/// # Errors
/// It cannot be made; or something in it failed, which has been printed, or it did not power off in time.
pub(crate) fn run(workspace: &Workspace, series: KernelSeries) -> Result<()> {
    packages::ensure_installed(workspace)?;
    commands::build(workspace)?;
    println!("{}", boot_all(workspace, series, &mut PassThrough)?);
    Ok(())
}

/// The same as a test of the report, if it is wanted.
///
/// # Errors
/// The lab was interrupted.
pub(crate) fn test(
    workspace: &Workspace,
    series: KernelSeries,
    selection: &Selection,
) -> Result<Option<PartReport>> {
    if !selection.wants(TEST_NAME) || !selection.has(0) {
        return Ok(None);
    }
    let mut part = PartReport::begin("a machine under systemd").beside_others("systemd");
    let began = Instant::now();
    let mut output = Output::default();
    let outcome = boot_all(workspace, series, &mut output);
    interrupt::check()?;
    let failure = outcome.as_ref().err().map(|error| format!("{error:#}\n{}", output.tail()));
    part.end(TEST_NAME, began.elapsed().as_secs_f64(), failure.as_deref());
    if let Ok(summary) = outcome {
        part.say(&summary);
    }
    Ok(Some(part.ended()))
}

/// What the machine said, to be shown if it fails.
#[derive(Default)]
struct Output(Vec<u8>);

impl Output {
    const LINES_SHOWN: usize = 100;

    fn tail(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(Self::LINES_SHOWN)..].join("\n")
    }
}

impl Follower for Output {
    fn output(&mut self, _: Stream, bytes: &[u8]) -> Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

fn boot_all(workspace: &Workspace, series: KernelSeries, follower: &mut dyn Follower) -> Result<String> {
    packages::ensure_udev(workspace)?;
    let kernel = kernels::ensure_cached(workspace, series)?;
    let storage_machine = StorageMachine::start(workspace)?;
    let mut power_off_times = Vec::new();
    for boot in BOOTS {
        let command = GuestCommand::under_systemd(
            workspace,
            boot.script,
            &storage_machine.management_uri,
            boot.power_off_max,
        )?;
        let deadline = BOOT_DEADLINE + boot.power_off_max;
        let step = Step::begin(&format!("systemd: {}", boot.name));
        let ended =
            vm::run(workspace, &kernel, &command, Processors::Two, deadline, follower).context(boot.name)?;
        ensure!(ended.exit_code == 0, "{}: exit code {}", boot.name, ended.exit_code);
        step.end();
        power_off_times.push(ended.power_off_time.as_secs_f64());
    }
    Ok(format!(
        "systemd: {} boots, powered off after {power_off_times:.1?} s; nothing was lost and nothing held the machine up",
        BOOTS.len()
    ))
}
