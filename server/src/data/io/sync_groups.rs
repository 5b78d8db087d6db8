//! One sync of a file at a time on a ring: those that are asked for meanwhile wait, and the next one covers them all.
//!
//! Owns: who waits for which sync. Never: does the sync itself; `ring.rs` does.
//! Called by: `ring.rs`.
//!
//! Why: Linux reports a failed write-back once for each open file description. Of two syncs that run at the same time on
//! one description, one would get the error and the other a success for the same lost writes. So each ring has a
//! description of its own to sync on, and never two syncs on it. That many FLUSHes then cost one is a welcome effect.
//! Invariants: a request joins a sync that has not begun yet, so every write that was answered before is covered by it.

use crate::ids::RequestSlot;

/// Who waits for a sync: a connection's index in its ring, and the request.
pub type Member = (u32, RequestSlot);

/// A sync that has to be begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begin {
    /// The first of those that wait for it.
    pub leader: Member,
    /// fsync rather than fdatasync.
    pub metadata: bool,
}

#[derive(Debug, Default)]
struct Group {
    /// What is synced; 0 while the group is unused.
    key: usize,
    running: Vec<Member>,
    waiting: Vec<Member>,
    waiting_metadata: bool,
}

/// The syncs of one ring.
#[derive(Debug, Default)]
pub struct SyncGroups {
    groups: Vec<Group>,
}

impl SyncGroups {
    /// A request wants `key` (an address or number that is not 0) synced. `Some`: begin it now.
    pub fn join(&mut self, key: usize, member: Member, metadata: bool) -> Option<Begin> {
        let found = self.groups.iter().position(|group| group.key == key);
        let index =
            found.or_else(|| self.groups.iter().position(|group| group.key == 0)).unwrap_or_else(|| {
                self.groups.push(Group::default());
                self.groups.len() - 1
            });
        let group = &mut self.groups[index];
        group.key = key;
        group.waiting.push(member);
        group.waiting_metadata |= metadata;
        group.running.is_empty().then(|| group.begin())
    }

    /// The sync of `key` has ended: `done` gets those it was for, and the result is the next one to begin.
    ///
    /// # Panics
    /// When none of `key` was running.
    pub fn ended(&mut self, key: usize, done: &mut Vec<Member>) -> Option<Begin> {
        let Some(group) = self.groups.iter_mut().find(|group| group.key == key && !group.running.is_empty())
        else {
            panic!("no sync was running");
        };
        done.append(&mut group.running);
        if group.waiting.is_empty() {
            group.key = 0;
            return None;
        }
        Some(group.begin())
    }
}

impl Group {
    fn begin(&mut self) -> Begin {
        std::mem::swap(&mut self.running, &mut self.waiting);
        let metadata = std::mem::take(&mut self.waiting_metadata);
        Begin { leader: self.running[0], metadata }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(number: u8) -> Member {
        (u32::from(number), RequestSlot(number))
    }

    fn begin(number: u8, metadata: bool) -> Option<Begin> {
        Some(Begin { leader: member(number), metadata })
    }

    #[test]
    fn a_sync_covers_all_that_came_before_it_began_and_none_after() {
        let mut groups = SyncGroups::default();
        let mut done = Vec::new();
        assert_eq!(groups.join(7, member(1), false), begin(1, false));
        assert_eq!(groups.join(7, member(2), false), None, "one at a time");
        assert_eq!(groups.join(7, member(3), true), None);
        assert_eq!(groups.ended(7, &mut done), begin(2, true), "the stronger kind for both");
        assert_eq!(done, [member(1)], "2 and 3 came after the first had begun");
        done.clear();
        assert_eq!(groups.join(7, member(4), false), None);
        assert_eq!(groups.ended(7, &mut done), begin(4, false));
        assert_eq!(done, [member(2), member(3)]);
        done.clear();
        assert_eq!(groups.ended(7, &mut done), None);
        assert_eq!(done, [member(4)]);
    }

    #[test]
    fn files_do_not_wait_for_each_other() {
        let mut groups = SyncGroups::default();
        let mut done = Vec::new();
        assert_eq!(groups.join(7, member(1), false), begin(1, false));
        assert_eq!(groups.join(8, member(2), false), begin(2, false));
        assert_eq!(groups.ended(7, &mut done), None);
        assert_eq!(groups.join(9, member(3), false), begin(3, false));
        assert_eq!(groups.groups.len(), 2, "a group that has ended is used again");
    }
}
