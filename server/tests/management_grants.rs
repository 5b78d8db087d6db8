//! Grants through the management API of the real volserver: who may attach what, over restarts and kills.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod choices;
mod unit_filter;
mod volserver;

use std::time::Duration;

use choices::Choices;
use proto::error_reason as reason;
use proto::v1::{self, management_client::ManagementClient};
use rustix::process::Signal;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use volserver::{Volserver, attach_request, create_request};

type Client = ManagementClient<Channel>;

fn grant_request(volume_name: &str, node_id: &str, read_only: bool) -> v1::CreateGrantRequest {
    let (volume_name, node_id) = (volume_name.to_owned(), node_id.to_owned());
    v1::CreateGrantRequest {
        volume_name,
        node_id,
        read_only,
        node_must_be_registered: false,
        ..Default::default()
    }
}

async fn grant(
    client: &mut Client,
    volume_name: &str,
    node_id: &str,
    read_only: bool,
) -> Result<v1::Grant, Status> {
    let made = client.create_grant(grant_request(volume_name, node_id, read_only)).await;
    made.map(tonic::Response::into_inner)
}

async fn withdraw(
    client: &mut Client,
    volume_name: &str,
    node_id: &str,
) -> Result<v1::DeleteGrantResponse, Status> {
    let request = v1::DeleteGrantRequest {
        volume_name: volume_name.to_owned(),
        node_id: node_id.to_owned(),
        ..Default::default()
    };
    client.delete_grant(request).await.map(tonic::Response::into_inner)
}

fn under_grant(volume_name: &str, node_id: &str) -> v1::AttachVolumeRequest {
    v1::AttachVolumeRequest { only_if_granted: true, ..attach_request(volume_name, node_id, false) }
}

async fn volume(client: &mut Client, name: &str) -> v1::Volume {
    client
        .get_volume(v1::GetVolumeRequest { name: name.to_owned(), ..Default::default() })
        .await
        .unwrap()
        .into_inner()
}

/// Code, reason and, where it is told, the node.
fn told(status: &Status) -> (Code, String, String) {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert!(info.metadata.contains_key(reason::METADATA_NEXT), "{info:?}");
    (status.code(), info.reason, info.metadata.get("node_id").cloned().unwrap_or_default())
}

fn is(code: Code, word: &str, node_id: &str) -> (Code, String, String) {
    (code, word.to_owned(), node_id.to_owned())
}

#[tokio::test]
async fn grants_go_by_uid_and_outlive_renames_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    let uid = client.create_volume(create_request("vol-1")).await.unwrap().into_inner().volume_uid;
    let made = grant(&mut client, "vol-1", "node-a", false).await.unwrap();
    assert_eq!((made.volume_name.as_str(), &made.volume_uid), ("vol-1", &uid));
    assert!(made.created_at_ms > 0 && !made.read_only);
    let by_uid = format!("uid:{uid}");
    assert_eq!(grant(&mut client, &by_uid, "node-a", false).await.unwrap(), made, "it may be repeated");
    let differs = grant(&mut client, "vol-1", "node-a", true).await.unwrap_err();
    assert_eq!(told(&differs), is(Code::AlreadyExists, reason::GRANTED_DIFFERENTLY, "node-a"));
    let second = grant(&mut client, "vol-1", "node-b", false).await.unwrap_err();
    assert_eq!(told(&second), is(Code::FailedPrecondition, reason::VOLUME_GRANTED, "node-a"));
    let rename = v1::RenameVolumeRequest {
        name: "vol-1".to_owned(),
        new_name: "vol-2".to_owned(),
        ..Default::default()
    };
    client.rename_volume(rename).await.unwrap();
    server.kill();

    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    let renamed = v1::Grant { volume_name: "vol-2".to_owned(), ..made };
    assert_eq!(volume(&mut client, "vol-2").await.grants, [renamed]);
    let attached = client.attach_volume(under_grant("vol-2", "node-a")).await.unwrap().into_inner();
    assert!(!attached.existed && !attached.secret.is_empty());
    let delete = v1::DeleteVolumeRequest { name: "vol-2".to_owned(), ..Default::default() };
    let detach = v1::DetachVolumeRequest { volume_name: "vol-2".to_owned(), ..Default::default() };
    client.detach_volume(detach).await.unwrap();
    let refused = client.delete_volume(delete.clone()).await.unwrap_err();
    assert_eq!(told(&refused), is(Code::FailedPrecondition, reason::VOLUME_GRANTED, "node-a"));
    let ended = withdraw(&mut client, &by_uid, "node-a").await.unwrap();
    assert_eq!((ended.existed, ended.was_attached), (true, false));
    assert!(client.delete_volume(delete).await.unwrap().into_inner().existed);
    for gone in ["vol-2", &by_uid] {
        assert_eq!(withdraw(&mut client, gone, "node-a").await.unwrap(), v1::DeleteGrantResponse::default());
        let refused = grant(&mut client, gone, "node-a", false).await.unwrap_err();
        assert_eq!(told(&refused), is(Code::NotFound, reason::VOLUME_NOT_FOUND, ""));
    }
    server.stop(Signal::TERM);
}

#[tokio::test]
async fn an_attach_that_asks_for_a_grant_needs_one_and_a_late_one_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    client.create_volume(create_request("vol-1")).await.unwrap();
    let not_granted = is(Code::FailedPrecondition, reason::VOLUME_NOT_GRANTED, "node-a");
    let refused = client.attach_volume(under_grant("vol-1", "node-a")).await.unwrap_err();
    assert_eq!(told(&refused), not_granted);
    grant(&mut client, "vol-1", "node-a", false).await.unwrap();
    let attached = client.attach_volume(under_grant("vol-1", "node-a")).await.unwrap().into_inner();
    let again = client.attach_volume(under_grant("vol-1", "node-a")).await.unwrap().into_inner();
    assert!(again.existed && again.secret == attached.secret);
    // The other node has the grant of nobody, by force neither.
    for force in [false, true] {
        let request = v1::AttachVolumeRequest { force, ..under_grant("vol-1", "node-b") };
        let refused = client.attach_volume(request).await.unwrap_err();
        assert_eq!(told(&refused), is(Code::FailedPrecondition, reason::VOLUME_NOT_GRANTED, "node-b"));
    }
    let ended = withdraw(&mut client, "vol-1", "node-a").await.unwrap();
    assert_eq!((ended.existed, ended.was_attached), (true, true));
    let found = volume(&mut client, "vol-1").await;
    assert_eq!((found.attachments, found.grants), (vec![], vec![]));
    let late = client.attach_volume(under_grant("vol-1", "node-a")).await.unwrap_err();
    assert_eq!(told(&late), not_granted);
    assert_eq!(withdraw(&mut client, "vol-1", "node-a").await.unwrap(), v1::DeleteGrantResponse::default());
    // Read-only is read-only.
    grant(&mut client, "vol-1", "node-a", true).await.unwrap();
    let writes = client.attach_volume(under_grant("vol-1", "node-a")).await.unwrap_err();
    assert_eq!(told(&writes), not_granted);
    grant(&mut client, "vol-1", "node-b", true).await.unwrap();
    for node_id in ["node-a", "node-b"] {
        let access_mode = v1::AccessMode::MultiNodeReaderOnly.into();
        let request = v1::AttachVolumeRequest { access_mode, ..under_grant("vol-1", node_id) };
        client.attach_volume(request).await.unwrap();
    }
    // Who attached without one is ended as well.
    withdraw(&mut client, "vol-1", "node-a").await.unwrap();
    withdraw(&mut client, "vol-1", "node-b").await.unwrap();
    client.attach_volume(attach_request("vol-1", "node-a", false)).await.unwrap();
    let refused = client.attach_volume(under_grant("vol-1", "node-a")).await.unwrap_err();
    assert_eq!(told(&refused), not_granted, "what it holds is no grant");
    assert!(withdraw(&mut client, "vol-1", "node-a").await.unwrap().was_attached);
    assert_eq!(volume(&mut client, "vol-1").await.attachments, []);
}

#[tokio::test]
async fn grants_are_listed_by_volume_and_node_and_fields_are_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    for name in ["vol-1", "vol-2"] {
        client.create_volume(create_request(name)).await.unwrap();
        for node_id in ["10.0.0.1/x", "node-a", "node-b"] {
            grant(&mut client, name, node_id, true).await.unwrap();
        }
    }
    let mut listed = Vec::new();
    let mut request = v1::ListGrantsRequest { page_size: 4, ..Default::default() };
    loop {
        let page = client.list_grants(request.clone()).await.unwrap().into_inner();
        assert!(page.grants.len() <= 4);
        listed
            .extend(page.grants.into_iter().map(|grant| format!("{} {}", grant.volume_name, grant.node_id)));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let nodes = ["10.0.0.1/x", "node-a", "node-b"];
    let expected: Vec<String> =
        ["vol-1", "vol-2"].iter().flat_map(|name| nodes.map(|node_id| format!("{name} {node_id}"))).collect();
    assert_eq!(listed, expected);
    let uid = volume(&mut client, "vol-2").await.volume_uid;
    for volume_name in ["vol-2".to_owned(), format!("uid:{uid}")] {
        let one = v1::ListGrantsRequest { volume_name, node_id: "node-a".to_owned(), ..Default::default() };
        let found = client.list_grants(one).await.unwrap().into_inner().grants;
        assert_eq!(found.iter().map(|grant| grant.volume_uid.as_str()).collect::<Vec<_>>(), [uid.as_str()]);
    }
    let unknown = v1::ListGrantsRequest { volume_name: "vol-3".to_owned(), ..Default::default() };
    assert_eq!(client.list_grants(unknown).await.unwrap().into_inner().grants, []);
    for (volume_name, node_id) in [("", "n"), ("a/b", "n"), ("vol-1@s", "n"), ("vol-1", ""), ("vol-1", "a b")]
    {
        let refused = grant(&mut client, volume_name, node_id, false).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{volume_name} {node_id}");
        let refused = withdraw(&mut client, volume_name, node_id).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{volume_name} {node_id}");
    }
    let other = v1::ListVolumesRequest { page_token: request.page_token, ..Default::default() };
    assert_eq!(client.list_volumes(other).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_controller_grants_to_nodes_that_are_known_and_they_stay() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    client.create_volume(create_request("vol-1")).await.unwrap();
    let request =
        v1::CreateGrantRequest { node_must_be_registered: true, ..grant_request("vol-1", "node-a", false) };
    let refused = client.create_grant(request.clone()).await.unwrap_err();
    assert_eq!(told(&refused), is(Code::NotFound, reason::NODE_NOT_FOUND, ""));
    let registration = v1::RegisterNodeRequest { node_id: "node-a".to_owned(), ..Default::default() };
    client.register_node(registration).await.unwrap();
    client.create_grant(request).await.unwrap();
    let delete = v1::DeleteNodeRequest { node_id: "node-a".to_owned(), ..Default::default() };
    let refused = client.delete_node(delete.clone()).await.unwrap_err();
    assert_eq!(told(&refused), is(Code::FailedPrecondition, reason::NODE_GRANTED, ""));
    withdraw(&mut client, "vol-1", "node-a").await.unwrap();
    assert!(client.delete_node(delete).await.unwrap().into_inner().existed);
}

async fn register(client: &mut Client, node_id: &str, max_volumes: u32) {
    let request = v1::RegisterNodeRequest { node_id: node_id.to_owned(), max_volumes, ..Default::default() };
    assert_eq!(client.register_node(request).await.unwrap().into_inner().max_volumes, max_volumes);
}

#[tokio::test]
async fn a_node_is_granted_as_many_volumes_as_it_can_have_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    for number in 1..=4 {
        client.create_volume(create_request(&format!("vol-{number}"))).await.unwrap();
    }
    register(&mut client, "node-a", 3).await;
    grant(&mut client, "vol-1", "node-a", false).await.unwrap();
    // What it has without a grant is a disk there as well; and a volume that it has is not counted twice.
    client.attach_volume(attach_request("vol-2", "node-a", false)).await.unwrap();
    client.attach_volume(under_grant("vol-1", "node-a")).await.unwrap();
    grant(&mut client, "vol-3", "node-a", false).await.unwrap();
    grant(&mut client, "vol-2", "node-a", false).await.unwrap();
    let full = is(Code::ResourceExhausted, reason::NODE_FULL, "node-a");
    let refused = grant(&mut client, "vol-4", "node-a", false).await.unwrap_err();
    assert_eq!(told(&refused), full);
    assert!(refused.message().contains("node-a has 3 volumes, and can have 3"), "{refused}");
    // What it was granted before is found again.
    grant(&mut client, "vol-3", "node-a", false).await.unwrap();
    // Other nodes are not bound: by a limit of their own, or by none, registered or not.
    register(&mut client, "node-b", 0).await;
    grant(&mut client, "vol-4", "node-b", false).await.unwrap();
    withdraw(&mut client, "vol-4", "node-b").await.unwrap();
    grant(&mut client, "vol-4", "node-c", false).await.unwrap();
    withdraw(&mut client, "vol-4", "node-c").await.unwrap();
    server.kill();

    // It is kept; and what it says next holds from then on, also where it has more already.
    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    assert_eq!(told(&grant(&mut client, "vol-4", "node-a", false).await.unwrap_err()), full);
    let listed = client.list_nodes(v1::ListNodesRequest::default()).await.unwrap().into_inner();
    let limits: Vec<(String, u32)> =
        listed.nodes.into_iter().map(|node| (node.node_id, node.max_volumes)).collect();
    assert_eq!(limits, [("node-a".to_owned(), 3), ("node-b".to_owned(), 0)]);
    register(&mut client, "node-a", 1).await;
    let refused = grant(&mut client, "vol-4", "node-a", false).await.unwrap_err();
    assert!(refused.message().contains("has 3 volumes, and can have 1"), "{refused}");
    register(&mut client, "node-a", 4).await;
    grant(&mut client, "vol-4", "node-a", false).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_grants_to_a_node_at_once_no_more_are_made_than_it_can_have() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    register(&mut client, "node-a", 3).await;
    for number in 0..12 {
        client.create_volume(create_request(&format!("vol-{number}"))).await.unwrap();
    }
    let granting: Vec<_> = (0..12)
        .map(|number| {
            let mut client = client.clone();
            tokio::spawn(async move { grant(&mut client, &format!("vol-{number}"), "node-a", false).await })
        })
        .collect();
    let mut given = 0;
    for grant in granting {
        match grant.await.unwrap() {
            Ok(_) => given += 1,
            Err(refused) => {
                assert_eq!(told(&refused), is(Code::ResourceExhausted, reason::NODE_FULL, "node-a"))
            }
        }
    }
    assert_eq!(given, 3);
}

/// Whatever comes first: when the grant's deletion is answered, the node has nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_an_attach_and_the_deletion_of_its_grant_at_once_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    client.create_volume(create_request("vol-1")).await.unwrap();
    let (mut given, mut refused) = (0, 0);
    for round in 0..100 {
        grant(&mut client, "vol-1", "node-a", false).await.unwrap();
        let (mut attaching, mut withdrawing) = (client.clone(), client.clone());
        let attach =
            tokio::spawn(async move { attaching.attach_volume(under_grant("vol-1", "node-a")).await });
        let delete = tokio::spawn(async move {
            // Both orders come up.
            tokio::time::sleep(Duration::from_micros(100 * (round % 16))).await;
            withdraw(&mut withdrawing, "vol-1", "node-a").await
        });
        let ended = delete.await.unwrap().unwrap();
        assert!(ended.existed);
        let found = volume(&mut client, "vol-1").await;
        assert_eq!((found.attachments, found.grants), (vec![], vec![]), "round {round}");
        match attach.await.unwrap() {
            Ok(_) => {
                assert!(ended.was_attached, "round {round}");
                given += 1;
            }
            Err(status) => {
                assert_eq!(told(&status).1, reason::VOLUME_NOT_GRANTED, "round {round}");
                refused += 1;
            }
        }
        assert_eq!(volume(&mut client, "vol-1").await.attachments, [], "round {round}: not later either");
    }
    println!("{given} attached before, {refused} refused after");
}

/// A grant and what is attached under it go together, at whichever moment the server is killed; what was answered holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_while_a_grant_is_deleted_leaves_both_or_neither() {
    let seed = match std::env::var("VOLNODE_TEST_SEED") {
        Ok(text) => text.parse().expect("VOLNODE_TEST_SEED is a number"),
        Err(_) => uuid::Uuid::new_v4().as_u64_pair().0,
    };
    println!("VOLNODE_TEST_SEED={seed}");
    let mut choices = Choices(seed);
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let (mut kept, mut gone) = (0, 0);
    for round in 0.. {
        // Slower machines have more time.
        assert!(round < 100, "{kept} deletions were not begun, {gone} done: the kills hit one side only");
        if round >= 20 && kept > 0 && gone > 0 {
            break;
        }
        let server = Volserver::start(&data_dir);
        let mut client = server.client().await;
        client.create_volume(create_request("vol-1")).await.unwrap();
        grant(&mut client, "vol-1", "node-a", false).await.unwrap();
        let held = client.attach_volume(under_grant("vol-1", "node-a")).await.unwrap().into_inner();
        let mut withdrawing = client.clone();
        let deletion = tokio::spawn(async move { withdraw(&mut withdrawing, "vol-1", "node-a").await });
        // Every other one at once.
        let later = if round % 2 == 0 { 0 } else { choices.below(4_000 + 1_000 * round) };
        tokio::time::sleep(Duration::from_micros(later)).await;
        server.kill();
        let is_answered = deletion.await.unwrap().is_ok();

        let server = Volserver::start(&data_dir);
        let mut client = server.client().await;
        let found = volume(&mut client, "vol-1").await;
        let nodes: Vec<&str> = found.grants.iter().map(|grant| grant.node_id.as_str()).collect();
        let attached: Vec<&str> = found.attachments.iter().map(|one| one.attachment_id.as_str()).collect();
        if nodes.is_empty() {
            assert_eq!(attached, [""; 0], "round {round}: attached under a grant that is no more");
            let late = client.attach_volume(under_grant("vol-1", "node-a")).await.unwrap_err();
            assert_eq!(told(&late).1, reason::VOLUME_NOT_GRANTED);
            gone += 1;
        } else {
            assert!(!is_answered, "round {round}: it was answered");
            assert_eq!(
                (nodes, attached),
                (vec!["node-a"], vec![held.attachment.unwrap().attachment_id.as_str()])
            );
            kept += 1;
        }
        // The repeat goes on.
        withdraw(&mut client, "vol-1", "node-a").await.unwrap();
        let found = volume(&mut client, "vol-1").await;
        assert_eq!((found.attachments, found.grants), (vec![], vec![]), "round {round}");
        server.kill();
    }
    println!("{kept} deletions not begun, {gone} done");
}
