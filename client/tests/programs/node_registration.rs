//! `volclient serve` as its storage server sees it: who registers, how its disks are, and what the log says where that does not go.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use client::contract::{AttachmentDir, DeviceState, DeviceStatus, boot_id, write_file};
use proto::v1;

use crate::device_stand_in::Folder;
use crate::fake_nodes::{Nodes, Takes};
use crate::fake_server::{FakeServer, State};
use crate::launch::{NODE_ID, NobodysPort, NodeDaemon, program};

const DEADLINE: Duration = Duration::from_secs(60);
/// Heartbeats that nothing hastens are at least so far apart.
const HEARTBEAT_INTERVAL_MIN: Duration = Duration::from_secs(9);

/// Waits until the server's nodes are as wanted, and gives what was found.
#[track_caller]
fn wait_for<T>(state: &Mutex<State>, what: &str, find: impl Fn(&Nodes) -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let state = state.lock().unwrap();
        if let Some(found) = find(&state.nodes) {
            return found;
        }
        assert!(Instant::now() < deadline, "not in time: {what}: {:?}", state.nodes);
        drop(state);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the daemon's log has the words, and counts them.
#[track_caller]
fn wait_for_log(daemon: &NodeDaemon, words: &str) -> usize {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let log = daemon.log();
        let count = log.matches(words).count();
        if count > 0 {
            return count;
        }
        assert!(Instant::now() < deadline, "{words:?} is not in the log: {log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn start(command: Command, run_dir: &Path, server: &FakeServer) -> NodeDaemon {
    let log = File::create(NodeDaemon::log_path(run_dir)).unwrap();
    NodeDaemon::start_command(command, log, run_dir, &server.uri())
}

#[test]
fn a_node_registers_with_its_labels_and_tells_of_its_disks_and_soon_of_their_changes() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let (attachment_id, server_id) = {
        let mut state = server.state.lock().unwrap();
        (state.add_attachment("vol-1", NODE_ID, 0), state.server_id)
    };
    let folder = Folder::of_volume(run_dir.path(), "vol-1", attachment_id, server_id);
    // Of another server, and so not told.
    Folder::of_uri(run_dir.path(), "nbd://127.0.0.1:10809/x");
    // Of a newer program.
    let newer = AttachmentDir::parent(run_dir.path()).join("newer");
    fs::create_dir_all(&newer).unwrap();
    fs::write(newer.join("spec.json"), r#"{"format_version": 99}"#).unwrap();
    let began = Instant::now();
    let _claim = client::node::device_process::claim(&folder.dir).unwrap();
    let mut command = NodeDaemon::command(run_dir.path(), &server.uri());
    command.args(["--label", "topology.volnode.io/zone=z1", "--label", "rack=7", "--max-volumes", "7"]);
    let daemon = start(command, run_dir.path(), &server);

    let node = wait_for(&server.state, "a registration", |nodes| nodes.registered.get(NODE_ID).cloned());
    assert_eq!((node.boot_id, node.version.as_str()), (boot_id().unwrap(), env!("CARGO_PKG_VERSION")));
    assert_eq!((node.labels.len(), node.max_volumes), (2, 7));
    assert_eq!((node.labels["topology.volnode.io/zone"].as_str(), node.labels["rack"].as_str()), ("z1", "7"));
    let first = wait_for(&server.state, "a heartbeat", |nodes| nodes.heartbeats.first().cloned());
    assert_eq!((first.node_id.as_str(), first.boot_id), (NODE_ID, boot_id().unwrap()));
    let disks: Vec<(&str, &str)> =
        first.disks.iter().map(|disk| (disk.attachment_id.as_str(), disk.state.as_str())).collect();
    assert_eq!(disks, [(attachment_id.to_string().as_str(), "live")]);

    // Were they told with the next heartbeat that is due, they would take as many intervals, the first of which is under way.
    let started = Instant::now();
    let changes = [DeviceState::Stalled, DeviceState::Live, DeviceState::Failed, DeviceState::Stalled];
    for (number, state) in changes.into_iter().enumerate() {
        let state_reason = format!("{number}\n{}", "ä".repeat(300));
        let status = DeviceStatus { state, state_reason, ..folder.status.clone() };
        write_file(&folder.dir.status(), &status).unwrap();
        wait_for(&server.state, "a change", |nodes| {
            let disk = nodes.heartbeats.last()?.disks.first()?;
            // One line, and no half character.
            let is_told = disk.state_reason == format!("{number} {}", "ä".repeat(255));
            is_told.then_some(())
        });
    }
    assert!(started.elapsed() < 3 * HEARTBEAT_INTERVAL_MIN, "it took {:?}", started.elapsed());
    // Who looks twice a second says nothing of what it cannot read; who looks every three seconds does.
    let unread = daemon.log().matches("cannot read an attachment").count();
    let looks = 2 + began.elapsed().as_secs() / 3;
    assert!(unread as u64 <= looks, "{unread} lines: {}", daemon.log());
}

#[test]
fn what_the_server_asks_for_in_an_answer_is_begun_and_its_end_is_told_at_once() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let _daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    let first = wait_for(&server.state, "a heartbeat", |nodes| nodes.heartbeats.first().cloned());
    assert!(uuid::Uuid::try_parse(&first.daemon_id).is_ok() && first.freezes.is_empty(), "{first:?}");
    assert!((9_000..=11_000).contains(&first.wait_ms), "{first:?}");
    let (freeze_id, attachment_id) = (uuid::Uuid::new_v4().to_string(), uuid::Uuid::new_v4().to_string());
    let (freeze, attachment_ids) = (freeze_id.clone(), vec![attachment_id.clone()]);
    server.state.lock().unwrap().nodes.wanted =
        vec![v1::WantedFreeze { freeze_id: freeze, attachment_ids, thaw: false }];
    let asked_after = wait_for(&server.state, "an answer", |nodes| {
        nodes.wanted.is_empty().then_some((nodes.heartbeats.len(), Instant::now()))
    });
    let told = wait_for(&server.state, "the end", |nodes| {
        let told = |heard: &v1::HeartbeatRequest| {
            let is_over = |one: &&v1::NodeFreeze| one.state() == v1::NodeFreezeState::NotFrozen;
            heard.freezes.iter().find(is_over).cloned()
        };
        nodes.heartbeats[asked_after.0 - 1..].iter().find_map(told)
    });
    assert!(asked_after.1.elapsed() < HEARTBEAT_INTERVAL_MIN, "not with the next that was due");
    assert_eq!(told.freeze_id, freeze_id);
    assert!(told.reason.contains(&format!("{attachment_id} is not attached to this machine")), "{told:?}");
    wait_for(&server.state, "a heartbeat without it", |nodes| {
        nodes.heartbeats.last()?.freezes.is_empty().then_some(())
    });
}

#[test]
fn a_server_that_comes_back_without_its_nodes_or_is_another_has_them_registered_again() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    wait_for(&server.state, "a heartbeat", |nodes| nodes.heartbeats.first().cloned());
    let (address, state) = (server.address, Arc::clone(&server.state));
    drop(server);
    let nobody = NobodysPort::take_at(address);
    wait_for_log(&daemon, "the storage server cannot be told of this node");
    // Asked several times meanwhile, and told once.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(wait_for_log(&daemon, "the storage server cannot be told of this node"), 1);
    state.lock().unwrap().nodes.registered.clear();
    let server = FakeServer::start_at(nobody.address, state);
    wait_for(&server.state, "a registration", |nodes| nodes.registered.get(NODE_ID).cloned());
    assert_eq!(server.state.lock().unwrap().nodes.registrations.len(), 2);
    wait_for_log(&daemon, "does not know this node");

    // As when the address is given to another server, that has been told of the node before.
    let other = {
        let mut state = server.state.lock().unwrap();
        state.server_id = uuid::Uuid::new_v4();
        state.nodes.heartbeats.clear();
        state.nodes.registrations.len()
    };
    wait_for(&server.state, "a registration", |nodes| (nodes.registrations.len() > other).then_some(()));
    wait_for_log(&daemon, "another storage server answers");
    let (status, _) = daemon.terminate();
    assert!(status.success());
}

#[test]
fn a_daemon_that_was_killed_registers_again_and_another_boot_as_such() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    wait_for(&server.state, "a heartbeat", |nodes| nodes.heartbeats.first().cloned());
    // SIGKILL.
    drop(daemon);
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    wait_for(&server.state, "a registration", |nodes| (nodes.registrations.len() == 2).then_some(()));
    let boots: Vec<String> =
        server.state.lock().unwrap().nodes.registrations.iter().map(|one| one.boot_id.clone()).collect();
    assert_eq!(boots, [boot_id().unwrap(), boot_id().unwrap()]);
    drop(daemon);

    let boot = "00000000-1111-2222-3333-444444444444";
    let file = run_dir.path().join("boot_id");
    fs::write(&file, format!("{boot}\n")).unwrap();
    // In a mount namespace of its own, which ends with it.
    let in_another_boot = |command: Command| {
        let script = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
        let mut another = program("unshare");
        another.args(["--mount", "--propagation", "private", "sh", "-c", script]).arg(&file);
        another.arg(command.get_program()).args(command.get_args());
        another
    };
    let mut tried = Command::new("cat");
    tried.arg("/proc/sys/kernel/random/boot_id");
    let told = in_another_boot(tried).output();
    if !told.is_ok_and(|told| String::from_utf8_lossy(&told.stdout).trim() == boot) {
        eprintln!("SKIP no mounts here: run it as root");
        return;
    }
    let command = in_another_boot(NodeDaemon::command(run_dir.path(), &server.uri()));
    let _daemon = start(command, run_dir.path(), &server);
    wait_for(&server.state, "the other boot", |nodes| {
        nodes.registered.get(NODE_ID).filter(|node| node.boot_id == boot).map(drop)
    });
    wait_for(&server.state, "its heartbeat", |nodes| {
        nodes.heartbeats.last().filter(|beat| beat.boot_id == boot).map(drop)
    });
}

#[test]
fn a_server_that_knows_no_nodes_is_asked_once_and_used_all_the_same() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    server.state.lock().unwrap().nodes.takes = Takes::None;
    server.state.lock().unwrap().add_attachment("idle", NODE_ID, 0);
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    wait_for_log(&daemon, "knows no nodes");
    daemon.volctl(&["detach", "idle"]).expect_success();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(server.state.lock().unwrap().nodes.registrations.len(), 1);
    let (status, log) = daemon.terminate();
    assert!(status.success());
    assert_eq!(log.matches("knows no nodes").count(), 1, "{log}");
}

#[test]
fn a_server_that_refuses_is_told_once_and_used_all_the_same() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    server.state.lock().unwrap().nodes.takes = Takes::Refused;
    server.state.lock().unwrap().add_attachment("idle", NODE_ID, 0);
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    wait_for_log(&daemon, "does not let this node register");
    daemon.volctl(&["detach", "idle"]).expect_success();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(server.state.lock().unwrap().nodes.registrations.len(), 1);
    let (_, log) = daemon.terminate();
    assert_eq!(log.matches("does not let this node register").count(), 1, "{log}");
    assert!(log.contains("does not allow the caller to speak for this node"), "the server's words: {log}");
    assert!(log.contains("a certificate with the name volnode:node/NODE_ID"), "{log}");
}

#[test]
fn a_server_that_says_nothing_holds_up_neither_the_start_nor_the_end() {
    // The kernel takes connections, and nobody answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let run_dir = NodeDaemon::run_dir();
    let daemon = NodeDaemon::start(run_dir.path(), &format!("http://{}", listener.local_addr().unwrap()));
    // It is asked.
    let (_asked, _) = listener.accept().unwrap();
    daemon.volctl(&["attachments"]).expect_success();
    let started = Instant::now();
    let (status, _) = daemon.terminate();
    assert!(status.success());
    // Calls that do not end are waited for 20 s.
    assert!(started.elapsed() < Duration::from_secs(18), "it took {:?}", started.elapsed());
}

#[test]
fn labels_that_the_server_would_refuse_are_refused_at_the_start() {
    let run_dir = NodeDaemon::run_dir();
    for (labels, code, why) in [
        (&["zone"][..], 2, "write KEY=VALUE"),
        (&["a b=c"], 2, "the key"),
        (&["zone="], 2, "the value"),
        (&["a=b,c"], 2, "write KEY=VALUE"),
        (&["a=b", "a=c"], 1, "give it once"),
    ] {
        let mut command = NodeDaemon::command(run_dir.path(), "http://127.0.0.1:9");
        for label in labels {
            command.args(["--label", label]);
        }
        let ended = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.code() == Some(code) && stderr.contains(why), "{labels:?}: {stderr}");
    }
    let mut command = program(env!("CARGO_BIN_EXE_volclient"));
    command.env("VOLCLIENT_LABELS", "a=b,c").arg("serve").arg("--run-dir").arg(run_dir.path());
    let ended = command.output().unwrap();
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
}

#[test]
fn a_variable_of_labels_may_have_empty_pieces() {
    for (variable, labels) in [("", 0), ("a=b,", 1), (",a=b,,c=d,", 2)] {
        let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
        let mut command = NodeDaemon::command(run_dir.path(), &server.uri());
        command.env("VOLCLIENT_LABELS", variable);
        let _daemon = start(command, run_dir.path(), &server);
        let node = wait_for(&server.state, "a registration", |nodes| nodes.registered.get(NODE_ID).cloned());
        assert_eq!(node.labels.len(), labels, "{variable:?}");
        // What this machine's driver allows.
        assert!((1..=256).contains(&node.max_volumes), "{}", node.max_volumes);
    }
}
