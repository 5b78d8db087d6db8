//! An imitation of kubelet and the sidecars: volumes live as pods have them, over real disks, with volcsi killed between any two calls and
//! within them, calls repeated while the first still runs, and callers who hang up.
//!
//! `testlab::kubelet` chooses what is called and what goes wrong, by a seed; this carries it out, and looks after each step. What has to hold:
//! a pod reads all that was ever written, and whatever is taken back (a target, a staging, a grant, a volume) has left nothing behind.

mod calls;
mod encrypted;
mod world;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fastrand::Rng;
use testlab::harness::{Env, Test};
use testlab::kubelet::{Fault, Step};
use testlab::seed;
use testlab::storage_node::StorageNode;
use tonic::{Code, Status};

use calls::{Claim, Kind};
use world::World;

pub(crate) const TESTS: &[Test] = &[
    Test::new("kubelet::volumes_live_through_a_plugin_that_is_killed", half_a_minute).within(400).once(),
    Test::new(
        "kubelet::an_encrypted_volume_is_made_by_a_plugin_and_a_daemon_that_are_killed",
        encrypted::is_made_by_what_is_killed,
    )
    .within(300)
    .once(),
    Test::new("kubelet::volumes_live_through_a_plugin_that_is_killed_for_long", ten_minutes)
        .within(1500)
        .once()
        .long(),
];

/// Kubelet repeats a call for ever; here it has succeeded by then, or the test has failed.
const REPEAT_DEADLINE: Duration = Duration::from_secs(120);
/// However slow the machine is: some of the calls, and some deaths among them. A machine of usual speed gets further in the time.
const ROUNDS_MIN: u32 = 5;
/// Between two repeats.
const REPEAT_PAUSE: Duration = Duration::from_millis(200);

fn half_a_minute(env: &Env) -> Result<()> {
    lives(env, &[Kind::Ext4, Kind::Block], Duration::from_secs(25))
}

fn ten_minutes(env: &Env) -> Result<()> {
    lives(env, &[Kind::Ext4, Kind::Block, Kind::Xfs, Kind::Ext4], Duration::from_secs(600))
}

/// Rounds for so long, and then nothing is left.
fn lives(env: &Env, kinds: &[Kind], time: Duration) -> Result<()> {
    let mut rng = Rng::with_seed(seed::choose()?);
    let storage = StorageNode::start(env)?;
    let claims = kinds.iter().enumerate().map(|(number, kind)| Claim::new(number, *kind)).collect();
    let mut world = World::new(env, storage, claims, None)?;
    let (began, mut rounds, mut kills) = (Instant::now(), 0, 0);
    let outcome = (|| {
        while began.elapsed() < time || rounds < ROUNDS_MIN {
            let fault = Fault::choose(&mut rng);
            kills += u32::from(matches!(
                fault,
                Fault::KilledBefore | Fault::KilledDuring(_) | Fault::RepeatedByAnother
            ));
            // One volume after the other, or several at once: the driver is all of theirs.
            let is_alone = rng.bool();
            let first = rng.usize(0..world.claims.len());
            let chosen: Vec<(usize, Step)> = (0..world.claims.len())
                .filter(|number| !is_alone || *number == first)
                .map(|number| (number, world.claims[number].life.next(&mut rng)))
                .collect();
            round(&mut world, &chosen, fault)
                .with_context(|| format!("round {rounds}: {chosen:?}, {fault:?}"))?;
            rounds += 1;
        }
        for number in 0..world.claims.len() {
            while let Some(step) = world.claims[number].life.way_out() {
                round(&mut world, &[(number, step)], Fault::None)
                    .with_context(|| format!("at the end: {step:?}"))?;
            }
        }
        world.nothing_is_left()
    })();
    println!("{rounds} rounds, {kills} kills, {} s", began.elapsed().as_secs());
    outcome.with_context(|| world.logged())?;
    world.end()
}

/// The steps at once, with a fault; each is repeated until it has succeeded, and then looked after.
fn round(world: &mut World, chosen: &[(usize, Step)], fault: Fault) -> Result<()> {
    if fault == Fault::KilledBefore {
        world.restart()?;
    }
    let outcomes = world.begin(chosen, fault)?;
    for ((number, step), outcome) in chosen.iter().zip(outcomes) {
        settle(world, *number, *step, outcome)?;
    }
    if matches!(fault, Fault::Repeated | Fault::RepeatedByAnother) {
        if fault == Fault::RepeatedByAnother {
            world.restart()?;
        }
        for (number, step) in chosen {
            let again = world.call(*number, *step);
            settle(world, *number, *step, again).context("the repeat")?;
        }
    }
    for (number, step) in chosen {
        world.look(*number, *step).with_context(|| format!("after {step:?}"))?;
        world.claims[*number].life.done(*step);
    }
    Ok(())
}

/// Repeats a step until it has ended as it has to.
fn settle(world: &mut World, number: usize, step: Step, mut outcome: Result<(), Status>) -> Result<()> {
    let deadline = Instant::now() + REPEAT_DEADLINE;
    loop {
        match (step, outcome) {
            (Step::LateStage, Ok(())) => bail!("a stage that came late was done"),
            (Step::LateStage, Err(status)) if status.code() == Code::FailedPrecondition => {
                ensure!(status.message().contains("not granted"), "{status}");
                return Ok(());
            }
            (_, Ok(())) => return Ok(()),
            // Nothing that kubelet repeats makes these good.
            (_, Err(status)) if is_final(status.code()) => bail!("{step:?}: {status}"),
            (_, Err(status)) if Instant::now() > deadline => bail!("{step:?} goes on failing: {status}"),
            (_, Err(_)) => {}
        }
        std::thread::sleep(REPEAT_PAUSE);
        outcome = world.call(number, step);
    }
}

/// Whether the request itself is said to be wrong: none of them is.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::OutOfRange
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented
            | Code::DataLoss
            | Code::ResourceExhausted
    )
}
