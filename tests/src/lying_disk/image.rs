//! What a lying disk holds: stable bytes, and the writes that only its cache has.
//!
//! Owns the sparse contents and the log of unflushed writes; decides, from a seed, what a power cut leaves of them. Never
//! does I/O, knows nothing of NBD and takes no clock: the same calls and the same seed give the same bytes.
//! Called by `server.rs` under its lock.
//!
//! Invariants: a READ sees the newest write; the cached pages are the stable pages with the log applied in order; what was
//! made stable, by a flush or by FUA, is never changed by a power cut, not even by an older write that the log still has.

use std::collections::HashMap;

/// What a power cut tears at: a sector is there whole or not at all, as with any disk.
pub const SECTOR_BYTES: usize = 512;

/// Granularity of the sparse contents; a page that is not there reads as zeroes.
const PAGE_BYTES: usize = 4096;

type Page = Box<[u8; PAGE_BYTES]>;

/// What became of the unflushed writes at a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Losses {
    /// Writes that survived whole.
    pub whole: usize,
    /// Writes of which only some sectors survived.
    pub torn: usize,
    /// Writes of which nothing survived.
    pub lost: usize,
}

/// The contents of a lying disk; see the head of the file.
#[derive(Debug, Default)]
pub(super) struct Image {
    stable: HashMap<u64, Page>,
    /// The newest contents of every page that an unflushed write touched; `None` is zeroes.
    cached: HashMap<u64, Option<Page>>,
    unflushed: Vec<Unflushed>,
    /// Sectors written with FUA since the last flush, and the length of the log then: older writes have no power over them.
    stable_since: HashMap<u64, usize>,
}

#[derive(Debug)]
struct Unflushed {
    offset_bytes: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Bytes(Vec<u8>),
    Zeroes { length_bytes: u64 },
}

impl Unflushed {
    fn sectors(&self) -> usize {
        let length_bytes = match &self.content {
            Content::Bytes(bytes) => bytes.len(),
            Content::Zeroes { length_bytes } => *length_bytes as usize,
        };
        length_bytes / SECTOR_BYTES
    }

    /// The bytes of its sector number `index`; `None` is zeroes.
    fn sector(&self, index: usize) -> Option<&[u8]> {
        match &self.content {
            Content::Bytes(bytes) => Some(&bytes[index * SECTOR_BYTES..(index + 1) * SECTOR_BYTES]),
            Content::Zeroes { .. } => None,
        }
    }
}

impl Image {
    /// Reads the newest contents.
    pub(super) fn read(&self, offset_bytes: u64, into: &mut [u8]) {
        for (page, at, range) in pages(offset_bytes, into.len()) {
            let stable = || self.stable.get(&page);
            let newest = self.cached.get(&page).map_or_else(stable, Option::as_ref);
            let part = &mut into[range];
            match newest {
                Some(bytes) => part.copy_from_slice(&bytes[at..at + part.len()]),
                None => part.fill(0),
            }
        }
    }

    /// Writes whole sectors; with `fua` they are stable when this returns.
    ///
    /// # Panics
    /// Offset or length is not a multiple of [`SECTOR_BYTES`].
    pub(super) fn write(&mut self, offset_bytes: u64, bytes: &[u8], fua: bool) {
        assert_sectors(offset_bytes, bytes.len() as u64);
        for (page, at, range) in pages(offset_bytes, bytes.len()) {
            let part = &bytes[range];
            if fua {
                if let Some(newest) = self.cached.get_mut(&page) {
                    newest.get_or_insert_with(zero_page)[at..at + part.len()].copy_from_slice(part);
                }
                self.stable.entry(page).or_insert_with(zero_page)[at..at + part.len()].copy_from_slice(part);
            } else {
                let newest = self.cached.entry(page).or_insert_with(|| self.stable.get(&page).cloned());
                newest.get_or_insert_with(zero_page)[at..at + part.len()].copy_from_slice(part);
            }
        }
        if fua {
            self.note_stable(offset_bytes, bytes.len() as u64);
        } else {
            self.unflushed.push(Unflushed { offset_bytes, content: Content::Bytes(bytes.to_vec()) });
        }
    }

    /// Makes whole sectors read as zeroes; with `fua` that is stable when this returns.
    ///
    /// # Panics
    /// As [`Image::write`].
    pub(super) fn write_zeroes(&mut self, offset_bytes: u64, length_bytes: u64, fua: bool) {
        assert_sectors(offset_bytes, length_bytes);
        for (page, at, range) in pages(offset_bytes, length_bytes as usize) {
            let is_whole = range.len() == PAGE_BYTES;
            if fua {
                if let Some(newest) = self.cached.get_mut(&page) {
                    zero_part(newest, at, range.len());
                }
                if is_whole {
                    self.stable.remove(&page);
                } else if let Some(bytes) = self.stable.get_mut(&page) {
                    bytes[at..at + range.len()].fill(0);
                }
            } else if is_whole {
                // A page that is nowhere reads as zeroes already; mkfs zeroes whole disks of them.
                if self.cached.contains_key(&page) || self.stable.contains_key(&page) {
                    self.cached.insert(page, None);
                }
            } else {
                let newest = self.cached.entry(page).or_insert_with(|| self.stable.get(&page).cloned());
                zero_part(newest, at, range.len());
            }
        }
        if fua {
            self.note_stable(offset_bytes, length_bytes);
        } else {
            self.unflushed.push(Unflushed { offset_bytes, content: Content::Zeroes { length_bytes } });
        }
    }

    /// Makes every write before this one stable.
    pub(super) fn flush(&mut self) {
        for (page, newest) in self.cached.drain() {
            match newest {
                Some(bytes) => self.stable.insert(page, bytes),
                None => self.stable.remove(&page),
            };
        }
        self.unflushed.clear();
        self.stable_since.clear();
    }

    /// Loses the cache. Each unflushed write survives whole, in some of its sectors, or not at all, and what survives
    /// became stable in any order; all of that is decided by `seed`.
    pub(super) fn lose_power(&mut self, seed: u64) -> Losses {
        let mut random = fastrand::Rng::with_seed(seed);
        let log = std::mem::take(&mut self.unflushed);
        let mut order: Vec<usize> = (0..log.len()).collect();
        random.shuffle(&mut order);
        let mut losses = Losses::default();
        for position in order {
            let survivors_in_256 = match random.u8(0..3) {
                0 => 0,
                1 => random.u16(1..256),
                _ => 256,
            };
            let survived = self.destage(&log[position], position, || random.u16(0..256) < survivors_in_256);
            match survived {
                0 => losses.lost += 1,
                some if some < log[position].sectors() => losses.torn += 1,
                _ => losses.whole += 1,
            }
        }
        self.cached.clear();
        self.stable_since.clear();
        losses
    }

    /// Makes those sectors of the log's write number `position` stable that `survives` picks; gives how many it picked.
    fn destage(&mut self, write: &Unflushed, position: usize, mut survives: impl FnMut() -> bool) -> usize {
        let first_sector = write.offset_bytes / SECTOR_BYTES as u64;
        let mut survived = 0;
        for index in 0..write.sectors() {
            if !survives() {
                continue;
            }
            survived += 1;
            let sector = first_sector + index as u64;
            if self.stable_since.get(&sector).is_some_and(|&since| position < since) {
                continue;
            }
            let offset_bytes = sector * SECTOR_BYTES as u64;
            let (page, at) = (offset_bytes / PAGE_BYTES as u64, (offset_bytes % PAGE_BYTES as u64) as usize);
            match write.sector(index) {
                Some(bytes) => {
                    let stable = self.stable.entry(page).or_insert_with(zero_page);
                    stable[at..at + SECTOR_BYTES].copy_from_slice(bytes);
                }
                None => {
                    if let Some(stable) = self.stable.get_mut(&page) {
                        stable[at..at + SECTOR_BYTES].fill(0);
                    }
                }
            }
        }
        survived
    }

    fn note_stable(&mut self, offset_bytes: u64, length_bytes: u64) {
        let log_length = self.unflushed.len();
        if log_length == 0 {
            return;
        }
        let first = offset_bytes / SECTOR_BYTES as u64;
        for sector in first..first + length_bytes / SECTOR_BYTES as u64 {
            self.stable_since.insert(sector, log_length);
        }
    }
}

fn zero_page() -> Page {
    Box::new([0; PAGE_BYTES])
}

/// Zeroes a part of a page of which `None` is zeroes already.
fn zero_part(page: &mut Option<Page>, at: usize, length_bytes: usize) {
    if let Some(bytes) = page {
        bytes[at..at + length_bytes].fill(0);
    }
}

fn assert_sectors(offset_bytes: u64, length_bytes: u64) {
    let sector_bytes = SECTOR_BYTES as u64;
    assert!(
        offset_bytes.is_multiple_of(sector_bytes) && length_bytes.is_multiple_of(sector_bytes),
        "a disk writes whole sectors, not {length_bytes} bytes at {offset_bytes}"
    );
}

/// The pages that a range touches: page number, first byte inside the page, and which part of the range it is.
fn pages(
    offset_bytes: u64,
    length_bytes: usize,
) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length_bytes {
            return None;
        }
        let position = offset_bytes + done as u64;
        let at = (position % PAGE_BYTES as u64) as usize;
        let part_bytes = (PAGE_BYTES - at).min(length_bytes - done);
        let range = done..done + part_bytes;
        done += part_bytes;
        Some((position / PAGE_BYTES as u64, at, range))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small enough for every sector to be written many times.
    const SECTORS: usize = 64;
    const IMAGE_BYTES: usize = SECTORS * SECTOR_BYTES;

    fn contents(image: &Image) -> Vec<u8> {
        let mut bytes = vec![0; IMAGE_BYTES];
        image.read(0, &mut bytes);
        bytes
    }

    fn sector_values(image: &Image) -> Vec<u8> {
        contents(image).chunks(SECTOR_BYTES).map(|sector| sector[0]).collect()
    }

    #[test]
    fn a_read_sees_the_newest_write() {
        let mut image = Image::default();
        image.write(512, &[1; 1024], false);
        image.write(1024, &[2; 512], true);
        image.write_zeroes(512, 512, false);
        assert_eq!(sector_values(&image)[..4], [0, 0, 2, 0]);
    }

    #[test]
    fn what_was_flushed_or_written_with_fua_survives_every_power_cut() {
        for seed in 0..200 {
            let mut image = Image::default();
            image.write(0, &[1; 8 * SECTOR_BYTES], false);
            image.flush();
            image.write(8 * 512, &[2; 8 * SECTOR_BYTES], true);
            image.write_zeroes(0, 512, true);
            image.lose_power(seed);
            assert_eq!(sector_values(&image)[..17], [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 0]);
        }
    }

    #[test]
    fn fua_is_not_undone_by_an_older_write_of_the_cache() {
        for seed in 0..200 {
            let mut image = Image::default();
            image.write(0, &[1; 2 * SECTOR_BYTES], false);
            image.write(0, &[2; SECTOR_BYTES], true);
            image.lose_power(seed);
            assert_eq!(sector_values(&image)[0], 2, "seed {seed}");
        }
    }

    #[test]
    fn an_unflushed_write_is_kept_torn_or_lost_and_an_older_one_may_win() {
        let mut seen = Losses::default();
        let mut winners = [false; 3];
        for seed in 0..200 {
            let mut image = Image::default();
            image.write(0, &[1; 8 * SECTOR_BYTES], false);
            image.write(0, &[2; 8 * SECTOR_BYTES], false);
            assert_eq!(image.unflushed.len(), 2);
            let losses = image.lose_power(seed);
            assert_eq!(image.unflushed.len(), 0);
            assert_eq!(losses.whole + losses.torn + losses.lost, 2);
            seen.whole += losses.whole;
            seen.torn += losses.torn;
            seen.lost += losses.lost;
            sector_values(&image)[..8].iter().for_each(|&value| winners[usize::from(value)] = true);
        }
        assert!(seen.whole > 50 && seen.torn > 50 && seen.lost > 50, "{seen:?}");
        assert_eq!(winners, [true; 3], "nothing, the older and the newer write must each win somewhere");
    }

    #[test]
    fn the_same_seed_loses_the_same_writes() {
        let after = |seed| {
            let mut image = Image::default();
            for sector in 0..SECTORS as u64 {
                image.write(sector * 512, &[sector as u8 + 1; SECTOR_BYTES], false);
            }
            image.lose_power(seed);
            contents(&image)
        };
        assert_eq!(after(7), after(7));
        assert_ne!(after(7), after(8));
    }

    /// Against a model that keeps every value a sector may have after a power cut.
    #[test]
    fn every_sector_holds_its_last_stable_value_or_one_written_since() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut image = Image::default();
            let mut possible: Vec<Vec<u8>> = vec![vec![0]; SECTORS];
            for value in 1..100u8 {
                let first = random.usize(0..SECTORS);
                let count = random.usize(1..=(SECTORS - first).min(20));
                let (offset_bytes, length_bytes) = ((first * 512) as u64, count * 512);
                let fua = random.u8(0..4) == 0;
                let written = if random.u8(0..4) == 0 {
                    image.write_zeroes(offset_bytes, length_bytes as u64, fua);
                    0
                } else {
                    image.write(offset_bytes, &vec![value; length_bytes], fua);
                    value
                };
                for values in &mut possible[first..first + count] {
                    if fua {
                        values.clear();
                    }
                    values.push(written);
                }
                if random.u8(0..16) == 0 {
                    image.flush();
                    possible.iter_mut().for_each(|values| drop(values.drain(..values.len() - 1)));
                }
                let newest: Vec<u8> = possible.iter().map(|values| values[values.len() - 1]).collect();
                assert_eq!(sector_values(&image), newest, "seed {seed}");
            }
            image.lose_power(seed);
            for (sector, (value, allowed)) in sector_values(&image).iter().zip(&possible).enumerate() {
                assert!(
                    allowed.contains(value),
                    "seed {seed}, sector {sector}: {value} is none of {allowed:?}"
                );
            }
            assert!(contents(&image).chunks(SECTOR_BYTES).all(|s| s.iter().all(|&byte| byte == s[0])));
        }
    }
}
