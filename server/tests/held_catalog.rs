//! Somebody has the catalog open for writing: calls say who, in bounded time; disks go on, and wait where they connect.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests; this one needs less.
mod client;
mod unit_filter;
mod volserver;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use proto::export_name::{AttachmentExportName, Secret};
use proto::v1;
use rusqlite::Connection;
use tonic::Code;
use tonic_types::StatusExt as _;

use client::Client;
use volserver::{Volserver, attach_request, command, create_request, refused};

/// Another program's transaction, until it is dropped.
fn hold(data_dir: &Path, begin: &str) -> Connection {
    let db = Connection::open(data_dir.join("catalog.sqlite")).unwrap();
    db.execute_batch(begin).unwrap();
    db
}

/// How the holder, this process, has to be named in a message: always, unless the kernel's list of locks does not have it under the number
/// that the file has.
fn assert_named(data_dir: &Path, text: &str) {
    let own = std::process::id();
    assert!(text.contains("another program"), "{text}");
    let named = text.contains("another program (") && text.contains(&format!("pid {own})"));
    let inodes = ["", "-wal", "-shm"].into_iter().filter_map(|suffix| {
        std::fs::metadata(data_dir.join(format!("catalog.sqlite{suffix}")))
            .ok()
            .map(|metadata| metadata.ino())
    });
    let inodes: Vec<String> = inodes.map(|inode| format!(":{inode}")).collect();
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let is_listed = locks.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(3);
        let is_own = fields.next() == Some("WRITE") && fields.next() == Some(&own.to_string());
        is_own && fields.next().is_some_and(|file| inodes.iter().any(|inode| file.ends_with(inode)))
    });
    assert!(named || !is_listed, "{text}\n{locks}");
}

fn export_name(attached: &v1::AttachVolumeResponse, epoch: u64) -> String {
    let attachment_id = attached.attachment.as_ref().unwrap().attachment_id.parse().unwrap();
    let secret = Secret::parse(&attached.secret).unwrap();
    AttachmentExportName { attachment_id, secret, epoch, slot: 0 }.expose()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_holds_the_catalog_is_named_and_disks_go_on() {
    for begin in ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"] {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        let server = Volserver::start(&data_dir);
        let mut api = server.client().await;
        api.create_volume(create_request("vol")).await.unwrap();
        let attached = api.attach_volume(attach_request("vol", "node", false)).await.unwrap().into_inner();
        let mut disk = Client::open(server.data[0], &export_name(&attached, 1)).unwrap();
        disk.write(8192, &[1; 4096]).unwrap();
        api.create_volume(create_request("vol-1")).await.unwrap();
        let new = api.attach_volume(attach_request("vol-1", "node", false)).await.unwrap().into_inner();
        let mut new_disk = Client::open(server.data[0], &export_name(&new, 1)).unwrap();

        let held = hold(&data_dir, begin);
        let began = Instant::now();
        let status = api.create_volume(create_request("vol-2")).await.unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert_eq!(status.get_details_error_info().unwrap().reason, reason::CATALOG_HELD);
        assert_named(&data_dir, status.message());

        // Those behind it do not wait for one another.
        let began = Instant::now();
        for number in 0..20 {
            let status = api.create_volume(create_request(&format!("late-{number}"))).await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
        }
        // Reading does not wait at all, nor does what is connected.
        api.get_volume(v1::GetVolumeRequest { name: "vol".to_owned(), ..Default::default() }).await.unwrap();
        disk.write(0, &[7; 4096]).unwrap();
        disk.flush().unwrap();
        assert_eq!(disk.read(0, 4096).unwrap(), [7; 4096]);
        // That a new volume is written to has to be in the catalog first: until then its disk reads.
        assert_eq!(new_disk.read(0, 4096).unwrap(), [0; 4096]);
        // A connection of the same session comes again; a new session, which the catalog has to know, is told to come later.
        drop(disk);
        drop(Client::open(server.data[0], &export_name(&attached, 1)).unwrap());
        let error = Client::open(server.data[0], &export_name(&attached, 2)).err().unwrap().to_string();
        assert!(error.contains("cannot record the session now"), "{error}");
        // Less than one full wait for each.
        assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());

        drop(held);
        new_disk.write(0, &[7; 4096]).unwrap();
        let mut again = Client::open(server.data[0], &export_name(&attached, 2)).unwrap();
        assert_eq!(again.read(0, 4096).unwrap(), [7; 4096]);
        api.create_volume(create_request("vol-2")).await.unwrap();
        let listed = api.list_volumes(v1::ListVolumesRequest::default()).await.unwrap().into_inner().volumes;
        let names: Vec<&str> = listed.iter().map(|volume| &volume.name[..]).collect();
        assert_eq!(names, ["vol", "vol-1", "vol-2"], "what was refused left nothing");
    }
}

#[test]
fn a_server_that_finds_its_catalog_held_says_by_whom() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    Volserver::start(&data_dir).stop(rustix::process::Signal::TERM);
    for begin in ["BEGIN IMMEDIATE", "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE"] {
        let held = hold(&data_dir, begin);
        let (code, text) = refused(command(&data_dir));
        assert_eq!(code, 3, "{text}");
        assert_named(&data_dir, &text);
        assert!(text.contains("holds the catalog") && text.contains("close it"), "{text}");
        drop(held);
        Volserver::start(&data_dir).stop(rustix::process::Signal::TERM);
    }
}
