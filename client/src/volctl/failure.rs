//! A command that failed: what happened, what to do next, and the exit code.

use std::error::Error;
use std::fmt;

use client::api_channel;
use proto::error_reason as reason;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::exit_code::ExitCode;

/// Printed as `volctl: <what>` and, on a second line, `  next: <what to do>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) exit_code: ExitCode,
    pub(crate) what: String,
    /// Empty where there is nothing to advise.
    pub(crate) next: String,
    /// Of a refusal: the stable word for it (`proto::error_reason`).
    pub(crate) reason: String,
}

impl Failure {
    /// A failure with advice.
    pub(crate) fn new(exit_code: ExitCode, what: impl Into<String>, next: impl Into<String>) -> Self {
        Self { exit_code, what: what.into(), next: next.into(), reason: String::new() }
    }

    /// A failure without a code of its own.
    pub(crate) fn other(what: impl Into<String>) -> Self {
        Self::new(ExitCode::Other, what, "")
    }

    /// The peer's answer lacks something it promises.
    pub(crate) fn incomplete_answer(what: &str) -> Self {
        Self::new(
            ExitCode::Other,
            format!("the answer holds no {what}"),
            "see `volctl version`: do the versions fit?",
        )
    }
}

impl From<Status> for Failure {
    /// A refusal by the storage server or the node daemon, which both say what to do next.
    fn from(status: Status) -> Self {
        let info = status.get_details_error_info();
        let error_reason = info.as_ref().map_or("", |info| info.reason.as_str());
        if let Some(cause) = innermost_cause(&status).filter(|_| info.is_none()) {
            // A refused certificate shows like this: the client learns of it with its first call.
            return Self::new(
                ExitCode::Unreachable,
                format!("the connection failed: {cause}"),
                "repeat the call; if it fails again: is it https:// or http://, and are --tls-ca and --tls-cert right?",
            );
        }
        let advised = info.as_ref().and_then(|info| info.metadata.get(reason::METADATA_NEXT).cloned());
        let what = match (status.message(), info.is_some()) {
            ("", _) => format!("the call failed: {}", status.code().description()),
            // Only a connection that broke says so little; the peers explain themselves.
            (message, false) if status.code() == Code::Unavailable => {
                format!("the connection was lost: {message}")
            }
            (message, _) => message.to_owned(),
        };
        let next = advised.unwrap_or_else(|| match status.code() {
            Code::Unavailable => "repeat the call; it goes on where it stopped".to_owned(),
            Code::Unimplemented => "see `volctl version`: do the versions fit?".to_owned(),
            _ => String::new(),
        });
        let reason = error_reason.to_owned();
        Self { reason, ..Self::new(ExitCode::of(status.code(), error_reason), what, next) }
    }
}

/// What the system or TLS saw, if the status was made here because of it.
pub(crate) fn innermost_cause(status: &Status) -> Option<String> {
    status.source().map(api_channel::innermost_cause)
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "volctl: {}", self.what)?;
        if self.next.is_empty() { Ok(()) } else { writeln!(f, "  next: {}", self.next) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn advice_of_the_peer_is_printed_on_a_line_of_its_own() {
        let metadata = HashMap::from([("next".to_owned(), "unmount it".to_owned())]);
        let details = ErrorDetails::with_error_info(reason::DEVICE_OPEN, reason::DOMAIN, metadata);
        let status = Status::with_error_details(Code::FailedPrecondition, "vol-1 is in use", details);
        let failure = Failure::from(status);
        assert_eq!(failure.exit_code, ExitCode::Precondition);
        assert_eq!(failure.to_string(), "volctl: vol-1 is in use\n  next: unmount it\n");
    }

    #[test]
    fn a_status_without_details_is_understood() {
        let failure = Failure::from(Status::unavailable("broken pipe"));
        assert_eq!(failure.exit_code, ExitCode::Unreachable);
        assert!(failure.to_string().contains("the connection was lost: broken pipe\n  next: repeat"));
        assert_eq!(Failure::from(Status::internal("x")).to_string(), "volctl: x\n");
    }
}
