//! Structured replies and extended headers: every command, every refusal, and requests that lie about their payload.

use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use proto::nbd::{HeaderStyle, TransmissionFlags};
use server::catalog::BackendKind;

use super::chunks::{ChunkClient, Offer};
use super::support::{Random, Server, wait_until};

const MIB: u64 = 1 << 20;
const STRUCTURED: Offer = Offer { headers: HeaderStyle::Structured, allocation_context: false };
const EXTENDED: Offer = Offer { headers: HeaderStyle::Extended, allocation_context: false };

fn start() -> Server {
    Server::start_with(|config| config.export_by_name = true)
}

pub(crate) fn data(bytes: u64) -> Vec<u8> {
    let mut data = vec![0; bytes as usize];
    Random::new(bytes).fill(&mut data);
    data
}

/// Calls `test` with a client in each style on each backend.
fn each(size_bytes: u64, test: impl Fn(&mut ChunkClient, Offer, BackendKind)) {
    let server = start();
    for backend in [BackendKind::File, BackendKind::Memory] {
        server.create_with(backend.as_str(), size_bytes, |new| new.backend = backend);
        for offer in [STRUCTURED, EXTENDED] {
            test(&mut ChunkClient::open(server.address(), backend.as_str(), offer), offer, backend);
        }
    }
}

#[test]
fn what_was_written_is_read_in_one_chunk() {
    each(64 * MIB, |client, _, backend| {
        for bytes in [4096, 8192, 20 << 10, 64 << 10, 128 << 10, MIB, 5 * MIB, 32 * MIB] {
            let data = data(bytes);
            client.write(4096, &data).unwrap();
            for flags in [CommandFlags::NONE, CommandFlags::DF] {
                let answer = client.call(Command::Read, flags, 4096, bytes, &[]).unwrap();
                assert_eq!(answer.data.len(), 1, "one content chunk");
                assert!(answer.data[0] == (4096, data.clone()), "{backend:?} {bytes}");
            }
        }
    });
}

#[test]
fn every_command_is_answered_in_chunks() {
    each(16 * MIB, |client, offer, backend| {
        let flags = client.flags;
        for flag in [
            TransmissionFlags::SEND_DF,
            TransmissionFlags::SEND_CACHE,
            TransmissionFlags::SEND_FAST_ZERO,
            TransmissionFlags::SEND_WRITE_ZEROES,
        ] {
            assert!(flags.contains(flag), "{flag:?}");
        }
        client.write(0, &data(MIB)).unwrap();
        let none = CommandFlags::NONE;
        client.call(Command::Cache, none, 0, MIB, &[]).unwrap();
        client.call(Command::Flush, none, 0, 0, &[]).unwrap();
        client.call(Command::Flush, CommandFlags::FUA, 0, 0, &[]).unwrap();
        client.call(Command::Trim, CommandFlags::FUA, 0, 4096, &[]).unwrap();
        let fast = CommandFlags::FAST_ZERO;
        client.call(Command::WriteZeroes, fast, 8192, 4096, &[]).unwrap();
        client.call(Command::WriteZeroes, CommandFlags::NO_HOLE, 16384, 4096, &[]).unwrap();
        for offset in [0, 8192, 16384] {
            assert_eq!(client.read(offset, 4096), Ok(vec![0; 4096]), "{offer:?} {backend:?} {offset}");
        }
        assert_eq!(client.read(4096, 4096).unwrap(), data(MIB)[4096..8192]);
    });
}

#[test]
fn refusals_carry_words_and_the_connection_lives() {
    each(MIB, |client, offer, _| {
        let none = CommandFlags::NONE;
        let einval = NbdError::Einval as u32;
        let cases = [
            (Command::Read, none, MIB, 4096, einval),
            (Command::Read, none, 0, 0, einval),
            (Command::Read, CommandFlags::NO_HOLE, 0, 4096, einval),
            (Command::Read, none, 0, 33 << 20, NbdError::Eoverflow as u32),
            (Command::Trim, none, MIB, 4096, einval),
            (Command::Cache, CommandFlags::DF, 0, 4096, einval),
            (Command::WriteZeroes, none, MIB - 4096, 8192, NbdError::Enospc as u32),
            (Command::BlockStatus, none, 0, 4096, einval),
            (Command::Unknown(99), none, 0, 4096, einval),
            (Command::Flush, none, 0, 512, einval),
        ];
        for (command, flags, offset, length, expected) in cases {
            let cookie = client.send(command, flags, offset, length, &[]);
            let (answered, answer) = client.receive();
            let (error, words, at) = answer.error.expect("an error");
            assert_eq!((answered, error, at), (cookie, expected, None), "{offer:?} {command:?}");
            assert!(!words.is_empty() && answer.data.is_empty());
        }
        assert_eq!(client.write(MIB, &[1; 4096]), Err(NbdError::Enospc as u32));
        assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]));
    });
}

#[test]
fn many_requests_in_flight_keep_their_cookies() {
    each(64 * MIB, |client, offer, backend| {
        for number in 0..64u64 {
            client.write(number * 65536, &[number as u8 + 1; 65536]).unwrap();
        }
        let sent: Vec<(u64, u64)> = (0..300u64)
            .map(|round| {
                let number = round * 7 % 64;
                let cookie = client.send(Command::Read, CommandFlags::NONE, number * 65536, 4096, &[]);
                (cookie, number)
            })
            .collect();
        for _ in &sent {
            let (cookie, answer) = client.receive();
            let number = sent.iter().find(|(sent, _)| *sent == cookie).unwrap().1;
            let expected = [(number * 65536, vec![number as u8 + 1; 4096])];
            assert!(answer.data == expected, "{offer:?} {backend:?} {number}");
        }
    });
}

#[test]
fn effects_of_more_than_four_gigabytes_are_one_request() {
    let size_bytes = 3 << 40;
    each(size_bytes, |client, offer, backend| {
        if offer.headers != HeaderStyle::Extended {
            return;
        }
        let far = size_bytes - MIB;
        let none = CommandFlags::NONE;
        for (command, flags) in [
            (Command::Trim, none),
            (Command::WriteZeroes, none),
            (Command::WriteZeroes, CommandFlags::FAST_ZERO),
            (Command::Trim, CommandFlags::FUA),
        ] {
            client.write(far, &data(MIB)).unwrap();
            client.write(4096, &data(MIB)).unwrap();
            client.call(command, flags, 4096, size_bytes - 4096, &[]).unwrap();
            assert!(client.read(far, MIB).unwrap().iter().all(|byte| *byte == 0), "{backend:?} {command:?}");
            assert!(client.read(4096, MIB).unwrap().iter().all(|byte| *byte == 0), "{backend:?} {command:?}");
        }
        client.call(Command::Cache, none, 0, size_bytes, &[]).unwrap();
        let einval = Err(NbdError::Einval as u32);
        for length in [size_bytes, u64::MAX, 1 << 63] {
            assert_eq!(client.call(Command::Trim, none, 4096, length, &[]), einval);
        }
    });
}

#[test]
fn payloads_that_nobody_asked_for_are_consumed() {
    let server = start();
    server.create("vol", MIB);
    let mut client = ChunkClient::open(server.address(), "vol", EXTENDED);
    let einval = Err(NbdError::Einval as u32);
    let flag = CommandFlags::PAYLOAD_LEN;
    for command in [
        Command::Read,
        Command::Flush,
        Command::Trim,
        Command::Cache,
        Command::WriteZeroes,
        Command::BlockStatus,
        Command::Unknown(99),
    ] {
        // What looks like requests must not be taken for some.
        for bytes in [1usize, 12, 4096, MIB as usize] {
            let payload: Vec<u8> = [0x21, 0xe4, 0x1c, 0x71].into_iter().cycle().take(bytes).collect();
            assert_eq!(client.call(command, flag, 0, bytes as u64, &payload), einval, "{command:?} {bytes}");
        }
    }
    assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]));
}

#[test]
fn an_extended_write_has_a_payload_even_if_it_does_not_say_so() {
    let server = start();
    server.create("vol", MIB);
    let mut client = ChunkClient::open(server.address(), "vol", EXTENDED);
    client.call(Command::Write, CommandFlags::FUA, 0, 4096, &[5; 4096]).unwrap();
    assert_eq!(client.read(0, 4096), Ok(vec![5; 4096]));
}

#[test]
fn payloads_beyond_the_maximum_end_the_connection() {
    let server = start();
    let volume = server.create("vol", 64 * MIB);
    for (offer, length) in [(EXTENDED, (32 << 20) + 512), (EXTENDED, u64::MAX), (STRUCTURED, u32::MAX.into())]
    {
        let mut client = ChunkClient::open(server.address(), "vol", offer);
        let flags = match offer.headers {
            HeaderStyle::Extended => CommandFlags::PAYLOAD_LEN,
            _ => CommandFlags::NONE,
        };
        client.send(Command::Write, flags, 0, length, &[]);
        assert!(client.is_closed_by_server(), "{length}");
    }
    wait_until("they are gone", || server.data.connections_of_volume(volume.volume_uid) == 0);
}

#[test]
fn headers_of_another_style_end_the_connection() {
    let server = start();
    server.create("vol", MIB);
    for (offer, magic) in [(STRUCTURED, [0x21, 0xe4, 0x1c, 0x71]), (EXTENDED, [0x25, 0x60, 0x95, 0x13])] {
        let mut client = ChunkClient::open(server.address(), "vol", offer);
        std::io::Write::write_all(&mut client.stream, &[&magic[..], &[0; 60]].concat()).unwrap();
        assert!(client.is_closed_by_server());
    }
}

#[test]
fn disconnect_waits_for_what_is_in_flight() {
    each(16 * MIB, |client, _, _| {
        let read = client.send(Command::Read, CommandFlags::NONE, 0, 4 * MIB, &[]);
        client.send(Command::Disconnect, CommandFlags::NONE, 0, 0, &[]);
        assert_eq!(client.receive().0, read);
        assert!(client.is_closed_by_server());
    });
}
