//! What `cargo lab zero-copy` measures, run inside a machine whose clock counts instructions and whose storage server is outside of it:
//! what a WRITE costs the client's machine, copied into memory that is lent to the socket or sent from the request's own pages.
//!
//! Called by `main` as `guest-zero-copy`. Prints one line of JSON for each cell and way, which `lab::zero_copy` reads. The clock goes on
//! while the machine waits for its server, so what it idles is taken off: the rest is instructions, of whoever executed them in
//! this machine. A run costs its start, too: two runs of different lengths are told apart by what the longer has more.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use testlab::harness::Env;
use testlab::kernel_series::KernelSeries;
use testlab::shell::run as run_command;
use testlab::storage_node::StorageNode;

use crate::cost_guest::fio::{SIZE_MIB, Target};
use crate::cost_guest::plan::Cell;

/// What a line of ours begins with; the rest of it is a [`Measured`].
pub(crate) const PREFIX: &str = "zero-copy ";

/// KiB of a WRITE, and how many are in flight. No small ones side by side: those share buffers of the socket, and the kernel reports them as
/// copied (`client/src/device/queue/by_reference.rs`).
pub(crate) const SHAPES: [(u64, u32); 6] = [(32, 1), (64, 1), (128, 1), (128, 4), (512, 1), (512, 4)];
/// How a WRITE leaves: by the option's value.
pub(crate) const MODES: [&str; 2] = ["off", "on"];
const VOLUME: &str = "vol-1";
/// How often each cell is measured.
const REPETITIONS: usize = 3;

/// What the shorter of two runs writes, and what the longer writes more, MiB: so much that the hundredths of a second in which the kernel
/// tells how long it has idled are some two per cent.
const SHORTER_MIB: u64 = 16;
const MORE_MIB: u64 = 256;

/// Where the kernel tells what each pread gave.
const PREAD: &str = "/sys/kernel/tracing/events/syscalls/sys_exit_pread64";
const HISTOGRAM: &str = "hist:keys=common_pid.execname:vals=ret";
/// WRITEs whose copies are counted.
const COUNTED_WRITES: u64 = 200;

/// One cell, one way.
#[derive(Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Value of `--send-zc`.
    pub(crate) mode: String,
    /// KiB of a WRITE.
    pub(crate) block_kib: u64,
    /// In flight.
    pub(crate) depth: u32,
    /// Thousand instructions per WRITE, each repetition.
    pub(crate) thousands: Vec<f64>,
    /// Bytes that the device process had copied out of the requests, per WRITE.
    pub(crate) copied_bytes: f64,
    /// What became of it (`send_zc` of the attachment).
    pub(crate) send_zc: String,
}

/// Measures all cells both ways with the product's programs from `programs`.
///
/// # Errors
/// The server cannot be reached, a disk does not store what it is given, or fio failed.
pub(crate) fn run(programs: &Path) -> Result<()> {
    run_command("modprobe", &["virtio_net"])?;
    let directory = std::env::temp_dir().join(format!("volnode-zero-copy-{}", std::process::id()));
    fs::create_dir(&directory).context("a directory for the measurement")?;
    let env = Env {
        series: KernelSeries::V7,
        directory: directory.clone(),
        programs: programs.to_owned(),
        in_vm: true,
    };
    let node = StorageNode::start_client_only(&env)?;
    node.volctl(&["create", VOLUME, "--size", &format!("{SIZE_MIB}M"), "--backend", "memory"])?
        .succeeded()?;
    let device = attach(&node, MODES[0])?;
    let target = Target::new(&device, &directory)?;
    target.verify().context("it must store what it is given")?;
    target.fill()?;
    node.detach(VOLUME)?;
    for (block_kib, depth) in SHAPES {
        for mode in MODES {
            let measured = measure(&node, &directory, mode, Cell { reads: false, block_kib, depth, ios: 0 })?;
            println!("{PREFIX}{}", serde_json::to_string(&measured)?);
        }
    }
    node.volctl(&["delete", VOLUME])?.succeeded().map(drop)
}

fn attach(node: &StorageNode, mode: &str) -> Result<PathBuf> {
    node.attach(&[VOLUME, "--queues", "1", "--data-path", "fused", &format!("--send-zc={mode}")])
}

/// Measures a cell one way, on a connection of its own.
fn measure(node: &StorageNode, directory: &Path, mode: &str, cell: Cell) -> Result<Measured> {
    let device = attach(node, mode)?;
    let target = Target::new(&device, directory)?;
    let thousands = (0..REPETITIONS).map(|_| thousands(&target, cell)).collect::<Result<Vec<_>>>()?;
    let copied_bytes = copied_bytes(&target, cell)?;
    let send_zc = node.attachment(VOLUME)?["send_zc"].as_str().unwrap_or_default().to_owned();
    node.detach(VOLUME)?;
    let (mode, block_kib, depth) = (mode.to_owned(), cell.block_kib, cell.depth);
    Ok(Measured { mode, block_kib, depth, thousands, copied_bytes, send_zc })
}

/// Thousand instructions for each WRITE that a longer run has more than a shorter.
fn thousands(target: &Target<'_>, cell: Cell) -> Result<f64> {
    let (fewer, more) = (SHORTER_MIB * 1024 / cell.block_kib, MORE_MIB * 1024 / cell.block_kib);
    let shorter = busy_us(|| target.drive(cell, fewer).map(drop))?;
    let longer = busy_us(|| target.drive(cell, fewer + more).map(drop))?;
    Ok((longer - shorter) / more as f64)
}

/// How long the machine was busy meanwhile, in microseconds: a thousand instructions each.
fn busy_us(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let (idle_before, began) = (idle_us()?, Instant::now());
    work()?;
    let elapsed_us = began.elapsed().as_micros() as f64;
    Ok(elapsed_us - (idle_us()? - idle_before))
}

/// How long this machine has idled, in microseconds.
fn idle_us() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let hundredths =
        idle_hundredths(&text).context("/proc/stat does not tell how long the machine has idled")?;
    Ok(hundredths as f64 * 10_000.0)
}

/// Both kinds of idling, for I/O and for anything else, of a `/proc/stat` (`proc_stat(5)`), in hundredths of a second.
fn idle_hundredths(text: &str) -> Option<u64> {
    let fields: Vec<&str> = text.lines().next()?.split_whitespace().collect();
    let value = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(value(4)? + value(5)?)
}

/// Bytes for each WRITE that were copied out of its pages by the device process: what its preads of the device gave. Counted in a run of
/// its own, because tracing costs instructions.
fn copied_bytes(target: &Target<'_>, cell: Cell) -> Result<f64> {
    let event = Path::new(PREAD);
    fs::write(event.join("trigger"), HISTOGRAM).context("the trace of pread64")?;
    let driven = target.drive(cell, COUNTED_WRITES);
    let text = fs::read_to_string(event.join("hist")).context("the histogram of pread64");
    fs::write(event.join("trigger"), format!("!{HISTOGRAM}")).context("the trace of pread64")?;
    driven?;
    let bytes: u64 = queue_bytes(&text?)?;
    Ok(bytes as f64 / COUNTED_WRITES as f64)
}

/// The sum for threads of queues. A line is
/// `{ common_pid: ublk-q0         [       153] } hitcount:        256  ret:   33554432`.
fn queue_bytes(text: &str) -> Result<u64> {
    let mut bytes = 0;
    for line in text.lines().filter(|line| line.starts_with("{ common_pid: ublk-q")) {
        let value = line.rsplit_once("ret:").and_then(|(_, value)| value.trim().parse::<u64>().ok());
        bytes += value.with_context(|| format!("not a line of a histogram: {line}"))?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_idling_count() {
        assert_eq!(idle_hundredths("cpu  38 0 363 513 118 0 4 0 0 0\ncpu0 1 2 3 4 5\n"), Some(631));
        assert_eq!(idle_hundredths("cpu  38 0 363\n"), None);
    }

    #[test]
    fn only_what_queues_read_is_added_up() {
        let text = "# event histogram\n\n\
                    { common_pid: ublk-q0         [       153] } hitcount:        256  ret:   33554432\n\
                    { common_pid: ublk-q1         [       154] } hitcount:          1  ret:         10\n\
                    { common_pid: fio             [       160] } hitcount:          3  ret:        999\n\nTotals:\n";
        assert_eq!(queue_bytes(text).unwrap(), 33_554_442);
        assert_eq!(queue_bytes("nothing\n").unwrap(), 0);
        assert!(queue_bytes("{ common_pid: ublk-q0 [ 1] } hitcount: 2\n").is_err());
    }
}
