//! Block devices and raw files that are adopted: served as they are, by the real volserver to NBD clients, and never changed but by
//! those. What needs root and loop devices says so where they are not.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests, as the next one; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;
mod volserver;

use std::fs::File;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::error_reason as reason;
use proto::export_name::{AttachmentExportName, ExportDescription, Secret};
use proto::nbd::transmission::{Command as NbdCommand, CommandFlags, NbdError};
use proto::v1;
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use client::Client;
use support::{run, skip, tool, wait_until};
use volserver::{Volserver, attach_request, command};

const MIB: u64 = 1 << 20;

/// A server's directory, and one beside it of which everything may be adopted.
struct Node {
    dir: tempfile::TempDir,
    /// Without links, as what is given has to be.
    images: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let images = std::fs::canonicalize(dir.path()).unwrap().join("images");
        std::fs::create_dir(&images).unwrap();
        Self { dir, images, runtime: tokio::runtime::Runtime::new().unwrap() }
    }

    fn start(&self) -> Volserver {
        let mut command = command(&self.dir.path().join("data"));
        command.arg("--adopt-allow").arg(&self.images).args(["--adopt-allow", "/dev"]);
        Volserver::start_with(command, &self.dir.path().join("log"))
    }

    /// A file with bytes that differ from place to place.
    fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.images.join(name);
        std::fs::write(&path, pattern(bytes)).unwrap();
        path
    }

    fn adopt(&self, server: &Volserver, name: &str, path: &Path) -> Result<v1::Volume, Status> {
        let adopt_path = path.to_str().unwrap().to_owned();
        let request = v1::CreateVolumeRequest { name: name.to_owned(), adopt_path, ..Default::default() };
        let created = self.runtime.block_on(async { server.client().await.create_volume(request).await });
        created.map(tonic::Response::into_inner)
    }

    fn volume(&self, server: &Volserver, name: &str) -> v1::Volume {
        let request = v1::GetVolumeRequest { name: name.to_owned(), ..Default::default() };
        self.runtime.block_on(async { server.client().await.get_volume(request).await }).unwrap().into_inner()
    }

    fn resize(&self, server: &Volserver, capacity_bytes: u64) -> Result<v1::Volume, Status> {
        let request =
            v1::ResizeVolumeRequest { name: "vol".to_owned(), capacity_bytes, ..Default::default() };
        let resized = self.runtime.block_on(async { server.client().await.resize_volume(request).await });
        resized.map(tonic::Response::into_inner)
    }

    fn delete(&self, server: &Volserver, name: &str) {
        let request = v1::DeleteVolumeRequest { name: name.to_owned(), ..Default::default() };
        let deleted = self.runtime.block_on(async { server.client().await.delete_volume(request).await });
        assert!(deleted.unwrap().into_inner().existed);
    }

    fn attach(&self, server: &Volserver) -> Held {
        let request = attach_request("vol", "node", false);
        let attached = self.runtime.block_on(async { server.client().await.attach_volume(request).await });
        let attached = attached.unwrap().into_inner();
        Held { attachment_id: attached.attachment.unwrap().attachment_id, secret: attached.secret }
    }

    fn detach(&self, server: &Volserver) {
        let request = v1::DetachVolumeRequest { volume_name: "vol".to_owned(), ..Default::default() };
        self.runtime.block_on(async { server.client().await.detach_volume(request).await }).unwrap();
    }
}

/// A client's right to the volume.
struct Held {
    attachment_id: String,
    secret: String,
}

impl Held {
    fn try_to_open(&self, server: &Volserver, epoch: u64) -> Option<Client> {
        let attachment_id = self.attachment_id.parse().unwrap();
        let secret = Secret::parse(&self.secret).unwrap();
        let name = AttachmentExportName { attachment_id, secret, epoch, slot: 0 };
        Client::open(server.data[0], &name.expose()).ok()
    }

    fn open(&self, server: &Volserver, epoch: u64) -> Client {
        self.try_to_open(server, epoch).unwrap_or_else(|| panic!("not opened: {}", server.log()))
    }
}

fn told(client: &Client) -> String {
    let description: ExportDescription = client.info.description.as_deref().unwrap().parse().unwrap();
    description.incarnation
}

fn pattern(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|at| (at / 512 % 251) as u8).collect()
}

fn is_same(path: &Path, expected: &[u8]) -> bool {
    let file = File::open(path).unwrap();
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    found == expected
}

/// What the error's details give as its reason, and what to do.
fn explained(status: &Status) -> (String, String) {
    let info = status.get_details_error_info().unwrap();
    (info.reason, info.metadata[reason::METADATA_NEXT].clone())
}

/// Held by each test with loop devices: their numbers are the machine's, and another's device may get one that was just let go of.
static LOOP_DEVICES: Mutex<()> = Mutex::new(());

fn loop_devices() -> MutexGuard<'static, ()> {
    // A test that failed has left nothing that the next one needs.
    LOOP_DEVICES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A loop device over an image, for as long as it is not dropped.
struct Loop {
    path: PathBuf,
}

impl Loop {
    /// `None`, with the reason said, where that cannot be made.
    fn new(image: &Path) -> Option<Self> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            skip("loop devices need root");
            return None;
        }
        let made = tool("losetup").args(["--find", "--show"]).arg(image).output().unwrap();
        if !made.status.success() {
            skip(&format!("no loop device: {}", String::from_utf8_lossy(&made.stderr)));
            return None;
        }
        Some(Self { path: String::from_utf8(made.stdout).unwrap().trim().into() })
    }

    fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach", self.text()]);
    }
}

#[test]
fn a_raw_file_is_served_as_it_is_and_left_as_it_is() {
    let node = Node::new();
    let image = node.image("disk.img", 4 * MIB);
    let server = node.start();
    let volume = node.adopt(&server, "vol", &image).unwrap();
    assert_eq!((volume.capacity_bytes, volume.block_size_bytes), (4 * MIB, 512));
    assert_eq!(
        (volume.backend(), volume.adopted_path.as_str()),
        (v1::Backend::Device, image.to_str().unwrap())
    );
    assert_eq!(volume.adopted_identity, "path");
    let again = node.adopt(&server, "vol", &image).unwrap();
    assert_eq!(again.volume_uid, volume.volume_uid);
    let held = node.attach(&server);
    let mut client = held.open(&server, 1);
    let incarnation = told(&client);
    let mut expected = pattern(4 * MIB);
    assert!(client.read(0, 4 << 20).unwrap() == expected);
    client.write(512, &[0xaa; 1024]).unwrap();
    client.flush().unwrap();
    expected[512..1536].fill(0xaa);
    client.call(NbdCommand::WriteZeroes, CommandFlags::NONE, MIB, 65536, &[]).unwrap();
    expected[1 << 20..][..65536].fill(0);
    client.call(NbdCommand::Trim, CommandFlags::NONE, 2 * MIB, 65536, &[]).unwrap();
    drop(client);
    server.kill();
    let server = node.start();
    let mut client = held.open(&server, 2);
    assert_eq!(told(&client), incarnation, "a killed server has forgotten nothing");
    expected[2 << 20..][..65536].copy_from_slice(&client.read(2 * MIB, 65536).unwrap());
    assert!(client.read(0, 4 << 20).unwrap() == expected);
    drop(client);
    node.detach(&server);
    node.delete(&server, "vol");
    assert!(is_same(&image, &expected), "what was deleted is the volume");
    node.adopt(&server, "vol", &image).unwrap();
}

#[test]
fn what_cannot_be_adopted_is_refused_with_the_reason() {
    let node = Node::new();
    let image = node.image("disk.img", MIB);
    let outside = node.dir.path().join("outside.img");
    std::fs::write(&outside, pattern(MIB)).unwrap();
    symlink(&image, node.images.join("link")).unwrap();
    symlink(node.dir.path(), node.images.join("way-out")).unwrap();
    node.image("odd.img", 1000);
    node.image("empty.img", 0);
    let server = node.start();
    let locked = File::open(&image).unwrap();
    flock(&locked, FlockOperation::LockExclusive).unwrap();
    let give = format!("give {}", image.display());
    let cases = [
        (outside.as_path(), Code::PermissionDenied, reason::ADOPT_NOT_ALLOWED, "--adopt-allow"),
        (&node.images.join("link"), Code::FailedPrecondition, reason::ADOPT_UNSUITABLE, give.as_str()),
        (
            &node.images.join("way-out/outside.img"),
            Code::FailedPrecondition,
            reason::ADOPT_UNSUITABLE,
            "give ",
        ),
        (&node.images.join("none.img"), Code::FailedPrecondition, reason::ADOPT_UNSUITABLE, "look whether"),
        (&node.images.join("../images/disk.img"), Code::FailedPrecondition, reason::ADOPT_UNSUITABLE, "path"),
        (&node.images, Code::FailedPrecondition, reason::ADOPT_UNSUITABLE, "path"),
        (Path::new("/dev/null"), Code::FailedPrecondition, reason::ADOPT_UNSUITABLE, "path"),
        (&node.images.join("odd.img"), Code::FailedPrecondition, reason::ADOPT_UNSUITABLE, "path"),
        (&node.images.join("empty.img"), Code::FailedPrecondition, reason::ADOPT_UNSUITABLE, "path"),
        (&image, Code::FailedPrecondition, reason::ADOPTED_IN_USE, "unmount"),
    ];
    for (path, code, word, next) in cases {
        let status = node.adopt(&server, "vol", path).unwrap_err();
        let (found, told) = explained(&status);
        assert_eq!((status.code(), found.as_str()), (code, word), "{}: {status}", path.display());
        assert!(told.contains(next), "{}: {told}", path.display());
    }
    drop(locked);
    node.adopt(&server, "vol", &image).unwrap();
    let (found, told) = explained(&node.adopt(&server, "other", &image).unwrap_err());
    assert_eq!(found, reason::ADOPTED_IN_USE);
    assert!(told.contains("use the volume vol"), "{told}");
}

#[test]
fn without_a_word_for_it_nothing_is_adopted() {
    let node = Node::new();
    let image = node.image("disk.img", MIB);
    let server = Volserver::start(&node.dir.path().join("data"));
    assert_eq!(node.adopt(&server, "vol", &image).unwrap_err().code(), Code::PermissionDenied);
}

#[test]
fn a_block_device_is_served_past_the_page_cache_to_one_server_alone() {
    let _alone = loop_devices();
    let node = Node::new();
    let image = node.image("backing.img", 8 * MIB);
    let Some(device) = Loop::new(&image) else { return };
    let server = node.start();
    let volume = node.adopt(&server, "vol", &device.path).unwrap();
    assert_eq!((volume.capacity_bytes, volume.block_size_bytes), (8 * MIB, 512));
    assert_eq!(volume.adopted_identity, "", "what is below a loop device may be another");
    let held = node.attach(&server);
    let mut client = held.open(&server, 1);
    server.log_with("block device, past the page cache");
    let mut expected = pattern(8 * MIB);
    for (offset, length) in [(512u64, 512usize), (MIB, 1 << 20)] {
        client.write(offset, &vec![0x5a; length]).unwrap();
        expected[offset as usize..][..length].fill(0x5a);
    }
    client.call(NbdCommand::Write, CommandFlags::FUA, 4096, 512, &[7; 512]).unwrap();
    expected[4096..4608].fill(7);
    client.call(NbdCommand::WriteZeroes, CommandFlags::NO_HOLE, 3 * MIB, 65536, &[]).unwrap();
    client.call(NbdCommand::WriteZeroes, CommandFlags::NONE, 4 * MIB, 65536, &[]).unwrap();
    expected[3 << 20..][..65536].fill(0);
    expected[4 << 20..][..65536].fill(0);
    client.call(NbdCommand::Trim, CommandFlags::NONE, 7 * MIB, 512, &[]).unwrap();
    client.flush().unwrap();
    expected[7 << 20..][..512].copy_from_slice(&client.read(7 * MIB, 512).unwrap());
    assert!(client.read(0, 8 << 20).unwrap() == expected);
    assert!(is_same(&image, &expected), "flushed: the device below has it");

    let excl = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL;
    let claim = || rustix::fs::open(&device.path, excl, rustix::fs::Mode::empty()).map(drop);
    assert_eq!(claim(), Err(rustix::io::Errno::BUSY), "nobody mounts it meanwhile");
    drop(client);
    server.kill();
    let server = node.start();
    let mut client = held.open(&server, 2);
    assert!(client.read(0, 8 << 20).unwrap() == expected);
    drop(client);
    node.detach(&server);
    node.delete(&server, "vol");
    claim().unwrap();
    assert!(is_same(&device.path, &expected), "every byte is left");
}

#[test]
fn what_others_wrote_to_a_device_while_no_server_had_it_is_noticed() {
    let _alone = loop_devices();
    for is_written in [false, true] {
        let node = Node::new();
        let image = node.image("backing.img", 3 * MIB);
        let Some(device) = Loop::new(&image) else { return };
        let server = node.start();
        node.adopt(&server, "vol", &device.path).unwrap();
        let held = node.attach(&server);
        let mut client = held.open(&server, 1);
        let before = told(&client);
        client.write(0, &[1; 4096]).unwrap();
        client.flush().unwrap();
        drop(client);
        server.stop(Signal::TERM);
        if is_written {
            let file = File::options().write(true).open(&device.path).unwrap();
            file.write_all_at(&[2; 4096], 0).unwrap();
            file.sync_all().unwrap();
        }
        // As udev does whenever a device was open for writing.
        let times = File::open(&device.path).unwrap();
        times.set_modified(std::time::SystemTime::now()).unwrap();
        let server = node.start();
        if is_written {
            assert!(held.try_to_open(&server, 2).is_none(), "another volume than its holder knows");
            server.log_with("was written to while no server had it open");
        } else {
            assert_eq!(told(&held.open(&server, 2)), before);
        }
    }
}

#[test]
fn a_device_that_is_mounted_or_claimed_is_refused_with_its_holder() {
    let _alone = loop_devices();
    let node = Node::new();
    let image = node.image("backing.img", 16 * MIB);
    let Some(device) = Loop::new(&image) else { return };
    if !support::is_installed("mkfs.ext4") {
        return skip("no mkfs.ext4");
    }
    run("mkfs.ext4", &["-q", device.text()]);
    let mount = node.dir.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let mounted = tool("mount").arg(&device.path).arg(&mount).output().unwrap();
    if !mounted.status.success() {
        return skip(&format!("an ext4 cannot be mounted: {}", String::from_utf8_lossy(&mounted.stderr)));
    }
    let server = node.start();
    let status = node.adopt(&server, "vol", &device.path);
    run("umount", &[mount.to_str().unwrap()]);
    let status = status.unwrap_err();
    assert_eq!(explained(&status).0, reason::ADOPTED_IN_USE);
    let at = format!("mounted at {}", std::fs::canonicalize(&mount).unwrap().display());
    assert!(status.message().contains(&at), "{status}");
    let claimed = rustix::fs::open(
        &device.path,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::EXCL,
        rustix::fs::Mode::empty(),
    );
    assert_eq!(explained(&node.adopt(&server, "vol", &device.path).unwrap_err()).0, reason::ADOPTED_IN_USE);
    drop(claimed);
    node.adopt(&server, "vol", &device.path).unwrap();
}

#[test]
fn a_device_without_an_identity_is_the_one_at_its_path_of_its_size() {
    let _alone = loop_devices();
    let node = Node::new();
    let (image, other) = (node.image("backing.img", 5 * MIB), node.image("other.img", 7 * MIB));
    let Some(device) = Loop::new(&image) else { return };
    let path = device.path.clone();
    let server = node.start();
    node.adopt(&server, "vol", &path).unwrap();
    let held = node.attach(&server);
    let before = told(&held.open(&server, 1));
    server.stop(Signal::TERM);
    drop(device);

    // Gone, and there under another number: nothing tells that it is the same.
    let Some(first) = Loop::new(&other) else { return };
    let Some(moved) = Loop::new(&image) else { return };
    if first.path != path {
        return skip("somebody else took the loop device's number");
    }
    let server = node.start();
    assert!(held.try_to_open(&server, 2).is_none());
    server.log_with("another device is at");
    let (word, next) = explained(&node.resize(&server, 8 * MIB).unwrap_err());
    assert_eq!(word, reason::ADOPTED_SIZE);
    assert!(next.contains("ask for the 7340032 bytes that it has"), "{next}");
    let problem = node.volume(&server, "vol").adopted_problem;
    assert!(problem.contains("one of 7340032 bytes, not one of 5242880 bytes"), "{problem}");
    server.stop(Signal::TERM);
    drop((first, moved));

    let server = node.start();
    assert!(held.try_to_open(&server, 3).is_none(), "there is nothing, or nothing of that size");
    server.stop(Signal::TERM);
    // Back at its path.
    run("losetup", &[path.to_str().unwrap(), image.to_str().unwrap()]);
    let back = Loop { path };
    let server = node.start();
    let client = held.open(&server, 4);
    assert_ne!(told(&client), before, "who had something unflushed is told that the device was away");
    server.log_with("the device was taken away and has come back");
    drop(client);
    drop(server);
    drop(back);
}

#[test]
fn the_size_of_a_device_is_followed() {
    let _alone = loop_devices();
    let node = Node::new();
    let image = node.image("backing.img", 4 * MIB);
    let Some(device) = Loop::new(&image) else { return };
    let server = node.start();
    node.adopt(&server, "vol", &device.path).unwrap();
    let held = node.attach(&server);
    let mut client = held.open(&server, 1);
    assert_eq!(client.info.size_bytes, 4 * MIB);
    let (word, next) = explained(&node.resize(&server, 8 * MIB).unwrap_err());
    assert_eq!(word, reason::ADOPTED_SIZE);
    assert!(next.contains("make the device that large"), "{next}");

    let set_size = |bytes: u64| {
        File::options().write(true).open(&image).unwrap().set_len(bytes).unwrap();
        run("losetup", &["--set-capacity", device.text()]);
    };
    set_size(8 * MIB);
    assert_eq!(node.volume(&server, "vol").capacity_bytes, 8 * MIB);
    wait_until("its client is sent away, to come again", || client.is_closed_by_server());
    let mut client = held.open(&server, 1);
    assert_eq!(client.info.size_bytes, 8 * MIB);
    client.write(7 * MIB, &[1; 4096]).unwrap();
    assert_eq!(node.resize(&server, 8 * MIB).unwrap().capacity_bytes, 8 * MIB);

    // At once where the device says so, and also before anybody has looked.
    set_size(6 * MIB);
    assert_eq!(client.write(7 * MIB, &[2; 4096]), Err(NbdError::Eio as u32));
    assert_eq!(client.read(7 * MIB, 4096), Err(NbdError::Eio as u32));
    assert_eq!(client.read(5 * MIB, 4096).map(|read| read.len()), Ok(4096));
    let shrunk = node.volume(&server, "vol");
    assert_eq!(shrunk.capacity_bytes, 8 * MIB, "what a client knows is not taken back");
    assert!(
        shrunk.adopted_problem.contains("has 6291456 bytes, and had 8388608"),
        "{}",
        shrunk.adopted_problem
    );
    client.write(MIB, &[3; 4096]).unwrap();
    client.flush().unwrap();
    set_size(8 * MIB);
    assert_eq!(node.volume(&server, "vol").adopted_problem, "");
    client.write(7 * MIB, &[4; 4096]).unwrap();
    drop(client);
    server.stop(Signal::TERM);

    set_size(6 * MIB);
    let server = node.start();
    assert!(held.try_to_open(&server, 2).is_none());
    set_size(8 * MIB);
    drop(held.open(&server, 3));
}

#[test]
fn a_raw_file_that_grew_while_no_server_ran_is_as_large_as_it_is() {
    let node = Node::new();
    let image = node.image("disk.img", 4 * MIB);
    let server = node.start();
    node.adopt(&server, "vol", &image).unwrap();
    let held = node.attach(&server);
    drop(held.open(&server, 1));
    server.kill();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(8 * MIB + 100).unwrap();
    let server = node.start();
    let mut client = held.open(&server, 2);
    assert_eq!(client.info.size_bytes, 8 * MIB, "in whole blocks");
    file.set_len(2 * MIB).unwrap();
    assert!(node.volume(&server, "vol").adopted_problem.contains("has 2097152 bytes"));
    assert_eq!(client.write(4 * MIB, &[1; 4096]), Err(NbdError::Eio as u32));
    assert_eq!(file.metadata().unwrap().len(), 2 * MIB, "it is not made longer by a write");
    client.write(MIB, &[1; 4096]).unwrap();
}
