//! Against a model of a file system: blocks at addresses, which files share, and which move while they are looked at.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::super::compare::{Change, add};
use super::*;

const BLOCK: u64 = 4096;
const BLOCKS: usize = 64;
/// Base and target, by their number.
const BASE: usize = 0;
const TARGET: usize = 1;

/// SplitMix64 (Steele, Lea, Flood 2014): enough for choices.
struct Choices(u64);

impl Choices {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// What a block of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Hole,
    Unwritten,
    At(u64),
    /// Compressed or inline, with these bytes.
    Hidden(u64),
}

#[derive(Debug, Default)]
struct Disk {
    files: Vec<Vec<Block>>,
    /// What is at an address; a free one has what it had.
    content: HashMap<u64, u64>,
    reads: u32,
}

impl Disk {
    /// The lowest address that no file has: those that became free are used again at once.
    fn free_address(&self) -> u64 {
        let used = |address: &u64| self.files.iter().flatten().any(|block| *block == Block::At(*address));
        (0..).find(|address| !used(address)).unwrap()
    }

    fn write(&mut self, file: usize, block: usize, value: u64) {
        let address = self.free_address();
        self.content.insert(address, value);
        self.files[file][block] = Block::At(address);
    }

    fn value(&self, file: usize, block: usize) -> u64 {
        match self.files[file].get(block) {
            None | Some(Block::Hole | Block::Unwritten) => 0,
            Some(Block::At(address)) => self.content[address],
            Some(Block::Hidden(value)) => *value,
        }
    }

    /// Gives a block of one file another place, with the bytes that it has.
    fn relocate(&mut self, file: usize, block: usize) {
        if let Block::At(address) = self.files[file][block] {
            let value = self.content[&address];
            // Its own place is not free yet.
            self.write(file, block, value);
        }
    }
}

/// Something that moves extents before a map is read.
type Mover = Rc<dyn Fn(&mut Disk)>;

struct Model {
    disk: Rc<RefCell<Disk>>,
    file: usize,
    runs_max: usize,
    mover: Mover,
}

impl ExtentMap for Model {
    fn capacity_bytes(&self) -> u64 {
        self.disk.borrow().files[self.file].len() as u64 * BLOCK
    }

    fn read(&self, range: &Range<u64>, runs: &mut Vec<Run>) -> io::Result<u64> {
        let mut disk = self.disk.borrow_mut();
        disk.reads += 1;
        (self.mover)(&mut disk);
        runs.clear();
        for (number, block) in disk.files[self.file].iter().enumerate() {
            let bytes = number as u64 * BLOCK..(number as u64 + 1) * BLOCK;
            let place = match block {
                Block::Hole | Block::Unwritten => continue,
                Block::At(address) => Place::At(address * BLOCK),
                Block::Hidden(_) => Place::Unknown,
            };
            let Some(run) = (Run { bytes, place }).within(range) else { continue };
            if runs.len() == self.runs_max {
                return Ok(runs.last().unwrap().bytes.end);
            }
            runs.push(run);
        }
        Ok(range.end)
    }
}

/// A base and what became of it: written, equal bytes written again, trimmed, grown. And the blocks that were touched.
fn history(choices: &mut Choices) -> (Disk, Vec<bool>) {
    let base_blocks = BLOCKS - choices.below(8) as usize;
    let mut disk = Disk { files: vec![vec![Block::Hole; base_blocks]], ..Disk::default() };
    for block in 0..base_blocks {
        let value = 1 + choices.below(3);
        match choices.below(6) {
            0 => disk.files[BASE][block] = Block::Unwritten,
            1 => disk.files[BASE][block] = Block::Hidden(value),
            2 => {}
            _ => disk.write(BASE, block, value),
        }
    }
    let mut grown = disk.files[BASE].clone();
    grown.resize(BLOCKS, Block::Hole);
    disk.files.push(grown);
    let mut touched = vec![false; BLOCKS];
    for _ in 0..choices.below(40) {
        let block = choices.below(BLOCKS as u64) as usize;
        touched[block] = true;
        let (value, equal) = (1 + choices.below(3), disk.value(TARGET, block));
        match choices.below(6) {
            0 => disk.files[TARGET][block] = Block::Hole,
            1 => disk.files[TARGET][block] = Block::Unwritten,
            2 => disk.write(TARGET, block, equal),
            3 => disk.files[TARGET][block] = Block::Hidden(value),
            _ => disk.write(TARGET, block, value),
        }
    }
    (disk, touched)
}

/// All changes of a range of the target, with so many runs to an answer.
fn walked(
    disk: &Rc<RefCell<Disk>>,
    base: Option<usize>,
    range: Range<u64>,
    mover: &Mover,
    runs_max: usize,
) -> Vec<Changed> {
    let model = |file| Model { disk: Rc::clone(disk), file, runs_max, mover: Rc::clone(mover) };
    let mut walk = Walk::new(base.map(model), model(TARGET), &range);
    let (mut all, mut part) = (Vec::new(), Vec::new());
    let mut before = walk.offset_bytes();
    while walk.next(&mut part).unwrap() {
        assert!(walk.offset_bytes() > before, "there is progress");
        before = walk.offset_bytes();
        assert!(part.iter().all(|changed| changed.bytes.end <= before), "no further than told");
        part.drain(..).for_each(|changed| add(&mut all, changed));
    }
    assert!(walk.is_done());
    let follow = |pair: &[Changed]| pair[0].bytes.end <= pair[1].bytes.start;
    assert!(all.windows(2).all(follow) && all.iter().all(|changed| !changed.bytes.is_empty()), "{all:?}");
    all
}

fn told(changes: &[Changed], block: usize) -> Option<Change> {
    let at = block as u64 * BLOCK;
    changes.iter().find(|changed| changed.bytes.contains(&at)).map(|changed| changed.change)
}

fn nobody() -> Mover {
    Rc::new(|_| {})
}

/// Repeats with the seed of a failure: `VOLNODE_SEED`.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("VOLNODE_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..count).collect(),
    }
}

#[test]
fn every_byte_that_differs_is_told_and_no_block_that_nobody_touched() {
    for seed in seeds(2000) {
        let mut choices = Choices(seed);
        let (disk, touched) = history(&mut choices);
        let disk = Rc::new(RefCell::new(disk));
        let runs_max = 1 + choices.below(9) as usize;
        let changes = walked(&disk, Some(BASE), 0..u64::MAX, &nobody(), runs_max);
        let disk = disk.borrow();
        for (block, is_touched) in touched.into_iter().enumerate() {
            let (before, now) = (disk.value(BASE, block), disk.value(TARGET, block));
            let hidden = matches!(disk.files[TARGET][block], Block::Hidden(_));
            let change = told(&changes, block);
            assert!(before == now || change.is_some(), "seed {seed}: block {block} is not told");
            assert!(is_touched || hidden || change.is_none(), "seed {seed}: block {block} is told");
            assert!(change != Some(Change::Zero) || now == 0, "seed {seed}: block {block} is no zeroes");
        }
    }
}

#[test]
fn without_a_base_what_has_bytes_is_told() {
    for seed in seeds(200) {
        let (disk, _) = history(&mut Choices(seed));
        let disk = Rc::new(RefCell::new(disk));
        let changes = walked(&disk, None, 0..u64::MAX, &nobody(), 5);
        let disk = disk.borrow();
        for block in 0..BLOCKS {
            let has_bytes = matches!(disk.files[TARGET][block], Block::At(_) | Block::Hidden(_));
            assert_eq!(told(&changes, block), has_bytes.then_some(Change::Data), "seed {seed}: {block}");
        }
    }
}

#[test]
fn parts_of_a_walk_tell_what_the_whole_tells() {
    for seed in seeds(500) {
        let mut choices = Choices(seed);
        let disk = Rc::new(RefCell::new(history(&mut choices).0));
        let whole = walked(&disk, Some(BASE), 0..u64::MAX, &nobody(), 7);
        let cut = choices.below(BLOCKS as u64 * BLOCK + 1);
        let mut parts = walked(&disk, Some(BASE), 0..cut, &nobody(), 3);
        let rest = walked(&disk, Some(BASE), cut..u64::MAX, &nobody(), 4);
        rest.into_iter().for_each(|changed| add(&mut parts, changed));
        assert_eq!(parts, whole, "seed {seed}, cut at {cut}");
    }
}

#[test]
fn what_moves_while_it_is_looked_at_is_not_taken_for_what_came_to_its_place() {
    for seed in seeds(2000) {
        let mut choices = Choices(seed);
        let (disk, _) = history(&mut choices);
        let disk = Rc::new(RefCell::new(disk));
        let choices = RefCell::new(Choices(choices.below(u64::MAX)));
        // One file after the other, so that the second may come to where the first was.
        let mover: Mover = Rc::new(move |disk: &mut Disk| {
            let mut choices = choices.borrow_mut();
            let first = choices.below(disk.files[BASE].len() as u64 - 2) as usize;
            for block in first..first + 1 + choices.below(2) as usize {
                disk.relocate(BASE, block);
                disk.relocate(TARGET, block);
            }
        });
        let changes = walked(&disk, Some(BASE), 0..u64::MAX, &mover, 16);
        let disk = disk.borrow();
        for block in 0..BLOCKS {
            let differs = disk.value(BASE, block) != disk.value(TARGET, block);
            assert!(!differs || told(&changes, block).is_some(), "seed {seed}: block {block} is not told");
        }
    }
}

#[test]
fn a_base_that_never_rests_counts_as_another_and_the_walk_ends() {
    let (disk, _) = history(&mut Choices(7));
    let disk = Rc::new(RefCell::new(disk));
    let mover: Mover = Rc::new(|disk: &mut Disk| {
        for block in 0..disk.files[BASE].len() {
            disk.relocate(BASE, block);
        }
    });
    let changes = walked(&disk, Some(BASE), 0..u64::MAX, &mover, 1000);
    let disk = disk.borrow();
    for block in 0..BLOCKS {
        let is_zero = matches!(disk.files[TARGET][block], Block::Hole | Block::Unwritten);
        let expected = if is_zero { Change::Zero } else { Change::Data };
        assert_eq!(told(&changes, block), Some(expected), "block {block}");
    }
    assert_eq!(disk.reads, 3 * LOOKS + 1, "one window");
}
