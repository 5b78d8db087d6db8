//! The programs volctl and volclient as their users meet them: real processes, a real socket, a storage server of the
//! tests' own. No ublk is needed here; attaching for real is shown by the `tests` crate.
#![allow(clippy::unwrap_used)] // Test code outside #[test] functions, too.

mod device_stand_in;
mod fake_server;
mod launch;
mod node_daemon;
mod volctl_commands;
