//! A volume that is being served, and the way of one request through it.
//!
//! Owns: what is announced of a volume, and for each request the order of operations ([`VolumeOp`]) with the meaning of
//! each result. Never: does an operation itself (`ring.rs` does), touches a socket, or checks a request's range
//! (`session.rs` did).
//! Called by: `gate/opener.rs` (opens volumes), `gate/run.rs` (shares them with the rings) and `connection.rs` (requests).
//!
//! ```text
//!   READ            Read…                                          WRITE   Write… ─(FUA, buffered)─► Sync
//!   FLUSH           Sync
//!   TRIM            Allocate(punch) ─(FUA)─► Sync
//!   WRITE_ZEROES    Allocate(punch or zero) ─(not supported)─► WriteZeroes… ─(FUA)─► Sync
//!   CACHE           Prefetch, or nothing where there is no cache to read into
//!   in memory       TRIM, WRITE_ZEROES: Allocate(punch) ─(NO_HOLE)─► Allocate(fill); the others: nothing is left to do
//! ```
//! Invariants: a request is reported done only when every byte of it is; where the write cache is off every writing
//! request is treated as FUA; after a failed sync nothing is acknowledged as durable until the volume was opened anew; and
//! nobody is told of a failed sync before it is recorded where a killed server does not forget it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proto::nbd::transmission::{Command, CommandFlags, NbdError, Request};
use proto::nbd::validate::RequestLimits;
use proto::nbd::{BlockSizes, Negotiated, PAYLOAD_BYTES_MAX_DEFAULT, TransmissionFlags};
use tracing::{error, warn};
use uuid::Uuid;

use crate::backend::callback::CallbackBackend;
use crate::backend::file::FileVolume;
use crate::backend::memory::MemoryVolume;
use crate::backend::{Allocation, VolumeOp};
use crate::descriptors::Taken;
use crate::limits::ZEROES_BYTES_MAX;

/// Below this, requests make the file system handle parts of a page.
const PREFERRED_BLOCK_BYTES: u32 = 4096;

/// Most that one CACHE brings into the page cache: what would push out much of what is there helps nobody.
const PREFETCH_BYTES_MAX: u64 = 64 << 20;

/// Ways in which this server can be made to fail, for tests only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// FLUSH and FUA are acknowledged although nothing was synced.
    pub skip_flush: bool,
    /// Only this one of each volume's FLUSHes is acknowledged without a sync, counted from 1 when the volume is opened.
    pub skip_one_flush: Option<u64>,
}

impl std::str::FromStr for Faults {
    type Err = String;

    /// Reads the hidden `--fault` option: `skip-flush`, or `skip-flush=N` for the Nth only.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.strip_prefix("skip-flush=").and_then(|number| number.parse().ok());
        match (text, number) {
            ("skip-flush", _) => Ok(Self { skip_flush: true, skip_one_flush: None }),
            (_, Some(number)) => Ok(Self { skip_flush: false, skip_one_flush: Some(number) }),
            (other, None) => {
                Err(format!("unknown fault {other:?}; there are `skip-flush` and `skip-flush=N`"))
            }
        }
    }
}

/// Where a volume's bytes are.
#[derive(Debug)]
pub enum Backend {
    /// A file.
    File(FileVolume),
    /// This process's memory.
    Memory(MemoryVolume),
    /// What completes on threads of its own.
    Callback(Box<dyn CallbackBackend>),
}

/// Records that a volume lost writes, at the first failed sync; false: it could not, and nobody may be told. Must not wait.
pub struct LossRecorder(Box<dyn Fn() -> bool + Send + Sync>);

impl LossRecorder {
    /// One that does this.
    pub fn new(record: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Box::new(record))
    }
}

impl std::fmt::Debug for LossRecorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LossRecorder")
    }
}

/// A volume that is being served.
#[derive(Debug)]
pub struct Volume {
    /// Its identity.
    pub volume_uid: Uuid,
    /// Its size in bytes.
    pub capacity_bytes: u64,
    /// Its bytes.
    pub backend: Backend,
    write_cache_on: bool,
    faults: Faults,
    /// FLUSHes so far; counted only for [`Faults::skip_one_flush`].
    flushes: AtomicU64,
    sync_failed: AtomicBool,
    recorder: LossRecorder,
    /// Whether the loss is recorded; set by the first failed sync.
    is_recorded: OnceLock<bool>,
    /// Whether it was recorded later, where it could not be then.
    is_recorded_since: AtomicBool,
    /// What it has of the process's open files; behind the backend, which closes them.
    _descriptors: Option<Taken>,
}

impl Volume {
    /// A volume over a backend that is open, and locked if it is a file.
    pub fn new(
        volume_uid: Uuid,
        capacity_bytes: u64,
        backend: Backend,
        write_cache_on: bool,
        faults: Faults,
        recorder: LossRecorder,
    ) -> Self {
        let (flushes, sync_failed, is_recorded) =
            (AtomicU64::new(0), AtomicBool::new(false), OnceLock::new());
        Self {
            volume_uid,
            capacity_bytes,
            backend,
            write_cache_on,
            faults,
            flushes,
            sync_failed,
            recorder,
            is_recorded,
            is_recorded_since: AtomicBool::new(false),
            _descriptors: None,
        }
    }

    /// The same, with the descriptors that were counted for it until it is closed.
    #[must_use]
    pub fn with_descriptors(self, descriptors: Taken) -> Self {
        Self { _descriptors: Some(descriptors), ..self }
    }

    /// Whether a sync has failed: what was acknowledged before may be lost.
    pub fn has_lost_writes(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }

    /// The same, once it is recorded or is known not to be: waits for who records it.
    pub fn has_noticed_loss(&self) -> bool {
        self.has_lost_writes() && {
            self.is_loss_recorded();
            true
        }
    }

    /// What requests are checked against and what is announced. `block_size_bytes` is the smallest block that this
    /// export's clients were promised; the backend may need more.
    pub fn limits(&self, read_only: bool, block_size_bytes: u32) -> RequestLimits {
        let alignment_bytes = match &self.backend {
            Backend::File(file) => file.alignment_bytes(),
            Backend::Memory(_) => 1,
            Backend::Callback(backend) => backend.alignment_bytes(),
        };
        let minimum_bytes = alignment_bytes.max(block_size_bytes);
        let mut flags = TransmissionFlags::HAS_FLAGS
            .with(TransmissionFlags::SEND_FUA)
            .with(TransmissionFlags::SEND_TRIM)
            .with(TransmissionFlags::SEND_WRITE_ZEROES)
            .with(TransmissionFlags::SEND_FAST_ZERO)
            .with(TransmissionFlags::SEND_CACHE)
            .with(TransmissionFlags::CAN_MULTI_CONN);
        if self.write_cache_on {
            // Announcing FLUSH is how NBD says that there is a volatile cache.
            flags = flags.with(TransmissionFlags::SEND_FLUSH);
        }
        if read_only {
            flags = flags.with(TransmissionFlags::READ_ONLY);
        }
        if matches!(&self.backend, Backend::File(file) if file.is_rotational()) {
            flags = flags.with(TransmissionFlags::ROTATIONAL);
        }
        let block_sizes = BlockSizes {
            minimum_bytes,
            preferred_bytes: minimum_bytes.max(PREFERRED_BLOCK_BYTES),
            maximum_bytes: PAYLOAD_BYTES_MAX_DEFAULT,
        };
        let negotiated = Negotiated::default();
        RequestLimits { size_bytes: self.capacity_bytes, flags, block_sizes, negotiated }
    }

    /// What the volume's bytes are in, for the log.
    pub fn describe_backend(&self) -> &'static str {
        match &self.backend {
            Backend::File(file) if file.is_direct() => "file, past the page cache",
            Backend::File(_) => "file, through the page cache",
            Backend::Memory(_) => "memory",
            Backend::Callback(backend) => backend.describe(),
        }
    }

    /// The volume's memory, when payloads go straight into and out of it.
    pub fn memory(&self) -> Option<&MemoryVolume> {
        match &self.backend {
            Backend::Memory(memory) => Some(memory),
            Backend::File(_) | Backend::Callback(_) => None,
        }
    }

    /// A sync of the volume's file failed, a client's or another: nothing is acknowledged as durable any more. Records it.
    pub fn report_failed_sync(&self, errno: i32) {
        if !self.sync_failed.swap(true, Ordering::AcqRel) {
            error!(volume_uid = %self.volume_uid, errno, "a sync failed: FLUSH and FUA fail until all clients have left");
        }
        self.is_loss_recorded();
    }

    /// The loss of writes is recorded, perhaps only now: that syncs fail may be told.
    pub fn loss_recorded(&self) {
        self.is_recorded_since.store(true, Ordering::Release);
    }

    fn is_loss_recorded(&self) -> bool {
        *self.is_recorded.get_or_init(|| (self.recorder.0)())
            || self.is_recorded_since.load(Ordering::Acquire)
    }

    /// What is said instead of that something is durable.
    fn lost(&self) -> Next {
        if self.is_loss_recorded() { Next::Done(Err(NbdError::Eio)) } else { Next::Disconnect }
    }

    fn is_direct(&self) -> bool {
        matches!(&self.backend, Backend::File(file) if file.is_direct())
    }
}

/// What comes next for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Have this done and bring the result to [`RequestProgress::completed`].
    Submit(VolumeOp),
    /// The request is over.
    Done(Result<(), NbdError>),
    /// Nothing may be said: the connection ends without an answer.
    Disconnect,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Reading,
    Writing,
    Allocating,
    Zeroing,
    Prefetching,
    Populating,
    Syncing,
}

/// How far a request has come. Plain data: it lives in the connection's slot for the request.
#[derive(Debug, Clone, Copy)]
pub struct RequestProgress {
    request: Request,
    stage: Stage,
    durable: bool,
    done_bytes: u64,
}

impl RequestProgress {
    /// Begins a request that was validated, and, if it is a WRITE, whose payload is there: in the request's buffer, or
    /// for a memory volume in its place already.
    pub fn begin(volume: &Volume, request: &Request) -> (Self, Next) {
        let writes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
        let wants_durable = request.flags.contains(CommandFlags::FUA) || !volume.write_cache_on;
        let durable = writes && wants_durable && !volume.faults.skip_flush;
        let mut progress = Self { request: *request, stage: Stage::Syncing, durable, done_bytes: 0 };
        let next = match &volume.backend {
            Backend::File(_) | Backend::Callback(_) => progress.begin_stored(volume),
            Backend::Memory(_) => progress.begin_memory(volume),
        };
        (progress, next)
    }

    /// Takes the result of the operation before: bytes, or a negative errno.
    pub fn completed(&mut self, volume: &Volume, result: i32) -> Next {
        if result == -libc::EINTR {
            return self.repeat(volume);
        }
        if result < 0 {
            return self.failed(volume, -result);
        }
        match self.stage {
            Stage::Reading | Stage::Writing | Stage::Zeroing => self.transferred(volume, result as u32),
            Stage::Allocating => self.allocated(volume),
            Stage::Populating | Stage::Prefetching => Next::Done(Ok(())),
            Stage::Syncing => durable_answer(volume),
        }
    }

    /// The first byte for which nothing was done, of a request that failed while its bytes were on their way; `None` where
    /// the failure is not of a place.
    pub fn failed_at_bytes(&self) -> Option<u64> {
        let has_place = matches!(self.stage, Stage::Reading | Stage::Writing | Stage::Zeroing);
        has_place.then(|| self.request.offset_bytes + self.done_bytes)
    }

    fn begin_stored(&mut self, volume: &Volume) -> Next {
        if self.durable && volume.has_lost_writes() {
            return volume.lost();
        }
        self.stage = match self.request.command {
            Command::Read => Stage::Reading,
            Command::Write => Stage::Writing,
            Command::Trim | Command::WriteZeroes => Stage::Allocating,
            Command::Cache if volume.is_direct() => return Next::Done(Ok(())),
            Command::Cache => Stage::Prefetching,
            _ => return self.sync(volume),
        };
        self.repeat(volume)
    }

    /// A memory volume's payloads are in their place, and it has no sync: only zeroing takes an operation.
    fn begin_memory(&mut self, volume: &Volume) -> Next {
        if !matches!(self.request.command, Command::Trim | Command::WriteZeroes) {
            return Next::Done(Ok(()));
        }
        if self.wants_no_hole() && self.request.flags.contains(CommandFlags::FAST_ZERO) {
            return Next::Done(Err(NbdError::Enotsup)); // Memory is zeroed as it is taken, byte for byte.
        }
        self.stage = Stage::Allocating;
        self.repeat(volume)
    }

    /// The operation of the current stage, from where it has got to.
    fn repeat(&mut self, volume: &Volume) -> Next {
        let offset_bytes = self.request.offset_bytes + self.done_bytes;
        let remaining_bytes = self.request.length_bytes - self.done_bytes;
        // Whole where it counts: a READ or WRITE was validated to be no longer than a buffer.
        let length_bytes = u32::try_from(remaining_bytes).unwrap_or(u32::MAX);
        let buffer_offset_bytes = u32::try_from(self.done_bytes).unwrap_or(u32::MAX);
        let op = match self.stage {
            Stage::Reading => VolumeOp::Read { offset_bytes, length_bytes, buffer_offset_bytes },
            Stage::Writing => {
                // Through the page cache, ENOSPC of the write could not be told from a failed sync in one result.
                let durable = self.durable && volume.is_direct();
                VolumeOp::Write { offset_bytes, length_bytes, buffer_offset_bytes, durable }
            }
            Stage::Zeroing => {
                VolumeOp::WriteZeroes { offset_bytes, length_bytes: length_bytes.min(ZEROES_BYTES_MAX) }
            }
            Stage::Allocating => {
                let mode = self.allocate_mode(volume);
                VolumeOp::Allocate { mode, offset_bytes, length_bytes: remaining_bytes }
            }
            Stage::Populating => {
                VolumeOp::Allocate { mode: Allocation::Fill, offset_bytes, length_bytes: remaining_bytes }
            }
            Stage::Prefetching => {
                let length_bytes = remaining_bytes.min(PREFETCH_BYTES_MAX) as u32;
                VolumeOp::Prefetch { offset_bytes, length_bytes }
            }
            // What a hole or a preallocation changed is metadata through and through.
            Stage::Syncing => VolumeOp::Sync {
                metadata: matches!(self.request.command, Command::Trim | Command::WriteZeroes),
            },
        };
        Next::Submit(op)
    }

    /// Memory files know no `ZERO_RANGE`; there the hole is filled in a second step.
    fn allocate_mode(&self, volume: &Volume) -> Allocation {
        if self.wants_no_hole() && volume.memory().is_none() { Allocation::Zero } else { Allocation::Punch }
    }

    fn wants_no_hole(&self) -> bool {
        self.request.command == Command::WriteZeroes && self.request.flags.contains(CommandFlags::NO_HOLE)
    }

    fn allocated(&mut self, volume: &Volume) -> Next {
        match &volume.backend {
            Backend::File(_) | Backend::Callback(_) => self.data_done(volume),
            Backend::Memory(_) if self.wants_no_hole() => {
                self.stage = Stage::Populating;
                self.repeat(volume)
            }
            Backend::Memory(_) => Next::Done(Ok(())),
        }
    }

    fn transferred(&mut self, volume: &Volume, bytes: u32) -> Next {
        self.done_bytes += u64::from(bytes);
        if self.done_bytes < self.request.length_bytes && bytes > 0 {
            return self.repeat(volume);
        }
        if self.done_bytes != self.request.length_bytes {
            // The file has the volume's length, so an end of file inside it means that somebody cut it.
            error!(volume_uid = %volume.volume_uid, request = ?self.request, "the backing file ends too early");
            return Next::Done(Err(NbdError::Eio));
        }
        match self.stage {
            Stage::Reading => Next::Done(Ok(())),
            Stage::Writing if self.durable && volume.is_direct() => durable_answer(volume),
            _ => self.data_done(volume),
        }
    }

    /// The data is where it belongs; what is left is to make it durable if that was asked for.
    fn data_done(&mut self, volume: &Volume) -> Next {
        if self.durable { self.sync(volume) } else { Next::Done(Ok(())) }
    }

    fn sync(&mut self, volume: &Volume) -> Next {
        if volume.faults.skip_flush || self.is_skipped_flush(volume) {
            return Next::Done(Ok(()));
        }
        if volume.has_lost_writes() {
            return volume.lost();
        }
        self.stage = Stage::Syncing;
        self.repeat(volume)
    }

    fn is_skipped_flush(&self, volume: &Volume) -> bool {
        let Some(skipped) = volume.faults.skip_one_flush else { return false };
        self.request.command == Command::Flush
            && volume.flushes.fetch_add(1, Ordering::Relaxed) + 1 == skipped
    }

    fn failed(&mut self, volume: &Volume, errno: i32) -> Next {
        let no_space = matches!(errno, libc::ENOSPC | libc::EDQUOT | libc::EFBIG);
        let mut has_lost_writes = false;
        match self.stage {
            Stage::Allocating if errno == libc::EOPNOTSUPP => {
                if self.request.command == Command::Trim {
                    return Next::Done(Ok(())); // Only advice: a file system without holes keeps the bytes.
                }
                if self.request.flags.contains(CommandFlags::FAST_ZERO) {
                    return Next::Done(Err(NbdError::Enotsup)); // Nothing was changed, and zeroes would have to be written.
                }
                self.stage = Stage::Zeroing;
                return self.repeat(volume);
            }
            Stage::Prefetching => return Next::Done(Ok(())), // Only advice as well.
            Stage::Syncing => has_lost_writes = true,
            Stage::Writing if self.durable && volume.is_direct() && !no_space => has_lost_writes = true,
            _ => {}
        }
        warn!(volume_uid = %volume.volume_uid, errno, stage = ?self.stage, request = ?self.request, "a request failed");
        if has_lost_writes {
            // Whatever a failed sync says, what it means to the client is that the data may be lost.
            volume.report_failed_sync(errno);
            return volume.lost();
        }
        Next::Done(Err(NbdError::from_errno(errno)))
    }
}

/// A sync worked; but if another failed meanwhile, its error may be about what this one should have covered.
fn durable_answer(volume: &Volume) -> Next {
    if volume.has_lost_writes() { volume.lost() } else { Next::Done(Ok(())) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;
    use crate::backend::file::{self, CacheMode};

    struct Fixture {
        dir: PathBuf,
        volume: Volume,
        /// Whether a loss of writes can be recorded.
        recorded: Arc<AtomicBool>,
    }

    impl Fixture {
        fn new(cache: CacheMode, write_cache_on: bool, faults: Faults) -> Self {
            let dir = std::env::temp_dir().join(format!("volnode-volume-{}", Uuid::new_v4()));
            std::fs::create_dir(&dir).unwrap();
            let uid = Uuid::new_v4();
            file::create(&dir, uid, 16 << 20).unwrap();
            let backend = Backend::File(file::open(&dir, uid, 16 << 20, cache, 1).unwrap());
            let recorded = Arc::new(AtomicBool::new(true));
            let recorder = {
                let recorded = Arc::clone(&recorded);
                LossRecorder::new(move || recorded.load(Ordering::Relaxed))
            };
            let volume = Volume::new(uid, 16 << 20, backend, write_cache_on, faults, recorder);
            Self { dir, volume, recorded }
        }

        fn begin(&self, command: Command, flags: CommandFlags) -> (RequestProgress, Next) {
            let length_bytes = if command == Command::Flush { 0 } else { 8192 };
            let request = Request { flags, command, cookie: 1, offset_bytes: 4096, length_bytes };
            RequestProgress::begin(&self.volume, &request)
        }
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.dir).unwrap();
        }
    }

    fn buffered() -> Fixture {
        Fixture::new(CacheMode::Buffered, true, Faults::default())
    }

    const SYNC_DATA: Next = Next::Submit(VolumeOp::Sync { metadata: false });
    const SYNC_ALL: Next = Next::Submit(VolumeOp::Sync { metadata: true });
    const OK: Next = Next::Done(Ok(()));
    const EIO: Next = Next::Done(Err(NbdError::Eio));

    #[test]
    fn short_transfers_are_continued() {
        let fixture = buffered();
        let (mut read, next) = fixture.begin(Command::Read, CommandFlags::NONE);
        let op = |offset, length, at| {
            Next::Submit(VolumeOp::Read {
                offset_bytes: offset,
                length_bytes: length,
                buffer_offset_bytes: at,
            })
        };
        assert_eq!(next, op(4096, 8192, 0));
        assert_eq!(read.completed(&fixture.volume, 4096), op(8192, 4096, 4096));
        assert_eq!(read.completed(&fixture.volume, -libc::EINTR), op(8192, 4096, 4096));
        assert_eq!(read.completed(&fixture.volume, 4096), OK);
    }

    #[test]
    fn a_file_that_was_cut_is_an_error_and_not_zeroes() {
        let fixture = buffered();
        let (mut read, _) = fixture.begin(Command::Read, CommandFlags::NONE);
        assert_eq!(read.completed(&fixture.volume, 0), EIO);
    }

    #[test]
    fn fua_is_answered_after_the_sync() {
        let fixture = buffered();
        for command in [Command::Trim, Command::WriteZeroes] {
            let (mut request, _) = fixture.begin(command, CommandFlags::FUA);
            assert_eq!(request.completed(&fixture.volume, 0), SYNC_ALL);
            assert_eq!(request.completed(&fixture.volume, 0), OK);
        }
        let (mut write, _) = fixture.begin(Command::Write, CommandFlags::FUA);
        assert_eq!(write.completed(&fixture.volume, 8192), SYNC_DATA);
        let (_, next) = fixture.begin(Command::Flush, CommandFlags::NONE);
        assert_eq!(next, SYNC_DATA);
    }

    #[test]
    fn without_a_write_cache_every_write_is_durable() {
        let fixture = Fixture::new(CacheMode::Buffered, false, Faults::default());
        let (mut write, _) = fixture.begin(Command::Write, CommandFlags::NONE);
        assert_eq!(write.completed(&fixture.volume, 8192), SYNC_DATA);
        let limits = fixture.volume.limits(false, 512);
        assert!(!limits.flags.contains(TransmissionFlags::SEND_FLUSH), "no volatile cache is announced");
    }

    #[test]
    fn nothing_is_acknowledged_as_flushed_after_a_failed_sync() {
        let fixture = buffered();
        let (mut earlier, _) = fixture.begin(Command::Flush, CommandFlags::NONE);
        let (mut failing, _) = fixture.begin(Command::Flush, CommandFlags::NONE);
        assert_eq!(failing.completed(&fixture.volume, -libc::ENOSPC), EIO);
        assert!(fixture.volume.has_lost_writes());
        assert_eq!(earlier.completed(&fixture.volume, 0), EIO, "its writes may be the lost ones");
        assert_eq!(fixture.begin(Command::Flush, CommandFlags::NONE).1, EIO);
        assert_eq!(fixture.begin(Command::Write, CommandFlags::FUA).1, EIO);
        let (mut write, _) = fixture.begin(Command::Write, CommandFlags::NONE);
        assert_eq!(write.completed(&fixture.volume, 8192), OK, "nothing durable is promised here");
    }

    #[test]
    fn nobody_is_told_of_a_loss_that_is_recorded_nowhere() {
        let fixture = buffered();
        fixture.recorded.store(false, Ordering::Relaxed);
        let (mut earlier, _) = fixture.begin(Command::Flush, CommandFlags::NONE);
        let (mut failing, _) = fixture.begin(Command::Flush, CommandFlags::NONE);
        assert_eq!(failing.completed(&fixture.volume, -libc::EIO), Next::Disconnect);
        fixture.recorded.store(true, Ordering::Relaxed);
        assert_eq!(
            earlier.completed(&fixture.volume, 0),
            Next::Disconnect,
            "it is recorded once or not at all"
        );
        assert_eq!(fixture.begin(Command::Write, CommandFlags::FUA).1, Next::Disconnect);
        let (mut read, _) = fixture.begin(Command::Read, CommandFlags::NONE);
        assert_eq!(read.completed(&fixture.volume, 8192), OK);
        fixture.volume.loss_recorded();
        let told = fixture.begin(Command::Flush, CommandFlags::NONE).1;
        assert_eq!(told, EIO, "those who come again are told at last");
    }

    #[test]
    fn no_space_is_the_writers_problem_alone() {
        let fixture = buffered();
        let (mut write, _) = fixture.begin(Command::Write, CommandFlags::FUA);
        assert_eq!(write.completed(&fixture.volume, -libc::ENOSPC), Next::Done(Err(NbdError::Enospc)));
        assert!(!fixture.volume.has_lost_writes());
    }

    #[test]
    fn file_systems_without_holes_get_zeroes_written() {
        let fixture = buffered();
        let (mut zeroes, _) = fixture.begin(Command::WriteZeroes, CommandFlags::NONE);
        let next = zeroes.completed(&fixture.volume, -libc::EOPNOTSUPP);
        assert_eq!(next, Next::Submit(VolumeOp::WriteZeroes { offset_bytes: 4096, length_bytes: 8192 }));
        assert_eq!(zeroes.completed(&fixture.volume, 8192), OK);
        let (mut trim, _) = fixture.begin(Command::Trim, CommandFlags::NONE);
        assert_eq!(trim.completed(&fixture.volume, -libc::EOPNOTSUPP), OK);
    }

    #[test]
    fn the_skip_flush_fault_skips_every_sync() {
        let fixture = Fixture::new(CacheMode::Buffered, true, "skip-flush".parse().unwrap());
        assert_eq!(fixture.begin(Command::Flush, CommandFlags::NONE).1, OK);
        let (mut write, _) = fixture.begin(Command::Write, CommandFlags::FUA);
        assert_eq!(write.completed(&fixture.volume, 8192), OK);
    }

    #[test]
    fn one_flush_can_be_skipped_and_no_other() {
        let fixture = Fixture::new(CacheMode::Buffered, true, "skip-flush=2".parse().unwrap());
        let sync = Next::Submit(VolumeOp::Sync { metadata: false });
        for expected in [sync, OK, sync] {
            assert_eq!(fixture.begin(Command::Flush, CommandFlags::NONE).1, expected);
        }
    }

    #[test]
    fn memory_is_given_back_and_taken_again_where_no_hole_is_wanted() {
        let backend = Backend::Memory(MemoryVolume::new(1 << 20).unwrap());
        let recorder = LossRecorder::new(|| true);
        let volume = Volume::new(Uuid::nil(), 1 << 20, backend, true, Faults::default(), recorder);
        let command = Command::WriteZeroes;
        let flags = CommandFlags::NO_HOLE;
        let request = Request { flags, command, cookie: 1, offset_bytes: 512, length_bytes: 8192 };
        let (mut zeroes, next) = RequestProgress::begin(&volume, &request);
        let allocate =
            |mode| Next::Submit(VolumeOp::Allocate { mode, offset_bytes: 512, length_bytes: 8192 });
        assert_eq!(next, allocate(Allocation::Punch));
        let next = zeroes.completed(&volume, 0);
        assert_eq!(next, allocate(Allocation::Fill));
        assert_eq!(zeroes.completed(&volume, 0), OK);
    }

    fn memory() -> Volume {
        let backend = Backend::Memory(MemoryVolume::new(1 << 20).unwrap());
        Volume::new(Uuid::nil(), 1 << 20, backend, true, Faults::default(), LossRecorder::new(|| true))
    }

    #[test]
    fn a_fast_zero_that_would_be_slow_is_refused_before_anything_is_changed() {
        let fixture = buffered();
        let enotsup = Next::Done(Err(NbdError::Enotsup));
        for flags in [CommandFlags::FAST_ZERO, CommandFlags::FAST_ZERO.with(CommandFlags::NO_HOLE)] {
            let (mut zeroes, next) = fixture.begin(Command::WriteZeroes, flags);
            assert!(matches!(next, Next::Submit(VolumeOp::Allocate { .. })), "{next:?}");
            assert_eq!(zeroes.completed(&fixture.volume, -libc::EOPNOTSUPP), enotsup);
        }
        let flags = CommandFlags::FAST_ZERO.with(CommandFlags::NO_HOLE);
        let command = Command::WriteZeroes;
        let request = Request { flags, command, cookie: 1, offset_bytes: 0, length_bytes: 4096 };
        assert_eq!(RequestProgress::begin(&memory(), &request).1, enotsup);
        let punched = Request { flags: CommandFlags::FAST_ZERO, ..request };
        assert!(matches!(RequestProgress::begin(&memory(), &punched).1, Next::Submit(_)));
    }

    #[test]
    fn cache_reads_ahead_where_there_is_a_cache_and_never_fails() {
        let fixture = buffered();
        let (mut cache, next) = fixture.begin(Command::Cache, CommandFlags::NONE);
        assert_eq!(next, Next::Submit(VolumeOp::Prefetch { offset_bytes: 4096, length_bytes: 8192 }));
        assert_eq!(cache.completed(&fixture.volume, -libc::EIO), OK);
        let command = Command::Cache;
        let flags = CommandFlags::NONE;
        let request = Request { flags, command, cookie: 1, offset_bytes: 0, length_bytes: 4096 };
        assert_eq!(RequestProgress::begin(&memory(), &request).1, OK);
    }

    #[test]
    fn large_effects_go_to_the_file_system_whole() {
        let fixture = buffered();
        let (command, flags) = (Command::WriteZeroes, CommandFlags::NONE);
        let request = Request { flags, command, cookie: 1, offset_bytes: 4096, length_bytes: 1 << 40 };
        let (mut zeroes, next) = RequestProgress::begin(&fixture.volume, &request);
        let mode = Allocation::Punch;
        let whole = VolumeOp::Allocate { mode, offset_bytes: 4096, length_bytes: 1 << 40 };
        assert_eq!(next, Next::Submit(whole));
        let written =
            |offset_bytes| Next::Submit(VolumeOp::WriteZeroes { offset_bytes, length_bytes: 1 << 20 });
        assert_eq!(zeroes.completed(&fixture.volume, -libc::EOPNOTSUPP), written(4096));
        assert_eq!(zeroes.completed(&fixture.volume, 1 << 20), written(4096 + (1 << 20)));
    }

    #[test]
    fn a_failed_transfer_tells_how_far_it_came() {
        let fixture = buffered();
        let (mut read, _) = fixture.begin(Command::Read, CommandFlags::NONE);
        read.completed(&fixture.volume, 4096);
        assert_eq!(read.completed(&fixture.volume, -libc::EIO), EIO);
        assert_eq!(read.failed_at_bytes(), Some(8192));
        let (mut flush, _) = fixture.begin(Command::Flush, CommandFlags::NONE);
        assert_eq!(flush.completed(&fixture.volume, -libc::EIO), EIO);
        assert_eq!(flush.failed_at_bytes(), None);
    }
}
