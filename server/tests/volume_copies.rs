//! Snapshots, clones and what is restored, on file systems that share blocks: what is in them, what waits for them, and how they end.
//!
//! Every test has a file system of its own on a loop device, and a data server in this process. Without root it says `SKIP why`.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests, as the next one; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;

#[path = "volume_copies/contents.rs"]
mod contents;
#[path = "volume_copies/endings.rs"]
mod endings;
#[path = "volume_copies/instant.rs"]
mod instant;
#[path = "volume_copies/stage.rs"]
mod stage;
#[path = "volume_copies/stall.rs"]
mod stall;
