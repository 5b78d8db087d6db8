//! The floor that `cargo lab cost` measures against: what no implementation of this design can avoid, and nothing else.
//!
//! Two programs in one: `null` is a ublk disk that answers at once (the block layer, the driver and one daemon), `tcp` is
//! two processes that exchange requests and replies of NBD's sizes (the network). A daemon that serves a disk over TCP has
//! to do both. Called by `cost_guest` inside the test VM, built with the profile of what is compared with it. Never part of
//! the product, and it stores nothing.

mod exchange;
mod null_batch;
mod null_target;

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "floor", about = "The least that a block device over TCP can cost")]
struct CommandLine {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// Serves a ublk disk on which every request succeeds at once, until standard input ends; prints its path
    Null {
        /// Its size
        #[arg(long, default_value_t = 256)]
        size_mib: u64,
        /// With commands for many requests at once (`UBLK_F_BATCH_IO`)
        #[arg(long)]
        batch: bool,
    },
    /// Exchanges requests and replies with a process of its own; prints nanoseconds per request
    Tcp(exchange::Shape),
    /// The other end of `tcp`
    #[command(hide = true)]
    Answer {
        /// Where `tcp` listens
        address: SocketAddr,
        #[command(flatten)]
        shape: exchange::Shape,
    },
}

fn main() -> ExitCode {
    match run(&CommandLine::parse().part) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(part: &Part) -> Result<()> {
    match part {
        Part::Null { size_mib, batch } => null_target::serve(*size_mib, *batch),
        Part::Tcp(shape) => exchange::ask(shape),
        Part::Answer { address, shape } => exchange::answer(*address, shape),
    }
}
