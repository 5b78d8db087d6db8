//! The data side, spoken to over loopback: by a small client of the tests' own, and by foreign NBD clients.
//!
//! Every test starts its own data server in this process, with a real catalog in a directory of its own. What needs root,
//! a loop device or a program that is not here says `SKIP why`; with `VOLNODE_LAB_TOOLS=1` that is a failure.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

mod attack;
mod block_status;
mod chunks;
mod client;
mod conformance;
mod failed_sync;
mod fencing;
mod foreign;
mod handshake;
mod hostile;
mod hostile_handshake;
mod hostile_requests;
mod limits;
mod model;
mod peers;
mod protocol;
mod replies_in_chunks;
mod storage;
mod support;
mod throttling;
mod tls;
#[path = "../unit_filter/mod.rs"]
mod unit_filter;
