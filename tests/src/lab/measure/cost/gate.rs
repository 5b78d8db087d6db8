//! The regression gate in `cargo lab test`: what an I/O over `fused` costs, as a ratio to the floor of the same run, must not
//! grow, whatever a copied byte costs.
//!
//! Called by `commands` (as a part of the tests) and by `lab::cost` (which keeps new ratios). A ratio to the same run's floor
//! moves neither with the machine nor, much, with the kernel. There is one for each price of a copied byte (`price`): one more
//! copy shows most at the highest, more instructions at the lowest. The committed ratios are those of the measured table: one run
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
use super::price::{Counted, FAIR, PRICES, Price};
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
const REPETITIONS: usize = 2;

const FUSED: Subject = Subject::Ours(DataPath::Fused);

/// Ratios to the floor, by the cell's heading, then by the price of a copied byte.
type Ratios = BTreeMap<String, BTreeMap<String, f64>>;

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
        let costs = Costs::of(measurement, Cell::from_heading(heading)?)?;
        let kept = |price: Price| (price.name.to_owned(), (costs.ratio(price) * 1000.0).round() / 1000.0);
        ratios.insert(heading.to_owned(), PRICES.map(kept).into());
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

/// What is compared in a cell: the cheapest repetition of each machine.
struct Costs {
    fused: Counted,
    floor: Counted,
}

impl Costs {
    /// # Errors
    /// A row or the cell was not measured.
    fn of(measurement: &Measurement, cell: Cell) -> Result<Self> {
        let least = |subject: Subject| {
            let named = || format!("{} of {} was not measured", cell.heading(), subject.title());
            measurement.counted_as(subject, cell, Measured::least).with_context(named)
        };
        let [device, exchange] = Subject::FLOOR;
        Ok(Self { fused: least(FUSED)?, floor: least(device)? + least(exchange)? })
    }

    fn ratio(&self, price: Price) -> f64 {
        self.fused.cost(price) / self.floor.cost(price)
    }
}

/// How far from the floor the cell is; an error if that is further than committed at any price.
fn judged(measurement: &Measurement, committed: &Ratios, cell: Cell) -> Result<String> {
    let heading = cell.heading();
    let costs = Costs::of(measurement, cell)?;
    let mut compared = Vec::new();
    let (mut worst_percent, mut fair_percent) = (f64::MIN, 0.0);
    for price in PRICES {
        let before = committed.get(&heading).and_then(|ratios| ratios.get(price.name));
        let before =
            *before.with_context(|| format!("{COMMITTED} lacks {heading} at {} a byte", price.name))?;
        let now = costs.ratio(price);
        let worse_percent = (now / before - 1.0) * 100.0;
        compared.push(format!("{now:.3} ({before:.3}, {worse_percent:+.1} %) at {}", price.name));
        worst_percent = worse_percent.max(worst_percent);
        if price == FAIR {
            fair_percent = worse_percent;
        }
    }
    let as_counted = costs.fused.plain / costs.floor.plain;
    let mut said = format!(
        "{heading}: times the floor of this run (committed, worse by), by instructions for a copied byte: {}; as counted {as_counted:.3}",
        compared.join(", ")
    );
    anyhow::ensure!(worst_percent <= WORSE_PERCENT_MAX, "{said}; if that is meant: cargo lab cost --write");
    if fair_percent < -WORSE_PERCENT_MAX {
        said.push_str("\nthat is better than committed; to keep it: cargo lab cost --write");
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{measurement, measurement_of};
    use super::*;

    /// The same ratio in every cell and at every price.
    fn ratios(value: f64) -> Ratios {
        let by_price = PRICES.map(|price| (price.name.to_owned(), value));
        WATCHED.iter().map(|heading| ((*heading).to_owned(), by_price.clone().into())).collect()
    }

    #[test]
    fn a_ratio_may_be_five_per_cent_worse_and_no_more() {
        let cell = Cell::from_heading("R 4k/16").unwrap();
        let measured = measurement(&[(FUSED, 42.0), (Subject::UblkNull, 15.0), (Subject::Tcp, 5.0)]);
        assert!(judged(&measured, &ratios(2.01), cell).is_ok());
        assert!(judged(&measured, &ratios(3.0), cell).unwrap().contains("better than committed"));
        let error = judged(&measured, &ratios(1.99), cell).unwrap_err().to_string();
        assert!(error.contains("2.100 (1.990, +5.5 %)"), "{error}");
    }

    #[test]
    fn a_ratio_that_is_worse_at_one_price_is_worse() {
        let cell = Cell::from_heading("R 128k/16").unwrap();
        // `fused` copies 128 thousand bytes, the floor none: 100 to 100 without its copies, which add 16, 32 or 48.
        let fused = Counted { plain: 116.0, users: 228.0, all: 228.0 };
        let still = |value| Counted { plain: value, users: value, all: value };
        let measured =
            measurement_of(&[(FUSED, fused), (Subject::UblkNull, still(60.0)), (Subject::Tcp, still(40.0))]);
        let mut committed = ratios(1.0);
        let at = committed.get_mut("R 128k/16").unwrap();
        for (price, ratio) in [("1/8", 1.16), ("1/4", 1.32), ("3/8", 1.48)] {
            at.insert(price.to_owned(), ratio);
        }
        assert!(judged(&measured, &committed, cell).is_ok());
        for price in ["1/8", "1/4", "3/8"] {
            let mut stricter = committed.clone();
            *stricter.get_mut("R 128k/16").unwrap().get_mut(price).unwrap() -= 0.1;
            let error = judged(&measured, &stricter, cell).unwrap_err().to_string();
            assert!(error.contains(&format!("%) at {price}")), "{error}");
            stricter.get_mut("R 128k/16").unwrap().remove(price);
            assert!(judged(&measured, &stricter, cell).is_err(), "a price without a ratio");
        }
    }

    #[test]
    fn the_cheapest_repetition_of_each_machine_counts() {
        let cell = Cell::from_heading("R 4k/16").unwrap();
        let mut measured = measurement(&[(FUSED, 60.0), (Subject::UblkNull, 15.0), (Subject::Tcp, 5.0)]);
        assert!(judged(&measured, &ratios(2.0), cell).is_err());
        for rows in [&mut measured.plain, &mut measured.users, &mut measured.all] {
            rows[0].cells[1].samples.push(40.0);
        }
        assert!(judged(&measured, &ratios(2.0), cell).is_ok());
    }

    #[test]
    fn a_cell_without_a_committed_ratio_is_an_error() {
        let cell = Cell::from_heading("W 4k/16").unwrap();
        let measured = measurement(&[(FUSED, 42.0), (Subject::UblkNull, 15.0), (Subject::Tcp, 5.0)]);
        assert!(judged(&measured, &Ratios::new(), cell).is_err());
    }
}
