//! `base:allocation`: extents as the server tells them, and which contexts a BLOCK_STATUS asks for.
//!
//! Used by the server's `block_status.rs` (finds extents, encodes them) and `server/src/session.rs` (decodes a request's payload).
//! Knows nothing of files. Invariants of what [`AllocationExtents`] holds: extents follow each other from the request's
//! offset on, none is empty, neighbours differ, and together they never reach past the request's end; so REQ_ONE and
//! 32-bit lengths hold by construction. Source: NBD `doc/proto.md`, "The `base:` metadata namespace".

use super::HeaderStyle;
use super::wire::{be_u32, be_u64};

/// The name of the only metadata context there is.
pub const ALLOCATION_CONTEXT: &str = "base:allocation";
/// Its id in replies; any number would do.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;
/// Bytes of a BLOCK_STATUS's payload that names one context: the effect length and the id.
pub const STATUS_PAYLOAD_BYTES: usize = 12;

/// What is known of an extent (`NBD_STATE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentState(pub u32);

impl ExtentState {
    /// Allocated, content not known.
    pub const DATA: Self = Self(0);
    /// Allocated (preallocated), reads as zeroes.
    pub const ALLOCATED_ZEROES: Self = Self(1 << 1);
    /// Not allocated, reads as zeroes.
    pub const HOLE: Self = Self(1 << 0 | 1 << 1);
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
pub struct AllocationExtents {
    extents: Vec<Extent>,
    count_max: usize,
    remaining_bytes: u64,
}

impl AllocationExtents {
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
    pub fn encode(&self, headers: HeaderStyle) -> Vec<u8> {
        let mut payload = ALLOCATION_CONTEXT_ID.to_be_bytes().to_vec();
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

/// How many extents a chunk's payload of `payload_bytes` holds.
pub const fn extents_in(payload_bytes: usize, headers: HeaderStyle) -> usize {
    match headers {
        HeaderStyle::Simple | HeaderStyle::Structured => (payload_bytes - 4) / 8,
        HeaderStyle::Extended => (payload_bytes - 8) / 16,
    }
}

/// A BLOCK_STATUS's payload: for how much of the export, and for which context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusPayload {
    /// The effect length, in bytes.
    pub effect_bytes: u64,
    /// The context.
    pub context_id: u32,
}

impl StatusPayload {
    /// Reads it off the wire.
    pub fn decode(wire: &[u8; STATUS_PAYLOAD_BYTES]) -> Self {
        Self { effect_bytes: be_u64(wire, 0), context_id: be_u32(wire, 8) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(length_bytes: u64, count_max: usize, runs: &[(u64, ExtentState)]) -> AllocationExtents {
        let mut extents = AllocationExtents::new(length_bytes, count_max);
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
        assert_eq!(found.encode(HeaderStyle::Structured), compact);
        assert_eq!(extents_in(compact.len(), HeaderStyle::Structured), 2);
        let extended = [
            0, 0, 0, 1, 0, 0, 0, 2, // id, count
            0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, // data
            0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 3, // hole
        ];
        assert_eq!(found.encode(HeaderStyle::Extended), extended);
        assert_eq!(extents_in(extended.len(), HeaderStyle::Extended), 2);
    }

    #[test]
    fn status_payload_has_the_specified_layout() {
        let wire = [0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 7];
        let payload = StatusPayload { effect_bytes: 0x0100_0000_0002, context_id: 7 };
        assert_eq!(StatusPayload::decode(&wire), payload);
    }
}
