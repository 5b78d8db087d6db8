//! The simulated storage node: the real session, fence, request progress and sync groups, without sockets and threads.
//!
//! Stands for `server/src/connection.rs` and `gate/`: moves bytes between a connection's pipes and its session, has the disk
//! do what a request needs, and carries out what the fence decides. What survives the process is in [`Catalog`].

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fastrand::Rng;
use proto::export_name::{AttachmentExportName, ExportDescription, Secret};
use proto::nbd::ExportInfo;
use proto::nbd::handshake::server::Refusal;
use proto::nbd::replies::ReplyHead;
use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use server::backend::VolumeOp;
use server::backend::file::{self, CacheMode};
use server::fence::{Fence, Go, Output};
use server::ids::{ConnectionId, SlotId};
use server::incarnation::{Record, Seen, SessionMark, judge};
use server::limits::IN_FLIGHT_REQUESTS_MAX;
use server::session::{Action, Session};
use server::sync_groups::{Begin, SyncGroups};
use server::volume::{Backend, Faults, LossRecorder, Next, RequestProgress, Volume};
use uuid::Uuid;

use super::Mutant;
use super::coverage::Coverage;
use super::disk::{Disk, Ended, Owner, Work};
use super::network::{End, Link, LinkId};
use crate::block_history::BLOCK_BYTES;

/// What all syncs are joined by: there is one volume.
const SYNC_KEY: usize = 1;

/// The right to open the volume.
#[derive(Debug, Clone)]
pub(super) struct Attachment {
    pub(super) attachment_id: Uuid,
    pub(super) secret: Secret,
    pub(super) generation: u64,
    pub(super) session_epoch: u64,
    /// Nothing new is opened under it.
    pub(super) is_ending: bool,
}

/// What the storage node keeps across its processes.
#[derive(Debug)]
pub(super) struct Catalog {
    pub(super) server_id: Uuid,
    pub(super) volume_uid: Uuid,
    pub(super) capacity_bytes: usize,
    pub(super) write_cache_on: bool,
    pub(super) boot: u64,
    pub(super) incarnation: u64,
    /// What is remembered outside of it, for this boot.
    pub(super) record: Arc<Mutex<Option<Record>>>,
    pub(super) attachment: Option<Attachment>,
    /// Where an empty file stands for the volume; no operation reaches it.
    pub(super) volumes_dir: PathBuf,
}

enum VolumeState {
    Closed,
    Opening(Vec<u32>),
    Open(Rc<Volume>),
}

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
    attachment_id: Option<Uuid>,
    slot: u32,
    has_volume: bool,
    is_late_in_slot: bool,
    volume: Option<Rc<Volume>>,
    buffers: Vec<Vec<u8>>,
    progress: Vec<Option<RequestProgress>>,
    answered_early: Vec<bool>,
    /// Operations of the disk, and syncs that are waited for.
    operations: usize,
    output: VecDeque<u8>,
}

/// A process of the storage node.
pub(super) struct Server {
    pub(super) process: u64,
    connections: BTreeMap<u32, Connection>,
    next_connection: u32,
    fences: BTreeMap<Uuid, Fence>,
    volume: VolumeState,
    syncs: SyncGroups,
    /// A loss that the catalog has not been told of.
    is_unsettled: Arc<AtomicBool>,
    /// This process has looked for what failed to be written back before.
    is_admitted: bool,
    mutant: Option<Mutant>,
}

/// What a step of the server may touch.
pub(super) struct Surroundings<'a> {
    pub(super) catalog: &'a mut Catalog,
    pub(super) disk: &'a mut Disk,
    pub(super) links: &'a mut [Link],
    pub(super) rng: &'a mut Rng,
    pub(super) coverage: &'a mut Coverage,
    pub(super) room_bytes: usize,
    /// Replies are sometimes sent twice.
    pub(super) lies: bool,
}

impl Server {
    pub(super) fn new(process: u64, mutant: Option<Mutant>) -> Self {
        Self {
            process,
            connections: BTreeMap::new(),
            next_connection: 0,
            fences: BTreeMap::new(),
            volume: VolumeState::Closed,
            syncs: SyncGroups::default(),
            is_unsettled: Arc::default(),
            is_admitted: false,
            mutant,
        }
    }

    /// It has the volume open, and the volume lost writes.
    pub(super) fn has_lost_volume(&self) -> bool {
        matches!(&self.volume, VolumeState::Open(volume) if volume.has_lost_writes())
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
            attachment_id: None,
            slot: 0,
            has_volume: false,
            is_late_in_slot: false,
            volume: None,
            buffers: vec![Vec::new(); IN_FLIGHT_REQUESTS_MAX],
            progress: idle(),
            answered_early: vec![false; IN_FLIGHT_REQUESTS_MAX],
            operations: 0,
            output: VecDeque::new(),
        };
        self.connections.insert(self.next_connection, connection);
        self.next_connection += 1;
    }

    /// The process dies: its sockets are reset.
    pub(super) fn die(&mut self, links: &mut [Link], rng: &mut Rng) {
        for connection in self.connections.values() {
            links[connection.link].to_client.cut(rng.bool());
            links[connection.link].to_server.is_unread = true;
        }
    }

    /// One of the things it could do now; false: there was nothing.
    pub(super) fn step(&mut self, world: &mut Surroundings<'_>) -> bool {
        if world.rng.u8(..16) == 0 && self.settle(world.catalog) {
            return true;
        }
        if let VolumeState::Opening(_) = self.volume
            && world.rng.u8(..4) == 0
            && self.open_volume(world)
        {
            return true;
        }
        let Some(id) = choose(self.connections.keys().copied(), world.rng) else { return false };
        self.advance(id, world)
    }

    // ------------------------------------------------------------------------------------------- a connection's bytes

    fn advance(&mut self, id: u32, world: &mut Surroundings<'_>) -> bool {
        let connection = self.connections.get_mut(&id).expect("it was chosen");
        if connection.phase == Phase::Closing {
            let is_drained = connection.operations == 0;
            if !is_drained && self.mutant != Some(Mutant::NoDraining) {
                return false;
            }
            self.remove(id, world);
            return true;
        }
        let sent = self.send(id, world);
        let parsed = self.parse(id, world);
        let connection = self.connections.get_mut(&id).expect("it is there until it is closed");
        let is_finished = connection.phase == Phase::Finishing
            && connection.session.is_idle()
            && connection.output.is_empty();
        if is_finished {
            self.close(id, world);
        }
        sent || parsed || is_finished
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
        let bytes: Vec<u8> = connection.output.drain(..room).collect();
        pipe.write(&bytes);
        room > 0
    }

    fn parse(&mut self, id: u32, world: &mut Surroundings<'_>) -> bool {
        let mut has_parsed = false;
        loop {
            let connection = self.connections.get_mut(&id).expect("it exists");
            if connection.phase != Phase::Open {
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
                if connection.session.payload_received(bytes as u32) {
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
                Action::TakePayload(slot) => connection.buffers[usize::from(slot.0)].clear(),
                Action::Begin(slot) => self.begin(id, slot, world),
                Action::End => self.finish(id),
                Action::Open(open) => {
                    self.open(id, &open.name, world);
                    return true;
                }
                Action::List | Action::StartTls => panic!("nobody here asks for that"),
            }
        }
    }

    fn finish(&mut self, id: u32) {
        let connection = self.connections.get_mut(&id).expect("it exists");
        connection.phase = Phase::Finishing;
        connection.session.end_input();
    }

    fn close(&mut self, id: u32, world: &mut Surroundings<'_>) {
        let connection = self.connections.get_mut(&id).expect("it exists");
        connection.phase = Phase::Closing;
        let link = &mut world.links[connection.link];
        link.to_client.close(End::Reset);
        link.to_server.is_unread = true;
    }

    // ------------------------------------------------------------------------------------------------ requests

    fn begin(&mut self, id: u32, slot: SlotId, world: &mut Surroundings<'_>) {
        let drops_fua = self.is(Mutant::FuaDropped);
        let early = self.is(Mutant::EarlyAnswer);
        let connection = self.connections.get_mut(&id).expect("it exists");
        let volume = Rc::clone(connection.volume.as_ref().expect("it transmits"));
        let mut request = *connection.session.request(slot);
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

    fn follow(&mut self, id: u32, slot: SlotId, next: Next, world: &mut Surroundings<'_>) {
        let owner = Owner { process: self.process, connection: id, slot };
        let swaps = self.is(Mutant::SwappedBlocks);
        let stale = self.is(Mutant::StaleRead);
        let connection = self.connections.get_mut(&id).expect("it exists");
        let buffer = &connection.buffers[usize::from(slot.0)];
        let op = match next {
            Next::Submit(op) => op,
            Next::Disconnect => return self.close(id, world),
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
        slot: SlotId,
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

    fn open(&mut self, id: u32, name: &str, world: &mut Surroundings<'_>) {
        let name = AttachmentExportName::parse(name).expect("clients here open attachments");
        let attachment = world.catalog.attachment.as_ref().filter(|attachment| {
            let is_it = attachment.attachment_id == name.attachment_id && attachment.secret == name.secret;
            is_it && !attachment.is_ending
        });
        let Some(attachment) = attachment else {
            world.coverage.count("an open of an attachment that is no more");
            return self.answer(id, Err(Refusal::unknown("no such export")));
        };
        let is_late_in_slot = self
            .connections
            .values()
            .any(|other| other.slot == name.slot && other.attachment_id == Some(name.attachment_id));
        let connection = self.connections.get_mut(&id).expect("it exists");
        connection.attachment_id = Some(name.attachment_id);
        connection.slot = name.slot;
        connection.is_late_in_slot = is_late_in_slot;
        let mut go = Go {
            connection: ConnectionId(u64::from(id)),
            epoch: name.epoch,
            slot: name.slot,
            generation: attachment.generation,
            epoch_in_catalog: attachment.session_epoch,
        };
        if self.is(Mutant::EpochIgnored) {
            (go.epoch, go.epoch_in_catalog) = (1, 0);
        }
        if self.is(Mutant::SlotIgnored) {
            go.slot = 1000 + id;
        }
        if go.epoch < go.epoch_in_catalog {
            world.coverage.count("an epoch that is over is refused");
        }
        let mut outputs = Vec::new();
        self.fences.entry(name.attachment_id).or_default().go(go, &mut outputs);
        if outputs.iter().any(|output| matches!(output, Output::Close(_))) {
            world.coverage.count("a new connection closes an older one");
        }
        self.carry_out(name.attachment_id, outputs, world);
    }

    fn carry_out(&mut self, attachment_id: Uuid, outputs: Vec<Output>, world: &mut Surroundings<'_>) {
        let mut outputs = VecDeque::from(outputs);
        while let Some(output) = outputs.pop_front() {
            match output {
                Output::Close(ConnectionId(id)) => {
                    let id = id as u32;
                    let Some(connection) = self.connections.get(&id) else { continue };
                    if connection.operations > 0 {
                        world.coverage.count("a connection is closed with I/O under way");
                    }
                    self.close(id, world);
                }
                Output::Grant(ConnectionId(id)) => self.find_volume(id as u32, world),
                Output::Refuse(ConnectionId(id), reason) => {
                    world.coverage.count("the fence refuses");
                    self.answer(id as u32, Err(reason.refusal()));
                }
                Output::Persist(epoch) => {
                    let recorded = world.catalog.attachment.as_mut();
                    if let Some(it) = recorded.filter(|it| it.attachment_id == attachment_id) {
                        it.session_epoch = it.session_epoch.max(epoch);
                    }
                    let fence = self.fences.get_mut(&attachment_id).expect("it asked");
                    let mut more = Vec::new();
                    fence.persisted(epoch, &mut more);
                    outputs.extend(more);
                }
            }
        }
    }

    fn is_in_use(&self, but: u32) -> bool {
        self.connections.iter().any(|(id, connection)| *id != but && connection.has_volume)
    }

    fn find_volume(&mut self, id: u32, world: &mut Surroundings<'_>) {
        let is_in_use = self.is_in_use(id);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.has_volume = true;
        match &mut self.volume {
            VolumeState::Opening(waiting) => waiting.push(id),
            VolumeState::Open(volume) if volume.has_lost_writes() && !is_in_use => {
                self.settle(world.catalog);
                self.volume = VolumeState::Opening(vec![id]);
            }
            VolumeState::Open(volume) => {
                let volume = Rc::clone(volume);
                self.answer(id, Ok((volume, world.catalog)));
            }
            VolumeState::Closed => self.volume = VolumeState::Opening(vec![id]),
        }
    }

    /// True: it is open now. Its lock is there when no other process's I/O is.
    fn open_volume(&mut self, world: &mut Surroundings<'_>) -> bool {
        if world.disk.has_predecessors(self.process) {
            world.coverage.count("a volume's lock is waited for");
            if !self.is(Mutant::NoRestartLock) {
                return false;
            }
        }
        let catalog = &mut *world.catalog;
        let capacity_bytes = catalog.capacity_bytes as u64;
        let file =
            file::open(&catalog.volumes_dir, catalog.volume_uid, capacity_bytes, CacheMode::Buffered, 1);
        let backend = Backend::File(file.expect("the simulation's file can be opened"));
        let skip_flush = self.is(Mutant::FlushDropped);
        let faults = Faults { skip_flush, ..Faults::default() };
        self.admit(world);
        let catalog = &mut *world.catalog;
        let recorder = self.recorder(catalog);
        let volume = Volume::new(
            catalog.volume_uid,
            capacity_bytes,
            backend,
            catalog.write_cache_on,
            faults,
            recorder,
        );
        let volume = Rc::new(volume);
        let VolumeState::Opening(waiting) =
            std::mem::replace(&mut self.volume, VolumeState::Open(Rc::clone(&volume)))
        else {
            panic!("nobody opens it")
        };
        for id in waiting {
            self.answer(id, Ok((Rc::clone(&volume), &*world.catalog)));
        }
        true
    }

    /// As `Incarnations::admit` and `look`.
    fn admit(&mut self, world: &mut Surroundings<'_>) {
        let is_first = !std::mem::replace(&mut self.is_admitted, true);
        // Descriptors are opened before the file system is asked.
        world.disk.opened(self.process);
        let write_back_failed =
            is_first && !world.disk.sync_file_system() && !self.is(Mutant::WriteBackIgnored);
        let superblock = (!self.is(Mutant::MountIgnored)).then(|| world.disk.superblock.to_string());
        let seen = Seen {
            incarnation: world.catalog.incarnation,
            attach_generation: 0,
            superblock,
            file: String::new(),
            modified: String::new(),
            session: SessionMark { attachment_id: String::new(), epoch: 0 },
            write_back_failed,
        };
        let verdict = judge(lock(&world.catalog.record).as_ref(), &seen);
        if verdict.loss.is_some() {
            world.coverage.count("what the storage lost while nobody had it open is noticed");
        }
        if verdict.drops_cache && !self.is(Mutant::CacheKept) {
            world.disk.drop_cache();
        }
        *lock(&world.catalog.record) = Some(Record::of(seen, &verdict, false));
        world.catalog.incarnation = world.catalog.incarnation.max(verdict.incarnation);
    }

    fn recorder(&self, catalog: &Catalog) -> LossRecorder {
        let (record, is_unsettled) = (Arc::clone(&catalog.record), Arc::clone(&self.is_unsettled));
        let records = !self.is(Mutant::LossNotRecorded);
        LossRecorder::new(move || {
            if let Some(record) = lock(&record).as_mut().filter(|_| records) {
                record.incarnation += 1;
                record.lost_writes = true;
            }
            is_unsettled.store(true, Ordering::Relaxed);
            true
        })
    }

    /// The catalog is told of a loss; false: there is none to tell.
    fn settle(&self, catalog: &mut Catalog) -> bool {
        if !self.is_unsettled.swap(false, Ordering::Relaxed) {
            return false;
        }
        let recorded = lock(&catalog.record).as_ref().map_or(0, |record| record.incarnation);
        let raised = if self.is(Mutant::LossNotRecorded) { catalog.incarnation + 1 } else { recorded };
        catalog.incarnation = catalog.incarnation.max(raised);
        true
    }

    fn answer(&mut self, id: u32, answer: Result<(Rc<Volume>, &Catalog), Refusal>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.phase != Phase::Open {
            return;
        }
        let (volume, catalog) = match answer {
            Ok(granted) => granted,
            Err(refusal) => {
                // GO's refusal is said in words: the session goes on.
                connection.attachment_id = None;
                let _ = connection.session.opened(Err(refusal));
                return;
            }
        };
        let limits = volume.limits(false, BLOCK_BYTES as u32);
        let description = ExportDescription {
            server_id: catalog.server_id,
            volume_uid: catalog.volume_uid,
            incarnation: catalog.incarnation(),
        };
        let export = ExportInfo {
            size_bytes: limits.size_bytes,
            flags: limits.flags,
            block_sizes: Some(limits.block_sizes),
            description: Some(description.to_string()),
        };
        let opened = connection.session.opened(Ok((&export, limits)));
        assert!(opened.expect("GO is answered in words"), "a GO opens");
        assert!(connection.session.leftover().is_empty(), "our client waits for the answer");
        connection.volume = Some(volume);
    }

    fn remove(&mut self, id: u32, world: &mut Surroundings<'_>) {
        let Some(connection) = self.connections.remove(&id) else { return };
        if let VolumeState::Open(volume) = &self.volume
            && volume.has_lost_writes()
            && !self.is_in_use(id)
        {
            self.settle(world.catalog);
            self.volume = VolumeState::Closed;
        }
        let Some(attachment_id) = connection.attachment_id else { return };
        let Some(fence) = self.fences.get_mut(&attachment_id) else { return };
        let mut outputs = Vec::new();
        fence.drained(ConnectionId(u64::from(id)), &mut outputs);
        if !outputs.is_empty() {
            world.coverage.count("draining lets a connection in");
        }
        let is_forgettable = fence.is_forgettable() && outputs.is_empty();
        self.carry_out(attachment_id, outputs, world);
        if is_forgettable {
            self.fences.remove(&attachment_id);
        }
    }

    /// The management side ends the attachment: true once its last I/O has finished.
    pub(super) fn end_attachment(&mut self, world: &mut Surroundings<'_>) -> bool {
        let Some(held) = &mut world.catalog.attachment else { return true };
        let (attachment_id, generation) = (held.attachment_id, held.generation);
        if self.is(Mutant::NotFenced) {
            return true;
        }
        held.is_ending = true;
        let fence = self.fences.entry(attachment_id).or_default();
        let mut outputs = Vec::new();
        fence.fence_all(Some(generation), &mut outputs);
        if !outputs.is_empty() {
            world.coverage.count("an attachment is fenced");
        }
        self.carry_out(attachment_id, outputs, world);
        let is_drained = self.fences[&attachment_id].is_drained();
        if is_drained {
            self.fences.remove(&attachment_id);
        }
        is_drained
    }
}

impl Catalog {
    /// As it is told.
    pub(super) fn incarnation(&self) -> String {
        let recorded = lock(&self.record).as_ref().map_or(0, |record| record.incarnation);
        format!("{}.{}", self.boot, self.incarnation.max(recorded))
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of them.
pub(super) fn choose<T>(mut from: impl ExactSizeIterator<Item = T>, rng: &mut Rng) -> Option<T> {
    let len = from.len();
    if len == 0 { None } else { from.nth(rng.usize(..len)) }
}

/// What a failed request is told where there is no better word.
pub(super) const EIO: i32 = NbdError::Eio as i32;
