//! Puts the VM back into the state a test found it in: mounts, processes and ublk devices the test left are removed.
//!
//! Called by the harness between tests, and only in a VM, where every new process and mount is the test's. It is
//! what keeps one failed test from failing those after it; a test that passes cleans up after itself, and
//! what it does leave is named in its output.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

/// An unmount that takes longer is stuck on a device whose daemon does not answer; killing the daemon frees it.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(20);

/// A killed process takes this long only if the kernel cannot let go of it.
const DEATH_DEADLINE: Duration = Duration::from_secs(20);

/// How often a wait looks.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What the machine looked like before a test.
pub(crate) struct Machine {
    processes: BTreeSet<i32>,
    /// By the kernel's own number: what is mounted over another mount has the same mount point.
    mounts: BTreeMap<u64, String>,
    /// By the number in their names. One outlives its process, and waits for another.
    devices: BTreeSet<u32>,
}

impl Machine {
    /// Looks at the machine as it is.
    pub(crate) fn remember() -> Result<Self> {
        Ok(Self { processes: user_processes()?, mounts: mounts()?, devices: ublk_devices()? })
    }

    /// Undoes what was added since. What cannot be undone is printed: it will show in the next test.
    pub(crate) fn restore(self) {
        let undone =
            self.unmount_new().and_then(|()| self.kill_new()).and_then(|()| self.delete_new_devices());
        if let Err(error) = undone {
            println!("cleaning up after the test: {error:#}");
        }
    }

    fn unmount_new(&self) -> Result<()> {
        // The last mount may be on top of one before it.
        for (_, mount_point) in mounts()?.iter().rev().filter(|(id, _)| !self.mounts.contains_key(id)) {
            println!("left behind: {mount_point} mounted");
            let mut umount =
                Command::new("umount").arg(mount_point).stdin(Stdio::null()).spawn().context("umount")?;
            let ended =
                wait_until(UNMOUNT_DEADLINE, || umount.try_wait().is_ok_and(|status| status.is_some()));
            if !ended {
                println!("umount {mount_point} does not end");
            }
        }
        Ok(())
    }

    fn delete_new_devices(&self) -> Result<()> {
        for dev_id in ublk_devices()?.difference(&self.devices) {
            println!("left behind: ublk device {dev_id}");
            let control = ublk_core::ControlDevice::open()?;
            control.stop_dev(*dev_id)?;
            control.del_dev(*dev_id)?;
        }
        Ok(())
    }

    fn kill_new(&self) -> Result<()> {
        let new =
            || -> Result<Vec<i32>> { Ok(user_processes()?.difference(&self.processes).copied().collect()) };
        for process in new()? {
            let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            println!("left behind: process {process} {}", name.trim_end());
            if let Some(process) = Pid::from_raw(process) {
                // Fails only if it has ended meanwhile.
                let _ = kill_process(process, Signal::KILL);
            }
        }
        if !wait_until(DEATH_DEADLINE, || new().is_ok_and(|rest| rest.is_empty())) {
            println!("cannot be killed: {:?}", new()?);
        }
        Ok(())
    }
}

/// None where the driver is not loaded.
fn ublk_devices() -> Result<BTreeSet<u32>> {
    Ok(ublk_core::control::list_devices()?.into_iter().collect())
}

fn wait_until(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    while !condition() {
        if started.elapsed() > deadline {
            return false;
        }
        thread::sleep(POLL_INTERVAL);
    }
    true
}

/// Every process with memory of its own: not the kernel's threads, not the dead that await their parent.
fn user_processes() -> Result<BTreeSet<i32>> {
    let mut processes = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let Ok(process) = entry?.file_name().to_string_lossy().parse() else { continue };
        let command_line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        if !command_line.is_empty() {
            processes.insert(process);
        }
    }
    Ok(processes)
}

/// What is mounted where in this process's namespace, by mount ID (`proc_pid_mountinfo(5)`).
fn mounts() -> Result<BTreeMap<u64, String>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("reading the mount table")?;
    let mut mounts = BTreeMap::new();
    for line in table.lines() {
        let mut fields = line.split(' ');
        let id = fields.next().and_then(|id| id.parse().ok());
        let mount_point = fields.nth(3);
        if let (Some(id), Some(mount_point)) = (id, mount_point) {
            mounts.insert(id, mount_point.to_owned());
        }
    }
    Ok(mounts)
}
