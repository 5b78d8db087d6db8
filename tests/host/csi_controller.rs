//! The CSI controller, `volcsi --controller` over its socket and a real volserver: each call, its repeat after a kill, and hostile ones.
//!
//! Owns a plugin that is killed between a call and its repeat, and nodes that are only registered. What the calls decide is tested
//! where it is decided, in `client/src/csi/controller/`.

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use proto::csi::v1::controller_client::ControllerClient;
use proto::csi::v1::controller_service_capability::Type as CapabilityType;
use proto::csi::v1::group_controller_client::GroupControllerClient;
use proto::csi::v1::identity_client::IdentityClient;
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use proto::csi::v1::volume_content_source::{SnapshotSource, Type as SourceType, VolumeSource};
use proto::csi::v1::{self as csi, VolumeHealthErrorType as Health};
use proto::v1;
use proto::v1::management_client::ManagementClient;
use rustix::process::{Pid, Signal, kill_process};
use testlab::management_api::export_of;
use testlab::nbd_client::Client;
use testlab::volcsi::Volcsi;
use testlab::volserver::Volserver;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use super::images::Mounted;
use super::programs;

const MIB: i64 = 1 << 20;
const SECRET: &str = "correct-horse-battery-staple";
const FS_TYPE: &str = "csi.storage.k8s.io/fstype";
const NO_SUCH_UID: &str = "0f0e0d0c-0b0a-4908-8706-050403020100";

/// `volcsi --controller`, with its socket and its log in the directory.
fn start_plugin(directory: &Path, server: &str, more: &[&str]) -> Volcsi {
    let mut command = Command::new(programs::directory().join("volcsi"));
    command.arg("--controller").args(["--server", server, "--log", "trace"]).args(more);
    Volcsi::start(&mut command, &directory.join("csi.sock"), &directory.join("log")).unwrap()
}

/// A server, a plugin, and a directory for both.
struct Bench {
    plugin: Option<Volcsi>,
    uri: String,
    server: Option<Volserver>,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    fn at(directory: tempfile::TempDir) -> Self {
        let mut command = Command::new(programs::directory().join("volserver"));
        command.args(["--threads", "2", "--memory-max", "1G", "--log", "error"]);
        let server = Volserver::start(&mut command, directory.path()).unwrap();
        let uri = server.management_uri();
        let plugin = Some(start_plugin(directory.path(), &uri, &[]));
        Self { plugin, uri, server: Some(server), directory }
    }

    /// Kills the plugin, and starts another one.
    fn kill_plugin(&mut self) {
        self.plugin = None;
        self.plugin = Some(start_plugin(self.directory.path(), &self.uri, &[]));
    }

    async fn channel(&self) -> Channel {
        self.plugin.as_ref().unwrap().channel().await.unwrap()
    }

    async fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel().await)
    }

    async fn api(&self) -> ManagementClient<Channel> {
        ManagementClient::connect(self.uri.clone()).await.unwrap()
    }

    /// A call, and the same once more after the plugin was killed: both have one answer.
    async fn twice<Q, A, F>(&mut self, request: Q, call: impl Fn(ControllerClient<Channel>, Q) -> F) -> A
    where
        Q: Clone,
        A: PartialEq + Debug,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let first = call(self.controller().await, request.clone()).await.unwrap().into_inner();
        self.kill_plugin();
        let second = call(self.controller().await, request).await.unwrap().into_inner();
        assert_eq!(first, second, "the repeat");
        second
    }

    async fn create(&mut self, request: csi::CreateVolumeRequest) -> csi::Volume {
        let answer = self.twice(request, |mut csi, request| async move { csi.create_volume(request).await });
        answer.await.volume.unwrap()
    }

    /// The code and the words with which it is refused.
    async fn create_refused(&self, request: csi::CreateVolumeRequest) -> (Code, String) {
        let refused = self.controller().await.create_volume(request).await.unwrap_err();
        (refused.code(), refused.message().to_owned())
    }

    async fn published_to(&self, volume_id: &str) -> Vec<String> {
        let request = csi::ControllerGetVolumeRequest { volume_id: volume_id.to_owned() };
        let answer = self.controller().await.controller_get_volume(request).await.unwrap().into_inner();
        answer.status.unwrap().published_node_ids
    }

    /// Of the server's volume with this uid.
    async fn volume(&self, uid: &str) -> v1::Volume {
        let request = v1::GetVolumeRequest { name: format!("uid:{uid}"), ..Default::default() };
        self.api().await.get_volume(request).await.unwrap().into_inner()
    }
}

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn capability(is_block: bool, mode: Mode) -> csi::VolumeCapability {
    let access_type = match is_block {
        true => AccessType::Block(BlockVolume {}),
        false => AccessType::Mount(MountVolume::default()),
    };
    csi::VolumeCapability {
        access_type: Some(access_type),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

fn writer() -> csi::VolumeCapability {
    capability(false, Mode::SingleNodeWriter)
}

/// A volume of exactly this size.
fn wanted(name: &str, bytes: i64) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(csi::CapacityRange { required_bytes: bytes, limit_bytes: bytes }),
        volume_capabilities: vec![writer()],
        secrets: map(&[("key", SECRET)]),
        ..Default::default()
    }
}

fn copy_of(name: &str, source: SourceType) -> csi::CreateVolumeRequest {
    let source = csi::VolumeContentSource { r#type: Some(source) };
    csi::CreateVolumeRequest { capacity_range: None, volume_content_source: Some(source), ..wanted(name, 0) }
}

fn of_volume(id: &str) -> SourceType {
    SourceType::Volume(VolumeSource { volume_id: id.to_owned() })
}

fn of_snapshot(id: &str) -> SourceType {
    SourceType::Snapshot(SnapshotSource { snapshot_id: id.to_owned() })
}

#[tokio::test]
async fn what_is_declared_is_what_is_there() {
    let bench = Bench::new();
    let mut identity = IdentityClient::new(bench.channel().await);
    let ready = identity.probe(csi::ProbeRequest {}).await.unwrap().into_inner().ready;
    assert_eq!(ready, Some(true), "the server answers; there is no node daemon, and none is needed");
    let plugin = identity.get_plugin_capabilities(csi::GetPluginCapabilitiesRequest {}).await.unwrap();
    assert_eq!(plugin.into_inner().capabilities.len(), 3);
    let mut node = proto::csi::v1::node_client::NodeClient::new(bench.channel().await);
    let refused = node.node_get_info(csi::NodeGetInfoRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    let mut controller = bench.controller().await;
    let declared = controller.controller_get_capabilities(csi::ControllerGetCapabilitiesRequest {}).await;
    let mut declared: Vec<i32> = declared
        .unwrap()
        .into_inner()
        .capabilities
        .into_iter()
        .map(|capability| match capability.r#type {
            Some(CapabilityType::Rpc(rpc)) => rpc.r#type,
            None => panic!("a capability without a type"),
        })
        .collect();
    declared.sort_unstable();
    assert_eq!(declared, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]);
}

#[tokio::test]
async fn a_volume_is_where_the_server_is() {
    let mut bench = Bench::new();
    bench.plugin = None;
    let zone = ["--topology", "topology.volnode.io/zone=z1"];
    bench.plugin = Some(start_plugin(bench.directory.path(), &bench.uri, &zone));
    let mut identity = IdentityClient::new(bench.channel().await);
    let plugin = identity.get_plugin_capabilities(csi::GetPluginCapabilitiesRequest {}).await.unwrap();
    assert_eq!(plugin.into_inner().capabilities.len(), 5, "with places");
    let place = |zone: &str| csi::Topology { segments: map(&[("topology.volnode.io/zone", zone)]) };
    let wanted_in = |zones: &[&str]| csi::CreateVolumeRequest {
        accessibility_requirements: Some(csi::TopologyRequirement {
            requisite: zones.iter().map(|zone| place(zone)).collect(),
            ..Default::default()
        }),
        ..wanted("vol", MIB)
    };
    let (code, why) = bench.create_refused(wanted_in(&["z2", "z3"])).await;
    assert!(code == Code::ResourceExhausted && why.contains("zone=z1"), "{why}");
    let made = bench.controller().await.create_volume(wanted_in(&["z2", "z1"])).await.unwrap().into_inner();
    assert_eq!(made.volume.unwrap().accessible_topology, [place("z1")]);
    let elsewhere = csi::GetCapacityRequest { accessible_topology: Some(place("z2")), ..Default::default() };
    let capacity = bench.controller().await.get_capacity(elsewhere).await.unwrap().into_inner();
    assert_eq!(capacity.available_capacity, 0);
}

#[tokio::test]
async fn a_volume_is_made_found_grown_limited_listed_and_deleted() {
    let mut bench = Bench::new();
    let class = map(&[
        ("readIops", "500"),
        ("csi.storage.k8s.io/pvc/name", "data"),
        ("csi.storage.k8s.io/pvc/namespace", "shop"),
    ]);
    let request = csi::CreateVolumeRequest { parameters: class, ..wanted("pvc-ä/1", 8 * MIB) };
    let volume = bench.create(request.clone()).await;
    assert_eq!(volume.capacity_bytes, 8 * MIB);
    let on_server = bench.volume(&volume.volume_id).await;
    assert!(on_server.description.contains("pvc-ä/1") && on_server.description.contains("shop/data"));
    assert_eq!(on_server.limits.unwrap().read_iops, 500);
    let other_size =
        csi::CreateVolumeRequest { parameters: request.parameters.clone(), ..wanted("pvc-ä/1", 4 * MIB) };
    let (code, why) = bench.create_refused(other_size).await;
    assert!(code == Code::AlreadyExists && why.contains("8388608 bytes"), "{why}");
    let other_class = csi::CreateVolumeRequest { parameters: map(&[("readIops", "1")]), ..request.clone() };
    assert_eq!(bench.create_refused(other_class).await.0, Code::AlreadyExists);

    let modify = csi::ControllerModifyVolumeRequest {
        volume_id: volume.volume_id.clone(),
        mutable_parameters: map(&[("writeBandwidth", "10Mi")]),
        ..Default::default()
    };
    bench
        .twice(modify.clone(), |mut csi, request| async move { csi.controller_modify_volume(request).await })
        .await;
    let limits = bench.volume(&volume.volume_id).await.limits.unwrap();
    assert_eq!((limits.read_iops, limits.write_bytes_per_second), (500, 10 << 20));
    let nothing = csi::ControllerModifyVolumeRequest { mutable_parameters: map(&[]), ..modify.clone() };
    bench.controller().await.controller_modify_volume(nothing).await.unwrap();
    let unknown =
        csi::ControllerModifyVolumeRequest { mutable_parameters: map(&[("backend", "file")]), ..modify };
    let refused = bench.controller().await.controller_modify_volume(unknown).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);

    let expand = csi::ControllerExpandVolumeRequest {
        volume_id: volume.volume_id.clone(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 16 * MIB, limit_bytes: 16 * MIB }),
        volume_capability: Some(capability(true, Mode::SingleNodeWriter)),
        ..Default::default()
    };
    let grown = bench
        .twice(expand.clone(), |mut csi, request| async move { csi.controller_expand_volume(request).await });
    let grown = grown.await;
    assert_eq!((grown.capacity_bytes, grown.node_expansion_required), (16 * MIB, false));
    let of_file_system =
        csi::ControllerExpandVolumeRequest { volume_capability: Some(writer()), ..expand.clone() };
    let mut controller = bench.controller().await;
    let grown = controller.controller_expand_volume(of_file_system).await.unwrap().into_inner();
    assert!(grown.node_expansion_required);
    let smaller = csi::CapacityRange { required_bytes: 4096, limit_bytes: 4096 };
    let smaller = csi::ControllerExpandVolumeRequest { capacity_range: Some(smaller), ..expand };
    assert_eq!(controller.controller_expand_volume(smaller).await.unwrap_err().code(), Code::OutOfRange);

    // A rename on the server, and one more volume of the name that it had: the CSI name is still this volume's.
    let rename = v1::RenameVolumeRequest {
        name: on_server.name.clone(),
        new_name: "renamed".to_owned(),
        ..Default::default()
    };
    bench.api().await.rename_volume(rename).await.unwrap();
    let any_size = csi::CreateVolumeRequest { capacity_range: None, ..request };
    assert_eq!(bench.create(any_size).await.volume_id, volume.volume_id);

    let delete = csi::DeleteVolumeRequest { volume_id: volume.volume_id.clone(), ..Default::default() };
    bench.twice(delete, |mut csi, request| async move { csi.delete_volume(request).await }).await;
    let gone = csi::ControllerGetVolumeRequest { volume_id: volume.volume_id };
    let refused = bench.controller().await.controller_get_volume(gone).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
}

/// The server knows the call that made the first of a name, also when that is gone; what is made again is another one, and is there.
#[tokio::test]
async fn a_name_is_given_again_once_what_bore_it_is_deleted() {
    let mut bench = Bench::new();
    let mut made = Vec::new();
    // More often than there are ids in a day.
    for _ in 0..18 {
        let volume_id = bench.create(wanted("pvc-1", MIB)).await.volume_id;
        assert_eq!(bench.volume(&volume_id).await.capacity_bytes, MIB as u64);
        assert!(!made.contains(&volume_id), "{volume_id} was deleted");
        let delete = csi::DeleteVolumeRequest { volume_id: volume_id.clone(), ..Default::default() };
        bench.controller().await.delete_volume(delete).await.unwrap();
        made.push(volume_id);
    }
}

#[tokio::test]
async fn lists_are_whole_without_a_bound_and_go_on_behind_a_token() {
    let bench = Bench::new();
    let mut controller = bench.controller().await;
    let longest = "n".repeat(128);
    let mut made = Vec::new();
    for name in ["a", "b", "ü", "\u{1F4BE}", &longest] {
        let volume = controller.create_volume(wanted(name, MIB)).await.unwrap().into_inner().volume.unwrap();
        made.push(volume.volume_id);
    }
    let mut ids = async |max_entries, starting_token: String| {
        let request = csi::ListVolumesRequest { max_entries, starting_token };
        let answer = controller.list_volumes(request).await?.into_inner();
        let ids: Vec<String> =
            answer.entries.into_iter().map(|entry| entry.volume.unwrap().volume_id).collect();
        Ok::<_, Status>((ids, answer.next_token))
    };
    let (mut all, none) = ids(0, String::new()).await.unwrap();
    let (first, token) = ids(2, String::new()).await.unwrap();
    let (rest, end) = ids(0, token).await.unwrap();
    assert_eq!((first.len(), rest.len(), none.as_str(), end.as_str()), (2, 3, "", ""));
    assert_eq!([first, rest].concat(), all);
    all.sort();
    made.sort();
    assert_eq!(all, made);
    assert_eq!(ids(0, "invalid-token".to_owned()).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(ids(-1, String::new()).await.unwrap_err().code(), Code::InvalidArgument);
    let mut controller = bench.controller().await;
    let request = csi::ListSnapshotsRequest { starting_token: "x".repeat(10 << 10), ..Default::default() };
    assert_eq!(controller.list_snapshots(request).await.unwrap_err().code(), Code::Aborted);
    let capacity = controller.get_capacity(csi::GetCapacityRequest::default()).await.unwrap().into_inner();
    assert!(capacity.available_capacity > 0 && capacity.minimum_volume_size == Some(4096));
}

fn publication(volume_id: &str, node_id: &str) -> csi::ControllerPublishVolumeRequest {
    csi::ControllerPublishVolumeRequest {
        volume_id: volume_id.to_owned(),
        node_id: node_id.to_owned(),
        volume_capability: Some(writer()),
        secrets: map(&[("key", SECRET)]),
        ..Default::default()
    }
}

async fn publish_refused(bench: &Bench, request: csi::ControllerPublishVolumeRequest) -> (Code, String) {
    let refused = bench.controller().await.controller_publish_volume(request).await.unwrap_err();
    (refused.code(), refused.message().to_owned())
}

async fn unpublish(bench: &mut Bench, volume_id: &str, node_id: &str) {
    let (volume_id, node_id) = (volume_id.to_owned(), node_id.to_owned());
    let request = csi::ControllerUnpublishVolumeRequest { volume_id, node_id, ..Default::default() };
    bench
        .twice(request, |mut csi, request| async move { csi.controller_unpublish_volume(request).await })
        .await;
}

async fn register(api: &mut ManagementClient<Channel>, node_id: &str) {
    let request = v1::RegisterNodeRequest { node_id: node_id.to_owned(), ..Default::default() };
    api.register_node(request).await.unwrap();
}

/// As a node attaches that was told by CSI.
fn attachment(volume_id: &str, node_id: &str) -> v1::AttachVolumeRequest {
    v1::AttachVolumeRequest {
        volume_name: format!("uid:{volume_id}"),
        node_id: node_id.to_owned(),
        only_if_granted: true,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_volume_is_one_nodes_until_it_is_unpublished_which_fences_that_node() {
    let mut bench = Bench::new();
    let mut api = bench.api().await;
    let id = bench.create(wanted("vol", MIB)).await.volume_id;
    register(&mut api, "node-1").await;
    register(&mut api, "node-2").await;
    assert_eq!(publish_refused(&bench, publication(&id, "no-such-node")).await.0, Code::NotFound);
    assert_eq!(publish_refused(&bench, publication(&id, "a\nb")).await.0, Code::NotFound);
    assert_eq!(publish_refused(&bench, publication(NO_SUCH_UID, "node-1")).await.0, Code::NotFound);
    let answer = bench
        .twice(publication(&id, "node-1"), |mut csi, request| async move {
            csi.controller_publish_volume(request).await
        })
        .await;
    assert_eq!(answer.publish_context, HashMap::new(), "whoever may look at it learns nothing");
    assert_eq!(bench.published_to(&id).await, ["node-1"]);
    let flipped = csi::ControllerPublishVolumeRequest { readonly: true, ..publication(&id, "node-1") };
    assert_eq!(publish_refused(&bench, flipped).await.0, Code::AlreadyExists);
    let (code, why) = publish_refused(&bench, publication(&id, "node-2")).await;
    assert!(code == Code::FailedPrecondition && why.contains("published to node-1"), "{why}");
    let delete = csi::DeleteVolumeRequest { volume_id: id.clone(), ..Default::default() };
    let refused = bench.controller().await.delete_volume(delete).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);

    // The node has it and writes; it loses it, whatever it does, and a late attach of its gets nothing.
    let attached = api.attach_volume(attachment(&id, "node-1")).await.unwrap().into_inner();
    let (address, export) = export_of(&attached, 1, 0).unwrap();
    let mut disk = Client::open(address, &export).unwrap();
    disk.write(0, &[7; 4096]).unwrap();
    unpublish(&mut bench, &id, "node-1").await;
    assert!(disk.is_closed_by_server(), "its connection is open");
    let late = api.attach_volume(attachment(&id, "node-1")).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition, "{late}");
    assert!(bench.published_to(&id).await.is_empty());

    // The other node reads what was written, and is taken away without being named.
    bench.controller().await.controller_publish_volume(publication(&id, "node-2")).await.unwrap();
    let attached = api.attach_volume(attachment(&id, "node-2")).await.unwrap().into_inner();
    let (address, export) = export_of(&attached, 1, 0).unwrap();
    let mut disk = Client::open(address, &export).unwrap();
    assert_eq!(disk.read(0, 4096).unwrap(), [7; 4096]);
    unpublish(&mut bench, &id, "").await;
    assert!(disk.is_closed_by_server(), "its connection is open");
    assert!(bench.published_to(&id).await.is_empty());

    // What is attached by other means is not taken over.
    let by_hand = v1::AttachVolumeRequest { only_if_granted: false, ..attachment(&id, "by-hand") };
    api.attach_volume(by_hand).await.unwrap();
    let (code, why) = publish_refused(&bench, publication(&id, "node-2")).await;
    assert!(code == Code::FailedPrecondition && why.contains("attached to by-hand"), "{why}");
    unpublish(&mut bench, &id, "").await;
    bench.controller().await.controller_publish_volume(publication(&id, "node-2")).await.unwrap();
    for nonsense in [NO_SUCH_UID, "nonsense", &"x".repeat(10 << 10)] {
        unpublish(&mut bench, nonsense, "node-2").await;
        unpublish(&mut bench, nonsense, "").await;
    }
    unpublish(&mut bench, &id, "no-such-node").await;
    assert_eq!(bench.published_to(&id).await, ["node-2"]);
    let log = fs::read_to_string(bench.directory.path().join("log")).unwrap();
    assert!(
        log.contains("ControllerPublishVolume") && !log.contains(SECRET) && !log.contains(&attached.secret)
    );
}

#[tokio::test]
async fn a_node_gets_no_more_volumes_than_it_can_have() {
    let mut bench = Bench::new();
    let node = v1::RegisterNodeRequest { node_id: "n1".to_owned(), max_volumes: 2, ..Default::default() };
    bench.api().await.register_node(node).await.unwrap();
    let mut ids = Vec::new();
    for name in ["a", "b", "c"] {
        ids.push(bench.create(wanted(name, MIB)).await.volume_id);
    }
    let publish = |mut csi: ControllerClient<Channel>, request: csi::ControllerPublishVolumeRequest| async move {
        csi.controller_publish_volume(request).await
    };
    for id in &ids[..2] {
        bench.twice(publication(id, "n1"), publish).await;
    }
    let (code, why) = publish_refused(&bench, publication(&ids[2], "n1")).await;
    assert_eq!(code, Code::ResourceExhausted, "{why}");
    assert!(why.contains("n1 has 2 volumes, and can have 2"), "{why}");
    // It has what it has, and there is room once one of them is gone.
    bench.twice(publication(&ids[0], "n1"), publish).await;
    unpublish(&mut bench, &ids[1], "n1").await;
    bench.twice(publication(&ids[2], "n1"), publish).await;
}

#[tokio::test]
async fn access_modes_are_for_the_volumes_that_bear_them() {
    let mut bench = Bench::new();
    let mut api = bench.api().await;
    register(&mut api, "node-1").await;
    register(&mut api, "node-2").await;
    let shared = csi::CreateVolumeRequest {
        parameters: map(&[("shared", "true")]),
        volume_capabilities: vec![capability(true, Mode::MultiNodeMultiWriter)],
        ..wanted("shared", MIB)
    };
    let id = bench.create(shared.clone()).await.volume_id;
    let with = |id: &str, node_id: &str, capability| csi::ControllerPublishVolumeRequest {
        volume_capability: Some(capability),
        ..publication(id, node_id)
    };
    let writers = capability(true, Mode::MultiNodeMultiWriter);
    let mut controller = bench.controller().await;
    for node_id in ["node-1", "node-2"] {
        controller.controller_publish_volume(with(&id, node_id, writers.clone())).await.unwrap();
    }
    assert_eq!(bench.published_to(&id).await, ["node-1", "node-2"]);
    assert_eq!(publish_refused(&bench, with(&id, "node-1", writer())).await.0, Code::FailedPrecondition);
    let mounted =
        csi::CreateVolumeRequest { volume_capabilities: vec![writer()], name: "m".to_owned(), ..shared };
    let (code, why) = bench.create_refused(mounted).await;
    assert!(code == Code::InvalidArgument && why.contains("block device"), "{why}");

    let plain = bench.create(wanted("plain", MIB)).await.volume_id;
    let validate = |id: &str, mode| csi::ValidateVolumeCapabilitiesRequest {
        volume_id: id.to_owned(),
        volume_capabilities: vec![capability(true, mode)],
        ..Default::default()
    };
    for (mode, is_confirmed) in [
        (Mode::SingleNodeWriter, true),
        (Mode::SingleNodeSingleWriter, true),
        (Mode::SingleNodeMultiWriter, true),
        (Mode::SingleNodeReaderOnly, true),
        (Mode::MultiNodeReaderOnly, false),
        (Mode::MultiNodeMultiWriter, false),
        (Mode::MultiNodeSingleWriter, false),
    ] {
        let answer =
            controller.validate_volume_capabilities(validate(&plain, mode)).await.unwrap().into_inner();
        let confirmed = answer.confirmed.map(|confirmed| confirmed.volume_capabilities);
        assert_eq!(confirmed, is_confirmed.then(|| vec![capability(true, mode)]), "{mode:?}");
        assert_eq!(answer.message.contains(mode.as_str_name()), !is_confirmed, "{}", answer.message);
    }
    let missing =
        controller.validate_volume_capabilities(validate(NO_SUCH_UID, Mode::SingleNodeWriter)).await;
    assert_eq!(missing.unwrap_err().code(), Code::NotFound);
    let readers = capability(true, Mode::MultiNodeReaderOnly);
    assert_eq!(
        publish_refused(&bench, with(&plain, "node-1", readers.clone())).await.0,
        Code::FailedPrecondition
    );
    let read_only = v1::UpdateVolumeRequest {
        name: format!("uid:{plain}"),
        is_read_only: Some(true),
        ..Default::default()
    };
    api.update_volume(read_only).await.unwrap();
    assert_eq!(publish_refused(&bench, publication(&plain, "node-1")).await.0, Code::FailedPrecondition);
    for node_id in ["node-1", "node-2"] {
        let answer =
            controller.controller_publish_volume(with(&plain, node_id, readers.clone())).await.unwrap();
        assert_eq!(answer.into_inner().publish_context, map(&[("readonly", "true")]));
    }
    let mut reading = v1::AttachVolumeRequest { ..attachment(&plain, "node-1") };
    assert_eq!(
        api.attach_volume(reading.clone()).await.unwrap_err().code(),
        Code::FailedPrecondition,
        "to write"
    );
    reading.access_mode = v1::AccessMode::MultiNodeReaderOnly.into();
    api.attach_volume(reading).await.unwrap();
}

#[tokio::test]
async fn snapshots_and_copies_have_the_bytes_of_their_instant() {
    let Some(mounted) = Mounted::new() else { return };
    let mut bench = Bench::at(tempfile::tempdir_in(mounted.path()).unwrap());
    let id = bench.create(wanted("vol", MIB)).await.volume_id;
    let other = bench.create(wanted("other", MIB)).await.volume_id;
    let data = bench.server.as_ref().unwrap().data;
    let name_of = async |bench: &Bench, id: &str| bench.volume(id).await.name;
    let write = |name: &str, byte: u8| Client::open(data, name).unwrap().write(0, &[byte; 4096]).unwrap();
    let first = |name: &str| Client::open(data, name).unwrap().read(0, 4096).unwrap()[0];
    write(&name_of(&bench, &id).await, 1);
    let request = csi::CreateSnapshotRequest {
        source_volume_id: id.clone(),
        name: "snap/ä".to_owned(),
        parameters: map(&[("csi.storage.k8s.io/volumesnapshot/name", "s")]),
        secrets: map(&[("key", SECRET)]),
        ..Default::default()
    };
    let taken =
        bench.twice(request.clone(), |mut csi, request| async move { csi.create_snapshot(request).await });
    let taken = taken.await.snapshot.unwrap();
    assert_eq!(
        (taken.source_volume_id.as_str(), taken.ready_to_use, taken.size_bytes),
        (id.as_str(), true, MIB)
    );
    let of_other = csi::CreateSnapshotRequest { source_volume_id: other.clone(), ..request.clone() };
    let mut controller = bench.controller().await;
    assert_eq!(controller.create_snapshot(of_other).await.unwrap_err().code(), Code::AlreadyExists);
    let unknown = csi::CreateSnapshotRequest { parameters: map(&[("x", "y")]), ..request.clone() };
    assert_eq!(controller.create_snapshot(unknown).await.unwrap_err().code(), Code::InvalidArgument);
    write(&name_of(&bench, &id).await, 2);

    // The copies are larger, have limits, and are copies of what they say.
    let limits = map(&[("readIops", "77")]);
    let copy = csi::CreateVolumeRequest {
        capacity_range: Some(csi::CapacityRange { required_bytes: 2 * MIB, limit_bytes: 0 }),
        mutable_parameters: limits,
        ..copy_of("of-snapshot", of_snapshot(&taken.snapshot_id))
    };
    let restored = bench.create(copy.clone()).await;
    assert_eq!((restored.capacity_bytes, &restored.content_source), (2 * MIB, &copy.volume_content_source));
    let on_server = bench.volume(&restored.volume_id).await;
    assert_eq!(on_server.limits.unwrap().read_iops, 77);
    assert!(!on_server.labels.contains_key("csi.volnode.io/unfinished"), "{:?}", on_server.labels);
    assert_eq!(first(&on_server.name), 1);
    let clone = bench.create(copy_of("of-volume", of_volume(&id))).await;
    assert_eq!((clone.capacity_bytes, first(&name_of(&bench, &clone.volume_id).await)), (MIB, 2));
    let of_another = copy_of("of-volume", of_volume(&other));
    assert_eq!(bench.create_refused(of_another).await.0, Code::AlreadyExists);
    let small = csi::CapacityRange { required_bytes: 4096, limit_bytes: 4096 };
    let small = csi::CreateVolumeRequest { capacity_range: Some(small), ..copy_of("s", of_volume(&id)) };
    assert_eq!(bench.create_refused(small).await.0, Code::OutOfRange);
    for source in [of_snapshot(NO_SUCH_UID), of_snapshot("x"), of_volume(NO_SUCH_UID), of_volume("x")] {
        assert_eq!(bench.create_refused(copy_of("nothing", source)).await.0, Code::NotFound);
    }
    // Copies may be read on several nodes.
    register(&mut bench.api().await, "node-1").await;
    let readers = csi::ControllerPublishVolumeRequest {
        volume_capability: Some(capability(false, Mode::MultiNodeReaderOnly)),
        ..publication(&clone.volume_id, "node-1")
    };
    bench.controller().await.controller_publish_volume(readers).await.unwrap();

    // The volume goes, and its snapshot stays, with its name.
    let delete = csi::DeleteVolumeRequest { volume_id: id.clone(), ..Default::default() };
    bench.twice(delete, |mut csi, request| async move { csi.delete_volume(request).await }).await;
    let again =
        bench.controller().await.create_snapshot(request).await.unwrap().into_inner().snapshot.unwrap();
    assert_eq!(again, taken);
    let get = csi::GetSnapshotRequest { snapshot_id: taken.snapshot_id.clone(), ..Default::default() };
    let found = bench.controller().await.get_snapshot(get.clone()).await.unwrap().into_inner().snapshot;
    assert_eq!(found, Some(taken.clone()));
    let delete = csi::DeleteSnapshotRequest { snapshot_id: taken.snapshot_id, ..Default::default() };
    bench.twice(delete, |mut csi, request| async move { csi.delete_snapshot(request).await }).await;
    assert_eq!(bench.controller().await.get_snapshot(get).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(first(&on_server.name), 1, "the copy is its own");
}

/// Of an encrypted volume CSI knows the size without the header of LUKS; its copies are encrypted as it is, and nothing else is.
#[tokio::test]
async fn an_encrypted_volume_is_one_in_every_copy_and_has_its_clear_size_everywhere() {
    const HEADER: u64 = 16 << 20;
    let Some(mounted) = Mounted::new() else { return };
    let mut bench = Bench::at(tempfile::tempdir_in(mounted.path()).unwrap());
    let encrypted = |request: csi::CreateVolumeRequest| csi::CreateVolumeRequest {
        parameters: map(&[("encrypted", "true")]),
        ..request
    };
    let made = bench.create(encrypted(wanted("vault", MIB))).await;
    assert_eq!((made.capacity_bytes, made.volume_context), (MIB, map(&[("encrypted", "true")])));
    let id = made.volume_id;
    let on_server = bench.volume(&id).await;
    assert_eq!((on_server.is_encrypted, on_server.capacity_bytes), (true, MIB as u64 + HEADER));
    let (code, why) = bench.create_refused(wanted("vault", MIB)).await;
    assert_eq!(code, Code::AlreadyExists);
    assert!(why.contains("it is encrypted, and wanted is one that is not encrypted"), "{why}");
    let plain = bench.create(wanted("plain", MIB)).await;
    assert_eq!((plain.volume_context, bench.volume(&plain.volume_id).await.is_encrypted), (map(&[]), false));
    for (parameters, what) in [
        (&[("encrypted", "maybe")][..], "is not true or false"),
        (&[("encrypted", "true"), ("shared", "true")], "cannot be encrypted"),
    ] {
        let request = csi::CreateVolumeRequest { parameters: map(parameters), ..wanted("no", MIB) };
        let (code, why) = bench.create_refused(request).await;
        assert!(code == Code::InvalidArgument && why.contains(what), "{why}");
    }

    let larger = csi::ControllerExpandVolumeRequest {
        volume_id: id.clone(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 2 * MIB, limit_bytes: 2 * MIB }),
        ..Default::default()
    };
    let grown =
        bench.twice(larger, |mut csi, request| async move { csi.controller_expand_volume(request).await });
    assert_eq!(grown.await.capacity_bytes, 2 * MIB);
    assert_eq!(bench.volume(&id).await.capacity_bytes, 2 * MIB as u64 + HEADER);

    let snapshot = csi::CreateSnapshotRequest {
        source_volume_id: id.clone(),
        name: "of-vault".to_owned(),
        ..Default::default()
    };
    let taken = bench.controller().await.create_snapshot(snapshot).await.unwrap().into_inner();
    let taken = taken.snapshot.unwrap();
    assert_eq!(taken.size_bytes, 2 * MIB);
    for (name, source) in [("restored", of_snapshot(&taken.snapshot_id)), ("cloned", of_volume(&id))] {
        let (code, why) = bench.create_refused(copy_of(name, source.clone())).await;
        assert!(code == Code::InvalidArgument && why.contains("encrypted: \"true\""), "{why}");
        for (suffix, bytes) in [("", 2 * MIB), ("-larger", 4 * MIB)] {
            let range = csi::CapacityRange { required_bytes: bytes, limit_bytes: bytes };
            let copy = copy_of(&format!("{name}{suffix}"), source.clone());
            let copy = csi::CreateVolumeRequest { capacity_range: Some(range), ..encrypted(copy) };
            let copied = bench.create(copy).await;
            assert_eq!((copied.capacity_bytes, copied.volume_context.len()), (bytes, 1), "{name}{suffix}");
            let on_server = bench.volume(&copied.volume_id).await;
            assert_eq!((on_server.is_encrypted, on_server.capacity_bytes), (true, bytes as u64 + HEADER));
        }
    }
    let of_plain = encrypted(copy_of("of-plain", of_volume(&plain.volume_id)));
    let (code, why) = bench.create_refused(of_plain).await;
    assert!(code == Code::InvalidArgument && why.contains("not encrypted"), "{why}");
    let listed = bench.controller().await.list_volumes(csi::ListVolumesRequest::default()).await.unwrap();
    let listed = listed.into_inner().entries.into_iter().filter_map(|entry| entry.volume);
    let encrypted = listed.filter(|volume| volume.volume_context.contains_key("encrypted"));
    assert_eq!(encrypted.count(), 5);
}

/// A name of a snapshot, or of a copy, is given again once what bore it is deleted.
#[tokio::test]
async fn names_of_snapshots_and_of_copies_are_given_again() {
    let Some(mounted) = Mounted::new() else { return };
    let mut bench = Bench::at(tempfile::tempdir_in(mounted.path()).unwrap());
    let other = bench.create(wanted("other", MIB)).await.volume_id;
    let mut made = Vec::new();
    for _ in 0..3 {
        let request = csi::CreateSnapshotRequest {
            source_volume_id: other.clone(),
            name: "again".to_owned(),
            ..Default::default()
        };
        let taken =
            bench.twice(request, |mut csi, request| async move { csi.create_snapshot(request).await }).await;
        let snapshot_id = taken.snapshot.unwrap().snapshot_id;
        let copy = bench.create(copy_of("copied again", of_volume(&other))).await.volume_id;
        assert!(!made.contains(&snapshot_id) && !made.contains(&copy), "{made:?}");
        let delete = csi::DeleteSnapshotRequest { snapshot_id: snapshot_id.clone(), ..Default::default() };
        bench.controller().await.delete_snapshot(delete).await.unwrap();
        let delete = csi::DeleteVolumeRequest { volume_id: copy.clone(), ..Default::default() };
        bench.controller().await.delete_volume(delete).await.unwrap();
        made.extend([snapshot_id, copy]);
    }
}

/// Ids of snapshots, and the token of what follows.
async fn listed(
    bench: &Bench,
    snapshot_id: &str,
    source_volume_id: &str,
    max_entries: i32,
    starting_token: &str,
) -> (Vec<String>, String) {
    let request = csi::ListSnapshotsRequest {
        max_entries,
        starting_token: starting_token.to_owned(),
        source_volume_id: source_volume_id.to_owned(),
        snapshot_id: snapshot_id.to_owned(),
        ..Default::default()
    };
    let answer = bench.controller().await.list_snapshots(request).await.unwrap().into_inner();
    let ids = answer.entries.into_iter().map(|entry| entry.snapshot.unwrap().snapshot_id);
    (ids.collect(), answer.next_token)
}

#[tokio::test]
async fn snapshots_are_listed_by_id_by_volume_and_in_pages() {
    let Some(mounted) = Mounted::new() else { return };
    let mut bench = Bench::at(tempfile::tempdir_in(mounted.path()).unwrap());
    let (a, b) =
        (bench.create(wanted("a", MIB)).await.volume_id, bench.create(wanted("b", MIB)).await.volume_id);
    let mut controller = bench.controller().await;
    let mut taken = Vec::new();
    for (name, of) in [("1", &a), ("2", &a), ("3", &b)] {
        let request = csi::CreateSnapshotRequest {
            source_volume_id: of.clone(),
            name: name.to_owned(),
            ..Default::default()
        };
        taken.push(
            controller.create_snapshot(request).await.unwrap().into_inner().snapshot.unwrap().snapshot_id,
        );
    }
    assert_eq!(listed(&bench, &taken[2], "", 0, "").await.0, [taken[2].clone()]);
    assert_eq!(listed(&bench, &taken[2], &a, 0, "").await.0, Vec::<String>::new());
    let mut of_a = listed(&bench, "", &a, 0, "").await.0;
    of_a.sort();
    taken[..2].sort();
    assert_eq!(of_a, taken[..2]);
    for nothing in [NO_SUCH_UID, "nonsense"] {
        assert!(
            listed(&bench, nothing, "", 0, "").await.0.is_empty()
                && listed(&bench, "", nothing, 0, "").await.0.is_empty()
        );
    }
    let (first, token) = listed(&bench, "", "", 2, "").await;
    let (rest, end) = listed(&bench, "", "", 0, &token).await;
    assert_eq!((first.len(), rest.len(), end.as_str()), (2, 1, ""));
}

#[tokio::test]
async fn a_group_of_snapshots_is_of_one_instant_and_goes_as_one() {
    let Some(mounted) = Mounted::new() else { return };
    let mut bench = Bench::at(tempfile::tempdir_in(mounted.path()).unwrap());
    let a = bench.create(wanted("a", MIB)).await.volume_id;
    let b = bench.create(wanted("b", MIB)).await.volume_id;
    let single = csi::CreateSnapshotRequest {
        source_volume_id: a.clone(),
        name: "group".to_owned(),
        ..Default::default()
    };
    let single =
        bench.controller().await.create_snapshot(single).await.unwrap().into_inner().snapshot.unwrap();
    assert_eq!(single.group_snapshot_id, "");
    let mut groups = GroupControllerClient::new(bench.channel().await);
    let request = csi::CreateVolumeGroupSnapshotRequest {
        name: "group".to_owned(),
        source_volume_ids: vec![a.clone(), b.clone()],
        ..Default::default()
    };
    let group =
        groups.create_volume_group_snapshot(request.clone()).await.unwrap().into_inner().group_snapshot;
    let group = group.unwrap();
    bench.kill_plugin();
    let mut groups = GroupControllerClient::new(bench.channel().await);
    let mut again = groups
        .create_volume_group_snapshot(request.clone())
        .await
        .unwrap()
        .into_inner()
        .group_snapshot
        .unwrap();
    let sorted = |mut group: csi::VolumeGroupSnapshot| {
        group.snapshots.sort_by(|x, y| x.snapshot_id.cmp(&y.snapshot_id));
        group
    };
    again = sorted(again);
    let group = sorted(group);
    assert_eq!(again, group);
    assert!(
        group.ready_to_use
            && group.snapshots.iter().all(|one| one.group_snapshot_id == group.group_snapshot_id)
    );
    let less = csi::CreateVolumeGroupSnapshotRequest { source_volume_ids: vec![a.clone()], ..request };
    assert_eq!(groups.create_volume_group_snapshot(less).await.unwrap_err().code(), Code::AlreadyExists);
    let get = csi::GetVolumeGroupSnapshotRequest {
        group_snapshot_id: group.group_snapshot_id.clone(),
        ..Default::default()
    };
    let found = groups.get_volume_group_snapshot(get.clone()).await.unwrap().into_inner().group_snapshot;
    assert_eq!(found.map(sorted), Some(group.clone()));
    let delete = csi::DeleteVolumeGroupSnapshotRequest {
        group_snapshot_id: group.group_snapshot_id.clone(),
        snapshot_ids: vec![single.snapshot_id],
        ..Default::default()
    };
    let refused = groups.delete_volume_group_snapshot(delete.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "a snapshot of another group");
    let snapshot_ids = group.snapshots.iter().map(|one| one.snapshot_id.clone()).collect();
    let delete = csi::DeleteVolumeGroupSnapshotRequest { snapshot_ids, ..delete };
    for _ in 0..2 {
        groups.delete_volume_group_snapshot(delete.clone()).await.unwrap();
    }
    let nonsense =
        csi::DeleteVolumeGroupSnapshotRequest { group_snapshot_id: "x".to_owned(), ..Default::default() };
    groups.delete_volume_group_snapshot(nonsense).await.unwrap();
    assert_eq!(groups.get_volume_group_snapshot(get).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(listed(&bench, "", "", 0, "").await.0.len(), 1, "the other stays");
}

#[tokio::test]
async fn what_a_node_told_of_its_disks_is_the_volumes_health() {
    let mut bench = Bench::new();
    let mut api = bench.api().await;
    register(&mut api, "node-1").await;
    let ids =
        [bench.create(wanted("well", MIB)).await.volume_id, bench.create(wanted("ill", MIB)).await.volume_id];
    bench.controller().await.controller_publish_volume(publication(&ids[1], "node-1")).await.unwrap();
    let attached = api.attach_volume(attachment(&ids[1], "node-1")).await.unwrap().into_inner();
    let attachment_id = attached.attachment.unwrap().attachment_id;
    for (state, state_reason, expected) in [
        ("live", "", None),
        ("stalled", "I/O waits: no route", Some((Health::Degraded, "ServerUnreachable"))),
        (
            "failed",
            "the storage server came back without writes that it had acknowledged: check it",
            Some((Health::DataLoss, "UnflushedWritesLost")),
        ),
        ("dead", "the device process died", Some((Health::Inaccessible, "DeviceProcessDead"))),
    ] {
        let disk = v1::NodeDisk {
            attachment_id: attachment_id.clone(),
            state: state.to_owned(),
            state_reason: state_reason.to_owned(),
            state_since_ms: 1,
        };
        let told =
            v1::HeartbeatRequest { node_id: "node-1".to_owned(), disks: vec![disk], ..Default::default() };
        api.heartbeat(told).await.unwrap();
        let request =
            csi::ControllerGetVolumeHealthRequest { volume_id: ids[1].clone(), ..Default::default() };
        let health =
            bench.controller().await.controller_get_volume_health(request).await.unwrap().into_inner();
        let health = health.volume_health.unwrap();
        let found: Vec<_> =
            health.health_statuses.iter().map(|one| (one.status(), one.reason.as_str())).collect();
        assert_eq!(found, Vec::from_iter(expected), "{state}");
        let mut controller = bench.controller().await;
        let all = controller
            .controller_list_volume_health(csi::ControllerListVolumeHealthRequest::default())
            .await
            .unwrap()
            .into_inner()
            .entries;
        assert_eq!(all.len(), 2);
        assert!(
            all.contains(&health)
                && all.iter().any(|one| one.volume_id == ids[0] && one.health_statuses.is_empty())
        );
    }
    let request =
        csi::ControllerGetVolumeHealthRequest { volume_id: NO_SUCH_UID.to_owned(), ..Default::default() };
    let refused = bench.controller().await.controller_get_volume_health(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
}

#[tokio::test]
async fn hostile_requests_are_refused_and_harm_nobody() {
    let bench = Bench::new();
    let (long, escape) = ("x".repeat(10 << 10), "\u{1b}[2J");
    let with = |change: &dyn Fn(&mut csi::CreateVolumeRequest)| {
        let mut request = wanted("vol", MIB);
        change(&mut request);
        request
    };
    let range = |required_bytes, limit_bytes| Some(csi::CapacityRange { required_bytes, limit_bytes });
    let key = |key: &str| map(&[(key, "1")]);
    let of_fs_type = |fs_type: &str| csi::VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: fs_type.to_owned(),
            ..Default::default()
        })),
        ..writer()
    };
    for (request, code) in [
        (with(&|asked| asked.name.clear()), Code::InvalidArgument),
        (with(&|asked| asked.name.clone_from(&long)), Code::InvalidArgument),
        (with(&|asked| asked.name = escape.to_owned()), Code::InvalidArgument),
        (with(&|asked| asked.volume_capabilities.clear()), Code::InvalidArgument),
        (with(&|asked| asked.parameters = key(&long)), Code::InvalidArgument),
        (with(&|asked| asked.parameters = key(escape)), Code::InvalidArgument),
        (with(&|asked| asked.parameters = map(&[("passphrase", SECRET)])), Code::InvalidArgument),
        (with(&|asked| asked.parameters = map(&[(FS_TYPE, "ext4 xfs")])), Code::InvalidArgument),
        (with(&|asked| asked.parameters = map(&[(FS_TYPE, escape)])), Code::InvalidArgument),
        (with(&|asked| asked.volume_capabilities = vec![of_fs_type(" ext4")]), Code::InvalidArgument),
        (with(&|asked| asked.volume_capabilities = vec![of_fs_type(&long)]), Code::InvalidArgument),
        (with(&|asked| asked.parameters = map(&[("encrypted", escape)])), Code::InvalidArgument),
        (with(&|asked| asked.parameters = map(&[("tenant", escape)])), Code::InvalidArgument),
        (with(&|asked| asked.mutable_parameters = key("readBandwidth")), Code::InvalidArgument),
        (with(&|asked| asked.capacity_range = range(i64::MAX, 0)), Code::OutOfRange),
        (with(&|asked| asked.capacity_range = range(i64::MAX - 4095, 0)), Code::OutOfRange),
        (with(&|asked| asked.capacity_range = range(-1, 0)), Code::InvalidArgument),
        (with(&|asked| asked.capacity_range = range(4097, 4098)), Code::OutOfRange),
        (copy_of("copy", of_volume(&long)), Code::NotFound),
    ] {
        let (found, why) = bench.create_refused(request).await;
        assert_eq!(found, code, "{why}");
        let is_plain = why.len() < 1000 && !why.chars().any(char::is_control) && !why.contains(SECRET);
        assert!(is_plain, "{why}");
    }
    let mut controller = bench.controller().await;
    for id in [&long, escape, "../../etc", "uid:x", &NO_SUCH_UID.to_uppercase()] {
        let volume_id = id.to_owned();
        let delete = csi::DeleteVolumeRequest { volume_id: volume_id.clone(), ..Default::default() };
        controller.delete_volume(delete).await.unwrap();
        let delete = csi::DeleteSnapshotRequest { snapshot_id: id.to_owned(), ..Default::default() };
        controller.delete_snapshot(delete).await.unwrap();
        let get = csi::ControllerGetVolumeRequest { volume_id };
        let refused = controller.controller_get_volume(get).await.unwrap_err();
        assert!(refused.code() == Code::NotFound && refused.message().len() < 1000, "{refused}");
    }
    assert!(
        controller
            .list_volumes(csi::ListVolumesRequest::default())
            .await
            .unwrap()
            .into_inner()
            .entries
            .is_empty()
    );
    let log = fs::read_to_string(bench.directory.path().join("log")).unwrap();
    assert!(!log.contains(SECRET) && !log.contains(escape));
}

#[tokio::test]
async fn a_server_that_does_not_answer_costs_the_callers_time_and_no_more() {
    let mut bench = Bench::new();
    let mut controller = bench.controller().await;
    controller.create_volume(wanted("vol", MIB)).await.unwrap();
    let pid = Pid::from_raw(bench.server.as_ref().unwrap().pid().cast_signed()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let began = Instant::now();
    let mut request = Request::new(wanted("vol", MIB));
    request.set_timeout(Duration::from_secs(5));
    let late = controller.create_volume(request).await.unwrap_err();
    kill_process(pid, Signal::CONT).unwrap();
    assert!(late.code() == Code::DeadlineExceeded && late.message().contains("has not answered"), "{late}");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    controller.create_volume(wanted("vol", MIB)).await.unwrap();
    bench.server = None;
    let gone = controller.create_volume(wanted("vol", MIB)).await.unwrap_err();
    assert!(gone.code() == Code::Unavailable && gone.message().contains("cannot reach"), "{gone}");
    let mut identity = IdentityClient::new(bench.channel().await);
    assert_eq!(identity.probe(csi::ProbeRequest {}).await.unwrap().into_inner().ready, Some(false));
}
