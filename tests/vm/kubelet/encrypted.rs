//! An encrypted volume as kubelet has it: the node daemon dies while the header of LUKS is made, the plugin while it is made once more, and
//! the plugin again while the file system is made; then it is used, grown, closed and opened.

use anyhow::{Context as _, Result, ensure};
use testlab::harness::Env;
use testlab::kubelet::{Fault, Step};
use testlab::shell::sh;
use testlab::storage_node::StorageNode;
use tonic::Code;

use super::calls::{Claim, Kind, PASSPHRASE};
use super::world::World;
use super::{is_final, round};
use crate::luks::Stops;

/// The only claim.
const CLAIM: usize = 0;
/// Its pod.
const POD: usize = 0;
/// What a wrong Secret has.
const WRONG: &str = "another-horse-another-staple";

pub(super) fn is_made_by_what_is_killed(env: &Env) -> Result<()> {
    sh("modprobe dm_mod")?;
    let stops = Stops::new(env)?;
    stops.add("mkfs.ext4", "mkfs.ext4", ":")?;
    let mut storage = StorageNode::start(env)?;
    storage.kill_client()?;
    storage.have_the_client_look_in(stops.folder());
    storage.start_client()?;
    let claims = vec![Claim::new(CLAIM, Kind::Encrypted)];
    let mut world = World::new(env, storage, claims, Some(stops.folder()))?;
    let lived = lives(&mut world, &stops);
    lived.with_context(|| world.logged())?;
    world.end()?;
    nobody_has_it(env)
}

fn lives(world: &mut World, stops: &Stops) -> Result<()> {
    take(world, &[Step::Create, Step::ControllerPublish])?;
    is_made(world, stops)?;
    take(world, &[Step::Publish(POD), Step::Use(POD), Step::Look(POD), Step::ControllerExpand])?;
    take(world, &[Step::NodeExpand(POD), Step::Use(POD), Step::Unpublish(POD), Step::Unstage])?;
    // A wrong passphrase opens nothing, leaves nothing, and is no reason to make anything anew.
    WRONG.clone_into(&mut world.claims[CLAIM].passphrase);
    let refused = world.call(CLAIM, Step::Stage).err().context("a wrong passphrase opens it")?;
    ensure!(refused.code() == Code::FailedPrecondition, "{refused}");
    ensure!(refused.message().contains("is wrong") && !refused.message().contains(WRONG), "{refused}");
    world.claims[CLAIM].passphrase.clear();
    let refused = world.call(CLAIM, Step::Stage).err().context("no passphrase opens it")?;
    ensure!(refused.code() == Code::InvalidArgument, "{refused}");
    PASSPHRASE.clone_into(&mut world.claims[CLAIM].passphrase);
    stops.steps()?;
    take(world, &[Step::Stage, Step::Publish(POD), Step::Use(POD), Step::Unpublish(POD), Step::Unstage])?;
    let steps = stops.steps()?;
    ensure!(steps == "open", "{steps}: it is opened, and nothing is made");
    take(world, &[Step::ControllerUnpublish, Step::LateStage, Step::Delete])?;
    world.nothing_is_left()
}

/// The stage, cut off three times.
fn is_made(world: &mut World, stops: &Stops) -> Result<()> {
    stops.before("luksFormat")?;
    let status = world.cut_off(CLAIM, Step::Stage, |world| {
        stops.wait_until_stopped()?;
        world.storage.kill_client()?;
        // Its program goes on without it, and the next daemon waits for that.
        world.storage.start_client()
    })?;
    ensure!(!is_final(status.code()), "the daemon is gone, and comes again: {status}");
    stops.go_on()?;
    // Whose passphrase that header has the next daemon does not know.
    stops.before("luksFormat")?;
    world.cut_off(CLAIM, Step::Stage, |world| {
        stops.wait_until_stopped()?;
        world.restart()
    })?;
    stops.go_on()?;
    stops.before("mkfs.ext4")?;
    world.cut_off(CLAIM, Step::Stage, |world| {
        stops.wait_until_stopped()?;
        world.restart()
    })?;
    stops.go_on()?;
    take(world, &[Step::Stage])?;
    let steps = stops.steps()?;
    ensure!(steps == "luksFormat luksFormat open mkfs.ext4", "{steps}");
    Ok(())
}

/// Steps that succeed, each looked after.
fn take(world: &mut World, steps: &[Step]) -> Result<()> {
    for step in steps {
        round(world, &[(CLAIM, *step)], Fault::None).with_context(|| format!("{step:?}"))?;
    }
    Ok(())
}

/// Neither logs nor state files, the volume's own bytes among them.
fn nobody_has_it(env: &Env) -> Result<()> {
    let files_with = |words: &str| sh(&format!("grep -rlaF {words} {} || true", env.directory.display()));
    ensure!(files_with("-e NodeStageVolume")?.contains("volcsi.log"), "grep finds nothing at all");
    let told = files_with(&format!("-e {PASSPHRASE} -e {WRONG}"))?;
    ensure!(told.is_empty(), "a passphrase is in {told}");
    Ok(())
}
