//! What callers may send to the management API of the real volserver without it losing its temper: fields that it does not know, messages
//! that are too long or none, hostile names and page tokens; deadlines that pass, and calls that are cancelled.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

mod unit_filter;
mod volserver;

use std::path::Path;
use std::time::{Duration, Instant};

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use prost::Message as _;
use prost::bytes::{Buf as _, BufMut as _};
use proto::error_reason as reason;
use proto::v1::{self, management_client::ManagementClient};
use rusqlite::Connection;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use volserver::{DEADLINE, Volserver, create_request};

type Api = ManagementClient<Channel>;
type Plain = hyper_util::client::legacy::Client<HttpConnector, tonic::body::Body>;

/// A client that sends deadlines, and has none of its own that would be over before: what the server says is heard.
fn patient(server: &Volserver) -> ManagementClient<Plain> {
    let client =
        hyper_util::client::legacy::Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    ManagementClient::with_origin(client, format!("http://{}", server.management).parse().unwrap())
}

/// Messages as they are on the wire.
#[derive(Debug, Clone, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut item = vec![0; from.remaining()];
        from.copy_to_slice(&mut item);
        Ok(Some(item))
    }
}

/// A call with whatever bytes.
async fn call(channel: &Channel, method: &str, message: Vec<u8>) -> Result<Vec<u8>, Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let path: PathAndQuery = format!("/volnode.v1.Management/{method}").parse().unwrap();
    grpc.unary(Request::new(message), path, Raw).await.map(tonic::Response::into_inner)
}

/// A field of that number with text in it.
fn text_field(number: u32, text: &[u8]) -> Vec<u8> {
    let mut field = Vec::new();
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, &mut field);
    prost::encoding::encode_varint(text.len() as u64, &mut field);
    field.extend(text);
    field
}

/// INVALID_ARGUMENT, with all that it is to tell: it has come through the headers.
fn assert_invalid(status: &Status, what: &str) {
    assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("{what}: {status:?}"));
    assert_eq!(info.reason, reason::INVALID_FIELD, "{what}");
    assert!(!status.get_details_bad_request().unwrap().field_violations.is_empty(), "{what}");
}

#[tokio::test]
async fn fields_of_a_later_version_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let channel = server.channel().await;
    let mut request = text_field(12_345, b"of a later version");
    request.extend(create_request("vol-1").encode_to_vec());
    request.extend(text_field(536_870_911, &[0xff; 1000]));
    let made = v1::Volume::decode(call(&channel, "CreateVolume", request).await.unwrap().as_slice()).unwrap();
    assert_eq!((made.name.as_str(), made.capacity_bytes), ("vol-1", 1 << 20));
    let listed = call(&channel, "ListVolumes", text_field(99, b"x")).await.unwrap();
    assert_eq!(v1::ListVolumesResponse::decode(listed.as_slice()).unwrap().volumes, [made]);
}

#[tokio::test]
async fn messages_that_are_too_long_or_none_are_refused_and_hurt_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let channel = server.channel().await;
    for bytes in [257 << 10, 10 << 20] {
        let status = call(&channel, "CreateVolume", text_field(7, &vec![b'x'; bytes])).await.unwrap_err();
        assert_eq!(status.code(), Code::OutOfRange, "{bytes}: {status:?}");
        assert!(status.message().contains("limit is: 262144 bytes"), "{status:?}");
    }
    for broken in [vec![0xff; 100], text_field(1, &[0xff, 0xfe]), vec![0x0a, 0x7f], vec![0x08]] {
        let status = call(&channel, "CreateVolume", broken.clone()).await.unwrap_err();
        assert!(matches!(status.code(), Code::Internal | Code::InvalidArgument), "{broken:?}: {status:?}");
    }
    let status = call(&channel, "NoSuchCall", Vec::new()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    // The same connection, and a new one, are answered.
    for channel in [channel, server.channel().await] {
        ManagementClient::new(channel).create_volume(create_request("vol-1")).await.unwrap();
    }
}

/// What no name, id or token is; with and without what makes headers long.
fn hostile() -> Vec<String> {
    let long = ["x".repeat(10_000), "\u{1F4A3}".repeat(2500), "\u{0}".repeat(5000), "%\u{85}".repeat(3000)];
    let short = [
        "..",
        ".",
        "../../etc/passwd",
        "/",
        "a/b",
        "a\\b",
        "a b",
        " a",
        "a\n",
        "a\0b",
        "\u{1b}[31m",
        "\u{202e}a",
        "\u{feff}a",
        "ａ",
        "é",
        "é",
        "💣",
        "-rf",
        "a@b@c",
        "@",
        "uid:",
        "uid:x",
        "uid:../x",
        "a;drop table volumes",
        "'",
        "%s%n",
        "a\r\nb: c",
    ];
    long.into_iter().chain(short.map(str::to_owned)).collect()
}

#[tokio::test]
async fn hostile_names_are_refused_by_every_call_and_told_in_full() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    for text in hostile() {
        let name = || text.clone();
        let refusals = [
            api.create_volume(create_request(&text)).await.map(drop),
            api.get_volume(v1::GetVolumeRequest { name: name(), ..Default::default() }).await.map(drop),
            api.delete_volume(v1::DeleteVolumeRequest { name: name(), ..Default::default() }).await.map(drop),
            api.update_volume(v1::UpdateVolumeRequest { name: name(), ..Default::default() }).await.map(drop),
            api.set_volume_limits(v1::SetVolumeLimitsRequest { name: name(), ..Default::default() })
                .await
                .map(drop),
            api.resize_volume(v1::ResizeVolumeRequest {
                name: name(),
                capacity_bytes: 1 << 20,
                ..Default::default()
            })
            .await
            .map(drop),
            api.rename_volume(v1::RenameVolumeRequest {
                name: "a".to_owned(),
                new_name: name(),
                ..Default::default()
            })
            .await
            .map(drop),
            api.create_grant(v1::CreateGrantRequest {
                volume_name: name(),
                node_id: "n".to_owned(),
                ..Default::default()
            })
            .await
            .map(drop),
            api.delete_grant(v1::DeleteGrantRequest {
                volume_name: name(),
                node_id: "n".to_owned(),
                ..Default::default()
            })
            .await
            .map(drop),
            api.create_snapshot(v1::CreateSnapshotRequest {
                volume_names: vec!["a".to_owned()],
                name: name(),
                ..Default::default()
            })
            .await
            .map(drop),
            api.clone_volume(v1::CloneVolumeRequest {
                name: name(),
                source_volume_name: "a".to_owned(),
                ..Default::default()
            })
            .await
            .map(drop),
            api.restore_volume(v1::RestoreVolumeRequest {
                volume_name: "a".to_owned(),
                snapshot_name: name(),
                ..Default::default()
            })
            .await
            .map(drop),
            api.get_operation(v1::GetOperationRequest { operation_id: name() }).await.map(drop),
            api.watch(v1::WatchRequest { resume_token: name(), ..Default::default() }).await.map(drop),
        ];
        for (index, refused) in refusals.into_iter().enumerate() {
            assert_invalid(&refused.unwrap_err(), &format!("call {index} with {:.40?}", text));
        }
    }
    let listed = api.list_volumes(v1::ListVolumesRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.volumes, []);
}

#[tokio::test]
async fn hostile_labels_and_masks_are_told_in_headers_that_clients_take() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    for text in hostile().into_iter().filter(|text| text.len() > 1000) {
        let many = |count: usize| (0..count).map(|number| format!("{number}{text}"));
        let labels = many(8).map(|key| (key, String::new())).collect();
        let request = v1::CreateVolumeRequest { labels, ..create_request("vol-1") };
        assert_invalid(&api.create_volume(request).await.unwrap_err(), "labels");
        let update_mask = Some(prost_types::FieldMask { paths: many(20).collect() });
        let request = v1::UpdateVolumeRequest { name: "v".to_owned(), update_mask, ..Default::default() };
        assert_invalid(&api.update_volume(request).await.unwrap_err(), "a mask");
        let facts =
            v1::RegisterNodeRequest { node_id: text.clone(), version: text.clone(), ..Default::default() };
        assert_invalid(&api.register_node(facts).await.unwrap_err(), "a node");
    }
}

#[tokio::test]
async fn page_tokens_are_those_of_the_list_and_of_this_server() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    for name in ["a", "b", "c"] {
        api.create_volume(create_request(name)).await.unwrap();
        api.register_node(v1::RegisterNodeRequest { node_id: name.to_owned(), ..Default::default() })
            .await
            .unwrap();
    }
    let first = v1::ListVolumesRequest { page_size: 1, ..Default::default() };
    let token = api.list_volumes(first).await.unwrap().into_inner().next_page_token;
    let first = v1::ListNodesRequest { page_size: 1, ..Default::default() };
    let of_nodes = api.list_nodes(first).await.unwrap().into_inner().next_page_token;
    let (prefix, _) = token.rsplit_once('.').unwrap();
    let mut bad = hostile();
    bad.extend(
        hostile().into_iter().filter(|text| !text.contains('@')).map(|text| format!("{prefix}.{text}")),
    );
    bad.push(token.replace(&token[10..12], "zz"));
    for page_token in &bad {
        let token = || page_token.clone();
        let refusals = [
            api.list_volumes(v1::ListVolumesRequest { page_token: token(), ..Default::default() })
                .await
                .map(drop),
            api.list_nodes(v1::ListNodesRequest { page_token: token(), ..Default::default() })
                .await
                .map(drop),
            api.list_grants(v1::ListGrantsRequest { page_token: token(), ..Default::default() })
                .await
                .map(drop),
            api.list_snapshots(v1::ListSnapshotsRequest { page_token: token(), ..Default::default() })
                .await
                .map(drop),
            api.list_attachments(v1::ListAttachmentsRequest { page_token: token(), ..Default::default() })
                .await
                .map(drop),
        ];
        for (index, refused) in refusals.into_iter().enumerate() {
            assert_invalid(&refused.unwrap_err(), &format!("list {index} with {page_token:.80?}"));
        }
    }
    let of_another_list = v1::ListVolumesRequest { page_token: of_nodes, ..Default::default() };
    assert_invalid(&api.list_volumes(of_another_list).await.unwrap_err(), "a token of nodes");
    let page = v1::ListVolumesRequest { page_token: token, ..Default::default() };
    let names: Vec<String> = api
        .list_volumes(page)
        .await
        .unwrap()
        .into_inner()
        .volumes
        .into_iter()
        .map(|volume| volume.name)
        .collect();
    assert_eq!(names, ["b", "c"], "after all of that");
}

/// Another program's transaction: until it is dropped, calls that write wait for some seconds.
fn hold(data_dir: &Path) -> Connection {
    let db = Connection::open(data_dir.join("catalog.sqlite")).unwrap();
    db.execute_batch("BEGIN IMMEDIATE").unwrap();
    db
}

fn described(text: &str) -> v1::UpdateVolumeRequest {
    v1::UpdateVolumeRequest {
        name: "vol-1".to_owned(),
        description: Some(text.to_owned()),
        ..Default::default()
    }
}

async fn description(api: &mut Api) -> String {
    let request = v1::GetVolumeRequest { name: "vol-1".to_owned(), ..Default::default() };
    api.get_volume(request).await.unwrap().into_inner().description
}

async fn wait_for_description(api: &mut Api, text: &str) {
    let deadline = Instant::now() + DEADLINE;
    while description(api).await != text {
        assert!(Instant::now() < deadline, "the volume is never described as {text:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// That a call's time was over: by the server's own word, or by that of its gRPC library, where the server was too busy to be first.
fn assert_late(status: &Status) {
    match status.get_details_error_info() {
        Some(info) => {
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
            assert_eq!(info.reason, reason::CALL_TIMED_OUT);
        }
        None => assert_eq!((status.code(), status.message()), (Code::Cancelled, "Timeout expired")),
    }
}

/// A call that has begun, and cannot end; with the volume's name locked.
async fn begun(server: &Volserver, api: &Api, text: &str) -> tokio::task::JoinHandle<Result<(), Status>> {
    let (mut caller, request) = (api.clone(), described(text));
    let call = tokio::spawn(async move { caller.update_volume(request).await.map(drop) });
    // Until one that would change nothing, and so waits for nobody but for the name, does not get that.
    let mut api = patient(server);
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut nothing =
            Request::new(v1::UpdateVolumeRequest { name: "vol-1".to_owned(), ..Default::default() });
        nothing.metadata_mut().insert("grpc-timeout", "500m".parse().unwrap());
        match api.update_volume(nothing).await {
            Ok(_) => {}
            Err(status) => {
                assert_late(&status);
                return call;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_deadline_passes_changes_nothing_or_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let (mut api, mut hurried) = (server.client().await, patient(&server));
    api.create_volume(create_request("vol-1")).await.unwrap();
    let held = hold(&data_dir);
    let first = begun(&server, &api, "first").await;
    // Behind it, in line for the name: their time is over before their turn.
    for _ in 0..3 {
        let began = Instant::now();
        let mut late =
            Request::new(v1::DeleteVolumeRequest { name: "vol-1".to_owned(), ..Default::default() });
        late.metadata_mut().insert("grpc-timeout", "200m".parse().unwrap());
        let status = hurried.delete_volume(late).await.unwrap_err();
        assert_late(&status);
        assert!(began.elapsed() >= Duration::from_millis(190), "{:?}", began.elapsed());
    }
    // No time at all.
    let mut late = Request::new(create_request("vol-2"));
    late.metadata_mut().insert("grpc-timeout", "0n".parse().unwrap());
    assert_late(&hurried.create_volume(late).await.unwrap_err());
    drop(held);
    first.await.unwrap().unwrap();
    assert_eq!(description(&mut api).await, "first", "and the volume is there");

    // One that has begun when its time is over.
    let held = hold(&data_dir);
    let mut late = Request::new(described("second"));
    late.metadata_mut().insert("grpc-timeout", "1500m".parse().unwrap());
    assert_late(&hurried.update_volume(late).await.unwrap_err());
    drop(held);
    wait_for_description(&mut api, "second").await;
    let listed = api.list_volumes(v1::ListVolumesRequest::default()).await.unwrap().into_inner();
    assert!(listed.volumes.len() == 1, "what had no time made nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_cancelled_changes_nothing_or_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    api.create_volume(create_request("vol-1")).await.unwrap();
    let held = hold(&data_dir);
    let first = begun(&server, &api, "first").await;
    for _ in 0..3 {
        let delete = v1::DeleteVolumeRequest { name: "vol-1".to_owned(), ..Default::default() };
        let mut caller = api.clone();
        let cancelled = tokio::time::timeout(Duration::from_millis(200), caller.delete_volume(delete));
        assert!(cancelled.await.is_err(), "it waits for its turn");
    }
    // The caller of the one that has begun hangs up as well.
    first.abort();
    drop(held);
    wait_for_description(&mut api, "first").await;
    // A call behind all of them has its turn.
    api.update_volume(described("last")).await.unwrap();
    assert_eq!(description(&mut api).await, "last");
}
