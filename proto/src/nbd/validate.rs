//! Every check of a request in one place, one errno each.
//!
//! The server's `session.rs` calls [`validate_request`] before anything of a request reaches a volume; what passes is
//! inside the export, aligned, allowed and of bounded size. What does not pass gets its errno in a reply and the
//! connection lives; a refused WRITE's payload is the caller's to drain. Source: NBD `doc/proto.md`.

use super::transmission::{Command, CommandFlags, NbdError, Request};
use super::{BlockSizes, TransmissionFlags};

/// What requests are checked against: fixed when the export was opened.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits {
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// What was announced.
    pub flags: TransmissionFlags,
    /// What was announced, or what holds without an announcement.
    pub block_sizes: BlockSizes,
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The command is not known or was not announced.
    #[error("command {0:?} is not offered")]
    Command(Command),
    /// A flag that this command does not take.
    #[error("flags {0:?} do not go with the command")]
    Flags(CommandFlags),
    /// The export is read-only.
    #[error("the export is read-only")]
    ReadOnly,
    /// A length of zero, or a FLUSH with an offset or a length.
    #[error("length or offset is not one the command takes")]
    Length,
    /// Offset or length is not a multiple of the minimum block size.
    #[error("offset or length is not a multiple of the minimum block size")]
    Unaligned,
    /// A payload above the maximum block size.
    #[error("the payload is larger than the maximum block size")]
    TooLarge,
    /// A read, trim or flush beyond the end.
    #[error("the range ends beyond the export")]
    OutOfRange,
    /// A write beyond the end.
    #[error("the write ends beyond the export")]
    NoSpace,
}

impl Refused {
    /// The errno for the reply.
    pub const fn error(self) -> NbdError {
        match self {
            Self::ReadOnly => NbdError::Eperm,
            Self::NoSpace => NbdError::Enospc,
            Self::TooLarge => NbdError::Eoverflow,
            Self::Command(_) | Self::Flags(_) | Self::Length | Self::Unaligned | Self::OutOfRange => {
                NbdError::Einval
            }
        }
    }
}

/// Checks a request against the export it is for.
///
/// # Errors
/// [`Refused`], by cause. `Disconnect` passes: it has no reply.
pub fn validate_request(request: &Request, limits: &RequestLimits) -> Result<(), Refused> {
    let Some((allowed_flags, writes)) = offered(request.command, limits.flags) else {
        return Err(Refused::Command(request.command));
    };
    if request.command == Command::Disconnect {
        return Ok(());
    }
    if !allowed_flags.contains(request.flags) {
        return Err(Refused::Flags(request.flags));
    }
    if writes && limits.flags.contains(TransmissionFlags::READ_ONLY) {
        return Err(Refused::ReadOnly);
    }
    if request.command == Command::Flush {
        let whole = request.offset_bytes == 0 && request.length_bytes == 0;
        return if whole { Ok(()) } else { Err(Refused::Length) };
    }
    validate_range(request, limits, writes)
}

/// The flags a command takes and whether it writes; `None` where it was not announced.
fn offered(command: Command, flags: TransmissionFlags) -> Option<(CommandFlags, bool)> {
    let fua =
        if flags.contains(TransmissionFlags::SEND_FUA) { CommandFlags::FUA } else { CommandFlags::NONE };
    let fast_zero = if flags.contains(TransmissionFlags::SEND_FAST_ZERO) {
        CommandFlags::FAST_ZERO
    } else {
        CommandFlags::NONE
    };
    let (announced_by, allowed, writes) = match command {
        // FUA means nothing to a read or a flush, but the specification lets clients set it on any command.
        Command::Read => (TransmissionFlags::HAS_FLAGS, fua, false),
        Command::Write => (TransmissionFlags::HAS_FLAGS, fua, true),
        Command::Disconnect => (TransmissionFlags::HAS_FLAGS, fua, false),
        Command::Flush => (TransmissionFlags::SEND_FLUSH, fua, false),
        Command::Trim => (TransmissionFlags::SEND_TRIM, fua, true),
        Command::WriteZeroes => {
            (TransmissionFlags::SEND_WRITE_ZEROES, fua.with(CommandFlags::NO_HOLE).with(fast_zero), true)
        }
        Command::Cache | Command::BlockStatus | Command::Unknown(_) => return None,
    };
    flags.contains(announced_by).then_some((allowed, writes))
}

fn validate_range(request: &Request, limits: &RequestLimits, writes: bool) -> Result<(), Refused> {
    let length_bytes = u64::from(request.length_bytes);
    if length_bytes == 0 {
        return Err(Refused::Length);
    }
    let has_payload = matches!(request.command, Command::Read | Command::Write);
    if has_payload && request.length_bytes > limits.block_sizes.maximum_bytes {
        return Err(Refused::TooLarge);
    }
    let inside = request.offset_bytes.checked_add(length_bytes).is_some_and(|end| end <= limits.size_bytes);
    if !inside {
        return Err(if writes && request.command != Command::Trim {
            Refused::NoSpace
        } else {
            Refused::OutOfRange
        });
    }
    let alignment_bytes = u64::from(limits.block_sizes.minimum_bytes);
    if !request.offset_bytes.is_multiple_of(alignment_bytes) || !length_bytes.is_multiple_of(alignment_bytes)
    {
        return Err(Refused::Unaligned);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: TransmissionFlags = TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::SEND_FLUSH)
        .with(TransmissionFlags::SEND_FUA)
        .with(TransmissionFlags::SEND_TRIM)
        .with(TransmissionFlags::SEND_WRITE_ZEROES);

    fn limits(flags: TransmissionFlags) -> RequestLimits {
        let block_sizes = BlockSizes { minimum_bytes: 512, preferred_bytes: 4096, maximum_bytes: 1 << 20 };
        RequestLimits { size_bytes: 1 << 30, flags, block_sizes }
    }

    fn request(command: Command, offset_bytes: u64, length_bytes: u32) -> Request {
        Request { flags: CommandFlags::NONE, command, cookie: 1, offset_bytes, length_bytes }
    }

    #[test]
    fn requests_inside_the_export_pass() {
        for command in [Command::Read, Command::Write, Command::Trim, Command::WriteZeroes] {
            assert_eq!(validate_request(&request(command, (1 << 30) - 512, 512), &limits(ALL)), Ok(()));
            assert_eq!(validate_request(&request(command, 0, 1 << 20), &limits(ALL)), Ok(()));
        }
        assert_eq!(validate_request(&request(Command::Flush, 0, 0), &limits(ALL)), Ok(()));
    }

    #[test]
    fn ranges_past_the_end_are_refused_even_when_they_overflow() {
        for offset in [1 << 30, (1 << 30) - 512, u64::MAX - 511] {
            let read = validate_request(&request(Command::Read, offset, 1024), &limits(ALL));
            assert_eq!(read, Err(Refused::OutOfRange));
            let write = validate_request(&request(Command::Write, offset, 1024), &limits(ALL));
            assert_eq!(write, Err(Refused::NoSpace));
            assert_eq!(write.unwrap_err().error(), NbdError::Enospc);
        }
    }

    #[test]
    fn unaligned_empty_and_oversized_requests_are_refused() {
        let check = |offset, length| validate_request(&request(Command::Write, offset, length), &limits(ALL));
        assert_eq!(check(1, 512), Err(Refused::Unaligned));
        assert_eq!(check(0, 513), Err(Refused::Unaligned));
        assert_eq!(check(0, 0), Err(Refused::Length));
        assert_eq!(check(0, (1 << 20) + 512), Err(Refused::TooLarge));
        let zeroes = request(Command::WriteZeroes, 0, 512 << 20);
        assert_eq!(validate_request(&zeroes, &limits(ALL)), Ok(()), "no payload, so no payload limit");
    }

    #[test]
    fn read_only_exports_refuse_every_write() {
        let limits = limits(ALL.with(TransmissionFlags::READ_ONLY));
        for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
            let refused = validate_request(&request(command, 0, 512), &limits).unwrap_err();
            assert_eq!(refused.error(), NbdError::Eperm);
        }
        assert_eq!(validate_request(&request(Command::Read, 0, 512), &limits), Ok(()));
    }

    #[test]
    fn what_was_not_announced_is_refused() {
        let bare = limits(TransmissionFlags::HAS_FLAGS);
        for command in
            [Command::Flush, Command::Trim, Command::WriteZeroes, Command::Cache, Command::Unknown(99)]
        {
            let length = if command == Command::Flush { 0 } else { 512 };
            let refused = validate_request(&request(command, 0, length), &bare).unwrap_err();
            assert_eq!(refused.error(), NbdError::Einval);
        }
        let mut fua = request(Command::Write, 0, 512);
        fua.flags = CommandFlags::FUA;
        assert_eq!(validate_request(&fua, &bare), Err(Refused::Flags(CommandFlags::FUA)));
        let mut no_hole = request(Command::Trim, 0, 512);
        no_hole.flags = CommandFlags::NO_HOLE;
        assert!(validate_request(&no_hole, &limits(ALL)).is_err());
    }
}
