//! A simulated disk: how it is made, the process that serves it, and the requests that the kernel has for it.

use std::time::{Duration, Instant};

use super::client::{Bios, Client, Note, Spec};

/// A block device and the process behind it.
pub(super) struct Device {
    pub(super) bios: Bios,
    pub(super) spec: Spec,
    pub(super) client: Option<Client>,
    /// What the last process knew.
    pub(super) incarnation: Option<String>,
    /// The storage lost something since all connections were last up.
    pub(super) may_be_lost: bool,
    /// Some requests were given up in this outage, or the peer lies.
    pub(super) may_fail: bool,
    /// How old the oldest of them was; until it was looked at.
    pub(super) given_up_after: Option<Duration>,
}

impl Device {
    pub(super) fn bios_count(&self) -> usize {
        self.bios.iter().flatten().flatten().count()
    }

    pub(super) fn oldest_request(&self, now: Instant) -> Duration {
        let bios = self.bios.iter().flatten().flatten();
        bios.map(|bio| now.duration_since(bio.submitted_at)).max().unwrap_or_default()
    }

    pub(super) fn has_bios(&self) -> bool {
        self.bios.iter().flatten().any(Option::is_some)
    }

    /// Reads under way may find what was there before the storage lost something, or after.
    pub(super) fn forget_reads(&mut self) {
        for bio in self.bios.iter_mut().flatten().flatten() {
            if let Note::Read(_) = bio.note {
                bio.note = Note::Gone;
            }
        }
    }
}
