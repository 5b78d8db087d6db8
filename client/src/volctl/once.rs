//! Calls that change something: each has an id, by which the server carries it out once, and is repeated by it where the connection was lost.
//!
//! Owns which failures a repetition is for, how many there are, and that people are told. Never: repeats what the server has refused; it
//! has waited as long as it does, and says what to do. An older server ignores the id: a repetition is then as safe as that of a person,
//! seconds later; so a restore, which would take away what was written since, is not made again by itself.

use std::future::Future;
use std::io::{self, Write as _};
use std::time::Duration;

use proto::error_reason as reason;
use proto::v1;
use proto::v1::management_client::ManagementClient;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::connect;
use crate::failure::{Failure, innermost_cause};

/// Before each repetition: longer each time, for a server that is started again.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1600),
];

/// A request that may have an id.
pub(crate) trait Identified: Clone {
    /// Its id; empty: none.
    fn request_id(&mut self) -> &mut String;
}

macro_rules! identified {
    ($($request:ident)*) => { $(
        impl Identified for v1::$request {
            fn request_id(&mut self) -> &mut String {
                &mut self.request_id
            }
        }
    )* };
}

identified! {
    CreateVolumeRequest UpdateVolumeRequest CloneVolumeRequest RenameVolumeRequest SetVolumeLimitsRequest ResizeVolumeRequest
    DeleteVolumeRequest CreateGrantRequest DeleteGrantRequest DeleteNodeRequest CreateSnapshotRequest DeleteSnapshotRequest
    RestoreVolumeRequest
}

/// The request with an id, unless it has one.
pub(crate) fn identified<Q: Identified>(mut request: Q) -> Q {
    if request.request_id().is_empty() {
        *request.request_id() = Uuid::new_v4().to_string();
    }
    request
}

/// Makes a call that is carried out once, and repeats it where its answer was lost.
///
/// # Errors
/// As of [`connect::call`]; a connection that was lost each time says how often that was.
pub(crate) async fn once<Q: Identified, A, F>(
    client: &ManagementClient<Channel>,
    request: Q,
    method: impl Fn(ManagementClient<Channel>, Q) -> F,
) -> Result<A, Failure>
where
    F: Future<Output = Result<Response<A>, Status>>,
{
    let mut request = identified(request);
    let request_id = request.request_id().clone();
    for (index, pause) in PAUSES.iter().enumerate() {
        let status = match connect::in_time(method(client.clone(), request.clone())).await? {
            Err(status) if is_lost(&status) => status,
            answer => return Ok(answer?.into_inner()),
        };
        let (failure, number, count) = (Failure::from(status), index + 1, PAUSES.len());
        let told = format!(
            "volctl: {}; repeating the call by the same request id, {number} of {count}\n",
            failure.what
        );
        // Whoever closed stderr does not want to know.
        io::stderr().write_all(told.as_bytes()).ok();
        tokio::time::sleep(*pause).await;
    }
    let answer = connect::in_time(method(client.clone(), request)).await?;
    answer.map(Response::into_inner).map_err(|status| {
        let is_lost = is_lost(&status);
        let failure = Failure::from(status);
        let times = PAUSES.len() + 1;
        let what =
            format!("{}; the call was made {times} times by the request id {request_id}", failure.what);
        if is_lost { Failure { what, ..failure } } else { failure }
    })
}

/// Whether nobody knows what has become of the call, or the server does not begin it because it stops.
fn is_lost(status: &Status) -> bool {
    if let Some(info) = status.get_details_error_info() {
        return info.reason == reason::SERVER_STOPPING;
    }
    // A certificate that is refused is refused again. HTTP/2 keeps nothing of an error but its words.
    let is_of_certificates = innermost_cause(status).is_some_and(|cause| cause.contains("certificate"));
    matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown) && !is_of_certificates
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn what_the_server_has_said_is_its_answer_unless_it_stops() {
        let said = |reason: &str| {
            let mut details = ErrorDetails::new();
            details.set_error_info(reason, "volnode", [("next".to_owned(), "wait".to_owned())]);
            Status::with_error_details(Code::Unavailable, "no", details)
        };
        assert!(is_lost(&said(reason::SERVER_STOPPING)));
        for reason in [reason::COPY_BUSY, reason::FENCE_UNFINISHED, reason::VOLUME_RENAMED] {
            assert!(!is_lost(&said(reason)), "{reason}");
        }
        assert!(is_lost(&Status::unavailable("broken pipe")) && is_lost(&Status::unknown("h2")));
        assert!(!is_lost(&Status::deadline_exceeded("")) && !is_lost(&Status::not_found("")));
    }

    #[test]
    fn an_id_that_is_there_stays() {
        let request = identified(v1::DeleteVolumeRequest::default());
        assert!(request.request_id.parse::<Uuid>().is_ok());
        assert_eq!(identified(request.clone()), request);
        assert_ne!(identified(v1::DeleteVolumeRequest::default()), request);
    }
}
