//! What a ring tells of an operation that has ended.
//!
//! Owns: how an operation is named in the kernel's `user_data`. Never: can be made outside of `ring.rs`, or used twice: a
//! [`Completion`] is the proof that the kernel, or a backend, has let go of what the operation named. [`Wire::ended`] takes it.
//! Called by: `ring.rs` (makes it), `wire.rs`, `io/run.rs` (passes it on), `session_io.rs` ([`Outcome`]).
//!
//! [`Wire::ended`]: super::wire::Wire::ended

use crate::ids::RequestSlot;

/// What an operation was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpKind {
    /// Somebody posted to the mailbox.
    Wakeup,
    /// Bytes into the connection's receive memory.
    ReceiveBulk,
    /// Bytes of a WRITE's payload into its place.
    ReceivePayload,
    /// The socket can take more of the replies.
    RoomToSend,
    /// An operation of a volume.
    Volume,
    /// A sync that is done for several requests; comes out as one `Volume` for each.
    Sync,
    /// The cancellation of a connection's socket operations.
    Cancel,
}

impl OpKind {
    const ALL: [Self; 7] = [
        Self::Wakeup,
        Self::ReceiveBulk,
        Self::ReceivePayload,
        Self::RoomToSend,
        Self::Volume,
        Self::Sync,
        Self::Cancel,
    ];
}

/// What became of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What it was.
    pub kind: OpKind,
    /// For which request, where there is one.
    pub slot: RequestSlot,
    /// Bytes or 0, or a negative errno.
    pub result: i32,
}

/// A finished operation.
#[derive(Debug, PartialEq, Eq)]
pub struct Completion {
    /// Whose: an index of this ring; of a sync, that of the volume it is of.
    index: u32,
    outcome: Outcome,
}

impl Completion {
    pub(super) fn new(kind: OpKind, index: u32, slot: RequestSlot, result: i32) -> Self {
        Self { index, outcome: Outcome { kind, slot, result } }
    }

    pub(super) fn user_data(kind: OpKind, index: u32, slot: RequestSlot) -> u64 {
        let number = OpKind::ALL.iter().position(|other| *other == kind).unwrap_or(0) as u64;
        number << 40 | u64::from(slot.0) << 32 | u64::from(index)
    }

    pub(super) fn from_cqe(user_data: u64, result: i32) -> Self {
        let kind = OpKind::ALL[(user_data >> 40) as usize];
        Self::new(kind, user_data as u32, RequestSlot((user_data >> 32) as u8), result)
    }

    /// What it was.
    pub fn kind(&self) -> OpKind {
        self.outcome.kind
    }

    /// Whose: an index of this ring. Not meaningful for a wakeup.
    pub fn index(&self) -> u32 {
        self.index
    }

    pub(super) fn result(&self) -> i32 {
        self.outcome.result
    }

    pub(super) fn into_outcome(self) -> Outcome {
        self.outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_known_by_its_user_data() {
        for kind in OpKind::ALL {
            let completion =
                Completion::from_cqe(Completion::user_data(kind, u32::MAX, RequestSlot(200)), -5);
            assert_eq!(completion, Completion::new(kind, u32::MAX, RequestSlot(200), -5));
        }
    }
}
