//! Health of volumes, from what the storage server knows and what the nodes' last heartbeats told it.
//!
//! Owns what the server knows of a volume itself, beside what its disks' states mean (`disk_health`):
//!
//! | what is known | status | reason |
//! | --- | --- | --- |
//! | an adopted device cannot be served | INACCESSIBLE | `BackingDeviceUnusable` |
//! | the server's file system is full, and the volume is in a file there | DEGRADED | `StorageFull` |
//!
//! What a node told last holds until it tells something else. A disk whose attachment has ended is no longer the volume's, and nothing is
//! told of it. Called by the service.

use std::collections::BTreeMap;

use proto::csi::v1 as csi;
use proto::csi::v1::VolumeHealthErrorType as Status;
use proto::csi::v1::volume_health::VolumeHealthEntry;
use proto::v1;
use tonic::Code;

use super::api::Call;
use super::lists;
use super::names;
use super::refusal::Refusal;
use super::volumes;
use crate::csi::disk_health::of_disk;

/// Nodes by their id; `None`: the server knows no such node.
type Nodes = BTreeMap<String, Option<v1::RegisteredNode>>;

/// Of one volume.
pub(super) async fn get(
    call: &Call,
    request: csi::ControllerGetVolumeHealthRequest,
) -> Result<csi::ControllerGetVolumeHealthResponse, Refusal> {
    let volume = call.volume(names::volume_uid(&request.volume_id)?).await?;
    let mut nodes = Nodes::new();
    let space = call.server_info().await?.storage_space;
    let volume_health = Some(looked_up(call, &volume, &mut nodes, space.as_ref()).await?);
    Ok(csi::ControllerGetVolumeHealthResponse { volume_health })
}

/// Of all volumes; one without entries has no problem that is known.
pub(super) async fn list(
    call: &Call,
    request: csi::ControllerListVolumeHealthRequest,
) -> Result<csi::ControllerListVolumeHealthResponse, Refusal> {
    let wanted = lists::Wanted::of(request.max_entries, request.starting_token)?;
    let (found, next_token) = wanted.collect(|size, token| volumes::page(call, size, token)).await?;
    let (mut nodes, mut entries) = (Nodes::new(), Vec::with_capacity(found.len()));
    let space = call.server_info().await?.storage_space;
    for volume in found {
        let volume = with_adopted(call, volume).await?;
        entries.push(looked_up(call, &volume, &mut nodes, space.as_ref()).await?);
    }
    Ok(csi::ControllerListVolumeHealthResponse { entries, next_token })
}

/// An adopted device is looked at by the server where one volume is asked for, and not in a list.
async fn with_adopted(call: &Call, listed: v1::Volume) -> Result<v1::Volume, Refusal> {
    let uid = names::uid(&listed.volume_uid).filter(|_| listed.backend() == v1::Backend::Device);
    let Some(uid) = uid else { return Ok(listed) };
    match call.volume(uid).await {
        // It was deleted meanwhile.
        Err(refusal) if refusal.code == Code::NotFound => Ok(listed),
        asked => asked,
    }
}

/// With the nodes that have the volume, each asked for once.
async fn looked_up(
    call: &Call,
    volume: &v1::Volume,
    nodes: &mut Nodes,
    space: Option<&v1::StorageSpace>,
) -> Result<csi::VolumeHealth, Refusal> {
    for attachment in &volume.attachments {
        if !nodes.contains_key(&attachment.node_id) {
            let node_id = attachment.node_id.clone();
            let question = v1::GetNodeRequest { node_id: node_id.clone() };
            let asked = call.ask(question, |mut stub, request| async move { stub.get_node(request).await });
            let node = match asked.await {
                Ok(node) => Some(node),
                Err(refusal) if refusal.code == Code::NotFound => None,
                Err(refusal) => return Err(refusal),
            };
            nodes.insert(node_id, node);
        }
    }
    Ok(of_volume(volume, nodes, space))
}

/// What is known to be wrong with a volume; of a status and reason that several disks have, one entry tells of all.
fn of_volume(volume: &v1::Volume, nodes: &Nodes, space: Option<&v1::StorageSpace>) -> csi::VolumeHealth {
    let mut found: BTreeMap<(Status, &'static str), Vec<String>> = BTreeMap::new();
    for attachment in &volume.attachments {
        let Some(node) = nodes.get(&attachment.node_id).and_then(Option::as_ref) else { continue };
        let of_attachment = |disk: &&v1::NodeDisk| disk.attachment_id == attachment.attachment_id;
        if let Some(disk) = node.disks.iter().find(of_attachment)
            && let Some(what) = of_disk(&disk.state, &disk.state_reason)
        {
            let message = format!("node {}: {} ({})", node.node_id, disk.state_reason, disk.state);
            found.entry(what).or_default().push(message);
        }
    }
    if !volume.adopted_problem.is_empty() {
        let what = (Status::Inaccessible, "BackingDeviceUnusable");
        found.entry(what).or_default().push(volume.adopted_problem.clone());
    }
    let is_full = space.is_some_and(|space| space.level() == v1::SpaceLevel::Full);
    if is_full && volume.backend() == v1::Backend::File {
        let message = "the storage server's file system is full, and writes fail: delete snapshots or volumes, or make it larger";
        found.entry((Status::Degraded, "StorageFull")).or_default().push(message.to_owned());
    }
    let entry = |((status, reason), messages): ((Status, &str), Vec<String>)| VolumeHealthEntry {
        status: status.into(),
        reason: reason.to_owned(),
        message: messages.join("; "),
    };
    let health_statuses = found.into_iter().map(entry).collect();
    csi::VolumeHealth { volume_id: volume.volume_uid.clone(), health_statuses }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(attachment_id: &str, state: &str, state_reason: &str) -> v1::NodeDisk {
        v1::NodeDisk {
            attachment_id: attachment_id.to_owned(),
            state: state.to_owned(),
            state_reason: state_reason.to_owned(),
            state_since_ms: 1,
        }
    }

    fn node(node_id: &str, disks: Vec<v1::NodeDisk>) -> (String, Option<v1::RegisteredNode>) {
        (
            node_id.to_owned(),
            Some(v1::RegisteredNode { node_id: node_id.to_owned(), disks, ..Default::default() }),
        )
    }

    fn volume(attachments: &[(&str, &str)]) -> v1::Volume {
        let attachment = |(attachment_id, node_id): &(&str, &str)| v1::Attachment {
            attachment_id: (*attachment_id).to_owned(),
            node_id: (*node_id).to_owned(),
            ..Default::default()
        };
        v1::Volume {
            volume_uid: "v".to_owned(),
            backend: v1::Backend::File.into(),
            attachments: attachments.iter().map(attachment).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_status_and_reason_come_once_and_only_of_the_volumes_own_disks() {
        let stalled = |id| disk(id, "stalled", "I/O waits: no route");
        let nodes = Nodes::from([
            node("n1", vec![stalled("a1"), disk("other", "dead", "")]),
            node("n2", vec![stalled("a2")]),
            ("n3".to_owned(), None),
        ]);
        let of = volume(&[("a1", "n1"), ("a2", "n2"), ("a3", "n3")]);
        let health = of_volume(&of, &nodes, None);
        assert_eq!((health.volume_id.as_str(), health.health_statuses.len()), ("v", 1));
        let message = &health.health_statuses[0].message;
        assert!(message.contains("node n1: ") && message.contains("node n2: "), "{message}");
        assert_eq!(of_volume(&volume(&[]), &nodes, None).health_statuses, []);
    }

    #[test]
    fn what_the_server_knows_is_told_without_any_node() {
        let full = v1::StorageSpace { level: v1::SpaceLevel::Full.into(), ..Default::default() };
        let mut of = volume(&[]);
        of.adopted_problem = "no such device".to_owned();
        let reasons = |of: &v1::Volume| -> Vec<String> {
            let health = of_volume(of, &Nodes::new(), Some(&full));
            health.health_statuses.into_iter().map(|entry| entry.reason).collect()
        };
        assert_eq!(reasons(&of), ["StorageFull", "BackingDeviceUnusable"]);
        of.set_backend(v1::Backend::Memory);
        assert_eq!(reasons(&of), ["BackingDeviceUnusable"]);
    }
}
