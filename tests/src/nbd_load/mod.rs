//! A load generator for NBD servers: any number of connections, each with so many requests in flight, on one thread.
//!
//! Owns the load: what is asked for, in which order, for how long, and what came of it. It is made to be cheap, so that the
//! server and not the generator is what a number is about: one `recv` takes all replies that have come, one `writev` sends
//! all requests that replace them, payloads that are measured are neither made nor looked at, and large ones are not even
//! copied. What is stored is proved by [`verify`], before anything is measured. Every reply's cookie, magic and error is
//! checked always. Only simple replies are asked for, so a server needs no more than the protocol's base.
//! Called by the `nbd-load` program (`cargo lab bench-server`) and by the tests of many connections.
//! Read in this order: `mod` (the load) → `generator` (the loop) → `connection` (one connection's bytes) → `pattern`.

mod connection;
mod generator;
mod pattern;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use proto::nbd::transmission::TransmissionError;
use serde::{Deserialize, Serialize};

use crate::nbd_client::OpenFailed;
use generator::{Generator, Until};

/// No reply of a living server takes longer.
const PEER_DEADLINE: Duration = Duration::from_secs(30);

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// READ.
    Read,
    /// WRITE.
    Write,
}

/// Where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// At random offsets, multiples of the block's size.
    Random,
    /// One block after the other, the connections evenly apart from each other.
    Sequential,
}

/// One load.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where the server listens.
    pub address: SocketAddr,
    /// The export; empty is the server's default one.
    pub export: String,
    /// How many connections.
    pub connections: u32,
    /// Requests in flight on each of them, at most 4096.
    pub depth: u32,
    /// What.
    pub operation: Operation,
    /// Where.
    pub order: Order,
    /// Bytes of each request; a multiple of 8.
    pub block_bytes: u32,
    /// How long the load runs before it is measured.
    pub warm_up: Duration,
    /// How long it is measured.
    pub runtime: Duration,
}

/// What came of a load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Requests that were answered from the first to the last, warm-up included.
    pub ios_all: u64,
    /// Requests that were answered while it was measured.
    pub ios: u64,
    /// How long it was measured, in seconds.
    pub seconds: f64,
    /// Microseconds from the send of a request to the receipt of its reply, which half of them stayed below.
    pub p50_us: f64,
    /// The same for 99 % of them.
    pub p99_us: f64,
    /// The slowest of all connections: how many requests it had answered while it was measured.
    pub ios_of_slowest_connection: u64,
}

impl Outcome {
    /// Requests answered in a second.
    pub fn iops(&self) -> f64 {
        self.ios as f64 / self.seconds
    }
}

/// Why a load came to nothing. Whatever it is, the load has ended: no number is made of a part of it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The connection cannot be made or has broken.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The system's own error; `TimedOut` and `WouldBlock`: the server stands still.
        source: io::Error,
    },
    /// The export could not be opened.
    #[error(transparent)]
    Open(#[from] OpenFailed),
    /// The server did not speak the protocol later.
    #[error(transparent)]
    Transmission(#[from] TransmissionError),
    /// The export has no room for a block on each connection.
    #[error("the export of {size_bytes} bytes is too small for this load")]
    TooSmall {
        /// The export's.
        size_bytes: u64,
    },
    /// A reply for a request that is not in flight.
    #[error("a reply with cookie {0:#x}, which is not in flight")]
    Cookie(u64),
    /// A request failed.
    #[error("the request at offset {offset_bytes} failed with NBD error {error}")]
    Refused {
        /// Its offset.
        offset_bytes: u64,
        /// NBD's error number.
        error: u32,
    },
    /// What was read is not what was written.
    #[error("the block at offset {0} is not what was written there")]
    Data(u64),
    /// The server closed a connection.
    #[error("the server closed a connection with requests in flight")]
    Closed,
    /// No reply on any connection for too long.
    #[error("no reply for {0:?}")]
    Silence(Duration),
    /// The load makes no sense.
    #[error("{0}")]
    Load(&'static str),
}

/// Runs the load.
///
/// # Errors
/// [`LoadError`], by cause.
pub fn run(load: &Load) -> Result<Outcome, LoadError> {
    Generator::connect(load, None)?.run(Until::Time { warm_up: load.warm_up, runtime: load.runtime })
}

/// Proves that the server stores what it is given: writes `length_bytes` from the export's start, over as many connections
/// and with as many in flight as the load says, then reads them back and compares. `seed` makes the data.
///
/// # Errors
/// [`LoadError::Data`] where it does not; any other as in [`run`].
pub fn verify(load: &Load, length_bytes: u64, seed: u64) -> Result<(), LoadError> {
    for operation in [Operation::Write, Operation::Read] {
        let load = Load { operation, order: Order::Sequential, ..load.clone() };
        Generator::connect(&load, Some(seed))?.run(Until::Covered { length_bytes })?;
    }
    Ok(())
}
