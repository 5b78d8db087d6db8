//! The CSI driver, `volcsi`: the plugin that kubelet calls, and what its paths, mounts and file systems need.
//!
//! - [`serve`]: the plugin's sockets, and its end. [`services`]: what it answers. [`socket`]: how a socket comes and goes.
//! - [`targets`]: paths below kubelet's directory, which nobody can lead elsewhere.
//! - [`mount_options`]: which mount options are taken. [`mounts`]: mounting and unmounting. [`mountinfo`]: what is mounted.
//! - [`blank`]: whether a file system is made, from what [`probe`] finds on the device and what the server knows.
//! - [`jobs`]: programs that outlive the call that started them. [`usage`]: how full a file system is.
//!
//! Never here: state of its own. What is mounted the kernel knows, and what is attached the node daemon.

pub mod blank;
pub mod jobs;
pub mod mount_options;
pub mod mountinfo;
pub mod mounts;
pub mod probe;
pub mod serve;
pub mod services;
pub mod socket;
pub mod targets;
pub mod usage;
