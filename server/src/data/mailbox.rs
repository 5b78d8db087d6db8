//! How other threads reach a ring thread: a list of messages and an eventfd that the ring waits for.
//!
//! Owns: the messages on their way and the number of connections that the ring was given. Never: used on the hot path, but for
//! volumes of a backend that completes by call-back; a ring that is not posted to never takes the lock.
//! Called by: the acceptor, the gate, such backends and copiers (post), `io/run.rs` (take).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use proto::nbd::ExportInfo;
use proto::nbd::handshake::server::{ListedExport, Refusal};
use proto::nbd::validate::RequestLimits;
use rustix::event::{EventfdFlags, eventfd};
use uuid::Uuid;

use crate::backend::callback::{CompletionSink, Ended};
use crate::data::address::Peer;
use crate::data::admission::Place;
use crate::data::dirty_bitmaps::{OfferedBitmaps, StatusAnswer};
use crate::ids::{ConnectionId, RequestSlot};
use crate::tls::Secured;
use crate::volume::Volume;
use crate::volume::snapshot::copy_before_write::HeldRequest;

/// An export that was opened, or that INFO asked about.
#[derive(Debug)]
pub struct Opened {
    /// What the peer is told.
    pub export: ExportInfo,
    /// What its requests are checked against.
    pub limits: RequestLimits,
    /// The volume; `None` for INFO.
    pub volume: Option<Arc<Volume>>,
    /// The attachment, if it is on one: its client comes again by itself when a connection is lost.
    pub attachment_id: Option<Uuid>,
    /// It only asks whether the server lives, and is not counted.
    pub is_probe: bool,
    /// With what it can be compared; `None`: with nothing.
    pub bitmaps: Option<OfferedBitmaps>,
}

/// What a ring thread can be told.
#[derive(Debug)]
pub enum RingMessage {
    /// Serve this socket.
    Accept {
        /// Its identity from now on.
        connection: ConnectionId,
        /// The socket, with its options set.
        socket: OwnedFd,
        /// Where it comes from, for the log.
        peer: Peer,
        /// To be kept as long as the connection.
        place: Place,
    },
    /// The answer to an open.
    Opened {
        /// Whose.
        connection: ConnectionId,
        /// The export, or why not.
        answer: Result<Opened, Refusal>,
    },
    /// The answer to a list.
    Listed {
        /// Whose.
        connection: ConnectionId,
        /// The public exports.
        exports: Vec<ListedExport>,
    },
    /// An operation of a backend that completes by call-back has ended.
    Ended(Ended),
    /// The answer to a BLOCK_STATUS.
    ExtentsFound {
        /// Whose: its index in the ring, which it keeps until this has come.
        connection: u32,
        /// For which request.
        slot: RequestSlot,
        /// `None`: it cannot be answered, which was logged.
        answer: Option<StatusAnswer>,
    },
    /// Requests that waited for a copy of their volume may be tried again.
    GoOn {
        /// Which, all of this ring.
        requests: Vec<HeldRequest>,
    },
    /// A TLS handshake has ended.
    TlsStarted {
        /// Whose.
        connection: ConnectionId,
        /// What the connection is now; `None`: it failed, which was logged.
        secured: Option<Secured>,
    },
    /// The answer to a [`GateMessage::Mark`](crate::data::gate::GateMessage::Mark).
    Marked {
        /// Whose.
        connection: ConnectionId,
        /// False: the catalog cannot record it.
        is_marked: bool,
    },
    /// A volume has other limits now: whoever waits for its turn asks again.
    LimitsChanged,
    /// Close it now; report it closed when its submitted I/O has finished.
    Close {
        /// Which.
        connection: ConnectionId,
    },
    /// Take no more requests; end when every connection has.
    Shutdown,
}

/// A ring thread's letter box.
#[derive(Debug)]
pub struct Mailbox {
    messages: Mutex<Vec<RingMessage>>,
    wakeup: OwnedFd,
    connections: AtomicU32,
}

impl Mailbox {
    /// An empty mailbox with an eventfd of its own.
    ///
    /// # Errors
    /// `EMFILE` and the like.
    pub fn new() -> io::Result<Self> {
        let wakeup = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self { messages: Mutex::default(), wakeup, connections: AtomicU32::new(0) })
    }

    /// Leaves a message and wakes the ring.
    pub fn post(&self, message: RingMessage) {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).push(message);
        // It can only fail when the counter is full, and then the ring is awake.
        let _ = rustix::io::write(&self.wakeup, &1u64.to_ne_bytes());
    }

    /// Takes all messages, in the order they came.
    pub fn take(&self) -> Vec<RingMessage> {
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the ring has to wait for.
    pub fn wakeup(&self) -> &OwnedFd {
        &self.wakeup
    }

    /// Connections that the ring has, or is about to get.
    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Counts a connection that the ring was given.
    pub fn connection_added(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection that is gone.
    pub fn connection_removed(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl CompletionSink for Mailbox {
    fn ended(&self, ended: Ended) {
        self.post(RingMessage::Ended(ended));
    }
}
