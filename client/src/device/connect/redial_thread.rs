//! The threads that open a queue's connections again, for as long as it takes.
//!
//! One thread for each queue that has none, which ends with its success: a dial waits for names, handshakes and the server's
//! draining, and must hold up neither the queues nor the main thread. Started by `attachment.rs`, which hears of every attempt; which
//! slot is dialled when, and what an answer is worth, says `redial.rs`.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::data_socket::DataSocket;
use super::dial::OPEN_TIMEOUT;
use super::probe;
use super::redial::{Attempt, DiskFit, Next, Redial};
use super::slots;
use crate::contract::{DeviceSpec, ExportSpec, SessionRecord};

/// What all connections of the attachment have in common.
#[derive(Debug)]
pub struct Redialler {
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

impl Redialler {
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
        on_attempt: impl Fn(Attempt<DataSocket>) + Send + 'static,
    ) -> io::Result<()> {
        let redialler = Arc::clone(self);
        let name = format!("dial-q{queue_id}");
        thread::Builder::new()
            .name(name)
            .spawn(move || redialler.run(queue_id, times_in_vain, &on_attempt))
            .map(drop)
    }

    fn run(&self, queue_id: u16, times_in_vain: u32, on_attempt: &dyn Fn(Attempt<DataSocket>)) {
        let slots = (queue_id..self.nr_connections).step_by(usize::from(self.nr_hw_queues));
        let mut redial = Redial::new(slots.map(u32::from).collect(), times_in_vain);
        loop {
            let slot = match redial.next(fastrand::f64()) {
                Next::Rest(pause) => {
                    thread::sleep(pause);
                    continue;
                }
                Next::Dial(slot) => slot,
            };
            let spec = self.spec();
            let worked_last = self.worked_last().clone();
            let dialled = slots::dial_slot(&spec, slot, worked_last.as_deref(), OPEN_TIMEOUT);
            if let Ok(dialled) = &dialled {
                *self.worked_last() = Some(dialled.address.clone());
            }
            let fit = DiskFit {
                spec: &spec,
                session: &self.session,
                export_bytes: self.export_bytes.load(Ordering::Relaxed),
                nr_connections: self.nr_connections,
            };
            let encryption = |socket: &DataSocket| socket.encryption();
            let Some(attempt) = redial.dialled(dialled, &fit, encryption) else { continue };
            let goes_on = matches!(attempt, Attempt::Failed(_));
            on_attempt(attempt);
            if !goes_on {
                return;
            }
        }
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
