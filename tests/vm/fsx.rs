//! The file system exerciser (`fsx`, which checks every byte it reads) on a file system on a disk whose connections are cut
//! every second.
//!
//! It reads, writes, maps, truncates, punches, copies and syncs one file, each piece over others. Meanwhile everything that
//! is cached is written back and forgotten several times a second, so that much of what it reads comes from the disk.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use testlab::disk_statistics::DiskStatistics;
use testlab::fault_proxy::{Cut, FaultProxy};
use testlab::harness::{Env, Test};
use testlab::seed;
use testlab::shell::run;

use crate::ride_through::{BOUND, node_behind_a_proxy, reconnects, wait_for_state};

pub(crate) const TESTS: &[Test] =
    &[Test::new("fsx::a_cut_every_second_changes_no_byte", a_cut_every_second).within(3600)];

/// Operations, unless [`OPERATIONS_VARIABLE`] says how many.
const OPERATIONS: u64 = 4000;
const OPERATIONS_VARIABLE: &str = "VOLNODE_OPERATIONS";

const CUT_INTERVAL: Duration = Duration::from_secs(1);

/// How often what is cached is written back and forgotten.
const FORGET_INTERVAL: Duration = Duration::from_millis(200);

/// One of so many operations is of each kind; the file is large enough for pieces to be apart, and small enough for them
/// to meet.
const CONFIG: &str = "\
flen = 4194304
[opsize]
max = 131072
[weights]
close_open = 1.0
mapread = 10.0
mapwrite = 10.0
read = 20.0
write = 20.0
truncate = 5.0
fsync = 1.0
fdatasync = 1.0
posix_fallocate = 1.0
punch_hole = 3.0
sendfile = 2.0
posix_fadvise = 2.0
copy_file_range = 3.0
";

fn a_cut_every_second(env: &Env) -> Result<()> {
    let seed = seed::choose()?;
    let operations = match std::env::var(OPERATIONS_VARIABLE) {
        Ok(text) => text.parse().context(OPERATIONS_VARIABLE)?,
        Err(_) => OPERATIONS,
    };
    let (node, proxy) = node_behind_a_proxy(env)?;
    node.volctl(&["create", "vol-1", "--size", "256M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "2", "--connections", "4"])?;
    let mount_point = env.directory.join("mnt");
    fs::create_dir(&mount_point)?;
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()])?;
    run("mount", &["-o".as_ref(), "discard".as_ref(), device.as_os_str(), mount_point.as_os_str()])?;
    let before = DiskStatistics::of(&device)?;
    let began = Instant::now();
    let cuts = exercise_meanwhile(env, &mount_point, operations, seed, &proxy)?;
    let took = began.elapsed();
    let after = DiskStatistics::of(&device)?;
    let reads = after.reads - before.reads;
    println!(
        "{operations} operations in {took:.1?}: {reads} reads, {} writes and {} discards of the disk, {cuts} cuts",
        after.writes - before.writes,
        after.discards - before.discards
    );
    // A slow machine may miss some, but not most.
    ensure!(cuts >= took.as_secs() / 2 && reconnects(&node, "vol-1")? > 0, "only {cuts} cuts in {took:.1?}");
    // On a machine of somebody's the page cache is left alone.
    ensure!(!env.in_vm || reads > operations / 10, "the disk was hardly read");
    let written = fs::read(mount_point.join("file"))?;
    run("umount", &[&mount_point])?;
    wait_for_state(&node, "vol-1", "live", BOUND)?;
    run("e2fsck", &["-fn".as_ref(), device.as_os_str()])?;
    node.detach("vol-1")?;
    // What was written last, fsx may not have read from the disk.
    let device = node.attach(&["vol-1"])?;
    run("mount", &[&device, &mount_point])?;
    ensure!(fs::read(mount_point.join("file"))? == written, "the file is another one after a detach");
    run("umount", &[&mount_point])?;
    node.detach("vol-1")
}

/// Runs fsx to its end with a cut every second; gives how many there were.
fn exercise_meanwhile(
    env: &Env,
    mount_point: &Path,
    operations: u64,
    seed: u64,
    proxy: &FaultProxy,
) -> Result<u64> {
    let config = env.directory.join("fsx.toml");
    fs::write(&config, CONFIG)?;
    let (is_over, cuts) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut next = Instant::now() + CUT_INTERVAL;
            while !is_over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(20));
                if Instant::now() >= next {
                    let number = cuts.fetch_add(1, Ordering::Relaxed);
                    proxy.cut(
                        [Cut::Reset, Cut::Close, Cut::HalfClose][(seed.wrapping_add(number) % 3) as usize],
                    );
                    next += CUT_INTERVAL;
                }
            }
        });
        let forgetting = scope.spawn(|| -> Result<()> {
            let directory = fs::File::open(mount_point)?;
            while !is_over.load(Ordering::Relaxed) {
                rustix::fs::syncfs(&directory)?;
                if env.in_vm {
                    fs::write("/proc/sys/vm/drop_caches", "1")?;
                }
                thread::sleep(FORGET_INTERVAL);
            }
            Ok(())
        });
        let (operations, seed) = (operations.to_string(), (seed as u32).to_string());
        let file = mount_point.join("file");
        let paths =
            ["-f".as_ref(), config.as_os_str(), "-P".as_ref(), env.directory.as_os_str(), file.as_os_str()];
        let options = ["-q", "-N", &operations, "-S", &seed].map(OsStr::new);
        let ended = run("fsx", &[&options[..], &paths[..]].concat());
        is_over.store(true, Ordering::Relaxed);
        forgetting.join().map_err(|_| anyhow!("a thread panicked"))??;
        ended?;
        Ok(cuts.load(Ordering::Relaxed))
    })
}
