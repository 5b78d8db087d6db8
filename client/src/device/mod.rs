//! The device process: owns one attachment's ublk device, its queues and its sockets.
//!
//! Reading path: [`attachment`] (the life of the process) → [`queue`] (the data path) and [`connect`] (how connections are made, and
//! made again). Beside them: [`reconnect`], [`together`] and [`liveness`] (what an outage means), [`ladder`] (which data path),
//! [`geometry`], [`affinity`], [`protections`], [`mount_namespace`], [`control_socket`], [`status_file`].
//!
//! No gRPC and no async runtime here: plain threads, so that nothing stands between a block request and the wire.

pub mod affinity;
pub mod attachment;
pub mod connect;
pub mod control_socket;
pub mod geometry;
pub mod ladder;
pub mod liveness;
pub mod mount_namespace;
pub mod protections;
pub mod queue;
pub mod reconnect;
pub mod status_file;
pub mod together;

pub use attachment::{AttachmentError, run};
