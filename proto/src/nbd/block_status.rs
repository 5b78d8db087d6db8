//! Metadata contexts: extents as the server tells them, and which contexts a BLOCK_STATUS asks for.
//!
//! Used by the server's `block_status.rs` (finds extents, encodes them) and `server/src/data/session.rs` (decodes a request's payload).
//! Knows nothing of files. Invariants of what [`StatusExtents`] holds: extents follow each other from the request's
//! offset on, none is empty, neighbours differ, and together they never reach past the request's end; so REQ_ONE and
//! 32-bit lengths hold by construction. Sources: NBD `doc/proto.md`, "The `base:` metadata namespace"; QEMU `docs/interop/nbd.rst`.

use super::HeaderStyle;
use super::wire::{be_u32, be_u64};

/// The name of the metadata context that says what is allocated.
pub const ALLOCATION_CONTEXT: &str = "base:allocation";
/// Its id in replies; any number would do.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;
/// What the name of a context begins with that says what is dirty; the bitmap's name follows.
pub const DIRTY_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";
/// Its id in replies; those of further bitmaps follow.
const FIRST_BITMAP_ID: u32 = ALLOCATION_CONTEXT_ID + 1;
/// Bitmaps that one client may select at once.
pub const BITMAPS_MAX: usize = 3;
/// Contexts at most in one reply.
pub const CONTEXTS_MAX: usize = 1 + BITMAPS_MAX;
/// Bytes of the effect length, which a BLOCK_STATUS's payload begins with.
const EFFECT_BYTES: usize = 8;
/// Bytes of a payload that names as many contexts as there can be.
pub const STATUS_PAYLOAD_BYTES_MAX: usize = EFFECT_BYTES + 4 * CONTEXTS_MAX;

/// Metadata contexts, selected in the handshake or asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contexts(u8);

impl Contexts {
    /// None.
    pub const NONE: Self = Self(0);
    /// `base:allocation`.
    pub const ALLOCATION: Self = Self(1);

    /// With the first so many bitmaps, at most [`BITMAPS_MAX`].
    #[must_use]
    pub const fn with_bitmaps(self, count: usize) -> Self {
        let count = if count < BITMAPS_MAX { count } else { BITMAPS_MAX };
        Self(self.0 | ((1 << count) - 1) << 1)
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The bitmaps among them.
    #[must_use]
    pub const fn without_allocation(self) -> Self {
        Self(self.0 & !Self::ALLOCATION.0)
    }

    /// How many there are.
    pub const fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Their ids, in order.
    pub fn ids(self) -> impl Iterator<Item = u32> {
        (ALLOCATION_CONTEXT_ID..FIRST_BITMAP_ID + BITMAPS_MAX as u32).filter(move |id| self.has(*id))
    }

    fn has(self, id: u32) -> bool {
        (1..=CONTEXTS_MAX as u32).contains(&id) && self.0 & 1 << (id - 1) != 0
    }
}

/// The id of a bitmap, by its place among those that were selected.
pub const fn bitmap_id(index: usize) -> u32 {
    FIRST_BITMAP_ID + index as u32
}

/// Which bitmap has that id; `None`: it is another context's.
pub fn bitmap_index(id: u32) -> Option<usize> {
    id.checked_sub(FIRST_BITMAP_ID).map(|index| index as usize)
}

/// What is known of an extent: in `base:allocation` (`NBD_STATE_*`), or in a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentState(pub u32);

impl ExtentState {
    /// Allocated, content not known.
    pub const DATA: Self = Self(0);
    /// Allocated (preallocated), reads as zeroes.
    pub const ALLOCATED_ZEROES: Self = Self(1 << 1);
    /// Not allocated, reads as zeroes.
    pub const HOLE: Self = Self(1 << 0 | 1 << 1);
    /// Of a bitmap: may have changed.
    pub const DIRTY: Self = Self(1 << 0);
    /// Of a bitmap: has not changed.
    pub const CLEAN: Self = Self(0);
}

/// A run of bytes in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length, not 0.
    pub length_bytes: u64,
    /// Its state.
    pub state: ExtentState,
}

/// The extents of one reply, as they are found.
#[derive(Debug)]
pub struct StatusExtents {
    extents: Vec<Extent>,
    count_max: usize,
    remaining_bytes: u64,
}

impl StatusExtents {
    /// None yet; at most `count_max` (not 0) over `length_bytes`.
    pub fn new(length_bytes: u64, count_max: usize) -> Self {
        Self { extents: Vec::new(), count_max: count_max.max(1), remaining_bytes: length_bytes }
    }

    /// Adds the next run, as far as it is asked for. False: nothing more is wanted.
    pub fn push(&mut self, length_bytes: u64, state: ExtentState) -> bool {
        let length_bytes = length_bytes.min(self.remaining_bytes);
        if length_bytes == 0 {
            return self.remaining_bytes > 0;
        }
        let is_full = self.extents.len() == self.count_max;
        match self.extents.last_mut() {
            Some(last) if last.state == state => last.length_bytes += length_bytes,
            _ if is_full => return false,
            _ => self.extents.push(Extent { length_bytes, state }),
        }
        self.remaining_bytes -= length_bytes;
        self.remaining_bytes > 0
    }

    /// What was found.
    pub fn as_slice(&self) -> &[Extent] {
        &self.extents
    }

    /// A chunk's payload: the context's id, and for each extent its length and state.
    pub fn encode(&self, context_id: u32, headers: HeaderStyle) -> Vec<u8> {
        let mut payload = context_id.to_be_bytes().to_vec();
        if headers == HeaderStyle::Extended {
            payload.extend_from_slice(&(self.extents.len() as u32).to_be_bytes());
        }
        for Extent { length_bytes, state } in &self.extents {
            if headers == HeaderStyle::Extended {
                payload.extend_from_slice(&length_bytes.to_be_bytes());
                payload.extend_from_slice(&u64::from(state.0).to_be_bytes());
            } else {
                // Never cuts anything off: a compact request's length has 32 bits, and no extent reaches past its end.
                payload.extend_from_slice(&(*length_bytes as u32).to_be_bytes());
                payload.extend_from_slice(&state.0.to_be_bytes());
            }
        }
        payload
    }
}

/// Reads the payload of a chunk BLOCK_STATUS, as a client does: the context's number, and the extents. `None`: it is none.
pub fn decode_extents(payload: &[u8]) -> Option<(u32, Vec<Extent>)> {
    let (context_id, extents) = payload.split_first_chunk::<4>()?;
    let (extents, rest) = extents.as_chunks::<8>();
    let extent = |wire: &[u8; 8]| {
        let length_bytes = u64::from(be_u32(wire, 0));
        (length_bytes > 0).then(|| Extent { length_bytes, state: ExtentState(be_u32(wire, 4)) })
    };
    let extents: Vec<Extent> = extents.iter().map(extent).collect::<Option<_>>()?;
    (rest.is_empty() && !extents.is_empty()).then_some((u32::from_be_bytes(*context_id), extents))
}

/// How many extents a chunk's payload of `payload_bytes` holds.
pub const fn extents_in(payload_bytes: usize, headers: HeaderStyle) -> usize {
    match headers {
        HeaderStyle::Simple | HeaderStyle::Structured => (payload_bytes - 4) / 8,
        HeaderStyle::Extended => (payload_bytes - 8) / 16,
    }
}

/// A BLOCK_STATUS's payload: for how much of the export, and for which contexts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusPayload {
    /// The effect length, in bytes.
    pub effect_bytes: u64,
    /// The contexts; `None`: some of them are none that could have been selected, or are named twice.
    contexts: Option<Contexts>,
}

impl StatusPayload {
    /// Whether a payload of that length can be one that names contexts.
    pub const fn is_length(payload_bytes: usize) -> bool {
        payload_bytes > EFFECT_BYTES
            && payload_bytes <= STATUS_PAYLOAD_BYTES_MAX
            && payload_bytes.is_multiple_of(4)
    }

    /// Reads it off the wire; `None`: it has no such length.
    pub fn decode(wire: &[u8]) -> Option<Self> {
        if !Self::is_length(wire.len()) {
            return None;
        }
        let mut contexts = Some(Contexts::NONE);
        for id in wire[EFFECT_BYTES..].chunks_exact(4).map(|id| be_u32(id, 0)) {
            let is_one = (1..=CONTEXTS_MAX as u32).contains(&id);
            contexts = contexts
                .filter(|before| is_one && !before.has(id))
                .map(|contexts| Contexts(contexts.0 | 1 << (id - 1)));
        }
        Some(Self { effect_bytes: be_u64(wire, 0), contexts })
    }

    /// The contexts, where all of them were selected.
    pub fn of_selected(&self, selected: Contexts) -> Option<Contexts> {
        self.contexts.filter(|contexts| contexts.0 & !selected.0 == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(length_bytes: u64, count_max: usize, runs: &[(u64, ExtentState)]) -> StatusExtents {
        let mut extents = StatusExtents::new(length_bytes, count_max);
        for (length_bytes, state) in runs {
            if !extents.push(*length_bytes, *state) {
                break;
            }
        }
        extents
    }

    const RUNS: [(u64, ExtentState); 4] = [
        (4096, ExtentState::DATA),
        (4096, ExtentState::DATA),
        (65536, ExtentState::HOLE),
        (1 << 40, ExtentState::ALLOCATED_ZEROES),
    ];

    #[test]
    fn runs_of_one_state_are_one_extent_and_never_pass_the_end() {
        let found = extents(8192 + 65536 + 512, 100, &RUNS);
        let expected = [
            Extent { length_bytes: 8192, state: ExtentState::DATA },
            Extent { length_bytes: 65536, state: ExtentState::HOLE },
            Extent { length_bytes: 512, state: ExtentState::ALLOCATED_ZEROES },
        ];
        assert_eq!(found.as_slice(), expected);
    }

    #[test]
    fn no_more_extents_than_wanted() {
        let found = extents(1 << 30, 1, &RUNS);
        assert_eq!(found.as_slice(), [Extent { length_bytes: 8192, state: ExtentState::DATA }]);
        let exact = extents(1000, 1, &RUNS);
        assert_eq!(exact.as_slice(), [Extent { length_bytes: 1000, state: ExtentState::DATA }]);
    }

    #[test]
    fn block_status_payloads_have_the_specified_layout() {
        let found = extents(8192 + 512, 100, &RUNS);
        let compact = [0, 0, 0, 1, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3];
        assert_eq!(found.encode(1, HeaderStyle::Structured), compact);
        assert_eq!(extents_in(compact.len(), HeaderStyle::Structured), 2);
        assert_eq!(decode_extents(&compact), Some((1, found.as_slice().to_vec())));
        for torn in [0, 3, 4, 11, 19] {
            assert_eq!(decode_extents(&compact[..torn]), None, "{torn}");
        }
        assert_eq!(decode_extents(&[0; 12]), None, "an extent of no length");
        let extended = [
            0, 0, 0, 1, 0, 0, 0, 2, // id, count
            0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, // data
            0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 3, // hole
        ];
        assert_eq!(found.encode(1, HeaderStyle::Extended), extended);
        assert_eq!(extents_in(extended.len(), HeaderStyle::Extended), 2);
    }

    #[test]
    fn status_payload_has_the_specified_layout() {
        let wire = [0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3];
        let payload = StatusPayload::decode(&wire).unwrap();
        assert_eq!(payload.effect_bytes, 0x0100_0000_0002);
        let selected = Contexts::ALLOCATION.with_bitmaps(2);
        let contexts = payload.of_selected(selected).unwrap();
        assert_eq!(contexts.ids().collect::<Vec<_>>(), [1, 3]);
        assert_eq!(payload.of_selected(Contexts::ALLOCATION.with_bitmaps(1)), None, "3 was not selected");
        for unknown in [0, 5, 0x0100_0001, u32::MAX] {
            let wire = [&wire[..12], &u32::to_be_bytes(unknown)].concat();
            assert_eq!(StatusPayload::decode(&wire).unwrap().of_selected(selected.with_bitmaps(3)), None);
        }
        let twice = [&wire[..12], &wire[8..12]].concat();
        assert_eq!(StatusPayload::decode(&twice).unwrap().of_selected(selected), None);
        for length in [0, 8, 11, 13, STATUS_PAYLOAD_BYTES_MAX + 4] {
            assert_eq!(StatusPayload::decode(&vec![0; length]), None, "{length} bytes");
        }
    }

    #[test]
    fn contexts_have_ids_of_their_own() {
        let all = Contexts::ALLOCATION.with_bitmaps(BITMAPS_MAX + 1);
        assert_eq!((all.count(), all.ids().collect::<Vec<_>>()), (CONTEXTS_MAX, vec![1, 2, 3, 4]));
        assert_eq!(Contexts::NONE.with_bitmaps(2).ids().collect::<Vec<_>>(), [bitmap_id(0), bitmap_id(1)]);
        assert_eq!((bitmap_index(bitmap_id(2)), bitmap_index(ALLOCATION_CONTEXT_ID)), (Some(2), None));
        assert!(Contexts::NONE.is_empty() && !all.is_empty());
    }
}
