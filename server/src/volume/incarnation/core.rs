//! What a process knows of its volumes' incarnations, and when one is raised: the decisions, as a pure state machine.
//!
//! Owns: the number of each volume that anybody may have been told, and what is remembered of it for the next opening. Never: does
//! I/O or reads a clock: `mod.rs` reads and writes records, asks file systems and the catalog, and so does the simulator. How a volume
//! is admitted, step by step, is `admission.rs`; what counts as a loss is `history.rs`.
//! Invariants: an incarnation is never lowered; [`Core::is_recorded`] is true only where the file or the catalog has the number
//! that is told. Whoever changes a record writes it, and says with [`Core::written`] whether it is in its file, before anybody else is
//! heard.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::history::{Record, SessionMark};
use super::record;
use crate::catalog::{BackendKind, VolumeRecord};

/// What is known of a volume.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The highest that anybody may have been told.
    pub(super) incarnation: u64,
    /// Of this boot; replaced when the volume is opened.
    pub(super) record: Option<Record>,
    /// The file has the record as it is here.
    is_in_file: bool,
    /// Opened by this process: what was failed to be written back before has been looked for.
    pub(super) is_admitted: bool,
}

/// What is to become of a record's file that was found as the process started.
#[derive(Debug)]
pub enum Found {
    /// It stays.
    Kept,
    /// It says nothing, and is removed.
    Stale,
    /// It stays. What it said is not known, which is taken for a loss; in words.
    Unreadable(String),
}

/// The incarnations of one server's volumes, as one process knows them.
#[derive(Debug)]
pub struct Core {
    boot_id: String,
    process_id: String,
    /// Volumes were open in this boot before this process.
    has_predecessors: bool,
    pub(super) volumes: BTreeMap<Uuid, Known>,
}

impl Core {
    /// Nothing is known yet.
    pub fn new(boot_id: String, process_id: String) -> Self {
        Self { boot_id, process_id, has_predecessors: false, volumes: BTreeMap::new() }
    }

    /// The boot that records are of.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// A record's file was found as the process started. One that cannot be read is one of a loss: what it said is not known.
    pub fn found(&mut self, volume_uid: Uuid, text: &[u8]) -> Found {
        let (record, found) = match record::decode(&self.boot_id, text) {
            Ok(Some(record)) => (record, Found::Kept),
            Ok(None) => return Found::Stale,
            Err(error) => (Record::unknown(), Found::Unreadable(error.to_string())),
        };
        let incarnation = record.incarnation;
        let known = Known { incarnation, record: Some(record), is_in_file: true, is_admitted: false };
        self.volumes.insert(volume_uid, known);
        self.has_predecessors = true;
        found
    }

    /// Whether the file system may have failed to write something back before this process opened a volume: what nobody had open in
    /// this boot, nobody has written to.
    pub fn may_have_failed_write_back(&self) -> bool {
        self.has_predecessors
    }

    /// The file system did, and says so once: remembered of every volume that this process has not opened yet, for the next one as
    /// well. Whose records are to be written.
    pub fn write_back_failed(&mut self) -> Vec<Uuid> {
        let mut changed = Vec::new();
        for (volume_uid, known) in self.volumes.iter_mut().filter(|(_, known)| !known.is_admitted) {
            let Some(record) = &mut known.record else { continue };
            record.lost_writes = true;
            changed.push(*volume_uid);
        }
        changed
    }

    /// The volumes that something is remembered of.
    pub fn remembered(&self) -> Vec<Uuid> {
        self.volumes.iter().filter(|(_, known)| known.record.is_some()).map(|(uid, _)| *uid).collect()
    }

    /// The highest number that anybody may have been told of the volume by this process; 0 where it knows none.
    pub fn incarnation(&self, volume_uid: Uuid) -> u64 {
        self.volumes.get(&volume_uid).map_or(0, |known| known.incarnation)
    }

    /// The volume's incarnation as it is told.
    pub fn word(&self, volume: &VolumeRecord) -> String {
        let number = self.incarnation(volume.volume_uid).max(volume.incarnation);
        let Self { boot_id, process_id, .. } = self;
        match volume.backend {
            BackendKind::File | BackendKind::Device | BackendKind::Lvm => format!("{boot_id}.{number}"),
            BackendKind::Memory => format!("{boot_id}.{number}.{process_id}"),
        }
    }

    /// What is remembered of the volume.
    pub fn record(&self, volume_uid: Uuid) -> Option<&Record> {
        self.volumes.get(&volume_uid)?.record.as_ref()
    }

    /// A sync of the volume failed. If there is a record, it is to be written.
    pub fn raise(&mut self, volume_uid: Uuid) {
        let known = self.volumes.entry(volume_uid).or_default();
        known.incarnation += 1;
        known.is_in_file = false;
        // Also where there is no file: whoever opens the volume anew in this process has to know.
        if let Some(record) = &mut known.record {
            (record.incarnation, record.lost_writes) = (known.incarnation, true);
        }
    }

    /// The same for a volume that may not be open: whoever asks knows what the catalog has.
    pub fn raise_above(&mut self, volume: &VolumeRecord) {
        let known = self.volumes.entry(volume.volume_uid).or_default();
        known.incarnation = known.incarnation.max(volume.incarnation);
        self.raise(volume.volume_uid);
    }

    /// The record of the volume that was to be written is in its file, or not.
    pub fn written(&mut self, volume_uid: Uuid, is_written: bool) {
        if let Some(known) = self.volumes.get_mut(&volume_uid) {
            known.is_in_file = is_written;
        }
    }

    /// Whether what is known of the volume is in its file, or `is_in_catalog`.
    pub fn is_recorded(&self, volume_uid: Uuid, is_in_catalog: bool) -> bool {
        is_in_catalog || self.volumes.get(&volume_uid).is_some_and(|known| known.is_in_file)
    }

    /// The volume has been opened under an attachment of this generation: no older one may come back. The record, where it is another
    /// now; if that cannot be written, a catalog that is rolled back goes unnoticed, and nothing more.
    pub fn opened_under(&mut self, volume_uid: Uuid, generation: u64) -> Option<&Record> {
        let record = self.record_mut(volume_uid).filter(|record| record.attach_generation < generation)?;
        record.attach_generation = generation;
        Some(record)
    }

    /// The volume's last operation has ended, and the server is about to. The record, where there is one; if it cannot be written,
    /// somebody else's writes go unnoticed, and nothing more.
    pub fn closed(
        &mut self,
        volume_uid: Uuid,
        modified: Option<String>,
        session: Option<SessionMark>,
    ) -> Option<&Record> {
        let record = self.record_mut(volume_uid)?;
        (record.modified, record.session) = (modified, session);
        Some(record)
    }

    /// The server itself is about to change the volume's file, which may not be open: its time of writing says nothing any more. The
    /// record, where it is another now.
    pub fn changes(&mut self, volume_uid: Uuid) -> Option<&Record> {
        let record = self.record_mut(volume_uid)?;
        record.modified.take()?;
        Some(record)
    }

    /// The volume is no more.
    pub fn forget(&mut self, volume_uid: Uuid) {
        self.volumes.remove(&volume_uid);
    }

    fn record_mut(&mut self, volume_uid: Uuid) -> Option<&mut Record> {
        self.volumes.get_mut(&volume_uid)?.record.as_mut()
    }

    /// Takes a record in the place of what was remembered, unless a loss was recorded since `known_before` was known. False: nothing
    /// was changed.
    pub(super) fn remember(&mut self, volume_uid: Uuid, record: &Record, known_before: u64) -> bool {
        let known = self.volumes.entry(volume_uid).or_default();
        if known.incarnation > known_before {
            return false;
        }
        known.incarnation = known.incarnation.max(record.incarnation);
        (known.record, known.is_in_file) = (Some(record.clone()), false);
        true
    }

    /// What was remembered before is, again: it says what is to be noticed once more. What was recorded since is not forgotten.
    pub(super) fn take_back(&mut self, volume_uid: Uuid, former: Option<Record>) {
        let Some(known) = self.volumes.get_mut(&volume_uid) else { return };
        let lost_since = known.record.as_ref().is_some_and(|record| record.lost_writes);
        known.record = former.map(|former| Record { lost_writes: former.lost_writes | lost_since, ..former });
    }

    /// The volume was opened by this process.
    pub(super) fn admitted(&mut self, volume_uid: Uuid) {
        if let Some(known) = self.volumes.get_mut(&volume_uid) {
            known.is_admitted = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_to_be_written_back_is_remembered_of_every_volume_that_is_not_open() {
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let whole = Record { lost_writes: false, ..Record::unknown() };
        let mut core = Core::new("boot".to_owned(), "process".to_owned());
        for volume in [one, other] {
            core.found(volume, &record::encode("boot", &whole).unwrap());
        }
        core.admitted(one);
        assert_eq!(core.write_back_failed(), [other]);
        let has_lost = |volume| core.record(volume).map(|record| record.lost_writes);
        assert_eq!((has_lost(one), has_lost(other)), (Some(false), Some(true)));
    }

    #[test]
    fn a_loss_of_a_volume_whose_record_is_not_open_is_not_taken_for_recorded() {
        let volume = Uuid::from_u128(2);
        let text = record::encode("boot", &Record::unknown()).unwrap();
        let mut core = Core::new("boot".to_owned(), "after".to_owned());
        assert!(matches!(core.found(volume, &text), Found::Kept));
        assert!(core.is_recorded(volume, false));
        core.raise(volume);
        assert!(!core.is_recorded(volume, false), "the file has what was there before");
        core.written(volume, true);
        assert!(core.is_recorded(volume, false));
    }
}
