//! An attachment with several addresses: each is tried in turn, only the right server is used, and only it is believed when it
//! says that the attachment is no more.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use client::contract::DeviceSpec;
use client::device::connect::dial::OPEN_TIMEOUT;
use client::device::connect::slots::{SlotError, dial_others, dial_slot};
use proto::export_name::{ExportDescription, ExportRefusal};
use proto::nbd::handshake::server::{Event, Refusal, ServerHandshake};
use proto::nbd::{ExportInfo, TransmissionFlags};
use uuid::Uuid;

const OURS: Uuid = Uuid::from_u128(1);
const OTHER: Uuid = Uuid::from_u128(2);
const VOLUME: Uuid = Uuid::from_u128(3);

/// What a server answers to GO.
#[derive(Clone)]
enum Answer {
    Opens(String),
    Refuses(String),
    Nothing,
    /// The first so many connections are served, the next are closed.
    Limits(usize),
    /// The first is served, the others wait.
    OneByOne,
}

/// A server of this answer: its address, and how often it was connected to.
fn server(answer: Answer) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let visits = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&visits);
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for peer in listener.incoming().flatten() {
            let number = counter.fetch_add(1, Ordering::SeqCst);
            let opens = Answer::Opens("a disk of somebody else's".to_owned());
            match &answer {
                Answer::Nothing => held.push(peer),
                Answer::Limits(most) if number >= *most => drop(peer),
                Answer::OneByOne if number >= 1 => held.push(peer),
                Answer::Limits(_) | Answer::OneByOne => drop(std::thread::spawn(move || serve(peer, &opens))),
                answer => serve(peer, answer),
            }
        }
    });
    (address, visits)
}

fn serve(mut peer: TcpStream, answer: &Answer) {
    let mut out = Vec::new();
    let mut handshake = ServerHandshake::new(&mut out);
    let mut arrived = [0; 4096];
    loop {
        if peer.write_all(&std::mem::take(&mut out)).is_err() {
            return;
        }
        let Ok(count @ 1..) = peer.read(&mut arrived) else { return };
        let Ok(event) = handshake.handle_bytes(&arrived[..count], &mut out) else { return };
        if let Some(Event::Open(_)) = event {
            let answer = match answer {
                Answer::Opens(description) => Ok(ExportInfo {
                    size_bytes: 1 << 30,
                    flags: TransmissionFlags::HAS_FLAGS,
                    block_sizes: None,
                    description: Some(description.clone()),
                }),
                Answer::Refuses(text) => Err(Refusal::unknown(text.clone())),
                _ => unreachable!("it does not get here"),
            };
            handshake.answer_open(answer.as_ref().map_err(Clone::clone), &mut out).unwrap();
        }
    }
}

fn describes(server_id: Uuid, volume_uid: Uuid) -> Answer {
    Answer::Opens(ExportDescription { server_id, volume_uid, incarnation: "boot.1".into() }.to_string())
}

fn refuses(server_id: Uuid) -> Answer {
    Answer::Refuses(ExportRefusal { reason: "the attachment has been fenced", server_id }.to_string())
}

fn spec(addresses: &[&String]) -> DeviceSpec {
    serde_json::from_value(serde_json::json!({
        "format_version": 1,
        "attachment_id": Uuid::from_u128(4),
        "target": "vol-1",
        "addresses": addresses,
        "export": {
            "kind": "attachment",
            "secret": "ab".repeat(32),
            "session_epoch": 1,
            "server_id": OURS,
            "volume_uid": VOLUME,
        },
        "read_only": false,
        "data_path": "auto",
        "nr_hw_queues": 1,
        "queue_depth": 1,
        "block_size_bytes": 0,
        "device_link": "/dev/volnode/vol-1",
    }))
    .unwrap()
}

#[test]
fn servers_that_are_not_the_right_one_are_passed_over() {
    let (right, _) = server(describes(OURS, VOLUME));
    let wrong = [
        describes(OTHER, VOLUME),
        describes(OURS, OTHER),
        Answer::Opens("a nice disk".into()),
        Answer::Refuses("export not found".into()),
        refuses(OTHER),
    ];
    for answer in wrong {
        let (address, visits) = server(answer);
        let dialled = dial_slot(&spec(&[&address, &right]), 0, None, OPEN_TIMEOUT).unwrap();
        assert_eq!((dialled.address, visits.load(Ordering::SeqCst)), (right.clone(), 1));
    }
}

#[test]
fn a_silent_server_is_passed_over_after_ten_seconds_and_the_one_that_worked_comes_first() {
    let (right, _) = server(describes(OURS, VOLUME));
    let (silent, visits) = server(Answer::Nothing);
    let spec = spec(&[&silent, &right]);
    let started = Instant::now();
    assert_eq!(dial_slot(&spec, 0, None, OPEN_TIMEOUT).unwrap().address, right);
    let took = started.elapsed();
    assert!((Duration::from_secs(9)..Duration::from_secs(30)).contains(&took), "{took:?}");
    let started = Instant::now();
    assert_eq!(dial_slot(&spec, 1, Some(&right), OPEN_TIMEOUT).unwrap().address, right);
    assert!(started.elapsed() < Duration::from_secs(9));
    assert_eq!(visits.load(Ordering::SeqCst), 1);
}

#[test]
fn the_right_server_s_refusal_is_the_end() {
    let (fencing, _) = server(refuses(OURS));
    let (next, visits) = server(describes(OURS, VOLUME));
    let ended = dial_slot(&spec(&[&fencing, &next]), 0, None, OPEN_TIMEOUT).unwrap_err();
    assert!(matches!(&ended, SlotError::Ended { address, .. } if *address == fencing), "{ended}");
    assert!(ended.to_string().contains("has been fenced"), "{ended}");
    assert_eq!(visits.load(Ordering::SeqCst), 0, "nobody else was asked");
}

#[test]
fn where_all_are_wrong_the_error_names_each_and_why() {
    let (other, _) = server(describes(OTHER, VOLUME));
    let (unknown, _) = server(Answer::Refuses("export not found".into()));
    // Taken, so that nobody else listens there meanwhile, and closed.
    let taken = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    taken.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let closed = taken.local_addr().unwrap().as_socket().unwrap().to_string();
    let error = dial_slot(&spec(&[&other, &unknown, &closed]), 0, None, OPEN_TIMEOUT).unwrap_err();
    assert!(matches!(&error, SlotError::PassedOver(all) if all.len() == 3), "{error}");
    let text = error.to_string();
    let told = [&other, &unknown, &closed, &OTHER.to_string(), "export not found", "refused"];
    for part in told.map(AsRef::<str>::as_ref) {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
}

/// Of somebody else's server, with so many connections asked for; 0: as many as there can be.
fn foreign_spec(address: &str, nr_connections: u16) -> DeviceSpec {
    let mut spec = serde_json::to_value(spec(&[&address.to_owned()])).unwrap();
    spec["export"] = serde_json::json!({ "kind": "nbd", "export_name": "disk" });
    spec["nr_connections"] = nr_connections.into();
    serde_json::from_value(spec).unwrap()
}

#[test]
fn a_server_that_grants_fewer_connections_has_a_disk_with_those() {
    for (answer, granted) in [(Answer::Limits(1), 1), (Answer::Limits(3), 3), (Answer::OneByOne, 1)] {
        let (address, _) = server(answer);
        let spec = foreign_spec(&address, 0);
        let first = dial_slot(&spec, 0, None, OPEN_TIMEOUT).unwrap();
        assert_eq!(dial_others(&spec, first, 4).unwrap().len(), granted);
    }
    let (address, _) = server(Answer::Limits(2));
    let spec = foreign_spec(&address, 4);
    let first = dial_slot(&spec, 0, None, OPEN_TIMEOUT).unwrap();
    let refused = dial_others(&spec, first, 4).unwrap_err().to_string();
    assert!(refused.contains("grants 2 of the 4") && refused.contains("--connections"), "{refused}");
}
