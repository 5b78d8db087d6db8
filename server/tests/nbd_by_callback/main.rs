//! The tests of the data side once more, on volumes whose backend completes by call-back from a thread of its own: late, out of
//! order and at times in part. What only concerns files, sockets or foreign programs is left to `nbd_data/main.rs`.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.
#![allow(dead_code)] // The other tests use all of what is shared.

#[path = "../nbd_data/attack.rs"]
mod attack;
#[path = "../nbd_data/block_status.rs"]
mod block_status;
mod by_callback;
#[path = "../nbd_data/chunks.rs"]
mod chunks;
#[path = "../nbd_data/client.rs"]
mod client;
#[path = "../nbd_data/failed_sync.rs"]
mod failed_sync;
#[path = "../nbd_data/fencing.rs"]
mod fencing;
#[path = "../nbd_data/foreign.rs"]
mod foreign;
#[path = "../nbd_data/hostile_requests.rs"]
mod hostile_requests;
#[path = "../nbd_data/limits.rs"]
mod limits;
#[path = "../nbd_data/model.rs"]
mod model;
#[path = "../nbd_data/protocol.rs"]
mod protocol;
#[path = "../nbd_data/replies_in_chunks.rs"]
mod replies_in_chunks;
#[path = "../nbd_data/support.rs"]
mod support;
#[path = "../unit_filter/mod.rs"]
mod unit_filter;
