//! Requests and replies: every command, every refusal, every size.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use proto::export_name::{ExportDescription, Secret};
use proto::nbd::handshake::client::ClientHandshakeError;
use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use proto::nbd::{OPTION_MAGIC, TransmissionFlags, option};
use server::catalog::BackendKind;
use uuid::Uuid;

use super::client::{Client, OpenFailed};
use super::support::{Random, Server, export_name, wait_until};

const MIB: usize = 1 << 20;

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    Random::new(seed).fill(&mut data);
    data
}

fn refusal(result: Result<Client, OpenFailed>) -> String {
    match result {
        Err(OpenFailed::Handshake(ClientHandshakeError::Refused { text, .. })) => text,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was opened"),
    }
}

#[test]
fn an_attachment_is_opened_with_everything_announced() {
    let server = Server::start();
    let (volume, client) = server.open_new("vol", 8 << 20);
    assert_eq!(client.info.size_bytes, 8 << 20);
    for flag in [
        TransmissionFlags::HAS_FLAGS,
        TransmissionFlags::SEND_FLUSH,
        TransmissionFlags::SEND_FUA,
        TransmissionFlags::SEND_TRIM,
        TransmissionFlags::SEND_WRITE_ZEROES,
        TransmissionFlags::CAN_MULTI_CONN,
    ] {
        assert!(client.info.flags.contains(flag), "{flag:?}");
    }
    assert!(!client.info.flags.contains(TransmissionFlags::READ_ONLY));
    let sizes = client.info.block_sizes.unwrap();
    assert!(sizes.minimum_bytes >= 512 && sizes.preferred_bytes >= 4096);
    assert_eq!(sizes.maximum_bytes, 32 << 20);
    let description: ExportDescription = client.info.description.as_deref().unwrap().parse().unwrap();
    assert_eq!(description.server_id, server.catalog.server_id());
    assert_eq!(description.volume_uid, volume.volume_uid);
    assert_eq!(description.incarnation, server.data.storage_incarnation(&volume));
}

#[test]
fn what_was_written_is_read_at_every_size() {
    let server = Server::start();
    for backend in [BackendKind::File, BackendKind::Memory] {
        let volume = server.create_with(backend.as_str(), 64 << 20, |new| new.backend = backend);
        let mut client = server.open(&server.attach(&volume, false), 1, 0);
        for bytes in [4096, 8192, 16 << 10, 20 << 10, 128 << 10, MIB, 5 * MIB, 32 * MIB] {
            let data = pattern(bytes as u64, bytes);
            client.write(4096, &data).unwrap();
            assert!(client.read(4096, bytes as u32).unwrap() == data, "{backend:?} {bytes}");
        }
        client.flush().unwrap();
        assert!(server.allocated_bytes(&volume) >= 32 << 20);
    }
}

#[test]
fn trim_and_zeroes_give_zeroes_and_space_back() {
    let server = Server::start();
    for backend in [BackendKind::File, BackendKind::Memory] {
        let volume = server.create_with(backend.as_str(), 16 << 20, |new| new.backend = backend);
        let mut client = server.open(&server.attach(&volume, false), 1, 0);
        client.write(0, &pattern(1, 16 * MIB)).unwrap();
        client.flush().unwrap();
        let full = server.allocated_bytes(&volume);
        let mut punch = |command, flags, offset: u64| {
            client.call(command, flags, offset, 4 << 20, &[]).unwrap();
            let read = client.read(offset, 4 << 20).unwrap();
            assert!(read.iter().all(|byte| *byte == 0), "{backend:?} {command:?} {flags:?}");
        };
        punch(Command::Trim, CommandFlags::NONE, 0);
        punch(Command::WriteZeroes, CommandFlags::FUA, 4 << 20);
        let thinner = server.allocated_bytes(&volume);
        assert!(thinner <= full - (8 << 20), "{backend:?}: {full} before, {thinner} after");
        punch(Command::WriteZeroes, CommandFlags::NO_HOLE, 8 << 20);
        let kept = server.allocated_bytes(&volume);
        assert!(kept >= thinner, "{backend:?}: NO_HOLE keeps the space: {thinner} before, {kept} after");
    }
}

#[test]
fn zeroes_over_parts_of_pages_leave_the_neighbours_alone() {
    let server = Server::start();
    let volume = server.create_with("m", 1 << 20, |new| new.backend = BackendKind::Memory);
    let mut client = server.open(&server.attach(&volume, false), 1, 0);
    client.write(0, &[7; 64 << 10]).unwrap();
    client.call(Command::WriteZeroes, CommandFlags::NONE, 512, 16 << 10, &[]).unwrap();
    let read = client.read(0, 64 << 10).unwrap();
    let expected = |at: usize| if (512..512 + (16 << 10)).contains(&at) { 0 } else { 7 };
    assert!((0..read.len()).all(|at| read[at] == expected(at)));
}

#[test]
fn requests_that_cannot_be_are_refused_and_the_connection_lives() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", MIB as u64);
    let minimum = client.info.block_sizes.unwrap().minimum_bytes;
    let none = CommandFlags::NONE;
    let einval = Err(NbdError::Einval as u32);
    let enospc = Err(NbdError::Enospc as u32);
    assert_eq!(client.read(MIB as u64, minimum), einval);
    assert_eq!(client.read(MIB as u64 - u64::from(minimum), 2 * minimum), einval);
    assert_eq!(client.read(0, 0), einval);
    assert_eq!(client.read(1, minimum), einval, "unaligned offset");
    assert_eq!(client.read(0, minimum - 1), einval, "unaligned length");
    assert_eq!(client.write(MIB as u64, &vec![1; minimum as usize]).map(|()| vec![]), enospc);
    assert_eq!(client.write(u64::MAX - 511, &vec![1; 1024]).map(|()| vec![]), enospc);
    assert_eq!(client.write(3, &vec![1; minimum as usize]).map(|()| vec![]), einval);
    let large = vec![1; 33 << 20];
    assert_eq!(client.write(0, &large), Err(NbdError::Einval as u32));
    assert_eq!(client.call(Command::Trim, none, MIB as u64, 4096, &[]), einval);
    assert_eq!(client.call(Command::WriteZeroes, none, MIB as u64, 4096, &[]), enospc);
    assert_eq!(client.call(Command::Cache, none, MIB as u64, 4096, &[]), einval);
    assert_eq!(client.call(Command::BlockStatus, none, 0, 4096, &[]), einval);
    assert_eq!(client.call(Command::Unknown(77), none, 0, 0, &[]), einval);
    assert_eq!(client.call(Command::Flush, none, 0, 512, &[]), einval);
    assert_eq!(client.call(Command::Read, CommandFlags::DF, 0, 4096, &[]), einval);
    client.write(0, &[9; 4096]).unwrap();
    assert_eq!(client.read(0, 4096), Ok(vec![9; 4096]));
}

#[test]
fn readers_cannot_write() {
    let server = Server::start();
    let volume = server.create("vol", MIB as u64);
    let mut client = server.open(&server.attach(&volume, true), 1, 0);
    assert!(client.info.flags.contains(TransmissionFlags::READ_ONLY));
    let eperm = Err(NbdError::Eperm as u32);
    assert_eq!(client.write(0, &[1; 4096]).map(|()| vec![]), eperm);
    assert_eq!(client.call(Command::Trim, CommandFlags::NONE, 0, 4096, &[]), eperm);
    assert_eq!(client.call(Command::WriteZeroes, CommandFlags::NONE, 0, 4096, &[]), eperm);
    assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]));
}

#[test]
fn without_a_write_cache_no_flush_is_offered() {
    let server = Server::start();
    let volume = server.create_with("vol", MIB as u64, |new| new.write_cache_on = false);
    let mut client = server.open(&server.attach(&volume, false), 1, 0);
    assert!(!client.info.flags.contains(TransmissionFlags::SEND_FLUSH));
    client.write(0, &[5; 8192]).unwrap();
    client.call(Command::Trim, CommandFlags::NONE, 0, 4096, &[]).unwrap();
    assert_eq!(client.read(4096, 4096), Ok(vec![5; 4096]));
}

#[test]
fn a_wrong_secret_and_an_unknown_attachment_look_the_same() {
    let server = Server::start();
    let volume = server.create("vol", MIB as u64);
    let attachment = server.attach(&volume, false);
    let mut wrong_secret = attachment.clone();
    wrong_secret.secret = Secret::generate().unwrap();
    let mut unknown = attachment.clone();
    unknown.attachment_id = Uuid::new_v4();
    let by_secret = refusal(Client::open(server.address(), &export_name(&wrong_secret, 1, 0)));
    let by_id = refusal(Client::open(server.address(), &export_name(&unknown, 1, 0)));
    let by_name = refusal(Client::open(server.address(), "vol"));
    let by_default = refusal(Client::open(server.address(), ""));
    assert_eq!([&by_id, &by_name, &by_default], [&by_secret; 3]);
    assert_eq!(server.catalog.attachment(attachment.attachment_id).unwrap().unwrap().session_epoch, 0);
    server.open(&attachment, 1, 0);
}

#[test]
fn plain_names_are_opened_only_where_configured_and_read_only_while_attached() {
    let server = Server::start_with(|config| config.export_by_name = true);
    let volume = server.create("vol", MIB as u64);
    let mut writer = Client::open(server.address(), "vol").unwrap();
    writer.write(0, &[3; 4096]).unwrap();
    assert_eq!(server.data.connections_of_volume(volume.volume_uid), 1);
    let attachment = server.attach(&volume, false);
    server.data.fence_named_writers(volume.volume_uid).unwrap();
    assert_eq!(server.data.connections_of_volume(volume.volume_uid), 0);
    assert!(writer.is_closed_by_server());
    let mut reader = Client::open(server.address(), "vol").unwrap();
    assert!(reader.info.flags.contains(TransmissionFlags::READ_ONLY));
    assert_eq!(reader.write(0, &[4; 4096]), Err(NbdError::Eperm as u32));
    assert_eq!(server.open(&attachment, 1, 0).read(0, 4096), Ok(vec![3; 4096]));
    server.data.fence_named_writers(volume.volume_uid).unwrap();
    assert_eq!(reader.read(0, 4096), Ok(vec![3; 4096]), "readers are left alone");
}

#[test]
fn disconnect_waits_for_what_is_in_flight() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", 16 << 20);
    let data = pattern(3, 4 * MIB);
    let write = client.send(Command::Write, CommandFlags::NONE, 0, data.len() as u32, &data);
    let read = client.send(Command::Read, CommandFlags::NONE, 8 << 20, 4096, &[]);
    client.send(Command::Disconnect, CommandFlags::NONE, 0, 0, &[]);
    let mut cookies = [client.receive().unwrap().cookie, client.receive().unwrap().cookie];
    cookies.sort_unstable();
    assert_eq!(cookies, [write, read]);
    assert!(client.is_closed_by_server());
}

#[test]
fn a_client_that_closes_inside_a_payload_leaves_nothing_behind() {
    let server = Server::start();
    let volume = server.create("vol", 64 << 20);
    let attachment = server.attach(&volume, false);
    for sent_bytes in [0, 100, 20 << 10, MIB] {
        let mut client = server.open(&attachment, 1, 0);
        client.write(0, &[1; 4096]).unwrap();
        client.send(Command::Write, CommandFlags::NONE, 0, 4 << 20, &vec![2; sent_bytes]);
        drop(client);
        wait_until("the connection is gone", || server.data.connections_of(attachment.attachment_id) == 0);
    }
    let mut client = server.open(&attachment, 1, 0);
    assert_eq!(client.read(0, 4096), Ok(vec![1; 4096]), "a write of which a part came was not begun");
}

#[test]
fn a_half_closed_connection_still_gets_its_replies() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", 16 << 20);
    let read = client.send(Command::Read, CommandFlags::NONE, 0, 4 << 20, &[]);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.receive().unwrap().cookie, read);
    assert!(client.is_closed_by_server());
}

#[test]
fn more_requests_than_slots_are_all_answered() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", 64 << 20);
    let count = 1000;
    for number in 0..count {
        client.send(Command::Read, CommandFlags::NONE, number * 4096, 4096, &[]);
    }
    let mut cookies: Vec<u64> = (0..count).map(|_| client.receive().unwrap().cookie).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (1..=count).collect::<Vec<_>>());
}

#[test]
fn a_slow_reader_is_held_back_and_does_not_hold_up_others() {
    // One ring, so that both share its buffers.
    let server = Server::start_with(|config| config.threads = 1);
    let (_, mut slow) = server.open_new("slow", 64 << 20);
    let (_, mut other) = server.open_new("other", 64 << 20);
    let count = 300;
    for number in 0..count {
        slow.send(Command::Read, CommandFlags::NONE, (number % 64) << 20, MIB as u32, &[]);
    }
    for number in 0..50 {
        other.write(number << 20, &pattern(number, MIB)).unwrap();
    }
    for _ in 0..count {
        assert_eq!(slow.receive().unwrap().error, 0);
    }
}

#[test]
fn who_stands_still_with_what_others_need_is_closed() {
    let server = Server::start_with(|config| {
        config.threads = 1;
        config.limits.stall_timeout = Duration::from_secs(1);
    });
    let mut stalled: Vec<Client> = Vec::new();
    for number in 0..4 {
        let (_, mut client) = server.open_new(&format!("stalled-{number}"), 64 << 20);
        // A write that never comes to its end keeps a buffer of the largest class, of which there are four.
        client.send(Command::Write, CommandFlags::NONE, 0, 32 << 20, &[1; 4096]);
        client.stream.flush().unwrap();
        stalled.push(client);
    }
    let (_, mut other) = server.open_new("other", 64 << 20);
    other.write(0, &pattern(1, 32 * MIB)).unwrap();
    for client in &stalled {
        client.stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    }
    let began = Instant::now();
    wait_until("one of them is closed", || stalled.iter_mut().any(Client::is_closed_by_server));
    // Sooner than by any time-out that these have.
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}

#[test]
fn releasing_a_volume_needs_its_connections_gone() {
    let server = Server::start();
    let (volume, client) = server.open_new("vol", MIB as u64);
    let busy = server.data.release_volume(volume.volume_uid).unwrap_err();
    assert_eq!(busy.connections, 1);
    drop(client);
    wait_until("the connection is gone", || server.data.connections_of_volume(volume.volume_uid) == 0);
    server.data.release_volume(volume.volume_uid).unwrap();
    server.data.release_volume(volume.volume_uid).unwrap();
}

#[test]
fn a_memory_volume_is_gone_with_its_release_and_its_incarnation_names_the_process() {
    let server = Server::start();
    let volume = server.create_with("m", MIB as u64, |new| new.backend = BackendKind::Memory);
    let attachment = server.attach(&volume, false);
    let mut client = server.open(&attachment, 1, 0);
    client.write(0, &[1; 4096]).unwrap();
    drop(client);
    let mut again = server.open(&attachment, 1, 0);
    assert_eq!(again.read(0, 4096), Ok(vec![1; 4096]), "it outlives its connections");
    let other = Server::start();
    assert_ne!(server.data.storage_incarnation(&volume), other.data.storage_incarnation(&volume));
}

#[test]
fn the_old_way_of_opening_is_fenced_like_the_new_one() {
    let server = Server::start();
    let volume = server.create("vol", 1 << 20);
    let attachment = server.attach(&volume, false);
    let mut go = server.open(&attachment, 1, 0);
    let open_old = |name: &str| {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(&OPTION_MAGIC.to_be_bytes()).unwrap();
        stream.write_all(&option::EXPORT_NAME.to_be_bytes()).unwrap();
        stream.write_all(&(name.len() as u32).to_be_bytes()).unwrap();
        stream.write_all(name.as_bytes()).unwrap();
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).map(|()| u64::from_be_bytes(answer[..8].try_into().unwrap()))
    };
    assert_eq!(open_old(&export_name(&attachment, 2, 0)).unwrap(), 1 << 20);
    assert!(go.is_closed_by_server());
    assert!(open_old(&export_name(&attachment, 1, 0)).is_err(), "it can only be refused by closing");
    assert!(open_old("vol").is_err());
}

#[test]
fn a_shutdown_answers_what_is_in_flight() {
    let server = Server::start();
    let (_, mut client) = server.open_new("vol", 64 << 20);
    let cookies: Vec<u64> = (0..8)
        .map(|number| client.send(Command::Write, CommandFlags::FUA, number << 20, 1 << 20, &vec![1; MIB]))
        .collect();
    // All eight have been taken in when the first reply has come, or at least their bytes are on the way.
    let first = client.receive().unwrap().cookie;
    let stopping = std::thread::spawn({
        let data = std::sync::Arc::clone(&server.data);
        move || data.shutdown()
    });
    let mut answered = vec![first];
    while let Ok(answer) = client.receive() {
        assert_eq!(answer.error, 0);
        answered.push(answer.cookie);
    }
    assert!(stopping.join().unwrap(), "ended in time");
    assert!(answered.iter().all(|cookie| cookies.contains(cookie)));
}
