//! What every hostile case needs: a server, somebody to attack it, and somebody beside who must not notice.
//!
//! Owns the rule that all of them are judged by ([`Target::survives`]): the attacker's connections end, nothing of them is left,
//! and who was connected all the time still reads and writes.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use proto::nbd::OPTION_MAGIC;
use proto::nbd::transmission::{Command, CommandFlags, Request};
use server::catalog::AttachmentRecord;
use server::data::config::DataServerConfig;

use super::client::Client;
use super::support::{CLOSE_LIMIT, Server, wait_until};

/// No healthy server takes longer to answer, or to close what has to be closed.
const PATIENCE: Duration = CLOSE_LIMIT;

/// The greeting: two magic numbers and the flags.
const GREETING_BYTES: usize = 18;

/// Of the volume that is attacked.
pub(crate) const SIZE_BYTES: u64 = 64 << 20;

/// A server under attack.
pub(crate) struct Target {
    pub(crate) server: Server,
    pub(crate) attachment: AttachmentRecord,
    bystander: Client,
}

impl Target {
    pub(crate) fn start() -> Self {
        Self::start_with(|_| {})
    }

    pub(crate) fn start_with(change: impl FnOnce(&mut DataServerConfig)) -> Self {
        let server = Server::start_with(|config| {
            config.export_by_name = true;
            change(config);
        });
        let bystander = server.open_new_in_time("bystander", 1 << 20);
        let volume = server.create("target", SIZE_BYTES);
        let attachment = server.attach(&volume, false);
        Self { server, attachment, bystander }
    }

    /// A connection that has only been greeted.
    pub(crate) fn greeted(&self) -> TcpStream {
        let mut stream = connect(self.server.address());
        stream.read_exact(&mut [0; GREETING_BYTES]).unwrap();
        stream
    }

    /// A connection that may send options: the client's flags were sent.
    pub(crate) fn haggling(&self) -> TcpStream {
        let mut stream = self.greeted();
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        stream
    }

    /// A connection that may send requests.
    pub(crate) fn transmitting(&self, slot: u32) -> Client {
        self.server.open(&self.attachment, 1, slot)
    }

    /// The end of every case; `attackers` are gone or about to be.
    pub(crate) fn survives(mut self) {
        for number in 0..4u8 {
            let offset_bytes = u64::from(number) << 16;
            self.bystander.write(offset_bytes, &[number + 1; 4096]).unwrap();
            assert_eq!(self.bystander.read(offset_bytes, 4096).unwrap(), [number + 1; 4096]);
        }
        let attachment_id = self.attachment.attachment_id;
        wait_until("the attackers' connections are gone", || {
            self.server.data.connections_of(attachment_id) == 0
        });
    }
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// An option as it goes on the wire.
pub(crate) fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
    [&option_header(number, data.len() as u32)[..], data].concat()
}

/// An option's header alone; its data may never come.
pub(crate) fn option_header(number: u32, length_bytes: u32) -> Vec<u8> {
    [&OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &length_bytes.to_be_bytes()].concat()
}

/// A request's header.
pub(crate) fn request(command: Command, cookie: u64, offset_bytes: u64, length_bytes: u32) -> Vec<u8> {
    let flags = CommandFlags::NONE;
    let length_bytes = length_bytes.into();
    Request { flags, command, cookie, offset_bytes, length_bytes }.encode().to_vec()
}

/// Sends as much as the server takes before it closes.
pub(crate) fn throw(stream: &mut TcpStream, bytes: &[u8]) {
    // The server is right to close meanwhile; that it does not stand still is the time-out's to say.
    if let Err(error) = stream.write_all(bytes) {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the server neither reads nor closes");
    }
}

/// All that comes until the server closes, by itself and in time.
pub(crate) fn until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut input = Vec::new();
    if let Err(error) = stream.read_to_end(&mut input) {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the server does not close");
    }
    input
}

/// Closes in a way that the server sees as a reset rather than as an end.
pub(crate) fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Ends the attacker's side, and waits for the server's.
pub(crate) fn half_close(stream: &mut TcpStream) -> Vec<u8> {
    shut_down(stream, Shutdown::Write);
    until_closed(stream)
}

/// Ends one side or both, unless the server was faster: of a connection that it has reset there is nothing left to end.
pub(crate) fn shut_down(stream: &TcpStream, which: Shutdown) {
    if let Err(error) = stream.shutdown(which) {
        assert_eq!(error.kind(), std::io::ErrorKind::NotConnected, "{error}");
    }
}

/// Whether a reply of this type to this option is at the front of what came.
pub(crate) fn begins_with_reply(input: &[u8], option: u32, kind: u32) -> bool {
    let head = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()];
    input.starts_with(&head.concat())
}
