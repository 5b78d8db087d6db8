//! The seed of a test that chooses by chance: printed, so that a failure can be run again, and given back by
//! `VOLNODE_SEED`.
//!
//! Owns no generator; tests make theirs from the seed. What a seed replays is the test's own choices, never the
//! scheduling of threads.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

/// Gives the seed instead of the clock, as a decimal number.
pub const SEED_VARIABLE: &str = "VOLNODE_SEED";

/// Chooses a seed and prints it.
///
/// # Errors
/// [`SEED_VARIABLE`] is set to something else than a number.
pub fn choose() -> Result<u64> {
    let seed = match std::env::var(SEED_VARIABLE) {
        Ok(text) => text.parse().with_context(|| format!("{SEED_VARIABLE}={text:?} is not a number"))?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).context("the clock")?.as_secs(),
    };
    println!("seed {seed}: {SEED_VARIABLE}={seed} makes the same choices again");
    Ok(seed)
}
