//! One node: an emulated machine that runs `node.sh`, and obeys by files in a directory which both sides see.
//!
//! Owns the machine, on a thread of its own; it ends with the value. A node that is frozen (SIGSTOP to QEMU) is one that has gone
//! without a word, and comes back with all its memory.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::lab::interrupt;
use crate::lab::machine::guest_command::GuestCommand;
use crate::lab::machine::kernels::Kernel;
use crate::lab::machine::vm::{self, Follower, Processors, Stream};
use crate::lab::tool;
use crate::lab::workspace::Workspace;

/// What the machine runs.
const SCRIPT: &str = include_str!("node.sh");

/// As long as anybody may want the cluster.
const DEADLINE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What a node has to know.
pub(super) struct Given<'a> {
    pub(super) workspace: &'a Workspace,
    pub(super) kernel: &'a Kernel,
    /// The cluster's directory.
    pub(super) directory: &'a Path,
    /// The programs of Kubernetes.
    pub(super) tools: &'a Path,
    pub(super) api_port: u16,
    /// The storage server's management API, as the guest sees it.
    pub(super) server: &'a str,
}

/// A running node.
pub(super) struct Node {
    pub(super) name: String,
    exchange: PathBuf,
    ends: Arc<AtomicBool>,
    machine: Option<JoinHandle<Result<()>>>,
    asked: u32,
}

impl Node {
    /// Boots the node that is the `number`-th, from 1.
    ///
    /// # Errors
    /// Its files cannot be written.
    pub(super) fn start(given: &Given<'_>, name: &str, number: usize, kubelet_port: u16) -> Result<Self> {
        let exchange = given.directory.join(name);
        // A node that is started again is a new machine.
        let _ = fs::remove_dir_all(&exchange);
        fs::create_dir_all(&exchange).with_context(|| exchange.display().to_string())?;
        let script = given.directory.join("node.sh");
        fs::write(&script, SCRIPT)?;
        let words = ["bash".to_owned(), script.display().to_string()].into();
        let mut command = GuestCommand::new(given.workspace, words)?
            .in_directory(Path::new("/"))
            .sharing(&exchange)
            .reached_at(kubelet_port);
        for (variable, value) in [
            ("NODE", name.to_owned()),
            // Each is in a network of its own: QEMU forwards to this address.
            ("ADDRESS", "10.0.2.15".to_owned()),
            ("POD_NETWORK", format!("10.88.{number}.0/24")),
            ("KUBELET_PORT", kubelet_port.to_string()),
            ("API_PORT", given.api_port.to_string()),
            ("SERVER", given.server.to_owned()),
            ("CLUSTER", given.directory.display().to_string()),
            ("TOOLS", given.tools.display().to_string()),
        ] {
            command = command.with_variable(variable, &value);
        }
        let Workspace { root, target, cache } = given.workspace;
        let workspace = Workspace { root: root.clone(), target: target.clone(), cache: cache.clone() };
        let kernel = given.kernel.clone();
        let ends = Arc::new(AtomicBool::new(false));
        let log = given.directory.join("logs").join(format!("{name}.log"));
        let mut log = Log { file: File::create(&log)?, ends: Arc::clone(&ends) };
        let machine = thread::spawn(move || {
            let ended = vm::run(&workspace, &kernel, &command, Processors::Two, DEADLINE, &mut log);
            ended.map(|_| ())
        });
        Ok(Self { name: name.to_owned(), exchange, ends, machine: Some(machine), asked: 0 })
    }

    /// Fails if the machine has ended.
    ///
    /// # Errors
    /// It has: with what it said.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(machine) = self.machine.take_if(|machine| machine.is_finished()) {
            let ended =
                machine.join().map_err(|_| anyhow::anyhow!("the thread of {} panicked", self.name))?;
            ended.with_context(|| self.name.clone())?;
            bail!("{} has ended by itself: see its log", self.name);
        }
        Ok(())
    }

    /// Waits until the node has all images.
    ///
    /// # Errors
    /// It has not in time.
    pub(super) fn wait_for_images(&mut self, deadline: Duration) -> Result<()> {
        // It does what it is asked for once it has them.
        self.run("true", deadline).map(drop)
    }

    /// Has the node run lines of bash, which know the functions of `node.sh`, and gives what they printed.
    ///
    /// # Errors
    /// They fail, or do not end in time.
    pub(super) fn run(&mut self, lines: &str, deadline: Duration) -> Result<String> {
        let (code, said) = self.try_run(lines, deadline)?;
        ensure!(code == 0, "{}: {lines}: exit code {code}\n{said}", self.name);
        Ok(said)
    }

    /// The same, with the exit code.
    ///
    /// # Errors
    /// They do not end in time.
    pub(super) fn try_run(&mut self, lines: &str, deadline: Duration) -> Result<(i32, String)> {
        self.asked += 1;
        let (todo, done) = (self.exchange.join("todo"), self.exchange.join("done"));
        let file = todo.join(format!("{}.sh", self.asked));
        let unfinished = todo.join(format!("{}.new", self.asked));
        fs::write(&unfinished, lines)
            .and_then(|()| fs::rename(&unfinished, &file))
            .context("asking the node")?;
        let began = Instant::now();
        let code = loop {
            interrupt::check()?;
            if let Ok(code) = fs::read_to_string(done.join(format!("{}.rc", self.asked))) {
                break code.trim().parse().context("the exit code")?;
            }
            self.check()?;
            ensure!(began.elapsed() < deadline, "{} does not answer: {lines}", self.name);
            thread::sleep(tool::POLL_INTERVAL);
        };
        let said = fs::read(done.join(format!("{}.out", self.asked)))?;
        Ok((code, String::from_utf8_lossy(&said).into_owned()))
    }

    /// Stops the machine in its tracks.
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
        let id = fs::read_to_string(self.exchange.join("qemu.pid")).context("the node's QEMU")?;
        let id = Pid::from_raw(id.trim().parse()?).context("no process")?;
        kill_process(id, signal).with_context(|| self.name.clone())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(machine) = self.machine.take() {
            // That it was ended is no error of its.
            let _ = machine.join();
        }
    }
}

/// Keeps what the machine says, and ends it when it is no longer wanted.
struct Log {
    file: File,
    ends: Arc<AtomicBool>,
}

impl Follower for Log {
    fn output(&mut self, _stream: Stream, bytes: &[u8]) -> Result<()> {
        Ok(self.file.write_all(bytes)?)
    }

    fn tick(&mut self) -> Result<()> {
        ensure!(!self.ends.load(Ordering::Relaxed), "no longer wanted");
        Ok(())
    }
}
