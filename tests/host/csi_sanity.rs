//! The CSI conformance suite, csi-sanity, at the real volcsi, volclient and volserver: the specs of the controller, of the group controller
//! and of identity. Those that need a disk are run where disks are.
//!
//! Owns the processes, and how many specs have to pass: one that is skipped or missing is a failure.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use testlab::volcsi::Volcsi;
use testlab::volserver::Volserver;

use super::images::{Mounted, is_there};
use super::programs;

/// Of the suite's version that `packages.rs` names.
const SPECS: &str = r"\[Controller Server\]|\[GroupController |\[Identity Service\]|Identity Service";
/// How many of them pass: all that there are.
const PASSED: u32 = 72;
/// They stage a volume on this machine.
const NEEDS_A_DISK: &str = "volume lifecycle";
/// Volumes of the node: the suite makes one more.
const MAX_VOLUMES: &str = "4";

/// A daemon of ours that has said that it is ready. Killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(command: &mut Command, log: &Path) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(File::create(log).unwrap()).spawn().unwrap();
        let mut daemon = Self(child);
        let mut ready = String::new();
        BufReader::new(daemon.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        assert!(ready.contains(" ready: "), "{command:?}: {ready} {}", fs::read_to_string(log).unwrap());
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The number before a word in the suite's last lines, `102 Passed | 0 Failed | 1 Pending | 0 Skipped`.
fn count(said: &str, word: &str) -> Option<u32> {
    let line = said.lines().rev().find(|line| line.contains(" Passed"))?;
    let words: Vec<&str> =
        line.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let at = words.iter().position(|found| *found == word)?;
    words.get(at.checked_sub(1)?)?.parse().ok()
}

#[test]
fn the_conformance_suite_passes_without_disks() {
    if !is_there("csi-sanity") {
        let is_promised = std::env::var_os("VOLNODE_LAB_TOOLS").is_some_and(|value| value == "1");
        assert!(!is_promised, "cannot run: no csi-sanity");
        return println!("SKIP no csi-sanity, which `cargo lab test` installs");
    }
    let Some(mounted) = Mounted::new() else { return };
    let (storage, directory) = (tempfile::tempdir_in(mounted.path()).unwrap(), tempfile::tempdir().unwrap());
    let here = directory.path();
    let built = programs::directory();
    let mut volserver = Command::new(built.join("volserver"));
    volserver.args(["--threads", "2", "--memory-max", "1G", "--log", "error"]);
    let server = Volserver::start(&mut volserver, storage.path()).unwrap();
    let uri = server.management_uri();

    let mut volclient = Command::new(built.join("volclient"));
    volclient.args(["serve", "--server", &uri, "--node-id", "node-1", "--run-dir"]).arg(here.join("run"));
    volclient.arg("--device-dir").arg(here.join("dev")).args(["--max-volumes", MAX_VOLUMES]);
    let _volclient = Daemon::start(&mut volclient, &here.join("volclient.log"));
    fs::create_dir(here.join("kubelet")).unwrap();
    let mut volcsi = Command::new(built.join("volcsi"));
    volcsi.args(["--server", &uri, "--log", "debug", "--private-mounts"]);
    volcsi
        .arg("--socket")
        .arg(here.join("run/volclient.sock"))
        .arg("--kubelet-dir")
        .arg(here.join("kubelet"));
    let volcsi = Volcsi::start(&mut volcsi, &here.join("csi.sock"), &here.join("volcsi.log")).unwrap();

    let mut suite = Command::new("csi-sanity");
    suite.args(["--csi.endpoint", &volcsi.endpoint(), "--ginkgo.no-color", "--ginkgo.focus", SPECS]);
    suite.args(["--ginkgo.skip", NEEDS_A_DISK, "--csi.testnodevolumeattachlimit"]);
    suite
        .arg("--csi.mountdir")
        .arg(here.join("kubelet/mount"))
        .arg("--csi.stagingdir")
        .arg(here.join("kubelet/stage"));
    // In a file system of 400 MiB all volumes of the suite have room, whatever is copied.
    suite.args(["--csi.testvolumesize", "1048576", "--csi.testvolumeexpandsize", "2097152"]);
    let output = suite.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let told = || format!("{said}\nvolcsi: {}", volcsi.logged());
    assert!(output.status.success(), "{}", told());
    assert_eq!(count(&said, "Failed"), Some(0), "{}", told());
    let passed = count(&said, "Passed").unwrap();
    println!("csi-sanity: {passed} specs passed");
    assert_eq!(passed, PASSED, "{}", told());
}

#[test]
fn the_suites_last_line_is_read() {
    let said = "Ran 69 of 103 Specs in 1.2 seconds\nSUCCESS! -- 69 Passed | 0 Failed | 1 Pending | 33 Skipped\nPASS\n";
    assert_eq!(
        (count(said, "Passed"), count(said, "Failed"), count(said, "Pending")),
        (Some(69), Some(0), Some(1))
    );
    assert_eq!(count("nothing", "Passed"), None);
}
