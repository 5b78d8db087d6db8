//! A node daemon of the tests' own, whose disk is a loop device; and a trap that kills the plugin at a chosen moment of a chosen call.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use proto::error_reason as reason;
use proto::v1;
use proto::v1::node_server::{Node, NodeServer};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::oneshot;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use crate::fake_server::{State, refuse};

/// Of the calls that the plugin makes each has two moments: before it has its effect, and after.
#[derive(Debug, Default)]
pub(crate) struct Trap {
    pub(crate) moments: usize,
    /// At which moment, and whom.
    pub(crate) kill: Option<(usize, Pid)>,
}

impl Trap {
    /// One more moment.
    pub(crate) fn pass(&mut self) {
        self.moments += 1;
        if let Some((_, victim)) = self.kill.filter(|(at, _)| *at == self.moments) {
            kill_process(victim, Signal::KILL).unwrap();
        }
    }
}

/// A loop device over a file, detached at its end.
#[derive(Debug)]
pub(crate) struct Loop {
    pub(crate) path: PathBuf,
    image: PathBuf,
}

impl Loop {
    /// Over a new file of zeros; `None` where there are no loop devices.
    pub(crate) fn new(image: &Path, bytes: u64) -> Option<Self> {
        fs::File::create(image).unwrap().set_len(bytes).unwrap();
        let made = Command::new("losetup").args(["--find", "--show"]).arg(image).output().ok()?;
        let path = String::from_utf8(made.stdout).ok()?.trim().to_owned();
        (made.status.success() && !path.is_empty())
            .then(|| Self { path: path.into(), image: image.to_owned() })
    }

    pub(crate) fn grow(&self, bytes: u64) {
        fs::File::options().write(true).open(&self.image).unwrap().set_len(bytes).unwrap();
        assert!(Command::new("losetup").arg("--set-capacity").arg(&self.path).status().unwrap().success());
    }

    /// `7:3`, as mountinfo has it.
    pub(crate) fn number(&self) -> String {
        let device = fs::metadata(&self.path).unwrap().rdev();
        format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").arg("--detach").arg(&self.path).status().ok();
    }
}

/// What the daemon knows.
#[derive(Debug, Default)]
pub(crate) struct NodeState {
    pub(crate) device_path: PathBuf,
    pub(crate) device_number: String,
    pub(crate) capacity_bytes: u64,
    pub(crate) attachments: Vec<v1::NodeAttachment>,
    pub(crate) is_granted: bool,
    /// The last that was attached, as it was asked for.
    pub(crate) asked: Option<v1::AttachRequest>,
    /// Of detaches.
    pub(crate) forced: usize,
    /// Of policies that were set.
    pub(crate) policies: usize,
    /// The volume is encrypted, and opened by this one. The kernel has no clear disk of it.
    pub(crate) passphrase: Option<Vec<u8>>,
    /// The daemon is of a version that knows no encryption.
    pub(crate) knows_no_encryption: bool,
    /// Why the next attaches are refused, once the grant was looked at.
    pub(crate) attach_refused: Option<&'static str>,
}

#[derive(Debug, Clone)]
struct Service {
    state: Arc<Mutex<NodeState>>,
    /// Of the storage server behind it.
    server: Arc<Mutex<State>>,
    trap: Arc<Mutex<Trap>>,
}

impl Service {
    fn pass(&self) {
        self.trap.lock().unwrap().pass();
    }

    fn attach_now(&self, request: v1::AttachRequest) -> Result<v1::AttachResponse, Status> {
        let uid = request.target.strip_prefix("uid:").unwrap_or_default().to_owned();
        let mut server = self.server.lock().unwrap();
        let is_known = server.volumes.values().any(|volume| volume.volume_uid == uid);
        if !is_known {
            let message = format!("there is no volume {}", request.target);
            return Err(refuse(Code::NotFound, reason::VOLUME_NOT_FOUND, message, "list the volumes"));
        }
        let mut state = self.state.lock().unwrap();
        if !request.only_if_granted {
            return Err(Status::internal("an attach that did not ask for a grant"));
        }
        if !state.is_granted {
            let message = "the volume is not granted to this node".to_owned();
            return Err(refuse(Code::FailedPrecondition, reason::VOLUME_NOT_GRANTED, message, "grant it"));
        }
        state.asked = Some(request.clone());
        if let Some(why) = state.attach_refused {
            return Err(refuse(Code::Unavailable, why, "not now".to_owned(), "try later"));
        }
        let is_encrypted = state.passphrase.is_some() && !state.knows_no_encryption;
        if !state.knows_no_encryption {
            is_opened(state.passphrase.as_deref(), &request)?;
        }
        if let Some(found) = state.attachments.iter().find(|one| one.target == request.target) {
            if found.state() == v1::DeviceState::Failed {
                let message = "the disk answers EIO".to_owned();
                return Err(refuse(Code::FailedPrecondition, reason::DEVICE_FAILED, message, "detach it"));
            }
            return Ok(v1::AttachResponse { attachment: Some(found.clone()), existed: true });
        }
        let attachment_id = Uuid::new_v4().to_string();
        let clear_device_path =
            if is_encrypted { format!("/dev/mapper/volnode-{attachment_id}") } else { String::new() };
        let known = v1::Attachment { attachment_id: attachment_id.clone(), ..Default::default() };
        server.attachments.insert(attachment_id.clone(), known);
        let attachment = v1::NodeAttachment {
            attachment_id,
            target: request.target,
            device_path: state.device_path.display().to_string(),
            capacity_bytes: state.capacity_bytes,
            read_only: request.read_only,
            state: v1::DeviceState::Live.into(),
            on_stall: v1::StallAction::Wait.into(),
            only_if_granted: true,
            volume_uid: uid,
            is_encrypted,
            clear_device_path,
            ..Default::default()
        };
        state.attachments.push(attachment.clone());
        Ok(v1::AttachResponse { attachment: Some(attachment), existed: false })
    }

    fn detach_now(&self, request: &v1::DetachRequest) -> Result<v1::DetachResponse, Status> {
        let mut state = self.state.lock().unwrap();
        let is_meant =
            |one: &v1::NodeAttachment| one.attachment_id == request.target || one.target == request.target;
        let Some(at) = state.attachments.iter().position(is_meant) else {
            return Ok(v1::DetachResponse { existed: false });
        };
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        if !request.force && mounts.contains(&format!(" {} ", state.device_number)) {
            let message = "the disk is in use".to_owned();
            return Err(refuse(Code::FailedPrecondition, reason::DEVICE_OPEN, message, "unmount it"));
        }
        state.forced += usize::from(request.force);
        let gone = state.attachments.remove(at);
        self.server.lock().unwrap().attachments.remove(&gone.attachment_id);
        Ok(v1::DetachResponse { existed: true })
    }
}

/// What the true daemon says of passphrases.
fn is_opened(opens: Option<&[u8]>, request: &v1::AttachRequest) -> Result<(), Status> {
    let target = &request.target;
    let told = request.passphrase.as_ref().map(|passphrase| passphrase.value.as_slice());
    match (opens, told) {
        (None, Some(_)) => {
            let message = format!("passphrase: {target} is not encrypted; attach it without a passphrase");
            Err(refuse(Code::InvalidArgument, reason::INVALID_FIELD, message, ""))
        }
        (Some(_), None) => {
            let message = format!("{target}: the volume is encrypted, and no passphrase was given");
            let next = "give it: volctl attach --passphrase-file FILE";
            Err(refuse(Code::FailedPrecondition, reason::PASSPHRASE_MISSING, message, next))
        }
        (Some(opens), Some(told)) if opens != told => {
            let message = format!("the passphrase of {target} is wrong");
            Err(refuse(Code::FailedPrecondition, reason::PASSPHRASE_WRONG, message, "give another"))
        }
        _ => Ok(()),
    }
}

#[tonic::async_trait]
impl Node for Service {
    async fn get_node_info(
        &self,
        _: Request<v1::GetNodeInfoRequest>,
    ) -> Result<Response<v1::GetNodeInfoResponse>, Status> {
        Ok(Response::new(v1::GetNodeInfoResponse {
            node_id: "node-1".to_owned(),
            labels: [("topology.volnode.io/zone".to_owned(), "z1".to_owned())].into(),
            max_volumes: 64,
            ..Default::default()
        }))
    }

    async fn attach(
        &self,
        request: Request<v1::AttachRequest>,
    ) -> Result<Response<v1::AttachResponse>, Status> {
        self.pass();
        let answer = self.attach_now(request.into_inner());
        self.pass();
        answer.map(Response::new)
    }

    async fn detach(
        &self,
        request: Request<v1::DetachRequest>,
    ) -> Result<Response<v1::DetachResponse>, Status> {
        self.pass();
        let answer = self.detach_now(request.get_ref());
        self.pass();
        answer.map(Response::new)
    }

    async fn set_stall_policy(
        &self,
        request: Request<v1::SetStallPolicyRequest>,
    ) -> Result<Response<v1::SetStallPolicyResponse>, Status> {
        let mut state = self.state.lock().unwrap();
        state.policies += 1;
        let target = &request.get_ref().target;
        let meant = state.attachments.iter_mut().find(|one| one.attachment_id == *target);
        let Some(meant) = meant else { return Err(Status::not_found("not attached")) };
        meant.on_stall = request.get_ref().on_stall;
        meant.stall_fail_after_ms = request.get_ref().stall_fail_after_ms;
        Ok(Response::new(v1::SetStallPolicyResponse { attachment: Some(meant.clone()) }))
    }

    async fn upgrade(&self, _: Request<v1::UpgradeRequest>) -> Result<Response<v1::UpgradeResponse>, Status> {
        Err(Status::unimplemented("the plugin upgrades nothing"))
    }

    async fn change_passphrase(
        &self,
        _: Request<v1::ChangePassphraseRequest>,
    ) -> Result<Response<v1::ChangePassphraseResponse>, Status> {
        Err(Status::unimplemented("the plugin changes no passphrase"))
    }

    async fn freeze(&self, _: Request<v1::FreezeRequest>) -> Result<Response<v1::FreezeResponse>, Status> {
        Err(Status::unimplemented("the plugin freezes nothing"))
    }

    async fn thaw(&self, _: Request<v1::ThawRequest>) -> Result<Response<v1::ThawResponse>, Status> {
        Err(Status::unimplemented("the plugin freezes nothing"))
    }

    type WatchAttachmentsStream = ReceiverStream<Result<v1::AttachmentEvent, Status>>;

    async fn watch_attachments(
        &self,
        _: Request<v1::WatchAttachmentsRequest>,
    ) -> Result<Response<Self::WatchAttachmentsStream>, Status> {
        Err(Status::unimplemented("the plugin watches nothing"))
    }

    async fn list_node_attachments(
        &self,
        _: Request<v1::ListNodeAttachmentsRequest>,
    ) -> Result<Response<v1::ListNodeAttachmentsResponse>, Status> {
        self.pass();
        let attachments = self.state.lock().unwrap().attachments.clone();
        self.pass();
        Ok(Response::new(v1::ListNodeAttachmentsResponse { attachments }))
    }
}

/// A daemon that runs until it is dropped.
#[derive(Debug)]
pub(crate) struct FakeNode {
    state: Arc<Mutex<NodeState>>,
    pub(crate) trap: Arc<Mutex<Trap>>,
    pub(crate) socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeNode {
    /// In the mount namespace of the calling thread, over a storage server's state.
    pub(crate) fn start(dir: &Path, device: &Loop, bytes: u64, server: Arc<Mutex<State>>) -> Self {
        let socket = dir.join("volclient.sock");
        let state = NodeState {
            device_path: device.path.clone(),
            device_number: device.number(),
            capacity_bytes: bytes,
            is_granted: true,
            ..NodeState::default()
        };
        let (state, trap) = (Arc::new(Mutex::new(state)), Arc::new(Mutex::new(Trap::default())));
        server.lock().unwrap().trap = Some(Arc::clone(&trap));
        let service = Service { state: Arc::clone(&state), server, trap: Arc::clone(&trap) };
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                let server = tonic::transport::Server::builder().add_service(NodeServer::new(service));
                tokio::select! {
                    served = server.serve_with_incoming(UnixListenerStream::new(listener)) => served.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Self { state, trap, socket, stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, NodeState> {
        self.state.lock().unwrap()
    }

    /// How many detaches were by force, and how many disks there are.
    pub(crate) fn forced_and_left(&self) -> (usize, usize) {
        let state = self.state();
        (state.forced, state.attachments.len())
    }

    /// What the only disk is from now on.
    pub(crate) fn becomes(&self, state: v1::DeviceState) {
        let mut node = self.state();
        let attachment = &mut node.attachments[0];
        attachment.set_state(state);
        attachment.state_reason = match state {
            v1::DeviceState::Failed => "the server at 127.0.0.1:1 says: the attachment has ended".to_owned(),
            _ => String::new(),
        };
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send(()).ok();
        }
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
