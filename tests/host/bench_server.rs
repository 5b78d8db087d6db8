//! That `cargo lab bench-server` works: every server starts, stores what it is given, and is measured under every kind of load.

use std::process::{Command, Stdio};
use std::time::Duration;

use testlab::harness::{LAB_VARIABLE, REPORT_TIME_VARIABLE};
use testlab::shell::wait_for;

/// Some seconds where nobody else uses the machine, and the build of the product where it was not built.
const DEADLINE: Duration = Duration::from_secs(15 * 60);

/// What the measurement runs and the lab would install.
const PEERS: [&str; 6] = ["nbdkit", "qemu-nbd", "nbd-server", "nbdcopy", "fio", "taskset"];

#[test]
fn every_server_is_measured_under_every_load() {
    let path = std::env::var_os("PATH").unwrap();
    let is_there =
        |program: &&str| std::env::split_paths(&path).any(|directory| directory.join(program).is_file());
    let has_all = PEERS.iter().all(is_there);
    let processors = std::thread::available_parallelism().unwrap().get();
    if processors < 2 || (!has_all && std::env::var_os(LAB_VARIABLE).is_none()) {
        println!(
            "SKIP {processors} processors (needs 2); it needs {PEERS:?}, which `cargo lab test` installs"
        );
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("stdout");
    let mut child = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["bench-server", "--quick", "--directory"])
        .arg(directory.path())
        .env_remove(REPORT_TIME_VARIABLE)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&output).unwrap())
        .spawn()
        .unwrap();
    let ended = wait_for("bench-server --quick", DEADLINE, || Ok(child.try_wait()?));
    if ended.is_err() {
        // By its own handling of SIGTERM it would end its servers; a lab that hangs does not.
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(ended.unwrap().success());
    let text = std::fs::read_to_string(output).unwrap();
    for heading in ["| R 4k/32x4 |", "| W 4k/32x4 |", "| R 4k/32 fio |", "| W 4k/32 fio |", "| R nbdcopy |"] {
        assert!(text.contains(heading), "no {heading} in:\n{text}");
    }
    for server in
        ["volserver, O_DIRECT", "nbdkit file, page cache", "qemu-nbd, O_DIRECT", "nbd-server, page cache"]
    {
        assert_eq!(
            text.lines().filter(|line| line.starts_with(&format!("| {server} |"))).count(),
            6,
            "{server}\n{text}"
        );
    }
    assert!(text.contains("IOPS with four connections at least 1.5 ×: met in "), "{text}");
}
