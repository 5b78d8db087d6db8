//! The one place where an error becomes a gRPC `Status`.
//!
//! Owns the table from what went wrong to code, `google.rpc.ErrorInfo` (domain and reason from `proto::error_reason`,
//! metadata `next`: what to do) and `google.rpc.BadRequest`. Called by `management/` only. A failure of ours is logged here
//! in full, and told to the caller without the server's paths. No message holds a secret: none of the errors does.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use proto::error_reason as reason;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::backend::device::AdoptError;
use crate::backend::lvm::LvmError;
use crate::catalog::QuotaReached;
use crate::lifecycle::{GrantsError, LifecycleError, NodesError, SettingsError, SnapshotError, TenantsError};
use crate::volume::copying::CopyError;

const NEXT_OF_OTHER_BOOT: &str = "give every machine an id of its own (rm /etc/machine-id && systemd-machine-id-setup, or volclient serve \
     --node-id); if this machine was rebooted, repeat the call in a minute; or take the volume with force";
const NEXT_OF_UNFENCED: &str = "repeat the call: it goes on where this one stopped";
const NEXT_OF_NO_MEMORY: &str = "delete volumes in memory, lower the server's --memory-max, or raise what it may have, then repeat the call";

const NEXT_OF_NO_POOL: &str =
    "start volserver with --lvm VG/THINPOOL, or make the volume with the backend file";
const NEXT_OF_RESERVE: &str =
    "delete snapshots or volumes, make the file system larger, or lower the server's --snapshot-reserve";
const NEXT_OF_THIN_POOL: &str =
    "extend the pool (lvextend; its metadata with --poolmetadatasize), or delete snapshots or volumes";

/// So many fields an error names, and so many bytes says of each: together, and as their encodings have them, less than the 16 KiB
/// of headers that clients take.
const FIELDS_TOLD_MAX: usize = 8;
const FIELD_BYTES_MAX: usize = 300;

/// A field of a request that is off, and what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InvalidField {
    /// Its name in the message.
    pub(crate) field: &'static str,
    /// What is wrong with it.
    pub(crate) description: String,
}

/// INVALID_ARGUMENT, naming every field that is off; of very many the first, of long texts the beginning: they are told in headers.
pub(crate) fn invalid_fields(mut invalid: Vec<InvalidField>) -> Status {
    invalid.truncate(FIELDS_TOLD_MAX);
    for one in &mut invalid {
        if one.description.len() > FIELD_BYTES_MAX {
            one.description.truncate(one.description.floor_char_boundary(FIELD_BYTES_MAX));
            one.description.push_str("...");
        }
    }
    let text: Vec<String> = invalid.iter().map(|one| format!("{}: {}", one.field, one.description)).collect();
    let mut details = error_info(reason::INVALID_FIELD, "correct the field and repeat the call", []);
    details.set_bad_request(
        invalid.into_iter().map(|one| FieldViolation::new(one.field, one.description)).collect::<Vec<_>>(),
    );
    Status::with_error_details(Code::InvalidArgument, text.join("; "), details)
}

fn invalid_field(field: &'static str, description: String) -> Status {
    invalid_fields(vec![InvalidField { field, description }])
}

/// The status for an error of the lifecycle.
pub(crate) fn from_lifecycle(error: &LifecycleError) -> Status {
    match error {
        LifecycleError::Storage { .. }
        | LifecycleError::Listing(_)
        | LifecycleError::Catalog(_)
        | LifecycleError::Snapshot(SnapshotError::Copy(CopyError::Failed(_))) => {
            tracing::error!(cause = %error, "a management call failed");
        }
        LifecycleError::CatalogHeld { .. } => {
            tracing::warn!(message = %error, "refused a management call")
        }
        _ => {}
    }
    of_lifecycle(error)
}

/// The same of an error that has been logged.
pub(crate) fn of_lifecycle(error: &LifecycleError) -> Status {
    let message = error.to_string();
    let (code, details) = match error {
        LifecycleError::VolumeNotFound(_) => {
            told(Code::NotFound, reason::VOLUME_NOT_FOUND, "list the volumes to see which there are")
        }
        LifecycleError::PartitionName { .. } => return invalid_field("name", message),
        LifecycleError::VolumeDiffers { property, existing, .. } => (
            Code::AlreadyExists,
            error_info(
                reason::VOLUME_DIFFERS,
                "choose another name, or ask for the properties that the volume has",
                [("property", *property), ("existing", existing)],
            ),
        ),
        LifecycleError::VolumeAttached { node_id, .. } => of_node(
            Code::FailedPrecondition,
            reason::VOLUME_ATTACHED,
            "detach it there, or take it from that node by attaching it with force",
            node_id,
        ),
        LifecycleError::OtherBoot { node_id, .. } => {
            of_node(Code::FailedPrecondition, reason::OTHER_BOOT, NEXT_OF_OTHER_BOOT, node_id)
        }
        LifecycleError::OtherBootMayReturn { node_id, .. } => of_node(
            Code::Unavailable,
            reason::OTHER_BOOT_MAY_RETURN,
            "repeat the call: it waits until the former boot had its time",
            node_id,
        ),
        LifecycleError::AttachedDifferently { node_id, .. } => of_node(
            Code::AlreadyExists,
            reason::ATTACHED_DIFFERENTLY,
            "detach it first, or attach with the access mode that it has",
            node_id,
        ),
        LifecycleError::VolumeOpen { .. } => told(
            Code::FailedPrecondition,
            reason::VOLUME_OPEN,
            "disconnect the clients that opened it by name, then repeat the call",
        ),
        LifecycleError::SeveralHolders { .. } => told(
            Code::InvalidArgument,
            reason::SEVERAL_HOLDERS,
            "name the attachment, or the node that is to lose the volume",
        ),
        LifecycleError::Settings(error) => of_settings(error),
        LifecycleError::Nodes(error) => of_nodes(error),
        LifecycleError::Grants(error) => of_grants(error),
        LifecycleError::Tenants(error) => of_tenants(error),
        LifecycleError::NoThinPool(_) => {
            told(Code::FailedPrecondition, reason::NO_THIN_POOL, NEXT_OF_NO_POOL)
        }
        LifecycleError::Adopt(error) => of_adopted(error),
        LifecycleError::AdoptedSize { size_bytes, .. } => of_adopted_size(*size_bytes),
        LifecycleError::BlockSize { .. } => return invalid_field("block_size_bytes", message),
        LifecycleError::SizeFixed { .. } => {
            told(Code::FailedPrecondition, reason::SIZE_FIXED, "make a new volume of the size that you want")
        }
        LifecycleError::TooLarge { .. }
        | LifecycleError::Shrink { .. }
        | LifecycleError::SizeUnaligned { .. } => return invalid_field("capacity_bytes", message),
        LifecycleError::NoSpace(_) => {
            told(Code::ResourceExhausted, reason::NO_SPACE, "free space on the server, then repeat the call")
        }
        LifecycleError::NoMemory { .. } => told(Code::ResourceExhausted, reason::NO_SPACE, NEXT_OF_NO_MEMORY),
        LifecycleError::Unfenced { .. } => {
            told(Code::Unavailable, reason::FENCE_UNFINISHED, NEXT_OF_UNFENCED)
        }
        LifecycleError::Freeze(error) => told(Code::FailedPrecondition, error.reason(), error.next()),
        LifecycleError::Snapshot(error) => return of_snapshot(error, message),
        LifecycleError::CatalogHeld { .. } => told(
            Code::Unavailable,
            reason::CATALOG_HELD,
            "close it (a transaction in sqlite3, a backup that hangs), then repeat the call: it goes on where this one stopped",
        ),
        LifecycleError::Storage { source, .. } => return of_storage(source, message),
        LifecycleError::Listing(_) | LifecycleError::Catalog(_) => return broken(),
    };
    Status::with_error_details(code, message, details)
}

/// The status for a failure of the storage; one that is in a thin pool which this server has not is no failure of ours.
fn of_storage(source: &io::Error, message: String) -> Status {
    match source.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(LvmError::NotConfigured | LvmError::OtherPool { .. }) => {
            let next = "start volserver with the --lvm of that pool, then repeat the call";
            let (code, details) = told(Code::FailedPrecondition, reason::NO_THIN_POOL, next);
            Status::with_error_details(code, message, details)
        }
        _ => broken(),
    }
}

/// What is told with an error about a node.
fn of_nodes(error: &NodesError) -> (Code, ErrorDetails) {
    match error {
        NodesError::NotFound(_) => told(
            Code::NotFound,
            reason::NODE_NOT_FOUND,
            "start the node daemon there (volclient serve), or correct the name: list the nodes to see which there are",
        ),
        NodesError::Changed { etag, .. } => changed(
            reason::NODE_CHANGED,
            "look at the node again, and repeat the call with its etag if it is still meant",
            etag,
        ),
        NodesError::TooMany(_) => told(
            Code::ResourceExhausted,
            reason::TOO_MANY_NODES,
            "delete nodes that are gone: the list of nodes tells when each was heard of",
        ),
        NodesError::Attached(_) => told(
            Code::FailedPrecondition,
            reason::NODE_ATTACHED,
            "detach what is attached to it: list the attachments of the node",
        ),
        NodesError::Granted(_) => told(
            Code::FailedPrecondition,
            reason::NODE_GRANTED,
            "take its grants away (volctl grant delete): list the grants of the node",
        ),
    }
}

/// What is told with an error about a tenant.
fn of_tenants(error: &TenantsError) -> (Code, ErrorDetails) {
    match error {
        TenantsError::NotFound(_) => {
            told(Code::NotFound, reason::TENANT_NOT_FOUND, "list the tenants to see which there are")
        }
        TenantsError::NotEmpty { .. } => told(
            Code::FailedPrecondition,
            reason::TENANT_NOT_EMPTY,
            "delete its volumes and snapshots first, or set a quota of nothing",
        ),
        TenantsError::Fixed { .. } => told(
            Code::FailedPrecondition,
            reason::TENANT_FIXED,
            "clone it into the other name space (volctl clone), and delete it",
        ),
        TenantsError::Quota(reached) => {
            let QuotaReached { tenant, limited, used, limit, .. } = reached;
            let next = format!(
                "delete what is not needed, or have an administrator raise it (volctl tenant set {tenant} --{})",
                limited.as_str().replace('_', "-")
            );
            let (used, limit) = (used.to_string(), limit.to_string());
            let metadata = [
                ("tenant", tenant.as_str()),
                ("quota", limited.as_str()),
                ("used", &used),
                ("limit", &limit),
            ];
            (Code::ResourceExhausted, error_info(reason::TENANT_QUOTA, &next, metadata))
        }
    }
}

/// What is told with an error about a grant.
fn of_grants(error: &GrantsError) -> (Code, ErrorDetails) {
    match error {
        GrantsError::NodeFull { node_id, .. } => of_node(
            Code::ResourceExhausted,
            reason::NODE_FULL,
            "take a volume from the node first (volctl grant delete, volctl detach), or grant this one to another node; the limit is \
             the node daemon's --max-volumes",
            node_id,
        ),
        GrantsError::NotGranted { node_id, .. } => of_node(
            Code::FailedPrecondition,
            reason::VOLUME_NOT_GRANTED,
            "grant the volume to the node first (volctl grant create)",
            node_id,
        ),
        GrantsError::GrantedToRead { node_id, .. } => of_node(
            Code::FailedPrecondition,
            reason::VOLUME_NOT_GRANTED,
            "attach it read-only, or take the grant away and make another (volctl grant)",
            node_id,
        ),
        GrantsError::Granted { node_ids, .. } => of_node(
            Code::FailedPrecondition,
            reason::VOLUME_GRANTED,
            "take it from there first (volctl grant delete): that ends what the node has attached of it",
            node_ids,
        ),
        GrantsError::Differently { node_id, .. } => of_node(
            Code::AlreadyExists,
            reason::GRANTED_DIFFERENTLY,
            "take the grant away first (volctl grant delete), which ends what the node has attached of it",
            node_id,
        ),
    }
}

/// What is told with an error that a volume's settings make.
fn of_settings(error: &SettingsError) -> (Code, ErrorDetails) {
    let refused = |word, next| told(Code::FailedPrecondition, word, next);
    match error {
        SettingsError::Changed { etag, .. } => changed(
            reason::VOLUME_CHANGED,
            "look at the volume again, and repeat the call with its etag if it is still meant",
            etag,
        ),
        SettingsError::Protected(_) => refused(
            reason::VOLUME_PROTECTED,
            "take the protection off (volctl set VOLUME --no-protect), then repeat the call",
        ),
        SettingsError::ReadOnly(_) => refused(
            reason::VOLUME_READ_ONLY,
            "attach it read-only, or take the mark off (volctl set VOLUME --no-read-only)",
        ),
        SettingsError::NameTaken(_) => told(
            Code::AlreadyExists,
            reason::VOLUME_NAME_TAKEN,
            "choose another name, or rename or delete the volume that has it",
        ),
        SettingsError::RenamedMeanwhile(_) => {
            told(Code::Unavailable, reason::VOLUME_RENAMED, "repeat the call")
        }
        SettingsError::NameFixed(_) => refused(
            reason::NAME_FIXED,
            "make a volume of the new name; what is in memory would not outlive a restart of the server either",
        ),
        SettingsError::HasWriter { .. } => refused(
            reason::VOLUME_HAS_WRITER,
            "detach it there, or disconnect the clients that opened it by name, then repeat the call",
        ),
        SettingsError::NotShared(_) => refused(
            reason::VOLUME_NOT_SHARED,
            "attach it with one writer; or make a volume for several, whose software has to keep them apart (volctl create --shared)",
        ),
        SettingsError::Shared { .. } => refused(
            reason::VOLUME_SHARED,
            "have the software that shares it come to rest, and repeat the call without a freeze",
        ),
        SettingsError::TooManyLabels { .. } => told(
            Code::InvalidArgument,
            reason::INVALID_FIELD,
            "take labels away that are not needed (volctl set VOLUME --label KEY-)",
        ),
        SettingsError::NoSuchAttachment { .. } => {
            told(Code::NotFound, reason::ATTACHMENT_NOT_FOUND, "list the attachments of the volume")
        }
        SettingsError::ContentRefused { .. } => refused(
            reason::CONTENT_REFUSED,
            "use what is on the volume; or detach the attachment that formats it, and attach it anew",
        ),
    }
}

/// The status for what is wrong with a snapshot, a clone or a restore.
fn of_snapshot(error: &SnapshotError, message: String) -> Status {
    let (code, details) = match error {
        SnapshotError::NotFound(_) => {
            told(Code::NotFound, reason::SNAPSHOT_NOT_FOUND, "list the snapshots to see which there are")
        }
        SnapshotError::OperationNotFound(_) => told(
            Code::NotFound,
            reason::OPERATION_NOT_FOUND,
            "list the operations; what one has made is among the volumes and snapshots",
        ),
        SnapshotError::Exists { .. } => told(
            Code::AlreadyExists,
            reason::SNAPSHOT_EXISTS,
            "choose another name, or delete the snapshots that have this one",
        ),
        SnapshotError::Unsupported { .. } | SnapshotError::Copy(CopyError::Unsupported(_)) => told(
            Code::FailedPrecondition,
            reason::SNAPSHOTS_UNSUPPORTED,
            "have the server's --data-dir on XFS or btrfs, and the volume of the backend file; see docs/snapshots.md",
        ),
        SnapshotError::Initialising { .. } => told(
            Code::FailedPrecondition,
            reason::CONTENT_REFUSED,
            "wait until it is formatted, then repeat the call",
        ),
        SnapshotError::Reserve { .. } => {
            told(Code::ResourceExhausted, reason::SNAPSHOT_RESERVE, NEXT_OF_RESERVE)
        }
        SnapshotError::ThinPool { .. } => {
            told(Code::ResourceExhausted, reason::SNAPSHOT_RESERVE, NEXT_OF_THIN_POOL)
        }
        SnapshotError::Smaller { .. } | SnapshotError::Unaligned { .. } => {
            return invalid_fields(vec![InvalidField { field: "capacity_bytes", description: message }]);
        }
        SnapshotError::BehindEnd { .. } => {
            return invalid_fields(vec![InvalidField { field: "offset_bytes", description: message }]);
        }
        SnapshotError::NotTaken(_) => told(
            Code::Aborted,
            reason::COPY_CANCELLED,
            "take the ranges as they come; the next_offset_bytes of the last answer is where to go on",
        ),
        SnapshotError::InProgress { operation_id, .. } => (
            Code::FailedPrecondition,
            error_info(
                reason::COPY_IN_PROGRESS,
                "wait for its end, or cancel it, then repeat the call",
                [("operation_id", &operation_id.to_string())],
            ),
        ),
        SnapshotError::Open { .. } => told(
            Code::FailedPrecondition,
            reason::SNAPSHOT_OPEN,
            "disconnect the clients that opened it by name, then repeat the call",
        ),
        SnapshotError::Attached { node_ids, .. } => of_node(
            Code::FailedPrecondition,
            reason::SNAPSHOT_ATTACHED,
            "detach it there, then repeat the call",
            node_ids,
        ),
        SnapshotError::NeverChanges(_) => told(
            Code::FailedPrecondition,
            reason::VOLUME_READ_ONLY,
            "attach it read-only, or clone it and attach the clone (volctl clone)",
        ),
        SnapshotError::VolumeHasSnapshots { .. } => told(
            Code::FailedPrecondition,
            reason::VOLUME_HAS_SNAPSHOTS,
            "delete its snapshots first, or keep them (volctl delete --keep-snapshots)",
        ),
        SnapshotError::Busy { .. } => {
            told(Code::Unavailable, reason::COPY_BUSY, "repeat the call when some of them have ended")
        }
        SnapshotError::Stopping => return stopping(),
        SnapshotError::Copy(error) => return of_copy(error, message),
    };
    Status::with_error_details(code, message, details)
}

/// The status for a copy that failed.
fn of_copy(error: &CopyError, message: String) -> Status {
    let (code, details) = match error {
        CopyError::Unsupported(_) => told(
            Code::FailedPrecondition,
            reason::SNAPSHOTS_UNSUPPORTED,
            "have the server's --data-dir on XFS or btrfs; see docs/snapshots.md",
        ),
        CopyError::NoSpace => {
            told(Code::ResourceExhausted, reason::NO_SPACE, "free space on the server, then repeat the call")
        }
        CopyError::SourceLostWrites => told(
            Code::Aborted,
            reason::SOURCE_LOST_WRITES,
            "see the server's log for the storage's error; when its clients have written again, repeat the call",
        ),
        CopyError::Cancelled => {
            told(Code::Aborted, reason::COPY_CANCELLED, "repeat the call to begin it anew")
        }
        CopyError::Busy(_) => told(Code::Unavailable, reason::COPY_BUSY, "repeat the call"),
        CopyError::NotReady { next, .. } => told(Code::FailedPrecondition, reason::STORAGE_NOT_READY, next),
        CopyError::Failed(_) => return broken(),
    };
    Status::with_error_details(code, message, details)
}

fn of_adopted_size(size_bytes: u64) -> (Code, ErrorDetails) {
    let next = format!(
        "make the device that large, and the volume follows; or ask for the {size_bytes} bytes that it has, if that is more than before"
    );
    told(Code::FailedPrecondition, reason::ADOPTED_SIZE, &next)
}

/// What is told of what cannot be adopted, or not be found.
fn of_adopted(error: &AdoptError) -> (Code, ErrorDetails) {
    let refused = |word, next: &str| told(Code::FailedPrecondition, word, next);
    match error {
        AdoptError::NotAllowed { .. } => told(
            Code::PermissionDenied,
            reason::ADOPT_NOT_ALLOWED,
            "start volserver with --adopt-allow and the path, or a directory above it",
        ),
        AdoptError::Link { instead, .. } if !instead.is_empty() => {
            refused(reason::ADOPT_UNSUITABLE, &format!("give {instead}"))
        }
        AdoptError::BadPath(_) | AdoptError::Link { .. } | AdoptError::Unsuitable { .. } => refused(
            reason::ADOPT_UNSUITABLE,
            "give the path of a block device or raw file that is as it should be",
        ),
        AdoptError::Io { .. } => refused(
            reason::ADOPT_UNSUITABLE,
            "look whether it is there and the server may open it (devices: deploy/volserver-adopt.conf), then repeat the call",
        ),
        AdoptError::InUse { .. } => {
            refused(reason::ADOPTED_IN_USE, "unmount it, or end what uses it, then repeat the call")
        }
        AdoptError::Adopted { name, .. } => refused(
            reason::ADOPTED_IN_USE,
            &format!("use the volume {name}, or delete it: what it adopted stays as it is"),
        ),
        AdoptError::Missing { .. } | AdoptError::Another { .. } | AdoptError::Ambiguous { .. } => refused(
            reason::ADOPTED_MISSING,
            "bring the device back; if it has grown and is the same, resize the volume to its size; or delete the volume and adopt anew",
        ),
        AdoptError::Shrunk { .. } => refused(reason::ADOPTED_SIZE, "make the device as large as it was"),
    }
}

/// INTERNAL: we are broken, and the server's log says how.
pub(crate) fn failed(cause: &str) -> Status {
    tracing::error!(cause, "a management call failed");
    broken()
}

/// The same where the log has it.
fn broken() -> Status {
    let details = error_info(reason::SERVER_FAILED, "see the server's log; the call may be repeated", []);
    Status::with_error_details(Code::Internal, "the server failed: its log says why", details)
}

/// PERMISSION_DENIED: the caller's certificate does not say that it may `what`.
pub(crate) fn forbidden(what: &str) -> Status {
    let next = "use a certificate that names it, see docs/tls.md";
    let details = error_info(reason::NOT_AUTHORIZED, next, []);
    Status::with_error_details(
        Code::PermissionDenied,
        format!("the caller's certificate does not allow to {what}"),
        details,
    )
}

/// PERMISSION_DENIED: what is to be made has a name outside of the tenants' name spaces that the caller's certificate is for.
pub(crate) fn outside(name: &str) -> Status {
    let next = "choose a name TENANT+NAME of the tenant that the certificate names, see docs/tls.md";
    let details = error_info(reason::NOT_AUTHORIZED, next, []);
    let message = format!("the caller's certificate does not allow to make anything by the name {name}");
    Status::with_error_details(Code::PermissionDenied, message, details)
}

/// UNAVAILABLE: the call came after the server began to stop; nothing was done.
pub(crate) fn stopping() -> Status {
    let details = error_info(reason::SERVER_STOPPING, "repeat the call once the server is there again", []);
    Status::with_error_details(Code::Unavailable, "the server is stopping", details)
}

/// INVALID_ARGUMENT: the request's id is that of another one.
pub(crate) fn request_id_reused() -> Status {
    let message = "request_id: was given to another request already";
    let next = "make a new UUID for each request, and keep it only for repetitions of the same one";
    let mut details = error_info(reason::REQUEST_ID_REUSED, next, []);
    details.set_bad_request(vec![FieldViolation::new("request_id", "was given to another request already")]);
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// DEADLINE_EXCEEDED: the caller waited no longer.
pub(crate) fn deadline_passed() -> Status {
    let next = "repeat the call, with its request_id if it had one: that finds what became of it; or set a later deadline";
    let details = error_info(reason::CALL_TIMED_OUT, next, []);
    let message = "the call's deadline has passed; it has done nothing, or is finished all the same";
    Status::with_error_details(Code::DeadlineExceeded, message, details)
}

/// OUT_OF_RANGE: what is behind the token of a watch cannot be told.
pub(crate) fn watch_token_too_old() -> Status {
    let message = "what is behind this token is not all kept any more, or it is of another server or another history of its catalog";
    let details = error_info(reason::WATCH_TOKEN_TOO_OLD, "watch anew without a token", []);
    Status::with_error_details(Code::OutOfRange, message, details)
}

/// ABORTED: the caller takes no events.
pub(crate) fn watch_too_slow(limit: Duration) -> Status {
    let details = error_info(reason::WATCH_TOO_SLOW, "watch again with the token of the last event", []);
    let message = format!("no event was taken for {} s", limit.as_secs());
    Status::with_error_details(Code::Aborted, message, details)
}

/// RESOURCE_EXHAUSTED: there are as many watches as there may be.
pub(crate) fn too_many_watches(most: usize) -> Status {
    let next = "end watches that nobody needs, or repeat the call when some have ended";
    let details = error_info(reason::TOO_MANY_WATCHES, next, []);
    let message = format!("{most} watches go on already, and there may be no more");
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

/// What is told with an error: its code, its reason, what to do next.
fn told(code: Code, word: &str, next: &str) -> (Code, ErrorDetails) {
    (code, error_info(word, next, []))
}

/// ABORTED: what the call is about is not as its caller has seen it.
fn changed(word: &str, next: &str, etag: &str) -> (Code, ErrorDetails) {
    (Code::Aborted, error_info(word, next, [(reason::METADATA_ETAG, etag)]))
}

/// The same, of an error that is about a node.
fn of_node(code: Code, word: &str, next: &str, node_id: &str) -> (Code, ErrorDetails) {
    (code, error_info(word, next, [("node_id", node_id)]))
}

fn error_info<const N: usize>(word: &str, next: &str, metadata: [(&str, &str); N]) -> ErrorDetails {
    let metadata: HashMap<String, String> = metadata
        .into_iter()
        .chain([(reason::METADATA_NEXT, next)])
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    ErrorDetails::with_error_info(word, reason::DOMAIN, metadata)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn what_is_in_a_pool_that_is_not_here_is_told_and_what_broke_is_not() {
        let storage = |source| LifecycleError::Storage { action: "remove", volume_uid: Uuid::nil(), source };
        let told = of_lifecycle(&storage(io::Error::other(LvmError::NotConfigured)));
        assert_eq!(told.code(), Code::FailedPrecondition);
        assert!(told.message().contains("--lvm VG/THINPOOL"), "{told}");
        let broken = of_lifecycle(&storage(io::Error::other("/a/path")));
        assert_eq!(broken.code(), Code::Internal);
        assert!(!broken.message().contains("/a/path"), "{broken}");
    }
}
