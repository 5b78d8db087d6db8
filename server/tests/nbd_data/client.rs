//! A small blocking NBD client on proto's codec: one request at a time, or many with replies in any order.
//!
//! Never re-sends, never reconnects, and lets a bad request through: what the server makes of it is what the test wants to know.
//! Every wait ends after [`ANSWER_LIMIT`]. `testlab` has this file as `nbd_client`.
#![allow(unreachable_pub)] // Public there.
#![allow(clippy::unwrap_used)] // A test says what went wrong by panicking.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use proto::nbd::ExportInfo;
use proto::nbd::handshake::client::{ClientHandshake, ClientHandshakeError};
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES, SimpleReply};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// No answer of a healthy server takes longer, in an emulated machine neither.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What came back for a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The request's.
    pub cookie: u64,
    /// 0, or NBD's error number.
    pub error: u32,
    /// What a READ read.
    pub payload: Vec<u8>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum OpenFailed {
    /// Nobody listens, or the connection ended in the handshake.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The export is refused, or the server breaks the protocol.
    #[error(transparent)]
    Handshake(#[from] ClientHandshakeError),
}

/// One connection in the transmission phase.
pub struct Client {
    /// Its socket.
    pub stream: TcpStream,
    /// What the server told of the export.
    pub info: ExportInfo,
    next_cookie: u64,
    /// READs whose payload is to come with the reply.
    reads: HashMap<u64, u32>,
    /// Of replies that came while a request found no room.
    inbox: VecDeque<u8>,
}

impl Client {
    /// Connects and opens an export.
    ///
    /// # Errors
    /// [`OpenFailed`] says which.
    pub fn open(address: SocketAddr, name: &str) -> Result<Self, OpenFailed> {
        Self::open_on(TcpStream::connect_timeout(&address, ANSWER_LIMIT)?, name)
    }

    /// Opens an export on a connection that is made already.
    ///
    /// # Errors
    /// As [`Client::open`].
    pub fn open_on(mut stream: TcpStream, name: &str) -> Result<Self, OpenFailed> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let mut handshake = ClientHandshake::new(name)?;
        let mut input = [0u8; 4096];
        loop {
            let bytes = stream.read(&mut input)?;
            if bytes == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let mut out = Vec::new();
            let opened = handshake.handle_bytes(&input[..bytes], &mut out)?;
            stream.write_all(&out)?;
            if let Some(info) = opened {
                return Ok(Self {
                    stream,
                    info,
                    next_cookie: 1,
                    reads: HashMap::new(),
                    inbox: VecDeque::new(),
                });
            }
        }
    }

    /// Sends a request, with a WRITE's payload; gives its cookie. Where there is no room for it, replies are taken meanwhile, so
    /// that the size of this machine's socket buffers does not matter.
    ///
    /// # Panics
    /// The connection is gone, or the server neither reads nor answers.
    pub fn send(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset_bytes: u64,
        length_bytes: u32,
        payload: &[u8],
    ) -> u64 {
        let (cookie, bytes) = self.request(command, flags, offset_bytes, length_bytes, payload);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            // As much as there is room for, in one write: a peer that answers at once and closes does not leave us half-way.
            match send(&self.stream, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent_bytes) => rest = &rest[sent_bytes..],
                Err(Errno::AGAIN) => self.take_what_came(),
                Err(Errno::INTR) => {}
                Err(error) => panic!("{command:?} cannot be sent: {error}"),
            }
        }
        cookie
    }

    /// Sends a request of which nobody waits for the reply, to a server that may not take it.
    ///
    /// # Errors
    /// It did not.
    pub fn throw(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset_bytes: u64,
        length_bytes: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        let (_, bytes) = self.request(command, flags, offset_bytes, length_bytes, payload);
        self.stream.write_all(&bytes)
    }

    /// Its cookie, and as it goes on the wire.
    fn request(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset_bytes: u64,
        length_bytes: u32,
        payload: &[u8],
    ) -> (u64, Vec<u8>) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let request = Request { flags, command, cookie, offset_bytes, length_bytes: length_bytes.into() };
        if command == Command::Read {
            self.reads.insert(cookie, length_bytes);
        }
        (cookie, [&request.encode()[..], payload].concat())
    }

    /// Waits for room or for replies, and keeps of the latter what has come.
    fn take_what_came(&mut self) {
        let limit = ANSWER_LIMIT.try_into().unwrap();
        let mut waited_for = [PollFd::new(&self.stream, PollFlags::IN | PollFlags::OUT)];
        let ready = rustix::io::retry_on_intr(|| poll(&mut waited_for, Some(&limit))).unwrap();
        assert!(ready > 0, "the server neither takes nor answers requests");
        if waited_for[0].revents().contains(PollFlags::IN) {
            let mut came = [0; 64 << 10];
            if let Ok((count, _)) = recv(&self.stream, &mut came[..], RecvFlags::DONTWAIT) {
                assert!(count > 0, "the server has closed, and a request is half sent");
                self.inbox.extend(&came[..count]);
            }
        }
    }

    fn take_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let kept = self.inbox.len().min(bytes.len());
        for (byte, came) in bytes.iter_mut().zip(self.inbox.drain(..kept)) {
            *byte = came;
        }
        self.stream.read_exact(&mut bytes[kept..])
    }

    /// Takes the next reply, whichever it is for.
    ///
    /// # Errors
    /// None comes in time, the connection is gone, or it is no reply.
    pub fn receive(&mut self) -> io::Result<Answer> {
        let mut header = [0u8; SIMPLE_REPLY_BYTES];
        self.take_exact(&mut header)?;
        let reply = SimpleReply::decode(&header).map_err(io::Error::other)?;
        let length_bytes = self.reads.remove(&reply.cookie).unwrap_or(0);
        let mut payload = vec![0; if reply.error == 0 { length_bytes as usize } else { 0 }];
        self.take_exact(&mut payload)?;
        Ok(Answer { cookie: reply.cookie, error: reply.error, payload })
    }

    /// One request and its reply: the payload.
    ///
    /// # Errors
    /// NBD's error number.
    ///
    /// # Panics
    /// There is no reply, or another request's.
    pub fn call(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset_bytes: u64,
        length_bytes: u32,
        payload: &[u8],
    ) -> Result<Vec<u8>, u32> {
        let cookie = self.send(command, flags, offset_bytes, length_bytes, payload);
        let answer = self.receive().unwrap();
        assert_eq!(answer.cookie, cookie);
        if answer.error == 0 { Ok(answer.payload) } else { Err(answer.error) }
    }

    /// Reads `length_bytes` at `offset_bytes`.
    ///
    /// # Errors
    /// NBD's error number.
    pub fn read(&mut self, offset_bytes: u64, length_bytes: u32) -> Result<Vec<u8>, u32> {
        self.call(Command::Read, CommandFlags::NONE, offset_bytes, length_bytes, &[])
    }

    /// Writes the payload at `offset_bytes`.
    ///
    /// # Errors
    /// NBD's error number.
    pub fn write(&mut self, offset_bytes: u64, payload: &[u8]) -> Result<(), u32> {
        self.call(Command::Write, CommandFlags::NONE, offset_bytes, payload.len() as u32, payload).map(drop)
    }

    /// Has everything made durable that was answered before.
    ///
    /// # Errors
    /// NBD's error number.
    pub fn flush(&mut self) -> Result<(), u32> {
        self.call(Command::Flush, CommandFlags::NONE, 0, 0, &[]).map(drop)
    }

    /// Whether the server has closed the connection; waits for it.
    ///
    /// # Panics
    /// A reply comes.
    pub fn is_closed_by_server(&mut self) -> bool {
        match self.receive() {
            Ok(answer) => panic!("a reply instead of the end: {} {}", answer.cookie, answer.error),
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
        }
    }
}
