//! A storage server and a node daemon of a test's own, driven as users drive them: by their programs.
//!
//! Used by the VM tests. Both daemons listen on free loopback ports and keep everything under the test's directory; they
//! end when the value is dropped, and what they logged is printed then, so that a failed test shows it.

mod client_place;
mod node_api;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tls::test_authority::Issued;

use crate::harness::Env;
use crate::kernel_series::KernelSeries;
use crate::pod::{self, Pod};
use crate::shell::{path_with, run, sh, wait_for};

/// A daemon that is not ready by then is not coming.
const READY_DEADLINE: Duration = Duration::from_secs(60);
/// A daemon that was asked to end has ended by then.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// Where the kernel tells which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What a run of volctl gave.
#[derive(Debug)]
pub struct Volctl {
    /// Its exit code.
    pub exit_code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Volctl {
    /// Its stdout, if it succeeded.
    ///
    /// # Errors
    /// It failed: with what it said.
    pub fn succeeded(self) -> Result<String> {
        ensure!(self.exit_code == 0, "volctl: exit code {}\n{}", self.exit_code, self.stderr);
        Ok(self.stdout)
    }

    /// What it complained of, if it failed with this exit code and told what to do next.
    ///
    /// # Errors
    /// It succeeded, failed otherwise, or left the user without a next step.
    pub fn failed_with(self, exit_code: i32) -> Result<String> {
        ensure!(self.exit_code == exit_code, "want exit code {exit_code}: {self:?}");
        ensure!(self.stderr.starts_with("volctl: "), "an error names its program: {self:?}");
        ensure!(self.stderr.contains("next: "), "an error says what to do next: {self:?}");
        ensure!(self.stdout.is_empty(), "an error prints nothing on stdout: {self:?}");
        Ok(self.stderr)
    }
}

/// How a node speaks TLS.
#[derive(Debug, Clone)]
pub struct NodeTls {
    /// The server's certificate; its authority vouches for clients, too.
    pub server: Issued,
    /// The node daemon's certificate, which volctl uses as well.
    pub client: Issued,
    /// Neither side leaves the records to the kernel.
    pub user_space_only: bool,
}

/// A machine of its own for a node daemon, as far as programs can tell.
#[derive(Debug, Clone)]
pub struct ClonedMachine {
    /// Its network namespace.
    pub name: String,
    /// Its /etc/machine-id.
    pub machine_id: String,
    /// Which boot it is, of all those that there are.
    pub boot: u64,
}

/// A server, a node daemon, and where they keep what.
pub struct StorageNode {
    /// The server's data directory.
    pub data_dir: PathBuf,
    /// `host:port` of the server's NBD port.
    pub data_address: String,
    /// `http://host:port` of the server's management API.
    pub management_uri: String,
    /// The node daemon's run directory.
    pub run_dir: PathBuf,
    /// Where stable device names are made.
    pub device_dir: PathBuf,
    programs: PathBuf,
    logs: PathBuf,
    series: KernelSeries,
    server_options: Vec<String>,
    client_options: Vec<String>,
    /// Where the node daemon finds programs before others.
    client_programs: Option<PathBuf>,
    node_id: String,
    /// The machine that the node daemon runs on; `None`: this one, as `node_id`.
    machine: Option<ClonedMachine>,
    /// The network namespace that the server runs in; `None`: ours.
    server_netns: Option<String>,
    /// What the server takes for this machine's boot id; `None`: the true one.
    boot_id: Option<String>,
    tls: Option<NodeTls>,
    server: Option<Child>,
    client: Option<Child>,
    /// What the node daemon runs in, if it does.
    pod: Option<Pod>,
    /// What the node daemon has for stderr instead of a file: both ends of a pipe with no room.
    full_pipe: Option<(OwnedFd, OwnedFd)>,
}

impl StorageNode {
    /// Starts both; the server keeps its data in the test's directory.
    ///
    /// # Errors
    /// One of them does not get ready.
    pub fn start(env: &Env) -> Result<Self> {
        Self::start_with(env, &env.directory.join("data"), &[])
    }

    /// Starts both; the server keeps its data on a new XFS on the scratch disk, where O_DIRECT and hole punching work.
    ///
    /// # Errors
    /// There is no scratch disk, or one of them does not get ready.
    pub fn start_on_xfs(env: &Env) -> Result<Self> {
        let mount_point = mount_xfs(env)?;
        Self::start_with(env, &mount_point.join("data"), &[])
    }

    /// Starts both with a data directory and further options for the server.
    ///
    /// # Errors
    /// One of them does not get ready.
    pub fn start_with(env: &Env, data_dir: &Path, server_options: &[&str]) -> Result<Self> {
        if env.in_vm {
            load_drivers(&["ublk_drv"])?;
        }
        let mut node = Self::start_server_only(env, data_dir, server_options)?;
        node.start_client()?;
        Ok(node)
    }

    /// Starts both; the server requires TLS and a client's certificate, for NBD and for its API.
    ///
    /// # Errors
    /// One of them does not get ready.
    pub fn start_over_tls(env: &Env, tls: NodeTls, server_options: &[&str]) -> Result<Self> {
        Self::start_over_tls_with(env, tls, server_options, &[])
    }

    /// The same with further options for the node daemon.
    ///
    /// # Errors
    /// One of them does not get ready.
    pub fn start_over_tls_with(
        env: &Env,
        tls: NodeTls,
        server_options: &[&str],
        client_options: &[&str],
    ) -> Result<Self> {
        if env.in_vm {
            load_drivers(&["ublk_drv", "tls"])?;
        }
        let mut node = Self::new(env, &env.directory.join("data"), server_options)?;
        node.management_uri = "https://127.0.0.1:0".into();
        node.tls = Some(tls);
        node.client_options = client_options.iter().map(|&option| option.to_owned()).collect();
        node.start_server()?;
        node.start_client()?;
        Ok(node)
    }

    /// Starts the server alone, for tests that need no block device.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn start_server_only(env: &Env, data_dir: &Path, server_options: &[&str]) -> Result<Self> {
        let mut node = Self::new(env, data_dir, server_options)?;
        node.start_server()?;
        Ok(node)
    }

    /// Starts both; the server runs in a network namespace, at an address there that we can reach.
    ///
    /// # Errors
    /// One of them does not get ready.
    pub fn start_in_netns(env: &Env, netns: &str, address: &str) -> Result<Self> {
        if env.in_vm {
            load_drivers(&["ublk_drv"])?;
        }
        let mut node = Self::new(env, &env.directory.join("data"), &["--insecure"])?;
        node.data_address = format!("{address}:0");
        node.management_uri = format!("http://{address}:0");
        node.server_netns = Some(netns.to_owned());
        node.start_server()?;
        node.start_client()?;
        Ok(node)
    }

    /// Starts a server alone, at an address of this machine that others reach.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn start_server_at(env: &Env, address: &str) -> Result<Self> {
        let mut node = Self::new(env, &env.directory.join("data"), &["--insecure"])?;
        node.data_address = format!("{address}:0");
        node.management_uri = format!("http://{address}:0");
        node.start_server()?;
        Ok(node)
    }

    /// Starts the daemon of a machine of its own, for the same server.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn start_clone(&self, env: &Env, machine: ClonedMachine) -> Result<Self> {
        if env.in_vm {
            load_drivers(&["ublk_drv"])?;
        }
        let mut other = self.another(env, &machine.name)?;
        other.machine = Some(machine);
        other.start_client()?;
        Ok(other)
    }

    /// Starts a node daemon alone, for the server on another machine.
    ///
    /// # Errors
    /// It does not get ready, or there is no such machine ([`Env::storage_machine`]).
    pub fn start_client_only(env: &Env) -> Result<Self> {
        let management_uri = env.storage_machine()?;
        set_network_card(true)?;
        load_drivers(&["ublk_drv"])?;
        let mut node = Self::new(env, &env.directory.join("data"), &[])?;
        node.management_uri = management_uri;
        node.start_client()?;
        Ok(node)
    }

    /// Starts the daemon of another node, for the same server, on this machine.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn start_another_client(&self, env: &Env, node_id: &str) -> Result<Self> {
        let mut other = self.another(env, node_id)?;
        other.start_client()?;
        Ok(other)
    }

    /// Another node of the same server, which has not been started.
    fn another(&self, env: &Env, name: &str) -> Result<Self> {
        let mut other = Self::new(env, &self.data_dir, &[])?;
        other.data_address.clone_from(&self.data_address);
        other.management_uri.clone_from(&self.management_uri);
        other.run_dir = env.directory.join(format!("run-{name}"));
        other.device_dir = env.directory.join(format!("by-name-{name}"));
        other.logs = env.directory.join(format!("logs-{name}"));
        other.node_id = name.to_owned();
        fs::create_dir_all(&other.logs)?;
        Ok(other)
    }

    fn new(env: &Env, data_dir: &Path, server_options: &[&str]) -> Result<Self> {
        let logs = env.directory.join("logs");
        fs::create_dir_all(&logs)?;
        let device_dir =
            if env.in_vm { PathBuf::from("/dev/volnode") } else { env.directory.join("by-name") };
        Ok(Self {
            data_dir: data_dir.to_owned(),
            data_address: "127.0.0.1:0".into(),
            management_uri: "http://127.0.0.1:0".into(),
            run_dir: env.directory.join("run"),
            device_dir,
            programs: env.programs.clone(),
            logs,
            series: env.series,
            server_options: server_options.iter().map(|&option| option.to_owned()).collect(),
            client_options: Vec::new(),
            client_programs: None,
            node_id: "node-1".into(),
            machine: None,
            server_netns: None,
            boot_id: None,
            tls: None,
            server: None,
            client: None,
            pod: None,
            full_pipe: None,
        })
    }

    /// Starts the server, on the ports it had before if it ran before.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn start_server(&mut self) -> Result<()> {
        let mut server = self.server_command()?;
        server.arg("--data-dir").arg(&self.data_dir).args(["--listen", &self.data_address]);
        let (scheme, management) = self.management_uri.split_once("://").context("management URI")?;
        server.args(["--management", management]).args(&self.server_options);
        server.arg("--runtime-dir").arg(self.run_dir.with_extension("volserver"));
        if self.tls.is_none() && !self.server_options.iter().any(|option| option == "--insecure") {
            server.arg("--insecure");
        }
        if let Some(NodeTls { server: files, user_space_only, .. }) = &self.tls {
            let records = if *user_space_only { "user-space" } else { "auto" };
            server.args(["--tls", "required", "--tls-records", records, "--tls-cert"]);
            server.arg(files.pair().certificate).arg("--tls-key").arg(files.pair().key);
            server.arg("--tls-client-ca").arg(files.authority());
        }
        let scheme = scheme.to_owned();
        let (child, ready) = self.spawn(server, "volserver")?;
        self.server = Some(child);
        let address_after = |word: &str| -> Result<String> {
            let (_, rest) = ready.split_once(word).with_context(|| ready.clone())?;
            Ok(rest.split([',', ' ']).next().unwrap_or_default().to_owned())
        };
        self.data_address = address_after("data ")?;
        self.management_uri = format!("{scheme}://{}", address_after("management ")?);
        Ok(())
    }

    /// Lets the server, when it is started next, serve data at another address of this machine, on a port that is free there.
    pub fn move_server(&mut self, host: &str) {
        self.data_address = format!("{host}:0");
    }

    /// Lets the server, when it is started next, find itself on a machine that has been booted since.
    pub fn boot_server_machine(&mut self, seed: u64) {
        self.boot_id = Some(boot_id(seed));
    }

    /// The server's program, under a boot id of the test's where there is one.
    fn server_command(&self) -> Result<Command> {
        let program = self.programs.join("volserver");
        if let Some(netns) = &self.server_netns {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", netns]).arg(program);
            return Ok(command);
        }
        let Some(boot_id) = &self.boot_id else { return Ok(Command::new(program)) };
        let mut command = Command::new("unshare");
        self.bind_over(&mut command, &[("boot_id", boot_id, BOOT_ID)])?;
        command.arg(program);
        Ok(command)
    }

    /// The node daemon's program, on the machine that it is to find itself on.
    fn client_command(&self) -> Result<Command> {
        let own = self.programs.join("volclient");
        let program = self.pod.as_ref().map_or(own, |_| pod::PROGRAM.into());
        let Some(machine) = &self.machine else {
            let mut command = Command::new(program);
            command.args(["serve", "--node-id", &self.node_id]);
            return Ok(command);
        };
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &machine.name, "unshare"]);
        let files = [
            ("boot_id", &boot_id(machine.boot), BOOT_ID),
            ("machine-id", &machine.machine_id, "/etc/machine-id"),
        ];
        self.bind_over(&mut command, &files)?;
        command.arg(program).arg("serve");
        Ok(command)
    }

    /// The arguments of `unshare` up to the program that is to see other files: their names here, contents, and paths.
    fn bind_over(&self, unshare: &mut Command, files: &[(&str, &String, &str)]) -> Result<()> {
        let mut script = String::new();
        for (name, contents, path) in files {
            let file = self.logs.join(name);
            fs::write(&file, format!("{contents}\n"))?;
            script += &format!("mount --bind '{}' {path}; ", file.display());
        }
        script += "exec \"$@\"";
        unshare.args(["--mount", "--propagation", "private", "bash", "-euc", &script, "bash"]);
        Ok(())
    }

    /// Starts the node daemon.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn start_client(&mut self) -> Result<()> {
        let mut client = self.client_command()?;
        client.args(["--server", &self.management_uri]);
        client.arg("--run-dir").arg(&self.run_dir).arg("--device-dir").arg(&self.device_dir);
        self.add_tls_options(&mut client);
        if self.tls.as_ref().is_some_and(|tls| tls.user_space_only) {
            client.arg("--tls-user-space");
        }
        client.args(&self.client_options);
        client.envs(self.client_programs.iter().map(|folder| ("PATH", path_with(folder))));
        if let Some(pod) = &self.pod {
            pod.enter(&mut client);
        }
        let (child, _) = self.spawn(client, "volclient")?;
        self.client = Some(child);
        Ok(())
    }

    /// Stops the server without a word (SIGSTOP): its sockets stay open, and nobody answers.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze_server(&self) -> Result<()> {
        let server = self.server.as_ref().context("the server does not run")?;
        kill_process(Pid::from_child(server), Signal::STOP).context("SIGSTOP")
    }

    /// Kills the server (kill -9) and waits until it is gone.
    ///
    /// # Errors
    /// It does not run, or cannot be killed.
    pub fn kill_server(&mut self) -> Result<()> {
        kill_and_wait(self.server.take().context("the server does not run")?)
    }

    /// Tells the node daemon to end (SIGTERM), and gives how long that took.
    ///
    /// # Errors
    /// It does not run, or does not end within `deadline`.
    pub fn end_client(&mut self, deadline: Duration) -> Result<Duration> {
        let started = Instant::now();
        let mut client = self.client.take().context("the node daemon does not run")?;
        kill_process(Pid::from_child(&client), Signal::TERM).context("SIGTERM")?;
        let ended = wait_for("the node daemon to end", deadline, || Ok(client.try_wait()?));
        if ended.is_err() {
            kill_and_wait(client)?;
        }
        ended.map(|_| started.elapsed())
    }

    /// A program of the product that finds these daemons by the environment, as service managers tell it.
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command.env("VOLNODE_SERVER", &self.management_uri).env("VOLCLIENT_SERVER", &self.management_uri);
        command.env("VOLNODE_SOCKET", self.socket()).env("VOLCLIENT_NODE_ID", "node-1");
        command.env("VOLCLIENT_RUN_DIR", &self.run_dir).env("VOLCLIENT_DEVICE_DIR", &self.device_dir);
        command
    }

    /// Kills the node daemon (kill -9) and waits until it is gone.
    ///
    /// # Errors
    /// It does not run, or cannot be killed.
    pub fn kill_client(&mut self) -> Result<()> {
        kill_and_wait(self.client.take().context("the node daemon does not run")?)
    }

    /// Whether the server runs.
    ///
    /// # Errors
    /// wait(2) fails.
    pub fn server_is_alive(&mut self) -> Result<bool> {
        Ok(self.server.as_mut().context("never started")?.try_wait()?.is_none())
    }

    /// Runs volctl against these daemons.
    ///
    /// # Errors
    /// It cannot be run; its own failure is in the value.
    pub fn volctl(&self, arguments: &[&str]) -> Result<Volctl> {
        let output = self.volctl_command(arguments).stdin(Stdio::null()).output().context("volctl")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let exit_code = output.status.code().context("volctl was killed")?;
        Ok(Volctl { exit_code, stdout: text(&output.stdout), stderr: text(&output.stderr) })
    }

    /// Runs volctl against these daemons and does not wait for its end: its process, and its lines as they come.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn volctl_lines(&self, arguments: &[&str]) -> Result<(Child, Receiver<String>)> {
        let mut child = self
            .volctl_command(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("volctl")?;
        let lines = lines_of(child.stdout.take().context("stdout")?);
        Ok((child, lines))
    }

    /// Makes a volume and attaches it over the data path this kernel is tested for; gives the device.
    ///
    /// # Errors
    /// volctl failed, or another data path was chosen.
    pub fn create_and_attach(&self, name: &str, size: &str, create_options: &[&str]) -> Result<PathBuf> {
        self.volctl(&[&["create", name, "--size", size], create_options].concat())?.succeeded()?;
        let device = self.attach(&[name])?;
        let data_path = self.attachment(name)?["data_path"].as_str().unwrap_or_default().to_owned();
        ensure!(
            data_path == self.series.data_paths()[0].as_str(),
            "kernel {} was given data path {data_path}",
            self.series
        );
        Ok(device)
    }

    /// Attaches; gives the device, which is all that volctl may print.
    ///
    /// # Errors
    /// volctl failed, or printed something else.
    pub fn attach(&self, arguments: &[&str]) -> Result<PathBuf> {
        let stdout = self.volctl(&[&["attach"], arguments].concat())?.succeeded()?;
        let device = stdout.strip_suffix('\n').unwrap_or(&stdout);
        let number = device.strip_prefix("/dev/ublkb").and_then(|number| number.parse::<u32>().ok());
        ensure!(number.is_some(), "attach printed {stdout:?}");
        Ok(PathBuf::from(device))
    }

    /// Detaches what must be detachable.
    ///
    /// # Errors
    /// volctl failed.
    pub fn detach(&self, target: &str) -> Result<()> {
        self.volctl(&["detach", target])?.succeeded().map(drop)
    }

    /// One attachment, with the names and words of `volctl attachments --output json`, asked of the node daemon itself.
    ///
    /// # Errors
    /// There is none for that target, or the daemon does not answer.
    pub fn attachment(&self, target: &str) -> Result<serde_json::Value> {
        find_attachment(node_api::attachments(&self.socket())?, target)
    }

    /// One attachment as `volctl attachments --output json` shows it.
    ///
    /// # Errors
    /// There is none for that target, or volctl failed.
    pub fn shown_attachment(&self, target: &str) -> Result<serde_json::Value> {
        let all = self.volctl(&["attachments", "--output", "json"])?.succeeded()?;
        find_attachment(serde_json::from_str(&all).context("volctl's JSON")?, target)
    }

    /// The server's file of a volume.
    ///
    /// # Errors
    /// There is no such volume.
    pub fn volume_file(&self, name: &str) -> Result<PathBuf> {
        let shown = self.volctl(&["show", name, "--output", "json"])?.succeeded()?;
        let shown: serde_json::Value = serde_json::from_str(&shown).context("volctl's JSON")?;
        let uid = shown["volume_uid"].as_str().context("volume_uid")?.to_owned();
        let files = fs::read_dir(self.data_dir.join("volumes"))?;
        for file in files {
            let path = file?.path();
            if path.to_string_lossy().contains(&uid) {
                return Ok(path);
            }
        }
        bail!("no file of volume {uid}")
    }

    /// Of the node API.
    fn socket(&self) -> PathBuf {
        self.run_dir.join("volclient.sock")
    }

    fn volctl_command(&self, arguments: &[&str]) -> Command {
        let mut volctl = Command::new(self.programs.join("volctl"));
        volctl.args(["--server", &self.management_uri, "--socket"]).arg(self.socket());
        self.add_tls_options(&mut volctl);
        volctl.args(arguments);
        volctl
    }

    fn add_tls_options(&self, command: &mut Command) {
        if let Some(NodeTls { client: files, .. }) = &self.tls {
            command.arg("--tls-ca").arg(files.authority());
            command.arg("--tls-cert").arg(files.pair().certificate).arg("--tls-key").arg(files.pair().key);
        }
    }

    fn spawn(&self, mut command: Command, name: &str) -> Result<(Child, String)> {
        let log_path = self.logs.join(name);
        let log = match &self.full_pipe {
            Some((_, writer)) if name == "volclient" => Stdio::from(writer.try_clone()?),
            _ => File::options().create(true).append(true).open(&log_path)?.into(),
        };
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context(name.to_owned())?;
        // Only the first line, the ready line, is waited for.
        match lines_of(child.stdout.take().context("stdout")?).recv_timeout(READY_DEADLINE) {
            Ok(ready) => Ok((child, ready)),
            Err(error) => {
                kill_and_wait(child)?;
                let log = fs::read_to_string(&log_path).unwrap_or_default();
                bail!("{name} did not get ready ({error}):\n{log}")
            }
        }
    }
}

impl Drop for StorageNode {
    fn drop(&mut self) {
        // The client first: its detaching may still need the server.
        for child in [self.client.take(), self.server.take()].into_iter().flatten() {
            if let Err(error) = end(child) {
                println!("ending a daemon: {error:#}");
            }
        }
        for name in ["volserver", "volclient"] {
            let log = fs::read_to_string(self.logs.join(name)).unwrap_or_default();
            println!("--- log of {name}\n{log}");
        }
    }
}

fn boot_id(seed: u64) -> String {
    format!("00000000-0000-4000-8000-{:012x}", seed & 0xffff_ffff_ffff)
}

fn find_attachment(all: Vec<serde_json::Value>, target: &str) -> Result<serde_json::Value> {
    let found = all.iter().find(|attachment| attachment["target"] == target);
    found.cloned().with_context(|| format!("{target} is not in {all:?}"))
}

/// Loads the drivers that are not there yet: in a machine of many tests that is once each.
fn load_drivers(names: &[&str]) -> Result<()> {
    for name in names {
        if !Path::new("/sys/module").join(name).exists() {
            run("modprobe", &[name])?;
        }
    }
    Ok(())
}

/// The VM's network card, over which the server on another machine is reached.
///
/// # Errors
/// There is none.
pub fn set_network_card(is_up: bool) -> Result<()> {
    // QEMU's user-mode network; the address stays for whoever comes next.
    let script = match is_up {
        true => "ip link set eth0 up; ip address replace 10.0.2.15/24 dev eth0",
        false => "ip link set eth0 down",
    };
    sh(script).map(drop)
}

/// Makes an XFS on the scratch disk and mounts it in the test's directory; gives the mount point.
///
/// # Errors
/// There is no scratch disk, or a tool failed.
pub fn mount_xfs(env: &Env) -> Result<PathBuf> {
    let disk = env.scratch_disk()?.to_string_lossy().into_owned();
    let mount_point = env.directory.join("xfs");
    fs::create_dir_all(&mount_point)?;
    run("mkfs.xfs", &["-q", "-f", &disk])?;
    run("mount", &[disk.as_ref(), mount_point.as_os_str()])?;
    Ok(mount_point)
}

/// The lines of a pipe, which is read to its end whether or not anybody takes them.
fn lines_of(pipe: ChildStdout) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    lines
}

fn end(mut child: Child) -> Result<()> {
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::TERM).context("SIGTERM")?;
    let ended = wait_for("a daemon to end", END_DEADLINE, || Ok(child.try_wait()?));
    if ended.is_err() {
        kill_and_wait(child)?;
    }
    ended.map(drop)
}

fn kill_and_wait(mut child: Child) -> Result<()> {
    child.kill()?;
    child.wait().map(drop).context("waiting for a killed daemon")
}
