//! What a pod of `cargo lab kubernetes` runs: writes to a file or a block device under an oracle, and says how long it had to wait.
//!
//! Owns the contents of blocks: each is made of a seed and of where it lies, so that anybody can tell later whether it is right.
//! Never: reads from a cache (`O_DIRECT`), or goes on to another block before one is flushed.
//!
//! `write PATH BLOCKS` writes at random until `/stop` is there, and then reads all of them; `fill PATH SEED MIB` and `check PATH SEED MIB`
//! are for what has to be found by somebody else; without arguments it waits for its end, as the sandbox of a pod does.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// One block.
const BLOCK_BYTES: usize = 4096;

/// What `fill` and `check` move at once.
const PIECE_BYTES: u64 = 256 << 10;

/// Between two writes: a load that leaves an emulated machine time for other work.
const PAUSE: Duration = Duration::from_millis(10);

/// Between two lines of what has come of it.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// After an error: so long is it tried no more.
const ERROR_PAUSE: Duration = Duration::from_millis(200);

/// `O_DIRECT` of x86 and of arm64 (`asm/fcntl.h`).
const O_DIRECT: i32 = if cfg!(target_arch = "aarch64") { 0x1_0000 } else { 0x4000 };

/// Whoever makes this file ends the writer.
const STOP: &str = "/stop";

/// A block's bytes, where the kernel takes them from.
#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES]);

/// Many of them.
#[repr(C, align(4096))]
struct Piece([u8; PIECE_BYTES as usize]);

impl Block {
    /// What belongs at `index` for `seed`: eight bytes each of seed and index, and what follows from them.
    fn of(seed: u64, index: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index.wrapping_add(1);
        let mut block = Self([0; BLOCK_BYTES]);
        for (position, word) in block.0.chunks_exact_mut(8).enumerate() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&match position {
                0 => seed.to_le_bytes(),
                1 => index.to_le_bytes(),
                _ => state.to_le_bytes(),
            });
        }
        block
    }

    /// How it differs from what belongs there.
    fn difference(&self, seed: u64, index: u64) -> Option<String> {
        if self.0 == Self::of(seed, index).0 {
            return None;
        }
        let word = |at: usize| u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap_or_default());
        Some(format!("block {index} is of seed {} and block {}, and not of seed {seed}", word(0), word(8)))
    }
}

fn open(path: &Path) -> Result<File> {
    let is_file = !path.starts_with("/dev");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(is_file).custom_flags(O_DIRECT);
    options.open(path).with_context(|| path.display().to_string())
}

/// What has come of the writing so far.
#[derive(Default)]
struct Tally {
    writes: u64,
    errors: u64,
    longest: Duration,
    last_error: String,
}

impl Tally {
    fn say(&self, state: &str) {
        println!(
            "{state} writes={} errors={} longest_ms={} {}",
            self.writes,
            self.errors,
            self.longest.as_millis(),
            self.last_error
        );
    }
}

/// Writes blocks one by one until it is told to stop, and reads all that it wrote.
fn write(path: &Path, blocks: u64) -> Result<()> {
    let file = open(path)?;
    let mut written = vec![0_u64; usize::try_from(blocks)?];
    let mut tally = Tally::default();
    let mut reported = Instant::now();
    let mut seed = 0_u64;
    tally.say("begun");
    while !Path::new(STOP).exists() {
        seed += 1;
        let index = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks;
        let began = Instant::now();
        let done = file
            .write_all_at(&Block::of(seed, index).0, index * BLOCK_BYTES as u64)
            .and_then(|()| file.sync_data());
        tally.longest = tally.longest.max(began.elapsed());
        match done {
            Ok(()) => {
                tally.writes += 1;
                written[usize::try_from(index)?] = seed;
                thread::sleep(PAUSE);
            }
            Err(error) => {
                tally.errors += 1;
                tally.last_error = error.to_string();
                thread::sleep(ERROR_PAUSE);
            }
        }
        if reported.elapsed() > REPORT_INTERVAL {
            tally.say("writing");
            reported = Instant::now();
        }
    }
    for (index, seed) in written.iter().enumerate().filter(|(_, seed)| **seed != 0) {
        expect(&file, *seed, index as u64)?;
    }
    tally.say("right");
    Ok(())
}

fn expect(file: &File, seed: u64, index: u64) -> Result<()> {
    let mut block = Block([0; BLOCK_BYTES]);
    file.read_exact_at(&mut block.0, index * BLOCK_BYTES as u64).with_context(|| format!("block {index}"))?;
    block.difference(seed, index).map_or(Ok(()), |difference| bail!("wrong: {difference}"))
}

/// The first block of each piece of this many mebibytes.
fn pieces(mebibytes: u64) -> impl Iterator<Item = u64> {
    (0..(mebibytes << 20) / PIECE_BYTES).map(|piece| piece * (PIECE_BYTES / BLOCK_BYTES as u64))
}

fn fill(path: &Path, seed: u64, mebibytes: u64) -> Result<()> {
    let file = open(path)?;
    let mut piece = Box::new(Piece([0; PIECE_BYTES as usize]));
    for first in pieces(mebibytes) {
        for (index, block) in (first..).zip(piece.0.chunks_exact_mut(BLOCK_BYTES)) {
            block.copy_from_slice(&Block::of(seed, index).0);
        }
        let at = first * BLOCK_BYTES as u64;
        file.write_all_at(&piece.0, at).with_context(|| format!("block {first}"))?;
    }
    file.sync_all().context("flushing")?;
    println!("filled");
    Ok(())
}

fn check(path: &Path, seed: u64, mebibytes: u64) -> Result<()> {
    let file = open(path)?;
    let mut piece = Box::new(Piece([0; PIECE_BYTES as usize]));
    for first in pieces(mebibytes) {
        let at = first * BLOCK_BYTES as u64;
        file.read_exact_at(&mut piece.0, at).with_context(|| format!("block {first}"))?;
        for (index, bytes) in (first..).zip(piece.0.chunks_exact(BLOCK_BYTES)) {
            let mut block = Block([0; BLOCK_BYTES]);
            block.0.copy_from_slice(bytes);
            if let Some(difference) = block.difference(seed, index) {
                bail!("wrong: {difference}");
            }
        }
    }
    println!("right");
    Ok(())
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        [] => loop {
            thread::park();
        },
        ["write", path, blocks] => write(Path::new(path), blocks.parse()?),
        ["fill", path, seed, mebibytes] => fill(Path::new(path), seed.parse()?, mebibytes.parse()?),
        ["check", path, seed, mebibytes] => check(Path::new(path), seed.parse()?, mebibytes.parse()?),
        _ => bail!("no such work: {words:?}"),
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Block;

    #[test]
    fn a_block_of_another_seed_or_place_is_told_apart() {
        assert!(Block::of(7, 3).difference(7, 3).is_none());
        for (seed, index) in [(7, 4), (8, 3), (0, 0)] {
            assert!(Block::of(seed, index).difference(7, 3).is_some(), "{seed} {index}");
        }
        let mut torn = Block::of(7, 3);
        torn.0[4095] ^= 1;
        assert!(torn.difference(7, 3).is_some());
    }
}
