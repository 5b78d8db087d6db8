//! Snapshots of disks that are written to: what they hold, what becomes of them, and what the writer notices.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testlab::direct_io::{AlignedBuffer, open_direct};
use testlab::harness::{Env, Test};
use testlab::seed;
use testlab::shell::{run, sh};
use testlab::storage_node::StorageNode;

use crate::bad_input::exit_code;
use crate::direct;
use crate::ride_through::{BOUND, wait_for_state};

pub(crate) const TESTS: &[Test] = &[
    Test::new("snapshots::an_ext4_in_use_is_clean_in_a_clone", an_ext4_in_use_is_clean_in_a_clone)
        .within(500),
    Test::new("snapshots::an_xfs_in_use_is_clean_in_a_clone", an_xfs_in_use_is_clean_in_a_clone).within(500),
    Test::new("snapshots::a_snapshot_is_one_instant_of_all_queues", a_snapshot_is_one_instant_of_all_queues)
        .within(500),
    Test::new("snapshots::small_blocks_stay_small", small_blocks_stay_small).within(300),
    Test::new(
        "snapshots::a_snapshot_is_a_disk_of_several_machines",
        a_snapshot_is_a_disk_of_several_machines,
    )
    .within(400),
];

fn an_ext4_in_use_is_clean_in_a_clone(env: &Env) -> Result<()> {
    is_clean_in_a_clone(env, "mkfs.ext4 -q", "mount", "e2fsck -fn")
}

fn an_xfs_in_use_is_clean_in_a_clone(env: &Env) -> Result<()> {
    // The clone has the UUID of the file system that is mounted beside it.
    is_clean_in_a_clone(env, "mkfs.xfs -q", "mount -o nouuid", "xfs_repair -n")
}

/// A file system that is written to is snapshotted, and the snapshot cloned: the clone's journal is replayed, and then it is clean. The
/// snapshot stays as it was, by a byte for byte comparison of two clones.
fn is_clean_in_a_clone(env: &Env, mkfs: &str, mount: &str, fsck: &str) -> Result<()> {
    let node = StorageNode::start_on_xfs(env)?;
    let device = node.create_and_attach("vol-1", "384M", &[])?;
    let (busy, copied) = (env.directory.join("busy"), env.directory.join("copied"));
    fs::create_dir(&busy)?;
    fs::create_dir(&copied)?;
    let (device, at, copy_at) = (device.display(), busy.display(), copied.display());
    sh(&format!("{mkfs} {device}; mount {device} {at}"))?;
    let mut writer = write_files(&busy)?;
    std::thread::sleep(Duration::from_secs(8));
    node.volctl(&["snapshot", "create", "vol-1", "first"])?.succeeded()?;
    ensure!(writer.try_wait()?.is_none(), "the writer ended too early to be in the way");
    node.volctl(&["clone", "vol-1@first", "before"])?.succeeded()?;
    let clone = node.attach(&["before"])?;
    let clone = clone.display();
    sh(&format!("{mount} {clone} {copy_at}; ls -R {copy_at} >&2; umount {copy_at}; {fsck} {clone} >&2"))?;
    let ended = writer.wait()?;
    ensure!(ended.success(), "fio: {ended}");
    sh(&format!("umount {at}; {fsck} {device} >&2"))?;
    node.detach("before")?;
    node.volctl(&["delete", "before"])?.succeeded()?;
    // All that was written since then is not in it.
    for name in ["again", "and-again"] {
        node.volctl(&["clone", "vol-1@first", name])?.succeeded()?;
        direct::write(&node.attach(&["vol-1"])?, 64 << 20, &direct::random_bytes(8 << 20))??;
    }
    let (one, other) = (node.volume_file("again")?, node.volume_file("and-again")?);
    run("cmp", &[&one, &other])?;
    node.detach("vol-1")?;
    let refused = node.volctl(&["delete", "vol-1"])?.failed_with(exit_code::PRECONDITION)?;
    ensure!(refused.contains("snapshot"), "{refused}");
    node.volctl(&["delete", "vol-1", "--keep-snapshots"])?.succeeded()?;
    let kept = node.volctl(&["snapshot", "list", "--output", "json"])?.succeeded()?;
    ensure!(kept.contains("first"), "the snapshot is kept: {kept}");
    Ok(())
}

/// fio in the background, for some time, on files of a mounted file system.
fn write_files(directory: &Path) -> Result<Child> {
    let directory = format!("--directory={}", directory.display());
    let arguments = [
        "--name=busy",
        &directory,
        "--size=24M",
        "--numjobs=2",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--fsync=16",
        "--create_on_open=1",
        "--time_based",
        "--runtime=45",
        "--verify=crc32c",
        "--do_verify=0",
    ];
    Command::new("fio").args(arguments).stdout(Stdio::null()).spawn().context("fio")
}

/// Bytes of one write.
pub(crate) const BLOCK_BYTES: usize = 4096;
/// Blocks that each writer has to itself.
pub(crate) const BLOCKS: u64 = 256;
pub(crate) const WRITERS: u64 = 6;

/// A write that a writer made: when it began and when it was answered, by a count of all of these that goes up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Written {
    block: u64,
    version: u64,
    began: u64,
    answered: u64,
}

/// Writes its own blocks, one at a time, each with a number that goes up, until told to stop.
pub(crate) fn write_blocks(
    device: &Path,
    writer: u64,
    seed: u64,
    count: &Arc<AtomicU64>,
    is_over: &Arc<AtomicBool>,
) -> Result<JoinHandle<Result<Vec<Written>>>> {
    let file = open_direct(device)?;
    let (count, is_over) = (Arc::clone(count), Arc::clone(is_over));
    Ok(std::thread::spawn(move || {
        let mut random = fastrand::Rng::with_seed(seed ^ writer);
        let mut buffer = AlignedBuffer::new(BLOCK_BYTES);
        let mut written = Vec::new();
        for version in 1u64.. {
            if is_over.load(Ordering::SeqCst) {
                break;
            }
            let block = writer * BLOCKS + random.u64(0..BLOCKS);
            buffer.bytes()[..8].copy_from_slice(&version.to_le_bytes());
            let began = count.fetch_add(1, Ordering::SeqCst);
            file.write_all_at(buffer.bytes(), block * BLOCK_BYTES as u64)?;
            let answered = count.fetch_add(1, Ordering::SeqCst);
            written.push(Written { block, version, began, answered });
        }
        Ok(written)
    }))
}

/// Whether a snapshot that was asked for at `called` and was there at `returned` holds what it has to: `found` has the version of each block.
pub(crate) fn check_instant(
    all: &[Vec<Written>],
    found: &HashMap<u64, u64>,
    called: u64,
    returned: u64,
) -> Result<()> {
    let is_in = |write: &Written| found[&write.block] >= write.version;
    let newest =
        all.iter().flatten().filter(|write| is_in(write)).map(|write| write.began).max().unwrap_or(0);
    for write in all.iter().flatten() {
        if is_in(write) {
            ensure!(write.began < returned, "{write:?} began after the snapshot was there, at {returned}");
        } else {
            ensure!(write.answered > called, "{write:?} was answered before the call, at {called}");
            ensure!(
                write.answered > newest,
                "{write:?} is missing, and one that began later, at {newest}, is not"
            );
        }
    }
    Ok(())
}

/// Which version of each block there is.
pub(crate) fn versions(bytes: &[u8]) -> HashMap<u64, u64> {
    let version = |block: u64| {
        let at = block as usize * BLOCK_BYTES;
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    };
    (0..WRITERS * BLOCKS).map(|block| (block, version(block))).collect()
}

/// Several writers on a disk of several queues, and fifty snapshots: each is one instant of all of them.
fn a_snapshot_is_one_instant_of_all_queues(env: &Env) -> Result<()> {
    const SNAPSHOTS: usize = 50;
    let node = StorageNode::start_on_xfs(env)?;
    node.volctl(&["create", "vol-1", "--size", "32M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "2"])?;
    let seed = seed::choose()?;
    let (count, is_over) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicBool::new(false)));
    let writers = (0..WRITERS).map(|writer| write_blocks(&device, writer, seed, &count, &is_over));
    let writers: Vec<_> = writers.collect::<Result<_>>()?;
    let mut calls = Vec::new();
    for number in 0..SNAPSHOTS {
        let called = count.load(Ordering::SeqCst);
        let began = Instant::now();
        node.volctl(&["snapshot", "create", "vol-1", &format!("s{number}")])?.succeeded()?;
        calls.push((called, count.load(Ordering::SeqCst), began.elapsed()));
    }
    is_over.store(true, Ordering::SeqCst);
    let all =
        writers.into_iter().map(|writer| writer.join().expect("a writer")).collect::<Result<Vec<_>>>()?;
    let writes: usize = all.iter().map(Vec::len).sum();
    let longest = calls.iter().map(|(.., took)| *took).max().unwrap_or_default();
    println!("{writes} writes beside {SNAPSHOTS} snapshots, of which the slowest took {longest:?}");
    ensure!(writes > SNAPSHOTS, "{writes} writes: they stood still");
    for (number, (called, returned, _)) in calls.iter().enumerate().step_by(7) {
        node.volctl(&["clone", &format!("vol-1@s{number}"), "copy"])?.succeeded()?;
        let bytes = fs::read(node.volume_file("copy")?)?;
        check_instant(&all, &versions(&bytes), *called, *returned)
            .with_context(|| format!("snapshot {number}, seed {seed}"))?;
        node.volctl(&["delete", "copy"])?.succeeded()?;
    }
    let mut order: Vec<usize> = (0..SNAPSHOTS).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut order);
    for number in order {
        node.volctl(&["snapshot", "delete", "vol-1", &format!("s{number}")])?.succeeded()?;
    }
    node.detach("vol-1")?;
    node.volctl(&["delete", "vol-1"])?.succeeded().map(drop)
}

/// A shared file may ask for larger blocks of direct I/O than it did before; the disk's sectors are what they were.
fn small_blocks_stay_small(env: &Env) -> Result<()> {
    let mut node = StorageNode::start_on_xfs(env)?;
    let device = node.create_and_attach("vol-1", "16M", &["--block-size", "512"])?;
    let mut expected = direct::random_bytes(1 << 20);
    direct::write(&device, 0, &expected)??;
    node.volctl(&["snapshot", "create", "vol-1", "first"])?.succeeded()?;
    node.kill_server()?;
    node.start_server()?;
    for sector in [1, 9, 700] {
        let bytes = direct::random_bytes(512);
        direct::write(&device, sector * 512, &bytes)??;
        let at = sector as usize * 512;
        expected[at..at + 512].copy_from_slice(&bytes);
    }
    ensure!(direct::read(&device, 0, expected.len())?? == expected, "sectors of 512 bytes were lost");
    node.detach("vol-1")?;
    let again = node.attach(&["vol-1"])?;
    ensure!(direct::read(&again, 0, expected.len())?? == expected, "the same, attached again");
    node.detach("vol-1")
}

/// Two disks of one snapshot, on what the server takes for two machines, beside the disk that is written to: they have the snapshot's bytes
/// through kills of the server and of a device process, and it stays while they are there.
fn a_snapshot_is_a_disk_of_several_machines(env: &Env) -> Result<()> {
    let mut node = StorageNode::start_on_xfs(env)?;
    let disk = node.create_and_attach("vol-1", "320M", &[])?;
    let (at, read_at) = (env.directory.join("written"), env.directory.join("read"));
    fs::create_dir(&at)?;
    fs::create_dir(&read_at)?;
    sh(&format!("mkfs.xfs -q {}; mount {} {}", disk.display(), disk.display(), at.display()))?;
    let before = direct::random_bytes(8 << 20);
    fs::write(at.join("file"), &before)?;
    // A disk that cannot be written to has no journal replayed: there is to be nothing in it.
    sh(&format!("fsfreeze --freeze {}", at.display()))?;
    let taken = node.volctl(&["snapshot", "create", "vol-1", "s"]);
    sh(&format!("fsfreeze --unfreeze {}", at.display()))?;
    taken?.succeeded()?;
    let other = node.start_another_client(env, "node-2")?;
    let (first, second) = (node.attach(&["vol-1@s"])?, other.attach(&["vol-1@s"])?);
    ensure!(first != second && first != disk, "{first:?} {second:?} {disk:?}");
    ensure!(node.attach(&["vol-1@s"])? == first, "it is there already");
    ensure!(fs::canonicalize(node.device_dir.join("vol-1@s"))? == first);
    let attachment = node.attachment("vol-1@s")?;
    ensure!(attachment["read_only"] == true && attachment["state"] == "live", "{attachment}");
    let written = direct::write(&first, 0, &[0; BLOCK_BYTES])?;
    ensure!(written.is_err(), "nobody writes to a snapshot");
    fs::write(at.join("file"), direct::random_bytes(8 << 20))?;
    sh("sync")?;
    sh(&format!("mount -o ro,norecovery,nouuid {} {}", first.display(), read_at.display()))?;
    ensure!(fs::read(read_at.join("file"))? == before, "as it was at the instant");

    let whole = format!("cmp -n 67108864 {} {}", first.display(), second.display());
    let reader = Command::new("sh").arg("-ec").arg(format!("{whole}; {whole}")).spawn()?;
    node.kill_server()?;
    std::thread::sleep(Duration::from_secs(2));
    node.start_server()?;
    let pid = node.attachment("vol-1@s")?["pid"].as_i64().context("pid")?;
    sh(&format!("kill -9 {pid}"))?;
    let read = reader.wait_with_output()?;
    ensure!(read.status.success(), "both have the same bytes: {:?}", read.status);
    wait_for_state(&node, "vol-1@s", "live", BOUND)?;
    sh("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(fs::read(read_at.join("file"))? == before, "and has them still");

    let refused = node.volctl(&["snapshot", "delete", "vol-1@s"])?.failed_with(exit_code::PRECONDITION)?;
    ensure!(refused.contains("vol-1@s is attached to") && refused.contains("node-2"), "{refused}");
    let told = node.volctl(&["snapshot", "show", "vol-1@s", "--output", "json"])?.succeeded()?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    let by_uid = format!("@{}", told["snapshot_uid"].as_str().context("snapshot_uid")?.to_uppercase());
    let twice = node.volctl(&["attach", &by_uid])?.failed_with(exit_code::ALREADY_EXISTS)?;
    ensure!(twice.contains("to this machine already, as vol-1@s"), "{twice}");
    sh("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(fs::read(read_at.join("file"))? == before, "the disk is left alone");
    let listed = node.volctl(&["snapshot", "list"])?.succeeded()?;
    ensure!(listed.contains("node-2"), "{listed}");
    let shown = node.volctl(&["snapshot", "show", "vol-1@s"])?.succeeded()?;
    ensure!(shown.matches("multi_node_reader_only").count() == 2, "{shown}");
    let shown = node.volctl(&["show", "vol-1"])?.succeeded()?;
    ensure!(shown.contains("attached snapshot:") && shown.contains("s, to node-"), "{shown}");
    let doctor = node.volctl(&["doctor"])?.succeeded()?;
    ensure!(doctor.contains("2 disks, 1 of them of snapshots"), "{doctor}");
    let in_use = node.volctl(&["detach", "vol-1@s"])?.failed_with(exit_code::PRECONDITION)?;
    ensure!(in_use.contains("mounted on"), "{in_use}");
    run("umount", &[&read_at])?;
    node.detach("vol-1@s")?;
    other.detach("vol-1@s")?;
    node.volctl(&["snapshot", "delete", "vol-1@s"])?.succeeded()?;
    run("umount", &[&at])?;
    node.detach("vol-1")
}
