//! Nodes in the catalog: who has registered, and what each said of itself.
//!
//! What changes with every heartbeat is not here. Called by `lifecycle/nodes.rs`.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior};

use super::{Catalog, CatalogError, now_ms, requests, schema, tenants};
use crate::scope::Scope;

/// Table that came after the first format; older programs leave it alone.
const TABLE: &str = "
CREATE TABLE IF NOT EXISTS nodes (
    node_id           TEXT    PRIMARY KEY NOT NULL,
    boot_id           TEXT    NOT NULL,
    version           TEXT    NOT NULL,
    labels            TEXT    NOT NULL,
    registered_at_ms  INTEGER NOT NULL
) STRICT;
";

/// Makes the table, with what came to it later.
pub(super) fn prepare(db: &Connection) -> Result<(), CatalogError> {
    db.execute_batch(TABLE)?;
    schema::add_column(db, "nodes", "max_volumes", "INTEGER NOT NULL DEFAULT 0")
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeFacts {
    /// Its name.
    pub node_id: String,
    /// Its boot; empty where it did not say.
    pub boot_id: String,
    /// Of its node daemon.
    pub version: String,
    /// Where and what it is.
    pub labels: BTreeMap<String, String>,
    /// How many volumes it can have; 0: no limit.
    pub max_volumes: u32,
}

/// A node that has registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// As it registered last.
    pub facts: NodeFacts,
    /// When it registered for the first time, in milliseconds since the Unix epoch.
    pub registered_at_ms: i64,
}

const SELECT: &str = "SELECT node_id, boot_id, version, labels, registered_at_ms, max_volumes FROM nodes";

fn record(row: &Row<'_>) -> Result<NodeRecord, CatalogError> {
    let labels: String = row.get(3)?;
    let damaged = |_| CatalogError::Damaged { table: "nodes", column: "labels" };
    let labels = serde_json::from_str(&labels).map_err(damaged)?;
    let (node_id, boot_id, version, max_volumes) = (row.get(0)?, row.get(1)?, row.get(2)?, row.get(5)?);
    let facts = NodeFacts { node_id, boot_id, version, labels, max_volumes };
    Ok(NodeRecord { facts, registered_at_ms: row.get(4)? })
}

impl Catalog {
    /// Writes down what a node says, where that is something new.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn put_node(&self, facts: &NodeFacts) -> Result<NodeRecord, CatalogError> {
        let known = self.node(&facts.node_id)?;
        if let Some(known) = known.as_ref().filter(|known| known.facts == *facts) {
            return Ok(known.clone());
        }
        let labels: serde_json::Value =
            facts.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let registered_at_ms = known.map_or_else(now_ms, |known| known.registered_at_ms);
        self.state().db.execute(
            "INSERT INTO nodes (node_id, boot_id, version, labels, registered_at_ms, max_volumes) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6) \
             ON CONFLICT (node_id) DO UPDATE SET boot_id = ?2, version = ?3, labels = ?4, max_volumes = ?6",
            (
                &facts.node_id,
                &facts.boot_id,
                &facts.version,
                labels.to_string(),
                registered_at_ms,
                facts.max_volumes,
            ),
        )?;
        Ok(NodeRecord { facts: facts.clone(), registered_at_ms })
    }

    /// The node of that name.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn node(&self, node_id: &str) -> Result<Option<NodeRecord>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(&format!("{SELECT} WHERE node_id = ?1"))?;
        query.query_row([node_id], |row| Ok(record(row))).optional()?.transpose()
    }

    /// How many there are.
    ///
    /// # Errors
    /// SQLite's.
    pub fn count_nodes(&self) -> Result<u64, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached("SELECT COUNT(*) FROM nodes")?;
        let count: i64 = query.query_row([], |row| row.get(0))?;
        Ok(count.unsigned_abs())
    }

    /// At most `limit` nodes whose names come after `after`, in order of name (by bytes); only those to which something of the scope is
    /// attached or granted, unless it is all.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn list_nodes(
        &self,
        scope: &Scope,
        after: &str,
        limit: u32,
    ) -> Result<Vec<NodeRecord>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(&format!(
            "{SELECT} WHERE node_id > ?1 AND (?3 IS NULL OR node_id IN ({})) ORDER BY node_id LIMIT ?2",
            tenants::nodes_within("?3")
        ))?;
        let rows = query.query_map((after, limit, scope.for_query()), |row| Ok(record(row)))?;
        rows.map(|row| row?).collect()
    }

    /// Forgets the node, unless something is attached or granted to it; true where it was known and is not any more.
    ///
    /// # Errors
    /// SQLite's.
    pub fn forget_node(&self, node_id: &str) -> Result<bool, CatalogError> {
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let forgotten = transaction.execute(
            "DELETE FROM nodes WHERE node_id = ?1 \
             AND NOT EXISTS (SELECT 1 FROM attachments WHERE node_id = ?1) \
             AND NOT EXISTS (SELECT 1 FROM shared_attachments WHERE node_id = ?1) \
             AND NOT EXISTS (SELECT 1 FROM snapshot_attachments WHERE node_id = ?1) \
             AND NOT EXISTS (SELECT 1 FROM grants WHERE node_id = ?1)",
            [node_id],
        )?;
        if forgotten > 0 {
            requests::record(&transaction, self.request.as_deref(), node_id)?;
        }
        transaction.commit()?;
        Ok(forgotten > 0)
    }
}
