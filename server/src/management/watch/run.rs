//! One watch, from its beginning to its end: reads, tells, waits.
//!
//! Owns the order of what is told. The catalog is read a page at a time and never while the caller is waited for; a caller that takes
//! nothing for [`TAKE_LIMIT`] is left. Never: decides what a change means (`events.rs`) or whether a token is good (`token.rs`).
//! Started by [`super`], on a task of its own.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tonic::Status;

use super::covered::Covered;
use super::events::{self, Wanted};
use super::recent::{Known, Recent};
use super::token::Origin;
use crate::catalog::{Catalog, CatalogError, Change, ChangePoint, Told, now_ms};
use crate::lifecycle::{DataSide, Lifecycle, LifecycleError};
use crate::status;

/// So long an event waits to be taken.
const TAKE_LIMIT: Duration = Duration::from_secs(60);
/// Where nothing is told for so long, a newer token is: the caller hears that the server is there, and its token does not grow old.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(30);
/// Objects or changes that are read at once, with the catalog kept from others: well below a millisecond each.
const PAGE_MAX: u32 = 128;

/// Why a watch ends.
enum End {
    /// Nobody listens any more.
    Gone,
    /// The caller is told this.
    Told(Status),
}

/// A watch that goes on.
pub(super) struct Watcher<D> {
    pub(super) lifecycle: Arc<Lifecycle<D>>,
    pub(super) looks: Arc<Semaphore>,
    pub(super) recent: Arc<Mutex<Recent>>,
    pub(super) wanted: Wanted,
    pub(super) events: mpsc::Sender<v1::WatchEvent>,
    /// How often the catalog has told of a change.
    pub(super) count: watch::Receiver<u64>,
    pub(super) is_stopping: watch::Receiver<bool>,
    /// When the caller took something last.
    pub(super) told_at: Instant,
    /// Given back at the end.
    pub(super) _place: OwnedSemaphorePermit,
}

impl<D: DataSide> Watcher<D> {
    /// Goes on behind a change, or begins with what there is; what the caller is told in the end, if it is still there.
    pub(super) async fn run(mut self, from: Option<ChangePoint>) -> Option<Status> {
        let ended = match from {
            Some(point) => self.follow(point, &Covered::default(), None).await,
            None => self.begin().await,
        };
        match ended {
            Err(End::Gone) => None,
            Err(End::Told(status)) => Some(status),
        }
    }

    async fn begin(&mut self) -> Result<Infallible, End> {
        let start = self.look(Catalog::newest_change).await?;
        let (mut covered, mut end) = (Covered::default(), start.seq);
        for kind in self.wanted.kinds.clone() {
            let mut after = String::new();
            loop {
                let (volume_uid, from) = (self.wanted.volume_uid.clone(), after);
                let page =
                    self.look(move |catalog| catalog.present(kind, volume_uid.as_deref(), &from, PAGE_MAX));
                let page = page.await?;
                let last = page.objects.get(PAGE_MAX as usize - 1).map(|told: &Told| told.uid.clone());
                covered.add(kind, last.clone(), page.as_of.seq);
                end = page.as_of.seq;
                for told in page.objects.iter().filter(|told| self.wanted.scope_has(told)).collect::<Vec<_>>()
                {
                    self.tell(events::present(told, now_ms())).await?;
                }
                match last {
                    Some(last) => after = last,
                    None => break,
                }
            }
        }
        self.follow(start, &covered, Some(end)).await
    }

    /// Tells what comes behind a change, but for what has been told. With `synced_at` all that there was has been told when that change
    /// is passed.
    async fn follow(
        &mut self,
        mut at: ChangePoint,
        covered: &Covered,
        mut synced_at: Option<i64>,
    ) -> Result<Infallible, End> {
        let origin = self.origin();
        loop {
            let count = *self.count.borrow_and_update();
            let found = self.behind(&at, count).await?;
            for change in &found {
                self.say_synced(&mut synced_at, &at).await?;
                let is_new = |told: &Told| !covered.has(told.facts.kind(), &told.uid, change.point.seq);
                if change.told.as_ref().is_some_and(|(_, told)| self.wanted.has(told) && is_new(told))
                    && let Some(event) = events::changed(change, synced_at.is_none().then_some(&origin))
                {
                    self.tell(event).await?;
                }
                at = change.point.clone();
            }
            self.say_synced(&mut synced_at, &at).await?;
            if synced_at.is_none() && self.told_at.elapsed() >= BOOKMARK_INTERVAL {
                self.tell(events::bookmark(&origin, &at, now_ms())).await?;
            }
            if found.is_empty() {
                self.wait().await?;
            }
        }
    }

    async fn say_synced(&mut self, synced_at: &mut Option<i64>, at: &ChangePoint) -> Result<(), End> {
        if synced_at.is_some_and(|seq| at.seq >= seq) {
            *synced_at = None;
            self.tell(events::synced(&self.origin(), at, now_ms())).await?;
        }
        Ok(())
    }

    fn origin(&self) -> Origin {
        let volume_uid = self.wanted.volume_uid.clone();
        Origin { server_id: self.lifecycle.catalog().server_id(), volume_uid }
    }

    /// Some of what comes behind a change; nothing: there is none.
    async fn behind(&self, at: &ChangePoint, count: u64) -> Result<Vec<Arc<Change>>, End> {
        let mut recent = self.recent.lock().await;
        match recent.after(at.seq, count, PAGE_MAX as usize) {
            Known::Changes(changes) => return Ok(changes),
            Known::Nothing => return Ok(Vec::new()),
            Known::Ask => {}
        }
        let after = at.clone();
        let found = self.look(move |catalog| catalog.changes_after(&after, PAGE_MAX)).await?;
        let found = found.ok_or_else(|| End::Told(status::watch_token_too_old()))?;
        let is_all = found.len() < PAGE_MAX as usize;
        let found: Vec<Arc<Change>> = found.into_iter().map(Arc::new).collect();
        recent.add(at.seq, &found, count, is_all);
        Ok(found)
    }

    /// Asks the catalog on a thread that may block.
    async fn look<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Catalog) -> Result<T, CatalogError> + Send + 'static,
    ) -> Result<T, End> {
        let permit = Arc::clone(&self.looks).acquire_owned().await;
        let permit = permit.map_err(|_| End::Told(status::stopping()))?;
        let lifecycle = Arc::clone(&self.lifecycle);
        let asked = tokio::task::spawn_blocking(move || {
            let outcome = ask(lifecycle.catalog()).map_err(LifecycleError::from);
            drop(permit);
            outcome.map_err(|error| lifecycle.explained(error))
        });
        match asked.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(End::Told(status::from_lifecycle(&error))),
            Err(panicked) => Err(End::Told(status::failed(&panicked.to_string()))),
        }
    }

    async fn tell(&mut self, event: v1::WatchEvent) -> Result<(), End> {
        tokio::select! {
            taken = tokio::time::timeout(TAKE_LIMIT, self.events.send(event)) => match taken {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(End::Gone),
                Err(_) => return Err(End::Told(status::watch_too_slow(TAKE_LIMIT))),
            },
            () = stopping(&mut self.is_stopping) => return Err(End::Told(status::stopping())),
        }
        self.told_at = Instant::now();
        Ok(())
    }

    /// Until there may be something to tell.
    async fn wait(&mut self) -> Result<(), End> {
        tokio::select! {
            changed = self.count.changed() => changed.map_err(|_| End::Told(status::stopping())),
            () = tokio::time::sleep_until(self.told_at + BOOKMARK_INTERVAL) => Ok(()),
            () = self.events.closed() => Err(End::Gone),
            () = stopping(&mut self.is_stopping) => Err(End::Told(status::stopping())),
        }
    }
}

/// Returns when the server stops.
async fn stopping(is_stopping: &mut watch::Receiver<bool>) {
    // An error says that the other side is gone, as a server is that has stopped.
    let _ = is_stopping.wait_for(|is_stopping| *is_stopping).await;
}
