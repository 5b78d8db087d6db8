//! `snapshot create --freeze`: a snapshot of file systems that stand still.
//!
//! ```text
//!   node daemon freezes ─▶ server takes the snapshot ─▶ node daemon thaws ─ was frozen ─▶ server is told so
//!                                                                        └─ was not ───▶ the snapshot is deleted
//! ```
//! That is so where this machine's node daemon has the volumes. Otherwise the server has the nodes that have them freeze, and answers when
//! it knows that they did.
//! Whoever is killed in between: the node daemon thaws by itself, and what is left is no snapshot, or one that is not called frozen.

use std::collections::HashSet;
use std::path::Path;

use proto::v1;
use proto::v1::management_client::ManagementClient;
use proto::v1::node_client::NodeClient;
use tonic::transport::Channel;
use uuid::Uuid;

use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::once::{identified, once};
use crate::report::Report;
use crate::snapshots::{created, export_name, finish};

pub(crate) async fn create(
    server: &ServerAddress,
    socket: &Path,
    volumes: Vec<String>,
    name: String,
) -> Result<Report, Failure> {
    // Both before anything is frozen: neither is to be waited for then.
    let mut client = connect::server(server).await?;
    match node_with(socket, &volumes).await {
        Some(node) => create_here(client, node, volumes, name).await,
        None => create_elsewhere(&mut client, volumes, name).await,
    }
}

/// This machine's node daemon, if it has all of the volumes.
async fn node_with(socket: &Path, volumes: &[String]) -> Option<NodeClient<Channel>> {
    let mut node = connect::node(socket).await.ok()?;
    let attached =
        call(node.list_node_attachments(v1::ListNodeAttachmentsRequest {})).await.ok()?.attachments;
    let is_here = |volume: &String| attached.iter().any(|attachment| attachment.target == *volume);
    volumes.iter().all(is_here).then_some(node)
}

/// By the nodes that have them.
async fn create_elsewhere(
    client: &mut ManagementClient<Channel>,
    volume_names: Vec<String>,
    name: String,
) -> Result<Report, Failure> {
    let freeze_id = Uuid::new_v4().to_string();
    let request = v1::CreateSnapshotRequest {
        volume_names,
        name,
        freeze_id: freeze_id.clone(),
        freeze: true,
        ..Default::default()
    };
    let taken = call(client.create_snapshot(request)).await?;
    let is_not = |snapshot: &&v1::Snapshot| snapshot.freeze_id == freeze_id && !snapshot.frozen;
    if taken.snapshots.iter().any(|snapshot| is_not(&snapshot)) {
        let why = "the storage server is of a version that has no node freeze: upgrade it, or run volctl on the node";
        return Err(discard(client, taken.snapshots.iter().filter(is_not), why).await);
    }
    report(client, taken).await
}

async fn create_here(
    mut client: ManagementClient<Channel>,
    mut node: NodeClient<Channel>,
    volumes: Vec<String>,
    name: String,
) -> Result<Report, Failure> {
    let freeze_id = Uuid::new_v4().to_string();
    let freeze = v1::FreezeRequest { targets: volumes.clone(), freeze_id: freeze_id.clone() };
    let volume_uids = call(node.freeze(freeze)).await?.volume_uids;
    let request = v1::CreateSnapshotRequest {
        volume_names: volumes,
        name,
        freeze_id: freeze_id.clone(),
        ..Default::default()
    };
    let taken = call(client.create_snapshot(identified(request))).await;
    let thawed = thaw(&mut node, &freeze_id).await;
    let mut taken = taken?;
    let is_ours = |snapshot: &&v1::Snapshot| snapshot.freeze_id == freeze_id;
    if taken.snapshots.iter().any(|snapshot| is_ours(&snapshot)) {
        let frozen: HashSet<&String> = volume_uids.iter().collect();
        let is_frozen = |snapshot: &v1::Snapshot| frozen.contains(&snapshot.volume_uid);
        let outcome = match taken.snapshots.iter().find(|snapshot| !is_frozen(snapshot)) {
            Some(other) => Err(format!(
                "{} is of a volume of another server than the node daemon's: nothing of it was frozen",
                export_name(other)
            )),
            None => thawed,
        };
        if let Err(why) = outcome {
            return Err(discard(&mut client, taken.snapshots.iter().filter(is_ours), &why).await);
        }
        let mark = v1::MarkSnapshotsFrozenRequest { freeze_id: freeze_id.clone() };
        let marked = call(client.mark_snapshots_frozen(mark)).await;
        // Copies that failed leave nothing to be marked; their operation has the reason.
        let is_gone = marked.as_ref().is_err_and(|failure| failure.exit_code == ExitCode::NotFound);
        if let Some(operation) = taken.operation.take_if(|_| is_gone) {
            finish(&mut client, operation).await?;
        }
        marked.map_err(|failure| {
            let what = format!("the snapshots are not called frozen, though they are: {}", failure.what);
            Failure { what, ..failure }
        })?;
    }
    report(&mut client, taken).await
}

/// What is told of them when they are durable.
async fn report(
    client: &mut ManagementClient<Channel>,
    mut taken: v1::CreateSnapshotResponse,
) -> Result<Report, Failure> {
    if let Some(operation) = taken.operation.take() {
        finish(client, operation).await?;
    }
    let mut snapshots = Vec::with_capacity(taken.snapshots.len());
    for snapshot in taken.snapshots {
        let named = v1::GetSnapshotRequest { snapshot_uid: snapshot.snapshot_uid, ..Default::default() };
        snapshots.push(call(client.get_snapshot(named)).await?);
    }
    Ok(created(&snapshots))
}

/// Whether all was frozen until now; why not.
async fn thaw(node: &mut NodeClient<Channel>, freeze_id: &str) -> Result<(), String> {
    let request = v1::ThawRequest { freeze_id: freeze_id.to_owned() };
    match call(node.thaw(request)).await {
        Ok(answer) if answer.was_frozen => Ok(()),
        Ok(answer) => Err(answer.reason),
        Err(failure) => Err(format!("the node daemon does not tell: {}", failure.what)),
    }
}

/// Deletes what is not what was asked for.
async fn discard(
    client: &mut ManagementClient<Channel>,
    snapshots: impl Iterator<Item = &v1::Snapshot>,
    why: &str,
) -> Failure {
    let mut left = Vec::new();
    for snapshot in snapshots {
        let snapshot_uid = snapshot.snapshot_uid.clone();
        let request = v1::DeleteSnapshotRequest { snapshot_uid, ..Default::default() };
        if once(client, request, |mut client, request| async move { client.delete_snapshot(request).await })
            .await
            .is_err()
        {
            left.push(export_name(snapshot));
        }
    }
    let what = format!("the file system was not frozen all the time: {why}");
    if left.is_empty() {
        return Failure::new(
            ExitCode::Precondition,
            format!("{what}; the snapshot was deleted"),
            "repeat the command, or take the snapshot without --freeze",
        );
    }
    let names = left.join(", ");
    let next = format!("delete it (volctl snapshot delete {names}), then repeat the command");
    Failure::new(ExitCode::Precondition, format!("{what}; {names} is there, not called frozen"), next)
}
