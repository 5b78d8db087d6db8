//! Freezes that nodes are asked for, as a pure state machine: what each node is told, and when all of it is frozen, or was.
//!
//! ```text
//!             every node: FROZEN          the instant has been          every node: WAS_FROZEN
//!   freezing ────────────────────▶ frozen ────────────────────▶ thawing ──────────────────────▶ over: it was frozen
//!      └── a node says NOT_FROZEN, its daemon is another one, or knows no freezes; it took too long ──▶ over: why it was not
//! ```
//! Owns: how far each freeze is, and what its nodes are to do. Never: does I/O, reads a clock, or knows a connection; `mod.rs` hands in
//! what nodes say, and decides how long it waits.
//!
//! Nothing that is said has to arrive: a node says what it knows with every call, and is told what differs from what is wanted until it
//! says that it knows. A freeze that nobody knows here (of a server before this one, or of a call that was given up) is thawed. Nothing of
//! this outlives the server, and a freeze ends at its node by itself.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

/// How far a node says it is with a freeze.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::management) enum Said {
    /// It has begun.
    Freezing,
    /// All is frozen.
    Frozen,
    /// It is to be thawed.
    Thawing,
    /// It was frozen until it was thawed, as it was asked to.
    WasFrozen,
    /// It was not: why.
    NotFrozen(String),
}

impl Said {
    /// Whether something is frozen, or about to be.
    fn may_be_frozen(&self) -> bool {
        matches!(self, Self::Freezing | Self::Frozen)
    }
}

/// What a node says of all freezes that it knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::management) struct Report {
    /// Its name.
    pub(in crate::management) node_id: String,
    /// Of this start of its daemon; empty: it knows no freezes.
    pub(in crate::management) daemon_id: String,
    /// By the freeze's id.
    pub(in crate::management) freezes: BTreeMap<Uuid, Said>,
}

/// What a node is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::management) enum Wanted {
    /// Freeze what is mounted of these attachments.
    Freeze(Uuid, BTreeSet<Uuid>),
    /// Thaw it.
    Thaw(Uuid),
}

/// What is to be frozen: the attachments, by their nodes.
pub(in crate::management) type Parts = BTreeMap<String, BTreeSet<Uuid>>;

/// How a freeze stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::management) enum Standing {
    /// Not everything is frozen yet.
    Freezing {
        /// Its node has not said so far that it was asked.
        waits_for: Option<String>,
        /// Something is frozen.
        has_frozen: bool,
    },
    /// Everything is.
    Frozen,
    /// It is being thawed.
    Thawing,
    /// It was frozen until the thaw; or why not.
    Over(Result<(), String>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Asked,
    Freezing,
    Frozen,
    WasFrozen,
}

#[derive(Debug)]
struct Part {
    attachment_ids: BTreeSet<Uuid>,
    /// That has said that it knows of it; empty: none yet.
    daemon_id: String,
    step: Step,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Freezing,
    Frozen,
    Thawing,
    Over(Result<(), String>),
}

#[derive(Debug)]
struct Freeze {
    phase: Phase,
    parts: BTreeMap<String, Part>,
}

/// The freezes that go on.
#[derive(Debug, Default)]
pub(super) struct Core {
    freezes: BTreeMap<Uuid, Freeze>,
}

impl Core {
    /// Begins one. False: some of it is being frozen already, or one of that id is; nothing is begun then.
    pub(super) fn begin(&mut self, freeze_id: Uuid, parts: &Parts) -> bool {
        let is_held = |freeze: &Freeze| {
            let mut held = parts.iter().filter_map(|(node_id, ids)| Some((freeze.parts.get(node_id)?, ids)));
            held.any(|(part, ids)| !part.attachment_ids.is_disjoint(ids))
        };
        if self.freezes.contains_key(&freeze_id) || self.freezes.values().any(is_held) {
            return false;
        }
        let part = |(node_id, ids): (&String, &BTreeSet<Uuid>)| {
            let part = Part { attachment_ids: ids.clone(), daemon_id: String::new(), step: Step::Asked };
            (node_id.clone(), part)
        };
        let freeze = Freeze { phase: Phase::Freezing, parts: parts.iter().map(part).collect() };
        self.freezes.insert(freeze_id, freeze);
        true
    }

    /// Takes what a node says. True: something stands differently.
    pub(super) fn heard(&mut self, report: &Report) -> bool {
        let mut has_changed = false;
        for (freeze_id, freeze) in &mut self.freezes {
            let before = (freeze.phase.clone(), freeze.parts.get(&report.node_id).map(|part| part.step));
            freeze.heard(*freeze_id, report);
            has_changed |=
                before != (freeze.phase.clone(), freeze.parts.get(&report.node_id).map(|part| part.step));
        }
        has_changed
    }

    /// What a node that has said this is to do.
    pub(super) fn wanted(&self, report: &Report) -> Vec<Wanted> {
        if report.daemon_id.is_empty() {
            return Vec::new();
        }
        let thaws = report.freezes.iter().filter(|(freeze_id, said)| {
            let part_of = |freeze: &&Freeze| freeze.parts.contains_key(&report.node_id);
            let phase = self.freezes.get(freeze_id).filter(part_of).map(|freeze| &freeze.phase);
            said.may_be_frozen() && !matches!(phase, Some(Phase::Freezing | Phase::Frozen))
        });
        let mut wanted: Vec<Wanted> = thaws.map(|(freeze_id, _)| Wanted::Thaw(*freeze_id)).collect();
        for (freeze_id, freeze) in &self.freezes {
            if let Some(part) = freeze.parts.get(&report.node_id)
                && freeze.phase == Phase::Freezing
                && part.step == Step::Asked
                && !report.freezes.contains_key(freeze_id)
            {
                wanted.push(Wanted::Freeze(*freeze_id, part.attachment_ids.clone()));
            }
        }
        wanted
    }

    /// Has it thawed: the instant has been.
    pub(super) fn thaw(&mut self, freeze_id: Uuid) {
        if let Some(freeze) = self.freezes.get_mut(&freeze_id) {
            match freeze.phase {
                Phase::Frozen => freeze.phase = Phase::Thawing,
                Phase::Freezing => freeze.fail("it was thawed before all of it was frozen".to_owned()),
                Phase::Thawing | Phase::Over(_) => {}
            }
        }
    }

    /// Gives it up: it was not frozen, whatever comes.
    pub(super) fn give_up(&mut self, freeze_id: Uuid, why: String) {
        if let Some(freeze) = self.freezes.get_mut(&freeze_id) {
            freeze.fail(why);
        }
    }

    /// Forgets it: nodes that have something of it frozen thaw it.
    pub(super) fn forget(&mut self, freeze_id: Uuid) {
        self.freezes.remove(&freeze_id);
    }

    /// How it stands.
    pub(super) fn standing(&self, freeze_id: Uuid) -> Standing {
        let Some(freeze) = self.freezes.get(&freeze_id) else {
            return Standing::Over(Err("nobody knows of it".to_owned()));
        };
        match &freeze.phase {
            Phase::Freezing => {
                let asked = freeze.parts.iter().find(|(_, part)| part.step == Step::Asked);
                Standing::Freezing {
                    waits_for: asked.map(|(node_id, _)| node_id.clone()),
                    has_frozen: freeze.parts.values().any(|part| part.step == Step::Frozen),
                }
            }
            Phase::Frozen => Standing::Frozen,
            Phase::Thawing => Standing::Thawing,
            Phase::Over(outcome) => Standing::Over(outcome.clone()),
        }
    }
}

impl Freeze {
    fn heard(&mut self, freeze_id: Uuid, report: &Report) {
        let Some(part) = self.parts.get_mut(&report.node_id) else { return };
        if matches!(self.phase, Phase::Over(_)) {
            return;
        }
        let node_id = &report.node_id;
        if report.daemon_id.is_empty() {
            return self.fail(format!(
                "the node daemon of {node_id} is of a version that freezes nothing when it is asked: upgrade it"
            ));
        }
        if !part.daemon_id.is_empty() && part.daemon_id != report.daemon_id {
            return self.fail(format!("the node daemon of {node_id} was started anew meanwhile"));
        }
        let Some(said) = report.freezes.get(&freeze_id) else { return };
        part.daemon_id.clone_from(&report.daemon_id);
        match (said, part.step) {
            (Said::Freezing, Step::Asked) => part.step = Step::Freezing,
            (Said::Frozen, Step::Asked | Step::Freezing) => part.step = Step::Frozen,
            (Said::WasFrozen, Step::Frozen) if self.phase == Phase::Thawing => part.step = Step::WasFrozen,
            (Said::WasFrozen, Step::WasFrozen) => {}
            (Said::WasFrozen, _) => return self.fail(format!("{node_id} has thawed it too early")),
            (Said::NotFrozen(why), _) => return self.fail(format!("{node_id}: {why}")),
            // Of before what it said last, or on its way.
            (Said::Freezing | Said::Frozen | Said::Thawing, _) => {}
        }
        let all = |step| self.parts.values().all(|part| part.step == step);
        match self.phase {
            Phase::Freezing if all(Step::Frozen) => self.phase = Phase::Frozen,
            Phase::Thawing if all(Step::WasFrozen) => self.phase = Phase::Over(Ok(())),
            _ => {}
        }
    }

    fn fail(&mut self, why: String) {
        if !matches!(self.phase, Phase::Over(_)) {
            self.phase = Phase::Over(Err(why));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREEZE: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);
    const DISK: Uuid = Uuid::from_u128(11);

    fn parts(nodes: &[(&str, u128)]) -> Parts {
        let part =
            |(node_id, id): &(&str, u128)| ((*node_id).to_owned(), BTreeSet::from([Uuid::from_u128(*id)]));
        nodes.iter().map(part).collect()
    }

    fn says(node_id: &str, freezes: &[(Uuid, Said)]) -> Report {
        let daemon_id = format!("daemon of {node_id}");
        Report { node_id: node_id.to_owned(), daemon_id, freezes: freezes.iter().cloned().collect() }
    }

    /// What a node says of the one freeze, and what it is told then.
    fn turn(core: &mut Core, node_id: &str, said: Option<Said>) -> Vec<Wanted> {
        let report = says(node_id, &said.map(|said| (FREEZE, said)).into_iter().collect::<Vec<_>>());
        core.heard(&report);
        core.wanted(&report)
    }

    fn begun(nodes: &[(&str, u128)]) -> Core {
        let mut core = Core::default();
        assert!(core.begin(FREEZE, &parts(nodes)));
        core
    }

    fn frozen() -> Core {
        let mut core = begun(&[("a", 11)]);
        assert_eq!(turn(&mut core, "a", Some(Said::Frozen)), []);
        assert_eq!(core.standing(FREEZE), Standing::Frozen);
        core
    }

    fn why(core: &Core) -> String {
        match core.standing(FREEZE) {
            Standing::Over(Err(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn it_was_frozen_where_the_node_says_so_at_the_thaw() {
        let mut core = begun(&[("a", 11)]);
        let asked = [Wanted::Freeze(FREEZE, BTreeSet::from([DISK]))];
        assert_eq!(turn(&mut core, "b", None), [], "it is not that node's");
        assert_eq!(turn(&mut core, "a", None), asked);
        let waits = |core: &Core| match core.standing(FREEZE) {
            Standing::Freezing { waits_for, has_frozen: false } => waits_for,
            other => panic!("{other:?}"),
        };
        assert_eq!(waits(&core).as_deref(), Some("a"));
        assert_eq!(turn(&mut core, "a", Some(Said::Freezing)), []);
        assert_eq!(waits(&core), None);
        assert_eq!(turn(&mut core, "a", Some(Said::Frozen)), []);
        assert_eq!(core.standing(FREEZE), Standing::Frozen);
        core.thaw(FREEZE);
        assert_eq!(turn(&mut core, "a", Some(Said::Frozen)), [Wanted::Thaw(FREEZE)]);
        assert_eq!(turn(&mut core, "a", Some(Said::Thawing)), []);
        assert_eq!(core.standing(FREEZE), Standing::Thawing);
        assert_eq!(turn(&mut core, "a", Some(Said::WasFrozen)), []);
        assert_eq!(core.standing(FREEZE), Standing::Over(Ok(())));
        core.forget(FREEZE);
        assert_eq!(turn(&mut core, "a", Some(Said::WasFrozen)), [], "its answer was lost");
    }

    #[test]
    fn whatever_message_is_lost_is_said_again() {
        let mut core = begun(&[("a", 11)]);
        for _ in 0..2 {
            assert_eq!(turn(&mut core, "a", None).len(), 1, "the answer was lost");
        }
        // What it said in between was lost.
        assert_eq!(turn(&mut core, "a", Some(Said::Frozen)), []);
        assert_eq!(turn(&mut core, "a", Some(Said::Freezing)), [], "an older call comes after a newer one");
        assert_eq!(turn(&mut core, "a", None), []);
        assert_eq!(core.standing(FREEZE), Standing::Frozen);
        core.thaw(FREEZE);
        for _ in 0..2 {
            assert_eq!(turn(&mut core, "a", Some(Said::Frozen)), [Wanted::Thaw(FREEZE)]);
        }
        for _ in 0..2 {
            turn(&mut core, "a", Some(Said::WasFrozen));
            assert_eq!(core.standing(FREEZE), Standing::Over(Ok(())));
        }
    }

    #[test]
    fn what_the_node_could_not_freeze_or_thawed_by_itself_was_not_frozen() {
        let mut core = begun(&[("a", 11)]);
        turn(&mut core, "a", Some(Said::NotFrozen("it is not mounted".to_owned())));
        assert_eq!(why(&core), "a: it is not mounted");

        // The 10 s are over at the node: it says so when it is to thaw.
        let mut core = frozen();
        core.thaw(FREEZE);
        turn(&mut core, "a", Some(Said::NotFrozen("it was thawed after 10 s".to_owned())));
        assert_eq!(why(&core), "a: it was thawed after 10 s");
        turn(&mut core, "a", Some(Said::WasFrozen));
        assert_eq!(why(&core), "a: it was thawed after 10 s", "once is enough");

        let mut core = frozen();
        turn(&mut core, "a", Some(Said::WasFrozen));
        assert_eq!(why(&core), "a has thawed it too early");
        core.thaw(FREEZE);
        assert_eq!(why(&core), "a has thawed it too early");

        let mut core = begun(&[("a", 11)]);
        core.thaw(FREEZE);
        turn(&mut core, "a", Some(Said::WasFrozen));
        assert_eq!(why(&core), "it was thawed before all of it was frozen");
    }

    #[test]
    fn a_daemon_that_was_started_anew_has_nothing_frozen() {
        let anew = |core: &mut Core| {
            let report = Report { daemon_id: "another".to_owned(), ..says("a", &[]) };
            core.heard(&report);
            core.wanted(&report)
        };
        let mut core = begun(&[("a", 11)]);
        turn(&mut core, "a", None);
        assert_eq!(anew(&mut core).len(), 1, "it was asked and has said nothing yet: it is asked again");
        let mut core = frozen();
        assert_eq!(anew(&mut core), []);
        assert!(why(&core).contains("was started anew"), "{}", why(&core));
        // While it was to be thawed: nobody knows what was frozen then.
        let mut core = frozen();
        core.thaw(FREEZE);
        anew(&mut core);
        assert!(why(&core).contains("was started anew"), "{}", why(&core));
    }

    #[test]
    fn a_server_that_was_started_anew_has_it_thawed() {
        let mut core = Core::default();
        for said in [Said::Freezing, Said::Frozen] {
            assert_eq!(turn(&mut core, "a", Some(said)), [Wanted::Thaw(FREEZE)]);
        }
        for said in [Said::Thawing, Said::WasFrozen, Said::NotFrozen(String::new())] {
            assert_eq!(turn(&mut core, "a", Some(said)), []);
        }
        // As one that was given up, and one of another node.
        let mut core = frozen();
        core.give_up(FREEZE, "it took too long".to_owned());
        assert_eq!(turn(&mut core, "a", Some(Said::Frozen)), [Wanted::Thaw(FREEZE)]);
        assert_eq!(why(&core), "it took too long");
        let mut core = frozen();
        assert_eq!(turn(&mut core, "b", Some(Said::Frozen)), [Wanted::Thaw(FREEZE)]);
        assert_eq!(core.standing(FREEZE), Standing::Frozen);
        core.forget(FREEZE);
        assert_eq!(turn(&mut core, "a", Some(Said::Frozen)), [Wanted::Thaw(FREEZE)]);
    }

    #[test]
    fn a_daemon_that_knows_no_freezes_is_asked_for_none() {
        let mut core = begun(&[("a", 11)]);
        let old = Report { node_id: "a".to_owned(), ..Report::default() };
        assert_eq!(core.wanted(&old), []);
        assert!(core.heard(&old));
        assert!(why(&core).contains("upgrade it"), "{}", why(&core));
    }

    #[test]
    fn a_disk_is_in_one_freeze_at_a_time() {
        let mut core = begun(&[("a", 11), ("b", 12)]);
        assert!(!core.begin(FREEZE, &parts(&[("c", 13)])), "the id is taken");
        assert!(!core.begin(OTHER, &parts(&[("b", 12), ("c", 13)])));
        assert!(core.begin(OTHER, &parts(&[("b", 14), ("c", 13)])), "other disks");
        core.forget(FREEZE);
        core.forget(OTHER);
        assert!(core.begin(OTHER, &parts(&[("b", 12)])));
        // The node has both, and is told of each.
        let report = says("b", &[(FREEZE, Said::Frozen)]);
        let wanted = [Wanted::Thaw(FREEZE), Wanted::Freeze(OTHER, BTreeSet::from([Uuid::from_u128(12)]))];
        assert_eq!(core.wanted(&report), wanted);
    }

    #[test]
    fn a_group_is_frozen_when_every_node_has_frozen_and_fails_together() {
        let mut core = begun(&[("a", 11), ("b", 12)]);
        turn(&mut core, "a", Some(Said::Frozen));
        let standing = core.standing(FREEZE);
        assert_eq!(standing, Standing::Freezing { waits_for: Some("b".to_owned()), has_frozen: true });
        turn(&mut core, "b", Some(Said::Frozen));
        assert_eq!(core.standing(FREEZE), Standing::Frozen);
        core.thaw(FREEZE);
        turn(&mut core, "a", Some(Said::WasFrozen));
        assert_eq!(core.standing(FREEZE), Standing::Thawing);
        turn(&mut core, "b", Some(Said::WasFrozen));
        assert_eq!(core.standing(FREEZE), Standing::Over(Ok(())));

        let mut core = begun(&[("a", 11), ("b", 12)]);
        turn(&mut core, "a", Some(Said::Frozen));
        turn(&mut core, "b", Some(Said::NotFrozen("busy".to_owned())));
        assert_eq!(why(&core), "b: busy");
        assert_eq!(turn(&mut core, "a", Some(Said::Frozen)), [Wanted::Thaw(FREEZE)], "the other is let go");
    }
}
