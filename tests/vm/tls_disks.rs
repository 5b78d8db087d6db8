//! Disks over TLS: every data path with the kernel's records and with a relay's, on our server and on other people's, and
//! the kernel's own client on ours.
//!
//! That the records really were the kernel's is what its own counters say (/proc/net/tls_stat). What needs no block
//! device is tested without a VM, in `proto/tls/tests`, `server/tests` and `client/tests`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::{NodeTls, StorageNode};
use tls::test_authority::Authority;

use crate::fio::verify_mostly_small;
use crate::foreign::{Server, attach_when_there};
use crate::ride_through::{BOUND, wait_for_state};

pub(crate) const TESTS: &[Test] = &[
    Test::new("tls_disks::every_data_path_verifies_with_the_kernel_s_records", by_the_kernel).within(420),
    Test::new("tls_disks::every_data_path_verifies_with_a_relay_s_records", by_a_relay).within(420),
    Test::new("tls_disks::several_queues_and_connections_verify", several_queues).within(300),
    Test::new("tls_disks::our_disk_on_nbdkit_verifies", our_disk_on_nbdkit).within(300),
    Test::new("tls_disks::our_disk_on_qemu_nbd_verifies", our_disk_on_qemu_nbd).once().within(300),
    Test::new("tls_disks::the_kernels_nbd_client_verifies_on_our_server", the_kernels_nbd_client).within(300),
    Test::new("tls_disks::keys_that_have_served_long_enough_are_replaced", worn_keys).within(300),
    Test::new("tls_disks::the_end_of_the_server_is_the_end_of_the_disk", the_end_of_the_server),
    Test::new("tls_disks::certificates_may_lie_on_another_file_system", on_another_file_system).once(),
    Test::new("tls_disks::a_certificate_of_another_node_gets_no_disk", another_node).once(),
];

/// The group ffdhe2048 of RFC 7919. A qemu-nbd whose folder has none looks for a large prime of its own before it listens, which
/// takes an emulated processor half a minute; TLS 1.3 has no use for it.
const DH_PARAMETERS: &str = "\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
";

const BY_KERNEL: &str = "tls by the kernel";
const BY_RELAY: &str = "tls in user space";

/// Certificates for a server and for the node of [`StorageNode`].
struct Certificates {
    authority: Authority,
    tls: NodeTls,
}

impl Certificates {
    fn new(env: &Env, client_names: &[&str], user_space_only: bool) -> Self {
        let authority = Authority::new();
        let server = authority.issue(&env.directory.join("server-tls"), &[]);
        let client = authority.issue(&env.directory.join("client-tls"), client_names);
        Self { authority, tls: NodeTls { server, client, user_space_only } }
    }

    /// For a node that makes its own volumes.
    fn of_node(env: &Env, user_space_only: bool) -> Self {
        Self::new(env, &["volnode:node/node-1", "volnode:manage"], user_space_only)
    }
}

/// A counter of the kernel's TLS.
fn tls_stat(name: &str) -> Result<u64> {
    const PATH: &str = "/proc/net/tls_stat";
    let text = fs::read_to_string(PATH).context(PATH)?;
    let line =
        text.lines().find(|line| line.split_whitespace().next() == Some(name)).context(name.to_owned())?;
    line.split_whitespace().nth(1).context(PATH)?.parse().context(PATH)
}

fn by_the_kernel(env: &Env) -> Result<()> {
    let certificates = Certificates::of_node(env, false);
    let node = StorageNode::start_over_tls(env, certificates.tls, &[])?;
    node.volctl(&["create", "vol-1", "--size", "32M", "--backend", "memory"])?.succeeded()?;
    for data_path in env.series.data_paths() {
        verify_on(&node, data_path.as_str(), BY_KERNEL).with_context(|| format!("on {data_path}"))?;
    }
    ensure!(tls_stat("TlsDecryptError")? == 0, "records that could not be decrypted");
    Ok(())
}

fn by_a_relay(env: &Env) -> Result<()> {
    let certificates = Certificates::of_node(env, true);
    let node = StorageNode::start_over_tls(env, certificates.tls, &[])?;
    node.volctl(&["create", "vol-1", "--size", "32M", "--backend", "memory"])?.succeeded()?;
    for data_path in env.series.data_paths() {
        verify_on(&node, data_path.as_str(), BY_RELAY).with_context(|| format!("on {data_path}"))?;
    }
    Ok(())
}

fn verify_on(node: &StorageNode, data_path: &str, encryption: &str) -> Result<()> {
    let device = node.attach(&["vol-1", "--data-path", data_path])?;
    let attachment = node.attachment("vol-1")?;
    ensure!(attachment["data_path"] == data_path && attachment["encryption"] == encryption, "{attachment}");
    let connections = attachment["nr_connections"].as_u64().context("nr_connections")?;
    expect_sessions(if encryption == BY_KERNEL { connections } else { 0 })?;
    verify_mostly_small(&device, 12, 16)?;
    ensure!(node.attachment("vol-1")?["state"] == "live");
    node.detach("vol-1")
}

/// The kernel does the records of so many connections now, of which it has both ends.
fn expect_sessions(connections: u64) -> Result<()> {
    for counter in ["TlsCurrTxSw", "TlsCurrRxSw"] {
        let sessions = tls_stat(counter)?;
        ensure!(sessions == 2 * connections, "{counter} {sessions} with {connections} connections");
    }
    Ok(())
}

fn several_queues(env: &Env) -> Result<()> {
    let certificates = Certificates::of_node(env, false);
    let node = StorageNode::start_over_tls(env, certificates.tls, &[])?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "2", "--connections", "4"])?;
    expect_sessions(4)?;
    verify_mostly_small(&device, 24, 32)?;
    sh(&format!(
        "mkfs.ext4 -q {device}; e2fsck -fn {device}; blkdiscard {device}",
        device = device.display()
    ))?;
    node.detach("vol-1")
}

fn our_disk_on_nbdkit(env: &Env) -> Result<()> {
    let certificates = Certificates::of_node(env, false);
    let folder = format!("--tls-certificates={}", certificates.tls.server.folder().display());
    let arguments = [
        "-f",
        "-i",
        "127.0.0.1",
        "-p",
        "10997",
        "--tls=require",
        "--tls-verify-peer",
        &folder,
        "memory",
        "64M",
    ];
    on_foreign_server(env, certificates.tls.clone(), "nbdkit", &arguments, "nbds://127.0.0.1:10997/")
}

fn our_disk_on_qemu_nbd(env: &Env) -> Result<()> {
    let certificates = Certificates::of_node(env, false);
    let image = env.directory.join("image");
    let image = image.to_string_lossy();
    run("truncate", &["-s", "64M", &image])?;
    fs::write(certificates.tls.server.folder().join("dh-params.pem"), DH_PARAMETERS)?;
    let folder = certificates.tls.server.folder().display();
    let credentials = format!("tls-creds-x509,id=tls0,dir={folder},endpoint=server,verify-peer=on");
    let arguments = [
        "-f",
        "raw",
        "-b",
        "127.0.0.1",
        "-p",
        "10996",
        "-x",
        "disk",
        "-t",
        "--discard=unmap",
        "--object",
        &credentials,
        "--tls-creds",
        "tls0",
        &image,
    ];
    on_foreign_server(env, certificates.tls.clone(), "qemu-nbd", &arguments, "nbds://127.0.0.1:10996/disk")
}

fn on_foreign_server(env: &Env, tls: NodeTls, server: &str, arguments: &[&str], uri: &str) -> Result<()> {
    let node = StorageNode::start_over_tls(env, tls, &[])?;
    let server = Server::start(server, arguments)?;
    let device = attach_when_there(&node, uri)?;
    let device = device.as_str();
    let attachment = node.attachment(uri)?;
    ensure!(attachment["encryption"] == BY_KERNEL, "{attachment}");
    verify_mostly_small(Path::new(device), 16, 16)?;
    sh(&format!(
        "mkfs.ext4 -q {device}; e2fsck -fn {device}; blkdiscard -z {device}; cmp -n 4194304 {device} /dev/zero"
    ))?;
    node.detach(uri)?;
    drop(server);
    Ok(())
}

fn the_kernels_nbd_client(env: &Env) -> Result<()> {
    let certificates = Certificates::of_node(env, false);
    let client = certificates.authority.issue(&env.directory.join("nbd-client"), &["volnode:volume/vol-1"]);
    let node = StorageNode::start_over_tls(env, certificates.tls, &["--export-by-name"])?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let (host, port) = node.data_address.rsplit_once(':').context("data address")?;
    if env.in_vm {
        run("modprobe", &["nbd"])?;
    }
    let file = |name: &str| client.folder().join(name).to_string_lossy().into_owned();
    let (cert, key, ca) = (file("client-cert.pem"), file("client-key.pem"), file("ca-cert.pem"));
    let tls = [
        "-enable-tls",
        "-certfile",
        &cert,
        "-keyfile",
        &key,
        "-cacertfile",
        &ca,
        "-tlshostname",
        "localhost",
    ];
    run("nbd-client", &[&["-N", "vol-1", "-b", "4096"][..], &tls, &[host, port, "/dev/nbd0"]].concat())?;
    let used = verify_mostly_small(Path::new("/dev/nbd0"), 8, 8)
        .and_then(|()| sh("mkfs.ext4 -q /dev/nbd0; e2fsck -fn /dev/nbd0"));
    run("nbd-client", &["-d", "/dev/nbd0"])?;
    used.map(drop)
}

fn worn_keys(env: &Env) -> Result<()> {
    let certificates = Certificates::of_node(env, false);
    let options = ["--tls-key-bytes-max", "2000000"];
    let node = StorageNode::start_over_tls_with(env, certificates.tls, &[], &options)?;
    let device = node.create_and_attach("vol-1", "32M", &[])?;
    // fio sees nothing of it; the looks are a second apart.
    for _ in 0..3 {
        verify_mostly_small(&device, 8, 8)?;
    }
    let attachment = node.attachment("vol-1")?;
    ensure!(attachment["encryption"] == BY_KERNEL, "{attachment}");
    ensure!(attachment["reconnects"].as_u64().is_some_and(|times| times > 0), "{attachment}");
    node.detach("vol-1")
}

fn the_end_of_the_server(env: &Env) -> Result<()> {
    let certificates = Certificates::of_node(env, false);
    let mut node = StorageNode::start_over_tls(env, certificates.tls, &[])?;
    node.volctl(&["create", "vol-1", "--size", "32M", "--backend", "memory"])?.succeeded()?;
    let device = node.attach(&["vol-1"])?;
    verify_mostly_small(&device, 4, 8)?;
    node.kill_server()?;
    // As without TLS: the read waits, and is told that the server which comes back has forgotten.
    let mut read = Command::new("dd")
        .arg(format!("if={}", device.display()))
        .args(["of=/dev/null", "iflag=direct", "bs=4k", "count=1"])
        .spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(read.try_wait()?.is_none(), "a read of a server that is gone did not wait");
    node.start_server()?;
    let ended = wait_for("the read to end", Duration::from_secs(30), || Ok(read.try_wait()?))?;
    ensure!(!ended.success(), "a read of what is gone succeeded");
    wait_for_state(&node, "vol-1", "failed", BOUND)?;
    node.detach("vol-1")?;
    ridden_through(&mut node)
}

/// A file volume's restart, over TLS.
fn ridden_through(node: &mut StorageNode) -> Result<()> {
    let device = node.create_and_attach("vol-2", "32M", &[])?;
    verify_mostly_small(&device, 4, 8)?;
    node.kill_server()?;
    node.start_server()?;
    verify_mostly_small(&device, 4, 8)?;
    ensure!(node.attachment("vol-2")?["reconnects"] != 0, "nobody noticed");
    node.detach("vol-2")
}

fn on_another_file_system(env: &Env) -> Result<()> {
    // A device process keeps only the mounts that it needs.
    let mount_point = env.directory.join("client-tls");
    fs::create_dir_all(&mount_point)?;
    run("mount", &["-t".as_ref(), "tmpfs".as_ref(), "certificates".as_ref(), mount_point.as_os_str()])?;
    let used = attach_and_detach(env);
    run("umount", &[mount_point.as_os_str()])?;
    used
}

fn attach_and_detach(env: &Env) -> Result<()> {
    let node = StorageNode::start_over_tls(env, Certificates::of_node(env, false).tls, &[])?;
    node.volctl(&["create", "vol-1", "--size", "32M", "--backend", "memory"])?.succeeded()?;
    let device = node.attach(&["vol-1"])?;
    verify_mostly_small(&device, 4, 8)?;
    node.detach("vol-1")
}

fn another_node(env: &Env) -> Result<()> {
    // It may call the API, but opens nothing that is attached to node-1.
    let certificates = Certificates::new(env, &["volnode:manage", "volnode:node/node-2"], false);
    let node = StorageNode::start_over_tls(env, certificates.tls, &[])?;
    node.volctl(&["create", "vol-1", "--size", "32M"])?.succeeded()?;
    let refused = node.volctl(&["attach", "vol-1"])?;
    ensure!(refused.exit_code != 0 && refused.stderr.contains("certificate"), "{refused:?}");
    Ok(())
}
