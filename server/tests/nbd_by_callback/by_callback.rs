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
    const FOREIGN: u8 = 0xee;
    let server = Server::start_with(|config| config.threads = 1);
    let other = server.attach(&server.create("other", 16 << 20), false);
    let mut others: Vec<Client> = (0..4).map(|slot| server.open(&other, 1, slot)).collect();
    for number in 0..16u64 {
        others[0].write(number << 20, &vec![FOREIGN; 1 << 20]).unwrap();
    }
    let volume = server.create("vol", 64 << 20);
    let attachment = server.attach(&volume, false);
    let mut client = server.open(&attachment, 1, 0);
    server.cluster().wish(|wishes| wishes.holds_writes = true);
    for number in 0..16u64 {
        let own = vec![number as u8 + 1; 1 << 20];
        client.send(Command::Write, CommandFlags::NONE, number << 20, 1 << 20, &own);
    }
    wait_until("the backend has them", || server.cluster().wishes().in_flight == 16);
    drop(client);
    let (sender, opened) = mpsc::channel();
    let (address, name) = (server.address(), export_name(&attachment, 2, 0));
    let opener = std::thread::spawn(move || sender.send(Client::open(address, &name).unwrap()).unwrap());
    assert!(opened.recv_timeout(LOOK).is_err(), "let in while writes of the one before it are in flight");
    // As many at once as others may have buffers of that size, and every one of them is filled.
    for _ in 0..4 {
        for client in &mut others {
            for number in 0..16u64 {
                client.send(Command::Read, CommandFlags::NONE, number << 20, 1 << 20, &[]);
            }
        }
        for client in &mut others {
            for _ in 0..16 {
                let answer = client.receive().unwrap();
                assert!(
                    answer.error == 0 && answer.payload == vec![FOREIGN; 1 << 20],
                    "a foreign byte was read"
                );
            }
        }
    }
    assert!(opened.try_recv().is_err());
    server.cluster().wish(|wishes| wishes.holds_writes = false);
    let mut new = opened.recv_timeout(DEADLINE).unwrap();
    opener.join().unwrap();
    for number in 0..16u64 {
        let read = new.read(number << 20, 1 << 20).unwrap();
        let own = read.iter().take_while(|byte| **byte == number as u8 + 1).count();
        assert_eq!(own, 1 << 20, "megabyte {number} has {:#x} then", read[own.min(read.len() - 1)]);
    }
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
