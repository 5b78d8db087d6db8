//! Runs the VM tests one after another, each with a deadline, and reports by event lines.
//!
//! Called by `vm/main.rs` only. Three ways, told by `VOLNODE_LAB`: unset (plain `cargo test`): every test counts as
//! ignored and says why; `1` (the lab runs us where ublk is): the tests run, and whatever they lack is a
//! failure; `elsewhere` (the lab's host part): nothing at all. A test that hangs ends the run, because what it
//! left in the kernel cannot be cleaned up: its name is reported with the stacks of the stuck tasks, and the
//! rest as not run, which is failed.

use std::fs;
use std::io::{Write, stdout};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use libtest_mimic::{Arguments, Completion, Trial};

use crate::events::{Event, PlannedTest};
use crate::kernel_series::KernelSeries;
use crate::left_behind::Machine;
use crate::libtest_binary::{KernelLacks, LibtestBinary, run_one};
use crate::selection::Selection;
use crate::stuck_tasks;

/// Says who runs the tests; see the head of the file.
pub const LAB_VARIABLE: &str = "VOLNODE_LAB";

/// Value of [`LAB_VARIABLE`]: the tests run in this process.
pub const RUN_HERE: &str = "1";

/// Value of [`LAB_VARIABLE`]: the lab runs the tests in another process.
pub const RUN_ELSEWHERE: &str = "elsewhere";

/// Unlocks libtest's `--report-time` in a binary of the stable compiler. No compiler may see it: cargo would take it for another
/// build, and build everything anew.
pub const REPORT_TIME_VARIABLE: &str = "RUSTC_BOOTSTRAP";

/// Names the kernel series ([`KernelSeries::name`]) the tests run on.
pub const KERNEL_VARIABLE: &str = "VOLNODE_LAB_KERNEL";

/// `vm` or `host`: whether the machine is ours to wreck.
pub const MACHINE_VARIABLE: &str = "VOLNODE_LAB_MACHINE";

/// The management API of a storage server outside of the VM; not set with `--host`.
pub const STORAGE_MACHINE_VARIABLE: &str = "VOLNODE_LAB_STORAGE_MACHINE";

/// The directory of the programs under test.
pub const PROGRAMS_VARIABLE: &str = "VOLNODE_LAB_PROGRAMS";

/// The deadline of a test that does not say its own.
pub const DEADLINE_SECONDS: u64 = 180;

/// Names of our daemons, whose stacks are shown when a test hangs.
const DAEMONS: [&str; 2] = ["volserver", "volclient"];

/// The VM's scratch disk: 4 GiB, discards, O_DIRECT, contents lost with the VM.
const SCRATCH_DISK: &str = "/dev/vda";

/// A test that needs ublk.
#[derive(Clone, Copy)]
pub struct Test {
    /// `module::behaviour`.
    pub name: &'static str,
    /// The kernels it says something about; on others it does not exist.
    pub kernels: &'static [KernelSeries],
    /// Seconds after which it counts as hung.
    pub deadline_seconds: u64,
    /// It takes longer than every run should: only `cargo lab test --long` has it.
    pub is_long: bool,
    /// The test.
    pub run: fn(&Env) -> Result<()>,
}

impl Test {
    /// A test for every kernel with the usual deadline.
    pub const fn new(name: &'static str, run: fn(&Env) -> Result<()>) -> Self {
        Self { name, kernels: &KernelSeries::ALL, deadline_seconds: DEADLINE_SECONDS, is_long: false, run }
    }

    /// The same test on the newest kernel only: what it says is the same on others.
    #[must_use]
    pub const fn once(self) -> Self {
        self.on(&[KernelSeries::V7])
    }

    /// The same test for some kernels only.
    #[must_use]
    pub const fn on(self, kernels: &'static [KernelSeries]) -> Self {
        Self { kernels, ..self }
    }

    /// The same test only where the long ones are wanted.
    #[must_use]
    pub const fn long(self) -> Self {
        Self { is_long: true, ..self }
    }

    /// The same test with a deadline of its own, in seconds.
    #[must_use]
    pub const fn within(self, deadline_seconds: u64) -> Self {
        Self { deadline_seconds, ..self }
    }
}

/// What a test gets.
pub struct Env {
    /// The kernel it runs on.
    pub series: KernelSeries,
    /// An empty directory of the test's own, on a tmpfs in the VM; removed when the test ends.
    pub directory: PathBuf,
    /// Where `volserver`, `volclient` and `volctl` are; also first in PATH.
    pub programs: PathBuf,
    /// True in a VM, false on a machine that is somebody's (`--host`).
    pub in_vm: bool,
}

impl Env {
    /// The program `name` of this build.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// `http://host:port` of the management API of a storage server outside of this VM.
    ///
    /// # Errors
    /// Outside a VM there is none, as for [`Env::scratch_disk`].
    pub fn storage_machine(&self) -> Result<String> {
        if !self.in_vm {
            return Err(Lacking("a storage server on another machine".to_owned()).into());
        }
        std::env::var(STORAGE_MACHINE_VARIABLE).context(STORAGE_MACHINE_VARIABLE)
    }

    /// A disk to format and wreck. Its contents are whatever the test before left.
    ///
    /// # Errors
    /// Outside a VM there is none (a [`Lacking`], so the test is skipped); in one, its absence is a failure.
    pub fn scratch_disk(&self) -> Result<&'static Path> {
        if !self.in_vm {
            return Err(Lacking("a scratch disk".to_owned()).into());
        }
        let disk = Path::new(SCRATCH_DISK);
        if disk.exists() { Ok(disk) } else { bail!("{SCRATCH_DISK} is missing") }
    }
}

/// An error by which a test says that this machine lacks what it needs. In the VM, where the lab promises all of
/// it, that is a failure like any other; with `--host` the test counts as skipped.
#[derive(Debug)]
pub struct Lacking(pub String);

impl std::fmt::Display for Lacking {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "this machine lacks {}", self.0)
    }
}

impl std::error::Error for Lacking {}

/// Shared, because a test that hangs keeps its thread.
type TestFunction = Arc<dyn Fn(&Env) -> Result<()> + Send + Sync>;

/// A test that is going to be run, from whatever source.
struct Runnable {
    name: String,
    deadline_seconds: u64,
    run: TestFunction,
}

/// Runs the tests as the environment says; the whole of `main`.
pub fn main(tests: &[Test]) -> ExitCode {
    let arguments = Arguments::from_args();
    match std::env::var(LAB_VARIABLE).as_deref() {
        Ok(RUN_HERE) if !arguments.list => match run_all(tests, arguments.filter.as_deref()) {
            Ok(exit_code) => exit_code,
            Err(error) => {
                eprintln!("the VM tests cannot run: {error:#}");
                ExitCode::FAILURE
            }
        },
        Ok(RUN_ELSEWHERE) => ExitCode::SUCCESS,
        _ => {
            let skip = || Ok(Completion::ignored_with("SKIP needs ublk: run `cargo lab test`"));
            let trials = tests.iter().map(|test| Trial::ignorable_test(test.name, skip)).collect();
            libtest_mimic::run(&arguments, trials).exit_code()
        }
    }
}

/// Runs the tests for this kernel that are wanted: by `filter` and the environment.
fn run_all(tests: &[Test], filter: Option<&str>) -> Result<ExitCode> {
    let kernel = std::env::var(KERNEL_VARIABLE).context(KERNEL_VARIABLE)?;
    let series = KernelSeries::from_name(&kernel).with_context(|| format!("unknown kernel {kernel}"))?;
    let in_vm = std::env::var(MACHINE_VARIABLE).context(MACHINE_VARIABLE)? == "vm";
    let programs = PathBuf::from(std::env::var_os(PROGRAMS_VARIABLE).context(PROGRAMS_VARIABLE)?);
    let selection = Selection::from_environment(filter)?;
    let mut tests = runnable_tests(tests, series, selection.long)?;
    tests.retain(|test| selection.wants(&test.name));
    let mut positions = 0..;
    tests.retain(|_| positions.next().is_some_and(|position| selection.has(position)));
    let planned =
        |test: &Runnable| PlannedTest { name: test.name.clone(), deadline_seconds: test.deadline_seconds };
    emit(&Event::Planned { tests: tests.iter().map(planned).collect() })?;
    let mut failed = false;
    for (index, test) in tests.iter().enumerate() {
        let name = test.name.clone();
        emit(&Event::Started { name: name.clone() })?;
        let directory = std::env::temp_dir().join(format!("volnode-test-{}-{index}", std::process::id()));
        fs::create_dir(&directory).context("creating a test's directory")?;
        let machine = in_vm.then(Machine::remember).transpose()?;
        let started = Instant::now();
        let env = Env { series, directory: directory.clone(), programs: programs.clone(), in_vm };
        let outcome = run_within_deadline(test, env);
        let seconds = started.elapsed().as_secs_f64();
        let event = match outcome {
            Outcome::Returned(Ok(())) => Event::Passed { name, seconds },
            Outcome::Returned(Err(error)) if may_skip(&error, series, in_vm) => {
                Event::Skipped { name, reason: format!("{error:#}") }
            }
            Outcome::Returned(Err(error)) => Event::Failed { name, seconds, reason: format!("{error:#}") },
            Outcome::Hung => return give_up(test, seconds, &tests[index + 1..]),
        };
        failed |= matches!(event, Event::Failed { .. });
        if let Some(machine) = machine {
            machine.restore();
        }
        fs::remove_dir_all(&directory).context("removing a test's directory")?;
        emit(&event)?;
    }
    emit(&Event::Finished)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Our own tests for this kernel, then those of the binaries the lab names.
fn runnable_tests(tests: &[Test], series: KernelSeries, long: bool) -> Result<Vec<Runnable>> {
    let ours = tests.iter().filter(|test| test.kernels.contains(&series) && (long || !test.is_long));
    let ours = ours.map(|test| Runnable {
        name: test.name.to_owned(),
        deadline_seconds: test.deadline_seconds,
        run: Arc::new(test.run),
    });
    let mut runnable: Vec<Runnable> = ours.collect();
    for binary in LibtestBinary::all()? {
        for test in binary.tests()? {
            let path = binary.path().to_owned();
            runnable.push(Runnable {
                name: format!("{}::{test}", binary.crate_name()),
                deadline_seconds: DEADLINE_SECONDS,
                run: Arc::new(move |_: &Env| run_one(&path, &test)),
            });
        }
    }
    Ok(runnable)
}

/// True if what a test lacks is nothing the lab promises.
fn may_skip(error: &anyhow::Error, series: KernelSeries, in_vm: bool) -> bool {
    (error.is::<Lacking>() && !in_vm) || (error.is::<KernelLacks>() && series != KernelSeries::V7)
}

enum Outcome {
    Returned(Result<()>),
    Hung,
}

/// Runs a test on a thread of its own, so that a test stuck in the kernel does not take the watch with it.
fn run_within_deadline(test: &Runnable, env: Env) -> Outcome {
    let (sender, receiver) = mpsc::channel();
    let run = Arc::clone(&test.run);
    thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(|| run(&env)));
        let result =
            result.unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_message(panic.as_ref()))));
        // Fails only if the deadline has passed and nobody listens any more.
        let _ = sender.send(result);
    });
    match receiver.recv_timeout(Duration::from_secs(test.deadline_seconds)) {
        Ok(result) => Outcome::Returned(result),
        Err(_) => Outcome::Hung,
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "(no message)".to_owned())
}

/// Reports a hung test and all that cannot be run after it. Leaves without waiting for any thread.
fn give_up(hung: &Runnable, seconds: f64, rest: &[Runnable]) -> Result<ExitCode> {
    println!("{}", stuck_tasks::describe(&DAEMONS));
    stuck_tasks::log_blocked_tasks();
    let reason = format!("hung: no result after {} s", hung.deadline_seconds);
    emit(&Event::Failed { name: hung.name.clone(), seconds, reason })?;
    for test in rest {
        let reason = format!("not run: {} hung before", hung.name);
        emit(&Event::Failed { name: test.name.clone(), seconds: 0.0, reason })?;
    }
    emit(&Event::Finished)?;
    std::process::exit(1)
}

fn emit(event: &Event) -> Result<()> {
    let mut stdout = stdout().lock();
    stdout
        .write_all(event.to_line()?.as_bytes())
        .and_then(|()| stdout.flush())
        .context("reporting a test event")
}
