//! The node daemon, `volclient serve`: the node API on a Unix socket, over one device process for each attachment.
//!
//! - [`serve`]: start-up: the run directory, its lock, the socket, the gRPC server.
//! - [`node_service`]: the node API (`volnode.v1.Node`) in terms of the supervisor.
//! - [`supervisor`]: attach, detach and list: the order of steps, and what is undone when one fails.
//! - [`take_away`]: the last resort of a machine that goes down: every disk, by force, without a daemon.
//! - [`target`]: what can be attached (a volume's name, an NBD URI), and how a detach names it.
//! - [`attachment_record`]: an attachment as its folder tells it.
//! - [`device_process`]: one device process: claim, start, wait, stop.
//! - [`leftovers`]: the device and the link that a dead device process left.
//! - [`luks`]: encrypted volumes: the clear disks that there are, and the programs that make them.
//! - [`luks_plan`]: encrypted volumes: what is done next, without I/O.
//! - [`management_client`]: the storage server's management API.
//! - `moved_servers`: a server that got another address: the disks that wait for it are told.
//! - `registration`: this node at its storage server: it registers, and says how it and its disks are.
//! - [`node_labels`]: this node's labels, as they are given to `serve`.
//! - [`error`]: every error of the daemon, and the one place that makes a gRPC status of it.
//!
//! The daemon keeps no state of its own: an attachment is its folder under the run directory, its device process, its
//! device in the kernel, and the server's record. So it may be killed and started again at any moment.

mod attachment_events;
pub mod attachment_record;
pub mod device_process;
pub mod error;
mod freeze;
pub mod leftovers;
pub mod luks;
pub mod luks_plan;
pub mod management_client;
mod moved_servers;
pub mod node_labels;
pub mod node_service;
mod recover_spec;
mod registration;
pub mod serve;
pub mod supervisor;
pub mod take_away;
pub mod target;
pub mod target_locks;
