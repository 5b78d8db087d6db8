//! `cargo lab fuzz`: libFuzzer over the parsers that face the network (`tests/fuzz`), on this machine.
//!
//! Builds the targets with coverage counters (`tests/fuzz/rustc-with-coverage`, stable Rust), then runs each for as long as
//! asked, as many at once as there are processors. What a run finds new is kept under the target directory and is where the
//! next one begins; `--keep` adds the smallest set that covers as much to the corpus in the repository.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::lab::machine::packages;
use crate::lab::tool::Running;
use crate::lab::workspace::{PROFILE, Workspace};
use crate::lab::{progress, tool};

/// The targets, by the name of their corpus.
const TARGETS: [&str; 4] = ["server_handshake", "server_requests", "client_handshake", "client_replies"];

/// Building the targets from nothing on two slow cores.
const BUILD_DEADLINE: Duration = Duration::from_secs(45 * 60);

/// What a target may need beside its time: reading its corpus, and ending.
const SLACK: Duration = Duration::from_secs(5 * 60);

/// Longest input, in bytes: some dozen options or requests.
const INPUT_BYTES_MAX: u32 = 4096;

/// Options of `cargo lab fuzz`.
#[derive(Args)]
pub(crate) struct FuzzOptions {
    /// Only these targets, instead of all
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// The fuzzer's seed, to repeat a run
    #[arg(long)]
    seed: Option<u32>,
    /// Add what was found to the corpora in the repository, as few files as cover as much
    #[arg(long)]
    keep: bool,
}

/// One target's programs and files.
struct Target {
    name: String,
    program: PathBuf,
    /// In the repository.
    corpus: PathBuf,
    /// What runs on this machine have found.
    found: PathBuf,
    log: PathBuf,
}

/// Runs them; true: nothing was broken.
///
/// # Errors
/// They do not build or cannot be run, or the lab was interrupted. A target that finds something is no error: it is
/// said where the input is and how to repeat it.
pub(crate) fn run(workspace: &Workspace, options: &FuzzOptions) -> Result<bool> {
    packages::ensure_tools(workspace)?;
    build(workspace)?;
    let names = TARGETS.iter().map(|name| (*name).to_owned());
    let targets: Vec<Target> = names
        .filter(|name| options.targets.is_empty() || options.targets.contains(name))
        .map(|name| Target::new(workspace, name))
        .collect::<Result<_>>()?;
    let seed = match options.seed {
        Some(seed) => seed,
        None => testlab::seed::choose()? as u32,
    };
    let at_once = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut passed = 0;
    for batch in targets.chunks(at_once) {
        let mut running = Vec::new();
        for target in batch {
            running.push((target, Running(target.start(options.seconds, seed)?)));
        }
        for (target, mut fuzzer) in running {
            let deadline = Duration::from_secs(options.seconds.into()) + SLACK;
            let status = tool::wait(&mut fuzzer.0, deadline).context(target.name.clone())?;
            passed += usize::from(target.tell(status.success())?);
        }
    }
    if options.keep {
        targets.iter().try_for_each(Target::keep)?;
    }
    println!("fuzz: {passed} of {} targets found nothing wrong", targets.len());
    Ok(passed == targets.len())
}

fn build(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--profile", PROFILE, "--package", "fuzz", "--bins", "--features", "libfuzzer"]);
    // Cargo keeps what a wrapper made apart from what was made without it; dependencies serve both.
    cargo.env("RUSTC_WORKSPACE_WRAPPER", workspace.root.join("tests/fuzz/rustc-with-coverage"));
    let (status, _) =
        progress::cargo(&mut cargo, "compiling the fuzz targets", Stdio::null(), BUILD_DEADLINE)?;
    ensure!(status.success(), "the fuzz targets do not build");
    Ok(())
}

fn directory(workspace: &Workspace) -> PathBuf {
    workspace.target.join("fuzz")
}

impl Target {
    fn new(workspace: &Workspace, name: String) -> Result<Self> {
        let directory = directory(workspace);
        let found = directory.join("found").join(&name);
        fs::create_dir_all(&found).with_context(|| format!("creating {}", found.display()))?;
        Ok(Self {
            program: workspace.programs().join(format!("fuzz-{}", name.replace('_', "-"))),
            corpus: workspace.root.join("tests/fuzz/corpus").join(&name),
            log: directory.join(format!("{name}.log")),
            found,
            name,
        })
    }

    fn start(&self, seconds: u32, seed: u32) -> Result<Child> {
        let log = fs::File::create(&self.log).with_context(|| format!("creating {}", self.log.display()))?;
        let mut command = Command::new(&self.program);
        command.arg(format!("-max_total_time={seconds}")).arg(format!("-seed={seed}"));
        command.arg(format!("-max_len={INPUT_BYTES_MAX}")).arg("-timeout=10").arg("-print_final_stats=1");
        // The prefix of the file names under which inputs that break something are kept.
        command.arg(format!("-artifact_prefix={}-", self.log.with_extension("").display()));
        command.arg(&self.found).arg(&self.corpus).stdin(Stdio::null());
        command.stdout(log.try_clone().context("the log")?).stderr(log);
        command.spawn().with_context(|| format!("cannot run {}", self.program.display()))
    }

    /// Says how a run went; passes on whether it went well.
    fn tell(&self, has_passed: bool) -> Result<bool> {
        let log = fs::read(&self.log).context("the fuzzer's log")?;
        let log = String::from_utf8_lossy(&log);
        let executed = log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        let executed = executed.map_or("?", str::trim);
        let covered = log.lines().rev().find_map(|line| line.split_once(" cov: ")?.1.split(' ').next());
        let covered = covered.unwrap_or("?");
        let verdict = if has_passed { "ok" } else { "FAILED" };
        println!("fuzz {} ... {verdict} ({executed} inputs, {covered} edges)", self.name);
        if !has_passed {
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            tail.iter().rev().for_each(|line| println!("  {line}"));
            println!("  to repeat it: {} FILE, with the file named above", self.program.display());
        }
        Ok(has_passed)
    }

    /// Adds to the repository's corpus what covers something that it does not.
    fn keep(&self) -> Result<()> {
        let count = |directory: &Path| fs::read_dir(directory).map(Iterator::count);
        let before = count(&self.corpus).context("the corpus")?;
        let mut merge = Command::new(&self.program);
        merge.args(["-merge=1", "-artifact_prefix=/dev/null"]).arg(&self.corpus).arg(&self.found);
        tool::output(&mut merge, BUILD_DEADLINE).with_context(|| format!("merging {}", self.name))?;
        let after = count(&self.corpus).context("the corpus")?;
        println!("fuzz {}: {before} files in the corpus before, {after} now", self.name);
        Ok(())
    }
}
