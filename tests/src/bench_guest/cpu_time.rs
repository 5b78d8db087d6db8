//! Who spent how much CPU time between two moments.
//!
//! Called by `bench_guest` around each run of fio. Reads the scheduler's own count of nanoseconds (`schedstat`), which no
//! tick samples. Time in a soft interrupt belongs to the thread it interrupted: on loopback, receiving is paid for by
//! the sender. Source: Linux 7.3 `Documentation/scheduler/sched-stats.rst`, `proc_pid_stat(5)`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::param::clock_ticks_per_second;

/// Nanoseconds in a second.
const NANOSECONDS: f64 = 1e9;

/// Whose threads are added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Account {
    /// Every thread of every process that runs the program of this name.
    Program(&'static str),
    /// The kernel's workers (`kworker/…`), whoever's work they do.
    KernelWorkers,
}

/// CPU time of the machine so far.
pub(super) struct Moment {
    /// Nanoseconds that any task but this one, which looks, ran on any processor.
    busy_ns: u64,
    /// Clock ticks of children that were waited for: fio.
    children_ticks: u64,
    /// Nanoseconds by account, then by thread.
    threads: Vec<(Account, BTreeMap<u32, u64>)>,
}

/// CPU seconds between two moments.
pub(super) struct Spent {
    /// By every task but fio and this program.
    pub(super) without_fio_s: f64,
    /// By account, in the order that was asked for.
    pub(super) accounts_s: Vec<f64>,
}

impl Moment {
    /// Looks at the counters of now.
    ///
    /// # Errors
    /// The kernel does not keep them (`CONFIG_SCHEDSTATS`).
    pub(super) fn now(accounts: &[Account]) -> Result<Self> {
        let read = |file: &str| fs::read_to_string(file).with_context(|| file.to_owned());
        let mut threads = Vec::new();
        for &account in accounts {
            threads.push((account, thread_times(account)?));
        }
        let own_ns = ran_ns(&read("/proc/thread-self/schedstat")?).context("/proc/thread-self/schedstat")?;
        let busy_ns = busy_ns(&read("/proc/schedstat")?)?.saturating_sub(own_ns);
        Ok(Self { busy_ns, children_ticks: children_ticks(&read("/proc/self/stat")?)?, threads })
    }

    /// What was spent since `earlier`, which asked for the same accounts. A thread that ended meanwhile is lost.
    pub(super) fn since(&self, earlier: &Self) -> Spent {
        let accounts = self.threads.iter().zip(&earlier.threads);
        let spent_ns = |now: &BTreeMap<u32, u64>, then: &BTreeMap<u32, u64>| -> u64 {
            now.iter().map(|(thread, ns)| ns.saturating_sub(then.get(thread).copied().unwrap_or(0))).sum()
        };
        let accounts_s = accounts.map(|((_, now), (_, then))| spent_ns(now, then) as f64 / NANOSECONDS);
        let fio_ticks = self.children_ticks - earlier.children_ticks;
        let fio_s = fio_ticks as f64 / clock_ticks_per_second() as f64;
        let busy_s = (self.busy_ns - earlier.busy_ns) as f64 / NANOSECONDS;
        Spent { without_fio_s: (busy_s - fio_s).max(0.0), accounts_s: accounts_s.collect() }
    }
}

/// The seventh number of each `cpuN` line: nanoseconds that tasks ran on it.
fn busy_ns(schedstat: &str) -> Result<u64> {
    let mut sum = 0;
    let mut processors = 0;
    for line in schedstat.lines().filter(|line| line.starts_with("cpu")) {
        let ran_ns = line.split_whitespace().nth(7).and_then(|number| number.parse::<u64>().ok());
        sum += ran_ns.with_context(|| format!("/proc/schedstat: {line}"))?;
        processors += 1;
    }
    anyhow::ensure!(processors > 0, "/proc/schedstat names no processor:\n{schedstat}");
    Ok(sum)
}

/// `cutime` and `cstime` of `/proc/self/stat`, the 16th and 17th fields; the second, a name, may hold anything but its
/// last parenthesis is the line's last.
fn children_ticks(stat: &str) -> Result<u64> {
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat")?;
    let field = |number: usize| -> Result<u64> {
        let text = fields.split_whitespace().nth(number - 3).context("/proc/self/stat is short")?;
        text.parse().context("/proc/self/stat")
    };
    Ok(field(16)? + field(17)?)
}

/// Nanoseconds that each thread of the account has run.
fn thread_times(account: Account) -> Result<BTreeMap<u32, u64>> {
    let mut times = BTreeMap::new();
    for process in numbered(Path::new("/proc"))? {
        let directory = Path::new("/proc").join(process.to_string());
        let belongs = match account {
            Account::Program(name) => {
                fs::read_link(directory.join("exe")).is_ok_and(|exe| exe.file_name() == Some(name.as_ref()))
            }
            Account::KernelWorkers => {
                fs::read_to_string(directory.join("comm")).is_ok_and(|comm| comm.starts_with("kworker/"))
            }
        };
        if !belongs {
            continue;
        }
        // A process that ends while we look has no tasks any more, and no more time to count.
        let tasks = directory.join("task");
        for thread in numbered(&tasks).unwrap_or_default() {
            let file = tasks.join(thread.to_string()).join("schedstat");
            if let Some(ns) = ran_ns(&fs::read_to_string(&file).unwrap_or_default()) {
                times.insert(thread, ns);
            }
        }
    }
    Ok(times)
}

/// The first number of a task's `schedstat`: nanoseconds it ran.
fn ran_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().next()?.parse().ok()
}

/// The entries of a directory that are numbers.
fn numbered(directory: &Path) -> Result<Vec<u32>> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(names.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_run_what_its_processors_have_run() {
        let text = "version 17\ntimestamp 429\ncpu0 0 0 0 0 0 0 4000 17 24\ncpu1 1 2 3 4 5 6 700 8 9\ndomain0 MC 3 1 2\n";
        assert_eq!(busy_ns(text).unwrap(), 4700);
        assert!(busy_ns("version 17\n").is_err());
    }

    #[test]
    fn children_are_found_behind_a_name_with_parentheses() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 1 2 3 4 11 12 130 140 20 0 1 0 99";
        assert_eq!(children_ticks(stat).unwrap(), 270);
    }

    #[test]
    fn a_new_thread_counts_from_nothing_and_others_from_before() {
        let account = Account::KernelWorkers;
        let moment = |busy_ns, threads: &[(u32, u64)]| Moment {
            busy_ns,
            children_ticks: 0,
            threads: vec![(account, threads.iter().copied().collect())],
        };
        let spent = moment(9_000_000_000, &[(1, 1_500_000_000), (2, 250_000_000)])
            .since(&moment(8_000_000_000, &[(1, 1_000_000_000), (3, 77)]));
        assert_eq!(spent.accounts_s, [0.75]);
        assert_eq!(spent.without_fio_s, 1.0);
    }
}
