//! The calls that are under way: how many of each kind, and their end before the server stops.
//!
//! Used by: `mod.rs` and those beside it. Never: knows what a call does.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::freezes::Freezes;
use super::watch::Watches;

/// Blocking calls at once that change something; more wait. Each takes a thread, for one commit or one fence.
const CALLS_MAX: u32 = 32;
/// The same of those that only look. They wait for no storage, and so for no call that does.
const LOOKS_MAX: usize = 8;

/// The same of those that look how much a volume or snapshot has alone, which takes as long as half a minute each.
const WALKS_MAX: usize = 2;

/// The blocking calls in progress: bounded, and finished before the server stops.
#[derive(Debug, Clone)]
pub struct Calls {
    /// For those that change something.
    pub(super) permits: Arc<Semaphore>,
    /// For those that only look.
    pub(super) looks: Arc<Semaphore>,
    /// For those that look at all extents.
    pub(super) walks: Arc<Semaphore>,
    pub(super) watches: Watches,
    pub(super) freezes: Freezes,
}

impl Default for Calls {
    fn default() -> Self {
        let of = |permits| Arc::new(Semaphore::new(permits));
        Self {
            permits: of(CALLS_MAX as usize),
            looks: of(LOOKS_MAX),
            walks: of(WALKS_MAX),
            watches: Watches::default(),
            freezes: Freezes::default(),
        }
    }
}

impl Calls {
    /// Waits until every call in progress that changes something has finished, and lets no other begin.
    pub async fn finish(&self) {
        self.watches.stop();
        self.freezes.stop();
        self.looks.close();
        self.walks.close();
        if let Ok(all) = self.permits.acquire_many(CALLS_MAX).await {
            self.permits.close();
            all.forget();
        }
    }
}
