//! What a process holds and does, as /proc tells it.
//!
//! Used by `cargo lab scale` and the VM tests. Source: proc(5): `task/*/status`, `task/*/schedstat`, `smaps_rollup`.

use std::fs;

use anyhow::{Context, Result};
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
    /// Since the process began.
    ///
    /// # Errors
    /// It is gone.
    pub fn of(pid: u32) -> Result<Self> {
        let mut activity = Self::default();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            let status = fs::read_to_string(task.join("status"))?;
            activity.threads += 1;
            activity.switches += number_after(&status, "voluntary_ctxt_switches:")?
                + number_after(&status, "nonvoluntary_ctxt_switches:")?;
            let schedstat = fs::read_to_string(task.join("schedstat"))?;
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
    /// Of files (the program and its libraries, shared with every process that runs it) and of its io_urings.
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

/// The number in the line that begins with `name`.
fn number_after(text: &str, name: &str) -> Result<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    let number = rest.split_whitespace().next().with_context(|| format!("no number after {name}"))?;
    number.parse().with_context(|| format!("{name} {rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_that_of_its_own_line() {
        let text = "Rss:                6824 kB\nPss:                3291 kB\nPss_Dirty:           740 kB\n";
        assert_eq!(number_after(text, "Rss:").unwrap(), 6824);
        assert_eq!(number_after(text, "Pss:").unwrap(), 3291);
        assert!(number_after(text, "Anonymous:").is_err());
    }

    #[test]
    fn this_process_is_running_and_resident() {
        let pid = std::process::id();
        let before = Activity::of(pid).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
        let after = Activity::of(pid).unwrap();
        assert!(after.threads >= 1 && after.switches > before.switches, "{before:?} {after:?}");
        let memory = Memory::of(pid).unwrap();
        assert!(memory.rss_kib >= memory.pss_kib && memory.anonymous_kib > 0, "{memory:?}");
    }
}
