//! For which sector size a disk image was partitioned.
//!
//! A partition table counts in sectors, and a disk with others does not find its partitions. A GPT stands in the second sector, which
//! shows its size; an MBR says nothing, but may only fit if its numbers count 512 bytes.
//! I/O-free. Source: UEFI 2.10, "GUID Partition Table (GPT) Disk Layout", "MBR Partition Record".

/// Bytes that have to be looked at.
pub const LOOK_BYTES: usize = 8192;

const GPT_SIGNATURE: &[u8] = b"EFI PART";
const MBR_ENTRIES_AT: usize = 446;
const MBR_ENTRY_BYTES: usize = 16;
const MBR_SIGNATURE_AT: usize = 510;
const GPT_PROTECTIVE: u8 = 0xee;

/// A partition table, and the sector size that it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartitionTable {
    /// `GPT` or `MBR`
    pub kind: &'static str,
    /// 512 or 4096.
    pub sector_bytes: u32,
}

/// Looks at an image's first bytes ([`LOOK_BYTES`], or all of a shorter one). `None`: there is no table, or it does not show.
pub fn find(begin: &[u8], size_bytes: u64) -> Option<PartitionTable> {
    let has_gpt = |sector_bytes: usize| begin.get(sector_bytes..sector_bytes + 8) == Some(GPT_SIGNATURE);
    match (has_gpt(512), has_gpt(4096)) {
        (true, false) => Some(PartitionTable { kind: "GPT", sector_bytes: 512 }),
        (false, true) => Some(PartitionTable { kind: "GPT", sector_bytes: 4096 }),
        // One for both, or none.
        (true, true) => None,
        (false, false) => mbr(begin, size_bytes),
    }
}

fn mbr(begin: &[u8], size_bytes: u64) -> Option<PartitionTable> {
    if begin.get(MBR_SIGNATURE_AT..MBR_SIGNATURE_AT + 2) != Some(&[0x55, 0xaa]) {
        return None;
    }
    let (entries, _) = begin[MBR_ENTRIES_AT..MBR_SIGNATURE_AT].as_chunks::<MBR_ENTRY_BYTES>();
    let mut ends = Vec::new();
    for entry in entries {
        let number = |at: usize| {
            u64::from(u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]))
        };
        let (flag, kind, start, count) = (entry[0], entry[4], number(8), number(12));
        if kind == 0 {
            continue;
        }
        // The first sector of a file system without a table ends in the same two bytes.
        if flag & 0x7f != 0 || kind == GPT_PROTECTIVE || start == 0 || count == 0 {
            return None;
        }
        ends.push(start + count);
    }
    let last = ends.into_iter().max()?;
    let fits = |sector_bytes: u64| last * sector_bytes <= size_bytes;
    (fits(512) && !fits(4096)).then_some(PartitionTable { kind: "MBR", sector_bytes: 512 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_gpt(sector_bytes: usize) -> Vec<u8> {
        let mut begin = vec![0; LOOK_BYTES];
        begin[sector_bytes..sector_bytes + 8].copy_from_slice(GPT_SIGNATURE);
        begin
    }

    fn with_mbr(entries: &[(u8, u8, u32, u32)]) -> Vec<u8> {
        let mut begin = vec![0; LOOK_BYTES];
        begin[510..512].copy_from_slice(&[0x55, 0xaa]);
        for (index, (flag, kind, start, count)) in entries.iter().enumerate() {
            let entry = &mut begin[MBR_ENTRIES_AT + index * MBR_ENTRY_BYTES..][..MBR_ENTRY_BYTES];
            (entry[0], entry[4]) = (*flag, *kind);
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..16].copy_from_slice(&count.to_le_bytes());
        }
        begin
    }

    #[test]
    fn a_gpt_shows_its_sector_size() {
        for sector_bytes in [512u32, 4096] {
            let table = find(&with_gpt(sector_bytes as usize), 1 << 30);
            assert_eq!(table, Some(PartitionTable { kind: "GPT", sector_bytes }));
        }
        let mut both = with_gpt(512);
        both[4096..4104].copy_from_slice(GPT_SIGNATURE);
        assert_eq!(find(&both, 1 << 30), None, "it suits either");
        assert_eq!(find(&[0; LOOK_BYTES], 1 << 30), None);
        assert_eq!(find(b"short", 5), None);
    }

    #[test]
    fn an_mbr_shows_its_sector_size_where_it_fits_no_other() {
        let (size, sectors) = (64 << 20, (64 << 20) / 512);
        let whole = with_mbr(&[(0x80, 0x83, 2048, sectors - 2048)]);
        assert_eq!(find(&whole, size), Some(PartitionTable { kind: "MBR", sector_bytes: 512 }));
        let first_tenth = with_mbr(&[(0, 0x83, 2048, sectors / 10)]);
        assert_eq!(find(&first_tenth, size), None, "it may be either");
        let protective = with_mbr(&[(0, GPT_PROTECTIVE, 1, sectors - 1)]);
        assert_eq!(find(&protective, size), None, "and no GPT");
        let boot_code = with_mbr(&[(0x33, 0x83, 2048, sectors - 2048)]);
        assert_eq!(find(&boot_code, size), None, "a file system's boot sector");
        assert_eq!(find(&with_mbr(&[]), size), None);
        assert_eq!(find(&with_mbr(&[(0, 0x83, 2048, u32::MAX)]), size), None, "it fits in no way");
    }
}
