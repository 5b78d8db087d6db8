//! What snapshots, clones and restores have in common: a copy that goes on behind the call, and who is kept out meanwhile.
//!
//! Owns the operations' threads. Called by `snapshots.rs`, `clones.rs` and `restore.rs`, with their locks held.

use std::sync::{Arc, Mutex, PoisonError};

use super::operations::{Begun, Operation, Operations};
use super::snapshot_error::SnapshotError;
use super::{DataSide, Lifecycle, LifecycleError};
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
