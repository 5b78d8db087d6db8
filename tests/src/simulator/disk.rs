//! The simulated disk with the kernel in front of it: operations that outlive the process that asked for them, a cache,
//! and a power cut that keeps what was synced and of the rest what it likes.
//!
//! Sectors are written one by one, so that an operation can be caught half way. Between the cache and stable storage the
//! kernel writes back whatever it wants at any time.

use std::rc::Rc;

use fastrand::Rng;
use server::session::SlotId;

use crate::lying_disk::SECTOR_BYTES;

type Sector = Rc<[u8; SECTOR_BYTES]>;

/// Whose operation it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    /// Which server process.
    pub(super) process: u64,
    /// Which of its connections.
    pub(super) connection: u32,
    /// Which request of that.
    pub(super) slot: SlotId,
}

/// What is to be done.
#[derive(Debug)]
pub(super) enum Work {
    Read {
        offset_bytes: usize,
        into: Vec<u8>,
        is_stale: bool,
    },
    Write {
        offset_bytes: usize,
        bytes: Vec<u8>,
    },
    Zero {
        offset_bytes: usize,
        length_bytes: usize,
    },
    /// What was in the cache when it began.
    Sync {
        cached: Vec<(u64, Sector)>,
    },
}

#[derive(Debug)]
struct Operation {
    owner: Owner,
    work: Work,
    done_bytes: usize,
    /// So many steps it takes its time.
    idle_steps: u32,
}

/// An operation that has ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) owner: Owner,
    /// Bytes, 0, or a negative errno.
    pub(super) result: i32,
    /// What was read.
    pub(super) read: Vec<u8>,
    /// It was a sync.
    pub(super) is_sync: bool,
}

#[derive(Debug)]
pub(super) struct Disk {
    /// Contents, each with the number of the change that made it.
    cached: Vec<(u64, Sector)>,
    stable: Vec<(u64, Sector)>,
    changes: u64,
    operations: Vec<Operation>,
    /// The next sync fails, and what it should have covered may be lost.
    pub(super) fails_next_sync: bool,
}

impl Disk {
    pub(super) fn new(capacity_bytes: usize) -> Self {
        let zeroes = (0, Rc::new([0; SECTOR_BYTES]));
        let sectors = vec![zeroes; capacity_bytes / SECTOR_BYTES];
        let stable = sectors.clone();
        Self { cached: sectors, stable, changes: 0, operations: Vec::new(), fails_next_sync: false }
    }

    pub(super) fn begin_sync(&mut self, owner: Owner, rng: &mut Rng) {
        let cached = self.cached.clone();
        self.begin(owner, Work::Sync { cached }, rng);
    }

    /// Most operations are quick; some take long enough for much to happen meanwhile.
    pub(super) fn begin(&mut self, owner: Owner, work: Work, rng: &mut Rng) {
        let idle_steps = if rng.u8(..12) == 0 { rng.u32(..300) } else { 0 };
        self.operations.push(Operation { owner, work, done_bytes: 0, idle_steps });
    }

    /// How many operations are under way.
    pub(super) fn operations(&self) -> usize {
        self.operations.len()
    }

    /// Whether another process's operations are under way.
    pub(super) fn has_predecessors(&self, process: u64) -> bool {
        self.operations.iter().any(|operation| operation.owner.process != process)
    }

    /// Goes on with an operation; gives it back when it has ended.
    pub(super) fn step(&mut self, rng: &mut Rng) -> Option<Ended> {
        if self.operations.is_empty() {
            return None;
        }
        let index = rng.usize(..self.operations.len());
        let idle_steps = &mut self.operations[index].idle_steps;
        if *idle_steps > 0 {
            *idle_steps -= 1;
            return None;
        }
        let is_hurried = rng.u8(..4) > 0;
        loop {
            if self.step_sector(index) {
                let operation = self.operations.swap_remove(index);
                return Some(self.end(operation));
            }
            if !is_hurried && rng.bool() {
                return None;
            }
        }
    }

    /// True: the operation is done.
    fn step_sector(&mut self, index: usize) -> bool {
        let Operation { work, done_bytes, .. } = &mut self.operations[index];
        let (offset_bytes, length_bytes) = match work {
            Work::Read { offset_bytes, into, .. } => (*offset_bytes, into.len()),
            Work::Write { offset_bytes, bytes } => (*offset_bytes, bytes.len()),
            Work::Zero { offset_bytes, length_bytes } => (*offset_bytes, *length_bytes),
            Work::Sync { .. } => return true,
        };
        if *done_bytes < length_bytes {
            let sector = (offset_bytes + *done_bytes) / SECTOR_BYTES;
            let place = *done_bytes..*done_bytes + SECTOR_BYTES;
            match work {
                Work::Read { into, is_stale, .. } => {
                    let from = if *is_stale { &self.stable } else { &self.cached };
                    into[place].copy_from_slice(&*from[sector].1);
                }
                Work::Write { bytes, .. } => {
                    let mut content = [0; SECTOR_BYTES];
                    content.copy_from_slice(&bytes[place]);
                    self.changes += 1;
                    self.cached[sector] = (self.changes, Rc::new(content));
                }
                _ => {
                    self.changes += 1;
                    self.cached[sector] = (self.changes, Rc::new([0; SECTOR_BYTES]));
                }
            }
            *done_bytes += SECTOR_BYTES;
        }
        *done_bytes >= length_bytes
    }

    fn end(&mut self, operation: Operation) -> Ended {
        let Operation { owner, work, done_bytes, .. } = operation;
        let (mut result, mut read, mut is_sync) = (done_bytes as i32, Vec::new(), false);
        match work {
            Work::Read { into, .. } => read = into,
            Work::Write { .. } => {}
            Work::Zero { .. } => result = 0,
            Work::Sync { cached } => {
                (is_sync, result) = (true, 0);
                if std::mem::take(&mut self.fails_next_sync) {
                    result = -libc_eio();
                } else {
                    for (stable, cached) in self.stable.iter_mut().zip(cached) {
                        if stable.0 < cached.0 {
                            *stable = cached;
                        }
                    }
                }
            }
        }
        Ended { owner, result, read, is_sync }
    }

    /// The kernel writes a sector back on its own.
    pub(super) fn write_back(&mut self, rng: &mut Rng) {
        let sector = rng.usize(..self.cached.len());
        self.stable[sector] = self.cached[sector].clone();
    }

    /// A process died: what it had asked for is done nevertheless, or was not begun and never will be.
    pub(super) fn process_died(&mut self, process: u64, rng: &mut Rng) {
        self.operations.retain(|operation| operation.owner.process != process || rng.bool());
    }

    /// The machine lost power, or a failed sync its pages: what is not stable is there or not, sector by sector.
    pub(super) fn forget(&mut self, rng: &mut Rng) {
        for (cached, stable) in self.cached.iter_mut().zip(&mut self.stable) {
            if rng.bool() {
                *stable = cached.clone();
            } else {
                *cached = stable.clone();
            }
        }
    }

    /// Loses power with operations under way.
    pub(super) fn power_cut(&mut self, rng: &mut Rng) {
        for index in 0..self.operations.len() {
            while rng.bool() && !self.step_sector(index) {}
        }
        self.operations.clear();
        self.fails_next_sync = false;
        self.forget(rng);
    }

    /// Everything that can be read.
    pub(super) fn contents(&self) -> Vec<u8> {
        self.cached.iter().flat_map(|(_, sector)| sector.iter().copied()).collect()
    }
}

/// `EIO`.
fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}
