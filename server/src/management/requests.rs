//! Calls that their callers gave an id (AIP-155): each is carried out once, however often it comes.
//!
//! Owns how a call is known again, that two of one id are never at work at once, and what a repetition is answered with. That a call was
//! carried out is written down with its change (`catalog/requests.rs`). Never: knows what a call does. Called by the service, which has
//! looked at the caller's rights: a repetition needs them, too. An id is known of the scope that it came from alone: what a call is
//! answered with was made in the scope of who asks again, and whose other id it is nobody can find out.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use prost::Message;
use proto::v1;
use serde_json::json;
use tonic::{Response, Status};
use uuid::Uuid;

use super::fields::Fields;
use super::named::UID_PREFIX;
use super::{ManagementService, messages};
use crate::catalog::{Carried, RequestKey};
use crate::lifecycle::{
    DataSide, GrantsError, Lifecycle, LifecycleError, NameLock, SnapshotError, SnapshotNamed,
};
use crate::scope::Scope;
use crate::status;

/// A request that may have an id.
pub(super) trait Identified: Send + 'static {
    /// Its id; empty: none.
    fn request_id(&self) -> &str;
    /// The same for the same call with the same fields, whatever its id.
    fn fingerprint(&self) -> String;
}

/// An answer that a repetition may be given.
pub(super) trait Answer: Message + Default + 'static {
    /// The volume's name is locked while it is made anew.
    const LOCKS_VOLUME: bool = false;

    /// Whether it is the last word; otherwise something goes on.
    fn is_final(&self) -> bool {
        true
    }

    /// What it is made of anew, as the catalog writes it down with a change. Of an answer that is always short enough to be kept: nothing.
    fn subject(&self) -> String {
        String::new()
    }

    /// Of a call that was carried out, and whose answer is not kept: as things are now. Finishes what the call has left undone.
    fn again<D: DataSide>(
        lifecycle: &Lifecycle<D>,
        lock: Option<&NameLock>,
        subject: &str,
    ) -> Result<Self, LifecycleError>;
}

/// Each row: a request, and its fields that are maps, which have no order of their own.
macro_rules! identified {
    ($($request:ident: $($map:ident)?;)*) => { $(
        impl Identified for v1::$request {
            fn request_id(&self) -> &str {
                &self.request_id
            }

            fn fingerprint(&self) -> String {
                let mut rest = self.clone();
                rest.request_id.clear();
                #[allow(unused_mut)] // Of a request without a map.
                let mut in_order: BTreeMap<String, String> = BTreeMap::new();
                $(in_order.extend(std::mem::take(&mut rest.$map));)?
                let call = json!([stringify!($request), in_order]).to_string();
                digest(&[call.as_bytes(), &rest.encode_to_vec()])
            }
        }
    )* };
}

identified! {
    CreateVolumeRequest: labels;
    UpdateVolumeRequest: labels;
    CloneVolumeRequest: labels;
    RenameVolumeRequest: ;
    SetVolumeLimitsRequest: ;
    ResizeVolumeRequest: ;
    DeleteVolumeRequest: ;
    CreateGrantRequest: ;
    DeleteGrantRequest: ;
    DeleteNodeRequest: ;
    CreateSnapshotRequest: ;
    DeleteSnapshotRequest: ;
    RestoreVolumeRequest: ;
}

/// SHA-256 of the parts, each with its length before it, in hexadecimal.
fn digest(parts: &[&[u8]]) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn uid(text: &str) -> Result<Uuid, LifecycleError> {
    text.parse().map_err(|_| LifecycleError::VolumeNotFound(text.to_owned()))
}

fn volume_now<D: DataSide>(lifecycle: &Lifecycle<D>, uid: &str) -> Result<v1::Volume, LifecycleError> {
    messages::volume(lifecycle, &lifecycle.volume(&format!("{UID_PREFIX}{uid}"))?)
}

fn uid_of(volume: Option<&v1::Volume>) -> String {
    volume.map(|volume| volume.volume_uid.clone()).unwrap_or_default()
}

impl Answer for v1::Volume {
    fn subject(&self) -> String {
        self.volume_uid.clone()
    }

    fn again<D: DataSide>(
        lifecycle: &Lifecycle<D>,
        _: Option<&NameLock>,
        subject: &str,
    ) -> Result<Self, LifecycleError> {
        volume_now(lifecycle, subject)
    }
}

impl Answer for v1::CloneVolumeResponse {
    fn subject(&self) -> String {
        uid_of(self.volume.as_ref())
    }

    fn is_final(&self) -> bool {
        self.operation.is_none()
    }

    fn again<D: DataSide>(
        lifecycle: &Lifecycle<D>,
        _: Option<&NameLock>,
        subject: &str,
    ) -> Result<Self, LifecycleError> {
        Ok(Self { volume: Some(volume_now(lifecycle, subject)?), operation: None })
    }
}

impl Answer for v1::RestoreVolumeResponse {
    fn subject(&self) -> String {
        uid_of(self.volume.as_ref())
    }

    fn is_final(&self) -> bool {
        self.operation.is_none()
    }

    fn again<D: DataSide>(
        lifecycle: &Lifecycle<D>,
        _: Option<&NameLock>,
        subject: &str,
    ) -> Result<Self, LifecycleError> {
        Ok(Self { volume: Some(volume_now(lifecycle, subject)?), operation: None })
    }
}

impl Answer for v1::CreateSnapshotResponse {
    fn subject(&self) -> String {
        let uids = self.snapshots.iter().map(|snapshot| snapshot.snapshot_uid.as_str());
        uids.collect::<Vec<_>>().join(" ")
    }

    fn is_final(&self) -> bool {
        let is_ready = |snapshot: &v1::Snapshot| snapshot.state() == v1::SnapshotState::Ready;
        self.operation.is_none() && self.snapshots.iter().all(is_ready)
    }

    fn again<D: DataSide>(
        lifecycle: &Lifecycle<D>,
        _: Option<&NameLock>,
        subject: &str,
    ) -> Result<Self, LifecycleError> {
        let snapshot = |text: &str| {
            let not_found = |_| SnapshotError::NotFound(format!("@{text}"));
            let uid = text.parse().map_err(not_found)?;
            messages::snapshot(lifecycle, &lifecycle.snapshot(&SnapshotNamed::Uid(uid))?)
        };
        let snapshots = subject.split(' ').map(snapshot).collect::<Result<_, LifecycleError>>()?;
        Ok(Self { snapshots, operation: None })
    }
}

impl Answer for v1::DeleteVolumeResponse {
    fn again<D: DataSide>(
        lifecycle: &Lifecycle<D>,
        _: Option<&NameLock>,
        subject: &str,
    ) -> Result<Self, LifecycleError> {
        lifecycle.finish_deleting(uid(subject)?)?;
        Ok(Self { existed: true })
    }
}

impl Answer for v1::DeleteSnapshotResponse {
    fn again<D: DataSide>(
        lifecycle: &Lifecycle<D>,
        _: Option<&NameLock>,
        subject: &str,
    ) -> Result<Self, LifecycleError> {
        lifecycle.finish_deleting_snapshot(uid(subject)?)?;
        Ok(Self { existed: true })
    }
}

impl Answer for v1::DeleteNodeResponse {
    fn again<D: DataSide>(_: &Lifecycle<D>, _: Option<&NameLock>, _: &str) -> Result<Self, LifecycleError> {
        Ok(Self { existed: true })
    }
}

impl Answer for v1::Grant {
    fn again<D: DataSide>(
        lifecycle: &Lifecycle<D>,
        _: Option<&NameLock>,
        subject: &str,
    ) -> Result<Self, LifecycleError> {
        let (uid, node_id) = subject.split_once(' ').unwrap_or_default();
        let volume = lifecycle.volume(&format!("{UID_PREFIX}{uid}"))?;
        let granted = lifecycle.catalog().grants_of_volume(volume.volume_uid)?;
        match granted.iter().find(|grant| grant.node_id == node_id) {
            Some(grant) => Ok(messages::grant(&volume.name, grant)),
            None => Err(GrantsError::NotGranted { name: volume.name, node_id: node_id.to_owned() }.into()),
        }
    }
}

impl Answer for v1::DeleteGrantResponse {
    /// As of every call that ends attachments.
    const LOCKS_VOLUME: bool = true;

    fn again<D: DataSide>(
        lifecycle: &Lifecycle<D>,
        lock: Option<&NameLock>,
        subject: &str,
    ) -> Result<Self, LifecycleError> {
        if let Some(lock) = lock {
            lifecycle.finish_withdrawal(lock)?;
        }
        let is = |position| subject.split(' ').nth(position) == Some("true");
        Ok(Self { existed: is(1), was_attached: is(2) })
    }
}

/// Keeps an answer. A call that found nothing to change fails where that is not written down: a repetition might find something, and the
/// first one has done no harm.
fn keep<D: DataSide>(lifecycle: &Lifecycle<D>, subject: &str, answer: &[u8]) -> Result<(), LifecycleError> {
    let catalog = lifecycle.catalog();
    let Err(error) = catalog.keep_answer(subject, answer) else { return Ok(()) };
    match catalog.carried() {
        Ok(Carried::Out { .. }) => {
            tracing::warn!(%error, "cannot keep the answer of a call; a repetition gets one made anew");
            Ok(())
        }
        _ => Err(error.into()),
    }
}

impl<D: DataSide> ManagementService<D> {
    /// Carries a call out, or answers as it was answered when it was.
    pub(super) async fn once<Q: Identified, A: Answer, F>(
        &self,
        scope: Scope,
        request: Q,
        run: impl FnOnce(Self, Scope, Q) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<A, Status>> + Send,
    {
        if request.request_id().is_empty() {
            return run(self.clone(), scope, request).await.map(Response::new);
        }
        let mut fields = Fields::default();
        let request_id = fields.uuid("request_id", request.request_id());
        fields.require(!request_id.is_nil(), "request_id", || "must be a UUID of the caller's".to_owned());
        fields.finish()?;
        let key = RequestKey {
            request_id,
            scope: scope.for_query().unwrap_or_default(),
            fingerprint: request.fingerprint(),
        };
        // No name has a '/'. One scope's calls wait for no other's.
        let lock = Arc::new(self.locks.lock(&format!("request/{request_id}/{}", key.scope)).await);
        let service = self.under(key, lock);
        match service.looking(|lifecycle| Ok(lifecycle.catalog().carried()?)).await?.into_inner() {
            Carried::NotYet => {}
            Carried::Another => return Err(status::request_id_reused()),
            Carried::Out { answer: Some(answer), .. } => {
                let decoded = A::decode(answer.as_slice());
                return decoded.map(Response::new).map_err(|error| status::failed(&error.to_string()));
            }
            Carried::Out { subject, answer: None } => return service.answer_again(&scope, subject).await,
        }
        let answer = run(service.clone(), scope, request).await?;
        if answer.is_final() {
            let (subject, bytes) = (answer.subject(), answer.encode_to_vec());
            service.blocking(move |lifecycle| keep(lifecycle, &subject, &bytes)).await?;
        }
        Ok(Response::new(answer))
    }

    async fn answer_again<A: Answer>(&self, scope: &Scope, subject: String) -> Result<Response<A>, Status> {
        let lock = if A::LOCKS_VOLUME {
            let uid = subject.split(' ').next().unwrap_or_default();
            match self.lock_volume(scope, format!("{UID_PREFIX}{uid}")).await {
                Err(LifecycleError::VolumeNotFound(_)) => None,
                lock => Some(lock.map_err(|error| status::from_lifecycle(&error))?),
            }
        } else {
            None
        };
        self.blocking(move |lifecycle| A::again(lifecycle, lock.as_ref(), &subject)).await
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn a_request_is_the_same_whatever_its_id_and_the_order_of_its_labels() {
        let request = |labels: &[(&str, &str)], request_id: &str, name: &str| v1::CreateVolumeRequest {
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            request_id: request_id.to_owned(),
            name: name.to_owned(),
            ..Default::default()
        };
        let many: Vec<(String, String)> = (0..64).map(|n| (n.to_string(), n.to_string())).collect();
        let of = |reversed: bool| {
            let mut labels: HashMap<String, String> = HashMap::new();
            let in_order: Vec<_> = if reversed { many.iter().rev().collect() } else { many.iter().collect() };
            labels.extend(in_order.into_iter().cloned());
            v1::CreateVolumeRequest { labels, ..Default::default() }.fingerprint()
        };
        assert_eq!(of(false), of(true));
        let first = request(&[("a", "b")], "1", "v").fingerprint();
        assert_eq!(first, request(&[("a", "b")], "2", "v").fingerprint());
        for other in
            [request(&[("a", "c")], "1", "v"), request(&[], "1", "v"), request(&[("a", "b")], "1", "w")]
        {
            assert_ne!(first, other.fingerprint(), "{other:?}");
        }
        let delete = v1::DeleteVolumeRequest { name: "v".to_owned(), ..Default::default() };
        let rename = v1::RenameVolumeRequest { name: "v".to_owned(), ..Default::default() };
        assert_ne!(delete.fingerprint(), rename.fingerprint(), "the same fields of another call");
    }
}
