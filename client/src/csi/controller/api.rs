//! The storage server's management API, as one call of the plugin's uses it.
//!
//! Owns: the deadline. What the caller left of its time is handed on to the server with every question, less a little for the answer;
//! whoever sets no deadline has [`CALL_DEADLINE`]. Never: asks twice by itself; every call of CSI is repeated by its caller.
//! Called by everything in this folder that asks the server.

use std::time::{Duration, Instant};

use proto::v1;
use proto::v1::management_client::ManagementClient;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use super::refusal::Refusal;

/// Of a caller that sets no deadline: a fence waits there for the I/O of the connections that it closes.
const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// Nobody's call goes on for longer, whatever the caller says.
const CALL_DEADLINE_MAX: Duration = Duration::from_secs(600);
/// So much of the caller's time is kept for the answer, or a tenth of it, if that is less.
const ANSWER_TIME: Duration = Duration::from_millis(500);
/// Of HTTP/2, as gRPC has it: "10S" and the like.
const TIMEOUT_HEADER: &str = "grpc-timeout";
/// Digits of its number at most.
const TIMEOUT_DIGITS_MAX: usize = 8;

/// The generated client.
pub(super) type Stub = ManagementClient<Channel>;

/// One storage server.
#[derive(Debug, Clone)]
pub(super) struct Server {
    stub: Stub,
    uri: String,
}

impl Server {
    /// Over a channel to the server at this URI, which need not be there yet.
    pub(super) fn new(channel: Channel, uri: String) -> Self {
        Self { stub: Stub::new(channel), uri }
    }

    /// A call that begins now, with the time that its caller gives it.
    pub(super) fn begin<T>(&self, request: Request<T>) -> (Call, T) {
        let within = within(request.metadata());
        (Call { server: self.clone(), until: Instant::now() + within }, request.into_inner())
    }
}

/// One call of the plugin's, and how long it may take.
#[derive(Debug, Clone)]
pub(super) struct Call {
    server: Server,
    until: Instant,
}

impl Call {
    /// What is left of its time.
    pub(super) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Asks the server.
    ///
    /// # Errors
    /// What the server refuses; UNAVAILABLE: it cannot be reached; DEADLINE_EXCEEDED.
    pub(super) async fn ask<Q, A, F>(
        &self,
        question: Q,
        method: impl FnOnce(Stub, Request<Q>) -> F,
    ) -> Result<A, Refusal>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let left = self.left();
        let mut request = Request::new(question);
        // A little more: the channel tells nobody that it was the time that ran out.
        request.set_timeout(left + ANSWER_TIME);
        match tokio::time::timeout(left, method(self.server.stub.clone(), request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Refusal::of_server(&status, &self.server.uri)),
            Err(_) => Err(Refusal::new(
                Code::DeadlineExceeded,
                format!("the storage server at {} has not answered in the caller's time", self.server.uri),
            )),
        }
    }

    /// A volume.
    ///
    /// # Errors
    /// As of [`Call::ask`]; NOT_FOUND: there is none.
    pub(super) async fn volume(&self, volume_uid: Uuid) -> Result<v1::Volume, Refusal> {
        self.volume_named(by_uid(volume_uid)).await
    }

    /// The same, by its name on the server.
    ///
    /// # Errors
    /// The same.
    pub(super) async fn volume_named(&self, name: String) -> Result<v1::Volume, Refusal> {
        let question = v1::GetVolumeRequest { name, ..Default::default() };
        self.ask(question, |mut stub, request| async move { stub.get_volume(request).await }).await
    }

    /// A snapshot.
    ///
    /// # Errors
    /// The same.
    pub(super) async fn snapshot(&self, snapshot_uid: Uuid) -> Result<v1::Snapshot, Refusal> {
        let question =
            v1::GetSnapshotRequest { snapshot_uid: snapshot_uid.to_string(), ..Default::default() };
        self.ask(question, |mut stub, request| async move { stub.get_snapshot(request).await }).await
    }

    /// Identity, addresses and space of the server.
    ///
    /// # Errors
    /// As of [`Call::ask`].
    pub(super) async fn server_info(&self) -> Result<v1::GetServerInfoResponse, Refusal> {
        let question = v1::GetServerInfoRequest {};
        self.ask(question, |mut stub, request| async move { stub.get_server_info(request).await }).await
    }
}

/// How a volume that is there is called in the server's API by its uid.
pub(super) fn by_uid(volume_uid: Uuid) -> String {
    format!("uid:{volume_uid}")
}

/// How long a call may go on whose caller sent this.
fn within(metadata: &MetadataMap) -> Duration {
    let told = metadata.get(TIMEOUT_HEADER).and_then(|value| value.to_str().ok()).and_then(timeout);
    match told {
        None => CALL_DEADLINE,
        Some(told) => (told - ANSWER_TIME.min(told / 10)).min(CALL_DEADLINE_MAX),
    }
}

/// Reads gRPC's form of a duration.
fn timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = text.strip_suffix(unit)?;
    if digits.len() > TIMEOUT_DIGITS_MAX || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(number * 3600),
        'M' => Duration::from_secs(number * 60),
        'S' => Duration::from_secs(number),
        'm' => Duration::from_millis(number),
        'u' => Duration::from_micros(number),
        'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_of_grpc_are_read() {
        for (text, ms) in
            [("1H", 3_600_000), ("2M", 120_000), ("15S", 15_000), ("250m", 250), ("99999999u", 99_999)]
        {
            assert_eq!(timeout(text).unwrap().as_millis(), ms, "{text}");
        }
        for text in ["", "S", "123456789S", "-1S", "1.5S", "1", "1s", "1é"] {
            assert_eq!(timeout(text), None, "{text}");
        }
    }

    #[test]
    fn the_callers_time_is_kept_and_some_of_it_is_for_the_answer() {
        let of = |text: Option<&str>| {
            let mut metadata = MetadataMap::new();
            if let Some(text) = text {
                metadata.insert(TIMEOUT_HEADER, text.parse().unwrap());
            }
            within(&metadata)
        };
        assert_eq!(of(None), CALL_DEADLINE);
        assert_eq!(of(Some("nonsense")), CALL_DEADLINE);
        assert_eq!(of(Some("10S")), Duration::from_millis(9500));
        assert_eq!(of(Some("1S")), Duration::from_millis(900));
        assert_eq!(of(Some("99999999H")), CALL_DEADLINE_MAX);
    }
}
