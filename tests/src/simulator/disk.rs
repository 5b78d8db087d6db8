//! The simulated disk with the kernel in front of it: operations that outlive the process that asked for them, a cache,
//! and a power cut that keeps what was synced and of the rest what it likes.
//!
//! Sectors are written one by one, so that an operation can be caught half way. Between the cache and stable storage the
//! kernel writes back whatever it wants at any time. What it fails to write back stays in the cache, clean, until it is evicted;
//! who has the file open is told once, by a sync, and who comes later may never be: the inode forgets, and the file system has told
//! somebody else.

use server::ids::RequestSlot;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use fastrand::Rng;

use crate::lying_disk::SECTOR_BYTES;

/// Who has the source of a copy synced; no connection.
pub(super) const COPIER: u32 = u32::MAX;
/// The control side's own descriptors are told apart from the volumes' by this.
pub(super) const CONTROL: u64 = 1 << 32;

type Sector = Rc<[u8; SECTOR_BYTES]>;

/// Whose operation it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    /// Which server process.
    pub(super) process: u64,
    /// Which of its connections.
    pub(super) connection: u32,
    /// Which request of that.
    pub(super) slot: RequestSlot,
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
    /// Sectors that could not be written back: the cache has the new ones, and thinks that stable storage has them too.
    lost: Vec<bool>,
    /// Write-backs that failed, as the inode counts them (`errseq_t`).
    errors: u64,
    /// Nobody has been told of the last of them, by the inode.
    is_unseen: bool,
    /// Nobody has been told of it by the file system.
    is_unseen_in_superblock: bool,
    /// How many each process that has the file open has been told of; on a description of its own if it copies the volume.
    told: BTreeMap<(u64, bool), u64>,
    /// Raised by each mount.
    pub(super) superblock: u64,
    /// Until when no sync ends.
    pub(super) slow_until: Option<Instant>,
    /// How often what was lost was taken out of the cache by a server.
    pub(super) drops: u64,
}

impl Disk {
    pub(super) fn new(capacity_bytes: usize) -> Self {
        let zeroes = (0, Rc::new([0; SECTOR_BYTES]));
        let sectors = vec![zeroes; capacity_bytes / SECTOR_BYTES];
        let stable = sectors.clone();
        Self {
            lost: vec![false; sectors.len()],
            cached: sectors,
            stable,
            changes: 0,
            operations: Vec::new(),
            fails_next_sync: false,
            errors: 0,
            is_unseen: false,
            is_unseen_in_superblock: false,
            told: BTreeMap::new(),
            superblock: 1,
            slow_until: None,
            drops: 0,
        }
    }

    /// A process opens the file: an error that nobody was told of is for it.
    pub(super) fn opened(&mut self, process: u64) {
        self.opened_on((process, false));
    }

    /// The same, to copy it.
    pub(super) fn opened_to_copy(&mut self, process: u64) {
        self.opened_on((process, true));
    }

    pub(super) fn closed_copied(&mut self, process: u64) {
        self.told.remove(&(process, true));
    }

    fn opened_on(&mut self, description: (u64, bool)) {
        let since = self.errors - u64::from(self.is_unseen);
        self.told.insert(description, since);
    }

    /// What is in the cache of a range: what a copy of it shares.
    pub(super) fn share(&self, bytes: std::ops::Range<usize>) -> Vec<u8> {
        let sectors = bytes.start / SECTOR_BYTES..bytes.end / SECTOR_BYTES;
        self.cached[sectors].iter().flat_map(|(_, sector)| sector.iter().copied()).collect()
    }

    /// A process closes it.
    pub(super) fn closed(&mut self, process: u64) {
        self.told.remove(&(process, false));
    }

    /// Whether the cache has nothing that could not be written back.
    pub(super) fn is_whole(&self) -> bool {
        !self.lost.contains(&true)
    }

    /// When the file was last written to.
    pub(super) fn modified(&self) -> String {
        self.changes.to_string()
    }

    /// `syncfs` on a new descriptor: whether the file system failed to write something back, and nobody was told.
    pub(super) fn sync_file_system(&mut self) -> bool {
        for index in 0..self.cached.len() {
            if !self.lost[index] {
                self.stable[index] = self.cached[index].clone();
            }
        }
        !std::mem::take(&mut self.is_unseen_in_superblock)
    }

    /// The kernel fails to write some of what is dirty back.
    pub(super) fn fail_write_back(&mut self, rng: &mut Rng) {
        for index in 0..self.cached.len() {
            self.lost[index] |= self.stable[index].0 < self.cached[index].0 && rng.bool();
        }
        self.errors += 1;
        (self.is_unseen, self.is_unseen_in_superblock) = (true, true);
    }

    /// Pages that the kernel takes for clean leave the cache; the inode goes with the last of them, if nobody has it open. True:
    /// something is read otherwise now.
    pub(super) fn evict(&mut self) -> bool {
        let mut is_other = false;
        for index in 0..self.cached.len() {
            if std::mem::take(&mut self.lost[index]) {
                self.cached[index] = self.stable[index].clone();
                is_other = true;
            }
        }
        if self.told.is_empty() {
            self.is_unseen = false;
        }
        is_other
    }

    /// Whether every process that has the file open was told of every failure to write back.
    pub(super) fn is_told(&self) -> bool {
        self.told.values().all(|told| *told == self.errors)
    }

    /// `fdatasync`, whatever it says, and then nothing is cached any more.
    pub(super) fn drop_cache(&mut self) {
        self.sync_file_system();
        self.drops += u64::from(self.evict());
    }

    /// The file system is unmounted by force, and mounted again.
    pub(super) fn remount(&mut self, rng: &mut Rng) {
        self.superblock += 1;
        self.forget(rng);
        (self.is_unseen, self.is_unseen_in_superblock) = (false, false);
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

    /// Whether any of them can go on now.
    pub(super) fn can_go_on(&self, now: Instant) -> bool {
        self.operations.iter().any(|operation| !self.is_held(operation, now))
    }

    fn is_held(&self, operation: &Operation, now: Instant) -> bool {
        matches!(operation.work, Work::Sync { .. }) && self.slow_until.is_some_and(|until| now < until)
    }

    /// Whether another process's operations are under way.
    pub(super) fn has_predecessors(&self, process: u64) -> bool {
        self.operations.iter().any(|operation| operation.owner.process % CONTROL != process)
    }

    /// Goes on with an operation; gives it back when it has ended.
    pub(super) fn step(&mut self, now: Instant, rng: &mut Rng) -> Option<Ended> {
        if self.operations.is_empty() {
            return None;
        }
        let index = rng.usize(..self.operations.len());
        if self.is_held(&self.operations[index], now) {
            return None;
        }
        let idle_steps = &mut self.operations[index].idle_steps;
        if *idle_steps > 0 {
            *idle_steps -= 1;
            return None;
        }
        let is_hurried = rng.u8(..4) > 0;
        loop {
            if self.step_sector(index) {
                let operation = self.operations.swap_remove(index);
                return Some(self.end(operation, rng));
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
                    self.lost[sector] = false;
                }
                _ => {
                    self.changes += 1;
                    self.cached[sector] = (self.changes, Rc::new([0; SECTOR_BYTES]));
                    self.lost[sector] = false;
                }
            }
            *done_bytes += SECTOR_BYTES;
        }
        *done_bytes >= length_bytes
    }

    fn end(&mut self, operation: Operation, rng: &mut Rng) -> Ended {
        let Operation { owner, work, done_bytes, .. } = operation;
        let (mut result, mut read, mut is_sync) = (done_bytes as i32, Vec::new(), false);
        match work {
            Work::Read { into, .. } => read = into,
            Work::Write { .. } => {}
            Work::Zero { .. } => result = 0,
            Work::Sync { cached } => {
                (is_sync, result) = (true, 0);
                if std::mem::take(&mut self.fails_next_sync) {
                    self.fail_write_back(rng);
                }
                for (index, cached) in cached.into_iter().enumerate() {
                    // What the cache has let go of meanwhile is nowhere any more.
                    let is_cached = self.cached[index].0 >= cached.0 && !self.lost[index];
                    if self.stable[index].0 < cached.0 && is_cached {
                        self.stable[index] = cached;
                    }
                }
                let description = (owner.process, owner.connection == COPIER);
                if let Some(told) = self.told.get_mut(&description)
                    && *told < self.errors
                {
                    *told = self.errors;
                    self.is_unseen = false;
                    result = -libc_eio();
                }
            }
        }
        Ended { owner, result, read, is_sync }
    }

    /// The kernel writes a sector back on its own.
    pub(super) fn write_back(&mut self, rng: &mut Rng) {
        let sector = rng.usize(..self.cached.len());
        if !self.lost[sector] {
            self.stable[sector] = self.cached[sector].clone();
        }
    }

    /// A process died: what it had asked for is done nevertheless, or was not begun and never will be.
    pub(super) fn process_died(&mut self, process: u64, rng: &mut Rng) {
        self.operations.retain(|operation| operation.owner.process != process || rng.bool());
        self.told.retain(|(other, _), _| *other != process);
    }

    /// The machine lost power, or a failed sync its pages: what is not stable is there or not, sector by sector.
    pub(super) fn forget(&mut self, rng: &mut Rng) {
        for ((cached, stable), lost) in self.cached.iter_mut().zip(&mut self.stable).zip(&mut self.lost) {
            if rng.bool() && !std::mem::take(lost) {
                *stable = cached.clone();
            } else {
                *cached = stable.clone();
            }
            *lost = false;
        }
    }

    /// Loses power with operations under way.
    pub(super) fn power_cut(&mut self, rng: &mut Rng) {
        for index in 0..self.operations.len() {
            while rng.bool() && !self.step_sector(index) {}
        }
        self.operations.clear();
        self.told.clear();
        self.superblock += 1;
        (self.fails_next_sync, self.is_unseen, self.is_unseen_in_superblock) = (false, false, false);
        self.forget(rng);
    }

    /// Everything that can be read.
    pub(super) fn contents(&self) -> Vec<u8> {
        let mut contents = Vec::with_capacity(self.cached.len() * SECTOR_BYTES);
        self.cached.iter().for_each(|(_, sector)| contents.extend_from_slice(&**sector));
        contents
    }
}

/// `EIO`.
fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}
