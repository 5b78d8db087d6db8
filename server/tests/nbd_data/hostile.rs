//! Peers that send garbage, stop half-way or come in crowds: they lose their connection, nobody else does.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use proto::nbd::transmission::{Command, CommandFlags};
use proto::nbd::{OPTION_MAGIC, option};
use server::limits::GUESTS_PER_ADDRESS_MAX;

use super::support::{CLOSE_LIMIT, HANDSHAKE_TIMEOUT, Random, Server, export_name, seed};

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(CLOSE_LIMIT)).unwrap();
    stream
}

/// Reads until the server closes; an error counts as closed, a time-out does not.
fn drain(mut stream: TcpStream) {
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut sink = [0u8; 4096];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => {
                assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the server does not close");
                return;
            }
        }
    }
}

fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_be_bytes();
    [&OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &length, data].concat()
}

#[test]
fn garbage_at_every_stage_ends_only_its_own_connection() {
    let server = Server::start();
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    let mut random = Random::new(seed());
    let name = export_name(&attachment, 1, 7);
    let go_data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
    let stages: [Vec<u8>; 4] = [
        Vec::new(),
        vec![0, 0, 0, 3],
        [vec![0, 0, 0, 3], option_bytes(option::LIST, &[])].concat(),
        [vec![0, 0, 0, 3], option_bytes(option::GO, &go_data)].concat(),
    ];
    let (_, mut bystander) = server.open_new("bystander", 1 << 20);
    for round in 0..50 {
        for stage in &stages {
            let mut stream = connect(server.address());
            let mut garbage = [0u8; 200];
            random.fill(&mut garbage);
            stream.write_all(stage).unwrap();
            if round % 2 == 0 {
                // Half the time the greeting, and whatever else, is read first.
                let mut greeting = [0u8; 18];
                stream.read_exact(&mut greeting).unwrap();
            }
            // It may have closed already.
            let _ = stream.write_all(&garbage);
            drain(stream);
        }
        bystander.write(0, &[round; 4096]).unwrap();
    }
}

#[test]
fn a_request_with_a_wrong_magic_ends_the_connection() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", 1 << 20);
    client.stream.write_all(&[0x42; 28]).unwrap();
    assert!(client.is_closed_by_server());
}

#[test]
fn a_peer_that_says_nothing_is_closed_in_time() {
    let server = Server::start_with(|config| config.limits.handshake_timeout = HANDSHAKE_TIMEOUT);
    // Before the others are there, so that it has been silent for longer than they may be when they are closed.
    let mut client = server.open_new_in_time("vol", 1 << 20);
    let silent = connect(server.address());
    let mut half = connect(server.address());
    half.write_all(&[0, 0]).unwrap();
    for mut stream in [silent, half] {
        let mut input = Vec::new();
        // The greeting, then the end.
        let _ = stream.read_to_end(&mut input);
        assert_eq!(input.len(), 18);
    }
    client.write(0, &[1; 4096]).unwrap();
}

#[test]
fn connections_beyond_the_limit_are_closed_and_places_come_free() {
    let server = Server::start_with(|config| config.limits.connections_max = 8);
    let crowd: Vec<TcpStream> = (0..8).map(|_| connect(server.address())).collect();
    for mut stream in &crowd {
        let mut greeting = [0u8; 18];
        stream.read_exact(&mut greeting).unwrap();
    }
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    let refused =
        super::client::Client::open(server.address(), &export_name(&attachment, 1, 0)).err().unwrap();
    assert!(
        refused.to_string().contains("there are 8 connections, which is the limit (--connections-max)"),
        "{refused}"
    );
    // So many may say what they want; more are not even greeted.
    let mut guests = Vec::new();
    super::support::wait_until("the one that was refused has left its place", || {
        let mut guest = connect(server.address());
        if guest.read_exact(&mut [0u8; 18]).is_ok() {
            guests.push(guest);
        }
        guests.len() == GUESTS_PER_ADDRESS_MAX as usize
    });
    let mut one_more = connect(server.address());
    let mut input = Vec::new();
    let _ = one_more.read_to_end(&mut input);
    assert!(input.is_empty(), "not even greeted");
    drop((crowd, guests));
    super::support::wait_until("a place is free", || {
        super::client::Client::open(server.address(), &export_name(&attachment, 1, 0)).is_ok()
    });
}

#[test]
fn clients_that_vanish_under_load_leave_no_connection_behind() {
    let server = Server::start();
    let volume = server.create("vol", 64 << 20);
    let attachment = server.attach(&volume, false);
    let mut random = Random::new(seed());
    for round in 0..60u32 {
        let mut client = server.open(&attachment, 1, round % 4);
        // How much the sockets hold, of which nothing is read here, is this machine's to say; where they are full it vanishes.
        client.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        for _ in 0..=random.below(40) {
            let (offset, length) = (random.below(32) << 20, 4096 << random.below(9));
            let (command, payload) = match random.below(2) {
                0 => (Command::Read, Vec::new()),
                _ if length <= 64 << 10 => (Command::Write, vec![1; length as usize]),
                _ => continue,
            };
            if client.throw(command, CommandFlags::NONE, offset, length as u32, &payload).is_err() {
                break;
            }
        }
        if random.below(3) == 0 {
            let _ = client.receive();
        }
    }
    super::support::wait_until("all connections are gone", || {
        server.data.connections_of_volume(volume.volume_uid) == 0
    });
    server.data.release_volume(volume.volume_uid).unwrap();
}
