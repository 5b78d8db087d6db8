//! What happens to pods with volumes: each scenario is a function that breaks something, and has a writer's word that no byte is wrong.
//!
//! Owns the list. `pods` has what they share, `volumes` what is done to volumes, `workloads` what pods do with them,
//! `disruptions` what happens to programs and machines.

mod disruptions;
mod pods;
mod volumes;
mod workloads;

use std::time::Duration;

use anyhow::Result;

use super::cluster::Cluster;

/// Something that is done to a cluster.
pub(super) struct Scenario {
    /// Its namespace, too.
    pub(super) name: &'static str,
    /// What is done or broken, for the table.
    pub(super) broken: &'static str,
    pub(super) run: fn(&mut Cluster) -> Result<Outcome>,
}

/// What came of it, with all data right.
#[derive(Default)]
pub(super) struct Outcome {
    /// How long a write took at most, where one went on meanwhile.
    pub(super) stall: Option<Duration>,
    /// What programs saw that were to see none.
    pub(super) errors: u64,
    /// Figures.
    pub(super) note: String,
}

const fn scenario(
    name: &'static str,
    broken: &'static str,
    run: fn(&mut Cluster) -> Result<Outcome>,
) -> Scenario {
    Scenario { name, broken, run }
}

/// All, in the order in which they run.
pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("moves", "a pod moves to the other node, with ext4 and with XFS", volumes::moves),
    scenario("raw-block", "a pod with a raw block volume moves to the other node", volumes::raw_block),
    scenario("expand", "an ext4 and a block volume grow under load", volumes::expand),
    scenario("copies", "a snapshot is restored, and a claim cloned", volumes::copies),
    scenario(
        "plugin-deleted",
        "the node plugin's pod is deleted three times under load",
        disruptions::plugin_deleted,
    ),
    scenario(
        "server-restarted",
        "the storage server is killed under load, and started 5 s later",
        disruptions::server_restarted,
    ),
    scenario(
        "kubelet-killed",
        "kubelet is killed under load, and started 20 s later",
        disruptions::kubelet_killed,
    ),
    scenario(
        "node-dead",
        "a node goes without a word, is declared dead, and comes back",
        disruptions::node_dead,
    ),
    scenario("set-rolled", "a StatefulSet of three is started anew", workloads::set_rolled),
    scenario("one-pod", "a second pod wants a ReadWriteOncePod claim", workloads::one_pod),
    scenario("shared-block", "two pods on two nodes write to one device", workloads::shared_block),
    scenario(
        "limits-changed",
        "a claim's VolumeAttributesClass changes twice under load",
        workloads::limits_changed,
    ),
    scenario("drained", "a node is drained", workloads::drained),
    scenario(
        "daemon-upgraded",
        "the node daemon is killed, and the disks' processes replaced, under load",
        disruptions::daemon_upgraded,
    ),
    scenario(
        "server-silent",
        "the storage server answers nobody for two minutes, under load",
        disruptions::server_silent,
    ),
    scenario(
        "api-server-gone",
        "the API server is gone for two minutes, under load",
        disruptions::api_server_gone,
    ),
    scenario(
        "controllers-killed",
        "the plugin and its sidecars are killed at random, 20 times, while volumes are made, used and deleted",
        disruptions::controllers_killed,
    ),
    scenario("uninstalled", "the chart is removed, and installed again", disruptions::uninstalled),
];
