//! Claims and pods of scenarios, and what their writers say.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::super::images::BOX;
use super::super::kubectl::Kubectl;
use super::Outcome;

/// A pod's start: provision, attach, stage with mkfs, publish, and a container, on an emulated machine.
const START_DEADLINE: Duration = Duration::from_secs(300);

/// A pod's end, with everything that was to be unmounted and detached.
const END_DEADLINE: Duration = Duration::from_secs(300);

/// Where a pod has its volume.
pub(super) const FILE: &str = "/data/file";
pub(super) const DEVICE: &str = "/dev/data";

/// A claim.
pub(super) struct Claim<'a> {
    pub(super) name: &'a str,
    pub(super) class: &'a str,
    pub(super) size: &'a str,
    pub(super) block: bool,
    pub(super) mode: &'a str,
    /// A snapshot or a claim: its kind and its name.
    pub(super) source: Option<(&'a str, &'a str)>,
}

impl Claim<'_> {
    /// Makes it.
    pub(super) fn make(&self, kubectl: &Kubectl) -> Result<()> {
        let mut spec = json!({
            "accessModes": [self.mode],
            "storageClassName": self.class,
            "volumeMode": if self.block { "Block" } else { "Filesystem" },
            "resources": {"requests": {"storage": self.size}},
        });
        if let Some((kind, name)) = self.source {
            spec["dataSource"] = json!({"kind": kind, "name": name});
            if kind == "VolumeSnapshot" {
                spec["dataSource"]["apiGroup"] = json!("snapshot.storage.k8s.io");
            }
        }
        let kind = "PersistentVolumeClaim";
        kubectl
            .apply(&json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": self.name}, "spec": spec}))
    }
}

/// A claim of a file system.
pub(super) fn claim<'a>(name: &'a str, class: &'a str, size: &'a str) -> Claim<'a> {
    Claim { name, class, size, block: false, mode: "ReadWriteOnce", source: None }
}

/// A pod that does one thing with the claim, on a node.
pub(super) fn pod(name: &str, node: &str, claim: &Claim<'_>, command: &[&str]) -> Value {
    let mut container = json!({
        "name": "box", "image": BOX, "imagePullPolicy": "Never", "command": command,
    });
    if claim.block {
        container["volumeDevices"] = json!([{"name": "data", "devicePath": DEVICE}]);
    } else {
        container["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
            "containers": [container],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim.name}}],
        },
    })
}

/// Where the claim's data is in a pod.
pub(super) fn place(claim: &Claim<'_>) -> &'static str {
    if claim.block { DEVICE } else { FILE }
}

/// Something that a pod does with a claim, on a node.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) node: &'a str,
    pub(super) claim: &'a Claim<'a>,
    /// What has to be there, by its seed: the pod reads it first.
    pub(super) finds: Option<u32>,
    /// What it writes then.
    pub(super) leaves: Option<u32>,
}

/// How much each [`Work`] reads and writes.
const WORK_MEBIBYTES: u32 = 8;

/// Runs a pod for each, all at once, and deletes them when they have ended.
///
/// # Errors
/// A byte is another one, or a pod does not end in time.
pub(super) fn work(kubectl: &Kubectl, works: &[Work<'_>]) -> Result<()> {
    for Work { node, claim, finds, leaves } in works {
        let call = |what: &str, seed: &Option<u32>| {
            let place = place(claim);
            seed.map(|seed| format!("/block-writer {what} {place} {seed} {WORK_MEBIBYTES}"))
        };
        let calls: Vec<String> = call("check", finds).into_iter().chain(call("fill", leaves)).collect();
        kubectl.apply(&pod(&worker(claim), node, claim, &["/bin/sh", "-c", &calls.join(" && ")]))?;
    }
    for Work { claim, .. } in works {
        let name = worker(claim);
        let phase = kubectl.wait(&format!("{name} to end"), START_DEADLINE, |kubectl| {
            let phase = phase(kubectl, &name)?;
            Ok(["Succeeded", "Failed"].contains(&phase.as_str()).then_some(phase))
        })?;
        ensure!(phase == "Succeeded", "{name}: {}", kubectl.run(&["logs", &name])?);
        kubectl.run(&["delete", "pod", &name, "--wait=false"])?;
    }
    works.iter().try_for_each(|work| wait_until_gone(kubectl, &worker(work.claim)))
}

fn worker(claim: &Claim<'_>) -> String {
    format!("worker-{}", claim.name)
}

/// Starts a pod, and waits until it runs.
pub(super) fn start(kubectl: &Kubectl, pod: &Value) -> Result<()> {
    kubectl.apply(pod)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    kubectl.wait(&format!("{name} to run"), START_DEADLINE, |kubectl| {
        Ok((phase(kubectl, name)? == "Running").then_some(()))
    })
}

/// Where a pod is in its life.
pub(super) fn phase(kubectl: &Kubectl, name: &str) -> Result<String> {
    let pod = kubectl.get(&["pod", name])?;
    Ok(pod["status"]["phase"].as_str().unwrap_or_default().to_owned())
}

/// Deletes a pod, and waits until it is gone.
pub(super) fn delete_pod(kubectl: &Kubectl, name: &str) -> Result<()> {
    kubectl.run(&["delete", "pod", name, "--wait=false"])?;
    wait_until_gone(kubectl, name)
}

fn wait_until_gone(kubectl: &Kubectl, name: &str) -> Result<()> {
    kubectl.wait(&format!("{name} to be gone"), END_DEADLINE, |kubectl| {
        let found = kubectl.run(&["get", "pod", name, "--ignore-not-found", "--output", "name"])?;
        Ok(found.trim().is_empty().then_some(()))
    })
}

/// A pod that writes at random and keeps book of it.
pub(super) struct Writer<'a> {
    kubectl: &'a Kubectl,
    pub(super) name: String,
}

/// What a writer has told.
pub(super) struct Told {
    state: String,
    pub(super) writes: u64,
    pub(super) errors: u64,
    pub(super) longest: Duration,
    line: String,
}

impl<'a> Writer<'a> {
    /// Starts one on a node, which writes this many blocks of the claim, and waits until it writes.
    pub(super) fn start(kubectl: &'a Kubectl, node: &str, claim: &Claim<'_>, blocks: u32) -> Result<Self> {
        let name = format!("writer-{}", claim.name);
        let command = ["/block-writer", "write", place(claim), &blocks.to_string()];
        kubectl.apply(&pod(&name, node, claim, &command))?;
        let writer = Self { kubectl, name };
        writer.goes_on()?;
        Ok(writer)
    }

    /// Waits until it has written more than before.
    pub(super) fn goes_on(&self) -> Result<()> {
        let before = self.told().map_or(0, |told| told.writes);
        self.kubectl.wait(&format!("{} to write", self.name), START_DEADLINE, |_| {
            Ok(self.told().is_ok_and(|told| told.writes > before + 1).then_some(()))
        })
    }

    /// The last line that it printed.
    pub(super) fn told(&self) -> Result<Told> {
        let said = self.kubectl.run(&["logs", &self.name, "--tail=1"])?;
        Told::read(&said).with_context(|| format!("{} said {said:?}", self.name))
    }

    /// Runs something in its container.
    pub(super) fn exec(&self, words: &[&str]) -> Result<String> {
        self.kubectl.run(&[&["exec", &self.name, "--"], words].concat())
    }

    /// Has it stop and read all that it has written, and deletes it. A write that failed is an error here.
    pub(super) fn finish(self) -> Result<Outcome> {
        self.exec(&["touch", "/stop"])?;
        let told = self.kubectl.wait(&format!("{} to have read", self.name), START_DEADLINE, |kubectl| {
            let phase = phase(kubectl, &self.name)?;
            Ok(if ["Succeeded", "Failed"].contains(&phase.as_str()) { Some(self.told()?) } else { None })
        })?;
        if told.state != "right" || told.errors != 0 {
            bail!("{}: {}", self.name, told.line);
        }
        delete_pod(self.kubectl, &self.name)?;
        let note = format!("{} writes", told.writes);
        Ok(Outcome { stall: Some(told.longest), errors: told.errors, note })
    }
}

impl Told {
    /// `writing writes=12 errors=0 longest_ms=31 `, or `failed why`.
    fn read(said: &str) -> Option<Self> {
        let line = said.lines().last()?.trim_end().to_owned();
        let value = |name: &str| {
            let word = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            word.and_then(|word| word.parse::<u64>().ok())
        };
        Some(Self {
            state: line.split(' ').next()?.to_owned(),
            writes: value("writes").unwrap_or(0),
            errors: value("errors").unwrap_or(0),
            longest: Duration::from_millis(value("longest_ms").unwrap_or(0)),
            line: line.clone(),
        })
    }
}

/// Deletes the namespace, and waits until it and its volumes are gone.
pub(super) fn clean_up(kubectl: &Kubectl) -> Result<()> {
    kubectl.run(&["delete", "namespace", &kubectl.namespace, "--wait=false"])?;
    kubectl.wait("the namespace and its volumes to be gone", END_DEADLINE, |kubectl| {
        let name = kubectl.namespace.clone();
        let found = kubectl.run(&["get", "namespace", &name, "--ignore-not-found", "--output", "name"])?;
        let volumes = kubectl.get(&["pv"])?;
        let volumes = volumes["items"].as_array().cloned().unwrap_or_default();
        let is_ours = |volume: &Value| volume["spec"]["claimRef"]["namespace"] == name.as_str();
        Ok((found.trim().is_empty() && !volumes.iter().any(is_ours)).then_some(()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writers_last_line_is_read() {
        let told = Told::read("begun writes=0\nright writes=12 errors=1 longest_ms=310 I/O error\n").unwrap();
        assert_eq!((told.state.as_str(), told.writes, told.errors), ("right", 12, 1));
        assert_eq!(told.longest, Duration::from_millis(310));
        assert_eq!(Told::read("failed wrong: block 7\n").unwrap().state, "failed");
        assert!(Told::read("").is_none());
    }
}
