//! A freeze as a pure state machine: what the holders of its file systems are told, and when its caller gets which answer.
//!
//! Owns: how far each file system is, the deadlines, and whether all of them were frozen at once for as long as it took. Never: does I/O,
//! reads a clock, or knows a process; `mod.rs` carries its [`Output`]s out.
//!
//! ```text
//!             all ready            written down          all frozen             asked to
//!   syncing ────────────▶ noting ────────────▶ freezing ───────────▶ frozen ───────────▶ thawing ──▶ over, was frozen
//!      │                    │                     │                    │                    │
//!      └──── one failed, or it took too long ─────┴── too long, thawed by somebody, gone ───┴──────▶ over, and why it was not
//! ```
//! Invariants: nothing is frozen before it is written down what that is; each call is answered once; whoever may be frozen is let go,
//! and rescued where its holder ended without a word; it was frozen only if every holder says so at the thaw.

use std::time::{Duration, Instant};

use crate::freezer::HOLD_MAX;

/// What is dirty is written before anybody waits, for so long at most.
const SYNC_MAX: Duration = Duration::from_secs(60);
/// From the first file system that is told to freeze to the thaw of all: who writes to the first waits all the time.
const FREEZE_MAX: Duration = HOLD_MAX;
/// A thaw that takes longer waits for a disk that does not answer.
const THAW_MAX: Duration = Duration::from_secs(10);

/// How far a file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Syncing,
    Ready,
    /// It may be frozen at any moment.
    Freezing,
    Frozen,
    /// Told to thaw, if it is frozen.
    LetGo,
    /// Nothing holds it.
    Over,
}

/// How far the freeze is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Syncing,
    Noting,
    Freezing,
    Frozen,
    /// Its caller wants to know whether it was frozen.
    Thawing,
    /// It was not frozen: why.
    Failed(String),
    Thawed,
}

/// What happens to a freeze.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    /// The file system of that number is synced.
    Ready(usize),
    /// What is to be frozen is written down; or why not.
    Noted(Result<(), String>),
    /// It is frozen.
    Frozen(usize),
    /// It was frozen until it was told to thaw.
    Thawed(usize),
    /// It is not frozen by its holder: why.
    NotFrozen(usize, String),
    /// Its holder has ended; without a word, if none came before.
    Gone(usize),
    /// The caller wants it thawed.
    Thaw,
    /// [`Core::deadline`] has come.
    TooLate,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Output {
    /// Write down what is to be frozen, and say [`Input::Noted`].
    Note,
    /// Tell the holder to freeze.
    Freeze(usize),
    /// Tell the holder to thaw, and to say whether it was still frozen.
    Thaw(usize),
    /// Let the holder go: it thaws what it has frozen, and freezes nothing any more.
    LetGo(usize),
    /// Have another process thaw it, because its holder cannot have.
    Rescue(usize),
    /// All are frozen; or why not.
    Begun(Result<(), String>),
    /// It was frozen from then on; or why not. Also where nobody has asked yet.
    Ended(Result<(), String>),
}

/// One freeze.
#[derive(Debug)]
pub(super) struct Core {
    phase: Phase,
    steps: Vec<Step>,
    /// Names of the file systems, for people.
    names: Vec<String>,
    deadline: Instant,
}

impl Core {
    /// Of so many file systems, whose holders sync them already.
    pub(super) fn new(names: Vec<String>, now: Instant) -> Self {
        let steps = vec![Step::Syncing; names.len()];
        Self { phase: Phase::Syncing, steps, names, deadline: now + SYNC_MAX }
    }

    /// When it has taken too long; `None`: it waits for nothing but its holders' ends.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Failed(_) | Phase::Thawed => None,
            _ => Some(self.deadline),
        }
    }

    /// Whether nothing is frozen any more, nor will be.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Failed(_) | Phase::Thawed)
            && self.steps.iter().all(|step| *step == Step::Over)
    }

    /// Takes an input, and adds what is to be done.
    pub(super) fn handle(&mut self, now: Instant, input: Input, outputs: &mut Vec<Output>) {
        match input {
            Input::Ready(index) => {
                self.advance(index, Step::Syncing, Step::Ready);
                if self.phase == Phase::Syncing && self.all(Step::Ready) {
                    self.phase = Phase::Noting;
                    self.deadline = now + FREEZE_MAX;
                    outputs.push(Output::Note);
                }
            }
            Input::Noted(Ok(())) if self.phase == Phase::Noting => {
                self.phase = Phase::Freezing;
                self.deadline = now + FREEZE_MAX;
                for index in 0..self.steps.len() {
                    self.steps[index] = Step::Freezing;
                    outputs.push(Output::Freeze(index));
                }
            }
            // It was given up meanwhile.
            Input::Noted(Ok(())) => {}
            Input::Noted(Err(why)) => self.fail(why, outputs),
            Input::Frozen(index) => {
                self.advance(index, Step::Freezing, Step::Frozen);
                if self.phase == Phase::Freezing && self.all(Step::Frozen) {
                    self.phase = Phase::Frozen;
                    outputs.push(Output::Begun(Ok(())));
                }
            }
            Input::Thaw => self.thaw(now, outputs),
            Input::Thawed(index) => self.thawed(index, outputs),
            Input::NotFrozen(index, why) => {
                self.end(index);
                self.fail(format!("{}: {why}", self.name(index)), outputs);
            }
            Input::Gone(index) => self.gone(index, outputs),
            Input::TooLate => self.too_late(outputs),
        }
    }

    fn thaw(&mut self, now: Instant, outputs: &mut Vec<Output>) {
        match self.phase.clone() {
            Phase::Frozen => {
                self.phase = Phase::Thawing;
                self.deadline = now + THAW_MAX;
                for index in 0..self.steps.len() {
                    self.steps[index] = Step::LetGo;
                    outputs.push(Output::Thaw(index));
                }
            }
            // Answered when it is known.
            Phase::Thawing => {}
            Phase::Thawed => outputs.push(Output::Ended(Ok(()))),
            Phase::Failed(why) => outputs.push(Output::Ended(Err(why))),
            Phase::Syncing | Phase::Noting | Phase::Freezing => {
                self.fail("it was thawed before all were frozen".to_owned(), outputs);
            }
        }
    }

    fn thawed(&mut self, index: usize, outputs: &mut Vec<Output>) {
        self.end(index);
        if self.phase != Phase::Thawing {
            // Nobody has told it to.
            self.fail(format!("{} was thawed too early", self.name(index)), outputs);
        } else if self.all(Step::Over) {
            self.phase = Phase::Thawed;
            outputs.push(Output::Ended(Ok(())));
        }
    }

    fn gone(&mut self, index: usize, outputs: &mut Vec<Output>) {
        let step = self.steps.get(index).copied().unwrap_or(Step::Over);
        if step == Step::Over {
            return;
        }
        self.end(index);
        if matches!(step, Step::Freezing | Step::Frozen | Step::LetGo) {
            outputs.push(Output::Rescue(index));
        }
        self.fail(format!("{}: what held it was killed", self.name(index)), outputs);
    }

    fn too_late(&mut self, outputs: &mut Vec<Output>) {
        let waits_for = |step| {
            let slow = self.steps.iter().position(|other| *other == step);
            slow.map_or_else(String::new, |index| self.name(index))
        };
        let why = match self.phase {
            Phase::Syncing => format!(
                "{} is not synced after {} s: its disk is slow, or waits for its server",
                waits_for(Step::Syncing),
                SYNC_MAX.as_secs()
            ),
            Phase::Freezing => format!(
                "{} is not frozen after {} s: its disk is slow, or waits for its server",
                waits_for(Step::Freezing),
                FREEZE_MAX.as_secs()
            ),
            Phase::Frozen => format!("it was thawed after {} s", HOLD_MAX.as_secs()),
            Phase::Thawing => format!(
                "the thaw of {} is not done after {} s: its disk waits for its server",
                waits_for(Step::LetGo),
                THAW_MAX.as_secs()
            ),
            Phase::Noting => "what is to be frozen could not be written down in time".to_owned(),
            Phase::Failed(_) | Phase::Thawed => return,
        };
        self.fail(why, outputs);
    }

    /// From here on it was not frozen, whatever comes.
    fn fail(&mut self, why: String, outputs: &mut Vec<Output>) {
        let answer = match self.phase {
            Phase::Syncing | Phase::Noting | Phase::Freezing => Output::Begun(Err(why.clone())),
            Phase::Frozen | Phase::Thawing => Output::Ended(Err(why.clone())),
            Phase::Failed(_) | Phase::Thawed => return,
        };
        self.phase = Phase::Failed(why);
        self.let_all_go(outputs);
        outputs.push(answer);
    }

    fn let_all_go(&mut self, outputs: &mut Vec<Output>) {
        for (index, step) in self.steps.iter_mut().enumerate() {
            if !matches!(step, Step::LetGo | Step::Over) {
                // One that has not begun yet ends without a word, and one that is about to freeze thaws as soon as it has.
                let has_begun = matches!(step, Step::Freezing | Step::Frozen);
                *step = if has_begun { Step::LetGo } else { Step::Over };
                outputs.push(Output::LetGo(index));
            }
        }
    }

    fn advance(&mut self, index: usize, from: Step, to: Step) {
        if let Some(step) = self.steps.get_mut(index).filter(|step| **step == from) {
            *step = to;
        }
    }

    fn end(&mut self, index: usize) {
        if let Some(step) = self.steps.get_mut(index) {
            *step = Step::Over;
        }
    }

    fn all(&self, wanted: Step) -> bool {
        self.steps.iter().all(|step| *step == wanted)
    }

    fn name(&self, index: usize) -> String {
        self.names.get(index).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Driver {
        core: Core,
        now: Instant,
    }

    impl Driver {
        fn new(count: usize) -> Self {
            let now = Instant::now();
            Self { core: Core::new((0..count).map(|index| format!("/mnt/{index}")).collect(), now), now }
        }

        fn tell(&mut self, input: Input) -> Vec<Output> {
            let mut outputs = Vec::new();
            self.core.handle(self.now, input, &mut outputs);
            outputs
        }

        /// At its deadline.
        fn wait(&mut self) -> Vec<Output> {
            self.now = self.core.deadline().unwrap();
            self.tell(Input::TooLate)
        }

        fn freezing(count: usize) -> Self {
            let mut driver = Self::new(count);
            for index in 0..count {
                driver.tell(Input::Ready(index));
            }
            driver.tell(Input::Noted(Ok(())));
            driver
        }

        fn frozen(count: usize) -> Self {
            let mut driver = Self::freezing(count);
            for index in 0..count {
                driver.tell(Input::Frozen(index));
            }
            assert_eq!(driver.core.phase, Phase::Frozen);
            driver
        }
    }

    fn why(output: Option<&Output>) -> String {
        match output {
            Some(Output::Begun(Err(why)) | Output::Ended(Err(why))) => why.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn it_is_written_down_before_anything_is_frozen_and_all_are_frozen_before_it_is_said() {
        let mut driver = Driver::new(2);
        assert_eq!(driver.tell(Input::Ready(1)), []);
        assert_eq!(driver.tell(Input::Ready(0)), [Output::Note]);
        assert_eq!(driver.tell(Input::Noted(Ok(()))), [Output::Freeze(0), Output::Freeze(1)]);
        assert_eq!(driver.tell(Input::Frozen(0)), []);
        assert_eq!(driver.tell(Input::Frozen(1)), [Output::Begun(Ok(()))]);
        assert_eq!(driver.tell(Input::Thaw), [Output::Thaw(0), Output::Thaw(1)]);
        assert_eq!(driver.tell(Input::Thawed(1)), []);
        assert!(!driver.core.is_over());
        assert_eq!(driver.tell(Input::Thawed(0)), [Output::Ended(Ok(()))]);
        assert!(driver.core.is_over() && driver.core.deadline().is_none());
        assert_eq!(driver.tell(Input::Gone(0)), [], "it has said all");
        assert_eq!(driver.tell(Input::Thaw), [Output::Ended(Ok(()))], "asked again");
    }

    #[test]
    fn nothing_is_frozen_that_could_not_be_written_down() {
        let mut driver = Driver::new(1);
        driver.tell(Input::Ready(0));
        let outputs = driver.tell(Input::Noted(Err("no space".to_owned())));
        assert_eq!(outputs, [Output::LetGo(0), Output::Begun(Err("no space".to_owned()))]);
        assert!(driver.core.is_over());
    }

    #[test]
    fn what_expires_is_thawed_and_was_not_frozen() {
        let mut driver = Driver::frozen(2);
        let began = driver.now;
        let outputs = driver.wait();
        assert!(driver.now <= began + HOLD_MAX);
        assert_eq!(outputs[..2], [Output::LetGo(0), Output::LetGo(1)]);
        assert_eq!(why(outputs.last()), "it was thawed after 10 s");
        // Whatever the holders say of it.
        assert_eq!(driver.tell(Input::Thawed(0)), []);
        assert_eq!(driver.tell(Input::NotFrozen(1, "late".to_owned())), []);
        assert!(driver.core.is_over());
        assert_eq!(why(driver.tell(Input::Thaw).last()), "it was thawed after 10 s");
    }

    #[test]
    fn what_somebody_else_thawed_was_not_frozen() {
        let mut driver = Driver::frozen(2);
        driver.tell(Input::Thaw);
        driver.tell(Input::Thawed(0));
        let outputs = driver.tell(Input::NotFrozen(1, "another program has thawed it meanwhile".to_owned()));
        assert_eq!(why(outputs.last()), "/mnt/1: another program has thawed it meanwhile");
        assert!(driver.core.is_over());
    }

    #[test]
    fn one_that_cannot_be_frozen_lets_the_others_go() {
        let mut driver = Driver::freezing(2);
        driver.tell(Input::Frozen(0));
        let outputs = driver.tell(Input::NotFrozen(1, "busy".to_owned()));
        assert_eq!(outputs, [Output::LetGo(0), Output::Begun(Err("/mnt/1: busy".to_owned()))]);
        assert!(!driver.core.is_over(), "the first is frozen still");
        driver.tell(Input::Thawed(0));
        assert!(driver.core.is_over());
    }

    #[test]
    fn a_freeze_that_hangs_is_given_up_and_waited_for() {
        let mut driver = Driver::freezing(2);
        driver.tell(Input::Frozen(0));
        let outputs = driver.wait();
        assert_eq!(outputs[..2], [Output::LetGo(0), Output::LetGo(1)]);
        assert!(why(outputs.last()).starts_with("/mnt/1 is not frozen after 10 s"));
        driver.tell(Input::Thawed(0));
        assert!(!driver.core.is_over(), "it may be frozen at any moment");
        assert_eq!(driver.tell(Input::Frozen(1)), [], "it has been let go");
        driver.tell(Input::Thawed(1));
        assert!(driver.core.is_over());
    }

    #[test]
    fn a_sync_that_hangs_is_given_up_with_nothing_frozen() {
        let mut driver = Driver::new(2);
        driver.tell(Input::Ready(0));
        let outputs = driver.wait();
        assert!(why(outputs.last()).starts_with("/mnt/1 is not synced after 60 s"));
        assert!(driver.core.is_over());
        assert_eq!(driver.tell(Input::Ready(1)), [], "nothing is frozen afterwards");
    }

    #[test]
    fn whose_holder_is_killed_is_thawed_by_another_process() {
        let mut driver = Driver::frozen(2);
        let outputs = driver.tell(Input::Gone(0));
        assert_eq!(outputs[..2], [Output::Rescue(0), Output::LetGo(1)]);
        assert_eq!(why(outputs.last()), "/mnt/0: what held it was killed");
        assert_eq!(
            driver.tell(Input::Gone(1)),
            [Output::Rescue(1)],
            "told to thaw, and killed before it did"
        );
        assert!(driver.core.is_over());
    }

    #[test]
    fn a_thaw_before_its_time_ends_it() {
        let mut driver = Driver::freezing(1);
        let outputs = driver.tell(Input::Thaw);
        assert_eq!(outputs[0], Output::LetGo(0));
        assert_eq!(why(outputs.last()), "it was thawed before all were frozen");
    }

    /// Whatever comes in whatever order: the answers come once each, nothing is frozen unwritten, and what may be frozen at the end
    /// was let go or rescued.
    #[test]
    fn no_order_of_events_breaks_the_invariants() {
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let count = random.usize(1..4);
            let mut driver = Driver::new(count);
            let (mut begun, mut was_frozen, mut is_noted, mut has_asked) = (0, false, false, false);
            let mut told = vec![(false, false); count];
            for _ in 0..40 {
                let index = random.usize(0..count);
                let input = match random.u32(0..12) {
                    0..=2 => Input::Ready(index),
                    3 if driver.core.phase == Phase::Noting => Input::Noted(Ok(())),
                    3..=6 if told[index].0 => Input::Frozen(index),
                    7 if told[index].1 => Input::Thawed(index),
                    8 if random.u32(0..6) == 0 => Input::NotFrozen(index, "x".to_owned()),
                    9 if random.u32(0..6) == 0 => Input::Gone(index),
                    10 if random.u32(0..4) == 0 => {
                        has_asked = true;
                        Input::Thaw
                    }
                    11 if random.u32(0..8) == 0 => Input::TooLate,
                    _ => continue,
                };
                is_noted |= input == Input::Noted(Ok(()));
                for output in driver.tell(input) {
                    match output {
                        Output::Freeze(index) => {
                            assert!(is_noted && !told[index].0, "seed {seed}");
                            told[index].0 = true;
                        }
                        Output::LetGo(index) | Output::Thaw(index) => told[index].1 = true,
                        Output::Rescue(index) => assert!(told[index].0, "seed {seed}: never frozen"),
                        Output::Begun(_) => begun += 1,
                        Output::Ended(Ok(())) => {
                            assert!(has_asked, "seed {seed}");
                            was_frozen = true;
                        }
                        Output::Ended(Err(_)) => {
                            assert!(!was_frozen, "seed {seed}: it was frozen, and was not")
                        }
                        Output::Note => assert!(!is_noted, "seed {seed}"),
                    }
                }
                assert!(begun <= 1, "seed {seed}: answered twice");
                if driver.core.is_over() {
                    assert_eq!(begun, 1, "seed {seed}: never answered");
                }
            }
        }
    }
}
