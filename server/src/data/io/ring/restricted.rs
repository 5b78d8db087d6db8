//! The making of a data thread's io_uring, which can do what `ring.rs` submits and nothing else.
//!
//! Owns: the set-up flags, and the list of operations. Never: submits or waits.
//! Called by: `ring.rs`, on the thread that will use the ring (`SINGLE_ISSUER`).
//! Invariant: what is not in the list is refused by the kernel (`EACCES`), and so is every later `io_uring_register`;
//! only where the kernel refuses the restriction itself is the ring made without it, which is logged.
//! Source: `include/uapi/linux/io_uring.h`; io_uring_register(2), `IORING_REGISTER_RESTRICTIONS`, Linux 5.10.

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};
use tracing::warn;

/// Submissions that fit between two system calls. A pass with more submits twice.
const SQ_ENTRIES: u32 = 512;
/// Completions that fit; the kernel keeps more aside, at a cost.
const CQ_ENTRIES: u32 = 4096;

/// What a ring takes of the memory that a user may lock, in bytes, on kernels that count its queues as such: those before 5.12, and
/// newer ones again. Each queue begins at a page; sizes: `include/uapi/linux/io_uring.h`.
pub const LOCKED_BYTES: u64 = SQ_ENTRIES as u64 * (64 + 4) + CQ_ENTRIES as u64 * 16 + 2 * 4096;

/// All that `ring.rs` submits, without flags.
const OPCODES: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Recv::CODE,
    opcode::PollAdd::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::Fadvise::CODE,
    opcode::AsyncCancel2::CODE,
];

/// `IORING_REGISTER_ENABLE_RINGS`, which does nothing to a ring that is enabled: named so that all others are refused, also by
/// kernels that look at registrations only where one is named.
const IORING_REGISTER_ENABLE_RINGS: u8 = 12;

/// Makes a ring.
///
/// # Errors
/// Those of io_uring_setup(2).
pub fn build() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_defer_taskrun().setup_submit_all().setup_cqsize(CQ_ENTRIES);
    let io = builder.clone().setup_r_disabled().build(SQ_ENTRIES)?;
    let Err(error) = restrict(&io) else { return Ok(io) };
    // A container's profile may allow io_uring without io_uring_register(2).
    warn!(%error, "io_uring is not restricted to the operations in use; allow io_uring_register(2), for example in the container's profile");
    drop(io);
    builder.build(SQ_ENTRIES)
}

fn restrict(io: &IoUring) -> io::Result<()> {
    let mut restrictions: Vec<Restriction> = OPCODES.into_iter().map(Restriction::sqe_op).collect();
    restrictions.push(Restriction::register_op(IORING_REGISTER_ENABLE_RINGS));
    io.submitter().register_restrictions(&mut restrictions)?;
    io.submitter().register_enable_rings()
}

#[cfg(test)]
#[allow(unsafe_code)] // Operations without memory of their own.
mod tests {
    use io_uring::{squeue, types};

    use super::*;

    fn result_of(io: &mut IoUring, entry: &squeue::Entry) -> i32 {
        // SAFETY: the entries below name a descriptor that is closed by nobody meanwhile, and no memory.
        unsafe { io.submission().push(entry) }.unwrap();
        io.submit_and_wait(1).unwrap();
        io.completion().next().unwrap().result()
    }

    #[test]
    fn an_operation_that_is_not_in_the_list_is_refused() {
        let mut io = build().unwrap();
        let (_reader, writer) = std::io::pipe().unwrap();
        let pipe = types::Fd(std::os::fd::AsRawFd::as_raw_fd(&writer));
        let poll = opcode::PollAdd::new(pipe, libc::POLLOUT as u32).build();
        assert_eq!(result_of(&mut io, &poll), i32::from(libc::POLLOUT));
        assert_eq!(result_of(&mut io, &opcode::Nop::new().build()), -libc::EACCES);
        let close = opcode::Close::new(pipe).build();
        assert_eq!(result_of(&mut io, &close), -libc::EACCES, "what harms is refused as well");
        let linked = poll.flags(squeue::Flags::IO_LINK);
        assert_eq!(result_of(&mut io, &linked), -libc::EACCES, "no flag is needed");
        let registered = io.submitter().register_buffers_sparse(1).unwrap_err();
        assert_eq!(registered.raw_os_error(), Some(libc::EACCES));
    }
}
