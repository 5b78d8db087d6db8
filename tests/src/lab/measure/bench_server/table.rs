//! The numbers of the servers as text: the tables of the documentation, the ratios to the best peer of each row, and what of
//! it is met, missed, won and lost.
//!
//! Called by `mod`. The sentences are made from the rows. A peer is a server with the same storage; the best one is chosen for
//! each load and each measure anew. A difference within the rounds' spread is a tie, and no target is met by a tie.

use std::fmt::Write as _;

use super::plan::{Cell, Driver, Plan, SUBJECTS, Shape, Storage};
use super::summary::Row;

/// From this share of its processor on, the load is what limits a number.
const LOAD_LIMIT_CPUS: f64 = 0.9;

/// CPU time is counted in ticks of 10 ms, of which a run has a hundred or two.
const NOISE_MIN: f64 = 0.01;

const HEADINGS: [&str; 11] = [
    "",
    "IOPS",
    "spread",
    "MiB/s",
    "p50 µs",
    "p99 µs",
    "server µs per I/O",
    "server s per GiB",
    "server busy",
    "load busy",
    "peak MiB",
];

/// What servers are compared by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Measure {
    Cpu,
    Speed,
    Latency,
}

impl Measure {
    /// The number and its spread in per cent; none where the load does not tell it.
    fn of(self, row: &Row) -> Option<(f64, f64)> {
        match self {
            Self::Cpu => Some((row.server_s_per_gib, row.cpu_spread_percent)),
            Self::Speed => Some((row.mib_per_s, row.spread_percent)),
            Self::Latency => row.latency_us.map(|[p50, _]| (p50, row.spread_percent)),
        }
    }

    fn is_better(self, left: f64, right: f64) -> bool {
        if self == Self::Speed { left > right } else { left < right }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU time",
            Self::Speed => "speed",
            Self::Latency => "p50",
        }
    }
}

/// Ours beside the best peer, by one measure.
struct Comparison {
    /// Ours divided by theirs.
    ratio: f64,
    /// The larger of the two spreads, as a fraction.
    noise: f64,
    /// The peer's program and storage.
    peer: String,
}

fn compare(rows: &[Row], cell: Cell, storage: Storage, measure: Measure) -> Option<Comparison> {
    let of_cell = || rows.iter().filter(|row| row.cell == cell && row.storage() == storage);
    let (ours, our_spread) = measure.of(of_cell().find(|row| row.is_ours())?)?;
    let peers = of_cell().filter(|row| !row.is_ours()).filter_map(|row| Some((row, measure.of(row)?)));
    let (peer, (theirs, their_spread)) =
        peers.reduce(|best, other| if measure.is_better(other.1.0, best.1.0) { other } else { best })?;
    let noise = (our_spread.max(their_spread) / 100.0).max(NOISE_MIN);
    Some(Comparison { ratio: ours / theirs, noise, peer: SUBJECTS[peer.subject].name() })
}

/// One table for each load, then the ratios.
pub(super) fn tables(rows: &[Row], plan: &Plan) -> String {
    let mut text = String::new();
    for cell in plan.cells() {
        let _ = writeln!(text, "| {} {} |", cell.heading(), HEADINGS.join(" | ").trim_start());
        let _ = writeln!(text, "| --- |{}", " ---: |".repeat(HEADINGS.len() - 1));
        for row in rows.iter().filter(|row| row.cell == cell) {
            let _ = writeln!(text, "{}", line(row));
        }
        text.push('\n');
    }
    let _ = writeln!(
        text,
        "Medians of {} rounds of {} ms each. Spread is between the largest and the smallest speed of the rounds; busy is the \
         share of a processor; peak is the largest resident set of the server's processes during the load, a memory volume \
         ({} MiB) included.\n",
        plan.rounds,
        plan.runtime.as_millis(),
        plan.size_bytes >> 20
    );
    text + &ratios(rows, plan)
}

fn line(row: &Row) -> String {
    let told = |number: Option<f64>| number.map_or("–".to_owned(), digits);
    let [p50, p99] = row.latency_us.map_or([None, None], |latency| latency.map(Some)).map(told);
    let percent = |cpus: f64| format!("{:.0} %", cpus * 100.0);
    format!(
        "| {} | {} | {:.0} % | {:.1} | {p50} | {p99} | {} | {:.2} | {} | {} | {:.0} |",
        SUBJECTS[row.subject].name(),
        row.iops.map_or("–".to_owned(), |iops| format!("{iops:.0}")),
        row.spread_percent,
        row.mib_per_s,
        told(row.server_us_per_io),
        row.server_s_per_gib,
        percent(row.server_cpus),
        percent(row.load_cpus),
        row.peak_mib,
    )
}

fn digits(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// Ours divided by the best peer, for each load, storage and measure.
fn ratios(rows: &[Row], plan: &Plan) -> String {
    let mut text = "| volserver ÷ best peer |".to_owned();
    for storage in Storage::ALL {
        for measure in [Measure::Cpu, Measure::Speed, Measure::Latency] {
            let _ = write!(text, " {}, {} |", measure.name(), storage.name());
        }
    }
    let _ = writeln!(text, "\n| --- |{}", " ---: |".repeat(9));
    for cell in plan.cells() {
        let _ = write!(text, "| {} |", cell.heading());
        for storage in Storage::ALL {
            for measure in [Measure::Cpu, Measure::Speed, Measure::Latency] {
                let ratio = compare(rows, cell, storage, measure).map(|comparison| comparison.ratio);
                let _ = write!(text, " {} |", ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}")));
            }
        }
        text.push('\n');
    }
    text
}

/// A ratio that the server is to reach.
struct Target {
    words: &'static str,
    measure: Measure,
    bound: f64,
    /// Which loads it is for.
    applies: fn(&Cell) -> bool,
    /// Whether a load that is itself the limit says nothing about it.
    needs_idle_load: bool,
}

const TARGETS: [Target; 4] = [
    Target {
        words: "CPU time at most 0.6 × the best peer's",
        measure: Measure::Cpu,
        bound: 0.6,
        applies: |_| true,
        needs_idle_load: false,
    },
    Target {
        words: "IOPS with four connections at least 1.5 ×",
        measure: Measure::Speed,
        bound: 1.5,
        applies: |cell| cell.shape == Shape::Small4x32,
        needs_idle_load: true,
    },
    Target {
        words: "latency of a single request at most 1.0 ×",
        measure: Measure::Latency,
        bound: 1.0,
        applies: |cell| cell.shape == Shape::Small1,
        needs_idle_load: false,
    },
    Target {
        words: "sequential speed at least 1.2 ×",
        measure: Measure::Speed,
        bound: 1.2,
        applies: |cell| cell.shape == Shape::Large || cell.driver == Driver::Nbdcopy,
        needs_idle_load: true,
    },
];

/// What is met and missed, won and lost, one storage after the other.
pub(super) fn verdict(rows: &[Row]) -> String {
    let mut cells: Vec<Cell> = Vec::new();
    for row in rows {
        if !cells.contains(&row.cell) {
            cells.push(row.cell);
        }
    }
    let mut text = String::new();
    for storage in Storage::ALL {
        for target in &TARGETS {
            let _ = writeln!(text, "- {}, {}", storage.name(), against_target(rows, &cells, storage, target));
        }
        for measure in [Measure::Cpu, Measure::Speed, Measure::Latency] {
            let _ = writeln!(text, "- {}, {}", storage.name(), against_peers(rows, &cells, storage, measure));
        }
    }
    text
}

fn against_target(rows: &[Row], cells: &[Cell], storage: Storage, target: &Target) -> String {
    let (mut met, mut missed, mut limited) = (0, Vec::new(), Vec::new());
    for cell in cells.iter().copied().filter(target.applies) {
        let Some(Comparison { ratio, .. }) = compare(rows, cell, storage, target.measure) else { continue };
        let is_ours = |row: &&Row| row.cell == cell && row.storage() == storage && row.is_ours();
        let load_is_limit = rows.iter().find(is_ours).is_some_and(|row| row.load_cpus >= LOAD_LIMIT_CPUS);
        let shown = format!("{} ({ratio:.2} ×)", cell.heading());
        if ratio == target.bound || target.measure.is_better(ratio, target.bound) {
            met += 1;
        } else if target.needs_idle_load && load_is_limit {
            limited.push(shown);
        } else {
            missed.push(shown);
        }
    }
    let all = met + missed.len() + limited.len();
    let missed = if missed.is_empty() { "none".to_owned() } else { missed.join(", ") };
    let limited = if limited.is_empty() {
        String::new()
    } else {
        format!("; cannot be told, because the load itself was the limit, in: {}", limited.join(", "))
    };
    format!("{}: met in {met} of {all} rows, missed in: {missed}{limited}.", target.words)
}

fn against_peers(rows: &[Row], cells: &[Cell], storage: Storage, measure: Measure) -> String {
    let (mut won, mut ties, mut lost) = (0, 0, Vec::new());
    for &cell in cells {
        let Some(Comparison { ratio, noise, peer }) = compare(rows, cell, storage, measure) else { continue };
        if (ratio - 1.0).abs() <= noise {
            ties += 1;
        } else if measure.is_better(ratio, 1.0) {
            won += 1;
        } else {
            lost.push(format!("{} ({ratio:.2} × {peer})", cell.heading()));
        }
    }
    let all = won + ties + lost.len();
    let lost = if lost.is_empty() { "none".to_owned() } else { lost.join("; ") };
    format!(
        "{}: better than every peer in {won} of {all} rows, a tie in {ties}, worse in: {lost}.",
        measure.name()
    )
}

#[cfg(test)]
mod tests {
    use super::super::summary::{rows, tests::samples};
    use super::*;

    /// Ours does so many requests in a second, every peer 1000.
    fn measured(ours: f64, rounds: [f64; 3]) -> Vec<Row> {
        let plan = Plan::FULL;
        let iops = |subject: usize, round: usize| {
            (if SUBJECTS[subject].is_ours() { ours } else { 1000.0 }) * rounds[round]
        };
        rows(&samples(&plan, |subject, _, round| iops(subject, round)), &plan).unwrap()
    }

    #[test]
    fn every_row_has_as_many_columns_as_its_heading() {
        let text = tables(&measured(1500.0, [1.0; 3]), &Plan::FULL);
        let columns = |line: &str| line.matches('|').count();
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
        let cells = Plan::FULL.cells().len();
        assert_eq!(lines.len(), cells * (SUBJECTS.len() + 2) + cells + 2);
        let (servers, ratios) = lines.split_at(cells * (SUBJECTS.len() + 2));
        assert!(servers.iter().all(|line| columns(line) == HEADINGS.len() + 1), "{text}");
        assert!(ratios.iter().all(|line| columns(line) == 11), "{text}");
        assert!(ratios.iter().skip(2).all(|line| line.contains("| 0.67 | 1.50 |")), "{text}");
    }

    #[test]
    fn what_is_lost_and_missed_is_named() {
        let text = verdict(&measured(500.0, [1.0; 3]));
        assert!(text.contains("best peer's: met in 0 of 18 rows, missed in: R 4k/1 (2.00 ×), "), "{text}");
        assert!(text.contains("IOPS with four connections at least 1.5 ×: met in 0 of 4 rows"), "{text}");
        assert!(
            text.contains(
                "speed: better than every peer in 0 of 18 rows, a tie in 0, worse in: R 4k/1 (0.50 × nbdkit"
            ),
            "{text}"
        );
        assert!(text.contains("p50: better than every peer in 0 of 16 rows"), "{text}");
    }

    #[test]
    fn targets_are_met_and_ties_are_not_won() {
        let better = verdict(&measured(2000.0, [0.98, 1.0, 1.02]));
        assert!(!better.contains("missed in: R") && !better.contains("worse in: R"), "{better}");
        let tie = verdict(&measured(1010.0, [0.98, 1.0, 1.02]));
        assert!(
            tie.contains("speed: better than every peer in 0 of 18 rows, a tie in 18, worse in: none"),
            "{tie}"
        );
    }

    #[test]
    fn a_load_that_is_the_limit_hides_no_target_that_was_met() {
        let limited = |ours: f64| {
            let mut rows = measured(ours, [1.0; 3]);
            rows.iter_mut().for_each(|row| row.load_cpus = 0.97);
            verdict(&rows)
        };
        let text = limited(1100.0);
        assert!(text.contains("1.5 ×: met in 0 of 4 rows, missed in: none; cannot be told"), "{text}");
        assert!(limited(1600.0).contains("1.5 ×: met in 4 of 4 rows, missed in: none."), "{text}");
    }
}
