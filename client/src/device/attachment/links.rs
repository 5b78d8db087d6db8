//! The connections of a device as its main thread knows them: what happened to them, and what is done about it.
//!
//! Owns: the queues' commands, the redialler, and what the status file says of the connections. Never: decides; `reconnect.rs` does.
//! Called by `attachment.rs`.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use daemon_log::THREAD_LIMITS;

use super::made::Made;
use crate::causes::with_sources;
use crate::contract::state_reasons::{IO_FAILS, IO_WAITS};
use crate::contract::{DeviceSpec, DeviceState, ExportSpec, SendZc, StallPolicy};
use crate::device::connect::data_socket::DataSocket;
use crate::device::connect::redial::Attempt;
use crate::device::connect::redial_thread::Redialler;
use crate::device::control_socket::PendingRequest;
use crate::device::liveness::Probes;
use crate::device::queue::link::LinkEvent;
use crate::device::queue::parts::{QueueCommand, QueueCommander, QueueError, QueueEvent};
use crate::device::queue::requests::Resend;
use crate::device::queue::unflushed::Unflushed;
use crate::device::reconnect::{Condition, Output, Reconnect};
use crate::device::status_file::StatusFile;
use crate::safe_stop::Outcome;

/// A server that is lost while the device is being made may come back for so long; then there is no device.
const START_STALL_MS: u64 = 10_000;
/// A server of ours that owes replies and sends nothing for so long is taken for lost: its requests are sent again.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);
/// A foreign one has longer: what it owes cannot be sent again, and fails. Both have ten minutes while they answer probes.
const REPLY_TIMEOUT_FOREIGN: Duration = Duration::from_secs(120);

/// What the main thread is woken by.
pub(super) enum Event {
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

/// The queues' threads and connections, as the main thread knows them.
pub(super) struct Links {
    pub(super) redialler: Arc<Redialler>,
    pub(super) reconnect: Reconnect<Vec<DataSocket>>,
    pub(super) commanders: Vec<QueueCommander>,
    pub(super) unflushed: Arc<Unflushed>,
    /// A server that restarts has forgotten everything.
    pub(super) is_volatile: bool,
    /// The largest that the server has told the export to be.
    pub(super) export_bytes: u64,
    pub(super) queues_live: usize,
    /// The worst that a queue ended with.
    pub(super) queue_error: Option<QueueError>,
    pub(super) sender: Sender<Event>,
}

impl Links {
    pub(super) fn new(spec: &DeviceSpec, made: &Made, sender: Sender<Event>) -> Self {
        let Made { session, nr_connections, address, .. } = made;
        let nr_hw_queues = made.device.info().nr_hw_queues;
        let unflushed = Arc::new(Unflushed::new(nr_hw_queues));
        let is_recovered = spec.recover.is_some();
        // Nobody knows what the process before had been told: until the first FLUSH there may be something.
        if is_recovered && session.has_volatile_cache() {
            unflushed.acknowledged(0);
        }
        // A device that is taken on has users, who wait as they were told to.
        let starting = if is_recovered { spec.on_stall } else { StallPolicy::FailAfterMs(START_STALL_MS) };
        let (_, reply_timeout) = ways_of(&spec.export);
        let probes = Probes::new(reply_timeout, Redialler::can_probe(spec, *nr_connections));
        Self {
            redialler: Redialler::new(spec, session, nr_hw_queues, *nr_connections, address.clone()),
            reconnect: Reconnect::new(nr_hw_queues, session.incarnation.clone(), starting, probes),
            commanders: Vec::new(),
            unflushed,
            is_volatile: spec.is_volatile,
            export_bytes: session.export_bytes,
            queues_live: 0,
            queue_error: None,
            sender,
        }
    }

    /// The next event; what is due at a certain time is done meanwhile. `None`: there can be none any more.
    pub(super) fn next_event(&mut self, events: &Receiver<Event>, status: &mut StatusFile) -> Option<Event> {
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

    pub(super) fn tick(&mut self) {
        let mut outputs = Vec::new();
        self.reconnect.tick(Instant::now(), &mut outputs);
        self.carry_out(outputs);
    }

    /// Takes what concerns the queues; the others are given back.
    pub(super) fn take_event(&mut self, event: Event, status: &mut StatusFile) -> Option<Event> {
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
                    tracing::error!(queue_id, error = with_sources(&error), "a queue failed");
                    self.queue_error = Some(error);
                }
            }
            Event::Attempt(queue_id, Attempt::Opened { sockets, incarnation, address, export_bytes }) => {
                self.export_bytes = self.export_bytes.max(export_bytes);
                let (is_volatile, unflushed) = (self.is_volatile, &self.unflushed);
                let has_unflushed = || is_volatile || unflushed.any();
                let now = Instant::now();
                self.reconnect.dialled(queue_id, sockets, incarnation, now, has_unflushed, &mut outputs);
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
    pub(super) fn note_incarnation(&self, status: &mut StatusFile) {
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

    pub(super) fn note_address(&self, address: String, status: &mut StatusFile) {
        status.note(|status| {
            status.server_address = address;
            status.reconnects += 1;
        });
    }

    pub(super) fn carry_out(&mut self, outputs: Vec<Output<Vec<DataSocket>>>) {
        for output in outputs {
            match output {
                Output::Dial(queue_id) => {
                    let sender = self.sender.clone();
                    let on_attempt = move |attempt| drop(sender.send(Event::Attempt(queue_id, attempt)));
                    if let Err(error) = self.redialler.start(queue_id, self.reconnect.refusals(), on_attempt)
                    {
                        tracing::error!(queue_id, %error, "cannot connect to the server");
                        let why =
                            format!("cannot start a thread to dial the server: {error}; {THREAD_LIMITS}");
                        self.reconnect.dial_not_begun(queue_id, why, Instant::now());
                    }
                }
                Output::Connect(queue_id, sockets) => self.tell(queue_id, QueueCommand::Connect(sockets)),
                Output::Disconnect(queue_id, why) => self.tell(queue_id, QueueCommand::Disconnect(why)),
                Output::Leave(queue_id) => self.tell(queue_id, QueueCommand::Leave),
                Output::Wake(queue_id) => self.tell(queue_id, QueueCommand::Look),
                Output::GiveUp(queue_id) => self.tell(queue_id, QueueCommand::GiveUp),
                Output::Probe => {
                    let sender = self.sender.clone();
                    let on_return = move |is_answered| drop(sender.send(Event::Probed(is_answered)));
                    if let Err(error) = self.redialler.probe(on_return) {
                        tracing::warn!(%error, "cannot start a thread to probe the server");
                        self.reconnect.probed(false, Instant::now());
                    }
                }
            }
        }
    }

    pub(super) fn tell(&self, queue_id: u16, command: QueueCommand) {
        self.commanders[usize::from(queue_id)].tell(command);
    }

    /// Every request fails from now on.
    pub(super) fn lose(&mut self, reason: &str) {
        let mut outputs = Vec::new();
        self.reconnect.refused_for_good(reason.to_owned(), &mut outputs);
        self.carry_out(outputs);
    }

    /// Keeps the status at what the connections are, while the device is there to use.
    pub(super) fn tell_condition(&self, status: &mut StatusFile) {
        let (state, reason) = match self.reconnect.condition() {
            Condition::Live => (DeviceState::Live, String::new()),
            Condition::Slow(reason) => (DeviceState::Live, reason),
            Condition::Stalled(reason) => (DeviceState::Stalled, format!("{IO_WAITS}: {reason}")),
            Condition::Failing(reason) => (DeviceState::Stalled, format!("{IO_FAILS}: {reason}")),
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
pub(super) fn ways_of(export: &ExportSpec) -> (Resend, Duration) {
    match export {
        ExportSpec::Attachment { .. } => (Resend::Everything, REPLY_TIMEOUT),
        ExportSpec::Nbd { .. } => (Resend::ReadsOnly, REPLY_TIMEOUT_FOREIGN),
    }
}

fn note_send_zc(send_zc: SendZc, status: &mut StatusFile) {
    if status.status().send_zc == send_zc {
        return;
    }
    match send_zc {
        SendZc::Copied => {
            tracing::info!(
                "the kernel copies zero-copy sends; large writes are sent without zero-copy from now on"
            )
        }
        _ => tracing::info!(send_zc = send_zc.as_str(), "sending large writes with zero-copy"),
    }
    status.note(|status| status.send_zc = send_zc);
}
