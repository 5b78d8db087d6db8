//! What a process holds and does, as /proc tells it.
//!
//! Used by `cargo lab scale`, `cargo lab bench-server` and the tests. Source: proc(5): `task/*/status`, `task/*/schedstat`,
//! `smaps_rollup`, `task/*/children`, `stat`, `clear_refs`.

use std::fs;

use anyhow::{Context, Result};
use rustix::param::clock_ticks_per_second;
use serde::{Deserialize, Serialize};

/// What a process's threads did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Threads now.
    pub threads: u64,
    /// Times that a thread stopped running, of its own will or not: at least one for each time it was woken.
    pub switches: u64,
    /// Nanoseconds that its threads ran.
    pub cpu_ns: u64,
}

impl Activity {
    /// Since the process began, by the threads that it has now.
    ///
    /// # Errors
    /// It is gone.
    pub fn of(pid: u32) -> Result<Self> {
        let mut activity = Self::default();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            let read = |name| fs::read_to_string(task.join(name));
            // One that has ended meanwhile is none of them.
            let (Ok(status), Ok(schedstat)) = (read("status"), read("schedstat")) else { continue };
            activity.threads += 1;
            activity.switches += number_after(&status, "voluntary_ctxt_switches:")?
                + number_after(&status, "nonvoluntary_ctxt_switches:")?;
            let cpu_ns = schedstat.split_whitespace().next().context("schedstat")?;
            activity.cpu_ns += cpu_ns.parse::<u64>().context("schedstat")?;
        }
        Ok(activity)
    }

    /// What was done after `earlier`, by the threads of now.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            threads: self.threads,
            switches: self.switches.saturating_sub(earlier.switches),
            cpu_ns: self.cpu_ns.saturating_sub(earlier.cpu_ns),
        }
    }

    /// The largest of every number.
    pub fn worst<'a>(all: impl Iterator<Item = &'a Self>) -> Self {
        all.fold(Self::default(), |worst, one| Self {
            threads: worst.threads.max(one.threads),
            switches: worst.switches.max(one.switches),
            cpu_ns: worst.cpu_ns.max(one.cpu_ns),
        })
    }
}

/// What a process has in memory, in KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All that is resident.
    pub rss_kib: u64,
    /// The same, what several processes share counted by the share.
    pub pss_kib: u64,
    /// Of files (the program and its libraries, shared with every process that runs it), of its io_urings and memory files.
    pub file_kib: u64,
    /// Heap, stacks and what the program relocated at its start.
    pub anonymous_kib: u64,
}

impl Memory {
    /// Now.
    ///
    /// # Errors
    /// The process is gone.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let rollup = fs::read_to_string(&path).context(path)?;
        let (rss_kib, anonymous_kib) = (number_after(&rollup, "Rss:")?, number_after(&rollup, "Anonymous:")?);
        let pss_kib = number_after(&rollup, "Pss:")?;
        Ok(Self { rss_kib, pss_kib, file_kib: rss_kib.saturating_sub(anonymous_kib), anonymous_kib })
    }

    /// The largest of every number.
    pub fn worst<'a>(all: impl Iterator<Item = &'a Self>) -> Self {
        all.fold(Self::default(), |worst, one| Self {
            rss_kib: worst.rss_kib.max(one.rss_kib),
            pss_kib: worst.pss_kib.max(one.pss_kib),
            file_kib: worst.file_kib.max(one.file_kib),
            anonymous_kib: worst.anonymous_kib.max(one.anonymous_kib),
        })
    }
}

/// A process with its children and theirs, as a server that forks for each connection has them.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// The first of them.
    pub pid: u32,
}

impl Family {
    /// Everybody in it now, the first one first.
    ///
    /// # Errors
    /// The first is gone.
    pub fn members(self) -> Result<Vec<u32>> {
        let mut members = vec![self.pid];
        let mut looked_at = 0;
        while let Some(&pid) = members.get(looked_at) {
            let children = children(pid);
            // One of the others may have ended meanwhile.
            members.extend(if looked_at == 0 { children? } else { children.unwrap_or_default() });
            looked_at += 1;
        }
        Ok(members)
    }

    /// CPU seconds of all so far, those that have ended and were waited for included; exact to a clock tick (10 ms).
    ///
    /// # Errors
    /// The first is gone.
    pub fn cpu_s(self) -> Result<f64> {
        let mut ticks = 0;
        for pid in self.members()? {
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let times = CpuTicks::parse(&stat).with_context(|| format!("/proc/{pid}/stat"))?;
            ticks += times.own + times.of_children;
        }
        Ok(ticks as f64 / clock_ticks_per_second() as f64)
    }

    /// The most that has been resident at once since [`Family::forget_peak`], in KiB; each process by itself, so what they
    /// share counts for each.
    ///
    /// # Errors
    /// The first is gone.
    pub fn peak_kib(self) -> Result<u64> {
        let mut peak_kib = 0;
        for pid in self.members()? {
            // One that has ended has nothing resident.
            let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
            peak_kib += number_after(&status, "VmHWM:").unwrap_or(0);
        }
        Ok(peak_kib)
    }

    /// The peak begins again at what is resident now.
    ///
    /// # Errors
    /// The first is gone, or somebody else's.
    pub fn forget_peak(self) -> Result<()> {
        for pid in self.members()? {
            let path = format!("/proc/{pid}/clear_refs");
            fs::write(&path, "5").context(path)?;
        }
        Ok(())
    }
}

/// CPU seconds of the children of this process that have ended and were waited for.
///
/// # Errors
/// `/proc` cannot be read.
pub fn ended_children_cpu_s() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat").context("/proc/self/stat")?;
    let times = CpuTicks::parse(&stat).context("/proc/self/stat")?;
    Ok(times.of_children as f64 / clock_ticks_per_second() as f64)
}

/// What `/proc/PID/stat` says of CPU time, user and system together, in clock ticks.
#[derive(Debug, PartialEq, Eq)]
struct CpuTicks {
    /// Of all threads, those that have ended included.
    own: u64,
    /// Of the children that have ended and were waited for.
    of_children: u64,
}

impl CpuTicks {
    /// Fields 14 to 17; the second, a name, may hold anything but its last parenthesis is the line's last.
    fn parse(stat: &str) -> Option<Self> {
        let (_, fields) = stat.rsplit_once(')')?;
        let times = fields.split_whitespace().skip(14 - 3).take(4).map(str::parse);
        let times: Vec<u64> = times.collect::<Result<_, _>>().ok()?;
        let &[user, system, children_user, children_system] = times.as_slice() else { return None };
        Some(Self { own: user + system, of_children: children_user + children_system })
    }
}

/// The children of every thread of a process.
fn children(pid: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that has ended has no children any more.
        let pids = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        children.extend(pids.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(children)
}

/// The number in the line of such a file that begins with `name`, without its unit.
///
/// # Errors
/// There is no such line, or no number in it.
pub fn number_after(text: &str, name: &str) -> Result<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    let number = rest.split_whitespace().next().with_context(|| format!("no number after {name}"))?;
    number.parse().with_context(|| format!("{name} {rest}"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_number_is_that_of_its_own_line() {
        let text = "Rss:                6824 kB\nPss:                3291 kB\nPss_Dirty:           740 kB\n";
        assert_eq!(number_after(text, "Rss:").unwrap(), 6824);
        assert_eq!(number_after(text, "Pss:").unwrap(), 3291);
        assert!(number_after(text, "Anonymous:").is_err());
    }

    /// Of a child with one thread: in this process the threads of other tests end meanwhile, and with them what they did.
    #[test]
    fn what_a_process_does_and_holds_is_seen() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut to_child, mut from_child) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut echo = || {
            to_child.write_all(b"a").unwrap();
            from_child.read_exact(&mut [0]).unwrap();
        };
        // After this it waits in read() for the next byte, or is about to.
        echo();
        let before = Activity::of(child.id()).unwrap();
        echo();
        echo();
        let after = Activity::of(child.id()).unwrap();
        assert_eq!(after.threads, 1);
        let between = after.since(&before);
        assert!(between.switches > 0 && between.cpu_ns > 0, "{before:?} {after:?}");
        let memory = Memory::of(child.id()).unwrap();
        assert!(memory.rss_kib >= memory.pss_kib && memory.anonymous_kib > 0, "{memory:?}");
        drop(to_child);
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn cpu_time_is_found_behind_a_name_with_parentheses() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 1 2 3 4 110 12 130 140 20 0 1 0 99";
        assert_eq!(CpuTicks::parse(stat), Some(CpuTicks { own: 122, of_children: 270 }));
        assert_eq!(CpuTicks::parse("7 (a) S 1"), None);
    }

    #[test]
    fn a_child_belongs_to_the_family_and_its_time_outlives_it() {
        let family = Family { pid: std::process::id() };
        let before = family.cpu_s().unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done; read line"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        assert!(family.members().unwrap().contains(&child.id()));
        assert!(family.peak_kib().unwrap() > Family { pid: child.id() }.peak_kib().unwrap());
        // Its standard input ends, and so does it.
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!family.members().unwrap().contains(&child.id()));
        assert!(family.cpu_s().unwrap() > before && ended_children_cpu_s().unwrap() > 0.0);
    }
}
