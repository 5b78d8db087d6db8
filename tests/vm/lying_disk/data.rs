//! Data on a disk that lies: random writes over two connections of one attachment, a power cut, and a look at every block.
//!
//! The tests speak NBD themselves, because only so they know exactly which request was answered before which was sent.
//! What each block may hold afterwards is `testlab::block_history`'s to say: not older than its last write that was answered
//! with FUA, or answered before a FLUSH that was answered; where there is no write cache, not older than its last answered
//! write; and never anything that was not written there. Blocks may be torn at sectors between writes that are allowed.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use proto::nbd::TransmissionFlags;
use proto::nbd::transmission::{Command, CommandFlags};
use proto::v1::WriteCache;
use testlab::block_history::{BLOCK_BYTES, BlockHistory, Blocks, Pattern, SentFlush, SentWrite, Violation};
use testlab::harness::Env;
use testlab::management_api::export_of;
use testlab::nbd_client::Client;
use testlab::seed;

use super::rig::{Rig, run_rounds};

const VOLUME: &str = "vol-1";

const NODE: &str = "node-1";
const OTHER_NODE: &str = "node-2";

/// Blocks of the volume: few enough for most of them to be written several times between two cuts.
const BLOCK_COUNT: usize = 1024;

/// Connections of the session: a FLUSH on one covers what was answered on the other.
const CONNECTIONS: usize = 2;

/// Longest write in blocks.
const WRITE_BLOCKS_MAX: usize = 16;

/// Most requests in flight on both connections together.
const IN_FLIGHT_MAX: usize = 24;

/// The power is cut at a write or flush of the disk's chosen from these of a round.
const DISK_REQUESTS: Range<u64> = 20..400;

/// The power is cut by then, however few requests the disk has seen.
const TRAFFIC_SECONDS_MAX: u64 = 4;

/// One of so many requests is a FLUSH, another of so many writes has FUA; each round chooses its own number up to this. The
/// rarer, the more there is to lose.
const DURABLE_ONE_IN_MAX: u32 = 60;

/// What is read at a time when the blocks are looked at.
const CHECK_BLOCKS: usize = 128;

/// FLUSHes of a round that is cut after the last of them.
const FLUSHES_BEFORE_THE_CUT: u64 = 3;

/// Writes of one block each that such a FLUSH covers: one in three is lost whole if it was not done.
const WRITES_BEFORE_A_FLUSH: usize = 24;

/// Rounds within which a server that skips its flush has to be caught.
const ROUNDS_TO_CATCH: u64 = 4;

pub(super) fn flushed_data_survives_a_power_cut(env: &Env) -> Result<()> {
    survives_power_cuts(env, WriteCache::On, &[])
}

pub(super) fn flushed_data_survives_a_power_cut_through_the_page_cache(env: &Env) -> Result<()> {
    survives_power_cuts(env, WriteCache::On, &["--cache", "writeback"])
}

pub(super) fn without_a_write_cache_every_answered_write_survives_a_power_cut(env: &Env) -> Result<()> {
    survives_power_cuts(env, WriteCache::Off, &[])
}

/// What a former holder wrote is durable before the next one can read it.
pub(super) fn what_the_next_holder_reads_survives_a_power_cut(env: &Env) -> Result<()> {
    let seed = seed::choose()?;
    let mut volume = VolumeUnderTest::make(env, seed, WriteCache::On, &["--cache", "writeback"])?;
    run_rounds(seed, |round_seed| volume.take_over_and_cut(round_seed))
}

fn survives_power_cuts(env: &Env, write_cache: WriteCache, server_options: &[&str]) -> Result<()> {
    let seed = seed::choose()?;
    let mut volume = VolumeUnderTest::make(env, seed, write_cache, server_options)?;
    run_rounds(seed, |round_seed| volume.round(round_seed))
}

/// The check of the tests above is only worth something if it fails where it should.
pub(super) fn a_server_that_skips_its_flush_is_caught(env: &Env) -> Result<()> {
    let seed = seed::choose()?;
    let mut volume = VolumeUnderTest::make(env, seed, WriteCache::On, &["--fault", "skip-flush"])?;
    is_caught("every flush", seed, |round_seed| volume.round(round_seed))
}

/// One FLUSH that was not done is found too, and it is the one that is found: a server that would skip a later one passes.
pub(super) fn a_server_that_skips_one_flush_is_caught(env: &Env) -> Result<()> {
    let seed = seed::choose()?;
    let fault = format!("skip-flush={FLUSHES_BEFORE_THE_CUT}");
    let mut volume = VolumeUnderTest::make(env, seed, WriteCache::On, &["--fault", &fault])?;
    volume.flush_and_cut(seed, FLUSHES_BEFORE_THE_CUT - 1).context("no FLUSH was skipped yet")?;
    is_caught("one flush", seed, |round_seed| {
        volume.flush_and_cut(round_seed.wrapping_add(1), FLUSHES_BEFORE_THE_CUT)
    })
}

/// Runs rounds until one finds a violation; any other failure is the test's own.
fn is_caught(skipped: &str, seed: u64, mut round: impl FnMut(u64) -> Result<()>) -> Result<()> {
    for number in 0..ROUNDS_TO_CATCH {
        match round(seed.wrapping_add(number)) {
            Ok(()) => println!("round {number}: nothing that was flushed was lost, by luck"),
            Err(error) if error.is::<Violation>() => {
                println!("caught in round {number}: {error:#}");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    bail!("a server that skips {skipped} went through {ROUNDS_TO_CATCH} power cuts unnoticed (seed {seed})")
}

/// A volume on the lying disk and all that was ever done to it.
struct VolumeUnderTest {
    rig: Rig,
    history: BlockHistory,
    write_cache: WriteCache,
    session_epoch: u64,
}

impl VolumeUnderTest {
    fn make(env: &Env, seed: u64, write_cache: WriteCache, server_options: &[&str]) -> Result<Self> {
        let rig = Rig::start(env, server_options)?;
        let capacity_bytes = (BLOCK_COUNT * BLOCK_BYTES) as u64;
        rig.management()?.create_volume(VOLUME, capacity_bytes, write_cache)?;
        Ok(Self { rig, history: BlockHistory::new(seed, BLOCK_COUNT), write_cache, session_epoch: 0 })
    }

    /// Traffic, a power cut in its middle, and the verdict.
    fn round(&mut self, seed: u64) -> Result<()> {
        let connections = self.open()?;
        let has_cache = connections[0].info.flags.contains(TransmissionFlags::SEND_FLUSH);
        ensure!(
            has_cache == (self.write_cache == WriteCache::On),
            "a write cache is announced: {has_cache}, asked for: {:?}",
            self.write_cache
        );
        let mut random = fastrand::Rng::with_seed(seed);
        self.rig.disk().cut_power_after(random.u64(DISK_REQUESTS));
        let durable_one_in = random.u32(4..=DURABLE_ONE_IN_MAX);
        let mut traffic = Traffic {
            history: &mut self.history,
            connections,
            has_cache,
            random,
            durable_one_in,
            in_flight: HashMap::new(),
            answered: 0,
        };
        let ended = traffic.run(|| self.rig.disk().is_cut());
        let answered = traffic.answered;
        // What still happens on the way to the disk finds it without power.
        self.rig.disk().cut_power();
        traffic.take_last_replies(ended?)?;
        println!("round of seed {seed}: {answered} requests answered before the cut was noticed");
        drop(traffic);
        self.rig.power_cycle(seed)?;
        self.check()
    }

    /// Batches of writes, a FLUSH after each, a power cut right after the last one's reply, and the verdict.
    fn flush_and_cut(&mut self, seed: u64, flushes: u64) -> Result<()> {
        let mut connections = self.open()?;
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..flushes {
            self.write_blocks(&mut connections[0], &mut random)?;
            let flush = self.history.send_flush();
            let flushed = connections[1].flush();
            flushed.map_err(|error| anyhow!("a flush failed: error {error}"))?;
            self.history.flush_answered(flush);
        }
        self.rig.disk().cut_power();
        drop(connections);
        self.rig.power_cycle(seed)?;
        self.check()
    }

    /// Writes that nobody flushes, another holder, a power cut, and the verdict: it counts as a FLUSH that the volume was
    /// attached anew. The one after takes it by force.
    fn take_over_and_cut(&mut self, seed: u64) -> Result<()> {
        let mut connections = self.open()?;
        let mut random = fastrand::Rng::with_seed(seed);
        self.write_blocks(&mut connections[0], &mut random)?;
        let flush = self.history.send_flush();
        let mut management = self.rig.management()?;
        if random.bool() {
            ensure!(management.detach_volume(VOLUME)?, "it was not attached");
        }
        let taken = management.take_volume(VOLUME, OTHER_NODE)?;
        ensure!(!taken.existed, "the other node had it before");
        self.history.flush_answered(flush);
        self.rig.disk().cut_power();
        drop(connections);
        self.rig.power_cycle(seed)?;
        ensure!(self.rig.management()?.detach_volume(VOLUME)?, "the other node lost it");
        self.session_epoch = 0;
        self.check()
    }

    fn write_blocks(&mut self, connection: &mut Client, random: &mut fastrand::Rng) -> Result<()> {
        for _ in 0..WRITES_BEFORE_A_FLUSH {
            let blocks = Blocks { first: random.usize(0..BLOCK_COUNT), count: 1 };
            let (write, payload) = self.history.send_write(blocks, Pattern::Stamped);
            let written = connection.write(blocks.offset_bytes(), &payload);
            written.map_err(|error| anyhow!("a write failed: error {error}"))?;
            self.history.write_answered(write, false);
        }
        Ok(())
    }

    /// Reads every block and compares it with what it may hold.
    fn check(&mut self) -> Result<()> {
        let mut connections = self.open()?;
        for first in (0..self.history.block_count()).step_by(CHECK_BLOCKS) {
            let blocks = Blocks { first, count: CHECK_BLOCKS };
            let found = connections[0].read(blocks.offset_bytes(), blocks.length_bytes());
            let found = found.map_err(|error| anyhow!("READ of {blocks:?}: error {error}"))?;
            self.history.check_and_adopt(blocks, &found)?;
        }
        Ok(())
    }

    /// Opens the attachment's export, with an epoch that fences whatever was open before.
    fn open(&mut self) -> Result<Vec<Client>> {
        let attached = self.rig.management()?.attach_volume(VOLUME, NODE)?;
        ensure!(attached.existed == (self.session_epoch > 0), "the attachment did not survive the power cut");
        self.session_epoch += 1;
        let connect = |slot| {
            let (address, name) = export_of(&attached, self.session_epoch, slot as u32)?;
            Ok(Client::open(address, &name)?)
        };
        (0..CONNECTIONS).map(connect).collect()
    }
}

/// Random requests over the connections of one session, and the book of their replies.
struct Traffic<'a> {
    history: &'a mut BlockHistory,
    connections: Vec<Client>,
    has_cache: bool,
    random: fastrand::Rng,
    durable_one_in: u32,
    in_flight: HashMap<(usize, u64), Sent>,
    answered: u64,
}

#[derive(Clone, Copy)]
enum Sent {
    Write { write: SentWrite, durable: bool },
    Flush(SentFlush),
}

/// Why the traffic ended.
enum Ended {
    TimeIsUp,
    /// A request failed, as it has to without power.
    RequestFailed,
}

impl Traffic<'_> {
    /// Sends and receives until a request fails or time is up. `is_cut` tells whether the power is gone already.
    fn run(&mut self, is_cut: impl Fn() -> bool) -> Result<Ended> {
        let deadline = Instant::now() + Duration::from_secs(TRAFFIC_SECONDS_MAX);
        while Instant::now() < deadline {
            let wanted_in_flight = self.random.usize(1..=IN_FLIGHT_MAX);
            while self.in_flight.len() < wanted_in_flight && self.send_one()? {}
            let connection = self.busiest_connection();
            if !self.receive_one(connection)? {
                ensure!(is_cut(), "a request failed while the disk had power");
                return Ok(Ended::RequestFailed);
            }
        }
        Ok(Ended::TimeIsUp)
    }

    /// Takes the replies to what is in flight: a write or flush that succeeded although the power is gone counts like any.
    fn take_last_replies(&mut self, ended: Ended) -> Result<()> {
        let mut failures = u64::from(matches!(ended, Ended::RequestFailed));
        while !self.in_flight.is_empty() {
            let connection = self.busiest_connection();
            failures += u64::from(!self.receive_one(connection)?);
        }
        println!("{failures} requests failed for the lack of power");
        Ok(())
    }

    /// Sends one request; false where the blocks it chose are busy, so that it is better to receive first.
    fn send_one(&mut self) -> Result<bool> {
        let connection = self.random.usize(0..CONNECTIONS);
        if self.has_cache && self.random.u32(0..self.durable_one_in) == 0 {
            let flush = self.history.send_flush();
            let cookie = self.connections[connection].send(Command::Flush, CommandFlags::NONE, 0, 0, &[]);
            self.in_flight.insert((connection, cookie), Sent::Flush(flush));
            return Ok(true);
        }
        let count = self.random.usize(1..=WRITE_BLOCKS_MAX);
        let blocks = Blocks { first: self.random.usize(0..=BLOCK_COUNT - count), count };
        if !self.history.is_idle(blocks) {
            return Ok(false);
        }
        let fua = self.random.u32(0..self.durable_one_in) == 0;
        let flags = if fua { CommandFlags::FUA } else { CommandFlags::NONE };
        let (pattern, command) = match self.random.u8(0..8) {
            0 => (Pattern::Zeroes, Command::WriteZeroes),
            _ => (Pattern::Stamped, Command::Write),
        };
        let (write, payload) = self.history.send_write(blocks, pattern);
        let (offset_bytes, length_bytes) = (blocks.offset_bytes(), blocks.length_bytes());
        let cookie = self.connections[connection].send(command, flags, offset_bytes, length_bytes, &payload);
        self.in_flight.insert((connection, cookie), Sent::Write { write, durable: fua || !self.has_cache });
        Ok(true)
    }

    /// Waits for one reply and enters it; false if it is an error.
    fn receive_one(&mut self, connection: usize) -> Result<bool> {
        let reply = self.connections[connection].receive()?;
        let sent =
            self.in_flight.remove(&(connection, reply.cookie)).context("a reply that nobody waits for")?;
        if reply.error != 0 {
            return Ok(false);
        }
        self.answered += 1;
        match sent {
            Sent::Write { write, durable } => self.history.write_answered(write, durable),
            Sent::Flush(flush) => self.history.flush_answered(flush),
        }
        Ok(true)
    }

    fn busiest_connection(&self) -> usize {
        let in_flight = |index| self.in_flight.keys().filter(|(connection, _)| *connection == index).count();
        let busiest = (0..CONNECTIONS).max_by_key(|index| in_flight(*index));
        busiest.unwrap_or_default()
    }
}
