//! Records of the catalog, and what the data side says of them now, as messages of the API.
//!
//! Called by the service on a thread for blocking work. The secret is in [`attached`]'s answer and in no other message.

use proto::error_reason::METADATA_NEXT;
use proto::v1;
use tonic::Status;
use tonic_types::StatusExt as _;

use crate::catalog::{
    AdoptedKind, AttachmentRecord, AttachmentState, BackendKind, Content, GrantRecord, SnapshotRecord,
    SnapshotState, Space, VolumeLimits, VolumeRecord,
};
use crate::lifecycle::{
    Attached, DataSide, Lifecycle, LifecycleError, Operation, SnapshotError, SpaceLevel, StorageSpace,
    volume_etag,
};
use crate::scope::Scope;
use crate::status;
use crate::volume::copying::{CopyError, CopyTarget};

/// A volume with its attachments and grants.
pub(super) fn volume<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    volume: &VolumeRecord,
) -> Result<v1::Volume, LifecycleError> {
    let data_side = lifecycle.data_side();
    let held = lifecycle.catalog().attachments_of_volume(volume.volume_uid)?;
    let granted = lifecycle.catalog().grants_of_volume(volume.volume_uid)?;
    let settings = &volume.settings;
    let snapshot_count = lifecycle.catalog().snapshot_count(volume.volume_uid)?;
    let source_uid = lifecycle.catalog().source_of(volume.volume_uid)?;
    let adopted = lifecycle.catalog().adopted(volume.volume_uid)?;
    let (adopted_path, adopted_identity) = adopted
        .map(|adopted| (adopted.path, identity_word(adopted.kind, adopted.identity)))
        .unwrap_or_default();
    let write_cache = if volume.write_cache_on { v1::WriteCache::On } else { v1::WriteCache::Off };
    Ok(v1::Volume {
        name: volume.name.clone(),
        volume_uid: volume.volume_uid.to_string(),
        capacity_bytes: volume.capacity_bytes,
        block_size_bytes: volume.block_size_bytes,
        backend: backend(volume.backend).into(),
        write_cache: write_cache.into(),
        allocated_bytes: data_side.allocated_bytes(volume),
        storage_incarnation: data_side.storage_incarnation(volume),
        created_at_ms: volume.created_at_ms,
        attachments: held
            .iter()
            .map(|(held, state)| attachment(lifecycle, &volume.name, held, *state))
            .collect(),
        labels: settings.labels.clone().into_iter().collect(),
        description: settings.description.clone(),
        is_protected: settings.is_protected,
        is_read_only: settings.is_read_only,
        content: content(settings.content).into(),
        initialising_attachment_id: match settings.content {
            Content::Initialising { attachment_id } => attachment_id.to_string(),
            Content::NeverWritten | Content::Written => String::new(),
        },
        limits: Some(limits(&settings.limits)),
        throttled_ms: u64::try_from(data_side.throttled(volume.volume_uid).as_millis()).unwrap_or(u64::MAX),
        snapshot_count,
        is_shared: settings.is_shared,
        source_uid: source_uid.map_or_else(String::new, |uid| uid.to_string()),
        adopted_path,
        adopted_identity,
        // Whoever asks for one volume looks; see `followed`.
        adopted_problem: String::new(),
        grants: granted.iter().map(|granted| grant(&volume.name, granted)).collect(),
        // Whoever asks for it looks; see `with_exclusive_bytes`.
        exclusive_bytes: None,
        is_encrypted: settings.is_encrypted,
        etag: volume_etag(volume),
    })
}

/// A volume with what it has alone, which may have to be waited for.
pub(super) fn with_exclusive_bytes<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    found: VolumeRecord,
) -> Result<v1::Volume, LifecycleError> {
    let (volume_uid, backend) = (found.volume_uid, found.backend);
    let exclusive_bytes = lifecycle.data_side().exclusive_bytes(CopyTarget::Volume(volume_uid), backend);
    Ok(v1::Volume { exclusive_bytes, ..followed(lifecycle, found)? })
}

fn content(content: Content) -> v1::VolumeContent {
    match content {
        Content::NeverWritten => v1::VolumeContent::NeverWritten,
        Content::Initialising { .. } => v1::VolumeContent::Initialising,
        Content::Written => v1::VolumeContent::Written,
    }
}

fn limits(limits: &VolumeLimits) -> v1::VolumeLimits {
    v1::VolumeLimits {
        read_iops: limits.read_iops,
        write_iops: limits.write_iops,
        read_bytes_per_second: limits.read_bytes_per_second,
        write_bytes_per_second: limits.write_bytes_per_second,
        burst_seconds: limits.burst_seconds,
    }
}

/// A snapshot.
pub(super) fn snapshot<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    (snapshot, state): &(SnapshotRecord, SnapshotState),
) -> Result<v1::Snapshot, LifecycleError> {
    let held = lifecycle.catalog().attachments_of_volume(snapshot.snapshot_uid)?;
    let name = snapshot.export_name();
    let state = match state {
        SnapshotState::Ready => v1::SnapshotState::Ready,
        SnapshotState::Creating | SnapshotState::Deleting => v1::SnapshotState::Creating,
    };
    Ok(v1::Snapshot {
        name: snapshot.name.clone(),
        snapshot_uid: snapshot.snapshot_uid.to_string(),
        volume_name: snapshot.volume_name.clone(),
        volume_uid: snapshot.volume_uid.to_string(),
        capacity_bytes: snapshot.capacity_bytes,
        block_size_bytes: snapshot.block_size_bytes,
        state: state.into(),
        created_at_ms: snapshot.created_at_ms,
        group_uid: snapshot.group_uid.to_string(),
        content: content(snapshot.content).into(),
        allocated_bytes: lifecycle.data_side().snapshot_allocated_bytes(snapshot),
        attachments: held.iter().map(|(held, state)| attachment(lifecycle, &name, held, *state)).collect(),
        frozen: snapshot.is_frozen,
        freeze_id: snapshot.freeze_id.map(|id| id.to_string()).unwrap_or_default(),
        backend: backend(snapshot.backend).into(),
        exclusive_bytes: None,
        is_encrypted: snapshot.is_encrypted,
    })
}

/// What is told of the end of an operation to who sees a part of it alone: the words may be about another's volume.
const FAILED_ELSEWHERE: &str = "the operation failed; it also made what is outside of the caller's name space, and who manages that sees why";

/// An operation that goes on; none that has ended.
pub(super) fn running(scope: &Scope, operation: Option<&Operation>) -> Option<v1::Operation> {
    let running = operation.filter(|operation| operation.end().is_none());
    running.map(|running| self::operation(scope, running))
}

/// An operation, with what of it is in the scope.
pub(super) fn operation(scope: &Scope, operation: &Operation) -> v1::Operation {
    // Before its end is looked at: one that has ended has done all that it tells.
    let (done_bytes, total_bytes) = operation.done_and_total_bytes();
    let end = operation.end();
    let is_cancelled = |error: &LifecycleError| {
        matches!(error, LifecycleError::Snapshot(SnapshotError::Copy(CopyError::Cancelled)))
    };
    let state = match &end {
        None => v1::OperationState::Running,
        Some(Ok(())) => v1::OperationState::Succeeded,
        Some(Err(error)) if is_cancelled(error) => v1::OperationState::Cancelled,
        Some(Err(_)) => v1::OperationState::Failed,
    };
    let told = end.and_then(Result::err).map(|error| status::of_lifecycle(&error));
    let is_whole = operation.is_within(scope);
    let message = |told: &Status| if is_whole { told.message() } else { FAILED_ELSEWHERE }.to_owned();
    let info = told.as_ref().and_then(|told| told.get_details_error_info());
    let (error_reason, next) = info.map_or_else(Default::default, |mut info| {
        (info.reason, info.metadata.remove(METADATA_NEXT).unwrap_or_default())
    });
    v1::Operation {
        operation_id: operation.id().to_string(),
        kind: operation.kind().as_str().to_owned(),
        targets: operation.targets().iter().filter(|target| scope.has_named(target)).cloned().collect(),
        state: state.into(),
        done_bytes,
        total_bytes,
        next,
        error_reason,
        error_message: told.as_ref().map(message).unwrap_or_default(),
        started_at_ms: operation.started_at_ms(),
        ended_at_ms: operation.ended_at_ms(),
    }
}

/// By what it is found again: a file by its path, which is its name.
fn identity_word(kind: AdoptedKind, identity: String) -> String {
    match kind {
        AdoptedKind::BlockDevice => identity,
        AdoptedKind::RawFile => "path".to_owned(),
    }
}

/// A volume as large as its device is now, with what is wrong with that.
pub(super) fn followed<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    found: VolumeRecord,
) -> Result<v1::Volume, LifecycleError> {
    let (found, problem) = lifecycle.follow_size(found)?;
    let adopted_problem = problem.map(|problem| problem.to_string()).unwrap_or_default();
    Ok(v1::Volume { adopted_problem, ..volume(lifecycle, &found)? })
}

fn backend(kind: BackendKind) -> v1::Backend {
    match kind {
        BackendKind::File => v1::Backend::File,
        BackendKind::Memory => v1::Backend::Memory,
        BackendKind::Device => v1::Backend::Device,
        BackendKind::Lvm => v1::Backend::Lvm,
    }
}

/// An attachment, without its secret.
pub(super) fn attachment<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    volume_name: &str,
    attachment: &AttachmentRecord,
    state: AttachmentState,
) -> v1::Attachment {
    let access_mode = match (attachment.read_only, attachment.is_shared) {
        (false, false) => v1::AccessMode::SingleNodeWriter,
        (false, true) => v1::AccessMode::MultiNodeMultiWriter,
        (true, false) => v1::AccessMode::SingleNodeReaderOnly,
        (true, true) => v1::AccessMode::MultiNodeReaderOnly,
    };
    v1::Attachment {
        attachment_id: attachment.attachment_id.to_string(),
        volume_name: volume_name.to_owned(),
        volume_uid: attachment.volume_uid.to_string(),
        node_id: attachment.node_id.clone(),
        access_mode: access_mode.into(),
        generation: attachment.generation,
        session_epoch: attachment.session_epoch,
        connections: lifecycle.data_side().connections_of(attachment.attachment_id),
        created_at_ms: attachment.created_at_ms,
        boot_id: attachment.boot_id.clone(),
        // No volume's name has an '@'.
        snapshot_uid: match volume_name.contains('@') {
            true => attachment.volume_uid.to_string(),
            false => String::new(),
        },
        is_ending: state == AttachmentState::Ending,
    }
}

/// A grant.
pub(super) fn grant(volume_name: &str, grant: &GrantRecord) -> v1::Grant {
    v1::Grant {
        volume_name: volume_name.to_owned(),
        volume_uid: grant.volume_uid.to_string(),
        node_id: grant.node_id.clone(),
        read_only: grant.read_only,
        created_at_ms: grant.created_at_ms,
    }
}

/// What the node that attached is told, secret included.
pub(super) fn attached<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    attached: &Attached,
    data_addresses: Vec<String>,
) -> v1::AttachVolumeResponse {
    v1::AttachVolumeResponse {
        attachment: Some(attachment(
            lifecycle,
            &attached.volume.name,
            &attached.attachment,
            AttachmentState::Active,
        )),
        secret: if attached.hides_secret {
            String::new()
        } else {
            attached.attachment.secret.expose().to_owned()
        },
        server_id: lifecycle.catalog().server_id().to_string(),
        data_addresses,
        capacity_bytes: attached.volume.capacity_bytes,
        block_size_bytes: attached.volume.block_size_bytes,
        existed: attached.existed,
        backend: backend(attached.volume.backend).into(),
        is_encrypted: attached.volume.settings.is_encrypted,
    }
}

/// How full the volumes' file system is.
pub(super) fn storage_space(seen: StorageSpace) -> v1::StorageSpace {
    let level = match seen.level {
        SpaceLevel::Enough => v1::SpaceLevel::Enough,
        SpaceLevel::Low => v1::SpaceLevel::Low,
        SpaceLevel::BelowReserve => v1::SpaceLevel::BelowReserve,
        SpaceLevel::Full => v1::SpaceLevel::Full,
    };
    let Space { free_bytes, total_bytes } = seen.space;
    v1::StorageSpace { free_bytes, total_bytes, reserve_bytes: seen.reserve_bytes, level: level.into() }
}
