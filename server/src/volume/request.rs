//! The way of one request through its volume: each operation ([`VolumeOp`]), and what each result means.
//!
//! Never: does an operation itself (`data/io/ring.rs` does), touches a socket, or checks a request's range (`data/session.rs` did).
//! Called by: `data/io/session_io.rs`.
//!
//! ```text
//!   READ            Read…                                          WRITE   Write… ─(FUA, buffered)─► Sync
//!   FLUSH           Sync
//!   TRIM            Allocate(punch, or discard on a device without holes) ─(FUA)─► Sync
//!   WRITE_ZEROES    Allocate(punch or zero) ─(not supported)─► WriteZeroes… ─(FUA)─► Sync
//!   CACHE           Prefetch, or nothing where there is no cache to read into
//!   in memory       TRIM, WRITE_ZEROES: Allocate(punch) ─(NO_HOLE)─► Allocate(fill); the others: nothing is left to do
//! ```
//! Invariants: a request is reported done only when every byte of it is; where the write cache is off every writing
//! request is treated as FUA.

use std::sync::atomic::Ordering;

use proto::nbd::transmission::{Command, CommandFlags, NbdError, Request};
use tracing::{error, warn};

use super::{Backend, Volume};
use crate::backend::{Allocation, VolumeOp};
use crate::limits::ZEROES_BYTES_MAX;

/// Most that one CACHE brings into the page cache: what would push out much of what is there helps nobody.
const PREFETCH_BYTES_MAX: u64 = 64 << 20;

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
    Discarding,
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
            Stage::Discarding => self.data_done(volume),
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
            return lost(volume);
        }
        if volume.is_cut_off(self.request.offset_bytes + self.request.length_bytes) {
            return Next::Done(Err(NbdError::Eio));
        }
        if self.wants_no_hole()
            && self.request.flags.contains(CommandFlags::FAST_ZERO)
            && volume.zeroes_slowly()
        {
            return Next::Done(Err(NbdError::Enotsup)); // The kernel would write them, page after page.
        }
        self.stage = match self.request.command {
            Command::Read => Stage::Reading,
            Command::Write => Stage::Writing,
            Command::Trim if volume.discards() => Stage::Discarding,
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
            Stage::Discarding => {
                VolumeOp::Allocate { mode: Allocation::Discard, offset_bytes, length_bytes: remaining_bytes }
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
            return lost(volume);
        }
        self.stage = Stage::Syncing;
        self.repeat(volume)
    }

    fn is_skipped_flush(&self, volume: &Volume) -> bool {
        let Some(skipped) = volume.faults.skip_one_flush else { return false };
        self.request.command == Command::Flush
            && volume.flushes.fetch_add(1, Ordering::Relaxed) + 1 == skipped
    }

    /// A device says that there is no space where it has an end: it has become smaller than its clients know.
    fn errno_at_end(&self, volume: &Volume, errno: i32) -> i32 {
        let Backend::File(file) = &volume.backend else { return errno };
        if !matches!(errno, libc::ENOSPC | libc::EINVAL) || file.device_marks().is_none() {
            return errno;
        }
        // Of a device that is a number in memory.
        let is_measured = file.measure().is_ok();
        let is_behind = volume.is_cut_off(self.request.offset_bytes + self.request.length_bytes);
        if is_measured && is_behind { libc::EIO } else { errno }
    }

    fn failed(&mut self, volume: &Volume, errno: i32) -> Next {
        let no_space = matches!(errno, libc::ENOSPC | libc::EDQUOT | libc::EFBIG);
        let errno = self.errno_at_end(volume, errno);
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
            Stage::Discarding if errno == libc::EOPNOTSUPP => return Next::Done(Ok(())), // The same.
            Stage::Syncing => has_lost_writes = true,
            Stage::Writing if self.durable && volume.is_direct() && !no_space => has_lost_writes = true,
            _ => {}
        }
        warn!(volume_uid = %volume.volume_uid, errno, stage = ?self.stage, request = ?self.request, "a request failed");
        if has_lost_writes {
            // Whatever a failed sync says, what it means to the client is that the data may be lost.
            volume.report_failed_sync(errno);
            return lost(volume);
        }
        Next::Done(Err(NbdError::from_errno(errno)))
    }
}

/// A sync worked; but if another failed meanwhile, its error may be about what this one should have covered.
fn durable_answer(volume: &Volume) -> Next {
    if volume.has_lost_writes() { lost(volume) } else { Next::Done(Ok(())) }
}

/// What is said instead of that something is durable.
fn lost(volume: &Volume) -> Next {
    if volume.is_loss_recorded() { Next::Done(Err(NbdError::Eio)) } else { Next::Disconnect }
}
