//! The making of a queue thread's io_uring, which can do what `ring.rs` submits and nothing else.
//!
//! Owns: the list of operations. Never: submits or waits.
//! Called by: `ring.rs`. Invariant: what is not in the list is refused by the kernel (`EACCES`), and so is every later registration;
//! only where the kernel refuses the restriction itself is the ring made without it, which is logged.
//! Source: io_uring_register(2), `IORING_REGISTER_RESTRICTIONS`, Linux 5.10.

use std::io;

use io_uring::{opcode, squeue};
use tracing::warn;
use ublk_core::ring;

/// All that is submitted by `ring.rs`, `ublk_core::Transfer` and `ublk_core::Queue`.
const OPCODES: [u8; 10] = [
    opcode::UringCmd16::CODE,
    opcode::Recv::CODE,
    opcode::Send::CODE,
    opcode::SendZc::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::PollAdd::CODE,
    opcode::Timeout::CODE,
];

/// Makes a ring that can do what is in the list and nothing else, with a buffer table of so many entries. Must be called on the thread
/// that will use it. Errors: those of io_uring_setup and of registering the buffer table.
pub(super) fn build(entries: u32, buffers: Option<u32>) -> io::Result<ring::QueueRing> {
    let add_buffers = |ring: &ring::QueueRing| match buffers {
        Some(buffers) => ring.submitter().register_buffers_sparse(buffers),
        None => Ok(()),
    };
    let restricted = ring::build_disabled_queue_ring(entries, entries * 2)?;
    let is_restricted =
        add_buffers(&restricted).and_then(|()| ring::restrict(&restricted, &OPCODES, squeue::Flags::IO_LINK));
    let Err(error) = is_restricted else { return Ok(restricted) };
    // A container's profile may allow io_uring without io_uring_register(2), and not every path needs a buffer table.
    warn!(%error, "io_uring is not restricted to the operations in use; allow io_uring_register(2), for example in the container's profile");
    drop(restricted);
    let ring = ring::build_queue_ring(entries, entries * 2)?;
    add_buffers(&ring)?;
    Ok(ring)
}

#[cfg(test)]
#[allow(unsafe_code)] // Operations without memory of their own.
mod tests {
    use std::os::fd::AsRawFd as _;

    use io_uring::types;
    use ublk_core::ring::Sqe;

    use super::*;

    fn result_of(ring: &mut ring::QueueRing, entry: &Sqe) -> i32 {
        // SAFETY: the entries below name a socket that outlives them, or no memory at all.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn an_operation_that_is_not_in_the_list_is_refused() {
        for buffers in [None, Some(8)] {
            let mut ring = build(8, buffers).unwrap();
            let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
            let socket = types::Fd(near.as_raw_fd());
            let poll = Sqe::from(opcode::PollAdd::new(socket, libc::POLLOUT as u32).build());
            let linked = poll.clone().flags(squeue::Flags::IO_LINK);
            assert_eq!(result_of(&mut ring, &linked), i32::from(libc::POLLOUT));
            let refused = [
                opcode::Nop::new().build().into(),
                opcode::Close::new(socket).build().into(),
                poll.flags(squeue::Flags::ASYNC),
            ];
            for entry in refused {
                assert_eq!(result_of(&mut ring, &entry), -libc::EACCES);
            }
            let registered = ring.submitter().register_buffers_sparse(1).unwrap_err();
            assert_eq!(registered.raw_os_error(), Some(libc::EACCES));
        }
    }
}
