//! One probe: does the attachment's server still carry out a request?
//!
//! A READ of one block on a connection of its own, in a slot of its own: the server opens that at once, whatever the other
//! slots' I/O does, and beside its limits of connections. On a thread of its own, because it may take [`PROBE_TIMEOUT`].
//! Called by `attachment.rs` when `reconnect.rs` asks for it; what the answer is worth is said in `liveness.rs`.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proto::export_name::PROBE_SLOT;
use proto::nbd::transmission::{
    Command, CommandFlags, NbdError, Request, SIMPLE_REPLY_BYTES, SimpleReply, TransmissionError,
};

use super::data_socket::DataSocket;
use super::dial::receive_until;
use super::slots::{self, SlotError};
use crate::causes::with_sources;
use crate::contract::DeviceSpec;

/// How long the server may take to open the export, and then to answer: half of the shortest reply time-out.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// A probe was not answered.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Reply(#[from] TransmissionError),
    #[error("a reply to another request")]
    Cookie,
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// Sends a probe, and tells whether it was answered.
///
/// # Errors
/// There can be no thread; nothing is told then.
pub(super) fn start(
    spec: Arc<DeviceSpec>,
    block_bytes: u32,
    worked_last: Option<String>,
    on_return: impl FnOnce(bool) + Send + 'static,
) -> io::Result<()> {
    let probe = move || {
        let outcome = run(&spec, block_bytes, worked_last.as_deref());
        if let Err(error) = &outcome {
            tracing::info!(error = with_sources(error), "the server does not answer a probe");
        }
        on_return(outcome.is_ok());
    };
    thread::Builder::new().name("probe".into()).spawn(probe).map(drop)
}

fn run(spec: &DeviceSpec, block_bytes: u32, worked_last: Option<&str>) -> Result<(), ProbeError> {
    let dialled = slots::dial_slot(spec, PROBE_SLOT, worked_last, PROBE_TIMEOUT)?;
    ask(&dialled.socket, block_bytes, Instant::now() + PROBE_TIMEOUT)
}

/// Asks for the export's first block.
fn ask(socket: &DataSocket, block_bytes: u32, deadline: Instant) -> Result<(), ProbeError> {
    let (cookie, length_bytes) = (fastrand::u64(..), u64::from(block_bytes));
    let mut request =
        Request { flags: CommandFlags::NONE, command: Command::Read, cookie, offset_bytes: 0, length_bytes };
    socket.write_all(&request.encode())?;
    let mut header = [0; SIMPLE_REPLY_BYTES];
    read_exact_until(socket, &mut header, deadline)?;
    let reply = SimpleReply::decode(&header)?;
    if reply.cookie != cookie {
        return Err(ProbeError::Cookie);
    }
    if reply.error == NbdError::Eshutdown as u32 {
        return Err(ProbeError::ShuttingDown);
    }
    if reply.error == 0 {
        let mut block = vec![0; block_bytes as usize];
        read_exact_until(socket, &mut block, deadline)?;
    }
    // An error is an answer as well: the server has tried. Closing says goodbye as this does.
    request.command = Command::Disconnect;
    let _ = socket.write_all(&request.encode());
    Ok(())
}

/// Receives all of `into`. Errors: those of [`receive_until`]; `UnexpectedEof`.
fn read_exact_until(socket: &DataSocket, mut into: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !into.is_empty() {
        match receive_until(socket, into, deadline)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => into = &mut into[bytes..],
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    use socket2::Socket;

    use super::*;

    /// What a server answers to a READ with this cookie.
    type Answer = fn(u64) -> Vec<u8>;

    fn reply(error: u32, cookie: u64) -> Vec<u8> {
        SimpleReply { error, cookie }.encode().to_vec()
    }

    fn probed(answer: Answer) -> Result<(), ProbeError> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let server = thread::spawn(move || {
            let mut request = [0; 28];
            far.read_exact(&mut request).unwrap();
            let cookie = Request::decode(&request).unwrap().cookie;
            let answer = answer(cookie);
            // In two parts, as a network may bring it.
            let (first, second) = answer.split_at(answer.len() / 2);
            far.write_all(first).unwrap();
            far.write_all(second).unwrap();
        });
        let outcome = ask(&Socket::from(near).into(), 512, Instant::now() + Duration::from_secs(5));
        server.join().unwrap();
        outcome
    }

    #[test]
    fn whatever_a_server_has_tried_is_an_answer() {
        probed(|cookie| [reply(0, cookie), vec![7; 512]].concat()).unwrap();
        probed(|cookie| reply(NbdError::Eio as u32, cookie)).unwrap();
    }

    #[test]
    fn what_is_no_answer_to_the_probe_says_nothing_of_the_server() {
        let shutdown = probed(|cookie| reply(NbdError::Eshutdown as u32, cookie)).unwrap_err();
        assert!(matches!(shutdown, ProbeError::ShuttingDown), "{shutdown}");
        let other = probed(|cookie| reply(0, !cookie)).unwrap_err();
        assert!(matches!(other, ProbeError::Cookie), "{other}");
        let short = probed(|cookie| [reply(0, cookie), vec![7; 511]].concat()).unwrap_err();
        assert!(matches!(short, ProbeError::Io(_)), "{short}");
    }

    #[test]
    fn a_server_that_does_not_answer_is_not_waited_for_longer_than_said() {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let began = Instant::now();
        let socket = DataSocket::from(tls::stream::Carrier::Relay(near.into()));
        let silent = ask(&socket, 512, began + Duration::from_millis(50)).unwrap_err();
        assert!(
            matches!(&silent, ProbeError::Io(error) if error.kind() == io::ErrorKind::TimedOut),
            "{silent}"
        );
        assert!(began.elapsed() >= Duration::from_millis(50));
    }
}
