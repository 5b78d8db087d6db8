//! Everybody else's programs: NBD clients on our server, our client on their servers.
//!
//! The clients that need no kernel driver are also tested without a VM, in `server/tests`; here the kernel's own client
//! and a disk of ours on other people's servers.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::{StorageNode, mount_xfs};

pub(crate) const TESTS: &[Test] = &[
    Test::new("foreign::the_kernels_nbd_client_verifies_on_our_server", the_kernels_nbd_client)
        .within(300)
        .once(),
    Test::new("foreign::nbdcopy_and_qemu_agree_with_our_server", nbdcopy_and_qemu).within(300).once(),
    Test::new("foreign::our_disk_on_nbdkit_verifies", our_disk_on_nbdkit).within(300),
    Test::new("foreign::our_disk_on_qemu_nbd_verifies", our_disk_on_qemu_nbd).once().within(300),
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

/// Attaches what a server serves that is still starting: the disk's path.
pub(crate) fn attach_when_there(node: &StorageNode, uri: &str) -> Result<String> {
    let port = uri.rsplit_once(':').and_then(|(_, rest)| rest.split('/').next()?.parse().ok());
    let port = port.with_context(|| format!("{uri} has no port"))?;
    // An attach that finds nobody takes longer than the server takes to start.
    wait_for("a foreign server that listens", Duration::from_secs(60), || {
        Ok(is_listened_on(port)?.then_some(()))
    })?;
    wait_for("the foreign server", Duration::from_secs(60), || {
        let attached = node.volctl(&["attach", uri])?;
        // One that came up while the daemon looked for the cause is not called unreachable, but was.
        let unreachable = attached.exit_code == 6 || attached.stderr.contains("Connection refused");
        if unreachable { Ok(None) } else { attached.succeeded().map(|device| Some(device.trim().to_owned())) }
    })
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
