//! What copies are made of: volumes that nobody has open, snapshots, other sizes; and what cannot be copied.

use std::os::unix::fs::FileExt as _;

use server::backend::file::CacheMode;
use server::catalog::BackendKind;
use server::volume::copying::{CopyError, CopySource, CopyTarget, CopyWanted};
use uuid::Uuid;

use super::stage::{Stage, snapshot_of, start};
use super::support::{DEADLINE, LoopFs, Server, wait_until};

#[test]
fn a_volume_that_nobody_has_open_a_snapshot_and_a_clone_are_copied() {
    for kind in ["xfs", "btrfs"] {
        let Some(stage) = Stage::new(kind, 1 << 30, |_| {}) else { return };
        let volume = stage.fragmented("vol", 500);
        let original = std::fs::read(stage.volume_path(&volume)).unwrap();
        let snapshot_uid = stage.snapshot(&volume);
        assert!(stage.bytes_of(snapshot_uid) == original);
        // A larger clone of the snapshot, and a snapshot of that.
        let clone = stage
            .server
            .create_with("clone", volume.capacity_bytes + (1 << 20), |new| new.block_size_bytes = 4096);
        let source = CopySource::Snapshot { snapshot_uid, capacity_bytes: volume.capacity_bytes };
        let target = CopyTarget::Volume(clone.volume_uid);
        let handle = stage.begin(&[CopyWanted {
            source: source.clone(),
            target,
            capacity_bytes: clone.capacity_bytes,
        }]);
        assert_eq!(handle.unwrap().wait(DEADLINE), Some(Ok(())));
        let mut client = stage.server.open(&stage.server.attach(&clone, false), 1, 0);
        assert_eq!(client.read(0, 1 << 20), Ok(original[..1 << 20].to_vec()));
        assert_eq!(
            client.read(volume.capacity_bytes, 1 << 20),
            Ok(vec![0; 1 << 20]),
            "the rest reads as zeroes"
        );
        client.write(0, &[0xaa; 4096]).unwrap();
        let of_clone = stage.bytes_of(stage.snapshot(&clone));
        assert!(of_clone[..4096] == [0xaa; 4096] && of_clone[4096..original.len()] == original[4096..]);
        assert!(stage.bytes_of(snapshot_uid) == original, "what it was cloned of has not changed");
        // Restored.
        let target = CopyTarget::Restored(volume.volume_uid);
        std::fs::OpenOptions::new()
            .write(true)
            .open(stage.volume_path(&volume))
            .unwrap()
            .write_all_at(&[1; 4096], 0)
            .unwrap();
        stage.server.data.release_volume(volume.volume_uid).unwrap();
        let handle =
            stage.begin(&[CopyWanted { source, target, capacity_bytes: volume.capacity_bytes }]).unwrap();
        assert_eq!(handle.wait(DEADLINE), Some(Ok(())));
        assert!(stage.server.data.copy_files().stored().unwrap().contains(&target));
        stage.server.data.replace_file(volume.volume_uid).unwrap();
        assert!(!stage.server.data.copy_files().stored().unwrap().contains(&target));
        let mut client = stage.server.open(&stage.server.attach(&volume, false), 1, 0);
        assert_eq!(
            client.read(0, 1 << 20),
            Ok(original[..1 << 20].to_vec()),
            "and nobody takes that for a loss"
        );
    }
}

/// The end of a volume need not be that of a block of the file system.
#[test]
fn a_volume_of_any_size_is_copied_to_its_last_sector() {
    for kind in ["xfs", "btrfs"] {
        let Some(stage) = Stage::new(kind, 1 << 30, |_| {}) else { return };
        let volume = stage.server.create("vol", (1 << 20) + 512);
        let mut client = stage.server.open(&stage.server.attach(&volume, false), 1, 0);
        client.write(1 << 20, &[7; 512]).unwrap();
        // Before it is told of the new size the file is larger.
        let file = std::fs::OpenOptions::new().write(true).open(stage.volume_path(&volume)).unwrap();
        for file_bytes in [volume.capacity_bytes, 2 << 20] {
            file.set_len(file_bytes).unwrap();
            for target_bytes in [volume.capacity_bytes, 3 << 20] {
                let snapshot_uid = Uuid::new_v4();
                let wanted =
                    CopyWanted { capacity_bytes: target_bytes, ..snapshot_of(&volume, snapshot_uid) };
                assert_eq!(stage.begin(&[wanted]).unwrap().wait(DEADLINE), Some(Ok(())));
                let bytes = stage.bytes_of(snapshot_uid);
                assert_eq!(bytes.len() as u64, target_bytes);
                assert!(
                    bytes[1 << 20..(1 << 20) + 512] == [7; 512]
                        && bytes[(1 << 20) + 512..].iter().all(|byte| *byte == 0)
                );
            }
        }
    }
}

/// A file whose blocks are shared takes only whole ones past the page cache.
#[test]
fn a_snapshot_does_not_raise_the_smallest_block_of_its_volume() {
    let Some(fs) = LoopFs::new("xfs", 1 << 30) else { return };
    let server = start(&fs, |_| {});
    let volume = server.create("vol", 16 << 20);
    let attachment = server.attach(&volume, false);
    let mut client = server.open(&attachment, 1, 0);
    assert_eq!(client.info.block_sizes.unwrap().minimum_bytes, 512);
    client.write(512, &[1; 512]).unwrap();
    client.flush().unwrap();
    let snapshot_uid = Uuid::new_v4();
    let handle = server.data.begin_copies(&[snapshot_of(&volume, snapshot_uid)]).unwrap();
    assert_eq!(handle.wait(DEADLINE), Some(Ok(())));
    drop(client);
    // As a server that is started anew opens it.
    wait_until("it is let go of", || server.data.release_volume(volume.volume_uid).is_ok());
    let mut client = server.open(&attachment, 2, 0);
    assert_eq!(client.info.block_sizes.unwrap().minimum_bytes, 512);
    client.write(1024, &[2; 512]).unwrap();
    client.flush().unwrap();
    let read = client.read(0, 2048).unwrap();
    assert!(
        read[..512] == [0; 512]
            && read[512..1024] == [1; 512]
            && read[1024..1536] == [2; 512]
            && read[1536..] == [0; 512]
    );
    let snapshot = std::fs::read(server.data.copy_files().path(CopyTarget::Snapshot(snapshot_uid))).unwrap();
    assert!(snapshot[512..1024] == [1; 512] && snapshot[1024..1536] == [0; 512]);
    // Whole blocks go past the page cache, as before.
    let large = server.create_with("large", 16 << 20, |new| new.block_size_bytes = 4096);
    let opened = |block_size_bytes| {
        server::backend::file::open(
            &server.volumes_dir,
            large.volume_uid,
            16 << 20,
            block_size_bytes,
            CacheMode::Auto,
            1,
        )
        .unwrap()
    };
    assert!(opened(4096).is_direct() && !opened(512).is_direct());
}

#[test]
fn what_cannot_be_copied_is_refused_with_the_reason_and_the_way_out() {
    let server = Server::start();
    let memory = server.create_with("mem", 1 << 20, |new| new.backend = BackendKind::Memory);
    let refused = server.data.begin_copies(&[snapshot_of(&memory, Uuid::new_v4())]).unwrap_err();
    assert!(
        matches!(&refused, CopyError::Unsupported(words) if words.contains("mem has the backend memory")),
        "{refused}"
    );
    let Some(stage) = Stage::new("ext4", 64 << 20, |_| {}) else { return };
    let volume = stage.server.create("vol", 1 << 20);
    let refused = stage.begin(&[snapshot_of(&volume, Uuid::new_v4())]).unwrap_err();
    assert_eq!(Err(refused.clone()), stage.server.data.can_copy());
    let words = refused.to_string();
    assert!(words.contains("ext4") && words.contains("put --data-dir on XFS"), "{words}");
    assert_eq!(stage.server.data.copy_files().stored().unwrap(), []);
    // Small blocks go past the page cache where nothing can come to be shared.
    let opened = server::backend::file::open(
        &stage.server.volumes_dir,
        volume.volume_uid,
        1 << 20,
        512,
        CacheMode::Auto,
        1,
    );
    assert!(opened.unwrap().is_direct());
}
