//! What a queue thread is given, and what it tells: the two sides of `queue_loop.rs` towards the main thread.
//!
//! Types only. Made and read by `attachment.rs`, which starts one thread for each queue; a queue thread sends an event
//! when it is ready, when it fails and when it ends, never while requests are served without an error.

use std::io;

use ublk_core::{DataPath, Queue, Transfer};

use super::data_socket::DataSocket;

/// What a queue thread tells of itself.
#[derive(Debug)]
pub enum QueueEvent {
    /// The ring is made and every tag is about to be fetched: the device can be started.
    Ready,
    /// A connection is gone: requests of the queue end with EIO.
    ConnectionFailed {
        /// Which queue.
        queue_id: u16,
        /// Which of the queue's connections.
        connection: u16,
        /// Why, for people.
        reason: String,
    },
    /// The thread ended, because the device went away or because of an error.
    Ended {
        /// Which queue.
        queue_id: u16,
        /// `Err`: what was written may not be on stable storage, or the queue broke.
        outcome: Result<(), QueueError>,
    },
}

/// Why a queue ended badly.
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
}
