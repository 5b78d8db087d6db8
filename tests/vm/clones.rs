//! Two machines that were cloned: one /etc/machine-id, each its own boot, network and mounts. They share the kernel, which knows
//! nothing of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::{ClonedMachine, StorageNode};

use crate::direct;
use crate::ride_through::{BOUND, write_and_sync};

pub(crate) const TESTS: &[Test] =
    &[Test::new("clones::the_machine_that_is_connected_keeps_the_volume", the_machine_that_is_connected)
        .within(300)
        .once()];

/// volctl's exit code for what another machine has.
const ATTACHED_ELSEWHERE: i32 = 5;
const MACHINE_ID: &str = "0123456789abcdef0123456789abcdef";
/// Of the storage server, whom each machine reaches by a network of its own.
const SERVER: &str = "198.18.78.1";

/// Network namespaces of two machines that reach the server, and not each other.
struct Networks;

impl Networks {
    const NAMES: [&str; 2] = ["volnode-one", "volnode-two"];

    fn make() -> Result<Self> {
        sh(&format!("ip addr add {SERVER}/32 dev lo"))?;
        let networks = Self;
        for (number, name) in (1..).zip(Self::NAMES) {
            sh(&format!(
                "ip netns add {name}
                 ip link add vn-near{number} type veth peer name vn-far netns {name}
                 ip addr add 198.18.79.{near}/30 dev vn-near{number}
                 ip link set vn-near{number} up
                 ip -n {name} addr add 198.18.79.{far}/30 dev vn-far
                 ip -n {name} link set vn-far up
                 ip -n {name} link set lo up
                 ip -n {name} route add default via 198.18.79.{near}",
                near = number * 4 + 1,
                far = number * 4 + 2,
            ))?;
        }
        Ok(networks)
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        let commands = Self::NAMES.map(|name| format!("ip netns del {name}"));
        for command in commands.into_iter().chain([format!("ip addr del {SERVER}/32 dev lo")]) {
            if let Err(error) = sh(&command) {
                println!("the network stays: {error:#}");
            }
        }
    }
}

/// One file after another, each flushed, until it is told to end; gives them.
fn write_files(
    directory: &Path,
    is_over: &AtomicBool,
    written: &AtomicU64,
) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut files = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        let (path, bytes) = (directory.join(files.len().to_string()), direct::random_bytes(64 << 10));
        write_and_sync(&path, &bytes)?;
        files.push((path, bytes));
        written.fetch_add(1, Ordering::Relaxed);
    }
    Ok(files)
}

/// Tries to have the volume, over and over, while the other machine writes to it.
fn is_refused(two: &StorageNode, written: &AtomicU64) -> Result<()> {
    for _ in 0..3 {
        let before = written.load(Ordering::Relaxed);
        let started = Instant::now();
        let complaint = two.volctl(&["attach", "vol-1"])?.failed_with(ATTACHED_ELSEWHERE)?;
        println!("refused after {:.1?}", started.elapsed());
        ensure!(complaint.contains("another machine that is called"), "{complaint}");
        ensure!(complaint.contains(MACHINE_ID), "{complaint}");
        wait_for("the first machine to write on", BOUND, || {
            Ok((written.load(Ordering::Relaxed) > before + 2).then_some(()))
        })?;
    }
    // Nothing is left of the attempts.
    ensure!(two.attachment("vol-1").is_err(), "{}", two.attachment("vol-1")?);
    Ok(())
}

fn the_machine_that_is_connected(env: &Env) -> Result<()> {
    let _networks = Networks::make()?;
    let server = StorageNode::start_server_at(env, SERVER)?;
    let machine = |number: u64| ClonedMachine {
        name: Networks::NAMES[number as usize].to_owned(),
        machine_id: MACHINE_ID.to_owned(),
        boot: number,
    };
    let (one, two) = (server.start_clone(env, machine(0))?, server.start_clone(env, machine(1))?);
    server.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let device = one.attach(&["vol-1"])?;
    let held = server.volctl(&["show", "vol-1", "--output", "json"])?.succeeded()?;
    ensure!(held.contains(MACHINE_ID), "the node is not called by its machine id: {held}");
    let mount_point = env.directory.join("mnt");
    fs::create_dir(&mount_point)?;
    sh(&format!(
        "mkfs.ext4 -q {0}; mount -o errors=remount-ro {0} {1}",
        device.display(),
        mount_point.display()
    ))?;

    let (is_over, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let files = thread::scope(|scope| {
        let writer = scope.spawn(|| write_files(&mount_point, &is_over, &written));
        let refused = is_refused(&two, &written);
        is_over.store(true, Ordering::Relaxed);
        let files = writer.join().unwrap_or_else(|_| Err(anyhow!("the writer panicked")));
        refused.and(files)
    })?;
    ensure!(files.len() > 6, "{} files", files.len());
    let attachment = one.attachment("vol-1")?;
    ensure!(attachment["state"] == "live" && attachment["reconnects"] == 0, "{attachment}");

    run("umount", &[&mount_point])?;
    one.detach("vol-1")?;
    let started = Instant::now();
    let device = two.attach(&["vol-1"])?;
    println!("{} files; after the detach attached within {:.1?}", files.len(), started.elapsed());
    ensure!(started.elapsed() < Duration::from_secs(20), "nobody had it: what was waited for?");
    sh(&format!("e2fsck -fn {0}; mount {0} {1}", device.display(), mount_point.display()))?;
    for (path, bytes) in &files {
        ensure!(fs::read(path).context("a file of the other machine")? == *bytes, "{}", path.display());
    }
    run("umount", &[&mount_point])?;
    two.detach("vol-1")
}
