//! A data directory on a full file system: what an administrator is told, and that nothing is lost by it.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests, as the next one; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;
mod volserver;

use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::Path;
use std::process::Command;

use proto::v1;
use rustix::process::Signal;

use client::Client;
use support::LoopFs;
use volserver::{Volserver, attach_request, command, create_request, export_name, refused};

/// Takes all the space that there is, to the last byte.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    for piece_bytes in [1 << 20, 4096, 1] {
        let error = loop {
            if let Err(error) = file.write_all(&vec![1; piece_bytes]) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }
    // Delayed allocation finds out at the sync.
    let _ = file.sync_all();
}

/// A server whose runtime directory is not on the file system that is full.
fn command_beside(data_dir: &Path, elsewhere: &Path) -> Command {
    let mut command = command(data_dir);
    command.env("VOLSERVER_RUNTIME_DIR", elsewhere.join("run"));
    command
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_file_system_only_what_needs_space_is_refused() {
    for kind in ["ext4", "xfs"] {
        let Some(fs) = LoopFs::new(kind, if kind == "xfs" { 320 << 20 } else { 48 << 20 }) else { return };
        let (data_dir, filler) = (fs.mount.join("data"), fs.mount.join("filler"));
        let logs = tempfile::tempdir().unwrap();
        let command = |data_dir: &Path| command_beside(data_dir, logs.path());
        let start = || Volserver::start_with(command(&data_dir), &logs.path().join("log"));
        let server = start();
        let mut client = server.client().await;
        for number in 0..40 {
            client.create_volume(create_request(&format!("vol-{number}"))).await.unwrap();
        }
        let attached =
            client.attach_volume(attach_request("vol-1", "node", false)).await.unwrap().into_inner();
        fill(&filler);
        // The catalog: sessions that are begun, attachments that end, volumes that go.
        for epoch in 1..20 {
            drop(Client::open(server.data[0], &export_name(&attached, epoch)).unwrap());
        }
        let refused = client.create_volume(create_request(&"n".repeat(60))).await;
        if let Err(status) = refused {
            assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{kind}: {status:?}");
        }
        server.kill();
        let server = start();
        let mut client = server.client().await;
        drop(Client::open(server.data[0], &export_name(&attached, 30)).unwrap());
        let detach = v1::DetachVolumeRequest { volume_name: "vol-1".to_owned(), ..Default::default() };
        let detached = client.detach_volume(detach).await;
        assert!(detached.is_ok_and(|detached| detached.into_inner().existed), "{}", server.log());
        assert!(server.stop(Signal::TERM).success());
        // In the meantime somebody takes what the stopped server gave back.
        fill(&fs.mount.join("another"));
        let server = start();
        let mut client = server.client().await;
        for number in 0..40 {
            let request = v1::DeleteVolumeRequest { name: format!("vol-{number}"), ..Default::default() };
            let deleted = client.delete_volume(request).await;
            assert!(
                deleted.as_ref().is_ok_and(|deleted| deleted.get_ref().existed),
                "{kind} {number} {deleted:?}: {}",
                server.log()
            );
        }
        std::fs::remove_file(&filler).unwrap();
        client.create_volume(create_request("again")).await.unwrap();
    }
}

/// How many changes are kept.
fn changes(data_dir: &Path) -> u32 {
    let db = rusqlite::Connection::open(data_dir.join("catalog.sqlite")).unwrap();
    db.query_row("SELECT count(*) FROM changes", [], |row| row.get(0)).unwrap()
}

/// What is written down of them makes room for what is to come: there is no end to them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_file_system_volumes_are_attached_and_detached_on_and_on() {
    for kind in ["ext4", "xfs"] {
        let Some(fs) = LoopFs::new(kind, if kind == "xfs" { 320 << 20 } else { 48 << 20 }) else { return };
        let data_dir = fs.mount.join("data");
        let logs = tempfile::tempdir().unwrap();
        let command = |data_dir: &Path| command_beside(data_dir, logs.path());
        let start = || Volserver::start_with(command(&data_dir), &logs.path().join("log"));
        let server = start();
        server.client().await.create_volume(create_request("vol-1")).await.unwrap();
        assert!(server.stop(Signal::TERM).success());
        // What has happened before.
        let before = 1000;
        rusqlite::Connection::open(data_dir.join("catalog.sqlite"))
            .unwrap()
            .execute(
                "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?1) \
                 INSERT INTO nodes (node_id, boot_id, version, labels, registered_at_ms) SELECT printf('node-%0200d', n), '', '', '{}', 0 FROM numbers",
                [before],
            )
            .unwrap();
        assert!(changes(&data_dir) > before);
        let mut server = start();
        let filler = fs.mount.join("filler");
        fill(&filler);
        let rounds = 300;
        for round in 0..rounds {
            if round == rounds / 2 {
                server.kill();
                server = start();
            }
            let mut client = server.client().await;
            let attached = client.attach_volume(attach_request("vol-1", "node", false)).await;
            assert!(attached.is_ok(), "{kind} {round} {attached:?}: {}", server.log());
            let detach = v1::DetachVolumeRequest { volume_name: "vol-1".to_owned(), ..Default::default() };
            let detached = client.detach_volume(detach).await;
            assert!(detached.is_ok(), "{kind} {round} {detached:?}: {}", server.log());
        }
        assert!(server.stop(Signal::TERM).success());
        std::fs::remove_file(&filler).unwrap();
        let kept = changes(&data_dir);
        assert!((256..2 * rounds + before).contains(&kept), "{kind}: {kept}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_cannot_start_says_which_file_system_is_full() {
    for kind in ["ext4", "xfs"] {
        let Some(fs) = LoopFs::new(kind, if kind == "xfs" { 320 << 20 } else { 24 << 20 }) else { return };
        let (data_dir, filler) = (fs.mount.join("data"), fs.mount.join("filler"));
        let logs = tempfile::tempdir().unwrap();
        let command = |data_dir: &Path| command_beside(data_dir, logs.path());
        let start = || Volserver::start_with(command(&data_dir), &logs.path().join("log"));
        let server = start();
        server.client().await.create_volume(create_request("vol-1")).await.unwrap();
        assert!(server.stop(Signal::TERM).success());
        // As one that has had to be given up.
        std::fs::remove_file(data_dir.join("reserve")).unwrap();
        fill(&filler);
        let (code, stderr) = refused(command(&data_dir));
        assert_eq!(code, 8, "{kind}: {stderr}");
        let line = stderr.lines().find(|line| line.starts_with("volserver: ")).unwrap();
        assert!(line.contains("no space left") && line.contains(data_dir.to_str().unwrap()), "{line}");
        std::fs::remove_file(&filler).unwrap();
        let server = start();
        let request = v1::GetVolumeRequest { name: "vol-1".to_owned(), ..Default::default() };
        server.client().await.get_volume(request).await.unwrap();
        assert!(server.stop(Signal::TERM).success());
    }
}
