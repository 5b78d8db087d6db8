//! `cargo lab fresh`: proves that a machine which has never seen the project needs what the README says and nothing else.
//!
//! A bare Debian (`bootstrap`), copied for each run with the sources in another user's home (`tree`), gets namespaces of its own,
//! the Rust toolchain, and the network of this machine (`machine`, `enter.sh`). In it a newcomer's umask and sysctls
//! are set, both commands of the README are set up, and tests run (`steps.sh`): the host's, or what the command behind `--` says, as
//! `.ci/run` has all of them run there. Anything that fails there fails the run; which tests may be skipped, because an older kernel has
//! nothing of what they are about, is that command's to say. Needs root and Debian. Of this machine only packages are changed (debootstrap,
//! archive keys); what a run makes goes with it, but for the bare Debians in the lab's cache.
//! Read in this order: here → `bootstrap` → `tree` → `network` → `machine` → `enter.sh` → `steps.sh`.

mod bootstrap;
mod machine;
mod network;
mod tree;

use std::fmt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::lab::interrupt;
use crate::lab::machine::apt;
use crate::lab::machine::packages;
use crate::lab::owned_directory::OwnedDirectory;
use crate::lab::progress::Step;
use crate::lab::workspace::Workspace;
use machine::{Counts, Outcome};

/// Options of `cargo lab fresh`.
#[derive(Args)]
pub(crate) struct FreshOptions {
    /// The Debian releases
    #[arg(long, value_enum, value_delimiter = ',', default_value = "bookworm")]
    release: Vec<Release>,
    /// The umasks under which everything is done there
    #[arg(long, value_enum, value_delimiter = ',', default_value = "077")]
    umask: Vec<Umask>,
    /// The default congestion controls
    #[arg(long, value_enum, value_delimiter = ',', default_value = "bbr")]
    congestion: Vec<Congestion>,
    /// Every release with every umask and every congestion control
    #[arg(long, conflicts_with_all = ["release", "umask", "congestion"])]
    all: bool,
    /// What runs the tests there, such as `cargo lab test` for all of them
    #[arg(last = true, value_name = "COMMAND", default_values = ["cargo", "lab", "test", "--only", "host"])]
    tests: Vec<String>,
}

/// A Debian release on which the README's commands have to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Release {
    Bookworm,
    Trixie,
}

/// What `umask` is set to before anything is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Umask {
    /// Debian's own.
    #[value(name = "022")]
    Debian,
    /// What careful administrators set: nobody else can read what is made.
    #[value(name = "077")]
    Strict,
}

/// `net.ipv4.tcp_congestion_control` of the network namespace the tests run in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Congestion {
    /// The kernel's own default.
    Cubic,
    /// What many set instead; then `cubic` may be one that a network namespace is not allowed to set.
    Bbr,
}

/// One fresh machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Combination {
    release: Release,
    umask: Umask,
    congestion: Congestion,
}

impl FreshOptions {
    /// What they ask for, releases outermost because each is bootstrapped once.
    fn combinations(&self) -> Vec<Combination> {
        let releases = if self.all { Release::value_variants() } else { &self.release };
        let umasks = if self.all { Umask::value_variants() } else { &self.umask };
        let congestions = if self.all { Congestion::value_variants() } else { &self.congestion };
        let mut combinations = Vec::new();
        for &release in releases {
            for &umask in umasks {
                let with = |&congestion| Combination { release, umask, congestion };
                combinations.extend(congestions.iter().map(with));
            }
        }
        combinations
    }
}

/// The name on the command line.
fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

impl Congestion {
    /// What is tried, until one can be set: every kernel has `reno`, and no machine forbids it.
    fn candidates(self) -> [String; 2] {
        [name(&self), "reno".to_owned()]
    }
}

impl fmt::Display for Combination {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}, umask {}, {}", name(&self.release), name(&self.umask), name(&self.congestion))
    }
}

/// Makes the fresh machines one after another; true: everything was set up, and passed, on all of them. What it prints last is the
/// tests' closing line, of all machines.
///
/// # Errors
/// A machine cannot be made, or the lab was interrupted. What fails on one is no error: it has been printed.
pub(crate) fn run(workspace: &Workspace, options: &FreshOptions) -> Result<bool> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "a fresh machine has mounts and a root directory of its own: run `cargo lab fresh` as root"
    );
    apt::debian_code_name().context("a fresh Debian is made by Debian's debootstrap")?;
    packages::ensure_debootstrap(workspace)?;
    let mut verdicts = Vec::new();
    let mut is_well = true;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for combination in options.combinations() {
        interrupt::check()?;
        let (has_passed, counts, verdict) = prove(workspace, combination, &options.tests.join(" "))?;
        println!("{verdict}");
        passed += counts.passed;
        // A machine that did not come to its tests' end is no test, and fails as one.
        failed += if has_passed { 0 } else { counts.failed.max(1) };
        skipped += counts.skipped;
        is_well &= has_passed;
        verdicts.push(verdict);
    }
    if verdicts.len() > 1 {
        println!();
        verdicts.iter().for_each(|verdict| println!("{verdict}"));
    }
    let skipped = if skipped == 0 { String::new() } else { format!(", {skipped} skipped") };
    println!("{passed} passed, {failed} failed{skipped}");
    Ok(is_well)
}

/// One machine, from its bootstrap to its removal: whether all was well, what was counted, and the line that says so.
fn prove(workspace: &Workspace, combination: Combination, tests: &str) -> Result<(bool, Counts, String)> {
    println!("\n== fresh: {combination} ==");
    let began = Instant::now();
    let release = name(&combination.release);
    let directory = OwnedDirectory::create(&workspace.cache.join("fresh/machines"))?;
    let root = directory.path().join("root");
    bootstrap::copy_of_pristine(workspace, &release, &root)?;
    let step = Step::begin("copying the sources and this machine's ways to the network");
    tree::furnish(&root, workspace, &release, combination.umask.mask())?;
    step.end();
    let outcome = machine::run(workspace, &root, combination, tests)?;
    let step = Step::begin("removing the fresh machine");
    drop(directory);
    step.end();
    let (has_passed, result) = judge(&outcome);
    let seconds = began.elapsed().as_secs();
    let verdict = format!("fresh: {combination}{result} in {} min {} s", seconds / 60, seconds % 60);
    Ok((has_passed, outcome.counts.unwrap_or_default(), verdict))
}

/// Whether a machine's run was well, and what is said of it behind the combination's name.
fn judge(outcome: &Outcome) -> (bool, String) {
    let Some(counts) = outcome.counts else {
        return (false, format!(": FAILED in `{}` ({})", outcome.step, outcome.status));
    };
    // `cargo lab test` fails where a test is left out that a newcomer's machine could run.
    let has_passed = outcome.has_succeeded && counts.failed == 0 && counts.passed > 0;
    let sysctls = outcome.sysctls.as_deref().map(|sysctls| format!(" ({sysctls})")).unwrap_or_default();
    let skipped = if counts.skipped == 0 { String::new() } else { format!(", {} skipped", counts.skipped) };
    let end = if outcome.has_succeeded || counts.failed > 0 {
        String::new()
    } else {
        format!(", and `{}` ended with {}", outcome.step, outcome.status)
    };
    (has_passed, format!("{sysctls}: {} passed, {} failed{skipped}{end}", counts.passed, counts.failed))
}

impl Umask {
    /// As `umask(2)` takes it.
    fn mask(self) -> u32 {
        match self {
            Self::Debian => 0o022,
            Self::Strict => 0o077,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        options: FreshOptions,
    }

    fn combinations(words: &[&str]) -> Vec<String> {
        let words = std::iter::once("fresh").chain(words.iter().copied());
        let command_line = CommandLine::try_parse_from(words).unwrap();
        command_line.options.combinations().iter().map(Combination::to_string).collect()
    }

    #[test]
    fn without_options_the_harshest_combination_runs_and_with_all_each() {
        assert_eq!(combinations(&[]), ["bookworm, umask 077, bbr"]);
        let both = combinations(&["--release", "bookworm,trixie", "--umask", "022"]);
        assert_eq!(both, ["bookworm, umask 022, bbr", "trixie, umask 022, bbr"]);
        let mut all = combinations(&["--all"]);
        assert_eq!((all.len(), all[0].as_str()), (8, "bookworm, umask 022, cubic"));
        all.dedup();
        assert_eq!(all.len(), 8);
        assert!(CommandLine::try_parse_from(["fresh", "--all", "--umask", "022"]).is_err());
        assert!(CommandLine::try_parse_from(["fresh", "--umask", "0"]).is_err());
    }

    #[test]
    fn the_hosts_tests_run_unless_a_command_says_which() {
        let tests = |words: &[&str]| {
            let words = std::iter::once("fresh").chain(words.iter().copied());
            CommandLine::try_parse_from(words).unwrap().options.tests.join(" ")
        };
        assert_eq!(tests(&["--umask", "022"]), "cargo lab test --only host");
        assert_eq!(tests(&["--", "cargo", "lab", "test"]), "cargo lab test");
        assert!(CommandLine::try_parse_from(["fresh", "cargo", "lab", "test"]).is_err());
    }

    fn outcome(counts: Option<(usize, usize, usize)>, has_succeeded: bool) -> Outcome {
        let mut outcome = Outcome::starting();
        "cargo lab setup".clone_into(&mut outcome.step);
        "exit status: 9".clone_into(&mut outcome.status);
        outcome.has_succeeded = has_succeeded;
        outcome.counts = counts.map(|(passed, failed, skipped)| Counts { passed, failed, skipped });
        outcome
    }

    #[test]
    fn only_a_run_that_came_to_its_end_without_a_failure_is_well() {
        assert_eq!(judge(&outcome(Some((9, 0, 0)), true)), (true, ": 9 passed, 0 failed".to_owned()));
        assert_eq!(
            judge(&outcome(Some((9, 0, 1)), true)),
            (true, ": 9 passed, 0 failed, 1 skipped".to_owned())
        );
        assert!(!judge(&outcome(Some((9, 0, 1)), false)).0, "the tests' own command has the last word");
        assert_eq!(judge(&outcome(Some((9, 1, 0)), false)), (false, ": 9 passed, 1 failed".to_owned()));
        assert!(!judge(&outcome(Some((0, 0, 0)), true)).0);
        let (has_passed, said) = judge(&outcome(Some((9, 0, 0)), false));
        assert!(!has_passed && said.ends_with("ended with exit status: 9"), "{said}");
        let (has_passed, said) = judge(&outcome(None, false));
        assert_eq!((has_passed, said.as_str()), (false, ": FAILED in `cargo lab setup` (exit status: 9)"));
    }
}
