//! Disks of the storage machine that are adopted as volumes: known by what they are, whatever their names, and served as they are.
//!
//! The scratch disk has a serial; device mapper gives devices with a UUID of ours, which grow and change their numbers. What takes
//! loop devices or files is in `server/tests/adopted.rs`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testlab::harness::{Env, Test};
use testlab::shell::{run, wait_for};
use testlab::storage_node::StorageNode;

use crate::fio;

pub(crate) const TESTS: &[Test] = &[
    Test::new("adopted::a_disk_is_known_by_its_serial", a_disk_is_known_by_its_serial).within(300),
    Test::new("adopted::a_mapped_device_is_known_by_its_uuid", a_mapped_device_is_known_by_its_uuid)
        .within(300),
];

/// A name in /dev that is taken away again.
struct DeviceName(PathBuf);

impl DeviceName {
    /// Another name of the device.
    fn new(path: &str, device: &Path) -> Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let number = std::fs::metadata(device)?.rdev();
        let (major, minor) = (rustix::fs::major(number).to_string(), rustix::fs::minor(number).to_string());
        run("mknod", &["-m", "600", path, "b", &major, &minor])?;
        Ok(Self(path.into()))
    }
}

impl Drop for DeviceName {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A part of a disk, by device mapper, until it is dropped.
struct Mapped {
    name: &'static str,
}

impl Mapped {
    fn new(name: &'static str, uuid: &str, disk: &Path, mib: u32) -> Result<Self> {
        run("dmsetup", &["create", name, "--uuid", uuid, "--table", &table(disk, mib)])?;
        Ok(Self { name })
    }

    /// As the kernel calls it.
    fn path(&self) -> Result<PathBuf> {
        let minor = run("dmsetup", &["info", "-c", "--noheadings", "-o", "minor", self.name])?;
        Ok(format!("/dev/dm-{}", minor.trim()).into())
    }

    fn grow(&self, disk: &Path, mib: u32) -> Result<()> {
        run("dmsetup", &["load", self.name, "--table", &table(disk, mib)])?;
        run("dmsetup", &["resume", self.name]).map(drop)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = run("dmsetup", &["remove", "--retry", self.name]);
    }
}

fn table(disk: &Path, mib: u32) -> String {
    format!("0 {} linear {} 0", u64::from(mib) << 11, disk.display())
}

fn start(env: &Env) -> Result<StorageNode> {
    StorageNode::start_with(env, &env.directory.join("data"), &["--adopt-allow", "/dev"])
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

fn adopt(node: &StorageNode, path: &Path) -> Result<Value> {
    let created =
        node.volctl(&["create", "vol-1", "--adopt", text(path)?, "--output", "json"])?.succeeded()?;
    Ok(serde_json::from_str(&created)?)
}

fn shown(node: &StorageNode) -> Result<Value> {
    Ok(serde_json::from_str(&node.volctl(&["show", "vol-1", "--output", "json"])?.succeeded()?)?)
}

fn a_disk_is_known_by_its_serial(env: &Env) -> Result<()> {
    let disk = env.scratch_disk()?;
    let mut node = start(env)?;
    let name = DeviceName::new("/dev/lab-adopted", disk)?;
    let volume = adopt(&node, &name.0)?;
    ensure!(volume["adopted_identity"] == "serial:lab-scratch", "{volume}");
    ensure!(volume["backend"] == "device" && volume["adopted_path"] == "/dev/lab-adopted", "{volume}");
    let device = node.attach(&["vol-1"])?;
    fio::verify_mostly_small(&device, 32, 16)?;
    let mount = node.volctl(&["create", "vol-2", "--adopt", text(&device)?])?.failed_with(5)?;
    ensure!(mount.contains("a disk of volnode's own client"), "{mount}");
    let claimed = run("mkfs.ext4", &["-q", "-F", text(disk)?]);
    ensure!(claimed.is_err(), "somebody else has the device of a volume that is served");
    // The disk waits for its server, which finds the device under another name.
    node.kill_server()?;
    drop(name);
    node.start_server()?;
    fio::verify_mostly_small(&device, 32, 16)?;
    let volume = shown(&node)?;
    ensure!(volume["adopted_path"] == text(disk)? && volume["adopted_problem"] == "", "{volume}");
    node.detach("vol-1")?;
    node.volctl(&["delete", "vol-1"])?.succeeded()?;
    run("mkfs.ext4", &["-q", "-F", text(disk)?]).map(drop)
}

fn a_mapped_device_is_known_by_its_uuid(env: &Env) -> Result<()> {
    let disk = env.scratch_disk()?;
    run("modprobe", &["dm-mod"])?;
    let mut node = start(env)?;
    let mapped = Mapped::new("lab-adopted", "LAB-adopted", disk, 64)?;
    let refused = node.volctl(&["create", "vol-1", "--adopt", text(disk)?])?.failed_with(5)?;
    ensure!(refused.contains("is in use by the device dm-"), "{refused}");
    let path = mapped.path()?;
    let volume = adopt(&node, &path)?;
    ensure!(volume["adopted_identity"] == "dm-uuid:LAB-adopted", "{volume}");
    let device = node.attach(&["vol-1"])?;
    fio::verify_mostly_small(&device, 16, 16)?;
    mapped.grow(disk, 96)?;
    ensure!(shown(&node)?["capacity_bytes"] == 96 << 20, "{}", shown(&node)?);
    node.detach("vol-1")?;
    let device = node.attach(&["vol-1"])?;
    let bytes = run("blockdev", &["--getsize64", text(&device)?])?;
    ensure!(bytes.trim() == (96 << 20).to_string(), "{bytes}");
    node.detach("vol-1")?;
    node.kill_server()?;
    // Another number, and so another name.
    wait_for("nobody has it", Duration::from_secs(30), || {
        Ok(run("dmsetup", &["remove", "lab-adopted"]).ok())
    })?;
    let first = Mapped::new("lab-other", "LAB-other", disk, 8)?;
    let again = Mapped::new("lab-adopted", "LAB-adopted", disk, 96)?;
    ensure!(again.path()? != path, "the device has its number again");
    node.start_server()?;
    let device = node.attach(&["vol-1"])?;
    fio::verify_mostly_small(&device, 16, 16)?;
    ensure!(shown(&node)?["adopted_path"] == text(&again.path()?)?, "{}", shown(&node)?);
    node.detach("vol-1")?;
    node.volctl(&["delete", "vol-1"])?.succeeded()?;
    node.kill_server()?;
    drop((first, again, mapped));
    Ok(())
}
