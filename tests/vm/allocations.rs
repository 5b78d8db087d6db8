//! The client's data path allocates nothing: counted on the queue's thread while requests of every kind go through it,
//! 10,000 over the data path that an attachment gets unasked, some over every other that this kernel has. The server's half
//! of it is in `server/tests/nbd_allocations.rs`.
//!
//! The queue runs in this process, on a thread whose allocations `counting_allocator` counts; whoever uses the disk (fio)
//! is another process, so that this one never waits for its own device.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use client::device::connect::dial::{self, Dialled};
use client::device::geometry::device_params;
use client::device::queue::parts::{QueueCommander, QueueEvent, QueueParts};
use client::device::queue::requests::Resend;
use client::device::queue::run;
use client::device::queue::unflushed::Unflushed;
use testlab::harness::{Env, Test};
use testlab::shell::run;
use testlab::storage_node::StorageNode;
use ublk_core::abi::UBLK_F_USER_COPY;
use ublk_core::control::block_device_path;
use ublk_core::{ControlDevice, DataPath, Device, DeviceSpec, Transfer};

use crate::counting_allocator::{allocations, count_this_thread};

pub(crate) const TESTS: &[Test] =
    &[Test::new("allocations::requests_allocate_nothing_on_the_queue_thread", requests_allocate_nothing)
        .within(900)];

const VOLUME: &str = "vol-1";
const QUEUE_DEPTH: u16 = 64;
/// Requests before the counted ones: whatever grows on first use has grown by then.
const WARM_UP_REQUESTS: u64 = 1_000;
/// On the best data path.
const COUNTED_REQUESTS: u64 = 10_000;
/// On each of the others, which go through the same loop.
const COUNTED_REQUESTS_OTHERS: u64 = 2_000;
/// How long a queue may take to get ready or to end.
const QUEUE_DEADLINE: Duration = Duration::from_secs(60);

fn requests_allocate_nothing(env: &Env) -> Result<()> {
    if env.in_vm {
        run("modprobe", &["ublk_drv"])?;
    }
    let node = StorageNode::start_server_only(env, &env.directory.join("data"), &["--export-by-name"])?;
    node.volctl(&["create", VOLUME, "--size", "64M", "--backend", "memory"])?.succeeded()?;
    let control = ControlDevice::open()?;
    let mut requests = COUNTED_REQUESTS;
    for rung in ublk_core::probe_driver(&control)?.rungs {
        let Ok(transfer) = rung.usable else { continue };
        let disk = Disk::start(&control, &node.data_address, rung.data_path, transfer)?;
        let used = use_and_count(&disk, requests);
        disk.remove()?;
        used.with_context(|| rung.data_path.to_string())?;
        requests = COUNTED_REQUESTS_OTHERS;
    }
    ensure!(requests < COUNTED_REQUESTS, "no data path can be used here");
    Ok(())
}

fn use_and_count(disk: &Disk, requests: u64) -> Result<()> {
    let device = block_device_path(disk.device.dev_id());
    send_requests(&device, WARM_UP_REQUESTS)?;
    let before = allocations();
    send_requests(&device, requests)?;
    let allocated = allocations() - before;
    ensure!(allocated == 0, "{allocated} allocations in {requests} requests");
    ensure!(before > disk.allocations_before, "the counter does not count: making a queue allocates");
    Ok(())
}

/// Reads and writes of three sizes, flushes, and one each of TRIM and WRITE_ZEROES.
fn send_requests(device: &Path, count: u64) -> Result<()> {
    let device = device.display().to_string();
    run("blkdiscard", &["--offset", "0", "--length", "1M", &device])?;
    run("blkdiscard", &["--zeroout", "--offset", "1M", "--length", "1M", &device])?;
    // fio counts its flushes, too.
    let (filename, number) = (format!("--filename={device}"), format!("--number_ios={}", count + count / 16));
    let arguments = [
        "--name=count",
        &filename,
        &number,
        "--rw=randrw",
        "--bssplit=4k/80:64k/15:256k/5",
        "--iodepth=32",
        "--fsync=256",
        "--ioengine=io_uring",
        "--direct=1",
        "--size=64M",
        "--io_size=64G",
        "--norandommap",
        "--output-format=json",
    ];
    let report: serde_json::Value = serde_json::from_str(&run("fio", &arguments)?)?;
    let job = &report["jobs"][0];
    let total = |side: &str| job[side]["total_ios"].as_u64().unwrap_or(0);
    let done = total("read") + total("write");
    ensure!(job["error"] == 0 && done >= count, "fio did {done} I/Os of {count}");
    Ok(())
}

/// A ublk device whose queue runs on a counted thread of this process.
struct Disk {
    device: Device,
    queue: JoinHandle<()>,
    events: Receiver<QueueEvent>,
    /// When its thread had not begun.
    allocations_before: u64,
}

impl Disk {
    fn start(
        control: &ControlDevice,
        address: &str,
        data_path: DataPath,
        transfer: Transfer,
    ) -> Result<Self> {
        let addresses = [address.to_owned()];
        let connect = || -> Result<Dialled> {
            Ok(dial::attempts(&addresses, VOLUME, None, dial::OPEN_TIMEOUT)?
                .next()
                .context("no address")??)
        };
        let (one, other) = (connect()?, connect()?);
        let params = device_params(&one.export, 0, false)?;
        let spec = DeviceSpec {
            dev_id: None,
            nr_hw_queues: 1,
            queue_depth: QUEUE_DEPTH,
            max_io_buf_bytes: params.max_io_bytes,
            flags: data_path.device_flags(),
            wished_flags: data_path.wished_device_flags(),
            ublksrv_flags: 0,
        };
        let device = Device::add(control, &spec, &params)?;
        let (_, commands) = QueueCommander::new()?;
        let parts = QueueParts {
            queue: device.queue(0)?,
            data_path,
            transfer,
            has_user_copy: device.info().flags.contains(UBLK_F_USER_COPY),
            max_io_bytes: params.max_io_bytes,
            volatile_cache: params.volatile_cache,
            sockets: vec![one.socket, other.socket],
            resend: Resend::Everything,
            reply_timeout: QUEUE_DEADLINE,
            busy_poll: Duration::ZERO,
            send_zc_bytes_min: None,
            key_bytes_max: u64::MAX,
            unflushed: Arc::new(Unflushed::new(1)),
            commands,
        };
        let (sender, events) = mpsc::channel();
        let allocations_before = allocations();
        let queue = thread::spawn(move || {
            count_this_thread();
            // Nobody listens any more only if the test has failed.
            run::run(parts, &|event| drop(sender.send(event)));
        });
        let mut disk = Self { device, queue, events, allocations_before };
        match disk.events.recv_timeout(QUEUE_DEADLINE).context("the queue says nothing")? {
            QueueEvent::Ready => disk.device.start()?,
            other => bail!("the queue does not start: {other:?}"),
        }
        Ok(disk)
    }

    /// Takes the disk away; the queue must end well.
    fn remove(mut self) -> Result<()> {
        self.device.stop()?;
        let ended = self.events.recv_timeout(QUEUE_DEADLINE).context("the queue does not end")?;
        let QueueEvent::Ended { outcome, .. } = ended else { bail!("the queue failed: {ended:?}") };
        outcome?;
        self.queue.join().map_err(|_| anyhow::anyhow!("the queue's thread panicked"))?;
        Ok(self.device.delete()?)
    }
}
