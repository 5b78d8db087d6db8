//! A storage server's management API in memory, so that a test decides what it answers and when it is there.
//!
//! Refuses as the API says (`proto/volnode/v1/management.proto`): code, reason, and what to do next.

use std::collections::{BTreeMap, HashMap};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use proto::error_reason as reason;
use proto::v1;
use proto::v1::management_server::{Management, ManagementServer};
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use uuid::Uuid;

use crate::fake_copies::Copies;
use crate::fake_grants::Grants;
use crate::fake_node::Trap;
use crate::fake_nodes::Nodes;
use crate::fake_tenants::Tenants;

/// Volumes that a page of the list holds: fewer than asked for, so that paging shows.
const PAGE_VOLUMES: usize = 2;
/// Volumes above this size do not fit.
const SPACE_BYTES: u64 = 1 << 40;

/// What the server knows.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) server_id: Uuid,
    /// Where it serves data, as it tells.
    pub(crate) data_addresses: Vec<String>,
    pub(crate) volumes: BTreeMap<String, v1::Volume>,
    /// By id.
    pub(crate) attachments: BTreeMap<String, v1::Attachment>,
    pub(crate) copies: Copies,
    pub(crate) nodes: Nodes,
    pub(crate) grants: Grants,
    pub(crate) tenants: Tenants,
    /// As it tells.
    pub(crate) snapshots_unsupported_reason: String,
    pub(crate) storage_space: Option<v1::StorageSpace>,
    /// Deletions of volumes.
    pub(crate) deletions: Deletions,
    /// Passed by calls about a volume's content.
    pub(crate) trap: Option<Arc<Mutex<Trap>>>,
}

/// What was asked for, and how many answers are still to be lost on their way.
#[derive(Debug, Default)]
pub(crate) struct Deletions {
    /// In order, repetitions among them.
    pub(crate) request_ids: Vec<String>,
    pub(crate) to_lose: usize,
}

impl Deletions {
    /// Notes a call; whether it is a repetition.
    fn note(&mut self, request_id: String) -> bool {
        let is_repeated = self.request_ids.contains(&request_id);
        self.request_ids.push(request_id);
        is_repeated
    }

    fn answer(&mut self, existed: bool) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        match self.to_lose.checked_sub(1) {
            None => Ok(Response::new(v1::DeleteVolumeResponse { existed })),
            Some(left) => {
                self.to_lose = left;
                Err(Status::unavailable("broken pipe"))
            }
        }
    }
}

impl State {
    /// By the rules of SetVolumeContent.
    fn set_content(&mut self, request: &v1::SetVolumeContentRequest) -> Result<v1::Volume, Status> {
        use v1::VolumeContent::{Initialising, NeverWritten, Unspecified, Written};
        let is_meant = |volume: &&mut v1::Volume| {
            volume.name == request.name || format!("uid:{}", volume.volume_uid) == request.name
        };
        let volume = self.volumes.values_mut().find(is_meant).ok_or_else(|| not_found(&request.name))?;
        if !self.attachments.contains_key(&request.attachment_id) {
            let message = "the volume has no such attachment".to_owned();
            return Err(refuse(Code::NotFound, reason::ATTACHMENT_NOT_FOUND, message, "attach it"));
        }
        let by = volume.initialising_attachment_id.clone();
        let is_others = volume.content() == Initialising && by != request.attachment_id;
        let is_over = !self.attachments.contains_key(&by);
        let is_allowed = match request.content() {
            Unspecified => return Ok(volume.clone()),
            Initialising => volume.content() != Written && (!is_others || is_over),
            Written => !is_others,
            NeverWritten => false,
        };
        if !is_allowed {
            let message = "the content cannot become that".to_owned();
            return Err(refuse(Code::FailedPrecondition, reason::CONTENT_REFUSED, message, "look at it"));
        }
        volume.content = request.content;
        let is_initialising = request.content() == Initialising;
        volume.initialising_attachment_id =
            if is_initialising { request.attachment_id.clone() } else { String::new() };
        Ok(volume.clone())
    }

    /// An attachment as if a node had made it.
    pub(crate) fn add_attachment(&mut self, volume_name: &str, node_id: &str, connections: u32) -> Uuid {
        let attachment_id = Uuid::new_v4();
        let attachment = v1::Attachment {
            attachment_id: attachment_id.to_string(),
            volume_name: volume_name.to_owned(),
            node_id: node_id.to_owned(),
            connections,
            ..Default::default()
        };
        self.attachments.insert(attachment_id.to_string(), attachment);
        attachment_id
    }
}

#[derive(Debug, Clone)]
struct Service(Arc<Mutex<State>>);

/// A server that runs until it is dropped.
#[derive(Debug)]
pub(crate) struct FakeServer {
    pub(crate) address: SocketAddr,
    pub(crate) state: Arc<Mutex<State>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeServer {
    /// On a free port, with nothing in it.
    pub(crate) fn start() -> Self {
        let data_addresses = vec!["127.0.0.1:9".to_owned()];
        let state = State { server_id: Uuid::new_v4(), data_addresses, ..State::default() };
        Self::start_at("127.0.0.1:0".parse().unwrap(), Arc::new(Mutex::new(state)))
    }

    /// At an address, with what is in `state`.
    pub(crate) fn start_at(address: SocketAddr, state: Arc<Mutex<State>>) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let service = Service(Arc::clone(&state));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
                let server = tonic::transport::Server::builder().add_service(ManagementServer::new(service));
                // Not graceful: connections break, as they do when a server dies.
                tokio::select! {
                    served = server.serve_with_incoming(incoming) => served.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Self { address, state, stop: Some(stop), thread: Some(thread) }
    }

    /// As `--server` takes it.
    pub(crate) fn uri(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send(()).ok();
        }
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

pub(crate) fn refuse(code: Code, word: &str, message: String, next: &str) -> Status {
    let metadata = HashMap::from([(reason::METADATA_NEXT.to_owned(), next.to_owned())]);
    Status::with_error_details(code, message, ErrorDetails::with_error_info(word, reason::DOMAIN, metadata))
}

fn not_found(name: &str) -> Status {
    refuse(Code::NotFound, reason::VOLUME_NOT_FOUND, format!("there is no volume {name}"), "list the volumes")
}

/// Only a volume that is as its caller has seen it is changed, and is another one then.
fn change(volume: &mut v1::Volume, etag: &str) -> Result<(), Status> {
    if !etag.is_empty() && volume.etag != etag {
        let message = format!("volume {} has been changed: its etag is {} now", volume.name, volume.etag);
        return Err(refuse(Code::Aborted, reason::VOLUME_CHANGED, message, "look at the volume again"));
    }
    volume.etag.push('x');
    Ok(())
}

fn snapshot_not_found() -> Status {
    let message = "there is no such snapshot".to_owned();
    refuse(Code::NotFound, reason::SNAPSHOT_NOT_FOUND, message, "list the snapshots")
}

/// Two parts of what changed; of a volume called `cut` the second is an error, and of one called `short` there is none.
fn diff(name: &str) -> Vec<Result<v1::DiffSnapshotsResponse, Status>> {
    let range = |offset_bytes, kind: v1::RangeKind| v1::ChangedRange {
        offset_bytes,
        length_bytes: 4096,
        kind: kind.into(),
    };
    let first = v1::DiffSnapshotsResponse {
        ranges: vec![range(0, v1::RangeKind::Data)],
        next_offset_bytes: 65536,
        total: None,
    };
    let total = v1::DiffTotal {
        base_capacity_bytes: 1 << 30,
        target_capacity_bytes: 1 << 30,
        data_bytes: 4096,
        zero_bytes: 4096,
        ranges: 2,
    };
    let last = v1::DiffSnapshotsResponse {
        ranges: vec![range(1 << 20, v1::RangeKind::Zero)],
        next_offset_bytes: 1 << 30,
        total: Some(total),
    };
    let (message, next) = ("cancelled".to_owned(), "repeat the call");
    let cancelled = refuse(Code::Aborted, reason::COPY_CANCELLED, message, next);
    match name {
        "short" => vec![Ok(first)],
        "cut" => vec![Ok(first), Err(cancelled)],
        _ => vec![Ok(first), Ok(last)],
    }
}

/// A volume that is there, and one of each kind that was asked for which comes; then the server is lost. A token is gone on behind.
fn watched(request: &v1::WatchRequest) -> Vec<Result<v1::WatchEvent, Status>> {
    use v1::watch_event::Object;
    let event = |token: &str, change: v1::WatchChange, object: Option<Object>| v1::WatchEvent {
        resume_token: token.to_owned(),
        time_ms: 1,
        change: change.into(),
        object,
    };
    let volume = |name: &str| {
        Some(Object::Volume(v1::WatchedVolume {
            name: name.to_owned(),
            capacity_bytes: 1 << 30,
            ..Default::default()
        }))
    };
    let node =
        v1::WatchedNode { node_id: "node-1".to_owned(), version: "2".to_owned(), ..Default::default() };
    let mut events = Vec::new();
    if request.resume_token.is_empty() {
        events.push(event("", v1::WatchChange::Present, volume("vol-1")));
        events.push(event("t1", v1::WatchChange::Synced, None));
    }
    let wants = |kind: v1::WatchedKind| request.kinds.is_empty() || request.kinds.contains(&kind.into());
    if wants(v1::WatchedKind::Volume) {
        events.push(event("t2", v1::WatchChange::Deleted, volume("vol-1")));
    }
    if wants(v1::WatchedKind::Node) {
        events.push(event("t3", v1::WatchChange::Created, Some(Object::Node(node))));
    }
    let stopping =
        refuse(Code::Unavailable, reason::SERVER_STOPPING, "stopping".to_owned(), "repeat the call");
    events.into_iter().map(Ok).chain([Err(stopping)]).collect()
}

#[tonic::async_trait]
impl Management for Service {
    async fn get_server_info(
        &self,
        _: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        let state = self.0.lock().unwrap();
        let (server_id, data_addresses) = (state.server_id.to_string(), state.data_addresses.clone());
        Ok(Response::new(v1::GetServerInfoResponse {
            server_id,
            version: "0.1.0".into(),
            data_addresses,
            snapshots_unsupported_reason: state.snapshots_unsupported_reason.clone(),
            storage_space: state.storage_space,
        }))
    }

    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let request = request.into_inner();
        if request.capacity_bytes > SPACE_BYTES {
            let message = "no space left on the server".to_owned();
            return Err(refuse(
                Code::ResourceExhausted,
                reason::NO_SPACE,
                message,
                "free space on the server",
            ));
        }
        let mut state = self.0.lock().unwrap();
        let volume = state.volumes.entry(request.name.clone()).or_insert_with(|| v1::Volume {
            name: request.name.clone(),
            volume_uid: Uuid::new_v4().to_string(),
            capacity_bytes: request.capacity_bytes,
            block_size_bytes: request.block_size_bytes,
            backend: request.backend,
            write_cache: request.write_cache,
            labels: request.labels.clone(),
            description: request.description.clone(),
            is_protected: request.is_protected,
            limits: request.limits,
            adopted_path: request.adopt_path.clone(),
            is_encrypted: request.is_encrypted,
            ..Default::default()
        });
        if volume.capacity_bytes != request.capacity_bytes {
            let message = format!("volume {} exists with another size", request.name);
            return Err(refuse(Code::AlreadyExists, reason::VOLUME_DIFFERS, message, "choose another name"));
        }
        Ok(Response::new(volume.clone()))
    }

    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let name = request.into_inner().name;
        let state = self.0.lock().unwrap();
        let mut volume = state.volumes.get(&name).cloned().ok_or_else(|| not_found(&name))?;
        let attachments = state.attachments.values().filter(|one| one.volume_name == name);
        volume.attachments = attachments.cloned().collect();
        let grants = state.grants.granted.values().filter(|grant| grant.volume_name == name);
        volume.grants = grants.cloned().collect();
        Ok(Response::new(volume))
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let v1::ListVolumesRequest { page_token: after, labels, .. } = request.into_inner();
        let state = self.0.lock().unwrap();
        let has_labels = |volume: &&v1::Volume| {
            let has = |(key, value): (&String, &String)| {
                volume.labels.get(key).is_some_and(|found| value.is_empty() || found == value)
            };
            labels.iter().all(has)
        };
        let mut rest =
            state.volumes.values().filter(|volume| volume.name > after).filter(has_labels).cloned();
        let volumes: Vec<v1::Volume> = rest.by_ref().take(PAGE_VOLUMES).collect();
        let last_name = volumes.last().map(|volume| volume.name.clone()).unwrap_or_default();
        let next_page_token = if rest.next().is_some() { last_name } else { String::new() };
        Ok(Response::new(v1::ListVolumesResponse { volumes, next_page_token }))
    }

    async fn resize_volume(
        &self,
        request: Request<v1::ResizeVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let v1::ResizeVolumeRequest { name, capacity_bytes, .. } = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let volume = state.volumes.get_mut(&name).ok_or_else(|| not_found(&name))?;
        volume.capacity_bytes = capacity_bytes;
        Ok(Response::new(volume.clone()))
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        let v1::DeleteVolumeRequest { name, keep_snapshots, request_id, .. } = request.into_inner();
        let mut state = self.0.lock().unwrap();
        if state.deletions.note(request_id) {
            return state.deletions.answer(true);
        }
        let has_snapshots = state.copies.snapshots.values().any(|one| one.volume_name == name);
        if has_snapshots && !keep_snapshots {
            let message = format!("volume {name} has snapshots: 1");
            let next = "delete its snapshots first, or keep them";
            return Err(refuse(Code::FailedPrecondition, reason::VOLUME_HAS_SNAPSHOTS, message, next));
        }
        for one in state.copies.snapshots.values_mut().filter(|one| one.volume_name == name) {
            one.volume_name.clear();
        }
        if let Some(attachment) = state.attachments.values().find(|one| one.volume_name == name) {
            let message = format!("volume {name} is attached to node {}", attachment.node_id);
            return Err(refuse(
                Code::FailedPrecondition,
                reason::VOLUME_ATTACHED,
                message,
                "detach it there",
            ));
        }
        let existed = state.volumes.remove(&name).is_some();
        state.deletions.answer(existed)
    }

    async fn attach_volume(
        &self,
        request: Request<v1::AttachVolumeRequest>,
    ) -> Result<Response<v1::AttachVolumeResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let volume = state
            .volumes
            .get(&request.volume_name)
            .cloned()
            .ok_or_else(|| not_found(&request.volume_name))?;
        if request.only_if_granted {
            state.grants.require(&request.volume_name, &request.node_id)?;
        }
        let attachment_id = state.add_attachment(&request.volume_name, &request.node_id, 0);
        let mut attachment = state.attachments[&attachment_id.to_string()].clone();
        attachment.volume_uid = volume.volume_uid;
        Ok(Response::new(v1::AttachVolumeResponse {
            attachment: Some(attachment),
            secret: "5".repeat(64),
            server_id: state.server_id.to_string(),
            data_addresses: vec!["127.0.0.1:9".to_owned()],
            capacity_bytes: volume.capacity_bytes,
            block_size_bytes: volume.block_size_bytes,
            backend: v1::Backend::File.into(),
            existed: false,
            is_encrypted: volume.is_encrypted,
        }))
    }

    async fn detach_volume(
        &self,
        request: Request<v1::DetachVolumeRequest>,
    ) -> Result<Response<v1::DetachVolumeResponse>, Status> {
        let attachment_id = request.into_inner().attachment_id;
        let existed = self.0.lock().unwrap().attachments.remove(&attachment_id).is_some();
        Ok(Response::new(v1::DetachVolumeResponse { existed }))
    }

    async fn list_attachments(
        &self,
        request: Request<v1::ListAttachmentsRequest>,
    ) -> Result<Response<v1::ListAttachmentsResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.lock().unwrap();
        let wanted =
            |one: &&v1::Attachment| one.volume_name == request.volume_name && one.node_id == request.node_id;
        let attachments = state.attachments.values().filter(wanted).cloned().collect();
        Ok(Response::new(v1::ListAttachmentsResponse { attachments, next_page_token: String::new() }))
    }

    async fn rename_volume(
        &self,
        request: Request<v1::RenameVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let is_meant = |volume: &&v1::Volume| {
            volume.name == request.name || format!("uid:{}", volume.volume_uid) == request.name
        };
        let meant = state.volumes.values().find(is_meant).ok_or_else(|| not_found(&request.name))?;
        let meant = meant.name.clone();
        if state.volumes.contains_key(&request.new_name) && meant != request.new_name {
            let message = format!("there is a volume {} already", request.new_name);
            return Err(refuse(
                Code::AlreadyExists,
                reason::VOLUME_NAME_TAKEN,
                message,
                "choose another name",
            ));
        }
        let mut volume = state.volumes.remove(&meant).ok_or_else(|| not_found(&meant))?;
        volume.name.clone_from(&request.new_name);
        state.volumes.insert(request.new_name, volume.clone());
        Ok(Response::new(volume))
    }

    async fn update_volume(
        &self,
        request: Request<v1::UpdateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let volume = state.volumes.get_mut(&request.name).ok_or_else(|| not_found(&request.name))?;
        change(volume, &request.etag)?;
        for (key, value) in request.labels {
            if value.is_empty() {
                volume.labels.remove(&key);
            } else {
                volume.labels.insert(key, value);
            }
        }
        volume.description = request.description.unwrap_or(volume.description.clone());
        volume.is_protected = request.is_protected.unwrap_or(volume.is_protected);
        volume.is_read_only = request.is_read_only.unwrap_or(volume.is_read_only);
        Ok(Response::new(volume.clone()))
    }

    async fn set_volume_limits(
        &self,
        request: Request<v1::SetVolumeLimitsRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let volume = state.volumes.get_mut(&request.name).ok_or_else(|| not_found(&request.name))?;
        change(volume, &request.etag)?;
        volume.limits = request.limits;
        Ok(Response::new(volume.clone()))
    }

    // What servers of the first version do not know.

    async fn set_volume_content(
        &self,
        request: Request<v1::SetVolumeContentRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let trap = self.0.lock().unwrap().trap.clone();
        let pass = || {
            if let Some(trap) = &trap {
                trap.lock().unwrap().pass();
            }
        };
        pass();
        let answer = self.0.lock().unwrap().set_content(request.get_ref());
        pass();
        answer.map(Response::new)
    }

    async fn create_snapshot(
        &self,
        request: Request<v1::CreateSnapshotRequest>,
    ) -> Result<Response<v1::CreateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        for name in &request.volume_names {
            state.volumes.get(name).ok_or_else(|| not_found(name))?;
        }
        Ok(Response::new(state.copies.create(request)))
    }

    async fn mark_snapshots_frozen(
        &self,
        _: Request<v1::MarkSnapshotsFrozenRequest>,
    ) -> Result<Response<v1::MarkSnapshotsFrozenResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_snapshot(
        &self,
        request: Request<v1::GetSnapshotRequest>,
    ) -> Result<Response<v1::Snapshot>, Status> {
        let request = request.into_inner();
        let state = self.0.lock().unwrap();
        let found = state.copies.find(&request.volume_name, &request.name, &request.snapshot_uid);
        found.map(Response::new).ok_or_else(snapshot_not_found)
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let v1::ListSnapshotsRequest { volume_name, page_token, name, .. } = request.into_inner();
        let state = self.0.lock().unwrap();
        let key = |one: &v1::Snapshot| format!("{}/{}", one.volume_name, one.name);
        let all = state.copies.snapshots.values();
        let mut rest = all
            .filter(|one| volume_name.is_empty() || one.volume_name == volume_name)
            .filter(|one| (name.is_empty() || one.name == name) && key(one) > page_token)
            .cloned();
        let snapshots: Vec<v1::Snapshot> = rest.by_ref().take(PAGE_VOLUMES).collect();
        let last = snapshots.last().map(key).unwrap_or_default();
        let next_page_token = if rest.next().is_some() { last } else { String::new() };
        Ok(Response::new(v1::ListSnapshotsResponse { snapshots, next_page_token }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        let request = request.into_inner();
        let copies = &mut self.0.lock().unwrap().copies;
        let found = copies.find(&request.volume_name, &request.name, &request.snapshot_uid);
        let existed =
            found.is_some_and(|one| copies.snapshots.remove(&(one.volume_name, one.name)).is_some());
        Ok(Response::new(v1::DeleteSnapshotResponse { existed }))
    }

    async fn restore_volume(
        &self,
        request: Request<v1::RestoreVolumeRequest>,
    ) -> Result<Response<v1::RestoreVolumeResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let volume = state
            .volumes
            .get(&request.volume_name)
            .cloned()
            .ok_or_else(|| not_found(&request.volume_name))?;
        let found = state.copies.find(&request.volume_name, &request.snapshot_name, "-");
        found.ok_or_else(snapshot_not_found)?;
        let operation = Some(state.copies.begin("restore", vec![request.volume_name]));
        Ok(Response::new(v1::RestoreVolumeResponse { volume: Some(volume), operation }))
    }

    async fn clone_volume(
        &self,
        request: Request<v1::CloneVolumeRequest>,
    ) -> Result<Response<v1::CloneVolumeResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let (source, snapshot) = (request.source_volume_name, request.source_snapshot_name);
        let source = if snapshot.is_empty() && request.source_snapshot_uid.is_empty() {
            state.volumes.get(&source).ok_or_else(|| not_found(&source))?.volume_uid.clone()
        } else {
            let found = state.copies.find(&source, &snapshot, &request.source_snapshot_uid);
            found.ok_or_else(snapshot_not_found)?.snapshot_uid
        };
        let volume = v1::Volume {
            name: request.name,
            volume_uid: Uuid::new_v4().to_string(),
            capacity_bytes: request.capacity_bytes.max(1 << 30),
            source_uid: source,
            ..Default::default()
        };
        let operation = Some(state.copies.begin_clone(volume));
        Ok(Response::new(v1::CloneVolumeResponse { volume: None, operation }))
    }

    type DiffSnapshotsStream =
        tokio_stream::Iter<std::vec::IntoIter<Result<v1::DiffSnapshotsResponse, Status>>>;

    async fn diff_snapshots(
        &self,
        request: Request<v1::DiffSnapshotsRequest>,
    ) -> Result<Response<Self::DiffSnapshotsStream>, Status> {
        let request = request.into_inner();
        let state = self.0.lock().unwrap();
        let base = request.base.unwrap_or_default();
        let found = state.copies.find(&base.volume_name, &base.snapshot_name, &base.snapshot_uid);
        found.ok_or_else(snapshot_not_found)?;
        let name = request.target.unwrap_or_default().volume_name;
        state.volumes.get(&name).ok_or_else(|| not_found(&name))?;
        Ok(Response::new(tokio_stream::iter(diff(&name))))
    }

    type WatchStream = tokio_stream::Iter<std::vec::IntoIter<Result<v1::WatchEvent, Status>>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        if request.resume_token == "old" {
            let (message, next) = ("what is behind this token is not kept".to_owned(), "watch anew");
            return Err(refuse(Code::OutOfRange, reason::WATCH_TOKEN_TOO_OLD, message, next));
        }
        Ok(Response::new(tokio_stream::iter(watched(&request))))
    }

    async fn get_operation(
        &self,
        request: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let operation_id = request.into_inner().operation_id;
        let mut state = self.0.lock().unwrap();
        let looked_at = state.copies.look(&operation_id);
        let (operation, made) = looked_at.ok_or_else(|| {
            refuse(
                Code::NotFound,
                reason::OPERATION_NOT_FOUND,
                format!("no operation {operation_id}"),
                "list them",
            )
        })?;
        if let Some(volume) = made {
            state.volumes.insert(volume.name.clone(), volume);
        }
        Ok(Response::new(operation))
    }

    async fn list_operations(
        &self,
        _: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let operations = self.0.lock().unwrap().copies.operations.values().cloned().collect();
        Ok(Response::new(v1::ListOperationsResponse { operations }))
    }

    async fn create_grant(
        &self,
        request: Request<v1::CreateGrantRequest>,
    ) -> Result<Response<v1::Grant>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        if !state.volumes.contains_key(&request.volume_name) {
            return Err(not_found(&request.volume_name));
        }
        state.grants.create(request).map(Response::new)
    }

    async fn delete_grant(
        &self,
        request: Request<v1::DeleteGrantRequest>,
    ) -> Result<Response<v1::DeleteGrantResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let is_held =
            |one: &v1::Attachment| one.volume_name == request.volume_name && one.node_id == request.node_id;
        let attached = state.attachments.len();
        state.attachments.retain(|_, one| !is_held(one));
        let was_attached = state.attachments.len() < attached;
        let existed = state.grants.delete(request)?;
        Ok(Response::new(v1::DeleteGrantResponse { existed, was_attached }))
    }

    async fn list_grants(
        &self,
        request: Request<v1::ListGrantsRequest>,
    ) -> Result<Response<v1::ListGrantsResponse>, Status> {
        self.0.lock().unwrap().grants.page(request.get_ref()).map(Response::new)
    }

    async fn register_node(
        &self,
        request: Request<v1::RegisterNodeRequest>,
    ) -> Result<Response<v1::RegisteredNode>, Status> {
        self.0.lock().unwrap().nodes.register(request.into_inner()).map(Response::new)
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let mut state = self.0.lock().unwrap();
        let freezes = state.nodes.hear(request.into_inner())?;
        Ok(Response::new(v1::HeartbeatResponse { server_id: state.server_id.to_string(), freezes }))
    }

    async fn get_node(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::RegisteredNode>, Status> {
        self.0.lock().unwrap().nodes.get(&request.into_inner().node_id).map(Response::new)
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        self.0.lock().unwrap().nodes.page(&request.into_inner().page_token).map(Response::new)
    }

    async fn delete_node(
        &self,
        request: Request<v1::DeleteNodeRequest>,
    ) -> Result<Response<v1::DeleteNodeResponse>, Status> {
        let node_id = request.into_inner().node_id;
        let mut state = self.0.lock().unwrap();
        let is_attached = state.attachments.values().any(|one| one.node_id == node_id);
        let existed = state.nodes.delete(&node_id, is_attached)?;
        Ok(Response::new(v1::DeleteNodeResponse { existed }))
    }

    async fn cancel_operation(
        &self,
        request: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let operation_id = request.into_inner().operation_id;
        let cancelled = self.0.lock().unwrap().copies.cancel(&operation_id);
        cancelled.map(Response::new).ok_or_else(|| {
            let message = format!("no operation {operation_id}");
            refuse(Code::NotFound, reason::OPERATION_NOT_FOUND, message, "list the operations")
        })
    }
    async fn set_tenant(
        &self,
        request: Request<v1::SetTenantRequest>,
    ) -> Result<Response<v1::Tenant>, Status> {
        let state = &mut *self.0.lock().unwrap();
        Ok(Response::new(state.tenants.set(request.into_inner(), state.volumes.values())))
    }

    async fn get_tenant(
        &self,
        request: Request<v1::GetTenantRequest>,
    ) -> Result<Response<v1::Tenant>, Status> {
        let state = self.0.lock().unwrap();
        state.tenants.get(&request.into_inner().name, state.volumes.values()).map(Response::new)
    }

    async fn list_tenants(
        &self,
        request: Request<v1::ListTenantsRequest>,
    ) -> Result<Response<v1::ListTenantsResponse>, Status> {
        let state = self.0.lock().unwrap();
        Ok(Response::new(state.tenants.page(&request.into_inner().page_token, state.volumes.values())))
    }

    async fn delete_tenant(
        &self,
        request: Request<v1::DeleteTenantRequest>,
    ) -> Result<Response<v1::DeleteTenantResponse>, Status> {
        let state = &mut *self.0.lock().unwrap();
        state.tenants.delete(&request.into_inner().name, state.volumes.values()).map(Response::new)
    }
}
