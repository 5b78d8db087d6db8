//! A storage server beside the virtual machine: the guest reaches it over its network card, and its memory is not the
//! guest's. For tests that take the guest's memory away.
//!
//! Owns: the server's process and its directory; both go when this value is dropped, or by the kernel if the lab is killed
//! outright. Called by `vm_tests.rs`.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};

use super::vm::HOST_FROM_GUEST;
use super::vm_directory::VmDirectory;
use crate::lab::tool::{self, Running};
use crate::lab::workspace::Workspace;

/// A running server.
pub(crate) struct StorageMachine {
    // First, so that it is gone before its directory.
    _server: Running,
    /// `http://host:port` of its management API, as the guest sees it.
    pub(crate) management_uri: String,
    _directory: VmDirectory,
}

impl StorageMachine {
    /// Starts one of the lab's own build, which the guest reaches by QEMU's user-mode network.
    ///
    /// # Errors
    /// As [`StorageMachine::start_at`].
    pub(crate) fn start(workspace: &Workspace) -> Result<Self> {
        Self::start_at(workspace, &workspace.programs(), "127.0.0.1")
    }

    /// Starts that of `programs`, listening at an IPv4 address which the guest sees as [`HOST_FROM_GUEST`].
    ///
    /// # Errors
    /// It does not get ready: with what it said.
    pub(crate) fn start_at(workspace: &Workspace, programs: &Path, address: &str) -> Result<Self> {
        let directory = VmDirectory::create(&workspace.cache)?;
        // Clients are told where the data port is, so it has to be known before.
        let data_port = TcpListener::bind((address, 0))?.local_addr()?.port();
        let mut command = tool::command("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(programs.join("volserver"));
        command.arg("--data-dir").arg(directory.path().join("storage-machine"));
        command.arg("--runtime-dir").arg(directory.path().join("storage-machine.run"));
        command.args([
            "--insecure",
            "--management",
            &format!("{address}:0"),
            "--listen",
            &format!("{address}:{data_port}"),
        ]);
        command.args(["--advertise", &format!("{HOST_FROM_GUEST}:{data_port}")]);
        let log = directory.path().join("storage-machine.log");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&log)?);
        let server = command.spawn();
        let mut server = Running(server.context("running volserver for the guest")?);
        let mut ready = String::new();
        BufReader::new(server.0.stdout.take().context("stdout")?).read_line(&mut ready)?;
        let port = ready.trim_end().rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        let said = || fs::read_to_string(&log).unwrap_or_default();
        let port =
            port.with_context(|| format!("the guest's server does not get ready: {ready:?}\n{}", said()))?;
        let management_uri = format!("http://{HOST_FROM_GUEST}:{port}");
        Ok(Self { _server: server, management_uri, _directory: directory })
    }
}
