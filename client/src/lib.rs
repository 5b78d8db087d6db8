//! The client side of volnode.
//!
//! - [`device`]: the process that owns one attachment: its ublk device, its queues, its connections (the data path).
//! - [`node`]: the node daemon: the node API, and the supervision of device processes.
//! - [`api_channel`], [`data_address`], [`tls_spec`]: how a server is reached, with TLS or without.
//! - [`contract`]: what the node daemon and a device process tell each other: spec file, status file, control socket.
//!
//! One block request is followed by file name: `device/queue_loop.rs` → `ublk-core/src/tag.rs` →
//! `device/connection.rs` → `proto/src/nbd/` → TCP → the server.

pub mod api_channel;
pub mod contract;
pub mod data_address;
pub mod device;
pub mod node;
pub mod tls_spec;
