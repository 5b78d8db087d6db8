//! A machine that has to write back through the disk to get memory: it goes on, nothing is lost, nobody is killed.
//!
//! The server is on another machine, as it must be: one beside the disk would need the memory that its own disk is to free.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use testlab::disk_statistics::DiskStatistics;
use testlab::harness::{Env, Test};
use testlab::process_resources::number_after;
use testlab::seed;
use testlab::shell::sh;
use testlab::storage_node::StorageNode;

pub(crate) const TESTS: &[Test] =
    &[Test::new("memory_pressure::a_squeezed_machine_writes_back_and_goes_on", a_squeezed_machine)
        .within(400)
        .once()];

/// What is left to everything else when memory is taken.
const LEFT_BYTES: u64 = 160 << 20;

/// How much is taken at a time.
const PIECE_BYTES: usize = 8 << 20;

/// Files that are written at the same time: together more than is left.
const FILES: u64 = 4;
const FILE_BYTES: usize = 64 << 20;

/// What one write of a file's writer has.
const WRITE_BYTES: usize = 1 << 20;

/// From how much on dirty pages are written back, and how much there may be: well within what is left. With the kernel's own limits,
/// which are shares of what is free, it runs out of memory with a local disk as with ours (`docs/reliability.md`).
const DIRTY_BACKGROUND_BYTES: u64 = 32 << 20;
const DIRTY_BYTES: u64 = 64 << 20;

/// Pages that must have been reclaimed, or memory was not short.
const RECLAIMED_PAGES_MIN: u64 = (16 << 20) / 4096;

/// A disk to which nothing was written for so long, while files are, does not go on.
const STANDSTILL_MAX: Duration = Duration::from_secs(20);

fn a_squeezed_machine(env: &Env) -> Result<()> {
    let seed = seed::choose()?;
    let node = StorageNode::start_client_only(env)?;
    let device = node.create_and_attach("squeezed", "512M", &[])?;
    let mount_point = env.directory.join("mnt");
    fs::create_dir(&mount_point)?;
    sh(&format!("mkfs.ext4 -q {}; mount {0} {}", device.display(), mount_point.display()))?;
    let limits = DirtyLimits::set()?;
    // What the kernel enforces follows the limit down only while there are fewer dirty pages: so it has to before memory goes.
    let warm_up = mount_point.join("warm-up");
    write_file(&warm_up, seed)?;
    write_file(&warm_up, seed)?;
    fs::remove_file(&warm_up)?;
    let before = Counters::read()?;
    let outcome = {
        let hog = take_memory()?;
        let outcome = write_files(&mount_point, &device, seed).and_then(|()| check_files(&mount_point, seed));
        drop(hog);
        outcome
    };
    drop(limits);
    outcome?;
    let after = Counters::read()?;
    let reclaimed = after.reclaimed_pages - before.reclaimed_pages;
    let waits = after.direct_reclaims - before.direct_reclaims;
    println!("{reclaimed} pages reclaimed; {waits} allocations had to reclaim themselves");
    ensure!(reclaimed > RECLAIMED_PAGES_MIN, "memory was never short: only {reclaimed} pages were reclaimed");
    ensure!(after.killed == before.killed, "the kernel killed a process for its memory");
    let attachment = node.attachment("squeezed")?;
    ensure!(attachment["state"] == "live" && attachment["reconnects"] == 0, "{attachment}");
    sh(&format!("umount {}", mount_point.display()))?;
    node.detach("squeezed")?;
    node.volctl(&["delete", "squeezed"])?.succeeded().map(drop)
}

/// Takes memory until no more than [`LEFT_BYTES`] are left; there is no swap, so the kernel cannot take it back.
fn take_memory() -> Result<Vec<Vec<u8>>> {
    let mut taken = Vec::new();
    while available_bytes()? > LEFT_BYTES {
        taken.push(vec![1; PIECE_BYTES]);
    }
    println!("{} MiB taken, {} MiB left", (taken.len() * PIECE_BYTES) >> 20, available_bytes()? >> 20);
    Ok(taken)
}

fn available_bytes() -> Result<u64> {
    Ok(number_after(&fs::read_to_string("/proc/meminfo")?, "MemAvailable:")? << 10)
}

/// Writes the files through the page cache, and fails if the disk stands still meanwhile.
fn write_files(directory: &Path, device: &Path, seed: u64) -> Result<()> {
    let is_over = AtomicBool::new(false);
    let began = Instant::now();
    thread::scope(|scope| {
        let writers: Vec<_> = (0..FILES)
            .map(|number| scope.spawn(move || write_file(&directory.join(number.to_string()), seed ^ number)))
            .collect();
        let watch = scope.spawn(|| longest_standstill(device, &is_over));
        let results: Vec<Result<()>> = writers
            .into_iter()
            .map(|writer| writer.join().unwrap_or_else(|_| Err(anyhow!("a writer panicked"))))
            .collect();
        is_over.store(true, Ordering::Relaxed);
        let standstill = watch.join().map_err(|_| anyhow!("the watch panicked"))??;
        let total_mib = (FILES * FILE_BYTES as u64) >> 20;
        println!(
            "{total_mib} MiB written and synced in {:.1?}, the longest standstill was {standstill:.1?}",
            began.elapsed()
        );
        ensure!(standstill < STANDSTILL_MAX, "nothing went on for {standstill:?}");
        results.into_iter().collect()
    })
}

fn write_file(path: &Path, seed: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut piece = vec![0; WRITE_BYTES];
    for _ in 0..FILE_BYTES / WRITE_BYTES {
        random.fill(&mut piece);
        file.write_all(&piece).context("writing")?;
    }
    file.sync_all().context("fsync")
}

/// Until it is over: the longest time in which the disk completed no write.
fn longest_standstill(device: &Path, is_over: &AtomicBool) -> Result<Duration> {
    let writes = || Ok::<u64, anyhow::Error>(DiskStatistics::of(device)?.writes);
    let (mut last, mut since, mut longest) = (writes()?, Instant::now(), Duration::ZERO);
    while !is_over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(100));
        let now = writes()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        longest = longest.max(since.elapsed());
    }
    Ok(longest)
}

/// Reads the files from the disk while memory is still short, and compares every byte.
fn check_files(directory: &Path, seed: u64) -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let began = Instant::now();
    let (mut expected, mut found) = (vec![0; WRITE_BYTES], vec![0; WRITE_BYTES]);
    for number in 0..FILES {
        let mut file = File::open(directory.join(number.to_string()))?;
        let mut random = fastrand::Rng::with_seed(seed ^ number);
        for piece in 0..FILE_BYTES / WRITE_BYTES {
            random.fill(&mut expected);
            file.read_exact(&mut found)?;
            ensure!(found == expected, "file {number} differs in MiB {piece}");
        }
    }
    println!("read back in {:.1?}", began.elapsed());
    Ok(())
}

/// The kernel's limits of dirty pages as this test wants them; as they were when dropped.
struct DirtyLimits {
    before: [String; 2],
}

impl DirtyLimits {
    /// Of what the limits are shares, in per cent.
    const RATIOS: [&str; 2] = ["/proc/sys/vm/dirty_background_ratio", "/proc/sys/vm/dirty_ratio"];

    fn set() -> Result<Self> {
        let [background, all] = Self::RATIOS.map(fs::read_to_string);
        let limits = Self { before: [background?, all?] };
        fs::write("/proc/sys/vm/dirty_background_bytes", DIRTY_BACKGROUND_BYTES.to_string())?;
        fs::write("/proc/sys/vm/dirty_bytes", DIRTY_BYTES.to_string())?;
        Ok(limits)
    }
}

impl Drop for DirtyLimits {
    fn drop(&mut self) {
        for (file, before) in Self::RATIOS.iter().zip(&self.before) {
            // The machine is the test's own.
            let _ = fs::write(file, before);
        }
    }
}

/// What the kernel counted since it booted.
struct Counters {
    reclaimed_pages: u64,
    direct_reclaims: u64,
    killed: u64,
}

impl Counters {
    fn read() -> Result<Self> {
        let text = fs::read_to_string("/proc/vmstat")?;
        // The kernel counts some of them by zone or by cause.
        let sum = |prefix: &str| -> u64 {
            let lines = text.lines().filter_map(|line| line.split_once(' '));
            lines
                .filter(|(name, _)| name.starts_with(prefix))
                .filter_map(|(_, count)| count.parse::<u64>().ok())
                .sum()
        };
        let reclaimed_pages = sum("pgsteal_kswapd") + sum("pgsteal_direct");
        Ok(Self { reclaimed_pages, direct_reclaims: sum("allocstall_"), killed: sum("oom_kill") })
    }
}
