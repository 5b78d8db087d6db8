//! The management API `volnode.v1.Management` over gRPC.
//!
//! Owns the translation between messages and the lifecycle: fields checked (`fields.rs`), calls on one volume put in line
//! (`NameLocks`), callers held to what their certificates allow (`authorization.rs`), blocking work moved off tokio's threads, records turned into messages (`messages.rs`), errors into
//! statuses (`status.rs`). It decides nothing itself; the semantics are those written in
//! `proto/volnode/v1/management.proto`. Called by tonic.
//!
//! A call whose caller hangs up is finished all the same: the blocking work owns the lock and runs to its end, which a
//! stop of the server waits for ([`Calls`]).

mod authorization;
mod fields;
pub mod listener;
mod messages;
mod page_token;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;
use proto::v1::management_server::{Management, ManagementServer};
use tokio::sync::Semaphore;
use tonic::{Extensions, Request, Response, Status};

use crate::advertised::Advertised;
use crate::lifecycle::{AttachWanted, DataSide, HOLDER_TIMEOUT, Lifecycle, LifecycleError, NameLocks};
use crate::status;
use authorization::Caller;
use fields::Fields;
use listener::ApiPeer;
use page_token::PageToken;

/// Blocking calls at once that change something; more wait. Each takes a thread, for one commit or one fence.
const CALLS_MAX: u32 = 32;
/// The same of those that only look. They wait for no storage, and so for no call that does.
const LOOKS_MAX: usize = 8;

/// So long an attach waits for a holder that may come back: longer than that has to, and shorter than clients wait for an answer.
const ATTACH_WAIT_MAX: Duration = Duration::from_secs(40);
const ATTACH_PAUSE: Duration = Duration::from_secs(1);
const _: () = assert!(ATTACH_WAIT_MAX.as_secs() > HOLDER_TIMEOUT.as_secs());

/// One message of a call; none of ours is longer.
const MESSAGE_BYTES_MAX: usize = 256 << 10;

/// The blocking calls in progress: bounded, and finished before the server stops.
#[derive(Debug, Clone)]
pub struct Calls {
    permits: Arc<Semaphore>,
    looks: Arc<Semaphore>,
}

impl Default for Calls {
    fn default() -> Self {
        let of = |permits| Arc::new(Semaphore::new(permits));
        Self { permits: of(CALLS_MAX as usize), looks: of(LOOKS_MAX) }
    }
}

impl Calls {
    /// Waits until every call in progress that changes something has finished, and lets no other begin.
    pub async fn finish(&self) {
        self.looks.close();
        if let Ok(all) = self.permits.acquire_many(CALLS_MAX).await {
            self.permits.close();
            all.forget();
        }
    }
}

/// Answers the calls; see the module's text.
#[derive(Debug)]
pub struct ManagementService<D> {
    lifecycle: Arc<Lifecycle<D>>,
    locks: NameLocks,
    calls: Calls,
    advertised: Advertised,
}

impl<D: DataSide> ManagementService<D> {
    /// The service as tonic takes it. `advertised` is what clients are told.
    pub fn new(lifecycle: Lifecycle<D>, calls: Calls, advertised: Advertised) -> ManagementServer<Self> {
        let lifecycle = Arc::new(lifecycle);
        let service =
            ManagementServer::new(Self { lifecycle, locks: NameLocks::default(), calls, advertised });
        service.max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Runs a call that only looks, and answers with what it returned.
    async fn looking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Lifecycle<D>) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let outcome = self.outcome(&self.calls.looks, call).await?;
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
        let work = move || {
            let outcome = call(&lifecycle).map_err(|error| lifecycle.explained(error));
            drop(permit);
            outcome
        };
        tokio::task::spawn_blocking(work).await.map_err(|panicked| status::failed(&panicked.to_string()))
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
        }))
    }

    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(request.extensions()).require_manage()?;
        let new = fields::new_volume(request.into_inner())?;
        let lock = self.locks.lock(&new.name).await;
        self.blocking(move |lifecycle| {
            let volume = lifecycle.create_volume(&lock, &new)?;
            messages::volume(lifecycle, &volume)
        })
        .await
    }

    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(request.extensions()).require_manage()?;
        let mut fields = Fields::default();
        let name = fields.volume_name("name", request.into_inner().name);
        fields.finish()?;
        self.looking(move |lifecycle| messages::volume(lifecycle, &lifecycle.volume(&name)?)).await
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        Caller::of(request.extensions()).require_manage()?;
        let request = request.into_inner();
        let mut fields = Fields::default();
        let token = PageToken::new("volumes", self.lifecycle.catalog().server_id());
        let after = fields.page_token("page_token", &token, &request.page_token);
        fields.finish()?;
        let limit = page_token::page_limit(request.page_size);
        self.looking(move |lifecycle| {
            // One more than the page tells whether there is another.
            let mut found = lifecycle.catalog().list_volumes(&after, limit + 1)?;
            let next_page_token = token.next(&mut found, limit, |volume| &volume.name);
            let volumes =
                found.iter().map(|volume| messages::volume(lifecycle, volume)).collect::<Result<_, _>>()?;
            Ok(v1::ListVolumesResponse { volumes, next_page_token })
        })
        .await
    }

    async fn resize_volume(
        &self,
        request: Request<v1::ResizeVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Caller::of(request.extensions()).require_manage()?;
        let (name, capacity_bytes) = fields::resize_wanted(request.into_inner())?;
        let lock = self.locks.lock(&name).await;
        self.blocking(move |lifecycle| {
            let volume = lifecycle.resize_volume(&lock, capacity_bytes)?;
            messages::volume(lifecycle, &volume)
        })
        .await
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        Caller::of(request.extensions()).require_manage()?;
        let mut fields = Fields::default();
        let name = fields.volume_name("name", request.into_inner().name);
        fields.finish()?;
        let lock = self.locks.lock(&name).await;
        self.blocking(move |lifecycle| {
            let existed = lifecycle.delete_volume(&lock)?;
            Ok(v1::DeleteVolumeResponse { existed })
        })
        .await
    }

    async fn attach_volume(
        &self,
        request: Request<v1::AttachVolumeRequest>,
    ) -> Result<Response<v1::AttachVolumeResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let data_addresses = self.data_addresses(request.extensions());
        let request = request.into_inner();
        let mut fields = Fields::default();
        let name = fields.volume_name("volume_name", request.volume_name);
        let node_id = fields.node_id("node_id", request.node_id);
        let read_only = fields.read_only("access_mode", request.access_mode);
        let boot_id = fields.boot_id("boot_id", request.boot_id);
        fields.finish()?;
        caller.require_node(&node_id)?;
        let force = request.force;
        if force {
            caller.require_force()?;
        }
        let wanted = AttachWanted { node_id, boot_id, read_only, force };
        let give_up = Instant::now() + ATTACH_WAIT_MAX;
        loop {
            let (wanted, data_addresses) = (wanted.clone(), data_addresses.clone());
            let lock = self.locks.lock(&name).await;
            let outcome = self
                .outcome(&self.calls.permits, move |lifecycle| {
                    let attached = lifecycle.attach_volume(&lock, &wanted)?;
                    Ok(messages::attached(lifecycle, &attached, data_addresses))
                })
                .await?;
            match outcome {
                // Not with the lock held: others may detach it meanwhile, or the holder come back.
                Err(LifecycleError::OtherBootMayReturn { after, .. }) if Instant::now() < give_up => {
                    tokio::time::sleep(after.min(ATTACH_PAUSE)).await;
                }
                outcome => return outcome.map(Response::new).map_err(|error| status::from_lifecycle(&error)),
            }
        }
    }

    async fn detach_volume(
        &self,
        request: Request<v1::DetachVolumeRequest>,
    ) -> Result<Response<v1::DetachVolumeResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let (named, wanted) = fields::detach_wanted(request.into_inner())?;
        match (caller.may_manage(), &wanted.node_id, wanted.attachment_id) {
            (true, ..) => {}
            (false, None, Some(id)) => {
                let holder = self.looking(move |lifecycle| lifecycle.node_id_of(id)).await?.into_inner();
                // One that is gone is nobody's, and detaching it does nothing.
                if let Some(node_id) = holder {
                    caller.require_node(&node_id)?;
                }
            }
            (false, node_id, _) => caller.require_node(node_id.as_deref().unwrap_or_default())?,
        }
        let name = match (named, wanted.attachment_id) {
            (Some(name), _) => Some(name),
            (None, Some(id)) => {
                self.looking(move |lifecycle| lifecycle.volume_name_of(id)).await?.into_inner()
            }
            (None, None) => None,
        };
        let Some(name) = name else {
            return Ok(Response::new(v1::DetachVolumeResponse { existed: false }));
        };
        let lock = self.locks.lock(&name).await;
        self.blocking(move |lifecycle| {
            let existed = lifecycle.detach_volume(&lock, &wanted)?;
            Ok(v1::DetachVolumeResponse { existed })
        })
        .await
    }

    async fn list_attachments(
        &self,
        request: Request<v1::ListAttachmentsRequest>,
    ) -> Result<Response<v1::ListAttachmentsResponse>, Status> {
        Caller::of(request.extensions()).require_node(&request.get_ref().node_id)?;
        let request = request.into_inner();
        let mut fields = Fields::default();
        let filter = fields.attachment_filter(request.volume_name, request.node_id);
        let token = PageToken::new("attachments", self.lifecycle.catalog().server_id());
        let after = fields.page_token("page_token", &token, &request.page_token);
        fields.finish()?;
        let limit = page_token::page_limit(request.page_size);
        self.looking(move |lifecycle| {
            let mut found = lifecycle.catalog().list_attachments(&filter, &after, limit + 1)?;
            let next_page_token = token.next(&mut found, limit, |(volume_name, _)| volume_name);
            let attachments = found
                .iter()
                .map(|(name, attachment)| messages::attachment(lifecycle, name, attachment))
                .collect();
            Ok(v1::ListAttachmentsResponse { attachments, next_page_token })
        })
        .await
    }
}
