//! A disk under a grant: what its node may do as long as it has one, and what is left of it when it is taken away.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Result, anyhow, ensure};
use rustix::io::Errno;
use testlab::direct_io::{AlignedBuffer, open_direct};
use testlab::harness::{Env, Test};
use testlab::shell::wait_for;
use testlab::storage_node::StorageNode;

use crate::ride_through::{BOUND, wait_for_state};

pub(crate) const TESTS: &[Test] =
    &[Test::new("grants::a_node_has_the_volume_as_long_as_its_grant", as_long_as_its_grant)
        .within(300)
        .once()];

/// volctl's exit code for what is not granted.
const NOT_GRANTED: i32 = 5;
const BLOCK_BYTES: usize = 4096;
/// As the volume's name, for an attach of a controller's kind.
const UNDER_GRANT: [&str; 2] = ["vol-1", "--only-if-granted"];

fn is_refused(node: &StorageNode) -> Result<()> {
    let complaint = node.volctl(&[&["attach"], &UNDER_GRANT[..]].concat())?.failed_with(NOT_GRANTED)?;
    ensure!(complaint.contains("not granted"), "{complaint}");
    Ok(())
}

/// Writes one block over and over, until it cannot.
fn write_until_it_fails(file: &File, answers: &AtomicU64) -> Result<()> {
    let mut buffer = AlignedBuffer::new(BLOCK_BYTES);
    buffer.bytes().fill(0x5a);
    loop {
        if let Err(error) = file.write_all_at(buffer.bytes(), 0) {
            ensure!(error.raw_os_error() == Some(Errno::IO.raw_os_error()), "not EIO: {error}");
            return Ok(());
        }
        answers.fetch_add(1, Ordering::Relaxed);
    }
}

fn as_long_as_its_grant(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let other = node.start_another_client(env, "node-2")?;
    node.volctl(&["create", "vol-1", "--size", "16M"])?.succeeded()?;
    is_refused(&node)?;
    node.volctl(&["grant", "create", "vol-1", "node-1"])?.succeeded()?;
    node.volctl(&["grant", "create", "vol-1", "node-2"])?.failed_with(NOT_GRANTED)?;
    is_refused(&other)?;
    let device = node.attach(&UNDER_GRANT)?;
    ensure!(node.attachment("vol-1")?["only_if_granted"] == true);
    // Whoever repeats the call, also over a restart of the daemon, finds the disk; and it comes back after its own detach.
    node.kill_client()?;
    node.start_client()?;
    ensure!(node.attach(&UNDER_GRANT)? == device, "it is another disk");
    node.detach("vol-1")?;
    let device = node.attach(&UNDER_GRANT)?;

    let file = open_direct(&device)?;
    let answers = AtomicU64::new(0);
    thread::scope(|scope| {
        let writer = scope.spawn(|| write_until_it_fails(&file, &answers));
        let taken =
            wait_for(
                "the node to write",
                BOUND,
                || Ok((answers.load(Ordering::Relaxed) > 100).then_some(())),
            )
            .and_then(|()| node.volctl(&["grant", "delete", "vol-1", "node-1"])?.succeeded());
        if taken.is_err() {
            // Or the writer would never end.
            node.volctl(&["detach", "vol-1", "--force"]).ok();
        }
        let ended = writer.join().unwrap_or_else(|_| Err(anyhow!("the writer panicked")));
        let taken = taken?;
        ensure!(taken.contains("was taken from"), "{taken}");
        ended
    })?;
    is_refused(&node)?;
    // Another has it now, and what was answered is there.
    node.volctl(&["grant", "create", "vol-1", "node-2"])?.succeeded()?;
    let theirs = open_direct(&other.attach(&UNDER_GRANT)?)?;
    let mut buffer = AlignedBuffer::new(BLOCK_BYTES);
    theirs.read_exact_at(buffer.bytes(), 0)?;
    ensure!(buffer.bytes().iter().all(|byte| *byte == 0x5a), "what was written is not there");
    drop(theirs);
    wait_for_state(&node, "vol-1", "failed", BOUND)?;
    is_refused(&node)?;
    drop(file);
    node.detach("vol-1")?;
    other.detach("vol-1")
}
