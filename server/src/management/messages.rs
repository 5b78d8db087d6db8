//! Records of the catalog, and what the data side says of them now, as messages of the API.
//!
//! Called by the service on a thread for blocking work. The secret is in [`attached`]'s answer and in no other message.

use proto::v1;

use crate::catalog::{AttachmentRecord, BackendKind, VolumeRecord};
use crate::lifecycle::{Attached, DataSide, Lifecycle, LifecycleError};

/// A volume with its attachments.
pub(super) fn volume<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    volume: &VolumeRecord,
) -> Result<v1::Volume, LifecycleError> {
    let data_side = lifecycle.data_side();
    let held = lifecycle.catalog().attachment_of_volume(volume.volume_uid)?;
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
        attachments: held.iter().map(|(held, _)| attachment(lifecycle, &volume.name, held)).collect(),
    })
}

fn backend(kind: BackendKind) -> v1::Backend {
    match kind {
        BackendKind::File => v1::Backend::File,
        BackendKind::Memory => v1::Backend::Memory,
    }
}

/// An attachment, without its secret.
pub(super) fn attachment<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    volume_name: &str,
    attachment: &AttachmentRecord,
) -> v1::Attachment {
    let access_mode = if attachment.read_only {
        v1::AccessMode::SingleNodeReaderOnly
    } else {
        v1::AccessMode::SingleNodeWriter
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
    }
}

/// What the node that attached is told, secret included.
pub(super) fn attached<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    attached: &Attached,
    data_addresses: Vec<String>,
) -> v1::AttachVolumeResponse {
    v1::AttachVolumeResponse {
        attachment: Some(attachment(lifecycle, &attached.volume.name, &attached.attachment)),
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
    }
}
