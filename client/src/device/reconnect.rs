//! What an attachment does while its server cannot be reached, as a pure state machine.
//!
//! Owns: which queues have connections, when an outage began, whether requests still wait, and whether the server that
//! comes back is the one that left. Never: dials, reads a clock or touches a queue; `attachment.rs` feeds it events and the time
//! and carries out its [`Output`]s. Tests drive it with numbers instead of sockets.
//!
//! ```text
//!            lost                  dialled, same incarnation
//!   Up ─────────────► Down ───────────────────────────────────────────────► Up
//!    │                  │ dialled, another incarnation                        ▲
//!    │ told to          ▼                            nothing was unflushed    │
//!    └──close──► Closing ─► all queues Down or Dialled ──────────────────────┤
//!                                                    │ something was          │
//!                                                    └──► lost for good ──► every request EIO, until detached
//! ```
//! Giving up takes the same way: every queue drops its connections, and all get new ones together. A write that failed may
//! still be in the hands of the server, on the connection that was lost; were another queue served meanwhile, it could land on
//! top of what was written there later. The server grants a slot only when the I/O of the one before it has ended.
//!
//! A server that tells no incarnation (a foreign one) may be another process at each dial. What another queue's connections tell may be
//! the word of a process that is gone, and a FLUSH through new ones covers nothing of it. So when a queue has been given new ones, the
//! others drop theirs; no queue is connected before all have, and then all together. Not before that: some servers end when the last
//! connection does. But they may grant fewer connections than there are queues: who cannot get one is not waited for long
//! (`together.rs`). When it has one later, all come together once more. Where the server has said that it is shutting down, the other
//! queues leave it by themselves, and wait for what it owes them; not for long once another could be served.
//!
//! Invariants:
//! - a queue gets connections only of the incarnation that all others have;
//! - after a request was given up no queue has a connection until every queue can have one;
//! - whether the server forgot anything is judged only when no queue has a connection: an acknowledgement of the former
//!   incarnation could still arrive on one;
//! - of a server that tells no incarnation, no queue gets connections while another has some that were dialled earlier;
//! - after `lost for good` no queue gets a connection again.
//!
//! A server that owes replies and sends nothing is not left, and does not use up the time after which requests fail, while it
//! answers probes (`liveness.rs`). A probe ends no outage: only an answered request does. A policy that somebody sets later has
//! a time of its own, which probes do not stop: whoever shuts a machine down has to know how long it takes.

use std::time::{Duration, Instant};

use super::liveness::{OutageClock, Probes, Silence};
use super::queue::link::{Loss, Lost};
use super::queue::quiet::QueueSilence;
use super::together::Together;
use crate::contract::StallPolicy;
use crate::contract::state_reasons::WRITES_LOST;

/// Whoever sets a policy later does not wait for longer than this for a silent server to be called lost, foreign or not.
const TOLD_SILENCE: Duration = Duration::from_secs(20);
/// Until a dial that could not be begun is tried again.
const BEGIN_PAUSE: Duration = Duration::from_secs(1);

/// For so long a server that is shutting down is waited for while another could serve.
const LEAVING_MAX: Duration = Duration::from_secs(10);
/// Why a queue drops connections to a server that tells no incarnation: another was lost, and has others now.
const GO_TOGETHER: &str =
    "another queue's connections were lost, and the server does not say whether it is the same";
/// The same: it was connected without the other, which came too late.
pub const COME_TOGETHER: &str =
    "another queue is connected anew, and the server does not say whether it is the same";
/// Why a queue drops connections to a server that is shutting down.
const OWES_FOR_LONG: &str = "the server is shutting down, and does not answer what it owes";

/// What is to be done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum Output<S> {
    /// Open the connections of this queue, again and again until it works, and tell [`Reconnect::dialled`]; where that cannot even
    /// be begun, [`Reconnect::dial_not_begun`].
    Dial(u16),
    /// Give the queue its connections.
    Connect(u16, S),
    /// Let the queue drop its connections, for this reason.
    Disconnect(u16, String),
    /// Let the queue drop its connections once no reply is owed on them, and send nothing any more: the server is shutting down.
    Leave(u16),
    /// Let the queue look at what the others have counted.
    Wake(u16),
    /// Requests of the queue fail while it has no connections.
    GiveUp(u16),
    /// Ask the server for one block on a connection of its own, and tell [`Reconnect::probed`].
    Probe,
}

#[derive(Debug)]
enum QueueState<S> {
    Up,
    /// It was told to leave a server that is shutting down.
    Leaving,
    /// It was told to drop its connections.
    Closing,
    Down,
    /// Connections of another incarnation wait until all queues are down.
    Dialled(S, String),
}

impl<S> QueueState<S> {
    /// Whether it has some, and was not told to drop them at once.
    fn has_connections(&self) -> bool {
        matches!(self, Self::Up | Self::Leaving)
    }
}

/// What is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Every queue has its connections.
    Live,
    /// The same, but the server takes long; how long, for people.
    Slow(String),
    /// Requests wait; why, for people.
    Stalled(String),
    /// Requests fail until the server is back; why, for people.
    Failing(String),
    /// Requests fail until the device is detached; why, for people.
    Lost(String),
}

/// The connections of an attachment, each queue's as one `S`.
#[derive(Debug)]
pub struct Reconnect<S> {
    queues: Vec<QueueState<S>>,
    incarnation: String,
    /// The server tells no incarnation.
    is_untold: bool,
    /// Then: how the queues come together.
    together: Together,
    /// Until when they wait for those that leave a server which is shutting down.
    leaves_by: Option<Instant>,
    /// Left for good: who comes with one of these was dialled before its server went.
    former_incarnations: Vec<String>,
    /// By queue: the former incarnation that its last dial told, which may have begun before the present one was known.
    doubted: Vec<Option<String>>,
    /// By queue: when to begin with a dial that could not be.
    not_begun: Vec<Option<Instant>>,
    policy: StallPolicy,
    /// When somebody set it, if that was later than at the start.
    told_at: Option<Instant>,
    probes: Probes,
    /// By queue: of its connections the one that has been silent for longest.
    silences: Vec<Option<Silence>>,
    /// One of them would be the end of its connections, did the server not answer probes.
    is_slow: bool,
    /// How long the outage has lasted, and why.
    outage: Option<(OutageClock, String)>,
    /// The one before, and how often since then a server was reached that refused everything.
    former_outage: Option<OutageClock>,
    refusals: u32,
    /// What the last attempt came to.
    attempt: String,
    has_given_up: bool,
    /// Some queues were given up and cannot be connected, and all others are served. No outage lasts for those.
    rest_fails: bool,
    lost: Option<String>,
}

impl<S> Reconnect<S> {
    /// All queues have connections of this incarnation; empty for a server that tells none.
    pub fn new(nr_hw_queues: u16, incarnation: String, policy: StallPolicy, probes: Probes) -> Self {
        Self {
            queues: (0..nr_hw_queues).map(|_| QueueState::Up).collect(),
            is_untold: incarnation.is_empty(),
            incarnation,
            together: Together::default(),
            leaves_by: None,
            former_incarnations: Vec::new(),
            doubted: vec![None; usize::from(nr_hw_queues)],
            not_begun: vec![None; usize::from(nr_hw_queues)],
            policy,
            told_at: None,
            probes,
            silences: vec![None; usize::from(nr_hw_queues)],
            is_slow: false,
            outage: None,
            former_outage: None,
            refusals: 0,
            attempt: String::new(),
            has_given_up: false,
            rest_fails: false,
            lost: None,
        }
    }

    /// How often in a row a server was reached that refused everything.
    pub fn refusals(&self) -> u32 {
        self.refusals
    }

    /// A queue has lost its connections, and no byte of them can come any more; `reason` is for people. `has_unflushed` tells whether a server that
    /// forgets would have anything to forget; it is asked only when no queue has a connection.
    pub fn disconnected(
        &mut self,
        queue_id: u16,
        lost: &Lost,
        reason: &str,
        now: Instant,
        has_unflushed: impl FnOnce() -> bool,
        outputs: &mut Vec<Output<S>>,
    ) {
        let index = usize::from(queue_id);
        // Who goes along with another queue says nothing of the server.
        let goes_along =
            matches!(&lost.loss, Loss::Told(why) if [GO_TOGETHER, COME_TOGETHER].contains(&why.as_str()));
        if !goes_along {
            self.together.lost_by_itself();
            if lost.served_nothing {
                self.refusals = self.refusals.saturating_add(1);
            } else {
                (self.former_outage, self.refusals) = (None, 0);
            }
        }
        self.queues[index] = QueueState::Down;
        self.silences[index] = None;
        self.look_for_slowness(now);
        if self.lost.is_some() {
            outputs.push(Output::GiveUp(queue_id));
            return;
        }
        if std::mem::take(&mut self.rest_fails) {
            self.outage = None;
        }
        let oldest_sent = lost.oldest.and_then(|oldest| now.checked_sub(oldest)).unwrap_or(now);
        match &mut self.outage {
            Some((clock, _)) => clock.waits_for(oldest_sent),
            None => {
                let clock = self.former_outage.take().unwrap_or(OutageClock::new(now, oldest_sent));
                self.outage = Some((clock, reason.to_owned()));
                self.attempt.clear();
            }
        }
        if self.is_untold && matches!(lost.loss, Loss::Leaving) {
            self.leave_all(outputs);
        }
        self.give_up(outputs);
        outputs.push(Output::Dial(queue_id));
        if self.is_untold {
            // The loss was counted: a FLUSH that comes there from now on is to be known to have begun after it.
            let others = (0..self.queues.len() as u16).filter(|other| *other != queue_id);
            outputs.extend(others.map(Output::Wake));
        }
        self.settle(now, has_unflushed, outputs);
    }

    /// On a queue's connections replies are due and nothing comes; `None`: not any more. To be told about once a second.
    pub fn silent(
        &mut self,
        queue_id: u16,
        silence: Option<QueueSilence>,
        now: Instant,
        outputs: &mut Vec<Output<S>>,
    ) {
        let index = usize::from(queue_id);
        let is_up = self.queues[index].has_connections();
        let silence = silence.filter(|_| is_up);
        self.silences[index] = silence.and_then(|silence| Silence::until(now, silence));
        if let Some(silence) = self.silences[index] {
            if self.probes.is_dead(silence, now) {
                self.silences[index] = None;
                self.queues[index] = QueueState::Closing;
                outputs.push(Output::Disconnect(queue_id, no_reply(silence, now)));
            } else if self.probes.take_turn(now) {
                outputs.push(Output::Probe);
            }
        }
        self.look_for_slowness(now);
    }

    fn look_for_slowness(&mut self, now: Instant) {
        let is_long =
            |silence: &Silence| now.saturating_duration_since(silence.since) >= self.probes.reply_timeout();
        self.is_slow = self.silences.iter().flatten().any(is_long);
    }

    /// A probe was answered, or was not.
    pub fn probed(&mut self, is_answered: bool, now: Instant) {
        self.probes.returned(is_answered, now);
        let good_for = self.probes.reply_timeout();
        let clocks = self.outage.as_mut().map(|(clock, _)| clock).into_iter().chain(&mut self.former_outage);
        for clock in clocks.filter(|_| is_answered) {
            clock.lives(now, good_for);
        }
    }

    /// An attempt to open a queue's connections failed; another follows.
    pub fn dial_failed(&mut self, error: String) {
        self.attempt = error;
    }

    /// The queue's connections are not being opened, because this machine lacks something for it: that is tried again.
    pub fn dial_not_begun(&mut self, queue_id: u16, error: String, now: Instant) {
        self.attempt = error;
        self.not_begun[usize::from(queue_id)] = Some(now + BEGIN_PAUSE);
    }

    /// The server says that the attachment is no more: nothing will bring it back.
    pub fn refused_for_good(&mut self, reason: String, outputs: &mut Vec<Output<S>>) {
        self.lose(reason, outputs);
    }

    /// A queue's connections are open, at a server of this incarnation.
    pub fn dialled(
        &mut self,
        queue_id: u16,
        sockets: S,
        incarnation: String,
        now: Instant,
        has_unflushed: impl FnOnce() -> bool,
        outputs: &mut Vec<Output<S>>,
    ) {
        let index = usize::from(queue_id);
        if self.lost.is_some() || !matches!(self.queues[index], QueueState::Down) {
            return;
        }
        if incarnation == self.incarnation && !self.has_given_up && !self.is_untold {
            self.connect(queue_id, sockets, outputs);
            return;
        }
        if self.former_incarnations.contains(&incarnation)
            && self.doubted[index].as_ref() != Some(&incarnation)
        {
            // Perhaps it was told before the present one; the next dial begins after that.
            self.doubted[index] = Some(incarnation);
            outputs.push(Output::Dial(queue_id));
            return;
        }
        self.queues[index] = QueueState::Dialled(sockets, incarnation);
        if !self.is_untold {
            self.close_all("the server has another storage incarnation", outputs);
        } else {
            self.have_others_follow(now, outputs);
        }
        self.settle(now, has_unflushed, outputs);
    }

    /// A queue of a server that tells no incarnation could be served: the others drop what they have. Who is leaving goes by itself.
    fn have_others_follow(&mut self, now: Instant, outputs: &mut Vec<Output<S>>) {
        if self.queues.iter().any(|queue| matches!(queue, QueueState::Up)) {
            let why = if self.together.comes_late() { COME_TOGETHER } else { GO_TOGETHER };
            self.close_all(why, outputs);
        } else if self.queues.iter().any(|queue| matches!(queue, QueueState::Leaving)) {
            self.leaves_by.get_or_insert(now + LEAVING_MAX);
        }
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant, outputs: &mut Vec<Output<S>>) {
        for queue_id in 0..self.queues.len() as u16 {
            let not_begun = &mut self.not_begun[usize::from(queue_id)];
            if not_begun.is_some_and(|again| now >= again) {
                *not_begun = None;
                if self.lost.is_none() {
                    outputs.push(Output::Dial(queue_id));
                }
            }
        }
        if self.leaves_by.is_some_and(|by| now >= by) {
            self.leaves_by = None;
            self.close_all(OWES_FOR_LONG, outputs);
        }
        if self.company_due_at().is_some_and(|due| now >= due) {
            self.connect_dialled(now, outputs);
        }
        if self.give_up_at().is_some_and(|deadline| now >= deadline) {
            (self.has_given_up, self.rest_fails) = (true, false);
            let silence = self.silences.iter().flatten().min_by_key(|silence| silence.since);
            let reason = silence.map(|silence| no_reply(*silence, now));
            let begins = || (OutageClock::new(now, now), reason.clone().unwrap_or_default());
            self.outage.get_or_insert_with(begins);
            let why = reason.as_deref().unwrap_or("the other connections are given up");
            self.close_all(why, outputs);
            self.give_up(outputs);
        }
        if self.probes_matter() && self.probes.take_turn(now) {
            outputs.push(Output::Probe);
        }
    }

    /// When [`Reconnect::tick`] has something to do.
    pub fn wakes_at(&self, now: Instant) -> Option<Instant> {
        let probe = self.probes.due_at(now).filter(|_| self.probes_matter());
        let not_begun = self.not_begun.iter().copied().flatten();
        let together = self.leaves_by.into_iter().chain(self.company_due_at());
        not_begun.chain(self.give_up_at()).chain(together).chain(probe).min()
    }

    /// When queues are connected without those that they wait for.
    fn company_due_at(&self) -> Option<Instant> {
        self.together.due_at().filter(|_| self.lost.is_none())
    }

    /// Whether requests would fail sooner without probes. While there are connections their silence asks for probes.
    fn probes_matter(&self) -> bool {
        let fails_later = matches!(self.policy, StallPolicy::FailAfterMs(_)) && !self.has_given_up;
        fails_later && self.told_at.is_none() && self.lost.is_none() && self.outage_of_the_served().is_some()
    }

    /// Once no queue is served any more: whoever is told of an error may write again at once, through any of them.
    fn give_up(&self, outputs: &mut Vec<Output<S>>) {
        if self.has_given_up && !self.is_served() {
            outputs.extend((0..self.queues.len() as u16).map(Output::GiveUp));
        }
    }

    fn is_served(&self) -> bool {
        self.queues.iter().any(|queue| queue.has_connections() || matches!(queue, QueueState::Closing))
    }

    fn leave_all(&mut self, outputs: &mut Vec<Output<S>>) {
        for (queue_id, queue) in (0..).zip(&mut self.queues) {
            if matches!(queue, QueueState::Up) {
                *queue = QueueState::Leaving;
                outputs.push(Output::Leave(queue_id));
            }
        }
    }

    fn close_all(&mut self, reason: &str, outputs: &mut Vec<Output<S>>) {
        for (queue_id, queue) in (0..).zip(&mut self.queues) {
            if queue.has_connections() {
                *queue = QueueState::Closing;
                outputs.push(Output::Disconnect(queue_id, reason.to_owned()));
            }
        }
    }

    /// When requests fail.
    fn give_up_at(&self) -> Option<Instant> {
        let StallPolicy::FailAfterMs(after_ms) = self.policy else { return None };
        if self.has_given_up || self.lost.is_some() {
            return None;
        }
        let after = Duration::from_millis(after_ms);
        let outage = self.outage_of_the_served();
        let Some(told_at) = self.told_at else { return outage?.ends(after) };
        // Of a policy that somebody set: from then on, or from when the outage or the silence began.
        let silence = self.probes.reply_timeout().min(TOLD_SILENCE);
        let silent_for_long = self.silences.iter().flatten().filter_map(|it| it.since.checked_add(silence));
        let began = silent_for_long.chain(outage.map(OutageClock::began)).min()?;
        began.max(told_at).checked_add(after)
    }

    /// What lasts until requests fail that do not yet.
    fn outage_of_the_served(&self) -> Option<&OutageClock> {
        self.outage.as_ref().map(|(clock, _)| clock).filter(|_| !self.rest_fails)
    }

    /// The policy that the attachment was made with. Requests that failed stay failed; under `Wait` those that come wait again
    /// after the next outage begins.
    pub fn set_policy(&mut self, policy: StallPolicy) {
        (self.policy, self.told_at) = (policy, None);
    }

    /// The same, set by somebody now: its time is not stretched by probes.
    pub fn told_policy(&mut self, policy: StallPolicy, now: Instant) {
        (self.policy, self.told_at) = (policy, Some(now));
    }

    /// The storage incarnation that all connections are of.
    pub fn incarnation(&self) -> &str {
        &self.incarnation
    }

    /// The policy in force.
    pub fn policy(&self) -> StallPolicy {
        self.policy
    }

    /// How things stand.
    pub fn condition(&self) -> Condition {
        if let Some(reason) = &self.lost {
            return Condition::Lost(reason.clone());
        }
        let Some((_, reason)) = &self.outage else {
            let words = "the server takes long for a request; it answers others".to_owned();
            return if self.is_slow { Condition::Slow(words) } else { Condition::Live };
        };
        let attempt = if self.attempt.is_empty() { "connecting" } else { &self.attempt };
        let text = format!("{reason}; {attempt}");
        if self.has_given_up || self.rest_fails { Condition::Failing(text) } else { Condition::Stalled(text) }
    }

    fn connect(&mut self, queue_id: u16, sockets: S, outputs: &mut Vec<Output<S>>) {
        self.queues[usize::from(queue_id)] = QueueState::Up;
        outputs.push(Output::Connect(queue_id, sockets));
        if self.queues.iter().all(|queue| matches!(queue, QueueState::Up)) {
            self.former_outage = self.outage.take().map(|(clock, _)| clock);
            (self.has_given_up, self.rest_fails) = (false, false);
        }
    }

    /// Once no queue has a connection any more: goes over to the server's incarnation, or cannot.
    fn settle(&mut self, now: Instant, has_unflushed: impl FnOnce() -> bool, outputs: &mut Vec<Output<S>>) {
        if self.is_served() {
            return;
        }
        self.leaves_by = None;
        let new = self.queues.iter().find_map(|queue| match queue {
            QueueState::Dialled(_, told) if *told != self.incarnation => Some(told.clone()),
            _ => None,
        });
        if let Some(new) = new {
            if has_unflushed() {
                let next = "I/O gets EIO until the disk is detached; check its contents after that";
                self.lose(format!("{WRITES_LOST}: {next}"), outputs);
                return;
            }
            // Two storage machines may take turns: what is left now may come back, and what comes back is no former one any more.
            self.former_incarnations.retain(|former| *former != new);
            self.former_incarnations.push(std::mem::replace(&mut self.incarnation, new));
            self.doubted.fill(None);
            for (queue_id, queue) in (0..).zip(&mut self.queues) {
                // It changed once more in between.
                if matches!(queue, QueueState::Dialled(_, told) if *told != self.incarnation) {
                    *queue = QueueState::Down;
                    outputs.push(Output::Dial(queue_id));
                }
            }
        }
        self.connect_dialled(now, outputs);
    }

    /// Gives the queues the connections that wait, once no queue has others and those are there that are waited for.
    fn connect_dialled(&mut self, now: Instant, outputs: &mut Vec<Output<S>>) {
        let could_be_served = self.queues.iter().any(|queue| matches!(queue, QueueState::Dialled(..)));
        if self.is_served() || !could_be_served || self.waits_for_others(now) {
            return;
        }
        for queue_id in 0..self.queues.len() as u16 {
            let queue = &mut self.queues[usize::from(queue_id)];
            match std::mem::replace(queue, QueueState::Down) {
                QueueState::Dialled(sockets, _) => self.connect(queue_id, sockets, outputs),
                other => *queue = other,
            }
        }
        if self.is_untold {
            let are_all = self.queues.iter().all(|queue| matches!(queue, QueueState::Up));
            self.together.are_served(are_all);
            // For those that are served the next outage begins when they lose their connections.
            self.rest_fails = !are_all && std::mem::take(&mut self.has_given_up);
        }
    }

    /// After giving up, every queue has to have connections, because a server grants them only when what failed cannot land any more. One
    /// that tells no incarnation promises nothing of the kind, and may grant too few.
    fn waits_for_others(&mut self, now: Instant) -> bool {
        let is_any_down = self.queues.iter().any(|queue| matches!(queue, QueueState::Down));
        is_any_down && if self.is_untold { self.together.waits(now) } else { self.has_given_up }
    }

    fn lose(&mut self, reason: String, outputs: &mut Vec<Output<S>>) {
        for (queue_id, queue) in (0..).zip(&mut self.queues) {
            match queue {
                QueueState::Up | QueueState::Leaving => {
                    *queue = QueueState::Closing;
                    outputs.push(Output::Disconnect(queue_id, reason.clone()));
                }
                QueueState::Closing => {}
                QueueState::Down | QueueState::Dialled(..) => *queue = QueueState::Down,
            }
            // At once: nobody may be left to hear that the queue is down.
            outputs.push(Output::GiveUp(queue_id));
        }
        self.lost = Some(reason);
    }
}

fn no_reply(silence: Silence, now: Instant) -> String {
    format!("no reply for {} s", now.saturating_duration_since(silence.since).as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::together::WAIT_MIN;

    const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

    const OLD: &str = "boot.1";
    const NEW: &str = "boot.2";

    /// An attachment of two queues whose sockets are numbers, with a clock.
    struct World {
        reconnect: Reconnect<u32>,
        start: Instant,
        now_ms: u64,
        has_unflushed: bool,
        outputs: Vec<Output<u32>>,
    }

    impl World {
        fn new(policy: StallPolicy) -> Self {
            Self::probing(policy, false)
        }

        fn probing(policy: StallPolicy, is_possible: bool) -> Self {
            let probes = Probes::new(REPLY_TIMEOUT, is_possible);
            let reconnect = Reconnect::new(2, OLD.to_owned(), policy, probes);
            Self { reconnect, start: Instant::now(), now_ms: 0, has_unflushed: false, outputs: Vec::new() }
        }

        /// Of a server that tells no incarnation.
        fn untold() -> Self {
            let probes = Probes::new(REPLY_TIMEOUT, false);
            let reconnect = Reconnect::new(2, String::new(), StallPolicy::Wait, probes);
            Self { reconnect, ..Self::new(StallPolicy::Wait) }
        }

        fn dial_failed(&mut self) {
            self.reconnect.dial_failed("refused".into());
        }

        fn now(&self) -> Instant {
            self.start + Duration::from_millis(self.now_ms)
        }

        fn disconnected(&mut self, queue_id: u16) -> Vec<Output<u32>> {
            self.lost(queue_id, false)
        }

        fn lost(&mut self, queue_id: u16, served_nothing: bool) -> Vec<Output<u32>> {
            self.lost_by(queue_id, Loss::Unacknowledged, served_nothing)
        }

        fn lost_by(&mut self, queue_id: u16, loss: Loss, served_nothing: bool) -> Vec<Output<u32>> {
            let (now, unflushed) = (self.now(), self.has_unflushed);
            let outputs = &mut self.outputs;
            let lost = Lost { connection: 0, loss, served_nothing, oldest: None };
            self.reconnect.disconnected(queue_id, &lost, "cut", now, || unflushed, outputs);
            std::mem::take(&mut self.outputs)
        }

        /// Nothing has come on the queue since `since_ms`; its oldest request was sent then.
        fn silent_at(&mut self, queue_id: u16, since_ms: u64, now_ms: u64) -> Vec<Output<u32>> {
            self.now_ms = now_ms;
            let since = self.start + Duration::from_millis(since_ms);
            let silent = self.now() - since;
            let silence = Some(QueueSilence { silent, unheard: None, oldest: silent });
            self.reconnect.silent(queue_id, silence, self.now(), &mut self.outputs);
            std::mem::take(&mut self.outputs)
        }

        fn answered_at(&mut self, now_ms: u64) {
            self.now_ms = now_ms;
            self.reconnect.probed(true, self.now());
        }

        fn dialled(&mut self, queue_id: u16, sockets: u32, incarnation: &str) -> Vec<Output<u32>> {
            let (now, unflushed) = (self.now(), self.has_unflushed);
            let (incarnation, outputs) = (incarnation.to_owned(), &mut self.outputs);
            self.reconnect.dialled(queue_id, sockets, incarnation, now, || unflushed, outputs);
            std::mem::take(&mut self.outputs)
        }

        fn tick_at(&mut self, now_ms: u64) -> Vec<Output<u32>> {
            self.now_ms = now_ms;
            self.reconnect.tick(self.now(), &mut self.outputs);
            std::mem::take(&mut self.outputs)
        }
    }

    fn disconnects(outputs: &[Output<u32>]) -> Vec<u16> {
        let told = outputs.iter().filter_map(|output| match output {
            Output::Disconnect(queue_id, _) => Some(*queue_id),
            _ => None,
        });
        told.collect()
    }

    #[test]
    fn a_lost_queue_is_dialled_and_connected_while_the_other_goes_on() {
        let mut world = World::new(StallPolicy::Wait);
        assert_eq!(world.disconnected(1), [Output::Dial(1)]);
        assert_eq!(world.reconnect.condition(), Condition::Stalled("cut; connecting".into()));
        world.dial_failed();
        assert_eq!(world.reconnect.condition(), Condition::Stalled("cut; refused".into()));
        assert_eq!(world.tick_at(1 << 40), [], "it waits for ever");
        world.has_unflushed = true;
        assert_eq!(world.dialled(1, 7, OLD), [Output::Connect(1, 7)]);
        assert_eq!(world.reconnect.condition(), Condition::Live);
    }

    #[test]
    fn a_dial_that_could_not_be_begun_is_tried_again_and_the_policy_goes_on() {
        let mut world = World::new(StallPolicy::FailAfterMs(5_000));
        assert_eq!(world.disconnected(0), [Output::Dial(0)]);
        world.reconnect.dial_not_begun(0, "no thread".into(), world.now());
        assert_eq!(world.reconnect.condition(), Condition::Stalled("cut; no thread".into()));
        assert_eq!(world.reconnect.wakes_at(world.now()), Some(world.start + Duration::from_secs(1)));
        assert_eq!(world.tick_at(999), []);
        assert_eq!(world.tick_at(1_000), [Output::Dial(0)]);
        assert_eq!(world.reconnect.wakes_at(world.now()), Some(world.start + Duration::from_secs(5)));
        world.now_ms = 4_500;
        world.reconnect.dial_not_begun(0, "no thread".into(), world.now());
        assert_eq!(disconnects(&world.tick_at(5_000)), [1], "given up meanwhile");
        assert_eq!(world.tick_at(5_500), [Output::Dial(0)]);
        world.reconnect.dial_not_begun(0, "no thread".into(), world.now());
        world.reconnect.refused_for_good("fenced".into(), &mut world.outputs);
        world.outputs.clear();
        assert_eq!(world.tick_at(10_000), [], "nothing is dialled for a disk that is lost");
        assert_eq!(world.reconnect.wakes_at(world.now()), None);
    }

    #[test]
    fn after_its_time_an_outage_fails_what_waits_until_the_server_is_back() {
        let mut world = World::new(StallPolicy::FailAfterMs(5_000));
        world.disconnected(0);
        assert_eq!(world.reconnect.give_up_at(), Some(world.start + Duration::from_secs(5)));
        assert_eq!(world.tick_at(4_999), []);
        let outputs = world.tick_at(5_000);
        assert_eq!(disconnects(&outputs), [1], "what fails may still land: no queue is served meanwhile");
        assert!(!outputs.contains(&Output::GiveUp(0)), "nor when the first error is told");
        assert_eq!(world.reconnect.give_up_at(), None, "once is enough");
        assert!(matches!(world.reconnect.condition(), Condition::Failing(_)));
        assert_eq!(world.dialled(0, 1, OLD), []);
        let outputs = world.disconnected(1);
        assert_eq!(outputs, [Output::GiveUp(0), Output::GiveUp(1), Output::Dial(1)]);
        assert_eq!(world.dialled(1, 2, OLD), [Output::Connect(0, 1), Output::Connect(1, 2)]);
        assert_eq!(world.reconnect.condition(), Condition::Live);
        world.disconnected(0);
        assert_eq!(
            world.reconnect.give_up_at(),
            Some(world.now() + Duration::from_secs(5)),
            "the next outage"
        );
    }

    #[test]
    fn after_giving_up_a_server_that_forgot_is_still_not_the_same() {
        let mut world = World::new(StallPolicy::FailAfterMs(5_000));
        world.disconnected(0);
        world.disconnected(1);
        world.tick_at(5_000);
        assert_eq!(world.dialled(0, 1, OLD), []);
        assert_eq!(world.dialled(1, 2, NEW), [Output::Dial(0)], "the first came from before the change");
        assert_eq!(world.dialled(0, 3, NEW), [Output::Connect(0, 3), Output::Connect(1, 2)]);
        world.disconnected(0);
        world.disconnected(1);
        world.tick_at(10_000);
        world.has_unflushed = true;
        world.dialled(0, 4, "boot.3");
        assert!(matches!(world.reconnect.condition(), Condition::Lost(_)));
    }

    #[test]
    fn a_silent_server_is_left_unless_it_answers_probes() {
        let mut world = World::probing(StallPolicy::FailAfterMs(5_000), true);
        assert_eq!(world.silent_at(0, 0, 10_000), [Output::Probe]);
        assert_eq!(world.silent_at(1, 0, 10_000), [], "one probe for all queues");
        world.answered_at(10_100);
        assert_eq!(world.reconnect.condition(), Condition::Live, "that is not long");
        assert_eq!(world.tick_at(20_000), [], "no time of an outage passes either");
        assert_eq!(world.silent_at(0, 0, 20_000), [Output::Probe]);
        world.answered_at(20_100);
        let slow = Condition::Slow("the server takes long for a request; it answers others".into());
        assert_eq!(world.reconnect.condition(), slow);
        assert_eq!(world.silent_at(0, 0, 29_000), [Output::Probe]);
        assert_eq!(world.silent_at(0, 0, 40_099), []);
        assert_eq!(world.silent_at(0, 0, 40_100), [Output::Disconnect(0, "no reply for 40 s".into())]);
        // A reply ends it.
        world.answered_at(40_200);
        assert_eq!(world.silent_at(1, 25_000, 40_200), []);
        world.reconnect.silent(1, None, world.now(), &mut world.outputs);
        assert_eq!(world.reconnect.condition(), Condition::Live);
        // Ten minutes after it was sent a request is not waited for any longer.
        assert_eq!(world.silent_at(1, 20_000, 45_200), [Output::Probe]);
        world.answered_at(619_000);
        assert_eq!(world.silent_at(1, 20_000, 619_999), []);
        assert_eq!(disconnects(&world.silent_at(1, 20_000, 620_000)), [1]);
    }

    #[test]
    fn where_no_probe_is_possible_silence_is_the_end() {
        let mut world = World::new(StallPolicy::Wait);
        assert_eq!(world.silent_at(0, 0, 19_999), []);
        assert_eq!(disconnects(&world.silent_at(0, 0, 20_000)), [0]);
        assert_eq!(world.silent_at(0, 0, 21_000), [], "it was told already");
    }

    #[test]
    fn an_outage_does_not_last_while_the_server_answers_probes() {
        let mut world = World::probing(StallPolicy::FailAfterMs(5_000), true);
        world.disconnected(0);
        assert_eq!(world.reconnect.wakes_at(world.now()), Some(world.start), "a probe is due");
        assert_eq!(world.tick_at(0), [Output::Probe]);
        world.answered_at(1_000);
        assert_eq!(world.reconnect.give_up_at(), Some(world.start + Duration::from_secs(1 + 20 + 4)));
        assert_eq!(world.reconnect.wakes_at(world.now()), Some(world.start + Duration::from_secs(6)));
        assert!(matches!(world.reconnect.condition(), Condition::Stalled(_)), "a probe ends no outage");
        assert_eq!(world.tick_at(24_999), [Output::Probe]);
        assert_eq!(disconnects(&world.tick_at(25_000)), [1]);
        // The server opens and serves nothing: the same outage goes on, and stands still in the same way.
        let mut world = World::probing(StallPolicy::FailAfterMs(5_000), true);
        world.disconnected(0);
        world.dialled(0, 7, OLD);
        world.answered_at(2_000);
        world.lost(0, true);
        assert_eq!(world.reconnect.give_up_at(), Some(world.start + Duration::from_secs(2 + 20 + 3)));
    }

    #[test]
    fn a_policy_that_somebody_sets_has_a_time_that_probes_do_not_stop() {
        let fail = StallPolicy::FailAfterMs(10_000);
        // In an outage.
        let mut world = World::probing(StallPolicy::Wait, true);
        world.disconnected(0);
        world.now_ms = 60_000;
        world.reconnect.told_policy(fail, world.now());
        world.answered_at(69_000);
        assert_eq!(world.tick_at(69_999), [], "and none asks for a probe");
        assert_eq!(disconnects(&world.tick_at(70_000)), [1]);
        let mut world = World::probing(StallPolicy::FailAfterMs(30_000), true);
        world.disconnected(0);
        for second in (0..60).step_by(10) {
            world.answered_at(second * 1_000);
        }
        world.now_ms = 60_000;
        world.reconnect.told_policy(fail, world.now());
        world.answered_at(69_000);
        assert!(disconnects(&world.tick_at(69_999)).is_empty());
        assert_eq!(disconnects(&world.tick_at(70_000)), [1]);
        // While a server that is connected takes long.
        let mut world = World::probing(StallPolicy::Wait, true);
        world.answered_at(45_000);
        world.silent_at(0, 0, 50_000);
        world.reconnect.told_policy(fail, world.now());
        world.answered_at(59_000);
        world.silent_at(0, 0, 59_500);
        assert!(disconnects(&world.tick_at(59_999)).is_empty());
        let outputs = world.tick_at(60_000);
        assert_eq!(disconnects(&outputs), [0, 1]);
        assert!(matches!(world.reconnect.condition(), Condition::Failing(_)));
        world.disconnected(0);
        let outputs = world.disconnected(1);
        assert!(outputs.contains(&Output::GiveUp(0)) && outputs.contains(&Output::GiveUp(1)));
        // Long before: its time begins when the server falls silent.
        let mut world = World::probing(StallPolicy::Wait, true);
        world.reconnect.told_policy(fail, world.now());
        world.silent_at(0, 100_000, 115_000);
        world.answered_at(128_000);
        world.silent_at(0, 100_000, 129_000);
        assert!(disconnects(&world.tick_at(129_999)).is_empty());
        assert_eq!(disconnects(&world.tick_at(130_000)), [0, 1]);
    }

    #[test]
    fn a_policy_may_be_changed_during_an_outage() {
        let mut world = World::new(StallPolicy::Wait);
        world.disconnected(0);
        world.tick_at(60_000);
        world.reconnect.told_policy(StallPolicy::FailAfterMs(30_000), world.now());
        assert_eq!(world.tick_at(89_999), [], "its time begins now");
        assert_eq!(disconnects(&world.tick_at(90_000)), [1]);
        let mut world = World::new(StallPolicy::FailAfterMs(30_000));
        world.disconnected(0);
        world.reconnect.told_policy(StallPolicy::Wait, world.now());
        assert_eq!(world.tick_at(60_000), []);
    }

    #[test]
    fn a_server_that_forgot_nothing_is_gone_over_to_when_no_queue_is_left_behind() {
        let mut world = World::new(StallPolicy::Wait);
        world.disconnected(0);
        assert_eq!(
            disconnects(&world.dialled(0, 7, NEW)),
            [1],
            "the other still has connections of the old one"
        );
        assert_eq!(world.disconnected(1), [Output::Dial(1), Output::Connect(0, 7)]);
        assert_eq!(world.dialled(1, 8, OLD), [Output::Dial(1)], "who comes with the old one is too late");
        assert_eq!(world.reconnect.condition(), Condition::Stalled("cut; connecting".into()));
    }

    #[test]
    fn a_server_that_forgot_acknowledged_writes_is_the_end() {
        let mut world = World::new(StallPolicy::Wait);
        world.disconnected(0);
        assert_eq!(disconnects(&world.dialled(0, 7, NEW)), [1]);
        // Acknowledged on the other queue before it was closed.
        world.has_unflushed = true;
        let outputs = world.disconnected(1);
        assert_eq!(outputs, [Output::Dial(1), Output::GiveUp(0), Output::GiveUp(1)]);
        assert!(matches!(world.reconnect.condition(), Condition::Lost(_)));
        assert_eq!(world.dialled(1, 8, NEW), []);
        assert_eq!(world.dialled(0, 9, OLD), []);
        assert_eq!(world.tick_at(1 << 40), []);
    }

    #[test]
    fn an_attachment_that_is_no_more_ends_every_queue() {
        let mut world = World::new(StallPolicy::Wait);
        world.disconnected(0);
        world.reconnect.refused_for_good("fenced".into(), &mut world.outputs);
        let outputs = std::mem::take(&mut world.outputs);
        assert_eq!(disconnects(&outputs), [1]);
        assert!(outputs.contains(&Output::GiveUp(0)) && outputs.contains(&Output::GiveUp(1)));
        assert_eq!(world.disconnected(1), [Output::GiveUp(1)]);
        assert_eq!(world.reconnect.condition(), Condition::Lost("fenced".into()));
    }

    #[test]
    fn a_server_that_refuses_everything_does_not_end_an_outage() {
        let mut world = World::new(StallPolicy::FailAfterMs(30_000));
        let losses =
            [(0, false, 30_000), (9_000, true, 30_000), (11_000, true, 30_000), (20_000, false, 50_000)];
        let mut refusals = 0;
        for (now_ms, served_nothing, deadline_ms) in losses {
            world.now_ms = now_ms;
            world.lost(0, served_nothing);
            assert_eq!(world.reconnect.give_up_at(), Some(world.start + Duration::from_millis(deadline_ms)));
            refusals = if served_nothing { refusals + 1 } else { 0 };
            assert_eq!(world.reconnect.refusals(), refusals);
            world.dialled(0, 7, OLD);
            assert_eq!(world.reconnect.condition(), Condition::Live);
        }
        // It is over when it has been reached again, but its requests failed meanwhile.
        world.lost(0, true);
        assert_eq!(disconnects(&world.tick_at(50_000)), [1]);
        assert!(world.disconnected(1).contains(&Output::GiveUp(0)));
    }

    const WAIT_MS: u64 = WAIT_MIN.as_millis() as u64;

    fn told(why: &str) -> Loss {
        Loss::Told(why.to_owned())
    }

    /// Queue 0 was connected to the next process while an acknowledgement of the former one waited in queue 1's socket.
    #[test]
    fn of_a_server_that_tells_no_incarnation_all_queues_go_and_come_together() {
        let mut world = World::untold();
        assert_eq!(
            world.disconnected(0),
            [Output::Dial(0), Output::Wake(1)],
            "some end with the last client"
        );
        let outputs = world.dialled(0, 7, "");
        assert_eq!(outputs, [Output::Disconnect(1, GO_TOGETHER.into())], "it may be of the former process");
        let outputs = world.lost_by(1, told(GO_TOGETHER), false);
        assert_eq!(outputs, [Output::Dial(1), Output::Wake(0)], "the next process may be gone already");
        assert_eq!(world.dialled(1, 8, ""), [Output::Connect(0, 7), Output::Connect(1, 8)]);
        assert_eq!(world.reconnect.condition(), Condition::Live);
        // Both at once, and the second is dialled first.
        world.disconnected(1);
        assert_eq!(world.disconnected(0), [Output::Dial(0), Output::Wake(1)]);
        assert_eq!(world.dialled(0, 9, ""), []);
        assert_eq!(world.dialled(1, 10, ""), [Output::Connect(0, 9), Output::Connect(1, 10)]);
        assert_eq!(world.reconnect.wakes_at(world.now()), None);
    }

    #[test]
    fn after_a_restart_in_which_every_attempt_failed_queues_still_come_together() {
        let mut world = World::untold();
        world.disconnected(0);
        world.disconnected(1);
        for _ in 0..5 {
            world.dial_failed();
            world.dial_failed();
        }
        world.now_ms = 60_000;
        assert_eq!(world.dialled(0, 7, ""), []);
        assert_eq!(world.tick_at(60_000 + WAIT_MS - 1), []);
        assert_eq!(world.dialled(1, 8, ""), [Output::Connect(0, 7), Output::Connect(1, 8)]);
        assert_eq!(world.tick_at(60_000 + WAIT_MS), []);
    }

    #[test]
    fn of_a_server_that_shuts_down_every_queue_waits_for_what_it_is_owed() {
        let mut world = World::untold();
        let outputs = world.lost_by(0, Loss::Leaving, false);
        assert_eq!(outputs, [Output::Leave(1), Output::Dial(0), Output::Wake(1)]);
        assert_eq!(world.dialled(0, 7, ""), [], "the other is still served");
        assert_eq!(world.lost_by(1, Loss::Leaving, false), [Output::Dial(1), Output::Wake(0)]);
        world.dialled(1, 8, "");
        assert_eq!(world.reconnect.condition(), Condition::Live);
        assert_eq!(world.reconnect.wakes_at(world.now()), None);
        // What it owes does not come, and no other server does.
        world.lost_by(0, Loss::Leaving, false);
        assert_eq!(disconnects(&world.silent_at(1, 0, 20_000)), [1]);
        world.disconnected(1);
        world.dialled(0, 9, "");
        world.dialled(1, 10, "");
        world.reconnect.set_policy(StallPolicy::FailAfterMs(5_000));
        world.lost_by(0, Loss::Leaving, false);
        assert_eq!(disconnects(&world.tick_at(25_000)), [1]);
        assert!(world.disconnected(1).contains(&Output::GiveUp(1)));
    }

    #[test]
    fn what_a_server_owes_that_shuts_down_holds_up_nobody_for_long_whom_another_could_serve() {
        let mut world = World::untold();
        world.lost_by(0, Loss::Leaving, false);
        assert_eq!(world.tick_at(15_000), [], "nobody could serve");
        world.dialled(0, 7, "");
        assert_eq!(world.reconnect.wakes_at(world.now()), Some(world.now() + LEAVING_MAX));
        assert_eq!(world.tick_at(24_999), []);
        assert_eq!(world.tick_at(25_000), [Output::Disconnect(1, OWES_FOR_LONG.into())]);
        assert_eq!(world.reconnect.wakes_at(world.now()), None);
        world.lost_by(1, told(OWES_FOR_LONG), false);
        assert_eq!(world.dialled(1, 8, ""), [Output::Connect(0, 7), Output::Connect(1, 8)]);
        assert_eq!(world.tick_at(60_000), []);
    }

    #[test]
    fn a_queue_that_gets_no_connection_holds_up_no_other_for_long() {
        let mut world = World::untold();
        world.disconnected(0);
        world.disconnected(1);
        assert_eq!(world.dialled(0, 7, ""), []);
        assert_eq!(world.reconnect.wakes_at(world.now()), Some(world.start + WAIT_MIN));
        assert_eq!(world.tick_at(WAIT_MS - 1), []);
        assert_eq!(world.tick_at(WAIT_MS), [Output::Connect(0, 7)]);
        assert!(matches!(world.reconnect.condition(), Condition::Stalled(_)));
        assert_eq!(world.reconnect.wakes_at(world.now()), None);
        // It has one at last, perhaps of another process: all begin anew, and wait for longer.
        assert_eq!(world.dialled(1, 8, ""), [Output::Disconnect(0, COME_TOGETHER.into())]);
        let outputs = world.lost_by(0, told(COME_TOGETHER), false);
        assert_eq!(outputs, [Output::Dial(0), Output::Wake(1)]);
        assert_eq!(world.tick_at(3 * WAIT_MS - 1), []);
        assert_eq!(world.dialled(0, 9, ""), [Output::Connect(0, 9), Output::Connect(1, 8)]);
        assert_eq!(world.reconnect.condition(), Condition::Live);
        // Nor does a dial that cannot be begun.
        world.disconnected(0);
        world.disconnected(1);
        world.dialled(0, 10, "");
        world.reconnect.dial_not_begun(1, "no thread".into(), world.now());
        assert_eq!(world.tick_at(4 * WAIT_MS), [Output::Dial(1), Output::Connect(0, 10)]);
    }

    #[test]
    fn a_disk_that_is_lost_wakes_nobody_for_queues_that_wait_for_each_other() {
        let mut world = World::untold();
        world.disconnected(0);
        world.disconnected(1);
        world.dialled(0, 7, "");
        world.reconnect.refused_for_good("fenced".into(), &mut world.outputs);
        assert_eq!(world.reconnect.wakes_at(world.now()), None);
        world.outputs.clear();
        assert_eq!(world.tick_at(WAIT_MS), []);
    }

    #[test]
    fn who_goes_along_with_another_queue_says_nothing_of_the_server() {
        let mut world = World::untold();
        for refusals in 1..4 {
            // Whoever is heard first.
            world.lost(0, true);
            world.dialled(0, 7, "");
            world.lost_by(1, told(GO_TOGETHER), false);
            world.dialled(1, 8, "");
            assert_eq!(world.reconnect.refusals(), 2 * refusals - 1, "each dial after it comes later");
            world.lost(1, true);
            world.lost_by(0, told(COME_TOGETHER), false);
            assert_eq!(world.reconnect.refusals(), 2 * refusals);
            world.dialled(0, 9, "");
            world.dialled(1, 10, "");
        }
        // It was to go along, and had lost its connections by itself before.
        world.disconnected(0);
        assert_eq!(disconnects(&world.dialled(0, 7, "")), [1]);
        world.lost(1, true);
        assert_eq!(world.reconnect.refusals(), 1);
    }

    #[test]
    fn requests_that_failed_do_not_keep_a_server_that_grants_too_few_from_being_used() {
        let mut world = World::untold();
        world.reconnect.set_policy(StallPolicy::FailAfterMs(5_000));
        world.disconnected(0);
        world.disconnected(1);
        assert_eq!(world.tick_at(5_000), [Output::GiveUp(0), Output::GiveUp(1)]);
        world.dialled(0, 7, "");
        assert_eq!(world.tick_at(5_000 + WAIT_MS), [Output::Connect(0, 7)]);
        assert!(matches!(world.reconnect.condition(), Condition::Failing(_)), "of the other they still fail");
        assert_eq!(world.tick_at(60_000), [], "and who is served has no outage");
        assert_eq!(world.reconnect.wakes_at(world.now()), None);
        // Until it has one of its own.
        assert_eq!(world.disconnected(0), [Output::Dial(0), Output::Wake(1)], "its requests wait");
        assert!(matches!(world.reconnect.condition(), Condition::Stalled(_)));
        assert_eq!(world.tick_at(64_999), []);
        assert_eq!(world.tick_at(65_000), [Output::GiveUp(0), Output::GiveUp(1)]);
        world.dialled(0, 8, "");
        world.dialled(1, 9, "");
        assert_eq!(world.reconnect.condition(), Condition::Live);
    }

    /// A fail-over to another storage machine and back.
    #[test]
    fn an_incarnation_that_was_left_may_come_back() {
        let mut world = World::new(StallPolicy::Wait);
        for (incarnation, was_left) in [(NEW, false), (OLD, true), (NEW, true)] {
            world.disconnected(0);
            world.disconnected(1);
            if was_left {
                let doubted = world.dialled(0, 7, incarnation);
                assert_eq!(doubted, [Output::Dial(0)], "perhaps it was told before the change");
            }
            assert_eq!(world.dialled(0, 7, incarnation), [Output::Connect(0, 7)]);
            assert_eq!(world.dialled(1, 8, incarnation), [Output::Connect(1, 8)]);
            assert_eq!(world.reconnect.condition(), Condition::Live);
            assert_eq!(world.reconnect.incarnation(), incarnation);
        }
        world.disconnected(0);
        world.has_unflushed = true;
        world.dialled(0, 7, OLD);
        world.dialled(0, 7, OLD);
        world.disconnected(1);
        assert!(matches!(world.reconnect.condition(), Condition::Lost(_)), "and forgets like any other");
    }

    #[test]
    fn an_incarnation_that_changes_twice_is_dialled_again() {
        let mut world = World::new(StallPolicy::Wait);
        world.disconnected(0);
        world.disconnected(1);
        // The first goes over at once; the second comes with a still newer one, and the first has to be closed again.
        assert_eq!(world.dialled(0, 7, NEW), [Output::Connect(0, 7)]);
        assert_eq!(disconnects(&world.dialled(1, 8, "boot.3")), [0]);
        assert_eq!(world.disconnected(0), [Output::Dial(0), Output::Connect(1, 8)]);
        assert_eq!(world.dialled(0, 9, "boot.3"), [Output::Connect(0, 9)]);
        assert_eq!(world.reconnect.condition(), Condition::Live);
    }
}
