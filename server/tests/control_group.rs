//! A server whose control group allows less memory than the machine has: it plans with that, or says what to do.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

mod unit_filter;
mod volserver;

use std::path::{Path, PathBuf};
use std::process::Command;

use proto::v1;
use tonic::Code;
use uuid::Uuid;

use volserver::{Volserver, command, create_request, refused};

/// A control group below this process's own, with a limit of memory; gone when the test is.
struct ControlGroup(PathBuf);

impl ControlGroup {
    /// `None`, with the reason printed, where none can be made: without root, or below a group that has processes (version 2).
    fn new(limit_bytes: u64) -> Option<Self> {
        let membership = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = |controller: &str| {
            let fields = membership.lines().map(|line| line.splitn(3, ':').collect::<Vec<_>>());
            fields
                .filter(|fields| fields[1] == controller)
                .map(|fields| fields[2].trim_start_matches('/').to_owned())
                .next()
        };
        let places = [
            (Path::new("/sys/fs/cgroup/memory"), own("memory"), "memory.limit_in_bytes"),
            (Path::new("/sys/fs/cgroup"), own(""), "memory.max"),
        ];
        for (mount, own, file) in places {
            let Some(own) = own else { continue };
            let group = Self(mount.join(own).join(format!("volnode-test-{}", Uuid::new_v4())));
            let made = std::fs::create_dir(&group.0)
                .and_then(|()| std::fs::write(group.0.join(file), limit_bytes.to_string()));
            match made {
                Ok(()) => return Some(group),
                Err(error) => println!("no control group at {}: {error}", group.0.display()),
            }
        }
        println!("SKIP no control group with a limit of memory can be made here");
        None
    }

    /// The server inside, with the default of `--memory-max` and few connections.
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
    let Some(group) = ControlGroup::new(LIMIT_BYTES) else { return };
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
fn a_control_group_that_leaves_too_little_is_named_at_start() {
    let Some(group) = ControlGroup::new(256 << 20) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (code, text) = refused(group.command(&dir.path().join("data"), 1024));
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("a memory limit of 128 MiB is too little"), "{text}");
    assert!(
        text.contains("half of what there is: 256 MiB") && text.contains(group.0.to_str().unwrap()),
        "{text}"
    );
}
