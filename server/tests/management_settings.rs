//! What users set of a volume through the management API of the real volserver: limits, labels, protection, content, readers.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod unit_filter;
mod volserver;

use std::collections::HashMap;

use proto::error_reason as reason;
use proto::v1::{self, management_client::ManagementClient};
use rustix::process::Signal;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use volserver::{Volserver, attach_request, create_request};

type Client = ManagementClient<Channel>;

fn reason_of(status: &Status) -> (Code, String) {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert!(info.metadata.contains_key(reason::METADATA_NEXT), "{info:?}");
    (status.code(), info.reason)
}

fn refused(word: &str) -> (Code, String) {
    (Code::FailedPrecondition, word.to_owned())
}

async fn update(client: &mut Client, request: v1::UpdateVolumeRequest) -> Result<v1::Volume, Status> {
    let request = v1::UpdateVolumeRequest { name: "vol-1".to_owned(), ..request };
    client.update_volume(request).await.map(tonic::Response::into_inner)
}

async fn get(client: &mut Client) -> v1::Volume {
    let request = v1::GetVolumeRequest { name: "vol-1".to_owned(), ..Default::default() };
    client.get_volume(request).await.unwrap().into_inner()
}

async fn delete(client: &mut Client) -> Result<bool, Status> {
    let request = v1::DeleteVolumeRequest { name: "vol-1".to_owned(), ..Default::default() };
    client.delete_volume(request).await.map(|answer| answer.into_inner().existed)
}

async fn attach(
    client: &mut Client,
    node_id: &str,
    mode: v1::AccessMode,
    force: bool,
) -> Result<v1::Attachment, Status> {
    let request =
        v1::AttachVolumeRequest { access_mode: mode.into(), ..attach_request("vol-1", node_id, force) };
    client.attach_volume(request).await.map(|answer| answer.into_inner().attachment.unwrap())
}

fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[tokio::test]
async fn settings_are_kept_across_a_restart_and_do_not_make_a_volume_another() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    let limits = v1::VolumeLimits { read_iops: 100, write_bytes_per_second: 1 << 20, ..Default::default() };
    let request = v1::CreateVolumeRequest {
        labels: labels(&[("app", "db")]),
        description: "the orders".to_owned(),
        is_protected: true,
        limits: Some(limits),
        ..create_request("vol-1")
    };
    let made = client.create_volume(request).await.unwrap().into_inner();
    assert_eq!(made.content(), v1::VolumeContent::NeverWritten);
    assert_eq!(
        (made.limits, made.is_protected, made.description.as_str()),
        (Some(limits), true, "the orders")
    );
    let again = client.create_volume(create_request("vol-1")).await.unwrap().into_inner();
    assert_eq!(again, made, "an orchestrator may have changed them since");
    let limits = v1::VolumeLimits { read_iops: 0, burst_seconds: 3, ..limits };
    let request =
        v1::SetVolumeLimitsRequest { name: "vol-1".to_owned(), limits: Some(limits), ..Default::default() };
    assert_eq!(client.set_volume_limits(request).await.unwrap().into_inner().limits, Some(limits));
    let request = v1::UpdateVolumeRequest {
        labels: labels(&[("app", ""), ("a.example/tier", "1")]),
        description: Some(String::new()),
        ..Default::default()
    };
    let changed = update(&mut client, request).await.unwrap();
    assert_eq!((changed.labels.clone(), changed.is_protected), (labels(&[("a.example/tier", "1")]), true));
    server.stop(Signal::TERM);

    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    assert_eq!(get(&mut client).await, changed);
    assert_eq!(reason_of(&delete(&mut client).await.unwrap_err()), refused(reason::VOLUME_PROTECTED));
    let request = v1::UpdateVolumeRequest { is_protected: Some(false), ..Default::default() };
    update(&mut client, request).await.unwrap();
    assert!(delete(&mut client).await.unwrap());
}

#[tokio::test]
async fn volumes_are_listed_by_their_labels() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    for (name, value) in [("a", "web"), ("b", "db"), ("c", "web"), ("d", "web")] {
        let request = v1::CreateVolumeRequest { labels: labels(&[("app", value)]), ..create_request(name) };
        client.create_volume(request).await.unwrap();
    }
    let mut names = Vec::new();
    let mut request =
        v1::ListVolumesRequest { page_size: 2, labels: labels(&[("app", "web")]), ..Default::default() };
    loop {
        let page = client.list_volumes(request.clone()).await.unwrap().into_inner();
        names.push(page.volumes.into_iter().map(|volume| volume.name).collect::<Vec<_>>());
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(names, [vec!["a", "c"], vec!["d"]]);
    let bad = v1::ListVolumesRequest { labels: labels(&[("-", "web")]), ..Default::default() };
    assert_eq!(client.list_volumes(bad).await.unwrap_err().code(), Code::InvalidArgument);
}

/// A thousand volumes with all that may be set of each are more than one message.
#[tokio::test]
async fn a_page_of_long_labels_is_a_message_that_callers_take() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    let long = |number: usize| (format!("{}/k{number}", "d".repeat(60)), "v".repeat(63));
    let labels: HashMap<String, String> = (0..64).map(long).collect();
    for number in 0..400 {
        let request = v1::CreateVolumeRequest {
            labels: labels.clone(),
            description: "x".repeat(1024),
            backend: v1::Backend::Memory.into(),
            capacity_bytes: 4096,
            ..create_request(&format!("vol-{number}"))
        };
        client.create_volume(request).await.unwrap();
    }
    let (mut found, mut pages) = (0, 0);
    let mut request = v1::ListVolumesRequest { page_size: 1000, ..Default::default() };
    loop {
        let page = client.list_volumes(request.clone()).await.unwrap().into_inner();
        (found, pages) = (found + page.volumes.len(), pages + 1);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert!(found == 400 && pages > 1, "{found} in {pages}");
}

#[tokio::test]
async fn an_attachment_tells_what_becomes_of_the_content() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    client.create_volume(create_request("vol-1")).await.unwrap();
    let holder = attach(&mut client, "node-a", v1::AccessMode::SingleNodeWriter, false).await.unwrap();
    let request = |attachment_id: &str, content: v1::VolumeContent| v1::SetVolumeContentRequest {
        name: "vol-1".to_owned(),
        attachment_id: attachment_id.to_owned(),
        content: content.into(),
    };
    let question = request(&holder.attachment_id, v1::VolumeContent::Unspecified);
    let told = client.set_volume_content(question.clone()).await.unwrap().into_inner();
    assert_eq!(told.content(), v1::VolumeContent::NeverWritten);
    let initialising = request(&holder.attachment_id, v1::VolumeContent::Initialising);
    let volume = client.set_volume_content(initialising.clone()).await.unwrap().into_inner();
    assert_eq!(volume.content(), v1::VolumeContent::Initialising);
    assert_eq!(volume.initialising_attachment_id, holder.attachment_id);
    let stranger = request(&uuid::Uuid::new_v4().to_string(), v1::VolumeContent::Written);
    let status = client.set_volume_content(stranger).await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::NotFound, reason::ATTACHMENT_NOT_FOUND.to_owned()));
    let written = request(&holder.attachment_id, v1::VolumeContent::Written);
    client.set_volume_content(written).await.unwrap();
    let told = client.set_volume_content(question.clone()).await.unwrap().into_inner();
    assert_eq!(told.content(), v1::VolumeContent::Written);
    let strangers =
        v1::SetVolumeContentRequest { attachment_id: uuid::Uuid::new_v4().to_string(), ..question };
    let status = client.set_volume_content(strangers).await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::NotFound, reason::ATTACHMENT_NOT_FOUND.to_owned()));
    let status = client.set_volume_content(initialising).await.unwrap_err();
    assert_eq!(reason_of(&status), refused(reason::CONTENT_REFUSED));
    let nothing = request(&holder.attachment_id, v1::VolumeContent::NeverWritten);
    assert_eq!(client.set_volume_content(nothing).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn two_nodes_read_a_volume_and_keep_a_writer_out() {
    use v1::AccessMode::{MultiNodeReaderOnly, SingleNodeReaderOnly, SingleNodeWriter};
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    client.create_volume(create_request("vol-1")).await.unwrap();
    let first = attach(&mut client, "node-a", MultiNodeReaderOnly, false).await.unwrap();
    let second = attach(&mut client, "node-b", MultiNodeReaderOnly, false).await.unwrap();
    assert_eq!(second.access_mode(), MultiNodeReaderOnly);
    for mode in [SingleNodeWriter, SingleNodeReaderOnly] {
        let status = attach(&mut client, "node-c", mode, false).await.unwrap_err();
        assert_eq!(reason_of(&status), refused(reason::VOLUME_ATTACHED));
        assert!(status.message().contains("node-"), "{}", status.message());
    }
    assert_eq!(reason_of(&delete(&mut client).await.unwrap_err()), refused(reason::VOLUME_ATTACHED));
    assert_eq!(get(&mut client).await.attachments.len(), 2);
    // A page may end between two of a volume.
    let mut request = v1::ListAttachmentsRequest { page_size: 1, ..Default::default() };
    let page = client.list_attachments(request.clone()).await.unwrap().into_inner();
    request.page_token = page.next_page_token;
    let other = client.list_attachments(request).await.unwrap().into_inner();
    assert!(other.next_page_token.is_empty());
    let mut ids = [page.attachments[0].attachment_id.clone(), other.attachments[0].attachment_id.clone()];
    let mut expected = [first.attachment_id.clone(), second.attachment_id.clone()];
    ids.sort();
    expected.sort();
    assert_eq!(ids, expected);

    let nobody = v1::DetachVolumeRequest { volume_name: "vol-1".to_owned(), ..Default::default() };
    let status = client.detach_volume(nobody.clone()).await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::InvalidArgument, reason::SEVERAL_HOLDERS.to_owned()));
    let one = v1::DetachVolumeRequest { node_id: "node-a".to_owned(), ..nobody.clone() };
    assert!(client.detach_volume(one).await.unwrap().into_inner().existed);
    attach(&mut client, "node-a", MultiNodeReaderOnly, false).await.unwrap();
    let writer = attach(&mut client, "node-c", SingleNodeWriter, true).await.unwrap();
    assert_eq!(get(&mut client).await.attachments, [writer]);
    let status = attach(&mut client, "node-a", MultiNodeReaderOnly, false).await.unwrap_err();
    assert_eq!(reason_of(&status), refused(reason::VOLUME_ATTACHED));
    assert!(client.detach_volume(nobody).await.unwrap().into_inner().existed);
}

#[tokio::test]
async fn a_read_only_volume_has_no_writer() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    client.create_volume(create_request("vol-1")).await.unwrap();
    let read_only = |is| v1::UpdateVolumeRequest { is_read_only: Some(is), ..Default::default() };
    attach(&mut client, "node-a", v1::AccessMode::SingleNodeWriter, false).await.unwrap();
    let status = update(&mut client, read_only(true)).await.unwrap_err();
    assert_eq!(reason_of(&status), refused(reason::VOLUME_HAS_WRITER));
    let detach = v1::DetachVolumeRequest { volume_name: "vol-1".to_owned(), ..Default::default() };
    client.detach_volume(detach).await.unwrap();
    assert!(update(&mut client, read_only(true)).await.unwrap().is_read_only);
    let status = attach(&mut client, "node-a", v1::AccessMode::SingleNodeWriter, true).await.unwrap_err();
    assert_eq!(reason_of(&status), refused(reason::VOLUME_READ_ONLY));
    attach(&mut client, "node-a", v1::AccessMode::SingleNodeReaderOnly, false).await.unwrap();
}
