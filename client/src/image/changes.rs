//! Where an image differs from its base: ranges of bytes, in order.
//!
//! I/O-free. What is written of a difference goes by whole clusters, so that no program has to fill up one from a base which it does not have:
//! whoever writes a cluster has all of its bytes.
//! Filled from the server's comparison of two snapshots, or from what an image has of its own; used by `copy.rs` and `overlay.rs`.

use std::ops::Range;

/// Unit in which a difference is written: a cluster of qcow2 as QEMU makes it.
pub const CLUSTER_BYTES: u64 = 64 << 10;

/// Ranges in order, none of them empty, adjacent to another or overlapping one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes(Vec<Range<u64>>);

impl Changes {
    /// Adds a range. An empty one is none. False: it begins before the one before, and is not added.
    #[must_use]
    pub fn push(&mut self, range: Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        match self.0.last_mut() {
            Some(last) if range.start < last.start => return false,
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => self.0.push(range),
        }
        true
    }

    /// The same in whole clusters, the last of which the image's end may cut off.
    pub fn in_clusters(&self, size_bytes: u64) -> Self {
        let mut widened = Self::default();
        let is_in_order = self.0.iter().all(|range| {
            let start = range.start / CLUSTER_BYTES * CLUSTER_BYTES;
            let end = range.end.checked_next_multiple_of(CLUSTER_BYTES).unwrap_or(u64::MAX);
            widened.push(start..end.min(size_bytes))
        });
        debug_assert!(is_in_order, "as they are here");
        widened
    }

    /// How many bytes they are.
    pub fn total_bytes(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }

    /// What of them lies within a range, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.0.partition_point(|changed| changed.end <= range.start);
        let inside = self.0[first..].iter().take_while(move |changed| changed.start < range.end);
        inside.map(move |changed| changed.start.max(range.start)..changed.end.min(range.end))
    }

    /// Whether anything changed there.
    pub fn touch(&self, range: Range<u64>) -> bool {
        self.within(range).next().is_some()
    }

    /// What is written of a chunk at `offset_bytes`: its changed clusters with data in them, and those without, in bytes from the chunk's
    /// beginning. `data` is where the chunk has data.
    pub fn split(
        &self,
        offset_bytes: u64,
        length_bytes: usize,
        data: &[Range<usize>],
    ) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
        let (mut with_data, mut zeroes) = (Vec::new(), Vec::new());
        let has_data =
            |part: &Range<usize>| data.iter().any(|run| run.start < part.end && part.start < run.end);
        for changed in self.within(offset_bytes..offset_bytes + length_bytes as u64) {
            let mut at = changed.start;
            while at < changed.end {
                let end = ((at / CLUSTER_BYTES + 1) * CLUSTER_BYTES).min(changed.end);
                let part = (at - offset_bytes) as usize..(end - offset_bytes) as usize;
                extend(if has_data(&part) { &mut with_data } else { &mut zeroes }, part);
                at = end;
            }
        }
        (with_data, zeroes)
    }
}

fn extend(parts: &mut Vec<Range<usize>>, part: Range<usize>) {
    match parts.last_mut() {
        Some(last) if last.end == part.start => last.end = part.end,
        _ => parts.push(part),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = CLUSTER_BYTES;

    fn changes(ranges: &[Range<u64>]) -> Changes {
        let mut changes = Changes::default();
        assert!(ranges.iter().all(|range| changes.push(range.clone())));
        changes
    }

    #[test]
    fn ranges_grow_together_and_to_whole_clusters() {
        let told = changes(&[5..5, 0..4096, 4096..8192, CLUSTER - 1..CLUSTER, 3 * CLUSTER..3 * CLUSTER + 1]);
        assert_eq!(told, changes(&[0..8192, CLUSTER - 1..CLUSTER, 3 * CLUSTER..3 * CLUSTER + 1]));
        assert_eq!(told.total_bytes(), 8194);
        assert!(!changes(&[5..6, 8..9]).push(7..10), "out of order");
        let size = 3 * CLUSTER + 4096;
        assert_eq!(told.in_clusters(size), changes(&[0..CLUSTER, 3 * CLUSTER..size]));
        assert_eq!(
            told.in_clusters(CLUSTER).within(0..size).collect::<Vec<_>>(),
            vec![Range { start: 0, end: CLUSTER }]
        );
    }

    #[test]
    fn what_lies_within_is_cut_to_it() {
        let told = changes(&[10..20, 30..40]);
        let within = |range| told.within(range).collect::<Vec<_>>();
        assert_eq!(within(15..35), [15..20, 30..35]);
        assert_eq!(within(0..100), [10..20, 30..40]);
        assert!(within(20..30).is_empty() && !told.touch(40..50) && told.touch(39..40));
    }

    #[test]
    fn a_chunks_changed_clusters_are_written_whole_and_the_rest_is_left() {
        let at = 16 * CLUSTER;
        let told =
            changes(&[0..at + CLUSTER, at + 2 * CLUSTER..at + 5 * CLUSTER, 40 * CLUSTER..41 * CLUSTER]);
        let cluster = CLUSTER as usize;
        // Half of the third cluster, a bit of the fifth, and one that has not changed.
        let data = [
            2 * cluster..2 * cluster + cluster / 2,
            5 * cluster - 7..5 * cluster + 7,
            9 * cluster..10 * cluster,
        ];
        let (with_data, zeroes) = told.split(at, 16 * cluster, &data);
        assert_eq!(with_data, [2 * cluster..3 * cluster, 4 * cluster..5 * cluster]);
        assert_eq!(zeroes, [0..cluster, 3 * cluster..4 * cluster]);
    }
}
