//! Calls with an id, etags and update masks through the management API of the real volserver: a call is carried out once, and only
//! where what it is about is still as its caller has seen it.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

mod choices;
mod unit_filter;
mod volserver;

use std::collections::HashMap;
use std::time::Duration;

use choices::Choices;
use proto::error_reason as reason;
use proto::v1::{self, management_client::ManagementClient};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;
use volserver::{Volserver, attach_request, create_request};

type Api = ManagementClient<Channel>;

fn reason_of(status: &Status) -> (Code, String) {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert!(info.metadata.contains_key(reason::METADATA_NEXT), "{info:?}");
    (status.code(), info.reason)
}

fn etag_of(status: &Status) -> String {
    let info = status.get_details_error_info().unwrap();
    info.metadata.get(reason::METADATA_ETAG).unwrap_or_else(|| panic!("{info:?}")).clone()
}

fn id(number: u128) -> String {
    Uuid::from_u128(number).to_string()
}

async fn create(api: &mut Api, name: &str, request_id: &str) -> Result<v1::Volume, Status> {
    let request = v1::CreateVolumeRequest { request_id: request_id.to_owned(), ..create_request(name) };
    api.create_volume(request).await.map(tonic::Response::into_inner)
}

async fn delete(api: &mut Api, name: &str, request_id: &str) -> Result<bool, Status> {
    let (name, request_id) = (name.to_owned(), request_id.to_owned());
    let request = v1::DeleteVolumeRequest { name, request_id, ..Default::default() };
    api.delete_volume(request).await.map(|answer| answer.into_inner().existed)
}

async fn find(api: &mut Api, name: &str) -> Option<v1::Volume> {
    match api.get_volume(v1::GetVolumeRequest { name: name.to_owned(), ..Default::default() }).await {
        Ok(found) => Some(found.into_inner()),
        Err(status) => {
            assert_eq!(status.code(), Code::NotFound, "{status}");
            None
        }
    }
}

async fn get(api: &mut Api, name: &str) -> v1::Volume {
    find(api, name).await.unwrap()
}

#[tokio::test]
async fn a_repetition_does_nothing_again_and_has_the_first_answer_also_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    let first = create(&mut api, "vol-1", &id(1)).await.unwrap();
    assert!(delete(&mut api, "vol-1", &id(2)).await.unwrap());
    assert!(!delete(&mut api, "vol-1", &id(3)).await.unwrap());
    let second = create(&mut api, "vol-1", "").await.unwrap();
    assert_ne!(first.volume_uid, second.volume_uid);
    server.kill();

    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    assert_eq!(create(&mut api, "vol-1", &id(1)).await.unwrap(), first, "whatever has become of it");
    assert!(delete(&mut api, "vol-1", &id(2)).await.unwrap());
    assert!(
        !delete(&mut api, "vol-1", &id(3)).await.unwrap(),
        "it found nothing to delete, and still does not"
    );
    assert_eq!(get(&mut api, "vol-1").await.volume_uid, second.volume_uid);
    assert!(delete(&mut api, "vol-1", &id(4)).await.unwrap(), "another call is another one");
}

/// An answer that is too long to be kept is made anew, and its call is known all the same; also of one that found nothing to change.
#[tokio::test]
async fn a_call_with_a_long_answer_is_known_again() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    let labels: HashMap<String, String> =
        (0..60).map(|number| (format!("example.com/label-{number:02}"), "v".repeat(60))).collect();
    let request = |number| v1::CreateVolumeRequest {
        labels: labels.clone(),
        request_id: id(number),
        ..create_request("vol-1")
    };
    let first = api.create_volume(request(1)).await.unwrap().into_inner();
    // It is there already: nothing is changed.
    assert_eq!(api.create_volume(request(2)).await.unwrap().into_inner().volume_uid, first.volume_uid);
    assert!(delete(&mut api, "vol-1", "").await.unwrap());
    for number in [1, 2] {
        let status = api.create_volume(request(number)).await.unwrap_err();
        let expected = (Code::NotFound, reason::VOLUME_NOT_FOUND.to_owned());
        assert_eq!(reason_of(&status), expected, "{number}: what it has made is gone");
    }
    assert!(find(&mut api, "vol-1").await.is_none(), "nothing is made anew");
    server.kill();
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    assert!(api.create_volume(request(2)).await.is_err() && find(&mut api, "vol-1").await.is_none());
}

#[tokio::test]
async fn an_id_is_of_one_request() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    create(&mut api, "vol-1", &id(1)).await.unwrap();
    let reused = (Code::InvalidArgument, reason::REQUEST_ID_REUSED.to_owned());
    assert_eq!(reason_of(&create(&mut api, "vol-2", &id(1)).await.unwrap_err()), reused);
    assert_eq!(reason_of(&delete(&mut api, "vol-1", &id(1)).await.unwrap_err()), reused);
    assert!(find(&mut api, "vol-2").await.is_none() && find(&mut api, "vol-1").await.is_some());
    let upper = id(0xabc).to_uppercase();
    create(&mut api, "vol-3", &upper).await.unwrap();
    assert_eq!(
        reason_of(&create(&mut api, "vol-4", &id(0xabc)).await.unwrap_err()),
        reused,
        "in any spelling"
    );
    for bad in ["x", "00000000-0000-0000-0000-000000000000", "../../etc/passwd", &"1".repeat(10_000)] {
        let status = create(&mut api, "vol-5", bad).await.unwrap_err();
        assert_eq!(reason_of(&status), (Code::InvalidArgument, reason::INVALID_FIELD.to_owned()), "{bad}");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "request_id");
    }
}

#[tokio::test]
async fn what_failed_may_be_repeated_with_its_id() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    create(&mut api, "vol-1", "").await.unwrap();
    api.attach_volume(attach_request("vol-1", "node-a", false)).await.unwrap();
    let read_only = v1::UpdateVolumeRequest {
        name: "vol-1".to_owned(),
        is_read_only: Some(true),
        request_id: id(2),
        ..Default::default()
    };
    let refused = delete(&mut api, "vol-1", &id(1)).await.unwrap_err();
    assert_eq!(reason_of(&refused).1, reason::VOLUME_ATTACHED);
    let refused = api.update_volume(read_only.clone()).await.unwrap_err();
    assert_eq!(reason_of(&refused).1, reason::VOLUME_HAS_WRITER);
    let detach = v1::DetachVolumeRequest { volume_name: "vol-1".to_owned(), ..Default::default() };
    api.detach_volume(detach).await.unwrap();
    assert!(api.update_volume(read_only).await.unwrap().into_inner().is_read_only);
    assert!(delete(&mut api, "vol-1", &id(1)).await.unwrap());
}

#[tokio::test]
async fn repetitions_that_come_at_once_are_one_call() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    create(&mut api, "vol-1", "").await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let mut api = api.clone();
        tasks.spawn(async move { delete(&mut api, "vol-1", &id(1)).await.unwrap() });
    }
    let existed = tasks.join_all().await;
    assert_eq!(existed, [true; 16], "each has the answer of the one that was carried out");
}

/// Of every call that takes an id, with something in between that a second time would undo or not find.
#[tokio::test]
async fn every_call_with_an_id_is_carried_out_once() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    create(&mut api, "vol-1", "").await.unwrap();
    let name = || "vol-1".to_owned();
    let update = |text: &str, request_id: &str| v1::UpdateVolumeRequest {
        name: name(),
        description: Some(text.to_owned()),
        request_id: request_id.to_owned(),
        ..Default::default()
    };
    let limits = |read_iops, request_id: &str| v1::SetVolumeLimitsRequest {
        name: name(),
        limits: Some(v1::VolumeLimits { read_iops, ..Default::default() }),
        request_id: request_id.to_owned(),
        ..Default::default()
    };
    let updated = api.update_volume(update("first", &id(1))).await.unwrap().into_inner();
    let limited = api.set_volume_limits(limits(5, &id(2))).await.unwrap().into_inner();
    let resize = v1::ResizeVolumeRequest {
        name: name(),
        capacity_bytes: 2 << 20,
        request_id: id(3),
        ..Default::default()
    };
    let resized = api.resize_volume(resize.clone()).await.unwrap().into_inner();
    api.update_volume(update("second", "")).await.unwrap();
    api.set_volume_limits(limits(6, "")).await.unwrap();

    let node = v1::RegisterNodeRequest { node_id: "node-a".to_owned(), ..Default::default() };
    api.register_node(node.clone()).await.unwrap();
    let forget =
        v1::DeleteNodeRequest { node_id: "node-a".to_owned(), request_id: id(4), ..Default::default() };
    assert!(api.delete_node(forget.clone()).await.unwrap().into_inner().existed);
    api.register_node(node).await.unwrap();

    let grant = |request_id: &str| v1::CreateGrantRequest {
        volume_name: name(),
        node_id: "node-a".to_owned(),
        request_id: request_id.to_owned(),
        ..Default::default()
    };
    let withdraw =
        v1::DeleteGrantRequest { volume_name: name(), node_id: "node-a".to_owned(), request_id: id(6) };
    let granted = api.create_grant(grant(&id(5))).await.unwrap().into_inner();
    api.attach_volume(attach_request("vol-1", "node-a", false)).await.unwrap();
    let withdrawn = api.delete_grant(withdraw.clone()).await.unwrap().into_inner();
    assert!(withdrawn.existed && withdrawn.was_attached);
    let rename = v1::RenameVolumeRequest {
        name: name(),
        new_name: "vol-2".to_owned(),
        request_id: id(7),
        ..Default::default()
    };
    let renamed = api.rename_volume(rename.clone()).await.unwrap().into_inner();
    create(&mut api, "vol-1", "").await.unwrap();
    let granted_anew = api.create_grant(grant("")).await.unwrap().into_inner();
    api.attach_volume(attach_request("vol-1", "node-a", false)).await.unwrap();
    // A server that was killed may have lost what was not flushed, and says so.
    let settled = |volume| v1::Volume { storage_incarnation: String::new(), allocated_bytes: 0, ..volume };
    let before = (settled(get(&mut api, "vol-1").await), settled(get(&mut api, "vol-2").await));
    server.kill();

    let server = Volserver::start(&data_dir);
    let mut api = server.client().await;
    assert_eq!(api.update_volume(update("first", &id(1))).await.unwrap().into_inner(), updated);
    assert_eq!(api.set_volume_limits(limits(5, &id(2))).await.unwrap().into_inner(), limited);
    assert_eq!(api.resize_volume(resize).await.unwrap().into_inner(), resized);
    assert!(api.delete_node(forget).await.unwrap().into_inner().existed);
    assert_eq!(api.create_grant(grant(&id(5))).await.unwrap().into_inner(), granted);
    assert_eq!(api.delete_grant(withdraw).await.unwrap().into_inner(), withdrawn);
    assert_eq!(api.rename_volume(rename).await.unwrap().into_inner(), renamed);
    let after = (settled(get(&mut api, "vol-1").await), settled(get(&mut api, "vol-2").await));
    assert_eq!(after, before, "nothing was changed by any of them");
    assert_eq!(after.0.grants, [granted_anew]);
    assert_eq!(after.0.attachments.len(), 1);
    assert_eq!((after.1.description.as_str(), after.1.limits.unwrap().read_iops), ("second", 6));
    let known = v1::GetNodeRequest { node_id: "node-a".to_owned() };
    api.get_node(known).await.unwrap();
}

/// The server is killed at some moment of a deletion. What it has done and what it says that it has done are one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_leaves_the_change_and_its_id_or_neither() {
    let seed = match std::env::var("VOLNODE_TEST_SEED") {
        Ok(text) => text.parse().expect("VOLNODE_TEST_SEED is a number"),
        Err(_) => Uuid::new_v4().as_u64_pair().0,
    };
    println!("VOLNODE_TEST_SEED={seed}");
    let mut choices = Choices(seed);
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let (mut carried_out, mut not_carried_out) = (0, 0);
    let mut server = Volserver::start(&data_dir);
    for round in 0..16 {
        let mut api = server.client().await;
        let there = create(&mut api, "vol", "").await.unwrap();
        let mut caller = api.clone();
        let request_id = id(1000 + round);
        let call = {
            let request_id = request_id.clone();
            tokio::spawn(async move { delete(&mut caller, "vol", &request_id).await })
        };
        tokio::time::sleep(Duration::from_micros(choices.below(12_000))).await;
        server.kill();
        let answer = call.await.unwrap();
        server = Volserver::start(&data_dir);
        let mut api = server.client().await;
        if find(&mut api, "vol").await.is_none() {
            // Carried out: the repetition must not take what somebody has made since.
            carried_out += 1;
            let new = create(&mut api, "vol", "").await.unwrap();
            assert!(delete(&mut api, "vol", &request_id).await.unwrap(), "seed {seed}, round {round}");
            assert_eq!(get(&mut api, "vol").await.volume_uid, new.volume_uid, "seed {seed}, round {round}");
            assert!(delete(&mut api, "vol", "").await.unwrap());
        } else {
            not_carried_out += 1;
            assert!(
                answer.is_err(),
                "seed {seed}, round {round}: {there:?} is there, and was said to be gone"
            );
            assert!(delete(&mut api, "vol", &request_id).await.unwrap());
            assert!(find(&mut api, "vol").await.is_none(), "seed {seed}, round {round}");
        }
    }
    println!("seed {seed}: {carried_out} were carried out, {not_carried_out} were not");
}

#[tokio::test]
async fn a_change_that_is_meant_for_another_state_is_refused_with_the_present_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    let seen = create(&mut api, "vol-1", "").await.unwrap().etag;
    assert!(!seen.is_empty());
    let name = || "vol-1".to_owned();
    let update = |etag: &str, text: &str| v1::UpdateVolumeRequest {
        name: name(),
        description: Some(text.to_owned()),
        etag: etag.to_owned(),
        ..Default::default()
    };
    let changed = api.update_volume(update(&seen, "a")).await.unwrap().into_inner();
    assert_ne!(changed.etag, seen);
    assert_eq!(get(&mut api, "vol-1").await, changed);
    let listed = api.list_volumes(v1::ListVolumesRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.volumes[0].etag, changed.etag);

    let etag = || seen.clone();
    let limits = v1::SetVolumeLimitsRequest { name: name(), etag: etag(), ..Default::default() };
    let resize =
        v1::ResizeVolumeRequest { name: name(), capacity_bytes: 2 << 20, etag: etag(), ..Default::default() };
    let rename = v1::RenameVolumeRequest {
        name: name(),
        new_name: "vol-2".to_owned(),
        etag: etag(),
        ..Default::default()
    };
    let delete = v1::DeleteVolumeRequest { name: name(), etag: etag(), ..Default::default() };
    let refusals = [
        api.update_volume(update(&seen, "b")).await.unwrap_err(),
        api.set_volume_limits(limits.clone()).await.unwrap_err(),
        api.resize_volume(resize.clone()).await.unwrap_err(),
        api.rename_volume(rename.clone()).await.unwrap_err(),
        api.delete_volume(delete.clone()).await.unwrap_err(),
    ];
    for refused in &refusals {
        assert_eq!(reason_of(refused), (Code::Aborted, reason::VOLUME_CHANGED.to_owned()));
        assert_eq!(etag_of(refused), changed.etag);
    }
    assert_eq!(get(&mut api, "vol-1").await, changed, "nothing was done");
    // Each with the etag that the one before has left.
    let etag = changed.etag;
    let limits = v1::VolumeLimits { read_iops: 7, ..Default::default() };
    let request =
        v1::SetVolumeLimitsRequest { name: name(), limits: Some(limits), etag, ..Default::default() };
    let etag = api.set_volume_limits(request).await.unwrap().into_inner().etag;
    let etag = api.resize_volume(v1::ResizeVolumeRequest { etag, ..resize }).await.unwrap().into_inner().etag;
    let etag = api.rename_volume(v1::RenameVolumeRequest { etag, ..rename }).await.unwrap().into_inner().etag;
    let delete = v1::DeleteVolumeRequest { name: "vol-2".to_owned(), etag, ..delete };
    assert!(api.delete_volume(delete.clone()).await.unwrap().into_inner().existed);
    assert!(!api.delete_volume(delete).await.unwrap().into_inner().existed, "what is gone is gone");
}

#[tokio::test]
async fn a_node_that_has_registered_anew_is_not_forgotten_by_who_has_not_seen_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    let register = |boot_id: &str| v1::RegisterNodeRequest {
        node_id: "node-a".to_owned(),
        boot_id: boot_id.to_owned(),
        ..Default::default()
    };
    let seen = api.register_node(register("boot-1")).await.unwrap().into_inner();
    let now = api.register_node(register("boot-2")).await.unwrap().into_inner();
    let delete = |etag: &str| v1::DeleteNodeRequest {
        node_id: "node-a".to_owned(),
        etag: etag.to_owned(),
        ..Default::default()
    };
    let refused = api.delete_node(delete(&seen.etag)).await.unwrap_err();
    assert_eq!(reason_of(&refused), (Code::Aborted, reason::NODE_CHANGED.to_owned()));
    assert_eq!(etag_of(&refused), now.etag);
    assert!(api.delete_node(delete(&now.etag)).await.unwrap().into_inner().existed);
}

#[tokio::test]
async fn a_mask_says_what_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut api = server.client().await;
    let labels: HashMap<String, String> =
        [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())].into();
    let limits = v1::VolumeLimits { read_iops: 5, write_iops: 6, ..Default::default() };
    let request = v1::CreateVolumeRequest {
        labels: labels.clone(),
        description: "text".to_owned(),
        is_protected: true,
        limits: Some(limits),
        ..create_request("vol-1")
    };
    api.create_volume(request).await.unwrap();
    let masked = |paths: &[&str], request: v1::UpdateVolumeRequest| v1::UpdateVolumeRequest {
        name: "vol-1".to_owned(),
        update_mask: Some(prost_types::FieldMask {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        }),
        ..request
    };
    let other = || v1::UpdateVolumeRequest {
        labels: [("c".to_owned(), "3".to_owned())].into(),
        limits: Some(v1::VolumeLimits { read_iops: 50, ..Default::default() }),
        ..Default::default()
    };
    let volume = api.update_volume(masked(&["limits.read_iops"], other())).await.unwrap().into_inner();
    assert_eq!(volume.limits.unwrap(), v1::VolumeLimits { read_iops: 50, ..limits });
    assert_eq!((&volume.labels, volume.description.as_str(), volume.is_protected), (&labels, "text", true));
    let volume = api.update_volume(masked(&["labels", "is_protected"], other())).await.unwrap().into_inner();
    assert_eq!((volume.labels, volume.is_protected), (other().labels, false));
    assert_eq!(volume.description, "text");
    let unmasked = v1::UpdateVolumeRequest { name: "vol-1".to_owned(), ..other() };
    let volume =
        api.update_volume(v1::UpdateVolumeRequest { labels, ..unmasked }).await.unwrap().into_inner();
    assert_eq!((volume.labels.len(), volume.limits), (3, other().limits), "without a mask what is there");
    let volume = api.update_volume(masked(&["*"], Default::default())).await.unwrap().into_inner();
    assert_eq!((volume.labels.len(), volume.description.as_str()), (0, ""));
    assert_eq!(volume.limits, Some(v1::VolumeLimits::default()));
    let refused = api.update_volume(masked(&["description", "name"], other())).await.unwrap_err();
    assert_eq!(reason_of(&refused), (Code::InvalidArgument, reason::INVALID_FIELD.to_owned()));
    assert_eq!(refused.get_details_bad_request().unwrap().field_violations[0].field, "update_mask");
}
