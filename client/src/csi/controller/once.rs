//! Something is made once, however often its call is repeated: by an id that is made of the call itself.
//!
//! Owns: the id, and what becomes of it when what it stands for is deleted. A name of CSI's is that of what is there: who has deleted a
//! volume may make another of the same name, also within the day that the server knows the id. So where what the server tells of is gone,
//! the next id is taken; each of them has its turn in the same order, and so a repetition comes to the same one. Never: makes anything itself.
//! Called by `volumes` and `snapshots`.

use std::collections::BTreeMap;
use std::future::Future;

use prost::Message as _;
use proto::v1;
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use super::api::{Call, Stub, by_uid};
use super::refusal::Refusal;

/// So often something of one name is made and deleted within a day; after that it is made without an id.
const IDS_MAX: u32 = 16;

/// A request that makes something.
pub(super) trait Makes: Clone {
    /// What the server answers with.
    type Answer;

    /// The same with an id.
    fn by_id(&self, request_id: String) -> Self;

    /// What the request is, in bytes that are the same for the same request.
    fn bytes(&self) -> Vec<u8>;

    /// What was made, or is being made, as the server told.
    fn made(answer: &Self::Answer) -> Vec<Made>;
}

/// Something that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Made {
    /// By its uid.
    Volume(String),
    /// By its uid.
    Snapshot(String),
}

/// Labels have no order of their own.
fn in_order(labels: &mut std::collections::HashMap<String, String>) -> Vec<u8> {
    let labels: BTreeMap<String, String> = std::mem::take(labels).into_iter().collect();
    format!("{labels:?}").into_bytes()
}

impl Makes for v1::CreateVolumeRequest {
    type Answer = v1::Volume;

    fn by_id(&self, request_id: String) -> Self {
        Self { request_id, ..self.clone() }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut rest = self.clone();
        [b"create volume ".to_vec(), in_order(&mut rest.labels), rest.encode_to_vec()].concat()
    }

    fn made(answer: &v1::Volume) -> Vec<Made> {
        vec![Made::Volume(answer.volume_uid.clone())]
    }
}

impl Makes for v1::CloneVolumeRequest {
    type Answer = v1::CloneVolumeResponse;

    fn by_id(&self, request_id: String) -> Self {
        Self { request_id, ..self.clone() }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut rest = self.clone();
        [b"clone volume ".to_vec(), in_order(&mut rest.labels), rest.encode_to_vec()].concat()
    }

    fn made(answer: &v1::CloneVolumeResponse) -> Vec<Made> {
        answer.volume.iter().map(|volume| Made::Volume(volume.volume_uid.clone())).collect()
    }
}

impl Makes for v1::CreateSnapshotRequest {
    type Answer = v1::CreateSnapshotResponse;

    fn by_id(&self, request_id: String) -> Self {
        Self { request_id, ..self.clone() }
    }

    fn bytes(&self) -> Vec<u8> {
        [b"create snapshot ".to_vec(), self.encode_to_vec()].concat()
    }

    fn made(answer: &v1::CreateSnapshotResponse) -> Vec<Made> {
        let uids = answer.snapshots.iter().map(|snapshot| snapshot.snapshot_uid.clone());
        uids.map(Made::Snapshot).collect()
    }
}

/// The id of a request, when so many before it have had their turn: of the request's own bytes (SHA-256), as a UUID of version 8.
fn request_id(bytes: &[u8], number: u32) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(b"volcsi ");
    context.update(&number.to_be_bytes());
    context.update(bytes);
    let mut id = [0; 16];
    id.copy_from_slice(&context.finish().as_ref()[..16]);
    uuid::Builder::from_custom_bytes(id).into_uuid().to_string()
}

/// Has the server make it, or tell what it has made.
///
/// # Errors
/// As of [`Call::ask`].
pub(super) async fn once<Q: Makes, F>(
    call: &Call,
    question: Q,
    method: impl Fn(Stub, Request<Q>) -> F,
) -> Result<Q::Answer, Refusal>
where
    F: Future<Output = Result<Response<Q::Answer>, Status>>,
{
    let bytes = question.bytes();
    for number in 0..IDS_MAX {
        match call.ask(question.by_id(request_id(&bytes, number)), &method).await {
            // It has begun under the id, and is gone; or its source is, which the next one says again.
            Err(refusal) if refusal.code == Code::NotFound => {}
            Ok(answer) if !are_there(call, Q::made(&answer)).await? => {}
            answer => return answer,
        }
    }
    call.ask(question, method).await
}

async fn are_there(call: &Call, made: Vec<Made>) -> Result<bool, Refusal> {
    let uid = |text: &str| {
        Uuid::try_parse(text)
            .map_err(|_| Refusal::new(Code::Internal, "the storage server told a uid that is none"))
    };
    for made in made {
        let found = match made {
            Made::Volume(text) => call.volume_named(by_uid(uid(&text)?)).await.map(drop),
            Made::Snapshot(text) => call.snapshot(uid(&text)?).await.map(drop),
        };
        match found {
            Err(refusal) if refusal.code == Code::NotFound => return Ok(false),
            found => found?,
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_request_has_the_same_id_and_no_other_has_it() {
        let request = |name: &str, labels: &[usize]| v1::CreateVolumeRequest {
            name: name.to_owned(),
            labels: labels.iter().map(|number| (format!("k{number}"), number.to_string())).collect(),
            ..Default::default()
        };
        let up: Vec<usize> = (0..64).collect();
        let down: Vec<usize> = (0..64).rev().collect();
        let id = request_id(&request("a", &up).bytes(), 0);
        assert_eq!(id, request_id(&request("a", &down).bytes(), 0));
        assert_eq!(Uuid::try_parse(&id).unwrap().get_version_num(), 8);
        let clone = v1::CloneVolumeRequest { name: "a".to_owned(), ..Default::default() };
        for other in [
            request_id(&request("b", &up).bytes(), 0),
            request_id(&request("a", &up[1..]).bytes(), 0),
            request_id(&request("a", &up).bytes(), 1),
            request_id(&clone.bytes(), 0),
        ] {
            assert_ne!(id, other);
        }
    }
}
