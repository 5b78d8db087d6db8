//! What the device says of itself, for an export: its capacity, its blocks, and what it can do.
//!
//! Pure functions, called by `attachment.rs` once. Sources: `ublk_cmd.h`, Linux 7.3; NBD `doc/proto.md`.

use proto::nbd::{ExportInfo, PAYLOAD_BYTES_MAX_DEFAULT, TransmissionFlags};
use ublk_core::{DeviceParams, Discard};

/// Largest READ or WRITE of a device, in bytes, where the server takes that much.
pub const IO_BYTES_MAX: u32 = 1 << 20;
/// Smallest limit of a READ or WRITE, in bytes, that the kernel keeps to: a page.
const IO_BYTES_LEAST: u32 = 4096;
/// Largest DISCARD, in bytes: it carries no data, and NBD's length has 32 bits.
const DISCARD_BYTES_MAX: u64 = 1 << 30;
/// Largest WRITE_ZEROES, in bytes: a server that has to write them all shall answer in good time.
const WRITE_ZEROES_BYTES_MAX: u64 = 32 << 20;
/// Block devices are counted in these, in bytes.
const SECTOR_BYTES: u32 = 512;
/// Largest logical block that every kernel takes, in bytes.
const LOGICAL_BLOCK_BYTES_MAX: u32 = 4096;

/// Why an export cannot be a disk here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The server wants larger blocks than the kernel takes.
    #[error(
        "the server takes requests of {0} bytes at least; a Linux disk has blocks of at most {LOGICAL_BLOCK_BYTES_MAX}"
    )]
    BlockTooLarge(u32),
    /// The server takes less in one request than the kernel may send.
    #[error(
        "the server takes requests of {0} bytes at most (its maximum block size); a Linux disk needs \
         {IO_BYTES_LEAST}: raise that on the server"
    )]
    MaximumTooSmall(u32),
    /// There is not one whole block.
    #[error("the export has {0} bytes: less than one block")]
    TooSmall(u64),
}

/// The device for an export.
///
/// Blocks are as small as was asked for and the server allows: 512 bytes where neither says otherwise, because that is what disk
/// images are made for, and no other size leaves less of an export over. A capacity that is not a whole number of blocks is
/// rounded down. What the server does not announce is not announced
/// by the device: without FLUSH there is no volatile cache, without FUA the block layer follows a write by a FLUSH,
/// without WRITE_ZEROES it writes pages of zeroes.
///
/// # Errors
/// [`GeometryError`], by cause.
pub fn device_params(
    export: &ExportInfo,
    block_size_bytes: u32,
    read_only: bool,
) -> Result<DeviceParams, GeometryError> {
    let has = |flag| export.flags.contains(flag);
    let minimum_bytes = export.block_sizes.map_or(1, |sizes| sizes.minimum_bytes);
    let logical_block_bytes = minimum_bytes.max(block_size_bytes).max(SECTOR_BYTES);
    if logical_block_bytes > LOGICAL_BLOCK_BYTES_MAX {
        return Err(GeometryError::BlockTooLarge(logical_block_bytes));
    }
    let capacity_bytes = export.size_bytes - export.size_bytes % u64::from(logical_block_bytes);
    if capacity_bytes == 0 {
        return Err(GeometryError::TooSmall(export.size_bytes));
    }
    let payload_max = export.block_sizes.map_or(PAYLOAD_BYTES_MAX_DEFAULT, |sizes| sizes.maximum_bytes);
    if payload_max < IO_BYTES_LEAST {
        return Err(GeometryError::MaximumTooSmall(payload_max));
    }
    let preferred_bytes =
        export.block_sizes.map_or(4096, |sizes| sizes.preferred_bytes).clamp(4096, 64 << 10);
    let mut params = DeviceParams::new(capacity_bytes);
    params.logical_block_bytes = logical_block_bytes;
    params.physical_block_bytes = logical_block_bytes.max(4096);
    params.io_min_bytes = params.physical_block_bytes;
    params.io_opt_bytes = if preferred_bytes.is_power_of_two() { preferred_bytes } else { 4096 };
    params.max_io_bytes = IO_BYTES_MAX.min(payload_max - payload_max % IO_BYTES_LEAST);
    params.read_only = read_only || has(TransmissionFlags::READ_ONLY);
    params.volatile_cache = has(TransmissionFlags::SEND_FLUSH);
    params.fua = params.volatile_cache && has(TransmissionFlags::SEND_FUA);
    params.rotational = has(TransmissionFlags::ROTATIONAL);
    if has(TransmissionFlags::SEND_TRIM) {
        let granularity_bytes = params.physical_block_bytes;
        params.discard = Some(Discard { granularity_bytes, max_bytes: DISCARD_BYTES_MAX });
    }
    if has(TransmissionFlags::SEND_WRITE_ZEROES) {
        params.write_zeroes_max_bytes = WRITE_ZEROES_BYTES_MAX;
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use proto::nbd::BlockSizes;

    use super::*;

    fn export(flags: TransmissionFlags) -> ExportInfo {
        ExportInfo { size_bytes: (1 << 20) + 700, flags, block_sizes: None, description: None }
    }

    #[test]
    fn a_device_announces_what_its_server_announces() {
        let bare = device_params(&export(TransmissionFlags::HAS_FLAGS), 0, false).unwrap();
        assert_eq!((bare.capacity_bytes, bare.logical_block_bytes), ((1 << 20) + 512, 512));
        assert!(
            !bare.volatile_cache && !bare.fua && bare.discard.is_none() && bare.write_zeroes_max_bytes == 0
        );

        let all = TransmissionFlags(0xffff);
        let full = device_params(&export(all), 4096, false).unwrap();
        assert_eq!((full.capacity_bytes, full.logical_block_bytes), (1 << 20, 4096));
        assert!(full.volatile_cache && full.fua && full.read_only && full.discard.is_some());
        full.to_abi().unwrap();
    }

    /// As of an image whose size is a multiple of 2048, like an ISO's: a partition table in it counts in sectors of 512 bytes.
    #[test]
    fn no_larger_blocks_are_chosen_than_are_needed_and_a_tail_is_left_over_only_where_it_must_be() {
        let blocks = |size_bytes: u64, minimum_bytes: u32, asked_bytes: u32| {
            let mut export = export(TransmissionFlags::HAS_FLAGS);
            export.size_bytes = size_bytes;
            export.block_sizes =
                Some(BlockSizes { minimum_bytes, preferred_bytes: 4096, maximum_bytes: 1 << 20 });
            let params = device_params(&export, asked_bytes, false).unwrap();
            (params.logical_block_bytes, size_bytes - params.capacity_bytes)
        };
        let iso = (1 << 20) + 2048;
        assert_eq!(blocks(1 << 20, 1, 0), (512, 0));
        assert_eq!(blocks(iso, 1, 0), (512, 0));
        assert_eq!(blocks(iso, 2048, 0), (2048, 0));
        assert_eq!(blocks(iso, 4096, 0), (4096, 2048));
        assert_eq!(blocks(iso, 1, 4096), (4096, 2048));
        assert_eq!(blocks(iso + 100, 1, 0), (512, 100));
    }

    #[test]
    fn no_request_is_longer_than_the_server_takes() {
        for (maximum_bytes, expected) in
            [(4096, 4096), (6000, 4096), (65536, 65536), (32 << 20, IO_BYTES_MAX)]
        {
            let mut export = export(TransmissionFlags::HAS_FLAGS);
            export.block_sizes =
                Some(BlockSizes { minimum_bytes: 512, preferred_bytes: 4096, maximum_bytes });
            assert_eq!(device_params(&export, 0, false).unwrap().max_io_bytes, expected);
        }
    }

    #[test]
    fn impossible_exports_are_refused() {
        let mut large = export(TransmissionFlags::HAS_FLAGS);
        large.block_sizes =
            Some(BlockSizes { minimum_bytes: 65536, preferred_bytes: 65536, maximum_bytes: 1 << 20 });
        assert_eq!(device_params(&large, 0, false), Err(GeometryError::BlockTooLarge(65536)));
        for maximum_bytes in [1, 2048, 4095] {
            let mut narrow = export(TransmissionFlags::HAS_FLAGS);
            narrow.block_sizes =
                Some(BlockSizes { minimum_bytes: 1, preferred_bytes: maximum_bytes, maximum_bytes });
            let refused = device_params(&narrow, 0, false).unwrap_err();
            assert_eq!(refused, GeometryError::MaximumTooSmall(maximum_bytes));
            let told = refused.to_string();
            assert!(
                told.contains(&format!("{maximum_bytes} bytes")) && told.contains("maximum block size"),
                "{told}"
            );
        }
        let mut small = export(TransmissionFlags::HAS_FLAGS);
        small.size_bytes = 511;
        assert_eq!(device_params(&small, 0, false), Err(GeometryError::TooSmall(511)));
    }
}
