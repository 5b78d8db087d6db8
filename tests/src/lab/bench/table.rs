//! The bench's numbers as text: the tables of the documentation, what of them is won and lost, and every median as
//! comma-separated values.
//!
//! Called by `bench`. The sentences are made from the rows; a difference within the rounds' spread is called a tie.

use std::fmt::Write as _;

use super::summary::Row;
use crate::bench_guest::{Plan, SUBJECTS};

/// The loads in the tables; the plots and the CSV file have all of them.
const SHOWN_LOADS: [u32; 2] = [1, 16];

/// Fewer I/Os than this in a round have no 99.9 % that means anything.
const P999_IOS_MIN: u64 = 1000;

const HEADINGS: [&str; 12] = [
    "",
    "IOPS",
    "spread",
    "MiB/s",
    "p50 ms",
    "p99 ms",
    "p99.9 ms",
    "client",
    "server",
    "submitter",
    "total",
    "IOPS beside nbd",
];

/// One table for each shape and shown load.
pub(super) fn tables(rows: &[Row], plan: &Plan) -> String {
    let mut text = String::new();
    for cell in plan.cells().into_iter().filter(|cell| SHOWN_LOADS.contains(&cell.load)) {
        let _ = writeln!(text, "| {} {} |", cell.heading(), HEADINGS.join(" | ").trim_start());
        let _ = writeln!(text, "| --- |{}", " ---: |".repeat(HEADINGS.len() - 1));
        for row in rows.iter().filter(|row| row.cell == cell) {
            let _ = writeln!(text, "{}", line(row, rows));
        }
        text.push('\n');
    }
    let _ = writeln!(
        text,
        "Medians of {} rounds of {} ms each. Spread is between the largest and the smallest IOPS of the rounds. Client, \
         server, submitter and total are CPU seconds for a GiB. The last column is IOPS divided by those of the kernel's \
         nbd with nbdkit and as many connections. Where a round had fewer than {P999_IOS_MIN} I/Os there is no p99.9.",
        plan.rounds, plan.runtime_ms
    );
    text
}

fn line(row: &Row, rows: &[Row]) -> String {
    let subject = SUBJECTS[row.subject];
    let [p50, p99, p999] = row.latency_us.map(|us| format!("{:.2}", us / 1000.0));
    let p999 = if row.ios_min < P999_IOS_MIN { "–".to_owned() } else { p999 };
    let baseline = rows.iter().find(|other| {
        let peer = SUBJECTS[other.subject];
        other.cell == row.cell && peer.is_baseline() && peer.queues == subject.queues
    });
    let ratio = baseline.map_or("–".to_owned(), |baseline| format!("{:.2}", row.iops / baseline.iops));
    let cpu = row.cpu;
    let cpu = [cpu.client, cpu.server, cpu.submitter, cpu.total].map(seconds).join(" | ");
    format!(
        "| {} | {:.0} | {:.0} % | {:.1} | {p50} | {p99} | {p999} | {cpu} | {ratio} |",
        subject.name(),
        row.iops,
        row.spread_percent,
        row.mib_per_s,
    )
}

/// A number with as many digits as the spread leaves meaningful.
fn seconds(value: f64) -> String {
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// Ours beside every peer of as many queues, cell by cell.
pub(super) fn verdict(rows: &[Row]) -> String {
    let mut text = String::new();
    for (ours, subject) in SUBJECTS.iter().enumerate().filter(|(_, subject)| subject.is_ours()) {
        for (theirs, peer) in SUBJECTS.iter().enumerate() {
            if peer.is_ours() || peer.queues != subject.queues {
                continue;
            }
            let pairs: Vec<(&Row, &Row)> = rows
                .iter()
                .filter(|row| row.subject == ours)
                .filter_map(|row| {
                    Some((row, rows.iter().find(|r| r.subject == theirs && r.cell == row.cell)?))
                })
                .collect();
            // Better is larger in both.
            let iops = comparison(&pairs, |row| (row.iops, row.spread_percent));
            let cpu = comparison(&pairs, |row| (1.0 / row.cpu.total, row.cpu_spread_percent));
            let (subject, peer) = (subject.name(), peer.family());
            let _ = writeln!(text, "- {subject}, beside {peer}: IOPS {iops}; CPU per GiB {cpu}.");
        }
    }
    text
}

/// In how many cells the left one is better, in how many worse, and which; by a merit and its spread in per cent.
fn comparison(pairs: &[(&Row, &Row)], merit: impl Fn(&Row) -> (f64, f64)) -> String {
    let mut better = 0;
    let mut lost = Vec::new();
    for (left, right) in pairs {
        let ((left_merit, left_spread), (right_merit, right_spread)) = (merit(left), merit(right));
        let ratio = left_merit / right_merit;
        let noise = left_spread.max(right_spread) / 100.0;
        if (ratio - 1.0).abs() <= noise {
            continue;
        }
        if ratio > 1.0 {
            better += 1;
        } else {
            lost.push(format!("{} ({ratio:.2} ×)", left.cell.heading()));
        }
    }
    let ties = pairs.len() - better - lost.len();
    let lost = if lost.is_empty() { "none".to_owned() } else { lost.join(", ") };
    format!("better in {better} of {} cells, a tie in {ties}, worse in: {lost}", pairs.len())
}

/// Every median, a line for each cell and subject.
pub(super) fn comma_separated(rows: &[Row]) -> String {
    let mut text =
        "subject,queues,operation,block_kib,load,iops,iops_spread_percent,mib_per_s,p50_us,p99_us,p999_us,\
                    client_cpu_s_per_gib,server_cpu_s_per_gib,submitter_cpu_s_per_gib,total_cpu_s_per_gib\n"
            .to_owned();
    for row in rows {
        let subject = SUBJECTS[row.subject];
        let name = subject.family().replace(['`', ','], "");
        let Row { cell, cpu, .. } = row;
        let [p50, p99, p999] = row.latency_us;
        let _ = writeln!(
            text,
            "{name},{},{},{},{},{:.0},{:.1},{:.2},{p50:.0},{p99:.0},{p999:.0},{:.2},{:.2},{:.2},{:.2}",
            subject.queues,
            cell.operation.letter(),
            cell.block_kib,
            cell.load,
            row.iops,
            row.spread_percent,
            row.mib_per_s,
            cpu.client,
            cpu.server,
            cpu.submitter,
            cpu.total,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::summary::{rows, tests::samples};
    use super::*;

    /// Subject 0 is `fused` with one queue, 2 is kernel nbd with nbdkit.
    fn measured(fused: f64, rounds: [f64; 3]) -> Vec<Row> {
        let plan = Plan::FULL;
        let iops = |subject: usize, round: usize| if subject == 0 { fused } else { 1000.0 } * rounds[round];
        rows(&samples(&plan, |subject, _, round| iops(subject, round)), &plan).unwrap()
    }

    #[test]
    fn the_ratio_is_to_nbd_of_as_many_connections() {
        let text = tables(&measured(1500.0, [1.0; 3]), &Plan::FULL);
        let fused: Vec<&str> = text.lines().filter(|line| line.contains("`fused`, 1 queue |")).collect();
        assert_eq!(fused.len(), 8, "{text}");
        assert!(fused.iter().all(|line| line.ends_with("| 1.50 |")), "{text}");
        assert!(text.contains("| R 4k/16 | IOPS | spread |"), "{text}");
        let columns = |line: &str| line.matches('|').count();
        assert!(text.lines().filter(|line| line.starts_with('|')).all(|line| columns(line) == 13), "{text}");
    }

    #[test]
    fn lost_cells_are_named_and_ties_are_not_won() {
        let worse = verdict(&measured(500.0, [1.0; 3]));
        assert!(
            worse.contains("better in 0 of 18 cells, a tie in 0, worse in: R 4k/1 (0.50 ×), "),
            "{worse}"
        );
        let tie = verdict(&measured(1010.0, [0.98, 1.0, 1.02]));
        assert!(tie.contains("better in 0 of 18 cells, a tie in 18, worse in: none"), "{tie}");
        let better = verdict(&measured(2000.0, [0.98, 1.0, 1.02]));
        assert!(
            better.contains("`fused`, 1 queue, beside kernel nbd + nbdkit memory: IOPS better in 18"),
            "{better}"
        );
    }

    #[test]
    fn a_p999_of_few_ios_is_not_shown() {
        let text = tables(&measured(500.0, [1.0; 3]), &Plan::FULL);
        let fused = text.lines().find(|line| line.contains("`fused`, 1 queue |")).unwrap();
        assert_eq!(fused.split('|').nth(7), Some(" – "), "{fused}");
    }

    #[test]
    fn every_median_is_kept_with_as_many_fields_as_the_heading() {
        let rows = measured(500.0, [1.0; 3]);
        let text = comma_separated(&rows);
        assert_eq!(text.lines().count(), rows.len() + 1);
        assert!(text.lines().all(|line| line.split(',').count() == 15), "{text}");
    }
}
