//! Snapshots, clones and restores through the management API of the real volserver, on an XFS of the test's own; and by name.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests, as the next one; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;
mod volserver;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use proto::v1::{self, management_client::ManagementClient};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use client::Client;
use support::LoopFs;
use volserver::{DEADLINE, Volserver, attach_request, command, create_request, export_name};

/// Room for what the tests write, and more than the reserve by default.
const XFS_BYTES: u64 = 400 << 20;
const BLOCK: u32 = 4096;

/// A server whose data directory is on a file system of the test's own, and a client of it.
struct Bench {
    // In this order: the server ends before its storage.
    server: Volserver,
    client: ManagementClient<Channel>,
    log_dir: tempfile::TempDir,
    fs: LoopFs,
}

impl Bench {
    /// `None`, with the reason said, where the file system cannot be made.
    async fn on(kind: &str, args: &[&str]) -> Option<Self> {
        let fs = LoopFs::new(kind, XFS_BYTES)?;
        let log_dir = tempfile::tempdir().unwrap();
        let mut command = Self::command(&fs, &log_dir);
        command.args(args);
        let server = Volserver::start_with(command, &log_dir.path().join("log"));
        let client = server.client().await;
        Some(Self { server, client, log_dir, fs })
    }

    async fn new() -> Option<Self> {
        Self::on("xfs", &[]).await
    }

    fn command(fs: &LoopFs, log_dir: &tempfile::TempDir) -> Command {
        let mut command = command(&fs.mount.join("data"));
        command.env("VOLSERVER_RUNTIME_DIR", log_dir.path().join("run")).arg("--export-by-name");
        command
    }

    /// The server is killed, and another started.
    async fn restart(self) -> Self {
        let Self { server, log_dir, fs, .. } = self;
        server.kill();
        let server = Volserver::start_with(Self::command(&fs, &log_dir), &log_dir.path().join("log"));
        let client = server.client().await;
        Self { server, client, log_dir, fs }
    }

    async fn create(&mut self, name: &str) -> v1::Volume {
        self.client.create_volume(create_request(name)).await.unwrap().into_inner()
    }

    async fn get(&mut self, name: &str) -> v1::Volume {
        let request = v1::GetVolumeRequest { name: name.to_owned(), ..Default::default() };
        self.client.get_volume(request).await.unwrap().into_inner()
    }

    /// What a volume and a snapshot of it have alone.
    async fn exclusive(&mut self, name: &str, snapshot: &str) -> (Option<u64>, Option<u64>) {
        let request = v1::GetVolumeRequest { name: name.to_owned(), with_exclusive_bytes: true };
        let volume = self.client.get_volume(request).await.unwrap().into_inner();
        let request = v1::GetSnapshotRequest {
            volume_name: name.to_owned(),
            name: snapshot.to_owned(),
            with_exclusive_bytes: true,
            ..Default::default()
        };
        let snapshot = self.client.get_snapshot(request).await.unwrap().into_inner();
        (volume.exclusive_bytes, snapshot.exclusive_bytes)
    }

    /// To its end.
    async fn snapshot(&mut self, volumes: &[&str], name: &str) -> Result<Vec<v1::Snapshot>, Status> {
        let answer = self.client.create_snapshot(snapshot_request(volumes, name)).await?.into_inner();
        match answer.operation {
            None => Ok(answer.snapshots),
            Some(operation) => {
                self.finish(operation).await;
                let again = self.client.create_snapshot(snapshot_request(volumes, name)).await?;
                Ok(again.into_inner().snapshots)
            }
        }
    }

    async fn clone_of(&mut self, request: v1::CloneVolumeRequest) -> Result<v1::Volume, Status> {
        let name = request.name.clone();
        let answer = self.client.clone_volume(request).await?.into_inner();
        if let Some(operation) = answer.operation {
            self.finish(operation).await;
        }
        Ok(self.get(&name).await)
    }

    async fn restore(&mut self, volume_name: &str, snapshot_name: &str) -> Result<v1::Volume, Status> {
        let request = v1::RestoreVolumeRequest {
            volume_name: volume_name.to_owned(),
            snapshot_name: snapshot_name.to_owned(),
            ..Default::default()
        };
        let answer = self.client.restore_volume(request).await?.into_inner();
        if let Some(operation) = answer.operation {
            self.finish(operation).await;
        }
        Ok(self.get(volume_name).await)
    }

    async fn finish(&mut self, mut operation: v1::Operation) {
        let deadline = Instant::now() + DEADLINE;
        while operation.state() == v1::OperationState::Running {
            assert!(Instant::now() < deadline, "{operation:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
            let request = v1::GetOperationRequest { operation_id: operation.operation_id };
            operation = self.client.get_operation(request).await.unwrap().into_inner();
        }
        assert_eq!(operation.state(), v1::OperationState::Succeeded, "{operation:?}");
        assert_eq!(operation.done_bytes, operation.total_bytes, "{operation:?}");
    }

    async fn delete_snapshot(&mut self, volume_name: &str, name: &str) -> Result<bool, Status> {
        let request = v1::DeleteSnapshotRequest {
            volume_name: volume_name.to_owned(),
            name: name.to_owned(),
            ..Default::default()
        };
        Ok(self.client.delete_snapshot(request).await?.into_inner().existed)
    }

    async fn delete_volume(&mut self, name: &str, keep_snapshots: bool) -> Result<bool, Status> {
        let request = v1::DeleteVolumeRequest { name: name.to_owned(), keep_snapshots, ..Default::default() };
        Ok(self.client.delete_volume(request).await?.into_inner().existed)
    }

    /// `VOLUME@NAME`, as listed by pages of that size.
    async fn listed(&mut self, page_size: u32) -> Vec<String> {
        let (mut names, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = v1::ListSnapshotsRequest { page_size, page_token, ..Default::default() };
            let page = self.client.list_snapshots(request).await.unwrap().into_inner();
            names.extend(page.snapshots.iter().map(|one| format!("{}@{}", one.volume_name, one.name)));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return names;
            }
        }
    }

    fn open(&self, name: &str) -> Client {
        Client::open(self.server.data[0], name).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Writes a block of that byte, durably, as a client that opens the volume by name.
    fn write(&self, name: &str, byte: u8) {
        let mut client = self.open(name);
        client.write(0, &[byte; BLOCK as usize]).unwrap();
        client.flush().unwrap();
    }

    fn read(&self, name: &str) -> u8 {
        let block = self.open(name).read(0, BLOCK).unwrap();
        assert!(block.iter().all(|byte| *byte == block[0]), "of one write");
        block[0]
    }

    fn files(&self, directory: &str) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.fs.mount.join("data").join(directory)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn snapshot_request(volumes: &[&str], name: &str) -> v1::CreateSnapshotRequest {
    let volume_names = volumes.iter().map(|name| (*name).to_owned()).collect();
    v1::CreateSnapshotRequest { volume_names, name: name.to_owned(), ..Default::default() }
}

fn clone_request(name: &str, volume: &str, snapshot: &str) -> v1::CloneVolumeRequest {
    v1::CloneVolumeRequest {
        name: name.to_owned(),
        source_volume_name: volume.to_owned(),
        source_snapshot_name: snapshot.to_owned(),
        ..Default::default()
    }
}

/// Code and reason: what programs decide by.
fn reason_of(status: &Status) -> (Code, String) {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, reason::DOMAIN);
    assert!(!info.metadata[reason::METADATA_NEXT].is_empty(), "{info:?}");
    (status.code(), info.reason)
}

fn is(code: Code, word: &str) -> (Code, String) {
    (code, word.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_keeps_what_was_there_and_is_read_by_name() {
    let Some(mut bench) = Bench::new().await else { return };
    let volume = bench.create("vol").await;
    bench.write("vol", 1);
    let made = bench.snapshot(&["vol"], "monday").await.unwrap();
    assert_eq!(
        (made[0].state(), made[0].volume_uid.as_str()),
        (v1::SnapshotState::Ready, volume.volume_uid.as_str())
    );
    assert_eq!((made[0].capacity_bytes, made[0].block_size_bytes), (1 << 20, 4096));
    assert!(made[0].allocated_bytes >= u64::from(BLOCK) && made[0].created_at_ms >= volume.created_at_ms);
    assert_eq!(bench.exclusive("vol", "monday").await, (Some(0), Some(0)), "all is of both");
    bench.write("vol", 2);
    assert_eq!((bench.read("vol"), bench.read("vol@monday")), (2, 1));
    let block = Some(u64::from(BLOCK));
    assert_eq!(bench.exclusive("vol", "monday").await, (block, block), "each has a block of its own");
    assert_eq!(bench.get("vol").await.exclusive_bytes, None, "nobody asked for it");
    let by_uid = format!("@{}", made[0].snapshot_uid);
    assert_eq!(bench.read(&by_uid), 1);
    let mut reader = bench.open("vol@monday");
    assert!(reader.write(0, &[3; BLOCK as usize]).is_err(), "it never changes");
    assert_eq!(bench.get("vol").await.snapshot_count, 1);
    let again = bench.snapshot(&["vol"], "monday").await.unwrap();
    assert_eq!(again, made);

    let refused = bench.delete_snapshot("vol", "monday").await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::SNAPSHOT_OPEN));
    drop(reader);
    support::wait_until("nobody has it open", || {
        let mut client = bench.client.clone();
        let request =
            v1::DeleteSnapshotRequest { snapshot_uid: made[0].snapshot_uid.clone(), ..Default::default() };
        let deleted = async move { client.delete_snapshot(request).await };
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(deleted)).is_ok()
    });
    assert!(!bench.delete_snapshot("vol", "monday").await.unwrap(), "deleting again is a success");
    assert!(bench.files("snapshots").is_empty() && bench.get("vol").await.snapshot_count == 0);
    assert!(Client::open(bench.server.data[0], "vol@monday").is_err());
    let request = v1::GetSnapshotRequest { snapshot_uid: made[0].snapshot_uid.clone(), ..Default::default() };
    let refused = bench.client.get_snapshot(request).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::NotFound, reason::SNAPSHOT_NOT_FOUND));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_of_one_instant_and_lists_go_through_every_page() {
    let Some(mut bench) = Bench::new().await else { return };
    for name in ["a", "b", "c"] {
        bench.create(name).await;
    }
    let made = bench.snapshot(&["b", "a"], "s").await.unwrap();
    assert_eq!((made[0].volume_name.as_str(), made[1].volume_name.as_str()), ("b", "a"), "as asked");
    assert_eq!(made[0].group_uid, made[1].group_uid);
    let other = bench.snapshot(&["c"], "s").await.unwrap();
    let refused = bench.snapshot(&["b", "c"], "s").await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::AlreadyExists, reason::SNAPSHOT_EXISTS));
    bench.snapshot(&["a"], "r").await.unwrap();
    for page_size in [1, 3, 0] {
        assert_eq!(bench.listed(page_size).await, ["a@r", "a@s", "b@s", "c@s"]);
    }
    let group_uid = other[0].group_uid.clone();
    let of_group = v1::ListSnapshotsRequest { group_uid, ..Default::default() };
    let of_volume = v1::ListSnapshotsRequest { volume_name: "c".to_owned(), ..Default::default() };
    for request in [of_group, of_volume] {
        let listed = bench.client.list_snapshots(request).await.unwrap().into_inner();
        assert_eq!(listed.snapshots, other);
    }
    // Of one name, through pages.
    let mut of_name = v1::ListSnapshotsRequest { name: "s".to_owned(), page_size: 2, ..Default::default() };
    let page = bench.client.list_snapshots(of_name.clone()).await.unwrap().into_inner();
    let volumes = |page: &v1::ListSnapshotsResponse| -> Vec<String> {
        page.snapshots.iter().map(|snapshot| snapshot.volume_name.clone()).collect()
    };
    assert_eq!(volumes(&page), ["a", "b"]);
    of_name.page_token = page.next_page_token;
    let page = bench.client.list_snapshots(of_name).await.unwrap().into_inner();
    assert_eq!((volumes(&page), page.next_page_token.as_str()), (vec!["c".to_owned()], ""));
    let off = v1::ListSnapshotsRequest { name: "a/b".to_owned(), ..Default::default() };
    assert_eq!(bench.client.list_snapshots(off).await.unwrap_err().code(), Code::InvalidArgument);
    let foreign = v1::ListSnapshotsRequest { page_token: "1.volumes.x".to_owned(), ..Default::default() };
    assert_eq!(bench.client.list_snapshots(foreign).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_request_is_told_of_each_field() {
    let Some(mut bench) = Bench::new().await else { return };
    bench.create("vol").await;
    let fields = |status: Status| -> Vec<String> {
        assert_eq!(reason_of(&status), is(Code::InvalidArgument, reason::INVALID_FIELD));
        let violations = status.get_details_bad_request().unwrap().field_violations;
        violations.into_iter().map(|violation| violation.field).collect()
    };
    let long = "x".repeat(65);
    for (volumes, name, expected) in [
        (&[][..], "s", "volume_names"),
        (&["vol", "vol"], "s", "volume_names"),
        (&["vol"], "a@b", "name"),
        (&["vol"], &long, "name"),
    ] {
        let refused = bench.client.create_snapshot(snapshot_request(volumes, name)).await.unwrap_err();
        assert_eq!(fields(refused), [expected]);
    }
    let refused = bench.client.get_snapshot(v1::GetSnapshotRequest::default()).await.unwrap_err();
    assert_eq!(fields(refused), ["snapshot_uid"]);
    bench.snapshot(&["vol"], "s").await.unwrap();
    let smaller = v1::CloneVolumeRequest { capacity_bytes: 4096, ..clone_request("c", "vol", "s") };
    assert_eq!(fields(bench.clone_of(smaller).await.unwrap_err()), ["capacity_bytes"]);
    let unknown = v1::GetOperationRequest { operation_id: uuid::Uuid::new_v4().to_string() };
    let refused = bench.client.get_operation(unknown).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::NotFound, reason::OPERATION_NOT_FOUND));
    let refused = bench.clone_of(clone_request("c", "vol", "none")).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::NotFound, reason::SNAPSHOT_NOT_FOUND));
    let refused = bench.snapshot(&["none"], "s").await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::NotFound, reason::VOLUME_NOT_FOUND));
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_have_the_bytes_of_their_source_and_outlive_it() {
    let Some(mut bench) = Bench::new().await else { return };
    let volume = bench.create("vol").await;
    bench.write("vol", 1);
    let snapshot = bench.snapshot(&["vol"], "s").await.unwrap().remove(0);
    bench.write("vol", 2);
    let larger = v1::CloneVolumeRequest { capacity_bytes: 2 << 20, ..clone_request("of-s", "vol", "s") };
    let of_snapshot = bench.clone_of(larger.clone()).await.unwrap();
    assert_eq!((of_snapshot.capacity_bytes, &of_snapshot.source_uid), (2 << 20, &snapshot.snapshot_uid));
    let of_volume = bench.clone_of(clone_request("of-vol", "vol", "")).await.unwrap();
    assert_eq!(of_volume.source_uid, volume.volume_uid);
    assert_eq!((bench.read("of-s"), bench.read("of-vol")), (1, 2));
    let tail = bench.open("of-s").read(1 << 20, BLOCK).unwrap();
    assert!(tail.iter().all(|byte| *byte == 0), "what the source has not reads as zeroes");
    // A clone of a clone, written to.
    bench.write("of-vol", 3);
    bench.clone_of(clone_request("again", "of-vol", "")).await.unwrap();
    assert_eq!((bench.read("again"), bench.read("vol")), (3, 2));
    // Idempotent by name and source.
    assert_eq!(bench.clone_of(larger).await.unwrap().volume_uid, of_snapshot.volume_uid);
    let refused = bench.clone_of(clone_request("of-s", "vol", "")).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::AlreadyExists, reason::VOLUME_DIFFERS));
    let refused = bench.clone_of(clone_request("vol", "of-vol", "")).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::AlreadyExists, reason::VOLUME_DIFFERS));
    // Any order of deletion.
    assert!(bench.delete_snapshot("vol", "s").await.unwrap());
    for name in ["vol", "of-vol"] {
        let deleted = bench.delete_volume(name, false).await;
        assert!(deleted.unwrap(), "{name}");
    }
    bench = bench.restart().await;
    assert_eq!((bench.read("of-s"), bench.read("again")), (1, 3));
}

/// What a second time would undo: what was written since, or what somebody else has made of the same name.
#[tokio::test(flavor = "multi_thread")]
async fn snapshots_clones_and_restores_with_an_id_are_made_once() {
    let Some(mut bench) = Bench::new().await else { return };
    let id = |number: u128| uuid::Uuid::from_u128(number).to_string();
    bench.create("vol").await;
    bench.write("vol", 1);
    let take = v1::CreateSnapshotRequest { request_id: id(1), ..snapshot_request(&["vol"], "s") };
    let clone = v1::CloneVolumeRequest { request_id: id(2), ..clone_request("new", "vol", "s") };
    let restore = v1::RestoreVolumeRequest {
        volume_name: "vol".to_owned(),
        snapshot_name: "s".to_owned(),
        request_id: id(3),
    };
    let forget = v1::DeleteSnapshotRequest {
        volume_name: "vol".to_owned(),
        name: "s".to_owned(),
        request_id: id(4),
        ..Default::default()
    };
    let taken = bench.client.create_snapshot(take.clone()).await.unwrap().into_inner();
    let snapshot_uid = taken.snapshots[0].snapshot_uid.clone();
    if let Some(operation) = taken.operation {
        bench.finish(operation).await;
    }
    bench.write("vol", 2);
    let made = bench.client.clone_volume(clone.clone()).await.unwrap().into_inner();
    if let Some(operation) = made.operation {
        bench.finish(operation).await;
    }
    let cloned = bench.get("new").await;
    let answer = bench.client.restore_volume(restore.clone()).await.unwrap().into_inner();
    if let Some(operation) = answer.operation {
        bench.finish(operation).await;
    }
    assert_eq!(bench.read("vol"), 1);
    bench.write("vol", 3);
    let mut bench = bench.restart().await;
    let answer = bench.client.restore_volume(restore).await.unwrap().into_inner();
    assert!(answer.operation.is_none() && answer.volume.is_some());
    assert_eq!(bench.read("vol"), 3, "what was written since is not lost");
    let again = bench.client.create_snapshot(take.clone()).await.unwrap().into_inner();
    assert_eq!(again.snapshots[0].snapshot_uid, snapshot_uid);
    let again = bench.client.clone_volume(clone.clone()).await.unwrap().into_inner();
    assert_eq!(again.volume.unwrap().volume_uid, cloned.volume_uid);

    assert!(bench.client.delete_snapshot(forget.clone()).await.unwrap().into_inner().existed);
    bench.snapshot(&["vol"], "s").await.unwrap();
    assert!(bench.client.delete_snapshot(forget).await.unwrap().into_inner().existed);
    assert_eq!(bench.listed(0).await, ["vol@s"], "another one of that name");
    let other = v1::CreateSnapshotRequest { name: "t".to_owned(), ..take };
    let refused = bench.client.create_snapshot(other).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::InvalidArgument, reason::REQUEST_ID_REUSED));
    let other = v1::CloneVolumeRequest { name: "newer".to_owned(), ..clone };
    let refused = bench.client.clone_volume(other).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::InvalidArgument, reason::REQUEST_ID_REUSED));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_gives_the_bytes_back_and_its_next_holder_can_use_it() {
    let Some(mut bench) = Bench::new().await else { return };
    bench.create("vol").await;
    bench.write("vol", 1);
    bench.snapshot(&["vol"], "s").await.unwrap();
    let resize =
        v1::ResizeVolumeRequest { name: "vol".to_owned(), capacity_bytes: 2 << 20, ..Default::default() };
    bench.client.resize_volume(resize).await.unwrap();
    bench.write("vol", 2);
    let before = bench.get("vol").await;
    let open = bench.open("vol");
    let refused = bench.restore("vol", "s").await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::VOLUME_OPEN));
    drop(open);
    bench.client.attach_volume(attach_request("vol", "node-a", false)).await.unwrap();
    let refused = bench.restore("vol", "s").await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::VOLUME_ATTACHED));
    let detach = v1::DetachVolumeRequest { volume_name: "vol".to_owned(), ..Default::default() };
    bench.client.detach_volume(detach).await.unwrap();
    let deadline = Instant::now() + DEADLINE;
    let restored = loop {
        match bench.restore("vol", "s").await {
            // The connection that was dropped above may not have ended.
            Err(status) if Instant::now() < deadline => assert_eq!(reason_of(&status).1, reason::VOLUME_OPEN),
            restored => break restored.unwrap(),
        }
    };
    assert_ne!(restored.storage_incarnation, before.storage_incarnation);
    assert_eq!(
        (restored.capacity_bytes, &restored.volume_uid),
        (2 << 20, &before.volume_uid),
        "it keeps its size"
    );
    // An attachment, whose client the server would tell that its volume is another.
    let attached =
        bench.client.attach_volume(attach_request("vol", "node-a", false)).await.unwrap().into_inner();
    let mut client = Client::open(bench.server.data[0], &export_name(&attached, 1)).unwrap();
    assert_eq!(client.read(0, BLOCK).unwrap(), [1; BLOCK as usize]);
    assert_eq!(client.read(1 << 20, BLOCK).unwrap(), [0; BLOCK as usize]);
    client.write(0, &[4; BLOCK as usize]).unwrap();
    client.flush().unwrap();
    assert_eq!(bench.read("vol@s"), 1, "the snapshot stays as it is");
    assert!(bench.files("volumes").iter().all(|name| !name.contains("restor")));
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_snapshots_go_by_uid_and_a_new_volume_has_none_of_them() {
    let Some(mut bench) = Bench::new().await else { return };
    bench.create("vol").await;
    bench.write("vol", 1);
    let kept = bench.snapshot(&["vol"], "s").await.unwrap().remove(0);
    let refused = bench.delete_volume("vol", false).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::VOLUME_HAS_SNAPSHOTS));
    assert!(bench.delete_volume("vol", true).await.unwrap());
    let anew = bench.create("vol").await;
    assert_eq!((anew.snapshot_count, bench.listed(0).await), (0, vec!["@s".to_owned()]));
    bench = bench.restart().await;
    assert_eq!(bench.read(&format!("@{}", kept.snapshot_uid)), 1);
    assert!(Client::open(bench.server.data[0], "vol@s").is_err());
    let request = v1::CloneVolumeRequest {
        name: "back".to_owned(),
        source_snapshot_uid: kept.snapshot_uid.clone(),
        ..Default::default()
    };
    bench.clone_of(request).await.unwrap();
    assert_eq!(bench.read("back"), 1);
    let request = v1::DeleteSnapshotRequest { snapshot_uid: kept.snapshot_uid, ..Default::default() };
    let deadline = Instant::now() + DEADLINE;
    while let Err(status) = bench.client.delete_snapshot(request.clone()).await {
        assert!(reason_of(&status).1 == reason::SNAPSHOT_OPEN && Instant::now() < deadline, "{status}");
    }
    assert!(bench.listed(0).await.is_empty() && bench.files("snapshots").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_calls_of_one_name_at_once_make_one() {
    let Some(mut bench) = Bench::new().await else { return };
    bench.create("vol").await;
    bench.write("vol", 1);
    let snapshots: Vec<_> = (0..50)
        .map(|_| {
            let mut client = bench.client.clone();
            tokio::spawn(async move { client.create_snapshot(snapshot_request(&["vol"], "s")).await })
        })
        .collect();
    let mut uids = BTreeSet::new();
    for call in snapshots {
        uids.insert(call.await.unwrap().unwrap().into_inner().snapshots[0].snapshot_uid.clone());
    }
    assert_eq!((uids.len(), bench.files("snapshots").len()), (1, 1));
    let clones: Vec<_> = (0..50)
        .map(|_| {
            let mut client = bench.client.clone();
            tokio::spawn(async move { client.clone_volume(clone_request("c", "vol", "s")).await })
        })
        .collect();
    for call in clones {
        let answer = call.await.unwrap().unwrap().into_inner();
        if let Some(operation) = answer.operation {
            bench.finish(operation).await;
        }
    }
    assert_eq!(bench.files("volumes").len(), 2);
    // And fifty of different names, of which few copy at once.
    let different: Vec<_> = (0..50)
        .map(|number| {
            let mut client = bench.client.clone();
            let request = snapshot_request(&["vol"], &format!("s{number}"));
            tokio::spawn(async move { client.create_snapshot(request).await })
        })
        .collect();
    for call in different {
        if let Some(operation) = call.await.unwrap().unwrap().into_inner().operation {
            bench.finish(operation).await;
        }
    }
    assert_eq!(bench.get("vol").await.snapshot_count, 51);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_whose_snapshot_is_in_use_is_not_renamed() {
    let Some(mut bench) = Bench::new().await else { return };
    bench.create("vol").await;
    bench.snapshot(&["vol"], "s").await.unwrap();
    let request =
        v1::RenameVolumeRequest { name: "vol".to_owned(), new_name: "new".to_owned(), ..Default::default() };

    let attach = attach_request("vol@s", "node-1", false);
    let attached = bench.client.attach_volume(attach).await.unwrap().into_inner().attachment.unwrap();
    let refused = bench.client.rename_volume(request.clone()).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::SNAPSHOT_ATTACHED));
    let detach = v1::DetachVolumeRequest { attachment_id: attached.attachment_id, ..Default::default() };
    bench.client.detach_volume(detach).await.unwrap();

    let mut reader = bench.open("vol@s");
    let refused = bench.client.rename_volume(request.clone()).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::SNAPSHOT_OPEN));
    assert_eq!(reader.read(0, 512).unwrap(), [0; 512], "a refusal leaves it as it was");
    drop(reader);
    let deadline = Instant::now() + DEADLINE;
    while let Err(status) = bench.client.rename_volume(request.clone()).await {
        assert!(reason_of(&status).1 == reason::SNAPSHOT_OPEN && Instant::now() < deadline, "{status}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let snapshot =
        v1::GetSnapshotRequest { volume_name: "new".into(), name: "s".into(), ..Default::default() };
    assert_eq!(bench.client.get_snapshot(snapshot).await.unwrap().into_inner().volume_name, "new");
    assert_eq!(bench.open("new@s").read(0, 512).unwrap(), [0; 512]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_file_system_refuses_writes_and_loses_none_and_a_snapshot_is_deleted_there() {
    const MIB: usize = 1 << 20;
    let Some(mut bench) = Bench::on("xfs", &["--snapshot-reserve", "10"]).await else { return };
    let capacity_bytes = 64 << 20;
    let request = v1::CreateVolumeRequest { name: "vol".to_owned(), capacity_bytes, ..Default::default() };
    bench.client.create_volume(request).await.unwrap();
    let mut client = bench.open("vol");
    for mib in 0..64u64 {
        client.write(mib << 20, &[1; MIB]).unwrap();
    }
    client.flush().unwrap();
    bench.snapshot(&["vol"], "s").await.unwrap();
    let taken = std::fs::File::create(bench.fs.mount.join("taken")).unwrap();
    let free = |fs: &LoopFs| {
        let space = rustix::fs::statvfs(&fs.mount).unwrap();
        space.f_bavail * space.f_frsize
    };
    let most = free(&bench.fs) - (16 << 20);
    rustix::fs::fallocate(&taken, rustix::fs::FallocateFlags::empty(), 0, most).unwrap();
    let mut written = 0;
    let refused = loop {
        match client.write(written << 20, &[2; MIB]) {
            Ok(()) if written < 63 => written += 1,
            other => break other.unwrap_err(),
        }
    };
    assert_eq!(refused, rustix::io::Errno::NOSPC.raw_os_error() as u32);
    assert!(written > 0, "there was some space left");
    client.flush().unwrap();
    assert!((0..written).all(|mib| client.read(mib << 20, BLOCK).unwrap() == [2; BLOCK as usize]));
    let mut snapshot = bench.open("vol@s");
    assert!((0..64u64).all(|mib| snapshot.read(mib << 20, BLOCK).unwrap() == [1; BLOCK as usize]));
    drop(snapshot);
    let refused = bench.snapshot(&["vol"], "t").await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::ResourceExhausted, reason::SNAPSHOT_RESERVE));
    let deadline = Instant::now() + DEADLINE;
    while let Err(status) = bench.delete_snapshot("vol", "s").await {
        assert!(reason_of(&status).1 == reason::SNAPSHOT_OPEN && Instant::now() < deadline, "{status}");
    }
    // XFS gives blocks back some time later.
    support::wait_until("there is space again", || client.write(written << 20, &[2; MIB]).is_ok());
}

/// A volume that takes some time to copy.
async fn create_scattered(bench: &mut Bench, name: &str) {
    const EXTENTS: u64 = 8000;
    let capacity_bytes = 256 << 20;
    let request = v1::CreateVolumeRequest { name: name.to_owned(), capacity_bytes, ..Default::default() };
    let volume = bench.client.create_volume(request).await.unwrap().into_inner();
    // Nobody has opened it yet.
    let path = bench.fs.mount.join("data/volumes").join(volume.volume_uid);
    let file = std::fs::File::options().write(true).open(path).unwrap();
    for extent in 0..EXTENTS {
        file.write_all_at(&[1; BLOCK as usize], extent * 2 * u64::from(BLOCK)).unwrap();
    }
    file.sync_all().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_is_seen_while_it_goes_on_and_can_be_cancelled() {
    let Some(mut bench) = Bench::new().await else { return };
    create_scattered(&mut bench, "vol").await;
    let mut caller = bench.client.clone();
    let call = tokio::spawn(async move { caller.create_snapshot(snapshot_request(&["vol"], "s")).await });
    let deadline = Instant::now() + DEADLINE;
    let operation = loop {
        let all = bench.client.list_operations(v1::ListOperationsRequest {}).await.unwrap().into_inner();
        if let Some(operation) = all.operations.into_iter().next() {
            break operation;
        }
        assert!(Instant::now() < deadline, "none begins");
    };
    assert_eq!((operation.kind.as_str(), &operation.targets[..]), ("snapshot", &["vol@s".to_owned()][..]));
    let operation_id = operation.operation_id;
    let request = v1::CancelOperationRequest { operation_id: operation_id.clone() };
    bench.client.cancel_operation(request.clone()).await.unwrap();
    // Either it was in time, and nothing is left; or the snapshot was made before.
    let ended = loop {
        let request = v1::GetOperationRequest { operation_id: operation_id.clone() };
        let operation = bench.client.get_operation(request).await.unwrap().into_inner();
        if operation.state() != v1::OperationState::Running {
            break operation;
        }
        assert!(Instant::now() < deadline, "{operation:?}");
    };
    assert!(ended.ended_at_ms >= ended.started_at_ms && ended.started_at_ms > 0);
    let answer = call.await.unwrap();
    match ended.state() {
        v1::OperationState::Cancelled => {
            assert_eq!(ended.error_reason, reason::COPY_CANCELLED);
            assert_eq!(ended.next, "repeat the call to begin it anew");
            assert_eq!(reason_of(&answer.unwrap_err()), is(Code::Aborted, reason::COPY_CANCELLED));
            assert!(bench.listed(0).await.is_empty() && bench.files("snapshots").is_empty());
        }
        state => assert_eq!((state, bench.listed(0).await.len()), (v1::OperationState::Succeeded, 1)),
    }
    assert_eq!(ended.next.is_empty(), ended.state() == v1::OperationState::Succeeded, "{ended:?}");
    let again = bench.client.cancel_operation(request).await.unwrap().into_inner();
    assert_eq!(again, ended, "it has ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_undoes_what_goes_on_and_takes_no_longer_for_it() {
    let Some(mut bench) = Bench::new().await else { return };
    create_scattered(&mut bench, "vol").await;
    let mut caller = bench.client.clone();
    let call = tokio::spawn(async move { caller.create_snapshot(snapshot_request(&["vol"], "s")).await });
    support::wait_until("its file is there", || {
        bench.fs.mount.join("data/snapshots").exists() && !bench.files("snapshots").is_empty()
    });
    let Bench { server, log_dir, fs, .. } = bench;
    let began = Instant::now();
    let status = server.stop(rustix::process::Signal::TERM);
    assert!(
        status.success() && began.elapsed() < Duration::from_secs(15),
        "{status:?} {:?}",
        began.elapsed()
    );
    let answered = call.await.unwrap();
    let server = Volserver::start_with(Bench::command(&fs, &log_dir), &log_dir.path().join("log"));
    let client = server.client().await;
    let mut bench = Bench { server, client, log_dir, fs };
    // Finished in time, or undone; nothing that the next server had to undo.
    let expected = if answered.is_ok() { 1 } else { bench.listed(0).await.len() };
    assert_eq!((bench.listed(0).await.len(), bench.files("snapshots").len()), (expected, expected));
    assert!(!bench.server.log().contains("that an earlier process left unfinished"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_without_reflinks_is_named_with_the_way_out() {
    let Some(mut bench) = Bench::on("ext4", &[]).await else { return };
    bench.create("vol").await;
    let refused = bench.snapshot(&["vol"], "s").await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::SNAPSHOTS_UNSUPPORTED));
    assert!(refused.message().contains("ext4"), "{refused}");
    let refused = bench.clone_of(clone_request("c", "vol", "")).await.unwrap_err();
    assert_eq!(reason_of(&refused).1, reason::SNAPSHOTS_UNSUPPORTED);
    let info = bench.client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner();
    assert!(info.snapshots_unsupported_reason.contains("ext4"), "{info:?}");
    assert!(bench.server.log_with("file volumes have no snapshots here").contains("ext4"));
    assert_eq!(bench.files("volumes").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_in_memory_and_a_full_file_system_are_refused() {
    let Some(mut bench) = Bench::on("xfs", &["--snapshot-reserve", "90"]).await else { return };
    let info = bench.client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.snapshots_unsupported_reason, "");
    let in_memory = v1::CreateVolumeRequest { backend: v1::Backend::Memory.into(), ..create_request("mem") };
    bench.client.create_volume(in_memory).await.unwrap();
    let refused = bench.snapshot(&["mem"], "s").await.unwrap_err();
    assert_eq!(reason_of(&refused).1, reason::SNAPSHOTS_UNSUPPORTED);
    bench.create("vol").await;
    // XFS has taken some for itself, and this takes more than a tenth.
    let taken = std::fs::File::create(bench.fs.mount.join("taken")).unwrap();
    rustix::fs::fallocate(&taken, rustix::fs::FallocateFlags::empty(), 0, XFS_BYTES / 5).unwrap();
    let refused = bench.snapshot(&["vol"], "s").await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::ResourceExhausted, reason::SNAPSHOT_RESERVE));
    assert!(refused.message().contains("MiB free of"), "{refused}");
    // It looks from time to time.
    let deadline = Instant::now() + DEADLINE;
    loop {
        let info = bench.client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner();
        let space = info.storage_space.unwrap();
        if space.level() == v1::SpaceLevel::BelowReserve {
            assert!(space.free_bytes < space.reserve_bytes && space.reserve_bytes < space.total_bytes);
            break;
        }
        assert!(Instant::now() < deadline, "{space:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bench.server.log_with("less space than the reserve");
    assert!(bench.listed(0).await.is_empty() && bench.files("snapshots").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_attached_to_several_nodes_with_epochs_as_a_volume_is() {
    let Some(mut bench) = Bench::new().await else { return };
    bench.create("vol").await;
    bench.write("vol", 1);
    let uid = bench.snapshot(&["vol"], "s").await.unwrap()[0].snapshot_uid.clone();
    bench.write("vol", 2);
    let attach = |node_id: &str| v1::AttachVolumeRequest {
        access_mode: v1::AccessMode::Unspecified.into(),
        ..attach_request("vol@s", node_id, false)
    };
    let first = bench.client.attach_volume(attach("node-a")).await.unwrap().into_inner();
    let by_uid = v1::AttachVolumeRequest { volume_name: format!("@{uid}"), ..attach("node-b") };
    let second = bench.client.attach_volume(by_uid).await.unwrap().into_inner();
    let told = second.attachment.clone().unwrap();
    assert_eq!((told.volume_name.as_str(), &told.snapshot_uid, &told.volume_uid), ("vol@s", &uid, &uid));
    assert_eq!(told.access_mode(), v1::AccessMode::MultiNodeReaderOnly);
    assert_eq!((first.capacity_bytes, first.block_size_bytes), (1 << 20, 4096));
    let writer = v1::AttachVolumeRequest {
        access_mode: v1::AccessMode::SingleNodeWriter.into(),
        force: true,
        ..attach("node-c")
    };
    let refused = bench.client.attach_volume(writer).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::VOLUME_READ_ONLY));

    let open = |bench: &Bench, name: &str| Client::open(bench.server.data[0], name);
    let mut old = open(&bench, &export_name(&first, 1)).unwrap();
    let mut reader = open(&bench, &export_name(&second, 1)).unwrap();
    assert_eq!(old.read(0, BLOCK).unwrap(), [1; BLOCK as usize]);
    assert!(old.write(0, &[9; BLOCK as usize]).is_err(), "it never changes");
    let mut new = open(&bench, &export_name(&first, 2)).unwrap();
    assert!(old.is_closed_by_server(), "a newer session of this attachment has begun");
    assert!(open(&bench, &export_name(&first, 1)).is_err());
    assert_eq!(new.read(0, BLOCK).unwrap(), reader.read(0, BLOCK).unwrap());

    let refused = bench.delete_snapshot("vol", "s").await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::SNAPSHOT_ATTACHED));
    assert!(refused.message().contains("node-a") && refused.message().contains("node-b"), "{refused:?}");
    let refused = bench.delete_volume("vol", true).await.unwrap_err();
    assert_eq!(reason_of(&refused), is(Code::FailedPrecondition, reason::SNAPSHOT_ATTACHED));
    let request = v1::GetSnapshotRequest { snapshot_uid: uid.clone(), ..Default::default() };
    assert_eq!(bench.client.get_snapshot(request).await.unwrap().into_inner().attachments.len(), 2);
    let mut request = v1::ListAttachmentsRequest { page_size: 1, ..Default::default() };
    let page = bench.client.list_attachments(request.clone()).await.unwrap().into_inner();
    request.page_token = page.next_page_token;
    let page = bench.client.list_attachments(request).await.unwrap().into_inner();
    assert_eq!((page.attachments.len(), page.next_page_token.as_str()), (1, ""));

    // A killed server has them still, with their epochs.
    drop((old, new, reader));
    let mut bench = bench.restart().await;
    assert!(open(&bench, &export_name(&first, 1)).is_err(), "of a session that is over");
    let mut reader = open(&bench, &export_name(&first, 3)).unwrap();
    assert_eq!(reader.read(0, BLOCK).unwrap(), [1; BLOCK as usize]);
    let detach = |volume_name: &str, node_id: &str| v1::DetachVolumeRequest {
        volume_name: volume_name.to_owned(),
        node_id: node_id.to_owned(),
        ..Default::default()
    };
    let nobody = bench.client.detach_volume(detach("vol@s", "")).await.unwrap_err();
    assert_eq!(reason_of(&nobody), is(Code::InvalidArgument, reason::SEVERAL_HOLDERS));
    assert!(bench.client.detach_volume(detach("vol@s", "node-a")).await.unwrap().into_inner().existed);
    assert!(reader.is_closed_by_server(), "it is fenced");
    assert!(open(&bench, &export_name(&first, 4)).is_err());
    let by_id = v1::DetachVolumeRequest { attachment_id: told.attachment_id, ..Default::default() };
    assert!(bench.client.detach_volume(by_id.clone()).await.unwrap().into_inner().existed);
    assert!(!bench.client.detach_volume(by_id).await.unwrap().into_inner().existed);
    assert!(!bench.client.detach_volume(detach("vol@none", "node-a")).await.unwrap().into_inner().existed);
    assert!(bench.delete_snapshot("vol", "s").await.unwrap());
}

/// Every call that takes a volume's name takes `uid:UUID` as well, and never means whoever has the name next.
#[tokio::test]
async fn volumes_are_asked_for_by_uid() {
    let Some(mut bench) = Bench::new().await else { return };
    let made = bench.create("vol-1").await;
    let uid = format!("uid:{}", made.volume_uid);
    assert_eq!(bench.get(&uid).await.name, "vol-1");
    assert_eq!(bench.get(&uid.to_uppercase().replace("UID:", "uid:")).await.name, "vol-1");

    let update = v1::UpdateVolumeRequest {
        name: uid.clone(),
        description: Some("x".to_owned()),
        ..Default::default()
    };
    assert_eq!(bench.client.update_volume(update).await.unwrap().into_inner().description, "x");
    let limits = v1::SetVolumeLimitsRequest { name: uid.clone(), limits: None, ..Default::default() };
    assert_eq!(bench.client.set_volume_limits(limits).await.unwrap().into_inner().name, "vol-1");
    let resize = v1::ResizeVolumeRequest {
        name: uid.clone(),
        capacity_bytes: made.capacity_bytes + (1 << 20),
        ..Default::default()
    };
    assert!(
        bench.client.resize_volume(resize).await.unwrap().into_inner().capacity_bytes > made.capacity_bytes
    );

    let attach = attach_request(&uid, "n", false);
    let attached = bench.client.attach_volume(attach).await.unwrap().into_inner().attachment.unwrap();
    assert_eq!((attached.volume_name.as_str(), attached.volume_uid.as_str()), ("vol-1", &*made.volume_uid));
    let list = v1::ListAttachmentsRequest { volume_name: uid.clone(), ..Default::default() };
    assert_eq!(
        bench.client.list_attachments(list).await.unwrap().into_inner().attachments,
        std::slice::from_ref(&attached)
    );
    let content = v1::SetVolumeContentRequest {
        name: uid.clone(),
        attachment_id: attached.attachment_id,
        content: v1::VolumeContent::Written.into(),
    };
    assert_eq!(
        bench.client.set_volume_content(content).await.unwrap().into_inner().content(),
        v1::VolumeContent::Written
    );
    let detach = v1::DetachVolumeRequest { volume_name: uid.clone(), ..Default::default() };
    assert!(bench.client.detach_volume(detach.clone()).await.unwrap().into_inner().existed);

    assert!(bench.delete_volume(&uid, false).await.unwrap());
    // Another volume of that name is another one.
    bench.create("vol-1").await;
    assert!(!bench.delete_volume(&uid, false).await.unwrap());
    assert!(!bench.client.detach_volume(detach).await.unwrap().into_inner().existed);
    let gone = bench.client.attach_volume(attach_request(&uid, "n", false)).await.unwrap_err();
    assert_eq!(reason_of(&gone), (Code::NotFound, reason::VOLUME_NOT_FOUND.to_owned()));
    let gone = bench.snapshot(&[&uid], "s").await.unwrap_err();
    assert_eq!(reason_of(&gone), (Code::NotFound, reason::VOLUME_NOT_FOUND.to_owned()));
    for off in ["uid:", "uid:7", "UID:7"] {
        let request = v1::GetVolumeRequest { name: off.to_owned(), ..Default::default() };
        assert_eq!(
            bench.client.get_volume(request).await.unwrap_err().code(),
            Code::InvalidArgument,
            "{off}"
        );
        assert!(bench.client.create_volume(create_request(off)).await.is_err(), "{off}");
    }
    let created = bench.client.create_volume(create_request(&uid)).await.unwrap_err();
    assert_eq!(created.code(), Code::InvalidArgument, "a new volume has a name");
}

#[tokio::test]
async fn snapshots_are_asked_for_by_their_volumes_uid() {
    let Some(mut bench) = Bench::new().await else { return };
    let made = bench.create("vol-1").await;
    let uid = format!("uid:{}", made.volume_uid);
    let twice = bench.snapshot(&["vol-1", &uid], "s").await.unwrap_err();
    assert_eq!(twice.code(), Code::InvalidArgument, "{twice:?}");
    let taken = bench.snapshot(&[&uid], "s").await.unwrap();
    assert_eq!(taken[0].volume_name, "vol-1");
    let list = v1::ListSnapshotsRequest { volume_name: uid.clone(), ..Default::default() };
    assert_eq!(bench.client.list_snapshots(list).await.unwrap().into_inner().snapshots, taken);
    let find =
        v1::GetSnapshotRequest { volume_name: uid.clone(), name: "s".to_owned(), ..Default::default() };
    assert_eq!(bench.client.get_snapshot(find).await.unwrap().into_inner(), taken[0]);
    let snapshot_disk = attach_request(&format!("{uid}@s"), "n", false);
    let attached = bench.client.attach_volume(snapshot_disk).await.unwrap().into_inner().attachment.unwrap();
    assert_eq!(attached.volume_name, "vol-1@s");
    for (asked, count) in
        [(format!("{uid}@s"), 1), (uid.clone(), 0), (format!("uid:{}", taken[0].snapshot_uid), 0)]
    {
        let list = v1::ListAttachmentsRequest { volume_name: asked.clone(), ..Default::default() };
        let listed = bench.client.list_attachments(list).await.unwrap().into_inner().attachments;
        assert_eq!(listed.len(), count, "{asked}");
    }
    let ended = v1::DetachVolumeRequest { volume_name: format!("{uid}@s"), ..Default::default() };
    assert!(bench.client.detach_volume(ended).await.unwrap().into_inner().existed);
    assert_eq!(bench.restore(&uid, "s").await.unwrap().name, "vol-1");
    for source_snapshot_name in ["", "s"] {
        let clone = v1::CloneVolumeRequest {
            name: format!("clone{source_snapshot_name}"),
            source_volume_name: uid.clone(),
            source_snapshot_name: source_snapshot_name.to_owned(),
            ..Default::default()
        };
        assert_eq!(bench.clone_of(clone).await.unwrap().capacity_bytes, made.capacity_bytes);
    }
    let sides = v1::DiffSnapshotsRequest {
        base: Some(v1::DiffSide {
            volume_name: uid.clone(),
            snapshot_name: "s".to_owned(),
            ..Default::default()
        }),
        target: Some(v1::DiffSide { volume_name: uid.clone(), ..Default::default() }),
        offset_bytes: 0,
    };
    let mut parts = bench.client.diff_snapshots(sides).await.unwrap().into_inner();
    assert!(parts.message().await.unwrap().is_some());
    assert!(bench.delete_snapshot(&uid, "s").await.unwrap());
}
