//! `--host`: this machine's own kernel instead of a virtual one.
//!
//! Checks that the kernel has ublk and that we may use it, and says what to do if not. Changes nothing but
//! loading the driver.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::lab::tool;

/// The driver's control device (`Documentation/block/ublk.rst`).
const CONTROL_DEVICE: &str = "/dev/ublk-control";

/// Loading one module.
const MODPROBE_DEADLINE: Duration = Duration::from_secs(30);

/// Makes sure that this machine has ublk.
///
/// # Errors
/// The kernel has no driver, or we are not root.
pub(crate) fn ensure_ublk() -> Result<()> {
    let advice = "leave out --host to use a virtual machine, which needs no driver and no root rights";
    ensure!(
        rustix::process::geteuid().is_root(),
        "--host: not root, so no block device can be made; {advice}"
    );
    if Path::new(CONTROL_DEVICE).exists() {
        return Ok(());
    }
    let loaded = tool::finish(tool::command("modprobe").arg("ublk_drv"), MODPROBE_DEADLINE);
    if Path::new(CONTROL_DEVICE).exists() {
        return Ok(());
    }
    let release = release();
    let why = match loaded {
        Ok(finished) => finished.stderr.trim_end().to_owned(),
        Err(error) => format!("{error:#}"),
    };
    bail!("--host: this machine's kernel {release} has no ublk driver ({why}); {advice}")
}

/// The running kernel, as `uname -r` prints it.
pub(crate) fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
