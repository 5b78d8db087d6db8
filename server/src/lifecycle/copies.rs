//! What snapshots, clones and restores have in common: a copy that goes on behind the call, and who is kept out meanwhile.
//!
//! Owns the operations' threads. Called by `snapshots.rs`, `clones.rs` and `restore.rs`, with their locks held.

use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use super::operations::{Begun, Operation, OperationKind, Operations};
use super::snapshot_error::SnapshotError;
use super::{DataSide, Lifecycle, LifecycleError};
use crate::catalog::Carried;
use crate::volume::copying::CopyError;

/// What was begun, or was there already.
#[derive(Debug)]
pub struct Started<T> {
    /// What is made.
    pub made: T,
    /// What makes it; `None`: it is there.
    pub operation: Option<Arc<Operation>>,
}

impl<D: DataSide> Lifecycle<D> {
    /// The operations of this process.
    pub fn operations(&self) -> &Operations {
        &self.operations
    }

    /// Refuses while an operation goes on that holds.
    ///
    /// # Errors
    /// [`SnapshotError::InProgress`], of `name`.
    pub(super) fn refuse_while(
        &self,
        name: &str,
        holds: impl Fn(&Operation) -> bool,
    ) -> Result<(), LifecycleError> {
        match self.operations.find(holds) {
            None => Ok(()),
            Some(operation) => Err(SnapshotError::InProgress {
                name: name.to_owned(),
                kind: operation.kind(),
                operation_id: operation.id(),
            }
            .into()),
        }
    }

    /// What the call has made, where it was carried out while this repetition of it waited for its locks: its first one is answered as soon
    /// as its operation has begun, and what that made may be gone by now. Asked with the locks held.
    ///
    /// # Errors
    /// The catalog's failure.
    pub(super) fn carried_out(&self) -> Result<Option<String>, LifecycleError> {
        Ok(match self.catalog.carried()? {
            Carried::Out { subject, .. } => Some(subject),
            Carried::NotYet | Carried::Another => None,
        })
    }

    /// The same of a call that makes one volume, with the operation that still goes on.
    ///
    /// # Errors
    /// The catalog's failure.
    pub(super) fn made_already(&self, kind: OperationKind) -> Result<Option<Started<Uuid>>, LifecycleError> {
        let made = self.carried_out()?.and_then(|subject| subject.parse().ok());
        Ok(made.map(|made| {
            let is_this = |operation: &Operation| operation.kind() == kind && operation.makes(made);
            Started { made, operation: self.operations.find(is_this) }
        }))
    }

    /// The call wants what an operation is making already: it is carried out when that is made, which `subject` says.
    ///
    /// # Errors
    /// The catalog's failure.
    pub(super) fn join(
        &self,
        operation: Option<&Arc<Operation>>,
        subject: &str,
    ) -> Result<(), LifecycleError> {
        let (Some(operation), Some(request)) = (operation, self.catalog.request()) else { return Ok(()) };
        if !operation.join(request) {
            self.catalog.note_carried_out(subject)?;
        }
        Ok(())
    }

    /// What the operation makes is made: so are the calls that have joined it. One that cannot be written down is known by what it made.
    pub(super) fn carry_out_joined(&self, operation: &Operation, subject: &str) {
        for request in operation.made() {
            if let Err(error) = self.catalog.under(request).note_carried_out(subject) {
                tracing::warn!(%error, "cannot write down the id of a call that asked for what is made already");
            }
        }
    }

    /// Lets the operation go on in a thread of its own, which does `work` to its end. Where there can be no thread, it is cancelled
    /// and ended here.
    pub(super) fn go_on(
        &self,
        begun: Begun,
        work: impl FnOnce(&Operation) -> Result<(), LifecycleError> + Send + 'static,
    ) -> Arc<Operation> {
        let operation = Arc::clone(begun.operation());
        // Both this thread and the new one can take it, whichever runs it.
        let work = Arc::new(Mutex::new(Some((begun, work))));
        let in_thread = Arc::clone(&work);
        let spawned = std::thread::Builder::new().name("operation".into()).spawn(move || run(&in_thread));
        if let Err(error) = spawned {
            tracing::error!(%error, hint = daemon_log::THREAD_LIMITS, "cannot start a thread for an operation: it is cancelled");
            operation.cancel();
            run(&work);
        }
        operation
    }
}

fn run<F: FnOnce(&Operation) -> Result<(), LifecycleError>>(work: &Mutex<Option<(Begun, F)>>) {
    let taken = work.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((begun, work)) = taken {
        let ended = work(begun.operation());
        begun.end(ended);
    }
}

impl From<CopyError> for LifecycleError {
    fn from(error: CopyError) -> Self {
        SnapshotError::Copy(error).into()
    }
}
