//! The server's requests: any client behind an honest handshake.

use std::collections::BTreeMap;

use proto::nbd::replies::ReplyHead;
use proto::nbd::transmission::{Command, NbdError, Request};
use proto::nbd::{ExportInfo, TransmissionFlags};
use server::data::session::{Action, Session};
use server::ids::RequestSlot;

use crate::server_handshake::limits_of;
use crate::{export, pieces, split_first};

/// Everything the volume saw, and every cookie that was answered.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    begun: Vec<Request>,
    /// By cookie: requests that were begun and not yet answered, less those that were answered without being begun.
    replies: BTreeMap<u64, usize>,
    error: Option<String>,
}

/// The first byte says how the stream is cut (low bits), which headers were negotiated and whether the export is read-only
/// (high bits); the rest is the stream of requests.
///
/// # Panics
/// When a request that does not fit the export begins, the outcome depends on the cuts, or a request that was begun is
/// not answered exactly once.
pub fn server_requests(bytes: &[u8]) {
    let (control, stream) = split_first(bytes);
    assert_eq!(converse(stream, control, control), converse(stream, control, 0));
}

fn converse(stream: &[u8], control: u8, cut: u8) -> Outcome {
    let mut export = export();
    if control & 0x40 != 0 {
        export.flags = export.flags.with(TransmissionFlags::READ_ONLY);
    }
    let mut session = transmitting(control >> 4 & 3, &export);
    let mut outcome = Outcome::default();
    // As a connection does: what could not be parsed yet is kept, and comes again with more behind it.
    let mut held = Vec::new();
    for piece in pieces(stream, cut) {
        held.extend_from_slice(piece);
        match take(&mut session, &held, &export, &mut outcome) {
            Ok(used) => drop(held.drain(..used)),
            Err(error) => {
                outcome.error = Some(error);
                break;
            }
        }
    }
    session.end_input();
    answer(&mut session, &mut outcome);
    assert!(session.is_idle(), "a request has neither ended nor a reply");
    outcome
}

/// Parses what can be parsed of `held` and does at once what is asked; gives how much was used.
fn take(
    session: &mut Session,
    held: &[u8],
    export: &ExportInfo,
    outcome: &mut Outcome,
) -> Result<usize, String> {
    let mut used = 0;
    loop {
        if let Some((slot, missing_bytes)) = session.missing_payload() {
            let here_bytes = (held.len() - used).min(missing_bytes as usize);
            if here_bytes == 0 {
                return Ok(used);
            }
            used += here_bytes;
            if session.payload_received(here_bytes as u32) {
                begin(session, slot, export, outcome);
            }
            continue;
        }
        let (step, action) = session.advance(&held[used..]).map_err(|error| error.to_string())?;
        used += step;
        match action {
            Action::NeedsBytes | Action::End => return Ok(used),
            Action::NextBytes | Action::TakePayload(_) => {}
            Action::Paused => panic!("every request was answered at once, yet no slot is free"),
            Action::Begin(slot) => begin(session, slot, export, outcome),
            other => panic!("{other:?} in transmission"),
        }
        answer(session, outcome);
    }
}

/// What the volume would do, after it has checked what it must be able to rely on.
fn begin(session: &mut Session, slot: RequestSlot, export: &ExportInfo, outcome: &mut Outcome) {
    let request = *session.request(slot);
    let sizes = export.block_sizes.expect("the export has block sizes");
    let end = request.offset_bytes.checked_add(request.length_bytes);
    assert!(end.is_some_and(|end| end <= export.size_bytes), "beyond the export: {request:?}");
    assert_eq!(request.offset_bytes % u64::from(sizes.minimum_bytes), 0, "{request:?}");
    assert_eq!(request.length_bytes % u64::from(sizes.minimum_bytes), 0, "{request:?}");
    assert!(request.length_bytes > 0 || request.command == Command::Flush, "{request:?}");
    assert!(session.payload_bytes(slot) <= sizes.maximum_bytes, "{request:?}");
    let writes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
    assert!(!writes || !export.flags.contains(TransmissionFlags::READ_ONLY), "{request:?}");
    assert!(!matches!(request.command, Command::Unknown(_) | Command::Disconnect), "{request:?}");
    outcome.begun.push(request);
    match request.cookie & 3 {
        0 => session.fail(slot, NbdError::Eio, Some(request.offset_bytes)),
        1 => session.fail(slot, NbdError::Enospc, None),
        _ if request.command == Command::BlockStatus => {
            let query = session.status_query(slot);
            assert!(query.extents_max > 0 && query.length_bytes > 0);
            let payload_bytes = session.payload_bytes(slot).min(24);
            session.complete_status(slot, payload_bytes, payload_bytes);
        }
        _ => session.complete(slot),
    }
}

/// Sends every reply that is due.
fn answer(session: &mut Session, outcome: &mut Outcome) {
    loop {
        let mut head = ReplyHead::default();
        let Some(reply) = session.next_reply(&mut head) else { return };
        let request = *session.request(reply.slot);
        assert!(head.bytes().len() >= 16, "a reply of {} bytes", head.bytes().len());
        assert_eq!(head.bytes()[8..16], request.cookie.to_be_bytes(), "the reply is another's");
        *outcome.replies.entry(request.cookie).or_default() += 1;
        session.reply_sent(reply.slot);
    }
}

/// A session whose handshake is over, with compact headers, chunks, or extended headers and a metadata context.
fn transmitting(headers: u8, export: &ExportInfo) -> Session {
    let option = |number: u8, data: &[u8]| {
        [&b"IHAVEOPT\0\0\0"[..], &[number, 0, 0, 0, data.len() as u8], data].concat()
    };
    let mut stream = vec![0, 0, 0, 3];
    match headers {
        0 => {}
        1 => stream.extend(option(8, b"")),
        _ => stream.extend(option(11, b"")),
    }
    if headers > 0 {
        stream.extend(option(10, b"\0\0\0\x03vol\0\0\0\x01\0\0\0\x0fbase:allocation"));
    }
    stream.extend(option(7, b"\0\0\0\x03vol\0\0"));
    let mut session = Session::new();
    let mut rest = stream.as_slice();
    while !session.is_transmitting() {
        let (used, action) = session.advance(rest).expect("an honest handshake");
        rest = &rest[used..];
        assert!(matches!(action, Action::Open(_)), "{action:?} in an honest handshake");
        session.opened(Ok((export, limits_of(export)))).expect("an honest handshake");
    }
    session.take_output();
    session
}
