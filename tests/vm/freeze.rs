//! Snapshots of frozen file systems: what they hold, and who thaws what, whoever is killed or stuck in between.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::StorageNode;
use uuid::Uuid;

use crate::bad_input::exit_code;

pub(crate) const TESTS: &[Test] = &[
    Test::new("freeze::a_frozen_snapshot_needs_no_recovery", a_frozen_snapshot_needs_no_recovery).within(400),
    Test::new("freeze::a_snapshot_is_frozen_from_elsewhere", a_snapshot_is_frozen_from_elsewhere).within(200),
    Test::new("freeze::nothing_stays_frozen_whoever_is_killed", nothing_stays_frozen).within(400),
    Test::new("freeze::a_disk_that_does_not_answer_holds_up_nobody_else", a_disk_that_does_not_answer)
        .within(400),
];

/// As long as a freeze may last, and as long again for a slow machine.
const THAWED_WITHIN: Duration = Duration::from_secs(30);

fn mounted(env: &Env, node: &StorageNode, volume: &str, mkfs: &str) -> Result<PathBuf> {
    let device = node.create_and_attach(volume, "320M", &[])?;
    let at = env.directory.join(volume);
    fs::create_dir(&at)?;
    sh(&format!("{mkfs} {}; mount {} {}", device.display(), device.display(), at.display()))?;
    Ok(at)
}

/// Writes a file, and tells when that was possible.
fn write_beside(at: &Path) -> Receiver<std::io::Result<()>> {
    let (sender, written) = mpsc::channel();
    let file = at.join(Uuid::new_v4().to_string());
    thread::spawn(move || drop(sender.send(fs::write(file, "x"))));
    written
}

/// Makes sure that nobody can write.
fn is_frozen(at: &Path) -> Result<Receiver<std::io::Result<()>>> {
    let written = write_beside(at);
    ensure!(written.recv_timeout(Duration::from_secs(2)).is_err(), "it is not frozen");
    Ok(written)
}

/// Makes sure that whoever waits gets on.
fn is_thawed(written: &Receiver<std::io::Result<()>>) -> Result<()> {
    written.recv_timeout(THAWED_WITHIN).context("it is frozen still")?.context("the write")
}

fn snapshots(node: &StorageNode) -> Result<serde_json::Value> {
    let listed = node.volctl(&["snapshot", "list", "--output", "json"])?.succeeded()?;
    serde_json::from_str(&listed).context("volctl's JSON")
}

/// The ext4 of a snapshot is to be recovered, unless it was frozen; a group of two, of which one is mounted twice.
fn a_frozen_snapshot_needs_no_recovery(env: &Env) -> Result<()> {
    let node = StorageNode::start_on_xfs(env)?;
    let first = mounted(env, &node, "vol-1", "mkfs.ext4 -q")?;
    let second = mounted(env, &node, "vol-2", "mkfs.xfs -q")?;
    let again = env.directory.join("again");
    fs::create_dir(&again)?;
    sh(&format!("mount --bind {} {}", first.display(), again.display()))?;
    node.volctl(&["create", "vol-3", "--size", "64M"])?.succeeded()?;
    let writers = format!(
        "for at in {} {}; do (while [ -e $at ] && [ ! -e {}/over ]; do dd if=/dev/zero of=$at/busy bs=64k count=16 conv=fsync 2>/dev/null; \
         done) & done; wait",
        first.display(),
        second.display(),
        env.directory.display()
    );
    let mut writers = std::process::Command::new("sh").arg("-c").arg(&writers).spawn()?;
    thread::sleep(Duration::from_secs(2));
    node.volctl(&["snapshot", "create", "vol-1", "plain"])?.succeeded()?;
    let fixed = crate::direct::random_bytes(4 << 20);
    fs::write(second.join("fixed"), &fixed)?;
    let began = Instant::now();
    let created = node.volctl(&["snapshot", "create", "vol-1,vol-2", "s", "--freeze"])?.succeeded()?;
    println!("two file systems were frozen and snapshotted in {:?}", began.elapsed());
    ensure!(created.matches(", frozen").count() == 2, "{created}");
    for volume in ["vol-3", "vol-1,vol-3"] {
        let refused = node.volctl(&["snapshot", "create", volume, "t", "--freeze"])?;
        let refused = refused.failed_with(exit_code::PRECONDITION)?;
        ensure!(refused.contains("volume vol-3 is attached to no node"), "{refused}");
    }
    node.attach(&["vol-3"])?;
    let refused = node.volctl(&["snapshot", "create", "vol-3", "t", "--freeze"])?;
    let refused = refused.failed_with(exit_code::PRECONDITION)?;
    ensure!(refused.contains("vol-3 has no file system that is mounted on this machine"), "{refused}");
    is_thawed(&write_beside(&first))?;
    fs::write(env.directory.join("over"), "")?;
    ensure!(writers.wait()?.success());

    ensure!(needs_recovery(&node, "vol-1@plain")?, "the other way round it would show nothing");
    ensure!(!needs_recovery(&node, "vol-1@s")?, "it was frozen");
    // An XFS has its counters in the log even so, and everything else in its place.
    let (disk, at) = (node.attach(&["vol-2@s"])?, env.directory.join("read"));
    fs::create_dir(&at)?;
    sh(&format!("mount -o ro,norecovery,nouuid {} {}", disk.display(), at.display()))?;
    ensure!(fs::read(at.join("fixed"))? == fixed, "what was written without a sync is there");
    run("umount", &[&at])?;
    node.detach("vol-2@s")?;
    for snapshot in snapshots(&node)?.as_array().context("an array")? {
        ensure!(snapshot["frozen"] == (snapshot["name"] == "s"), "{snapshot}");
    }
    // What is there is not what was asked for.
    let refused = node.volctl(&["snapshot", "create", "vol-1", "plain", "--freeze"])?;
    let refused = refused.failed_with(exit_code::ALREADY_EXISTS)?;
    ensure!(refused.contains("not frozen then"), "{refused}");
    is_thawed(&write_beside(&first))?;

    let refused = freeze_that_somebody_thaws(env, &node, &first)?;
    ensure!(refused.contains("another program has thawed it"), "{refused}");
    ensure!(!snapshots(&node)?.to_string().contains("\"u\""), "{}", snapshots(&node)?);
    for at in [&again, &first, &second] {
        run("umount", &[at])?;
    }
    for volume in ["vol-1", "vol-2", "vol-3"] {
        node.detach(volume)?;
    }
    Ok(())
}

/// Whether the ext4 of a snapshot has a journal to replay; where it has none, it is whole.
fn needs_recovery(node: &StorageNode, snapshot: &str) -> Result<bool> {
    let disk = node.attach(&[snapshot])?;
    let features = sh(&format!("dumpe2fs -h {} 2>/dev/null | grep features", disk.display()))?;
    if !features.contains("needs_recovery") {
        sh(&format!("e2fsck -fn {} >&2", disk.display()))?;
    }
    node.detach(snapshot)?;
    Ok(features.contains("needs_recovery"))
}

/// As from another machine: by volctl over TCP, which finds no node daemon where it runs.
fn a_snapshot_is_frozen_from_elsewhere(env: &Env) -> Result<()> {
    let node = StorageNode::start_on_xfs(env)?;
    let at = mounted(env, &node, "vol-1", "mkfs.ext4 -q")?;
    let elsewhere = |arguments: &[&str]| -> Result<(Option<i32>, String, String)> {
        let mut volctl = node.program("volctl");
        volctl.env("VOLNODE_SOCKET", env.directory.join("none.sock")).args(arguments);
        let output = volctl.output().context("volctl")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
    };
    wait_for("the node is registered", THAWED_WITHIN, || {
        Ok(node.volctl(&["node", "list"])?.succeeded()?.contains("node-1").then_some(()))
    })?;
    let writer = format!(
        "while [ ! -e {0}/over ]; do dd if=/dev/zero of={1}/busy bs=64k count=16 conv=fsync 2>/dev/null; done",
        env.directory.display(),
        at.display()
    );
    let mut writer = std::process::Command::new("sh").arg("-c").arg(&writer).spawn()?;
    thread::sleep(Duration::from_secs(1));
    node.volctl(&["snapshot", "create", "vol-1", "plain"])?.succeeded()?;
    let began = Instant::now();
    let taken = elsewhere(&["--output", "json", "snapshot", "create", "vol-1", "s", "--freeze"])?;
    println!("a file system of another machine was frozen and snapshotted in {:?}", began.elapsed());
    ensure!(taken.0 == Some(0) && began.elapsed() < Duration::from_secs(10), "{taken:?}");
    let created: serde_json::Value = serde_json::from_str(&taken.1).context("volctl's JSON")?;
    ensure!(created[0]["frozen"] == true, "{created}");
    is_thawed(&write_beside(&at))?;
    fs::write(env.directory.join("over"), "")?;
    ensure!(writer.wait()?.success());
    ensure!(needs_recovery(&node, "vol-1@plain")?, "the other way round it would show nothing");
    ensure!(!needs_recovery(&node, "vol-1@s")?, "it was frozen");

    run("umount", &[&at])?;
    let refused = elsewhere(&["snapshot", "create", "vol-1", "t", "--freeze"])?;
    let is_told = refused.2.contains("node-1: vol-1 has no file system that is mounted");
    ensure!(refused.0 == Some(exit_code::PRECONDITION) && is_told, "{refused:?}");
    node.detach("vol-1")?;
    let refused = elsewhere(&["snapshot", "create", "vol-1", "t", "--freeze"])?;
    let is_told = refused.2.contains("volume vol-1 is attached to no node");
    ensure!(refused.0 == Some(exit_code::PRECONDITION) && is_told, "{refused:?}");
    ensure!(!snapshots(&node)?.to_string().contains("\"t\""), "{}", snapshots(&node)?);
    Ok(())
}

/// Somebody thaws the file system all the time: what the snapshot is refused with.
fn freeze_that_somebody_thaws(env: &Env, node: &StorageNode, mount_point: &Path) -> Result<String> {
    let thaws = format!(
        "while [ -e {0}/over ]; do fsfreeze --unfreeze {1} 2>/dev/null; done",
        env.directory.display(),
        mount_point.display()
    );
    let mut thaws = std::process::Command::new("sh").arg("-c").arg(&thaws).spawn()?;
    // On a slow machine a freeze may be over before the next thaw comes.
    let give_up = Instant::now() + Duration::from_secs(120);
    let ended = loop {
        let taken = node.volctl(&["snapshot", "create", "vol-1", "u", "--freeze"])?;
        match taken.failed_with(exit_code::PRECONDITION) {
            Err(_) if Instant::now() < give_up => {
                node.volctl(&["snapshot", "delete", "vol-1@u"])?.succeeded()?;
            }
            ended => break ended,
        }
    };
    fs::remove_file(env.directory.join("over"))?;
    thaws.wait()?;
    ended
}

/// The processes that hold file systems frozen.
fn holders() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        // One that has ended meanwhile, or is no process.
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if command.split(|byte| *byte == 0).any(|word| word == b"hold-frozen") {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

fn nothing_stays_frozen(env: &Env) -> Result<()> {
    let mut node = StorageNode::start_on_xfs(env)?;
    let at = mounted(env, &node, "vol-1", "mkfs.xfs -q")?;

    // Whoever asked is killed: it expires.
    let began = Instant::now();
    let freeze = node.freeze(&["vol-1"])?;
    let written = is_frozen(&at)?;
    is_thawed(&written)?;
    println!("thawed by itself after {:?}", began.elapsed());
    ensure!(began.elapsed() > Duration::from_secs(8), "long before its time");
    ensure!(node.thaw(freeze)?.is_some_and(|why| why.ends_with("it was thawed after 10 s")));

    // As it should be.
    let freeze = node.freeze(&["vol-1"])?;
    let written = is_frozen(&at)?;
    ensure!(node.thaw(freeze)?.is_none(), "it was frozen");
    is_thawed(&written)?;

    // The node daemon is killed: what holds it thaws at once.
    let freeze = node.freeze(&["vol-1"])?;
    let written = is_frozen(&at)?;
    let killed = Instant::now();
    node.kill_client()?;
    is_thawed(&written)?;
    ensure!(killed.elapsed() < Duration::from_secs(6), "{:?}", killed.elapsed());
    node.start_client()?;
    ensure!(node.thaw(freeze)?.is_some(), "the daemon knows nothing of it");

    // Both are: the daemon thaws at its start.
    let freeze = node.freeze(&["vol-1"])?;
    let written = is_frozen(&at)?;
    let holder = holders()?.pop().context("nobody holds it")?;
    // Stopped, so that it has no process do it first.
    sh(&format!("kill -STOP $(ps -o ppid= -p {holder}); kill -KILL {holder}"))?;
    node.kill_client()?;
    ensure!(written.recv_timeout(Duration::from_secs(12)).is_err(), "who has thawed it?");
    node.start_client()?;
    is_thawed(&written)?;
    ensure!(node.thaw(freeze)?.is_some());
    let left = node.run_dir.join("freezes");
    wait_for("what was written down is gone", THAWED_WITHIN, || {
        Ok(fs::read_dir(&left)?.next().is_none().then_some(()))
    })?;

    // What holds it is killed: another process thaws it.
    let freeze = node.freeze(&["vol-1"])?;
    let written = is_frozen(&at)?;
    sh(&format!("kill -KILL {}", holders()?.join(" ")))?;
    is_thawed(&written)?;
    let why = node.thaw(freeze)?.context("it was not frozen all the time")?;
    ensure!(why.contains("was killed"), "{why}");

    // A signal that asks it to end does not end it before its time.
    let freeze = node.freeze(&["vol-1"])?;
    sh(&format!("kill -TERM {}", holders()?.join(" ")))?;
    let written = is_frozen(&at)?;
    ensure!(node.thaw(freeze)?.is_none());
    is_thawed(&written)?;
    let refused = node.freeze(&["vol-1", "vol-9"]).err().context("it was frozen")?.to_string();
    ensure!(refused.contains("vol-9 is not attached"), "{refused}");
    is_thawed(&write_beside(&at))?;
    run("umount", &[&at])?;
    node.detach("vol-1")
}

/// The server is killed with a file system frozen, and before one is.
fn a_disk_that_does_not_answer(env: &Env) -> Result<()> {
    let mut node = StorageNode::start_on_xfs(env)?;
    let at = mounted(env, &node, "vol-1", "mkfs.ext4 -q")?;
    let freeze = node.freeze(&["vol-1"])?;
    let written = is_frozen(&at)?;
    node.kill_server()?;
    let began = Instant::now();
    let why = node.thaw(freeze)?;
    println!("the thaw was answered after {:?}: {why:?}", began.elapsed());
    ensure!(node.attachment("vol-1").is_ok(), "other calls go on");
    node.start_server()?;
    is_thawed(&written)?;

    // A freeze of what is dirty waits for the disk.
    fs::write(at.join("dirty"), vec![7; 1 << 20])?;
    node.kill_server()?;
    let refused = node.freeze_within(&["vol-1"], Duration::from_secs(90));
    let refused = format!("{:#}", refused.err().context("it was frozen")?);
    ensure!(refused.contains("is not synced") || refused.contains("is not frozen"), "{refused}");
    ensure!(node.attachment("vol-1")?["state"] == "stalled", "other calls go on");
    node.start_server()?;
    is_thawed(&write_beside(&at))?;
    wait_for("nobody holds it any more", THAWED_WITHIN, || Ok(holders()?.is_empty().then_some(())))?;
    is_thawed(&write_beside(&at))?;
    run("umount", &[&at])?;
    node.detach("vol-1")
}
