//! The processors of this process and of its queue threads.
//!
//! The block layer gives each hardware queue the requests of certain processors; its thread stays on those, so that a
//! request is submitted, sent and completed where its data is in the cache. What the thread allocates after
//! [`pin_this_thread`], its ring and its tables, is near them too: Linux places memory on the node that touches it first.
//! Called by `attachment.rs`. Source: sched_setaffinity(2).

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// How many processors this process may use: those of its affinity that are online, at least 1.
pub fn nr_cpus() -> u16 {
    // A machine with more processors than a set can hold has more than anybody asks about here.
    sched_getaffinity(None).map_or(1, |cpus| cpus.count().clamp(1, u32::from(u16::MAX)) as u16)
}

/// Keeps the calling thread on those of `cpus` that the process may use; on all of those where there is none in common,
/// because whoever limited the process wants it elsewhere.
///
/// # Errors
/// That of sched_getaffinity or sched_setaffinity; the thread is where it was.
pub fn pin_this_thread(cpus: &[usize]) -> io::Result<()> {
    let allowed = sched_getaffinity(None)?;
    let mut wanted = CpuSet::new();
    for &cpu in cpus.iter().filter(|&&cpu| cpu < CpuSet::MAX_CPU && allowed.is_set(cpu)) {
        wanted.set(cpu);
    }
    if wanted.count() == 0 {
        return Ok(());
    }
    Ok(sched_setaffinity(None, &wanted)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> Vec<usize> {
        let cpus = sched_getaffinity(None).unwrap();
        (0..CpuSet::MAX_CPU).filter(|&cpu| cpus.is_set(cpu)).collect()
    }

    #[test]
    fn a_thread_stays_on_its_processors_and_never_on_none() {
        // On a thread of its own: others run tests.
        let pinned = std::thread::spawn(|| {
            let before = allowed();
            let last = *before.last().unwrap();
            pin_this_thread(&[last, CpuSet::MAX_CPU + 1]).unwrap();
            assert_eq!(allowed(), [last]);
            assert_eq!(nr_cpus(), 1);
            pin_this_thread(&[]).unwrap();
            assert_eq!(allowed(), [last]);
        });
        pinned.join().unwrap();
    }
}
