//! What `cargo lab scale` measures, run inside the VM: what an attachment costs that does nothing, whether one node carries
//! many, and what an I/O costs beside how many others.
//!
//! Called by `main` as `guest-scale`. [`Part::Idle`] runs in the machine with two processors, where threads and memory are as
//! on a real one; [`Part::Growth`] in the machine whose clock counts instructions. Each prints one line of JSON, which
//! `lab::scale` reads. Reads top-down: here → `node` (the attachments) → `testlab::process_resources`.

mod node;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use testlab::harness::Env;
use testlab::kernel_series::KernelSeries;
use testlab::process_resources::{Activity, Memory};

use node::Attachments;

/// What a line of [`Part::Idle`] begins with; the rest of it is an [`IdleReport`].
pub(crate) const IDLE_PREFIX: &str = "scale-idle ";
/// What a line of [`Part::Growth`] begins with; the rest of it is a [`GrowthReport`].
pub(crate) const GROWTH_PREFIX: &str = "scale-growth ";

/// Attachments of one node in the largest case.
pub(crate) const ATTACHMENTS_MAX: usize = 64;
/// With how many attachments the cost of an I/O is measured.
pub(crate) const GROWTH_STEPS: [usize; 4] = [1, 4, 16, ATTACHMENTS_MAX];
/// How long nothing may happen.
pub(crate) const IDLE_SECONDS: u64 = 10;
/// After an attach the kernel and udev look at the new disk; by then they have.
const SETTLE: Duration = Duration::from_secs(2);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Idle attachments, and many of them.
    Idle,
    /// Cost of an I/O beside the number of attachments.
    Growth,
}

/// One attachment, then [`ATTACHMENTS_MAX`], idle, before anything was written and after it.
#[derive(Serialize, Deserialize)]
pub(crate) struct IdleReport {
    /// Queues of each attachment (the default on this machine).
    pub(crate) nr_hw_queues: u64,
    /// Connections of each.
    pub(crate) nr_connections: u64,
    /// A single attachment that was only attached.
    pub(crate) one: Idle,
    /// Each of many, the same: the worst of every number.
    pub(crate) worst_of_many: Idle,
    /// The same after large writes on each.
    pub(crate) worst_after_writes: Idle,
    /// All of them together after that, KiB; a page that several share is counted once (PSS).
    pub(crate) many_pss_kib: u64,
    /// Bytes that fio wrote, read back and compared, on all of them at once.
    pub(crate) verified_bytes: u64,
}

/// An idle device process.
#[derive(Serialize, Deserialize)]
pub(crate) struct Idle {
    /// What it did in [`IDLE_SECONDS`].
    pub(crate) activity: Activity,
    /// What it held after that.
    pub(crate) memory: Memory,
}

/// What an I/O costs.
#[derive(Serialize, Deserialize)]
pub(crate) struct GrowthReport {
    /// By load, then by step of [`GROWTH_STEPS`].
    pub(crate) rows: Vec<GrowthRow>,
}

/// One load.
#[derive(Serialize, Deserialize)]
pub(crate) struct GrowthRow {
    /// Such as `R 4k, 1 in flight on each`.
    pub(crate) load: String,
    /// Thousand instructions per I/O of the whole system, by step.
    pub(crate) thousands: Vec<f64>,
}

/// What fio does on each attachment.
struct Load {
    rw: &'static str,
    block_kib: u64,
    depth_each: usize,
    /// I/Os of one measurement, all attachments together: some 400 ms of the guest.
    ios: u64,
}

const LOADS: [Load; 4] = [
    Load { rw: "randread", block_kib: 4, depth_each: 1, ios: 8_000 },
    Load { rw: "randread", block_kib: 4, depth_each: 16, ios: 20_000 },
    Load { rw: "randwrite", block_kib: 4, depth_each: 16, ios: 20_000 },
    Load { rw: "randread", block_kib: 128, depth_each: 4, ios: 2_500 },
];

/// Measures a part, with the product's programs from `programs`, and prints its line.
///
/// # Errors
/// An attachment cannot be made, does not store what it is given, or leaves something behind.
pub(crate) fn run(part: Part, programs: &Path) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("volnode-scale-{}", std::process::id()));
    fs::create_dir(&directory).context("a directory for the measurement")?;
    let env = Env { series: KernelSeries::V7, directory, programs: programs.to_owned(), in_vm: true };
    match part {
        Part::Idle => println!("{IDLE_PREFIX}{}", serde_json::to_string(&measure_idle(&env)?)?),
        Part::Growth => println!("{GROWTH_PREFIX}{}", serde_json::to_string(&measure_growth(&env)?)?),
    }
    fs::remove_dir_all(&env.directory).context("removing the measurement's directory")
}

fn measure_idle(env: &Env) -> Result<IdleReport> {
    let mut attachments = Attachments::start(env)?;
    attachments.grow_to(1)?;
    let one = idle(&attachments)?.pop().context("one attachment")?;
    let (nr_hw_queues, nr_connections) = attachments.shape()?;
    attachments.grow_to(ATTACHMENTS_MAX)?;
    let many = idle(&attachments)?;
    ensure!(many.len() == ATTACHMENTS_MAX, "{} of {ATTACHMENTS_MAX} are attached", many.len());
    attachments.fill()?;
    let after_writes = idle(&attachments)?;
    let verified_bytes = attachments.verify()?;
    attachments.detach_all()?;
    Ok(IdleReport {
        nr_hw_queues,
        nr_connections,
        one,
        worst_of_many: worst(&many),
        worst_after_writes: worst(&after_writes),
        many_pss_kib: after_writes.iter().map(|idle| idle.memory.pss_kib).sum(),
        verified_bytes,
    })
}

fn worst(many: &[Idle]) -> Idle {
    Idle {
        activity: Activity::worst(many.iter().map(|idle| &idle.activity)),
        memory: Memory::worst(many.iter().map(|idle| &idle.memory)),
    }
}

/// What every device process does and holds while nobody wants anything of it.
fn idle(attachments: &Attachments) -> Result<Vec<Idle>> {
    let pids = attachments.pids()?;
    // Time is what is measured here, so this does wait.
    thread::sleep(SETTLE);
    let before = pids.iter().map(|&pid| Activity::of(pid)).collect::<Result<Vec<_>>>()?;
    thread::sleep(Duration::from_secs(IDLE_SECONDS));
    let idle = |(&pid, before): (&u32, Activity)| {
        Ok(Idle { activity: Activity::of(pid)?.since(&before), memory: Memory::of(pid)? })
    };
    pids.iter().zip(before).map(idle).collect()
}

fn measure_growth(env: &Env) -> Result<GrowthReport> {
    let mut attachments = Attachments::start(env)?;
    let mut rows: Vec<GrowthRow> = LOADS.iter().map(GrowthRow::of).collect();
    for step in GROWTH_STEPS {
        attachments.grow_to(step)?;
        attachments.fill()?;
        attachments.verify()?;
        for (load, row) in LOADS.iter().zip(&mut rows) {
            let thousands = attachments.drive(load)?;
            eprintln!("{step} attachments, {}: {thousands:.1} thousand instructions per I/O", row.load);
            row.thousands.push(thousands);
        }
    }
    attachments.detach_all()?;
    Ok(GrowthReport { rows })
}

impl GrowthRow {
    fn of(load: &Load) -> Self {
        let direction = if load.rw == "randread" { 'R' } else { 'W' };
        let load = format!("{direction} {}k, {} in flight on each", load.block_kib, load.depth_each);
        Self { load, thousands: Vec::new() }
    }
}
