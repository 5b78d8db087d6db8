//! One row of the catalog, column by column.

use rusqlite::Row;
use uuid::Uuid;

use super::{BackendKind, CatalogError};

pub(super) fn damaged(table: &'static str, column: &'static str) -> CatalogError {
    CatalogError::Damaged { table, column }
}

/// Reads one column of a row, whatever its type; a value that does not fit is damage.
pub(super) struct Columns<'a> {
    pub(super) row: &'a Row<'a>,
    pub(super) table: &'static str,
}

impl Columns<'_> {
    pub(super) fn text(&self, column: &'static str) -> Result<String, CatalogError> {
        self.row.get(column).map_err(|_| damaged(self.table, column))
    }

    pub(super) fn uuid(&self, column: &'static str) -> Result<Uuid, CatalogError> {
        self.text(column)?.parse().map_err(|_| damaged(self.table, column))
    }

    pub(super) fn signed(&self, column: &'static str) -> Result<i64, CatalogError> {
        self.row.get(column).map_err(|_| damaged(self.table, column))
    }

    pub(super) fn number<T: TryFrom<i64>>(&self, column: &'static str) -> Result<T, CatalogError> {
        T::try_from(self.signed(column)?).map_err(|_| damaged(self.table, column))
    }

    pub(super) fn flag(&self, column: &'static str) -> Result<bool, CatalogError> {
        Ok(self.signed(column)? != 0)
    }

    pub(super) fn backend(&self) -> Result<BackendKind, CatalogError> {
        match self.text("backend")?.as_str() {
            "file" => Ok(BackendKind::File),
            "memory" => Ok(BackendKind::Memory),
            "device" => Ok(BackendKind::Device),
            "lvm" => Ok(BackendKind::Lvm),
            _ => Err(damaged(self.table, "backend")),
        }
    }
}
