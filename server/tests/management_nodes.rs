//! Nodes through the management API of the real volserver: who is known, across restarts, and who was heard of.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

mod unit_filter;
mod volserver;

use std::collections::HashMap;

use proto::error_reason as reason;
use proto::v1::{self, management_client::ManagementClient};
use rustix::process::Signal;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use volserver::{Volserver, attach_request, create_request};

type Client = ManagementClient<Channel>;

fn registration(node_id: &str, boot_id: &str, zone: &str) -> v1::RegisterNodeRequest {
    v1::RegisterNodeRequest {
        node_id: node_id.to_owned(),
        boot_id: boot_id.to_owned(),
        version: "0.1.0".to_owned(),
        labels: HashMap::from([("topology.volnode.io/zone".to_owned(), zone.to_owned())]),
        max_volumes: 0,
    }
}

async fn register(client: &mut Client, node_id: &str, boot_id: &str, zone: &str) -> v1::RegisteredNode {
    client.register_node(registration(node_id, boot_id, zone)).await.unwrap().into_inner()
}

async fn get(client: &mut Client, node_id: &str) -> Result<v1::RegisteredNode, Status> {
    let request = v1::GetNodeRequest { node_id: node_id.to_owned() };
    client.get_node(request).await.map(tonic::Response::into_inner)
}

async fn delete(client: &mut Client, node_id: &str) -> Result<bool, Status> {
    let request = v1::DeleteNodeRequest { node_id: node_id.to_owned(), ..Default::default() };
    client.delete_node(request).await.map(|answer| answer.into_inner().existed)
}

fn heartbeat(node_id: &str, boot_id: &str, attachment_id: &str) -> v1::HeartbeatRequest {
    let disk = v1::NodeDisk {
        attachment_id: attachment_id.to_owned(),
        state: "stalled".to_owned(),
        state_reason: "the server cannot be reached".to_owned(),
        state_since_ms: 7,
    };
    let condition = v1::NodeCondition {
        id: "ublk_driver".to_owned(),
        severity: "error".to_owned(),
        text: "no ublk driver".to_owned(),
    };
    v1::HeartbeatRequest {
        node_id: node_id.to_owned(),
        boot_id: boot_id.to_owned(),
        disks: vec![disk],
        conditions: vec![condition],
        ..Default::default()
    }
}

fn reason_of(status: &Status) -> (Code, String) {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert!(info.metadata.contains_key(reason::METADATA_NEXT), "{info:?}");
    (status.code(), info.reason)
}

#[tokio::test]
async fn nodes_are_known_until_they_are_deleted_and_heard_of_until_the_server_ends() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    let unknown = (Code::NotFound, reason::NODE_NOT_FOUND.to_owned());
    let id = "4c1ba8b2-3c5b-4f5d-9a3b-0d2d0a1f9f11";
    assert_eq!(reason_of(&get(&mut client, "node-a").await.unwrap_err()), unknown);
    let early = client.heartbeat(heartbeat("node-a", "boot-1", id)).await.unwrap_err();
    assert_eq!(reason_of(&early), unknown, "it has to register first");

    let made = register(&mut client, "node-a", "boot-1", "z1").await;
    assert!(made.registered_at_ms > 0 && made.last_seen_at_ms >= made.registered_at_ms, "{made:?}");
    let answer = client.heartbeat(heartbeat("node-a", "boot-1", id)).await.unwrap().into_inner();
    let info = client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(answer.server_id, info.server_id);
    let heard = get(&mut client, "node-a").await.unwrap();
    assert_eq!((heard.disk_count, heard.conditions), (Some(1), heartbeat("", "", id).conditions));
    assert!(heard.last_seen_age_ms.is_some_and(|age_ms| age_ms < 3_600_000), "{:?}", heard.last_seen_age_ms);
    assert_eq!((heard.disks[0].attachment_id.as_str(), heard.disks[0].state.as_str()), (id, "stalled"));
    // Another boot is another one to be heard of, and the same node.
    let other_boot = client.heartbeat(heartbeat("node-a", "boot-2", id)).await.unwrap_err();
    assert_eq!(reason_of(&other_boot), unknown);
    let again = register(&mut client, "node-a", "boot-2", "z2").await;
    assert!(again.disks.is_empty() && again.conditions.is_empty(), "they were the former boot's");
    let late = client.heartbeat(heartbeat("node-a", "boot-1", id)).await.unwrap_err();
    assert_eq!(reason_of(&late), unknown);
    assert_eq!((again.registered_at_ms, again.boot_id.as_str()), (made.registered_at_ms, "boot-2"));
    assert_eq!(again.labels["topology.volnode.io/zone"], "z2");
    server.kill();

    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    let kept = get(&mut client, "node-a").await.unwrap();
    assert_eq!((kept.labels, kept.boot_id.as_str(), kept.last_seen_at_ms), (again.labels, "boot-2", 0));
    assert!(kept.disks.is_empty() && kept.last_seen_age_ms.is_none(), "that was long ago");

    for node_id in ["node-c", "node-b", "10.0.0.1/x"] {
        register(&mut client, node_id, "", "z1").await;
    }
    let mut names = Vec::new();
    let mut request = v1::ListNodesRequest { page_size: 3, ..Default::default() };
    loop {
        let page = client.list_nodes(request.clone()).await.unwrap().into_inner();
        names.extend(page.nodes.into_iter().map(|node| node.node_id));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(names, ["10.0.0.1/x", "node-a", "node-b", "node-c"]);
    let volumes =
        client.list_volumes(v1::ListVolumesRequest { page_token: request.page_token, ..Default::default() });
    assert_eq!(volumes.await.unwrap_err().code(), Code::InvalidArgument, "a token of another list");
    server.stop(Signal::TERM);
}

#[tokio::test]
async fn a_controller_attaches_to_nodes_that_are_known_and_they_stay_as_long_as_they_have_something() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    client.create_volume(create_request("vol-1")).await.unwrap();
    let request =
        v1::AttachVolumeRequest { node_must_be_registered: true, ..attach_request("vol-1", "node-a", false) };
    let refused = client.attach_volume(request.clone()).await.unwrap_err();
    assert_eq!(reason_of(&refused), (Code::NotFound, reason::NODE_NOT_FOUND.to_owned()));
    register(&mut client, "node-a", "", "z1").await;
    client.attach_volume(request).await.unwrap();
    let refused = delete(&mut client, "node-a").await.unwrap_err();
    assert_eq!(reason_of(&refused), (Code::FailedPrecondition, reason::NODE_ATTACHED.to_owned()));
    let detach = v1::DetachVolumeRequest { volume_name: "vol-1".to_owned(), ..Default::default() };
    client.detach_volume(detach).await.unwrap();
    assert!(delete(&mut client, "node-a").await.unwrap());
    assert!(!delete(&mut client, "node-a").await.unwrap());
    // As before for whoever does not ask.
    client.attach_volume(attach_request("vol-1", "node-a", false)).await.unwrap();
}

#[tokio::test]
async fn what_a_node_says_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    let good = registration("node-a", "boot-1", "z1");
    for off in [
        v1::RegisterNodeRequest { node_id: String::new(), ..good.clone() },
        v1::RegisterNodeRequest { node_id: "a b".to_owned(), ..good.clone() },
        v1::RegisterNodeRequest { boot_id: "x".repeat(65), ..good.clone() },
        v1::RegisterNodeRequest { version: "\u{1b}[31m".to_owned(), ..good.clone() },
        v1::RegisterNodeRequest { version: "x".repeat(65), ..good.clone() },
        v1::RegisterNodeRequest {
            labels: HashMap::from([("a b".to_owned(), "c".to_owned())]),
            ..good.clone()
        },
    ] {
        assert_eq!(
            client.register_node(off.clone()).await.unwrap_err().code(),
            Code::InvalidArgument,
            "{off:?}"
        );
    }
    client.register_node(good).await.unwrap();
    let good = heartbeat("node-a", "boot-1", "4c1ba8b2-3c5b-4f5d-9a3b-0d2d0a1f9f11");
    let disk = good.disks[0].clone();
    for off in [
        vec![v1::NodeDisk { attachment_id: "7".to_owned(), ..disk.clone() }],
        vec![v1::NodeDisk { state: "a\nb".to_owned(), ..disk.clone() }],
        vec![v1::NodeDisk { state_reason: "x".repeat(513), ..disk.clone() }],
        vec![disk.clone(); 257],
    ] {
        let request = v1::HeartbeatRequest { disks: off, ..good.clone() };
        assert_eq!(client.heartbeat(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let condition = good.conditions[0].clone();
    for off in [
        vec![v1::NodeCondition { text: "a\nb".to_owned(), ..condition.clone() }],
        vec![v1::NodeCondition { text: "x".repeat(513), ..condition.clone() }],
        vec![v1::NodeCondition { id: "x".repeat(65), ..condition.clone() }],
        vec![v1::NodeCondition { severity: "x".repeat(65), ..condition.clone() }],
        vec![condition.clone(); 17],
    ] {
        let request = v1::HeartbeatRequest { conditions: off, ..good.clone() };
        assert_eq!(client.heartbeat(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let largest = v1::NodeDisk { state: "y".repeat(64), state_reason: "x".repeat(512), ..disk };
    let conditions = vec![v1::NodeCondition { text: "x".repeat(512), ..condition }; 16];
    client.heartbeat(v1::HeartbeatRequest { disks: vec![largest; 256], conditions, ..good }).await.unwrap();
    let seen = get(&mut client, "node-a").await.unwrap();
    assert_eq!((seen.disks.len(), seen.conditions.len()), (256, 16));
    let listed = client.list_nodes(v1::ListNodesRequest::default()).await.unwrap().into_inner().nodes;
    assert!(listed[0].disks.is_empty() && listed[0].conditions.is_empty() && listed[0].last_seen_at_ms > 0);
    assert_eq!(listed[0].disk_count, Some(256));
}

#[tokio::test]
async fn heartbeats_that_are_heard_have_no_line_in_the_audit_log() {
    let dir = tempfile::tempdir().unwrap();
    let (path, data_dir) = (dir.path().join("audit.jsonl"), dir.path().join("data"));
    let mut command = volserver::command(&data_dir);
    command.arg("--audit-log").arg(&path);
    let server = Volserver::start_with(command, &data_dir.with_extension("log"));
    let mut client = server.client().await;
    register(&mut client, "node-a", "boot-1", "z1").await;
    let id = "4c1ba8b2-3c5b-4f5d-9a3b-0d2d0a1f9f11";
    for _ in 0..3 {
        client.heartbeat(heartbeat("node-a", "boot-1", id)).await.unwrap();
    }
    client.heartbeat(heartbeat("node-a", "boot-2", id)).await.unwrap_err();
    assert!(delete(&mut client, "node-a").await.unwrap());
    // What was told before is in the file then.
    server.stop(Signal::TERM);
    let told: Vec<String> = std::fs::read_to_string(&path)
        .unwrap()
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            format!("{} {} {}", line["call"], line["node_id"], line["code"]).replace('"', "")
        })
        .collect();
    assert_eq!(told, ["RegisterNode node-a OK", "Heartbeat node-a NOT_FOUND", "DeleteNode node-a OK"]);
}
