//! How much of a mounted file system is used, without waiting for one that does not answer.
//!
//! Owns: statfs on a thread of its own, one at most for each volume, with a wait that has an end. Never: starts a second one while the
//! first is in the kernel: a disk whose server is lost would collect them. Called by: the Node service.
//! Source: statfs(2).

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// How much there is, of bytes and of inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Of the file system, in bytes.
    pub bytes: Amounts,
    /// How many inodes; all 0 where they are made as they are needed.
    pub inodes: Amounts,
}

/// Of one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amounts {
    /// All there is.
    pub total: u64,
    /// In use.
    pub used: u64,
    /// What a user without privileges may still have.
    pub available: u64,
}

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// The file system does not answer.
    #[error("the file system has not answered for {} ms; its disk may be stalled: see volctl attachments", .0.as_millis())]
    Silent(Duration),
    /// It answers with an error.
    #[error("the file system cannot be asked: {0}")]
    Failed(#[source] io::Error),
}

type Answer = Option<Arc<io::Result<Usage>>>;

/// The questions that are being asked.
#[derive(Debug, Default)]
pub struct UsageQueries {
    asked: Arc<Mutex<HashMap<String, watch::Receiver<Answer>>>>,
}

impl UsageQueries {
    /// Asks the file system that `ask` asks; joins the question that waits already. `ask` may wait for ever.
    ///
    /// # Errors
    /// [`UsageError`], by cause.
    pub async fn usage(
        &self,
        volume_id: &str,
        ask: impl FnOnce() -> io::Result<Usage> + Send + 'static,
        at_most: Duration,
    ) -> Result<Usage, UsageError> {
        let mut answer = self.join_or_ask(volume_id, ask).map_err(UsageError::Failed)?;
        let answered = tokio::time::timeout(at_most, answer.wait_for(Option::is_some)).await;
        let answer = match answered {
            Err(_) => return Err(UsageError::Silent(at_most)),
            Ok(answer) => answer.ok().and_then(|answer| answer.clone()),
        };
        match answer.as_deref() {
            Some(Ok(usage)) => Ok(*usage),
            Some(Err(error)) => Err(UsageError::Failed(io::Error::new(error.kind(), error.to_string()))),
            None => Err(UsageError::Failed(io::Error::other("the thread that asked has ended"))),
        }
    }

    fn join_or_ask(
        &self,
        volume_id: &str,
        ask: impl FnOnce() -> io::Result<Usage> + Send + 'static,
    ) -> io::Result<watch::Receiver<Answer>> {
        let mut asked = lock(&self.asked);
        if let Some(answer) = asked.get(volume_id) {
            return Ok(answer.clone());
        }
        let (tell, answer) = watch::channel(None);
        let (all, key) = (Arc::clone(&self.asked), volume_id.to_owned());
        let work = move || {
            let usage = ask();
            // First, so that whoever comes now asks anew.
            lock(&all).remove(&key);
            tell.send_replace(Some(Arc::new(usage)));
        };
        std::thread::Builder::new().name("statfs".to_owned()).spawn(work)?;
        asked.insert(volume_id.to_owned(), answer.clone());
        Ok(answer)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks the file system of a path that is held open. Waits for as long as that does.
///
/// # Errors
/// The file system's.
pub fn statfs(path: &OwnedFd) -> io::Result<Usage> {
    let stat = rustix::fs::fstatvfs(path)?;
    let amounts = |total: u64, free: u64, available: u64, unit: u64| Amounts {
        total: total.saturating_mul(unit),
        used: total.saturating_sub(free).saturating_mul(unit),
        available: available.saturating_mul(unit),
    };
    Ok(Usage {
        bytes: amounts(stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_frsize),
        inodes: amounts(stat.f_files, stat.f_ffree, stat.f_favail, 1),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);
    const NOTHING: Amounts = Amounts { total: 0, used: 0, available: 0 };

    #[tokio::test]
    async fn a_silent_file_system_has_one_question_at_most() {
        let queries = UsageQueries::default();
        let threads = Arc::new(AtomicUsize::new(0));
        let (go, told) = mpsc::channel::<()>();
        let mut told = Some(told);
        for _ in 0..3 {
            let (threads, told) = (Arc::clone(&threads), told.take());
            let ask = move || {
                threads.fetch_add(1, Ordering::SeqCst);
                told.map(|told| told.recv());
                Ok(Usage { bytes: NOTHING, inodes: NOTHING })
            };
            let error = queries.usage("v", ask, Duration::from_millis(5)).await.unwrap_err();
            assert!(matches!(error, UsageError::Silent(_)), "{error}");
        }
        // Nobody else waits for it.
        let failed = queries.usage("other", || Err(io::ErrorKind::NotFound.into()), DEADLINE).await;
        assert!(matches!(failed, Err(UsageError::Failed(_))));
        go.send(()).unwrap();
        queries.usage("v", || Ok(Usage { bytes: NOTHING, inodes: NOTHING }), DEADLINE).await.unwrap();
        assert_eq!(threads.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn the_numbers_are_the_file_systems_own() {
        let queries = UsageQueries::default();
        let dir = tempfile::tempdir().unwrap();
        let path = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
        let usage = queries.usage("v", move || statfs(&path), DEADLINE).await.unwrap();
        assert!(usage.bytes.total > 0 && usage.bytes.used <= usage.bytes.total);
        assert!(usage.bytes.available <= usage.bytes.total);
        assert!(lock(&queries.asked).is_empty());
    }
}
