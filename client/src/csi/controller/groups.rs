//! Group snapshots: snapshots of several volumes at one instant, which the storage server takes as one.
//!
//! Owns: the steps, and whether what is there is the group that is asked for. A group's id is the server's `group_uid`; there is nothing of
//! a group but its snapshots. Calls of one name take turns. Called by the service.

use std::collections::BTreeSet;

use proto::csi::v1 as csi;
use proto::v1;
use tonic::Code;
use uuid::Uuid;

use super::api::{Call, by_uid};
use super::lists;
use super::locks::Locks;
use super::names;
use super::parameters;
use super::refusal::{Refusal, given, shown};
use super::snapshots;

/// Volumes of one group at most, as the server has it: each stands still meanwhile.
const VOLUMES_MAX: usize = 64;

/// Takes a group of snapshots, or finds the one that it took before.
pub(super) async fn create(
    call: &Call,
    locks: &Locks,
    request: csi::CreateVolumeGroupSnapshotRequest,
) -> Result<csi::CreateVolumeGroupSnapshotResponse, Refusal> {
    let csi_name = names::csi_name(&request.name)?;
    parameters::of_snapshot(&request.parameters)?;
    let uids = sources(&request.source_volume_ids)?;
    let name = names::of_csi_group(csi_name);
    let turn = locks.lock(&name).await;
    let there = snapshots::named(call, &name).await?;
    let taken = if there.is_empty() {
        snapshots::take(call, uids.iter().map(|uid| by_uid(*uid)).collect(), name).await?
    } else if is_group_of(&there, &uids) {
        there
    } else {
        return Err(Refusal::exists(format!(
            "there is a group snapshot {} of other volumes",
            shown(csi_name)
        )));
    };
    drop(turn);
    let mut ready = Vec::with_capacity(taken.len());
    for snapshot in taken {
        ready.push(snapshots::ready(call, snapshot).await?);
    }
    Ok(csi::CreateVolumeGroupSnapshotResponse { group_snapshot: to_csi(&ready) })
}

/// The volumes of a new group.
fn sources(ids: &[String]) -> Result<BTreeSet<Uuid>, Refusal> {
    if ids.is_empty() || ids.len() > VOLUMES_MAX {
        return Err(Refusal::invalid(format!(
            "source_volume_ids: {}, and there may be 1 to {VOLUMES_MAX}",
            ids.len()
        )));
    }
    let uids = ids.iter().map(|id| names::volume_uid(id)).collect::<Result<BTreeSet<_>, _>>()?;
    if uids.len() != ids.len() {
        return Err(Refusal::invalid("source_volume_ids: a volume comes twice"));
    }
    Ok(uids)
}

/// Whether these are of one instant, and of exactly these volumes.
fn is_group_of(there: &[v1::Snapshot], uids: &BTreeSet<Uuid>) -> bool {
    let of: BTreeSet<&str> = there.iter().map(|snapshot| snapshot.volume_uid.as_str()).collect();
    let wanted: Vec<String> = uids.iter().map(Uuid::to_string).collect();
    let is_one = there.iter().all(|snapshot| snapshot.group_uid == there[0].group_uid);
    is_one && of == wanted.iter().map(String::as_str).collect() && there.len() == wanted.len()
}

/// A group.
pub(super) async fn get(
    call: &Call,
    request: csi::GetVolumeGroupSnapshotRequest,
) -> Result<csi::GetVolumeGroupSnapshotResponse, Refusal> {
    let id = given("group_snapshot_id", &request.group_snapshot_id)?;
    let there = members(call, id).await?;
    if there.is_empty() {
        return Err(Refusal::not_found(format!("there is no group snapshot {}", shown(id))));
    }
    if let Some(other) = strangers(&there, &request.snapshot_ids).next() {
        return Err(Refusal::invalid(format!("snapshot_ids: {} is not of this group", shown(other))));
    }
    Ok(csi::GetVolumeGroupSnapshotResponse { group_snapshot: to_csi(&there) })
}

/// Deletes the snapshots of a group, those that are still there.
pub(super) async fn delete(
    call: &Call,
    request: csi::DeleteVolumeGroupSnapshotRequest,
) -> Result<csi::DeleteVolumeGroupSnapshotResponse, Refusal> {
    let there = members(call, given("group_snapshot_id", &request.group_snapshot_id)?).await?;
    for other in strangers(&there, &request.snapshot_ids) {
        // One that an earlier call deleted is no stranger.
        let Some(uid) = names::uid(other) else { continue };
        match call.snapshot(uid).await {
            Ok(_) => {
                return Err(Refusal::invalid(format!("snapshot_ids: {} is of another group", shown(other))));
            }
            Err(refusal) if refusal.code == Code::NotFound => {}
            Err(refusal) => return Err(refusal),
        }
    }
    for snapshot in there {
        if let Some(uid) = names::uid(&snapshot.snapshot_uid) {
            snapshots::remove(call, uid).await?;
        }
    }
    Ok(csi::DeleteVolumeGroupSnapshotResponse {})
}

/// The snapshots of a group; none of an id that no group can have.
async fn members(call: &Call, id: &str) -> Result<Vec<v1::Snapshot>, Refusal> {
    if names::uid(id).is_none() {
        return Ok(Vec::new());
    }
    let of = v1::ListSnapshotsRequest { group_uid: id.to_owned(), ..Default::default() };
    let all = lists::Wanted::of(0, String::new())?;
    Ok(all.collect(|size, token| snapshots::page(call, of.clone(), size, token)).await?.0)
}

/// Ids that are none of these snapshots'.
fn strangers<'a>(there: &'a [v1::Snapshot], ids: &'a [String]) -> impl Iterator<Item = &'a String> {
    ids.iter().filter(|id| !there.iter().any(|snapshot| snapshot.snapshot_uid == **id))
}

/// As CSI has it; of no snapshots there is no group.
fn to_csi(there: &[v1::Snapshot]) -> Option<csi::VolumeGroupSnapshot> {
    let first = there.first()?;
    let group_snapshot_id = first.group_uid.clone();
    let of_group = |snapshot| csi::Snapshot {
        group_snapshot_id: group_snapshot_id.clone(),
        ..snapshots::to_csi(snapshot)
    };
    let told: Vec<csi::Snapshot> = there.iter().map(of_group).collect();
    Some(csi::VolumeGroupSnapshot {
        ready_to_use: told.iter().all(|snapshot| snapshot.ready_to_use),
        creation_time: Some(snapshots::timestamp(first.created_at_ms)),
        snapshots: told,
        group_snapshot_id,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(volume_uid: Uuid, group_uid: &str, state: v1::SnapshotState) -> v1::Snapshot {
        v1::Snapshot {
            snapshot_uid: format!("of-{volume_uid}"),
            volume_uid: volume_uid.to_string(),
            group_uid: group_uid.to_owned(),
            state: state.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_group_is_the_same_volumes_at_one_instant() {
        let (a, b, c) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let ready = v1::SnapshotState::Ready;
        let there = [snapshot(b, "g", ready), snapshot(a, "g", ready)];
        assert!(is_group_of(&there, &[a, b].into()));
        for other in [BTreeSet::from([a]), [a, c].into(), [a, b, c].into()] {
            assert!(!is_group_of(&there, &other));
        }
        assert!(!is_group_of(&[snapshot(a, "g", ready), snapshot(b, "h", ready)], &[a, b].into()));
        let half = [there[0].clone(), snapshot(a, "g", v1::SnapshotState::Creating)];
        let told = to_csi(&half).unwrap();
        assert_eq!((told.group_snapshot_id.as_str(), told.ready_to_use), ("g", false));
        assert!(told.snapshots.iter().all(|snapshot| snapshot.group_snapshot_id == "g"));
        assert!(to_csi(&there).unwrap().ready_to_use && to_csi(&[]).is_none());
        let ids = [there[0].snapshot_uid.clone(), "other".to_owned()];
        assert_eq!(strangers(&there, &ids).collect::<Vec<_>>(), ["other"]);
    }

    #[test]
    fn the_volumes_of_a_group_are_looked_at() {
        let id = |number| Uuid::from_u128(number).to_string();
        assert_eq!(sources(&[]).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(sources(&vec![id(1); 2]).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(sources(&vec![id(1); 65]).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(sources(&["nonsense".to_owned()]).unwrap_err().code, Code::NotFound);
        assert_eq!(sources(&[id(1), id(2)]).unwrap().len(), 2);
    }
}
