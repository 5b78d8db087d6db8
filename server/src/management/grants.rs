//! The calls about grants: which node may attach which volume.
//!
//! Owns their fields' rules and their messages. Called by the service, which has looked at the caller's rights.

use proto::v1;
use tonic::Status;

use super::fields::Fields;
use super::page_token::{PageToken, page_limit};
use super::{ManagementService, messages};
use crate::catalog::GrantFilter;
use crate::lifecycle::{DataSide, GrantWanted, LifecycleError};
use crate::scope::Scope;
use crate::status;

impl<D: DataSide> ManagementService<D> {
    pub(super) async fn make_grant(
        &self,
        scope: Scope,
        request: v1::CreateGrantRequest,
    ) -> Result<v1::Grant, Status> {
        let mut fields = Fields::default();
        let asked = fields.volume("volume_name", request.volume_name);
        let wanted = GrantWanted {
            node_id: fields.node_id("node_id", request.node_id),
            read_only: request.read_only,
            node_must_be_registered: request.node_must_be_registered,
        };
        fields.finish()?;
        let lock = self.locked(&scope, asked).await?;
        let granted = self.blocking(move |lifecycle| {
            let (volume, grant) = lifecycle.create_grant(&lock, &wanted)?;
            Ok(messages::grant(&volume.name, &grant))
        });
        Ok(granted.await?.into_inner())
    }

    pub(super) async fn end_grant(
        &self,
        scope: Scope,
        request: v1::DeleteGrantRequest,
    ) -> Result<v1::DeleteGrantResponse, Status> {
        let mut fields = Fields::default();
        let asked = fields.volume("volume_name", request.volume_name);
        let node_id = fields.node_id("node_id", request.node_id);
        fields.finish()?;
        let lock = match self.lock_volume(&scope, asked).await {
            Err(LifecycleError::VolumeNotFound(_)) => return Ok(v1::DeleteGrantResponse::default()),
            lock => lock.map_err(|error| status::from_lifecycle(&error))?,
        };
        let ended =
            self.blocking(move |lifecycle| lifecycle.delete_grant(&lock, &node_id)).await?.into_inner();
        Ok(v1::DeleteGrantResponse { existed: ended.existed, was_attached: ended.was_attached })
    }

    pub(super) async fn page_of_grants(
        &self,
        scope: Scope,
        request: v1::ListGrantsRequest,
    ) -> Result<v1::ListGrantsResponse, Status> {
        let v1::ListGrantsRequest { volume_name, node_id, page_size, page_token } = request;
        let mut fields = Fields::default();
        let asked = (!volume_name.is_empty()).then(|| fields.volume("volume_name", volume_name));
        let node_id = (!node_id.is_empty()).then(|| fields.node_id("node_id", node_id));
        let token = PageToken::new("grants", self.lifecycle.catalog().server_id());
        let after = token.read_pair(&page_token);
        fields.require(after.is_some(), "page_token", || "is not a token of this list and server".to_owned());
        fields.finish()?;
        let volume_name = match asked {
            None => None,
            Some(asked) => match self.named(&scope, asked).await {
                Ok(named) => Some(named.name),
                // Where there is no such volume, nobody has a grant of it.
                Err(LifecycleError::VolumeNotFound(asked)) => Some(asked),
                Err(error) => return Err(status::from_lifecycle(&error)),
            },
        };
        let filter = GrantFilter { volume_name, node_id, ..GrantFilter::default() }.within(&scope);
        let (after, limit) = (after.unwrap_or_default(), page_limit(page_size));
        let page = self.looking(move |lifecycle| {
            let mut found = lifecycle.catalog().list_grants(&filter, &after, limit + 1)?;
            let next_page_token =
                token.next_pair(&mut found, limit, |(name, grant)| format!("{name}/{}", grant.node_id));
            let grants = found.iter().map(|(name, grant)| messages::grant(name, grant)).collect();
            Ok(v1::ListGrantsResponse { grants, next_page_token })
        });
        Ok(page.await?.into_inner())
    }
}
