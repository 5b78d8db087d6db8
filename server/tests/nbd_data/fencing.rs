//! No write lands twice or late: epochs, slots, fences and locks, with I/O that hangs in a frozen file system.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::sync::mpsc;
use std::time::Duration;

use proto::nbd::transmission::{Command, CommandFlags};
use proto::nbd::{info, option, reply};
use rustix::fs::{FlockOperation, flock};
use server::backend::file;
use server::catalog::VolumeRecord;
use server::data::config::DataServerConfig;

use super::chunks::{greet, receive_option_reply, send_option};
use super::client::{Client, OpenFailed};
use super::support::{DEADLINE, FragileServer, Server, export_name, wait_until};

fn is_refused(result: Result<Client, OpenFailed>) -> bool {
    matches!(result, Err(OpenFailed::Handshake(_)))
}

#[test]
fn a_higher_epoch_closes_every_lower_connection() {
    let server = Server::start();
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    let mut old: Vec<Client> = (0..4).map(|slot| server.open(&attachment, 1, slot)).collect();
    assert_eq!(server.data.connections_of(attachment.attachment_id), 4);
    let mut new = server.open(&attachment, 2, 0);
    assert!(old.iter_mut().all(Client::is_closed_by_server));
    new.write(0, &[1; 4096]).unwrap();
    let recorded = server.catalog.attachment(attachment.attachment_id).unwrap().unwrap();
    assert_eq!(recorded.session_epoch, 2, "recorded before it was granted");
    assert!(is_refused(Client::open(server.address(), &export_name(&attachment, 1, 9))));
    assert_eq!(server.data.connections_of(attachment.attachment_id), 1);
}

#[test]
fn a_slot_is_taken_over_and_the_others_live() {
    let server = Server::start();
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    let mut first = server.open(&attachment, 1, 0);
    let mut second = server.open(&attachment, 1, 1);
    let mut third = server.open(&attachment, 1, 0);
    assert!(first.is_closed_by_server());
    second.write(0, &[1; 4096]).unwrap();
    assert_eq!(third.read(0, 4096), Ok(vec![1; 4096]));
}

#[test]
fn an_ended_attachment_is_fenced_for_good() {
    let server = Server::start();
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    let mut client = server.open(&attachment, 1, 0);
    server.catalog.end_attachment(attachment.attachment_id, true).unwrap();
    server.data.fence_attachment(attachment.attachment_id).unwrap();
    assert!(client.is_closed_by_server());
    assert_eq!(server.data.connections_of(attachment.attachment_id), 0);
    assert!(is_refused(Client::open(server.address(), &export_name(&attachment, 2, 0))));
    server.catalog.remove_attachment(attachment.attachment_id).unwrap();
    let next = server.attach(&volume, false);
    server.open(&next, 1, 0).write(0, &[1; 4096]).unwrap();
}

#[test]
fn fencing_what_is_not_connected_returns_at_once() {
    let server = Server::start();
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    server.data.fence_attachment(attachment.attachment_id).unwrap();
    assert!(is_refused(Client::open(server.address(), &export_name(&attachment, 1, 0))), "same generation");
    server.data.fence_named_writers(volume.volume_uid).unwrap();
}

/// A write of the old session hangs in the file system; whoever comes next has to wait for it.
#[test]
fn a_new_session_waits_for_the_last_write_of_the_old_one() {
    let Some(fragile) = FragileServer::start_with(|_| {}) else { return };
    let server = &fragile.server;
    for (old_epoch, new_epoch) in [(1, 2), (2, 2)] {
        let volume = server.create(&format!("vol-{old_epoch}"), 16 << 20);
        let attachment = server.attach(&volume, false);
        let mut old = server.open(&attachment, old_epoch, 0);
        old.write(0, &[1; 4096]).unwrap();
        let frozen = fragile.freeze();
        old.send(Command::Write, CommandFlags::NONE, 0, 4096, &[2; 4096]);
        // The write is in the kernel when a read that was sent after it is answered.
        old.send(Command::Read, CommandFlags::NONE, 1 << 20, 4096, &[]);
        old.receive().unwrap();

        let (sender, opened) = mpsc::channel();
        let (address, name) = (server.address(), export_name(&attachment, new_epoch, 0));
        let opener = std::thread::spawn(move || sender.send(Client::open(address, &name).unwrap()).unwrap());
        assert!(old.is_closed_by_server(), "the old connection is closed at once");
        let early = opened.recv_timeout(Duration::from_millis(500));
        assert!(early.is_err(), "the new session was let in while a write of the old one was in the kernel");
        drop(frozen);
        let mut new = opened.recv_timeout(DEADLINE).unwrap();
        opener.join().unwrap();
        assert_eq!(new.read(0, 4096), Ok(vec![2; 4096]), "the old write has landed, and before");
        new.write(0, &[3; 4096]).unwrap();
        assert_eq!(new.read(0, 4096), Ok(vec![3; 4096]));
    }
}

#[test]
fn a_fence_that_cannot_drain_says_so_and_can_be_repeated() {
    let change = |config: &mut DataServerConfig| config.limits.fence_timeout = Duration::from_millis(300);
    let Some(fragile) = FragileServer::start_with(change) else { return };
    let server = &fragile.server;
    let volume = server.create("vol", 16 << 20);
    let attachment = server.attach(&volume, false);
    let mut client = server.open(&attachment, 1, 0);
    client.write(0, &[1; 4096]).unwrap();
    let frozen = fragile.freeze();
    client.send(Command::Write, CommandFlags::NONE, 0, 4096, &[2; 4096]);
    client.send(Command::Read, CommandFlags::NONE, 1 << 20, 4096, &[]);
    client.receive().unwrap();
    assert!(server.data.fence_attachment(attachment.attachment_id).is_err());
    assert!(is_refused(Client::open(server.address(), &export_name(&attachment, 2, 0))), "refused meanwhile");
    drop(frozen);
    wait_until("the fence to drain", || server.data.fence_attachment(attachment.attachment_id).is_ok());
}

/// Locks a volume's file as another process would.
fn lock(server: &Server, volume: &VolumeRecord) -> File {
    let path = file::path(&server.volumes_dir, volume.volume_uid);
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    file
}

#[test]
fn a_locked_file_is_served_when_its_predecessor_has_let_go() {
    let server = Server::start();
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    let predecessor = lock(&server, &volume);
    let (sender, opened) = mpsc::channel();
    let (address, name) = (server.address(), export_name(&attachment, 1, 0));
    let opener = std::thread::spawn(move || sender.send(Client::open(address, &name).unwrap()).unwrap());
    assert!(opened.recv_timeout(Duration::from_millis(300)).is_err(), "it was served under a foreign lock");
    drop(predecessor);
    opened.recv_timeout(DEADLINE).unwrap().write(0, &[1; 4096]).unwrap();
    opener.join().unwrap();
}

#[test]
fn a_lock_that_is_never_free_refuses_the_open_in_time() {
    let server = Server::start_with(|config| config.limits.open_timeout = Duration::from_millis(200));
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    let other = lock(&server, &volume);
    assert!(is_refused(Client::open(server.address(), &export_name(&attachment, 1, 0))));
    drop(other);
    wait_until("the volume can be opened", || {
        Client::open(server.address(), &export_name(&attachment, 1, 0)).is_ok()
    });
}

/// One client, two volumes that are both locked: the first is refused in time, and free while the second is still waited for.
#[test]
fn an_open_is_never_answered_with_the_volume_that_an_earlier_one_asked_for() {
    let server = Server::start_with(|config| {
        config.export_by_name = true;
        // What comes after the first refusal has to be done within it, on a busy machine, too.
        config.limits.open_timeout = Duration::from_secs(15);
    });
    let [(a, a_lock), (b, b_lock)] = [("a", 1 << 20), ("b", 2 << 20)].map(|(name, capacity_bytes)| {
        let volume = server.create(name, capacity_bytes);
        let lock = lock(&server, &volume);
        (volume, lock)
    });
    let mut stream = greet(server.address(), 3);
    let go = |name: &str| [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
    send_option(&mut stream, option::GO, &go("a"));
    assert_eq!(receive_option_reply(&mut stream, option::GO).0, reply::ERR_SHUTDOWN);
    send_option(&mut stream, option::GO, &go("b"));
    wait_until("the second is asked for", || server.data.connections_of_volume(b.volume_uid) == 1);
    drop(a_lock);
    // Another client is served with it: whatever the server had to say of it, it has said.
    wait_until("the first volume is open", || Client::open(server.address(), &a.name).is_ok());
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(stream.peek(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "an answer for the second");
    drop(b_lock);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (kind, data) = receive_option_reply(&mut stream, option::GO);
    assert_eq!((kind, &data[..2]), (reply::INFO, &info::EXPORT.to_be_bytes()[..]));
    assert_eq!(data[2..10], b.capacity_bytes.to_be_bytes(), "the size of the second volume");
}
