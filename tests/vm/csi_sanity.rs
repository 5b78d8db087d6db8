//! The CSI plugin with real disks, as csi-sanity, the conformance suite of the Kubernetes project, drives it.
//!
//! The suite plays an orchestrator and kubelet. Every spec that the plugin's capabilities ask for runs: one that is left out fails the
//! test, since a capability that is not declared would leave out its specs without a word.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use fastrand::Rng;
use testlab::harness::{Env, Test};
use testlab::seed;
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::StorageNode;
use testlab::volcsi::Volcsi;

use crate::luks::Stops;

pub(crate) const TESTS: &[Test] = &[
    Test::new("csi_sanity::the_conformance_suite_passes_with_ext4", passes_with_ext4).within(600).once(),
    Test::new("csi_sanity::the_conformance_suite_passes_with_block_volumes", passes_with_block_volumes)
        .within(600)
        .once(),
    Test::new("csi_sanity::the_conformance_suite_passes_with_xfs", passes_with_xfs).within(900).once().long(),
    Test::new(
        "csi_sanity::the_conformance_suite_passes_with_encrypted_volumes",
        passes_with_encrypted_volumes,
    )
    .within(1200)
    .once()
    .long(),
    Test::new("csi_sanity::the_conformance_suite_passes_in_three_more_orders", passes_in_three_more_orders)
        .within(1800)
        .once()
        .long(),
];

/// The suite's closing line: one spec is pending in the suite itself, and stays so.
const CLOSING: &str = "102 Passed | 0 Failed | 1 Pending | 0 Skipped";
/// Volumes of the node: the suite makes one more, and publishes all of them.
const MAX_VOLUMES: &str = "4";
/// Where the node is, and the server's volumes.
const PLACE: &str = "topology.volnode.io/zone=z1";
/// The suite takes so many seeds.
const SUITE_SEEDS: u64 = 1 << 31;
/// What the node-stage secret has, and nobody may tell.
const PASSPHRASE: &str = "correct-horse-battery-staple";
/// Of the suite's file of secrets: what the node is told, and what others are told in vain.
const SECRETS: [&str; 12] = [
    "NodeStageVolumeSecret",
    "NodePublishVolumeSecret",
    "CreateVolumeSecret",
    "DeleteVolumeSecret",
    "ControllerPublishVolumeSecret",
    "ControllerUnpublishVolumeSecret",
    "ControllerValidateVolumeCapabilitiesSecret",
    "CreateSnapshotSecret",
    "DeleteSnapshotSecret",
    "ControllerExpandVolumeSecret",
    "ControllerModifyVolumeSecret",
    "ListSnapshotsSecret",
];
/// A node that has not registered by then is not coming.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// The plugin with a kubelet's directory; killed, and what it mounted unmounted, when dropped.
struct Plugin {
    volcsi: Option<Volcsi>,
    kubelet: PathBuf,
}

impl Plugin {
    /// Starts it once the server knows the node.
    fn start(env: &Env, node: &StorageNode) -> Result<Self> {
        let kubelet = env.directory.join("kubelet");
        fs::create_dir(&kubelet)?;
        // What is mounted below is seen outside the pod, as kubelet's DaemonSets ask for.
        run("mount", &["--bind".as_ref(), kubelet.as_os_str(), kubelet.as_os_str()])?;
        run("mount", &["--make-shared".as_ref(), kubelet.as_os_str()])?;
        let mut plugin = Self { volcsi: None, kubelet };
        let mut command = node.program("volcsi");
        command.args(["--topology", PLACE]).arg("--kubelet-dir").arg(&plugin.kubelet);
        let log = env.directory.join("volcsi.log");
        plugin.volcsi = Some(Volcsi::start(&mut command, &plugin.kubelet.join("csi.sock"), &log)?);
        wait_for("the server to know the node", READY_DEADLINE, || {
            let listed = node.volctl(&["node", "list", "--output", "json"])?.succeeded()?;
            let nodes: serde_json::Value = serde_json::from_str(&listed)?;
            Ok(nodes.as_array().is_some_and(|nodes| !nodes.is_empty()).then_some(()))
        })?;
        Ok(plugin)
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.volcsi = None;
        run("umount", &["--recursive".as_ref(), "--lazy".as_ref(), self.kubelet.as_os_str()]).ok();
    }
}

/// What the suite's volumes are.
#[derive(Clone, Copy)]
struct Mode {
    access_type: &'static str,
    fs_type: &'static str,
    mebibytes: u64,
    is_encrypted: bool,
    /// Runs, each in an order of its own.
    orders: usize,
}

const EXT4: Mode =
    Mode { access_type: "mount", fs_type: "ext4", mebibytes: 64, is_encrypted: false, orders: 1 };

fn passes_with_ext4(env: &Env) -> Result<()> {
    passes(env, EXT4)
}

fn passes_with_xfs(env: &Env) -> Result<()> {
    // Smaller ones mkfs.xfs refuses.
    passes(env, Mode { fs_type: "xfs", mebibytes: 300, ..EXT4 })
}

fn passes_with_block_volumes(env: &Env) -> Result<()> {
    passes(env, Mode { access_type: "block", mebibytes: 16, ..EXT4 })
}

fn passes_with_encrypted_volumes(env: &Env) -> Result<()> {
    passes(env, Mode { is_encrypted: true, ..EXT4 })
}

fn passes_in_three_more_orders(env: &Env) -> Result<()> {
    passes(env, Mode { orders: 3, ..EXT4 })
}

/// Runs the suite in orders of the seed's.
fn passes(env: &Env, mode: Mode) -> Result<()> {
    // Snapshots and clones want a file system that shares blocks.
    let mut node = StorageNode::start_on_xfs(env)?;
    node.kill_client()?;
    if mode.is_encrypted {
        sh("modprobe dm_mod")?;
        node.have_the_client_look_in(Stops::new(env)?.folder());
    }
    node.start_client_with(&["--label", PLACE, "--max-volumes", MAX_VOLUMES])?;
    let plugin = Plugin::start(env, &node)?;
    let mut rng = Rng::with_seed(seed::choose()?);
    for _ in 0..mode.orders {
        run_suite(env, &plugin, mode, rng.u64(0..SUITE_SEEDS))?;
    }
    let told = sh(&format!(
        "grep -rlaF -e {PASSPHRASE} {}/logs {}/volcsi.log || true",
        env.directory.display(),
        env.directory.display()
    ))?;
    ensure!(told.is_empty(), "a passphrase is in {told}");
    Ok(())
}

fn run_suite(env: &Env, plugin: &Plugin, mode: Mode, order: u64) -> Result<()> {
    let volcsi = plugin.volcsi.as_ref().context("volcsi")?;
    let parameters = env.directory.join("parameters.yaml");
    let Mode { fs_type, is_encrypted, .. } = mode;
    fs::write(&parameters, format!("csi.storage.k8s.io/fstype: {fs_type}\nencrypted: \"{is_encrypted}\"\n"))?;
    let mutable = env.directory.join("mutable.yaml");
    fs::write(&mutable, "readIops: \"100000\"\n")?;
    let mut suite = Command::new("csi-sanity");
    if is_encrypted {
        let secrets = env.directory.join("secrets.yaml");
        let one = |name: &&str| format!("{name}:\n  passphrase: {PASSPHRASE}\n");
        fs::write(&secrets, SECRETS.iter().map(one).collect::<String>())?;
        suite.arg("--csi.secrets").arg(secrets);
    }
    suite.arg("--csi.endpoint").arg(volcsi.endpoint()).arg("--csi.testnodevolumeattachlimit");
    for (option, place) in [("--csi.stagingdir", "staging"), ("--csi.mountdir", "target")] {
        suite.arg(option).arg(plugin.kubelet.join(place));
    }
    suite.args(["--csi.testvolumeaccesstype", mode.access_type]);
    suite.arg("--csi.testvolumesize").arg((mode.mebibytes << 20).to_string());
    suite.arg("--csi.testvolumeexpandsize").arg((mode.mebibytes << 21).to_string());
    suite.arg("--csi.testvolumeparameters").arg(&parameters);
    suite.arg("--csi.testvolumemutableparameters").arg(&mutable);
    suite.args(["--ginkgo.no-color", "--ginkgo.randomize-all", "--ginkgo.seed"]);
    suite.arg(order.to_string()).stdin(Stdio::null());
    let output = suite.output().context("cannot run csi-sanity, which the lab builds")?;
    let told = String::from_utf8_lossy(&output.stdout);
    println!("{}", told.lines().rfind(|line| line.contains("Passed")).unwrap_or("no closing line"));
    if !output.status.success() || !told.contains(CLOSING) {
        bail!("{}\n{told}\n---- volcsi ----\n{}", output.status, volcsi.logged());
    }
    Ok(())
}
