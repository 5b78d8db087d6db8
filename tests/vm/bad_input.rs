//! What must be refused is refused, says why and what to do next, and harms nothing.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rustix::io::Errno;
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh};
use testlab::storage_node::{StorageNode, mount_xfs};

use crate::direct;

pub(crate) const TESTS: &[Test] = &[
    Test::new("bad_input::volumes_that_cannot_be_are_refused", volumes_that_cannot_be_are_refused).once(),
    Test::new("bad_input::attach_and_detach_can_be_repeated", attach_and_detach_can_be_repeated),
    Test::new("bad_input::what_is_in_use_stays", what_is_in_use_stays).within(300),
    Test::new("bad_input::an_unreachable_server_is_named", an_unreachable_server_is_named).once(),
    Test::new("bad_input::a_full_server_fails_the_writer_only", a_full_server_fails_the_writer_only)
        .within(300),
];

/// volctl's exit codes, as `volctl --help` documents them.
pub(crate) mod exit_code {
    pub(crate) const USAGE: i32 = 2;
    pub(crate) const NOT_FOUND: i32 = 3;
    pub(crate) const ALREADY_EXISTS: i32 = 4;
    pub(crate) const PRECONDITION: i32 = 5;
    pub(crate) const UNREACHABLE: i32 = 6;
    pub(crate) const NO_SPACE: i32 = 8;
    pub(crate) const PASSPHRASE: i32 = 11;
}

fn volumes_that_cannot_be_are_refused(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let create = |name: &str, size: &str| node.volctl(&["create", name, "--size", size]);
    let long = "x".repeat(300);
    for (name, size) in [
        ("zero", "0"),
        ("uneven", "1000"),
        ("a/b", "1M"),
        (&long, "1M"),
        ("", "1M"),
        ("..", "1M"),
        ("vast", "9000000T"),
    ] {
        let refused = create(name, size)?;
        ensure!(refused.exit_code == exit_code::USAGE, "{name:?} of {size}: {refused:?}");
        ensure!(refused.stderr.starts_with("volctl: ") && refused.stdout.is_empty(), "{refused:?}");
    }
    create("vol-1", "1M")?.succeeded()?;
    create("vol-1", "1M")?.succeeded()?;
    create("vol-1", "2M")?.failed_with(exit_code::ALREADY_EXISTS)?;
    for command in [["show", "unknown"], ["attach", "unknown"]] {
        node.volctl(&command)?.failed_with(exit_code::NOT_FOUND)?;
    }
    let list = node.volctl(&["list", "--output", "json"])?.succeeded()?;
    let list: serde_json::Value = serde_json::from_str(&list)?;
    ensure!(list.as_array().is_some_and(|volumes| volumes.len() == 1), "{list}");
    Ok(())
}

fn attach_and_detach_can_be_repeated(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let before = devices()?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    ensure!(node.attach(&["vol-1"])? == device, "a second attach gives the same device");
    node.volctl(&["attach", "vol-1", "--read-only"])?.failed_with(exit_code::ALREADY_EXISTS)?;
    node.detach("vol-1")?;
    node.detach("vol-1")?;
    node.detach("never-there")?;
    ensure!(devices()? == before, "left behind: {:?}", devices()?);
    let link = node.device_dir.join("vol-1");
    ensure!(fs::symlink_metadata(&link).is_err(), "{} is left", link.display());

    let device = node.attach(&["vol-1", "--read-only"])?;
    let written = run("dd", &["if=/dev/zero", &format!("of={}", device.display()), "bs=4k", "count=1"]);
    ensure!(written.is_err(), "a read-only attachment was written");
    node.detach(&device.to_string_lossy())?;
    node.volctl(&["delete", "vol-1"])?.succeeded()?;
    node.volctl(&["delete", "vol-1"])?.succeeded().map(drop)
}

fn what_is_in_use_stays(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    node.volctl(&["delete", "vol-1"])?.failed_with(exit_code::PRECONDITION)?;
    let mount_point = env.directory.join("mnt");
    fs::create_dir(&mount_point)?;
    sh(&format!("mkfs.ext4 -q {0}; mount {0} {1}", device.display(), mount_point.display()))?;
    let refused = node.volctl(&["detach", "vol-1"])?.failed_with(exit_code::PRECONDITION)?;
    ensure!(refused.contains(&*mount_point.to_string_lossy()), "the holder is named: {refused}");
    // The refused detach changed nothing.
    fs::write(mount_point.join("file"), "still there")?;
    sh(&format!("sync -f {}", mount_point.display()))?;
    run("umount", &[&mount_point])?;

    let holder = fs::File::open(&device)?;
    let refused = node.volctl(&["detach", "vol-1"])?.failed_with(exit_code::PRECONDITION)?;
    ensure!(refused.contains(&std::process::id().to_string()), "the holder is named: {refused}");
    drop(holder);
    node.detach("vol-1")
}

fn an_unreachable_server_is_named(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    node.volctl(&["create", "vol-1", "--size", "1M"])?.succeeded()?;
    node.kill_server()?;
    let address = node.management_uri.trim_start_matches("http://").to_owned();
    for command in [&["list"][..], &["attach", "vol-1"]] {
        let refused = node.volctl(command)?.failed_with(exit_code::UNREACHABLE)?;
        ensure!(refused.contains(&address), "the server is named: {refused}");
    }
    let nobody = node.volctl(&["attach", "nbd://127.0.0.1:1/x"])?.failed_with(exit_code::UNREACHABLE)?;
    ensure!(nobody.contains("127.0.0.1:1"), "the server is named: {nobody}");
    node.kill_client()?;
    node.volctl(&["attachments"])?.failed_with(exit_code::UNREACHABLE)?;
    node.start_server()?;
    node.start_client()?;
    node.attach(&["vol-1"])?;
    node.detach("vol-1")
}

fn a_full_server_fails_the_writer_only(env: &Env) -> Result<()> {
    // A small file system inside the scratch disk's, so that it fills up quickly.
    let xfs = mount_xfs(env)?;
    let small = env.directory.join("small");
    fs::create_dir(&small)?;
    sh(&format!(
        "modprobe loop; truncate -s 320M {0}/image; mkfs.xfs -q {0}/image; mount -o loop {0}/image {1}",
        xfs.display(),
        small.display()
    ))?;
    let mut node = StorageNode::start_with(env, &small.join("data"), &[])?;
    let other = node.create_and_attach("other", "16M", &[])?;
    let others = vec![b'o'; 16 << 20];
    direct::write(&other, 0, &others)??;
    let device = node.create_and_attach("vol-1", "1G", &[])?;
    let piece = direct::random_bytes(1 << 20);
    let mut full = None;
    for mib in 0..600 {
        if let Err(error) = direct::write(&device, mib << 20, &piece)? {
            full = Some(error);
            break;
        }
    }
    let error = full.context("600 MiB fit on 320 MiB")?;
    let expected = [Errno::NOSPC, Errno::IO].map(|errno| Some(errno.raw_os_error()));
    ensure!(expected.contains(&error.raw_os_error()), "{error}");
    ensure!(node.server_is_alive()?, "the server died");
    ensure!(node.attachment("vol-1")?["state"] == "live", "{}", node.attachment("vol-1")?);
    // Nothing else is harmed: the other volume reads back, and is written where it has its space.
    ensure!(fs::read(&other)? == others, "the other volume is another one");
    // What is freed can be written again.
    run("blkdiscard", &[&device])?;
    direct::write(&device, 0, &piece.repeat(4))??;
    node.detach("vol-1")?;
    node.detach("other")?;
    node.volctl(&["delete", "vol-1"])?.succeeded().map(drop)
}

/// Every ublk device node there is.
fn devices() -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(Path::new("/dev"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("ublkb") || name.starts_with("ublkc") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
