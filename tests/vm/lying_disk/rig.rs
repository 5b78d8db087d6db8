//! A volserver whose data directory is on a lying disk, and the order of steps around a power cut.
//!
//! Owns both; the traffic is the tests'. Used by `data.rs` and `catalog.rs`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use testlab::harness::Env;
use testlab::lying_disk::{LyingDisk, LyingFileSystem};
use testlab::management_api::ManagementApi;
use testlab::storage_node::StorageNode;

/// Rounds stop once this much time has passed, so that a slow machine does fewer of them.
const ROUNDS_BUDGET: Duration = Duration::from_secs(5);

/// Rounds that every machine does: one cut on a fresh volume, one on a volume that lived through a cut.
const ROUNDS_MIN: u64 = 2;

/// Rounds that are enough on any machine.
const ROUNDS_MAX: u64 = 25;

/// Asks for this many rounds whatever time they take (and the test's deadline allows): to look for rare failures by hand.
const ROUNDS_VARIABLE: &str = "VOLNODE_ROUNDS";

/// The server and its disk. The server goes first when both are dropped.
pub(super) struct Rig {
    node: StorageNode,
    file_system: LyingFileSystem,
}

impl Rig {
    /// Makes the disk and starts a server on it.
    pub(super) fn start(env: &Env, server_options: &[&str]) -> Result<Self> {
        let file_system = LyingFileSystem::make(env)?;
        let node = StorageNode::start_server_only(env, &file_system.path().join("data"), server_options)?;
        Ok(Self { node, file_system })
    }

    /// The same with a node daemon, for tests that attach.
    pub(super) fn start_with_node_daemon(env: &Env) -> Result<Self> {
        let file_system = LyingFileSystem::make(env)?;
        let node = StorageNode::start_with(env, &file_system.path().join("data"), &[])?;
        Ok(Self { node, file_system })
    }

    /// The server and the node daemon, to run volctl against.
    pub(super) fn node(&self) -> &StorageNode {
        &self.node
    }

    /// The disk, to cut the power of.
    pub(super) fn disk(&self) -> &LyingDisk {
        self.file_system.disk()
    }

    /// The directory of the volumes' files.
    pub(super) fn volumes_dir(&self) -> PathBuf {
        self.node.data_dir.join("volumes")
    }

    /// A new connection to the server that runs now.
    pub(super) fn management(&self) -> Result<ManagementApi> {
        ManagementApi::connect(&self.node.management_uri)
    }

    /// Ends the round: the power is cut, if it is not yet, the server dies with it, and both come back with what `seed`
    /// leaves on the disk.
    pub(super) fn power_cycle(&mut self, seed: u64) -> Result<()> {
        let started = Instant::now();
        self.disk().cut_power();
        self.node.kill_server()?;
        let killed = started.elapsed();
        let losses = self.file_system.power_cycle(seed)?;
        let mounted = started.elapsed();
        self.node.boot_server_machine(seed);
        self.node.start_server().context("the server does not start after the power cut")?;
        println!(
            "power cut: of the unflushed writes {losses:?}; server dead after {killed:.1?}, disk back after {mounted:.1?}, \
             server back after {:.1?}",
            started.elapsed()
        );
        Ok(())
    }
}

/// Runs rounds, each with a seed of its own, until time is up or one fails; the error names the round.
pub(super) fn run_rounds(seed: u64, mut round: impl FnMut(u64) -> Result<()>) -> Result<()> {
    let started = Instant::now();
    let asked_for = std::env::var(ROUNDS_VARIABLE).ok().map(|rounds| rounds.parse()).transpose()?;
    for number in 0..asked_for.unwrap_or(ROUNDS_MAX) {
        let is_enough = number >= ROUNDS_MIN && started.elapsed() > ROUNDS_BUDGET;
        if is_enough && asked_for.is_none() {
            println!("{number} rounds in {:.1?}", started.elapsed());
            break;
        }
        round(seed.wrapping_add(number)).with_context(|| format!("round {number} of seed {seed}"))?;
    }
    Ok(())
}
