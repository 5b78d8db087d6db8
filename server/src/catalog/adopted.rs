//! Adopted volumes in the catalog: where the device or file of each is, and what it is known by.
//!
//! A volume is adopted where it has a row in `adopted_volumes`. Its row in `volumes` says `file`, so that a program from before there
//! were such volumes takes it for one whose file is missing: it serves the others, and never touches the device. The row goes with
//! the volume's own. Never touches a device itself; called by `lifecycle/adopted.rs` and by whoever opens an adopted volume.

use rusqlite::OptionalExtension as _;
use uuid::Uuid;

use super::{Catalog, CatalogError};

/// Table that came after the first format; older programs leave it alone, but for rows that go with those of `volumes`.
pub(super) const TABLE: &str = "
CREATE TABLE IF NOT EXISTS adopted_volumes (
    volume_uid  TEXT PRIMARY KEY NOT NULL REFERENCES volumes (volume_uid) ON DELETE CASCADE,
    kind        TEXT NOT NULL,
    path        TEXT NOT NULL,
    identity    TEXT NOT NULL
) STRICT;
";

/// What was adopted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdoptedKind {
    /// A block device.
    BlockDevice,
    /// A regular file.
    RawFile,
}

impl AdoptedKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::BlockDevice => "block",
            Self::RawFile => "file",
        }
    }
}

/// By what an adopted volume's storage is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// What it is.
    pub kind: AdoptedKind,
    /// Where it was found last; absolute, without symbolic links.
    pub path: String,
    /// What a block device is known by, whatever its name; empty where it has nothing of the kind.
    pub identity: String,
}

impl Catalog {
    /// What the volume adopted; `None` of one that has storage of ours, or is not there.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn adopted(&self, volume_uid: Uuid) -> Result<Option<Adopted>, CatalogError> {
        let state = self.state();
        let mut query = state
            .db
            .prepare_cached("SELECT kind, path, identity FROM adopted_volumes WHERE volume_uid = ?1")?;
        let row: Option<(String, String, String)> = query
            .query_row([volume_uid.to_string()], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .optional()?;
        let Some((kind, path, identity)) = row else { return Ok(None) };
        let kind = match kind.as_str() {
            "block" => AdoptedKind::BlockDevice,
            "file" => AdoptedKind::RawFile,
            _ => return Err(CatalogError::Damaged { table: "adopted_volumes", column: "kind" }),
        };
        Ok(Some(Adopted { kind, path, identity }))
    }

    /// Writes down what a volume that is being made adopts. The name of another volume that has adopted the same: nothing was changed.
    ///
    /// # Errors
    /// SQLite's; the volume is not there.
    pub fn add_adopted(&self, volume_uid: Uuid, adopted: &Adopted) -> Result<Option<String>, CatalogError> {
        let Adopted { kind, path, identity } = adopted;
        // Nobody else adds one between the question and the row.
        let state = self.state();
        let mut query = state.db.prepare_cached(
            "SELECT name FROM adopted_volumes JOIN volumes USING (volume_uid) \
             WHERE (identity = ?1 AND identity != '') OR (path = ?2 AND (identity = '' OR ?1 = ''))",
        )?;
        let other: Option<String> = query.query_row((identity, path), |row| row.get(0)).optional()?;
        if other.is_none() {
            state.db.execute(
                "INSERT INTO adopted_volumes (volume_uid, kind, path, identity) VALUES (?1, ?2, ?3, ?4)",
                (volume_uid.to_string(), kind.as_str(), path, identity),
            )?;
        }
        Ok(other)
    }

    /// The device of an adopted volume was found in another place.
    ///
    /// # Errors
    /// SQLite's.
    pub fn set_adopted_path(&self, volume_uid: Uuid, path: &str) -> Result<(), CatalogError> {
        self.state().db.execute(
            "UPDATE adopted_volumes SET path = ?2 WHERE volume_uid = ?1",
            (volume_uid.to_string(), path),
        )?;
        Ok(())
    }

    /// Every adopted volume that is ready.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn adopted_uids(&self) -> Result<Vec<Uuid>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(
            "SELECT volume_uid FROM adopted_volumes JOIN volumes USING (volume_uid) WHERE state = 'ready'",
        )?;
        let rows = query.query_map([], |row| row.get::<_, String>(0))?;
        let damaged = |_| CatalogError::Damaged { table: "adopted_volumes", column: "volume_uid" };
        rows.map(|row| row?.parse().map_err(damaged)).collect()
    }
}
