//! The sizes of payload buffers, and how many of each a ring has for the memory that there is.
//!
//! Plain numbers. Used by `limits.rs`, which adds up, and `buffers.rs`, which makes them.

/// Sizes in bytes and how many there are of each, for each ring. The largest is the announced maximum block size. Of the small
/// classes half is enough for eight 4 KiB requests, two of 16 KiB and one of 64 KiB on each of 512 connections, so that a
/// thousand of them on two rings lose nothing by others that stand still; of the large ones there are fewer, because their
/// transfer takes longer than their turn-around. With less memory ([`PoolSize::within`]) there are fewer of each.
pub(crate) const CLASSES: [(usize, usize); 7] = [
    (4 << 10, 8192),
    (16 << 10, 2048),
    (64 << 10, 1024),
    (256 << 10, 192),
    (1 << 20, 64),
    (4 << 20, 16),
    (32 << 20, 4),
];

/// How many of the classes are the small ones.
const SMALL_CLASSES: usize = 3;

/// How many buffers of each class a ring has. They become resident only as they are first used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolSize {
    pub(crate) counts: [usize; CLASSES.len()],
}

impl PoolSize {
    /// As many as are of use, for requests of up to `request_bytes_max`.
    pub fn full(request_bytes_max: u32) -> Self {
        Self { counts: CLASSES.map(|(_, count)| count) }.without_classes_above(request_bytes_max)
    }

    /// One of each, for requests of up to `request_bytes_max`.
    pub fn smallest(request_bytes_max: u32) -> Self {
        Self { counts: [1; CLASSES.len()] }.without_classes_above(request_bytes_max)
    }

    /// As many as `bytes_max` allows: half of the room for the small classes, of which every connection is to have several,
    /// and the rest for the large ones, each in the proportion of a full pool. `None` where it does not allow one of each.
    pub fn within(bytes_max: u64, request_bytes_max: u32) -> Option<Self> {
        let (full, smallest) = (Self::full(request_bytes_max), Self::smallest(request_bytes_max));
        let room_bytes = bytes_max.checked_sub(smallest.bytes())?;
        let wanted_bytes = |classes: std::ops::Range<usize>| -> u64 {
            classes.map(|class| (full.counts[class].saturating_sub(1) * CLASSES[class].0) as u64).sum()
        };
        let (small_bytes, large_bytes) =
            (wanted_bytes(0..SMALL_CLASSES), wanted_bytes(SMALL_CLASSES..CLASSES.len()));
        let small_room_bytes = small_bytes.min((room_bytes / 2).max(room_bytes.saturating_sub(large_bytes)));
        let large_room_bytes = large_bytes.min(room_bytes - small_room_bytes);
        let mut counts = full.counts;
        for (class, count) in counts.iter_mut().enumerate().filter(|(_, count)| **count > 1) {
            let (room_bytes, wanted_bytes) = if class < SMALL_CLASSES {
                (small_room_bytes, small_bytes)
            } else {
                (large_room_bytes, large_bytes)
            };
            // Rounded down, so the sum stays within the room.
            let more = (*count as u128 - 1) * u128::from(room_bytes) / u128::from(wanted_bytes);
            *count = 1 + more as usize;
        }
        Some(Self { counts })
    }

    /// The sum, in bytes.
    pub fn bytes(&self) -> u64 {
        CLASSES.iter().zip(self.counts).map(|((bytes, _), count)| (bytes * count) as u64).sum()
    }

    /// No request needs a class behind the first that holds the longest one.
    fn without_classes_above(mut self, request_bytes_max: u32) -> Self {
        let needed = CLASSES.iter().position(|(bytes, _)| *bytes >= request_bytes_max as usize);
        for count in self.counts.iter_mut().skip(needed.map_or(CLASSES.len(), |last| last + 1)) {
            *count = 0;
        }
        self
    }
}
