//! Snapshots: taken, deleted, listed. Their id is the storage server's uid, which outlives the volume.
//!
//! Owns: the steps, and that a name of CSI's is one snapshot's on the whole server, where the server has one for each volume. A snapshot
//! that is still being gathered is told as not ready; its caller asks again. Calls of one name take turns. Called by the service.

use std::time::Duration;

use prost_types::Timestamp;
use proto::csi::v1 as csi;
use proto::v1;
use tonic::Code;
use uuid::Uuid;

use super::api::{Call, by_uid};
use super::lists;
use super::locks::Locks;
use super::names;
use super::once::once;
use super::parameters;
use super::refusal::{Refusal, given, shown};
use super::sizes;
use super::topology::Place;
use super::volumes::bytes;

/// So long a call waits for a snapshot to be ready.
const READY_WAIT: Duration = Duration::from_secs(5);
/// Between two looks at it.
const READY_PAUSE: Duration = Duration::from_millis(100);

/// Takes a snapshot, or finds the one that it took before.
pub(super) async fn create(
    call: &Call,
    locks: &Locks,
    place: &Place,
    request: csi::CreateSnapshotRequest,
) -> Result<csi::CreateSnapshotResponse, Refusal> {
    place.check(request.accessibility_requirements.as_ref())?;
    let csi_name = names::csi_name(&request.name)?;
    given("source_volume_id", &request.source_volume_id)?;
    parameters::of_snapshot(&request.parameters)?;
    let uid = names::volume_uid(&request.source_volume_id)?;
    let name = names::of_csi(csi_name);
    let turn = locks.lock(&name).await;
    let named = named(call, &name).await?;
    let there = match named.iter().find(|snapshot| snapshot.volume_uid == request.source_volume_id) {
        Some(there) => there.clone(),
        None if named.is_empty() => take(call, vec![by_uid(uid)], name).await?.swap_remove(0),
        None => {
            let of = &named[0].volume_uid;
            return Err(Refusal::exists(format!("there is a snapshot {} of volume {of}", shown(csi_name))));
        }
    };
    drop(turn);
    let snapshot = to_csi(&ready(call, there).await?);
    Ok(csi::CreateSnapshotResponse { snapshot: Some(snapshot) })
}

/// Every snapshot of this name on the server, of whichever volume.
pub(super) async fn named(call: &Call, name: &str) -> Result<Vec<v1::Snapshot>, Refusal> {
    let of = v1::ListSnapshotsRequest { name: name.to_owned(), ..Default::default() };
    let every = lists::Wanted::of(0, String::new())?;
    let (mut all, _) = every.collect(|size, token| page(call, of.clone(), size, token)).await?;
    // An older server gives those of other names as well.
    all.retain(|snapshot| snapshot.name == name);
    Ok(all)
}

/// Takes snapshots of the volumes at one instant.
pub(super) async fn take(
    call: &Call,
    volume_names: Vec<String>,
    name: String,
) -> Result<Vec<v1::Snapshot>, Refusal> {
    let count = volume_names.len();
    let question = v1::CreateSnapshotRequest { volume_names, name, ..Default::default() };
    let taken = once(call, question, |mut stub, request| async move { stub.create_snapshot(request).await });
    let taken = taken.await?.snapshots;
    if taken.len() != count {
        let what = format!("the storage server took {} snapshots instead of {count}", taken.len());
        return Err(Refusal::new(Code::Internal, what));
    }
    Ok(taken)
}

/// Waits a while for a snapshot; gives it back as it is then.
pub(super) async fn ready(call: &Call, mut snapshot: v1::Snapshot) -> Result<v1::Snapshot, Refusal> {
    let uid = Uuid::try_parse(&snapshot.snapshot_uid);
    let uid =
        uid.map_err(|_| Refusal::new(Code::Internal, "the storage server told a snapshot_uid that is none"))?;
    let begun = std::time::Instant::now();
    while !is_ready(&snapshot) && begun.elapsed() < READY_WAIT && call.left() > READY_PAUSE * 3 {
        tokio::time::sleep(READY_PAUSE).await;
        snapshot = call.snapshot(uid).await.map_err(|refusal| match refusal.code {
            Code::NotFound => Refusal::pending("the snapshot was not finished, and is gone; repeat the call"),
            _ => refusal,
        })?;
    }
    Ok(snapshot)
}

fn is_ready(snapshot: &v1::Snapshot) -> bool {
    snapshot.state() == v1::SnapshotState::Ready
}

/// Deletes a snapshot.
pub(super) async fn delete(
    call: &Call,
    request: csi::DeleteSnapshotRequest,
) -> Result<csi::DeleteSnapshotResponse, Refusal> {
    if let Some(uid) = names::uid(given("snapshot_id", &request.snapshot_id)?) {
        remove(call, uid).await?;
    }
    Ok(csi::DeleteSnapshotResponse {})
}

/// Deletes a snapshot, if it is there.
pub(super) async fn remove(call: &Call, uid: Uuid) -> Result<(), Refusal> {
    let question = v1::DeleteSnapshotRequest { snapshot_uid: uid.to_string(), ..Default::default() };
    call.ask(question, |mut stub, request| async move { stub.delete_snapshot(request).await }).await?;
    Ok(())
}

/// One snapshot.
pub(super) async fn get(
    call: &Call,
    request: csi::GetSnapshotRequest,
) -> Result<csi::GetSnapshotResponse, Refusal> {
    let id = given("snapshot_id", &request.snapshot_id)?;
    let none = || Refusal::not_found(format!("there is no snapshot {}", shown(id)));
    let snapshot = call.snapshot(names::uid(id).ok_or_else(none)?).await?;
    Ok(csi::GetSnapshotResponse { snapshot: Some(to_csi(&snapshot)) })
}

/// All snapshots of the server; of one volume, or one of them, where that is asked for.
pub(super) async fn list(
    call: &Call,
    request: csi::ListSnapshotsRequest,
) -> Result<csi::ListSnapshotsResponse, Refusal> {
    let wanted = lists::Wanted::of(request.max_entries, request.starting_token)?;
    let (snapshot_id, source_volume_id) = (request.snapshot_id, request.source_volume_id);
    let (snapshots, next_token) = if !snapshot_id.is_empty() {
        (one(call, &snapshot_id, &source_volume_id).await?, String::new())
    } else if source_volume_id.is_empty() {
        wanted.collect(|size, token| page(call, v1::ListSnapshotsRequest::default(), size, token)).await?
    } else if let Some(uid) = names::uid(&source_volume_id) {
        of_volume(call, wanted, uid).await?
    } else {
        (Vec::new(), String::new())
    };
    let entry =
        |snapshot: &v1::Snapshot| csi::list_snapshots_response::Entry { snapshot: Some(to_csi(snapshot)) };
    Ok(csi::ListSnapshotsResponse { entries: snapshots.iter().map(entry).collect(), next_token })
}

/// The snapshot of this id, if it is there and of the volume that is asked for.
async fn one(call: &Call, snapshot_id: &str, source_volume_id: &str) -> Result<Vec<v1::Snapshot>, Refusal> {
    let Some(uid) = names::uid(snapshot_id) else { return Ok(Vec::new()) };
    match call.snapshot(uid).await {
        Ok(found) if source_volume_id.is_empty() || found.volume_uid == source_volume_id => Ok(vec![found]),
        Ok(_) => Ok(Vec::new()),
        Err(refusal) if refusal.code == Code::NotFound => Ok(Vec::new()),
        Err(refusal) => Err(refusal),
    }
}

/// Those of a volume. The server finds them by the volume for as long as it is there, and one by one once it is deleted.
async fn of_volume(
    call: &Call,
    wanted: lists::Wanted,
    uid: Uuid,
) -> Result<(Vec<v1::Snapshot>, String), Refusal> {
    match call.volume(uid).await {
        Ok(_) => {
            let of = v1::ListSnapshotsRequest { volume_name: by_uid(uid), ..Default::default() };
            wanted.collect(|size, token| page(call, of.clone(), size, token)).await
        }
        Err(refusal) if refusal.code == Code::NotFound => {
            // A page of all of them, of which it has some: fewer than a page may have, and the token goes on.
            let all =
                wanted.collect(|size, token| page(call, v1::ListSnapshotsRequest::default(), size, token));
            let (mut found, next_token) = all.await?;
            let uid = uid.to_string();
            found.retain(|snapshot| snapshot.volume_uid == uid);
            Ok((found, next_token))
        }
        Err(refusal) => Err(refusal),
    }
}

/// One page of the snapshots that `of` filters.
pub(super) async fn page(
    call: &Call,
    of: v1::ListSnapshotsRequest,
    page_size: u32,
    page_token: String,
) -> Result<(Vec<v1::Snapshot>, String), Refusal> {
    let question = v1::ListSnapshotsRequest { page_size, page_token, ..of };
    let page =
        call.ask(question, |mut stub, request| async move { stub.list_snapshots(request).await }).await?;
    Ok((page.snapshots, page.next_page_token))
}

/// As CSI has it. Where a snapshot can be reached is left out, as it may be: where its volume can. csi-sanity 5.6.0 compares it with Go's
/// inner caches, so that whoever tells it fails.
pub(super) fn to_csi(snapshot: &v1::Snapshot) -> csi::Snapshot {
    let is_of_group = names::is_of_group(&snapshot.name);
    csi::Snapshot {
        size_bytes: bytes(sizes::clear(snapshot.capacity_bytes, snapshot.is_encrypted)),
        snapshot_id: snapshot.snapshot_uid.clone(),
        source_volume_id: snapshot.volume_uid.clone(),
        creation_time: Some(timestamp(snapshot.created_at_ms)),
        ready_to_use: is_ready(snapshot),
        group_snapshot_id: if is_of_group { snapshot.group_uid.clone() } else { String::new() },
        accessible_topology: Vec::new(),
    }
}

/// Milliseconds since the Unix epoch.
pub(super) fn timestamp(ms: i64) -> Timestamp {
    Timestamp { seconds: ms.div_euclid(1000), nanos: ms.rem_euclid(1000) as i32 * 1_000_000 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_told_as_csi_has_it() {
        let mut snapshot = v1::Snapshot {
            name: names::of_csi("s"),
            snapshot_uid: "s-uid".to_owned(),
            volume_uid: "v-uid".to_owned(),
            group_uid: "g-uid".to_owned(),
            capacity_bytes: 4096,
            created_at_ms: 1_500,
            state: v1::SnapshotState::Creating.into(),
            ..Default::default()
        };
        let told = to_csi(&snapshot);
        assert_eq!((told.snapshot_id.as_str(), told.source_volume_id.as_str()), ("s-uid", "v-uid"));
        assert_eq!((told.size_bytes, told.ready_to_use, told.group_snapshot_id.as_str()), (4096, false, ""));
        assert_eq!(told.creation_time, Some(Timestamp { seconds: 1, nanos: 500_000_000 }));
        snapshot.set_state(v1::SnapshotState::Ready);
        snapshot.name = names::of_csi_group("g");
        let told = to_csi(&snapshot);
        assert_eq!((told.ready_to_use, told.group_snapshot_id.as_str()), (true, "g-uid"));
        // What its copies can hold.
        (snapshot.is_encrypted, snapshot.capacity_bytes) = (true, 4096 + (16 << 20));
        assert_eq!(to_csi(&snapshot).size_bytes, 4096);
        assert_eq!(timestamp(-1), Timestamp { seconds: -1, nanos: 999_000_000 });
    }
}
