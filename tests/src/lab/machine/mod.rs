//! One emulated machine, from what it is made of to its exit code.
//!
//! Read in this order: `apt`, `packages` and `python_tools` (the tools) → `kernels` → `initramfs` → `guest_command` (what it is to do) → `vm`.
//! `storage_machine` is a server beside it, `this_machine` stands in for it (`anywhere` is either), `boots` and `systemd_machine` see that it comes up.
//! Knows nothing of tests and measurements.

pub(crate) mod anywhere;
pub(crate) mod apt;
pub(crate) mod boots;
pub(crate) mod guest_command;
mod initramfs;
pub(crate) mod kernels;
pub(crate) mod packages;
mod python_tools;
pub(crate) mod storage_machine;
pub(crate) mod systemd_machine;
pub(crate) mod this_machine;
pub(crate) mod vm;
mod vm_directory;
