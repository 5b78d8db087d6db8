//! The device process: owns one attachment's ublk device, its queues and its sockets.
//!
//! Reading path: [`attachment`] (the life of the process) → [`queue_loop`] (the data path) → [`connection`] (NBD, without
//! I/O), [`stream`] (how far its bytes got), [`queue_ring`] (the ring, without decisions) and [`payload`] (where the data
//! lies), [`balance`] (which connection). Beside it: [`ladder`] (which data path), [`slots`], [`dial`], [`data_socket`], [`affinity`],
//! [`block_request`], [`protections`], [`mount_namespace`], [`quiet`] and [`liveness`] (does a silent server live?), [`control_socket`], [`status_file`].
//!
//! No gRPC and no async runtime here: plain threads, so that nothing stands between a block request and the wire.

pub mod affinity;
pub mod attachment;
pub mod balance;
pub mod block_request;
pub mod connection;
pub mod control_socket;
pub mod data_socket;
pub mod dial;
pub mod export_fit;
pub mod ladder;
pub mod liveness;
pub mod mount_namespace;
pub mod payload;
mod probe;
pub mod protections;
pub mod queue_loop;
pub mod queue_parts;
pub mod queue_ring;
pub mod quiet;
pub mod reconnect;
pub mod redial;
pub mod slots;
mod staging;
pub mod status_file;
pub mod stream;
pub mod unflushed;

pub use attachment::{AttachmentError, run};
