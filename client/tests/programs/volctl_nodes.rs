//! `volctl node`, against the fake storage server.

use std::path::Path;

use proto::v1;

use crate::fake_nodes::Takes;
use crate::fake_server::FakeServer;
use crate::launch::{Ended, NobodysPort, volctl};

const NO_SOCKET: &str = "/nonexistent/volclient.sock";

fn run(server: &FakeServer, args: &[&str]) -> Ended {
    volctl(&server.uri(), Path::new(NO_SOCKET), args)
}

/// Three nodes: one that was heard of just now, with a disk that stands still; one long ago, of which the server says no more; and one
/// before the server started.
fn with_nodes() -> FakeServer {
    let server = FakeServer::start();
    let mut state = server.state.lock().unwrap();
    let disk = v1::NodeDisk {
        attachment_id: "4c1ba8b2-3c5b-4f5d-9a3b-0d2d0a1f9f11".to_owned(),
        state: "stalled".to_owned(),
        state_reason: "no answer".to_owned(),
        state_since_ms: 1_772_366_399_000,
    };
    let condition = v1::NodeCondition {
        id: "root".to_owned(),
        severity: "error".to_owned(),
        text: "start it as root".to_owned(),
    };
    let node = |node_id: &str, last_seen_at_ms, last_seen_age_ms: Option<u64>| v1::RegisteredNode {
        node_id: node_id.to_owned(),
        registered_at_ms: 1_772_366_399_000,
        last_seen_at_ms,
        last_seen_age_ms,
        ..Default::default()
    };
    let labels = [("topology.volnode.io/zone", "z1"), ("rack", "7")];
    let a = v1::RegisteredNode {
        boot_id: "boot-1".to_owned(),
        version: "0.1.0".to_owned(),
        labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        disks: vec![disk],
        disk_count: Some(1),
        max_volumes: 64,
        conditions: vec![condition],
        ..node("node-a", 1, Some(3_000))
    };
    let two_hours_ago = client::contract::now_ms() - 2 * 3_600_000;
    let c = v1::RegisteredNode { disk_count: Some(0), ..node("node-c", 0, None) };
    for node in [a, node("node-b", two_hours_ago, None), c] {
        state.nodes.registered.insert(node.node_id.clone(), node);
    }
    drop(state);
    server
}

#[test]
fn nodes_are_listed_through_every_page_and_silent_ones_marked() {
    let server = with_nodes();
    let listed = run(&server, &["node", "list"]).expect_success().stdout;
    let lines = "NAME    BOOT    VERSION  LAST-SEEN                              DISKS  MAX-VOLUMES  LABELS\n\
                 node-a  boot-1  0.1.0    3s ago                                 1      64           rack=7 topology.volnode.io/zone=z1\n\
                 node-b  -       -        2h ago (silent)                        -      -            -\n\
                 node-c  -       -        not since the server started (silent)  0      -            -\n";
    assert_eq!(listed, lines);
    let json = run(&server, &["node", "list", "--output", "json"]).expect_success().json();
    let silent: Vec<bool> =
        json.as_array().unwrap().iter().map(|node| node["is_silent"].as_bool().unwrap()).collect();
    assert_eq!(silent, [false, true, true]);
    assert_eq!((&json[0]["disk_count"], &json[0]["labels"]["rack"]), (&1.into(), &"7".into()));
    assert_eq!((&json[1]["disk_count"], &json[2]["disk_count"]), (&serde_json::Value::Null, &0.into()));
    assert_eq!((&json[0]["max_volumes"], &json[1]["max_volumes"]), (&64.into(), &serde_json::Value::Null));
    assert!(json[0].get("disks").is_none(), "{json}");
    let none = run(&FakeServer::start(), &["node", "list", "--output", "json"]).expect_success();
    assert_eq!(none.stdout, "[]\n");
}

#[test]
fn a_node_is_shown_with_its_disks_and_what_is_wrong() {
    let server = with_nodes();
    let shown = run(&server, &["node", "show", "node-a"]).expect_success().stdout;
    for part in [
        "name:         node-a\n",
        "last seen:    3s ago\n",
        "max volumes:  64\n",
        "registered:   2026-03-01T11:59:59Z\n",
        "4c1ba8b2-3c5b-4f5d-9a3b-0d2d0a1f9f11  stalled  2026-03-01T11:59:59Z  no answer\n",
        "error     root   start it as root\n",
    ] {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }
    let json = run(&server, &["node", "show", "node-a", "--output", "json"]).expect_success().json();
    assert_eq!(
        (&json["disks"][0]["state"], &json["conditions"][0]["id"]),
        (&"stalled".into(), &"root".into())
    );
    run(&server, &["node", "show", "node-x"]).expect_failure(3, "no node", "list the nodes");
}

#[test]
fn a_node_is_deleted_unless_something_is_attached_to_it() {
    let server = with_nodes();
    let attachment_id = server.state.lock().unwrap().add_attachment("vol-1", "node-a", 0);
    run(&server, &["node", "delete", "node-a"]).expect_failure(5, "attached to the node node-a", "detach");
    server.state.lock().unwrap().attachments.remove(&attachment_id.to_string());
    let deleted = run(&server, &["node", "delete", "node-a"]).expect_success();
    assert_eq!(deleted.stdout, "deleted node-a\n");
    let again = run(&server, &["node", "delete", "node-a", "--output", "json"]).expect_success().json();
    assert_eq!((&again["node_id"], &again["existed"]), (&"node-a".into(), &false.into()));
    assert_eq!(
        run(&server, &["node", "delete", "node-a"]).expect_success().stdout,
        "there is no node node-a\n"
    );
}

#[test]
fn a_server_that_is_away_or_knows_no_nodes_or_refuses_is_told_with_what_to_do() {
    let server = with_nodes();
    server.state.lock().unwrap().nodes.takes = Takes::None;
    run(&server, &["node", "list"]).expect_failure(1, "not implemented", "volctl version");
    server.state.lock().unwrap().nodes.takes = Takes::Refused;
    run(&server, &["node", "show", "node-a"]).expect_failure(1, "does not allow", "another certificate");
    let nobody = NobodysPort::take();
    let ended = volctl(&nobody.uri(), Path::new(NO_SOCKET), &["node", "list"]);
    ended.expect_failure(6, "cannot reach the storage server", "check that volserver runs");
    for args in [&["node"][..], &["node", "show"], &["node", "delete"], &["node", "list", "x"]] {
        assert_eq!(run(&server, args).exit_code, Some(2), "{args:?}");
    }
}
