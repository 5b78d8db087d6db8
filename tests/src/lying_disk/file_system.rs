//! An XFS on a lying disk, through the kernel's NBD client, and its way through a power cut.
//!
//! Owns the disk, its `/dev/nbdN` and the mount. The user starts and kills what works on it; [`LyingFileSystem::power_cycle`]
//! needs every such process gone. Never repairs the file system: XFS itself recovers its log when it is mounted again.
//!
//! ```text
//!   cut power (requests fail) → user kills processes → umount → nbd-client -d → contents lose power → connect → mount
//! ```
//! The kernel NBD client has a timeout and the disk answers EIO while it has no power, so nothing here sleeps forever.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::{Losses, LyingDisk, SECTOR_BYTES};
use crate::harness::{Env, Lacking};
use crate::shell::{run, wait_for};

/// What mkfs.xfs accepts (300 MiB) and some room; the disk is sparse.
const DISK_BYTES: u64 = 512 << 20;

/// `nbds_max` of the driver unless told otherwise.
const NBD_DEVICES: u32 = 16;

/// A request that takes longer is given up by the kernel: far beyond what a loaded emulated machine needs.
const REQUEST_TIMEOUT_SECONDS: u32 = 60;

/// A killed process may keep the mount busy until its last I/O has failed.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(30);

/// The kernel takes the device down, or brings it up, within this.
const CONNECT_DEADLINE: Duration = Duration::from_secs(30);

/// An XFS on a disk that lies; unmounted and disconnected when dropped.
pub struct LyingFileSystem {
    disk: LyingDisk,
    device: PathBuf,
    mount_point: PathBuf,
}

impl LyingFileSystem {
    /// Makes the disk, an XFS on it, and mounts that at a new directory below the test's.
    ///
    /// # Errors
    /// There is no NBD driver ([`Lacking`]), every device is in use, or a tool failed.
    pub fn make(env: &Env) -> Result<Self> {
        load_drivers()?;
        let mount_point = env.directory.join("lying");
        fs::create_dir(&mount_point)?;
        let made = Self { disk: LyingDisk::start(DISK_BYTES)?, device: free_device()?, mount_point };
        made.connect()?;
        run("mkfs.xfs", &["-q", "-f", path_text(&made.device)?])?;
        made.mount()?;
        Ok(made)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// The disk under it, to cut the power of.
    pub fn disk(&self) -> &LyingDisk {
        &self.disk
    }

    /// Cuts the power if that has not happened yet, and brings the disk back with what `seed` leaves on it. No process may
    /// have a file open here.
    ///
    /// # Errors
    /// It cannot be unmounted, disconnected, connected or mounted again in time. That XFS does not recover is an error of
    /// the tests' disk or of XFS, not of volnode: it says so.
    pub fn power_cycle(&self, seed: u64) -> Result<Losses> {
        self.disk.cut_power();
        self.unmount()?;
        self.disconnect()?;
        let losses = self.disk.restore_power(seed)?;
        self.connect()?;
        self.mount().context("XFS does not recover from the power cut")?;
        Ok(losses)
    }

    fn connect(&self) -> Result<()> {
        let address = self.disk.address();
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        let (sector_bytes, timeout) = (SECTOR_BYTES.to_string(), REQUEST_TIMEOUT_SECONDS.to_string());
        let device = path_text(&self.device)?;
        run("nbd-client", &["-N", "lying", "-b", &sector_bytes, "-t", &timeout, &ip, &port, device])?;
        let has_size = || Ok((size_bytes(&self.device) == DISK_BYTES).then_some(()));
        wait_for("the NBD device to have its size", CONNECT_DEADLINE, has_size)
    }

    /// Takes the device down; with that the kernel forgets what it cached of it.
    fn disconnect(&self) -> Result<()> {
        run("nbd-client", &["-d", path_text(&self.device)?])?;
        let is_free = || Ok((!is_connected(&self.device) && size_bytes(&self.device) == 0).then_some(()));
        wait_for("the NBD device to be disconnected", CONNECT_DEADLINE, is_free)
    }

    fn mount(&self) -> Result<()> {
        run("mount", &["-t", "xfs", path_text(&self.device)?, path_text(&self.mount_point)?]).map(drop)
    }

    fn unmount(&self) -> Result<()> {
        let mut last_words = String::new();
        let unmounted =
            wait_for("umount", UNMOUNT_DEADLINE, || match run("umount", &[path_text(&self.mount_point)?]) {
                Ok(_) => Ok(Some(())),
                Err(error) => {
                    last_words = format!("{error:#}");
                    Ok(None)
                }
            });
        unmounted.with_context(|| last_words)
    }
}

impl Drop for LyingFileSystem {
    fn drop(&mut self) {
        // Without power nothing is written back, and nothing can wait for it.
        self.disk.cut_power();
        let device = self.device.to_string_lossy();
        let is_mounted = fs::read_to_string("/proc/self/mounts")
            .is_ok_and(|mounts| mounts.lines().any(|line| line.split(' ').next() == Some(&device)));
        let unmounted = if is_mounted { self.unmount() } else { Ok(()) };
        let disconnected = if is_connected(&self.device) { self.disconnect() } else { Ok(()) };
        for error in [unmounted, disconnected].into_iter().filter_map(Result::err) {
            println!("taking the lying disk down: {error:#}");
        }
    }
}

/// Loads what is not built into the kernel.
fn load_drivers() -> Result<()> {
    if !Path::new("/dev/nbd0").exists() {
        run("modprobe", &["nbd"]).map_err(|error| Lacking(format!("the kernel's NBD client ({error:#})")))?;
    }
    let has_xfs = fs::read_to_string("/proc/filesystems")?.lines().any(|line| line.trim() == "xfs");
    if !has_xfs {
        run("modprobe", &["xfs"]).map_err(|error| Lacking(format!("XFS ({error:#})")))?;
    }
    Ok(())
}

fn free_device() -> Result<PathBuf> {
    for number in 0..NBD_DEVICES {
        let device = PathBuf::from(format!("/dev/nbd{number}"));
        if device.exists() && !is_connected(&device) {
            return Ok(device);
        }
    }
    bail!("every one of the {NBD_DEVICES} NBD devices is in use")
}

/// A connected device has a `pid` in sysfs, that of the program that connected it.
fn is_connected(device: &Path) -> bool {
    sysfs(device).join("pid").exists()
}

fn size_bytes(device: &Path) -> u64 {
    let sectors = fs::read_to_string(sysfs(device).join("size")).unwrap_or_default();
    sectors.trim().parse::<u64>().map_or(0, |sectors| sectors * SECTOR_BYTES as u64)
}

fn sysfs(device: &Path) -> PathBuf {
    Path::new("/sys/block").join(device.file_name().unwrap_or_default())
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
