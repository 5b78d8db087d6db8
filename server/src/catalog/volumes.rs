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

use rusqlite::{OptionalExtension as _, Row};
use uuid::Uuid;

use super::records::{self, BackendKind, NewVolume, VolumeRecord, VolumeState};
use super::{Catalog, CatalogError, State, now_ms, reserve, to_db};

const COLUMNS: &str = "volume_uid, name, state, capacity_bytes, block_size_bytes, backend, write_cache_on, incarnation, created_at_ms";

/// Hides a volume from the data side until dropped.
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

    fn volume_row(
        &self,
        condition: &str,
        value: &str,
    ) -> Result<Option<(VolumeRecord, VolumeState)>, CatalogError> {
        let mut query =
            self.db.prepare_cached(&format!("SELECT {COLUMNS} FROM volumes WHERE {condition}"))?;
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

    /// At most `limit` ready volumes whose names come after `after`, in order of name (by bytes).
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn list_volumes(&self, after: &str, limit: u32) -> Result<Vec<VolumeRecord>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM volumes WHERE state = 'ready' AND name > ?1 ORDER BY name LIMIT ?2"
        ))?;
        let rows = query.query_map((after, limit), |row: &Row<'_>| Ok(records::volume(row)))?;
        rows.map(|row| row?.map(|(volume, _)| volume)).collect()
    }

    /// Every volume with its state, in order of name: for the recovery at start.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn all_volumes(&self) -> Result<Vec<(VolumeRecord, VolumeState)>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare(&format!("SELECT {COLUMNS} FROM volumes ORDER BY name"))?;
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
    /// [`CatalogError::VolumeExists`] where the name is taken in any state; SQLite's.
    pub fn begin_creating(&self, new: &NewVolume) -> Result<VolumeRecord, CatalogError> {
        let volume = VolumeRecord {
            name: new.name.clone(),
            volume_uid: Uuid::new_v4(),
            capacity_bytes: new.capacity_bytes,
            block_size_bytes: new.block_size_bytes,
            backend: new.backend,
            write_cache_on: new.write_cache_on,
            incarnation: 1,
            created_at_ms: now_ms(),
        };
        let inserted = self.state().db.execute(
            "INSERT INTO volumes (volume_uid, name, state, capacity_bytes, block_size_bytes, backend, write_cache_on, \
                                  incarnation, attach_generation, created_at_ms) \
             VALUES (?1, ?2, 'creating', ?3, ?4, ?5, ?6, ?7, 1, ?8) ON CONFLICT (name) DO NOTHING",
            (
                volume.volume_uid.to_string(),
                &volume.name,
                to_db(volume.capacity_bytes, "capacity_bytes")?,
                volume.block_size_bytes,
                volume.backend.as_str(),
                volume.write_cache_on,
                to_db(volume.incarnation, "incarnation")?,
                volume.created_at_ms,
            ),
        )?;
        if inserted == 1 { Ok(volume) } else { Err(CatalogError::VolumeExists) }
    }

    /// `creating` becomes `ready`: the storage is there and durable.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`] where there is no such volume in that state; SQLite's.
    pub fn finish_creating(&self, volume_uid: Uuid) -> Result<(), CatalogError> {
        self.change_state(volume_uid, "creating", "ready")
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
        self.change_state(volume_uid, "ready", "deleting")
    }

    fn change_state(&self, volume_uid: Uuid, from: &str, to: &str) -> Result<(), CatalogError> {
        let changed = self.state().db.execute(
            "UPDATE volumes SET state = ?3 WHERE volume_uid = ?1 AND state = ?2",
            (volume_uid.to_string(), from, to),
        )?;
        if changed == 1 { Ok(()) } else { Err(CatalogError::VolumeNotFound(volume_uid)) }
    }

    /// Writes down how large a volume is now; its storage has that size.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`]; SQLite's.
    pub fn set_capacity(&self, volume_uid: Uuid, capacity_bytes: u64) -> Result<(), CatalogError> {
        let changed = self.state().db.execute(
            "UPDATE volumes SET capacity_bytes = ?2 WHERE volume_uid = ?1",
            (volume_uid.to_string(), to_db(capacity_bytes, "capacity_bytes")?),
        )?;
        if changed == 1 { Ok(()) } else { Err(CatalogError::VolumeNotFound(volume_uid)) }
    }

    /// Drops the row of a volume whose storage is gone (state `creating` or `deleting`); no row is a success.
    ///
    /// # Errors
    /// SQLite's.
    pub fn forget_volume(&self, volume_uid: Uuid) -> Result<(), CatalogError> {
        self.state().db.execute(
            "DELETE FROM volumes WHERE volume_uid = ?1 AND state IN ('creating', 'deleting')",
            [volume_uid.to_string()],
        )?;
        // There may be room for it again.
        reserve::renew(&self.inner.data_dir);
        Ok(())
    }

    /// Hides a volume from [`Catalog::volume_by_uid`] and [`Catalog::volume_by_name`] until the guard is dropped, so
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
