//! The call that gives a volume another name.
//!
//! Owns: that both names are locked, and that a caller who waited while another renamed the volume still means that volume. Called by the
//! service, which has looked at the caller's rights.

use proto::v1;
use tonic::Status;

use super::authorization::require_inside;
use super::fields::Fields;
use super::{ManagementService, messages};
use crate::lifecycle::{DataSide, LifecycleError, SettingsError};
use crate::scope::Scope;
use crate::status;

impl<D: DataSide> ManagementService<D> {
    /// Gives a volume another name, with both names locked.
    pub(super) async fn rename(
        &self,
        scope: Scope,
        request: v1::RenameVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let mut fields = Fields::default();
        let asked = fields.volume("name", request.name);
        let new_name = fields.volume_name("new_name", request.new_name);
        let etag = request.etag;
        fields.finish()?;
        require_inside(&scope, &new_name)?;
        loop {
            let named =
                self.named(&scope, asked.clone()).await.map_err(|error| status::from_lifecycle(&error))?;
            let locks = self.lock_all(&[named.name.clone(), new_name.clone()]).await;
            let (new_name, etag) = (new_name.clone(), etag.clone());
            let renamed = self.outcome(&self.calls.permits, move |lifecycle| {
                named.check(lifecycle)?;
                lifecycle.require_etag(&named.name, &etag)?;
                let volume = lifecycle.rename_volume(&locks, &named.name, &new_name)?;
                messages::volume(lifecycle, &volume)
            });
            match renamed.await? {
                Err(LifecycleError::Settings(SettingsError::RenamedMeanwhile(_))) => {}
                renamed => return renamed.map_err(|error| status::from_lifecycle(&error)),
            }
        }
    }
}
