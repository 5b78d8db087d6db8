//! The CSI Controller service and the GroupController: volumes, snapshots, and which node has a volume.
//!
//! ```text
//! the service ──► volumes ─────► wanted ──► access, parameters, sizes, names      (no I/O: what is asked for)
//!             ├─► publishing ──► access
//!             ├─► snapshots, groups, health, lists
//!             └─► all of them: once (what they make), api ──► the storage server's management API
//! ```
//!
//! Owns: which calls there are, and what is declared of them. Never: keeps anything. All that is known is on the server: the process may be
//! killed between any two instructions, and a call's repeat goes on from there. No request is logged, and secrets are not looked at.
//! Called by: `serve`.

mod access;
mod api;
mod groups;
mod health;
mod lists;
mod locks;
mod names;
mod once;
mod parameters;
mod publishing;
mod refusal;
mod sizes;
mod snapshots;
mod topology;
mod volumes;
mod wanted;

use std::collections::BTreeMap;

use proto::csi::v1;
use proto::csi::v1::controller_service_capability::rpc::Type as Rpc;
use proto::csi::v1::plugin_capability::service::Type as ServiceType;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::services::logged;
use api::Server;
use locks::Locks;
use refusal::Refusal;
use topology::Place;

/// What is there, and no more.
const CAPABILITIES: [Rpc; 16] = [
    Rpc::CreateDeleteVolume,
    Rpc::PublishUnpublishVolume,
    Rpc::PublishReadonly,
    Rpc::ListVolumes,
    Rpc::ListVolumesPublishedNodes,
    Rpc::GetVolume,
    Rpc::GetCapacity,
    Rpc::CreateDeleteSnapshot,
    Rpc::ListSnapshots,
    Rpc::GetSnapshot,
    Rpc::CloneVolume,
    Rpc::ExpandVolume,
    Rpc::ModifyVolume,
    Rpc::SingleNodeMultiWriter,
    Rpc::GetVolumeHealth,
    Rpc::ListVolumeHealth,
];

/// Both services, over the management API of one storage server.
#[derive(Debug, Clone)]
pub struct Controller {
    server: Server,
    locks: Locks,
    place: Place,
}

impl Controller {
    /// Over a channel to the server at this URI, which need not be there yet, and whose volumes can be reached in this place; of no keys:
    /// everywhere.
    pub fn new(channel: Channel, uri: String, topology: BTreeMap<String, String>) -> Self {
        Self { server: Server::new(channel, uri), locks: Locks::default(), place: Place(topology) }
    }

    /// What a plugin with this controller declares.
    pub fn plugin_capabilities(&self) -> Vec<v1::PluginCapability> {
        use v1::plugin_capability::volume_expansion::Type as ExpansionType;
        use v1::plugin_capability::{Service, Type, VolumeExpansion};
        let service = |of: ServiceType| Type::Service(Service { r#type: of.into() });
        let online = Type::VolumeExpansion(VolumeExpansion { r#type: ExpansionType::Online.into() });
        let mut all = vec![
            service(ServiceType::ControllerService),
            service(ServiceType::GroupControllerService),
            online,
        ];
        if !self.place.is_everywhere() {
            all.push(service(ServiceType::VolumeAccessibilityConstraints));
            all.push(service(ServiceType::SnapshotAccessibilityConstraints));
        }
        all.into_iter().map(|of| v1::PluginCapability { r#type: Some(of) }).collect()
    }
}

/// Answers a call, and logs its name and outcome.
async fn answered<T>(
    call: &'static str,
    answer: impl Future<Output = Result<T, Refusal>>,
) -> Result<Response<T>, Status> {
    logged(call, async { answer.await.map_err(Status::from) }).await
}

#[tonic::async_trait]
impl v1::controller_server::Controller for Controller {
    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::CreateVolumeResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("CreateVolume", volumes::create(&call, &self.place, request)).await
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("DeleteVolume", volumes::delete(&call, request)).await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<v1::ControllerPublishVolumeRequest>,
    ) -> Result<Response<v1::ControllerPublishVolumeResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ControllerPublishVolume", async {
            let _turn = self.locks.lock(&request.volume_id).await;
            publishing::publish(&call, request).await
        })
        .await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<v1::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<v1::ControllerUnpublishVolumeResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ControllerUnpublishVolume", publishing::unpublish(&call, request)).await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<v1::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<v1::ValidateVolumeCapabilitiesResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ValidateVolumeCapabilities", volumes::validate(&call, request)).await
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ListVolumes", volumes::list(&call, &self.place, request)).await
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<v1::ControllerListVolumeHealthRequest>,
    ) -> Result<Response<v1::ControllerListVolumeHealthResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ControllerListVolumeHealth", health::list(&call, request)).await
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<v1::ControllerGetVolumeHealthRequest>,
    ) -> Result<Response<v1::ControllerGetVolumeHealthResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ControllerGetVolumeHealth", health::get(&call, request)).await
    }

    async fn get_capacity(
        &self,
        request: Request<v1::GetCapacityRequest>,
    ) -> Result<Response<v1::GetCapacityResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("GetCapacity", volumes::capacity(&call, &self.place, request)).await
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<v1::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<v1::ControllerGetCapabilitiesResponse>, Status> {
        use v1::controller_service_capability::Type;
        let declared = |of: Rpc| v1::ControllerServiceCapability {
            r#type: Some(Type::Rpc(v1::controller_service_capability::Rpc { r#type: of.into() })),
        };
        let capabilities = CAPABILITIES.map(declared).into();
        answered("ControllerGetCapabilities", async {
            Ok(v1::ControllerGetCapabilitiesResponse { capabilities })
        })
        .await
    }

    async fn create_snapshot(
        &self,
        request: Request<v1::CreateSnapshotRequest>,
    ) -> Result<Response<v1::CreateSnapshotResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("CreateSnapshot", snapshots::create(&call, &self.locks, &self.place, request)).await
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("DeleteSnapshot", snapshots::delete(&call, request)).await
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ListSnapshots", snapshots::list(&call, request)).await
    }

    async fn get_snapshot(
        &self,
        request: Request<v1::GetSnapshotRequest>,
    ) -> Result<Response<v1::GetSnapshotResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("GetSnapshot", snapshots::get(&call, request)).await
    }

    async fn controller_expand_volume(
        &self,
        request: Request<v1::ControllerExpandVolumeRequest>,
    ) -> Result<Response<v1::ControllerExpandVolumeResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ControllerExpandVolume", volumes::expand(&call, request)).await
    }

    async fn controller_get_volume(
        &self,
        request: Request<v1::ControllerGetVolumeRequest>,
    ) -> Result<Response<v1::ControllerGetVolumeResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ControllerGetVolume", volumes::get(&call, &self.place, request)).await
    }

    async fn controller_modify_volume(
        &self,
        request: Request<v1::ControllerModifyVolumeRequest>,
    ) -> Result<Response<v1::ControllerModifyVolumeResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("ControllerModifyVolume", async {
            let _turn = self.locks.lock(&request.volume_id).await;
            volumes::modify(&call, request).await
        })
        .await
    }
}

#[tonic::async_trait]
impl v1::group_controller_server::GroupController for Controller {
    async fn group_controller_get_capabilities(
        &self,
        _: Request<v1::GroupControllerGetCapabilitiesRequest>,
    ) -> Result<Response<v1::GroupControllerGetCapabilitiesResponse>, Status> {
        use v1::group_controller_service_capability::{Rpc, Type, rpc};
        let all = rpc::Type::CreateDeleteGetVolumeGroupSnapshot;
        let capability =
            v1::GroupControllerServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: all.into() })) };
        answered("GroupControllerGetCapabilities", async {
            Ok(v1::GroupControllerGetCapabilitiesResponse { capabilities: vec![capability] })
        })
        .await
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<v1::CreateVolumeGroupSnapshotRequest>,
    ) -> Result<Response<v1::CreateVolumeGroupSnapshotResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("CreateVolumeGroupSnapshot", groups::create(&call, &self.locks, request)).await
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<v1::DeleteVolumeGroupSnapshotRequest>,
    ) -> Result<Response<v1::DeleteVolumeGroupSnapshotResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("DeleteVolumeGroupSnapshot", groups::delete(&call, request)).await
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<v1::GetVolumeGroupSnapshotRequest>,
    ) -> Result<Response<v1::GetVolumeGroupSnapshotResponse>, Status> {
        let (call, request) = self.server.begin(request);
        answered("GetVolumeGroupSnapshot", groups::get(&call, request)).await
    }
}
