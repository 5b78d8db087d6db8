//! A volserver for NBD clients on loopback, for tests and measurements that are of the server alone.
//!
//! Owns the process. Of its options only those by which it is found are set here. A server with a node daemon is `storage_node`'s.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};

/// A server that is ready. Killed when dropped.
#[derive(Debug)]
pub struct Volserver {
    process: Child,
    /// Where it speaks NBD, over TCP.
    pub data: SocketAddr,
    /// Where its management API is, over TCP.
    pub management: SocketAddr,
}

impl Volserver {
    /// Starts the program of `command`, which may have options already: with its files in `directory`, at ports that are free, and
    /// every volume exported by its name.
    ///
    /// # Errors
    /// It cannot be run, or does not get ready.
    pub fn start(command: &mut Command, directory: &Path) -> Result<Self> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self::start_at(command, directory, any, any)
    }

    /// Kills it, and starts another at the same addresses, by a command like the one before.
    ///
    /// # Errors
    /// It cannot be run, or does not get ready.
    pub fn start_again(&mut self, command: &mut Command, directory: &Path) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        *self = Self::start_at(command, directory, self.data, self.management)?;
        Ok(())
    }

    fn start_at(
        command: &mut Command,
        directory: &Path,
        data: SocketAddr,
        management: SocketAddr,
    ) -> Result<Self> {
        command.arg("--data-dir").arg(directory.join("data")).arg("--runtime-dir").arg(directory.join("run"));
        command.args(["--listen", &data.to_string(), "--management", &management.to_string(), "--insecure"]);
        command.arg("--export-by-name").stdout(Stdio::piped());
        let process = command.spawn().with_context(|| format!("{command:?}"))?;
        let nowhere = SocketAddr::from(([0; 4], 0));
        // From here on the process ends with the value.
        let mut server = Self { process, data: nowhere, management: nowhere };
        let stdout = server.process.stdout.take().context("stdout")?;
        let ready = BufReader::new(stdout).lines().next().context("volserver did not get ready")??;
        (server.data, server.management) = addresses(&ready).with_context(|| ready.clone())?;
        Ok(server)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The URI of its management API.
    pub fn management_uri(&self) -> String {
        format!("http://{}", self.management)
    }
}

impl Drop for Volserver {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("ending volserver: {error}");
        }
    }
}

/// The first NBD and the first management address over TCP in volserver's first line.
fn addresses(ready: &str) -> Option<(SocketAddr, SocketAddr)> {
    let (data, management) = ready.strip_prefix("volserver ready: data ")?.split_once(", management ")?;
    let tcp = |addresses: &str| addresses.split(' ').find_map(|address| address.parse().ok());
    Some((tcp(data)?, tcp(management)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_addresses_are_found_in_the_ready_line() {
        let wanted = Some(("127.0.0.1:4000".parse().unwrap(), "127.0.0.1:5000".parse().unwrap()));
        assert_eq!(addresses("volserver ready: data 127.0.0.1:4000, management 127.0.0.1:5000"), wanted);
        let ready = "volserver ready: data unix:/a 127.0.0.1:4000, management 127.0.0.1:5000 unix:/b";
        assert_eq!(addresses(ready), wanted);
        assert_eq!(addresses("volserver 0.1.0"), None);
    }
}
