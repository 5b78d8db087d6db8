//! The formats of volctl's results, against the fake storage server: YAML says what JSON says, and a wide table goes on where the narrow
//! one ends.

use std::path::Path;

use proto::v1;
use serde::Deserialize as _;
use serde_json::Value;

use crate::fake_server::FakeServer;
use crate::launch::{Ended, volctl};

const NO_SOCKET: &str = "/nonexistent/volclient.sock";

fn run(server: &FakeServer, args: &[&str], output: &str) -> Ended {
    volctl(&server.uri(), Path::new(NO_SOCKET), &[args, &["--output", output]].concat())
}

/// Volumes, snapshots, a node and an operation.
fn with_everything() -> FakeServer {
    let server = FakeServer::start();
    for args in [
        &["create", "db", "--size=2G", "--label=tier=1", "--description=two\nlines", "--read-iops=5"][..],
        &["create", "web", "--size=1G", "--protect"],
        &["snapshot", "create", "db,web", "monday"],
    ] {
        run(&server, args, "table").expect_success();
    }
    let mut state = server.state.lock().unwrap();
    state.add_attachment("db", "node-1", 4);
    state.copies.begin("snapshot", vec!["v@s".to_owned()]);
    let labels = [("zone".to_owned(), "z1".to_owned())].into();
    // Never heard of, so that nothing depends on the clock.
    let node = v1::RegisteredNode { node_id: "node-1".to_owned(), labels, ..Default::default() };
    state.nodes.registered.insert(node.node_id.clone(), node);
    drop(state);
    server
}

const COMMANDS: [&[&str]; 7] = [
    &["list"],
    &["show", "db"],
    &["snapshot", "list"],
    &["snapshot", "show", "db", "monday"],
    &["node", "list"],
    &["node", "show", "node-1"],
    &["diff", "db@monday", "db"],
];

#[test]
fn yaml_says_what_json_says() {
    let server = with_everything();
    for command in COMMANDS {
        let json = run(&server, command, "json").expect_success().json();
        let yaml = run(&server, command, "yaml").expect_success().stdout;
        assert_eq!(yaml_serde::from_str::<Value>(&yaml).unwrap(), json, "{command:?}: {yaml}");
        assert!(!yaml.starts_with(['{', '[']), "{command:?}: {yaml}");
    }
    let yaml = run(&server, &["show", "db"], "yaml").stdout;
    assert!(yaml.contains("\nname: db\n") && yaml.contains("\ncapacity_bytes: 2147483648\n"), "{yaml}");
    assert!(yaml.contains("\nlabels:\n  tier: '1'\n"), "{yaml}");
}

#[test]
fn a_wide_table_goes_on_where_the_narrow_one_ends() {
    let server = with_everything();
    for (command, further) in [
        (
            &["list"][..],
            &["UID", "CREATED", "CONTENT", "LABELS", "tier=1", "two lines", "5 reads/s", "protected"][..],
        ),
        (&["snapshot", "list"], &["CONTENT", "VOLUME-UID"]),
        (&["operation", "list"], &["ENDED", "ERROR"]),
        (&["node", "list"], &["REGISTERED"]),
        (&["show", "db"], &["created:", "GENERATION", "BOOT"]),
        (&["snapshot", "show", "db", "monday"], &["content:"]),
    ] {
        let narrow = run(&server, command, "table").expect_success().stdout;
        let wide = run(&server, command, "wide").expect_success().stdout;
        assert!(further.iter().all(|word| wide.contains(word)), "{command:?}: {wide}");
        assert!(further.iter().any(|word| !narrow.contains(word)), "{command:?}: {narrow}");
        if command.contains(&"list") {
            assert_eq!(wide.lines().count(), narrow.lines().count());
            let goes_on = wide.lines().zip(narrow.lines()).all(|(wide, narrow)| wide.starts_with(narrow));
            assert!(goes_on, "{command:?}: {wide}{narrow}");
        }
    }
}

#[test]
fn what_is_watched_is_a_document_for_each_event() {
    let server = FakeServer::start();
    let watched = |output: &str| run(&server, &["watch"], output);
    let json: Vec<Value> =
        watched("json").stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let yaml = watched("yaml");
    assert!(yaml.stdout.starts_with("---\n"), "{yaml:?}");
    let documents = yaml_serde::Deserializer::from_str(&yaml.stdout);
    let documents: Vec<Value> = documents.map(|document| Value::deserialize(document).unwrap()).collect();
    assert_eq!((documents.len(), &documents), (4, &json));
    assert!(yaml.stderr.contains(" --output yaml --resume t3\n"), "{yaml:?}");
    assert_eq!(watched("wide").stdout, watched("table").stdout);
}

#[test]
fn a_file_that_is_wrong_is_refused_before_anybody_is_asked() {
    let server = with_everything();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("volumes.yaml");
    let path = file.to_str().unwrap();
    let apply = || volctl("http://127.0.0.1:9", Path::new(NO_SOCKET), &["apply", "-f", path]);
    for (text, what) in [
        ("- name: a\n  size: 1G\n- name: b\n  sizes: 1G\n", "unknown field `sizes`"),
        ("# nothing\n", "declares no volume"),
        ("name: a\nsize: 1GB\n", "`1GB`"),
    ] {
        std::fs::write(&file, text).unwrap();
        apply().expect_failure(2, what, "volctl apply --help");
    }
    assert!(apply().stderr.contains("volumes.yaml: size: `1GB`") && apply().stderr.contains(" at line 2 "));
    std::fs::remove_file(&file).unwrap();
    let missing = apply();
    assert!(missing.exit_code == Some(1) && missing.stderr.contains("cannot read"), "{missing:?}");
    // What is declared is not what is there.
    std::fs::write(&file, "- {name: new, size: 1G}\n- {name: db, size: 1G, block_size: 512}\n").unwrap();
    let refused = run(&server, &["apply", "--file", path], "table");
    refused.expect_failure(4, "its size is 2G, and 1G is declared", "nothing was changed");
    assert!(refused.stderr.contains("its block size is 4096, and 512 is declared"), "{refused:?}");
    assert!(!server.state.lock().unwrap().volumes.contains_key("new"), "nothing was changed");
}
