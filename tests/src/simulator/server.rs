//! The simulated storage node: the real session, gate, request progress and sync groups, without sockets and threads.
//!
//! Stands for `server/src/data/io/session_io.rs`: moves bytes between a connection's pipes and its session, and has the disk do what a
//! request needs. The gate is in `gate.rs`, what survives the process in `storage.rs`.

mod copies;
mod turns;

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Instant;

use fastrand::Rng;
use proto::export_name::AttachmentExportName;
use proto::nbd::handshake::server::OpenKind;
use proto::nbd::replies::ReplyHead;
use proto::nbd::transmission::{Command, CommandFlags};
use server::backend::VolumeOp;
use server::data::io::sync_groups::{Begin, SyncGroups};
use server::data::io::throttle::Throttle;
use server::data::session::{Action, Session};
use server::ids::{ConnectionId, RequestSlot};
use server::limits::IN_FLIGHT_REQUESTS_MAX;
use server::volume::Volume;
use server::volume::request::{Next, RequestProgress};
use uuid::Uuid;

use super::Mutant;
use super::copier::{Copied, Copier};
use super::coverage::Coverage;
use super::disk::{COPIER, Ended, Owner, Work};
use super::gate::{Gate, ToRing};
use super::network::{End, Link, LinkId};
use super::storage::{Catalog, Surroundings};
use super::strangers::Strangers;
use crate::block_history::{BLOCK_BYTES, CopyCall};
use turns::Begun;

/// What all syncs are joined by: there is one volume.
const SYNC_KEY: usize = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Finishing,
    Closing,
}

struct Connection {
    link: LinkId,
    session: Session,
    phase: Phase,
    slot: Option<(Uuid, u32)>,
    is_late_in_slot: bool,
    volume: Option<Rc<Volume>>,
    buffers: Vec<Vec<u8>>,
    progress: Vec<Option<RequestProgress>>,
    /// What waits for a copy.
    held: Vec<Option<VolumeOp>>,
    answered_early: Vec<bool>,
    /// What waits for its turn, and when it is to be asked again whose it is.
    throttle: Throttle,
    asks_at: Option<Instant>,
    /// The request that waits until the volume is marked as written.
    waits_for_mark: Option<RequestSlot>,
    /// Operations of the disk, and syncs that are waited for.
    operations: usize,
    output: VecDeque<u8>,
}

/// A process of the storage node.
/// Pieces, and what was in them.
type CopiedEarly = Vec<(usize, Vec<u8>)>;

pub(super) struct Server {
    pub(super) process: u64,
    connections: BTreeMap<u32, Connection>,
    next_connection: u32,
    pub(super) gate: Gate,
    strangers: Strangers,
    begun: Begun,
    syncs: SyncGroups,
    /// Who wants a copy, and waits for the volume to be open; with what is copied too early.
    copy_call: Option<(CopyCall, CopiedEarly)>,
    copier: Option<Copier>,
    pub(super) copied: Option<Copied>,
    mutant: Option<Mutant>,
}

/// Whose connections are no stranger's.
const RING: usize = 0;

impl Server {
    pub(super) fn new(process: u64, catalog: &Catalog, mutant: Option<Mutant>, now: Instant) -> Self {
        Self {
            process,
            connections: BTreeMap::new(),
            next_connection: 0,
            gate: Gate::new(process, catalog, mutant, now),
            strangers: Strangers::new(),
            begun: Begun::new(catalog.limits),
            syncs: SyncGroups::default(),
            copy_call: None,
            copier: None,
            copied: None,
            mutant,
        }
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub(super) fn accept(&mut self, link: LinkId) {
        let idle = || (0..IN_FLIGHT_REQUESTS_MAX).map(|_| None).collect();
        let connection = Connection {
            link,
            session: Session::new(),
            phase: Phase::Open,
            slot: None,
            is_late_in_slot: false,
            volume: None,
            buffers: vec![Vec::new(); IN_FLIGHT_REQUESTS_MAX],
            progress: idle(),
            held: vec![None; IN_FLIGHT_REQUESTS_MAX],
            answered_early: vec![false; IN_FLIGHT_REQUESTS_MAX],
            throttle: Throttle::default(),
            asks_at: None,
            waits_for_mark: None,
            operations: 0,
            output: VecDeque::new(),
        };
        self.connections.insert(self.next_connection, connection);
        self.next_connection += 1;
    }

    /// The process dies: its sockets are reset.
    pub(super) fn die(&mut self, links: &mut [Link], rng: &mut Rng, coverage: &mut Coverage) {
        if self.gate.has_outputs() {
            coverage.count("a server is killed between two outputs of the gate");
        }
        if self.copier.is_some() {
            coverage.count("a server is killed while it copies a volume");
        }
        for connection in self.connections.values() {
            links[connection.link].to_client.cut(rng.bool());
            links[connection.link].to_server.is_unread = true;
        }
    }

    /// One of the things it could do now; false: there was nothing.
    pub(super) fn step(&mut self, world: &mut Surroundings<'_>) -> bool {
        if world.rng.u8(..64) == 0 {
            self.strangers.step(&mut self.gate, world);
        }
        if world.rng.bool() && self.gate_step(world) {
            return true;
        }
        if world.rng.u8(..4) == 0 && self.copy_step(world) {
            return true;
        }
        let Some(id) = choose(self.connections.keys().copied(), world.rng) else {
            return self.gate_step(world);
        };
        self.advance(id, world) || self.gate_step(world)
    }

    /// The gate goes on, and connections are told what it says; false: there was nothing to do.
    fn gate_step(&mut self, world: &mut Surroundings<'_>) -> bool {
        if !self.gate.step(world) {
            return false;
        }
        self.strangers.hear(&mut self.gate);
        for message in std::mem::take(&mut self.gate.to_rings) {
            self.told(message, world);
        }
        true
    }

    // ------------------------------------------------------------------------------------------- a connection's bytes

    fn advance(&mut self, id: u32, world: &mut Surroundings<'_>) -> bool {
        let connection = self.connections.get_mut(&id).expect("it was chosen");
        if connection.phase == Phase::Closing {
            let is_drained = connection.operations == 0;
            if !is_drained && self.mutant != Some(Mutant::NoDraining) {
                return false;
            }
            self.remove(id);
            return true;
        }
        let has_begun = self.is_turn_due(id, world.now) && self.take_turns(id, world);
        let sent = self.send(id, world);
        let parsed = self.parse(id, world);
        let connection = self.connections.get_mut(&id).expect("it is there until it is closed");
        let is_finished = connection.phase == Phase::Finishing
            && connection.session.is_idle()
            && connection.output.is_empty();
        if is_finished {
            self.close(id, world);
        }
        has_begun || sent || parsed || is_finished
    }

    fn send(&mut self, id: u32, world: &mut Surroundings<'_>) -> bool {
        let connection = self.connections.get_mut(&id).expect("it exists");
        connection.output.extend(connection.session.take_output());
        let mut head = ReplyHead::default();
        while let Some(reply) = connection.session.next_reply(&mut head) {
            let copies = if world.lies && world.rng.u8(..40) == 0 { 2 } else { 1 };
            let is_read = reply.payload_bytes > 0;
            for copy in 0..copies {
                if copy > 0 && is_read {
                    continue;
                }
                connection.output.extend(head.bytes());
                if is_read {
                    let payload = &connection.buffers[usize::from(reply.slot.0)];
                    connection.output.extend(&payload[..reply.payload_bytes as usize]);
                }
                if copy > 0 {
                    world.coverage.count("a reply that came twice");
                }
            }
            connection.answered_early[usize::from(reply.slot.0)] = false;
            connection.session.reply_sent(reply.slot);
        }
        let pipe = &mut world.links[connection.link].to_client;
        if pipe.is_unread && !connection.output.is_empty() {
            self.close(id, world);
            return true;
        }
        let room = pipe.room(world.room_bytes).min(connection.output.len());
        if room > 0 {
            pipe.write(&connection.output.make_contiguous()[..room]);
            connection.output.drain(..room);
        }
        room > 0
    }

    fn parse(&mut self, id: u32, world: &mut Surroundings<'_>) -> bool {
        let mut has_parsed = false;
        loop {
            let connection = self.connections.get_mut(&id).expect("it exists");
            let is_held = connection.waits_for_mark.is_some() || connection.throttle.holds_stream();
            if connection.phase != Phase::Open || is_held {
                return has_parsed;
            }
            let pipe = &mut world.links[connection.link].to_server;
            let readable = pipe.readable();
            if readable.is_empty() {
                let Some(end) = pipe.end() else { return has_parsed };
                match end {
                    End::Fin => self.finish(id),
                    End::Reset => self.close(id, world),
                }
                return true;
            }
            if let Some((slot, missing_bytes)) = connection.session.missing_payload() {
                let bytes = readable.len().min(missing_bytes as usize);
                connection.buffers[usize::from(slot.0)].extend_from_slice(&readable[..bytes]);
                pipe.consume(bytes);
                has_parsed = true;
                if connection.session.payload_received(bytes as u32)
                    && !self.waits_with_payload(id, slot, world)
                {
                    self.begin(id, slot, world);
                }
                continue;
            }
            let Ok((used_bytes, action)) = connection.session.advance(readable) else {
                world.coverage.count("a request that could not be parsed");
                self.finish(id);
                return true;
            };
            pipe.consume(used_bytes);
            has_parsed |= used_bytes > 0;
            match action {
                Action::NextBytes => {}
                Action::NeedsBytes if pipe.is_cut_off() => {
                    world.coverage.count("a request of which the rest never comes");
                    self.close(id, world);
                    return true;
                }
                Action::NeedsBytes | Action::Paused => return has_parsed,
                Action::TakePayload(slot) | Action::Begin(slot) => self.take_in(id, slot, world),
                Action::End => self.finish(id),
                Action::Open(open) => {
                    self.open(id, open.kind, open.name);
                    return true;
                }
                Action::List | Action::StartTls => panic!("nobody here asks for that"),
            }
        }
    }

    fn finish(&mut self, id: u32) {
        let connection = self.connections.get_mut(&id).expect("it exists");
        connection.phase = Phase::Finishing;
        if let Some(slot) = connection.session.end_input() {
            self.waits_no_more(id, slot);
        }
    }

    fn close(&mut self, id: u32, world: &mut Surroundings<'_>) {
        self.forget_turn(id);
        let connection = self.connections.get_mut(&id).expect("it exists");
        connection.phase = Phase::Closing;
        let link = &mut world.links[connection.link];
        link.to_client.close(End::Reset);
        link.to_server.is_unread = true;
    }

    // ------------------------------------------------------------------------------------------------ requests

    fn begin(&mut self, id: u32, slot: RequestSlot, world: &mut Surroundings<'_>) {
        self.begin_if(id, slot, false, world);
    }

    /// `is_let`: it has waited for the volume's mark, if that was to be waited for.
    fn begin_if(&mut self, id: u32, slot: RequestSlot, is_let: bool, world: &mut Surroundings<'_>) {
        let drops_fua = self.is(Mutant::FuaDropped);
        let early = self.is(Mutant::EarlyAnswer);
        let connection = self.connections.get_mut(&id).expect("it exists");
        let volume = Rc::clone(connection.volume.as_ref().expect("it transmits"));
        let mut request = *connection.session.request(slot);
        if matches!(request.command, Command::Write | Command::WriteZeroes) && !self.gate.is_marked {
            if !is_let {
                world.coverage.count("a first write waits for its mark");
                connection.waits_for_mark = Some(slot);
                return self.gate.wants_mark(ConnectionId(u64::from(id)));
            }
            if !world.catalog.is_written {
                self.gate.written_unmarked();
            }
        }
        if drops_fua {
            request.flags = CommandFlags(request.flags.0 & !CommandFlags::FUA.0);
        }
        let (progress, next) = RequestProgress::begin(&volume, &request);
        connection.progress[usize::from(slot.0)] = Some(progress);
        if early && request.command == Command::Write {
            connection.session.complete(slot);
            connection.answered_early[usize::from(slot.0)] = true;
        }
        self.follow(id, slot, next, world);
    }

    fn follow(&mut self, id: u32, slot: RequestSlot, next: Next, world: &mut Surroundings<'_>) {
        if let Next::Submit(op) = next
            && self.holds(id, slot, op, world)
        {
            return;
        }
        let owner = Owner { process: self.process, connection: id, slot };
        let swaps = self.is(Mutant::SwappedBlocks);
        let stale = self.is(Mutant::StaleRead);
        let connection = self.connections.get_mut(&id).expect("it exists");
        let buffer = &connection.buffers[usize::from(slot.0)];
        let op = match next {
            Next::Submit(op) => op,
            Next::Disconnect => {
                self.gate.ended_without_answer(world.catalog);
                return self.close(id, world);
            }
            Next::Done(result) => {
                if connection.answered_early[usize::from(slot.0)] {
                    return;
                }
                match result {
                    Ok(()) => connection.session.complete(slot),
                    Err(error) => connection.session.fail(slot, error, None),
                }
                return;
            }
        };
        connection.operations += 1;
        match op {
            VolumeOp::Read { offset_bytes, length_bytes, .. } => {
                let is_stale = stale && connection.is_late_in_slot;
                let (offset_bytes, into) = (offset_bytes as usize, vec![0; length_bytes as usize]);
                world.disk.begin(owner, Work::Read { offset_bytes, into, is_stale }, world.rng);
            }
            VolumeOp::Write { offset_bytes, buffer_offset_bytes, .. } => {
                let mut bytes = buffer[buffer_offset_bytes as usize..].to_vec();
                if swaps && bytes.len() >= 2 * BLOCK_BYTES {
                    bytes.rotate_left(BLOCK_BYTES);
                }
                world.disk.begin(
                    owner,
                    Work::Write { offset_bytes: offset_bytes as usize, bytes },
                    world.rng,
                );
            }
            VolumeOp::WriteZeroes { offset_bytes, length_bytes } => {
                let length_bytes = length_bytes as usize;
                world.disk.begin(
                    owner,
                    Work::Zero { offset_bytes: offset_bytes as usize, length_bytes },
                    world.rng,
                );
            }
            VolumeOp::Allocate { offset_bytes, length_bytes, .. } => {
                let length_bytes = length_bytes as usize;
                world.disk.begin(
                    owner,
                    Work::Zero { offset_bytes: offset_bytes as usize, length_bytes },
                    world.rng,
                );
            }
            VolumeOp::Sync { metadata } => {
                if let Some(begin) = self.syncs.join(SYNC_KEY, (id, slot), metadata) {
                    self.begin_sync(begin, world);
                } else {
                    world.coverage.count("a sync that was waited for");
                }
            }
            VolumeOp::Prefetch { .. } => panic!("nobody here asks for that"),
        }
    }

    fn begin_sync(&self, begin: Begin, world: &mut Surroundings<'_>) {
        let (connection, slot) = begin.leader;
        world.disk.begin_sync(Owner { process: self.process, connection, slot }, world.rng);
    }

    /// An operation of this process has ended.
    pub(super) fn ended(&mut self, ended: Ended, world: &mut Surroundings<'_>) {
        let Ended { owner, result, read, is_sync } = ended;
        if owner.connection == COPIER {
            return self.copy_synced(result, world);
        }
        if !is_sync {
            return self.volume_completed(owner.connection, owner.slot, result, read, world);
        }
        let mut members = Vec::new();
        if let Some(next) = self.syncs.ended(SYNC_KEY, &mut members) {
            self.begin_sync(next, world);
        }
        for (connection, slot) in members {
            self.volume_completed(connection, slot, result, Vec::new(), world);
        }
    }

    fn volume_completed(
        &mut self,
        id: u32,
        slot: RequestSlot,
        result: i32,
        read: Vec<u8>,
        world: &mut Surroundings<'_>,
    ) {
        // Gone already: only where connections are not drained.
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.operations -= 1;
        let index = usize::from(slot.0);
        if !read.is_empty() {
            connection.buffers[index] = read;
        }
        let (Some(volume), Some(progress)) = (&connection.volume, &mut connection.progress[index]) else {
            panic!("a result for a request that was not begun")
        };
        let next = progress.completed(volume, result);
        if connection.phase != Phase::Closing {
            self.follow(id, slot, next, world);
        }
    }

    // ------------------------------------------------------------------------------------------------ the gate

    fn open(&mut self, id: u32, kind: OpenKind, name: String) {
        let parsed = AttachmentExportName::parse(&name).expect("clients here open attachments");
        let slot = Some((parsed.attachment_id, parsed.slot));
        let is_late_in_slot = self.connections.values().any(|other| other.slot == slot);
        let connection = self.connections.get_mut(&id).expect("it exists");
        (connection.slot, connection.is_late_in_slot) = (slot, is_late_in_slot);
        self.gate.open(ConnectionId(u64::from(id)), RING, kind, name);
    }

    fn told(&mut self, message: ToRing, world: &mut Surroundings<'_>) {
        let (ToRing::Opened { connection, .. }
        | ToRing::Refused { connection, .. }
        | ToRing::GoOn { connection, .. }
        | ToRing::Close { connection }) = message;
        let id = connection.0 as u32;
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match message {
            ToRing::Close { .. } => {
                if connection.operations > 0 {
                    world.coverage.count("a connection is closed with I/O under way");
                }
                self.close(id, world);
            }
            ToRing::GoOn { is_marked, .. } => {
                let Some(slot) = connection.waits_for_mark.take() else { return };
                match connection.phase {
                    Phase::Closing => {}
                    _ if is_marked => {
                        self.begin_if(id, slot, true, world);
                        self.take_turns(id, world);
                    }
                    _ => self.close(id, world),
                }
            }
            _ if connection.phase != Phase::Open => {}
            ToRing::Opened { volume, export, limits, .. } => {
                let opened = connection.session.opened(Ok((&export, limits)));
                assert!(opened.expect("GO is answered in words"), "a GO opens");
                assert!(connection.session.leftover().is_empty(), "our client waits for the answer");
                connection.volume = Some(volume);
            }
            ToRing::Refused { refusal, .. } => {
                // GO's refusal is said in words: the session goes on.
                connection.slot = None;
                let _ = connection.session.opened(Err(refusal));
            }
        }
    }

    /// All that it had under way has ended.
    fn remove(&mut self, id: u32) {
        self.connections.remove(&id);
        self.gate.closed(ConnectionId(u64::from(id)));
    }

    /// The management side ends the attachment: true once its last I/O has finished.
    pub(super) fn end_attachment(&mut self, world: &mut Surroundings<'_>) -> bool {
        let Some(held) = &mut world.catalog.attachment else { return true };
        if self.mutant == Some(Mutant::NotFenced) {
            return true;
        }
        held.is_ending = true;
        let attachment_id = held.attachment_id;
        self.gate.fence(attachment_id, world)
    }
}

/// One of them.
pub(super) fn choose<T>(mut from: impl ExactSizeIterator<Item = T>, rng: &mut Rng) -> Option<T> {
    let len = from.len();
    if len == 0 { None } else { from.nth(rng.usize(..len)) }
}
