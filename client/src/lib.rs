//! The client side of volnode.
//!
//! - [`device`]: the process that owns one attachment: its ublk device, its queues, its connections (the data path).
//! - [`node`]: the node daemon: the node API, and the supervision of device processes.
//! - [`api_channel`], [`data_address`], [`tls_spec`]: how a server is reached, with TLS or without.
//! - [`image`]: images, copied into volumes and out of them by volctl, over NBD and without a disk.
//! - [`contract`]: what the node daemon and a device process tell each other: spec file, status file, control socket.
//! - [`mapper`]: the clear disks of encrypted volumes that the kernel has.
//! - [`safe_stop`], [`holders`]: taking a disk away unless somebody uses it, and who does. [`causes`]: errors for people.
//! - [`csi`]: the CSI driver, `volcsi`.
//! - [`daemon_process`]: how a daemon's process begins and ends.
//! - [`pod_exit`]: device processes that outlive the pod of their node daemon.
//! - [`freezer`]: holding a mounted file system frozen for the instant of a snapshot.
//!
//! `contract` is the ground: `device` knows it and nothing of `node`, which stands above both.
//!
//! One block request is followed by file name: `device/queue/run.rs` → `device/queue/core.rs` → `ublk-core/src/tag.rs` →
//! `device/queue/connection.rs` → `proto/src/nbd/` → TCP → the server.

pub mod api_channel;
pub mod causes;
pub mod contract;
pub mod csi;
pub mod daemon_process;
pub mod data_address;
pub mod device;
pub mod disk_ends;
mod end_signal;
pub mod freezer;
pub mod holders;
pub mod image;
pub mod mapper;
pub mod node;
pub mod pod_exit;
pub mod safe_stop;
pub mod tls_spec;
