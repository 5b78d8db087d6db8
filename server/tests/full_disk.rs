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

use proto::v1;
use rustix::process::Signal;

use support::LoopFs;
use volserver::{Volserver, command, create_request, refused};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_on_a_full_file_system_starts_or_says_which_one_is_full() {
    for kind in ["ext4", "xfs"] {
        let Some(fs) = LoopFs::new(kind, if kind == "xfs" { 320 << 20 } else { 24 << 20 }) else { return };
        let (data_dir, filler) = (fs.mount.join("data"), fs.mount.join("filler"));
        let logs = tempfile::tempdir().unwrap();
        let command = |data_dir: &Path| {
            let mut command = command(data_dir);
            command.env("VOLSERVER_RUNTIME_DIR", logs.path().join("run"));
            command
        };
        let start = || Volserver::start_with(command(&data_dir), &logs.path().join("log"));
        let server = start();
        server.client().await.create_volume(create_request("vol-1")).await.unwrap();
        assert!(server.stop(Signal::TERM).success());
        fill(&filler);
        let (code, stderr) = refused(command(&data_dir));
        assert_eq!(code, 8, "{kind}: {stderr}");
        let line = stderr.lines().find(|line| line.starts_with("volserver: ")).unwrap();
        assert!(line.contains("no space left") && line.contains(data_dir.to_str().unwrap()), "{line}");
        std::fs::remove_file(&filler).unwrap();
        let server = start();
        let request = v1::GetVolumeRequest { name: "vol-1".to_owned() };
        server.client().await.get_volume(request).await.unwrap();
        assert!(server.stop(Signal::TERM).success());
    }
}
