//! What a network does to a disk: a server that moves between addresses, packets that vanish, and another node that takes
//! the volume while its holder writes.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::io::Errno;
use testlab::block_history::{BlockHistory, Blocks, Pattern};
use testlab::direct_io::{AlignedBuffer, open_direct};
use testlab::fault_proxy::{Cut, FaultProxy};
use testlab::harness::{Env, Test};
use testlab::shell::{run, sh, wait_for};
use testlab::storage_node::StorageNode;

use crate::ride_through::{BOUND, reconnects, verify_meanwhile, wait_for_state};

pub(crate) const TESTS: &[Test] = &[
    Test::new("network::a_server_that_moves_is_found", a_server_that_moves).within(300).once(),
    Test::new("network::a_forced_attach_stops_a_writer", a_forced_attach).within(300).once(),
    Test::new("network::packets_that_vanish_are_waited_for", vanishing_packets).within(300).once(),
];

/// How often the server moves.
const MOVES: u64 = 4;

fn a_server_that_moves(env: &Env) -> Result<()> {
    let (one, two) = (FaultProxy::start()?, FaultProxy::start()?);
    let (first, second) = (one.address().to_string(), two.address().to_string());
    let advertise = ["--advertise", &first, "--advertise", &second];
    let node = StorageNode::start_with(env, &env.directory.join("data"), &advertise)?;
    let stranger = StorageNode::start_server_only(env, &env.directory.join("stranger"), &[])?;
    let (ours, strange) = (node.data_address.parse()?, stranger.data_address.parse()?);
    let move_server = |number: u64| {
        let (here, there) = if number.is_multiple_of(2) { (&one, &two) } else { (&two, &one) };
        here.set_target(ours);
        there.set_target(strange);
        here.cut(Cut::Reset);
        there.cut(Cut::Reset);
        here.address().to_string()
    };
    // The first address is the stranger's from the beginning.
    move_server(1);
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "2"])?;
    ensure!(node.attachment("vol-1")?["server_address"] == second.as_str());
    verify_meanwhile(&device, || {
        for number in 2..2 + MOVES {
            thread::sleep(Duration::from_millis(500));
            let before = reconnects(&node, "vol-1")?;
            let address = move_server(number);
            wait_for(&format!("the server at {address}"), BOUND, || {
                let attachment = node.attachment("vol-1")?;
                let is_there =
                    attachment["server_address"] == address.as_str() && attachment["state"] == "live";
                Ok((is_there && reconnects(&node, "vol-1")? > before).then_some(()))
            })?;
        }
        Ok(())
    })?;
    ensure!(one.connections() > 0 && two.connections() > 0);
    node.detach("vol-1")
}

/// Threads of the old holder, each with one write in flight.
const WRITERS: usize = 4;
const STRIPE_BLOCKS: usize = 64;

/// Writes its stripe until an error; what may be there then.
fn write_until_it_fails(file: &File, writer: usize, answers: &AtomicU64) -> Result<(BlockHistory, Instant)> {
    let mut history = BlockHistory::new(writer as u64, STRIPE_BLOCKS);
    for number in 0.. {
        let blocks = Blocks { first: number % STRIPE_BLOCKS, count: 1 };
        let (write, payload) = history.send_write(blocks, Pattern::Stamped);
        let mut buffer = AlignedBuffer::new(payload.len());
        buffer.bytes().copy_from_slice(&payload);
        if let Err(error) = file.write_all_at(buffer.bytes(), offset_bytes(writer, blocks)) {
            ensure!(error.raw_os_error() == Some(Errno::IO.raw_os_error()), "not EIO: {error}");
            return Ok((history, Instant::now()));
        }
        history.write_answered(write, true);
        answers.fetch_add(1, Ordering::Relaxed);
    }
    Err(anyhow!("the numbers have ended"))
}

fn offset_bytes(writer: usize, blocks: Blocks) -> u64 {
    let stripe = Blocks { first: writer * STRIPE_BLOCKS, count: STRIPE_BLOCKS };
    stripe.offset_bytes() + blocks.offset_bytes()
}

/// Reads every stripe, past the page cache, and compares it with what it may hold.
fn check_stripes(device: &Path, histories: &mut [BlockHistory]) -> Result<()> {
    let file = open_direct(device)?;
    let all = Blocks { first: 0, count: STRIPE_BLOCKS };
    for (writer, history) in histories.iter_mut().enumerate() {
        let mut buffer = AlignedBuffer::new(all.length_bytes() as usize);
        file.read_exact_at(buffer.bytes(), offset_bytes(writer, all))?;
        history.check_and_adopt(all, buffer.bytes()).with_context(|| format!("stripe {writer}"))?;
    }
    Ok(())
}

fn a_forced_attach(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let device = node.create_and_attach("vol-1", "16M", &[])?;
    let other = node.start_another_client(env, "node-2")?;
    other.volctl(&["attach", "vol-1"])?.failed_with(5)?;
    let file = open_direct(&device)?;
    let answers = AtomicU64::new(0);
    let (taken, attach_took, ends) = thread::scope(|scope| {
        let (file, answers) = (&file, &answers);
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| scope.spawn(move || write_until_it_fails(file, writer, answers)))
            .collect();
        let taken = wait_for("the old holder to write", BOUND, || {
            Ok((answers.load(Ordering::Relaxed) > 100).then_some(Instant::now()))
        })
        .and_then(|began| Ok((began, other.attach(&["vol-1", "--force"])?)));
        if taken.is_err() {
            // Or the writers would never end.
            node.volctl(&["detach", "vol-1", "--force"]).ok();
        }
        let attach_took = taken.as_ref().map_or(Duration::ZERO, |(began, _)| began.elapsed());
        let join = |thread: thread::ScopedJoinHandle<'_, Result<(BlockHistory, Instant)>>| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("a writer panicked")))
        };
        let ends: Result<Vec<_>> = writers.into_iter().map(join).collect();
        (taken, attach_took, ends)
    });
    let (began, taken) = taken?;
    let (mut histories, failed_at): (Vec<_>, Vec<_>) = ends?.into_iter().unzip();
    let last_error = failed_at.into_iter().max().context("no writer")?.saturating_duration_since(began);
    println!(
        "taken over in {attach_took:.1?}, the last writer had its error after {last_error:.1?}, {} writes before",
        answers.load(Ordering::Relaxed)
    );
    ensure!(attach_took < BOUND && last_error < BOUND, "{attach_took:.1?}, {last_error:.1?}");
    check_stripes(&taken, &mut histories)?;
    // What was found once has to stay, whatever the old holder still has in flight, and however it tries.
    for _ in 0..4 {
        let again =
            file.write_all_at(AlignedBuffer::new(4096).bytes(), 0).map_err(|error| error.raw_os_error());
        ensure!(again == Err(Some(Errno::IO.raw_os_error())), "the old holder wrote: {again:?}");
        thread::sleep(Duration::from_millis(500));
        check_stripes(&taken, &mut histories)?;
    }
    wait_for_state(&node, "vol-1", "failed", BOUND)?;
    drop(file);
    node.detach("vol-1")?;
    other.detach("vol-1")
}

/// The server's network namespace, with a veth pair between it and us.
struct Namespace;

impl Namespace {
    const NAME: &str = "volnode-far";
    const FAR_ADDRESS: &str = "198.18.77.2";

    fn make() -> Result<Self> {
        sh("ip netns add volnode-far
            ip link add vn-near type veth peer name vn-far netns volnode-far
            ip addr add 198.18.77.1/30 dev vn-near
            ip link set vn-near up
            ip -n volnode-far addr add 198.18.77.2/30 dev vn-far
            ip -n volnode-far link set vn-far up
            ip -n volnode-far link set lo up")
        .map(|_| Self)
    }

    /// With `down` nothing that either side sends arrives, and nobody is told.
    fn set_link(state: &str) -> Result<()> {
        run("ip", &["-n", Self::NAME, "link", "set", "vn-far", state]).map(drop)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Takes the pair with it.
        if let Err(error) = run("ip", &["netns", "del", Self::NAME]) {
            println!("the namespace stays: {error:#}");
        }
    }
}

/// 15 s without an acknowledgement or 20 s without a reply, and the rest for a slow machine.
const NOTICE_DEADLINE: Duration = Duration::from_secs(60);

fn vanishing_packets(env: &Env) -> Result<()> {
    let _namespace = Namespace::make()?;
    let node = StorageNode::start_in_netns(env, Namespace::NAME, Namespace::FAR_ADDRESS)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let device = node.attach(&["vol-1", "--queues", "2"])?;
    verify_meanwhile(&device, || {
        thread::sleep(Duration::from_secs(1));
        let before = reconnects(&node, "vol-1")?;
        let started = Instant::now();
        Namespace::set_link("down")?;
        // The node daemon is asked through its Unix socket.
        wait_for_state(&node, "vol-1", "stalled", NOTICE_DEADLINE)?;
        let noticed = started.elapsed();
        ensure!(noticed > Duration::from_secs(5), "that was no time-out: {noticed:.1?}");
        Namespace::set_link("up")?;
        wait_for_state(&node, "vol-1", "live", NOTICE_DEADLINE)?;
        println!("noticed after {noticed:.1?}, connected after {:.1?}", started.elapsed());
        ensure!(reconnects(&node, "vol-1")? > before);
        Ok(())
    })?;
    node.detach("vol-1")
}
