//! One node with a growing number of attachments, each of a memory volume of its own, and fio on all of them at once.
//!
//! Called by `scale_guest`. Owns the storage server and the node daemon, which end with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testlab::harness::Env;
use testlab::shell::run;
use testlab::storage_node::StorageNode;

use super::Load;

/// Bytes of each volume, as volctl takes them; 64 of them fit into the guest's memory.
const VOLUME_SIZE: &str = "16M";
/// Bytes of each volume that fio verifies.
const VERIFIED_KIB: u64 = 2048;
/// Bytes of each volume that are driven; all of them were written, so that no I/O pays for a first touch.
const DRIVEN_MIB: u64 = 8;
/// Seconds of the guest for one run of fio on every attachment.
const FIO_DEADLINE_SECONDS: &str = "300";
/// fio's clock counts milliseconds: a measurement has enough of them that one is half a per cent at most.
const RUNTIME_MIN_MS: u64 = 200;

/// The attachments of one node.
pub(super) struct Attachments {
    node: StorageNode,
    report: PathBuf,
    devices: Vec<PathBuf>,
    /// How many of the devices, from the first on, were written.
    filled: usize,
    devices_before: BTreeSet<String>,
}

impl Attachments {
    /// A node with none.
    pub(super) fn start(env: &Env) -> Result<Self> {
        let node = StorageNode::start(env)?;
        let report = env.directory.join("fio.json");
        Ok(Self { node, report, devices: Vec::new(), filled: 0, devices_before: ublk_devices()? })
    }

    /// Attaches until there are `count`.
    pub(super) fn grow_to(&mut self, count: usize) -> Result<()> {
        for index in self.devices.len()..count {
            let name = name_of(index);
            let device = self.node.create_and_attach(&name, VOLUME_SIZE, &["--backend", "memory"])?;
            let scheduler = format!("/sys/block/{}/queue/scheduler", file_name(&device)?);
            fs::write(&scheduler, "none").context(scheduler)?;
            self.devices.push(device);
        }
        Ok(())
    }

    /// Writes all that is driven of each device, in large requests, unless it was done.
    pub(super) fn fill(&mut self) -> Result<()> {
        for device in &self.devices[self.filled..] {
            let of = format!("of={}", device.display());
            let count = format!("count={DRIVEN_MIB}");
            run("dd", &["if=/dev/zero", &of, "bs=1M", &count, "oflag=direct", "status=none"])?;
        }
        self.filled = self.devices.len();
        Ok(())
    }

    /// Queues and connections of each attachment.
    pub(super) fn shape(&self) -> Result<(u64, u64)> {
        let attachment = self.node.attachment(&name_of(0))?;
        let number = |name: &str| attachment[name].as_u64().with_context(|| attachment.to_string());
        Ok((number("nr_hw_queues")?, number("nr_connections")?))
    }

    /// The device processes.
    pub(super) fn pids(&self) -> Result<Vec<u32>> {
        let all = self.node.volctl(&["attachments", "--output", "json"])?.succeeded()?;
        let all: Value = serde_json::from_str(&all).context("volctl's JSON")?;
        let pid = |attachment: &Value| {
            let pid = attachment["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            pid.with_context(|| attachment.to_string())
        };
        all.as_array().context("volctl's JSON")?.iter().map(pid).collect()
    }

    /// Random writes of mixed sizes on every device at once, read back and compared; gives how many bytes were.
    pub(super) fn verify(&self) -> Result<u64> {
        let size = format!("--size={VERIFIED_KIB}k");
        let options =
            ["--thread", "--rw=randwrite", "--bsrange=4k-128k", "--blockalign=4k", "--iodepth=8", &size];
        let compare = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"];
        let mut arguments: Vec<String> =
            [&options[..], &compare[..]].concat().iter().map(ToString::to_string).collect();
        for (index, device) in self.devices.iter().enumerate() {
            arguments.push(format!("--name=verify-{index}"));
            arguments.push(format!("--filename={}", device.display()));
        }
        let jobs = self.fio(&arguments)?;
        ensure!(jobs.len() == self.devices.len(), "fio ran {} jobs", jobs.len());
        let mut verified_bytes = 0;
        for job in &jobs {
            let read = job["read"]["io_bytes"].as_u64().unwrap_or(0);
            ensure!(job["error"] == 0 && read >= VERIFIED_KIB << 10, "{read} bytes were compared: {job}");
            verified_bytes += read;
        }
        Ok(verified_bytes)
    }

    /// Thousand instructions per I/O, which is the guest's microseconds per I/O. One thread of fio serves all devices in
    /// turn, so that what fio costs does not grow with them.
    pub(super) fn drive(&self, load: &Load) -> Result<f64> {
        let names: Vec<String> = self.devices.iter().map(|device| device.display().to_string()).collect();
        let devices = self.devices.len();
        let arguments = [
            "--name=drive".to_owned(),
            format!("--filename={}", names.join(":")),
            "--file_service_type=roundrobin:1".to_owned(),
            format!("--rw={}", load.rw),
            format!("--bs={}k", load.block_kib),
            format!("--iodepth={}", load.depth_each * devices),
            format!("--filesize={DRIVEN_MIB}M"),
            format!("--size={}M", DRIVEN_MIB * devices as u64),
            format!("--io_size={}k", load.ios * load.block_kib),
            "--norandommap".to_owned(),
        ];
        let jobs = self.fio(&arguments)?;
        let job = jobs.first().context("fio's job")?;
        let side = &job[if load.rw == "randread" { "read" } else { "write" }];
        let done = side["total_ios"].as_u64().context("total_ios")?;
        let runtime_ms = side["runtime"].as_u64().context("runtime")?;
        ensure!(done == load.ios, "fio did {done} I/Os of {}", load.ios);
        ensure!(runtime_ms >= RUNTIME_MIN_MS, "{runtime_ms} ms are too short for fio's clock");
        Ok(runtime_ms as f64 * 1000.0 / done as f64)
    }

    /// Detaches all; nothing of them is left.
    pub(super) fn detach_all(mut self) -> Result<()> {
        for index in 0..self.devices.len() {
            self.node.detach(&name_of(index))?;
        }
        self.devices.clear();
        ensure!(self.pids()?.is_empty(), "device processes are left");
        let devices = ublk_devices()?;
        ensure!(devices == self.devices_before, "devices are left: {devices:?}");
        Ok(())
    }

    /// Runs fio; gives its jobs.
    fn fio(&self, options: &[String]) -> Result<Vec<Value>> {
        let output = format!("--output={}", self.report.display());
        let common = ["--output-format=json", "--ioengine=io_uring", "--direct=1", "--randseed=7"];
        let mut arguments = vec!["--signal=KILL", FIO_DEADLINE_SECONDS, "fio", &output];
        arguments.extend(common);
        arguments.extend(options.iter().map(String::as_str));
        run("timeout", &arguments)?;
        let report = fs::read_to_string(&self.report).context("fio's report")?;
        let report: Value = serde_json::from_str(&report).with_context(|| report.clone())?;
        Ok(report["jobs"].as_array().context("fio's jobs")?.clone())
    }
}

fn name_of(index: usize) -> String {
    format!("vol-{index}")
}

fn file_name(device: &std::path::Path) -> Result<String> {
    Ok(device.file_name().context("a device's name")?.to_string_lossy().into_owned())
}

/// Names of the ublk devices there are.
fn ublk_devices() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir("/sys/block")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("ublkb") {
            names.insert(name);
        }
    }
    Ok(names)
}
