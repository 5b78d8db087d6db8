//! What names a snapshot in a request, checked; and the requests about snapshots and clones.
//!
//! Owns the rules for them. Looks at nothing but the request. Called by `snapshots.rs`.

use proto::v1;
use proto::volume_name::is_volume_name;
use tonic::Status;
use uuid::Uuid;

use super::fields::{CAPACITY_BYTES_MAX, Fields};
use super::page_token::PageToken;
use super::settings_fields;
use crate::catalog::{SnapshotFilter, SnapshotKey};
use crate::lifecycle::{CloneOf, CloneWanted, SnapshotNamed};

/// Volumes at most that snapshots are taken of at one instant: each stands still meanwhile.
const GROUP_VOLUMES_MAX: usize = 64;

impl Fields {
    pub(super) fn snapshot_filter(
        &mut self,
        volume_name: String,
        group_uid: &str,
        name: String,
    ) -> SnapshotFilter {
        SnapshotFilter {
            volume_name: (!volume_name.is_empty()).then(|| self.volume("volume_name", volume_name)),
            group_uid: (!group_uid.is_empty()).then(|| self.uuid("group_uid", group_uid)),
            name: (!name.is_empty()).then(|| self.snapshot_name("name", name)),
            ..SnapshotFilter::default()
        }
    }

    pub(super) fn snapshot_page_token(
        &mut self,
        field: &'static str,
        token: &PageToken,
        text: &str,
    ) -> SnapshotKey {
        if text.is_empty() {
            return SnapshotKey::default();
        }
        let key = token.key(text).and_then(snapshot_key);
        self.require(key.is_some(), field, || "is not a token of this list and server".to_owned());
        key.unwrap_or_default()
    }
}

/// A snapshot's place in lists, of a page token: volume, name and uid with '/' between them.
fn snapshot_key(text: &str) -> Option<SnapshotKey> {
    let parts: Vec<&str> = text.split('/').collect();
    let [volume_name, name, snapshot_uid] = parts[..] else { return None };
    let holds = (volume_name.is_empty() || is_volume_name(volume_name))
        && is_volume_name(name)
        && Uuid::try_parse(snapshot_uid).is_ok();
    let owned = |text: &str| text.to_owned();
    holds.then(|| SnapshotKey {
        volume_name: owned(volume_name),
        name: owned(name),
        snapshot_uid: owned(snapshot_uid),
    })
}

/// The volumes, the name and the freeze that CreateSnapshot asks for.
pub(super) fn snapshots_wanted(
    request: v1::CreateSnapshotRequest,
) -> Result<(Vec<String>, String, Option<Uuid>), Status> {
    let mut fields = Fields::default();
    let count = request.volume_names.len();
    fields.require((1..=GROUP_VOLUMES_MAX).contains(&count), "volume_names", || {
        format!("must be 1 to {GROUP_VOLUMES_MAX} volumes, not {count}")
    });
    let volume_names =
        request.volume_names.into_iter().map(|name| fields.volume("volume_names", name)).collect();
    let name = fields.snapshot_name("name", request.name);
    fields.require(!request.freeze || request.request_id.is_empty(), "request_id", || {
        "is not taken with freeze: the call is repeated as it is".to_owned()
    });
    let freeze_id = (!request.freeze_id.is_empty()).then(|| fields.uuid("freeze_id", &request.freeze_id));
    fields.finish()?;
    Ok((volume_names, name, freeze_id))
}

/// Whether the volumes, which may be asked for by name and by uid, are all different.
///
/// # Errors
/// INVALID_ARGUMENT where one comes twice.
pub(super) fn each_once(volume_names: &[String]) -> Result<(), Status> {
    let different: std::collections::HashSet<&String> = volume_names.iter().collect();
    let mut fields = Fields::default();
    fields.require(different.len() == volume_names.len(), "volume_names", || {
        "must name each volume once".to_owned()
    });
    fields.finish()
}

/// How the fields are called that name a snapshot.
#[derive(Debug, Clone, Copy)]
pub(super) struct SnapshotFields {
    volume_name: &'static str,
    name: &'static str,
    snapshot_uid: &'static str,
}

/// Of GetSnapshot and DeleteSnapshot.
pub(super) const OF_SNAPSHOT: SnapshotFields =
    SnapshotFields { volume_name: "volume_name", name: "name", snapshot_uid: "snapshot_uid" };
/// Of RestoreVolume, which knows no uid.
pub(super) const OF_RESTORE: SnapshotFields =
    SnapshotFields { volume_name: "volume_name", name: "snapshot_name", snapshot_uid: "snapshot_name" };
const OF_CLONE: SnapshotFields = SnapshotFields {
    volume_name: "source_volume_name",
    name: "source_snapshot_name",
    snapshot_uid: "source_snapshot_uid",
};

const OF_DIFF_BASE: SnapshotFields = SnapshotFields {
    volume_name: "base.volume_name",
    name: "base.snapshot_name",
    snapshot_uid: "base.snapshot_uid",
};
const OF_DIFF_TARGET: SnapshotFields = SnapshotFields {
    volume_name: "target.volume_name",
    name: "target.snapshot_name",
    snapshot_uid: "target.snapshot_uid",
};

/// The snapshot that a request means: by both names, or by its uid.
pub(super) fn snapshot_named(
    called: SnapshotFields,
    volume_name: String,
    name: String,
    snapshot_uid: &str,
) -> Result<SnapshotNamed, Status> {
    let mut fields = Fields::default();
    let is_by_name = !volume_name.is_empty() || !name.is_empty();
    let is_one = is_by_name == snapshot_uid.is_empty();
    fields.require(is_one, called.snapshot_uid, || {
        "give either the volume's name and the snapshot's, or the snapshot's uid".to_owned()
    });
    let named = if is_by_name {
        SnapshotNamed::Name {
            volume_name: fields.volume(called.volume_name, volume_name),
            name: fields.snapshot_name(called.name, name),
        }
    } else if is_one {
        SnapshotNamed::Uid(fields.uuid(called.snapshot_uid, snapshot_uid))
    } else {
        SnapshotNamed::Uid(Uuid::nil())
    };
    fields.finish()?;
    Ok(named)
}

/// What a clone is made of, as it is named.
#[derive(Debug)]
pub(super) enum SourceNamed {
    Volume(String),
    Snapshot(SnapshotNamed),
}

/// The clone that CloneVolume asks for; its source is still to be looked up.
pub(super) fn clone_wanted(request: v1::CloneVolumeRequest) -> Result<(CloneWanted, SourceNamed), Status> {
    let mut fields = Fields::default();
    let name = fields.volume_name("name", request.name);
    let labels = settings_fields::new_labels(&mut fields, request.labels);
    let description = settings_fields::description(&mut fields, request.description);
    let capacity_bytes = request.capacity_bytes;
    fields.require(capacity_bytes <= CAPACITY_BYTES_MAX, "capacity_bytes", || {
        format!("must be at most {CAPACITY_BYTES_MAX}")
    });
    fields.finish()?;
    let (volume_name, snapshot_name) = (request.source_volume_name, request.source_snapshot_name);
    let named = source_named(OF_CLONE, volume_name, snapshot_name, &request.source_snapshot_uid)?;
    let source = CloneOf::Volume(String::new());
    Ok((CloneWanted { name, source, capacity_bytes, labels, description }, named))
}

/// The volume or the snapshot that a request means.
fn source_named(
    called: SnapshotFields,
    volume_name: String,
    snapshot_name: String,
    snapshot_uid: &str,
) -> Result<SourceNamed, Status> {
    if !snapshot_name.is_empty() || !snapshot_uid.is_empty() {
        return Ok(SourceNamed::Snapshot(snapshot_named(called, volume_name, snapshot_name, snapshot_uid)?));
    }
    let mut fields = Fields::default();
    let name = fields.volume(called.volume_name, volume_name);
    fields.finish()?;
    Ok(SourceNamed::Volume(name))
}

/// What DiffSnapshots compares, as it is named.
#[derive(Debug)]
pub(super) struct DiffNamed {
    pub(super) base: Option<SnapshotNamed>,
    pub(super) target: SourceNamed,
    pub(super) offset_bytes: u64,
}

/// What DiffSnapshots asks for; its sides are still to be looked up.
pub(super) fn diff_wanted(request: v1::DiffSnapshotsRequest) -> Result<DiffNamed, Status> {
    let v1::DiffSnapshotsRequest { base, target, offset_bytes } = request;
    let base = base.map(|side| {
        let v1::DiffSide { volume_name, snapshot_name, snapshot_uid } = side;
        snapshot_named(OF_DIFF_BASE, volume_name, snapshot_name, &snapshot_uid)
    });
    let v1::DiffSide { volume_name, snapshot_name, snapshot_uid } = target.unwrap_or_default();
    let target = source_named(OF_DIFF_TARGET, volume_name, snapshot_name, &snapshot_uid)?;
    let mut fields = Fields::default();
    let can_go_on = offset_bytes == 0 || matches!(target, SourceNamed::Snapshot(_));
    fields.require(can_go_on, "offset_bytes", || {
        "must be 0 for a volume, which has another instant in each call: take a snapshot, and compare that".to_owned()
    });
    fields.finish()?;
    Ok(DiffNamed { base: base.transpose()?, target, offset_bytes })
}
