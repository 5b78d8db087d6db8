//! `volclient serve` as a process, with volctl as its user: starting, ending, finding attachments again, detaching them.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use client::contract::{
    ControlCommand, ControlResponse, DeviceSpec, DeviceState, DeviceStatus, read_file, write_file,
};
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use uuid::Uuid;

use crate::device_stand_in::{DeviceStandIn, Folder, SECRET};
use crate::fake_server::FakeServer;
use crate::launch::{NODE_ID, NobodysPort, NodeDaemon, full_pipe, program};

/// A server, a run directory, and one attachment of `vol-1` that both know.
struct Attached {
    server: FakeServer,
    run_dir: tempfile::TempDir,
    folder: Folder,
}

impl Attached {
    fn new() -> Self {
        let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
        let (attachment_id, server_id) = {
            let mut state = server.state.lock().unwrap();
            (state.add_attachment("vol-1", NODE_ID, 0), state.server_id)
        };
        let folder = Folder::of_volume(run_dir.path(), "vol-1", attachment_id, server_id);
        Self { server, run_dir, folder }
    }

    fn daemon(&self) -> NodeDaemon {
        NodeDaemon::start(self.run_dir.path(), &self.server.uri())
    }

    fn is_held_by_the_server(&self) -> bool {
        !self.server.state.lock().unwrap().attachments.is_empty()
    }
}

fn state_of_only_attachment(daemon: &NodeDaemon) -> (String, String) {
    let json = daemon.volctl(&["attachments", "--output", "json"]).expect_success().json();
    assert_eq!(json.as_array().unwrap().len(), 1, "{json}");
    let text = |field: &str| json[0][field].as_str().unwrap().to_owned();
    (text("state"), text("state_reason"))
}

#[test]
fn the_socket_is_private_and_the_service_healthy() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    assert_eq!(fs::metadata(&daemon.socket).unwrap().permissions().mode() & 0o777, 0o600);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let status = runtime.block_on(async {
        let endpoint = Endpoint::from_shared(format!("unix://{}", daemon.socket.display())).unwrap();
        let mut client = HealthClient::new(endpoint.connect().await.unwrap());
        let request = HealthCheckRequest { service: "volnode.v1.Node".to_owned() };
        client.check(request).await.unwrap().into_inner().status()
    });
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);
}

/// It logs each call, and more, with `--log trace`.
#[test]
fn a_daemon_whose_log_nobody_takes_answers_and_ends_like_any_other() {
    let server = FakeServer::start();
    let (_reader, full_pipe) = full_pipe();
    let (_, broken_pipe) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let full_disk = fs::File::options().write(true).open("/dev/full").unwrap();
    for stderr in [full_pipe, broken_pipe, full_disk.into()] {
        let run_dir = NodeDaemon::run_dir();
        let daemon = NodeDaemon::start_logging_to(stderr, run_dir.path(), &server.uri());
        for _ in 0..20 {
            daemon.volctl(&["attachments"]).expect_success();
        }
        assert_eq!(daemon.terminate().0.code(), Some(0));
    }
}

#[test]
fn a_device_process_that_cannot_start_ends_though_nobody_takes_the_reason() {
    let run_dir = NodeDaemon::run_dir();
    let (_reader, full_pipe) = full_pipe();
    let mut device = program(env!("CARGO_BIN_EXE_volclient"));
    device.arg("device").arg("--dir").arg(run_dir.path().join("none")).stderr(full_pipe);
    let mut device = device.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while device.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            device.kill().unwrap();
            device.wait().unwrap();
            panic!("it waits for somebody to take the reason");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_second_daemon_of_a_run_directory_is_refused() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let _daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    let second = NodeDaemon::command(run_dir.path(), &server.uri()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let stderr = String::from_utf8(second.stderr).unwrap();
    assert!(stderr.contains("another volclient serves"), "{stderr}");
}

#[test]
fn a_daemon_ends_cleanly_and_leaves_device_processes_alone() {
    let attached = Attached::new();
    let process = DeviceStandIn::start(
        &attached.folder,
        vec![ControlResponse::Ok(Box::new(attached.folder.status.clone()))],
    );
    let daemon = attached.daemon();
    assert_eq!(state_of_only_attachment(&daemon), ("live".to_owned(), String::new()));
    let socket = daemon.socket.clone();
    let (status, _) = daemon.terminate();
    assert!(status.success() && !socket.exists());
    // The next daemon finds the attachment as it was.
    let daemon = attached.daemon();
    assert_eq!(state_of_only_attachment(&daemon), ("live".to_owned(), String::new()));
    daemon.volctl(&["detach", "vol-1"]).expect_success();
    process.join();
}

#[test]
fn a_detach_stops_the_process_tells_the_server_and_leaves_nothing() {
    let attached = Attached::new();
    let process = DeviceStandIn::start(
        &attached.folder,
        vec![ControlResponse::Ok(Box::new(attached.folder.status.clone()))],
    );
    let daemon = attached.daemon();
    assert_eq!(daemon.volctl(&["detach", "vol-1"]).expect_success().stdout, "detached vol-1\n");
    assert!(!attached.folder.exists() && !attached.is_held_by_the_server());
    assert_eq!(daemon.volctl(&["detach", "vol-1"]).expect_success().stdout, "vol-1 is not attached\n");
    process.join();
}

#[test]
fn a_device_that_is_open_stays_and_its_holders_are_named() {
    let attached = Attached::new();
    let busy = ControlResponse::Busy { holders: vec!["mounted on /mnt/data".to_owned()] };
    let process = DeviceStandIn::start(&attached.folder, vec![busy]);
    let daemon = attached.daemon();
    daemon.volctl(&["detach", "vol-1"]).expect_failure(5, "vol-1 is in use: mounted on /mnt/data", "unmount");
    assert!(attached.folder.exists() && attached.is_held_by_the_server());
    process.join();
}

#[test]
fn a_dead_attachment_is_told_and_a_detach_cleans_up() {
    for name in ["vol-1", "/dev/ublkb4000000"] {
        let attached = Attached::new();
        let daemon = attached.daemon();
        let (state, reason) = state_of_only_attachment(&daemon);
        assert_eq!((state.as_str(), reason.contains("detach cleans up")), ("dead", true), "{reason}");
        daemon.volctl(&["detach", name]).expect_success();
        assert!(!attached.folder.exists() && !attached.is_held_by_the_server());
    }
}

#[test]
fn a_detach_without_the_server_is_finished_when_it_is_back() {
    let attached = Attached::new();
    let daemon = attached.daemon();
    let Attached { server, folder, run_dir: _run_dir } = attached;
    let (address, state) = (server.address, Arc::clone(&server.state));
    drop(server);
    let nobody = NobodysPort::take_at(address);
    daemon.volctl(&["detach", "vol-1"]).expect_failure(
        6,
        "the device of vol-1 is gone, but the storage server still holds the attachment",
        "repeat the detach",
    );
    let (device_state, reason) = state_of_only_attachment(&daemon);
    assert_eq!((device_state.as_str(), reason.contains("detach again")), ("dead", true), "{reason}");
    let status: DeviceStatus = read_file(&folder.dir.status()).unwrap();
    assert_eq!(status.dev_id, None);
    let server = FakeServer::start_at(nobody.address, state);
    daemon.volctl(&["detach", "vol-1"]).expect_success();
    assert!(!folder.exists() && server.state.lock().unwrap().attachments.is_empty());
}

#[test]
fn another_server_is_not_told() {
    let attached = Attached::new();
    attached.server.state.lock().unwrap().server_id = Uuid::from_u128(99);
    let daemon = attached.daemon();
    let ended = daemon.volctl(&["detach", "vol-1"]);
    assert_eq!(ended.exit_code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("another server_id"), "{ended:?}");
    assert!(attached.folder.exists() && attached.is_held_by_the_server());
}

#[test]
fn an_attachment_of_a_foreign_server_needs_no_server_of_ours() {
    let run_dir = NodeDaemon::run_dir();
    let folder = Folder::of_uri(run_dir.path(), "nbd://127.0.0.1:10809/x");
    let daemon = NodeDaemon::start(run_dir.path(), "http://127.0.0.1:9");
    // Another spelling of the same URI.
    daemon.volctl(&["detach", "nbd://127.0.0.1/%78"]).expect_success();
    assert!(!folder.exists());
}

#[test]
fn an_attachment_that_only_the_server_knows_is_given_back() {
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let (used, idle) = {
        let mut state = server.state.lock().unwrap();
        (state.add_attachment("used", NODE_ID, 1), state.add_attachment("idle", NODE_ID, 0))
    };
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    assert_eq!(daemon.volctl(&["detach", "idle"]).expect_success().stdout, "detached idle\n");
    assert_eq!(daemon.volctl(&["detach", "used"]).expect_success().stdout, "used is not attached\n");
    let attachments = &server.state.lock().unwrap().attachments;
    assert!(attachments.contains_key(&used.to_string()) && !attachments.contains_key(&idle.to_string()));
}

#[test]
fn an_attach_that_this_machine_cannot_do_asks_the_server_for_nothing() {
    if Path::new("/dev/ublk-control").exists() {
        eprintln!("SKIP this machine has ublk");
        return;
    }
    let (server, run_dir) = (FakeServer::start(), NodeDaemon::run_dir());
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    daemon.volctl(&["create", "vol-1", "--size", "1G"]).expect_success();
    daemon.volctl(&["attach", "vol-1"]).expect_failure(7, "no ublk driver", "modprobe ublk_drv");
    assert!(server.state.lock().unwrap().attachments.is_empty());
    assert_eq!(daemon.volctl(&["attachments", "--output", "json"]).expect_success().stdout, "[]\n");
}

#[test]
fn a_target_that_cannot_be_is_wrong_usage() {
    let run_dir = NodeDaemon::run_dir();
    let daemon = NodeDaemon::start(run_dir.path(), "http://127.0.0.1:9");
    for (target, why) in [
        ("a/b", "neither a volume's name"),
        ("nbd+unix:///x", "socket=/path"),
        ("nbds+unix:///x?socket=/s", "nbd+unix:///export?socket=/path"),
        ("nbds://h/x", "--tls-ca"),
    ] {
        let ended = daemon.volctl(&["attach", target]);
        assert_eq!(ended.exit_code, Some(2), "{ended:?}");
        assert!(ended.stderr.contains(why), "{ended:?}");
    }
}

#[test]
fn no_output_and_no_log_holds_a_secret() {
    let attached = Attached::new();
    let daemon = attached.daemon();
    let listed = daemon.volctl(&["attachments", "--output", "json"]).expect_success();
    daemon.volctl(&["detach", "vol-1"]).expect_success();
    let (_, log) = daemon.terminate();
    // The log is at its most talkative, and has the events in it.
    assert!(log.contains("attachment found dead") && log.contains("detached"), "{log}");
    assert!(!log.contains(SECRET) && !listed.stdout.contains(SECRET));
}

#[test]
fn an_attachment_of_a_newer_program_is_left_alone() {
    let attached = Attached::new();
    fs::write(attached.folder.dir.spec(), r#"{"format_version": 99}"#).unwrap();
    let daemon = attached.daemon();
    assert_eq!(daemon.volctl(&["attachments", "--output", "json"]).expect_success().stdout, "[]\n");
    let (_, log) = daemon.terminate();
    assert!(log.contains("format version 99") && attached.folder.exists(), "{log}");
}

/// A server that is stopped: the kernel takes connections for it, and nobody answers.
fn silent_server() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap());
    (listener, uri)
}

#[test]
fn a_detach_does_not_wait_for_ever_for_a_server_that_says_nothing() {
    let attached = Attached::new();
    let (_listener, uri) = silent_server();
    let daemon = NodeDaemon::start(attached.run_dir.path(), &uri);
    let started = Instant::now();
    daemon.volctl(&["detach", "vol-1"]).expect_failure(6, "the device of vol-1 is gone", "repeat the detach");
    // Pings tell after 15 s; the call itself would have been waited for 60 s.
    assert!(started.elapsed() < Duration::from_secs(50), "it took {:?}", started.elapsed());
}

#[test]
fn a_daemon_that_is_told_to_end_waits_for_no_watcher() {
    let attached = Attached::new();
    let daemon = attached.daemon();
    let mut watcher = program(env!("CARGO_BIN_EXE_volctl"))
        .args(["events", "--follow", "--socket"])
        .arg(&daemon.socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    let mut lines = BufReader::new(watcher.stdout.take().unwrap());
    lines.read_line(&mut first).unwrap();
    assert!(first.contains("vol-1"), "{first}");
    let started = Instant::now();
    let (status, _) = daemon.terminate();
    assert!(status.success());
    // Calls that do not end are waited for 20 s.
    assert!(started.elapsed() < Duration::from_secs(18), "it took {:?}", started.elapsed());
    // The watcher is told, and does not take it for a good end.
    let mut told = String::new();
    watcher.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert_eq!(watcher.wait().unwrap().code(), Some(6), "{told}");
    assert!(told.contains("the node daemon ends"), "{told}");
}

#[test]
fn a_daemon_that_is_told_to_end_cuts_off_a_call_that_does_not() {
    let attached = Attached::new();
    // This process is the device process, takes the request to stop, and says nothing.
    let _claim = client::node::device_process::claim(&attached.folder.dir).unwrap();
    let control = std::os::unix::net::UnixListener::bind(attached.folder.dir.control_socket()).unwrap();
    let daemon = attached.daemon();
    let mut detach = program(env!("CARGO_BIN_EXE_volctl"))
        .args(["detach", "vol-1", "--socket"])
        .arg(&daemon.socket)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (_asked, _) = control.accept().unwrap();
    let started = Instant::now();
    let (status, log) = daemon.terminate();
    assert!(status.success() && log.contains("calls are cut off"), "{log}");
    // As in deploy/volclient.service.
    assert!(started.elapsed() < Duration::from_secs(30), "it took {:?}", started.elapsed());
    assert_eq!(detach.wait().unwrap().code(), Some(6));
    assert!(attached.folder.exists(), "what was cut off can be repeated");
}

#[test]
fn a_disk_that_waits_is_told_where_its_server_is_now() {
    let attached = Attached::new();
    let spec = || read_file::<DeviceSpec>(&attached.folder.dir.spec()).unwrap();
    let (before, now) = (spec().addresses, vec!["192.0.2.7:10809".to_owned()]);
    attached.server.state.lock().unwrap().data_addresses.clone_from(&now);
    let ok = ControlResponse::Ok(Box::new(attached.folder.status.clone()));
    let process = DeviceStandIn::expecting(
        &attached.folder,
        vec![(ControlCommand::SetAddresses(now.clone()), ok.clone()), (ControlCommand::Stop, ok)],
    );
    let daemon = attached.daemon();
    // While it is served nobody asks.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(spec().addresses, before);
    let mut status = attached.folder.status.clone();
    status.state = DeviceState::Stalled;
    write_file(&attached.folder.dir.status(), &status).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while spec().addresses != now {
        assert!(Instant::now() < deadline, "it is not told");
        std::thread::sleep(Duration::from_millis(50));
    }
    daemon.volctl(&["detach", "vol-1"]).expect_success();
    process.join();
}

#[test]
fn all_disks_are_told_and_detached_at_once() {
    let attached = Attached::new();
    let foreign = Folder::of_uri(attached.run_dir.path(), "nbd://127.0.0.1:10809/x");
    let daemon = attached.daemon();
    // Both are dead, so nothing can be told; every one of them is named.
    let refused = daemon.volctl(&["policy", "--all", "--on-stall", "fail"]);
    assert_eq!(refused.exit_code, Some(5), "{refused:?}");
    assert!(refused.stderr.contains("vol-1") && refused.stderr.contains("nbd://"), "{refused:?}");
    let detached = daemon.volctl(&["detach", "--all"]).expect_success().stdout;
    assert_eq!(detached, "detached nbd://127.0.0.1:10809/x\ndetached vol-1\n");
    assert!(!attached.folder.exists() && !foreign.exists() && !attached.is_held_by_the_server());
    assert_eq!(daemon.volctl(&["detach", "--all", "--force"]).expect_success().stdout, "");
}

#[test]
fn disks_are_taken_away_without_a_daemon_and_not_beside_one() {
    let attached = Attached::new();
    let foreign = Folder::of_uri(attached.run_dir.path(), "nbd://127.0.0.1:10809/x");
    let take_away = |server: &str| {
        let mut command = program(env!("CARGO_BIN_EXE_volclient"));
        command.arg("take-away").arg("--run-dir").arg(attached.run_dir.path());
        command.args(["--node-id", NODE_ID, "--server", server]).output().unwrap()
    };
    let daemon = attached.daemon();
    let refused = take_away(&attached.server.uri());
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("another volclient serves"), "{refused:?}");
    assert!(attached.folder.exists() && foreign.exists());
    daemon.terminate();
    let (_listener, silent) = silent_server();
    let taken = take_away(&silent);
    assert!(taken.status.success(), "{taken:?}");
    // The server could not be told, so that the next daemon knows of it.
    assert!(!foreign.exists() && attached.folder.exists());
    assert!(take_away(&attached.server.uri()).status.success());
    assert!(!attached.folder.exists() && !attached.is_held_by_the_server());
}

#[test]
fn udev_learns_the_name_of_every_disk() {
    let attached = Attached::new();
    let name = |disk: &str| {
        let mut command = program(env!("CARGO_BIN_EXE_volclient"));
        command.args(["device-name", disk, "--run-dir"]).arg(attached.run_dir.path()).output().unwrap()
    };
    let told = name("ublkb4000000");
    assert_eq!(String::from_utf8_lossy(&told.stdout), "VOLNODE_NAME=vol-1\n", "{told:?}");
    let mut status: DeviceStatus = read_file(&attached.folder.dir.status()).unwrap();
    status.state = client::contract::DeviceState::Stalled;
    client::contract::write_file(&attached.folder.dir.status(), &status).unwrap();
    let told = name("ublkb4000000");
    assert_eq!(String::from_utf8_lossy(&told.stdout), "VOLNODE_NAME=vol-1\nVOLNODE_STALLED=1\n");
    // Of somebody else's server: it has no name there, so it is called by where it is.
    let mut foreign = Folder::of_uri(attached.run_dir.path(), "nbd://h/a/b-part1");
    foreign.status.dev_id = Some(4_000_001);
    client::contract::write_file(&foreign.dir.status(), &foreign.status).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&name("ublkb4000001").stdout),
        "VOLNODE_NAME=nbd@h@10809@a%2Fb%2Dpart1\n"
    );
    foreign.status.state = client::contract::DeviceState::Stalled;
    client::contract::write_file(&foreign.dir.status(), &foreign.status).unwrap();
    assert!(String::from_utf8_lossy(&name("ublkb4000001").stdout).ends_with("\nVOLNODE_STALLED=1\n"));
    let another = name("ublkb1");
    assert!(another.status.success() && another.stdout.is_empty(), "{another:?}");
    assert_eq!(name("sda").status.code(), Some(1));
}
