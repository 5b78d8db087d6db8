//! What happens to programs and machines while pods write.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::super::cluster::{Cluster, is_true};
use super::super::kubectl::Kubectl;
use super::super::{NAMESPACE, NODES};
use super::Outcome;
use super::pods::{Writer, check, claim, clean_up, fill, phase};

/// A pod of the chart that is made anew.
const POD_DEADLINE: Duration = Duration::from_secs(300);

/// A node that answers no more is noticed after 50 s (kube-controller-manager, `--node-monitor-grace-period`).
const NODE_DEADLINE: Duration = Duration::from_secs(300);

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

/// A node is frozen with a volume in use; what an administrator does then brings the volume up elsewhere. When the node is back, it
/// knows of nothing, and what it writes is refused.
pub(super) fn node_dead(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("node-dead")?;
    let (lost, other) = (NODES[1], NODES[0]);
    let claim = claim("data", "volnode", "64Mi");
    claim.make(&kubectl)?;
    fill(&kubectl, lost, &claim, 1, 8)?;
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
    fill(&kubectl, other, &claim, 2, 8)?;
    let up = began.elapsed();
    cluster.node(lost)?.thaw()?;
    // Over the file system's first block: were it let through, nothing would be right any more.
    let write = format!("dd if=/dev/zero of={disk} bs=4096 count=1 oflag=direct conv=fsync");
    let (code, said) = cluster.node(lost)?.try_run(&write, ASK_DEADLINE)?;
    ensure!(code != 0, "the lost node's write went through: {said}");
    check(&kubectl, other, &claim, 2, 8)?;
    kubectl.run(&["taint", "node", lost, &format!("{taint}-")])?;
    kubectl.wait("the node to be ready again", NODE_DEADLINE, |kubectl| {
        Ok(is_true(&kubectl.get(&["node", lost])?, "Ready").then_some(()))
    })?;
    check(&kubectl, lost, &claim, 2, 8)?;
    clean_up(&kubectl)?;
    let refused = said.lines().next().unwrap_or_default().rsplit(": ").next().unwrap_or_default().to_owned();
    let (missed, up) = (missed.as_secs(), up.as_secs());
    let note = format!(
        "missed after {missed} s, up elsewhere with new data after {up} s, old node's write: {refused}"
    );
    Ok(Outcome { note, ..Outcome::default() })
}
