//! Who may call the management API, and that callers who say nothing keep nobody from it.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

mod unit_filter;
mod volserver;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use proto::v1;
use rustix::process::{Gid, Uid};
use volserver::{DEADLINE, Volserver, command, create_request, refused};

/// What a client of HTTP/2 sends first, with an empty SETTINGS frame.
const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// A group that nobody is in.
const GROUP_ID: u32 = 424_242;
const NOBODY: u32 = 65_534;

/// Nothing is said but where the data is, and where this process may make a socket.
fn by_default(dir: &Path) -> Command {
    let mut bare = Command::new(env!("CARGO_BIN_EXE_volserver"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("VOLSERVER_"))
    {
        bare.env_remove(name);
    }
    bare.env_remove("NOTIFY_SOCKET").env("RUNTIME_DIRECTORY", dir.join("run"));
    bare.arg("--data-dir").arg(dir.join("data"));
    bare.args(["--listen", "127.0.0.1:0", "--threads", "1", "--memory-max", volserver::MEMORY_MAX]);
    bare
}

/// A directory that every user may enter.
fn open_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    for path in [dir.path().to_owned(), dir.path().join("run")] {
        let _ = std::fs::create_dir(&path);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

/// Whether a user with these groups is answered; `None`: the kernel does not let it connect.
fn is_answered(path: &Path, user_id: u32, groups: &[u32]) -> Option<bool> {
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let groups: Vec<Gid> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
            rustix::thread::set_thread_groups(&groups).unwrap();
            rustix::thread::set_thread_gid(Gid::from_raw(NOBODY)).unwrap();
            rustix::thread::set_thread_uid(Uid::from_raw(user_id)).unwrap();
            let mut socket = match UnixStream::connect(path) {
                Ok(socket) => socket,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
                    return None;
                }
            };
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            // Fails where it was refused already.
            let _ = socket.write_all(HELLO);
            Some(matches!(socket.read(&mut [0; 9]), Ok(bytes) if bytes > 0))
        });
        asked.join().unwrap()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_default_it_is_a_socket_for_root_and_its_group() {
    let dir = open_dir();
    let mut command = by_default(dir.path());
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        command.args(["--management-group", &GROUP_ID.to_string()]);
    }
    let server = Volserver::start_with(command, &dir.path().join("log"));
    let path = server.management_socket.clone().expect("a socket");
    assert_eq!(path, dir.path().join("run/management.sock"));
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.mode() & 0o777, 0o660);
    server.client().await.create_volume(create_request("vol-1")).await.unwrap();
    if !is_root {
        return println!("SKIP who may connect: another user needs root");
    }
    assert_eq!(metadata.gid(), GROUP_ID);
    assert_eq!(is_answered(&path, NOBODY, &[]), None);
    assert_eq!(is_answered(&path, NOBODY, &[GROUP_ID]), Some(true));
    // Whatever became of the file's mode.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(is_answered(&path, NOBODY, &[]), Some(false));
    assert_eq!(is_answered(&path, NOBODY, &[GROUP_ID]), Some(true));
    assert_eq!(is_answered(&path, 0, &[]), Some(true));
    assert!(server.stop(rustix::process::Signal::TERM).success());
    assert!(!path.exists(), "gone with the server");
}

#[test]
fn a_port_for_every_user_of_the_machine_needs_the_word_for_it() {
    let dir = open_dir();
    let mut command = by_default(dir.path());
    command.args(["--management", "127.0.0.1:0"]);
    let (code, stderr) = refused(command);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("--insecure") && stderr.contains("every user of this machine"), "{stderr}");
    assert!(!dir.path().join("data").exists(), "nothing was made");
}

/// As far as the kernel tells it: what is in /proc of a process that writes no core is root's, whoever the process is.
#[test]
fn a_server_has_no_core_dumped_that_would_hold_secrets() {
    if !rustix::process::geteuid().is_root() {
        return println!("SKIP to start it as another user needs root");
    }
    let dir = open_dir();
    let program = dir.path().join("volserver");
    std::fs::copy(env!("CARGO_BIN_EXE_volserver"), &program).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    std::os::unix::fs::chown(dir.path().join("run"), Some(NOBODY), Some(NOBODY)).unwrap();
    let plain = by_default(dir.path());
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&program)
        .args(plain.get_args());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    // The rights that the filter of the unit takes away are needed to become somebody else.
    let server = Volserver::start_unfiltered(command, &dir.path().join("log"));
    let of_process = format!("/proc/{}", server.pid());
    let status = std::fs::read_to_string(format!("{of_process}/status")).unwrap();
    assert!(status.lines().any(|line| line.starts_with("Uid:") && line.contains("65534")), "{status}");
    assert_eq!(std::fs::metadata(format!("{of_process}/environ")).unwrap().uid(), 0);
}

#[test]
fn a_server_without_a_place_for_its_socket_says_so() {
    let dir = open_dir();
    let mut command = by_default(dir.path());
    command.args(["--management-group", "no-such-group"]);
    let (code, stderr) = refused(command);
    assert_eq!((code, stderr.contains("no-such-group")), (2, true), "{stderr}");
}

/// How many of them the server has not closed.
fn still_open(sockets: &mut [TcpStream]) -> usize {
    let is_open = |socket: &mut TcpStream| {
        socket.set_nonblocking(true).unwrap();
        loop {
            match socket.read(&mut [0; 256]) {
                Ok(0) => return false,
                // The server's part of a beginning.
                Ok(_) => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
    };
    sockets.iter_mut().filter_map(|socket| is_open(socket).then_some(())).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_say_nothing_or_stop_speaking_keep_nobody_out() {
    const SILENT: usize = 400;
    let dir = tempfile::tempdir().unwrap();
    let mut command = command(&dir.path().join("data"));
    // Descriptors for the API, and no more than a few for anything else.
    command.args(["--connections-max", "32"]);
    let server = Volserver::start_with(command, &dir.path().join("log"));
    server.client().await.create_volume(create_request("vol-1")).await.unwrap();
    let mut client = server.client().await;
    let mut silent = Vec::new();
    for number in 0..SILENT {
        let mut socket = TcpStream::connect(server.management).unwrap();
        // Nothing; a part of a beginning; a whole one; a request whose headers do not end.
        match number % 4 {
            0 => {}
            1 => socket.write_all(&HELLO[..12]).unwrap(),
            2 => socket.write_all(HELLO).unwrap(),
            _ => {
                socket.write_all(HELLO).unwrap();
                socket.write_all(b"\0\0\x01\x01\0\0\0\0\x01\x83").unwrap();
            }
        }
        silent.push(socket);
    }
    let began = Instant::now();
    let request = || v1::GetVolumeRequest { name: "vol-1".to_owned(), ..Default::default() };
    client.get_volume(request()).await.unwrap();
    server.client().await.get_volume(request()).await.unwrap();
    TcpStream::connect(server.data[0]).unwrap().read_exact(&mut [0; 8]).unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let open = still_open(&mut silent);
    assert!(open <= 128, "{open} of one address are let in");
    // Who never began goes soon; who stopped in between, when a ping is not answered.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let mut never_began: Vec<TcpStream> = Vec::new();
    for (number, socket) in silent.into_iter().enumerate() {
        if number % 4 < 2 {
            never_began.push(socket);
        }
    }
    assert_eq!(still_open(&mut never_began), 0);
    client.get_volume(request()).await.unwrap();
}
