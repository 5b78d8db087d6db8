//! The CSI driver, `volcsi`: the plugin that kubelet calls, and what its paths, mounts and file systems need.
//!
//! - [`serve`]: the plugin's sockets, and its end. [`services`]: what it answers. [`socket`]: how a socket comes and goes.
//! - [`controller`]: volumes and snapshots on the storage server, and which node has them.
//! - [`targets`]: paths below kubelet's directory, which nobody can lead elsewhere.
//! - [`mount_options`]: which mount options are taken. [`mounts`]: mounting and unmounting. [`mountinfo`]: what is mounted.
//! - [`blank`]: whether a file system is made, from what [`probe`] finds on the device and what the server knows.
//! - [`jobs`]: what outlives the call that started it. [`lock_file`]: what others are not to do meanwhile.
//! - [`disk_health`]: what a disk's state means for its volume, for both services.
//! - [`usage`]: how full a file system is. [`node`]: the Node service, over all of these.
//!
//! Never here: state of its own. What is mounted the kernel knows, and what is attached the node daemon.

pub mod blank;
pub mod controller;
pub mod disk_health;
pub mod jobs;
mod kubelet_authority;
pub mod lock_file;
pub mod mount_options;
pub mod mountinfo;
pub mod mounts;
pub mod node;
pub mod probe;
pub mod serve;
pub mod services;
pub mod socket;
pub mod targets;
pub mod usage;
