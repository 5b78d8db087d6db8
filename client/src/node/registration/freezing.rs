//! Carries out what the storage server asks of freezes, beside the heartbeats.
//!
//! Owns: a task for each thing that is begun. Never: decides (`asked.rs` does). Called by the parent module.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::v1;
use tokio::sync::watch;

use super::asked::{Action, Asked};
use crate::causes::with_sources;
use crate::node::freeze::Freezes;

/// The freezes that the server asks this node for.
#[derive(Debug, Clone)]
pub(super) struct Freezing {
    asked: Arc<Mutex<Asked>>,
    freezes: Arc<Freezes>,
    changed: watch::Sender<()>,
}

impl Freezing {
    pub(super) fn new(freezes: Arc<Freezes>) -> Self {
        Self { asked: Arc::default(), freezes, changed: watch::Sender::new(()) }
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a heartbeat tells; and what says that it is not so any more.
    pub(super) fn report(&self) -> (Vec<v1::NodeFreeze>, watch::Receiver<()>) {
        // First, so that no change is missed.
        let changed = self.changed.subscribe();
        (self.asked().report(), changed)
    }

    /// The server has heard the report and wants this. True: something was begun, which is to be told at once.
    pub(super) fn heard(&self, report: &[v1::NodeFreeze], wanted: Vec<v1::WantedFreeze>) -> bool {
        let actions = {
            let mut asked = self.asked();
            asked.heard(report);
            asked.wanted(wanted)
        };
        let has_begun = !actions.is_empty();
        for action in actions {
            tokio::spawn(self.clone().carry_out(action));
        }
        has_begun
    }

    async fn carry_out(self, action: Action) {
        let mut next = Some(action);
        while let Some(action) = next {
            next = match action {
                Action::Freeze { freeze_id, attachment_ids } => {
                    let request = v1::FreezeRequest { targets: attachment_ids, freeze_id: freeze_id.clone() };
                    let outcome = self.freezes.freeze(request).await;
                    let outcome = outcome.map(drop).map_err(|error| with_sources(&error));
                    if let Err(why) = &outcome {
                        tracing::warn!(freeze_id, why, "nothing is frozen for the storage server");
                    }
                    self.asked().frozen(&freeze_id, outcome)
                }
                Action::Thaw(freeze_id) => {
                    let outcome = self.freezes.thaw(&v1::ThawRequest { freeze_id: freeze_id.clone() }).await;
                    let outcome = match outcome {
                        Ok(answer) if answer.was_frozen => Ok(()),
                        Ok(answer) => Err(answer.reason),
                        Err(error) => Err(with_sources(&error)),
                    };
                    self.asked().thawed(&freeze_id, outcome);
                    None
                }
            };
            self.changed.send_replace(());
        }
    }
}
