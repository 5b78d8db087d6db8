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

mod error;
mod links;
mod made;

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ublk_core::abi::UBLK_F_USER_COPY;
use ublk_core::{ControlDevice, ControlError, Device};

pub use self::error::AttachmentError;
use self::links::{Event, Links, ways_of};
use self::made::{Made, send_zc_bytes_min};
use super::affinity;
use super::connect::data_socket::DataSocket;
use super::control_socket::{self, PendingRequest};
use super::ladder::Chosen;
use super::mount_namespace;
use super::protections;
use super::queue::parts::{QueueCommander, QueueEvent, QueueParts};
use super::queue::run;
use super::reconnect::Condition;
use super::status_file::StatusFile;
use crate::causes::with_sources;
use crate::contract::{
    self, AttachmentDir, ControlCommand, ControlResponse, DeviceSpec, DeviceState, Encryption, SessionRecord,
    StallPolicy,
};
use crate::safe_stop::{self, Outcome};

/// How long the queue threads may take to be ready for START_DEV.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the queues may take to flush and end after the device stopped; above the bounds of `queue/run.rs`.
const QUEUES_END_TIMEOUT: Duration = Duration::from_secs(60);

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

/// Leaves the file systems that may lie on the device's own disk; what is read later stays in sight.
fn enter_mount_namespace(dir: &AttachmentDir, spec: &DeviceSpec) -> Result<(), AttachmentError> {
    let link_dir = spec.device_link.parent().unwrap_or(&spec.device_link);
    let tls_paths = spec.tls.as_ref().map(|tls| tls.files.paths()).unwrap_or_default();
    let name_paths = mount_namespace::paths_of_names();
    let program_paths = mount_namespace::paths_of_program();
    let socket_paths = mount_namespace::paths_of_sockets(&spec.addresses);
    let read_later = tls_paths.iter().chain(&name_paths).chain(&program_paths).chain(&socket_paths);
    let needed: Vec<&Path> =
        [dir.path(), link_dir].into_iter().chain(read_later.map(PathBuf::as_path)).collect();
    mount_namespace::enter(&needed).map_err(AttachmentError::MountNamespace)
}

impl Attachment {
    fn start(
        dir: &AttachmentDir,
        spec: &DeviceSpec,
        status: &mut StatusFile,
    ) -> Result<Self, AttachmentError> {
        protections::protect_process()?;
        enter_mount_namespace(dir, spec)?;
        daemon_log::start_writer().map_err(AttachmentError::Log)?;
        let (sender, events) = mpsc::channel();
        listen_for_signals(&sender)?;
        let control = ControlDevice::open()?;
        let made = match &spec.recover {
            None => Made::anew(&control, spec)?,
            Some(recover) => Made::again(&control, spec, recover)?,
        };
        status.update(|status| made.describe(spec, status))?;
        if made.session.encryption == Encryption::Kernel {
            made.chosen.transfer.over_ktls().prove().map_err(AttachmentError::Ktls)?;
        }
        let links = Links::new(spec, &made, sender.clone());
        let Made { device, chosen, session, sockets, .. } = made;
        let is_recovered = spec.recover.is_some();
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
                        tracing::warn!(queue_id, %error, "cannot pin the queue's thread to the queue's processors");
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
                tracing::info!(?addresses, "dialling the server at its new addresses");
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
            None => tracing::warn!(?refusal, "asked to stop, but the device is in use and stays"),
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
