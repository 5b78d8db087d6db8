//! volctl against a storage server of the tests' own, and against nobody.

use std::path::Path;
use std::process::Stdio;

use proto::v1;

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
    let expected = "NAME     SIZE  USED  BLOCK  BACKEND  WRITE-CACHE  SNAPSHOTS  ATTACHED-TO\n\
                    vol-123  2G    0     4096   file     on           0          -\n";
    assert_eq!(listed.stdout, expected);
    let shown = run(&server, &["show", "vol-123"]).expect_success();
    assert!(shown.stdout.contains("size:         2G (2147483648 bytes)\n"), "{shown:?}");
    assert_eq!(run(&server, &["delete", "vol-123"]).expect_success().stdout, "deleted vol-123\n");
    assert_eq!(run(&server, &["delete", "vol-123"]).expect_success().stdout, "there is no volume vol-123\n");
}

#[test]
fn a_call_whose_answer_is_lost_is_made_again_by_the_same_id_but_not_for_ever() {
    let server = FakeServer::start();
    run(&server, &["create", "v", "--size=1G"]).expect_success();
    server.state.lock().unwrap().deletions.to_lose = 2;
    let deleted = run(&server, &["delete", "v"]);
    assert_eq!(deleted.stdout, "deleted v\n", "{deleted:?}");
    let told =
        "volctl: the connection was lost: broken pipe; repeating the call by the same request id, 2 of 4\n";
    assert!(deleted.stderr.contains(told), "{deleted:?}");
    let made = std::mem::take(&mut server.state.lock().unwrap().deletions.request_ids);
    assert!(made.len() == 3 && made.iter().all(|id| id.len() == 36 && *id == made[0]), "{made:?}");

    server.state.lock().unwrap().deletions.to_lose = 100;
    let failed = run(&server, &["delete", "w"]);
    let made = std::mem::take(&mut server.state.lock().unwrap().deletions.request_ids);
    assert_eq!(made.len(), 5);
    let told = format!("broken pipe; the call was made 5 times by the request id {}", made[0]);
    assert_eq!((failed.exit_code, failed.stdout.as_str()), (Some(6), ""), "{failed:?}");
    assert!(
        failed.stderr.contains(&told)
            && failed.stderr.ends_with("repeat the call; it goes on where it stopped\n"),
        "{failed:?}"
    );
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
fn a_volume_is_renamed_unless_the_name_is_taken() {
    let server = FakeServer::start();
    for name in ["v", "taken"] {
        run(&server, &["create", name, "--size=1G"]).expect_success();
    }
    let before = run(&server, &["show", "v", "--output=json"]).expect_success().json();
    run(&server, &["rename", "v", "taken"]).expect_failure(
        4,
        "there is a volume taken already",
        "choose another name",
    );
    assert_eq!(run(&server, &["rename", "v", "w"]).expect_success().stdout, "volume v renamed to w\n");
    let json = run(&server, &["rename", "w", "w", "--output=json"]).expect_success().json();
    assert_eq!((&json["name"], &json["volume_uid"]), (&"w".into(), &before["volume_uid"]));
    run(&server, &["rename", "v", "x"]).expect_failure(3, "there is no volume v", "list the volumes");
}

#[test]
fn properties_are_set_one_by_one_and_shown() {
    let server = FakeServer::start();
    let create = ["create", "v", "--size=1G", "--label", "app=db", "--protect", "--description", "orders"];
    run(&server, &create).expect_success();
    let set = ["set", "v", "--label", "a.example/tier=1", "--label", "app-", "--no-protect", "--read-only"];
    let set = run(&server, &set).expect_success();
    assert_eq!(
        set.stdout,
        "volume v\n  content: unknown\n  labels: a.example/tier=1\n  description: orders\n  read-only: yes\n"
    );
    let json = run(&server, &["show", "v", "--output", "json"]).expect_success().json();
    assert_eq!(json["labels"], serde_json::json!({ "a.example/tier": "1" }));
    assert_eq!((json["is_protected"].as_bool(), json["is_read_only"].as_bool()), (Some(false), Some(true)));
    run(&server, &["create", "w", "--size", "1G"]).expect_success();
    for (label, names) in [("a.example/tier", &["v"][..]), ("a.example/tier=2", &[])] {
        let json = run(&server, &["list", "--label", label, "--output", "json"]).expect_success().json();
        let found: Vec<&str> =
            json.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        assert_eq!(found, names, "{label}");
    }
    let nothing = ["set", "none", "--no-protect"];
    run(&server, &nothing).expect_failure(3, "there is no volume none", "list the volumes");
}

#[test]
fn a_limit_that_is_not_named_stays() {
    let server = FakeServer::start();
    run(&server, &["create", "v", "--size=1G", "--read-iops=100", "--write-bandwidth=8M"]).expect_success();
    let limited = run(&server, &["limit", "v", "--write-iops", "50", "--read-iops", "none", "--burst", "3"]);
    let expected = "volume v\n  content: unknown\n  limits: 50 writes/s, 8M/s written, 3 s saved up\n";
    assert_eq!(limited.expect_success().stdout, expected);
    let shown = run(&server, &["show", "v"]).expect_success();
    assert!(shown.stdout.contains("limits:       50 writes/s, 8M/s written, 3 s saved up\n"), "{shown:?}");
    run(&server, &["limit", "v"]).expect_failure(2, "no limit is named", "--read-iops");
}

#[test]
fn what_is_meant_for_another_state_of_a_volume_is_not_done() {
    let server = FakeServer::start();
    run(&server, &["create", "v", "--size=1G"]).expect_success();
    let set = |etag: &str| run(&server, &["set", "v", "--description=d", "--if-etag", etag, "--output=json"]);
    let json = set("").expect_success().json();
    let seen = json["etag"].as_str().unwrap();
    assert_ne!(set(seen).expect_success().json()["etag"], seen);
    set(seen).expect_failure(5, "volume v has been changed", "look at the volume again");
    let limit = ["limit", "v", "--read-iops=7", "--if-etag", seen];
    run(&server, &limit).expect_failure(5, "volume v has been changed", "look at the volume again");
    let shown = run(&server, &["show", "v", "--output=json"]).expect_success().json();
    assert_eq!(shown["limits"]["read_iops"], 0);
    run(&server, &limit[..3]).expect_success();
}

#[test]
fn what_is_adopted_brings_its_size_and_is_told() {
    let server = FakeServer::start();
    let created = run(&server, &["create", "v", "--adopt", "/dev/sdb", "--write-cache=off", "--output=json"]);
    assert_eq!(created.exit_code, Some(0));
    let json = created.json();
    assert_eq!((&json["backend"], &json["adopted_path"]), (&"device".into(), &"/dev/sdb".into()));
    assert_eq!(
        (&json["capacity_bytes"], &json["block_size_bytes"]),
        (&0.into(), &0.into()),
        "the server's to say"
    );
    assert!(created.stderr.contains("warning: it has no WWID, serial, UUID or PARTUUID;"), "{created:?}");
    let shown = run(&server, &["show", "v"]).expect_success();
    assert!(shown.stdout.contains("adopted:      /dev/sdb\n"), "{shown:?}");
    assert!(shown.stdout.contains("identity:     none (found by path and size)\n"), "{shown:?}");
    run(&server, &["create", "w", "--size", "1M"]).expect_success();
    assert!(!run(&server, &["show", "w"]).expect_success().stdout.contains("adopted:"));
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
fn an_encrypted_volume_has_the_size_that_was_asked_for_and_a_header_besides() {
    let server = FakeServer::start();
    let told = run(&server, &["create", "v", "--encrypted", "--size", "1G"]).expect_success();
    assert_eq!(told.stdout, "volume v of 1G\n");
    let listed = run(&server, &["list", "--output", "json"]).expect_success().stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["capacity_bytes"], (1_u64 << 30) + (16 << 20));
    assert_eq!(listed[0]["is_encrypted"], true);
    let shown = run(&server, &["show", "v"]).expect_success().stdout;
    assert!(shown.contains("1G (1073741824 bytes)") && shown.contains("16M of header"), "{shown}");
    let told = run(&server, &["resize", "v", "--size", "2G"]).expect_success();
    assert_eq!(told.stdout, "volume v of 2G\n");
}

#[test]
fn a_passphrase_is_read_before_anybody_is_asked() {
    for (args, what) in [
        (&["attach", "v", "--passphrase-file", "/nonexistent"][..], "No such file"),
        (&["attach", "v", "--passphrase-file", "-"], "the passphrase is empty"),
        (&["attach", "v", "--passphrase-keyring", "volnode-no-such-key"], "cannot be read"),
        (&["passphrase", "v", "--old-file", "-", "--new-file", "-"], "stdin is one file"),
    ] {
        let ended = volctl(NOBODY, Path::new(NO_SOCKET), args);
        assert!(ended.exit_code.is_some_and(|code| code != 0 && code != 6), "{ended:?}");
        assert!(ended.stderr.contains(what), "{ended:?}");
    }
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
        &["create", "v", "--size", "2G", "--adopt", "/dev/sdb"],
        &["create", "v", "--adopt", "/dev/sdb", "--backend", "memory"],
        &["attach", "v", "--queues", "0"],
        &["attach", "v", "--passphrase-file", "-", "--passphrase-keyring", "k"],
        &["create", "v", "--size", "2G", "--encrypted", "--shared"],
        &["attach", "v", "--read-only", "--access", "multi-reader"],
        &["set", "v"],
        &["set", "v", "--protect", "--no-protect"],
        &["set", "v", "--label", "="],
        &["limit", "v", "--read-iops", "many"],
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
fn snapshots_are_taken_listed_shown_and_deleted() {
    let server = FakeServer::start();
    for name in ["a", "b", "c"] {
        run(&server, &["create", name, "--size", "1G"]).expect_success();
    }
    let created = run(&server, &["snapshot", "create", "a,b,c", "monday"]).expect_success();
    assert_eq!(created.stdout, "snapshot a@monday of 1G\nsnapshot b@monday of 1G\nsnapshot c@monday of 1G\n");
    let again =
        run(&server, &["snapshot", "create", "a", "monday", "--output", "json"]).expect_success().json();
    assert_eq!((&again[0]["state"], again.as_array().unwrap().len()), (&"ready".into(), 1));
    let listed = run(&server, &["snapshot", "list"]).expect_success().stdout;
    let header = "VOLUME  NAME    SIZE  USED  STATE  CREATED               ATTACHED-TO  UID\n";
    assert!(listed.starts_with(header), "{listed}");
    let json = run(&server, &["snapshot", "list", "--output", "json"]).expect_success().json();
    assert_eq!(json.as_array().unwrap().len(), 3, "through every page");
    let of_b = run(&server, &["snapshot", "list", "b", "--output", "json"]).expect_success().json();
    assert_eq!(of_b[0]["volume_name"], "b");
    let shown = run(&server, &["snapshot", "show", "b", "monday"]).expect_success().stdout;
    assert!(shown.contains("created:       2026-03-01T11:59:59Z\n"), "{shown}");
    let uid = format!("@{}", of_b[0]["snapshot_uid"].as_str().unwrap());
    run(&server, &["snapshot", "show", &uid]).expect_success();
    assert_eq!(
        run(&server, &["snapshot", "delete", &uid]).expect_success().stdout,
        format!("deleted {uid}\n")
    );
    let gone = run(&server, &["snapshot", "delete", "b", "monday"]).expect_success();
    assert_eq!(gone.stdout, "there is no snapshot b@monday\n");
    run(&server, &["snapshot", "show", "b", "monday"]).expect_failure(
        3,
        "no such snapshot",
        "list the snapshots",
    );
    run(&server, &["snapshot", "show", "b"]).expect_failure(2, "which snapshot of b", "@UID");
    run(&server, &["snapshot", "create", "a,none", "x"]).expect_failure(
        3,
        "no volume none",
        "list the volumes",
    );
}

#[test]
fn nobody_attaches_a_snapshot_to_write_to_it() {
    let server = FakeServer::start();
    run(&server, &["attach", "v@s", "--access", "writer"]).expect_failure(
        2,
        "v@s is a snapshot, which nobody writes to",
        "clone it",
    );
}

#[test]
fn a_volume_with_snapshots_is_deleted_only_if_they_are_to_be_kept() {
    let server = FakeServer::start();
    run(&server, &["create", "v", "--size", "1G"]).expect_success();
    run(&server, &["snapshot", "create", "v", "s"]).expect_success();
    run(&server, &["delete", "v"]).expect_failure(5, "v has snapshots", "keep them");
    run(&server, &["delete", "v", "--keep-snapshots"]).expect_success();
    let listed = run(&server, &["snapshot", "list"]).expect_success().stdout;
    assert!(listed.lines().nth(1).unwrap().starts_with("-       s "), "{listed}");
}

#[test]
fn clones_and_restores_are_waited_for() {
    let server = FakeServer::start();
    run(&server, &["create", "v", "--size", "1G"]).expect_success();
    run(&server, &["snapshot", "create", "v", "s"]).expect_success();
    let cloned = run(&server, &["clone", "v@s", "w", "--size", "2G"]).expect_success();
    assert_eq!(cloned.stdout, "volume w of 2G\n");
    let json = run(&server, &["show", "w", "--output", "json"]).expect_success().json();
    let snapshot = server.state.lock().unwrap().copies.find("v", "s", "-").unwrap();
    assert_eq!(json["source_uid"].as_str(), Some(snapshot.snapshot_uid.as_str()));
    run(&server, &["clone", "v", "x"]).expect_success();
    run(&server, &["clone", &format!("@{}", snapshot.snapshot_uid), "y"]).expect_success();
    let restored = run(&server, &["snapshot", "restore", "v", "s"]).expect_success();
    assert_eq!(restored.stdout, "restored v from s\n");
    run(&server, &["snapshot", "restore", "v", "t"]).expect_failure(
        3,
        "no such snapshot",
        "list the snapshots",
    );
}

#[test]
fn what_changed_is_told_to_its_end_or_not_as_a_success() {
    let server = FakeServer::start();
    for name in ["v", "cut", "short"] {
        run(&server, &["create", name, "--size", "1G"]).expect_success();
    }
    run(&server, &["snapshot", "create", "v", "s"]).expect_success();
    let told = run(&server, &["diff", "v@s", "v"]).expect_success().stdout;
    let lines = "OFFSET           LENGTH         KIND\n\
                 0                4096           data\n\
                 1048576          4096           zero\n\
                 4K of data and 4K of zeroes changed, in 2 ranges\n";
    assert_eq!(told, lines);
    let uid = server.state.lock().unwrap().copies.find("v", "s", "-").unwrap().snapshot_uid;
    let json = run(&server, &["diff", &format!("@{uid}"), "v", "--output", "json"]).expect_success().json();
    assert_eq!((&json["ranges"][1]["kind"], &json["zero_bytes"]), (&"zero".into(), &4096.into()));
    let mut cut = run(&server, &["diff", "v@s", "cut", "--output", "json"]);
    assert!(
        serde_json::from_str::<serde_json::Value>(&cut.stdout).is_err(),
        "no part is taken for the whole"
    );
    // What came before is printed.
    cut.stdout.clear();
    cut.expect_failure(5, "cancelled", "repeat the call");
    let mut short = run(&server, &["diff", "v@s", "short"]);
    short.stdout.clear();
    short.expect_failure(1, "before its end", "repeat the command");
    run(&server, &["diff", "v@t", "v"]).expect_failure(3, "no such snapshot", "list the snapshots");
    run(&server, &["diff", "v", "v@s"]).expect_failure(2, "which snapshot of v?", "VOLUME@NAME");
}

#[test]
fn a_copy_that_fails_behind_the_call_has_its_exit_code_and_advice() {
    let server = FakeServer::start();
    run(&server, &["create", "v", "--size", "1G"]).expect_success();
    let what = "the snapshot operation failed: no space left";
    run(&server, &["snapshot", "create", "v", "full"]).expect_failure(8, what, "nothing is left of it");
    let what = "the clone operation failed: no space left";
    run(&server, &["clone", "v", "full"]).expect_failure(8, what, "nothing is left of it");
}

#[test]
fn doctor_says_whether_the_server_has_snapshots() {
    let server = FakeServer::start();
    let told = |server: &FakeServer| {
        let checks = run(server, &["doctor", "--output", "json"]).json();
        let found =
            checks.as_array().unwrap().iter().find(|check| check["check"] == "storage server").cloned();
        found.unwrap()["snapshots"].clone()
    };
    assert_eq!(told(&server)["supported"], true);
    let why = "its file system is ext4: put --data-dir on XFS or btrfs";
    server.state.lock().unwrap().snapshots_unsupported_reason = why.to_owned();
    assert_eq!((&told(&server)["supported"], &told(&server)["reason"]), (&false.into(), &why.into()));
    let text = run(&server, &["doctor"]).stdout;
    assert!(text.contains(&format!("      snapshots   no: {why}\n")), "{text}");
}

#[test]
fn doctor_says_how_full_the_server_is() {
    let server = FakeServer::start();
    assert!(!run(&server, &["doctor"]).stdout.contains(" space "), "a server that does not tell");
    let told = |level: v1::SpaceLevel| {
        let space = v1::StorageSpace {
            free_bytes: 3 << 30,
            total_bytes: 100 << 30,
            reserve_bytes: 5 << 30,
            level: level.into(),
        };
        server.state.lock().unwrap().storage_space = Some(space);
        let text = run(&server, &["doctor"]).stdout;
        text.lines().find(|line| line.contains(" space ")).unwrap().to_owned()
    };
    assert_eq!(told(v1::SpaceLevel::Enough).trim(), "space       3G free of 100G");
    let below = told(v1::SpaceLevel::BelowReserve);
    assert!(below.contains("less than the reserve of 5G") && below.contains("delete snapshots"), "{below}");
    assert!(told(v1::SpaceLevel::Full).contains("writes to volumes fail"));
    let checks = run(&server, &["doctor", "--output", "json"]).json();
    let found = checks.as_array().unwrap().iter().find(|check| check["check"] == "storage server").cloned();
    let space = &found.unwrap()["storage_space"];
    assert_eq!((&space["level"], &space["free_bytes"]), (&"full".into(), &(3u64 << 30).into()));
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

#[test]
fn operations_are_listed_shown_and_cancelled() {
    let server = FakeServer::start();
    run(&server, &["create", "v", "--size", "1G"]).expect_success();
    let begin =
        |kind: &str| server.state.lock().unwrap().copies.begin(kind, vec!["v@s".to_owned()]).operation_id;
    let (first, second) = (begin("snapshot"), begin("clone"));
    let listed = run(&server, &["operation", "list", "--output", "json"]).expect_success().json();
    let ids: Vec<&str> =
        listed.as_array().unwrap().iter().map(|one| one["operation_id"].as_str().unwrap()).collect();
    assert!(ids.len() == 2 && ids.contains(&first.as_str()), "{listed}");
    assert_eq!(listed[0]["state"], "running");
    let table = run(&server, &["operation", "list"]).expect_success().stdout;
    assert!(table.starts_with("ID ") && table.contains("v@s"), "{table}");
    let cancelled = run(&server, &["operation", "cancel", &first]).expect_success();
    assert_eq!(cancelled.stdout, format!("the snapshot operation {first} is cancelled\n"));
    run(&server, &["operation", "cancel", &first]).expect_success();
    let shown = run(&server, &["operation", "show", &first, "--output", "json"]).expect_success().json();
    assert_eq!((&shown["kind"], &shown["targets"][0]), (&"snapshot".into(), &"v@s".into()));
    // Until it has succeeded.
    while run(&server, &["operation", "show", &second, "--output", "json"]).expect_success().json()["state"]
        != "succeeded"
    {}
    run(&server, &["operation", "cancel", &second]).expect_failure(5, "has succeeded already", "v@s");
    let none = "00000000-0000-0000-0000-000000000009";
    run(&server, &["operation", "cancel", none]).expect_failure(3, "no operation", "list the operations");
}

#[test]
fn what_happens_on_the_server_is_printed_and_gone_on_with() {
    let server = FakeServer::start();
    let watched = run(&server, &["watch"]);
    let expected = "1 volume vol-1 present: 1G, unknown\n1 volume vol-1 deleted: 1G, unknown\n1 node node-1 created: version 2\n";
    assert_eq!((watched.exit_code, watched.stdout.as_str()), (Some(6), expected), "{watched:?}");
    let again = format!("go on where it ended: volctl watch --server {} --resume t3", server.uri());
    assert_eq!(watched.stderr, format!("volctl: stopping\n  next: {again}\n"));
    let watched = run(&server, &["watch", "--resume", "t1", "--kind", "snapshot,node", "--output", "json"]);
    let lines: Vec<serde_json::Value> =
        watched.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 1, "{watched:?}");
    assert_eq!((&lines[0]["resume_token"], &lines[0]["kind"]), (&"t3".into(), &"node".into()));
    assert_eq!(lines[0]["object"]["node_id"], "node-1");
    let again = " --output json --kind snapshot,node --resume t3\n";
    assert!(watched.stderr.ends_with(again), "{}", watched.stderr);
    run(&server, &["watch", "--resume", "old"]).expect_failure(2, "not kept", "watch anew");
    assert_eq!(run(&server, &["watch", "--kind", "disk"]).exit_code, Some(2));
}
