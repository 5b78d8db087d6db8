//! `volctl tenant`, and names in a tenant's name space, against the fake storage server.

use std::path::Path;

use crate::fake_server::FakeServer;
use crate::launch::{Ended, volctl};

const NO_SOCKET: &str = "/nonexistent/volclient.sock";

fn run(server: &FakeServer, args: &[&str]) -> Ended {
    volctl(&server.uri(), Path::new(NO_SOCKET), args)
}

#[test]
fn limits_are_set_one_by_one_shown_and_taken_away() {
    let server = FakeServer::start();
    let set = run(&server, &["tenant", "set", "acme", "--max-volumes", "5", "--max-bytes", "10G"]);
    assert_eq!(
        set.expect_success().stdout,
        "tenant acme\n  volumes: 0 of 5\n  size: 0 of 10G\n  snapshots: 0\n"
    );
    run(&server, &["create", "acme+db", "--size", "2G"]).expect_success();
    // What is left out stays.
    run(&server, &["tenant", "set", "acme", "--max-snapshots=0", "--max-volumes=none"]).expect_success();
    assert_eq!(
        run(&server, &["tenant", "show", "acme"]).expect_success().stdout,
        "tenant acme\n  volumes: 1\n  size: 2G of 10G\n  snapshots: 0 of 0\n"
    );
    let json = run(&server, &["tenant", "show", "acme", "--output", "json"]).expect_success().json();
    assert_eq!(json["quota"]["max_volumes"], serde_json::Value::Null);
    assert_eq!((&json["quota"]["max_snapshots"], &json["capacity_bytes"]), (&0.into(), &(2u64 << 30).into()));
    run(&server, &["tenant", "delete", "acme"]).expect_failure(
        5,
        "the tenant acme has volumes: 1",
        "delete its volumes and snapshots first",
    );
    run(&server, &["delete", "acme+db"]).expect_success();
    assert_eq!(run(&server, &["tenant", "delete", "acme"]).expect_success().stdout, "deleted acme\n");
    assert_eq!(
        run(&server, &["tenant", "delete", "acme"]).expect_success().stdout,
        "there is no tenant acme\n"
    );
    run(&server, &["tenant", "show", "acme"]).expect_failure(
        3,
        "there is no tenant acme",
        "list the tenants",
    );
    run(&server, &["tenant", "set", "acme"]).expect_failure(2, "no limit is named", "--max-volumes");
}

#[test]
fn tenants_are_listed_through_every_page() {
    let server = FakeServer::start();
    for name in ["a", "b", "c"] {
        run(&server, &["tenant", "set", name, "--max-volumes=3"]).expect_success();
    }
    run(&server, &["create", "b+db", "--size", "2G"]).expect_success();
    let listed = run(&server, &["tenant", "list"]).expect_success().stdout;
    let expected = "TENANT  VOLUMES  SIZE  SNAPSHOTS\n\
                    a       0 of 3   0     0\n\
                    b       1 of 3   2G    0\n\
                    c       0 of 3   0     0\n";
    assert_eq!(listed, expected);
    let json = run(&server, &["tenant", "list", "--output", "json"]).expect_success().json();
    assert_eq!(json.as_array().map(Vec::len), Some(3));
}

#[test]
fn a_tenant_s_names_go_wherever_names_do() {
    let server = FakeServer::start();
    run(&server, &["create", "acme+db", "--size", "2G"]).expect_success();
    run(&server, &["grant", "create", "acme+db", "node-a", "--unregistered"]).expect_success();
    let shown = run(&server, &["show", "acme+db"]).expect_success().stdout;
    assert!(shown.contains("acme+db") && shown.contains("node-a"), "{shown}");
    run(&server, &["rename", "acme+db", "acme+db-2"]).expect_success();
    assert!(run(&server, &["list"]).expect_success().stdout.contains("acme+db-2"));
}
