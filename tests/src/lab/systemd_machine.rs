//! `cargo lab systemd`: a machine that systemd boots and shuts down, with the units of `deploy/` installed as
//! `docs/systemd.md` says, and a storage server on another machine.
//!
//! Three boots: a volume is made and mounted by its line in fstab; it is there after a reboot, and then the network goes
//! before the machine does; and all is well after that. Each has to power off within a bound. What runs in each boot is in
//! `guest/systemd/`.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testlab::kernel_series::KernelSeries;

use super::guest_command::GuestCommand;
use super::storage_machine::StorageMachine;
use super::vm::{self, Processors};
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

/// Boots the machine three times.
///
/// # Errors
/// It cannot be made; or something in it failed, which has been printed, or it did not power off in time.
pub(crate) fn run(workspace: &Workspace, series: KernelSeries) -> Result<()> {
    packages::ensure_installed(workspace)?;
    packages::ensure_udev(workspace)?;
    commands::build(workspace)?;
    let kernel = kernels::ensure_cached(workspace, series)?;
    let storage_machine = StorageMachine::start(workspace)?;
    for boot in BOOTS {
        println!("== {} ==", boot.name);
        let command = GuestCommand::under_systemd(
            workspace,
            boot.script,
            &storage_machine.management_uri,
            boot.power_off_max,
        )?;
        let deadline = BOOT_DEADLINE + boot.power_off_max;
        let ended = vm::run(workspace, &kernel, &command, Processors::Two, deadline, &mut PassThrough)
            .context(boot.name)?;
        ensure!(ended.exit_code == 0, "{}: exit code {}", boot.name, ended.exit_code);
        println!("powered off after {:.1} s", ended.power_off_time.as_secs_f64());
    }
    println!("systemd: {} boots, nothing was lost and nothing held the machine up", BOOTS.len());
    Ok(())
}
