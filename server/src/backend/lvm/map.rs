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
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::error::LvmError;
use super::report::Unreadable;
use crate::backend::extent_map::{ExtentMap, Place, Run};

/// Runs told at once.
const RUNS_MAX: usize = 4096;
/// Runs in all maps of a server at a time: some 100 MB of memory, twice that while they are read. With chunks of 64 KiB, as many as 256 GiB have of
/// which no chunk is beside another.
const MAPPED_MAX: usize = 4 << 20;
/// So many are taken of that at once.
const ROOM_STEP: usize = 1024;
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

/// Room for maps, in runs; clones are of the same.
#[derive(Debug, Clone)]
pub(super) struct Room(Arc<AtomicUsize>);

impl Default for Room {
    fn default() -> Self {
        Self(Arc::new(AtomicUsize::new(MAPPED_MAX)))
    }
}

/// What is taken of it, until it is dropped.
#[derive(Debug)]
struct RoomTaken {
    room: Room,
    runs: usize,
}

impl RoomTaken {
    fn more(&mut self) -> bool {
        let take = |left: usize| left.checked_sub(ROOM_STEP);
        let taken = self.room.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        self.runs += if taken { ROOM_STEP } else { 0 };
        taken
    }
}

impl Drop for RoomTaken {
    fn drop(&mut self) {
        self.room.0.fetch_add(self.runs, Ordering::Relaxed);
    }
}

/// A thin volume's extent map, as it was when it was read.
#[derive(Debug)]
pub struct ThinMap {
    capacity_bytes: u64,
    chunk_bytes: u64,
    /// In order.
    mapped: Vec<Mapped>,
    _room: RoomTaken,
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
#[derive(Debug)]
pub(super) struct MapReader {
    chunk_bytes: Option<u64>,
    mapped: Vec<Mapped>,
    room: RoomTaken,
    is_too_large: bool,
    /// Chunks that there are to be, and that there are.
    chunks: Option<u64>,
    found: u64,
    is_whole: bool,
    wrong: Option<String>,
}

impl MapReader {
    /// Of a map that takes no more than is left of the room.
    pub(super) fn new(room: Room) -> Self {
        Self {
            chunk_bytes: None,
            mapped: Vec::new(),
            room: RoomTaken { room, runs: 0 },
            is_too_large: false,
            chunks: None,
            found: 0,
            is_whole: false,
            wrong: None,
        }
    }

    /// The next line.
    pub(super) fn take(&mut self, line: &str) {
        if self.is_too_large {
            return;
        }
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
        let is_full = self.mapped.len() == self.room.runs;
        match self.mapped.last_mut() {
            Some(last) if next.chunk < last.chunk + last.chunks => return None,
            Some(last)
                if next.chunk == last.chunk + last.chunks && next.address == last.address + last.chunks =>
            {
                last.chunks += next.chunks;
            }
            _ if is_full && !self.room.more() => {
                self.is_too_large = true;
                // What there is of it is nothing without the rest.
                self.mapped = Vec::new();
            }
            _ => self.mapped.push(next),
        }
        Some(())
    }

    /// The map of a volume of so many bytes.
    pub(super) fn finish(mut self, capacity_bytes: u64) -> Result<ThinMap, LvmError> {
        if self.is_too_large {
            return Err(LvmError::TooManyRuns(MAPPED_MAX));
        }
        if let Some(wrong) = self.wrong {
            return Err(Unreadable(format!("thin_dump: {wrong:?}")).into());
        }
        let chunk_bytes = self.chunk_bytes.filter(|_| self.is_whole && self.chunks == Some(self.found));
        let Some(chunk_bytes) = chunk_bytes else {
            let words = format!("thin_dump: {} mappings of {:?}", self.found, self.chunks);
            return Err(Unreadable(words).into());
        };
        self.mapped.shrink_to_fit();
        Ok(ThinMap { capacity_bytes, chunk_bytes, mapped: self.mapped, _room: self.room })
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

/// Reads what thin_ls says that a thin volume has alone, line by line.
#[derive(Debug)]
pub(super) struct ExclusiveReader {
    thin_id: u32,
    found: Option<Result<u64, Unreadable>>,
}

impl ExclusiveReader {
    /// Of the volume with that number.
    pub(super) fn new(thin_id: u32) -> Self {
        Self { thin_id, found: None }
    }

    /// The next line.
    pub(super) fn take(&mut self, line: &str) {
        if self.found.is_none() {
            self.found = self.line(line.trim());
        }
    }

    fn line(&self, line: &str) -> Option<Result<u64, Unreadable>> {
        let wrong = || Err(Unreadable(format!("thin_ls: {line:?}")));
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => None,
            [id, bytes] => match (id.parse::<u32>(), bytes.parse()) {
                (Ok(id), Ok(bytes)) => (id == self.thin_id).then_some(Ok(bytes)),
                _ => Some(wrong()),
            },
            _ => Some(wrong()),
        }
    }

    /// In bytes.
    pub(super) fn finish(&mut self) -> Result<u64, Unreadable> {
        let missing = || Err(Unreadable(format!("thin_ls: nothing of {}", self.thin_id)));
        self.found.take().unwrap_or_else(missing)
    }
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

    fn read(text: &str) -> Result<ThinMap, LvmError> {
        read_into(&Room::default(), text)
    }

    fn read_into(room: &Room, text: &str) -> Result<ThinMap, LvmError> {
        let mut reader = MapReader::new(room.clone());
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
        let _room = RoomTaken { room: Room::default(), runs: 0 };
        let map = ThinMap { capacity_bytes: 1 << 40, chunk_bytes: CHUNK, mapped: mapped.collect(), _room };
        let (runs, end) = told(&map, 0..1 << 40);
        assert_eq!((runs.len(), end), (RUNS_MAX, RUNS_MAX as u64 * 2 * CHUNK));
        let (rest, end) = told(&map, end..1 << 40);
        assert_eq!((rest.len(), end), (10, 1 << 40));
    }

    #[test]
    fn what_each_has_alone_is_found_by_its_number() {
        let exclusive = |text: &str, thin_id| {
            let mut reader = ExclusiveReader::new(thin_id);
            text.lines().for_each(|line| reader.take(line));
            reader.finish()
        };
        let text = "  1 131072 \n 12      0 \n";
        assert_eq!((exclusive(text, 1).unwrap(), exclusive(text, 12).unwrap()), (131_072, 0));
        assert!(exclusive(text, 2).is_err() && exclusive("1 2 3", 1).is_err() && exclusive("", 1).is_err());
    }

    #[test]
    fn maps_take_no_more_than_there_is_room_for_and_give_it_back() {
        // No two of them beside each other.
        let dump = |runs: u64| {
            let mapping =
                |at| format!(r#"<single_mapping origin_block="{}" data_block="{at}" time="0"/>"#, at * 2);
            let mappings: Vec<String> = (0..runs).map(mapping).collect();
            format!(
                "<superblock data_block_size=\"128\">\n<device dev_id=\"1\" mapped_blocks=\"{runs}\">\n{}\n</device>\n</superblock>",
                mappings.join("\n")
            )
        };
        let left = |room: &Room| room.0.load(Ordering::Relaxed);
        let room = Room(Arc::new(AtomicUsize::new(3 * ROOM_STEP)));
        let step = ROOM_STEP as u64;
        let first = read_into(&room, &dump(2 * step)).unwrap();
        assert_eq!((first.mapped.len(), left(&room)), (2 * ROOM_STEP, ROOM_STEP));
        let error = read_into(&room, &dump(step + 1)).unwrap_err();
        assert!(matches!(error, LvmError::TooManyRuns(_)), "{error}");
        assert_eq!(left(&room), ROOM_STEP, "what was begun is given back");
        drop(first);
        assert_eq!(read_into(&room, &dump(step + 1)).unwrap().mapped.len(), ROOM_STEP + 1);
        assert_eq!(left(&room), 3 * ROOM_STEP);
    }
}
