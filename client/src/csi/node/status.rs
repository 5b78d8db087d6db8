//! The one place where the Node service's errors become gRPC statuses.
//!
//! Source: the error tables of the CSI specification: what a code says to kubelet, which repeats a call on every one of them.

use std::io;

use tonic::Status;

use super::device::DeviceError;
use super::plan::Refusal;
use crate::csi::jobs::JobError;
use crate::csi::mounts::MountError;
use crate::csi::targets::TargetError;

/// A decision against it.
pub fn of_refusal(why: &Refusal) -> Status {
    let message = why.to_string();
    match why {
        Refusal::Stalled => Status::unavailable(message),
        Refusal::PublishedDifferently(_) => Status::already_exists(message),
        Refusal::BlockReadOnly => Status::invalid_argument(message),
        Refusal::Content(_)
        | Refusal::Failed
        | Refusal::UsedElsewhere
        | Refusal::UsedOtherwise(_)
        | Refusal::Occupied(_)
        | Refusal::NothingToRead
        | Refusal::NotStaged
        | Refusal::SecondTarget => Status::failed_precondition(message),
    }
}

/// Of a path.
pub fn of_target(error: &TargetError) -> Status {
    let message = error.to_string();
    match error {
        TargetError::Malformed { .. } | TargetError::Elsewhere { .. } => Status::invalid_argument(message),
        TargetError::Link { .. } | TargetError::OtherKind { .. } | TargetError::NotEmpty { .. } => {
            Status::failed_precondition(message)
        }
        TargetError::Io { source, .. } => of_io(source.kind(), message),
    }
}

/// Of what is mounted.
pub fn of_mount(error: &MountError) -> Status {
    match error {
        MountError::Target(error) => of_target(error),
        MountError::Kernel { source, .. } => of_io(source.kind(), error.to_string()),
        MountError::OtherDevice { .. }
        | MountError::DirtyJournal
        | MountError::StillMounted(_)
        | MountError::Hidden(_) => Status::failed_precondition(error.to_string()),
        MountError::Mountinfo(_) => Status::internal(error.to_string()),
    }
}

/// Of a disk.
pub fn of_device(error: &DeviceError) -> Status {
    match error {
        DeviceError::Io { .. } => Status::internal(error.to_string()),
        DeviceError::NotThere { .. } | DeviceError::Other { .. } | DeviceError::Size { .. } => {
            Status::failed_precondition(error.to_string())
        }
    }
}

/// Of a job.
pub fn of_job(error: &JobError) -> Status {
    match error {
        JobError::Running { .. } | JobError::Busy { .. } => Status::aborted(error.to_string()),
        JobError::Failed { source, .. } => of_io(source.kind(), error.to_string()),
    }
}

fn of_io(kind: io::ErrorKind, message: String) -> Status {
    match kind {
        // Somebody uses it, something that should be there is not, or a write is needed where nothing may be written.
        io::ErrorKind::ResourceBusy | io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem => {
            Status::failed_precondition(message)
        }
        _ => Status::internal(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_that_has_to_be_replayed_is_for_people_to_mend() {
        let source = io::Error::from(MountError::DirtyJournal);
        let status = of_job(&JobError::Failed { what: "the mount".to_owned(), source });
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        assert!(status.message().contains("stage it once for writing"), "{status}");
        let source = io::Error::from(io::ErrorKind::InvalidData);
        let status = of_job(&JobError::Failed { what: "the mount".to_owned(), source });
        assert_eq!(status.code(), tonic::Code::Internal);
    }
}
