//! The order in which kubelet and the sidecars call a CSI driver, and what may go wrong between two calls: chosen by a seed.
//!
//! Owns: which step of a volume's life may come next, and the faults of a round. Never: calls anything; `tests/vm/kubelet.rs` does, and
//! tells [`Life::done`] of every step that has succeeded.
//!
//! ```text
//! CreateVolume ─► ControllerPublish ─► NodeStage ─► NodePublish, once for each pod ─► pods write, stats, expansion
//!      ▲                   ▲                                                                   │
//! DeleteVolume ◄──┬── ControllerUnpublish ◄── NodeUnstage ◄── NodeUnpublish, of each pod ◄─────┘
//!                 └── a stage that comes late: refused
//! ```

use std::time::Duration;

use fastrand::Rng;

/// Pods that use one volume at most.
pub const PODS: usize = 2;
/// A volume grows so often.
const EXPANSIONS_MAX: u32 = 2;
/// The longest time into a call at which the driver is killed, or the caller hangs up, in milliseconds.
const INTO_A_CALL_MAX_MS: u64 = 1500;

/// A call of the driver, or what a pod does with the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// CreateVolume.
    Create,
    /// ControllerPublishVolume.
    ControllerPublish,
    /// NodeStageVolume.
    Stage,
    /// NodePublishVolume for this pod.
    Publish(usize),
    /// This pod reads all that was ever written, and writes more.
    Use(usize),
    /// NodeGetVolumeStats and NodeGetVolumeHealth at this pod's target.
    Look(usize),
    /// ControllerExpandVolume.
    ControllerExpand,
    /// NodeExpandVolume at this pod's target.
    NodeExpand(usize),
    /// NodeUnpublishVolume for this pod.
    Unpublish(usize),
    /// NodeUnstageVolume.
    Unstage,
    /// ControllerUnpublishVolume.
    ControllerUnpublish,
    /// NodeStageVolume once more, after the node was fenced: has to be refused.
    LateStage,
    /// DeleteVolume.
    Delete,
}

/// What happens around the calls of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The driver is killed before them.
    KilledBefore,
    /// It is killed so long after they began; they are repeated.
    KilledDuring(Duration),
    /// Each comes a second time while the first still runs.
    Twice,
    /// Their caller hangs up after this time, and repeats them.
    GivenUp(Duration),
    /// Each is repeated after it has succeeded.
    Repeated,
    /// The same, by a driver that was killed between the two.
    RepeatedByAnother,
}

impl Fault {
    /// One of them.
    pub fn choose(rng: &mut Rng) -> Self {
        let moment = Duration::from_millis(rng.u64(0..INTO_A_CALL_MAX_MS));
        match rng.u8(0..10) {
            0 => Self::None,
            1 => Self::KilledBefore,
            2..5 => Self::KilledDuring(moment),
            5 => Self::Twice,
            6 => Self::GivenUp(moment),
            7 => Self::Repeated,
            _ => Self::RepeatedByAnother,
        }
    }
}

/// How far a volume is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Life {
    is_there: bool,
    is_granted: bool,
    is_staged: bool,
    published: [bool; PODS],
    /// The controller has made it larger, and the node has not yet.
    has_to_grow: bool,
    expansions: u32,
    /// Times that it was granted and is not any more.
    former_grants: u32,
    /// It was used since it was staged.
    was_used: bool,
    /// A device, to which nothing is to be grown.
    is_block: bool,
}

impl Life {
    /// Of a volume that is to be made.
    pub fn new(is_block: bool) -> Self {
        Self { is_block, ..Self::default() }
    }

    /// Whether the volume has been deleted, or was never made.
    pub fn is_over(&self) -> bool {
        !self.is_there
    }

    fn pods(&self, are_published: bool) -> Vec<usize> {
        (0..PODS).filter(|&pod| self.published[pod] == are_published).collect()
    }

    /// All steps that kubelet and the sidecars may take now; never none.
    pub fn may(&self) -> Vec<Step> {
        if !self.is_there {
            return vec![Step::Create];
        }
        if !self.is_granted {
            let mut steps = vec![Step::ControllerPublish];
            if self.former_grants > 0 {
                steps.extend([Step::LateStage, Step::Delete]);
            }
            return steps;
        }
        if !self.is_staged {
            return vec![Step::Stage, Step::ControllerUnpublish];
        }
        let (inside, outside) = (self.pods(true), self.pods(false));
        let mut steps: Vec<Step> = outside.into_iter().map(Step::Publish).collect();
        if inside.is_empty() {
            steps.push(Step::Unstage);
        }
        for pod in inside {
            steps.extend([Step::Use(pod), Step::Look(pod), Step::Unpublish(pod)]);
            if self.has_to_grow {
                steps.push(Step::NodeExpand(pod));
            }
        }
        if self.expansions < EXPANSIONS_MAX && !self.has_to_grow && !self.pods(true).is_empty() {
            steps.push(Step::ControllerExpand);
        }
        steps
    }

    /// One of them: a volume is used before it goes, for the most part.
    pub fn next(&self, rng: &mut Rng) -> Step {
        let goes = |step: &Step| matches!(step, Step::Unstage | Step::ControllerUnpublish);
        let mut may = self.may();
        if !self.was_used && rng.u8(0..8) > 0 {
            may.retain(|step| !goes(step));
        }
        if self.was_used && self.pods(true).is_empty() && rng.bool() {
            may.retain(goes);
        }
        may[rng.usize(0..may.len())]
    }

    /// The next step on the shortest way to nothing; `None`: there is nothing.
    pub fn way_out(&self) -> Option<Step> {
        if !self.is_there {
            return None;
        }
        Some(match self.pods(true).first() {
            Some(&pod) => Step::Unpublish(pod),
            None if self.is_staged => Step::Unstage,
            None if self.is_granted => Step::ControllerUnpublish,
            None => Step::Delete,
        })
    }

    /// A step has succeeded.
    ///
    /// # Panics
    /// Where it could not come now: kubelet would not have asked for it.
    pub fn done(&mut self, step: Step) {
        assert!(self.may().contains(&step) || self.way_out() == Some(step), "{step:?} of {self:?}");
        match step {
            Step::Create => *self = Self { is_there: true, ..Self::new(self.is_block) },
            Step::ControllerPublish => self.is_granted = true,
            // It grows what has not grown yet.
            Step::Stage => (self.is_staged, self.has_to_grow, self.was_used) = (true, false, false),
            Step::Publish(pod) => self.published[pod] = true,
            Step::Use(_) => self.was_used = true,
            Step::ControllerExpand => {
                self.expansions += 1;
                self.has_to_grow = !self.is_block;
            }
            Step::NodeExpand(_) => self.has_to_grow = false,
            Step::Unpublish(pod) => self.published[pod] = false,
            Step::Unstage => self.is_staged = false,
            Step::ControllerUnpublish => {
                (self.is_granted, self.was_used) = (false, false);
                self.former_grants += 1;
            }
            Step::Look(_) | Step::LateStage => {}
            Step::Delete => self.is_there = false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_step_comes_up_in_kubelets_order() {
        let mut rng = Rng::with_seed(7);
        for is_block in [false, true] {
            let (mut life, mut seen) = (Life::new(is_block), HashSet::new());
            for _ in 0..20_000 {
                let step = life.next(&mut rng);
                let inside = life.pods(true);
                match step {
                    Step::Stage => assert!(life.is_granted && !life.is_staged),
                    Step::Publish(pod) => assert!(life.is_staged && !inside.contains(&pod)),
                    Step::Use(pod) | Step::Look(pod) | Step::Unpublish(pod) | Step::NodeExpand(pod) => {
                        assert!(inside.contains(&pod));
                    }
                    Step::Unstage => assert!(life.is_staged && inside.is_empty()),
                    Step::ControllerUnpublish | Step::LateStage => assert!(!life.is_staged),
                    Step::Delete => assert!(!life.is_granted),
                    Step::Create | Step::ControllerPublish | Step::ControllerExpand => {}
                }
                life.done(step);
                seen.insert(step);
            }
            // A device has nothing to grow on the node.
            assert_eq!(seen.len(), if is_block { 18 - PODS } else { 18 }, "{seen:?}");
        }
    }

    #[test]
    fn the_way_out_is_short_from_everywhere() {
        let mut rng = Rng::with_seed(11);
        for _ in 0..500 {
            let mut life = Life::new(false);
            for _ in 0..rng.usize(0..40) {
                life.done(life.next(&mut rng));
            }
            let mut steps = 0;
            while let Some(step) = life.way_out() {
                life.done(step);
                steps += 1;
            }
            assert!(life.is_over() && steps <= PODS + 3, "{steps}");
        }
    }

    #[test]
    fn a_seed_repeats_its_choices_and_every_fault_comes_up() {
        let choices = |seed| -> Vec<(Step, Fault)> {
            let (mut rng, mut life) = (Rng::with_seed(seed), Life::new(false));
            let mut choose = || {
                let step = life.next(&mut rng);
                life.done(step);
                (step, Fault::choose(&mut rng))
            };
            (0..200).map(|_| choose()).collect()
        };
        assert_eq!(choices(1), choices(1));
        assert_ne!(choices(1), choices(2));
        let kinds: HashSet<_> = choices(1).iter().map(|(_, fault)| std::mem::discriminant(fault)).collect();
        assert_eq!(kinds.len(), 7);
    }
}
