//! Tests across crates that need no block device: they run on this machine, in `cargo test` and in the host part of
//! `cargo lab test`.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

mod bench_server;
mod crowd;
mod programs;
mod silent;
mod simulator;
mod units;
