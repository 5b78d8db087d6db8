//! Bytes that tell where they belong: every eight of them are made from their offset and a seed.
//!
//! Used by `connection` when a server has to prove that it stores what it is given. A block that landed elsewhere, an old one
//! and a torn one all differ from what is expected.

/// Fills `block`, which begins at `offset_bytes` (a multiple of 8) of the export.
pub(super) fn fill(block: &mut [u8], offset_bytes: u64, seed: u64) {
    for (index, bytes) in block.chunks_mut(8).enumerate() {
        let word = mixed((offset_bytes / 8 + index as u64) ^ seed).to_le_bytes();
        bytes.copy_from_slice(&word[..bytes.len()]);
    }
}

/// Whether `block` is what [`fill`] makes.
pub(super) fn is_at(block: &[u8], offset_bytes: u64, seed: u64) -> bool {
    block.chunks(8).enumerate().all(|(index, bytes)| {
        let word = mixed((offset_bytes / 8 + index as u64) ^ seed).to_le_bytes();
        *bytes == word[..bytes.len()]
    })
}

/// The finalizer of splitmix64: neighbours have nothing in common.
fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_recognised_at_its_own_place_with_its_own_seed_only() {
        let mut block = [0; 4096];
        fill(&mut block, 8192, 7);
        assert!(is_at(&block, 8192, 7));
        assert!(!is_at(&block, 4096, 7) && !is_at(&block, 8192, 8));
        block[4095] ^= 1;
        assert!(!is_at(&block, 8192, 7));
    }
}
