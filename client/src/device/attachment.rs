//! The life of one attachment's device process, on its main thread.
//!
//! ```text
//!   spec ─► protect ─► choose data path ─► connect ─► ADD_DEV ─► connect the other slots ─► queue threads ─► START_DEV ─► live
//!   live ─ Stop ─► TRY_STOP_DEV ─► queues flush and end ─► DEL_DEV ─► answer ─► exit
//!          │            └─ open: Busy, live as before
//!          └ connection lost ─► failed: I/O gets EIO until Stop
//! ```
//!
//! Called by `volclient device`. The data path is in `queue_loop.rs`; nothing here touches a request. If this process
//! dies, the kernel ends its device with errors, and `volclient serve` clears up what is left.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ublk_core::abi::UBLK_F_USER_COPY;
use ublk_core::{
    ControlDevice, ControlError, DataPath, Device, DeviceError, DeviceParams, DeviceSpec as UblkSpec,
    TransferError,
};

use super::affinity;
use super::block_request::{self, GeometryError};
use super::control_socket::{self, PendingRequest};
use super::data_socket::DataSocket;
use super::ladder::{Chosen, Ladder, LadderError};
use super::mount_namespace;
use super::protections::{self, ProtectionError};
use super::queue_loop::{self, QueueError, QueueEvent, QueueParts};
use super::slots::{self, Layout, SlotError};
use super::status_file::StatusFile;
use crate::contract::{
    self, AttachmentDir, ContractError, ControlCommand, ControlResponse, DeviceSpec, DeviceState,
};
use crate::node::error::with_sources;
use crate::node::holders::holders;

/// How long the queue threads may take to be ready for START_DEV.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Device managers open a device for a moment now and then: busy for less than this is not busy.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
const BUSY_RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// How long the queues may take to flush and end after the device stopped; above `queue_loop`'s own bounds.
const QUEUES_END_TIMEOUT: Duration = Duration::from_secs(60);

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
    /// Threads or sockets of our own.
    #[error("cannot set up the device process: {0}")]
    Setup(io::Error),
}

/// What the main thread is woken by.
enum Event {
    Queue(QueueEvent),
    Control(PendingRequest),
    Terminate,
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
    device_link: std::path::PathBuf,
    queues: Vec<JoinHandle<()>>,
    queues_live: usize,
    /// The worst that a queue ended with.
    queue_error: Option<QueueError>,
    events: Receiver<Event>,
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
        let needed: Vec<&Path> =
            [dir.path(), link_dir].into_iter().chain(tls_paths.iter().map(PathBuf::as_path)).collect();
        mount_namespace::enter(&needed).map_err(AttachmentError::MountNamespace)?;
        let (sender, events) = mpsc::channel();
        listen_for_signals(&sender)?;
        let control = ControlDevice::open()?;
        let ladder = Ladder::new(&ublk_core::probe_driver(&control)?, &spec.data_path)?;
        let first = slots::dial_slot(spec, 0)?;
        let params = block_request::device_params(&first.export, spec.block_size_bytes, spec.read_only)?;
        let layout = Layout::choose(spec, first.export.flags, affinity::nr_cpus())?;

        let add = |data_path| add_device(&control, spec, &params, data_path, layout.nr_hw_queues);
        let (device, chosen) = ladder.add_device(add)?;
        let nr_hw_queues = device.info().nr_hw_queues;
        let nr_connections = layout.nr_connections(nr_hw_queues);
        status.update(|status| {
            status.dev_id = Some(device.dev_id());
            status.capacity_bytes = params.capacity_bytes;
            status.block_size_bytes = params.logical_block_bytes;
            status.read_only = params.read_only;
            status.data_path = chosen.data_path.to_string();
            status.data_path_reason.clone_from(&chosen.reason);
            status.server_address.clone_from(&first.address);
            status.encryption = first.socket.encryption().as_str().to_owned();
            status.nr_hw_queues = nr_hw_queues;
            status.nr_connections = nr_connections;
            status.queue_depth = device.info().queue_depth;
        })?;
        if first.socket.is_ktls() {
            chosen.transfer.over_ktls().prove().map_err(AttachmentError::Ktls)?;
        }
        let sockets = slots::dial_others(spec, first, nr_connections, nr_hw_queues)?;
        let mut attachment = Self {
            device,
            device_link: spec.device_link.clone(),
            queues: Vec::new(),
            queues_live: 0,
            queue_error: None,
            events,
        };
        attachment.start_queues(&control, sockets, &params, &chosen, &sender)?;
        attachment.device.start()?;
        attachment.make_link()?;
        let on_request = move |request| drop(sender.send(Event::Control(request)));
        control_socket::listen(&dir.control_socket(), on_request).map_err(AttachmentError::Setup)?;
        status.enter(DeviceState::Live, "");
        tracing::info!(target = spec.target, dev_id = attachment.device.dev_id(), data_path = %chosen.data_path, "live");
        Ok(attachment)
    }

    fn start_queues(
        &mut self,
        control: &ControlDevice,
        sockets: Vec<Vec<DataSocket>>,
        params: &DeviceParams,
        chosen: &Chosen,
        sender: &Sender<Event>,
    ) -> Result<(), AttachmentError> {
        let is_pinned = sockets.len() > 1;
        for (queue_id, sockets) in (0..).zip(sockets) {
            // A single queue has the requests of every processor.
            let cpus =
                if is_pinned { control.get_queue_affinity(self.device.dev_id(), queue_id)? } else { vec![] };
            let parts = QueueParts {
                queue: self.device.queue(queue_id)?,
                data_path: chosen.data_path,
                transfer: chosen.transfer,
                has_user_copy: self.device.info().flags.contains(UBLK_F_USER_COPY),
                max_io_bytes: params.max_io_bytes,
                volatile_cache: params.volatile_cache && !params.read_only,
                sockets,
            };
            let sender = sender.clone();
            // The main thread ends only with the process, so nobody is left to miss an event.
            let on_event = move |event| drop(sender.send(Event::Queue(event)));
            let thread = std::thread::Builder::new()
                .name(format!("ublk-q{queue_id}"))
                .spawn(move || {
                    if let Err(error) = affinity::pin_this_thread(&cpus) {
                        tracing::warn!(queue_id, %error, "the queue's thread is not kept on the queue's processors");
                    }
                    queue_loop::run(parts, &on_event);
                })
                .map_err(AttachmentError::Setup)?;
            self.queues.push(thread);
            self.queues_live += 1;
        }
        self.wait_until_ready()
    }

    /// START_DEV waits until every tag is fetched, so a queue that cannot start has to be noticed before.
    fn wait_until_ready(&mut self) -> Result<(), AttachmentError> {
        let deadline = Instant::now() + READY_TIMEOUT;
        let mut ready = 0;
        while ready < self.queues.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Queue(QueueEvent::Ready)) => ready += 1,
                Ok(Event::Queue(QueueEvent::Ended { outcome: Err(error), .. })) => {
                    return Err(AttachmentError::Queue(with_sources(&error)));
                }
                Ok(_) => {}
                Err(_) => return Err(AttachmentError::Queue("it was not ready in time".into())),
            }
        }
        Ok(())
    }

    fn serve(mut self, status: &mut StatusFile) -> Result<(), AttachmentError> {
        loop {
            // Every sender lives as long as the process, so this ends by an event.
            let Ok(event) = self.events.recv() else { return Ok(()) };
            match event {
                Event::Queue(event) => self.queue_event(event, status),
                Event::Control(request) if request.command == ControlCommand::Status => {
                    request.answer(&ControlResponse::Ok(Box::new(status.status().clone())));
                }
                Event::Control(request) => match self.try_stop(status) {
                    Ok(()) => return self.end(status, Some(request)),
                    Err(refusal) => request.answer(&refusal),
                },
                Event::Terminate => match self.try_stop(status) {
                    Ok(()) => return self.end(status, None),
                    Err(refusal) => tracing::warn!(?refusal, "told to terminate, but the device is in use"),
                },
            }
            if self.queues_live == 0 {
                // Every queue ended though nobody stopped the device: the driver took it away, or broke.
                return self.end(status, None);
            }
        }
    }

    fn queue_event(&mut self, event: QueueEvent, status: &mut StatusFile) {
        match event {
            QueueEvent::Ready => {}
            QueueEvent::ConnectionFailed { queue_id, connection, reason } => {
                let slot = connection * status.status().nr_hw_queues + queue_id;
                let address = &status.status().server_address;
                let reason =
                    format!("connection {slot} to {address} is lost ({reason}): I/O gets EIO until detach");
                if status.status().state == DeviceState::Live {
                    status.enter(DeviceState::Failed, &reason);
                }
            }
            QueueEvent::Ended { queue_id, outcome } => {
                self.queues_live -= 1;
                if let Err(error) = outcome {
                    tracing::error!(queue_id, error = with_sources(&error), "a queue ended badly");
                    self.queue_error = Some(error);
                }
            }
        }
    }

    /// Takes the disk away unless somebody has it open.
    fn try_stop(&mut self, status: &mut StatusFile) -> Result<(), ControlResponse> {
        let before = (status.status().state, status.status().state_reason.clone());
        status.enter(DeviceState::Stopping, "");
        let deadline = Instant::now() + BUSY_PATIENCE;
        let stopped = loop {
            match self.try_stop_once() {
                Err(ControlError::Busy { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(BUSY_RETRY_INTERVAL);
                }
                other => break other,
            }
        };
        let Err(error) = stopped else { return Ok(()) };
        status.enter(before.0, &before.1);
        match error {
            ControlError::Busy { .. } => {
                Err(ControlResponse::Busy { holders: holders(self.device.dev_id()) })
            }
            error => Err(ControlResponse::Error { message: with_sources(&error) }),
        }
    }

    fn try_stop_once(&mut self) -> Result<(), ControlError> {
        match self.device.try_stop() {
            Err(ControlError::Unsupported { .. }) => {}
            other => return other,
        }
        // Before TRY_STOP_DEV (Linux 6.18) nothing stops the device only if it is closed: look first. What is opened
        // between the look and the stop gets an I/O error, never a wrong byte.
        let dev_id = self.device.dev_id();
        if !holders(dev_id).is_empty() {
            return Err(ControlError::Busy { command: "STOP_DEV", dev_id });
        }
        self.device.stop()
    }

    /// The device is stopped: wait for the queues to flush and end, delete it, answer.
    fn end(
        mut self,
        status: &mut StatusFile,
        request: Option<PendingRequest>,
    ) -> Result<(), AttachmentError> {
        let deadline = Instant::now() + QUEUES_END_TIMEOUT;
        while self.queues_live > 0 {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Queue(event)) => self.queue_event(event, status),
                Ok(Event::Control(other)) => {
                    other.answer(&ControlResponse::Error { message: "the device is being detached".into() });
                }
                Ok(Event::Terminate) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        let outcome = match self.queue_error.take() {
            Some(error) => Err(AttachmentError::Ended(with_sources(&error))),
            None if self.queues_live > 0 => Err(AttachmentError::Ended(
                "a queue did not end in time: what was not flushed may be lost".into(),
            )),
            None => Ok(()),
        };
        if self.queues_live == 0 {
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
        if let Some(folder) = link.parent() {
            std::fs::create_dir_all(folder).map_err(link_error)?;
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
        .map_err(AttachmentError::Setup)
}

fn add_device(
    control: &ControlDevice,
    spec: &DeviceSpec,
    params: &DeviceParams,
    data_path: DataPath,
    nr_hw_queues: u16,
) -> Result<Device, DeviceError> {
    let ublk_spec = UblkSpec {
        dev_id: None,
        nr_hw_queues,
        queue_depth: spec.queue_depth,
        max_io_buf_bytes: params.max_io_bytes,
        flags: data_path.device_flags(),
        wished_flags: data_path.wished_device_flags(),
        ublksrv_flags: contract::attachment_hash(spec.attachment_id),
    };
    Device::add(control, &ublk_spec, params)
}
