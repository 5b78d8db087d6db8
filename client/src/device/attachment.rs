//! The life of one attachment's device process, on its main thread.
//!
//! ```text
//!   spec ─► protect ─► choose data path ─► connect ─► ADD_DEV ─► connect the other slots ─► queue threads ─► START_DEV ─► live
//!   live ─ Stop ─► another process stops it ─► queues flush and end ─► DEL_DEV ─► answer ─► exit
//!    │ ▲      │         └─ in use: Busy, live as before
//!    │ │      └─ ForceStop: STOP_DEV, whoever has it open; what is in flight fails
//!    │ └────── connected again
//!    └ connection lost ─► stalled: I/O waits (`reconnect.rs`) ─► failed, where the server forgot: EIO until Stop
//! ```
//!
//! Called by `volclient device`. The data path is in `run.rs`; nothing here touches a request. If this process
//! dies, the kernel keeps its device and the requests in flight, and `volclient serve` starts another process that takes both
//! on: it begins with connections that are lost already, so that all that follows is as after any loss.

use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use daemon_log::THREAD_LIMITS;
use ublk_core::abi::{
    UBLK_F_UPDATE_SIZE, UBLK_F_USER_COPY, UBLK_F_USER_RECOVERY, UBLK_F_USER_RECOVERY_REISSUE,
};
use ublk_core::{
    ControlDevice, ControlError, DataPath, Device, DeviceError, DeviceParams, DeviceSpec as UblkSpec,
    Transfer, TransferError,
};

use super::affinity;
use super::connect::data_socket::DataSocket;
use super::connect::dial::OPEN_TIMEOUT;
use super::connect::redial::Attempt;
use super::connect::redial_thread::Redialler;
use super::connect::slots::{self, Layout, SlotError};
use super::control_socket::{self, PendingRequest};
use super::geometry::{self, GeometryError};
use super::ladder::{Chosen, Ladder, LadderError};
use super::liveness::Probes;
use super::mount_namespace;
use super::protections::{self, ProtectionError};
use super::queue::link::LinkEvent;
use super::queue::parts::{QueueCommand, QueueCommander, QueueError, QueueEvent, QueueParts};
use super::queue::requests::Resend;
use super::queue::run;
use super::queue::unflushed::Unflushed;
use super::reconnect::{Condition, Output, Reconnect};
use super::status_file::StatusFile;
use crate::causes::with_sources;
use crate::contract::{
    self, AttachmentDir, ContractError, ControlCommand, ControlResponse, DeviceSpec, DeviceState, Encryption,
    ExportSpec, RecoverSpec, SendZc, SessionRecord, StallPolicy,
};
use crate::safe_stop::{self, Outcome};

/// How long the queue threads may take to be ready for START_DEV.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the queues may take to flush and end after the device stopped; above the bounds of `queue/run.rs`.
const QUEUES_END_TIMEOUT: Duration = Duration::from_secs(60);
/// A server that is lost while the device is being made may come back for so long; then there is no device.
const START_STALL_MS: u64 = 10_000;
/// A server of ours that owes replies and sends nothing for so long is taken for lost: its requests are sent again.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);
/// A foreign one has longer: what it owes cannot be sent again, and fails. Both have ten minutes while they answer probes.
const REPLY_TIMEOUT_FOREIGN: Duration = Duration::from_secs(120);

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum AttachmentError {
    /// The spec, status or control socket.
    #[error(transparent)]
    Contract(#[from] ContractError),
    /// The spec holds something this program cannot use.
    #[error("the device spec has an invalid {0}")]
    Spec(&'static str),
    /// The process cannot be protected from its own device.
    #[error(transparent)]
    Protection(#[from] ProtectionError),
    /// The process cannot be kept apart from what is mounted on its device.
    #[error("cannot enter a mount namespace (needs root or CAP_SYS_ADMIN): {0}")]
    MountNamespace(io::Error),
    /// No thread for the log.
    #[error("cannot start a thread for the log: {0}")]
    Log(io::Error),
    /// The export cannot be opened, or not as often as was asked for.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The export cannot be a disk.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The driver.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The device cannot be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No data path can be used, or not the one that was asked for.
    #[error(transparent)]
    Ladder(#[from] LadderError),
    /// What the data path needs on a socket that the kernel encrypts does not work.
    #[error("the data path cannot be used with TLS by the kernel: {0}")]
    Ktls(TransferError),
    /// A queue thread did not get ready.
    #[error("a queue could not start: {0}")]
    Queue(String),
    /// The device is gone, but a queue did not end well.
    #[error("the device is gone, but {0}")]
    Ended(String),
    /// The stable name cannot be made.
    #[error("cannot make {path}: {source}")]
    Link {
        /// The stable name.
        path: std::path::PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A thread of our own.
    #[error("cannot start a thread: {0}; {THREAD_LIMITS}")]
    Thread(io::Error),
    /// Sockets of our own.
    #[error("cannot set up the device process: {0}")]
    Setup(io::Error),
}

/// What the main thread is woken by.
enum Event {
    Queue(QueueEvent),
    /// Of this queue's connections.
    Attempt(u16, Attempt<DataSocket>),
    /// A probe was answered, or was not.
    Probed(bool),
    /// START_DEV has returned.
    Started,
    Control(PendingRequest),
    Terminate,
    /// What came of taking the disk away unless it is used.
    StopTried(Outcome),
}

/// Another process tries to take the disk away.
struct Stopping {
    /// Who asked; nobody where the process was told to terminate.
    request: Option<PendingRequest>,
}

/// What follows an event.
enum Next {
    Serve,
    /// The device is stopped, for whoever is to be answered.
    End(Option<PendingRequest>),
}

/// Serves one attachment until it is stopped. On an error its reason is in the status file, too.
///
/// # Errors
/// [`AttachmentError`]: there is no device, or it ended without its data being safe.
pub fn run(dir: &AttachmentDir) -> Result<(), AttachmentError> {
    let spec: DeviceSpec = contract::read_file(&dir.spec())?;
    let mut status = StatusFile::create(dir, &spec)?;
    match Attachment::start(dir, &spec, &mut status) {
        Ok(attachment) => attachment.serve(&mut status),
        Err(error) => {
            status.enter(DeviceState::Failed, &with_sources(&error));
            Err(error)
        }
    }
}

/// A device that serves I/O.
struct Attachment {
    device: Device,
    device_link: PathBuf,
    queues: Vec<JoinHandle<()>>,
    links: Links,
    events: Receiver<Event>,
    stopping: Option<Stopping>,
    /// The disk was taken away from whoever had it open, so that nobody expects a good end.
    is_forced: bool,
    /// The driver has refused to make the disk larger.
    cannot_grow: bool,
}

/// A device, not started, and what it is made for.
struct Made {
    device: Device,
    chosen: Chosen,
    session: SessionRecord,
    nr_connections: u16,
    /// By queue.
    sockets: Vec<Vec<DataSocket>>,
    /// Of the server.
    address: String,
}

impl Made {
    /// A new device for an export that is there.
    fn anew(control: &ControlDevice, spec: &DeviceSpec) -> Result<Self, AttachmentError> {
        let ladder = Ladder::new(&ublk_core::probe_driver(control)?, &spec.data_path)?;
        let first = slots::dial_slot(spec, 0, None, OPEN_TIMEOUT)?;
        let params = geometry::device_params(&first.export, spec.block_size_bytes, spec.read_only)?;
        let layout = Layout::choose(spec, first.export.flags, affinity::nr_cpus())?;
        let session = SessionRecord {
            incarnation: slots::incarnation(spec, &first),
            encryption: first.socket.encryption(),
            export_bytes: first.export.size_bytes,
            export_flags: first.export.flags.0,
            export_block_bytes: slots::block_bytes(&first.export),
            capacity_bytes: params.capacity_bytes,
            block_size_bytes: params.logical_block_bytes,
            max_io_bytes: params.max_io_bytes,
            volatile_cache: params.volatile_cache,
            read_only: params.read_only,
        };
        if session.tail_bytes() > 0 {
            tracing::warn!(
                target = spec.target,
                tail_bytes = session.tail_bytes(),
                block_size_bytes = session.block_size_bytes,
                "the end of the export is no whole block, and is not on the disk"
            );
        }
        let address = first.address.clone();
        // Before there is a device: every queue needs a connection.
        let mut sockets = slots::dial_others(spec, first, layout.wanted_connections())?;
        let opened = sockets.len() as u16;
        let wanted_queues = layout.nr_hw_queues.min(opened);
        let add = |data_path| add_device(control, spec, &params, data_path, wanted_queues);
        let (device, chosen) = ladder.add_device(add)?;
        let nr_hw_queues = device.info().nr_hw_queues;
        let nr_connections = layout.nr_connections(nr_hw_queues, opened);
        sockets.truncate(usize::from(nr_connections));
        let sockets = slots::deal(sockets, nr_hw_queues);
        Ok(Self { device, chosen, session, nr_connections, sockets, address })
    }

    /// The device of a process that died. Its connections are made as after any loss: the server need not be there.
    fn again(
        control: &ControlDevice,
        spec: &DeviceSpec,
        recover: &RecoverSpec,
    ) -> Result<Self, AttachmentError> {
        let report = ublk_core::probe_driver(control)?;
        let no_new_device = |_| Ok(());
        let ((), mut chosen) = Ladder::new(&report, &recover.data_path)?.add_device(no_new_device)?;
        chosen.reason = "the device was made for it".to_owned();
        let device = Device::recover(control, recover.dev_id)?;
        if device.info().ublksrv_flags != contract::attachment_hash(spec.attachment_id) {
            return Err(AttachmentError::Spec("recover.dev_id: the device is another attachment's"));
        }
        let nr_hw_queues = device.info().nr_hw_queues;
        let nr_connections = spec.nr_connections.max(nr_hw_queues);
        let mut sockets: Vec<Vec<DataSocket>> = (0..nr_hw_queues).map(|_| Vec::new()).collect();
        for slot in 0..nr_connections {
            let socket = DataSocket::disconnected().map_err(AttachmentError::Setup)?;
            sockets[usize::from(slot % nr_hw_queues)].push(socket);
        }
        let address = spec.addresses.first().cloned().unwrap_or_default();
        Ok(Self { device, chosen, session: recover.session.clone(), nr_connections, sockets, address })
    }
}

/// The queues' threads and connections, as the main thread knows them.
struct Links {
    redialler: Arc<Redialler>,
    reconnect: Reconnect<Vec<DataSocket>>,
    commanders: Vec<QueueCommander>,
    unflushed: Arc<Unflushed>,
    /// A server that restarts has forgotten everything.
    is_volatile: bool,
    /// The largest that the server has told the export to be.
    export_bytes: u64,
    queues_live: usize,
    /// The worst that a queue ended with.
    queue_error: Option<QueueError>,
    sender: Sender<Event>,
}

impl Attachment {
    fn start(
        dir: &AttachmentDir,
        spec: &DeviceSpec,
        status: &mut StatusFile,
    ) -> Result<Self, AttachmentError> {
        protections::protect_process()?;
        let link_dir = spec.device_link.parent().unwrap_or(&spec.device_link);
        // Read at each dial, so they have to stay in sight.
        let tls_paths = spec.tls.as_ref().map(|tls| tls.files.paths()).unwrap_or_default();
        let name_paths = mount_namespace::paths_of_names();
        let program_paths = mount_namespace::paths_of_program();
        let socket_paths = mount_namespace::paths_of_sockets(&spec.addresses);
        let read_later = tls_paths
            .iter()
            .chain(&name_paths)
            .chain(&program_paths)
            .chain(&socket_paths)
            .map(PathBuf::as_path);
        let needed: Vec<&Path> = [dir.path(), link_dir].into_iter().chain(read_later).collect();
        mount_namespace::enter(&needed).map_err(AttachmentError::MountNamespace)?;
        daemon_log::start_writer().map_err(AttachmentError::Log)?;
        let (sender, events) = mpsc::channel();
        listen_for_signals(&sender)?;
        let control = ControlDevice::open()?;
        let made = match &spec.recover {
            None => Made::anew(&control, spec)?,
            Some(recover) => Made::again(&control, spec, recover)?,
        };
        let Made { device, chosen, session, nr_connections, sockets, address } = made;
        let nr_hw_queues = device.info().nr_hw_queues;
        status.update(|status| {
            status.dev_id = Some(device.dev_id());
            status.capacity_bytes = session.capacity_bytes;
            status.block_size_bytes = session.block_size_bytes;
            status.read_only = session.read_only;
            status.data_path = chosen.data_path.to_string();
            status.data_path_reason.clone_from(&chosen.reason);
            status.server_address = address;
            status.encryption = session.encryption.as_str().to_owned();
            status.send_zc = match send_zc_bytes_min(spec, &chosen, session.encryption) {
                Some(_) => SendZc::Untried,
                None if spec.send_zc_mode().bytes_min().is_some() => SendZc::Unsupported,
                None => SendZc::Off,
            };
            status.nr_hw_queues = nr_hw_queues;
            status.nr_connections = nr_connections;
            status.queue_depth = device.info().queue_depth;
            status.session = Some(session.clone());
        })?;
        if session.encryption == Encryption::Kernel {
            chosen.transfer.over_ktls().prove().map_err(AttachmentError::Ktls)?;
        }
        let unflushed = Arc::new(Unflushed::new(nr_hw_queues));
        let is_recovered = spec.recover.is_some();
        if is_recovered && session.has_volatile_cache() {
            // Nobody knows what the process before had been told: until the first FLUSH there may be something.
            unflushed.acknowledged(0);
        }
        // A device that is taken on has users, who wait as they were told to.
        let starting = if is_recovered { spec.on_stall } else { StallPolicy::FailAfterMs(START_STALL_MS) };
        let (_, reply_timeout) = ways_of(&spec.export);
        let probes = Probes::new(reply_timeout, Redialler::can_probe(spec, nr_connections));
        let links = Links {
            redialler: Redialler::new(
                spec,
                &session,
                nr_hw_queues,
                nr_connections,
                status.status().server_address.clone(),
            ),
            reconnect: Reconnect::new(nr_hw_queues, session.incarnation.clone(), starting, probes),
            commanders: Vec::new(),
            unflushed,
            is_volatile: spec.is_volatile,
            export_bytes: session.export_bytes,
            queues_live: 0,
            queue_error: None,
            sender: sender.clone(),
        };
        let mut attachment = Self {
            device,
            device_link: spec.device_link.clone(),
            queues: Vec::new(),
            links,
            events,
            stopping: None,
            is_forced: false,
            cannot_grow: false,
        };
        attachment.start_queues(&control, sockets, spec, &session, &chosen, status)?;
        attachment.start_device(status)?;
        match attachment.links.reconnect.condition() {
            Condition::Failing(reason) | Condition::Lost(reason) if !is_recovered => {
                return Err(AttachmentError::Queue(reason));
            }
            _ => {}
        }
        if spec.on_stall_is_told {
            attachment.links.reconnect.told_policy(spec.on_stall, Instant::now());
        } else {
            attachment.links.reconnect.set_policy(spec.on_stall);
        }
        attachment.make_link()?;
        let on_request = move |request| drop(sender.send(Event::Control(request)));
        control_socket::listen(&dir.control_socket(), on_request).map_err(AttachmentError::Setup)?;
        status.enter(DeviceState::Live, "");
        attachment.links.tell_condition(status);
        tracing::info!(target = spec.target, dev_id = attachment.device.dev_id(), data_path = %chosen.data_path, "live");
        Ok(attachment)
    }

    fn start_queues(
        &mut self,
        control: &ControlDevice,
        sockets: Vec<Vec<DataSocket>>,
        spec: &DeviceSpec,
        session: &SessionRecord,
        chosen: &Chosen,
        status: &mut StatusFile,
    ) -> Result<(), AttachmentError> {
        let is_pinned = sockets.len() > 1;
        let (resend, reply_timeout) = ways_of(&spec.export);
        for (queue_id, sockets) in (0..).zip(sockets) {
            // A single queue has the requests of every processor.
            let cpus =
                if is_pinned { control.get_queue_affinity(self.device.dev_id(), queue_id)? } else { vec![] };
            let (commander, commands) = QueueCommander::new().map_err(AttachmentError::Setup)?;
            let parts = QueueParts {
                queue: self.device.queue(queue_id)?,
                data_path: chosen.data_path,
                transfer: chosen.transfer,
                has_user_copy: self.device.info().flags.contains(UBLK_F_USER_COPY),
                max_io_bytes: session.max_io_bytes,
                volatile_cache: session.has_volatile_cache(),
                sockets,
                resend,
                reply_timeout,
                busy_poll: Duration::from_micros(spec.busy_poll_us.into()),
                send_zc_bytes_min: send_zc_bytes_min(spec, chosen, session.encryption),
                key_bytes_max: spec.tls.as_ref().map_or(u64::MAX, |tls| tls.key_bytes_max),
                unflushed: Arc::clone(&self.links.unflushed),
                commands,
            };
            let sender = self.links.sender.clone();
            // The main thread ends only with the process, so nobody is left to miss an event.
            let on_event = move |event| drop(sender.send(Event::Queue(event)));
            let thread = std::thread::Builder::new()
                .name(format!("ublk-q{queue_id}"))
                .spawn(move || {
                    if let Err(error) = affinity::pin_this_thread(&cpus) {
                        tracing::warn!(queue_id, %error, "the queue's thread is not kept on the queue's processors");
                    }
                    run::run(parts, &on_event);
                })
                .map_err(AttachmentError::Thread)?;
            self.queues.push(thread);
            self.links.commanders.push(commander);
            self.links.queues_live += 1;
        }
        self.wait_until_ready(status)
    }

    /// START_DEV reads the partition table through the queues, so what happens to their connections is to be heard
    /// meanwhile.
    fn start_device(&mut self, status: &mut StatusFile) -> Result<(), AttachmentError> {
        let Self { device, links, events, .. } = self;
        std::thread::scope(|scope| {
            let sender = links.sender.clone();
            let start = move || {
                let outcome = device.start();
                let _ = sender.send(Event::Started);
                outcome
            };
            let thread = std::thread::Builder::new().name("start-device".into());
            let starting = thread.spawn_scoped(scope, start).map_err(AttachmentError::Thread)?;
            while let Some(event) = links.next_event(events, status) {
                match event {
                    Event::Started => break,
                    event => drop(links.take_event(event, status)),
                }
            }
            let outcome = starting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.map_err(AttachmentError::from)
        })
    }

    /// START_DEV waits until every tag is fetched, so a queue that cannot start has to be noticed before.
    fn wait_until_ready(&mut self, status: &mut StatusFile) -> Result<(), AttachmentError> {
        let deadline = Instant::now() + READY_TIMEOUT;
        let mut ready = 0;
        while ready < self.queues.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Queue(QueueEvent::Ready)) => ready += 1,
                Ok(Event::Queue(QueueEvent::Ended { outcome: Err(error), .. })) => {
                    return Err(AttachmentError::Queue(with_sources(&error)));
                }
                Ok(event) => drop(self.links.take_event(event, status)),
                Err(_) => return Err(AttachmentError::Queue("it was not ready in time".into())),
            }
        }
        Ok(())
    }

    fn serve(mut self, status: &mut StatusFile) -> Result<(), AttachmentError> {
        loop {
            // Every sender lives as long as the process, so this ends by an event.
            let Some(event) = self.links.next_event(&self.events, status) else { return Ok(()) };
            let left = self.links.take_event(event, status);
            self.grow(status);
            let next = match left {
                None | Some(Event::Queue(_) | Event::Attempt(..) | Event::Probed(_) | Event::Started) => {
                    Next::Serve
                }
                Some(Event::Control(request)) => self.take_request(request, status),
                Some(Event::Terminate) => {
                    self.begin_stop(None, status);
                    Next::Serve
                }
                Some(Event::StopTried(outcome)) => self.stop_tried(outcome, status),
            };
            if let Next::End(request) = next {
                return self.end(status, request);
            }
            if self.links.queues_live == 0 {
                // Every queue ended: the device was stopped a moment ago, or the driver took it away, or broke.
                let request = self.stopping.take().and_then(|stopping| stopping.request);
                return self.end(status, request);
            }
        }
    }

    fn take_request(&mut self, request: PendingRequest, status: &mut StatusFile) -> Next {
        match request.command {
            ControlCommand::Status => {
                request.answer(&ControlResponse::Ok(Box::new(status.status().clone())));
            }
            ControlCommand::SetStallPolicy(policy) => request.answer(&self.set_policy(policy, status)),
            ControlCommand::SetAddresses(ref addresses) => {
                tracing::info!(?addresses, "the server is dialled at other addresses");
                self.links.redialler.set_addresses(addresses.clone());
                request.answer(&ControlResponse::Ok(Box::new(status.status().clone())));
            }
            ControlCommand::Stop => self.begin_stop(Some(request), status),
            ControlCommand::ForceStop => match self.force_stop(status) {
                Ok(()) => return Next::End(Some(request)),
                Err(error) => request.answer(&ControlResponse::Error { message: with_sources(&error) }),
            },
        }
        Next::Serve
    }

    /// Tells the kernel of a volume that has grown, once all connections know it too: what lies behind the old end must
    /// not be asked of one that does not.
    fn grow(&mut self, status: &mut StatusFile) {
        let Some(session) = &status.status().session else { return };
        let export_bytes = self.links.export_bytes;
        let capacity_bytes = export_bytes - export_bytes % u64::from(session.block_size_bytes);
        let is_live = self.links.reconnect.condition() == Condition::Live;
        if !is_live || capacity_bytes <= session.capacity_bytes || self.cannot_grow {
            return;
        }
        if let Err(error) = self.device.update_size(capacity_bytes) {
            self.cannot_grow = true;
            tracing::warn!(
                error = with_sources(&error),
                "the volume has grown; the disk does when it is attached again"
            );
            return;
        }
        self.links.redialler.grown(export_bytes);
        tracing::info!(capacity_bytes, "the disk has grown");
        status.note(|status| {
            status.capacity_bytes = capacity_bytes;
            if let Some(session) = &mut status.session {
                (session.export_bytes, session.capacity_bytes) = (export_bytes, capacity_bytes);
            }
        });
    }

    fn set_policy(&mut self, policy: StallPolicy, status: &mut StatusFile) -> ControlResponse {
        self.links.reconnect.told_policy(policy, Instant::now());
        self.links.tick();
        self.links.tell_condition(status);
        match status.update(|status| (status.on_stall, status.on_stall_is_told) = (policy, true)) {
            Ok(()) => ControlResponse::Ok(Box::new(status.status().clone())),
            Err(error) => ControlResponse::Error { message: with_sources(&error) },
        }
    }

    /// Takes the disk away from whoever has it open; the queues answer EIO, so nothing is waited for.
    fn force_stop(&mut self, status: &mut StatusFile) -> Result<(), ControlError> {
        status.enter(DeviceState::Stopping, "");
        self.is_forced = true;
        self.links.lose("the disk was taken away by force");
        self.device.stop()
    }

    /// Has another process take the disk away unless somebody uses it. This one goes on serving: what keeps the disk busy
    /// may need it.
    fn begin_stop(&mut self, request: Option<PendingRequest>, status: &mut StatusFile) {
        if self.stopping.is_some() {
            if let Some(request) = request {
                request.answer(&ControlResponse::Error { message: "the device is being detached".into() });
            }
            return;
        }
        // Its state stays: if its server has moved, or this process dies, it is looked after until it is gone.
        status.note(|status| status.is_stopping = true);
        self.stopping = Some(Stopping { request });
        let sender = self.links.sender.clone();
        let on_outcome = move |outcome| drop(sender.send(Event::StopTried(outcome)));
        if let Err(error) = safe_stop::begin(self.device.dev_id(), on_outcome) {
            let message = format!("cannot start a process that stops the device: {error}");
            self.stop_tried(Outcome::Failed { message }, status);
        }
    }

    fn stop_tried(&mut self, outcome: Outcome, status: &mut StatusFile) -> Next {
        let Some(Stopping { request }) = self.stopping.take() else {
            return Next::Serve;
        };
        let refusal = match outcome {
            Outcome::Stopped => return Next::End(request),
            Outcome::InUse { holders } => ControlResponse::Busy { holders },
            Outcome::Failed { message } => ControlResponse::Error { message },
        };
        status.note(|status| status.is_stopping = false);
        match request {
            Some(request) => request.answer(&refusal),
            None => tracing::warn!(?refusal, "told to terminate, but the device stays"),
        }
        Next::Serve
    }

    /// The device is stopped: wait for the queues to flush and end, delete it, answer.
    fn end(
        mut self,
        status: &mut StatusFile,
        request: Option<PendingRequest>,
    ) -> Result<(), AttachmentError> {
        // Whoever finds this folder later is not to take on a device that was stopped on purpose.
        status.enter(DeviceState::Stopping, "");
        let deadline = Instant::now() + QUEUES_END_TIMEOUT;
        while self.links.queues_live > 0 {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Control(other)) => {
                    other.answer(&ControlResponse::Error { message: "the device is being detached".into() });
                }
                Ok(event) => drop(self.links.take_event(event, status)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        let outcome = match self.links.queue_error.take() {
            Some(error) if self.is_forced => {
                tracing::warn!(error = with_sources(&error), "taken away by force");
                Ok(())
            }
            Some(error) => Err(AttachmentError::Ended(with_sources(&error))),
            None if self.links.queues_live > 0 => Err(AttachmentError::Ended(
                "a queue did not end in time: what was not flushed may be lost".into(),
            )),
            None => Ok(()),
        };
        if self.links.queues_live == 0 {
            for queue in self.queues.drain(..) {
                // A thread that panicked has aborted the process.
                let _ = queue.join();
            }
        }
        remove_link(&self.device_link, status);
        let deleted = self.device.delete().map_err(AttachmentError::from);
        let outcome = outcome.and(deleted);
        if let Some(request) = request {
            let response = match &outcome {
                Ok(()) => ControlResponse::Ok(Box::new(status.status().clone())),
                Err(error) => ControlResponse::Error { message: with_sources(error) },
            };
            request.answer(&response);
        }
        outcome
    }

    fn make_link(&self) -> Result<(), AttachmentError> {
        let link = &self.device_link;
        let link_error = |source| AttachmentError::Link { path: link.clone(), source };
        if let Some(folder) = link.parent().filter(|folder| !folder.is_dir()) {
            std::fs::create_dir_all(folder).map_err(link_error)?;
            // Whatever the umask is: everybody may know the names, as of every disk.
            let open = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(folder, open).map_err(link_error)?;
        }
        // Made beside and renamed over, so that a leftover of an earlier device is replaced at once.
        let new_link = link.with_file_name(format!(".{}.new", self.device.dev_id()));
        let _ = std::fs::remove_file(&new_link);
        let target = ublk_core::control::block_device_path(self.device.dev_id());
        symlink(target, &new_link).map_err(link_error)?;
        std::fs::rename(&new_link, link).map_err(link_error)
    }
}

impl Links {
    /// The next event; what is due at a certain time is done meanwhile. `None`: there can be none any more.
    fn next_event(&mut self, events: &Receiver<Event>, status: &mut StatusFile) -> Option<Event> {
        loop {
            let now = Instant::now();
            let Some(wakes_at) = self.reconnect.wakes_at(now) else { return events.recv().ok() };
            match events.recv_timeout(wakes_at.saturating_duration_since(now)) {
                Ok(event) => return Some(event),
                Err(RecvTimeoutError::Timeout) => {
                    self.tick();
                    self.tell_condition(status);
                }
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    fn tick(&mut self) {
        let mut outputs = Vec::new();
        self.reconnect.tick(Instant::now(), &mut outputs);
        self.carry_out(outputs);
    }

    /// Takes what concerns the queues; the others are given back.
    fn take_event(&mut self, event: Event, status: &mut StatusFile) -> Option<Event> {
        let mut outputs = Vec::new();
        match event {
            Event::Queue(QueueEvent::Ready) => {}
            Event::Queue(QueueEvent::SentByReference { was_copied }) => {
                note_send_zc(if was_copied { SendZc::Copied } else { SendZc::Used }, status);
            }
            Event::Queue(QueueEvent::Link { queue_id, event: LinkEvent::Silent(silence) }) => {
                self.reconnect.silent(queue_id, silence, Instant::now(), &mut outputs);
            }
            Event::Probed(is_answered) => self.reconnect.probed(is_answered, Instant::now()),
            Event::Queue(QueueEvent::Link { queue_id, event: LinkEvent::Disconnected(lost) }) => {
                let slot = lost.connection * status.status().nr_hw_queues + queue_id;
                let (address, loss) = (&status.status().server_address, &lost.loss);
                let reason = format!("connection {slot} to {address} was lost ({loss})");
                let (is_volatile, unflushed) = (self.is_volatile, &self.unflushed);
                let has_unflushed = || is_volatile || unflushed.any();
                let now = Instant::now();
                self.reconnect.disconnected(queue_id, &lost, &reason, now, has_unflushed, &mut outputs);
            }
            Event::Queue(QueueEvent::Ended { queue_id, outcome }) => {
                self.queues_live -= 1;
                if let Err(error) = outcome {
                    tracing::error!(queue_id, error = with_sources(&error), "a queue ended badly");
                    self.queue_error = Some(error);
                }
            }
            Event::Attempt(queue_id, Attempt::Opened { sockets, incarnation, address, export_bytes }) => {
                self.export_bytes = self.export_bytes.max(export_bytes);
                let (is_volatile, unflushed) = (self.is_volatile, &self.unflushed);
                let has_unflushed = || is_volatile || unflushed.any();
                self.reconnect.dialled(queue_id, sockets, incarnation, has_unflushed, &mut outputs);
                self.note_address(address, status);
            }
            Event::Attempt(_, Attempt::Failed(error)) => self.reconnect.dial_failed(error),
            Event::Attempt(_, Attempt::Refused(reason)) => {
                self.reconnect.refused_for_good(reason, &mut outputs);
            }
            other => return Some(other),
        }
        self.carry_out(outputs);
        self.tick();
        self.note_incarnation(status);
        self.tell_condition(status);
        None
    }

    /// Keeps what a process that takes the disk on will compare with.
    fn note_incarnation(&self, status: &mut StatusFile) {
        let is = self.reconnect.incarnation();
        if status.status().session.as_ref().is_none_or(|session| session.incarnation == is) {
            return;
        }
        status.note(|status| {
            if let Some(session) = &mut status.session {
                is.clone_into(&mut session.incarnation);
            }
        });
    }

    fn note_address(&self, address: String, status: &mut StatusFile) {
        status.note(|status| {
            status.server_address = address;
            status.reconnects += 1;
        });
    }

    fn carry_out(&mut self, outputs: Vec<Output<Vec<DataSocket>>>) {
        for output in outputs {
            match output {
                Output::Dial(queue_id) => {
                    let sender = self.sender.clone();
                    let on_attempt = move |attempt| drop(sender.send(Event::Attempt(queue_id, attempt)));
                    if let Err(error) = self.redialler.start(queue_id, self.reconnect.refusals(), on_attempt)
                    {
                        tracing::error!(queue_id, %error, "the server cannot be dialled");
                        let why =
                            format!("cannot start a thread to dial the server: {error}; {THREAD_LIMITS}");
                        self.reconnect.dial_not_begun(queue_id, why, Instant::now());
                    }
                }
                Output::Connect(queue_id, sockets) => self.tell(queue_id, QueueCommand::Connect(sockets)),
                Output::Disconnect(queue_id, why) => self.tell(queue_id, QueueCommand::Disconnect(why)),
                Output::GiveUp(queue_id) => self.tell(queue_id, QueueCommand::GiveUp),
                Output::Probe => {
                    let sender = self.sender.clone();
                    let on_return = move |is_answered| drop(sender.send(Event::Probed(is_answered)));
                    if let Err(error) = self.redialler.probe(on_return) {
                        tracing::warn!(%error, "no thread can be made to ask whether the server lives");
                        self.reconnect.probed(false, Instant::now());
                    }
                }
            }
        }
    }

    fn tell(&self, queue_id: u16, command: QueueCommand) {
        self.commanders[usize::from(queue_id)].tell(command);
    }

    /// Every request fails from now on.
    fn lose(&mut self, reason: &str) {
        let mut outputs = Vec::new();
        self.reconnect.refused_for_good(reason.to_owned(), &mut outputs);
        self.carry_out(outputs);
    }

    /// Keeps the status at what the connections are, while the device is there to use.
    fn tell_condition(&self, status: &mut StatusFile) {
        let (state, reason) = match self.reconnect.condition() {
            Condition::Live => (DeviceState::Live, String::new()),
            Condition::Slow(reason) => (DeviceState::Live, reason),
            Condition::Stalled(reason) => (DeviceState::Stalled, format!("I/O waits: {reason}")),
            Condition::Failing(reason) => {
                (DeviceState::Stalled, format!("I/O fails until the server is back: {reason}"))
            }
            Condition::Lost(reason) => (DeviceState::Failed, reason),
        };
        let is = status.status();
        let is_usable = matches!(is.state, DeviceState::Live | DeviceState::Stalled | DeviceState::Failed);
        if is_usable && (is.state != state || is.state_reason != reason) {
            status.enter(state, &reason);
        }
    }
}

/// What becomes of requests on lost connections, and how long a server may owe replies without a sign of life.
fn ways_of(export: &ExportSpec) -> (Resend, Duration) {
    match export {
        ExportSpec::Attachment { .. } => (Resend::Everything, REPLY_TIMEOUT),
        ExportSpec::Nbd { .. } => (Resend::ReadsOnly, REPLY_TIMEOUT_FOREIGN),
    }
}

/// From how many bytes on a WRITE's pages leave by reference; `None`: none do. It takes a SEND that names registered buffers, and nothing on
/// the way that has to see the bytes.
fn send_zc_bytes_min(spec: &DeviceSpec, chosen: &Chosen, encryption: Encryption) -> Option<u32> {
    let can = chosen.transfer == Transfer::RecvSendFixed && encryption == Encryption::None;
    spec.send_zc_mode().bytes_min().filter(|_| can)
}

fn note_send_zc(send_zc: SendZc, status: &mut StatusFile) {
    if status.status().send_zc == send_zc {
        return;
    }
    match send_zc {
        SendZc::Copied => {
            tracing::info!("the kernel copies what is sent by reference: large writes go the usual way")
        }
        _ => tracing::info!(send_zc = send_zc.as_str(), "large writes leave from their own pages"),
    }
    status.note(|status| status.send_zc = send_zc);
}

/// Removes the stable name if it still points to this device.
fn remove_link(link: &Path, status: &StatusFile) {
    if std::fs::read_link(link).ok() == status.device_path() {
        let _ = std::fs::remove_file(link);
    }
}

fn listen_for_signals(sender: &Sender<Event>) -> Result<(), AttachmentError> {
    use signal_hook::consts::SIGTERM;
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM]).map_err(AttachmentError::Setup)?;
    let sender = sender.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                let _ = sender.send(Event::Terminate);
            }
        })
        .map(drop)
        .map_err(AttachmentError::Thread)
}

fn add_device(
    control: &ControlDevice,
    spec: &DeviceSpec,
    params: &DeviceParams,
    data_path: DataPath,
    nr_hw_queues: u16,
) -> Result<Device, DeviceError> {
    // Where the driver cannot, a device ends with its process.
    let recovery = UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE;
    let ublk_spec = UblkSpec {
        dev_id: None,
        nr_hw_queues,
        queue_depth: spec.queue_depth,
        max_io_buf_bytes: params.max_io_bytes,
        flags: data_path.device_flags(),
        wished_flags: data_path.wished_device_flags() | recovery | UBLK_F_UPDATE_SIZE,
        ublksrv_flags: contract::attachment_hash(spec.attachment_id),
    };
    Device::add(control, &ublk_spec, params)
}
