//! What is rendered, started as a container has it but for the container: the arguments as they are, with paths and addresses of this test;
//! the user, the rights and the system calls that the manifest leaves it.
//!
//! Owns the processes. A cluster is not in it: that kubelet mounts what the manifest says is not tested here.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use proto::csi::registration::InfoRequest;
use proto::csi::registration::registration_client::RegistrationClient;
use proto::csi::v1 as csi;
use proto::csi::v1::controller_client::ControllerClient;
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::csi::v1::volume_capability::{AccessMode, AccessType, MountVolume};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};
use serde_json::Value;
use tls::test_authority::Authority;
use tonic::transport::{Channel, Endpoint};

use super::{Container, are_there, committed, list, of_kind, probes, root, text};
use crate::programs;

/// What a container may lock where its runtime's service says nothing of it, in bytes: systemd's default.
const LOCKED_BYTES: &str = "8388608";
/// Of what starts or answers on a machine that others use.
const DEADLINE: Duration = Duration::from_secs(60);
/// What the server's pod may call.
const PROFILE: &str = "deploy/kubernetes/seccomp/volserver.json";
/// Names and numbers of this machine's system calls.
const NUMBERS: &str = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h";

/// A container without one: its root is a directory.
struct Root {
    directory: tempfile::TempDir,
}

impl Root {
    /// With a directory at each of the container's mounts.
    fn of(container: &Container<'_>) -> Self {
        // Short enough for a socket's path.
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        for path in container.mounts().keys() {
            fs::create_dir_all(directory.path().join(path.trim_start_matches('/'))).unwrap();
        }
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        Self { directory }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path.trim_start_matches('/'))
    }

    /// An argument of the manifest, with its paths below this root. What is replaced altogether is told.
    fn argument(&self, argument: &str, replaced: &[(&str, &str)]) -> OsString {
        let Some((name, value)) = argument.split_once('=') else { return argument.into() };
        if let Some((_, value)) = replaced.iter().find(|(replaced, _)| *replaced == name) {
            return format!("{name}={value}").into();
        }
        let (scheme, path) = match value.strip_prefix("unix://") {
            Some(path) => ("unix://", path),
            None => ("", value),
        };
        match path.starts_with('/') {
            true => format!("{name}={scheme}{}", self.path(path).display()).into(),
            false => argument.into(),
        }
    }

    /// Files of TLS as a Secret has them, for the pod's group.
    fn put_tls(&self, authority: &Authority, uris: &[&str], group: u32) {
        let folder = tempfile::tempdir().unwrap();
        let issued = authority.issue(folder.path(), uris);
        let pair = issued.pair();
        let files = [("ca.crt", issued.authority()), ("tls.crt", pair.certificate), ("tls.key", pair.key)];
        for (name, from) in files {
            let path = self.path("/tls").join(name);
            fs::copy(from, &path).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o440)).unwrap();
            if is_root() {
                chown(&path, Some(0), Some(group)).unwrap();
            }
        }
        fs::set_permissions(self.path("/tls"), Permissions::from_mode(0o755)).unwrap();
    }

    /// A program of ours where its user can reach it.
    fn program(&self, name: &str) -> PathBuf {
        let copied = self.path(name);
        fs::copy(programs::directory().join(name), &copied).unwrap();
        fs::set_permissions(&copied, Permissions::from_mode(0o755)).unwrap();
        copied
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A process that has said that it is ready. Killed when dropped.
struct Running {
    child: Child,
    ready: String,
    log: PathBuf,
}

impl Running {
    fn start(command: &mut Command, log: &Path) -> Self {
        let stderr = File::create(log).unwrap();
        let mut child = command.env_clear().stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let running = Self { child, ready, log: log.to_owned() };
        assert!(running.ready.contains(" ready: "), "{command:?}: {}", running.said());
        running
    }

    fn said(&self) -> String {
        format!("{}{}", self.ready, fs::read_to_string(&self.log).unwrap())
    }

    /// The first line of an answer to `GET path`, once it is this one.
    fn answers(&self, path: &str, expected: &str) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let answer = self.get(path);
            if answer == format!("HTTP/1.1 {expected}") {
                return;
            }
            assert!(Instant::now() < deadline, "{path}: {answer}; {}", self.said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn get(&self, path: &str) -> String {
        let said = self.said();
        // It says at which port.
        let Some(port) = said.split("127.0.0.1:").nth(1) else { return "no port".to_owned() };
        let port: String = port.chars().take_while(char::is_ascii_digit).collect();
        let mut socket = TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer.lines().next().unwrap_or_default().to_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

async fn channel(socket: &Path) -> Channel {
    let uri = format!("unix://{}", socket.display());
    Endpoint::from_shared(uri).unwrap().timeout(DEADLINE).connect().await.unwrap()
}

/// A command that runs the program as the manifest's container has it: its user, and no more rights.
fn command(container: &Container<'_>, program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let own = &container.container["securityContext"];
    let (user, group) =
        (&container.pod["securityContext"]["runAsUser"], &container.pod["securityContext"]["runAsGroup"]);
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user.to_string(), "--regid", &group.to_string(), "--clear-groups"]);
    assert_eq!(list(&own["capabilities"]["drop"]), ["ALL"]);
    let added = list(&own["capabilities"]["add"]).iter();
    let added: String = added.map(|name| format!(",+{}", text(name).to_lowercase())).collect();
    command.args(["--inh-caps=-all", &format!("--bounding-set=-all{added}")]);
    assert_eq!(own["allowPrivilegeEscalation"], false);
    command.args(["--no-new-privs", "--"]).arg(program);
    command
}

/// The filters of a profile, in the order in which they are put on.
fn filters(profile: &Value) -> Vec<BpfProgram> {
    let header = fs::read_to_string(NUMBERS).unwrap();
    let number = |name: &Value| -> Option<i64> {
        let start = format!("#define __NR_{} ", text(name));
        header.lines().find_map(|line| line.strip_prefix(&start)?.trim().parse().ok())
    };
    let errno = |action: &Value, errno: &Value| match text(action) {
        "SCMP_ACT_ALLOW" => SeccompAction::Allow,
        "SCMP_ACT_ERRNO" => SeccompAction::Errno(errno.as_u64().unwrap() as u32),
        other => panic!("{other}"),
    };
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let mut allowed = std::collections::BTreeMap::new();
    let mut refused = std::collections::BTreeMap::new();
    let mut refusal = SeccompAction::Allow;
    for rule in list(&profile["syscalls"]) {
        let conditions: Vec<SeccompCondition> = list(&rule["args"]).iter().map(condition).collect();
        let rules = match conditions.is_empty() {
            true => Vec::new(),
            false => vec![SeccompRule::new(conditions).unwrap()],
        };
        let action = errno(&rule["action"], &rule["errnoRet"]);
        let calls = list(&rule["names"]).iter().filter_map(number);
        match action {
            SeccompAction::Allow => allowed.extend(calls.map(|call| (call, rules.clone()))),
            other => {
                refusal = other;
                refused.extend(calls.map(|call| (call, rules.clone())));
            }
        }
    }
    // What the other filter refuses in its own way.
    allowed.extend(refused.keys().map(|call| (*call, Vec::new())));
    // This test's own: the second filter, and setpriv's work before the program is there.
    for name in ["seccomp", "capset", "prctl"] {
        allowed.extend(number(&name.into()).map(|call| (call, Vec::new())));
    }
    let otherwise = errno(&profile["defaultAction"], &profile["defaultErrnoRet"]);
    let first = SeccompFilter::new(allowed, otherwise, SeccompAction::Allow, architecture).unwrap();
    let second = SeccompFilter::new(refused, SeccompAction::Allow, refusal, architecture).unwrap();
    let program = |filter: SeccompFilter| -> BpfProgram { filter.try_into().unwrap() };
    vec![program(first), program(second)]
}

fn condition(argument: &Value) -> SeccompCondition {
    assert_eq!(argument["op"], "SCMP_CMP_MASKED_EQ");
    let (index, mask) = (argument["index"].as_u64().unwrap() as u8, argument["value"].as_u64().unwrap());
    let value = argument["valueTwo"].as_u64().unwrap();
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value).unwrap()
}

/// Runs it on a thread of its own under the profile of the server's pod; what it starts is under it, too.
fn under_profile<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    let profile = fs::read_to_string(root().join(PROFILE)).unwrap();
    let filters = filters(&serde_json::from_str(&profile).unwrap());
    std::thread::scope(|scope| {
        let filtered = scope.spawn(|| {
            for filter in &filters {
                apply_filter(filter).unwrap();
            }
            act()
        });
        filtered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn document<'a>(documents: &'a [Value], kind: &str) -> &'a Value {
    let [found] = of_kind(documents, kind)[..] else { panic!("{kind}") };
    found
}

/// The first container of ours in the document of this kind.
fn container<'a>(documents: &'a [Value], kind: &str) -> Container<'a> {
    Container::ours(std::slice::from_ref(document(documents, kind)))[0]
}

fn manifest(file: &str) -> Vec<Value> {
    committed().into_iter().find(|(name, _)| name.ends_with(file)).unwrap().1
}

/// Asks for a volume of each StorageClass, and for each VolumeAttributesClass.
async fn make_volumes(controller: &mut ControllerClient<Channel>, documents: &[Value]) {
    let parameters = |class: &Value| {
        let parameters = class["parameters"].as_object().unwrap().iter();
        // The provisioner keeps to itself which Secrets there are.
        let own = parameters.filter(|(key, _)| !key.contains("-secret-name"));
        own.map(|(key, value)| (key.clone(), text(value).to_owned())).collect()
    };
    let mut volumes = Vec::new();
    for class in of_kind(documents, "StorageClass") {
        assert_eq!(class["provisioner"], "csi.volnode.io");
        let mount = MountVolume {
            fs_type: text(&class["parameters"]["csi.storage.k8s.io/fstype"]).to_owned(),
            ..Default::default()
        };
        let capability = csi::VolumeCapability {
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            access_type: Some(AccessType::Mount(mount)),
        };
        let request = csi::CreateVolumeRequest {
            name: format!("pvc-{}", text(&class["metadata"]["name"])),
            volume_capabilities: vec![capability],
            parameters: parameters(class),
            ..Default::default()
        };
        let made = controller.create_volume(request).await.unwrap().into_inner();
        let made = made.volume.unwrap();
        // Nobody is asked for a passphrase of what is not encrypted, and the other way round.
        let secret = &class["parameters"]["csi.storage.k8s.io/node-stage-secret-name"];
        assert_eq!(made.volume_context.contains_key("encrypted"), secret.is_string(), "{class}");
        volumes.push(made.volume_id);
    }
    for class in of_kind(documents, "VolumeAttributesClass") {
        assert_eq!(class["driverName"], "csi.volnode.io");
        let request = csi::ControllerModifyVolumeRequest {
            volume_id: volumes[0].clone(),
            mutable_parameters: parameters(class),
            ..Default::default()
        };
        controller.controller_modify_volume(request).await.unwrap();
    }
    assert!(volumes.len() >= 4);
}

/// The chart with a server of its own: both over TLS, by their Secrets, and what its classes ask for is to be had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_and_the_controller_start_as_they_are_rendered() {
    if !are_there(&["setpriv", "prlimit"]) {
        return;
    }
    if !Path::new(NUMBERS).exists() {
        let is_promised = std::env::var_os("VOLNODE_LAB_TOOLS").is_some_and(|value| value == "1");
        assert!(!is_promised, "cannot run: no {NUMBERS}");
        return println!("SKIP the names of system calls are known for x86-64 with linux-libc-dev only");
    }
    let (documents, authority) = (manifest("chart/inside.yaml"), Authority::new());
    let server = container(&documents, "StatefulSet");
    let advertised =
        format!("--advertise={}:10809", text(&document(&documents, "Service")["spec"]["clusterIP"]));
    assert!(server.arguments().contains(&advertised.as_str()));
    let root = Root::of(&server);
    root.put_tls(&authority, &[], 0);
    let mut volserver = command(&server, &root.program("volserver"));
    // A test listens on loopback.
    let replaced = [("--listen", "127.0.0.1:0"), ("--management", "127.0.0.1:0")];
    volserver.args(server.arguments().iter().map(|argument| root.argument(argument, &replaced)));
    let mut limited = Command::new("prlimit");
    limited
        .arg(format!("--memlock={LOCKED_BYTES}"))
        .arg("--")
        .arg(volserver.get_program())
        .args(volserver.get_args());
    let volserver = under_profile(|| Running::start(&mut limited, &root.path("log")));
    let (_, address) = volserver.ready.trim().rsplit_once(' ').unwrap();
    let uri = format!("https://{address}");

    let controller = container(&documents, "Deployment");
    let root = Root::of(&controller);
    let user = controller.pod["securityContext"]["runAsUser"].as_u64().unwrap() as u32;
    assert_eq!(controller.pod["securityContext"]["fsGroup"], user);
    root.put_tls(&authority, &["volnode:manage"], user);
    if is_root() {
        chown(root.path("/csi"), Some(user), Some(user)).unwrap();
    }
    let mut volcsi = command(&controller, &root.program("volcsi"));
    let replaced = [("--server", uri.as_str()), ("--healthz", "127.0.0.1:0")];
    volcsi.args(controller.arguments().iter().map(|argument| root.argument(argument, &replaced)));
    let volcsi = Running::start(&mut volcsi, &root.path("log"));
    for path in probes(&controller).values() {
        volcsi.answers(path, "200 OK");
    }
    // The sidecars' socket is the one that volcsi makes.
    let socket = controller.option("--endpoint").unwrap().strip_prefix("unix://").unwrap();
    for sidecar in Container::all(std::slice::from_ref(document(&documents, "Deployment"))) {
        let address = sidecar.option("--csi-address").unwrap_or(socket);
        assert_eq!(address, socket, "{}", sidecar.container["name"]);
        assert!(sidecar.mounts().contains_key(socket.rsplit_once('/').unwrap().0));
    }
    let mut client = ControllerClient::new(channel(&root.path(socket)).await);
    make_volumes(&mut client, &documents).await;
    // Without the server it lives, and is not ready.
    drop(volserver);
    volcsi.answers(probes(&controller)["readinessProbe"], "503 Service Unavailable");
    volcsi.answers(probes(&controller)["livenessProbe"], "200 OK");
}

#[tokio::test]
async fn the_node_starts_as_it_is_rendered_and_tells_kubelet_where_it_is() {
    for file in ["kubernetes/volnode.yaml", "chart/smallest.yaml"] {
        let (documents, authority) = (manifest(file), Authority::new());
        let node = container(&documents, "DaemonSet");
        let root = Root::of(&node);
        if node.option("--tls-ca").is_some() {
            root.put_tls(&authority, &["volnode:granted/node-1"], 0);
        }
        let host = node.option("--kubelet-endpoint").unwrap();
        let replaced = [("--healthz", "127.0.0.1:0"), ("--kubelet-endpoint", host)];
        let mut volcsi = Command::new(programs::directory().join("volcsi"));
        volcsi.args(node.arguments().iter().map(|argument| root.argument(argument, &replaced)));
        // Nobody but this test looks at what is mounted.
        volcsi.arg("--private-mounts");
        let volcsi = Running::start(&mut volcsi, &root.path("log"));
        volcsi.answers(probes(&node)["livenessProbe"], "200 OK");
        // No node daemon is here.
        volcsi.answers(probes(&node)["readinessProbe"], "503 Service Unavailable");
        let registration = root.path(node.option("--register").unwrap()).join("csi.volnode.io-reg.sock");
        let mut kubelet = RegistrationClient::new(channel(&registration).await);
        let info = kubelet.get_info(InfoRequest {}).await.unwrap().into_inner();
        assert_eq!((info.name.as_str(), info.endpoint.as_str()), ("csi.volnode.io", host));
        assert_eq!(document(&documents, "CSIDriver")["metadata"]["name"], info.name);
    }
}

#[test]
fn the_profile_lets_rings_through_and_no_way_out() {
    let profile = fs::read_to_string(root().join(PROFILE)).unwrap();
    let profile: Value = serde_json::from_str(&profile).unwrap();
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(profile["defaultErrnoRet"], 1);
    let allowed = |name: &str| {
        let rules = list(&profile["syscalls"]).iter();
        rules
            .filter(|rule| rule["action"] == "SCMP_ACT_ALLOW")
            .any(|rule| list(&rule["names"]).contains(&name.into()))
    };
    for name in ["io_uring_setup", "io_uring_enter", "io_uring_register", "mincore", "execve", "futex"] {
        assert!(allowed(name), "{name}");
    }
    for name in [
        "mount",
        "bpf",
        "ptrace",
        "setns",
        "unshare",
        "keyctl",
        "kexec_load",
        "init_module",
        "userfaultfd",
        "clone3",
    ] {
        assert!(!allowed(name), "{name}");
    }
}
