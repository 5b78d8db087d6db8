//! A queue of the simulated device process: the product's core, and what stands for its thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::Instant;

use client::device::queue::block_request::BlockRequest;
use client::device::queue::core::{QueueCore, QueueSpec};
use client::device::queue::io::Pages;

use super::bio::{Bio, EndedBio};
use super::dial::Dial;
use super::ring::{self, GivenBack, Wire};
use crate::simulator::network::LinkId;

/// What the main thread says.
pub(super) enum QueueCommand {
    Connect(Vec<LinkId>),
    Disconnect(String),
    Leave,
    Look,
    GiveUp,
    /// The queue does not look for so many steps.
    Idle(u32),
}

pub(super) struct Queue {
    pub(super) core: QueueCore,
    pub(super) wires: Vec<Wire>,
    /// Requests that the kernel has brought, until the next pass.
    pub(super) arrivals: VecDeque<(u16, BlockRequest)>,
    pub(super) given_back: Vec<GivenBack>,
    /// By tag: how often the queue had lost its connections when the request came.
    pub(super) came_after: Vec<u64>,
    /// How often it has.
    pub(super) losses: u64,
    pub(super) commands: VecDeque<QueueCommand>,
    /// Receives into pages that nobody waits for any more.
    pub(super) forgotten: Vec<(LinkId, Pages)>,
    /// Tags of replies that tell of success, for `Mutant::FlushBelieved`.
    pub(super) believed: RefCell<Vec<u16>>,
    pub(super) dial: Option<Dial>,
    pub(super) ticked_at: Instant,
}

impl Queue {
    pub(super) fn new(spec: QueueSpec, now: Instant) -> Self {
        Self {
            wires: (0..spec.nr_connections).map(|_| Wire::default()).collect(),
            arrivals: VecDeque::new(),
            given_back: Vec::new(),
            came_after: vec![0; usize::from(spec.queue_depth)],
            losses: 0,
            commands: VecDeque::new(),
            forgotten: Vec::new(),
            believed: RefCell::default(),
            dial: None,
            ticked_at: now,
            core: QueueCore::new(spec, now),
        }
    }

    /// What it gave back in its last pass is known to whoever waits for it. False: there was nothing.
    pub(super) fn enter_ring(&mut self, bios: &mut [Option<Bio>], ended: &mut Vec<EndedBio>) -> bool {
        ring::hand_over(&mut self.given_back, bios, ended)
    }
}
