//! One lock for each target, so that calls on one target wait for each other and calls on others do not.
//!
//! Called by: `supervisor`. Invariant: a target's lock exists while somebody holds it or waits for it, and no longer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// The locks.
#[derive(Debug, Default)]
pub struct TargetLocks {
    by_target: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
}

impl TargetLocks {
    /// Waits until no other call works on `target`, and keeps others away until the guard is dropped.
    pub async fn lock(&self, target: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.by_target.lock().unwrap_or_else(PoisonError::into_inner);
            // A lock that only the table holds is nobody's.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(target.to_owned()).or_default())
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_target_is_worked_on_by_one_call_at_a_time() {
        let locks = Arc::new(TargetLocks::default());
        let first = locks.lock("a").await;
        let waiting = tokio::spawn({
            let locks = Arc::clone(&locks);
            async move { drop(locks.lock("a").await) }
        });
        tokio::task::yield_now().await;
        // Others are free meanwhile, and looking for them does not throw away the lock that is waited for.
        drop(locks.lock("b").await);
        assert!(!waiting.is_finished());
        drop(first);
        waiting.await.unwrap();
    }
}
