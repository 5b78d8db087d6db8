//! The generator against a server that behaves and servers that do not.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use proto::nbd::handshake::server::{Event, ServerHandshake};
use proto::nbd::transmission::{REQUEST_BYTES, Request, SimpleReply};
use proto::nbd::{ExportInfo, TransmissionFlags};

use super::{Load, LoadError, Operation, Order, run, verify};
use crate::lying_disk::LyingDisk;

fn load(address: SocketAddr, connections: u32) -> Load {
    Load {
        address,
        export: "any".into(),
        connections,
        depth: 4,
        operation: Operation::Read,
        order: Order::Random,
        block_bytes: 4096,
        warm_up: Duration::ZERO,
        runtime: Duration::from_millis(500),
    }
}

/// One connection that answers every READ as `reply` says: its header and its payload.
fn answering(reply: fn(Request) -> (SimpleReply, Vec<u8>)) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        shake_hands(&mut stream);
        let mut header = [0; REQUEST_BYTES];
        // Until the generator has had enough.
        while stream.read_exact(&mut header).is_ok() {
            let (reply, payload) = reply(Request::decode(&header).unwrap());
            if stream.write_all(&[&reply.encode()[..], &payload].concat()).is_err() {
                return;
            }
        }
    });
    address
}

fn shake_hands(stream: &mut TcpStream) {
    let export = ExportInfo {
        size_bytes: 1 << 20,
        flags: TransmissionFlags::HAS_FLAGS,
        block_sizes: None,
        description: None,
    };
    let (mut out, mut input) = (Vec::new(), [0; 4096]);
    let mut handshake = ServerHandshake::new(&mut out);
    loop {
        stream.write_all(&out).unwrap();
        out.clear();
        if handshake.is_done() {
            return;
        }
        let arrived = stream.read(&mut input).unwrap();
        if let Some(Event::Open(_)) = handshake.handle_bytes(&input[..arrived], &mut out).unwrap() {
            handshake.answer_open(Ok(&export), &mut out).unwrap();
        }
    }
}

#[test]
fn a_server_that_stores_is_verified_and_loaded_on_every_connection() {
    let disk = LyingDisk::start(4 << 20).unwrap();
    for connections in [1, 3] {
        let reads = load(disk.address(), connections);
        verify(&reads, 4 << 20, 7).unwrap();
        for (operation, order) in [(Operation::Read, Order::Random), (Operation::Write, Order::Sequential)] {
            let outcome = run(&Load { operation, order, ..reads.clone() }).unwrap();
            assert!(outcome.ios_of_slowest_connection > 0 && outcome.ios_all >= outcome.ios, "{outcome:?}");
            assert!(outcome.p99_us >= outcome.p50_us && outcome.p50_us > 0.0, "{outcome:?}");
            assert!(outcome.seconds >= 0.5, "{outcome:?}");
        }
    }
}

#[test]
fn large_payloads_that_are_not_copied_are_counted_to_the_byte() {
    let disk = LyingDisk::start(8 << 20).unwrap();
    let reads = Load { block_bytes: 1 << 20, runtime: Duration::from_secs(2), ..load(disk.address(), 2) };
    // One byte too many or too few, and the next header would not begin with its magic.
    assert!(run(&reads).unwrap().ios_all > 8, "more than the first of every slot");
}

#[test]
fn a_server_that_gives_other_bytes_back_is_caught() {
    let address = answering(|request| {
        let reply = SimpleReply { error: 0, cookie: request.cookie };
        (reply, vec![0; request.length_bytes as usize])
    });
    let load = Load { depth: 1, ..load(address, 1) };
    let generator = super::Generator::connect(&load, Some(7)).unwrap();
    let outcome = generator.run(super::Until::Covered { length_bytes: 4096 });
    assert!(matches!(outcome, Err(LoadError::Data(0))), "{outcome:?}");
}

#[test]
fn a_reply_for_nothing_in_flight_ends_the_load() {
    let address = answering(|request| {
        let reply = SimpleReply { error: 0, cookie: request.cookie ^ 1 << 40 };
        (reply, vec![0; request.length_bytes as usize])
    });
    assert!(matches!(run(&load(address, 1)), Err(LoadError::Cookie(_))));
}

#[test]
fn an_error_ends_the_load_and_is_told() {
    let address = answering(|request| (SimpleReply { error: 5, cookie: request.cookie }, Vec::new()));
    assert!(matches!(run(&load(address, 1)), Err(LoadError::Refused { error: 5, .. })));
}

#[test]
fn an_export_without_room_for_every_connection_is_refused() {
    let disk = LyingDisk::start(8192).unwrap();
    assert!(matches!(run(&load(disk.address(), 3)), Err(LoadError::TooSmall { size_bytes: 8192 })));
}
