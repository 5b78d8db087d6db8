//! Which bytes of a window may differ, by where both files have them.
//!
//! Pure. Called by `walk.rs`. Invariant: what is not told is equal: both are at one address, or both are zeroes.

use std::ops::Range;

use crate::backend::extent_map::{Place, Run};

/// What the target has where it may differ from the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Any bytes.
    Data,
    /// Zeroes, without space for them.
    Zero,
}

/// Bytes that may differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Which; not empty.
    pub bytes: Range<u64>,
    /// What the target has there.
    pub change: Change,
}

/// Adds a change, to the last one where that is the same and ends there.
pub fn add(changes: &mut Vec<Changed>, changed: Changed) {
    match changes.last_mut() {
        Some(last) if last.change == changed.change && last.bytes.end == changed.bytes.start => {
            last.bytes.end = changed.bytes.end;
        }
        _ => changes.push(changed),
    }
}

/// Adds what may differ inside of a window, of which both maps tell all. Their runs are in order; what is between them is zeroes.
pub fn compare(window: &Range<u64>, base: &[Run], target: &[Run], changes: &mut Vec<Changed>) {
    let (mut base, mut target) = (Runs::new(base), Runs::new(target));
    let mut at = window.start;
    while at < window.end {
        let (in_base, base_end) = base.place(at, window.end);
        let (in_target, target_end) = target.place(at, window.end);
        let end = base_end.min(target_end);
        if let Some(change) = change(in_base, in_target) {
            add(changes, Changed { bytes: at..end, change });
        }
        at = end;
    }
}

fn change(base: Place, target: Place) -> Option<Change> {
    match (base, target) {
        (Place::Nowhere, Place::Nowhere) => None,
        (_, Place::Nowhere) => Some(Change::Zero),
        (Place::At(one), Place::At(other)) if one == other => None,
        (_, Place::At(_) | Place::Unknown) => Some(Change::Data),
    }
}

/// Runs in order, looked at from front to back.
struct Runs<'a> {
    left: &'a [Run],
}

impl<'a> Runs<'a> {
    fn new(runs: &'a [Run]) -> Self {
        Self { left: runs }
    }

    /// Where the byte at an offset is, and up to where those behind it follow it there. Offsets only grow.
    fn place(&mut self, at: u64, end: u64) -> (Place, u64) {
        while let Some((first, rest)) = self.left.split_first()
            && first.bytes.end <= at
        {
            self.left = rest;
        }
        match self.left.first() {
            Some(run) if run.bytes.start <= at => {
                let place = run.within(&(at..end)).map_or(Place::Unknown, |run| run.place);
                (place, run.bytes.end.min(end))
            }
            Some(run) => (Place::Nowhere, run.bytes.start.min(end)),
            None => (Place::Nowhere, end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(bytes: Range<u64>, place: Place) -> Run {
        Run { bytes, place }
    }

    fn compared(window: Range<u64>, base: &[Run], target: &[Run]) -> Vec<(Range<u64>, Change)> {
        let mut changes = Vec::new();
        compare(&window, base, target, &mut changes);
        changes.into_iter().map(|changed| (changed.bytes, changed.change)).collect()
    }

    #[test]
    fn one_address_is_one_content_however_the_maps_are_cut() {
        let whole = [run(0..100, Place::At(1000))];
        let cut = [run(0..30, Place::At(1000)), run(30..60, Place::At(1030)), run(60..100, Place::At(1060))];
        assert_eq!(compared(0..100, &whole, &cut), []);
        assert_eq!(compared(0..100, &cut, &whole), []);
        let moved =
            [run(0..30, Place::At(1000)), run(30..60, Place::At(1031)), run(60..100, Place::At(1060))];
        assert_eq!(compared(0..100, &whole, &moved), [(30..60, Change::Data)]);
    }

    #[test]
    fn zeroes_are_equal_to_zeroes_alone() {
        let data = [run(10..20, Place::At(0))];
        assert_eq!(compared(0..100, &[], &[]), []);
        assert_eq!(compared(0..100, &[], &data), [(10..20, Change::Data)]);
        assert_eq!(compared(0..100, &data, &[]), [(10..20, Change::Zero)]);
        assert_eq!(compared(12..15, &data, &[]), [(12..15, Change::Zero)]);
    }

    #[test]
    fn what_has_no_address_differs_from_everything() {
        let unknown = [run(0..10, Place::Unknown)];
        assert_eq!(compared(0..10, &unknown, &unknown), [(0..10, Change::Data)]);
        assert_eq!(compared(0..10, &unknown, &[]), [(0..10, Change::Zero)]);
    }

    #[test]
    fn neighbours_of_one_kind_are_told_as_one() {
        let base = [run(0..10, Place::At(0)), run(10..30, Place::At(50))];
        let target = [run(0..20, Place::At(500))];
        assert_eq!(compared(0..30, &base, &target), [(0..20, Change::Data), (20..30, Change::Zero)]);
    }
}
