//! Every limit, at its border: the last that is allowed works, the first that is not ends only what went too far.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use proto::export_name::PROBE_SLOT;
use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use proto::nbd::{OPTION_MAGIC, option};
use server::catalog::Catalog;
use server::data::config::DataServerConfig;
use server::data::server::{DataServer, DataServerError};
use server::limits::{CONNECTION_BYTES, GUESTS_PER_ADDRESS_MAX, Limits};
use socket2::{Domain, Socket, Type};

use super::client::Client;
use super::hostile_requests::flood_with_reads;
use super::support::{
    CLOSE_LIMIT, DEADLINE, HANDSHAKE_TIMEOUT, Server, TempDir, alone, export_name, may_open_files, skip,
    wait_until,
};

/// The greeting of a server that lets a connection in.
const GREETING_BYTES: usize = 18;

/// Connects from an address of loopback's network; true: it was let in.
fn connect_from(source: [u8; 4], server: SocketAddr) -> (TcpStream, bool) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((source, 0)).into()).unwrap();
    socket.connect(&server.into()).unwrap();
    let mut stream: TcpStream = socket.into();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let is_in = stream.read_exact(&mut [0; GREETING_BYTES]).is_ok();
    (stream, is_in)
}

#[test]
fn one_address_gets_its_share_and_others_are_let_in() {
    let server = Server::start_with(|config| config.limits.connections_per_address_max = 3);
    let (mine, other) = ([127, 0, 0, 2], [127, 0, 0, 3]);
    let crowd: Vec<_> = (0..3).map(|_| connect_from(mine, server.address())).collect();
    assert!(crowd.iter().all(|(_, is_in)| *is_in));
    let guests: Vec<_> = (0..GUESTS_PER_ADDRESS_MAX).map(|_| connect_from(mine, server.address())).collect();
    assert!(guests.iter().all(|(_, is_in)| *is_in), "they may say what they want");
    assert!(!connect_from(mine, server.address()).1, "one more");
    assert!(connect_from(other, server.address()).1);
    drop((crowd, guests));
    wait_until("the places are free again", || connect_from(mine, server.address()).1);
}

/// What a machine needs whose connections died with its network: at the server they still count.
#[test]
fn who_takes_a_slot_over_or_asks_whether_the_server_lives_finds_a_place_beyond_the_limit() {
    let server = Server::start_with(|config| {
        config.limits.connections_per_address_max = 2;
        config.limits.handshake_timeout = HANDSHAKE_TIMEOUT;
    });
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    let open_in_time = |epoch: u64, slot: u32| {
        let mut opened = None;
        wait_until("a handshake in time", || {
            opened = Client::open(server.address(), &export_name(&attachment, epoch, slot)).ok();
            opened.is_some()
        });
        opened.unwrap()
    };
    let (mut first, mut second) = (open_in_time(1, 0), open_in_time(1, 1));
    let refused = Client::open(server.address(), &export_name(&attachment, 1, 2)).err().unwrap();
    assert!(
        refused.to_string().contains("2 connections, which is the limit (--connections-per-address-max)"),
        "{refused}"
    );
    first.write(0, &[7; 4096]).unwrap();
    let mut probe = open_in_time(1, PROBE_SLOT);
    assert_eq!(probe.read(0, 512).unwrap(), [7; 512]);
    first.write(0, &[8; 4096]).unwrap();
    // A new connection in a slot, then a new session, each in the place of one that is there.
    let mut again = open_in_time(1, 0);
    first.stream.read_exact(&mut [0]).unwrap_err();
    assert_eq!(again.read(0, 4096).unwrap(), [8; 4096]);
    second.write(0, &[9; 4096]).unwrap();
    let mut next = open_in_time(2, 1);
    second.stream.read_exact(&mut [0]).unwrap_err();
    assert_eq!(next.read(0, 4096).unwrap(), [9; 4096]);
    // The probe has to end, the others stay.
    probe.stream.set_read_timeout(Some(CLOSE_LIMIT)).unwrap();
    let ended = probe.stream.read(&mut [0]);
    assert!(
        matches!(ended, Ok(0)) || ended.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
    );
    std::thread::sleep(HANDSHAKE_TIMEOUT + Duration::from_secs(1));
    next.write(0, &[1; 4096]).unwrap();
    assert!(Client::open(server.address(), &export_name(&attachment, 2, 0)).is_ok(), "a place is free again");
}

#[test]
fn the_last_option_is_answered_and_one_more_ends_the_handshake() {
    let server = Server::start_with(|config| config.limits.handshake_options_max = 5);
    // An option that nobody knows is answered with one error of a header and some text.
    let unknown = [&OPTION_MAGIC.to_be_bytes()[..], &0x7777_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat();
    let answers = |options: usize| {
        let (mut stream, is_in) = connect_from([127, 0, 0, 1], server.address());
        assert!(is_in);
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        for _ in 0..options {
            // The server may have closed already.
            let _ = stream.write_all(&unknown);
        }
        let abort = [&OPTION_MAGIC.to_be_bytes()[..], &option::ABORT.to_be_bytes(), &[0; 4]].concat();
        let _ = stream.write_all(&abort);
        let mut input = Vec::new();
        let _ = stream.read_to_end(&mut input);
        input.windows(8).filter(|bytes| *bytes == 0x0003_e889_0455_65a9_u64.to_be_bytes()).count()
    };
    assert_eq!(answers(4), 5, "four options and the ABORT");
    assert!(answers(5) <= 5, "the ABORT, the sixth, is not answered");
}

#[test]
fn the_longest_request_is_served_and_a_longer_one_refused() {
    let server = Server::start_with(|config| config.limits.request_bytes_max = 64 << 10);
    let (_, mut client) = server.open_new("vol", 1 << 20);
    assert_eq!(client.info.block_sizes.unwrap().maximum_bytes, 64 << 10);
    client.write(0, &[7; 64 << 10]).unwrap();
    assert_eq!(client.read(0, 64 << 10).unwrap(), [7; 64 << 10]);
    let longer_bytes = (64 << 10) + 4096;
    assert_eq!(client.read(0, longer_bytes), Err(NbdError::Einval as u32));
    assert_eq!(client.write(0, &vec![8; longer_bytes as usize]), Err(NbdError::Einval as u32));
    // What moves no payload has no such limit.
    client.call(Command::WriteZeroes, CommandFlags::NONE, 0, 1 << 20, &[]).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [0; 4096]);
}

/// The least memory with which a server of one thread and few connections starts.
fn least_memory(limits: &Limits) -> u64 {
    let error = Limits { memory_bytes_max: Some(0), ..*limits }.plan(1, 1 << 40, 0, 1 << 20).unwrap_err();
    error.needed_mib << 20
}

#[test]
fn the_least_memory_serves_requests_of_every_size_and_less_is_refused_at_start() {
    let limits = Limits { connections_max: 16, ..Limits::default() };
    let least = least_memory(&limits);
    let dir = TempDir::new();
    let start = |memory_bytes_max| {
        let catalog = Catalog::open(&dir.0).unwrap();
        let limits = Limits { memory_bytes_max: Some(memory_bytes_max), ..limits };
        DataServer::start(DataServerConfig { threads: 1, limits, ..DataServerConfig::default() }, catalog)
    };
    let refused = start(least - (1 << 20)).err();
    assert!(matches!(refused, Some(DataServerError::Memory(_))), "{refused:?}");
    drop(start(least).unwrap());

    let server = Server::start_with(|config| {
        config.threads = 1;
        config.limits = Limits { memory_bytes_max: Some(least), ..limits };
    });
    let (_, mut client) = server.open_new("vol", 64 << 20);
    for length_bytes in [512, 4 << 10, 64 << 10, 1 << 20, 32 << 20] {
        let data = vec![length_bytes as u8 | 1; length_bytes];
        client.write(0, &data).unwrap();
        assert!(client.read(0, length_bytes as u32).unwrap() == data, "{length_bytes}");
    }
    // There is one buffer of each size, and many ask for it at once.
    for number in 0..200 {
        client.send(Command::Read, CommandFlags::NONE, number * 4096, 4096 << (number % 3), &[]);
    }
    assert!((0..200).all(|_| client.receive().unwrap().error == 0));
}

#[test]
fn all_who_stand_still_with_what_others_need_are_closed_together() {
    let stall_timeout = Duration::from_secs(1);
    let server = Server::start_with(|config| {
        config.threads = 1;
        config.limits.stall_timeout = stall_timeout;
    });
    let stalled: Vec<Client> = (0..64)
        .map(|number| {
            let (_, mut client) = server.open_new(&format!("stalled-{number}"), 4 << 20);
            // Header and a part of the payload: one of the 64 buffers of its class each.
            client.send(Command::Write, CommandFlags::NONE, 0, 1 << 20, &[1; 100]);
            client
        })
        .collect();
    let (_, mut others) = server.open_new("others", 8 << 20);
    // Answered by the thread that has taken in what the others sent.
    others.read(0, 4096).unwrap();
    // Not a wait for something: that this time passes is the condition.
    std::thread::sleep(stall_timeout);
    others.write(0, &[2; 1 << 20]).unwrap();
    for mut client in stalled {
        assert!(client.is_closed_by_server());
    }
}

#[test]
fn a_small_write_that_never_ends_is_closed_when_its_buffer_is_needed() {
    let limits = Limits { connections_max: 48, ..Limits::default() };
    let server = Server::start_with(|config| {
        config.threads = 1;
        let memory_bytes_max = Some(least_memory(&limits));
        config.limits = Limits { memory_bytes_max, stall_timeout: Duration::from_secs(1), ..limits };
    });
    let volume = server.create("half", 1 << 20);
    let attachment = server.attach(&volume, false);
    // There are fewer buffers for 4 KiB than that: some have one, the others wait for one.
    let mut halves: Vec<Client> = (0..40)
        .map(|slot| {
            let mut half = server.open(&attachment, 1, slot);
            half.send(Command::Write, CommandFlags::NONE, 0, 4096, &[1; 100]);
            half
        })
        .collect();
    let (_, mut other) = server.open_new("other", 1 << 20);
    other.write(0, &[2; 4096]).unwrap();
    assert!(halves[0].is_closed_by_server());
}

#[test]
fn readers_of_nothing_leave_buffers_for_those_who_read() {
    let server = Server::start_with(|config| {
        config.threads = 1;
        // Nobody is closed for standing still while this runs.
        config.limits.stall_timeout = Duration::from_secs(600);
    });
    let volume = server.create("hoarded", 64 << 20);
    let attachment = server.attach(&volume, false);
    let hoarders: Vec<Client> = (0..40)
        .map(|slot| {
            let mut client = server.open(&attachment, 1, slot);
            // More than the sockets on either side hold; 128 of them would take 128 of 512 buffers.
            flood_with_reads(&mut client, 64 << 10);
            client
        })
        .collect();
    let (_, mut reader) = server.open_new("read", 16 << 20);
    for round in 0..50 {
        reader.write(round << 16, &[round as u8; 64 << 10]).unwrap();
        assert_eq!(reader.read(round << 16, 64 << 10).unwrap(), [round as u8; 64 << 10]);
    }
    drop(hoarders);
}

#[test]
fn a_thousand_connections_are_within_what_was_set_aside_for_them() {
    alone("limits::a_thousand_connections_are_within_what_was_set_aside_for_them", a_thousand_connections);
}

fn a_thousand_connections() {
    // Both ends of each are here.
    if !may_open_files(2500) {
        return skip("this process may not open 2500 files");
    }
    let server = Server::start_with(|config| {
        config.limits.connections_max = 1100;
        config.limits.connections_per_address_max = 1100;
    });
    let resident_kib = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let volume = server.create("vol", 64 << 20);
    let attachment = server.attach(&volume, false);
    let before_kib = resident_kib();
    let mut crowd = Vec::new();
    for slot in 0..1000 {
        let mut client = server.open(&attachment, 1, slot);
        // Much in one piece, so that the receive memory is used.
        client.send(Command::Write, CommandFlags::NONE, 0, 12 << 10, &vec![1; 12 << 10]);
        for _ in 0..20 {
            client.send(Command::Write, CommandFlags::NONE, 0, 12 << 10, &vec![1; 12 << 10]);
        }
        crowd.push(client);
    }
    for client in &mut crowd {
        for _ in 0..21 {
            client.receive().unwrap();
        }
    }
    let more_kib = resident_kib().saturating_sub(before_kib);
    // The clients' own memory, here in the same process, comes on top: give it the same again at most.
    assert!(more_kib << 10 < 1000 * CONNECTION_BYTES, "{} KiB each", more_kib / 1000);
}
