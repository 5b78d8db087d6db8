//! Everybody else's programs: NBD clients on our server, our client on their servers.
//!
//! The clients that need no kernel driver are also tested without a VM, in `server/tests`; here the kernel's own client
//! and a disk of ours on other people's servers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::{StorageNode, mount_xfs};

use crate::direct;
use crate::ride_through::{BOUND, wait_for_state, write_and_sync};

pub(crate) const TESTS: &[Test] = &[
    Test::new("foreign::the_kernels_nbd_client_verifies_on_our_server", the_kernels_nbd_client)
        .within(300)
        .once(),
    Test::new("foreign::nbdcopy_and_qemu_agree_with_our_server", nbdcopy_and_qemu).within(300).once(),
    Test::new("foreign::our_disk_on_nbdkit_verifies", our_disk_on_nbdkit).within(300),
    Test::new("foreign::our_disk_on_a_unix_socket_verifies", our_disk_on_a_unix_socket).once().within(300),
    Test::new("foreign::our_disk_on_qemu_nbd_verifies", our_disk_on_qemu_nbd).once().within(300),
    Test::new("foreign::a_one_shot_servers_disk_survives_an_upgrade", a_one_shot_server).once().within(300),
    Test::new("foreign::a_dead_process_of_a_one_shot_servers_disk_is_replaced", a_dead_process)
        .once()
        .within(300),
    Test::new("foreign::a_write_that_lands_late_was_told_to_have_failed", a_write_that_lands_late)
        .within(300),
];

/// Writes and verifies 16 MiB of checksummed blocks with fsyncs.
fn verify(device: &str) -> Result<()> {
    let filename = format!("--filename={device}");
    let arguments = [
        "--name=verify",
        &filename,
        "--size=16M",
        "--direct=1",
        "--ioengine=libaio",
        "--rw=randwrite",
        "--bsrange=4k-256k",
        "--blockalign=4k",
        "--iodepth=8",
        "--fsync=16",
        "--verify=crc32c",
        "--verify_fatal=1",
    ];
    run("fio", &arguments).map(drop)
}

fn the_kernels_nbd_client(env: &Env) -> Result<()> {
    let data_dir = mount_xfs(env)?.join("data");
    let node = StorageNode::start_with(env, &data_dir, &["--export-by-name"])?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let (host, port) = node.data_address.rsplit_once(':').context("data address")?;
    run("modprobe", &["nbd"])?;
    run("nbd-client", &["-N", "vol-1", "-b", "4096", host, port, "/dev/nbd0"])?;
    let used = verify("/dev/nbd0").and_then(|()| {
        sh("mkfs.ext4 -q /dev/nbd0; e2fsck -fn /dev/nbd0; blkdiscard -z /dev/nbd0; cmp -n 4194304 /dev/nbd0 /dev/zero")
    });
    run("nbd-client", &["-d", "/dev/nbd0"])?;
    used.map(drop)
}

fn nbdcopy_and_qemu(env: &Env) -> Result<()> {
    let data_dir = mount_xfs(env)?.join("data");
    let node = StorageNode::start_with(env, &data_dir, &["--export-by-name"])?;
    node.volctl(&["create", "vol-1", "--size", "32M"])?.succeeded()?;
    let uri = format!("nbd://{}/vol-1", node.data_address);
    let directory = env.directory.display();
    sh(&format!(
        "cd {directory}; dd if=/dev/urandom of=in bs=1M count=32 status=none; nbdinfo {uri}; nbdinfo --list nbd://{address}; \
         nbdcopy in {uri}; nbdcopy {uri} out; cmp in out; qemu-img info {uri}; qemu-img compare -f raw -F raw in {uri}; \
         qemu-io -f raw -c 'write -P 7 1M 64k' -c 'write -f -P 8 2M 4k' -c flush -c 'read -P 7 1M 64k' -c 'read -P 8 2M 4k' \
         -c 'write -z 1M 64k' -c 'read -P 0 1M 64k' -c 'discard 4M 1M' {uri}",
        address = node.data_address
    ))?;
    // The same volume as a disk of ours holds the same bytes, and is not for others to write meanwhile.
    let device = node.attach(&["vol-1"])?;
    let refused = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &uri]).output()?;
    ensure!(!refused.status.success(), "a by-name client wrote to an attached volume");
    sh(&format!("nbdcopy {uri} {directory}/out; cmp {directory}/out {}", device.display()))?;
    node.detach("vol-1")
}

fn our_disk_on_nbdkit(env: &Env) -> Result<()> {
    let arguments = ["-f", "-i", "127.0.0.1", "-p", "10999", "memory", "64M"];
    on_foreign_server(env, "nbdkit", &arguments, "nbd://127.0.0.1:10999/")
}

fn our_disk_on_a_unix_socket(env: &Env) -> Result<()> {
    let socket = env.directory.join("nbd.sock");
    let socket = socket.to_string_lossy();
    let uri = format!("nbd+unix:///?socket={socket}");
    on_foreign_server(env, "nbdkit", &["-f", "-U", &socket, "memory", "64M"], &uri)
}

fn our_disk_on_qemu_nbd(env: &Env) -> Result<()> {
    let image = env.directory.join("image");
    let image = image.to_string_lossy();
    run("truncate", &["-s", "64M", &image])?;
    let arguments =
        ["-f", "raw", "-b", "127.0.0.1", "-p", "10998", "-x", "disk", "-t", "--discard=unmap", &image];
    on_foreign_server(env, "qemu-nbd", &arguments, "nbd://127.0.0.1:10998/disk")
}

fn on_foreign_server(env: &Env, server: &str, arguments: &[&str], uri: &str) -> Result<()> {
    let node = StorageNode::start(env)?;
    let server = Server::start(server, arguments)?;
    let device = attach_when_there(&node, uri)?;
    let device = device.as_str();
    ensure!(Path::new(device).exists(), "{device}");
    verify(device)?;
    sh(&format!("mkfs.ext4 -q {device}; e2fsck -fn {device}; blkdiscard {device}; blkdiscard -z {device}"))?;
    sh(&format!("cmp -n 4194304 {device} /dev/zero"))?;
    node.detach(uri)?;
    drop(server);
    Ok(())
}

/// An ext4 with a file on it that is on the server.
fn mount_with_file(device: &str, mount_point: &Path) -> Result<Vec<u8>> {
    fs::create_dir_all(mount_point)?;
    sh(&format!("mkfs.ext4 -q {device}; mount {device} {}", mount_point.display()))?;
    let bytes = direct::random_bytes(2 << 20);
    write_and_sync(&mount_point.join("before"), &bytes)?;
    Ok(bytes)
}

/// Writes to a file system, and compares what was written with what is on the disk.
fn goes_on(device: &str, mount_point: &Path, before: &[u8]) -> Result<()> {
    let bytes = direct::random_bytes(2 << 20);
    write_and_sync(&mount_point.join("after"), &bytes)?;
    run("umount", &[mount_point])?;
    sh(&format!("e2fsck -fn {device}; mount {device} {}", mount_point.display()))?;
    ensure!(fs::read(mount_point.join("before"))? == before, "the former file is another one");
    ensure!(fs::read(mount_point.join("after"))? == bytes, "the new file is another one");
    run("umount", &[mount_point]).map(drop)
}

/// Nobody knows what the server kept while no process of ours looked. The first FLUSH may have waited for one that failed with the former
/// process, and the second tells of it.
fn is_told(device: &Path) -> Result<()> {
    for which in ["first", "second"] {
        ensure!(direct::flush(device).is_err(), "the {which} FLUSH tells nobody that something may be lost");
    }
    Ok(())
}

/// Servers that end with their last client, or take a single one: the disk has another process, or the upgrade is refused and
/// says why; in either case it serves.
fn a_one_shot_server(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let image = env.directory.join("image");
    let image = image.to_string_lossy();
    run("truncate", &["-s", "64M", &image])?;
    let qemu_nbd = |options: &[&'static str]| -> Vec<String> {
        let own = ["-f", "raw", "-b", "127.0.0.1", "-x", "disk"];
        own.iter().chain(options).copied().chain([&*image]).map(str::to_owned).collect()
    };
    let nbdkit = ["-f", "-i", "127.0.0.1", "-p", "10996", "--filter=limit", "memory", "64M", "limit=1"];
    let cases = [
        ("qemu-nbd", qemu_nbd(&["-p", "10994"]), "nbd://127.0.0.1:10994/disk", false),
        ("qemu-nbd", qemu_nbd(&["-p", "10995", "-e", "2"]), "nbd://127.0.0.1:10995/disk", true),
        ("nbdkit", nbdkit.map(str::to_owned).to_vec(), "nbd://127.0.0.1:10996/", false),
    ];
    for (program, arguments, uri, can_upgrade) in cases {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let server = Server::start(program, &arguments)?;
        let device = attach_one_when_there(&node, uri)?;
        let mount_point = env.directory.join("mnt");
        let before = mount_with_file(&device, &mount_point)?;
        if can_upgrade {
            // FLUSHes are going to fail, which would end the journal.
            run("umount", &[&mount_point])?;
        }
        let pid = node.attachment(uri)?["pid"].clone();
        let upgraded = node.volctl(&["upgrade", uri])?;
        println!("{program}: {upgraded:?}");
        if can_upgrade {
            upgraded.succeeded()?;
        } else {
            let complaint = upgraded.failed_with(5)?;
            ensure!(complaint.contains("takes no other connection"), "{complaint}");
        }
        ensure!((node.attachment(uri)?["pid"] != pid) == can_upgrade, "{}", node.attachment(uri)?);
        if can_upgrade {
            is_told(Path::new(&device))?;
            run("mount", &[device.as_ref(), mount_point.as_os_str()])?;
        }
        goes_on(&device, &mount_point, &before)?;
        ensure!(node.attachment(uri)?["state"] == "live", "{}", node.attachment(uri)?);
        node.detach(uri)?;
        drop(server);
    }
    Ok(())
}

/// Nobody holds the server meanwhile. It ends, the disk waits and says for what, and goes on when there is a server again.
fn a_dead_process(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let image = env.directory.join("image");
    let image = image.to_string_lossy();
    run("truncate", &["-s", "64M", &image])?;
    let (arguments, uri) = (
        ["-f", "raw", "-b", "127.0.0.1", "-p", "10993", "-x", "disk", &*image],
        "nbd://127.0.0.1:10993/disk",
    );
    let server = Server::start("qemu-nbd", &arguments)?;
    let device = PathBuf::from(attach_one_when_there(&node, uri)?);
    let before = direct::random_bytes(1 << 20);
    direct::write(&device, 0, &before)??;
    direct::flush(&device)?;
    let pid = node.attachment(uri)?["pid"].as_u64().context("pid")?;
    run("kill", &["-9", &pid.to_string()])?;
    let reason = wait_for("a process that has no server", BOUND, || {
        let attachment = node.attachment(uri)?;
        let is_another = attachment["pid"] != pid && attachment["pid"] != 0;
        let reason = attachment["state_reason"].as_str().unwrap_or_default();
        let is_told = reason.contains("cannot reach the server at 127.0.0.1:10993");
        Ok((is_another && attachment["state"] == "stalled" && is_told).then(|| reason.to_owned()))
    })?;
    println!("{reason}");
    drop(server);
    let server = Server::start("qemu-nbd", &arguments)?;
    wait_for_state(&node, uri, "live", BOUND)?;
    ensure!(direct::read(&device, 0, before.len())?? == before, "it holds something else");
    is_told(&device)?;
    let after = direct::random_bytes(1 << 20);
    direct::write(&device, 1 << 20, &after)??;
    direct::flush(&device)?;
    ensure!(direct::read(&device, 1 << 20, after.len())?? == after, "it holds something else");
    node.detach(uri)?;
    drop(server);
    Ok(())
}

/// A WRITE is in the server's hands when the device process dies, and lands after a later one has been answered. Whoever sent it was told
/// that it failed: were it sent again, it would succeed, and the former copy would come on top of the later WRITE.
fn a_write_that_lands_late(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let (directory, uri) = (env.directory.display(), "nbd://127.0.0.1:10992/");
    let (hold, held, landed) =
        (env.directory.join("hold"), env.directory.join("held"), env.directory.join("landed"));
    let write = format!("dd of={directory}/image oflag=seek_bytes seek=$4 conv=notrunc status=none");
    let pwrite = format!(
        "pwrite=if rmdir {directory}/hold 2>/dev/null; then cat >{directory}/bytes; mkdir {directory}/held; \
         while [ -d {directory}/held ]; do sleep 0.1; done; {write} <{directory}/bytes; mkdir {directory}/landed; \
         else {write}; fi"
    );
    let pread =
        format!("pread=dd if={directory}/image iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none");
    sh(&format!("truncate -s 8M {directory}/image"))?;
    let (size, threads) = ("get_size=echo 8388608", "thread_model=echo parallel");
    let eval = ["-f", "-i", "127.0.0.1", "-p", "10992", "eval", size, threads, "flush=true", &pread, &pwrite];
    let server = Server::start("nbdkit", &eval)?;
    let device = PathBuf::from(attach_one_when_there(&node, uri)?);
    let (former, later) = (direct::random_bytes(4096), direct::random_bytes(4096));
    let pid = node.attachment(uri)?["pid"].as_u64().context("pid")?;
    fs::create_dir(&hold)?;
    let told = std::thread::scope(|scope| {
        let writer = scope.spawn(|| direct::write(&device, 0, &former));
        wait_for("a WRITE in the server's hands", BOUND, || Ok(held.exists().then_some(())))?;
        run("kill", &["-9", &pid.to_string()])?;
        writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    direct::write(&device, 0, &later)??;
    fs::remove_dir(&held)?;
    wait_for("the former WRITE, late", BOUND, || Ok(landed.exists().then_some(())))?;
    ensure!(direct::read(&device, 0, former.len())?? == former, "it did not land: nothing was tried");
    ensure!(
        direct::unless_eio(told)?.is_none(),
        "nobody was told of a WRITE that came on top of a later one"
    );
    is_told(&device)?;
    direct::write(&device, 0, &later)??;
    direct::flush(&device)?;
    ensure!(direct::read(&device, 0, later.len())?? == later, "it holds something else");
    node.detach(uri)?;
    drop(server);
    Ok(())
}

/// Attaches, over a single connection, what a server serves that is still starting.
fn attach_one_when_there(node: &StorageNode, uri: &str) -> Result<String> {
    attach_as_when_there(node, &[uri, "--queues", "1", "--connections", "1"])
}

/// Attaches what a server serves that is still starting: the disk's path.
pub(crate) fn attach_when_there(node: &StorageNode, uri: &str) -> Result<String> {
    attach_as_when_there(node, &[uri])
}

fn attach_as_when_there(node: &StorageNode, arguments: &[&str]) -> Result<String> {
    let uri = arguments.first().context("no URI")?;
    // An attach that finds nobody takes longer than the server takes to start.
    wait_for("a foreign server that listens", Duration::from_secs(60), || Ok(is_served(uri)?.then_some(())))?;
    wait_for("the foreign server", Duration::from_secs(60), || {
        let attached = node.volctl(&[&["attach"], arguments].concat())?;
        // One that came up while the daemon looked for the cause is not called unreachable, but was.
        let unreachable = attached.exit_code == 6 || attached.stderr.contains("Connection refused");
        if unreachable { Ok(None) } else { attached.succeeded().map(|device| Some(device.trim().to_owned())) }
    })
}

/// Whether there is a server for that URI on this machine.
fn is_served(uri: &str) -> Result<bool> {
    if let Some((_, socket)) = uri.split_once("?socket=") {
        return Ok(Path::new(socket).exists());
    }
    let port = uri.rsplit_once(':').and_then(|(_, rest)| rest.split('/').next()?.parse().ok());
    is_listened_on(port.with_context(|| format!("{uri} has no port"))?)
}

/// Whether somebody listens on that port of this machine; seen without calling, which some servers take for their only client.
fn is_listened_on(port: u16) -> Result<bool> {
    const LISTENING: &str = "0A";
    let table = fs::read_to_string("/proc/net/tcp")?;
    let is_it = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let local_port = fields.next().and_then(|address| address.rsplit_once(':')).map(|(_, port)| port);
        local_port.is_some_and(|local| u16::from_str_radix(local, 16) == Ok(port))
            && fields.nth(1) == Some(LISTENING)
    };
    Ok(table.lines().any(is_it))
}

/// A foreign server, killed in the end.
pub(crate) struct Server(Child);

impl Server {
    /// Starts it; whether it serves is seen when something is attached.
    pub(crate) fn start(program: &str, arguments: &[&str]) -> Result<Self> {
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| program.to_owned())?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let killed = self.0.kill().and_then(|()| self.0.wait());
        if let Err(error) = killed {
            println!("killing a foreign server: {error}");
        }
    }
}
