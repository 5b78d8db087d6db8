//! Data comes back as it was written: fio with checksums, over the data path that an attachment gets unasked. The others
//! are in `rungs`.

use std::path::Path;

use anyhow::{Result, ensure};
use testlab::harness::{Env, Test};
use testlab::shell::run;
use testlab::storage_node::StorageNode;

pub(crate) const TESTS: &[Test] = &[
    Test::new("fio::mixed_sizes_and_depths_verify", mixed_sizes_and_depths_verify).within(600),
    Test::new("fio::a_memory_volume_verifies", a_memory_volume_verifies).within(300),
];

/// Random writes and reads of 4k to 1M with fsyncs, then everything read back and compared.
pub(crate) fn verify(device: &Path, offset_mib: u32, size_mib: u32, depth: u32) -> Result<()> {
    verify_sizes(device, offset_mib, size_mib, depth, "--bsrange=4k-1M")
}

/// The same in a fraction of the time: sizes from 4k to 1M, mostly small, so that a few MiB are many requests.
pub(crate) fn verify_mostly_small(device: &Path, size_mib: u32, depth: u32) -> Result<()> {
    verify_sizes(device, 0, size_mib, depth, "--bssplit=4k/50:12k/15:64k/15:256k/15:1M/5")
}

fn verify_sizes(device: &Path, offset_mib: u32, size_mib: u32, depth: u32, sizes: &str) -> Result<()> {
    let filename = format!("--filename={}", device.display());
    let (offset, size) = (format!("--offset={offset_mib}M"), format!("--size={size_mib}M"));
    let depth = format!("--iodepth={depth}");
    let arguments = [
        "--name=verify",
        &filename,
        &offset,
        &size,
        &depth,
        "--direct=1",
        "--ioengine=io_uring",
        "--rw=randrw",
        "--rwmixwrite=70",
        sizes,
        "--bs_unaligned=0",
        "--blockalign=4k",
        "--fsync=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--randrepeat=1",
        "--output-format=json",
    ];
    let report: serde_json::Value = serde_json::from_str(&run("fio", &arguments)?)?;
    let job = &report["jobs"][0];
    ensure!(job["error"] == 0, "fio: {job}");
    let written = job["write"]["io_bytes"].as_u64().unwrap_or(0);
    ensure!(written >= u64::from(size_mib) << 19, "fio wrote {written} bytes only");
    Ok(())
}

fn mixed_sizes_and_depths_verify(env: &Env) -> Result<()> {
    let node = StorageNode::start_on_xfs(env)?;
    let device = node.create_and_attach("vol-1", "256M", &[])?;
    for (index, depth) in [1, 4, 16, 32].into_iter().enumerate() {
        verify(&device, index as u32 * 64, 64, depth)?;
    }
    node.detach("vol-1")
}

fn a_memory_volume_verifies(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &["--backend", "memory", "--block-size", "512"])?;
    verify(&device, 0, 48, 16)?;
    node.detach("vol-1")
}
