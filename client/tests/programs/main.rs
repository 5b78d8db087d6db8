//! The programs volctl and volclient as their users meet them: real processes, a real socket, a storage server of the
//! tests' own. No ublk is needed here; attaching for real is shown by the `tests` crate.
#![allow(clippy::unwrap_used)] // Test code outside #[test] functions, too.

mod csi_node;
mod csi_plugin;
mod device_stand_in;
mod fake_copies;
mod fake_grants;
mod fake_node;
mod fake_nodes;
mod fake_server;
mod fake_tenants;
mod launch;
mod node_daemon;
mod node_registration;
mod volctl_commands;
mod volctl_grants;
mod volctl_nodes;
mod volctl_output;
mod volctl_tenants;
