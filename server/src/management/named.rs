//! Which volume a call is about: callers give its name, or `uid:UUID`.
//!
//! Owns the step from what was asked to a name that is locked. A uid's name is looked at again once it is locked: by then
//! the volume may be gone, or renamed, and its name another volume's. What is outside of the caller's scope is not there, in the same
//! words. Called by the service.

use tonic::Status;

use super::ManagementService;
use crate::catalog::{SnapshotRecord, SnapshotState, VolumeRecord};
use crate::lifecycle::{
    DataSide, Lifecycle, LifecycleError, NameLock, SettingsError, SnapshotError, SnapshotNamed,
};
use crate::scope::Scope;
use crate::status;

/// Before a volume's uid. No name has a colon.
pub(super) const UID_PREFIX: &str = "uid:";

/// A volume as a caller asked for it, and its name.
#[derive(Debug, Clone)]
pub(super) struct Named {
    asked: String,
    pub(super) name: String,
}

impl Named {
    /// To be asked under the name's lock: that it is still this volume's.
    pub(super) fn check<D: DataSide>(&self, lifecycle: &Lifecycle<D>) -> Result<(), LifecycleError> {
        let is_still =
            !self.asked.starts_with(UID_PREFIX) || lifecycle.volume_name(&self.asked)? == self.name;
        if is_still { Ok(()) } else { Err(SettingsError::RenamedMeanwhile(self.asked.clone()).into()) }
    }
}

fn within(scope: &Scope, named: Named) -> Result<Named, LifecycleError> {
    if scope.has_named(&named.name) { Ok(named) } else { Err(LifecycleError::VolumeNotFound(named.asked)) }
}

/// The ready volume, if it is in the scope.
pub(super) fn volume_within<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    scope: &Scope,
    asked: &str,
) -> Result<VolumeRecord, LifecycleError> {
    let found = lifecycle.volume(asked)?;
    if scope.has_named(&found.name) {
        Ok(found)
    } else {
        Err(LifecycleError::VolumeNotFound(asked.to_owned()))
    }
}

/// The snapshot, if it is in the scope.
pub(super) fn snapshot_within<D: DataSide>(
    lifecycle: &Lifecycle<D>,
    scope: &Scope,
    named: &SnapshotNamed,
) -> Result<(SnapshotRecord, SnapshotState), LifecycleError> {
    let found = lifecycle.snapshot(named)?;
    let is_within = scope.has(&found.0.tenant);
    if is_within { Ok(found) } else { Err(SnapshotError::NotFound(named.to_string()).into()) }
}

impl<D: DataSide> ManagementService<D> {
    /// The volume's name, as it is now; one outside of the scope is not there.
    pub(super) async fn named(&self, scope: &Scope, asked: String) -> Result<Named, LifecycleError> {
        if !asked.starts_with(UID_PREFIX) {
            return within(scope, Named { name: asked.clone(), asked });
        }
        let name = {
            let asked = asked.clone();
            self.look(move |lifecycle| lifecycle.volume_name(&asked)).await?
        };
        within(scope, Named { asked, name })
    }

    /// Locks the volume's name.
    pub(super) async fn lock_volume(&self, scope: &Scope, asked: String) -> Result<NameLock, LifecycleError> {
        loop {
            let named = self.named(scope, asked.clone()).await?;
            let lock = self.locks.lock(&named.name).await;
            if !asked.starts_with(UID_PREFIX) {
                return Ok(lock);
            }
            match self.look(move |lifecycle| named.check(lifecycle)).await {
                // Whoever waits for a volume that is renamed still means that volume.
                Err(LifecycleError::Settings(SettingsError::RenamedMeanwhile(_))) => {}
                checked => return checked.map(|()| lock),
            }
        }
    }

    /// The same, as the call is answered.
    pub(super) async fn locked(&self, scope: &Scope, asked: String) -> Result<NameLock, Status> {
        self.lock_volume(scope, asked).await.map_err(|error| status::from_lifecycle(&error))
    }

    /// Runs a short look; the answer is the lifecycle's own, or why it could not be asked.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Lifecycle<D>) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<T, LifecycleError> {
        match self.outcome(&self.calls.looks, call).await {
            Ok(outcome) => outcome,
            Err(_) => Err(crate::lifecycle::SnapshotError::Stopping.into()),
        }
    }
}
