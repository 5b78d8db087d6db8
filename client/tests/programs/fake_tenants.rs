//! The tenants of the fake storage server.

use std::collections::BTreeMap;

use proto::error_reason as reason;
use proto::v1;
use proto::volume_name::tenant_of;
use tonic::{Code, Status};

use crate::fake_server::refuse;

/// Tenants that a page of the list holds: fewer than asked for, so that paging shows.
const PAGE_TENANTS: usize = 2;

/// What the server knows of tenants.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    quotas: BTreeMap<String, v1::TenantQuota>,
}

impl Tenants {
    fn tenant<'a>(&self, name: &str, volumes: impl Iterator<Item = &'a v1::Volume>) -> v1::Tenant {
        let sizes: Vec<u64> =
            volumes.filter(|one| tenant_of(&one.name) == name).map(|one| one.capacity_bytes).collect();
        v1::Tenant {
            name: name.to_owned(),
            quota: Some(self.quotas.get(name).copied().unwrap_or_default()),
            volumes: sizes.len() as u64,
            capacity_bytes: sizes.iter().sum(),
            snapshots: 0,
            created_at_ms: i64::from(self.quotas.contains_key(name)) * 1_700_000_000_000,
        }
    }

    pub(crate) fn set<'a>(
        &mut self,
        request: v1::SetTenantRequest,
        volumes: impl Iterator<Item = &'a v1::Volume>,
    ) -> v1::Tenant {
        self.quotas.insert(request.name.clone(), request.quota.unwrap_or_default());
        self.tenant(&request.name, volumes)
    }

    pub(crate) fn get<'a>(
        &self,
        name: &str,
        volumes: impl Iterator<Item = &'a v1::Volume>,
    ) -> Result<v1::Tenant, Status> {
        let tenant = self.tenant(name, volumes);
        if tenant.volumes > 0 || self.quotas.contains_key(name) {
            return Ok(tenant);
        }
        let message = format!("there is no tenant {name}");
        Err(refuse(Code::NotFound, reason::TENANT_NOT_FOUND, message, "list the tenants"))
    }

    pub(crate) fn page<'a>(
        &self,
        after: &str,
        volumes: impl Iterator<Item = &'a v1::Volume> + Clone,
    ) -> v1::ListTenantsResponse {
        let behind = self.quotas.keys().filter(|name| name.as_str() > after);
        let names: Vec<&String> = behind.take(PAGE_TENANTS + 1).collect();
        let next_page_token =
            if names.len() > PAGE_TENANTS { names[PAGE_TENANTS - 1].clone() } else { String::new() };
        let tenants =
            names.iter().take(PAGE_TENANTS).map(|name| self.tenant(name, volumes.clone())).collect();
        v1::ListTenantsResponse { tenants, next_page_token }
    }

    pub(crate) fn delete<'a>(
        &mut self,
        name: &str,
        volumes: impl Iterator<Item = &'a v1::Volume>,
    ) -> Result<v1::DeleteTenantResponse, Status> {
        let count = self.tenant(name, volumes).volumes;
        if count > 0 {
            let message = format!("the tenant {name} has volumes: {count}, snapshots: 0");
            let next = "delete its volumes and snapshots first";
            return Err(refuse(Code::FailedPrecondition, reason::TENANT_NOT_EMPTY, message, next));
        }
        Ok(v1::DeleteTenantResponse { existed: self.quotas.remove(name).is_some() })
    }
}
