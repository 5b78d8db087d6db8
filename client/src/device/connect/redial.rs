//! Opening a queue's connections again, for as long as it takes.
//!
//! One thread for each queue that has none, which ends with its success: a dial waits for names, handshakes and the server's
//! draining, and must hold up neither the queues nor the main thread. Started by `attachment.rs`, which hears of every attempt;
//! whether the server is the same one is looked at here, whether it forgot anything by `reconnect.rs`.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::data_socket::DataSocket;
use super::dial::{Dialled, OPEN_TIMEOUT};
use super::export_fit::fits;
use super::probe;
use super::slots::{self, SlotError};
use crate::causes::with_sources;
use crate::contract::{DeviceSpec, ExportSpec, SessionRecord};

/// Between the first attempts, and at most. The pause grows by half each time and is cut by chance, so that many clients
/// of a server that comes back do not come at once.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

fn grown(pause: Duration) -> Duration {
    PAUSE_MAX.min(pause.mul_f64(1.5))
}

fn rest(pause: Duration) {
    thread::sleep(pause.mul_f64(fastrand::f64().mul_add(0.5, 0.5)));
}

/// What an attempt came to.
#[derive(Debug)]
pub enum Attempt {
    /// The queue's connections, in the order of its lanes.
    Opened {
        /// The sockets.
        sockets: Vec<DataSocket>,
        /// The server's storage incarnation; empty for a foreign server.
        incarnation: String,
        /// The address that answered.
        address: String,
        /// Size of the export in bytes: what it was, or more.
        export_bytes: u64,
    },
    /// Not this time; the next attempt follows.
    Failed(String),
    /// The server knows the attachment no more. No further attempt follows.
    Refused(String),
}

/// What all connections of the attachment have in common.
#[derive(Debug)]
pub struct Redial {
    /// Its addresses may change.
    spec: Mutex<Arc<DeviceSpec>>,
    session: SessionRecord,
    /// As the disk's users know it.
    export_bytes: AtomicU64,
    nr_hw_queues: u16,
    nr_connections: u16,
    /// The address that worked last, on any queue: a silent one before it would cost each of them ten seconds.
    worked_last: Mutex<Option<String>>,
}

impl Redial {
    /// As the session was first, at this address: what comes later has to be like it.
    pub fn new(
        spec: &DeviceSpec,
        session: &SessionRecord,
        nr_hw_queues: u16,
        nr_connections: u16,
        worked_last: String,
    ) -> Arc<Self> {
        let export_bytes = AtomicU64::new(session.export_bytes);
        Arc::new(Self {
            spec: Mutex::new(Arc::new(spec.clone())),
            session: session.clone(),
            export_bytes,
            nr_hw_queues,
            nr_connections,
            worked_last: Mutex::new(Some(worked_last)),
        })
    }

    /// The disk has grown to the export's size: it cannot shrink below that any more.
    pub fn grown(&self, export_bytes: u64) {
        self.export_bytes.fetch_max(export_bytes, Ordering::Relaxed);
    }

    /// Dials until it succeeds, on a thread of its own; after a pause, if the server has been reached so many times in vain.
    /// Errors: there can be no thread.
    pub fn start(
        self: &Arc<Self>,
        queue_id: u16,
        times_in_vain: u32,
        on_attempt: impl Fn(Attempt) + Send + 'static,
    ) -> io::Result<()> {
        let redial = Arc::clone(self);
        let name = format!("dial-q{queue_id}");
        thread::Builder::new()
            .name(name)
            .spawn(move || redial.run(queue_id, times_in_vain, &on_attempt))
            .map(drop)
    }

    fn run(&self, queue_id: u16, times_in_vain: u32, on_attempt: &dyn Fn(Attempt)) {
        let mut pause = PAUSE_MIN;
        for _ in 0..times_in_vain {
            pause = grown(pause);
        }
        if times_in_vain > 0 {
            rest(pause);
        }
        loop {
            let attempt = self.attempt(queue_id);
            let goes_on = matches!(attempt, Attempt::Failed(_));
            on_attempt(attempt);
            if !goes_on {
                return;
            }
            rest(pause);
            pause = grown(pause);
        }
    }

    fn attempt(&self, queue_id: u16) -> Attempt {
        let spec = self.spec();
        let mut sockets = Vec::new();
        let mut last = None;
        // The smallest that any of them tells: what all of them can do.
        let mut export_bytes = u64::MAX;
        for slot in (queue_id..self.nr_connections).step_by(usize::from(self.nr_hw_queues)) {
            let worked_last = self.worked_last().clone();
            let dialled = match slots::dial_slot(&spec, slot.into(), worked_last.as_deref(), OPEN_TIMEOUT) {
                Ok(dialled) => dialled,
                Err(error @ SlotError::Ended { .. }) => return Attempt::Refused(with_sources(&error)),
                Err(error) => return Attempt::Failed(with_sources(&error)),
            };
            *self.worked_last() = Some(dialled.address.clone());
            let incarnation = slots::incarnation(&spec, &dialled);
            if let Err(reason) = self.check(&dialled) {
                return Attempt::Failed(format!("the server at {}: {reason}", dialled.address));
            }
            if last.as_ref().is_some_and(|(other, _)| *other != incarnation) {
                return Attempt::Failed("the server's storage is changing".to_owned());
            }
            export_bytes = export_bytes.min(dialled.export.size_bytes);
            last = Some((incarnation, dialled.address));
            sockets.push(dialled.socket);
        }
        let (incarnation, address) = last.unwrap_or_default();
        Attempt::Opened { sockets, incarnation, address, export_bytes }
    }

    /// A disk cannot change under its users, but grow.
    fn check(&self, dialled: &Dialled) -> Result<(), String> {
        let export_bytes = self.export_bytes.load(Ordering::Relaxed);
        fits(&self.session, export_bytes, self.nr_connections, &dialled.export)?;
        if dialled.socket.encryption() != self.session.encryption {
            return Err("the connection is not encrypted as the former one was".to_owned());
        }
        Ok(())
    }

    /// Asks the server for one block, beside all else. Whether it was answered is told once, unless there can be no thread.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn probe(&self, on_return: impl FnOnce(bool) + Send + 'static) -> io::Result<()> {
        let worked_last = self.worked_last().clone();
        probe::start(self.spec(), self.session.block_size_bytes, worked_last, on_return)
    }

    /// Whether a probe says anything: a foreign server that granted one connection may have no other to give.
    pub fn can_probe(spec: &DeviceSpec, nr_connections: u16) -> bool {
        matches!(spec.export, ExportSpec::Attachment { .. }) || nr_connections > 1
    }

    /// The server is dialled at these addresses from the next attempt on.
    pub fn set_addresses(&self, addresses: Vec<String>) {
        let mut spec = DeviceSpec::clone(&self.spec());
        spec.addresses = addresses;
        *self.spec.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(spec);
    }

    fn spec(&self) -> Arc<DeviceSpec> {
        Arc::clone(&self.spec.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn worked_last(&self) -> MutexGuard<'_, Option<String>> {
        // Nothing can panic while it is held.
        self.worked_last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
