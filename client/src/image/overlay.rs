//! A base with a difference above it: what both read as together.
//!
//! Owns no I/O of its own: where the difference has bytes they are read from its image, and everything else from the base, which reads as zeroes
//! behind its end. It is only read.
//! Used by volctl, as what an image of a difference is checked against, or copied from.

use std::sync::Arc;

use super::changes::Changes;
use super::plan::Run;
use super::store::{Store, StoreError};

/// A base and a difference.
#[derive(Debug)]
pub struct Overlay {
    base: Arc<Store>,
    base_bytes: u64,
    above: Arc<Store>,
    changes: Changes,
    /// The same in whole clusters: the base may know no smaller unit.
    clusters: Changes,
}

impl Overlay {
    /// Of a base of so many bytes, and an image that has bytes of its own at `changes`.
    pub fn new(base: Arc<Store>, base_bytes: u64, above: Arc<Store>, changes: Changes) -> Self {
        let clusters = changes.in_clusters(u64::MAX);
        Self { base, base_bytes, above, changes, clusters }
    }

    /// Where the base is hidden.
    pub fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Ends the connections of both in good order, as far as nobody else has them.
    pub async fn close(self) {
        for store in [self.base, self.above] {
            if let Some(store) = Arc::into_inner(store) {
                store.close().await;
            }
        }
    }

    /// Reads bytes of both, as they are together.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn read(&self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let asked = offset_bytes..offset_bytes + length_bytes;
        let mut changed = self.changes.within(asked.clone()).peekable();
        if changed.peek() == Some(&asked) {
            return self.above.read(offset_bytes, length_bytes).await;
        }
        let mut bytes = self.read_base(offset_bytes, length_bytes).await?;
        for range in changed {
            let above = self.above.read(range.start, range.end - range.start).await?;
            bytes[(range.start - offset_bytes) as usize..(range.end - offset_bytes) as usize]
                .copy_from_slice(&above);
        }
        Ok(bytes)
    }

    /// Reads the base's bytes, and zeroes behind its end.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn read_base(&self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let there = self.base_bytes.saturating_sub(offset_bytes).min(length_bytes);
        let mut bytes = match there {
            0 => Vec::new(),
            there => self.base.read(offset_bytes, there).await?,
        };
        bytes.resize(length_bytes as usize, 0);
        Ok(bytes)
    }

    /// What is there: at least one run, from `offset_bytes` on.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn look(&self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<Run>, StoreError> {
        let asked = offset_bytes..offset_bytes + length_bytes;
        let run = |length_bytes, is_zero| Ok(vec![Run { length_bytes, is_zero }]);
        let next = self.clusters.within(asked.clone()).next();
        if let Some(changed) = next.clone().filter(|changed| changed.start == asked.start) {
            let length_bytes = changed.end - changed.start;
            if self.changes.within(changed.clone()).eq([changed]) {
                return self.above.look(offset_bytes, length_bytes).await.map(|runs| cut(runs, length_bytes));
            }
            return run(length_bytes, false);
        }
        let end = next.map_or(asked.end, |changed| changed.start);
        if offset_bytes >= self.base_bytes {
            return run(end - offset_bytes, true);
        }
        let length_bytes = end.min(self.base_bytes) - offset_bytes;
        self.base.look(offset_bytes, length_bytes).await.map(|runs| cut(runs, length_bytes))
    }
}

/// What a pass over an image reads.
#[derive(Debug, Clone, Copy)]
pub enum Readable<'a> {
    /// All that a store has.
    Store(&'a Store),
    /// A base and a difference.
    Overlay(&'a Overlay),
}

impl Readable<'_> {
    /// Reads bytes, wherever they lie.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn read(self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<u8>, StoreError> {
        match self {
            Self::Store(store) => store.read(offset_bytes, length_bytes).await,
            Self::Overlay(overlay) => overlay.read(offset_bytes, length_bytes).await,
        }
    }

    /// What is there: at least one run, from `offset_bytes` on.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn look(self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<Run>, StoreError> {
        match self {
            Self::Store(store) => store.look(offset_bytes, length_bytes).await,
            Self::Overlay(overlay) => overlay.look(offset_bytes, length_bytes).await,
        }
    }

    /// What is read from now on comes from the storage, as far as that can be asked for.
    pub async fn forget_cache(self) {
        match self {
            Self::Store(store) => store.forget_cache().await,
            Self::Overlay(overlay) => overlay.above.forget_cache().await,
        }
    }
}

/// Not more than was asked for: behind it lies something else.
fn cut(runs: Vec<Run>, mut length_bytes: u64) -> Vec<Run> {
    let mut within = Vec::with_capacity(runs.len());
    for run in runs {
        let taken = run.length_bytes.min(length_bytes);
        if taken > 0 {
            within.push(Run { length_bytes: taken, ..run });
        }
        length_bytes -= taken;
    }
    within
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::image::changes::CLUSTER_BYTES;

    fn file(bytes: &[u8]) -> Arc<Store> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Arc::new(Store::File(Arc::new(file)))
    }

    #[tokio::test]
    async fn what_lies_above_hides_the_base_which_is_zeroes_behind_its_end() {
        let mut changes = Changes::default();
        assert!(changes.push(2..4) && changes.push(9..10));
        let overlay = Overlay::new(file(b"abcdef"), 6, file(b"0123456789ABCDEF"), changes);
        assert_eq!(overlay.read(0, 12).await.unwrap(), b"ab23ef\0\0\09\0\0");
        assert_eq!(overlay.read(2, 2).await.unwrap(), b"23");
        assert_eq!(overlay.read(7, 2).await.unwrap(), b"\0\0");
        assert_eq!(overlay.read_base(3, 5).await.unwrap(), b"def\0\0");
    }

    #[tokio::test]
    async fn zeroes_are_told_of_the_base_of_what_lies_above_and_behind_the_end() {
        let cluster = CLUSTER_BYTES as usize;
        let mut changes = Changes::default();
        assert!(changes.push(CLUSTER_BYTES..CLUSTER_BYTES + 512));
        assert!(changes.push(3 * CLUSTER_BYTES..4 * CLUSTER_BYTES));
        let above = tempfile::tempfile().unwrap();
        above.set_len(6 * CLUSTER_BYTES).unwrap();
        let above = Arc::new(Store::File(Arc::new(above)));
        let overlay = Overlay::new(file(&vec![7; 2 * cluster]), 2 * CLUSTER_BYTES, above, changes);
        let (mut at, mut runs) = (0, Vec::new());
        while at < 6 * CLUSTER_BYTES {
            for run in overlay.look(at, 6 * CLUSTER_BYTES - at).await.unwrap() {
                at += run.length_bytes;
                runs.push((run.length_bytes / CLUSTER_BYTES, run.is_zero));
            }
        }
        // A file system without holes tells of none in the fourth.
        let fourth = runs[3].1;
        assert_eq!(runs, [(1, false), (1, false), (1, true), (1, fourth), (2, true)]);
    }
}
