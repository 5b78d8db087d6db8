//! The tables that attachments are in, and a statement for all of them.

use rusqlite::{Connection, Params};

/// Where attachments are; see the text of `attachments.rs`.
pub(super) const TABLES: [&str; 3] = ["attachments", "shared_attachments", "snapshot_attachments"];

/// Executes a statement of each table in turn, its name written `TABLE`; how many rows it changed.
pub(super) fn execute_on_all(
    db: &Connection,
    sql: &str,
    values: impl Params + Copy,
) -> rusqlite::Result<usize> {
    TABLES
        .iter()
        .try_fold(0, |changed, table| Ok(changed + db.execute(&sql.replace("TABLE", table), values)?))
}
