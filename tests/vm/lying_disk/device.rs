//! A whole attachment on a disk that lies: writers on `/dev/ublkbN`, a power cut of the storage server, a look at every block.
//!
//! Where `data.rs` knows what the server answered, this knows what the kernel told the writers: a write with `RWF_DSYNC`
//! (FUA), and a write that returned before an `fdatasync` began (FLUSH), must survive. So the client has to pass on every
//! FLUSH and FUA, and to complete none before its reply. What a block may hold is `testlab::block_history`'s to say.

use std::fs::File;
use std::io::IoSlice;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use rustix::io::{ReadWriteFlags, pwritev2};
use testlab::block_history::{BLOCK_BYTES, BlockHistory, Blocks, Pattern};
use testlab::direct_io::{AlignedBuffer, open_direct};
use testlab::harness::Env;
use testlab::seed;
use testlab::shell::wait_for;

use super::rig::{Rig, run_rounds};

const VOLUME: &str = "vol-1";

/// The volume's size for volctl: [`BLOCK_COUNT`] blocks.
const VOLUME_SIZE: &str = "4M";
const BLOCK_COUNT: usize = 1024;

/// Threads that write, each with one request in flight.
const WRITERS: u64 = 6;

/// Longest write in blocks.
const WRITE_BLOCKS_MAX: usize = 16;

/// One of so many requests of a writer is an fdatasync, another of so many writes is synchronous.
const DURABLE_ONE_IN: u32 = 12;

/// The power is cut at a write or flush of the disk's chosen from these of a round.
const DISK_REQUESTS: Range<u64> = 20..200;

/// The power is cut by then, however few requests the disk has seen.
const TRAFFIC_SECONDS_MAX: u64 = 4;

/// What is read at a time when the blocks are looked at.
const CHECK_BLOCKS: usize = 128;

pub(super) fn what_the_device_flushed_survives_a_power_cut_of_its_server(env: &Env) -> Result<()> {
    survives_power_cuts(env, &["--queues", "1", "--connections", "1"])
}

/// A FLUSH goes over one connection, the writes it covers went over four.
pub(super) fn a_flush_on_one_connection_covers_the_writes_of_all(env: &Env) -> Result<()> {
    survives_power_cuts(env, &["--queues", "2", "--connections", "4"])
}

fn survives_power_cuts(env: &Env, attach_options: &[&str]) -> Result<()> {
    let seed = seed::choose()?;
    let mut rig = Rig::start_with_node_daemon(env)?;
    let mut history = BlockHistory::new(seed, BLOCK_COUNT);
    rig.node().volctl(&["create", VOLUME, "--size", VOLUME_SIZE])?.succeeded()?;
    let attach = [&[VOLUME], attach_options].concat();
    let mut device = rig.node().attach(&attach)?;
    run_rounds(seed, |round_seed| {
        write_until_the_cut(&rig, &device, &mut history, round_seed)?;
        rig.power_cycle(round_seed)?;
        // Unless all that was acknowledged was flushed, too, the device says that its server forgot until it is detached; a
        // new one reads what the disk has.
        wait_for("the device to see its server again", Duration::from_secs(60), || {
            let state = rig.node().attachment(VOLUME)?["state"].clone();
            Ok((state == "failed" || state == "live").then_some(()))
        })?;
        rig.node().detach(VOLUME)?;
        device = rig.node().attach(&attach)?;
        check(&device, &mut history)
    })?;
    rig.node().detach(VOLUME)
}

/// Writes from several threads until requests fail or time is up; the power is gone when this returns.
fn write_until_the_cut(rig: &Rig, device: &Path, history: &mut BlockHistory, seed: u64) -> Result<()> {
    let file = open_direct(device)?;
    let deadline = Instant::now() + Duration::from_secs(TRAFFIC_SECONDS_MAX);
    rig.disk().cut_power_after(fastrand::Rng::with_seed(seed).u64(DISK_REQUESTS));
    let shared = Mutex::new(history);
    let writers: Vec<Result<u64>> = thread::scope(|scope| {
        let start = |writer| {
            let random = fastrand::Rng::with_seed(seed.wrapping_mul(WRITERS).wrapping_add(writer));
            let writer = Writer { file: &file, history: &shared, random, answered: 0 };
            scope.spawn(|| writer.run(deadline, || rig.disk().is_cut()))
        };
        let threads: Vec<_> = (0..WRITERS).map(start).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("a writer panicked")))
        };
        threads.into_iter().map(join).collect()
    });
    rig.disk().cut_power();
    let answered: u64 = writers.into_iter().sum::<Result<u64>>()?;
    println!("round of seed {seed}: {answered} requests completed before the cut was noticed");
    Ok(())
}

/// One thread's requests.
struct Writer<'a> {
    file: &'a File,
    history: &'a Mutex<&'a mut BlockHistory>,
    random: fastrand::Rng,
    answered: u64,
}

impl<'a> Writer<'a> {
    /// Gives how many requests were completed; a failure is its end if `is_cut` explains it.
    fn run(mut self, deadline: Instant, is_cut: impl Fn() -> bool) -> Result<u64> {
        while Instant::now() < deadline {
            let completed = if self.random.u32(0..DURABLE_ONE_IN) == 0 { self.flush() } else { self.write() };
            match completed {
                Ok(()) => self.answered += 1,
                Err(error) => {
                    ensure!(is_cut(), "a request failed while the disk had power: {error}");
                    break;
                }
            }
        }
        Ok(self.answered)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let flush = self.history().send_flush();
        self.file.sync_data()?;
        self.history().flush_answered(flush);
        Ok(())
    }

    fn write(&mut self) -> std::io::Result<()> {
        let count = self.random.usize(1..=WRITE_BLOCKS_MAX);
        let blocks = Blocks { first: self.random.usize(0..=BLOCK_COUNT - count), count };
        let durable = self.random.u32(0..DURABLE_ONE_IN) == 0;
        let (write, payload) = {
            let mut history = self.history();
            if !history.is_idle(blocks) {
                return Ok(());
            }
            history.send_write(blocks, Pattern::Stamped)
        };
        let mut buffer = AlignedBuffer::new(payload.len());
        buffer.bytes().copy_from_slice(&payload);
        let flags = if durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
        let written = pwritev2(self.file, &[IoSlice::new(buffer.bytes())], blocks.offset_bytes(), flags)?;
        if written < payload.len() {
            return Err(std::io::Error::other(format!("{written} of {} bytes written", payload.len())));
        }
        self.history().write_answered(write, durable);
        Ok(())
    }

    fn history(&self) -> MutexGuard<'a, &'a mut BlockHistory> {
        // A writer that panicked fails the test when it is joined.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads every block from the device and compares it with what it may hold.
fn check(device: &Path, history: &mut BlockHistory) -> Result<()> {
    let file = open_direct(device)?;
    for first in (0..BLOCK_COUNT).step_by(CHECK_BLOCKS) {
        let blocks = Blocks { first, count: CHECK_BLOCKS };
        let mut buffer = AlignedBuffer::new(CHECK_BLOCKS * BLOCK_BYTES);
        file.read_exact_at(buffer.bytes(), blocks.offset_bytes())?;
        history.check_and_adopt(blocks, buffer.bytes())?;
    }
    Ok(())
}
