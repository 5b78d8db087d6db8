//! What happens to programs and machines while pods write.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use testlab::seed;

use super::super::cluster::{Cluster, is_true};
use super::super::kubectl::Kubectl;
use super::super::names::{NAMESPACE, NODES};
use super::Outcome;
use super::pods::{FILE, Work, Writer, claim, clean_up, delete_pod, phase, pod, work};
use crate::lab::progress;

/// A pod of the chart that is made anew.
const POD_DEADLINE: Duration = Duration::from_secs(300);

/// A node that answers no more is noticed after 50 s (kube-controller-manager, `--node-monitor-grace-period`).
const NODE_DEADLINE: Duration = Duration::from_secs(300);

/// How often something is killed, and until when its work has to be done all the same: kubelet waits up to five minutes between two
/// starts of what ends again and again.
const KILL_ROUNDS: u32 = 20;
const ROUND_DEADLINE: Duration = Duration::from_secs(600);

/// Longer than the timeouts of kernels and of Kubernetes.
const TWO_MINUTES: Duration = Duration::from_secs(120);

/// The node plugin's pod has 300 s for what runs in it.
const UNINSTALL_DEADLINE: Duration = Duration::from_secs(400);

/// What a node does that is asked for.
const ASK_DEADLINE: Duration = Duration::from_secs(120);

/// The plugin carries no I/O: the writer notices nothing, and what comes after it works.
pub(super) fn plugin_deleted(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("plugin-deleted")?;
    let claim = claim("data", "volnode", "64Mi");
    claim.make(&kubectl)?;
    let writer = Writer::start(&kubectl, NODES[0], &claim, 1024)?;
    let chart = cluster.kubectl.within(NAMESPACE);
    for _ in 0..3 {
        let old = plugin_of(&chart, NODES[0])?;
        chart.run(&["delete", "pod", &old, "--wait=false"])?;
        chart.wait("another pod of the node plugin", POD_DEADLINE, |chart| {
            let new = plugin_of(chart, NODES[0])?;
            Ok((new != old && is_true(&chart.get(&["pod", &new])?, "Ready")).then_some(()))
        })?;
        writer.goes_on()?;
    }
    let outcome = writer.finish()?;
    clean_up(&kubectl)?;
    Ok(outcome)
}

/// The pod of the node plugin that is not about to end.
fn plugin_of(chart: &Kubectl, node: &str) -> Result<String> {
    let pods = chart.get(&["pods", "--selector", "app.kubernetes.io/component=node"])?;
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    let is_it =
        |pod: &&Value| pod["spec"]["nodeName"] == node && pod["metadata"]["deletionTimestamp"].is_null();
    let pod = pods.iter().find(is_it).context("no pod of the node plugin")?;
    Ok(pod["metadata"]["name"].as_str().unwrap_or_default().to_owned())
}

/// Disks wait for the server, and go on.
pub(super) fn server_restarted(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("server-restarted")?;
    let claim = claim("data", "volnode", "64Mi");
    claim.make(&kubectl)?;
    let writer = Writer::start(&kubectl, NODES[1], &claim, 1024)?;
    cluster.storage.kill();
    thread::sleep(Duration::from_secs(5));
    cluster.storage.start_again()?;
    writer.goes_on()?;
    let outcome = writer.finish()?;
    ensure!(outcome.stall.is_some_and(|stall| stall >= Duration::from_secs(4)), "the load did not notice");
    clean_up(&kubectl)?;
    Ok(outcome)
}

/// Pods live on without kubelet, and are its pods again when it is back.
pub(super) fn kubelet_killed(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("kubelet-killed")?;
    let claim = claim("data", "volnode", "64Mi");
    claim.make(&kubectl)?;
    let writer = Writer::start(&kubectl, NODES[0], &claim, 1024)?;
    let container = container_of(&kubectl, &writer.name)?;
    let node = cluster.node(NODES[0])?;
    node.run("kill -9 $(cat /run/kubelet.pid)", ASK_DEADLINE)?;
    thread::sleep(Duration::from_secs(20));
    node.run("start_kubelet", ASK_DEADLINE)?;
    writer.goes_on()?;
    ensure!(container_of(&kubectl, &writer.name)? == container, "the pod's container is another one");
    let outcome = writer.finish()?;
    clean_up(&kubectl)?;
    Ok(outcome)
}

fn container_of(kubectl: &Kubectl, pod: &str) -> Result<String> {
    let pod = kubectl.get(&["pod", pod])?;
    Ok(pod["status"]["containerStatuses"][0]["containerID"].as_str().unwrap_or_default().to_owned())
}

/// The node daemon ends and is started again, and has every disk's process replaced.
pub(super) fn daemon_upgraded(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("daemon-upgraded")?;
    let claim = claim("data", "volnode", "64Mi");
    claim.make(&kubectl)?;
    let writer = Writer::start(&kubectl, NODES[0], &claim, 1024)?;
    let node = cluster.node(NODES[0])?;
    node.run("kill -9 $(cat /run/daemon.pid); sleep 2; start_daemon", ASK_DEADLINE)?;
    let upgrade = "\"$CLUSTER/bin/volctl\" upgrade --all --socket /run/volnode/volclient.sock";
    let again = format!("for try in $(seq 30); do {upgrade} && exit; sleep 1; done; exit 1");
    node.run(&again, ASK_DEADLINE)?;
    writer.goes_on()?;
    let outcome = writer.finish()?;
    clean_up(&kubectl)?;
    Ok(outcome)
}

/// The controller, its sidecars and the node plugin of a node are killed at random while volumes are made, used and deleted.
pub(super) fn controllers_killed(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("controllers-killed")?;
    let seed = seed::choose()?;
    progress::say(&format!("lab: controllers-killed: seed {seed}"));
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..KILL_ROUNDS {
        let name = format!("round-{round}");
        let claim = claim(&name, "volnode", "64Mi");
        claim.make(&kubectl)?;
        let node = NODES[random.usize(..NODES.len())];
        kubectl.apply(&pod("round", node, &claim, &["/block-writer", "fill", FILE, "1", "1"]))?;
        thread::sleep(Duration::from_millis(random.u64(..15_000)));
        let victims = ["csi-provisioner", "csi-attacher", "csi-resizer", "volcsi"];
        let kill = format!("pkill -9 -x {} || true", victims[random.usize(..victims.len())]);
        for node in NODES {
            cluster.node(node)?.run(&kill, ASK_DEADLINE)?;
        }
        kubectl.wait("the pod to end well", ROUND_DEADLINE, |kubectl| {
            Ok((phase(kubectl, "round")? == "Succeeded").then_some(()))
        })?;
        delete_pod(&kubectl, "round")?;
        kubectl.run(&["delete", "pvc", &name, "--wait=false"])?;
    }
    clean_up(&kubectl)?;
    cluster.wait_for_chart()?;
    let left = cluster.storage.volumes()?;
    ensure!(left.is_empty(), "the server has volumes of nobody: {left:?}");
    Ok(Outcome { note: format!("{KILL_ROUNDS} rounds, seed {seed}"), ..Outcome::default() })
}

/// Pods do not need the API server.
pub(super) fn api_server_gone(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("api-server-gone")?;
    let claim = claim("data", "volnode", "64Mi");
    claim.make(&kubectl)?;
    let writer = Writer::start(&kubectl, NODES[0], &claim, 1024)?;
    cluster.plane.kill_api_server();
    thread::sleep(TWO_MINUTES);
    cluster.plane.start_api_server()?;
    cluster.plane.wait_until_ready()?;
    writer.goes_on()?;
    let outcome = writer.finish()?;
    clean_up(&kubectl)?;
    cluster.wait_for_chart()?;
    Ok(outcome)
}

/// Disks wait for a server that is there and silent, and go on.
pub(super) fn server_silent(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("server-silent")?;
    let claim = claim("data", "volnode", "64Mi");
    claim.make(&kubectl)?;
    let writer = Writer::start(&kubectl, NODES[1], &claim, 1024)?;
    cluster.storage.freeze()?;
    thread::sleep(TWO_MINUTES);
    cluster.storage.thaw()?;
    writer.goes_on()?;
    let outcome = writer.finish()?;
    ensure!(outcome.stall.is_some_and(|stall| stall > TWO_MINUTES / 2), "the load did not notice");
    clean_up(&kubectl)?;
    Ok(outcome)
}

/// The chart is removed, and leaves nothing: neither on the nodes nor in the cluster nor at the server.
pub(super) fn uninstalled(cluster: &mut Cluster) -> Result<Outcome> {
    cluster.helm(&["uninstall", "volnode"])?;
    let chart = cluster.kubectl.within(NAMESPACE);
    chart.wait("the chart's pods to be gone", UNINSTALL_DEADLINE, |chart| {
        let pods = chart.get(&["pods"])?;
        Ok(pods["items"].as_array().is_some_and(Vec::is_empty).then_some(()))
    })?;
    let look = "ls /dev/ublkb* /var/lib/kubelet/plugins_registry/* 2> /dev/null; \
         find /var/lib/kubelet/plugins/kubernetes.io/csi -mindepth 2 2> /dev/null; grep ublk /proc/mounts; true";
    for node in NODES {
        let left = cluster.node(node)?.run(look, ASK_DEADLINE)?;
        ensure!(left.trim().is_empty(), "{node} still has: {left}");
        chart.wait("kubelet to forget the driver", ASK_DEADLINE, |chart| {
            Ok((!chart.get(&["csinode", node])?.to_string().contains("csi.volnode.io")).then_some(()))
        })?;
    }
    let left = cluster.storage.volumes()?;
    ensure!(left.is_empty(), "the server still has: {left:?}");
    let left = chart.run(&["get", "csidriver,storageclass,volumeattachment,pv", "--output", "name"])?;
    ensure!(!left.contains("volnode"), "the cluster still has: {left}");
    cluster.install_chart()?;
    cluster.wait_for_chart()?;
    Ok(Outcome::default())
}

/// A node is frozen with a volume in use; what an administrator does then brings the volume up elsewhere. When the node is back, it
/// knows of nothing, and what it writes is refused.
pub(super) fn node_dead(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("node-dead")?;
    let (lost, other) = (NODES[1], NODES[0]);
    let claim = claim("data", "volnode", "64Mi");
    claim.make(&kubectl)?;
    work(&kubectl, &[Work { node: lost, claim: &claim, finds: None, leaves: Some(1) }])?;
    let writer = Writer::start(&kubectl, lost, &claim, 64)?;
    let disk = cluster.node(lost)?.run("ls /dev/ublkb*", ASK_DEADLINE)?;
    let disk = disk.trim().to_owned();
    ensure!(disk.lines().count() == 1, "one disk is there: {disk}");
    cluster.node(lost)?.freeze()?;
    let began = std::time::Instant::now();
    kubectl.wait("the node to be missed", NODE_DEADLINE, |kubectl| {
        Ok((!is_true(&kubectl.get(&["node", lost])?, "Ready")).then_some(()))
    })?;
    let missed = began.elapsed();
    let taint = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute";
    kubectl.run(&["taint", "node", lost, taint])?;
    kubectl.wait("the lost pod to be gone", NODE_DEADLINE, |kubectl| {
        Ok(phase(kubectl, &writer.name).is_err().then_some(()))
    })?;
    work(&kubectl, &[Work { node: other, claim: &claim, finds: None, leaves: Some(2) }])?;
    let up = began.elapsed();
    cluster.node(lost)?.thaw()?;
    // Over the file system's first block: were it let through, nothing would be right any more.
    let write = format!("dd if=/dev/zero of={disk} bs=4096 count=1 oflag=direct conv=fsync");
    let (code, said) = cluster.node(lost)?.try_run(&write, ASK_DEADLINE)?;
    ensure!(code != 0, "the lost node's write went through: {said}");
    work(&kubectl, &[Work { node: other, claim: &claim, finds: Some(2), leaves: None }])?;
    kubectl.run(&["taint", "node", lost, &format!("{taint}-")])?;
    kubectl.wait("the node to be ready again", NODE_DEADLINE, |kubectl| {
        Ok(is_true(&kubectl.get(&["node", lost])?, "Ready").then_some(()))
    })?;
    work(&kubectl, &[Work { node: lost, claim: &claim, finds: Some(2), leaves: None }])?;
    clean_up(&kubectl)?;
    let refused = said.lines().next().unwrap_or_default().rsplit(": ").next().unwrap_or_default().to_owned();
    let (missed, up) = (missed.as_secs(), up.as_secs());
    let note = format!(
        "missed after {missed} s, up elsewhere with new data after {up} s, old node's write: {refused}"
    );
    Ok(Outcome { note, ..Outcome::default() })
}
