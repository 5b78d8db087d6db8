//! Attachments in the catalog: `active → ending → gone`, their secrets, generations and session epochs.
//!
//! ```text
//!   add_attachment          end_attachment           remove_attachment
//!  ──────────────▶ active ─────────────────▶ ending ───────────────────▶ (no row)
//! ```
//! Between `end_attachment` and `remove_attachment` the caller has the data side close the connections and wait for their
//! I/O. The row stays until that is done, so a wait that failed is taken up again by the next call on the volume, and
//! no second attachment can exist meanwhile. A row `ending` at start belonged to a process that is gone, with all its
//! connections: `remove_ending_attachments`. Never waits for the data side itself.
//!
//! A volume has one attachment, in `attachments`; or several that share it, all of which only read or all of which write: one of them there, the others in
//! `shared_attachments`. So a program that knows the first table alone sees a volume that is attached for as long as anybody has it.
//! Those of a snapshot, which all share it, are in `snapshot_attachments`; what their `volume_uid` names is the snapshot.

use proto::export_name::Secret;
use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior};
use uuid::Uuid;

use super::attachment_tables::{TABLES, execute_on_all};
use super::records::{
    self, AttachmentFilter, AttachmentRecord, AttachmentState, ListedAttachment, NewAttachment,
};
use super::{Catalog, CatalogError, State, grants, now_ms, tenants, to_db};

const COLUMNS: &str = "attachment_id, volume_uid, node_id, state, read_only, secret, generation, session_epoch, created_at_ms, boot_id, is_shared, knows_content";

/// An attachment, and whether it is ending.
type Held = (AttachmentRecord, AttachmentState);

/// Nobody takes a snapshot from anybody: its attachments are all of this generation.
const SNAPSHOT_GENERATION: i64 = 1;

/// All attachments, as a query takes them for a table.
fn all() -> String {
    let selected = TABLES.map(|table| format!("SELECT {COLUMNS} FROM {table}"));
    format!("({})", selected.join(" UNION ALL "))
}

/// Where the attachment of a volume has gone that was in the first table, one of those that share the volume takes its place.
fn move_up(db: &Connection) -> rusqlite::Result<()> {
    let first_of_others = "SELECT min(attachment_id) FROM shared_attachments \
                           WHERE volume_uid NOT IN (SELECT volume_uid FROM attachments) GROUP BY volume_uid";
    let copy = format!(
        "INSERT INTO attachments ({COLUMNS}) SELECT {COLUMNS} FROM shared_attachments WHERE attachment_id IN ({first_of_others})"
    );
    db.execute(&copy, [])?;
    let leave =
        "DELETE FROM shared_attachments WHERE attachment_id IN (SELECT attachment_id FROM attachments)";
    db.execute(leave, []).map(|_| ())
}

/// A query for a page of the attachments in a table, in order of what they are of. Those of volumes are found in that order, or by their
/// node, so that a page costs what is on it, however many volumes there are; of snapshots there are few.
pub(super) fn list_sql(table: &str, filter: &AttachmentFilter) -> String {
    let columns = COLUMNS.replace(", ", ", held.");
    let of_snapshots = "CASE WHEN volumes.name IS NULL THEN '@' || snapshot_uid ELSE volumes.name || '@' || snapshots.name END";
    let (name, from) = match (table, &filter.node_id) {
        ("snapshot_attachments", _) => (
            of_snapshots,
            format!(
                "{table} AS held CROSS JOIN snapshots ON snapshot_uid = held.volume_uid \
                 LEFT JOIN volumes ON volumes.volume_uid = snapshots.volume_uid AND volumes.state = 'ready'"
            ),
        ),
        (_, Some(_)) => (
            "volumes.name",
            format!("{table} AS held CROSS JOIN volumes ON volumes.volume_uid = held.volume_uid"),
        ),
        (_, None) => (
            "volumes.name",
            format!("volumes CROSS JOIN {table} AS held ON held.volume_uid = volumes.volume_uid"),
        ),
    };
    let of_name = match filter.volume_name {
        Some(_) => format!("{name} = ?3"),
        None => format!("?3 IS NULL AND {name} >= ?1"),
    };
    let of_node = if filter.node_id.is_some() { "node_id = ?4" } else { "?4 IS NULL" };
    let of_volume = if table == "snapshot_attachments" { "snapshots.volume_uid" } else { "held.volume_uid" };
    let of_tenants = tenants::within_asked(filter.tenants.as_deref(), of_volume, "?6");
    format!(
        "SELECT {name} AS volume_name, held.{columns} FROM {from} \
         WHERE ({name}, attachment_id) > (?1, ?2) AND {of_name} AND {of_node} AND {of_tenants} ORDER BY {name}, attachment_id LIMIT ?5"
    )
}

/// Writes a new attachment down, in the table of that name.
fn insert(db: &Connection, table: &str, attachment: &AttachmentRecord) -> Result<(), CatalogError> {
    db.execute(
        &format!(
            "INSERT INTO {table} ({COLUMNS}) VALUES (?1, ?2, ?3, 'active', ?4, ?5, ?6, 0, ?7, ?8, ?9, 1)"
        ),
        (
            attachment.attachment_id.to_string(),
            attachment.volume_uid.to_string(),
            &attachment.node_id,
            attachment.read_only,
            attachment.secret.expose(),
            to_db(attachment.generation, "generation")?,
            attachment.created_at_ms,
            &attachment.boot_id,
            attachment.is_shared,
        ),
    )?;
    Ok(())
}

/// A new attachment of that generation, with an identity and a secret of its own.
fn new_attachment(new: &NewAttachment, generation: i64) -> Result<AttachmentRecord, CatalogError> {
    let secret = Secret::generate().map_err(|error| CatalogError::Random(error.to_string()))?;
    Ok(AttachmentRecord {
        attachment_id: Uuid::new_v4(),
        volume_uid: new.volume_uid,
        node_id: new.node_id.clone(),
        read_only: new.read_only,
        secret,
        generation: u64::try_from(generation)
            .map_err(|_| CatalogError::Damaged { table: "volumes", column: "attach_generation" })?,
        session_epoch: 0,
        created_at_ms: now_ms(),
        boot_id: new.boot_id.clone(),
        is_shared: new.is_shared,
    })
}

impl State {
    fn attachment_row(&self, condition: &str, value: Uuid) -> Result<Option<Held>, CatalogError> {
        let mut query =
            self.db.prepare_cached(&format!("SELECT {COLUMNS} FROM {} WHERE {condition}", all()))?;
        query.query_row([value.to_string()], |row| Ok(records::attachment(row))).optional()?.transpose()
    }
}

impl Catalog {
    /// The active attachment of that identity: what a GO is checked against.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn attachment(&self, attachment_id: Uuid) -> Result<Option<AttachmentRecord>, CatalogError> {
        let found = self.attachment_in_any_state(attachment_id)?;
        Ok(found.filter(|(_, state)| *state == AttachmentState::Active).map(|(attachment, _)| attachment))
    }

    /// The attachment of that identity, ending or not: for the management side.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn attachment_in_any_state(&self, attachment_id: Uuid) -> Result<Option<Held>, CatalogError> {
        self.state().attachment_row("attachment_id = ?1", attachment_id)
    }

    /// The attachments of the volume or snapshot, ending or not, in order of identity: one, or several that share it.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn attachments_of_volume(&self, volume_uid: Uuid) -> Result<Vec<Held>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM {} WHERE volume_uid = ?1 ORDER BY attachment_id",
            all()
        ))?;
        let rows = query.query_map([volume_uid.to_string()], |row: &Row<'_>| Ok(records::attachment(row)))?;
        rows.map(|row| row?).collect()
    }

    /// True while the volume has an attachment, ending or not: writers by plain name are refused then.
    ///
    /// # Errors
    /// SQLite's.
    pub fn volume_has_attachment(&self, volume_uid: Uuid) -> Result<bool, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached("SELECT 1 FROM attachments WHERE volume_uid = ?1")?;
        Ok(query.exists([volume_uid.to_string()])?)
    }

    /// One of the volume's snapshots that has an attachment, ending or not.
    ///
    /// # Errors
    /// SQLite's.
    pub fn attached_snapshot(&self, volume_uid: Uuid) -> Result<Option<Uuid>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached(
            "SELECT snapshots.snapshot_uid FROM snapshots JOIN snapshot_attachments AS held ON held.volume_uid = snapshots.snapshot_uid \
             WHERE snapshots.volume_uid = ?1 ORDER BY snapshots.name LIMIT 1",
        )?;
        let found: Option<String> = query.query_row([volume_uid.to_string()], |row| row.get(0)).optional()?;
        let damaged = CatalogError::Damaged { table: "snapshots", column: "snapshot_uid" };
        found.map(|uid| uid.parse().map_err(|_| damaged)).transpose()
    }

    /// At most `limit` attachments (ending ones too) that come after `after`, each with the name of its volume or snapshot (as that is
    /// opened), in order of that name and of their identities.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn list_attachments(
        &self,
        filter: &AttachmentFilter,
        after: &ListedAttachment,
        limit: u32,
    ) -> Result<Vec<(String, Held)>, CatalogError> {
        let state = self.state();
        let mut found = Vec::new();
        for table in TABLES {
            let mut query = state.db.prepare_cached(&list_sql(table, filter))?;
            let ListedAttachment { volume_name, attachment_id } = after;
            let values = (
                volume_name,
                attachment_id,
                filter.volume_name.as_deref(),
                filter.node_id.as_deref(),
                limit,
                &filter.tenants,
            );
            let rows = query.query_map(values, |row: &Row<'_>| {
                let name: String = row.get("volume_name")?;
                Ok(records::attachment(row).map(|held| (name, held)))
            })?;
            for row in rows {
                found.push(row??);
            }
        }
        // Of each table they are the first.
        found.sort_by_cached_key(|(name, (held, _))| (name.clone(), held.attachment_id.to_string()));
        found.truncate(limit as usize);
        Ok(found)
    }

    /// Makes an attachment with a new identity, a new secret, and the volume's generation.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`] where the volume is not ready; [`CatalogError::VolumeAttached`] where it has an
    /// attachment, unless all share it; [`CatalogError::NotGranted`]; the random source's; SQLite's.
    pub fn add_attachment(&self, new: &NewAttachment) -> Result<AttachmentRecord, CatalogError> {
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let generation: i64 = transaction
            .query_row(
                "SELECT attach_generation FROM volumes WHERE volume_uid = ?1 AND state = 'ready'",
                [new.volume_uid.to_string()],
                |row| row.get(0),
            )
            .optional()?
            .ok_or(CatalogError::VolumeNotFound(new.volume_uid))?;
        if new.only_if_granted {
            grants::require(&transaction, new.volume_uid, &new.node_id, new.read_only)?;
        }
        let attachment = new_attachment(new, generation)?;
        // Who shares it does so to read, or to write, as all the others.
        let shares: Option<bool> = transaction
            .query_row(
                "SELECT is_shared = 1 AND read_only = ?2 FROM attachments WHERE volume_uid = ?1",
                (new.volume_uid.to_string(), new.read_only),
                |row| row.get(0),
            )
            .optional()?;
        let table = match shares {
            None => "attachments",
            Some(true) if new.is_shared => "shared_attachments",
            Some(_) => return Err(CatalogError::VolumeAttached(new.volume_uid)),
        };
        insert(&transaction, table, &attachment)?;
        transaction.commit()?;
        Ok(attachment)
    }

    /// Makes an attachment of a snapshot, whose uid is in `new.volume_uid`; others may have it as well.
    ///
    /// # Errors
    /// [`CatalogError::SnapshotNotFound`] where it is not ready; [`CatalogError::NotGranted`]: there are no grants of snapshots; the random
    /// source's; SQLite's.
    pub fn add_snapshot_attachment(&self, new: &NewAttachment) -> Result<AttachmentRecord, CatalogError> {
        if new.only_if_granted {
            return Err(CatalogError::NotGranted(new.volume_uid));
        }
        let attachment = new_attachment(new, SNAPSHOT_GENERATION)?;
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let is_ready: bool = transaction.query_row(
            "SELECT count(*) FROM snapshots WHERE snapshot_uid = ?1 AND state = 'ready'",
            [new.volume_uid.to_string()],
            |row| row.get(0),
        )?;
        if !is_ready {
            return Err(CatalogError::SnapshotNotFound(new.volume_uid));
        }
        insert(&transaction, "snapshot_attachments", &attachment)?;
        transaction.commit()?;
        Ok(attachment)
    }

    /// Says which boot of its node has an attachment that no boot had.
    ///
    /// # Errors
    /// [`CatalogError::AttachmentNotFound`]: it is not there, or bound; SQLite's.
    pub fn bind_attachment(&self, attachment_id: Uuid, boot_id: &str) -> Result<(), CatalogError> {
        let bound = execute_on_all(
            &self.state().db,
            "UPDATE TABLE SET boot_id = ?2 WHERE attachment_id = ?1 AND boot_id = ''",
            (&attachment_id.to_string(), boot_id),
        )?;
        if bound == 1 { Ok(()) } else { Err(CatalogError::AttachmentNotFound(attachment_id)) }
    }

    /// `active` becomes `ending`: nothing new is opened under the attachment from here on. With `raise_generation` the
    /// volume's attach generation goes up in the same step (an attach by force). Ending already: the same again.
    ///
    /// # Errors
    /// [`CatalogError::AttachmentNotFound`]; SQLite's.
    pub fn end_attachment(&self, attachment_id: Uuid, raise_generation: bool) -> Result<(), CatalogError> {
        self.taking_away(|state| {
            let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let ended = execute_on_all(
                &transaction,
                "UPDATE TABLE SET state = 'ending' WHERE attachment_id = ?1",
                [&attachment_id.to_string()],
            )?;
            if ended == 0 {
                return Err(CatalogError::AttachmentNotFound(attachment_id));
            }
            if raise_generation {
                transaction.execute(
                    &format!(
                        "UPDATE volumes SET attach_generation = attach_generation + 1 \
                         WHERE volume_uid = (SELECT volume_uid FROM {} WHERE attachment_id = ?1)",
                        all()
                    ),
                    [attachment_id.to_string()],
                )?;
            }
            Ok(transaction.commit()?)
        })
    }

    /// Drops an attachment that is ending and whose I/O has finished; no row is a success.
    ///
    /// # Errors
    /// SQLite's.
    pub fn remove_attachment(&self, attachment_id: Uuid) -> Result<(), CatalogError> {
        self.taking_away(|state| {
            let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            execute_on_all(
                &transaction,
                "DELETE FROM TABLE WHERE attachment_id = ?1 AND state = 'ending'",
                [&attachment_id.to_string()],
            )?;
            move_up(&transaction)?;
            Ok(transaction.commit()?)
        })
    }

    /// At start: drops what a killed server was ending (its connections are gone with it), and says how many.
    ///
    /// # Errors
    /// SQLite's.
    pub fn remove_ending_attachments(&self) -> Result<usize, CatalogError> {
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // An older program knows only the first. Where that is gone, or is another, the volume may have been somebody else's meanwhile.
        transaction.execute(
            "DELETE FROM shared_attachments WHERE volume_uid NOT IN (SELECT volume_uid FROM attachments WHERE is_shared = 1)",
            [],
        )?;
        let removed = execute_on_all(&transaction, "DELETE FROM TABLE WHERE state = 'ending'", [])?;
        move_up(&transaction)?;
        transaction.commit()?;
        Ok(removed)
    }

    /// Drops the volume's attachments, whatever their state, and has the next one's generation above `generation`: who held the
    /// volume must not go on with it. False: there was none.
    ///
    /// # Errors
    /// SQLite's.
    pub fn end_rolled_back(&self, volume_uid: Uuid, generation: u64) -> Result<bool, CatalogError> {
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let uid = volume_uid.to_string();
        let ended = execute_on_all(&transaction, "DELETE FROM TABLE WHERE volume_uid = ?1", [&uid])?;
        transaction.execute(
            // What the catalog knew of the content may be as old.
            "UPDATE volumes SET attach_generation = max(attach_generation, ?2) + 1, content = 'written' WHERE volume_uid = ?1",
            (&uid, to_db(generation, "attach_generation")?),
        )?;
        transaction.commit()?;
        Ok(ended > 0)
    }

    /// Raises the attachment's session epoch; durable before it returns. The epoch it has already is a success.
    ///
    /// # Errors
    /// [`CatalogError::StaleEpoch`] where a higher one is kept; [`CatalogError::AttachmentNotFound`] where the attachment
    /// is not active; [`CatalogError::TooLarge`] above 2^63 - 1; SQLite's.
    pub fn raise_session_epoch(&self, attachment_id: Uuid, epoch: u64) -> Result<(), CatalogError> {
        let epoch_in_db = to_db(epoch, "session_epoch")?;
        let state = self.state();
        let found = state.attachment_row("attachment_id = ?1", attachment_id)?;
        let Some((attachment, AttachmentState::Active)) = found else {
            return Err(CatalogError::AttachmentNotFound(attachment_id));
        };
        let current = attachment.session_epoch;
        if epoch < current {
            return Err(CatalogError::StaleEpoch { epoch, current });
        }
        if epoch > current {
            execute_on_all(
                &state.db,
                "UPDATE TABLE SET session_epoch = ?2 WHERE attachment_id = ?1",
                (&attachment_id.to_string(), epoch_in_db),
            )?;
        }
        Ok(())
    }
}
