//! A simulation of a disk on a foreign server: one that tells no incarnation, whose process may be another one each time, and that may
//! grant fewer connections than the disk has.
//!
//! What users are promised there: a FLUSH that succeeds covers all that was answered before it was sent, whatever became of the server
//! since; where something of that was lost, the FLUSH fails; and what fails, or is lost, becomes nothing that nobody wrote.

mod server;

use std::time::{Duration, Instant};

use client::contract::StallPolicy;
use client::device::queue::connection::Origin;
use client::device::reconnect::Condition;
use fastrand::Rng;
use proto::export_name::{SECRET_BYTES, Secret};
use uuid::Uuid;

use super::client::{Bio, Bios, Client, EndedBio, Note, Origins, Spec, Surroundings, abandon};
use super::coverage::Coverage;
use super::network::{self, End, Link, LinkId, TCP_USER_TIMEOUT};
use super::{Failure, Mutant, users};
use crate::block_history::{BLOCK_BYTES, BlockHistory, Blocks};
use server::{ForeignServer, Storage};

const BLOCKS: usize = 12;
const REQUESTS: usize = 220;
const STEPS_MAX: u64 = 400_000;
/// Where few queues are served, and each has few requests, something happens too often: then nothing does any more, so that it ends.
const FAULT_STEPS_MAX: u64 = 40_000;
/// But requests end all the time, whatever happens: in so many steps some fifty things do, and between many of them somebody is served.
const STARVED_STEPS: u64 = 20_000;
/// Steps between two faults, on average: so many that all queues have come together again, mostly.
const STEPS_PER_FAULT: u64 = 400;
const STEPS_PER_CHANCE: u64 = 8;
/// When nothing happens any more, so many FLUSHes are enough: one that may stand for users who asked before the last loss, one that tells
/// of it, and one that succeeds.
const LAST_FLUSHES_MAX: usize = 3;
/// Requests that wait are given up after so long, where they are not to wait for ever.
const FAIL_AFTER_MS: std::ops::Range<u64> = 2_000..30_000;

pub(super) struct ForeignWorld<'a> {
    rng: Rng,
    now: Instant,
    links: Vec<Link>,
    stalled: Vec<LinkId>,
    /// Connections whose server is gone, since when, and nobody has told the client.
    untold: Vec<(LinkId, Instant)>,
    storage: Storage,
    server: Option<ForeignServer>,
    /// How many the server grants.
    connections_max: usize,
    /// It never grants more than one queue's.
    is_tight: bool,
    /// It always grants what is asked for.
    is_generous: bool,
    /// Connections of processes that are gone: what still comes on them may be of what the storage has lost since.
    gone: Vec<LinkId>,
    spec: Spec,
    bios: Bios,
    client: Option<Client>,
    /// Connections that the device process has begun; some of them wait until the queues can have theirs together.
    begun: Vec<LinkId>,
    has_had_process: bool,
    history: BlockHistory,
    requests_left: usize,
    room_bytes: usize,
    has_faults: bool,
    /// Something has happened to a connection or a process.
    may_fail: bool,
    /// Nothing happens any more, and all has come to rest.
    is_at_rest: bool,
    last_flush_succeeded: bool,
    mutant: Option<Mutant>,
    coverage: &'a mut Coverage,
    steps: u64,
    /// When the last request ended.
    ended_at_step: u64,
}

impl<'a> ForeignWorld<'a> {
    pub(super) fn new(seed: u64, mutant: Option<Mutant>, coverage: &'a mut Coverage) -> Self {
        let mut rng = Rng::with_seed(seed);
        let nr_queues = rng.u16(1..=3);
        let nr_connections = nr_queues * rng.u16(1..=2);
        // Of these a server that grants too few would be noticed, and not what comes of the broken rule.
        let is_generous = matches!(mutant, Some(Mutant::LostAlone | Mutant::ServedBeforeAllAreDown));
        let fails = rng.u8(..4) == 0 && !is_generous;
        let fail_after_ms = rng.u64(FAIL_AFTER_MS);
        let origins = [Origins::One(Origin::Pages), Origins::One(Origin::Staging), Origins::Both];
        let spec = Spec {
            attachment_id: Uuid::from_u128(1),
            secret: Secret::parse(&"5a".repeat(SECRET_BYTES)).expect("it is one"),
            session_epoch: 0,
            server_id: Uuid::nil(),
            volume_uid: Uuid::nil(),
            capacity_bytes: (BLOCKS * BLOCK_BYTES) as u64,
            nr_queues,
            nr_connections,
            queue_depth: rng.u16(1..=5),
            small_bytes_max: [0, 4096, 8192][rng.usize(..3)],
            origins: origins[rng.usize(..3)],
            is_volatile_cache: true,
            policy: if fails { StallPolicy::FailAfterMs(fail_after_ms) } else { StallPolicy::Wait },
            is_foreign: true,
        };
        let is_tight = rng.u8(..4) == 0 && !is_generous;
        let tags = || (0..spec.queue_depth).map(|_| None).collect();
        let mut world = Self {
            now: Instant::now(),
            links: Vec::new(),
            stalled: Vec::new(),
            untold: Vec::new(),
            storage: Storage::new(BLOCKS * BLOCK_BYTES),
            server: Some(ForeignServer::new()),
            connections_max: if is_tight { usize::from(nr_connections / nr_queues) } else { usize::MAX },
            is_tight,
            is_generous,
            gone: Vec::new(),
            bios: (0..nr_queues).map(|_| tags()).collect(),
            spec,
            client: None,
            begun: Vec::new(),
            has_had_process: false,
            history: BlockHistory::new(seed, BLOCKS),
            requests_left: REQUESTS,
            room_bytes: [700, 5_000, 100_000][rng.usize(..3)],
            has_faults: true,
            // Whoever gets connections later has the others begin anew; and the first take their time, too.
            may_fail: is_tight || fails,
            is_at_rest: false,
            last_flush_succeeded: false,
            mutant,
            coverage,
            steps: 0,
            ended_at_step: 0,
            rng,
        };
        world.start_process();
        world
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// A promise was broken, or it is stuck.
    pub(super) fn run(mut self) -> Result<(), Failure> {
        while self.requests_left > 0 || self.is_busy() {
            self.has_faults = self.requests_left > 0 && self.steps < FAULT_STEPS_MAX;
            self.step()?;
        }
        self.has_faults = false;
        while !self.is_quiet() {
            self.step()?;
        }
        self.is_at_rest = true;
        self.flush_at_last()?;
        for first in 0..BLOCKS {
            let read = users::read(&self.history, Blocks { first, count: 1 }, self.now);
            self.ask(read)?;
        }
        self.storage.forget_all();
        Ok(self.history.check_stable(self.storage.stable())?)
    }

    /// Nothing happens any more: a FLUSH succeeds, after those that tell of what happened.
    fn flush_at_last(&mut self) -> Result<(), Failure> {
        // Every queue looks twice at what the others have counted.
        for _ in 0..2 {
            self.client_step(true)?;
        }
        for _ in 0..LAST_FLUSHES_MAX {
            self.last_flush_succeeded = false;
            let flush = users::flush(&self.history, self.now);
            self.ask(flush)?;
            if self.last_flush_succeeded {
                self.coverage.count("a foreign server's disk is flushed at last");
                return Ok(());
            }
        }
        Err(Failure::Error(format!("{LAST_FLUSHES_MAX} FLUSHes fail though nothing happens any more")))
    }

    /// Has a request served, with nothing else going on.
    fn ask(&mut self, bio: Bio) -> Result<(), Failure> {
        let request = bio.request;
        self.bios[0][0] = Some(bio);
        if let Some(client) = &mut self.client {
            client.submit(0, 0, request);
        }
        self.has_faults = false;
        while self.is_busy() {
            self.step()?;
        }
        Ok(())
    }

    /// Whether nobody is to be told of the end of a connection any more, and all have others, to a server that stays.
    fn is_quiet(&self) -> bool {
        let is_open = |link: LinkId| self.links[link].to_client.is_open();
        let is_live = |client: &Client| {
            let is_connected = client.is_connected() && client.condition() == Condition::Live;
            is_connected && client.links().into_iter().all(is_open)
        };
        let stays = self.server.as_ref().is_some_and(|server| server.is_left().is_none());
        stays
            && self.stalled.is_empty()
            && self.untold.is_empty()
            && self.client.as_ref().is_some_and(is_live)
    }

    /// Whether requests may fail because they have waited for too long.
    fn may_give_up(&self) -> bool {
        matches!(self.spec.policy, StallPolicy::FailAfterMs(_)) && !self.is_at_rest
    }

    fn is_busy(&self) -> bool {
        self.client.is_none() || self.bios.iter().flatten().any(Option::is_some)
    }

    fn step(&mut self) -> Result<(), Failure> {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            let condition = self.client.as_ref().map(Client::condition);
            return Err(Failure::Stuck(format!("a foreign server's disk: {condition:?}")));
        }
        if self.has_faults && self.steps - self.ended_at_step > STARVED_STEPS {
            return Err(Failure::Stuck("nobody is served between two faults on a foreign server".to_owned()));
        }
        let has_done = match self.rng.u8(..16) {
            0 => self.submit(),
            1..=5 => self.client_step(false)?,
            6..=9 => self.server_step(),
            10..=13 => network::traffic(&mut self.links, &mut self.rng),
            // One step in [`STEPS_PER_CHANCE`].
            _ => {
                self.storage.write_back(&mut self.rng);
                self.chance();
                true
            }
        };
        self.now += Duration::from_micros(self.rng.u64(..2_000));
        if !has_done && self.rng.u8(..8) == 0 && !self.do_anything()? {
            // Nothing can happen but that time passes.
            self.now += Duration::from_millis(self.rng.u64(..1_500));
        }
        Ok(())
    }

    /// Tries everything; false: there was nothing.
    fn do_anything(&mut self) -> Result<bool, Failure> {
        let mut has_done = false;
        for _ in 0..8 {
            has_done |= self.server_step();
        }
        has_done |=
            network::traffic(&mut self.links, &mut self.rng) | self.links.iter().any(Link::has_traffic);
        Ok(self.client_step(true)? | has_done)
    }

    // ------------------------------------------------------------------------------------------------ users

    fn submit(&mut self) -> bool {
        let Some(client) = self.client.as_mut().filter(|_| self.requests_left > 0) else { return false };
        let queue_id = self.rng.u16(..self.spec.nr_queues);
        let tag = self.rng.u16(..self.spec.queue_depth);
        let place = &mut self.bios[usize::from(queue_id)][usize::from(tag)];
        if place.is_some() {
            return false;
        }
        let bio = users::any_request(&mut self.history, true, self.now, &mut self.rng);
        let Some(bio) = bio else { return false };
        self.requests_left -= 1;
        self.coverage
            .say(|| format!("submitted to queue {queue_id} tag {tag}: {:?} {:?}", bio.request, bio.note));
        client.submit(queue_id, tag, bio.request);
        *place = Some(bio);
        true
    }

    /// A request has ended; `is_late`: perhaps by the word of a process that is gone.
    fn take_ended(&mut self, ended: EndedBio, is_late: bool) -> Result<(), Failure> {
        let EndedBio { bio, result, was_lost } = ended;
        self.ended_at_step = self.steps;
        self.coverage.say(|| format!("ended {:?} {:?} {result:?}", bio.request, bio.note));
        match (bio.note, result) {
            (Note::Gone, Ok(())) => {}
            (Note::Read(read), Ok(())) => {
                self.history.read_answered(&read, &bio.data)?;
                self.coverage.count("a read of a foreign server's disk is checked");
            }
            (Note::Write { write, is_durable }, Ok(())) => {
                self.history.write_answered(write, is_durable);
                if is_late {
                    self.coverage.count("an answer comes of a foreign server that is gone");
                    self.history.may_have_forgotten();
                }
            }
            (Note::Flush(flush), Ok(())) => {
                self.last_flush_succeeded = true;
                self.history.flush_answered(flush);
                self.history.check_stable(self.storage.stable())?;
            }
            (Note::Read(_) | Note::Gone, Err(_)) if self.may_give_up() => {
                self.coverage.count("a read of a foreign server's disk is given up");
            }
            (Note::Write { write, .. }, Err(_)) if self.may_fail && (was_lost || self.may_give_up()) => {
                self.history.write_failed(write);
            }
            (Note::Flush(flush), Err(_)) if self.may_fail => {
                self.coverage.count("a FLUSH of a foreign server's disk fails");
                self.history.flush_failed(flush);
            }
            // What changes nothing is asked for again.
            (note, error) => return Err(Failure::Error(format!("{:?} {note:?} {error:?}", bio.request))),
        }
        let up = self.client.as_ref().map_or(0, Client::queues_up);
        if result.is_ok() && up > 0 && up < usize::from(self.spec.nr_queues) {
            self.coverage.count("a foreign server's disk is served by some of its queues");
        }
        Ok(())
    }

    // ------------------------------------------------------------------------------------------------ steps

    /// As a device process sees the world.
    fn with_client<T>(
        &mut self,
        act: impl FnOnce(&mut Option<Client>, &Spec, &mut Surroundings<'_>) -> T,
    ) -> (T, Vec<EndedBio>) {
        let (mut ended, mut dialled) = (Vec::new(), Vec::new());
        let mut world = Surroundings {
            links: &mut self.links,
            bios: &mut self.bios,
            ended: &mut ended,
            rng: &mut self.rng,
            coverage: self.coverage,
            now: self.now,
            room_bytes: self.room_bytes,
            dialled: &mut dialled,
            is_server_up: self.server.is_some(),
        };
        let outcome = act(&mut self.client, &self.spec, &mut world);
        for link in dialled {
            self.begun.push(link);
            let Some(server) = &mut self.server else { continue };
            if !server.accept(link, self.connections_max, &mut self.links) {
                self.coverage.count("a foreign server grants no more connections");
            }
        }
        (outcome, ended)
    }

    fn client_step(&mut self, all: bool) -> Result<bool, Failure> {
        if !self.gone.is_empty() {
            let links = self.client.as_ref().map(Client::links).unwrap_or_default();
            self.gone.retain(|link| links.contains(link));
        }
        let is_late = !self.gone.is_empty();
        let (has_done, ended) = self.with_client(|client, _, world| match client {
            Some(client) if all => client.step_all(world),
            Some(client) => client.step(world),
            None => false,
        });
        for ended in ended {
            self.take_ended(ended, is_late)?;
        }
        if self.client.as_ref().is_some_and(Client::has_come_too_soon) {
            return Err(Failure::Error("queues did not wait for one that came in time".to_owned()));
        }
        Ok(has_done)
    }

    fn start_process(&mut self) {
        let former = self.has_had_process.then(String::new);
        self.has_had_process = true;
        let mutant = self.mutant;
        self.with_client(|client, spec, world| {
            *client = Some(Client::new(spec.clone(), former, String::new(), mutant, world));
        });
    }

    fn server_step(&mut self) -> bool {
        let Some(server) = &mut self.server else { return false };
        server.step(&mut server::Surroundings {
            links: &mut self.links,
            storage: &mut self.storage,
            rng: &mut self.rng,
            room_bytes: self.room_bytes,
        })
    }

    // ------------------------------------------------------------------------------------------------ faults

    /// What was killed comes back; now and then, something happens to somebody.
    fn chance(&mut self) {
        if self.server.is_none() && (self.rng.u8(..8) == 0 || !self.has_faults) {
            self.server = Some(ForeignServer::new());
        }
        if let Some(is_left) = self.server.as_ref().and_then(ForeignServer::is_left)
            && (is_left || self.rng.u8(..32) == 0)
        {
            self.kill_server(!is_left);
        }
        if self.client.is_none() && (self.rng.u8(..8) == 0 || !self.has_faults) {
            self.start_process();
        }
        network::give_up_stalled(&mut self.stalled, &mut self.links, self.now, &mut self.rng);
        let (links, now) = (&mut self.links, self.now);
        self.untold.retain(|(link, since)| {
            let is_over = now.duration_since(*since) >= TCP_USER_TIMEOUT;
            if is_over {
                links[*link].to_client.cut(false);
                links[*link].to_server.is_unread = true;
            }
            !is_over
        });
        // Whoever has some connections is to be served before all can have them.
        let is_served = self.client.as_ref().is_some_and(|client| client.queues_up() > 0);
        if !self.has_faults && (is_served || !self.is_tight) {
            self.connections_max = usize::MAX;
        }
        if !self.has_faults || self.rng.u64(..STEPS_PER_FAULT / STEPS_PER_CHANCE) > 0 {
            return;
        }
        match self.rng.u8(..12) {
            0..=3 => self.kill_server(true),
            4 => self.kill_server(false),
            5 => self.kill_client(),
            8 => self.end_server(),
            6 if !self.is_tight && !self.is_generous => {
                self.may_fail = true;
                let most = usize::from(self.spec.nr_connections) + 1;
                self.connections_max = if self.rng.bool() { usize::MAX } else { self.rng.usize(1..=most) };
            }
            7 => {
                self.now += Duration::from_secs(self.rng.u64(..40));
                self.may_fail = true;
            }
            _ => self.cut_link(),
        }
    }

    fn end_server(&mut self) {
        if let Some(server) = &mut self.server {
            self.coverage.count("a foreign server ends in order");
            self.may_fail = true;
            server.begin_end();
        }
    }

    /// `forgets`: what is not stable goes with it.
    fn kill_server(&mut self, forgets: bool) {
        let Some(server) = self.server.take() else { return };
        self.may_fail = true;
        self.gone.extend(server.links());
        if forgets {
            self.coverage.count("a foreign server dies with what was not flushed");
            self.storage.forget(&mut self.rng);
            self.history.may_have_forgotten();
            // Reads under way may find what was there before, or after.
            for bio in self.bios.iter_mut().flatten().flatten() {
                if let Note::Read(_) = bio.note {
                    bio.note = Note::Gone;
                }
            }
        } else {
            self.coverage.count("a foreign server dies and leaves all to the next one");
        }
        let untold = server.die(&mut self.links, &mut self.rng);
        self.untold.extend(untold.into_iter().map(|link| (link, self.now)));
    }

    fn kill_client(&mut self) {
        let Some(mut client) = self.client.take() else { return };
        self.may_fail = true;
        client.die(&mut self.links, &mut self.rng);
        for link in self.begun.drain(..) {
            if !self.links[link].to_client.is_unread {
                abandon(&mut self.links[link], &mut self.rng);
            }
        }
        self.coverage.count("a device process of a foreign server's disk is killed");
        // The kernel fails what the process had. The next one gets the others.
        for (queue_id, bios) in (0..).zip(&mut self.bios) {
            for (tag, place) in (0..).zip(bios) {
                let Some(bio) = place.take_if(|_| client.has_request(queue_id, tag, &mut self.rng)) else {
                    continue;
                };
                self.ended_at_step = self.steps;
                self.coverage.say(|| format!("failed with its process {:?} {:?}", bio.request, bio.note));
                self.coverage.count("a request fails with the process of a foreign server's disk");
                match bio.note {
                    Note::Write { write, .. } => self.history.write_failed(write),
                    Note::Flush(flush) => self.history.flush_failed(flush),
                    Note::Read(_) | Note::Gone => {}
                }
            }
        }
    }

    fn cut_link(&mut self) {
        let links = self.client.as_ref().map(Client::links).unwrap_or_default();
        let Some(id) = self.rng.choice(links) else { return };
        self.may_fail = true;
        let loses_arrived = self.rng.bool();
        let link = &mut self.links[id];
        match self.rng.u8(..4) {
            0 => {
                link.to_client.cut(loses_arrived);
                link.to_server.cut(self.rng.bool());
            }
            1 => link.to_client.cut(loses_arrived),
            2 => {
                link.to_client.close(End::Fin);
                link.to_server.close(End::Fin);
            }
            _ if link.stalled_at.is_none() => {
                link.stalled_at = Some(self.now);
                self.stalled.push(id);
            }
            _ => {}
        }
    }
}
