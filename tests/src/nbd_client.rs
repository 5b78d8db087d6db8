//! An NBD client that shows a test every reply: requests go out without waiting, replies are taken one at a time.
//!
//! Owns one connection, opened by `proto`'s handshake. Never re-sends, never reconnects, and lets a bad request through:
//! what the server makes of it is what the test wants to know. Every wait ends at the connection's deadline.
//! Used by the tests of the lying disk and by those that need to know which writes were answered when.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use proto::nbd::ExportInfo;
use proto::nbd::handshake::client::ClientHandshake;
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES, SimpleReply};

/// One connection to an NBD server.
pub struct NbdClient {
    stream: TcpStream,
    export: ExportInfo,
    cookies_used: u64,
    /// How many bytes follow a successful reply, by the cookies of the requests in flight.
    in_flight: HashMap<u64, u32>,
}

/// A reply.
#[derive(Debug)]
pub struct Reply {
    /// The request's, as [`NbdClient::send`] gave it.
    pub cookie: u64,
    /// 0, or NBD's error number.
    pub error: u32,
    /// What a successful READ read.
    pub payload: Vec<u8>,
}

impl NbdClient {
    /// Connects and opens an export; `deadline` bounds every single wait on the connection from now on.
    ///
    /// # Errors
    /// Nobody listens, the export is refused, or the server takes too long.
    pub fn connect(address: SocketAddr, export_name: &str, deadline: Duration) -> Result<Self> {
        let mut stream = TcpStream::connect_timeout(&address, deadline).context("connecting")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(deadline))?;
        stream.set_write_timeout(Some(deadline))?;
        let mut handshake = ClientHandshake::new(export_name)?;
        let mut out = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let arrived = stream.read(&mut buffer).context("the handshake")?;
            ensure!(arrived > 0, "the server closed the connection in the handshake");
            let opened = handshake.handle_bytes(&buffer[..arrived], &mut out)?;
            if let Some(export) = opened {
                return Ok(Self { stream, export, cookies_used: 0, in_flight: HashMap::new() });
            }
            stream.write_all(&out).context("the handshake")?;
            out.clear();
        }
    }

    /// What the server told of the export.
    pub fn export(&self) -> &ExportInfo {
        &self.export
    }

    /// How many requests have no reply yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Sends a request and its payload; gives its cookie.
    ///
    /// # Errors
    /// The connection is gone, or the server does not read.
    pub fn send(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset_bytes: u64,
        length_bytes: u32,
        payload: &[u8],
    ) -> Result<u64> {
        self.cookies_used += 1;
        let cookie = self.cookies_used;
        let request = Request { flags, command, cookie, offset_bytes, length_bytes: length_bytes.into() };
        self.stream.write_all(&[&request.encode(), payload].concat()).context("sending a request")?;
        self.in_flight.insert(cookie, if command == Command::Read { length_bytes } else { 0 });
        Ok(cookie)
    }

    /// Waits for the next reply, whichever request it is for.
    ///
    /// # Errors
    /// Nothing comes within the deadline, the connection is gone, or the reply is for no request of ours.
    pub fn receive(&mut self) -> Result<Reply> {
        let mut head = [0; SIMPLE_REPLY_BYTES];
        self.stream.read_exact(&mut head).context("waiting for a reply")?;
        let SimpleReply { error, cookie } = SimpleReply::decode(&head)?;
        let Some(payload_bytes) = self.in_flight.remove(&cookie) else {
            bail!("a reply for cookie {cookie}, which is not in flight");
        };
        let mut payload = vec![0; if error == 0 { payload_bytes as usize } else { 0 }];
        self.stream.read_exact(&mut payload).context("waiting for a payload")?;
        Ok(Reply { cookie, error, payload })
    }

    /// Sends a request while nothing else is in flight and waits for its reply: the error number (0 is none) and the
    /// payload.
    ///
    /// # Errors
    /// As [`NbdClient::send`] and [`NbdClient::receive`].
    pub fn call(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset_bytes: u64,
        length_bytes: u32,
        payload: &[u8],
    ) -> Result<(u32, Vec<u8>)> {
        ensure!(self.in_flight.is_empty(), "a call while requests are in flight");
        self.send(command, flags, offset_bytes, length_bytes, payload)?;
        let reply = self.receive()?;
        Ok((reply.error, reply.payload))
    }

    /// Reads, and fails if the server does not give the bytes.
    ///
    /// # Errors
    /// As [`NbdClient::call`]; an error in the reply.
    pub fn read(&mut self, offset_bytes: u64, length_bytes: u32) -> Result<Vec<u8>> {
        let (error, payload) =
            self.call(Command::Read, CommandFlags::NONE, offset_bytes, length_bytes, &[])?;
        ensure!(error == 0, "READ of {length_bytes} bytes at {offset_bytes}: error {error}");
        Ok(payload)
    }
}
