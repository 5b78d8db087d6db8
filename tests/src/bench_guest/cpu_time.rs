//! Who spent how much CPU time between two moments.
//!
//! Called by `bench_guest::fio_job` while fio runs. Reads the scheduler's own count of nanoseconds (`schedstat`), which no
//! tick samples; only how fio's time divides between user and kernel is the kernel's estimate. The threads are looked up
//! before, so that a reading takes some milliseconds even where a system call takes long. Time in a soft interrupt belongs to
//! the thread it interrupted: on loopback, receiving is paid for by the sender. Source: Linux 7.3
//! `Documentation/scheduler/sched-stats.rst`, `proc_pid_stat(5)`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
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

/// The threads to look at.
pub(super) struct Meter {
    /// By account, the `schedstat` of each thread that there was.
    accounts: Vec<Vec<File>>,
}

/// CPU time of the machine so far.
pub(super) struct Moment {
    /// Nanoseconds that any task but this one, which looks, ran on any processor.
    busy_ns: u64,
    /// Threads of fio, of which each job has one.
    load_threads: usize,
    /// Nanoseconds of all of them.
    load_ns: u64,
    /// Clock ticks of fio in user mode.
    load_user_ticks: u64,
    /// Nanoseconds by account, then by thread; none of a thread that has ended.
    accounts: Vec<Vec<Option<u64>>>,
}

/// CPU seconds between two moments.
#[derive(Debug, PartialEq)]
pub(super) struct Spent {
    /// By every task but this program, without fio's time in user mode.
    pub(super) total_s: f64,
    /// By fio inside the kernel.
    pub(super) submitter_s: f64,
    /// By account, in the order that was asked for.
    pub(super) accounts_s: Vec<f64>,
}

impl Meter {
    /// Looks up the threads of now. Those that begin later belong to no account.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub(super) fn new(accounts: &[Account]) -> Result<Self> {
        Ok(Self { accounts: accounts.iter().map(|&account| threads(account)).collect::<Result<_>>()? })
    }

    /// Reads the counters; fio is the process `load`.
    ///
    /// # Errors
    /// fio has ended, or the kernel does not keep the counters (`CONFIG_SCHEDSTATS`).
    pub(super) fn read(&self, load: u32) -> Result<Moment> {
        let text = |file: &str| fs::read_to_string(file).with_context(|| file.to_owned());
        let accounts = self.accounts.iter().map(|files| files.iter().map(file_ran_ns).collect()).collect();
        let directory = Path::new("/proc").join(load.to_string());
        let load: Vec<u64> = open_tasks(&directory)?.iter().filter_map(file_ran_ns).collect();
        let load_user_ticks = utime(&fs::read_to_string(directory.join("stat"))?).context("fio's stat")?;
        let own_ns = ran_ns(&text("/proc/thread-self/schedstat")?).context("/proc/thread-self/schedstat")?;
        let busy_ns = busy_ns(&text("/proc/schedstat")?)?.saturating_sub(own_ns);
        Ok(Moment {
            busy_ns,
            load_threads: load.len(),
            load_ns: load.iter().sum(),
            load_user_ticks,
            accounts,
        })
    }
}

impl Moment {
    /// Whether no job has ended since `earlier`.
    pub(super) fn is_under_load_since(&self, earlier: &Self) -> bool {
        self.load_threads >= earlier.load_threads
    }

    /// What was spent since `earlier`, which the same meter read.
    pub(super) fn since(&self, earlier: &Self) -> Spent {
        let seconds = |now_ns: u64, then_ns: u64| now_ns.saturating_sub(then_ns) as f64 / NANOSECONDS;
        let user_ticks = self.load_user_ticks.saturating_sub(earlier.load_user_ticks);
        let user_s = user_ticks as f64 / clock_ticks_per_second() as f64;
        let account_s = |(now, then): (&Vec<Option<u64>>, &Vec<Option<u64>>)| -> f64 {
            let threads = now.iter().zip(then).filter_map(|(now, then)| Some(seconds((*now)?, (*then)?)));
            threads.sum()
        };
        Spent {
            total_s: (seconds(self.busy_ns, earlier.busy_ns) - user_s).max(0.0),
            submitter_s: (seconds(self.load_ns, earlier.load_ns) - user_s).max(0.0),
            accounts_s: self.accounts.iter().zip(&earlier.accounts).map(account_s).collect(),
        }
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
    ensure!(processors > 0, "/proc/schedstat names no processor:\n{schedstat}");
    Ok(sum)
}

/// `utime`, the 14th field of `/proc/PID/stat`; the second, a name, may hold anything but its last parenthesis is the
/// line's last.
fn utime(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(14 - 3)?.parse().ok()
}

/// The `schedstat` of every thread of the account.
fn threads(account: Account) -> Result<Vec<File>> {
    let mut files = Vec::new();
    for process in processes(account)? {
        // A process that ends while we look has no tasks any more, and no more time to count.
        files.extend(open_tasks(&Path::new("/proc").join(process.to_string())).unwrap_or_default());
    }
    Ok(files)
}

/// The `schedstat` of every thread of a process.
fn open_tasks(process: &Path) -> Result<Vec<File>> {
    let tasks = process.join("task");
    let open = |thread: u32| File::open(tasks.join(thread.to_string()).join("schedstat")).ok();
    Ok(numbered(&tasks)?.into_iter().filter_map(open).collect())
}

/// Nanoseconds that the thread of this `schedstat` ran; none if it has ended.
fn file_ran_ns(schedstat: &File) -> Option<u64> {
    let mut buffer = [0; 96];
    let length = schedstat.read_at(&mut buffer, 0).ok()?;
    ran_ns(std::str::from_utf8(&buffer[..length]).ok()?)
}

/// The processes of the account.
fn processes(account: Account) -> Result<Vec<u32>> {
    let belongs = |process: &u32| {
        let directory = Path::new("/proc").join(process.to_string());
        match account {
            Account::Program(name) => {
                fs::read_link(directory.join("exe")).is_ok_and(|exe| exe.file_name() == Some(name.as_ref()))
            }
            Account::KernelWorkers => {
                fs::read_to_string(directory.join("comm")).is_ok_and(|comm| comm.starts_with("kworker/"))
            }
        }
    };
    Ok(numbered(Path::new("/proc"))?.into_iter().filter(belongs).collect())
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
    fn user_time_is_found_behind_a_name_with_parentheses() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 1 2 3 4 110 12 130 140 20 0 1 0 99";
        assert_eq!(utime(stat), Some(110));
        assert_eq!(utime(""), None);
    }

    fn moment(busy_ns: u64, load_ns: u64, load_user_ticks: u64, threads: &[Option<u64>]) -> Moment {
        Moment { busy_ns, load_threads: 1, load_ns, load_user_ticks, accounts: vec![threads.to_vec()] }
    }

    #[test]
    fn a_thread_that_ended_is_not_counted() {
        let before = moment(8_000_000_000, 250_000_000, 0, &[Some(1_000_000_000), Some(500_000_000)]);
        let spent = moment(9_000_000_000, 500_000_000, 0, &[Some(1_500_000_000), None]).since(&before);
        assert_eq!(spent, Spent { total_s: 1.0, submitter_s: 0.25, accounts_s: vec![0.5] });
    }

    #[test]
    fn the_load_is_over_when_a_job_has_ended() {
        let jobs = |load_threads| Moment { load_threads, ..moment(0, 0, 0, &[]) };
        assert!(jobs(3).is_under_load_since(&jobs(3)) && jobs(4).is_under_load_since(&jobs(3)));
        assert!(!jobs(2).is_under_load_since(&jobs(3)));
    }

    #[test]
    fn the_loads_own_user_time_is_nobodys_cost() {
        let now = moment(3_000_000_000, 1_500_000_000, clock_ticks_per_second(), &[]);
        let spent = now.since(&moment(0, 0, 0, &[]));
        assert_eq!(spent, Spent { total_s: 2.0, submitter_s: 0.5, accounts_s: vec![0.0] });
    }

    #[test]
    fn what_this_program_runs_is_seen_in_its_account_and_as_load() {
        if !Path::new("/proc/schedstat").exists() {
            println!("SKIP this kernel has no /proc/schedstat");
            return;
        }
        let own = std::env::current_exe().unwrap();
        let name: &'static str = own.file_name().unwrap().to_str().unwrap().to_owned().leak();
        let meter = Meter::new(&[Account::Program(name)]).unwrap();
        let before = meter.read(std::process::id()).unwrap();
        let started = std::time::Instant::now();
        while started.elapsed().as_millis() < 50 {
            std::hint::spin_loop();
        }
        assert!(meter.read(std::process::id()).unwrap().since(&before).accounts_s[0] > 0.0);
        // The load is a child: here, threads of other tests end and take with them what they ran.
        let mut load = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let before = meter.read(load.id()).unwrap();
        let has_run = (0..400).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            meter.read(load.id()).unwrap().load_ns > before.load_ns
        });
        load.kill().unwrap();
        load.wait().unwrap();
        assert!(has_run);
    }
}
