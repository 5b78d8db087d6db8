//! `cargo lab cost`: instructions per I/O of the whole system, as a table.
//!
//! Builds the product as it is shipped (the release profile) and the floor with the same profile, boots three machines that
//! count instructions and differ in how memory is copied (`price`), lets `cost_guest` measure in each, prints the tables
//! (`table`) and, if told to, puts them between the markers in `docs/performance.md` and keeps the ratios that `cargo lab test`
//! watches (`gate`). Called by `commands`. With neither `--rows` nor `--cells` a row that is missing is an error, never a gap:
//! no number is kept from an earlier run.

pub(crate) mod gate;
mod price;
mod table;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use testlab::kernel_series::KernelSeries;

use super::measurement;
use crate::cost_guest::plan::{Cell, Measured, Plan, REPETITIONS, Row, Subject};
use crate::cost_guest::{PROGRAMS, ROW_PREFIX};
use crate::lab::machine::guest_command::GuestCommand;
use crate::lab::machine::kernels::Kernel;
use crate::lab::machine::vm::{ByteCopies, PROGRAMS_BYTE_COPY_MIN, Processors};
use crate::lab::machine::{kernels, packages};
use crate::lab::programs::{self, BuildBeside};
use crate::lab::workspace::Workspace;
use price::Counted;

/// The profile whose programs are measured: optimised, no assertions.
const PROFILE: &str = "release";

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

/// What a run of the machines measured.
pub(crate) struct Measurement {
    /// The kernel's.
    release: String,
    /// By the machine in which nobody copies byte by byte; calls are counted in it.
    plain: Vec<Row>,
    /// By the machine of [`ByteCopies::Users`].
    users: Vec<Row>,
    /// By the machine of [`ByteCopies::All`].
    all: Vec<Row>,
    cells: Vec<Cell>,
}

impl Measurement {
    /// A subject's row of one machine.
    fn row_of(&self, copies: ByteCopies, subject: Subject) -> Option<&Row> {
        let rows = match copies {
            ByteCopies::None => &self.plain,
            ByteCopies::Users => &self.users,
            ByteCopies::All => &self.all,
        };
        rows.iter().find(|row| row.key == subject.key())
    }

    /// A subject's row with its calls.
    fn row(&self, subject: Subject) -> Option<&Row> {
        self.row_of(ByteCopies::None, subject)
    }

    /// One number of a cell's repetitions, by machine.
    fn counted_as(&self, subject: Subject, cell: Cell, number: fn(&Measured) -> f64) -> Option<Counted> {
        Counted::by_machine(|copies| self.row_of(copies, subject)?.measured(cell).map(number))
    }

    /// Thousand instructions per I/O.
    fn counted(&self, subject: Subject, cell: Cell) -> Option<Counted> {
        self.counted_as(subject, cell, Measured::mean)
    }

    /// Thousand instructions that an I/O cannot do without: the sum of the floor's parts.
    fn floor(&self, cell: Cell) -> Option<Counted> {
        let [device, exchange] = Subject::FLOOR.map(|part| self.counted(part, cell));
        Some(device? + exchange?)
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
    programs::build(workspace, PROFILE, &PROGRAMS)
}

/// Begins to build it beside other work.
///
/// # Errors
/// As [`BuildBeside::start`].
pub(crate) fn build_beside(workspace: &Workspace) -> Result<BuildBeside> {
    BuildBeside::start(workspace, PROFILE, &PROGRAMS)
}

/// Boots the machines one after the other and measures in each what was built.
///
/// # Errors
/// A machine fails, or a row or a cell is missing: with all that it measured until then.
fn measure(
    workspace: &Workspace,
    subjects: &[Subject],
    cells: &[Cell],
    repetitions: usize,
    counts_calls: bool,
) -> Result<Measurement> {
    packages::ensure_installed(workspace)?;
    let kernel = kernels::ensure_cached(workspace, KernelSeries::V7)?;
    let in_machine = |copies: ByteCopies, plan: Plan| {
        let stdout = guest_output(workspace, &kernel, copies, &plan.on_a_processor_with(copies.flags()))?;
        rows(&stdout, subjects.len(), cells.len())
    };
    let plain = in_machine(ByteCopies::None, Plan::new(subjects, cells, repetitions, counts_calls))?;
    let users = in_machine(ByteCopies::Users, Plan::again(subjects, cells))?;
    let all = in_machine(ByteCopies::All, Plan::again(subjects, cells))?;
    Ok(Measurement { release: kernel.release, plain, users, all, cells: cells.to_vec() })
}

/// Boots one machine, in which a plan is carried out; gives what it printed.
fn guest_output(workspace: &Workspace, kernel: &Kernel, copies: ByteCopies, plan: &Plan) -> Result<String> {
    let (this_program, programs) = (workspace.own_program(), workspace.target.join(PROFILE));
    let mut words =
        [&this_program, Path::new("guest-cost"), &programs].map(|word| word.display().to_string()).to_vec();
    words.push(serde_json::to_string(plan)?);
    let tunables = format!("glibc.cpu.x86_rep_movsb_threshold={PROGRAMS_BYTE_COPY_MIN}");
    let command = GuestCommand::new(workspace, words)?
        .in_directory(&workspace.root)
        .with_variable("GLIBC_TUNABLES", &tunables);
    measurement::guest_output(workspace, kernel, &command, Processors::Counted(copies), RUN_DEADLINE)
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
    use crate::cost_guest::plan::CallsPerIo;

    /// What a run would have measured: rows of one value in every cell and machine, in which nothing is copied.
    pub(super) fn measurement(rows: &[(Subject, f64)]) -> Measurement {
        let still = |&(subject, value): &(Subject, f64)| {
            (subject, Counted { plain: value, users: value, all: value })
        };
        measurement_of(&rows.iter().map(still).collect::<Vec<_>>())
    }

    /// Rows of the same values in every cell.
    pub(super) fn measurement_of(rows: &[(Subject, Counted)]) -> Measurement {
        let cells: Vec<Cell> = Cell::all().collect();
        let calls = CallsPerIo { system_calls: 3.0, sqes: 4.0, wake_ups: 2.5 };
        let measured = |cell: &Cell, value| Measured {
            heading: cell.heading(),
            samples: vec![value],
            calls: Some(calls),
        };
        let row = |subject: Subject, value: f64| Row {
            key: subject.key().to_owned(),
            cells: cells.iter().map(|cell| measured(cell, value)).collect(),
        };
        let of = |number: fn(&Counted) -> f64| -> Vec<Row> {
            rows.iter().map(|(subject, counted)| row(*subject, number(counted))).collect()
        };
        let (plain, users, all) = (of(|c| c.plain), of(|c| c.users), of(|c| c.all));
        Measurement { release: "7.3".to_owned(), plain, users, all, cells }
    }

    #[test]
    fn a_missing_row_is_an_error() {
        let measured = measurement(&[(Subject::UblkNull, 1.0), (Subject::Tcp, 2.0)]);
        let line = |row: &Row| format!("{ROW_PREFIX}{}\n", serde_json::to_string(row).unwrap());
        let printed: String = measured.plain.iter().map(line).collect();
        let columns = measured.cells.len();
        assert_eq!(rows(&format!("--- log of a daemon\n{printed}"), 2, columns).unwrap().len(), 2);
        assert!(rows(&printed, 3, columns).is_err());
        assert!(rows(&printed, 2, columns + 1).is_err());
    }

    #[test]
    fn the_floor_is_the_sum_of_its_parts_or_unknown() {
        let cell = Cell::from_heading("R 4k/16").unwrap();
        let both = measurement(&[(Subject::UblkNull, 17.0), (Subject::Tcp, 5.0)]);
        assert_eq!(both.floor(cell).map(|floor| floor.plain), Some(22.0));
        assert_eq!(measurement(&[(Subject::Tcp, 5.0)]).floor(cell), None);
    }
}
