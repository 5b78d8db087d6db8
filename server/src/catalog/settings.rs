//! What users set of a volume beside its size: labels, description, protection, limits; and what is known of its content.
//!
//! Owns the columns that hold it, which came after format version 1 (`schema.rs`): an older program leaves them as they are, and makes
//! volumes that have the defaults. Never: acts on a value; `lifecycle/settings.rs` decides who may change which, and
//! `volume/controls.rs` holds clients to limits and content.

use std::collections::BTreeMap;

use rusqlite::{Connection, TransactionBehavior};
use uuid::Uuid;

use super::columns::{Columns, damaged};
use super::{Catalog, CatalogError, requests, to_db};

/// The columns, as a query names them.
pub(super) const COLUMNS: &str = "labels, description, is_protected, is_read_only, is_shared, is_encrypted, content, initialising_attachment_id, read_iops, write_iops, \
     read_bytes_per_second, write_bytes_per_second, burst_seconds";

/// Limits that all clients of a volume have together; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VolumeLimits {
    /// READs per second.
    pub read_iops: u64,
    /// WRITEs, WRITE_ZEROES and TRIMs per second.
    pub write_iops: u64,
    /// Bytes that are read per second.
    pub read_bytes_per_second: u64,
    /// Bytes of WRITEs per second.
    pub write_bytes_per_second: u64,
    /// Seconds of unused limit that may be saved up; 0 is the default.
    pub burst_seconds: u32,
}

/// What is known of a volume's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Content {
    /// Nobody has begun to write to it.
    NeverWritten,
    /// An attachment was about to format it.
    Initialising {
        /// Which.
        attachment_id: Uuid,
    },
    /// There may be data.
    #[default]
    Written,
}

impl Content {
    /// The word for it, in the catalog and in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NeverWritten => "never-written",
            Self::Initialising { .. } => "initialising",
            Self::Written => "written",
        }
    }

    /// The attachment that formats the volume, as text; empty where none does.
    fn attachment_text(self) -> String {
        match self {
            Self::Initialising { attachment_id } => attachment_id.to_string(),
            Self::NeverWritten | Self::Written => String::new(),
        }
    }
}

/// What is set of a volume. The default is what a volume of an older program has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VolumeSettings {
    /// By key.
    pub labels: BTreeMap<String, String>,
    /// For people.
    pub description: String,
    /// It is not deleted or restored.
    pub is_protected: bool,
    /// Nobody writes to it.
    pub is_read_only: bool,
    /// Several may write to it at once; from its creation on.
    pub is_shared: bool,
    /// Its clients encrypt what they write; from its creation on.
    pub is_encrypted: bool,
    /// What is known of its bytes.
    pub content: Content,
    /// Of its clients.
    pub limits: VolumeLimits,
}

/// Reads the settings from a row of `volumes`.
pub(super) fn settings(columns: &Columns<'_>) -> Result<VolumeSettings, CatalogError> {
    let content = match columns.text("content")?.as_str() {
        "never-written" => Content::NeverWritten,
        "initialising" => {
            Content::Initialising { attachment_id: columns.uuid("initialising_attachment_id")? }
        }
        "written" => Content::Written,
        _ => return Err(damaged("volumes", "content")),
    };
    Ok(VolumeSettings {
        labels: serde_json::from_str(&columns.text("labels")?).map_err(|_| damaged("volumes", "labels"))?,
        description: columns.text("description")?,
        is_protected: columns.flag("is_protected")?,
        is_read_only: columns.flag("is_read_only")?,
        is_shared: columns.flag("is_shared")?,
        is_encrypted: columns.flag("is_encrypted")?,
        content,
        limits: VolumeLimits {
            read_iops: columns.number("read_iops")?,
            write_iops: columns.number("write_iops")?,
            read_bytes_per_second: columns.number("read_bytes_per_second")?,
            write_bytes_per_second: columns.number("write_bytes_per_second")?,
            burst_seconds: columns.number("burst_seconds")?,
        },
    })
}

/// Writes all settings of a volume.
pub(super) fn write(
    db: &Connection,
    volume_uid: Uuid,
    settings: &VolumeSettings,
) -> Result<(), CatalogError> {
    write_properties(db, volume_uid, settings)?;
    write_limits(db, volume_uid, &settings.limits)?;
    write_content(db, volume_uid, settings.content)
}

fn write_properties(
    db: &Connection,
    volume_uid: Uuid,
    settings: &VolumeSettings,
) -> Result<(), CatalogError> {
    let labels: serde_json::Value =
        settings.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let values = (
        volume_uid.to_string(),
        labels.to_string(),
        &settings.description,
        settings.is_protected,
        settings.is_read_only,
        settings.is_shared,
        settings.is_encrypted,
    );
    let sql = "UPDATE volumes SET labels = ?2, description = ?3, is_protected = ?4, is_read_only = ?5, is_shared = ?6, \
               is_encrypted = ?7 WHERE volume_uid = ?1";
    changed_one(db.execute(sql, values)?, volume_uid)
}

fn write_limits(db: &Connection, volume_uid: Uuid, limits: &VolumeLimits) -> Result<(), CatalogError> {
    let values = (
        volume_uid.to_string(),
        to_db(limits.read_iops, "read_iops")?,
        to_db(limits.write_iops, "write_iops")?,
        to_db(limits.read_bytes_per_second, "read_bytes_per_second")?,
        to_db(limits.write_bytes_per_second, "write_bytes_per_second")?,
        limits.burst_seconds,
    );
    let sql = "UPDATE volumes SET read_iops = ?2, write_iops = ?3, read_bytes_per_second = ?4, write_bytes_per_second = ?5, \
               burst_seconds = ?6 WHERE volume_uid = ?1";
    changed_one(db.execute(sql, values)?, volume_uid)
}

fn write_content(db: &Connection, volume_uid: Uuid, content: Content) -> Result<(), CatalogError> {
    let values = (volume_uid.to_string(), content.as_str(), content.attachment_text());
    let sql = "UPDATE volumes SET content = ?2, initialising_attachment_id = ?3 WHERE volume_uid = ?1";
    changed_one(db.execute(sql, values)?, volume_uid)
}

fn changed_one(changed: usize, volume_uid: Uuid) -> Result<(), CatalogError> {
    if changed == 1 { Ok(()) } else { Err(CatalogError::VolumeNotFound(volume_uid)) }
}

impl Catalog {
    /// Replaces labels, description, protection, read-only mark and limits of a volume; its content stays.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`]; [`CatalogError::TooLarge`] above 2^63 - 1; SQLite's.
    pub fn set_properties(&self, volume_uid: Uuid, settings: &VolumeSettings) -> Result<(), CatalogError> {
        self.carrying_out(&volume_uid.to_string(), |db| {
            write_properties(db, volume_uid, settings)?;
            write_limits(db, volume_uid, &settings.limits)
        })
    }

    /// Puts back what [`Catalog::set_properties`] replaced: the call is not carried out.
    ///
    /// # Errors
    /// As of that.
    pub fn put_properties_back(
        &self,
        volume_uid: Uuid,
        settings: &VolumeSettings,
    ) -> Result<(), CatalogError> {
        self.beside().carrying_out("", |db| {
            write_properties(db, volume_uid, settings)?;
            write_limits(db, volume_uid, &settings.limits)?;
            self.request.as_deref().map_or(Ok(()), |request| requests::forget(db, request))
        })
    }

    /// Replaces the limits of a volume.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`]; [`CatalogError::TooLarge`] above 2^63 - 1; SQLite's.
    pub fn set_limits(&self, volume_uid: Uuid, limits: &VolumeLimits) -> Result<(), CatalogError> {
        self.carrying_out(&volume_uid.to_string(), |db| write_limits(db, volume_uid, limits))
    }

    /// Replaces what is known of a volume's content, if that is `from` now. False: it is something else.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`]; SQLite's, or a damaged row.
    pub fn change_content(&self, volume_uid: Uuid, from: Content, to: Content) -> Result<bool, CatalogError> {
        let mut state = self.state();
        let found = state.volume_row("volume_uid = ?1", &volume_uid.to_string())?;
        let (volume, _) = found.ok_or(CatalogError::VolumeNotFound(volume_uid))?;
        if volume.settings.content != from {
            return Ok(false);
        }
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        write_content(&transaction, volume_uid, to)?;
        transaction.commit()?;
        Ok(true)
    }

    /// Somebody is about to write to a volume: its content is [`Content::Written`] from now on, whatever it was.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`]; SQLite's.
    pub fn mark_written(&self, volume_uid: Uuid) -> Result<(), CatalogError> {
        write_content(&self.state().db, volume_uid, Content::Written)
    }
}
