//! The calls of a server that is full: what looks, what changes, and what makes and takes away.

use std::sync::Arc;

use anyhow::Result;
use proto::v1;
use uuid::Uuid;

use super::Plan;
use super::fill::{SNAPSHOT, node_id, volume, volume_name};
use super::load::{Client, Load, Row};

/// Of a list, as programs ask for it.
const PAGE_SIZE: u32 = 100;

/// Numbers that come to all of `count` in an order of no meaning: 7919 is a prime that divides none of the counts.
fn scattered(number: usize, count: usize) -> usize {
    number * 7919 % count
}

pub(super) async fn all(load: &Load, plan: Plan) -> Result<Vec<Row>> {
    let mut rows = looks(load, plan).await?;
    rows.extend(lists(load, plan).await?);
    rows.extend(changes(load, plan).await?);
    rows.extend(ends(load, plan).await?);
    Ok(rows)
}

async fn looks(load: &Load, plan: Plan) -> Result<Vec<Row>> {
    let Plan { volumes, snapshots, nodes, calls, .. } = plan;
    let volume = load.calls("GetVolume", calls, move |mut client, number| async move {
        let name = volume_name(scattered(number, volumes));
        client.get_volume(v1::GetVolumeRequest { name, ..Default::default() }).await.map(drop)
    });
    let volume = volume.await?;
    let snapshot = load.calls("GetSnapshot", calls, move |mut client, number| async move {
        let volume_name = volume_name(scattered(number, snapshots));
        let request = v1::GetSnapshotRequest { volume_name, name: SNAPSHOT.to_owned(), ..Default::default() };
        client.get_snapshot(request).await.map(drop)
    });
    let snapshot = snapshot.await?;
    let heartbeat = load.calls("Heartbeat", calls, move |mut client, number| async move {
        let number = scattered(number, nodes);
        let (node_id, boot_id) = (node_id(number), format!("boot-{number}"));
        client.heartbeat(v1::HeartbeatRequest { node_id, boot_id, ..Default::default() }).await.map(drop)
    });
    Ok(vec![volume, snapshot, heartbeat.await?])
}

/// Every page of a list by its token; walked once, so that the calls that are measured take pages from all of it.
macro_rules! pages {
    ($load:expr, $plan:expr, $name:literal, $method:ident, $request:ident $(, $rest:expr)?) => {{
        let mut tokens = vec![String::new()];
        let mut client = $load.client();
        loop {
            let page_token = tokens[tokens.len() - 1].clone();
            let request = v1::$request { page_size: PAGE_SIZE, page_token, $(..$rest)? };
            let next = client.$method(request).await?.into_inner().next_page_token;
            if next.is_empty() {
                break;
            }
            tokens.push(next);
        }
        let tokens = Arc::new(tokens);
        let page = $load.calls($name, $plan.calls, move |mut client: Client, number| {
            let page_token = tokens[number % tokens.len()].clone();
            async move {
                let request = v1::$request { page_size: PAGE_SIZE, page_token, $(..$rest)? };
                client.$method(request).await.map(drop)
            }
        });
        page.await?
    }};
}

async fn lists(load: &Load, plan: Plan) -> Result<Vec<Row>> {
    let mut rows = vec![
        pages!(load, plan, "ListVolumes, pages of 100", list_volumes, ListVolumesRequest, Default::default()),
        pages!(
            load,
            plan,
            "ListSnapshots, pages of 100",
            list_snapshots,
            ListSnapshotsRequest,
            Default::default()
        ),
        pages!(
            load,
            plan,
            "ListAttachments, pages of 100",
            list_attachments,
            ListAttachmentsRequest,
            Default::default()
        ),
        pages!(load, plan, "ListGrants, pages of 100", list_grants, ListGrantsRequest, Default::default()),
        pages!(load, plan, "ListNodes, pages of 100", list_nodes, ListNodesRequest),
    ];
    let nodes = plan.nodes;
    let of_node = load.calls("ListAttachments of a node", plan.calls, move |mut client, number| async move {
        let node_id = node_id(scattered(number, nodes));
        let request = v1::ListAttachmentsRequest { node_id, ..Default::default() };
        client.list_attachments(request).await.map(drop)
    });
    rows.push(of_node.await?);
    let of_volume =
        load.calls("ListSnapshots of a volume", plan.calls, move |mut client, number| async move {
            let volume_name = volume_name(scattered(number, plan.snapshots));
            let request = v1::ListSnapshotsRequest { volume_name, ..Default::default() };
            client.list_snapshots(request).await.map(drop)
        });
    rows.push(of_volume.await?);
    let watch = load.calls_by("Watch, until all there is is told", 4, 8, |mut client, _| async move {
        let mut events = client.watch(v1::WatchRequest::default()).await?.into_inner();
        while let Some(event) = events.message().await? {
            if event.change() == v1::WatchChange::Synced {
                break;
            }
        }
        Ok(())
    });
    rows.push(watch.await?);
    Ok(rows)
}

async fn changes(load: &Load, plan: Plan) -> Result<Vec<Row>> {
    let Plan { volumes, calls, .. } = plan;
    let update = load.calls("UpdateVolume", calls, move |mut client, number| async move {
        let name = volume_name(scattered(number, volumes));
        let description = Some(format!("call {number}"));
        client
            .update_volume(v1::UpdateVolumeRequest { name, description, ..Default::default() })
            .await
            .map(drop)
    });
    let update = update.await?;
    let with_id = load.calls("UpdateVolume with a request_id", calls, move |mut client, number| async move {
        let name = volume_name(scattered(number, volumes));
        let (description, request_id) = (Some(format!("again {number}")), Uuid::new_v4().to_string());
        let request = v1::UpdateVolumeRequest { name, description, request_id, ..Default::default() };
        client.update_volume(request).await.map(drop)
    });
    let with_id = with_id.await?;
    let limits = load.calls("SetVolumeLimits", calls, move |mut client, number| async move {
        let name = volume_name(scattered(number, volumes));
        let limits = Some(v1::VolumeLimits { read_iops: 1 + number as u64, ..Default::default() });
        client
            .set_volume_limits(v1::SetVolumeLimitsRequest { name, limits, ..Default::default() })
            .await
            .map(drop)
    });
    let limits = limits.await?;
    let create = load.calls("CreateVolume", calls, |mut client, number| async move {
        client.create_volume(volume(format!("more-{number}"))).await.map(drop)
    });
    Ok(vec![update, with_id, limits, create.await?])
}

async fn ends(load: &Load, plan: Plan) -> Result<Vec<Row>> {
    let Plan { snapshots, nodes, attached, calls, .. } = plan;
    let delete = load.calls("DeleteVolume", calls, |mut client, number| async move {
        let name = format!("more-{number}");
        client.delete_volume(v1::DeleteVolumeRequest { name, ..Default::default() }).await.map(drop)
    });
    let delete = delete.await?;
    let detach = load.calls("DetachVolume", attached, |mut client, number| async move {
        let volume_name = volume_name(number);
        client.detach_volume(v1::DetachVolumeRequest { volume_name, ..Default::default() }).await.map(drop)
    });
    let detach = detach.await?;
    let withdraw = load.calls("DeleteGrant", attached, move |mut client, number| async move {
        let (volume_name, node_id) = (volume_name(number), node_id(number % nodes));
        client
            .delete_grant(v1::DeleteGrantRequest { volume_name, node_id, ..Default::default() })
            .await
            .map(drop)
    });
    let withdraw = withdraw.await?;
    let forget = load.calls("DeleteSnapshot", calls.min(snapshots), |mut client, number| async move {
        let (volume_name, name) = (volume_name(number), SNAPSHOT.to_owned());
        client
            .delete_snapshot(v1::DeleteSnapshotRequest { volume_name, name, ..Default::default() })
            .await
            .map(drop)
    });
    Ok(vec![delete, detach, withdraw, forget.await?])
}
