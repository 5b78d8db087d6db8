//! Limits of a volume under a disk: a limit is no outage, however low it is; and what attaching does not write.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::storage_node::StorageNode;

pub(crate) const TESTS: &[Test] =
    &[Test::new("limits::one_request_per_second_loses_no_connection", one_request_per_second)
        .once()
        .within(300)];

/// With so many connections each has a reply every 32 seconds: longer than a server of ours may be silent.
const CONNECTIONS: &str = "32";
/// Longer than that, and than it takes to give a silent connection up.
const LENGTH: Duration = Duration::from_secs(50);
/// What is left is done at once when there are no limits any more.
const REST: Duration = Duration::from_secs(60);

fn one_request_per_second(env: &Env) -> Result<()> {
    let node = StorageNode::start_on_xfs(env)?;
    node.volctl(&["create", "vol-1", "--size", "64M", "--read-iops", "1", "--write-iops", "1"])?
        .succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "1", "--connections", CONNECTIONS])?;
    ensure!(shown(&node)?["content"] == "never_written", "attaching wrote to it: {}", shown(&node)?);
    let mut fio = Command::new("fio")
        .args(["--name=limited", "--direct=1", "--ioengine=io_uring", "--rw=randrw", "--bs=4k", "--size=32M"])
        .args(["--iodepth=128", "--time_based", &format!("--runtime={}", LENGTH.as_secs())])
        .arg(format!("--filename={}", device.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("fio")?;
    thread::sleep(LENGTH);
    let (attachment, volume) = (node.attachment("vol-1")?, shown(&node)?);
    let began = Instant::now();
    let unlimited = ["limit", "vol-1", "--read-iops", "none", "--write-iops", "0"];
    node.volctl(&unlimited)?.succeeded()?;
    let status = loop {
        match fio.try_wait()? {
            Some(status) => break status,
            None if began.elapsed() > REST => {
                fio.kill()?;
                fio.wait()?;
                anyhow::bail!("requests still wait {REST:?} after the limits were taken away");
            }
            None => thread::sleep(Duration::from_millis(100)),
        }
    };
    ensure!(status.success(), "fio: {status}");
    ensure!(attachment["state"] == "live" && attachment["reconnects"] == 0, "{attachment}");
    let held_back_ms = volume["throttled_ms"].as_u64().context("throttled_ms")?;
    // Many connections, each of which waits nearly all the time.
    ensure!(held_back_ms > LENGTH.as_millis() as u64, "only {held_back_ms} ms: {volume}");
    ensure!(volume["content"] == "written", "{volume}");
    node.detach("vol-1")
}

fn shown(node: &StorageNode) -> Result<serde_json::Value> {
    let shown = node.volctl(&["show", "vol-1", "--output", "json"])?.succeeded()?;
    Ok(serde_json::from_str(&shown)?)
}
