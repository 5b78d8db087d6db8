//! A volcsi that has said that it is ready, for tests of the CSI driver.
//!
//! Owns the process. Of its options only the socket is set here; nothing of the environment that the tests run in reaches it, but what the
//! command was given.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Pid;
use tonic::transport::{Channel, Endpoint};

/// What volcsi would read.
const VARIABLES: [&str; 7] = [
    "CSI_ENDPOINT",
    "VOLCSI_LOG",
    "VOLNODE_SERVER",
    "VOLNODE_SOCKET",
    "VOLNODE_TLS_CA",
    "VOLNODE_TLS_CERT",
    "VOLNODE_TLS_KEY",
];
/// No call takes longer on a machine that others use.
const CALL_DEADLINE: Duration = Duration::from_secs(120);

/// A plugin that is ready. Killed when dropped.
#[derive(Debug)]
pub struct Volcsi {
    process: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Volcsi {
    /// Starts the program of `command`, which may have options and variables already, at a socket; what it logs is put behind what is in
    /// the file `log`.
    ///
    /// # Errors
    /// It cannot be run, or does not get ready: with what it logged.
    pub fn start(command: &mut Command, socket: &Path, log: &Path) -> Result<Self> {
        let given: Vec<_> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
        for variable in VARIABLES.iter().filter(|variable| !given.iter().any(|name| name == **variable)) {
            command.env_remove(variable);
        }
        command.arg("--endpoint").arg(endpoint(socket)).stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(File::options().create(true).append(true).open(log)?);
        let process = command.spawn().with_context(|| format!("{command:?}"))?;
        // From here on the process ends with the value.
        let mut plugin = Self { process, socket: socket.to_owned(), log: log.to_owned() };
        let mut ready = String::new();
        BufReader::new(plugin.process.stdout.take().context("stdout")?).read_line(&mut ready)?;
        let expected = format!("volcsi ready: {}\n", socket.display());
        ensure!(ready == expected, "volcsi is not ready, {ready:?}: {}", plugin.logged());
        Ok(plugin)
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Its socket, as the suites and sidecars take it.
    pub fn endpoint(&self) -> String {
        endpoint(&self.socket)
    }

    /// What it, and those before it with the same file, logged.
    pub fn logged(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// A connection to it.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn channel(&self) -> Result<Channel> {
        Ok(Endpoint::from_shared(self.endpoint())?.timeout(CALL_DEADLINE).connect().await?)
    }
}

impl Drop for Volcsi {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("ending volcsi: {error}");
        }
    }
}

fn endpoint(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}
