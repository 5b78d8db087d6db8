//! `volctl grant`, and attaches under a grant, against the fake storage server.

use std::path::Path;

use client::contract::{ControlResponse, DeviceSpec, read_file, write_file};

use crate::device_stand_in::{DeviceStandIn, Folder};
use crate::fake_server::FakeServer;
use crate::launch::{Ended, NODE_ID, NobodysPort, NodeDaemon, volctl};

const NO_SOCKET: &str = "/nonexistent/volclient.sock";

fn run(server: &FakeServer, args: &[&str]) -> Ended {
    volctl(&server.uri(), Path::new(NO_SOCKET), args)
}

#[test]
fn a_grant_is_made_shown_listed_and_taken_away() {
    let server = FakeServer::start();
    run(&server, &["create", "vol-1", "--size", "1G"]).expect_success();
    let made = run(&server, &["grant", "create", "vol-1", "node-a"]).expect_success().stdout;
    assert_eq!(made, "vol-1 is granted to node-a (read-write)\n");
    let again =
        run(&server, &["grant", "create", "vol-1", "node-a", "--output", "json"]).expect_success().json();
    assert_eq!(
        (&again["volume_name"], &again["node_id"], &again["read_only"]),
        (&"vol-1".into(), &"node-a".into(), &false.into())
    );
    let asked = server.state.lock().unwrap().grants.asked.clone();
    assert!(asked.iter().all(|request| request.node_must_be_registered), "a name may be mistyped");
    run(&server, &["grant", "create", "vol-1", "node-a", "--read-only"]).expect_failure(
        4,
        "vol-1 is granted otherwise",
        "take the grant away",
    );
    run(&server, &["grant", "create", "vol-1", "node-b"]).expect_failure(
        5,
        "granted to node node-a",
        "take it",
    );
    run(&server, &["grant", "create", "vol-2", "node-a"]).expect_failure(
        3,
        "no volume vol-2",
        "list the volumes",
    );
    let shown = run(&server, &["show", "vol-1"]).expect_success().stdout;
    assert!(
        shown.lines().any(|line| line.split_whitespace().eq(["granted", "to:", "node-a", "(read-write)"])),
        "{shown}"
    );
    let shown = run(&server, &["show", "vol-1", "--output", "json"]).expect_success().json();
    assert_eq!(shown["grants"][0]["node_id"], "node-a");
    server.state.lock().unwrap().add_attachment("vol-1", "node-a", 0);
    let deleted = run(&server, &["grant", "delete", "vol-1", "node-a"]).expect_success().stdout;
    assert_eq!(deleted, "vol-1 is no longer granted to, and was taken from, node-a\n");
    let again =
        run(&server, &["grant", "delete", "vol-1", "node-a", "--output", "json"]).expect_success().json();
    assert_eq!((&again["existed"], &again["was_attached"]), (&false.into(), &false.into()));
    let none = run(&server, &["grant", "list", "--output", "json"]).expect_success();
    assert_eq!(none.stdout, "[]\n");
}

#[test]
fn grants_are_listed_through_every_page() {
    let server = FakeServer::start();
    for volume in ["vol-1", "vol-2"] {
        run(&server, &["create", volume, "--size", "1G"]).expect_success();
        for node in ["node-a", "node-b"] {
            run(&server, &["grant", "create", volume, node, "--read-only", "--unregistered"])
                .expect_success();
        }
    }
    assert!(!server.state.lock().unwrap().grants.asked[0].node_must_be_registered);
    let listed = run(&server, &["grant", "list"]).expect_success().stdout;
    let lines = "VOLUME  NODE    ACCESS     SINCE\n\
                 vol-1   node-a  read-only  2026-03-01T11:59:59Z\n\
                 vol-1   node-b  read-only  2026-03-01T11:59:59Z\n\
                 vol-2   node-a  read-only  2026-03-01T11:59:59Z\n\
                 vol-2   node-b  read-only  2026-03-01T11:59:59Z\n";
    assert_eq!(listed, lines);
    let one = run(&server, &["grant", "list", "vol-2", "--node", "node-b", "--output", "json"]);
    let one = one.expect_success().json();
    assert_eq!((one.as_array().unwrap().len(), &one[0]["volume_name"]), (1, &"vol-2".into()));
    server.state.lock().unwrap().grants.are_unknown = true;
    run(&server, &["grant", "list"]).expect_failure(1, "not implemented", "volctl version");
    let nobody = NobodysPort::take();
    let ended = volctl(&nobody.uri(), Path::new(NO_SOCKET), &["grant", "list"]);
    ended.expect_failure(6, "cannot reach the storage server", "check that volserver runs");
    for args in [&["grant"][..], &["grant", "create", "vol-1"], &["grant", "delete", "vol-1"]] {
        assert_eq!(run(&server, args).exit_code, Some(2), "{args:?}");
    }
}

/// A disk that is there, as if it had been attached by hand or under a grant.
#[test]
fn a_disk_that_is_there_is_given_to_who_asks_for_a_grant_only_with_one() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let (attachment_id, server_id) = {
        let mut state = server.state.lock().unwrap();
        (state.add_attachment("vol-1", NODE_ID, 0), state.server_id)
    };
    run(&server, &["create", "vol-1", "--size", "2G"]).expect_success();
    let folder = Folder::of_volume(run_dir.path(), "vol-1", attachment_id, server_id);
    let process = DeviceStandIn::start(&folder, vec![ControlResponse::Ok(Box::new(folder.status.clone()))]);
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    let attach = || daemon.volctl(&["attach", "vol-1", "--only-if-granted"]);
    attach().expect_failure(5, "vol-1 is not granted to this node", "volctl grant create");
    daemon.volctl(&["attach", "vol-1"]).expect_success();
    run(&server, &["grant", "create", "vol-1", NODE_ID, "--read-only", "--unregistered"]).expect_success();
    attach().expect_failure(5, "vol-1 is granted to this node read-only", "attach it read-only");
    // What was taken away meanwhile is noticed, though the disk does not know yet.
    run(&server, &["grant", "delete", "vol-1", NODE_ID]).expect_success();
    run(&server, &["grant", "create", "vol-1", NODE_ID, "--unregistered"]).expect_success();
    attach().expect_failure(
        5,
        "the storage server has ended its attachment",
        "detach it, then attach it again",
    );
    {
        let mut state = server.state.lock().unwrap();
        assert!(state.attachments.is_empty(), "nothing was attached for it");
        let held = proto::v1::Attachment {
            attachment_id: attachment_id.to_string(),
            volume_name: "vol-1".to_owned(),
            node_id: NODE_ID.to_owned(),
            ..Default::default()
        };
        state.attachments.insert(attachment_id.to_string(), held);
    }
    let is_under_grant = || read_file::<DeviceSpec>(&folder.dir.spec()).unwrap().only_if_granted;
    assert!(!is_under_grant());
    assert_eq!(attach().expect_success().stdout, "/dev/ublkb4000000\n");
    assert!(is_under_grant(), "as whoever asked last");
    daemon.volctl(&["detach", "vol-1"]).expect_success();
    process.join();
}

/// The record says how it was attached; whoever attaches it anew is asked for a grant as well.
#[test]
fn what_was_attached_under_a_grant_is_not_attached_anew_without_one() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let (attachment_id, server_id) = {
        let mut state = server.state.lock().unwrap();
        (state.add_attachment("vol-1", NODE_ID, 0), state.server_id)
    };
    let folder = Folder::of_volume(run_dir.path(), "vol-1", attachment_id, server_id);
    let spec: DeviceSpec = read_file(&folder.dir.spec()).unwrap();
    write_file(&folder.dir.spec(), &DeviceSpec { only_if_granted: true, ..spec }).unwrap();
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    let listed = daemon.volctl(&["attachments", "--output", "json"]).expect_success().json();
    assert_eq!(listed[0]["only_if_granted"], true);
    daemon.volctl(&["attach", "vol-1"]).expect_failure(
        5,
        "vol-1 is not granted to this node",
        "grant create",
    );
    server.state.lock().unwrap().grants.are_unknown = true;
    daemon.volctl(&["attach", "vol-1"]).expect_failure(5, "knows no grants", "upgrade volserver");
    daemon.volctl(&["detach", "vol-1"]).expect_success();
    for target in ["vol-1@s", "nbd://h/x"] {
        let ended = daemon.volctl(&["attach", target, "--only-if-granted"]);
        assert_eq!(ended.exit_code, Some(2), "{ended:?}");
        assert!(ended.stderr.contains("only volumes of the storage server are granted"), "{ended:?}");
    }
}
