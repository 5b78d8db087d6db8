//! What holds of every answer of the gate, looked at from outside: who asked for what, and who has what.
//!
//! Knows nothing of how the gate decides. The first answer that must not be is kept in [`Answers::fault`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proto::export_name::AttachmentExportName;
use proto::nbd::handshake::server::OpenKind;
use server::data::gate::{Granted, Input};
use server::ids::ConnectionId;
use uuid::Uuid;

use super::storage::{Catalog, OTHER_UID};

struct Asked {
    /// The volume; `None`: there is none for it.
    volume_uid: Option<Uuid>,
    /// The attachment and the epoch that it came with.
    session: Option<(Uuid, u64)>,
    at: Instant,
}

struct Holder {
    volume_uid: Uuid,
    is_named_writer: bool,
    is_closing: bool,
}

pub(super) struct Answers {
    open_timeout: Duration,
    asked: BTreeMap<ConnectionId, Asked>,
    holders: BTreeMap<ConnectionId, Holder>,
    /// The last loss of writes that the gate has heard of is recorded somewhere.
    pub(super) is_recorded: bool,
    pub(super) fault: Option<String>,
}

impl Answers {
    pub(super) fn new(open_timeout: Duration) -> Self {
        let (asked, holders) = (BTreeMap::new(), BTreeMap::new());
        Self { open_timeout, asked, holders, is_recorded: true, fault: None }
    }

    /// The gate is told something.
    pub(super) fn note(&mut self, input: &Input, now: Instant, catalog: &Catalog) {
        match input {
            Input::Open { asked, name } => {
                let attached = AttachmentExportName::parse(name);
                let volume_uid = match &attached {
                    Some(name) => {
                        let found = catalog.attachment(name.attachment_id);
                        let found = found.filter(|found| found.secret == name.secret);
                        found.map(|found| found.volume_uid)
                    }
                    None => catalog.volume_named(name).map(|volume| volume.volume_uid),
                };
                let session = attached
                    .filter(|_| asked.kind != OpenKind::Info)
                    .map(|name| (name.attachment_id, name.epoch));
                self.asked.insert(asked.connection, Asked { volume_uid, session, at: now });
            }
            // From then on time counts.
            Input::ExportFound { claim, .. } => self.counts_from(claim.asked.connection, now),
            Input::NameFound { asked, .. } => self.counts_from(asked.connection, now),
            Input::Closed { connection } => {
                self.asked.remove(connection);
                self.holders.remove(connection);
            }
            _ => {}
        }
    }

    fn counts_from(&mut self, connection: ConnectionId, now: Instant) {
        if let Some(asked) = self.asked.get_mut(&connection) {
            asked.at = now;
        }
    }

    /// `is_unrecorded`: the volume lost writes, and that is recorded nowhere at this moment.
    pub(super) fn given(
        &mut self,
        granted: &Granted,
        has_lost_volume: bool,
        is_unrecorded: bool,
        catalog: &mut Catalog,
    ) {
        let Some(asked) = self.asked.remove(&granted.connection) else {
            return self.broken("an open is answered that nobody waits for");
        };
        if asked.volume_uid != Some(granted.volume_uid) {
            return self.broken("an open is answered with what it did not ask for");
        }
        if let Some((attachment_id, epoch)) = asked.session
            && catalog.session_epoch(attachment_id).is_some_and(|recorded| *recorded < epoch)
        {
            self.broken("an open is answered before its epoch is recorded");
        }
        let is_attached = granted.volume_uid == catalog.volume_uid && catalog.attachment.is_some();
        if granted.attachment_id.is_none() && !granted.read_only && is_attached {
            self.broken("a volume is opened for writing by its name although it is attached");
        }
        let mut others = self.holders.values().filter(|holder| holder.volume_uid == granted.volume_uid);
        if granted.volume_uid == catalog.volume_uid && has_lost_volume && others.next().is_none() {
            self.broken("a volume that lost writes is not opened anew although nobody had it");
        }
        if granted.volume_uid == catalog.volume_uid && is_unrecorded {
            self.broken("a volume is served whose loss of writes is recorded nowhere");
        }
        if granted.kind != OpenKind::Info {
            let holder = Holder {
                volume_uid: granted.volume_uid,
                is_named_writer: granted.attachment_id.is_none() && !granted.read_only,
                is_closing: false,
            };
            self.holders.insert(granted.connection, holder);
        }
    }

    pub(super) fn refused(&mut self, connection: ConnectionId) {
        if self.asked.remove(&connection).is_none() {
            self.broken("an open is refused that nobody waits for");
        }
    }

    /// It gets no answer any more.
    pub(super) fn told_to_close(&mut self, connection: ConnectionId) {
        self.asked.remove(&connection);
        if let Some(holder) = self.holders.get_mut(&connection) {
            holder.is_closing = true;
        }
    }

    /// The gate has nothing to do at this time.
    pub(super) fn check_rest(&mut self, now: Instant) {
        let open_timeout = self.open_timeout;
        if self.asked.values().any(|asked| now.duration_since(asked.at) > open_timeout) {
            self.broken("an open is not answered in time");
        }
        let goes_on = |holder: &Holder| holder.volume_uid != OTHER_UID && !holder.is_closing;
        if !self.is_recorded && self.holders.values().any(goes_on) {
            self.broken("a connection goes on although a loss of writes is recorded nowhere");
        }
    }

    /// Those who wrote by name to the other volume are gone.
    pub(super) fn writers_fenced(&mut self) {
        if self.holders.values().any(|holder| holder.is_named_writer && holder.is_closing) {
            self.broken("somebody may still write who was to be gone");
        }
    }

    /// The other volume is closed.
    pub(super) fn released(&mut self) {
        if self.holders.values().any(|holder| holder.volume_uid == OTHER_UID) {
            self.broken("a volume is closed that somebody has open");
        }
    }

    /// Keeps what must not be.
    pub(super) fn broken(&mut self, words: &str) {
        self.fault.get_or_insert_with(|| words.to_owned());
    }
}
