//! Where a thin volume has its bytes in its pool: an extent map, read from the pool's metadata.
//!
//! Owns what thin_dump(8) tells of one thin volume ([`MapReader`]), and the map made of it. Never: runs the tool, or compares.
//! Called by: `metadata.rs` (reads), whoever compares (`volume/diff/`).
//! Invariants: an answer that is not whole, or has what is not known here, is an error and no map: what is missing in a map would be
//! taken for bytes that have not changed. Two volumes that have the same chunk of the pool have the same bytes there: who writes to a
//! chunk that another has as well gets a new one. So an address means what [`Place::At`] says, as long as the base of a comparison is there
//! when its target is read. Source: Documentation/admin-guide/device-mapper/thin-provisioning.rst, thin_dump(8).

use std::io;
use std::ops::Range;

use super::report::Unreadable;
use crate::backend::extent_map::{ExtentMap, Place, Run};

/// Runs told at once.
const RUNS_MAX: usize = 4096;
const SECTOR_BYTES: u64 = 512;

/// Chunks of a thin volume that are one after the other in the pool as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapped {
    /// The first, in the volume.
    chunk: u64,
    /// The first, in the pool.
    address: u64,
    chunks: u64,
}

/// A thin volume's extent map, as it was when it was read.
#[derive(Debug, Clone)]
pub struct ThinMap {
    capacity_bytes: u64,
    chunk_bytes: u64,
    /// In order.
    mapped: Vec<Mapped>,
}

impl ExtentMap for ThinMap {
    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn read(&self, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64> {
        runs.clear();
        let first = self
            .mapped
            .partition_point(|mapped| (mapped.chunk + mapped.chunks) * self.chunk_bytes <= range.start);
        for mapped in &self.mapped[first..] {
            let start = mapped.chunk * self.chunk_bytes;
            if start >= range.end {
                break;
            }
            if runs.len() == RUNS_MAX {
                return Ok(start);
            }
            let bytes = start..start + mapped.chunks * self.chunk_bytes;
            runs.extend(Run { bytes, place: Place::At(mapped.address * self.chunk_bytes) }.within(range));
        }
        Ok(range.end)
    }
}

/// Reads what thin_dump writes of one thin volume, line by line.
#[derive(Debug, Default)]
pub(super) struct MapReader {
    chunk_bytes: Option<u64>,
    mapped: Vec<Mapped>,
    /// Chunks that there are to be, and that there are.
    chunks: Option<u64>,
    found: u64,
    is_whole: bool,
    wrong: Option<String>,
}

impl MapReader {
    /// The next line.
    pub(super) fn take(&mut self, line: &str) {
        for element in line.split('<').map(str::trim).filter(|element| !element.is_empty()) {
            if self.wrong.is_none() && self.element(element).is_none() {
                self.wrong = Some(element.chars().take(200).collect());
            }
        }
    }

    /// `None`: it is not known what that means.
    fn element(&mut self, element: &str) -> Option<()> {
        let number = |name: &str| attribute(element, name)?.parse::<u64>().ok();
        match element.split([' ', '>', '/']).find(|word| !word.is_empty())? {
            "superblock" if element.starts_with('/') => self.is_whole = true,
            "superblock" => {
                let sectors = number("data_block_size").filter(|sectors| (1..1 << 32).contains(sectors))?;
                self.chunk_bytes = Some(sectors * SECTOR_BYTES);
            }
            "device" if element.starts_with('/') => {}
            "device" if self.chunks.is_none() => self.chunks = Some(number("mapped_blocks")?),
            "single_mapping" => {
                self.add(Mapped {
                    chunk: number("origin_block")?,
                    address: number("data_block")?,
                    chunks: 1,
                })?;
            }
            "range_mapping" => {
                let (chunk, address) = (number("origin_begin")?, number("data_begin")?);
                self.add(Mapped { chunk, address, chunks: number("length")? })?;
            }
            _ => return None,
        }
        Some(())
    }

    fn add(&mut self, next: Mapped) -> Option<()> {
        // No byte of a pool has a higher address.
        let end = |start: u64| start.checked_add(next.chunks).filter(|end| *end < 1 << 48);
        end(next.chunk)?;
        end(next.address)?;
        self.found += next.chunks;
        match self.mapped.last_mut() {
            Some(last) if next.chunk < last.chunk + last.chunks => return None,
            Some(last)
                if next.chunk == last.chunk + last.chunks && next.address == last.address + last.chunks =>
            {
                last.chunks += next.chunks;
            }
            _ => self.mapped.push(next),
        }
        Some(())
    }

    /// The map of a volume of so many bytes.
    pub(super) fn finish(self, capacity_bytes: u64) -> Result<ThinMap, Unreadable> {
        if let Some(wrong) = self.wrong {
            return Err(Unreadable(format!("thin_dump: {wrong:?}")));
        }
        let chunk_bytes = self.chunk_bytes.filter(|_| self.is_whole && self.chunks == Some(self.found));
        let Some(chunk_bytes) = chunk_bytes else {
            let words = format!("thin_dump: {} mappings of {:?}", self.found, self.chunks);
            return Err(Unreadable(words));
        };
        Ok(ThinMap { capacity_bytes, chunk_bytes, mapped: self.mapped })
    }
}

/// The value of an element's attribute.
fn attribute<'a>(element: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = element;
    while let Some(at) = rest.find(name) {
        let (before, behind) = (&rest[..at], &rest[at + name.len()..]);
        if before.ends_with(' ')
            && let Some(value) = behind.strip_prefix("=\"")
        {
            return value.split('"').next();
        }
        rest = behind;
    }
    None
}

/// What thin_ls says that each thin volume has alone, in bytes.
pub(super) fn exclusive(text: &str, thin_id: u32) -> Result<u64, Unreadable> {
    let wrong = |line: &str| Unreadable(format!("thin_ls: {line:?}"));
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [id, bytes] = words.as_slice() else { return Err(wrong(line)) };
        if id.parse::<u32>().map_err(|_| wrong(line))? == thin_id {
            return bytes.parse().map_err(|_| wrong(line));
        }
    }
    Err(Unreadable(format!("thin_ls: nothing of {thin_id}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As thin_dump 0.9 and 1.1 write it.
    const DUMP: &str = r#"<superblock uuid="" time="1" transaction="2" flags="0" version="2" data_block_size="128" nr_data_blocks="0">
  <device dev_id="1" mapped_blocks="8" transaction="0" creation_time="0" snap_time="1">
    <single_mapping origin_block="0" data_block="4" time="0"/>
    <range_mapping origin_begin="1" data_begin="5" length="3" time="1"/>
    <single_mapping origin_block="4" data_block="100" time="0"/>
    <range_mapping origin_begin="16" data_begin="20" length="3" time="1"/>
  </device>
</superblock>
"#;
    const CHUNK: u64 = 64 << 10;

    fn read(text: &str) -> Result<ThinMap, Unreadable> {
        let mut reader = MapReader::default();
        text.lines().for_each(|line| reader.take(line));
        reader.finish(32 * CHUNK)
    }

    fn told(map: &ThinMap, range: Range<u64>) -> (Vec<(Range<u64>, u64)>, u64) {
        let mut runs = vec![Run { bytes: 0..1, place: Place::Unknown }];
        let end = map.read(&range, &mut runs).unwrap();
        let runs = runs.into_iter().map(|run| match run.place {
            Place::At(address) => (run.bytes, address),
            other => panic!("{other:?}"),
        });
        (runs.collect(), end)
    }

    #[test]
    fn a_dump_is_read_with_neighbours_joined() {
        let map = read(DUMP).unwrap();
        let all = [
            (0..4 * CHUNK, 4 * CHUNK),
            (4 * CHUNK..5 * CHUNK, 100 * CHUNK),
            (16 * CHUNK..19 * CHUNK, 20 * CHUNK),
        ];
        assert_eq!(told(&map, 0..32 * CHUNK), (all.to_vec(), 32 * CHUNK));
        let part = [(2 * CHUNK + 512..3 * CHUNK, 6 * CHUNK + 512)];
        assert_eq!(told(&map, 2 * CHUNK + 512..3 * CHUNK), (part.to_vec(), 3 * CHUNK));
        assert_eq!(told(&map, 5 * CHUNK..16 * CHUNK), (Vec::new(), 16 * CHUNK));
        let one_line = DUMP.replace('\n', "");
        assert_eq!(told(&read(&one_line).unwrap(), 0..CHUNK).0, [(0..CHUNK, 4 * CHUNK)]);
    }

    #[test]
    fn what_is_not_whole_or_not_known_is_no_map() {
        for (from, to) in [
            ("</superblock>", ""),
            ("mapped_blocks=\"8\"", "mapped_blocks=\"9\""),
            ("<single_mapping origin_block=\"4\"", "<ref name=\"1\"/><single_mapping origin_block=\"4\""),
            ("origin_block=\"4\"", "origin_block=\"3\""),
            ("data_block=\"100\"", "data_block=\"a\""),
            ("data_block_size=\"128\"", "data_block_size=\"0\""),
            ("length=\"3\"", "length=\"18446744073709551615\""),
        ] {
            assert!(DUMP.contains(from), "{from}");
            assert!(read(&DUMP.replacen(from, to, 1)).is_err(), "{from} is {to}");
        }
        assert!(read("").is_err());
    }

    #[test]
    fn many_runs_are_told_in_parts() {
        let mapped = (0..RUNS_MAX as u64 + 10).map(|at| Mapped { chunk: at * 2, address: at * 3, chunks: 1 });
        let map = ThinMap { capacity_bytes: 1 << 40, chunk_bytes: CHUNK, mapped: mapped.collect() };
        let (runs, end) = told(&map, 0..1 << 40);
        assert_eq!((runs.len(), end), (RUNS_MAX, RUNS_MAX as u64 * 2 * CHUNK));
        let (rest, end) = told(&map, end..1 << 40);
        assert_eq!((rest.len(), end), (10, 1 << 40));
    }

    #[test]
    fn what_each_has_alone_is_found_by_its_number() {
        let text = "  1 131072 \n 12      0 \n";
        assert_eq!((exclusive(text, 1).unwrap(), exclusive(text, 12).unwrap()), (131_072, 0));
        assert!(exclusive(text, 2).is_err() && exclusive("1 2 3", 1).is_err() && exclusive("", 1).is_err());
    }
}
