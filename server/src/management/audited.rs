//! The management API with a line of the audit log for each call, but for heartbeats that are heard.
//!
//! Owns: which names of a request a line has. Never: what a call does, or who may make it; both are the inner service's, so that
//! what is refused has a line, too; and that a call is given up when its deadline has passed, which a line tells. A call that is added to the API does not compile without a row here.

use proto::v1;
use proto::v1::management_server::Management;
use serde_json::Value;
use tonic::{Request, Response, Status};

use super::audit::{AuditLog, Entry};
use super::deadline;
use super::watch::kinds_told;

/// A service whose calls are written down, if there is a log.
#[derive(Debug)]
pub struct Audited<M> {
    /// What answers.
    pub(super) inner: M,
    /// Where lines go.
    pub(super) log: Option<AuditLog>,
}

/// Each row: the method, its request and response, its name in the API, and what of the request a line has. In `refusals`: those
/// that every node makes all the time, of which only what was refused has a line. In `streams`: those whose response is a stream,
/// of which a line tells how it begins.
macro_rules! audited {
    (calls { $($method:ident($request:ident) -> $response:ident, $name:literal: $($field:ident),*;)* }
     refusals { $($frequent:ident($of_frequent:ident) -> $heard:ident, $frequent_name:literal: $($named:ident),*;)* }
     streams { $($streaming:ident($of_stream:ident) -> $stream:ident, $stream_name:literal: |$about:ident| [$($told:expr),*];)* }) => {
        #[tonic::async_trait]
        impl<M: Management> Management for Audited<M> {
            $(async fn $method(&self, request: Request<v1::$request>) -> Result<Response<v1::$response>, Status> {
                let entry = Entry::begin(self.log.as_ref(), $name, request.extensions(), || {
                    #[allow(unused_variables)] // Of a call that is about nothing.
                    let about = request.get_ref();
                    [$((stringify!($field), Value::from(about.$field.clone()))),*]
                });
                let limit = deadline::limit(request.metadata());
                let outcome = deadline::within(limit, self.inner.$method(request)).await;
                entry.end(outcome.as_ref().map(|_| ()));
                outcome
            })*

            $(async fn $frequent(&self, request: Request<v1::$of_frequent>) -> Result<Response<v1::$heard>, Status> {
                let entry = Entry::begin(self.log.as_ref(), $frequent_name, request.extensions(), || {
                    let about = request.get_ref();
                    [$((stringify!($named), Value::from(about.$named.clone()))),*]
                });
                let limit = deadline::limit(request.metadata());
                let outcome = deadline::within(limit, self.inner.$frequent(request)).await;
                match &outcome {
                    Ok(_) => entry.leave_out(),
                    Err(status) => entry.end(Err(status)),
                }
                outcome
            })*

            $(type $stream = M::$stream;

            async fn $streaming(&self, request: Request<v1::$of_stream>) -> Result<Response<M::$stream>, Status> {
                let entry = Entry::begin(self.log.as_ref(), $stream_name, request.extensions(), || {
                    let $about = request.get_ref();
                    [$($told),*]
                });
                let limit = deadline::limit(request.metadata());
                let outcome = deadline::within(limit, self.inner.$streaming(request)).await;
                entry.end(outcome.as_ref().map(|_| ()));
                outcome
            })*
        }
    };
}

/// A snapshot or volume of a comparison, as `VOLUME@SNAPSHOT`, `@UID` or `VOLUME`.
fn side(side: Option<&v1::DiffSide>) -> Value {
    side.map_or(Value::Null, |side| match (side.snapshot_uid.as_str(), side.snapshot_name.as_str()) {
        ("", "") => side.volume_name.as_str().into(),
        ("", name) => format!("{}@{name}", side.volume_name).into(),
        (uid, _) => format!("@{uid}").into(),
    })
}

audited! { calls {
    get_server_info(GetServerInfoRequest) -> GetServerInfoResponse, "GetServerInfo": ;
    create_volume(CreateVolumeRequest) -> Volume, "CreateVolume": name, capacity_bytes, adopt_path, request_id;
    get_volume(GetVolumeRequest) -> Volume, "GetVolume": name;
    list_volumes(ListVolumesRequest) -> ListVolumesResponse, "ListVolumes": ;
    update_volume(UpdateVolumeRequest) -> Volume, "UpdateVolume": name, is_protected, is_read_only, request_id;
    rename_volume(RenameVolumeRequest) -> Volume, "RenameVolume": name, new_name, request_id;
    set_volume_limits(SetVolumeLimitsRequest) -> Volume, "SetVolumeLimits": name, request_id;
    set_volume_content(SetVolumeContentRequest) -> Volume, "SetVolumeContent": name, attachment_id;
    delete_volume(DeleteVolumeRequest) -> DeleteVolumeResponse, "DeleteVolume": name, keep_snapshots, request_id;
    resize_volume(ResizeVolumeRequest) -> Volume, "ResizeVolume": name, capacity_bytes, request_id;
    attach_volume(AttachVolumeRequest) -> AttachVolumeResponse, "AttachVolume": volume_name, node_id, force, only_if_granted;
    detach_volume(DetachVolumeRequest) -> DetachVolumeResponse, "DetachVolume": volume_name, node_id, attachment_id;
    list_attachments(ListAttachmentsRequest) -> ListAttachmentsResponse, "ListAttachments": volume_name, node_id;
    create_grant(CreateGrantRequest) -> Grant, "CreateGrant": volume_name, node_id, read_only, request_id;
    delete_grant(DeleteGrantRequest) -> DeleteGrantResponse, "DeleteGrant": volume_name, node_id, request_id;
    list_grants(ListGrantsRequest) -> ListGrantsResponse, "ListGrants": volume_name, node_id;
    register_node(RegisterNodeRequest) -> RegisteredNode, "RegisterNode": node_id, boot_id, version;
    get_node(GetNodeRequest) -> RegisteredNode, "GetNode": node_id;
    list_nodes(ListNodesRequest) -> ListNodesResponse, "ListNodes": ;
    delete_node(DeleteNodeRequest) -> DeleteNodeResponse, "DeleteNode": node_id, request_id;
    mark_snapshots_frozen(MarkSnapshotsFrozenRequest) -> MarkSnapshotsFrozenResponse, "MarkSnapshotsFrozen": freeze_id;
    create_snapshot(CreateSnapshotRequest) -> CreateSnapshotResponse, "CreateSnapshot": volume_names, name, freeze, request_id;
    get_snapshot(GetSnapshotRequest) -> Snapshot, "GetSnapshot": volume_name, name, snapshot_uid;
    list_snapshots(ListSnapshotsRequest) -> ListSnapshotsResponse, "ListSnapshots": volume_name, group_uid, name;
    delete_snapshot(DeleteSnapshotRequest) -> DeleteSnapshotResponse, "DeleteSnapshot": volume_name, name, snapshot_uid, request_id;
    restore_volume(RestoreVolumeRequest) -> RestoreVolumeResponse, "RestoreVolume": volume_name, snapshot_name, request_id;
    clone_volume(CloneVolumeRequest) -> CloneVolumeResponse, "CloneVolume":
        name, source_volume_name, source_snapshot_name, source_snapshot_uid, capacity_bytes, request_id;
    get_operation(GetOperationRequest) -> Operation, "GetOperation": operation_id;
    list_operations(ListOperationsRequest) -> ListOperationsResponse, "ListOperations": ;
    cancel_operation(CancelOperationRequest) -> Operation, "CancelOperation": operation_id;
    set_tenant(SetTenantRequest) -> Tenant, "SetTenant": name;
    get_tenant(GetTenantRequest) -> Tenant, "GetTenant": name;
    list_tenants(ListTenantsRequest) -> ListTenantsResponse, "ListTenants": ;
    delete_tenant(DeleteTenantRequest) -> DeleteTenantResponse, "DeleteTenant": name;
} refusals {
    heartbeat(HeartbeatRequest) -> HeartbeatResponse, "Heartbeat": node_id, boot_id;
} streams {
    diff_snapshots(DiffSnapshotsRequest) -> DiffSnapshotsStream, "DiffSnapshots":
        |about| [("base", side(about.base.as_ref())), ("target", side(about.target.as_ref()))];
    watch(WatchRequest) -> WatchStream, "Watch":
        |about| [("kinds", kinds_told(about).into()), ("volume_name", about.volume_name.as_str().into())];
} }
