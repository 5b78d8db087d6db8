//! The calls that make, change and delete a volume itself.
//!
//! Owns their locks, and that a caller's etag is looked at with the name locked. Called by the service, which has looked at the caller's
//! rights.

use proto::v1;
use tonic::Status;

use super::authorization::{require_all, require_inside};
use super::fields::{self, Fields};
use super::{ManagementService, messages, settings_fields, update_mask};
use crate::lifecycle::{DataSide, Lifecycle, LifecycleError};
use crate::scope::Scope;
use crate::status;

impl<D: DataSide> ManagementService<D> {
    pub(super) async fn make_volume(
        &self,
        scope: Scope,
        request: v1::CreateVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        if !request.adopt_path.is_empty() {
            require_all(&scope)?;
            let wanted = settings_fields::adopt_wanted(request)?;
            let lock = self.locks.lock(&wanted.new.name).await;
            let adopt = move |lifecycle: &Lifecycle<D>| {
                let volume = lifecycle.adopt_volume(&lock, &wanted)?;
                messages::followed(lifecycle, volume)
            };
            return Ok(self.blocking(adopt).await?.into_inner());
        }
        let new = settings_fields::new_volume(request)?;
        require_inside(&scope, &new.name)?;
        let lock = self.locks.lock(&new.name).await;
        let made = self.blocking(move |lifecycle| {
            let volume = lifecycle.create_volume(&lock, &new)?;
            messages::volume(lifecycle, &volume)
        });
        Ok(made.await?.into_inner())
    }

    pub(super) async fn grow_volume(
        &self,
        scope: Scope,
        mut request: v1::ResizeVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let etag = std::mem::take(&mut request.etag);
        let (name, capacity_bytes) = fields::resize_wanted(request)?;
        let lock = self.locked(&scope, name).await?;
        let grown = self.blocking(move |lifecycle| {
            lifecycle.require_etag(lock.name(), &etag)?;
            let volume = lifecycle.resize_volume(&lock, capacity_bytes)?;
            messages::followed(lifecycle, volume)
        });
        Ok(grown.await?.into_inner())
    }

    pub(super) async fn remove_volume(
        &self,
        scope: Scope,
        request: v1::DeleteVolumeRequest,
    ) -> Result<v1::DeleteVolumeResponse, Status> {
        let v1::DeleteVolumeRequest { name, keep_snapshots, etag, .. } = request;
        let mut fields = Fields::default();
        let name = fields.volume("name", name);
        fields.finish()?;
        let lock = match self.lock_volume(&scope, name).await {
            Err(LifecycleError::VolumeNotFound(_)) => {
                return Ok(v1::DeleteVolumeResponse { existed: false });
            }
            lock => lock.map_err(|error| status::from_lifecycle(&error))?,
        };
        let removed = self.blocking(move |lifecycle| {
            lifecycle.require_etag(lock.name(), &etag)?;
            let existed = lifecycle.delete_volume(&lock, keep_snapshots)?;
            Ok(v1::DeleteVolumeResponse { existed })
        });
        Ok(removed.await?.into_inner())
    }

    pub(super) async fn change_properties(
        &self,
        scope: Scope,
        mut request: v1::UpdateVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let etag = std::mem::take(&mut request.etag);
        let (name, wanted) = update_mask::properties_wanted(request)?;
        let lock = self.locked(&scope, name).await?;
        let changed = self.blocking(move |lifecycle| {
            lifecycle.require_etag(lock.name(), &etag)?;
            let volume = lifecycle.update_volume(&lock, &wanted)?;
            messages::volume(lifecycle, &volume)
        });
        Ok(changed.await?.into_inner())
    }

    pub(super) async fn change_limits(
        &self,
        scope: Scope,
        mut request: v1::SetVolumeLimitsRequest,
    ) -> Result<v1::Volume, Status> {
        let etag = std::mem::take(&mut request.etag);
        let (name, limits) = settings_fields::limits_wanted(request)?;
        let lock = self.locked(&scope, name).await?;
        let changed = self.blocking(move |lifecycle| {
            lifecycle.require_etag(lock.name(), &etag)?;
            let volume = lifecycle.set_limits(&lock, limits)?;
            messages::volume(lifecycle, &volume)
        });
        Ok(changed.await?.into_inner())
    }
}
