//! A database whose storage runs full: at the very end it is told so, and what it had committed is there.
//!
//! The database is SQLite with a write-ahead log and `synchronous=FULL`, as an application has it, on an ext4: each commit is an fsync, which
//! is a FLUSH of the volume. The storage is a thin pool without room, and a file system of the server's without room.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use rusqlite::{Connection, ErrorCode};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh};
use testlab::storage_node::{StorageNode, mount_xfs};

use crate::lvm::{GROUP, ThinPool, lvm, start};

pub(crate) const TESTS: &[Test] = &[
    Test::new("full_storage::a_database_in_a_full_pool_keeps_what_it_committed", in_a_full_pool)
        .within(400)
        .once(),
    Test::new("full_storage::a_database_on_a_full_disk_keeps_what_it_committed", on_a_full_disk)
        .within(400)
        .once(),
];

/// Of a row; larger than what any layer rounds up to, so that there are some hundred rows.
const ROW_BYTES: usize = 64 << 10;
/// What there is for the file system and the database, and what the volume is said to have.
const ROOM_MIB: u32 = 64;
const VOLUME: &str = "256M";

fn open(directory: &Path) -> Result<Connection> {
    let database = Connection::open(directory.join("database"))?;
    database.pragma_update(None, "journal_mode", "WAL")?;
    database.pragma_update(None, "synchronous", "FULL")?;
    Ok(database)
}

/// What a row has is nowhere else.
fn content(id: u64) -> Vec<u8> {
    let mut bytes = vec![0; ROW_BYTES];
    fastrand::Rng::with_seed(id).fill(&mut bytes);
    bytes
}

/// Commits rows until that fails; gives how many were committed.
fn commit_until_full(directory: &Path) -> Result<u64> {
    let database = open(directory)?;
    database.execute_batch("CREATE TABLE rows (id INTEGER PRIMARY KEY, content BLOB NOT NULL)")?;
    for id in 1.. {
        let inserted =
            database.execute("INSERT INTO rows (id, content) VALUES (?1, ?2)", (id as i64, content(id)));
        let Err(error) = inserted else { continue };
        // A write that finds no space, or the fsync behind it.
        let code = error.sqlite_error_code();
        ensure!(
            matches!(code, Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure)),
            "{error} ({code:?}) after {} rows",
            id - 1
        );
        println!("{} rows were committed: {error}", id - 1);
        return Ok(id - 1);
    }
    bail!("it is never full")
}

/// All that was committed is there, byte by byte; the row that was refused may be there as well.
fn check(directory: &Path, committed: u64) -> Result<()> {
    let database = open(directory)?;
    let told: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    ensure!(told == "ok", "{told}");
    let mut query = database.prepare("SELECT id, content FROM rows ORDER BY id")?;
    let rows = query.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?)))?;
    let mut found = 0;
    for row in rows {
        let (id, bytes) = row?;
        ensure!(id as u64 == found + 1 && bytes == content(found + 1), "row {id} behind row {found}");
        found += 1;
    }
    ensure!(
        (committed..=committed + 1).contains(&found),
        "{committed} rows were committed, {found} are there"
    );
    database.execute("INSERT INTO rows (id, content) VALUES (?1, ?2)", (found as i64 + 1, content(0)))?;
    Ok(())
}

/// Fills the volume's storage by a database; `make_room` gives the storage some, and the database goes on.
fn fill(env: &Env, node: &StorageNode, make_room: impl FnOnce() -> Result<()>) -> Result<()> {
    let device = node.attach(&["vol-1"])?;
    let mount_point = env.directory.join("mnt");
    std::fs::create_dir(&mount_point)?;
    let (device, at) = (device.display(), mount_point.display());
    sh(&format!("mkfs.ext4 -q {device}; mount {device} {at}"))?;
    let committed = commit_until_full(&mount_point)?;
    ensure!(committed > 100, "{committed} rows only");
    sh(&format!("umount {at}"))?;
    make_room()?;
    // What the journal has is replayed; a file system that has to be mended by hand (4) would have lost something.
    sh(&format!("e2fsck -p {device} >&2 || test $? -le 1; mount {device} {at}"))?;
    check(&mount_point, committed).with_context(|| format!("{committed} rows were committed"))?;
    sh(&format!("umount {at}; e2fsck -fn {device} >&2"))?;
    node.detach("vol-1")
}

fn in_a_full_pool(env: &Env) -> Result<()> {
    let pool = ThinPool::new(env.scratch_disk()?, ROOM_MIB)?;
    let mut node = start(env)?;
    node.volctl(&["create", "vol-1", "--size", VOLUME, "--backend", "lvm"])?.succeeded()?;
    fill(env, &node, || lvm("lvextend", &["--yes", "--size", "+128M", &format!("{GROUP}/pool")]).map(drop))?;
    node.volctl(&["delete", "vol-1"])?.succeeded()?;
    node.kill_server()?;
    drop(pool);
    Ok(())
}

fn on_a_full_disk(env: &Env) -> Result<()> {
    let mount_point = mount_xfs(env)?;
    let node = StorageNode::start_with(env, &mount_point.join("data"), &[])?;
    node.volctl(&["create", "vol-1", "--size", VOLUME])?.succeeded()?;
    let filler = mount_point.join("filler");
    let free = run("df", &["--output=avail".as_ref(), "--block-size=1M".as_ref(), mount_point.as_os_str()])?;
    let free_mib: u32 = free.lines().nth(1).context("df")?.trim().parse()?;
    let taken = free_mib.checked_sub(ROOM_MIB).context("a larger scratch disk")?;
    run("fallocate", &["--length".as_ref(), format!("{taken}M").as_ref(), filler.as_os_str()])?;
    fill(env, &node, || Ok(std::fs::remove_file(&filler)?))?;
    node.volctl(&["delete", "vol-1"])?.succeeded().map(drop)
}
