//! Tenants: what each may have, and why it does not get more.
//!
//! The catalog looks at a quota in the transaction that makes something (`catalog/tenants.rs`); this is the rest: it is told, set, and
//! taken away when nothing is left. Called by `management/`.

use super::{DataSide, Lifecycle, LifecycleError};
use crate::catalog::{Quota, QuotaReached, TenantRecord, Usage};

/// Why a call about a tenant, or about something in its name space, is refused.
#[derive(Debug, thiserror::Error)]
pub enum TenantsError {
    /// It has no quota, and nothing is in its name space.
    #[error("there is no tenant {0}")]
    NotFound(String),
    /// It is to be deleted.
    #[error("the tenant {tenant} has volumes: {volumes}, snapshots: {snapshots}")]
    NotEmpty {
        /// Its name.
        tenant: String,
        /// How many it has.
        volumes: u64,
        /// The same, also of those whose volume is gone.
        snapshots: u64,
    },
    /// It has as much as it may.
    #[error(transparent)]
    Quota(QuotaReached),
    /// A volume is to go into another name space.
    #[error("volume {name} stays in the name space that it was made in, and {new_name} is in another")]
    Fixed {
        /// The volume's name.
        name: String,
        /// What it was to be called.
        new_name: String,
    },
}

impl<D: DataSide> Lifecycle<D> {
    /// Says what a tenant may have, instead of what was said before.
    ///
    /// # Errors
    /// The catalog's failure.
    pub fn set_tenant(&self, tenant: &str, quota: &Quota) -> Result<TenantRecord, LifecycleError> {
        let set = self.catalog.set_tenant(tenant, quota)?;
        tracing::info!(tenant, ?quota, "the tenant's quota was set");
        Ok(set)
    }

    /// A tenant that has a quota, or something in its name space.
    ///
    /// # Errors
    /// [`TenantsError::NotFound`]; the catalog's failure.
    pub fn tenant(&self, tenant: &str) -> Result<TenantRecord, LifecycleError> {
        Ok(self.catalog.tenant(tenant)?.ok_or_else(|| TenantsError::NotFound(tenant.to_owned()))?)
    }

    /// Takes the quota of a tenant away that has nothing; false where it had none.
    ///
    /// # Errors
    /// [`TenantsError::NotEmpty`]; the catalog's failure.
    pub fn delete_tenant(&self, tenant: &str) -> Result<bool, LifecycleError> {
        let Some(found) = self.catalog.forget_tenant(tenant)? else { return Ok(false) };
        if found.usage != Usage::default() {
            let Usage { volumes, snapshots, .. } = found.usage;
            return Err(TenantsError::NotEmpty { tenant: tenant.to_owned(), volumes, snapshots }.into());
        }
        tracing::info!(tenant, "tenant deleted");
        Ok(true)
    }
}
