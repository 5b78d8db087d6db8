//! Whether a queue has its connections, and why it lost them: one state for all of them, because they are lost, and come, together.
//!
//! ```text
//!   Up ──fail──► Failing ──reaped──► Down ──connected──► Up
//! ```
//! Pure state, called by `core.rs`. Invariant: what was lost in flight is looked at when the link is `Down`, never before: while it is
//! `Failing`, a late byte may still reach a page.

use std::time::{Duration, Instant};

use super::connection::PeerError;
use super::quiet::QueueSilence;
use super::requests::Resend;
use super::stream::StreamError;

/// A server that refuses all it is asked for so soon after it was reached was not back.
const JUST_OPENED: Duration = Duration::from_secs(10);

/// Why the connections were lost.
#[derive(Debug, thiserror::Error)]
pub enum Loss {
    /// A receive, or a send, ended badly.
    #[error("{what}: {error}")]
    Socket {
        /// What was being moved.
        what: &'static str,
        /// How it ended.
        error: StreamError,
    },
    /// TLS said something that is not data.
    #[error("{0}")]
    Tls(String),
    /// The server broke the protocol, and would again.
    #[error(transparent)]
    Protocol(#[from] PeerError),
    /// What was received cannot be brought to the request's pages, and could not the next time.
    #[error("a READ's data cannot be copied to its pages: {0}")]
    Scatter(std::io::Error),
    /// What is to be sent cannot be read from the request's pages.
    #[error("a WRITE's data cannot be copied from its pages: {0}")]
    Gather(std::io::Error),
    /// The network has acknowledged nothing for long.
    #[error("the network acknowledges nothing")]
    Unacknowledged,
    /// The server said that it is shutting down, and owes no reply.
    #[error("the server is shutting down")]
    Leaving,
    /// So much was encrypted under one key that the connection needs another.
    #[error("TLS key usage limit reached; reconnecting to rekey")]
    KeysWorn,
    /// The main thread said so, for this reason.
    #[error("{0}")]
    Told(String),
}

impl Loss {
    /// What becomes of requests on the very connection that was lost so; of the others on it, and of those on other
    /// connections, what `usual` says.
    pub fn resend(&self, usual: Resend) -> Resend {
        match self {
            Self::Protocol(_) | Self::Scatter(_) => Resend::Nothing,
            _ => usual,
        }
    }
}

/// What happened since the connections came.
#[derive(Debug, Clone, Copy)]
pub struct Up {
    since: Instant,
    /// Requests stood waiting when they came.
    was_awaited: bool,
    /// On this connection the server said that it is shutting down: nothing is sent any more, and what was sent is waited for.
    leaving: Option<u16>,
    /// A reply has come that did not say so.
    has_served: bool,
}

/// All connections of a queue.
#[derive(Debug)]
pub enum QueueLink {
    /// They are there.
    Up(Up),
    /// They are lost; operations on them may be out.
    Failing {
        /// Which of them was lost first.
        connection: u16,
        /// Why.
        loss: Loss,
        /// What happened before.
        was: Up,
        /// Requests end with EIO rather than wait for the next connections.
        gives_up: bool,
    },
    /// They are lost, and no byte of them can come any more.
    Down {
        /// As above.
        gives_up: bool,
    },
}

/// What a queue tells of its connections.
#[derive(Debug)]
pub enum LinkEvent {
    /// They are lost, no byte of them can come any more, and the queue waits for others.
    Disconnected(Lost),
    /// On one of them replies are due and nothing comes. Told at every tick, from half of the reply time-out on.
    Silent(Option<QueueSilence>),
}

/// How a queue lost its connections.
#[derive(Debug)]
pub struct Lost {
    /// Which of them was lost first.
    pub connection: u16,
    /// Why.
    pub loss: Loss,
    /// The server has refused all that it was asked for on them, from the moment when they were opened.
    pub served_nothing: bool,
    /// For how long the oldest request that waits has been known to a server; `None`: none was sent.
    pub oldest: Option<Duration>,
}

/// What is to be known of connections that were reaped.
#[derive(Debug)]
pub struct Reaped {
    /// Which of them was lost first.
    pub connection: u16,
    /// Why.
    pub loss: Loss,
    /// The server has refused all that it was asked for on them, from the moment when they were opened.
    pub served_nothing: bool,
    /// Requests end with EIO rather than wait for the next connections.
    pub gives_up: bool,
}

impl QueueLink {
    /// They are there from `since` on; `was_awaited`: requests stood waiting for them.
    pub fn up(since: Instant, was_awaited: bool) -> Self {
        Self::Up(Up { since, was_awaited, leaving: None, has_served: false })
    }

    /// Whether they are there.
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Up(_))
    }

    /// Whether operations on lost ones may be out.
    pub fn is_failing(&self) -> bool {
        matches!(self, Self::Failing { .. })
    }

    /// Whether requests may be sent: they are there, and the server is not shutting down.
    pub fn takes_requests(&self) -> bool {
        matches!(self, Self::Up(up) if up.leaving.is_none())
    }

    /// The connection on which a server that is still there has said that it is shutting down.
    pub fn leaving(&self) -> Option<u16> {
        match self {
            Self::Up(up) => up.leaving,
            Self::Failing { .. } | Self::Down { .. } => None,
        }
    }

    /// Whether requests end with EIO until there are connections again.
    pub fn gives_up(&self) -> bool {
        matches!(self, Self::Failing { gives_up: true, .. } | Self::Down { gives_up: true })
    }

    /// The server has done, or tried to do, something that it was asked for.
    pub fn served(&mut self) {
        if let Self::Up(up) = self {
            up.has_served = true;
        }
    }

    /// The server has said on this connection that it is shutting down.
    pub fn leave(&mut self, connection: u16) {
        if let Self::Up(up) = self {
            up.leaving.get_or_insert(connection);
        }
    }

    /// A connection is lost, and with it the others; false: they were lost before.
    pub fn fail(&mut self, connection: u16, loss: Loss) -> bool {
        let Self::Up(was) = *self else { return false };
        *self = Self::Failing { connection, loss, was, gives_up: false };
        true
    }

    /// Nobody waits any longer; nothing happens where they are there.
    pub fn give_up(&mut self) {
        match self {
            Self::Up(_) => {}
            Self::Failing { gives_up, .. } | Self::Down { gives_up } => *gives_up = true,
        }
    }

    /// No operation on the lost ones is out any more. `is_owed`: the server was sent something that it did not answer.
    /// `None`: they were not lost, or were reaped before.
    pub fn reaped(&mut self, now: Instant, is_owed: bool) -> Option<Reaped> {
        let Self::Failing { gives_up, .. } = *self else { return None };
        let Self::Failing { connection, loss, was, .. } = std::mem::replace(self, Self::Down { gives_up })
        else {
            return None;
        };
        let is_refusal = was.leaving.is_some() && now.saturating_duration_since(was.since) < JUST_OPENED;
        let served_nothing = !was.has_served && (is_refusal || (is_owed && was.was_awaited));
        Some(Reaped { connection, loss, served_nothing, gives_up })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(up: impl FnOnce(&mut QueueLink), seconds: u64, was_awaited: bool, is_owed: bool) -> Reaped {
        let start = Instant::now();
        let mut link = QueueLink::up(start, was_awaited);
        up(&mut link);
        assert!(link.fail(2, Loss::Leaving));
        assert!(!link.fail(1, Loss::KeysWorn), "it was lost before");
        assert!(link.is_failing() && !link.is_up());
        let reaped = link.reaped(start + Duration::from_secs(seconds), is_owed).unwrap();
        assert!(link.reaped(start, is_owed).is_none(), "once");
        assert!(matches!(reaped, Reaped { connection: 2, loss: Loss::Leaving, .. }));
        reaped
    }

    fn leave(link: &mut QueueLink) {
        link.leave(0);
    }

    #[test]
    fn a_server_that_refuses_from_the_start_was_not_back() {
        assert!(lost(leave, 9, false, false).served_nothing);
        assert!(!lost(leave, 10, false, false).served_nothing, "it may shut down later");
        let served = |link: &mut QueueLink| {
            link.served();
            leave(link);
        };
        assert!(!lost(served, 1, true, true).served_nothing);
    }

    #[test]
    fn a_server_that_answers_nothing_of_what_waited_for_it_was_not_back() {
        assert!(lost(|_| {}, 60, true, true).served_nothing);
        assert!(!lost(|_| {}, 60, true, false).served_nothing, "nothing was sent");
        assert!(!lost(|_| {}, 60, false, true).served_nothing, "nothing waited");
    }

    #[test]
    fn giving_up_means_nothing_while_there_are_connections_and_ends_with_the_next() {
        let mut link = QueueLink::up(Instant::now(), false);
        link.give_up();
        assert!(!link.gives_up());
        link.fail(0, Loss::Unacknowledged);
        assert!(!link.gives_up() && !link.takes_requests());
        link.give_up();
        assert!(link.gives_up());
        assert!(link.reaped(Instant::now(), false).unwrap().gives_up);
        assert!(link.gives_up());
        link = QueueLink::up(Instant::now(), true);
        assert!(!link.gives_up() && link.takes_requests());
        link.leave(1);
        link.leave(0);
        assert!(!link.takes_requests() && link.is_up());
        assert_eq!(link.leaving(), Some(1), "where it was said first");
    }

    #[test]
    fn only_who_broke_the_protocol_gets_nothing_twice() {
        let protocol = Loss::Protocol(PeerError::UnknownCookie(7));
        assert_eq!(protocol.resend(Resend::Everything), Resend::Nothing);
        assert_eq!(Loss::Leaving.resend(Resend::ReadsOnly), Resend::ReadsOnly);
    }
}
