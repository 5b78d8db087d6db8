//! The one place where an error becomes a gRPC `Status`.
//!
//! Owns the table from what went wrong to code, `google.rpc.ErrorInfo` (domain and reason from `proto::error_reason`,
//! metadata `next`: what to do) and `google.rpc.BadRequest`. Called by `management/` only. A failure of ours is logged here
//! in full, and told to the caller without the server's paths. No message holds a secret: none of the errors does.

use std::collections::HashMap;

use proto::error_reason as reason;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::lifecycle::LifecycleError;

/// A field of a request that is off, and what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InvalidField {
    /// Its name in the message.
    pub(crate) field: &'static str,
    /// What is wrong with it.
    pub(crate) description: String,
}

/// INVALID_ARGUMENT, naming every field that is off.
pub(crate) fn invalid_fields(invalid: Vec<InvalidField>) -> Status {
    let text: Vec<String> = invalid.iter().map(|one| format!("{}: {}", one.field, one.description)).collect();
    let mut details = error_info(reason::INVALID_FIELD, "correct the field and repeat the call", []);
    details.set_bad_request(
        invalid.into_iter().map(|one| FieldViolation::new(one.field, one.description)).collect::<Vec<_>>(),
    );
    Status::with_error_details(Code::InvalidArgument, text.join("; "), details)
}

/// The status for an error of the lifecycle.
pub(crate) fn from_lifecycle(error: &LifecycleError) -> Status {
    let message = error.to_string();
    let (code, details) = match error {
        LifecycleError::VolumeNotFound(_) => (
            Code::NotFound,
            error_info(reason::VOLUME_NOT_FOUND, "list the volumes to see which there are", []),
        ),
        LifecycleError::PartitionName { .. } => {
            return invalid_fields(vec![InvalidField { field: "name", description: message }]);
        }
        LifecycleError::VolumeDiffers { property, existing, .. } => (
            Code::AlreadyExists,
            error_info(
                reason::VOLUME_DIFFERS,
                "choose another name, or ask for the properties that the volume has",
                [("property", *property), ("existing", existing)],
            ),
        ),
        LifecycleError::VolumeAttached { node_id, .. } => (
            Code::FailedPrecondition,
            error_info(
                reason::VOLUME_ATTACHED,
                "detach it there, or take it from that node by attaching it with force",
                [("node_id", node_id.as_str())],
            ),
        ),
        LifecycleError::OtherBoot { node_id, .. } => (
            Code::FailedPrecondition,
            error_info(
                reason::OTHER_BOOT,
                "give every machine an id of its own (rm /etc/machine-id && systemd-machine-id-setup, or volclient serve \
                 --node-id); if this machine was rebooted, repeat the call in a minute; or take the volume with force",
                [("node_id", node_id.as_str())],
            ),
        ),
        LifecycleError::OtherBootMayReturn { node_id, .. } => (
            Code::Unavailable,
            error_info(
                reason::OTHER_BOOT_MAY_RETURN,
                "repeat the call: it waits until the former boot had its time",
                [("node_id", node_id.as_str())],
            ),
        ),
        LifecycleError::AttachedDifferently { node_id, .. } => (
            Code::AlreadyExists,
            error_info(
                reason::ATTACHED_DIFFERENTLY,
                "detach it first, or attach with the access mode that it has",
                [("node_id", node_id.as_str())],
            ),
        ),
        LifecycleError::VolumeOpen { .. } => (
            Code::FailedPrecondition,
            error_info(
                reason::VOLUME_OPEN,
                "disconnect the clients that opened it by name, then repeat the call",
                [],
            ),
        ),
        LifecycleError::SizeFixed { .. } => (
            Code::FailedPrecondition,
            error_info(reason::SIZE_FIXED, "make a new volume of the size that you want", []),
        ),
        LifecycleError::TooLarge { .. }
        | LifecycleError::Shrink { .. }
        | LifecycleError::SizeUnaligned { .. } => {
            return invalid_fields(vec![InvalidField { field: "capacity_bytes", description: message }]);
        }
        LifecycleError::NoSpace(_) => (
            Code::ResourceExhausted,
            error_info(reason::NO_SPACE, "free space on the server, then repeat the call", []),
        ),
        LifecycleError::NoMemory { .. } => (
            Code::ResourceExhausted,
            error_info(
                reason::NO_SPACE,
                "delete volumes in memory, lower the server's --memory-max, or raise what it may have, then repeat the call",
                [],
            ),
        ),
        LifecycleError::Unfenced { .. } => (
            Code::Unavailable,
            error_info(reason::FENCE_UNFINISHED, "repeat the call: it goes on where this one stopped", []),
        ),
        LifecycleError::CatalogHeld { .. } => {
            tracing::warn!(%message, "a management call is refused");
            (
                Code::Unavailable,
                error_info(
                    reason::CATALOG_HELD,
                    "close it (a transaction in sqlite3, a backup that hangs), then repeat the call: it goes on where this one stopped",
                    [],
                ),
            )
        }
        LifecycleError::Storage { .. } | LifecycleError::Listing(_) | LifecycleError::Catalog(_) => {
            return failed(&message);
        }
    };
    Status::with_error_details(code, message, details)
}

/// INTERNAL: we are broken, and the server's log says how.
pub(crate) fn failed(cause: &str) -> Status {
    tracing::error!(cause, "a management call failed");
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

/// UNAVAILABLE: the call came after the server began to stop; nothing was done.
pub(crate) fn stopping() -> Status {
    let details = error_info(reason::SERVER_STOPPING, "repeat the call once the server is there again", []);
    Status::with_error_details(Code::Unavailable, "the server is stopping", details)
}

fn error_info<const N: usize>(word: &str, next: &str, metadata: [(&str, &str); N]) -> ErrorDetails {
    let metadata: HashMap<String, String> = metadata
        .into_iter()
        .chain([(reason::METADATA_NEXT, next)])
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    ErrorDetails::with_error_info(word, reason::DOMAIN, metadata)
}
