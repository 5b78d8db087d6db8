//! `cargo lab scale`: what an idle attachment costs, whether a node carries many, and what an I/O costs beside how many
//! others; as tables.
//!
//! Builds the product as it is shipped, lets `scale_guest` measure in two machines (one with two processors, one that
//! counts instructions), prints the tables and, if told to, puts them between the markers in `docs/performance.md`.
//! Called by `commands`. What was not measured is an error, never a gap.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum as _;
use serde::de::DeserializeOwned;
use testlab::kernel_series::KernelSeries;

use super::measurement;
use crate::lab::machine::guest_command::GuestCommand;
use crate::lab::machine::kernels::Kernel;
use crate::lab::machine::vm::{ByteCopies, Processors};
use crate::lab::machine::{kernels, packages};
use crate::lab::programs;
use crate::lab::workspace::Workspace;
use crate::scale_guest::{
    ATTACHMENTS_MAX, GROWTH_PREFIX, GROWTH_STEPS, GrowthReport, IDLE_PREFIX, IDLE_SECONDS, Idle, IdleReport,
    Part,
};

/// The profile whose programs are measured: optimised, no assertions.
const PROFILE: &str = "release";

/// From QEMU's start to its end. Making 64 disks takes most of it: ten minutes on a processor of one's own.
const RUN_DEADLINE: Duration = Duration::from_secs(60 * 60);

/// What an idle attachment may have resident, in KiB.
const RSS_AIM_KIB: u64 = 8 << 10;

const BEGIN: &str = "<!-- begin: cargo lab scale --write -->\n";
const END: &str = "<!-- end: cargo lab scale --write -->\n";

/// Measures, prints the tables; with `write`, also updates the document.
///
/// # Errors
/// The product does not build, a machine fails, or something was not measured.
pub(crate) fn run(workspace: &Workspace, write: bool) -> Result<()> {
    let this_program = workspace.own_program();
    packages::ensure_installed(workspace)?;
    let kernel = kernels::ensure_cached(workspace, KernelSeries::V7)?;
    programs::build_product(workspace, PROFILE)?;
    let guest = Guest { workspace, kernel: &kernel, this_program: &this_program };
    let idle: IdleReport = guest.measure(Part::Idle, Processors::Two, IDLE_PREFIX)?;
    let growth: GrowthReport =
        guest.measure(Part::Growth, Processors::Counted(ByteCopies::None), GROWTH_PREFIX)?;
    let machine = measurement::machine_line(&kernel.release)?;
    let text = format!("{machine}\n{}\n{}", idle_table(&idle), growth_table(&growth)?);
    print!("{text}");
    if write {
        measurement::keep(workspace, BEGIN, END, &text)?;
    }
    Ok(())
}

/// Where the parts are measured.
struct Guest<'a> {
    workspace: &'a Workspace,
    kernel: &'a Kernel,
    this_program: &'a Path,
}

impl Guest<'_> {
    /// Boots a machine for one part; gives what its line says.
    fn measure<T: DeserializeOwned>(&self, part: Part, processors: Processors, prefix: &str) -> Result<T> {
        let name = part.to_possible_value().context("the part's name")?.get_name().to_owned();
        let path = |path: &Path| path.display().to_string();
        let programs = self.workspace.target.join(PROFILE);
        let words = vec![path(self.this_program), "guest-scale".to_owned(), name, path(&programs)];
        let command = GuestCommand::new(self.workspace, words)?.in_directory(&self.workspace.root);
        let stdout =
            measurement::guest_output(self.workspace, self.kernel, &command, processors, RUN_DEADLINE)?;
        let line = stdout.lines().find_map(|line| line.strip_prefix(prefix));
        let line = line.with_context(|| format!("the guest printed no {prefix}line:\n{stdout}"))?;
        serde_json::from_str(line).with_context(|| line.to_owned())
    }
}

fn mib(kib: u64) -> String {
    format!("{:.1} MiB", kib as f64 / 1024.0)
}

fn idle_table(report: &IdleReport) -> String {
    type Shown = fn(&Idle) -> String;
    let rows: [(&str, Shown, String); 7] = [
        ("threads", |idle| idle.activity.threads.to_string(), String::new()),
        ("context switches", |idle| idle.activity.switches.to_string(), "0".into()),
        ("CPU time", |idle| format!("{} µs", idle.activity.cpu_ns / 1000), "0".into()),
        ("resident (RSS)", |idle| mib(idle.memory.rss_kib), format!("< {}", mib(RSS_AIM_KIB))),
        ("of it heap and stacks", |idle| mib(idle.memory.anonymous_kib), String::new()),
        ("of it program, libraries, rings, memory files", |idle| mib(idle.memory.file_kib), String::new()),
        ("its share (PSS)", |idle| mib(idle.memory.pss_kib), String::new()),
    ];
    let mut text = format!(
        "| an idle device process, {IDLE_SECONDS} s, {} queues, {} connections | attached alone | worst of {ATTACHMENTS_MAX} | \
         worst of {ATTACHMENTS_MAX} after large writes | aim |\n| --- | ---: | ---: | ---: | ---: |\n",
        report.nr_hw_queues, report.nr_connections
    );
    for (what, shown, aim) in rows {
        let columns = [&report.one, &report.worst_of_many, &report.worst_after_writes].map(shown);
        let _ = writeln!(text, "| {what} | {} | {aim} |", columns.join(" | "));
    }
    let _ = writeln!(
        text,
        "\nAll {ATTACHMENTS_MAX} together hold {} (PSS). fio wrote, read back and compared {} MiB on all of them at once; then they \
         were detached, and no device and no process was left.",
        mib(report.many_pss_kib),
        report.verified_bytes >> 20
    );
    text
}

fn growth_table(report: &GrowthReport) -> Result<String> {
    let headings: Vec<String> = GROWTH_STEPS.iter().map(|step| format!("{step} attached")).collect();
    let mut text = format!("| thousand instructions per I/O | {} | growth |\n", headings.join(" | "));
    let _ = writeln!(text, "| --- |{}", " ---: |".repeat(headings.len() + 1));
    ensure!(!report.rows.is_empty(), "no load was measured");
    for row in &report.rows {
        let (Some(first), Some(last)) = (row.thousands.first(), row.thousands.last()) else {
            anyhow::bail!("{}: nothing was measured", row.load);
        };
        ensure!(row.thousands.len() == GROWTH_STEPS.len(), "{}: a step is missing", row.load);
        let cells: Vec<String> = row.thousands.iter().map(|value| format!("{value:.1}")).collect();
        let growth = (last / first - 1.0) * 100.0;
        let _ = writeln!(text, "| {} | {} | {growth:+.0} % |", row.load, cells.join(" | "));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale_guest::GrowthRow;

    #[test]
    fn growth_is_from_the_first_step_to_the_last() {
        let row = |thousands| GrowthRow { load: "R 4k".into(), thousands };
        let report = GrowthReport { rows: vec![row(vec![40.0, 42.0, 50.0, 60.0])] };
        let text = growth_table(&report).unwrap();
        assert!(text.ends_with("| R 4k | 40.0 | 42.0 | 50.0 | 60.0 | +50 % |\n"), "{text}");
        let report = GrowthReport { rows: vec![row(vec![40.0])] };
        assert!(growth_table(&report).is_err(), "a missing step is an error");
    }
}
