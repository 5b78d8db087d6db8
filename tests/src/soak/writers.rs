//! The users of the disk: threads that write, read back, and flush, each on a stripe of its own, and believe nothing.
//!
//! No power is cut here, so an answered write is what every later read has to give: the history is told that each is
//! durable at once.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use fastrand::Rng;

use crate::block_history::{BLOCK_BYTES, BlockHistory, Blocks, Pattern};
use crate::direct_io::{AlignedBuffer, open_direct};
use crate::shell::wait_for;

/// Threads, each with one request in flight.
const WRITERS: usize = 8;
/// Blocks of each one's stripe.
const STRIPE_BLOCKS: usize = 512;
/// Largest request in blocks.
const REQUEST_BLOCKS_MAX: usize = 32;
/// Every writer has an answer by then.
const PROGRESS_DEADLINE: Duration = Duration::from_secs(90);

/// Them, and what they know.
pub(super) struct Writers {
    file: File,
    seed: u64,
    stripes: [Stripe; WRITERS],
}

struct Stripe {
    history: Mutex<BlockHistory>,
    answers: AtomicU64,
    slowest_us: AtomicU64,
    blocks_checked: AtomicU64,
}

impl Writers {
    /// Of a disk that reads as zeroes.
    pub(super) fn new(device: &Path, seed: u64) -> Result<Self> {
        let stripe = |number| Stripe {
            history: Mutex::new(BlockHistory::new(seed ^ number as u64, STRIPE_BLOCKS)),
            answers: AtomicU64::new(0),
            slowest_us: AtomicU64::new(0),
            blocks_checked: AtomicU64::new(0),
        };
        Ok(Self { file: open_direct(device)?, seed, stripes: std::array::from_fn(stripe) })
    }

    /// Works until `is_over`; the first failure ends all.
    pub(super) fn run(&self, is_over: &AtomicBool) -> Result<()> {
        let has_failed = AtomicBool::new(false);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..WRITERS)
                .map(|number| {
                    let has_failed = &has_failed;
                    scope.spawn(move || {
                        let mut rng = Rng::with_seed(self.seed.wrapping_mul(31).wrapping_add(number as u64));
                        while !is_over.load(Ordering::Relaxed) && !has_failed.load(Ordering::Relaxed) {
                            let done = self.request(number, &mut rng);
                            if done.is_err() {
                                has_failed.store(true, Ordering::Relaxed);
                            }
                            done.with_context(|| format!("writer {number}"))?;
                        }
                        Ok(())
                    })
                })
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, Result<()>>| {
                thread.join().unwrap_or_else(|_| Err(anyhow!("a writer panicked")))
            };
            threads.into_iter().try_for_each(join)
        })
    }

    fn request(&self, number: usize, rng: &mut Rng) -> Result<()> {
        let count = rng.usize(1..=REQUEST_BLOCKS_MAX);
        let blocks = Blocks { first: rng.usize(0..=STRIPE_BLOCKS - count), count };
        let started = Instant::now();
        match rng.u32(..10) {
            0 => self.file.sync_data().context("a flush failed")?,
            1..=4 => self.read(number, blocks)?,
            _ => self.write(number, blocks)?,
        }
        let stripe = &self.stripes[number];
        let took_us = started.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
        stripe.slowest_us.fetch_max(took_us, Ordering::Relaxed);
        stripe.answers.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn write(&self, number: usize, blocks: Blocks) -> Result<()> {
        let (write, payload) = self.history(number, |history| history.send_write(blocks, Pattern::Stamped));
        let mut buffer = AlignedBuffer::new(payload.len());
        buffer.bytes().copy_from_slice(&payload);
        self.file.write_all_at(buffer.bytes(), offset_bytes(number, blocks)).context("a write failed")?;
        self.history(number, |history| history.write_answered(write, true));
        Ok(())
    }

    fn read(&self, number: usize, blocks: Blocks) -> Result<()> {
        let mut buffer = AlignedBuffer::new(blocks.count * BLOCK_BYTES);
        self.file.read_exact_at(buffer.bytes(), offset_bytes(number, blocks)).context("a read failed")?;
        self.history(number, |history| history.check_and_adopt(blocks, buffer.bytes()))?;
        self.stripes[number].blocks_checked.fetch_add(blocks.count as u64, Ordering::Relaxed);
        Ok(())
    }

    fn history<T>(&self, number: usize, use_it: impl FnOnce(&mut BlockHistory) -> T) -> T {
        // Only its own writer uses it, but for the last look.
        use_it(&mut self.stripes[number].history.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Begins to look for the slowest request anew.
    pub(super) fn reset_slowest(&self) {
        self.stripes.iter().for_each(|stripe| stripe.slowest_us.store(0, Ordering::Relaxed));
    }

    /// The slowest request since.
    pub(super) fn slowest(&self) -> Duration {
        let slowest = self.stripes.iter().map(|stripe| stripe.slowest_us.load(Ordering::Relaxed)).max();
        Duration::from_micros(slowest.unwrap_or_default())
    }

    /// Waits until every writer has had two answers from now on: the first may have been under way.
    pub(super) fn wait_for_progress(&self) -> Result<()> {
        let answers = || self.stripes.each_ref().map(|stripe| stripe.answers.load(Ordering::Relaxed));
        let before = answers();
        wait_for("every writer to be answered", PROGRESS_DEADLINE, || {
            let all = answers().iter().zip(before).all(|(now, before)| *now >= before + 2);
            Ok(all.then_some(()))
        })
    }

    /// Reads every block of every stripe once more; gives how many requests there were and how many blocks were checked.
    pub(super) fn check_everything(&self) -> Result<(u64, u64)> {
        for number in 0..WRITERS {
            for first in (0..STRIPE_BLOCKS).step_by(REQUEST_BLOCKS_MAX) {
                self.read(number, Blocks { first, count: REQUEST_BLOCKS_MAX })?;
            }
        }
        let sum = |counter: fn(&Stripe) -> &AtomicU64| {
            self.stripes.iter().map(|stripe| counter(stripe).load(Ordering::Relaxed)).sum::<u64>()
        };
        let (requests, checked) = (sum(|stripe| &stripe.answers), sum(|stripe| &stripe.blocks_checked));
        ensure!(requests > 0 && checked > 0, "nothing was written");
        Ok((requests, checked))
    }
}

/// Where the blocks of a stripe are on the disk, in bytes.
fn offset_bytes(number: usize, blocks: Blocks) -> u64 {
    (number * STRIPE_BLOCKS * BLOCK_BYTES) as u64 + blocks.offset_bytes()
}
