//! One hardware queue of a ublk device: its descriptors and the SQEs that drive its tags.
//!
//! Owns: the read-only map of the queue's `IoDesc` array and the encoding of FETCH, COMMIT, REGISTER and UNREGISTER.
//! Never: submits anything or remembers what a tag is doing; that is `tag` and the queue loop.
//! Called by: the client's queue loop, on the queue's own thread.
//! Invariants: the descriptor of a tag is valid from the completion of its FETCH or COMMIT until the next COMMIT;
//! one `Queue` serves one `q_id`, and the daemon of a tag is the thread that submitted its FETCH.
//! Source: `include/uapi/linux/ublk_cmd.h`, Linux 7.3.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use io_uring::{opcode, types};

use crate::abi::{
    IoCmd, IoDesc, UBLK_MAX_NR_QUEUES, UBLK_MAX_QUEUE_DEPTH, UBLK_QID_OFF, UBLK_TAG_OFF,
    UBLK_U_IO_COMMIT_AND_FETCH_REQ, UBLK_U_IO_FETCH_REQ, UBLK_U_IO_REGISTER_IO_BUF,
    UBLK_U_IO_UNREGISTER_IO_BUF, UBLKSRV_CMD_BUF_OFFSET, UBLKSRV_IO_BUF_OFFSET, auto_buf_reg_sqe_addr,
};
use crate::buffers::UserBuffers;
use crate::mapping::{Mapping, round_up_to_pages};
use crate::ring::Sqe;
use crate::staging::StagingMemory;

/// Where the data of a tag's next request shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagBuffer {
    /// In the ring's buffer table, put there by the driver (`UBLK_F_AUTO_BUF_REG`). When that fails the request
    /// still comes, with [`IoDesc::needs_buffer_registration`] true.
    AutoRegister {
        /// Index in the buffer table of the ring that submits the command.
        index: u16,
    },
    /// Copied by the driver to and from this address of the daemon (no zero copy, no user copy).
    UserAddress(u64),
    /// Nowhere: the daemon registers it by hand, or copies it ([`Queue::copy_from_request`]).
    None,
}

/// One hardware queue.
#[derive(Debug)]
pub struct Queue {
    char_device: Arc<File>,
    descriptors: Mapping,
    q_id: u16,
    queue_depth: u16,
}

impl Queue {
    /// Maps queue `q_id` of the device open as `char_device` (`/dev/ublkcN`). `queue_depth` is the device's, as the
    /// kernel reported it.
    ///
    /// Errors: `EINVAL` when the depth is not the device's or the queue does not exist.
    pub fn new(char_device: Arc<File>, q_id: u16, queue_depth: u16) -> io::Result<Self> {
        if q_id >= UBLK_MAX_NR_QUEUES || queue_depth == 0 || queue_depth > UBLK_MAX_QUEUE_DEPTH {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Queues are spaced as if each had the greatest depth, whatever depth they have.
        let stride_bytes = round_up_to_pages(usize::from(UBLK_MAX_QUEUE_DEPTH) * size_of::<IoDesc>());
        let offset_bytes = UBLKSRV_CMD_BUF_OFFSET + u64::from(q_id) * stride_bytes as u64;
        let len_bytes = round_up_to_pages(usize::from(queue_depth) * size_of::<IoDesc>());
        let descriptors = Mapping::shared_read_only(&char_device, offset_bytes, len_bytes)?;
        Ok(Self { char_device, descriptors, q_id, queue_depth })
    }

    /// The queue's number on its device.
    pub fn q_id(&self) -> u16 {
        self.q_id
    }

    /// Tags 0 to `queue_depth - 1` exist.
    pub fn queue_depth(&self) -> u16 {
        self.queue_depth
    }

    /// The request that the tag holds. Meaningful only while the daemon owns it. Panics on a tag beyond the depth.
    pub fn io_desc(&self, tag: u16) -> IoDesc {
        assert!(tag < self.queue_depth, "tag {tag} is beyond the depth {}", self.queue_depth);
        self.descriptors.load_io_desc(usize::from(tag))
    }

    /// Waits for the tag's first request. Completes with [`UBLK_IO_RES_OK`](crate::abi::UBLK_IO_RES_OK) when there is
    /// one, [`UBLK_IO_RES_ABORT`](crate::abi::UBLK_IO_RES_ABORT) when the device goes away, or another negative errno
    /// when the command was wrong (`-EINVAL`: flags the device lacks, or another thread fetched first).
    pub fn fetch_req(&self, tag: u16, buffer: TagBuffer) -> Sqe {
        self.fetch_command(UBLK_U_IO_FETCH_REQ, tag, 0, buffer)
    }

    /// Completes the tag's request with `result` and waits for the next, completing as [`fetch_req`](Self::fetch_req).
    ///
    /// `result` is the full length in bytes, zero where the request has no data, or a negative errno. Never a shorter
    /// length: under zero copy the driver ignores it and the requester would get whatever the pages held.
    pub fn commit_and_fetch_req(&self, tag: u16, result: i32, buffer: TagBuffer) -> Sqe {
        self.fetch_command(UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, result, buffer)
    }

    /// Puts the pages of the tag's request in the ring's buffer table at `index`. Completes with zero, `-EBUSY` when
    /// the index is taken, `-EINVAL` when the request has no data.
    pub fn register_io_buf(&self, tag: u16, index: u16) -> Sqe {
        self.command(UBLK_U_IO_REGISTER_IO_BUF, tag, 0, u64::from(index), None)
    }

    /// Takes the pages of the tag's request out of the ring's buffer table again. Until this is done, a commit does
    /// not complete the request.
    pub fn unregister_io_buf(&self, tag: u16, index: u16) -> Sqe {
        self.command(UBLK_U_IO_UNREGISTER_IO_BUF, tag, 0, u64::from(index), None)
    }

    /// Copies the `len_bytes` of the tag's WRITE into its buffer (`UBLK_F_USER_COPY`).
    ///
    /// A system call, not an SQE: on this file io_uring would hand it to a worker thread. Errors: `EINVAL` when the tag
    /// holds no request, `UnexpectedEof` when the request is shorter.
    pub fn copy_from_request(&self, tag: u16, buffers: &mut UserBuffers, len_bytes: u32) -> io::Result<()> {
        buffers.read_from(tag, len_bytes, &self.char_device, user_copy_offset(self.q_id, tag))
    }

    /// Copies the `len_bytes` of the tag's WRITE into `memory`, from `piece` on; otherwise as
    /// [`copy_from_request`](Self::copy_from_request).
    pub fn stage_request(
        &self,
        tag: u16,
        len_bytes: u32,
        memory: &mut StagingMemory,
        piece: u16,
    ) -> io::Result<()> {
        memory.read_from(piece, len_bytes, &self.char_device, user_copy_offset(self.q_id, tag))
    }

    /// Copies `len_bytes` of the tag's buffer to the pages of its READ; otherwise as
    /// [`copy_from_request`](Self::copy_from_request).
    pub fn copy_to_request(&self, tag: u16, buffers: &UserBuffers, len_bytes: u32) -> io::Result<()> {
        buffers.write_to(tag, len_bytes, &self.char_device, user_copy_offset(self.q_id, tag))
    }

    /// Fills `data` from the start of the data of the tag's WRITE; otherwise as
    /// [`copy_from_request`](Self::copy_from_request).
    pub fn read_request(&self, tag: u16, data: &mut [u8]) -> io::Result<()> {
        self.char_device.read_exact_at(data, user_copy_offset(self.q_id, tag))
    }

    /// Puts `data` at the start of the pages of the tag's READ; otherwise as
    /// [`copy_from_request`](Self::copy_from_request).
    pub fn write_request(&self, tag: u16, data: &[u8]) -> io::Result<()> {
        self.char_device.write_all_at(data, user_copy_offset(self.q_id, tag))
    }

    fn fetch_command(&self, cmd_op: u32, tag: u16, result: i32, buffer: TagBuffer) -> Sqe {
        match buffer {
            TagBuffer::AutoRegister { index } => {
                self.command(cmd_op, tag, result, 0, Some(auto_buf_reg_sqe_addr(index)))
            }
            TagBuffer::UserAddress(address) => self.command(cmd_op, tag, result, address, None),
            TagBuffer::None => self.command(cmd_op, tag, result, 0, None),
        }
    }

    fn command(&self, cmd_op: u32, tag: u16, result: i32, addr: u64, sqe_addr: Option<u64>) -> Sqe {
        debug_assert!(tag < self.queue_depth, "tag {tag} is beyond the depth {}", self.queue_depth);
        let cmd = IoCmd { q_id: self.q_id, tag, result, addr };
        let char_device = types::Fd(self.char_device.as_raw_fd());
        opcode::UringCmd16::new(char_device, cmd_op).cmd(cmd.to_sqe_cmd()).addr(sqe_addr).build().into()
    }
}

/// Offset in `/dev/ublkcN` of the data of one queue's tag.
pub fn user_copy_offset(q_id: u16, tag: u16) -> u64 {
    UBLKSRV_IO_BUF_OFFSET + (u64::from(q_id) << UBLK_QID_OFF) + (u64::from(tag) << UBLK_TAG_OFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A queue over an ordinary file, which can be mapped like a character device.
    fn queue_over_file(q_id: u16, queue_depth: u16) -> Queue {
        let fd = rustix::fs::memfd_create("descriptors", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(1 << 20).unwrap();
        Queue::new(Arc::new(file), q_id, queue_depth).unwrap()
    }

    #[test]
    fn descriptors_are_read_from_the_queues_own_place() {
        use std::os::unix::fs::FileExt;
        let queue = queue_over_file(2, 16);
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&1u32.to_ne_bytes());
        bytes.extend_from_slice(&8u32.to_ne_bytes());
        bytes.extend_from_slice(&99u64.to_ne_bytes());
        bytes.extend_from_slice(&0xabcdu64.to_ne_bytes());
        queue.char_device.write_all_at(&bytes, 2 * 4096 * 24 + 3 * 24).unwrap();
        assert_eq!(queue.io_desc(3), IoDesc { op_flags: 1, nr_sectors: 8, start_sector: 99, addr: 0xabcd });
    }

    #[test]
    fn user_copy_offsets_follow_the_headers_bits() {
        assert_eq!(user_copy_offset(0, 0), 0x8000_0000);
        assert_eq!(user_copy_offset(1, 2), 0x8000_0000 + (1 << 41) + (2 << 25));
    }

    #[test]
    fn impossible_queues_are_refused() {
        let file = Arc::new(File::open("/dev/zero").unwrap());
        for (q_id, queue_depth) in [(4096, 1), (0, 0), (0, 4097)] {
            let error = Queue::new(Arc::clone(&file), q_id, queue_depth).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
