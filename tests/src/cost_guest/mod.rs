//! What `cargo lab cost` measures, run inside the machine whose clock counts instructions: fio on one block device
//! after another, each of which first proves that it stores what it is given.
//!
//! Called by `main` as `guest-cost`. Reads top-down: `plan` (what is measured) → here (in which order) → `subjects` (on
//! what) → `fio` and `calls` (how). Prints one line of JSON for each row, which `lab::cost` reads. One microsecond of this
//! machine's time is a thousand instructions, whoever executed them: fio, the client, the kernel, the server. Nothing here
//! may therefore poll while fio runs.

mod calls;
pub(crate) mod fio;
mod peers;
pub(crate) mod plan;
mod subjects;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use calls::{Calls, Counts};
use plan::{CallsPerIo, Cell, Measured, Plan, Row, Subject};
use subjects::Program;

/// What a line of ours begins with; the rest of it is a [`Row`].
pub(crate) const ROW_PREFIX: &str = "cost-row ";

/// The programs that are measured, and the floor.
pub(crate) const PROGRAMS: [&str; 4] = ["volserver", "volclient", "volctl", "floor"];

/// fio's clock counts milliseconds: a measurement has enough of them that one is half a per cent at most.
const RUNTIME_MIN_US: f64 = 200_000.0;

/// I/Os while calls are counted are this many times fewer: tracing is slow, and a count has no clock.
const COUNTED_DIVISOR: u64 = 5;

/// Carries out a plan with the product's programs, and the floor's, from `programs`.
///
/// # Errors
/// A device cannot be made, does not store what it is given, or fio failed.
pub(crate) fn run(programs: &Path, plan: &str) -> Result<()> {
    let plan: Plan = serde_json::from_str(plan).context("the plan")?;
    plan.ensure_processor(&fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?)?;
    let cells = plan.cells()?;
    read_programs(programs)?;
    let directory = std::env::temp_dir().join(format!("volnode-cost-{}", std::process::id()));
    for subject in plan.subjects()? {
        fs::create_dir(&directory).context("a directory for the measurement")?;
        let measured = measure(subject, &plan, &cells, programs, &directory);
        let row = measured.with_context(|| subject.title())?;
        println!("{ROW_PREFIX}{}", serde_json::to_string(&row)?);
        fs::remove_dir_all(&directory).context("removing the measurement's directory")?;
    }
    Ok(())
}

/// Reads the programs once, from the host into memory. While the guest waits for that its clock jumps from one timer to the next,
/// and a time-out of a minute is over in no time.
fn read_programs(programs: &Path) -> Result<()> {
    for program in PROGRAMS {
        fs::read(programs.join(program)).with_context(|| program.to_owned())?;
    }
    Ok(())
}

/// What does the I/Os of a cell.
enum Driver<'a> {
    Fio(fio::Target<'a>),
    Exchange(Program),
}

impl Driver<'_> {
    /// Does `ios` I/Os of a cell; gives what each took, microseconds of the guest.
    fn drive(&self, cell: Cell, ios: u64) -> Result<f64> {
        match self {
            Self::Fio(target) => target.drive(cell, ios),
            Self::Exchange(program) => program.exchange(cell, ios),
        }
    }
}

/// Measures one row.
fn measure(subject: Subject, plan: &Plan, cells: &[Cell], programs: &Path, directory: &Path) -> Result<Row> {
    if subject == Subject::Tcp {
        return measure_cells(subject, plan, cells, &Driver::Exchange(Program::floor(programs)));
    }
    let attached = subjects::attach(subject, programs, directory)?;
    let target = fio::Target::new(attached.device(), directory)?;
    if subject.stores() && !plan.again {
        target.verify().context("it must store what it is given")?;
    }
    if subject.stores() {
        target.fill()?;
    }
    measure_cells(subject, plan, cells, &Driver::Fio(target))
}

fn measure_cells(subject: Subject, plan: &Plan, cells: &[Cell], driver: &Driver<'_>) -> Result<Row> {
    let mut row = Row { key: subject.key().to_owned(), cells: Vec::new() };
    for &cell in cells {
        let ios = plan.ios(subject, cell);
        let mut samples = Vec::new();
        for _ in 0..plan.repetitions(subject) {
            samples.push(measure_once(driver, cell, ios)?);
        }
        eprintln!("{}, {}: {samples:.1?} thousand instructions per I/O", subject.title(), cell.heading());
        let mut measured = Measured { heading: cell.heading(), samples, calls: None };
        if plan.counts_calls {
            count_calls(driver, cell, &mut measured)?;
        }
        row.cells.push(measured);
    }
    Ok(row)
}

/// Thousand instructions per I/O, which is the guest's microseconds per I/O.
fn measure_once(driver: &Driver<'_>, cell: Cell, ios: u64) -> Result<f64> {
    let microseconds = driver.drive(cell, ios)?;
    let runtime_us = microseconds * ios as f64;
    let long_enough = runtime_us >= RUNTIME_MIN_US || matches!(driver, Driver::Exchange(_));
    ensure!(long_enough, "{}: {runtime_us} us are too short for fio's clock", cell.heading());
    Ok(microseconds)
}

/// Counts the calls of some I/Os, without those of a program's start where it is started for the purpose.
fn count_calls(driver: &Driver<'_>, cell: Cell, measured: &mut Measured) -> Result<()> {
    let ios = cell.ios / COUNTED_DIVISOR;
    let count = |ios| calls::counted(|| driver.drive(cell, ios).map(drop));
    let calls = match driver {
        Driver::Fio(_) => count(ios)?,
        Driver::Exchange(_) => {
            let batch = u64::from(cell.depth);
            count(ios + batch)?.without(&count(batch)?)
        }
    };
    let per_io = |counts: &Counts| counts.values().sum::<u64>() as f64 / ios as f64;
    measured.calls = Some(CallsPerIo {
        system_calls: per_io(&calls.system_calls),
        sqes: per_io(&calls.sqes),
        wake_ups: per_io(&calls.wake_ups),
    });
    eprintln!("    {}", by_thread(&calls, ios));
    Ok(())
}

/// What is worth seeing of the calls: threads with at least one in a hundred I/Os.
fn by_thread(calls: &Calls, ios: u64) -> String {
    let mut words = Vec::new();
    for (what, counts) in
        [("system calls", &calls.system_calls), ("SQEs", &calls.sqes), ("wake-ups", &calls.wake_ups)]
    {
        let shown = counts.iter().map(|(name, &count)| (name, count as f64 / ios as f64));
        let shown = shown.filter(|(_, per_io)| *per_io >= 0.01);
        words.extend(shown.map(|(name, per_io)| format!("{name} {per_io:.2} {what}")));
    }
    if words.is_empty() { "no system call, SQE or wake-up".to_owned() } else { words.join(", ") }
}
