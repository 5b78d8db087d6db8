//! What is in use stays: a detach without force is refused for as long as anybody uses the disk, whoever that is, names whom it
//! can, and leaves the disk as it was.

use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
    socketpair,
};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::StorageNode;

use crate::direct;
use crate::ride_through::{BOUND, wait_for_state, write_and_sync};

pub(crate) const TESTS: &[Test] = &[
    Test::new("in_use::a_second_disk_of_a_btrfs_stays", a_second_disk_of_a_btrfs).within(300),
    Test::new("in_use::an_external_journal_stays", an_external_journal).within(300),
    Test::new("in_use::what_another_device_is_made_of_stays", what_another_device_is_made_of).within(300),
    Test::new("in_use::what_the_machine_serves_to_others_stays", what_the_machine_serves).within(300),
    Test::new("in_use::a_claim_that_nothing_names_is_seen", a_claim_that_nothing_names).within(300),
    // Before Linux 6.18 the kernel tells nobody of it.
    Test::new("in_use::an_open_file_that_nothing_names_is_seen", an_open_file_that_nothing_names).once(),
    Test::new("in_use::what_a_dead_process_left_stays_while_it_is_used", what_a_dead_process_left),
    Test::new("in_use::a_detach_that_waits_for_the_disk_holds_nobody_up", a_detach_that_waits).within(300),
];

/// volctl's exit code for what is in use.
const IN_USE: i32 = 5;

/// Makes sure that the disk is not taken away and that the refusal says this.
fn stays(node: &StorageNode, target: &str, why: &str) -> Result<()> {
    let complaint = node.volctl(&["detach", target])?.failed_with(IN_USE)?;
    ensure!(complaint.contains(&format!("{target} is in use: ")), "{complaint}");
    ensure!(complaint.contains(why), "{why:?} is not in: {complaint}");
    ensure!(node.attachment(target)?["state"] == "live", "{}", node.attachment(target)?);
    Ok(())
}

/// Writes a file and finds it again on the disks, past the page cache.
fn works(mount_point: &Path) -> Result<()> {
    let (file, bytes) = (mount_point.join("file"), direct::random_bytes(4 << 20));
    write_and_sync(&file, &bytes)?;
    sh("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(fs::read(&file)? == bytes, "{} is another one", file.display());
    Ok(())
}

fn new_directory(env: &Env, name: &str) -> Result<PathBuf> {
    let path = env.directory.join(name);
    fs::create_dir(&path)?;
    Ok(path)
}

fn a_second_disk_of_a_btrfs(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let (first, second) =
        (node.create_and_attach("vol-1", "256M", &[])?, node.create_and_attach("vol-2", "256M", &[])?);
    let mount_point = new_directory(env, "mnt")?;
    let (one, two, at) = (first.display(), second.display(), mount_point.display());
    sh(&format!(
        "modprobe btrfs; mkfs.btrfs -q -f -d raid0 -m raid1 {one} {two}; mount -o device={one},device={two} {one} {at}"
    ))?;
    let named = format!("mounted on {at}");
    stays(&node, "vol-2", &named)?;
    stays(&node, "vol-1", &named)?;
    works(&mount_point)?;
    run("umount", &[&mount_point])?;
    node.detach("vol-2")?;
    node.detach("vol-1")
}

fn an_external_journal(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let (data, journal) =
        (node.create_and_attach("vol-1", "320M", &[])?, node.create_and_attach("vol-2", "128M", &[])?);
    let mount_point = new_directory(env, "mnt")?;
    let (data, journal, at) = (data.display(), journal.display(), mount_point.display());
    sh(&format!(
        "mke2fs -q -O journal_dev -b 4096 {journal}; mkfs.ext4 -q -b 4096 -J device={journal} {data}; mount {data} {at}"
    ))?;
    stays(&node, "vol-2", "journal")?;
    works(&mount_point)?;
    run("umount", &[&mount_point])?;
    sh(&format!("mkfs.xfs -q -f -l logdev={journal},size=64m,sectsize=4096 {data}"))?;
    sh(&format!("mount -o logdev={journal} {data} {at}"))?;
    stays(&node, "vol-2", &format!("journal of {at}"))?;
    works(&mount_point)?;
    run("umount", &[&mount_point])?;
    node.detach("vol-2")?;
    node.detach("vol-1")
}

fn what_another_device_is_made_of(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let disk = device.display();
    // No udev here, and so no name.
    let upper = sh(&format!(
        "modprobe dm_mod; dmsetup --noudevsync create upper --table '0 131072 linear {disk} 0'
         echo /dev/$(ls /sys/class/block/$(basename {disk})/holders)"
    ))?;
    let upper = stays(&node, "vol-1", "(upper)").and_then(|()| verify(Path::new(upper.trim())));
    run("dmsetup", &["--noudevsync", "remove", "--retry", "upper"])?;
    upper?;
    sh("modprobe loop")?;
    let loop_device = sh(&format!("losetup --find --show {disk}"))?;
    let loop_device = loop_device.trim();
    let looped = stays(&node, "vol-1", "(loop device)").and_then(|()| verify(Path::new(loop_device)));
    run("losetup", &["--detach", loop_device])?;
    looped?;
    verify(&device)?;
    node.detach("vol-1")
}

/// What is written is read again.
fn verify(device: &Path) -> Result<()> {
    let bytes = direct::random_bytes(1 << 20);
    direct::write(device, 1 << 20, &bytes)??;
    ensure!(direct::read(device, 1 << 20, bytes.len())?? == bytes, "{}", device.display());
    Ok(())
}

/// By the kernel's storage targets, two of which open it without a claim, and no process has it.
fn what_the_machine_serves(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    // As the comparison with NVMe/TCP wants the module that both share, which stays loaded.
    sh(
        "modprobe nvme_core multipath=N; modprobe nvmet; mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config",
    )?;
    let subsystem = Path::new("/sys/kernel/config/nvmet/subsystems/volnode-test");
    let namespace = subsystem.join("namespaces/1");
    fs::create_dir(subsystem)?;
    fs::create_dir(&namespace)?;
    fs::write(namespace.join("device_path"), device.to_string_lossy().as_bytes())?;
    fs::write(namespace.join("enable"), "1")?;
    let refused = stays(&node, "vol-1", "served by nvmet (volnode-test)");
    fs::write(namespace.join("enable"), "0")?;
    fs::remove_dir(&namespace)?;
    fs::remove_dir(subsystem)?;
    refused?;
    sh("modprobe -a target_core_mod target_core_file target_core_iblock")?;
    let core = Path::new("/sys/kernel/config/target/core");
    let as_file = format!("fd_dev_name={},fd_dev_size={}", device.display(), 64 << 20);
    let as_disk = format!("udev_path={}", device.display());
    for (adapter, control) in [("fileio_0", as_file), ("iblock_0", as_disk)] {
        let (adapter, object) = (core.join(adapter), core.join(adapter).join("volnode-test"));
        fs::create_dir(&adapter)?;
        fs::create_dir(&object)?;
        fs::write(object.join("control"), control)?;
        fs::write(object.join("enable"), "1")?;
        let refused = stays(&node, "vol-1", "volnode-test)");
        fs::remove_dir(&object)?;
        fs::remove_dir(&adapter)?;
        refused?;
    }
    verify(&device)?;
    node.detach("vol-1")
}

/// An open file that no /proc shows: it is under way in a socket.
struct OpenUnseen {
    _sockets: (OwnedFd, OwnedFd),
}

impl OpenUnseen {
    fn open(device: &Path, flags: OFlags) -> Result<Self> {
        let file = rustix::fs::open(device, OFlags::RDONLY | OFlags::CLOEXEC | flags, Mode::empty())
            .with_context(|| device.display().to_string())?;
        let sockets = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        ensure!(control.push(SendAncillaryMessage::ScmRights(&files)), "no room for a descriptor");
        sendmsg(&sockets.0, &[IoSlice::new(b"x")], &mut control, SendFlags::empty())?;
        Ok(Self { _sockets: sockets })
    }
}

/// A partition table with one partition of 16 MiB behind the first MiB, of a disk with sectors of 4096 bytes.
fn make_partition(device: &Path) -> Result<PathBuf> {
    let mut table = vec![0; 4096];
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 12].copy_from_slice(&256_u32.to_le_bytes());
    table[446 + 12..446 + 16].copy_from_slice(&4096_u32.to_le_bytes());
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    direct::write(device, 0, &table)??;
    run("blockdev", &["--rereadpt".as_ref(), device.as_os_str()])?;
    let partition = PathBuf::from(format!("{}p1", device.display()));
    wait_for("the partition", BOUND, || Ok(partition.exists().then_some(partition.clone())))
}

fn a_claim_that_nothing_names(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let partition = make_partition(&device)?;
    for claimed in [&device, &partition] {
        let claim = OpenUnseen::open(claimed, OFlags::EXCL)?;
        stays(&node, "vol-1", "kernel")?;
        verify(&device)?;
        drop(claim);
    }
    // Whoever has it for less than two seconds is waited for.
    let claim = OpenUnseen::open(&device, OFlags::EXCL)?;
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(700));
            drop(claim);
        });
        node.detach("vol-1")
    })?;
    ensure!(!device.exists(), "{} is left behind", device.display());
    Ok(())
}

fn an_open_file_that_nothing_names(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let open = OpenUnseen::open(&device, OFlags::empty())?;
    stays(&node, "vol-1", "kernel")?;
    verify(&device)?;
    drop(open);
    node.detach("vol-1")
}

/// Of a disk that nobody takes on any more: its process died while it took the disk away.
fn what_a_dead_process_left(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let pid = node.attachment("vol-1")?["pid"].as_u64().context("pid")?;
    let folder = fs::read_dir(node.run_dir.join("attachments"))?.next().context("no attachment")??.path();
    node.kill_client()?;
    run("kill", &["-9", &pid.to_string()])?;
    let status_file = folder.join("status.json");
    let mut status: serde_json::Value = serde_json::from_slice(&fs::read(&status_file)?)?;
    status["state"] = "stopping".into();
    fs::write(&status_file, status.to_string())?;
    node.start_client()?;
    ensure!(node.attachment("vol-1")?["state"] == "dead", "{}", node.attachment("vol-1")?);
    let claim = OpenUnseen::open(&device, OFlags::EXCL)?;
    let complaint = node.volctl(&["detach", "vol-1"])?.failed_with(IN_USE)?;
    ensure!(complaint.contains("vol-1 is in use: "), "{complaint}");
    ensure!(device.exists(), "it was taken away all the same");
    drop(claim);
    node.detach("vol-1")?;
    ensure!(!device.exists(), "{} is left behind", device.display());
    Ok(())
}

/// Who reads the partition table keeps everybody from opening, closing or taking away the disk, and here the server is gone. The
/// process that serves the disk must not wait with them, or nobody would bring the server back to them.
fn a_detach_that_waits(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    node.kill_server()?;
    wait_for_state(&node, "vol-1", "stalled", BOUND)?;
    let mut reader = Command::new("blockdev").arg("--rereadpt").arg(&device).stdin(Stdio::null()).spawn()?;
    wait_for("a reader in uninterruptible sleep", BOUND, || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", reader.id()))?;
        Ok(stat.contains(") D ").then_some(()))
    })?;
    let (mut detach, _lines) = node.volctl_lines(&["detach", "vol-1"])?;
    thread::sleep(Duration::from_secs(4));
    let started = Instant::now();
    node.start_server()?;
    let read = wait_for("the partition table", BOUND, || Ok(reader.try_wait()?));
    let detached = wait_for("the detach", BOUND, || Ok(detach.try_wait()?));
    println!("both ended {:.1?} after the server was back", started.elapsed());
    ensure!(read?.success(), "the partition table could not be read");
    // It had given up by then, or the disk is gone.
    match detached?.code() {
        Some(0) => ensure!(!device.exists(), "{} is left behind", device.display()),
        Some(IN_USE) => {
            verify(&device)?;
            node.detach("vol-1")?;
        }
        other => anyhow::bail!("exit code {other:?}"),
    }
    Ok(())
}
