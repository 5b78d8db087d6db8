//! What every test needs: a directory of its own, a data server over a catalog, and names to open.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proto::export_name::AttachmentExportName;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use server::backend::file;
use server::catalog::{AttachmentRecord, BackendKind, Catalog, NewAttachment, NewVolume, VolumeRecord};
use server::data::config::DataServerConfig;
use server::data::server::{DataServer, DataServerError};
use uuid::Uuid;

use super::client::Client;
use super::unit_filter;

#[path = "callback_backend.rs"]
pub(crate) mod callback_backend;

use callback_backend::Cluster;

/// Whether the bytes of every volume are in a backend that completes by call-back: in `nbd_by_callback/main.rs`.
pub(crate) const BY_CALLBACK: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"nbd_by_callback");

/// Of servers whose clients dawdle. An honest one that a busy machine makes slower than this is closed, too, and tries again.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

/// What has not come about by then never will, however busy the machine is.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// What a server has to close or refuse is closed or refused by then: sooner than by the defaults of the limits that the tests set
/// otherwise, so that a server that ignores what was set is noticed.
pub(crate) const CLOSE_LIMIT: Duration = Duration::from_secs(30);

/// Enough for full pools and wide sockets: how much memory the machine has is no part of what is tested.
const MEMORY_BYTES_MAX: u64 = 64 << 30;

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

/// Servers of this process that run.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// Starts a server; where the memory that this user may lock (RLIMIT_MEMLOCK), of which rings are made, is in use by the servers
/// of other tests, it waits for them.
fn start_in_turn(config: &DataServerConfig, catalog: &Catalog) -> Arc<DataServer> {
    let deadline = Instant::now() + DEADLINE;
    let mut last_seen_running = Instant::now();
    loop {
        if RUNNING.load(Ordering::SeqCst) > 0 {
            last_seen_running = Instant::now();
        }
        match unit_filter::under(|| DataServer::start(config.clone(), catalog.clone())) {
            Err(DataServerError::LockedMemory { .. })
                // The kernel lets go of a ring's memory some time after its server has ended.
                if last_seen_running.elapsed() < Duration::from_secs(5) && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            started => {
                let data = started.unwrap();
                RUNNING.fetch_add(1, Ordering::SeqCst);
                return data;
            }
        }
    }
}

/// A data server with its catalog.
pub(crate) struct Server {
    pub(crate) data: Arc<DataServer>,
    pub(crate) catalog: Catalog,
    pub(crate) volumes_dir: PathBuf,
    /// Where the bytes are that are in no file or memory.
    cluster: Option<Arc<Cluster>>,
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
        let cluster = BY_CALLBACK.then(Arc::<Cluster>::default);
        let mut config = DataServerConfig {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            threads: 2,
            volumes_dir: catalog.volumes_dir(),
            runtime_dir: Some(dir.0.join("run")),
            opener: cluster.as_ref().map(Cluster::opener),
            ..DataServerConfig::default()
        };
        config.limits.memory_bytes_max = Some(MEMORY_BYTES_MAX);
        change(&mut config);
        let volumes_dir = config.volumes_dir.clone();
        let data = start_in_turn(&config, &catalog);
        Self { data, catalog, volumes_dir, cluster, _dir: dir }
    }

    /// Of a server whose volumes complete by call-back.
    pub(crate) fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().unwrap()
    }

    /// Bytes of storage that the volume takes up now.
    pub(crate) fn allocated_bytes(&self, volume: &VolumeRecord) -> u64 {
        match &self.cluster {
            Some(cluster) => cluster.allocated_bytes(volume.volume_uid),
            None => self.data.allocated_bytes(volume),
        }
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
            settings: Default::default(),
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
        let new = NewAttachment {
            volume_uid: volume.volume_uid,
            node_id: "node-a".into(),
            read_only,
            boot_id: String::new(),
            is_shared: false,
            only_if_granted: false,
        };
        self.catalog.add_attachment(&new).unwrap()
    }

    /// A new volume, attached and opened.
    pub(crate) fn open_new(&self, name: &str, capacity_bytes: u64) -> (VolumeRecord, Client) {
        let volume = self.create(name, capacity_bytes);
        let attachment = self.attach(&volume, false);
        let client = self.open(&attachment, 1, 0);
        (volume, client)
    }

    /// The same of a server that closes who is slow: tries until this machine lets it be fast enough.
    pub(crate) fn open_new_in_time(&self, name: &str, capacity_bytes: u64) -> Client {
        let volume = self.create(name, capacity_bytes);
        let name = export_name(&self.attach(&volume, false), 1, 0);
        let mut opened = None;
        wait_until("a handshake in time", || {
            opened = Client::open(self.address(), &name).inspect_err(|error| println!("{error}")).ok();
            opened.is_some()
        });
        opened.unwrap()
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
        RUNNING.fetch_sub(1, Ordering::SeqCst);
        assert!(in_time || std::thread::panicking(), "the data side did not end in time");
    }
}

/// A server whose storage a test can stop and break.
pub(crate) struct FragileServer {
    // First, so that it ends before its storage.
    pub(crate) server: Server,
    fs: Option<LoopFs>,
}

impl FragileServer {
    /// `None`, with the reason said, where the storage cannot be made.
    pub(crate) fn start_with(change: impl FnOnce(&mut DataServerConfig)) -> Option<Self> {
        let fs = if BY_CALLBACK { None } else { Some(LoopFs::new("xfs", 320 << 20)?) };
        let server = Server::start_with(|config| {
            if let Some(fs) = &fs {
                config.volumes_dir = fs.mount.clone();
            }
            change(config);
        });
        Some(Self { server, fs })
    }

    /// Holds every write until the guard is dropped.
    pub(crate) fn freeze(&self) -> Frozen<'_> {
        match &self.fs {
            Some(fs) => fs.freeze(),
            None => {
                self.server.cluster().wish(|wishes| wishes.holds_writes = true);
                Frozen::Cluster(self.server.cluster())
            }
        }
    }

    /// Has every sync fail until it is mended. False, with the reason said: that cannot be done here.
    pub(crate) fn fail_syncs(&self) -> bool {
        match &self.fs {
            Some(_) if !is_installed("xfs_io") => {
                skip("no xfs_io to make syncs fail with");
                return false;
            }
            Some(fs) => {
                run("xfs_io", &["-x", "-c", "shutdown", fs.mount.to_str().unwrap()]);
            }
            None => self
                .server
                .cluster()
                .wish(|wishes| wishes.sync_errno = Some(rustix::io::Errno::IO.raw_os_error())),
        }
        true
    }

    /// Undoes that, with no volume open.
    pub(crate) fn mend(&self) {
        match &self.fs {
            Some(fs) => fs.remount(),
            None => self.server.cluster().wish(|wishes| wishes.sync_errno = None),
        }
    }
}

pub(crate) fn export_name(attachment: &AttachmentRecord, epoch: u64, slot: u32) -> String {
    let (attachment_id, secret) = (attachment.attachment_id, attachment.secret.clone());
    AttachmentExportName { attachment_id, secret, epoch, slot }.expose()
}

/// Waits until something holds.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Says why a test does not run here; a failure where everything is promised.
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("VOLNODE_LAB_TOOLS").is_none_or(|value| value != "1"), "cannot run: {why}");
    println!("SKIP {why}");
}

/// Whether the lab runs the tests: then the programs that they call are there, in the versions that it wants.
pub(crate) fn is_in_lab() -> bool {
    std::env::var_os("VOLNODE_LAB").is_some()
}

/// The same of a program that is missing, which is a failure already where the lab runs the tests.
pub(crate) fn skip_without_tool(why: &str) {
    assert!(!is_in_lab(), "the lab installs what the tests call, yet: {why}");
    skip(why);
}

/// Runs the body of the test `name` in a process of its own, where nobody else's memory and descriptors are.
pub(crate) fn alone(name: &str, body: impl FnOnce()) {
    const VARIABLE: &str = "VOLNODE_TEST_ALONE";
    if std::env::var_os(VARIABLE).is_some_and(|alone| alone == name) {
        return body();
    }
    let own = std::env::current_exe().unwrap();
    let arguments = [name, "--exact", "--nocapture", "--test-threads=1"];
    let output = Command::new(own).args(arguments).env(VARIABLE, name).output().unwrap();
    let told =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // So that whoever counts results does not count these.
    told.lines().for_each(|line| println!("    | {line}"));
    assert!(
        output.status.success() && told.contains("1 passed"),
        "in a process of its own: {}",
        output.status
    );
}

/// Whether this process may have so many files open at once; root may have as many as it likes. Only for a test that is
/// [`alone`]: the limit is the process's.
pub(crate) fn may_open_files(count: u64) -> bool {
    let limit = getrlimit(Resource::Nofile);
    let maximum = limit.maximum.map(|maximum| maximum.max(count));
    // Beyond its maximum only root gets it.
    let wanted = [Rlimit { current: maximum, maximum }, Rlimit { current: limit.maximum, ..limit }];
    wanted.into_iter().any(|wanted| setrlimit(Resource::Nofile, wanted).is_ok())
        && getrlimit(Resource::Nofile).current.is_none_or(|current| current >= count)
}

pub(crate) fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(program).is_file())
}

/// A program that speaks English, whoever's session this is, and whose TLS is as it was made, whatever this machine's policy.
pub(crate) fn tool(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C.UTF-8").env_remove("LANGUAGE");
    command.env("GNUTLS_SYSTEM_PRIORITY_FILE", "/dev/null");
    command
}

/// Runs a program to its end; gives its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = tool(program).args(arguments).output().unwrap();
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
        let dir = TempDir::new();
        let image = dir.0.join("image");
        Self::new_at(dir, image, kind, bytes, &[])
    }

    /// The same with an image that is written all over, and so in few pieces: where the file system below discards what it frees, one in
    /// thousands of pieces takes minutes to remove.
    #[allow(dead_code)] // Few files are in so many pieces.
    pub(crate) fn new_in_one_piece(kind: &str, bytes: u64) -> Option<Self> {
        let dir = TempDir::new();
        let image = dir.0.join("image");
        let mut file = std::fs::File::create(&image).unwrap();
        let zeroes = vec![0; 1 << 20];
        for _ in 0..bytes >> 20 {
            std::io::Write::write_all(&mut file, &zeroes).unwrap();
        }
        file.sync_all().unwrap();
        // mkfs would discard it.
        Self::new_at(dir, image, kind, bytes, &["-K"])
    }

    /// The same with its image in a place of the caller's, and options for mkfs.
    pub(crate) fn new_at(
        dir: TempDir,
        image: PathBuf,
        kind: &str,
        bytes: u64,
        options: &[&str],
    ) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip("mounting needs root");
            return None;
        }
        let mkfs = format!("mkfs.{kind}");
        if !is_installed(&mkfs) || !Path::new("/dev/loop-control").exists() {
            skip(&format!("no {mkfs} or no loop devices"));
            return None;
        }
        let mount = dir.0.join("mount");
        std::fs::create_dir(&mount).unwrap();
        let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(&image);
        file.unwrap().set_len(bytes).unwrap();
        run(&mkfs, &[&["-q"], options, &[image.to_str().unwrap()]].concat());
        // In a container root may not be allowed to, and a kernel may lack the file system.
        let mut command = tool("mount");
        let output = command.args(["-t", kind, "-o", "loop"]).arg(&image).arg(&mount).output().unwrap();
        if !output.status.success() {
            skip(&format!("a {kind} cannot be mounted: {}", String::from_utf8_lossy(&output.stderr)));
            return None;
        }
        Some(Self { mount, image, _dir: dir })
    }

    fn mount(&self) {
        run("mount", &["-o", "loop", self.image.to_str().unwrap(), self.mount.to_str().unwrap()]);
    }

    /// Unmounts it, as soon as no file of it is open, and mounts it again.
    pub(crate) fn remount(&self) {
        wait_until("no file of it is open", || {
            tool("umount").arg(&self.mount).output().unwrap().status.success()
        });
        // A mount namespace that somebody made meanwhile has it mounted as well.
        wait_until("nobody has it mounted", || {
            run("losetup", &["-j", self.image.to_str().unwrap()]).is_empty()
        });
        self.mount();
    }

    /// Stops every write to the file system until the guard is dropped.
    pub(crate) fn freeze(&self) -> Frozen<'_> {
        run("fsfreeze", &["--freeze", self.mount.to_str().unwrap()]);
        Frozen::Fs(self)
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

pub(crate) enum Frozen<'a> {
    Fs(&'a LoopFs),
    Cluster(&'a Cluster),
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        match self {
            Self::Fs(fs) => {
                let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&fs.mount).status();
            }
            Self::Cluster(cluster) => cluster.wish(|wishes| wishes.holds_writes = false),
        }
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
