//! Storage that forgets while a server runs, or while none does: whoever had unflushed writes is told, by the incarnation, whatever
//! became of the server in between; and nobody else is.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.
#![allow(unsafe_code)] // A thread with mounts of its own.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests, as the next one; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;
mod volserver;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use proto::export_name::{AttachmentExportName, ExportDescription, Secret};
use proto::nbd::transmission::{CommandFlags, NbdError};
use proto::v1;
use rustix::process::Signal;
use uuid::Uuid;

use client::Client;
use support::{LoopFs, is_installed, run, skip};
use volserver::{Volserver, attach_request, command, create_request};

const XFS_BYTES: u64 = 320 << 20;

/// What is served, and where all of it is kept.
struct Storage {
    data_dir: PathBuf,
    /// Not on the file system that fails.
    dir: tempfile::TempDir,
    cache: &'static str,
    runtime: tokio::runtime::Runtime,
}

/// A client's right to the volume.
struct Held {
    attachment_id: String,
    secret: String,
}

impl Storage {
    /// `volumes_dir`: where the volumes are, if not with the catalog.
    fn new(data_dir: Option<PathBuf>, volumes_dir: Option<&Path>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = data_dir.unwrap_or_else(|| dir.path().join("data"));
        if let Some(volumes_dir) = volumes_dir {
            std::fs::create_dir(&data_dir).unwrap();
            std::os::unix::fs::symlink(volumes_dir, data_dir.join("volumes")).unwrap();
        }
        let runtime = tokio::runtime::Runtime::new().unwrap();
        Self { data_dir, dir, cache: "writeback", runtime }
    }

    fn command(&self) -> Command {
        let mut command = command(&self.data_dir);
        command.env("VOLSERVER_RUNTIME_DIR", self.dir.path().join("run")).args(["--cache", self.cache]);
        command
    }

    fn start(&self) -> Volserver {
        self.start_with(self.command())
    }

    fn start_with(&self, command: Command) -> Volserver {
        Volserver::start_with(command, &self.dir.path().join("log"))
    }

    fn attach(&self, server: &Volserver) -> Held {
        let request = create_request("vol");
        self.runtime.block_on(async { server.client().await.create_volume(request).await.unwrap() }); // or it is there
        self.attach_as(server, "node", false)
    }

    fn attach_as(&self, server: &Volserver, node: &str, force: bool) -> Held {
        let request = attach_request("vol", node, force);
        let attached = self
            .runtime
            .block_on(async { server.client().await.attach_volume(request).await.unwrap().into_inner() });
        Held { attachment_id: attached.attachment.unwrap().attachment_id, secret: attached.secret }
    }

    /// As the API tells it.
    fn incarnation(&self, server: &Volserver) -> String {
        let request = v1::GetVolumeRequest { name: "vol".to_owned(), ..Default::default() };
        let volume =
            self.runtime.block_on(async { server.client().await.get_volume(request).await.unwrap() });
        volume.into_inner().storage_incarnation
    }

    fn volume_file(&self) -> PathBuf {
        let entries = std::fs::read_dir(self.data_dir.join("volumes")).unwrap();
        let is_volume = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().parse::<Uuid>().is_ok();
        entries.map(|entry| entry.unwrap().path()).find(is_volume).unwrap()
    }
}

impl Held {
    fn open(&self, server: &Volserver, epoch: u64) -> Client {
        self.try_to_open(server, epoch, 0).unwrap()
    }

    /// `None` where it is refused.
    fn try_to_open(&self, server: &Volserver, epoch: u64, slot: u32) -> Option<Client> {
        let attachment_id = self.attachment_id.parse().unwrap();
        let name =
            AttachmentExportName { attachment_id, secret: Secret::parse(&self.secret).unwrap(), epoch, slot };
        Client::open(server.data[0], &name.expose()).ok()
    }
}

/// As the export tells it.
fn told(client: &Client) -> String {
    let description: ExportDescription = client.info.description.as_deref().unwrap().parse().unwrap();
    description.incarnation
}

fn shut_down(fs: &LoopFs) {
    run("xfs_io", &["-x", "-c", "shutdown", fs.mount.to_str().unwrap()]);
}

fn xfs() -> Option<LoopFs> {
    if !is_installed("xfs_io") {
        skip("no xfs_io to make a file system fail with");
        return None;
    }
    LoopFs::new("xfs", XFS_BYTES)
}

#[test]
fn a_failed_flush_is_remembered_by_the_next_server() {
    for catalog_fails_too in [false, true] {
        let Some(fs) = xfs() else { return };
        let storage = if catalog_fails_too {
            Storage::new(Some(fs.mount.join("data")), None)
        } else {
            Storage::new(None, Some(&fs.mount))
        };
        let server = storage.start();
        let held = storage.attach(&server);
        let mut client = held.open(&server, 1);
        let before = told(&client);
        client.write(0, &[1; 4096]).unwrap();
        client.flush().unwrap();
        client.write(0, &[2; 4096]).unwrap();
        shut_down(&fs);
        assert_eq!(client.flush(), Err(NbdError::Eio as u32));
        // The next connection is told as long as this one is served, too.
        let again = held.try_to_open(&server, 1, 1);
        if let Some(again) = &again {
            assert_ne!(told(again), before);
        }
        drop((client, again));
        server.kill();
        fs.remount();
        let server = storage.start();
        assert_ne!(storage.incarnation(&server), before, "catalog fails too: {catalog_fails_too}");
        let mut client = held.open(&server, 3);
        assert_ne!(told(&client), before);
        let read = client.read(0, 4096).unwrap();
        assert!(
            read == [1; 4096] || read == [2; 4096],
            "what was flushed, or what the kernel wrote back meanwhile"
        );
        client.flush().unwrap();
    }
}

/// Where the loss can be written down nowhere, nobody is told of it, and nobody is served, until it can be noticed otherwise.
#[test]
fn a_failed_flush_that_is_recorded_nowhere_is_not_answered() {
    let Some(fs) = xfs() else { return };
    let storage = Storage::new(Some(fs.mount.join("data")), None);
    let start = || {
        let mut command = storage.command();
        command.env("VOLSERVER_RUNTIME_DIR", fs.mount.join("run"));
        storage.start_with(command)
    };
    let server = start();
    let held = storage.attach(&server);
    let (mut client, mut other) = (held.open(&server, 1), held.try_to_open(&server, 1, 1).unwrap());
    let before = told(&client);
    rustix::fs::sync();
    client.write(0, &[2; 4096]).unwrap();
    shut_down(&fs);
    for client in [&mut client, &mut other] {
        client.send(proto::nbd::transmission::Command::Flush, CommandFlags::NONE, 0, 0, &[]);
        assert!(client.receive().is_err(), "no answer");
    }
    assert!(held.try_to_open(&server, 1, 2).is_none(), "no volume");
    drop((client, other));
    server.kill();
    fs.remount();
    let server = start();
    assert_ne!(told(&held.open(&server, 2)), before);
}

/// Where a service manager starts each process anew.
fn in_another_mount_namespace<T: Send>(needed: &Path, start: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let started = scope.spawn(|| {
            // SAFETY: this thread alone sees other mounts from here on, and it makes no use of them but to start a program.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
            // Others cannot unmount theirs as long as they are mounted here. One by one, because a root that was changed into is no
            // mount.
            for mount in std::fs::read_to_string("/proc/thread-self/mounts").unwrap().lines() {
                let point = mount.split(' ').nth(1).unwrap();
                let _ = rustix::mount::mount_change(point, rustix::mount::MountPropagationFlags::PRIVATE);
                if point.contains("/volnode-") && Path::new(point) != needed {
                    // Whoever made it may have unmounted it just now.
                    let _ = Command::new("umount").args(["--lazy", point]).stderr(Stdio::null()).status();
                }
            }
            start()
        });
        started.join().unwrap()
    })
}

/// A restart of the unit, of a pod, and the upgrade from a version that kept no records.
#[test]
fn a_restart_with_unflushed_writes_is_no_loss() {
    let Some(fs) = LoopFs::new("ext4", 24 << 20) else { return };
    for cache in ["writeback", "none"] {
        let mut storage = Storage::new(Some(fs.mount.join(cache)), None);
        storage.cache = cache;
        let server = storage.start();
        let held = storage.attach(&server);
        let mut client = held.open(&server, 1);
        let before = told(&client);
        client.write(0, &[7; 4096]).unwrap();
        drop(client);
        server.kill();
        for (epoch, (is_elsewhere, signal)) in (2..).zip([
            (false, Signal::KILL),
            (false, Signal::TERM),
            (true, Signal::TERM),
            (true, Signal::KILL),
            (false, Signal::TERM),
        ]) {
            let server = if is_elsewhere {
                in_another_mount_namespace(&fs.mount, || storage.start())
            } else {
                storage.start()
            };
            let mut client = held.open(&server, epoch);
            assert_eq!(told(&client), before, "{cache} {epoch}");
            assert!(client.read(0, 4096) == Ok(vec![7; 4096]));
            client.write(4096 * epoch, &[epoch as u8; 4096]).unwrap();
            drop(client);
            server.stop(signal);
        }
        std::fs::remove_dir_all(storage.dir.path().join("run")).unwrap();
        let server = storage.start();
        assert_eq!(told(&held.open(&server, 9)), before, "{cache}: nothing was known of it");
    }
}

#[test]
fn what_happens_to_the_storage_while_no_server_runs_is_noticed() {
    type Happening = fn(&Storage, &LoopFs);
    let happenings: [(&str, Signal, Happening); 5] = [
        ("the file system was mounted anew", Signal::KILL, |_, fs| {
            shut_down(fs);
            fs.remount();
        }),
        ("the file system was mounted anew", Signal::TERM, |_, fs| {
            shut_down(fs);
            fs.remount();
        }),
        ("the file was replaced by another", Signal::KILL, |storage, _| {
            let path = storage.volume_file();
            let copy = path.with_extension("copy");
            std::fs::copy(&path, &copy).unwrap();
            std::fs::rename(&copy, &path).unwrap();
        }),
        ("the file was replaced by another", Signal::TERM, |storage, _| {
            let copy = storage.data_dir.with_extension("backup");
            run("cp", &["-a", storage.data_dir.to_str().unwrap(), copy.to_str().unwrap()]);
            std::fs::remove_dir_all(&storage.data_dir).unwrap();
            std::fs::rename(copy, &storage.data_dir).unwrap();
        }),
        ("the file was written to while no server had it open", Signal::TERM, |storage, _| {
            let file = File::options().write(true).open(storage.volume_file()).unwrap();
            file.write_all_at(&[0; 4096], 0).unwrap();
        }),
    ];
    for (what, signal, happens) in happenings {
        let Some(fs) = xfs() else { return };
        let storage = Storage::new(Some(fs.mount.join("data")), None);
        let server = storage.start();
        let held = storage.attach(&server);
        let mut client = held.open(&server, 1);
        let before = told(&client);
        client.write(0, &[7; 4096]).unwrap();
        client.flush().unwrap();
        client.write(0, &[8; 4096]).unwrap();
        drop(client);
        server.stop(signal);
        happens(&storage, &fs);
        let server = storage.start();
        let now = storage.incarnation(&server);
        assert_ne!(now, before, "{what}: before anybody opens it");
        server.log_with(what);
        let is_another_volume = what.contains("was written to");
        match held.try_to_open(&server, 2, 0) {
            Some(client) => assert!(!is_another_volume && told(&client) == now, "{what}"),
            None => assert!(is_another_volume, "{what}"),
        }
        server.stop(Signal::TERM);
        let server = storage.start();
        assert_eq!(storage.incarnation(&server), now, "{what}: and once only");
        storage.attach(&server).open(&server, 3);
    }
}

/// The server itself changes the file of a volume that nobody has opened since its orderly start.
#[test]
fn a_volume_that_grows_before_it_is_opened_again_is_nobody_elses_work() {
    let storage = Storage::new(None, None);
    let server = storage.start();
    let held = storage.attach(&server);
    let mut client = held.open(&server, 1);
    let before = told(&client);
    client.write(0, &[7; 4096]).unwrap();
    drop(client);
    server.stop(Signal::TERM);
    let server = storage.start();
    storage.runtime.block_on(async {
        let request =
            v1::ResizeVolumeRequest { name: "vol".to_owned(), capacity_bytes: 2 << 20, ..Default::default() };
        server.client().await.resize_volume(request).await.unwrap();
    });
    server.kill();
    let server = storage.start();
    let mut client = held.open(&server, 2);
    assert_eq!(told(&client), before);
    assert!(client.read(0, 4096) == Ok(vec![7; 4096]));
}

/// A server of an older version has served in between, which keeps no records.
#[test]
fn what_a_version_without_records_wrote_in_between_is_no_roll_back() {
    let storage = Storage::new(None, None);
    let server = storage.start();
    let held = storage.attach(&server);
    let before = told(&held.open(&server, 1));
    server.stop(Signal::TERM);
    let elsewhere = tempfile::tempdir().unwrap();
    let mut older = storage.command();
    older.env("VOLSERVER_RUNTIME_DIR", elsewhere.path().join("run"));
    let server = storage.start_with(older);
    let mut client = held.open(&server, 2);
    client.write(0, &[8; 4096]).unwrap();
    drop(client);
    server.stop(Signal::TERM);
    let server = storage.start();
    let mut client = held.open(&server, 3);
    assert_eq!(told(&client), before);
    assert!(client.read(0, 4096) == Ok(vec![8; 4096]));
}

/// A catalog from before the volume was taken by force: who lost it does not get it back.
#[test]
fn a_catalog_that_is_rolled_back_revives_no_holder() {
    let storage = Storage::new(None, None);
    let attach = |server: &Volserver, node: &str| storage.attach_as(server, node, true);
    let server = storage.start();
    let former = storage.attach(&server);
    drop(former.open(&server, 1));
    server.stop(Signal::TERM);
    let copy = storage.dir.path().join("catalog");
    run("cp", &["-a", storage.data_dir.join("catalog.sqlite").to_str().unwrap(), copy.to_str().unwrap()]);
    let server = storage.start();
    let before = storage.incarnation(&server);
    drop(attach(&server, "other").open(&server, 1));
    server.stop(Signal::TERM);
    for name in ["catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"] {
        let _ = std::fs::remove_file(storage.data_dir.join(name));
    }
    std::fs::rename(copy, storage.data_dir.join("catalog.sqlite")).unwrap();
    let server = storage.start();
    assert!(former.try_to_open(&server, 2, 0).is_none(), "it was forced out");
    assert_ne!(storage.incarnation(&server), before);
    attach(&server, "third").open(&server, 1);
}

/// The disk below is thin, and full: what the kernel writes back on its own fails, and nobody has the file open to be told.
#[test]
fn a_write_back_that_fails_while_no_server_runs_is_noticed() {
    if !rustix::process::geteuid().is_root() {
        return skip("mounting needs root");
    }
    let thin = Tmpfs::new("16m");
    // Without a journal the file system itself needs no more room than it has.
    let image = thin.0.0.join("image");
    let fs = LoopFs::new_at(support::TempDir::new(), image, "ext4", 256 << 20, &["-O", "^has_journal"]);
    let Some(fs) = fs else { return };
    let storage = Storage::new(None, Some(&fs.mount));
    let server = storage.start();
    let held = storage.attach(&server);
    let mut client = held.open(&server, 1);
    let before = told(&client);
    client.write(0, &[7; 4096]).unwrap();
    client.flush().unwrap();
    let filler = File::create(thin.0.0.join("filler")).unwrap();
    while filler.write_at(&[1; 4096], filler.metadata().unwrap().len()).is_ok() {}
    for block in 1..200 {
        client.write(block * 4096, &[8; 4096]).unwrap();
    }
    drop(client);
    server.kill();
    rustix::fs::sync();
    drop(filler);
    std::fs::remove_file(thin.0.0.join("filler")).unwrap();
    let server = storage.start();
    let mut client = held.open(&server, 2);
    assert_ne!(told(&client), before);
    server.log_with("file system has failed to write something back");
    // What the page cache had is not what the disk has: the old bytes are read, or none, and they stay what they are.
    let read = client.read(4096, 4096).unwrap();
    let mut again = vec![0; 4096];
    let file = File::open(storage.volume_file()).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    file.read_exact_at(&mut again, 4096).unwrap();
    assert!(read == again, "a reader was given what the disk does not have");
}

/// A file system in memory, of its own size.
struct Tmpfs(support::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Self {
        let dir = support::TempDir::new();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", dir.0.to_str().unwrap()]);
        Self(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0.0).status();
    }
}
