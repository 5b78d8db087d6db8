//! The tables that `cargo lab cost` prints and keeps: instructions, `fused` beside its targets and the floor, and calls.
//!
//! Called by `lab::cost`. Makes text of a measurement, and says every cell that is lost: a comparison names the cells it
//! does not win, however small the difference. Owns the targets.

use std::fmt::Write as _;

use ublk_core::DataPath;

use super::Measurement;
use crate::cost_guest::plan::{Cell, Subject};

/// What `fused` is meant to cost, thousand instructions per I/O, by cell. They were set from the best that a prototype and
/// the peers reached, and from the floor under both.
const TARGETS: [(&str, f64); 10] = [
    ("R 4k/1", 74.0),
    ("R 4k/16", 28.0),
    ("R 128k/1", 198.0),
    ("R 128k/16", 165.0),
    ("R 512k/4", 590.0),
    ("W 4k/1", 74.0),
    ("W 4k/16", 33.0),
    ("W 128k/1", 200.0),
    ("W 128k/16", 172.0),
    ("W 512k/4", 570.0),
];

const FUSED: Subject = Subject::Ours(DataPath::Fused);

/// Everything, below a line that says on what it was measured.
pub(super) fn text(machine: &str, measurement: &Measurement) -> String {
    let mut parts = vec![machine.to_owned(), instructions(measurement)];
    if measurement.row(FUSED).is_some() {
        parts.push(targets(measurement));
        parts.push(comparisons(measurement));
    }
    if measurement.rows.iter().flat_map(|row| &row.cells).any(|cell| cell.system_calls.is_some()) {
        parts.push(calls(measurement));
    }
    parts.retain(|part| !part.is_empty());
    parts.join("\n")
}

fn heading(first: &str, measurement: &Measurement, further: &[&str]) -> String {
    let headings: Vec<String> = measurement.cells.iter().map(|cell| cell.heading()).collect();
    let columns: Vec<&str> = headings.iter().map(String::as_str).chain(further.iter().copied()).collect();
    format!("| {first} | {} |\n| --- |{}\n", columns.join(" | "), " ---: |".repeat(columns.len()))
}

/// Thousand instructions per I/O of every row, and the floor.
fn instructions(measurement: &Measurement) -> String {
    let mut text = heading("thousand instructions per I/O", measurement, &["spread"]);
    for subject in Subject::all() {
        if subject == Subject::FLOOR[0]
            && let Some(cells) = by_cell(measurement, |cell| measurement.floor(cell).map(shown))
        {
            let _ = writeln!(text, "| **floor** (the sum of the next two) | {cells} | |");
        }
        let Some(row) = measurement.row(subject) else { continue };
        let Some(cells) = by_cell(measurement, |cell| measurement.thousands(subject, cell).map(shown)) else {
            continue;
        };
        let spread = row.cells.iter().map(|cell| cell.spread_percent()).fold(0.0, f64::max);
        let _ = writeln!(text, "| {} | {cells} | {spread:.1} % |", subject.title());
    }
    let repetitions =
        measurement.rows.first().and_then(|row| row.cells.first()).map_or(0, |c| c.samples.len());
    let _ = write!(text, "\nMeans of {repetitions} repetitions; spread is the largest difference between ");
    text.push_str("the repetitions of one cell of the row.\n");
    text
}

/// `fused` beside its targets, this run's floor, and the peers that cost less.
fn targets(measurement: &Measurement) -> String {
    let mut text = heading("`fused`", measurement, &[]);
    let mut row = |name: &str, value: &dyn Fn(Cell) -> Option<String>| {
        if let Some(cells) = by_cell(measurement, value) {
            let _ = writeln!(text, "| {name} | {cells} |");
        }
    };
    let ours = |cell| measurement.thousands(FUSED, cell);
    row("measured", &|cell| ours(cell).map(shown));
    row("target", &|cell| Some(format!("{}", target(cell)?)));
    row("above target", &|cell| {
        let (ours, target) = (ours(cell)?, target(cell)?);
        let over_percent = (ours / target - 1.0) * 100.0;
        Some(if ours <= target { "met".to_owned() } else { format!("+{over_percent:.1} %") })
    });
    row("floor", &|cell| measurement.floor(cell).map(shown));
    row("ratio to the floor", &|cell| Some(format!("{:.2}", ours(cell)? / measurement.floor(cell)?)));
    row("peers that cost less", &|cell| Some(peers_ahead(measurement, cell, ours(cell)?)));
    text
}

/// The peers that cost no more than `ours` in a cell, with how much less.
fn peers_ahead(measurement: &Measurement, cell: Cell, ours: f64) -> String {
    let mut ahead = Vec::new();
    for peer in Subject::PEERS {
        if let Some(theirs) = measurement.thousands(peer, cell).filter(|&theirs| theirs <= ours) {
            ahead.push(format!("{} (-{:.1} %)", peer.title(), (1.0 - theirs / ours) * 100.0));
        }
    }
    if ahead.is_empty() { "none".to_owned() } else { ahead.join(", ") }
}

/// Where `fused` costs less and where not: than its targets, the peers, and our other data paths.
fn comparisons(measurement: &Measurement) -> String {
    let mut text = String::new();
    let above = |limit: &dyn Fn(Cell) -> Option<f64>, equal_is_lost: bool| -> Option<(usize, Vec<String>)> {
        let mut lost = Vec::new();
        for &cell in &measurement.cells {
            let (ours, limit) = (measurement.thousands(FUSED, cell)?, limit(cell)?);
            if ours > limit || (equal_is_lost && ours >= limit) {
                lost.push(format!("{} (+{:.1} %)", cell.heading(), (ours / limit - 1.0) * 100.0));
            }
        }
        Some((measurement.cells.len() - lost.len(), lost))
    };
    let cells = measurement.cells.len();
    if let Some((met, lost)) = above(&target, false) {
        let _ = writeln!(text, "- Targets: met in {met} of {cells} cells; not met in: {}.", listed(&lost));
    }
    let ours = FUSED.title();
    for other in Subject::all().into_iter().filter(|&other| other != FUSED && other.stores()) {
        if let Some((won, lost)) = above(&|cell| measurement.thousands(other, cell), true) {
            let (other, lost) = (other.title(), listed(&lost));
            let _ = writeln!(
                text,
                "- {ours} beside {other}: less in {won} of {cells} cells; not less in: {lost}."
            );
        }
    }
    for peer in Subject::PEERS {
        let below = below_the_floor(measurement, peer);
        if !below.is_empty() {
            let (peer, below) = (peer.title(), listed(&below));
            let _ =
                writeln!(text, "- {peer} costs less than the floor of every daemon behind ublk in: {below}.");
        }
    }
    text
}

/// The cells in which a peer costs less than the floor, with how much less.
fn below_the_floor(measurement: &Measurement, peer: Subject) -> Vec<String> {
    let mut below = Vec::new();
    for &cell in &measurement.cells {
        if let Some((peer, floor)) = measurement.thousands(peer, cell).zip(measurement.floor(cell))
            && peer < floor
        {
            below.push(format!("{} (-{:.1} %)", cell.heading(), (1.0 - peer / floor) * 100.0));
        }
    }
    below
}

fn listed(cells: &[String]) -> String {
    if cells.is_empty() { "none".to_owned() } else { cells.join(", ") }
}

/// System calls, SQEs and payload copies of every row.
fn calls(measurement: &Measurement) -> String {
    let mut text = heading("system calls / SQEs / payload copies per I/O", measurement, &[]);
    let mut copies = String::new();
    for subject in Subject::all() {
        let Some(row) = measurement.row(subject) else { continue };
        let cells = by_cell(measurement, |cell| {
            let measured = row.measured(cell)?;
            let (calls, sqes) = (measured.system_calls?, measured.sqes?);
            Some(format!("{calls:.1} / {sqes:.1} / {}", subject.copies(cell)))
        });
        let Some(cells) = cells else { continue };
        let _ = writeln!(text, "| {} | {cells} |", subject.title());
        let _ = writeln!(copies, "- {}: {}.", subject.title(), subject.copies_are());
    }
    format!(
        "{text}\nSystem calls and SQEs are counted by tracing, in a pass of their own and without fio's. Payload copies \
         are not counted but follow from the code:\n\n{copies}"
    )
}

/// One text for each cell, or none if a cell has none.
fn by_cell(measurement: &Measurement, value: impl Fn(Cell) -> Option<String>) -> Option<String> {
    let cells: Option<Vec<String>> = measurement.cells.iter().map(|&cell| value(cell)).collect();
    Some(cells?.join(" | "))
}

fn target(cell: Cell) -> Option<f64> {
    let heading = cell.heading();
    TARGETS.into_iter().find(|(name, _)| *name == heading).map(|(_, target)| target)
}

/// A number with as many digits as the spread leaves meaningful.
fn shown(thousands: f64) -> String {
    if thousands < 100.0 { format!("{thousands:.1}") } else { format!("{thousands:.0}") }
}

#[cfg(test)]
mod tests {
    use super::super::tests::measurement;
    use super::*;

    /// `fused` costs 50 in every cell but `W 4k/16`, where it costs 66.
    fn with_others(others: &[(Subject, f64)]) -> Measurement {
        let mut measured = measurement(&[&[(FUSED, 50.0)], others].concat());
        measured.rows[0].cells[6].samples = vec![66.0];
        measured
    }

    #[test]
    fn every_cell_has_a_target() {
        assert!(Cell::all().all(|cell| target(cell).is_some()));
    }

    #[test]
    fn a_lost_cell_is_named_with_how_much_it_loses() {
        let text =
            comparisons(&with_others(&[(Subject::NvmeTcp, 60.0), (Subject::KernelNbdAndNbdkit, 50.0)]));
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].contains("met in 8 of 10 cells; not met in: R 4k/16 (+78.6 %), W 4k/16 (+100.0 %)."),
            "{text}"
        );
        assert!(lines[1].contains("less in 0 of 10 cells"), "equal is not less: {text}");
        assert!(lines[2].ends_with("less in 9 of 10 cells; not less in: W 4k/16 (+10.0 %)."), "{text}");
    }

    #[test]
    fn a_peer_ahead_is_named_in_its_cell() {
        let measured = with_others(&[(Subject::NvmeTcp, 60.0)]);
        let of = |heading| {
            let cell = Cell::from_heading(heading).unwrap();
            peers_ahead(&measured, cell, measured.thousands(FUSED, cell).unwrap())
        };
        assert_eq!(of("W 4k/16"), "kernel NVMe/TCP + nvmet + brd (-9.1 %)");
        assert_eq!(of("R 4k/16"), "none");
    }

    #[test]
    fn a_peer_below_the_floor_is_said() {
        let floor = [(Subject::UblkNull, 40.0), (Subject::Tcp, 35.0)];
        let text = comparisons(&with_others(&[&floor[..], &[(Subject::NvmeTcp, 60.0)]].concat()));
        assert!(text.contains("NVMe/TCP + nvmet + brd costs less than the floor"), "{text}");
        assert!(text.contains("R 4k/1 (-20.0 %)"), "{text}");
        let text = comparisons(&with_others(&[&floor[..], &[(Subject::NvmeTcp, 75.0)]].concat()));
        assert!(!text.contains("costs less than the floor"), "equal is not less: {text}");
    }

    #[test]
    fn a_run_of_some_rows_says_nothing_of_the_others() {
        let text = text("Linux", &measurement(&[(Subject::NvmeTcp, 60.0)]));
        assert!(!text.contains("floor**") && !text.contains("Targets"), "{text}");
        assert!(text.contains("NVMe/TCP") && text.contains("3.0 / 4.0 / 2"), "{text}");
    }
}
