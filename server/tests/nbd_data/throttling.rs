//! Limits of a volume, and the first write to one that nobody has written to.

use std::thread;
use std::time::{Duration, Instant};

use proto::export_name::PROBE_SLOT;
use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use server::catalog::{AttachmentRecord, BackendKind, Content, VolumeLimits, VolumeRecord};

use super::client::Client;
use super::support::{DEADLINE, Server};

/// Of a rate that is measured again where the machine was too slow for it.
const TRIES: u32 = 4;

fn set_limits(server: &Server, volume: &VolumeRecord, limits: VolumeLimits) {
    server.catalog.set_limits(volume.volume_uid, &limits).unwrap();
    server.data.limits_changed(&server.catalog.volume_by_uid(volume.volume_uid).unwrap().unwrap());
}

fn read_iops(read_iops: u64) -> VolumeLimits {
    VolumeLimits { read_iops, ..VolumeLimits::default() }
}

/// Requests that one connection after another gets answered in so long, with so many of each in flight.
fn answered(
    server: &Server,
    attachment: &AttachmentRecord,
    connections: u32,
    length: Duration,
    (command, length_bytes, depth): (Command, u32, usize),
) -> Vec<u64> {
    let payload = if command == Command::Write { vec![7; length_bytes as usize] } else { Vec::new() };
    let clients: Vec<Client> = (0..connections).map(|slot| server.open(attachment, 1, slot)).collect();
    let end = Instant::now() + length;
    let payload = &payload;
    thread::scope(|scope| {
        let threads: Vec<_> = clients
            .into_iter()
            .map(|mut client| {
                scope.spawn(move || {
                    let mut done = 0;
                    for _ in 0..depth {
                        client.send(command, CommandFlags::NONE, 0, length_bytes, payload);
                    }
                    loop {
                        assert_eq!(client.receive().unwrap().error, 0);
                        if Instant::now() >= end {
                            return done;
                        }
                        done += 1;
                        client.send(command, CommandFlags::NONE, 0, length_bytes, payload);
                    }
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// What is done in a few seconds is the rate, for as many connections as there are; no machine is too slow not to exceed it.
#[test]
fn requests_and_bytes_are_served_at_the_rate_that_is_set() {
    const LENGTH: Duration = Duration::from_secs(3);
    let cases = [
        (read_iops(400), (Command::Read, 4096, 16), 400),
        (VolumeLimits { write_iops: 400, ..VolumeLimits::default() }, (Command::Write, 4096, 16), 400),
        (
            VolumeLimits { read_bytes_per_second: 40 << 20, ..VolumeLimits::default() },
            (Command::Read, 1 << 20, 2),
            40,
        ),
        (
            VolumeLimits { write_bytes_per_second: 40 << 20, ..VolumeLimits::default() },
            (Command::Write, 1 << 20, 2),
            40,
        ),
    ];
    let server = Server::start();
    let volume = server.create("vol", 16 << 20);
    let attachment = server.attach(&volume, false);
    for (limits, load, per_second) in cases {
        let mut is_reached = false;
        for _ in 0..TRIES {
            set_limits(&server, &volume, VolumeLimits::default());
            set_limits(&server, &volume, limits);
            let done: u64 = answered(&server, &attachment, 3, LENGTH, load).iter().sum();
            let expected = per_second * LENGTH.as_secs();
            // A tenth of a second is saved up while nobody asks, and one request begins at once.
            let most = expected + per_second / 10 + 2;
            println!("{load:?}: {done} of {expected}");
            assert!(done <= most, "{done} of {expected} for {limits:?}");
            is_reached |= done * 100 >= expected * 95;
            if is_reached {
                break;
            }
        }
        assert!(is_reached, "not even nearly what is allowed: {limits:?}");
    }
    assert!(server.data.throttled(volume.volume_uid) > LENGTH);
}

/// The payloads of WRITEs that wait behind a READ are taken in after a while, so that the stream goes on: up to all that one connection may
/// hold. The READ needs a buffer, too.
#[test]
fn a_read_whose_turn_it_is_does_not_wait_for_the_buffers_of_writes_behind_it() {
    let server = Server::start();
    let volume = server.create("vol", 64 << 20);
    let attachment = server.attach(&volume, false);
    let mut client = server.open(&attachment, 1, 0);
    let limits = VolumeLimits { read_bytes_per_second: 1 << 20, ..VolumeLimits::default() };
    set_limits(&server, &volume, limits);
    for _ in 0..2 {
        client.send(Command::Read, CommandFlags::NONE, 0, 4 << 20, &[]);
    }
    for number in 0..16u64 {
        client.send(Command::Write, CommandFlags::NONE, (8 + number) << 20, 1 << 20, &vec![7; 1 << 20]);
    }
    for _ in 0..18 {
        assert_eq!(client.receive().unwrap().error, 0);
    }
}

#[test]
fn every_connection_has_the_same_share_whichever_ring_it_is_on() {
    let server = Server::start();
    let volume = server.create("vol", 16 << 20);
    let attachment = server.attach(&volume, false);
    for _ in 0..TRIES {
        set_limits(&server, &volume, VolumeLimits::default());
        set_limits(&server, &volume, read_iops(500));
        let done = answered(&server, &attachment, 5, Duration::from_secs(3), (Command::Read, 4096, 8));
        println!("{done:?}");
        let (least, most) = (*done.iter().min().unwrap(), *done.iter().max().unwrap());
        if least * 100 >= most * 90 {
            return;
        }
    }
    panic!("connections have had unequal shares");
}

/// Sixty seconds of reads, or more, wait; then there is another limit, or none.
#[test]
fn a_change_holds_at_once_for_those_who_wait() {
    let server = Server::start();
    for (name, limits) in [("faster", read_iops(10_000)), ("none", VolumeLimits::default())] {
        let (volume, mut client) = server.open_new(name, 1 << 20);
        set_limits(&server, &volume, read_iops(1));
        for _ in 0..100 {
            client.send(Command::Read, CommandFlags::NONE, 0, 4096, &[]);
        }
        client.receive().unwrap();
        let began = Instant::now();
        set_limits(&server, &volume, limits);
        for _ in 1..100 {
            assert_eq!(client.receive().unwrap().error, 0);
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        // And back.
        set_limits(&server, &volume, read_iops(1));
        client.read(0, 4096).unwrap();
        let began = Instant::now();
        client.read(0, 4096).unwrap();
        assert!(began.elapsed() > Duration::from_millis(700), "{:?}", began.elapsed());
    }
}

#[test]
fn what_moves_no_data_and_a_probe_do_not_wait() {
    let server = Server::start();
    let (volume, mut client) = server.open_new("vol", 1 << 20);
    let attachment = server.catalog.attachments_of_volume(volume.volume_uid).unwrap().remove(0).0;
    set_limits(&server, &volume, VolumeLimits { read_iops: 1, write_iops: 1, ..VolumeLimits::default() });
    let began = Instant::now();
    for _ in 0..50 {
        client.flush().unwrap();
    }
    for _ in 0..50 {
        // A ping: refused at once.
        assert_eq!(client.read(0, 0).unwrap_err(), NbdError::Einval as u32);
    }
    let mut probe = server.open(&attachment, 1, PROBE_SLOT);
    for _ in 0..50 {
        probe.read(0, 4096).unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    // Two that count, of which the second waits.
    for command in [Command::Trim, Command::WriteZeroes] {
        client.call(command, CommandFlags::NONE, 0, 4096, &[]).unwrap();
    }
    let waited = server.data.throttled(volume.volume_uid);
    assert!(waited > Duration::from_millis(500), "{waited:?}");
}

/// A client that hears nothing asks by a READ of nothing behind all that it sent: that is not taken for a dead connection.
#[test]
fn a_ping_behind_requests_that_wait_for_long_is_answered() {
    let server = Server::start();
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    set_limits(&server, &volume, VolumeLimits { read_iops: 1, write_iops: 1, ..VolumeLimits::default() });
    let payload = vec![7; 64 << 10];
    for (command, payload) in [(Command::Read, &payload[..0]), (Command::Write, &payload[..])] {
        let mut clients: Vec<Client> = (0..8).map(|slot| server.open(&attachment, 1, slot)).collect();
        for client in &mut clients {
            for _ in 0..8 {
                client.send(command, CommandFlags::NONE, 0, 64 << 10, payload);
            }
        }
        // 64 of them take a minute.
        let began = Instant::now();
        let client = clients.last_mut().unwrap();
        let ping = client.send(Command::Read, CommandFlags::NONE, 0, 0, &[]);
        let mut before = 0;
        loop {
            let answer = client.receive().unwrap();
            if answer.cookie == ping {
                assert_eq!(answer.error, NbdError::Einval as u32);
                break;
            }
            before += 1;
        }
        assert!(before < 3, "{command:?}: {before} replies before the ping's");
        assert!(began.elapsed() < Duration::from_secs(20), "{command:?}: {:?}", began.elapsed());
        // Whoever waits does not keep the volume from being taken away.
        server.data.reopen_attachments(volume.volume_uid);
    }
}

/// A connection that is closed in good order gets all its answers, also of what waits.
#[test]
fn what_waits_when_a_client_says_goodbye_is_still_done() {
    let server = Server::start();
    let (volume, mut client) = server.open_new("vol", 1 << 20);
    set_limits(&server, &volume, VolumeLimits { write_iops: 4, ..VolumeLimits::default() });
    for number in 0..8u8 {
        client.send(Command::Write, CommandFlags::NONE, u64::from(number) * 512, 512, &[number + 1; 512]);
    }
    client.send(Command::Disconnect, CommandFlags::NONE, 0, 0, &[]);
    for _ in 0..8 {
        assert_eq!(client.receive().unwrap().error, 0);
    }
    assert!(client.is_closed_by_server());
    set_limits(&server, &volume, VolumeLimits::default());
    let attachment = server.catalog.attachments_of_volume(volume.volume_uid).unwrap().remove(0).0;
    let read = server.open(&attachment, 2, 0).read(0, 8 * 512).unwrap();
    assert!((0..8).all(|number| read[number * 512..][..512] == [number as u8 + 1; 512]));
}

fn content_of(server: &Server, volume: &VolumeRecord) -> Content {
    server.catalog.volume_by_uid(volume.volume_uid).unwrap().unwrap().settings.content
}

#[test]
fn a_volume_is_marked_before_its_first_write_is_answered_and_by_nothing_else() {
    let server = Server::start();
    for (name, backend, command) in [
        ("write", BackendKind::File, Command::Write),
        ("zeroes", BackendKind::File, Command::WriteZeroes),
        ("memory", BackendKind::Memory, Command::Write),
    ] {
        let volume = server.create_with(name, 1 << 20, |new| {
            new.backend = backend;
            new.settings.content = Content::NeverWritten;
        });
        let attachment = server.attach(&volume, false);
        let mut clients: Vec<Client> = (0..4).map(|slot| server.open(&attachment, 1, slot)).collect();
        for client in &mut clients {
            client.read(0, 4096).unwrap();
            client.flush().unwrap();
            client.call(Command::Trim, CommandFlags::NONE, 0, 4096, &[]).unwrap();
        }
        assert_eq!(content_of(&server, &volume), Content::NeverWritten, "{name}");
        let payload = if command == Command::Write { vec![9; 4096] } else { Vec::new() };
        // All at once, from both rings.
        for (at, client) in clients.iter_mut().enumerate() {
            for part in 0..8 {
                client.send(command, CommandFlags::NONE, (at as u64 * 8 + part) * 4096, 4096, &payload);
            }
        }
        for client in &mut clients {
            assert_eq!(client.receive().unwrap().error, 0);
            assert_eq!(content_of(&server, &volume), Content::Written, "{name}");
            for _ in 1..8 {
                assert_eq!(client.receive().unwrap().error, 0);
            }
        }
        let filled = if command == Command::Write { 9 } else { 0 };
        assert!(clients[0].read(0, 32 * 4096).unwrap().iter().all(|byte| *byte == filled));
    }
}

/// What has the catalog for itself keeps the mark from becoming durable: nothing may be written meanwhile.
#[test]
fn a_first_write_waits_for_the_mark() {
    let server = Server::start();
    let volume = server.create_with("vol", 1 << 20, |new| new.settings.content = Content::NeverWritten);
    let attachment = server.attach(&volume, false);
    let mut client = server.open(&attachment, 1, 0);
    let path = server.volumes_dir.parent().unwrap().join("catalog.sqlite");
    let other = rusqlite::Connection::open(path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    client.send(Command::Write, CommandFlags::NONE, 0, 4096, &[9; 4096]);
    client.send(Command::Flush, CommandFlags::NONE, 0, 0, &[]);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(server.allocated_bytes(&volume), 0, "written before the mark");
    other.execute_batch("ROLLBACK").unwrap();
    let began = Instant::now();
    while content_of(&server, &volume) != Content::Written {
        assert!(began.elapsed() < DEADLINE);
        thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..2 {
        assert_eq!(client.receive().unwrap().error, 0);
    }
    assert!(server.allocated_bytes(&volume) > 0);
}

#[test]
fn who_formats_a_volume_leaves_it_so_and_another_writer_does_not() {
    let server = Server::start_with(|config| config.export_by_name = true);
    let volume = server.create_with("vol", 1 << 20, |new| new.settings.content = Content::NeverWritten);
    let attachment = server.attach(&volume, false);
    let initialising = Content::Initialising { attachment_id: attachment.attachment_id };
    assert!(server.catalog.change_content(volume.volume_uid, Content::NeverWritten, initialising).unwrap());
    let mut client = server.open(&attachment, 1, 0);
    client.write(0, &[1; 4096]).unwrap();
    assert_eq!(content_of(&server, &volume), initialising);
    drop(client);
    server.catalog.end_attachment(attachment.attachment_id, false).unwrap();
    server.data.fence_attachment(attachment.attachment_id).unwrap();
    server.catalog.remove_attachment(attachment.attachment_id).unwrap();
    Client::open(server.address(), "vol").unwrap().write(0, &[2; 4096]).unwrap();
    assert_eq!(content_of(&server, &volume), Content::Written);
}

#[test]
fn a_read_only_volume_is_served_read_only_by_its_name_too() {
    let server = Server::start_with(|config| config.export_by_name = true);
    let volume = server.create_with("vol", 1 << 20, |new| new.settings.is_read_only = true);
    let mut client = Client::open(server.address(), "vol").unwrap();
    assert_eq!(client.write(0, &[2; 4096]).unwrap_err(), NbdError::Eperm as u32);
    assert_eq!(server.data.writers_of_volume(volume.volume_uid), 0);
    // Whatever an attachment says that was made before.
    let attachment = server.attach(&volume, false);
    let mut client = server.open(&attachment, 1, 0);
    assert_eq!(client.write(0, &[2; 4096]).unwrap_err(), NbdError::Eperm as u32);
    client.read(0, 4096).unwrap();
}
