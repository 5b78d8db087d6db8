//! `cargo lab systemd`, and a part of `cargo lab test`: a machine that systemd boots and shuts down, with the units of `deploy/` installed as
//! `docs/systemd.md` says, and a storage server on another machine.
//!
//! A boot for the storage server's own unit, in which a client does all there is to be done; one for the playbook of
//! `deploy/ansible` (`--long`); and three for the client's: a volume is made and mounted by its line in fstab; it is there after a reboot, and then the network goes
//! before the machine does; and all is well after that. Each has to power off within a bound. What runs in each boot is in
//! `guest/systemd/`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testlab::kernel_series::KernelSeries;
use testlab::selection::Selection;

use super::anywhere::PassThrough;
use super::guest_command::GuestCommand;
use super::kernels::Kernel;
use super::storage_machine::StorageMachine;
use super::vm::{self, Follower, Processors, Stream};
use super::{kernels, packages};
use crate::lab::progress::Step;
use crate::lab::report::PartReport;
use crate::lab::workspace::Workspace;
use crate::lab::{interrupt, programs};

/// One boot.
struct Boot {
    name: &'static str,
    script: &'static str,
    /// Booting, and what runs there.
    run_max: Duration,
    /// From the end of the script to the machine's.
    power_off_max: Duration,
}

/// Of a boot's script: minutes where the machine is busy.
const RUN_MAX: Duration = Duration::from_secs(600);

/// The sum of the units' bounds is longer; without a network a minute is usual.
const BOOTS: [Boot; 3] = [
    Boot {
        name: "a first boot",
        script: include_str!("guest/systemd/first.sh"),
        run_max: RUN_MAX,
        power_off_max: Duration::from_secs(90),
    },
    Boot {
        name: "a boot with a disk in fstab, and a shutdown without a network",
        script: concat!(include_str!("guest/systemd/rebooted.sh"), include_str!("guest/systemd/second.sh")),
        run_max: RUN_MAX,
        power_off_max: Duration::from_secs(240),
    },
    Boot {
        name: "a boot after that",
        script: concat!(include_str!("guest/systemd/rebooted.sh"), include_str!("guest/systemd/third.sh")),
        run_max: RUN_MAX,
        power_off_max: Duration::from_secs(90),
    },
];

/// The storage server in its unit: a boot of its own, because it needs no other machine.
const SERVER_BOOT: Boot = Boot {
    name: "the storage server in its unit",
    script: concat!(
        "cat > /run/nbd_suite.py << 'NBD_SUITE'\n",
        include_str!("guest/systemd/nbd_suite.py"),
        "\nNBD_SUITE\n",
        include_str!("guest/systemd/server.sh")
    ),
    run_max: RUN_MAX,
    power_off_max: Duration::from_secs(90),
};

/// The playbook of `deploy/ansible`, as `docs/orchestration.md` says.
const PLAYBOOK_BOOT: Boot = Boot {
    name: "a playbook",
    script: include_str!("guest/systemd/ansible.sh"),
    // Four times a playbook, which starts a Python for each of its steps.
    run_max: Duration::from_secs(2400),
    power_off_max: Duration::from_secs(90),
};

/// Where the server in the guest is managed.
const SERVER_SOCKET: &str = "unix:/run/volserver/management.sock";

/// What a test boots; gives what there is to say of it.
type Boots = fn(&Workspace, KernelSeries, &mut dyn Follower) -> Result<String>;

/// By their names in the report.
const TESTS: [(&str, Boots); 3] =
    [("systemd::server_unit", boot_server), ("systemd::three_boots", boot_all), (PLAYBOOK, boot_playbook)];

/// Takes longer than every run should: Ansible in an emulated machine. `--long` has it.
const PLAYBOOK: &str = "systemd::playbook";

/// Boots the machines, and shows what runs there.
///
/// # Errors
/// One cannot be made; or something in it failed, which has been printed, or it did not power off in time.
pub(crate) fn run(workspace: &Workspace, series: KernelSeries) -> Result<()> {
    packages::ensure_installed(workspace)?;
    programs::build_all(workspace)?;
    for (_, boots) in TESTS {
        println!("{}", boots(workspace, series, &mut PassThrough)?);
    }
    Ok(())
}

/// The same as tests of the report, those that are wanted.
///
/// # Errors
/// The lab was interrupted.
pub(crate) fn test(
    workspace: &Workspace,
    series: KernelSeries,
    selection: &Selection,
) -> Result<Option<PartReport>> {
    let runs = |name: &str| selection.wants(name) && (selection.long || name != PLAYBOOK);
    let wanted = TESTS.into_iter().filter(|(name, _)| runs(name));
    let wanted: Vec<_> = wanted.enumerate().filter(|(position, _)| selection.has(*position)).collect();
    if wanted.is_empty() {
        return Ok(None);
    }
    let mut part = PartReport::begin("a machine under systemd").beside_others("systemd");
    for (_, (name, boots)) in wanted {
        let began = Instant::now();
        let mut output = Output::default();
        let outcome = boots(workspace, series, &mut output);
        interrupt::check()?;
        let failure = outcome.as_ref().err().map(|error| format!("{error:#}\n{}", output.tail()));
        part.end(name, began.elapsed().as_secs_f64(), failure.as_deref());
        if let Ok(summary) = outcome {
            part.say(&summary);
        }
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

fn boot_server(workspace: &Workspace, series: KernelSeries, follower: &mut dyn Follower) -> Result<String> {
    packages::ensure_udev(workspace)?;
    let kernel = kernels::ensure_cached(workspace, series)?;
    let mut output = Copied { cases: 0, follower };
    boot(workspace, &kernel, &SERVER_BOOT, SERVER_SOCKET, &mut output)?;
    ensure!(output.cases > 0, "nothing was tried");
    Ok(format!("systemd: the storage server in its unit, {} cases", output.cases))
}

fn boot_playbook(workspace: &Workspace, series: KernelSeries, follower: &mut dyn Follower) -> Result<String> {
    packages::ensure_udev(workspace)?;
    packages::ensure_ansible(workspace)?;
    let kernel = kernels::ensure_cached(workspace, series)?;
    let mut output = Copied { cases: 0, follower };
    boot(workspace, &kernel, &PLAYBOOK_BOOT, SERVER_SOCKET, &mut output)?;
    ensure!(output.cases > 0, "nothing was tried");
    Ok(format!("systemd: the playbook, {} cases", output.cases))
}

/// Counts the cases that the machine tells of.
struct Copied<'a> {
    cases: usize,
    follower: &'a mut dyn Follower,
}

impl Follower for Copied<'_> {
    fn output(&mut self, stream: Stream, bytes: &[u8]) -> Result<()> {
        self.cases += String::from_utf8_lossy(bytes).matches("case: ").count();
        self.follower.output(stream, bytes)
    }
}

fn boot_all(workspace: &Workspace, series: KernelSeries, follower: &mut dyn Follower) -> Result<String> {
    packages::ensure_udev(workspace)?;
    let kernel = kernels::ensure_cached(workspace, series)?;
    let storage_machine = StorageMachine::start(workspace)?;
    let mut power_off_times = Vec::new();
    for one in &BOOTS {
        let power_off_time = boot(workspace, &kernel, one, &storage_machine.management_uri, follower)?;
        power_off_times.push(power_off_time.as_secs_f64());
    }
    Ok(format!(
        "systemd: {} boots, powered off after {power_off_times:.1?} s; nothing was lost and nothing held the machine up",
        BOOTS.len()
    ))
}

/// Boots the machine once; gives how long it took to power off.
fn boot(
    workspace: &Workspace,
    kernel: &Kernel,
    boot: &Boot,
    server: &str,
    follower: &mut dyn Follower,
) -> Result<Duration> {
    let command = GuestCommand::under_systemd(workspace, boot.script, server, boot.power_off_max)?;
    let deadline = boot.run_max + boot.power_off_max;
    let step = Step::begin(&format!("systemd: {}", boot.name));
    let ended =
        vm::run(workspace, kernel, &command, Processors::Two, deadline, follower).context(boot.name)?;
    ensure!(ended.exit_code == 0, "{}: exit code {}", boot.name, ended.exit_code);
    step.end();
    Ok(ended.power_off_time)
}
