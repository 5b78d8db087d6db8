//! Work that goes on behind a call: which there is, how far it is, and how it ended.
//!
//! Owns the operations of this process, those that ended among them for a while, and the few turns to copy. Never: copies, or touches
//! the catalog; what an operation does is in `snapshots.rs`, `clones.rs` and `restore.rs`. Nothing of it outlives the process:
//! `recovery.rs` undoes what a killed one had begun.
//! Invariants: an operation is known before the first row or byte of it is made, so a row `creating` that no operation speaks of is a
//! leftover; it ends once; one whose thread ends without a word has failed.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use uuid::Uuid;

use super::snapshot_error::SnapshotError;
use crate::catalog::{RequestKey, now_ms};
use crate::scope::Scope;
use crate::volume::copying::{CopyError, CopyHandle};

/// So long an operation is told of after its end.
const KEPT: Duration = Duration::from_secs(3600);
/// So many that have ended are told of at most.
const KEPT_MAX: usize = 1000;
/// So many copy at once: each keeps the storage busy, and all would be slower side by side.
pub(super) const TURNS: usize = 4;
/// So many are under way or in line at most; each has a thread.
const RUNNING_MAX: usize = 64;

/// Calls that are carried out with another one: each is a write when that ends. The ids of more are not kept; their repetitions find
/// what was made by its name.
const JOINED_MAX: usize = 100;
/// Between two looks whether an operation that waits for its turn was cancelled.
const LINE_PAUSE: Duration = Duration::from_millis(100);

/// What an operation makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationKind {
    /// Snapshots, all of one instant.
    Snapshot,
    /// A volume with the bytes of another, or of a snapshot.
    Clone,
    /// A volume's bytes, from one of its snapshots.
    Restore,
    /// Nothing: two of them are compared.
    Diff,
}

impl OperationKind {
    /// The word for it, in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Clone => "clone",
            Self::Restore => "restore",
            Self::Diff => "diff",
        }
    }
}

/// How an operation ended.
pub type OperationEnd = Result<(), Arc<super::LifecycleError>>;

/// What an operation is begun with.
#[derive(Debug, Clone)]
pub(super) struct OperationWanted {
    /// What it makes.
    pub kind: OperationKind,
    /// What it makes, in words: the names of volumes, or `VOLUME@NAME`.
    pub targets: Vec<String>,
    /// Volumes and snapshots that it makes or gives other bytes.
    pub made: Vec<Uuid>,
    /// Volumes and snapshots that it reads.
    pub read: Vec<Uuid>,
}

#[derive(Debug, Default)]
struct Progress {
    copy: Option<CopyHandle>,
    is_cancelled: bool,
    /// Calls of other ids that asked for the same, and wait for its end.
    joined: Vec<RequestKey>,
    /// What it makes is made: nobody joins any more.
    is_made: bool,
    end: Option<(OperationEnd, Instant, i64)>,
}

/// An operation; whoever has it can look at it for as long as it likes.
#[derive(Debug)]
pub struct Operation {
    id: Uuid,
    wanted: OperationWanted,
    started_at_ms: i64,
    progress: Mutex<Progress>,
    has_ended: watch::Sender<bool>,
}

impl Operation {
    fn new(wanted: OperationWanted) -> Self {
        let (id, started_at_ms) = (Uuid::new_v4(), now_ms());
        Self { id, wanted, started_at_ms, progress: Mutex::default(), has_ended: watch::Sender::new(false) }
    }

    /// One that makes snapshots of these names, and goes on.
    #[cfg(test)]
    pub(crate) fn of_snapshots(targets: &[&str]) -> Self {
        let targets = targets.iter().map(|&target| target.to_owned()).collect();
        let (made, read) = (Vec::new(), Vec::new());
        Self::new(OperationWanted { kind: OperationKind::Snapshot, targets, made, read })
    }

    /// Ends it as one that was cancelled.
    #[cfg(test)]
    pub(crate) fn end_cancelled(&self) {
        self.finish(Err(Arc::new(CopyError::Cancelled.into())));
    }

    /// The identity by which callers ask for it.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// What it makes.
    pub fn kind(&self) -> OperationKind {
        self.wanted.kind
    }

    /// What it makes, in words.
    pub fn targets(&self) -> &[String] {
        &self.wanted.targets
    }

    /// Whether something that it makes or compares is in the scope.
    pub fn is_seen_in(&self, scope: &Scope) -> bool {
        self.targets().iter().any(|target| scope.has_named(target))
    }

    /// Whether all of that is in the scope: whoever has that may cancel it. What is left of a volume that is gone has no name, and is in
    /// none but that of all.
    pub fn is_within(&self, scope: &Scope) -> bool {
        self.targets().iter().all(|target| scope.has_named(target))
    }

    /// Whether it makes this volume or snapshot, or gives it other bytes.
    pub fn makes(&self, uid: Uuid) -> bool {
        self.wanted.made.contains(&uid)
    }

    /// Whether it reads this volume or snapshot.
    pub fn reads(&self, uid: Uuid) -> bool {
        self.wanted.read.contains(&uid)
    }

    /// Milliseconds since the Unix epoch.
    pub fn started_at_ms(&self) -> i64 {
        self.started_at_ms
    }

    /// Milliseconds since the Unix epoch; 0 while it goes on.
    pub fn ended_at_ms(&self) -> i64 {
        self.progress().end.as_ref().map_or(0, |(_, _, ended_at_ms)| *ended_at_ms)
    }

    /// Bytes that are done, and how many there are in all.
    pub fn done_and_total_bytes(&self) -> (u64, u64) {
        self.progress().copy.as_ref().map_or((0, 0), CopyHandle::progress)
    }

    /// How it ended; `None`: it goes on.
    pub fn end(&self) -> Option<OperationEnd> {
        self.progress().end.as_ref().map(|(end, ..)| end.clone())
    }

    /// Waits at most so long for its end.
    pub async fn wait(&self, at_most: Duration) {
        let mut has_ended = self.has_ended.subscribe();
        // The sender is here, and so cannot be gone.
        let _ = tokio::time::timeout(at_most, has_ended.wait_for(|has_ended| *has_ended)).await;
    }

    /// The same for threads outside tokio; false: it goes on.
    pub fn blocking_wait(&self, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        while self.end().is_none() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Asks it to end soon.
    pub fn cancel(&self) {
        let mut progress = self.progress();
        progress.is_cancelled = true;
        if let Some(copy) = &progress.copy {
            copy.cancel();
        }
    }

    /// Has another call carried out with it, once however often it is repeated, and not more than [`JOINED_MAX`] of them. False: what it
    /// makes is made, and the call is carried out at once.
    pub(super) fn join(&self, request: &RequestKey) -> bool {
        let mut progress = self.progress();
        let is_new = !progress.joined.contains(request);
        if !progress.is_made && is_new && progress.joined.len() < JOINED_MAX {
            progress.joined.push(request.clone());
        }
        !progress.is_made
    }

    /// What it makes is made: the calls that were carried out with it.
    pub(super) fn made(&self) -> Vec<RequestKey> {
        let mut progress = self.progress();
        progress.is_made = true;
        std::mem::take(&mut progress.joined)
    }

    /// It copies from now on; waits for the end of that.
    pub(super) fn copies(&self, copy: &CopyHandle) -> Result<(), CopyError> {
        self.follow(copy);
        loop {
            if let Some(end) = copy.wait(Duration::from_secs(3600)) {
                return end;
            }
        }
    }

    /// It copies from now on.
    pub(super) fn follow(&self, copy: &CopyHandle) {
        let mut progress = self.progress();
        if progress.is_cancelled {
            copy.cancel();
        }
        progress.copy = Some(copy.clone());
    }

    /// Whether it is to end.
    pub(super) fn is_cancelled(&self) -> bool {
        self.progress().is_cancelled
    }

    fn finish(&self, end: OperationEnd) {
        self.progress().end.get_or_insert((end, Instant::now(), now_ms()));
        self.has_ended.send_replace(true);
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct State {
    /// In order of their beginning.
    all: VecDeque<Arc<Operation>>,
    turns_taken: usize,
    is_stopping: bool,
}

impl State {
    fn running(&self) -> impl Iterator<Item = &Arc<Operation>> {
        self.all.iter().filter(|operation| operation.end().is_none())
    }

    /// Drops those that ended long ago, and the oldest where there are too many.
    fn prune(&mut self, now: Instant) {
        let mut ended: usize = 0;
        // From the youngest.
        let mut keeps = |operation: &Arc<Operation>| match &operation.progress().end {
            None => true,
            Some((_, ended_at, _)) => {
                ended += 1;
                ended <= KEPT_MAX && now.saturating_duration_since(*ended_at) < KEPT
            }
        };
        let kept: Vec<bool> = self.all.iter().rev().map(&mut keeps).collect();
        let mut kept = kept.into_iter().rev();
        self.all.retain(|_| kept.next().unwrap_or(true));
    }
}

/// The operations of one process; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Operations {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    /// A turn was given back, or something was cancelled.
    changed: Condvar,
}

/// A turn to copy, until dropped.
#[derive(Debug)]
pub(super) struct Turn(Operations);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.state().turns_taken -= 1;
        self.0.inner.changed.notify_all();
    }
}

/// An operation that was begun and has to be ended: dropped without a word, it has failed.
#[derive(Debug)]
pub(super) struct Begun(Arc<Operation>);

impl Begun {
    pub(super) fn operation(&self) -> &Arc<Operation> {
        &self.0
    }

    pub(super) fn end(self, result: Result<(), super::LifecycleError>) {
        let operation = &self.0;
        let (operation_id, kind, targets) = (operation.id, operation.kind().as_str(), operation.targets());
        match &result {
            Ok(()) => tracing::info!(%operation_id, kind, ?targets, "operation done"),
            Err(error) => tracing::warn!(%operation_id, kind, ?targets, %error, "operation ended"),
        }
        operation.finish(result.map_err(Arc::new));
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        let silent = SnapshotError::Copy(CopyError::Failed("the operation ended without a word".to_owned()));
        self.0.finish(Err(Arc::new(silent.into())));
    }
}

impl Operations {
    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a new operation down.
    ///
    /// # Errors
    /// [`SnapshotError::Stopping`], [`SnapshotError::Busy`].
    pub(super) fn begin(&self, wanted: OperationWanted) -> Result<Begun, SnapshotError> {
        let mut state = self.state();
        if state.is_stopping {
            return Err(SnapshotError::Stopping);
        }
        if state.running().count() >= RUNNING_MAX {
            return Err(SnapshotError::Busy { running: RUNNING_MAX });
        }
        state.prune(Instant::now());
        let operation = Arc::new(Operation::new(wanted));
        state.all.push_back(Arc::clone(&operation));
        Ok(Begun(operation))
    }

    /// An operation that came to nothing before anybody was told of it.
    pub(super) fn forget(&self, begun: Begun) {
        let id = begun.operation().id;
        self.state().all.retain(|operation| operation.id != id);
    }

    /// The operation of that identity.
    pub fn get(&self, id: Uuid) -> Option<Arc<Operation>> {
        let mut state = self.state();
        state.prune(Instant::now());
        state.all.iter().find(|operation| operation.id == id).cloned()
    }

    /// All that there are, the latest first.
    pub fn list(&self) -> Vec<Arc<Operation>> {
        let mut state = self.state();
        state.prune(Instant::now());
        state.all.iter().rev().cloned().collect()
    }

    /// One that goes on and that holds.
    pub(super) fn find(&self, holds: impl Fn(&Operation) -> bool) -> Option<Arc<Operation>> {
        self.state().running().find(|operation| holds(operation)).cloned()
    }

    /// A turn to copy, where one is free.
    ///
    /// # Errors
    /// [`SnapshotError::Busy`]
    pub(super) fn try_turn(&self) -> Result<Turn, SnapshotError> {
        let mut state = self.state();
        if state.turns_taken >= TURNS {
            return Err(SnapshotError::Busy { running: state.turns_taken });
        }
        state.turns_taken += 1;
        Ok(Turn(self.clone()))
    }

    /// Waits in line for a turn.
    ///
    /// # Errors
    /// [`CopyError::Cancelled`]
    pub(super) fn turn(&self, operation: &Operation) -> Result<Turn, CopyError> {
        let mut state = self.state();
        loop {
            if operation.is_cancelled() {
                return Err(CopyError::Cancelled);
            }
            if state.turns_taken < TURNS {
                state.turns_taken += 1;
                return Ok(Turn(self.clone()));
            }
            let waited = self.inner.changed.wait_timeout(state, LINE_PAUSE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets no other begin, cancels those that go on, and waits at most so long for their end; false: some go on.
    pub async fn stop(&self, at_most: Duration) -> bool {
        let running: Vec<Arc<Operation>> = {
            let mut state = self.state();
            state.is_stopping = true;
            state.running().cloned().collect()
        };
        for operation in &running {
            operation.cancel();
        }
        let deadline = Instant::now() + at_most;
        for operation in &running {
            operation.wait(deadline.saturating_duration_since(Instant::now())).await;
        }
        running.iter().all(|operation| operation.end().is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> OperationWanted {
        let (made, read) = (vec![Uuid::new_v4()], Vec::new());
        OperationWanted { kind: OperationKind::Clone, targets: vec!["v".to_owned()], made, read }
    }

    #[test]
    fn an_operation_without_a_word_has_failed() {
        let operations = Operations::default();
        let begun = operations.begin(wanted()).unwrap();
        let operation = Arc::clone(begun.operation());
        assert!(operation.end().is_none() && operation.ended_at_ms() == 0);
        drop(begun);
        assert!(operation.end().unwrap().is_err() && operation.ended_at_ms() > 0);
    }

    #[test]
    fn a_tenant_sees_what_is_partly_its_own_and_has_within_what_is_wholly_so() {
        let acme = Scope::Tenants(Arc::new(["acme".to_owned()].into()));
        for (targets, is_seen, is_within) in [
            (&["acme+db@s"] as &[&str], true, true),
            (&["acme+db@s", "acme+logs@s"], true, true),
            (&["acme+db@s", "b+db@s"], true, false),
            (&["b+db@s"], false, false),
            (&["db", "@7"], false, false),
        ] {
            let operation = Operation::of_snapshots(targets);
            assert_eq!(
                (operation.is_seen_in(&acme), operation.is_within(&acme)),
                (is_seen, is_within),
                "{targets:?}"
            );
            assert!(operation.is_seen_in(&Scope::All) && operation.is_within(&Scope::All));
        }
    }

    #[test]
    fn whoever_joins_when_it_is_made_is_carried_out_at_once() {
        let operation = Operation::new(wanted());
        let request =
            RequestKey { request_id: Uuid::from_u128(1), scope: String::new(), fingerprint: String::new() };
        assert!(operation.join(&request));
        assert_eq!(operation.made(), std::slice::from_ref(&request));
        assert!(!operation.join(&request) && operation.made().is_empty());
    }

    #[test]
    fn only_so_many_that_ended_are_kept_and_none_that_goes_on_is_dropped() {
        let operations = Operations::default();
        let running = operations.begin(wanted()).unwrap();
        for _ in 0..KEPT_MAX + 5 {
            operations.begin(wanted()).unwrap().end(Ok(()));
        }
        assert_eq!(operations.list().len(), KEPT_MAX + 1);
        assert!(operations.get(running.operation().id()).is_some());
        // An hour later.
        operations.state().prune(Instant::now() + KEPT);
        assert_eq!(operations.list().len(), 1);
    }

    #[test]
    fn turns_are_few_and_whoever_waits_can_be_cancelled() {
        let operations = Operations::default();
        let turns: Vec<Turn> = (0..TURNS).map(|_| operations.try_turn().unwrap()).collect();
        assert!(matches!(operations.try_turn(), Err(SnapshotError::Busy { running: TURNS })));
        let (first, second) = (operations.begin(wanted()).unwrap(), operations.begin(wanted()).unwrap());
        let in_line = |begun: &Begun| {
            let (operations, operation) = (operations.clone(), Arc::clone(begun.operation()));
            std::thread::spawn(move || operations.turn(&operation).map(drop))
        };
        let (first_waits, second_waits) = (in_line(&first), in_line(&second));
        second.operation().cancel();
        assert_eq!(second_waits.join().unwrap(), Err(CopyError::Cancelled));
        assert!(!first_waits.is_finished());
        drop(turns);
        assert_eq!(first_waits.join().unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn a_stop_cancels_what_goes_on_and_lets_nothing_begin() {
        let operations = Operations::default();
        let begun = operations.begin(wanted()).unwrap();
        let (copy, report) = crate::volume::copying::begin();
        begun.operation().follow(&copy);
        assert!(!operations.stop(Duration::from_millis(1)).await, "it goes on");
        assert!(report.is_cancelled());
        assert!(matches!(operations.begin(wanted()), Err(SnapshotError::Stopping)));
        begun.end(Ok(()));
        assert!(operations.stop(Duration::ZERO).await);
    }
}
