//! One ublk device from ADD_DEV (or recovery) to DEL_DEV.
//!
//! Owns: the device's number, its open `/dev/ublkcN`, and the order of the control commands. Never: runs a queue; the
//! caller makes the queues' threads between `add` and `start`.
//! Called by: the client's device process and this crate's tests.
//! Invariants: a device that was added but never started is deleted on drop; a device that was started outlives this
//! value, because a process that ends shall leave it for recovery unless it was told to delete it.
//!
//! ```text
//!   add ──▶ Added ──start──▶ Live ──stop / try_stop──▶ Stopped ──delete──▶ (gone)
//!   recover ──▶ Recovering ──start──▶ Live
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::abi::Params;
use crate::control::{ControlDevice, ControlError, DevInfo, DeviceSpec, char_device_path};
use crate::params::{DeviceParams, ParamsError};
use crate::queue::Queue;

/// How long `/dev/ublkcN` may be missing or busy after ADD_DEV: a device manager may still be at work on it.
const OPEN_DEADLINE: Duration = Duration::from_secs(5);
const OPEN_RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Where the device is in its life, as far as this process took it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Added,
    Recovering,
    Live,
    Stopped,
}

/// A ublk device of this process.
#[derive(Debug)]
pub struct Device {
    control: ControlDevice,
    info: DevInfo,
    char_device: Arc<File>,
    stage: Stage,
}

/// Why a device could not be made or taken on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A control command failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The parameters are impossible.
    #[error("impossible device parameters")]
    Params(#[from] ParamsError),
    /// The character device could not be opened.
    #[error("cannot open /dev/ublkc{dev_id}")]
    OpenCharDevice {
        /// The device.
        dev_id: u32,
        /// `ENOENT`: no node appeared, is /dev a devtmpfs? `EBUSY`: another daemon has it.
        #[source]
        source: io::Error,
    },
    /// A queue's descriptors could not be mapped.
    #[error("cannot map queue {q_id} of ublk device {dev_id}")]
    MapQueue {
        /// The device.
        dev_id: u32,
        /// The queue.
        q_id: u16,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// Recovery of a device that does not exist.
    #[error("there is no ublk device {dev_id} to recover")]
    Gone {
        /// The device.
        dev_id: u32,
    },
}

impl Device {
    /// Adds a device, sets its parameters, and opens its character device. It can then be given queues
    /// ([`queue`](Self::queue)) and started.
    pub fn add(
        control: &ControlDevice,
        spec: &DeviceSpec,
        params: &DeviceParams,
    ) -> Result<Self, DeviceError> {
        let params = params.to_abi()?;
        let info = control.add_dev(spec)?;
        Self::finish_add(control, info, &params).inspect_err(|_| {
            // The first error is the one to report; a device that cannot be deleted shows in list_devices.
            let _ = delete(control, info.dev_id);
        })
    }

    fn finish_add(control: &ControlDevice, info: DevInfo, params: &Params) -> Result<Self, DeviceError> {
        control.set_params(info.dev_id, params)?;
        let char_device = open_char_device(info.dev_id)?;
        Ok(Self { control: control.clone(), info, char_device, stage: Stage::Added })
    }

    /// Takes on a device whose daemon is gone. [`ControlError::Busy`] inside when the daemon is not gone yet.
    pub fn recover(control: &ControlDevice, dev_id: u32) -> Result<Self, DeviceError> {
        control.start_user_recovery(dev_id)?;
        let info = control.get_dev_info2(dev_id)?.ok_or(DeviceError::Gone { dev_id })?;
        let char_device = open_char_device(dev_id)?;
        Ok(Self { control: control.clone(), info, char_device, stage: Stage::Recovering })
    }

    /// N of `/dev/ublkbN`.
    pub fn dev_id(&self) -> u32 {
        self.info.dev_id
    }

    /// What the kernel said when the device was added or taken on.
    pub fn info(&self) -> &DevInfo {
        &self.info
    }

    /// The open character device.
    pub fn char_device(&self) -> &Arc<File> {
        &self.char_device
    }

    /// Maps queue `q_id`, to be moved to the thread that will fetch its tags.
    pub fn queue(&self, q_id: u16) -> Result<Queue, DeviceError> {
        let dev_id = self.info.dev_id;
        Queue::new(Arc::clone(&self.char_device), q_id, self.info.queue_depth)
            .map_err(|source| DeviceError::MapQueue { dev_id, q_id, source })
    }

    /// Makes the disk appear, or resumes it after recovery. Blocks until the queues' threads have fetched every tag and
    /// the partition table has been read through them, so call it from another thread than theirs.
    pub fn start(&mut self) -> Result<(), ControlError> {
        let pid = std::process::id();
        match self.stage {
            Stage::Recovering => self.control.end_user_recovery(self.info.dev_id, pid)?,
            _ => self.control.start_dev(self.info.dev_id, pid)?,
        }
        self.stage = Stage::Live;
        Ok(())
    }

    /// Takes the disk away, open or not; see [`ControlDevice::stop_dev`].
    pub fn stop(&mut self) -> Result<(), ControlError> {
        self.control.stop_dev(self.info.dev_id)?;
        self.stage = Stage::Stopped;
        Ok(())
    }

    /// Takes the disk away unless something has it open; see [`ControlDevice::try_stop_dev`].
    pub fn try_stop(&mut self) -> Result<(), ControlError> {
        self.control.try_stop_dev(self.info.dev_id)?;
        self.stage = Stage::Stopped;
        Ok(())
    }

    /// Makes the disk larger while it is in use; see [`ControlDevice::update_size`].
    pub fn update_size(&self, capacity_bytes: u64) -> Result<(), ControlError> {
        self.control.update_size(self.info.dev_id, capacity_bytes)
    }

    /// Deletes the device, stopping it if need be, and closes the character device. Queues made by
    /// [`queue`](Self::queue) should be gone by now: the number is free for reuse only when they are.
    pub fn delete(mut self) -> Result<(), ControlError> {
        // Whatever comes of it, drop shall not try again.
        self.stage = Stage::Stopped;
        delete(&self.control, self.info.dev_id)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.stage == Stage::Added {
            // Nobody is left to tell; a device that cannot be deleted shows in list_devices.
            let _ = delete(&self.control, self.info.dev_id);
        }
    }
}

/// Deletes without waiting for descriptors of the character device, ours included, where the kernel can.
fn delete(control: &ControlDevice, dev_id: u32) -> Result<(), ControlError> {
    match control.del_dev_async(dev_id) {
        Err(ControlError::Unsupported { .. }) => control.del_dev(dev_id),
        result => result,
    }
}

fn open_char_device(dev_id: u32) -> Result<Arc<File>, DeviceError> {
    let path = char_device_path(dev_id);
    let give_up = Instant::now() + OPEN_DEADLINE;
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return Ok(Arc::new(file)),
            Err(error) if is_settling(&error) && Instant::now() < give_up => {
                std::thread::sleep(OPEN_RETRY_INTERVAL);
            }
            Err(source) => return Err(DeviceError::OpenCharDevice { dev_id, source }),
        }
    }
}

fn is_settling(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY))
}
