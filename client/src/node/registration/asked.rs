//! The freezes that the storage server asks this node for, as a pure state machine: what is begun, and what is told of it.
//!
//! ```text
//!   asked ─▶ FREEZING ─▶ FROZEN ─▶ (asked to thaw) THAWING ─▶ WAS_FROZEN ─▶ told, forgotten
//!                 └──────────────┴──────────────────────┴───▶ NOT_FROZEN ─▶ told, forgotten
//! ```
//! Owns: how far each is. Never: does I/O or knows a process; `../freeze/` freezes, thaws, and does the latter by itself after 10 s. Whatever
//! is asked twice is done once. Called by the parent module.

use std::collections::BTreeMap;

use proto::v1::{self, NodeFreezeState};

/// Freezes at once; the server takes no more in one heartbeat.
const FREEZES_MAX: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Freezing,
    /// It is to be thawed as soon as it is frozen.
    Unwanted,
    Frozen,
    Thawing,
    WasFrozen,
    /// Why.
    NotFrozen(String),
}

/// What is to be begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// What is mounted of these attachments is to be frozen.
    Freeze {
        /// By the server.
        freeze_id: String,
        /// All or nothing.
        attachment_ids: Vec<String>,
    },
    /// The freeze of that id is to end.
    Thaw(String),
}

/// The freezes that the server has asked for, and has not been told the end of.
#[derive(Debug, Default)]
pub(super) struct Asked {
    freezes: BTreeMap<String, State>,
}

impl Asked {
    /// Takes what the server wants now: what is to be begun.
    pub(super) fn wanted(&mut self, wanted: Vec<v1::WantedFreeze>) -> Vec<Action> {
        let mut actions = Vec::new();
        for v1::WantedFreeze { freeze_id, attachment_ids, thaw } in wanted {
            let has_room = self.freezes.len() < FREEZES_MAX;
            match self.freezes.get_mut(&freeze_id) {
                Some(state @ State::Freezing) if thaw => *state = State::Unwanted,
                Some(state @ State::Frozen) if thaw => {
                    *state = State::Thawing;
                    actions.push(Action::Thaw(freeze_id));
                }
                None if !thaw && has_room => {
                    self.freezes.insert(freeze_id.clone(), State::Freezing);
                    actions.push(Action::Freeze { freeze_id, attachment_ids });
                }
                // It was asked before; or it is asked again when others have ended.
                Some(_) | None => {}
            }
        }
        actions
    }

    /// It is frozen, or why not: what is to be begun then.
    pub(super) fn frozen(&mut self, freeze_id: &str, outcome: Result<(), String>) -> Option<Action> {
        let state = self.freezes.get_mut(freeze_id)?;
        match (outcome, &*state) {
            (Ok(()), State::Unwanted) => {
                *state = State::Thawing;
                Some(Action::Thaw(freeze_id.to_owned()))
            }
            (Ok(()), _) => {
                *state = State::Frozen;
                None
            }
            (Err(why), _) => {
                *state = State::NotFrozen(why);
                None
            }
        }
    }

    /// It is thawed; and whether it was frozen until then, or why not.
    pub(super) fn thawed(&mut self, freeze_id: &str, outcome: Result<(), String>) {
        if let Some(state) = self.freezes.get_mut(freeze_id) {
            *state = outcome.map_or_else(State::NotFrozen, |()| State::WasFrozen);
        }
    }

    /// What the next heartbeat tells.
    pub(super) fn report(&self) -> Vec<v1::NodeFreeze> {
        let told = |(freeze_id, state): (&String, &State)| {
            let (state, reason) = match state {
                State::Freezing => (NodeFreezeState::Freezing, ""),
                State::Frozen => (NodeFreezeState::Frozen, ""),
                State::Unwanted | State::Thawing => (NodeFreezeState::Thawing, ""),
                State::WasFrozen => (NodeFreezeState::WasFrozen, ""),
                State::NotFrozen(why) => (NodeFreezeState::NotFrozen, why.as_str()),
            };
            v1::NodeFreeze {
                freeze_id: freeze_id.clone(),
                state: state.into(),
                reason: super::told::words(reason),
            }
        };
        self.freezes.iter().map(told).collect()
    }

    /// The server has heard this: what it knows the end of is forgotten.
    pub(super) fn heard(&mut self, report: &[v1::NodeFreeze]) {
        for told in report {
            if matches!(told.state(), NodeFreezeState::WasFrozen | NodeFreezeState::NotFrozen) {
                self.freezes.remove(&told.freeze_id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn freeze(id: &str) -> v1::WantedFreeze {
        let attachment_ids = vec![format!("disk of {id}")];
        v1::WantedFreeze { freeze_id: id.to_owned(), attachment_ids, thaw: false }
    }

    fn thaw(id: &str) -> v1::WantedFreeze {
        v1::WantedFreeze { freeze_id: id.to_owned(), thaw: true, ..Default::default() }
    }

    fn begins(id: &str) -> Action {
        Action::Freeze { freeze_id: id.to_owned(), attachment_ids: vec![format!("disk of {id}")] }
    }

    fn states(asked: &Asked) -> Vec<(String, NodeFreezeState, String)> {
        asked.report().into_iter().map(|told| (told.freeze_id.clone(), told.state(), told.reason)).collect()
    }

    fn state(asked: &Asked) -> NodeFreezeState {
        match states(asked).as_slice() {
            [(_, state, _)] => *state,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_asked_again_is_done_once_and_its_end_is_told_until_it_is_heard() {
        let mut asked = Asked::default();
        assert_eq!(asked.wanted(vec![freeze("a")]), [begins("a")]);
        assert_eq!(asked.wanted(vec![freeze("a")]), []);
        assert_eq!(state(&asked), NodeFreezeState::Freezing);
        assert_eq!(asked.frozen("a", Ok(())), None);
        asked.heard(&asked.report());
        assert_eq!(state(&asked), NodeFreezeState::Frozen);
        assert_eq!(asked.wanted(vec![freeze("a")]), [], "an old answer");
        assert_eq!(asked.wanted(vec![thaw("a")]), [Action::Thaw("a".to_owned())]);
        assert_eq!(asked.wanted(vec![thaw("a")]), []);
        let before = asked.report();
        assert_eq!(state(&asked), NodeFreezeState::Thawing);
        asked.thawed("a", Ok(()));
        // What was heard is what was told then.
        asked.heard(&before);
        assert_eq!(state(&asked), NodeFreezeState::WasFrozen);
        asked.heard(&asked.report());
        assert_eq!(states(&asked), []);
        assert_eq!(asked.wanted(vec![thaw("a")]), []);
    }

    #[test]
    fn what_is_to_be_thawed_before_it_is_frozen_is_thawed_when_it_is() {
        let mut asked = Asked::default();
        asked.wanted(vec![freeze("a")]);
        assert_eq!(asked.wanted(vec![thaw("a")]), []);
        assert_eq!(state(&asked), NodeFreezeState::Thawing, "the server need not say it again");
        assert_eq!(asked.frozen("a", Ok(())), Some(Action::Thaw("a".to_owned())));
        asked.thawed("a", Err("late".to_owned()));
        assert_eq!(states(&asked), [("a".to_owned(), NodeFreezeState::NotFrozen, "late".to_owned())]);

        asked.wanted(vec![freeze("b"), thaw("b")]);
        assert_eq!(asked.frozen("b", Err("busy".to_owned())), None);
        assert_eq!(states(&asked)[1], ("b".to_owned(), NodeFreezeState::NotFrozen, "busy".to_owned()));
    }

    #[test]
    fn there_are_never_more_than_a_heartbeat_takes() {
        let mut asked = Asked::default();
        let many: Vec<v1::WantedFreeze> = (0..100).map(|number| freeze(&number.to_string())).collect();
        assert_eq!(asked.wanted(many.clone()).len(), 64);
        asked.frozen("0", Err("busy".to_owned()));
        asked.heard(&asked.report());
        assert_eq!(asked.wanted(many.into_iter().skip(1).collect()).len(), 1, "one has made room");
        assert_eq!(asked.report().len(), 64);
    }
}
