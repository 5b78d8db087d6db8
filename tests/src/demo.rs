//! What `cargo lab demo` shows, run inside the machine: commands as a user would type them, with their output.
//!
//! Uses the product only through its programs. Every step that fails ends the demo with the command that failed.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Runs the demo.
///
/// # Errors
/// The first command that failed.
pub(crate) fn run() -> Result<()> {
    show("uname -r")?;
    show("modprobe ublk_drv")?;
    show("ls /dev/ublk-control")
}

/// Prints a command as a user would type it, then its output as it comes.
fn show(command: &str) -> Result<()> {
    println!("$ {command}");
    let mut shell = Command::new("sh");
    let status = shell.args(["-c", command]).stdin(Stdio::null()).status().context("cannot run sh")?;
    ensure!(status.success(), "`{command}`: {status}");
    Ok(())
}
