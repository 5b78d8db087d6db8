//! The management API `volnode.v1.Management` over gRPC.
//!
//! Owns the translation between messages and the lifecycle: fields checked (`fields.rs`), calls on one volume put in line
//! (`NameLocks`), callers held to what their certificates allow (`authorization.rs`), calls with an id carried out once (`requests.rs`), calls written down (`audited.rs`), blocking work moved off tokio's threads, records turned into messages (`messages.rs`), errors into
//! statuses (`status.rs`). It decides nothing itself; the semantics are those written in
//! `proto/volnode/v1/management.proto`. Called by tonic.
//!
//! A call whose caller hangs up, or whose deadline passes, while it waits does nothing. One that has begun is finished all the same: the
//! blocking work owns the lock and runs to its end, which a stop of the server waits for ([`Calls`]).

mod attachments;
pub mod audit;
mod audited;
pub mod authorization;
mod calls;
mod deadline;
mod diffs;
mod fields;
mod freezes;
mod grants;
pub mod listener;
mod messages;
mod named;
mod nodes;
mod page_token;
mod rename;
mod requests;
mod settings_fields;
mod snapshot_fields;
mod snapshots;
mod tenants;
mod update_mask;
mod volumes;
mod watch;

use std::sync::Arc;

use proto::v1;
use proto::v1::management_server::{Management, ManagementServer};
use tokio::sync::Semaphore;
use tonic::{Extensions, Request, Response, Status};

use crate::advertised::Advertised;
use crate::catalog::{BackendKind, RequestKey};
use crate::lifecycle::{DataSide, Lifecycle, LifecycleError, NameLock, NameLocks, SnapshotError};
use crate::status;
use audit::AuditLog;
pub use audited::Audited;
use authorization::{Call, Caller};
pub use calls::Calls;
use fields::Fields;
use listener::ApiPeer;
use named::volume_within;
use page_token::PageToken;

/// One message of a call; none of ours is longer.
const MESSAGE_BYTES_MAX: usize = 256 << 10;

/// Answers the calls; see the module's text.
#[derive(Debug)]
pub struct ManagementService<D> {
    lifecycle: Arc<Lifecycle<D>>,
    locks: Arc<NameLocks>,
    calls: Calls,
    advertised: Advertised,
    /// The id of the call that it is for, locked until the call's work has ended.
    request_lock: Option<Arc<NameLock>>,
}

impl<D> Clone for ManagementService<D> {
    fn clone(&self) -> Self {
        Self {
            lifecycle: Arc::clone(&self.lifecycle),
            locks: Arc::clone(&self.locks),
            calls: self.calls.clone(),
            advertised: self.advertised.clone(),
            request_lock: self.request_lock.clone(),
        }
    }
}

impl<D: DataSide> ManagementService<D> {
    /// The service as tonic takes it. `advertised` is what clients are told; with a `log` each call has a line there.
    pub fn new(
        lifecycle: Lifecycle<D>,
        calls: Calls,
        advertised: Advertised,
        log: Option<AuditLog>,
    ) -> ManagementServer<Audited<Self>> {
        let lifecycle = Arc::new(lifecycle);
        let inner = Self { lifecycle, locks: Arc::default(), calls, advertised, request_lock: None };
        ManagementServer::new(Audited { inner, log }).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The service for one call that has an id.
    fn under(&self, request: RequestKey, lock: Arc<NameLock>) -> Self {
        let lifecycle = Arc::new(self.lifecycle.under(request));
        Self { lifecycle, request_lock: Some(lock), ..self.clone() }
    }

    /// Runs a call that only looks, and answers with what it returned.
    async fn looking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Lifecycle<D>) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let outcome = self.outcome(&self.calls.looks, call).await?;
        outcome.map(Response::new).map_err(|error| status::from_lifecycle(&error))
    }

    /// The same of one that looks at all extents of something: none but another of these waits for it.
    async fn walking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Lifecycle<D>) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let outcome = self.outcome(&self.calls.walks, call).await?;
        outcome.map(Response::new).map_err(|error| status::from_lifecycle(&error))
    }

    /// Where the caller of these extensions can open exports.
    fn data_addresses(&self, extensions: &Extensions) -> Vec<String> {
        let peer = extensions.get::<ApiPeer>();
        peer.map_or_else(Vec::new, |peer| self.advertised.to_caller(peer.reached_at))
    }

    /// Runs a blocking call on the lifecycle and answers with what it returned.
    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Lifecycle<D>) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let outcome = self.outcome(&self.calls.permits, call).await?;
        outcome.map(Response::new).map_err(|error| status::from_lifecycle(&error))
    }

    /// The same, with the lifecycle's own error.
    async fn outcome<T: Send + 'static>(
        &self,
        permits: &Arc<Semaphore>,
        call: impl FnOnce(&Lifecycle<D>) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<Result<T, LifecycleError>, Status> {
        let lifecycle = Arc::clone(&self.lifecycle);
        let permit = Arc::clone(permits).acquire_owned().await.map_err(|_| status::stopping())?;
        // Gone with this future, when the caller hangs up or its deadline passes.
        let caller = Arc::new(());
        let (asked, request_lock) = (Arc::downgrade(&caller), self.request_lock.clone());
        let work = move || {
            let outcome = match asked.upgrade() {
                Some(_) => call(&lifecycle).map_err(|error| lifecycle.explained(error)),
                // Nobody hears it.
                None => Err(SnapshotError::Stopping.into()),
            };
            drop((permit, request_lock));
            outcome
        };
        let done = tokio::task::spawn_blocking(work).await;
        drop(caller);
        done.map_err(|panicked| status::failed(&panicked.to_string()))
    }
}

#[tonic::async_trait]
impl<D: DataSide> Management for ManagementService<D> {
    async fn get_server_info(
        &self,
        request: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        Ok(Response::new(v1::GetServerInfoResponse {
            server_id: self.lifecycle.catalog().server_id().to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            data_addresses: self.data_addresses(request.extensions()),
            snapshots_unsupported_reason: self.lifecycle.snapshots_unsupported_reason(),
            storage_space: self.lifecycle.storage_space().map(messages::storage_space),
        }))
    }

    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::CreateVolume)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.make_volume(scope, request).await
        })
        .await
    }

    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::GetVolume)?;
        let v1::GetVolumeRequest { name, with_exclusive_bytes } = request.into_inner();
        let mut fields = Fields::default();
        let name = fields.volume("name", name);
        fields.finish()?;
        let looked_up = self.looking(move |lifecycle| {
            let found = volume_within(lifecycle, &scope, &name)?;
            let waits = with_exclusive_bytes || found.backend == BackendKind::Device;
            let answer = if waits { None } else { Some(messages::volume(lifecycle, &found)?) };
            Ok((found, answer))
        });
        match looked_up.await?.into_inner() {
            (_, Some(answer)) => Ok(Response::new(answer)),
            (found, None) if with_exclusive_bytes => {
                self.walking(move |lifecycle| messages::with_exclusive_bytes(lifecycle, found)).await
            }
            // What is not ours may have to be waited for.
            (found, None) => self.blocking(move |lifecycle| messages::followed(lifecycle, found)).await,
        }
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::ListVolumes)?;
        let request = request.into_inner();
        let mut fields = Fields::default();
        let token = PageToken::new("volumes", self.lifecycle.catalog().server_id());
        let after = fields.page_token("page_token", &token, &request.page_token);
        let labels = settings_fields::label_filter(&mut fields, request.labels);
        fields.finish()?;
        let limit = page_token::page_limit(request.page_size);
        self.looking(move |lifecycle| {
            // One more than the page tells whether there is another.
            let mut found = lifecycle.catalog().list_volumes(&scope, &labels, &after, limit + 1)?;
            let volumes =
                settings_fields::fit_on_page(&found, limit, |volume| messages::volume(lifecycle, volume))?;
            let next_page_token = token.next(&mut found, volumes.len() as u32, |volume| &volume.name);
            Ok(v1::ListVolumesResponse { volumes, next_page_token })
        })
        .await
    }

    async fn resize_volume(
        &self,
        request: Request<v1::ResizeVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::ResizeVolume)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.grow_volume(scope, request).await
        })
        .await
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::DeleteVolume)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.remove_volume(scope, request).await
        })
        .await
    }

    async fn attach_volume(
        &self,
        request: Request<v1::AttachVolumeRequest>,
    ) -> Result<Response<v1::AttachVolumeResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let data_addresses = self.data_addresses(request.extensions());
        self.give(&caller, data_addresses, request.into_inner()).await.map(Response::new)
    }

    async fn detach_volume(
        &self,
        request: Request<v1::DetachVolumeRequest>,
    ) -> Result<Response<v1::DetachVolumeResponse>, Status> {
        let caller = Caller::of(request.extensions());
        self.take(&caller, request.into_inner()).await.map(Response::new)
    }

    async fn list_attachments(
        &self,
        request: Request<v1::ListAttachmentsRequest>,
    ) -> Result<Response<v1::ListAttachmentsResponse>, Status> {
        let node_id = &request.get_ref().node_id;
        let scope = Caller::of(request.extensions()).scope_at(Call::ListAttachments, node_id)?;
        self.page_of_attachments(scope, request.into_inner()).await.map(Response::new)
    }

    async fn update_volume(
        &self,
        request: Request<v1::UpdateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::UpdateVolume)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.change_properties(scope, request).await
        })
        .await
    }

    async fn rename_volume(
        &self,
        request: Request<v1::RenameVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::RenameVolume)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.rename(scope, request).await
        })
        .await
    }

    async fn set_volume_limits(
        &self,
        request: Request<v1::SetVolumeLimitsRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::SetVolumeLimits)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.change_limits(scope, request).await
        })
        .await
    }

    async fn set_volume_content(
        &self,
        request: Request<v1::SetVolumeContentRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let caller = Caller::of(request.extensions());
        let (name, attachment_id, wanted) = settings_fields::content_wanted(request.into_inner())?;
        let scope = match caller.scope(Call::SetVolumeContent) {
            Ok(scope) if scope.is_all() => scope,
            _ => {
                let holder =
                    self.looking(move |lifecycle| lifecycle.node_id_of(attachment_id)).await?.into_inner();
                caller.scope_at(Call::SetVolumeContent, holder.as_deref().unwrap_or_default())?
            }
        };
        let lock = self.locked(&scope, name).await?;
        self.blocking(move |lifecycle| {
            let volume = match wanted {
                Some(wanted) => lifecycle.set_content(&lock, attachment_id, wanted)?,
                None => lifecycle.volume_of_attachment(&lock, attachment_id)?,
            };
            messages::volume(lifecycle, &volume)
        })
        .await
    }

    async fn create_grant(
        &self,
        request: Request<v1::CreateGrantRequest>,
    ) -> Result<Response<v1::Grant>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::CreateGrant)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.make_grant(scope, request).await
        })
        .await
    }

    async fn delete_grant(
        &self,
        request: Request<v1::DeleteGrantRequest>,
    ) -> Result<Response<v1::DeleteGrantResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::DeleteGrant)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.end_grant(scope, request).await
        })
        .await
    }

    async fn list_grants(
        &self,
        request: Request<v1::ListGrantsRequest>,
    ) -> Result<Response<v1::ListGrantsResponse>, Status> {
        let node_id = &request.get_ref().node_id;
        let scope = Caller::of(request.extensions()).scope_at(Call::ListGrants, node_id)?;
        self.page_of_grants(scope, request.into_inner()).await.map(Response::new)
    }

    async fn register_node(
        &self,
        request: Request<v1::RegisterNodeRequest>,
    ) -> Result<Response<v1::RegisteredNode>, Status> {
        let node_id = &request.get_ref().node_id;
        Caller::of(request.extensions()).scope_at(Call::RegisterNode, node_id)?;
        self.make_known(request.into_inner()).await.map(Response::new)
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let node_id = &request.get_ref().node_id;
        Caller::of(request.extensions()).scope_at(Call::Heartbeat, node_id)?;
        self.hear(request.into_inner()).await.map(Response::new)
    }

    async fn get_node(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::RegisteredNode>, Status> {
        let node_id = &request.get_ref().node_id;
        let scope = Caller::of(request.extensions()).scope_at(Call::GetNode, node_id)?;
        self.find_node(scope, request.into_inner()).await.map(Response::new)
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::ListNodes)?;
        self.page_of_nodes(scope, request.into_inner()).await.map(Response::new)
    }

    async fn delete_node(
        &self,
        request: Request<v1::DeleteNodeRequest>,
    ) -> Result<Response<v1::DeleteNodeResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::DeleteNode)?;
        self.once(scope, request.into_inner(), |service, _, request| async move {
            service.forget_node(request).await
        })
        .await
    }

    async fn create_snapshot(
        &self,
        request: Request<v1::CreateSnapshotRequest>,
    ) -> Result<Response<v1::CreateSnapshotResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::CreateSnapshot)?;
        if request.get_ref().freeze {
            return self.take_frozen_snapshots(scope, request.into_inner()).await.map(Response::new);
        }
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.begin_snapshots(scope, request).await
        })
        .await
    }

    async fn mark_snapshots_frozen(
        &self,
        request: Request<v1::MarkSnapshotsFrozenRequest>,
    ) -> Result<Response<v1::MarkSnapshotsFrozenResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::MarkSnapshotsFrozen)?;
        self.mark_frozen(scope, request.into_inner()).await.map(Response::new)
    }

    async fn get_snapshot(
        &self,
        request: Request<v1::GetSnapshotRequest>,
    ) -> Result<Response<v1::Snapshot>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::GetSnapshot)?;
        self.find_snapshot(scope, request.into_inner()).await.map(Response::new)
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::ListSnapshots)?;
        self.page_of_snapshots(scope, request.into_inner()).await.map(Response::new)
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::DeleteSnapshot)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.remove_snapshot(scope, request).await
        })
        .await
    }

    async fn restore_volume(
        &self,
        request: Request<v1::RestoreVolumeRequest>,
    ) -> Result<Response<v1::RestoreVolumeResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::RestoreVolume)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.begin_restore(scope, request).await
        })
        .await
    }

    async fn clone_volume(
        &self,
        request: Request<v1::CloneVolumeRequest>,
    ) -> Result<Response<v1::CloneVolumeResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::CloneVolume)?;
        self.once(scope, request.into_inner(), |service, scope, request| async move {
            service.begin_clone(scope, request).await
        })
        .await
    }

    type DiffSnapshotsStream = diffs::DiffStream;

    async fn diff_snapshots(
        &self,
        request: Request<v1::DiffSnapshotsRequest>,
    ) -> Result<Response<Self::DiffSnapshotsStream>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::DiffSnapshots)?;
        self.begin_diff(scope, request.into_inner()).await.map(Response::new)
    }

    type WatchStream = watch::EventStream;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::Watch)?;
        self.begin_watch(scope, request.into_inner()).await.map(Response::new)
    }

    async fn get_operation(
        &self,
        request: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::GetOperation)?;
        self.find_operation(&scope, &request.into_inner().operation_id).map(Response::new)
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::ListOperations)?;
        Ok(Response::new(self.list_all_operations(&scope)))
    }

    async fn cancel_operation(
        &self,
        request: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::CancelOperation)?;
        self.cancel(&scope, &request.into_inner().operation_id).map(Response::new)
    }

    async fn set_tenant(
        &self,
        request: Request<v1::SetTenantRequest>,
    ) -> Result<Response<v1::Tenant>, Status> {
        Caller::of(request.extensions()).scope(Call::SetTenant)?;
        self.put_tenant(request.into_inner()).await.map(Response::new)
    }

    async fn get_tenant(
        &self,
        request: Request<v1::GetTenantRequest>,
    ) -> Result<Response<v1::Tenant>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::GetTenant)?;
        self.find_tenant(scope, request.into_inner()).await.map(Response::new)
    }

    async fn list_tenants(
        &self,
        request: Request<v1::ListTenantsRequest>,
    ) -> Result<Response<v1::ListTenantsResponse>, Status> {
        let scope = Caller::of(request.extensions()).scope(Call::ListTenants)?;
        self.page_of_tenants(scope, request.into_inner()).await.map(Response::new)
    }

    async fn delete_tenant(
        &self,
        request: Request<v1::DeleteTenantRequest>,
    ) -> Result<Response<v1::DeleteTenantResponse>, Status> {
        Caller::of(request.extensions()).scope(Call::DeleteTenant)?;
        self.forget_tenant(request.into_inner()).await.map(Response::new)
    }
}
