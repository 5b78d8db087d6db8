//! Every check of a request in one place, one errno each.
//!
//! The server's `server/src/data/session.rs` calls [`validate_payload`] as soon as it has a header, then [`validate_request`] before
//! anything of the request reaches a volume; what passes is inside the export, aligned, allowed and of bounded size. What
//! does not pass gets its errno in a reply and the connection lives; a refused request's payload is the caller's to drain.
//! All of it is pure: the request and what was announced in, a verdict out. Source: NBD `doc/proto.md`.

use super::block_status::{Contexts, StatusPayload};
use super::transmission::{Command, CommandFlags, NbdError, Request};
use super::{BlockSizes, HeaderStyle, Negotiated, TransmissionFlags};

/// Longest payload of a refused compact WRITE that is read and thrown away. Twice what is ever announced: a longer one is
/// not a request that went wrong but a stream that did, and ends the connection.
pub const DISCARDED_BYTES_MAX: u32 = 64 << 20;

/// What requests are checked against: fixed when the export was opened.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits {
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// What was announced.
    pub flags: TransmissionFlags,
    /// What was announced, or what holds without an announcement.
    pub block_sizes: BlockSizes,
    /// What the handshake has settled.
    pub negotiated: Negotiated,
}

impl RequestLimits {
    /// These limits for a client with whom this was settled: what is announced to it grows accordingly.
    #[must_use]
    pub fn for_client(self, negotiated: Negotiated) -> Self {
        Self { flags: negotiated.announce(self.flags), negotiated, ..self }
    }
}

/// A payload so long that taking it in would be a denial of service: close the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request carries {0} bytes of payload")]
pub struct PayloadTooLong(pub u64);

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
    /// A READ above the maximum block size, from a client that could take a reply in parts.
    #[error("more is to be read than the maximum block size")]
    ReadTooLarge,
    /// A read, trim or flush beyond the end.
    #[error("the range ends beyond the export")]
    OutOfRange,
    /// A write beyond the end.
    #[error("the write ends beyond the export")]
    NoSpace,
    /// A BLOCK_STATUS without a metadata context, or for one that was not selected.
    #[error("the metadata context was not selected for this export")]
    Context,
}

impl Refused {
    /// The errno for the reply.
    pub const fn error(self) -> NbdError {
        match self {
            Self::ReadOnly => NbdError::Eperm,
            Self::NoSpace => NbdError::Enospc,
            Self::ReadTooLarge => NbdError::Eoverflow,
            Self::Command(_)
            | Self::Flags(_)
            | Self::Length
            | Self::Unaligned
            | Self::TooLarge
            | Self::OutOfRange
            | Self::Context => NbdError::Einval,
        }
    }

    /// What people are told where a reply carries words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Command(_) => "this command is not offered",
            Self::Flags(_) => "these flags do not go with the command",
            Self::ReadOnly => "the export is read-only",
            Self::Length => "length or offset is not one the command takes",
            Self::Unaligned => "offset or length is not a multiple of the minimum block size",
            Self::TooLarge => "the payload is larger than the maximum block size",
            Self::ReadTooLarge => "more is to be read than the maximum block size",
            Self::OutOfRange => "the range ends beyond the export",
            Self::NoSpace => "the write ends beyond the export",
            Self::Context => "the metadata context was not selected for this export",
        }
    }
}

/// The length of the payload that follows a request's header, which has to be taken or thrown away.
///
/// # Errors
/// [`PayloadTooLong`]: more than [`DISCARDED_BYTES_MAX`], or with extended headers more than the maximum block size.
pub fn validate_payload(request: &Request, limits: &RequestLimits) -> Result<u32, PayloadTooLong> {
    let headers = limits.negotiated.headers;
    let bytes = request.payload_bytes(headers);
    let bytes_max = match headers {
        HeaderStyle::Simple | HeaderStyle::Structured => DISCARDED_BYTES_MAX,
        HeaderStyle::Extended => limits.block_sizes.maximum_bytes,
    };
    u32::try_from(bytes).ok().filter(|bytes| *bytes <= bytes_max).ok_or(PayloadTooLong(bytes))
}

/// A BLOCK_STATUS with its payload, as the one without a payload that means the same, and for which contexts; [`validate_request`] comes
/// next.
///
/// # Errors
/// [`Refused::Flags`]: such payloads were not announced. [`Refused::Context`]: a context that was not selected.
pub fn take_status_payload(
    request: &Request,
    payload: StatusPayload,
    limits: &RequestLimits,
) -> Result<(Request, Contexts), Refused> {
    if !limits.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD) {
        return Err(Refused::Flags(request.flags));
    }
    let contexts = payload.of_selected(limits.negotiated.contexts).ok_or(Refused::Context)?;
    let flags = CommandFlags(request.flags.0 & !CommandFlags::PAYLOAD_LEN.0);
    Ok((Request { flags, length_bytes: payload.effect_bytes, ..*request }, contexts))
}

/// Checks a request against the export it is for.
///
/// # Errors
/// [`Refused`], by cause. `Disconnect` passes: it has no reply.
pub fn validate_request(request: &Request, limits: &RequestLimits) -> Result<(), Refused> {
    if request.command == Command::Disconnect {
        return Ok(());
    }
    let Some(offer) = Offer::of(request.command, limits) else {
        return Err(match request.command {
            Command::BlockStatus => Refused::Context,
            other => Refused::Command(other),
        });
    };
    if !offer.allowed.contains(request.flags) {
        return Err(Refused::Flags(request.flags));
    }
    if offer.writes && limits.flags.contains(TransmissionFlags::READ_ONLY) {
        return Err(Refused::ReadOnly);
    }
    if request.command == Command::Flush {
        let whole = request.offset_bytes == 0 && request.length_bytes == 0;
        return if whole { Ok(()) } else { Err(Refused::Length) };
    }
    validate_range(request, limits, offer.writes)
}

/// What a command may look like.
struct Offer {
    allowed: CommandFlags,
    writes: bool,
}

impl Offer {
    /// `None`: the command was not announced.
    fn of(command: Command, limits: &RequestLimits) -> Option<Self> {
        let has = |flag| limits.flags.contains(flag);
        let when = |flag, allowed| if has(flag) { allowed } else { CommandFlags::NONE };
        // FUA means nothing to a read or a flush, but the specification lets clients set it on any command.
        let fua = when(TransmissionFlags::SEND_FUA, CommandFlags::FUA);
        let payload = match limits.negotiated.headers {
            HeaderStyle::Simple | HeaderStyle::Structured => CommandFlags::NONE,
            HeaderStyle::Extended => CommandFlags::PAYLOAD_LEN,
        };
        let none = CommandFlags::NONE;
        let (is_offered, allowed, writes) = match command {
            Command::Read => (true, when(TransmissionFlags::SEND_DF, CommandFlags::DF), false),
            Command::Write => (true, payload, true),
            Command::Disconnect => (true, none, false),
            Command::Flush => (has(TransmissionFlags::SEND_FLUSH), none, false),
            Command::Trim => (has(TransmissionFlags::SEND_TRIM), none, true),
            Command::Cache => (has(TransmissionFlags::SEND_CACHE), none, false),
            Command::WriteZeroes => {
                let fast = when(TransmissionFlags::SEND_FAST_ZERO, CommandFlags::FAST_ZERO);
                (has(TransmissionFlags::SEND_WRITE_ZEROES), CommandFlags::NO_HOLE.with(fast), true)
            }
            Command::BlockStatus => (!limits.negotiated.contexts.is_empty(), CommandFlags::REQ_ONE, false),
            Command::Unknown(_) => return None,
        };
        is_offered.then(|| Self { allowed: allowed.with(fua), writes })
    }
}

fn validate_range(request: &Request, limits: &RequestLimits, writes: bool) -> Result<(), Refused> {
    let length_bytes = request.length_bytes;
    if length_bytes == 0 {
        return Err(Refused::Length);
    }
    if length_bytes > u64::from(limits.block_sizes.maximum_bytes) {
        match request.command {
            Command::Write => return Err(Refused::TooLarge),
            Command::Read if limits.negotiated.headers == HeaderStyle::Simple => {
                return Err(Refused::TooLarge);
            }
            Command::Read => return Err(Refused::ReadTooLarge),
            _ => {} // No payload, so no payload limit.
        }
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
        .with(TransmissionFlags::SEND_WRITE_ZEROES)
        .with(TransmissionFlags::SEND_CACHE)
        .with(TransmissionFlags::SEND_FAST_ZERO);

    fn limits(flags: TransmissionFlags) -> RequestLimits {
        let block_sizes = BlockSizes { minimum_bytes: 512, preferred_bytes: 4096, maximum_bytes: 1 << 20 };
        RequestLimits { size_bytes: 1 << 30, flags, block_sizes, negotiated: Negotiated::default() }
    }

    fn negotiated(headers: HeaderStyle, allocation_context: bool) -> RequestLimits {
        let contexts = if allocation_context { Contexts::ALLOCATION } else { Contexts::NONE };
        limits(ALL).for_client(Negotiated { headers, contexts })
    }

    fn request(command: Command, offset_bytes: u64, length_bytes: u64) -> Request {
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
        assert_eq!(Refused::TooLarge.error(), NbdError::Einval);
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

    fn flagged(flags: CommandFlags, request: Request) -> Request {
        Request { flags, ..request }
    }

    #[test]
    fn each_flag_goes_with_its_command_alone() {
        let limits = negotiated(HeaderStyle::Structured, true);
        let own = [
            (CommandFlags::NO_HOLE, Command::WriteZeroes),
            (CommandFlags::FAST_ZERO, Command::WriteZeroes),
            (CommandFlags::DF, Command::Read),
            (CommandFlags::REQ_ONE, Command::BlockStatus),
        ];
        let commands = [
            Command::Read,
            Command::Write,
            Command::Trim,
            Command::Cache,
            Command::WriteZeroes,
            Command::BlockStatus,
        ];
        for command in commands {
            let plain = request(command, 0, 4096);
            assert_eq!(validate_request(&flagged(CommandFlags::FUA, plain), &limits), Ok(()), "{command:?}");
            for (flag, owner) in own {
                let verdict = validate_request(&flagged(flag, plain), &limits);
                let expected = if command == owner { Ok(()) } else { Err(Refused::Flags(flag)) };
                assert_eq!(verdict, expected, "{flag:?} on {command:?}");
            }
            for unknown in [CommandFlags::PAYLOAD_LEN, CommandFlags(1 << 6), CommandFlags(1 << 15)] {
                let refused = validate_request(&flagged(unknown, plain), &limits).unwrap_err();
                assert_eq!(refused.error(), NbdError::Einval, "{unknown:?} on {command:?}");
            }
        }
    }

    #[test]
    fn df_is_offered_only_where_replies_come_in_chunks() {
        let df = flagged(CommandFlags::DF, request(Command::Read, 0, 65536));
        assert!(validate_request(&df, &negotiated(HeaderStyle::Simple, false)).is_err());
        assert_eq!(validate_request(&df, &negotiated(HeaderStyle::Structured, false)), Ok(()));
        assert_eq!(validate_request(&df, &negotiated(HeaderStyle::Extended, false)), Ok(()));
        for headers in [HeaderStyle::Structured, HeaderStyle::Extended] {
            let large = request(Command::Read, 0, (1 << 20) + 512);
            let refused = validate_request(&large, &negotiated(headers, false)).unwrap_err();
            assert_eq!(refused.error(), NbdError::Eoverflow);
        }
    }

    #[test]
    fn block_status_needs_a_selected_context() {
        let status = request(Command::BlockStatus, 0, 4096);
        let without = validate_request(&status, &negotiated(HeaderStyle::Structured, false)).unwrap_err();
        assert_eq!((without, without.error()), (Refused::Context, NbdError::Einval));
        let limits = negotiated(HeaderStyle::Structured, true);
        assert_eq!(validate_request(&status, &limits), Ok(()));
        let beyond = validate_request(&request(Command::BlockStatus, 1 << 30, 4096), &limits).unwrap_err();
        assert_eq!(beyond.error(), NbdError::Einval);
    }

    #[test]
    fn effect_lengths_have_64_bits_with_extended_headers() {
        let mut limits = negotiated(HeaderStyle::Extended, true);
        limits.size_bytes = 1 << 50;
        for command in [Command::Trim, Command::WriteZeroes, Command::Cache, Command::BlockStatus] {
            assert_eq!(validate_request(&request(command, 4096, 1 << 49), &limits), Ok(()), "{command:?}");
            assert!(validate_request(&request(command, 4096, 1 << 50), &limits).is_err());
            assert!(validate_request(&request(command, u64::MAX - 511, 512), &limits).is_err());
        }
        assert!(validate_request(&request(Command::Read, 0, 1 << 40), &limits).is_err());
    }

    #[test]
    fn extended_writes_may_say_that_they_have_a_payload_and_others_do_not() {
        let limits = negotiated(HeaderStyle::Extended, true);
        let write = request(Command::Write, 0, 4096);
        assert_eq!(validate_request(&write, &limits), Ok(()));
        assert_eq!(validate_payload(&write, &limits), Ok(4096));
        let write = flagged(CommandFlags::PAYLOAD_LEN, write);
        assert_eq!(validate_request(&write, &limits), Ok(()));
        assert_eq!(validate_payload(&write, &limits), Ok(4096));
        for command in
            [Command::Read, Command::Trim, Command::WriteZeroes, Command::Cache, Command::BlockStatus]
        {
            let odd = flagged(CommandFlags::PAYLOAD_LEN, request(command, 0, 4096));
            assert!(validate_request(&odd, &limits).is_err(), "{command:?}");
            assert_eq!(validate_payload(&odd, &limits), Ok(4096), "it is thrown away");
        }
    }

    #[test]
    fn payloads_that_nobody_would_send_end_the_connection() {
        let write = |length| flagged(CommandFlags::PAYLOAD_LEN, request(Command::Write, 0, length));
        let extended = negotiated(HeaderStyle::Extended, false);
        assert_eq!(validate_payload(&write(1 << 20), &extended), Ok(1 << 20));
        assert_eq!(validate_payload(&write((1 << 20) + 1), &extended), Err(PayloadTooLong((1 << 20) + 1)));
        assert_eq!(validate_payload(&write(u64::MAX), &extended), Err(PayloadTooLong(u64::MAX)));
        let compact = negotiated(HeaderStyle::Structured, false);
        assert_eq!(validate_payload(&write(32 << 20), &compact), Ok(32 << 20), "refused, but not an attack");
        assert!(validate_payload(&write(u64::from(DISCARDED_BYTES_MAX) + 1), &compact).is_err());
    }

    #[test]
    fn a_status_payload_names_the_selected_context_and_the_effect_length() {
        let limits = negotiated(HeaderStyle::Extended, true);
        let flags = CommandFlags::PAYLOAD_LEN.with(CommandFlags::REQ_ONE);
        let status = flagged(flags, request(Command::BlockStatus, 4096, 12));
        let payload = |id: u32| {
            let wire = [&(1u64 << 20).to_be_bytes()[..], &id.to_be_bytes()].concat();
            StatusPayload::decode(&wire).unwrap()
        };
        let (taken, contexts) = take_status_payload(&status, payload(1), &limits).unwrap();
        assert_eq!((taken.length_bytes, taken.flags), (1 << 20, CommandFlags::REQ_ONE));
        assert_eq!(contexts, Contexts::ALLOCATION);
        assert_eq!(validate_request(&taken, &limits), Ok(()));
        assert_eq!(take_status_payload(&status, payload(99), &limits), Err(Refused::Context));
        assert_eq!(take_status_payload(&status, payload(2), &limits), Err(Refused::Context), "not selected");
        let unselected = negotiated(HeaderStyle::Extended, false);
        assert!(take_status_payload(&status, payload(1), &unselected).is_err());
    }

    #[test]
    fn every_refusal_has_words_that_fit_into_a_reply() {
        let all = [
            Refused::Command(Command::Trim),
            Refused::Flags(CommandFlags::DF),
            Refused::ReadOnly,
            Refused::Length,
            Refused::Unaligned,
            Refused::TooLarge,
            Refused::ReadTooLarge,
            Refused::OutOfRange,
            Refused::NoSpace,
            Refused::Context,
        ];
        for refused in all {
            let words = refused.words();
            assert!(!words.is_empty() && words.len() <= super::super::replies::ERROR_WORDS_BYTES_MAX);
        }
    }
}
