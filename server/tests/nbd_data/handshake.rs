//! Option haggling over a real socket: what a client may ask for, and what it may not.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use proto::nbd::{TransmissionFlags, option, reply};

use super::chunks::{greet, is_closed, meta_context_query, receive_option_reply, send_option};
use super::support::Server;

const SIZE_BYTES: u64 = 1 << 20;

fn start() -> Server {
    let server = Server::start_with(|config| config.export_by_name = true);
    server.create("vol", SIZE_BYTES);
    server
}

/// Sends an option and takes replies until the final one.
fn ask(stream: &mut TcpStream, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    send_option(stream, number, data);
    let mut replies = Vec::new();
    loop {
        let reply = receive_option_reply(stream, number);
        let is_final = reply.0 == reply::ACK || reply.0 & reply::ERROR_BIT != 0;
        replies.push(reply);
        if is_final {
            return replies;
        }
    }
}

/// The type of the only reply.
fn only(replies: &[(u32, Vec<u8>)]) -> u32 {
    assert_eq!(replies.len(), 1, "{replies:?}");
    replies[0].0
}

fn info_request(name: &str, items: &[u16]) -> Vec<u8> {
    let items: Vec<u8> =
        [items.len() as u16].iter().chain(items).flat_map(|item| item.to_be_bytes()).collect();
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &items].concat()
}

#[test]
fn export_name_is_answered_with_zeroes_unless_both_sides_leave_them_out() {
    let server = start();
    for (client_flags, answer_bytes) in [(3, 10), (2, 10), (1, 134), (0, 134)] {
        let mut stream = greet(server.address(), client_flags);
        send_option(&mut stream, option::EXPORT_NAME, b"vol");
        let mut answer = vec![0xff; answer_bytes];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..8], SIZE_BYTES.to_be_bytes());
        let flags = TransmissionFlags(u16::from_be_bytes([answer[8], answer[9]]));
        assert!(flags.contains(TransmissionFlags::HAS_FLAGS) && !flags.contains(TransmissionFlags::SEND_DF));
        assert!(answer[10..].iter().all(|byte| *byte == 0));
        // The next byte is of the reply to a request, not another zero.
        let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0];
        request.extend([7; 8]);
        request.extend([0; 8]);
        request.extend(4096u32.to_be_bytes());
        stream.write_all(&request).unwrap();
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7]);
    }
}

#[test]
fn export_name_of_what_is_not_there_ends_the_session() {
    let server = start();
    for name in ["", "other", "vo", "vol\0"] {
        let mut stream = greet(server.address(), 3);
        send_option(&mut stream, option::EXPORT_NAME, name.as_bytes());
        assert!(is_closed(&mut stream), "{name:?}");
    }
}

#[test]
fn unknown_client_flags_end_the_session() {
    let server = start();
    for flags in [4, 1 << 16, u32::MAX] {
        assert!(is_closed(&mut greet(server.address(), flags)), "{flags:#x}");
    }
}

#[test]
fn abort_is_acknowledged_with_data_or_without_and_the_session_ends() {
    let server = start();
    for data in [&b""[..], b"good bye"] {
        let mut stream = greet(server.address(), 3);
        assert_eq!(ask(&mut stream, option::ABORT, data), [(reply::ACK, vec![])]);
        assert!(is_closed(&mut stream));
    }
}

#[test]
fn options_that_are_unknown_or_malformed_are_refused_and_haggling_goes_on() {
    let server = start();
    let mut stream = greet(server.address(), 3);
    for number in [0, 4, 12, 99, u32::MAX] {
        assert_eq!(only(&ask(&mut stream, number, b"whatever")), reply::ERR_UNSUP, "{number}");
    }
    for number in [option::LIST, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        assert_eq!(only(&ask(&mut stream, number, b"x")), reply::ERR_INVALID, "{number}");
    }
    for data in
        [&b""[..], b"\0\0\0\x03vo", b"\0\0\0\x03vol\0", b"\0\0\0\x03vol\0\x02\0\0", b"\xff\xff\xff\xff\0\0"]
    {
        for number in [option::INFO, option::GO] {
            assert_eq!(only(&ask(&mut stream, number, data)), reply::ERR_INVALID, "{number} {data:?}");
        }
    }
    assert_eq!(only(&ask(&mut stream, option::GO, &info_request("other", &[]))), reply::ERR_UNKNOWN);
    let opened = ask(&mut stream, option::GO, &info_request("vol", &[]));
    assert_eq!(opened.last().unwrap().0, reply::ACK);
}

#[test]
fn unknown_information_requests_are_passed_over() {
    let server = start();
    let mut stream = greet(server.address(), 3);
    let replies = ask(&mut stream, option::INFO, &info_request("vol", &[77, 0xffff]));
    assert_eq!(replies.last().unwrap().0, reply::ACK);
    assert!(replies.iter().any(|(kind, data)| *kind == reply::INFO && data[..2] == [0, 0]));
}

#[test]
fn info_and_go_tell_the_same_and_block_sizes_are_sound() {
    let server = start();
    for negotiated in [None, Some(option::STRUCTURED_REPLY), Some(option::EXTENDED_HEADERS)] {
        let mut stream = greet(server.address(), 3);
        if let Some(number) = negotiated {
            assert_eq!(only(&ask(&mut stream, number, &[])), reply::ACK);
            if number == option::STRUCTURED_REPLY {
                assert_eq!(only(&ask(&mut stream, number, &[])), reply::ACK, "said twice");
            }
        }
        let request = info_request("vol", &[0, 1, 2, 3]);
        let told = ask(&mut stream, option::INFO, &request);
        assert_eq!(told, ask(&mut stream, option::GO, &request));
        let item = |kind: u16| {
            let found = told.iter().find(|(_, data)| data.starts_with(&kind.to_be_bytes()));
            found.map(|(_, data)| data[2..].to_vec())
        };
        assert_eq!(item(0).unwrap().len(), 10);
        let sizes = item(3).unwrap();
        let size = |at: usize| u32::from_be_bytes(sizes[at..at + 4].try_into().unwrap());
        let (minimum, preferred, maximum) = (size(0), size(4), size(8));
        assert!(minimum.is_power_of_two() && minimum <= 65536);
        assert!(preferred.is_power_of_two() && preferred >= minimum.max(512));
        assert!(maximum >= preferred && maximum >= 1 << 20);
        assert!(String::from_utf8(item(2).unwrap()).unwrap().starts_with("volnode/1 "));
    }
}

#[test]
fn after_extended_headers_there_is_no_way_back() {
    let server = start();
    let mut stream = greet(server.address(), 3);
    assert_eq!(only(&ask(&mut stream, option::EXTENDED_HEADERS, &[])), reply::ACK);
    assert_eq!(only(&ask(&mut stream, option::STRUCTURED_REPLY, &[])), reply::ERR_EXT_HEADER_REQD);
    send_option(&mut stream, option::EXPORT_NAME, b"vol");
    assert!(is_closed(&mut stream));
}

#[test]
fn contexts_are_listed_and_selected_by_their_queries() {
    let server = start();
    let mut stream = greet(server.address(), 3);
    let (list, set) = (option::LIST_META_CONTEXT, option::SET_META_CONTEXT);
    let all = meta_context_query("vol", &[]);
    assert_eq!(only(&ask(&mut stream, list, &all)), reply::ERR_INVALID, "before structured replies");
    assert_eq!(only(&ask(&mut stream, set, &all)), reply::ERR_INVALID, "before structured replies");
    assert_eq!(only(&ask(&mut stream, option::STRUCTURED_REPLY, &[])), reply::ACK);
    let allocation = |id: u8| (reply::META_CONTEXT, [&[0, 0, 0, id][..], b"base:allocation"].concat());
    let done = (reply::ACK, vec![]);
    let cases: [(&[&str], bool, bool); 6] = [
        (&[], true, false),
        (&["base:"], true, false),
        (&["base:allocation"], true, true),
        (&["x-other:thing", "base:allocation", "base:unheard-of"], true, true),
        (&["qemu:dirty-bitmap:b"], false, false),
        (&["base:unheard-of"], false, false),
    ];
    for (queries, is_listed, is_selected) in cases {
        let data = meta_context_query("vol", queries);
        let listed = ask(&mut stream, list, &data);
        let expected = if is_listed { vec![allocation(0), done.clone()] } else { vec![done.clone()] };
        assert_eq!(listed, expected, "{queries:?}");
        let selected = ask(&mut stream, set, &data);
        let expected = if is_selected { vec![allocation(1), done.clone()] } else { vec![done.clone()] };
        assert_eq!(selected, expected, "{queries:?}");
    }
    let unknown = meta_context_query("other", &["base:allocation"]);
    assert_eq!(only(&ask(&mut stream, list, &unknown)), reply::ERR_UNKNOWN);
    assert_eq!(only(&ask(&mut stream, set, &unknown)), reply::ERR_UNKNOWN);
    let mut beyond = meta_context_query("vol", &["base:allocation"]);
    beyond[11..15].copy_from_slice(&5000u32.to_be_bytes());
    assert_eq!(only(&ask(&mut stream, set, &beyond)), reply::ERR_INVALID, "a query longer than the option");
}

#[test]
fn options_in_single_bytes_are_the_same_options() {
    let server = start();
    let mut stream = greet(server.address(), 3);
    let mut bytes = b"IHAVEOPT\0\0\0\x08\0\0\0\0".to_vec();
    bytes.extend(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
    for byte in bytes {
        stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(receive_option_reply(&mut stream, option::STRUCTURED_REPLY), (reply::ACK, vec![]));
    let (kind, data) = receive_option_reply(&mut stream, option::LIST);
    assert_eq!((kind, &data[..7]), (reply::SERVER, &b"\0\0\0\x03vol"[..]));
    assert_eq!(receive_option_reply(&mut stream, option::LIST), (reply::ACK, vec![]));
}
