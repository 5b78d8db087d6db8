//! A server whose control group allows less than the machine has, memory or threads: it plans with that, goes on, or says what to do.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests; this one needs less.
mod client;
mod unit_filter;
mod volserver;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;

use proto::v1;
use tonic::Code;
use uuid::Uuid;

use client::Client;
use volserver::{Volserver, attach_request, command, create_request, refused};

/// A control group below this process's own, with a limit; gone when the test is.
struct ControlGroup(PathBuf);

impl ControlGroup {
    /// With a limit of a controller, in the files that it has in version 1 and 2. `None`, with the reason printed, where none can be
    /// made: without root, or below a group that has processes (version 2).
    fn new(controller: &str, files: [&str; 2], limit: u64) -> Option<Self> {
        let membership = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = |controller: &str| {
            let lines = membership.lines().map(|line| line.splitn(3, ':').collect::<Vec<_>>());
            let mut own = lines.filter(|fields| fields[1] == controller);
            own.next().map(|fields| fields[2].trim_start_matches('/').to_owned())
        };
        let root = Path::new("/sys/fs/cgroup");
        let places =
            [(root.join(controller), own(controller), files[0]), (root.to_owned(), own(""), files[1])];
        for (mount, own, file) in places {
            let Some(own) = own else { continue };
            let group = Self(mount.join(own).join(format!("volnode-test-{}", Uuid::new_v4())));
            let made = std::fs::create_dir(&group.0)
                .and_then(|()| std::fs::write(group.0.join(file), limit.to_string()));
            match made {
                Ok(()) => return Some(group),
                Err(error) => println!("no control group at {}: {error}", group.0.display()),
            }
        }
        println!("SKIP no control group with a limit of {controller} can be made here");
        None
    }

    fn with_memory(limit_bytes: u64) -> Option<Self> {
        Self::new("memory", ["memory.limit_in_bytes", "memory.max"], limit_bytes)
    }

    fn with_tasks(limit: u64) -> Option<Self> {
        Self::new("pids", ["pids.max", "pids.max"], limit)
    }

    /// The server inside, with the default of `--memory-max`.
    fn command(&self, data_dir: &Path, connections_max: u32) -> Command {
        let inner = command(data_dir);
        let mut limited = Command::new("/bin/sh");
        limited.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.0.join("cgroup.procs"));
        limited.arg(inner.get_program());
        let arguments: Vec<_> = inner.get_args().collect();
        let memory_max = arguments.iter().position(|argument| *argument == "--memory-max").unwrap();
        limited.args(&arguments[..memory_max]).args(&arguments[memory_max + 2..]);
        limited.args(["--connections-max", &connections_max.to_string()]);
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => limited.env(name, value),
                None => limited.env_remove(name),
            };
        }
        limited
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        let deadline = std::time::Instant::now() + volserver::DEADLINE;
        // The kernel lets a group go some time after its last process.
        while self.0.exists() && std::fs::remove_dir(&self.0).is_err() && std::time::Instant::now() < deadline
        {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_group_bounds_what_is_planned_and_what_memory_volumes_may_have() {
    const LIMIT_BYTES: u64 = 512 << 20;
    let Some(group) = ControlGroup::with_memory(LIMIT_BYTES) else { return };
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start_unfiltered(group.command(&data_dir, 16), &dir.path().join("log"));
    let log = server.log_with("data side ready");
    assert!(log.contains("allowed_mib=512") && log.contains(group.0.to_str().unwrap()), "{log}");
    let planned = log.split("memory_mib_max=").nth(1).unwrap();
    let planned_mib: u64 = planned.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
    assert!((1..=256).contains(&planned_mib), "{log}");

    let mut api = server.client().await;
    let memory = |name: &str, mib: u64| v1::CreateVolumeRequest {
        backend: v1::Backend::Memory.into(),
        capacity_bytes: mib << 20,
        ..create_request(name)
    };
    let status = api.create_volume(memory("too-large", 513)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("512 MiB, by /sys/fs/cgroup"), "{status:?}");
    api.create_volume(memory("vol", 128)).await.unwrap();
}

#[test]
fn a_control_group_that_leaves_little_is_warned_of_and_the_server_starts() {
    let Some(group) = ControlGroup::with_memory(256 << 20) else { return };
    let dir = tempfile::tempdir().unwrap();
    let log_file = dir.path().join("log");
    let server = Volserver::start_unfiltered(group.command(&dir.path().join("data"), 1024), &log_file);
    let log = server.log_with("is more than half of what there is");
    assert!(log.contains("allowed_mib=256") && log.contains(group.0.to_str().unwrap()), "{log}");
    assert!(log.contains("lower --connections-max"), "{log}");
    // A limit that was set is the user's word.
    let mut command = group.command(&dir.path().join("other"), 1024);
    command.args(["--memory-max", "128M"]);
    let (code, text) = refused(command);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("a memory limit of 128 MiB is too little"), "{text}");
}

/// What a server says first on stdout, or how it ended.
fn first_word(mut command: Command) -> Result<(Child, String), (ExitStatus, String)> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (sender, said) = mpsc::channel();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = stdout.read_line(&mut line);
        let _ = sender.send(line);
    });
    let line = said.recv_timeout(volserver::DEADLINE).unwrap_or_else(|_| {
        child.kill().unwrap();
        panic!("it neither says that it is ready nor ends")
    });
    if !line.is_empty() {
        return Ok((child, line));
    }
    let status = volserver::wait(&mut child, volserver::DEADLINE);
    Err((status, std::io::read_to_string(child.stderr.take().unwrap()).unwrap()))
}

#[test]
fn a_limit_of_threads_that_is_too_low_is_named_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut refusals = 0;
    // Every number that is too little, up to one that is not.
    for limit in 1..64 {
        let Some(group) = ControlGroup::with_tasks(limit) else { return };
        let mut command = group.command(&dir.path().join("data"), 16);
        command.args(["--memory-max", volserver::MEMORY_MAX]);
        match first_word(command) {
            Ok((mut child, line)) => {
                child.kill().unwrap();
                child.wait().unwrap();
                assert!(line.starts_with("volserver ready"), "{line}");
                assert!(refusals > 3, "the limit is not in force");
                return;
            }
            Err((status, text)) => {
                assert_eq!(status.code(), Some(1), "{limit} tasks: {status:?} {text}");
                // With one task not even the log has its thread.
                assert!(limit == 1 || text.contains("TasksMax="), "{limit} tasks: {text}");
                refusals += 1;
            }
        }
    }
    panic!("a server of one thread does not start with 63 tasks");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_another_thread_the_api_answers_and_opens_are_refused_until_there_is_one() {
    let Some(group) = ControlGroup::with_tasks(1000) else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut command = group.command(&dir.path().join("data"), 16);
    command.args(["--memory-max", volserver::MEMORY_MAX, "--export-by-name"]);
    let server = Volserver::start_unfiltered(command, &dir.path().join("log"));
    for name in ["vol", "vol-2"] {
        server.client().await.create_volume(create_request(name)).await.unwrap();
    }
    let file = |name: &str| group.0.join(name);
    let current = std::fs::read_to_string(file("pids.current")).unwrap();
    std::fs::write(file("pids.max"), current.trim()).unwrap();
    for _ in 0..3 {
        let request = v1::GetVolumeRequest { name: "vol".to_owned(), ..Default::default() };
        server.client().await.get_volume(request).await.unwrap();
    }
    assert!(Client::open(server.data[0], "vol").is_err());
    assert!(server.log_with("a volume cannot be opened").contains("TasksMax="));
    // Nothing is known of what was written, and another try may do.
    let mut api = server.client().await;
    let status = api.attach_volume(attach_request("vol-2", "node", false)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains("TasksMax="), "{status:?}");
    std::fs::write(file("pids.max"), "max").unwrap();
    api.attach_volume(attach_request("vol-2", "node", false)).await.unwrap();
    let mut client = Client::open(server.data[0], "vol").unwrap();
    client.write(0, &[7; 4096]).unwrap();
    client.flush().unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
}
