//! The catalog's format: tables, version, and what to do with another version.
//!
//! Format version 1 is [`SCHEMA_V1`] with [`ADDED_COLUMNS`], which a catalog of an older program gets when it is opened; `server/tests/fixtures/catalog_v1.sql` is a dump of one, kept so that every later
//! program can be tested on it. The version is `PRAGMA user_version`; `PRAGMA application_id` tells a catalog from another
//! SQLite file. A later format that this program can still use (columns added, with defaults) says so in
//! `server.oldest_reader`; any other later format is refused. Never holds data of its own beside the server's identity.
//! Called by [`super::Catalog::open`] only.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};
use uuid::Uuid;

use super::{CatalogError, now_ms};

/// Version of the format that this program writes.
pub const FORMAT_VERSION: u32 = 1;
/// "VOLN": marks an SQLite file as a volnode catalog.
const APPLICATION_ID: i32 = 0x564f_4c4e;

/// Numbers are signed 64 bits, so quantities end at 2^63 - 1. Times are milliseconds since the Unix epoch, UUIDs their
/// lower-case text, so that an administrator can read the file.
const SCHEMA_V1: &str = "
CREATE TABLE server (
    only_row       INTEGER PRIMARY KEY CHECK (only_row = 1),
    server_id      TEXT    NOT NULL,
    oldest_reader  INTEGER NOT NULL,
    created_at_ms  INTEGER NOT NULL
) STRICT;
CREATE TABLE volumes (
    volume_uid        TEXT    PRIMARY KEY NOT NULL,
    name              TEXT    NOT NULL UNIQUE,
    state             TEXT    NOT NULL CHECK (state IN ('creating', 'ready', 'deleting')),
    capacity_bytes    INTEGER NOT NULL CHECK (capacity_bytes > 0),
    block_size_bytes  INTEGER NOT NULL CHECK (block_size_bytes IN (512, 4096)),
    backend           TEXT    NOT NULL,
    write_cache_on    INTEGER NOT NULL CHECK (write_cache_on IN (0, 1)),
    incarnation       INTEGER NOT NULL,
    attach_generation INTEGER NOT NULL,
    created_at_ms     INTEGER NOT NULL
) STRICT;
CREATE TABLE attachments (
    attachment_id  TEXT    PRIMARY KEY NOT NULL,
    volume_uid     TEXT    NOT NULL UNIQUE REFERENCES volumes (volume_uid) ON DELETE RESTRICT,
    node_id        TEXT    NOT NULL,
    state          TEXT    NOT NULL CHECK (state IN ('active', 'ending')),
    read_only      INTEGER NOT NULL CHECK (read_only IN (0, 1)),
    secret         TEXT    NOT NULL,
    generation     INTEGER NOT NULL,
    session_epoch  INTEGER NOT NULL,
    created_at_ms  INTEGER NOT NULL
) STRICT;
";

/// Columns that came later: table, column, and how it is declared. Older programs leave them alone.
const ADDED_COLUMNS: [(&str, &str, &str); 1] = [("attachments", "boot_id", "TEXT NOT NULL DEFAULT ''")];

/// Adds the columns that a catalog of an older program lacks.
pub(super) fn add_columns(db: &mut Connection) -> Result<(), CatalogError> {
    for (table, column, declaration) in ADDED_COLUMNS {
        let is_there: bool = db.query_row(
            "SELECT count(*) FROM pragma_table_info(?1) WHERE name = ?2",
            (table, column),
            |row| row.get(0),
        )?;
        if !is_there {
            db.execute_batch(&format!("ALTER TABLE {table} ADD COLUMN {column} {declaration}"))?;
        }
    }
    Ok(())
}

/// Makes the tables in an empty database, unless there are volumes already; or checks that the ones there can be used.
pub(super) fn prepare(db: &mut Connection, path: &Path, volumes_dir: &Path) -> Result<(), CatalogError> {
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: u32 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let application_id: i32 = transaction.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let tables: u32 = transaction.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if tables == 0 && found == 0 {
        let holds_volumes = holds_volumes(volumes_dir)
            .map_err(|source| CatalogError::File { path: volumes_dir.to_owned(), source })?;
        if holds_volumes {
            return Err(CatalogError::Lost(volumes_dir.to_owned()));
        }
        transaction.execute_batch(SCHEMA_V1)?;
        transaction.execute(
            "INSERT INTO server (only_row, server_id, oldest_reader, created_at_ms) VALUES (1, ?1, ?2, ?3)",
            (Uuid::new_v4().to_string(), FORMAT_VERSION, now_ms()),
        )?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", FORMAT_VERSION)?;
        return Ok(transaction.commit()?);
    }
    if application_id != APPLICATION_ID || found == 0 {
        return Err(CatalogError::Foreign(path.to_owned()));
    }
    if found > FORMAT_VERSION {
        // A later format promises only that this one value stays where it is.
        let needed: u32 = transaction.query_row("SELECT oldest_reader FROM server", [], |row| row.get(0))?;
        if needed > FORMAT_VERSION {
            return Err(CatalogError::NewerFormat { found, needed });
        }
        tracing::warn!(
            found,
            known = FORMAT_VERSION,
            "the catalog was written by a newer volserver; its additions are left alone"
        );
    }
    Ok(())
}

/// Whether anything there may be a volume; a file system's own directory (`lost+found`) is none.
fn holds_volumes(dir: &Path) -> std::io::Result<bool> {
    for entry in std::fs::read_dir(dir)? {
        if entry?.file_name() != "lost+found" {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The server's identity.
pub(super) fn server_id(db: &Connection) -> Result<Uuid, CatalogError> {
    let text: String = db.query_row("SELECT server_id FROM server", [], |row| row.get(0))?;
    text.parse().map_err(|_| CatalogError::Damaged { table: "server", column: "server_id" })
}
