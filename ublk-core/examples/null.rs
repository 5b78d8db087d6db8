//! Serves a ublk disk with nothing but this crate, to try a kernel or to measure the block layer alone.
//!
//! Owns: the command line. Never: part of the product.
//! Called by: a person: `null [null|ram] [fused|fixed-rw|registered|user-copy|mapped] [MiB]`; prints the disk's path,
//! serves until standard input ends, then deletes it. On `null` every request succeeds and nothing is kept: reads give
//! stale memory.

#[path = "../tests/ram_disk/mod.rs"]
#[allow(dead_code)] // The tests use more of it.
mod ram_disk;

use std::io::{Read as _, stdin};

use anyhow::{Context as _, Result, bail};
use ram_disk::{RamDisk, Service, Store};
use ublk_core::control::block_device_path;
use ublk_core::{ControlDevice, DataPath, DeviceParams, DeviceSpec, Discard, probe};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let argument =
        |position: usize, default: &'static str| args.get(position).map_or(default, String::as_str);
    let capacity_bytes = argument(2, "256").parse::<u64>().context("the size is in MiB")? << 20;
    let store = match argument(0, "null") {
        "null" => Store::Null,
        "ram" => Store::memory(capacity_bytes)?,
        other => bail!("{other} is neither null nor ram"),
    };

    let control = ControlDevice::open()?;
    let report = probe(control.get_features()?);
    let data_path = match args.get(1) {
        Some(name) => name.parse()?,
        None => report.best().context("no data path works here")?,
    };
    if let Err(error) = report.check(data_path) {
        bail!("{data_path} does not work here: {error}");
    }

    let disk =
        RamDisk::start(&control, &spec(data_path), &params(capacity_bytes), &Service::new(data_path, store))?;
    println!("{}", block_device_path(disk.device.dev_id()).display());
    stdin().read_to_end(&mut Vec::new())?;
    disk.stop()
}

fn spec(data_path: DataPath) -> DeviceSpec {
    DeviceSpec {
        dev_id: None,
        nr_hw_queues: 1,
        queue_depth: 64,
        max_io_buf_bytes: 1 << 20,
        flags: data_path.device_flags(),
        wished_flags: 0,
        ublksrv_flags: 0,
    }
}

fn params(capacity_bytes: u64) -> DeviceParams {
    DeviceParams {
        volatile_cache: true,
        fua: true,
        discard: Some(Discard { granularity_bytes: 4096, max_bytes: 1 << 30 }),
        write_zeroes_max_bytes: 1 << 30,
        ..DeviceParams::new(capacity_bytes)
    }
}
