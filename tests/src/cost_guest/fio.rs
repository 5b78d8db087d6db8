//! The fio jobs of the measurement: prove that a device stores, fill it, and drive one cell.
//!
//! Called by `cost_guest`, inside the machine whose clock counts instructions. A job that hangs is ended by `timeout(1)`.
//! Nothing here polls while fio runs: whatever this process did would count as the device's.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::thread::disable_transparent_huge_pages;
use serde_json::Value;
use testlab::shell::run;

use super::plan::Cell;

/// Bytes of every device.
pub(crate) const SIZE_MIB: u64 = 256;

/// How much of that is used. All of it is written before anything is measured, so that no cell pays for the server's first
/// touch of its memory.
const USED_MIB: u64 = 64;

/// Seconds of the guest for one run of fio; the longest, the filling, takes three.
const DEADLINE_SECONDS: &str = "120";

/// Bytes of random writes that are compared with what was written.
const VERIFIED_MIB: u64 = 32;

/// A device to run jobs on.
pub(crate) struct Target<'a> {
    device: &'a Path,
    /// Where fio's report is put.
    report: PathBuf,
}

impl<'a> Target<'a> {
    /// The jobs' reports go to `directory`. Takes the I/O scheduler away: the same for all devices, whatever each driver
    /// asks for.
    ///
    /// # Errors
    /// The device does not let itself be told.
    pub(crate) fn new(device: &'a Path, directory: &Path) -> Result<Self> {
        let name = device.file_name().context("a device's name")?;
        let scheduler = PathBuf::from("/sys/block").join(name).join("queue/scheduler");
        fs::write(&scheduler, "none").with_context(|| scheduler.display().to_string())?;
        Ok(Self { device, report: directory.join("fio.json") })
    }

    /// Random writes of mixed sizes, read back and compared.
    ///
    /// # Errors
    /// The device does not give back what it was given.
    pub(crate) fn verify(&self) -> Result<()> {
        let size = format!("--size={VERIFIED_MIB}M");
        let verify = ["--rw=randwrite", "--bsrange=4k-512k", "--blockalign=4k", "--iodepth=16", &size];
        let compare = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"];
        let job = self.run(&[&verify[..], &compare[..]].concat())?;
        let read = job["read"]["io_bytes"].as_u64().unwrap_or(0);
        ensure!(read >= VERIFIED_MIB << 20, "only {read} bytes were compared: {job}");
        Ok(())
    }

    /// Writes every byte that is used once.
    ///
    /// # Errors
    /// fio failed.
    pub(crate) fn fill(&self) -> Result<()> {
        let size = format!("--size={USED_MIB}M");
        self.run(&["--rw=write", "--bs=512k", "--iodepth=4", &size]).map(drop)
    }

    /// Does `ios` I/Os of a cell; gives what each took, microseconds of the guest.
    ///
    /// # Errors
    /// fio failed, or did something else.
    pub(crate) fn drive(&self, cell: Cell, ios: u64) -> Result<f64> {
        let options = [
            format!("--rw={}", if cell.reads { "randread" } else { "randwrite" }),
            format!("--bs={}k", cell.block_kib),
            format!("--iodepth={}", cell.depth),
            format!("--size={USED_MIB}M"),
            format!("--io_size={}k", ios * cell.block_kib),
            "--norandommap".to_owned(),
        ];
        let job = self.run(&options.each_ref().map(String::as_str))?;
        let side = &job[if cell.reads { "read" } else { "write" }];
        let done = side["total_ios"].as_u64().context("total_ios")?;
        let runtime_ms = side["runtime"].as_u64().context("runtime")?;
        ensure!(done == ios, "fio did {done} I/Os of {ios}");
        Ok(runtime_ms as f64 * 1000.0 / done as f64)
    }

    /// Runs one job; gives fio's JSON of it.
    fn run(&self, options: &[&str]) -> Result<Value> {
        let filename = format!("--filename={}", self.device.display());
        let output = format!("--output={}", self.report.display());
        let mut arguments = vec!["--signal=KILL", DEADLINE_SECONDS, "fio", "--name=cost", &filename, &output];
        arguments.extend(["--output-format=json", "--ioengine=io_uring", "--direct=1", "--randseed=7"]);
        arguments.extend(options);
        without_huge_pages(|| run("timeout", &arguments))?;
        let report: Value = serde_json::from_slice(&fs::read(&self.report)?).context("fio's JSON")?;
        let job = report["jobs"][0].clone();
        ensure!(job["error"] == 0, "fio: {job}");
        Ok(job)
    }
}

/// Runs a program whose memory is made of small pages. fio's buffers lie, by chance, in one huge page or in 128 small ones,
/// and pinning those costs some 75,000 instructions more for an I/O of 512 KiB. All others keep what they would have.
fn without_huge_pages<T>(program: impl FnOnce() -> Result<T>) -> Result<T> {
    // A child inherits it, through execve(2), too.
    disable_transparent_huge_pages(true).context("PR_SET_THP_DISABLE")?;
    let ended = program();
    disable_transparent_huge_pages(false).context("PR_SET_THP_DISABLE")?;
    ended
}
