//! What the disk does while its server cannot be reached: its I/O waits and goes on, or fails as its policy says; it never
//! loses an acknowledged write in silence, and it can always be taken away.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fastrand::Rng;
use testlab::fault_proxy::{Cut, FaultProxy};
use testlab::harness::{Env, Test};
use testlab::seed;
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::StorageNode;

use crate::direct;
use crate::fio::verify_mostly_small;

pub(crate) const TESTS: &[Test] = &[
    Test::new("ride_through::a_killed_server_is_waited_for", a_killed_server).within(300),
    Test::new("ride_through::an_outage_passes_though_nobody_takes_the_log", an_outage_without_a_log)
        .within(300),
    Test::new("ride_through::cut_connections_are_made_again", cut_connections).within(300),
    Test::new("ride_through::a_reply_may_break_at_any_byte", a_cut_at_every_byte).within(400),
    Test::new("ride_through::a_server_that_answers_nothing_is_left", a_silent_server).within(300),
    Test::new("ride_through::with_fail_io_ends_in_time_and_works_again", fail_after),
    Test::new("ride_through::a_server_whose_disk_is_slow_is_not_left", a_slow_disk).within(400).once(),
    Test::new("ride_through::a_policy_can_be_changed_during_an_outage", a_policy_changed_during_an_outage)
        .once(),
    Test::new("ride_through::a_server_that_moved_is_found", a_server_that_moved).within(300).once(),
    Test::new("ride_through::a_volume_grows_under_its_users", a_volume_grows).within(300),
    Test::new("ride_through::whoever_watches_is_told", events).once(),
    Test::new("ride_through::a_detach_by_force_returns_without_a_server", detach_by_force),
    Test::new("ride_through::a_server_that_forgot_is_not_the_same_server", a_server_that_forgot),
    Test::new("ride_through::a_flushed_volume_survives_a_reboot_of_its_server", a_reboot_after_a_flush),
    Test::new("ride_through::a_foreign_server_gets_no_write_twice", a_foreign_server).within(300),
];

/// How often a server is killed or a connection cut in one test.
const FAULTS: u64 = 6;
/// The queue gives a server that owes replies 20 s; the rest is for a slow machine.
const SILENCE_DEADLINE: Duration = Duration::from_secs(90);
/// What returns within a bound returns within this one, on a slow machine.
pub(crate) const BOUND: Duration = Duration::from_secs(30);

/// Verifies over and over while `faults` does its worst; neither may fail.
pub(crate) fn verify_meanwhile(device: &Path, faults: impl FnOnce() -> Result<()>) -> Result<()> {
    let is_over = AtomicBool::new(false);
    let rounds = thread::scope(|scope| {
        let verifying = scope.spawn(|| -> Result<u32> {
            let mut rounds = 0;
            while rounds == 0 || !is_over.load(Ordering::Relaxed) {
                verify_mostly_small(device, 8, 16)?;
                rounds += 1;
            }
            Ok(rounds)
        });
        let outcome = faults();
        is_over.store(true, Ordering::Relaxed);
        let rounds = verifying.join().unwrap_or_else(|_| Err(anyhow!("the verifying thread panicked")));
        outcome.and(rounds)
    })?;
    println!("{rounds} rounds of fio");
    Ok(())
}

pub(crate) fn reconnects(node: &StorageNode, target: &str) -> Result<u64> {
    node.attachment(target)?["reconnects"].as_u64().context("reconnects")
}

/// Waits until connections were lost and made again more than `before` times.
pub(crate) fn wait_for_reconnect(node: &StorageNode, target: &str, before: u64, what: &str) -> Result<()> {
    wait_for(what, BOUND, || Ok((reconnects(node, target)? > before).then_some(())))
}

pub(crate) fn wait_for_state(
    node: &StorageNode,
    target: &str,
    state: &str,
    deadline: Duration,
) -> Result<()> {
    wait_for(&format!("{target} to be {state}"), deadline, || {
        Ok((node.attachment(target)?["state"] == state).then_some(()))
    })
}

fn pause(rng: &mut Rng) {
    thread::sleep(Duration::from_millis(rng.u64(50..1500)));
}

fn a_killed_server(env: &Env) -> Result<()> {
    let mut rng = Rng::with_seed(seed::choose()?);
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    verify_meanwhile(&device, || {
        for number in 0..FAULTS {
            pause(&mut rng);
            let before = reconnects(&node, "vol-1")?;
            node.kill_server()?;
            pause(&mut rng);
            node.start_server()?;
            wait_for_reconnect(&node, "vol-1", before, &format!("connections after kill {number}"))?;
        }
        wait_for_state(&node, "vol-1", "live", BOUND)
    })?;
    node.detach("vol-1")
}

/// A device process logs in the very moment in which its connections are lost.
fn an_outage_without_a_log(env: &Env) -> Result<()> {
    let mut node = StorageNode::start_server_only(env, &env.directory.join("data"), &[])?;
    if env.in_vm {
        run("modprobe", &["ublk_drv"])?;
    }
    node.take_no_log_of_the_client()?;
    node.start_client()?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    verify_meanwhile(&device, || {
        for number in 0..2 {
            let before = reconnects(&node, "vol-1")?;
            node.kill_server()?;
            node.start_server()?;
            wait_for_reconnect(&node, "vol-1", before, &format!("connections after kill {number}"))?;
        }
        wait_for_state(&node, "vol-1", "live", BOUND)
    })?;
    node.detach("vol-1")
}

/// A node whose device process reaches the server through a proxy only.
pub(crate) fn node_behind_a_proxy(env: &Env) -> Result<(StorageNode, FaultProxy)> {
    let proxy = FaultProxy::start()?;
    let advertise = proxy.address().to_string();
    let node = StorageNode::start_with(env, &env.directory.join("data"), &["--advertise", &advertise])?;
    proxy.set_target(node.data_address.parse()?);
    Ok((node, proxy))
}

fn cut_connections(env: &Env) -> Result<()> {
    let mut rng = Rng::with_seed(seed::choose()?);
    let (node, proxy) = node_behind_a_proxy(env)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "2", "--connections", "4"])?;
    verify_meanwhile(&device, || {
        for number in 0..FAULTS {
            let before = proxy.connections();
            let cut = [Cut::Reset, Cut::Close, Cut::HalfClose][number as usize % 3];
            // Every other time the next connections break by themselves, somewhere in a reply.
            let reply_bytes_max = (number % 2 == 0).then(|| rng.u64(100..100_000));
            proxy.cut_replies_after(reply_bytes_max);
            proxy.cut(cut);
            pause(&mut rng);
            proxy.cut_replies_after(None);
            proxy.cut(Cut::Reset);
            wait_for(&format!("connections after {cut:?}"), BOUND, || {
                Ok((proxy.connections() > before).then_some(()))
            })?;
            pause(&mut rng);
        }
        wait_for_state(&node, "vol-1", "live", BOUND)
    })?;
    ensure!(reconnects(&node, "vol-1")? >= FAULTS);
    node.detach("vol-1")
}

/// What is read at once: one request.
const READ_BYTES: usize = 16 << 10;

/// Bytes of a reply after which it breaks: each of its header, the first ones of its payload, some in its middle, the last.
fn breaking_points() -> impl Iterator<Item = u64> {
    (1..=24).chain([511, 512, 4095, 4096, 4112, 8000, 16_383, 16_384, 16_399, 16_400])
}

fn a_cut_at_every_byte(env: &Env) -> Result<()> {
    let (node, proxy) = node_behind_a_proxy(env)?;
    node.volctl(&["create", "vol-1", "--size", "16M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "1", "--connections", "1"])?;
    let written: Vec<u8> = b"volnode\n".iter().copied().cycle().take(1 << 20).collect();
    direct::write(&device, 0, &written)??;
    let expected = &written[..READ_BYTES];
    // The kernel itself may read a new disk; what was answered since the connection was made is the handshake then.
    let handshake_bytes = {
        proxy.cut(Cut::Reset);
        wait_for_reconnect(&node, "vol-1", 0, "a new connection")?;
        wait_for_state(&node, "vol-1", "live", BOUND)?;
        proxy.reply_bytes()
    };
    for bytes in breaking_points() {
        let before = reconnects(&node, "vol-1")?;
        proxy.cut_next_replies_after(handshake_bytes + bytes);
        proxy.cut(Cut::Reset);
        wait_for_reconnect(&node, "vol-1", before, "the connection that will break")?;
        let found = direct::read(&device, 0, READ_BYTES)??;
        ensure!(found == expected, "broken after {bytes} bytes, the read gave something else");
        wait_for_reconnect(&node, "vol-1", before + 1, "the connection after that")?;
    }
    node.detach("vol-1")
}

fn a_silent_server(env: &Env) -> Result<()> {
    let (node, proxy) = node_behind_a_proxy(env)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    // With more queues each waits for itself, one after another.
    let device = node.attach(&["vol-1", "--queues", "1"])?;
    verify_mostly_small(&device, 4, 8)?;
    proxy.cut(Cut::BlackHole);
    let started = Instant::now();
    // Waits for a reply that never comes, then on a new connection for the one that does.
    verify_mostly_small(&device, 4, 8)?;
    ensure!(started.elapsed() < SILENCE_DEADLINE, "it took {:.1?}", started.elapsed());
    ensure!(reconnects(&node, "vol-1")? > 0, "nobody noticed");
    node.detach("vol-1")
}

/// Begins to write one block past the page cache, in a process that may wait.
pub(crate) fn begin_write(device: &Path) -> Result<Child> {
    let mut dd = Command::new("dd");
    dd.args(["if=/dev/urandom", "bs=4k", "count=1", "oflag=direct", "status=none"]);
    dd.arg(format!("of={}", device.display())).stdin(Stdio::null()).stderr(Stdio::piped());
    dd.spawn().context("dd")
}

/// How the write ended; an error if it did not within `deadline`.
pub(crate) fn end_write(mut dd: Child, deadline: Duration) -> Result<Output> {
    wait_for("a write to end", deadline, || Ok(dd.try_wait()?.map(drop)))?;
    dd.wait_with_output().context("dd")
}

fn assert_fails(output: &Output) -> Result<()> {
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && complaint.contains("Input/output error"), "{output:?}");
    Ok(())
}

fn fail_after(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--on-stall", "fail", "--after", "8s"])?;
    node.kill_server()?;
    let started = Instant::now();
    assert_fails(&end_write(begin_write(&device)?, BOUND)?)?;
    let waited = started.elapsed();
    ensure!(waited > Duration::from_secs(4), "it did not wait at all: {waited:.1?}");
    println!("the write failed after {waited:.1?}");
    let started = Instant::now();
    assert_fails(&end_write(begin_write(&device)?, BOUND)?)?;
    ensure!(started.elapsed() < Duration::from_secs(7), "the next one waited {:.1?}", started.elapsed());
    wait_for("the disk to say that its I/O fails", BOUND, || {
        let attachment = node.attachment("vol-1")?;
        let says = attachment["state_reason"].as_str().is_some_and(|why| why.contains("I/O fails"));
        Ok(says.then_some(()))
    })?;
    let attachment = node.attachment("vol-1")?;
    ensure!(attachment["state"] == "stalled" && attachment["on_stall"] == "fail", "{attachment}");
    ensure!(attachment["state_reason"].as_str().is_some_and(|why| why.contains("I/O fails")), "{attachment}");
    // Nobody has to do anything but bring the server back.
    node.start_server()?;
    wait_for_state(&node, "vol-1", "live", BOUND)?;
    verify_mostly_small(&device, 4, 8)?;
    node.detach("vol-1")
}

/// Its name, by which the management API is known, stands for another address now, and so do its data addresses.
fn a_server_that_moved(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    verify_meanwhile(&device, || {
        let before = reconnects(&node, "vol-1")?;
        node.kill_server()?;
        node.move_server("127.0.0.9");
        node.start_server()?;
        wait_for_reconnect(&node, "vol-1", before, "the disk to find its server")?;
        wait_for_state(&node, "vol-1", "live", BOUND)
    })?;
    let address = node.attachment("vol-1")?["server_address"].to_string();
    ensure!(address.contains("127.0.0.9:"), "{address}");
    // The process after this one knows it as well.
    node.volctl(&["upgrade", "vol-1"])?.succeeded()?;
    verify_mostly_small(&device, 4, 8)?;
    node.detach("vol-1")
}

/// An fsync takes longer than a lost server is waited for, and everything else goes on: nobody is told of an error, unless somebody
/// has said meanwhile how long it may take.
fn a_slow_disk(env: &Env) -> Result<()> {
    const SLOW: Duration = Duration::from_secs(34);
    let disk = SlowDisk::make(env)?;
    let node = StorageNode::start_with(env, &disk.mount_point.join("data"), &["--cache", "writeback"])?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--on-stall", "fail", "--after", "5s"])?;
    let sync = || -> Result<Child> {
        ensure!(end_write(begin_write(&device)?, BOUND)?.status.success(), "a write before");
        disk.delay_flushes(SLOW)?;
        let script = format!("exec dd if=/dev/zero of={} bs=4k count=1 conv=notrunc,fsync", device.display());
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().context("dd")
    };
    let started = Instant::now();
    let mut syncing = sync()?;
    wait_for("the disk to say that its server is slow", BOUND, || {
        let attachment = node.attachment("vol-1")?;
        let says = attachment["state_reason"].as_str().is_some_and(|why| why.contains("takes long"));
        Ok((attachment["state"] == "live" && says).then_some(()))
    })?;
    ensure!(syncing.try_wait()?.is_none(), "the sync is not slow");
    let output = end_write(syncing, SLOW * 3)?;
    ensure!(
        output.status.success() && started.elapsed() >= SLOW / 2,
        "{:.1?}: {output:?}",
        started.elapsed()
    );
    println!("a sync of {:.1?} succeeded", started.elapsed());
    ensure!(reconnects(&node, "vol-1")? == 0, "the server was left");
    // Whoever sets a policy knows how long it takes.
    disk.delay_flushes(Duration::ZERO)?;
    let syncing = sync()?;
    thread::sleep(Duration::from_secs(12));
    let told = Instant::now();
    node.volctl(&["policy", "vol-1", "--on-stall", "fail", "--after", "3s"])?.succeeded()?;
    let output = end_write(syncing, SLOW)?;
    assert_fails(&output)?;
    ensure!(told.elapsed() < SLOW, "it took {:.1?}", told.elapsed());
    println!("with a policy that was set meanwhile it failed after {:.1?}", told.elapsed());
    disk.delay_flushes(Duration::ZERO)?;
    wait_for_state(&node, "vol-1", "live", SLOW * 3)?;
    node.detach("vol-1")?;
    drop(node);
    disk.take_down()
}

/// XFS on a disk of which each flush takes as long as is said, and nothing else does.
struct SlowDisk {
    mount_point: PathBuf,
    sectors: String,
    disk: String,
}

impl SlowDisk {
    const NAME: &str = "volnode-slow";

    fn make(env: &Env) -> Result<Self> {
        run("modprobe", &["--all", "dm-mod", "dm-delay"])?;
        let disk = env.scratch_disk()?.to_string_lossy().into_owned();
        let sectors = run("blockdev", &["--getsz", &disk])?.trim().to_owned();
        let slow = Self { mount_point: env.directory.join("slow"), sectors, disk };
        let table = slow.table(Duration::ZERO);
        run("dmsetup", &["create", "--noudevsync", Self::NAME, "--table", &table])?;
        // Without udev nobody else makes the node.
        run("dmsetup", &["mknodes", Self::NAME])?;
        fs::create_dir_all(&slow.mount_point)?;
        let device = format!("/dev/mapper/{}", Self::NAME);
        run("mkfs.xfs", &["-q", "-f", &device])?;
        run("mount", &[device.as_ref(), slow.mount_point.as_os_str()])?;
        Ok(slow)
    }

    /// Reads and writes are not delayed.
    fn table(&self, flush: Duration) -> String {
        let Self { sectors, disk, .. } = self;
        format!("0 {sectors} delay {disk} 0 0 {disk} 0 0 {disk} 0 {}", flush.as_millis())
    }

    fn delay_flushes(&self, flush: Duration) -> Result<()> {
        run("dmsetup", &["reload", Self::NAME, "--table", &self.table(flush)])?;
        // Without a freeze of the file system, which would wait for what is under way.
        run("dmsetup", &["suspend", "--noudevsync", "--nolockfs", Self::NAME])?;
        run("dmsetup", &["resume", "--noudevsync", Self::NAME]).map(drop)
    }

    fn take_down(self) -> Result<()> {
        run("umount", &[&self.mount_point])?;
        run("dmsetup", &["remove", "--noudevsync", Self::NAME]).map(drop)
    }
}

fn a_policy_changed_during_an_outage(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    node.kill_server()?;
    let mut waiting = begin_write(&device)?;
    wait_for_state(&node, "vol-1", "stalled", BOUND)?;
    thread::sleep(Duration::from_secs(2));
    ensure!(waiting.try_wait()?.is_none(), "the write did not wait");
    let told = node.volctl(&["policy", "vol-1", "--on-stall", "fail", "--after", "1s"])?.succeeded()?;
    ensure!(told == "vol-1: I/O fails once an outage has lasted 1s\n", "{told:?}");
    assert_fails(&end_write(waiting, BOUND)?)?;
    node.volctl(&["policy", "vol-1", "--on-stall", "wait"])?.succeeded()?;
    node.start_server()?;
    wait_for_state(&node, "vol-1", "live", BOUND)?;
    // The next outage is waited for again.
    node.kill_server()?;
    let waiting = begin_write(&device)?;
    thread::sleep(Duration::from_secs(1));
    node.start_server()?;
    ensure!(end_write(waiting, BOUND)?.status.success(), "the write failed");
    node.volctl(&["policy", "vol-9", "--on-stall", "wait"])?.failed_with(3)?;
    node.detach("vol-1")
}

/// A new file.
pub(crate) fn write_and_sync(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = std::fs::File::create(path).with_context(|| path.display().to_string())?;
    file.write_all(bytes)?;
    file.sync_all().with_context(|| format!("fsync of {}", path.display()))
}

fn a_volume_grows(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "32M", &[])?;
    let mount_point = env.directory.join("mnt");
    std::fs::create_dir_all(&mount_point)?;
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()])?;
    run("mount", &[device.as_os_str(), mount_point.as_os_str()])?;
    let file = mount_point.join("file");
    let bytes = direct::random_bytes(4 << 20);
    write_and_sync(&file, &bytes)?;
    let size = || -> Result<u64> {
        Ok(run("blockdev", &["--getsize64".as_ref(), device.as_os_str()])?.trim().parse()?)
    };
    ensure!(size()? == 32 << 20);
    // Smaller, not whole blocks, nothing.
    for wanted in ["16M", "33001K", "0"] {
        node.volctl(&["resize", "vol-1", "--size", wanted])?.failed_with(2)?;
    }
    node.volctl(&["resize", "vol-9", "--size", "64M"])?.failed_with(3)?;
    node.volctl(&["create", "memory-1", "--size", "16M", "--backend", "memory"])?.succeeded()?;
    node.volctl(&["resize", "memory-1", "--size", "32M"])?.failed_with(5)?;
    for _ in 0..2 {
        let told = node.volctl(&["resize", "vol-1", "--size", "64M"])?.succeeded()?;
        ensure!(told == "volume vol-1 of 64M\n", "{told:?}");
    }
    let grows_live = sh("uname -r")?.trim_start().starts_with('7');
    if grows_live {
        wait_for("the disk to grow", BOUND, || Ok((size()? == 64 << 20).then_some(())))?;
        run("resize2fs", &[device.as_os_str()])?;
        write_and_sync(&mount_point.join("more"), &direct::random_bytes(36 << 20))?;
    }
    ensure!(std::fs::read(&file)? == bytes, "the file is another one");
    run("umount", &[mount_point.as_os_str()])?;
    run("e2fsck", &["-fn".as_ref(), device.as_os_str()])?;
    node.detach("vol-1")?;
    // Where the kernel cannot grow a disk, the next one has the size.
    let device = node.attach(&["vol-1"])?;
    let size = run("blockdev", &["--getsize64".as_ref(), device.as_os_str()])?;
    ensure!(size.trim() == (64 << 20).to_string(), "{size}");
    node.detach("vol-1")
}

fn events(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    node.create_and_attach("vol-1", "16M", &[])?;
    let now = node.volctl(&["events"])?.succeeded()?;
    ensure!(now.lines().count() == 1 && now.contains("vol-1 present: live"), "{now}");
    let (mut follower, lines) = node.volctl_lines(&["events", "--follow", "--output", "json"])?;
    let mut seen = Vec::new();
    let mut wait_for_event = |kind: &str, state: &str| -> Result<()> {
        wait_for(&format!("event {kind} {state} after {seen:?}"), BOUND, || {
            while let Ok(line) = lines.try_recv() {
                let event: serde_json::Value = serde_json::from_str(&line)?;
                ensure!(event["attachment"]["target"] == "vol-1", "{event}");
                let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
                seen.push((word(&event["kind"]), word(&event["attachment"]["state"])));
            }
            let found = seen.iter().position(|(k, s)| k == kind && (s == state || state.is_empty()));
            // In order: what was seen before is not looked at again.
            Ok(found.map(|at| drop(seen.drain(..=at))))
        })
    };
    wait_for_event("present", "live")?;
    node.kill_server()?;
    wait_for_event("state", "stalled")?;
    node.start_server()?;
    wait_for_event("reconnected", "live")?;
    node.detach("vol-1")?;
    // As it was when it was last looked at.
    wait_for_event("detached", "")?;
    follower.kill()?;
    follower.wait()?;
    Ok(())
}

fn detach_by_force(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "64M", &[])?;
    let mount_point = env.directory.join("mnt");
    std::fs::create_dir_all(&mount_point)?;
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()])?;
    run("mount", &[device.as_os_str(), mount_point.as_os_str()])?;
    let refused = node.volctl(&["detach", "vol-1"])?.failed_with(5)?;
    ensure!(refused.contains("mounted on") && refused.contains("--force"), "{refused}");
    node.kill_server()?;
    let writer = format!("dd if=/dev/zero of={}/file bs=64k count=64 conv=fsync", mount_point.display());
    let mut writer =
        Command::new("bash").args(["-c", &writer]).stdin(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait_for_state(&node, "vol-1", "stalled", BOUND)?;
    thread::sleep(Duration::from_secs(1));
    let started = Instant::now();
    // The disk goes at once; only the server could not be told.
    let told = node.volctl(&["detach", "vol-1", "--force"])?.failed_with(6)?;
    ensure!(started.elapsed() < BOUND, "it took {:.1?}", started.elapsed());
    println!("taken away after {:.1?}: {told}", started.elapsed());
    let ended = wait_for("the writer to end", BOUND, || Ok(writer.try_wait()?))?;
    ensure!(!ended.success(), "a write to a disk that is gone succeeded");
    run("umount", &[mount_point.as_os_str()])?;
    ensure!(!device.exists(), "{} is left behind", device.display());
    node.start_server()?;
    node.detach("vol-1")?;
    let device = node.attach(&["vol-1"])?;
    run("e2fsck", &["-fp".as_ref(), device.as_os_str()]).map(drop).or_else(|error| {
        // 1: errors were corrected, as after a crash.
        if error.to_string().contains("exit status: 1") { Ok(()) } else { Err(error) }
    })?;
    // While the server answers, force takes a disk from whoever has it open, too.
    run("mount", &[device.as_os_str(), mount_point.as_os_str()])?;
    node.volctl(&["detach", "vol-1", "--force"])?.succeeded()?;
    run("umount", &[mount_point.as_os_str()])?;
    Ok(())
}

fn a_server_that_forgot(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    for (name, backend) in [("file-1", "file"), ("memory-1", "memory")] {
        let device = node.create_and_attach(name, "16M", &["--backend", backend])?;
        // Acknowledged and not flushed.
        direct::write(&device, 0, &direct::random_bytes(256 << 10))??;
        node.kill_server()?;
        node.boot_server_machine(backend.len() as u64);
        node.start_server()?;
        wait_for_state(&node, name, "failed", BOUND)?;
        ensure!(direct::write(&device, 0, &[0; 4096])?.is_err(), "{backend}: a write succeeded");
        ensure!(direct::read(&device, 0, 4096)?.is_err(), "{backend}: a read succeeded");
        let reason = node.attachment(name)?["state_reason"].as_str().unwrap_or_default().to_owned();
        ensure!(reason.contains("acknowledged"), "{backend}: {reason}");
        node.detach(name)?;
        let device = node.attach(&[name])?;
        verify_mostly_small(&device, 2, 4)?;
        node.detach(name)?;
    }
    Ok(())
}

fn a_reboot_after_a_flush(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "16M", &[])?;
    let through = node.create_and_attach("vol-2", "16M", &["--write-cache", "off"])?;
    let write =
        |device: &Path| -> Result<()> { Ok(direct::write(device, 0, &direct::random_bytes(256 << 10))??) };
    write(&device)?;
    direct::flush(&device)?;
    write(&through)?;
    node.kill_server()?;
    node.boot_server_machine(7);
    node.start_server()?;
    for (name, device) in [("vol-1", &device), ("vol-2", &through)] {
        write(device).with_context(|| name.to_owned())?;
        wait_for_state(&node, name, "live", BOUND)?;
        ensure!(reconnects(&node, name)? > 0, "{name} did not notice");
        node.detach(name)?;
    }
    Ok(())
}

fn a_foreign_server(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let proxy = FaultProxy::start()?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut nbdkit = Command::new("nbdkit")
        .args(["--foreground", "-i", "127.0.0.1", "-p", &port.to_string(), "memory", "32M"])
        .stdin(Stdio::null())
        .spawn()
        .context("nbdkit")?;
    proxy.set_target(([127, 0, 0, 1], port).into());
    wait_for("nbdkit", BOUND, || Ok(std::net::TcpStream::connect(("127.0.0.1", port)).ok().map(drop)))?;
    let uri = format!("nbd://{}/", proxy.address());
    let used = foreign_losses(&node, &proxy, &uri);
    nbdkit.kill()?;
    nbdkit.wait()?;
    used
}

fn foreign_losses(node: &StorageNode, proxy: &FaultProxy, uri: &str) -> Result<()> {
    let device = node.attach(&[uri])?;
    verify_mostly_small(&device, 4, 8)?;
    // Something acknowledged that nbdkit may have forgotten, for all we know: one fsync says so, the next is fine.
    let write = format!("dd if=/dev/urandom of={} bs=64k count=4 oflag=direct status=none", device.display());
    sh(&write)?;
    proxy.cut(Cut::Reset);
    wait_for_reconnect(node, uri, 0, "new connections")?;
    let fsync =
        format!("dd if=/dev/urandom of={} bs=4k count=1 conv=fsync,notrunc status=none", device.display());
    ensure!(sh(&fsync).is_err(), "an fsync after a loss succeeded");
    sh(&fsync)?;
    verify_mostly_small(&device, 4, 8)?;
    node.detach(uri)
}
