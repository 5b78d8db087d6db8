//! Starts the real volserver for a test, and ends it.
//!
//! It runs under the system-call filter of the unit that is shipped. Every wait has a deadline; a server that a test leaves behind is killed when its handle is dropped. What the server
//! wrote on stderr is kept in a file, and shown where it did not start.
#![allow(dead_code, unreachable_pub)] // Each test file is a crate of its own and uses a part of this.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use proto::export_name::{AttachmentExportName, Secret};
use proto::v1;
use proto::v1::management_client::ManagementClient;
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::{Channel, Endpoint};

use super::unit_filter;

/// A server that is not ready, or has not stopped, by then never will be.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// As `--memory-max` takes it: enough for the default of connections, however little the machine has.
pub const MEMORY_MAX: &str = "2G";

/// The program with a data directory and ports that are free; more arguments may be added.
pub fn command(data_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volserver"));
    // Nothing of the environment that the tests run in reaches the server.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("VOLSERVER_"))
    {
        command.env_remove(name);
    }
    command.env_remove("NOTIFY_SOCKET").env_remove("RUNTIME_DIRECTORY");
    command.env("VOLSERVER_RUNTIME_DIR", data_dir.with_extension("run")).arg("--data-dir").arg(data_dir);
    command.args(["--listen", "127.0.0.1:0", "--management", "127.0.0.1:0", "--threads", "1"]);
    // Every user of this machine may use the API's port.
    command.env("VOLSERVER_INSECURE", "true");
    // By default it is half of what the machine has.
    command.args(["--memory-max", MEMORY_MAX]);
    command
}

/// A running server.
#[derive(Debug)]
pub struct Volserver {
    child: Child,
    /// Where NBD clients connect.
    pub data: Vec<SocketAddr>,
    /// Where the API is; no address where it is on a Unix socket.
    pub management: SocketAddr,
    /// Where it is then.
    pub management_socket: Option<PathBuf>,
    log: PathBuf,
}

impl Volserver {
    /// On a data directory, with a log beside it.
    pub fn start(data_dir: &Path) -> Self {
        Self::start_with(command(data_dir), &data_dir.with_extension("log"))
    }

    /// Waits for the line that says it is ready.
    pub fn start_with(command: Command, log: &Path) -> Self {
        Self::start_logging_to(File::options().create(true).append(true).open(log).unwrap(), command, log)
    }

    /// Without the filter of the unit, for a command that becomes somebody else first.
    pub fn start_unfiltered(command: Command, log: &Path) -> Self {
        let stderr = File::options().create(true).append(true).open(log).unwrap();
        Self::wait_until_ready(stderr.into(), command, log, |command| command.spawn())
    }

    /// The same with any stderr; `log` is what is shown of it.
    pub fn start_logging_to(stderr: impl Into<Stdio>, command: Command, log: &Path) -> Self {
        Self::wait_until_ready(stderr.into(), command, log, |command| unit_filter::under(|| command.spawn()))
    }

    fn wait_until_ready(
        stderr: Stdio,
        mut command: Command,
        log: &Path,
        spawn: impl FnOnce(&mut Command) -> std::io::Result<Child>,
    ) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = spawn(&mut command).unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines() {
                let Ok(line) = line else { return };
                // The test may have what it wanted.
                let _ = sender.send(line);
            }
        });
        let Ok(line) = receiver.recv_timeout(DEADLINE) else {
            let _ = child.kill();
            let status = child.wait();
            panic!("not ready ({status:?}):\n{}", std::fs::read_to_string(log).unwrap_or_default());
        };
        let addresses =
            line.strip_prefix("volserver ready: data ").unwrap_or_else(|| panic!("not a ready line: {line}"));
        let (data, management) = addresses.split_once(", management ").unwrap();
        Self {
            child,
            data: data.split(' ').map(|address| address.parse().unwrap()).collect(),
            management: management
                .split(' ')
                .find_map(|address| address.parse().ok())
                .unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0))),
            management_socket: management
                .split(' ')
                .find_map(|address| address.strip_prefix("unix:"))
                .map(PathBuf::from),
            log: log.to_owned(),
        }
    }

    /// A client of the management API.
    pub async fn client(&self) -> ManagementClient<Channel> {
        ManagementClient::new(self.channel().await)
    }

    /// A connection to the API's port.
    pub async fn channel(&self) -> Channel {
        let uri = match &self.management_socket {
            Some(path) => format!("unix://{}", path.display()),
            None => format!("http://{}", self.management),
        };
        let endpoint = Endpoint::from_shared(uri).unwrap();
        endpoint.connect_timeout(DEADLINE).timeout(DEADLINE).connect().await.unwrap()
    }

    /// What the server has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// The log as soon as it has these words: it is written by a thread of its own, behind what it tells of.
    pub fn log_with(&self, words: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let log = self.log();
            if log.contains(words) {
                return log;
            }
            assert!(Instant::now() < deadline, "{words} is not in the log: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal and waits for the end.
    pub fn stop(mut self, signal: Signal) -> ExitStatus {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
        wait(&mut self.child, DEADLINE)
    }

    /// Kills it as a power cut would, but for the page cache.
    pub fn kill(self) {
        self.stop(Signal::KILL);
    }
}

impl Drop for Volserver {
    fn drop(&mut self) {
        // Fails where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for the end of a process; kills it and fails at the deadline.
pub fn wait(child: &mut Child, timeout: Duration) -> ExitStatus {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("volserver has not ended after {timeout:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a command that must fail to start: its exit code and what it said on stderr.
pub fn refused(mut command: Command) -> (i32, String) {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let status = wait(&mut child, DEADLINE);
    let stderr = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    (status.code().expect("exited by itself"), stderr)
}

/// A request for a file volume of one mebibyte.
pub fn create_request(name: &str) -> v1::CreateVolumeRequest {
    v1::CreateVolumeRequest { name: name.to_owned(), capacity_bytes: 1 << 20, ..Default::default() }
}

/// A request to attach for writing.
pub fn attach_request(volume_name: &str, node_id: &str, force: bool) -> v1::AttachVolumeRequest {
    v1::AttachVolumeRequest {
        volume_name: volume_name.to_owned(),
        node_id: node_id.to_owned(),
        force,
        ..Default::default()
    }
}

/// The name of an attachment's export, for the first connection of a session of that epoch.
pub fn export_name(attached: &v1::AttachVolumeResponse, epoch: u64) -> String {
    let name = AttachmentExportName {
        attachment_id: attached.attachment.as_ref().unwrap().attachment_id.parse().unwrap(),
        secret: Secret::parse(&attached.secret).unwrap(),
        epoch,
        slot: 0,
    };
    name.expose()
}
