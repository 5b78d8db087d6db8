//! `cargo lab bench-server`: the storage server beside its peers, on this machine's own kernel.
//!
//! Builds the product and the load generator as they are shipped, starts every server on the first of two processors, lets
//! each prove that it stores what it is given, loads one after another from the second, prints the tables and, if told to,
//! puts them between their markers in `docs/performance.md`. Called by `commands`. In every round each load is run on one
//! server after another, and each round begins with another server, so that what slows the machine for a while slows them
//! all. A run that is missing is an error, never a gap. `--quick` is the same in small, with the lab's own build, to see that
//! everything works.
//! Read in this order: `plan` → `servers` → `drivers` → here → `summary` → `table`.

mod drivers;
mod plan;
mod rounds;
mod servers;
mod summary;
mod table;

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Pid;
use rustix::thread::sched_getaffinity;
use testlab::shell::wait_for;

use super::measurement::{self, Scratch};
use super::network;
use crate::lab::machine::{packages, this_machine};
use crate::lab::workspace::Workspace;
use crate::lab::{interrupt, programs, workspace};
use drivers::Drivers;
use plan::{Plan, SUBJECTS};
use servers::{Server, Site};
use summary::Sample;

/// The profile whose programs are measured: optimised, no assertions.
const PROFILE: &str = "release";

/// What is built.
const PROGRAMS: [&str; 3] = ["volserver", "volctl", "nbd-load"];

const BEGIN: &str = "<!-- begin: cargo lab bench-server --write -->\n";
const END: &str = "<!-- end: cargo lab bench-server --write -->\n";

/// A process that served a connection has ended by then.
const QUIET_DEADLINE: Duration = Duration::from_secs(20);

/// How often a run is tried in which nothing is answered.
const ATTEMPTS: usize = 4;

/// The programs that are measured beside ours, and what tells their versions.
const PEERS: [(&str, &str); 5] = [
    ("nbdkit", "--version"),
    ("qemu-nbd", "--version"),
    ("nbd-server", "-V"),
    ("fio", "--version"),
    ("nbdcopy", "--version"),
];

/// Measures and prints the tables; with `write`, also updates the documentation. The servers' files are made under `parent`.
///
/// # Errors
/// Something does not build or start, a server does not store what it is given, a load fails, or there is one processor only.
pub(crate) fn run(workspace: &Workspace, quick: bool, write: bool, parent: &Path) -> Result<()> {
    packages::ensure_tools(workspace)?;
    let profile = if quick { workspace::PROFILE } else { PROFILE };
    programs::build(workspace, profile, &PROGRAMS)?;
    let plan = if quick { Plan::QUICK } else { Plan::FULL };
    network::enter()?;
    let scratch = Scratch::new(parent, "bench-server")?;
    let samples = measure(&workspace.target.join(profile), &scratch.directory, plan)?;
    let rows = summary::rows(&samples, &plan)?;
    let machine = machine_lines(&scratch.directory)?;
    let text = format!("{machine}\n{}\n{}", table::tables(&rows, &plan), table::verdict(&rows));
    println!("{text}");
    if write {
        measurement::keep(workspace, BEGIN, END, &text)?;
    }
    Ok(())
}

fn measure(programs: &Path, directory: &Path, plan: Plan) -> Result<Vec<Sample>> {
    let [server_processor, load_processor] = two_processors()?;
    let source = directory.join("source");
    write_source(&source, plan.size_bytes)?;
    let site = Site { programs, directory, processor: server_processor, size_bytes: plan.size_bytes };
    let drivers = Drivers { programs, processor: load_processor, source: &source, plan };
    let mut servers = Vec::new();
    for (index, subject) in SUBJECTS.into_iter().enumerate() {
        let server = Server::start(subject, &site)?;
        drivers.verify(&server, index as u64).with_context(|| format!("{} must store", subject.name()))?;
        eprintln!("{} stores what it is given", subject.name());
        servers.push(server);
    }
    // What verifying has left in the page cache is written now rather than during the first loads.
    rustix::fs::sync();
    let mut samples = Vec::new();
    for round in 0..plan.rounds {
        eprintln!("round {} of {}", round + 1, plan.rounds);
        for cell in plan.cells() {
            for turn in 0..SUBJECTS.len() {
                interrupt::check()?;
                let subject = (turn + round) % SUBJECTS.len();
                let what = || format!("{}, {}", SUBJECTS[subject].name(), cell.heading());
                let sample = sample(&drivers, cell, subject, &servers[subject]).with_context(what)?;
                let (speed, cpu_s) = (sample.run.mib_per_s, sample.server_s);
                eprintln!(
                    "{:<12} {speed:8.1} MiB/s {cpu_s:6.2} s  {}",
                    cell.heading(),
                    SUBJECTS[subject].name()
                );
                samples.push(sample);
            }
        }
    }
    Ok(samples)
}

/// A run in which nothing was answered while it was measured is of no use, and is repeated.
fn sample(drivers: &Drivers<'_>, cell: plan::Cell, subject: usize, server: &Server) -> Result<Sample> {
    for _ in 0..ATTEMPTS {
        let sample = sample_once(drivers, cell, subject, server)?;
        if sample.run.iops != Some(0.0) {
            return Ok(sample);
        }
        eprintln!("{}: nothing was answered while it was measured", cell.heading());
    }
    bail!("nothing was answered in {ATTEMPTS} runs")
}

/// One run: all that the server does from before the load connects until after it has gone is the cost of its I/O.
fn sample_once(drivers: &Drivers<'_>, cell: plan::Cell, subject: usize, server: &Server) -> Result<Sample> {
    let family = server.family();
    family.forget_peak()?;
    let before_s = family.cpu_s()?;
    let mut peak_kib = 0;
    let run = std::thread::scope(|scope| -> Result<drivers::Run> {
        let running = scope.spawn(|| drivers.run(cell, server));
        while !running.is_finished() {
            // Not a wait for something: a process that ends with its connection takes its peak with it.
            std::thread::sleep(measurement::SAMPLE_INTERVAL);
            peak_kib = peak_kib.max(family.peak_kib()?);
        }
        running.join().map_err(|_| anyhow::anyhow!("the load's thread panicked"))?
    })?;
    // A server that forks has counted a child's time when it has waited for it.
    wait_for("the server to be quiet", QUIET_DEADLINE, || Ok((family.members()?.len() == 1).then_some(())))?;
    let server_s = family.cpu_s()? - before_s;
    Ok(Sample { subject, cell, run, server_s, peak_kib })
}

/// The first two processors that this process may use.
fn two_processors() -> Result<[usize; 2]> {
    let allowed = sched_getaffinity(None::<Pid>).context("sched_getaffinity")?;
    let mut processors = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&processor| allowed.is_set(processor));
    let pair = processors.next().zip(processors.next());
    let (first, second) = pair.context("one processor for the servers and one for the load are needed")?;
    Ok([first, second])
}

/// A file without a hole, so that all of it is copied.
fn write_source(path: &Path, size_bytes: u64) -> Result<()> {
    let mut file = fs::File::create(path).with_context(|| path.display().to_string())?;
    let block = vec![0xa5; 1 << 20];
    ensure!(size_bytes.is_multiple_of(block.len() as u64), "an export is whole mebibytes");
    for _ in 0..size_bytes / block.len() as u64 {
        file.write_all(&block)?;
    }
    file.sync_all().context("writing the source of copies")
}

/// On what the numbers were made.
fn machine_lines(directory: &Path) -> Result<String> {
    let mut versions = Vec::new();
    for (program, option) in PEERS {
        versions.push(measurement::version(program, option)?);
    }
    let info = fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").context("/proc/loadavg")?;
    let file_system = measurement::file_system(directory)?;
    Ok(format!(
        "Linux {}, {}; {} over loopback; files on {file_system}; {}; volnode {}. Load average of the machine at the end \
         (1, 5, 15 minutes; the measurement itself is some 1.5 of it): {}.\n",
        this_machine::release(),
        model.trim_start_matches([' ', '\t', ':']),
        network::CONGESTION_CONTROL,
        versions.join(", "),
        env!("CARGO_PKG_VERSION"),
        load.split_whitespace().take(3).collect::<Vec<_>>().join(" "),
    ))
}
