//! A ring thread: completions in, submissions out, one system call a pass.
//!
//! Owns: the connections of one ring. Never: looks anything up, takes a lock that somebody holds for long, or blocks
//! anywhere but in `submit_and_wait` (and where `page_pipes.rs` says so); opening an export is the gate's, and its answer
//! comes through the mailbox.
//! Called by: `data/server.rs`, which starts one thread for each core.
//!
//! A pass: **reap** (results to their connections) → **advance** (each connection with news parses, sends, receives,
//! which pushes submissions) → **submit and wait**.
//! Invariants: after start-up no pass allocates for a request; a connection is dropped, and reported to the gate as
//! closed, only when every operation that was submitted for it has completed.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use tracing::{debug, error, warn};

use crate::data::address::Peer;
use crate::data::admission::Place;
use crate::data::gate::GateMessage;
use crate::data::io::ring::Ring;
use crate::data::io::ring::completion::{Completion, OpKind};
use crate::data::io::ring::wire::Wire;
use crate::data::io::session_io::{Ask, SessionIo};
use crate::data::io::timers::Timers;
use crate::data::mailbox::{Mailbox, RingMessage};
use crate::ids::ConnectionId;
use crate::limits::{Limits, MemoryPlan};
use crate::tls::ServerTls;
use crate::volume::snapshot::copy_before_write::HeldRequest;

/// Results taken in one pass; what is left waits for the next.
const COMPLETIONS_PER_PASS: usize = 1024;
/// How often deadlines are looked at while there are any.
const TICK: Duration = Duration::from_millis(500);
/// How long connections have to finish when the server shuts down.
const FINISH_LIMIT: Duration = Duration::from_secs(5);

/// The state of a ring thread.
pub struct IoLoop {
    ring_number: usize,
    ring: Ring,
    mailbox: Arc<Mailbox>,
    gate: Sender<GateMessage>,
    limits: Limits,
    tls: Arc<ServerTls>,
    /// The one record of each connection, by its index in the ring.
    connections: Vec<Option<Box<SessionIo>>>,
    free_indices: Vec<u32>,
    by_id: HashMap<ConnectionId, u32>,
    completions: Vec<Completion>,
    /// Those that the mailbox brought.
    ended: Vec<Completion>,
    /// Connections with news in this pass.
    news: Vec<u32>,
    /// Connections that have had their turn in this pass and go on in the next.
    waiting_for_turn: Vec<u32>,
    /// Connections that wait for a time.
    timers: Timers,
    shutdown_deadline: Option<Instant>,
    /// When deadlines were last looked at.
    checked_at: Instant,
    /// Whether a handshake, or a guest's visit, may be going on; found out at each check, because that takes a look at every connection.
    has_handshakes: bool,
}

impl IoLoop {
    /// Makes the ring, on the thread that will run it.
    ///
    /// # Errors
    /// What [`Ring::new`] says.
    pub fn new(
        ring_number: usize,
        mailbox: Arc<Mailbox>,
        gate: Sender<GateMessage>,
        limits: Limits,
        plan: MemoryPlan,
        tls: Arc<ServerTls>,
    ) -> io::Result<Self> {
        let mut ring = Ring::new(ring_number, &mailbox, plan)?;
        ring.push_wakeup(mailbox.wakeup());
        Ok(Self {
            ring_number,
            ring,
            mailbox,
            gate,
            limits,
            tls,
            connections: Vec::new(),
            free_indices: Vec::new(),
            by_id: HashMap::new(),
            completions: Vec::with_capacity(COMPLETIONS_PER_PASS),
            ended: Vec::new(),
            news: Vec::with_capacity(1024),
            waiting_for_turn: Vec::with_capacity(1024),
            timers: Timers::default(),
            shutdown_deadline: None,
            checked_at: Instant::now(),
            has_handshakes: false,
        })
    }

    /// Serves until told to shut down and every connection is gone.
    pub fn run(mut self) {
        while self.shutdown_deadline.is_none() || !self.by_id.is_empty() {
            let timeout =
                if self.waiting_for_turn.is_empty() { self.wait_max() } else { Some(Duration::ZERO) };
            if let Err(error) = self.ring.submit_and_wait(timeout) {
                error!(%error, ring = self.ring_number, "the ring is broken");
                daemon_log::finish();
                // A data thread without its ring can serve nobody and can not tell what was written: better none.
                std::process::abort();
            }
            let now = Instant::now();
            // First, so that they come last: the latest news is looked at first.
            while let Some(index) = self.waiting_for_turn.pop() {
                self.note(index);
            }
            while let Some(index) = self.timers.take_due(now) {
                self.note(index);
            }
            self.reap(now);
            self.advance();
            if self.tick().is_some() && now.duration_since(self.checked_at) >= TICK {
                self.check_deadlines(now);
            }
        }
    }

    fn tick(&self) -> Option<Duration> {
        let has_deadlines =
            self.shutdown_deadline.is_some() || self.has_handshakes || self.ring.has_waiters();
        has_deadlines.then_some(TICK)
    }

    /// How long nothing has to be done without news; `None`: for ever.
    fn wait_max(&self) -> Option<Duration> {
        let tick = self.tick();
        if self.timers.is_empty() {
            return tick;
        }
        let timer = self.timers.next_in(Instant::now());
        timer.map(|timer| tick.map_or(timer, |tick| tick.min(timer))).or(tick)
    }

    fn reap(&mut self, now: Instant) {
        let mut completions = std::mem::take(&mut self.completions);
        self.ring.reap(&mut completions);
        for completion in completions.drain(..) {
            if completion.kind() == OpKind::Wakeup {
                self.take_mail(now);
                self.ring.push_wakeup(self.mailbox.wakeup());
                continue;
            }
            self.completed(completion, now);
        }
        self.completions = completions;
    }

    fn completed(&mut self, completion: Completion, now: Instant) {
        let index = completion.index();
        let Some(connection) = self.connections[index as usize].as_mut() else { return };
        let outcome = connection.wire().ended(completion);
        connection.completed(&mut self.ring, outcome, now);
        self.note(index);
    }

    fn advance(&mut self) {
        loop {
            while let Some((index, buffer)) = self.ring.pool().next_grant() {
                match self.connections[index as usize].as_mut() {
                    Some(connection) => connection.granted(&mut self.ring, buffer),
                    None => self.ring.pool().release(buffer),
                }
                self.note(index);
            }
            let Some(index) = self.news.pop() else { return };
            let Some(connection) = self.connections[index as usize].as_mut() else { continue };
            connection.is_listed = false;
            if let Some(ask) = connection.advance(&mut self.ring) {
                let rights = Arc::clone(connection.rights());
                let (deadline, beyond) = (connection.handshake_deadline(), connection.beyond());
                let connection = connection.id();
                let ring = self.ring_number;
                match ask {
                    Ask::Open(open) => {
                        self.tell_gate(GateMessage::Open { connection, ring, open, rights, beyond });
                    }
                    Ask::List => self.tell_gate(GateMessage::List { connection, ring, rights }),
                    Ask::Mark => self.tell_gate(GateMessage::Mark { connection }),
                    Ask::StartTls => self.start_tls(index, connection, deadline),
                }
            }
            let Some(connection) = self.connections[index as usize].as_mut() else { continue };
            if let Some(at) = connection.take_timer() {
                self.timers.add(index, at);
            }
            if connection.waits_for_turn() {
                self.waiting_for_turn.push(index);
            }
            if connection.is_drained() {
                self.remove(index);
            }
        }
    }

    fn take_mail(&mut self, now: Instant) {
        for message in self.mailbox.take() {
            match message {
                RingMessage::Accept { connection, socket, peer, place } => {
                    self.accept(connection, socket, peer, place, now)
                }
                RingMessage::Opened { connection, answer } => {
                    self.with(connection, |connection, ring| connection.opened(ring, answer));
                }
                RingMessage::Listed { connection, exports } => {
                    self.with(connection, |connection, ring| connection.listed(ring, &exports));
                }
                RingMessage::Ended(ended) => {
                    let mut completions = std::mem::take(&mut self.ended);
                    self.ring.reap_ended(&ended, &mut completions);
                    completions.drain(..).for_each(|completion| self.completed(completion, now));
                    self.ended = completions;
                }
                RingMessage::ExtentsFound { connection: index, slot, answer } => {
                    if let Some(connection) = self.connections[index as usize].as_mut() {
                        self.ring.extents_found(connection.wire());
                        connection.extents_found(&mut self.ring, slot, answer.as_ref());
                    }
                    self.note(index);
                }
                RingMessage::GoOn { requests } => {
                    for HeldRequest { connection, slot, .. } in requests {
                        self.with(connection, |connection, ring| connection.go_on(ring, slot));
                    }
                }
                RingMessage::TlsStarted { connection, secured } => {
                    self.with(connection, |connection, ring| connection.tls_started(ring, secured));
                }
                RingMessage::Marked { connection, is_marked } => {
                    self.with(connection, |connection, ring| connection.marked(ring, is_marked));
                }
                RingMessage::LimitsChanged => {
                    for index in 0..self.connections.len() as u32 {
                        if self.connections[index as usize].as_ref().is_some_and(|one| one.is_throttled()) {
                            self.note(index);
                        }
                    }
                }
                RingMessage::Close { connection } => {
                    self.with(connection, |connection, ring| connection.close(ring));
                }
                RingMessage::Shutdown => {
                    self.shutdown_deadline = Some(now + FINISH_LIMIT);
                    for index in 0..self.connections.len() as u32 {
                        if let Some(connection) = self.connections[index as usize].as_mut() {
                            connection.finish(&mut self.ring);
                            self.note(index);
                        }
                    }
                }
            }
        }
    }

    fn accept(&mut self, id: ConnectionId, socket: OwnedFd, peer: Peer, place: Place, now: Instant) {
        if self.shutdown_deadline.is_some() {
            self.mailbox.connection_removed();
            return;
        }
        let index = self.free_indices.last().copied().unwrap_or(self.connections.len() as u32);
        let wire = match Wire::new(index, socket) {
            Ok(wire) => wire,
            Err(error) => {
                warn!(%peer, %error, "no memory for a connection");
                self.mailbox.connection_removed();
                return;
            }
        };
        debug!(%peer, connection = id.0, ring = self.ring_number, "connection begins");
        if self.free_indices.pop().is_none() {
            self.connections.push(None);
        }
        let connection = SessionIo::new(id, wire, peer, place, now, &self.limits, self.tls.state());
        self.connections[index as usize] = Some(Box::new(connection));
        self.by_id.insert(id, index);
        self.has_handshakes = true;
        self.note(index);
    }

    fn start_tls(&mut self, index: u32, connection: ConnectionId, deadline: Instant) {
        let Some(socket) = self.connections[index as usize].as_mut().map(|found| found.wire().clone_socket())
        else {
            return;
        };
        match socket {
            Ok(socket) => {
                let mailbox = Arc::clone(&self.mailbox);
                let on_end = move |secured| mailbox.post(RingMessage::TlsStarted { connection, secured });
                self.tls.start_handshake(connection, socket, deadline, on_end);
            }
            Err(error) => {
                warn!(connection = connection.0, %error, "no descriptor for a TLS handshake");
                self.mailbox.post(RingMessage::TlsStarted { connection, secured: None });
            }
        }
    }

    fn with(&mut self, id: ConnectionId, act: impl FnOnce(&mut SessionIo, &mut Ring)) {
        // One that is gone was reported as closed; the message crossed the report.
        let Some(index) = self.by_id.get(&id).copied() else { return };
        if let Some(connection) = self.connections[index as usize].as_mut() {
            act(connection, &mut self.ring);
            self.note(index);
        }
    }

    /// Has the connection advanced in this pass.
    fn note(&mut self, index: u32) {
        if let Some(connection) = self.connections[index as usize].as_mut()
            && !std::mem::replace(&mut connection.is_listed, true)
        {
            self.news.push(index);
        }
    }

    fn check_deadlines(&mut self, now: Instant) {
        let is_over = self.shutdown_deadline.is_some_and(|deadline| now >= deadline);
        for connection in self.connections.iter_mut().flatten() {
            if is_over || connection.is_late(now) {
                connection.close(&mut self.ring);
            }
        }
        self.has_handshakes = self.connections.iter().flatten().any(|connection| connection.has_to_end());
        self.checked_at = now;
        if self.ring.has_waiters() {
            let limit = self.limits.stall_timeout;
            for connection in self.connections.iter_mut().flatten() {
                if connection.stalled_for(now).is_some_and(|stalled| stalled >= limit) {
                    warn!(
                        connection = connection.id().0,
                        "closing a connection that stands still with what others need"
                    );
                    connection.close(&mut self.ring);
                }
            }
        }
    }

    fn remove(&mut self, index: u32) {
        let Some(mut connection) = self.connections[index as usize].take() else { return };
        assert!(connection.is_drained(), "operations are in flight");
        let id = connection.id();
        connection.release_all(&mut self.ring);
        // Its socket is closed, and its hold on the volume let go of, before anybody hears of it.
        drop(connection);
        self.free_indices.push(index);
        self.by_id.remove(&id);
        self.mailbox.connection_removed();
        debug!(connection = id.0, "connection is gone");
        self.tell_gate(GateMessage::Closed { connection: id });
    }

    fn tell_gate(&self, message: GateMessage) {
        // The gate outlives the rings; if it does not, the process is ending.
        let _ = self.gate.send(message);
    }
}
