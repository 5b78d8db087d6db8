//! Random requests, 32 at a time, against a plain array of bytes.

use std::collections::HashMap;
use std::ops::Range;

use proto::nbd::transmission::{Command, CommandFlags};
use server::backend::file::CacheMode;
use server::catalog::BackendKind;

use super::client::Client;
use super::support::{LoopFs, Random, Server, seed};

const CAPACITY_BYTES: u64 = 32 << 20;
const QUEUE_DEPTH: usize = 32;
const REQUESTS: usize = 4000;

struct InFlight {
    range: Range<usize>,
    /// What the model holds there once it is done, or what a read has to bring.
    expected: Vec<u8>,
    command: Command,
}

/// A length that is often small and sometimes large.
fn length_bytes(random: &mut Random, block_bytes: u64) -> u64 {
    let shift = random.below(10);
    (random.below(1 << shift) + 1) * block_bytes.max(1 << 9)
}

fn check(clients: &mut [Client], seed: u64) {
    let mut random = Random::new(seed);
    let mut model = vec![0u8; CAPACITY_BYTES as usize];
    let block_bytes = u64::from(clients[0].info.block_sizes.unwrap().minimum_bytes).max(512);
    let mut in_flight: Vec<HashMap<u64, InFlight>> = clients.iter().map(|_| HashMap::new()).collect();
    for number in 0..REQUESTS {
        let which = number % clients.len();
        while in_flight[which].len() >= QUEUE_DEPTH {
            finish_one(&mut clients[which], &mut in_flight[which], &mut model);
        }
        let length = length_bytes(&mut random, block_bytes).min(CAPACITY_BYTES);
        let offset = random.below((CAPACITY_BYTES - length) / block_bytes + 1) * block_bytes;
        let range = offset as usize..(offset + length) as usize;
        // What overlaps a request in flight has no defined outcome.
        let overlaps = |other: &InFlight| other.range.start < range.end && range.start < other.range.end;
        if in_flight.iter().flat_map(HashMap::values).any(overlaps) {
            continue;
        }
        let fua = if random.below(20) == 0 { CommandFlags::FUA } else { CommandFlags::NONE };
        let no_hole = if random.below(2) == 0 { CommandFlags::NO_HOLE } else { CommandFlags::NONE };
        let (command, flags, expected) = match random.below(10) {
            0..=3 => (Command::Read, CommandFlags::NONE, model[range.clone()].to_vec()),
            4..=7 => {
                let mut data = vec![0; length as usize];
                random.fill(&mut data);
                (Command::Write, fua, data)
            }
            8 => (Command::WriteZeroes, fua.with(no_hole), vec![0; length as usize]),
            // Both backends give zeroes after TRIM; NBD would allow anything.
            _ => (Command::Trim, fua, vec![0; length as usize]),
        };
        let payload: &[u8] = if command == Command::Write { &expected } else { &[] };
        let cookie = clients[which].send(command, flags, offset, length as u32, payload);
        in_flight[which].insert(cookie, InFlight { range, expected, command });
    }
    for (client, in_flight) in clients.iter_mut().zip(&mut in_flight) {
        while !in_flight.is_empty() {
            finish_one(client, in_flight, &mut model);
        }
    }
    clients[0].flush().unwrap();
    for at in (0..CAPACITY_BYTES).step_by(1 << 20) {
        let read = clients[0].read(at, 1 << 20).unwrap();
        assert!(read == model[at as usize..][..1 << 20], "seed {seed}: the megabyte at {at} differs");
    }
}

fn finish_one(client: &mut Client, in_flight: &mut HashMap<u64, InFlight>, model: &mut [u8]) {
    let answer = client.receive().unwrap();
    let request = in_flight.remove(&answer.cookie).expect("a reply to nothing");
    assert_eq!(answer.error, 0, "{:?} at {:?}", request.command, request.range);
    if request.command == Command::Read {
        assert!(answer.payload == request.expected, "read at {:?} differs", request.range);
    } else {
        model[request.range].copy_from_slice(&request.expected);
    }
}

fn check_backend(server: &Server, backend: BackendKind, connections: u32, seed: u64) {
    let volume =
        server.create_with(&format!("model-{connections}"), CAPACITY_BYTES, |new| new.backend = backend);
    let attachment = server.attach(&volume, false);
    let mut clients: Vec<Client> = (0..connections).map(|slot| server.open(&attachment, 1, slot)).collect();
    check(&mut clients, seed);
}

#[test]
fn a_file_behaves_like_an_array_of_bytes() {
    let server = Server::start();
    check_backend(&server, BackendKind::File, 1, seed());
    check_backend(&server, BackendKind::File, 3, seed());
}

#[test]
fn a_file_through_the_page_cache_behaves_like_an_array_of_bytes() {
    let server = Server::start_with(|config| config.cache = CacheMode::Buffered);
    check_backend(&server, BackendKind::File, 2, seed());
}

#[test]
fn a_file_on_xfs_behaves_like_an_array_of_bytes() {
    let Some(fs) = LoopFs::new("xfs", 320 << 20) else { return };
    let server = Server::start_with(|config| config.volumes_dir = fs.mount.clone());
    check_backend(&server, BackendKind::File, 2, seed());
}

#[test]
fn memory_behaves_like_an_array_of_bytes() {
    let server = Server::start();
    check_backend(&server, BackendKind::Memory, 1, seed());
    check_backend(&server, BackendKind::Memory, 3, seed());
}
