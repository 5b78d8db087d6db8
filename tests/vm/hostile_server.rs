//! What a server can do to our client: a reply that is not what was asked for is an error to the reader, never a wrong byte,
//! and the disk can always be taken away. On every data path that the kernel has, because each moves payloads by operations of
//! its own.
//!
//! The server here is the test's own: an honest NBD server of a pattern, but for requests of one place, which it answers as the
//! case says.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use proto::nbd::handshake::server::{Event, ServerHandshake};
use proto::nbd::transmission::{Command as NbdCommand, NbdError, REQUEST_BYTES, Request, SimpleReply};
use proto::nbd::{ExportInfo, TransmissionFlags};
use testlab::harness::{Env, Test};
use testlab::shell::wait_for;
use testlab::storage_node::StorageNode;
use ublk_core::DataPath;

use crate::direct;
use crate::ride_through::{BOUND, wait_for_state};

pub(crate) const TESTS: &[Test] = &[
    Test::new("hostile_server::wrong_replies_are_errors_and_never_wrong_bytes", wrong_replies_are_errors),
    Test::new("hostile_server::a_reply_in_single_bytes_is_the_same_reply", a_reply_in_single_bytes),
    Test::new(
        "hostile_server::a_connection_lost_inside_a_write_is_an_error",
        a_connection_lost_inside_a_write,
    ),
    Test::new("hostile_server::an_error_of_one_request_is_no_error_of_others", an_error_of_one_request),
    Test::new("hostile_server::a_server_that_shuts_down_is_waited_for", a_server_that_shuts_down),
    Test::new(
        "hostile_server::what_a_server_that_shuts_down_still_owes_on_other_connections_is_waited_for",
        replies_still_owed,
    )
    .once(),
    Test::new(
        "hostile_server::a_server_that_refuses_everything_is_not_back",
        a_server_that_refuses_everything,
    )
    .once(),
    Test::new(
        "hostile_server::a_server_that_opens_and_serves_nothing_is_not_back",
        a_server_that_serves_nothing,
    )
    .once(),
];

const SIZE_BYTES: u64 = 16 << 20;
/// Requests from here on are answered as the case says; below it lies what the kernel reads of its own accord.
const TRAP_BYTES: u64 = 8 << 20;
const READ_BYTES: usize = 64 << 10;
/// More than the sockets between client and server hold, so that the WRITE is still being sent when it is cut off.
const WRITE_BYTES: usize = 1 << 20;

const SINGLE_BYTE_READS: usize = 10;
/// Much less than a client waits for a reply.
const LATE: Duration = Duration::from_secs(3);

/// How requests beyond [`TRAP_BYTES`] are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    WrongCookie,
    WrongMagic,
    PayloadCutShort,
    ReplyTwice,
    CloseAtOnce,
    /// Honest, but one byte in each segment.
    SingleBytes,
    /// An error, as NBD has it.
    Error,
    /// Half of a WRITE's payload is taken, and no more.
    CloseInsideWrite,
    /// As one that is being stopped: it says so, and does nothing. The next connection finds an honest one.
    ShuttingDown,
    /// The first WRITE on any of its connections is done and answered after [`LATE`], all others are refused as above.
    ShuttingDownSlowly,
    /// Whatever is asked.
    Honest,
}

fn wrong_replies_are_errors(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    for &data_path in env.series.data_paths() {
        read_fails(&node, Case::PayloadCutShort, data_path)?;
    }
    // What a header says is the same to all data paths.
    let best = env.series.data_paths()[0];
    for case in [Case::WrongCookie, Case::WrongMagic, Case::CloseAtOnce] {
        read_fails(&node, case, best)?;
    }
    // The first reply is honest; the second belongs to nothing, so the connection cannot be trusted any more.
    let disk = HostileDisk::attach(&node, Case::ReplyTwice, best)?;
    if let Some(bytes) = disk.read(TRAP_BYTES)? {
        ensure!(bytes == pattern(TRAP_BYTES, READ_BYTES), "wrong bytes");
    }
    ensure!(disk.read(TRAP_BYTES)?.is_none(), "the connection was trusted again");
    node.detach(&disk.uri)
}

fn read_fails(node: &StorageNode, case: Case, data_path: DataPath) -> Result<()> {
    let disk = HostileDisk::attach(node, case, data_path)?;
    ensure!(disk.read(TRAP_BYTES)?.is_none(), "{data_path} {case:?}: the read succeeded");
    wait_for_state(node, &disk.uri, "stalled", BOUND)?;
    node.detach(&disk.uri)
}

fn a_reply_in_single_bytes(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    for &data_path in env.series.data_paths() {
        let disk = HostileDisk::attach(&node, Case::SingleBytes, data_path)?;
        // A receive that has to wait 128 times goes on in a kernel worker, and what is linked behind it now and then, too.
        for _ in 0..SINGLE_BYTE_READS {
            let bytes = disk.read(TRAP_BYTES)?.context("the read failed")?;
            ensure!(bytes == pattern(TRAP_BYTES, READ_BYTES), "{data_path}: wrong bytes");
        }
        wait_for_state(&node, &disk.uri, "live", BOUND)?;
        node.detach(&disk.uri)?;
    }
    Ok(())
}

fn a_connection_lost_inside_a_write(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    for &data_path in env.series.data_paths() {
        let disk = HostileDisk::attach(&node, Case::CloseInsideWrite, data_path)?;
        ensure!(!disk.write(TRAP_BYTES, WRITE_BYTES)?, "{data_path}: the write succeeded");
        // Told by the device process, which first answers the write.
        wait_for_state(&node, &disk.uri, "stalled", BOUND)?;
        node.detach(&disk.uri)?;
    }
    Ok(())
}

fn an_error_of_one_request(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    for &data_path in env.series.data_paths() {
        let disk = HostileDisk::attach(&node, Case::Error, data_path)?;
        ensure!(disk.read(TRAP_BYTES)?.is_none(), "{data_path}: the read succeeded");
        let honest = disk.read(1 << 20)?.context("an honest read failed")?;
        ensure!(honest == pattern(1 << 20, READ_BYTES), "{data_path}: wrong bytes");
        wait_for_state(&node, &disk.uri, "live", BOUND)?;
        node.detach(&disk.uri)?;
    }
    Ok(())
}

/// Not only reads, although the server promises nothing: what it has refused it has not done.
fn a_server_that_shuts_down(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    for &data_path in env.series.data_paths() {
        let disk = HostileDisk::attach(&node, Case::ShuttingDown, data_path)?;
        ensure!(disk.write(TRAP_BYTES, WRITE_BYTES)?, "{data_path}: the write failed");
        let bytes = disk.read(TRAP_BYTES)?.context("the read failed")?;
        ensure!(bytes == pattern(TRAP_BYTES, READ_BYTES), "{data_path}: wrong bytes");
        wait_for_state(&node, &disk.uri, "live", BOUND)?;
        node.detach(&disk.uri)?;
    }
    Ok(())
}

/// The server promises nothing, so a write that was cut off could not be sent again.
fn replies_still_owed(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let slowly = Case::ShuttingDownSlowly;
    let cases = [slowly, slowly, Case::Honest, Case::Honest];
    let options = ["--queues", "1", "--connections", "2", "--on-stall", "wait"];
    let flags = TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::CAN_MULTI_CONN);
    let disk = HostileDisk::attach_to(&node, &cases, flags, &options)?;
    thread::scope(|scope| {
        let begun_at = Instant::now();
        let late = scope.spawn(|| {
            let is_done = disk.write(TRAP_BYTES, READ_BYTES);
            is_done.map(|is_done| (is_done, Instant::now()))
        });
        // The other comes second, however slow the machine is.
        wait_for("the write that is answered late", Duration::from_secs(30), || {
            Ok(disk.has_written.load(Ordering::Relaxed).then_some(()))
        })?;
        ensure!(disk.write(TRAP_BYTES + (1 << 20), READ_BYTES)?, "what was refused failed");
        let Ok(late) = late.join() else { bail!("a panic") };
        let (is_done, ended_at) = late?;
        ensure!(is_done, "what was still to be answered failed");
        let took = ended_at - begun_at;
        ensure!(took >= LATE, "it was refused: it took {took:?}");
        Ok(())
    })?;
    wait_for_state(&node, &disk.uri, "live", BOUND)?;
    node.detach(&disk.uri)
}

fn a_server_that_refuses_everything(env: &Env) -> Result<()> {
    a_server_of_no_use(env, Case::ShuttingDown)
}

/// It opens the export, and whatever is asked ends the connection.
fn a_server_that_serves_nothing(env: &Env) -> Result<()> {
    a_server_of_no_use(env, Case::CloseAtOnce)
}

fn a_server_of_no_use(env: &Env, case: Case) -> Result<()> {
    let node = StorageNode::start(env)?;
    let options = ["--queues", "1", "--on-stall", "fail", "--after", "2s"];
    let cases = [case; 1000];
    let disk = HostileDisk::attach_to(&node, &cases, TransmissionFlags::HAS_FLAGS, &options)?;
    let begun_at = Instant::now();
    ensure!(disk.read(TRAP_BYTES)?.is_none(), "the read succeeded");
    let took = begun_at.elapsed();
    ensure!(took >= Duration::from_secs(2), "it was given up after {took:?}");
    let reconnects = node.attachment(&disk.uri)?["reconnects"].as_u64().context("reconnects")?;
    // With pauses that grow from a tenth of a second; without them there is one every few milliseconds.
    let most = 6 + took.as_secs();
    ensure!((1..=most).contains(&reconnects), "{reconnects} times in {took:?}");
    node.detach(&disk.uri)
}

/// A disk on the hostile server, which lives as long as its connections.
struct HostileDisk {
    uri: String,
    device: PathBuf,
    /// A WRITE has come to be answered by [`Case::ShuttingDownSlowly`].
    has_written: Arc<AtomicBool>,
}

impl HostileDisk {
    fn attach(node: &StorageNode, case: Case, data_path: DataPath) -> Result<Self> {
        // Where the server listens for one connection only, nothing is to be waited for when that is lost.
        let (cases, on_stall): (&[Case], &[&str]) = match case {
            Case::ShuttingDown => (&[Case::ShuttingDown, Case::Honest], &["--on-stall", "wait"]),
            _ => (&[case], &["--on-stall", "fail", "--after", "0"]),
        };
        let options = [&["--data-path", data_path.as_str()][..], on_stall].concat();
        Self::attach_to(node, cases, TransmissionFlags::HAS_FLAGS, &options)
    }

    /// On a server that treats its first connections in this way, and then listens no more.
    fn attach_to(
        node: &StorageNode,
        cases: &[Case],
        flags: TransmissionFlags,
        options: &[&str],
    ) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let uri = format!("nbd://{}/pattern", listener.local_addr()?);
        let cases = cases.to_vec();
        let has_written = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&has_written);
        thread::spawn(move || {
            for case in cases {
                let accepted = listener.accept();
                let has_written = Arc::clone(&seen);
                thread::spawn(move || {
                    let served = accepted
                        .map_err(Into::into)
                        .and_then(|(peer, _)| serve(peer, case, flags, &has_written));
                    if let Err(error) = served {
                        // As it should be: the client hangs up on what it cannot trust.
                        println!("{case:?}: {error:#}");
                    }
                });
            }
        });
        let device = node.attach(&[&[&*uri], options].concat())?;
        Ok(Self { uri, device, has_written })
    }

    /// Reads past the page cache; `None` if the disk says that it cannot.
    fn read(&self, offset_bytes: u64) -> Result<Option<Vec<u8>>> {
        // What the kernel itself has begun on the disk is over.
        rustix::fs::sync();
        direct::unless_eio(direct::read(&self.device, offset_bytes, READ_BYTES)?)
    }

    /// Writes so many zeroes; whether the disk says that it did.
    fn write(&self, offset_bytes: u64, len_bytes: usize) -> Result<bool> {
        rustix::fs::sync();
        let written = direct::write(&self.device, offset_bytes, &vec![0; len_bytes])?;
        Ok(direct::unless_eio(written)?.is_some())
    }
}

/// What the disk holds: every sector its own number, over and over.
fn pattern(offset_bytes: u64, len_bytes: usize) -> Vec<u8> {
    let positions = offset_bytes..offset_bytes + len_bytes as u64;
    positions.map(|position| ((position / 512) % 251) as u8).collect()
}

fn serve(mut peer: TcpStream, case: Case, flags: TransmissionFlags, has_written: &AtomicBool) -> Result<()> {
    peer.set_nodelay(true)?;
    peer.set_read_timeout(Some(Duration::from_secs(60)))?;
    let rest = shake_hands(&mut peer, flags)?;
    ensure!(rest.is_empty(), "requests before the end of the handshake");
    loop {
        let mut header = [0; REQUEST_BYTES];
        peer.read_exact(&mut header)?;
        let request = Request::decode(&header)?;
        match request.command {
            NbdCommand::Disconnect => return Ok(()),
            NbdCommand::Read if request.offset_bytes >= TRAP_BYTES => answer(&mut peer, &request, case)?,
            NbdCommand::Read => peer.write_all(&honest_reply(&request))?,
            NbdCommand::Write
                if matches!(case, Case::ShuttingDown | Case::ShuttingDownSlowly | Case::Honest) =>
            {
                peer.read_exact(&mut vec![0; request.length_bytes as usize])?;
                let mut refuses = case == Case::ShuttingDown;
                if case == Case::ShuttingDownSlowly {
                    refuses = has_written.swap(true, Ordering::Relaxed);
                    thread::sleep(if refuses { Duration::ZERO } else { LATE });
                }
                let error = if refuses { NbdError::Eshutdown as u32 } else { 0 };
                answer_by_header(&mut peer, &request, error)?;
            }
            NbdCommand::Write if case == Case::CloseInsideWrite => {
                peer.read_exact(&mut vec![0; request.length_bytes as usize / 2])?;
                return Ok(());
            }
            _ => answer_by_header(&mut peer, &request, NbdError::Einval as u32)?,
        }
    }
}

fn shake_hands(peer: &mut TcpStream, flags: TransmissionFlags) -> Result<Vec<u8>> {
    let export = ExportInfo { size_bytes: SIZE_BYTES, flags, block_sizes: None, description: None };
    let mut out = Vec::new();
    let mut handshake = ServerHandshake::with_simple_replies_only(&mut out);
    let mut buffer = [0; 4096];
    loop {
        peer.write_all(&out)?;
        out.clear();
        if handshake.is_done() {
            return Ok(handshake.leftover());
        }
        let arrived = peer.read(&mut buffer)?;
        ensure!(arrived > 0, "the client left in the handshake");
        if let Some(Event::Open(_)) = handshake.handle_bytes(&buffer[..arrived], &mut out)? {
            handshake.answer_open(Ok(&export), &mut out)?;
        }
    }
}

fn honest_reply(request: &Request) -> Vec<u8> {
    let header = SimpleReply { error: 0, cookie: request.cookie }.encode();
    [&header[..], &pattern(request.offset_bytes, request.length_bytes as usize)].concat()
}

/// A reply without a payload; 0 is success.
fn answer_by_header(peer: &mut TcpStream, request: &Request, error: u32) -> Result<()> {
    Ok(peer.write_all(&SimpleReply { error, cookie: request.cookie }.encode())?)
}

fn answer(peer: &mut TcpStream, request: &Request, case: Case) -> Result<()> {
    let honest = honest_reply(request);
    match case {
        Case::WrongCookie => {
            let wrong = Request { cookie: request.cookie ^ (1 << 40), ..*request };
            peer.write_all(&honest_reply(&wrong))?;
        }
        Case::WrongMagic => peer.write_all(&vec![0x55; honest.len()])?,
        Case::PayloadCutShort => {
            peer.write_all(&honest[..honest.len() - 1])?;
            peer.shutdown(std::net::Shutdown::Write)?;
        }
        Case::ReplyTwice => peer.write_all(&[honest.clone(), honest].concat())?,
        Case::CloseAtOnce => peer.shutdown(std::net::Shutdown::Both)?,
        Case::SingleBytes => {
            // The header and the first of the payload byte by byte, the rest in odd pieces.
            let (slow, rest) = honest.split_at(200);
            for byte in slow {
                peer.write_all(&[*byte])?;
            }
            for piece in rest.chunks(1001) {
                peer.write_all(piece)?;
            }
        }
        Case::Error => answer_by_header(peer, request, NbdError::Eio as u32)?,
        Case::ShuttingDown => answer_by_header(peer, request, NbdError::Eshutdown as u32)?,
        Case::CloseInsideWrite | Case::ShuttingDownSlowly | Case::Honest => peer.write_all(&honest)?,
    }
    Ok(())
}
