//! Clients that attack the handshake: every length, magic, state and pace that is wrong.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use proto::nbd::transmission::Command;
use proto::nbd::{option, reply};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::attack::{
    Target, begins_with_reply, half_close, option_bytes, option_header, request, reset, throw, until_closed,
};
use super::support::{CLOSE_LIMIT, HANDSHAKE_TIMEOUT, Random, export_name, seed, wait_until};

/// The longest data that an option may carry.
const OPTION_BYTES_MAX: usize = 64 << 10;

#[test]
fn client_flags_with_every_bit_set_end_the_connection() {
    let target = Target::start();
    let mut stream = target.greeted();
    throw(&mut stream, &[0xff; 4]);
    assert!(until_closed(&mut stream).is_empty());
    target.survives();
}

#[test]
fn an_option_without_its_magic_ends_the_connection() {
    let target = Target::start();
    let mut stream = target.haggling();
    throw(&mut stream, &[0x11; 16]);
    assert!(until_closed(&mut stream).is_empty());
    target.survives();
}

#[test]
fn an_option_of_four_gigabytes_is_not_waited_for() {
    let target = Target::start();
    for number in [option::GO, option::EXPORT_NAME, option::LIST, option::STARTTLS, 0x7777] {
        let mut stream = target.haggling();
        throw(&mut stream, &option_header(number, u32::MAX));
        until_closed(&mut stream);
    }
    target.survives();
}

#[test]
fn an_option_one_byte_too_long_ends_the_connection_and_the_longest_does_not() {
    let target = Target::start();
    let mut stream = target.haggling();
    throw(&mut stream, &option_bytes(0x7777, &vec![0; OPTION_BYTES_MAX]));
    throw(&mut stream, &option_bytes(option::ABORT, &[]));
    assert!(begins_with_reply(&until_closed(&mut stream), 0x7777, reply::ERR_UNSUP));
    let mut stream = target.haggling();
    throw(&mut stream, &option_bytes(0x7777, &vec![0; OPTION_BYTES_MAX + 1]));
    assert!(!begins_with_reply(&until_closed(&mut stream), 0x7777, reply::ERR_UNSUP));
    target.survives();
}

#[test]
fn an_export_name_of_absurd_length_ends_the_connection() {
    let target = Target::start();
    for length_bytes in [4097, 60_000, OPTION_BYTES_MAX] {
        let mut stream = target.haggling();
        throw(&mut stream, &option_bytes(option::EXPORT_NAME, &vec![b'a'; length_bytes]));
        assert!(until_closed(&mut stream).is_empty());
    }
    target.survives();
}

#[test]
fn an_export_name_that_is_no_text_ends_the_connection() {
    let target = Target::start();
    for name in [&[0xff, 0xfe][..], &[0xc0, 0x80], &[0; 300]] {
        let mut stream = target.haggling();
        throw(&mut stream, &option_bytes(option::EXPORT_NAME, name));
        assert!(until_closed(&mut stream).is_empty());
    }
    target.survives();
}

#[test]
fn names_that_look_like_paths_open_nothing() {
    let target = Target::start();
    for name in
        ["../catalog.sqlite", "/etc/passwd", "volumes/..", ".", "target/../target", "target\0", "%s%n"]
    {
        let mut stream = target.haggling();
        let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
        throw(&mut stream, &option_bytes(option::GO, &data));
        throw(&mut stream, &option_bytes(option::ABORT, &[]));
        let input = until_closed(&mut stream);
        let is_refused = [reply::ERR_UNKNOWN, reply::ERR_INVALID, reply::ERR_POLICY]
            .iter()
            .any(|kind| begins_with_reply(&input, option::GO, *kind));
        assert!(is_refused, "{name:?}: {input:?}");
    }
    target.survives();
}

#[test]
fn a_go_whose_lengths_do_not_add_up_is_refused_and_haggling_goes_on() {
    let target = Target::start();
    let name = b"\0\0\0\x06target";
    for data in [
        &[][..],
        b"\0\0",
        b"\xff\xff\xff\xfftarget\0\0",
        b"\0\0\0\x07target",
        &[name, &b"\0"[..]].concat(),
        &[name, &b"\xff\xff"[..]].concat(),
        &[name, &b"\0\x01\0"[..]].concat(),
        &[name, &b"\0\x00\0\x03"[..]].concat(),
    ] {
        let mut stream = target.haggling();
        throw(&mut stream, &option_bytes(option::GO, data));
        throw(&mut stream, &option_bytes(option::ABORT, &[]));
        assert!(begins_with_reply(&until_closed(&mut stream), option::GO, reply::ERR_INVALID), "{data:?}");
    }
    target.survives();
}

#[test]
fn a_context_list_that_promises_four_billion_queries_is_refused() {
    let target = Target::start();
    let mut stream = target.haggling();
    throw(&mut stream, &option_bytes(option::STRUCTURED_REPLY, &[]));
    throw(
        &mut stream,
        &option_bytes(option::SET_META_CONTEXT, b"\0\0\0\x06target\xff\xff\xff\xff\0\0\0\x01x"),
    );
    throw(&mut stream, &option_bytes(option::ABORT, &[]));
    let input = until_closed(&mut stream);
    assert!(begins_with_reply(&input, option::STRUCTURED_REPLY, reply::ACK));
    assert!(begins_with_reply(&input[20..], option::SET_META_CONTEXT, reply::ERR_INVALID), "{input:?}");
    target.survives();
}

#[test]
fn a_flood_of_options_is_cut_off() {
    let target = Target::start();
    for number in [0x7777, option::LIST, option::INFO] {
        let mut stream = target.haggling();
        let data = if number == option::INFO { &b"\0\0\0\x06target\0\0"[..] } else { &[] };
        throw(&mut stream, &option_bytes(number, data).repeat(1000));
        let answers = until_closed(&mut stream).windows(8).filter(|eight| *eight == REPLY_MAGIC).count();
        // A LIST of two exports is three replies.
        assert!(answers <= 3 * 64, "{answers} answers");
    }
    target.survives();
}

const REPLY_MAGIC: [u8; 8] = 0x0003_e889_0455_65a9_u64.to_be_bytes();

#[test]
fn who_asks_for_lists_and_reads_none_is_closed_in_time() {
    let target = Target::start_with(|config| {
        config.limits.handshake_timeout = HANDSHAKE_TIMEOUT;
        config.limits.handshake_options_max = 4096;
    });
    for number in 0..40 {
        target.server.create(&format!("{}-{number}", "x".repeat(50)), 1 << 20);
    }
    let mut stream = target.haggling();
    socket2::SockRef::from(&stream).set_recv_buffer_size(4096).unwrap();
    stream.set_nonblocking(true).unwrap();
    // 4096 lists of 40 names are 12 MiB, which no socket holds.
    let _ = stream.write(&option_bytes(option::LIST, &[]).repeat(4000));
    // Options are left that it has not read, so its end is a reset, which overtakes what nobody reads here.
    wait_until("the server closes", || {
        let mut reset = [PollFd::new(&stream, PollFlags::empty())];
        poll(&mut reset, Some(&Timespec::default())).unwrap() > 0
    });
    target.survives();
}

#[test]
fn a_request_in_the_place_of_an_option_ends_the_connection() {
    let target = Target::start();
    let mut stream = target.haggling();
    throw(&mut stream, &request(Command::Read, 1, 0, 4096));
    assert!(until_closed(&mut stream).is_empty());
    target.survives();
}

#[test]
fn an_option_in_the_place_of_a_request_ends_the_connection() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    throw(&mut client.stream, &option_bytes(option::LIST, &[]).repeat(2));
    assert!(client.is_closed_by_server());
    target.survives();
}

#[test]
fn nothing_behind_an_abort_is_answered() {
    let target = Target::start();
    let mut stream = target.haggling();
    let behind = option_bytes(option::LIST, &[]).repeat(20);
    throw(&mut stream, &[option_bytes(option::ABORT, &[]), behind].concat());
    let input = until_closed(&mut stream);
    assert!(input.len() <= 20 && (input.is_empty() || begins_with_reply(&input, option::ABORT, reply::ACK)));
    target.survives();
}

#[test]
fn half_an_option_and_the_end_leave_nothing_behind() {
    let target = Target::start();
    let whole = option_bytes(option::GO, b"\0\0\0\x06target\0\0");
    for end in 0..whole.len() {
        let mut stream = target.haggling();
        throw(&mut stream, &whole[..end]);
        assert!(half_close(&mut stream).is_empty());
    }
    target.survives();
}

#[test]
fn an_option_in_drops_does_not_outlast_the_time_of_a_handshake() {
    let target = Target::start_with(|config| config.limits.handshake_timeout = HANDSHAKE_TIMEOUT);
    let mut stream = target.haggling();
    throw(&mut stream, &option_header(0x7777, 60_000));
    let begun = Instant::now();
    // A byte now and then is progress, and must not be time.
    while stream.write_all(&[0]).is_ok() {
        assert!(begun.elapsed() < CLOSE_LIMIT, "it may go on for ever");
        std::thread::sleep(Duration::from_millis(50));
    }
    target.survives();
}

#[test]
fn silence_after_half_a_greeting_is_ended_in_time() {
    let target = Target::start_with(|config| config.limits.handshake_timeout = HANDSHAKE_TIMEOUT);
    let mut silent = [target.greeted(), target.greeted(), target.haggling(), target.haggling()];
    throw(&mut silent[1], &[0, 0, 0]);
    throw(&mut silent[3], &option_header(option::GO, 100)[..15]);
    for mut stream in silent {
        assert!(until_closed(&mut stream).is_empty());
    }
    target.survives();
}

#[test]
fn a_reset_while_the_export_is_being_opened_leaves_nothing_behind() {
    let target = Target::start();
    for slot in 0..50 {
        let mut stream = target.haggling();
        let name = export_name(&target.attachment, 1, slot);
        let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
        stream.write_all(&option_bytes(option::GO, &data)).unwrap();
        reset(stream);
    }
    target.survives();
}

#[test]
fn a_thousand_connections_that_are_reset_at_once_leave_every_place_free() {
    let target = Target::start_with(|config| config.limits.connections_max = 40);
    for _ in 0..1000 {
        // Beyond the limit the server may have closed first.
        reset(super::attack::connect(target.server.address()));
    }
    wait_until("every place is free", || {
        let mut crowd: Vec<_> = (0..39).map(|_| super::attack::connect(target.server.address())).collect();
        crowd.iter_mut().all(|stream| stream.read_exact(&mut [0; 18]).is_ok())
    });
    target.survives();
}

#[test]
fn guessed_secrets_open_nothing_however_many() {
    let target = Target::start();
    let mut random = Random::new(seed());
    let name = export_name(&target.attachment, 1, 0);
    for _ in 0..60 {
        // One character of the secret, behind the first dot, is another.
        let mut guess = name.clone().into_bytes();
        let dot = name.find('.').unwrap();
        let at = dot + 1 + random.below(16) as usize;
        guess[at] = if guess[at] == b'a' { b'b' } else { b'a' };
        let data = [&(guess.len() as u32).to_be_bytes()[..], &guess, &[0, 0]].concat();
        let mut stream = target.haggling();
        throw(&mut stream, &option_bytes(option::GO, &data));
        throw(&mut stream, &option_bytes(option::ABORT, &[]));
        assert!(begins_with_reply(&until_closed(&mut stream), option::GO, reply::ERR_UNKNOWN));
    }
    target.survives();
}
