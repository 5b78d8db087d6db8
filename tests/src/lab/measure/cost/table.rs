//! The tables that `cargo lab cost` prints and keeps: instructions as counted and with copies at a fair price, `fused` beside its
//! targets and the floor, bytes copied, and calls.
//!
//! Called by `lab::cost`. Makes text of a measurement, and says every cell that is lost: a comparison names the cells it
//! does not win, however small the difference, at whichever price of a copied byte. Owns the targets.

use std::fmt::Write as _;

use ublk_core::DataPath;

use super::Measurement;
use super::price::{Counted, FAIR, PRICES};
use crate::cost_guest::plan::{CallsPerIo, Cell, Subject};

/// What `fused` is meant to cost, thousand instructions per I/O as counted, by cell. They were set from the best that a prototype and
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
    parts.push(bytes_copied(measurement));
    if measurement.plain.iter().flat_map(|row| &row.cells).any(|cell| cell.calls.is_some()) {
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
    let both = |counted: Counted| format!("{} / {}", shown(counted.plain), shown(counted.cost(FAIR)));
    for subject in Subject::all() {
        if subject == Subject::FLOOR[0]
            && let Some(cells) = by_cell(measurement, |cell| measurement.floor(cell).map(both))
        {
            let _ = writeln!(text, "| **floor** (the sum of the next two) | {cells} | |");
        }
        let Some(cells) = by_cell(measurement, |cell| measurement.counted(subject, cell).map(both)) else {
            continue;
        };
        let spreads = measurement.row(subject).into_iter().flat_map(|row| &row.cells);
        let spread = spreads.map(|cell| cell.spread_percent()).fold(0.0, f64::max);
        let _ = writeln!(text, "| {} | {cells} | {spread:.1} % |", subject.title());
    }
    let repetitions =
        measurement.plain.first().and_then(|row| row.cells.first()).map_or(0, |cell| cell.samples.len());
    let _ = writeln!(
        text,
        "\nLeft as counted, right with {} of an instruction for each copied byte. As counted these are means of \
         {repetitions} repetitions; spread is the largest difference between the repetitions of one cell of the row.",
        FAIR.name
    );
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
    let ours = |cell| measurement.counted(FUSED, cell);
    row("as counted", &|cell| ours(cell).map(|ours| shown(ours.plain)));
    row("target", &|cell| Some(format!("{}", target(cell)?)));
    row("above target", &|cell| {
        let (ours, target) = (ours(cell)?.plain, target(cell)?);
        let over_percent = (ours / target - 1.0) * 100.0;
        Some(if ours <= target { "met".to_owned() } else { format!("+{over_percent:.1} %") })
    });
    row("floor, ratio to it", &|cell| {
        let (ours, floor) = (ours(cell)?.plain, measurement.floor(cell)?.plain);
        Some(format!("{}, {:.2}", shown(floor), ours / floor))
    });
    for price in PRICES {
        row(&format!("at {} a byte", price.name), &|cell| ours(cell).map(|ours| shown(ours.cost(price))));
        row("floor, ratio to it", &|cell| {
            let (ours, floor) = (ours(cell)?.cost(price), measurement.floor(cell)?.cost(price));
            Some(format!("{}, {:.2}", shown(floor), ours / floor))
        });
    }
    row("peers that cost less", &|cell| Some(peers_ahead(measurement, cell, ours(cell)?)));
    text
}

/// One cost beside another: by how much it is more, in per cent, at each of [`PRICES`].
struct Beside([f64; PRICES.len()]);

impl Beside {
    fn of(one: Counted, other: Counted) -> Self {
        Self(PRICES.map(|price| (one.cost(price) / other.cost(price) - 1.0) * 100.0))
    }

    /// Whether it is less, whatever a copied byte costs.
    fn is_less(&self) -> bool {
        self.0.iter().all(|&percent| percent < 0.0)
    }

    /// The difference, at the price of the figures; at each where they disagree on which is more.
    fn shown(&self) -> String {
        let by_price = PRICES.iter().zip(self.0);
        let agree = self.is_less() || self.0.iter().all(|&percent| percent >= 0.0);
        let shown = by_price.filter(|(price, _)| !agree || **price == FAIR).map(|(price, percent)| {
            if agree { format!("{percent:+.1} %") } else { format!("{percent:+.1} % at {}", price.name) }
        });
        shown.collect::<Vec<_>>().join(", ")
    }
}

/// The peers that `ours` does not cost less than in a cell, with how much less they cost.
fn peers_ahead(measurement: &Measurement, cell: Cell, ours: Counted) -> String {
    let mut ahead = Vec::new();
    for peer in Subject::PEERS {
        let Some(theirs) = measurement.counted(peer, cell) else { continue };
        if !Beside::of(ours, theirs).is_less() {
            ahead.push(format!("{} ({})", peer.title(), Beside::of(theirs, ours).shown()));
        }
    }
    if ahead.is_empty() { "none".to_owned() } else { ahead.join(", ") }
}

/// Where `fused` costs less and where not: than its targets, the peers, and our other data paths.
fn comparisons(measurement: &Measurement) -> String {
    let mut text = String::new();
    let cells = measurement.cells.len();
    if let Some(lost) = above_target(measurement) {
        let met = cells - lost.len();
        let lost = listed(&lost);
        let _ = writeln!(text, "- Targets, as counted: met in {met} of {cells} cells; not met in: {lost}.");
    }
    let ours = FUSED.title();
    for other in Subject::all().into_iter().filter(|&other| other != FUSED && other.stores()) {
        if let Some(lost) = not_less(measurement, other) {
            let (won, other, lost) = (cells - lost.len(), other.title(), listed(&lost));
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
    if !text.is_empty() {
        let prices = PRICES.map(|price| price.name).join(", ");
        let _ = writeln!(
            text,
            "\nBut for the targets, less is what is less with a copied byte at {prices} of an instruction; \
             the differences are those at {}.",
            FAIR.name
        );
    }
    text
}

/// The cells in which `fused` is above its target; nothing if one has none.
fn above_target(measurement: &Measurement) -> Option<Vec<String>> {
    let mut lost = Vec::new();
    for &cell in &measurement.cells {
        let (ours, target) = (measurement.counted(FUSED, cell)?.plain, target(cell)?);
        if ours > target {
            lost.push(format!("{} (+{:.1} %)", cell.heading(), (ours / target - 1.0) * 100.0));
        }
    }
    Some(lost)
}

/// The cells in which `fused` does not cost less than another, with how much more; nothing if one was not measured.
fn not_less(measurement: &Measurement, other: Subject) -> Option<Vec<String>> {
    let mut lost = Vec::new();
    for &cell in &measurement.cells {
        let beside = Beside::of(measurement.counted(FUSED, cell)?, measurement.counted(other, cell)?);
        if !beside.is_less() {
            lost.push(format!("{} ({})", cell.heading(), beside.shown()));
        }
    }
    Some(lost)
}

/// The cells in which a peer costs less than the floor, with how much less.
fn below_the_floor(measurement: &Measurement, peer: Subject) -> Vec<String> {
    let mut below = Vec::new();
    for &cell in &measurement.cells {
        let both = measurement.counted(peer, cell).zip(measurement.floor(cell));
        if let Some(beside) = both.map(|(peer, floor)| Beside::of(peer, floor))
            && beside.is_less()
        {
            below.push(format!("{} ({})", cell.heading(), beside.shown()));
        }
    }
    below
}

/// KiB that are copied for an I/O, as the three machines tell.
fn bytes_copied(measurement: &Measurement) -> String {
    let mut text = heading("KiB copied or cleared per I/O: user memory + kernel", measurement, &[]);
    // Less is noise, and so is less than nothing.
    let kib = |kilobytes: f64| {
        let kib = kilobytes * 1000.0 / 1024.0;
        if kib < 0.95 { "0".to_owned() } else { shown(kib) }
    };
    for subject in Subject::all() {
        let cells = by_cell(measurement, |cell| {
            let counted = measurement.counted(subject, cell)?;
            Some(format!("{} + {}", kib(counted.user_kilobytes()), kib(counted.kernel_kilobytes())))
        });
        if let Some(cells) = cells {
            let _ = writeln!(text, "| {} | {cells} |", subject.title());
        }
    }
    text
}

fn listed(cells: &[String]) -> String {
    if cells.is_empty() { "none".to_owned() } else { cells.join(", ") }
}

/// System calls, SQEs, wake-ups and payload copies of every row.
fn calls(measurement: &Measurement) -> String {
    let mut text = heading("system calls / SQEs / wake-ups / payload copies per I/O", measurement, &[]);
    let mut copies = String::new();
    for subject in Subject::all() {
        let Some(row) = measurement.row(subject) else { continue };
        let cells = by_cell(measurement, |cell| {
            let CallsPerIo { system_calls, sqes, wake_ups } = row.measured(cell)?.calls?;
            Some(format!("{system_calls:.1} / {sqes:.1} / {wake_ups:.1} / {}", subject.copies(cell)))
        });
        let Some(cells) = cells else { continue };
        let _ = writeln!(text, "| {} | {cells} |", subject.title());
        let _ = writeln!(copies, "- {}: {}.", subject.title(), subject.copies_are());
    }
    format!(
        "{text}\nSystem calls, SQEs and wake-ups are counted by tracing, in a pass of their own and without fio's. Payload copies \
         follow from the code; how many bytes they and all others move is counted above:\n\n{copies}"
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
    use super::super::tests::{measurement, measurement_of};
    use super::*;

    /// `fused` costs 50 in every cell but `W 4k/16`, where it costs 66.
    fn with_others(others: &[(Subject, f64)]) -> Measurement {
        let mut measured = measurement(&[&[(FUSED, 50.0)], others].concat());
        for rows in [&mut measured.plain, &mut measured.users, &mut measured.all] {
            rows[0].cells[6].samples = vec![66.0];
        }
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
            peers_ahead(&measured, cell, measured.counted(FUSED, cell).unwrap())
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
        assert!(text.contains("NVMe/TCP") && text.contains("3.0 / 4.0 / 2.5 / 2"), "{text}");
    }

    /// `fused` copies 100 thousand bytes within the kernel, `user-copy` twice as many to and from user memory.
    #[test]
    fn what_depends_on_the_price_of_a_byte_is_not_less() {
        let fused = Counted { plain: 137.5, users: 137.5, all: 200.0 };
        let other = |rest| Counted { plain: rest + 25.0, users: rest + 200.0, all: rest + 200.0 };
        let beside = |rest| {
            let measured =
                measurement_of(&[(FUSED, fused), (Subject::Ours(DataPath::UserCopy), other(rest))]);
            text("Linux", &measured)
        };
        let words = |won: u32| format!("`user-copy`: less in {won} of 10 cells; not less in: ");
        let text = beside(100.0);
        assert!(text.contains("| 138 / 125 |") && text.contains("| 125 / 150 |"), "{text}");
        assert!(
            text.contains(&format!("{}none.", words(10))),
            "more as counted, less at every price: {text}"
        );
        assert!(text.contains("| 0 + 97.7 |") && text.contains("| 195 + 0 |"), "{text}");
        let text = beside(80.0);
        let depends = "R 4k/1 (+7.1 % at 1/8, -3.8 % at 1/4, -11.3 % at 3/8)";
        assert!(text.contains(&format!("{}{depends}", words(0))), "{text}");
        let text = beside(30.0);
        assert!(text.contains(&format!("{}R 4k/1 (+56.2 %)", words(0))), "{text}");
    }
}
