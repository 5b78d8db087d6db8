//! The storage server of the cluster, on this machine's loopback: the nodes and the pods reach it through QEMU's network.
//!
//! Owns its process and its directory. Its addresses stay the same when it is started again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::control_plane::{free_ports, spawn};
use crate::lab::machine::vm::HOST_FROM_GUEST;
use crate::lab::tool::{self, Running};

/// From its start to its first answer.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// What all volumes can have: a sparse file, and no more of this machine's disk than is written.
const VOLUMES_BYTES: u64 = 8 << 30;

/// Becomes the server, with its volumes on an XFS of its own: snapshots and copies are reflinks, whatever this machine's disk has.
const MOUNTED: &str = "for try in $(seq 50); do
    mount -o loop \"$0\" \"$1\" && shift && exec \"$@\"
    sleep 0.2
done";

/// A running storage server.
pub(super) struct StorageServer {
    programs: PathBuf,
    directory: PathBuf,
    data_port: u16,
    management_port: u16,
    process: Option<Running>,
}

impl StorageServer {
    /// Starts one with its data in `directory`.
    ///
    /// # Errors
    /// It does not get ready.
    pub(super) fn start(programs: &Path, directory: &Path) -> Result<Self> {
        let [data_port, management_port] = free_ports()?;
        let (programs, directory) = (programs.to_owned(), directory.to_owned());
        fs::create_dir(directory.join("volumes")).context("the volumes' directory")?;
        let image = directory.join("volumes.xfs");
        fs::File::create(&image)?.set_len(VOLUMES_BYTES)?;
        tool::output(tool::command("mkfs.xfs").arg("-q").arg(&image), READY_DEADLINE)?;
        let mut server = Self { programs, directory, data_port, management_port, process: None };
        server.start_again()?;
        Ok(server)
    }

    /// Its management API as nodes and pods see it.
    pub(super) fn uri(&self) -> String {
        format!("http://{HOST_FROM_GUEST}:{}", self.management_port)
    }

    /// Kills it.
    pub(super) fn kill(&mut self) {
        drop(self.process.take());
    }

    /// Starts it after it was killed.
    ///
    /// # Errors
    /// It does not get ready.
    pub(super) fn start_again(&mut self) -> Result<()> {
        // In a mount namespace of its own: what is mounted there goes with the process. That of one that was killed goes a moment later.
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", MOUNTED]).arg(self.directory.join("volumes.xfs"));
        command.arg(self.directory.join("volumes")).arg(self.programs.join("volserver"));
        command.arg("--data-dir").arg(self.directory.join("volumes/data"));
        command.arg("--runtime-dir").arg(self.directory.join("volserver.run"));
        command.arg("--insecure");
        command.args(["--management", &format!("127.0.0.1:{}", self.management_port)]);
        command.args(["--listen", &format!("127.0.0.1:{}", self.data_port)]);
        command.args(["--advertise", &format!("{HOST_FROM_GUEST}:{}", self.data_port)]);
        let mut process = spawn(&self.directory, "volserver", &command)?;
        let began = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.management_port)).is_err() {
            let ended = process.0.try_wait()?;
            ensure!(ended.is_none() && began.elapsed() < READY_DEADLINE, "volserver does not get ready");
            std::thread::sleep(tool::POLL_INTERVAL);
        }
        self.process = Some(process);
        Ok(())
    }

    /// Lets it answer nobody, with all its connections open.
    ///
    /// # Errors
    /// It is not there.
    pub(super) fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// It is not there.
    pub(super) fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let process = self.process.as_ref().context("the storage server is not there")?;
        kill_process(Pid::from_child(&process.0), signal).context("the storage server")
    }

    /// The volumes that it has.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) fn volumes(&self) -> Result<Vec<serde_json::Value>> {
        let uri = format!("http://127.0.0.1:{}", self.management_port);
        let mut volctl = Command::new(self.programs.join("volctl"));
        volctl.args(["--server", &uri, "list", "--output", "json"]);
        let said = tool::output(&mut volctl, READY_DEADLINE)?;
        serde_json::from_slice(&said).context("what volctl printed")
    }
}
