//! Tests across crates that need no block device: they run on this machine, in `cargo test` and in the host part of
//! `cargo lab test`.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

mod api_examples;
mod apply;
mod bench_server;
mod chart;
mod container_images;
mod crowd;
mod csi_controller;
mod csi_sanity;
mod image_connections;
mod images;
mod incremental_images;
mod kubernetes_table;
mod programs;
mod silent;
mod tidy;
mod units;

/// Held by tests that measure, or that need most of the descriptors that this process may have.
static MEASURING: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn measuring() -> std::sync::MutexGuard<'static, ()> {
    MEASURING.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
