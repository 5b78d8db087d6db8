//! The kernel's ublk ABI: structures, command numbers and flags, with the kernel's own names.
//!
//! Owns: the `repr(C)` image of `include/uapi/linux/ublk_cmd.h` (Linux 7.3) and the byte encodings of the two
//! commands that travel inside an SQE. Never: system calls, policy, or anything a newer header might change
//! silently; every size and offset is asserted when this file is compiled.
//! Called by: `control`, `params` and `queue` in this crate; the client's queue loop reads `IoDesc`.
//! Invariants: sectors are 512 bytes everywhere, whatever the logical block size; only the ioctl-encoded
//! commands (`UBLK_U_*`) exist here, kernels may be built without the legacy numbers.

use std::mem::{offset_of, size_of};

/// Bytes in a sector, the unit of every position and length in this ABI.
pub const SECTOR_BYTES: u64 = 512;
/// log2 of [`SECTOR_BYTES`].
pub const SECTOR_SHIFT: u32 = 9;

// ---------------------------------------------------------------------------------------------------------------
// Command numbers
// ---------------------------------------------------------------------------------------------------------------

const IOC_WRITE: u32 = 1;
const IOC_READ: u32 = 2;

/// `_IOC(direction, 'u', number, size)` as `asm-generic/ioctl.h` lays it out.
const fn ioc(direction: u32, number: u32, size: usize) -> u32 {
    assert!(size < 1 << 14, "an ioctl number has 14 bits for the size of its argument");
    (direction << 30) | ((size as u32) << 16) | ((b'u' as u32) << 8) | number
}

// These architectures lay ioctl numbers out differently; nobody has asked for them.
#[cfg(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc64"
))]
compile_error!("this architecture encodes ioctl numbers differently from asm-generic/ioctl.h");

const fn ctrl_read(number: u32) -> u32 {
    ioc(IOC_READ, number, size_of::<CtrlCmd>())
}
const fn ctrl_read_write(number: u32) -> u32 {
    ioc(IOC_READ | IOC_WRITE, number, size_of::<CtrlCmd>())
}
const fn io_read_write(number: u32) -> u32 {
    ioc(IOC_READ | IOC_WRITE, number, size_of::<IoCmd>())
}

/// Reads the CPUs that feed one hardware queue.
pub const UBLK_U_CMD_GET_QUEUE_AFFINITY: u32 = ctrl_read(0x01);
/// Reads a [`CtrlDevInfo`].
pub const UBLK_U_CMD_GET_DEV_INFO: u32 = ctrl_read(0x02);
/// Adds a device: `/dev/ublkcN` appears.
pub const UBLK_U_CMD_ADD_DEV: u32 = ctrl_read_write(0x04);
/// Deletes a device and waits until its number is free.
pub const UBLK_U_CMD_DEL_DEV: u32 = ctrl_read_write(0x05);
/// Makes `/dev/ublkbN` appear; waits until every tag has been fetched.
pub const UBLK_U_CMD_START_DEV: u32 = ctrl_read_write(0x06);
/// Takes `/dev/ublkbN` away.
pub const UBLK_U_CMD_STOP_DEV: u32 = ctrl_read_write(0x07);
/// Writes [`Params`]; only before START_DEV.
pub const UBLK_U_CMD_SET_PARAMS: u32 = ctrl_read_write(0x08);
/// Reads [`Params`].
pub const UBLK_U_CMD_GET_PARAMS: u32 = ctrl_read(0x09);
/// Prepares a device, whose daemon is gone, for a new one.
pub const UBLK_U_CMD_START_USER_RECOVERY: u32 = ctrl_read_write(0x10);
/// Resumes a device under its new daemon; waits until every tag has been fetched.
pub const UBLK_U_CMD_END_USER_RECOVERY: u32 = ctrl_read_write(0x11);
/// As GET_DEV_INFO, with the path of the character device before the answer in the buffer.
pub const UBLK_U_CMD_GET_DEV_INFO2: u32 = ctrl_read(0x12);
/// Reads the `UBLK_F_*` bits that the driver knows (Linux 6.5).
pub const UBLK_U_CMD_GET_FEATURES: u32 = ctrl_read(0x13);
/// Deletes a device without waiting for its number to be free (Linux 6.9).
pub const UBLK_U_CMD_DEL_DEV_ASYNC: u32 = ctrl_read(0x14);
/// Changes the capacity of a live device.
pub const UBLK_U_CMD_UPDATE_SIZE: u32 = ctrl_read_write(0x15);
/// Takes all tags from the daemon. Not sent by us: Linux 7.3 may never give back one whose request was on its way to the daemon.
pub const UBLK_U_CMD_QUIESCE_DEV: u32 = ctrl_read_write(0x16);
/// Stops a device only if nothing has it open.
pub const UBLK_U_CMD_TRY_STOP_DEV: u32 = ctrl_read_write(0x17);

/// Waits for the first request of a tag.
pub const UBLK_U_IO_FETCH_REQ: u32 = io_read_write(0x20);
/// Completes the tag's request and waits for the next one.
pub const UBLK_U_IO_COMMIT_AND_FETCH_REQ: u32 = io_read_write(0x21);
/// Puts the request's pages in the ring's buffer table at index `addr`.
pub const UBLK_U_IO_REGISTER_IO_BUF: u32 = io_read_write(0x23);
/// Takes them out again.
pub const UBLK_U_IO_UNREGISTER_IO_BUF: u32 = io_read_write(0x24);

/// A FETCH completed: the daemon owns a request.
pub const UBLK_IO_RES_OK: i32 = 0;
/// A FETCH completed without a request: the device is going away, do not fetch again.
pub const UBLK_IO_RES_ABORT: i32 = -libc::ENODEV;

// ---------------------------------------------------------------------------------------------------------------
// Limits and the layout of /dev/ublkcN
// ---------------------------------------------------------------------------------------------------------------

/// Offset in `/dev/ublkcN` of the `IoDesc` arrays (mmap).
pub const UBLKSRV_CMD_BUF_OFFSET: u64 = 0;
/// Offset in `/dev/ublkcN` of the requests' data (pread and pwrite).
pub const UBLKSRV_IO_BUF_OFFSET: u64 = 0x8000_0000;
/// Most tags a queue can have.
pub const UBLK_MAX_QUEUE_DEPTH: u16 = 4096;
/// Bits of the byte offset in one request's data, so a request has at most 32 MiB.
pub const UBLK_IO_BUF_BITS: u32 = 25;
/// Position of the tag in an offset of the requests' data.
pub const UBLK_TAG_OFF: u32 = UBLK_IO_BUF_BITS;
/// Bits of the tag.
pub const UBLK_TAG_BITS: u32 = 16;
/// Position of the queue in an offset of the requests' data.
pub const UBLK_QID_OFF: u32 = UBLK_TAG_OFF + UBLK_TAG_BITS;
/// Bits of the queue.
pub const UBLK_QID_BITS: u32 = 12;
/// Most hardware queues a device can have.
pub const UBLK_MAX_NR_QUEUES: u16 = 1 << UBLK_QID_BITS;

// ---------------------------------------------------------------------------------------------------------------
// Device flags and states
// ---------------------------------------------------------------------------------------------------------------

/// A request's pages may be put in an io_uring buffer table (usable since Linux 6.15).
pub const UBLK_F_SUPPORT_ZERO_COPY: u64 = 1 << 0;
/// Requests are handed over in task work; always set by current kernels.
pub const UBLK_F_URING_CMD_COMP_IN_TASK: u64 = 1 << 1;
/// Write data is copied only when the daemon asks for it.
pub const UBLK_F_NEED_GET_DATA: u64 = 1 << 2;
/// The device survives its daemon; requests in flight fail.
pub const UBLK_F_USER_RECOVERY: u64 = 1 << 3;
/// With USER_RECOVERY: requests in flight are issued again to the next daemon.
pub const UBLK_F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
/// A device of a user without privileges.
pub const UBLK_F_UNPRIVILEGED_DEV: u64 = 1 << 5;
/// Commands are ioctl-encoded.
pub const UBLK_F_CMD_IOCTL_ENCODE: u64 = 1 << 6;
/// Data is moved by pread and pwrite on `/dev/ublkcN` (Linux 6.5).
pub const UBLK_F_USER_COPY: u64 = 1 << 7;
/// A zoned device.
pub const UBLK_F_ZONED: u64 = 1 << 8;
/// The device survives its daemon; all I/O fails while it has none.
pub const UBLK_F_USER_RECOVERY_FAIL_IO: u64 = 1 << 9;
/// UPDATE_SIZE is known.
pub const UBLK_F_UPDATE_SIZE: u64 = 1 << 10;
/// FETCH and COMMIT register and unregister the request's pages themselves (Linux 6.16).
pub const UBLK_F_AUTO_BUF_REG: u64 = 1 << 11;
/// QUIESCE_DEV is allowed; needs USER_RECOVERY.
pub const UBLK_F_QUIESCE: u64 = 1 << 12;
/// Each tag may have a daemon thread of its own.
pub const UBLK_F_PER_IO_DAEMON: u64 = 1 << 13;
/// REGISTER and UNREGISTER may come from any thread.
pub const UBLK_F_BUF_REG_OFF_DAEMON: u64 = 1 << 14;
/// Commands for many tags at once.
pub const UBLK_F_BATCH_IO: u64 = 1 << 15;
/// Requests carry integrity data; needs USER_COPY.
pub const UBLK_F_INTEGRITY: u64 = 1 << 16;
/// TRY_STOP_DEV is known.
pub const UBLK_F_SAFE_STOP_DEV: u64 = 1 << 17;
/// START_DEV reads no partition table.
pub const UBLK_F_NO_AUTO_PART_SCAN: u64 = 1 << 18;
/// Pages shared with the daemon are recognised in requests.
pub const UBLK_F_SHMEM_ZC: u64 = 1 << 19;

/// The size of an [`IoDesc`] is chosen by `CtrlDevInfo::io_desc_size`.
pub const UBLK_F_IO_DESC_SIZE: u64 = 1 << 20;

/// Every device flag with its name, lowest bit first, for messages.
pub const UBLK_F_NAMES: [(u64, &str); 21] = [
    (UBLK_F_SUPPORT_ZERO_COPY, "SUPPORT_ZERO_COPY"),
    (UBLK_F_URING_CMD_COMP_IN_TASK, "URING_CMD_COMP_IN_TASK"),
    (UBLK_F_NEED_GET_DATA, "NEED_GET_DATA"),
    (UBLK_F_USER_RECOVERY, "USER_RECOVERY"),
    (UBLK_F_USER_RECOVERY_REISSUE, "USER_RECOVERY_REISSUE"),
    (UBLK_F_UNPRIVILEGED_DEV, "UNPRIVILEGED_DEV"),
    (UBLK_F_CMD_IOCTL_ENCODE, "CMD_IOCTL_ENCODE"),
    (UBLK_F_USER_COPY, "USER_COPY"),
    (UBLK_F_ZONED, "ZONED"),
    (UBLK_F_USER_RECOVERY_FAIL_IO, "USER_RECOVERY_FAIL_IO"),
    (UBLK_F_UPDATE_SIZE, "UPDATE_SIZE"),
    (UBLK_F_AUTO_BUF_REG, "AUTO_BUF_REG"),
    (UBLK_F_QUIESCE, "QUIESCE"),
    (UBLK_F_PER_IO_DAEMON, "PER_IO_DAEMON"),
    (UBLK_F_BUF_REG_OFF_DAEMON, "BUF_REG_OFF_DAEMON"),
    (UBLK_F_BATCH_IO, "BATCH_IO"),
    (UBLK_F_INTEGRITY, "INTEGRITY"),
    (UBLK_F_SAFE_STOP_DEV, "SAFE_STOP_DEV"),
    (UBLK_F_NO_AUTO_PART_SCAN, "NO_AUTO_PART_SCAN"),
    (UBLK_F_SHMEM_ZC, "SHMEM_ZC"),
    (UBLK_F_IO_DESC_SIZE, "IO_DESC_SIZE"),
];

/// `CtrlDevInfo::state`: added, never started, or its daemon is gone for good.
pub const UBLK_S_DEV_DEAD: u16 = 0;
/// `CtrlDevInfo::state`: serving.
pub const UBLK_S_DEV_LIVE: u16 = 1;
/// `CtrlDevInfo::state`: without a daemon, I/O waits for recovery.
pub const UBLK_S_DEV_QUIESCED: u16 = 2;
/// `CtrlDevInfo::state`: without a daemon, I/O fails until recovery.
pub const UBLK_S_DEV_FAIL_IO: u16 = 3;

// ---------------------------------------------------------------------------------------------------------------
// Request operations and flags
// ---------------------------------------------------------------------------------------------------------------

/// Read data into the request.
pub const UBLK_IO_OP_READ: u8 = 0;
/// Write data from the request.
pub const UBLK_IO_OP_WRITE: u8 = 1;
/// Make completed writes durable.
pub const UBLK_IO_OP_FLUSH: u8 = 2;
/// The contents are no longer needed.
pub const UBLK_IO_OP_DISCARD: u8 = 3;
/// Not sent by current kernels.
pub const UBLK_IO_OP_WRITE_SAME: u8 = 4;
/// The contents shall read as zeroes.
pub const UBLK_IO_OP_WRITE_ZEROES: u8 = 5;

/// Bits 8 and up of `IoDesc::op_flags`, kept in place: do not retry in the driver on device errors.
pub const UBLK_IO_F_FAILFAST_DEV: u32 = 1 << 8;
/// Do not retry in the driver on transport errors.
pub const UBLK_IO_F_FAILFAST_TRANSPORT: u32 = 1 << 9;
/// Do not retry in the driver on its own errors.
pub const UBLK_IO_F_FAILFAST_DRIVER: u32 = 1 << 10;
/// File-system metadata.
pub const UBLK_IO_F_META: u32 = 1 << 11;
/// Durable before completion.
pub const UBLK_IO_F_FUA: u32 = 1 << 13;
/// WRITE_ZEROES keeps the space allocated.
pub const UBLK_IO_F_NOUNMAP: u32 = 1 << 15;
/// Swap traffic.
pub const UBLK_IO_F_SWAP: u32 = 1 << 16;
/// Automatic registration failed: the daemon registers the buffer itself or fails the request.
pub const UBLK_IO_F_NEED_REG_BUF: u32 = 1 << 17;
/// The request has integrity data.
pub const UBLK_IO_F_INTEGRITY: u32 = 1 << 18;
/// The request's pages belong to a shared-memory buffer.
pub const UBLK_IO_F_SHMEM_ZC: u32 = 1 << 19;

/// Flag in a packed auto-registration value: on failure tell the daemon instead of failing the request unseen.
pub const UBLK_AUTO_BUF_REG_FALLBACK: u8 = 1 << 0;

/// What goes in `sqe->addr` of FETCH and COMMIT under [`UBLK_F_AUTO_BUF_REG`]: the index in the ring's buffer
/// table, always with the fallback flag, because without it a failed registration fails I/O behind our back.
pub const fn auto_buf_reg_sqe_addr(index: u16) -> u64 {
    (index as u64) | ((UBLK_AUTO_BUF_REG_FALLBACK as u64) << 16)
}

// ---------------------------------------------------------------------------------------------------------------
// Structures of control commands
// ---------------------------------------------------------------------------------------------------------------

/// `struct ublksrv_ctrl_cmd`: a control command, carried in the last 80 bytes of a 128-byte SQE.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CtrlCmd {
    /// The device, or `u32::MAX` for "any" in ADD_DEV.
    pub dev_id: u32,
    /// `u16::MAX` unless the command concerns a queue.
    pub queue_id: u16,
    /// Bytes at `addr`.
    pub len: u16,
    /// A buffer in this process, read or written by the command.
    pub addr: u64,
    /// Inline argument.
    pub data: [u64; 1],
    /// Bytes of the path at the start of the buffer (GET_DEV_INFO2), its NUL included.
    pub dev_path_len: u16,
    /// Zero.
    pub pad: u16,
    /// Zero.
    pub reserved: u32,
}

impl CtrlCmd {
    /// A command for a device (not one of its queues) without buffer or argument.
    pub const fn for_device(dev_id: u32) -> Self {
        Self { dev_id, queue_id: u16::MAX, len: 0, addr: 0, data: [0], dev_path_len: 0, pad: 0, reserved: 0 }
    }

    /// The bytes that follow `cmd_op` in the SQE.
    pub fn to_sqe_cmd(self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[0..4].copy_from_slice(&self.dev_id.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.queue_id.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.len.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.data[0].to_ne_bytes());
        bytes[24..26].copy_from_slice(&self.dev_path_len.to_ne_bytes());
        bytes
    }
}

/// `struct ublksrv_ctrl_dev_info`: what a device is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CtrlDevInfo {
    /// Hardware queues; the kernel lowers it to the number of CPUs.
    pub nr_hw_queues: u16,
    /// Tags of each queue.
    pub queue_depth: u16,
    /// `UBLK_S_DEV_*`.
    pub state: u16,
    /// Bytes of an [`IoDesc`] under `UBLK_F_IO_DESC_SIZE`; otherwise zero.
    pub io_desc_size: u16,
    /// Largest request, bytes; the kernel rounds it down to whole pages.
    pub max_io_buf_bytes: u32,
    /// N of `/dev/ublkbN`; `u32::MAX` asks for any.
    pub dev_id: u32,
    /// Process (thread group) of the daemon.
    pub ublksrv_pid: i32,
    /// Zero.
    pub pad1: u32,
    /// `UBLK_F_*`.
    pub flags: u64,
    /// The daemon's own; the driver only keeps it.
    pub ublksrv_flags: u64,
    /// Owner of an unprivileged device.
    pub owner_uid: u32,
    /// Owner of an unprivileged device.
    pub owner_gid: u32,
    /// Zero.
    pub reserved1: u64,
    /// Zero.
    pub reserved2: u64,
}

// ---------------------------------------------------------------------------------------------------------------
// Structures of I/O commands
// ---------------------------------------------------------------------------------------------------------------

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Fill the request's pages.
    Read,
    /// Store the request's pages.
    Write,
    /// Make completed writes durable; no range.
    Flush,
    /// Drop a range.
    Discard,
    /// Make a range read as zeroes.
    WriteZeroes,
    /// An operation this crate has no name for: fail it with `-EOPNOTSUPP`.
    Other(u8),
}

/// `struct ublksrv_io_desc`: one request, written by the driver before the tag's command completes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoDesc {
    /// Operation in bits 0-7, `UBLK_IO_F_*` above.
    pub op_flags: u32,
    /// Length, sectors.
    pub nr_sectors: u32,
    /// Position, sectors.
    pub start_sector: u64,
    /// The tag's buffer in this process (copy modes).
    pub addr: u64,
}

impl IoDesc {
    /// What the request asks for: `UBLK_IO_OP_*`.
    pub const fn op(&self) -> IoOp {
        match (self.op_flags & 0xff) as u8 {
            UBLK_IO_OP_READ => IoOp::Read,
            UBLK_IO_OP_WRITE => IoOp::Write,
            UBLK_IO_OP_FLUSH => IoOp::Flush,
            UBLK_IO_OP_DISCARD => IoOp::Discard,
            UBLK_IO_OP_WRITE_ZEROES => IoOp::WriteZeroes,
            other => IoOp::Other(other),
        }
    }

    /// The `UBLK_IO_F_*` bits, in the positions of those constants.
    pub const fn flags(&self) -> u32 {
        self.op_flags & !0xff
    }

    /// The request must be durable before it completes.
    pub const fn fua(&self) -> bool {
        self.op_flags & UBLK_IO_F_FUA != 0
    }

    /// WRITE_ZEROES must not free the space.
    pub const fn no_unmap(&self) -> bool {
        self.op_flags & UBLK_IO_F_NOUNMAP != 0
    }

    /// Automatic buffer registration failed: register by hand before touching the pages.
    pub const fn needs_buffer_registration(&self) -> bool {
        self.op_flags & UBLK_IO_F_NEED_REG_BUF != 0
    }

    /// Position on the device, bytes. Zero for FLUSH, which has no range: the driver gives it sector 2^64 - 1.
    pub const fn offset_bytes(&self) -> u64 {
        match self.op() {
            IoOp::Flush => 0,
            _ => self.start_sector.saturating_mul(SECTOR_BYTES),
        }
    }

    /// Length, bytes. DISCARD and WRITE_ZEROES may exceed the largest data request by far.
    pub const fn len_bytes(&self) -> u64 {
        self.nr_sectors as u64 * SECTOR_BYTES
    }
}

/// `struct ublksrv_io_cmd`: an I/O command, carried in the last 16 bytes of an SQE.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoCmd {
    /// The queue.
    pub q_id: u16,
    /// The tag.
    pub tag: u16,
    /// COMMIT only: bytes done, or a negative errno.
    pub result: i32,
    /// The tag's buffer (mapped), the buffer index (REGISTER, UNREGISTER), else zero.
    pub addr: u64,
}

impl IoCmd {
    /// The bytes that follow `cmd_op` in the SQE.
    pub fn to_sqe_cmd(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..2].copy_from_slice(&self.q_id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.result.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Parameters
// ---------------------------------------------------------------------------------------------------------------

/// `ParamBasic::attrs`: read-only.
pub const UBLK_ATTR_READ_ONLY: u32 = 1 << 0;
/// `ParamBasic::attrs`: seeks cost time.
pub const UBLK_ATTR_ROTATIONAL: u32 = 1 << 1;
/// `ParamBasic::attrs`: completed writes need a FLUSH to be durable.
pub const UBLK_ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// `ParamBasic::attrs`: FUA is honoured.
pub const UBLK_ATTR_FUA: u32 = 1 << 3;

/// `Params::types`: `basic` is valid.
pub const UBLK_PARAM_TYPE_BASIC: u32 = 1 << 0;
/// `Params::types`: `discard` is valid.
pub const UBLK_PARAM_TYPE_DISCARD: u32 = 1 << 1;
/// `Params::types`: `devt` is valid (GET_PARAMS only).
pub const UBLK_PARAM_TYPE_DEVT: u32 = 1 << 2;
/// `Params::types`: `zoned` is valid.
pub const UBLK_PARAM_TYPE_ZONED: u32 = 1 << 3;
/// `Params::types`: `dma` is valid.
pub const UBLK_PARAM_TYPE_DMA_ALIGN: u32 = 1 << 4;
/// `Params::types`: `seg` is valid.
pub const UBLK_PARAM_TYPE_SEGMENT: u32 = 1 << 5;
/// `Params::types`: `integrity` is valid.
pub const UBLK_PARAM_TYPE_INTEGRITY: u32 = 1 << 6;
/// Smallest value of `ParamSegment::max_segment_size`, bytes.
pub const UBLK_MIN_SEGMENT_SIZE: u32 = 4096;

/// `struct ublk_param_basic`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamBasic {
    /// `UBLK_ATTR_*`.
    pub attrs: u32,
    /// log2 of the logical block, bytes.
    pub logical_bs_shift: u8,
    /// log2 of the physical block, bytes.
    pub physical_bs_shift: u8,
    /// log2 of the optimal I/O, bytes.
    pub io_opt_shift: u8,
    /// log2 of the minimal efficient I/O, bytes.
    pub io_min_shift: u8,
    /// Largest request, sectors.
    pub max_sectors: u32,
    /// Requests do not cross multiples of this, sectors; zero: no such line.
    pub chunk_sectors: u32,
    /// Capacity, sectors.
    pub dev_sectors: u64,
    /// Segments do not cross these lines.
    pub virt_boundary_mask: u64,
}

/// `struct ublk_param_discard`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamDiscard {
    /// Offset of the first whole granule, bytes.
    pub discard_alignment: u32,
    /// Bytes; never zero.
    pub discard_granularity: u32,
    /// Largest DISCARD, sectors; zero: none are sent.
    pub max_discard_sectors: u32,
    /// Largest WRITE_ZEROES, sectors; zero: none are sent.
    pub max_write_zeroes_sectors: u32,
    /// Ranges in one DISCARD; the driver accepts 1 only.
    pub max_discard_segments: u16,
    /// Zero.
    pub reserved0: u16,
}

/// `struct ublk_param_devt`: device numbers, known once the device is live.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamDevt {
    /// Of `/dev/ublkcN`.
    pub char_major: u32,
    /// Of `/dev/ublkcN`.
    pub char_minor: u32,
    /// Of `/dev/ublkbN`.
    pub disk_major: u32,
    /// Of `/dev/ublkbN`.
    pub disk_minor: u32,
}

/// `struct ublk_param_zoned`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamZoned {
    /// Zones open at once.
    pub max_open_zones: u32,
    /// Zones active at once.
    pub max_active_zones: u32,
    /// Largest ZONE_APPEND, sectors.
    pub max_zone_append_sectors: u32,
    /// Zero.
    pub reserved: [u8; 20],
}

/// `struct ublk_param_dma_align`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamDmaAlign {
    /// Alignment of requests' memory, as a mask: bytes minus one, below the page size.
    pub alignment: u32,
    /// Zero.
    pub pad: [u8; 4],
}

/// `struct ublk_param_segment`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamSegment {
    /// Segments do not cross these lines.
    pub seg_boundary_mask: u64,
    /// Largest segment, bytes; at least [`UBLK_MIN_SEGMENT_SIZE`].
    pub max_segment_size: u32,
    /// Segments in one request; never zero.
    pub max_segments: u16,
    /// Zero.
    pub pad: [u8; 2],
}

/// `struct ublk_param_integrity`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamIntegrity {
    /// `LBMD_PI_CAP_*`.
    pub flags: u32,
    /// Zero: no limit.
    pub max_integrity_segments: u16,
    /// log2 of the protected interval, bytes.
    pub interval_exp: u8,
    /// Bytes of metadata for each interval.
    pub metadata_size: u8,
    /// Where the protection information starts in it.
    pub pi_offset: u8,
    /// `LBMD_PI_CSUM_*`.
    pub csum_type: u8,
    /// Bytes of the application tag.
    pub tag_size: u8,
    /// Zero.
    pub pad: [u8; 5],
}

/// `struct ublk_params`: everything SET_PARAMS can say. Older kernels ignore the types they do not know.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Params {
    /// Size of this structure, bytes.
    pub len: u32,
    /// `UBLK_PARAM_TYPE_*` of the parts that are valid.
    pub types: u32,
    /// Always needed.
    pub basic: ParamBasic,
    /// DISCARD and WRITE_ZEROES.
    pub discard: ParamDiscard,
    /// Read-only.
    pub devt: ParamDevt,
    /// Zoned devices.
    pub zoned: ParamZoned,
    /// Memory alignment.
    pub dma: ParamDmaAlign,
    /// The compiler's padding, made visible so that no uninitialised byte reaches the kernel.
    pub hidden_pad: u32,
    /// Segment limits (Linux 6.15).
    pub seg: ParamSegment,
    /// Integrity data.
    pub integrity: ParamIntegrity,
}

const _: () = {
    assert!(size_of::<CtrlCmd>() == 32);
    assert!(offset_of!(CtrlCmd, queue_id) == 4);
    assert!(offset_of!(CtrlCmd, len) == 6);
    assert!(offset_of!(CtrlCmd, addr) == 8);
    assert!(offset_of!(CtrlCmd, data) == 16);
    assert!(offset_of!(CtrlCmd, dev_path_len) == 24);
    assert!(offset_of!(CtrlCmd, pad) == 26);
    assert!(offset_of!(CtrlCmd, reserved) == 28);

    assert!(size_of::<CtrlDevInfo>() == 64);
    assert!(offset_of!(CtrlDevInfo, queue_depth) == 2);
    assert!(offset_of!(CtrlDevInfo, state) == 4);
    assert!(offset_of!(CtrlDevInfo, io_desc_size) == 6);
    assert!(offset_of!(CtrlDevInfo, max_io_buf_bytes) == 8);
    assert!(offset_of!(CtrlDevInfo, dev_id) == 12);
    assert!(offset_of!(CtrlDevInfo, ublksrv_pid) == 16);
    assert!(offset_of!(CtrlDevInfo, flags) == 24);
    assert!(offset_of!(CtrlDevInfo, ublksrv_flags) == 32);
    assert!(offset_of!(CtrlDevInfo, owner_uid) == 40);
    assert!(offset_of!(CtrlDevInfo, owner_gid) == 44);
    assert!(offset_of!(CtrlDevInfo, reserved1) == 48);
    assert!(offset_of!(CtrlDevInfo, reserved2) == 56);

    assert!(size_of::<IoDesc>() == 24);
    assert!(offset_of!(IoDesc, nr_sectors) == 4);
    assert!(offset_of!(IoDesc, start_sector) == 8);
    assert!(offset_of!(IoDesc, addr) == 16);

    assert!(size_of::<IoCmd>() == 16);
    assert!(offset_of!(IoCmd, tag) == 2);
    assert!(offset_of!(IoCmd, result) == 4);
    assert!(offset_of!(IoCmd, addr) == 8);

    assert!(size_of::<ParamBasic>() == 32);
    assert!(offset_of!(ParamBasic, logical_bs_shift) == 4);
    assert!(offset_of!(ParamBasic, physical_bs_shift) == 5);
    assert!(offset_of!(ParamBasic, io_opt_shift) == 6);
    assert!(offset_of!(ParamBasic, io_min_shift) == 7);
    assert!(offset_of!(ParamBasic, max_sectors) == 8);
    assert!(offset_of!(ParamBasic, chunk_sectors) == 12);
    assert!(offset_of!(ParamBasic, dev_sectors) == 16);
    assert!(offset_of!(ParamBasic, virt_boundary_mask) == 24);

    assert!(size_of::<ParamDiscard>() == 20);
    assert!(offset_of!(ParamDiscard, discard_granularity) == 4);
    assert!(offset_of!(ParamDiscard, max_discard_sectors) == 8);
    assert!(offset_of!(ParamDiscard, max_write_zeroes_sectors) == 12);
    assert!(offset_of!(ParamDiscard, max_discard_segments) == 16);

    assert!(size_of::<ParamDevt>() == 16);
    assert!(size_of::<ParamZoned>() == 32);
    assert!(offset_of!(ParamZoned, max_zone_append_sectors) == 8);
    assert!(size_of::<ParamDmaAlign>() == 8);
    assert!(size_of::<ParamSegment>() == 16);
    assert!(offset_of!(ParamSegment, max_segment_size) == 8);
    assert!(offset_of!(ParamSegment, max_segments) == 12);
    assert!(size_of::<ParamIntegrity>() == 16);
    assert!(offset_of!(ParamIntegrity, max_integrity_segments) == 4);
    assert!(offset_of!(ParamIntegrity, interval_exp) == 6);
    assert!(offset_of!(ParamIntegrity, tag_size) == 10);

    assert!(size_of::<Params>() == 152);
    assert!(offset_of!(Params, basic) == 8);
    assert!(offset_of!(Params, discard) == 40);
    assert!(offset_of!(Params, devt) == 60);
    assert!(offset_of!(Params, zoned) == 76);
    assert!(offset_of!(Params, dma) == 108);
    assert!(offset_of!(Params, hidden_pad) == 116);
    assert!(offset_of!(Params, seg) == 120);
    assert!(offset_of!(Params, integrity) == 136);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_numbers_are_the_headers_ioctl_encoding() {
        // As a C program prints them that includes the header of Linux 7.3.4.
        let printed = [
            (UBLK_U_CMD_GET_QUEUE_AFFINITY, 0x8020_7501),
            (UBLK_U_CMD_GET_DEV_INFO, 0x8020_7502),
            (UBLK_U_CMD_ADD_DEV, 0xc020_7504),
            (UBLK_U_CMD_DEL_DEV, 0xc020_7505),
            (UBLK_U_CMD_START_DEV, 0xc020_7506),
            (UBLK_U_CMD_STOP_DEV, 0xc020_7507),
            (UBLK_U_CMD_SET_PARAMS, 0xc020_7508),
            (UBLK_U_CMD_GET_PARAMS, 0x8020_7509),
            (UBLK_U_CMD_START_USER_RECOVERY, 0xc020_7510),
            (UBLK_U_CMD_END_USER_RECOVERY, 0xc020_7511),
            (UBLK_U_CMD_GET_DEV_INFO2, 0x8020_7512),
            (UBLK_U_CMD_GET_FEATURES, 0x8020_7513),
            (UBLK_U_CMD_DEL_DEV_ASYNC, 0x8020_7514),
            (UBLK_U_CMD_UPDATE_SIZE, 0xc020_7515),
            (UBLK_U_CMD_QUIESCE_DEV, 0xc020_7516),
            (UBLK_U_CMD_TRY_STOP_DEV, 0xc020_7517),
            (UBLK_U_IO_FETCH_REQ, 0xc010_7520),
            (UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0xc010_7521),
            (UBLK_U_IO_REGISTER_IO_BUF, 0xc010_7523),
            (UBLK_U_IO_UNREGISTER_IO_BUF, 0xc010_7524),
        ];
        for (ours, theirs) in printed {
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn control_command_bytes_follow_the_structure() {
        let cmd = CtrlCmd {
            dev_id: 0x0403_0201,
            queue_id: 0x0605,
            len: 0x0807,
            addr: 0x100f_0e0d_0c0b_0a09,
            data: [0x1817_1615_1413_1211],
            dev_path_len: 0x1a19,
            pad: 0,
            reserved: 0,
        };
        let bytes = cmd.to_sqe_cmd();
        let expected: Vec<u8> = (1..=26).collect();
        assert_eq!(&bytes[..26], expected.as_slice());
        assert!(bytes[26..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn io_command_bytes_follow_the_structure() {
        let cmd = IoCmd { q_id: 0x0201, tag: 0x0403, result: 0x0807_0605, addr: 0x100f_0e0d_0c0b_0a09 };
        let expected: Vec<u8> = (1..=16).collect();
        assert_eq!(cmd.to_sqe_cmd().as_slice(), expected.as_slice());
    }

    #[test]
    fn descriptor_tells_operation_flags_and_bytes() {
        let desc = IoDesc {
            op_flags: u32::from(UBLK_IO_OP_WRITE_ZEROES) | UBLK_IO_F_NOUNMAP,
            nr_sectors: u32::MAX,
            start_sector: 1 << 40,
            addr: 0,
        };
        assert_eq!(desc.op(), IoOp::WriteZeroes);
        assert!(desc.no_unmap() && !desc.fua() && !desc.needs_buffer_registration());
        assert_eq!(desc.flags(), UBLK_IO_F_NOUNMAP);
        assert_eq!(desc.offset_bytes(), 1 << 49);
        assert_eq!(desc.len_bytes(), u64::from(u32::MAX) * 512);

        let desc = IoDesc { op_flags: u32::from(UBLK_IO_OP_WRITE) | UBLK_IO_F_FUA, ..IoDesc::default() };
        assert_eq!(desc.op(), IoOp::Write);
        assert!(desc.fua());

        let op_flags = u32::from(UBLK_IO_OP_FLUSH);
        let desc = IoDesc { op_flags, start_sector: u64::MAX, ..IoDesc::default() };
        assert_eq!((desc.offset_bytes(), desc.len_bytes()), (0, 0));
        assert_eq!(IoDesc { op_flags: 13, ..IoDesc::default() }.op(), IoOp::Other(13));
    }

    #[test]
    fn automatic_registration_always_asks_for_the_fallback() {
        assert_eq!(auto_buf_reg_sqe_addr(0), 0x1_0000);
        assert_eq!(auto_buf_reg_sqe_addr(u16::MAX), 0x1_ffff);
    }

    #[test]
    fn flag_names_cover_each_bit_once() {
        for (position, (flag, _)) in UBLK_F_NAMES.iter().enumerate() {
            assert_eq!(*flag, 1 << position);
        }
    }
}
