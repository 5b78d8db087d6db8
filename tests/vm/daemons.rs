//! The daemons around the data path: what protects them, and what happens when one of them dies.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::{run, wait_for};
use testlab::storage_node::StorageNode;

use crate::direct;

pub(crate) const TESTS: &[Test] = &[
    Test::new("daemons::a_device_process_is_protected", a_device_process_is_protected),
    Test::new("daemons::io_does_not_notice_a_new_node_daemon", io_does_not_notice_a_new_node_daemon),
    Test::new("daemons::an_old_session_is_fenced_by_a_new_one", an_old_session_is_fenced_by_a_new_one),
    Test::new("daemons::no_secret_is_shown", no_secret_is_shown).once(),
];

/// `PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE` of `include/linux/sched.h`: what `PR_SET_IO_FLUSHER` sets.
const IO_FLUSHER_FLAGS: u64 = 0x0008_0000 | 0x0010_0000;

fn pid_of(node: &StorageNode, target: &str) -> Result<u64> {
    node.attachment(target)?["pid"].as_u64().context("pid")
}

fn a_device_process_is_protected(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    node.create_and_attach("vol-1", "64M", &[])?;
    let pid = pid_of(&node, "vol-1")?;
    ensure!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim() == "-1000");
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let locked = status.lines().find(|line| line.starts_with("VmLck:")).context("VmLck")?;
    ensure!(!locked.contains(" 0 kB"), "no memory is locked: {locked}");
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // Threads come and go.
        let Ok(stat) = fs::read_to_string(thread?.path().join("stat")) else { continue };
        // Behind the name in parentheses: state, ppid, pgrp, session, tty, tpgid, flags.
        let flags =
            stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6)).context("flags")?;
        let flags: u64 = flags.parse()?;
        ensure!(flags & IO_FLUSHER_FLAGS == IO_FLUSHER_FLAGS, "a thread is no I/O flusher: {stat}");
    }
    node.detach("vol-1")
}

fn io_does_not_notice_a_new_node_daemon(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let pid = pid_of(&node, "vol-1")?;
    node.kill_client()?;
    let bytes = direct::random_bytes(8 << 20);
    direct::write(&device, 0, &bytes)??;
    node.start_client()?;
    ensure!(pid_of(&node, "vol-1")? == pid, "the new daemon adopts what runs");
    ensure!(node.attach(&["vol-1"])? == device, "and makes no second device");
    ensure!(direct::read(&device, 0, bytes.len())?? == bytes, "the disk holds something else");
    direct::write(&device, 0, &bytes)??;
    node.detach("vol-1")
}

/// The export name of an attachment whose secret we know, as a device process opens it.
fn open_export(node: &StorageNode, epoch: u64) -> Result<std::process::Output> {
    let (attachment_id, secret) = attachment_secret(node)?;
    let uri = format!("nbd://{}/{attachment_id}.{secret}/{epoch}/0", node.data_address);
    // nbdinfo asks by INFO and GO, and ends.
    std::process::Command::new("nbdinfo").args(["--size", &uri]).output().context("nbdinfo")
}

fn attachment_secret(node: &StorageNode) -> Result<(String, String)> {
    let folder = fs::read_dir(node.run_dir.join("attachments"))?.next().context("no attachment")??.path();
    let spec: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("spec.json"))?)?;
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let attachment_id = text(&spec["attachment_id"]).context("attachment_id")?;
    Ok((attachment_id, text(&spec["export"]["secret"]).context("secret")?))
}

fn an_old_session_is_fenced_by_a_new_one(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let epoch = node.attachment("vol-1")?["session_epoch"].as_u64().context("session_epoch")?;
    let older = open_export(&node, epoch - 1)?;
    ensure!(!older.status.success(), "an older session was let in");
    let newer = open_export(&node, epoch + 1)?;
    ensure!(newer.status.success(), "{}", String::from_utf8_lossy(&newer.stderr));
    // The session before is closed: its device answers with errors, never late writes.
    let written =
        run("dd", &["if=/dev/zero", &format!("of={}", device.display()), "bs=4k", "count=1", "oflag=direct"]);
    ensure!(written.is_err(), "a fenced session wrote");
    wait_for("the end to be told", Duration::from_secs(30), || {
        Ok((node.attachment("vol-1")?["state"] == "failed").then_some(()))
    })?;
    node.detach("vol-1")
}

fn no_secret_is_shown(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    node.create_and_attach("vol-1", "64M", &[])?;
    let (_, secret) = attachment_secret(&node)?;
    let mut shown = String::new();
    for command in [&["attachments"][..], &["show", "vol-1"], &["list"]] {
        for output in ["table", "json"] {
            shown += &node.volctl(&[command, &["--output", output]].concat())?.succeeded()?;
        }
    }
    node.kill_server()?;
    node.start_server()?;
    node.detach("vol-1")?;
    for log in fs::read_dir(env.directory.join("logs"))? {
        shown += &fs::read_to_string(log?.path())?;
    }
    ensure!(shown.contains("vol-1") && !shown.contains(&secret), "a secret is shown");
    Ok(())
}
