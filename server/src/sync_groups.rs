//! One sync of a file at a time on a ring: those that are asked for meanwhile wait, and the next one covers them all.
//!
//! Owns: who waits for which sync, and a hold on what is synced. Never: does the sync itself; `ring.rs` does.
//! Called by: `ring.rs`.
//!
//! Why: Linux reports a failed write-back once for each open file description. Of two syncs that run at the same time on
//! one description, one would get the error and the other a success for the same lost writes. So each ring has a
//! description of its own to sync on, and never two syncs on it. That many FLUSHes then cost one is a welcome effect.
//! Invariants: a request joins a sync that has not begun yet, so every write that was answered before is covered by it.

use std::sync::Arc;

use crate::ids::SlotId;

/// Who waits for a sync: a connection's index in its ring, and the request.
pub type Member = (u32, SlotId);

/// A sync that has to be begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begin {
    /// By which it is known.
    pub group: u32,
    /// fsync rather than fdatasync.
    pub metadata: bool,
}

#[derive(Debug)]
struct Group<V> {
    /// What is synced; `None` while the group is unused.
    volume: Option<Arc<V>>,
    running: Vec<Member>,
    waiting: Vec<Member>,
    waiting_metadata: bool,
}

/// The syncs of one ring.
#[derive(Debug)]
pub struct SyncGroups<V> {
    groups: Vec<Group<V>>,
}

impl<V> Default for SyncGroups<V> {
    fn default() -> Self {
        Self { groups: Vec::new() }
    }
}

impl<V> SyncGroups<V> {
    /// A request wants a volume synced. `Some`: begin it now.
    pub fn join(&mut self, volume: &Arc<V>, member: Member, metadata: bool) -> Option<Begin> {
        let is_of = |group: &Group<V>| group.volume.as_ref().is_some_and(|other| Arc::ptr_eq(other, volume));
        let found = self.groups.iter().position(is_of);
        let found = found.or_else(|| self.groups.iter().position(|group| group.volume.is_none()));
        let index = found.unwrap_or_else(|| {
            self.groups.push(Group::new());
            self.groups.len() - 1
        });
        let group = &mut self.groups[index];
        if group.volume.is_none() {
            group.volume = Some(Arc::clone(volume));
        }
        group.waiting.push(member);
        group.waiting_metadata |= metadata;
        group.running.is_empty().then(|| group.begin(index as u32))
    }

    /// What a group has synced.
    ///
    /// # Panics
    /// When none of it is running.
    pub fn volume(&self, group: u32) -> &Arc<V> {
        match self.groups.get(group as usize).and_then(|group| group.volume.as_ref()) {
            Some(volume) => volume,
            None => panic!("no sync of group {group} is running"),
        }
    }

    /// The sync of a group has ended: `done` gets those it was for, and the result is the next one to begin.
    ///
    /// # Panics
    /// When none of it was running.
    pub fn ended(&mut self, index: u32, done: &mut Vec<Member>) -> Option<Begin> {
        let group = &mut self.groups[index as usize];
        assert!(!group.running.is_empty(), "no sync was running");
        done.append(&mut group.running);
        if group.waiting.is_empty() {
            group.volume = None;
            return None;
        }
        Some(group.begin(index))
    }
}

impl<V> Group<V> {
    fn new() -> Self {
        Self { volume: None, running: Vec::new(), waiting: Vec::new(), waiting_metadata: false }
    }

    fn begin(&mut self, group: u32) -> Begin {
        std::mem::swap(&mut self.running, &mut self.waiting);
        let metadata = std::mem::take(&mut self.waiting_metadata);
        Begin { group, metadata }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(number: u8) -> Member {
        (u32::from(number), SlotId(number))
    }

    fn begin(group: u32, metadata: bool) -> Option<Begin> {
        Some(Begin { group, metadata })
    }

    #[test]
    fn a_sync_covers_all_that_came_before_it_began_and_none_after() {
        let mut groups = SyncGroups::default();
        let (volume, mut done) = (Arc::new(7), Vec::new());
        assert_eq!(groups.join(&volume, member(1), false), begin(0, false));
        assert_eq!(groups.join(&volume, member(2), false), None, "one at a time");
        assert_eq!(groups.join(&volume, member(3), true), None);
        assert_eq!(groups.ended(0, &mut done), begin(0, true), "the stronger kind for both");
        assert_eq!(done, [member(1)], "2 and 3 came after the first had begun");
        done.clear();
        assert_eq!(groups.join(&volume, member(4), false), None);
        assert_eq!(groups.ended(0, &mut done), begin(0, false));
        assert_eq!(done, [member(2), member(3)]);
        done.clear();
        assert_eq!(groups.ended(0, &mut done), None);
        assert_eq!(done, [member(4)]);
    }

    #[test]
    fn volumes_do_not_wait_for_each_other_and_are_held_while_they_are_synced() {
        let mut groups = SyncGroups::default();
        let [first, second, third] = [Arc::new(7), Arc::new(7), Arc::new(9)];
        let mut done = Vec::new();
        assert_eq!(groups.join(&first, member(1), false), begin(0, false));
        assert_eq!(groups.join(&second, member(2), false), begin(1, false), "equal is not the same");
        assert_eq!(Arc::strong_count(groups.volume(0)), 2);
        assert_eq!(groups.ended(0, &mut done), None);
        assert_eq!(Arc::strong_count(&first), 1);
        assert_eq!(groups.join(&third, member(3), false), begin(0, false));
        assert_eq!(groups.groups.len(), 2, "a group that has ended is used again");
        assert!(Arc::ptr_eq(groups.volume(0), &third));
    }
}
