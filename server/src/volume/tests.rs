//! One request at a time, on volumes without a ring.

use std::path::PathBuf;
use std::sync::Arc;

use proto::nbd::transmission::{Command, CommandFlags, NbdError, Request};

use super::request::{Next, RequestProgress};
use super::*;
use crate::backend::file::{self, CacheMode};
use crate::backend::{Allocation, VolumeOp};

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
        let backend = Backend::File(file::open(&dir, uid, 16 << 20, 4096, cache, 1).unwrap());
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
        Next::Submit(VolumeOp::Read { offset_bytes: offset, length_bytes: length, buffer_offset_bytes: at })
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
    assert_eq!(earlier.completed(&fixture.volume, 0), Next::Disconnect, "it is recorded once or not at all");
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
    let allocate = |mode| Next::Submit(VolumeOp::Allocate { mode, offset_bytes: 512, length_bytes: 8192 });
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
    let written = |offset_bytes| Next::Submit(VolumeOp::WriteZeroes { offset_bytes, length_bytes: 1 << 20 });
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
