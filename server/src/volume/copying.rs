//! A copy of stored bytes that goes on in the background: how far it is, how it ended, and how it is told to end.
//!
//! Owns what both sides share: [`CopyHandle`] is the one who waits, [`CopyReport`] the one who copies. Never: copies.
//! Used by the control side (`lifecycle/`) and by the copier. Invariant: a copy ends once; one whose report is dropped has failed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::backend::lvm::LvmError;
use crate::catalog::VolumeRecord;

/// What a copy is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopySource {
    /// A volume, as it is at the instant; it may be written to before and after.
    Volume(VolumeRecord),
    /// A snapshot that is ready: nobody writes to it.
    Snapshot {
        /// Its identity.
        snapshot_uid: Uuid,
        /// Its size in bytes.
        capacity_bytes: u64,
    },
}

/// What a copy becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CopyTarget {
    /// The storage of a new snapshot.
    Snapshot(Uuid),
    /// The storage of a new volume.
    Volume(Uuid),
    /// What is to take the place of a volume's storage.
    Restored(Uuid),
    /// A copy without a name, to be compared: gone with who has it open, and with its process.
    Nameless(Uuid),
}

/// A copy that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyWanted {
    /// Of what.
    pub source: CopySource,
    /// Into what.
    pub target: CopyTarget,
    /// Size in bytes that it is to have, at least the source's; the rest reads as zeroes.
    pub capacity_bytes: u64,
}

/// Why there is no copy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// The volume's storage cannot be copied without reading it.
    #[error("{0}")]
    Unsupported(String),
    /// No space left for it.
    #[error("no space left on the server for the copy")]
    NoSpace,
    /// What was written to the source before may be lost: a copy of it would be of nothing that ever was.
    #[error("writes to the source were lost while it was copied")]
    SourceLostWrites,
    /// Somebody asked for its end.
    #[error("cancelled")]
    Cancelled,
    /// The instant could not be had in time.
    #[error("{0}")]
    Busy(String),
    /// The storage is in a state in which nothing can be copied, until somebody has seen to it.
    #[error("{words}")]
    NotReady {
        /// Which.
        words: String,
        /// What to do.
        next: &'static str,
    },
    /// The system's own error.
    #[error("{0}")]
    Failed(String),
}

/// What to do where the map of a thin volume has no room.
const NEXT_OF_RUNS: &str =
    "compare fewer at once; of a volume whose map alone has no room, read all (volctl image export)";

impl From<LvmError> for CopyError {
    fn from(error: LvmError) -> Self {
        let words = error.to_string();
        match error {
            LvmError::Trouble { trouble, .. } => Self::NotReady { words, next: trouble.next() },
            LvmError::TooManyRuns(_) => Self::NotReady { words, next: NEXT_OF_RUNS },
            LvmError::Reading => Self::Busy(words),
            _ => Self::Failed(words),
        }
    }
}

impl From<io::Error> for CopyError {
    fn from(error: io::Error) -> Self {
        // One that was handed through what knows only errors of files.
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Self>());
        inner.cloned().unwrap_or_else(|| Self::Failed(error.to_string()))
    }
}

#[derive(Debug, Default)]
struct Shared {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    is_cancelled: AtomicBool,
    end: Mutex<Option<Result<(), CopyError>>>,
    has_ended: Condvar,
}

impl Shared {
    fn end(&self) -> MutexGuard<'_, Option<Result<(), CopyError>>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, result: Result<(), CopyError>) {
        self.end().get_or_insert(result);
        self.has_ended.notify_all();
    }
}

/// The one who waits for a copy; clones wait for the same.
#[derive(Debug, Clone)]
pub struct CopyHandle(Arc<Shared>);

/// The one who copies.
#[derive(Debug)]
pub struct CopyReport(Arc<Shared>);

/// A copy that begins.
pub fn begin() -> (CopyHandle, CopyReport) {
    let shared = Arc::new(Shared::default());
    (CopyHandle(Arc::clone(&shared)), CopyReport(shared))
}

impl CopyHandle {
    /// Bytes that were copied or found to be nothing, and how many there are in all.
    pub fn progress(&self) -> (u64, u64) {
        (self.0.done_bytes.load(Ordering::Relaxed), self.0.total_bytes.load(Ordering::Relaxed))
    }

    /// Waits at most so long for the end; `None`: it goes on.
    pub fn wait(&self, at_most: Duration) -> Option<Result<(), CopyError>> {
        let deadline = Instant::now() + at_most;
        let mut end = self.0.end();
        while end.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            end = self.0.has_ended.wait_timeout(end, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        end.clone()
    }

    /// Asks it to end soon, with [`CopyError::Cancelled`] unless it has ended otherwise.
    pub fn cancel(&self) {
        self.0.is_cancelled.store(true, Ordering::Relaxed);
    }
}

impl CopyReport {
    /// How much there is to copy or to look at.
    pub fn set_total(&self, bytes: u64) {
        self.0.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// So much more is done.
    pub fn add_done(&self, bytes: u64) {
        self.0.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether it is to end.
    pub fn is_cancelled(&self) -> bool {
        self.0.is_cancelled.load(Ordering::Relaxed)
    }

    /// It has ended: durable, or with nothing left of it.
    pub fn end(self, result: Result<(), CopyError>) {
        self.0.finish(result);
    }
}

impl Drop for CopyReport {
    fn drop(&mut self) {
        self.0.finish(Err(CopyError::Failed("the copy ended without a word".to_owned())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_ends_once_and_everybody_hears_how() {
        let (handle, report) = begin();
        report.set_total(10);
        report.add_done(4);
        assert_eq!((handle.progress(), handle.wait(Duration::ZERO)), ((4, 10), None));
        handle.cancel();
        assert!(report.is_cancelled());
        report.end(Err(CopyError::Cancelled));
        assert_eq!(handle.clone().wait(Duration::ZERO), Some(Err(CopyError::Cancelled)));
    }

    #[test]
    fn a_copy_that_is_left_alone_has_failed() {
        let (handle, report) = begin();
        let waiting = std::thread::spawn(move || handle.wait(Duration::from_secs(60)));
        drop(report);
        assert!(matches!(waiting.join().unwrap(), Some(Err(CopyError::Failed(_)))));
    }
}
