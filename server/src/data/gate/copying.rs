//! A volume that is being copied: opened for that as for a connection, and not released meanwhile.
//!
//! Owns: how many copies of which volume are being made, and who waits for one to be open. Never: copies, or has a request wait; see
//! `volume/snapshot/`. A volume that lost writes is let go of and opened anew all the same, also to be copied: the copy notices and ends,
//! and who opens it waits for its file's lock until then.

use std::collections::VecDeque;
use std::time::Instant;

use uuid::Uuid;

use super::core::{CopyWaiter, Core, VolumeState};
use super::events::{AfterLoss, CallId, NotCopied, Output};

impl Core {
    pub(super) fn copy_volume(
        &mut self,
        now: Instant,
        volume_uid: Uuid,
        call: CallId,
        outputs: &mut VecDeque<Output>,
    ) {
        match self.volumes.get(&volume_uid) {
            Some(VolumeState::Open { has_lost_writes: false }) => {
                self.answer_copy(call, volume_uid, Ok(()), outputs);
            }
            Some(VolumeState::Open { .. }) if !self.is_to_be_retired(volume_uid, None) => {
                self.answer_copy(call, volume_uid, Err(NotCopied::LostWrites), outputs);
            }
            state => {
                let state = state.copied();
                let deadline = now + self.bounds.open_timeout;
                self.copy_waiters.push(CopyWaiter { deadline, volume_uid, call });
                match state {
                    None => self.start_opening(volume_uid, outputs),
                    Some(VolumeState::Opening) => {}
                    // Nobody has it who could not be told: what it is from now on can be copied.
                    Some(VolumeState::Open { .. }) => {
                        outputs.push_back(Output::RecordLoss { volume_uid, then: AfterLoss::Copy });
                    }
                }
            }
        }
    }

    /// Has a volume whose loss of writes is recorded opened anew for those who wait to copy it.
    pub(super) fn copy_anew(&mut self, volume_uid: Uuid, outputs: &mut VecDeque<Output>) {
        if self.is_to_be_retired(volume_uid, None) {
            self.retire(volume_uid, outputs);
        }
        match self.volumes.get(&volume_uid) {
            None => self.start_opening(volume_uid, outputs),
            Some(VolumeState::Opening) => {}
            Some(VolumeState::Open { has_lost_writes }) => {
                let result = if *has_lost_writes { Err(NotCopied::LostWrites) } else { Ok(()) };
                self.answer_copies(volume_uid, &result, outputs);
            }
        }
    }

    pub(super) fn copy_ended(&mut self, volume_uid: Uuid) {
        if let Some(copies) = self.copies.get_mut(&volume_uid) {
            *copies -= 1;
            if *copies == 0 {
                self.copies.remove(&volume_uid);
            }
        }
    }

    /// Whether it is being copied now.
    pub(super) fn is_copied(&self, volume_uid: Uuid) -> bool {
        self.copies.contains_key(&volume_uid)
    }

    /// The volume is open, or cannot be opened.
    pub(super) fn answer_copies(
        &mut self,
        volume_uid: Uuid,
        result: &Result<(), NotCopied>,
        outputs: &mut VecDeque<Output>,
    ) {
        let waiters = std::mem::take(&mut self.copy_waiters);
        let (those, waiting): (Vec<_>, Vec<_>) =
            waiters.into_iter().partition(|waiter| waiter.volume_uid == volume_uid);
        self.copy_waiters = waiting;
        for waiter in those {
            self.answer_copy(waiter.call, volume_uid, result.clone(), outputs);
        }
    }

    /// Ends the waiting that has taken too long.
    pub(super) fn check_copies(&mut self, now: Instant, outputs: &mut VecDeque<Output>) {
        let waiters = std::mem::take(&mut self.copy_waiters);
        let (late, waiting): (Vec<_>, Vec<_>) =
            waiters.into_iter().partition(|waiter| now >= waiter.deadline);
        self.copy_waiters = waiting;
        for waiter in late {
            self.answer_copy(waiter.call, waiter.volume_uid, Err(NotCopied::TooLate), outputs);
        }
    }

    fn answer_copy(
        &mut self,
        call: CallId,
        volume_uid: Uuid,
        result: Result<(), NotCopied>,
        outputs: &mut VecDeque<Output>,
    ) {
        if result.is_ok() {
            *self.copies.entry(volume_uid).or_default() += 1;
        }
        outputs.push_back(Output::CopyAnswered { call, volume_uid, result });
    }
}
