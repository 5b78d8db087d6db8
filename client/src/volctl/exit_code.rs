//! The exit codes of volctl: stable, documented in `volctl --help`, decided in one function.

use proto::error_reason as reason;
use tonic::Code;

/// Printed after `volctl --help`.
pub(crate) const EXIT_CODES_HELP: &str = "\
Exit codes:
  0  done (also: it was so already)
  1  failed for a reason without a code of its own; stderr tells it
  2  wrong usage, or a value that is not allowed
  3  there is no such volume, snapshot, operation, node or tenant
  4  it exists already, with other properties
  5  its state does not allow it: in use, attached elsewhere, or failed
  6  the storage server or the node daemon cannot be reached
  7  this machine cannot: not root, no ublk driver, or a data path that its kernel lacks
  8  no space left on the storage server, in a tenant's quota, or for a file
  9  not done in time
  10 apply --dry-run: something would be changed
  11 the volume is encrypted: its passphrase is wrong, or none was given";

/// How volctl ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ExitCode {
    Done = 0,
    Other = 1,
    Usage = 2,
    NotFound = 3,
    AlreadyExists = 4,
    Precondition = 5,
    Unreachable = 6,
    MachineCannot = 7,
    NoSpace = 8,
    TimedOut = 9,
    /// Of a dry run alone.
    WouldChange = 10,
    Passphrase = 11,
}

impl ExitCode {
    /// For an answer of the storage server or the node daemon. The reason decides where it says more than the code.
    pub(crate) fn of(code: Code, error_reason: &str) -> Self {
        match error_reason {
            reason::NO_UBLK_DRIVER
            | reason::NOT_PERMITTED
            | reason::DATA_PATH_UNSUPPORTED
            | reason::NO_CRYPTSETUP => {
                return Self::MachineCannot;
            }
            reason::PASSPHRASE_MISSING | reason::PASSPHRASE_WRONG => return Self::Passphrase,
            reason::DEVICE_START_FAILED | reason::NEWER_FORMAT | reason::NOT_AUTHORIZED => {
                return Self::Other;
            }
            // No storage is full.
            reason::TOO_MANY_WATCHES | reason::NODE_FULL => return Self::Precondition,
            _ => {}
        }
        match code {
            Code::Ok => Self::Done,
            Code::InvalidArgument | Code::OutOfRange => Self::Usage,
            Code::NotFound => Self::NotFound,
            Code::AlreadyExists => Self::AlreadyExists,
            Code::FailedPrecondition | Code::Aborted => Self::Precondition,
            Code::Unavailable => Self::Unreachable,
            Code::PermissionDenied | Code::Unauthenticated => Self::MachineCannot,
            Code::ResourceExhausted => Self::NoSpace,
            Code::DeadlineExceeded => Self::TimedOut,
            Code::Cancelled | Code::Unknown | Code::Unimplemented | Code::Internal | Code::DataLoss => {
                Self::Other
            }
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_code_is_documented() {
        let all = [
            ExitCode::Done,
            ExitCode::Other,
            ExitCode::Usage,
            ExitCode::NotFound,
            ExitCode::AlreadyExists,
            ExitCode::Precondition,
            ExitCode::Unreachable,
            ExitCode::MachineCannot,
            ExitCode::NoSpace,
            ExitCode::TimedOut,
            ExitCode::WouldChange,
            ExitCode::Passphrase,
        ];
        let documented: Vec<u8> = EXIT_CODES_HELP
            .lines()
            .filter_map(|line| line.trim_start().split(' ').next()?.parse().ok())
            .collect();
        assert_eq!(documented, all.map(|code| code as u8));
    }

    #[test]
    fn code_and_reason_decide() {
        assert_eq!(ExitCode::of(Code::NotFound, reason::VOLUME_NOT_FOUND), ExitCode::NotFound);
        assert_eq!(ExitCode::of(Code::AlreadyExists, reason::VOLUME_DIFFERS), ExitCode::AlreadyExists);
        assert_eq!(ExitCode::of(Code::FailedPrecondition, reason::DEVICE_OPEN), ExitCode::Precondition);
        assert_eq!(ExitCode::of(Code::FailedPrecondition, reason::NO_UBLK_DRIVER), ExitCode::MachineCannot);
        assert_eq!(ExitCode::of(Code::Unavailable, reason::DETACH_UNFINISHED), ExitCode::Unreachable);
        assert_eq!(ExitCode::of(Code::Unavailable, reason::CATALOG_HELD), ExitCode::Unreachable);
        assert_eq!(ExitCode::of(Code::ResourceExhausted, reason::NO_SPACE), ExitCode::NoSpace);
        assert_eq!(ExitCode::of(Code::ResourceExhausted, reason::TOO_MANY_WATCHES), ExitCode::Precondition);
        assert_eq!(ExitCode::of(Code::ResourceExhausted, reason::NODE_FULL), ExitCode::Precondition);
        assert_eq!(ExitCode::of(Code::DeadlineExceeded, reason::DEVICE_TIMED_OUT), ExitCode::TimedOut);
        assert_eq!(ExitCode::of(Code::InvalidArgument, "A_REASON_OF_LATER"), ExitCode::Usage);
        assert_eq!(ExitCode::of(Code::FailedPrecondition, reason::PASSPHRASE_WRONG), ExitCode::Passphrase);
        assert_eq!(ExitCode::of(Code::FailedPrecondition, reason::NO_CRYPTSETUP), ExitCode::MachineCannot);
        assert_eq!(ExitCode::of(Code::Internal, ""), ExitCode::Other);
    }
}
