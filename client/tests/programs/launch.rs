//! Starting volctl and volclient, and what they said.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

pub(crate) const NODE_ID: &str = "node-of-the-test";

/// The end of a program.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) exit_code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// stdout as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// It failed with this code, said why in one line and what to do next in another, and printed no result.
    #[track_caller]
    pub(crate) fn expect_failure(&self, exit_code: i32, what: &str, next: &str) {
        assert_eq!(self.exit_code, Some(exit_code), "{self:?}");
        let lines: Vec<&str> = self.stderr.lines().collect();
        let [first, second] = lines[..] else { panic!("not two lines: {self:?}") };
        assert!(first.starts_with("volctl: ") && first.contains(what), "{self:?}");
        assert!(second.starts_with("  next: ") && second.contains(next), "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
    }

    #[track_caller]
    pub(crate) fn expect_success(self) -> Self {
        assert_eq!((self.exit_code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        self
    }
}

/// A port where nobody listens and nobody else will: taken, and refusing every connection.
#[derive(Debug)]
pub(crate) struct NobodysPort {
    _taken: Socket,
    pub(crate) address: SocketAddr,
}

impl NobodysPort {
    /// Any that is free.
    pub(crate) fn take() -> Self {
        Self::take_at("127.0.0.1:0".parse().unwrap())
    }

    /// One that a server has just left, which the next one may listen at.
    pub(crate) fn take_at(address: SocketAddr) -> Self {
        let taken = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        taken.set_reuse_address(true).unwrap();
        taken.bind(&address.into()).unwrap();
        let address = taken.local_addr().unwrap().as_socket().unwrap();
        Self { _taken: taken, address }
    }

    /// As `--server` takes it.
    pub(crate) fn uri(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// One of the product's programs, to which nothing of the environment that the tests run in is said.
pub(crate) fn program(path: &str) -> Command {
    let mut command = Command::new(path);
    let ours = |name: &str| name.starts_with("VOLNODE_") || name.starts_with("VOLCLIENT_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| ours(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command.env_remove("NOTIFY_SOCKET");
    command
}

/// Starts volcsi, whose command has its options already, and waits until it is ready at its socket; its log is put behind what is in the
/// file. Whoever has it ends it.
#[track_caller]
pub(crate) fn start_volcsi(command: &mut Command, socket: &Path, log: &Path) -> Child {
    let file = File::options().create(true).append(true).open(log).unwrap();
    let mut child = command.stdout(Stdio::piped()).stderr(file).spawn().unwrap();
    let mut ready = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    let logged = || fs::read_to_string(log).unwrap();
    assert_eq!(ready, format!("volcsi ready: {}\n", socket.display()), "{}", logged());
    child
}

/// A pipe with no room; its other end has to be kept.
pub(crate) fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setfl(&writer, OFlags::WRONLY | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]) != Err(Errno::AGAIN) {}
    fcntl_setfl(&writer, OFlags::WRONLY).unwrap();
    (reader, writer)
}

/// Runs volctl against a server's URI and a node daemon's socket.
pub(crate) fn volctl(server: &str, socket: &Path, args: &[&str]) -> Ended {
    let output = program(env!("CARGO_BIN_EXE_volctl"))
        .args(args)
        .env("VOLNODE_SERVER", server)
        .env("VOLNODE_SOCKET", socket)
        .output()
        .unwrap();
    Ended {
        exit_code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A node daemon in a run directory of its own; killed when dropped.
#[derive(Debug)]
pub(crate) struct NodeDaemon {
    child: Child,
    stdout: BufReader<ChildStdout>,
    pub(crate) run_dir: PathBuf,
    pub(crate) socket: PathBuf,
    server: String,
}

impl NodeDaemon {
    /// A new run directory: short, because sockets lie in it.
    pub(crate) fn run_dir() -> TempDir {
        tempfile::Builder::new().prefix("vn").tempdir_in("/tmp").unwrap()
    }

    /// Started, and ready.
    pub(crate) fn start(run_dir: &Path, server: &str) -> Self {
        // A file, because nobody would empty a pipe.
        Self::start_logging_to(File::create(Self::log_path(run_dir)).unwrap(), run_dir, server)
    }

    /// The same with any stderr.
    pub(crate) fn start_logging_to(log: impl Into<Stdio>, run_dir: &Path, server: &str) -> Self {
        Self::start_command(Self::command(run_dir, server), log, run_dir, server)
    }

    /// The same by another command, which may say more to the daemon.
    pub(crate) fn start_command(
        mut command: Command,
        log: impl Into<Stdio>,
        run_dir: &Path,
        server: &str,
    ) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut ready = String::new();
        stdout.read_line(&mut ready).unwrap();
        let socket = run_dir.join("volclient.sock");
        assert_eq!(ready, format!("volclient ready: {}\n", socket.display()));
        Self { child, stdout, run_dir: run_dir.to_owned(), socket, server: server.to_owned() }
    }

    /// The command that [`start`](Self::start) runs.
    pub(crate) fn command(run_dir: &Path, server: &str) -> Command {
        let mut command = program(env!("CARGO_BIN_EXE_volclient"));
        command.arg("serve").arg("--server").arg(server).arg("--run-dir").arg(run_dir);
        command.args(["--node-id", NODE_ID, "--log", "trace"]).arg("--device-dir").arg(run_dir.join("dev"));
        command
    }

    pub(crate) fn volctl(&self, args: &[&str]) -> Ended {
        volctl(&self.server, &self.socket, args)
    }

    /// SIGTERM; gives its exit status, its log, and checks that it printed nothing but the ready line.
    pub(crate) fn terminate(mut self) -> (ExitStatus, String) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "");
        let status = self.child.wait().unwrap();
        (status, fs::read_to_string(Self::log_path(&self.run_dir)).unwrap_or_default())
    }

    /// What it has logged by now.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(Self::log_path(&self.run_dir)).unwrap_or_default()
    }

    pub(crate) fn log_path(run_dir: &Path) -> PathBuf {
        run_dir.join("log")
    }
}

impl Drop for NodeDaemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
