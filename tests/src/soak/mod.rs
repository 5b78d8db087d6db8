//! Faults at random, for as long as wanted, under an oracle: what `cargo lab soak` runs, and for some seconds a VM test.
//!
//! ```text
//!   writers (one stripe of the disk each) ─► /dev/ublkbN ─► device process ─► fault proxy ─► volserver
//!      every read is checked at once             ▲ killed, upgraded    ▲ cut        ▲ killed, rebooted after a flush
//! ```
//! Under the policy `wait` no request may fail, no read may give anything but the last write, and nothing may be left behind. The
//! faults and the writers' choices come from the seed; when they meet does not.

mod faults;
mod writers;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use ublk_core::control::list_devices;

use crate::fault_proxy::FaultProxy;
use crate::harness::Env;
use crate::storage_node::StorageNode;

pub use faults::Fault;
use faults::Rig;
use writers::Writers;

const VOLUME: &str = "vol-1";
const VOLUME_SIZE: &str = "64M";

/// What a soak has seen.
#[derive(Debug, Default)]
pub struct Report {
    /// By fault: how long the longest request took that was under way meanwhile.
    stalls: BTreeMap<Fault, Vec<Duration>>,
    requests: u64,
    reads_checked: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| fault | times | stall p50 | stall worst |")?;
        writeln!(f, "| --- | ---: | ---: | ---: |")?;
        for (fault, stalls) in &self.stalls {
            let mut sorted = stalls.clone();
            sorted.sort_unstable();
            let (p50, worst) = (sorted[sorted.len() / 2], sorted[sorted.len() - 1]);
            writeln!(
                f,
                "| {fault} | {} | {} ms | {} ms |",
                sorted.len(),
                p50.as_millis(),
                worst.as_millis()
            )?;
        }
        write!(
            f,
            "{} requests, {} blocks read and checked, no error, no violation, nothing left behind",
            self.requests, self.reads_checked
        )
    }
}

/// Lets faults happen for `duration`, one after another, each when the one before is over; `only` this one, if one is given.
///
/// # Errors
/// A request failed, a read gave what it may not, a fault was not overcome in time, or something was left behind.
pub fn run(env: &Env, seed: u64, duration: Duration, only: Option<Fault>) -> Result<Report> {
    let devices_before = list_devices()?;
    let proxy = FaultProxy::start()?;
    let advertise = proxy.address().to_string();
    let node = StorageNode::start_with(env, &env.directory.join("data"), &["--advertise", &advertise])?;
    proxy.set_target(node.data_address.parse().context("the server's address")?);
    node.volctl(&["create", VOLUME, "--size", VOLUME_SIZE])?.succeeded()?;
    let device = node.attach(&[VOLUME, "--queues", "2", "--connections", "3"])?;
    let mut rig = Rig::new(node, proxy, VOLUME, seed, only);
    let writers = Writers::new(&device, seed)?;
    let is_over = AtomicBool::new(false);
    let mut report = Report::default();
    thread::scope(|scope| {
        let writing = scope.spawn(|| writers.run(&is_over));
        let outcome = break_things(&mut rig, &writers, &mut report, duration, || writing.is_finished());
        is_over.store(true, Ordering::Relaxed);
        let written = writing.join().unwrap_or_else(|_| Err(anyhow!("a writer panicked")));
        // A writer's failure is the cause of what came after it.
        written.and(outcome)
    })?;
    (report.requests, report.reads_checked) = writers.check_everything()?;
    // Closes the disk, which could not be detached before.
    drop(writers);
    rig.end()?;
    ensure!(list_devices()? == devices_before, "ublk devices are left behind");
    Ok(report)
}

fn break_things(
    rig: &mut Rig,
    writers: &Writers,
    report: &mut Report,
    duration: Duration,
    has_failed: impl Fn() -> bool,
) -> Result<()> {
    let started = Instant::now();
    while started.elapsed() < duration && !has_failed() {
        rig.pause();
        let fault = rig.choose();
        writers.reset_slowest();
        rig.inflict(fault).with_context(|| format!("fault: {fault}"))?;
        // Until every writer has had an answer since, the stall is not over.
        writers.wait_for_progress().with_context(|| format!("after: {fault}"))?;
        report.stalls.entry(fault).or_default().push(writers.slowest());
    }
    Ok(())
}
