//! Every rung of the ladder of data paths that this kernel has: each brings back what was written, whatever portions the
//! network makes of it, and `auto` takes the best and says why not a better one.
//!
//! What a lying server can do to each is in `hostile_server`.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use testlab::dribbling_relay;
use testlab::harness::{Env, Test};
use testlab::kernel_series::KernelSeries;
use testlab::seed;
use testlab::storage_node::StorageNode;
use ublk_core::DataPath;

use crate::fio::verify_mostly_small;

pub(crate) const TESTS: &[Test] = &[
    Test::new("rungs::each_verifies_mixed_sizes", each_verifies_mixed_sizes).within(300),
    Test::new("rungs::each_verifies_behind_a_network_that_dribbles", each_verifies_behind_a_relay)
        .within(300),
    Test::new("rungs::each_is_listed_as_usable_or_with_a_reason", each_is_listed),
    Test::new("rungs::what_the_kernel_lacks_is_refused", what_the_kernel_lacks_is_refused)
        .on(&[KernelSeries::V6_12]),
];

fn each_verifies_mixed_sizes(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    node.volctl(&["create", "vol-1", "--size", "32M", "--backend", "memory"])?.succeeded()?;
    for data_path in env.series.data_paths() {
        let device = node.attach(&["vol-1", "--data-path", data_path.as_str()])?;
        let attachment = node.attachment("vol-1")?;
        ensure!(attachment["data_path"] == data_path.as_str(), "{attachment}");
        ensure!(attachment["data_path_reason"] == "asked for", "{attachment}");
        verify_mostly_small(&device, 12, 16).with_context(|| format!("on {data_path}"))?;
        ensure!(node.attachment("vol-1")?["state"] == "live");
        node.detach("vol-1")?;
    }
    Ok(())
}

fn each_verifies_behind_a_relay(env: &Env) -> Result<()> {
    // On somebody's own machine the relay's small buffers have to do.
    let _small = if env.in_vm { Some(SmallSendBuffers::set()?) } else { None };
    let node = StorageNode::start_with(env, &env.directory.join("data"), &["--export-by-name"])?;
    node.volctl(&["create", "vol-1", "--size", "16M", "--backend", "memory"])?.succeeded()?;
    let server: SocketAddr = node.data_address.parse().context("data address")?;
    let relay = dribbling_relay::start(server, seed::choose()?)?;
    let uri = format!("nbd://{relay}/vol-1");
    for data_path in env.series.data_paths() {
        let device = node.attach(&[&uri, "--data-path", data_path.as_str()])?;
        verify_mostly_small(&device, 4, 8).with_context(|| format!("on {data_path}"))?;
        ensure!(node.attachment(&uri)?["state"] == "live");
        node.detach(&uri)?;
    }
    Ok(())
}

/// As long as it lives, no TCP socket that is made can hold a large WRITE, so that sending one stops short.
struct SmallSendBuffers {
    before: String,
}

impl SmallSendBuffers {
    /// Smallest, default and largest size in bytes of a socket's send buffer.
    const SYSCTL: &str = "/proc/sys/net/ipv4/tcp_wmem";

    fn set() -> Result<Self> {
        let before = fs::read_to_string(Self::SYSCTL).context(Self::SYSCTL)?;
        fs::write(Self::SYSCTL, "4096 16384 65536").context(Self::SYSCTL)?;
        Ok(Self { before })
    }
}

impl Drop for SmallSendBuffers {
    fn drop(&mut self) {
        if let Err(error) = fs::write(Self::SYSCTL, &self.before) {
            println!("{} stays small: {error}", Self::SYSCTL);
        }
    }
}

fn each_is_listed(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    // The doctor looks for a server where there is none, which is no reason to say less.
    let doctor = node.volctl(&["doctor", "--output", "json"])?;
    let report: serde_json::Value = serde_json::from_str(&doctor.stdout)?;
    let checks = report.as_array().context("a list of checks")?;
    let paths = checks.iter().find(|check| check["check"] == "data paths").context("data paths")?;
    let usable = env.series.data_paths();
    for data_path in DataPath::LADDER {
        let rungs = paths["data_paths"].as_array().context("data_paths")?;
        let rung = rungs.iter().find(|rung| rung["data_path"] == data_path.as_str()).context("a rung")?;
        let is_usable = usable.contains(&data_path);
        ensure!(rung["supported"] == is_usable, "{rung}");
        ensure!(rung["reason"].as_str().is_some_and(|reason| reason.is_empty() == is_usable), "{rung}");
    }

    node.volctl(&["create", "vol-1", "--size", "16M"])?.succeeded()?;
    node.attach(&["vol-1"])?;
    let attachment = node.attachment("vol-1")?;
    ensure!(attachment["data_path"] == usable[0].as_str(), "{attachment}");
    let shown = node.shown_attachment("vol-1")?;
    ensure!(shown == attachment, "volctl shows {shown}, the node API has {attachment}");
    let reason = attachment["data_path_reason"].as_str().unwrap_or_default();
    for better in DataPath::LADDER.into_iter().take_while(|data_path| *data_path != usable[0]) {
        ensure!(reason.contains(&format!("not {better}: ")), "{reason}");
    }
    ensure!(usable[0] != DataPath::Fused || reason.contains("proved"), "{reason}");
    node.detach("vol-1")
}

fn what_the_kernel_lacks_is_refused(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    for data_path in [DataPath::Fused, DataPath::FixedRw, DataPath::Registered] {
        let refused = node.volctl(&["attach", "vol-1", "--data-path", data_path.as_str()])?;
        ensure!(refused.exit_code != 0 && refused.stderr.contains("auto"), "{refused:?}");
    }
    // Nothing half-made is in the way of the path that works.
    node.attach(&["vol-1"])?;
    node.detach("vol-1")
}
