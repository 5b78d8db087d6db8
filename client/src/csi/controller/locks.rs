//! One at a time: calls that look at something and change it after that, of one volume or name.
//!
//! Owns the locks of this process, which is the only one: the sidecars choose one controller among themselves. They keep calls from
//! crossing; nothing is lost with them when the process is killed. Called by the service.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use tokio::sync::{Mutex, OwnedMutexGuard};

/// Names that share a lock only wait for each other.
const LOCKS: usize = 64;

/// Locks for names of any number.
#[derive(Debug, Clone)]
pub(super) struct Locks(Arc<[Arc<Mutex<()>>]>);

impl Default for Locks {
    fn default() -> Self {
        Self((0..LOCKS).map(|_| Arc::default()).collect())
    }
}

impl Locks {
    /// Waits for the name's turn; it lasts until the guard is dropped.
    pub(super) async fn lock(&self, name: &str) -> OwnedMutexGuard<()> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let number = hasher.finish() as usize % LOCKS;
        Arc::clone(&self.0[number]).lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_name_is_one_callers_at_a_time() {
        let locks = Locks::default();
        let first = locks.lock("a").await;
        let second = tokio::time::timeout(Duration::from_millis(10), locks.lock("a")).await;
        assert!(second.is_err(), "both have it");
        drop(first);
        locks.lock("a").await;
    }
}
