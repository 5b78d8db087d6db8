//! What a simulation came across: a rule that was never tried was not tested.

use std::collections::BTreeMap;

/// How often each situation came up.
#[derive(Debug, Default, Clone)]
pub struct Coverage {
    counts: BTreeMap<&'static str, u64>,
    is_told: bool,
}

impl Coverage {
    /// Once more.
    pub(super) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
        self.say(|| what.to_owned());
    }

    /// Tells what happens, where that is wanted.
    pub(super) fn say(&self, what: impl FnOnce() -> String) {
        if self.is_told {
            println!("{}", what());
        }
    }

    /// A coverage that prints what happens as it is counted.
    pub fn told() -> Self {
        Self { is_told: true, ..Self::default() }
    }

    /// Adds another simulation's.
    pub fn add(&mut self, other: &Self) {
        for (what, count) in &other.counts {
            *self.counts.entry(what).or_default() += count;
        }
    }

    /// Each situation, and how often.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.counts.iter().map(|(what, count)| (*what, *count))
    }

    /// How often that came up.
    pub fn of(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }
}
