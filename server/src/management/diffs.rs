//! The call about what changed between two snapshots, whose answer is a stream.
//!
//! Owns the way from the comparison's thread to the caller: a few parts that wait to be sent, and how the stream ends. Never: compares. Called
//! by the service, which has looked at the caller's rights.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use proto::v1;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{self, Receiver};
use tonic::Status;

use super::ManagementService;
use super::snapshot_fields as fields;
use super::snapshots::TURN_WAIT_MAX;
use crate::lifecycle::{
    DataSide, DiffPart, DiffWanted, Lifecycle, LifecycleError, NameLock, NotTaken, Operation, Started,
};
use crate::scope::Scope;
use crate::status;
use crate::volume::diff::{Change, Changed};

/// Parts that wait to be sent.
const PARTS_WAITING: usize = 4;
/// So long the end of an operation is waited for whose last part has come.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The answer of DiffSnapshots.
pub(super) type DiffStream = Pin<Box<dyn Stream<Item = Result<v1::DiffSnapshotsResponse, Status>> + Send>>;

impl<D: DataSide> ManagementService<D> {
    pub(super) async fn begin_diff(
        &self,
        scope: Scope,
        request: v1::DiffSnapshotsRequest,
    ) -> Result<DiffStream, Status> {
        let named = fields::diff_wanted(request)?;
        let base = match named.base {
            Some(named) => Some(self.found_snapshot(&scope, named).await?),
            None => None,
        };
        let (target, volume) = self.found_source(&scope, named.target).await?;
        let wanted = DiffWanted { base, target, offset_bytes: named.offset_bytes };
        let lock_names = wanted.lock_names();
        let begin = move |lifecycle: &Lifecycle<D>, locks: &[NameLock]| {
            volume.iter().try_for_each(|volume| volume.check(lifecycle))?;
            let (sender, parts) = mpsc::channel(PARTS_WAITING);
            let take = move |part| {
                sender.try_send(part).map_err(|refused| match refused {
                    TrySendError::Full(part) => NotTaken::Full(part),
                    TrySendError::Closed(_) => NotTaken::Gone,
                })
            };
            let operation = lifecycle.begin_diff(locks, &wanted, take)?;
            Ok::<_, LifecycleError>(Started { made: parts, operation: Some(operation) })
        };
        let Started { made, operation } = self.begin_in_turn(&lock_names, TURN_WAIT_MAX, begin).await?;
        Ok(answer(made, operation))
    }
}

/// The parts as they come, and in the end why no more do.
fn answer(parts: Receiver<DiffPart>, operation: Option<Arc<Operation>>) -> DiffStream {
    Box::pin(unfold(Some((parts, operation)), |state| async {
        let (mut parts, operation) = state?;
        if let Some(part) = parts.recv().await {
            let message = message(part);
            return Some((Ok(message), Some((parts, operation))));
        }
        // Whoever handed the parts over says how it ended just behind the last.
        let operation = operation?;
        operation.wait(END_LIMIT).await;
        match operation.end() {
            Some(Err(error)) => Some((Err(status::from_lifecycle(&error)), None)),
            _ => None,
        }
    }))
}

fn message(part: DiffPart) -> v1::DiffSnapshotsResponse {
    let DiffPart { changes, next_offset_bytes, total } = part;
    v1::DiffSnapshotsResponse {
        ranges: changes.iter().map(range).collect(),
        next_offset_bytes,
        total: total.map(|total| v1::DiffTotal {
            base_capacity_bytes: total.base_bytes,
            target_capacity_bytes: total.target_bytes,
            data_bytes: total.data_bytes,
            zero_bytes: total.zero_bytes,
            ranges: total.ranges,
        }),
    }
}

fn range(changed: &Changed) -> v1::ChangedRange {
    let kind = match changed.change {
        Change::Data => v1::RangeKind::Data,
        Change::Zero => v1::RangeKind::Zero,
    };
    v1::ChangedRange {
        offset_bytes: changed.bytes.start,
        length_bytes: changed.bytes.end - changed.bytes.start,
        kind: kind.into(),
    }
}
