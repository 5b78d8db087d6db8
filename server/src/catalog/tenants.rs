//! Tenants in the catalog: whose name space a volume is in, and how much a tenant may have.
//!
//! A volume's tenant is in its name (`TENANT+NAME`) and never changes. It is written down beside the name by a trigger, so that it is known
//! as well of what outlives the volume: its snapshots, and its changes for those who watch. A row stays as long as any of those does.
//! What a tenant may have is looked at in the transaction that gives it more ([`check`]): of two that take the last of it at once, one
//! is refused. Never: decides who may call what (`management/authorization.rs`).

use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior};

use super::columns::Columns;
use super::{Catalog, CatalogError, now_ms, to_db};
use crate::scope::Scope;

/// Tables that came after the first format, and the trigger that fills one of them, also in older programs: they leave all of it alone.
pub(super) const TABLES: &str = "
CREATE TABLE IF NOT EXISTS tenants (
    tenant         TEXT    PRIMARY KEY NOT NULL,
    max_volumes    INTEGER,
    max_bytes      INTEGER,
    max_snapshots  INTEGER,
    created_at_ms  INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS volume_tenants (
    volume_uid  TEXT PRIMARY KEY NOT NULL,
    tenant      TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS volumes_of_tenant ON volume_tenants (tenant);
CREATE TRIGGER IF NOT EXISTS volumes_tenant_noted AFTER INSERT ON volumes WHEN instr(NEW.name, '+') > 1
BEGIN
    INSERT OR REPLACE INTO volume_tenants (volume_uid, tenant)
    VALUES (NEW.volume_uid, substr(NEW.name, 1, instr(NEW.name, '+') - 1));
END;
";

/// Drops rows of volumes that nothing is left of; and of those that an older program has given a name in no name space.
pub(super) const TIDY: &str = "
DELETE FROM volume_tenants WHERE EXISTS (
    SELECT 1 FROM volumes WHERE volumes.volume_uid = volume_tenants.volume_uid
    AND substr(volumes.name, 1, max(instr(volumes.name, '+') - 1, 0)) <> volume_tenants.tenant);
DELETE FROM volume_tenants WHERE volume_uid NOT IN (SELECT volume_uid FROM volumes)
    AND volume_uid NOT IN (SELECT volume_uid FROM snapshots) AND volume_uid NOT IN (SELECT volume_uid FROM changes);
";

/// The tenant of the volume whose uid is in that column, as an expression; empty where it has none.
pub(super) fn tenant_of(column: &str) -> String {
    format!("coalesce((SELECT tenant FROM volume_tenants WHERE volume_tenants.volume_uid = {column}), '')")
}

/// That the volume whose uid is in that column is in the scope which is the query's parameter ([`Scope::for_query`]), as a condition.
pub(super) fn within(column: &str, parameter: &str) -> String {
    format!(
        "({parameter} IS NULL OR {column} IN (SELECT volume_uid FROM volume_tenants \
         WHERE tenant IN (SELECT value FROM json_each({parameter}))))"
    )
}

/// The same for a query that is made anew for its values: where all is asked for, nothing is looked up.
pub(super) fn within_asked(tenants: Option<&str>, column: &str, parameter: &str) -> String {
    if tenants.is_some() { within(column, parameter) } else { format!("{parameter} IS NULL") }
}

/// How much a tenant may have; `None` is any number of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quota {
    /// Volumes, those that are being made or deleted among them.
    pub max_volumes: Option<u64>,
    /// The sizes of all of them together, in bytes.
    pub max_bytes: Option<u64>,
    /// Snapshots, also those whose volume is gone.
    pub max_snapshots: Option<u64>,
}

/// What a tenant has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Volumes.
    pub volumes: u64,
    /// Their sizes together, in bytes.
    pub bytes: u64,
    /// Snapshots.
    pub snapshots: u64,
}

/// A tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantRecord {
    /// Its name.
    pub tenant: String,
    /// What it may have.
    pub quota: Quota,
    /// What it has.
    pub usage: Usage,
    /// When a quota was first set, in milliseconds since the Unix epoch; `None`: it is known by its volumes alone.
    pub created_at_ms: Option<i64>,
}

/// What there may be no more of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    /// Volumes.
    Volumes,
    /// Their sizes together.
    Bytes,
    /// Snapshots.
    Snapshots,
}

impl Limited {
    /// Its limit, as the API calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Volumes => "max_volumes",
            Self::Bytes => "max_bytes",
            Self::Snapshots => "max_snapshots",
        }
    }
}

/// A tenant has as much as it may.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the tenant {tenant} has {used} of at most {limit} ({}), and {more} more are asked for", limited.as_str())]
pub struct QuotaReached {
    /// Whose.
    pub tenant: String,
    /// Of what.
    pub limited: Limited,
    /// How much there is without what was asked for.
    pub used: u64,
    /// How much there may be.
    pub limit: u64,
    /// How much was asked for.
    pub more: u64,
}

impl Quota {
    /// Whether there may be so much more. `usage` is without it.
    fn allows(&self, tenant: &str, usage: &Usage, more: &Usage) -> Result<(), QuotaReached> {
        let of = |limited, limit: Option<u64>, used: u64, more: u64| match limit {
            Some(limit) if more > 0 && used.saturating_add(more) > limit => {
                Err(QuotaReached { tenant: tenant.to_owned(), limited, used, limit, more })
            }
            _ => Ok(()),
        };
        of(Limited::Volumes, self.max_volumes, usage.volumes, more.volumes)?;
        of(Limited::Bytes, self.max_bytes, usage.bytes, more.bytes)?;
        of(Limited::Snapshots, self.max_snapshots, usage.snapshots, more.snapshots)
    }
}

/// Makes sure, in the transaction that gives a tenant more and before it does, that it may have it. No tenant, or one without a quota, may.
pub(super) fn check(db: &Connection, tenant: &str, more: &Usage) -> Result<(), CatalogError> {
    if tenant.is_empty() {
        return Ok(());
    }
    let Some((quota, _)) = quota_of(db, tenant)? else { return Ok(()) };
    Ok(quota.allows(tenant, &usage_of(db, tenant)?, more)?)
}

/// The tenant of a volume that is there.
pub(super) fn of_volume(db: &Connection, volume_uid: &str) -> Result<String, CatalogError> {
    let mut query = db.prepare_cached("SELECT tenant FROM volume_tenants WHERE volume_uid = ?1")?;
    Ok(query.query_row([volume_uid], |row| row.get(0)).optional()?.unwrap_or_default())
}

fn quota_of(db: &Connection, tenant: &str) -> Result<Option<(Quota, i64)>, CatalogError> {
    let mut query = db.prepare_cached(
        "SELECT max_volumes, max_bytes, max_snapshots, created_at_ms FROM tenants WHERE tenant = ?1",
    )?;
    query.query_row([tenant], |row| Ok(quota(row))).optional()?.transpose()
}

fn quota(row: &Row<'_>) -> Result<(Quota, i64), CatalogError> {
    let most = |column: &'static str| {
        let most: Option<i64> = row.get(column)?;
        let damaged = |_| CatalogError::Damaged { table: "tenants", column };
        most.map(u64::try_from).transpose().map_err(damaged)
    };
    let quota = Quota {
        max_volumes: most("max_volumes")?,
        max_bytes: most("max_bytes")?,
        max_snapshots: most("max_snapshots")?,
    };
    Ok((quota, Columns { row, table: "tenants" }.signed("created_at_ms")?))
}

fn usage_of(db: &Connection, tenant: &str) -> Result<Usage, CatalogError> {
    let count = |sql: &str| -> rusqlite::Result<(i64, i64)> {
        db.prepare_cached(sql)?.query_row([tenant], |row| Ok((row.get(0)?, row.get(1)?)))
    };
    // Sizes are multiples of 512: so many bytes together may be more than SQLite can add up.
    let (volumes, blocks) = count(
        "SELECT count(*), coalesce(sum(capacity_bytes / 512), 0) FROM volume_tenants JOIN volumes USING (volume_uid) WHERE tenant = ?1",
    )?;
    let (snapshots, _) =
        count("SELECT count(*), 0 FROM volume_tenants JOIN snapshots USING (volume_uid) WHERE tenant = ?1")?;
    let [volumes, blocks, snapshots] = [volumes, blocks, snapshots].map(i64::unsigned_abs);
    let bytes = blocks.saturating_mul(512);
    Ok(Usage { volumes, bytes, snapshots })
}

/// The tenant, if it has a quota or something in its name space.
fn tenant(db: &Connection, name: &str) -> Result<Option<TenantRecord>, CatalogError> {
    let (found, usage) = (quota_of(db, name)?, usage_of(db, name)?);
    let is_there = found.is_some() || usage.volumes > 0 || usage.snapshots > 0;
    Ok(is_there.then(|| TenantRecord {
        tenant: name.to_owned(),
        quota: found.map(|(quota, _)| quota).unwrap_or_default(),
        usage,
        created_at_ms: found.map(|(_, created_at_ms)| created_at_ms),
    }))
}

impl Catalog {
    /// Says what a tenant may have, instead of what was said before. What it has already stays, whatever it comes to.
    ///
    /// # Errors
    /// [`CatalogError::TooLarge`]; SQLite's, or a damaged row.
    pub fn set_tenant(&self, name: &str, quota: &Quota) -> Result<TenantRecord, CatalogError> {
        let most = |most: Option<u64>, column| most.map(|most| to_db(most, column)).transpose();
        let values = (
            name,
            most(quota.max_volumes, "max_volumes")?,
            most(quota.max_bytes, "max_bytes")?,
            most(quota.max_snapshots, "max_snapshots")?,
            now_ms(),
        );
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute(
            "INSERT INTO tenants (tenant, max_volumes, max_bytes, max_snapshots, created_at_ms) VALUES (?1, ?2, ?3, ?4, ?5) \
             ON CONFLICT (tenant) DO UPDATE SET max_volumes = ?2, max_bytes = ?3, max_snapshots = ?4",
            values,
        )?;
        let found = tenant(&transaction, name)?;
        transaction.commit()?;
        found.ok_or(CatalogError::Damaged { table: "tenants", column: "tenant" })
    }

    /// The tenant of that name: `None` where it has no quota, and nothing is in its name space.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn tenant(&self, name: &str) -> Result<Option<TenantRecord>, CatalogError> {
        tenant(&self.state().db, name)
    }

    /// At most `limit` tenants of the scope whose names come after `after`, in order of name (by bytes).
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn list_tenants(
        &self,
        scope: &Scope,
        after: &str,
        limit: u32,
    ) -> Result<Vec<TenantRecord>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(
            "SELECT tenant FROM (SELECT tenant FROM tenants UNION SELECT tenant FROM volume_tenants \
             WHERE volume_uid IN (SELECT volume_uid FROM volumes UNION SELECT volume_uid FROM snapshots)) \
             WHERE tenant > ?1 AND (?2 IS NULL OR tenant IN (SELECT value FROM json_each(?2))) ORDER BY tenant LIMIT ?3",
        )?;
        let names = query.query_map((after, scope.for_query(), limit), |row| row.get(0))?;
        let names: Vec<String> = names.collect::<Result<_, _>>()?;
        names.iter().filter_map(|name| tenant(&state.db, name).transpose()).collect()
    }

    /// Takes a tenant's quota away, if nothing is in its name space; what there was and is left of it.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn forget_tenant(&self, name: &str) -> Result<Option<TenantRecord>, CatalogError> {
        self.taking_away(|state| {
            let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let found = tenant(&transaction, name)?;
            if found.as_ref().is_some_and(|found| found.usage == Usage::default()) {
                transaction.execute("DELETE FROM tenants WHERE tenant = ?1", [name])?;
            }
            transaction.commit()?;
            Ok(found)
        })
    }

    /// Whether a volume or snapshot of the scope is attached or granted to the node.
    ///
    /// # Errors
    /// SQLite's.
    pub fn node_has_of(&self, scope: &Scope, node_id: &str) -> Result<bool, CatalogError> {
        let state = self.state();
        let sql = format!("SELECT 1 WHERE ?1 IN ({})", nodes_within("?2"));
        Ok(state.db.prepare_cached(&sql)?.exists((node_id, scope.for_query()))?)
    }
}

/// The nodes to which something of the scope is attached or granted, as a query; the scope is the parameter of that name, and not all.
pub(super) fn nodes_within(parameter: &str) -> String {
    let of_volumes = ["attachments", "shared_attachments", "grants"].map(|table| {
        format!("SELECT node_id FROM {table} WHERE {}", within(&format!("{table}.volume_uid"), parameter))
    });
    format!(
        "{} UNION SELECT node_id FROM snapshot_attachments JOIN snapshots ON snapshots.snapshot_uid = snapshot_attachments.volume_uid \
         WHERE {}",
        of_volumes.join(" UNION "),
        within("snapshots.volume_uid", parameter)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_names_what_there_may_be_no_more_of() {
        let quota = Quota { max_volumes: Some(2), max_bytes: Some(100), max_snapshots: None };
        let usage = Usage { volumes: 1, bytes: 60, snapshots: 9 };
        let more =
            |volumes, bytes, snapshots| quota.allows("t", &usage, &Usage { volumes, bytes, snapshots });
        assert_eq!(more(1, 40, 1000), Ok(()));
        let refused = more(1, 41, 0).unwrap_err();
        assert_eq!(
            (refused.limited, refused.used, refused.limit, refused.more),
            (Limited::Bytes, 60, 100, 41)
        );
        assert_eq!(more(2, 0, 0).unwrap_err().limited, Limited::Volumes);
        assert_eq!(
            more(2, 0, 0).unwrap_err().to_string(),
            "the tenant t has 1 of at most 2 (max_volumes), and 2 more are asked for"
        );
        // What is too much already is no reason to refuse what asks for nothing of it.
        let less = Quota { max_volumes: Some(0), ..quota };
        assert_eq!(less.allows("t", &usage, &Usage { bytes: 40, ..Usage::default() }), Ok(()));
        assert!(less.allows("t", &usage, &Usage { volumes: 1, ..Usage::default() }).is_err());
    }
}
