//! Where the data of a queue's requests lies, and how each data path brings it there.
//!
//! | path | FETCH and COMMIT say | before the transfer | the transfer's buffer | before COMMIT |
//! | --- | --- | --- | --- | --- |
//! | `fused` | put it at this index | WRITE: pread | READ: the request's pages; WRITE: ours | – |
//! | `fixed-rw` | put it at this index | – | the request's pages | – |
//! | `registered` | nothing | REGISTER_IO_BUF | the request's pages | UNREGISTER_IO_BUF |
//! | `user-copy` | nothing | WRITE: pread | ours | READ: pwrite |
//! | `mapped` | this address | – (the driver copies) | ours | – (the driver copies) |
//!
//! Owns the buffers. Never submits anything: `ring.rs`, its caller, asks what to submit. A path that is meant to
//! put the pages in the table by itself may fail to, request by request; then that one request goes as `registered`.

use std::io;
use std::ops::Range;

use ublk_core::{DataPath, Place, Queue, TagBuffer, Transfer, UserBuffers};

use super::staging::Staging;

/// A copy of this size costs less than the operations on the socket that it saves.
const SMALL_BYTES_MAX: u32 = 8 << 10;

/// Where the data of the tags lies.
#[derive(Debug)]
pub enum Payloads {
    /// In the request's own pages, in the ring's buffer table at the tag's index.
    Automatic {
        /// How bytes move.
        transfer: Transfer,
        /// Where we can copy to and from the pages, too (`UBLK_F_USER_COPY`).
        staging: Option<Staging>,
    },
    /// The same, where the daemon puts them there.
    ByHand(Transfer),
    /// In memory of ours, copied by us: of READs, and of WRITEs.
    UserCopy(UserBuffers, Staging),
    /// In a buffer of ours, copied by the driver.
    Mapped(UserBuffers),
}

impl Payloads {
    /// Makes what a data path needs; `transfer` is what was proved for it. Errors: `ENOMEM`.
    pub fn new(
        data_path: DataPath,
        transfer: Transfer,
        has_user_copy: bool,
        queue_depth: u16,
        max_io_bytes: u32,
    ) -> io::Result<Self> {
        let buffers = || UserBuffers::new(queue_depth, max_io_bytes);
        Ok(match data_path {
            DataPath::UserCopy => Self::UserCopy(buffers()?, Staging::new(queue_depth)?),
            DataPath::Mapped => Self::Mapped(buffers()?),
            DataPath::Registered => Self::ByHand(transfer),
            _ => {
                let staging = has_user_copy.then(|| Staging::new(queue_depth)).transpose()?;
                Self::Automatic { transfer, staging }
            }
        })
    }

    /// Takes the memory, if any, and leaves none behind.
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::ByHand(Transfer::RecvSendFixed))
    }

    /// What FETCH and COMMIT say about the tag's data.
    pub fn tag_buffer(&self, tag: u16) -> TagBuffer {
        match self {
            Self::Automatic { .. } => TagBuffer::AutoRegister { index: tag },
            Self::ByHand(_) | Self::UserCopy(..) => TagBuffer::None,
            Self::Mapped(buffers) => TagBuffer::UserAddress(buffers.address(tag)),
        }
    }

    /// Whether the daemon has to put every request's pages into the ring's buffer table.
    pub fn registers_by_hand(&self) -> bool {
        matches!(self, Self::ByHand(_))
    }

    /// Whether the requests' pages go through the ring's buffer table.
    pub fn uses_buffer_table(&self) -> bool {
        matches!(self, Self::Automatic { .. } | Self::ByHand(_))
    }

    /// Payloads up to this size are copied together with the headers around them: one operation on the socket then moves
    /// many. 0: none is.
    pub fn small_bytes_max(&self) -> u32 {
        match self {
            Self::Automatic { staging: None, .. } | Self::ByHand(_) => 0,
            _ => SMALL_BYTES_MAX,
        }
    }

    /// Fills `payload` with the data of the tag's WRITE. Errors: those of [`Queue::read_request`].
    pub fn gather(&self, queue: &Queue, tag: u16, payload: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Mapped(buffers) => buffers.copy_out(tag, 0, payload),
            _ => queue.read_request(tag, payload)?,
        }
        Ok(())
    }

    /// Puts the first bytes of the tag's READ to where its data belongs. Errors: those of [`Queue::write_request`].
    pub fn scatter(&mut self, queue: &Queue, tag: u16, payload: &[u8]) -> io::Result<()> {
        match self {
            Self::UserCopy(buffers, _) | Self::Mapped(buffers) => buffers.copy_in(tag, 0, payload),
            _ => queue.write_request(tag, payload)?,
        }
        Ok(())
    }

    /// How bytes move between the socket and the data.
    pub fn transfer(&self) -> Transfer {
        match self {
            Self::Automatic { transfer, .. } | Self::ByHand(transfer) => *transfer,
            Self::UserCopy(..) | Self::Mapped(_) => Transfer::RecvSend,
        }
    }

    /// Where these bytes of the tag's data are; `buf_index` is where its pages are in the buffer table.
    pub fn place(&self, tag: u16, buf_index: u16, bytes: Range<u32>) -> Place {
        let len_bytes = bytes.end - bytes.start;
        let addr = match self {
            // What ublk puts in the table starts at address zero.
            Self::Automatic { .. } | Self::ByHand(_) => u64::from(bytes.start),
            Self::UserCopy(buffers, _) | Self::Mapped(buffers) => {
                assert!(bytes.end as usize <= buffers.buffer_bytes(), "a request is larger than its buffer");
                buffers.address(tag) + u64::from(bytes.start)
            }
        };
        Place { buf_index, addr, len_bytes }
    }

    /// Where the data of large WRITEs is sent from, if it is copied first.
    pub fn staging(&self) -> Option<&Staging> {
        match self {
            Self::Automatic { staging, .. } => staging.as_ref(),
            Self::UserCopy(_, staging) => Some(staging),
            _ => None,
        }
    }

    /// The same, to change it.
    pub fn staging_mut(&mut self) -> Option<&mut Staging> {
        match self {
            Self::Automatic { staging, .. } => staging.as_mut(),
            Self::UserCopy(_, staging) => Some(staging),
            _ => None,
        }
    }

    /// Brings what was received to the pages of the tag's READ. Errors: those of [`Queue::copy_to_request`].
    pub fn copy_to_request(&self, queue: &Queue, tag: u16, len_bytes: u32) -> io::Result<()> {
        match self {
            Self::UserCopy(buffers, _) => queue.copy_to_request(tag, buffers, len_bytes),
            _ => Ok(()),
        }
    }
}
