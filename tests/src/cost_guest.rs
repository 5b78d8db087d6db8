//! What `cargo lab cost` measures, run inside the machine whose clock counts instructions: fio on one block device
//! after another, each of which first proves that it stores what it is given.
//!
//! Called by `main` as `guest-cost`. Owns the cells (what fio does) and the rows (on what); prints one line of JSON for
//! each row, which `lab::cost` reads. One microsecond of this machine's time is a thousand instructions, whoever executed
//! them: fio, the client, the kernel, the server. Nothing here may therefore poll while fio runs, and a step that hangs
//! is ended by `timeout(1)` inside the guest.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use testlab::harness::Env;
use testlab::kernel_series::KernelSeries;
use testlab::shell::{run, wait_for};
use testlab::storage_node::StorageNode;

/// What a line of ours begins with; the rest of it is a [`Row`].
pub(crate) const ROW_PREFIX: &str = "cost-row ";

/// The rows that the verdict compares.
pub(crate) const FUSED: &str = "volnode, `fused`";
/// See [`FUSED`].
pub(crate) const MAPPED: &str = "volnode, `mapped`";
/// See [`FUSED`].
pub(crate) const KERNEL_NBD: &str = "kernel nbd + nbdkit memory";
const NULL_BLK: &str = "null_blk (fio and block layer alone, stores nothing)";

/// How often each cell is measured; the table has the mean.
pub(crate) const REPETITIONS: usize = 2;

/// Bytes of every device that are used. All of it is written before anything is measured, so that no cell pays for the
/// server's first touch of its memory.
const SIZE_MIB: u64 = 256;

/// Seconds of the guest for one run of fio; the longest, the filling, takes three.
const FIO_DEADLINE_SECONDS: &str = "120";

/// null_blk answers at once: more I/Os make its cells long enough for fio's clock, which counts milliseconds.
const NULL_BLK_FACTOR: u64 = 8;

/// A foreign server that does not listen by then is not coming.
const LISTEN_DEADLINE: Duration = Duration::from_secs(60);

/// What fio does for one number of the table.
pub(crate) struct Cell {
    /// `randread` or `randwrite`.
    rw: &'static str,
    block_kib: u64,
    depth: u32,
    /// I/Os of one measurement: some 300 ms of the guest on the devices that go through TCP.
    ios: u64,
}

/// The columns, first for reads, then for writes.
const SHAPES: [(u64, u32, u64); 5] =
    [(4, 1, 4000), (4, 16, 6000), (128, 1, 1500), (128, 16, 1500), (512, 4, 500)];

impl Cell {
    /// Every column of the table.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        ["randread", "randwrite"].into_iter().flat_map(|rw| {
            SHAPES.into_iter().map(move |(block_kib, depth, ios)| Self { rw, block_kib, depth, ios })
        })
    }

    /// The column's heading: `R 4k/16` is a read of 4 KiB, 16 in flight.
    pub(crate) fn heading(&self) -> String {
        let direction = if self.rw == "randread" { 'R' } else { 'W' };
        format!("{direction} {}k/{}", self.block_kib, self.depth)
    }
}

/// One row of the table.
#[derive(Serialize, Deserialize)]
pub(crate) struct Row {
    /// What was measured.
    pub(crate) name: String,
    /// Thousand instructions per I/O, a mean of [`REPETITIONS`], by column.
    pub(crate) thousands: Vec<f64>,
    /// The largest difference between the repetitions of one cell, in per cent of the mean.
    pub(crate) spread_percent: f64,
}

/// Measures every row, with the product's programs from `programs`.
///
/// # Errors
/// A device cannot be made, does not store what it is given, or fio failed.
pub(crate) fn run_rows(programs: &Path) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("volnode-cost-{}", std::process::id()));
    fs::create_dir(&directory).context("a directory for the measurement")?;
    let env = Env { series: KernelSeries::V7, directory, programs: programs.to_owned(), in_vm: true };
    measure_ours(&env)?;
    measure_kernel_nbd(&env)?;
    measure_null_blk(&env)?;
    fs::remove_dir_all(&env.directory).context("removing the measurement's directory")
}

/// Both data paths, on one memory volume of one server.
fn measure_ours(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let size = format!("{SIZE_MIB}M");
    node.volctl(&["create", "vol-1", "--size", &size, "--backend", "memory"])?.succeeded()?;
    for (name, data_path) in [(FUSED, "fused"), (MAPPED, "mapped")] {
        let device = node.attach(&["vol-1", "--data-path", data_path])?;
        ensure!(node.attachment("vol-1")?["data_path"] == data_path, "not attached over {data_path}");
        measure_verified(env, name, &device)?;
        node.detach("vol-1")?;
    }
    Ok(())
}

/// What the product replaces: the kernel's client and a server that keeps its export in memory, both with their defaults.
fn measure_kernel_nbd(env: &Env) -> Result<()> {
    let size = format!("{SIZE_MIB}M");
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["-f", "-i", "127.0.0.1", "-p", "10999", "memory", &size]).stdin(Stdio::null());
    let server = Server(nbdkit.spawn().context("nbdkit")?);
    wait_for("nbdkit to listen", LISTEN_DEADLINE, || Ok(TcpStream::connect("127.0.0.1:10999").ok()))?;
    run("modprobe", &["nbd"])?;
    run("nbd-client", &["-b", "4096", "127.0.0.1", "10999", "/dev/nbd0"])?;
    let measured = measure_verified(env, KERNEL_NBD, Path::new("/dev/nbd0"));
    run("nbd-client", &["-d", "/dev/nbd0"])?;
    drop(server);
    measured
}

/// What fio and the block layer cost by themselves. There is nothing to verify: it stores nothing.
fn measure_null_blk(env: &Env) -> Result<()> {
    run("modprobe", &["null_blk", "nr_devices=1", "gb=1", "bs=4096", "submit_queues=1"])?;
    measure(env, NULL_BLK, Path::new("/dev/nullb0"), NULL_BLK_FACTOR)
}

/// A foreign server, killed in the end.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only for a child that is gone already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn measure_verified(env: &Env, name: &str, device: &Path) -> Result<()> {
    verify_and_fill(env, device).with_context(|| format!("{name} must store what it is given"))?;
    measure(env, name, device, 1)
}

/// Random writes of mixed sizes, read back and compared; then every byte is written once.
fn verify_and_fill(env: &Env, device: &Path) -> Result<()> {
    let verify = ["--rw=randwrite", "--bsrange=4k-512k", "--blockalign=4k", "--iodepth=16", "--size=32M"];
    let compare = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"];
    let job = fio(env, device, &[&verify[..], &compare[..]].concat())?;
    let read = job["read"]["io_bytes"].as_u64().unwrap_or(0);
    ensure!(read >= 32 << 20, "only {read} bytes were compared: {job}");
    let size = format!("--size={SIZE_MIB}M");
    fio(env, device, &["--rw=write", "--bs=512k", "--iodepth=4", &size]).map(drop)
}

/// Measures every cell and prints the row.
fn measure(env: &Env, name: &str, device: &Path, factor: u64) -> Result<()> {
    without_scheduler(device)?;
    let mut row = Row { name: name.to_owned(), thousands: Vec::new(), spread_percent: 0.0 };
    for cell in Cell::all() {
        let mut samples = Vec::new();
        for _ in 0..REPETITIONS {
            samples.push(measure_cell(env, device, &cell, cell.ios * factor)?);
        }
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let (low, high) = samples.iter().fold((f64::MAX, 0.0_f64), |(l, h), &s| (l.min(s), h.max(s)));
        row.thousands.push(mean);
        row.spread_percent = row.spread_percent.max((high - low) / mean * 100.0);
        eprintln!("{name}, {}: {samples:.1?} thousand instructions per I/O", cell.heading());
    }
    println!("{ROW_PREFIX}{}", serde_json::to_string(&row)?);
    Ok(())
}

/// The same for all devices, whatever scheduler each driver asks for.
fn without_scheduler(device: &Path) -> Result<()> {
    let name = device.file_name().context("a device's name")?;
    let file = PathBuf::from("/sys/block").join(name).join("queue/scheduler");
    fs::write(&file, "none").with_context(|| file.display().to_string())
}

/// Thousand instructions per I/O, which is the guest's microseconds per I/O.
fn measure_cell(env: &Env, device: &Path, cell: &Cell, ios: u64) -> Result<f64> {
    let options = [
        format!("--rw={}", cell.rw),
        format!("--bs={}k", cell.block_kib),
        format!("--iodepth={}", cell.depth),
        format!("--size={SIZE_MIB}M"),
        format!("--io_size={}k", ios * cell.block_kib),
        "--norandommap".to_owned(),
    ];
    let job = fio(env, device, &options.each_ref().map(String::as_str))?;
    let side = &job[if cell.rw == "randread" { "read" } else { "write" }];
    let done = side["total_ios"].as_u64().context("total_ios")?;
    let runtime_ms = side["runtime"].as_u64().context("runtime")?;
    ensure!(done == ios, "fio did {done} I/Os of {ios}");
    ensure!(runtime_ms >= 100, "{runtime_ms} ms are too short for a clock of milliseconds");
    Ok(runtime_ms as f64 * 1000.0 / done as f64)
}

/// Runs one job; gives fio's JSON of it.
fn fio(env: &Env, device: &Path, options: &[&str]) -> Result<Value> {
    let report = env.directory.join("fio.json");
    let filename = format!("--filename={}", device.display());
    let output = format!("--output={}", report.display());
    let mut arguments = vec!["--signal=KILL", FIO_DEADLINE_SECONDS, "fio", "--name=cost", &filename, &output];
    arguments.extend(["--output-format=json", "--ioengine=io_uring", "--direct=1", "--randseed=7"]);
    arguments.extend(options);
    run("timeout", &arguments)?;
    let report: Value = serde_json::from_slice(&fs::read(&report)?).context("fio's JSON")?;
    let job = report["jobs"][0].clone();
    ensure!(job["error"] == 0, "fio: {job}");
    Ok(job)
}
