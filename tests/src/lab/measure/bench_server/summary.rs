//! From single runs to one row for each server and load.
//!
//! Called by `mod`. The rounds' median is kept of every number, so that one disturbed round moves none; how far apart the rounds
//! were is kept beside it.

use anyhow::Result;

use super::drivers::Run;
use super::plan::{Cell, Plan, SUBJECTS, Storage};
use super::rounds::Rounds;
use crate::lab::measure::measurement::{median, spread_percent};

const GIB: f64 = (1_u64 << 30) as f64;

/// One run on one server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Index into [`SUBJECTS`].
    pub(super) subject: usize,
    pub(super) cell: Cell,
    pub(super) run: Run,
    /// CPU seconds of the server, from before the load connected until after it had gone.
    pub(super) server_s: f64,
    /// The most that the server had resident meanwhile.
    pub(super) peak_kib: u64,
}

/// Medians of the rounds of one load on one server.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// Index into [`SUBJECTS`].
    pub(super) subject: usize,
    pub(super) cell: Cell,
    /// Requests in a second, where the load tells.
    pub(super) iops: Option<f64>,
    pub(super) mib_per_s: f64,
    /// Microseconds: median and 99 %, where the load tells.
    pub(super) latency_us: Option<[f64; 2]>,
    /// CPU microseconds of the server for a request, where the load tells how many there were.
    pub(super) server_us_per_io: Option<f64>,
    /// CPU seconds of the server for a GiB.
    pub(super) server_s_per_gib: f64,
    /// How many processors the server kept busy.
    pub(super) server_cpus: f64,
    /// How many the load kept busy.
    pub(super) load_cpus: f64,
    /// The most that the server had resident in any round.
    pub(super) peak_mib: f64,
    /// The rounds' largest speed less their smallest, in per cent of the median.
    pub(super) spread_percent: f64,
    /// The same of the CPU time.
    pub(super) cpu_spread_percent: f64,
}

impl Row {
    pub(super) fn storage(&self) -> Storage {
        SUBJECTS[self.subject].storage
    }

    pub(super) fn is_ours(&self) -> bool {
        SUBJECTS[self.subject].is_ours()
    }
}

/// The row of every server and load, by load, then by server.
///
/// # Errors
/// A round is missing, or there is one too many.
pub(super) fn rows(samples: &[Sample], plan: &Plan) -> Result<Vec<Row>> {
    let subjects = SUBJECTS.iter().map(|subject| subject.name()).collect();
    let rounds = Rounds { rounds: plan.rounds, cells: plan.cells(), subjects };
    rounds.rows(samples, |sample| (sample.subject, sample.cell), Cell::heading, row)
}

fn row(subject: usize, cell: Cell, rounds: &[&Sample]) -> Row {
    let all = |number: &dyn Fn(&Sample) -> f64| -> Vec<f64> {
        rounds.iter().map(|sample| number(sample)).collect()
    };
    // Either every round of a load tells a number or none does.
    let told = |number: &dyn Fn(&Sample) -> Option<f64>| -> Option<f64> {
        let numbers: Option<Vec<f64>> = rounds.iter().map(|sample| number(sample)).collect();
        numbers.map(median)
    };
    let speed = |sample: &Sample| sample.run.mib_per_s;
    let s_per_gib = |sample: &Sample| sample.server_s * GIB / sample.run.bytes as f64;
    let latency = |index: usize| told(&|sample| sample.run.latency_us.map(|latency| latency[index]));
    Row {
        subject,
        cell,
        iops: told(&|sample| sample.run.iops),
        mib_per_s: median(all(&speed)),
        latency_us: latency(0).zip(latency(1)).map(|(p50, p99)| [p50, p99]),
        server_us_per_io: told(&|sample| sample.run.ios.map(|ios| sample.server_s * 1e6 / ios as f64)),
        server_s_per_gib: median(all(&s_per_gib)),
        server_cpus: median(all(&|sample| s_per_gib(sample) * speed(sample) / 1024.0)),
        load_cpus: median(all(&|sample| sample.run.load_cpus)),
        peak_mib: rounds.iter().map(|sample| sample.peak_kib).max().unwrap_or(0) as f64 / 1024.0,
        spread_percent: spread_percent(all(&speed)),
        cpu_spread_percent: spread_percent(all(&s_per_gib)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::plan::Driver;
    use super::*;

    /// One sample for each server, load and round of `plan`; every number follows from the requests in a second.
    pub(in super::super) fn samples(plan: &Plan, iops: impl Fn(usize, &Cell, usize) -> f64) -> Vec<Sample> {
        let mut samples = Vec::new();
        for round in 0..plan.rounds {
            for cell in plan.cells() {
                for subject in 0..SUBJECTS.len() {
                    let iops = iops(subject, &cell, round);
                    let block_bytes = f64::from(cell.shape.block_bytes());
                    let tells = cell.driver != Driver::Nbdcopy;
                    let run = Run {
                        ios: tells.then_some(iops as u64),
                        bytes: (iops * block_bytes) as u64,
                        iops: tells.then_some(iops),
                        mib_per_s: iops * block_bytes / f64::from(1 << 20),
                        latency_us: tells.then_some([1e6 / iops, 2e6 / iops]),
                        load_cpus: 0.5,
                    };
                    samples.push(Sample { subject, cell, run, server_s: 0.5, peak_kib: 2048 });
                }
            }
        }
        samples
    }

    #[test]
    fn one_disturbed_round_moves_no_median_and_shows_in_the_spread() {
        let plan = Plan::FULL;
        let rounds = [1000.0, 100.0, 1250.0];
        let rows = rows(&samples(&plan, |_, _, round| rounds[round]), &plan).unwrap();
        assert_eq!(rows.len(), plan.cells().len() * SUBJECTS.len());
        for row in &rows {
            let tells = row.cell.driver != Driver::Nbdcopy;
            assert_eq!(row.iops, tells.then_some(1000.0));
            assert_eq!(row.server_us_per_io, tells.then_some(500.0));
            assert_eq!((row.server_cpus, row.peak_mib), (0.5, 2.0));
            assert!((row.spread_percent - 115.0).abs() < 1e-9 && row.cpu_spread_percent > 900.0);
        }
    }
}
