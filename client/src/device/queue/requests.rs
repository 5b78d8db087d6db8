//! The requests of a queue: one record for each tag, from the kernel's request to its end.
//!
//! ```text
//!            submit            take_batch            batch_sent
//!   Idle ───────────► Queued ───────────► Sending ───────────► Sent
//!    ▲                  ▲                    │ reply              │ reply
//!    │                  │ lost, re-sent      ▼                    ▼
//!    │                  └─────────────────── ◄───────────────────┤
//!    └───────── completion, once it is neither sending nor receiving ◄──┘
//! ```
//! Pure state. Changed by `connection.rs`, on which a request is, and read by `core.rs`. What is not here: whose move a tag is towards the
//! driver (`ublk-core/src/tag.rs`), and which memory holds a staged payload (`staging.rs`). Nothing here allocates after
//! construction.

use std::collections::VecDeque;

use proto::nbd::transmission::{Command, Request};

use super::block_request::BlockRequest;

/// Bits of a cookie that hold the tag; the sequence number is above them.
pub const COOKIE_TAG_BITS: u32 = 16;

/// How far a request is on its way to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// There is none.
    Idle,
    /// It waits to be sent.
    Queued,
    /// In the batch that is being sent.
    Sending,
    /// The server has it.
    Sent,
}

/// What has come of a request on its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Nothing.
    None,
    /// The header of a reply whose payload is being received.
    Begun,
    /// All of it.
    Whole(Result<(), i32>),
    /// The server is shutting down and has not done it.
    Refused,
}

/// A request's end: `Ok`, or a positive errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub tag: u16,
    /// How it went.
    pub result: Result<(), i32>,
}

/// What becomes of requests that were in flight on a connection that is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resend {
    /// All are sent again: the server promises that none of the lost connection lands after the next one is open.
    Everything,
    /// What changes nothing is; a server that promises nothing may carry out the rest later, or twice. A FLUSH is not, sent
    /// or not: what it is to cover may be gone.
    ReadsOnly,
    /// Nothing: the server broke the protocol, and would again.
    Nothing,
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// What is asked.
    pub request: BlockRequest,
    /// The connection that it is on, from its submission to its end.
    pub connection: u16,
    /// How far it is.
    pub stage: Stage,
    /// What has come of it.
    pub answer: Answer,
    /// Under what name the server knows it.
    pub cookie: u64,
    /// Ticks since it was sent for the first time, on whichever connection.
    pub age_ticks: u32,
}

impl Record {
    fn new(request: BlockRequest, connection: u16) -> Self {
        Self { request, connection, stage: Stage::Idle, answer: Answer::None, cookie: 0, age_ticks: 0 }
    }

    /// As the server is told.
    pub fn header(&self) -> Request {
        Request {
            flags: self.request.flags,
            command: self.request.command,
            cookie: self.cookie,
            offset_bytes: self.request.offset_bytes,
            length_bytes: u64::from(self.request.length_bytes),
        }
    }

    /// Whether it may be sent again, now that its connection is lost.
    pub fn may_be_sent_again(&self, resend: Resend) -> bool {
        let may_be_done = self.stage != Stage::Queued && self.answer != Answer::Refused;
        match (resend, self.request.command) {
            (Resend::Everything, _) => true,
            (Resend::ReadsOnly, Command::Flush) => false,
            (Resend::ReadsOnly, Command::Read | Command::Cache | Command::BlockStatus) => true,
            (Resend::ReadsOnly | Resend::Nothing, _) => !may_be_done,
        }
    }

    /// Whether a reply with this cookie, on this connection, is this request's first.
    pub fn awaits(&self, cookie: u64, connection: u16) -> bool {
        let is_there = self.is_with_server() && self.connection == connection;
        is_there && self.cookie == cookie && self.answer == Answer::None
    }

    /// Whether the server has it, or a part of it.
    pub fn is_with_server(&self) -> bool {
        matches!(self.stage, Stage::Sending | Stage::Sent)
    }
}

/// All of a queue's.
#[derive(Debug)]
pub struct Requests {
    /// By tag: the caller's, then a ping for each connection.
    records: Box<[Record]>,
    /// How many are the caller's.
    tags: u16,
    /// By tag: what its FLUSH covers, in the counters of `unflushed.rs`.
    covered: Box<[u64]>,
    nr_counters: usize,
    sequence: u64,
    completions: VecDeque<Completion>,
}

impl Requests {
    /// For tags `0..tags` and so many connections; a FLUSH remembers `nr_counters` counters.
    pub fn new(tags: u16, nr_connections: u16, nr_counters: usize) -> Self {
        let idle = Record::new(BlockRequest::FLUSH, 0);
        Self {
            records: vec![idle; usize::from(tags) + usize::from(nr_connections)].into_boxed_slice(),
            tags,
            covered: vec![0; usize::from(tags) * nr_counters].into_boxed_slice(),
            nr_counters,
            sequence: 0,
            completions: VecDeque::with_capacity(usize::from(tags)),
        }
    }

    /// A tag's record.
    pub fn of(&self, tag: u16) -> &Record {
        &self.records[usize::from(tag)]
    }

    /// The same, to change it.
    pub fn of_mut(&mut self, tag: u16) -> &mut Record {
        &mut self.records[usize::from(tag)]
    }

    /// The record whose request has this cookie on this connection and awaits its reply; with its tag.
    pub fn awaiting(&mut self, cookie: u64, connection: u16) -> Option<(u16, &mut Record)> {
        let tag = (cookie & ((1 << COOKIE_TAG_BITS) - 1)) as u16;
        let record = self.records.get_mut(usize::from(tag))?;
        record.awaits(cookie, connection).then_some((tag, record))
    }

    /// The tag that a connection's pings have.
    pub fn ping_tag(&self, connection: u16) -> u16 {
        self.tags + connection
    }

    /// Whether it is a ping's.
    pub fn is_ping(&self, tag: u16) -> bool {
        tag >= self.tags
    }

    /// The caller's tags.
    pub fn tags(&self) -> std::ops::Range<u16> {
        0..self.tags
    }

    /// The caller's requests that have not ended.
    pub fn waiting(&self) -> impl Iterator<Item = &Record> {
        self.records[..usize::from(self.tags)].iter().filter(|record| record.stage != Stage::Idle)
    }

    /// Puts a request on a connection, in line to be sent.
    ///
    /// # Panics
    /// When the tag already has a request in flight: the caller is wrong.
    pub fn begin(&mut self, tag: u16, request: BlockRequest, connection: u16) {
        let record = self.of_mut(tag);
        assert_eq!(record.stage, Stage::Idle, "tag {tag} has a request in flight");
        *record = Record::new(request, connection);
        self.queue(tag);
    }

    /// In line to be sent, under a cookie of its own.
    pub fn queue(&mut self, tag: u16) {
        self.sequence += 1;
        let sequence = self.sequence;
        let record = self.of_mut(tag);
        record.stage = Stage::Queued;
        record.answer = Answer::None;
        record.cookie = sequence << COOKIE_TAG_BITS | u64::from(tag);
    }

    /// A request has ended; nobody hears of a ping.
    pub fn end(&mut self, tag: u16, result: Result<(), i32>) {
        self.of_mut(tag).stage = Stage::Idle;
        if !self.is_ping(tag) {
            self.completions.push_back(Completion { tag, result });
        }
    }

    /// The next request that ended, if any.
    pub fn take_completion(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    /// Whether the server has yet to answer, in whole, something that it was sent.
    pub fn are_owed_replies(&self) -> bool {
        self.waiting().any(|record| record.is_with_server() && record.answer != Answer::Refused)
    }

    /// A tick has passed since the last: whatever the server was sent and has not answered is older by that.
    pub fn tick(&mut self) {
        for record in &mut self.records {
            let waits_again = record.stage == Stage::Queued && record.age_ticks > 0;
            record.age_ticks += u32::from(record.is_with_server() || waits_again);
        }
    }

    /// Ticks since the oldest request that is not answered was sent for the first time, on whichever connection; `None`: none
    /// was.
    pub fn oldest_ticks(&self) -> Option<u32> {
        self.waiting().map(|record| record.age_ticks).filter(|ticks| *ticks > 0).max()
    }

    /// The counters that the tag's FLUSH remembers.
    pub fn covered(&self, tag: u16) -> &[u64] {
        &self.covered[usize::from(tag) * self.nr_counters..][..self.nr_counters]
    }

    /// The same, to change them.
    pub fn covered_mut(&mut self, tag: u16) -> &mut [u64] {
        &mut self.covered[usize::from(tag) * self.nr_counters..][..self.nr_counters]
    }
}
