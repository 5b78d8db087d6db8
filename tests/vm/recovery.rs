//! A device outlives its process: another one takes it on, and its users see a pause.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use testlab::harness::{Env, Test};
use testlab::seed;
use testlab::shell::{run, wait_for};
use testlab::storage_node::StorageNode;

use crate::direct;
use crate::fio::verify_mostly_small;
use crate::ride_through::{BOUND, begin_write, end_write, verify_meanwhile, wait_for_state, write_and_sync};

pub(crate) const TESTS: &[Test] = &[
    Test::new("recovery::a_killed_device_process_is_replaced_under_load", a_killed_device_process)
        .within(300),
    Test::new("recovery::a_mounted_file_system_does_not_notice", a_mounted_file_system).within(300),
    Test::new("recovery::with_both_daemons_dead_the_next_one_takes_over", both_daemons).within(300),
    Test::new("recovery::a_device_is_taken_on_without_its_server", without_the_server).within(300),
    Test::new("recovery::what_a_dead_process_was_told_counts_as_unflushed", a_server_that_forgot),
    Test::new("recovery::a_live_upgrade_is_a_pause", a_live_upgrade).within(300),
    Test::new("recovery::what_was_detached_stays_detached", a_detach),
];

/// How often a process is killed in one test.
const KILLS: u64 = 4;

fn pid_of(node: &StorageNode, target: &str) -> Result<u64> {
    node.attachment(target)?["pid"].as_u64().context("pid")
}

/// Kills the device process; gives its pid.
fn kill_device_process(node: &StorageNode, target: &str) -> Result<u64> {
    let pid = pid_of(node, target)?;
    run("kill", &["-9", &pid.to_string()])?;
    Ok(pid)
}

fn wait_for_another_process(node: &StorageNode, target: &str, former: u64) -> Result<()> {
    wait_for("another device process", BOUND, || {
        let attachment = node.attachment(target)?;
        let is_another = attachment["pid"] != former && attachment["pid"] != 0;
        Ok((is_another && attachment["state"] == "live").then_some(()))
    })
}

fn a_killed_device_process(env: &Env) -> Result<()> {
    let mut rng = Rng::with_seed(seed::choose()?);
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    verify_meanwhile(&device, || {
        for _ in 0..KILLS {
            thread::sleep(Duration::from_millis(rng.u64(50..1500)));
            let started = Instant::now();
            let pid = kill_device_process(&node, "vol-1")?;
            wait_for_another_process(&node, "vol-1", pid)?;
            println!("replaced after {:.1?}", started.elapsed());
        }
        Ok(())
    })?;
    ensure!(node.attachment("vol-1")?["device_path"] == device.to_string_lossy().as_ref());
    node.detach("vol-1")?;
    ensure!(!device.exists(), "{} is left behind", device.display());
    Ok(())
}

fn a_mounted_file_system(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let mount_point = env.directory.join("mnt");
    std::fs::create_dir_all(&mount_point)?;
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()])?;
    run("mount", &[device.as_os_str(), mount_point.as_os_str()])?;
    let rounds: Vec<(PathBuf, Vec<u8>)> =
        (0..3).map(|round| (mount_point.join(round.to_string()), direct::random_bytes(2 << 20))).collect();
    for (path, bytes) in &rounds {
        let pid = kill_device_process(&node, "vol-1")?;
        // At once: the writes wait for the next process.
        write_and_sync(path, bytes)?;
        wait_for_another_process(&node, "vol-1", pid)?;
    }
    run("umount", &[mount_point.as_os_str()])?;
    run("e2fsck", &["-fn".as_ref(), device.as_os_str()])?;
    run("mount", &[device.as_os_str(), mount_point.as_os_str()])?;
    for (path, bytes) in &rounds {
        ensure!(std::fs::read(path)? == *bytes, "{} is another one", path.display());
    }
    run("umount", &[mount_point.as_os_str()])?;
    node.detach("vol-1")
}

fn both_daemons(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    verify_mostly_small(&device, 4, 8)?;
    let pid = pid_of(&node, "vol-1")?;
    node.kill_client()?;
    run("kill", &["-9", &pid.to_string()])?;
    let mut waiting = begin_write(&device)?;
    thread::sleep(Duration::from_secs(1));
    ensure!(waiting.try_wait()?.is_none(), "a write without a process did not wait");
    node.start_client()?;
    ensure!(end_write(waiting, BOUND)?.status.success(), "the write failed");
    wait_for_another_process(&node, "vol-1", pid)?;
    ensure!(node.attach(&["vol-1"])? == device, "a second device was made");
    verify_mostly_small(&device, 4, 8)?;
    node.detach("vol-1")
}

fn without_the_server(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    node.kill_server()?;
    let waiting = begin_write(&device)?;
    let former = kill_device_process(&node, "vol-1")?;
    wait_for("another device process", BOUND, || {
        let attachment = node.attachment("vol-1")?;
        let is_another = attachment["pid"] != former && attachment["pid"] != 0;
        Ok((is_another && attachment["state"] == "stalled").then_some(()))
    })?;
    node.start_server()?;
    ensure!(end_write(waiting, BOUND)?.status.success(), "the write failed");
    wait_for_state(&node, "vol-1", "live", BOUND)?;
    verify_mostly_small(&device, 4, 8)?;
    node.detach("vol-1")
}

fn write(device: &Path) -> Result<std::io::Result<()>> {
    direct::write(device, 0, &direct::random_bytes(256 << 10))
}

fn a_server_that_forgot(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "16M", &[])?;
    write(&device)??;
    node.kill_server()?;
    kill_device_process(&node, "vol-1")?;
    node.boot_server_machine(3);
    node.start_server()?;
    // The new process was told nothing, and must not believe that nothing was.
    wait_for_state(&node, "vol-1", "failed", BOUND)?;
    ensure!(write(&device)?.is_err(), "a disk whose server forgot works");
    node.detach("vol-1")
}

fn a_live_upgrade(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let other = node.create_and_attach("vol-2", "16M", &[])?;
    let mut stalls = Vec::new();
    verify_meanwhile(&device, || {
        for _ in 0..KILLS {
            thread::sleep(Duration::from_millis(300));
            let told = node.volctl(&["upgrade", "vol-1", "--output", "json"])?.succeeded()?;
            let told: serde_json::Value = serde_json::from_str(&told)?;
            stalls.push(told[0]["stall_ms"].as_u64().context("stall_ms")?);
        }
        Ok(())
    })?;
    println!("stalls: {stalls:?} ms");
    let (one, two) = (pid_of(&node, "vol-1")?, pid_of(&node, "vol-2")?);
    let told = node.volctl(&["upgrade", "--all"])?.succeeded()?;
    ensure!(told.lines().count() == 2 && told.contains("I/O stood still for"), "{told}");
    ensure!(pid_of(&node, "vol-1")? != one && pid_of(&node, "vol-2")? != two);
    verify_mostly_small(&other, 4, 8)?;
    node.volctl(&["upgrade", "vol-9"])?.failed_with(3)?;
    node.detach("vol-2")?;
    node.detach("vol-1")
}

fn a_detach(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "16M", &[])?;
    kill_device_process(&node, "vol-1")?;
    // Whoever is first, the disk is gone afterwards.
    node.detach("vol-1")?;
    thread::sleep(Duration::from_secs(3));
    ensure!(!device.exists(), "{} came back", device.display());
    ensure!(node.attachment("vol-1").is_err(), "it is attached again");
    Ok(())
}
