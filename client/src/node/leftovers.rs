//! The device and the stable link that a dead device process left.
//!
//! A device in the kernel is known to be an attachment's by the hash in its `ublksrv_flags`
//! ([`attachment_hash`]), never by its number alone: numbers are used again. A device that somebody still uses is left
//! alone and its users are named.
//! Called by: `supervisor`, only while no device process works on the attachment.

use std::fs;
use std::io;
use std::path::Path;

use ublk_core::ControlDevice;
use ublk_core::control::list_devices;
use uuid::Uuid;

use super::error::NodeError;
use crate::contract::attachment_hash;
use crate::safe_stop::{self, Outcome};

/// Removes every device in the kernel that belongs to the attachment, by force even if it is in use. Blocks; not for an async
/// thread.
///
/// # Errors
/// [`NodeError::DeviceOpen`]: it is in use. [`NodeError::StopFailed`], [`NodeError::Ublk`]: the driver refuses.
pub fn remove_devices(attachment_id: Uuid, target: &str, by_force: bool) -> Result<(), NodeError> {
    let dev_ids = list_devices()?;
    if dev_ids.is_empty() {
        return Ok(());
    }
    let control = ControlDevice::open()?;
    for dev_id in dev_ids {
        let info = control.get_dev_info2(dev_id)?;
        if info.is_none_or(|info| info.ublksrv_flags != attachment_hash(attachment_id)) {
            continue;
        }
        tracing::info!(target, dev_id, "removing the device of a device process that has ended");
        if by_force {
            control.stop_dev(dev_id)?;
        } else {
            stop_unless_used(dev_id, target)?;
        }
        control.del_dev(dev_id)?;
    }
    Ok(())
}

fn stop_unless_used(dev_id: u32, target: &str) -> Result<(), NodeError> {
    let target = target.to_owned();
    match safe_stop::run(dev_id) {
        Outcome::Stopped => Ok(()),
        Outcome::InUse { holders } => Err(NodeError::DeviceOpen { target, holders }),
        Outcome::Failed { message: why } => Err(NodeError::StopFailed { target, why }),
    }
}

/// Removes the stable link, unless it leads to a device that is there: then it is another attachment's.
///
/// # Errors
/// [`NodeError::Io`]
pub fn remove_link(link: &Path) -> Result<(), NodeError> {
    let is_link = fs::symlink_metadata(link).is_ok_and(|metadata| metadata.is_symlink());
    if !is_link || link.exists() {
        return Ok(());
    }
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NodeError::Io { what: format!("cannot remove {}", link.display()), source: error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_link_to_nothing_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (dangling, live, file) =
            (folder.path().join("dangling"), folder.path().join("live"), folder.path().join("file"));
        std::os::unix::fs::symlink("/dev/ublkb4294967295", &dangling).unwrap();
        std::os::unix::fs::symlink("/dev/null", &live).unwrap();
        fs::write(&file, "").unwrap();
        for path in [&dangling, &live, &file, &folder.path().join("absent")] {
            remove_link(path).unwrap();
        }
        assert!(!dangling.is_symlink());
        assert!(live.is_symlink());
        assert!(file.exists());
    }

    #[test]
    fn an_attachment_without_a_device_leaves_nothing_to_remove() {
        remove_devices(Uuid::from_u128(7), "vol-1", false).unwrap();
    }
}
