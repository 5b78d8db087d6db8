//! What a block device promises: sizes, caches, discard; checked here, then handed to SET_PARAMS.
//!
//! Owns: the translation of a device's properties in bytes to the kernel's shifts and sectors, and every rule the
//! driver would answer with a bare `EINVAL`. Never: talks to the kernel.
//! Called by: the client when it adds a device, with the sizes the server announced.
//! Invariants: what `to_abi` returns is accepted by SET_PARAMS on a device whose `max_io_buf_bytes` is at least
//! `max_io_bytes`; segment limits always allow a request of `max_io_bytes` made of single pages.
//! Source: `ublk_validate_params` in `drivers/block/ublk_drv.c`, Linux 7.3.

use thiserror::Error;

use crate::abi::{
    ParamBasic, ParamDiscard, ParamDmaAlign, ParamSegment, Params, SECTOR_BYTES, SECTOR_SHIFT, UBLK_ATTR_FUA,
    UBLK_ATTR_READ_ONLY, UBLK_ATTR_ROTATIONAL, UBLK_ATTR_VOLATILE_CACHE, UBLK_IO_BUF_BITS,
    UBLK_MIN_SEGMENT_SIZE, UBLK_PARAM_TYPE_BASIC, UBLK_PARAM_TYPE_DISCARD, UBLK_PARAM_TYPE_DMA_ALIGN,
    UBLK_PARAM_TYPE_SEGMENT,
};

/// Largest request the ABI can describe, bytes.
pub const MAX_IO_BYTES_LIMIT: u32 = 1 << UBLK_IO_BUF_BITS;
/// Largest request unless the peer says otherwise, bytes: beyond it, larger requests stop paying for their memory.
pub const MAX_IO_BYTES_DEFAULT: u32 = 1 << 20;
/// Capacities stay below this, bytes: the kernel's `loff_t` is signed.
const CAPACITY_BYTES_LIMIT: u64 = i64::MAX as u64;
/// Segments that the kernel allows in a request without being told, and so the least we ask for.
const MAX_SEGMENTS_MIN: u32 = 128;

/// DISCARD as the device takes it. The driver sends one range in each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Bytes; a power of two, at least the logical block.
    pub granularity_bytes: u32,
    /// Largest request, bytes.
    pub max_bytes: u64,
}

/// A device's properties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceParams {
    /// Capacity, bytes; a multiple of the logical block.
    pub capacity_bytes: u64,
    /// Smallest addressable block, bytes: 512 to the page size.
    pub logical_block_bytes: u32,
    /// Smallest block written without reading it first, bytes.
    pub physical_block_bytes: u32,
    /// Smallest request that performs well, bytes.
    pub io_min_bytes: u32,
    /// Request size that performs best, bytes.
    pub io_opt_bytes: u32,
    /// Largest READ or WRITE, bytes: a multiple of the page size up to 32 MiB.
    pub max_io_bytes: u32,
    /// Writes are refused by the block layer.
    pub read_only: bool,
    /// Completed writes need a FLUSH to be durable.
    pub volatile_cache: bool,
    /// FUA is sent on writes rather than emulated by a FLUSH. Needs `volatile_cache`.
    pub fua: bool,
    /// `None`: DISCARD is not sent.
    pub discard: Option<Discard>,
    /// Largest WRITE_ZEROES, bytes; zero: it is not sent, and the block layer writes zero pages.
    pub write_zeroes_max_bytes: u64,
    /// Seeks cost time.
    pub rotational: bool,
    /// Alignment of requests' memory, bytes; `None`: the kernel's default.
    pub dma_alignment_bytes: Option<u32>,
}

impl DeviceParams {
    /// A plain device of `capacity_bytes`: 512-byte logical and 4 KiB physical blocks, 1 MiB requests, no volatile
    /// cache, no DISCARD, no WRITE_ZEROES.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            io_min_bytes: 4096,
            io_opt_bytes: 4096,
            max_io_bytes: MAX_IO_BYTES_DEFAULT,
            read_only: false,
            volatile_cache: false,
            fua: false,
            discard: None,
            write_zeroes_max_bytes: 0,
            rotational: false,
            dma_alignment_bytes: None,
        }
    }

    /// Checks every rule and gives what SET_PARAMS takes.
    pub fn to_abi(&self) -> Result<Params, ParamsError> {
        self.validate_blocks()?;
        self.validate_limits()?;
        let mut params = Params {
            len: size_of::<Params>() as u32,
            types: UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_SEGMENT,
            basic: ParamBasic {
                attrs: self.attrs(),
                logical_bs_shift: shift(self.logical_block_bytes),
                physical_bs_shift: shift(self.physical_block_bytes),
                io_opt_shift: shift(self.io_opt_bytes),
                io_min_shift: shift(self.io_min_bytes),
                max_sectors: self.max_io_bytes >> SECTOR_SHIFT,
                chunk_sectors: 0,
                dev_sectors: self.capacity_bytes >> SECTOR_SHIFT,
                virt_boundary_mask: 0,
            },
            seg: self.segment(),
            ..Params::default()
        };
        if self.discard.is_some() || self.write_zeroes_max_bytes != 0 {
            params.types |= UBLK_PARAM_TYPE_DISCARD;
            params.discard = self.discard_param();
        }
        if let Some(alignment_bytes) = self.dma_alignment_bytes {
            params.types |= UBLK_PARAM_TYPE_DMA_ALIGN;
            params.dma = ParamDmaAlign { alignment: alignment_bytes - 1, ..ParamDmaAlign::default() };
        }
        Ok(params)
    }

    fn validate_blocks(&self) -> Result<(), ParamsError> {
        let page_bytes = page_bytes();
        let sizes = [
            ("logical block", self.logical_block_bytes),
            ("physical block", self.physical_block_bytes),
            ("minimal I/O", self.io_min_bytes),
            ("optimal I/O", self.io_opt_bytes),
        ];
        for (what, bytes) in sizes {
            if !bytes.is_power_of_two() {
                return Err(ParamsError::NotPowerOfTwo { what, bytes });
            }
        }
        if !(512..=page_bytes).contains(&self.logical_block_bytes) {
            return Err(ParamsError::LogicalBlock { bytes: self.logical_block_bytes, page_bytes });
        }
        for (what, bytes) in &sizes[1..] {
            if *bytes < self.logical_block_bytes {
                return Err(ParamsError::BelowLogicalBlock { what, bytes: *bytes });
            }
        }
        if self.capacity_bytes == 0
            || self.capacity_bytes > CAPACITY_BYTES_LIMIT
            || !self.capacity_bytes.is_multiple_of(u64::from(self.logical_block_bytes))
        {
            return Err(ParamsError::Capacity {
                bytes: self.capacity_bytes,
                logical_block_bytes: self.logical_block_bytes,
            });
        }
        Ok(())
    }

    fn validate_limits(&self) -> Result<(), ParamsError> {
        let page_bytes = page_bytes();
        if self.max_io_bytes == 0
            || self.max_io_bytes > MAX_IO_BYTES_LIMIT
            || !self.max_io_bytes.is_multiple_of(page_bytes)
        {
            return Err(ParamsError::MaxIo { bytes: self.max_io_bytes, page_bytes });
        }
        if self.fua && !self.volatile_cache {
            return Err(ParamsError::FuaWithoutCache);
        }
        if let Some(discard) = self.discard {
            let granularity_bytes = discard.granularity_bytes;
            if !granularity_bytes.is_power_of_two() || granularity_bytes < self.logical_block_bytes {
                return Err(ParamsError::DiscardGranularity { bytes: granularity_bytes });
            }
            if discard.max_bytes < u64::from(granularity_bytes) {
                return Err(ParamsError::DiscardMax { bytes: discard.max_bytes, granularity_bytes });
            }
        }
        if self.write_zeroes_max_bytes != 0
            && self.write_zeroes_max_bytes < u64::from(self.logical_block_bytes)
        {
            return Err(ParamsError::WriteZeroesMax { bytes: self.write_zeroes_max_bytes });
        }
        match self.dma_alignment_bytes {
            Some(bytes) if !bytes.is_power_of_two() || bytes > page_bytes => {
                Err(ParamsError::DmaAlignment { bytes, page_bytes })
            }
            _ => Ok(()),
        }
    }

    fn attrs(&self) -> u32 {
        [
            (self.read_only, UBLK_ATTR_READ_ONLY),
            (self.rotational, UBLK_ATTR_ROTATIONAL),
            (self.volatile_cache, UBLK_ATTR_VOLATILE_CACHE),
            (self.fua, UBLK_ATTR_FUA),
        ]
        .into_iter()
        .fold(0, |attrs, (wanted, attr)| if wanted { attrs | attr } else { attrs })
    }

    /// Without this the block layer allows 128 segments, so a request of scattered pages ends at 512 KiB.
    fn segment(&self) -> ParamSegment {
        let pages = self.max_io_bytes / page_bytes();
        let max_segments = pages.clamp(MAX_SEGMENTS_MIN, u32::from(u16::MAX)) as u16;
        ParamSegment {
            seg_boundary_mask: u64::from(u32::MAX),
            max_segment_size: self.max_io_bytes.max(UBLK_MIN_SEGMENT_SIZE),
            max_segments,
            pad: [0; 2],
        }
    }

    fn discard_param(&self) -> ParamDiscard {
        let granularity_bytes =
            self.discard.map_or(self.logical_block_bytes, |discard| discard.granularity_bytes);
        ParamDiscard {
            discard_alignment: 0,
            discard_granularity: granularity_bytes,
            max_discard_sectors: self
                .discard
                .map_or(0, |discard| whole_blocks_in_sectors(discard.max_bytes, granularity_bytes)),
            max_write_zeroes_sectors: whole_blocks_in_sectors(
                self.write_zeroes_max_bytes,
                self.logical_block_bytes,
            ),
            max_discard_segments: 1,
            reserved0: 0,
        }
    }
}

/// `max_bytes` rounded down to whole blocks and to what the kernel's 32-bit sector counts hold.
fn whole_blocks_in_sectors(max_bytes: u64, block_bytes: u32) -> u32 {
    let limit_bytes = u64::from(u32::MAX) * SECTOR_BYTES;
    let bytes = max_bytes.min(limit_bytes);
    let whole_bytes = bytes - bytes % u64::from(block_bytes);
    (whole_bytes >> SECTOR_SHIFT) as u32
}

fn shift(bytes: u32) -> u8 {
    bytes.trailing_zeros() as u8
}

fn page_bytes() -> u32 {
    rustix::param::page_size() as u32
}

/// Properties that no block device can have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParamsError {
    /// The kernel takes these sizes as shifts.
    #[error("{what} of {bytes} bytes is not a power of two")]
    NotPowerOfTwo {
        /// Which size.
        what: &'static str,
        /// Its value.
        bytes: u32,
    },
    /// Outside what the block layer supports.
    #[error("logical block of {bytes} bytes is not between 512 and the page size, {page_bytes}")]
    LogicalBlock {
        /// The logical block.
        bytes: u32,
        /// This machine's pages.
        page_bytes: u32,
    },
    /// Nothing can be smaller than the logical block.
    #[error("{what} of {bytes} bytes is smaller than the logical block")]
    BelowLogicalBlock {
        /// Which size.
        what: &'static str,
        /// Its value.
        bytes: u32,
    },
    /// Zero, more than 2^63 - 1, or not whole blocks.
    #[error("capacity of {bytes} bytes is not a positive multiple of {logical_block_bytes} below 8 EiB")]
    Capacity {
        /// The capacity.
        bytes: u64,
        /// The block it should be a multiple of.
        logical_block_bytes: u32,
    },
    /// Zero, more than the ABI's 32 MiB, or not whole pages.
    #[error("largest I/O of {bytes} bytes is not a positive multiple of {page_bytes} up to 32 MiB")]
    MaxIo {
        /// The largest I/O.
        bytes: u32,
        /// This machine's pages.
        page_bytes: u32,
    },
    /// The block layer sends FUA only where there is a cache to write through.
    #[error("FUA makes sense only with a volatile cache")]
    FuaWithoutCache,
    /// Not a power of two, or smaller than the logical block.
    #[error("discard granularity of {bytes} bytes is not a power of two of at least the logical block")]
    DiscardGranularity {
        /// The granularity.
        bytes: u32,
    },
    /// Smaller than one granule.
    #[error("largest discard of {bytes} bytes is smaller than its granularity, {granularity_bytes}")]
    DiscardMax {
        /// The largest DISCARD.
        bytes: u64,
        /// Its granularity.
        granularity_bytes: u32,
    },
    /// Smaller than one block.
    #[error("largest write-zeroes of {bytes} bytes is smaller than the logical block")]
    WriteZeroesMax {
        /// The largest WRITE_ZEROES.
        bytes: u64,
    },
    /// Not a power of two, or more than a page.
    #[error("DMA alignment of {bytes} bytes is not a power of two up to the page size, {page_bytes}")]
    DmaAlignment {
        /// The alignment.
        bytes: u32,
        /// This machine's pages.
        page_bytes: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_become_shifts_and_sectors() {
        let params = DeviceParams {
            logical_block_bytes: 4096,
            physical_block_bytes: 4096,
            io_opt_bytes: 1 << 20,
            read_only: true,
            volatile_cache: true,
            fua: true,
            ..DeviceParams::new(1 << 30)
        }
        .to_abi()
        .unwrap();
        assert_eq!(params.len, 152);
        assert_eq!(params.types, UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_SEGMENT);
        assert_eq!(params.basic.attrs, UBLK_ATTR_READ_ONLY | UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_FUA);
        assert_eq!((params.basic.logical_bs_shift, params.basic.physical_bs_shift), (12, 12));
        assert_eq!((params.basic.io_opt_shift, params.basic.io_min_shift), (20, 12));
        assert_eq!(params.basic.max_sectors, 2048);
        assert_eq!(params.basic.dev_sectors, 1 << 21);
    }

    #[test]
    fn a_largest_request_of_scattered_pages_fits_the_segment_limits() {
        for max_io_bytes in [1 << 20, 4 << 20, MAX_IO_BYTES_LIMIT] {
            let params = DeviceParams { max_io_bytes, ..DeviceParams::new(1 << 30) }.to_abi().unwrap();
            assert!(u32::from(params.seg.max_segments) * page_bytes() >= max_io_bytes);
        }
    }

    #[test]
    fn write_zeroes_without_discard_still_has_a_granularity() {
        let params = DeviceParams { write_zeroes_max_bytes: 1 << 30, ..DeviceParams::new(1 << 30) };
        let params = params.to_abi().unwrap();
        assert_ne!(params.types & UBLK_PARAM_TYPE_DISCARD, 0);
        assert_eq!(params.discard.discard_granularity, 512);
        assert_eq!(params.discard.max_discard_sectors, 0);
        assert_eq!(params.discard.max_write_zeroes_sectors, 1 << 21);
    }

    #[test]
    fn discard_limits_are_cut_to_whole_granules_and_32_bits() {
        let discard = Some(Discard { granularity_bytes: 65536, max_bytes: u64::MAX });
        let params = DeviceParams { discard, ..DeviceParams::new(1 << 30) }.to_abi().unwrap();
        assert_eq!(params.discard.max_discard_sectors, u32::MAX - 127);
        assert_eq!(params.discard.max_discard_segments, 1);
    }

    #[test]
    fn impossible_properties_are_named() {
        let good = DeviceParams::new(1 << 20);
        let bad = [
            DeviceParams { capacity_bytes: 0, ..good },
            DeviceParams { capacity_bytes: 1000, ..good },
            DeviceParams { capacity_bytes: 1 << 63, ..good },
            DeviceParams { logical_block_bytes: 1000, ..good },
            DeviceParams { logical_block_bytes: 256, ..good },
            DeviceParams { logical_block_bytes: page_bytes() * 2, ..good },
            DeviceParams { logical_block_bytes: 4096, physical_block_bytes: 512, ..good },
            DeviceParams { io_opt_bytes: 0, ..good },
            DeviceParams { max_io_bytes: 0, ..good },
            DeviceParams { max_io_bytes: 512, ..good },
            DeviceParams { max_io_bytes: MAX_IO_BYTES_LIMIT * 2, ..good },
            DeviceParams { fua: true, ..good },
            DeviceParams { discard: Some(Discard { granularity_bytes: 256, max_bytes: 4096 }), ..good },
            DeviceParams { discard: Some(Discard { granularity_bytes: 4096, max_bytes: 512 }), ..good },
            DeviceParams { write_zeroes_max_bytes: 100, ..good },
            DeviceParams { dma_alignment_bytes: Some(3), ..good },
            DeviceParams { dma_alignment_bytes: Some(page_bytes() * 2), ..good },
        ];
        assert!(good.to_abi().is_ok());
        let errors: Vec<_> = bad.iter().map(|params| params.to_abi().unwrap_err()).collect();
        assert_eq!(errors[0], ParamsError::Capacity { bytes: 0, logical_block_bytes: 512 });
        assert_eq!(errors[3], ParamsError::NotPowerOfTwo { what: "logical block", bytes: 1000 });
        assert_eq!(errors[11], ParamsError::FuaWithoutCache);
    }
}
