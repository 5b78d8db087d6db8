//! The management API over TLS, spoken to the real volserver: who is let in, and to what.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod tls_rig;
mod unit_filter;
mod volserver;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use proto::v1;
use proto::v1::management_client::ManagementClient;
use rustix::process::{Pid, Signal, kill_process};
use rustls::pki_types::ServerName;
use tls::certificates::client_config;
use tls::test_authority::Authority;
use tls_rig::{Rig, connect, is_forbidden};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;
use tonic_types::StatusExt as _;
use volserver::{Volserver, attach_request, create_request, refused};

#[tokio::test]
async fn each_certificate_may_call_what_it_names() {
    let rig = Rig::new();
    let server = rig.start("required");
    let manager = rig.client("manager", &["volnode:manage"]);
    let mut manager = connect(server.management, &manager).await.unwrap();
    for name in ["vol-1", "vol-2"] {
        manager.create_volume(create_request(name)).await.unwrap();
    }
    manager.attach_volume(attach_request("vol-2", "node-2", false)).await.unwrap();
    assert_eq!(
        manager.list_volumes(v1::ListVolumesRequest::default()).await.unwrap().get_ref().volumes.len(),
        2
    );

    let node = rig.client("node", &["volnode:node/node-1"]);
    let mut node = connect(server.management, &node).await.unwrap();
    node.get_server_info(v1::GetServerInfoRequest {}).await.unwrap();
    let attached = node.attach_volume(attach_request("vol-1", "node-1", false)).await.unwrap().into_inner();
    let mine = v1::ListAttachmentsRequest { node_id: "node-1".into(), ..Default::default() };
    assert_eq!(node.list_attachments(mine).await.unwrap().get_ref().attachments.len(), 1);

    let registration = v1::RegisterNodeRequest { node_id: "node-1".into(), ..Default::default() };
    assert_eq!(node.register_node(registration).await.unwrap().get_ref().node_id, "node-1");

    // Not for another node, not by force, and nothing that is about volumes.
    let theirs = manager.list_attachments(v1::ListAttachmentsRequest::default()).await.unwrap().into_inner();
    let theirs = theirs.attachments.into_iter().find(|one| one.node_id == "node-2").unwrap().attachment_id;
    let by_id = |attachment_id: &str| v1::DetachVolumeRequest {
        attachment_id: attachment_id.into(),
        ..Default::default()
    };
    let by_name = v1::DetachVolumeRequest { volume_name: "vol-2".into(), ..Default::default() };
    let refusals = [
        node.attach_volume(attach_request("vol-1", "node-2", false)).await.unwrap_err(),
        node.attach_volume(attach_request("vol-2", "node-1", true)).await.unwrap_err(),
        node.detach_volume(by_id(&theirs)).await.unwrap_err(),
        node.detach_volume(by_name).await.unwrap_err(),
        node.list_attachments(v1::ListAttachmentsRequest::default()).await.unwrap_err(),
        node.create_volume(create_request("vol-3")).await.unwrap_err(),
        node.get_volume(v1::GetVolumeRequest::default()).await.unwrap_err(),
        node.list_volumes(v1::ListVolumesRequest::default()).await.unwrap_err(),
        node.rename_volume(v1::RenameVolumeRequest::default()).await.unwrap_err(),
        node.create_snapshot(v1::CreateSnapshotRequest::default()).await.unwrap_err(),
        node.get_snapshot(v1::GetSnapshotRequest::default()).await.unwrap_err(),
        node.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap_err(),
        node.delete_snapshot(v1::DeleteSnapshotRequest::default()).await.unwrap_err(),
        node.restore_volume(v1::RestoreVolumeRequest::default()).await.unwrap_err(),
        node.clone_volume(v1::CloneVolumeRequest::default()).await.unwrap_err(),
        node.get_operation(v1::GetOperationRequest::default()).await.unwrap_err(),
        node.list_operations(v1::ListOperationsRequest::default()).await.unwrap_err(),
        node.cancel_operation(v1::CancelOperationRequest::default()).await.unwrap_err(),
        node.mark_snapshots_frozen(v1::MarkSnapshotsFrozenRequest::default()).await.unwrap_err(),
        node.register_node(v1::RegisterNodeRequest { node_id: "node-2".into(), ..Default::default() })
            .await
            .unwrap_err(),
        node.heartbeat(v1::HeartbeatRequest { node_id: "node-2".into(), ..Default::default() })
            .await
            .unwrap_err(),
        node.get_node(v1::GetNodeRequest { node_id: "node-2".into() }).await.unwrap_err(),
        node.create_grant(granted("vol-1", "node-1")).await.unwrap_err(),
        node.delete_grant(withdrawn("vol-1", "node-1")).await.unwrap_err(),
        node.list_grants(v1::ListGrantsRequest::default()).await.unwrap_err(),
        node.list_grants(v1::ListGrantsRequest { node_id: "node-2".into(), ..Default::default() })
            .await
            .unwrap_err(),
        node.list_nodes(v1::ListNodesRequest::default()).await.unwrap_err(),
        node.delete_node(forgotten("node-1")).await.unwrap_err(),
        node.delete_volume(v1::DeleteVolumeRequest { name: "vol-1".into(), ..Default::default() })
            .await
            .unwrap_err(),
        node.watch(v1::WatchRequest::default()).await.unwrap_err(),
    ];
    for (number, refused) in refusals.iter().enumerate() {
        assert!(is_forbidden(refused), "{number}: {refused:?}");
    }
    let own = attached.attachment.unwrap().attachment_id;
    assert!(node.detach_volume(by_id(&own)).await.unwrap().get_ref().existed);

    let other = rig.client("other", &["volnode:volume/vol-1"]);
    let mut other = connect(server.management, &other).await.unwrap();
    let refused = other.attach_volume(attach_request("vol-1", "node-1", false)).await.unwrap_err();
    assert!(is_forbidden(&refused), "{refused:?}");
}

fn withdrawn(volume_name: &str, node_id: &str) -> v1::DeleteGrantRequest {
    let (volume_name, node_id) = (volume_name.to_owned(), node_id.to_owned());
    v1::DeleteGrantRequest { volume_name, node_id, ..Default::default() }
}

fn forgotten(node_id: &str) -> v1::DeleteNodeRequest {
    v1::DeleteNodeRequest { node_id: node_id.to_owned(), ..Default::default() }
}

fn granted(volume_name: &str, node_id: &str) -> v1::CreateGrantRequest {
    v1::CreateGrantRequest {
        volume_name: volume_name.into(),
        node_id: node_id.into(),
        ..v1::CreateGrantRequest::default()
    }
}

#[tokio::test]
async fn a_certificate_for_what_is_granted_attaches_nothing_else() {
    let rig = Rig::new();
    let server = rig.start("required");
    let manager = rig.client("manager", &["volnode:manage"]);
    let mut manager = connect(server.management, &manager).await.unwrap();
    for name in ["vol-1", "vol-2"] {
        manager.create_volume(create_request(name)).await.unwrap();
    }
    manager.create_grant(granted("vol-1", "node-1")).await.unwrap();
    manager.create_grant(granted("vol-2", "node-2")).await.unwrap();
    let node = rig.client("node", &["volnode:granted/node-1"]);
    let mut node = connect(server.management, &node).await.unwrap();
    let registration = v1::RegisterNodeRequest { node_id: "node-1".into(), ..Default::default() };
    node.register_node(registration).await.unwrap();
    // Whatever it asks for.
    for only_if_granted in [false, true] {
        let request = v1::AttachVolumeRequest { only_if_granted, ..attach_request("vol-2", "node-1", false) };
        let refused = node.attach_volume(request).await.unwrap_err();
        let reason = refused.get_details_error_info().map(|info| info.reason);
        assert_eq!(reason.as_deref(), Some(reason::VOLUME_NOT_GRANTED), "{refused:?}");
    }
    let attached = node.attach_volume(attach_request("vol-1", "node-1", false)).await.unwrap().into_inner();
    assert!(!attached.secret.is_empty());
    let mine = v1::ListGrantsRequest { node_id: "node-1".into(), ..Default::default() };
    let listed = node.list_grants(mine).await.unwrap().into_inner().grants;
    assert_eq!(listed.iter().map(|one| one.volume_name.as_str()).collect::<Vec<_>>(), ["vol-1"]);
    for refused in [
        node.attach_volume(attach_request("vol-1", "node-1", true)).await.unwrap_err(),
        node.attach_volume(attach_request("vol-2", "node-2", false)).await.unwrap_err(),
        node.create_grant(granted("vol-2", "node-1")).await.unwrap_err(),
        node.list_volumes(v1::ListVolumesRequest::default()).await.unwrap_err(),
    ] {
        assert!(is_forbidden(&refused), "{refused:?}");
    }
    let detach = v1::DetachVolumeRequest {
        volume_name: "vol-1".into(),
        node_id: "node-1".into(),
        ..Default::default()
    };
    assert!(node.detach_volume(detach).await.unwrap().into_inner().existed);
}

#[tokio::test]
async fn nobody_gets_in_without_a_good_certificate() {
    let rig = Rig::new();
    let server = rig.start("required");
    let good = rig.client("good", &["volnode:*"]);
    let stranger = Authority::new().issue(&rig.dir.path().join("stranger"), &["volnode:*"]);
    let expired = rig.authority.issue_expired(&rig.dir.path().join("expired"), &["volnode:*"]);
    // The stranger does not believe the server, either: only the server's refusal is of interest.
    std::fs::copy(good.authority(), stranger.authority()).unwrap();
    for client in [&stranger, &expired] {
        let refused = match connect(server.management, client).await {
            // In TLS 1.3 the client learns of the refusal after its own handshake.
            Ok(mut client) => client.get_server_info(v1::GetServerInfoRequest {}).await.is_err(),
            Err(_) => true,
        };
        assert!(refused, "{client:?}");
    }
    let plain = Endpoint::from_shared(format!("http://{}", server.management)).unwrap();
    let refused = match plain.connect().await {
        Ok(channel) => {
            ManagementClient::new(channel).get_server_info(v1::GetServerInfoRequest {}).await.is_err()
        }
        Err(_) => true,
    };
    assert!(refused, "the API was spoken to in plain");
    let mut good = connect(server.management, &good).await.unwrap();
    good.list_volumes(v1::ListVolumesRequest::default()).await.unwrap();
}

#[tokio::test]
async fn where_tls_is_allowed_the_first_byte_decides() {
    let rig = Rig::new();
    let server = rig.start("allowed");
    server.client().await.create_volume(create_request("vol-1")).await.unwrap();
    let client = rig.client("client", &["volnode:node/node-1"]);
    let mut client = connect(server.management, &client).await.unwrap();
    let refused = client.create_volume(create_request("vol-2")).await.unwrap_err();
    assert!(is_forbidden(&refused), "who shows a certificate is held to it: {refused:?}");
    server.log_with("not restricted");
}

/// Nothing of a TLS handshake, or the head of its first record: more of them than the API keeps of one caller.
#[tokio::test]
async fn handshakes_that_do_not_go_on_keep_nobody_out() {
    const SILENT: usize = 400;
    for mode in ["required", "allowed"] {
        let rig = Rig::new();
        let server = rig.start(mode);
        let mut silent = Vec::new();
        for number in 0..SILENT {
            let mut socket = TcpStream::connect(server.management).await.unwrap();
            if number % 2 == 0 {
                socket.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
            }
            silent.push(socket);
        }
        let began = Instant::now();
        let manager = rig.client("manager", &["volnode:manage"]);
        let mut manager = connect(server.management, &manager).await.unwrap();
        manager.create_volume(create_request("vol-1")).await.unwrap();
        // Well before their time is up.
        assert!(began.elapsed() < Duration::from_secs(8), "{mode}: {:?}", began.elapsed());
        // Those that make room are told at once, and take a moment to go.
        loop {
            let mut open = 0;
            for socket in &mut silent {
                let ended = tokio::time::timeout(Duration::from_millis(1), socket.read(&mut [0; 64])).await;
                open += usize::from(ended.is_err());
            }
            if open <= 128 {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(9), "{mode}: {open} of one address are let in");
        }
    }
}

#[tokio::test]
async fn a_hangup_brings_new_certificates() {
    let rig = Rig::new();
    let server = rig.start("required");
    let old = rig.client("old", &["volnode:*"]);
    let mut kept = connect(server.management, &old).await.unwrap();
    kept.get_server_info(v1::GetServerInfoRequest {}).await.unwrap();

    let new_authority = Authority::new();
    new_authority.issue(&rig.dir.path().join("server"), &[]);
    let new = new_authority.issue(&rig.dir.path().join("new"), &["volnode:*"]);
    let pid = Pid::from_raw(server.pid() as i32).unwrap();
    kill_process(pid, Signal::HUP).unwrap();
    let deadline = Instant::now() + volserver::DEADLINE;
    let mut client = loop {
        match connect(server.management, &new).await {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < deadline, "the new certificates are not taken: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap();
    // The connection from before stays.
    kept.get_server_info(v1::GetServerInfoRequest {}).await.unwrap();

    // What cannot be used leaves everything as it is.
    std::fs::write(rig.files.pair().certificate, "nothing").unwrap();
    kill_process(pid, Signal::HUP).unwrap();
    while !server.log().contains("stay in use") {
        assert!(Instant::now() < deadline, "the log does not tell: {}", server.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    connect(server.management, &new).await.unwrap();
}

#[tokio::test]
async fn each_call_has_a_line_in_the_audit_log_and_no_secret_is_in_it() {
    let rig = Rig::new();
    let (path, moved) = (rig.dir.path().join("audit.jsonl"), rig.dir.path().join("audit.jsonl.1"));
    let mut command = rig.command("required");
    command.arg("--audit-log").arg(&path);
    let server = Volserver::start_with(command, &rig.dir.path().join("log"));
    let (node, manager) =
        (rig.client("node", &["volnode:node/node-1"]), rig.client("manager", &["volnode:*"]));
    let mut node = connect(server.management, &node).await.unwrap();
    let mut manager = connect(server.management, &manager).await.unwrap();
    assert!(is_forbidden(&node.create_volume(create_request("vol-1")).await.unwrap_err()));
    manager.create_volume(create_request("vol-1")).await.unwrap();
    let lines = |path: &Path| -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let deadline = Instant::now() + volserver::DEADLINE;
    while lines(&path).len() < 2 {
        assert!(Instant::now() < deadline, "{:?}", lines(&path));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    std::fs::rename(&path, &moved).unwrap();
    kill_process(Pid::from_raw(server.pid() as i32).unwrap(), Signal::HUP).unwrap();
    while !path.exists() {
        assert!(Instant::now() < deadline, "the file is not opened anew: {}", server.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let attached = node.attach_volume(attach_request("vol-1", "node-1", false)).await.unwrap().into_inner();
    assert_eq!(server.stop(Signal::TERM).code(), Some(0));

    let told = |line: &serde_json::Value| {
        let of = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
        let name = line["caller"]["certificate_names"][0].as_str().unwrap_or_default();
        format!("{} {}{} by {name}: {}", of("call"), of("name"), of("volume_name"), of("code"))
    };
    let before: Vec<String> = lines(&moved).iter().map(told).collect();
    assert_eq!(
        before,
        [
            "CreateVolume vol-1 by volnode:node/node-1: PERMISSION_DENIED",
            "CreateVolume vol-1 by volnode:*: OK"
        ]
    );
    let after = lines(&path);
    assert_eq!(after.iter().map(told).collect::<Vec<_>>(), ["AttachVolume vol-1 by volnode:node/node-1: OK"]);
    let line = &after[0];
    assert_eq!(line["caller"]["certificate_sha256"].as_str().map(str::len), Some(64), "{line}");
    assert!(line["from"].as_str().is_some_and(|from| from.starts_with("127.0.0.1:")), "{line}");
    assert_eq!(line["node_id"], "node-1");
    assert!(!attached.secret.is_empty());
    for path in [&path, &moved] {
        assert!(!std::fs::read_to_string(path).unwrap().contains(&attached.secret));
    }
}

#[test]
fn files_that_cannot_be_used_are_told_at_the_start() {
    let rig = Rig::new();
    let start = |file: &Path| {
        std::fs::write(file, "nothing").unwrap();
        refused(rig.command("required"))
    };
    let (code, stderr) = start(&rig.files.pair().certificate);
    assert!(code == 2 && stderr.contains("server-cert.pem"), "{code} {stderr}");
    let (code, stderr) = start(&rig.files.authority());
    assert!(code == 2 && stderr.contains("ca-cert.pem"), "{code} {stderr}");
    let rig = Rig::new();
    let other = rig.client("other", &[]);
    std::fs::copy(other.pair().key, rig.files.pair().key).unwrap();
    let (code, stderr) = refused(rig.command("required"));
    assert!(
        code == 2 && stderr.contains("this certificate is not for the private key in"),
        "{code} {stderr}"
    );
}

/// However much it has said before it hears of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_whose_certificate_is_refused_always_hears_why() {
    let rig = Rig::new();
    let server = rig.start("required");
    let stranger = Authority::new().issue(&rig.dir.path().join("stranger"), &[]);
    let mut config = client_config(&rig.files.authority(), Some(&stranger.pair())).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    for _ in 0..30 {
        let socket = TcpStream::connect(server.management).await.unwrap();
        let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), socket).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.ok();
        let error = stream.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert!(error.to_string().contains("UnknownCA"), "{error}");
    }
    let log = server.log_with("a TLS handshake of the management API fails");
    assert!(log.contains("issued by none of the authorities that are trusted here"), "{log}");
}

/// It serves all the same: not every client looks at everything.
#[test]
fn a_server_whose_certificate_clients_refuse_says_so_at_the_start() {
    let mut rig = Rig::new();
    rig.files = rig.authority.issue_with(&rig.dir.path().join("bad"), &[], |made| {
        made.not_after = tls::test_authority::rcgen::date_time_ymd(2002, 1, 1);
        made.subject_alt_names.clear();
    });
    let server = rig.start("required");
    let log = server.log_with("common name (CN) does not count");
    assert!(
        log.contains("server-cert.pem: the certificate expired") && log.contains("have it issued anew"),
        "{log}"
    );
}

#[test]
fn with_tls_and_client_certificates_addresses_beyond_loopback_are_no_danger() {
    let rig = Rig::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_volserver"));
    let rigged = rig.command("required");
    // What the rig took away is not to come back.
    for (name, value) in rigged.get_envs().filter(|(name, _)| *name != "VOLSERVER_INSECURE") {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    for argument in rigged.get_args() {
        command.arg(argument.to_string_lossy().replace("127.0.0.1:0", "0.0.0.0:0"));
    }
    let server = Volserver::start_with(command, &rig.dir.path().join("log"));
    assert!(server.management.ip().is_unspecified() && !server.log().contains("--insecure"));
}
