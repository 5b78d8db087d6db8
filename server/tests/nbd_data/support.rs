//! What every test needs: a directory of its own, a data server over a catalog, and names to open.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::export_name::AttachmentExportName;
use server::backend::file;
use server::catalog::{AttachmentRecord, BackendKind, Catalog, NewAttachment, NewVolume, VolumeRecord};
use server::data_server::{DataServer, DataServerConfig};
use uuid::Uuid;

use super::client::Client;
use super::unit_filter;

/// Of servers whose clients dawdle: more than an honest one takes on a busy machine, the commit of its session included.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

/// A directory that is gone when the test is.
pub(crate) struct TempDir(pub(crate) PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("volnode-nbd-{}", Uuid::new_v4()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A data server with its catalog.
pub(crate) struct Server {
    pub(crate) data: Arc<DataServer>,
    pub(crate) catalog: Catalog,
    pub(crate) volumes_dir: PathBuf,
    _dir: TempDir,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// Starts with a configuration that `change` has changed, under the system-call filter of the unit that is shipped.
    pub(crate) fn start_with(change: impl FnOnce(&mut DataServerConfig)) -> Self {
        // Set RUST_LOG to see what the server says.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .try_init();
        let dir = TempDir::new();
        let catalog = Catalog::open(&dir.0).unwrap();
        let mut config = DataServerConfig {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            threads: 2,
            volumes_dir: catalog.volumes_dir(),
            ..DataServerConfig::default()
        };
        change(&mut config);
        let volumes_dir = config.volumes_dir.clone();
        let data = unit_filter::under(|| DataServer::start(config, catalog.clone())).unwrap();
        Self { data, catalog, volumes_dir, _dir: dir }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.data.local_addrs()[0].tcp().unwrap()
    }

    pub(crate) fn create(&self, name: &str, capacity_bytes: u64) -> VolumeRecord {
        self.create_with(name, capacity_bytes, |_| {})
    }

    pub(crate) fn create_with(
        &self,
        name: &str,
        capacity_bytes: u64,
        change: impl FnOnce(&mut NewVolume),
    ) -> VolumeRecord {
        let mut new = NewVolume {
            name: name.into(),
            capacity_bytes,
            block_size_bytes: 512,
            backend: BackendKind::File,
            write_cache_on: true,
        };
        change(&mut new);
        let volume = self.catalog.begin_creating(&new).unwrap();
        if new.backend == BackendKind::File {
            file::create(&self.volumes_dir, volume.volume_uid, capacity_bytes).unwrap();
        }
        self.catalog.finish_creating(volume.volume_uid).unwrap();
        volume
    }

    pub(crate) fn attach(&self, volume: &VolumeRecord, read_only: bool) -> AttachmentRecord {
        let new = NewAttachment { volume_uid: volume.volume_uid, node_id: "node-a".into(), read_only };
        self.catalog.add_attachment(&new).unwrap()
    }

    /// A new volume, attached and opened.
    pub(crate) fn open_new(&self, name: &str, capacity_bytes: u64) -> (VolumeRecord, Client) {
        let volume = self.create(name, capacity_bytes);
        let attachment = self.attach(&volume, false);
        let client = self.open(&attachment, 1, 0);
        (volume, client)
    }

    pub(crate) fn open(&self, attachment: &AttachmentRecord, epoch: u64, slot: u32) -> Client {
        Client::open(self.address(), &export_name(attachment, epoch, slot)).unwrap()
    }

    /// The URI of an attachment's export, for foreign clients.
    pub(crate) fn uri(&self, attachment: &AttachmentRecord, epoch: u64, slot: u32) -> String {
        format!("nbd://{}/{}", self.address(), export_name(attachment, epoch, slot))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let in_time = self.data.shutdown();
        assert!(in_time || std::thread::panicking(), "the data side did not end in time");
    }
}

pub(crate) fn export_name(attachment: &AttachmentRecord, epoch: u64, slot: u32) -> String {
    let (attachment_id, secret) = (attachment.attachment_id, attachment.secret.clone());
    AttachmentExportName { attachment_id, secret, epoch, slot }.expose()
}

/// Waits until something holds.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Says why a test does not run here; a failure where the lab promises everything.
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("VOLNODE_LAB_TOOLS").is_none_or(|value| value != "1"), "cannot run: {why}");
    println!("SKIP {why}");
}

pub(crate) fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(program).is_file())
}

/// Runs a program to its end; gives its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// A file system of its own on a loop device, for tests that fill it, freeze it or need O_DIRECT on XFS.
pub(crate) struct LoopFs {
    pub(crate) mount: PathBuf,
    image: PathBuf,
    _dir: TempDir,
}

impl LoopFs {
    /// `None`, with the reason said, where that cannot be made.
    pub(crate) fn new(kind: &str, bytes: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip("mounting needs root");
            return None;
        }
        let mkfs = format!("mkfs.{kind}");
        if !is_installed(&mkfs) || !Path::new("/dev/loop-control").exists() {
            skip(&format!("no {mkfs} or no loop devices"));
            return None;
        }
        let dir = TempDir::new();
        let (image, mount) = (dir.0.join("image"), dir.0.join("mount"));
        std::fs::create_dir(&mount).unwrap();
        std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        run(&mkfs, &["-q", image.to_str().unwrap()]);
        let fs = Self { mount, image, _dir: dir };
        fs.mount();
        Some(fs)
    }

    fn mount(&self) {
        run("mount", &["-o", "loop", self.image.to_str().unwrap(), self.mount.to_str().unwrap()]);
    }

    /// Unmounts it, which works only when no file of it is open, and mounts it again.
    pub(crate) fn remount(&self) {
        run("umount", &[self.mount.to_str().unwrap()]);
        self.mount();
    }

    /// Stops every write to the file system until the guard is dropped.
    pub(crate) fn freeze(&self) -> Frozen<'_> {
        run("fsfreeze", &["--freeze", self.mount.to_str().unwrap()]);
        Frozen(self)
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(&self.mount).status();
        if !status.is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("--lazy").arg(&self.mount).status();
        }
    }
}

pub(crate) struct Frozen<'a>(&'a LoopFs);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0.mount).status();
    }
}

/// A small generator of numbers that repeat from a seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let value = self.next().to_le_bytes();
            chunk.copy_from_slice(&value[..chunk.len()]);
        }
    }
}

/// A seed that is new in each run, or the one of `VOLNODE_SEED`; printed, so that a failure can be repeated.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("VOLNODE_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| Uuid::new_v4().as_u128() as u64);
    println!("VOLNODE_SEED={seed}");
    seed
}
