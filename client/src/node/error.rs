//! Every error of the node daemon, and the one place that makes a gRPC status of it.
//!
//! A message says what happened; `ErrorInfo` carries a stable reason (`proto::error_reason`) and, in its metadata, what
//! to do next. A refusal of the storage server is passed on as it came. Nothing here holds a secret.
//! Called by: `node_service`.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use proto::error_reason as reason;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use ublk_core::ControlError;

use super::luks_plan::Refusal;
use crate::causes::with_sources;
use crate::contract::ContractError;

/// Why the node daemon could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A field of the request is off.
    #[error("{field}: {message}")]
    InvalidField {
        /// Its name in the API.
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The storage server refused.
    #[error("the storage server refused: {}", .0.message())]
    Refused(Box<Status>),
    /// The storage server does not answer.
    #[error("cannot reach the storage server at {server}: {cause}")]
    ServerUnreachable {
        /// Its URI.
        server: String,
        /// What was seen.
        cause: String,
    },
    /// Nothing accepts connections where the device process was to connect.
    #[error("cannot attach {target}: {why}")]
    DataUnreachable {
        /// What was to be attached.
        target: String,
        /// The data addresses.
        addresses: Vec<String>,
        /// The device process's last words.
        why: String,
    },
    /// The storage server answers nonsense.
    #[error("the storage server at {server} answered with {what}")]
    ServerAnswer {
        /// Its URI.
        server: String,
        /// What is wrong with the answer.
        what: &'static str,
    },
    /// The attach was to be under a grant, and there is none.
    #[error("{target} {why}")]
    NotGranted {
        /// What was to be attached.
        target: String,
        /// What is missing.
        why: &'static str,
        /// What to do.
        next: &'static str,
    },
    /// The device is gone; the server could not be told.
    #[error("the device of {target} is gone, but the storage server still holds the attachment: {cause}")]
    DetachUnfinished {
        /// What was to be detached.
        target: String,
        /// Why the server could not be told.
        cause: String,
    },
    /// This kernel cannot do what was asked for.
    #[error("data path {data_path} cannot be used on this machine: {why}")]
    DataPathUnsupported {
        /// Its name.
        data_path: String,
        /// The trial's outcome.
        why: String,
    },
    /// The ublk driver refuses, or is not there.
    #[error("{}", with_sources(.0))]
    Ublk(#[from] ControlError),
    /// Somebody has the device open.
    #[error("{target} is in use: {}", .holders.join(", "))]
    DeviceOpen {
        /// What was to be detached.
        target: String,
        /// Who, for people.
        holders: Vec<String>,
    },
    /// The attachment is there, but its device answers EIO.
    #[error("{target} is attached, but its device has failed: {why}")]
    DeviceFailed {
        /// What was to be attached.
        target: String,
        /// Its state's reason.
        why: String,
    },
    /// Nothing of that name is attached here.
    #[error("{target} is not attached to this machine")]
    NotAttached {
        /// As it was asked for.
        target: String,
    },
    /// The device process did not take the policy.
    #[error("the policy of {target} is as it was: {why}")]
    PolicyRefused {
        /// Whose.
        target: String,
        /// Its answer.
        why: String,
    },
    /// The device process is not replaced.
    #[error("cannot upgrade {target}: {why}")]
    UpgradeRefused {
        /// Whose.
        target: String,
        /// What is in the way.
        why: String,
    },
    /// The device process could not make the device.
    #[error("cannot attach {target}: {why}")]
    StartFailed {
        /// What was to be attached.
        target: String,
        /// Its last words.
        why: String,
    },
    /// The device process could not take the device away.
    #[error("cannot detach {target}: {why}")]
    StopFailed {
        /// What was to be detached.
        target: String,
        /// Its answer.
        why: String,
    },
    /// The device process did not do its part in time.
    #[error("{target}: {what} took more than {} s", .after.as_secs())]
    TimedOut {
        /// What was to be attached or detached.
        target: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// A partition of another disk has the stable name.
    #[error(
        "partition {partition} of {disk}, which is attached to this machine, has the name that the disk of {target} would have"
    )]
    NameTaken {
        /// What was to be attached.
        target: String,
        /// Whose partition it is.
        disk: String,
        /// Which.
        partition: u32,
    },
    /// It is a disk of this machine already, under its other name.
    #[error("{target} is attached to this machine already, as {other}")]
    AttachedAs {
        /// What was to be attached.
        target: String,
        /// As what it is.
        other: String,
    },
    /// There is nothing of it to be frozen here.
    #[error("{target} {why}")]
    NotMounted {
        /// The volume.
        target: String,
        /// What is missing.
        why: &'static str,
    },
    /// Not all of it could be frozen; what was is thawed.
    #[error("nothing is frozen: {why}")]
    FreezeFailed {
        /// What was in the way.
        why: String,
    },
    /// The target is attached here, otherwise than asked for.
    #[error("{target} is attached already, with {}", .differences.join(", "))]
    AttachedDifferently {
        /// What was to be attached.
        target: String,
        /// Such as "read_only false instead of true".
        differences: Vec<String>,
    },
    /// What is there does not allow that the encrypted disk is opened.
    #[error("{target}: {why}")]
    EncryptionRefused {
        /// What was to be attached.
        target: String,
        /// Why.
        why: Refusal,
    },
    /// No key slot of the LUKS header opens with it.
    #[error("the passphrase of {target} is wrong")]
    PassphraseWrong {
        /// Whose.
        target: String,
    },
    /// cryptsetup or the kernel refuses.
    #[error("{target}: {why}")]
    EncryptionFailed {
        /// Whose disk.
        target: String,
        /// What was tried, and what was said.
        why: String,
    },
    /// The programs are not there.
    #[error("the volume is encrypted, and this machine has no cryptsetup")]
    NoCryptsetup,
    /// A spec or a status cannot be read or written.
    #[error(transparent)]
    StateFile(#[from] ContractError),
    /// The operating system refuses something that should work.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A task of this daemon panicked: a fault of the program.
    #[error("internal error of the node daemon; its log tells more")]
    Panicked,
}

impl NodeError {
    fn code_and_reason(&self) -> (Code, &'static str) {
        match self {
            Self::InvalidField { .. } => (Code::InvalidArgument, reason::INVALID_FIELD),
            Self::Refused(status) => (status.code(), ""),
            Self::ServerUnreachable { .. } | Self::DataUnreachable { .. } => {
                (Code::Unavailable, reason::SERVER_UNREACHABLE)
            }
            Self::NotGranted { .. } => (Code::FailedPrecondition, reason::VOLUME_NOT_GRANTED),
            Self::DetachUnfinished { .. } => (Code::Unavailable, reason::DETACH_UNFINISHED),
            Self::DataPathUnsupported { .. } => (Code::FailedPrecondition, reason::DATA_PATH_UNSUPPORTED),
            Self::Ublk(ControlError::NoDriver) => (Code::FailedPrecondition, reason::NO_UBLK_DRIVER),
            Self::Ublk(ControlError::PermissionDenied { .. }) => {
                (Code::FailedPrecondition, reason::NOT_PERMITTED)
            }
            Self::Ublk(ControlError::TimedOut { .. }) | Self::TimedOut { .. } => {
                (Code::DeadlineExceeded, reason::DEVICE_TIMED_OUT)
            }
            Self::UpgradeRefused { .. } => (Code::FailedPrecondition, reason::UPGRADE_REFUSED),
            Self::NotAttached { .. } => (Code::NotFound, reason::NOT_ATTACHED),
            Self::DeviceOpen { .. } => (Code::FailedPrecondition, reason::DEVICE_OPEN),
            Self::DeviceFailed { .. } => (Code::FailedPrecondition, reason::DEVICE_FAILED),
            Self::StartFailed { .. } => (Code::FailedPrecondition, reason::DEVICE_START_FAILED),
            Self::NameTaken { .. } => (Code::FailedPrecondition, reason::NAME_TAKEN),
            Self::NotMounted { .. } => (Code::FailedPrecondition, reason::NOT_MOUNTED),
            Self::FreezeFailed { .. } => (Code::FailedPrecondition, reason::FREEZE_FAILED),
            Self::AttachedDifferently { .. } | Self::AttachedAs { .. } => {
                (Code::AlreadyExists, reason::ATTACHED_DIFFERENTLY)
            }
            Self::EncryptionRefused { why: Refusal::NoPassphrase, .. } => {
                (Code::FailedPrecondition, reason::PASSPHRASE_MISSING)
            }
            Self::EncryptionRefused { .. } => (Code::FailedPrecondition, reason::ENCRYPTION_REFUSED),
            Self::PassphraseWrong { .. } => (Code::FailedPrecondition, reason::PASSPHRASE_WRONG),
            Self::NoCryptsetup => (Code::FailedPrecondition, reason::NO_CRYPTSETUP),
            Self::StateFile(ContractError::Version { .. }) => {
                (Code::FailedPrecondition, reason::NEWER_FORMAT)
            }
            Self::ServerAnswer { .. }
            | Self::Ublk(_)
            | Self::StopFailed { .. }
            | Self::PolicyRefused { .. }
            | Self::StateFile(_)
            | Self::Io { .. }
            | Self::EncryptionFailed { .. }
            | Self::Panicked => (Code::Internal, reason::NODE_FAILED),
        }
    }

    /// What to do next, for people; empty where there is nothing to say beyond the message.
    fn next(&self) -> String {
        match self {
            Self::ServerUnreachable { server, .. } => format!(
                "check that volserver runs and listens at {server}; another address is given to \
                 `volclient serve --server URI`"
            ),
            Self::DataUnreachable { addresses, .. } => {
                format!("check that the NBD server runs and listens at {}", addresses.join(" or "))
            }
            Self::NotGranted { next, .. } => (*next).to_owned(),
            Self::DetachUnfinished { .. } => "repeat the detach once the server can be reached".to_owned(),
            Self::DataPathUnsupported { .. } => {
                "leave the choice to the program (--data-path auto), or see `volctl doctor`".to_owned()
            }
            Self::Ublk(ControlError::NoDriver) => "load it with `modprobe ublk_drv`; it needs Linux 6.0 or later \
                                                   with CONFIG_BLK_DEV_UBLK (Ubuntu: package linux-modules-extra)"
                .to_owned(),
            Self::Ublk(ControlError::PermissionDenied { .. }) => "run `volclient serve` as root".to_owned(),
            Self::DeviceOpen { .. } => "close it (unmount, swapoff, stop the process), then detach again; or take it \
                                        away all the same (--force), and I/O on it fails"
                .to_owned(),
            Self::UpgradeRefused { .. } => {
                "detach it and attach it again, or wait and try again".to_owned()
            }
            Self::NotAttached { .. } => "see `volctl attachments`".to_owned(),
            Self::DeviceFailed { .. } => "detach it, then attach it again".to_owned(),
            Self::StartFailed { .. } => {
                "mend what it says; the logs of `volclient serve`, the server and the kernel (dmesg) tell more"
                    .to_owned()
            }
            Self::StopFailed { .. } | Self::TimedOut { .. } | Self::Panicked => {
                "see the log of `volclient serve` and the kernel's (dmesg)".to_owned()
            }
            Self::NameTaken { disk, .. } => format!("detach {disk} first, or attach the two on different machines"),
            Self::AttachedAs { other, .. } => format!("use that disk, or detach {other} first"),
            Self::NotMounted { .. } => {
                "run volctl on the machine where it is mounted; or take the snapshot without --freeze".to_owned()
            }
            Self::FreezeFailed { .. } => {
                "mend what it says, then repeat the command; or take the snapshot without --freeze".to_owned()
            }
            Self::AttachedDifferently { .. } => {
                "detach it first, or ask for the properties it has".to_owned()
            }
            Self::EncryptionRefused { why, .. } => why.next().to_owned(),
            Self::PassphraseWrong { .. } => {
                "give another; a snapshot or clone has the passphrase that its volume had when it was taken".to_owned()
            }
            Self::NoCryptsetup => {
                "install cryptsetup (Debian: cryptsetup-bin), then repeat the call".to_owned()
            }
            Self::EncryptionFailed { .. } => {
                "mend what it says; the logs of `volclient serve` and of the kernel (dmesg) tell more".to_owned()
            }
            Self::StateFile(ContractError::Version { .. }) => "upgrade volclient on this machine".to_owned(),
            _ => String::new(),
        }
    }
}

impl From<NodeError> for Status {
    fn from(error: NodeError) -> Self {
        let error = match error {
            NodeError::Refused(status) => return *status,
            error => error,
        };
        let (code, reason) = error.code_and_reason();
        let mut metadata = HashMap::new();
        let next = error.next();
        if !next.is_empty() {
            metadata.insert(reason::METADATA_NEXT.to_owned(), next);
        }
        let mut details = ErrorDetails::with_error_info(reason, reason::DOMAIN, metadata);
        if let NodeError::InvalidField { field, message } = &error {
            details.add_bad_request_violation(*field, message);
        }
        Self::with_error_details(code, error.to_string(), details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_reason_and_advice() {
        let error =
            NodeError::DeviceOpen { target: "vol-123".into(), holders: vec!["mounted on /mnt".into()] };
        let status = Status::from(error);
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(status.message(), "vol-123 is in use: mounted on /mnt");
        let info = status.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("DEVICE_OPEN", "volnode"));
        assert!(info.metadata["next"].contains("unmount"));
    }

    #[test]
    fn a_refusal_of_the_server_is_passed_on_as_it_came() {
        let details = ErrorDetails::with_error_info(reason::VOLUME_NOT_FOUND, reason::DOMAIN, HashMap::new());
        let refusal = Status::with_error_details(Code::NotFound, "no volume x", details);
        let status = Status::from(NodeError::Refused(Box::new(refusal)));
        assert_eq!((status.code(), status.message()), (Code::NotFound, "no volume x"));
        assert_eq!(status.get_details_error_info().unwrap().reason, "VOLUME_NOT_FOUND");
    }
}
