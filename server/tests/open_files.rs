//! A low limit of open files: volumes leave connections and the management API what they need, and are refused with the limit's name.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests; this one needs less.
mod client;
mod unit_filter;
mod volserver;

use std::path::Path;
use std::process::Command;

use proto::v1;

use client::Client;
use volserver::{Volserver, command, create_request, refused};

/// The server with this limit, soft and hard: it cannot raise it.
fn with_open_files(limit: u32, data_dir: &Path) -> Command {
    let mut inner = command(data_dir);
    inner.arg("--export-by-name");
    let mut limited = Command::new("/bin/sh");
    limited.args(["-c", &format!("ulimit -n {limit} && exec \"$@\""), "sh"]);
    limited.arg(inner.get_program());
    let arguments: Vec<_> = inner.get_args().map(ToOwned::to_owned).collect();
    // Each thread takes a descriptor of each volume.
    let threads = arguments.iter().position(|argument| argument == "--threads").unwrap();
    for (number, argument) in arguments.iter().enumerate() {
        if number == threads + 1 {
            limited.arg("4")
        } else {
            limited.arg(argument)
        };
    }
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    limited
}

async fn get(server: &Volserver, name: &str) -> v1::Volume {
    // A connection of its own each time.
    let request = v1::GetVolumeRequest { name: name.to_owned(), ..Default::default() };
    server.client().await.get_volume(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_leave_descriptors_for_connections_and_the_management_api() {
    const VOLUMES: usize = 60;
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start_with(with_open_files(256, &data_dir), &dir.path().join("log"));
    let name = |number: usize| format!("vol-{number}");
    let mut api = server.client().await;
    for number in 0..VOLUMES {
        api.create_volume(create_request(&name(number))).await.unwrap();
    }
    let (mut open, mut refusals) = (Vec::new(), Vec::new());
    for number in 0..VOLUMES {
        match Client::open(server.data[0], &name(number)) {
            Ok(client) => open.push((number, client)),
            Err(error) => refusals.push((number, error.to_string())),
        }
    }
    assert!(!open.is_empty() && !refusals.is_empty(), "{} are open: {refusals:?}", open.len());
    for (_, text) in &refusals {
        assert!(text.contains("open files") && text.contains("ulimit -n"), "{text}");
        assert!(text.contains("LimitNOFILE") && text.contains("--threads"), "{text}");
    }
    // What is open works, has room for more connections, and the API is there.
    for (number, client) in &mut open {
        client.write(0, &[7; 4096]).unwrap();
        client.flush().unwrap();
        let mut second = Client::open(server.data[0], &name(*number)).unwrap();
        assert_eq!(second.read(0, 4096).unwrap(), [7; 4096]);
    }
    let (refused_number, _) = refusals[0];
    assert_eq!(get(&server, &name(refused_number)).await.capacity_bytes, 1 << 20);
    assert!(server.log_with("a volume cannot be opened").contains("raise the server's limit"));

    // One that is deleted leaves its descriptors to another.
    let (gone, client) = open.remove(0);
    drop(client);
    assert!(Client::open(server.data[0], &name(refused_number)).is_err(), "it keeps them until then");
    let request = || v1::DeleteVolumeRequest { name: name(gone), ..Default::default() };
    while let Err(status) = api.delete_volume(request()).await {
        assert_eq!(status.code(), tonic::Code::FailedPrecondition, "its connection is still being closed");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    Client::open(server.data[0], &name(refused_number)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_limit_cuts_connections_down_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start_with(with_open_files(256, &data_dir), &dir.path().join("log"));
    server.log_with("the limit of open files allows fewer connections than --connections-max");
    server.client().await.create_volume(create_request("vol")).await.unwrap();
    let mut clients = Vec::new();
    let error = loop {
        match Client::open(server.data[0], "vol") {
            Ok(client) => clients.push(client),
            Err(error) => break error,
        }
        assert!(clients.len() < 256, "more connections than descriptors");
    };
    assert!(clients.len() >= 32, "{}: {error}", clients.len());
    assert!(error.to_string().contains("which is the limit (--connections-max)"), "{error}");
    // The API has its own.
    assert_eq!(get(&server, "vol").await.capacity_bytes, 1 << 20);
    assert!(!server.log().contains("cannot accept connections"), "{}", server.log());
}

#[test]
fn a_limit_that_leaves_too_little_is_named_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let (code, text) = refused(with_open_files(100, &dir.path().join("data")));
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("a limit of 100 open files is too little") && text.contains("ulimit -n"), "{text}");
}
