//! What people run: sets of pods that are rolled and drained, pods that share a volume, claims that only one pod may use.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::cluster::Cluster;
use super::super::images::BOX;
use super::super::kubectl::Kubectl;
use super::super::names::NODES;
use super::Outcome;
use super::pods::{Claim, DEVICE, Writer, claim, clean_up, delete_pod, phase, pod, start};

/// A set of pods, one after another.
const SET_DEADLINE: Duration = Duration::from_secs(900);

/// What a claim changes to.
const CHANGE_DEADLINE: Duration = Duration::from_secs(180);

/// What a pod of a set does: it looks whether what it wrote in a former life is there, and writes it where there is nothing.
const MEMBER: &str = "if [ -e /data/written ]; then /block-writer check /data/file 7 4 || exit 1; fi
    /block-writer fill /data/file 7 4 && touch /data/written && sync && touch /tmp/ready && exec sleep 1000000";

/// Makes a set of pods with a volume each, and waits until all are ready.
fn make_set(kubectl: &Kubectl, replicas: u32) -> Result<()> {
    let labels = json!({"app": "set"});
    kubectl.apply(&json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "set"},
        "spec": {
            "replicas": replicas,
            "serviceName": "set",
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "automountServiceAccountToken": false,
                    "containers": [{
                        "name": "box", "image": BOX, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", MEMBER],
                        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                        "readinessProbe": {"exec": {"command": ["/bin/cat", "/tmp/ready"]}, "timeoutSeconds": 30},
                    }],
                },
            },
            "volumeClaimTemplates": [{
                "metadata": {"name": "data"},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": "volnode",
                    "resources": {"requests": {"storage": "64Mi"}},
                },
            }],
        },
    }))?;
    wait_for_set(kubectl, replicas)
}

fn wait_for_set(kubectl: &Kubectl, replicas: u32) -> Result<()> {
    kubectl.wait("the set to be ready", SET_DEADLINE, |kubectl| {
        let set = kubectl.get(&["statefulset", "set"])?;
        let status = &set["status"];
        let is_seen = status["observedGeneration"] == set["metadata"]["generation"];
        let is_new = status["currentRevision"] == status["updateRevision"];
        Ok((is_seen && is_new && status["readyReplicas"] == replicas).then_some(()))
    })
}

/// Which pod is where, by their identities.
fn members(kubectl: &Kubectl) -> Result<Vec<(String, String)>> {
    let pods = kubectl.get(&["pods"])?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    Ok(pods.iter().map(|pod| (text(&pod["metadata"]["uid"]), text(&pod["spec"]["nodeName"]))).collect())
}

/// A set of three is started anew, one pod after another: each finds what it wrote.
pub(super) fn set_rolled(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("set-rolled")?;
    make_set(&kubectl, 3)?;
    let before = members(&kubectl)?;
    kubectl.run(&["rollout", "restart", "statefulset/set"])?;
    wait_for_set(&kubectl, 3)?;
    let after = members(&kubectl)?;
    ensure!(
        after.iter().all(|member| !before.iter().any(|(uid, _)| *uid == member.0)),
        "a pod is the old one"
    );
    clean_up(&kubectl)?;
    Ok(Outcome::default())
}

/// A node is emptied for work on it: its pods go to the other one, and find what they wrote.
pub(super) fn drained(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("drained")?;
    make_set(&kubectl, 2)?;
    kubectl.run(&["cordon", NODES[1]])?;
    let drained = kubectl.run(&[
        "drain",
        NODES[1],
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--force",
        "--timeout=110s",
    ]);
    let moved = drained.and_then(|_| {
        wait_for_set(&kubectl, 2)?;
        members(&kubectl)
    });
    kubectl.run(&["uncordon", NODES[1]])?;
    ensure!(moved?.iter().all(|(_, node)| node == NODES[0]), "a pod is on the drained node");
    clean_up(&kubectl)?;
    Ok(Outcome::default())
}

/// Two pods on two nodes have one device at once, and each sees at once what the other has flushed.
pub(super) fn shared_block(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("shared-block")?;
    kubectl.apply(&json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": "volnode-shared"},
        "provisioner": "csi.volnode.io",
        "parameters": {"shared": "true"},
    }))?;
    let shared = Claim { block: true, mode: "ReadWriteMany", ..claim("shared", "volnode-shared", "64Mi") };
    shared.make(&kubectl)?;
    for (name, node) in ["first", "second"].into_iter().zip(NODES) {
        start(&kubectl, &pod(name, node, &shared, &["/bin/sleep", "1000000"]))?;
    }
    for (seed, [writes, reads]) in [("1", ["first", "second"]), ("2", ["second", "first"])] {
        kubectl.run(&["exec", writes, "--", "/block-writer", "fill", DEVICE, seed, "8"])?;
        kubectl.run(&["exec", reads, "--", "/block-writer", "check", DEVICE, seed, "8"])?;
    }
    ["first", "second"].into_iter().try_for_each(|name| delete_pod(&kubectl, name))?;
    clean_up(&kubectl)?;
    kubectl.run(&["delete", "storageclass", "volnode-shared"])?;
    Ok(Outcome::default())
}

/// A claim that one pod may use is not for a second one until the first has gone.
pub(super) fn one_pod(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("one-pod")?;
    let claim = Claim { mode: "ReadWriteOncePod", ..claim("data", "volnode", "64Mi") };
    claim.make(&kubectl)?;
    let writer = Writer::start(&kubectl, NODES[0], &claim, 256)?;
    kubectl.apply(&pod("second", NODES[0], &claim, &["/bin/sleep", "1000000"]))?;
    kubectl.wait("the second pod to be refused", CHANGE_DEADLINE, |kubectl| {
        let pod = kubectl.get(&["pod", "second"])?;
        Ok(pod.to_string().contains("ReadWriteOncePod").then_some(()))
    })?;
    ensure!(phase(&kubectl, "second")? == "Pending", "two pods have it");
    let outcome = writer.finish()?;
    kubectl.wait("the second pod to run", SET_DEADLINE, |kubectl| {
        Ok((phase(kubectl, "second")? == "Running").then_some(()))
    })?;
    delete_pod(&kubectl, "second")?;
    clean_up(&kubectl)?;
    Ok(outcome)
}

/// A claim's limits change twice under load.
pub(super) fn limits_changed(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("limits-changed")?;
    let claim = claim("data", "volnode", "64Mi");
    claim.make(&kubectl)?;
    let writer = Writer::start(&kubectl, NODES[0], &claim, 1024)?;
    for class in ["volnode-slow", "volnode-fast"] {
        let patch = json!({"spec": {"volumeAttributesClassName": class}}).to_string();
        kubectl.run(&["patch", "pvc", claim.name, "--patch", &patch])?;
        kubectl.wait(&format!("the claim to be {class}"), CHANGE_DEADLINE, |kubectl| {
            let claim = kubectl.get(&["pvc", claim.name])?;
            Ok((claim["status"]["currentVolumeAttributesClassName"] == class).then_some(()))
        })?;
        writer.goes_on()?;
    }
    let outcome = writer.finish()?;
    clean_up(&kubectl)?;
    Ok(outcome)
}
