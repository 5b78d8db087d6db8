//! `cargo lab bench`: wall clock, latency and CPU time of our devices and of the peers', as tables and plots.
//!
//! Builds the product as it is shipped, boots the machine with two processors, lets `bench_guest` measure there, prints the
//! tables and, if told to, puts them between their markers in `docs/performance.md`, the plots and every median beside it.
//! Called by `commands`. A run that is missing is an error, never a gap: no number is kept from an earlier run. `--quick` is
//! the same in small, with the lab's own build, to see that everything works.

mod plot;
mod summary;
mod table;

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testlab::kernel_series::KernelSeries;

use super::guest_command::GuestCommand;
use super::vm::Processors;
use super::workspace::Workspace;
use super::{kernels, measurement, packages, workspace};
use crate::bench_guest::{Operation, Plan, SAMPLE_PREFIX, SUBJECTS, Sample};
use summary::Row;

/// The profile whose programs are measured: optimised, no assertions.
const PROFILE: &str = "release";

/// From QEMU's start to its end; a full run takes half of it on two cores that nobody else uses.
const RUN_DEADLINE: Duration = Duration::from_secs(40 * 60);

const BEGIN: &str = "<!-- begin: cargo lab bench --write -->\n";
const END: &str = "<!-- end: cargo lab bench --write -->\n";
const MEDIANS: &str = "docs/bench.csv";
const PLOTS: [(Operation, &str); 2] =
    [(Operation::Read, "docs/bench-read-4k.svg"), (Operation::Write, "docs/bench-write-4k.svg")];

/// Measures and prints the tables; with `write`, also updates the documentation.
///
/// # Errors
/// The product does not build, the machine fails, or a run of fio is missing.
pub(crate) fn run(workspace: &Workspace, quick: bool, write: bool) -> Result<()> {
    let this_program = workspace.own_program();
    packages::ensure_installed(workspace)?;
    let kernel = kernels::ensure_cached(workspace, KernelSeries::V7)?;
    let profile = if quick { workspace::PROFILE } else { PROFILE };
    measurement::build_product(workspace, profile)?;
    let programs = workspace.target.join(profile);
    let words = [&this_program, Path::new("guest-bench"), &programs];
    let mut words = words.map(|word| word.display().to_string()).to_vec();
    words.extend(quick.then(|| "--quick".to_owned()));
    let command = GuestCommand::new(workspace, words)?.in_directory(&workspace.root);
    let stdout = measurement::guest_output(workspace, &kernel, &command, Processors::Two, RUN_DEADLINE)?;
    let plan = Plan::new(quick);
    let rows = summary::rows(&samples(&stdout)?, &plan)?;
    let machine = measurement::machine_line(&kernel.release)?;
    let text = format!("{machine}\n{}\n{}", table::tables(&rows, &plan), table::verdict(&rows));
    println!("{text}");
    if write { keep(workspace, &rows, &text) } else { Ok(()) }
}

fn samples(stdout: &str) -> Result<Vec<Sample>> {
    let lines = stdout.lines().filter_map(|line| line.strip_prefix(SAMPLE_PREFIX));
    let samples: Vec<Sample> =
        lines.map(serde_json::from_str).collect::<Result<_, _>>().context("a sample")?;
    ensure!(samples.iter().all(|sample| sample.subject < SUBJECTS.len()), "a sample of an unknown subject");
    Ok(samples)
}

/// Puts everything into the documentation; nothing is written before all of it is made.
fn keep(workspace: &Workspace, rows: &[Row], text: &str) -> Result<()> {
    let path = workspace.root.join(measurement::DOCUMENT);
    let document = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut files = vec![(MEDIANS, table::comma_separated(rows))];
    let mut shown = String::new();
    for (operation, name) in PLOTS {
        files.push((name, plot::latency_against_throughput(rows, operation)?));
        // Both are in one directory.
        let link = Path::new(name).file_name().unwrap_or_default().display();
        shown.push_str(&format!("![Latency against throughput, {}]({link})\n\n", operation.noun()));
    }
    let medians = Path::new(MEDIANS).file_name().unwrap_or_default().display();
    let text = format!("{shown}Every median: [{medians}]({medians}).\n\n{text}");
    files.push((measurement::DOCUMENT, measurement::replaced(&document, BEGIN, END, &text)?));
    for (name, contents) in files {
        fs::write(workspace.root.join(name), contents).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_among_what_daemons_say() {
        let line = r#"{"subject":0,"cell":{"operation":"read","block_kib":4,"load":16},"ios":9,"iops":9.5,
            "mib_per_s":0.5,"latency_us":[1.0,2.0,3.0],"cpu":{"client":1.0,"server":2.0,"submitter":3.0,"total":7.0}}"#;
        let line = line.replace('\n', " ");
        let samples = samples(&format!("--- log of volserver\n{SAMPLE_PREFIX}{line}\nend\n")).unwrap();
        assert_eq!((samples.len(), samples[0].cell.heading().as_str()), (1, "R 4k/16"));
        assert!(super::samples(&format!("{SAMPLE_PREFIX}{}", line.replace(":0,", ":99,"))).is_err());
        assert!(super::samples(&format!("{SAMPLE_PREFIX}{{}}")).is_err());
    }
    #[test]
    fn what_is_kept_is_linked_from_the_document_and_nothing_is_kept_without_markers() {
        let root = std::env::temp_dir().join(format!("lab-bench-keep-{}", std::process::id()));
        let workspace = Workspace { root: root.clone(), target: root.clone(), cache: root.clone() };
        let rows =
            summary::rows(&summary::tests::samples(&Plan::FULL, |_, _, _| 1000.0), &Plan::FULL).unwrap();
        fs::create_dir_all(root.join("docs")).unwrap();
        fs::write(root.join(measurement::DOCUMENT), "no markers\n").unwrap();
        assert!(keep(&workspace, &rows, "tables").is_err());
        assert_eq!(fs::read_dir(root.join("docs")).unwrap().count(), 1);
        fs::write(root.join(measurement::DOCUMENT), format!("above\n{BEGIN}old\n{END}below\n")).unwrap();
        keep(&workspace, &rows, "tables").unwrap();
        let document = fs::read_to_string(root.join(measurement::DOCUMENT)).unwrap();
        assert!(document.contains("tables") && !document.contains("old"), "{document}");
        for file in fs::read_dir(root.join("docs")).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            let linked = document.contains(&format!("]({name})"));
            assert!(linked || measurement::DOCUMENT.ends_with(&name), "{name} is not linked:\n{document}");
        }
        assert_eq!(fs::read_dir(root.join("docs")).unwrap().count(), 4);
        fs::remove_dir_all(root).unwrap();
    }
}
