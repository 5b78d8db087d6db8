//! Volumes in a thin pool of LVM, in the catalog: which pool each is in.
//!
//! A volume is one where it has a row in `thin_volumes`, which is made and goes with its own. Its row in `volumes` says `file`, so that a
//! program from before there were such volumes takes it for one whose file is missing: it serves the others, and never touches the pool.
//! The logical volume's name is built from the volume's uid (`backend/lvm/`). Called by `serve.rs` and by whoever opens one.

use rusqlite::OptionalExtension as _;
use rusqlite::Transaction;
use uuid::Uuid;

use super::{Catalog, CatalogError};

/// Tables that came after the first format; older programs leave them alone, but for rows that go with those of `volumes` and `snapshots`.
pub(super) const TABLE: &str = "
CREATE TABLE IF NOT EXISTS thin_volumes (
    volume_uid  TEXT PRIMARY KEY NOT NULL REFERENCES volumes (volume_uid) ON DELETE CASCADE,
    pool        TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS thin_snapshots (
    snapshot_uid  TEXT PRIMARY KEY NOT NULL REFERENCES snapshots (snapshot_uid) ON DELETE CASCADE,
    pool          TEXT NOT NULL
) STRICT;
";

/// Of a volume that is being made.
pub(super) fn add(transaction: &Transaction<'_>, volume_uid: Uuid, pool: &str) -> Result<(), CatalogError> {
    transaction.execute(
        "INSERT INTO thin_volumes (volume_uid, pool) VALUES (?1, ?2)",
        (volume_uid.to_string(), pool),
    )?;
    Ok(())
}

/// Of a snapshot that is being made, whose volume may be gone one day: it is in that one's pool.
pub(super) fn add_snapshot(
    transaction: &Transaction<'_>,
    snapshot_uid: Uuid,
    volume_uid: Uuid,
) -> Result<(), CatalogError> {
    transaction.execute(
        "INSERT INTO thin_snapshots (snapshot_uid, pool) SELECT ?1, pool FROM thin_volumes WHERE volume_uid = ?2",
        (snapshot_uid.to_string(), volume_uid.to_string()),
    )?;
    Ok(())
}

impl Catalog {
    /// New volumes of the backend `lvm` are in this pool (`VG/POOL`). Once, before there are any.
    pub fn set_thin_pool(&self, pool: String) {
        self.inner.thin_pool.get_or_init(|| pool);
    }

    /// In which pool the volume is, as `VG/POOL`; `None`: in none.
    ///
    /// # Errors
    /// SQLite's.
    pub fn thin_pool_of(&self, volume_uid: Uuid) -> Result<Option<String>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached("SELECT pool FROM thin_volumes WHERE volume_uid = ?1")?;
        Ok(query.query_row([volume_uid.to_string()], |row| row.get(0)).optional()?)
    }
    /// In which pool the snapshot is, as `VG/POOL`; `None`: in none, or it is not known, of one that an older program made.
    ///
    /// # Errors
    /// SQLite's.
    pub fn thin_pool_of_snapshot(&self, snapshot_uid: Uuid) -> Result<Option<String>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached("SELECT pool FROM thin_snapshots WHERE snapshot_uid = ?1")?;
        Ok(query.query_row([snapshot_uid.to_string()], |row| row.get(0)).optional()?)
    }
}
