//! One run of a load: its command line, and what it says of speed and latency.
//!
//! Called by `mod`. Each load is a process of its own, pinned to the processor that no server uses. A run that fails or hangs
//! is an error, never a number. Sources: `fio(1)` ("JSON output"; latencies are `lat`, from before the submission to after
//! the completion), `nbdcopy(1)`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testlab::nbd_load::{Operation, Order, Outcome};
use testlab::process_resources::ended_children_cpu_s;

use super::plan::{Cell, Driver, Plan};
use super::servers::Server;
use crate::lab::tool;

/// A run that takes longer than this hangs.
const DEADLINE: Duration = Duration::from_secs(120);

/// What a load did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Requests it made, those included that were not measured; of nbdcopy nobody knows.
    pub(super) ios: Option<u64>,
    /// Bytes it moved, in the same way.
    pub(super) bytes: u64,
    /// Requests in a second, measured; 0 where the machine, starved by others, answered none in that time.
    pub(super) iops: Option<f64>,
    /// MiB in a second, measured.
    pub(super) mib_per_s: f64,
    /// Microseconds that half of the requests, and 99 % of them, stayed below.
    pub(super) latency_us: Option<[f64; 2]>,
    /// How many processors it kept busy while it was measured: near 1, its own is the limit.
    pub(super) load_cpus: f64,
}

/// Makes loads.
pub(super) struct Drivers<'a> {
    /// Where `nbd-load` is.
    pub(super) programs: &'a Path,
    /// The processor of every load.
    pub(super) processor: usize,
    /// A file as large as an export, for nbdcopy to write from.
    pub(super) source: &'a Path,
    pub(super) plan: Plan,
}

impl Drivers<'_> {
    /// Loads the server once.
    pub(super) fn run(&self, cell: Cell, server: &Server) -> Result<Run> {
        match cell.driver {
            Driver::NbdLoad => self.nbd_load(cell, server),
            Driver::Fio => self.fio(cell, server),
            Driver::Nbdcopy => self.nbdcopy(cell, server),
        }
    }

    /// Writes every byte of the export and compares it with what is read back.
    pub(super) fn verify(&self, server: &Server, seed: u64) -> Result<()> {
        let mut command = self.generator(server);
        command.args(["--connections", "4", "--depth", "8", "--block-bytes", "65536", "verify"]);
        command.arg(format!("--length-bytes={}", self.plan.size_bytes)).arg(format!("--seed={seed}"));
        tool::output(&mut command, DEADLINE).map(drop)
    }

    fn pinned(&self, program: &Path) -> Command {
        let mut command = tool::command("taskset");
        command.args(["--cpu-list", &self.processor.to_string()]).arg(program);
        command
    }

    fn generator(&self, server: &Server) -> Command {
        let mut command = self.pinned(&self.programs.join("nbd-load"));
        command.arg(server.address().to_string()).args(["--export", server.export()]);
        command
    }

    fn nbd_load(&self, cell: Cell, server: &Server) -> Result<Run> {
        let shape = cell.shape;
        let mut command = self.generator(server);
        command
            .arg(format!("--connections={}", shape.connections()))
            .arg(format!("--depth={}", shape.depth()));
        command.arg(format!("--block-bytes={}", shape.block_bytes()));
        command.arg(if cell.operation == Operation::Read { "read" } else { "write" });
        command.arg(format!("--warm-up-ms={}", self.plan.warm_up.as_millis()));
        command.arg(format!("--runtime-ms={}", self.plan.runtime.as_millis()));
        command.args((shape.order() == Order::Sequential).then_some("--sequential"));
        let cpu_before = ended_children_cpu_s()?;
        let printed = tool::output(&mut command, DEADLINE)?;
        let outcome: Outcome = serde_json::from_slice(&printed).context("nbd-load's JSON")?;
        let (iops, block_bytes) = (outcome.iops(), u64::from(shape.block_bytes()));
        let cpu_of_io_s = (ended_children_cpu_s()? - cpu_before) / outcome.ios_all as f64;
        Ok(Run {
            ios: Some(outcome.ios_all),
            bytes: outcome.ios_all * block_bytes,
            iops: Some(iops),
            mib_per_s: mib(iops * block_bytes as f64),
            latency_us: Some([outcome.p50_us, outcome.p99_us]),
            load_cpus: cpu_of_io_s * iops,
        })
    }

    fn fio(&self, cell: Cell, server: &Server) -> Result<Run> {
        let shape = cell.shape;
        let rw = match (cell.operation, shape.order()) {
            (Operation::Read, Order::Random) => "randread",
            (Operation::Read, Order::Sequential) => "read",
            (Operation::Write, Order::Random) => "randwrite",
            (Operation::Write, Order::Sequential) => "write",
        };
        let mut command = self.pinned(Path::new("fio"));
        command.args([
            "--name=bench",
            "--output-format=json",
            "--ioengine=nbd",
            "--thread",
            "--group_reporting",
        ]);
        command.arg(format!("--uri={}", server.uri())).arg(format!("--rw={rw}"));
        command.arg(format!("--bs={}", shape.block_bytes())).arg(format!("--iodepth={}", shape.depth()));
        command
            .arg(format!("--numjobs={}", shape.connections()))
            .arg(format!("--size={}", self.plan.size_bytes));
        command.arg(format!("--runtime={}ms", self.plan.runtime.as_millis()));
        command.args(["--time_based", "--norandommap", "--lat_percentiles=1", "--clat_percentiles=0"]);
        let printed = tool::output(&mut command, DEADLINE)?;
        // Its nbd engine prints a line about each connection before.
        let json = printed.iter().position(|byte| *byte == b'{').map_or(&[][..], |begin| &printed[begin..]);
        let report: Value = serde_json::from_slice(json).context("fio's JSON")?;
        let side = if cell.operation == Operation::Read { "read" } else { "write" };
        parse_fio(&report["jobs"][0], side, shape.connections())
    }

    /// A copy begins and ends with the process, so that is what is measured.
    fn nbdcopy(&self, cell: Cell, server: &Server) -> Result<Run> {
        let uri = server.uri();
        let source = self.source.display().to_string();
        let (from, to) = match cell.operation {
            Operation::Read => (uri.as_str(), "null:"),
            Operation::Write => (source.as_str(), uri.as_str()),
        };
        let (begun, cpu_before) = (Instant::now(), ended_children_cpu_s()?);
        for _ in 0..self.plan.copies {
            let mut command = self.pinned(Path::new("nbdcopy"));
            // Not `tool`: its polling for the end would be a part of so short a time.
            let status = command.args([from, to]).stdin(Stdio::null()).status().context("taskset")?;
            ensure!(status.success(), "nbdcopy {from} {to}: {status}");
        }
        let (seconds, bytes) =
            (begun.elapsed().as_secs_f64(), u64::from(self.plan.copies) * self.plan.size_bytes);
        Ok(Run {
            ios: None,
            bytes,
            iops: None,
            mib_per_s: mib(bytes as f64 / seconds),
            latency_us: None,
            load_cpus: (ended_children_cpu_s()? - cpu_before) / seconds,
        })
    }
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

/// Reads `side` (`read` or `write`) of the JSON of a group of `jobs` jobs.
fn parse_fio(group: &Value, side: &str, jobs: u32) -> Result<Run> {
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("fio's {what}: {value}"));
    ensure!(group["error"] == 0, "fio: {group}");
    let result = &group[side];
    let percentile = |name: &str| number(&result["lat_ns"]["percentile"][name], name).map(|ns| ns / 1000.0);
    let ios = result["total_ios"].as_u64().unwrap_or(0);
    ensure!(ios > 0, "fio did nothing: {result}");
    Ok(Run {
        ios: Some(ios),
        bytes: result["io_bytes"].as_u64().context("io_bytes")?,
        iops: Some(number(&result["iops"], "iops")?),
        mib_per_s: mib(number(&result["bw_bytes"], "bw_bytes")?),
        latency_us: Some([percentile("50.000000")?, percentile("99.000000")?]),
        // Of a group it is the mean of its jobs.
        load_cpus: (number(&group["usr_cpu"], "usr_cpu")? + number(&group["sys_cpu"], "sys_cpu")?) / 100.0
            * f64::from(jobs),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn group(error: u32) -> Value {
        let latency = json!({ "percentile": { "50.000000": 50_000, "99.000000": 99_000 } });
        let read = json!({ "io_bytes": 8_192_000, "bw_bytes": 8_388_608, "iops": 2048.0, "total_ios": 2000, "lat_ns": latency });
        json!({ "error": error, "usr_cpu": 10.0, "sys_cpu": 12.5, "read": read, "write": { "total_ios": 0 } })
    }

    #[test]
    fn units_are_those_of_the_table() {
        let run = parse_fio(&group(0), "read", 4).unwrap();
        assert_eq!((run.ios, run.bytes, run.iops, run.mib_per_s), (Some(2000), 8_192_000, Some(2048.0), 8.0));
        assert_eq!(run.latency_us, Some([50.0, 99.0]));
        assert!((run.load_cpus - 0.9).abs() < 1e-9);
    }

    #[test]
    fn a_run_that_failed_or_did_nothing_is_an_error() {
        assert!(parse_fio(&group(5), "read", 1).is_err());
        assert!(parse_fio(&group(0), "write", 1).is_err());
    }
}
