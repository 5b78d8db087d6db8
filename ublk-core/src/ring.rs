//! The ring of a queue thread, and the opcodes that name a registered buffer on a socket, two of which the `io-uring` crate
//! cannot build.
//!
//! Owns: the set-up flags of a queue's ring, and how it is restricted; SEND and RECV whose data is a registered buffer
//! (`IORING_RECVSEND_FIXED_BUF`, Linux 7.2). Never: submits or waits; that is the queue loop's.
//! Called by: the client's queue loop and `transfer`.
//! Invariants: in a fixed SEND or RECV `addr` is a byte offset when the buffer came from ublk (its table entry
//! starts at address zero) and a real address when it is registered user memory; `MSG_WAITALL` is always set by
//! the constructors, because a short transfer counts as success and would corrupt the stream behind it.
//! Source: `include/uapi/linux/io_uring.h`, Linux 7.3.
#![allow(unsafe_code)] // One store into a `repr(C)` SQE whose opcode the crate gives no way to choose.

use std::io;
use std::ptr;

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};

/// The SQE of every ring in this crate: 128 bytes, because control commands need them.
pub type Sqe = squeue::Entry128;
/// The CQE of every ring in this crate.
pub type Cqe = cqueue::Entry;
/// A queue thread's ring.
pub type QueueRing = IoUring<Sqe, Cqe>;

/// `IORING_RECVSEND_FIXED_BUF` in `sqe->ioprio`: the data is the registered buffer `sqe->buf_index`.
pub const IORING_RECVSEND_FIXED_BUF: u16 = 1 << 2;

/// `IORING_SEND_ZC_REPORT_USAGE` in `sqe->ioprio`: the notification is to tell whether the data was copied.
const IORING_SEND_ZC_REPORT_USAGE: u16 = 1 << 3;

/// Byte offset of `opcode` in `struct io_uring_sqe`.
const SQE_OPCODE_OFFSET_BYTES: usize = 0;

/// `IORING_REGISTER_ENABLE_RINGS`, which does nothing to a ring that is enabled.
const IORING_REGISTER_ENABLE_RINGS: u8 = 12;

/// Makes the ring of a queue thread: one issuer, task work run only while that thread waits, and no submission
/// cut short by a bad entry before it. `cq_entries` is at least `sq_entries`; both are rounded up to powers of two.
///
/// Must be called on the thread that will use it. Errors: `EPERM` or `ENOSYS` where io_uring is forbidden or
/// absent (`kernel.io_uring_disabled`, a container's seccomp profile), `EINVAL` before Linux 6.1, `ENOMEM`.
pub fn build_queue_ring(sq_entries: u32, cq_entries: u32) -> io::Result<QueueRing> {
    queue_ring_builder(cq_entries).build(sq_entries)
}

/// The same, not enabled yet (`IORING_SETUP_R_DISABLED`): takes registrations and [`restrict`], and no submission before that.
pub fn build_disabled_queue_ring(sq_entries: u32, cq_entries: u32) -> io::Result<QueueRing> {
    queue_ring_builder(cq_entries).setup_r_disabled().build(sq_entries)
}

/// Enables a ring of [`build_disabled_queue_ring`] for these opcodes, with these flags; from now on the kernel refuses others, and
/// registrations, with `EACCES`. Must be called on the thread that will use it. Errors: those of io_uring_register(2), `EPERM` or
/// `ENOSYS` where a container's profile does not list it; the ring is of no use then.
pub fn restrict(ring: &QueueRing, opcodes: &[u8], flags: squeue::Flags) -> io::Result<()> {
    let mut restrictions: Vec<Restriction> = opcodes.iter().copied().map(Restriction::sqe_op).collect();
    restrictions.push(Restriction::sqe_flags_allowed(flags.bits()));
    // Named so that all others are refused, also by kernels that look at registrations only where one is named.
    restrictions.push(Restriction::register_op(IORING_REGISTER_ENABLE_RINGS));
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()
}

fn queue_ring_builder(cq_entries: u32) -> io_uring::Builder<Sqe, Cqe> {
    let mut builder = QueueRing::builder();
    builder.setup_single_issuer().setup_defer_taskrun().setup_submit_all().setup_cqsize(cq_entries);
    builder
}

/// RECV of exactly `len_bytes` from `socket` into the registered buffer `buf_index` at `addr` (see the invariants
/// above). `msg_flags` is added to `MSG_WAITALL`. Completes with fewer bytes only when the stream ended or failed;
/// a successor linked to it then gets `-ECANCELED`. On an empty buffer slot: `-EFAULT`; before Linux 7.2: `-EINVAL`.
pub fn recv_fixed(socket: types::Fd, buf_index: u16, addr: u64, len_bytes: u32, msg_flags: i32) -> Sqe {
    let place = ptr::without_provenance_mut::<u8>(addr as usize);
    opcode::Recv::new(socket, place, len_bytes)
        .flags(libc::MSG_WAITALL | msg_flags)
        .ioprio(IORING_RECVSEND_FIXED_BUF)
        // `buf_group` and `buf_index` are the same field of the SQE.
        .buf_group(buf_index)
        .build()
        .into()
}

/// SEND of exactly `len_bytes` of the registered buffer `buf_index` at `addr` to `socket`; otherwise as
/// [`recv_fixed`]. On a kTLS socket `MSG_WAITALL` is refused with `-EOPNOTSUPP`.
pub fn send_fixed(socket: types::Fd, buf_index: u16, addr: u64, len_bytes: u32, msg_flags: i32) -> Sqe {
    // SEND and RECV differ in nothing but the opcode, and only RECV's builder can name a buffer index.
    let mut sqe = recv_fixed(socket, buf_index, addr, len_bytes, msg_flags);
    let opcode = ptr::from_mut(&mut sqe).cast::<u8>().wrapping_add(SQE_OPCODE_OFFSET_BYTES);
    // SAFETY: `opcode` points into `sqe`, a local we own exclusively, of 128 plain bytes (`Entry128` is `repr(C)`
    // and starts with `struct io_uring_sqe`, also `repr(C)`); every value of that byte is a valid `u8`.
    unsafe { opcode.write(opcode::Send::CODE) };
    sqe
}

/// [`send_fixed`] by reference (SEND_ZC): if the operation has begun, a second completion (`IORING_CQE_F_NOTIF`) tells when the
/// socket does not refer to the buffer any more, and whether it was copied instead.
pub fn send_zc_fixed(socket: types::Fd, buf_index: u16, addr: u64, len_bytes: u32, msg_flags: i32) -> Sqe {
    opcode::SendZc::new(socket, ptr::without_provenance(addr as usize), len_bytes)
        .buf_index(Some(buf_index))
        .flags(libc::MSG_WAITALL | msg_flags)
        .zc_flags(IORING_SEND_ZC_REPORT_USAGE)
        .build()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of an SQE as the kernel sees them.
    fn bytes_of(sqe: &Sqe) -> [u8; 128] {
        const { assert!(size_of::<Sqe>() == 128) };
        // SAFETY: the pointer is to a live, initialised `Entry128`: 128 bytes without padding.
        unsafe { ptr::from_ref(sqe).cast::<[u8; 128]>().read() }
    }

    fn assert_fixed_layout(sqe: Sqe, opcode: u8) {
        let bytes = bytes_of(&sqe.user_data(0x1817_1615_1413_1211));
        assert_eq!(bytes[0], opcode, "opcode");
        assert_eq!(bytes[1], 0, "flags");
        assert_eq!(u16::from_ne_bytes([bytes[2], bytes[3]]), 1 << 2, "ioprio: IORING_RECVSEND_FIXED_BUF");
        assert_eq!(bytes[4..8], 7i32.to_ne_bytes(), "fd");
        assert_eq!(bytes[8..16], [0; 8], "addr2");
        assert_eq!(bytes[16..24], 0x1000u64.to_ne_bytes(), "addr");
        assert_eq!(bytes[24..28], 0x2000u32.to_ne_bytes(), "len");
        assert_eq!(bytes[28..32], (libc::MSG_WAITALL | libc::MSG_MORE).to_ne_bytes(), "msg_flags");
        assert_eq!(bytes[32..40], 0x1817_1615_1413_1211u64.to_ne_bytes(), "user_data");
        assert_eq!(bytes[40..42], 0x0a0bu16.to_ne_bytes(), "buf_index");
        assert!(bytes[42..].iter().all(|&byte| byte == 0), "nothing else is set");
    }

    #[test]
    fn a_send_by_reference_differs_in_its_opcode_and_asks_whether_it_was_copied() {
        let mut bytes = bytes_of(&send_zc_fixed(types::Fd(7), 0x0a0b, 0x1000, 0x2000, libc::MSG_MORE));
        assert_eq!((bytes[0], bytes[2..4].try_into().unwrap()), (47, (4u16 | 8).to_ne_bytes()));
        bytes[2..4].copy_from_slice(&4u16.to_ne_bytes());
        bytes[0] = 26;
        assert_eq!(bytes, bytes_of(&send_fixed(types::Fd(7), 0x0a0b, 0x1000, 0x2000, libc::MSG_MORE)));
    }

    #[test]
    fn fixed_receive_has_the_kernels_layout() {
        let sqe = recv_fixed(types::Fd(7), 0x0a0b, 0x1000, 0x2000, libc::MSG_MORE);
        assert_fixed_layout(sqe, 27);
    }

    #[test]
    fn fixed_send_has_the_kernels_layout() {
        let sqe = send_fixed(types::Fd(7), 0x0a0b, 0x1000, 0x2000, libc::MSG_MORE);
        assert_eq!(sqe.get_opcode(), 26);
        assert_fixed_layout(sqe, 26);
    }
}
