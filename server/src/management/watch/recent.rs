//! The newest changes in memory: read once from the catalog, however many watch.
//!
//! Those who have told all wait for the same change, and each would ask the catalog for it, and once more to hear that there is
//! nothing else. So the first who asks keeps what it found for the others, and how many changes there had been. Who is further behind
//! asks the catalog. Called by `run.rs`.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::catalog::Change;

/// Changes that are kept. Some are as large as their labels: 25 KiB at most.
const KEPT_MAX: usize = 256;

/// What is known without the catalog.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// These come next; there may be more behind them.
    Changes(Vec<Arc<Change>>),
    /// Nothing has come since.
    Nothing,
    /// The catalog has to be asked.
    Ask,
}

/// The newest changes; see the module's text.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// All changes behind this number are kept, up to `last`; 0: nothing was read yet.
    behind: i64,
    last: i64,
    changes: VecDeque<Arc<Change>>,
    /// How often the catalog had told of a change when there was nothing behind `last`.
    count_at_end: Option<u64>,
}

impl Recent {
    /// What comes behind a change, at most `limit` of it, if the catalog has told so often of one.
    pub(super) fn after(&self, seq: i64, count: u64, limit: usize) -> Known {
        if self.behind == 0 || seq < self.behind || seq > self.last {
            return Known::Ask;
        }
        if seq < self.last {
            let first = self.changes.partition_point(|change| change.point.seq <= seq);
            return Known::Changes(self.changes.range(first..).take(limit).cloned().collect());
        }
        if self.count_at_end == Some(count) { Known::Nothing } else { Known::Ask }
    }

    /// Keeps what the catalog had behind a change. `is_all`: there was no more of it when it had told `count` times.
    pub(super) fn add(&mut self, seq: i64, found: &[Arc<Change>], count: u64, is_all: bool) {
        if seq < self.last {
            // Of somebody who is behind.
            return;
        }
        if seq > self.last || self.behind == 0 {
            *self = Self { behind: seq, last: seq, ..Self::default() };
        }
        self.changes.extend(found.iter().cloned());
        self.last = found.last().map_or(seq, |change| change.point.seq);
        self.count_at_end = is_all.then_some(count);
        while self.changes.len() > KEPT_MAX
            && let Some(gone) = self.changes.pop_front()
        {
            self.behind = gone.point.seq;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::ChangePoint;

    fn changes(seqs: impl Iterator<Item = i64>) -> Vec<Arc<Change>> {
        let point = |seq| ChangePoint { seq, mark: String::new() };
        seqs.map(|seq| Arc::new(Change { point: point(seq), time_ms: 0, told: None })).collect()
    }

    fn seqs(known: Known) -> Vec<i64> {
        match known {
            Known::Changes(changes) => changes.iter().map(|change| change.point.seq).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_one_has_read_the_others_need_not_ask_for() {
        let mut recent = Recent::default();
        assert_eq!(recent.after(5, 1, 9), Known::Ask);
        recent.add(5, &[], 1, true);
        assert_eq!(recent.after(5, 1, 9), Known::Nothing);
        assert_eq!(recent.after(5, 2, 9), Known::Ask, "something has come");
        recent.add(5, &changes(6..9), 2, true);
        assert_eq!(seqs(recent.after(5, 2, 9)), [6, 7, 8]);
        assert_eq!(seqs(recent.after(6, 2, 1)), [7]);
        assert_eq!(recent.after(8, 2, 9), Known::Nothing);
        assert_eq!(recent.after(4, 2, 9), Known::Ask, "too far behind");
        assert_eq!(recent.after(9, 2, 9), Known::Ask, "it was read by nobody");
    }

    #[test]
    fn a_part_of_what_there_is_is_not_taken_for_all() {
        let mut recent = Recent::default();
        recent.add(5, &changes(6..8), 3, false);
        assert_eq!(recent.after(7, 3, 9), Known::Ask);
        recent.add(7, &[], 3, true);
        assert_eq!(recent.after(7, 3, 9), Known::Nothing);
    }

    #[test]
    fn who_is_behind_or_ahead_makes_no_gap() {
        let mut recent = Recent::default();
        recent.add(5, &changes(6..8), 3, true);
        recent.add(1, &changes(2..4), 3, false);
        assert_eq!(seqs(recent.after(5, 3, 9)), [6, 7]);
        recent.add(20, &changes(21..22), 9, true);
        assert_eq!(recent.after(7, 9, 9), Known::Ask);
        assert_eq!(seqs(recent.after(20, 9, 9)), [21]);
        let kept = KEPT_MAX as i64;
        recent.add(21, &changes(22..22 + kept), 10, true);
        assert_eq!(recent.after(20, 10, 9), Known::Ask, "it made room");
        assert_eq!(seqs(recent.after(21, 10, 1)), [22]);
    }
}
