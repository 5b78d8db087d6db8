//! Reading a pool's metadata while the pool is used: where volumes have their bytes, and what each has alone.
//!
//! A pool keeps its metadata as they are at one moment, if it is told so, for others to read; once at a time, and until it is told
//! otherwise, over restarts of the machine. So there is a file beside the catalog while this server has told it so: what a killed server
//! left is released by the next ([`Metadata::release_left`]), and what somebody else has the pool keep is left alone. What is kept has everything that
//! was answered before: device mapper commits first.
//! Called by: `mod.rs`. Source: Documentation/admin-guide/device-mapper/thin-provisioning.rst (`reserve_metadata_snap`).

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::command::PoolName;
use super::error::LvmError;
use super::map::{ExclusiveReader, MapReader, Room, ThinMap};
use super::tool::{RunTools, lock};

/// In the data directory, while the server has the pool keep its metadata. It has the pool's name.
const MARK_FILE_NAME: &str = "thin-metadata-kept";

/// What reading takes at least: with less left it is not begun.
const READ_LEAST: Duration = Duration::from_secs(2);

/// Whose turn it is to read.
#[derive(Debug, Default)]
struct Reading {
    is_taken: Mutex<bool>,
    is_free: Condvar,
}

/// While it is there, nobody else reads.
struct ReadTurn<'a>(&'a Reading);

impl Reading {
    /// `None`: others read until the deadline.
    fn turn(&self, deadline: Instant) -> Option<ReadTurn<'_>> {
        let mut is_taken = lock(&self.is_taken);
        while *is_taken {
            let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            is_taken = self.is_free.wait_timeout(is_taken, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *is_taken = true;
        Some(ReadTurn(self))
    }
}

impl Drop for ReadTurn<'_> {
    fn drop(&mut self) {
        *lock(&self.0.is_taken) = false;
        self.0.is_free.notify_one();
    }
}

/// What reads a pool's metadata: one after the other.
#[derive(Debug)]
pub(super) struct Metadata {
    mark: PathBuf,
    reading: Reading,
    room: Room,
}

impl Metadata {
    /// Of a server with this data directory.
    pub(super) fn new(data_dir: &Path) -> Self {
        Self { mark: data_dir.join(MARK_FILE_NAME), reading: Reading::default(), room: Room::default() }
    }

    /// The map of a thin volume, of so many bytes.
    pub(super) fn map(
        &self,
        tools: &dyn RunTools,
        pool: &PoolName,
        thin_id: u32,
        capacity_bytes: u64,
        deadline: Instant,
    ) -> Result<ThinMap, LvmError> {
        let reader = Arc::new(Mutex::new(MapReader::new(self.room.clone())));
        let taking = Arc::clone(&reader);
        let take = move |line: &str| lock(&taking).take(line);
        self.kept(tools, pool, deadline, || {
            let call = pool.dump(thin_id).within(deadline.saturating_duration_since(Instant::now()));
            Ok(tools.run_lines(&call, Box::new(take))?)
        })?;
        // A tool that has ended writes no more.
        let reader = std::mem::replace(&mut *lock(&reader), MapReader::new(self.room.clone()));
        reader.finish(capacity_bytes)
    }

    /// What a thin volume has alone, in bytes.
    pub(super) fn exclusive_bytes(
        &self,
        tools: &dyn RunTools,
        pool: &PoolName,
        thin_id: u32,
        deadline: Instant,
    ) -> Result<u64, LvmError> {
        let reader = Arc::new(Mutex::new(ExclusiveReader::new(thin_id)));
        let taking = Arc::clone(&reader);
        let take = move |line: &str| lock(&taking).take(line);
        self.kept(tools, pool, deadline, || {
            let call = pool.list_exclusive().within(deadline.saturating_duration_since(Instant::now()));
            Ok(tools.run_lines(&call, Box::new(take))?)
        })?;
        let found = lock(&reader).finish();
        Ok(found?)
    }

    /// Does something while the pool keeps its metadata.
    fn kept<T>(
        &self,
        tools: &dyn RunTools,
        pool: &PoolName,
        deadline: Instant,
        work: impl FnOnce() -> Result<T, LvmError>,
    ) -> Result<T, LvmError> {
        let _turn = self.reading.turn(deadline).ok_or(LvmError::Reading)?;
        if deadline.saturating_duration_since(Instant::now()) < READ_LEAST {
            return Err(LvmError::Reading);
        }
        self.release_left(tools, pool)?;
        self.set_mark(pool).map_err(|source| LvmError::Mark { path: self.mark.clone(), source })?;
        let done = match tools.run(&pool.keep_metadata(true)) {
            Ok(_) => work(),
            Err(error) => {
                // Somebody else's is not to be released: nothing is ours. Of one that has not ended that is not known.
                if !error.has_timed_out() {
                    self.remove_mark();
                }
                return Err(error.into());
            }
        };
        match tools.run(&pool.keep_metadata(false)) {
            Ok(_) => self.remove_mark(),
            Err(error) => {
                warn!(%pool, %error, "the thin pool still keeps a copy of its metadata: it is released before the next is made, or at the next start");
            }
        }
        done
    }

    /// Has the pool let go of what a former call could not make it let go of, unless somebody reads now.
    ///
    /// # Errors
    /// A tool's; the mark cannot be read.
    pub(super) fn release_unread(&self, tools: &dyn RunTools, pool: &PoolName) -> Result<(), LvmError> {
        match self.reading.turn(Instant::now()) {
            Some(_turn) => self.release_left(tools, pool),
            None => Ok(()),
        }
    }

    /// Has the pool let go of what a former call or process of this server had it keep.
    pub(super) fn release_left(&self, tools: &dyn RunTools, pool: &PoolName) -> Result<(), LvmError> {
        let marked = match std::fs::read_to_string(&self.mark) {
            Ok(marked) => marked,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(LvmError::Mark { path: self.mark.clone(), source }),
        };
        if marked.trim() != pool.to_string() {
            // Of another pool, which this server does not have now.
            return Ok(());
        }
        if is_kept(&tools.run(&pool.status())?) {
            info!(%pool, "releasing the copy of the thin pool's metadata that a former process made");
            tools.run(&pool.keep_metadata(false))?;
        }
        self.remove_mark();
        Ok(())
    }

    /// Durable: what is kept outlives the machine's restart.
    fn set_mark(&self, pool: &PoolName) -> io::Result<()> {
        std::fs::write(&self.mark, pool.to_string())?;
        File::open(&self.mark)?.sync_all()?;
        let dir = self.mark.parent().ok_or(io::ErrorKind::NotFound)?;
        File::open(dir)?.sync_all()
    }

    fn remove_mark(&self) {
        if let Err(error) = std::fs::remove_file(&self.mark) {
            warn!(path = %self.mark.display(), %error, "cannot remove a mark that says nothing any more");
        }
    }
}

/// Whether the pool keeps its metadata, by its status: `START LENGTH thin-pool TRANSACTION META DATA HELD …`.
fn is_kept(status: &str) -> bool {
    status.split_whitespace().nth(6).is_some_and(|held| held != "-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::lvm::command::Call;
    use crate::backend::lvm::tool::{TakeLine, ToolError};
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A pool of which only the metadata are asked.
    #[derive(Debug, Default)]
    struct Pool {
        is_kept: AtomicBool,
        fails_to_release: AtomicBool,
        calls: Mutex<Vec<String>>,
    }

    impl RunTools for Pool {
        fn run_lines(&self, call: &Call, mut take: TakeLine) -> Result<(), ToolError> {
            let what = call.args.last().unwrap().clone();
            let failed = || {
                Err(ToolError::Failed { tool: call.name(), status: "1".to_owned(), said: "busy".to_owned() })
            };
            lock(&self.calls).push(what.clone());
            match (call.program, what.as_str()) {
                ("dmsetup", "reserve_metadata_snap") => {
                    if self.is_kept.swap(true, Ordering::Relaxed) {
                        return failed();
                    }
                }
                ("dmsetup", "release_metadata_snap") => {
                    if self.fails_to_release.load(Ordering::Relaxed)
                        || !self.is_kept.swap(false, Ordering::Relaxed)
                    {
                        return failed();
                    }
                }
                ("dmsetup", _) => {
                    let held = if self.is_kept.load(Ordering::Relaxed) { "48" } else { "-" };
                    take(&format!("0 131072 thin-pool 2 114/1024 2/1024 {held} rw discard_passdown - 256 "));
                }
                ("thin_ls", _) => {
                    assert!(self.is_kept.load(Ordering::Relaxed), "what is read is kept");
                    take("  7 65536 ");
                }
                other => panic!("{other:?}"),
            }
            Ok(())
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn pool_name() -> PoolName {
        "vg/pool".parse().unwrap()
    }

    #[test]
    fn what_is_kept_is_released_and_somebody_elses_is_not() {
        let (dir, pool, tools) = (tempfile::tempdir().unwrap(), pool_name(), Pool::default());
        let metadata = Metadata::new(dir.path());
        assert_eq!(metadata.exclusive_bytes(&tools, &pool, 7, soon()).unwrap(), 65536);
        assert!(!tools.is_kept.load(Ordering::Relaxed) && !metadata.mark.exists());
        assert!(metadata.exclusive_bytes(&tools, &pool, 8, soon()).is_err(), "nothing is told of it");
        assert!(!tools.is_kept.load(Ordering::Relaxed), "released all the same");
        tools.is_kept.store(true, Ordering::Relaxed);
        assert!(metadata.exclusive_bytes(&tools, &pool, 7, soon()).is_err());
        assert!(tools.is_kept.load(Ordering::Relaxed) && !metadata.mark.exists(), "a backup's, for example");
        metadata.release_left(&tools, &pool).unwrap();
        assert!(tools.is_kept.load(Ordering::Relaxed));
    }

    #[test]
    fn what_a_killed_server_left_is_released_by_the_next_and_by_the_next_call() {
        let (dir, pool, tools) = (tempfile::tempdir().unwrap(), pool_name(), Pool::default());
        let metadata = Metadata::new(dir.path());
        // Killed before the pool was told, and behind that.
        for is_kept in [false, true] {
            metadata.set_mark(&pool).unwrap();
            tools.is_kept.store(is_kept, Ordering::Relaxed);
            Metadata::new(dir.path()).release_left(&tools, &"vg/other".parse().unwrap()).unwrap();
            assert_eq!(tools.is_kept.load(Ordering::Relaxed), is_kept, "of another pool");
            Metadata::new(dir.path()).release_left(&tools, &pool).unwrap();
            assert!(!tools.is_kept.load(Ordering::Relaxed) && !metadata.mark.exists());
        }
        tools.fails_to_release.store(true, Ordering::Relaxed);
        assert_eq!(metadata.exclusive_bytes(&tools, &pool, 7, soon()).unwrap(), 65536, "it was read");
        assert!(metadata.mark.exists());
        assert!(metadata.exclusive_bytes(&tools, &pool, 7, soon()).is_err());
        tools.fails_to_release.store(false, Ordering::Relaxed);
        assert_eq!(metadata.exclusive_bytes(&tools, &pool, 7, soon()).unwrap(), 65536);
        assert!(!metadata.mark.exists() && !tools.is_kept.load(Ordering::Relaxed));
    }

    #[test]
    fn who_waits_for_another_that_reads_waits_for_a_bounded_time() {
        let (dir, pool, tools) = (tempfile::tempdir().unwrap(), pool_name(), Pool::default());
        let metadata = Metadata::new(dir.path());
        let turn = metadata.reading.turn(soon()).unwrap();
        let at_once = Instant::now() + Duration::from_millis(20);
        let error = metadata.exclusive_bytes(&tools, &pool, 7, at_once).unwrap_err();
        assert!(matches!(error, LvmError::Reading), "{error}");
        assert!(lock(&tools.calls).is_empty(), "nothing was asked of the pool");
        drop(turn);
        assert_eq!(metadata.exclusive_bytes(&tools, &pool, 7, soon()).unwrap(), 65536);
    }
}
