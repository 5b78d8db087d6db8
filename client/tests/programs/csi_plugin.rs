//! `volcsi` as a process, as kubelet and its sidecars meet it: who it is, registration, the health check, starting and ending.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use proto::csi::registration::registration_client::RegistrationClient;
use proto::csi::registration::{InfoRequest, PluginInfo, RegistrationStatus};
use proto::csi::v1;
use proto::csi::v1::controller_client::ControllerClient;
use proto::csi::v1::identity_client::IdentityClient;
use proto::csi::v1::node_client::NodeClient;
use rustix::process::{Pid, Signal, kill_process};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::fake_server::FakeServer;
use crate::launch::{NODE_ID, NodeDaemon, program, start_volcsi};

const SECRET: &str = "correct-horse-battery-staple";
const HOST_SOCKET: &str = "/var/lib/kubelet/plugins/csi.volnode.io/csi.sock";

/// A plugin in a directory of its own; killed when dropped.
struct Plugin {
    child: Child,
    dir: PathBuf,
}

impl Plugin {
    fn command(dir: &Path, node_socket: &Path) -> Command {
        let mut command = program(env!("CARGO_BIN_EXE_volcsi"));
        command.env_remove("CSI_ENDPOINT").env_remove("VOLCSI_LOG").arg("--socket").arg(node_socket);
        // The controller, over a real server: `tests/host/csi_controller`.
        command.arg("--node");
        command.arg("--endpoint").arg(format!("unix://{}", dir.join("csi.sock").display()));
        command.arg("--kubelet-dir").arg(dir).arg("--private-mounts");
        command.arg("--register").arg(dir).args(["--healthz", "127.0.0.1:0", "--log", "trace"]);
        command
    }

    fn start(dir: &Path, node_socket: &Path) -> Self {
        // One log for each.
        fs::remove_file(dir.join("log")).ok();
        let mut command = Self::command(dir, node_socket);
        let child = start_volcsi(&mut command, &dir.join("csi.sock"), &dir.join("log"));
        Self { child, dir: dir.to_owned() }
    }

    async fn channel(&self, name: &str) -> Channel {
        let uri = format!("unix://{}", self.dir.join(name).display());
        Endpoint::from_shared(uri).unwrap().connect().await.unwrap()
    }

    /// Whether GetInfo is answered as kubelet calls it: with the socket's path as `:authority`, each slash as `%2F`, which no
    /// client of ours can be made to send.
    fn answers_kubelet_itself(&self) -> bool {
        let mut connection = UnixStream::connect(self.dir.join("csi.volnode.io-reg.sock")).unwrap();
        connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let field = |name: &str, value: &str| {
            let strings =
                [name, value].map(|text| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat());
            [&[0][..], &strings.concat()].concat()
        };
        // `:method POST` and `:scheme http` are entries of HPACK's static table, and so are the names of `:authority` and `:path`.
        let authority = "%2Fvar%2Flib%2Fkubelet%2Fplugins_registry%2Fcsi.volnode.io-reg.sock";
        let path = "/pluginregistration.Registration/GetInfo";
        let literal = |name: u8, value: &str| {
            [&[0x40 | name, u8::try_from(value.len()).unwrap()], value.as_bytes()].concat()
        };
        let headers = [
            vec![0x83, 0x86],
            literal(1, authority),
            literal(4, path),
            field("content-type", "application/grpc"),
            field("te", "trailers"),
        ];
        let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
            let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
            [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
        };
        let request = [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
            frame(4, 0, 0, &[]),
            frame(1, 0x4, 1, &headers.concat()),
            frame(0, 0x1, 1, &[0; 5]),
        ];
        connection.write_all(&request.concat()).unwrap();
        let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(read @ 1..) = connection.read(&mut buffer) {
            answer.extend_from_slice(&buffer[..read]);
            if answer.windows(HOST_SOCKET.len()).any(|window| window == HOST_SOCKET.as_bytes()) {
                return true;
            }
            // RST_STREAM, as a frame of four bytes.
            if answer.windows(5).any(|window| window == [0, 0, 4, 3, 0]) {
                return false;
            }
        }
        false
    }

    /// The log, once it has this: it is written by a thread of its own, after the answer.
    fn log_with(&self, what: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let log = fs::read_to_string(self.dir.join("log")).unwrap();
            if log.contains(what) {
                return log;
            }
            assert!(Instant::now() < deadline, "no {what:?} in {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A connection to the health check.
    fn dial_healthz(&self) -> TcpStream {
        // Written after the address.
        let log = self.log_with("volcsi starts");
        let address = log.split("127.0.0.1:").nth(1).unwrap();
        let port: String = address.chars().take_while(char::is_ascii_digit).collect();
        TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap()
    }

    /// The first line of an answer over HTTP.
    fn health(&self, request: &str) -> String {
        let mut socket = self.dial_healthz();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        socket.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer.lines().next().unwrap().to_owned()
    }

    fn end(mut self, signal: Signal) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

async fn is_ready(plugin: &Plugin) -> Option<bool> {
    let mut identity = IdentityClient::new(plugin.channel("csi.sock").await);
    identity.probe(v1::ProbeRequest {}).await.unwrap().into_inner().ready
}

#[tokio::test]
async fn kubelet_finds_the_plugin_and_learns_who_the_node_is() {
    let (server, run_dir, dir) = (FakeServer::start(), NodeDaemon::run_dir(), NodeDaemon::run_dir());
    let daemon = NodeDaemon::start(run_dir.path(), &server.uri());
    let plugin = Plugin::start(dir.path(), &daemon.socket);

    let mut registration = RegistrationClient::new(plugin.channel("csi.volnode.io-reg.sock").await);
    let info = registration.get_info(InfoRequest {}).await.unwrap().into_inner();
    let expected = PluginInfo {
        r#type: "CSIPlugin".to_owned(),
        name: "csi.volnode.io".to_owned(),
        endpoint: HOST_SOCKET.to_owned(),
        supported_versions: vec!["1.0.0".to_owned()],
    };
    assert_eq!(info, expected);
    assert!(plugin.answers_kubelet_itself());
    let refused = RegistrationStatus { plugin_registered: false, error: "no such node".to_owned() };
    registration.notify_registration_status(refused).await.unwrap();
    plugin.log_with("no such node");
    // It stays, for kubelet's next try.
    let registered = RegistrationStatus { plugin_registered: true, error: String::new() };
    registration.notify_registration_status(registered).await.unwrap();
    plugin.log_with("kubelet has registered the plugin");

    let mut identity = IdentityClient::new(plugin.channel("csi.sock").await);
    let info = identity.get_plugin_info(v1::GetPluginInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (info.name.as_str(), info.vendor_version.as_str()),
        ("csi.volnode.io", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(is_ready(&plugin).await, Some(true));
    assert_eq!(plugin.health("GET /readyz"), "HTTP/1.1 200 OK");
    let mut node = NodeClient::new(plugin.channel("csi.sock").await);
    let info = node.node_get_info(v1::NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.node_id, NODE_ID);
    drop(daemon);
    assert_eq!(is_ready(&plugin).await, Some(false));
    let refused = node.node_get_info(v1::NodeGetInfoRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("start it: `volclient serve`"), "{refused}");
}

#[tokio::test]
async fn what_is_not_there_is_not_declared_and_no_secret_is_logged() {
    let dir = NodeDaemon::run_dir();
    let plugin = Plugin::start(dir.path(), &dir.path().join("nobody.sock"));
    let mut identity = IdentityClient::new(plugin.channel("csi.sock").await);
    let capabilities = identity.get_plugin_capabilities(v1::GetPluginCapabilitiesRequest {}).await.unwrap();
    assert_eq!(capabilities.into_inner().capabilities, []);
    let mut node = NodeClient::new(plugin.channel("csi.sock").await);
    let capabilities = node.node_get_capabilities(v1::NodeGetCapabilitiesRequest {}).await.unwrap();
    assert_eq!(capabilities.into_inner().capabilities.len(), 6);

    let volume_id = || "0a9c3186-7725-43ec-9e11-8be9a559724c".to_owned();
    let secrets = || [("passphrase".to_owned(), SECRET.to_owned())].into();
    let stage = v1::NodeStageVolumeRequest {
        volume_id: volume_id(),
        staging_target_path: dir.path().join("staging").display().to_string(),
        secrets: secrets(),
        ..Default::default()
    };
    let publish = v1::NodePublishVolumeRequest {
        volume_id: volume_id(),
        target_path: dir.path().join("target").display().to_string(),
        secrets: secrets(),
        ..Default::default()
    };
    let expand = v1::NodeExpandVolumeRequest {
        volume_id: volume_id(),
        volume_path: dir.path().join("target").display().to_string(),
        secrets: secrets(),
        ..Default::default()
    };
    let create = v1::CreateVolumeRequest { secrets: secrets(), ..Default::default() };
    let mut controller = ControllerClient::new(plugin.channel("csi.sock").await);
    for (refused, why) in [
        (node.node_stage_volume(stage).await.unwrap_err(), "volume_capability is missing"),
        (node.node_publish_volume(publish).await.unwrap_err(), "volume_capability is missing"),
        (node.node_expand_volume(expand).await.unwrap_err(), "the node daemon cannot be asked"),
    ] {
        assert!(refused.message().contains(why), "{refused}");
        assert!(!refused.message().contains(SECRET));
    }
    assert_eq!(controller.create_volume(create).await.unwrap_err().code(), Code::Unimplemented);
    // Logged last, and so after all that could have had the secret.
    let mut registration = RegistrationClient::new(plugin.channel("csi.volnode.io-reg.sock").await);
    let last = RegistrationStatus { plugin_registered: false, error: "the last".to_owned() };
    registration.notify_registration_status(last).await.unwrap();
    let log = plugin.log_with("the last");
    assert!(log.contains("GetPluginCapabilities") && !log.contains(SECRET), "{log}");
}

#[tokio::test]
async fn the_plugin_is_healthy_whether_or_not_the_node_daemon_is_there() {
    let dir = NodeDaemon::run_dir();
    let plugin = Plugin::start(dir.path(), &dir.path().join("nobody.sock"));
    assert_eq!(is_ready(&plugin).await, Some(false));
    assert_eq!(plugin.health("GET /healthz"), "HTTP/1.1 200 OK");
    assert_eq!(plugin.health("GET /readyz"), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(plugin.health("GET /"), "HTTP/1.1 404 Not Found");
    // Connections that say nothing are in nobody's way for long, however many.
    let _silent: Vec<TcpStream> = (0..20).map(|_| plugin.dial_healthz()).collect();
    assert_eq!(plugin.health("GET /healthz"), "HTTP/1.1 200 OK");
    // Kubelet would reach it no more, whatever connections there are.
    fs::remove_file(dir.path().join("csi.sock")).unwrap();
    assert_eq!(plugin.health("GET /healthz"), "HTTP/1.1 503 Service Unavailable");
}

// Two threads: one of them closes the client's connections while the other waits for the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_may_be_killed_and_ended_at_any_time() {
    let dir = NodeDaemon::run_dir();
    let nobody = dir.path().join("nobody.sock");
    let first = Plugin::start(dir.path(), &nobody);
    let second = Plugin::command(dir.path(), &nobody).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("another process listens at") && said.contains("csi.sock"), "{said}");
    first.end(Signal::KILL);
    let third = Plugin::start(dir.path(), &nobody);
    assert_eq!(is_ready(&third).await, Some(false));
    assert_eq!(third.end(Signal::TERM).code(), Some(0));
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["log"]);
}

#[test]
fn an_option_that_cannot_be_is_told_with_its_name() {
    for (arguments, what) in [
        (
            &["--endpoint", "tcp://127.0.0.1:1"][..],
            "--endpoint: \"tcp://127.0.0.1:1\" is not of the form unix:///path",
        ),
        (
            &["--kubelet-dir", "/", "--private-mounts", "--endpoint", "unix:///no/such/dir/csi.sock"],
            "/no/such/dir",
        ),
        (&["--kubelet-dir", "/no/such/dir"], "--kubelet-dir: \"/no/such/dir\""),
        (&["--healthz", "9808"], "--healthz"),
        (&["--kubelet-endpoint", "/x"], "--register"),
        (
            &["--controller", "--server", "storage-1:10810"],
            "--server: \"storage-1:10810\" is not of the form",
        ),
        (&["--server", "https://storage-1"], "--server: https://storage-1 needs the certificate"),
        (&["--tls-cert", "/x"], "--tls-key"),
    ] {
        let mut command = program(env!("CARGO_BIN_EXE_volcsi"));
        let output = command.env_remove("CSI_ENDPOINT").args(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(what), "{arguments:?}: {said}");
    }
}
