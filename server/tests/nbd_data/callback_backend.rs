//! A backend that completes by call-back: every operation ends on a thread of its own, late, out of order, and at times in part.
//!
//! Its volumes outlive their closing, as those of a storage cluster would. A test can hold its writes, make its syncs fail and have
//! it drop what it was given.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use proto::nbd::block_status::ExtentState;
use server::backend::callback::{CallbackBackend, CallbackOpener, Operation};
use server::backend::{Allocation, VolumeOp};
use uuid::Uuid;

use super::{Random, seed};

/// What is written takes up whole blocks of this size.
const BLOCK_BYTES: u64 = 4096;

/// Where the bytes are that were written, by block number.
type Blocks = BTreeMap<u64, Box<[u8]>>;

/// What a test wants of the volumes of its server, and sees of them.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    /// Nothing that writes is begun.
    pub(crate) holds_writes: bool,
    /// Syncs fail with this errno.
    pub(crate) sync_errno: Option<i32>,
    /// So many operations are dropped, not ended.
    pub(crate) drops: u32,
    /// Operations that were submitted and have not ended.
    pub(crate) in_flight: usize,
    /// Syncs that worked.
    pub(crate) syncs: u64,
    /// Transfers that were ended in part, or interrupted.
    pub(crate) continued: u64,
    /// Operations that ended before one that had been submitted earlier.
    pub(crate) overtaken: u64,
}

/// The storage cluster that a test's server talks to.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    volumes: Mutex<HashMap<Uuid, Arc<Mutex<Blocks>>>>,
    wishes: Mutex<Wishes>,
    changed: Condvar,
}

impl Cluster {
    /// For [`server::data::config::DataServerConfig::opener`].
    pub(crate) fn opener(self: &Arc<Self>) -> CallbackOpener {
        let cluster = Arc::clone(self);
        CallbackOpener::new(move |volume_uid, capacity_bytes| {
            let blocks = Arc::clone(cluster.volumes.lock().unwrap().entry(volume_uid).or_default());
            Ok(Box::new(Volume::open(&cluster, blocks, capacity_bytes)))
        })
    }

    pub(crate) fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.wishes.lock().unwrap()
    }

    /// Changes what is wanted.
    pub(crate) fn wish(&self, change: impl FnOnce(&mut Wishes)) {
        change(&mut self.wishes());
        self.changed.notify_all();
    }

    pub(crate) fn allocated_bytes(&self, volume_uid: Uuid) -> u64 {
        let volumes = self.volumes.lock().unwrap();
        volumes.get(&volume_uid).map_or(0, |blocks| blocks.lock().unwrap().len() as u64 * BLOCK_BYTES)
    }
}

#[derive(Debug)]
struct Submitted {
    /// The how manieth of its volume.
    number: u64,
    operation: Operation,
    /// It came when writes were held. Then it is done in full: its client may be gone by then, and nobody continues it.
    is_held: bool,
}

#[derive(Debug, Default)]
struct Queue {
    operations: Vec<Submitted>,
    submitted: u64,
    is_closed: bool,
}

#[derive(Debug)]
struct Shared {
    cluster: Arc<Cluster>,
    queue: Mutex<Queue>,
    blocks: Arc<Mutex<Blocks>>,
    capacity_bytes: u64,
}

/// An open volume; its thread ends some time after it was dropped.
#[derive(Debug)]
struct Volume(Arc<Shared>);

impl Volume {
    fn open(cluster: &Arc<Cluster>, blocks: Arc<Mutex<Blocks>>, capacity_bytes: u64) -> Self {
        let (cluster, queue) = (Arc::clone(cluster), Mutex::default());
        let shared = Arc::new(Shared { cluster, queue, blocks, capacity_bytes });
        let own = Arc::clone(&shared);
        let seed = seed();
        std::thread::Builder::new().name("call-back".into()).spawn(move || own.work(seed)).unwrap();
        Self(shared)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let mut queue = self.0.queue.lock().unwrap();
        assert!(queue.operations.is_empty(), "closed with operations in flight");
        queue.is_closed = true;
        drop(queue);
        self.0.cluster.wish(|_| {});
    }
}

impl CallbackBackend for Volume {
    fn submit(&self, operation: Operation) {
        self.0.cluster.wish(|wishes| {
            wishes.in_flight += 1;
            let mut queue = self.0.queue.lock().unwrap();
            queue.submitted += 1;
            let (number, is_held) = (queue.submitted, wishes.holds_writes && is_writing(operation.op()));
            queue.operations.push(Submitted { number, operation, is_held });
        });
    }

    fn extents(&self, range: Range<u64>, tell: &mut dyn FnMut(u64, ExtentState) -> bool) -> io::Result<()> {
        let written: Vec<u64> = {
            let blocks = self.0.blocks.lock().unwrap();
            let touched = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
            blocks.range(touched).map(|(block, _)| block * BLOCK_BYTES).collect()
        };
        let mut at = range.start;
        for start in written {
            let goes_on = start <= at || tell(start - at, ExtentState::HOLE);
            let begin = start.max(at);
            at = start + BLOCK_BYTES;
            if !(goes_on && tell(at - begin, ExtentState::DATA)) {
                return Ok(());
            }
        }
        if at < range.end {
            tell(range.end - at, ExtentState::HOLE);
        }
        Ok(())
    }

    fn describe(&self) -> &'static str {
        "call-back"
    }
}

fn is_writing(op: VolumeOp) -> bool {
    matches!(op, VolumeOp::Write { .. } | VolumeOp::WriteZeroes { .. } | VolumeOp::Allocate { .. })
}

impl Shared {
    /// Does operations until the volume is closed.
    fn work(&self, seed: u64) {
        let mut random = Random::new(seed);
        while let Some(submitted) = self.next(&mut random) {
            if random.below(8) == 0 {
                std::thread::sleep(Duration::from_micros(random.below(300)));
            }
            self.end(submitted, &mut random);
        }
    }

    /// Any of those that are there.
    fn next(&self, random: &mut Random) -> Option<Submitted> {
        let mut wishes = self.cluster.wishes();
        loop {
            let mut queue = self.queue.lock().unwrap();
            let may_begin = |(_, submitted): &(usize, &Submitted)| {
                !(wishes.holds_writes && is_writing(submitted.operation.op()))
            };
            let ready: Vec<usize> =
                queue.operations.iter().enumerate().filter(may_begin).map(|(at, _)| at).collect();
            if !ready.is_empty() {
                let at = ready[random.below(ready.len() as u64) as usize];
                let submitted = queue.operations.swap_remove(at);
                let is_first = queue.operations.iter().all(|other| submitted.number < other.number);
                wishes.overtaken += u64::from(!is_first);
                return Some(submitted);
            }
            if queue.is_closed {
                return None;
            }
            drop(queue);
            wishes = self.cluster.changed.wait(wishes).unwrap();
        }
    }

    fn end(&self, Submitted { mut operation, is_held, .. }: Submitted, random: &mut Random) {
        let is_dropped = {
            let mut wishes = self.cluster.wishes();
            wishes.in_flight -= 1;
            let is_dropped = wishes.drops > 0;
            wishes.drops -= u32::from(is_dropped);
            is_dropped
        };
        if is_dropped {
            return drop(operation);
        }
        let result = self.perform(&mut operation, is_held, random);
        operation.finish(result);
    }

    fn perform(&self, operation: &mut Operation, is_held: bool, random: &mut Random) -> i32 {
        let op = operation.op();
        if !is_held
            && matches!(op, VolumeOp::Read { .. } | VolumeOp::Write { .. } | VolumeOp::Sync { .. })
            && random.below(50) == 0
        {
            self.cluster.wishes().continued += 1;
            return -libc::EINTR;
        }
        match op {
            VolumeOp::Read { offset_bytes, length_bytes, .. } => {
                let count = self.part(length_bytes, random);
                self.read(offset_bytes, &mut operation.data_mut()[..count as usize]);
                count as i32
            }
            VolumeOp::Write { offset_bytes, length_bytes, durable, .. } => {
                assert!(!durable, "a durable write is a write and a sync here");
                let count = if is_held { length_bytes } else { self.part(length_bytes, random) };
                self.write(offset_bytes, &operation.data()[..count as usize]);
                count as i32
            }
            VolumeOp::WriteZeroes { offset_bytes, length_bytes } => {
                self.write(offset_bytes, &vec![0; length_bytes as usize]);
                length_bytes as i32
            }
            VolumeOp::Sync { .. } => {
                let mut wishes = self.cluster.wishes();
                match wishes.sync_errno {
                    Some(errno) => -errno,
                    None => {
                        wishes.syncs += 1;
                        0
                    }
                }
            }
            VolumeOp::Allocate { mode: Allocation::Punch, offset_bytes, length_bytes } => {
                self.punch(offset_bytes..offset_bytes + length_bytes);
                0
            }
            VolumeOp::Allocate { .. } | VolumeOp::Prefetch { .. } => -libc::EOPNOTSUPP,
        }
    }

    /// All of it, or at times less: so many whole blocks, because what is ended in part may be mixed with what overlaps it.
    fn part(&self, length_bytes: u32, random: &mut Random) -> u32 {
        let blocks = u64::from(length_bytes) / BLOCK_BYTES;
        if blocks < 2 || random.below(16) != 0 {
            return length_bytes;
        }
        self.cluster.wishes().continued += 1;
        (BLOCK_BYTES * (1 + random.below(blocks - 1))) as u32
    }

    /// The parts of a range that are in one block each: its number, where in it, and where in the range.
    fn parts(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
        assert!(range.end <= self.capacity_bytes, "{range:?} is outside of the volume");
        (range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)).map(move |block| {
            let start = range.start.max(block * BLOCK_BYTES);
            let end = range.end.min((block + 1) * BLOCK_BYTES);
            let inside = (start - block * BLOCK_BYTES) as usize..(end - block * BLOCK_BYTES) as usize;
            (block, inside, (start - range.start) as usize..(end - range.start) as usize)
        })
    }

    fn read(&self, offset_bytes: u64, data: &mut [u8]) {
        let blocks = self.blocks.lock().unwrap();
        for (block, inside, at) in self.parts(offset_bytes..offset_bytes + data.len() as u64) {
            match blocks.get(&block) {
                Some(bytes) => data[at].copy_from_slice(&bytes[inside]),
                None => data[at].fill(0),
            }
        }
    }

    fn write(&self, offset_bytes: u64, data: &[u8]) {
        let mut blocks = self.blocks.lock().unwrap();
        for (block, inside, at) in self.parts(offset_bytes..offset_bytes + data.len() as u64) {
            let bytes = blocks.entry(block).or_insert_with(|| vec![0; BLOCK_BYTES as usize].into());
            bytes[inside].copy_from_slice(&data[at]);
        }
    }

    fn punch(&self, range: Range<u64>) {
        let mut blocks = self.blocks.lock().unwrap();
        let whole = range.start.next_multiple_of(BLOCK_BYTES)..range.end / BLOCK_BYTES * BLOCK_BYTES;
        if whole.start < whole.end {
            let mut rest = blocks.split_off(&(whole.start / BLOCK_BYTES));
            blocks.append(&mut rest.split_off(&(whole.end / BLOCK_BYTES)));
        }
        for edge in [range.start..whole.start.min(range.end), whole.end.max(range.start)..range.end] {
            for (block, inside, _) in self.parts(edge) {
                if let Some(bytes) = blocks.get_mut(&block) {
                    bytes[inside].fill(0);
                }
            }
        }
    }
}
