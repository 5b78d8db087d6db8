//! Why an attachment has no device, or one that ended badly.

use std::io;
use std::path::PathBuf;

use daemon_log::THREAD_LIMITS;
use ublk_core::{ControlError, DeviceError, TransferError};

use crate::contract::ContractError;
use crate::device::connect::slots::SlotError;
use crate::device::geometry::GeometryError;
use crate::device::ladder::LadderError;
use crate::device::protections::ProtectionError;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum AttachmentError {
    /// The spec, status or control socket.
    #[error(transparent)]
    Contract(#[from] ContractError),
    /// The spec holds something this program cannot use.
    #[error("the device spec has an invalid {0}")]
    Spec(&'static str),
    /// The process cannot be protected from its own device.
    #[error(transparent)]
    Protection(#[from] ProtectionError),
    /// The process cannot be kept apart from what is mounted on its device.
    #[error("cannot enter a mount namespace (needs root or CAP_SYS_ADMIN): {0}")]
    MountNamespace(io::Error),
    /// No thread for the log.
    #[error("cannot start a thread for the log: {0}")]
    Log(io::Error),
    /// The export cannot be opened, or not as often as was asked for.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The export cannot be a disk.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The driver.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The device cannot be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No data path can be used, or not the one that was asked for.
    #[error(transparent)]
    Ladder(#[from] LadderError),
    /// What the data path needs on a socket that the kernel encrypts does not work.
    #[error("the data path cannot be used with TLS by the kernel: {0}")]
    Ktls(TransferError),
    /// A queue thread did not get ready.
    #[error("a queue could not start: {0}")]
    Queue(String),
    /// The device is gone, but a queue did not end well.
    #[error("the device is gone, but {0}")]
    Ended(String),
    /// The stable name cannot be made.
    #[error("cannot make {path}: {source}")]
    Link {
        /// The stable name.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A thread of our own.
    #[error("cannot start a thread: {0}; {THREAD_LIMITS}")]
    Thread(io::Error),
    /// Sockets of our own.
    #[error("cannot set up the device process: {0}")]
    Setup(io::Error),
}
