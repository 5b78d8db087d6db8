//! Everything in this crate that needs a kernel with ublk, as behaviours of real devices.
//!
//! Owns: the tests, and a daemon to be killed (this binary run as `daemon DATA_PATH STORE`). Never: runs where there is
//! no ublk, or where the lab says that it runs them elsewhere (`VOLNODE_LAB=elsewhere`): tests then count as ignored
//! and say `SKIP why`; where the lab promises ublk (`VOLNODE_LAB=1`) its absence is a failure.
//! Called by: `cargo test` and the lab's VM; takes the options of any Rust test binary.
//! Invariants: every device a test adds is deleted by it, and the last test looks for leftovers, so tests run one
//! after another.

mod ram_disk;

use std::fs::{File, OpenOptions, read_to_string};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::fs::FallocateFlags;
use ublk_core::abi::{
    UBLK_F_AUTO_BUF_REG, UBLK_F_SAFE_STOP_DEV, UBLK_F_UPDATE_SIZE, UBLK_F_USER_RECOVERY,
    UBLK_F_USER_RECOVERY_REISSUE,
};
use ublk_core::control::{Deadlines, block_device_path, char_device_path, list_devices};
use ublk_core::{
    ControlDevice, ControlError, DataPath, Device, DeviceError, DeviceParams, DeviceSpec, DeviceState,
    Discard, Features, probe,
};

use ram_disk::{Counters, RamDisk, Service, Store};

const CAPACITY_BYTES: u64 = 64 << 20;
const MAX_IO_BYTES: u32 = 1 << 20;
/// How long an effect of the kernel's may take to show.
const SETTLE_DEADLINE: Duration = Duration::from_secs(10);

/// A test, given the open control device.
type Behaviour = fn(&ControlDevice) -> Result<()>;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some("daemon") {
        return match daemon(&args.collect::<Vec<_>>()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("daemon: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials()).exit_code()
}

fn trials() -> Vec<Trial> {
    let tests: [(&str, Behaviour); 15] = [
        ("the_best_data_path_is_proved_by_trial", the_best_data_path_is_proved_by_trial),
        ("devices_come_and_go_without_leftovers", devices_come_and_go_without_leftovers),
        ("an_unknown_flag_is_reported_and_the_device_deleted", an_unknown_flag_is_reported),
        ("a_device_never_started_is_deleted_on_drop", a_device_never_started_is_deleted_on_drop),
        ("what_was_written_is_read_back", what_was_written_is_read_back),
        ("a_failed_automatic_registration_is_done_by_hand", a_failed_automatic_registration),
        ("parameters_reach_the_block_layer", parameters_reach_the_block_layer),
        ("flush_fua_discard_and_zeroes_reach_the_daemon", every_operation_reaches_the_daemon),
        ("try_stop_is_busy_while_the_disk_is_open", try_stop_is_busy_while_open),
        ("start_without_a_daemon_times_out", start_without_a_daemon_times_out),
        ("a_missing_device_is_told_from_a_failure", a_missing_device_is_told),
        ("queues_have_cpus", queues_have_cpus),
        ("a_live_device_can_grow", a_live_device_can_grow),
        ("a_killed_daemon_is_replaced_and_its_requests_finish", a_killed_daemon_is_replaced),
        ("no_device_is_left", no_device_is_left),
    ];
    tests.into_iter().map(|(name, test)| Trial::ignorable_test(name, move || run(test))).collect()
}

fn run(test: Behaviour) -> Result<Completion, Failed> {
    let lab = std::env::var("VOLNODE_LAB").unwrap_or_default();
    if lab == "elsewhere" {
        return Ok(Completion::ignored_with("SKIP the lab runs this in its VM"));
    }
    match ControlDevice::open() {
        Ok(control) => match test(&control) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => match error.downcast_ref::<Lacking>() {
                Some(lacking) => Ok(Completion::ignored_with(format!("SKIP {lacking}"))),
                None => Err(format!("{error:#}").into()),
            },
        },
        Err(error) if lab == "1" => Err(format!("the lab promises ublk: {error}").into()),
        Err(error) => Ok(Completion::ignored_with(format!("SKIP {error}"))),
    }
}

/// An error by which a test says that this kernel is too old for what it tests.
#[derive(Debug)]
struct Lacking(Features);

impl std::fmt::Display for Lacking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "this kernel's ublk driver lacks {}", self.0)
    }
}

impl std::error::Error for Lacking {}

/// Ends a test, as skipped, on a kernel that does not know `flags`.
fn need(control: &ControlDevice, flags: u64) -> Result<()> {
    let features = control.get_features()?;
    if features.contains(flags) { Ok(()) } else { Err(Lacking(Features(flags & !features.0)).into()) }
}

// ---------------------------------------------------------------------------------------------------------------
// What the tests share
// ---------------------------------------------------------------------------------------------------------------

fn spec(data_path: DataPath, more_flags: u64) -> DeviceSpec {
    DeviceSpec {
        dev_id: None,
        nr_hw_queues: 2,
        queue_depth: 32,
        max_io_buf_bytes: MAX_IO_BYTES,
        flags: data_path.device_flags() | more_flags,
        wished_flags: 0,
        ublksrv_flags: 0x766f_6c6e_6f64_6531,
    }
}

fn params() -> DeviceParams {
    DeviceParams {
        volatile_cache: true,
        fua: true,
        discard: Some(Discard { granularity_bytes: 4096, max_bytes: 16 << 20 }),
        write_zeroes_max_bytes: 32 << 20,
        max_io_bytes: MAX_IO_BYTES,
        ..DeviceParams::new(CAPACITY_BYTES)
    }
}

/// The data paths that this kernel can do.
fn usable_data_paths(control: &ControlDevice) -> Result<Vec<DataPath>> {
    let report = probe(control.get_features()?);
    Ok(DataPath::LADDER.into_iter().filter(|data_path| report.check(*data_path).is_ok()).collect())
}

fn start(control: &ControlDevice, data_path: DataPath, more_flags: u64) -> Result<(RamDisk, Service)> {
    let service = Service::new(data_path, Store::memory(CAPACITY_BYTES)?);
    let disk = RamDisk::start(control, &spec(data_path, more_flags), &params(), &service)?;
    Ok((disk, service))
}

fn open_disk(dev_id: u32, flags: i32) -> Result<File> {
    let path = block_device_path(dev_id);
    wait_until("the disk's node appears", || path.exists())?;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
    file.with_context(|| format!("open {}", path.display()))
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let give_up = Instant::now() + SETTLE_DEADLINE;
    while !condition() {
        ensure!(Instant::now() < give_up, "not within {SETTLE_DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn wait_until_gone(dev_id: u32) -> Result<()> {
    wait_until("the device is gone", || {
        let listed = list_devices().is_ok_and(|dev_ids| dev_ids.contains(&dev_id));
        !listed && !char_device_path(dev_id).exists() && !block_device_path(dev_id).exists()
    })
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Requests with data.
fn transfers(counters: &Counters) -> u64 {
    count(&counters.reads) + count(&counters.writes) + count(&counters.fua_writes)
}

/// Page-aligned memory, as O_DIRECT needs.
struct AlignedBytes {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBytes {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start, len }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Bytes that tell the place they belong to and the writer's turn.
fn fill(bytes: &mut [u8], offset_bytes: u64, turn: u64) {
    for (position, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = (offset_bytes / 8 + position as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ turn;
        word.copy_from_slice(&value.to_ne_bytes());
    }
}

fn sysfs(dev_id: u32, attribute: &str) -> Result<String> {
    let path = format!("/sys/block/ublkb{dev_id}/{attribute}");
    Ok(read_to_string(&path).with_context(|| path)?.trim().to_owned())
}

// ---------------------------------------------------------------------------------------------------------------
// Control
// ---------------------------------------------------------------------------------------------------------------

fn the_best_data_path_is_proved_by_trial(control: &ControlDevice) -> Result<()> {
    let features = control.get_features()?;
    let report = probe(features);
    let release = read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let first_kernels = [(7, 2), (6, 16), (6, 15), (6, 5), (6, 0)];
    for (data_path, first_kernel) in DataPath::LADDER.into_iter().zip(first_kernels) {
        let told = report.check(data_path);
        let agrees = told.is_ok() == (version >= first_kernel);
        ensure!(agrees, "{data_path} on Linux {release} with {features}: {told:?}");
    }
    Ok(())
}

fn devices_come_and_go_without_leftovers(control: &ControlDevice) -> Result<()> {
    for data_path in usable_data_paths(control)? {
        for round in 0..4 {
            let (disk, _) = start(control, data_path, 0)?;
            let dev_id = disk.device.dev_id();
            let info = control.get_dev_info2(dev_id)?.context("a live device is known")?;
            ensure!(info.state == DeviceState::Live, "round {round}: {info:?}");
            ensure!(info.ublksrv_pid == std::process::id() as i32, "round {round}: {info:?}");
            ensure!(info.ublksrv_flags == 0x766f_6c6e_6f64_6531, "round {round}: {info:?}");
            ensure!(list_devices()?.contains(&dev_id));
            disk.stop()?;
            wait_until_gone(dev_id)?;
            ensure!(control.get_dev_info2(dev_id)?.is_none());
        }
    }
    Ok(())
}

fn an_unknown_flag_is_reported(control: &ControlDevice) -> Result<()> {
    let before = list_devices()?;
    let error = match control.add_dev(&spec(DataPath::Mapped, 1 << 60)) {
        Ok(info) => bail!("granted: {info:?}"),
        Err(error) => error,
    };
    let ControlError::FlagsDropped { asked, got } = &error else { bail!("{error}") };
    ensure!(asked.0 & !got.0 == 1 << 60, "{error}");
    wait_until("the device is deleted", || list_devices().is_ok_and(|dev_ids| dev_ids == before))
}

fn a_device_never_started_is_deleted_on_drop(control: &ControlDevice) -> Result<()> {
    let device = Device::add(control, &spec(DataPath::Mapped, 0), &params())?;
    let dev_id = device.dev_id();
    ensure!(control.get_dev_info2(dev_id)?.is_some());
    drop(device);
    wait_until_gone(dev_id)
}

fn try_stop_is_busy_while_open(control: &ControlDevice) -> Result<()> {
    let (mut disk, _) = start(control, DataPath::Mapped, 0)?;
    let dev_id = disk.device.dev_id();
    let opener = open_disk(dev_id, 0)?;
    let supported = control.get_features()?.contains(UBLK_F_SAFE_STOP_DEV);
    match disk.device.try_stop() {
        Err(ControlError::Busy { .. }) if supported => {}
        Err(ControlError::Unsupported { .. }) if !supported => {
            drop(opener);
            return disk.stop();
        }
        other => bail!("with the disk open, feature {supported}: {other:?}"),
    }
    drop(opener);
    // The last close may still be on its way, for example of a device manager that read the disk's labels.
    wait_until("the disk has no opener", || disk.device.try_stop().is_ok())?;
    disk.finish()?;
    wait_until_gone(dev_id)
}

fn start_without_a_daemon_times_out(_: &ControlDevice) -> Result<()> {
    let deadlines = Deadlines { start: Duration::from_millis(300), ..Deadlines::default() };
    let control = ControlDevice::open_with(deadlines)?;
    let mut device = Device::add(&control, &spec(DataPath::Mapped, 0), &params())?;
    let dev_id = device.dev_id();
    let began = Instant::now();
    match device.start() {
        Err(ControlError::TimedOut { command: "START_DEV", .. }) => {}
        other => bail!("nobody fetched a tag: {other:?}"),
    }
    ensure!(began.elapsed() < Duration::from_secs(5), "gave up after {:?}", began.elapsed());
    drop(device);
    wait_until_gone(dev_id)
}

fn a_missing_device_is_told(control: &ControlDevice) -> Result<()> {
    ensure!(control.get_dev_info2(4_000)?.is_none());
    match control.stop_dev(4_000) {
        Err(ControlError::NoSuchDevice { dev_id: 4_000, .. }) => {}
        other => bail!("{other:?}"),
    }
    match Device::recover(control, 4_000) {
        Err(DeviceError::Control(ControlError::NoSuchDevice { .. })) => Ok(()),
        other => bail!("{other:?}"),
    }
}

fn queues_have_cpus(control: &ControlDevice) -> Result<()> {
    let (disk, _) = start(control, DataPath::Mapped, 0)?;
    let info = *disk.device.info();
    let mut cpus = Vec::new();
    for q_id in 0..info.nr_hw_queues {
        cpus.extend(control.get_queue_affinity(info.dev_id, q_id)?);
    }
    disk.stop()?;
    cpus.sort_unstable();
    let online = thread::available_parallelism()?.get();
    ensure!(cpus.len() >= online, "{online} CPUs, but the queues serve {cpus:?}");
    cpus.dedup();
    ensure!(cpus.len() >= online, "a CPU feeds two queues");
    Ok(())
}

fn no_device_is_left(_: &ControlDevice) -> Result<()> {
    wait_until("no ublk device is left", || list_devices().is_ok_and(|dev_ids| dev_ids.is_empty()))
}

// ---------------------------------------------------------------------------------------------------------------
// Requests
// ---------------------------------------------------------------------------------------------------------------

fn what_was_written_is_read_back(control: &ControlDevice) -> Result<()> {
    for data_path in usable_data_paths(control)? {
        let (disk, service) = start(control, data_path, 0)?;
        let dev_id = disk.device.dev_id();
        write_and_read_back(dev_id).with_context(|| format!("on {data_path}"))?;
        // Before Linux 6.15 the driver ignores our segment limits, and scattered pages make smaller requests.
        let segments: u64 = sysfs(dev_id, "queue/max_segments")?.parse()?;
        let expected_bytes = u64::from(MAX_IO_BYTES).min(segments * 4096);
        disk.stop()?;
        let largest_bytes = count(&service.counters.largest_bytes);
        ensure!(largest_bytes >= expected_bytes, "{data_path}: largest request {largest_bytes}");
        let counters = &service.counters;
        let by_hand = if data_path == DataPath::Registered { transfers(counters) } else { 0 };
        ensure!(count(&counters.registered_by_hand) == by_hand, "{data_path}: {counters:?}");
    }
    Ok(())
}

/// Four writers, each in its own quarter, with requests of 512 bytes to 1 MiB; then everything is compared.
fn write_and_read_back(dev_id: u32) -> Result<()> {
    const WRITERS: u64 = 4;
    let file = Arc::new(open_disk(dev_id, libc::O_DIRECT)?);
    let quarter_bytes = CAPACITY_BYTES / WRITERS;
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let file = Arc::clone(&file);
            thread::spawn(move || write_quarter(&file, writer * quarter_bytes, quarter_bytes, writer))
        })
        .collect();
    for writer in writers {
        writer.join().map_err(|_| anyhow::anyhow!("a writer panicked"))??;
    }
    let mut expected = vec![0; MAX_IO_BYTES as usize];
    let mut seen = AlignedBytes::new(MAX_IO_BYTES as usize);
    for offset_bytes in (0..CAPACITY_BYTES).step_by(MAX_IO_BYTES as usize) {
        file.read_exact_at(seen.get(), offset_bytes)?;
        fill(&mut expected, offset_bytes, offset_bytes / quarter_bytes);
        ensure!(seen.get() == expected, "at {offset_bytes}");
    }
    Ok(())
}

fn write_quarter(file: &File, start_bytes: u64, len_bytes: u64, writer: u64) -> Result<()> {
    let sizes = [512, 4096, 1 << 20, 65536, 12288, 3 * 512, 524_288];
    let mut done_bytes = 0;
    for size in sizes.into_iter().cycle() {
        let size = (len_bytes - done_bytes).min(size);
        if size == 0 {
            return Ok(());
        }
        let mut bytes = AlignedBytes::new(size as usize);
        fill(bytes.get(), start_bytes + done_bytes, writer);
        file.write_all_at(bytes.get(), start_bytes + done_bytes)?;
        done_bytes += size;
    }
    Ok(())
}

fn a_failed_automatic_registration(control: &ControlDevice) -> Result<()> {
    need(control, UBLK_F_AUTO_BUF_REG)?;
    let mut service = Service::new(DataPath::Fused, Store::memory(CAPACITY_BYTES)?);
    service.spoil_auto_registration = true;
    let disk = RamDisk::start(control, &spec(DataPath::Fused, 0), &params(), &service)?;
    write_and_read_back(disk.device.dev_id())?;
    disk.stop()?;
    let counters = &service.counters;
    ensure!(count(&counters.registered_by_hand) == transfers(counters), "{counters:?}");
    Ok(())
}

fn parameters_reach_the_block_layer(control: &ControlDevice) -> Result<()> {
    let params = DeviceParams {
        logical_block_bytes: 4096,
        io_opt_bytes: 65536,
        read_only: true,
        rotational: true,
        ..params()
    };
    let service = Service::new(DataPath::Mapped, Store::memory(CAPACITY_BYTES)?);
    let disk = RamDisk::start(control, &spec(DataPath::Mapped, 0), &params, &service)?;
    let dev_id = disk.device.dev_id();
    let expected = [
        ("size", "131072"),
        ("ro", "1"),
        ("queue/logical_block_size", "4096"),
        ("queue/physical_block_size", "4096"),
        ("queue/minimum_io_size", "4096"),
        ("queue/optimal_io_size", "65536"),
        ("queue/max_hw_sectors_kb", "1024"),
        ("queue/write_cache", "write back"),
        ("queue/fua", "1"),
        ("queue/rotational", "1"),
        ("queue/discard_granularity", "4096"),
        ("queue/discard_max_hw_bytes", "16777216"),
        ("queue/write_zeroes_max_bytes", "33554432"),
    ];
    for (attribute, value) in expected {
        let seen = sysfs(dev_id, attribute)?;
        ensure!(seen == value, "{attribute} is {seen}, not {value}");
    }
    let in_force = control.get_params(dev_id)?;
    ensure!(in_force.basic == params.to_abi()?.basic, "{in_force:?}");
    ensure!(in_force.devt.disk_major != 0, "{:?}", in_force.devt);
    disk.stop()
}

fn every_operation_reaches_the_daemon(control: &ControlDevice) -> Result<()> {
    for data_path in usable_data_paths(control)? {
        let (disk, service) = start(control, data_path, 0)?;
        let counters = &service.counters;
        let file = open_disk(disk.device.dev_id(), libc::O_DIRECT)?;
        let mut bytes = AlignedBytes::new(1 << 20);
        bytes.get().fill(0xa5);

        file.write_all_at(bytes.get(), 0)?;
        file.sync_all()?;
        ensure!(count(&counters.flushes) > 0, "{data_path}: fsync after a write sends FLUSH: {counters:?}");
        ensure!(count(&counters.fua_writes) == 0, "{data_path}: {counters:?}");

        let durable = open_disk(disk.device.dev_id(), libc::O_DIRECT | libc::O_DSYNC)?;
        durable.write_all_at(bytes.get(), 1 << 20)?;
        ensure!(count(&counters.fua_writes) > 0, "{data_path}: O_DSYNC sends FUA: {counters:?}");

        let keep = FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, keep | FallocateFlags::ZERO_RANGE, 0, 65536)?;
        ensure!(count(&counters.write_zeroes_no_unmap) > 0, "{data_path}: {counters:?}");
        rustix::fs::fallocate(&file, keep | FallocateFlags::PUNCH_HOLE, 65536, 65536)?;
        ensure!(count(&counters.write_zeroes) > 0, "{data_path}: {counters:?}");
        discard(&file, 131_072, 65536)?;
        ensure!(count(&counters.discards) > 0, "{data_path}: {counters:?}");

        let mut expected = vec![0xa5; 2 << 20];
        expected[..3 * 65536].fill(0);
        let mut seen = AlignedBytes::new(2 << 20);
        file.read_exact_at(seen.get(), 0)?;
        ensure!(seen.get() == expected, "{data_path}: zeroes where they belong and only there");
        drop((file, durable));
        disk.stop()?;
    }
    Ok(())
}

/// `blkdiscard`, the command: no safe wrapper of the ioctl is at hand.
fn discard(file: &File, offset_bytes: u64, len_bytes: u64) -> Result<()> {
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let output = Command::new("blkdiscard")
        .args(["--force", "--offset", &offset_bytes.to_string(), "--length", &len_bytes.to_string(), &path])
        .output()
        .context("blkdiscard, of util-linux")?;
    ensure!(output.status.success(), "blkdiscard: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn a_live_device_can_grow(control: &ControlDevice) -> Result<()> {
    need(control, UBLK_F_UPDATE_SIZE)?;
    let (disk, _) = start(control, DataPath::Mapped, UBLK_F_UPDATE_SIZE)?;
    let dev_id = disk.device.dev_id();
    control.update_size(dev_id, 2 * CAPACITY_BYTES)?;
    ensure!(sysfs(dev_id, "size")? == (2 * CAPACITY_BYTES / 512).to_string());
    disk.stop()
}

// ---------------------------------------------------------------------------------------------------------------
// Recovery
// ---------------------------------------------------------------------------------------------------------------

const RECOVERY: u64 = UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE;

/// This binary as a daemon: serves a file on the data path named, prints the device's number, and waits to be killed.
/// With `recover N` it takes over device N instead of adding one.
fn daemon(args: &[String]) -> Result<()> {
    let [data_path, store, rest @ ..] = args else { bail!("daemon DATA_PATH STORE [recover N]") };
    let data_path: DataPath = data_path.parse()?;
    let file = OpenOptions::new().read(true).write(true).open(store)?;
    let service = Service::new(data_path, Store::File(Arc::new(file)));
    let control = ControlDevice::open()?;
    let disk = match rest {
        [] => RamDisk::start(&control, &spec(data_path, RECOVERY), &params(), &service)?,
        [verb, dev_id] if verb == "recover" => {
            RamDisk::serve(Device::recover(&control, dev_id.parse()?)?, &service)?
        }
        other => bail!("{other:?}"),
    };
    println!("{}", disk.device.dev_id());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// A running daemon; killed on drop.
struct Daemon {
    child: Child,
    dev_id: u32,
}

impl Daemon {
    fn spawn(data_path: DataPath, store: &Path, recover: Option<u32>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("daemon").arg(data_path.as_str()).arg(store);
        if let Some(dev_id) = recover {
            command.args(["recover", &dev_id.to_string()]);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("standard output is a pipe")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let dev_id = line.trim().parse().with_context(|| format!("the daemon said {line:?}"))?;
        Ok(Self { child, dev_id })
    }

    fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A daemon that is gone already is what we want.
        let _ = self.kill();
    }
}

fn store_file() -> Result<PathBuf> {
    let path = std::env::temp_dir().join(format!("ublk-core-test-{}", std::process::id()));
    let mut file = File::create(&path)?;
    file.set_len(CAPACITY_BYTES)?;
    file.flush()?;
    Ok(path)
}

fn a_killed_daemon_is_replaced(control: &ControlDevice) -> Result<()> {
    for data_path in usable_data_paths(control)? {
        let store = store_file()?;
        let result = kill_and_replace(control, data_path, &store).with_context(|| format!("on {data_path}"));
        std::fs::remove_file(&store)?;
        result?;
    }
    Ok(())
}

fn kill_and_replace(control: &ControlDevice, data_path: DataPath, store: &Path) -> Result<()> {
    let mut first = Daemon::spawn(data_path, store, None)?;
    let dev_id = first.dev_id;
    let hasty = Deadlines { command: Duration::from_secs(2), ..Deadlines::default() };
    match ControlDevice::open_with(hasty)?.start_user_recovery(dev_id) {
        Err(ControlError::Busy { .. }) => {}
        other => bail!("recovery while the daemon lives: {other:?}"),
    }
    let file = Arc::new(open_disk(dev_id, libc::O_DIRECT)?);
    let mut bytes = AlignedBytes::new(65536);
    fill(bytes.get(), 0, 1);
    file.write_all_at(bytes.get(), 0)?;

    first.kill()?;
    wait_until("the device is quiesced", || {
        control
            .get_dev_info2(dev_id)
            .is_ok_and(|info| info.is_some_and(|info| info.state == DeviceState::Quiesced))
    })?;
    // A write while nobody serves waits for the next daemon.
    let writer = thread::spawn({
        let file = Arc::clone(&file);
        move || -> Result<()> {
            let mut bytes = AlignedBytes::new(65536);
            fill(bytes.get(), 65536, 2);
            Ok(file.write_all_at(bytes.get(), 65536)?)
        }
    });

    let second = Daemon::spawn(data_path, store, Some(dev_id))?;
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    let info = control.get_dev_info2(dev_id)?.context("the device lives on")?;
    ensure!(info.state == DeviceState::Live && info.ublksrv_pid == second.child.id() as i32, "{info:?}");
    let mut expected = vec![0; 131_072];
    fill(&mut expected[..65536], 0, 1);
    fill(&mut expected[65536..], 65536, 2);
    let mut seen = AlignedBytes::new(131_072);
    file.read_exact_at(seen.get(), 0)?;
    ensure!(seen.get() == expected, "what was written before and while nobody served");
    drop(file);
    control.del_dev_async(dev_id)?;
    drop(second);
    wait_until_gone(dev_id)
}
