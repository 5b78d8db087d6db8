//! The data side as a whole: starts and stops its threads, and is what the control side talks to.
//!
//! Owns: the acceptor thread, the gate thread, one ring thread for each core, and the copies that are being made. Never: handles a request or an open
//! itself.
//! Called by: `serve.rs` (start, shutdown) and `data_side.rs` (fencing, volumes). Every method blocks, for a bounded time;
//! none may be called with a lock of the catalog held, because the gate uses the catalog.

mod comparing;
mod storage;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, getrlimit};
use tracing::{info, warn};
use uuid::Uuid;

use crate::catalog::{Catalog, VolumeRecord};
use crate::data::acceptor::Acceptor;
use crate::data::address::{DataAddress, Listener};
use crate::data::admission::Admission;
use crate::data::config::DataServerConfig;
use crate::data::copies::Copies;
use crate::data::gate::{FenceError, Gate, GateMessage, VolumeBusy};
use crate::data::io::ring::restricted::LOCKED_BYTES;
use crate::data::io::run::IoLoop;
use crate::data::mailbox::{Mailbox, RingMessage};
use crate::data::socket_memory::{WIDTHS, WideSockets};
use crate::descriptors::{self, Descriptors, TooFewDescriptors, Wanted};
use crate::limits::{Limits, MANAGEMENT_CONNECTIONS_MAX, MemoryPlan, TooLittleMemory};
use crate::machine_memory::Allowed;
use crate::tls::ServerTls;
use crate::volume::Faults;
use crate::volume::controls::AllControls;
use crate::volume::copying::{CopyError, CopyHandle, CopyWanted};
use crate::volume::incarnation::{Incarnations, RuntimeDirError};
use crate::volume::snapshot::files::CopyFiles;

/// How long the control side waits for an answer of the gate beyond any deadline that the gate itself keeps: it answers
/// at once, but may be in an fsync of the catalog.
const GATE_ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long the threads have to end; the rings close what is left after five seconds, this leaves time for its I/O.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(20);

/// How long copies have to end of that: each looks after every piece.
const COPIES_END_LIMIT: Duration = Duration::from_secs(5);

/// Why the data side does not start.
#[derive(Debug, thiserror::Error)]
pub enum DataServerError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} (NBD): {source}; stop what uses it or choose another --listen")]
    Address {
        /// The address.
        address: DataAddress,
        /// The system's own error.
        source: io::Error,
    },
    /// io_uring is switched off or the kernel is too old.
    #[error(
        "cannot make an io_uring: {0}; it needs Linux 6.1 or later, kernel.io_uring_disabled = 0, and a container profile that allows it"
    )]
    Ring(io::Error),
    /// The user may lock less memory than the rings take.
    #[error(
        "cannot make the io_urings of {rings} threads: {source}; they take {needed_kib} KiB of locked memory, and this user may \
         lock {allowed_kib} KiB in all of its processes; raise that limit (LimitMEMLOCK= of the unit, ulimit -l, a container's \
         ulimits) or lower --threads"
    )]
    LockedMemory {
        /// The kernel's own error.
        source: io::Error,
        /// Ring threads.
        rings: usize,
        /// What all of them take.
        needed_kib: u64,
        /// The limit of this process.
        allowed_kib: u64,
    },
    /// The memory limit leaves too little for buffers.
    #[error(transparent)]
    Memory(#[from] TooLittleMemory),
    /// The same, and nobody has set it.
    #[error("{error}. It is half of what there is: {} MiB, by {}", .allowed.bytes >> 20, .allowed.by)]
    DefaultMemory {
        /// What is missing.
        error: TooLittleMemory,
        /// What there is.
        allowed: Allowed,
    },
    /// The limit of open files leaves too little for connections and volumes.
    #[error(transparent)]
    Descriptors(#[from] TooFewDescriptors),
    /// The runtime directory.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// This process may have no more threads.
    #[error("cannot start a thread: {0}; {hint}, or lower --threads", hint = daemon_log::THREAD_LIMITS)]
    Thread(io::Error),
    /// An eventfd or the boot id.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's own error.
        source: io::Error,
    },
}

impl DataServerError {
    /// True where an address is the cause.
    pub fn is_address(&self) -> bool {
        matches!(self, Self::Address { .. })
    }
}

/// A running data side.
#[derive(Debug)]
pub struct DataServer {
    local_addrs: Vec<DataAddress>,
    ipv6_only: Vec<DataAddress>,
    volumes_dir: PathBuf,
    incarnations: Incarnations,
    controls: Arc<AllControls>,
    gate: Sender<GateMessage>,
    rings: Vec<Arc<Mailbox>>,
    stop_accepting: Arc<OwnedFd>,
    management_connections_max: u32,
    memory_bytes_max: u64,
    copies: Copies,
    threads: Mutex<Threads>,
}

#[derive(Debug, Default)]
struct Threads {
    acceptor: Option<JoinHandle<()>>,
    rings: Vec<JoinHandle<()>>,
    gate: Option<JoinHandle<()>>,
}

impl DataServer {
    /// Listens and starts the threads.
    ///
    /// # Errors
    /// [`DataServerError`], by cause; nothing is left running.
    pub fn start(config: DataServerConfig, catalog: Catalog) -> Result<Arc<Self>, DataServerError> {
        if config.faults != Faults::default() {
            warn!(faults = ?config.faults, "THIS SERVER LIES about what is durable: it is for tests only");
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let ring_count = if config.threads == 0 { cores } else { config.threads };
        let wide_sockets = WideSockets::of_this_machine();
        let (limits, plan, descriptors) = divide(&config, ring_count, &wide_sockets)?;
        let listeners = listen(&config.listen)?;
        let local_addrs = listeners.iter().map(|listener| listener.address().clone()).collect();
        let ipv6_only = listeners.iter().filter(|listener| listener.is_ipv6_only());
        let ipv6_only = ipv6_only.map(|listener| listener.address().clone()).collect();
        let boot_id =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(system("read the boot id"))?;
        let process_id = Uuid::new_v4().simple().to_string();
        let incarnations = Incarnations::open(
            catalog.clone(),
            boot_id.trim().to_owned(),
            process_id,
            config.runtime_dir.as_deref(),
        )?;
        incarnations.look(&config.volumes_dir, &config.adoptable);
        let stop_accepting = Arc::new(
            eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from).map_err(system("make an eventfd"))?,
        );
        let (gate_sender, gate_receiver) = channel();
        let (rings, ring_threads) = start_rings(ring_count, &gate_sender, limits, plan, &config.tls)?;
        let volumes_dir = config.volumes_dir.clone();
        let controls = Arc::new(AllControls::default());
        let of_volumes = Descriptors::new(descriptors.of_volumes);
        let copies = Copies::new(
            CopyFiles::new(volumes_dir.clone()),
            gate_sender.clone(),
            rings.clone(),
            Arc::clone(&of_volumes),
            config.opener.is_some(),
        );
        let gate = Gate::new(
            catalog,
            config,
            incarnations.clone(),
            Arc::clone(&controls),
            rings.clone(),
            gate_sender.clone(),
            of_volumes,
        );
        let server = Arc::new(Self {
            local_addrs,
            ipv6_only,
            volumes_dir,
            incarnations,
            controls,
            gate: gate_sender,
            rings: rings.clone(),
            stop_accepting: Arc::clone(&stop_accepting),
            management_connections_max: descriptors.management_max,
            memory_bytes_max: plan.total_bytes,
            copies,
            threads: Mutex::new(Threads { acceptor: None, rings: ring_threads, gate: None }),
        });
        // From here on a failure shuts down what is running.
        let admission = Admission::new(&limits, &plan, wide_sockets);
        let acceptor = Acceptor { listeners, rings, admission };
        let started = server.start_gate_and_acceptor(gate, gate_receiver, acceptor);
        if let Err(error) = started {
            server.shutdown();
            return Err(error);
        }
        if let Err(error) = server.incarnations.look_for_failed_write_back(&server.volumes_dir) {
            warn!(%error, "the first client waits for the volumes' file system to be written back");
        }
        let memory_mib_max = plan.total_bytes >> 20;
        let wide_sockets_mib_max = plan.wide_sockets_bytes >> 20;
        info!(
            addresses = ?server.local_addrs,
            threads = ring_count,
            memory_mib_max,
            wide_sockets_mib_max,
            "data side ready"
        );
        Ok(server)
    }

    fn start_gate_and_acceptor(
        &self,
        gate: Gate,
        messages: Receiver<GateMessage>,
        acceptor: Acceptor,
    ) -> Result<(), DataServerError> {
        let gate = spawn("gate".into(), move || gate.run(&messages))?;
        self.threads().gate = Some(gate);
        let stop = Arc::clone(&self.stop_accepting);
        let acceptor = spawn("acceptor".into(), move || acceptor.run(&stop))?;
        self.threads().acceptor = Some(acceptor);
        Ok(())
    }

    /// Where clients can connect, in the order of the configuration.
    pub fn local_addrs(&self) -> &[DataAddress] {
        &self.local_addrs
    }

    /// Of those, wildcards of IPv6 at which another program has IPv4.
    pub fn ipv6_only(&self) -> &[DataAddress] {
        &self.ipv6_only
    }

    /// Connections of the management API that there are descriptors for.
    pub fn management_connections_max(&self) -> u32 {
        self.management_connections_max
    }

    /// What clients can make the data side hold, in bytes.
    pub fn memory_bytes_max(&self) -> u64 {
        self.memory_bytes_max
    }

    /// Closes every connection of the attachment and waits until their submitted I/O has finished. From the call on, no
    /// GO of it is answered unless the catalog has it active with a higher generation than it had at the call.
    ///
    /// # Errors
    /// [`FenceError`]; the call may be repeated.
    pub fn fence_attachment(&self, attachment_id: Uuid) -> Result<(), FenceError> {
        self.ask(|reply| GateMessage::FenceAttachment { attachment_id, reply })
            .unwrap_or(Err(FenceError::NoAnswer))
    }

    /// Closes every connection that opened the volume for writing by its plain name, and waits in the same way. Call it
    /// when the attachment is in the catalog: those who come after that may only read.
    ///
    /// # Errors
    /// As [`Self::fence_attachment`].
    pub fn fence_named_writers(&self, volume_uid: Uuid) -> Result<(), FenceError> {
        self.ask(|reply| GateMessage::FenceNamedWriters { volume_uid, reply })
            .unwrap_or(Err(FenceError::NoAnswer))
    }

    /// Closes the connections of a volume's attachments: their clients come again, and are told its size anew.
    pub fn reopen_attachments(&self, volume_uid: Uuid) {
        // Without an answer the data side is ending, and with it every connection.
        let _ = self.ask(|reply| GateMessage::ReopenAttachments { volume_uid, reply });
    }

    /// Closes the storage of a volume that nobody has open; a memory volume's content is gone.
    ///
    /// # Errors
    /// [`VolumeBusy`], also when the data side does not answer.
    pub fn release_volume(&self, volume_uid: Uuid) -> Result<(), VolumeBusy> {
        self.ask(|reply| GateMessage::ReleaseVolume { volume_uid, reply })
            .unwrap_or(Err(VolumeBusy { volume_uid, connections: 0 }))?;
        // What it is opened as next, the catalog says.
        self.controls.forget(volume_uid);
        Ok(())
    }

    /// The catalog has other limits of a volume now: they hold at once.
    pub fn limits_changed(&self, volume: &VolumeRecord) {
        self.controls.set_limits(volume);
        for ring in &self.rings {
            ring.post(RingMessage::LimitsChanged);
        }
    }

    /// The catalog has another content of a volume now.
    pub fn content_changed(&self, volume: &VolumeRecord) {
        self.controls.set_content(volume);
    }

    /// For how long connections of a volume were held back by its limits, together, since the server's start.
    pub fn throttled(&self, volume_uid: Uuid) -> Duration {
        self.controls.throttled(volume_uid)
    }

    /// Connections that have the volume open for writing, or are about to, now.
    pub fn writers_of_volume(&self, volume_uid: Uuid) -> u32 {
        // It is not said of a volume that nobody writes to it where the data side does not answer.
        self.ask(|reply| GateMessage::WritersOfVolume { volume_uid, reply }).unwrap_or(1)
    }

    /// Connections that are served on the attachment now.
    pub fn connections_of(&self, attachment_id: Uuid) -> u32 {
        self.ask(|reply| GateMessage::ConnectionsOf { attachment_id, reply }).unwrap_or(0)
    }

    /// The holder of the attachment was told its secret just now.
    pub fn holder_seen(&self, attachment_id: Uuid) {
        // Without an answer the data side is ending.
        let _ = self.gate.send(GateMessage::HolderSeen { attachment_id });
    }

    /// Connections that are served on the attachment now, and since when there have been none, at most since the server's start.
    pub fn holder_of(&self, attachment_id: Uuid) -> (u32, Duration) {
        // Nobody is taken for gone where the data side does not answer.
        self.ask(|reply| GateMessage::HolderOf { attachment_id, reply }).unwrap_or((1, Duration::ZERO))
    }

    /// Connections that have the volume open, or are about to, now.
    pub fn connections_of_volume(&self, volume_uid: Uuid) -> u32 {
        self.ask(|reply| GateMessage::ConnectionsOfVolume { volume_uid, reply }).unwrap_or(0)
    }

    /// A word that changes whenever acknowledged, unflushed writes of the volume may have been lost.
    pub fn storage_incarnation(&self, volume: &VolumeRecord) -> String {
        self.incarnations.word(volume)
    }

    /// A sync of the volume's file failed that no client had asked for: what its clients wrote may be lost. Recorded when this
    /// returns.
    ///
    /// # Errors
    /// It is recorded nowhere: nobody may be told.
    pub fn sync_failed(&self, volume: &VolumeRecord, errno: i32) -> Result<(), String> {
        let volume = Box::new(volume.clone());
        self.ask(|reply| GateMessage::SyncFailed { volume, errno, reply })
            .unwrap_or_else(|| Err(FenceError::NoAnswer.to_string()))
    }

    /// The control side is about to change the volume's file.
    pub fn changes_file(&self, volume_uid: Uuid) {
        self.incarnations.changes(volume_uid);
    }

    /// The volume is no more, and nothing has to be remembered of it.
    pub fn forget_volume(&self, volume_uid: Uuid) {
        self.incarnations.forget(volume_uid);
    }

    /// Whether volumes of this server can be copied without reading them.
    ///
    /// # Errors
    /// [`CopyError`]: why not, and what to do.
    pub fn can_copy(&self) -> Result<(), CopyError> {
        self.copies.can_copy()
    }

    /// Begins copies, all of one instant, which is over when this returns. They go on, and end together.
    ///
    /// # Errors
    /// [`CopyError`]; nothing is left.
    pub fn begin_copies(&self, wanted: &[CopyWanted]) -> Result<CopyHandle, CopyError> {
        self.copies.begin(wanted, |volume_uid| self.open_to_copy(volume_uid))
    }

    /// The files of copies.
    pub fn copy_files(&self) -> &CopyFiles {
        self.copies.files()
    }

    /// What was copied to be restored takes the place of the volume's file, which nobody has open.
    ///
    /// # Errors
    /// The system's; nothing was replaced, or that is not durable yet: the call may be repeated.
    pub fn replace_file(&self, volume_uid: Uuid) -> io::Result<()> {
        // It is another file from now on, which is no loss. What was lost before stays counted.
        self.incarnations.settle(volume_uid).map_err(io::Error::other)?;
        // Only then is what was remembered of the former file nobody's: one that stays has to be opened with it.
        self.copies.files().replace(volume_uid)?;
        self.incarnations.forget(volume_uid);
        Ok(())
    }

    /// Ends everything: requests in flight are finished and answered, connections closed, threads joined. True: all of
    /// it in time; false: some I/O still hangs in the kernel. A second call does nothing.
    pub fn shutdown(&self) -> bool {
        let threads = std::mem::take(&mut *self.threads());
        let deadline = Instant::now() + SHUTDOWN_LIMIT;
        let _ = rustix::io::write(&*self.stop_accepting, &1u64.to_ne_bytes());
        let mut in_time = threads.acceptor.is_none_or(|thread| join_until(thread, deadline));
        // First, so that what waits for a copy goes on, and is answered.
        in_time &= self.copies.end(Instant::now() + COPIES_END_LIMIT);
        for ring in &self.rings {
            ring.post(RingMessage::Shutdown);
        }
        for thread in threads.rings {
            in_time &= join_until(thread, deadline);
        }
        let _ = self.gate.send(GateMessage::Shutdown { is_drained: in_time });
        in_time & threads.gate.is_none_or(|thread| join_until(thread, deadline))
    }

    fn ask<T>(&self, question: impl FnOnce(Sender<T>) -> GateMessage) -> Option<T> {
        let (reply, answer) = channel();
        self.gate.send(question(reply)).ok()?;
        answer.recv_timeout(GATE_ANSWER_LIMIT + Limits::default().fence_timeout).ok()
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for DataServer {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> DataServerError {
    move |source| DataServerError::System { action, source }
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, DataServerError> {
    std::thread::Builder::new().name(name).spawn(run).map_err(DataServerError::Thread)
}

/// Waits for a thread to end, until the deadline.
fn join_until(thread: JoinHandle<()>, deadline: Instant) -> bool {
    while !thread.is_finished() {
        if Instant::now() >= deadline {
            warn!(thread = thread.thread().name(), "a thread does not end");
            return false;
        }
        // There is no join with a deadline; this runs once in a process's life.
        std::thread::sleep(Duration::from_millis(2));
    }
    thread.join().is_ok()
}

type Rings = (Vec<Arc<Mailbox>>, Vec<JoinHandle<()>>);

fn start_rings(
    count: usize,
    gate: &Sender<GateMessage>,
    limits: Limits,
    plan: MemoryPlan,
    tls: &Arc<ServerTls>,
) -> Result<Rings, DataServerError> {
    let (mut mailboxes, mut threads) = (Vec::new(), Vec::new());
    for number in 0..count {
        match start_ring(number, gate.clone(), limits, plan, Arc::clone(tls)) {
            Ok((mailbox, thread)) => {
                mailboxes.push(mailbox);
                threads.push(thread);
            }
            Err(error) => {
                mailboxes.iter().for_each(|mailbox: &Arc<Mailbox>| mailbox.post(RingMessage::Shutdown));
                return Err(explain(error, count, getrlimit(Resource::Memlock).current));
            }
        }
    }
    Ok((mailboxes, threads))
}

/// The kernel has one error for all memory that it does not give; where the limit of what may be locked explains it, it is that.
/// And one for threads.
fn explain(error: DataServerError, rings: usize, allowed_bytes: Option<u64>) -> DataServerError {
    match (error, allowed_bytes) {
        (DataServerError::Ring(source), Some(allowed_bytes))
            if source.raw_os_error() == Some(libc::ENOMEM) =>
        {
            let needed_kib = (rings as u64 * LOCKED_BYTES).div_ceil(1 << 10);
            DataServerError::LockedMemory { source, rings, needed_kib, allowed_kib: allowed_bytes >> 10 }
        }
        // A ring brings a thread of its own along.
        (DataServerError::Ring(source), _) if source.raw_os_error() == Some(libc::EAGAIN) => {
            DataServerError::Thread(source)
        }
        (error, _) => error,
    }
}

fn start_ring(
    number: usize,
    gate: Sender<GateMessage>,
    limits: Limits,
    plan: MemoryPlan,
    tls: Arc<ServerTls>,
) -> Result<(Arc<Mailbox>, JoinHandle<()>), DataServerError> {
    let mailbox = Arc::new(Mailbox::new().map_err(system("make an eventfd"))?);
    let (ready_sender, ready) = channel();
    let own_mailbox = Arc::clone(&mailbox);
    let thread = spawn(format!("ring-{number}"), move || {
        // Made here because a ring belongs to the thread that makes it.
        match IoLoop::new(number, own_mailbox, gate, limits, plan, tls) {
            Ok(io_loop) => {
                let _ = ready_sender.send(Ok(()));
                io_loop.run();
            }
            Err(error) => {
                let _ = ready_sender.send(Err(error));
            }
        }
    })?;
    match ready.recv() {
        Ok(Ok(())) => Ok((mailbox, thread)),
        Ok(Err(error)) => Err(DataServerError::Ring(error)),
        Err(_) => Err(DataServerError::Ring(io::ErrorKind::Other.into())),
    }
}

fn listen(addresses: &[DataAddress]) -> Result<Vec<Listener>, DataServerError> {
    let listen = |address: &DataAddress| {
        Listener::bind_among(address, addresses, None)
            .map_err(|source| DataServerError::Address { address: address.clone(), source })
    };
    addresses.iter().map(listen).collect()
}

/// What the data side may take of memory and of open files; the limits are those that were configured, or what there are open
/// files for.
fn divide(
    config: &DataServerConfig,
    rings: usize,
    wide_sockets: &WideSockets,
) -> Result<(Limits, MemoryPlan, descriptors::Plan), DataServerError> {
    let more_bytes = wide_sockets.more_bytes(WIDTHS[0]);
    let allowed = Allowed::of_this_process();
    let plan = config.limits.plan_within(rings, &allowed, config.tls.connection_bytes(), more_bytes);
    let plan = match (plan, config.limits.memory_bytes_max) {
        (Err(error), None) => return Err(DataServerError::DefaultMemory { error, allowed }),
        (plan, _) => plan?,
    };
    let (memory_mib_max, allowed_mib, by) = (plan.total_bytes >> 20, allowed.bytes >> 20, &allowed.by);
    if config.limits.memory_bytes_max.is_none() && plan.total_bytes > allowed.bytes / 2 {
        warn!(
            memory_mib_max,
            allowed_mib,
            %by,
            "the least that connections and threads may come to take is more than half of what there is: many clients may have the \
             kernel end this server; raise that limit, or lower --connections-max, --request-max or --threads"
        );
    } else if plan.total_bytes > allowed.bytes {
        warn!(memory_mib_max, allowed_mib, %by, "--memory-max is more than there is: clients may have the kernel end this server");
    } else {
        info!(memory_mib_max, allowed_mib, %by, "memory");
    }
    let descriptors = descriptors::plan_of_this_process(&Wanted {
        rings,
        page_pipes: plan.page_pipes,
        connections_max: config.limits.connections_max,
        of_connection: config.tls.connection_descriptors(),
        management_max: MANAGEMENT_CONNECTIONS_MAX,
    })?;
    let limits = Limits { connections_max: descriptors.connections_max, ..config.limits };
    Ok((limits, MemoryPlan { page_pipes: descriptors.page_pipes, ..plan }, descriptors))
}
