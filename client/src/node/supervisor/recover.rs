//! What becomes of a device whose process has ended unasked: another process takes it on.
//!
//! ```text
//!   process ends ─► its device stays in the kernel, requests wait ─► new spec: same device, higher epoch ─► new process
//!        ▲                                                                                                    │
//!        └──────────────────────────────── for as long as it takes, with pauses ──────────────────────────────┘
//! ```
//! The kernel issues what was in flight once more (`UBLK_F_USER_RECOVERY_REISSUE`), so users see a pause and no error. What
//! the former process had sent cannot land late: the new epoch's first GO waits for it at the server. A foreign server waits for nothing:
//! on its disks what was in flight fails (`device/attachment/made.rs`). Live upgrade is the same on purpose: the process is ended, and the
//! program that is installed now takes over.
//! Called by: `supervisor` and `node_service`. Invariant: the target's lock is held while a device changes hands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;
use ublk_core::ControlDevice;
use ublk_core::control::DeviceState as UblkState;

use super::{Supervisor, blocking};
use crate::causes::with_sources;
use crate::contract::{AttachmentDir, DeviceSpec, ExportSpec, attachment_hash};
use crate::device::connect::dial::{Dialled, OPEN_TIMEOUT};
use crate::device::connect::slots;
use crate::node::attachment_record::AttachmentRecord;
use crate::node::device_process;
use crate::node::error::NodeError;
use crate::node::recover_spec::recover_spec;
use crate::node::target::DetachSelector;

/// Until a process that cannot be watched is looked at again.
const WATCH_PAUSE: Duration = Duration::from_secs(5);
/// Before the second try, and before the first if the process did not live; each pause after it is twice as long, up to the longest:
/// what is in the way (a full disk, memory, a program that is being replaced) may take its time to go.
const PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(30);

fn longer(pause: Duration) -> Duration {
    PAUSE_MAX.min(pause * 2)
}
/// A process that has lived for so long did not die of being started.
const LIVED: Duration = Duration::from_secs(3);
/// For so long at most a connection to somebody else's server is held for a new device process, and so often it is looked whether the
/// process has one of its own.
const HELD_MAX: Duration = Duration::from_secs(60);
const HELD_LOOK: Duration = Duration::from_millis(50);

impl Supervisor {
    /// Waits for the end of an attachment's process, on a task of its own, and recovers the device if nobody asked for it.
    pub(in crate::node) fn watch(self: &Arc<Self>, dir: &AttachmentDir) {
        let (supervisor, dir) = (Arc::clone(self), dir.clone());
        tokio::spawn(async move {
            let started = Instant::now();
            while let Err(error) = wait_until_ended(&dir).await {
                let (folder, error) = (dir.path().display(), with_sources(&error));
                tracing::error!(error, %folder, "cannot watch a device process yet; trying again");
                tokio::time::sleep(WATCH_PAUSE).await;
            }
            supervisor.recover_dead(&dir, started.elapsed() > LIVED).await;
        });
    }

    async fn recover_dead(self: &Arc<Self>, dir: &AttachmentDir, has_lived: bool) {
        let mut pause = PAUSE;
        for retry in 0u32.. {
            if retry > 0 || !has_lived {
                tokio::time::sleep(pause).await;
                pause = longer(pause);
            }
            // The folder of an attachment that was ended on purpose is gone, or says so. One that cannot be read is tried again.
            let found = match AttachmentRecord::read(dir.clone()) {
                Ok(Some(record)) => record,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(folder = %dir.path().display(), %error, "cannot read a device's state file; trying again");
                    continue;
                }
            };
            let _guard = self.locks.lock(&found.lock_name()).await;
            let record = match AttachmentRecord::read(dir.clone()) {
                Ok(Some(record)) => record,
                Ok(None) => return,
                Err(_) => continue,
            };
            let Some(spec) = recover_spec(&record) else { return };
            let target = record.spec.target.clone();
            match self.recover(&record, spec).await {
                Ok(_) => return,
                Err(error @ NodeError::DeviceFailed { .. }) => {
                    tracing::error!(target, error = with_sources(&error), "nothing is left to recover");
                    return;
                }
                Err(error) => {
                    tracing::error!(
                        target,
                        retry,
                        next_try_in = ?pause,
                        error = with_sources(&error),
                        "a device cannot be taken on yet"
                    );
                }
            }
        }
    }

    /// Starts a process that takes the device on. The target's lock is held.
    ///
    /// # Errors
    /// [`NodeError`]: the device is gone, or the process cannot take it on; it stays as it was.
    pub(in crate::node) async fn recover(
        self: &Arc<Self>,
        record: &AttachmentRecord,
        spec: DeviceSpec,
    ) -> Result<v1::NodeAttachment, NodeError> {
        let started = Instant::now();
        check_device(&spec).await?;
        let attachment = match self.start_device(&record.dir, &spec).await {
            Ok(attachment) => attachment,
            Err(error) => {
                device_process::kill(&record.dir, &spec.target).await?;
                return Err(error);
            }
        };
        let stall_ms = started.elapsed().as_millis();
        tracing::warn!(
            target = spec.target,
            stall_ms,
            "a device process had ended; another one took its device on"
        );
        Ok(attachment)
    }

    /// Replaces a device process by the program that is installed now; gives how long I/O stood still.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub async fn upgrade(
        self: &Arc<Self>,
        request: &v1::UpgradeRequest,
    ) -> Result<v1::UpgradeResponse, NodeError> {
        let selector = DetachSelector::parse(&request.target)?;
        let target = request.target.clone();
        let not_attached = || NodeError::NotAttached { target: target.clone() };
        let found = self.find(&selector)?.ok_or_else(not_attached)?;
        let _guard = self.locks.lock(&found.lock_name()).await;
        let record = AttachmentRecord::read(found.dir.clone())?.ok_or_else(not_attached)?;
        let is_starting = matches!(record.state(), v1::DeviceState::Starting | v1::DeviceState::Stopping);
        if is_starting {
            let why = "it is being made or taken away".to_owned();
            return Err(NodeError::UpgradeRefused { target, why });
        }
        let can_recover = can_recover(&record).await?;
        if !can_recover {
            let why = "the driver cannot hand its device to another process".to_owned();
            return Err(NodeError::UpgradeRefused { target, why });
        }
        // Kept until the next process has its own: a server that ends with its last client would be gone in between.
        let held = self.hold_foreign_server(&record.spec).await?;
        let from_version = record.status.as_ref().map(|status| status.program_version.clone());
        let stalled = Instant::now();
        device_process::kill(&record.dir, &record.spec.target).await?;
        let record = AttachmentRecord::read(record.dir.clone())?.ok_or_else(not_attached)?;
        let spec = recover_spec(&record).ok_or_else(|| NodeError::UpgradeRefused {
            target: target.clone(),
            why: "its state is not known".to_owned(),
        })?;
        let attachment = self.recover(&record, spec).await?;
        // The process may be taken for started while it still dials.
        if let Some(held) = held {
            tokio::spawn(hold_until_connected(held, record.dir.clone()));
        }
        Ok(v1::UpgradeResponse {
            stall_ms: u64::try_from(stalled.elapsed().as_millis()).unwrap_or(u64::MAX),
            from_version: from_version.unwrap_or_default(),
            attachment: Some(attachment),
        })
    }
}

impl Supervisor {
    /// One more connection to somebody else's server; `None` for ours, which stays.
    ///
    /// # Errors
    /// [`NodeError::UpgradeRefused`]: it takes no other, and might not take the next process's.
    async fn hold_foreign_server(&self, spec: &DeviceSpec) -> Result<Option<Dialled>, NodeError> {
        if !matches!(spec.export, ExportSpec::Nbd { .. }) {
            return Ok(None);
        }
        let (spec, target) = (spec.clone(), spec.target.clone());
        let held = blocking(move || Ok(slots::dial_slot(&spec, 0, None, OPEN_TIMEOUT))).await?;
        held.map(Some).map_err(|error| NodeError::UpgradeRefused {
            target,
            why: format!(
                "its server takes no other connection, and may end with the one that it has ({})",
                with_sources(&error)
            ),
        })
    }
}

/// Keeps the connection until the device process has been given one by the server, which might end before; and no longer, because a
/// server that grants few lacks it for the other queues.
async fn hold_until_connected(held: Dialled, dir: AttachmentDir) {
    let until = Instant::now() + HELD_MAX;
    while Instant::now() < until {
        // A folder that cannot be read now may be readable in a moment; one that is gone needs no server.
        if let Ok(record) = AttachmentRecord::read(dir.clone())
            && record.is_none_or(|record| record.status.is_some_and(|status| status.reconnects > 0))
        {
            break;
        }
        tokio::time::sleep(HELD_LOOK).await;
    }
    drop(held);
}

/// Errors: this machine lacks something for now, so that nobody knows whether it has ended.
async fn wait_until_ended(dir: &AttachmentDir) -> Result<(), NodeError> {
    let Some(pid) = device_process::running_pid(dir)? else { return Ok(()) };
    let io_error = |source| NodeError::Io { what: format!("cannot watch process {pid:?}"), source };
    device_process::wait_until_ended(pid).await.map_err(io_error)
}

/// Makes sure that the device is there, the attachment's, and without a process.
async fn check_device(spec: &DeviceSpec) -> Result<(), NodeError> {
    let Some(recover) = &spec.recover else { return Ok(()) };
    let (dev_id, hash) = (recover.dev_id, attachment_hash(spec.attachment_id));
    let is_there = blocking(move || {
        let info = ControlDevice::open()?.get_dev_info2(dev_id)?;
        Ok(info.is_some_and(|info| info.ublksrv_flags == hash && info.state != UblkState::Dead))
    });
    if is_there.await? {
        return Ok(());
    }
    let why = format!("its device {dev_id} is gone");
    Err(NodeError::DeviceFailed { target: spec.target.clone(), why })
}

/// Whether the driver keeps the attachment's device when its process ends.
async fn can_recover(record: &AttachmentRecord) -> Result<bool, NodeError> {
    let Some(dev_id) = record.status.as_ref().and_then(|status| status.dev_id) else { return Ok(false) };
    blocking(move || {
        let info = ControlDevice::open()?.get_dev_info2(dev_id)?;
        Ok(info.is_some_and(|info| info.flags.contains(ublk_core::abi::UBLK_F_USER_RECOVERY)))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_not_left_alone_and_pauses_grow_no_further() {
        let pauses: Vec<Duration> =
            std::iter::successors(Some(PAUSE), |pause| Some(longer(*pause))).take(20).collect();
        assert_eq!(pauses[6], Duration::from_secs(16));
        assert!(pauses[7..].iter().all(|pause| *pause == PAUSE_MAX));
    }
}
