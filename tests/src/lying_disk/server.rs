//! The NBD server in front of a lying disk's contents, and the power switch.
//!
//! Owns the listening socket on loopback, a thread for each connection, and the moment at which the power goes. Decides
//! nothing about what a power cut leaves (`image.rs` does) and attaches nothing (`file_system.rs` does). The wire is
//! `proto`'s handshake and transmission codec with simple replies; the specification is NBD's `doc/proto.md`.
//!
//! Invariants: a request is answered only after it was done, so FLUSH covers every write whose reply was sent before; from
//! the moment the power is gone every request is answered EIO and changes nothing. EIO rather than silence: a silent NBD
//! server would leave its kernel client's callers, and the test, in uninterruptible sleep.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, bail, ensure};
use proto::nbd::handshake::server::{Event, ServerHandshake};
use proto::nbd::transmission::{
    Command, CommandFlags, NbdError, REQUEST_BYTES, Request, SimpleReply, TransmissionError,
};
use proto::nbd::validate::{RequestLimits, validate_payload, validate_request};
use proto::nbd::{BlockSizes, ExportInfo, Negotiated, PAYLOAD_BYTES_MAX_DEFAULT, TransmissionFlags};

use super::image::{Image, Losses, SECTOR_BYTES};

/// A disk that loses what was not flushed when its power is cut, served by NBD on loopback until it is dropped.
pub struct LyingDisk {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    limits: RequestLimits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    image: Image,
    power: Power,
    connections: Vec<TcpStream>,
    is_ending: bool,
}

#[derive(Clone, Copy, Default)]
enum Power {
    #[default]
    On,
    /// It goes before the write, flush or zeroing after so many more.
    OnFor {
        requests: u64,
    },
    Off,
}

impl LyingDisk {
    /// Starts a disk of `size_bytes`, all zeroes.
    ///
    /// # Errors
    /// The size is not a multiple of [`SECTOR_BYTES`], or loopback cannot be listened on.
    pub fn start(size_bytes: u64) -> Result<Self> {
        ensure!(size_bytes.is_multiple_of(SECTOR_BYTES as u64), "{size_bytes} bytes are not whole sectors");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("the lying disk's port")?;
        let address = listener.local_addr()?;
        let flags = TransmissionFlags::HAS_FLAGS
            .with(TransmissionFlags::SEND_FLUSH)
            .with(TransmissionFlags::SEND_FUA)
            .with(TransmissionFlags::SEND_TRIM)
            .with(TransmissionFlags::SEND_WRITE_ZEROES);
        let block_sizes = BlockSizes {
            minimum_bytes: SECTOR_BYTES as u32,
            preferred_bytes: 4096,
            maximum_bytes: PAYLOAD_BYTES_MAX_DEFAULT,
        };
        let limits = RequestLimits { size_bytes, flags, block_sizes, negotiated: Negotiated::default() };
        let shared = Arc::new(Shared { limits, state: Mutex::default() });
        let acceptor = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || accept(&listener, &shared))
        };
        Ok(Self { address, shared, acceptor: Some(acceptor) })
    }

    /// Where its NBD port is; every export name opens it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts the power now.
    pub fn cut_power(&self) {
        self.shared.lock().power = Power::Off;
    }

    /// Cuts the power before the write, zeroing or flush that comes after `requests` more of them.
    pub fn cut_power_after(&self, requests: u64) {
        self.shared.lock().power = Power::OnFor { requests };
    }

    /// Whether the power is gone.
    pub fn is_cut(&self) -> bool {
        matches!(self.shared.lock().power, Power::Off)
    }

    /// Gives the power back after a cut: the disk has what was stable, and of the rest what `seed` leaves.
    ///
    /// # Errors
    /// The power was not cut.
    pub fn restore_power(&self, seed: u64) -> Result<Losses> {
        let mut state = self.shared.lock();
        ensure!(matches!(state.power, Power::Off), "the power was not cut");
        state.power = Power::On;
        Ok(state.image.lose_power(seed))
    }
}

impl Drop for LyingDisk {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            state.is_ending = true;
            for connection in &state.connections {
                // Fails only where the peer has gone already.
                let _ = connection.shutdown(std::net::Shutdown::Both);
            }
        }
        // Wakes the acceptor up; it looks at `is_ending` before anything else. If nobody can connect, it has ended.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take()
            && acceptor.join().is_err()
        {
            println!("the lying disk's acceptor panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked failed its test already; the bytes are still as it left them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut serving = Vec::new();
    loop {
        let accepted = listener.accept().and_then(|(stream, _)| Ok((stream.try_clone()?, stream)));
        let mut state = shared.lock();
        if state.is_ending {
            break;
        }
        match accepted {
            Ok((for_shutdown, stream)) => {
                state.connections.push(for_shutdown);
                let shared = Arc::clone(shared);
                serving.push(thread::spawn(move || {
                    if let Err(error) = serve(stream, &shared) {
                        println!("the lying disk closes a connection: {error:#}");
                    }
                }));
            }
            Err(error) => println!("the lying disk cannot accept: {error}"),
        }
    }
    for thread in serving {
        if thread.join().is_err() {
            println!("a connection of the lying disk panicked");
        }
    }
}

/// Serves one connection until its client disconnects.
fn serve(mut stream: TcpStream, shared: &Shared) -> Result<()> {
    stream.set_nodelay(true)?;
    let Some(leftover) = shake_hands(&mut stream, &shared.limits)? else { return Ok(()) };
    // The handshake may have read the beginning of the first request.
    let mut input = io::Cursor::new(leftover).chain(stream.try_clone()?);
    let mut payload = Vec::new();
    let mut reply = Vec::new();
    loop {
        let mut header = [0; REQUEST_BYTES];
        match input.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other.context("reading a request")?,
        }
        let request = Request::decode(&header).map_err(|error: TransmissionError| anyhow::anyhow!(error))?;
        let payload_bytes = validate_payload(&request, &shared.limits)?;
        payload.resize(payload_bytes as usize, 0);
        input.read_exact(&mut payload).context("reading a payload")?;
        if request.command == Command::Disconnect {
            return Ok(());
        }
        reply.clear();
        reply.resize(SimpleReply { error: 0, cookie: 0 }.encode().len(), 0);
        let outcome = handle(shared, &request, &payload, &mut reply);
        let error = outcome.err().map_or(0, |error| error as u32);
        let head = SimpleReply { error, cookie: request.cookie }.encode();
        reply[..head.len()].copy_from_slice(&head);
        stream.write_all(&reply).context("sending a reply")?;
    }
}

/// Does the handshake; gives what came after it, or `None` where the client only asked and left.
fn shake_hands(stream: &mut TcpStream, limits: &RequestLimits) -> Result<Option<Vec<u8>>> {
    let export = ExportInfo {
        size_bytes: limits.size_bytes,
        flags: limits.flags,
        block_sizes: Some(limits.block_sizes),
        description: None,
    };
    let mut out = Vec::new();
    let mut handshake = ServerHandshake::with_simple_replies_only(&mut out);
    let mut buffer = [0; 4096];
    let mut arrived = 0;
    loop {
        let mut event = handshake.handle_bytes(&buffer[..arrived], &mut out)?;
        while let Some(wanted) = event {
            match wanted {
                Event::Open(_) => drop(handshake.answer_open(Ok(&export), &mut out)?),
                Event::List => handshake.answer_list(&[], &mut out),
                Event::Abort => return Ok(stream.write_all(&out).map(|()| None)?),
                Event::StartTls => bail!("TLS was started, which this server does not offer"),
            }
            event = handshake.handle_bytes(&[], &mut out)?;
        }
        stream.write_all(&out).context("the handshake")?;
        out.clear();
        if handshake.is_done() {
            return Ok(Some(handshake.leftover()));
        }
        arrived = stream.read(&mut buffer).context("the handshake")?;
        if arrived == 0 {
            return Ok(None);
        }
    }
}

/// Does one request; what was read is appended to `reply`.
fn handle(shared: &Shared, request: &Request, payload: &[u8], reply: &mut Vec<u8>) -> Result<(), NbdError> {
    validate_request(request, &shared.limits).map_err(|refused| refused.error())?;
    let mut state = shared.lock();
    state.use_power(request.command)?;
    let fua = request.flags.contains(CommandFlags::FUA);
    match request.command {
        Command::Read => {
            let head_bytes = reply.len();
            reply.resize(head_bytes + request.length_bytes as usize, 0);
            state.image.read(request.offset_bytes, &mut reply[head_bytes..]);
        }
        Command::Write => state.image.write(request.offset_bytes, payload, fua),
        Command::Trim | Command::WriteZeroes => {
            state.image.write_zeroes(request.offset_bytes, request.length_bytes, fua);
        }
        Command::Flush => state.image.flush(),
        _ => return Err(NbdError::Einval),
    }
    Ok(())
}

impl State {
    /// Lets a request pass while there is power. Reads change nothing, so they do not count towards a cut.
    fn use_power(&mut self, command: Command) -> Result<(), NbdError> {
        self.power = match self.power {
            Power::OnFor { requests: 0 } if command != Command::Read => Power::Off,
            Power::OnFor { requests } if command != Command::Read => Power::OnFor { requests: requests - 1 },
            other => other,
        };
        if matches!(self.power, Power::Off) { Err(NbdError::Eio) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd_client::Client;

    const SIZE_BYTES: u64 = 1 << 20;

    fn disk() -> (LyingDisk, Client) {
        let disk = LyingDisk::start(SIZE_BYTES).unwrap();
        let client = Client::open(disk.address(), "any").unwrap();
        (disk, client)
    }

    fn write(client: &mut Client, offset_bytes: u64, value: u8, flags: CommandFlags) -> Result<(), u32> {
        client.call(Command::Write, flags, offset_bytes, 4096, &[value; 4096]).map(drop)
    }

    #[test]
    fn it_announces_its_cache_and_what_it_can_do() {
        let (_disk, client) = disk();
        assert_eq!(client.info.size_bytes, SIZE_BYTES);
        let flags = client.info.flags;
        assert!(flags.contains(TransmissionFlags::SEND_FLUSH.with(TransmissionFlags::SEND_FUA)));
        assert_eq!(client.info.block_sizes.unwrap().minimum_bytes, 512);
    }

    #[test]
    fn a_power_cut_loses_what_was_not_flushed_and_nothing_else() {
        let mut lost = 0;
        for seed in 0..20 {
            let (disk, mut client) = disk();
            assert_eq!(write(&mut client, 0, 1, CommandFlags::NONE), Ok(()));
            assert_eq!(client.flush(), Ok(()));
            assert_eq!(write(&mut client, 4096, 2, CommandFlags::FUA), Ok(()));
            assert_eq!(write(&mut client, 8192, 3, CommandFlags::NONE), Ok(()));
            assert_eq!(client.read(8192, 4096).unwrap(), [3; 4096]);
            disk.cut_power();
            assert_eq!(write(&mut client, 0, 9, CommandFlags::FUA), Err(NbdError::Eio as u32));
            lost += disk.restore_power(seed).unwrap().lost;
            assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
            assert_eq!(client.read(4096, 4096).unwrap(), [2; 4096]);
        }
        assert!((1..20).contains(&lost), "{lost} of 20 unflushed writes were lost");
    }

    #[test]
    fn the_power_goes_at_the_request_it_was_told() {
        let (disk, mut client) = disk();
        disk.cut_power_after(2);
        assert_eq!(write(&mut client, 0, 1, CommandFlags::NONE), Ok(()));
        assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
        assert_eq!(write(&mut client, 0, 2, CommandFlags::NONE), Ok(()));
        assert!(!disk.is_cut());
        assert!(disk.restore_power(1).is_err());
        assert_eq!(client.flush(), Err(NbdError::Eio as u32));
        assert!(disk.is_cut());
        let losses = disk.restore_power(1).unwrap();
        assert_eq!(
            losses.whole + losses.torn + losses.lost,
            2,
            "neither the refused write nor the flush counts"
        );
    }

    #[test]
    fn bad_requests_are_refused_and_the_connection_lives() {
        let (_disk, mut client) = disk();
        assert_eq!(client.read(1, 512), Err(NbdError::Einval as u32));
        assert_eq!(client.write(SIZE_BYTES, &[0; 512]), Err(NbdError::Enospc as u32));
        assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
    }
}
