//! Real file systems live on the device: made, filled, checked, compared, trimmed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::seed;
use testlab::shell::{run, sh};
use testlab::storage_node::StorageNode;

use crate::direct;
use crate::ride_through::write_and_sync;

pub(crate) const TESTS: &[Test] = &[
    Test::new("file_systems::ext4_keeps_a_tree_across_detach", ext4_keeps_a_tree_across_detach).within(400),
    Test::new("file_systems::xfs_keeps_a_tree_across_detach", xfs_keeps_a_tree_across_detach).within(400),
    Test::new("file_systems::fstrim_frees_the_servers_space", fstrim_frees_the_servers_space).within(300),
    Test::new("file_systems::zeroed_ranges_read_back_as_zeroes", zeroed_ranges_read_back_as_zeroes)
        .within(300),
];

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
    let tree = Tree { seed: seed::choose()? };
    let (link, at) = (link.display(), mount_point.display());
    sh(&format!("{mkfs} {link}; mount {link} {at}"))?;
    tree.write(&mount_point)?;
    sh(&format!("umount {at}; {fsck} {link} >&2"))?;
    node.detach("vol-1")?;
    node.attach(&["vol-1"])?;
    sh(&format!("{fsck} {link} >&2; mount {link} {at}"))?;
    let checked = tree.check(&mount_point);
    run("umount", &[&mount_point])?;
    checked?;
    node.detach("vol-1")
}

/// Small files in many directories, as in a tree of sources, and a large one; all of it follows from the seed.
struct Tree {
    seed: u64,
}

impl Tree {
    const FILES: usize = 760;
    const DIRECTORIES: usize = 30;
    /// Sizes are spread evenly over the powers of two below.
    const SMALL_BYTES_LOG2_MAX: u32 = 17;
    const LARGE_BYTES: usize = 24 << 20;

    /// The files' names and contents.
    fn files(&self) -> impl Iterator<Item = (PathBuf, Vec<u8>)> {
        let mut random = fastrand::Rng::with_seed(self.seed);
        (0..=Self::FILES).map(move |number| {
            let (name, length_bytes) = match number {
                Self::FILES => ("large".to_owned(), Self::LARGE_BYTES),
                _ => {
                    let log2 = random.u32(0..=Self::SMALL_BYTES_LOG2_MAX);
                    // Now and then one directory inside another.
                    let directory = random.usize(0..Self::DIRECTORIES);
                    let inside = if directory.is_multiple_of(5) { "more/" } else { "" };
                    (format!("tree/{directory}/{inside}{number}"), random.usize(0..1 << log2))
                }
            };
            let mut bytes = vec![0; length_bytes];
            random.fill(&mut bytes);
            (PathBuf::from(name), bytes)
        })
    }

    fn write(&self, root: &Path) -> Result<()> {
        for (name, bytes) in self.files() {
            let file = root.join(name);
            fs::create_dir_all(file.parent().context("a file's directory")?)?;
            fs::write(&file, bytes).with_context(|| file.display().to_string())?;
        }
        Ok(())
    }

    /// Reads everything and compares it with what was written.
    fn check(&self, root: &Path) -> Result<()> {
        for (name, bytes) in self.files() {
            let file = root.join(name);
            let found = fs::read(&file).with_context(|| file.display().to_string())?;
            ensure!(found == bytes, "{} is another one", file.display());
        }
        Ok(())
    }
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
    let large_file = mount_point.join("large");
    let (device, mount_point) = (device.display(), mount_point.display());
    sh(&format!("mkfs.ext4 -q {device}; mount {device} {mount_point}"))?;
    write_and_sync(&large_file, &direct::random_bytes(64 << 20))?;
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
    let mut expected = vec![b'x'; 64 << 20];
    direct::write(&device, 0, &expected)??;
    // Zeroed in the middle by WRITE_ZEROES (fallocate without and with unmapping) and by DISCARD.
    sh(&format!(
        "blkdiscard -z -o 8M -l 8M {0}; fallocate -z -o 24M -l 4M {0}; fallocate -p -o 32M -l 4M {0}",
        device.display()
    ))?;
    for mib in [8..16, 24..28, 32..36] {
        expected[mib.start << 20..mib.end << 20].fill(0);
    }
    ensure!(
        direct::read(&device, 0, expected.len())?? == expected,
        "not zeroes where they belong and only there"
    );
    let file = node.volume_file("vol-1")?;
    let before = allocated_bytes(&file)?;
    run("blkdiscard", &[&device])?;
    let after = allocated_bytes(&file)?;
    ensure!(after < before / 4, "{before} bytes before discarding everything, {after} after");
    node.detach("vol-1")
}
