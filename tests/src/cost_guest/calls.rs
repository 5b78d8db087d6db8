//! Counts system calls, SQEs and wake-ups by thread while something runs.
//!
//! Owns three triggers of the kernel's tracing: histograms of `raw_syscalls:sys_enter`, `io_uring:io_uring_submit_req` and
//! `sched:sched_switch` by thread (`Documentation/trace/histogram.rst`). They cost instructions, so nothing is measured while they are on. Called
//! by `cost_guest`. What drives the device is left out by its name, so that what remains is the device's; a kernel client
//! with a kernel server makes no system call at all.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const EVENTS: &str = "/sys/kernel/tracing/events";
const SYSTEM_CALLS: &str = "raw_syscalls/sys_enter";
const SQES: &str = "io_uring/io_uring_submit_req";
const SWITCHES: &str = "sched/sched_switch";

/// By thread, with its name: a thread's name is the one it had at its first event.
const HISTOGRAM: &str = "hist:keys=common_pid.execname";

/// A switch counts for the thread that is left, and only where that waits for something: 0 is a thread that could go on, and 256
/// one that had to make room (`TASK_REPORT_MAX`, `include/trace/events/sched.h`, Linux 7.3). Who waits goes on only if woken.
const WAITS: &str = " if prev_state & 255";

/// Programs that drive the device: fio, and timeout(1) which runs it. This program runs that.
const DRIVERS: [&str; 2] = ["fio", "timeout"];

/// The kernel's thread that wakes up by the clock, whatever is done: several times in the milliseconds of a large I/O.
const BY_THE_CLOCK: &str = "rcu_preempt";

/// Events by thread name.
pub(crate) type Counts = BTreeMap<String, u64>;

/// What was counted.
pub(crate) struct Calls {
    /// System calls.
    pub(crate) system_calls: Counts,
    /// SQEs that were submitted, linked ones included.
    pub(crate) sqes: Counts,
    /// Waits, each of which ended with a wake-up.
    pub(crate) wake_ups: Counts,
}

impl Calls {
    /// These without `others`, thread name by thread name.
    pub(crate) fn without(mut self, others: &Self) -> Self {
        let subtract = |counts: &mut Counts, others: &Counts| {
            for (name, count) in counts {
                *count = count.saturating_sub(others.get(name).copied().unwrap_or(0));
            }
        };
        subtract(&mut self.system_calls, &others.system_calls);
        subtract(&mut self.sqes, &others.sqes);
        subtract(&mut self.wake_ups, &others.wake_ups);
        self
    }
}

/// Counts while `work` runs.
///
/// # Errors
/// The kernel has no such tracing, or `work` failed.
pub(crate) fn counted(work: impl FnOnce() -> Result<()>) -> Result<Calls> {
    let system_calls = Histogram::start(SYSTEM_CALLS, "")?;
    let sqes = Histogram::start(SQES, "")?;
    let waits = Histogram::start(SWITCHES, WAITS)?;
    work()?;
    let mut wake_ups = waits.read()?;
    wake_ups.remove(BY_THE_CLOCK);
    Ok(Calls { system_calls: system_calls.read()?, sqes: sqes.read()?, wake_ups })
}

/// A histogram that counts, until dropped.
struct Histogram {
    event: PathBuf,
    /// Which of the events count.
    filter: &'static str,
}

impl Histogram {
    fn start(event: &str, filter: &'static str) -> Result<Self> {
        let event = Path::new(EVENTS).join(event);
        fs::write(event.join("trigger"), format!("{HISTOGRAM}{filter}"))
            .with_context(|| event.display().to_string())?;
        Ok(Self { event, filter })
    }

    fn read(&self) -> Result<Counts> {
        let text = fs::read_to_string(self.event.join("hist")).context("reading a histogram")?;
        let this_program = fs::read_to_string("/proc/self/comm").context("this program's name")?;
        let mut counts = parse(&text)?;
        counts.retain(|name, _| !DRIVERS.contains(&name.as_str()) && name != this_program.trim());
        Ok(counts)
    }
}

impl Drop for Histogram {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.event.join("trigger"), format!("!{HISTOGRAM}{}", self.filter)) {
            eprintln!("removing the trigger of {}: {error}", self.event.display());
        }
    }
}

/// The counts of a histogram's text, by thread name. A line is
/// `{ common_pid: fio             [       153] } hitcount:        256`.
fn parse(text: &str) -> Result<Counts> {
    let mut counts = Counts::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let parse = || -> Option<(&str, u64)> {
            let (key, count) = line.strip_prefix("{ common_pid: ")?.split_once("} hitcount:")?;
            Some((key.rsplit_once('[')?.0.trim(), count.trim().parse().ok()?))
        };
        let (name, count) = parse().with_context(|| format!("not a line of a histogram: {line}"))?;
        *counts.entry(name.to_owned()).or_default() += count;
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn threads_of_one_name_are_added_up() {
        let text = "# event histogram\n#\n\n\
                    { common_pid: fio             [       153] } hitcount:        256\n\
                    { common_pid: nbdkit          [       160] } hitcount:          3\n\
                    { common_pid: nbdkit          [       161] } hitcount:          4\n\nTotals:\n    Hits: 263\n";
        let counts = parse(text).unwrap();
        assert_eq!(
            counts.into_iter().collect::<Vec<_>>(),
            [("fio".to_owned(), 256), ("nbdkit".to_owned(), 7)]
        );
    }

    #[test]
    fn a_line_that_cannot_be_read_is_an_error() {
        assert!(parse("{ common_pid: x } hitcount: many\n").is_err());
    }
}
