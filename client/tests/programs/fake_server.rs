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
}

impl State {
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

fn refuse(code: Code, word: &str, message: String, next: &str) -> Status {
    let metadata = HashMap::from([(reason::METADATA_NEXT.to_owned(), next.to_owned())]);
    Status::with_error_details(code, message, ErrorDetails::with_error_info(word, reason::DOMAIN, metadata))
}

fn not_found(name: &str) -> Status {
    refuse(Code::NotFound, reason::VOLUME_NOT_FOUND, format!("there is no volume {name}"), "list the volumes")
}

#[tonic::async_trait]
impl Management for Service {
    async fn get_server_info(
        &self,
        _: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        let state = self.0.lock().unwrap();
        let (server_id, data_addresses) = (state.server_id.to_string(), state.data_addresses.clone());
        Ok(Response::new(v1::GetServerInfoResponse { server_id, version: "0.1.0".into(), data_addresses }))
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
        Ok(Response::new(volume))
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let after = request.into_inner().page_token;
        let state = self.0.lock().unwrap();
        let mut rest = state.volumes.values().filter(|volume| volume.name > after).cloned();
        let volumes: Vec<v1::Volume> = rest.by_ref().take(PAGE_VOLUMES).collect();
        let last_name = volumes.last().map(|volume| volume.name.clone()).unwrap_or_default();
        let next_page_token = if rest.next().is_some() { last_name } else { String::new() };
        Ok(Response::new(v1::ListVolumesResponse { volumes, next_page_token }))
    }

    async fn resize_volume(
        &self,
        _: Request<v1::ResizeVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        Err(Status::unimplemented("no test of the client alone resizes"))
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        let name = request.into_inner().name;
        let mut state = self.0.lock().unwrap();
        if let Some(attachment) = state.attachments.values().find(|one| one.volume_name == name) {
            let message = format!("volume {name} is attached to node {}", attachment.node_id);
            return Err(refuse(
                Code::FailedPrecondition,
                reason::VOLUME_ATTACHED,
                message,
                "detach it there",
            ));
        }
        Ok(Response::new(v1::DeleteVolumeResponse { existed: state.volumes.remove(&name).is_some() }))
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
}
