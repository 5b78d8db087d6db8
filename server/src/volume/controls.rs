//! What a volume's requests have to heed beside their range: its limits, and whether it has to be marked as written first.
//!
//! Owns: these of every volume that has been opened, or changed, since the server's start. They outlive an open: what is waited for,
//! and what was counted, goes on when a volume is closed and opened again. Never: writes the catalog; what is set here is durable
//! already. Called by: the control side (`data/server.rs`, which sets), the gate's openers, and `data/io/throttle.rs` (asks).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::rate_limit::{RateLimiter, Turn, Waiting};
use crate::catalog::{Content, VolumeLimits, VolumeRecord};

/// There are limits.
const LIMITED: u8 = 1;
/// Its content is not [`Content::Written`].
const UNWRITTEN: u8 = 2;

/// The controls of one volume.
#[derive(Debug)]
pub struct Controls {
    /// Which of the above hold: a request looks at this alone where none does.
    heed: AtomicU8,
    limiter: RateLimiter,
    state: Mutex<State>,
    /// What the limiter's time is counted from.
    began: Instant,
}

#[derive(Debug)]
struct State {
    limits: VolumeLimits,
    content: Content,
}

impl Controls {
    /// Those of a volume with such limits and content.
    pub fn new(limits: VolumeLimits, content: Content) -> Self {
        Self::counting_from(Instant::now(), limits, content)
    }

    /// The same, with the time at which nothing is used of the limits yet, and nothing saved up.
    pub fn counting_from(began: Instant, limits: VolumeLimits, content: Content) -> Self {
        let controls = Self {
            heed: AtomicU8::new(0),
            limiter: RateLimiter::default(),
            state: Mutex::new(State { limits, content }),
            began,
        };
        controls.limiter.set(&limits, 0);
        controls.notice(&controls.state());
        controls
    }

    /// Whether a request has to ask for anything at all.
    pub fn is_free(&self) -> bool {
        self.heed.load(Ordering::Acquire) == 0
    }

    /// Whether requests have to ask for their turn.
    pub fn is_limited(&self) -> bool {
        self.heed.load(Ordering::Acquire) & LIMITED != 0
    }

    /// Whether the volume has to be marked as written before a WRITE or WRITE_ZEROES on this attachment begins (`None`: by its name).
    pub fn wants_mark(&self, attachment_id: Option<Uuid>) -> bool {
        let is_unwritten = self.heed.load(Ordering::Acquire) & UNWRITTEN != 0;
        is_unwritten
            && match self.state().content {
                Content::NeverWritten => true,
                Content::Initialising { attachment_id: by } => Some(by) != attachment_id,
                Content::Written => false,
            }
    }

    /// Whether the request may begin; if not, when to ask again.
    pub fn turn(&self, waiting: &mut Waiting, now: Instant) -> Option<Instant> {
        match self.limiter.turn(waiting, self.nanos(now)) {
            Turn::Begin => None,
            Turn::At(at_ns) => Some(self.began + Duration::from_nanos(at_ns)),
        }
    }

    /// The limiter, for what does not need the time.
    pub fn limiter(&self) -> &RateLimiter {
        &self.limiter
    }

    fn set_limits(&self, limits: VolumeLimits) {
        let mut state = self.state();
        // The same again takes nothing from anybody.
        if state.limits != limits {
            state.limits = limits;
            self.limiter.set(&limits, self.nanos(Instant::now()));
            self.notice(&state);
        }
    }

    fn set_content(&self, content: Content) {
        let mut state = self.state();
        state.content = content;
        self.notice(&state);
    }

    fn notice(&self, state: &State) {
        let limited = if self.limiter.is_limited() { LIMITED } else { 0 };
        let unwritten = if state.content == Content::Written { 0 } else { UNWRITTEN };
        self.heed.store(limited | unwritten, Ordering::Release);
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.began).as_nanos()).unwrap_or(u64::MAX)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Controls {
    /// Nothing to heed.
    fn default() -> Self {
        Self::new(VolumeLimits::default(), Content::Written)
    }
}

/// The controls of all volumes.
#[derive(Debug, Default)]
pub struct AllControls(Mutex<HashMap<Uuid, Arc<Controls>>>);

impl AllControls {
    /// A volume's, as they are kept here; or, the first time, as the catalog has them.
    pub fn of(&self, volume: &VolumeRecord) -> Arc<Controls> {
        let settings = &volume.settings;
        let new = || Arc::new(Controls::new(settings.limits, settings.content));
        Arc::clone(self.all().entry(volume.volume_uid).or_insert_with(new))
    }

    /// The catalog has other limits now.
    pub fn set_limits(&self, volume: &VolumeRecord) {
        self.of(volume).set_limits(volume.settings.limits);
    }

    /// The catalog has another content now.
    pub fn set_content(&self, volume: &VolumeRecord) {
        self.of(volume).set_content(volume.settings.content);
    }

    /// The catalog has a volume as written now.
    pub fn marked_written(&self, volume_uid: Uuid) {
        if let Some(controls) = self.all().get(&volume_uid) {
            controls.set_content(Content::Written);
        }
    }

    /// For how long connections of a volume were held back by its limits, together, since the server's start.
    pub fn throttled(&self, volume_uid: Uuid) -> Duration {
        self.all().get(&volume_uid).map_or(Duration::ZERO, |controls| controls.limiter.throttled())
    }

    /// The volume is closed, and will be as the catalog has it when it is opened again.
    pub fn forget(&self, volume_uid: Uuid) {
        self.all().remove(&volume_uid);
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Controls>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_volume_with_a_limit_or_of_unwritten_content_has_its_requests_ask() {
        let controls = Controls::default();
        assert!(controls.is_free());
        controls.set_limits(VolumeLimits { write_iops: 7, ..VolumeLimits::default() });
        assert!(!controls.is_free() && controls.is_limited() && !controls.wants_mark(None));
        controls.set_limits(VolumeLimits { burst_seconds: 7, ..VolumeLimits::default() });
        assert!(controls.is_free(), "a burst alone is no limit");
    }

    #[test]
    fn who_formats_a_volume_does_not_mark_it_and_everybody_else_does() {
        let holder = Uuid::from_u128(1);
        let controls = Controls::new(VolumeLimits::default(), Content::NeverWritten);
        assert!(!controls.is_free() && !controls.is_limited());
        assert!(controls.wants_mark(Some(holder)) && controls.wants_mark(None));
        controls.set_content(Content::Initialising { attachment_id: holder });
        assert!(!controls.wants_mark(Some(holder)));
        assert!(controls.wants_mark(None) && controls.wants_mark(Some(Uuid::from_u128(2))));
        controls.set_content(Content::Written);
        assert!(controls.is_free() && !controls.wants_mark(None));
    }
}
