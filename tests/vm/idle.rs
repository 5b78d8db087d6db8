//! A disk that nobody uses costs next to nothing: no wake-up, and little memory.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::process_resources::{Activity, Memory};
use testlab::shell::wait_for;
use testlab::storage_node::StorageNode;

pub(crate) const TESTS: &[Test] =
    &[Test::new("idle::an_idle_attachment_sleeps_and_is_small", an_idle_attachment_sleeps_and_is_small)];

/// Longer than any timer a daemon might have for its own sake.
const IDLE: Duration = Duration::from_secs(5);
/// The kernel and udev look at a new disk; a slow machine is done with that by then.
const SETTLE_DEADLINE: Duration = Duration::from_secs(60);
/// What a device process may have for itself.
const ANONYMOUS_MAX_KIB: u64 = 1_280;
/// The same with the pages of the program and its libraries, which all device processes share. How many of those are mapped is the
/// kernel's choice: around each fault, as many as it has at hand.
const RSS_MAX_KIB: u64 = 10 << 10;

fn an_idle_attachment_sleeps_and_is_small(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    node.create_and_attach("vol-1", "64M", &["--backend", "memory"])?;
    let pid = node.attachment("vol-1")?["pid"].as_u64().context("pid")?;
    let pid = u32::try_from(pid)?;
    // Time in which nothing may happen is what this is about; it begins anew whenever something did.
    let (mut before, mut since) = (Activity::of(pid)?, Instant::now());
    let activity = wait_for("the new disk to be left alone", SETTLE_DEADLINE, || {
        let activity = Activity::of(pid)?.since(&before);
        if activity.switches > 0 {
            (before, since) = (Activity::of(pid)?, Instant::now());
        }
        Ok((activity.switches == 0 && since.elapsed() >= IDLE).then_some(activity))
    })?;
    ensure!(activity.cpu_ns == 0, "an idle device process ran: {activity:?}");
    let memory = Memory::of(pid)?;
    println!("{activity:?} in {IDLE:?}, {memory:?}");
    let is_small = memory.anonymous_kib < ANONYMOUS_MAX_KIB && memory.rss_kib < RSS_MAX_KIB;
    ensure!(is_small, "an idle device process is large: {memory:?}");
    node.detach("vol-1")
}
