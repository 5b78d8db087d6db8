//! The simulated device process: the product's queues, redials, reconnects and counters, with a ring, sockets and threads that exist
//! only here.
//!
//! What is the product's: `QueueCore`, `Redial` and `Reconnect`, and all they use. What is here: the operations on sockets and pages
//! that a queue asks for ([`QueueIo`]), which are out until the world lets them go on, byte by byte if it likes; mailboxes in the place of
//! threads; and the mutants that alter what goes into the cores and comes out of them. Block requests belong to the kernel
//! ([`Bio`]): they outlive the process, and the next one gets them again.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use client::contract::{DeviceSpec, Encryption, ExportSpec, SessionRecord, StallPolicy};
use client::device::connect::dial::{DialError, Dialled};
use client::device::connect::redial::{Attempt, DiskFit, Next, Redial};
use client::device::connect::slots::{self, SlotError};
use client::device::liveness::Probes;
use client::device::queue::block_request::BlockRequest;
use client::device::queue::connection::{PayloadSource, Resend};
use client::device::queue::core::{LinkEvent, Lost, Pages, QueueCore, QueueIo, QueueSpec};
use client::device::queue::link::Loss;
use client::device::queue::quiet::{QueueSilence, TICK};
use client::device::queue::stream::Stretch;
use client::device::queue::unflushed::Unflushed;
use client::device::reconnect::{Condition, Output, Reconnect};
use fastrand::Rng;
use proto::export_name::{PROBE_SLOT, Secret};
use proto::nbd::handshake::client::ClientHandshake;
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES};
use uuid::Uuid;

use super::Mutant;
use super::coverage::Coverage;
use super::network::{End, Link, LinkId};
use super::server::{EIO, choose};
use crate::block_history::{BLOCK_BYTES, SentFlush, SentRead, SentWrite};

const INBOX_BYTES: usize = 1024;
const OUTBOX_BYTES: usize = 16 << 10;
/// As in the product: how long replies may be due without a byte, and a dial without an answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// What the kernel says of an operation behind one that stopped short.
const CANCELED: i32 = -rustix::io::Errno::CANCELED.raw_os_error();
const PIPE: i32 = -rustix::io::Errno::PIPE.raw_os_error();
/// With [`Mutant::CountedLate`], how many steps the main thread's look at the counters is late.
const LATE_STEPS: usize = 600;

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
    pub(super) request: BlockRequest,
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

/// An operation on a socket that is out.
#[derive(Debug, Clone, Copy)]
enum Receive {
    Payload(Pages),
    Inbox(usize, usize),
}

#[derive(Debug, Clone, Copy)]
enum Send {
    Outbox { start: usize, rest: Stretch },
    Payload(Pages),
}

impl Receive {
    fn wanted(&self) -> usize {
        match self {
            Self::Payload(pages) => pages.rest.rest_bytes() as usize,
            Self::Inbox(start, end) => end - start,
        }
    }
}

impl Send {
    /// Whose pages it names, if any.
    fn tag(&self) -> Option<u16> {
        match self {
            Self::Outbox { .. } => None,
            Self::Payload(pages) => Some(pages.tag),
        }
    }

    fn rest(&self) -> Stretch {
        match self {
            Self::Outbox { rest, .. } => *rest,
            Self::Payload(pages) => pages.rest,
        }
    }
}

/// A connection's socket, its memory, and what is out on it.
struct Wire {
    link: Option<LinkId>,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    receives: VecDeque<Receive>,
    sends: VecDeque<Send>,
    waits_for_room: bool,
}

enum QueueCommand {
    Connect(Vec<LinkId>),
    Disconnect(String),
    GiveUp,
    /// The queue does not look for so many steps.
    Idle(u32),
}

struct Queue {
    core: QueueCore,
    wires: Vec<Wire>,
    /// Requests that the kernel has brought, until the next pass.
    arrivals: VecDeque<(u16, BlockRequest)>,
    commands: VecDeque<QueueCommand>,
    /// Receives into pages that nobody waits for any more.
    forgotten: Vec<(LinkId, Pages)>,
    dial: Option<Dial>,
    ticked_at: Instant,
}

/// As in `client/src/device/connect/probe.rs`.
struct Probe {
    link: LinkId,
    handshake: Option<Box<ClientHandshake>>,
    received_bytes: usize,
    gives_up_at: Instant,
}

/// As in `client/src/device/connect/redial_thread.rs`.
struct Dial {
    redial: Redial<LinkId>,
    resumes_at: Instant,
    gives_up_at: Instant,
    handshake: Option<(LinkId, Box<ClientHandshake>)>,
    /// Of the attempt.
    opened: Vec<LinkId>,
}

enum MainEvent {
    Disconnected(u16, Lost),
    Silent(u16, Option<QueueSilence>),
    Probed(bool),
    Attempt(u16, Attempt<LinkId>),
}

/// How the connections are made, for all processes of a device.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    pub(super) attachment_id: Uuid,
    pub(super) secret: Secret,
    pub(super) session_epoch: u64,
    pub(super) server_id: Uuid,
    pub(super) volume_uid: Uuid,
    pub(super) capacity_bytes: u64,
    pub(super) nr_queues: u16,
    pub(super) nr_connections: u16,
    pub(super) queue_depth: u16,
    pub(super) small_bytes_max: u32,
    /// WRITEs' data is sent from its pages by operations that are linked, or from copies at once.
    pub(super) stages: bool,
    pub(super) is_volatile_cache: bool,
    pub(super) policy: StallPolicy,
}

impl Spec {
    /// The slots that a queue has.
    fn slots_of(&self, queue_id: u16) -> impl Iterator<Item = u32> {
        (queue_id..self.nr_connections).step_by(usize::from(self.nr_queues)).map(u32::from)
    }

    /// As the product has it.
    fn device_spec(&self) -> DeviceSpec {
        DeviceSpec {
            format_version: 1,
            attachment_id: self.attachment_id,
            target: "vol".to_owned(),
            addresses: vec!["simulated:1".to_owned()],
            export: ExportSpec::Attachment {
                server_id: self.server_id,
                volume_uid: self.volume_uid,
                secret: self.secret.expose().to_owned(),
                session_epoch: self.session_epoch,
            },
            read_only: false,
            data_path: "auto".to_owned(),
            nr_hw_queues: self.nr_queues,
            nr_connections: self.nr_connections,
            queue_depth: self.queue_depth,
            block_size_bytes: 0,
            device_link: "vol".into(),
            is_volatile: false,
            on_stall: self.policy,
            on_stall_is_told: false,
            busy_poll_us: 0,
            send_zc: false,
            recover: None,
            tls: None,
        }
    }

    fn session(&self) -> SessionRecord {
        SessionRecord {
            incarnation: String::new(),
            encryption: Encryption::None,
            export_bytes: self.capacity_bytes,
            export_flags: 0,
            export_block_bytes: None,
            capacity_bytes: self.capacity_bytes,
            block_size_bytes: BLOCK_BYTES as u32,
            max_io_bytes: BLOCK_BYTES as u32,
            volatile_cache: self.is_volatile_cache,
            read_only: false,
        }
    }
}

/// A device process.
pub(super) struct Client {
    pub(super) spec: Spec,
    device_spec: DeviceSpec,
    session: SessionRecord,
    queues: Vec<Queue>,
    reconnect: Reconnect<Vec<LinkId>>,
    unflushed: Arc<Unflushed>,
    /// What [`Unflushed::any`] said in the last steps, for [`Mutant::CountedLate`].
    unflushed_then: VecDeque<bool>,
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

struct BioSource<'a> {
    bios: &'a [Option<Bio>],
}

impl PayloadSource for BioSource<'_> {
    type Error = io::Error;

    fn gather(&mut self, tag: u16, payload: &mut [u8]) -> Result<(), Self::Error> {
        let bio = self.bios[usize::from(tag)].as_ref().expect("it is in flight");
        payload.copy_from_slice(&bio.data);
        Ok(())
    }

    fn stage(&mut self, _: u16, _: u32) -> Result<bool, Self::Error> {
        Ok(true)
    }
}

/// What a queue's core is given for its ring.
struct Io<'a> {
    wires: &'a mut [Wire],
    links: &'a mut Vec<Link>,
    /// By tag.
    bios: &'a mut [Option<Bio>],
    ended: &'a mut Vec<EndedBio>,
    rng: &'a mut Rng,
    coverage: &'a mut Coverage,
    room_bytes: usize,
    stages: bool,
    /// By tag: what the header of a reply is made to carry, for [`Mutant::TagOnlyCookie`].
    cookies: Option<Vec<u64>>,
    /// The counters of the device, and of a FLUSH, for [`Mutant::FlushCoversTooMuch`].
    covers_too_much: Option<(&'a Unflushed, Vec<u64>)>,
    has_sent: bool,
}

impl QueueIo for Io<'_> {
    type Socket = LinkId;
    type Source<'a>
        = BioSource<'a>
    where
        Self: 'a;

    fn fetch(&mut self, _: u16) {}

    fn commit_and_fetch(&mut self, tag: u16, result: i32) {
        let bio = self.bios[usize::from(tag)].take().expect("it was in flight");
        if let Some((unflushed, covered)) = &mut self.covers_too_much
            && bio.request.command == Command::Flush
            && result == 0
        {
            unflushed.flush_begins(covered);
            unflushed.flush_succeeded(covered);
        }
        let result = if result < 0 { Err(-result) } else { Ok(()) };
        self.ended.push(EndedBio { bio, result });
        self.has_sent = true;
    }

    fn needs_registration(&self, _: u16) -> bool {
        false
    }

    fn register(&mut self, _: u16) {}

    fn unregister(&mut self, _: u16) {}

    fn release(&mut self, _: u16, _: bool) {}

    fn copy_to_request(&mut self, _: u16, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn inbox_bytes(&self) -> usize {
        INBOX_BYTES
    }

    fn header(&self, connection: u16, place: Range<usize>) -> [u8; SIMPLE_REPLY_BYTES] {
        let mut header = [0; SIMPLE_REPLY_BYTES];
        header.copy_from_slice(&self.wires[usize::from(connection)].inbox[place]);
        if let Some(cookies) = &self.cookies {
            let tag = usize::from(u16::from_be_bytes([header[14], header[15]]));
            let cookie = cookies.get(tag).copied().unwrap_or_default();
            header[8..].copy_from_slice(&cookie.to_be_bytes());
        }
        header
    }

    fn scatter(&mut self, connection: u16, place: Range<usize>, tag: u16) -> io::Result<()> {
        let bio = self.bios[usize::from(tag)].as_mut().expect("it is in flight");
        bio.data[..place.len()].copy_from_slice(&self.wires[usize::from(connection)].inbox[place]);
        Ok(())
    }

    fn compact_inbox(&mut self, connection: u16, left: Range<usize>) {
        self.wires[usize::from(connection)].inbox.copy_within(left, 0);
    }

    fn receive_inbox(&mut self, connection: u16, part: Range<usize>, _: bool) {
        self.wires[usize::from(connection)].receives.push_back(Receive::Inbox(part.start, part.end));
    }

    fn receive_payload(&mut self, connection: u16, pages: Pages) {
        self.wires[usize::from(connection)].receives.push_back(Receive::Payload(pages));
    }

    fn outbox(&mut self, connection: u16) -> (&mut [u8], Self::Source<'_>) {
        (&mut self.wires[usize::from(connection)].outbox, BioSource { bios: self.bios })
    }

    fn stages(&self, _: u16) -> bool {
        self.stages
    }

    fn send_outbox_now(&mut self, connection: u16, start: usize, rest: Stretch, _: bool) -> io::Result<u32> {
        self.send_now(connection, Send::Outbox { start, rest })
    }

    fn send_staged_now(&mut self, connection: u16, tag: u16, rest: Stretch) -> io::Result<u32> {
        self.send_now(connection, Send::Payload(Pages { tag, by_hand: false, rest }))
    }

    fn wait_for_room(&mut self, connection: u16) {
        self.wires[usize::from(connection)].waits_for_room = true;
    }

    fn send_outbox(&mut self, connection: u16, start: usize, rest: Stretch, _: bool) {
        self.wires[usize::from(connection)].sends.push_back(Send::Outbox { start, rest });
        self.has_sent = true;
    }

    fn send_payload(&mut self, connection: u16, pages: Pages, _: bool) {
        self.wires[usize::from(connection)].sends.push_back(Send::Payload(pages));
        self.has_sent = true;
    }

    fn shut_down(&mut self, connection: u16) {
        if let Some(link) = self.wires[usize::from(connection)].link {
            abandon(&mut self.links[link], self.rng);
        }
    }

    fn take_control_record(&mut self, _: u16) -> Option<String> {
        None
    }

    fn unacknowledged_for(&self, _: u16) -> Option<Duration> {
        None
    }

    fn are_keys_worn(&self, _: u16) -> bool {
        false
    }

    fn drop_references(&mut self, connection: u16) {
        self.wires[usize::from(connection)].link = None;
    }

    fn renew_staging(&mut self) {}

    fn replace_socket(&mut self, connection: u16, link: LinkId) -> io::Result<()> {
        let wire = &mut self.wires[usize::from(connection)];
        assert!(wire.receives.is_empty() && wire.sends.is_empty() && !wire.waits_for_room, "it is in use");
        wire.link = Some(link);
        Ok(())
    }
}

impl Io<'_> {
    /// What the socket takes at once.
    fn send_now(&mut self, connection: u16, send: Send) -> io::Result<u32> {
        let room = self.room(connection).ok_or(io::ErrorKind::BrokenPipe)?;
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.has_sent = true;
        Ok(self.send_part(connection, send, room) as u32)
    }

    /// How much the socket takes; `None`: it is no use any more.
    fn room(&self, connection: u16) -> Option<usize> {
        let link = self.wires[usize::from(connection)].link?;
        let pipe = &self.links[link].to_server;
        pipe.is_open().then(|| pipe.room(self.room_bytes))
    }

    /// Moves some of it, at most `room` bytes: how many.
    fn send_part(&mut self, connection: u16, send: Send, room: usize) -> usize {
        let wire = &self.wires[usize::from(connection)];
        let Some(link) = wire.link else { return 0 };
        let rest = send.rest();
        let bytes = part(room.min(rest.rest_bytes() as usize), self.rng);
        let from = rest.done_bytes() as usize..rest.done_bytes() as usize + bytes;
        let pipe = &mut self.links[link].to_server;
        match send {
            Send::Outbox { start, .. } => pipe.write(&wire.outbox[start..][from]),
            // The pages as they are now.
            Send::Payload(Pages { tag, .. }) => match &self.bios[usize::from(tag)] {
                Some(bio) => pipe.write(&bio.data[from]),
                None => panic!("pages of a request that has ended are being sent"),
            },
        }
        bytes
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
        let unflushed = Arc::new(Unflushed::new(spec.nr_queues));
        if is_recovered && spec.is_volatile_cache {
            unflushed.acknowledged(0);
        }
        let queue = |queue_id: u16| {
            let nr_connections = spec.slots_of(queue_id).count() as u16;
            let queue_spec = QueueSpec {
                queue_id,
                queue_depth: spec.queue_depth,
                nr_connections,
                small_bytes_max: spec.small_bytes_max,
                volatile_cache: spec.is_volatile_cache,
                resend: Resend::Everything,
                reply_timeout: REPLY_TIMEOUT,
                unflushed: Arc::clone(&unflushed),
            };
            Queue {
                core: QueueCore::new(queue_spec, world.now),
                wires: (0..nr_connections).map(|_| Wire::default()).collect(),
                arrivals: VecDeque::new(),
                commands: VecDeque::new(),
                forgotten: Vec::new(),
                dial: None,
                ticked_at: world.now,
            }
        };
        let mut client = Self {
            queues: (0..spec.nr_queues).map(queue).collect(),
            reconnect: Reconnect::new(
                spec.nr_queues,
                incarnation,
                spec.policy,
                Probes::new(REPLY_TIMEOUT, true),
            ),
            unflushed_then: VecDeque::new(),
            unflushed,
            events: VecDeque::new(),
            probe: None,
            mutant,
            device_spec: spec.device_spec(),
            session: spec.session(),
            spec,
        };
        for queue_id in 0..client.spec.nr_queues {
            client.start_queue(queue_id, world);
        }
        client
    }

    /// Its sockets' peers are gone to begin with, and what the kernel gives again waits for others.
    fn start_queue(&mut self, queue_id: u16, world: &mut Surroundings<'_>) {
        let nr_connections = self.queues[usize::from(queue_id)].wires.len() as u16;
        self.with_core(queue_id, world, |core, io| {
            core.start(io);
            for connection in 0..nr_connections {
                io.wires[usize::from(connection)].receives.clear();
                core.handle_inbox(io, connection, 0);
            }
        });
        for tag in 0..self.spec.queue_depth {
            if let Some(bio) = &world.bios[usize::from(queue_id)][usize::from(tag)] {
                world.coverage.count("a request that the next process gets again");
                let request = bio.request;
                self.submit(queue_id, tag, request);
            }
        }
        self.end_of_pass(queue_id, world);
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub(super) fn condition(&self) -> Condition {
        self.reconnect.condition()
    }

    /// Whether every queue has its connections, and has heard of it.
    pub(super) fn is_connected(&self) -> bool {
        self.queues.iter().all(|queue| queue.commands.is_empty() && queue.core.is_up())
    }

    pub(super) fn incarnation(&self) -> String {
        self.reconnect.incarnation().to_owned()
    }

    pub(super) fn told_policy(&mut self, policy: StallPolicy, now: Instant) {
        self.spec.policy = policy;
        self.reconnect.told_policy(policy, now);
    }

    /// A request arrives on a queue.
    pub(super) fn submit(&mut self, queue_id: u16, tag: u16, request: BlockRequest) {
        self.queues[usize::from(queue_id)].arrivals.push_back((tag, request));
    }

    /// The process dies: what it has sent may arrive yet.
    pub(super) fn die(&mut self, links: &mut [Link], rng: &mut Rng) {
        for queue in &self.queues {
            let wires = queue.wires.iter().filter_map(|wire| wire.link);
            let dial = queue.dial.iter().flat_map(|dial| {
                dial.opened.iter().copied().chain(dial.handshake.iter().map(|(link, _)| *link))
            });
            let probe = self.probe.iter().map(|probe| probe.link);
            for link in wires.chain(dial).chain(probe) {
                abandon(&mut links[link], rng);
            }
        }
    }

    /// Links that it uses, for whoever cuts them.
    pub(super) fn links(&self) -> Vec<LinkId> {
        self.queues.iter().flat_map(|queue| queue.wires.iter().filter_map(|wire| wire.link)).collect()
    }

    /// One of the things it could do now; false: there was nothing.
    pub(super) fn step(&mut self, world: &mut Surroundings<'_>) -> bool {
        self.look_at_counters();
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
        self.look_at_counters();
        let mut has_done = self.main_step(world) | self.probe_step(world);
        for queue_id in 0..self.spec.nr_queues {
            has_done |= self.dial_step(queue_id, world);
            has_done |= self.command_step(queue_id, world);
            self.let_ticks_pass(queue_id, world);
            for connection in 0..self.queues[usize::from(queue_id)].wires.len() as u16 {
                has_done |= self.send_step(queue_id, connection, world);
                has_done |= self.receive_step(queue_id, connection, world);
            }
            has_done |= self.end_of_pass(queue_id, world);
        }
        has_done
    }

    fn look_at_counters(&mut self) {
        if self.is(Mutant::CountedLate) {
            self.unflushed_then.push_back(self.unflushed.any());
            if self.unflushed_then.len() > LATE_STEPS {
                self.unflushed_then.pop_front();
            }
        }
    }

    // ------------------------------------------------------------------------------------------------ main thread

    fn main_step(&mut self, world: &mut Surroundings<'_>) -> bool {
        let mut outputs = Vec::new();
        let event = self.events.pop_front();
        let has_event = event.is_some();
        let then = self.unflushed_then.front().copied();
        let has_unflushed = || then.unwrap_or_else(|| self.unflushed.any());
        match event {
            Some(MainEvent::Disconnected(queue_id, lost)) => {
                self.reconnect.disconnected(queue_id, &lost, "cut", world.now, has_unflushed, &mut outputs);
            }
            Some(MainEvent::Silent(queue_id, silence)) => {
                let silence = silence.map(|silence| match self.mutant {
                    Some(Mutant::ProbesForEver) => QueueSilence { oldest: Duration::ZERO, ..silence },
                    Some(Mutant::PongsIgnored) => QueueSilence { unheard: Some(silence.silent), ..silence },
                    _ => silence,
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
            Some(MainEvent::Attempt(queue_id, Attempt::Opened { sockets, incarnation: told, .. })) => {
                let incarnation = match self.mutant {
                    Some(Mutant::IncarnationIgnored) => self.reconnect.incarnation().to_owned(),
                    _ => told,
                };
                let is_another = incarnation != self.reconnect.incarnation();
                self.reconnect.dialled(queue_id, sockets, incarnation, has_unflushed, &mut outputs);
                if is_another {
                    world.coverage.count("a server of another incarnation");
                }
            }
            Some(MainEvent::Attempt(_, Attempt::Failed(reason))) => self.reconnect.dial_failed(reason),
            Some(MainEvent::Attempt(_, Attempt::Refused(reason))) => {
                self.reconnect.refused_for_good(reason, &mut outputs);
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
        for queue in self.queues.iter_mut().filter(|queue| gives_up_alone && !queue.core.is_up()) {
            queue.commands.push_back(QueueCommand::GiveUp);
        }
        for output in outputs {
            match output {
                Output::Dial(queue_id) => self.start_dial(queue_id, world.now),
                Output::Connect(queue_id, links) => {
                    self.queues[usize::from(queue_id)].commands.push_back(QueueCommand::Connect(links));
                }
                Output::Disconnect(queue_id, why) => {
                    let commands = &mut self.queues[usize::from(queue_id)].commands;
                    if gives_up_alone {
                        commands.push_back(QueueCommand::Idle(400));
                    }
                    commands.push_back(QueueCommand::Disconnect(why));
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
        let (link, handshake) = begin_dial(&self.device_spec, PROBE_SLOT, world);
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

    fn start_dial(&mut self, queue_id: u16, now: Instant) {
        let slots = self.spec.slots_of(queue_id).collect();
        self.queues[usize::from(queue_id)].dial = Some(Dial {
            redial: Redial::new(slots, self.reconnect.refusals()),
            resumes_at: now,
            gives_up_at: now,
            handshake: None,
            opened: Vec::new(),
        });
    }

    fn dial_step(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let Some(mut dial) = self.queues[usize::from(queue_id)].dial.take() else { return false };
        let (has_done, attempt) = self.advance_dial(&mut dial, world);
        let is_over = matches!(attempt, Some(Attempt::Opened { .. } | Attempt::Refused(_)));
        if !is_over {
            self.queues[usize::from(queue_id)].dial = Some(dial);
        }
        self.events.extend(attempt.map(|attempt| MainEvent::Attempt(queue_id, attempt)));
        has_done
    }

    fn advance_dial(&self, dial: &mut Dial, world: &mut Surroundings<'_>) -> (bool, Option<Attempt<LinkId>>) {
        if world.now < dial.resumes_at {
            return (false, None);
        }
        let Some((link, handshake)) = &mut dial.handshake else {
            let mut slot = match dial.redial.next(world.rng.f64()) {
                Next::Rest(pause) => {
                    dial.resumes_at = world.now + pause;
                    return (true, None);
                }
                Next::Dial(slot) => slot,
            };
            if !world.is_server_up {
                return (true, self.dialled(dial, Err(broken()), world));
            }
            if self.is(Mutant::OtherSlot) {
                slot += u32::from(self.spec.nr_connections) * world.rng.u32(..2);
            }
            dial.handshake = Some(begin_dial(&self.device_spec, slot, world));
            dial.gives_up_at = world.now + DIAL_TIMEOUT;
            return (true, None);
        };
        let (link, address) = (*link, "simulated".to_owned());
        let pipe = &mut world.links[link].to_client;
        let mut out = Vec::new();
        let readable = pipe.readable();
        if readable.is_empty() {
            if pipe.end().is_some() || world.now >= dial.gives_up_at {
                return (true, self.dialled(dial, Err(broken()), world));
            }
            return (false, None);
        }
        let answer = handshake.handle_bytes(readable, &mut out);
        let bytes = readable.len();
        pipe.consume(bytes);
        world.links[link].to_server.write(&out);
        let outcome = match answer {
            Ok(None) => return (true, None),
            Ok(Some(export)) => Ok(Dialled { socket: link, export, address }),
            Err(source) => {
                world.coverage.count("a dial that is refused");
                Err(DialError::Handshake { address, source })
            }
        };
        (true, self.dialled(dial, outcome, world))
    }

    /// A handshake is over: what the rules make of it.
    fn dialled(
        &self,
        dial: &mut Dial,
        outcome: Result<Dialled<LinkId>, DialError>,
        world: &mut Surroundings<'_>,
    ) -> Option<Attempt<LinkId>> {
        let tried = dial.handshake.take().map(|(link, _)| link);
        let outcome = match slots::judge(&self.device_spec, outcome) {
            Ok(judged) => judged.map_err(|passed_over| SlotError::PassedOver(vec![passed_over])),
            Err(error) => Err(error),
        };
        let fit = DiskFit {
            spec: &self.device_spec,
            session: &self.session,
            export_bytes: self.spec.capacity_bytes,
            nr_connections: self.spec.nr_connections,
        };
        dial.opened.extend(tried);
        let attempt = dial.redial.dialled(outcome, &fit, |_| Encryption::None)?;
        let dropped = !matches!(attempt, Attempt::Opened { .. });
        for link in dial.opened.drain(..).filter(|_| dropped) {
            abandon(&mut world.links[link], world.rng);
        }
        Some(attempt)
    }

    // ------------------------------------------------------------------------------------------------ queue thread

    /// Has a queue's core do something, with what stands for its ring.
    fn with_core<T>(
        &mut self,
        queue_id: u16,
        world: &mut Surroundings<'_>,
        act: impl FnOnce(&mut QueueCore, &mut Io<'_>) -> T,
    ) -> (T, bool) {
        let (forgets_sequence, covers_too_much) =
            (self.is(Mutant::TagOnlyCookie), self.is(Mutant::FlushCoversTooMuch));
        let nr_queues = usize::from(self.spec.nr_queues);
        let queue = &mut self.queues[usize::from(queue_id)];
        let tags = 0..self.spec.queue_depth;
        let mut io = Io {
            wires: &mut queue.wires,
            links: world.links,
            bios: &mut world.bios[usize::from(queue_id)],
            ended: world.ended,
            rng: world.rng,
            coverage: world.coverage,
            room_bytes: world.room_bytes,
            stages: self.spec.stages,
            cookies: forgets_sequence.then(|| tags.map(|tag| queue.core.cookie(tag)).collect()),
            covers_too_much: covers_too_much.then(|| (&*self.unflushed, vec![0; nr_queues])),
            has_sent: false,
        };
        let was_up = queue.core.is_up();
        let outcome = act(&mut queue.core, &mut io);
        let has_done = io.has_sent;
        if self.mutant == Some(Mutant::NoReaping) && was_up && !queue.core.is_up() {
            forget_operations(&mut queue.core, &mut io, &mut queue.forgotten);
        }
        while let Some(event) = queue.core.take_event() {
            self.events.push_back(match event {
                LinkEvent::Disconnected(lost) => {
                    if let Loss::Protocol(_) = lost.loss {
                        world.coverage.count("a reply to nothing");
                    } else if queue.core.awaits_replies() {
                        world.coverage.count("requests are sent again");
                    }
                    MainEvent::Disconnected(queue_id, lost)
                }
                LinkEvent::Silent(silence) => {
                    world.coverage.count("replies are due for long");
                    MainEvent::Silent(queue_id, silence)
                }
            });
        }
        (outcome, has_done)
    }

    fn command_step(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let queue = &mut self.queues[usize::from(queue_id)];
        let Some(command) = queue.commands.pop_front() else { return false };
        match command {
            QueueCommand::Idle(steps) => {
                if steps > 0 {
                    queue.commands.push_front(QueueCommand::Idle(steps - 1));
                }
            }
            QueueCommand::Disconnect(why) => {
                self.with_core(queue_id, world, |core, io| core.disconnect(io, why));
            }
            QueueCommand::GiveUp => queue.core.give_up(),
            QueueCommand::Connect(links) => {
                let now = world.now;
                let (connected, _) = self.with_core(queue_id, world, |core, io| core.connect(io, links, now));
                connected.expect("nothing fails here");
                world.coverage.count("a queue is connected");
            }
        }
        self.end_of_pass(queue_id, world);
        true
    }

    fn queue_step(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let queue = &mut self.queues[usize::from(queue_id)];
        let connection = choose(0..queue.wires.len() as u16, world.rng).expect("a queue has a connection");
        let has_done = match world.rng.u8(..3) {
            0 => self.send_step(queue_id, connection, world),
            1 if !queue.forgotten.is_empty() => forgotten_step(queue, queue_id, world),
            _ => self.receive_step(queue_id, connection, world),
        };
        self.let_ticks_pass(queue_id, world);
        self.end_of_pass(queue_id, world) || has_done
    }

    fn let_ticks_pass(&mut self, queue_id: u16, world: &mut Surroundings<'_>) {
        while world.now.duration_since(self.queues[usize::from(queue_id)].ticked_at) >= TICK {
            self.queues[usize::from(queue_id)].ticked_at += TICK;
            self.with_core(queue_id, world, |core, io| core.handle_tick(io));
        }
    }

    /// True: something was sent or ended.
    fn end_of_pass(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let now = world.now;
        let arrivals = std::mem::take(&mut self.queues[usize::from(queue_id)].arrivals);
        let act = |core: &mut QueueCore, io: &mut Io<'_>| {
            for (tag, request) in arrivals {
                core.handle_request(io, tag, Ok(request));
            }
            core.end_of_pass(io, || now);
        };
        self.with_core(queue_id, world, act).1
    }

    // ------------------------------------------------------------------------------------------------ the wire

    /// An operation that sends goes on.
    fn send_step(&mut self, queue_id: u16, connection: u16, world: &mut Surroundings<'_>) -> bool {
        self.with_core(queue_id, world, |core, io| {
            let room = io.room(connection);
            let wire = &mut io.wires[usize::from(connection)];
            if room == Some(0) {
                return false;
            }
            if std::mem::take(&mut wire.waits_for_room) {
                core.handle_room(connection);
                return true;
            }
            let Some(send) = wire.sends.pop_front() else { return false };
            let result = room.map_or(PIPE, |room| io.send_part(connection, send, room) as i32);
            core.handle_sent(io, connection, send.tag(), result);
            if result != send.rest().rest_bytes() as i32 {
                let behind: Vec<Send> = io.wires[usize::from(connection)].sends.drain(..).collect();
                for send in behind {
                    core.handle_sent(io, connection, send.tag(), CANCELED);
                }
            }
            true
        })
        .0
    }

    /// An operation that receives goes on.
    fn receive_step(&mut self, queue_id: u16, connection: u16, world: &mut Surroundings<'_>) -> bool {
        self.with_core(queue_id, world, |core, io| {
            let wire = &mut io.wires[usize::from(connection)];
            let (Some(link), Some(receive)) = (wire.link, wire.receives.front().copied()) else {
                return false;
            };
            let pipe = &mut io.links[link].to_client;
            let readable = pipe.readable();
            // Shut down by this side, it gives what has arrived, or nothing.
            let is_over = pipe.end().is_some() || pipe.is_unread && (readable.is_empty() || io.rng.bool());
            if readable.is_empty() && !is_over {
                return false;
            }
            wire.receives.pop_front();
            let wanted = receive.wanted();
            let bytes = if is_over { 0 } else { part(readable.len().min(wanted), io.rng) };
            let brought = &readable[..bytes];
            if bytes > 0 && !core.is_up() {
                io.coverage.count("bytes come after a loss");
            }
            match receive {
                Receive::Payload(Pages { tag, rest, .. }) => {
                    if let Some(bio) = &mut io.bios[usize::from(tag)] {
                        let start = rest.done_bytes() as usize;
                        bio.data[start..start + bytes].copy_from_slice(brought);
                    }
                    pipe.consume(bytes);
                    core.handle_payload(io, connection, tag, bytes as i32);
                    let wire = &mut io.wires[usize::from(connection)];
                    if bytes < wanted
                        && let Some(Receive::Inbox(..)) = wire.receives.pop_front()
                    {
                        core.handle_inbox(io, connection, CANCELED);
                    }
                }
                Receive::Inbox(start, _) => {
                    wire.inbox[start..start + bytes].copy_from_slice(brought);
                    pipe.consume(bytes);
                    core.handle_inbox(io, connection, bytes as i32);
                }
            }
            true
        })
        .0
    }
}

/// Every operation that is out is said to have ended, though its bytes may still come.
fn forget_operations(core: &mut QueueCore, io: &mut Io<'_>, forgotten: &mut Vec<(LinkId, Pages)>) {
    for connection in 0..io.wires.len() as u16 {
        let wire = &mut io.wires[usize::from(connection)];
        let (link, waited_for_room) = (wire.link, std::mem::take(&mut wire.waits_for_room));
        let receives: Vec<Receive> = wire.receives.drain(..).collect();
        let sends: Vec<Send> = wire.sends.drain(..).collect();
        for receive in receives {
            match receive {
                Receive::Payload(pages) => {
                    forgotten.extend(link.map(|link| (link, pages)));
                    core.handle_payload(io, connection, pages.tag, CANCELED);
                }
                Receive::Inbox(..) => core.handle_inbox(io, connection, CANCELED),
            }
        }
        for send in sends {
            core.handle_sent(io, connection, send.tag(), CANCELED);
        }
        if waited_for_room {
            core.handle_room(connection);
        }
    }
}

/// A connection to the server is begun, in a slot.
fn begin_dial(spec: &DeviceSpec, slot: u32, world: &mut Surroundings<'_>) -> (LinkId, Box<ClientHandshake>) {
    let name = slots::export_name(spec, slot).expect("the secret is one");
    let handshake = ClientHandshake::new(&name).expect("the name is short");
    world.links.push(Link::default());
    let link = world.links.len() - 1;
    world.dialled.push(link);
    (link, Box::new(handshake))
}

/// The connection broke, or never was.
fn broken() -> DialError {
    DialError::Io { address: "simulated".to_owned(), source: io::ErrorKind::ConnectionReset.into() }
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            link: None,
            inbox: vec![0; INBOX_BYTES],
            outbox: vec![0; OUTBOX_BYTES],
            receives: VecDeque::new(),
            sends: VecDeque::new(),
            waits_for_room: false,
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
    let (link, Pages { tag, rest, .. }) = queue.forgotten[index];
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
