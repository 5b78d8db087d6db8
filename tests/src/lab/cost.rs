//! `cargo lab cost`: instructions per I/O of the whole system, as a table.
//!
//! Builds the product as it is shipped (the release profile), boots the machine that counts instructions, lets
//! `cost_guest` measure there, prints the table and, if told to, puts it between the markers in `docs/performance.md`.
//! Called by `commands`. A row that is missing is an error, never a gap: no number is kept from an earlier run.

use std::fmt::Write as _;
use std::fs;
use std::io::{Write as _, stderr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testlab::kernel_series::KernelSeries;

use super::guest_command::GuestCommand;
use super::vm::{self, Follower, Processors, Stream};
use super::workspace::Workspace;
use super::{kernels, packages, tool};
use crate::cost_guest::{Cell, FUSED, KERNEL_NBD, MAPPED, REPETITIONS, ROW_PREFIX, Row};

/// The profile whose programs are measured: optimised, no assertions.
const PROFILE: &str = "release";

/// Rows that `cost_guest` prints.
const ROWS: usize = 4;

/// The product from nothing with link-time optimisation, on two slow cores that others use, too.
const BUILD_DEADLINE: Duration = Duration::from_secs(30 * 60);

/// From QEMU's start to its end.
const RUN_DEADLINE: Duration = Duration::from_secs(30 * 60);

/// `--version` of a program that works takes no time at all.
const VERSION_DEADLINE: Duration = Duration::from_secs(20);

/// Where the table is kept, from the workspace's root.
const DOCUMENT: &str = "docs/performance.md";
const BEGIN: &str = "<!-- begin: cargo lab cost --write -->\n";
const END: &str = "<!-- end: cargo lab cost --write -->\n";

/// Keeps what the guest prints, shows its progress.
#[derive(Default)]
struct Collector {
    stdout: Vec<u8>,
}

impl Follower for Collector {
    fn output(&mut self, stream: Stream, bytes: &[u8]) -> Result<()> {
        match stream {
            Stream::Stdout => self.stdout.extend(bytes),
            Stream::Stderr => stderr().write_all(bytes).context("passing on the progress")?,
        }
        Ok(())
    }
}

/// Measures, prints the table; with `write`, also updates the document.
///
/// # Errors
/// The product does not build, the machine fails, or a row is missing.
pub(crate) fn run(workspace: &Workspace, write: bool) -> Result<()> {
    // Asked first: the file may be built anew while the product is being built.
    let this_program = std::env::current_exe().context("the lab's own program")?;
    packages::ensure_installed(workspace)?;
    let kernel = kernels::ensure_cached(workspace, KernelSeries::V7)?;
    build(workspace)?;
    let programs = workspace.target.join(PROFILE);
    let words = [&this_program, Path::new("guest-cost"), &programs];
    let words = words.map(|word| word.display().to_string()).to_vec();
    let command = GuestCommand::new(workspace, words)?.in_directory(&workspace.root);
    let mut collector = Collector::default();
    let ended = vm::run(workspace, &kernel, &command, Processors::Counted, RUN_DEADLINE, &mut collector);
    let stdout = String::from_utf8_lossy(&collector.stdout).into_owned();
    let ended = ended.with_context(|| format!("the guest had printed:\n{stdout}"))?;
    ensure!(ended.exit_code == 0, "measuring failed (exit code {})\n{stdout}", ended.exit_code);
    let rows = rows(&stdout)?;
    let text = format!("{}\n{}\n{}", machine(&kernel.release)?, table(&rows), verdict(&rows)?);
    print!("{text}");
    if write {
        let path = workspace.root.join(DOCUMENT);
        let document = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        fs::write(&path, replaced(&document, &text)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn build(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--quiet", "--profile", PROFILE, "--package", "server", "--package", "client"]);
    let mut child = cargo.arg("--bins").stdin(Stdio::null()).spawn().context("cannot run cargo")?;
    let status = tool::wait(&mut child, BUILD_DEADLINE).context("cargo build")?;
    ensure!(status.success(), "the product does not build");
    Ok(())
}

fn rows(stdout: &str) -> Result<Vec<Row>> {
    let lines = stdout.lines().filter_map(|line| line.strip_prefix(ROW_PREFIX));
    let rows: Vec<Row> = lines.map(serde_json::from_str).collect::<Result<_, _>>().context("a row")?;
    ensure!(rows.len() == ROWS, "{} rows of {ROWS} were measured\n{stdout}", rows.len());
    let columns = Cell::all().count();
    ensure!(rows.iter().all(|row| row.thousands.len() == columns), "a row lacks a column\n{stdout}");
    Ok(rows)
}

/// One line that says on what the numbers were made.
fn machine(release: &str) -> Result<String> {
    let version = |program: &str| -> Result<String> {
        let text = tool::output(tool::command(program).arg("--version"), VERSION_DEADLINE)?;
        Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned())
    };
    let (fio, nbdkit, qemu) = (version("fio")?, version("nbdkit")?, version("qemu-system-x86_64")?);
    Ok(format!("Linux {release}, {fio}, {nbdkit}, {qemu}; volnode {}.\n", env!("CARGO_PKG_VERSION")))
}

fn table(rows: &[Row]) -> String {
    let headings: Vec<String> = Cell::all().map(|cell| cell.heading()).collect();
    let mut text = format!("| thousand instructions per I/O | {} | spread |\n", headings.join(" | "));
    let _ = writeln!(text, "| --- |{}", " ---: |".repeat(headings.len() + 1));
    for row in rows {
        let cells: Vec<String> = row.thousands.iter().map(|&value| shown(value)).collect();
        let _ = writeln!(text, "| {} | {} | {:.1} % |", row.name, cells.join(" | "), row.spread_percent);
    }
    let _ = write!(text, "\nMeans of {REPETITIONS} repetitions; spread is the largest difference between ");
    text.push_str("the repetitions of one cell of the row.\n");
    text
}

/// A number with as many digits as the spread leaves meaningful.
fn shown(thousands: f64) -> String {
    if thousands < 100.0 { format!("{thousands:.1}") } else { format!("{thousands:.0}") }
}

/// Where ours cost less and where more than what they replace, and whether the path that copies less also costs less;
/// with every cell that is lost.
fn verdict(rows: &[Row]) -> Result<String> {
    let find = |name: &str| rows.iter().find(|row| row.name == name).context("a row of the verdict");
    let mut text = String::new();
    for (left, right) in [(FUSED, KERNEL_NBD), (MAPPED, KERNEL_NBD), (FUSED, MAPPED)] {
        let (left, right) = (find(left)?, find(right)?);
        let lost: Vec<String> = Cell::all()
            .zip(left.thousands.iter().zip(&right.thousands))
            .filter(|(_, (left, right))| left >= right)
            .map(|(cell, (left, right))| {
                format!("{} (+{:.1} %)", cell.heading(), (left / right - 1.0) * 100.0)
            })
            .collect();
        let cells = right.thousands.len();
        let won = cells - lost.len();
        let lost = if lost.is_empty() { "none".to_owned() } else { lost.join(", ") };
        let (left, right) = (&left.name, &right.name);
        let _ =
            writeln!(text, "- {left} beside {right}: less in {won} of {cells} cells; not less in: {lost}.");
    }
    Ok(text)
}

/// The document with `text` between its markers.
fn replaced(document: &str, text: &str) -> Result<String> {
    let (before, rest) = document.split_once(BEGIN).context("the document lacks the marker of the begin")?;
    let (_, after) = rest.split_once(END).context("the document lacks the marker of the end")?;
    Ok(format!("{before}{BEGIN}\n{text}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, value: f64) -> Row {
        Row { name: name.to_owned(), thousands: vec![value; Cell::all().count()], spread_percent: 0.5 }
    }

    #[test]
    fn a_lost_cell_is_named_with_how_much_it_loses() {
        let mut fused = row(FUSED, 80.0);
        fused.thousands[6] = 110.0;
        let text = verdict(&[fused, row(MAPPED, 100.0), row(KERNEL_NBD, 100.0)]).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with("less in 9 of 10 cells; not less in: W 4k/16 (+10.0 %)."), "{text}");
        assert!(lines[1].contains("less in 0 of 10 cells"), "equal is not less: {text}");
        assert!(lines[2].contains("`mapped`: less in 9 of 10 cells"), "{text}");
    }

    #[test]
    fn a_missing_row_is_an_error() {
        let line = |name: &str| format!("{ROW_PREFIX}{}\n", serde_json::to_string(&row(name, 1.0)).unwrap());
        let printed: String = ["a", "b", "c", "d"].map(line).concat();
        assert_eq!(rows(&format!("--- log of a daemon\n{printed}")).unwrap().len(), ROWS);
        assert!(rows(&line("a")).is_err());
    }

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let document = format!("above\n{BEGIN}old\n{END}below\n");
        let once = replaced(&document, "new").unwrap();
        assert_eq!(once, format!("above\n{BEGIN}\nnew\n{END}below\n"));
        assert!(replaced("no markers\n", "new").is_err());
    }
}
