//! The node daemon in a pod, on a machine without systemd: its disks outlive the pod, and the next pod has them.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::pod::Pod;
use testlab::shell::{run, wait_for};
use testlab::storage_node::StorageNode;

use crate::fio::verify_mostly_small;
use crate::ride_through::{BOUND, verify_meanwhile};

pub(crate) const TESTS: &[Test] = &[
    Test::new("pod::disks_outlive_the_pod_of_their_daemon", outlived).within(300),
    Test::new("pod::without_the_way_out_the_next_pod_takes_disks_on", taken_on).within(300),
    Test::new("pod::a_daemon_that_is_in_no_pod_is_told_so", no_pod).once(),
];

/// Of device processes.
const CGROUP: &str = "/sys/fs/cgroup/volnode-devices";

/// A node whose daemon is in a pod of this number, which sees these directories as well.
fn start_in_pod(env: &Env, node: &mut StorageNode, number: u32, seen: &[&Path]) -> Result<()> {
    let shown: Vec<&Path> = [node.run_dir.as_path()].into_iter().chain(seen.iter().copied()).collect();
    let pod = Pod::new(env.directory.join(format!("daemon-pod-{number}")), &env.programs, &shown)?;
    node.start_client_in(pod)
}

fn pid_of(node: &StorageNode) -> Result<u64> {
    node.attachment("vol-1")?["pid"].as_u64().context("pid")
}

fn start_server(env: &Env) -> Result<StorageNode> {
    let node = StorageNode::start_server_only(env, &env.directory.join("data"), &[])?;
    if env.in_vm {
        run("modprobe", &["ublk_drv"])?;
    }
    Ok(node)
}

/// Nothing of a device process is the pod's: its cgroup, its root, its mounts.
fn has_left(pid: u64, host: &Path, staging: &Path) -> Result<()> {
    let of = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
    let cgroup = of("cgroup")?;
    ensure!(cgroup.trim() == "0::/volnode-devices", "{cgroup}");
    let program = fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(program == Path::new("/usr/local/bin/volclient"), "{}", program.display());
    let mounts = of("mountinfo")?;
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).context("a root")?;
    ensure!(root.contains("/program-"), "its root is not below {}: {root}", host.display());
    ensure!(!mounts.contains("/daemon-pod-") && !mounts.contains("ublkb"), "{mounts}");
    let staging = staging.to_string_lossy();
    ensure!(!mounts.contains(staging.as_ref()), "it holds others' mounts: {mounts}");
    Ok(())
}

fn outlived(env: &Env) -> Result<()> {
    let mut node = start_server(env)?;
    let (host, staging) = (env.directory.join("host"), env.directory.join("staging"));
    node.add_client_options(&["--outlive-pod", &host.to_string_lossy(), "--device-cgroup", CGROUP]);
    // Kubelet's directory, in which file systems on our own disks are mounted while pods see it.
    fs::create_dir(&staging)?;
    run("mount", &["--bind".as_ref(), staging.as_os_str(), staging.as_os_str()])?;
    run("mount", &["--make-shared".as_ref(), staging.as_os_str()])?;
    let seen = [host.as_path(), &staging];
    start_in_pod(env, &mut node, 1, &seen)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let pid = pid_of(&node)?;
    has_left(pid, &host, &staging)?;
    verify_meanwhile(&device, || {
        for number in 2..4 {
            thread::sleep(Duration::from_millis(500));
            node.kill_pod()?;
            // Without a daemon, and without the pod's root, I/O goes on.
            thread::sleep(Duration::from_secs(1));
            start_in_pod(env, &mut node, number, &seen)?;
            ensure!(pid_of(&node)? == pid, "another process has the disk");
        }
        Ok(())
    })?;
    mounted_in_the_pod(&node, &device, &staging, &host)?;
    ensure!(node.attach(&["vol-1"])? == device, "a second device was made");
    node.detach("vol-1")?;
    node.kill_pod()?;
    run("umount", &[&staging])?;
    // Nobody is in it any more.
    Ok(fs::remove_dir(CGROUP)?)
}

/// A file system on the disk itself is mounted where the pod sees it: neither the end of a device process nor that of the pod waits
/// for it, and nothing keeps it from being unmounted.
fn mounted_in_the_pod(node: &StorageNode, device: &Path, staging: &Path, host: &Path) -> Result<()> {
    let mount_point: PathBuf = staging.join("vol-1");
    fs::create_dir(&mount_point)?;
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()])?;
    run("mount", &[device.as_os_str(), mount_point.as_os_str()])?;
    for way in ["upgrade", "kill"] {
        fs::write(mount_point.join(way), way)?;
        let former = pid_of(node)?;
        if way == "upgrade" {
            node.volctl(&["upgrade", "vol-1"])?.succeeded()?;
        } else {
            run("kill", &["-9", &former.to_string()])?;
        }
        wait_for("another device process", BOUND, || {
            let attachment = node.attachment("vol-1")?;
            let is_another = attachment["pid"] != former && attachment["pid"] != 0;
            Ok((is_another && attachment["state"] == "live").then_some(()))
        })?;
        has_left(pid_of(node)?, host, &mount_point)?;
        run("sync", &["-f".as_ref(), mount_point.as_os_str()])?;
    }
    run("umount", &[&mount_point])?;
    run("e2fsck", &["-fn".as_ref(), device.as_os_str()])?;
    Ok(())
}

/// The net beneath: the device process ends with its pod, I/O waits, and the next pod's daemon has another one take the disk on.
fn taken_on(env: &Env) -> Result<()> {
    let mut node = start_server(env)?;
    start_in_pod(env, &mut node, 1, &[])?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let pid = pid_of(&node)?;
    verify_meanwhile(&device, || {
        thread::sleep(Duration::from_millis(500));
        node.kill_pod()?;
        ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "it outlived its pod");
        start_in_pod(env, &mut node, 2, &[])?;
        wait_for("another device process", BOUND, || {
            let attachment = node.attachment("vol-1")?;
            let is_another = attachment["pid"] != pid && attachment["pid"] != 0;
            Ok((is_another && attachment["state"] == "live").then_some(()))
        })
    })?;
    verify_mostly_small(&device, 2, 8)?;
    node.detach("vol-1")?;
    node.kill_pod()
}

fn no_pod(env: &Env) -> Result<()> {
    let node = start_server(env)?;
    // In the mount namespace of process 1, in which the tests may not be.
    let mut serve = std::process::Command::new("nsenter");
    serve.args(["--target", "1", "--mount", "--"]).arg(env.program("volclient"));
    serve.args(["serve", "--server", &node.management_uri, "--run-dir"]).arg(&node.run_dir);
    let output = serve.arg("--outlive-pod").arg(env.directory.join("host")).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("needs hostPID: true"), "{said}");
    Ok(())
}
