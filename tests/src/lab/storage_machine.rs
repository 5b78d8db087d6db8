//! A storage server beside the virtual machine: the guest reaches it over its network card, and its memory is not the
//! guest's. For tests that take the guest's memory away.
//!
//! Owns: the server's process and its directory; both go when this value is dropped, or by the kernel if the lab is killed
//! outright. Called by `vm_tests.rs`.

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Stdio};

use anyhow::{Context, Result};

use super::tool;
use super::vm::HOST_FROM_GUEST;
use super::vm_directory::VmDirectory;
use super::workspace::Workspace;

/// A running server.
pub(crate) struct StorageMachine {
    // First, so that it is gone before its directory.
    _server: Server,
    /// `http://host:port` of its management API, as the guest sees it.
    pub(crate) management_uri: String,
    _directory: VmDirectory,
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        tool::kill_and_reap(&mut self.0);
    }
}

impl StorageMachine {
    /// Starts one.
    ///
    /// # Errors
    /// It does not get ready; what it said is on stderr.
    pub(crate) fn start(workspace: &Workspace) -> Result<Self> {
        let directory = VmDirectory::create(&workspace.cache)?;
        // Clients are told where the data port is, so it has to be known before.
        let data_port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut command = tool::command("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(workspace.programs().join("volserver"));
        command.arg("--data-dir").arg(directory.path().join("storage-machine"));
        command.args(["--management", "127.0.0.1:0", "--listen", &format!("127.0.0.1:{data_port}")]);
        command.args(["--advertise", &format!("{HOST_FROM_GUEST}:{data_port}")]);
        let log = std::fs::File::create(directory.path().join("storage-machine.log"))?;
        let server = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn();
        let mut server = Server(server.context("running volserver for the guest")?);
        let mut ready = String::new();
        BufReader::new(server.0.stdout.take().context("stdout")?).read_line(&mut ready)?;
        let port = ready.trim_end().rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        let port =
            port.with_context(|| format!("the guest's storage server does not get ready: {ready:?}"))?;
        let management_uri = format!("http://{HOST_FROM_GUEST}:{port}");
        Ok(Self { _server: server, management_uri, _directory: directory })
    }
}
