//! The calls about snapshots, clones, restores and operations.
//!
//! Owns what they have in common: the names that are locked, how long a call waits for its turn, and how long for the end of what
//! it has begun. Never: decides anything about a copy; the lifecycle does. Called by the service, which has looked at the caller's
//! rights.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;
use tonic::Status;
use uuid::Uuid;

use super::authorization::require_inside;
use super::fields::Fields;
use super::named::{Named, UID_PREFIX, snapshot_within};
use super::page_token::{PageToken, page_limit};
use super::snapshot_fields::{self as fields, OF_RESTORE, OF_SNAPSHOT};
use super::{ManagementService, messages};
use crate::catalog::SnapshotKey;
use crate::lifecycle::{
    CloneOf, CloneWanted, DataSide, Lifecycle, LifecycleError, NameLock, Operation, SnapshotError,
    SnapshotNamed, Started, snapshot_lock_name,
};
use crate::scope::Scope;
use crate::status;
use crate::volume::copying::{CopyError, CopyTarget};

/// So long a call waits for the end of what it has begun, before it is answered with the operation.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// So long a call waits for its turn where many copies go on: shorter than clients wait for an answer.
pub(super) const TURN_WAIT_MAX: Duration = Duration::from_secs(30);
/// The same where file systems are frozen meanwhile: less than a freeze lasts.
const FROZEN_TURN_WAIT_MAX: Duration = Duration::from_secs(3);
const TURN_PAUSE: Duration = Duration::from_millis(200);

impl<D: DataSide> ManagementService<D> {
    /// Locks all of the names; in one order, so that no two calls wait for each other.
    pub(super) async fn lock_all(&self, names: &[String]) -> Vec<NameLock> {
        let mut names: Vec<&String> = names.iter().collect();
        names.sort();
        names.dedup();
        let mut locks = Vec::with_capacity(names.len());
        for name in names {
            locks.push(self.locks.lock(name).await);
        }
        locks
    }

    /// Begins something with the names locked, and waits a moment for its end, unless file systems are frozen meanwhile. Where too many copies go on, that is waited for.
    pub(super) async fn start<T: Send + 'static>(
        &self,
        lock_names: Vec<String>,
        is_frozen: bool,
        begin: impl Fn(&Lifecycle<D>, &[NameLock]) -> Result<Started<T>, LifecycleError> + Clone + Send + 'static,
    ) -> Result<Started<T>, Status> {
        let (turn_wait, answer_limit) = match is_frozen {
            true => (FROZEN_TURN_WAIT_MAX, Duration::ZERO),
            false => (TURN_WAIT_MAX, ANSWER_LIMIT),
        };
        let started = self.begin_in_turn(&lock_names, turn_wait, begin).await?;
        if let Some(operation) = &started.operation {
            operation.wait(answer_limit).await;
            if let Some(Err(error)) = operation.end() {
                return Err(status::from_lifecycle(&error));
            }
        }
        Ok(started)
    }

    /// The same without a wait for its end.
    pub(super) async fn begin_in_turn<T: Send + 'static>(
        &self,
        lock_names: &[String],
        turn_wait: Duration,
        begin: impl Fn(&Lifecycle<D>, &[NameLock]) -> Result<Started<T>, LifecycleError> + Clone + Send + 'static,
    ) -> Result<Started<T>, Status> {
        let give_up = Instant::now() + turn_wait;
        loop {
            let (begin, locks) = (begin.clone(), self.lock_all(lock_names).await);
            let outcome =
                self.outcome(&self.calls.permits, move |lifecycle| begin(lifecycle, &locks)).await?;
            match outcome {
                // Not with the names locked: others may use the volumes meanwhile.
                Err(LifecycleError::Snapshot(
                    SnapshotError::Busy { .. } | SnapshotError::Copy(CopyError::Busy(_)),
                )) if Instant::now() < give_up => tokio::time::sleep(TURN_PAUSE).await,
                outcome => return outcome.map_err(|error| status::from_lifecycle(&error)),
            }
        }
    }

    pub(super) async fn begin_snapshots(
        &self,
        scope: Scope,
        request: v1::CreateSnapshotRequest,
    ) -> Result<v1::CreateSnapshotResponse, Status> {
        let (asked, name, freeze_id) = fields::snapshots_wanted(request)?;
        let (volumes, volume_names) = self.found_volumes(&scope, asked).await?;
        let begin = {
            let volume_names = volume_names.clone();
            move |lifecycle: &Lifecycle<D>, locks: &[NameLock]| {
                volumes.iter().try_for_each(|volume| volume.check(lifecycle))?;
                lifecycle.create_snapshots(locks, &volume_names, &name, freeze_id)
            }
        };
        let Started { made, operation } = self.start(volume_names, freeze_id.is_some(), begin).await?;
        self.snapshots_made(scope, made, operation).await
    }

    /// The volumes that are asked for, each once, and their names.
    pub(super) async fn found_volumes(
        &self,
        scope: &Scope,
        asked: Vec<String>,
    ) -> Result<(Vec<Named>, Vec<String>), Status> {
        let mut volumes = Vec::with_capacity(asked.len());
        for asked in asked {
            volumes.push(self.found_volume(scope, asked).await?);
        }
        let volume_names: Vec<String> = volumes.iter().map(|volume| volume.name.clone()).collect();
        fields::each_once(&volume_names)?;
        Ok((volumes, volume_names))
    }

    /// The answer of a call that has taken them.
    pub(super) async fn snapshots_made(
        &self,
        scope: Scope,
        made: Vec<Uuid>,
        operation: Option<Arc<Operation>>,
    ) -> Result<v1::CreateSnapshotResponse, Status> {
        let answer = self.looking(move |lifecycle| {
            let message =
                |uid: &Uuid| messages::snapshot(lifecycle, &lifecycle.snapshot(&SnapshotNamed::Uid(*uid))?);
            Ok(v1::CreateSnapshotResponse {
                snapshots: made.iter().map(message).collect::<Result<_, _>>()?,
                operation: messages::running(&scope, operation.as_deref()),
            })
        });
        Ok(answer.await?.into_inner())
    }

    pub(super) async fn mark_frozen(
        &self,
        scope: Scope,
        request: v1::MarkSnapshotsFrozenRequest,
    ) -> Result<v1::MarkSnapshotsFrozenResponse, Status> {
        let mut fields = Fields::default();
        let freeze_id = fields.uuid("freeze_id", &request.freeze_id);
        fields.finish()?;
        let answer = self.blocking(move |lifecycle| {
            let marked = lifecycle.mark_frozen(&scope, freeze_id)?;
            let message =
                |uid: &Uuid| messages::snapshot(lifecycle, &lifecycle.snapshot(&SnapshotNamed::Uid(*uid))?);
            let snapshots = marked.iter().map(message).collect::<Result<_, _>>()?;
            Ok(v1::MarkSnapshotsFrozenResponse { snapshots })
        });
        Ok(answer.await?.into_inner())
    }

    pub(super) async fn find_snapshot(
        &self,
        scope: Scope,
        request: v1::GetSnapshotRequest,
    ) -> Result<v1::Snapshot, Status> {
        let named =
            fields::snapshot_named(OF_SNAPSHOT, request.volume_name, request.name, &request.snapshot_uid)?;
        if request.with_exclusive_bytes {
            // Which may have to be waited for.
            let answer = self.walking(move |lifecycle| {
                let found = snapshot_within(lifecycle, &scope, &named)?;
                let (snapshot, backend) = (CopyTarget::Snapshot(found.0.snapshot_uid), found.0.backend);
                let exclusive_bytes = lifecycle.data_side().exclusive_bytes(snapshot, backend);
                Ok(v1::Snapshot { exclusive_bytes, ..messages::snapshot(lifecycle, &found)? })
            });
            return Ok(answer.await?.into_inner());
        }
        let answer = self.looking(move |lifecycle| {
            messages::snapshot(lifecycle, &snapshot_within(lifecycle, &scope, &named)?)
        });
        Ok(answer.await?.into_inner())
    }

    pub(super) async fn page_of_snapshots(
        &self,
        scope: Scope,
        request: v1::ListSnapshotsRequest,
    ) -> Result<v1::ListSnapshotsResponse, Status> {
        let mut fields = Fields::default();
        let filter =
            fields.snapshot_filter(request.volume_name, &request.group_uid, request.name).within(&scope);
        let token = PageToken::new("snapshots", self.lifecycle.catalog().server_id());
        let after = fields.snapshot_page_token("page_token", &token, &request.page_token);
        fields.finish()?;
        let limit = page_limit(request.page_size);
        let answer = self.looking(move |lifecycle| {
            let mut found = lifecycle.catalog().list_snapshots(&filter, &after, limit + 1)?;
            let next_page_token =
                token.next_pair(&mut found, limit, |(snapshot, _)| key_text(&snapshot.key()));
            let message = |found: &(_, _)| messages::snapshot(lifecycle, found);
            let snapshots = found.iter().map(message).collect::<Result<_, _>>()?;
            Ok(v1::ListSnapshotsResponse { snapshots, next_page_token })
        });
        Ok(answer.await?.into_inner())
    }

    pub(super) async fn remove_snapshot(
        &self,
        scope: Scope,
        request: v1::DeleteSnapshotRequest,
    ) -> Result<v1::DeleteSnapshotResponse, Status> {
        let named =
            fields::snapshot_named(OF_SNAPSHOT, request.volume_name, request.name, &request.snapshot_uid)?;
        let snapshot_uid = match self.snapshot_uid(&scope, named).await {
            Err(LifecycleError::Snapshot(SnapshotError::NotFound(_))) => {
                return Ok(v1::DeleteSnapshotResponse { existed: false });
            }
            found => found.map_err(|error| status::from_lifecycle(&error))?,
        };
        let lock = self.locks.lock(&snapshot_lock_name(snapshot_uid)).await;
        let existed = self.blocking(move |lifecycle| {
            lifecycle.refuse_to_cancel(&scope, snapshot_uid)?;
            lifecycle.delete_snapshot(&lock, snapshot_uid)
        });
        let existed = existed.await?;
        Ok(v1::DeleteSnapshotResponse { existed: existed.into_inner() })
    }

    pub(super) async fn begin_restore(
        &self,
        scope: Scope,
        request: v1::RestoreVolumeRequest,
    ) -> Result<v1::RestoreVolumeResponse, Status> {
        let asked = request.volume_name.clone();
        let named = fields::snapshot_named(OF_RESTORE, request.volume_name, request.snapshot_name, "")?;
        let volume = self.found_volume(&scope, asked).await?;
        let name = volume.name.clone();
        let snapshot_uid = self.found_snapshot(&scope, named).await?;
        let lock_names = vec![name.clone(), snapshot_lock_name(snapshot_uid)];
        let begin = move |lifecycle: &Lifecycle<D>, locks: &[NameLock]| {
            volume.check(lifecycle)?;
            lifecycle.restore_volume(locks, &name, snapshot_uid)
        };
        let Started { made, operation } = self.start(lock_names, false, begin).await?;
        let answer = self.looking(move |lifecycle| {
            let volume =
                Some(messages::volume(lifecycle, &lifecycle.volume(&format!("{UID_PREFIX}{made}"))?)?);
            Ok(v1::RestoreVolumeResponse {
                volume,
                operation: messages::running(&scope, operation.as_deref()),
            })
        });
        Ok(answer.await?.into_inner())
    }

    pub(super) async fn begin_clone(
        &self,
        scope: Scope,
        request: v1::CloneVolumeRequest,
    ) -> Result<v1::CloneVolumeResponse, Status> {
        let (wanted, named) = fields::clone_wanted(request)?;
        require_inside(&scope, &wanted.name)?;
        let (source, volume) = self.found_source(&scope, named).await?;
        let wanted = CloneWanted { source, ..wanted };
        let lock_names = vec![wanted.name.clone(), wanted.source.lock_name()];
        let begin = move |lifecycle: &Lifecycle<D>, locks: &[NameLock]| {
            volume.iter().try_for_each(|volume| volume.check(lifecycle))?;
            lifecycle.clone_volume(locks, &wanted)
        };
        let Started { made, operation } = self.start(lock_names, false, begin).await?;
        let answer = self.looking(move |lifecycle| {
            let operation = messages::running(&scope, operation.as_deref());
            let volume = match operation {
                Some(_) => None,
                None => {
                    Some(messages::volume(lifecycle, &lifecycle.volume(&format!("{UID_PREFIX}{made}"))?)?)
                }
            };
            Ok(v1::CloneVolumeResponse { volume, operation })
        });
        Ok(answer.await?.into_inner())
    }

    /// Of the snapshot that is meant; the answer is the lifecycle's own, or why it could not be asked.
    pub(super) async fn snapshot_uid(
        &self,
        scope: &Scope,
        named: SnapshotNamed,
    ) -> Result<Uuid, LifecycleError> {
        let scope = scope.clone();
        let found = self.look(move |lifecycle| snapshot_within(lifecycle, &scope, &named)).await;
        found.map(|(snapshot, _)| snapshot.snapshot_uid)
    }

    /// What is copied or compared; of a volume, also as it was asked for.
    pub(super) async fn found_source(
        &self,
        scope: &Scope,
        named: fields::SourceNamed,
    ) -> Result<(CloneOf, Option<Named>), Status> {
        match named {
            fields::SourceNamed::Volume(asked) => {
                let volume = self.found_volume(scope, asked).await?;
                Ok((CloneOf::Volume(volume.name.clone()), Some(volume)))
            }
            fields::SourceNamed::Snapshot(named) => {
                Ok((CloneOf::Snapshot(self.found_snapshot(scope, named).await?), None))
            }
        }
    }

    async fn found_volume(&self, scope: &Scope, asked: String) -> Result<Named, Status> {
        self.named(scope, asked).await.map_err(|error| status::from_lifecycle(&error))
    }

    /// The same, as the call is answered.
    pub(super) async fn found_snapshot(&self, scope: &Scope, named: SnapshotNamed) -> Result<Uuid, Status> {
        self.snapshot_uid(scope, named).await.map_err(|error| status::from_lifecycle(&error))
    }

    pub(super) fn find_operation(&self, scope: &Scope, text: &str) -> Result<v1::Operation, Status> {
        Ok(messages::operation(scope, &*self.operation(scope, text)?))
    }

    pub(super) fn list_all_operations(&self, scope: &Scope) -> v1::ListOperationsResponse {
        let mut all = self.lifecycle.operations().list();
        all.retain(|operation| operation.is_seen_in(scope));
        v1::ListOperationsResponse {
            operations: all.iter().map(|operation| messages::operation(scope, operation)).collect(),
        }
    }

    pub(super) fn cancel(&self, scope: &Scope, text: &str) -> Result<v1::Operation, Status> {
        let operation = self.operation(scope, text)?;
        require_whole(scope, &operation)?;
        operation.cancel();
        Ok(messages::operation(scope, &operation))
    }

    fn operation(&self, scope: &Scope, text: &str) -> Result<Arc<Operation>, Status> {
        let mut fields = Fields::default();
        let id = fields.uuid("operation_id", text);
        fields.finish()?;
        let found = self.lifecycle.operations().get(id).filter(|operation| operation.is_seen_in(scope));
        found.ok_or_else(|| {
            let error = SnapshotError::OperationNotFound(text.to_owned());
            status::from_lifecycle(&error.into())
        })
    }
}

/// Whether all that an operation makes is the caller's to manage.
fn require_whole(scope: &Scope, operation: &Operation) -> Result<(), Status> {
    if operation.is_within(scope) {
        Ok(())
    } else {
        Err(status::forbidden("cancel an operation that also makes what is outside of its name space"))
    }
}

/// Where a snapshot stands in lists, as a page token has it: no name has a '/'.
fn key_text(key: &SnapshotKey) -> String {
    format!("{}/{}/{}", key.volume_name, key.name, key.snapshot_uid)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn a_group_s_operation_tells_a_tenant_its_own_names_and_is_cancelled_by_who_has_all_of_it() {
        let of = |tenants: &[&str]| {
            Scope::Tenants(Arc::new(tenants.iter().map(|&tenant| tenant.to_owned()).collect()))
        };
        let group = Operation::of_snapshots(&["acme+db@s", "b+db@s", "lonely@s"]);
        for (scope, told, may_cancel) in [
            (of(&["acme"]), &["acme+db@s"] as &[&str], false),
            (of(&["acme", "b"]), &["acme+db@s", "b+db@s"], false),
            (Scope::All, &["acme+db@s", "b+db@s", "lonely@s"], true),
        ] {
            assert_eq!(messages::operation(&scope, &group).targets, told);
            assert_eq!(messages::running(&scope, Some(&group)).unwrap().targets, told);
            let refused = require_whole(&scope, &group).err().map(|status| status.code());
            assert_eq!(refused, (!may_cancel).then_some(Code::PermissionDenied));
        }
        group.end_cancelled();
        let message = |scope: &Scope| messages::operation(scope, &group).error_message;
        assert_ne!(message(&of(&["acme"])), message(&Scope::All), "whose names might be in it");
        assert!(!message(&of(&["acme"])).is_empty());
    }
}
