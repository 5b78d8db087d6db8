//! How a copy ends that does not come to its end: the requests that waited go on, and nothing is left of it.

use std::fs::OpenOptions;

use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use server::backend::file::CacheMode;
use server::volume::copying::{CopyError, CopyTarget};
use uuid::Uuid;

use super::stage::{MOMENT, Stage, snapshot_of};
use super::support::{DEADLINE, is_installed, run, skip, wait_until};

/// So many that a copy takes a second or so.
const EXTENTS: u64 = 20_000;

#[test]
fn a_copy_that_is_cancelled_lets_go_of_all_that_waits_for_it() {
    let Some(stage) = Stage::new("xfs", 1 << 30, |_| {}) else { return };
    let volume = stage.fragmented("vol", EXTENTS);
    let mut client = stage.server.open(&stage.server.attach(&volume, false), 1, 0);
    let snapshot_uid = Uuid::new_v4();
    let handle = stage.begin(&[snapshot_of(&volume, snapshot_uid)]).unwrap();
    let again = stage.begin(&[snapshot_of(&volume, Uuid::new_v4())]).unwrap_err();
    assert!(matches!(&again, CopyError::Busy(words) if words.contains("is being copied")), "{again}");
    // All of it: it waits to the end.
    client.send(Command::Trim, CommandFlags::NONE, 0, volume.capacity_bytes as u32, &[]);
    std::thread::sleep(MOMENT);
    handle.cancel();
    assert_eq!(stage.fails(&handle, snapshot_uid), CopyError::Cancelled);
    assert_eq!(client.receive().unwrap().error, 0);
    assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]));
    stage.snapshot(&volume);
    wait_until("the volume is let go of", || stage.server.data.connections_of_volume(volume.volume_uid) == 1);
}

#[test]
fn a_connection_that_ends_while_its_write_waits_is_gone_and_the_copy_goes_on() {
    let Some(stage) = Stage::new("xfs", 1 << 30, |_| {}) else { return };
    let volume = stage.fragmented("vol", EXTENTS);
    let attachment = stage.server.attach(&volume, false);
    let mut client = stage.server.open(&attachment, 1, 0);
    let handle = stage.begin(&[snapshot_of(&volume, Uuid::new_v4())]).unwrap();
    client.send(Command::Trim, CommandFlags::NONE, 0, volume.capacity_bytes as u32, &[]);
    std::thread::sleep(MOMENT);
    // Fenced, as by a detach: what waits is never begun.
    stage.server.data.fence_attachment(attachment.attachment_id).unwrap();
    assert_eq!(stage.server.data.connections_of_volume(volume.volume_uid), 0);
    assert!(stage.server.data.release_volume(volume.volume_uid).is_err(), "it is being copied");
    assert_eq!(handle.wait(DEADLINE), Some(Ok(())));
    stage.server.data.release_volume(volume.volume_uid).unwrap();
    let first = std::fs::read(stage.volume_path(&volume)).unwrap();
    assert_eq!(first[..4096], [1; 4096], "it was not trimmed");
}

#[test]
fn a_server_that_ends_ends_its_copies_and_answers_what_waited() {
    let Some(stage) = Stage::new("xfs", 1 << 30, |_| {}) else { return };
    let volume = stage.fragmented("vol", EXTENTS);
    let mut client = stage.server.open(&stage.server.attach(&volume, false), 1, 0);
    let snapshot_uid = Uuid::new_v4();
    let handle = stage.begin(&[snapshot_of(&volume, snapshot_uid)]).unwrap();
    client.send(Command::Trim, CommandFlags::NONE, 0, volume.capacity_bytes as u32, &[]);
    std::thread::sleep(MOMENT);
    assert!(stage.server.data.shutdown(), "in time");
    assert_eq!(stage.fails(&handle, snapshot_uid), CopyError::Cancelled);
    assert_eq!(client.receive().unwrap().error, 0);
    let late = stage.begin(&[snapshot_of(&volume, snapshot_uid)]).unwrap_err();
    assert!(!stage.path(CopyTarget::Snapshot(snapshot_uid)).exists(), "{late}");
}

#[test]
fn without_space_the_copy_ends_and_no_write() {
    let Some(stage) = Stage::new("xfs", 320 << 20, |_| {}) else { return };
    let volume = stage.fragmented("vol", 30_000);
    stage.server.data.can_copy().unwrap();
    let mut client = stage.server.open(&stage.server.attach(&volume, false), 1, 0);
    let filler = OpenOptions::new().create_new(true).write(true).open(stage.fs.mount.join("filler")).unwrap();
    let (mut at_bytes, mut bytes) = (0, 64u64 << 20);
    while bytes >= 4096 {
        match rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), at_bytes, bytes) {
            Ok(()) => at_bytes += bytes,
            Err(_) => bytes /= 2,
        }
    }
    // Enough to begin with, and too little for the list of so many extents, which has 16 bytes for each.
    let snapshot_uid = Uuid::new_v4();
    let mut begun = Err(CopyError::NoSpace);
    for free_bytes in (1..7).map(|number| number * (64 << 10)) {
        filler.set_len(at_bytes - free_bytes).unwrap();
        filler.sync_all().unwrap();
        begun = stage.begin(&[snapshot_of(&volume, snapshot_uid)]);
        match &begun {
            Ok(_) => break,
            Err(error) => assert_eq!(*error, CopyError::NoSpace),
        }
    }
    let handle = begun.unwrap();
    // Answered, if by the file system itself, which may have no room for blocks that are not shared any more.
    let last = volume.capacity_bytes - 2 * 4096;
    let written = client.write(last, &[0xdd; 4096]);
    assert!(matches!(written, Ok(()) | Err(28)), "{written:?}");
    assert_eq!(stage.fails(&handle, snapshot_uid), CopyError::NoSpace);
    drop(filler);
    std::fs::remove_file(stage.fs.mount.join("filler")).unwrap();
    client.write(last, &[0xdd; 4096]).unwrap();
    client.flush().unwrap();
    assert_eq!(client.read(last, 4096), Ok(vec![0xdd; 4096]));
    stage.snapshot(&volume);
}

#[test]
fn a_source_that_cannot_be_synced_has_lost_writes() {
    if !is_installed("xfs_io") {
        return skip("no xfs_io to make a file system fail with");
    }
    for cache in [CacheMode::Auto, CacheMode::Buffered] {
        let Some(stage) = Stage::new("xfs", 1 << 30, |config| config.cache = cache) else { return };
        let volume = stage.fragmented("vol", EXTENTS);
        let mut client = stage.server.open(&stage.server.attach(&volume, false), 1, 0);
        let before = stage.server.data.storage_incarnation(&volume);
        client.write(0, &[1; 4096]).unwrap();
        let snapshot_uid = Uuid::new_v4();
        let handle = stage.begin(&[snapshot_of(&volume, snapshot_uid)]).unwrap();
        client.send(Command::Trim, CommandFlags::NONE, 0, volume.capacity_bytes as u32, &[]);
        run("xfs_io", &["-x", "-c", "shutdown", stage.fs.mount.to_str().unwrap()]);
        assert_eq!(handle.wait(DEADLINE), Some(Err(CopyError::SourceLostWrites)), "{cache:?}");
        // The storage has failed for everybody; that is answered, and remembered.
        client.receive().unwrap();
        assert_eq!(client.flush(), Err(NbdError::Eio as u32));
        assert_ne!(stage.server.data.storage_incarnation(&volume), before);
        let refused = stage.begin(&[snapshot_of(&volume, Uuid::new_v4())]).unwrap_err();
        println!("{refused}");
        drop(client);
        wait_until("nobody has it open", || stage.server.data.connections_of_volume(volume.volume_uid) == 0);
        stage.fs.remount();
        assert!(
            stage.server.data.copy_files().stored().unwrap().len() <= 1,
            "what could not be removed is found"
        );
    }
}
