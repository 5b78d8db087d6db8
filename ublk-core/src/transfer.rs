//! The ways to move bytes between a stream socket and a request's data in one ring, and the trial of each.
//!
//! Owns: which SQE a way of moving needs, and the proof that this kernel can do it. Never: knows tags or devices, or
//! submits anything but its own trial.
//! Called by: `data_path` (the trial) and the client's queue loop (the SQEs), so that what was proved is what is used.
//! Invariants: a trial has no effect outside this process and always ends (it moves bytes that are already in a
//! socket's buffer; a receive on an empty socket would wait).
//! Source: `io_uring/net.c` and `io_uring/rw.c`, Linux 7.2 and later for [`Transfer::RecvSendFixed`].
#![allow(unsafe_code)] // Registering a buffer and pushing the trial's SQEs.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::ptr;
use std::time::Duration;

use io_uring::opcode;
use io_uring::types::{self, SubmitArgs, Timespec};
use thiserror::Error;

use crate::mapping::Mapping;
use crate::ring::{QueueRing, Sqe, build_queue_ring, recv_fixed, send_fixed};

/// Bytes moved in each direction by a trial: less than a socket buffer holds, more than one page.
const TRIAL_BYTES: usize = 6000;
/// Where in the buffer they are put: not at its start, so that a wrong address shows.
const TRIAL_OFFSET_BYTES: usize = 1234;
const TRIAL_BUFFER_BYTES: usize = 16384;
/// The transfers complete at once or never.
const TRIAL_DEADLINE: Duration = Duration::from_secs(2);

/// How bytes move between a socket and a request's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transfer {
    /// RECV and SEND with a registered buffer (Linux 7.2): the whole length, or an error.
    RecvSendFixed,
    /// READ_FIXED and WRITE_FIXED with a registered buffer: any part of the length counts as done, but breaks a link.
    ReadWriteFixed,
    /// RECV and SEND with memory of the process: the whole length, or an error.
    RecvSend,
    /// READ and WRITE with memory of the process: any part of the length counts as done, but breaks a link.
    ReadWrite,
}

/// Where a part of a request's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index in the ring's buffer table; without meaning for [`Transfer::RecvSend`].
    pub buf_index: u16,
    /// In a buffer that came from ublk the offset in bytes, in all other memory the address.
    pub addr: u64,
    /// How long the part is.
    pub len_bytes: u32,
}

impl Transfer {
    /// What does the same on a socket whose bytes the kernel encrypts (kTLS): there MSG_WAITALL is refused on SEND and
    /// breaks every link behind a RECV. To be proved like any other.
    pub const fn over_ktls(self) -> Self {
        match self {
            Self::RecvSendFixed | Self::ReadWriteFixed => Self::ReadWriteFixed,
            Self::RecvSend | Self::ReadWrite => Self::ReadWrite,
        }
    }

    /// Receives the part from `socket`.
    pub fn receive(self, socket: types::Fd, place: Place) -> Sqe {
        let Place { buf_index, addr, len_bytes } = place;
        match self {
            Self::RecvSendFixed => recv_fixed(socket, buf_index, addr, len_bytes, 0),
            Self::ReadWriteFixed => {
                let buffer = ptr::without_provenance_mut(addr as usize);
                opcode::ReadFixed::new(socket, buffer, len_bytes, buf_index).build().into()
            }
            Self::RecvSend => {
                let buffer = ptr::with_exposed_provenance_mut(addr as usize);
                opcode::Recv::new(socket, buffer, len_bytes).flags(libc::MSG_WAITALL).build().into()
            }
            Self::ReadWrite => {
                let buffer = ptr::with_exposed_provenance_mut(addr as usize);
                opcode::Read::new(socket, buffer, len_bytes).build().into()
            }
        }
    }

    /// Sends the part to `socket`. `msg_flags` (`MSG_MORE`, `MSG_NOSIGNAL`) go beside `MSG_WAITALL`; WRITE and WRITE_FIXED
    /// take none, so there the process must ignore SIGPIPE, as a Rust program does unless told otherwise.
    pub fn send(self, socket: types::Fd, place: Place, msg_flags: i32) -> Sqe {
        let Place { buf_index, addr, len_bytes } = place;
        match self {
            Self::RecvSendFixed => send_fixed(socket, buf_index, addr, len_bytes, msg_flags),
            Self::ReadWriteFixed => {
                let buffer = ptr::without_provenance(addr as usize);
                opcode::WriteFixed::new(socket, buffer, len_bytes, buf_index).build().into()
            }
            Self::RecvSend => {
                let buffer = ptr::with_exposed_provenance(addr as usize);
                let flags = libc::MSG_WAITALL | msg_flags;
                opcode::Send::new(socket, buffer, len_bytes).flags(flags).build().into()
            }
            Self::ReadWrite => {
                let buffer = ptr::with_exposed_provenance(addr as usize);
                opcode::Write::new(socket, buffer, len_bytes).build().into()
            }
        }
    }

    /// Moves bytes both ways over a pair of sockets and compares them.
    pub fn prove(self) -> Result<(), TransferError> {
        let (near, mut far) = UnixStream::pair().map_err(TransferError::Setup)?;
        let mut buffer = Mapping::anonymous(TRIAL_BUFFER_BYTES).map_err(TransferError::Setup)?;
        // Declared after the buffer, so dropped, with its registration, before it.
        let mut ring = build_queue_ring(4, 4).map_err(TransferError::Setup)?;
        if matches!(self, Self::RecvSendFixed | Self::ReadWriteFixed) {
            let iovec = libc::iovec {
                iov_base: ptr::with_exposed_provenance_mut(buffer.address(0) as usize),
                iov_len: buffer.len_bytes(),
            };
            // SAFETY: the buffer is mapped for as long as the ring that it is registered with exists.
            unsafe { ring.submitter().register_buffers(&[iovec]) }.map_err(TransferError::Setup)?;
        }
        let socket = types::Fd(near.as_raw_fd());
        let addr = buffer.address(TRIAL_OFFSET_BYTES);
        let place = Place { buf_index: 0, addr, len_bytes: TRIAL_BYTES as u32 };
        let [receiving, sending] = self.operation_names();

        let sent = trial_pattern(1);
        far.write_all(&sent).map_err(TransferError::Setup)?;
        let moved = complete_one(&mut ring, receiving, self.receive(socket, place))?;
        let mut received = vec![0; TRIAL_BYTES];
        buffer.copy_out(TRIAL_OFFSET_BYTES, &mut received);
        if moved != TRIAL_BYTES || received != sent {
            return Err(TransferError::WrongBytes { operation: receiving, moved });
        }

        let sent = trial_pattern(2);
        buffer.copy_in(TRIAL_OFFSET_BYTES, &sent);
        let moved = complete_one(&mut ring, sending, self.send(socket, place, 0))?;
        far.set_read_timeout(Some(TRIAL_DEADLINE)).map_err(TransferError::Setup)?;
        if moved != TRIAL_BYTES || far.read_exact(&mut received).is_err() || received != sent {
            return Err(TransferError::WrongBytes { operation: sending, moved });
        }
        Ok(())
    }

    /// What receives and what sends, for people.
    const fn operation_names(self) -> [&'static str; 2] {
        match self {
            Self::RecvSendFixed => {
                ["RECV with a registered buffer (Linux 7.2)", "SEND with a registered buffer (Linux 7.2)"]
            }
            Self::ReadWriteFixed => ["READ_FIXED on a socket", "WRITE_FIXED on a socket"],
            Self::RecvSend => ["RECV", "SEND"],
            Self::ReadWrite => ["READ on a socket", "WRITE on a socket"],
        }
    }
}

/// Why bytes cannot move this way here.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The trial could not be set up: no ring (io_uring forbidden, Linux before 6.1), sockets or memory.
    #[error("cannot set up the trial: {0}")]
    Setup(#[source] io::Error),
    /// The operation was refused, or did not complete.
    #[error("{operation}: {source}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// The operation completed, but the bytes are not those that were sent.
    #[error("{operation}: moved {moved} of {TRIAL_BYTES} bytes or not the right ones")]
    WrongBytes {
        /// What was tried.
        operation: &'static str,
        /// What the completion said, bytes.
        moved: usize,
    },
}

fn trial_pattern(seed: usize) -> Vec<u8> {
    (0..TRIAL_BYTES).map(|position| ((position * 31 + seed * 97) >> 2) as u8).collect()
}

/// Submits one transfer and waits for its completion; gives the bytes moved.
fn complete_one(ring: &mut QueueRing, operation: &'static str, sqe: Sqe) -> Result<usize, TransferError> {
    let refused = |source| TransferError::Refused { operation, source };
    // SAFETY: the SQE names a socket and a buffer that outlive the ring.
    let pushed = unsafe { ring.submission().push(&sqe) };
    assert!(pushed.is_ok(), "the ring is empty between transfers");
    let timespec = Timespec::from(TRIAL_DEADLINE);
    ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec)).map_err(refused)?;
    let cqe = ring.completion().next().ok_or_else(|| refused(io::ErrorKind::TimedOut.into()))?;
    usize::try_from(cqe.result()).map_err(|_| refused(io::Error::from_raw_os_error(-cqe.result())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_kernel_has_is_proved() {
        for transfer in [Transfer::ReadWriteFixed, Transfer::RecvSend, Transfer::ReadWrite] {
            transfer.prove().unwrap();
        }
    }
}
