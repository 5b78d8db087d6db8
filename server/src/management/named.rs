//! Which volume a call is about: callers give its name, or `uid:UUID`.
//!
//! Owns the step from what was asked to a name that is locked. A uid's name is looked at again once it is locked: by then
//! the volume may be gone, or renamed, and its name another volume's. Called by the service.

use tonic::Status;

use super::ManagementService;
use crate::lifecycle::{DataSide, Lifecycle, LifecycleError, NameLock, SettingsError};
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

impl<D: DataSide> ManagementService<D> {
    /// The volume's name, as it is now.
    pub(super) async fn named(&self, asked: String) -> Result<Named, LifecycleError> {
        if !asked.starts_with(UID_PREFIX) {
            return Ok(Named { name: asked.clone(), asked });
        }
        let name = {
            let asked = asked.clone();
            self.look(move |lifecycle| lifecycle.volume_name(&asked)).await?
        };
        Ok(Named { asked, name })
    }

    /// Locks the volume's name.
    pub(super) async fn lock_volume(&self, asked: String) -> Result<NameLock, LifecycleError> {
        loop {
            let named = self.named(asked.clone()).await?;
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
    pub(super) async fn locked(&self, asked: String) -> Result<NameLock, Status> {
        self.lock_volume(asked).await.map_err(|error| status::from_lifecycle(&error))
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
