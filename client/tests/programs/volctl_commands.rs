//! volctl against a storage server of the tests' own, and against nobody.

use std::path::Path;
use std::process::Stdio;

use crate::fake_server::FakeServer;
use crate::launch::{Ended, NobodysPort, program, volctl};

/// Not even connected to.
const NOBODY: &str = "http://127.0.0.1:9";
const NO_SOCKET: &str = "/nonexistent/volclient.sock";

fn run(server: &FakeServer, args: &[&str]) -> Ended {
    volctl(&server.uri(), Path::new(NO_SOCKET), args)
}

#[test]
fn a_volume_lives_from_create_to_delete() {
    let server = FakeServer::start();
    let created = run(&server, &["create", "vol-123", "--size", "2G"]).expect_success();
    assert_eq!(created.stdout, "volume vol-123 of 2G\n");
    let listed = run(&server, &["list"]).expect_success();
    let expected = "NAME     SIZE  USED  BLOCK  BACKEND  WRITE-CACHE  ATTACHED-TO\n\
                    vol-123  2G    0     4096   file     on           -\n";
    assert_eq!(listed.stdout, expected);
    let shown = run(&server, &["show", "vol-123"]).expect_success();
    assert!(shown.stdout.contains("size:         2G (2147483648 bytes)\n"), "{shown:?}");
    assert_eq!(run(&server, &["delete", "vol-123"]).expect_success().stdout, "deleted vol-123\n");
    assert_eq!(run(&server, &["delete", "vol-123"]).expect_success().stdout, "there is no volume vol-123\n");
}

#[test]
fn options_of_create_reach_the_server() {
    let server = FakeServer::start();
    let args = [
        "create",
        "v",
        "--size=64M",
        "--block-size=512",
        "--backend=memory",
        "--write-cache=off",
        "--output=json",
    ];
    let json = run(&server, &args).expect_success().json();
    assert_eq!(json["capacity_bytes"], 64 << 20);
    assert_eq!(json["block_size_bytes"], 512);
    assert_eq!((json["backend"].as_str(), json["write_cache"].as_str()), (Some("memory"), Some("off")));
}

#[test]
fn list_goes_through_every_page() {
    let server = FakeServer::start();
    for name in ["a", "b", "c", "d", "e"] {
        run(&server, &["create", name, "--size", "1M"]).expect_success();
    }
    let json = run(&server, &["list", "--output", "json"]).expect_success().json();
    let names: Vec<&str> = json.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b", "c", "d", "e"]);
}

#[test]
fn an_empty_list_is_an_empty_array() {
    let server = FakeServer::start();
    assert_eq!(run(&server, &["list", "--output", "json"]).expect_success().stdout, "[]\n");
}

#[test]
fn create_is_idempotent_and_tells_a_conflict() {
    let server = FakeServer::start();
    run(&server, &["create", "v", "--size", "1G"]).expect_success();
    run(&server, &["create", "v", "--size", "1024M"]).expect_success();
    let conflict = run(&server, &["create", "v", "--size", "2G"]);
    conflict.expect_failure(4, "exists with another size", "choose another name");
}

#[test]
fn every_refusal_has_its_exit_code_and_advice() {
    let server = FakeServer::start();
    run(&server, &["show", "none"]).expect_failure(3, "there is no volume none", "list the volumes");
    run(&server, &["create", "big", "--size", "2T"]).expect_failure(8, "no space left", "free space");
    run(&server, &["create", "v", "--size", "1G"]).expect_success();
    server.state.lock().unwrap().add_attachment("v", "node-7", 1);
    run(&server, &["delete", "v"]).expect_failure(5, "attached to node node-7", "detach it there");
    let shown = run(&server, &["show", "v"]).expect_success();
    assert!(shown.stdout.contains("node-7"), "{shown:?}");
}

#[test]
fn a_server_that_is_not_there_is_told_with_its_address() {
    let nobody = NobodysPort::take();
    let ended = volctl(&nobody.uri(), Path::new(NO_SOCKET), &["list"]);
    let what = format!("cannot reach the storage server at {}: Connection refused", nobody.uri());
    ended.expect_failure(6, &what, "--server");
}

#[test]
fn a_node_daemon_that_is_not_there_is_told_with_its_socket() {
    for args in [&["attach", "v"][..], &["detach", "v"], &["attachments"]] {
        let ended = volctl(NOBODY, Path::new(NO_SOCKET), args);
        ended.expect_failure(6, "cannot reach the node daemon at /nonexistent", "volclient serve");
    }
}

#[test]
fn wrong_usage_ends_with_2() {
    for args in [
        &["create", "v"][..],
        &["create", "v", "--size", "2GB"],
        &["attach", "v", "--queues", "0"],
        &["fly"],
        &[],
    ] {
        assert_eq!(volctl(NOBODY, Path::new(NO_SOCKET), args).exit_code, Some(2), "{args:?}");
    }
    let ended = volctl("ftp://h", Path::new(NO_SOCKET), &["list"]);
    ended.expect_failure(2, "not of the form unix:/path, http://host[:port]", "--server");
}

#[test]
fn version_is_told_whoever_is_there() {
    let server = FakeServer::start();
    let json = run(&server, &["version", "--output", "json"]).expect_success().json();
    assert_eq!(json["volctl"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&json["volserver"], json["volclient"].is_null()), (&"0.1.0".into(), true));
}

#[test]
fn doctor_checks_everything_and_advises() {
    let server = FakeServer::start();
    let ended = run(&server, &["doctor", "--output", "json"]);
    let checks = ended.json();
    let check = |name: &str| {
        let found = checks.as_array().unwrap().iter().find(|check| check["check"] == name);
        found.unwrap_or_else(|| panic!("no check {name}: {checks}")).clone()
    };
    assert_eq!(check("storage server")["ok"], true);
    assert_eq!(check("node daemon")["ok"], false);
    assert!(check("node daemon")["next"].as_str().unwrap().contains("volclient serve"));
    // What this machine has, and this user may, is not what is tested; that the first complaint counts is.
    let has_driver = std::fs::File::options().read(true).write(true).open("/dev/ublk-control").is_ok();
    assert_eq!(check("ublk driver")["ok"], has_driver);
    let is_root = rustix::process::geteuid().is_root();
    assert_eq!(check("root")["ok"], is_root);
    let machine_can = ["root", "ublk driver", "data paths"].iter().all(|name| check(name)["ok"] == true);
    assert_eq!(ended.exit_code, Some(if machine_can { 6 } else { 7 }));
}

#[test]
fn a_reader_that_stops_reading_is_no_error() {
    let server = FakeServer::start();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = program(env!("CARGO_BIN_EXE_volctl"))
        .args(["list", "--server", &server.uri()])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{output:?}");
}
