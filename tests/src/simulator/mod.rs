//! The simulator: the product's own state machines, on both sides of a connection, with a network, a disk and a clock that
//! exist only here. One seed is one simulation, always the same.
//!
//! What is the product's: on the client the rules of a queue (`QueueCore`), `Redial`, `Reconnect`, `Unflushed` and the handshake; on the
//! server `Session`, the gate's `Core` with its fences, the incarnations' `Core`, `RequestProgress`, `SyncGroups`, `CopyPlan` and the
//! handshake. What stands for the code between them (rings, threads) is in `client/` and in `server.rs`, `copier.rs`, `gate.rs`,
//! `incarnations.rs` and `storage.rs`; `network.rs` and `disk.rs` are what they stand
//! on, `world.rs` chooses what happens. A foreign server, which is not ours and tells nothing of itself, is in `foreign/`, with a world of its
//! own. Users' reads, and the disk after a last power cut, are checked by `block_history.rs`.
//!
//! [`Coverage`] counts which situations came up, [`Mutant`] breaks the rules one by one: see `tests/host/simulator.rs`.

mod answers;
mod broken_gate;
mod client;
mod copier;
mod coverage;
mod device;
mod disk;
mod foreign;
mod gate;
mod incarnations;
mod mutant;
mod network;
mod server;
mod storage;
mod strangers;
mod users;
mod world;

use std::io;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use ::server::backend::file;
use uuid::Uuid;

pub use coverage::Coverage;
pub use mutant::Mutant;

use crate::block_history::{BLOCK_BYTES, Violation};
use foreign::ForeignWorld;
use world::World;

/// Of so many simulations one is of a foreign server's disk.
const SEEDS_PER_FOREIGN: u64 = 8;

/// A simulation ended badly.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Somebody read, or a power cut left, what must not be.
    #[error("a promise was broken: {0}")]
    Violation(#[from] Violation),
    /// A request failed, or the disk did, for no reason.
    #[error("an error for no reason: {0}")]
    Error(String),
    /// It does not come to an end.
    #[error("stuck: {0}")]
    Stuck(String),
}

/// Where simulations have the file that stands for their volume.
#[derive(Debug)]
pub struct Stage {
    dir: PathBuf,
    volume_uid: Uuid,
}

impl Stage {
    /// In a directory that exists.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let volume_uid = Uuid::from_u128(2);
        file::create(dir, volume_uid, (64 * BLOCK_BYTES) as u64).map_err(io::Error::other)?;
        Ok(Self { dir: dir.to_owned(), volume_uid })
    }

    /// Runs the simulation of a seed, with a rule broken or none.
    ///
    /// # Errors
    /// [`Failure`], by cause.
    pub fn run(&self, seed: u64, mutant: Option<Mutant>, coverage: &mut Coverage) -> Result<(), Failure> {
        let is_foreign = match mutant {
            Some(mutant) => mutant.is_of_foreign_servers(),
            None => seed.is_multiple_of(SEEDS_PER_FOREIGN),
        };
        match is_foreign {
            true => ForeignWorld::new(seed, mutant, coverage).run(),
            false => World::new(seed, mutant, &self.dir, self.volume_uid, coverage).run(),
        }
    }

    /// Runs the simulations of many seeds, from `first_seed` on, on every processor that this process may use.
    ///
    /// # Errors
    /// A seed that failed, and how.
    pub fn run_many(&self, first_seed: u64, seeds: u64) -> Result<Coverage, (u64, Failure)> {
        let next = AtomicU64::new(0);
        let has_failed = AtomicBool::new(false);
        let outcome = Mutex::new((Coverage::default(), None));
        std::thread::scope(|scope| {
            for _ in 0..processors() {
                scope.spawn(|| {
                    let mut coverage = Coverage::default();
                    let mut failure = None;
                    while !has_failed.load(Ordering::Relaxed) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= seeds {
                            break;
                        }
                        let seed = first_seed.wrapping_add(index);
                        if let Err(error) = self.run(seed, None, &mut coverage) {
                            has_failed.store(true, Ordering::Relaxed);
                            failure = Some((seed, error));
                        }
                    }
                    let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
                    outcome.0.add(&coverage);
                    outcome.1 = outcome.1.take().or(failure);
                });
            }
        });
        let (coverage, failure) = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(coverage), Err)
    }

    /// The first of the seeds from 1 to `seeds_max` whose simulation notices that a rule is broken, and how; looked for on every
    /// processor, but the same as if they were tried one by one.
    pub fn first_to_notice(&self, mutant: Mutant, seeds_max: u64) -> Option<(u64, String)> {
        let next = AtomicU64::new(1);
        // No seed above this is of interest any more.
        let noticed_by = AtomicU64::new(u64::MAX);
        let first = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..processors() {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed > seeds_max || seed > noticed_by.load(Ordering::Relaxed) {
                            break;
                        }
                        let Some(how) = self.notice(mutant, seed) else { continue };
                        noticed_by.fetch_min(seed, Ordering::Relaxed);
                        let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                        if first.as_ref().is_none_or(|(other, _)| seed < *other) {
                            *first = Some((seed, how));
                        }
                    }
                });
            }
        });
        first.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the simulation of a seed notices that a rule is broken, if it does.
    fn notice(&self, mutant: Mutant, seed: u64) -> Option<String> {
        let mut coverage = Coverage::default();
        match catch_unwind(AssertUnwindSafe(|| self.run(seed, Some(mutant), &mut coverage))) {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => Some(failure.to_string()),
            Err(_) => Some("an assertion of the product".to_owned()),
        }
    }
}

/// How many simulations are run at once.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(2, NonZero::get)
}
