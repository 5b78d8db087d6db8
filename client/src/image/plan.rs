//! What is copied next, what is on its way, and how far everything is copied: one pass over an image.
//!
//! I/O-free: [`Plan::next_step`] says what to do, and is told what came of it. Chunks are begun in order and end in any order; what
//! counts as copied is what lies before the first chunk that has not ended. That, and nothing behind it, goes into the
//! journal, once the destination has made it durable.
//! Driven by `copy.rs`.

use std::collections::{BTreeMap, VecDeque};

use crate::image::CHUNK_BYTES;
use crate::image::content::{Digest, zero_digest};

/// Chunks on their way at one time: bounds the memory, and covers a network's round trip (16 MiB at 10 Gbit/s are 13 ms).
pub const IN_FLIGHT_MAX: usize = 16;
/// Chunks of zeroes in one step: a compact request's length has 32 bits.
const ZERO_CHUNKS_MAX: u64 = 1 << 10;
/// How far ahead the source is asked what it has, in bytes.
const LOOK_BYTES_MAX: u64 = 1 << 30;

/// Some bytes of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// How many, not 0.
    pub length_bytes: u64,
    /// All of them read as zeroes.
    pub is_zero: bool,
}

/// So many chunks of one digest, one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// How many, not 0.
    pub count: u64,
    /// Of each.
    pub digest: Digest,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Ask the source what it has there, as far as it wants to tell; then [`Plan::found`].
    Look {
        /// From here on.
        offset_bytes: u64,
        /// Not 0.
        length_bytes: u64,
    },
    /// Copy one chunk; then [`Plan::ended`].
    Copy {
        /// Its number.
        chunk: u64,
    },
    /// These chunks are zeroes; then [`Plan::ended`].
    Zeroes {
        /// The number of the first.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Something has to end first.
    Wait,
    /// Every chunk has ended.
    Finished,
}

/// One pass over an image.
#[derive(Debug)]
pub struct Plan {
    size_bytes: u64,
    next_chunk: u64,
    /// What the source has behind the chunks that were begun, as far as is known.
    known: VecDeque<Run>,
    is_looking: bool,
    steps_in_flight: usize,
    /// Every chunk before this one has ended.
    ended_to: u64,
    /// What ended behind that, by its first chunk.
    ahead: BTreeMap<u64, Vec<Piece>>,
    /// What ended before it and is in no journal yet.
    unrecorded: Vec<Piece>,
}

impl Plan {
    /// Of an image of so many bytes, of which the first chunks are copied already.
    pub fn new(size_bytes: u64, chunks_done: u64) -> Self {
        let chunks_done = chunks_done.min(size_bytes.div_ceil(CHUNK_BYTES));
        Self {
            size_bytes,
            next_chunk: chunks_done,
            known: VecDeque::new(),
            is_looking: false,
            steps_in_flight: 0,
            ended_to: chunks_done,
            ahead: BTreeMap::new(),
            unrecorded: Vec::new(),
        }
    }

    /// What to do next. What is answered but for `Wait` and `Finished` is on its way from then on.
    pub fn next_step(&mut self) -> Step {
        if self.next_chunk == self.chunk_count() {
            return if self.steps_in_flight == 0 { Step::Finished } else { Step::Wait };
        }
        if self.steps_in_flight == IN_FLIGHT_MAX || self.is_looking {
            return Step::Wait;
        }
        let zero_chunks = self.zero_chunks_ahead();
        let known_bytes: u64 = self.known.iter().map(|run| run.length_bytes).sum();
        let step = if zero_chunks > 0 {
            Step::Zeroes { first: self.next_chunk, count: zero_chunks }
        } else if known_bytes < self.chunk_bytes(self.next_chunk) {
            self.is_looking = true;
            let offset_bytes = self.next_chunk * CHUNK_BYTES + known_bytes;
            let length_bytes = (self.size_bytes - offset_bytes).min(LOOK_BYTES_MAX);
            return Step::Look { offset_bytes, length_bytes };
        } else {
            Step::Copy { chunk: self.next_chunk }
        };
        let count = zero_chunks.max(1);
        let end = (self.next_chunk + count) * CHUNK_BYTES;
        self.forget_known(end.min(self.size_bytes) - self.next_chunk * CHUNK_BYTES);
        self.next_chunk += count;
        self.steps_in_flight += 1;
        step
    }

    /// What a look found, in order; what goes beyond the image is ignored.
    ///
    /// # Panics
    /// Unless something was found: a source that tells nothing is the caller's to refuse.
    pub fn found(&mut self, runs: &[Run]) {
        assert!(runs.iter().any(|run| run.length_bytes > 0), "a look found nothing");
        self.is_looking = false;
        for run in runs.iter().filter(|run| run.length_bytes > 0) {
            match self.known.back_mut() {
                Some(last) if last.is_zero == run.is_zero => {
                    last.length_bytes = last.length_bytes.saturating_add(run.length_bytes);
                }
                _ => self.known.push_back(*run),
            }
        }
    }

    /// A step has ended: that of these chunks, from `first` on.
    pub fn ended(&mut self, first: u64, pieces: Vec<Piece>) {
        self.steps_in_flight -= 1;
        self.ahead.insert(first, pieces);
        while let Some(pieces) = self.ahead.remove(&self.ended_to) {
            for piece in pieces {
                self.ended_to += piece.count;
                match self.unrecorded.last_mut() {
                    Some(last) if last.digest == piece.digest => last.count += piece.count,
                    _ => self.unrecorded.push(piece),
                }
            }
        }
    }

    /// What has ended, in order, and was not taken yet. For the journal, once the destination has been flushed after this call.
    pub fn take_unrecorded(&mut self) -> Vec<Piece> {
        std::mem::take(&mut self.unrecorded)
    }

    /// Whether [`Plan::take_unrecorded`] would give anything.
    pub fn has_unrecorded(&self) -> bool {
        !self.unrecorded.is_empty()
    }

    /// Bytes before the first chunk that has not ended.
    pub fn ended_bytes(&self) -> u64 {
        (self.ended_to * CHUNK_BYTES).min(self.size_bytes)
    }

    /// Bytes of a chunk; the last may be shorter.
    pub fn chunk_bytes(&self, chunk: u64) -> u64 {
        (self.size_bytes - chunk * CHUNK_BYTES).min(CHUNK_BYTES)
    }

    /// What `count` chunks of zeroes are, from `first` on.
    pub fn zero_pieces(&self, first: u64, count: u64) -> Vec<Piece> {
        let last_bytes = self.chunk_bytes(first + count - 1);
        let whole = if last_bytes == CHUNK_BYTES { count } else { count - 1 };
        let mut pieces = Vec::new();
        if whole > 0 {
            pieces.push(Piece { count: whole, digest: zero_digest(CHUNK_BYTES) });
        }
        if whole < count {
            pieces.push(Piece { count: 1, digest: zero_digest(last_bytes) });
        }
        pieces
    }

    fn chunk_count(&self) -> u64 {
        self.size_bytes.div_ceil(CHUNK_BYTES)
    }

    /// Chunks from the next one on that are known to be zeroes.
    fn zero_chunks_ahead(&self) -> u64 {
        let Some(run) = self.known.front().filter(|run| run.is_zero) else { return 0 };
        let offset_bytes = self.next_chunk * CHUNK_BYTES;
        let reaches_end = offset_bytes.saturating_add(run.length_bytes) >= self.size_bytes;
        let chunks =
            if reaches_end { self.chunk_count() - self.next_chunk } else { run.length_bytes / CHUNK_BYTES };
        chunks.min(ZERO_CHUNKS_MAX)
    }

    fn forget_known(&mut self, mut length_bytes: u64) {
        while let Some(run) = self.known.front_mut().filter(|_| length_bytes > 0) {
            let taken = run.length_bytes.min(length_bytes);
            run.length_bytes -= taken;
            length_bytes -= taken;
            if run.length_bytes == 0 {
                self.known.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = CHUNK_BYTES;

    fn data(length_bytes: u64) -> Run {
        Run { length_bytes, is_zero: false }
    }

    fn zero(length_bytes: u64) -> Run {
        Run { length_bytes, is_zero: true }
    }

    #[test]
    fn holes_are_skipped_and_chunks_with_some_data_are_copied() {
        let size = 10 * MIB + 5;
        let mut plan = Plan::new(size, 0);
        assert_eq!(plan.next_step(), Step::Look { offset_bytes: 0, length_bytes: size });
        assert_eq!(plan.next_step(), Step::Wait, "one look at a time");
        plan.found(&[zero(3 * MIB + 7), data(MIB), zero(6 * MIB)]);
        assert_eq!(plan.next_step(), Step::Zeroes { first: 0, count: 3 });
        assert_eq!(plan.next_step(), Step::Copy { chunk: 3 });
        assert_eq!(plan.next_step(), Step::Copy { chunk: 4 });
        assert_eq!(plan.next_step(), Step::Zeroes { first: 5, count: 6 }, "the last chunk has 5 bytes");
        assert_eq!(plan.next_step(), Step::Wait);
        plan.ended(5, plan.zero_pieces(5, 6));
        assert_eq!((plan.ended_bytes(), plan.has_unrecorded()), (0, false), "what lies before has not ended");
        plan.ended(0, plan.zero_pieces(0, 3));
        assert_eq!(plan.ended_bytes(), 3 * MIB);
        assert_eq!(plan.take_unrecorded(), [Piece { count: 3, digest: zero_digest(MIB) }]);
        let copied = Piece { count: 1, digest: [7; 32] };
        plan.ended(4, vec![copied]);
        plan.ended(3, vec![copied]);
        assert_eq!(plan.next_step(), Step::Finished);
        assert_eq!(plan.ended_bytes(), size);
        let rest = [
            Piece { count: 2, digest: [7; 32] },
            Piece { count: 5, digest: zero_digest(MIB) },
            Piece { count: 1, digest: zero_digest(5) },
        ];
        assert_eq!(plan.take_unrecorded(), rest);
    }

    #[test]
    fn a_pass_goes_on_where_another_stopped_and_an_image_without_bytes_is_done() {
        let mut plan = Plan::new(4 * MIB, 3);
        assert_eq!(plan.ended_bytes(), 3 * MIB);
        assert_eq!(plan.next_step(), Step::Look { offset_bytes: 3 * MIB, length_bytes: MIB });
        plan.found(&[data(MIB / 2)]);
        let rest = Step::Look { offset_bytes: 3 * MIB + MIB / 2, length_bytes: MIB / 2 };
        assert_eq!(plan.next_step(), rest, "it told less than it was asked");
        plan.found(&[zero(9 * MIB)]);
        assert_eq!(plan.next_step(), Step::Copy { chunk: 3 });
        assert_eq!(Plan::new(0, 0).next_step(), Step::Finished);
        assert_eq!(Plan::new(4 * MIB, 400).next_step(), Step::Finished);
    }

    #[test]
    fn memory_is_bounded_and_every_chunk_is_handed_out_once() {
        let mut random = fastrand::Rng::with_seed(11);
        for _ in 0..200 {
            let size = random.u64(1..300 * MIB);
            let mut plan = Plan::new(size, 0);
            let mut in_flight: Vec<(u64, Vec<Piece>)> = Vec::new();
            let mut next = 0;
            loop {
                let step = plan.next_step();
                match step {
                    Step::Look { length_bytes, .. } => {
                        let told = random.u64(1..=length_bytes);
                        plan.found(&[Run { length_bytes: told, is_zero: random.bool() }]);
                    }
                    Step::Copy { chunk } => {
                        assert_eq!(chunk, next);
                        next += 1;
                        in_flight.push((chunk, vec![Piece { count: 1, digest: [9; 32] }]));
                    }
                    Step::Zeroes { first, count } => {
                        assert_eq!(first, next);
                        next += count;
                        in_flight.push((first, plan.zero_pieces(first, count)));
                    }
                    Step::Wait => {
                        let (first, pieces) = in_flight.swap_remove(random.usize(..in_flight.len()));
                        plan.ended(first, pieces);
                    }
                    Step::Finished => break,
                }
                assert!(in_flight.len() <= IN_FLIGHT_MAX);
            }
            assert_eq!(plan.ended_bytes(), size);
            let recorded: u64 = plan.take_unrecorded().iter().map(|piece| piece.count).sum();
            assert_eq!((recorded, next), (size.div_ceil(MIB), size.div_ceil(MIB)));
        }
    }
}
