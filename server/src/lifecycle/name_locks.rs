//! One lock for each volume name, so that calls on the same volume happen one after the other.
//!
//! A [`NameLock`] is the proof that [`super::Lifecycle`] asks for. It is waited for in tokio tasks (a slow fence on one
//! volume must not use up the threads for blocking work), and then moved into the blocking work itself: a caller that
//! hangs up does not let the next one in before the work is done. Locks nobody holds are dropped now and then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;

/// Sweeping starts at this many names; the number doubles when all of them are in use.
const SWEEP_AT_MIN: usize = 64;

/// The locks of all names.
#[derive(Debug, Default)]
pub struct NameLocks {
    locks: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

/// One name, locked until dropped.
#[derive(Debug)]
pub struct NameLock {
    name: String,
    _guard: OwnedMutexGuard<()>,
}

impl NameLock {
    /// The name that is locked.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl NameLocks {
    /// Waits for the name and locks it.
    pub async fn lock(&self, name: &str) -> NameLock {
        let lock = self.of(name);
        NameLock { name: name.to_owned(), _guard: lock.lock_owned().await }
    }

    /// The same for threads outside tokio.
    pub fn blocking_lock(&self, name: &str) -> NameLock {
        let lock = self.of(name);
        NameLock { name: name.to_owned(), _guard: lock.blocking_lock_owned() }
    }

    fn of(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = locks.get(name).and_then(Weak::upgrade) {
            return lock;
        }
        if locks.len() >= SWEEP_AT_MIN && locks.len() == locks.capacity() {
            locks.retain(|_, lock| lock.strong_count() > 0);
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        locks.insert(name.to_owned(), Arc::downgrade(&lock));
        lock
    }
}
