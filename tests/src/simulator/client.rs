//! The simulated device process: the real connections, streams, reconnects and counters, without ring, sockets and threads.
//!
//! Stands for `client/src/device/queue/run.rs` (its passes), `client/src/device/connect/redial.rs` (dialling) and `client/src/device/attachment.rs` (the main thread). Each
//! queue has lanes; a lane's operations on its socket are out until the world lets them go on, byte by byte if it likes. Block
//! requests belong to the kernel ([`Bio`]): they outlive the process, and the next one gets them again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use client::contract::StallPolicy;
use client::device::liveness::{Probes, Silence};
use client::device::queue::balance::Balance;
use client::device::queue::connection::{
    Completion, Connection, Follows, Operation, PayloadSource, Piece, Resend,
};
use client::device::queue::parts::QueueSilence;
use client::device::queue::quiet::{self, Patience, Quiet, TICK};
use client::device::queue::stream::{Incoming, Outgoing, Stretch};
use client::device::queue::unflushed::Unflushed;
use client::device::reconnect::{Condition, Loss, Output, Reconnect};
use fastrand::Rng;
use proto::export_name::{AttachmentExportName, ExportDescription, PROBE_SLOT, Secret};
use proto::nbd::handshake::client::{ClientHandshake, ClientHandshakeError};
use proto::nbd::reply::ERR_UNKNOWN;
use proto::nbd::transmission::{Command, CommandFlags, REQUEST_BYTES, Request, SIMPLE_REPLY_BYTES};
use uuid::Uuid;

use super::Mutant;
use super::coverage::Coverage;
use super::network::{End, Link, LinkId};
use super::server::{EIO, choose};
use crate::block_history::{BLOCK_BYTES, SentFlush, SentRead, SentWrite};

const INBOX_BYTES: usize = 1024;
const OUTBOX_BYTES: usize = 8192;
const PIECES_MAX: usize = 8;
/// As in the product: how long replies may be due without a byte, and a dial without an answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// What the oracle is to be told when a request ends.
#[derive(Debug)]
pub(super) enum Note {
    Read(SentRead),
    Write {
        write: SentWrite,
        is_durable: bool,
    },
    Flush(SentFlush),
    /// Whatever comes of it.
    Gone,
}

/// A request of the block layer.
#[derive(Debug)]
pub(super) struct Bio {
    pub(super) operation: Operation,
    /// Its pages.
    pub(super) data: Vec<u8>,
    pub(super) note: Note,
    pub(super) submitted_at: Instant,
}

/// The device's requests, by queue and tag.
pub(super) type Bios = Vec<Vec<Option<Bio>>>;

/// A request that has ended.
pub(super) struct EndedBio {
    pub(super) bio: Bio,
    pub(super) result: Result<(), i32>,
}

enum Receive {
    Payload(u16, Stretch),
    Inbox(usize, usize),
}

struct Lane {
    connection: Connection,
    incoming: Incoming,
    outgoing: Outgoing,
    link: Option<LinkId>,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    receives: VecDeque<Receive>,
    sends: VecDeque<(Piece, Stretch)>,
    waits_for_room: bool,
    is_distrusted: bool,
    quiet: Quiet,
}

enum QueueCommand {
    Connect(Vec<LinkId>),
    Disconnect,
    GiveUp,
    /// The queue does not look for so many steps.
    Idle(u32),
}

struct Queue {
    lanes: Vec<Lane>,
    balance: Balance,
    commands: VecDeque<QueueCommand>,
    has_loss: bool,
    /// For so many passes after a loss that the main thread heard of, what was acknowledged is not counted.
    counts_later: u32,
    covered: Vec<Vec<u64>>,
    /// Receives into pages that nobody waits for any more.
    forgotten: Vec<(LinkId, u16, Stretch)>,
    dial: Option<Dial>,
    ticked_at: Instant,
    is_told_silent: bool,
}

/// As in `client/src/device/connect/probe.rs`.
struct Probe {
    link: LinkId,
    handshake: Option<Box<ClientHandshake>>,
    received_bytes: usize,
    gives_up_at: Instant,
}

struct Dial {
    resumes_at: Instant,
    pause: Duration,
    gives_up_at: Instant,
    handshake: Option<(LinkId, Box<ClientHandshake>)>,
    opened: Vec<LinkId>,
    incarnation: Option<String>,
}

enum MainEvent {
    Disconnected(u16, Option<Duration>),
    Silent(u16, Option<QueueSilence>),
    Probed(bool),
    Opened(u16, Vec<LinkId>, String),
    Refused,
}

/// How the connections are made, for all processes of a device.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    pub(super) attachment_id: Uuid,
    pub(super) secret: Secret,
    pub(super) session_epoch: u64,
    pub(super) server_id: Uuid,
    pub(super) volume_uid: Uuid,
    pub(super) nr_queues: u16,
    pub(super) nr_connections: u16,
    pub(super) queue_depth: u16,
    pub(super) small_bytes_max: u32,
    /// WRITEs' data is sent from its pages by operations that are linked, or from copies at once.
    pub(super) stages: bool,
    pub(super) is_volatile_cache: bool,
    pub(super) policy: StallPolicy,
}

/// A device process.
pub(super) struct Client {
    pub(super) spec: Spec,
    queues: Vec<Queue>,
    reconnect: Reconnect<Vec<LinkId>>,
    unflushed: Unflushed,
    events: VecDeque<MainEvent>,
    probe: Option<Probe>,
    mutant: Option<Mutant>,
}

pub(super) struct Surroundings<'a> {
    pub(super) links: &'a mut Vec<Link>,
    pub(super) bios: &'a mut Bios,
    pub(super) ended: &'a mut Vec<EndedBio>,
    pub(super) rng: &'a mut Rng,
    pub(super) coverage: &'a mut Coverage,
    pub(super) now: Instant,
    pub(super) room_bytes: usize,
    /// Connections to the server that were just begun.
    pub(super) dialled: &'a mut Vec<LinkId>,
    pub(super) is_server_up: bool,
}

struct Pages<'a> {
    bios: &'a [Option<Bio>],
}

impl PayloadSource for Pages<'_> {
    type Error = std::convert::Infallible;

    fn gather(&mut self, tag: u16, payload: &mut [u8]) -> Result<(), Self::Error> {
        let bio = self.bios[usize::from(tag)].as_ref().expect("it is in flight");
        payload.copy_from_slice(&bio.data);
        Ok(())
    }

    fn stage(&mut self, _: u16, _: u32) -> Result<bool, Self::Error> {
        Ok(true)
    }
}

impl Client {
    /// A process that is to serve `bios`. `former`: the incarnation that the process before it knew.
    pub(super) fn new(
        spec: Spec,
        former: Option<String>,
        incarnation_now: String,
        mutant: Option<Mutant>,
        world: &mut Surroundings<'_>,
    ) -> Self {
        let is_recovered = former.is_some();
        let incarnation = former.unwrap_or(incarnation_now);
        let unflushed = Unflushed::new(spec.nr_queues);
        if is_recovered && spec.is_volatile_cache {
            unflushed.acknowledged(0);
        }
        let lanes_of = |queue: u16| (queue..spec.nr_connections).step_by(usize::from(spec.nr_queues)).count();
        let queue = |queue: u16| Queue {
            lanes: (0..lanes_of(queue)).map(|_| Lane::new(&spec)).collect(),
            balance: Balance::new(lanes_of(queue), spec.queue_depth),
            commands: VecDeque::new(),
            has_loss: false,
            counts_later: 0,
            covered: vec![vec![0; usize::from(spec.nr_queues)]; usize::from(spec.queue_depth)],
            forgotten: Vec::new(),
            dial: None,
            ticked_at: world.now,
            is_told_silent: false,
        };
        let probes = Probes::new(REPLY_TIMEOUT, true);
        let mut client = Self {
            queues: (0..spec.nr_queues).map(queue).collect(),
            reconnect: Reconnect::new(spec.nr_queues, incarnation, spec.policy, probes),
            unflushed,
            events: VecDeque::new(),
            probe: None,
            mutant,
            spec,
        };
        // It has no connections to begin with, and what the kernel gives again waits for the first.
        for queue_id in 0..client.spec.nr_queues {
            client.fail(queue_id, false, world);
            client.reap(queue_id, world);
            for tag in 0..client.spec.queue_depth {
                if let Some(bio) = &world.bios[usize::from(queue_id)][usize::from(tag)] {
                    world.coverage.count("a request that the next process gets again");
                    let operation = bio.operation;
                    client.submit(queue_id, tag, operation);
                }
            }
        }
        client
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub(super) fn condition(&self) -> Condition {
        self.reconnect.condition()
    }

    /// Whether every queue has its connections, and has heard of it.
    pub(super) fn is_connected(&self) -> bool {
        self.queues.iter().all(|queue| queue.commands.is_empty() && queue.is_up())
    }

    pub(super) fn incarnation(&self) -> String {
        self.reconnect.incarnation().to_owned()
    }

    pub(super) fn told_policy(&mut self, policy: StallPolicy, now: Instant) {
        self.spec.policy = policy;
        self.reconnect.told_policy(policy, now);
    }

    /// A request arrives on a queue.
    pub(super) fn submit(&mut self, queue_id: u16, tag: u16, operation: Operation) {
        let queue = &mut self.queues[usize::from(queue_id)];
        if operation.command == Command::Flush {
            self.unflushed.flush_begins(&mut queue.covered[usize::from(tag)]);
        }
        let lane = queue.balance.choose(tag);
        queue.lanes[usize::from(lane)].connection.submit(tag, operation);
    }

    /// The process dies: what it has sent may arrive yet.
    pub(super) fn die(&mut self, links: &mut [Link], rng: &mut Rng) {
        for queue in &self.queues {
            let lanes = queue.lanes.iter().filter_map(|lane| lane.link);
            let dial = queue.dial.iter().flat_map(|dial| {
                dial.opened.iter().copied().chain(dial.handshake.iter().map(|(link, _)| *link))
            });
            let probe = self.probe.iter().map(|probe| probe.link);
            for link in lanes.chain(dial).chain(probe) {
                abandon(&mut links[link], rng);
            }
        }
    }

    /// Links that it uses, for whoever cuts them.
    pub(super) fn links(&self) -> Vec<LinkId> {
        self.queues.iter().flat_map(|queue| queue.lanes.iter().filter_map(|lane| lane.link)).collect()
    }

    /// One of the things it could do now; false: there was nothing.
    pub(super) fn step(&mut self, world: &mut Surroundings<'_>) -> bool {
        let queue_id = world.rng.u16(..self.spec.nr_queues);
        match world.rng.u8(..8) {
            0 => self.main_step(world) | self.probe_step(world),
            1 => self.dial_step(queue_id, world),
            2 => self.command_step(queue_id, world),
            _ => self.queue_step(queue_id, world),
        }
    }

    /// Everything that it could do now; false: there was nothing.
    pub(super) fn step_all(&mut self, world: &mut Surroundings<'_>) -> bool {
        let mut has_done = self.main_step(world) | self.probe_step(world);
        for queue_id in 0..self.spec.nr_queues {
            has_done |= self.dial_step(queue_id, world);
            has_done |= self.command_step(queue_id, world);
            self.look_for_silence(queue_id, world);
            for lane in 0..self.queues[usize::from(queue_id)].lanes.len() {
                has_done |= self.send_step(queue_id, lane, world);
                has_done |= self.receive_step(queue_id, lane, world);
            }
            has_done |= self.end_of_pass(queue_id, world);
        }
        has_done
    }

    // ------------------------------------------------------------------------------------------------ main thread

    fn main_step(&mut self, world: &mut Surroundings<'_>) -> bool {
        let mut outputs = Vec::new();
        let event = self.events.pop_front();
        let has_event = event.is_some();
        let unflushed = &self.unflushed;
        match event {
            Some(MainEvent::Disconnected(queue_id, oldest)) => {
                let oldest_sent = oldest.map(|oldest| world.now - oldest);
                let loss = Loss { reason: "cut", served_nothing: false, oldest_sent };
                self.reconnect.disconnected(queue_id, &loss, world.now, || unflushed.any(), &mut outputs);
            }
            Some(MainEvent::Silent(queue_id, silence)) => {
                let forgets_age = self.mutant == Some(Mutant::ProbesForEver);
                let is_deaf = self.mutant == Some(Mutant::PongsIgnored);
                let silence = silence.map(|silence| Silence {
                    since: world.now - silence.silent,
                    heard_at: silence.unheard.map(|it| world.now - if is_deaf { silence.silent } else { it }),
                    oldest_sent: if forgets_age { world.now } else { world.now - silence.oldest },
                });
                self.reconnect.silent(queue_id, silence, world.now, &mut outputs);
            }
            Some(MainEvent::Probed(is_answered)) => {
                world.coverage.count(if is_answered {
                    "a probe is answered"
                } else {
                    "a probe is not answered"
                });
                let is_believed = self.mutant != Some(Mutant::ProbesIgnored);
                self.reconnect.probed(is_answered && is_believed, world.now);
            }
            Some(MainEvent::Opened(queue_id, links, told)) => {
                let incarnation = match self.mutant {
                    Some(Mutant::IncarnationIgnored) => self.reconnect.incarnation().to_owned(),
                    _ => told,
                };
                let is_another = incarnation != self.reconnect.incarnation();
                self.reconnect.dialled(queue_id, links, incarnation, || unflushed.any(), &mut outputs);
                if is_another {
                    world.coverage.count("a server of another incarnation");
                }
            }
            Some(MainEvent::Refused) => {
                self.reconnect.refused_for_good("fenced".to_owned(), &mut outputs);
            }
            None => {}
        }
        let before = outputs.len();
        self.reconnect.tick(world.now, &mut outputs);
        let has_given_up = outputs[before..]
            .iter()
            .any(|output| matches!(output, Output::GiveUp(_) | Output::Disconnect(..)));
        if has_given_up {
            world.coverage.count("requests are given up");
        }
        let has_outputs = !outputs.is_empty();
        let gives_up_alone = self.is(Mutant::GivesUpAlone) && has_given_up;
        for queue in self.queues.iter_mut().filter(|queue| gives_up_alone && !queue.is_up()) {
            queue.commands.push_back(QueueCommand::GiveUp);
        }
        for output in outputs {
            match output {
                Output::Dial(queue_id) => {
                    let dial = Dial {
                        resumes_at: world.now,
                        pause: Duration::from_millis(100),
                        gives_up_at: world.now,
                        handshake: None,
                        opened: Vec::new(),
                        incarnation: None,
                    };
                    self.queues[usize::from(queue_id)].dial = Some(dial);
                }
                Output::Connect(queue_id, links) => {
                    self.queues[usize::from(queue_id)].commands.push_back(QueueCommand::Connect(links));
                }
                Output::Disconnect(queue_id, _) if gives_up_alone => {
                    let commands = &mut self.queues[usize::from(queue_id)].commands;
                    commands.extend([QueueCommand::Idle(400), QueueCommand::Disconnect]);
                }
                Output::Disconnect(queue_id, _) => {
                    self.queues[usize::from(queue_id)].commands.push_back(QueueCommand::Disconnect);
                }
                Output::GiveUp(queue_id) => {
                    self.queues[usize::from(queue_id)].commands.push_back(QueueCommand::GiveUp);
                }
                Output::Probe => self.start_probe(world),
            }
        }
        has_event || has_outputs
    }

    // ------------------------------------------------------------------------------------------------ probing

    fn start_probe(&mut self, world: &mut Surroundings<'_>) {
        if !world.is_server_up {
            self.events.push_back(MainEvent::Probed(false));
            return;
        }
        let (link, handshake) = begin_dial(&self.spec, PROBE_SLOT, world);
        let gives_up_at = world.now + DIAL_TIMEOUT;
        self.probe = Some(Probe { link, handshake: Some(handshake), received_bytes: 0, gives_up_at });
    }

    fn probe_step(&mut self, world: &mut Surroundings<'_>) -> bool {
        let Some(probe) = &mut self.probe else { return false };
        let pipe = &mut world.links[probe.link].to_client;
        let readable = pipe.readable();
        let is_over = readable.is_empty() && pipe.end().is_some();
        let has_failed = is_over || world.now >= probe.gives_up_at;
        let mut outcome = has_failed.then_some(false);
        match &mut probe.handshake {
            Some(handshake) if !readable.is_empty() && !has_failed => {
                let mut out = Vec::new();
                let answer = handshake.handle_bytes(readable, &mut out);
                let bytes = readable.len();
                pipe.consume(bytes);
                match answer {
                    Ok(opened) if opened.is_some() => {
                        let request = Request {
                            flags: CommandFlags::NONE,
                            command: Command::Read,
                            cookie: 7,
                            offset_bytes: 0,
                            length_bytes: BLOCK_BYTES as u64,
                        };
                        out.extend(request.encode());
                        probe.handshake = None;
                    }
                    Ok(_) => {}
                    Err(_) => outcome = Some(false),
                }
                world.links[probe.link].to_server.write(&out);
            }
            None if !readable.is_empty() && !has_failed => {
                let bytes = readable.len();
                pipe.consume(bytes);
                probe.received_bytes += bytes;
                outcome = (probe.received_bytes >= SIMPLE_REPLY_BYTES + BLOCK_BYTES).then_some(true);
            }
            _ if has_failed => {}
            _ => return false,
        }
        if let Some(is_answered) = outcome {
            abandon(&mut world.links[probe.link], world.rng);
            self.probe = None;
            self.events.push_back(MainEvent::Probed(is_answered));
        }
        true
    }

    // ------------------------------------------------------------------------------------------------ dialling

    fn dial_step(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let (spec, changes_slots) = (self.spec.clone(), self.is(Mutant::OtherSlot));
        let queue = &mut self.queues[usize::from(queue_id)];
        let Some(dial) = &mut queue.dial else { return false };
        if world.now < dial.resumes_at {
            return false;
        }
        let Some((link, handshake)) = &mut dial.handshake else {
            if !world.is_server_up {
                dial.fail(world);
                return true;
            }
            let lane = dial.opened.len() as u32;
            let mut slot = u32::from(queue_id) + lane * u32::from(spec.nr_queues);
            if changes_slots {
                slot += u32::from(spec.nr_connections) * world.rng.u32(..2);
            }
            dial.handshake = Some(begin_dial(&spec, slot, world));
            dial.gives_up_at = world.now + DIAL_TIMEOUT;
            return true;
        };
        let pipe = &mut world.links[*link].to_client;
        let mut out = Vec::new();
        let readable = pipe.readable();
        if readable.is_empty() {
            if pipe.end().is_some() || world.now >= dial.gives_up_at {
                dial.fail(world);
                return true;
            }
            return false;
        }
        let answer = handshake.handle_bytes(readable, &mut out);
        let bytes = readable.len();
        pipe.consume(bytes);
        world.links[*link].to_server.write(&out);
        let export = match answer {
            Ok(None) => return true,
            Ok(Some(export)) => export,
            Err(ClientHandshakeError::Refused { reply: ERR_UNKNOWN, .. }) => {
                dial.fail(world);
                queue.dial = None;
                self.events.push_back(MainEvent::Refused);
                return true;
            }
            Err(_) => {
                world.coverage.count("a dial that is to be repeated");
                dial.fail(world);
                return true;
            }
        };
        let told: ExportDescription =
            export.description.as_deref().unwrap_or_default().parse().expect("our server describes itself");
        assert_eq!((told.server_id, told.volume_uid), (spec.server_id, spec.volume_uid));
        if dial.incarnation.as_ref().is_some_and(|other| *other != told.incarnation) {
            dial.fail(world);
            return true;
        }
        dial.incarnation = Some(told.incarnation);
        dial.opened.push(*link);
        dial.handshake = None;
        if dial.opened.len() == queue.lanes.len()
            && let Some(Dial { opened, incarnation: Some(incarnation), .. }) = queue.dial.take()
        {
            self.events.push_back(MainEvent::Opened(queue_id, opened, incarnation));
        }
        true
    }

    // ------------------------------------------------------------------------------------------------ queue thread

    fn command_step(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let Some(command) = self.queues[usize::from(queue_id)].commands.pop_front() else { return false };
        match command {
            QueueCommand::Idle(steps) => {
                if steps > 0 {
                    let commands = &mut self.queues[usize::from(queue_id)].commands;
                    commands.push_front(QueueCommand::Idle(steps - 1));
                }
            }
            QueueCommand::Disconnect => self.fail(queue_id, false, world),
            QueueCommand::GiveUp => {
                for lane in &mut self.queues[usize::from(queue_id)].lanes {
                    lane.connection.give_up();
                }
            }
            QueueCommand::Connect(links) => {
                self.commit(queue_id, world);
                let queue = &mut self.queues[usize::from(queue_id)];
                for (lane, link) in queue.lanes.iter_mut().zip(links) {
                    lane.link = Some(link);
                    lane.connection.connected();
                    lane.quiet.connected();
                }
                world.coverage.count("a queue is connected");
            }
        }
        self.end_of_pass(queue_id, world);
        true
    }

    fn queue_step(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let queue = &mut self.queues[usize::from(queue_id)];
        let lane = choose(0..queue.lanes.len(), world.rng).expect("a queue has a lane");
        let has_done = match world.rng.u8(..3) {
            0 => self.send_step(queue_id, lane, world),
            1 if !queue.forgotten.is_empty() => forgotten_step(queue, queue_id, world),
            _ => self.receive_step(queue_id, lane, world),
        };
        self.look_for_silence(queue_id, world);
        self.end_of_pass(queue_id, world) || has_done
    }

    /// As at every tick of the queue.
    fn look_for_silence(&mut self, queue_id: u16, world: &mut Surroundings<'_>) {
        let patience = Patience::new(REPLY_TIMEOUT, true);
        let queue = &mut self.queues[usize::from(queue_id)];
        if world.now.duration_since(queue.ticked_at) < TICK {
            return;
        }
        while world.now.duration_since(queue.ticked_at) >= TICK {
            queue.ticked_at += TICK;
            queue.lanes.iter_mut().for_each(|lane| lane.quiet.tick(&mut lane.connection, patience));
        }
        let lanes = queue.lanes.iter().map(|lane| (&lane.quiet, &lane.connection));
        let silence = quiet::of_queue(lanes, patience).filter(|_| queue.is_up());
        if silence.is_some() || queue.is_told_silent {
            world.coverage.count("replies are due for long");
            queue.is_told_silent = silence.is_some();
            self.events.push_back(MainEvent::Silent(queue_id, silence));
        }
    }

    /// What every pass ends with. True: something was sent or ended.
    fn end_of_pass(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let queue = &mut self.queues[usize::from(queue_id)];
        let skips_reaping = self.mutant == Some(Mutant::NoReaping);
        if queue.has_loss && (skips_reaping || queue.lanes.iter().all(|lane| lane.operations_out() == 0)) {
            self.reap(queue_id, world);
        }
        let queue = &mut self.queues[usize::from(queue_id)];
        let counts_later = queue.counts_later > 0;
        queue.counts_later = queue.counts_later.saturating_sub(1);
        let has_ended = !counts_later && self.commit(queue_id, world);
        let queue = &mut self.queues[usize::from(queue_id)];
        for lane in &mut queue.lanes {
            lane.push_receive();
        }
        let bios = &world.bios[usize::from(queue_id)];
        let mut has_sent = false;
        let stages = self.spec.stages;
        for lane in &mut queue.lanes {
            has_sent |= lane.push_send(bios, stages, world.links, world.rng, world.room_bytes);
        }
        has_ended || has_sent
    }

    /// Nothing can come from the lost connections any more.
    fn reap(&mut self, queue_id: u16, world: &mut Surroundings<'_>) {
        let counts_late = self.is(Mutant::CountedLate);
        let queue = &mut self.queues[usize::from(queue_id)];
        queue.has_loss = false;
        for lane in &mut queue.lanes {
            for receive in lane.receives.drain(..) {
                if let (Receive::Payload(tag, rest), Some(link)) = (receive, lane.link) {
                    queue.forgotten.push((link, tag, rest));
                }
            }
            if lane.operations_out() > 0 {
                lane.outgoing = Outgoing::new(PIECES_MAX);
            }
            let is_distrusted = std::mem::take(&mut lane.is_distrusted);
            let in_flight = lane.connection.in_flight();
            lane.connection.reaped(if is_distrusted { Resend::Nothing } else { Resend::Everything });
            if in_flight > 0 && !is_distrusted {
                world.coverage.count("requests are sent again");
            }
            lane.incoming = Incoming::default();
            lane.outgoing.abandon();
            lane.sends.clear();
            lane.waits_for_room = false;
            lane.link = None;
        }
        if counts_late {
            queue.counts_later = 200;
        } else {
            self.commit(queue_id, world);
        }
        let queue = &mut self.queues[usize::from(queue_id)];
        queue.is_told_silent = false;
        let oldest = queue.oldest();
        self.events.push_back(MainEvent::Disconnected(queue_id, oldest));
    }

    fn fail(&mut self, queue_id: u16, is_distrusted: bool, world: &mut Surroundings<'_>) {
        let queue = &mut self.queues[usize::from(queue_id)];
        if !queue.is_up() {
            return;
        }
        for lane in &mut queue.lanes {
            lane.is_distrusted |= is_distrusted;
            lane.connection.fail();
            if let Some(link) = lane.link {
                abandon(&mut world.links[link], world.rng);
            }
        }
        queue.has_loss = true;
    }

    fn commit(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let mut has_ended = false;
        let flush_covers_too_much = self.is(Mutant::FlushCoversTooMuch);
        let queue = &mut self.queues[usize::from(queue_id)];
        for lane in &mut queue.lanes {
            while let Some(Completion { tag, result }) = lane.connection.take_completion() {
                queue.balance.ended(tag);
                has_ended = true;
                let bio =
                    world.bios[usize::from(queue_id)][usize::from(tag)].take().expect("it was in flight");
                let is_fua = bio.operation.flags.contains(CommandFlags::FUA);
                let covered = &mut queue.covered[usize::from(tag)];
                match bio.operation.command {
                    _ if result.is_err() => {}
                    Command::Write | Command::Trim | Command::WriteZeroes
                        if self.spec.is_volatile_cache && !is_fua =>
                    {
                        self.unflushed.acknowledged(queue_id);
                    }
                    Command::Flush => {
                        if flush_covers_too_much {
                            self.unflushed.flush_begins(covered);
                        }
                        self.unflushed.flush_succeeded(covered);
                    }
                    _ => {}
                }
                world.ended.push(EndedBio { bio, result });
            }
        }
        has_ended
    }

    // ------------------------------------------------------------------------------------------------ the wire

    fn send_step(&mut self, queue_id: u16, lane: usize, world: &mut Surroundings<'_>) -> bool {
        let lane = &mut self.queues[usize::from(queue_id)].lanes[lane];
        let Some(link) = lane.link else { return false };
        let pipe = &mut world.links[link].to_server;
        let is_open = pipe.is_open();
        let room = pipe.room(world.room_bytes);
        if lane.waits_for_room {
            if room == 0 && is_open {
                return false;
            }
            lane.waits_for_room = false;
            lane.outgoing.room_came();
            return true;
        }
        let Some((piece, rest)) = lane.sends.front().copied() else { return false };
        if room == 0 && is_open {
            return false;
        }
        lane.sends.pop_front();
        let result = if is_open {
            let bytes = part(room.min(rest.rest_bytes() as usize), world.rng);
            let from = rest.done_bytes() as usize..rest.done_bytes() as usize + bytes;
            match piece {
                Piece::Outbox { start, .. } => pipe.write(&lane.outbox[start..][from]),
                // The pages as they are now.
                Piece::Payload { tag, .. } => match &world.bios[usize::from(queue_id)][usize::from(tag)] {
                    Some(bio) => pipe.write(&bio.data[from]),
                    None => panic!("pages of a request that has ended are being sent"),
                },
            }
            bytes as i32
        } else {
            -rustix::io::Errno::PIPE.raw_os_error()
        };
        let is_short = result != rest.rest_bytes() as i32;
        let mut outcome = lane.outgoing.completed(result).map(|is_done| is_done && lane.connection.is_up());
        if is_short {
            for _ in lane.sends.drain(..) {
                let canceled = lane.outgoing.completed(-rustix::io::Errno::CANCELED.raw_os_error());
                outcome = outcome.and_then(|_| canceled.map(|_| false));
            }
        }
        match outcome {
            Ok(true) => lane.connection.batch_sent(),
            Ok(false) => {}
            Err(_) => self.fail(queue_id, false, world),
        }
        true
    }

    fn receive_step(&mut self, queue_id: u16, index: usize, world: &mut Surroundings<'_>) -> bool {
        let lane = &mut self.queues[usize::from(queue_id)].lanes[index];
        let Some(link) = lane.link else { return false };
        let Some(receive) = lane.receives.front() else { return false };
        let pipe = &mut world.links[link].to_client;
        let readable = pipe.readable();
        // Shut down by this side, it gives what has arrived, or nothing.
        let is_over = pipe.end().is_some() || pipe.is_unread && (readable.is_empty() || world.rng.bool());
        if readable.is_empty() && !is_over {
            return false;
        }
        let wanted = match receive {
            Receive::Payload(_, rest) => rest.rest_bytes() as usize,
            Receive::Inbox(start, end) => end - start,
        };
        let bytes = if is_over { 0 } else { part(readable.len().min(wanted), world.rng) };
        if bytes > 0 {
            match receive {
                Receive::Payload(..) => lane.quiet.payload_came(),
                Receive::Inbox(..) => lane.quiet.something_came(),
            }
            if !lane.connection.is_up() {
                world.coverage.count("bytes come after a loss");
            }
        }
        let receive = lane.receives.pop_front().expect("it was looked at");
        match receive {
            Receive::Payload(tag, rest) => {
                if let Some(bio) = &mut world.bios[usize::from(queue_id)][usize::from(tag)] {
                    let start = rest.done_bytes() as usize;
                    bio.data[start..start + bytes].copy_from_slice(&readable[..bytes]);
                }
                pipe.consume(bytes);
                let outcome = lane.incoming.payload_completed(bytes as i32);
                let mut is_broken = outcome.is_err();
                if bytes < wanted
                    && let Some(Receive::Inbox(..)) = lane.receives.pop_front()
                {
                    let canceled = -rustix::io::Errno::CANCELED.raw_os_error();
                    is_broken |= lane.incoming.inbox_completed(canceled).is_err();
                }
                if let Ok(true) = outcome {
                    lane.connection.payload_received(tag);
                }
                if is_broken {
                    self.fail(queue_id, false, world);
                }
            }
            Receive::Inbox(start, _) => {
                lane.inbox[start..start + bytes].copy_from_slice(&readable[..bytes]);
                pipe.consume(bytes);
                match lane.incoming.inbox_completed(bytes as i32) {
                    Ok(()) if lane.connection.is_up() => self.take_headers(queue_id, index, world),
                    Ok(()) => {}
                    Err(_) => self.fail(queue_id, false, world),
                }
            }
        }
        true
    }

    fn take_headers(&mut self, queue_id: u16, index: usize, world: &mut Surroundings<'_>) {
        let forgets_sequence = self.is(Mutant::TagOnlyCookie);
        let lane = &mut self.queues[usize::from(queue_id)].lanes[index];
        while let Some(place) = lane.incoming.take_header() {
            let mut header = [0; SIMPLE_REPLY_BYTES];
            header.copy_from_slice(&lane.inbox[place]);
            if forgets_sequence {
                let tag = u16::from_be_bytes([header[14], header[15]]);
                let cookie = lane.connection.cookie(tag).unwrap_or_default();
                header[8..].copy_from_slice(&cookie.to_be_bytes());
            }
            let follows = match lane.connection.header_received(&header) {
                Ok(follows) => follows,
                Err(_) => {
                    world.coverage.count("a reply to nothing");
                    return self.fail(queue_id, true, world);
                }
            };
            let Follows::Payload { tag, len_bytes } = follows else { continue };
            let (here, is_all) = lane.incoming.take_payload(tag, len_bytes);
            let bio = world.bios[usize::from(queue_id)][usize::from(tag)].as_mut().expect("it is in flight");
            bio.data[..here.len()].copy_from_slice(&lane.inbox[here]);
            if is_all {
                lane.connection.payload_received(tag);
            }
        }
        let left = lane.incoming.compact();
        lane.inbox.copy_within(left, 0);
    }
}

/// A connection to the server is begun, in a slot.
fn begin_dial(spec: &Spec, slot: u32, world: &mut Surroundings<'_>) -> (LinkId, Box<ClientHandshake>) {
    let (attachment_id, secret) = (spec.attachment_id, spec.secret.clone());
    let name = AttachmentExportName { attachment_id, secret, epoch: spec.session_epoch, slot };
    let handshake = ClientHandshake::new(&name.expose()).expect("the name is short");
    world.links.push(Link::default());
    let link = world.links.len() - 1;
    world.dialled.push(link);
    (link, Box::new(handshake))
}

impl Queue {
    /// For how long the oldest request that waits has been known to a server.
    fn oldest(&self) -> Option<Duration> {
        quiet::oldest(self.lanes.iter().map(|lane| &lane.connection))
    }

    fn is_up(&self) -> bool {
        self.lanes.iter().all(|lane| lane.connection.is_up())
    }
}

impl Dial {
    /// This attempt is over; the next follows after a pause.
    fn fail(&mut self, world: &mut Surroundings<'_>) {
        for link in self.opened.drain(..).chain(self.handshake.take().map(|(link, _)| link)) {
            abandon(&mut world.links[link], world.rng);
        }
        self.incarnation = None;
        self.resumes_at = world.now + self.pause.mul_f64(world.rng.f64().mul_add(0.5, 0.5));
        self.pause = self.pause.mul_f64(1.5).min(Duration::from_secs(5));
    }
}

impl Lane {
    fn new(spec: &Spec) -> Self {
        Self {
            connection: Connection::new(spec.queue_depth, spec.small_bytes_max),
            incoming: Incoming::default(),
            outgoing: Outgoing::new(PIECES_MAX),
            link: None,
            inbox: vec![0; INBOX_BYTES],
            outbox: vec![0; OUTBOX_BYTES.max(REQUEST_BYTES + spec.small_bytes_max as usize)],
            receives: VecDeque::new(),
            sends: VecDeque::new(),
            waits_for_room: false,
            is_distrusted: false,
            quiet: Quiet::default(),
        }
    }

    fn operations_out(&self) -> usize {
        self.incoming.operations_out() + self.outgoing.operations_out()
    }

    fn push_receive(&mut self) {
        if self.incoming.operations_out() > 0 || !self.connection.is_up() || self.link.is_none() {
            return;
        }
        let inbox_end =
            if self.connection.expects_large_payload() { SIMPLE_REPLY_BYTES } else { INBOX_BYTES };
        let (payload, inbox) = self.incoming.push(inbox_end);
        self.receives.extend(payload.map(|(tag, rest)| Receive::Payload(tag, rest)));
        self.receives.push_back(Receive::Inbox(inbox.start, inbox.end));
    }

    fn push_send(
        &mut self,
        bios: &[Option<Bio>],
        stages: bool,
        links: &mut [Link],
        rng: &mut Rng,
        room_bytes: usize,
    ) -> bool {
        let Some(link) = self.link else { return false };
        let mut has_sent = false;
        loop {
            if self.outgoing.operations_out() > 0 || !self.connection.is_up() {
                return has_sent;
            }
            if self.outgoing.is_done() {
                let Self { connection, outgoing, outbox, .. } = self;
                let filled = outgoing
                    .next_batch(|pieces| connection.take_batch(outbox, pieces, PIECES_MAX, Pages { bios }));
                let Ok(()) = filled;
                if self.outgoing.is_done() {
                    return has_sent;
                }
            }
            has_sent = true;
            if !stages {
                self.sends.extend(self.outgoing.rest());
                self.outgoing.pushed();
                return true;
            }
            while let Some((piece, rest, _)) = self.outgoing.next() {
                let pipe = &mut links[link].to_server;
                let room = pipe.room(room_bytes).min(rest.rest_bytes() as usize);
                if room == 0 || !pipe.is_open() {
                    self.outgoing.waits_for_room();
                    self.waits_for_room = true;
                    return true;
                }
                let bytes = part(room, rng);
                let from = rest.done_bytes() as usize..rest.done_bytes() as usize + bytes;
                match piece {
                    Piece::Outbox { start, .. } => pipe.write(&self.outbox[start..][from]),
                    Piece::Payload { tag, .. } => {
                        let bio = bios[usize::from(tag)].as_ref().expect("it is in flight");
                        pipe.write(&bio.data[from]);
                    }
                }
                self.outgoing.sent(bytes as u32).expect("it was not more than there is");
            }
            self.connection.batch_sent();
        }
    }
}

/// This side is done with a connection: what it sent may arrive, at any time, or not.
fn abandon(link: &mut Link, rng: &mut Rng) {
    link.to_client.is_unread = true;
    link.delay = if rng.u8(..3) == 0 { rng.u32(..500) } else { 0 };
    if rng.bool() {
        link.to_server.close(End::Fin);
    } else {
        link.to_server.cut(rng.bool());
    }
}

/// A receive that nobody waits for any more brings bytes into the pages it was for.
fn forgotten_step(queue: &mut Queue, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
    let index = world.rng.usize(..queue.forgotten.len());
    let (link, tag, rest) = queue.forgotten[index];
    let pipe = &mut world.links[link].to_client;
    if pipe.readable().is_empty() {
        return false;
    }
    queue.forgotten.swap_remove(index);
    let bytes = pipe.readable().len().min(rest.rest_bytes() as usize);
    if let Some(bio) = &mut world.bios[usize::from(queue_id)][usize::from(tag)] {
        let start = rest.done_bytes() as usize;
        let bytes = bytes.min(bio.data.len().saturating_sub(start));
        if bytes > 0 {
            bio.data[start..start + bytes].copy_from_slice(&pipe.readable()[..bytes]);
        }
    }
    true
}

/// All of it, or a part.
fn part(bytes: usize, rng: &mut Rng) -> usize {
    if bytes < 2 || rng.u8(..4) > 0 { bytes } else { rng.usize(1..bytes) }
}

/// The errno that a request got which was given up.
pub(super) fn is_eio(result: Result<(), i32>) -> bool {
    result == Err(EIO)
}
