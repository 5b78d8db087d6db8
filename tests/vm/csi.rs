//! A volume's life as kubelet has it, over real disks: staged, shown, grown and taken away by `volcsi`, fenced and lost in between.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use proto::csi::v1 as csi;
use proto::csi::v1::node_client::NodeClient;
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use testlab::harness::{Env, Test};
use testlab::shell::{sh, wait_for};
use testlab::storage_node::StorageNode;
use testlab::volcsi::Volcsi;
use tokio::runtime::Runtime;
use tonic::Code;
use tonic::transport::Channel;

use crate::ride_through::BOUND;

pub(crate) const TESTS: &[Test] = &[
    Test::new("csi::an_ext4_lives_as_kubelet_has_it", an_ext4_lives_as_kubelet_has_it).within(300),
    Test::new("csi::an_xfs_lives_as_kubelet_has_it", an_xfs_lives_as_kubelet_has_it).within(300).once(),
    Test::new("csi::a_block_volume_lives_as_kubelet_has_it", a_block_volume_lives_as_kubelet_has_it)
        .within(300)
        .once(),
    Test::new("csi::a_fenced_ext4_goes_from_under_its_mounts", a_fenced_ext4_goes_from_under_its_mounts)
        .within(300)
        .once(),
    Test::new("csi::a_fenced_xfs_goes_from_under_its_mounts", a_fenced_xfs_goes_from_under_its_mounts)
        .within(300)
        .once(),
    Test::new("csi::a_hostile_image_harms_nobody", a_hostile_image_harms_nobody).within(300).once(),
];

/// volcsi beside a node daemon, and a kubelet's directory that others would see as well.
struct Plugin {
    _volcsi: Volcsi,
    runtime: Runtime,
    kubelet: PathBuf,
    volume_id: String,
    node: NodeClient<Channel>,
}

impl Plugin {
    fn start(env: &Env, storage: &StorageNode, volume_id: String) -> Result<Self> {
        let kubelet = env.directory.join("kubelet");
        if !kubelet.exists() {
            fs::create_dir_all(kubelet.join("staging"))?;
            sh(&format!("mount --bind {0} {0}; mount --make-shared {0}", kubelet.display()))?;
        }
        let mut command = storage.program("volcsi");
        command.arg("--kubelet-dir").arg(&kubelet).args(["--log", "debug"]);
        let (socket, log) = (env.directory.join("csi.sock"), env.directory.join("volcsi.log"));
        let volcsi = Volcsi::start(&mut command, &socket, &log)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let node = NodeClient::new(runtime.block_on(volcsi.channel())?);
        Ok(Self { _volcsi: volcsi, runtime, kubelet, volume_id, node })
    }

    fn path(&self, name: &str) -> String {
        self.kubelet.join(name).display().to_string()
    }

    fn stage(&mut self, capability: &csi::VolumeCapability) -> Result<(), tonic::Status> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: self.volume_id.clone(),
            staging_target_path: self.path("staging"),
            volume_capability: Some(capability.clone()),
            ..Default::default()
        };
        self.runtime.block_on(self.node.node_stage_volume(request)).map(drop)
    }

    fn publish(&mut self, name: &str, capability: &csi::VolumeCapability) -> Result<()> {
        let request = csi::NodePublishVolumeRequest {
            volume_id: self.volume_id.clone(),
            staging_target_path: self.path("staging"),
            target_path: self.path(name),
            volume_capability: Some(capability.clone()),
            ..Default::default()
        };
        self.runtime.block_on(self.node.node_publish_volume(request))?;
        Ok(())
    }

    fn unpublish(&mut self, name: &str) -> Result<()> {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: self.volume_id.clone(),
            target_path: self.path(name),
        };
        self.runtime.block_on(self.node.node_unpublish_volume(request))?;
        ensure!(!Path::new(&self.path(name)).exists(), "the target is there yet");
        Ok(())
    }

    fn unstage(&mut self) -> Result<()> {
        let request = csi::NodeUnstageVolumeRequest {
            volume_id: self.volume_id.clone(),
            staging_target_path: self.path("staging"),
        };
        self.runtime.block_on(self.node.node_unstage_volume(request))?;
        Ok(())
    }

    fn expand(&mut self, name: &str, bytes: i64) -> Result<i64> {
        let request = csi::NodeExpandVolumeRequest {
            volume_id: self.volume_id.clone(),
            volume_path: self.path(name),
            capacity_range: Some(csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
            ..Default::default()
        };
        Ok(self.runtime.block_on(self.node.node_expand_volume(request))?.into_inner().capacity_bytes)
    }

    fn health(&mut self) -> Result<Vec<String>> {
        let request =
            csi::NodeGetVolumeHealthRequest { volume_id: self.volume_id.clone(), ..Default::default() };
        let health = self.runtime.block_on(self.node.node_get_volume_health(request))?.into_inner();
        let health = health.volume_health.context("volume_health")?;
        Ok(health.health_statuses.into_iter().map(|status| status.reason).collect())
    }
}

/// The directory's own mount goes before the harness looks for what was left.
fn end(plugin: Plugin) -> Result<()> {
    let kubelet = plugin.kubelet.clone();
    drop(plugin);
    sh(&format!("umount {}", kubelet.display())).map(drop)
}

fn capability(access_type: AccessType) -> csi::VolumeCapability {
    let access_mode = Some(AccessMode { mode: Mode::SingleNodeWriter.into() });
    csi::VolumeCapability { access_type: Some(access_type), access_mode }
}

fn file_system(fs_type: &str) -> csi::VolumeCapability {
    capability(AccessType::Mount(MountVolume { fs_type: fs_type.to_owned(), ..Default::default() }))
}

/// A volume that this node may attach; its uid.
fn granted(storage: &StorageNode) -> Result<String> {
    storage.volctl(&["create", "vol-1", "--size", "384M"])?.succeeded()?;
    storage.volctl(&["grant", "create", "vol-1", "node-1"])?.succeeded()?;
    Ok(shown(storage)?["volume_uid"].as_str().context("volume_uid")?.to_owned())
}

fn shown(storage: &StorageNode) -> Result<serde_json::Value> {
    let shown = storage.volctl(&["show", "vol-1", "--output", "json"])?.succeeded()?;
    serde_json::from_str(&shown).context("volctl's JSON")
}

fn nothing_is_attached(storage: &StorageNode) -> Result<()> {
    let listed = storage.volctl(&["attachments", "--output", "json"])?.succeeded()?;
    ensure!(!listed.contains("/dev/ublkb"), "{listed}");
    Ok(())
}

fn an_ext4_lives_as_kubelet_has_it(env: &Env) -> Result<()> {
    lives_as_kubelet_has_it(env, "ext4")
}

fn an_xfs_lives_as_kubelet_has_it(env: &Env) -> Result<()> {
    lives_as_kubelet_has_it(env, "xfs")
}

fn lives_as_kubelet_has_it(env: &Env, fs_type: &str) -> Result<()> {
    let storage = StorageNode::start(env)?;
    let volume_id = granted(&storage)?;
    let mut plugin = Plugin::start(env, &storage, volume_id.clone())?;
    let capability = file_system(fs_type);
    for _ in 0..2 {
        plugin.stage(&capability)?;
        ensure!(shown(&storage)?["content"] == "written");
        plugin.publish("one", &capability)?;
    }
    fs::write(plugin.kubelet.join("one/file"), "data")?;
    // The plugin carries no I/O, and remembers nothing.
    drop(plugin);
    fs::write(plugin_path(env, "one/other"), "data")?;
    let mut plugin = Plugin::start(env, &storage, volume_id)?;
    plugin.stage(&capability)?;
    plugin.publish("two", &capability)?;
    ensure!(fs::read(plugin.kubelet.join("two/other"))? == b"data");
    ensure!(plugin.health()?.is_empty(), "it is well");
    plugin.unpublish("one")?;
    plugin.unpublish("two")?;
    plugin.unstage()?;
    nothing_is_attached(&storage)?;
    // Larger while nobody has it: the next stage has the file system follow.
    storage.volctl(&["resize", "vol-1", "--size", "768M"])?.succeeded()?;
    plugin.stage(&capability)?;
    plugin.publish("one", &capability)?;
    ensure!(fs::read(plugin.kubelet.join("one/file"))? == b"data");
    let space = rustix::fs::statvfs(plugin.kubelet.join("one"))?;
    let bytes = space.f_blocks * space.f_frsize;
    ensure!(bytes > 500 << 20, "the file system has not grown: {bytes} bytes");
    ensure!(plugin.expand("one", 768 << 20)? == 768 << 20);
    plugin.unpublish("one")?;
    plugin.unstage()?;
    nothing_is_attached(&storage)?;
    end(plugin)
}

fn plugin_path(env: &Env, name: &str) -> PathBuf {
    env.directory.join("kubelet").join(name)
}

fn a_block_volume_lives_as_kubelet_has_it(env: &Env) -> Result<()> {
    let storage = StorageNode::start(env)?;
    let volume_id = granted(&storage)?;
    let mut plugin = Plugin::start(env, &storage, volume_id)?;
    let capability = capability(AccessType::Block(BlockVolume {}));
    for _ in 0..2 {
        plugin.stage(&capability)?;
        plugin.publish("disk", &capability)?;
    }
    ensure!(shown(&storage)?["content"] == "never_written", "nobody made a file system");
    let disk = plugin.path("disk");
    sh(&format!(
        "dd if=/dev/urandom of={disk} bs=1M count=4 oflag=direct status=none; blockdev --getsize64 {disk}"
    ))?;
    plugin.unpublish("disk")?;
    plugin.unstage()?;
    nothing_is_attached(&storage)?;
    // Nor is one made over the bytes.
    match plugin.stage(&file_system("ext4")) {
        Err(status) if status.code() == Code::FailedPrecondition => {}
        other => bail!("{other:?}"),
    }
    plugin.unstage()?;
    nothing_is_attached(&storage)?;
    end(plugin)
}

fn a_fenced_ext4_goes_from_under_its_mounts(env: &Env) -> Result<()> {
    fenced_goes_from_under_its_mounts(env, "ext4")
}

fn a_fenced_xfs_goes_from_under_its_mounts(env: &Env) -> Result<()> {
    fenced_goes_from_under_its_mounts(env, "xfs")
}

/// Under writes: an XFS shuts down then, and answers EIO to whoever looks at its root.
fn fenced_goes_from_under_its_mounts(env: &Env, fs_type: &str) -> Result<()> {
    let storage = StorageNode::start(env)?;
    let volume_id = granted(&storage)?;
    let mut plugin = Plugin::start(env, &storage, volume_id)?;
    let capability = file_system(fs_type);
    plugin.stage(&capability)?;
    plugin.publish("one", &capability)?;
    let shown = plugin.kubelet.join("one");
    let writer = std::thread::spawn({
        let shown = shown.clone();
        move || write_until_refused(&shown)
    });
    wait_for("the first write", BOUND, || Ok(shown.join("0").exists().then_some(())))?;
    storage.volctl(&["grant", "delete", "vol-1", "node-1"])?.succeeded()?;
    writer.join().map_err(|_| anyhow::anyhow!("the writer"))?;
    // A stage that comes late makes nothing good again.
    match plugin.stage(&capability) {
        Err(status) if status.code() == Code::FailedPrecondition => {}
        other => bail!("{other:?}"),
    }
    wait_for("the disk to be known as fenced", BOUND, || {
        Ok(plugin.health()?.contains(&"Fenced".to_owned()).then_some(()))
    })?;
    if fs_type == "xfs" {
        // It does when it cannot write its log.
        wait_for("the file system to shut down", BOUND, || {
            fs::File::open(&shown).and_then(|directory| directory.sync_all()).ok();
            Ok(fs::metadata(&shown).is_err().then_some(()))
        })?;
    }
    plugin.unpublish("one")?;
    plugin.unstage()?;
    nothing_is_attached(&storage)?;
    end(plugin)
}

/// Small files, each made and flushed, until one fails; it has to before the test's time is over.
fn write_until_refused(directory: &Path) {
    for number in 0u64.. {
        let made = fs::File::create(directory.join((number % 100).to_string())).and_then(|mut file| {
            std::io::Write::write_all(&mut file, &[1; 4096])?;
            file.sync_all()
        });
        if made.is_err() {
            break;
        }
    }
}

/// Fields of an ext4's superblock, with a value that makes no sense (Documentation/filesystems/ext4/super.rst): more blocks than the disk
/// has, a block size of 2^73 bytes, groups without inodes.
const WRONG_FIELDS: [(u64, u32); 3] = [(1024 + 0x4, u32::MAX), (1024 + 0x18, 63), (1024 + 0x28, 0)];

/// Images made to crash whoever mounts them: whoever may write to a volume's device writes what they like there.
fn a_hostile_image_harms_nobody(env: &Env) -> Result<()> {
    let storage = StorageNode::start(env)?;
    let volume_id = granted(&storage)?;
    let mut plugin = Plugin::start(env, &storage, volume_id)?;
    let capability = file_system("ext4");
    plugin.stage(&capability)?;
    plugin.publish("one", &capability)?;
    fs::create_dir(plugin.kubelet.join("one/directory"))?;
    plugin.unpublish("one")?;
    plugin.unstage()?;
    let path = storage.volume_file("vol-1")?;
    let image = File::options().read(true).write(true).open(&path)?;
    for (offset, value) in WRONG_FIELDS {
        let mut right = [0; 4];
        image.read_exact_at(&mut right, offset)?;
        image.write_all_at(&value.to_le_bytes(), offset)?;
        // Mended from a copy, or not mounted.
        if let Err(status) = plugin.stage(&capability) {
            let words = status.message();
            ensure!(matches!(status.code(), Code::FailedPrecondition | Code::Internal), "{status}");
            ensure!(words.len() < 2000 && !words.chars().any(char::is_control), "{words:?}");
        }
        plugin.unstage()?;
        nothing_is_attached(&storage)?;
        image.write_all_at(&right, offset)?;
    }
    let shown = path.display();
    // Sound as far as a short check goes; its superblock wants the machine to end once a fault is found, and there is one.
    sh(&format!(
        "e2fsck -fy {shown} >&2 || [ $? -le 1 ]; tune2fs -e panic {shown} >&2; \
         size=$(dumpe2fs -h {shown} 2>&1 | awk '/^Block size:/ {{ print $3 }}'); \
         block=$(debugfs -R 'blocks /directory' {shown} 2>/dev/null | awk '{{ print $1 }}'); \
         head -c $size /dev/zero | tr '\\0' '\\377' | dd of={shown} bs=$size seek=$block conv=notrunc status=none"
    ))?;
    plugin.stage(&capability)?;
    plugin.publish("one", &capability)?;
    let looked_up = fs::metadata(plugin.kubelet.join("one/directory/file"));
    ensure!(
        looked_up.as_ref().is_err_and(|error| error.kind() != std::io::ErrorKind::NotFound),
        "the damage is not found: {looked_up:?}"
    );
    let health = plugin.health()?;
    ensure!(health == ["FileSystemError"], "{health:?}");
    plugin.unpublish("one")?;
    plugin.unstage()?;
    nothing_is_attached(&storage)?;
    end(plugin)
}
