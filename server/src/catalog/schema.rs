//! The catalog's format: tables, version, and what to do with another version.
//!
//! Format version 1 is [`SCHEMA_V1`] with [`ADDED_COLUMNS`] and the tables below them, which a catalog of an older program gets when it is
//! opened; `server/tests/fixtures/catalog_v1.sql` is a dump of one, kept so that every later
//! program can be tested on it. The version is `PRAGMA user_version`; `PRAGMA application_id` tells a catalog from another
//! SQLite file. A later format that this program can still use (columns added, with defaults) says so in
//! `server.oldest_reader`; any other later format is refused. Never holds data of its own beside the server's identity.
//! Called by [`super::Catalog::open`] only.

use std::path::{Path, PathBuf};

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
const ADDED_COLUMNS: [(&str, &str, &str); 20] = [
    ("attachments", "boot_id", "TEXT NOT NULL DEFAULT ''"),
    ("attachments", "is_shared", "INTEGER NOT NULL DEFAULT 0"),
    // Whoever made the row heeds `volumes.content`.
    ("attachments", "knows_content", "INTEGER NOT NULL DEFAULT 0"),
    // A JSON object of strings.
    ("volumes", "labels", "TEXT NOT NULL DEFAULT '{}'"),
    ("volumes", "description", "TEXT NOT NULL DEFAULT ''"),
    ("volumes", "is_protected", "INTEGER NOT NULL DEFAULT 0"),
    ("volumes", "is_read_only", "INTEGER NOT NULL DEFAULT 0"),
    // Of volumes that an older program made, nothing is known.
    ("volumes", "content", "TEXT NOT NULL DEFAULT 'written'"),
    ("volumes", "initialising_attachment_id", "TEXT NOT NULL DEFAULT ''"),
    ("volumes", "read_iops", "INTEGER NOT NULL DEFAULT 0"),
    ("volumes", "write_iops", "INTEGER NOT NULL DEFAULT 0"),
    ("volumes", "read_bytes_per_second", "INTEGER NOT NULL DEFAULT 0"),
    ("volumes", "write_bytes_per_second", "INTEGER NOT NULL DEFAULT 0"),
    ("volumes", "burst_seconds", "INTEGER NOT NULL DEFAULT 0"),
    // Of a clone: the uid of the snapshot or volume that it was made of.
    ("volumes", "source_uid", "TEXT NOT NULL DEFAULT ''"),
    // Several may write to it at once.
    ("volumes", "is_shared", "INTEGER NOT NULL DEFAULT 0"),
    // Whoever writes to it encrypts; of a snapshot as of its volume.
    ("volumes", "is_encrypted", "INTEGER NOT NULL DEFAULT 0"),
    ("snapshots", "is_encrypted", "INTEGER NOT NULL DEFAULT 0"),
    // Of the call that took it, and whether the file systems were found frozen at its end.
    ("snapshots", "freeze_id", "TEXT NOT NULL DEFAULT ''"),
    ("snapshots", "is_frozen", "INTEGER NOT NULL DEFAULT 0"),
];

/// A table that came later: snapshots. No foreign key stops what an older program does, and a snapshot outlives its volume.
const SNAPSHOTS: &str = "
CREATE TABLE IF NOT EXISTS snapshots (
    snapshot_uid      TEXT    PRIMARY KEY NOT NULL,
    volume_uid        TEXT    NOT NULL,
    name              TEXT    NOT NULL,
    group_uid         TEXT    NOT NULL,
    state             TEXT    NOT NULL CHECK (state IN ('creating', 'ready', 'deleting')),
    capacity_bytes    INTEGER NOT NULL CHECK (capacity_bytes > 0),
    block_size_bytes  INTEGER NOT NULL CHECK (block_size_bytes IN (512, 4096)),
    backend           TEXT    NOT NULL,
    write_cache_on    INTEGER NOT NULL CHECK (write_cache_on IN (0, 1)),
    created_at_ms     INTEGER NOT NULL,
    content           TEXT    NOT NULL,
    UNIQUE (volume_uid, name)
) STRICT;
CREATE INDEX IF NOT EXISTS snapshots_of_name ON snapshots (name);
";

/// A table that came later: who shares a volume with the one in `attachments`. A volume that an older program deletes takes its rows
/// along.
const SHARED_ATTACHMENTS: &str = "
CREATE TABLE IF NOT EXISTS shared_attachments (
    attachment_id  TEXT    PRIMARY KEY NOT NULL,
    volume_uid     TEXT    NOT NULL REFERENCES volumes (volume_uid) ON DELETE CASCADE,
    node_id        TEXT    NOT NULL,
    state          TEXT    NOT NULL CHECK (state IN ('active', 'ending')),
    read_only      INTEGER NOT NULL CHECK (read_only IN (0, 1)),
    secret         TEXT    NOT NULL,
    generation     INTEGER NOT NULL,
    session_epoch  INTEGER NOT NULL,
    created_at_ms  INTEGER NOT NULL,
    boot_id        TEXT    NOT NULL DEFAULT '',
    is_shared      INTEGER NOT NULL DEFAULT 1,
    knows_content  INTEGER NOT NULL DEFAULT 1
) STRICT;
";

/// A table that came later: who has a snapshot, the uid of which is in `volume_uid`. One that an older program deletes takes its rows
/// along.
const SNAPSHOT_ATTACHMENTS: &str = "
CREATE TABLE IF NOT EXISTS snapshot_attachments (
    attachment_id  TEXT    PRIMARY KEY NOT NULL,
    volume_uid     TEXT    NOT NULL REFERENCES snapshots (snapshot_uid) ON DELETE CASCADE,
    node_id        TEXT    NOT NULL,
    state          TEXT    NOT NULL CHECK (state IN ('active', 'ending')),
    read_only      INTEGER NOT NULL CHECK (read_only = 1),
    secret         TEXT    NOT NULL,
    generation     INTEGER NOT NULL,
    session_epoch  INTEGER NOT NULL,
    created_at_ms  INTEGER NOT NULL,
    boot_id        TEXT    NOT NULL,
    is_shared      INTEGER NOT NULL CHECK (is_shared = 1),
    knows_content  INTEGER NOT NULL
) STRICT;
";

/// Fires in older programs, too: who attaches by one of them may write to the volume, and `content` would not tell.
const OLDER_PROGRAMS_WRITE: &str = "
CREATE TRIGGER IF NOT EXISTS attached_by_an_older_program AFTER INSERT ON attachments WHEN NEW.knows_content = 0
BEGIN
    UPDATE volumes SET content = 'written', initialising_attachment_id = '' WHERE volume_uid = NEW.volume_uid;
END;
";

/// Adds the columns and tables that a catalog of an older program lacks.
pub(super) fn add_columns(db: &mut Connection) -> Result<(), CatalogError> {
    db.execute_batch(SNAPSHOTS)?;
    for (table, column, declaration) in ADDED_COLUMNS {
        add_column(db, table, column, declaration)?;
    }
    db.execute_batch(SHARED_ATTACHMENTS)?;
    db.execute_batch(OLDER_PROGRAMS_WRITE)?;
    Ok(db.execute_batch(SNAPSHOT_ATTACHMENTS)?)
}

/// Adds a column to a table that is there, unless it has it.
pub(super) fn add_column(
    db: &Connection,
    table: &str,
    column: &str,
    declaration: &str,
) -> Result<(), CatalogError> {
    let is_there: bool =
        db.query_row("SELECT count(*) FROM pragma_table_info(?1) WHERE name = ?2", (table, column), |row| {
            row.get(0)
        })?;
    if !is_there {
        db.execute_batch(&format!("ALTER TABLE {table} ADD COLUMN {column} {declaration}"))?;
    }
    Ok(())
}

/// Makes the tables in an empty database, unless there are volumes already; or checks that the ones there can be used.
pub(super) fn prepare(
    db: &mut Connection,
    path: &Path,
    storage_dirs: &[PathBuf],
) -> Result<(), CatalogError> {
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: u32 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let application_id: i32 = transaction.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let tables: u32 = transaction.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if tables == 0 && found == 0 {
        for dir in storage_dirs {
            let holds_volumes =
                holds_volumes(dir).map_err(|source| CatalogError::File { path: dir.clone(), source })?;
            if holds_volumes {
                return Err(CatalogError::Lost(dir.clone()));
            }
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

/// Whether anything there may be a volume or a snapshot; a file system's own directory (`lost+found`) is none.
fn holds_volumes(dir: &Path) -> std::io::Result<bool> {
    let entries = match std::fs::read_dir(dir) {
        // There is none before the first snapshot.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        entries => entries?,
    };
    for entry in entries {
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
