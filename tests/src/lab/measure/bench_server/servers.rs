//! The servers that are measured: each a process of its own, pinned to a processor, with a file or memory of its own.
//!
//! Called by `mod`. Owns how each program is told what it has to serve. All serve at the same time, but only one of them is
//! asked at a time, and one that is not asked does nothing. A server ends when its value is dropped. Sources: `nbdkit(1)`,
//! `nbdkit-file-plugin(1)`, `qemu-nbd(8)`, `nbd-server(5)`.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use testlab::process_resources::Family;
use testlab::shell::{run, wait_for};
use testlab::volserver::Volserver;

use super::plan::{Program, Storage, Subject};

/// A server that does not listen by then is not coming.
const LISTEN_DEADLINE: Duration = Duration::from_secs(60);

/// A server that was asked to end and has not by then is killed.
const END_DEADLINE: Duration = Duration::from_secs(20);

/// What every export is called.
const EXPORT: &str = "bench";

/// Most clients at once that a server that wants to know is told.
const CLIENTS_MAX: &str = "64";

/// Where the servers run and keep their files.
pub(super) struct Site<'a> {
    /// The product's programs.
    pub(super) programs: &'a Path,
    /// An empty directory; each server gets one of its own in it.
    pub(super) directory: &'a Path,
    /// The processor that every server is pinned to.
    pub(super) processor: usize,
    /// Of every export.
    pub(super) size_bytes: u64,
}

/// One of them.
pub(super) struct Server {
    address: SocketAddr,
    process: Process,
}

enum Process {
    /// The product; its value ends it.
    Volserver(Volserver),
    /// A child of ours.
    Child(Child),
    /// One that has left us; its number was read from its own file.
    Daemon(Pid),
}

impl Server {
    /// Starts it with storage of its own and waits until it listens.
    pub(super) fn start(subject: Subject, site: &Site<'_>) -> Result<Self> {
        let directory = site.directory.join(subject.name().replace([' ', ','], "-"));
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        let starting = Starting { subject, site, directory };
        let started = match subject.program {
            Program::Volserver => starting.volserver(),
            Program::Nbdkit => starting.nbdkit(),
            Program::QemuNbd => starting.qemu_nbd(),
            Program::NbdServer => starting.nbd_server(),
        };
        started.with_context(|| subject.name())
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The export's name.
    pub(super) fn export(&self) -> &'static str {
        EXPORT
    }

    /// The export as tools want it named.
    pub(super) fn uri(&self) -> String {
        format!("nbd://{}/{EXPORT}", self.address)
    }

    /// Its processes.
    pub(super) fn family(&self) -> Family {
        let pid = match &self.process {
            Process::Volserver(server) => server.pid(),
            Process::Child(child) => child.id(),
            Process::Daemon(pid) => pid.as_raw_nonzero().get().unsigned_abs(),
        };
        Family { pid }
    }

    fn end(&mut self) -> Result<()> {
        match &mut self.process {
            Process::Volserver(_) => Ok(()),
            Process::Child(child) => {
                kill_process(Pid::from_child(child), Signal::TERM).context("SIGTERM")?;
                let ended = wait_for("a server to end", END_DEADLINE, || Ok(child.try_wait()?));
                if ended.is_err() {
                    child.kill()?;
                    child.wait()?;
                }
                ended.map(drop)
            }
            Process::Daemon(pid) => {
                kill_process(*pid, Signal::TERM).context("SIGTERM")?;
                let is_gone = || Ok(test_kill_process(*pid).is_err().then_some(()));
                wait_for("a daemon to end", END_DEADLINE, is_gone)
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("ending a server: {error:#}");
        }
    }
}

/// A server that is being started.
struct Starting<'a> {
    subject: Subject,
    site: &'a Site<'a>,
    directory: PathBuf,
}

impl Starting<'_> {
    /// A program on the servers' processor, its stderr in a file.
    fn pinned(&self, program: &Path) -> Result<Command> {
        let log = File::create(self.directory.join("log"))?;
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", &self.site.processor.to_string()]).arg(program);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok(command)
    }

    /// A file of the export's size, with every block allocated once it has been verified.
    fn image(&self) -> Result<PathBuf> {
        let path = self.directory.join("image");
        File::create(&path)?.set_len(self.site.size_bytes)?;
        Ok(path)
    }

    fn volserver(&self) -> Result<Server> {
        let mut command = self.pinned(&self.site.programs.join("volserver"))?;
        let cache = if self.subject.storage == Storage::PageCache { "writeback" } else { "none" };
        command.args(["--log", "warn", "--cache", cache]);
        let server = Volserver::start(&mut command, &self.directory)?;
        let backend = if self.subject.storage == Storage::Memory { "memory" } else { "file" };
        let volctl = self.site.programs.join("volctl").display().to_string();
        let (size, uri) = (self.site.size_bytes.to_string(), server.management_uri());
        run(&volctl, &["--server", &uri, "create", EXPORT, "--size", &size, "--backend", backend])?;
        Ok(Server { address: server.data, process: Process::Volserver(server) })
    }

    fn nbdkit(&self) -> Result<Server> {
        let port = free_port()?;
        let mut command = self.pinned(Path::new("nbdkit"))?;
        command.args(["--foreground", "--ipaddr", "127.0.0.1", "--port", &port.to_string()]);
        if self.subject.storage == Storage::Memory {
            command.arg("memory").arg(self.site.size_bytes.to_string());
        } else {
            command.arg("file").arg(self.image()?);
        }
        self.wait_until_it_listens(command, port)
    }

    fn qemu_nbd(&self) -> Result<Server> {
        let port = free_port()?;
        let mut command = self.pinned(Path::new("qemu-nbd"))?;
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--format", "raw"]);
        command.args(["--persistent", "--shared", CLIENTS_MAX, "--export-name", EXPORT]);
        // Linux AIO needs O_DIRECT; without, its own threads are what it is best at.
        let direct = self.subject.storage == Storage::Direct;
        command.args(if direct {
            ["--cache=none", "--aio=native"]
        } else {
            ["--cache=writeback", "--aio=threads"]
        });
        command.arg(self.image()?);
        self.wait_until_it_listens(command, port)
    }

    fn wait_until_it_listens(&self, mut command: Command, port: u16) -> Result<Server> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut server = Server { address, process: Process::Child(command.spawn().context("taskset")?) };
        wait_for("it to listen", LISTEN_DEADLINE, || {
            if let Process::Child(child) = &mut server.process
                && let Some(status) = child.try_wait()?
            {
                let log = fs::read_to_string(self.directory.join("log")).unwrap_or_default();
                bail!("it ended ({status}):\n{log}");
            }
            Ok(TcpStream::connect(address).ok())
        })?;
        Ok(server)
    }

    /// nbd-server always leaves for the background; every connection gets a process of its own.
    fn nbd_server(&self) -> Result<Server> {
        let port = free_port()?;
        let (config, pid_file) = (self.directory.join("config"), self.directory.join("pid"));
        let text = format!(
            "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n[{EXPORT}]\nexportname = {}\n",
            self.image()?.display()
        );
        fs::write(&config, text)?;
        let mut command = self.pinned(Path::new("nbd-server"))?;
        let status = command.arg("-C").arg(&config).arg("-p").arg(&pid_file).status().context("taskset")?;
        ensure!(status.success(), "it did not start: {status}");
        let pid = wait_for("its pid file", LISTEN_DEADLINE, || {
            let text = fs::read_to_string(&pid_file).unwrap_or_default();
            Ok(text.trim().parse::<i32>().ok().and_then(Pid::from_raw))
        })?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let server = Server { address, process: Process::Daemon(pid) };
        wait_for("it to listen", LISTEN_DEADLINE, || Ok(TcpStream::connect(address).ok()))?;
        Ok(server)
    }
}

/// A port that was free a moment ago, for programs that cannot be told to find one.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
