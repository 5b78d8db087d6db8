//! The loop of the load: waits for replies, counts them, and asks for as much again.
//!
//! Owns the connections, the clock and the counts. One thread; with one connection its socket blocks, with more they do not
//! and one epoll waits for all (edge-triggered, so that nothing is told twice). Called by `mod`.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::connection::{Answered, Connection};
use super::{Load, LoadError, Operation, Order, Outcome, PEER_DEADLINE};

/// Room for what one receive brings: a queue of 32 blocks of 4 KiB, or a large block.
const RECEIVE_BYTES: usize = 1 << 20;

/// Connections that one wait tells of; the others are told of by the next.
const EVENTS_PER_WAIT: usize = 256;

/// The longest latency that is told from longer ones, in nanoseconds.
const LATENCY_NS_MAX: u64 = 100_000_000_000;

/// Significant digits of a latency.
const LATENCY_DIGITS: u8 = 3;

/// Most requests in flight on a connection: a slot's number has 16 bits, and nobody needs as many.
const DEPTH_MAX: u32 = 4096;

/// When a load ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// When it has been measured for so long.
    Time {
        /// Not measured yet.
        warm_up: Duration,
        /// Measured.
        runtime: Duration,
    },
    /// When so many bytes from the export's start have been asked for, each once; whole blocks.
    Covered {
        /// How many.
        length_bytes: u64,
    },
}

/// Where a connection's next request goes.
struct Offsets {
    random: fastrand::Rng,
    /// The blocks `begin..end` are this connection's, one after the other; all are everybody's where the order is random.
    begin: u64,
    end: u64,
    next: u64,
    /// Whether the connection is done when it has asked for its last block, rather than beginning again.
    once: bool,
}

impl Offsets {
    /// The next block's number.
    fn take(&mut self, order: Order) -> Option<u64> {
        if order == Order::Random {
            return Some(self.random.u64(self.begin..self.end));
        }
        if self.next == self.end {
            if self.once {
                return None;
            }
            self.next = self.begin;
        }
        self.next += 1;
        Some(self.next - 1)
    }
}

/// A load that is connected.
pub(super) struct Generator {
    connections: Vec<Connection>,
    epoll: Option<OwnedFd>,
    order: Order,
    block_bytes: u64,
    size_bytes: u64,
    payload: Vec<u8>,
    latencies_ns: Histogram<u64>,
    ios_all: u64,
    /// By connection, answered while it was measured.
    ios: Vec<u64>,
}

impl Generator {
    /// Makes every connection; `seed`: the data is to be proved.
    pub(super) fn connect(load: &Load, seed: Option<u64>) -> Result<Self, LoadError> {
        if load.connections == 0 || !(1..=DEPTH_MAX).contains(&load.depth) {
            return Err(LoadError::Load("a load needs a connection and 1 to 4096 requests in flight"));
        }
        if load.block_bytes == 0 || !load.block_bytes.is_multiple_of(8) {
            return Err(LoadError::Load("a block's size is a multiple of 8"));
        }
        let mut connections = Vec::with_capacity(load.connections as usize);
        let mut size_bytes = u64::MAX;
        for _ in 0..load.connections {
            let (connection, export) = Connection::open(load, seed)?;
            size_bytes = size_bytes.min(export.size_bytes);
            connections.push(connection);
        }
        if size_bytes / u64::from(load.block_bytes) < u64::from(load.connections) {
            return Err(LoadError::TooSmall { size_bytes });
        }
        let epoll = if connections.len() == 1 { None } else { Some(watch(&connections)?) };
        let latencies_ns = Histogram::new_with_max(LATENCY_NS_MAX, LATENCY_DIGITS)
            .map_err(|_| LoadError::Load("the histogram's bounds are wrong"))?;
        let payload_bytes = if load.operation == Operation::Write { load.block_bytes as usize } else { 0 };
        Ok(Self {
            ios: vec![0; connections.len()],
            connections,
            epoll,
            order: load.order,
            block_bytes: u64::from(load.block_bytes),
            size_bytes,
            payload: vec![0x5a; payload_bytes],
            latencies_ns,
            ios_all: 0,
        })
    }

    /// Loads the server until it is enough; every request is answered at the end.
    pub(super) fn run(mut self, until: Until) -> Result<Outcome, LoadError> {
        let begun = Instant::now();
        let (measured_from, end) = match until {
            Until::Time { warm_up, runtime } => (begun + warm_up, Some(begun + warm_up + runtime)),
            Until::Covered { .. } => (begun, None),
        };
        let mut offsets = self.offsets(until);
        for (connection, offsets) in self.connections.iter_mut().zip(&mut offsets) {
            ask(connection, offsets, self.order, self.block_bytes);
            connection.send(&self.payload, begun)?;
        }
        let mut ready: Vec<usize> = Vec::with_capacity(EVENTS_PER_WAIT);
        let mut buffer = vec![0; RECEIVE_BYTES];
        let mut answered: Vec<Answered> = Vec::new();
        let mut ended_at = None;
        while self.connections.iter().any(|connection| !connection.is_idle()) {
            self.wait(&mut ready)?;
            for &index in &ready {
                let connection = &mut self.connections[index];
                if connection.is_idle() {
                    continue;
                }
                connection.receive(&mut buffer, self.epoll.is_none(), &mut answered)?;
                let now = Instant::now();
                let is_over = end.is_some_and(|end| now >= end);
                if is_over && ended_at.is_none() {
                    ended_at = Some(now);
                }
                self.ios_all += answered.len() as u64;
                if now >= measured_from && !is_over {
                    self.ios[index] += answered.len() as u64;
                    for request in &answered {
                        let latency = now.saturating_duration_since(request.sent_at);
                        self.latencies_ns.saturating_record(latency.as_nanos() as u64);
                    }
                }
                answered.clear();
                if !is_over {
                    ask(connection, &mut offsets[index], self.order, self.block_bytes);
                }
                connection.send(&self.payload, now)?;
            }
        }
        let measured = ended_at.unwrap_or_else(Instant::now).saturating_duration_since(measured_from);
        Ok(self.finish(measured))
    }

    fn finish(self, measured: Duration) -> Outcome {
        let microseconds = |quantile| self.latencies_ns.value_at_quantile(quantile) as f64 / 1000.0;
        let outcome = Outcome {
            ios_all: self.ios_all,
            ios: self.ios.iter().sum(),
            seconds: measured.as_secs_f64(),
            p50_us: microseconds(0.5),
            p99_us: microseconds(0.99),
            ios_of_slowest_connection: self.ios.iter().copied().min().unwrap_or(0),
        };
        for connection in self.connections {
            connection.close();
        }
        outcome
    }

    /// Divides the export's blocks among the connections.
    fn offsets(&self, until: Until) -> Vec<Offsets> {
        let bytes = match until {
            Until::Time { .. } => self.size_bytes,
            Until::Covered { length_bytes } => length_bytes.min(self.size_bytes),
        };
        let (blocks, connections) = (bytes / self.block_bytes, self.connections.len() as u64);
        let of_connection = |number: u64| {
            let share = match self.order {
                Order::Random => 0..blocks,
                Order::Sequential => number * blocks / connections..(number + 1) * blocks / connections,
            };
            let once = matches!(until, Until::Covered { .. });
            let random = fastrand::Rng::with_seed(number);
            Offsets { random, begin: share.start, end: share.end, next: share.start, once }
        };
        (0..connections).map(of_connection).collect()
    }

    /// Waits until a connection can go on; puts the numbers of those that can into `ready`.
    fn wait(&self, ready: &mut Vec<usize>) -> Result<(), LoadError> {
        ready.clear();
        let Some(epoll) = &self.epoll else {
            ready.push(0);
            return Ok(());
        };
        let mut events = [const { MaybeUninit::uninit() }; EVENTS_PER_WAIT];
        let timeout = rustix::event::Timespec { tv_sec: PEER_DEADLINE.as_secs() as i64, tv_nsec: 0 };
        let told = match epoll::wait(epoll, &mut events, Some(&timeout)) {
            Ok((told, _)) => told,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(LoadError::Io { doing: "epoll_wait", source: error.into() }),
        };
        if told.is_empty() {
            return Err(LoadError::Silence(PEER_DEADLINE));
        }
        ready.extend(told.iter().map(|event| event.data.u64() as usize));
        Ok(())
    }
}

/// Puts as many requests in line as there is room for.
fn ask(connection: &mut Connection, offsets: &mut Offsets, order: Order, block_bytes: u64) {
    while connection.has_room() {
        let Some(block) = offsets.take(order) else { return };
        connection.ask(block * block_bytes);
    }
}

/// An epoll that tells when bytes have come or there is room for more.
fn watch(connections: &[Connection]) -> Result<OwnedFd, LoadError> {
    let failed = |doing| move |error: rustix::io::Errno| LoadError::Io { doing, source: error.into() };
    let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed("epoll_create"))?;
    for (index, connection) in connections.iter().enumerate() {
        let stream = connection.stream();
        stream.set_nonblocking(true).map_err(|source| LoadError::Io { doing: "a socket option", source })?;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        epoll::add(&epoll, stream, EventData::new_u64(index as u64), flags).map_err(failed("epoll_ctl"))?;
    }
    Ok(epoll)
}
