//! The server's handshake against bytes written by hand from the specification.
//!
//! Every option and reply here is spelled out as it goes on the wire; the machine under test is fed those and nothing else.

use super::*;
use crate::nbd::block_status::Contexts;

fn begun() -> ServerHandshake {
    let mut out = Vec::new();
    let mut server = ServerHandshake::new(&mut out);
    assert_eq!(out.len(), 18);
    assert_eq!(server.handle_bytes(&[0, 0, 0, 3], &mut out), Ok(None));
    server
}

fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn only_reply(out: &[u8]) -> u32 {
    assert_eq!(be_u64(out, 0), OPTION_REPLY_MAGIC);
    assert_eq!(out.len(), 20 + be_u32(out, 16) as usize, "one reply");
    be_u32(out, 12)
}

#[test]
fn unknown_options_are_refused_and_the_session_goes_on() {
    for number in [0, 77, u32::MAX] {
        let (mut server, mut out) = (begun(), Vec::new());
        assert_eq!(server.handle_bytes(&option_bytes(number, b"data"), &mut out), Ok(None));
        assert_eq!(only_reply(&out), reply::ERR_UNSUP);
        out.clear();
        let event = server.handle_bytes(&option_bytes(option::ABORT, &[]), &mut out);
        assert_eq!(event, Ok(Some(Event::Abort)));
        assert_eq!(only_reply(&out), reply::ACK);
    }
}

#[test]
fn malformed_go_is_refused_and_the_session_goes_on() {
    let cases: [&[u8]; 7] = [
        b"",
        b"\0\0\0\x05ab",
        b"\xff\xff\xff\xffab",
        b"\0\0\0\x01a",
        b"\0\0\0\x01a\0\x02\0\x03",
        b"\0\0\0\x01\xff\0\0",
        b"\0\0\0\x01\0\0\0",
    ];
    for data in cases {
        let (mut server, mut out) = (begun(), Vec::new());
        assert_eq!(server.handle_bytes(&option_bytes(option::GO, data), &mut out), Ok(None), "{data:?}");
        assert_eq!(only_reply(&out), reply::ERR_INVALID, "{data:?}");
    }
}

#[test]
fn hostile_bytes_end_the_session() {
    let mut out = Vec::new();
    assert!(matches!(
        ServerHandshake::new(&mut out).handle_bytes(&[0xff; 4], &mut out),
        Err(ServerHandshakeError::ClientFlags(_))
    ));
    assert!(matches!(begun().handle_bytes(&[7; 16], &mut out), Err(ServerHandshakeError::OptionMagic(_))));
    let mut long = option_bytes(option::GO, &[]);
    long[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(matches!(begun().handle_bytes(&long, &mut out), Err(ServerHandshakeError::OptionTooLong(_))));
    let many: Vec<u8> = (0..=OPTIONS_MAX).flat_map(|_| option_bytes(77, &[])).collect();
    assert_eq!(begun().handle_bytes(&many, &mut out), Err(ServerHandshakeError::TooManyOptions(OPTIONS_MAX)));
}

#[test]
fn export_name_answers_with_zeroes_unless_told_not_to() {
    let export =
        ExportInfo { size_bytes: 5, flags: Default::default(), block_sizes: None, description: None };
    for (client_flags, answer_bytes) in [(3u8, 10), (1, 134), (0, 134)] {
        let mut out = Vec::new();
        let mut server = ServerHandshake::new(&mut out);
        out.clear();
        let mut input = vec![0, 0, 0, client_flags];
        input.extend(option_bytes(option::EXPORT_NAME, b"a"));
        input.extend(b"first request");
        let event = server.handle_bytes(&input, &mut out).unwrap();
        assert_eq!(event, Some(Event::Open(Open { kind: OpenKind::ExportName, name: "a".into() })));
        assert_eq!(server.answer_open(Ok(&export), &mut out), Ok(true));
        assert_eq!(out.len(), answer_bytes);
        assert_eq!(server.leftover(), b"first request");
    }
}

#[test]
fn info_tells_and_does_not_open() {
    let export =
        ExportInfo { size_bytes: 5, flags: Default::default(), block_sizes: None, description: None };
    let (mut server, mut out) = (begun(), Vec::new());
    let event = server.handle_bytes(&option_bytes(option::INFO, b"\0\0\0\x01a\0\0"), &mut out).unwrap();
    assert_eq!(event, Some(Event::Open(Open { kind: OpenKind::Info, name: "a".into() })));
    assert_eq!(server.answer_open(Ok(&export), &mut out), Ok(false));
    assert!(!server.is_done());
}

#[test]
fn list_shows_what_the_owner_gives() {
    let (mut server, mut out) = (begun(), Vec::new());
    let event = server.handle_bytes(&option_bytes(option::LIST, &[]), &mut out).unwrap();
    assert_eq!(event, Some(Event::List));
    let exports = [("a", ""), ("bc", "for people")];
    let exports = exports.map(|(name, text)| ListedExport { name: name.into(), description: text.into() });
    server.answer_list(&exports, &mut out);
    let expected = [
        reply_bytes(option::LIST, reply::SERVER, b"\0\0\0\x01a"),
        reply_bytes(option::LIST, reply::SERVER, b"\0\0\0\x02bcfor people"),
        reply_bytes(option::LIST, reply::ACK, b""),
    ];
    assert_eq!(out, expected.concat());
    out.clear();
    assert_eq!(server.handle_bytes(&option_bytes(option::LIST, b"x"), &mut out), Ok(None));
    assert_eq!(only_reply(&out), reply::ERR_INVALID);
}

fn reply_bytes(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = [0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9];
    let numbers = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
    [&magic[..], &numbers, data].concat()
}

fn export() -> ExportInfo {
    let flags = TransmissionFlags::HAS_FLAGS;
    ExportInfo { size_bytes: 5, flags, block_sizes: None, description: None }
}

/// Sends an option that asks for no export; gives the replies.
fn answer(server: &mut ServerHandshake, number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    assert_eq!(server.handle_bytes(&option_bytes(number, data), &mut out), Ok(None));
    out
}

/// Sends an option that asks for an export, which is there unless it is called "none"; gives the replies.
fn ask(server: &mut ServerHandshake, number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let event = server.handle_bytes(&option_bytes(number, data), &mut out).unwrap();
    let Some(Event::Open(open)) = event else { panic!("{event:?}") };
    let export = export();
    let found = if open.name == "none" { Err(Refusal::unknown("no")) } else { Ok(&export) };
    server.answer_open(found, &mut out).unwrap();
    out
}

const GO_A: &[u8] = b"\0\0\0\x01a\0\0";
const ALLOCATION_OF_A: &[u8] = b"\0\0\0\x01a\0\0\0\x01\0\0\0\x0fbase:allocation";

fn announced(out: &[u8]) -> TransmissionFlags {
    assert_eq!(be_u32(out, 12), reply::INFO);
    TransmissionFlags(be_u16(out, 30))
}

#[test]
fn structured_replies_are_negotiated_and_announce_df() {
    let mut server = begun();
    let flags = announced(&ask(&mut server, option::INFO, GO_A));
    assert!(!flags.contains(TransmissionFlags::SEND_DF));
    let with_data = answer(&mut server, option::STRUCTURED_REPLY, b"x");
    assert_eq!(only_reply(&with_data), reply::ERR_INVALID);
    let acked = answer(&mut server, option::STRUCTURED_REPLY, b"");
    assert_eq!(acked, reply_bytes(option::STRUCTURED_REPLY, reply::ACK, b""));
    let info = ask(&mut server, option::INFO, GO_A);
    assert!(announced(&info).contains(TransmissionFlags::SEND_DF));
    let go = ask(&mut server, option::GO, GO_A);
    assert_eq!(announced(&go), announced(&info));
    assert_eq!(
        server.negotiated(),
        Negotiated { headers: HeaderStyle::Structured, contexts: Contexts::NONE }
    );
}

#[test]
fn extended_headers_win_over_structured_replies_and_export_name() {
    let mut server = begun();
    answer(&mut server, option::STRUCTURED_REPLY, b"");
    assert_eq!(only_reply(&answer(&mut server, option::EXTENDED_HEADERS, b"x")), reply::ERR_INVALID);
    assert_eq!(only_reply(&answer(&mut server, option::EXTENDED_HEADERS, b"")), reply::ACK);
    let back = answer(&mut server, option::STRUCTURED_REPLY, b"");
    assert_eq!(only_reply(&back), reply::ERR_EXT_HEADER_REQD);
    let old_way = server.handle_bytes(&option_bytes(option::EXPORT_NAME, b"a"), &mut Vec::new());
    assert!(matches!(old_way, Err(ServerHandshakeError::ExportNameRefused(_))));
}

#[test]
fn block_status_payloads_are_announced_only_with_extended_headers_and_a_context() {
    for (headers, selects, expected) in [
        (option::STRUCTURED_REPLY, true, false),
        (option::EXTENDED_HEADERS, false, false),
        (option::EXTENDED_HEADERS, true, true),
    ] {
        let mut server = begun();
        answer(&mut server, headers, b"");
        if selects {
            ask(&mut server, option::SET_META_CONTEXT, ALLOCATION_OF_A);
        }
        let flags = announced(&ask(&mut server, option::GO, GO_A));
        assert_eq!(flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD), expected);
        assert!(flags.contains(TransmissionFlags::SEND_DF));
    }
}

#[test]
fn contexts_need_replies_in_chunks() {
    for number in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let mut server = begun();
        let refused = answer(&mut server, number, ALLOCATION_OF_A);
        assert_eq!(only_reply(&refused), reply::ERR_INVALID);
        assert!(!announced(&ask(&mut server, option::GO, GO_A)).contains(TransmissionFlags::SEND_DF));
        assert!(server.negotiated().contexts.is_empty());
    }
}

#[test]
fn contexts_are_listed_without_an_id_and_selected_with_one() {
    let mut server = begun();
    answer(&mut server, option::STRUCTURED_REPLY, b"");
    let listed = ask(&mut server, option::LIST_META_CONTEXT, b"\0\0\0\x01a\0\0\0\0");
    let number = option::LIST_META_CONTEXT;
    let expected = [
        reply_bytes(number, reply::META_CONTEXT, b"\0\0\0\0base:allocation"),
        reply_bytes(number, reply::ACK, b""),
    ];
    assert_eq!(listed, expected.concat());
    let number = option::SET_META_CONTEXT;
    let expected = [
        reply_bytes(number, reply::META_CONTEXT, b"\0\0\0\x01base:allocation"),
        reply_bytes(number, reply::ACK, b""),
    ];
    assert_eq!(ask(&mut server, number, ALLOCATION_OF_A), expected.concat());
    ask(&mut server, option::GO, GO_A);
    assert_eq!(server.negotiated().contexts, Contexts::ALLOCATION);
}

/// Of the export a, with these queries.
fn contexts_of_a(queries: &[&str]) -> Vec<u8> {
    let mut data = b"\0\0\0\x01a".to_vec();
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}

#[test]
fn bitmaps_are_those_that_the_export_has_and_few_at_once() {
    let offered = ["mon", "tue", "wed", "thu"].map(str::to_owned);
    let ask_offered = |server: &mut ServerHandshake, number, queries: &[&str]| {
        server.offer_bitmaps(offered.to_vec());
        ask(server, number, &contexts_of_a(queries))
    };
    let mut server = begun();
    answer(&mut server, option::STRUCTURED_REPLY, b"");
    let (list, set) = (option::LIST_META_CONTEXT, option::SET_META_CONTEXT);
    let listed = ask_offered(&mut server, list, &["qemu:"]);
    let names = offered.iter().map(|name| [b"\0\0\0\0qemu:dirty-bitmap:", name.as_bytes()].concat());
    let mut expected: Vec<u8> =
        names.flat_map(|data| reply_bytes(list, reply::META_CONTEXT, &data)).collect();
    expected.extend(reply_bytes(list, reply::ACK, b""));
    assert_eq!(listed, expected);
    let queries = offered.each_ref().map(|name| format!("qemu:dirty-bitmap:{name}"));
    let queries = queries.each_ref().map(String::as_str);
    assert_eq!(only_reply(&ask_offered(&mut server, set, &queries)), reply::ERR_TOO_BIG);
    let selected =
        ask_offered(&mut server, set, &[queries[2], "base:allocation", queries[1], "qemu:dirty-bitmap:x"]);
    let expected = [
        reply_bytes(set, reply::META_CONTEXT, b"\0\0\0\x01base:allocation"),
        reply_bytes(set, reply::META_CONTEXT, b"\0\0\0\x02qemu:dirty-bitmap:tue"),
        reply_bytes(set, reply::META_CONTEXT, b"\0\0\0\x03qemu:dirty-bitmap:wed"),
        reply_bytes(set, reply::ACK, b""),
    ];
    assert_eq!(selected, expected.concat());
    assert!(server.selected_bitmaps().is_empty(), "nothing is open yet");
    ask(&mut server, option::GO, GO_A);
    assert_eq!(server.negotiated().contexts, Contexts::ALLOCATION.with_bitmaps(2));
    assert_eq!(server.selected_bitmaps(), ["tue", "wed"]);
}

#[test]
fn bitmaps_that_were_not_offered_again_are_not_those_of_another_export() {
    let mut server = begun();
    answer(&mut server, option::STRUCTURED_REPLY, b"");
    server.offer_bitmaps(vec!["mon".to_owned()]);
    ask(&mut server, option::SET_META_CONTEXT, &contexts_of_a(&["qemu:dirty-bitmap:mon"]));
    ask(&mut server, option::GO, b"\0\0\0\x01b\0\0");
    assert!(server.negotiated().contexts.is_empty() && server.selected_bitmaps().is_empty());
}

#[test]
fn a_context_counts_for_the_export_it_was_selected_for() {
    let selects_none: &[u8] = b"\0\0\0\x01a\0\0\0\0";
    let malformed: &[u8] = b"\0\0\0\x01a\0\0\0\x01";
    let of_none: &[u8] = b"\0\0\0\x04none\0\0\0\x01\0\0\0\x0fbase:allocation";
    let of_b: &[u8] = b"\0\0\0\x01b\0\0\0\x01\0\0\0\x0fbase:allocation";
    for replaced_by in [selects_none, malformed, of_none, of_b] {
        let mut server = begun();
        answer(&mut server, option::STRUCTURED_REPLY, b"");
        ask(&mut server, option::SET_META_CONTEXT, ALLOCATION_OF_A);
        let mut out = Vec::new();
        let event = server.handle_bytes(&option_bytes(option::SET_META_CONTEXT, replaced_by), &mut out);
        if let Some(Event::Open(open)) = event.unwrap() {
            let export = export();
            let found = if open.name == "none" { Err(Refusal::unknown("no")) } else { Ok(&export) };
            server.answer_open(found, &mut out).unwrap();
        }
        ask(&mut server, option::GO, GO_A);
        assert!(server.negotiated().contexts.is_empty(), "{replaced_by:?}");
    }
}

#[test]
fn unknown_exports_have_no_contexts() {
    let mut server = begun();
    answer(&mut server, option::STRUCTURED_REPLY, b"");
    let listed = ask(&mut server, option::LIST_META_CONTEXT, b"\0\0\0\x04none\0\0\0\0");
    assert_eq!(only_reply(&listed), reply::ERR_UNKNOWN);
}

#[test]
fn owners_with_simple_replies_know_nothing_else() {
    for number in [
        option::STRUCTURED_REPLY,
        option::EXTENDED_HEADERS,
        option::LIST_META_CONTEXT,
        option::SET_META_CONTEXT,
    ] {
        let mut server = ServerHandshake::with_simple_replies_only(&mut Vec::new());
        server.handle_bytes(&[0, 0, 0, 3], &mut Vec::new()).unwrap();
        assert_eq!(only_reply(&answer(&mut server, number, b"")), reply::ERR_UNSUP);
    }
}

#[test]
fn the_debug_form_tells_no_name() {
    let mut server = begun();
    server.handle_bytes(&option_bytes(option::GO, b"\0\0\0\x06secret\0\0")[..26], &mut Vec::new()).unwrap();
    assert!(!format!("{server:?}").contains("115, 101"), "the bytes of a name");
}

fn with_tls(tls: TlsState) -> ServerHandshake {
    begun().with_tls(tls)
}

const EVERY_OTHER_OPTION: [u32; 8] = [
    option::LIST,
    option::INFO,
    option::GO,
    option::STRUCTURED_REPLY,
    option::LIST_META_CONTEXT,
    option::SET_META_CONTEXT,
    option::EXTENDED_HEADERS,
    u32::MAX,
];

#[test]
fn starttls_is_refused_where_there_is_no_tls() {
    let (mut server, mut out) = (with_tls(TlsState::Off), Vec::new());
    assert_eq!(server.handle_bytes(&option_bytes(option::STARTTLS, &[]), &mut out), Ok(None));
    assert_eq!(only_reply(&out), reply::ERR_POLICY);
}

#[test]
fn starttls_is_acknowledged_and_nothing_from_before_counts() {
    for tls in [TlsState::Allowed, TlsState::Required] {
        let (mut server, mut out) = (with_tls(tls), Vec::new());
        let event = server.handle_bytes(&option_bytes(option::STARTTLS, &[]), &mut out);
        assert_eq!(event, Ok(Some(Event::StartTls)));
        assert_eq!(only_reply(&out), reply::ACK);
        server.tls_started();
        assert!(server.leftover().is_empty());
        // The client's flags are not repeated; options go on, among them no second STARTTLS.
        out.clear();
        assert_eq!(server.handle_bytes(&option_bytes(option::STARTTLS, &[]), &mut out), Ok(None));
        assert_eq!(only_reply(&out), reply::ERR_INVALID);
        let event = server.handle_bytes(&option_bytes(option::LIST, &[]), &mut out);
        assert_eq!(event, Ok(Some(Event::List)));
    }
}

#[test]
fn starttls_with_data_is_invalid() {
    let (mut server, mut out) = (with_tls(TlsState::Required), Vec::new());
    assert_eq!(server.handle_bytes(&option_bytes(option::STARTTLS, b"x"), &mut out), Ok(None));
    assert_eq!(only_reply(&out), reply::ERR_INVALID);
}

#[test]
fn whatever_comes_behind_starttls_ends_the_session() {
    for behind in [&b"\x16\x03\x01"[..], &option_bytes(option::LIST, &[]), b"\0"] {
        let (mut server, mut out) = (with_tls(TlsState::Allowed), Vec::new());
        let bytes = [&option_bytes(option::STARTTLS, &[]), behind].concat();
        let injected = server.handle_bytes(&bytes, &mut out);
        assert_eq!(injected, Err(ServerHandshakeError::BytesBehindStartTls(behind.len())));
        assert!(out.is_empty(), "nothing is acknowledged");
    }
}

#[test]
fn where_tls_is_required_nothing_else_is_answered_before() {
    for number in EVERY_OTHER_OPTION {
        let (mut server, mut out) = (with_tls(TlsState::Required), Vec::new());
        assert_eq!(server.handle_bytes(&option_bytes(number, b"\0\0\0\0\0\0"), &mut out), Ok(None));
        assert_eq!(only_reply(&out), reply::ERR_TLS_REQD, "option {number}");
    }
    let (mut server, mut out) = (with_tls(TlsState::Required), Vec::new());
    let refused = server.handle_bytes(&option_bytes(option::EXPORT_NAME, b"a"), &mut out);
    assert!(matches!(refused, Err(ServerHandshakeError::ExportNameRefused(_))), "{refused:?}");
    let (mut server, mut out) = (with_tls(TlsState::Required), Vec::new());
    let event = server.handle_bytes(&option_bytes(option::ABORT, &[]), &mut out);
    assert_eq!(event, Ok(Some(Event::Abort)));
}

#[test]
fn starttls_drops_header_style_and_contexts() {
    let mut server = begun().with_tls(TlsState::Allowed);
    answer(&mut server, option::EXTENDED_HEADERS, b"");
    ask(&mut server, option::SET_META_CONTEXT, ALLOCATION_OF_A);
    let mut out = Vec::new();
    let event = server.handle_bytes(&option_bytes(option::STARTTLS, b""), &mut out);
    assert_eq!(event, Ok(Some(Event::StartTls)));
    server.tls_started();
    let flags = announced(&ask(&mut server, option::GO, GO_A));
    assert!(!flags.contains(TransmissionFlags::SEND_DF));
    assert_eq!(server.negotiated(), Negotiated::default());
}
