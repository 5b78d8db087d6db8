//! The control plane, on this machine's loopback: etcd, the API server, its controllers, the scheduler and the snapshot controller.
//!
//! Owns its processes, which end with the value, and who may call it (`tokens.csv`). Ports are the kernel's choice. The API server
//! has a hosts file of its own, in which the nodes are this machine: kubelets are reached through QEMU.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::kubectl::Kubectl;
use super::names::NODES;
use super::tools::Tools;
use crate::lab::machine::vm::HOST_FROM_GUEST;
use crate::lab::tool::{self, Running};

/// Making a key.
const KEY_DEADLINE: Duration = Duration::from_secs(60);

/// From etcd's start to an API server that is ready; eight seconds are usual.
const READY_DEADLINE: Duration = Duration::from_secs(180);

/// The first of the services' addresses, which is the API server's.
const SERVICES: &str = "10.96.0.0/24";
const API_SERVICE: &str = "10.96.0.1";

/// The running control plane.
pub(super) struct ControlPlane {
    directory: PathBuf,
    tools: PathBuf,
    etcd_port: u16,
    etcd_peer_port: u16,
    /// Where the API server listens.
    pub(super) api_port: u16,
    api_server: Option<Running>,
    others: Vec<Running>,
}

impl ControlPlane {
    /// Starts it with all its files in `directory`, and waits until the API server is ready. The administrator's kubeconfig is
    /// `admin.kubeconfig`, a node's `NODE.kubeconfig`.
    ///
    /// # Errors
    /// A program cannot be run, or does not get ready.
    pub(super) fn start(tools: &Tools, directory: &Path) -> Result<Self> {
        let [api_port, etcd_port, etcd_peer_port] = free_ports()?;
        let mut plane = Self {
            directory: directory.to_owned(),
            tools: tools.directory.clone(),
            etcd_port,
            etcd_peer_port,
            api_port,
            api_server: None,
            others: Vec::new(),
        };
        plane.write_files()?;
        let etcd = plane.start_etcd()?;
        plane.others.push(etcd);
        plane.start_api_server()?;
        plane.wait_until_ready()?;
        for (program, options) in [
            (
                "kube-controller-manager",
                &["--secure-port=0", "--leader-elect=false", "--use-service-account-credentials"][..],
            ),
            ("kube-scheduler", &["--secure-port=0", "--leader-elect=false"]),
        ] {
            let mut command = plane.command(program);
            command.arg(format!("--kubeconfig={}", plane.file("admin.kubeconfig"))).args(options);
            if program == "kube-controller-manager" {
                command.arg(format!("--service-account-private-key-file={}", plane.file("accounts.key")));
                command.arg(format!("--root-ca-file={}", plane.file("api.crt")));
            }
            let running = plane.spawn(program, command)?;
            plane.others.push(running);
        }
        Ok(plane)
    }

    /// Starts the snapshot controller, once its definitions are there.
    ///
    /// # Errors
    /// It cannot be run.
    pub(super) fn start_snapshot_controller(&mut self) -> Result<()> {
        let mut command = self.command("snapshot-controller");
        command.arg(format!("--kubeconfig={}", self.file("admin.kubeconfig"))).arg("--leader-election=false");
        let running = self.spawn("snapshot-controller", command)?;
        self.others.push(running);
        Ok(())
    }

    /// Kills the API server.
    pub(super) fn kill_api_server(&mut self) {
        drop(self.api_server.take());
    }

    /// Starts the API server.
    ///
    /// # Errors
    /// It cannot be run.
    pub(super) fn start_api_server(&mut self) -> Result<()> {
        // A hosts file of its own, in a mount namespace of its own.
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]);
        command.arg(self.directory.join("hosts")).arg(self.tools.join("kube-apiserver"));
        command.args([
            "--bind-address=127.0.0.1",
            &format!("--secure-port={}", self.api_port),
            &format!("--advertise-address={HOST_FROM_GUEST}"),
            &format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            &format!("--tls-cert-file={}", self.file("api.crt")),
            &format!("--tls-private-key-file={}", self.file("api.key")),
            &format!("--token-auth-file={}", self.file("tokens.csv")),
            "--service-account-issuer=https://kubernetes.default.svc",
            &format!("--service-account-key-file={}", self.file("accounts.pub")),
            &format!("--service-account-signing-key-file={}", self.file("accounts.key")),
            &format!("--service-cluster-ip-range={SERVICES}"),
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            "--kubelet-preferred-address-types=Hostname",
        ]);
        self.api_server = Some(self.spawn("kube-apiserver", command)?);
        Ok(())
    }

    /// Waits until the API server answers.
    ///
    /// # Errors
    /// It does not in time.
    pub(super) fn wait_until_ready(&self) -> Result<()> {
        let kubectl = self.kubectl();
        kubectl.wait("the API server to be ready", READY_DEADLINE, |kubectl| {
            Ok(kubectl.run(&["get", "--raw", "/readyz"]).is_ok_and(|said| said.trim() == "ok").then_some(()))
        })
    }

    /// The administrator's.
    pub(super) fn kubectl(&self) -> Kubectl {
        Kubectl::new(self.tools.join("kubectl"), self.directory.join("admin.kubeconfig"))
    }

    fn start_etcd(&self) -> Result<Running> {
        let mut etcd = self.command("etcd");
        let [client, peer] =
            [self.etcd_port, self.etcd_peer_port].map(|port| format!("http://127.0.0.1:{port}"));
        etcd.args(["--data-dir", &self.file("etcd"), "--unsafe-no-fsync"]);
        etcd.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        etcd.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        etcd.args(["--initial-cluster", &format!("default={peer}")]);
        self.spawn("etcd", etcd)
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    fn command(&self, program: &str) -> Command {
        Command::new(self.tools.join(program))
    }

    /// Starts a program that ends with us, its output in `logs/`.
    fn spawn(&self, name: &str, command: Command) -> Result<Running> {
        spawn(&self.directory, name, &command)
    }

    /// Keys, tokens, kubeconfigs and the hosts file.
    fn write_files(&self) -> Result<()> {
        let [key, certificate] = ["api.key", "api.crt"].map(|name| self.file(name));
        let names = format!(
            "subjectAltName=IP:127.0.0.1,IP:{HOST_FROM_GUEST},IP:{API_SERVICE},DNS:kubernetes.default.svc"
        );
        let mut openssl = tool::command("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
        openssl.args(["-days", "30", "-subj", "/CN=kubernetes", "-addext", &names]);
        openssl.args(["-keyout", &key, "-out", &certificate]);
        tool::output(&mut openssl, KEY_DEADLINE)?;
        let [accounts, public] = ["accounts.key", "accounts.pub"].map(|name| self.file(name));
        tool::output(tool::command("openssl").args(["genrsa", "-out", &accounts, "2048"]), KEY_DEADLINE)?;
        let mut openssl = tool::command("openssl");
        tool::output(openssl.args(["rsa", "-in", &accounts, "-pubout", "-out", &public]), KEY_DEADLINE)?;
        let token = |user: &str| format!("token-of-{user}-{:016x}", fastrand::u64(..));
        let admin = token("admin");
        let mut tokens = format!("{admin},admin,admin,system:masters\n");
        self.write_kubeconfig("admin", "127.0.0.1", &admin)?;
        let mut hosts = "127.0.0.1 localhost\n".to_owned();
        for node in NODES {
            let token = token(node);
            tokens.push_str(&format!("{token},system:node:{node},{node},system:nodes\n"));
            hosts.push_str(&format!("127.0.0.1 {node}\n"));
            self.write_kubeconfig(node, HOST_FROM_GUEST, &token)?;
        }
        fs::write(self.file("tokens.csv"), tokens)?;
        fs::write(self.file("hosts"), hosts)?;
        Ok(())
    }

    fn write_kubeconfig(&self, user: &str, host: &str, token: &str) -> Result<()> {
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {
                "server": format!("https://{host}:{}", self.api_port),
                "certificate-authority": self.file("api.crt"),
            }}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
            "current-context": "lab",
        });
        fs::write(self.file(&format!("{user}.kubeconfig")), config.to_string()).context("a kubeconfig")
    }
}

/// Starts a program that ends with us, its output in `logs/` of the directory.
///
/// # Errors
/// It cannot be run.
pub(super) fn spawn(directory: &Path, name: &str, command: &Command) -> Result<Running> {
    let log = directory.join("logs").join(format!("{name}.log"));
    let log =
        File::options().create(true).append(true).open(&log).with_context(|| log.display().to_string())?;
    let mut bound = tool::command("setpriv");
    bound.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    bound.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(Running(bound.spawn().with_context(|| format!("running {name}"))?))
}

/// Ports of loopback that nobody has.
///
/// # Errors
/// There are none.
pub(super) fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut ports = [0; N];
    // All at once, so that none is given twice.
    let listeners: Vec<TcpListener> =
        (0..N).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect::<Result<_, _>>()?;
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}
