//! `cargo lab cost`: instructions per I/O of the whole system, as a table.
//!
//! Builds the product as it is shipped (the release profile) and the floor with the same profile, boots the machine that
//! counts instructions, lets `cost_guest` measure there, prints the tables (`table`) and, if told to, puts them between the
//! markers in `docs/performance.md` and keeps the ratios that `cargo lab test` watches (`gate`). Called by `commands`. With
//! neither `--rows` nor `--cells` a row that is missing is an error, never a gap: no number is kept from an earlier run.

pub(crate) mod gate;
mod table;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use testlab::kernel_series::KernelSeries;

use super::guest_command::GuestCommand;
use super::measurement::BuildBeside;
use super::vm::Processors;
use super::workspace::Workspace;
use super::{kernels, measurement, packages};
use crate::cost_guest::ROW_PREFIX;
use crate::cost_guest::plan::{Cell, Plan, REPETITIONS, Row, Subject};

/// The profile whose programs are measured: optimised, no assertions.
const PROFILE: &str = "release";

/// The programs that are measured, and the floor.
const PROGRAMS: [&str; 4] = ["volserver", "volclient", "volctl", "floor"];

/// From QEMU's start to its end: some two minutes for each row, more where others use the machine.
const RUN_DEADLINE: Duration = Duration::from_secs(90 * 60);

const BEGIN: &str = "<!-- begin: cargo lab cost --write -->\n";
const END: &str = "<!-- end: cargo lab cost --write -->\n";
const SIZES_BEGIN: &str = "<!-- begin: cargo lab cost --sizes --write -->\n";
const SIZES_END: &str = "<!-- end: cargo lab cost --sizes --write -->\n";

/// Options of `cargo lab cost`.
#[derive(Args)]
pub(crate) struct CostOptions {
    /// Compare the ways that pages can be lent and copied, by size from 4 KiB to 1 MiB, instead
    #[arg(long, conflicts_with_all = ["rows", "cells"])]
    sizes: bool,
    /// Also update the tables in docs/performance.md and the ratios that `cargo lab test` watches
    #[arg(long, conflicts_with_all = ["rows", "cells", "no_build", "no_calls"])]
    write: bool,
    /// Only these rows, by comma: a data path, nbd-nbdkit, nbd-volserver, nvme-tcp, ublk-null, tcp, null-blk, or a group
    /// of them: ours, peers, floor
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Only these columns, by comma, such as 'R 4k/16,W 128k/1'
    #[arg(long, value_delimiter = ',')]
    cells: Vec<String>,
    /// How often each cell is measured
    #[arg(long, default_value_t = REPETITIONS)]
    repetitions: usize,
    /// Measure what was built last
    #[arg(long)]
    no_build: bool,
    /// Do not count system calls and SQEs
    #[arg(long)]
    no_calls: bool,
}

/// What a run of the machine measured.
pub(crate) struct Measurement {
    /// The kernel's.
    release: String,
    rows: Vec<Row>,
    cells: Vec<Cell>,
}

impl Measurement {
    fn row(&self, subject: Subject) -> Option<&Row> {
        self.rows.iter().find(|row| row.key == subject.key())
    }

    /// Thousand instructions per I/O.
    fn thousands(&self, subject: Subject, cell: Cell) -> Option<f64> {
        Some(self.row(subject)?.measured(cell)?.mean())
    }

    /// Thousand instructions that an I/O cannot do without: the sum of the floor's parts.
    fn floor(&self, cell: Cell) -> Option<f64> {
        Subject::FLOOR.into_iter().map(|part| self.thousands(part, cell)).sum()
    }
}

/// Measures, prints the tables; with `write`, also updates the document and the committed ratios.
///
/// # Errors
/// The product does not build, the machine fails, or a row is missing.
pub(crate) fn run(workspace: &Workspace, options: &CostOptions) -> Result<()> {
    let (subjects, cells) = what(options)?;
    ensure!(options.repetitions > 0, "a cell has to be measured at least once");
    if !options.no_build {
        build(workspace)?;
    }
    let measured = measure(workspace, &subjects, &cells, options.repetitions, !options.no_calls)?;
    let text = table::text(&measurement::machine_line(&measured.release)?, &measured);
    print!("{text}");
    if options.write {
        let (begin, end) = if options.sizes { (SIZES_BEGIN, SIZES_END) } else { (BEGIN, END) };
        measurement::keep(workspace, begin, end, &text)?;
        if !options.sizes {
            gate::commit(workspace, &measured)?;
        }
    }
    Ok(())
}

/// The rows and columns that were asked for.
fn what(options: &CostOptions) -> Result<(Vec<Subject>, Vec<Cell>)> {
    if options.sizes {
        return Ok((Subject::BY_SIZE.to_vec(), Cell::by_size().collect()));
    }
    let subjects = if options.rows.is_empty() { Subject::all() } else { Subject::from_words(&options.rows)? };
    let cells: Result<Vec<Cell>> =
        options.cells.iter().map(|heading| Cell::from_heading(heading.trim())).collect();
    Ok((subjects, if options.cells.is_empty() { Cell::all().collect() } else { cells? }))
}

/// Builds what is measured.
///
/// # Errors
/// It does not build; cargo has said why.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    measurement::build_programs(workspace, PROFILE, &PROGRAMS)
}

/// Begins to build it beside other work.
///
/// # Errors
/// As [`BuildBeside::start`].
pub(crate) fn build_beside(workspace: &Workspace) -> Result<BuildBeside> {
    BuildBeside::start(workspace, PROFILE, &PROGRAMS)
}

/// Boots the machine and measures in it what was built.
///
/// # Errors
/// The machine fails, or a row or a cell is missing: with all that was measured until then.
pub(crate) fn measure(
    workspace: &Workspace,
    subjects: &[Subject],
    cells: &[Cell],
    repetitions: usize,
    counts_calls: bool,
) -> Result<Measurement> {
    let this_program = workspace.own_program();
    packages::ensure_installed(workspace)?;
    let kernel = kernels::ensure_cached(workspace, KernelSeries::V7)?;
    let programs = workspace.target.join(PROFILE);
    let plan = serde_json::to_string(&Plan::new(subjects, cells, repetitions, counts_calls))?;
    let mut words =
        [&this_program, Path::new("guest-cost"), &programs].map(|word| word.display().to_string()).to_vec();
    words.push(plan);
    let command = GuestCommand::new(workspace, words)?.in_directory(&workspace.root);
    let stdout = measurement::guest_output(workspace, &kernel, &command, Processors::Counted, RUN_DEADLINE)?;
    let rows = rows(&stdout, subjects.len(), cells.len())?;
    Ok(Measurement { release: kernel.release, rows, cells: cells.to_vec() })
}

fn rows(stdout: &str, want_rows: usize, want_cells: usize) -> Result<Vec<Row>> {
    let lines = stdout.lines().filter_map(|line| line.strip_prefix(ROW_PREFIX));
    let rows: Vec<Row> = lines.map(serde_json::from_str).collect::<Result<_, _>>().context("a row")?;
    ensure!(rows.len() == want_rows, "{} rows of {want_rows} were measured\n{stdout}", rows.len());
    ensure!(rows.iter().all(|row| row.cells.len() == want_cells), "a row lacks a column\n{stdout}");
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost_guest::plan::Measured;

    /// What a run would have measured: rows of one value in every cell.
    pub(super) fn measurement(rows: &[(Subject, f64)]) -> Measurement {
        let cells: Vec<Cell> = Cell::all().collect();
        let measured = |cell: &Cell, value| Measured {
            heading: cell.heading(),
            samples: vec![value],
            system_calls: Some(3.0),
            sqes: Some(4.0),
        };
        let row = |&(subject, value): &(Subject, f64)| Row {
            key: subject.key().to_owned(),
            cells: cells.iter().map(|cell| measured(cell, value)).collect(),
        };
        Measurement { release: "7.3".to_owned(), rows: rows.iter().map(row).collect(), cells }
    }

    #[test]
    fn a_missing_row_is_an_error() {
        let measured = measurement(&[(Subject::UblkNull, 1.0), (Subject::Tcp, 2.0)]);
        let line = |row: &Row| format!("{ROW_PREFIX}{}\n", serde_json::to_string(row).unwrap());
        let printed: String = measured.rows.iter().map(line).collect();
        let columns = measured.cells.len();
        assert_eq!(rows(&format!("--- log of a daemon\n{printed}"), 2, columns).unwrap().len(), 2);
        assert!(rows(&printed, 3, columns).is_err());
        assert!(rows(&printed, 2, columns + 1).is_err());
    }

    #[test]
    fn the_floor_is_the_sum_of_its_parts_or_unknown() {
        let cell = Cell::from_heading("R 4k/16").unwrap();
        let both = measurement(&[(Subject::UblkNull, 17.0), (Subject::Tcp, 5.0)]);
        assert_eq!(both.floor(cell), Some(22.0));
        assert_eq!(measurement(&[(Subject::Tcp, 5.0)]).floor(cell), None);
    }
}
