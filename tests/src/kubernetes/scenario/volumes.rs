//! What people do with volumes: pods move, claims grow and are copied.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::super::cluster::Cluster;
use super::super::kubectl::Kubectl;
use super::super::names::NODES;
use super::Outcome;
use super::pods::{Claim, DEVICE, Work, Writer, claim, clean_up, work};

/// A claim's growth, a snapshot's making.
const CHANGE_DEADLINE: Duration = Duration::from_secs(180);

/// A pod fills a volume on one node, another reads it on the other and writes, and a third reads that on the first.
pub(super) fn moves(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("moves")?;
    back_and_forth(&kubectl, &[claim("ext", "volnode", "64Mi"), claim("xfs", "volnode-xfs", "320Mi")])?;
    clean_up(&kubectl)?;
    Ok(Outcome::default())
}

/// The same without a file system.
pub(super) fn raw_block(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("raw-block")?;
    back_and_forth(&kubectl, &[Claim { block: true, ..claim("raw", "volnode", "64Mi") }])?;
    clean_up(&kubectl)?;
    Ok(Outcome::default())
}

fn back_and_forth(kubectl: &Kubectl, claims: &[Claim<'_>]) -> Result<()> {
    claims.iter().try_for_each(|claim| claim.make(kubectl))?;
    for (node, finds, leaves) in
        [(NODES[0], None, Some(1)), (NODES[1], Some(1), Some(2)), (NODES[0], Some(2), None)]
    {
        let works: Vec<Work<'_>> = claims.iter().map(|claim| Work { node, claim, finds, leaves }).collect();
        work(kubectl, &works)?;
    }
    Ok(())
}

/// Two claims grow while pods write to them.
pub(super) fn expand(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("expand")?;
    let claims = [claim("ext", "volnode", "64Mi"), Claim { block: true, ..claim("raw", "volnode", "64Mi") }];
    let mut writers = Vec::new();
    for claim in &claims {
        claim.make(&kubectl)?;
        writers.push(Writer::start(&kubectl, NODES[0], claim, 1024)?);
    }
    for claim in &claims {
        let patch = json!({"spec": {"resources": {"requests": {"storage": "256Mi"}}}}).to_string();
        kubectl.run(&["patch", "pvc", claim.name, "--patch", &patch])?;
    }
    for claim in &claims {
        kubectl.wait(&format!("{} to grow", claim.name), CHANGE_DEADLINE, |kubectl| {
            let claim = kubectl.get(&["pvc", claim.name])?;
            Ok((claim["status"]["capacity"]["storage"] == "256Mi").then_some(()))
        })?;
    }
    // What pods see of it.
    let table = writers[0].exec(&["df", "-k", "/data"])?;
    let last = table.lines().last().unwrap_or_default();
    let size = last.split_whitespace().nth(1).and_then(|size| size.parse::<u64>().ok());
    ensure!(size.is_some_and(|kibibytes| kibibytes > 200 << 10), "the file system has not grown: {table}");
    let size = writers[1].exec(&["blockdev", "--getsize64", DEVICE])?;
    ensure!(size.trim() == (256_u64 << 20).to_string(), "the device has not grown: {size}");
    let outcomes: Vec<Outcome> = writers.into_iter().map(Writer::finish).collect::<Result<_>>()?;
    clean_up(&kubectl)?;
    Ok(Outcome {
        stall: outcomes.iter().filter_map(|outcome| outcome.stall).max(),
        errors: outcomes.iter().map(|outcome| outcome.errors).sum(),
        note: outcomes.iter().map(|outcome| outcome.note.clone()).collect::<Vec<_>>().join(" and "),
    })
}

/// What a snapshot has is what was there, whatever is written later; a clone has what is there now.
pub(super) fn copies(cluster: &mut Cluster) -> Result<Outcome> {
    let kubectl = cluster.namespace("copies")?;
    let source = claim("source", "volnode", "64Mi");
    source.make(&kubectl)?;
    work(&kubectl, &[Work { node: NODES[0], claim: &source, finds: None, leaves: Some(1) }])?;
    kubectl.apply(&json!({
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshot",
        "metadata": {"name": "first"},
        "spec": {"volumeSnapshotClassName": "volnode", "source": {"persistentVolumeClaimName": "source"}},
    }))?;
    kubectl.wait("the snapshot to be ready", CHANGE_DEADLINE, |kubectl| {
        let snapshot = kubectl.get(&["volumesnapshot", "first"])?;
        Ok((snapshot["status"]["readyToUse"] == true).then_some(()))
    })?;
    work(&kubectl, &[Work { node: NODES[1], claim: &source, finds: Some(1), leaves: Some(2) }])?;
    let restored =
        Claim { source: Some(("VolumeSnapshot", "first")), ..claim("restored", "volnode", "64Mi") };
    let clone =
        Claim { source: Some(("PersistentVolumeClaim", "source")), ..claim("clone", "volnode", "128Mi") };
    restored.make(&kubectl)?;
    clone.make(&kubectl)?;
    work(
        &kubectl,
        &[
            Work { node: NODES[0], claim: &restored, finds: Some(1), leaves: Some(4) },
            Work { node: NODES[1], claim: &clone, finds: Some(2), leaves: Some(3) },
        ],
    )?;
    // A copy is its own.
    work(&kubectl, &[Work { node: NODES[0], claim: &source, finds: Some(2), leaves: None }])?;
    kubectl.run(&["delete", "volumesnapshot", "first"])?;
    clean_up(&kubectl)?;
    Ok(Outcome::default())
}
