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
//! Invariants:
//! - a queue gets connections only of the incarnation that all others have;
//! - after a request was given up no queue has a connection until every queue can have one;
//! - whether the server forgot anything is judged only when no queue has a connection: an acknowledgement of the former
//!   incarnation could still arrive on one;
//! - after `lost for good` no queue gets a connection again.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What requests do while there is no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StallPolicy {
    /// They wait, however long it takes.
    #[default]
    Wait,
    /// They fail with EIO once an outage has lasted this long, and work again when the server is back.
    FailAfterMs(u64),
}

/// What is to be done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum Output<S> {
    /// Open the connections of this queue, again and again until it works, and tell [`Reconnect::dialled`].
    Dial(u16),
    /// Give the queue its connections.
    Connect(u16, S),
    /// Let the queue drop its connections, for this reason.
    Disconnect(u16, String),
    /// Requests of the queue fail while it has no connections.
    GiveUp(u16),
}

#[derive(Debug)]
enum QueueState<S> {
    Up,
    /// It was told to drop its connections.
    Closing,
    Down,
    /// Connections of another incarnation wait until all queues are down.
    Dialled(S, String),
}

/// What is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Every queue has its connections.
    Live,
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
    /// Left for good: who comes with one of these was dialled before its server went.
    former_incarnations: Vec<String>,
    /// By queue: the former incarnation that its last dial told, which may have begun before the present one was known.
    doubted: Vec<Option<String>>,
    policy: StallPolicy,
    /// When the outage began, and why.
    outage: Option<(Instant, String)>,
    /// When the one before began, and how often since then a server was reached that refused everything.
    former_outage: Option<Instant>,
    refusals: u32,
    /// What the last attempt came to.
    attempt: String,
    has_given_up: bool,
    lost: Option<String>,
}

impl<S> Reconnect<S> {
    /// All queues have connections of this incarnation.
    pub fn new(nr_hw_queues: u16, incarnation: String, policy: StallPolicy) -> Self {
        Self {
            queues: (0..nr_hw_queues).map(|_| QueueState::Up).collect(),
            incarnation,
            former_incarnations: Vec::new(),
            doubted: vec![None; usize::from(nr_hw_queues)],
            policy,
            outage: None,
            former_outage: None,
            refusals: 0,
            attempt: String::new(),
            has_given_up: false,
            lost: None,
        }
    }

    /// How often in a row a server was reached that refused everything.
    pub fn refusals(&self) -> u32 {
        self.refusals
    }

    /// A queue has lost its connections, and no byte of them can come any more. `has_unflushed` tells whether a server that
    /// forgets would have anything to forget; it is asked only when no queue has a connection. Where the connections
    /// `served_nothing`, refused from the start, the server was not back, and the outage before them is not over.
    pub fn disconnected(
        &mut self,
        queue_id: u16,
        served_nothing: bool,
        reason: &str,
        now: Instant,
        has_unflushed: impl FnOnce() -> bool,
        outputs: &mut Vec<Output<S>>,
    ) {
        if served_nothing {
            self.refusals = self.refusals.saturating_add(1);
        } else {
            (self.former_outage, self.refusals) = (None, 0);
        }
        self.queues[usize::from(queue_id)] = QueueState::Down;
        if self.lost.is_some() {
            outputs.push(Output::GiveUp(queue_id));
            return;
        }
        if self.outage.is_none() {
            self.outage = Some((self.former_outage.unwrap_or(now), reason.to_owned()));
            self.attempt.clear();
        }
        self.give_up(outputs);
        outputs.push(Output::Dial(queue_id));
        self.settle(has_unflushed, outputs);
    }

    /// An attempt to open a queue's connections failed; another follows.
    pub fn dial_failed(&mut self, error: String) {
        self.attempt = error;
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
        has_unflushed: impl FnOnce() -> bool,
        outputs: &mut Vec<Output<S>>,
    ) {
        let index = usize::from(queue_id);
        if self.lost.is_some() || !matches!(self.queues[index], QueueState::Down) {
            return;
        }
        if incarnation == self.incarnation && !self.has_given_up {
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
        self.close_all("the server has another storage incarnation", outputs);
        self.settle(has_unflushed, outputs);
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant, outputs: &mut Vec<Output<S>>) {
        if self.deadline().is_some_and(|deadline| now >= deadline) {
            self.has_given_up = true;
            self.close_all("the other connections are given up", outputs);
            self.give_up(outputs);
        }
    }

    /// Once no queue is served any more: whoever is told of an error may write again at once, through any of them.
    fn give_up(&self, outputs: &mut Vec<Output<S>>) {
        if self.has_given_up && !self.is_served() {
            outputs.extend((0..self.queues.len() as u16).map(Output::GiveUp));
        }
    }

    fn is_served(&self) -> bool {
        self.queues.iter().any(|queue| matches!(queue, QueueState::Up | QueueState::Closing))
    }

    fn close_all(&mut self, reason: &str, outputs: &mut Vec<Output<S>>) {
        for (queue_id, queue) in (0..).zip(&mut self.queues) {
            if matches!(queue, QueueState::Up) {
                *queue = QueueState::Closing;
                outputs.push(Output::Disconnect(queue_id, reason.to_owned()));
            }
        }
    }

    /// When [`Reconnect::tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        match (self.policy, &self.outage) {
            (StallPolicy::FailAfterMs(after_ms), Some((since, _))) if !self.has_given_up => {
                since.checked_add(Duration::from_millis(after_ms))
            }
            _ => None,
        }
    }

    /// What is to be done from now on. Requests that failed stay failed; under `Wait` those that come wait again after
    /// the next outage begins.
    pub fn set_policy(&mut self, policy: StallPolicy) {
        self.policy = policy;
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
        let Some((_, reason)) = &self.outage else { return Condition::Live };
        let attempt = if self.attempt.is_empty() { "connecting" } else { &self.attempt };
        let text = format!("{reason}; {attempt}");
        if self.has_given_up { Condition::Failing(text) } else { Condition::Stalled(text) }
    }

    fn connect(&mut self, queue_id: u16, sockets: S, outputs: &mut Vec<Output<S>>) {
        self.queues[usize::from(queue_id)] = QueueState::Up;
        outputs.push(Output::Connect(queue_id, sockets));
        if self.queues.iter().all(|queue| matches!(queue, QueueState::Up)) {
            self.former_outage = self.outage.take().map(|(since, _)| since);
            self.has_given_up = false;
        }
    }

    /// Once no queue has a connection any more: goes over to the server's incarnation, or cannot. After giving up, waits until
    /// every queue can be connected.
    fn settle(&mut self, has_unflushed: impl FnOnce() -> bool, outputs: &mut Vec<Output<S>>) {
        if self.is_served() {
            return;
        }
        let new = self.queues.iter().find_map(|queue| match queue {
            QueueState::Dialled(_, told) if *told != self.incarnation => Some(told.clone()),
            _ => None,
        });
        if let Some(new) = new {
            if has_unflushed() {
                let reason = "the storage server came back without writes that it had acknowledged: I/O gets EIO until \
                              the disk is detached; check its contents after that";
                self.lose(reason.to_owned(), outputs);
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
        if self.has_given_up && self.queues.iter().any(|queue| matches!(queue, QueueState::Down)) {
            return;
        }
        for queue_id in 0..self.queues.len() as u16 {
            let queue = &mut self.queues[usize::from(queue_id)];
            match std::mem::replace(queue, QueueState::Down) {
                QueueState::Dialled(sockets, _) => self.connect(queue_id, sockets, outputs),
                other => *queue = other,
            }
        }
    }

    fn lose(&mut self, reason: String, outputs: &mut Vec<Output<S>>) {
        for (queue_id, queue) in (0..).zip(&mut self.queues) {
            match queue {
                QueueState::Up => {
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

#[cfg(test)]
mod tests {
    use super::*;

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
            let reconnect = Reconnect::new(2, OLD.to_owned(), policy);
            Self { reconnect, start: Instant::now(), now_ms: 0, has_unflushed: false, outputs: Vec::new() }
        }

        fn now(&self) -> Instant {
            self.start + Duration::from_millis(self.now_ms)
        }

        fn disconnected(&mut self, queue_id: u16) -> Vec<Output<u32>> {
            self.lost(queue_id, false)
        }

        fn lost(&mut self, queue_id: u16, served_nothing: bool) -> Vec<Output<u32>> {
            let (now, unflushed) = (self.now(), self.has_unflushed);
            let outputs = &mut self.outputs;
            self.reconnect.disconnected(queue_id, served_nothing, "cut", now, || unflushed, outputs);
            std::mem::take(&mut self.outputs)
        }

        fn dialled(&mut self, queue_id: u16, sockets: u32, incarnation: &str) -> Vec<Output<u32>> {
            let unflushed = self.has_unflushed;
            let incarnation = incarnation.to_owned();
            self.reconnect.dialled(queue_id, sockets, incarnation, || unflushed, &mut self.outputs);
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
        world.reconnect.dial_failed("refused".into());
        assert_eq!(world.reconnect.condition(), Condition::Stalled("cut; refused".into()));
        assert_eq!(world.tick_at(1 << 40), [], "it waits for ever");
        world.has_unflushed = true;
        assert_eq!(world.dialled(1, 7, OLD), [Output::Connect(1, 7)]);
        assert_eq!(world.reconnect.condition(), Condition::Live);
    }

    #[test]
    fn after_its_time_an_outage_fails_what_waits_until_the_server_is_back() {
        let mut world = World::new(StallPolicy::FailAfterMs(5_000));
        world.disconnected(0);
        assert_eq!(world.reconnect.deadline(), Some(world.start + Duration::from_secs(5)));
        assert_eq!(world.tick_at(4_999), []);
        let outputs = world.tick_at(5_000);
        assert_eq!(disconnects(&outputs), [1], "what fails may still land: no queue is served meanwhile");
        assert!(!outputs.contains(&Output::GiveUp(0)), "nor when the first error is told");
        assert_eq!(world.reconnect.deadline(), None, "once is enough");
        assert!(matches!(world.reconnect.condition(), Condition::Failing(_)));
        assert_eq!(world.dialled(0, 1, OLD), []);
        let outputs = world.disconnected(1);
        assert_eq!(outputs, [Output::GiveUp(0), Output::GiveUp(1), Output::Dial(1)]);
        assert_eq!(world.dialled(1, 2, OLD), [Output::Connect(0, 1), Output::Connect(1, 2)]);
        assert_eq!(world.reconnect.condition(), Condition::Live);
        world.disconnected(0);
        assert_eq!(world.reconnect.deadline(), Some(world.now() + Duration::from_secs(5)), "the next outage");
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
    fn a_policy_may_be_changed_during_an_outage() {
        let mut world = World::new(StallPolicy::Wait);
        world.disconnected(0);
        world.tick_at(60_000);
        world.reconnect.set_policy(StallPolicy::FailAfterMs(30_000));
        assert_eq!(disconnects(&world.tick_at(60_000)), [1], "it has lasted longer already");
        let mut world = World::new(StallPolicy::FailAfterMs(30_000));
        world.disconnected(0);
        world.reconnect.set_policy(StallPolicy::Wait);
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
            assert_eq!(world.reconnect.deadline(), Some(world.start + Duration::from_millis(deadline_ms)));
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
