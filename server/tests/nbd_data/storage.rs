//! What depends on the file system below: O_DIRECT, space, and file systems that lack what we would use.

use std::collections::HashMap;
use std::path::Path;

use proto::nbd::TransmissionFlags;
use proto::nbd::block_status::ExtentState;
use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use server::backend::file::{self, CacheMode};

use super::block_status::{DATA, HOLE, MIB, offers};
use super::chunks::ChunkClient;
use super::client::Client;
use super::replies_in_chunks::data;
use super::support::{LoopFs, Server, TempDir, run, skip, tool};
use super::unit_filter;

#[test]
fn xfs_is_used_past_the_page_cache() {
    let Some(fs) = LoopFs::new("xfs", 320 << 20) else { return };
    let server = Server::start_with(|config| config.volumes_dir = fs.mount.clone());
    // Smaller blocks go through the page cache where a snapshot may come to share them.
    let volume = server.create_with("vol", 16 << 20, |new| new.block_size_bytes = 4096);
    let mut client = server.open(&server.attach(&volume, false), 1, 0);
    let opened = file::open(&fs.mount, volume.volume_uid, 16 << 20, 4096, CacheMode::Auto, 1).unwrap();
    assert!(opened.is_direct());
    let sizes = client.info.block_sizes.unwrap();
    assert_eq!(sizes.minimum_bytes, 4096);
    client.call(Command::Write, CommandFlags::FUA, 0, 4096, &[8; 4096]).unwrap();
    assert_eq!(client.read(0, 4096), Ok(vec![8; 4096]));
}

/// A volume that is served through the page cache, all of it written; its file.
fn cached_volume(capacity_bytes: u64) -> (Server, Client, Client, std::path::PathBuf, Vec<u8>) {
    let server = Server::start_with(|config| config.cache = CacheMode::Buffered);
    let volume = server.create("vol", capacity_bytes);
    let attachment = server.attach(&volume, false);
    let (mut client, other) = (server.open(&attachment, 1, 0), server.open(&attachment, 1, 1));
    let bytes: Vec<u8> = (0..capacity_bytes).map(|position| (position % 251) as u8).collect();
    for (number, part) in bytes.chunks(1 << 20).enumerate() {
        client.write((number as u64) << 20, part).unwrap();
    }
    client.flush().unwrap();
    let path = file::path(&server.volumes_dir, volume.volume_uid);
    (server, client, other, path, bytes)
}

#[test]
fn a_reply_that_was_begun_is_what_was_there_though_the_range_is_trimmed_meanwhile() {
    let (_server, mut reader, mut other, _, bytes) = cached_volume(8 << 20);
    // In one segment, so that all of them are begun before the first is answered; far more than the sockets hold, so the last of
    // them waits in the server.
    rustix::net::sockopt::set_tcp_cork(&reader.stream, true).unwrap();
    let cookies: Vec<u64> = (0..8u64)
        .map(|number| reader.send(Command::Read, CommandFlags::NONE, number << 20, 1 << 20, &[]))
        .collect();
    rustix::net::sockopt::set_tcp_cork(&reader.stream, false).unwrap();
    let first = reader.receive().unwrap();
    assert_eq!((first.cookie, first.error), (cookies[0], 0));
    assert!(first.payload == bytes[..1 << 20]);
    other.call(Command::Trim, CommandFlags::NONE, 0, 8 << 20, &[]).unwrap();
    for number in 1..8 {
        let answer = reader.receive().unwrap();
        assert_eq!((answer.cookie, answer.error), (cookies[number], 0));
        assert!(answer.payload == bytes[number << 20..][..1 << 20], "megabyte {number}");
    }
    assert!(reader.read(0, 1 << 20).unwrap() == vec![0; 1 << 20]);
}

/// More than one turn of a connection, in requests that are answered as they are parsed: the rest of them brings no news.
#[test]
fn who_asks_for_much_at_once_gets_all_of_it_in_several_turns() {
    let (_server, mut reader, mut other, _, bytes) = cached_volume(4 << 20);
    let length = 32 << 10;
    let offset = |number: u64| number % 128 * u64::from(length);
    let mut asked: HashMap<u64, u64> = (0..3000)
        .map(|number| {
            (reader.send(Command::Read, CommandFlags::NONE, offset(number), length, &[]), offset(number))
        })
        .collect();
    while !asked.is_empty() {
        let answer = reader.receive().unwrap();
        let offset = asked.remove(&answer.cookie).expect("an answer to something that was asked") as usize;
        assert_eq!(answer.error, 0);
        assert!(answer.payload == bytes[offset..][..length as usize], "{} are left", asked.len());
        if asked.len().is_multiple_of(500) {
            assert!(other.read(0, 4096).unwrap() == bytes[..4096]);
        }
    }
}

#[test]
fn a_read_is_right_wherever_its_range_is_cached_or_not() {
    let (_server, mut client, _, path, bytes) = cached_volume(4 << 20);
    let file = std::fs::File::open(path).unwrap();
    for evicted_bytes in [0..4 << 20, 0..1 << 20, 1 << 20..(1 << 20) + 4096, (2 << 20) - 4096..2 << 20, 0..0]
    {
        let length_bytes = std::num::NonZero::new(evicted_bytes.end - evicted_bytes.start);
        if let Some(length_bytes) = length_bytes {
            let advice = rustix::fs::Advice::DontNeed;
            rustix::fs::fadvise(&file, evicted_bytes.start, Some(length_bytes), advice).unwrap();
        }
        for (offset, length) in
            [(0, 1 << 20), (1 << 20, 1 << 20), ((1 << 20) + 512, 64 << 10), (1536, 300_544)]
        {
            let read = client.read(offset, length).unwrap();
            assert!(
                read == bytes[offset as usize..][..length as usize],
                "{evicted_bytes:?} {offset} {length}"
            );
        }
    }
}

/// As under another service manager, or in a container whose profile does not list the call.
#[test]
fn a_server_that_may_not_ask_what_is_cached_reads_it_all_the_same() {
    let Some((_server, mut client, _, _, bytes)) =
        unit_filter::under_without("mincore", || cached_volume(4 << 20))
    else {
        return;
    };
    for (offset, length) in [(0, 1 << 20), (1536, 300_544), (4096, 4096)] {
        assert!(client.read(offset, length).unwrap() == bytes[offset as usize..][..length as usize]);
    }
}

/// As in a container whose profile knows io_uring only as far as it was once needed.
#[test]
fn a_server_that_may_not_restrict_its_rings_serves_all_the_same() {
    let Some((_server, mut client, _, _, bytes)) =
        unit_filter::under_without("io_uring_register", || cached_volume(1 << 20))
    else {
        return;
    };
    assert!(client.read(4096, 64 << 10).unwrap() == bytes[4096..][..64 << 10]);
}

#[test]
fn a_disk_that_turns_is_announced_as_such() {
    let Some(fs) = LoopFs::new("ext4", 24 << 20) else { return };
    let device = run("findmnt", &["-no", "SOURCE", fs.mount.to_str().unwrap()]);
    let queue = format!("/sys/block/{}/queue/rotational", device.trim().trim_start_matches("/dev/"));
    for (turns, told) in [(true, "1"), (false, "0")] {
        if let Err(error) = std::fs::write(&queue, told) {
            return skip(&format!("{queue}: {error}"));
        }
        let server = Server::start_with(|config| config.volumes_dir = fs.mount.clone());
        let (volume, client) = server.open_new("vol", 1 << 20);
        assert_eq!(client.info.flags.contains(TransmissionFlags::ROTATIONAL), turns);
        drop((client, server));
        file::delete(&fs.mount, volume.volume_uid).unwrap();
    }
}

#[test]
fn a_full_file_system_is_the_writers_problem_alone() {
    let Some(fs) = LoopFs::new("ext4", 24 << 20) else { return };
    for cache in [CacheMode::Auto, CacheMode::Buffered] {
        let server = Server::start_with(|config| {
            config.volumes_dir = fs.mount.clone();
            config.cache = cache;
        });
        let (volume, mut client) = server.open_new("big", 256 << 20);
        let (other_volume, mut other) = server.open_new("small", 1 << 20);
        other.write(0, &vec![4; 1 << 20]).unwrap();
        other.flush().unwrap();
        let mut refused = None;
        for number in 0..64u64 {
            if let Err(error) = client.write(number << 20, &vec![number as u8 + 1; 1 << 20]) {
                refused = Some((number, error));
                break;
            }
        }
        let (number, error) = refused.expect("64 MiB do not fit into 24");
        assert_eq!(error, NbdError::Enospc as u32, "{cache:?}");
        assert_eq!(client.read(0, 1 << 20), Ok(vec![1; 1 << 20]));
        assert_eq!(other.read(0, 1 << 20), Ok(vec![4; 1 << 20]));
        other.write(0, &vec![5; 1 << 20]).unwrap();
        other.flush().unwrap();
        let zeroes = client.call(Command::WriteZeroes, CommandFlags::NO_HOLE, 128 << 20, 64 << 20, &[]);
        assert_eq!(zeroes, Err(NbdError::Enospc as u32), "{cache:?}");
        client.call(Command::Trim, CommandFlags::FUA, 0, (number as u32) << 20, &[]).unwrap();
        client.write(0, &vec![6; 1 << 20]).unwrap();
        client.flush().unwrap();
        drop((client, other));
        drop(server);
        for volume in [volume, other_volume] {
            file::delete(&fs.mount, volume.volume_uid).unwrap();
        }
    }
}

/// tmpfs has no ZERO_RANGE: zeroes that may not be a hole are written.
#[test]
fn zeroes_are_written_where_the_file_system_cannot_make_them() {
    if !rustix::process::geteuid().is_root() {
        return skip("mounting needs root");
    }
    let dir = TempDir::new();
    let mount = dir.0.to_str().unwrap();
    let mounted = tool("mount").args(["-t", "tmpfs", "-o", "size=64m", "tmpfs", mount]).output().unwrap();
    if !mounted.status.success() {
        return skip(&format!("no tmpfs here: {}", String::from_utf8_lossy(&mounted.stderr)));
    }
    let _mounted = Mounted(&dir.0);
    {
        let server = Server::start_with(|config| config.volumes_dir = dir.0.clone());
        let (_, mut client) = server.open_new("vol", 32 << 20);
        client.write(0, &vec![1; 8 << 20]).unwrap();
        let flags = CommandFlags::NO_HOLE.with(CommandFlags::FUA);
        client.call(Command::WriteZeroes, flags, 4096, 5 << 20, &[]).unwrap();
        let read = client.read(0, 8 << 20).unwrap();
        let is_zero = |at: usize| (4096..4096 + (5 << 20)).contains(&at);
        assert!((0..read.len()).all(|at| read[at] == u8::from(!is_zero(at))));
    }
}

/// A mount point that is none any more when the test ends, however it does.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = tool("umount").arg("--lazy").arg(self.0).status();
    }
}

#[test]
fn data_survives_the_server() {
    let dir = TempDir::new();
    let open = || Server::start_with(|config| config.volumes_dir = dir.0.clone());
    let (uid, incarnation) = {
        let server = open();
        let (volume, mut client) = server.open_new("vol", 1 << 20);
        client.write(8192, &[7; 4096]).unwrap();
        client.flush().unwrap();
        (volume.volume_uid, server.data.storage_incarnation(&volume))
    };
    let bytes = std::fs::read(file::path(&dir.0, uid)).unwrap();
    assert_eq!(bytes[8192..12288], [7; 4096]);
    let server = open();
    let (volume, _client) = server.open_new("other", 1 << 20);
    assert_eq!(server.data.storage_incarnation(&volume), incarnation, "a restart is not a loss");
}

#[test]
fn what_is_reported_as_data_can_be_written_when_the_disk_is_full() {
    let Some(fs) = LoopFs::new("ext4", 24 << 20) else { return };
    let server = Server::start_with(|config| {
        config.export_by_name = true;
        config.volumes_dir = fs.mount.clone();
    });
    server.create("vol", 64 * MIB);
    let [structured, _] = offers();
    let mut client = ChunkClient::open(server.address(), "vol", structured);
    let enospc = NbdError::Enospc as u32;
    let full = (0..1024u64)
        .map(|number| number * 65536)
        .find(|offset| client.write(*offset, &[1; 65536]) == Err(enospc));
    assert!(full.is_some(), "64 MiB do not fit into 24");
    let mut at = 0;
    for (length, state) in client.extents(CommandFlags::NONE, 0, 64 * MIB).unwrap() {
        if state == DATA {
            for offset in (at..at + length).step_by(4096) {
                client.write(offset, &[2; 4096]).unwrap();
            }
        }
        at += length;
    }
    client.call(Command::Flush, CommandFlags::NONE, 0, 0, &[]).unwrap();
    let hole = client.extents(CommandFlags::REQ_ONE, 63 * MIB, MIB).unwrap();
    assert_eq!(hole, [(MIB, HOLE)]);
    assert!((0..16u64).any(|number| client.write(63 * MIB + number * 65536, &[3; 65536]) == Err(enospc)));
}

#[test]
fn zeroes_that_keep_their_space_are_no_hole() {
    let Some(fs) = LoopFs::new("ext4", 64 << 20) else { return };
    let server = Server::start_with(|config| {
        config.export_by_name = true;
        config.volumes_dir = fs.mount.clone();
    });
    server.create("vol", 16 * MIB);
    let zeroes = u64::from(ExtentState::ALLOCATED_ZEROES.0);
    for offer in offers() {
        let mut client = ChunkClient::open(server.address(), "vol", offer);
        client.write(0, &[7; MIB as usize]).unwrap();
        client.call(Command::WriteZeroes, CommandFlags::NO_HOLE, 0, MIB, &[]).unwrap();
        let told = client.extents(CommandFlags::NONE, 0, 2 * MIB).unwrap();
        assert_eq!(told, [(MIB, zeroes), (MIB, HOLE)], "{offer:?}");
        assert_eq!(client.read(0, MIB).unwrap(), vec![0; MIB as usize]);
        client.call(Command::WriteZeroes, CommandFlags::NONE, 0, MIB, &[]).unwrap();
        let told = client.extents(CommandFlags::NONE, 0, 2 * MIB).unwrap();
        assert_eq!(told, [(2 * MIB, HOLE)], "{offer:?}");
    }
}

#[test]
fn an_error_of_the_storage_tells_its_place() {
    let server = Server::start_with(|config| {
        config.export_by_name = true;
        config.cache = CacheMode::Buffered;
    });
    let volume = server.create("vol", 4 * MIB);
    for offer in offers() {
        let mut client = ChunkClient::open(server.address(), "vol", offer);
        client.write(0, &data(4 * MIB)).unwrap();
        // Somebody cuts the backing file: what lies behind can only be an error.
        let path = file::path(&server.volumes_dir, volume.volume_uid);
        let backing = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        backing.set_len(2 * MIB).unwrap();
        let cookie = client.send(Command::Read, CommandFlags::NONE, MIB, 2 * MIB, &[]);
        let (answered, answer) = client.receive();
        let (error, _, at) = answer.error.expect("an error");
        assert_eq!((answered, error, at), (cookie, NbdError::Eio as u32, Some(2 * MIB)));
        assert!(answer.data.is_empty(), "no byte that was not read");
        assert_eq!(client.read(0, 4096).unwrap(), data(4 * MIB)[..4096]);
        backing.set_len(4 * MIB).unwrap();
    }
}
