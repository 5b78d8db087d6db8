//! Large writes that are sent from the requests' own pages (SEND_ZC): where the kernel copies them all the same, where it does
//! not, and what becomes of pages that a dead network, a peer that stopped reading or one that vanished has taken.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testlab::card_pair::CardPair;
use testlab::harness::{Env, Test};
use testlab::kernel_series::KernelSeries;
use testlab::shell::{run, wait_for};
use testlab::storage_node::{StorageNode, set_network_card};

use crate::direct;
use crate::fio::verify;
use crate::ride_through::{BOUND, reconnects, verify_meanwhile, wait_for_reconnect, wait_for_state};

pub(crate) const TESTS: &[Test] = &[
    Test::new("send_zc::where_the_kernel_copies_it_turns_itself_off", where_the_kernel_copies),
    Test::new("send_zc::a_network_card_takes_pages_and_a_dead_one_keeps_none", by_reference)
        .once()
        .within(400),
    Test::new("send_zc::a_peer_that_stopped_reading_keeps_no_pages", |env| {
        a_lost_peer(env, Fault::StoppedReading)
    })
    .once()
    .within(400),
    Test::new("send_zc::a_peer_that_vanished_keeps_no_pages", |env| a_lost_peer(env, Fault::Vanished))
        .once()
        .within(400),
    Test::new("send_zc::upgrades_and_new_connections_keep_every_byte", upgrades_and_new_connections)
        .once()
        .within(300),
];

/// A lost server is noticed within 20 s (`REPLY_TIMEOUT`), and then requests fail after this.
const FAIL_AFTER: Duration = Duration::from_secs(2);
const FAILED_WITHIN: Duration = Duration::from_secs(35);
/// How long a process that was killed may take to be replaced.
const RECOVERED_WITHIN: Duration = Duration::from_secs(20);

fn expect(node: &StorageNode, send_zc: &str) -> Result<()> {
    wait_for(&format!("send_zc {send_zc}"), BOUND, || {
        Ok((node.attachment("vol-1")?["send_zc"] == send_zc).then_some(()))
    })
}

/// Of the size that is sent by reference.
fn write_large(device: &Path) -> Result<String> {
    let output = format!("of={}", device.display());
    run("dd", &["if=/dev/zero", &output, "bs=1M", "count=4", "oflag=direct", "status=none"])
}

fn where_the_kernel_copies(env: &Env) -> Result<()> {
    let mut node = StorageNode::start(env)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "1", "--send-zc"])?;
    let (before, after) = match env.series {
        KernelSeries::V7 => ("untried", "copied"),
        // A SEND cannot name a request's pages there.
        KernelSeries::V6_12 => ("unsupported", "unsupported"),
    };
    // The kernel may have read the new disk, and not written it.
    expect(&node, before)?;
    verify(&device, 0, 16, 8)?;
    expect(&node, after)?;
    // The next connection is tried anew, because it may lead elsewhere.
    let lost = reconnects(&node, "vol-1")?;
    node.kill_server()?;
    node.start_server()?;
    wait_for_reconnect(&node, "vol-1", lost, "a new connection")?;
    verify(&device, 16, 16, 8)?;
    expect(&node, after)?;
    node.detach("vol-1")?;
    // By default large writes are tried, and only those.
    let device = node.attach(&["vol-1", "--queues", "1"])?;
    ensure!(node.attachment("vol-1")?["send_zc_mode"] == "auto");
    direct::write(&device, 0, &direct::random_bytes(64 << 10))??;
    expect(&node, before)?;
    direct::write(&device, 0, &direct::random_bytes(128 << 10))??;
    expect(&node, after)?;
    node.detach("vol-1")?;
    let device = node.attach(&["vol-1", "--queues", "1", "--send-zc=off"])?;
    verify(&device, 0, 16, 8)?;
    expect(&node, "off")?;
    node.detach("vol-1")
}

fn by_reference(env: &Env) -> Result<()> {
    let node = StorageNode::start_client_only(env)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let policy = format!("{}s", FAIL_AFTER.as_secs());
    let options = ["--on-stall", "fail", "--after", &policy];
    let device = node.attach(&[&["vol-1", "--queues", "1", "--send-zc"], &options[..]].concat())?;
    verify(&device, 0, 16, 8)?;
    expect(&node, "used")?;
    // Pages that were handed to a card that sends nothing come back with the request's error, not when TCP gives up.
    set_network_card(false)?;
    let began = Instant::now();
    let failed = write_large(&device);
    let took = began.elapsed();
    set_network_card(true)?;
    ensure!(failed.is_err() && took < FAILED_WITHIN, "{failed:?} after {took:?}");
    println!("without a network: {:#} after {took:.1?}", failed.err().context("an error")?);
    wait_for_state(&node, "vol-1", "live", BOUND)?;
    verify(&device, 16, 16, 8)?;
    expect(&node, "used")?;
    // And with the process that dies meanwhile: the next one gets the request.
    node.volctl(&["policy", "vol-1", "--on-stall", "wait"])?.succeeded()?;
    let pid = node.attachment("vol-1")?["pid"].as_u64().context("pid")?;
    set_network_card(false)?;
    thread::scope(|scope| {
        let writer = scope.spawn(|| write_large(&device));
        // Not a wait for something: so much time the socket gets to take the pages.
        thread::sleep(Duration::from_secs(1));
        run("kill", &["-KILL", &pid.to_string()])?;
        let began = Instant::now();
        let recovered = wait_for("another process", RECOVERED_WITHIN, || {
            let attachment = node.attachment("vol-1")?;
            let is_there = attachment["pid"] != pid && attachment["state"] == "stalled";
            Ok(is_there.then_some(()))
        });
        println!("the next process has the disk after {:.1?}", began.elapsed());
        set_network_card(true)?;
        recovered?;
        writer.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        wait_for_state(&node, "vol-1", "live", BOUND)
    })?;
    verify(&device, 32, 16, 8)?;
    expect(&node, "used")?;
    node.detach("vol-1")?;
    node.volctl(&["delete", "vol-1"])?.succeeded().map(drop)
}

/// How the server is lost, while our card goes on fetching and sending.
#[derive(Clone, Copy)]
enum Fault {
    /// Its machine acknowledges until it has no room, and its probes after that.
    StoppedReading,
    /// Nobody acknowledges anything.
    Vanished,
}

impl Fault {
    fn begin(self, node: &StorageNode, cable: &CardPair) -> Result<()> {
        match self {
            Self::StoppedReading => node.freeze_server(),
            Self::Vanished => cable.set_far_end(false),
        }
    }

    /// After it the server can be reached: the same, or another process.
    fn end(self, node: &mut StorageNode, cable: &CardPair) -> Result<()> {
        match self {
            Self::StoppedReading => {
                node.kill_server()?;
                node.start_server()
            }
            Self::Vanished => cable.set_far_end(true),
        }
    }
}

/// Bytes of a write that is under way when the server is lost: more than a socket takes.
const UNDER_WAY_BYTES: usize = 8 << 20;
/// Between the server's loss and what is done about it: so much time the socket gets to take the pages.
const PAGES_TAKEN_AFTER: Duration = Duration::from_secs(1);

/// Writes the bytes to the disk while `meanwhile` runs; how the write ended.
fn write_meanwhile(
    device: &Path,
    bytes: &[u8],
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<std::io::Result<()>> {
    thread::scope(|scope| {
        let writer = scope.spawn(|| direct::write(device, 0, bytes));
        thread::sleep(PAGES_TAKEN_AFTER);
        let outcome = meanwhile();
        let written = writer.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        outcome.and(written)
    })
}

fn expect_bytes(device: &Path, bytes: &[u8]) -> Result<()> {
    let found = direct::read(device, 0, bytes.len())?.context("reading back")?;
    let first = found.iter().zip(bytes).position(|(found, written)| found != written);
    ensure!(first.is_none(), "wrong bytes from {first:?} on");
    Ok(())
}

fn a_lost_peer(env: &Env, fault: Fault) -> Result<()> {
    let cable = CardPair::make(env)?;
    let mut node = StorageNode::start_in_netns(env, CardPair::NAMESPACE, CardPair::FAR_ADDRESS)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let policy = format!("{}s", FAIL_AFTER.as_secs());
    let options = ["vol-1", "--queues", "1", "--on-stall", "fail", "--after", &policy];
    let device = node.attach(&options)?;
    verify(&device, 0, 16, 8)?;
    expect(&node, "used")?;
    // The requests end with an error within their bound, and not when TCP gives its peer up.
    let bytes = direct::random_bytes(UNDER_WAY_BYTES);
    fault.begin(&node, &cable)?;
    let began = Instant::now();
    let failed = direct::write(&device, 0, &bytes)?;
    let took = began.elapsed();
    fault.end(&mut node, &cable)?;
    println!("the write ended after {took:.1?}: {failed:?}");
    ensure!(direct::unless_eio(failed)?.is_none() && took < FAILED_WITHIN, "after {took:?}");
    wait_for_state(&node, "vol-1", "live", BOUND)?;
    verify(&device, 16, 16, 8)?;
    expect(&node, "used")?;
    // A process that is killed meanwhile leaves the request to the next, which sends it again on a connection of its own.
    node.volctl(&["policy", "vol-1", "--on-stall", "wait"])?.succeeded()?;
    let pid = node.attachment("vol-1")?["pid"].as_u64().context("pid")?;
    fault.begin(&node, &cable)?;
    let written = write_meanwhile(&device, &bytes, || {
        run("kill", &["-KILL", &pid.to_string()])?;
        let began = Instant::now();
        let recovered = wait_for("another process", RECOVERED_WITHIN, || {
            let attachment = node.attachment("vol-1")?;
            Ok((attachment["pid"] != pid && attachment["state"] == "stalled").then_some(()))
        });
        println!("the next process has the disk after {:.1?}", began.elapsed());
        fault.end(&mut node, &cable)?;
        recovered
    })?;
    written.context("a write that waited")?;
    wait_for_state(&node, "vol-1", "live", BOUND)?;
    expect_bytes(&device, &bytes)?;
    verify(&device, 16, 16, 8)?;
    expect(&node, "used")?;
    // And force takes the disk away, whatever has been fetched of its pages.
    fault.begin(&node, &cable)?;
    let failed = write_meanwhile(&device, &bytes, || {
        let began = Instant::now();
        node.volctl(&["detach", "vol-1", "--force"])?.failed_with(6)?;
        println!("taken away after {:.1?}", began.elapsed());
        ensure!(began.elapsed() < BOUND && !device.exists(), "after {:.1?}", began.elapsed());
        Ok(())
    })?;
    ensure!(failed.is_err(), "a write to a disk that is gone succeeded");
    fault.end(&mut node, &cable)?;
    node.detach("vol-1")?;
    let device = node.attach(&["vol-1"])?;
    verify(&device, 0, 16, 8)?;
    node.detach("vol-1")
}

fn upgrades_and_new_connections(env: &Env) -> Result<()> {
    const TIMES: usize = 3;
    let _cable = CardPair::make(env)?;
    let mut node = StorageNode::start_in_netns(env, CardPair::NAMESPACE, CardPair::FAR_ADDRESS)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "1"])?;
    verify_meanwhile(&device, || {
        for _ in 0..TIMES {
            thread::sleep(Duration::from_millis(500));
            node.volctl(&["upgrade", "vol-1"])?.succeeded()?;
            thread::sleep(Duration::from_millis(500));
            let lost = reconnects(&node, "vol-1")?;
            node.kill_server()?;
            node.start_server()?;
            wait_for_reconnect(&node, "vol-1", lost, "a new connection")?;
        }
        Ok(())
    })?;
    verify(&device, 8, 16, 8)?;
    expect(&node, "used")?;
    node.detach("vol-1")
}
