//! Requests are answered while a snapshot is made; how long they stand still is a measurement on a larger file, which
//! `docs/performance.md` has the figures of.

use std::time::{Duration, Instant};

use proto::nbd::transmission::{Command, CommandFlags};
use server::backend::file::CacheMode;
use server::catalog::VolumeRecord;
use uuid::Uuid;

use super::client::Client;
use super::stage::{EXTENT_BYTES, Stage, snapshot_of};
use super::support::{Random, seed};

/// How long the load runs without a snapshot, where that is measured.
const BEFORE: Duration = Duration::from_secs(4);
/// And where only the answers matter.
const BRIEFLY: Duration = Duration::from_millis(200);
/// Of the file where nothing is measured: some pieces of 256 KiB.
const FEW_EXTENTS: u64 = 500;
/// Where no snapshot is made in that time, something is wrong.
const AT_MOST: Duration = Duration::from_secs(600);

/// Random blocks of 4 KiB, so many requests at once, at least once and until `is_over`; how long each took, sorted.
fn load(
    client: &mut Client,
    volume: &VolumeRecord,
    command: Command,
    depth: usize,
    mut is_over: impl FnMut() -> bool,
) -> Vec<Duration> {
    let (mut random, mut took, began) = (Random::new(seed()), Vec::new(), Instant::now());
    let payload = [0x5a; EXTENT_BYTES as usize];
    let (mut under_way, mut has_begun) = (Vec::new(), false);
    loop {
        let is_late = began.elapsed() > AT_MOST;
        let is_over = is_late || (is_over() && has_begun);
        has_begun = true;
        while !is_over && under_way.len() < depth {
            let offset = random.below(volume.capacity_bytes / EXTENT_BYTES) * EXTENT_BYTES;
            let sent: &[u8] = if command == Command::Write { &payload } else { &[] };
            let cookie = client.send(command, CommandFlags::NONE, offset, EXTENT_BYTES as u32, sent);
            under_way.push((cookie, Instant::now()));
        }
        if under_way.is_empty() {
            assert!(!is_late, "no end");
            took.sort_unstable();
            return took;
        }
        let answer = client.receive().unwrap();
        assert_eq!(answer.error, 0);
        let index = under_way.iter().position(|(cookie, _)| *cookie == answer.cookie).unwrap();
        took.push(under_way.swap_remove(index).1.elapsed());
    }
}

fn milliseconds(took: &[Duration], per_mille: usize) -> f64 {
    took[(took.len() * per_mille / 1000).min(took.len() - 1)].as_secs_f64() * 1e3
}

/// `VOLNODE_EXTENTS`: measures with a file of so many, which takes minutes and wants the machine to itself; `VOLNODE_FS`: `xfs`
/// or `btrfs`.
#[test]
fn requests_are_answered_while_a_snapshot_is_made_and_how_long_they_stand_still_is_printed() {
    let asked: Option<u64> = std::env::var("VOLNODE_EXTENTS").ok().map(|text| text.parse().unwrap());
    let (extents, before) = asked.map_or((FEW_EXTENTS, BRIEFLY), |extents| (extents, BEFORE));
    let kind = std::env::var("VOLNODE_FS").unwrap_or_else(|_| "xfs".to_owned());
    let modes = [(CacheMode::Auto, "O_DIRECT"), (CacheMode::Buffered, "page cache")];
    println!(
        "| extents | mode | load | p50 / p99 / max without, ms | during a snapshot, ms | per second, ratio | snapshot, s | call, ms |"
    );
    for (cache, mode) in modes {
        let bytes = (2 * extents * 2 * EXTENT_BYTES).max(2 << 30);
        let Some(stage) = Stage::new(&kind, bytes, |config| config.cache = cache) else { return };
        let volume = stage.fragmented("vol", extents);
        let mut client = stage.server.open(&stage.server.attach(&volume, false), 1, 0);
        for (command, depth) in
            [(Command::Write, 1), (Command::Write, 32), (Command::Read, 1), (Command::Read, 32)]
        {
            let began = Instant::now();
            let without = load(&mut client, &volume, command, depth, || began.elapsed() > before);
            client.flush().unwrap();
            let snapshot_uid = Uuid::new_v4();
            let called = Instant::now();
            let handle = stage.begin(&[snapshot_of(&volume, snapshot_uid)]).unwrap();
            let call = called.elapsed();
            let began = Instant::now();
            let mut all_copied = None;
            let during = load(&mut client, &volume, command, depth, || {
                let (done, total) = handle.progress();
                if done == total {
                    all_copied.get_or_insert_with(|| began.elapsed());
                }
                all_copied.is_some()
            });
            let (copied, ended) = (all_copied.unwrap(), handle.wait(AT_MOST));
            assert_eq!(ended, Some(Ok(())));
            assert!(!without.is_empty() && !during.is_empty(), "no request was answered");
            let figures = |took: &[Duration]| {
                let [p50, p99] = [500, 990].map(|per_mille| milliseconds(took, per_mille));
                format!("{p50:.2} / {p99:.2} / {:.1}", milliseconds(took, 1000))
            };
            let rate = |took: &[Duration], time: Duration| took.len() as f64 / time.as_secs_f64();
            println!(
                "| {extents} | {mode} | {command:?} at depth {depth} | {} | {} | {:.2} | {:.2} | {:.1} |",
                figures(&without),
                figures(&during),
                rate(&during, copied) / rate(&without, before),
                began.elapsed().as_secs_f64(),
                call.as_secs_f64() * 1e3
            );
            stage
                .server
                .data
                .copy_files()
                .delete(server::volume::copying::CopyTarget::Snapshot(snapshot_uid))
                .unwrap();
        }
    }
}
