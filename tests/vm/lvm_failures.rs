//! A thin pool whose disk fails: what is told, what is there afterwards, and how it goes on.
//!
//! The pool has its metadata on one device of device mapper and its data on another, which is made to fail as a disk does that refuses all
//! (dm-error), and as one that takes writes and cannot keep them (dm-flakey, whose flushes fail as well).

use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use testlab::direct_io::open_direct;
use testlab::harness::{Env, Test};
use testlab::shell::run;
use testlab::storage_node::StorageNode;

use crate::bad_input::exit_code;
use crate::direct;
use crate::lvm::{CONFIG, GROUP, lvm, lvs, start};

pub(crate) const TESTS: &[Test] = &[Test::new(
    "lvm_failures::what_was_flushed_survives_a_failed_disk_and_what_was_not_is_told",
    a_failed_disk,
)
.within(500)];

/// In sectors of 512 bytes: 32 MiB, and 96 MiB behind it. Not from the disk's beginning, where LVM would find it twice.
const METADATA: (u64, u64) = (2048, 65536);
const DATA: (u64, u64) = (131_072, 196_608);
const METADATA_NAME: &str = "lab-thin-metadata";
const DATA_NAME: &str = "lab-thin-data";

struct FailingPool<'a> {
    disk: &'a Path,
}

impl<'a> FailingPool<'a> {
    fn new(disk: &'a Path) -> Result<Self> {
        run("modprobe", &["--all", "dm-mod", "dm-thin-pool", "dm-flakey"])?;
        run("wipefs", &["--quiet".as_ref(), "--all".as_ref(), disk.as_os_str()])?;
        let pool = Self { disk };
        for (name, (start, sectors)) in [(METADATA_NAME, METADATA), (DATA_NAME, DATA)] {
            let table = format!("0 {sectors} linear {} {start}", disk.display());
            run("dmsetup", &["create", name, "--table", &table])?;
            run("dmsetup", &["mknodes", name])?;
        }
        let (metadata, data) = (format!("/dev/mapper/{METADATA_NAME}"), format!("/dev/mapper/{DATA_NAME}"));
        lvm("vgcreate", &["--yes", GROUP, &metadata])?;
        lvm("pvcreate", &["--yes", "--metadatacopies", "0", &data])?;
        lvm("vgextend", &["--yes", GROUP, &data])?;
        lvm("lvcreate", &["--yes", "--name", "metadata", "--size", "4M", GROUP, &metadata])?;
        lvm("lvcreate", &["--yes", "--name", "pool", "--size", "64M", GROUP, &data])?;
        let metadata = format!("{GROUP}/metadata");
        let kind = ["--yes", "--type", "thin-pool", "--chunksize", "64K", "--poolmetadata", &metadata];
        lvm("lvconvert", &[&kind[..], &[&format!("{GROUP}/pool")]].concat())?;
        Ok(pool)
    }

    /// What is below the pool's data from now on, in what is under way as well.
    fn put_below(&self, kind: &str) -> Result<()> {
        let (start, sectors) = DATA;
        let disk = self.disk.display();
        let table = match kind {
            "error" => format!("0 {sectors} error"),
            "flakey" => format!("0 {sectors} flakey {disk} {start} 0 3600"),
            linear => format!("0 {sectors} {linear} {disk} {start}"),
        };
        run("dmsetup", &["load", DATA_NAME, "--table", &table])?;
        run("dmsetup", &["resume", "--nolockfs", DATA_NAME]).map(drop)
    }
}

impl Drop for FailingPool<'_> {
    fn drop(&mut self) {
        let _ = self.put_below("linear");
        let _ = lvm("vgremove", &["--yes", "--force", GROUP]);
        for name in [DATA_NAME, METADATA_NAME] {
            let _ = run("dmsetup", &["remove", "--retry", name]);
        }
        let _ = run("wipefs", &["--quiet".as_ref(), "--all".as_ref(), self.disk.as_os_str()]);
    }
}

const BYTES: usize = 128 << 10;
const FLUSHED_AT: u64 = 0;
const UNFLUSHED_AT: u64 = 4 << 20;
const NEW_AT: u64 = 30 << 20;

/// Whether the disk flushes; any other error than EIO is not its to give.
fn flushes(device: &Path) -> Result<bool> {
    Ok(direct::unless_eio(open_direct(device)?.sync_all())?.is_some())
}

fn writes(device: &Path, at: u64) -> Result<bool> {
    Ok(direct::unless_eio(direct::write(device, at, &vec![7; BYTES])?)?.is_some())
}

/// Takes new space, chunk by chunk, until that is refused. One that had all it may have before would find nothing to lose.
fn write_until_it_fails(device: &Path) -> JoinHandle<Result<()>> {
    const CHUNKS: u64 = 300;
    let device = device.to_owned();
    std::thread::spawn(move || {
        for chunk in 0..CHUNKS {
            let written = direct::write(&device, UNFLUSHED_AT + chunk * (64 << 10), &[7; 4096])?;
            if direct::unless_eio(written)?.is_none() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("{} chunks were written, and the disk had not failed", CHUNKS)
    })
}

fn incarnation(node: &StorageNode, name: &str) -> Result<String> {
    let shown = node.volctl(&["show", name, "--output", "json"])?.succeeded()?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    Ok(shown["storage_incarnation"].as_str().context("storage_incarnation")?.to_owned())
}

fn a_failed_disk(env: &Env) -> Result<()> {
    // The first two have something that is not flushed when the disk fails; the third has not.
    const NAMES: [&str; 3] = ["vol-1", "vol-2", "vol-3"];
    const LOSERS: usize = 2;
    let pool = FailingPool::new(env.scratch_disk()?)?;
    let mut node = start(env)?;
    let (mut devices, mut flushed) = (Vec::new(), Vec::new());
    for name in NAMES {
        let device = node.create_and_attach(name, "32M", &["--backend", "lvm"])?;
        let bytes = direct::random_bytes(BYTES);
        direct::write(&device, FLUSHED_AT, &bytes)??;
        direct::flush(&device)?;
        devices.push(device);
        flushed.push(bytes);
    }

    // A disk that refuses all: nothing is answered that is not there, so nothing is lost, and the disks go on when it is back.
    pool.put_below("error")?;
    ensure!(!writes(&devices[0], UNFLUSHED_AT)? && !writes(&devices[0], FLUSHED_AT)?, "nothing was written");
    let read = direct::unless_eio(direct::read(&devices[1], FLUSHED_AT, 4096)?)?;
    ensure!(read.is_none(), "what was read of a disk that fails?");
    pool.put_below("linear")?;
    direct::write(&devices[0], FLUSHED_AT, &flushed[0])?.context("the disk is back")?;
    direct::flush(&devices[0])?;

    // One that cannot keep what it took: each volume that may have lost something hears of it, also if another one's flush failed first.
    let before = NAMES.iter().map(|name| incarnation(&node, name)).collect::<Result<Vec<_>>>()?;
    // A pool records what is new once a second, so each writes something new up to the very moment.
    let writers: Vec<_> = devices[..LOSERS].iter().map(|device| write_until_it_fails(device)).collect();
    pool.put_below("flakey")?;
    for writer in writers {
        writer.join().expect("a writer")?;
    }
    for device in &devices[..LOSERS] {
        ensure!(!flushes(device)?, "a flush that failed was answered: {}", device.display());
    }
    pool.put_below("linear")?;
    for (name, device) in NAMES.iter().zip(&devices).take(LOSERS) {
        ensure!(!flushes(device)? && !writes(device, NEW_AT)?, "{name} goes on as if nothing had been lost");
    }
    for (name, before) in NAMES.iter().zip(&before).take(LOSERS) {
        ensure!(incarnation(&node, name)? != *before, "{name} is taken for what it was");
        // Whoever takes the disk away is told once more.
        let told = node.volctl(&["detach", name])?;
        ensure!(told.exit_code != 0 && told.stderr.contains("may be lost"), "{told:?}");
    }

    // The pool gives nothing new until it was repaired. Whoever has lost nothing reads and writes what has its space.
    ensure!(lvs("pool", "lv_health_status")? == "metadata_read_only", "{}", lvs("pool", "lv_health_status")?);
    let (name, device, flushed_bytes) = (NAMES[LOSERS], &devices[LOSERS], &flushed[LOSERS]);
    ensure!(incarnation(&node, name)? == before[LOSERS], "{name} has lost nothing");
    ensure!(direct::read(device, FLUSHED_AT, BYTES)?? == *flushed_bytes, "what was flushed is there");
    direct::write(device, FLUSHED_AT, flushed_bytes)?.context("what has its space")?;
    direct::flush(device)?;
    ensure!(!writes(device, NEW_AT)?, "new space of a pool that gives none");
    let refused = node.volctl(&["snapshot", "create", name, "s"])?.failed_with(exit_code::PRECONDITION)?;
    ensure!(refused.contains("metadata") && refused.contains("docs/operating.md"), "{refused}");
    node.detach(name)?;

    // As `docs/operating.md` says, with the server stopped.
    node.kill_server()?;
    lvm("vgchange", &["--activate", "n", GROUP])?;
    // The tools take one `--config`.
    let checked = format!(r#"{CONFIG} global{{thin_check_options=["-q","--clear-needs-check-flag"]}}"#);
    run("lvchange", &["--config", &checked, "--yes", "--activate", "y", &format!("{GROUP}/pool")])?;
    node.start_server()?;
    for (name, flushed) in NAMES.iter().zip(&flushed) {
        let device = node.attach(&[name])?;
        ensure!(direct::read(&device, FLUSHED_AT, BYTES)?? == *flushed, "{name} has what was flushed");
        ensure!(writes(&device, NEW_AT)? && flushes(&device)?, "{name} does not go on after the repair");
        node.detach(name)?;
        node.volctl(&["delete", name])?.succeeded()?;
    }
    node.kill_server()?;
    drop(pool);
    Ok(())
}
