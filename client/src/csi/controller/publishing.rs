//! Publishing: which node may attach a volume. The point where a node is fenced.
//!
//! Owns: the rule for a second node, and the steps. To publish is to grant at the storage server, and nothing more: the node attaches, and
//! fetches its secret itself; nothing secret is in the answer, which everybody may read in Kubernetes. To unpublish is to take the grant
//! away, which ends the node's connections and waits for their I/O before it returns. Called by the service, one call of a volume at a time.

use std::collections::BTreeSet;

use proto::csi::v1 as csi;
use proto::error_reason as reason;
use proto::v1;
use tonic::Code;

use super::access::{Capability, Nature};
use super::api::{Call, by_uid};
use super::names;
use super::refusal::{Refusal, given, shown};

/// In the context that NodeStageVolume gets, `true` where the node may only read: nothing else tells it.
const READ_ONLY_KEY: &str = "readonly";

/// Lets a node attach a volume.
pub(super) async fn publish(
    call: &Call,
    request: csi::ControllerPublishVolumeRequest,
) -> Result<csi::ControllerPublishVolumeResponse, Refusal> {
    given("volume_id", &request.volume_id)?;
    let node_id = given("node_id", &request.node_id)?.to_owned();
    let capability = request.volume_capability.as_ref();
    let capability = capability.ok_or_else(|| Refusal::invalid("volume_capability is missing"))?;
    let capability = Capability::of(capability)?;
    let uid = names::volume_uid(&request.volume_id)?;
    if !names::is_node_id(&node_id) {
        return Err(Refusal::not_found(format!("there is no node {}", shown(&node_id))));
    }
    let volume = call.volume(uid).await?;
    let read_only = decide(&volume, capability, request.readonly, &node_id)?;
    let question = v1::CreateGrantRequest {
        volume_name: by_uid(uid),
        node_id: node_id.clone(),
        read_only,
        node_must_be_registered: true,
        ..Default::default()
    };
    let granted = call.ask(question, |mut stub, request| async move { stub.create_grant(request).await });
    granted.await.map_err(|refusal| explained(refusal, &volume.name))?;
    let told = read_only.then(|| (READ_ONLY_KEY.to_owned(), true.to_string()));
    Ok(csi::ControllerPublishVolumeResponse { publish_context: told.into_iter().collect() })
}

/// Whether the node may only read.
///
/// # Errors
/// FAILED_PRECONDITION: the volume is not for this access mode, or another node has it; NOT_FOUND is the server's to say.
fn decide(
    volume: &v1::Volume,
    capability: Capability,
    readonly: bool,
    node_id: &str,
) -> Result<bool, Refusal> {
    let nature = Nature::of(volume);
    if let Some(why) = capability.refused_by(nature) {
        return Err(Refusal::precondition(why));
    }
    let read_only = readonly || capability.is_read_only();
    if nature.is_read_only && !read_only {
        return Err(Refusal::precondition(format!(
            "volume {} is read-only; publish it readonly, or in a READER_ONLY access mode",
            volume.name
        )));
    }
    // The server lets several read, and several write to a shared volume; this mode does not.
    let others: BTreeSet<&str> =
        volume.grants.iter().map(|grant| grant.node_id.as_str()).filter(|other| *other != node_id).collect();
    if capability.is_single_node() && !others.is_empty() {
        let others: Vec<&str> = others.into_iter().collect();
        return Err(elsewhere(&volume.name, &others.join(",")));
    }
    Ok(read_only)
}

fn elsewhere(name: &str, node_ids: &str) -> Refusal {
    Refusal::precondition(format!("volume {name} is published to {node_ids}; unpublish it there first"))
}

/// A refusal of the grant in the words of CSI.
fn explained(refusal: Refusal, name: &str) -> Refusal {
    if refusal.is_because(reason::VOLUME_GRANTED) && !refusal.node_ids.is_empty() {
        return elsewhere(name, &refusal.node_ids);
    }
    if refusal.is_because(reason::VOLUME_ATTACHED) && !refusal.node_ids.is_empty() {
        return Refusal::precondition(format!(
            "volume {name} is attached to {} by other means than CSI; detach it there first",
            refusal.node_ids
        ));
    }
    if refusal.is_because(reason::GRANTED_DIFFERENTLY) {
        let what = "to this node, with another readonly; unpublish it first";
        return Refusal::exists(format!("volume {name} is published {what}"));
    }
    refusal
}

/// Takes a volume from a node, or from all of them. What cannot be there is not published.
pub(super) async fn unpublish(
    call: &Call,
    request: csi::ControllerUnpublishVolumeRequest,
) -> Result<csi::ControllerUnpublishVolumeResponse, Refusal> {
    let done = csi::ControllerUnpublishVolumeResponse {};
    let Some(uid) = names::uid(given("volume_id", &request.volume_id)?) else { return Ok(done) };
    let node_ids = match request.node_id {
        node_id if node_id.is_empty() => match call.volume(uid).await {
            Ok(volume) => holders(&volume),
            Err(refusal) if refusal.code == Code::NotFound => return Ok(done),
            Err(refusal) => return Err(refusal),
        },
        node_id if names::is_node_id(&node_id) => BTreeSet::from([node_id]),
        _ => return Ok(done),
    };
    let mut outcome = Ok(done);
    // Each of them, also behind one whose I/O goes on.
    for node_id in node_ids {
        let question = v1::DeleteGrantRequest { volume_name: by_uid(uid), node_id, ..Default::default() };
        let taken = call.ask(question, |mut stub, request| async move { stub.delete_grant(request).await });
        if let Err(refusal) = taken.await
            && refusal.code != Code::NotFound
        {
            outcome = Err(refusal);
        }
    }
    outcome
}

/// Every node that may have the volume, or has it.
fn holders(volume: &v1::Volume) -> BTreeSet<String> {
    let granted = volume.grants.iter().map(|grant| &grant.node_id);
    granted.chain(volume.attachments.iter().map(|attachment| &attachment.node_id)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use proto::csi::v1::volume_capability::access_mode::Mode;

    use super::*;

    fn volume(granted_to: &[&str]) -> v1::Volume {
        let grant = |node_id: &&str| v1::Grant { node_id: (*node_id).to_owned(), ..Default::default() };
        v1::Volume {
            name: "vol".to_owned(),
            grants: granted_to.iter().map(grant).collect(),
            ..Default::default()
        }
    }

    fn block(mode: Mode) -> Capability {
        Capability { mode, is_block: true, fs_type: None }
    }

    #[test]
    fn a_single_node_is_one_also_for_readers_and_shared_volumes() {
        let shared = v1::Volume { is_shared: true, ..volume(&["a"]) };
        for (of, mode, readonly) in [
            (volume(&["a"]), Mode::SingleNodeWriter, false),
            (volume(&["a"]), Mode::SingleNodeWriter, true),
            (volume(&["a"]), Mode::SingleNodeReaderOnly, false),
            (shared.clone(), Mode::SingleNodeMultiWriter, false),
        ] {
            let refusal = decide(&of, block(mode), readonly, "b").unwrap_err();
            assert_eq!(refusal.code, Code::FailedPrecondition);
            assert!(refusal.message.contains("published to a;"), "{}", refusal.message);
            // Its own node may ask again.
            assert!(decide(&of, block(mode), readonly, "a").is_ok());
        }
        assert_eq!(decide(&shared, block(Mode::MultiNodeMultiWriter), false, "b"), Ok(false));
        let clone = v1::Volume { source_uid: "x".to_owned(), ..volume(&["a", "c"]) };
        assert_eq!(decide(&clone, block(Mode::MultiNodeReaderOnly), false, "b"), Ok(true));
        let refusal = decide(&clone, block(Mode::SingleNodeReaderOnly), false, "b").unwrap_err();
        assert!(refusal.message.contains("published to a,c;"));
    }

    #[test]
    fn a_reader_reads_and_a_read_only_volume_has_no_writer() {
        assert_eq!(decide(&volume(&[]), block(Mode::SingleNodeWriter), false, "a"), Ok(false));
        assert_eq!(decide(&volume(&[]), block(Mode::SingleNodeWriter), true, "a"), Ok(true));
        assert_eq!(decide(&volume(&[]), block(Mode::SingleNodeReaderOnly), false, "a"), Ok(true));
        let read_only = v1::Volume { is_read_only: true, ..volume(&[]) };
        let refusal = decide(&read_only, block(Mode::SingleNodeWriter), false, "a").unwrap_err();
        assert!(refusal.code == Code::FailedPrecondition && refusal.message.contains("read-only"));
        assert_eq!(decide(&read_only, block(Mode::SingleNodeWriter), true, "a"), Ok(true));
        assert!(decide(&volume(&[]), block(Mode::MultiNodeReaderOnly), false, "a").is_err());
    }

    #[test]
    fn who_is_in_the_way_is_named() {
        let of = |reason: &str, node_ids: &str| {
            let refusal = Refusal {
                reason: reason.to_owned(),
                node_ids: node_ids.to_owned(),
                ..Refusal::not_found("x")
            };
            explained(refusal, "vol")
        };
        let granted = of(reason::VOLUME_GRANTED, "n1,n2");
        assert!(granted.code == Code::FailedPrecondition && granted.message.contains("published to n1,n2"));
        let attached = of(reason::VOLUME_ATTACHED, "n1");
        assert!(attached.code == Code::FailedPrecondition && attached.message.contains("attached to n1"));
        assert_eq!(of(reason::GRANTED_DIFFERENTLY, "").code, Code::AlreadyExists);
        assert_eq!(of(reason::NODE_NOT_FOUND, "").code, Code::NotFound);
    }

    #[test]
    fn all_holders_lose_it() {
        let attachment = |node_id: &str| v1::Attachment { node_id: node_id.to_owned(), ..Default::default() };
        let of = v1::Volume { attachments: vec![attachment("a"), attachment("z")], ..volume(&["a", "b"]) };
        assert_eq!(Vec::from_iter(holders(&of)), ["a", "b", "z"]);
    }
}
