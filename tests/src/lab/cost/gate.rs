//! The regression gate in `cargo lab test`: what an I/O over `fused` costs, as a ratio to the floor of the same run, must not
//! grow.
//!
//! Called by `commands` (as a part of the tests) and by `lab::cost` (which keeps new ratios). A ratio to the same run's floor
//! moves neither with the machine nor, much, with the kernel. The committed ratios are those of the measured table: one run
//! writes both. On both sides the cheapest repetition counts: how many requests happen to be served at once, and with it the
//! mean, is partly chance; what they can cost is not. Improvement is never a failure, but is said, so that it can be kept.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use testlab::selection::Selection;
use ublk_core::DataPath;

use super::Measurement;
use crate::cost_guest::plan::{Cell, Measured, Subject};
use crate::lab::interrupt;
use crate::lab::report::PartReport;
use crate::lab::workspace::Workspace;

/// Where the committed ratios are, from the workspace's root.
const COMMITTED: &str = "tests/cost_ratios.json";

/// The cells that are watched: those in which our own instructions weigh most.
const WATCHED: [&str; 4] = ["R 4k/16", "R 128k/16", "W 4k/16", "W 128k/16"];

/// More than measurements of one program differ, less than a change worth noticing.
const WORSE_PERCENT_MAX: f64 = 5.0;

/// One that was unlucky does not count.
const REPETITIONS: usize = 3;

const FUSED: Subject = Subject::Ours(DataPath::Fused);

/// Ratios to the floor, by the cell's heading.
type Ratios = BTreeMap<String, f64>;

/// Measures the watched cells whose tests are wanted, and reports one test for each; none where none is.
///
/// # Errors
/// There are no committed ratios, or the lab was interrupted. What cannot be built or measured is a failure in the report.
pub(crate) fn run(workspace: &Workspace, selection: &Selection) -> Result<Option<PartReport>> {
    let mut cells: Vec<Cell> =
        WATCHED.iter().map(|heading| Cell::from_heading(heading)).collect::<Result<_>>()?;
    cells.retain(|&cell| selection.wants(&test_name(cell)));
    // One machine measures all of them.
    cells.retain(|_| selection.has(0));
    if cells.is_empty() {
        return Ok(None);
    }
    let committed = committed(workspace)?;
    let mut part = PartReport::begin("cost").beside_others("cost");
    let started = Instant::now();
    let subjects = [FUSED, Subject::FLOOR[0], Subject::FLOOR[1]];
    let measured = super::build(workspace)
        .and_then(|()| super::measure(workspace, &subjects, &cells, REPETITIONS, false));
    interrupt::check()?;
    match measured {
        Err(error) => part.fail("the measurement", &format!("{error:#}")),
        Ok(measurement) => {
            let seconds = started.elapsed().as_secs_f64() / cells.len() as f64;
            for cell in cells {
                let judged = judged(&measurement, &committed, cell);
                let failure = judged.as_ref().err().map(|error| format!("{error:#}"));
                part.end(&test_name(cell), seconds, failure.as_deref());
                if let Ok(said) = judged {
                    part.say(&said);
                }
            }
        }
    }
    Ok(Some(part.ended()))
}

/// Keeps the ratios of a measurement.
///
/// # Errors
/// It lacks one, or the file cannot be written.
pub(super) fn commit(workspace: &Workspace, measurement: &Measurement) -> Result<()> {
    let mut ratios = Ratios::new();
    for heading in WATCHED {
        let ratio = ratio(measurement, Cell::from_heading(heading)?)?;
        ratios.insert(heading.to_owned(), (ratio * 1000.0).round() / 1000.0);
    }
    let path = path(workspace);
    let text = serde_json::to_string_pretty(&ratios)?;
    fs::write(&path, format!("{text}\n")).with_context(|| path.display().to_string())
}

fn path(workspace: &Workspace) -> PathBuf {
    workspace.root.join(COMMITTED)
}

fn committed(workspace: &Workspace) -> Result<Ratios> {
    let path = path(workspace);
    let text = fs::read(&path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

fn test_name(cell: Cell) -> String {
    let verb = if cell.reads { "reads" } else { "writes" };
    format!(
        "cost::fused_{verb}_of_{}k_{}_deep_are_as_near_to_the_floor_as_before",
        cell.block_kib, cell.depth
    )
}

fn ratio(measurement: &Measurement, cell: Cell) -> Result<f64> {
    let least = |subject: Subject| {
        let measured = measurement.row(subject).and_then(|row| row.measured(cell));
        let named = || format!("{} of {} was not measured", cell.heading(), subject.title());
        measured.map(Measured::least).with_context(named)
    };
    Ok(least(FUSED)? / (least(Subject::FLOOR[0])? + least(Subject::FLOOR[1])?))
}

/// How far from the floor the cell is; an error if that is further than committed.
fn judged(measurement: &Measurement, committed: &Ratios, cell: Cell) -> Result<String> {
    let heading = cell.heading();
    let before = *committed.get(&heading).with_context(|| format!("{COMMITTED} lacks {heading}"))?;
    let now = ratio(measurement, cell)?;
    let worse_percent = (now / before - 1.0) * 100.0;
    let mut said = format!(
        "{heading}: {now:.3} times the floor of this run, committed are {before:.3} ({worse_percent:+.1} %)"
    );
    anyhow::ensure!(worse_percent <= WORSE_PERCENT_MAX, "{said}; if that is meant: cargo lab cost --write");
    if worse_percent < -WORSE_PERCENT_MAX {
        said.push_str("\nthat is better than committed; to keep it: cargo lab cost --write");
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::super::tests::measurement;
    use super::*;

    fn ratios(value: f64) -> Ratios {
        WATCHED.iter().map(|heading| ((*heading).to_owned(), value)).collect()
    }

    #[test]
    fn a_ratio_may_be_five_per_cent_worse_and_no_more() {
        let cell = Cell::from_heading("R 4k/16").unwrap();
        let measured = measurement(&[(FUSED, 42.0), (Subject::UblkNull, 15.0), (Subject::Tcp, 5.0)]);
        assert!(judged(&measured, &ratios(2.01), cell).is_ok());
        assert!(judged(&measured, &ratios(3.0), cell).is_ok(), "better is no failure");
        let error = judged(&measured, &ratios(1.99), cell).unwrap_err().to_string();
        assert!(error.contains("2.100") && error.contains("1.990") && error.contains("+5.5 %"), "{error}");
    }

    #[test]
    fn the_cheapest_repetition_counts() {
        let cell = Cell::from_heading("R 4k/16").unwrap();
        let mut measured = measurement(&[(FUSED, 60.0), (Subject::UblkNull, 15.0), (Subject::Tcp, 5.0)]);
        assert!(judged(&measured, &ratios(2.0), cell).is_err());
        measured.rows[0].cells[1].samples.push(40.0);
        assert!(judged(&measured, &ratios(2.0), cell).is_ok());
    }

    #[test]
    fn a_cell_without_a_committed_ratio_is_an_error() {
        let cell = Cell::from_heading("W 4k/16").unwrap();
        let measured = measurement(&[(FUSED, 42.0), (Subject::UblkNull, 15.0), (Subject::Tcp, 5.0)]);
        assert!(judged(&measured, &Ratios::new(), cell).is_err());
    }
}
