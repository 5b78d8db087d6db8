//! Snapshots, clones and their operations of the storage server that the tests have in memory.
//!
//! An operation goes on until it has been looked at twice. One that makes something called `full` fails then, for want of space.

use std::collections::BTreeMap;

use proto::error_reason as reason;
use proto::v1;
use uuid::Uuid;

/// Looks at an operation until it has ended.
const LOOKS: u64 = 2;

/// What a server knows of copies.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    /// By volume and name.
    pub(crate) snapshots: BTreeMap<(String, String), v1::Snapshot>,
    pub(crate) operations: BTreeMap<String, v1::Operation>,
    /// Clones that are being made, by operation.
    clones: BTreeMap<String, v1::Volume>,
}

impl Copies {
    pub(crate) fn begin(&mut self, kind: &str, targets: Vec<String>) -> v1::Operation {
        let operation = v1::Operation {
            operation_id: Uuid::new_v4().to_string(),
            kind: kind.to_owned(),
            targets,
            state: v1::OperationState::Running.into(),
            total_bytes: LOOKS,
            started_at_ms: 1,
            ..Default::default()
        };
        self.operations.insert(operation.operation_id.clone(), operation.clone());
        operation
    }

    /// Those that there are, or new ones that are being made.
    pub(crate) fn create(&mut self, request: v1::CreateSnapshotRequest) -> v1::CreateSnapshotResponse {
        let group_uid = Uuid::new_v4().to_string();
        let key = |volume: &String| (volume.clone(), request.name.clone());
        let is_new = request.volume_names.iter().any(|volume| !self.snapshots.contains_key(&key(volume)));
        let mut snapshots = Vec::new();
        for volume in &request.volume_names {
            let new = v1::Snapshot {
                name: request.name.clone(),
                snapshot_uid: Uuid::new_v4().to_string(),
                volume_name: volume.clone(),
                capacity_bytes: 1 << 30,
                allocated_bytes: 1 << 20,
                block_size_bytes: 4096,
                state: v1::SnapshotState::Creating.into(),
                created_at_ms: 1_772_366_399_999,
                group_uid: group_uid.clone(),
                ..Default::default()
            };
            snapshots.push(self.snapshots.entry(key(volume)).or_insert(new).clone());
        }
        let targets =
            || request.volume_names.iter().map(|volume| format!("{volume}@{}", request.name)).collect();
        let operation = is_new.then(|| self.begin("snapshot", targets()));
        v1::CreateSnapshotResponse { snapshots, operation }
    }

    pub(crate) fn begin_clone(&mut self, volume: v1::Volume) -> v1::Operation {
        let operation = self.begin("clone", vec![volume.name.clone()]);
        self.clones.insert(operation.operation_id.clone(), volume);
        operation
    }

    pub(crate) fn find(&self, volume_name: &str, name: &str, uid: &str) -> Option<v1::Snapshot> {
        let is_it = |one: &&v1::Snapshot| {
            one.snapshot_uid == uid || (one.volume_name == volume_name && one.name == name)
        };
        self.snapshots.values().find(is_it).cloned()
    }

    /// One that goes on ends at once.
    pub(crate) fn cancel(&mut self, operation_id: &str) -> Option<v1::Operation> {
        let operation = self.operations.get_mut(operation_id)?;
        if operation.state() == v1::OperationState::Running {
            operation.set_state(v1::OperationState::Cancelled);
            operation.ended_at_ms = 2;
        }
        Some(operation.clone())
    }

    /// Looks at an operation, and the volume that has come of it.
    pub(crate) fn look(&mut self, operation_id: &str) -> Option<(v1::Operation, Option<v1::Volume>)> {
        let operation = self.operations.get_mut(operation_id)?;
        operation.done_bytes += 1;
        if operation.done_bytes < LOOKS {
            return Some((operation.clone(), None));
        }
        operation.ended_at_ms = 2;
        let is_failed = operation.targets.iter().any(|target| target.ends_with("full"));
        operation.set_state(v1::OperationState::Succeeded);
        if is_failed {
            operation.set_state(v1::OperationState::Failed);
            operation.error_reason = reason::NO_SPACE.to_owned();
            operation.error_message = "no space left on the server for the copy".to_owned();
        }
        let operation = operation.clone();
        self.snapshots.retain(|_, snapshot| !is_failed || snapshot.state() == v1::SnapshotState::Ready);
        for snapshot in self.snapshots.values_mut() {
            snapshot.set_state(v1::SnapshotState::Ready);
        }
        let made = self.clones.remove(operation_id).filter(|_| !is_failed);
        Some((operation, made))
    }
}
