//! Images that are to boot: imported as they are, and found on the disk by the kernel as by a firmware.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::StorageNode;

pub(crate) const TESTS: &[Test] =
    &[Test::new("images::a_bootable_image_has_its_partitions", a_bootable_image_has_its_partitions)
        .within(300)];

/// Where the partitions lie, in MiB: as a cloud image has them, a small one for the boot loader and one for the system.
const SYSTEM_START_MIB: u64 = 4;
const SYSTEM_MIB: u64 = 16;

/// A disk with a GPT for sectors of 512 bytes, whose second partition is an ext4 with `tree` in it.
fn image(directory: &Path, tree: &Path) -> Result<PathBuf> {
    let (disk, system) = (directory.join("disk.img"), directory.join("system.img"));
    sh(&format!(
        "truncate -s {}M {disk}
         printf 'label: gpt\\nsize=2M, type=21686148-6449-6E6F-744E-656564454649\\nstart={}, size={SYSTEM_MIB}M, type=L, name=system\\n' \
             | sfdisk --quiet {disk}
         truncate -s {SYSTEM_MIB}M {system}
         mkfs.ext4 -q -L system -d {tree} {system}
         dd if={system} of={disk} bs=1M seek={SYSTEM_START_MIB} conv=notrunc,sparse status=none",
        SYSTEM_START_MIB + SYSTEM_MIB + 2,
        SYSTEM_START_MIB * 2048,
        disk = disk.display(),
        system = system.display(),
        tree = tree.display(),
    ))?;
    Ok(disk)
}

fn a_bootable_image_has_its_partitions(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let (tree, at) = (env.directory.join("tree"), env.directory.join("at"));
    fs::create_dir_all(tree.join("etc"))?;
    fs::create_dir(&at)?;
    let os_release = "NAME=\"a small system\"\n";
    fs::write(tree.join("etc/os-release"), os_release)?;
    let random = crate::direct::random_bytes(3 << 20);
    fs::write(tree.join("vmlinuz"), &random)?;
    let disk = image(&env.directory, &tree)?;
    let imported = node
        .program("volctl")
        .arg("import")
        .arg(&disk)
        .args(["system-1", "--create"])
        .env("XDG_STATE_HOME", env.directory.join("state"))
        .output()?;
    let told = String::from_utf8_lossy(&imported.stderr);
    ensure!(imported.status.success(), "{told}");
    let device = node.attach(&["system-1"])?;
    let sector = sh(&format!("blockdev --getss {}", device.display()))?;
    ensure!(sector.trim() == "512", "the table is made for 512 bytes, and the disk has {sector}");
    let partition = |number: u32| PathBuf::from(format!("{}p{number}", device.display()));
    wait_for("the partitions", Duration::from_secs(60), || {
        Ok((partition(1).exists() && partition(2).exists()).then_some(()))
    })?;
    for (number, sectors) in [(1, 2 * 2048), (2, SYSTEM_MIB * 2048)] {
        let device = partition(number);
        ensure!(fs::metadata(&device)?.file_type().is_block_device(), "{}", device.display());
        let told = sh(&format!("blockdev --getsz {}", device.display()))?;
        ensure!(told.trim() == sectors.to_string(), "{}: {told} sectors", device.display());
    }
    sh(&format!("e2fsck -fn {}", partition(2).display()))?;
    run("mount", &[&partition(2), &at])?;
    ensure!(fs::read_to_string(at.join("etc/os-release")).context("os-release")? == os_release);
    ensure!(fs::read(at.join("vmlinuz"))? == random, "what was in the image is not in the file");
    fs::write(at.join("written"), "and it can be written to")?;
    run("umount", &[&at])?;
    node.detach("system-1")?;
    // What was made for other sectors is told.
    node.volctl(&["create", "plain", "--size", "32M"])?.succeeded()?;
    let refused = node
        .program("volctl")
        .arg("import")
        .arg(&disk)
        .arg("plain")
        .env("XDG_STATE_HOME", env.directory.join("state"))
        .output()?;
    let told = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(5) && told.contains("GPT for sectors of 512 bytes"), "{told}");
    Ok(())
}
