//! `cargo lab bench-api`: the management API with as much in the catalog as it is made for.
//!
//! Builds volserver as it is shipped, starts it on a directory that has reflinks, fills it, and makes each call many times, so many at
//! once, over some connections. Prints what the middle one and the slowest hundredth took, and what the server holds in memory; if told
//! to, puts the tables between their markers in `docs/performance.md`. Called by `commands`. A call that fails is an error, never a gap.
//! `--quick` is the same in small, with the lab's own build, to see that everything works; `--server` takes one that is built.
//! Read in this order: here → `fill` → `calls` → `load`.

mod calls;
mod fill;
mod load;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use testlab::process_resources::Memory;
use testlab::volserver::Volserver;

use super::measurement::{self, Scratch};
use crate::lab::workspace::Workspace;
use crate::lab::{programs, workspace};
use load::{Load, Row};

/// The profile whose programs are measured: optimised, no assertions.
const PROFILE: &str = "release";

const BEGIN: &str = "<!-- begin: cargo lab bench-api --write -->\n";
const END: &str = "<!-- end: cargo lab bench-api --write -->\n";

/// How much there is, and how often each call is made.
#[derive(Debug, Clone, Copy)]
struct Plan {
    volumes: usize,
    /// At most one of each volume.
    snapshots: usize,
    nodes: usize,
    /// Volumes that are granted and attached, one to each node and round again.
    attached: usize,
    calls: usize,
    at_once: usize,
}

impl Plan {
    /// What `docs/performance.md` promises for.
    const FULL: Self =
        Self { volumes: 10_000, snapshots: 10_000, nodes: 1000, attached: 2000, calls: 2000, at_once: 100 };
    const QUICK: Self =
        Self { volumes: 300, snapshots: 300, nodes: 50, attached: 100, calls: 300, at_once: 100 };
}

/// What is to be measured, and where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BenchApiOptions<'a> {
    /// In small, with a build that is not what is shipped.
    pub(crate) quick: bool,
    /// Also update the documentation.
    pub(crate) write: bool,
    /// This server instead of one that is built here.
    pub(crate) server: Option<&'a Path>,
    /// The server's files are made under it.
    pub(crate) directory: &'a Path,
}

/// Measures and prints the table; where it is to be written, also updates the documentation.
///
/// # Errors
/// The server does not build or start, the directory has no reflinks, or a call fails.
pub(crate) fn run(workspace: &Workspace, wanted: BenchApiOptions<'_>) -> Result<()> {
    let BenchApiOptions { quick, write, server, directory } = wanted;
    let program = match server {
        Some(server) => server.to_owned(),
        None => {
            let profile = if quick { workspace::PROFILE } else { PROFILE };
            programs::build(workspace, profile, &["volserver"])?;
            workspace.target.join(profile).join("volserver")
        }
    };
    let plan = if quick { Plan::QUICK } else { Plan::FULL };
    let scratch = Scratch::new(directory, "bench-api")?;
    let mut command = Command::new(program);
    command.args(["--memory-max", "2G", "--log", "error"]);
    let server = Volserver::start(&mut command, &scratch.directory)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let text = runtime.block_on(measure(&server, plan, &scratch.directory))?;
    println!("{text}");
    if write {
        measurement::keep(workspace, BEGIN, END, &text)?;
    }
    Ok(())
}

async fn measure(server: &Volserver, plan: Plan, directory: &Path) -> Result<String> {
    let load = Load::connect(&server.management_uri(), plan.at_once).await?;
    let empty = Memory::of(server.pid())?;
    let mut rows = fill::fill(&load, plan).await?;
    let full = Memory::of(server.pid())?;
    rows.extend(calls::all(&load, plan).await?);
    let called = Memory::of(server.pid())?;
    let file_system = measurement::file_system(directory)?;
    let catalog_bytes = fs::metadata(directory.join("data/catalog.sqlite"))?.len();
    let processors = std::thread::available_parallelism()?;
    let mut text = format!(
        "{} volumes, {} snapshots, {} nodes, {} grants and as many attachments; {} calls at once, over {} connections. {processors} \
         processors for server and callers together, the data directory on {file_system}. The catalog has {} MiB.\n\n",
        plan.volumes,
        plan.snapshots,
        plan.nodes,
        plan.attached,
        plan.at_once,
        load.connections(),
        catalog_bytes >> 20
    );
    text.push_str(&table(&rows));
    let _ = write!(
        text,
        "\nThe server has {} MiB resident when it is empty, {} MiB when it is filled, and {} MiB after all of these calls.",
        empty.rss_kib >> 10,
        full.rss_kib >> 10,
        called.rss_kib >> 10
    );
    Ok(text)
}

fn table(rows: &[Row]) -> String {
    let mut text = "| call | at once | p50 | p99 | longest | calls per second |\n| --- | ---: | ---: | ---: | ---: | ---: |\n".to_owned();
    for row in rows {
        let ms = |us: u64| format!("{:.1} ms", us as f64 / 1000.0);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {:.0} |",
            row.name,
            row.at_once,
            ms(row.percentile_us(50)),
            ms(row.percentile_us(99)),
            ms(row.percentile_us(100)),
            row.per_second()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_row_tells_the_middle_and_the_slowest_hundredth() {
        let row = Row::new("Get", 7, (1..=200).rev().map(|ms| ms * 1000).collect(), Duration::from_secs(2));
        let text = table(&[row]);
        assert!(text.ends_with("| Get | 7 | 100.0 ms | 198.0 ms | 200.0 ms | 100 |\n"), "{text}");
    }
}
