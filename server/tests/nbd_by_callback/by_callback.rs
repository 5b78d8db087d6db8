//! What only a backend that completes by call-back can show: operations that are dropped, and those that nobody waits for any more.

use std::sync::mpsc;
use std::time::Duration;

use proto::nbd::transmission::{Command, CommandFlags, NbdError};

use super::client::Client;
use super::support::{DEADLINE, Server, export_name, wait_until};

/// How long is looked whether something happens that must not.
const LOOK: Duration = Duration::from_millis(300);

#[test]
fn operations_end_late_out_of_order_and_in_part() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", 64 << 20);
    let mut order = Vec::new();
    // As often as it takes for chance to have done each.
    wait_until("each has happened", || {
        let cookies: Vec<u64> = (0..64u64)
            .map(|n| client.send(Command::Write, CommandFlags::NONE, n << 16, 8192, &[n as u8; 8192]))
            .collect();
        let answers: Vec<u64> = cookies.iter().map(|_| client.receive().unwrap().cookie).collect();
        order.push(answers == cookies);
        let wishes = server.cluster().wishes();
        wishes.overtaken > 0 && wishes.continued > 0 && order.contains(&false)
    });
    for n in 0..64u64 {
        assert_eq!(client.read(n << 16, 8192), Ok(vec![n as u8; 8192]));
    }
    assert_eq!(server.cluster().wishes().in_flight, 0);
}

#[test]
fn flush_and_fua_reach_the_backend_and_nothing_else_does() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", 1 << 20);
    let syncs = || server.cluster().wishes().syncs;
    client.write(0, &[1; 4096]).unwrap();
    client.read(0, 4096).unwrap();
    assert_eq!(syncs(), 0);
    client.flush().unwrap();
    assert_eq!(syncs(), 1);
    client.call(Command::Write, CommandFlags::FUA, 0, 4096, &[2; 4096]).unwrap();
    client.call(Command::Trim, CommandFlags::FUA, 0, 4096, &[]).unwrap();
    client.call(Command::WriteZeroes, CommandFlags::FUA, 0, 4096, &[]).unwrap();
    assert_eq!(syncs(), 4);
}

#[test]
fn an_operation_that_the_backend_drops_is_an_error_and_the_connection_lives() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", 1 << 20);
    client.write(0, &[1; 4096]).unwrap();
    server.cluster().wish(|wishes| wishes.drops = 2);
    assert_eq!(client.read(0, 4096), Err(NbdError::Eio as u32));
    assert_eq!(client.write(0, &[2; 4096]), Err(NbdError::Eio as u32));
    assert_eq!(client.read(0, 4096), Ok(vec![1; 4096]));
}

/// The buffers of operations that nobody waits for any more are not given to others before these have ended.
#[test]
fn a_client_that_dies_leaves_its_writes_in_flight_and_their_bytes_as_they_were() {
    let server = Server::start_with(|config| config.threads = 1);
    let volume = server.create("vol", 64 << 20);
    let attachment = server.attach(&volume, false);
    let mut client = server.open(&attachment, 1, 0);
    server.cluster().wish(|wishes| wishes.holds_writes = true);
    for number in 0..16u64 {
        client.send(
            Command::Write,
            CommandFlags::NONE,
            number << 20,
            1 << 20,
            &vec![number as u8 + 1; 1 << 20],
        );
    }
    wait_until("the backend has them", || server.cluster().wishes().in_flight == 16);
    drop(client);
    // As many buffers of that size as the server has beside.
    let (_, mut other) = server.open_new("other", 64 << 20);
    for number in 0..64u64 {
        assert_eq!(other.read((number % 32) << 20, 1 << 20), Ok(vec![0; 1 << 20]));
    }
    let (sender, opened) = mpsc::channel();
    let (address, name) = (server.address(), export_name(&attachment, 2, 0));
    let opener = std::thread::spawn(move || sender.send(Client::open(address, &name).unwrap()).unwrap());
    assert!(opened.recv_timeout(LOOK).is_err(), "let in while writes of the one before it are in flight");
    server.cluster().wish(|wishes| wishes.holds_writes = false);
    let mut new = opened.recv_timeout(DEADLINE).unwrap();
    opener.join().unwrap();
    // A write that was done in part is not continued for a client that is gone.
    let mut landed_bytes = 0;
    for number in 0..16u64 {
        let read = new.read(number << 20, 1 << 20).unwrap();
        let written = read.iter().take_while(|byte| **byte == number as u8 + 1).count();
        assert!(read[written..].iter().all(|byte| *byte == 0), "megabyte {number} has bytes of nobody");
        landed_bytes += written;
    }
    assert!(landed_bytes > 1 << 20, "{landed_bytes} bytes");
}

#[test]
fn a_shutdown_waits_for_what_the_backend_has() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", 1 << 20);
    server.cluster().wish(|wishes| wishes.holds_writes = true);
    client.send(Command::Write, CommandFlags::NONE, 0, 4096, &[1; 4096]);
    wait_until("the backend has it", || server.cluster().wishes().in_flight == 1);
    std::thread::scope(|scope| {
        let shutdown = scope.spawn(|| server.data.shutdown());
        std::thread::sleep(LOOK);
        assert!(!shutdown.is_finished());
        server.cluster().wish(|wishes| wishes.holds_writes = false);
        assert!(shutdown.join().unwrap());
    });
    assert_eq!(client.receive().unwrap().error, 0, "and answers it");
}
