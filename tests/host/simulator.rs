//! The simulator: ten thousand simulations without a broken promise, every rule tried, and every broken rule noticed. A test binary of its
//! own: the lab runs it beside all others.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

use std::time::Instant;

use testlab::simulator::{Coverage, Failure, Mutant, Stage};

/// Simulations of one run, some 220 requests each; always the same ones, so that what fails is what was changed. `cargo lab soak
/// --sim` takes others each time.
const SEEDS: u64 = 10_000;
const FIRST_SEED: u64 = 1;
/// A broken rule is noticed within so many.
const SEEDS_OF_A_MUTANT: u64 = 3_000;

/// What has to come up, or a rule was not tried.
const SITUATIONS: [&str; 76] = [
    "a FLUSH of a foreign server's disk fails",
    "a change waits for a copy",
    "a device process of a foreign server's disk is killed",
    "a foreign server dies and leaves all to the next one",
    "a foreign server ends in order",
    "a queue leaves a foreign server that ends",
    "a queue of a foreign server's disk comes late",
    "a read of a foreign server's disk is given up",
    "a foreign server dies with what was not flushed",
    "a foreign server grants no more connections",
    "a foreign server's disk is flushed at last",
    "a foreign server's disk is served by some of its queues",
    "a read of a foreign server's disk is checked",
    "an answer comes of a foreign server that is gone",
    "a device is detached with everything flushed",
    "a device is detached without its last FLUSH",
    "a loss of a volume that is not open",
    "a record cannot be replaced",
    "a server ends in order",
    "a server is killed as it starts",
    "a server is killed while it opens a volume",
    "a sync of the control side fails",
    "a volume is withheld because its loss is recorded nowhere",
    "what was written is durable before the next holder comes",
    "a connection is closed with I/O under way",
    "a first write cannot be recorded",
    "a first write waits for its mark",
    "a loss is recorded nowhere",
    "a connection is swallowed",
    "a connection stands still",
    "a copy ends because its source lost writes",
    "a copy is ready",
    "a device process is killed",
    "a new connection closes an older one",
    "a payload is taken before its turn",
    "a power cut",
    "a read is checked",
    "a reply that came twice",
    "a reply to nothing",
    "a request fails",
    "a request fails with the process of a foreign server's disk",
    "a request that the next process gets again",
    "a request waits for its turn",
    "a server is killed between two outputs of the gate",
    "a server is killed while it copies a volume",
    "a server is killed with I/O under way",
    "a server of another incarnation",
    "a server that forgot is noticed",
    "a stranger is let in",
    "a stranger is refused",
    "a sync fails",
    "a sync that was waited for",
    "an incarnation is raised",
    "the kernel fails to write back",
    "what could not be written back is evicted",
    "the file system is mounted anew",
    "what the storage lost while nobody had it open is noticed",
    "a volume is let go",
    "a volume that lost writes is not copied",
    "a volume's lock is waited for",
    "an attachment is fenced",
    "an epoch cannot be recorded",
    "an epoch that is over is refused",
    "an open of an attachment that is no more",
    "an open takes too long",
    "bytes come after a loss",
    "draining lets a connection in",
    "a probe is answered",
    "a probe is not answered",
    "replies are due for long",
    "the catalog fails",
    "the disk takes long for a sync",
    "the gate is interrupted",
    "the holder of a volume is to come again",
    "requests are given up",
    "requests are sent again",
];

fn stage() -> (tempfile::TempDir, Stage) {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path()).unwrap();
    (dir, stage)
}

#[test]
fn ten_thousand_simulations_keep_every_promise() {
    let (_dir, stage) = stage();
    let began = Instant::now();
    let coverage = match stage.run_many(FIRST_SEED, SEEDS) {
        Ok(coverage) => coverage,
        Err((seed, failure)) => panic!("cargo lab soak --sim --seeds 1 --seed {seed}: {failure}"),
    };
    println!("{SEEDS} simulations in {:?}", began.elapsed());
    for (situation, count) in coverage.counts() {
        println!("{count:>9}  {situation}");
    }
    for situation in SITUATIONS {
        assert!(coverage.of(situation) > 0, "it never came up: {situation}");
    }
}

#[test]
fn a_seed_is_always_the_same_simulation() {
    let (_dir, stage) = stage();
    let run = |seed| {
        let mut coverage = Coverage::default();
        stage.run(seed, None, &mut coverage).unwrap();
        coverage.counts().collect::<Vec<_>>()
    };
    for seed in 1..20 {
        assert_eq!(run(seed), run(seed), "seed {seed}");
    }
    assert_ne!(run(1), run(2));
}

#[test]
fn every_broken_rule_is_noticed() {
    let (_dir, stage) = stage();
    let mut unnoticed = Vec::new();
    for mutant in Mutant::ALL {
        match stage.first_to_notice(mutant, SEEDS_OF_A_MUTANT) {
            Some((seed, how)) => println!("{mutant:?}: seed {seed}: {how}"),
            None => unnoticed.push(mutant),
        }
    }
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}

#[test]
fn a_failure_says_what_it_is() {
    let (_dir, stage) = stage();
    let mut coverage = Coverage::default();
    let failure = (1..).find_map(|seed| stage.run(seed, Some(Mutant::SwappedBlocks), &mut coverage).err());
    assert!(matches!(failure, Some(Failure::Violation(_))), "{failure:?}");
}
