//! `cargo lab kubernetes`: a real Kubernetes, made of Go's modules and thrown away, with our chart in it and pods that use volumes.
//!
//! Read in this order: `tools` (its programs) → `images` → `control_plane`, `storage` and `node` (what runs) → `cluster` (all of it) →
//! `scenario` (what happens to it). `kubectl` is how it is spoken with. Knows nothing of other tests.

mod cluster;
mod control_plane;
mod images;
mod kubectl;
mod names;
mod node;
mod scenario;
mod storage;
mod tools;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use testlab::kernel_series::KernelSeries;
use testlab::selection::Shard;

use self::cluster::{Cluster, Parts};
use self::scenario::{Outcome, SCENARIOS, Scenario};
use self::tools::Tools;
use crate::lab::machine::{kernels, packages};
use crate::lab::workspace::{PROFILE, Workspace};
use crate::lab::{interrupt, programs, progress};

/// What of ours the cluster runs.
const PROGRAMS: [&str; 5] = ["volserver", "volclient", "volctl", "volcsi", "block-writer"];

/// Between two looks at whether somebody wants the cluster to end.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Options of `cargo lab kubernetes`.
#[derive(Args)]
pub(crate) struct KubernetesOptions {
    /// Run only the scenarios that have this in their name; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Run only this share of them
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Name the scenarios, and run nothing
    #[arg(long)]
    list: bool,
    /// Leave the cluster up after the scenarios, until Ctrl-C; with `--only none` there are none
    #[arg(long)]
    keep: bool,
    /// Run these programs instead of building them
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// The nodes' kernel
    #[arg(long, value_enum, default_value = "7")]
    kernel: KernelSeries,
}

/// Runs it.
///
/// # Errors
/// The cluster cannot be made, or a scenario fails.
pub(crate) fn run(workspace: &Workspace, options: &KubernetesOptions) -> Result<u8> {
    let wanted = wanted(options);
    if options.list {
        wanted.iter().for_each(|scenario| println!("{:<28} {}", scenario.name, scenario.broken));
        return Ok(0);
    }
    packages::ensure_installed(workspace)?;
    packages::ensure_container_runtime(workspace)?;
    let tools = Tools::ensure(workspace)?;
    let kernel = kernels::ensure_cached(workspace, options.kernel)?;
    let programs = match &options.programs {
        Some(programs) => std::path::absolute(programs)?,
        None => {
            programs::build(workspace, PROFILE, &PROGRAMS)?;
            workspace.programs()
        }
    };
    let parts = Parts { workspace, tools: &tools, kernel: &kernel, programs: &programs };
    let mut cluster = Cluster::start(&parts)?;
    let mut rows = Vec::new();
    for scenario in &wanted {
        progress::say(&format!("lab: {}: {}", scenario.name, scenario.broken));
        let began = Instant::now();
        let outcome = (scenario.run)(&mut cluster);
        interrupt::check()?;
        if let Err(error) = &outcome {
            println!("FAILED {}: {error:#}", scenario.name);
            println!("logs are in {}", cluster.keep_logs(workspace));
            // What it leaves is not for the others to find. There may be none.
            let _ = cluster.kubectl.run(&["delete", "namespace", scenario.name, "--wait=false"]);
        }
        let row = row(scenario, &outcome, began.elapsed());
        println!("{row}");
        rows.push((row, outcome.is_ok()));
    }
    println!("\n| after | step |\n| --- | --- |\n{}", cluster.steps.table());
    println!(
        "| scenario | what happened | longest stall | errors | took | outcome |\n| --- | --- | --- | --- | --- | --- |"
    );
    rows.iter().for_each(|(row, _)| println!("{row}"));
    if options.keep {
        println!("\nexport KUBECONFIG={}", cluster.kubectl.kubeconfig.display());
        println!(
            "PATH={}:$PATH kubectl get nodes,pods --all-namespaces    # Ctrl-C ends the cluster",
            tools.directory.display()
        );
        while interrupt::check().is_ok() {
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
    Ok(u8::from(rows.iter().any(|(_, is_right)| !is_right)))
}

/// The scenarios that the options leave.
fn wanted(options: &KubernetesOptions) -> Vec<&'static Scenario> {
    let is_named = |scenario: &&Scenario| {
        options.only.is_empty() || options.only.iter().any(|name| scenario.name.contains(name))
    };
    let named = SCENARIOS.iter().filter(is_named).enumerate();
    let has = |position| options.shard.is_none_or(|shard: Shard| shard.has(position));
    named.filter(|(position, _)| has(*position)).map(|(_, scenario)| scenario).collect()
}

/// A line of the table.
fn row(scenario: &Scenario, outcome: &Result<Outcome>, took: Duration) -> String {
    let (stall, errors, word) = match outcome {
        Ok(Outcome { stall, errors, note }) => {
            let stall = stall.map_or("–".to_owned(), |stall| format!("{:.1} s", stall.as_secs_f64()));
            (
                stall,
                errors.to_string(),
                if note.is_empty() { "passed".to_owned() } else { format!("passed; {note}") },
            )
        }
        Err(_) => ("?".to_owned(), "?".to_owned(), "**failed**".to_owned()),
    };
    let (name, broken, took) = (scenario.name, scenario.broken, took.as_secs());
    format!("| {name} | {broken} | {stall} | {errors} | {took} s | {word} |")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn scenarios_have_names_of_their_own_that_namespaces_may_have() {
        let names: BTreeSet<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        assert_eq!(names.len(), SCENARIOS.len());
        let may_be = |byte: u8| byte.is_ascii_lowercase() || byte == b'-';
        assert!(names.iter().all(|name| name.bytes().all(may_be) && name.len() < 40));
    }

    #[test]
    fn every_tool_that_is_named_is_in_the_module() {
        for (_, program, module) in images::SIDECARS {
            assert!(images::sidecar_image(program, module).unwrap().contains(":v"), "{program}");
        }
    }
}
