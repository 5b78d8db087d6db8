//! The thread that makes the copies of one call.
//!
//! Owns: the open files of sources and copies while it runs, and how much is copied at once (`Pace`). Never: decides which piece is
//! next or who waits (`copy_before_write.rs` does), or makes a change to a volume fail.
//! Called by: `data/copies.rs`, which starts it.
//! Invariants: however it ends, nobody waits any more, and the copies are all durable or all gone; an error of the source's sync is
//! told as that of a client's, because a description that was opened before the instant hears of every write-back that failed since.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::SeekFrom;
use tracing::{info, warn};
use uuid::Uuid;

use super::copy_before_write::{CopyPlan, HeldRequest, PIECE_BYTES, PieceMap, Step};
use super::files::{CopyFiles, failed};
use crate::backend::reflink;
use crate::descriptors::Taken;
use crate::volume::Volume;
use crate::volume::copying::{CopyError, CopyReport, CopyTarget};

/// Most that is shared in one go where it is quick, because there are few extents: a request may wait for one of them. 4 MiB of 4 KiB
/// extents, which may follow, take XFS some 13 ms.
const RUN_BYTES_MAX: u64 = 4 << 20;
/// Most of a hole at once. It is shared as well, and not passed over: what landed there meanwhile, or is on its way from the page
/// cache, is copied, whatever the file system says of holes.
const HOLE_BYTES_MAX: u64 = 16 << 20;
/// Within this, more is shared at once the next time; beyond the other, less.
const QUICK: Duration = Duration::from_micros(300);
const SLOW: Duration = Duration::from_millis(1);

/// After a request was let go it has the file to itself for so long, unless another one waits: the kernel gives the file's lock to who
/// takes it again and again, and lets others wait for milliseconds.
const REST_AFTER_REQUEST: Duration = Duration::from_micros(500);
/// After other steps the same holds for as long as the step took, at most for this.
const REST_MAX: Duration = Duration::from_millis(2);

/// Lets requests go on that waited.
pub type LetGo = Arc<dyn Fn(Vec<HeldRequest>) + Send + Sync>;

/// A source with its copy.
pub struct Source {
    /// Served, and so to be held; `None`: nobody writes to it.
    pub volume: Option<HeldVolume>,
    /// To be copied.
    pub from: File,
    /// Its size in bytes.
    pub capacity_bytes: u64,
    /// The copy.
    pub to: File,
    /// What the copy is.
    pub target: CopyTarget,
    /// The copy's size in bytes, at least the source's.
    pub target_bytes: u64,
}

/// A volume that is being copied: kept open, and let go of however the copy ends.
pub struct HeldVolume {
    volume: Option<Arc<Volume>>,
    map: Arc<PieceMap>,
    let_go: LetGo,
    on_end: Box<dyn Fn(Uuid) + Send>,
}

impl HeldVolume {
    /// One that is open, and is to be copied whole; `on_end` hears when it is let go of.
    pub fn new(
        volume: Arc<Volume>,
        capacity_bytes: u64,
        let_go: LetGo,
        on_end: impl Fn(Uuid) + Send + 'static,
    ) -> Self {
        let map = Arc::new(PieceMap::new(capacity_bytes, PIECE_BYTES));
        Self { volume: Some(volume), map, let_go, on_end: Box::new(on_end) }
    }

    /// What is copied of it.
    pub fn map(&self) -> &Arc<PieceMap> {
        &self.map
    }

    /// The volume, unless it was let go of.
    pub fn volume(&self) -> Option<&Arc<Volume>> {
        self.volume.as_ref()
    }

    /// All of it is copied, or the copy is given up: its requests go on.
    pub fn release(&self) {
        if let Some(volume) = &self.volume {
            (self.let_go)(volume.copy_before_write().end(&self.map));
        }
    }
}

impl Drop for HeldVolume {
    fn drop(&mut self) {
        self.release();
        let Some(volume) = self.volume.take() else { return };
        let volume_uid = volume.volume_uid;
        // Its file's lock goes with it, where nobody else has it: then it may be opened anew.
        drop(volume);
        (self.on_end)(volume_uid);
    }
}

/// How much is shared at once.
#[derive(Debug)]
struct Pace {
    run_bytes: u64,
}

impl Pace {
    fn took(&mut self, bytes: u64, time: Duration) {
        if time > SLOW {
            self.run_bytes = (self.run_bytes / 2).max(PIECE_BYTES);
        } else if time < QUICK && bytes >= self.run_bytes {
            self.run_bytes = (self.run_bytes * 2).min(RUN_BYTES_MAX);
        }
    }
}

/// The copies of one call, about to be made.
pub struct Copier {
    /// Sources with their copies.
    pub sources: Vec<Source>,
    /// Where copies are.
    pub files: CopyFiles,
    /// Who is told of the end.
    pub report: CopyReport,
    /// How waiting requests are let go.
    pub let_go: LetGo,
    /// What the files have of the process's.
    pub descriptors: Taken,
}

impl Copier {
    /// Makes the copies, and tells how it ended.
    pub fn run(self, mut plan: CopyPlan) {
        let began = Instant::now();
        let copied = self.copy(&mut plan);
        // Before anything slow.
        self.sources.iter().filter_map(|source| source.volume.as_ref()).for_each(HeldVolume::release);
        let result = match copied {
            Ok(()) => self.make_durable(),
            Err(error @ (CopyError::Cancelled | CopyError::SourceLostWrites)) => Err(error),
            // What could not be shared may be what could not be written back.
            Err(error) => self.sync_sources().and(Err(error)),
        };
        let Self { sources, files, report, descriptors, .. } = self;
        let targets: Vec<CopyTarget> = sources.iter().map(|source| source.target).collect();
        drop((sources, descriptors));
        if let Err(error) = &result {
            warn!(?targets, %error, "no copies are made");
            remove(&files, &targets);
        } else {
            info!(?targets, took = ?began.elapsed(), "copies are made");
        }
        report.end(result);
    }

    fn copy(&self, plan: &mut CopyPlan) -> Result<(), CopyError> {
        plan.copied_by(&std::thread::current());
        let (mut pace, mut holes) = (Pace { run_bytes: PIECE_BYTES }, Holes::default());
        loop {
            self.check()?;
            let run_bytes = pace.run_bytes;
            let step =
                plan.next(|source, offset| holes.reach(source, &self.sources[source], offset, run_bytes));
            let Some(step) = step else { return Ok(()) };
            let (began, length) = (Instant::now(), step.bytes.end - step.bytes.start);
            self.share(&step)?;
            let took = began.elapsed();
            pace.took(length, took);
            let free = plan.copied(&step);
            let rest = if free.is_empty() { took.min(REST_MAX) } else { REST_AFTER_REQUEST };
            (self.let_go)(free);
            self.report.add_done(length);
            if plan.is_complete(step.source)
                && let Some(volume) = &self.sources[step.source].volume
            {
                volume.release();
            }
            if !plan.is_waited_for() {
                std::thread::park_timeout(rest);
            }
        }
    }

    /// Whether it makes sense to go on.
    fn check(&self) -> Result<(), CopyError> {
        if self.report.is_cancelled() {
            return Err(CopyError::Cancelled);
        }
        let has_lost = |source: &Source| source.served().is_some_and(|volume| volume.has_lost_writes());
        if self.sources.iter().any(has_lost) { Err(CopyError::SourceLostWrites) } else { Ok(()) }
    }

    fn share(&self, step: &Step) -> Result<(), CopyError> {
        let source = &self.sources[step.source];
        let explain = |error: io::Error| {
            let (start, end) = (step.bytes.start, step.bytes.end);
            failed(&format!("share the bytes from {start} to {end} of {}", source.name()), &error)
        };
        if step.bytes.end < source.capacity_bytes {
            return reflink::share(&source.from, &source.to, &step.bytes).map_err(explain);
        }
        source.share_end(&step.bytes).map_err(explain)
    }

    fn make_durable(&self) -> Result<(), CopyError> {
        self.sync_sources()?;
        for source in &self.sources {
            self.check()?;
            let copied = source.to.set_len(source.target_bytes).and_then(|()| source.to.sync_all());
            copied.map_err(|error| failed(&format!("sync the copy of {}", source.name()), &error))?;
        }
        for source in &self.sources {
            let synced = self.files.sync_directory(source.target);
            synced.map_err(|error| failed("sync the directory of the copy", &error))?;
        }
        self.check()
    }

    fn sync_sources(&self) -> Result<(), CopyError> {
        for source in &self.sources {
            let Some(volume) = source.served() else { continue };
            if let Err(error) = source.from.sync_data() {
                volume.report_failed_sync(error.raw_os_error().unwrap_or(libc::EIO));
                return Err(CopyError::SourceLostWrites);
            }
        }
        Ok(())
    }
}

impl Source {
    fn served(&self) -> Option<&Arc<Volume>> {
        self.volume.as_ref().and_then(HeldVolume::volume)
    }

    fn name(&self) -> String {
        self.served()
            .map_or_else(|| "a snapshot".to_owned(), |volume| format!("volume {}", volume.volume_uid))
    }

    /// Shares what ends with the source. That need not be where a block ends, and the file may have become larger meanwhile.
    fn share_end(&self, bytes: &Range<u64>) -> io::Result<()> {
        let block_bytes = u64::from(reflink::block_bytes(&self.from).unwrap_or(4096));
        loop {
            let file_bytes = self.from.metadata()?.len();
            let end = bytes.end.next_multiple_of(block_bytes).min(file_bytes).max(bytes.end);
            let shared = reflink::share(&self.from, &self.to, &(bytes.start..end));
            let has_grown = self.from.metadata()?.len() != file_bytes;
            match shared {
                Err(error) if error.kind() == ErrorKind::InvalidInput && has_grown => {}
                Ok(()) => return self.to.set_len(self.capacity_bytes),
                other => return other,
            }
        }
    }
}

/// Where a source has data next, as its file system said last.
#[derive(Debug, Default)]
struct Holes {
    source: usize,
    /// There is none in between.
    hole: Range<u64>,
}

impl Holes {
    /// How much of a source may be shared in one go from an offset on.
    fn reach(&mut self, source: usize, of: &Source, offset: u64, run_bytes: u64) -> u64 {
        if self.source != source || !self.hole.contains(&offset) {
            let data = match rustix::fs::seek(&of.from, SeekFrom::Data(offset)) {
                Ok(data) => data,
                // None up to its end.
                Err(rustix::io::Errno::NXIO) => of.capacity_bytes,
                Err(_) => offset,
            };
            (self.source, self.hole) = (source, offset..data);
        }
        (self.hole.end - offset.min(self.hole.end)).min(HOLE_BYTES_MAX).max(run_bytes)
    }
}

/// Removes what was copied; what cannot be is found at the next start.
pub fn remove(files: &CopyFiles, targets: &[CopyTarget]) {
    for target in targets {
        if let Err(error) = files.delete(*target) {
            warn!(?target, %error, "what was copied of a source that is not copied cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::backend::file::{self, CacheMode};
    use crate::backend::{Allocation, VolumeOp};
    use crate::descriptors::Descriptors;
    use crate::ids::{ConnectionId, RequestSlot};
    use crate::volume::copying::{self, CopyHandle};
    use crate::volume::{Backend, Faults, LossRecorder};

    const BYTES: u64 = 4 << 20;

    /// A copy that is about to be made, into a file that cannot be written to: on no file system is any of it shared.
    struct Failing {
        _dir: tempfile::TempDir,
        volume: Arc<Volume>,
        copier: Copier,
        handle: CopyHandle,
        plan: CopyPlan,
        free: Arc<Mutex<Vec<HeldRequest>>>,
        ended: Arc<AtomicU32>,
    }

    fn failing() -> Failing {
        let dir = tempfile::tempdir().unwrap();
        let volumes_dir = dir.path().join("volumes");
        std::fs::create_dir(&volumes_dir).unwrap();
        let (volume_uid, files) = (Uuid::from_u128(1), CopyFiles::new(volumes_dir.clone()));
        file::create(&volumes_dir, volume_uid, BYTES).unwrap();
        let opened = file::open(&volumes_dir, volume_uid, BYTES, 4096, CacheMode::Buffered, 1).unwrap();
        let (backend, recorder) = (Backend::File(opened), LossRecorder::new(|| true));
        let volume = Arc::new(Volume::new(volume_uid, BYTES, backend, true, Faults::default(), recorder));
        let free = Arc::<Mutex<Vec<HeldRequest>>>::default();
        let let_go: LetGo = {
            let free = Arc::clone(&free);
            Arc::new(move |requests| free.lock().unwrap().extend(requests))
        };
        let ended = Arc::<AtomicU32>::default();
        let on_end = {
            let ended = Arc::clone(&ended);
            move |_| {
                ended.fetch_add(1, Ordering::Relaxed);
            }
        };
        let held = HeldVolume::new(Arc::clone(&volume), BYTES, Arc::clone(&let_go), on_end);
        let plan = CopyPlan::begin(&[(Some(volume.copy_before_write()), Arc::clone(held.map()))]).unwrap();
        let target = CopyTarget::Snapshot(Uuid::from_u128(2));
        drop(files.create(target).unwrap());
        let source = Source {
            volume: Some(held),
            from: File::open(files.volume(volume_uid)).unwrap(),
            capacity_bytes: BYTES,
            to: File::open(files.path(target)).unwrap(),
            target,
            target_bytes: BYTES,
        };
        let (handle, report) = copying::begin();
        let descriptors = Descriptors::new(2).take(2).unwrap();
        let copier = Copier { sources: vec![source], files, report, let_go, descriptors };
        Failing { _dir: dir, volume, copier, handle, plan, free, ended }
    }

    impl Failing {
        /// A change of all of the volume waits.
        fn hold(&self) -> HeldRequest {
            let request = HeldRequest { ring: 0, connection: ConnectionId(7), slot: RequestSlot(3) };
            let (mode, length_bytes) = (Allocation::Punch, BYTES);
            let op = VolumeOp::Allocate { mode, offset_bytes: 0, length_bytes };
            assert!(self.volume.copy_before_write().holds(&op, request));
            request
        }
    }

    #[test]
    fn what_cannot_be_shared_ends_the_copy_and_nobody_waits() {
        let failing = failing();
        let (request, files) = (failing.hold(), failing.copier.files.clone());
        failing.copier.run(failing.plan);
        assert!(matches!(failing.handle.wait(Duration::ZERO), Some(Err(CopyError::Failed(_)))));
        assert_eq!(*failing.free.lock().unwrap(), [request]);
        assert_eq!(files.stored().unwrap(), [], "nothing is left of it");
        assert_eq!(failing.ended.load(Ordering::Relaxed), 1, "the gate hears of the end");
        assert!(!failing.volume.has_lost_writes(), "that it could not be shared is no loss");
    }

    #[test]
    fn a_copier_that_is_gone_lets_go_of_all_that_waited() {
        let failing = failing();
        let request = failing.hold();
        drop(failing.copier);
        assert_eq!(*failing.free.lock().unwrap(), [request]);
        assert!(matches!(failing.handle.wait(Duration::ZERO), Some(Err(CopyError::Failed(_)))));
        assert_eq!(failing.ended.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_copy_ends_when_it_is_cancelled_or_its_source_lost_writes() {
        let failing_one = failing();
        failing_one.handle.cancel();
        failing_one.copier.run(failing_one.plan);
        assert_eq!(failing_one.handle.wait(Duration::ZERO), Some(Err(CopyError::Cancelled)));
        let failing = failing();
        failing.volume.report_failed_sync(libc::EIO);
        failing.copier.run(failing.plan);
        assert_eq!(failing.handle.wait(Duration::ZERO), Some(Err(CopyError::SourceLostWrites)));
    }

    #[test]
    fn as_much_is_shared_at_once_as_is_quick() {
        let mut pace = Pace { run_bytes: PIECE_BYTES };
        pace.took(PIECE_BYTES / 2, Duration::ZERO);
        assert_eq!(pace.run_bytes, PIECE_BYTES, "a request's own piece says nothing");
        for _ in 0..10 {
            pace.took(pace.run_bytes, QUICK / 2);
        }
        assert_eq!(pace.run_bytes, RUN_BYTES_MAX);
        pace.took(pace.run_bytes, QUICK * 2);
        assert_eq!(pace.run_bytes, RUN_BYTES_MAX);
        for _ in 0..10 {
            pace.took(pace.run_bytes, SLOW * 2);
        }
        assert_eq!(pace.run_bytes, PIECE_BYTES);
    }
}
