//! A command in the VM or, with `--host`, on this machine: its output is passed on, its exit code given.

use std::io::{Write, stderr, stdout};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use testlab::kernel_series::KernelSeries;

use super::guest_command::GuestCommand;
use super::vm::{self, Follower, Processors, Stream};
use super::{kernels, packages, this_machine};
use crate::lab::tool;
use crate::lab::workspace::Workspace;

/// Copies the command's output to ours.
pub(crate) struct PassThrough;

impl Follower for PassThrough {
    fn output(&mut self, stream: Stream, bytes: &[u8]) -> Result<()> {
        match stream {
            Stream::Stdout => stdout().write_all(bytes).and_then(|()| stdout().flush()),
            Stream::Stderr => stderr().write_all(bytes),
        }
        .context("passing on the command's output")
    }
}

/// Runs the command in the VM or, without a series, on this machine; gives its exit code.
///
/// # Errors
/// The machine failed, or the command did not end in time.
pub(crate) fn run(
    workspace: &Workspace,
    series: Option<KernelSeries>,
    processors: Processors,
    command: &GuestCommand,
    deadline: Duration,
) -> Result<u8> {
    let Some(series) = series else {
        this_machine::ensure_ublk()?;
        let mut child =
            command.on_this_machine()?.stdin(Stdio::null()).spawn().context("cannot run the command")?;
        let status = tool::wait(&mut child, deadline)?;
        // As shells do: a command killed by signal N ends with 128 + N.
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        return u8::try_from(code).context("the command's exit code");
    };
    packages::ensure_installed(workspace)?;
    let kernel = kernels::ensure_cached(workspace, series)?;
    Ok(vm::run(workspace, &kernel, command, processors, deadline, &mut PassThrough)?.exit_code)
}
