//! Requests of the block layer, and what a step of a device process may touch.

use std::time::Instant;

use client::device::queue::block_request::BlockRequest;
use fastrand::Rng;

use crate::block_history::{SentFlush, SentRead, SentWrite};
use crate::simulator::coverage::Coverage;
use crate::simulator::network::{Link, LinkId};

/// What the oracle is to be told when a request ends.
#[derive(Debug)]
pub(in crate::simulator) enum Note {
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
pub(in crate::simulator) struct Bio {
    pub(in crate::simulator) request: BlockRequest,
    /// Its pages.
    pub(in crate::simulator) data: Vec<u8>,
    pub(in crate::simulator) note: Note,
    pub(in crate::simulator) submitted_at: Instant,
}

/// The device's requests, by queue and tag.
pub(in crate::simulator) type Bios = Vec<Vec<Option<Bio>>>;

/// A request that has ended.
pub(in crate::simulator) struct EndedBio {
    pub(in crate::simulator) bio: Bio,
    pub(in crate::simulator) result: Result<(), i32>,
    /// Its queue has lost its connections since it was given the request.
    pub(in crate::simulator) was_lost: bool,
}

pub(in crate::simulator) struct Surroundings<'a> {
    pub(in crate::simulator) links: &'a mut Vec<Link>,
    pub(in crate::simulator) bios: &'a mut Bios,
    pub(in crate::simulator) ended: &'a mut Vec<EndedBio>,
    pub(in crate::simulator) rng: &'a mut Rng,
    pub(in crate::simulator) coverage: &'a mut Coverage,
    pub(in crate::simulator) now: Instant,
    pub(in crate::simulator) room_bytes: usize,
    /// Connections to the server that were just begun.
    pub(in crate::simulator) dialled: &'a mut Vec<LinkId>,
    pub(in crate::simulator) is_server_up: bool,
}
