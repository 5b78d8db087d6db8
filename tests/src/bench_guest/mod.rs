//! What `cargo lab bench` measures, run inside the machine: speed, latency and CPU time of our devices and of the peers',
//! by turns.
//!
//! Called by `main` as `guest-bench`. Owns the plan (which cells, how long, how many rounds) and its order; prints one
//! line of JSON for each run of fio, which `lab::bench` reads. Every device first proves that it stores what it is given.
//! In each round each cell is measured on one subject after another, and each round begins with another subject, so
//! that what slows the machine for a while slows them all. Nothing runs beside fio but what it measures.

mod cpu_time;
mod fio_job;
mod subjects;
mod worker_split;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use testlab::harness::Env;
use testlab::kernel_series::KernelSeries;

use cpu_time::Account;
use fio_job::{Fio, Outcome, Window};
use subjects::{Devices, Ends};
pub(crate) use subjects::{SUBJECTS, Subject};

/// What a line of ours begins with; the rest of it is a [`Sample`].
pub(crate) const SAMPLE_PREFIX: &str = "bench-sample ";

/// How often a run is tried in which the machine, starved by others, does not get to count CPU time.
const ATTEMPTS: usize = 4;

const GIB: f64 = (1_u64 << 30) as f64;

/// What fio does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Operation {
    /// Reads at random offsets.
    Read,
    /// Writes at random offsets.
    Write,
}

impl Operation {
    fn fio_name(self) -> &'static str {
        match self {
            Self::Read => "randread",
            Self::Write => "randwrite",
        }
    }

    /// Its side of fio's JSON.
    fn json_name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    /// As sentences say it.
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::Read => "reads",
            Self::Write => "writes",
        }
    }

    /// As column headings say it.
    pub(crate) fn letter(self) -> char {
        match self {
            Self::Read => 'R',
            Self::Write => 'W',
        }
    }
}

/// One shape of I/O under one load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// What is done.
    pub(crate) operation: Operation,
    /// Size of an I/O.
    pub(crate) block_kib: u32,
    /// I/Os in flight on the device, all jobs together.
    pub(crate) load: u32,
}

impl Cell {
    /// `R 4k/16` is a read of 4 KiB, 16 in flight.
    pub(crate) fn heading(&self) -> String {
        format!("{} {}k/{}", self.operation.letter(), self.block_kib, self.load)
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// How often every cell is measured on every subject.
    pub(crate) rounds: usize,
    /// Length of one run of fio.
    pub(crate) runtime_ms: u32,
    /// Size of every device.
    size_mib: u64,
    /// How much of it each device has to prove that it stores.
    verify_mib: u64,
    operations: &'static [Operation],
    loads_4k: &'static [u32],
    loads_128k: &'static [u32],
}

impl Plan {
    /// What the documentation shows: some fifteen minutes.
    pub(crate) const FULL: Self = Self {
        rounds: 3,
        runtime_ms: 1000,
        size_mib: 64,
        verify_mib: 16,
        operations: &[Operation::Read, Operation::Write],
        loads_4k: &[1, 2, 4, 8, 16, 32],
        loads_128k: &[1, 4, 16],
    };

    /// That everything works, in half a minute and the machine's start; its numbers mean nothing. Writes are verified, not
    /// measured.
    pub(crate) const QUICK: Self = Self {
        rounds: 1,
        runtime_ms: 600,
        size_mib: 4,
        verify_mib: 4,
        operations: &[Operation::Read],
        loads_4k: &[16],
        loads_128k: &[],
    };

    /// One of the two.
    pub(crate) fn new(quick: bool) -> Self {
        if quick { Self::QUICK } else { Self::FULL }
    }

    /// Every cell, reads first.
    pub(crate) fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for &operation in self.operations {
            for (block_kib, loads) in [(4, self.loads_4k), (128, self.loads_128k)] {
                cells.extend(loads.iter().map(|&load| Cell { operation, block_kib, load }));
            }
        }
        cells
    }
}

/// One run of fio on one subject.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Index into [`SUBJECTS`].
    pub(crate) subject: usize,
    /// What was done.
    pub(crate) cell: Cell,
    /// I/Os of this run.
    pub(crate) ios: u64,
    /// I/Os in a second.
    pub(crate) iops: f64,
    /// MiB in a second.
    pub(crate) mib_per_s: f64,
    /// Microseconds: median, 99 %, 99.9 %.
    pub(crate) latency_us: [f64; 3],
    /// What the bytes of this run cost.
    pub(crate) cpu: CpuSecondsPerGib,
}

/// CPU seconds for a GiB that was read or written.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct CpuSecondsPerGib {
    /// Of the client's threads.
    pub(crate) client: f64,
    /// Of the server's threads.
    pub(crate) server: f64,
    /// Of fio's threads inside the kernel: the block layer, and whatever of a client or of TCP runs in them.
    pub(crate) submitter: f64,
    /// Of all tasks, without fio's time in user mode: the sum of the others and of what belongs to none of them.
    pub(crate) total: f64,
}

/// Measures everything, with the product's programs from `programs`.
///
/// # Errors
/// A device cannot be made, does not store what it is given, or fio failed.
pub(crate) fn run_samples(programs: &Path, quick: bool) -> Result<()> {
    let plan = Plan::new(quick);
    let directory = std::env::temp_dir().join(format!("volnode-bench-{}", std::process::id()));
    fs::create_dir(&directory).context("a directory for the measurement")?;
    let env = Env { series: KernelSeries::V7, directory, programs: programs.to_owned(), in_vm: true };
    let devices = Devices::set_up(&env, plan.size_mib)?;
    let bench = Bench { env: &env, devices: &devices, plan };
    bench.verify()?;
    let shares = bench.client_shares()?;
    for round in 0..plan.rounds {
        eprintln!("round {} of {}", round + 1, plan.rounds);
        for (cell, shares) in plan.cells().iter().zip(&shares) {
            for turn in 0..SUBJECTS.len() {
                let subject = (turn + round) % SUBJECTS.len();
                let sample = bench.measure(subject, cell, shares[subject])?;
                println!("{SAMPLE_PREFIX}{}", serde_json::to_string(&sample)?);
            }
        }
    }
    devices.take_down()?;
    fs::remove_dir_all(&env.directory).context("removing the measurement's directory")
}

/// Everything is set up.
struct Bench<'a> {
    env: &'a Env,
    devices: &'a Devices,
    plan: Plan,
}

impl Bench<'_> {
    fn fio(&self, subject: usize) -> Fio<'_> {
        let device = &self.devices.paths()[subject];
        Fio { device, directory: &self.env.directory, size_mib: self.plan.size_mib }
    }

    fn verify(&self) -> Result<()> {
        for (index, subject) in SUBJECTS.iter().enumerate() {
            let verified = self.fio(index).verify_and_fill(self.plan.verify_mib);
            verified.with_context(|| format!("{} must store what it is given", subject.name()))?;
            eprintln!("{} stores what it is given", subject.name());
        }
        Ok(())
    }

    /// By cell, then by subject: the client's share of the kernel workers' time, where client and server share them.
    fn client_shares(&self) -> Result<Vec<Vec<Option<f64>>>> {
        let share = |cell: &Cell, index: usize, subject: &Subject| -> Result<Option<f64>> {
            if subject.ends() != Ends::SharedWorkers {
                return Ok(None);
            }
            let measure = || self.fio(index).measure(cell, self.plan.runtime_ms, &[]).map(drop);
            worker_split::client_share(measure).map(Some)
        };
        let of_cell = |cell: &Cell| -> Result<Vec<Option<f64>>> {
            SUBJECTS.iter().enumerate().map(|(index, subject)| share(cell, index, subject)).collect()
        };
        self.plan.cells().iter().map(of_cell).collect()
    }

    fn measure(&self, subject: usize, cell: &Cell, client_share: Option<f64>) -> Result<Sample> {
        let accounts = match SUBJECTS[subject].ends() {
            Ends::Apart(client, server) => vec![client, server],
            Ends::SharedWorkers => vec![Account::KernelWorkers],
        };
        let what = || format!("{}, {}", SUBJECTS[subject].name(), cell.heading());
        let (outcome, window) = self.measure_with_window(subject, cell, &accounts).with_context(what)?;
        let (client_s, server_s) = match (&window.spent.accounts_s[..], client_share) {
            ([workers], Some(share)) => (workers * share, workers * (1.0 - share)),
            ([client, server], _) => (*client, *server),
            _ => anyhow::bail!("{} has no CPU account", SUBJECTS[subject].name()),
        };
        let gib = window.bytes as f64 / GIB;
        let cpu = CpuSecondsPerGib {
            client: client_s / gib,
            server: server_s / gib,
            submitter: window.spent.submitter_s / gib,
            total: window.spent.total_s / gib,
        };
        eprintln!("{:<9} {:7.0} IOPS  {}", cell.heading(), outcome.iops, SUBJECTS[subject].name());
        let (iops, mib_per_s, latency_us) = (outcome.iops, outcome.mib_per_s, outcome.latency_us);
        Ok(Sample { subject, cell: *cell, ios: outcome.ios, iops, mib_per_s, latency_us, cpu })
    }

    /// A run in which no CPU time could be counted is of no use, and is repeated.
    fn measure_with_window(
        &self,
        subject: usize,
        cell: &Cell,
        accounts: &[Account],
    ) -> Result<(Outcome, Window)> {
        for _ in 0..ATTEMPTS {
            let (outcome, window) = self.fio(subject).measure(cell, self.plan.runtime_ms, accounts)?;
            if let Some(window) = window {
                return Ok((outcome, window));
            }
            eprintln!("{}: ended before its CPU time could be counted", cell.heading());
        }
        anyhow::bail!("no CPU time could be counted in {ATTEMPTS} runs")
    }
}
