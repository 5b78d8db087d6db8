//! Fills the server: volumes, a snapshot of each, nodes, grants and attachments. That is measured, too.

use anyhow::{Context, Result};
use proto::v1;

use super::Plan;
use super::load::{Load, Row};

/// Of each: a sparse file, in which nothing is written.
const VOLUME_BYTES: u64 = 1 << 20;

/// In the order of their numbers.
pub(super) fn volume_name(number: usize) -> String {
    format!("vol-{number:05}")
}

/// The same.
pub(super) fn node_id(number: usize) -> String {
    format!("node-{number:04}")
}

pub(super) const SNAPSHOT: &str = "nightly";

/// A volume with what orchestrators write on it.
pub(super) fn volume(name: String) -> v1::CreateVolumeRequest {
    let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    v1::CreateVolumeRequest {
        name,
        capacity_bytes: VOLUME_BYTES,
        labels: [label("app.kubernetes.io/name", "shop"), label("example.com/tier", "1")].into(),
        description: "made by cargo lab bench-api".to_owned(),
        ..Default::default()
    }
}

pub(super) async fn fill(load: &Load, plan: Plan) -> Result<Vec<Row>> {
    let mut rows = vec![
        load.calls("CreateVolume, until all are there", plan.volumes, |mut client, number| async move {
            client.create_volume(volume(volume_name(number))).await.map(drop)
        })
        .await?,
    ];
    let taken =
        load.calls("CreateSnapshot, until all are there", plan.snapshots, |mut client, number| async move {
            let request = v1::CreateSnapshotRequest {
                volume_names: vec![volume_name(number)],
                name: SNAPSHOT.to_owned(),
                ..Default::default()
            };
            client.create_snapshot(request).await.map(drop)
        });
    rows.push(taken.await.context("snapshots need --directory on XFS or btrfs")?);
    let registered =
        load.calls("RegisterNode, until all are there", plan.nodes, |mut client, number| async move {
            let (node_id, boot_id) = (node_id(number), format!("boot-{number}"));
            let request = v1::RegisterNodeRequest { node_id, boot_id, ..Default::default() };
            client.register_node(request).await.map(drop)
        });
    rows.push(registered.await?);
    let nodes = plan.nodes;
    let granted = load.calls("CreateGrant", plan.attached, move |mut client, number| async move {
        let (volume_name, node_id) = (volume_name(number), node_id(number % nodes));
        let request = v1::CreateGrantRequest { volume_name, node_id, ..Default::default() };
        client.create_grant(request).await.map(drop)
    });
    rows.push(granted.await?);
    let attached = load.calls("AttachVolume", plan.attached, move |mut client, number| async move {
        let (volume_name, node_id) = (volume_name(number), node_id(number % nodes));
        let request = v1::AttachVolumeRequest { volume_name, node_id, ..Default::default() };
        client.attach_volume(request).await.map(drop)
    });
    rows.push(attached.await?);
    Ok(rows)
}
