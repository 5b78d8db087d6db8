//! `nbd-load`: the load generator of `cargo lab bench-server` as a program, so that it can be built with the profile of what is
//! measured and pinned to a processor of its own.
//!
//! Reads its options and hands over to `testlab::nbd_load`; prints one line of JSON, an `Outcome`. Never part of the product.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use testlab::nbd_load::{Load, Operation, Order, run, verify};

#[derive(Parser)]
#[command(name = "nbd-load", about = "Loads an NBD server over many connections")]
struct CommandLine {
    /// Where the server listens
    address: SocketAddr,
    /// The export
    #[arg(long, default_value = "")]
    export: String,
    /// Connections
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// Requests in flight on each connection
    #[arg(long, default_value_t = 1)]
    depth: u32,
    /// Bytes of a request
    #[arg(long, default_value_t = 4096)]
    block_bytes: u32,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Reads for some time
    Read(Length),
    /// Writes for some time
    Write(Length),
    /// Writes, reads back and compares
    Verify {
        /// How much
        #[arg(long)]
        length_bytes: u64,
        /// What the data is made from
        #[arg(long)]
        seed: u64,
    },
}

#[derive(clap::Args)]
struct Length {
    /// One block after the other instead of at random offsets
    #[arg(long)]
    sequential: bool,
    /// Milliseconds that are not measured
    #[arg(long, default_value_t = 300)]
    warm_up_ms: u64,
    /// Milliseconds that are
    #[arg(long, default_value_t = 2000)]
    runtime_ms: u64,
}

fn main() -> ExitCode {
    match work(CommandLine::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbd-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(options: CommandLine) -> Result<()> {
    let load = |operation, length: &Length| Load {
        address: options.address,
        export: options.export.clone(),
        connections: options.connections,
        depth: options.depth,
        operation,
        order: if length.sequential { Order::Sequential } else { Order::Random },
        block_bytes: options.block_bytes,
        warm_up: Duration::from_millis(length.warm_up_ms),
        runtime: Duration::from_millis(length.runtime_ms),
    };
    let load = match &options.task {
        Task::Read(length) => load(Operation::Read, length),
        Task::Write(length) => load(Operation::Write, length),
        Task::Verify { length_bytes, seed } => {
            let length = Length { sequential: true, warm_up_ms: 0, runtime_ms: 0 };
            return verify(&load(Operation::Write, &length), *length_bytes, *seed).context("verify");
        }
    };
    let outcome = run(&load).context("the load")?;
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}
