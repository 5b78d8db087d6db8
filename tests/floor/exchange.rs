//! What TCP itself costs: one process on each side, requests and replies of NBD's sizes, and nothing done with them.
//!
//! Owns: the exchange. A batch of requests leaves in one send and is received by as few receives as it takes; so do its
//! replies. No header is looked at, no byte is stored: any protocol over TCP pays at least this. Called by `main`: `tcp`
//! starts `answer` as its other end. Sizes: NBD's compact request and simple reply (the protocol's `doc/proto.md`).

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use rustix::net::{RecvFlags, recv};

const REQUEST_BYTES: usize = 28;
const SIMPLE_REPLY_BYTES: usize = 16;

/// Batches before the clock is read, in which the sockets' buffers grow to what the exchange needs.
const WARM_UP_BATCHES: u64 = 20;

/// Which way the payload goes.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    /// With the replies.
    Read,
    /// With the requests.
    Write,
}

/// What is exchanged.
#[derive(Args)]
pub(crate) struct Shape {
    /// Which way the payload goes
    #[arg(long, value_enum)]
    direction: Direction,
    /// Payload of each request
    #[arg(long)]
    block_bytes: usize,
    /// Requests in a batch
    #[arg(long)]
    depth: usize,
    /// Batches that are measured
    #[arg(long)]
    batches: u64,
}

impl Shape {
    /// Bytes of a batch of requests, and of its replies.
    fn batch_bytes(&self) -> (usize, usize) {
        let (request, reply) = match self.direction {
            Direction::Read => (REQUEST_BYTES, SIMPLE_REPLY_BYTES + self.block_bytes),
            Direction::Write => (REQUEST_BYTES + self.block_bytes, SIMPLE_REPLY_BYTES),
        };
        (request * self.depth, reply * self.depth)
    }
}

/// Sends the requests, receives the replies, says what one of them took.
pub(crate) fn ask(shape: &Shape) -> Result<()> {
    ensure!(shape.depth > 0 && shape.batches > 0, "there is nothing to exchange");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening")?;
    let mut answerer = Command::new(std::env::current_exe()?);
    answerer.arg("answer").arg(listener.local_addr()?.to_string());
    answerer.args(["--direction", if shape.direction == Direction::Read { "read" } else { "write" }]);
    for (option, value) in [("--block-bytes", shape.block_bytes), ("--depth", shape.depth)] {
        answerer.arg(option).arg(value.to_string());
    }
    answerer.arg("--batches").arg(shape.batches.to_string()).stdin(Stdio::null());
    let mut answerer = answerer.spawn().context("the other end")?;
    let (mut socket, _) = listener.accept().context("accepting")?;
    socket.set_nodelay(true)?;
    let (request_bytes, reply_bytes) = shape.batch_bytes();
    let (requests, mut replies) = (vec![1; request_bytes], vec![0; reply_bytes]);
    let mut exchange = |batches| -> Result<()> {
        for _ in 0..batches {
            socket.write_all(&requests)?;
            receive(&socket, &mut replies)?;
        }
        Ok(())
    };
    exchange(WARM_UP_BATCHES)?;
    let started = Instant::now();
    exchange(shape.batches)?;
    let nanoseconds = started.elapsed().as_nanos() as f64;
    let status = answerer.wait().context("the other end")?;
    ensure!(status.success(), "the other end: {status}");
    println!("{}", nanoseconds / (shape.batches * shape.depth as u64) as f64);
    Ok(())
}

/// Receives requests, sends replies.
pub(crate) fn answer(address: SocketAddr, shape: &Shape) -> Result<()> {
    let mut socket = TcpStream::connect(address).context("connecting")?;
    socket.set_nodelay(true)?;
    let (request_bytes, reply_bytes) = shape.batch_bytes();
    let (mut requests, replies) = (vec![0; request_bytes], vec![1; reply_bytes]);
    for _ in 0..WARM_UP_BATCHES + shape.batches {
        receive(&socket, &mut requests)?;
        socket.write_all(&replies)?;
    }
    Ok(())
}

/// Fills `buffer`.
fn receive(socket: &TcpStream, buffer: &mut [u8]) -> Result<()> {
    let mut received = 0;
    while received < buffer.len() {
        let (_, bytes) = recv(socket, &mut buffer[received..], RecvFlags::WAITALL)?;
        ensure!(bytes > 0, "the other end closed the connection");
        received += bytes;
    }
    Ok(())
}
