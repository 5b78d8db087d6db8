//! What is in a chunk of an image: its digest, and which of its blocks are zeroes.
//!
//! Owns the unit in which images are copied, and the digest of a whole image: the BLAKE3 of the BLAKE3 digests of its chunks, one
//! after the other. It can be gathered from chunks that come in any order, goes on after an interruption, and costs nothing for holes.
//! `split -b 1M --filter='b3sum --raw' IMAGE | b3sum` gives the same. No I/O.

use std::ops::Range;
use std::sync::LazyLock;

use crate::image::CHUNK_BYTES;

/// Shorter runs of zeroes are written as data: a request costs more than they do.
const RUN_BYTES: usize = 32 << 10;

/// The BLAKE3 digest of a chunk.
pub type Digest = [u8; 32];

/// Stands for the digest of a chunk that nobody has read: one that has not changed.
pub const UNREAD: Digest = [0; 32];

static ZERO_CHUNK: LazyLock<Digest> = LazyLock::new(|| digest(&vec![0; CHUNK_BYTES as usize]));

/// What was found in a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkContent {
    /// Of all its bytes.
    pub digest: Digest,
    /// Where data is, in bytes from the chunk's beginning: in order, and not adjacent. The rest is zeroes.
    pub data: Vec<Range<usize>>,
}

/// Looks at a chunk's bytes.
pub fn look_at(bytes: &[u8]) -> ChunkContent {
    let mut data: Vec<Range<usize>> = Vec::new();
    for (index, run) in bytes.chunks(RUN_BYTES).enumerate() {
        if is_zero(run) {
            continue;
        }
        let start = index * RUN_BYTES;
        match data.last_mut() {
            Some(last) if last.end == start => last.end += run.len(),
            _ => data.push(start..start + run.len()),
        }
    }
    let digest = if data.is_empty() { zero_digest(bytes.len() as u64) } else { digest(bytes) };
    ChunkContent { digest, data }
}

/// What lies between the data of a chunk of so many bytes: where zeroes are.
pub fn zeroes_between(data: &[Range<usize>], length_bytes: usize) -> Vec<Range<usize>> {
    let ends = data.iter().map(|run| run.start).chain([length_bytes]);
    let starts = [0].into_iter().chain(data.iter().map(|run| run.end));
    starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| start..end).collect()
}

/// The digest of so many zeroes, at most a chunk's.
pub fn zero_digest(length_bytes: u64) -> Digest {
    if length_bytes == CHUNK_BYTES { *ZERO_CHUNK } else { digest(&vec![0; length_bytes as usize]) }
}

/// The digest of a chunk's bytes.
pub fn digest(bytes: &[u8]) -> Digest {
    *blake3::hash(bytes).as_bytes()
}

fn is_zero(bytes: &[u8]) -> bool {
    // Sixteen bytes at a time, which the compiler makes vectors of.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// The digest of a whole image, chunk by chunk.
#[derive(Debug, Default)]
pub struct ImageDigest(blake3::Hasher);

impl ImageDigest {
    /// Goes on with chunks of one digest, so many of them.
    pub fn add(&mut self, count: u64, digest: &Digest) {
        for _ in 0..count {
            self.0.update(digest);
        }
    }

    /// Of all that was added, in hexadecimal.
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_found_in_data_and_short_ones_are_left_there() {
        let mut bytes = vec![0u8; 4 * RUN_BYTES + 100];
        assert!(look_at(&bytes).data.is_empty());
        assert_eq!(look_at(&bytes).digest, digest(&bytes));
        bytes[RUN_BYTES] = 1;
        bytes[3 * RUN_BYTES - 1] = 1;
        bytes[4 * RUN_BYTES + 99] = 1;
        let content = look_at(&bytes);
        assert_eq!(content.data, [RUN_BYTES..3 * RUN_BYTES, 4 * RUN_BYTES..4 * RUN_BYTES + 100]);
        assert_eq!(content.digest, digest(&bytes));
        let zeroes = zeroes_between(&content.data, bytes.len());
        assert_eq!(zeroes, [0..RUN_BYTES, 3 * RUN_BYTES..4 * RUN_BYTES]);
        assert_eq!(zeroes_between(&[], 7), vec![Range { start: 0, end: 7 }]);
        assert!(zeroes_between(&[Range { start: 0, end: 7 }], 7).is_empty());
    }

    #[test]
    fn an_images_digest_is_that_of_its_chunks_digests() {
        let chunk = vec![7u8; CHUNK_BYTES as usize];
        let tail = [1u8; 10];
        let mut image = ImageDigest::default();
        image.add(2, &zero_digest(CHUNK_BYTES));
        image.add(1, &digest(&chunk));
        image.add(1, &digest(&tail));
        let zeroes = digest(&vec![0; CHUNK_BYTES as usize]);
        let expected = blake3::hash(&[zeroes, zeroes, digest(&chunk), digest(&tail)].concat());
        assert_eq!(image.finish(), expected.to_hex().to_string());
    }
}
