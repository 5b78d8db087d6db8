//! A server that is killed while a write of it is in the kernel: nobody else has the volume before that write has landed.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests, as the next one; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;
mod volserver;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc;
use std::time::Duration;

use proto::nbd::transmission::{Command, CommandFlags};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use server::backend::file;
use server::catalog::{BackendKind, Catalog, NewAttachment, NewVolume};

use client::Client;
use support::{LoopFs, TempDir, export_name, wait_until};
use volserver::Volserver;

const CAPACITY_BYTES: u64 = 16 << 20;

fn first_block(file: &File) -> Vec<u8> {
    let mut block = vec![0; 4096];
    file.read_exact_at(&mut block, 0).unwrap();
    block
}

/// Whether a worker of io_uring is in uninterruptible sleep.
fn has_blocked_worker(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
    // "tid (name) state …"
    stats
        .filter_map(|stat| Some(stat.split_once("(iou-wrk")?.1.split_once(") ")?.1.starts_with('D')))
        .any(|is| is)
}

#[test]
fn a_killed_servers_last_write_lands_before_its_lock_is_free() {
    let Some(fs) = LoopFs::new("xfs", 320 << 20) else { return };
    let dir = TempDir::new();
    let data_dir = dir.0.join("data");
    let catalog = Catalog::open(&data_dir).unwrap();
    // The catalog stays on a file system that is not frozen.
    std::fs::remove_dir(catalog.volumes_dir()).unwrap();
    std::os::unix::fs::symlink(&fs.mount, catalog.volumes_dir()).unwrap();
    let volume = catalog
        .begin_creating(&NewVolume {
            name: "vol".into(),
            capacity_bytes: CAPACITY_BYTES,
            block_size_bytes: 4096,
            backend: BackendKind::File,
            write_cache_on: true,
            settings: Default::default(),
        })
        .unwrap();
    file::create(&fs.mount, volume.volume_uid, CAPACITY_BYTES).unwrap();
    catalog.finish_creating(volume.volume_uid).unwrap();
    let new = NewAttachment {
        volume_uid: volume.volume_uid,
        node_id: "node-a".into(),
        read_only: false,
        boot_id: String::new(),
        is_shared: false,
        only_if_granted: false,
    };
    let attachment = catalog.add_attachment(&new).unwrap();
    drop(catalog);

    let server = Volserver::start(&data_dir);
    let mut client = Client::open(server.data[0], &export_name(&attachment, 1, 0)).unwrap();
    client.write(0, &[1; 4096]).unwrap();
    let frozen = fs.freeze();
    client.send(Command::Write, CommandFlags::NONE, 0, 4096, &[2; 4096]);
    // A write that no worker has begun when the process dies is never done, which is as good; this one has to be begun.
    wait_until("the write hangs in the file system", || has_blocked_worker(server.pid()));
    let pid = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    // The client hears nothing of it: the kernel closes the process's files, sockets too, when its last thread has
    // ended, and one of them is still in the file system.

    let path = file::path(&fs.mount, volume.volume_uid);
    let (sender, locked) = mpsc::channel();
    let successor = std::thread::spawn(move || {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        sender.send(first_block(&file)).unwrap();
    });
    let early = locked.recv_timeout(Duration::from_millis(500));
    assert!(early.is_err(), "the lock was free while a write of the killed server was in the kernel");
    drop(frozen);
    assert_eq!(
        locked.recv_timeout(Duration::from_secs(20)).unwrap(),
        [2; 4096],
        "landed before the lock was free"
    );
    successor.join().unwrap();
    drop(server);

    let server = Volserver::start(&data_dir);
    let mut client = Client::open(server.data[0], &export_name(&attachment, 1, 0)).unwrap();
    assert_eq!(client.read(0, 4096), Ok(vec![2; 4096]));
}
