//! One run of fio: its command line, and what its JSON says of speed and latency.
//!
//! Called by `bench_guest`. Owns how a load becomes jobs. A run that hangs is ended by `timeout(1)`; a run with an error
//! is an error, never a number. Source: `fio(1)`, "JSON output"; latencies are fio's `lat`: from before the submission
//! to after the completion.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testlab::shell::run;

use super::Cell;

/// Seconds of the guest for one run; the longest, the filling of a device, takes some ten.
const DEADLINE_SECONDS: &str = "120";

/// fio's names of the percentiles we keep.
const PERCENTILES: [&str; 3] = ["50.000000", "99.000000", "99.900000"];

/// Where fio runs and leaves its report.
pub(super) struct Fio<'a> {
    /// The block device.
    pub(super) device: &'a Path,
    /// A directory of ours.
    pub(super) directory: &'a Path,
    /// The device's size; all of it is used.
    pub(super) size_mib: u64,
}

/// What one run gave.
#[derive(Debug, PartialEq)]
pub(super) struct Outcome {
    /// I/Os that were done.
    pub(super) ios: u64,
    /// Their bytes.
    pub(super) bytes: u64,
    /// I/Os in a second, all jobs together.
    pub(super) iops: f64,
    /// MiB in a second, all jobs together.
    pub(super) mib_per_s: f64,
    /// Latencies in microseconds: median, 99 %, 99.9 %.
    pub(super) latency_us: [f64; 3],
    /// Seconds that the jobs' threads spent in the kernel while they did I/O.
    pub(super) system_cpu_s: f64,
}

impl Fio<'_> {
    /// Measures one cell for `runtime_ms`.
    ///
    /// # Errors
    /// fio failed, or did nothing.
    pub(super) fn measure(&self, cell: &Cell, runtime_ms: u32) -> Result<Outcome> {
        let size = format!("--size={}M", self.size_mib);
        let mut options = vec![
            format!("--rw={}", cell.operation.fio_name()),
            format!("--bs={}k", cell.block_kib),
            format!("--runtime={runtime_ms}ms"),
            size,
        ];
        options.extend(job_options(cell.load));
        options.extend(["--time_based", "--norandommap", "--thread", "--group_reporting"].map(str::to_owned));
        options.extend(["--lat_percentiles=1", "--clat_percentiles=0"].map(str::to_owned));
        let job = self.run(&options.iter().map(String::as_str).collect::<Vec<_>>())?;
        Outcome::parse(&job, cell.operation.json_name())
    }

    /// Random writes of mixed sizes, read back and compared; then every byte is written once, so that no cell pays for a
    /// first touch.
    ///
    /// # Errors
    /// The device does not give back what was written, or fio failed.
    pub(super) fn verify_and_fill(&self, verify_mib: u64) -> Result<()> {
        let size = format!("--size={verify_mib}M");
        let verify = ["--rw=randwrite", "--bsrange=4k-512k", "--blockalign=4k", "--iodepth=16", &size];
        let compare = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"];
        let job = self.run(&[&verify[..], &compare[..]].concat())?;
        let read = job["read"]["io_bytes"].as_u64().unwrap_or(0);
        ensure!(read >= verify_mib << 20, "only {read} bytes were compared: {job}");
        if verify_mib == self.size_mib {
            return Ok(());
        }
        let size = format!("--size={}M", self.size_mib);
        self.run(&["--rw=write", "--bs=512k", "--iodepth=4", &size]).map(drop)
    }

    /// Runs one job or group; gives fio's JSON of it.
    fn run(&self, options: &[&str]) -> Result<Value> {
        let report = self.directory.join("fio.json");
        let filename = format!("--filename={}", self.device.display());
        let output = format!("--output={}", report.display());
        let mut arguments =
            vec!["--signal=KILL", DEADLINE_SECONDS, "fio", "--name=bench", &filename, &output];
        arguments.extend(["--output-format=json", "--ioengine=io_uring", "--direct=1", "--randseed=7"]);
        arguments.extend(options);
        run("timeout", &arguments)?;
        let report: Value = serde_json::from_slice(&fs::read(&report)?).context("fio's JSON")?;
        let job = report["jobs"][0].clone();
        ensure!(job["error"] == 0, "fio: {job}");
        Ok(job)
    }
}

/// A load is the I/Os in flight, for every subject alike: one job for a single I/O; for more, a job on each of the two
/// processors, or a device's second queue would never be used.
fn job_options(load: u32) -> Vec<String> {
    if load < 2 {
        return vec!["--iodepth=1".to_owned()];
    }
    let mut options = vec![format!("--iodepth={}", load / 2)];
    options.extend(["--numjobs=2", "--cpus_allowed=0,1", "--cpus_allowed_policy=split"].map(str::to_owned));
    options
}

impl Outcome {
    /// Reads `side` (`read` or `write`) of a job's JSON.
    fn parse(job: &Value, side: &str) -> Result<Self> {
        let result = &job[side];
        let number = |value: &Value, name: &str| -> Result<f64> {
            value[name].as_f64().with_context(|| format!("fio's JSON lacks {name}: {value}"))
        };
        let percentiles = &result["lat_ns"]["percentile"];
        let mut latency_us = [0.0; 3];
        for (latency, name) in latency_us.iter_mut().zip(PERCENTILES) {
            *latency = number(percentiles, name)? / 1000.0;
        }
        let outcome = Self {
            ios: result["total_ios"].as_u64().context("total_ios")?,
            bytes: result["io_bytes"].as_u64().context("io_bytes")?,
            iops: number(result, "iops")?,
            mib_per_s: number(result, "bw_bytes")? / f64::from(1 << 20),
            latency_us,
            // Per cent of the jobs' run time, which is their sum in milliseconds.
            system_cpu_s: number(job, "sys_cpu")? / 100.0 * number(job, "job_runtime")? / 1000.0,
        };
        ensure!(outcome.ios > 0 && outcome.iops > 0.0, "fio did nothing: {result}");
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn job() -> Value {
        json!({
            "error": 0,
            "job_runtime": 2000,
            "sys_cpu": 25.0,
            "read": {
                "io_bytes": 8_192_000, "bw_bytes": 8_388_608, "iops": 2048.0, "total_ios": 2000,
                "lat_ns": { "percentile": { "50.000000": 1_028_096, "99.000000": 3_063_808, "99.900000": 6_520_832 } }
            },
            "write": { "io_bytes": 0, "bw_bytes": 0, "iops": 0.0, "total_ios": 0, "lat_ns": { "N": 0 } }
        })
    }

    #[test]
    fn units_are_those_of_the_table() {
        let outcome = Outcome::parse(&job(), "read").unwrap();
        assert_eq!((outcome.ios, outcome.bytes), (2000, 8_192_000));
        assert_eq!((outcome.iops, outcome.mib_per_s), (2048.0, 8.0));
        assert_eq!(outcome.latency_us, [1028.096, 3063.808, 6520.832]);
        assert_eq!(outcome.system_cpu_s, 0.5);
    }

    #[test]
    fn a_side_that_did_nothing_is_an_error() {
        assert!(Outcome::parse(&job(), "write").is_err());
    }

    #[test]
    fn jobs_together_keep_the_load_in_flight() {
        assert_eq!(job_options(1), ["--iodepth=1"]);
        for load in [2, 4, 8, 16, 32] {
            let options = job_options(load);
            assert!(options.contains(&"--numjobs=2".to_owned()), "{options:?}");
            assert_eq!(options[0], format!("--iodepth={}", load / 2));
        }
    }
}
