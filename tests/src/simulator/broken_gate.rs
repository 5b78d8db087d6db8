//! The gate's core with a rule broken: what goes into it or comes out of it is altered on the way.

use std::collections::{BTreeMap, VecDeque};

use proto::export_name::{AttachmentExportName, PROBE_SLOT};
use server::data::gate::{Granted, Input, Output};
use server::ids::ConnectionId;
use uuid::Uuid;

use super::Mutant;
use super::storage::Catalog;

/// What becomes of something that the core wants done.
pub(super) enum Altered {
    /// This is done.
    Do(Output),
    /// Nothing is done, and this is answered.
    Done(Option<Input>),
}

#[derive(Default)]
pub(super) struct BrokenGate {
    mutant: Option<Mutant>,
    /// Who once waited for a volume by its name.
    waited: BTreeMap<(Uuid, ConnectionId), Granted>,
    /// What goes to those who once waited for a volume that is open now.
    late: Vec<Granted>,
    /// Epochs that are recorded when there is time for it.
    unrecorded: Vec<(Uuid, u64)>,
    /// Volumes that were to be let go.
    kept: Vec<Uuid>,
}

impl BrokenGate {
    pub(super) fn new(mutant: Option<Mutant>) -> Self {
        Self { mutant, ..Self::default() }
    }

    /// What the core is told instead; `None`: nothing.
    pub(super) fn input(&mut self, mut input: Input, outputs: &mut VecDeque<Output>) -> Option<Input> {
        let Some(mutant) = self.mutant else { return Some(input) };
        match (mutant, &mut input) {
            (Mutant::EpochIgnored, Input::Open { name, .. }) => rename(name, |name| name.epoch = 1),
            (Mutant::EpochIgnored, Input::AttachmentFound { found: Ok(Some(found)), .. }) => {
                found.session_epoch = 0;
            }
            (Mutant::SlotIgnored, Input::Open { asked, name }) => rename(name, |name| {
                if name.slot != PROBE_SLOT {
                    name.slot = 1000 + asked.connection.0 as u32;
                }
            }),
            (Mutant::SecretIgnored, Input::AttachmentFound { name, found: Ok(Some(found)), .. }) => {
                found.secret = name.secret.clone();
            }
            (Mutant::HolderIgnored, Input::NameFound { found: Ok(Some(found)), .. }) => {
                found.is_attached = false;
            }
            (Mutant::LossUnheard, Input::LostWrites { .. }) => return None,
            (Mutant::UnpersistedServed, Input::Persisted { is_persisted, .. }) => *is_persisted = true,
            (Mutant::UnrecordedServed, Input::LossRecorded { is_recorded, .. }) => *is_recorded = true,
            (Mutant::UnmarkedWritten, Input::Marked { is_marked, .. }) => *is_marked = true,
            (Mutant::MarkNotAwaited, Input::WantsMark { connection }) => {
                outputs.push_back(Output::GoOn { connection: *connection, ring: 0, is_marked: true });
            }
            (
                Mutant::FenceNotAwaited,
                Input::FenceAttachment { call, .. } | Input::FenceNamedWriters { call, .. },
            ) => outputs.push_back(Output::Fenced { call: *call, result: Ok(()) }),
            (Mutant::LateOpenAnswered, input) => self.remember(input),
            _ => {}
        }
        Some(input)
    }

    /// As if each volume had a list of those who wait for it, which nobody who is refused is taken from.
    fn remember(&mut self, input: &Input) {
        match input {
            Input::NameFound { asked, found: Ok(Some(found)) } => {
                let volume_uid = found.volume.volume_uid;
                let granted = Granted {
                    connection: asked.connection,
                    ring: asked.ring,
                    volume_uid,
                    kind: asked.kind,
                    read_only: found.is_attached,
                    attachment_id: None,
                    is_probe: false,
                };
                self.waited.insert((volume_uid, asked.connection), granted);
            }
            Input::Closed { connection } => self.waited.retain(|(_, other), _| other != connection),
            Input::VolumeOpened { volume_uid, result: Ok(()) } => {
                let late = self.waited.extract_if(.., |(uid, _), _| uid == volume_uid);
                self.late.extend(late.map(|(_, granted)| granted));
            }
            _ => {}
        }
    }

    /// What comes out of the core beside that which comes from `before` on.
    pub(super) fn add(&mut self, before: usize, outputs: &mut VecDeque<Output>) {
        let mut answered = Vec::new();
        for output in outputs.iter().skip(before) {
            if let Output::Answer(granted) = output {
                answered.push(granted.connection);
                self.waited.remove(&(granted.volume_uid, granted.connection));
            }
        }
        let late = self.late.drain(..).filter(|granted| !answered.contains(&granted.connection));
        outputs.extend(late.map(Output::Answer));
    }

    /// What is to be done instead.
    pub(super) fn output(&mut self, output: Output) -> Altered {
        match (self.mutant, output) {
            (Some(Mutant::AnsweredBeforePersisted), Output::Persist { attachment_id, epoch }) => {
                self.unrecorded.push((attachment_id, epoch));
                Altered::Done(Some(Input::Persisted { attachment_id, epoch, is_persisted: true }))
            }
            (Some(Mutant::RetiredKept), Output::Retire { volume_uid }) => {
                self.kept.push(volume_uid);
                Altered::Done(None)
            }
            (Some(Mutant::RetiredKept), Output::Open { volume_uid }) if self.kept.contains(&volume_uid) => {
                self.kept.retain(|kept| *kept != volume_uid);
                Altered::Done(Some(Input::VolumeOpened { volume_uid, result: Ok(()) }))
            }
            (Some(Mutant::RecordingUnheard), Output::LossKnown { .. }) => Altered::Done(None),
            (_, output) => Altered::Do(output),
        }
    }

    /// There is time.
    pub(super) fn settle(&mut self, catalog: &mut Catalog) {
        for (attachment_id, epoch) in self.unrecorded.drain(..) {
            if let Some(recorded) = catalog.session_epoch(attachment_id) {
                *recorded = epoch.max(*recorded);
            }
        }
    }
}

fn rename(name: &mut String, change: impl FnOnce(&mut AttachmentExportName)) {
    if let Some(mut parsed) = AttachmentExportName::parse(name) {
        change(&mut parsed);
        *name = parsed.expose();
    }
}
