//! Sizes: the range that CSI asks for, and the size that a volume gets.
//!
//! Owns the rules: the least multiple of [`GRANULE`] that is in the range; and of an encrypted volume CSI knows the clear disk, which is
//! smaller than the volume by the header of LUKS. Never: does I/O.

use proto::csi::v1;

use proto::passphrase::LUKS_HEADER_BYTES;

use super::refusal::Refusal;

/// Sizes are multiples of so many bytes.
pub(super) const GRANULE: u64 = 4096;
/// In bytes, where the caller asks for no size.
pub(super) const DEFAULT_BYTES: u64 = 1 << 30;
/// The kernel's and the server's sizes are signed 64 bits.
const BYTES_MAX: u64 = i64::MAX as u64 / GRANULE * GRANULE;

/// The size to ask the server for, in bytes.
///
/// # Errors
/// OUT_OF_RANGE: with the header there is no such size.
pub(super) fn on_server(clear_bytes: u64, is_encrypted: bool) -> Result<u64, Refusal> {
    let whole = clear_bytes.checked_add(header_bytes(is_encrypted)).filter(|whole| *whole <= BYTES_MAX);
    whole.ok_or_else(|| {
        Refusal::out_of_range(format!(
            "{clear_bytes} bytes and the header of LUKS are too many: at most {BYTES_MAX}"
        ))
    })
}

/// What CSI is told of a size of the server's, in bytes: so much can be written.
pub(super) fn clear(server_bytes: u64, is_encrypted: bool) -> u64 {
    server_bytes.saturating_sub(header_bytes(is_encrypted))
}

fn header_bytes(is_encrypted: bool) -> u64 {
    if is_encrypted { LUKS_HEADER_BYTES } else { 0 }
}

/// A size that is wanted, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct SizeRange {
    /// 0: any.
    pub(super) at_least: u64,
    /// `None`: any.
    pub(super) at_most: Option<u64>,
}

impl SizeRange {
    /// # Errors
    /// INVALID_ARGUMENT: a negative number, or a bound below the other one.
    pub(super) fn of(range: Option<&v1::CapacityRange>) -> Result<Self, Refusal> {
        let v1::CapacityRange { required_bytes, limit_bytes } = range.copied().unwrap_or_default();
        let number = |field, bytes: i64| {
            u64::try_from(bytes)
                .map_err(|_| Refusal::invalid(format!("capacity_range: {field} is negative: {bytes}")))
        };
        let (at_least, limit) =
            (number("required_bytes", required_bytes)?, number("limit_bytes", limit_bytes)?);
        let at_most = (limit != 0).then_some(limit);
        if at_most.is_some_and(|at_most| at_most < at_least) {
            return Err(Refusal::invalid(format!(
                "capacity_range: limit_bytes {limit} is less than required_bytes {at_least}"
            )));
        }
        Ok(Self { at_least, at_most })
    }

    /// The size of a new volume, which has to hold so many bytes, 0 where it is no copy.
    ///
    /// # Errors
    /// OUT_OF_RANGE: there is no such size.
    pub(super) fn choose(self, source_bytes: u64) -> Result<u64, Refusal> {
        let wanted = match self.at_least.max(source_bytes) {
            // No more than may be.
            0 => self
                .at_most
                .map_or(DEFAULT_BYTES, |at_most| at_most.min(DEFAULT_BYTES) / GRANULE * GRANULE)
                .max(1),
            wanted => wanted,
        };
        let size = wanted.checked_next_multiple_of(GRANULE).filter(|size| *size <= BYTES_MAX);
        let size = size.ok_or_else(|| {
            Refusal::out_of_range(format!("{wanted} bytes are too many: at most {BYTES_MAX}"))
        })?;
        match self.at_most {
            Some(at_most) if size > at_most && source_bytes > at_most => Err(Refusal::out_of_range(format!(
                "a copy is as large as its source, {source_bytes} bytes; limit_bytes is {at_most}"
            ))),
            Some(at_most) if size > at_most => Err(Refusal::out_of_range(format!(
                "sizes are multiples of {GRANULE} bytes: the least that is enough is {size}; limit_bytes is {at_most}"
            ))),
            _ => Ok(size),
        }
    }

    /// The size to ask for a copy with: 0, its source's, where that is enough. The source may grow while the copy is made, and the call's
    /// repeat has to ask for the same.
    ///
    /// # Errors
    /// OUT_OF_RANGE: there is no such size.
    pub(super) fn of_copy(self, source_bytes: u64) -> Result<u64, Refusal> {
        let chosen = self.choose(source_bytes)?;
        Ok(if self.at_least <= source_bytes { 0 } else { chosen })
    }

    /// Whether a volume of this size is what is wanted.
    pub(super) fn has(self, bytes: u64) -> bool {
        bytes >= self.at_least && self.at_most.is_none_or(|at_most| bytes <= at_most)
    }
}

impl std::fmt::Display for SizeRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.at_most {
            None => write!(f, "at least {} bytes", self.at_least),
            Some(at_most) => write!(f, "{} to {at_most} bytes", self.at_least),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn range(required_bytes: i64, limit_bytes: i64) -> Result<SizeRange, Refusal> {
        SizeRange::of(Some(&v1::CapacityRange { required_bytes, limit_bytes }))
    }

    #[test]
    fn the_least_size_that_is_enough_is_chosen() {
        for (required, limit, source, chosen) in [
            (0, 0, 0, DEFAULT_BYTES),
            (0, 10_000, 0, 8192),
            (1, 0, 0, 4096),
            (4096, 4096, 0, 4096),
            (4097, 8192, 0, 8192),
            (0, 0, 5000, 8192),
            (10 << 30, 0, 1 << 30, 10 << 30),
            (1 << 30, 0, 2 << 30, 2 << 30),
        ] {
            assert_eq!(range(required, limit).unwrap().choose(source), Ok(chosen), "{required} {limit}");
        }
        assert_eq!(SizeRange::of(None).unwrap().choose(0), Ok(DEFAULT_BYTES));
    }

    #[test]
    fn what_no_size_is_in_is_out_of_range() {
        for (required, limit, source) in
            [(4097, 4100, 0), (0, 100, 0), (i64::MAX, 0, 0), (4096, 8192, 1 << 20), (i64::MAX, i64::MAX, 0)]
        {
            let refusal = range(required, limit).unwrap().choose(source).unwrap_err();
            assert_eq!(refusal.code, Code::OutOfRange, "{required} {limit} {source}");
        }
        for (required, limit) in [(-1, 0), (0, -1), (i64::MIN, i64::MIN), (2, 1)] {
            assert_eq!(range(required, limit).unwrap_err().code, Code::InvalidArgument);
        }
    }

    #[test]
    fn a_copy_that_is_as_large_as_its_source_is_asked_for_without_a_size() {
        let asked = range(8192, 1 << 20).unwrap();
        for (source, size) in [(4096, 8192), (8192, 0), (12288, 0)] {
            assert_eq!(asked.of_copy(source), Ok(size), "{source}");
        }
        assert_eq!(asked.of_copy(1 << 21).unwrap_err().code, Code::OutOfRange);
    }

    #[test]
    fn an_encrypted_volume_is_larger_on_the_server_by_its_header() {
        assert_eq!((on_server(4096, false), on_server(4096, true)), (Ok(4096), Ok(4096 + (16 << 20))));
        for size in [0, 4096, 1 << 30] {
            for is_encrypted in [false, true] {
                assert_eq!(clear(on_server(size, is_encrypted).unwrap(), is_encrypted), size);
            }
        }
        // Smaller than its header: somebody made it by other means.
        assert_eq!(clear(4096, true), 0);
        assert_eq!(on_server(BYTES_MAX, true).unwrap_err().code, Code::OutOfRange);
        assert_eq!(on_server(BYTES_MAX, false), Ok(BYTES_MAX));
    }

    #[test]
    fn a_volume_that_is_there_fits_or_does_not() {
        let exact = range(8192, 8192).unwrap();
        assert!(exact.has(8192) && !exact.has(4096) && !exact.has(12288));
        let open = range(8192, 0).unwrap();
        assert!(open.has(8192) && open.has(1 << 40) && !open.has(4096));
    }
}
