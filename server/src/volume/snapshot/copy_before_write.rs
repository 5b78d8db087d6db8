//! Copy before write: a change to a piece of a volume waits until that piece is in the copies that are being made.
//!
//! Owns: which pieces are copied, which requests wait for which, and what is copied next. Never: does I/O or reads a clock; the copier
//! (`copier.rs`) and the rings do as they are told here, and so does the simulator.
//! Called by: `data/io/session_io.rs` before each operation ([`CopyBeforeWrite::holds`]), `copier.rs` ([`CopyPlan`]).
//!
//! The instant of a copy is when every source of it holds: [`CopyPlan::begin`] has each of them hold, and only who has the plan
//! can copy. No ring is asked and none has to answer, because every ring looks at the same flag:
//! - What was answered before the call had landed when the first piece was copied, so it is in.
//! - What begins after the call finds the flag, and waits until its piece is copied, so it is not in.
//! - If an operation W is in, it did not find the flag of its volume, so that was not set yet. Whatever was answered before W began
//!   was answered before all flags were set, and therefore before the first piece was copied: it is in, on every volume of the call.
//! - An operation that had begun and was not answered is in, or is not, or a part of it: as after a power cut.
//!
//! Invariants: a piece is marked when it is in the copy, and never before; a held request is named once to be let go, when all of
//! its pieces are copied or the copy has ended; every operation is asked for anew, also the second one of a request.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;

use crate::backend::VolumeOp;
use crate::ids::{ConnectionId, RequestSlot};

/// The unit in which changes wait. A file of 4 KiB extents has at most 64 of them in it: XFS then takes about a millisecond.
pub const PIECE_BYTES: u64 = 256 << 10;

/// A request whose next operation waits for a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldRequest {
    /// The ring that has it.
    pub ring: usize,
    /// Its connection.
    pub connection: ConnectionId,
    /// Its slot there.
    pub slot: RequestSlot,
}

#[derive(Debug)]
struct Waiter {
    request: HeldRequest,
    pieces: Range<u64>,
}

#[derive(Debug, Default)]
struct Waiting {
    requests: VecDeque<Waiter>,
    /// Nothing waits any more.
    is_over: bool,
}

/// Which pieces of a source are in its copy.
#[derive(Debug)]
pub struct PieceMap {
    capacity_bytes: u64,
    piece_bytes: u64,
    copied: Box<[AtomicU64]>,
    left: AtomicU64,
    waiting: Mutex<Waiting>,
    /// Woken when a request begins to wait.
    copier: OnceLock<Thread>,
}

impl PieceMap {
    /// Of a source of so many bytes, of which nothing is copied.
    pub fn new(capacity_bytes: u64, piece_bytes: u64) -> Self {
        let pieces = capacity_bytes.div_ceil(piece_bytes);
        Self {
            capacity_bytes,
            piece_bytes,
            copied: (0..pieces.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            left: AtomicU64::new(pieces),
            waiting: Mutex::default(),
            copier: OnceLock::new(),
        }
    }

    /// Whether every piece is copied.
    pub fn is_complete(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    /// Whether a change of these bytes has to wait; then it is named when it has not to any more.
    fn holds(&self, bytes: &Range<u64>, request: HeldRequest) -> bool {
        let pieces = self.pieces_of(bytes);
        if self.first_left(pieces.clone()).is_none() {
            return false;
        }
        let mut waiting = self.waiting();
        // Looked at once more: who marks a piece looks for those that wait after that.
        if waiting.is_over || self.first_left(pieces.clone()).is_none() {
            return false;
        }
        waiting.requests.push_back(Waiter { request, pieces });
        drop(waiting);
        self.copier.get().inspect(|copier| copier.unpark());
        true
    }

    /// These bytes are in the copy: whole pieces, or up to the end. Gives the requests that waited for the last of them.
    fn copied(&self, bytes: &Range<u64>) -> Vec<HeldRequest> {
        let pieces = bytes.start.div_ceil(self.piece_bytes)..self.pieces_of(bytes).end;
        let mut marked = 0;
        for piece in pieces {
            let bit = 1 << (piece % 64);
            let before = self.copied[(piece / 64) as usize].fetch_or(bit, Ordering::AcqRel);
            marked += u64::from(before & bit == 0);
        }
        self.left.fetch_sub(marked, Ordering::AcqRel);
        let mut waiting = self.waiting();
        let mut free = Vec::new();
        waiting.requests.retain(|waiter| {
            let is_held = self.first_left(waiter.pieces.clone()).is_some();
            if !is_held {
                free.push(waiter.request);
            }
            is_held
        });
        free
    }

    /// The bytes that a request waits for, at most about `reach_bytes` of them; each time those of another request, so that a small
    /// change does not wait behind a large one.
    fn wanted(&self, mut reach: impl FnMut(u64) -> u64) -> Option<Range<u64>> {
        let mut waiting = self.waiting();
        let has_others = waiting.requests.len() > 1;
        waiting.requests.rotate_left(usize::from(has_others));
        let waiter = waiting.requests.back()?;
        let first = self.first_left(waiter.pieces.clone())?;
        let end = waiter.pieces.end;
        drop(waiting);
        Some(self.run_from(first, end, reach(first * self.piece_bytes)))
    }

    /// The bytes from this piece on that are not copied, at most about `reach_bytes` of them.
    fn next_from(&self, piece: u64, mut reach: impl FnMut(u64) -> u64) -> Option<Range<u64>> {
        let first = self.first_left(piece..self.pieces())?;
        Some(self.run_from(first, self.pieces(), reach(first * self.piece_bytes)))
    }

    fn run_from(&self, first: u64, end: u64, reach_bytes: u64) -> Range<u64> {
        let most = (reach_bytes / self.piece_bytes).max(1);
        let mut last = first + 1;
        while last < end && last - first < most && !self.is_copied(last) {
            last += 1;
        }
        first * self.piece_bytes..(last * self.piece_bytes).min(self.capacity_bytes)
    }

    /// No request waits any more; gives those that did.
    fn end(&self) -> Vec<HeldRequest> {
        let mut waiting = self.waiting();
        waiting.is_over = true;
        waiting.requests.drain(..).map(|waiter| waiter.request).collect()
    }

    fn pieces(&self) -> u64 {
        self.capacity_bytes.div_ceil(self.piece_bytes)
    }

    /// The pieces that have any of these bytes. What is beyond the copy's end is in none.
    fn pieces_of(&self, bytes: &Range<u64>) -> Range<u64> {
        let end = bytes.end.min(self.capacity_bytes).div_ceil(self.piece_bytes);
        (bytes.start / self.piece_bytes).min(end)..end
    }

    fn is_copied(&self, piece: u64) -> bool {
        self.copied[(piece / 64) as usize].load(Ordering::Acquire) & 1 << (piece % 64) != 0
    }

    fn first_left(&self, pieces: Range<u64>) -> Option<u64> {
        let mut piece = pieces.start;
        while piece < pieces.end {
            let left = !self.copied[(piece / 64) as usize].load(Ordering::Acquire) >> (piece % 64);
            if left != 0 {
                piece += u64::from(left.trailing_zeros());
                return (piece < pieces.end).then_some(piece);
            }
            piece = (piece / 64 + 1) * 64;
        }
        None
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What stands before every operation of a volume: nothing, or the map of a copy that is being made.
#[derive(Debug, Default)]
pub struct CopyBeforeWrite {
    is_on: AtomicBool,
    map: Mutex<Option<Arc<PieceMap>>>,
}

impl CopyBeforeWrite {
    /// Whether the operation has to wait. Then the request is named by the copy's [`CopyPlan`] when it may be tried again.
    #[inline]
    pub fn holds(&self, op: &VolumeOp, request: HeldRequest) -> bool {
        self.is_on.load(Ordering::Acquire) && self.map_holds(op, request)
    }

    #[cold]
    fn map_holds(&self, op: &VolumeOp, request: HeldRequest) -> bool {
        let Some(bytes) = op.changes() else { return false };
        let map = self.map().clone();
        map.is_some_and(|map| map.holds(&bytes, request))
    }

    fn begin(&self, map: &Arc<PieceMap>) -> bool {
        let mut current = self.map();
        if current.is_some() {
            return false;
        }
        *current = Some(Arc::clone(map));
        self.is_on.store(true, Ordering::SeqCst);
        true
    }

    /// The copy of this map has ended, or has all of this source: nothing waits any more. Gives the requests that did. Where it
    /// ended before, another may be being made, and goes on.
    #[must_use = "they would wait for ever"]
    pub fn end(&self, map: &PieceMap) -> Vec<HeldRequest> {
        let mut current = self.map();
        if current.as_ref().is_none_or(|current| !std::ptr::eq(&raw const **current, map)) {
            return Vec::new();
        }
        self.is_on.store(false, Ordering::Release);
        *current = None;
        map.end()
    }

    fn map(&self) -> MutexGuard<'_, Option<Arc<PieceMap>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something that is to be copied now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Of which source, by its place in the call.
    pub source: usize,
    /// Which bytes of it.
    pub bytes: Range<u64>,
}

/// Another copy of a source is being made, and it can be copied once at a time.
#[derive(Debug)]
pub struct AlreadyCopied {
    /// Which source, by its place in the call.
    pub source: usize,
    /// Requests that have waited for a moment and are to be let go.
    pub free: Vec<HeldRequest>,
}

/// What is copied in which order. Who has one may copy: the instant is over.
#[derive(Debug)]
pub struct CopyPlan {
    maps: Vec<Arc<PieceMap>>,
    /// Where the walk through all pieces is.
    walked: usize,
    cursor_bytes: u64,
    /// Whose waiting requests were looked at last.
    asked: usize,
}

impl CopyPlan {
    /// Has all sources hold what would change them: the instant. A source that nobody changes has nothing to hold with.
    ///
    /// # Errors
    /// [`AlreadyCopied`]; none of them holds any more.
    pub fn begin(sources: &[(Option<&CopyBeforeWrite>, Arc<PieceMap>)]) -> Result<Self, AlreadyCopied> {
        for (source, (hold, map)) in sources.iter().enumerate() {
            if hold.is_some_and(|hold| !hold.begin(map)) {
                let begun = sources[..source].iter().filter_map(|(hold, map)| Some((*hold)?.end(map)));
                return Err(AlreadyCopied { source, free: begun.flatten().collect() });
            }
        }
        // Every flag is there for all processors to see before the first piece is read.
        fence(Ordering::SeqCst);
        let maps = sources.iter().map(|(_, map)| Arc::clone(map)).collect();
        Ok(Self { maps, walked: 0, cursor_bytes: 0, asked: 0 })
    }

    /// This thread copies: it is woken when a request begins to wait.
    pub fn copied_by(&self, thread: &Thread) {
        self.maps.iter().for_each(|map| drop(map.copier.set(thread.clone())));
    }

    /// Whether a request waits.
    pub fn is_waited_for(&self) -> bool {
        self.maps.iter().any(|map| !map.waiting().requests.is_empty())
    }

    /// What is to be copied now: what a request waits for, or else the next that is not copied. `reach` says how many bytes of a
    /// source may be copied in one go from an offset on. `None`: everything is copied.
    pub fn next(&mut self, mut reach: impl FnMut(usize, u64) -> u64) -> Option<Step> {
        for _ in 0..self.maps.len() {
            self.asked = (self.asked + 1) % self.maps.len();
            let source = self.asked;
            if let Some(bytes) = self.maps[source].wanted(|offset| reach(source, offset)) {
                return Some(Step { source, bytes });
            }
        }
        while let Some(map) = self.maps.get(self.walked) {
            let (source, piece) = (self.walked, self.cursor_bytes / map.piece_bytes);
            if let Some(bytes) = map.next_from(piece, |offset| reach(source, offset)) {
                self.cursor_bytes = bytes.start;
                return Some(Step { source, bytes });
            }
            (self.walked, self.cursor_bytes) = (self.walked + 1, 0);
        }
        None
    }

    /// The step is done. Gives the requests that may be tried again.
    #[must_use = "they would wait for ever"]
    pub fn copied(&mut self, step: &Step) -> Vec<HeldRequest> {
        self.maps[step.source].copied(&step.bytes)
    }

    /// Whether all of a source is copied.
    pub fn is_complete(&self, source: usize) -> bool {
        self.maps[source].is_complete()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Allocation;

    const PIECE: u64 = 4096;

    fn request(number: u8) -> HeldRequest {
        HeldRequest { ring: 0, connection: ConnectionId(1), slot: RequestSlot(number) }
    }

    fn write(offset_bytes: u64, length_bytes: u32) -> VolumeOp {
        VolumeOp::Write { offset_bytes, length_bytes, buffer_offset_bytes: 0, durable: false }
    }

    fn map(pieces: u64) -> Arc<PieceMap> {
        Arc::new(PieceMap::new(pieces * PIECE, PIECE))
    }

    fn begin(hold: &CopyBeforeWrite, pieces: u64) -> CopyPlan {
        CopyPlan::begin(&[(Some(hold), map(pieces))]).unwrap()
    }

    fn end(hold: &CopyBeforeWrite, plan: &CopyPlan, source: usize) -> Vec<HeldRequest> {
        hold.end(&plan.maps[source])
    }

    fn next(plan: &mut CopyPlan) -> Option<Step> {
        plan.next(|_, _| PIECE)
    }

    fn step(source: usize, pieces: Range<u64>) -> Step {
        Step { source, bytes: pieces.start * PIECE..pieces.end * PIECE }
    }

    #[test]
    fn a_change_waits_for_its_pieces_and_they_come_first() {
        let hold = CopyBeforeWrite::default();
        assert!(!hold.holds(&write(0, 4096), request(0)), "no copy");
        let mut plan = begin(&hold, 200);
        assert_eq!(next(&mut plan), Some(step(0, 0..1)));
        assert!(hold.holds(&write(150 * PIECE + 512, 4096), request(1)), "of two pieces");
        assert!(!hold.holds(&VolumeOp::Sync { metadata: true }, request(9)));
        let read = VolumeOp::Read { offset_bytes: 0, length_bytes: 512, buffer_offset_bytes: 0 };
        assert!(!hold.holds(&read, request(9)));
        assert_eq!(plan.copied(&step(0, 0..1)), []);
        assert!(!hold.holds(&write(0, 4096), request(2)), "its piece is copied");
        assert_eq!(next(&mut plan), Some(step(0, 150..151)));
        assert_eq!(plan.copied(&step(0, 150..151)), []);
        assert!(hold.holds(&write(150 * PIECE, 8192), request(1)), "the other is not");
        assert_eq!(next(&mut plan), Some(step(0, 151..152)));
        assert_eq!(plan.copied(&step(0, 151..152)), [request(1), request(1)]);
        assert_eq!(next(&mut plan), Some(step(0, 1..2)), "and the walk goes on");
    }

    #[test]
    fn a_small_change_does_not_wait_behind_a_large_one() {
        let hold = CopyBeforeWrite::default();
        let mut plan = begin(&hold, 1000);
        let (mode, length_bytes) = (Allocation::Punch, 1000 * PIECE);
        assert!(hold.holds(&VolumeOp::Allocate { mode, offset_bytes: 0, length_bytes }, request(1)));
        assert!(hold.holds(&write(900 * PIECE, 512), request(2)));
        let (first, second) = (next(&mut plan).unwrap(), next(&mut plan).unwrap());
        assert!([&first, &second].contains(&&step(0, 900..901)), "{first:?} {second:?}");
        assert_eq!(plan.copied(&step(0, 900..901)), [request(2)]);
        let mut free = Vec::new();
        while let Some(step) = plan.next(|_, _| 16 * PIECE) {
            free.extend(plan.copied(&step));
        }
        assert_eq!(free, [request(1)], "when all of its pieces are copied");
        assert!(plan.is_complete(0));
    }

    #[test]
    fn whoever_waits_is_let_go_when_a_copy_ends() {
        let hold = CopyBeforeWrite::default();
        let plan = begin(&hold, 4);
        assert!(hold.holds(&write(0, 512), request(1)));
        assert_eq!(end(&hold, &plan, 0), [request(1)]);
        assert!(!hold.holds(&write(0, 512), request(1)));
        begin(&hold, 4);
        assert_eq!(end(&hold, &plan, 0), [], "it ended before");
        assert!(hold.holds(&write(0, 512), request(1)), "another has begun, and goes on");
    }

    #[test]
    fn the_instant_is_of_all_sources_or_of_none() {
        let (first, second) = (CopyBeforeWrite::default(), CopyBeforeWrite::default());
        let other = begin(&second, 4);
        let refused = CopyPlan::begin(&[(Some(&first), map(4)), (Some(&second), map(4))]).unwrap_err();
        assert_eq!(refused.source, 1);
        assert!(!first.holds(&write(0, 512), request(1)));
        assert!(second.holds(&write(0, 512), request(1)), "the other copy goes on");
        assert_eq!(end(&second, &other, 0), [request(1)]);
        let mut plan =
            CopyPlan::begin(&[(Some(&first), map(2)), (None, map(1)), (Some(&second), map(1))]).unwrap();
        assert!(second.holds(&write(0, 512), request(2)));
        let mut order = Vec::new();
        while let Some(step) = next(&mut plan) {
            let _ = plan.copied(&step);
            order.push(step);
        }
        assert_eq!(order, [step(2, 0..1), step(0, 0..1), step(0, 1..2), step(1, 0..1)]);
    }

    #[test]
    fn the_end_of_a_volume_need_not_be_that_of_a_piece() {
        let hold = CopyBeforeWrite::default();
        let map = Arc::new(PieceMap::new(PIECE + 512, PIECE));
        let mut plan = CopyPlan::begin(&[(Some(&hold), map)]).unwrap();
        assert!(!hold.holds(&write(2 * PIECE, 512), request(1)), "grown since");
        let whole = plan.next(|_, _| 1 << 20).unwrap();
        assert_eq!(whole.bytes, 0..PIECE + 512);
        assert!(hold.holds(&write(PIECE, 1024), request(1)));
        assert_eq!(plan.copied(&whole), [request(1)]);
        assert!(plan.is_complete(0) && next(&mut plan).is_none());
    }

    #[test]
    fn every_request_that_waits_is_let_go_whatever_the_order() {
        let hold = Arc::new(CopyBeforeWrite::default());
        let mut plan = begin(&hold, 64 << 10);
        let (sender, held) = std::sync::mpsc::channel();
        let ring = {
            let hold = Arc::clone(&hold);
            std::thread::spawn(move || {
                for number in 0..20_000u64 {
                    let piece = number.wrapping_mul(0x9e37_79b9) % (64 << 10);
                    let request = HeldRequest { connection: ConnectionId(number), ..request(0) };
                    if hold.holds(&write(piece * PIECE, 4096), request) {
                        sender.send(request).unwrap();
                    }
                }
            })
        };
        let mut free = Vec::new();
        while let Some(step) = plan.next(|_, _| 4 * PIECE) {
            free.extend(plan.copied(&step));
        }
        ring.join().unwrap();
        assert_eq!(end(&hold, &plan, 0), []);
        let mut held: Vec<u64> = held.iter().map(|request| request.connection.0).collect();
        let mut free: Vec<u64> = free.iter().map(|request| request.connection.0).collect();
        held.sort_unstable();
        free.sort_unstable();
        assert_eq!(held, free);
    }
}
