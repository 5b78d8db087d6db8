//! Snapshots of file systems that nodes freeze: what is asked of the nodes in the answers of their heartbeats, and the snapshot in between.
//!
//! ```text
//!   CreateSnapshot ─▶ who has the volumes ─▶ asked in the answer of their heartbeats ─▶ all say FROZEN ─▶ the instant ─▶ asked to thaw
//!     ─▶ all say WAS_FROZEN ─▶ called frozen
//!      └▶ one says otherwise, or nothing in time ─▶ deleted
//! ```
//! Owns: the time that each step may take, and the order above. Never: decides what a node is told (`core.rs`), or whose the volumes are (the
//! lifecycle does). A call that is given up, by its caller or by the server's end, leaves snapshots that are not called frozen, or none.
//! Called by the service, which has looked at the caller's rights.

mod core;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::v1;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tonic::Status;
use uuid::Uuid;

use self::core::{Core, Standing};
pub(super) use self::core::{Parts, Report, Said, Wanted};
use super::ManagementService;
use super::fields::Fields;
use super::snapshot_fields as fields;
use super::snapshots::TURN_WAIT_MAX;
use crate::lifecycle::{
    DataSide, FreezeError, FreezePlan, Lifecycle, LifecycleError, NameLock, Operation, SnapshotError,
    Started, snapshot_lock_name,
};
use crate::scope::Scope;
use crate::status;

/// Freezes that a node tells of at once.
const FREEZES_MAX: usize = 64;
/// Bytes of why something was not frozen.
const REASON_BYTES_MAX: usize = 512;
/// The longest that a heartbeat's answer waits.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// Until a node says that it was asked: one that does not wait for the answers of its heartbeats has another one meanwhile.
const ANSWER_MAX: Duration = Duration::from_secs(15);
/// Until everything is frozen: a node writes what is dirty for 60 s at most, and freezes for 10 s.
const FREEZE_MAX: Duration = Duration::from_secs(75);
/// From the first node that has frozen to the last: a freeze ends by itself after 10 s.
const ALL_MAX: Duration = Duration::from_secs(6);
/// Until the nodes tell of the thaw, for which they take 10 s at most.
const THAW_MAX: Duration = Duration::from_secs(15);

/// The freezes that nodes are asked for.
#[derive(Debug, Clone)]
pub(super) struct Freezes {
    core: Arc<Mutex<Core>>,
    /// Sent whenever something stands differently; true: the server stops.
    changed: watch::Sender<bool>,
}

impl Default for Freezes {
    fn default() -> Self {
        Self { core: Arc::default(), changed: watch::Sender::new(false) }
    }
}

/// Why a freeze is not waited for any longer.
#[derive(Debug)]
enum GivenUp {
    Stopping,
    /// It was not frozen.
    Failed(String),
}

impl GivenUp {
    fn status(self, error: impl Fn(String) -> FreezeError) -> Status {
        match self {
            Self::Stopping => status::stopping(),
            Self::Failed(why) => status::from_lifecycle(&error(why).into()),
        }
    }
}

impl Freezes {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        self.changed.send_modify(|_| {});
    }

    /// Ends every wait.
    pub(super) fn stop(&self) {
        self.changed.send_replace(true);
    }

    /// Takes what a node says, and waits until there is something that it is to do; nothing where there is none in time.
    pub(super) async fn answer(&self, report: &Report, wait: Duration) -> Vec<Wanted> {
        let mut changed = self.changed.subscribe();
        let has_changed = self.core().heard(report);
        if has_changed {
            self.tell();
        }
        let give_up = Instant::now() + wait.min(WAIT_MAX);
        loop {
            let is_stopping = *changed.borrow_and_update();
            let wanted = self.core().wanted(report);
            if is_stopping || !wanted.is_empty() {
                return wanted;
            }
            if !matches!(timeout_at(give_up, changed.changed()).await, Ok(Ok(()))) {
                return Vec::new();
            }
        }
    }

    /// Asks nodes to freeze, when nothing of it is in another freeze.
    async fn ask(&self, freeze_id: Uuid, parts: &Parts) -> Result<Asked, GivenUp> {
        let mut changed = self.changed.subscribe();
        let give_up = Instant::now() + TURN_WAIT_MAX;
        loop {
            if *changed.borrow_and_update() {
                return Err(GivenUp::Stopping);
            }
            let has_begun = self.core().begin(freeze_id, parts);
            if has_begun {
                self.tell();
                return Ok(Asked { freezes: self.clone(), freeze_id });
            }
            if timeout_at(give_up, changed.changed()).await.is_err() {
                let why = "another snapshot has it frozen all the time".to_owned();
                return Err(GivenUp::Failed(why));
            }
        }
    }
}

/// A freeze that nodes were asked for; what is frozen of it is thawed when this is dropped.
#[derive(Debug)]
struct Asked {
    freezes: Freezes,
    freeze_id: Uuid,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.freezes.core().forget(self.freeze_id);
        self.freezes.tell();
    }
}

impl Asked {
    /// Waits until everything is frozen.
    async fn frozen(&self) -> Result<(), GivenUp> {
        let (began, mut first_frozen) = (Instant::now(), None);
        self.wait(|standing| match standing {
            Standing::Frozen => Next::Done,
            Standing::Freezing { waits_for, has_frozen } => {
                let mut limit = match waits_for {
                    Some(node_id) => (
                        began + ANSWER_MAX,
                        format!(
                            "nothing was heard of the node daemon of {node_id} within {} s",
                            ANSWER_MAX.as_secs()
                        ),
                    ),
                    None => {
                        (began + FREEZE_MAX, format!("it is not frozen after {} s", FREEZE_MAX.as_secs()))
                    }
                };
                if has_frozen {
                    let all_by = *first_frozen.get_or_insert_with(Instant::now) + ALL_MAX;
                    if all_by < limit.0 {
                        let why =
                            format!("the nodes have not frozen all of it within {} s", ALL_MAX.as_secs());
                        limit = (all_by, why);
                    }
                }
                Next::Until(limit.0, limit.1)
            }
            Standing::Thawing | Standing::Over(Ok(())) => Next::Failed("it is thawed already".to_owned()),
            Standing::Over(Err(why)) => Next::Failed(why),
        })
        .await
    }

    /// Has it thawed, and waits until it is known whether it was frozen until then.
    async fn thawed(&self) -> Result<(), GivenUp> {
        self.freezes.core().thaw(self.freeze_id);
        self.freezes.tell();
        let limit = Instant::now() + THAW_MAX;
        self.wait(|standing| match standing {
            Standing::Over(Ok(())) => Next::Done,
            Standing::Over(Err(why)) => Next::Failed(why),
            Standing::Freezing { .. } | Standing::Frozen | Standing::Thawing => {
                let why = format!("the nodes have not told of the thaw within {} s", THAW_MAX.as_secs());
                Next::Until(limit, why)
            }
        })
        .await
    }

    async fn wait(&self, mut next: impl FnMut(Standing) -> Next) -> Result<(), GivenUp> {
        let mut changed = self.freezes.changed.subscribe();
        loop {
            if *changed.borrow_and_update() {
                return Err(GivenUp::Stopping);
            }
            let standing = self.freezes.core().standing(self.freeze_id);
            let (limit, why) = match next(standing) {
                Next::Done => return Ok(()),
                Next::Failed(why) => return Err(GivenUp::Failed(why)),
                Next::Until(limit, why) => (limit, why),
            };
            if timeout_at(limit, changed.changed()).await.is_err() {
                self.freezes.core().give_up(self.freeze_id, why.clone());
                self.freezes.tell();
                return Err(GivenUp::Failed(why));
            }
        }
    }
}

/// What a wait goes on with.
enum Next {
    Done,
    Failed(String),
    /// It is given up then, for that reason.
    Until(Instant, String),
}

impl Fields {
    /// What a node says of the freezes that it knows.
    pub(super) fn freeze_report(
        &mut self,
        node_id: String,
        daemon_id: &str,
        freezes: Vec<v1::NodeFreeze>,
    ) -> Report {
        let daemon_id = match daemon_id {
            "" => String::new(),
            text => self.uuid("daemon_id", text).to_string(),
        };
        self.require(freezes.len() <= FREEZES_MAX, "freezes", || format!("must be at most {FREEZES_MAX}"));
        let mut said = BTreeMap::new();
        for freeze in freezes.into_iter().take(FREEZES_MAX) {
            let state = freeze.state();
            let why = self.word("freezes.reason", freeze.reason, REASON_BYTES_MAX);
            let is_known = state != v1::NodeFreezeState::Unspecified;
            self.require(is_known, "freezes.state", || "must be one of the API's".to_owned());
            let state = match state {
                v1::NodeFreezeState::Unspecified | v1::NodeFreezeState::Freezing => Said::Freezing,
                v1::NodeFreezeState::Frozen => Said::Frozen,
                v1::NodeFreezeState::Thawing => Said::Thawing,
                v1::NodeFreezeState::WasFrozen => Said::WasFrozen,
                v1::NodeFreezeState::NotFrozen => Said::NotFrozen(why),
            };
            said.insert(self.uuid("freezes.freeze_id", &freeze.freeze_id), state);
        }
        Report { node_id, daemon_id, freezes: said }
    }
}

/// As a node is told it.
pub(super) fn message(wanted: Wanted) -> v1::WantedFreeze {
    match wanted {
        Wanted::Freeze(freeze_id, attachment_ids) => v1::WantedFreeze {
            freeze_id: freeze_id.to_string(),
            attachment_ids: attachment_ids.iter().map(Uuid::to_string).collect(),
            thaw: false,
        },
        Wanted::Thaw(freeze_id) => {
            v1::WantedFreeze { freeze_id: freeze_id.to_string(), attachment_ids: Vec::new(), thaw: true }
        }
    }
}

impl<D: DataSide> ManagementService<D> {
    /// Takes snapshots of what nodes freeze meanwhile.
    pub(super) async fn take_frozen_snapshots(
        &self,
        scope: Scope,
        request: v1::CreateSnapshotRequest,
    ) -> Result<v1::CreateSnapshotResponse, Status> {
        let (asked, name, freeze_id) = fields::snapshots_wanted(request)?;
        let freeze_id = freeze_id.unwrap_or_else(Uuid::new_v4);
        let (volumes, volume_names) = self.found_volumes(&scope, asked).await?;
        let plan = {
            let (names, name) = (volume_names.clone(), name.clone());
            move |lifecycle: &Lifecycle<D>, locks: &[NameLock]| {
                let plan = lifecycle.freeze_plan(locks, &names, &name)?;
                let operation = match &plan {
                    FreezePlan::There(made) => lifecycle.operation_that_makes(made),
                    FreezePlan::Freeze(_) => None,
                };
                Ok(Started { made: plan, operation })
            }
        };
        let planned = self.begin_in_turn(&volume_names, TURN_WAIT_MAX, plan).await?;
        let parts = match planned.made {
            FreezePlan::There(made) => return self.snapshots_made(scope, made, planned.operation).await,
            FreezePlan::Freeze(parts) => parts,
        };
        let asked = self.calls.freezes.ask(freeze_id, &parts).await;
        let freeze = asked.map_err(|given_up| given_up.status(FreezeError::NotFrozen))?;
        freeze.frozen().await.map_err(|given_up| given_up.status(FreezeError::NotFrozen))?;
        let begin = {
            let names = volume_names.clone();
            move |lifecycle: &Lifecycle<D>, locks: &[NameLock]| {
                volumes.iter().try_for_each(|volume| volume.check(lifecycle))?;
                // Whoever has the volumes now is who was asked.
                match lifecycle.freeze_plan(locks, &names, &name)? {
                    FreezePlan::There(made) => {
                        let operation = lifecycle.operation_that_makes(&made);
                        Ok(Started { made: (made, false), operation })
                    }
                    FreezePlan::Freeze(now) if now != parts => Err(FreezeError::Moved.into()),
                    FreezePlan::Freeze(_) => {
                        let taken = lifecycle.create_snapshots(locks, &names, &name, Some(freeze_id))?;
                        Ok(Started { made: (taken.made, true), operation: taken.operation })
                    }
                }
            }
        };
        let taken = self.start(volume_names, true, begin).await;
        let held = freeze.thawed().await;
        drop(freeze);
        let Started { made: (made, is_new), operation } = taken?;
        if is_new {
            if let Err(given_up) = held {
                return Err(self.discard(made, given_up).await?);
            }
            self.call_frozen(made.clone(), operation.as_deref()).await?;
        }
        self.snapshots_made(scope, made, operation).await
    }

    /// Says of the snapshots that they are of frozen file systems, unless there are none any more: then, why.
    async fn call_frozen(&self, made: Vec<Uuid>, operation: Option<&Operation>) -> Result<(), Status> {
        let marked = self.outcome(&self.calls.permits, move |lifecycle| lifecycle.mark_these_frozen(&made));
        match (marked.await?, operation.and_then(Operation::end)) {
            (Ok(()), _) => Ok(()),
            (Err(LifecycleError::Snapshot(SnapshotError::NotFound(_))), Some(Err(error))) => {
                Err(status::from_lifecycle(&error))
            }
            (Err(error), _) => Err(status::from_lifecycle(&error)),
        }
    }

    /// Deletes snapshots that are not what was asked for: what the caller is told.
    async fn discard(&self, made: Vec<Uuid>, given_up: GivenUp) -> Result<Status, Status> {
        if !matches!(given_up, GivenUp::Stopping) {
            for snapshot_uid in made {
                let lock = self.locks.lock(&snapshot_lock_name(snapshot_uid)).await;
                self.blocking(move |lifecycle| lifecycle.delete_snapshot(&lock, snapshot_uid)).await?;
            }
        }
        Ok(given_up.status(FreezeError::NotHeld))
    }
}
