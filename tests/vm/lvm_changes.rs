//! Thin volumes of LVM: what changed between two instants, what TRIM gives back to the pool, and what each volume has alone.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use testlab::harness::{Env, Test};
use testlab::seed;
use testlab::shell::run;
use testlab::storage_node::StorageNode;

use crate::direct;
use crate::lvm::{GROUP, ThinPool, lvs};

pub(crate) const TESTS: &[Test] = &[
    Test::new("lvm_changes::a_diff_covers_every_differing_byte_and_no_untouched_chunk", a_diff_covers)
        .within(500),
    Test::new("lvm_changes::trim_gives_space_back_to_the_pool_and_zeroes_are_zeroes", trim_gives_space_back)
        .within(400),
];

/// The pool's unit.
const CHUNK_BYTES: u64 = 64 << 10;
const BLOCK_BYTES: u64 = 4096;
const VOLUME_BYTES: u64 = 16 << 20;
const WRITES: usize = 60;

/// A range of a comparison, and whether it is zeroes in its target.
type Told = (u64, u64, bool);

fn diff(node: &StorageNode, base: &str, target: &str) -> Result<Vec<Told>> {
    let told = node.volctl(&["diff", base, target, "--output", "json"])?.succeeded()?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    let ranges = told["ranges"].as_array().context("ranges")?;
    let number = |range: &serde_json::Value, name: &str| range[name].as_u64().context("a number");
    ranges
        .iter()
        .map(|range| {
            Ok((number(range, "offset_bytes")?, number(range, "length_bytes")?, range["kind"] == "zero"))
        })
        .collect()
}

/// The same as a stranger's client is told it, without the zeroes.
fn bitmap(node: &StorageNode, base: &str, export: &str) -> Result<Vec<(u64, u64)>> {
    let uri = format!("nbd://{}/{export}", node.data_address);
    let told = run("nbdinfo", &["--json", &format!("--map=qemu:dirty-bitmap:{base}"), &uri])?;
    let runs: Vec<serde_json::Value> = serde_json::from_str(&told)?;
    let dirty = runs.iter().filter(|run| run["type"] == 1);
    let number = |run: &serde_json::Value, name: &str| run[name].as_u64().context("a number");
    Ok(joined(
        dirty.map(|run| Ok((number(run, "offset")?, number(run, "length")?))).collect::<Result<Vec<_>>>()?,
    ))
}

fn joined(ranges: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (offset, length) in ranges {
        match all.last_mut() {
            Some((last, bytes)) if *last + *bytes == offset => *bytes += length,
            _ => all.push((offset, length)),
        }
    }
    all
}

/// Writes, of which some write what is there already, and gives the chunks that were touched.
fn write_at_random(device: &Path, random: &mut fastrand::Rng) -> Result<BTreeSet<u64>> {
    let mut touched = BTreeSet::new();
    for _ in 0..WRITES {
        let blocks = random.u64(1..=24);
        let offset = random.u64(0..=VOLUME_BYTES / BLOCK_BYTES - blocks) * BLOCK_BYTES;
        let length = blocks * BLOCK_BYTES;
        let bytes = match random.u8(0..4) {
            0 => direct::read(device, offset, length as usize)??,
            _ => direct::random_bytes(length as usize),
        };
        direct::write(device, offset, &bytes)??;
        touched.extend(offset / CHUNK_BYTES..=(offset + length - 1) / CHUNK_BYTES);
    }
    Ok(touched)
}

/// Has the disk do something to a part of it, by a tool.
fn with_tool(tool: &str, arguments: &[&str], device: &Path, offset: u64, length: u64) -> Result<()> {
    let (offset, length) = (offset.to_string(), length.to_string());
    let device = device.to_str().context("a path in UTF-8")?;
    run(tool, &[arguments, &["--offset", &offset, "--length", &length, device]].concat()).map(drop)
}

fn bytes_of(node: &StorageNode, target: &str) -> Result<Vec<u8>> {
    let disk = node.attach(&[target])?;
    let bytes = direct::read(&disk, 0, VOLUME_BYTES as usize)??;
    node.detach(target)?;
    Ok(bytes)
}

fn check(told: &[Told], base: &[u8], target: &[u8], touched: &BTreeSet<u64>) -> Result<()> {
    let block = |bytes: &[u8], at: u64| bytes[at as usize..(at + BLOCK_BYTES) as usize].to_vec();
    for at in (0..VOLUME_BYTES).step_by(BLOCK_BYTES as usize) {
        let covering = told.iter().find(|(offset, length, _)| (*offset..offset + length).contains(&at));
        match covering {
            None => ensure!(block(base, at) == block(target, at), "a difference at {at} is not told"),
            Some((.., is_zero)) => {
                ensure!(touched.contains(&(at / CHUNK_BYTES)), "nobody has touched {at}, and it is told");
                let is_really = block(target, at).iter().all(|byte| *byte == 0);
                ensure!(!is_zero || is_really, "{at} is told as zeroes, and is not");
            }
        }
    }
    Ok(())
}

/// Whether the pool keeps a copy of its metadata.
fn keeps_metadata() -> Result<bool> {
    let name = format!("{}-pool-tpool", GROUP.replace('-', "--"));
    let status = run("dmsetup", &["status", "--noflush", &name])?;
    Ok(status.split_whitespace().nth(6).context("a pool's status")? != "-")
}

fn start(env: &Env) -> Result<StorageNode> {
    let pool = format!("{GROUP}/pool");
    StorageNode::start_with(env, &env.directory.join("data"), &["--lvm", &pool, "--export-by-name"])
}

fn a_diff_covers(env: &Env) -> Result<()> {
    let pool = ThinPool::new(env.scratch_disk()?, 128)?;
    let mut node = start(env)?;
    let seed = seed::choose()?;
    let mut random = fastrand::Rng::with_seed(seed);
    let device = node.create_and_attach("vol-1", "16M", &["--backend", "lvm"])?;
    write_at_random(&device, &mut random)?;
    node.volctl(&["snapshot", "create", "vol-1", "s0"])?.succeeded()?;
    let mut touched = write_at_random(&device, &mut random)?;
    for tool in ["discard", "zeroes", "discard"] {
        let chunks = random.u64(1..=6);
        let (first, length) = (random.u64(0..VOLUME_BYTES / CHUNK_BYTES - chunks), chunks * CHUNK_BYTES);
        let arguments: &[&str] = if tool == "discard" { &[] } else { &["--zeroout"] };
        with_tool("blkdiscard", arguments, &device, first * CHUNK_BYTES, length)?;
        touched.extend(first..first + chunks);
    }
    node.volctl(&["snapshot", "create", "vol-1", "s1"])?.succeeded()?;
    let (base, target) = (bytes_of(&node, "vol-1@s0")?, bytes_of(&node, "vol-1@s1")?);
    let told = diff(&node, "vol-1@s0", "vol-1@s1")?;
    ensure!(!told.is_empty());
    check(&told, &base, &target, &touched).with_context(|| format!("seed {seed}"))?;
    let dirty = joined(told.iter().map(|(offset, length, _)| (*offset, *length)));
    ensure!(bitmap(&node, "s0", "vol-1@s1")? == dirty, "an NBD client is told the same");
    // A volume as it is at this instant: what was written last is in.
    let bytes = direct::random_bytes(4096);
    direct::write(&device, 5 * CHUNK_BYTES, &bytes)??;
    let told = diff(&node, "vol-1@s1", "vol-1")?;
    ensure!(told == [(5 * CHUNK_BYTES, CHUNK_BYTES, false)], "{told:?}");
    let shown = node.volctl(&["show", "vol-1", "--output", "json"])?.succeeded()?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    ensure!(shown["exclusive_bytes"] == CHUNK_BYTES, "all but a chunk is its snapshot's as well: {shown}");
    ensure!(!keeps_metadata()?, "what was read is released");

    // What a killed server left is released by the next one.
    node.kill_server()?;
    std::fs::write(node.data_dir.join("thin-metadata-kept"), format!("{GROUP}/pool"))?;
    let name = format!("{}-pool-tpool", GROUP.replace('-', "--"));
    run("dmsetup", &["message", &name, "0", "reserve_metadata_snap"])?;
    ensure!(keeps_metadata()?);
    node.start_server()?;
    ensure!(!keeps_metadata()?, "released at the start");
    node.detach("vol-1")?;
    node.kill_server()?;
    drop(pool);
    Ok(())
}

/// Chunks of the pool that are taken.
fn taken(device: &Path, chunks: u64) -> Result<u64> {
    // What was given back counts when that is durable.
    direct::flush(device)?;
    let percent: f64 = lvs("pool", "data_percent")?.parse()?;
    Ok((percent * chunks as f64 / 100.0).round() as u64)
}

fn trim_gives_space_back(env: &Env) -> Result<()> {
    const POOL_CHUNKS: u64 = (64 << 20) / CHUNK_BYTES;
    let pool = ThinPool::new(env.scratch_disk()?, 64)?;
    let mut node = start(env)?;
    let device = node.create_and_attach("vol-1", "16M", &["--backend", "lvm"])?;
    let bytes = direct::random_bytes(8 << 20);
    direct::write(&device, 0, &bytes)??;
    ensure!(taken(&device, POOL_CHUNKS)? == 128, "{} chunks", taken(&device, POOL_CHUNKS)?);
    // TRIM: whole chunks are given back, and what is beside them stays.
    with_tool("blkdiscard", &[], &device, 2 << 20, 4 << 20)?;
    ensure!(taken(&device, POOL_CHUNKS)? == 64, "{} chunks", taken(&device, POOL_CHUNKS)?);
    ensure!(direct::read(&device, 0, 2 << 20)?? == bytes[..2 << 20]);
    ensure!(direct::read(&device, 6 << 20, 2 << 20)?? == bytes[6 << 20..]);
    // WRITE_ZEROES that may make holes, and with NO_HOLE: both read as zeroes.
    with_tool("fallocate", &["--punch-hole"], &device, 0, 1 << 20)?;
    with_tool("fallocate", &["--zero-range"], &device, 1 << 20, 1 << 20)?;
    ensure!(direct::read(&device, 0, 2 << 20)?? == vec![0; 2 << 20]);
    ensure!(direct::read(&device, 6 << 20, 2 << 20)?? == bytes[6 << 20..]);
    // What a snapshot has as well is its own: a TRIM of the volume's gives nothing back until it goes.
    node.volctl(&["snapshot", "create", "vol-1", "s"])?.succeeded()?;
    with_tool("blkdiscard", &[], &device, 6 << 20, 2 << 20)?;
    ensure!(taken(&device, POOL_CHUNKS)? == 64, "{} chunks", taken(&device, POOL_CHUNKS)?);
    let snapshot = node.volctl(&["snapshot", "show", "vol-1", "s", "--output", "json"])?.succeeded()?;
    let snapshot: serde_json::Value = serde_json::from_str(&snapshot)?;
    ensure!(snapshot["exclusive_bytes"] == 2 << 20, "{snapshot}");
    node.volctl(&["snapshot", "delete", "vol-1", "s"])?.succeeded()?;
    ensure!(taken(&device, POOL_CHUNKS)? == 32, "{} chunks", taken(&device, POOL_CHUNKS)?);
    with_tool("blkdiscard", &[], &device, 0, VOLUME_BYTES)?;
    ensure!(taken(&device, POOL_CHUNKS)? == 0, "{} chunks", taken(&device, POOL_CHUNKS)?);
    node.detach("vol-1")?;
    node.volctl(&["delete", "vol-1"])?.succeeded()?;
    node.kill_server()?;
    drop(pool);
    Ok(())
}
