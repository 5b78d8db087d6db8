//! Grants in the catalog: which node may attach which volume, apart from whether it has it.
//!
//! One row for a volume and a node, by the volume's uid: a rename keeps it. Never decides which of them go together;
//! `lifecycle/grants.rs` does, with the volume's name locked. What has to be one with a grant is in one transaction here: that it goes
//! with the end of what was attached under it ([`Catalog::withdraw_grant`]), that it is there when an attachment is made under it
//! (`require`, for `attachments.rs`), and that its node has room for one more volume ([`Catalog::add_grant`]).

use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior};
use uuid::Uuid;

use super::attachment_tables::execute_on_all;
use super::columns::Columns;
use super::{Catalog, CatalogError, now_ms, requests, tenants};
use crate::scope::Scope;

/// Table that came after the first format; older programs leave it alone, and a volume that one of them deletes takes its rows along.
pub(super) const TABLE: &str = "
CREATE TABLE IF NOT EXISTS grants (
    volume_uid     TEXT    NOT NULL REFERENCES volumes (volume_uid) ON DELETE CASCADE,
    node_id        TEXT    NOT NULL,
    read_only      INTEGER NOT NULL CHECK (read_only IN (0, 1)),
    created_at_ms  INTEGER NOT NULL,
    PRIMARY KEY (volume_uid, node_id)
) STRICT;
CREATE INDEX IF NOT EXISTS grants_of_node ON grants (node_id);
";

/// That a node may attach a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantRecord {
    /// The volume.
    pub volume_uid: Uuid,
    /// The machine.
    pub node_id: String,
    /// It may not write.
    pub read_only: bool,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

/// What a grant that was withdrawn has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Withdrawn {
    /// There was a grant.
    pub existed: bool,
    /// The node has an attachment, which is ending.
    pub was_attached: bool,
}

/// Which grants [`Catalog::list_grants`] gives; `None` is all.
#[derive(Debug, Clone, Default)]
pub struct GrantFilter {
    /// Only of the volume of this name.
    pub volume_name: Option<String>,
    /// Only of this node.
    pub node_id: Option<String>,
    /// Only of these tenants, as a JSON array; [`GrantFilter::within`] says it.
    pub tenants: Option<String>,
}

impl GrantFilter {
    /// Only of volumes of this scope.
    pub fn within(self, scope: &Scope) -> Self {
        Self { tenants: scope.for_query(), ..self }
    }
}

const COLUMNS: &str = "volume_uid, node_id, read_only, created_at_ms";

fn record(row: &Row<'_>) -> Result<GrantRecord, CatalogError> {
    let columns = Columns { row, table: "grants" };
    Ok(GrantRecord {
        volume_uid: columns.uuid("volume_uid")?,
        node_id: columns.text("node_id")?,
        read_only: columns.flag("read_only")?,
        created_at_ms: columns.signed("created_at_ms")?,
    })
}

/// A query for a page of grants, in order of volume name and node.
pub(super) fn list_sql(filter: &GrantFilter) -> String {
    let columns = COLUMNS.replace(", ", ", grants.");
    // In the order of an index, so that a page costs what is on it; of one node by that node's.
    let (from, of_volume) = match (&filter.node_id, &filter.volume_name) {
        (Some(_), None) => ("grants CROSS JOIN volumes USING (volume_uid)", "?3 IS NULL"),
        (_, Some(_)) => ("volumes CROSS JOIN grants USING (volume_uid)", "volumes.name = ?3"),
        (None, None) => ("volumes CROSS JOIN grants USING (volume_uid)", "?3 IS NULL AND volumes.name >= ?1"),
    };
    let of_node = if filter.node_id.is_some() { "node_id = ?4" } else { "?4 IS NULL" };
    let of_tenants = tenants::within_asked(filter.tenants.as_deref(), "volumes.volume_uid", "?6");
    format!(
        "SELECT volumes.name AS volume_name, grants.{columns} FROM {from} \
         WHERE (volumes.name, node_id) > (?1, ?2) AND {of_volume} AND {of_node} \
         AND volumes.state = 'ready' AND {of_tenants} ORDER BY volumes.name, node_id LIMIT ?5"
    )
}

/// Makes sure, in the transaction that makes an attachment, that the node may have it.
pub(super) fn require(
    db: &Connection,
    volume_uid: Uuid,
    node_id: &str,
    read_only: bool,
) -> Result<(), CatalogError> {
    let is_granted: bool = db.query_row(
        "SELECT count(*) FROM grants WHERE volume_uid = ?1 AND node_id = ?2 AND read_only <= ?3",
        (volume_uid.to_string(), node_id, read_only),
        |row| row.get(0),
    )?;
    if is_granted { Ok(()) } else { Err(CatalogError::NotGranted(volume_uid)) }
}

/// Makes sure, in the transaction that makes a grant, that the node has room for the volume. What is attached to it counts, granted or
/// not, and so does a snapshot: each is a disk there. A node that has not registered has no limit.
fn require_room(db: &Connection, volume_uid: Uuid, node_id: &str) -> Result<(), CatalogError> {
    let mut limit = db.prepare_cached("SELECT max_volumes FROM nodes WHERE node_id = ?1")?;
    let max_volumes: u32 = limit.query_row([node_id], |row| row.get(0)).optional()?.unwrap_or(0);
    if max_volumes == 0 {
        return Ok(());
    }
    let mut count = db.prepare_cached(
        "SELECT count(*) FROM (SELECT volume_uid FROM grants WHERE node_id = ?1 \
         UNION SELECT volume_uid FROM attachments WHERE node_id = ?1 \
         UNION SELECT volume_uid FROM shared_attachments WHERE node_id = ?1 \
         UNION SELECT volume_uid FROM snapshot_attachments WHERE node_id = ?1) WHERE volume_uid <> ?2",
    )?;
    let volumes: u32 = count.query_row((node_id, volume_uid.to_string()), |row| row.get(0))?;
    if volumes < max_volumes { Ok(()) } else { Err(CatalogError::NodeFull { volumes, max_volumes }) }
}

impl Catalog {
    /// Writes a grant down. The node has none of the volume.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`] where the volume is not ready; [`CatalogError::NodeFull`]; SQLite's.
    pub fn add_grant(
        &self,
        volume_uid: Uuid,
        node_id: &str,
        read_only: bool,
    ) -> Result<GrantRecord, CatalogError> {
        let created_at_ms = now_ms();
        self.carrying_out(&format!("{volume_uid} {node_id}"), |db| {
            require_room(db, volume_uid, node_id)?;
            let added = db.execute(
                "INSERT INTO grants (volume_uid, node_id, read_only, created_at_ms) \
                 SELECT volume_uid, ?2, ?3, ?4 FROM volumes WHERE volume_uid = ?1 AND state = 'ready'",
                (volume_uid.to_string(), node_id, read_only, created_at_ms),
            )?;
            if added == 1 { Ok(()) } else { Err(CatalogError::VolumeNotFound(volume_uid)) }
        })?;
        Ok(GrantRecord { volume_uid, node_id: node_id.to_owned(), read_only, created_at_ms })
    }

    /// Takes a node's grant away and has its attachment `ending`, in one step: whoever dies behind it finds the attachment to be ended.
    /// No grant, or no attachment, is a success.
    ///
    /// # Errors
    /// SQLite's.
    pub fn withdraw_grant(&self, volume_uid: Uuid, node_id: &str) -> Result<Withdrawn, CatalogError> {
        self.taking_away(|state| {
            let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let values = (&volume_uid.to_string(), node_id);
            let withdrawn =
                transaction.execute("DELETE FROM grants WHERE volume_uid = ?1 AND node_id = ?2", values)?;
            let ending = execute_on_all(
                &transaction,
                "UPDATE TABLE SET state = 'ending' WHERE volume_uid = ?1 AND node_id = ?2",
                values,
            )?;
            let withdrawn = Withdrawn { existed: withdrawn > 0, was_attached: ending > 0 };
            if withdrawn != Withdrawn::default() {
                let Withdrawn { existed, was_attached } = withdrawn;
                let subject = format!("{volume_uid} {existed} {was_attached}");
                requests::record(&transaction, self.request.as_deref(), &subject)?;
            }
            transaction.commit()?;
            Ok(withdrawn)
        })
    }

    /// The grants of a volume, in order of node.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn grants_of_volume(&self, volume_uid: Uuid) -> Result<Vec<GrantRecord>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM grants WHERE volume_uid = ?1 ORDER BY node_id"
        ))?;
        let rows = query.query_map([volume_uid.to_string()], |row: &Row<'_>| Ok(record(row)))?;
        rows.map(|row| row?).collect()
    }

    /// Whether the node has a grant of any volume.
    ///
    /// # Errors
    /// SQLite's.
    pub fn node_has_grants(&self, node_id: &str) -> Result<bool, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached("SELECT 1 FROM grants WHERE node_id = ?1 LIMIT 1")?;
        Ok(query.query_row([node_id], |_| Ok(())).optional()?.is_some())
    }

    /// At most `limit` grants, each with its volume's name, that come after that volume's name and node in the order of both.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn list_grants(
        &self,
        filter: &GrantFilter,
        after: &(String, String),
        limit: u32,
    ) -> Result<Vec<(String, GrantRecord)>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(&list_sql(filter))?;
        let (name, node_id) = after;
        let values =
            (name, node_id, filter.volume_name.as_deref(), filter.node_id.as_deref(), limit, &filter.tenants);
        let rows = query.query_map(values, |row: &Row<'_>| {
            let name: String = row.get("volume_name")?;
            Ok(record(row).map(|grant| (name, grant)))
        })?;
        rows.map(|row| row?).collect()
    }
}
