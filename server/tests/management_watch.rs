//! What happens to volumes, attachments, snapshots, nodes and grants, as those hear it who watch the real volserver: each change once, in order,
//! also of what happened while nobody watched.
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
use std::path::Path;
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use proto::v1::watch_event::Object;
use proto::v1::{self, management_client::ManagementClient};
use rusqlite::Connection;
use rustix::process::Signal;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use client::Client;
use support::LoopFs;
use volserver::{DEADLINE, Volserver, attach_request, create_request, export_name};

const FIXTURE_V1: &str = include_str!("fixtures/catalog_v1.sql");
/// Of a reader that is slow: some events fill it.
const WINDOW_BYTES: u32 = 4096;
const WATCHES_MAX: usize = 64;
/// So long the server waits for a reader.
const TAKE_LIMIT: Duration = Duration::from_secs(60);

type Api = ManagementClient<Channel>;

/// A watch, and the last token that it gave.
struct Watch {
    stream: Streaming<v1::WatchEvent>,
    token: String,
}

impl Watch {
    async fn begin(api: &mut Api, request: v1::WatchRequest) -> Result<Self, Status> {
        let token = request.resume_token.clone();
        Ok(Self { stream: api.watch(request).await?.into_inner(), token })
    }

    /// Behind a token, or with what there is.
    async fn from(api: &mut Api, token: &str) -> Self {
        let request = v1::WatchRequest { resume_token: token.to_owned(), ..Default::default() };
        Self::begin(api, request).await.unwrap()
    }

    /// The same as soon as there is a place for it.
    async fn when_free(api: &mut Api, token: &str, limit: Duration) -> Self {
        let deadline = Instant::now() + limit;
        loop {
            let request = v1::WatchRequest { resume_token: token.to_owned(), ..Default::default() };
            match Self::begin(api, request).await {
                Ok(watch) => return watch,
                Err(refused) => assert_eq!(reason_of(&refused), too_many()),
            }
            assert!(Instant::now() < deadline, "no place is given back");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn event(&mut self) -> Result<v1::WatchEvent, Status> {
        let event = tokio::time::timeout(DEADLINE, self.stream.message()).await.expect("an event")?;
        let event = event.expect("a watch ends with an error");
        if !event.resume_token.is_empty() {
            self.token = event.resume_token.clone();
        }
        Ok(event)
    }

    /// The next one that says more than where the watch is.
    async fn change(&mut self) -> v1::WatchEvent {
        loop {
            let event = self.event().await.unwrap();
            if event.change() != v1::WatchChange::Bookmark {
                return event;
            }
        }
    }

    /// The same as `created volume NAME`.
    async fn line(&mut self) -> String {
        line(&self.change().await)
    }

    /// Why it ends, before any other change.
    async fn end(&mut self) -> Status {
        loop {
            match self.event().await {
                Ok(event) => assert_eq!(event.change(), v1::WatchChange::Bookmark, "{event:?}"),
                Err(status) => return status,
            }
        }
    }

    async fn lines(&mut self, count: usize) -> Vec<String> {
        let mut lines = Vec::new();
        for _ in 0..count {
            lines.push(self.line().await);
        }
        lines
    }

    /// What there is, up to the point where all has been told.
    async fn present(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            match self.line().await {
                line if line == "synced" => return lines,
                line => lines.push(line),
            }
        }
    }
}

fn line(event: &v1::WatchEvent) -> String {
    let change = event.change().as_str_name().trim_start_matches("WATCH_CHANGE_").to_lowercase();
    match &event.object {
        None => change,
        Some(Object::Volume(volume)) => format!("{change} volume {}", volume.name),
        Some(Object::Attachment(one)) => format!("{change} attachment {} {}", one.volume_name, one.node_id),
        Some(Object::Snapshot(one)) => format!("{change} snapshot {}@{}", one.volume_name, one.name),
        Some(Object::Node(node)) => format!("{change} node {}", node.node_id),
        Some(Object::Grant(grant)) => format!("{change} grant {} {}", grant.volume_name, grant.node_id),
    }
}

fn reason_of(status: &Status) -> (Code, String) {
    (status.code(), status.get_details_error_info().map(|info| info.reason).unwrap_or_default())
}

fn too_old() -> (Code, String) {
    (Code::OutOfRange, reason::WATCH_TOKEN_TOO_OLD.to_owned())
}

fn too_many() -> (Code, String) {
    (Code::ResourceExhausted, reason::TOO_MANY_WATCHES.to_owned())
}

async fn create(api: &mut Api, name: &str) -> v1::Volume {
    api.create_volume(create_request(name)).await.unwrap().into_inner()
}

async fn delete(api: &mut Api, name: &str) {
    let request = v1::DeleteVolumeRequest { name: name.to_owned(), ..Default::default() };
    assert!(api.delete_volume(request).await.unwrap().into_inner().existed);
}

async fn detach(api: &mut Api, name: &str) {
    let request = v1::DetachVolumeRequest { volume_name: name.to_owned(), ..Default::default() };
    assert!(api.detach_volume(request).await.unwrap().into_inner().existed);
}

fn node_request(node_id: &str, version: &str) -> v1::RegisterNodeRequest {
    v1::RegisterNodeRequest { node_id: node_id.to_owned(), version: version.to_owned(), ..Default::default() }
}

fn database(data_dir: &Path) -> Connection {
    Connection::open(data_dir.join("catalog.sqlite")).unwrap()
}

#[tokio::test]
async fn grants_are_told_and_belong_to_their_volume() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    for name in ["v", "w"] {
        create(&mut api, name).await;
        for node in ["node-1", "node-2"] {
            let (volume_name, node_id) = (name.to_owned(), node.to_owned());
            let request =
                v1::CreateGrantRequest { volume_name, node_id, read_only: true, ..Default::default() };
            api.create_grant(request).await.unwrap();
        }
    }
    let of_v = v1::WatchRequest { volume_name: "v".to_owned(), ..Default::default() };
    let mut watch = Watch::begin(&mut api, of_v).await.unwrap();
    assert_eq!(
        watch.present().await,
        ["present volume v", "present grant v node-1", "present grant v node-2"],
        "those of the other volume are not its own"
    );
    let kinds = vec![v1::WatchedKind::Grant.into()];
    let mut all = Watch::begin(&mut api, v1::WatchRequest { kinds, ..Default::default() }).await.unwrap();
    assert_eq!(all.present().await.len(), 4);
    let token = watch.token.clone();
    server.kill();

    // While nobody watches one goes and comes again, and the volume has another name.
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    let (volume_name, node_id) = ("v".to_owned(), "node-1".to_owned());
    let withdraw = v1::DeleteGrantRequest { volume_name, node_id, ..Default::default() };
    assert!(api.delete_grant(withdraw.clone()).await.unwrap().into_inner().existed);
    assert!(!api.delete_grant(withdraw).await.unwrap().into_inner().existed, "which is no change");
    let (name, new_name) = ("v".to_owned(), "x".to_owned());
    let rename = v1::RenameVolumeRequest { name, new_name, ..Default::default() };
    api.rename_volume(rename).await.unwrap();
    let (volume_name, node_id) = ("x".to_owned(), "node-1".to_owned());
    let grant = v1::CreateGrantRequest { volume_name, node_id, read_only: true, ..Default::default() };
    let granted = api.create_grant(grant.clone()).await.unwrap().into_inner();
    api.create_grant(grant).await.unwrap();
    let request = v1::WatchRequest {
        volume_name: format!("uid:{}", granted.volume_uid),
        resume_token: token,
        ..Default::default()
    };
    let mut watch = Watch::begin(&mut api, request).await.unwrap();
    assert_eq!(watch.line().await, "deleted grant v node-1");
    assert_eq!(watch.line().await, "updated volume x");
    let event = watch.change().await;
    assert_eq!(line(&event), "created grant x node-1");
    let Some(Object::Grant(told)) = event.object else { panic!() };
    assert_eq!(
        (told.volume_uid, told.read_only, told.created_at_ms),
        (granted.volume_uid, true, granted.created_at_ms)
    );
}

#[tokio::test]
async fn each_change_of_a_volume_an_attachment_and_a_node_is_told_once_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    let before = create(&mut api, "before").await;
    let mut watch = Watch::from(&mut api, "").await;
    let first = watch.change().await;
    assert_eq!((line(&first).as_str(), first.resume_token.as_str()), ("present volume before", ""));
    let Some(Object::Volume(told)) = first.object else { panic!() };
    assert_eq!(
        (&told.volume_uid, told.capacity_bytes, told.backend),
        (&before.volume_uid, 1 << 20, before.backend)
    );
    assert_eq!(
        (told.content, told.created_at_ms, told.limits),
        (before.content, before.created_at_ms, before.limits)
    );
    assert_eq!(watch.line().await, "synced");

    create(&mut api, "v").await;
    let resize =
        v1::ResizeVolumeRequest { name: "v".to_owned(), capacity_bytes: 2 << 20, ..Default::default() };
    api.resize_volume(resize).await.unwrap();
    let labels = v1::UpdateVolumeRequest {
        name: "v".to_owned(),
        labels: [("app".to_owned(), "shop".to_owned())].into(),
        ..Default::default()
    };
    api.update_volume(labels).await.unwrap();
    let attached = api.attach_volume(attach_request("v", "node-1", false)).await.unwrap().into_inner();
    // Sessions are no changes.
    for epoch in 1..4 {
        drop(Client::open(server.data[0], &export_name(&attached, epoch)).unwrap());
    }
    for version in ["1", "1", "2"] {
        api.register_node(node_request("node-1", version)).await.unwrap();
    }
    let heartbeat = v1::HeartbeatRequest { node_id: "node-1".to_owned(), ..Default::default() };
    api.heartbeat(heartbeat).await.unwrap();
    detach(&mut api, "v").await;
    api.delete_node(v1::DeleteNodeRequest { node_id: "node-1".to_owned(), ..Default::default() })
        .await
        .unwrap();
    delete(&mut api, "v").await;

    let created = watch.change().await;
    let age_ms = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as i64 - created.time_ms;
    assert!((-60_000..600_000).contains(&age_ms), "{age_ms}");
    assert_eq!(line(&created), "created volume v");
    assert_eq!(watch.line().await, "updated volume v");
    let updated = watch.change().await;
    let Some(Object::Volume(volume)) = &updated.object else { panic!("{updated:?}") };
    assert_eq!((volume.capacity_bytes, volume.labels["app"].as_str()), (2 << 20, "shop"));
    let expected = [
        "created attachment v node-1",
        "created node node-1",
        "updated node node-1",
        "deleted attachment v node-1",
        "deleted node node-1",
        "deleted volume v",
    ];
    assert_eq!(watch.lines(6).await, expected);
    assert!(!format!("{updated:?}").contains(&attached.secret));
    // From a token in the middle the rest comes again, and from the last nothing does.
    let mut again = Watch::from(&mut api, &updated.resume_token).await;
    assert_eq!(again.lines(6).await, expected);
    create(&mut api, "after").await;
    for watch in [&mut watch, &mut again] {
        assert_eq!(watch.line().await, "created volume after");
    }
}

#[tokio::test]
async fn snapshots_are_told_when_they_are_ready_with_their_attachments() {
    let Some(fs) = LoopFs::new("xfs", 320 << 20) else { return };
    let logs = tempfile::tempdir().unwrap();
    let mut command = volserver::command(&fs.mount.join("data"));
    command.env("VOLSERVER_RUNTIME_DIR", logs.path().join("run"));
    let server = Volserver::start_with(command, &logs.path().join("log"));
    let mut api = server.client().await;
    create(&mut api, "v").await;
    create(&mut api, "other").await;
    let of_volume = v1::WatchRequest {
        volume_name: "v".to_owned(),
        kinds: [v1::WatchedKind::Snapshot, v1::WatchedKind::Attachment].map(Into::into).to_vec(),
        ..Default::default()
    };
    let mut narrow = Watch::begin(&mut api, of_volume).await.unwrap();
    let mut wide = Watch::from(&mut api, "").await;
    assert_eq!(narrow.present().await, [""; 0]);
    assert_eq!(wide.present().await.len(), 2);
    let take = v1::CreateSnapshotRequest {
        volume_names: vec!["v".to_owned(), "other".to_owned()],
        name: "s".to_owned(),
        ..Default::default()
    };
    api.create_snapshot(take).await.unwrap();
    assert_eq!(narrow.line().await, "created snapshot v@s");
    let mut told = wide.lines(2).await;
    told.sort();
    assert_eq!(told, ["created snapshot other@s", "created snapshot v@s"]);
    api.attach_volume(attach_request("v@s", "node-1", false)).await.unwrap();
    detach(&mut api, "v@s").await;
    let delete =
        v1::DeleteSnapshotRequest { volume_name: "v".to_owned(), name: "s".to_owned(), ..Default::default() };
    api.delete_snapshot(delete).await.unwrap();
    let expected = ["created attachment v@s node-1", "deleted attachment v@s node-1", "deleted snapshot v@s"];
    assert_eq!(narrow.lines(3).await, expected);
    assert_eq!(wide.lines(3).await, expected);
    // The volume is watched by its uid, whether it is there or not.
    let uid = api
        .get_volume(v1::GetVolumeRequest { name: "v".to_owned(), ..Default::default() })
        .await
        .unwrap()
        .into_inner()
        .volume_uid;
    self::delete(&mut api, "v").await;
    let by =
        |volume_name: String, resume_token| v1::WatchRequest { volume_name, resume_token, kinds: Vec::new() };
    let mut gone = Watch::begin(&mut api, by(format!("uid:{uid}"), narrow.token.clone())).await.unwrap();
    assert_eq!(gone.line().await, "deleted volume v");
    let refused = Watch::begin(&mut api, by("v".to_owned(), String::new())).await.err().unwrap();
    assert_eq!(reason_of(&refused), (Code::NotFound, reason::VOLUME_NOT_FOUND.to_owned()));
}

#[tokio::test]
async fn a_watch_by_name_goes_on_with_the_volume_that_had_the_name() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    create(&mut api, "v").await;
    let by_name = |resume_token: &str| v1::WatchRequest {
        volume_name: "v".to_owned(),
        resume_token: resume_token.to_owned(),
        ..Default::default()
    };
    let mut all = Watch::from(&mut api, "").await;
    assert_eq!(all.present().await, ["present volume v"]);
    let mut watch = Watch::begin(&mut api, by_name("")).await.unwrap();
    assert_eq!(watch.present().await, ["present volume v"]);
    let token = watch.token.clone();
    api.attach_volume(attach_request("v", "node-1", false)).await.unwrap();
    detach(&mut api, "v").await;
    delete(&mut api, "v").await;
    let expected = ["created attachment v node-1", "deleted attachment v node-1", "deleted volume v"];
    let mut again = Watch::begin(&mut api, by_name(&token)).await.unwrap();
    assert_eq!(again.lines(3).await, expected, "the name is nobody's");
    create(&mut api, "v").await;
    create(&mut api, "last").await;
    let mut again = Watch::begin(&mut api, by_name(&token)).await.unwrap();
    assert_eq!(again.lines(3).await, expected, "the name is another volume's");
    // The tokens that it gives then say the same.
    drop(Watch::begin(&mut api, by_name(&again.token)).await.unwrap());
    let mut whole = Watch::from(&mut api, &token).await;
    assert_eq!(whole.lines(5).await[3..], ["created volume v", "created volume last"]);
    // A token of a watch of all does not say which volume had the name.
    let refused = Watch::begin(&mut api, by_name(&all.token)).await.err().unwrap();
    assert_eq!(reason_of(&refused), (Code::InvalidArgument, reason::INVALID_FIELD.to_owned()));
}

/// What is made and deleted while nobody watches, with the server killed before and behind.
#[tokio::test]
async fn a_watch_goes_on_over_ten_restarts_and_tells_what_came_and_went_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let mut server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    let mut watch = Watch::from(&mut api, "").await;
    assert_eq!(watch.line().await, "synced");
    for round in 0..10 {
        server.kill();
        watch.end().await;
        server = Volserver::start(&data_dir);
        api = server.client().await;
        let (brief, kept) = (format!("brief-{round}"), format!("kept-{round}"));
        create(&mut api, &brief).await;
        api.attach_volume(attach_request(&brief, "node-1", false)).await.unwrap();
        detach(&mut api, &brief).await;
        delete(&mut api, &brief).await;
        create(&mut api, &kept).await;
        server.kill();
        server = Volserver::start(&data_dir);
        api = server.client().await;
        watch = Watch::from(&mut api, &watch.token).await;
        let expected = [
            format!("created volume {brief}"),
            format!("created attachment {brief} node-1"),
            format!("deleted attachment {brief} node-1"),
            format!("deleted volume {brief}"),
            format!("created volume {kept}"),
        ];
        assert_eq!(watch.lines(5).await, expected, "{round}");
    }
    let mut all = Watch::from(&mut api, "").await;
    let mut present = all.present().await;
    present.sort();
    assert_eq!(present, (0..10).map(|round| format!("present volume kept-{round}")).collect::<Vec<_>>());
    assert_eq!(all.token, watch.token, "nothing has come since");
}

#[tokio::test]
async fn tokens_that_cannot_be_gone_on_with_are_told_by_why() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    let mut watch = Watch::from(&mut api, "").await;
    assert_eq!(watch.line().await, "synced");
    let early = watch.token.clone();
    create(&mut api, "v").await;
    assert_eq!(watch.line().await, "created volume v");
    let middle = watch.token.clone();
    create(&mut api, "w").await;
    assert_eq!(watch.line().await, "created volume w");
    let with =
        |resume_token: &str| v1::WatchRequest { resume_token: resume_token.to_owned(), ..Default::default() };

    let other_server = Volserver::start(&dir.path().join("other"));
    let refused = Watch::begin(&mut other_server.client().await, with(&middle)).await.err().unwrap();
    assert_eq!(reason_of(&refused), too_old(), "of another server");
    for garbage in
        ["x", "1.watch.", &early.replace("1.watch", "1.volumes"), &format!("{early}0"), &"9".repeat(70_000)]
    {
        let refused = Watch::begin(&mut api, with(garbage)).await.err().unwrap();
        assert_eq!(
            reason_of(&refused),
            (Code::InvalidArgument, reason::INVALID_FIELD.to_owned()),
            "{garbage:.80}"
        );
    }
    let kinds = v1::WatchRequest { kinds: vec![77], ..Default::default() };
    assert_eq!(Watch::begin(&mut api, kinds).await.err().unwrap().code(), Code::InvalidArgument);

    // A backup is put back, and other things happen than did.
    let newest = watch.token.clone();
    assert!(server.stop(Signal::TERM).success());
    let backup = dir.path().join("backup.sqlite");
    database(&data_dir).execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    let mut watch = Watch::from(&mut api, &newest).await;
    create(&mut api, "x").await;
    assert_eq!(watch.line().await, "created volume x");
    let lost = watch.token.clone();
    assert!(server.stop(Signal::TERM).success());
    for suffix in ["", "-wal", "-shm"] {
        // The last two are gone where the server closed the catalog.
        let _ = std::fs::remove_file(data_dir.join(format!("catalog.sqlite{suffix}")));
    }
    std::fs::copy(&backup, data_dir.join("catalog.sqlite")).unwrap();
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    let refused = Watch::begin(&mut api, with(&lost)).await.err().unwrap();
    assert_eq!(reason_of(&refused), too_old(), "it is to come");
    let next = refused.get_details_error_info().unwrap().metadata[reason::METADATA_NEXT].clone();
    assert_eq!(next, "watch anew without a token");
    create(&mut api, "y").await;
    let refused = Watch::begin(&mut api, with(&lost)).await.err().unwrap();
    assert_eq!(reason_of(&refused), too_old(), "another change has its number");
    let mut watch = Watch::from(&mut api, &newest).await;
    assert_eq!(watch.line().await, "created volume y", "what both histories have is gone on behind");

    // What is behind the token was pruned.
    assert!(server.stop(Signal::TERM).success());
    database(&data_dir)
        .execute("DELETE FROM changes WHERE seq <= (SELECT min(seq) FROM changes)", [])
        .unwrap();
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    let refused = Watch::begin(&mut api, with(&early)).await.err().unwrap();
    assert_eq!(reason_of(&refused), too_old(), "pruned");
    let mut watch = Watch::from(&mut api, &middle).await;
    assert_eq!(watch.lines(2).await, ["created volume w", "created volume y"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_takes_nothing_is_left_and_keeps_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    let endpoint = Endpoint::from_shared(format!("http://{}", server.management)).unwrap();
    let channel = endpoint.initial_stream_window_size(WINDOW_BYTES).connect().await.unwrap();
    let mut slow = Watch::from(&mut ManagementClient::new(channel), "").await;
    assert_eq!(slow.line().await, "synced");
    let mut other = Watch::from(&mut api, "").await;
    assert_eq!(other.line().await, "synced");
    // With these, which hear nothing, all places are taken, so that its own shows when it is free.
    let of_nodes = v1::WatchRequest { kinds: vec![v1::WatchedKind::Node.into()], ..Default::default() };
    let mut others = Vec::new();
    for _ in 2..WATCHES_MAX {
        others.push(Watch::begin(&mut api, of_nodes.clone()).await.unwrap());
    }
    // More than waits anywhere on the way to it.
    const CHANGES: usize = 100;
    create(&mut api, "v").await;
    for number in 1..CHANGES {
        let description = Some(format!("{number} {}", "x".repeat(1000)));
        let request = v1::UpdateVolumeRequest { name: "v".to_owned(), description, ..Default::default() };
        api.update_volume(request).await.unwrap();
    }
    assert_eq!(other.lines(CHANGES).await.len(), CHANGES, "nobody waits for the slow one");
    drop(Watch::when_free(&mut api, "", TAKE_LIMIT + DEADLINE).await);
    drop(others);
    let mut taken = Vec::new();
    let ended = loop {
        match slow.event().await {
            Ok(event) if event.change() == v1::WatchChange::Bookmark => {}
            Ok(event) => taken.push(line(&event)),
            Err(status) => break status,
        }
    };
    assert_eq!(reason_of(&ended), (Code::Aborted, reason::WATCH_TOO_SLOW.to_owned()));
    assert!(taken.len() < CHANGES, "{}", taken.len());
    // With its token it goes on behind what it took.
    let mut again = Watch::when_free(&mut api, &slow.token, DEADLINE).await;
    let rest = CHANGES - taken.len();
    taken.extend(again.lines(rest).await);
    assert_eq!(taken[0], "created volume v");
    assert!(taken[1..].iter().all(|line| line == "updated volume v"));
    // Who heard nothing for half a minute is told so, and where it is.
    let idle = other.event().await.unwrap();
    assert_eq!((idle.change(), idle.object), (v1::WatchChange::Bookmark, None));
    create(&mut api, "last").await;
    let mut behind = Watch::when_free(&mut api, &idle.resume_token, DEADLINE).await;
    assert_eq!(
        (behind.line().await, again.line().await),
        ("created volume last".into(), "created volume last".into())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_are_sixty_four_watches_and_not_one_more() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    let mut watches = Vec::new();
    for _ in 0..WATCHES_MAX {
        let mut watch = Watch::from(&mut api, "").await;
        assert_eq!(watch.line().await, "synced");
        watches.push(watch);
    }
    let refused = Watch::begin(&mut api, v1::WatchRequest::default()).await.err().unwrap();
    assert_eq!(reason_of(&refused), too_many());
    create(&mut api, "v").await;
    for watch in &mut watches {
        assert_eq!(watch.line().await, "created volume v");
    }
    // A place that is left is another's.
    drop(watches.pop());
    let mut last = Watch::when_free(&mut api, "", DEADLINE).await;
    assert_eq!(last.present().await, ["present volume v"]);
    // A server that stops says so to all of them, and does not wait for any.
    let began = Instant::now();
    assert!(server.stop(Signal::TERM).success());
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    let ended = last.end().await;
    assert_eq!(reason_of(&ended), (Code::Unavailable, reason::SERVER_STOPPING.to_owned()));
}

#[tokio::test]
async fn a_catalog_from_before_there_were_watches_is_watched() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    std::fs::create_dir(&data_dir).unwrap();
    database(&data_dir).execute_batch(FIXTURE_V1).unwrap();
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    let mut watch = Watch::from(&mut api, "").await;
    let mut present = watch.present().await;
    present.sort();
    // Neither what was half made nor the attachment that was ending.
    let expected =
        ["present attachment database node-a", "present volume database", "present volume scratch"];
    assert_eq!(present, expected);
    detach(&mut api, "database").await;
    delete(&mut api, "database").await;
    assert_eq!(watch.lines(2).await, ["deleted attachment database node-a", "deleted volume database"]);
}

/// So many objects are in a page.
const PAGE_MAX: usize = 128;

/// As large as several labels make it, so that not many wait on their way to a slow reader.
fn large_node_request(node_id: &str, version: &str) -> v1::RegisterNodeRequest {
    let labels = (0..24).map(|number| (format!("label-{number:02}"), "x".repeat(60))).collect();
    v1::RegisterNodeRequest { labels, ..node_request(node_id, version) }
}

/// Takes one event into the picture that a watcher has, which it has to fit; `None`: it is no object's.
fn add_to(told: &mut BTreeMap<String, String>, event: &v1::WatchEvent) -> Option<v1::WatchChange> {
    let Some(Object::Node(node)) = event.object.clone() else { return None };
    let before = told.get(&node.node_id).cloned();
    match event.change() {
        v1::WatchChange::Present | v1::WatchChange::Created => assert_eq!(before, None, "{event:?}"),
        v1::WatchChange::Updated => {
            assert!(before.is_some_and(|before| before != node.version), "{event:?}");
        }
        v1::WatchChange::Deleted => {
            assert_eq!(before, Some(node.version), "{event:?}");
            told.remove(&node.node_id);
            return Some(event.change());
        }
        _ => panic!("{event:?}"),
    }
    told.insert(node.node_id, node.version);
    Some(event.change())
}

async fn listed_nodes(api: &mut Api) -> BTreeMap<String, String> {
    let mut listed = BTreeMap::new();
    let mut page = v1::ListNodesRequest { page_size: 1000, ..Default::default() };
    loop {
        let answer = api.list_nodes(page.clone()).await.unwrap().into_inner();
        listed.extend(answer.nodes.into_iter().map(|node| (node.node_id, node.version)));
        if answer.next_page_token.is_empty() {
            return listed;
        }
        page.page_token = answer.next_page_token;
    }
}

/// Objects come and go while what there is is told, page by page: the reader itself sees to it that they do so between two pages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_there_is_and_what_happens_meanwhile_make_one_picture() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    let count = 3 * PAGE_MAX - 10;
    for number in 0..count {
        api.register_node(large_node_request(&format!("node-{number:03}"), "1")).await.unwrap();
    }
    let endpoint = Endpoint::from_shared(format!("http://{}", server.management)).unwrap();
    let channel = endpoint.initial_stream_window_size(WINDOW_BYTES).connect().await.unwrap();
    let mut told = BTreeMap::new();
    let mut watch = Watch::from(&mut ManagementClient::new(channel), "").await;
    assert_eq!(add_to(&mut told, &watch.event().await.unwrap()), Some(v1::WatchChange::Present));
    // The server waits for the reader in the first page, which has been read; the last has not.
    for number in 0..count {
        let name = format!("node-{number:03}");
        match number % 30 {
            0 => drop(api.register_node(large_node_request(&name, "2")).await.unwrap()),
            1 => drop(
                api.delete_node(v1::DeleteNodeRequest { node_id: name, ..Default::default() }).await.unwrap(),
            ),
            2 => {
                drop(api.register_node(large_node_request(&format!("{name}-new"), "1")).await.unwrap());
            }
            _ => {}
        }
    }
    let mut changed = 0;
    loop {
        let event = watch.event().await.unwrap();
        match add_to(&mut told, &event) {
            Some(v1::WatchChange::Present) => {}
            Some(_) => changed += 1,
            None if event.change() == v1::WatchChange::Synced => break,
            None => panic!("{event:?}"),
        }
        assert_eq!(event.resume_token, "", "{event:?}");
    }
    // What was changed before its page was read is in the page, and what was changed behind it is told.
    let changes_of = |count: usize| (0..count).filter(|number| number % 30 < 3).count();
    assert!(
        (changes_of(PAGE_MAX)..changes_of(count)).contains(&changed),
        "{changed}: changes fell between pages"
    );
    assert_eq!(told, listed_nodes(&mut api).await, "all was told before it said so");
    // And it goes on from there.
    api.register_node(large_node_request("last", "1")).await.unwrap();
    assert_eq!(watch.line().await, "created node last");
}
