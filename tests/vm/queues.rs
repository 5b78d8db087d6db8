//! Several queues and connections: data comes back, every connection works, threads stay where their requests are, and
//! what cannot be is refused.
//!
//! That a FLUSH covers the writes of every connection is shown by `lying_disk`, on a disk that loses the rest.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use testlab::direct_io::{AlignedBuffer, open_direct};
use testlab::harness::{Env, Test};
use testlab::process_resources::number_after;
use testlab::shell::run;
use testlab::storage_node::StorageNode;

use crate::fio::verify;
use crate::foreign::{Server, attach_when_there};

pub(crate) const TESTS: &[Test] = &[
    Test::new("queues::two_queues_with_four_connections_verify", two_queues_with_four_connections)
        .within(300),
    Test::new("queues::one_queue_with_three_connections_verifies", one_queue_with_three_connections)
        .within(300),
    Test::new("queues::threads_stay_on_their_queues_processors", threads_stay_on_their_queues_processors),
    Test::new("queues::a_polling_thread_sleeps_only_when_nothing_comes", a_polling_thread),
    Test::new("queues::the_default_is_what_the_server_allows", the_default_is_what_the_server_allows).once(),
    Test::new("queues::what_cannot_be_is_refused", what_cannot_be_is_refused).once(),
];

/// volctl's exit codes, as `volctl --help` documents them.
const USAGE: i32 = 2;

const NBDKIT_URI: &str = "nbd://127.0.0.1:10997/";

fn two_queues_with_four_connections(env: &Env) -> Result<()> {
    verify_on(env, 2, 4)
}

fn one_queue_with_three_connections(env: &Env) -> Result<()> {
    verify_on(env, 1, 3)
}

fn verify_on(env: &Env, queues: u64, connections: u64) -> Result<()> {
    let node = StorageNode::start_on_xfs(env)?;
    node.volctl(&["create", "vol-1", "--size", "64M"])?.succeeded()?;
    let (wanted_queues, wanted_connections) = (queues.to_string(), connections.to_string());
    let wanted = ["--queues", &wanted_queues, "--connections", &wanted_connections, "--queue-depth", "16"];
    let device = node.attach(&[&["vol-1"][..], &wanted].concat())?;
    let attachment = node.attachment("vol-1")?;
    ensure!(attachment["nr_hw_queues"] == queues, "{attachment}");
    ensure!(attachment["nr_connections"] == connections, "{attachment}");
    ensure!(attachment["queue_depth"] == 16, "{attachment}");
    verify(&device, 0, 32, 32)?;
    let sent_bytes = bytes_sent_to(&node.data_address)?;
    ensure!(sent_bytes.len() as u64 == connections, "{sent_bytes:?}");
    // What fio wrote went over all of them, not over one; how much, its sizes and the moment decide.
    let all: u64 = sent_bytes.iter().sum();
    let fair = all / sent_bytes.len() as u64;
    ensure!(sent_bytes.iter().all(|&bytes| bytes > fair / 32), "a connection was left out: {sent_bytes:?}");
    node.detach("vol-1")
}

/// Bytes sent so far on each established connection to that address.
fn bytes_sent_to(address: &str) -> Result<Vec<u64>> {
    let text = run("ss", &["-tinHO", "state", "established", "dst", address])?;
    let bytes_of = |line: &str| {
        let field = line.split_whitespace().find_map(|word| word.strip_prefix("bytes_sent:"));
        field.map_or(Ok(0), |bytes| bytes.parse().with_context(|| line.to_owned()))
    };
    text.lines().map(bytes_of).collect()
}

/// Requests of a disk that is read one block at a time.
const SINGLE_READS: u64 = 1000;

fn a_polling_thread(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    node.volctl(&["create", "vol-1", "--size", "16M"])?.succeeded()?;
    let mut sleeps = Vec::new();
    for busy_poll_us in [0, 10_000] {
        let option = busy_poll_us.to_string();
        let device = node.attach(&["vol-1", "--queues", "1", "--busy-poll", &option])?;
        let attachment = node.attachment("vol-1")?;
        ensure!(attachment["busy_poll_us"] == busy_poll_us, "{attachment}");
        verify(&device, 0, 8, 8)?;
        let thread = thread_named(attachment["pid"].as_u64().context("pid")?, "ublk-q0")?;
        let before = times_slept(&thread)?;
        let disk = open_direct(&device)?;
        let mut block = AlignedBuffer::new(4096);
        for number in 0..SINGLE_READS {
            disk.read_exact_at(block.bytes(), number * 4096)?;
        }
        drop(disk);
        sleeps.push(times_slept(&thread)? - before);
        std::thread::sleep(Duration::from_millis(100));
        let idle = times_slept(&thread)?;
        std::thread::sleep(Duration::from_secs(1));
        ensure!(times_slept(&thread)? - idle <= 2, "the thread of an idle disk woke up");
        node.detach("vol-1")?;
    }
    println!("{SINGLE_READS} reads: {sleeps:?} sleeps");
    ensure!(sleeps[0] > SINGLE_READS / 2, "without polling there is a sleep in every read");
    ensure!(sleeps[1] < SINGLE_READS / 4, "it does not poll");
    Ok(())
}

/// The directory in /proc of the process's thread of that name.
fn thread_named(pid: u64, name: &str) -> Result<PathBuf> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        // One that has ended meanwhile has no name.
        if fs::read_to_string(thread.join("comm")).is_ok_and(|comm| comm.trim_end() == name) {
            return Ok(thread);
        }
    }
    bail!("process {pid} has no thread {name}")
}

fn times_slept(thread: &Path) -> Result<u64> {
    number_after(&fs::read_to_string(thread.join("status"))?, "voluntary_ctxt_switches:")
}

fn threads_stay_on_their_queues_processors(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    node.volctl(&["create", "vol-1", "--size", "16M"])?.succeeded()?;
    // By default there is a queue for each processor.
    let device = node.attach(&["vol-1"])?;
    let attachment = node.attachment("vol-1")?;
    let pid = attachment["pid"].as_u64().context("pid")?;
    let nr_hw_queues = attachment["nr_hw_queues"].as_u64().context("nr_hw_queues")?;
    let nr_cpus = std::thread::available_parallelism()?.get() as u64;
    ensure!(nr_hw_queues == nr_cpus.min(4), "{nr_hw_queues} queues on {nr_cpus} processors");
    ensure!(nr_hw_queues > 1, "this test needs a machine with two processors");
    for queue_id in 0..nr_hw_queues {
        let name = device.file_name().context("a device's name")?.to_string_lossy().into_owned();
        let list = format!("/sys/block/{name}/mq/{queue_id}/cpu_list");
        let wanted = cpus_of(&fs::read_to_string(&list).context(list)?)?;
        let is = cpus_of(&allowed_cpus(pid, &format!("ublk-q{queue_id}"))?)?;
        ensure!(is == wanted, "queue {queue_id} has the requests of {wanted:?}, its thread is on {is:?}");
    }
    node.detach("vol-1")?;

    // A single queue has the requests of every processor.
    node.attach(&["vol-1", "--queues", "1"])?;
    let pid = node.attachment("vol-1")?["pid"].as_u64().context("pid")?;
    let is = cpus_of(&allowed_cpus(pid, "ublk-q0")?)?;
    ensure!(is.len() as u64 == nr_cpus, "the only queue's thread is on {is:?} alone");
    node.detach("vol-1")
}

/// `Cpus_allowed_list` of the process's thread of that name.
fn allowed_cpus(pid: u64, thread_name: &str) -> Result<String> {
    let status = fs::read_to_string(thread_named(pid, thread_name)?.join("status"))?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.map(str::to_owned).context("no Cpus_allowed_list")
}

/// The members of a list such as `0-2, 5`.
fn cpus_of(list: &str) -> Result<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for range in list.split(',').map(str::trim) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<usize>().context("first")?..=last.parse().context("last")?);
    }
    Ok(cpus)
}

fn the_default_is_what_the_server_allows(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    let server = nbdkit_without_multi_conn()?;
    let device = attach_when_there(&node, NBDKIT_URI)?;
    let attachment = node.attachment(NBDKIT_URI)?;
    ensure!(attachment["nr_hw_queues"] == 1 && attachment["nr_connections"] == 1, "{attachment}");
    verify(Path::new(&device), 0, 16, 8)?;
    node.detach(NBDKIT_URI)?;
    for asked in [["--queues", "2"], ["--connections", "2"]] {
        let refused = node.volctl(&[&["attach", NBDKIT_URI][..], &asked].concat())?;
        ensure!(refused.exit_code != 0 && refused.stderr.contains("several connections"), "{refused:?}");
        ensure!(refused.stderr.contains("one queue and one connection"), "{refused:?}");
    }
    // Nothing half-made is in the way of what works.
    node.attach(&[NBDKIT_URI, "--queues", "1", "--connections", "1"])?;
    node.detach(NBDKIT_URI)?;
    drop(server);
    Ok(())
}

fn nbdkit_without_multi_conn() -> Result<Server> {
    let listen = ["-f", "-i", "127.0.0.1", "-p", "10997"];
    let serve = ["--filter=multi-conn", "memory", "64M", "multi-conn-mode=disable"];
    Server::start("nbdkit", &[&listen[..], &serve].concat())
}

fn what_cannot_be_is_refused(env: &Env) -> Result<()> {
    let node = StorageNode::start(env)?;
    node.volctl(&["create", "vol-1", "--size", "16M"])?.succeeded()?;
    for (asked, why) in [
        (["--queues", "3", "--connections", "2"], "too few"),
        (["--queues", "1", "--connections", "257"], "more than 256"),
        (["--queues", "257", "--connections", "257"], "more than 256"),
        (["--queues", "1", "--queue-depth", "4097"], "more than 4096"),
    ] {
        let refused = node.volctl(&[&["attach", "vol-1"][..], &asked].concat())?;
        ensure!(refused.exit_code == USAGE && refused.stderr.contains(why), "{asked:?}: {refused:?}");
    }
    // More queues than there are processors are as many as there are; the connections are all made.
    let nr_cpus = std::thread::available_parallelism()?.get();
    let (more, connections) = ((nr_cpus + 1).to_string(), nr_cpus * 2 + 1);
    node.attach(&["vol-1", "--queues", &more, "--connections", &connections.to_string()])?;
    let attachment = node.attachment("vol-1")?;
    ensure!(attachment["nr_hw_queues"] == nr_cpus, "{attachment}");
    ensure!(attachment["nr_connections"] == connections, "{attachment}");
    // The same wish finds the same attachment; another is told that it differs.
    node.attach(&["vol-1", "--queues", &more])?;
    let differs = node.volctl(&["attach", "vol-1", "--connections", "1"])?;
    ensure!(differs.stderr.contains("nr_connections"), "{differs:?}");
    node.detach("vol-1")
}
