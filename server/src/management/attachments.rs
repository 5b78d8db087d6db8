//! The calls about attachments, of volumes and of snapshots.
//!
//! Owns: what is locked for them, and how long an attach waits for a holder that may come back. Never: decides who gets what; the
//! lifecycle does. Called by the service.

use std::time::{Duration, Instant};

use proto::v1;
use proto::volume_name::tenant_of;
use tonic::Status;
use uuid::Uuid;

use super::authorization::{Call, Caller};
use super::fields::{self, Attachable, Fields};
use super::page_token::{PageToken, page_limit};
use super::{ManagementService, messages};
use crate::catalog::ListedAttachment;
use crate::lifecycle::{
    AttachWanted, AttachedTo, DataSide, HOLDER_TIMEOUT, LifecycleError, SnapshotError, SnapshotNamed,
    snapshot_lock_name,
};
use crate::scope::Scope;
use crate::status;

/// So long an attach waits for a holder that may come back: longer than that has to, and shorter than clients wait for an answer.
const ATTACH_WAIT_MAX: Duration = Duration::from_secs(40);
const ATTACH_PAUSE: Duration = Duration::from_secs(1);
const _: () = assert!(ATTACH_WAIT_MAX.as_secs() > HOLDER_TIMEOUT.as_secs());

impl<D: DataSide> ManagementService<D> {
    pub(super) async fn give(
        &self,
        caller: &Caller,
        data_addresses: Vec<String>,
        request: v1::AttachVolumeRequest,
    ) -> Result<v1::AttachVolumeResponse, Status> {
        let mut fields = Fields::default();
        let attachable = fields.attachable("volume_name", request.volume_name);
        let node_id = fields.node_id("node_id", request.node_id);
        let mode = fields.access_mode("access_mode", request.access_mode);
        let boot_id = fields.boot_id("boot_id", request.boot_id);
        fields.finish()?;
        // Of a snapshot there is only one way that makes sense.
        let mode = match (mode, &attachable) {
            (v1::AccessMode::Unspecified, Attachable::Snapshot(_)) => v1::AccessMode::MultiNodeReaderOnly,
            (mode, _) => mode,
        };
        let (read_only, is_shared) = match mode {
            v1::AccessMode::Unspecified | v1::AccessMode::SingleNodeWriter => (false, false),
            v1::AccessMode::MultiNodeMultiWriter => (false, true),
            v1::AccessMode::SingleNodeReaderOnly => (true, false),
            v1::AccessMode::MultiNodeReaderOnly => (true, true),
        };
        let mut scope = caller.scope_at(Call::AttachVolume, &node_id)?;
        let force = request.force;
        if force {
            scope = caller.scope_of_force()?;
        }
        let only_if_granted =
            request.only_if_granted || self.needs_grant(caller, &node_id, &attachable).await?;
        let node_must_be_registered = request.node_must_be_registered;
        let wanted = AttachWanted {
            node_id,
            boot_id,
            read_only,
            force,
            is_shared,
            node_must_be_registered,
            only_if_granted,
        };
        let give_up = Instant::now() + ATTACH_WAIT_MAX;
        loop {
            let outcome = self.try_give(&scope, &attachable, &wanted, data_addresses.clone()).await?;
            match outcome {
                // Not with the lock held: others may detach it meanwhile, or the holder come back.
                Err(LifecycleError::OtherBootMayReturn { after, .. }) if Instant::now() < give_up => {
                    tokio::time::sleep(after.min(ATTACH_PAUSE)).await;
                }
                outcome => return outcome.map_err(|error| status::from_lifecycle(&error)),
            }
        }
    }

    /// Whether the caller attaches it to the node only if it is granted: where it does so for the node, and not for the volume's tenant.
    async fn needs_grant(
        &self,
        caller: &Caller,
        node_id: &str,
        attachable: &Attachable,
    ) -> Result<bool, Status> {
        if !caller.needs_grant(node_id, "") {
            return Ok(false);
        }
        let tenant = match attachable.clone() {
            Attachable::Volume(asked) => {
                self.named(&Scope::All, asked).await.map(|named| tenant_of(&named.name).to_owned())
            }
            Attachable::Snapshot(named) => {
                self.look(move |lifecycle| Ok(lifecycle.snapshot(&named)?.0.tenant)).await
            }
        };
        // What is not there is told by the attach.
        Ok(tenant.map_or(true, |tenant| caller.needs_grant(node_id, &tenant)))
    }

    async fn try_give(
        &self,
        scope: &Scope,
        attachable: &Attachable,
        wanted: &AttachWanted,
        data_addresses: Vec<String>,
    ) -> Result<Result<v1::AttachVolumeResponse, LifecycleError>, Status> {
        let wanted = wanted.clone();
        match attachable {
            Attachable::Volume(name) => {
                let lock = match self.lock_volume(scope, name.clone()).await {
                    Ok(lock) => lock,
                    Err(error) => return Ok(Err(error)),
                };
                self.outcome(&self.calls.permits, move |lifecycle| {
                    let attached = lifecycle.attach_volume(&lock, &wanted)?;
                    Ok(messages::attached(lifecycle, &attached, data_addresses))
                })
                .await
            }
            Attachable::Snapshot(named) => {
                let snapshot_uid = match self.snapshot_uid(scope, named.clone()).await {
                    Ok(snapshot_uid) => snapshot_uid,
                    Err(error) => return Ok(Err(error)),
                };
                // With the volume's name: its disk is called by it, and a volume that is deleted meanwhile has none any more.
                let mut names = vec![snapshot_lock_name(snapshot_uid)];
                if let SnapshotNamed::Name { volume_name, .. } = named {
                    match self.named(scope, volume_name.clone()).await {
                        Ok(volume) => names.push(volume.name),
                        Err(error) => return Ok(Err(error)),
                    }
                }
                let (locks, named) = (self.lock_all(&names).await, named.clone());
                self.outcome(&self.calls.permits, move |lifecycle| {
                    let is_still = lifecycle.snapshot_uid(&named)? == snapshot_uid;
                    let lock = locks.iter().find(|lock| lock.name() == names[0]).filter(|_| is_still);
                    let lock = lock.ok_or_else(|| SnapshotError::NotFound(named.to_string()))?;
                    let attached = lifecycle.attach_snapshot(lock, snapshot_uid, &wanted)?;
                    Ok(messages::attached(lifecycle, &attached, data_addresses))
                })
                .await
            }
        }
    }

    pub(super) async fn take(
        &self,
        caller: &Caller,
        request: v1::DetachVolumeRequest,
    ) -> Result<v1::DetachVolumeResponse, Status> {
        let (named, wanted) = fields::detach_wanted(request)?;
        caller.require_any(Call::DetachVolume)?;
        let scope = match (&wanted.node_id, wanted.attachment_id) {
            (None, Some(id)) => {
                let holder = self.looking(move |lifecycle| lifecycle.node_id_of(id)).await?.into_inner();
                // One that is gone is nobody's, and detaching it does nothing.
                match holder {
                    Some(node_id) => caller.scope_at(Call::DetachVolume, &node_id)?,
                    None => return Ok(v1::DetachVolumeResponse { existed: false }),
                }
            }
            (node_id, _) => caller.scope_at(Call::DetachVolume, node_id.as_deref().unwrap_or_default())?,
        };
        let attached_to = match (named, wanted.attachment_id) {
            (Some(Attachable::Volume(asked)), _) => Some(AttachedTo::Volume(asked)),
            (Some(Attachable::Snapshot(named)), _) => match self.snapshot_uid(&scope, named).await {
                Err(LifecycleError::Snapshot(SnapshotError::NotFound(_))) => None,
                found => {
                    let found = found.map_err(|error| status::from_lifecycle(&error))?;
                    Some(AttachedTo::Snapshot(found))
                }
            },
            (None, Some(id)) => self.looking(move |lifecycle| lifecycle.attached_to(id)).await?.into_inner(),
            (None, None) => None,
        };
        let existed = match attached_to {
            None => false,
            Some(AttachedTo::Volume(asked)) => match self.lock_volume(&scope, asked).await {
                Err(LifecycleError::VolumeNotFound(_)) => false,
                lock => {
                    let lock = lock.map_err(|error| status::from_lifecycle(&error))?;
                    let ended = self.blocking(move |lifecycle| lifecycle.detach_volume(&lock, &wanted));
                    ended.await?.into_inner()
                }
            },
            Some(AttachedTo::Snapshot(uid)) if !self.has_snapshot(&scope, uid).await? => false,
            Some(AttachedTo::Snapshot(uid)) => {
                let lock = self.locks.lock(&snapshot_lock_name(uid)).await;
                let ended = self.blocking(move |lifecycle| lifecycle.detach_snapshot(&lock, uid, &wanted));
                ended.await?.into_inner()
            }
        };
        Ok(v1::DetachVolumeResponse { existed })
    }

    /// Whether a snapshot is in the scope; one that is gone is.
    async fn has_snapshot(&self, scope: &Scope, uid: Uuid) -> Result<bool, Status> {
        match self.snapshot_uid(scope, SnapshotNamed::Uid(uid)).await {
            Err(LifecycleError::Snapshot(SnapshotError::NotFound(_))) => Ok(scope.is_all()),
            found => found.map(|_| true).map_err(|error| status::from_lifecycle(&error)),
        }
    }

    pub(super) async fn page_of_attachments(
        &self,
        scope: Scope,
        request: v1::ListAttachmentsRequest,
    ) -> Result<v1::ListAttachmentsResponse, Status> {
        let mut fields = Fields::default();
        let mut filter = fields.attachment_filter(request.volume_name, request.node_id).within(&scope);
        let token = PageToken::new("attachments", self.lifecycle.catalog().server_id());
        let after = token.read_pair(&request.page_token);
        fields.require(after.is_some(), "page_token", || "is not a token of this list and server".to_owned());
        fields.finish()?;
        if let Some(asked) = filter.volume_name.take() {
            // Behind a volume's uid there may be a snapshot's name. Where there is no such volume, nothing has its attachments.
            let (volume, snapshot) = asked.split_once('@').map_or((asked.as_str(), ""), |parts| parts);
            let named = match self.named(&scope, volume.to_owned()).await {
                Ok(named) => named.name,
                Err(LifecycleError::VolumeNotFound(asked)) => asked,
                Err(error) => return Err(status::from_lifecycle(&error)),
            };
            let at = if asked.contains('@') { "@" } else { "" };
            filter.volume_name = Some(format!("{named}{at}{snapshot}"));
        }
        let (volume_name, attachment_id) = after.unwrap_or_default();
        let after = ListedAttachment { volume_name, attachment_id };
        let limit = page_limit(request.page_size);
        let page = self.looking(move |lifecycle| {
            let mut found = lifecycle.catalog().list_attachments(&filter, &after, limit + 1)?;
            let next_page_token = token.next_pair(&mut found, limit, |(volume_name, (held, _))| {
                format!("{volume_name}/{}", held.attachment_id)
            });
            let attachments = found
                .iter()
                .map(|(name, (held, state))| messages::attachment(lifecycle, name, held, *state))
                .collect();
            Ok(v1::ListAttachmentsResponse { attachments, next_page_token })
        });
        Ok(page.await?.into_inner())
    }
}
