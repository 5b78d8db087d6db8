//! One more connection to somebody else's server, for as long as a disk is without its process.
//!
//! A server that ends with its last client would be gone in between. And what the former process had been told is unknown: the
//! next one would have to take it for unflushed and to fail a FLUSH, which ends a journal. So it is flushed over this connection.
//! Called by: `recovery`, for a live upgrade.
//! Source: NBD `doc/proto.md`, `NBD_FLAG_CAN_MULTI_CONN`: a FLUSH on one connection covers the writes that were answered on any.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::time::Duration;

use proto::nbd::TransmissionFlags;
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES, SimpleReply};
use socket2::Socket;

use crate::causes::with_sources;
use crate::contract::DeviceSpec;
use crate::device::dial::{Dialled, OPEN_TIMEOUT};
use crate::device::slots;

/// I/O stands still meanwhile.
const FLUSH_DEADLINE: Duration = Duration::from_secs(60);

/// A server that stays.
#[derive(Debug)]
pub(super) struct HeldServer {
    socket: Socket,
    can_flush_for_all: bool,
    /// Ends a relay of TLS when it goes.
    _dialled: Dialled,
}

impl HeldServer {
    /// Connects. Blocks. The error says, for people, why there is no other connection.
    pub(super) fn hold(spec: &DeviceSpec) -> Result<Self, String> {
        let dialled = slots::dial_slot(spec, 0, None, OPEN_TIMEOUT).map_err(|error| with_sources(&error))?;
        let socket = dialled.socket.as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
        let needed = TransmissionFlags::CAN_MULTI_CONN.with(TransmissionFlags::SEND_FLUSH);
        let can_flush_for_all = dialled.export.flags.contains(needed);
        Ok(Self { socket: socket.into(), can_flush_for_all, _dialled: dialled })
    }

    /// Makes durable what was answered on connections that are closed now; false where the server does not promise that, or
    /// does not do it. Blocks.
    pub(super) fn flush(&self) -> bool {
        if !self.can_flush_for_all {
            return false;
        }
        let flushed = flush_over(&self.socket);
        if let Err(error) = &flushed {
            tracing::warn!(%error, "what was written cannot be flushed; one FLUSH of the disk will fail");
        }
        flushed.is_ok()
    }
}

fn flush_over(mut socket: &Socket) -> io::Result<()> {
    const COOKIE: u64 = 1;
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(FLUSH_DEADLINE))?;
    let request = Request {
        flags: CommandFlags::NONE,
        command: Command::Flush,
        cookie: COOKIE,
        offset_bytes: 0,
        length_bytes: 0,
    };
    socket.write_all(&request.encode())?;
    let mut reply = [0; SIMPLE_REPLY_BYTES];
    socket.read_exact(&mut reply)?;
    match SimpleReply::decode(&reply).map_err(io::Error::other)? {
        SimpleReply { error: 0, cookie: COOKIE } => Ok(()),
        other => Err(io::Error::other(format!("the server answered the FLUSH with {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn flush_answered_with(reply: &[u8]) -> io::Result<()> {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(reply).unwrap();
        let outcome = flush_over(&near.into());
        let mut sent = [0; 28];
        far.read_exact(&mut sent).unwrap();
        assert_eq!(Request::decode(&sent).unwrap().command, Command::Flush);
        outcome
    }

    #[test]
    fn only_a_flush_that_succeeded_counts() {
        let reply = |error, cookie| SimpleReply { error, cookie }.encode();
        flush_answered_with(&reply(0, 1)).unwrap();
        flush_answered_with(&reply(5, 1)).unwrap_err();
        flush_answered_with(&reply(0, 2)).unwrap_err();
        flush_answered_with(&[0; SIMPLE_REPLY_BYTES]).unwrap_err();
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        flush_over(&near.into()).unwrap_err();
    }
}
