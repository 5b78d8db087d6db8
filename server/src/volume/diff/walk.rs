//! From window to window over two extent maps.
//!
//! Owns how far a comparison is, and the few runs of the window that is looked at. Never: asks a file system itself (its maps
//! do), or waits. Called by `lifecycle/diffs.rs` and `data/block_status.rs`, a window at a time.
//! Invariants: windows follow each other without a gap, up to the target's end; each has a byte at least; a base that changes its places
//! while the target's are read does not count (`mod.rs` has the reason).

use std::io;
use std::ops::Range;

use super::compare::{Changed, compare};
use crate::backend::extent_map::{ExtentMap, Place, Run};

/// So many times a window is looked at whose extents move meanwhile. Each time they have to move again, within a millisecond or so.
const LOOKS: u32 = 3;

/// A comparison of a target with a base, or with nothing but zeroes.
#[derive(Debug)]
pub struct Walk<B, T> {
    base: Option<B>,
    target: T,
    at: u64,
    end: u64,
    base_runs: Vec<Run>,
    base_runs_again: Vec<Run>,
    target_runs: Vec<Run>,
}

impl<B: ExtentMap, T: ExtentMap> Walk<B, T> {
    /// Of a range of the target, as far as that reaches.
    pub fn new(base: Option<B>, target: T, range: &Range<u64>) -> Self {
        let end = range.end.min(target.capacity_bytes());
        let (base_runs, base_runs_again, target_runs) = (Vec::new(), Vec::new(), Vec::new());
        Self { base, target, at: range.start, end, base_runs, base_runs_again, target_runs }
    }

    /// All before it has been told.
    pub fn offset_bytes(&self) -> u64 {
        self.at
    }

    /// Whether all has been told.
    pub fn is_done(&self) -> bool {
        self.at >= self.end
    }

    /// Adds what may differ in the next window; false: there is none.
    ///
    /// # Errors
    /// The file system's, of either map; the same window is looked at again the next time.
    pub fn next(&mut self, changes: &mut Vec<Changed>) -> io::Result<bool> {
        if self.is_done() {
            return Ok(false);
        }
        for _ in 0..LOOKS {
            let whole = self.at..self.end;
            let base_end = read_base(self.base.as_ref(), &whole, &mut self.base_runs)?;
            let window = self.at..base_end;
            let window_end = self.target.read(&window, &mut self.target_runs)?;
            let window = self.at..window_end;
            if self.is_base_the_same(&window)? {
                compare(&window, &self.base_runs, &self.target_runs, changes);
                self.at = window.end;
                return Ok(true);
            }
        }
        // What the target has is known all the same; it counts as another than the base's.
        let window_end = self.target.read(&(self.at..self.end), &mut self.target_runs)?;
        let window = self.at..window_end;
        compare(&window, &[Run { bytes: window.clone(), place: Place::Unknown }], &self.target_runs, changes);
        self.at = window.end;
        Ok(true)
    }

    /// Reads the base's map again. It may be cut in other places, and be told in several parts.
    fn is_base_the_same(&mut self, window: &Range<u64>) -> io::Result<bool> {
        let mut at = window.start;
        while at < window.end {
            let end = read_base(self.base.as_ref(), &(at..window.end), &mut self.base_runs_again)?;
            let mut moved = Vec::new();
            compare(&(at..end), &self.base_runs, &self.base_runs_again, &mut moved);
            // What has no address is told as changed anyway.
            let is_unknown = |changed: &Changed| is_unknown(&self.base_runs, &changed.bytes);
            if !moved.iter().all(is_unknown) {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }
}

/// Whether all of the bytes are in runs without an address.
fn is_unknown(runs: &[Run], bytes: &Range<u64>) -> bool {
    let parts = runs.iter().filter(|run| run.place == Place::Unknown).filter_map(|run| run.within(bytes));
    parts.map(|run| run.bytes.end - run.bytes.start).sum::<u64>() == bytes.end - bytes.start
}

/// The base's map, behind whose end there are zeroes, as everywhere where there is no base.
fn read_base<B: ExtentMap>(base: Option<&B>, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64> {
    match base {
        Some(base) if range.start < base.capacity_bytes() => {
            let inside = range.start..range.end.min(base.capacity_bytes());
            let told_end = base.read(&inside, runs)?;
            Ok(if told_end == inside.end { range.end } else { told_end })
        }
        _ => {
            runs.clear();
            Ok(range.end)
        }
    }
}

#[cfg(test)]
mod tests;
