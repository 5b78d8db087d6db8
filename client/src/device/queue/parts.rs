//! What a queue thread is given, and what it tells: the two sides of `run.rs` towards the main thread.
//!
//! Made and read by `attachment.rs`, which starts one thread for each queue; a queue thread sends an event when it is
//! ready, when it has lost its connections and when it ends, never while requests are served without an error.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use rustix::event::EventfdFlags;
use ublk_core::{DataPath, Queue, Transfer};

use super::link::LinkEvent;
use super::requests::Resend;
use super::unflushed::Unflushed;
use crate::device::connect::data_socket::DataSocket;

/// What a queue thread tells of itself.
#[derive(Debug)]
pub enum QueueEvent {
    /// The ring is made and every tag is about to be fetched: the device can be started.
    Ready,
    /// Something of its connections.
    Link {
        /// Which queue.
        queue_id: u16,
        /// What.
        event: LinkEvent,
    },
    /// On a connection the first payload has left that was sent from a request's own pages.
    SentByReference {
        /// Whether the kernel has copied it all the same.
        was_copied: bool,
    },
    /// The thread ended, because the device went away or because of an error.
    Ended {
        /// Which queue.
        queue_id: u16,
        /// `Err`: what was written may not be on stable storage, or the queue broke.
        outcome: Result<(), QueueError>,
    },
}

/// What a queue thread is told.
#[derive(Debug)]
pub enum QueueCommand {
    /// Here are all connections anew, in the transmission phase, each on the slot of the one before it.
    Connect(Vec<DataSocket>),
    /// Drop the connections, for this reason.
    Disconnect(String),
    /// The server is shutting down: send nothing more, and drop the connections once no reply is owed.
    Leave,
    /// Nothing but a pass, at whose end it is read what other queues have counted.
    Look,
    /// Without connections, requests end with EIO until there are some; with them, nothing changes.
    GiveUp,
}

/// The main thread's way to a queue thread.
#[derive(Debug)]
pub struct QueueCommander {
    commands: Sender<QueueCommand>,
    eventfd: Arc<OwnedFd>,
}

/// The queue thread's end of it.
#[derive(Debug)]
pub struct QueueCommands {
    /// What was commanded.
    pub commands: Receiver<QueueCommand>,
    /// Readable when something was.
    pub eventfd: Arc<OwnedFd>,
}

impl QueueCommander {
    /// Both ends. Errors: eventfd's.
    pub fn new() -> io::Result<(Self, QueueCommands)> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let eventfd = Arc::new(rustix::event::eventfd(0, flags)?);
        let (sender, commands) = mpsc::channel();
        Ok((Self { commands: sender, eventfd: Arc::clone(&eventfd) }, QueueCommands { commands, eventfd }))
    }

    /// Tells the queue. One that has ended hears nothing.
    pub fn tell(&self, command: QueueCommand) {
        let _ = self.commands.send(command);
        // EAGAIN: it has not read what was raised before, which wakes it just as well.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }
}

/// Why a queue failed.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring cannot be made or used.
    #[error("io_uring: {0}")]
    Ring(#[from] io::Error),
    /// The driver refused a command.
    #[error("the ublk driver refused a command of tag {tag}: {source}")]
    Driver {
        /// The tag.
        tag: u16,
        /// Its errno.
        source: io::Error,
    },
    /// The server did not say that everything is on stable storage.
    #[error("the last FLUSH failed: {0}; what was written and not flushed before may be lost")]
    FinalFlush(String),
}

/// What a queue thread is made of.
#[derive(Debug)]
pub struct QueueParts {
    /// The device's queue.
    pub queue: Queue,
    /// How its data travels.
    pub data_path: DataPath,
    /// How its bytes move, as was proved; on kTLS sockets what takes its place there was, too.
    pub transfer: Transfer,
    /// Whether the device was made with `UBLK_F_USER_COPY`.
    pub has_user_copy: bool,
    /// Largest READ or WRITE, in bytes.
    pub max_io_bytes: u32,
    /// Whether a FLUSH has to end the session.
    pub volatile_cache: bool,
    /// Its connections, in the transmission phase; at least one.
    pub sockets: Vec<DataSocket>,
    /// What becomes of requests on connections that are lost.
    pub resend: Resend,
    /// After half of this without any reply while some are due, the main thread is told at each tick.
    pub reply_timeout: Duration,
    /// For so long after its last event the thread looks for the next without sleeping.
    pub busy_poll: Duration,
    /// WRITEs of at least so many bytes that are sent by themselves are sent from the requests' own pages, by
    /// `Transfer::RecvSendFixed` only; `None`: none is.
    pub send_zc_bytes_min: Option<u32>,
    /// After so many bytes under one key a connection that the kernel encrypts is made anew.
    pub key_bytes_max: u64,
    /// What has been acknowledged and not flushed, by all queues.
    pub unflushed: Arc<Unflushed>,
    /// What the main thread says.
    pub commands: QueueCommands,
}
