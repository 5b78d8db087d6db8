//! What a block request asks of the server: the translation from ublk's words to NBD's, and of how it went.
//!
//! Pure functions, called by `run.rs` and `core.rs` for each request. Sources: `ublk_cmd.h`, Linux 7.3; NBD `doc/proto.md`.

use proto::nbd::transmission::{Command, CommandFlags};
use ublk_core::{IoDesc, IoOp};

/// What the server is asked for; the cookie is the connection's to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRequest {
    /// What to do.
    pub command: Command,
    /// Flags of the command.
    pub flags: CommandFlags,
    /// First byte concerned.
    pub offset_bytes: u64,
    /// How many bytes are concerned; a READ's and a WRITE's is that of the tag's pages.
    pub length_bytes: u32,
}

impl BlockRequest {
    /// Everything that was answered before to stable storage.
    pub const FLUSH: Self =
        Self { command: Command::Flush, flags: CommandFlags::NONE, offset_bytes: 0, length_bytes: 0 };
}

/// What a block request asks of the server; a positive errno where there is none.
///
/// # Errors
/// `EOPNOTSUPP`: an operation that the device did not announce. `EINVAL`: a length that NBD cannot say.
pub fn from_descriptor(descriptor: &IoDesc) -> Result<BlockRequest, i32> {
    let fua = if descriptor.fua() { CommandFlags::FUA } else { CommandFlags::NONE };
    let (command, flags) = match descriptor.op() {
        IoOp::Read => (Command::Read, CommandFlags::NONE),
        IoOp::Write => (Command::Write, fua),
        IoOp::Flush => return Ok(BlockRequest::FLUSH),
        IoOp::Discard => (Command::Trim, fua),
        IoOp::WriteZeroes if descriptor.no_unmap() => (Command::WriteZeroes, fua.with(CommandFlags::NO_HOLE)),
        IoOp::WriteZeroes => (Command::WriteZeroes, fua),
        IoOp::Other(_) => return Err(libc::EOPNOTSUPP),
    };
    let length_bytes = u32::try_from(descriptor.len_bytes()).map_err(|_| libc::EINVAL)?;
    Ok(BlockRequest { command, flags, offset_bytes: descriptor.offset_bytes(), length_bytes })
}

/// What COMMIT says of a request that ended: the full length of one with data, 0 for one without, or a negative errno.
pub fn commit_result(request: &BlockRequest, result: Result<(), i32>) -> i32 {
    match (result, request.command) {
        (Err(errno), _) => -errno,
        (Ok(()), Command::Read | Command::Write) => request.length_bytes as i32,
        (Ok(()), _) => 0,
    }
}

#[cfg(test)]
mod tests {
    use ublk_core::abi::{
        UBLK_IO_F_FUA, UBLK_IO_F_NOUNMAP, UBLK_IO_OP_DISCARD, UBLK_IO_OP_FLUSH, UBLK_IO_OP_READ,
        UBLK_IO_OP_WRITE, UBLK_IO_OP_WRITE_ZEROES,
    };

    use super::*;

    fn descriptor(op: u8, flags: u32) -> IoDesc {
        IoDesc { op_flags: u32::from(op) | flags, nr_sectors: 8, start_sector: 16, addr: 0 }
    }

    #[test]
    fn block_requests_become_nbd_operations() {
        let cases = [
            (descriptor(UBLK_IO_OP_READ, 0), Command::Read, CommandFlags::NONE),
            (descriptor(UBLK_IO_OP_WRITE, 0), Command::Write, CommandFlags::NONE),
            (descriptor(UBLK_IO_OP_WRITE, UBLK_IO_F_FUA), Command::Write, CommandFlags::FUA),
            (descriptor(UBLK_IO_OP_DISCARD, 0), Command::Trim, CommandFlags::NONE),
            (descriptor(UBLK_IO_OP_WRITE_ZEROES, 0), Command::WriteZeroes, CommandFlags::NONE),
            (
                descriptor(UBLK_IO_OP_WRITE_ZEROES, UBLK_IO_F_NOUNMAP),
                Command::WriteZeroes,
                CommandFlags::NO_HOLE,
            ),
        ];
        for (descriptor, command, flags) in cases {
            let expected = BlockRequest { command, flags, offset_bytes: 8192, length_bytes: 4096 };
            assert_eq!(from_descriptor(&descriptor), Ok(expected));
        }
        let flush = from_descriptor(&descriptor(UBLK_IO_OP_FLUSH, 0)).unwrap();
        assert_eq!((flush.command, flush.offset_bytes, flush.length_bytes), (Command::Flush, 0, 0));
        assert_eq!(from_descriptor(&descriptor(200, 0)), Err(libc::EOPNOTSUPP));
    }

    #[test]
    fn a_commit_says_the_full_length_or_an_error() {
        let read = from_descriptor(&descriptor(UBLK_IO_OP_READ, 0)).unwrap();
        assert_eq!(commit_result(&read, Ok(())), 4096);
        assert_eq!(commit_result(&read, Err(28)), -28);
        let trim = from_descriptor(&descriptor(UBLK_IO_OP_DISCARD, 0)).unwrap();
        assert_eq!(commit_result(&trim, Ok(())), 0);
    }
}
