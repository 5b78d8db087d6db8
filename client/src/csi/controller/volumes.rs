//! Volumes: made, deleted, grown, limited, listed.
//!
//! Owns: the steps. Each leaves the server in a state from which the call's repeat goes on: a volume is made with all that it is in one
//! step; a copy gets its limits after that, and bears a label until it has them. Never: decides what is wanted, which `wanted.rs` does;
//! keeps anything. Called by the service.

use std::collections::HashMap;
use std::time::Duration;

use proto::csi::v1 as csi;
use proto::error_reason as reason;
use proto::v1;
use tonic::Code;
use uuid::Uuid;

use super::access::{Capability, Nature};
use super::api::{Call, by_uid};
use super::lists;
use super::names;
use super::once::once;
use super::parameters::{self, Class, Limits};
use super::refusal::{Refusal, given, shown};
use super::sizes::{self, GRANULE, SizeRange};
use super::topology::Place;
use super::wanted::{Source, Wanted, of_encryption};

/// Between two looks at a copy that goes on.
const COPY_PAUSE: Duration = Duration::from_millis(200);

/// Makes a volume, or finds the one that it made before.
pub(super) async fn create(
    call: &Call,
    place: &Place,
    request: csi::CreateVolumeRequest,
) -> Result<csi::CreateVolumeResponse, Refusal> {
    let wanted = Wanted::of(&request)?;
    place.check(request.accessibility_requirements.as_ref())?;
    let there = match (found(call, &wanted).await?, wanted.source) {
        (Some(there), _) => there,
        (None, None) => make(call, &wanted).await?,
        (None, Some(source)) => copy(call, &wanted, source).await?,
    };
    let differences = wanted.differences(&there);
    if !differences.is_empty() {
        let name = shown(&request.name);
        return Err(Refusal::exists(format!("there is a volume {name}: {}", differences.join("; "))));
    }
    let there = finished(call, &wanted, there).await?;
    let volume = csi::Volume { content_source: wanted.source.map(Source::to_csi), ..to_csi(&there, place) };
    Ok(csi::CreateVolumeResponse { volume: Some(volume) })
}

/// The volume of this CSI name, whatever it is called on the server by now.
async fn found(call: &Call, wanted: &Wanted) -> Result<Option<v1::Volume>, Refusal> {
    let labels = HashMap::from([wanted.name_label()]);
    let question = v1::ListVolumesRequest { page_size: 2, labels, ..Default::default() };
    let page =
        call.ask(question, |mut stub, request| async move { stub.list_volumes(request).await }).await?;
    let mut volumes = page.volumes.into_iter();
    match (volumes.next(), volumes.next()) {
        (Some(one), Some(other)) => Err(Refusal::precondition(format!(
            "volumes {} and {} both have the label {}; take it from the one that is not meant",
            one.name,
            other.name,
            names::LABEL_NAME
        ))),
        (first, _) => Ok(first),
    }
}

/// An empty one.
async fn make(call: &Call, wanted: &Wanted) -> Result<v1::Volume, Refusal> {
    let question = v1::CreateVolumeRequest {
        name: wanted.name(),
        capacity_bytes: sizes::on_server(wanted.size.choose(0)?, wanted.class.is_encrypted)?,
        backend: wanted.class.backend.unwrap_or_default().into(),
        labels: wanted.labels(),
        description: wanted.description(),
        limits: Some(wanted.limits),
        is_shared: wanted.class.is_shared,
        is_encrypted: wanted.class.is_encrypted,
        ..Default::default()
    };
    once(call, question, |mut stub, request| async move { stub.create_volume(request).await }).await
}

/// A copy, which may take longer than its caller waits: the repeat waits on.
async fn copy(call: &Call, wanted: &Wanted, source: Source) -> Result<v1::Volume, Refusal> {
    let source_bytes = match source {
        Source::Snapshot(uid) => {
            let snapshot = call.snapshot(uid).await?;
            refuse_other_backend(wanted, snapshot.backend())?;
            refuse_other_encryption(wanted, snapshot.is_encrypted)?;
            snapshot.capacity_bytes
        }
        Source::Volume(uid) => {
            let volume = call.volume(uid).await?;
            refuse_other_backend(wanted, volume.backend())?;
            refuse_other_encryption(wanted, volume.is_encrypted)?;
            volume.capacity_bytes
        }
    };
    let is_encrypted = wanted.class.is_encrypted;
    let capacity_bytes = match wanted.size.of_copy(sizes::clear(source_bytes, is_encrypted))? {
        0 => 0,
        larger => sizes::on_server(larger, is_encrypted)?,
    };
    let mut question = v1::CloneVolumeRequest {
        name: wanted.name(),
        capacity_bytes,
        labels: wanted.labels(),
        description: wanted.description(),
        ..Default::default()
    };
    match source {
        Source::Snapshot(uid) => question.source_snapshot_uid = uid.to_string(),
        Source::Volume(uid) => question.source_volume_name = by_uid(uid),
    }
    let begun =
        once(call, question, |mut stub, request| async move { stub.clone_volume(request).await }).await?;
    match (begun.volume, begun.operation) {
        (Some(volume), _) => Ok(volume),
        (None, Some(operation)) => {
            wait_for(call, operation).await?;
            call.volume_named(wanted.name()).await
        }
        (None, None) => Err(Refusal::new(
            Code::Internal,
            "the storage server answered with neither a copy nor an operation",
        )),
    }
}

/// A copy is where its source is; an older server does not tell of a snapshot where that is.
fn refuse_other_backend(wanted: &Wanted, source: v1::Backend) -> Result<(), Refusal> {
    match wanted.class.backend {
        Some(backend) if ![backend, v1::Backend::Unspecified].contains(&source) => {
            Err(Refusal::invalid(format!(
                "backend: a copy is kept where its source is, in {}; take the parameter out of the StorageClass, or choose another one",
                source.as_str_name()
            )))
        }
        _ => Ok(()),
    }
}

/// A copy is encrypted as its source is, with the same passphrase; and its class says whether nodes are told one.
fn refuse_other_encryption(wanted: &Wanted, is_encrypted: bool) -> Result<(), Refusal> {
    if wanted.class.is_encrypted == is_encrypted {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "{}: a copy is encrypted as its source is, which is {}; choose a StorageClass with encrypted: \"{is_encrypted}\"",
        parameters::ENCRYPTED,
        of_encryption(is_encrypted)
    )))
}

/// Until the operation has succeeded.
///
/// # Errors
/// ABORTED: it goes on, and the caller's time is over; or it was cancelled. Otherwise what it failed with.
pub(super) async fn wait_for(call: &Call, mut operation: v1::Operation) -> Result<(), Refusal> {
    loop {
        match operation.state() {
            v1::OperationState::Succeeded => return Ok(()),
            v1::OperationState::Failed | v1::OperationState::Cancelled => return Err(failed(&operation)),
            v1::OperationState::Running | v1::OperationState::Unspecified => {}
        }
        if call.left() < COPY_PAUSE * 2 {
            let v1::Operation { operation_id, done_bytes, total_bytes, .. } = operation;
            return Err(Refusal::pending(format!(
                "the copy goes on, as operation {operation_id}: {done_bytes} of {total_bytes} bytes; repeat the call"
            )));
        }
        tokio::time::sleep(COPY_PAUSE).await;
        let question = v1::GetOperationRequest { operation_id: operation.operation_id.clone() };
        let asked = call.ask(question, |mut stub, request| async move { stub.get_operation(request).await });
        operation = asked.await.map_err(|refusal| match refusal.code {
            Code::NotFound => Refusal::pending("the copy was interrupted; repeat the call"),
            _ => refusal,
        })?;
    }
}

/// What an operation that has not succeeded means for who waits for it.
fn failed(operation: &v1::Operation) -> Refusal {
    let v1::Operation { operation_id, error_reason, error_message, .. } = operation;
    let code = match error_reason.as_str() {
        _ if operation.state() == v1::OperationState::Cancelled => Code::Aborted,
        reason::NO_SPACE | reason::SNAPSHOT_RESERVE => Code::ResourceExhausted,
        reason::SOURCE_LOST_WRITES | reason::COPY_CANCELLED => Code::Aborted,
        reason::COPY_BUSY | reason::SERVER_STOPPING => Code::Unavailable,
        reason::STORAGE_NOT_READY => Code::FailedPrecondition,
        _ => Code::Internal,
    };
    Refusal::new(code, format!("operation {operation_id} has not succeeded: {error_message}"))
}

/// Sets the limits of a copy that has not got them yet.
async fn finished(call: &Call, wanted: &Wanted, there: v1::Volume) -> Result<v1::Volume, Refusal> {
    if !there.labels.contains_key(names::LABEL_UNFINISHED) {
        return Ok(there);
    }
    let name = format!("uid:{}", there.volume_uid);
    let question =
        v1::SetVolumeLimitsRequest { name: name.clone(), limits: Some(wanted.limits), ..Default::default() };
    call.ask(question, |mut stub, request| async move { stub.set_volume_limits(request).await }).await?;
    let labels = HashMap::from([(names::LABEL_UNFINISHED.to_owned(), String::new())]);
    let question = v1::UpdateVolumeRequest { name, labels, ..Default::default() };
    call.ask(question, |mut stub, request| async move { stub.update_volume(request).await }).await
}

/// Deletes a volume; its snapshots stay, as Kubernetes promises.
pub(super) async fn delete(
    call: &Call,
    request: csi::DeleteVolumeRequest,
) -> Result<csi::DeleteVolumeResponse, Refusal> {
    let id = given("volume_id", &request.volume_id)?;
    // Of nothing that could not be one of ours there is a volume.
    if let Some(uid) = names::uid(id) {
        let question =
            v1::DeleteVolumeRequest { name: by_uid(uid), keep_snapshots: true, ..Default::default() };
        call.ask(question, |mut stub, request| async move { stub.delete_volume(request).await }).await?;
    }
    Ok(csi::DeleteVolumeResponse {})
}

/// Makes a volume larger.
pub(super) async fn expand(
    call: &Call,
    request: csi::ControllerExpandVolumeRequest,
) -> Result<csi::ControllerExpandVolumeResponse, Refusal> {
    let uid = names::volume_uid(&request.volume_id)?;
    if request.capacity_range.is_none() {
        return Err(Refusal::invalid("capacity_range is missing"));
    }
    let size = SizeRange::of(request.capacity_range.as_ref())?;
    let capability = request.volume_capability.as_ref().map(Capability::of).transpose()?;
    let mut volume = call.volume(uid).await?;
    let is_encrypted = volume.is_encrypted;
    if let Some(clear_bytes) = grown(size, sizes::clear(volume.capacity_bytes, is_encrypted))? {
        let capacity_bytes = sizes::on_server(clear_bytes, is_encrypted)?;
        let question = v1::ResizeVolumeRequest { name: by_uid(uid), capacity_bytes, ..Default::default() };
        volume =
            call.ask(question, |mut stub, request| async move { stub.resize_volume(request).await }).await?;
    }
    Ok(csi::ControllerExpandVolumeResponse {
        capacity_bytes: bytes(sizes::clear(volume.capacity_bytes, is_encrypted)),
        // A disk has its new size by itself; a file system on it has not.
        node_expansion_required: !capability.is_some_and(|capability| capability.is_block),
    })
}

/// The size that a volume is to get, `None` where it is large enough.
fn grown(wanted: SizeRange, has_bytes: u64) -> Result<Option<u64>, Refusal> {
    if has_bytes >= wanted.at_least {
        return match wanted.at_most {
            Some(at_most) if at_most < has_bytes => Err(Refusal::out_of_range(format!(
                "the volume has {has_bytes} bytes, more than limit_bytes, {at_most}; it cannot be made smaller"
            ))),
            _ => Ok(None),
        };
    }
    wanted.choose(0).map(Some)
}

/// Sets the limits that are named; the others stay.
pub(super) async fn modify(
    call: &Call,
    request: csi::ControllerModifyVolumeRequest,
) -> Result<csi::ControllerModifyVolumeResponse, Refusal> {
    let uid = names::volume_uid(&request.volume_id)?;
    let limits = Limits::of(&request.mutable_parameters)?;
    let has = call.volume(uid).await?.limits.unwrap_or_default();
    let wanted = limits.over(has);
    if wanted != has {
        let question =
            v1::SetVolumeLimitsRequest { name: by_uid(uid), limits: Some(wanted), ..Default::default() };
        call.ask(question, |mut stub, request| async move { stub.set_volume_limits(request).await }).await?;
    }
    Ok(csi::ControllerModifyVolumeResponse {})
}

/// Whether a volume can be used in all of these ways.
pub(super) async fn validate(
    call: &Call,
    request: csi::ValidateVolumeCapabilitiesRequest,
) -> Result<csi::ValidateVolumeCapabilitiesResponse, Refusal> {
    given("volume_id", &request.volume_id)?;
    if request.volume_capabilities.is_empty() {
        return Err(Refusal::invalid("volume_capabilities are missing"));
    }
    let volume = call.volume(names::volume_uid(&request.volume_id)?).await?;
    let nature = Nature::of(&volume);
    let why = match Capability::all_of(&request.volume_capabilities) {
        Ok(capabilities) => capabilities.into_iter().find_map(|capability| capability.refused_by(nature)),
        Err(refusal) => Some(refusal.message),
    };
    let off = |refusal: Refusal| refusal.message;
    let of_class = |class: Class| {
        let is_other = class.is_encrypted && !volume.is_encrypted;
        is_other.then(|| format!("{}: the volume is not encrypted", parameters::ENCRYPTED))
    };
    let why = why
        .or_else(|| Class::of(&request.parameters).map_or_else(|refusal| Some(off(refusal)), of_class))
        .or_else(|| Limits::of(&request.mutable_parameters).err().map(off));
    let csi::ValidateVolumeCapabilitiesRequest {
        volume_context,
        volume_capabilities,
        parameters,
        mutable_parameters,
        ..
    } = request;
    Ok(match why {
        Some(message) => csi::ValidateVolumeCapabilitiesResponse { confirmed: None, message },
        None => csi::ValidateVolumeCapabilitiesResponse {
            confirmed: Some(csi::validate_volume_capabilities_response::Confirmed {
                volume_context,
                volume_capabilities,
                parameters,
                mutable_parameters,
            }),
            message: String::new(),
        },
    })
}

/// One volume, and where it is published.
pub(super) async fn get(
    call: &Call,
    place: &Place,
    request: csi::ControllerGetVolumeRequest,
) -> Result<csi::ControllerGetVolumeResponse, Refusal> {
    let volume = call.volume(names::volume_uid(&request.volume_id)?).await?;
    let status =
        csi::controller_get_volume_response::VolumeStatus { published_node_ids: published_node_ids(&volume) };
    Ok(csi::ControllerGetVolumeResponse { volume: Some(to_csi(&volume, place)), status: Some(status) })
}

/// All volumes of the server, also those that were made by other means: each of them may be a PersistentVolume.
pub(super) async fn list(
    call: &Call,
    place: &Place,
    request: csi::ListVolumesRequest,
) -> Result<csi::ListVolumesResponse, Refusal> {
    let wanted = lists::Wanted::of(request.max_entries, request.starting_token)?;
    let (volumes, next_token) = wanted.collect(|size, token| page(call, size, token)).await?;
    let entry = |volume: &v1::Volume| csi::list_volumes_response::Entry {
        volume: Some(to_csi(volume, place)),
        status: Some(csi::list_volumes_response::VolumeStatus {
            published_node_ids: published_node_ids(volume),
        }),
    };
    Ok(csi::ListVolumesResponse { entries: volumes.iter().map(entry).collect(), next_token })
}

/// One page of them.
pub(super) async fn page(
    call: &Call,
    page_size: u32,
    page_token: String,
) -> Result<(Vec<v1::Volume>, String), Refusal> {
    let question = v1::ListVolumesRequest { page_size, page_token, ..Default::default() };
    let page =
        call.ask(question, |mut stub, request| async move { stub.list_volumes(request).await }).await?;
    Ok((page.volumes, page.next_page_token))
}

/// How many bytes there are for new volumes of a class. Volumes take space as they are written to: larger ones can be made.
pub(super) async fn capacity(
    call: &Call,
    place: &Place,
    request: csi::GetCapacityRequest,
) -> Result<csi::GetCapacityResponse, Refusal> {
    let class = Class::of(&request.parameters)?;
    let nature = Nature { is_shared: class.is_shared, ..Default::default() };
    let mut capabilities = Vec::new();
    for capability in &request.volume_capabilities {
        capabilities.push(Capability::of(capability)?);
    }
    let is_elsewhere = request.accessible_topology.is_some_and(|there| !place.is_reached_from(&there));
    let available = if is_elsewhere || capabilities.iter().any(|it| it.refused_by(nature).is_some()) {
        0
    } else {
        match class.backend {
            None | Some(v1::Backend::File) => {
                let free = free_bytes(call.server_info().await?.storage_space.as_ref())?;
                sizes::clear(free, class.is_encrypted)
            }
            Some(other) => {
                return Err(Refusal::precondition(format!(
                    "the storage server does not tell how much is free in {}",
                    other.as_str_name()
                )));
            }
        }
    };
    Ok(csi::GetCapacityResponse {
        available_capacity: bytes(available),
        maximum_volume_size: None,
        minimum_volume_size: Some(bytes(GRANULE)),
    })
}

fn free_bytes(space: Option<&v1::StorageSpace>) -> Result<u64, Refusal> {
    let space = space.ok_or_else(|| {
        Refusal::precondition("the storage server does not tell how much is free on its file system")
    })?;
    Ok(space.free_bytes.saturating_sub(space.reserve_bytes) / GRANULE * GRANULE)
}

/// Where CSI has it published: the nodes that may attach it.
fn published_node_ids(volume: &v1::Volume) -> Vec<String> {
    volume.grants.iter().map(|grant| grant.node_id.clone()).collect()
}

/// As CSI has it.
fn to_csi(volume: &v1::Volume, place: &Place) -> csi::Volume {
    let source = Uuid::try_parse(&volume.source_uid).ok().and_then(|uid| {
        match volume.labels.get(names::LABEL_SOURCE).map(String::as_str) {
            Some(names::SOURCE_SNAPSHOT) => Some(Source::Snapshot(uid)),
            Some(names::SOURCE_VOLUME) => Some(Source::Volume(uid)),
            _ => None,
        }
    });
    let mut volume_context = HashMap::new();
    let fs_type = volume.labels.get(names::LABEL_FS_TYPE);
    volume_context.extend(fs_type.map(|name| (parameters::FS_TYPE.to_owned(), name.clone())));
    // So that no node takes it for one that needs no passphrase.
    volume_context.extend(volume.is_encrypted.then(|| (parameters::ENCRYPTED.to_owned(), true.to_string())));
    csi::Volume {
        capacity_bytes: bytes(sizes::clear(volume.capacity_bytes, volume.is_encrypted)),
        volume_id: volume.volume_uid.clone(),
        volume_context,
        content_source: source.map(Source::to_csi),
        accessible_topology: place.to_csi(),
    }
}

/// As CSI counts; the server has no larger size.
pub(super) fn bytes(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_grows_and_never_shrinks() {
        let size = |at_least, at_most| SizeRange { at_least, at_most };
        assert_eq!(grown(size(8192, None), 4096), Ok(Some(8192)));
        assert_eq!(grown(size(8192, Some(8192)), 8192), Ok(None));
        assert_eq!(grown(size(4096, None), 8192), Ok(None));
        assert_eq!(grown(size(5000, Some(9000)), 4096), Ok(Some(8192)));
        for (wanted, has) in [(size(4096, Some(4096)), 8192), (size(8193, Some(8200)), 4096)] {
            assert_eq!(grown(wanted, has).unwrap_err().code, Code::OutOfRange);
        }
    }

    #[test]
    fn a_failed_copy_is_told_by_what_stopped_it() {
        let of = |state: v1::OperationState, reason: &str| {
            failed(&v1::Operation {
                state: state.into(),
                error_reason: reason.to_owned(),
                ..Default::default()
            })
            .code
        };
        let state = v1::OperationState::Failed;
        assert_eq!(of(state, reason::NO_SPACE), Code::ResourceExhausted);
        assert_eq!(of(state, reason::SOURCE_LOST_WRITES), Code::Aborted);
        assert_eq!(of(state, reason::SERVER_FAILED), Code::Internal);
        assert_eq!(of(v1::OperationState::Cancelled, ""), Code::Aborted);
    }

    #[test]
    fn what_is_free_leaves_the_reserve() {
        let space =
            |free_bytes| v1::StorageSpace { free_bytes, reserve_bytes: 1 << 20, ..Default::default() };
        assert_eq!(free_bytes(Some(&space((1 << 30) + 1))), Ok((1 << 30) - (1 << 20)));
        assert_eq!(free_bytes(Some(&space(1))), Ok(0));
        assert_eq!(free_bytes(None).unwrap_err().code, Code::FailedPrecondition);
    }

    #[test]
    fn a_volume_is_told_with_what_its_labels_say() {
        let uid = "0f0e0d0c-0b0a-4908-8706-050403020100";
        let mut volume = v1::Volume {
            volume_uid: uid.to_owned(),
            capacity_bytes: 4096,
            source_uid: uid.to_owned(),
            labels: HashMap::from([
                (names::LABEL_SOURCE.to_owned(), names::SOURCE_VOLUME.to_owned()),
                (names::LABEL_FS_TYPE.to_owned(), "xfs".to_owned()),
            ]),
            grants: vec![v1::Grant { node_id: "n".to_owned(), ..Default::default() }],
            ..Default::default()
        };
        let told = to_csi(&volume, &Place::default());
        assert_eq!((told.volume_id.as_str(), told.capacity_bytes), (uid, 4096));
        assert_eq!(told.volume_context["csi.storage.k8s.io/fstype"], "xfs");
        assert_eq!(told.content_source, Some(Source::Volume(uid.parse().unwrap()).to_csi()));
        assert_eq!(published_node_ids(&volume), ["n"]);
        assert!(!told.volume_context.contains_key("encrypted"));
        volume.labels.clear();
        assert_eq!(to_csi(&volume, &Place::default()).content_source, None);
        let volume = v1::Volume { is_encrypted: true, capacity_bytes: 4096 + (16 << 20), ..volume };
        let told = to_csi(&volume, &Place::default());
        assert_eq!((told.capacity_bytes, told.volume_context["encrypted"].as_str()), (4096, "true"));
    }
}
