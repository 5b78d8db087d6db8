//! Real file systems live on the device: made, filled, checked, compared, trimmed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh};
use testlab::storage_node::StorageNode;

pub(crate) const TESTS: &[Test] = &[
    Test::new("file_systems::ext4_keeps_a_tree_across_detach", ext4_keeps_a_tree_across_detach).within(400),
    Test::new("file_systems::xfs_keeps_a_tree_across_detach", xfs_keeps_a_tree_across_detach).within(400),
    Test::new("file_systems::fstrim_frees_the_servers_space", fstrim_frees_the_servers_space).within(300),
    Test::new("file_systems::zeroed_ranges_read_back_as_zeroes", zeroed_ranges_read_back_as_zeroes)
        .within(300),
];

/// A real tree of small and large files, in every VM: the C library's headers and programs.
const TREE: &str = "/usr/include/linux";

fn ext4_keeps_a_tree_across_detach(env: &Env) -> Result<()> {
    keeps_a_tree(env, "mkfs.ext4 -q", "e2fsck -fn")
}

fn xfs_keeps_a_tree_across_detach(env: &Env) -> Result<()> {
    keeps_a_tree(env, "mkfs.xfs -q", "xfs_repair -n")
}

fn keeps_a_tree(env: &Env, mkfs: &str, fsck: &str) -> Result<()> {
    let node = StorageNode::start_on_xfs(env)?;
    let device = node.create_and_attach("vol-1", "512M", &[])?;
    let link = node.device_dir.join("vol-1");
    ensure!(fs::canonicalize(&link)? == device, "{} is not {}", link.display(), device.display());
    let mount_point = env.directory.join("mnt");
    fs::create_dir(&mount_point)?;
    let (link, mount_point) = (link.display(), mount_point.display());
    let sums = env.directory.join("sums");
    sh(&format!(
        "{mkfs} {link}; mount {link} {mount_point}; cp -r {TREE} {mount_point}/tree; cd {mount_point}; \
         dd if=/dev/urandom of=large bs=1M count=24 status=none; find . -type f -print0 | sort -z | xargs -0 sha256sum \
         > {sums}; cd /; umount {mount_point}; {fsck} {link} >&2",
        sums = sums.display()
    ))?;
    let files = fs::read_to_string(&sums)?.lines().count();
    ensure!(files > 300, "a tree of {files} files is not much of a test");
    node.detach("vol-1")?;
    node.attach(&["vol-1"])?;
    sh(&format!(
        "{fsck} {link} >&2; mount {link} {mount_point}; cd {mount_point}; sha256sum --quiet --strict -c {sums}; cd /; \
         umount {mount_point}",
        sums = sums.display()
    ))?;
    node.detach("vol-1")
}

fn allocated_bytes(file: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(fs::metadata(file).with_context(|| file.display().to_string())?.blocks() * 512)
}

fn fstrim_frees_the_servers_space(env: &Env) -> Result<()> {
    let node = StorageNode::start_on_xfs(env)?;
    let device = node.create_and_attach("vol-1", "256M", &[])?;
    let file = node.volume_file("vol-1")?;
    let mount_point = env.directory.join("mnt");
    fs::create_dir(&mount_point)?;
    let (device, mount_point) = (device.display(), mount_point.display());
    sh(&format!(
        "mkfs.ext4 -q {device}; mount {device} {mount_point}; \
         dd if=/dev/urandom of={mount_point}/large bs=1M count=64 conv=fsync status=none"
    ))?;
    let before = allocated_bytes(&file)?;
    ensure!(before > 64 << 20, "{before} bytes in use after writing 64 MiB");
    sh(&format!("rm {mount_point}/large; sync; fstrim {mount_point}"))?;
    let after = allocated_bytes(&file)?;
    ensure!(after + (60 << 20) < before, "{before} bytes before fstrim, {after} after");
    run("umount", &[mount_point.to_string()])?;
    node.detach("vol-1")
}

fn zeroed_ranges_read_back_as_zeroes(env: &Env) -> Result<()> {
    let node = StorageNode::start_on_xfs(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let device = device.display();
    // Written, then zeroed in the middle by WRITE_ZEROES (fallocate without and with unmapping) and by DISCARD.
    sh(&format!(
        "head -c 64M /dev/zero | tr '\\0' x > /tmp/pattern; dd if=/tmp/pattern of={device} bs=1M oflag=direct status=none; \
         blkdiscard -z -o 8M -l 8M {device}; fallocate -z -o 24M -l 4M {device}; fallocate -p -o 32M -l 4M {device}; \
         dd if=/tmp/pattern of=/tmp/expected bs=1M status=none; \
         for range in '8 8' '24 4' '32 4'; do set -- $range; \
         dd if=/dev/zero of=/tmp/expected bs=1M seek=$1 count=$2 conv=notrunc status=none; done; \
         dd if={device} of=/tmp/found bs=1M iflag=direct status=none; cmp /tmp/expected /tmp/found; \
         rm /tmp/pattern /tmp/expected /tmp/found"
    ))?;
    let file = node.volume_file("vol-1")?;
    let before = allocated_bytes(&file)?;
    run("blkdiscard", &[device.to_string()])?;
    let after = allocated_bytes(&file)?;
    ensure!(after < before / 4, "{before} bytes before discarding everything, {after} after");
    node.detach("vol-1")
}
