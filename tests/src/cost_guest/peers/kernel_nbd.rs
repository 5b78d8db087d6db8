//! The kernel's NBD client (`nbd.ko`, set up by nbd-client) and nbdkit's memory plugin as a server for it.
//!
//! A device is disconnected and a server killed when its value is dropped.
//! Source: `nbd-client(8)`, `nbdkit-memory-plugin(1)`; Linux 7.3 `drivers/block/nbd.c`.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use testlab::shell::{run, wait_for};

/// A server that does not listen by then is not coming.
const LISTEN_DEADLINE: Duration = Duration::from_secs(60);

/// nbdkit with one export in memory.
pub(crate) struct Nbdkit {
    process: Child,
    address: SocketAddr,
}

impl Nbdkit {
    /// Starts it on a loopback port.
    ///
    /// # Errors
    /// It cannot be run, or does not listen.
    pub(crate) fn start(port: u16, size_mib: u64) -> Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--ipaddr", "127.0.0.1", "--port", &port.to_string()]);
        command.args(["memory", &format!("{size_mib}M")]).stdin(Stdio::null());
        let server = Self { process: command.spawn().context("nbdkit")?, address };
        wait_for("nbdkit to listen", LISTEN_DEADLINE, || Ok(TcpStream::connect(address).ok()))?;
        Ok(server)
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("ending nbdkit: {error}");
        }
    }
}

/// A `/dev/nbdN` that is connected.
pub(crate) struct KernelNbd {
    device: PathBuf,
}

impl KernelNbd {
    /// Connects the first one to an export (empty: the default one) with 4096-byte blocks.
    ///
    /// # Errors
    /// The driver cannot be loaded, or the server refuses.
    pub(crate) fn connect(server: SocketAddr, export: &str) -> Result<Self> {
        run("modprobe", &["nbd"])?;
        let device = PathBuf::from("/dev/nbd0");
        let (host, port) = (server.ip().to_string(), server.port().to_string());
        run("nbd-client", &["-N", export, "-b", "4096", &host, &port, &device.display().to_string()])?;
        Ok(Self { device })
    }

    /// The block device.
    pub(crate) fn device(&self) -> &Path {
        &self.device
    }
}

impl Drop for KernelNbd {
    fn drop(&mut self) {
        if let Err(error) = run("nbd-client", &["-d".as_ref(), self.device.as_os_str()]) {
            eprintln!("disconnecting {}: {error:#}", self.device.display());
        }
    }
}
