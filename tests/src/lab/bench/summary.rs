//! From single runs of fio to one row for each subject and cell.
//!
//! Called by `bench`. The rounds' median is kept of every number, so that one disturbed round moves none; how far apart the
//! rounds were is kept beside it.

use anyhow::Result;

use super::super::measurement::{median, spread_percent};
use super::super::rounds::Rounds;
use crate::bench_guest::{Cell, CpuSecondsPerGib, Plan, SUBJECTS, Sample};

/// Medians of the rounds of one cell on one subject.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// Index into [`SUBJECTS`].
    pub(super) subject: usize,
    /// What was done.
    pub(super) cell: Cell,
    /// I/Os in the shortest round.
    pub(super) ios_min: u64,
    /// I/Os in a second.
    pub(super) iops: f64,
    /// MiB in a second.
    pub(super) mib_per_s: f64,
    /// Microseconds: median, 99 %, 99.9 %.
    pub(super) latency_us: [f64; 3],
    /// What a GiB cost.
    pub(super) cpu: CpuSecondsPerGib,
    /// The rounds' largest IOPS less their smallest, in per cent of the median.
    pub(super) spread_percent: f64,
    /// The same of the total CPU time for a GiB.
    pub(super) cpu_spread_percent: f64,
}

/// The row of every subject and cell, by cell, then by subject.
///
/// # Errors
/// A round is missing, or there is one too many.
pub(super) fn rows(samples: &[Sample], plan: &Plan) -> Result<Vec<Row>> {
    let subjects = SUBJECTS.iter().map(|subject| subject.name()).collect();
    let rounds = Rounds { rounds: plan.rounds, cells: plan.cells(), subjects };
    rounds.rows(samples, |sample| (sample.subject, sample.cell), Cell::heading, row)
}

fn row(subject: usize, cell: Cell, rounds: &[&Sample]) -> Row {
    let of = |number: &dyn Fn(&Sample) -> f64| median(rounds.iter().map(|sample| number(sample)).collect());
    Row {
        subject,
        cell,
        ios_min: rounds.iter().map(|sample| sample.ios).min().unwrap_or(0),
        iops: of(&|sample| sample.iops),
        mib_per_s: of(&|sample| sample.mib_per_s),
        latency_us: [0, 1, 2].map(|index| of(&|sample| sample.latency_us[index])),
        cpu: CpuSecondsPerGib {
            client: of(&|sample| sample.cpu.client),
            server: of(&|sample| sample.cpu.server),
            submitter: of(&|sample| sample.cpu.submitter),
            total: of(&|sample| sample.cpu.total),
        },
        spread_percent: spread_percent(rounds.iter().map(|sample| sample.iops).collect()),
        cpu_spread_percent: spread_percent(rounds.iter().map(|sample| sample.cpu.total).collect()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One sample for each subject, cell and round of `plan`; every number follows from `iops`.
    pub(in crate::lab::bench) fn samples(
        plan: &Plan,
        iops: impl Fn(usize, &Cell, usize) -> f64,
    ) -> Vec<Sample> {
        let mut samples = Vec::new();
        for round in 0..plan.rounds {
            for cell in plan.cells() {
                for subject in 0..SUBJECTS.len() {
                    let iops = iops(subject, &cell, round);
                    let cost = 1e5 / iops;
                    let latency_us = [1e6, 2e6, 3e6].map(|us| us * f64::from(cell.load) / iops);
                    let cpu =
                        CpuSecondsPerGib { client: cost, server: cost, submitter: cost, total: 3.0 * cost };
                    let mib_per_s = iops * f64::from(cell.block_kib) / 1024.0;
                    samples.push(Sample {
                        subject,
                        cell,
                        ios: iops as u64,
                        iops,
                        mib_per_s,
                        latency_us,
                        cpu,
                    });
                }
            }
        }
        samples
    }

    #[test]
    fn one_disturbed_round_moves_no_median_and_shows_in_the_spread() {
        let plan = Plan::FULL;
        let rounds = [1000.0, 100.0, 1100.0];
        let rows = rows(&samples(&plan, |_, _, round| rounds[round]), &plan).unwrap();
        assert_eq!(rows.len(), plan.cells().len() * SUBJECTS.len());
        assert!(rows.iter().all(|row| row.iops == 1000.0 && row.cpu.client == 100.0 && row.ios_min == 100));
        assert!(rows.iter().all(|row| (row.spread_percent - 100.0).abs() < 1e-9));
        assert!(
            rows.iter().all(|row| row.cpu_spread_percent > 900.0),
            "the slow round cost ten times as much"
        );
    }
}
