//! The life of a queue's tags, as a checked state machine.
//!
//! Owns: for each tag whose move it is (driver or daemon), how many operations still touch its pages, and its
//! sequence number. Never: does I/O, reads a clock, or allocates after construction.
//! Called by: the client's queue loop, before it pushes an SQE for a tag and after it reaps one.
//! Invariants, each an error to the caller rather than a corrupted request:
//!  - a request is committed exactly once;
//!  - nothing is committed while an operation that touches its pages is outstanding, except one operation that the
//!    commit is linked behind, so that the kernel itself starts it only after that operation has succeeded;
//!  - a buffer that was registered by hand is unregistered before its request is committed: by a command that has
//!    completed, or that was pushed just before.
//!
//! ```text
//!            FETCH pushed               completed OK
//!   Idle ─────────────────▶ Fetching ─────────────────▶ Dispatched ◀──────────────┐
//!                              │                          │     ▲                 │ completed OK
//!                              │             COMMIT pushed│     │ -ECANCELED      │ (the next request)
//!                    -ENODEV   │                          ▼     │ (link broken)   │
//!                              ├──────────────────────── Committed ───────────────┘
//!                              ▼        -ENODEV
//!                           Aborted (for good)
//! ```

use thiserror::Error;

/// Whose move it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagState {
    /// No FETCH has been pushed yet.
    Idle,
    /// The driver waits for a first request.
    Fetching,
    /// The daemon owns a request.
    Dispatched,
    /// The result is on its way to the driver, which then waits for the next request.
    Committed,
    /// The device is going away; the tag will carry no more requests.
    Aborted,
}

impl TagState {
    /// Whether the machine above has an arrow from here to `next`.
    pub const fn is_transition_valid(self, next: TagState) -> bool {
        use TagState::{Aborted, Committed, Dispatched, Fetching, Idle};
        matches!(
            (self, next),
            (Idle, Fetching) | (Fetching | Committed, Dispatched | Aborted) | (Dispatched, Committed)
        )
    }
}

/// What the queue loop must never have tried: one of our own mistakes, so the loop stops rather than goes on.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TagError {
    /// No arrow leads there.
    #[error("tag {tag} cannot go from {from:?} to {to:?}")]
    Transition {
        /// The tag.
        tag: u16,
        /// Its state.
        from: TagState,
        /// The state that was asked for.
        to: TagState,
    },
    /// A commit while operations still touch the request's pages.
    #[error("tag {tag} has {outstanding} operations outstanding, a commit needs {allowed}")]
    OperationsOutstanding {
        /// The tag.
        tag: u16,
        /// Operations that have not completed.
        outstanding: u16,
        /// Operations that this kind of commit may find: one if linked, else none.
        allowed: u16,
    },
    /// An operation was started or finished for a request that the daemon does not own.
    #[error("an operation on tag {tag} in state {state:?}")]
    NotOwned {
        /// The tag.
        tag: u16,
        /// Its state.
        state: TagState,
    },
    /// More operations finished than were started.
    #[error("an operation on tag {tag} finished that was never started")]
    NoOperation {
        /// The tag.
        tag: u16,
    },
    /// A commit, or a second registration, while the buffer is registered by hand; or an unregistration without one.
    #[error("tag {tag}: buffer registered by hand is {registered}")]
    BufferRegistration {
        /// The tag.
        tag: u16,
        /// Whether it is registered.
        registered: bool,
    },
    /// A completion for a tag that the queue does not have.
    #[error("tag {tag} is beyond the queue's depth {queue_depth}")]
    NoSuchTag {
        /// The tag.
        tag: u16,
        /// Tags of the queue.
        queue_depth: u16,
    },
}

#[derive(Clone, Copy, Debug)]
struct Tag {
    state: TagState,
    operations_outstanding: u16,
    registered_by_hand: bool,
    sequence: u32,
}

/// All tags of one queue.
#[derive(Debug)]
pub struct TagTable {
    tags: Box<[Tag]>,
    dispatched: u16,
    aborted: u16,
}

impl TagTable {
    /// A table of `queue_depth` idle tags; the only allocation.
    pub fn new(queue_depth: u16) -> Self {
        let idle =
            Tag { state: TagState::Idle, operations_outstanding: 0, registered_by_hand: false, sequence: 0 };
        Self { tags: vec![idle; usize::from(queue_depth)].into_boxed_slice(), dispatched: 0, aborted: 0 }
    }

    /// Tags in the table.
    pub fn queue_depth(&self) -> u16 {
        self.tags.len() as u16
    }

    /// The tag's state.
    pub fn state(&self, tag: u16) -> Result<TagState, TagError> {
        Ok(self.get(tag)?.state)
    }

    /// Requests the tag has carried, modulo 2^32: with the tag it names a request, so that a late answer to an
    /// earlier request never matches a later one.
    pub fn sequence(&self, tag: u16) -> Result<u32, TagError> {
        Ok(self.get(tag)?.sequence)
    }

    /// Operations on the tag's pages that have not completed.
    pub fn operations_outstanding(&self, tag: u16) -> Result<u16, TagError> {
        Ok(self.get(tag)?.operations_outstanding)
    }

    /// Requests that the daemon owns.
    pub fn dispatched(&self) -> u16 {
        self.dispatched
    }

    /// Tags that the driver has taken back for good.
    pub fn aborted(&self) -> u16 {
        self.aborted
    }

    /// Every tag is aborted and no operation is outstanding: the queue's thread may end.
    pub fn is_finished(&self) -> bool {
        self.aborted == self.queue_depth() && self.tags.iter().all(|tag| tag.operations_outstanding == 0)
    }

    /// A FETCH was pushed.
    pub fn fetch_submitted(&mut self, tag: u16) -> Result<(), TagError> {
        self.transition(tag, TagState::Fetching)
    }

    /// A FETCH or COMMIT completed with `UBLK_IO_RES_OK`: the tag holds a new request. Gives its sequence number.
    pub fn request_arrived(&mut self, tag: u16) -> Result<u32, TagError> {
        let outstanding = self.get(tag)?.operations_outstanding;
        if outstanding != 0 {
            return Err(TagError::OperationsOutstanding { tag, outstanding, allowed: 0 });
        }
        self.transition(tag, TagState::Dispatched)?;
        self.dispatched += 1;
        let slot = self.get_mut(tag)?;
        slot.sequence = slot.sequence.wrapping_add(1);
        Ok(slot.sequence)
    }

    /// A FETCH or COMMIT completed with `UBLK_IO_RES_ABORT`.
    pub fn abort_completed(&mut self, tag: u16) -> Result<(), TagError> {
        self.transition(tag, TagState::Aborted)?;
        self.aborted += 1;
        Ok(())
    }

    /// An operation that touches the request's pages was pushed.
    pub fn operation_submitted(&mut self, tag: u16) -> Result<(), TagError> {
        let slot = self.get_mut(tag)?;
        if slot.state != TagState::Dispatched {
            return Err(TagError::NotOwned { tag, state: slot.state });
        }
        slot.operations_outstanding += 1;
        Ok(())
    }

    /// Such an operation completed, with whatever result. Gives how many are left.
    pub fn operation_completed(&mut self, tag: u16) -> Result<u16, TagError> {
        let slot = self.get_mut(tag)?;
        // After a linked commit the state is already Committed when the operation before it completes.
        if !matches!(slot.state, TagState::Dispatched | TagState::Committed) {
            return Err(TagError::NotOwned { tag, state: slot.state });
        }
        slot.operations_outstanding =
            slot.operations_outstanding.checked_sub(1).ok_or(TagError::NoOperation { tag })?;
        Ok(slot.operations_outstanding)
    }

    /// REGISTER_IO_BUF completed with success.
    pub fn buffer_registered(&mut self, tag: u16) -> Result<(), TagError> {
        self.set_registered_by_hand(tag, true)
    }

    /// Whether the tag's buffer is registered by hand.
    pub fn is_registered_by_hand(&self, tag: u16) -> Result<bool, TagError> {
        Ok(self.get(tag)?.registered_by_hand)
    }

    /// UNREGISTER_IO_BUF completed with success, or was pushed in front of the COMMIT: a ring starts what is pushed in
    /// order, and the driver takes the buffer out at once.
    pub fn buffer_unregistered(&mut self, tag: u16) -> Result<(), TagError> {
        self.set_registered_by_hand(tag, false)
    }

    /// A COMMIT was pushed that starts at once.
    pub fn commit_submitted(&mut self, tag: u16) -> Result<(), TagError> {
        self.commit(tag, 0)
    }

    /// A COMMIT was pushed, linked behind the one outstanding operation on the request's pages.
    pub fn linked_commit_submitted(&mut self, tag: u16) -> Result<(), TagError> {
        self.commit(tag, 1)
    }

    /// A COMMIT completed with `-ECANCELED` because the operation it was linked behind failed: the driver has not
    /// seen it and the daemon still owns the request.
    pub fn commit_canceled(&mut self, tag: u16) -> Result<(), TagError> {
        let slot = self.get_mut(tag)?;
        if slot.state != TagState::Committed {
            return Err(TagError::Transition { tag, from: slot.state, to: TagState::Dispatched });
        }
        slot.state = TagState::Dispatched;
        self.dispatched += 1;
        Ok(())
    }

    fn commit(&mut self, tag: u16, operations_allowed: u16) -> Result<(), TagError> {
        let slot = *self.get(tag)?;
        if slot.state == TagState::Dispatched {
            if slot.registered_by_hand {
                return Err(TagError::BufferRegistration { tag, registered: true });
            }
            let outstanding = slot.operations_outstanding;
            if outstanding != operations_allowed {
                return Err(TagError::OperationsOutstanding {
                    tag,
                    outstanding,
                    allowed: operations_allowed,
                });
            }
        }
        self.transition(tag, TagState::Committed)?;
        self.dispatched -= 1;
        Ok(())
    }

    fn set_registered_by_hand(&mut self, tag: u16, registered: bool) -> Result<(), TagError> {
        let slot = self.get_mut(tag)?;
        if slot.state != TagState::Dispatched {
            return Err(TagError::NotOwned { tag, state: slot.state });
        }
        if slot.registered_by_hand == registered {
            return Err(TagError::BufferRegistration { tag, registered });
        }
        slot.registered_by_hand = registered;
        Ok(())
    }

    fn transition(&mut self, tag: u16, to: TagState) -> Result<(), TagError> {
        let slot = self.get_mut(tag)?;
        if !slot.state.is_transition_valid(to) {
            return Err(TagError::Transition { tag, from: slot.state, to });
        }
        slot.state = to;
        Ok(())
    }

    fn get(&self, tag: u16) -> Result<&Tag, TagError> {
        let queue_depth = self.queue_depth();
        self.tags.get(usize::from(tag)).ok_or(TagError::NoSuchTag { tag, queue_depth })
    }

    fn get_mut(&mut self, tag: u16) -> Result<&mut Tag, TagError> {
        let queue_depth = self.queue_depth();
        self.tags.get_mut(usize::from(tag)).ok_or(TagError::NoSuchTag { tag, queue_depth })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table_with_request() -> TagTable {
        let mut tags = TagTable::new(2);
        tags.fetch_submitted(0).unwrap();
        tags.request_arrived(0).unwrap();
        tags
    }

    #[test]
    fn a_request_is_committed_exactly_once() {
        let mut tags = table_with_request();
        tags.commit_submitted(0).unwrap();
        let again = tags.commit_submitted(0).unwrap_err();
        let expected = TagError::Transition { tag: 0, from: TagState::Committed, to: TagState::Committed };
        assert_eq!(again, expected);
        assert_eq!(tags.dispatched(), 0);
    }

    #[test]
    fn a_tag_without_a_request_cannot_be_committed() {
        let mut tags = TagTable::new(1);
        assert!(tags.commit_submitted(0).is_err());
        tags.fetch_submitted(0).unwrap();
        assert!(tags.commit_submitted(0).is_err());
        assert!(tags.linked_commit_submitted(0).is_err());
    }

    #[test]
    fn outstanding_operations_hold_the_commit_back() {
        let mut tags = table_with_request();
        tags.operation_submitted(0).unwrap();
        tags.operation_submitted(0).unwrap();
        assert_eq!(tags.operation_completed(0).unwrap(), 1);
        let early = tags.commit_submitted(0).unwrap_err();
        assert_eq!(early, TagError::OperationsOutstanding { tag: 0, outstanding: 1, allowed: 0 });
        assert_eq!(tags.operation_completed(0).unwrap(), 0);
        tags.commit_submitted(0).unwrap();
    }

    #[test]
    fn a_linked_commit_waits_for_exactly_one_operation() {
        let mut tags = table_with_request();
        assert!(tags.linked_commit_submitted(0).is_err());
        tags.operation_submitted(0).unwrap();
        tags.operation_submitted(0).unwrap();
        assert!(tags.linked_commit_submitted(0).is_err());
        tags.operation_completed(0).unwrap();
        tags.linked_commit_submitted(0).unwrap();
        assert!(
            tags.request_arrived(0).is_err(),
            "the next request cannot come before the operation completed"
        );
        tags.operation_completed(0).unwrap();
        tags.request_arrived(0).unwrap();
    }

    #[test]
    fn a_broken_link_gives_the_request_back() {
        let mut tags = table_with_request();
        tags.operation_submitted(0).unwrap();
        tags.linked_commit_submitted(0).unwrap();
        assert_eq!(tags.dispatched(), 0);
        tags.operation_completed(0).unwrap();
        tags.commit_canceled(0).unwrap();
        assert_eq!(tags.dispatched(), 1);
        assert_eq!(tags.sequence(0).unwrap(), 1);
        tags.commit_submitted(0).unwrap();
    }

    #[test]
    fn a_buffer_registered_by_hand_holds_the_commit_back() {
        let mut tags = table_with_request();
        tags.buffer_registered(0).unwrap();
        assert!(tags.buffer_registered(0).is_err());
        let early = tags.commit_submitted(0).unwrap_err();
        assert_eq!(early, TagError::BufferRegistration { tag: 0, registered: true });
        tags.buffer_unregistered(0).unwrap();
        assert!(tags.buffer_unregistered(0).is_err());
        tags.commit_submitted(0).unwrap();
    }

    #[test]
    fn each_request_has_its_own_sequence_number() {
        let mut tags = table_with_request();
        assert_eq!(tags.sequence(0).unwrap(), 1);
        tags.commit_submitted(0).unwrap();
        assert_eq!(tags.request_arrived(0).unwrap(), 2);
        assert_eq!(tags.sequence(1).unwrap(), 0);
    }

    #[test]
    fn the_queue_is_finished_when_the_driver_has_every_tag_back() {
        let mut tags = table_with_request();
        tags.fetch_submitted(1).unwrap();
        tags.abort_completed(1).unwrap();
        assert!(!tags.is_finished());
        assert!(tags.abort_completed(0).is_err(), "a request that the daemon owns must be committed first");
        tags.commit_submitted(0).unwrap();
        tags.abort_completed(0).unwrap();
        assert!(tags.is_finished());
        assert!(tags.fetch_submitted(0).is_err(), "an aborted tag is not fetched again");
    }

    #[test]
    fn operations_need_an_owned_request_and_a_beginning() {
        let mut tags = TagTable::new(1);
        assert_eq!(
            tags.operation_submitted(0).unwrap_err(),
            TagError::NotOwned { tag: 0, state: TagState::Idle }
        );
        tags.fetch_submitted(0).unwrap();
        tags.request_arrived(0).unwrap();
        assert_eq!(tags.operation_completed(0).unwrap_err(), TagError::NoOperation { tag: 0 });
        assert_eq!(tags.state(7).unwrap_err(), TagError::NoSuchTag { tag: 7, queue_depth: 1 });
    }

    #[test]
    fn only_the_drawn_arrows_exist() {
        use TagState::{Aborted, Committed, Dispatched, Fetching, Idle};
        let states = [Idle, Fetching, Dispatched, Committed, Aborted];
        let arrows = states
            .iter()
            .flat_map(|from| states.iter().map(move |to| (*from, *to)))
            .filter(|(from, to)| from.is_transition_valid(*to))
            .count();
        assert_eq!(arrows, 6);
    }
}
