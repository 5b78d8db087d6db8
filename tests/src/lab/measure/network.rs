//! A network of the measurement's own: loopback alone, with a congestion control that every machine has.
//!
//! Called once by a measurement with a server on this machine, before that starts; what this thread starts from then on is in it. A machine that is set to
//! pace what it sends (`bbr`) starts a timer for each packet and wakes the receiver as often, on loopback too: a server is
//! then measured by its packets, and one that copies nothing looks slower than one that copies twice. Setting it here changes
//! nothing outside. Source: network_namespaces(7), `Documentation/networking/ip-sysctl.rst` (`tcp_congestion_control`).
#![allow(unsafe_code)] // unshare, which is unsafe for what it could do to memory and descriptors; neither is unshared.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::UnshareFlags;

use crate::lab::tool;

/// The only one that is always compiled in and that every network namespace may choose: of the others a namespace gets those
/// that the machine's `tcp_allowed_congestion_control` lists, and `cubic` need not be among them. Without losses, as on
/// loopback, both only let the window grow.
pub(crate) const CONGESTION_CONTROL: &str = "reno";

const SETTING: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// Setting up one interface.
pub(crate) const IP_DEADLINE: Duration = Duration::from_secs(10);

/// Enters it.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN; `ENOENT` where the kernel lacks the congestion control.
pub(crate) fn enter() -> Result<()> {
    // SAFETY: only the network namespace of this thread is unshared, no file descriptors and no memory.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
        .context("a network namespace for the measurement; run it as root")?;
    tool::output(tool::command("ip").args(["link", "set", "lo", "up"]), IP_DEADLINE)?;
    fs::write(SETTING, CONGESTION_CONTROL).with_context(|| format!("{SETTING}: {CONGESTION_CONTROL}"))
}
