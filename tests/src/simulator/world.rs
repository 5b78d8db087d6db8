//! One simulation: users, a device with its processes, a network, a storage node with its processes, and a disk, on one thread
//! with a clock of its own. What happens next is chosen by the seed and by nothing else.

mod attaching;
mod copies;
mod storage_faults;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::client::contract::StallPolicy;
use ::client::device::liveness::VOUCHED_FOR;
use ::client::device::reconnect::Condition;
use fastrand::Rng;
use server::catalog::VolumeLimits;
use uuid::Uuid;

use super::client::{Bio, Client, EndedBio, Note};
use super::coverage::Coverage;
use super::device::Device;
use super::disk::{CONTROL, Disk};
use super::network::{self, End, Link, LinkId};
use super::server::Server;
use super::storage::{self, Catalog, EIO};
use super::{Failure, Mutant, client, users};
use crate::block_history::{BLOCK_BYTES, BlockHistory, Blocks, SentFlush};
use attaching::Settling;

/// Blocks of the volume.
const BLOCKS: usize = 12;
const CAPACITY_BYTES: usize = BLOCKS * BLOCK_BYTES;
/// Requests of one simulation.
pub(super) const REQUESTS: usize = 220;
/// A simulation that takes more is stuck.
const STEPS_MAX: u64 = 400_000;
/// How much longer than probes count a request may take: until the server is left, and its requests are given up.
const SLOW_PATIENCE: Duration = Duration::from_secs(60);
/// Steps between two faults, on average.
const STEPS_PER_FAULT: u64 = 300;
/// Some of the faults of [`World::next_fault`].
const TAKING: u8 = 7;
const FAILED_SYNC: u8 = 8;
const FAILED_WRITE_BACK: u8 = 9;
const EVICTION: u8 = 10;
const DETACHING: u8 = 12;

pub(super) struct World<'a> {
    rng: Rng,
    now: Instant,
    links: Vec<Link>,
    stalled: Vec<LinkId>,
    disk: Disk,
    catalog: Catalog,
    server: Option<Server>,
    processes: u64,
    devices: Vec<Device>,
    history: BlockHistory,
    requests_left: usize,
    attachments: u64,
    /// The volume is being taken away from its holder.
    is_taking: bool,
    /// Its holder detaches it, once its requests have ended.
    is_detaching: bool,
    /// What was written is being made durable, before the next holder is told that the volume is its own.
    settling: Option<Settling>,
    /// The last FLUSH of the device that is being detached.
    last_flush: Option<SentFlush>,
    room_bytes: usize,
    lies: bool,
    /// Nothing fails, but the disk takes minutes for a sync now and then; users do not wait for ever.
    is_slow: bool,
    slow_syncs_left: u8,
    has_faults: bool,
    may_fail_syncs: bool,
    mutant: Option<Mutant>,
    coverage: &'a mut Coverage,
    /// When a request ended last.
    ended_at: Instant,
    /// Requests that have ended, and whether an error may be.
    ended: Vec<(EndedBio, bool)>,
    steps: u64,
}

/// Few volumes have limits; these are so low that requests wait for long, and hold for reads or for writes.
fn limits(seed: u64, mutant: Option<Mutant>) -> VolumeLimits {
    let mut rng = Rng::with_seed(!seed);
    let is_looked_for = matches!(mutant, Some(Mutant::LimitIgnored | Mutant::LookAheadLeft));
    if rng.u8(..12) > 0 && !is_looked_for {
        return VolumeLimits::default();
    }
    match rng.u8(..4) {
        0 => VolumeLimits { read_iops: rng.u64(1..4), ..VolumeLimits::default() },
        1 => VolumeLimits { write_iops: rng.u64(1..4), ..VolumeLimits::default() },
        2 => VolumeLimits { read_bytes_per_second: rng.u64(1_000..8_000), ..VolumeLimits::default() },
        _ => VolumeLimits { write_bytes_per_second: rng.u64(500..4_000), ..VolumeLimits::default() },
    }
}

impl<'a> World<'a> {
    pub(super) fn new(
        seed: u64,
        mutant: Option<Mutant>,
        volumes_dir: &Path,
        volume_uid: Uuid,
        coverage: &'a mut Coverage,
    ) -> Self {
        let mut rng = Rng::with_seed(seed);
        let catalog = Catalog {
            server_id: Uuid::from_u128(1),
            volume_uid,
            capacity_bytes: CAPACITY_BYTES,
            write_cache_on: rng.u8(..4) > 0,
            limits: limits(seed, mutant),
            boot: 1,
            incarnation: 0,
            record: Arc::default(),
            known: Arc::default(),
            attachment: None,
            is_written: false,
            attach_generation: 0,
            volumes_dir: volumes_dir.to_owned(),
        };
        let room_bytes =
            [700, 5_000, 100_000][rng.usize(..if mutant == Some(Mutant::NoReaping) { 1 } else { 3 })];
        let lies = rng.u8(..8) == 0 || mutant == Some(Mutant::TagOnlyCookie);
        let may_fail_syncs = rng.u8(..6) == 0;
        let is_slow = !lies && (rng.u8(..40) == 0 || mutant == Some(Mutant::LookAheadLeft));
        let mut world = Self {
            now: Instant::now(),
            links: Vec::new(),
            disk: Disk::new(CAPACITY_BYTES),
            server: Some(Server::new(1, &catalog, mutant, Instant::now())),
            catalog,
            processes: 1,
            devices: Vec::new(),
            history: BlockHistory::new(seed, BLOCKS),
            requests_left: REQUESTS,
            attachments: 0,
            is_taking: false,
            is_detaching: false,
            settling: None,
            last_flush: None,
            room_bytes,
            lies,
            is_slow,
            slow_syncs_left: 2,
            has_faults: true,
            may_fail_syncs: may_fail_syncs && !is_slow,
            stalled: Vec::new(),
            mutant,
            coverage,
            ended_at: Instant::now(),
            ended: Vec::new(),
            steps: 0,
            rng,
        };
        world.attach();
        world.start_process();
        world
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// A promise was broken, or it is stuck.
    pub(super) fn run(mut self) -> Result<(), Failure> {
        while self.requests_left > 0 || self.is_busy() {
            self.has_faults = self.requests_left > 0;
            self.step()?;
        }
        self.read_everything()?;
        self.flush_and_look_at_the_disk()
    }

    fn device(&mut self) -> &mut Device {
        self.devices.last_mut().expect("there is always one")
    }

    fn is_busy(&self) -> bool {
        let is_lost = |device: &Device| {
            let client = device.client.as_ref();
            client.is_none_or(|client| matches!(client.condition(), Condition::Lost(_)))
        };
        let is_changing_hands = self.is_taking || self.is_detaching || self.settling.is_some();
        is_changing_hands || self.devices.iter().any(|device| device.has_bios() || is_lost(device))
    }

    fn step(&mut self) -> Result<(), Failure> {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return Err(self.stuck());
        }
        let has_done = match self.rng.u8(..16) {
            0 => self.submit(),
            1..=4 => self.client_step(false),
            5..=8 => self.server_step(),
            9..=12 => self.traffic(),
            13 | 14 => self.disk_step(),
            _ => {
                self.disk.write_back(&mut self.rng);
                self.chance()?;
                true
            }
        };
        self.take_ended()?;
        self.look_at_slow_requests()?;
        self.server.as_mut().map_or(Ok(()), Server::take_fault)?;
        self.look_at_copy()?;
        self.now += Duration::from_micros(self.rng.u64(..2_000));
        if !has_done && self.rng.u8(..8) == 0 && !self.do_anything() {
            // Nothing can happen but that time passes.
            self.now += Duration::from_millis(self.rng.u64(..1_500));
        }
        self.take_ended()
    }

    /// Where the disk is slow, and nothing else is wrong, nobody is told of an error before probes count no more, nor waits for
    /// much longer.
    fn look_at_slow_requests(&mut self) -> Result<(), Failure> {
        let (now, is_slow) = (self.now, self.is_slow);
        let quiet = now.duration_since(self.ended_at);
        let device = self.device();
        let oldest = device.oldest_request(now);
        match device.given_up_after.take().filter(|_| is_slow) {
            // Ages are counted in ticks of a second.
            Some(after) if after + Duration::from_secs(2) < VOUCHED_FOR => {
                let words = format!("a request is given up after {after:?} though the server lives");
                Err(Failure::Error(words))
            }
            // While others are answered nobody is silent.
            _ if is_slow && oldest > VOUCHED_FOR + SLOW_PATIENCE && quiet > SLOW_PATIENCE => {
                Err(Failure::Stuck(format!("a request is {oldest:?} old, and nobody is told")))
            }
            _ => Ok(()),
        }
    }

    fn stuck(&self) -> Failure {
        let conditions: Vec<String> = self
            .devices
            .iter()
            .map(|device| match &device.client {
                Some(client) => format!("{:?}, {} requests", client.condition(), device.bios_count()),
                None => "no process".to_owned(),
            })
            .collect();
        let server = if self.server.is_some() { "up" } else { "down" };
        Failure::Stuck(format!("{conditions:?}, server {server}"))
    }

    /// Tries everything; false: there was nothing.
    fn do_anything(&mut self) -> bool {
        let mut has_done = self.disk_step();
        for _ in 0..8 {
            has_done |= self.server_step();
        }
        has_done |= self.traffic() | self.links.iter().any(Link::has_traffic);
        // The last, because what ended is to be told before anything else happens.
        self.client_step(true) | has_done
    }

    // ------------------------------------------------------------------------------------------------ users

    fn submit(&mut self) -> bool {
        if self.requests_left == 0 || self.is_detaching {
            return false;
        }
        let (queues, depth) = (self.device().spec.nr_queues, self.device().spec.queue_depth);
        let (queue_id, tag) = (self.rng.u16(..queues), self.rng.u16(..depth));
        let (has_cache, is_down) = (self.catalog.write_cache_on, self.device().client.is_none());
        if is_down || self.device().bios[usize::from(queue_id)][usize::from(tag)].is_some() {
            return false;
        }
        let now = self.now;
        let bio = users::any_request(&mut self.history, has_cache, now, &mut self.rng);
        let Some(bio) = bio else { return false };
        self.requests_left -= 1;
        let request = bio.request;
        self.coverage.say(|| format!("submitted to queue {queue_id} tag {tag}: {request:?} {:?}", bio.note));
        let device = self.device();
        device.bios[usize::from(queue_id)][usize::from(tag)] = Some(bio);
        if let Some(client) = &mut device.client {
            client.submit(queue_id, tag, request);
        }
        true
    }

    fn take_ended(&mut self) -> Result<(), Failure> {
        for (EndedBio { bio, result, .. }, may_fail) in std::mem::take(&mut self.ended) {
            self.ended_at = self.now;
            self.coverage.say(|| format!("ended {:?} {:?} {result:?}", bio.request, bio.note));
            match (bio.note, result) {
                (Note::Gone, _) => {}
                (Note::Read(read), Ok(())) => {
                    self.history.read_answered(&read, &bio.data)?;
                    self.coverage.count("a read is checked");
                }
                (Note::Write { write, is_durable }, Ok(())) => {
                    self.history.write_answered(write, is_durable);
                }
                (Note::Flush(flush), Ok(())) => self.history.flush_answered(flush),
                (note, error) => {
                    if !may_fail && !self.may_fail_syncs && !self.lies {
                        return Err(Failure::Error(format!("{:?} {error:?}", bio.request)));
                    }
                    debug_assert_eq!(error, Err(EIO), "{error:?}");
                    self.coverage.count("a request fails");
                    if let Note::Write { write, .. } = note {
                        self.history.write_failed(write);
                    }
                }
            }
        }
        Ok(())
    }

    fn read_everything(&mut self) -> Result<(), Failure> {
        for first in 0..BLOCKS {
            let blocks = Blocks { first, count: 1 };
            let read = users::read(&self.history, blocks, self.now);
            self.ask(read)?;
        }
        Ok(())
    }

    /// Has a request served, with nothing else going on.
    fn ask(&mut self, bio: Bio) -> Result<(), Failure> {
        let request = bio.request;
        let device = self.device();
        device.bios[0][0] = Some(bio);
        if let Some(client) = &mut device.client {
            client.submit(0, 0, request);
        }
        self.has_faults = false;
        while self.is_busy() {
            self.step()?;
        }
        Ok(())
    }

    /// Without faults a last FLUSH is answered, and then the power goes.
    fn flush_and_look_at_the_disk(&mut self) -> Result<(), Failure> {
        if self.catalog.write_cache_on && self.rng.bool() {
            let flush = users::flush(&self.history, self.now);
            self.ask(flush)?;
        }
        self.disk.power_cut(&mut self.rng);
        let found = self.disk.contents();
        Ok(self.history.check_and_adopt(Blocks { first: 0, count: BLOCKS }, &found)?)
    }

    // ------------------------------------------------------------------------------------------------ steps

    fn client_step(&mut self, all: bool) -> bool {
        let mut has_done = false;
        let mut dialled = Vec::new();
        for index in 0..self.devices.len() {
            let device = &mut self.devices[index];
            let oldest = device.oldest_request(self.now);
            let Some(client) = &mut device.client else { continue };
            let mut ended = Vec::new();
            let might_fail = self.is_taking || device.may_fail || device.may_be_lost;
            let mut world = client::Surroundings {
                links: &mut self.links,
                bios: &mut device.bios,
                ended: &mut ended,
                rng: &mut self.rng,
                coverage: self.coverage,
                now: self.now,
                room_bytes: self.room_bytes,
                dialled: &mut dialled,
                is_server_up: self.server.is_some(),
            };
            has_done |= if all { client.step_all(&mut world) } else { client.step(&mut world) };
            // A process that is not served yet has nothing to hand on: in the product there is no device before.
            let is_known = device.incarnation.is_some() || client.queues_up() > 0;
            if is_known && device.incarnation.as_deref() != Some(client.incarnation()) {
                device.incarnation = Some(client.incarnation().to_owned());
            }
            match client.condition() {
                Condition::Failing(_) if !device.may_fail => {
                    device.may_fail = true;
                    device.given_up_after = Some(oldest);
                }
                Condition::Live if client.is_connected() => {
                    device.may_be_lost =
                        device.may_be_lost && client.incarnation() != self.catalog.incarnation();
                    device.may_fail &= device.has_bios();
                }
                _ => {}
            }
            let may_fail = might_fail || device.may_fail || device.may_be_lost;
            self.ended.extend(ended.into_iter().map(|ended| (ended, may_fail)));
        }
        for link in dialled {
            if let Some(server) = &mut self.server {
                server.accept(link);
            }
        }
        has_done
    }

    /// Whether one of these rules is the one that is broken: what they take is done more often then.
    fn is_looked_for(&self, rules: &[Mutant]) -> bool {
        self.mutant.is_some_and(|mutant| rules.contains(&mutant))
    }

    /// Has the server do something; `None` while there is none.
    fn with_server<T>(
        &mut self,
        act: impl FnOnce(&mut Server, &mut storage::Surroundings<'_>) -> T,
    ) -> Option<T> {
        let server = self.server.as_mut()?;
        let mut world = storage::Surroundings {
            catalog: &mut self.catalog,
            disk: &mut self.disk,
            links: &mut self.links,
            rng: &mut self.rng,
            coverage: self.coverage,
            now: self.now,
            room_bytes: self.room_bytes,
            lies: self.lies,
            may_fail: self.has_faults && !self.is_slow,
        };
        Some(act(server, &mut world))
    }

    fn server_step(&mut self) -> bool {
        let (before, is_taking, drops) = (self.catalog.told(), self.is_taking, self.disk.drops);
        let step = self.with_server(|server, world| {
            let has_done = server.step(world);
            let is_ended = is_taking && world.rng.u8(..4) == 0 && server.end_attachment(world);
            (has_done | is_ended, is_ended)
        });
        let Some((has_done, is_ended)) = step else { return false };
        self.hear_of_copy();
        self.look_at_incarnation(before);
        if self.disk.drops != drops {
            self.storage_lost();
            self.coverage.count("what could not be written back is dropped before it is read");
        }
        // A death there costs a whole start: few, but where it is looked for.
        let kills_in =
            if self.is_looked_for(&[Mutant::CacheDroppedLate, Mutant::WriteBackForgotten]) { 8 } else { 64 };
        if self.has_faults
            && !self.is_slow
            && self.server.as_ref().is_some_and(|server| server.gate.is_admitting())
            && self.rng.u8(..kills_in) == 0
        {
            self.coverage.count("a server is killed while it opens a volume");
            self.kill_server();
            return true;
        }
        if is_ended {
            self.is_taking = false;
            self.give_away();
        }
        has_done
    }

    fn traffic(&mut self) -> bool {
        network::traffic(&mut self.links, &mut self.rng)
    }

    fn disk_step(&mut self) -> bool {
        let can_go_on = self.disk.can_go_on(self.now);
        let Some(ended) = self.disk.step(self.now, &mut self.rng) else { return can_go_on };
        if ended.is_sync && ended.result < 0 {
            self.coverage.count("a sync fails");
        }
        let before = self.catalog.told();
        if ended.owner.process >= CONTROL {
            self.settled(&ended);
            return true;
        }
        self.with_server(|server, world| {
            if ended.owner.process == server.process {
                server.ended(ended, world);
            }
        });
        self.look_at_incarnation(before);
        true
    }

    /// From when on it is raised, whoever has unflushed writes may be told that they are lost.
    fn look_at_incarnation(&mut self, before: (u64, u64)) {
        if self.catalog.told() != before {
            self.storage_lost();
            self.coverage.count("an incarnation is raised");
        }
    }

    // ------------------------------------------------------------------------------------------------ faults

    /// Now and then, something happens to somebody; what was killed comes back; what was lost is attached anew.
    fn chance(&mut self) -> Result<(), Failure> {
        if self.server.is_none() && (self.rng.u8(..8) == 0 || !self.has_faults) {
            self.processes += 1;
            self.server = Some(Server::new(self.processes, &self.catalog, self.mutant, self.now));
            if self.has_faults && !self.is_slow && self.rng.u8(..12) == 0 {
                for _ in 0..self.rng.u8(..6) {
                    self.server_step();
                }
                self.coverage.count("a server is killed as it starts");
                self.kill_server();
            }
        }
        if self.settling.is_none()
            && self.device().client.is_none()
            && (self.rng.u8(..8) == 0 || !self.has_faults)
        {
            self.start_process();
        }
        self.look_after_devices()?;
        self.change_hands()?;
        network::give_up_stalled(&mut self.stalled, &mut self.links, self.now, &mut self.rng);
        let faults_per_chance = STEPS_PER_FAULT / 16;
        self.perhaps_copy(faults_per_chance);
        if !self.has_faults || self.rng.u64(..faults_per_chance) > 0 {
            return Ok(());
        }
        if self.is_slow {
            let is_over = self.disk.slow_until.is_none_or(|until| self.now >= until);
            if is_over && self.slow_syncs_left > 0 && self.rng.u8(..4) == 0 {
                self.slow_syncs_left -= 1;
                let until = self.now + Duration::from_secs(self.rng.u64(5..1_200));
                self.disk.slow_until = Some(until);
                self.coverage.count("the disk takes long for a sync");
            }
            return Ok(());
        }
        match self.next_fault() {
            0 => self.kill_server(),
            1 if self.rng.bool() => self.kill_server(),
            2 => self.cut_power(),
            3 | 4 => self.kill_client(),
            5 => {
                let policy = match self.rng.u8(..3) {
                    0 if self.rng.bool() => StallPolicy::FailAfterMs(self.rng.u64(..50)),
                    0 => StallPolicy::FailAfterMs(self.rng.u64(..3_000)),
                    _ => StallPolicy::Wait,
                };
                let now = self.now;
                let device = self.device();
                device.spec.policy = policy;
                if let Some(client) = &mut device.client {
                    client.told_policy(policy, now);
                }
            }
            6 => {
                self.now += Duration::from_secs(self.rng.u64(..25));
                self.coverage.count("the clock jumps");
            }
            TAKING if self.rng.bool() => {
                self.is_taking = true;
                self.coverage.count("another node takes the volume by force");
            }
            FAILED_SYNC => self.disk.fails_next_sync = self.may_fail_syncs,
            FAILED_WRITE_BACK if self.may_fail_syncs => {
                self.disk.fail_write_back(&mut self.rng);
                self.coverage.count("the kernel fails to write back");
            }
            EVICTION => self.evict(),
            11 if self.server.is_none() && self.disk.operations() == 0 => {
                self.disk.remount(&mut self.rng);
                self.storage_lost();
                self.coverage.count("the file system is mounted anew");
            }
            DETACHING if self.rng.bool() => self.is_detaching = true,
            _ => self.cut_link(),
        }
        Ok(())
    }

    /// Which of the twenty faults comes next: more often one of those that a broken rule is about.
    fn next_fault(&mut self) -> u8 {
        let wanted: &[u8] = match self.mutant {
            Some(Mutant::LossNotRecorded) => &[FAILED_SYNC],
            Some(Mutant::WriteBackIgnored | Mutant::WriteBackForgotten) => &[FAILED_WRITE_BACK],
            Some(Mutant::CacheKept) => &[FAILED_WRITE_BACK, EVICTION],
            Some(Mutant::CacheDroppedLate) => &[EVICTION],
            Some(Mutant::ControlSyncUntold) => &[TAKING, DETACHING],
            _ => &[],
        };
        if !wanted.is_empty() && self.rng.u8(..4) == 0 {
            return wanted[self.rng.usize(..wanted.len())];
        }
        self.rng.u8(..20)
    }

    fn cut_link(&mut self) {
        let links = self.device().client.as_ref().map(Client::links).unwrap_or_default();
        let Some(id) = self.rng.choice(links) else { return };
        let loses_arrived = self.rng.bool();
        let link = &mut self.links[id];
        match self.rng.u8(..6) {
            0 => {
                link.to_client.cut(loses_arrived);
                link.to_server.cut(self.rng.bool());
                self.coverage.count("both sides are reset");
            }
            1 => {
                link.to_client.cut(loses_arrived);
                self.coverage.count("only the client is reset");
            }
            2 => {
                link.to_server.cut(loses_arrived);
                self.coverage.count("only the server is reset");
            }
            3 => {
                link.to_client.close(End::Fin);
                link.to_server.close(End::Fin);
                self.coverage.count("a connection is closed by a FIN");
            }
            4 => {
                // Something in between acknowledges what it does not pass on.
                link.stalled_at = Some(self.now);
                self.coverage.count("a connection is swallowed");
            }
            _ => {
                self.stall(id);
                self.coverage.count("a connection stands still");
            }
        }
    }

    fn stall(&mut self, id: LinkId) {
        if self.links[id].stalled_at.is_none() {
            self.links[id].stalled_at = Some(self.now);
            self.stalled.push(id);
        }
    }

    fn kill_server(&mut self) {
        if self.disk.operations() == 0 && self.rng.bool() {
            self.coverage.count("a server ends in order");
            self.with_server(|server, world| server.gate.close_volumes(world));
        }
        let Some(mut server) = self.server.take() else { return };
        if self.disk.operations() > 0 {
            self.coverage.count("a server is killed with I/O under way");
        }
        server.die(&mut self.links, &mut self.rng, self.coverage);
        self.disk.process_died(server.process, &mut self.rng);
        self.abandon_settling(server.process);
    }

    fn storage_lost(&mut self) {
        self.history.lost_power();
        for device in &mut self.devices {
            device.may_be_lost = true;
            device.forget_reads();
        }
    }

    fn kill_client(&mut self) {
        let Some(device) = self.devices.last_mut() else { return };
        let Some(mut client) = device.client.take() else { return };
        client.die(&mut self.links, &mut self.rng);
        self.coverage.count("a device process is killed");
    }
}
