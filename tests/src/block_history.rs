//! What every block of a volume may hold, by what was written and answered: to whoever reads it, and after a power cut.
//!
//! Owns the history of writes to a range of blocks, the contents that each of them put there, and the verdict on what is
//! found later. Never does I/O; its user tells it what it sends and which replies came. Used by the tests on the lying disk
//! and by the simulator.
//!
//! What may be read while nothing is lost, for each 512-byte sector of a block by itself: the newest answered write when the
//! read was sent, or any write that was sent later or failed since. Once a read has shown which of those it is, with no write
//! under way, it stays: what failed may not land late.
//!
//! What may be found, for each 512-byte sector of a block by itself:
//! - A write is *pinned* once it was answered with FUA, or was answered before a FLUSH was sent that was answered too (where
//!   the write cache is off: once it was answered). A sector holds the contents of the block's newest pinned write, or of one
//!   that was sent after that; without a pinned write also what it held when the history began.
//! - Nothing else: no older contents, no other block's or sector's, no mixture inside a sector. Sectors of one block may hold
//!   different writes of those allowed, because a disk that loses power may have written any of them.
//!
//! What a copy may hold that is made at one instant of a call, for each sector by itself: nothing that was sent after the call had
//! returned; and if any write is in it, every write that was answered before that one was sent, as well as every one that was answered
//! before the call.
//!
//! Invariant: never two writes of one block in flight, because nothing orders those.

use std::sync::Arc;

use crate::lying_disk::SECTOR_BYTES;

/// Size of a block: 8 sectors, so that one block's write can be torn.
pub const BLOCK_BYTES: usize = 4096;

/// Marks a sector that a history wrote.
const SECTOR_MAGIC: u64 = 0x766f_6c6e_6f64_6531;

/// What a write puts into its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Sectors stamped with block, sector, sequence number and seed, filled by a generator that these four determine.
    Stamped,
    /// Zeroes (WRITE_ZEROES).
    Zeroes,
}

/// A block holds what it may not: a promise was broken.
#[derive(Debug, thiserror::Error)]
#[error("block {block}, sector {sector}: found {found}; allowed: {allowed}")]
pub struct Violation {
    block: usize,
    sector: usize,
    found: String,
    allowed: String,
}

/// A range of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// The first.
    pub first: usize,
    /// How many.
    pub count: usize,
}

impl Blocks {
    /// Offset of the first one, in bytes.
    pub fn offset_bytes(&self) -> u64 {
        (self.first * BLOCK_BYTES) as u64
    }

    /// Their length, in bytes.
    pub fn length_bytes(&self) -> u32 {
        (self.count * BLOCK_BYTES) as u32
    }

    fn numbers(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }
}

/// A write that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentWrite {
    blocks: Blocks,
    sequence: u64,
}

/// A flush that was sent, with what had been answered by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentFlush {
    answers_before: u64,
}

/// A read that was sent, with what it may find of what was there by then.
#[derive(Debug, Clone)]
pub struct SentRead {
    blocks: Blocks,
    events_before: u64,
    /// By block.
    shown: Vec<Shown>,
}

/// The history of a volume's blocks; see the head of the file.
pub struct BlockHistory {
    seed: u64,
    blocks: Vec<Vec<Version>>,
    /// By block.
    live: Vec<Live>,
    sequence: u64,
    answers: u64,
    /// Writes that were sent or have ended.
    events: u64,
}

/// What a block shows to whoever reads it.
struct Live {
    shown: Shown,
    /// All writes, oldest first.
    writes: Vec<(u64, Pattern)>,
    /// What was found when the history began anew, and the last write before.
    base: Option<(u64, Arc<[u8]>)>,
    changed_at: u64,
    /// All writes as copies have to respect them, oldest first.
    timed: Vec<Timed>,
}

/// A write of a block, and when it was sent and answered, in events.
struct Timed {
    sequence: u64,
    pattern: Pattern,
    sent_at: u64,
    answered_at: Option<u64>,
    /// It may have been lost with the power, whenever its answer came.
    may_be_lost: bool,
}

/// A call that makes a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyCall {
    called_at: u64,
}

/// Contents that may be seen: these, or those of any later write.
#[derive(Debug, Clone)]
enum Shown {
    /// From the write of this number on.
    From(u64),
    /// These bytes, seen after the write of this number was sent.
    Seen(u64, Arc<[u8]>),
}

/// Contents that a block may hold, oldest first in its list; the first one of the list is pinned.
struct Version {
    sequence: u64,
    content: Content,
    /// Its place among all answers; `None` while it has none.
    answer: Option<u64>,
    /// It ended with an error: it may be there or not.
    has_failed: bool,
}

enum Content {
    Pattern(Pattern),
    /// What was found when the history began, or began anew.
    Found(Box<[u8]>),
}

impl BlockHistory {
    /// The history of `block_count` blocks that read as zeroes and are stable.
    pub fn new(seed: u64, block_count: usize) -> Self {
        let content = || Content::Pattern(Pattern::Zeroes);
        let zeroes = || vec![Version { sequence: 0, content: content(), answer: Some(0), has_failed: false }];
        let zeroed = || {
            vec![Timed {
                sequence: 0,
                pattern: Pattern::Zeroes,
                sent_at: 0,
                answered_at: Some(0),
                may_be_lost: false,
            }]
        };
        let live = || Live {
            shown: Shown::From(0),
            writes: vec![(0, Pattern::Zeroes)],
            base: None,
            changed_at: 0,
            timed: zeroed(),
        };
        Self {
            seed,
            blocks: (0..block_count).map(|_| zeroes()).collect(),
            live: (0..block_count).map(|_| live()).collect(),
            sequence: 0,
            answers: 0,
            events: 0,
        }
    }

    /// How many blocks there are.
    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// Whether no write of any of these blocks is in flight.
    pub fn is_idle(&self, blocks: Blocks) -> bool {
        self.blocks[blocks.numbers()]
            .iter()
            .all(|versions| versions.last().is_none_or(|last| last.answer.is_some() || last.has_failed))
    }

    /// Notes a write that is about to be sent; gives its payload (empty for zeroes).
    ///
    /// # Panics
    /// Another write of one of the blocks is in flight.
    pub fn send_write(&mut self, blocks: Blocks, pattern: Pattern) -> (SentWrite, Vec<u8>) {
        assert!(self.is_idle(blocks), "two writes of one block in flight: {blocks:?}");
        self.sequence += 1;
        self.events += 1;
        let sequence = self.sequence;
        let mut payload = Vec::new();
        for block in blocks.numbers() {
            let content = Content::Pattern(pattern);
            self.blocks[block].push(Version { sequence, content, answer: None, has_failed: false });
            self.live[block].writes.push((sequence, pattern));
            let timed =
                Timed { sequence, pattern, sent_at: self.events, answered_at: None, may_be_lost: false };
            self.live[block].timed.push(timed);
            self.live[block].changed_at = self.events;
            if pattern == Pattern::Stamped {
                (0..BLOCK_BYTES / SECTOR_BYTES).for_each(|sector| {
                    payload.extend_from_slice(&stamped_sector(self.seed, block, sector, sequence));
                });
            }
        }
        (SentWrite { blocks, sequence }, payload)
    }

    /// Notes that a write was answered without an error; `durable` if it was sent with FUA or the write cache is off.
    pub fn write_answered(&mut self, write: SentWrite, durable: bool) {
        self.answers += 1;
        self.events += 1;
        for block in write.blocks.numbers() {
            let versions = &mut self.blocks[block];
            let Some(at) = versions.iter().position(|version| version.sequence == write.sequence) else {
                panic!("{write:?} was never sent");
            };
            versions[at].answer = Some(self.answers);
            if durable {
                versions.drain(..at);
            }
            let live = &mut self.live[block];
            (live.shown, live.changed_at) = (Shown::From(write.sequence), self.events);
            if let Some(timed) = live.timed.iter_mut().find(|timed| timed.sequence == write.sequence) {
                timed.answered_at = Some(self.events);
            }
        }
    }

    /// Notes that a write ended with an error: it is there, or parts of it, or nothing; but not later than it seems.
    pub fn write_failed(&mut self, write: SentWrite) {
        self.events += 1;
        for block in write.blocks.numbers() {
            let versions = &mut self.blocks[block];
            if let Some(version) = versions.iter_mut().find(|version| version.sequence == write.sequence) {
                version.has_failed = true;
            }
            self.live[block].changed_at = self.events;
        }
    }

    /// Notes a read that is about to be sent.
    pub fn send_read(&self, blocks: Blocks) -> SentRead {
        let shown = self.live[blocks.numbers()].iter().map(|live| live.shown.clone()).collect();
        SentRead { blocks, events_before: self.events, shown }
    }

    /// Checks what a read found.
    ///
    /// # Errors
    /// Names the first sector that holds what it may not.
    ///
    /// # Panics
    /// `found` is not as long as the blocks.
    pub fn read_answered(&mut self, read: &SentRead, found: &[u8]) -> Result<(), Violation> {
        assert_eq!(found.len(), read.blocks.length_bytes() as usize, "what was read of {:?}", read.blocks);
        for ((block, bytes), shown) in read.blocks.numbers().zip(found.chunks(BLOCK_BYTES)).zip(&read.shown) {
            for (sector, bytes) in bytes.chunks(SECTOR_BYTES).enumerate() {
                self.check_read_sector(block, sector, shown, bytes)?;
            }
            let is_idle = self.is_idle(Blocks { first: block, count: 1 });
            if is_idle && self.live[block].changed_at <= read.events_before {
                self.live[block].shown = Shown::Seen(self.sequence, bytes.into());
            }
        }
        Ok(())
    }

    /// The volume lost what was not pinned, and its users were told: any of what is allowed after a power cut may be read.
    pub fn forgot(&mut self) {
        self.handed_over();
        self.may_have_forgotten();
    }

    /// The volume was taken from its user, who has no claim any more on what is not pinned. It is there all the same, until a
    /// power cut.
    pub fn handed_over(&mut self) {
        for version in self.blocks.iter_mut().flat_map(|versions| versions.iter_mut().skip(1)) {
            (version.answer, version.has_failed) = (None, true);
        }
    }

    /// The volume lost power and nothing that was answered: what failed or is under way may have gone.
    pub fn lost_power(&mut self) {
        for (versions, live) in self.blocks.iter().zip(&mut self.live) {
            let answered = versions.iter().rev().find(|version| version.answer.is_some());
            let answered = answered.map_or(0, |answered| answered.sequence);
            live.shown = live.shown_from(answered);
            live.timed.iter_mut().for_each(|timed| timed.may_be_lost = true);
        }
    }

    /// The volume may have lost what is not pinned, and its users are told only by the next FLUSH: any of what is allowed after a power
    /// cut may be read.
    pub fn may_have_forgotten(&mut self) {
        for (versions, live) in self.blocks.iter().zip(&mut self.live) {
            let pinned = versions.first().map_or(0, |pinned| pinned.sequence);
            live.shown = live.shown_from(pinned);
        }
    }

    /// Notes that a FLUSH failed: who was told that has no claim any more on what was answered before it was sent, and is not pinned.
    /// It is there or not.
    pub fn flush_failed(&mut self, flush: SentFlush) {
        for version in self.blocks.iter_mut().flat_map(|versions| versions.iter_mut().skip(1)) {
            if version.answer.is_some_and(|answer| answer <= flush.answers_before) {
                (version.answer, version.has_failed) = (None, true);
            }
        }
    }

    /// Notes that a copy is called for.
    pub fn call_copy(&self) -> CopyCall {
        CopyCall { called_at: self.events }
    }

    /// The event at which a call returns just now.
    pub fn now(&self) -> u64 {
        self.events
    }

    /// Checks a copy of all blocks whose call returned at that event.
    ///
    /// # Errors
    /// Names the first sector that holds what it may not.
    ///
    /// # Panics
    /// `found` is not as long as the blocks.
    pub fn check_copy(&self, call: CopyCall, returned_at: u64, found: &[u8]) -> Result<(), Violation> {
        assert_eq!(found.len(), self.blocks.len() * BLOCK_BYTES, "what was copied");
        let sectors = || found.chunks(SECTOR_BYTES).enumerate();
        let place = |number: usize| {
            let of_block = BLOCK_BYTES / SECTOR_BYTES;
            (number / of_block, number % of_block)
        };
        // The least that each sector shows to be in.
        let shown = sectors().filter_map(|(number, bytes)| {
            let (block, sector) = place(number);
            self.timed_like(block, sector, bytes).map(|timed| timed.sent_at).min()
        });
        let newest = shown.max().unwrap_or(0);
        for (number, bytes) in sectors() {
            let (block, sector) = place(number);
            let is_in_time = |at: u64| at <= call.called_at || at < newest;
            let is_due = |timed: &&Timed| !timed.may_be_lost && timed.answered_at.is_some_and(is_in_time);
            let due = self.live[block].timed.iter().rev().find(is_due).map_or(0, |timed| timed.sequence);
            let mut those = self.timed_like(block, sector, bytes);
            if !those.any(|timed| timed.sequence >= due && timed.sent_at <= returned_at) {
                let allowed = format!("write {due} or a later one that was sent before the copy was there");
                return Err(Violation { block, sector, found: describe_sector(bytes), allowed });
            }
        }
        Ok(())
    }

    /// The writes that leave a sector as it was found.
    fn timed_like<'a>(
        &'a self,
        block: usize,
        sector: usize,
        found: &'a [u8],
    ) -> impl Iterator<Item = &'a Timed> {
        self.live[block].timed.iter().filter(move |timed| match timed.pattern {
            Pattern::Zeroes => found.iter().all(|&byte| byte == 0),
            Pattern::Stamped => found == stamped_sector(self.seed, block, sector, timed.sequence),
        })
    }

    fn check_read_sector(
        &self,
        block: usize,
        sector: usize,
        shown: &Shown,
        found: &[u8],
    ) -> Result<(), Violation> {
        let live = &self.live[block];
        let place = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
        let (from, seen) = match shown {
            Shown::From(from) => {
                (*from, live.base.as_ref().filter(|base| base.0 == *from).map(|base| &base.1))
            }
            Shown::Seen(after, bytes) => (after + 1, Some(bytes)),
        };
        let is_seen = seen.is_some_and(|bytes| found == &bytes[place]);
        let of_write = |(sequence, pattern): &&(u64, Pattern)| match pattern {
            _ if *sequence < from => false,
            Pattern::Zeroes => found.iter().all(|&byte| byte == 0),
            Pattern::Stamped => found == stamped_sector(self.seed, block, sector, *sequence),
        };
        if is_seen || live.writes.iter().rev().any(|write| of_write(&write)) {
            return Ok(());
        }
        let mut allowed: Vec<String> = seen.map(|_| "what was read before".to_owned()).into_iter().collect();
        let writes = live.writes.iter().filter(|(sequence, _)| *sequence >= from);
        allowed.extend(writes.map(|(sequence, pattern)| format!("write {sequence} ({pattern:?})")));
        Err(Violation { block, sector, found: describe_sector(found), allowed: allowed.join(", ") })
    }

    /// Notes a FLUSH that is about to be sent.
    pub fn send_flush(&self) -> SentFlush {
        SentFlush { answers_before: self.answers }
    }

    /// Notes that a FLUSH was answered without an error.
    pub fn flush_answered(&mut self, flush: SentFlush) {
        for versions in &mut self.blocks {
            let covered =
                |version: &Version| version.answer.is_some_and(|answer| answer <= flush.answers_before);
            if let Some(newest_covered) = versions.iter().rposition(covered) {
                versions.drain(..newest_covered);
            }
        }
    }

    /// Checks what is on stable storage in all blocks.
    ///
    /// # Errors
    /// Names the first sector that holds what it may not.
    ///
    /// # Panics
    /// `found` is not as long as the blocks.
    pub fn check_stable(&self, found: &[u8]) -> Result<(), Violation> {
        assert_eq!(found.len(), self.blocks.len() * BLOCK_BYTES, "what was found");
        for (block, bytes) in found.chunks(BLOCK_BYTES).enumerate() {
            for (sector, bytes) in bytes.chunks(SECTOR_BYTES).enumerate() {
                self.check_sector(block, sector, bytes)?;
            }
        }
        Ok(())
    }

    /// Checks what was found in a range of blocks, and takes it as the pinned contents from now on.
    ///
    /// # Errors
    /// Names the first sector that holds what it may not.
    ///
    /// # Panics
    /// `found` is not as long as the blocks.
    pub fn check_and_adopt(&mut self, blocks: Blocks, found: &[u8]) -> Result<(), Violation> {
        assert_eq!(found.len(), blocks.length_bytes() as usize, "what was found of {blocks:?}");
        for (block, bytes) in blocks.numbers().zip(found.chunks(BLOCK_BYTES)) {
            for (sector, bytes) in bytes.chunks(SECTOR_BYTES).enumerate() {
                self.check_sector(block, sector, bytes)?;
            }
            let (sequence, answer) = (self.sequence, Some(self.answers));
            let content = Content::Found(bytes.into());
            self.blocks[block] = vec![Version { sequence, content, answer, has_failed: false }];
            self.live[block].base = Some((sequence, bytes.into()));
            self.live[block].shown = Shown::Seen(sequence, bytes.into());
        }
        Ok(())
    }

    fn check_sector(&self, block: usize, sector: usize, found: &[u8]) -> Result<(), Violation> {
        let versions = &self.blocks[block];
        let matches = |version: &Version| match &version.content {
            Content::Pattern(Pattern::Zeroes) => found.iter().all(|&byte| byte == 0),
            Content::Pattern(Pattern::Stamped) => {
                found == stamped_sector(self.seed, block, sector, version.sequence)
            }
            Content::Found(bytes) => found == &bytes[sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES],
        };
        if versions.iter().any(matches) {
            return Ok(());
        }
        let allowed: Vec<String> = versions.iter().map(Version::describe).collect();
        Err(Violation { block, sector, found: describe_sector(found), allowed: allowed.join(", ") })
    }
}

impl Live {
    fn shown_from(&self, sequence: u64) -> Shown {
        match &self.base {
            Some((base, bytes)) if *base == sequence => Shown::Seen(sequence, Arc::clone(bytes)),
            _ => Shown::From(sequence),
        }
    }
}

impl Version {
    fn describe(&self) -> String {
        let answered = match self.answer {
            Some(_) => "answered",
            None if self.has_failed => "failed",
            None => "in flight",
        };
        match &self.content {
            Content::Pattern(pattern) => format!("write {} ({pattern:?}, {answered})", self.sequence),
            Content::Found(_) => "what the last power cut left".to_owned(),
        }
    }
}

/// A sector that says whose it is, in its first 40 bytes; the rest follows from those, so every byte is checked.
fn stamped_sector(seed: u64, block: usize, sector: usize, sequence: u64) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    let words = [SECTOR_MAGIC, seed, block as u64, sector as u64, sequence];
    let mixed = words.iter().fold(0, |mixed: u64, &word| mixed.rotate_left(23).wrapping_add(word));
    for (to, word) in bytes.chunks_mut(8).zip(words) {
        to.copy_from_slice(&word.to_be_bytes());
    }
    fastrand::Rng::with_seed(mixed).fill(&mut bytes[words.len() * 8..]);
    bytes
}

/// What a sector says of itself; for the report only.
fn describe_sector(bytes: &[u8]) -> String {
    let words: Vec<u64> = bytes
        .chunks_exact(8)
        .take(5)
        .map(|word| word.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
        .collect();
    match words[..] {
        _ if bytes.iter().all(|&byte| byte == 0) => "zeroes".to_owned(),
        [SECTOR_MAGIC, seed, block, sector, sequence] => {
            let whole = stamped_sector(seed, block as usize, sector as usize, sequence) == bytes;
            let rest = if whole { "" } else { ", but the rest of the sector does not belong to it" };
            format!("write {sequence} of block {block}, sector {sector}, seed {seed}{rest}")
        }
        _ => format!("garbage beginning with {:02x?}", &bytes[..16]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Blocks = Blocks { first: 0, count: 1 };
    const BOTH: Blocks = Blocks { first: 0, count: 2 };

    fn history() -> BlockHistory {
        BlockHistory::new(7, 2)
    }

    fn refused(history: &mut BlockHistory, found: &[u8]) -> String {
        history.check_and_adopt(ONE, found).unwrap_err().to_string()
    }

    #[test]
    fn an_unflushed_write_may_be_there_torn_or_not_at_all() {
        for kept_sectors in 0..=8 {
            let mut history = history();
            let (write, payload) = history.send_write(ONE, Pattern::Stamped);
            history.write_answered(write, false);
            let mut found = vec![0; BLOCK_BYTES];
            found[..kept_sectors * 512].copy_from_slice(&payload[..kept_sectors * 512]);
            history.check_and_adopt(ONE, &found).unwrap();
        }
    }

    #[test]
    fn a_write_answered_with_fua_must_be_there() {
        let mut history = history();
        let (write, payload) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(write, true);
        let text = refused(&mut history, &[0; BLOCK_BYTES]);
        assert!(text.contains("block 0, sector 0: found zeroes; allowed: write 1"), "{text}");
        let mut torn = payload.clone();
        torn[BLOCK_BYTES - 512..].fill(0);
        assert!(refused(&mut history, &torn).contains("sector 7"));
        history.check_and_adopt(ONE, &payload).unwrap();
    }

    #[test]
    fn a_flush_pins_what_was_answered_before_it_was_sent_and_no_more() {
        let mut history = history();
        let (first, first_payload) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(first, false);
        let flush = history.send_flush();
        let (second, second_payload) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(second, false);
        history.flush_answered(flush);
        assert!(refused(&mut history, &[0; BLOCK_BYTES]).contains("found zeroes"));
        let mut mixed = first_payload;
        mixed[512..1024].copy_from_slice(&second_payload[512..1024]);
        history.check_and_adopt(ONE, &mixed).unwrap();
    }

    #[test]
    fn an_unanswered_flush_pins_nothing() {
        let mut history = history();
        let (write, _) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(write, false);
        history.send_flush();
        history.check_and_adopt(ONE, &[0; BLOCK_BYTES]).unwrap();
    }

    #[test]
    fn a_write_in_flight_may_be_there_and_a_pinned_older_one_may_not() {
        let mut history = history();
        let (old, old_payload) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(old, true);
        let (zeroes, empty) = history.send_write(ONE, Pattern::Zeroes);
        assert!(empty.is_empty());
        history.write_answered(zeroes, true);
        let (_, new_payload) = history.send_write(ONE, Pattern::Stamped);
        assert!(!history.is_idle(BOTH));
        assert!(refused(&mut history, &old_payload).contains("found write 1 of block 0"));
        let mut found = new_payload;
        found[..512].fill(0);
        history.check_and_adopt(ONE, &found).unwrap();
    }

    #[test]
    fn another_blocks_contents_and_garbage_are_refused() {
        let mut history = history();
        let (_, payload) = history.send_write(BOTH, Pattern::Stamped);
        assert!(refused(&mut history, &payload[BLOCK_BYTES..]).contains("found write 1 of block 1"));
        assert!(refused(&mut history, &[0x55; BLOCK_BYTES]).contains("garbage"));
        let mut damaged = payload;
        damaged[511] ^= 1;
        assert!(refused(&mut history, &damaged[..BLOCK_BYTES]).contains("does not belong to it"));
    }

    #[test]
    fn a_flush_that_failed_ends_the_claim_on_what_was_answered_before_it_and_on_nothing_else() {
        let mut history = history();
        let (first, _) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(first, false);
        let failed = history.send_flush();
        let (other, payload) = history.send_write(Blocks { first: 1, count: 1 }, Pattern::Stamped);
        history.write_answered(other, false);
        history.flush_failed(failed);
        let succeeded = history.send_flush();
        history.flush_answered(succeeded);
        let mut found = vec![0; 2 * BLOCK_BYTES];
        let text = history.check_stable(&found).unwrap_err().to_string();
        assert!(text.contains("block 1"), "of the first nobody was promised anything: {text}");
        found[BLOCK_BYTES..].copy_from_slice(&payload);
        history.check_stable(&found).unwrap();
    }

    #[test]
    fn what_may_have_been_forgotten_may_be_read_as_it_was_before() {
        let mut history = history();
        let (write, payload) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(write, false);
        read(&mut history, &[0; BLOCK_BYTES]).unwrap_err();
        history.may_have_forgotten();
        read(&mut history, &[0; BLOCK_BYTES]).unwrap();
        read(&mut history, &payload).unwrap_err();
    }

    fn read(history: &mut BlockHistory, found: &[u8]) -> Result<(), Violation> {
        let read = history.send_read(ONE);
        history.read_answered(&read, found)
    }

    #[test]
    fn a_stale_read_is_noticed() {
        let mut history = history();
        let (old, old_payload) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(old, false);
        let before = history.send_read(ONE);
        let (new, new_payload) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(new, false);
        history.read_answered(&before, &old_payload).unwrap();
        history.read_answered(&before, &new_payload).unwrap();
        let text = read(&mut history, &old_payload).unwrap_err().to_string();
        assert!(text.contains("found write 1 of block 0") && text.contains("allowed: write 2"), "{text}");
        read(&mut history, &new_payload).unwrap();
    }

    #[test]
    fn a_write_that_was_answered_too_early_is_noticed() {
        let mut history = history();
        let (write, _) = history.send_write(ONE, Pattern::Stamped);
        read(&mut history, &[0; BLOCK_BYTES]).unwrap();
        history.write_answered(write, false);
        assert!(read(&mut history, &[0; BLOCK_BYTES]).is_err());
    }

    #[test]
    fn a_write_that_failed_may_be_there_or_not_but_does_not_come_later() {
        for is_there in [false, true] {
            let mut history = history();
            let (write, payload) = history.send_write(ONE, Pattern::Stamped);
            history.write_failed(write);
            assert!(history.is_idle(ONE));
            let (first, second) =
                if is_there { (payload, vec![0; BLOCK_BYTES]) } else { (vec![0; BLOCK_BYTES], payload) };
            read(&mut history, &first).unwrap();
            read(&mut history, &first).unwrap();
            let text = read(&mut history, &second).unwrap_err().to_string();
            assert!(text.contains("what was read before"), "{text}");
        }
    }

    #[test]
    fn what_a_volume_forgot_may_be_read_again_as_it_was() {
        let mut history = history();
        let (write, payload) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(write, false);
        read(&mut history, &payload).unwrap();
        history.lost_power();
        assert!(read(&mut history, &[0; BLOCK_BYTES]).is_err(), "nothing that was answered is lost");
        history.forgot();
        read(&mut history, &[0; BLOCK_BYTES]).unwrap();
        assert!(read(&mut history, &payload).is_err(), "it is gone");
    }

    #[test]
    fn what_was_found_once_has_to_stay() {
        let mut history = history();
        let (_, payload) = history.send_write(ONE, Pattern::Stamped);
        let mut torn = payload.clone();
        torn[..512].fill(0);
        history.check_and_adopt(ONE, &torn).unwrap();
        assert!(refused(&mut history, &payload).contains("what the last power cut left"));
    }

    #[test]
    fn a_copy_is_of_one_instant_of_its_call() {
        let mut history = history();
        let (old, old_payload) = history.send_write(ONE, Pattern::Stamped);
        history.write_answered(old, false);
        let call = history.call_copy();
        let second = Blocks { first: 1, count: 1 };
        let (other, other_payload) = history.send_write(second, Pattern::Stamped);
        let returned_at = history.now();
        history.write_answered(other, false);
        let (_, late_payload) = history.send_write(ONE, Pattern::Stamped);
        let zeroes = vec![0; BLOCK_BYTES];
        let check = |first: &[u8], second: &[u8]| {
            history
                .check_copy(call, returned_at, &[first, second].concat())
                .map_err(|error| error.to_string())
        };
        check(&old_payload, &zeroes).unwrap();
        check(&old_payload, &other_payload).unwrap();
        assert!(check(&zeroes, &zeroes).unwrap_err().contains("found zeroes"), "answered before");
        assert!(check(&late_payload, &other_payload).unwrap_err().contains("write 3"), "sent after");
        // Sent while the call was under way, and after something that is not in.
        let returned_at = history.now();
        let copy = [late_payload, zeroes].concat();
        let error = history.check_copy(call, returned_at, &copy).unwrap_err().to_string();
        assert!(error.contains("allowed: write 2"), "{error}");
        history.lost_power();
        history.check_copy(call, returned_at, &vec![0; 2 * BLOCK_BYTES]).unwrap();
    }
}
