//! The calls about tenants: what each may have and has.
//!
//! Owns their fields' rules and their messages. Called by the service, which has looked at the caller's rights.

use proto::v1;
use proto::volume_name::is_tenant_name;
use tonic::Status;

use super::ManagementService;
use super::fields::Fields;
use super::page_token::{PageToken, page_limit};
use crate::catalog::{Quota, TenantRecord};
use crate::lifecycle::{DataSide, TenantsError};
use crate::scope::Scope;

impl<D: DataSide> ManagementService<D> {
    pub(super) async fn put_tenant(&self, request: v1::SetTenantRequest) -> Result<v1::Tenant, Status> {
        let mut fields = Fields::default();
        let name = fields.tenant("name", request.name);
        let asked = request.quota.unwrap_or_default();
        let mut most = |field, most: Option<u64>| {
            fields.require(most.is_none_or(|most| i64::try_from(most).is_ok()), field, || {
                format!("must be at most {}", i64::MAX)
            });
            most
        };
        let quota = Quota {
            max_volumes: most("quota.max_volumes", asked.max_volumes),
            max_bytes: most("quota.max_bytes", asked.max_bytes),
            max_snapshots: most("quota.max_snapshots", asked.max_snapshots),
        };
        fields.finish()?;
        let set = self.blocking(move |lifecycle| Ok(message(lifecycle.set_tenant(&name, &quota)?)));
        Ok(set.await?.into_inner())
    }

    pub(super) async fn find_tenant(
        &self,
        scope: Scope,
        request: v1::GetTenantRequest,
    ) -> Result<v1::Tenant, Status> {
        let mut fields = Fields::default();
        let name = fields.tenant("name", request.name);
        fields.finish()?;
        let found = self.looking(move |lifecycle| {
            if !scope.has(&name) {
                return Err(TenantsError::NotFound(name).into());
            }
            Ok(message(lifecycle.tenant(&name)?))
        });
        Ok(found.await?.into_inner())
    }

    pub(super) async fn page_of_tenants(
        &self,
        scope: Scope,
        request: v1::ListTenantsRequest,
    ) -> Result<v1::ListTenantsResponse, Status> {
        let token = PageToken::new("tenants", self.lifecycle.catalog().server_id());
        let mut fields = Fields::default();
        let after = match request.page_token.as_str() {
            "" => Some(""),
            text => token.key(text).filter(|name| is_tenant_name(name)),
        };
        fields.require(after.is_some(), "page_token", || "is not a token of this list and server".to_owned());
        let after = after.unwrap_or_default().to_owned();
        fields.finish()?;
        let limit = page_limit(request.page_size);
        let page = self.looking(move |lifecycle| {
            let mut found = lifecycle.catalog().list_tenants(&scope, &after, limit + 1)?;
            let next_page_token = token.next(&mut found, limit, |tenant| &tenant.tenant);
            let tenants = found.into_iter().map(message).collect();
            Ok(v1::ListTenantsResponse { tenants, next_page_token })
        });
        Ok(page.await?.into_inner())
    }

    pub(super) async fn forget_tenant(
        &self,
        request: v1::DeleteTenantRequest,
    ) -> Result<v1::DeleteTenantResponse, Status> {
        let mut fields = Fields::default();
        let name = fields.tenant("name", request.name);
        fields.finish()?;
        let existed = self.blocking(move |lifecycle| lifecycle.delete_tenant(&name)).await?.into_inner();
        Ok(v1::DeleteTenantResponse { existed })
    }
}

fn message(tenant: TenantRecord) -> v1::Tenant {
    let TenantRecord { tenant, quota, usage, created_at_ms } = tenant;
    v1::Tenant {
        name: tenant,
        quota: Some(v1::TenantQuota {
            max_volumes: quota.max_volumes,
            max_bytes: quota.max_bytes,
            max_snapshots: quota.max_snapshots,
        }),
        volumes: usage.volumes,
        capacity_bytes: usage.bytes,
        snapshots: usage.snapshots,
        created_at_ms: created_at_ms.unwrap_or_default(),
    }
}
