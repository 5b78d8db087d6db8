//! Starting, refusing to start, and stopping the real volserver: what an administrator sees.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod unit_filter;
mod volserver;

use std::fs::File;
use std::io::{BufRead as _, Read as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use proto::v1;
use proto::v1::management_client::ManagementClient;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;
use tonic::transport::Endpoint;
use volserver::{Volserver, attach_request, command, create_request, refused};

/// Stopping takes no longer than this, whatever clients keep open: less than the ten seconds for which calls are waited for.
const STOP_LIMIT: Duration = Duration::from_secs(9);

/// Two options of `command` are given again, so start from the bare program.
fn bare(data_dir: &std::path::Path) -> Command {
    let mut bare = Command::new(env!("CARGO_BIN_EXE_volserver"));
    bare.env_clear().arg("--data-dir").arg(data_dir);
    // Not what the machine's own server has.
    bare.env("VOLSERVER_RUNTIME_DIR", data_dir.with_extension("run"));
    bare
}

/// What is on stderr beside the log: one line, which begins with the program's name.
fn complaint(stderr: &str) -> &str {
    let lines: Vec<&str> = stderr.lines().filter(|line| line.starts_with("volserver: ")).collect();
    let [line] = lines[..] else { panic!("not one line of complaint:\n{stderr}") };
    line
}

#[test]
fn an_address_beyond_loopback_is_refused_without_the_word_for_it() {
    let dir = tempfile::tempdir().unwrap();
    for option in [["--listen", "0.0.0.0:0"], ["--listen", "[::]:0"], ["--management", "0.0.0.0:0"]] {
        let mut command = bare(&dir.path().join("data"));
        command.args(option);
        let (code, stderr) = refused(command);
        assert_eq!(code, 2, "{stderr}");
        let line = complaint(&stderr);
        assert!(line.contains(option[1]) && line.contains("--insecure"), "{line}");
    }
    assert!(!dir.path().join("data").exists(), "nothing was made");
}

#[test]
fn with_the_word_for_it_the_log_warns_of_each_address() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = bare(&dir.path().join("data"));
    command.args(["--threads", "1", "--memory-max", volserver::MEMORY_MAX]);
    command.args(["--insecure", "--listen", "0.0.0.0:0", "--management", "0.0.0.0:0"]);
    let server = Volserver::start_with(command, &dir.path().join("log"));
    assert!(server.data[0].ip().is_unspecified() && server.management.ip().is_unspecified());
    // It is said last.
    let log = server.log_with("--advertise");
    let warnings = log.lines().filter(|line| line.contains("WARN") && line.contains("--insecure"));
    assert_eq!(warnings.count(), 2, "{log}");
}

/// What a caller is told it can connect to, whatever it has reached the API by.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_told_a_wildcard_and_it_takes_both_families() {
    let dir = tempfile::tempdir().unwrap();
    let has_ipv6 = TcpListener::bind("[::1]:0").is_ok();
    let wildcard = if has_ipv6 { "[::]:0" } else { "0.0.0.0:0" };
    let socket = format!("unix:{}", dir.path().join("m.sock").display());
    let mut command = bare(&dir.path().join("data"));
    command.args(["--threads", "1", "--memory-max", volserver::MEMORY_MAX]);
    command.args(["--insecure", "--listen", wildcard, "--management", wildcard, "--management", &socket]);
    let server = Volserver::start_with(command, &dir.path().join("log"));
    let (data_port, api_port) = (server.data[0].port(), server.management.port());
    let loopback = format!("127.0.0.1:{data_port}");
    let ipv6 = format!("[::1]:{data_port}");
    let over_ipv6 = has_ipv6.then(|| (format!("http://[::1]:{api_port}"), &ipv6));
    let reached = [(format!("http://127.0.0.1:{api_port}"), &loopback), (socket, &loopback)];
    for (uri, expected) in reached.into_iter().chain(over_ipv6) {
        let channel = Endpoint::from_shared(uri.clone()).unwrap().connect().await.unwrap();
        let mut client = ManagementClient::new(channel);
        let info = client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner();
        assert_eq!(info.data_addresses, std::slice::from_ref(expected), "{uri}");
        let name = format!("vol-{}", uri.len());
        client.create_volume(create_request(&name)).await.unwrap();
        let attached = client.attach_volume(attach_request(&name, "n", false)).await.unwrap().into_inner();
        assert_eq!(attached.data_addresses, std::slice::from_ref(expected), "{uri}");
        TcpStream::connect(expected).unwrap();
    }
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (option, other) in [("--listen", "--management"), ("--management", "--listen")] {
        let mut command = bare(&dir.path().join("data"));
        command.args(["--insecure", option, &address, other, "127.0.0.1:0"]);
        let (code, stderr) = refused(command);
        assert_eq!(code, 4, "{stderr}");
        let line = complaint(&stderr);
        assert!(line.contains(&address) && line.contains(option) && line.contains("in use"), "{line}");
    }
}

#[test]
fn a_data_directory_has_one_server() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let (code, stderr) = refused(command(&data_dir));
    assert_eq!(code, 3, "{stderr}");
    assert!(complaint(&stderr).contains(&format!("pid {}", server.pid())), "{stderr}");
    server.kill();
    Volserver::start(&data_dir);
}

#[test]
fn a_data_directory_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (code, stderr) = refused(command(&file));
    assert_eq!(code, 3, "{stderr}");
    let line = complaint(&stderr);
    assert!(line.contains(file.to_str().unwrap()) && line.contains("--data-dir"), "{line}");
}

#[test]
fn a_catalog_of_a_newer_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    assert!(Volserver::start(&data_dir).stop(Signal::TERM).success());
    let db = rusqlite::Connection::open(data_dir.join("catalog.sqlite")).unwrap();
    db.execute_batch("PRAGMA user_version = 9; UPDATE server SET oldest_reader = 9;").unwrap();
    drop(db);
    let (code, stderr) = refused(command(&data_dir));
    assert_eq!(code, 3, "{stderr}");
    assert!(complaint(&stderr).contains("upgrade volserver"), "{stderr}");
}

#[test]
fn bad_options_are_refused_and_help_lists_the_exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    for option in
        [["--threads", "0"], ["--listen", "localhost"], ["--cache", "maybe"], ["--advertise", "here"]]
    {
        let mut command = bare(&dir.path().join("data"));
        command.args(option);
        let (code, stderr) = refused(command);
        assert_eq!((code, stderr.contains(option[0])), (2, true), "{stderr}");
    }
    let mut command = bare(&dir.path().join("data"));
    command.args(["--log", "no=such=level"]);
    assert_ne!(refused(command).0, 0);
    let help = Command::new(env!("CARGO_BIN_EXE_volserver")).arg("--help").output().unwrap();
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(help.status.success() && text.contains("Exit codes:"), "{text}");
    assert!(!text.contains("--fault"), "not for users: {text}");
}

#[tokio::test]
async fn options_may_come_from_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_volserver"));
    // A machine may have no IPv6, even on loopback.
    let has_ipv6 =
        TcpListener::bind("[::1]:0").inspect_err(|error| println!("without IPv6: {error}")).is_ok();
    let other = if has_ipv6 { "[::1]:0" } else { "127.0.0.2:0" };
    command.env_clear().envs([
        ("VOLSERVER_DATA_DIR", dir.path().join("data").to_str().unwrap()),
        ("VOLSERVER_LISTEN", &format!("127.0.0.1:0,{other}")),
        ("VOLSERVER_MANAGEMENT", other),
        ("VOLSERVER_INSECURE", "yes"),
        ("VOLSERVER_RUNTIME_DIR", dir.path().join("run").to_str().unwrap()),
        ("VOLSERVER_MEMORY_MAX", volserver::MEMORY_MAX),
        ("VOLSERVER_THREADS", "1"),
        ("VOLSERVER_CACHE", "writeback"),
        ("VOLSERVER_EXPORT_BY_NAME", "yes"),
        ("VOLSERVER_ADVERTISE", "storage-1.example:10809,192.0.2.1:10809"),
        ("VOLSERVER_LOG", "warn"),
    ]);
    let server = Volserver::start_with(command, &dir.path().join("log"));
    assert!(server.data.iter().all(|address| address.port() != 0));
    let expected = ["127.0.0.1:0", other].map(|address| address.parse::<SocketAddr>().unwrap().ip());
    assert_eq!(server.data.iter().map(SocketAddr::ip).collect::<Vec<_>>(), expected);
    assert_eq!(server.management.ip(), expected[1]);
    let info = server.client().await.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.data_addresses, ["storage-1.example:10809", "192.0.2.1:10809"]);
    assert!(!server.log().contains("INFO"), "{}", server.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_stops_it_in_order_and_soon_whatever_clients_keep_open() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    for signal in [Signal::TERM, Signal::INT] {
        let dir = tempfile::tempdir().unwrap();
        let server = Volserver::start(&dir.path().join("data"));
        let mut client = server.client().await;
        client.create_volume(create_request("vol-1")).await.unwrap();
        // A stream that ends only with its connection, and a peer that never says anything.
        let mut health = HealthClient::new(server.channel().await);
        let _watch = health.watch(HealthCheckRequest::default()).await.unwrap();
        let _silent_api = std::net::TcpStream::connect(server.management).unwrap();
        let _silent_data = std::net::TcpStream::connect(server.data[0]).unwrap();
        let began = Instant::now();
        let status = tokio::task::spawn_blocking(move || server.stop(signal)).await.unwrap();
        assert_eq!(status.code(), Some(0), "{signal:?}");
        assert!(began.elapsed() < STOP_LIMIT, "{signal:?} took {:?}", began.elapsed());
    }
}

#[test]
fn the_service_manager_is_told_when_it_is_ready_and_when_it_stops() {
    // Not below TMPDIR, which may be too long for a socket's name.
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(volserver::DEADLINE)).unwrap();
    let mut command = command(&dir.path().join("data"));
    command.env("NOTIFY_SOCKET", &path);
    let server = Volserver::start_with(command, &dir.path().join("log"));
    let receive = || {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
    };
    assert_eq!(receive(), "READY=1");
    assert!(server.stop(Signal::TERM).success());
    assert_eq!(receive(), "STOPPING=1");
}

/// A pipe with no room; its other end has to be kept.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setfl(&writer, OFlags::WRONLY | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]) != Err(Errno::AGAIN) {}
    fcntl_setfl(&writer, OFlags::WRONLY).unwrap();
    (reader, writer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_log_nobody_takes_serves_and_stops_like_any_other() {
    let (_reader, full_pipe) = full_pipe();
    let (_, broken_pipe) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let full_disk = File::options().write(true).open("/dev/full").unwrap();
    for (what, stderr) in [("full pipe", full_pipe), ("broken pipe", broken_pipe), ("full", full_disk.into())]
    {
        let dir = tempfile::tempdir().unwrap();
        let mut command = command(&dir.path().join("data"));
        command.args(["--log", "debug"]);
        let server = Volserver::start_logging_to(stderr, command, &dir.path().join("none"));
        let mut client = server.client().await;
        for number in 0..100 {
            let mut stream = TcpStream::connect(server.data[0]).unwrap();
            stream.set_read_timeout(Some(volserver::DEADLINE)).unwrap();
            let greeted = stream.read_exact(&mut [0; 18]);
            assert!(greeted.is_ok(), "{what}: connection {number} is not greeted: {greeted:?}");
        }
        client.create_volume(create_request("vol-1")).await.unwrap();
        let began = Instant::now();
        let status = tokio::task::spawn_blocking(move || server.stop(Signal::TERM)).await.unwrap();
        assert_eq!(status.code(), Some(0), "{what}");
        assert!(began.elapsed() < STOP_LIMIT, "{what}: it took {:?}", began.elapsed());
    }
}

#[test]
fn a_server_that_cannot_start_ends_though_nobody_takes_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (_reader, full_pipe) = full_pipe();
    let mut command = bare(&dir.path().join("data"));
    command.args(["--listen", "0.0.0.0:0"]).stderr(full_pipe);
    let mut child = command.spawn().unwrap();
    assert_eq!(volserver::wait(&mut child, volserver::DEADLINE).code(), Some(2));
}

#[test]
fn a_system_call_that_the_unit_does_not_list_is_an_error_and_not_the_end() {
    assert_eq!(unit_filter::words_of_unit("SystemCallErrorNumber"), ["EPERM"]);
}

/// Not all kernels count rings as locked memory.
#[test]
fn a_limit_of_locked_memory_that_is_too_low_is_named_with_what_is_needed() {
    if !rustix::process::geteuid().is_root() {
        return println!("SKIP whether this user may lock more than its limit is not known");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut limited = Command::new("setpriv");
    limited.args(["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", "--memlock=65536:65536"]);
    let plain = command(&dir.path().join("data"));
    limited.arg(plain.get_program()).args(plain.get_args()).args(["--log", "info"]);
    // What the command took away is not to come back.
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    limited.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let mut child = limited.spawn().unwrap();
    let log = std::io::BufReader::new(child.stderr.take().unwrap());
    let (lines, said_lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        log.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)).ok();
    });
    let (mut said, deadline) = (String::new(), Instant::now() + volserver::DEADLINE);
    while let Ok(line) = said_lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        said.push_str(&format!("{line}\n"));
        if line.contains("data side ready") {
            child.kill().unwrap();
            child.wait().unwrap();
            return println!("SKIP this kernel does not count rings as locked memory");
        }
    }
    assert_eq!(volserver::wait(&mut child, volserver::DEADLINE).code(), Some(1), "{said}");
    let line = complaint(&said);
    assert!(line.contains("may lock 64 KiB") && line.contains("LimitMEMLOCK="), "{line}");
}
