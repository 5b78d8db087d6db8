//! Snapshots of what nodes freeze, through the management API of the real volserver: nodes that answer, that lose what they are told, that
//! end, and a server that is killed in between. The nodes are the test's, and have nothing to freeze.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests, as the next one; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;
mod volserver;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use proto::v1::{self, NodeFreezeState, management_client::ManagementClient};
use rustix::process::Signal;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use support::LoopFs;
use volserver::{Volserver, attach_request, command, create_request};

type Client = ManagementClient<Channel>;

const XFS_BYTES: u64 = 400 << 20;
/// Longer than any test waits for an answer, and as long as the API allows.
const WAIT_MS: u32 = 30_000;
/// An answer that waits for something comes as soon as there is something; on a slow machine, too.
const SOON: Duration = Duration::from_secs(12);

struct Bench {
    // In this order: the server ends before its storage.
    server: Volserver,
    client: Client,
    log_dir: tempfile::TempDir,
    fs: LoopFs,
}

impl Bench {
    /// With volumes that are attached to nodes; `None`, with the reason said, where the file system cannot be made.
    async fn new(attached: &[(&str, &str)]) -> Option<Self> {
        let fs = LoopFs::new("xfs", XFS_BYTES)?;
        let log_dir = tempfile::tempdir().unwrap();
        let server = Volserver::start_with(Self::command(&fs, &log_dir), &log_dir.path().join("log"));
        let mut client = server.client().await;
        for (volume, node_id) in attached {
            client.create_volume(create_request(volume)).await.unwrap();
            client.attach_volume(attach_request(volume, node_id, false)).await.unwrap();
        }
        Some(Self { server, client, log_dir, fs })
    }

    fn command(fs: &LoopFs, log_dir: &tempfile::TempDir) -> Command {
        let mut command = command(&fs.mount.join("data"));
        command.env("VOLSERVER_RUNTIME_DIR", log_dir.path().join("run"));
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

    async fn node(&self, node_id: &str) -> FakeNode {
        let mut client = self.server.client().await;
        let request = v1::RegisterNodeRequest { node_id: node_id.to_owned(), ..Default::default() };
        client.register_node(request).await.unwrap();
        let daemon_id = Uuid::new_v4().to_string();
        FakeNode { client, node_id: node_id.to_owned(), daemon_id }
    }

    /// Asks for a snapshot, and does not wait for the answer.
    fn take(&self, volumes: &[&str], name: &str) -> JoinHandle<Result<Vec<v1::Snapshot>, Status>> {
        let (mut client, request) = (self.client.clone(), request(volumes, name));
        tokio::spawn(async move { Ok(client.create_snapshot(request).await?.into_inner().snapshots) })
    }

    /// Whether each snapshot that there is is called frozen, by its volume and name.
    async fn snapshots(&mut self) -> BTreeMap<String, bool> {
        let listed = self.client.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap();
        let of =
            |snapshot: v1::Snapshot| (format!("{}@{}", snapshot.volume_name, snapshot.name), snapshot.frozen);
        listed.into_inner().snapshots.into_iter().map(of).collect()
    }
}

fn request(volumes: &[&str], name: &str) -> v1::CreateSnapshotRequest {
    v1::CreateSnapshotRequest {
        volume_names: volumes.iter().map(|volume| (*volume).to_owned()).collect(),
        name: name.to_owned(),
        freeze: true,
        ..Default::default()
    }
}

/// A node daemon as the server hears it.
struct FakeNode {
    client: Client,
    node_id: String,
    daemon_id: String,
}

impl FakeNode {
    fn heartbeat(&self, said: &[(&str, NodeFreezeState, &str)], wait_ms: u32) -> v1::HeartbeatRequest {
        let freeze = |(freeze_id, state, reason): &(&str, NodeFreezeState, &str)| v1::NodeFreeze {
            freeze_id: (*freeze_id).to_owned(),
            state: (*state).into(),
            reason: (*reason).to_owned(),
        };
        v1::HeartbeatRequest {
            node_id: self.node_id.clone(),
            daemon_id: self.daemon_id.clone(),
            freezes: said.iter().map(freeze).collect(),
            wait_ms,
            ..Default::default()
        }
    }

    /// What it is asked for when it has said this, if anything is before a heartbeat is due.
    async fn says(&mut self, said: &[(&str, NodeFreezeState, &str)]) -> Vec<v1::WantedFreeze> {
        let request = self.heartbeat(said, WAIT_MS);
        let began = Instant::now();
        let wanted = self.client.heartbeat(request).await.unwrap().into_inner().freezes;
        assert!(began.elapsed() < SOON, "it took {:?}: {wanted:?}", began.elapsed());
        wanted
    }

    /// The same where nobody waits for an answer.
    async fn says_at_once(&mut self, said: &[(&str, NodeFreezeState, &str)]) -> Vec<v1::WantedFreeze> {
        self.client.heartbeat(self.heartbeat(said, 0)).await.unwrap().into_inner().freezes
    }

    /// Waits until it is asked for a freeze, of so many attachments: its id.
    async fn is_asked(&mut self, attachments: usize) -> String {
        let wanted = self.says(&[]).await;
        let [one] = wanted.as_slice() else { panic!("{wanted:?}") };
        assert!(!one.thaw && one.attachment_ids.len() == attachments, "{one:?}");
        one.freeze_id.clone()
    }

    /// Says that it has frozen, and waits until it is to thaw.
    async fn freezes(&mut self, freeze_id: &str) {
        let wanted = self.says(&[(freeze_id, NodeFreezeState::Frozen, "")]).await;
        assert_eq!(wanted, [thaw(freeze_id)]);
    }
}

fn thaw(freeze_id: &str) -> v1::WantedFreeze {
    v1::WantedFreeze { freeze_id: freeze_id.to_owned(), thaw: true, ..Default::default() }
}

fn reason_of(status: &Status) -> (Code, String) {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert!(info.metadata.contains_key(reason::METADATA_NEXT), "{info:?}");
    (status.code(), info.reason)
}

#[track_caller]
fn refused(outcome: Result<Vec<v1::Snapshot>, Status>, words: &str) -> String {
    let status = outcome.expect_err(words);
    let (code, reason) = reason_of(&status);
    assert_eq!(code, Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains(words), "{status:?}");
    reason
}

#[tokio::test]
async fn a_snapshot_is_called_frozen_when_the_node_says_that_it_was_to_the_end() {
    let Some(mut bench) = Bench::new(&[("vol-1", "node-a"), ("vol-2", "node-a"), ("vol-3", "node-b")]).await
    else {
        return;
    };
    let (mut node, mut other) = (bench.node("node-a").await, bench.node("node-b").await);
    // While a heartbeat waits: the node hears of it at once.
    let (taken, freeze_id) = {
        let (taken, asked) = tokio::join!(
            async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                (bench.take(&["vol-1"], "s"),)
            },
            node.is_asked(1)
        );
        (taken.0, asked)
    };
    assert_eq!(node.is_asked(1).await, freeze_id, "the first answer may have been lost");
    assert_eq!(other.says_at_once(&[]).await, [], "it is not that node's");
    assert_eq!(node.says_at_once(&[(&freeze_id, NodeFreezeState::Freezing, "")]).await, []);
    assert!(bench.snapshots().await.is_empty());
    node.freezes(&freeze_id).await;
    node.freezes(&freeze_id).await;
    assert_eq!(bench.snapshots().await, BTreeMap::from([("vol-1@s".to_owned(), false)]), "nobody knows yet");
    assert_eq!(node.says_at_once(&[(&freeze_id, NodeFreezeState::Thawing, "")]).await, []);
    assert_eq!(node.says_at_once(&[(&freeze_id, NodeFreezeState::WasFrozen, "")]).await, []);
    let snapshots = taken.await.unwrap().unwrap();
    assert!(snapshots[0].frozen && snapshots[0].freeze_id == freeze_id, "{snapshots:?}");
    assert_eq!(node.says_at_once(&[(&freeze_id, NodeFreezeState::WasFrozen, "")]).await, [], "that was lost");
    // Nobody has to freeze for what is there.
    let again = bench.take(&["vol-1"], "s").await.unwrap().unwrap();
    assert_eq!(again[0].snapshot_uid, snapshots[0].snapshot_uid);

    // A group over two nodes, and while it is taken another snapshot of one of its volumes, which waits.
    let group = bench.take(&["vol-1", "vol-3", "vol-2"], "g");
    let (first, second) = tokio::join!(node.is_asked(2), other.is_asked(1));
    assert_eq!(first, second);
    let later = bench.take(&["vol-3"], "later");
    assert_eq!(node.says_at_once(&[(&first, NodeFreezeState::Frozen, "")]).await, [], "not all are frozen");
    assert_eq!(bench.snapshots().await.len(), 1);
    tokio::join!(node.freezes(&first), other.freezes(&first));
    for node in [&mut node, &mut other] {
        node.says_at_once(&[(&first, NodeFreezeState::WasFrozen, "")]).await;
    }
    let group = group.await.unwrap().unwrap();
    assert!(group.len() == 3 && group.iter().all(|one| one.frozen), "{group:?}");
    let freeze_id = other.is_asked(1).await;
    assert_ne!(freeze_id, first);
    other.freezes(&freeze_id).await;
    other.says_at_once(&[(&freeze_id, NodeFreezeState::WasFrozen, "")]).await;
    assert!(later.await.unwrap().unwrap()[0].frozen);
    assert!(bench.snapshots().await.values().all(|frozen| *frozen));
}

#[tokio::test]
async fn what_was_not_frozen_all_the_time_leaves_no_snapshot() {
    let Some(mut bench) = Bench::new(&[("vol-1", "node-a"), ("vol-2", "node-b")]).await else { return };
    bench.client.create_volume(create_request("free")).await.unwrap();
    let missing = refused(bench.take(&["free"], "s").await.unwrap(), "free is attached to no node");
    assert_eq!(missing, reason::NOT_MOUNTED);
    let unknown = refused(bench.take(&["vol-1"], "s").await.unwrap(), "has not registered");
    assert_eq!(unknown, reason::FREEZE_FAILED);
    let with_id =
        v1::CreateSnapshotRequest { request_id: Uuid::new_v4().to_string(), ..request(&["vol-1"], "s") };
    assert_eq!(bench.client.create_snapshot(with_id).await.unwrap_err().code(), Code::InvalidArgument);
    let (mut node, mut silent) = (bench.node("node-a").await, bench.node("node-b").await);
    let began = Instant::now();
    let never_asked = bench.take(&["vol-2"], "s");

    // It cannot freeze.
    let taken = bench.take(&["vol-1"], "s");
    let freeze_id = node.is_asked(1).await;
    let why = "vol-1 has no file system that is mounted on this machine";
    node.says_at_once(&[(&freeze_id, NodeFreezeState::NotFrozen, why)]).await;
    refused(taken.await.unwrap(), "node-a: vol-1 has no file system that is mounted");

    // It has thawed by itself.
    let taken = bench.take(&["vol-1"], "s");
    let freeze_id = node.is_asked(1).await;
    node.freezes(&freeze_id).await;
    assert_eq!(bench.snapshots().await.len(), 1);
    let why = "it was thawed after 10 s";
    node.says_at_once(&[(&freeze_id, NodeFreezeState::NotFrozen, why)]).await;
    refused(taken.await.unwrap(), "not frozen all the time: node-a: it was thawed after 10 s");

    // Its daemon ends with something frozen.
    let taken = bench.take(&["vol-1"], "s");
    let freeze_id = node.is_asked(1).await;
    node.freezes(&freeze_id).await;
    node.daemon_id = Uuid::new_v4().to_string();
    assert_eq!(node.says_at_once(&[]).await, []);
    refused(taken.await.unwrap(), "was started anew");

    // Whoever asked hangs up.
    let taken = bench.take(&["vol-1"], "s");
    let freeze_id = node.is_asked(1).await;
    node.says_at_once(&[(&freeze_id, NodeFreezeState::Freezing, "")]).await;
    taken.abort();
    assert!(taken.await.unwrap_err().is_cancelled());
    assert_eq!(node.says(&[(&freeze_id, NodeFreezeState::Freezing, "")]).await, [thaw(&freeze_id)]);

    // It is of an older version.
    let taken = bench.take(&["vol-1"], "s");
    node.is_asked(1).await;
    node.daemon_id.clear();
    assert_eq!(node.says_at_once(&[]).await, []);
    refused(taken.await.unwrap(), "upgrade it");

    // It says nothing.
    refused(never_asked.await.unwrap(), "nothing was heard of the node daemon of node-b");
    assert!(began.elapsed() >= Duration::from_secs(14), "{:?}", began.elapsed());
    assert_eq!(silent.says_at_once(&[]).await, [], "it was given up");
    assert!(bench.snapshots().await.is_empty());

    // What a node says is looked at.
    let id = Uuid::new_v4().to_string();
    for (daemon_id, freezes) in [
        ("x".to_owned(), Vec::new()),
        (id.clone(), vec![("x", NodeFreezeState::Frozen, "")]),
        (id.clone(), vec![(id.as_str(), NodeFreezeState::Unspecified, "")]),
        (id.clone(), vec![(id.as_str(), NodeFreezeState::NotFrozen, "a\nb")]),
        (id.clone(), vec![(id.as_str(), NodeFreezeState::Frozen, ""); 65]),
    ] {
        silent.daemon_id = daemon_id;
        let status = silent.client.heartbeat(silent.heartbeat(&freezes, 0)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    }
}

#[tokio::test]
async fn a_server_that_is_killed_in_between_has_all_of_it_thawed_and_calls_nothing_frozen() {
    let Some(bench) = Bench::new(&[("vol-1", "node-a")]).await else { return };
    // Before the instant.
    let mut node = bench.node("node-a").await;
    let taken = bench.take(&["vol-1"], "s");
    let freeze_id = node.is_asked(1).await;
    let bench = bench.restart().await;
    assert!(taken.await.unwrap().is_err());
    node.client = bench.server.client().await;
    // The next server knows nothing of it.
    node.freezes(&freeze_id).await;
    let mut bench = bench;
    assert!(bench.snapshots().await.is_empty());

    // Behind it.
    let taken = bench.take(&["vol-1"], "s");
    let freeze_id = node.is_asked(1).await;
    node.freezes(&freeze_id).await;
    let mut bench = bench.restart().await;
    assert!(taken.await.unwrap().is_err());
    node.client = bench.server.client().await;
    node.freezes(&freeze_id).await;
    assert_eq!(node.says_at_once(&[(&freeze_id, NodeFreezeState::WasFrozen, "")]).await, []);
    let left = bench.snapshots().await;
    assert!(left.values().all(|frozen| !frozen), "{left:?}");
    if !left.is_empty() {
        let status = bench.take(&["vol-1"], "s").await.unwrap().unwrap_err();
        assert_eq!(reason_of(&status), (Code::AlreadyExists, reason::SNAPSHOT_EXISTS.to_owned()));
    }
    let taken = bench.take(&["vol-1"], "next");
    let freeze_id = node.is_asked(1).await;
    node.freezes(&freeze_id).await;
    node.says_at_once(&[(&freeze_id, NodeFreezeState::WasFrozen, "")]).await;
    assert!(taken.await.unwrap().unwrap()[0].frozen);

    // A heartbeat that waits keeps no server from its end.
    let waiting = {
        let (mut client, request) = (node.client.clone(), node.heartbeat(&[], WAIT_MS));
        tokio::spawn(async move { client.heartbeat(request).await })
    };
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (began, Bench { server, .. }) = (Instant::now(), bench);
    assert!(server.stop(Signal::TERM).success());
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    waiting.await.unwrap().ok();
}
