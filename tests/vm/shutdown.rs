//! What a shutdown does to disks, whatever their server does: the stop commands of the units in `deploy/`, in the order in which
//! systemd runs them, each within the bound that its unit gives it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::{run, wait_for};
use testlab::storage_node::StorageNode;
use testlab::unit_file::UnitFile;

use crate::direct;
use crate::ride_through::BOUND;

pub(crate) const TESTS: &[Test] = &[
    Test::new("shutdown::nothing_is_lost_while_the_server_is_there", with_a_server).once(),
    Test::new("shutdown::a_server_that_stands_still_holds_nothing_up", with_a_frozen_server)
        .within(300)
        .once(),
    Test::new("shutdown::a_server_that_is_gone_holds_nothing_up", without_a_server).within(300).once(),
];

/// systemd's own for a mount unit (`DefaultTimeoutStopSec`).
const UNMOUNT_BOUND: Duration = Duration::from_secs(90);

/// Runs what a unit's stop runs; gives its exit code. Longer than the unit allows is a failure.
fn stop(unit: &str, instance: &str, node: &StorageNode) -> Result<i32> {
    let unit_file = UnitFile::read(unit)?;
    let (bound, started) = (unit_file.timeout_stop()?, Instant::now());
    let mut last = 0;
    for mut command in unit_file.commands("ExecStop", instance, node)? {
        let mut child = command.stdin(Stdio::null()).spawn().context(unit.to_owned())?;
        let left = bound.saturating_sub(started.elapsed());
        let ended = wait_for(&format!("the stop of {unit}"), left, || Ok(child.try_wait()?));
        if ended.is_err() {
            child.kill()?;
        }
        last = ended?.code().with_context(|| format!("{unit}: killed"))?;
    }
    println!("{unit} {instance}: exit code {last} after {:.1?} of {bound:?}", started.elapsed());
    Ok(last)
}

/// Starts a volume's unit; gives the disk.
fn start_disk(node: &StorageNode, volume: &str) -> Result<PathBuf> {
    node.volctl(&["create", volume, "--size", "64M"])?.succeeded()?;
    for mut command in UnitFile::read("volnode-attach@.service")?.commands("ExecStart", volume, node)? {
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status()?;
        ensure!(status.success(), "{status}");
    }
    Ok(PathBuf::from(node.attachment(volume)?["device_path"].as_str().context("device_path")?))
}

/// A new ext4 with dirty pages; gives what its file has.
fn mount_dirty(device: &Path, mount_point: &Path) -> Result<Vec<u8>> {
    std::fs::create_dir_all(mount_point)?;
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()])?;
    run("mount", &[device.as_os_str(), mount_point.as_os_str()])?;
    let bytes = direct::random_bytes(100 << 16);
    std::fs::write(mount_point.join("file"), &bytes)?;
    Ok(bytes)
}

/// Somebody who has the disk open and waits in the kernel for a read.
fn opener_in_d_state(device: &Path) -> Result<Child> {
    let reader = Command::new("dd")
        .arg(format!("if={}", device.display()))
        .args(["of=/dev/null", "bs=4k", "count=1", "skip=9000", "iflag=direct"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    wait_for("a reader in uninterruptible sleep", BOUND, || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", reader.id()))?;
        Ok(stat.contains(") D ").then_some(()))
    })?;
    Ok(reader)
}

fn is_mounted(mount_point: &Path) -> Result<bool> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.contains(&format!(" {} ", mount_point.display())))
}

fn pid_of(node: &StorageNode, target: &str) -> Result<u64> {
    node.attachment(target)?["pid"].as_u64().context("pid")
}

/// Gone, or dead and process 1's: when that takes the exit status of what has lost its parent is not ours to say
/// (`proc_pid_stat(5)`).
fn has_ended(pid: u64) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z 1 "))
}

fn is_nothing_left(pids: &[u64], devices: &[PathBuf]) -> Result<()> {
    for pid in pids {
        ensure!(has_ended(*pid), "device process {pid} is left behind");
    }
    for device in devices {
        ensure!(!device.exists(), "{} is left behind", device.display());
    }
    let disks = ublk_core::control::list_devices()?;
    ensure!(disks.is_empty(), "ublk devices {disks:?} are left behind");
    Ok(())
}

/// A disk that a unit attached, mounted as from fstab; another that was attached and mounted by hand, which no unit unmounts.
fn with_a_server(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let by_unit = start_disk(&node, "vol-1")?;
    let by_hand = node.create_and_attach("vol-2", "64M", &[])?;
    let (in_fstab, not_in_fstab) = (env.directory.join("one"), env.directory.join("two"));
    let (first, second) = (mount_dirty(&by_unit, &in_fstab)?, mount_dirty(&by_hand, &not_in_fstab)?);
    let pids = [pid_of(&node, "vol-1")?, pid_of(&node, "vol-2")?];
    ensure!(stop("volnode-stall-limit.service", "", &node)? == 0);
    ensure!(stop("volnode-attach@.service", "vol-1", &node)? == 5, "a disk that is mounted was taken away");
    run("umount", &[in_fstab.as_os_str()])?;
    ensure!(stop("volnode-attach@.service", "vol-1", &node)? == 0);
    let took = node.end_client(UnitFile::read("volclient.service")?.timeout_stop()?)?;
    println!("volclient: {took:.1?}");
    ensure!(Path::new(&format!("/proc/{}", pids[1])).exists(), "the disk did not outlive the daemon");
    ensure!(stop("volnode-shutdown.service", "", &node)? == 0);
    ensure!(!is_mounted(&not_in_fstab)?, "a file system is left mounted");
    is_nothing_left(&pids, &[by_unit, by_hand])?;
    node.start_client()?;
    for (name, mount_point, bytes) in [("vol-1", &in_fstab, first), ("vol-2", &not_in_fstab, second)] {
        let device = node.attach(&[name])?;
        run("e2fsck", &["-fn".as_ref(), device.as_os_str()])?;
        run("mount", &[device.as_os_str(), mount_point.as_os_str()])?;
        ensure!(std::fs::read(mount_point.join("file"))? == bytes, "{name}: the file is another one");
        run("umount", &[mount_point.as_os_str()])?;
        node.detach(name)?;
    }
    Ok(())
}

fn with_a_frozen_server(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    go_down(env, &mut node, |node| node.freeze_server())?;
    // A stopped process would not hear that it is to end.
    node.kill_server()
}

fn without_a_server(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    go_down(env, &mut node, StorageNode::kill_server)
}

fn go_down(
    env: &Env,
    node: &mut StorageNode,
    lose_server: impl FnOnce(&mut StorageNode) -> Result<()>,
) -> Result<()> {
    let by_unit = start_disk(node, "vol-1")?;
    let by_hand = node.create_and_attach("vol-2", "64M", &[])?;
    let (in_fstab, not_in_fstab) = (env.directory.join("one"), env.directory.join("two"));
    mount_dirty(&by_unit, &in_fstab)?;
    mount_dirty(&by_hand, &not_in_fstab)?;
    let pids = [pid_of(node, "vol-1")?, pid_of(node, "vol-2")?];
    let (mut watcher, _lines) = node.volctl_lines(&["events", "--follow"])?;
    lose_server(node)?;
    let mut readers = [opener_in_d_state(&by_unit)?, opener_in_d_state(&by_hand)?];
    ensure!(stop("volnode-stall-limit.service", "", node)? == 0);
    // The mount unit's part. What could not be written is lost, as without any server it must be.
    let started = Instant::now();
    let mut umount = Command::new("umount").arg(&in_fstab).stdin(Stdio::null()).spawn()?;
    wait_for("umount", UNMOUNT_BOUND, || Ok(umount.try_wait()?))?;
    println!("umount: {:.1?}", started.elapsed());
    ensure!(!is_mounted(&in_fstab)?, "it is still mounted");
    // 6: the disk is gone, and the server could not be told.
    let stopped = stop("volnode-attach@.service", "vol-1", node)?;
    ensure!([0, 1, 6].contains(&stopped), "exit code {stopped}");
    let took = node.end_client(UnitFile::read("volclient.service")?.timeout_stop()?)?;
    println!("volclient: {took:.1?}");
    watcher.wait()?;
    ensure!(Path::new(&format!("/proc/{}", pids[1])).exists(), "the disk did not outlive the daemon");
    ensure!(stop("volnode-shutdown.service", "", node)? == 0);
    for reader in &mut readers {
        let status = wait_for("a reader to end", BOUND, || Ok(reader.try_wait()?))?;
        ensure!(!status.success(), "a read of a disk that is gone succeeded");
    }
    ensure!(!is_mounted(&not_in_fstab)?, "a file system is left mounted");
    is_nothing_left(&pids, &[by_unit, by_hand])
}
