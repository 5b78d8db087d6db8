//! The lab: a throw-away virtual machine, put together from this machine's own root file system and Debian's
//! kernels, in which everything that needs `/dev/ublkbN` runs.
//!
//! Read in this order: `workspace` (where things are) → `packages` and `apt` (the tools) → `kernels` →
//! `initramfs` → `vm` (one machine, from boot to its exit code) → `test_run` (the phases) → `vm_tests` and `host_tests` (what
//! runs) → `report` (what came of it). `tool` and `interrupt` bound every wait, `progress` speaks meanwhile.

pub(crate) mod apt;
pub(crate) mod bench;
pub(crate) mod bench_server;
pub(crate) mod boots;
pub(crate) mod cost;
pub(crate) mod fresh;
pub(crate) mod fuzz;
pub(crate) mod guest_command;
pub(crate) mod host_tests;
pub(crate) mod initramfs;
pub(crate) mod interrupt;
pub(crate) mod kernels;
pub(crate) mod measurement;
mod network;
pub(crate) mod owned_directory;
pub(crate) mod packages;
pub(crate) mod progress;
pub(crate) mod report;
mod rounds;
pub(crate) mod scale;
pub(crate) mod soak;
mod storage_machine;
pub(crate) mod systemd_machine;
pub(crate) mod test_run;
pub(crate) mod this_machine;
pub(crate) mod tool;
pub(crate) mod vm;
pub(crate) mod vm_directory;
pub(crate) mod vm_tests;
pub(crate) mod workspace;
pub(crate) mod zero_copy;
