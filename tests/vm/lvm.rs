//! Volumes in a thin pool of LVM on the scratch disk: from their making to their end, and what a full pool means.
//!
//! Nothing but LVM's own tools makes the pool, as an administrator would. What is asked of the tools, and what is read of their answers,
//! is in the unit tests of `server/src/backend/lvm/`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::seed;
use testlab::shell::{run, wait_for};
use testlab::storage_node::StorageNode;

use crate::bad_input::exit_code;
use crate::direct;
use crate::fio;
use crate::snapshots::{BLOCK_BYTES, BLOCKS, WRITERS, check_instant, versions, write_blocks};

pub(crate) const TESTS: &[Test] = &[
    Test::new("lvm::a_thin_volume_lives_through_all_that_is_done_to_it", a_thin_volume_lives).within(500),
    Test::new("lvm::a_snapshot_is_one_instant_of_all_queues", a_snapshot_is_one_instant).within(500),
    Test::new("lvm::a_full_pool_fails_writes_and_goes_on_when_it_is_extended", a_full_pool_fails_writes)
        .within(400),
];

pub(crate) const GROUP: &str = "lab-thin";
/// There is no udev here that makes names of devices; no daemon is to stay; and a disk that waits for its server is not to be looked at.
pub(crate) const CONFIG: &str =
    "activation{verify_udev_operations=1 monitoring=0} devices{filter=[\"r|^/dev/ublkb|\"]}";

/// A thin pool on the scratch disk, until it is dropped.
pub(crate) struct ThinPool<'a> {
    disk: &'a Path,
}

impl<'a> ThinPool<'a> {
    /// As `lvcreate` makes it: one that lets writes wait when it is full.
    pub(crate) fn new(disk: &'a Path, data_mib: u32) -> Result<Self> {
        run("modprobe", &["dm-thin-pool"])?;
        let size = format!("{data_mib}M");
        let device = disk.to_str().context("a path in UTF-8")?;
        run("wipefs", &["--quiet", "--all", device])?;
        lvm("vgcreate", &["--yes", GROUP, device])?;
        let pool = Self { disk };
        let kind = ["--yes", "--type", "thin-pool", "--poolmetadatasize", "4M", "--chunksize", "64K"];
        lvm("lvcreate", &[&kind[..], &["--size", &size, "--name", "pool", GROUP]].concat())?;
        ensure!(lvs("pool", "lv_when_full")? == "queue", "a pool waits unless it is told otherwise");
        Ok(pool)
    }
}

impl Drop for ThinPool<'_> {
    fn drop(&mut self) {
        let _ = lvm("vgremove", &["--yes", "--force", GROUP]);
        let _ = run("wipefs", &["--quiet".as_ref(), "--all".as_ref(), self.disk.as_os_str()]);
    }
}

pub(crate) fn lvm(tool: &str, arguments: &[&str]) -> Result<String> {
    run(tool, &[&["--config", CONFIG], arguments].concat())
}

pub(crate) fn lvs(name: &str, what: &str) -> Result<String> {
    let told = lvm("lvs", &["--noheadings", "--options", what, &format!("{GROUP}/{name}")])?;
    Ok(told.trim().to_owned())
}

/// Logical volumes of ours.
pub(crate) fn stored() -> Result<Vec<String>> {
    let told = lvm("lvs", &["--noheadings", "--options", "lv_name", GROUP])?;
    Ok(told.lines().map(|line| line.trim().to_owned()).filter(|name| name.starts_with("volnode-")).collect())
}

pub(crate) fn start(env: &Env) -> Result<StorageNode> {
    let pool = format!("{GROUP}/pool");
    StorageNode::start_with(env, &env.directory.join("data"), &["--lvm", &pool])
}

fn a_thin_volume_lives(env: &Env) -> Result<()> {
    let disk = env.scratch_disk()?;
    let pool = ThinPool::new(disk, 512)?;
    let mut node = start(env)?;
    ensure!(lvs("pool", "lv_when_full")? == "error", "a full pool gives an error");
    let device = node.create_and_attach("vol-1", "64M", &["--backend", "lvm"])?;
    ensure!(node.volctl(&["show", "vol-1"])?.succeeded()?.contains("lvm"), "it is told");
    fio::verify_mostly_small(&device, 32, 16)?;
    let before = direct::random_bytes(4 << 20);
    direct::write(&device, 40 << 20, &before)??;
    node.volctl(&["snapshot", "create", "vol-1", "first"])?.succeeded()?;
    let after = direct::random_bytes(4 << 20);
    direct::write(&device, 40 << 20, &after)??;
    // A clone that is larger than its source, and a clone of that.
    node.volctl(&["clone", "vol-1@first", "copy", "--size", "96M"])?.succeeded()?;
    let copy = node.attach(&["copy"])?;
    ensure!(direct::read(&copy, 40 << 20, before.len())?? == before, "the clone has what was there");
    ensure!(direct::read(&copy, 90 << 20, 4096)?? == vec![0; 4096], "and zeroes behind that");
    direct::write(&copy, 40 << 20, &after)??;
    node.volctl(&["clone", "copy", "copy-2"])?.succeeded()?;
    node.detach("copy")?;
    node.volctl(&["delete", "copy"])?.succeeded()?;
    // It grows while it is attached, and the server is another one then.
    node.volctl(&["resize", "vol-1", "--size", "80M"])?.succeeded()?;
    node.kill_server()?;
    node.start_server()?;
    ensure!(direct::read(&device, 40 << 20, after.len())?? == after, "written after the snapshot");
    node.detach("vol-1")?;
    let device = node.attach(&["vol-1"])?;
    ensure!(run("blockdev", &["--getsize64".as_ref(), device.as_os_str()])?.trim() == (80 << 20).to_string());
    direct::write(&device, 79 << 20, &before[..4096])??;
    node.detach("vol-1")?;
    node.volctl(&["snapshot", "restore", "vol-1", "first"])?.succeeded()?;
    let device = node.attach(&["vol-1"])?;
    ensure!(direct::read(&device, 40 << 20, before.len())?? == before, "restored");
    ensure!(
        direct::read(&device, 79 << 20, 4096)?? == vec![0; 4096],
        "with nothing behind the snapshot's end"
    );
    node.detach("vol-1")?;
    node.volctl(&["snapshot", "delete", "vol-1", "first"])?.succeeded()?;
    for name in ["vol-1", "copy-2"] {
        node.volctl(&["delete", name])?.succeeded()?;
    }
    ensure!(stored()?.is_empty(), "{:?}", stored()?);
    node.kill_server()?;
    drop(pool);
    Ok(())
}

/// Several writers on the disks of two volumes, of several queues, and some snapshots of both: each is one instant of all writers.
fn a_snapshot_is_one_instant(env: &Env) -> Result<()> {
    const SNAPSHOTS: usize = 3;
    const VOLUMES: [&str; 2] = ["vol-1", "vol-2"];
    let pool = ThinPool::new(env.scratch_disk()?, 256)?;
    let mut node = start(env)?;
    let mut devices = Vec::new();
    for name in VOLUMES {
        node.volctl(&["create", name, "--size", "16M", "--backend", "lvm"])?.succeeded()?;
        devices.push(node.attach(&[name, "--queues", "2"])?);
    }
    // Each writer has blocks of its own, wherever it writes them.
    let disk_of = |writer: u64| writer as usize % VOLUMES.len();
    let seed = seed::choose()?;
    let (count, is_over) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicBool::new(false)));
    let writers =
        (0..WRITERS).map(|writer| write_blocks(&devices[disk_of(writer)], writer, seed, &count, &is_over));
    let writers: Vec<_> = writers.collect::<Result<_>>()?;
    let mut calls = Vec::new();
    for number in 0..SNAPSHOTS {
        let (called, began) = (count.load(Ordering::SeqCst), Instant::now());
        node.volctl(&["snapshot", "create", &VOLUMES.join(","), &format!("s{number}")])?.succeeded()?;
        calls.push((called, count.load(Ordering::SeqCst), began.elapsed()));
    }
    is_over.store(true, Ordering::SeqCst);
    let all =
        writers.into_iter().map(|writer| writer.join().expect("a writer")).collect::<Result<Vec<_>>>()?;
    let writes: usize = all.iter().map(Vec::len).sum();
    let took: Vec<Duration> = calls.iter().map(|(.., took)| *took).collect();
    println!(
        "{writes} writes beside {SNAPSHOTS} snapshots of {} volumes, which took {took:?}",
        VOLUMES.len()
    );
    ensure!(writes > SNAPSHOTS, "{writes} writes: they stood still");
    for (number, (called, returned, _)) in calls.iter().enumerate().step_by(2) {
        let mut found = HashMap::new();
        for (disk, name) in VOLUMES.iter().enumerate() {
            let copy = node.attach(&[&format!("{name}@s{number}")])?;
            let bytes = direct::read(&copy, 0, (WRITERS * BLOCKS) as usize * BLOCK_BYTES)??;
            found.extend(versions(&bytes).into_iter().filter(|(block, _)| disk_of(block / BLOCKS) == disk));
            node.detach(&format!("{name}@s{number}"))?;
        }
        check_instant(&all, &found, *called, *returned)
            .with_context(|| format!("snapshot {number}, seed {seed}"))?;
    }
    for name in VOLUMES {
        node.detach(name)?;
        node.volctl(&["delete", name, "--keep-snapshots"])?.succeeded()?;
    }
    ensure!(stored()?.len() == VOLUMES.len() * SNAPSHOTS, "the snapshots are kept: {:?}", stored()?);
    node.kill_server()?;
    drop(pool);
    Ok(())
}

fn a_full_pool_fails_writes(env: &Env) -> Result<()> {
    let pool = ThinPool::new(env.scratch_disk()?, 64)?;
    let mut node = start(env)?;
    let device = node.create_and_attach("vol-1", "256M", &["--backend", "lvm"])?;
    let bytes = direct::random_bytes(4 << 20);
    let mut written = 0;
    let error = loop {
        match direct::write(&device, written, &bytes)? {
            Ok(()) => written += bytes.len() as u64,
            Err(error) => break error,
        }
        ensure!(written < 256 << 20, "the pool holds more than it has");
    };
    ensure!(
        error.raw_os_error() == Some(rustix::io::Errno::NOSPC.raw_os_error()),
        "{error} after {written} bytes"
    );
    ensure!(written >= 48 << 20, "{written} bytes only");
    ensure!(direct::read(&device, written - (4 << 20), bytes.len())?? == bytes, "what was written is there");
    direct::write(&device, 0, &bytes[..4096])?.context("what has its space can be written")?;
    let refused = node.volctl(&["snapshot", "create", "vol-1", "s"])?.failed_with(exit_code::NO_SPACE)?;
    ensure!(refused.contains("full") && refused.contains("lvextend"), "{refused}");
    lvm("lvextend", &["--yes", "--size", "+128M", &format!("{GROUP}/pool")])?;
    // The kernel takes a moment to hand out the new space.
    wait_for("the disk goes on", Duration::from_secs(60), || {
        Ok(direct::write(&device, written, &bytes)?.ok())
    })?;
    ensure!(direct::read(&device, written, bytes.len())?? == bytes);
    node.detach("vol-1")?;
    node.volctl(&["delete", "vol-1"])?.succeeded()?;
    node.kill_server()?;
    drop(pool);
    Ok(())
}
