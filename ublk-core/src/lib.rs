//! The kernel's block interface in user space: ublk, as a library.
//!
//! Owns: the ABI, control commands, device parameters, a queue with its tags, and buffers. Never: networking, an async
//! runtime, or a thread that serves I/O; the caller's queue loop does that with these parts.
//!
//! Reading path: [`device`] shows the life of a device, [`queue`] and [`tag`] that of a request, [`data_path`] the ways
//! its data can travel, [`transfer`] how each meets a socket and is proved before use, [`ring`] the two opcodes that make
//! `fused`, [`abi`] the kernel's header.

pub mod abi;
pub mod buffers;
mod command;
pub mod control;
pub mod data_path;
pub mod device;
mod mapping;
pub mod params;
pub mod queue;
pub mod ring;
mod staging;
pub mod tag;
pub mod transfer;

pub use abi::{IoDesc, IoOp};
pub use buffers::UserBuffers;
pub use control::{ControlDevice, ControlError, DevInfo, DeviceSpec, DeviceState, Features};
pub use data_path::{DataPath, ProbeReport, probe, probe_driver};
pub use device::{Device, DeviceError};
pub use params::{DeviceParams, Discard, ParamsError};
pub use queue::{Queue, TagBuffer};
pub use staging::StagingMemory;
pub use tag::{TagError, TagState, TagTable};
pub use transfer::{Place, Transfer, TransferError};
