//! The simulated device process: the product's queues, redials, reconnects and counters, with a ring, sockets and threads that exist
//! only here.
//!
//! What is the product's: `QueueCore`, `Redial` and `Reconnect`, and all they use. What is here: the operations on sockets and pages
//! that a queue asks for ([`QueueIo`]), which are out until the world lets them go on, byte by byte if it likes; mailboxes in the place of
//! threads; and the mutants that alter what goes into the cores and comes out of them. Block requests belong to the kernel
//! ([`Bio`]): they outlive the process, and the next one gets them again.

mod bio;
mod dial;
mod queue;
mod ring;
mod spec;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use client::contract::{DeviceSpec, SessionRecord, StallPolicy};
use client::device::connect::redial::Attempt;
use client::device::connect::redial_thread::Redialler;
use client::device::liveness::Probes;
use client::device::queue::block_request::BlockRequest;
use client::device::queue::core::{QueueCore, QueueSpec};
use client::device::queue::link::{LinkEvent, Loss, Lost};
use client::device::queue::quiet::{QueueSilence, TICK};
use client::device::queue::unflushed::Unflushed;
use client::device::reconnect::{COME_TOGETHER, Condition, Output, Reconnect};
use client::device::together::WAIT_MIN;
use fastrand::Rng;

pub(super) use bio::{Bio, Bios, EndedBio, Note, Surroundings};
pub(super) use ring::abandon;
pub(super) use spec::{Origins, Spec};

use super::Mutant;
use super::network::{Link, LinkId};
use super::server::choose;
use dial::{Dial, Probe, Way};
use queue::{Queue, QueueCommand};
use ring::Io;

/// With [`Mutant::CountedLate`], how many steps the main thread's look at the counters is late.
const LATE_STEPS: usize = 600;

enum MainEvent {
    Disconnected(u16, Lost),
    Silent(u16, Option<QueueSilence>),
    Probed(bool),
    Attempt(u16, Attempt<LinkId>),
}

/// A device process.
pub(super) struct Client {
    pub(super) spec: Spec,
    device_spec: DeviceSpec,
    session: SessionRecord,
    queues: Vec<Queue>,
    reconnect: Reconnect<Vec<LinkId>>,
    began: Instant,
    /// From when on at the latest those that could be served wait for the other queues; for who counts how long.
    together_since: Option<Instant>,
    /// They did not wait for as long as they are to.
    has_come_too_soon: bool,
    unflushed: Arc<Unflushed>,
    /// What [`Unflushed::any`] said in the last steps, for [`Mutant::CountedLate`].
    unflushed_then: VecDeque<bool>,
    events: VecDeque<MainEvent>,
    probe: Option<Probe>,
    /// By queue: whether its last FLUSH has ended well, once it has; empty before it was begun.
    last_flushes: Vec<Option<bool>>,
    mutant: Option<Mutant>,
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
        let incarnation = match mutant {
            // Any word will do, so that the server tells one.
            Some(Mutant::LostAlone | Mutant::ServedBeforeAllAreDown) => "foreign".to_owned(),
            _ => former.unwrap_or(incarnation_now),
        };
        let (resend, reply_timeout) = spec.ways();
        let device_spec = spec.device_spec();
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
                resend,
                reply_timeout,
                unflushed: Arc::clone(&unflushed),
            };
            Queue::new(queue_spec, world.now)
        };
        let mut client = Self {
            queues: (0..spec.nr_queues).map(queue).collect(),
            reconnect: Reconnect::new(
                spec.nr_queues,
                incarnation,
                spec.policy,
                Probes::new(reply_timeout, Redialler::can_probe(&device_spec, spec.nr_connections)),
            ),
            began: world.now,
            together_since: None,
            has_come_too_soon: false,
            unflushed_then: VecDeque::new(),
            unflushed,
            events: VecDeque::new(),
            probe: None,
            last_flushes: Vec::new(),
            mutant,
            device_spec,
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

    /// How many of its queues have connections.
    pub(super) fn queues_up(&self) -> usize {
        self.queues.iter().filter(|queue| queue.core.is_up()).count()
    }

    /// Whether queues were served without one that could be served in time.
    pub(super) fn has_come_too_soon(&self) -> bool {
        self.has_come_too_soon
    }

    pub(super) fn incarnation(&self) -> &str {
        self.reconnect.incarnation()
    }

    pub(super) fn told_policy(&mut self, policy: StallPolicy, now: Instant) {
        self.spec.policy = policy;
        self.reconnect.told_policy(policy, now);
    }

    /// A request arrives on a queue.
    pub(super) fn submit(&mut self, queue_id: u16, tag: u16, request: BlockRequest) {
        self.queues[usize::from(queue_id)].arrivals.push_back((tag, request));
    }

    pub(super) fn has_begun_final_flush(&self) -> bool {
        !self.last_flushes.is_empty()
    }

    /// Each queue's last FLUSH, as before the device's end: whether all that was acknowledged is flushed, once that is known.
    pub(super) fn final_flush(&mut self, world: &mut Surroundings<'_>) -> Option<bool> {
        let nr_queues = self.spec.nr_queues;
        if self.last_flushes.is_empty() {
            for queue_id in 0..nr_queues {
                if self.is(Mutant::FinalFlushDropped) {
                    self.last_flushes.push(Some(true));
                    continue;
                }
                let act = |core: &mut QueueCore, _: &mut Io<'_>| (core.is_up(), core.begin_final_flush());
                let (begun, _) = self.with_core(queue_id, world, act);
                self.last_flushes.push(match begun {
                    (_, Ok(true)) => None,
                    // Nothing was unflushed, or its users were told otherwise.
                    (is_up, Ok(false)) => Some(is_up),
                    (_, Err(_)) => Some(false),
                });
                self.end_of_pass(queue_id, world);
            }
        }
        for (queue, outcome) in self.queues.iter_mut().zip(&mut self.last_flushes) {
            *outcome = outcome.or_else(|| queue.core.take_final_flush().map(|result| result.is_ok()));
        }
        self.last_flushes.iter().copied().try_fold(true, |all, one| Some(all & one?))
    }

    /// The process dies: what it has sent may arrive yet.
    pub(super) fn die(&mut self, links: &mut [Link], rng: &mut Rng) {
        for queue in &self.queues {
            let wires = queue.wires.iter().filter_map(|wire| wire.link);
            let dial = queue.dial.iter().flat_map(Dial::links);
            let probe = self.probe.iter().map(|probe| probe.link);
            for link in wires.chain(dial).chain(probe) {
                abandon(&mut links[link], rng);
            }
        }
    }

    /// Whether it knows of the tag's request, or could: what the kernel has brought and no pass has seen may be either.
    pub(super) fn has_request(&self, queue_id: u16, tag: u16, rng: &mut Rng) -> bool {
        let is_unseen = self.queues[usize::from(queue_id)].arrivals.iter().any(|(other, _)| *other == tag);
        !is_unseen || rng.bool()
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
            has_done |= self.enter_ring(queue_id, world);
            self.let_ticks_pass(queue_id, world);
            for connection in 0..self.queues[usize::from(queue_id)].wires.len() as u16 {
                let act = |core: &mut QueueCore, io: &mut Io<'_>| {
                    ring::send_step(core, io, connection) | ring::receive_step(core, io, connection)
                };
                has_done |= self.with_core(queue_id, world, act).0;
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
        match &event {
            Some(MainEvent::Disconnected(queue_id, lost)) => {
                self.have_others_go_along(*queue_id, lost);
                self.together_since = self.together_since.map(|_| world.now);
            }
            Some(MainEvent::Attempt(_, Attempt::Opened { .. })) => {
                self.together_since.get_or_insert(world.now);
            }
            _ => {}
        }
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
                    Some(Mutant::IncarnationIgnored | Mutant::LostAlone | Mutant::ServedBeforeAllAreDown) => {
                        self.reconnect.incarnation().to_owned()
                    }
                    _ => told,
                };
                let is_another = incarnation != self.reconnect.incarnation();
                let now = world.now;
                self.reconnect.dialled(queue_id, sockets, incarnation, now, has_unflushed, &mut outputs);
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
        let now = if self.is(Mutant::OthersAwaitedForEver) { self.began } else { world.now };
        self.reconnect.tick(now, &mut outputs);
        let has_given_up = outputs[before..]
            .iter()
            .any(|output| matches!(output, Output::GiveUp(_) | Output::Disconnect(..)));
        if has_given_up {
            world.coverage.count("requests are given up");
        }
        let has_outputs = !outputs.is_empty();
        self.look_at_who_comes_late(&outputs, world);
        let gives_up_alone = self.is(Mutant::GivesUpAlone) && has_given_up;
        for queue in self.queues.iter_mut().filter(|queue| gives_up_alone && !queue.core.is_up()) {
            queue.commands.push_back(QueueCommand::GiveUp);
        }
        for output in outputs {
            self.carry_out(output, gives_up_alone, world);
        }
        has_event || has_outputs
    }

    /// Who was connected without a queue that comes now is to have waited for it.
    fn look_at_who_comes_late(&mut self, outputs: &[Output<Vec<LinkId>>], world: &mut Surroundings<'_>) {
        let says_so =
            |output: &Output<_>| matches!(output, Output::Disconnect(_, why) if why == COME_TOGETHER);
        if outputs.iter().any(says_so) {
            world.coverage.count("a queue of a foreign server's disk comes late");
            let since = self.together_since.unwrap_or(world.now);
            self.has_come_too_soon |= world.now.duration_since(since) < WAIT_MIN;
        }
        if self.together_since.is_some() && self.condition() == Condition::Live {
            self.together_since = None;
        }
    }

    /// As [`Mutant::ServedBeforeAllAreDown`]: they are told to, in their own time.
    fn have_others_go_along(&mut self, queue_id: u16, lost: &Lost) {
        if self.is(Mutant::ServedBeforeAllAreDown) && !matches!(lost.loss, Loss::Told(_)) {
            for (_, other) in (0..).zip(&mut self.queues).filter(|(id, _)| *id != queue_id) {
                other.commands.push_back(QueueCommand::Idle(60));
                other.commands.push_back(QueueCommand::Disconnect("they go together".to_owned()));
            }
        }
    }

    /// Does what `reconnect` wants; with `gives_up_alone` as [`Mutant::GivesUpAlone`].
    fn carry_out(&mut self, output: Output<Vec<LinkId>>, gives_up_alone: bool, world: &mut Surroundings<'_>) {
        match output {
            Output::Dial(queue_id) => {
                let dial = Dial::new(self.spec.slots_of(queue_id), self.reconnect.refusals(), world.now);
                self.queues[usize::from(queue_id)].dial = Some(dial);
            }
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
            Output::Leave(queue_id) => {
                world.coverage.count("a queue leaves a foreign server that ends");
                self.queues[usize::from(queue_id)].commands.push_back(QueueCommand::Leave);
            }
            Output::Wake(queue_id) => {
                self.queues[usize::from(queue_id)].commands.push_back(QueueCommand::Look);
            }
            Output::GiveUp(_) if self.mutant == Some(Mutant::GiveUpForgotten) => {}
            Output::GiveUp(queue_id) => {
                self.queues[usize::from(queue_id)].commands.push_back(QueueCommand::GiveUp);
            }
            Output::Probe if world.is_server_up => {
                self.probe = Some(Probe::new(&self.device_spec, world));
            }
            Output::Probe => self.events.push_back(MainEvent::Probed(false)),
        }
    }

    // ---------------------------------------------------------------------------------------- dialling and probing

    fn probe_step(&mut self, world: &mut Surroundings<'_>) -> bool {
        let Some(probe) = &mut self.probe else { return false };
        let (has_done, outcome) = probe.step(world);
        if let Some(is_answered) = outcome {
            self.probe = None;
            self.events.push_back(MainEvent::Probed(is_answered));
        }
        has_done
    }

    fn dial_step(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let queue = &mut self.queues[usize::from(queue_id)];
        let Some(dial) = &mut queue.dial else { return false };
        let changes_slots = self.mutant == Some(Mutant::OtherSlot);
        let way =
            Way { spec: &self.spec, device_spec: &self.device_spec, session: &self.session, changes_slots };
        let (has_done, attempt) = dial.step(&way, world);
        if let Some(Attempt::Opened { .. } | Attempt::Refused(_)) = attempt {
            queue.dial = None;
        }
        self.events.extend(attempt.map(|attempt| MainEvent::Attempt(queue_id, attempt)));
        has_done
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
        let nr_counters = self.unflushed.nr_counters();
        let queue = &mut self.queues[usize::from(queue_id)];
        // The queue's own FLUSH and the connections' pings included.
        let tags = 0..self.spec.queue_depth + 1 + queue.wires.len() as u16;
        let mut io = Io {
            wires: &mut queue.wires,
            forgotten: &mut queue.forgotten,
            links: world.links,
            bios: &mut world.bios[usize::from(queue_id)],
            given_back: &mut queue.given_back,
            came_after: &mut queue.came_after,
            losses: &mut queue.losses,
            ended: world.ended,
            rng: world.rng,
            coverage: world.coverage,
            room_bytes: world.room_bytes,
            origins: self.spec.origins,
            cookies: forgets_sequence.then(|| tags.map(|tag| queue.core.cookie(tag)).collect()),
            covers_too_much: covers_too_much.then(|| (&*self.unflushed, vec![0; nr_counters])),
            tells_of_all: (self.mutant == Some(Mutant::FlushTellsOfAll)).then_some(&*self.unflushed),
            believed: (self.mutant == Some(Mutant::FlushBelieved)).then_some(&queue.believed),
            has_sent: false,
        };
        let was_up = queue.core.is_up();
        let outcome = act(&mut queue.core, &mut io);
        let has_done = io.has_sent;
        if self.mutant == Some(Mutant::LossUncounted) {
            self.unflushed.fails_flush(self.unflushed.losses());
        }
        if self.mutant == Some(Mutant::NoReaping) && was_up && !queue.core.is_up() {
            ring::forget_operations(&mut queue.core, &mut io);
        }
        while let Some(event) = queue.core.take_event() {
            self.events.push_back(match event {
                LinkEvent::Silent(_) if self.mutant == Some(Mutant::SilenceUntold) => continue,
                LinkEvent::Disconnected(mut lost) => {
                    if self.mutant == Some(Mutant::AgeForgotten) {
                        lost.oldest = None;
                    }
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

    /// As [`Queue::enter_ring`].
    fn enter_ring(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        self.queues[usize::from(queue_id)].enter_ring(&mut world.bios[usize::from(queue_id)], world.ended)
    }

    fn command_step(&mut self, queue_id: u16, world: &mut Surroundings<'_>) -> bool {
        let Some(command) = self.queues[usize::from(queue_id)].commands.pop_front() else { return false };
        self.enter_ring(queue_id, world);
        let queue = &mut self.queues[usize::from(queue_id)];
        match command {
            QueueCommand::Look => {}
            QueueCommand::Idle(steps) => {
                if steps > 0 {
                    queue.commands.push_front(QueueCommand::Idle(steps - 1));
                }
            }
            QueueCommand::Disconnect(why) => {
                self.with_core(queue_id, world, |core, io| core.disconnect(io, why));
            }
            QueueCommand::Leave => {
                self.with_core(queue_id, world, |core, io| core.leave(io));
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
        let has_entered = self.enter_ring(queue_id, world);
        let queue = &mut self.queues[usize::from(queue_id)];
        let connection = choose(0..queue.wires.len() as u16, world.rng).expect("a queue has a connection");
        let which = world.rng.u8(..3);
        let act = |core: &mut QueueCore, io: &mut Io<'_>| match which {
            0 => ring::send_step(core, io, connection),
            1 if !io.forgotten.is_empty() => ring::forgotten_step(io),
            _ => ring::receive_step(core, io, connection),
        };
        let (has_done, _) = self.with_core(queue_id, world, act);
        self.let_ticks_pass(queue_id, world);
        self.end_of_pass(queue_id, world) || has_done || has_entered
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
                io.request_comes(tag);
                core.handle_request(io, tag, Ok(request));
            }
            core.end_of_pass(io, || now);
        };
        self.with_core(queue_id, world, act).1
    }
}
