//! Clients that attack the transmission phase: requests that cannot be, payloads that do not come, replies that nobody reads.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;

use proto::nbd::transmission::{Command, CommandFlags, NbdError};

use super::attack::{SIZE_BYTES, Target, half_close, request, reset, shut_down, throw, until_closed};
use super::client::Client;
use super::support::{Random, seed, wait_until};

const BLOCK: u32 = 4096;

/// Asks for so many READs that no socket holds the replies, as far as the server takes the requests, and reads none.
pub(crate) fn flood_with_reads(client: &mut Client, length_bytes: u32) {
    socket2::SockRef::from(&client.stream).set_recv_buffer_size(4096).unwrap();
    let reads: Vec<u8> = (0..20_000_000 / u64::from(length_bytes))
        .flat_map(|number| {
            request(Command::Read, number, number * u64::from(length_bytes) % SIZE_BYTES, length_bytes)
        })
        .collect();
    client.stream.set_nonblocking(true).unwrap();
    let _ = client.stream.write(&reads);
    client.stream.set_nonblocking(false).unwrap();
}

#[test]
fn every_command_that_there_is_not_is_refused_and_the_connection_lives() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    for number in (8..300).chain([0x7fff, 0x8000, u16::MAX]) {
        let refused = client.call(Command::Unknown(number), CommandFlags::NONE, 0, BLOCK, &[]);
        assert_eq!(refused, Err(NbdError::Einval as u32), "command {number}");
    }
    client.write(0, &[1; 4096]).unwrap();
    drop(client);
    target.survives();
}

#[test]
fn every_flag_that_a_command_does_not_have_is_refused_and_the_connection_lives() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    for bit in 5..16 {
        let flags = CommandFlags(1 << bit);
        for command in [Command::Read, Command::Flush, Command::Trim, Command::WriteZeroes] {
            let length_bytes = if command == Command::Flush { 0 } else { BLOCK };
            let refused = client.call(command, flags, 0, length_bytes, &[]);
            assert_eq!(refused, Err(NbdError::Einval as u32), "{command:?} with bit {bit}");
        }
        let refused = client.call(Command::Write, flags, 0, BLOCK, &[1; BLOCK as usize]);
        assert_eq!(refused, Err(NbdError::Einval as u32), "a write with bit {bit}");
    }
    assert_eq!(client.read(0, BLOCK).unwrap(), [0; BLOCK as usize], "nothing was written");
    drop(client);
    target.survives();
}

#[test]
fn ranges_that_wrap_around_or_end_outside_are_refused() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    let last = u64::MAX - u64::from(BLOCK) + 1;
    for offset_bytes in [SIZE_BYTES, SIZE_BYTES - 512, 1 << 62, last, u64::MAX] {
        for command in [Command::Read, Command::Write, Command::Trim, Command::WriteZeroes] {
            let payload: &[u8] = if command == Command::Write { &[9; BLOCK as usize] } else { &[] };
            let refused = client.call(command, CommandFlags::NONE, offset_bytes, BLOCK, payload);
            assert!(refused.is_err(), "{command:?} at {offset_bytes}");
        }
    }
    let tail = client.read(SIZE_BYTES - u64::from(BLOCK), BLOCK).unwrap();
    assert_eq!(tail, [0; BLOCK as usize], "nothing was written");
    drop(client);
    target.survives();
}

#[test]
fn lengths_of_nothing_and_of_everything_are_refused() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    for command in [Command::Read, Command::Trim, Command::WriteZeroes] {
        for length_bytes in [0, u32::MAX] {
            let refused = client.call(command, CommandFlags::NONE, 0, length_bytes, &[]);
            assert!(refused.is_err(), "{command:?} of {length_bytes}");
        }
    }
    assert!(client.call(Command::Write, CommandFlags::NONE, 0, 0, &[]).is_err());
    client.write(0, &[1; 4096]).unwrap();
    drop(client);
    target.survives();
}

#[test]
fn a_write_of_four_gigabytes_is_not_waited_for() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    throw(&mut client.stream, &request(Command::Write, 1, 0, u32::MAX));
    assert!(client.is_closed_by_server());
    target.survives();
}

#[test]
fn refused_writes_of_the_largest_size_are_swallowed_one_after_another() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    let payload = vec![5; 32 << 20];
    for _ in 0..3 {
        let refused = client.call(Command::Write, CommandFlags::NONE, SIZE_BYTES, 32 << 20, &payload);
        assert_eq!(refused, Err(NbdError::Enospc as u32));
    }
    client.write(0, &[1; 4096]).unwrap();
    drop(client);
    target.survives();
}

#[test]
fn a_refused_write_of_which_half_the_payload_comes_leaves_nothing_behind() {
    let target = Target::start();
    for ending in [half_close, |stream: &mut std::net::TcpStream| {
        shut_down(stream, Shutdown::Both);
        Vec::new()
    }] {
        let mut client = target.transmitting(0);
        let header = request(Command::Write, 1, SIZE_BYTES, 1 << 20);
        throw(&mut client.stream, &[header, vec![7; 1 << 19]].concat());
        assert!(ending(&mut client.stream).is_empty(), "it is not answered");
    }
    target.survives();
}

#[test]
fn a_write_that_ends_short_of_its_payload_writes_nothing() {
    let target = Target::start();
    for (slot, sent_bytes) in [0, 1, 4095, 4096, 100_000, (1 << 20) - 1].into_iter().enumerate() {
        let mut client = target.transmitting(slot as u32);
        throw(&mut client.stream, &[request(Command::Write, 1, 0, 1 << 20), vec![7; sent_bytes]].concat());
        assert!(half_close(&mut client.stream).is_empty());
    }
    let mut client = target.transmitting(0);
    assert!(client.read(0, 1 << 20).unwrap().iter().all(|byte| *byte == 0));
    drop(client);
    target.survives();
}

#[test]
fn a_write_that_is_reset_short_of_its_payload_gives_its_buffer_back() {
    let target = Target::start_with(|config| config.threads = 1);
    // More often than there are buffers of that size.
    for number in 0..150 {
        let mut client = target.transmitting(number % 8);
        throw(&mut client.stream, &[request(Command::Write, 1, 0, 1 << 20), vec![7; 5000]].concat());
        reset(client.stream);
    }
    let mut client = target.transmitting(0);
    client.write(0, &vec![1; 1 << 20]).unwrap();
    drop(client);
    target.survives();
}

#[test]
fn half_a_header_and_the_end_leave_nothing_behind() {
    let target = Target::start();
    let header = request(Command::Read, 1, 0, BLOCK);
    for end in 1..header.len() {
        let mut client = target.transmitting(0);
        throw(&mut client.stream, &header[..end]);
        assert!(half_close(&mut client.stream).is_empty());
    }
    target.survives();
}

#[test]
fn half_a_header_and_silence_hold_nobody_up() {
    let target = Target::start_with(|config| config.threads = 1);
    let mut silent: Vec<Client> = (0..30).map(|slot| target.transmitting(slot)).collect();
    for client in &mut silent {
        client.stream.write_all(&request(Command::Write, 1, 0, BLOCK)[..27]).unwrap();
    }
    let mut other = target.transmitting(99);
    other.write(0, &vec![3; 1 << 20]).unwrap();
    drop((silent, other));
    target.survives();
}

#[test]
fn what_came_before_a_wrong_magic_is_answered_first() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    let write = client.send(Command::Write, CommandFlags::NONE, 0, BLOCK, &[6; BLOCK as usize]);
    client.stream.write_all(&[0x66; 28]).unwrap();
    assert_eq!(client.receive().unwrap().cookie, write);
    assert!(client.is_closed_by_server());
    let mut client = target.transmitting(0);
    assert_eq!(client.read(0, BLOCK).unwrap(), [6; BLOCK as usize]);
    drop(client);
    target.survives();
}

#[test]
fn replies_that_nobody_reads_and_then_the_end_bring_nobody_down() {
    let target = Target::start();
    for (slot, length_bytes) in [(0, BLOCK), (1, 64 << 10), (2, 1 << 20), (3, 32 << 20)] {
        let mut client = target.transmitting(slot);
        flood_with_reads(&mut client, length_bytes.min(20_000_000));
        drop(client);
    }
    target.survives();
}

#[test]
fn replies_that_nobody_reads_and_then_a_reset_bring_nobody_down() {
    let target = Target::start();
    for round in 0..20 {
        let mut client = target.transmitting(round % 4);
        flood_with_reads(&mut client, 64 << 10);
        reset(client.stream);
    }
    target.survives();
}

#[test]
fn half_closed_with_replies_that_nobody_reads_the_rest_is_served() {
    let target = Target::start_with(|config| config.threads = 1);
    let mut standing: Vec<Client> = (0..20)
        .map(|slot| {
            let mut client = target.transmitting(slot);
            flood_with_reads(&mut client, 64 << 10);
            // On a slow machine it may have stood still for too long by now.
            shut_down(&client.stream, Shutdown::Write);
            client
        })
        .collect();
    let mut other = target.transmitting(99);
    for number in 0..100 {
        other.write(number << 16, &[number as u8; 64 << 10]).unwrap();
        assert_eq!(other.read(number << 16, 64 << 10).unwrap(), [number as u8; 64 << 10]);
    }
    standing.clear();
    drop(other);
    target.survives();
}

#[test]
fn a_flood_of_flushes_without_reading_is_held_back() {
    let target = Target::start_with(|config| config.threads = 1);
    let mut client = target.transmitting(0);
    socket2::SockRef::from(&client.stream).set_recv_buffer_size(4096).unwrap();
    let flushes: Vec<u8> = (0..50_000).flat_map(|number| request(Command::Flush, number, 0, 0)).collect();
    client.stream.set_nonblocking(true).unwrap();
    let _ = client.stream.write(&flushes);
    client.stream.set_nonblocking(false).unwrap();
    let mut other = target.transmitting(1);
    other.write(0, &[2; 4096]).unwrap();
    other.flush().unwrap();
    drop((client, other));
    target.survives();
}

#[test]
fn nothing_behind_a_disconnect_is_done() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    let late_write = [request(Command::Write, 2, 0, BLOCK), vec![9; BLOCK as usize]].concat();
    throw(&mut client.stream, &[request(Command::Disconnect, 1, 0, 0), late_write].concat());
    assert!(until_closed(&mut client.stream).is_empty());
    let mut client = target.transmitting(0);
    assert_eq!(client.read(0, BLOCK).unwrap(), [0; BLOCK as usize]);
    drop(client);
    target.survives();
}

#[test]
fn one_cookie_for_all_requests_gets_as_many_replies() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    let same: Vec<u8> = (0..500).flat_map(|_| request(Command::Flush, 42, 0, 0)).collect();
    client.stream.write_all(&same).unwrap();
    for _ in 0..500 {
        let answer = client.receive().unwrap();
        assert_eq!((answer.cookie, answer.error), (42, 0));
    }
    drop(client);
    target.survives();
}

#[test]
fn a_payload_in_drops_is_taken_and_holds_nobody_up() {
    let target = Target::start_with(|config| config.threads = 1);
    let mut slow = target.transmitting(0);
    let mut other = target.transmitting(1);
    slow.stream.write_all(&request(Command::Write, 1, 0, BLOCK)).unwrap();
    for number in 0..BLOCK as usize / 64 {
        slow.stream.write_all(&[8; 64]).unwrap();
        other.write(1 << 20, &[number as u8; 4096]).unwrap();
    }
    assert_eq!(slow.receive().unwrap().error, 0);
    assert_eq!(slow.read(0, BLOCK).unwrap(), [8; BLOCK as usize]);
    drop((slow, other));
    target.survives();
}

#[test]
fn overlapping_writes_without_waiting_leave_one_of_them() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    for number in 1..=100u8 {
        client.send(Command::Write, CommandFlags::NONE, 0, BLOCK, &[number; BLOCK as usize]);
    }
    assert!((0..100).all(|_| client.receive().unwrap().error == 0));
    let left = client.read(0, BLOCK).unwrap();
    assert!((1..=100).contains(&left[0]) && left.iter().all(|byte| *byte == left[0]), "torn");
    drop(client);
    target.survives();
}

#[test]
fn a_reader_that_writes_has_its_payload_swallowed_and_nothing_written() {
    let target = Target::start();
    // While the volume is attached its plain name is for reading only.
    let mut reader = Client::open(target.server.address(), "target").unwrap();
    for length_bytes in [512, 4096, 100_000 & !511, 1 << 20] {
        let refused =
            reader.call(Command::Write, CommandFlags::NONE, 0, length_bytes, &vec![7; length_bytes as usize]);
        assert_eq!(refused, Err(NbdError::Eperm as u32));
    }
    assert_eq!(reader.read(0, BLOCK).unwrap(), [0; BLOCK as usize]);
    drop(reader);
    target.survives();
}

#[test]
fn commands_that_were_not_negotiated_are_refused() {
    let target = Target::start();
    let mut client = target.transmitting(0);
    let status = client.call(Command::BlockStatus, CommandFlags::NONE, 0, BLOCK, &[]);
    assert_eq!(status, Err(NbdError::Einval as u32));
    let fragment = client.call(Command::Read, CommandFlags::DF, 0, BLOCK, &[]);
    assert_eq!(fragment, Err(NbdError::Einval as u32));
    drop(client);
    target.survives();
}

#[test]
fn headers_of_random_fields_end_or_are_answered_but_never_hang() {
    let target = Target::start();
    let mut random = Random::new(seed());
    for round in 0..100 {
        let mut client = target.transmitting(round % 4);
        for _ in 0..20 {
            let mut header = request(Command::Read, 0, 0, 0);
            random.fill(&mut header[4..]);
            // No payload follows, so what claims one ends with the connection.
            throw(&mut client.stream, &header);
        }
        half_close(&mut client.stream);
    }
    target.survives();
}

#[test]
fn one_who_reads_a_byte_at_a_time_gets_every_byte() {
    let target = Target::start_with(|config| config.threads = 1);
    let mut slow = target.transmitting(0);
    slow.write(0, &[4; 2 * BLOCK as usize]).unwrap();
    slow.stream
        .write_all(&[request(Command::Read, 5, 0, BLOCK), request(Command::Read, 6, 0, BLOCK)].concat())
        .unwrap();
    let mut input = Vec::new();
    while input.len() < 2 * (16 + BLOCK as usize) {
        let mut byte = [0];
        slow.stream.read_exact(&mut byte).unwrap();
        input.push(byte[0]);
    }
    assert!(input[16..16 + BLOCK as usize].iter().all(|byte| *byte == 4));
    drop(slow);
    target.survives();
}

#[test]
fn places_of_those_who_stand_still_come_free_when_they_leave() {
    let target = Target::start_with(|config| config.limits.connections_max = 20);
    let mut crowd: Vec<Client> = (0..19).map(|slot| target.transmitting(slot)).collect();
    for client in &mut crowd {
        flood_with_reads(client, 64 << 10);
    }
    for client in crowd {
        reset(client.stream);
    }
    let (address, name) = (target.server.address(), super::support::export_name(&target.attachment, 1, 0));
    wait_until("a place is free", || {
        let opened = Client::open(address, &name);
        opened.is_ok_and(|mut client| client.write(0, &[1; 4096]).is_ok())
    });
    target.survives();
}
