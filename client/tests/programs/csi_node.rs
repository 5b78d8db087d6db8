//! The Node service of `volcsi`: a real process, real file systems on a loop device, real mounts in a namespace of the test's own; killed
//! between any two of its calls, and called again.
#![allow(unsafe_code)] // A mount namespace for one thread.

use std::fs::{self, File};
use std::future::Future;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use proto::csi::v1 as csi;
use proto::csi::v1::node_client::NodeClient;
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use proto::error_reason as reason;
use proto::v1;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::Pid;
use rustix::thread::UnshareFlags;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::fake_node::{FakeNode, Loop};
use crate::fake_server::FakeServer;
use crate::launch::{NodeDaemon, program, start_volcsi};

const MIB: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(60);

/// The plugin's process.
struct Plugin {
    child: Child,
    node: NodeClient<Channel>,
}

impl Plugin {
    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// It is gone, or about to go.
    #[track_caller]
    fn expect_killed(&mut self, context: &str) {
        let deadline = Instant::now() + DEADLINE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it was not killed: {context}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Kubelet's directory, a disk, and both daemons that the plugin speaks to.
struct World {
    dir: tempfile::TempDir,
    kubelet: PathBuf,
    device: Loop,
    bytes: u64,
    server: FakeServer,
    node: FakeNode,
    volume_id: String,
}

impl World {
    fn new(bytes: u64) -> Option<Self> {
        let dir = NodeDaemon::run_dir();
        let kubelet = dir.path().join("kubelet");
        fs::create_dir_all(kubelet.join("pods")).unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        let Some(device) = Loop::new(&dir.path().join("image"), bytes) else {
            println!("SKIP no loop device");
            return None;
        };
        let server = FakeServer::start();
        let volume_id = Uuid::new_v4().to_string();
        let volume = v1::Volume {
            name: "vol-1".to_owned(),
            volume_uid: volume_id.clone(),
            content: v1::VolumeContent::NeverWritten.into(),
            ..Default::default()
        };
        server.state.lock().unwrap().volumes.insert("vol-1".to_owned(), volume);
        let node = FakeNode::start(dir.path(), &device, bytes, server.state.clone());
        Some(Self { dir, kubelet, device, bytes, server, node, volume_id })
    }

    async fn plugin(&self) -> Plugin {
        let socket = self.dir.path().join("csi.sock");
        let mut command = program(env!("CARGO_BIN_EXE_volcsi"));
        command.env_remove("CSI_ENDPOINT").env_remove("VOLCSI_LOG").arg("--socket").arg(&self.node.socket);
        command.arg("--endpoint").arg(format!("unix://{}", socket.display()));
        command.args(["--server", &self.server.uri(), "--private-mounts", "--log", "debug"]);
        command.arg("--kubelet-dir").arg(&self.kubelet);
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        let child = start_volcsi(command.env("PATH", path), &socket, &self.path("log"));
        let uri = format!("unix://{}", socket.display());
        let channel = Endpoint::from_shared(uri).unwrap().connect().await.unwrap();
        Plugin { child, node: NodeClient::new(channel) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// A path of kubelet's.
    fn target(&self, name: &str) -> String {
        self.kubelet.join(name).display().to_string()
    }

    fn stage(&self, capability: &csi::VolumeCapability) -> csi::NodeStageVolumeRequest {
        csi::NodeStageVolumeRequest {
            volume_id: self.volume_id.clone(),
            staging_target_path: self.target("staging"),
            volume_capability: Some(capability.clone()),
            ..Default::default()
        }
    }

    fn publish(&self, target: &str, capability: &csi::VolumeCapability) -> csi::NodePublishVolumeRequest {
        csi::NodePublishVolumeRequest {
            volume_id: self.volume_id.clone(),
            staging_target_path: self.target("staging"),
            target_path: self.target(target),
            volume_capability: Some(capability.clone()),
            ..Default::default()
        }
    }

    fn unpublish(&self, target: &str) -> csi::NodeUnpublishVolumeRequest {
        csi::NodeUnpublishVolumeRequest {
            volume_id: self.volume_id.clone(),
            target_path: self.target(target),
        }
    }

    fn unstage(&self) -> csi::NodeUnstageVolumeRequest {
        csi::NodeUnstageVolumeRequest {
            volume_id: self.volume_id.clone(),
            staging_target_path: self.target("staging"),
        }
    }

    fn stats(&self, path: String) -> csi::NodeGetVolumeStatsRequest {
        csi::NodeGetVolumeStatsRequest {
            volume_id: self.volume_id.clone(),
            volume_path: path,
            ..Default::default()
        }
    }

    /// The mount options of everything that is mounted there.
    fn mounts(&self, target: &str) -> Vec<String> {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let point = self.target(target);
        let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        fields.filter(|fields| fields[4] == point).map(|fields| fields[5].to_owned()).collect()
    }

    fn volume(&self) -> v1::Volume {
        self.server.state.lock().unwrap().volumes["vol-1"].clone()
    }

    fn set_content(&self, content: v1::VolumeContent) {
        self.server.state.lock().unwrap().volumes.get_mut("vol-1").unwrap().set_content(content);
    }

    /// Puts a script before the program of this name; `$REAL` is the program, and `$PPID` the plugin.
    fn wrap(&self, name: &str, script: &str) {
        let real = Command::new("sh").args(["-c", &format!("command -v {name}")]).output().unwrap();
        let real = String::from_utf8(real.stdout).unwrap();
        let text = format!("#!/bin/sh\nREAL={}\ncd {}\n{script}\n", real.trim(), self.dir.path().display());
        let path = self.path("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn lines_of(&self, name: &str) -> usize {
        fs::read_to_string(self.path(name)).unwrap_or_default().lines().count()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // So that the loop device goes as well; a test that failed leaves mounts.
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let root = self.dir.path().display().to_string();
        for point in points.filter(|point| point.starts_with(&root)) {
            rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH).ok();
        }
    }
}

fn capability(access_type: AccessType, mode: Mode) -> csi::VolumeCapability {
    csi::VolumeCapability {
        access_type: Some(access_type),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

fn file_system(fs_type: &str) -> csi::VolumeCapability {
    let mount = MountVolume { fs_type: fs_type.to_owned(), ..Default::default() };
    capability(AccessType::Mount(mount), Mode::SingleNodeWriter)
}

fn block() -> csi::VolumeCapability {
    capability(AccessType::Block(BlockVolume {}), Mode::SingleNodeWriter)
}

/// Whether file systems of the kind can be made and mounted here, and how large one is.
fn size_of(fs_type: &str) -> Option<u64> {
    let known = fs::read_to_string("/proc/filesystems").unwrap();
    let is_known = known.lines().any(|line| line.trim() == fs_type);
    let has_program = Command::new(format!("mkfs.{fs_type}")).arg("-V").output().is_ok();
    if !is_known || !has_program {
        println!("SKIP this machine has no {fs_type}");
        return None;
    }
    Some(if fs_type == "xfs" { 320 * MIB } else { 32 * MIB })
}

/// Runs a test whose mounts nobody else sees; not at all where that cannot be.
fn in_own_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP mounting needs root");
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: this thread, and those that it starts, see other mounts from here on; nobody else is concerned.
            if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) } {
                println!("SKIP no mount namespace: {error}");
                return;
            }
            let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            for point in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
                mount_change(point, MountPropagationFlags::PRIVATE).ok();
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test());
        });
        thread.join().unwrap();
    });
}

#[track_caller]
fn refused<T>(outcome: Result<T, Status>, code: Code, what: &str) {
    let Err(status) = outcome else { panic!("it is not refused: {what}") };
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(what), "{status}");
}

#[test]
fn a_file_system_is_staged_shown_grown_and_taken_away() {
    in_own_namespace(|| async {
        for fs_type in ["ext4", "xfs"] {
            let Some(bytes) = size_of(fs_type) else { continue };
            let Some(world) = World::new(bytes) else { return };
            whole_life(&world, fs_type).await;
        }
    });
}

async fn whole_life(world: &World, fs_type: &str) {
    let mut plugin = world.plugin().await;
    let mut capability = file_system(fs_type);
    if let Some(AccessType::Mount(mount)) = &mut capability.access_type {
        mount.mount_flags = vec!["noatime".to_owned()];
    }
    for _ in 0..3 {
        plugin.node.node_stage_volume(world.stage(&capability)).await.unwrap();
        assert_eq!(world.mounts("staging").len(), 1, "{}", world.log());
    }
    assert!(world.mounts("staging")[0].contains("noatime"));
    assert_eq!(world.volume().content(), v1::VolumeContent::Written);
    for _ in 0..3 {
        for target in ["pods/one", "pods/two"] {
            plugin.node.node_publish_volume(world.publish(target, &capability)).await.unwrap();
            assert_eq!(world.mounts(target).len(), 1);
        }
        let read_only =
            csi::NodePublishVolumeRequest { readonly: true, ..world.publish("pods/ro", &capability) };
        plugin.node.node_publish_volume(read_only.clone()).await.unwrap();
        assert!(world.mounts("pods/ro")[0].starts_with("ro,"));
        let flipped = csi::NodePublishVolumeRequest { readonly: false, ..read_only };
        refused(plugin.node.node_publish_volume(flipped).await, Code::AlreadyExists, "read-only");
    }
    let single = csi::VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeSingleWriter.into() }),
        ..capability.clone()
    };
    let fourth = world.publish("pods/four", &single);
    refused(plugin.node.node_publish_volume(fourth).await, Code::FailedPrecondition, "another path");
    fs::write(world.kubelet.join("pods/one/file"), "data").unwrap();
    assert_eq!(fs::read(world.kubelet.join("pods/ro/file")).unwrap(), b"data");
    fs::write(world.kubelet.join("pods/ro/file"), "").unwrap_err();

    if fs_type == "ext4" && !may_grow_ext4() {
        println!("SKIP growing an ext4 needs CAP_SYS_RESOURCE");
    } else {
        grows(world, &mut plugin).await;
    }
    for target in ["pods/one", "pods/two", "pods/ro", "pods/four"] {
        for _ in 0..2 {
            plugin.node.node_unpublish_volume(world.unpublish(target)).await.unwrap();
            assert!(!Path::new(&world.target(target)).exists());
        }
    }
    for _ in 0..2 {
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        assert_eq!(world.mounts("staging"), [""; 0]);
        assert_eq!(world.node.state().attachments, []);
    }
    assert_eq!(world.node.state().forced, 0);
    // What was written is there, and no file system is made again.
    plugin.node.node_stage_volume(world.stage(&capability)).await.unwrap();
    assert_eq!(fs::read(world.kubelet.join("staging/file")).unwrap(), b"data");
    plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
}

/// The disk is twice as large, and its file system follows; twice is as well as once.
async fn grows(world: &World, plugin: &mut Plugin) {
    let before = bytes_of(world, plugin).await;
    world.device.grow(2 * world.bytes);
    {
        let mut state = world.node.state();
        // Also for the attach that comes after the next detach.
        state.capacity_bytes = 2 * world.bytes;
        state.attachments[0].capacity_bytes = 2 * world.bytes;
    }
    let expand = csi::NodeExpandVolumeRequest {
        volume_id: world.volume_id.clone(),
        volume_path: world.target("pods/one"),
        capacity_range: Some(csi::CapacityRange { required_bytes: 2 * world.bytes as i64, limit_bytes: 0 }),
        ..Default::default()
    };
    for _ in 0..2 {
        let grown = plugin.node.node_expand_volume(expand.clone()).await.unwrap().into_inner();
        assert_eq!(grown.capacity_bytes, 2 * world.bytes as i64);
    }
    let after = bytes_of(world, plugin).await;
    assert!(after > before + before / 2, "{before} {after}");
}

/// Whether the kernel lets this process grow a mounted ext4.
fn may_grow_ext4() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() >> CAP_SYS_RESOURCE & 1 == 1
}

async fn bytes_of(world: &World, plugin: &mut Plugin) -> i64 {
    let told = plugin.node.node_get_volume_stats(world.stats(world.target("pods/one"))).await.unwrap();
    let usage = told.into_inner().usage;
    assert_eq!(usage.len(), 2);
    assert!(usage[0].used > 0 && usage[0].available <= usage[0].total);
    usage[0].total
}

#[test]
fn a_block_volume_is_shown_as_a_device() {
    in_own_namespace(|| async {
        let Some(world) = World::new(16 * MIB) else { return };
        let mut plugin = world.plugin().await;
        for _ in 0..3 {
            plugin.node.node_stage_volume(world.stage(&block())).await.unwrap();
            plugin.node.node_publish_volume(world.publish("pods/disk", &block())).await.unwrap();
            assert_eq!(world.mounts("pods/disk").len(), 1, "{}", world.log());
        }
        let shown = fs::metadata(world.target("pods/disk")).unwrap();
        assert!(shown.file_type().is_block_device());
        assert_eq!(shown.rdev(), fs::metadata(&world.device.path).unwrap().rdev());
        let flipped =
            csi::NodePublishVolumeRequest { readonly: true, ..world.publish("pods/disk", &block()) };
        refused(plugin.node.node_publish_volume(flipped.clone()).await, Code::AlreadyExists, "writable");
        let elsewhere = csi::NodePublishVolumeRequest { target_path: world.target("pods/other"), ..flipped };
        refused(plugin.node.node_publish_volume(elsewhere).await, Code::InvalidArgument, "ReadOnlyMany");
        let single = capability(AccessType::Block(BlockVolume {}), Mode::SingleNodeSingleWriter);
        let second = world.publish("pods/second", &single);
        refused(plugin.node.node_publish_volume(second).await, Code::FailedPrecondition, "another path");
        let stats = plugin.node.node_get_volume_stats(world.stats(world.target("pods/disk"))).await.unwrap();
        assert_eq!(stats.into_inner().usage[0].total, 16 * MIB as i64);
        // Nobody makes a file system on it.
        assert_eq!(world.volume().content(), v1::VolumeContent::NeverWritten);
        for _ in 0..2 {
            plugin.node.node_unpublish_volume(world.unpublish("pods/disk")).await.unwrap();
            plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        }
        assert!(!Path::new(&world.target("pods/disk")).exists());
        assert_eq!(world.node.state().attachments, []);
    });
}

#[test]
fn killed_at_any_moment_a_call_ends_well_when_it_is_repeated() {
    in_own_namespace(|| async {
        for fs_type in ["ext4", "xfs"] {
            let Some(bytes) = size_of(fs_type) else { continue };
            let Some(world) = World::new(bytes) else { return };
            let moments = killed_at(&world, fs_type, usize::MAX).await;
            drop(world);
            assert!(moments > 12, "{moments}");
            for moment in 1..=moments {
                let Some(world) = World::new(bytes) else { return };
                killed_at(&world, fs_type, moment).await;
            }
        }
    });
}

/// A life of a volume in which the plugin is killed at one moment; gives how many there were.
async fn killed_at(world: &World, fs_type: &str, moment: usize) -> usize {
    let capability = file_system(fs_type);
    let mut plugin = world.plugin().await;
    world.node.trap.lock().unwrap().kill = Some((moment, plugin.pid()));
    // Whoever is killed is started again, and called again, as kubelet does.
    macro_rules! repeated {
        ($call:ident, $request:expr) => {
            if let Err(status) = plugin.node.$call($request).await {
                plugin.expect_killed(&format!("{moment}: {status}"));
                world.node.trap.lock().unwrap().kill = None;
                plugin = world.plugin().await;
                plugin
                    .node
                    .$call($request)
                    .await
                    .unwrap_or_else(|status| panic!("killed at moment {moment}: {status}\n{}", world.log()));
            }
        };
    }
    repeated!(node_stage_volume, world.stage(&capability));
    assert_eq!(world.mounts("staging").len(), 1, "{moment}");
    repeated!(node_publish_volume, world.publish("pods/one", &capability));
    assert_eq!(world.mounts("pods/one").len(), 1, "{moment}");
    fs::write(world.kubelet.join("pods/one/file"), "data").unwrap();
    assert_eq!(world.volume().content(), v1::VolumeContent::Written, "{moment}");
    repeated!(node_unpublish_volume, world.unpublish("pods/one"));
    repeated!(node_unstage_volume, world.unstage());
    assert_eq!((world.mounts("staging").len(), world.mounts("pods/one").len()), (0, 0), "{moment}");
    assert_eq!(world.node.state().attachments, [], "{moment}");
    let moments = world.node.trap.lock().unwrap().moments;
    plugin.node.node_stage_volume(world.stage(&capability)).await.unwrap();
    assert_eq!(fs::read(world.kubelet.join("staging/file")).unwrap(), b"data", "{moment}");
    plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    moments
}

#[test]
fn killed_around_each_program_a_stage_ends_well_when_it_is_repeated() {
    const BEFORE: &str = "[ -e killed ] || { touch killed; kill -9 $PPID; exit 9; }; exec $REAL \"$@\"";
    const AFTER: &str =
        "$REAL \"$@\"; code=$?; [ -e killed ] || { touch killed; kill -9 $PPID; }; exit $code";
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        for name in ["blkid", "mkfs.ext4", "e2fsck"] {
            for script in [BEFORE, AFTER] {
                let Some(world) = World::new(bytes) else { return };
                world.wrap(name, script);
                let mut plugin = world.plugin().await;
                let staged = plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await;
                plugin.expect_killed(&format!("{name}: {staged:?}"));
                let mut plugin = world.plugin().await;
                plugin
                    .node
                    .node_stage_volume(world.stage(&file_system("ext4")))
                    .await
                    .unwrap_or_else(|status| panic!("{name}: {status}\n{}", world.log()));
                assert_eq!(world.mounts("staging").len(), 1, "{name}");
                assert_eq!(world.volume().content(), v1::VolumeContent::Written, "{name}");
                plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
            }
        }
    });
}

#[test]
fn an_xfs_whose_mkfs_was_killed_is_made_again() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("xfs") else { return };
        let Some(world) = World::new(bytes) else { return };
        // As mkfs leaves it in the middle: the superblock is there, and says so.
        let mark = format!(
            "printf '\\001' | dd of={} bs=1 seek=126 conv=notrunc,fsync",
            world.device.path.display()
        );
        world.wrap(
            "mkfs.xfs",
            &format!(
                "echo run >> runs; $REAL \"$@\"; [ -e killed ] || {{ touch killed; {mark}; kill -9 $PPID; }}"
            ),
        );
        let mut plugin = world.plugin().await;
        let staged = plugin.node.node_stage_volume(world.stage(&file_system("xfs"))).await;
        plugin.expect_killed(&format!("{staged:?}"));
        assert_eq!(world.volume().content(), v1::VolumeContent::Initialising);
        let mut plugin = world.plugin().await;
        plugin.node.node_stage_volume(world.stage(&file_system("xfs"))).await.unwrap();
        assert_eq!((world.lines_of("runs"), world.mounts("staging").len()), (2, 1), "{}", world.log());
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn a_mkfs_that_outlives_its_plugin_is_waited_for_and_not_run_again() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        let Some(world) = World::new(bytes) else { return };
        world.wrap("mkfs.ext4", "echo run >> runs; until [ -e go ]; do sleep 0.05; done; exec $REAL \"$@\"");
        let mut plugin = world.plugin().await;
        let mut node = plugin.node.clone();
        let request = world.stage(&file_system("ext4"));
        let first = tokio::spawn(async move { node.node_stage_volume(request).await });
        let deadline = Instant::now() + DEADLINE;
        while world.lines_of("runs") == 0 {
            assert!(Instant::now() < deadline, "mkfs does not run: {}", world.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // One operation at a time.
        let unstaged = plugin.node.node_unstage_volume(world.unstage()).await;
        refused(unstaged, Code::Aborted, "NodeStageVolume has been running");
        plugin.child.kill().unwrap();
        plugin.child.wait().unwrap();
        first.await.unwrap().unwrap_err();
        let mut plugin = world.plugin().await;
        let mut node = plugin.node.clone();
        let request = world.stage(&file_system("ext4"));
        let second = tokio::spawn(async move { node.node_stage_volume(request).await });
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!second.is_finished(), "it does not wait");
        fs::write(world.path("go"), "").unwrap();
        second.await.unwrap().unwrap();
        assert_eq!((world.lines_of("runs"), world.mounts("staging").len()), (1, 1), "{}", world.log());
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn what_may_hold_data_is_not_formatted() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        let Some(world) = World::new(bytes) else { return };
        world.wrap("mkfs.ext4", "echo run >> runs; exec $REAL \"$@\"");
        let mut plugin = world.plugin().await;
        let mut stage =
            async |fs_type: &str| plugin.node.node_stage_volume(world.stage(&file_system(fs_type))).await;
        // Written, and nothing is found.
        world.set_content(v1::VolumeContent::Written);
        refused(stage("ext4").await, Code::FailedPrecondition, "was written to, and no file system is found");
        // A server that does not say.
        world.set_content(v1::VolumeContent::Unspecified);
        refused(stage("ext4").await, Code::FailedPrecondition, "does not say whether");
        // Never written, and something is there.
        world.set_content(v1::VolumeContent::NeverWritten);
        let device = File::options().write(true).open(&world.device.path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&device, b"data", bytes - 4096).unwrap();
        device.sync_all().unwrap();
        refused(stage("ext4").await, Code::FailedPrecondition, "never written to, but data is found");
        std::os::unix::fs::FileExt::write_all_at(&device, &[0; 4096], bytes - 4096).unwrap();
        device.sync_all().unwrap();
        drop(device);
        assert_eq!(world.lines_of("runs"), 0);
        assert_eq!(world.volume().content(), v1::VolumeContent::NeverWritten);
        // Another one is at it, and lives; then it has ended.
        let other = world.server.state.lock().unwrap().add_attachment("vol-1", "node-2", 1).to_string();
        {
            let mut state = world.server.state.lock().unwrap();
            let volume = state.volumes.get_mut("vol-1").unwrap();
            volume.set_content(v1::VolumeContent::Initialising);
            volume.initialising_attachment_id.clone_from(&other);
        }
        refused(stage("ext4").await, Code::FailedPrecondition, "another attachment is making");
        world.server.state.lock().unwrap().attachments.remove(&other);
        stage("ext4").await.unwrap();
        assert_eq!((world.lines_of("runs"), world.mounts("staging").len()), (1, 1));
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        let mut stage =
            async |fs_type: &str| plugin.node.node_stage_volume(world.stage(&file_system(fs_type))).await;
        refused(stage("xfs").await, Code::FailedPrecondition, "holds ext4, and xfs is asked for");
        assert_eq!(world.mounts("staging").len(), 0);
        stage("ext4").await.unwrap();
        assert_eq!(world.lines_of("runs"), 1);
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn a_damaged_file_system_is_not_mounted() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        let Some(world) = World::new(bytes) else { return };
        let mut plugin = world.plugin().await;
        plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await.unwrap();
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        for code in [2, 4, 8] {
            world.wrap("e2fsck", &format!("echo UNEXPECTED INCONSISTENCY; exit {code}"));
            let staged = plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await;
            refused(staged, Code::FailedPrecondition, "UNEXPECTED INCONSISTENCY");
            assert_eq!(world.mounts("staging").len(), 0);
        }
        world.wrap("e2fsck", "$REAL \"$@\"; exit 1");
        plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await.unwrap();
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn without_a_grant_nothing_is_staged_and_what_was_fenced_goes_by_force() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        let Some(world) = World::new(bytes) else { return };
        let mut plugin = world.plugin().await;
        world.node.state().is_granted = false;
        let stage = || world.stage(&file_system("ext4"));
        refused(plugin.node.node_stage_volume(stage()).await, Code::FailedPrecondition, "not granted");
        world.node.state().is_granted = true;
        plugin.node.node_stage_volume(stage()).await.unwrap();
        plugin.node.node_publish_volume(world.publish("pods/one", &file_system("ext4"))).await.unwrap();
        // Staged already, and the grant is taken away meanwhile.
        world.node.state().is_granted = false;
        refused(plugin.node.node_stage_volume(stage()).await, Code::FailedPrecondition, "not granted");
        world.node.becomes(v1::DeviceState::Failed);
        let health =
            csi::NodeGetVolumeHealthRequest { volume_id: world.volume_id.clone(), ..Default::default() };
        let health = plugin.node.node_get_volume_health(health).await.unwrap().into_inner();
        let health = health.volume_health.unwrap();
        assert_eq!(health.volume_id, world.volume_id);
        assert_eq!(health.health_statuses[0].reason, "Fenced");
        plugin.node.node_unpublish_volume(world.unpublish("pods/one")).await.unwrap();
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        assert_eq!(world.node.forced_and_left(), (1, 0));
        // A disk that failed and is not mounted is in nobody's way; but one that is shown somewhere is.
        world.node.state().is_granted = true;
        plugin.node.node_stage_volume(world.stage(&block())).await.unwrap();
        plugin.node.node_publish_volume(world.publish("pods/disk", &block())).await.unwrap();
        world.node.becomes(v1::DeviceState::Failed);
        refused(plugin.node.node_stage_volume(stage()).await, Code::FailedPrecondition, "elsewhere");
        let unstaged = plugin.node.node_unstage_volume(world.unstage()).await;
        refused(unstaged, Code::FailedPrecondition, "elsewhere");
        assert_eq!(world.node.state().forced, 1);
        plugin.node.node_unpublish_volume(world.unpublish("pods/disk")).await.unwrap();
        world.node.state().is_granted = false;
        refused(plugin.node.node_stage_volume(stage()).await, Code::FailedPrecondition, "not granted");
        assert_eq!(world.node.state().forced, 1);
        world.node.state().is_granted = true;
        plugin.node.node_stage_volume(stage()).await.unwrap();
        assert_eq!(world.node.state().forced, 2);
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn a_dead_disk_is_given_up_only_where_nobody_will_ever_take_it_on() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        let Some(world) = World::new(bytes) else { return };
        let mut plugin = world.plugin().await;
        plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await.unwrap();
        world.node.becomes(v1::DeviceState::Dead);
        for passing in [reason::SERVER_UNREACHABLE, reason::DEVICE_TIMED_OUT] {
            world.node.state().attach_refused = Some(passing);
            refused(plugin.node.node_unstage_volume(world.unstage()).await, Code::Unavailable, "not now");
            assert_eq!(world.node.forced_and_left(), (0, 1));
            assert_eq!(world.mounts("staging").len(), 1);
        }
        world.node.state().attach_refused = Some(reason::DEVICE_FAILED);
        let unstaged = plugin.node.node_unstage_volume(world.unstage()).await;
        assert_eq!(world.node.forced_and_left(), (1, 0));
        // A loop device does not go with its attachment, as a real disk does: it is taken for somebody else's.
        refused(unstaged, Code::FailedPrecondition, "is mounted at the path");
        rustix::mount::unmount(world.target("staging"), rustix::mount::UnmountFlags::empty()).unwrap();
    });
}

#[test]
fn a_volume_is_used_in_one_way_at_a_time() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        let Some(world) = World::new(bytes) else { return };
        let mut plugin = world.plugin().await;
        plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await.unwrap();
        let staged = plugin.node.node_stage_volume(world.stage(&block())).await;
        refused(staged, Code::FailedPrecondition, "file system mounted");
        let shown = plugin.node.node_publish_volume(world.publish("pods/disk", &block())).await;
        refused(shown, Code::FailedPrecondition, "file system mounted");
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        plugin.node.node_stage_volume(world.stage(&block())).await.unwrap();
        plugin.node.node_publish_volume(world.publish("pods/disk", &block())).await.unwrap();
        let staged = plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await;
        refused(staged, Code::FailedPrecondition, "as a block device");
        plugin.node.node_unpublish_volume(world.unpublish("pods/disk")).await.unwrap();
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn what_an_administrator_attached_is_left_alone() {
    in_own_namespace(|| async {
        let Some(world) = World::new(16 * MIB) else { return };
        let mut plugin = world.plugin().await;
        plugin.node.node_stage_volume(world.stage(&block())).await.unwrap();
        {
            let mut state = world.node.state();
            state.attachments[0].target = "vol-1".to_owned();
            state.attachments[0].only_if_granted = false;
        }
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        assert_eq!(world.node.state().attachments.len(), 1);
    });
}

#[test]
fn a_disk_that_stalls_is_not_asked_and_is_unmounted_with_its_io_failing() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        let Some(world) = World::new(bytes) else { return };
        let mut plugin = world.plugin().await;
        plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await.unwrap();
        plugin.node.node_publish_volume(world.publish("pods/one", &file_system("ext4"))).await.unwrap();
        world.node.becomes(v1::DeviceState::Stalled);
        let stats = plugin.node.node_get_volume_stats(world.stats(world.target("pods/one"))).await;
        refused(stats, Code::Unavailable, "cannot be reached");
        plugin.node.node_unpublish_volume(world.unpublish("pods/one")).await.unwrap();
        assert_eq!(world.node.state().attachments[0].on_stall(), v1::StallAction::Wait, "it is staged yet");
        let node = &world.node;
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        assert_eq!(node.forced_and_left(), (0, 0));
        assert_eq!(node.state().policies, 1);
        // The last unmount is one of a bind, and the volume is used again after it.
        plugin.node.node_stage_volume(world.stage(&block())).await.unwrap();
        plugin.node.node_publish_volume(world.publish("pods/disk", &block())).await.unwrap();
        node.becomes(v1::DeviceState::Stalled);
        plugin.node.node_unpublish_volume(world.unpublish("pods/disk")).await.unwrap();
        let policy = || {
            let own = node.state().attachments[0].clone();
            (own.on_stall(), own.stall_fail_after_ms)
        };
        assert_eq!(policy(), (v1::StallAction::Fail, 120_001), "a restart of the server takes less");
        node.becomes(v1::DeviceState::Live);
        plugin.node.node_publish_volume(world.publish("pods/disk", &block())).await.unwrap();
        assert_eq!(policy(), (v1::StallAction::Wait, 0));
        plugin.node.node_unpublish_volume(world.unpublish("pods/disk")).await.unwrap();
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn volumes_and_paths_that_are_not_there_are_told_apart() {
    in_own_namespace(|| async {
        let Some(world) = World::new(16 * MIB) else { return };
        let mut plugin = world.plugin().await;
        plugin.node.node_stage_volume(world.stage(&block())).await.unwrap();
        let unknown = Uuid::new_v4().to_string();
        for volume_id in [unknown.clone(), "x".repeat(10_000), "../../etc".to_owned()] {
            let stats = csi::NodeGetVolumeStatsRequest {
                volume_id: volume_id.clone(),
                ..world.stats("some/path".to_owned())
            };
            refused(plugin.node.node_get_volume_stats(stats).await, Code::NotFound, "there is no volume");
            let expand = csi::NodeExpandVolumeRequest {
                volume_id: volume_id.clone(),
                volume_path: "some/path".to_owned(),
                ..Default::default()
            };
            refused(plugin.node.node_expand_volume(expand).await, Code::NotFound, "there is no volume");
            let stage = csi::NodeStageVolumeRequest { volume_id: volume_id.clone(), ..world.stage(&block()) };
            refused(plugin.node.node_stage_volume(stage).await, Code::NotFound, "there is no volume");
            let unpublish =
                csi::NodeUnpublishVolumeRequest { volume_id: volume_id.clone(), ..world.unpublish("pods/x") };
            plugin.node.node_unpublish_volume(unpublish).await.unwrap();
            let unstage = csi::NodeUnstageVolumeRequest { volume_id, ..world.unstage() };
            plugin.node.node_unstage_volume(unstage).await.unwrap();
        }
        for path in ["some/path".to_owned(), world.target("pods"), world.target("pods/no/such")] {
            let stats = plugin.node.node_get_volume_stats(world.stats(path)).await;
            refused(stats, Code::NotFound, "not at this path");
        }
        let nothing = csi::NodeStageVolumeRequest::default();
        refused(plugin.node.node_stage_volume(nothing).await, Code::InvalidArgument, "volume_id is missing");
        let not_staged = csi::NodePublishVolumeRequest {
            volume_id: unknown,
            ..world.publish("pods/x", &file_system("ext4"))
        };
        refused(plugin.node.node_publish_volume(not_staged).await, Code::FailedPrecondition, "not staged");
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn a_hostile_path_leads_nowhere_and_other_mounts_stay() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        let Some(world) = World::new(bytes) else { return };
        let mut plugin = world.plugin().await;
        plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await.unwrap();
        let outside = world.path("outside");
        fs::create_dir(&outside).unwrap();
        symlink(&outside, world.kubelet.join("pods/way")).unwrap();
        symlink(&outside, world.kubelet.join("pods/link")).unwrap();
        for (target, code) in [
            ("pods/../../outside", Code::InvalidArgument),
            ("pods/way/x", Code::FailedPrecondition),
            ("pods/link", Code::FailedPrecondition),
            ("pods/a\nb", Code::InvalidArgument),
        ] {
            let published = world.publish(target, &file_system("ext4"));
            refused(plugin.node.node_publish_volume(published).await, code, "");
            refused(plugin.node.node_unpublish_volume(world.unpublish(target)).await, code, "");
        }
        let elsewhere = csi::NodePublishVolumeRequest {
            target_path: outside.display().to_string(),
            ..world.publish("x", &file_system("ext4"))
        };
        refused(plugin.node.node_publish_volume(elsewhere).await, Code::InvalidArgument, "--kubelet-dir");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        // A tmpfs of somebody's.
        let tmpfs = world.target("pods/tmpfs");
        fs::create_dir(&tmpfs).unwrap();
        assert!(Command::new("mount").args(["-t", "tmpfs", "none", &tmpfs]).status().unwrap().success());
        let published = world.publish("pods/tmpfs", &file_system("ext4"));
        refused(plugin.node.node_publish_volume(published).await, Code::FailedPrecondition, "tmpfs");
        let unpublished = plugin.node.node_unpublish_volume(world.unpublish("pods/tmpfs")).await;
        refused(unpublished, Code::FailedPrecondition, "tmpfs");
        let nobodys = csi::NodeUnpublishVolumeRequest {
            volume_id: "nonsense".to_owned(),
            ..world.unpublish("pods/tmpfs")
        };
        refused(plugin.node.node_unpublish_volume(nobodys).await, Code::FailedPrecondition, "tmpfs");
        assert_eq!(world.mounts("pods/tmpfs").len(), 1);
        // What is in a directory is not removed.
        fs::create_dir(world.kubelet.join("pods/full")).unwrap();
        fs::write(world.kubelet.join("pods/full/data"), "data").unwrap();
        let full = plugin.node.node_unpublish_volume(world.unpublish("pods/full")).await;
        refused(full, Code::FailedPrecondition, "not empty");
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn a_hostile_request_is_refused_in_few_words_and_tells_no_secret() {
    const SECRET: &str = "correct-horse-battery-staple";
    in_own_namespace(|| async {
        let Some(world) = World::new(16 * MIB) else { return };
        let mut plugin = world.plugin().await;
        let with_flags = |fs_type: &str, flags: &[&str]| {
            let mount_flags = flags.iter().map(|&flag| flag.to_owned()).collect();
            let mount = MountVolume { fs_type: fs_type.to_owned(), mount_flags, ..Default::default() };
            capability(AccessType::Mount(mount), Mode::SingleNodeWriter)
        };
        let (long, escape) = ("x".repeat(10_000), "\u{1b}[2J");
        let secret_flag = format!("passphrase={SECRET}");
        for asked in [
            with_flags("ext4 xfs", &[]),
            with_flags(" ext4", &[]),
            with_flags("ext4\n", &[]),
            with_flags("../ext4", &[]),
            with_flags(&long, &[]),
            with_flags(escape, &[]),
            with_flags("ext4", &["noatime,suid"]),
            with_flags("ext4", &["context=\"system_u:object_r:t:s0:c1,c2\",dev"]),
            with_flags("ext4", &["context=\"system_u:object_r:t:s0:c1,c2"]),
            with_flags("ext4", &["noatime\",\"loop"]),
            with_flags("ext4", &["errors=panic"]),
            with_flags("ext4", &[&long]),
            with_flags("ext4", &[escape]),
            with_flags("ext4", &[&secret_flag]),
        ] {
            let why = plugin.node.node_stage_volume(world.stage(&asked)).await.unwrap_err();
            assert_eq!(why.code(), Code::InvalidArgument, "{why}");
            let words = why.message();
            assert!(words.len() < 1000 && !words.chars().any(char::is_control), "{words:?}");
            assert!(!words.contains(SECRET), "{words}");
        }
        // Paths that are no paths of kubelet's.
        for path in [
            &*world.target(&long),
            &*world.target("pods/../staging"),
            &*world.target("a\u{1b}[2J"),
            "/",
            "staging",
        ] {
            let stage = csi::NodeStageVolumeRequest {
                staging_target_path: path.to_owned(),
                ..world.stage(&file_system("ext4"))
            };
            let why = plugin.node.node_stage_volume(stage).await.unwrap_err();
            assert!(why.message().len() < 1000 && !why.message().chars().any(char::is_control), "{why:?}");
        }
        // Where nobody looks for one: whatever comes of the call, it is told nowhere.
        let secret = || [("passphrase".to_owned(), SECRET.to_owned())];
        let published = csi::NodePublishVolumeRequest {
            secrets: secret().into(),
            volume_context: secret().into(),
            publish_context: secret().into(),
            ..world.publish("pods/secret", &block())
        };
        let expand = csi::NodeExpandVolumeRequest {
            volume_id: world.volume_id.clone(),
            volume_path: world.target("pods/secret"),
            secrets: secret().into(),
            ..Default::default()
        };
        let by_id = csi::NodeUnstageVolumeRequest { volume_id: SECRET.to_owned(), ..world.unstage() };
        let outcomes = [
            plugin.node.node_publish_volume(published).await.map(drop),
            plugin.node.node_expand_volume(expand).await.map(drop),
            plugin.node.node_unstage_volume(by_id).await.map(drop),
        ];
        for why in outcomes.into_iter().filter_map(Result::err) {
            assert!(!why.message().contains(SECRET), "{why}");
        }
        plugin.node.node_unpublish_volume(world.unpublish("pods/secret")).await.unwrap();
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        assert!(world.node.state().attachments.is_empty(), "nothing of all this made a disk");
        assert!(!world.path("kubelet/staging").exists() && world.mounts("staging").is_empty());
        let log = world.log();
        assert!(!log.contains(SECRET) && !log.contains(escape), "{log}");
    });
}

/// What opens it comes with the stage, and goes to the node daemon and nowhere else; what is to be encrypted is not written in the clear. With
/// a true clear disk: `tests/vm`.
#[test]
fn an_encrypted_volume_needs_its_passphrase_and_tells_nobody() {
    const PASSPHRASE: &str = "correct-horse-battery-staple";
    const WRONG: &str = "another-horse-another-staple";
    in_own_namespace(|| async {
        let Some(world) = World::new(16 * MIB) else { return };
        for name in ["mkfs.ext4", "blkid", "e2fsck"] {
            world.wrap(name, "echo run >> runs; exec $REAL \"$@\"");
        }
        world.node.state().passphrase = Some(PASSPHRASE.as_bytes().to_vec());
        let mut plugin = world.plugin().await;
        let stage = |capability: csi::VolumeCapability, is_told: bool, passphrase: Option<&str>| {
            let context = is_told.then(|| ("encrypted".to_owned(), "true".to_owned()));
            let secret = passphrase.map(|passphrase| ("passphrase".to_owned(), passphrase.to_owned()));
            csi::NodeStageVolumeRequest {
                volume_context: context.into_iter().collect(),
                secrets: secret.into_iter().collect(),
                ..world.stage(&capability)
            }
        };
        let long = WRONG.repeat(200);
        for (asked, code, what) in [
            (stage(block(), true, None), Code::InvalidArgument, "node-stage-secret-name"),
            (stage(block(), true, Some("")), Code::InvalidArgument, "node-stage-secret-namespace"),
            // A PersistentVolume that somebody wrote: the node daemon knows.
            (stage(file_system("ext4"), false, None), Code::InvalidArgument, "node-stage-secret-name"),
            (stage(file_system("ext4"), true, Some(&long)), Code::InvalidArgument, "it may have 4096"),
            (stage(file_system("ext4"), true, Some(WRONG)), Code::FailedPrecondition, "is wrong"),
        ] {
            refused(plugin.node.node_stage_volume(asked).await, code, what);
            assert_eq!(world.node.state().attachments, []);
        }
        // What a file has behind it is no part of it. The kernel has no such clear disk: the disk below is not taken for it.
        let with_line_feed = format!("{PASSPHRASE}\n");
        let staged =
            plugin.node.node_stage_volume(stage(file_system("ext4"), true, Some(&with_line_feed))).await;
        refused(staged, Code::FailedPrecondition, "/dev/mapper/volnode-");
        let asked = world.node.state().asked.clone().unwrap();
        assert_eq!(asked.passphrase.unwrap().value, PASSPHRASE.as_bytes());
        assert!(
            asked.keep_initialising && asked.only_if_granted,
            "a file system is made, and then there is data"
        );
        let shown = world.publish("pods/disk", &block());
        refused(plugin.node.node_publish_volume(shown).await, Code::FailedPrecondition, "is not open");
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        let staged = plugin.node.node_stage_volume(stage(block(), true, Some(PASSPHRASE))).await;
        refused(staged, Code::FailedPrecondition, "/dev/mapper/volnode-");
        assert!(!world.node.state().asked.as_ref().unwrap().keep_initialising, "nobody says so later");
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();

        // A daemon that attaches it as any other.
        world.node.state().knows_no_encryption = true;
        for capability in [block(), file_system("ext4")] {
            let staged = plugin.node.node_stage_volume(stage(capability, true, Some(PASSPHRASE))).await;
            refused(staged, Code::FailedPrecondition, "upgrade volclient");
        }
        let shown = csi::NodePublishVolumeRequest {
            volume_context: [("encrypted".to_owned(), "true".to_owned())].into(),
            ..world.publish("pods/disk", &block())
        };
        refused(plugin.node.node_publish_volume(shown).await, Code::FailedPrecondition, "not staged");
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        // One that is not encrypted, of a class that has a passphrase.
        world.node.state().knows_no_encryption = false;
        world.node.state().passphrase = None;
        let staged = plugin.node.node_stage_volume(stage(block(), false, Some(PASSPHRASE))).await;
        refused(staged, Code::InvalidArgument, "make volumes with encrypted");
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();

        assert_eq!((world.lines_of("runs"), world.node.forced_and_left()), (0, (0, 0)));
        assert_eq!(world.volume().content(), v1::VolumeContent::NeverWritten);
        let log = world.log();
        assert!(
            log.contains("NodeStageVolume") && !log.contains(PASSPHRASE) && !log.contains(WRONG),
            "{log}"
        );
    });
}

/// What becomes of an image that a program crashes on.
#[test]
fn an_image_that_crashes_its_fsck_is_not_mounted() {
    in_own_namespace(|| async {
        let Some(bytes) = size_of("ext4") else { return };
        let Some(world) = World::new(bytes) else { return };
        let mut plugin = world.plugin().await;
        plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await.unwrap();
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
        for signal in ["SEGV", "ABRT", "KILL"] {
            world.wrap("e2fsck", &format!("kill -{signal} $$"));
            let staged = plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await;
            refused(staged, Code::FailedPrecondition, "signal");
            assert_eq!(world.mounts("staging").len(), 0);
        }
        fs::remove_file(world.path("bin/e2fsck")).unwrap();
        plugin.node.node_stage_volume(world.stage(&file_system("ext4"))).await.unwrap();
        plugin.node.node_unstage_volume(world.unstage()).await.unwrap();
    });
}

#[test]
fn kubelet_is_told_the_zone_and_a_private_directory_is_refused() {
    in_own_namespace(|| async {
        let Some(world) = World::new(16 * MIB) else { return };
        let mut plugin = world.plugin().await;
        let info = plugin.node.node_get_info(csi::NodeGetInfoRequest {}).await.unwrap().into_inner();
        assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("node-1", 64));
        assert_eq!(info.accessible_topology.unwrap().segments["topology.volnode.io/zone"], "z1");
        let storage = csi::NodeGetStorageHealthRequest::default();
        let health = plugin.node.node_get_storage_health(storage).await.unwrap().into_inner();
        assert_eq!(health.backend_health, []);
        drop(plugin);
        let mut command = program(env!("CARGO_BIN_EXE_volcsi"));
        command.env_remove("CSI_ENDPOINT").arg("--kubelet-dir").arg(&world.kubelet);
        command.arg("--endpoint").arg(format!("unix://{}", world.path("csi.sock").display()));
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(said.contains("/pods: what is mounted there is seen by volcsi alone"), "{said}");
    });
}
