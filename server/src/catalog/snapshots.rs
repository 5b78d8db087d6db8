//! Snapshots in the catalog: looked up, listed, and moved through `creating → ready → deleting → gone`.
//!
//! ```text
//!   begin_snapshots       finish_snapshots      begin_deleting_snapshot      forget_snapshot
//!  ──────────────▶ creating ─────────────▶ ready ────────────────────▶ deleting ───────────▶ (no row)
//!                     └────────────────────────────────────────────────▲
//! ```
//! Those of one instant are written down together and become ready together. A snapshot's volume may be gone: then it has no volume's
//! name, whoever has that name now. Only `ready` ones that no deletion has concealed are visible to the data side. Never touches
//! storage itself.

use rusqlite::{OptionalExtension as _, Row, TransactionBehavior};
use uuid::Uuid;

use super::records::{self, NewSnapshot, SnapshotFilter, SnapshotKey, SnapshotRecord, SnapshotState};
use super::tenants::{self, Usage};
use super::{BackendKind, Catalog, CatalogError, State, now_ms, requests, reserve, thin, to_db};
use crate::scope::Scope;

/// Of the rows that [`FROM`] joins.
const COLUMNS: &str = "snapshots.snapshot_uid AS snapshot_uid, snapshots.volume_uid AS volume_uid, snapshots.name AS name, \
     coalesce(volumes.name, '') AS volume_name, group_uid, snapshots.state AS state, \
     snapshots.capacity_bytes AS capacity_bytes, snapshots.block_size_bytes AS block_size_bytes, \
     snapshots.backend AS backend, snapshots.write_cache_on AS write_cache_on, snapshots.content AS content, \
     snapshots.created_at_ms AS created_at_ms, freeze_id, is_frozen, snapshots.is_encrypted AS is_encrypted, \
     coalesce((SELECT tenant FROM volume_tenants WHERE volume_tenants.volume_uid = snapshots.volume_uid), '') AS tenant";
const FROM: &str =
    "snapshots LEFT JOIN volumes ON volumes.volume_uid = snapshots.volume_uid AND volumes.state = 'ready'";

/// Those that may come behind the last name.
pub(super) const OF_ALL_VOLUMES: &str = "volumes.name >= ?1";

/// A query for a page of the snapshots of volumes: by the indexes that have the names of both, so that a page costs what is on it,
/// however many there are.
pub(super) fn list_sql(of_volume: &str, filter: &SnapshotFilter) -> String {
    // Of one name by that, unless it is of one volume: whose snapshots are found by theirs.
    let (from, of_name) = match (&filter.name, &filter.volume_name) {
        (Some(_), None) => ("snapshots CROSS JOIN volumes", "snapshots.name = ?6"),
        (Some(_), Some(_)) => ("volumes CROSS JOIN snapshots", "snapshots.name = ?6"),
        (None, _) => ("volumes CROSS JOIN snapshots", "?6 IS NULL"),
    };
    let of_tenants = tenants::within_asked(filter.tenants.as_deref(), "volumes.volume_uid", "?7");
    format!(
        "SELECT {COLUMNS} FROM {from} ON snapshots.volume_uid = volumes.volume_uid \
         WHERE volumes.state = 'ready' AND {of_volume} AND (volumes.name, snapshots.name) > (?1, ?2) \
         AND ?4 IS NOT NULL AND snapshots.state IN ('creating', 'ready') AND (?3 IS NULL OR group_uid = ?3) \
         AND {of_name} AND {of_tenants} ORDER BY volumes.name, snapshots.name LIMIT ?5"
    )
}

impl State {
    fn snapshot_row(
        &self,
        condition: &str,
        values: impl rusqlite::Params,
    ) -> Result<Option<(SnapshotRecord, SnapshotState)>, CatalogError> {
        let sql = format!("SELECT {COLUMNS} FROM {FROM} WHERE {condition}");
        let mut query = self.db.prepare_cached(&sql)?;
        query.query_row(values, |row| Ok(records::snapshot(row))).optional()?.transpose()
    }

    /// At most `limit` snapshots whose volume is gone, behind `after`, in order of name and uid.
    fn list_kept(
        &self,
        filter: &SnapshotFilter,
        after: &SnapshotKey,
        limit: u32,
    ) -> Result<Vec<(SnapshotRecord, SnapshotState)>, CatalogError> {
        // In words of its own, so that an index finds them.
        let of_name = if filter.name.is_some() { "snapshots.name = ?5" } else { "?5 IS NULL" };
        let of_tenants = tenants::within_asked(filter.tenants.as_deref(), "snapshots.volume_uid", "?6");
        let mut query = self.db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM {FROM} WHERE {of_name} AND {of_tenants} AND volumes.volume_uid IS NULL \
             AND (snapshots.name, snapshot_uid) > (?1, ?2) AND snapshots.state IN ('creating', 'ready') \
             AND (?3 IS NULL OR group_uid = ?3) ORDER BY snapshots.name, snapshot_uid LIMIT ?4"
        ))?;
        let group_uid = filter.group_uid.map(|uid| uid.to_string());
        let (name, tenants) = (filter.name.as_deref(), filter.tenants.as_deref());
        let values = (&after.name, &after.snapshot_uid, group_uid, limit, name, tenants);
        let rows = query.query_map(values, |row: &Row<'_>| Ok(records::snapshot(row)))?;
        rows.map(|row| row?).collect()
    }

    /// The same of those with a volume, in order of its name and theirs.
    fn list_of_volumes(
        &self,
        filter: &SnapshotFilter,
        after: &SnapshotKey,
        limit: u32,
    ) -> Result<Vec<(SnapshotRecord, SnapshotState)>, CatalogError> {
        let (of_volume, volume) = match filter.volume_name.as_deref() {
            None => (OF_ALL_VOLUMES, after.volume_name.as_str()),
            Some(name) => match name.strip_prefix("uid:") {
                Some(uid) => ("volumes.volume_uid = ?4", uid),
                None => ("volumes.name = ?4", name),
            },
        };
        let mut query = self.db.prepare_cached(&list_sql(of_volume, filter))?;
        let group_uid = filter.group_uid.map(|uid| uid.to_string());
        // Of one volume no two have a name.
        let (name, tenants) = (filter.name.as_deref(), filter.tenants.as_deref());
        let values = (&after.volume_name, &after.name, group_uid, volume, limit, name, tenants);
        let rows = query.query_map(values, |row: &Row<'_>| Ok(records::snapshot(row)))?;
        rows.map(|row| row?).collect()
    }

    /// The same if it is ready and not concealed.
    fn visible_snapshot(
        &self,
        condition: &str,
        values: impl rusqlite::Params,
    ) -> Result<Option<SnapshotRecord>, CatalogError> {
        let found = self.snapshot_row(condition, values)?;
        let is_visible = |snapshot: &SnapshotRecord, state| {
            state == SnapshotState::Ready && !self.concealed.contains(&snapshot.snapshot_uid)
        };
        Ok(found.filter(|(snapshot, state)| is_visible(snapshot, *state)).map(|(snapshot, _)| snapshot))
    }
}

impl Catalog {
    /// The ready snapshot of that identity.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn snapshot_by_uid(&self, snapshot_uid: Uuid) -> Result<Option<SnapshotRecord>, CatalogError> {
        self.state().visible_snapshot("snapshot_uid = ?1", [snapshot_uid.to_string()])
    }

    /// The ready snapshot that is exported under that name: `VOLUME@NAME` or `@UID`.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn snapshot_by_export_name(&self, name: &str) -> Result<Option<SnapshotRecord>, CatalogError> {
        match name.split_once('@') {
            Some(("", uid)) => match Uuid::try_parse(uid) {
                Ok(snapshot_uid) => self.snapshot_by_uid(snapshot_uid),
                Err(_) => Ok(None),
            },
            Some((volume_name, name)) => {
                let condition = "volumes.name = ?1 AND snapshots.name = ?2";
                self.state().visible_snapshot(condition, (volume_name, name))
            }
            None => Ok(None),
        }
    }

    /// The snapshot of that identity in whatever state it is, for the management side.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn snapshot_in_any_state(
        &self,
        snapshot_uid: Uuid,
    ) -> Result<Option<(SnapshotRecord, SnapshotState)>, CatalogError> {
        self.state().snapshot_row("snapshot_uid = ?1", [snapshot_uid.to_string()])
    }

    /// The volume's snapshot of that name in whatever state it is.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn snapshot_of_volume(
        &self,
        volume_uid: Uuid,
        name: &str,
    ) -> Result<Option<(SnapshotRecord, SnapshotState)>, CatalogError> {
        let condition = "snapshots.volume_uid = ?1 AND snapshots.name = ?2";
        self.state().snapshot_row(condition, (volume_uid.to_string(), name))
    }

    /// At most `limit` other snapshots of the same volume that are visible to the data side, the latest first.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn siblings_of_snapshot(
        &self,
        snapshot_uid: Uuid,
        limit: u32,
    ) -> Result<Vec<SnapshotRecord>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM {FROM} WHERE snapshots.state = 'ready' AND snapshots.snapshot_uid <> ?1 \
             AND snapshots.volume_uid = (SELECT volume_uid FROM snapshots WHERE snapshot_uid = ?1) \
             ORDER BY snapshots.created_at_ms DESC, snapshots.name LIMIT ?2"
        ))?;
        let rows = query.query_map((snapshot_uid.to_string(), limit), |row| Ok(records::snapshot(row)))?;
        let all = rows.map(|row| row?).collect::<Result<Vec<_>, CatalogError>>()?;
        let is_visible = |snapshot: &SnapshotRecord| !state.concealed.contains(&snapshot.snapshot_uid);
        Ok(all.into_iter().map(|(snapshot, _)| snapshot).filter(is_visible).collect())
    }

    /// How many snapshots there are of the volume, those that are being made among them.
    ///
    /// # Errors
    /// SQLite's.
    pub fn snapshot_count(&self, volume_uid: Uuid) -> Result<u32, CatalogError> {
        let state = self.state();
        let sql = "SELECT count(*) FROM snapshots WHERE volume_uid = ?1 AND state IN ('creating', 'ready')";
        let mut query = state.db.prepare_cached(sql)?;
        Ok(query.query_row([volume_uid.to_string()], |row| row.get(0))?)
    }

    /// At most `limit` snapshots (those that are being made, too) behind `after`, in order of their keys.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn list_snapshots(
        &self,
        filter: &SnapshotFilter,
        after: &SnapshotKey,
        limit: u32,
    ) -> Result<Vec<(SnapshotRecord, SnapshotState)>, CatalogError> {
        let state = self.state();
        let mut found = Vec::new();
        // Those without a volume come first.
        if after.volume_name.is_empty() && filter.volume_name.is_none() {
            found = state.list_kept(filter, after, limit)?;
        }
        let left = limit.saturating_sub(u32::try_from(found.len()).unwrap_or(u32::MAX));
        found.extend(state.list_of_volumes(filter, after, left)?);
        Ok(found)
    }

    /// Every snapshot with its state: for the recovery at start.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn all_snapshots(&self) -> Result<Vec<(SnapshotRecord, SnapshotState)>, CatalogError> {
        let state = self.state();
        let sql = format!("SELECT {COLUMNS} FROM {FROM} ORDER BY volume_name, snapshots.name, snapshot_uid");
        let mut query = state.db.prepare(&sql)?;
        let rows = query.query_map([], |row: &Row<'_>| Ok(records::snapshot(row)))?;
        rows.map(|row| row?).collect()
    }

    /// Writes new snapshots of one name and one instant down in state `creating`; all of them or none.
    ///
    /// # Errors
    /// [`CatalogError::SnapshotExists`] where one of the volumes has one of that name in any state; [`CatalogError::Quota`]; SQLite's.
    pub fn begin_snapshots(
        &self,
        name: &str,
        group_uid: Uuid,
        freeze_id: Option<Uuid>,
        new: &[NewSnapshot],
    ) -> Result<(), CatalogError> {
        let created_at_ms = now_ms();
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for NewSnapshot { snapshot_uid, volume } in new {
            // Those before it are in the transaction already.
            let more = Usage { snapshots: 1, ..Usage::default() };
            tenants::check(
                &transaction,
                &tenants::of_volume(&transaction, &volume.volume_uid.to_string())?,
                &more,
            )?;
            let inserted = transaction.execute(
                "INSERT INTO snapshots (snapshot_uid, volume_uid, name, group_uid, state, capacity_bytes, block_size_bytes, \
                                        backend, write_cache_on, created_at_ms, content, freeze_id, is_encrypted) \
                 VALUES (?1, ?2, ?3, ?4, 'creating', ?5, ?6, ?7, ?8, ?9, 'written', ?10, ?11) ON CONFLICT (volume_uid, name) DO NOTHING",
                (
                    snapshot_uid.to_string(),
                    volume.volume_uid.to_string(),
                    name,
                    group_uid.to_string(),
                    to_db(volume.capacity_bytes, "capacity_bytes")?,
                    volume.block_size_bytes,
                    volume.backend.as_str(),
                    volume.write_cache_on,
                    created_at_ms,
                    freeze_id.map(|id| id.to_string()).unwrap_or_default(),
                    volume.settings.is_encrypted,
                ),
            )?;
            if inserted == 0 {
                return Err(CatalogError::SnapshotExists);
            }
            if volume.backend == BackendKind::Lvm {
                thin::add_snapshot(&transaction, *snapshot_uid, volume.volume_uid)?;
            }
        }
        Ok(transaction.commit()?)
    }

    /// Says of a snapshot that is being made that nobody had ever written to its volume at the instant.
    ///
    /// # Errors
    /// [`CatalogError::SnapshotNotFound`]; SQLite's.
    pub fn mark_never_written(&self, snapshot_uid: Uuid) -> Result<(), CatalogError> {
        let changed = self.state().db.execute(
            "UPDATE snapshots SET content = 'never-written' WHERE snapshot_uid = ?1 AND state = 'creating'",
            [snapshot_uid.to_string()],
        )?;
        if changed == 1 { Ok(()) } else { Err(CatalogError::SnapshotNotFound(snapshot_uid)) }
    }

    /// Says of the scope's snapshots of a freeze that it held; and which they are.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn mark_frozen(&self, scope: &Scope, freeze_id: Uuid) -> Result<Vec<Uuid>, CatalogError> {
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let marked: Vec<String> = {
            let is_within = tenants::within("volume_uid", "?2");
            let mut query = transaction.prepare_cached(&format!(
                "UPDATE snapshots SET is_frozen = 1 WHERE freeze_id = ?1 AND state IN ('creating', 'ready') AND {is_within} \
                 RETURNING snapshot_uid"
            ))?;
            let rows = query.query_map((freeze_id.to_string(), scope.for_query()), |row| row.get(0))?;
            rows.collect::<Result<_, _>>()?
        };
        transaction.commit()?;
        let damaged = || CatalogError::Damaged { table: "snapshots", column: "snapshot_uid" };
        marked.iter().map(|uid| uid.parse().map_err(|_| damaged())).collect()
    }

    /// Says of these snapshots that their file systems were frozen; all of them, or, where one is not there any more, none. Which it was.
    ///
    /// # Errors
    /// SQLite's.
    pub fn mark_these_frozen(&self, snapshot_uids: &[Uuid]) -> Result<bool, CatalogError> {
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for uid in snapshot_uids {
            let marked = transaction.execute(
                "UPDATE snapshots SET is_frozen = 1 WHERE snapshot_uid = ?1 AND state IN ('creating', 'ready')",
                [uid.to_string()],
            )?;
            if marked == 0 {
                return Ok(false);
            }
        }
        transaction.commit()?;
        Ok(true)
    }

    /// `creating` becomes `ready` for a whole group: the storage of all is there and durable.
    ///
    /// # Errors
    /// [`CatalogError::SnapshotNotFound`] where none of the group is being made; SQLite's.
    pub fn finish_snapshots(&self, group_uid: Uuid) -> Result<(), CatalogError> {
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let group = group_uid.to_string();
        let changed = transaction.execute(
            "UPDATE snapshots SET state = 'ready' WHERE group_uid = ?1 AND state = 'creating'",
            [&group],
        )?;
        if changed == 0 {
            return Err(CatalogError::SnapshotNotFound(group_uid));
        }
        if self.request.is_some() {
            // As they were asked for: `begin_snapshots` has written them down in that order.
            let made: String = transaction.query_row(
                "SELECT group_concat(snapshot_uid, ' ') FROM \
                 (SELECT snapshot_uid FROM snapshots WHERE group_uid = ?1 ORDER BY rowid)",
                [&group],
                |row| row.get(0),
            )?;
            requests::record(&transaction, self.request.as_deref(), &made)?;
        }
        Ok(transaction.commit()?)
    }

    /// Any state becomes `deleting`: from here on the snapshot is gone for everybody, and its storage may be removed.
    ///
    /// # Errors
    /// [`CatalogError::SnapshotNotFound`]; SQLite's.
    pub fn begin_deleting_snapshot(&self, snapshot_uid: Uuid) -> Result<(), CatalogError> {
        let (request, uid) = (self.request.as_deref(), snapshot_uid.to_string());
        self.taking_away(|state| {
            requests::carry_out(&mut state.db, request, &uid, |db| {
                let sql = "UPDATE snapshots SET state = 'deleting' WHERE snapshot_uid = ?1";
                let changed = db.execute(sql, [&uid])?;
                if changed == 1 { Ok(()) } else { Err(CatalogError::SnapshotNotFound(snapshot_uid)) }
            })
        })
    }

    /// Drops the row of a snapshot that is being deleted and whose storage is gone; no row is a success.
    ///
    /// # Errors
    /// SQLite's.
    pub fn forget_snapshot(&self, snapshot_uid: Uuid) -> Result<(), CatalogError> {
        self.taking_away(|state| {
            state.db.execute(
                "DELETE FROM snapshots WHERE snapshot_uid = ?1 AND state = 'deleting'",
                [snapshot_uid.to_string()],
            )?;
            Ok(())
        })?;
        // There may be room for it again.
        reserve::renew(&self.inner.data_dir);
        Ok(())
    }
}
