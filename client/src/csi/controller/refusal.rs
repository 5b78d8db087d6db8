//! Why a call is not done: the code that CSI asks for, and words for people.
//!
//! Owns: the one table from the storage server's answers to those of CSI, and the gRPC status made of both. Never: shows a whole
//! value that a caller gave, or any secret. Called by everything in this folder.

use proto::error_reason as reason;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::api_channel;

/// How much of what a caller gave is shown, in characters.
const SHOWN_CHARACTERS_MAX: usize = 100;
/// Keys of `ErrorInfo.metadata`.
const NODE_ID: &str = "node_id";
/// The server's field for a volume's size.
const CAPACITY_FIELD: &str = "capacity_bytes";

/// A call that is not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// As CSI has it.
    pub(super) code: Code,
    /// For people: what is wrong, and what to do.
    pub(super) message: String,
    /// The server's, of `proto::error_reason`; empty where the server did not speak.
    pub(super) reason: String,
    /// Who is in the way, as the server says; several with commas between them.
    pub(super) node_ids: String,
}

impl Refusal {
    /// With a code and words of our own.
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), reason: String::new(), node_ids: String::new() }
    }

    /// INVALID_ARGUMENT: a field of the request is off.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// NOT_FOUND.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// ALREADY_EXISTS: under this name there is something else.
    pub(super) fn exists(message: impl Into<String>) -> Self {
        Self::new(Code::AlreadyExists, message)
    }

    /// OUT_OF_RANGE: no such size.
    pub(super) fn out_of_range(message: impl Into<String>) -> Self {
        Self::new(Code::OutOfRange, message)
    }

    /// FAILED_PRECONDITION.
    pub(super) fn precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message)
    }

    /// ABORTED: something goes on; the call is to be repeated.
    pub(super) fn pending(message: impl Into<String>) -> Self {
        Self::new(Code::Aborted, message)
    }

    /// What the server at this URI answered, or the channel in its place.
    pub(super) fn of_server(status: &Status, uri: &str) -> Self {
        let Some(info) = status.get_details_error_info() else { return of_channel(status, uri) };
        let is_of_size = || {
            let violations = status.get_details_bad_request().map(|off| off.field_violations);
            violations.unwrap_or_default().iter().any(|violation| violation.field == CAPACITY_FIELD)
        };
        let code = match (status.code(), info.reason.as_str()) {
            // CSI's word for what goes on already, and for what may be begun anew.
            (_, reason::COPY_IN_PROGRESS | reason::COPY_CANCELLED | reason::SOURCE_LOST_WRITES) => {
                Code::Aborted
            }
            (Code::InvalidArgument, _) if is_of_size() => Code::OutOfRange,
            (code, _) => code,
        };
        let node_ids = info.metadata.get(NODE_ID).cloned().unwrap_or_default();
        let message = format!("the storage server says: {}", status.message());
        Self { code, message, reason: info.reason, node_ids }
    }

    /// Whether the server gave this reason.
    pub(super) fn is_because(&self, reason: &str) -> bool {
        self.reason == reason
    }
}

/// A status without the server's details: of the way there, or of a program that does not know the call.
fn of_channel(status: &Status, uri: &str) -> Refusal {
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::Unknown => {
            let cause = std::error::Error::source(status)
                .map_or_else(|| status.message().to_owned(), api_channel::innermost_cause);
            Refusal::new(Code::Unavailable, format!("cannot reach the storage server at {uri}: {cause}"))
        }
        Code::Unimplemented => Refusal::precondition(format!(
            "the storage server at {uri} does not know this call: it is older than this plugin; update volserver"
        )),
        code => Refusal::new(code, format!("the storage server at {uri} says: {}", status.message())),
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.code, refusal.message)
    }
}

/// What a caller gave, in quotes and cut, for a message.
pub(super) fn shown(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN_CHARACTERS_MAX).collect();
    if cut.len() < text.len() { format!("{cut:?}…") } else { format!("{cut:?}") }
}

/// What has to be given.
///
/// # Errors
/// INVALID_ARGUMENT where it is empty.
pub(super) fn given<'a>(field: &str, text: &'a str) -> Result<&'a str, Refusal> {
    if text.is_empty() { Err(Refusal::invalid(format!("{field} is missing"))) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::{ErrorDetails, FieldViolation};

    use super::*;

    const URI: &str = "http://storage:10810";

    fn of(code: Code, reason: &str, field: Option<&str>) -> Refusal {
        let metadata = HashMap::from([(NODE_ID.to_owned(), "node-1".to_owned())]);
        let mut details = ErrorDetails::with_error_info(reason, reason::DOMAIN, metadata);
        if let Some(field) = field {
            details.set_bad_request(vec![FieldViolation::new(field, "is off")]);
        }
        Refusal::of_server(&Status::with_error_details(code, "no", details), URI)
    }

    #[test]
    fn the_servers_code_stays_but_where_csi_has_another() {
        for (code, reason, field, expected) in [
            (Code::NotFound, reason::VOLUME_NOT_FOUND, None, Code::NotFound),
            (Code::Unavailable, reason::FENCE_UNFINISHED, None, Code::Unavailable),
            (Code::ResourceExhausted, reason::NO_SPACE, None, Code::ResourceExhausted),
            (Code::PermissionDenied, reason::NOT_AUTHORIZED, None, Code::PermissionDenied),
            (Code::FailedPrecondition, reason::COPY_IN_PROGRESS, None, Code::Aborted),
            (Code::InvalidArgument, reason::INVALID_FIELD, Some("capacity_bytes"), Code::OutOfRange),
            (Code::InvalidArgument, reason::INVALID_FIELD, Some("limits"), Code::InvalidArgument),
        ] {
            let refusal = of(code, reason, field);
            assert_eq!((refusal.code, refusal.reason.as_str()), (expected, reason));
            assert_eq!(refusal.node_ids, "node-1");
        }
    }

    #[test]
    fn who_does_not_answer_is_unavailable_and_named() {
        for code in [Code::Unavailable, Code::Unknown, Code::Cancelled] {
            let refusal = Refusal::of_server(&Status::new(code, "connection refused"), URI);
            assert_eq!(refusal.code, Code::Unavailable);
            assert!(refusal.message.contains(URI) && refusal.message.contains("connection refused"));
        }
        let old = Refusal::of_server(&Status::unimplemented("no such call"), URI);
        assert!(old.code == Code::FailedPrecondition && old.message.contains("update volserver"));
        let late = Refusal::of_server(&Status::deadline_exceeded("late"), URI);
        assert_eq!(late.code, Code::DeadlineExceeded);
    }

    #[test]
    fn what_is_shown_is_short_and_on_one_line() {
        assert_eq!(shown("a\nb"), "\"a\\nb\"");
        assert!(shown(&"ä".repeat(10_000)).chars().count() < 200);
        assert!(given("volume_id", "").is_err_and(|refusal| refusal.message == "volume_id is missing"));
    }
}
