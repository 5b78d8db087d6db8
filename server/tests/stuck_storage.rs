//! Storage that answers no more: who waits for it does, for a while, and the API goes on for everybody else.
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
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use proto::v1::{self, management_client::ManagementClient};
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

use support::{LoopFs, TempDir};
use volserver::{DEADLINE, Volserver, attach_request, command, create_request};

/// More than the API has calls at once.
const STUCK_VOLUMES: usize = 40;
/// The others are answered by then; a call for one of the stuck volumes may take 25 s.
const LOOK_BOUND: Duration = Duration::from_secs(4);
const ATTACH_BOUND: Duration = Duration::from_secs(15);

fn stuck_name(number: usize) -> String {
    format!("stuck-{number}")
}

async fn create_all(api: &mut ManagementClient<Channel>) {
    for number in 0..STUCK_VOLUMES {
        api.create_volume(create_request(&stuck_name(number))).await.unwrap();
    }
    let in_memory = v1::Backend::Memory.into();
    let request = v1::CreateVolumeRequest { backend: in_memory, ..create_request("other") };
    api.create_volume(request).await.unwrap();
}

/// Gives every file something to write: a sync of a clean file waits for nothing.
fn make_dirty(volumes_dir: &Path) {
    for entry in std::fs::read_dir(volumes_dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            File::options().write(true).open(path).unwrap().write_all_at(&[1; 4096], 0).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn syncs_that_do_not_return_hold_nobody_else_up() {
    // A file system whose disk is a file of another one, which can be frozen.
    let Some(lower) = LoopFs::new("ext4", 256 << 20) else { return };
    let image = lower.mount.join("image");
    let Some(upper) = LoopFs::new_at(TempDir::new(), image, "ext4", 192 << 20, &[]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    std::fs::create_dir(&data_dir).unwrap();
    std::os::unix::fs::symlink(&upper.mount, data_dir.join("volumes")).unwrap();
    let server = Volserver::start_with(command(&data_dir), &dir.path().join("log"));
    let mut api = server.client().await;
    create_all(&mut api).await;

    let frozen = lower.freeze();
    make_dirty(&upper.mount);
    let mut stuck = JoinSet::new();
    for number in 0..STUCK_VOLUMES {
        // As of nodes of their own: a connection has fewer calls at once.
        let mut api = server.client().await;
        let request = attach_request(&stuck_name(number), "node-a", false);
        stuck.spawn(async move { api.attach_volume(request).await });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;

    let started = Instant::now();
    api.get_volume(v1::GetVolumeRequest { name: "other".to_owned(), ..Default::default() }).await.unwrap();
    api.list_volumes(v1::ListVolumesRequest::default()).await.unwrap();
    api.list_attachments(v1::ListAttachmentsRequest::default()).await.unwrap();
    assert!(started.elapsed() < LOOK_BOUND, "looks took {:?}", started.elapsed());
    let attached = api.attach_volume(attach_request("other", "node-a", false)).await;
    attached.unwrap();
    assert!(started.elapsed() < ATTACH_BOUND, "another volume's attach took {:?}", started.elapsed());

    // Each of the stuck ones is told in time that it may be repeated.
    while let Some(outcome) = tokio::time::timeout(DEADLINE, stuck.join_next()).await.unwrap() {
        let refused = outcome.unwrap().unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        assert_eq!(refused.get_details_error_info().unwrap().reason, reason::FENCE_UNFINISHED, "{refused}");
        assert!(refused.message().contains("its storage does not answer"), "{refused}");
    }
    drop(frozen);
    for number in 0..STUCK_VOLUMES {
        attach_at_last(&mut api, &stuck_name(number)).await;
    }
    drop((api, server));
}

async fn attach_at_last(api: &mut ManagementClient<Channel>, name: &str) {
    let deadline = Instant::now() + DEADLINE;
    while let Err(refused) = api.attach_volume(attach_request(name, "node-a", false)).await {
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        assert!(Instant::now() < deadline, "{refused}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
