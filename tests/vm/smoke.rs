//! What every other VM test takes for granted: the kernel asked for, its block drivers, a disk for O_DIRECT.
//!
//! If one of these fails, look here first.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, StatxFlags, statx};
use testlab::harness::{Env, Test};
use testlab::shell::run;

pub(crate) const TESTS: &[Test] = &[
    Test::new("smoke::the_kernel_is_of_the_series_asked_for", the_kernel_is_of_the_series_asked_for),
    Test::new("smoke::the_ublk_driver_loads", the_ublk_driver_loads),
    Test::new("smoke::the_block_and_file_system_drivers_load", the_block_and_file_system_drivers_load),
    Test::new("smoke::the_clock_agrees_with_the_host", the_clock_agrees_with_the_host),
    Test::new("smoke::loopback_carries_a_connection", loopback_carries_a_connection),
    Test::new(
        "smoke::xfs_on_the_scratch_disk_takes_direct_writes",
        xfs_on_the_scratch_disk_takes_direct_writes,
    ),
];

fn the_kernel_is_of_the_series_asked_for(env: &Env) -> Result<()> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    ensure!(!env.in_vm || env.series.contains_release(&release), "want {}, run on {release}", env.series);
    Ok(())
}

fn the_ublk_driver_loads(_env: &Env) -> Result<()> {
    run("modprobe", &["ublk_drv"])?;
    ensure!(Path::new("/dev/ublk-control").exists(), "ublk_drv is loaded, yet there is no /dev/ublk-control");
    Ok(())
}

fn the_block_and_file_system_drivers_load(_env: &Env) -> Result<()> {
    run("modprobe", &["--all", "nbd", "loop", "ext4", "xfs", "btrfs", "dm-mod", "dm-flakey"])?;
    let file_systems = fs::read_to_string("/proc/filesystems")?;
    for name in ["ext4", "xfs", "btrfs"] {
        ensure!(file_systems.lines().any(|line| line.trim() == name), "no {name} in {file_systems}");
    }
    ensure!(Path::new("/dev/nbd0").exists(), "there is no /dev/nbd0");
    Ok(())
}

fn the_clock_agrees_with_the_host(env: &Env) -> Result<()> {
    // The binary was written by the host, by its clock, before the guest started.
    let built = fs::metadata(std::env::current_exe()?)?.modified()?;
    let age = SystemTime::now().duration_since(built);
    ensure!(age.is_ok(), "the clock is before the time at which this test was built");
    let program_age = fs::metadata(&env.programs)?.modified()?.elapsed();
    ensure!(
        program_age.is_ok_and(|age| age < Duration::from_secs(10 * 365 * 86400)),
        "the clock is years ahead"
    );
    Ok(())
}

fn loopback_carries_a_connection(_env: &Env) -> Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::net::TcpStream::connect_timeout(&address, Duration::from_secs(10)).context("is lo up?")?;
    Ok(())
}

fn xfs_on_the_scratch_disk_takes_direct_writes(env: &Env) -> Result<()> {
    let disk = env.scratch_disk()?;
    run("mkfs.xfs", &["-q", "-f", &disk.to_string_lossy()])?;
    let mount_point = env.directory.join("xfs");
    fs::create_dir(&mount_point)?;
    let mount_point_text = mount_point.to_string_lossy().into_owned();
    run("mount", &[disk, &mount_point])?;
    let written = direct_write(&mount_point.join("file"));
    run("umount", &[&mount_point_text])?;
    written
}

/// Asks for the alignment of direct I/O on a new file and writes one block by it.
fn direct_write(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    let found = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).context("statx")?;
    ensure!(found.stx_mask & StatxFlags::DIOALIGN.bits() != 0, "XFS reports no alignment for direct I/O");
    let (memory, offset) = (found.stx_dio_mem_align, found.stx_dio_offset_align);
    ensure!(memory > 0 && offset > 0 && offset <= 4096, "alignment of memory {memory}, of offset {offset}");
    let of = format!("of={}", path.display());
    run("dd", &["if=/dev/zero", &of, &format!("bs={offset}"), "count=8", "oflag=direct", "status=none"])?;
    ensure!(fs::metadata(path)?.len() == u64::from(offset) * 8, "the direct write wrote something else");
    Ok(())
}
