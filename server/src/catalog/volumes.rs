//! Volumes in the catalog: looked up, listed, and moved through `creating → ready → deleting → gone`.
//!
//! ```text
//!   begin_creating        finish_creating        begin_deleting         forget_volume
//!  ─────────────▶ creating ─────────────▶ ready ─────────────▶ deleting ─────────────▶ (no row)
//!                    └───────────────────── forget_volume ───────────────────────────▶
//! ```
//! Storage is made while the row says `creating` and removed while it says `deleting`, by `lifecycle/mod.rs`: a row in one of
//! those states at start is what a killed server left. Only `ready` volumes that no deletion has concealed are visible to
//! lookups. Never touches storage itself.

use std::collections::BTreeMap;

use proto::volume_name::tenant_of;
use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior};
use uuid::Uuid;

use super::records::{self, BackendKind, NewVolume, VolumeRecord, VolumeState};
use super::tenants::Usage;
use super::{Catalog, CatalogError, State, now_ms, requests, reserve, settings, tenants, thin, to_db};
use crate::scope::Scope;

/// The backend is read as `device` where the volume has a row in `adopted_volumes`, and as `lvm` where it has one in `thin_volumes`;
/// `adopted.rs` and `thin.rs` say why.
const COLUMNS: &str = "volume_uid, name, state, capacity_bytes, block_size_bytes, \
    CASE WHEN EXISTS (SELECT 1 FROM adopted_volumes WHERE adopted_volumes.volume_uid = volumes.volume_uid) \
         THEN 'device' \
         WHEN EXISTS (SELECT 1 FROM thin_volumes WHERE thin_volumes.volume_uid = volumes.volume_uid) \
         THEN 'lvm' ELSE backend END AS backend, write_cache_on, incarnation, created_at_ms";

/// A query of volumes that begins with all that [`records::volume`] reads.
fn select(rest: &str) -> String {
    format!("SELECT {COLUMNS}, {} FROM volumes {rest}", settings::COLUMNS)
}

/// Hides a volume or a snapshot from the data side until dropped.
#[derive(Debug)]
pub struct Concealed {
    catalog: Catalog,
    volume_uid: Uuid,
}

impl Drop for Concealed {
    fn drop(&mut self) {
        self.catalog.state().concealed.remove(&self.volume_uid);
    }
}

/// Whether the tenant of a volume may have it so large.
fn check_growth(db: &Connection, volume_uid: &str, capacity_bytes: u64) -> Result<(), CatalogError> {
    let mut query = db.prepare_cached("SELECT capacity_bytes FROM volumes WHERE volume_uid = ?1")?;
    let before: Option<i64> = query.query_row([volume_uid], |row| row.get(0)).optional()?;
    let before = before.unwrap_or_default().unsigned_abs();
    let more = Usage { bytes: capacity_bytes.saturating_sub(before), ..Usage::default() };
    tenants::check(db, &tenants::of_volume(db, volume_uid)?, &more)
}

fn change_state(db: &Connection, volume_uid: Uuid, from: &str, to: &str) -> Result<(), CatalogError> {
    let changed = db.execute(
        "UPDATE volumes SET state = ?3 WHERE volume_uid = ?1 AND state = ?2",
        (volume_uid.to_string(), from, to),
    )?;
    if changed == 1 { Ok(()) } else { Err(CatalogError::VolumeNotFound(volume_uid)) }
}

impl State {
    /// The volume of a one-row query, if it is ready and not concealed.
    fn visible_volume(&self, condition: &str, value: &str) -> Result<Option<VolumeRecord>, CatalogError> {
        let found = self.volume_row(condition, value)?;
        Ok(found
            .filter(|(volume, state)| {
                *state == VolumeState::Ready && !self.concealed.contains(&volume.volume_uid)
            })
            .map(|(volume, _)| volume))
    }

    pub(super) fn volume_row(
        &self,
        condition: &str,
        value: &str,
    ) -> Result<Option<(VolumeRecord, VolumeState)>, CatalogError> {
        let mut query = self.db.prepare_cached(&select(&format!("WHERE {condition}")))?;
        query.query_row([value], |row| Ok(records::volume(row))).optional()?.transpose()
    }
}

impl Catalog {
    /// The ready volume of that identity.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn volume_by_uid(&self, volume_uid: Uuid) -> Result<Option<VolumeRecord>, CatalogError> {
        self.state().visible_volume("volume_uid = ?1", &volume_uid.to_string())
    }

    /// The ready volume of that name.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn volume_by_name(&self, name: &str) -> Result<Option<VolumeRecord>, CatalogError> {
        self.state().visible_volume("name = ?1", name)
    }

    /// The volume of that name in whatever state it is, for the management side.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn volume_in_any_state(
        &self,
        name: &str,
    ) -> Result<Option<(VolumeRecord, VolumeState)>, CatalogError> {
        self.state().volume_row("name = ?1", name)
    }

    /// The volume of that uid in whatever state it is, for the management side.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn volume_of_uid_in_any_state(
        &self,
        volume_uid: Uuid,
    ) -> Result<Option<(VolumeRecord, VolumeState)>, CatalogError> {
        self.state().volume_row("volume_uid = ?1", &volume_uid.to_string())
    }

    /// At most `limit` ready volumes of the scope whose names come after `after`, in order of name (by bytes), of those that have all of the
    /// labels; an empty value is any.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn list_volumes(
        &self,
        scope: &Scope,
        labels: &BTreeMap<String, String>,
        after: &str,
        limit: u32,
    ) -> Result<Vec<VolumeRecord>, CatalogError> {
        let state = self.state();
        let is_within = tenants::within("volumes.volume_uid", "?2");
        let mut query = state.db.prepare_cached(&select(&format!(
            "WHERE state = 'ready' AND name > ?1 AND {is_within} ORDER BY name"
        )))?;
        let rows = query.query_map((after, scope.for_query()), |row: &Row<'_>| Ok(records::volume(row)))?;
        let mut found = Vec::new();
        for row in rows {
            let (volume, _) = row??;
            let has = |(key, value): (&String, &String)| {
                volume.settings.labels.get(key).is_some_and(|found| value.is_empty() || found == value)
            };
            if found.len() >= limit as usize {
                break;
            }
            if labels.iter().all(has) {
                found.push(volume);
            }
        }
        Ok(found)
    }

    /// Every volume with its state, in order of name: for the recovery at start.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn all_volumes(&self) -> Result<Vec<(VolumeRecord, VolumeState)>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare(&select("ORDER BY name"))?;
        let rows = query.query_map([], |row: &Row<'_>| Ok(records::volume(row)))?;
        rows.map(|row| row?).collect()
    }

    /// The sizes of all volumes in memory together, in whatever state, in bytes.
    ///
    /// # Errors
    /// SQLite's.
    pub fn memory_volumes_bytes(&self) -> Result<u64, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare("SELECT capacity_bytes FROM volumes WHERE backend = ?1")?;
        let sizes = query.query_map([BackendKind::Memory.as_str()], |row| row.get::<_, i64>(0))?;
        let mut all_bytes: u64 = 0;
        for size in sizes {
            all_bytes = all_bytes.saturating_add(size?.unsigned_abs());
        }
        Ok(all_bytes)
    }

    /// Writes a new volume down in state `creating`, with a new identity.
    ///
    /// # Errors
    /// [`CatalogError::VolumeExists`] where the name is taken in any state; [`CatalogError::Quota`]; SQLite's.
    pub fn begin_creating(&self, new: &NewVolume) -> Result<VolumeRecord, CatalogError> {
        self.begin_creating_of(new, Uuid::new_v4(), None)
    }

    /// The same of a clone, with an identity of the caller's: `source_uid` is that of the snapshot or volume that it is made of.
    ///
    /// # Errors
    /// As [`Catalog::begin_creating`].
    pub fn begin_cloning(
        &self,
        new: &NewVolume,
        volume_uid: Uuid,
        source_uid: Uuid,
    ) -> Result<VolumeRecord, CatalogError> {
        self.begin_creating_of(new, volume_uid, Some(source_uid))
    }

    fn begin_creating_of(
        &self,
        new: &NewVolume,
        volume_uid: Uuid,
        source_uid: Option<Uuid>,
    ) -> Result<VolumeRecord, CatalogError> {
        let volume = VolumeRecord {
            name: new.name.clone(),
            volume_uid,
            capacity_bytes: new.capacity_bytes,
            block_size_bytes: new.block_size_bytes,
            backend: new.backend,
            write_cache_on: new.write_cache_on,
            incarnation: 1,
            created_at_ms: now_ms(),
            settings: new.settings.clone(),
        };
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let more = Usage { volumes: 1, bytes: volume.capacity_bytes, snapshots: 0 };
        tenants::check(&transaction, tenant_of(&volume.name), &more)?;
        let inserted = transaction.execute(
            "INSERT INTO volumes (volume_uid, name, state, capacity_bytes, block_size_bytes, backend, write_cache_on, \
                                  incarnation, attach_generation, created_at_ms, source_uid) \
             VALUES (?1, ?2, 'creating', ?3, ?4, ?5, ?6, ?7, 1, ?8, ?9) ON CONFLICT (name) DO NOTHING",
            (
                volume.volume_uid.to_string(),
                &volume.name,
                to_db(volume.capacity_bytes, "capacity_bytes")?,
                volume.block_size_bytes,
                volume.backend.in_catalog(),
                volume.write_cache_on,
                to_db(volume.incarnation, "incarnation")?,
                volume.created_at_ms,
                source_uid.map_or_else(String::new, |uid| uid.to_string()),
            ),
        )?;
        if inserted == 0 {
            return Err(CatalogError::VolumeExists);
        }
        settings::write(&transaction, volume.volume_uid, &volume.settings)?;
        if volume.backend == BackendKind::Lvm {
            let pool = self.inner.thin_pool.get().ok_or(CatalogError::NoThinPool)?;
            thin::add(&transaction, volume.volume_uid, pool)?;
        }
        transaction.commit()?;
        Ok(volume)
    }

    /// Of a clone: the uid of the snapshot or volume that it was made of.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn source_of(&self, volume_uid: Uuid) -> Result<Option<Uuid>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached("SELECT source_uid FROM volumes WHERE volume_uid = ?1")?;
        let found: Option<String> = query.query_row([volume_uid.to_string()], |row| row.get(0)).optional()?;
        match found.as_deref() {
            None | Some("") => Ok(None),
            Some(text) => match text.parse() {
                Ok(source_uid) => Ok(Some(source_uid)),
                Err(_) => Err(CatalogError::Damaged { table: "volumes", column: "source_uid" }),
            },
        }
    }

    /// `creating` becomes `ready`: the storage is there and durable.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`] where there is no such volume in that state; SQLite's.
    pub fn finish_creating(&self, volume_uid: Uuid) -> Result<(), CatalogError> {
        self.carrying_out(&volume_uid.to_string(), |db| change_state(db, volume_uid, "creating", "ready"))
    }

    /// `ready` becomes `deleting`: from here on the volume is gone for everybody, and its storage may be removed.
    ///
    /// # Errors
    /// [`CatalogError::VolumeAttached`] while it has an attachment; [`CatalogError::VolumeNotFound`] where there is no
    /// such volume in that state; SQLite's.
    pub fn begin_deleting(&self, volume_uid: Uuid) -> Result<(), CatalogError> {
        if self.volume_has_attachment(volume_uid)? {
            return Err(CatalogError::VolumeAttached(volume_uid));
        }
        let (request, subject) = (self.request.as_deref(), volume_uid.to_string());
        self.taking_away(|state| {
            let change = |db: &Connection| change_state(db, volume_uid, "ready", "deleting");
            requests::carry_out(&mut state.db, request, &subject, change)
        })
    }

    /// Gives a ready volume another name.
    ///
    /// # Errors
    /// [`CatalogError::VolumeExists`] where the name is taken in any state; [`CatalogError::VolumeNotFound`]; SQLite's.
    pub fn set_name(&self, volume_uid: Uuid, name: &str) -> Result<(), CatalogError> {
        let mut state = self.state();
        if state.volume_row("name = ?1", name)?.is_some() {
            return Err(CatalogError::VolumeExists);
        }
        let uid = volume_uid.to_string();
        requests::carry_out(&mut state.db, self.request.as_deref(), &uid, |db| {
            let sql = "UPDATE volumes SET name = ?2 WHERE volume_uid = ?1 AND state = 'ready'";
            let changed = db.execute(sql, (&uid, name))?;
            if changed == 1 { Ok(()) } else { Err(CatalogError::VolumeNotFound(volume_uid)) }
        })
    }

    /// Writes down how large a volume is now; its storage has that size.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`]; [`CatalogError::Quota`]; SQLite's.
    pub fn set_capacity(&self, volume_uid: Uuid, capacity_bytes: u64) -> Result<(), CatalogError> {
        let uid = volume_uid.to_string();
        self.carrying_out(&uid, |db| {
            check_growth(db, &uid, capacity_bytes)?;
            let sql = "UPDATE volumes SET capacity_bytes = ?2 WHERE volume_uid = ?1";
            let changed = db.execute(sql, (&uid, to_db(capacity_bytes, "capacity_bytes")?))?;
            if changed == 1 { Ok(()) } else { Err(CatalogError::VolumeNotFound(volume_uid)) }
        })
    }

    /// Whether the volume may be that large. Asked before its storage grows; [`Catalog::set_capacity`] has the last word.
    ///
    /// # Errors
    /// [`CatalogError::Quota`]; SQLite's.
    pub fn may_grow(&self, volume_uid: Uuid, capacity_bytes: u64) -> Result<(), CatalogError> {
        check_growth(&self.state().db, &volume_uid.to_string(), capacity_bytes)
    }

    /// Writes down that the volume is at least so large, and returns how large it is: whoever looks at a device may not be alone.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`]; SQLite's.
    pub fn raise_capacity(&self, volume_uid: Uuid, capacity_bytes: u64) -> Result<u64, CatalogError> {
        let uid = volume_uid.to_string();
        self.state().db.execute(
            "UPDATE volumes SET capacity_bytes = ?2 WHERE volume_uid = ?1 AND capacity_bytes < ?2",
            (&uid, to_db(capacity_bytes, "capacity_bytes")?),
        )?;
        let found = self.state().volume_row("volume_uid = ?1", &uid)?;
        found.map(|(volume, _)| volume.capacity_bytes).ok_or(CatalogError::VolumeNotFound(volume_uid))
    }

    /// Drops the row of a volume whose storage is gone (state `creating` or `deleting`); no row is a success.
    ///
    /// # Errors
    /// SQLite's.
    pub fn forget_volume(&self, volume_uid: Uuid) -> Result<(), CatalogError> {
        self.taking_away(|state| {
            state.db.execute(
                "DELETE FROM volumes WHERE volume_uid = ?1 AND state IN ('creating', 'deleting')",
                [volume_uid.to_string()],
            )?;
            Ok(())
        })?;
        // There may be room for it again.
        reserve::renew(&self.inner.data_dir);
        Ok(())
    }

    /// Hides a volume (or a snapshot) from [`Catalog::volume_by_uid`] and [`Catalog::volume_by_name`] until the guard is dropped, so
    /// that nobody new opens it while a deletion looks whether somebody has.
    pub fn conceal_volume(&self, volume_uid: Uuid) -> Concealed {
        self.state().concealed.insert(volume_uid);
        Concealed { catalog: self.clone(), volume_uid }
    }

    /// Raises the volume's storage incarnation to at least that; a volume that is no more has none.
    ///
    /// # Errors
    /// SQLite's.
    pub fn raise_incarnation_to(&self, volume_uid: Uuid, incarnation: u64) -> Result<(), CatalogError> {
        let is_raised = self.state().volume_row("volume_uid = ?1", &volume_uid.to_string())?;
        if is_raised.is_none_or(|(volume, _)| volume.incarnation >= incarnation) {
            return Ok(());
        }
        self.state().db.execute(
            "UPDATE volumes SET incarnation = max(incarnation, ?2) WHERE volume_uid = ?1",
            (volume_uid.to_string(), to_db(incarnation, "incarnation")?),
        )?;
        Ok(())
    }

    /// The volume's attach generation: raised by each attach by force, and never lowered.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`]; SQLite's.
    pub fn attach_generation(&self, volume_uid: Uuid) -> Result<u64, CatalogError> {
        let state = self.state();
        let mut query =
            state.db.prepare_cached("SELECT attach_generation FROM volumes WHERE volume_uid = ?1")?;
        let generation: Option<i64> =
            query.query_row([volume_uid.to_string()], |row| row.get(0)).optional()?;
        let generation = generation.ok_or(CatalogError::VolumeNotFound(volume_uid))?;
        u64::try_from(generation)
            .map_err(|_| CatalogError::Damaged { table: "volumes", column: "attach_generation" })
    }
}
