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

use proto::export_name::Secret;
use rusqlite::{OptionalExtension as _, Row, TransactionBehavior};
use uuid::Uuid;

use super::records::{self, AttachmentFilter, AttachmentRecord, AttachmentState, NewAttachment};
use super::{Catalog, CatalogError, State, now_ms, to_db};

const COLUMNS: &str = "attachment_id, volume_uid, node_id, state, read_only, secret, generation, session_epoch, created_at_ms, boot_id";

impl State {
    fn attachment_row(
        &self,
        condition: &str,
        value: Uuid,
    ) -> Result<Option<(AttachmentRecord, AttachmentState)>, CatalogError> {
        let mut query =
            self.db.prepare_cached(&format!("SELECT {COLUMNS} FROM attachments WHERE {condition}"))?;
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
    pub fn attachment_in_any_state(
        &self,
        attachment_id: Uuid,
    ) -> Result<Option<(AttachmentRecord, AttachmentState)>, CatalogError> {
        self.state().attachment_row("attachment_id = ?1", attachment_id)
    }

    /// The one attachment of the volume, ending or not.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn attachment_of_volume(
        &self,
        volume_uid: Uuid,
    ) -> Result<Option<(AttachmentRecord, AttachmentState)>, CatalogError> {
        self.state().attachment_row("volume_uid = ?1", volume_uid)
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

    /// At most `limit` attachments (ending ones too) of volumes whose names come after `after`, each with its volume's
    /// name, in order of that name.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn list_attachments(
        &self,
        filter: &AttachmentFilter,
        after: &str,
        limit: u32,
    ) -> Result<Vec<(String, AttachmentRecord)>, CatalogError> {
        let state = self.state();
        let columns = COLUMNS.replace(", ", ", attachments.");
        let mut query = state.db.prepare_cached(&format!(
            "SELECT volumes.name AS volume_name, attachments.{columns} \
             FROM attachments JOIN volumes USING (volume_uid) \
             WHERE volumes.name > ?1 AND (?2 IS NULL OR volumes.name = ?2) AND (?3 IS NULL OR node_id = ?3) \
             ORDER BY volumes.name LIMIT ?4"
        ))?;
        let values = (after, filter.volume_name.as_deref(), filter.node_id.as_deref(), limit);
        let rows = query.query_map(values, |row: &Row<'_>| {
            let name: String = row.get("volume_name")?;
            Ok(records::attachment(row).map(|(attachment, _)| (name, attachment)))
        })?;
        rows.map(|row| row?).collect()
    }

    /// Makes an attachment with a new identity, a new secret, and the volume's generation.
    ///
    /// # Errors
    /// [`CatalogError::VolumeNotFound`] where the volume is not ready; [`CatalogError::VolumeAttached`] where it has an
    /// attachment; the random source's; SQLite's.
    pub fn add_attachment(&self, new: &NewAttachment) -> Result<AttachmentRecord, CatalogError> {
        let secret = Secret::generate().map_err(|error| CatalogError::Random(error.to_string()))?;
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
        let attachment = AttachmentRecord {
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
        };
        let inserted = transaction.execute(
            "INSERT INTO attachments (attachment_id, volume_uid, node_id, state, read_only, secret, generation, \
                                      session_epoch, created_at_ms, boot_id) \
             VALUES (?1, ?2, ?3, 'active', ?4, ?5, ?6, 0, ?7, ?8) ON CONFLICT (volume_uid) DO NOTHING",
            (
                attachment.attachment_id.to_string(),
                attachment.volume_uid.to_string(),
                &attachment.node_id,
                attachment.read_only,
                attachment.secret.expose(),
                generation,
                attachment.created_at_ms,
                &attachment.boot_id,
            ),
        )?;
        if inserted == 0 {
            return Err(CatalogError::VolumeAttached(new.volume_uid));
        }
        transaction.commit()?;
        Ok(attachment)
    }

    /// Says which boot of its node has an attachment that no boot had.
    ///
    /// # Errors
    /// [`CatalogError::AttachmentNotFound`]: it is not there, or bound; SQLite's.
    pub fn bind_attachment(&self, attachment_id: Uuid, boot_id: &str) -> Result<(), CatalogError> {
        let bound = self.state().db.execute(
            "UPDATE attachments SET boot_id = ?2 WHERE attachment_id = ?1 AND boot_id = ''",
            (attachment_id.to_string(), boot_id),
        )?;
        if bound == 1 { Ok(()) } else { Err(CatalogError::AttachmentNotFound(attachment_id)) }
    }

    /// `active` becomes `ending`: nothing new is opened under the attachment from here on. With `raise_generation` the
    /// volume's attach generation goes up in the same step (an attach by force). Ending already: the same again.
    ///
    /// # Errors
    /// [`CatalogError::AttachmentNotFound`]; SQLite's.
    pub fn end_attachment(&self, attachment_id: Uuid, raise_generation: bool) -> Result<(), CatalogError> {
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let ended = transaction.execute(
            "UPDATE attachments SET state = 'ending' WHERE attachment_id = ?1",
            [attachment_id.to_string()],
        )?;
        if ended == 0 {
            return Err(CatalogError::AttachmentNotFound(attachment_id));
        }
        if raise_generation {
            transaction.execute(
                "UPDATE volumes SET attach_generation = attach_generation + 1 \
                 WHERE volume_uid = (SELECT volume_uid FROM attachments WHERE attachment_id = ?1)",
                [attachment_id.to_string()],
            )?;
        }
        Ok(transaction.commit()?)
    }

    /// Drops an attachment that is ending and whose I/O has finished; no row is a success.
    ///
    /// # Errors
    /// SQLite's.
    pub fn remove_attachment(&self, attachment_id: Uuid) -> Result<(), CatalogError> {
        self.state().db.execute(
            "DELETE FROM attachments WHERE attachment_id = ?1 AND state = 'ending'",
            [attachment_id.to_string()],
        )?;
        Ok(())
    }

    /// At start: drops what a killed server was ending (its connections are gone with it), and says how many.
    ///
    /// # Errors
    /// SQLite's.
    pub fn remove_ending_attachments(&self) -> Result<usize, CatalogError> {
        Ok(self.state().db.execute("DELETE FROM attachments WHERE state = 'ending'", [])?)
    }

    /// Drops the volume's attachment, whatever its state, and has the next one's generation above `generation`: who held the
    /// volume must not go on with it. False: there was none.
    ///
    /// # Errors
    /// SQLite's.
    pub fn end_rolled_back(&self, volume_uid: Uuid, generation: u64) -> Result<bool, CatalogError> {
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let uid = volume_uid.to_string();
        let ended = transaction.execute("DELETE FROM attachments WHERE volume_uid = ?1", [&uid])?;
        transaction.execute(
            "UPDATE volumes SET attach_generation = max(attach_generation, ?2) + 1 WHERE volume_uid = ?1",
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
            state.db.execute(
                "UPDATE attachments SET session_epoch = ?2 WHERE attachment_id = ?1",
                (attachment_id.to_string(), epoch_in_db),
            )?;
        }
        Ok(())
    }
}
