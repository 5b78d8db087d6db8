//! How full the volumes' file system is: told before it matters, and remembered for whoever asks.
//!
//! Owns: the thresholds, and the last look. Never: refuses anything; see `snapshots.rs` for the reserve. [`SpaceLevel::of`] is pure.
//! Called by: `serve.rs` (looks from time to time), `management/` (asks).

use std::sync::{Arc, Mutex, PoisonError};

use super::snapshot_error::reserve_bytes;
use super::{DataSide, Lifecycle};
use crate::catalog::Space;

/// With less, writes to volumes end with ENOSPC about now.
const FULL_BYTES: u64 = 16 << 20;

/// How full a file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpaceLevel {
    /// Enough is free.
    Enough,
    /// Less than a tenth is free, or than twice the reserve.
    Low,
    /// Less is free than the reserve: new snapshots and clones are refused.
    BelowReserve,
    /// Next to nothing is free: writes to volumes fail.
    Full,
}

impl SpaceLevel {
    /// Of a file system with that reserve in bytes, which was at `before` at the last look: it is better again when a tenth more is
    /// free than where it became worse.
    pub fn of(space: Space, reserve_bytes: u64, before: Option<Self>) -> Self {
        let low_bytes = (reserve_bytes * 2).max(space.total_bytes / 10);
        let levels = [
            (Self::Full, FULL_BYTES.min(low_bytes)),
            (Self::BelowReserve, reserve_bytes),
            (Self::Low, low_bytes),
        ];
        let is_at = |(level, below_bytes): &&(Self, u64)| {
            let was_at = before.is_some_and(|before| before >= *level);
            let bound = if was_at { below_bytes + below_bytes / 10 } else { *below_bytes };
            space.free_bytes < bound
        };
        levels.iter().find(is_at).map_or(Self::Enough, |(level, _)| *level)
    }
}

/// What was found at the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StorageSpace {
    /// What there is.
    pub space: Space,
    /// What is kept from snapshots and clones, in bytes.
    pub reserve_bytes: u64,
    /// How full that is.
    pub level: SpaceLevel,
}

/// The last look; clones are of the same.
pub(super) type SpaceSeen = Arc<Mutex<Option<StorageSpace>>>;

impl<D: DataSide> Lifecycle<D> {
    /// Looks how full the volumes' file system is, and tells where that has changed. Blocks.
    pub fn look_at_space(&self) {
        let Some(space) = self.catalog.volumes_space() else { return };
        let reserve_bytes = reserve_bytes(space.total_bytes, self.snapshot_reserve);
        let before = self.storage_space().map(|seen| seen.level);
        let level = SpaceLevel::of(space, reserve_bytes, before);
        *self.space_seen.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(StorageSpace { space, reserve_bytes, level });
        if before.unwrap_or(SpaceLevel::Enough) != level {
            tell(space, reserve_bytes, level);
        }
    }

    /// How full it was at the last look; `None`: that is not known.
    pub fn storage_space(&self) -> Option<StorageSpace> {
        *self.space_seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tell(space: Space, reserve_bytes: u64, level: SpaceLevel) {
    let mib = |bytes: u64| bytes >> 20;
    let (free_mib, total_mib, reserve_mib) =
        (mib(space.free_bytes), mib(space.total_bytes), mib(reserve_bytes));
    match level {
        SpaceLevel::Enough => {
            tracing::info!(free_mib, total_mib, "the volumes' file system has enough space again");
        }
        SpaceLevel::Low => tracing::warn!(
            free_mib,
            total_mib,
            reserve_mib,
            "the volumes' file system is nearly full: delete snapshots or volumes, or make it larger"
        ),
        SpaceLevel::BelowReserve => tracing::error!(
            free_mib,
            total_mib,
            reserve_mib,
            "the volumes' file system has less space than the reserve: new snapshots and clones are refused; delete snapshots or \
             volumes, or make it larger"
        ),
        SpaceLevel::Full => tracing::error!(
            free_mib,
            total_mib,
            "the volumes' file system is full: writes to volumes fail; delete snapshots or volumes, or make it larger"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn level(free_bytes: u64, before: Option<SpaceLevel>) -> SpaceLevel {
        SpaceLevel::of(Space { free_bytes, total_bytes: 100 * GIB }, 5 * GIB, before)
    }

    #[test]
    fn each_threshold_is_a_level() {
        assert_eq!(level(10 * GIB, None), SpaceLevel::Enough);
        assert_eq!(level(10 * GIB - 1, None), SpaceLevel::Low);
        assert_eq!(level(5 * GIB - 1, None), SpaceLevel::BelowReserve);
        assert_eq!(level(FULL_BYTES - 1, None), SpaceLevel::Full);
        let without_reserve = |free_bytes| SpaceLevel::of(Space { free_bytes, total_bytes: GIB }, 0, None);
        assert_eq!(without_reserve(GIB / 10 - 1), SpaceLevel::Low);
        assert_eq!(without_reserve(0), SpaceLevel::Full);
        assert_eq!(SpaceLevel::of(Space { free_bytes: 9, total_bytes: 10 }, 0, None), SpaceLevel::Enough);
    }

    #[test]
    fn what_moves_to_and_fro_at_a_threshold_is_told_once() {
        let (mut before, mut told) = (None, 0);
        for free_bytes in [11 * GIB, 10 * GIB - 1, 10 * GIB + 1, 10 * GIB - 1, 10 * GIB + 1, 11 * GIB] {
            let now = level(free_bytes, before);
            told += u32::from(before.is_some_and(|before| before != now));
            before = Some(now);
        }
        assert_eq!((told, before), (2, Some(SpaceLevel::Enough)));
        assert_eq!(level(5 * GIB + 1, Some(SpaceLevel::Full)), SpaceLevel::BelowReserve);
    }
}
