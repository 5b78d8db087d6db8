//! A snapshot under running writes equals one legal instant, on all connections and volumes.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proto::nbd::transmission::{Command, CommandFlags};
use server::backend::file::CacheMode;
use server::catalog::VolumeRecord;
use uuid::Uuid;

use super::client::Client;
use super::stage::{Stage, snapshot_of};
use super::support::{DEADLINE, Random, seed};

const BLOCK_BYTES: usize = 4096;
const SECTOR_BYTES: usize = 512;
const BLOCKS: u64 = 4096;
const CONNECTIONS: u32 = 4;

/// When a write began and was answered, in events of all of them.
struct Written {
    began: u64,
    answered: u64,
}

/// What was written to each block, oldest first; never two at once.
#[derive(Default)]
struct History {
    events: AtomicU64,
    by_block: Mutex<BTreeMap<(usize, u64), Vec<Written>>>,
}

impl History {
    fn event(&self) -> u64 {
        self.events.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn write(&self, client: &mut Client, volume: usize, block: u64) {
        let began = self.event();
        self.by_block
            .lock()
            .unwrap()
            .entry((volume, block))
            .or_default()
            .push(Written { began, answered: u64::MAX });
        let mut payload = vec![0; BLOCK_BYTES];
        for sector in payload.chunks_mut(SECTOR_BYTES) {
            sector[..8].copy_from_slice(&began.to_le_bytes());
            sector[8..16].copy_from_slice(&block.to_le_bytes());
        }
        client.write(block * BLOCK_BYTES as u64, &payload).unwrap();
        let answered = self.event();
        let mut by_block = self.by_block.lock().unwrap();
        by_block.get_mut(&(volume, block)).unwrap().last_mut().unwrap().answered = answered;
    }

    /// Checks copies of volumes, in their order, that were made by a call that lasted from one event to another.
    fn check(&self, copies: &[Vec<u8>], called: u64, returned: u64) {
        let mut found = BTreeMap::new();
        for (volume, bytes) in copies.iter().enumerate() {
            for (number, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                let block = (number * SECTOR_BYTES / BLOCK_BYTES) as u64;
                let stamp = u64::from_le_bytes(sector[..8].try_into().unwrap());
                let place = u64::from_le_bytes(sector[8..16].try_into().unwrap());
                assert!(stamp == 0 || place == block, "block {block} has what was written to {place}");
                let seen: &mut Vec<u64> = found.entry((volume, block)).or_default();
                seen.push(stamp);
            }
        }
        let newest = found.values().flatten().copied().max().unwrap();
        assert!(newest < returned, "write {newest} began after the call returned ({returned})");
        let by_block = self.by_block.lock().unwrap();
        for (place, writes) in by_block.iter() {
            // Whatever was answered before the call, or before something began that is in.
            let is_due = |write: &&Written| write.answered < called.max(newest);
            let due = writes.iter().filter(is_due).map(|write| write.began).max().unwrap_or(0);
            for stamp in &found[place] {
                let is_known = *stamp == 0 || writes.iter().any(|write| write.began == *stamp);
                assert!(is_known, "{place:?} has {stamp}, which nobody wrote there");
                assert!(
                    *stamp >= due,
                    "{place:?} has write {stamp}, not {due}: called at {called}, returned at {returned}, newest {newest}"
                );
            }
        }
    }
}

fn all_stages() -> impl Iterator<Item = Stage> {
    let kinds = [
        ("xfs", CacheMode::Auto),
        ("xfs", CacheMode::Buffered),
        ("btrfs", CacheMode::Auto),
        ("btrfs", CacheMode::Buffered),
    ];
    kinds.into_iter().filter_map(|(kind, cache)| {
        println!("{kind} {cache:?}");
        Stage::new(kind, 1 << 30, |config| config.cache = cache)
    })
}

fn create(stage: &Stage, name: &str) -> VolumeRecord {
    let capacity_bytes = BLOCKS * BLOCK_BYTES as u64;
    stage.server.create_with(name, capacity_bytes, |new| new.block_size_bytes = 4096)
}

#[test]
fn a_snapshot_under_writes_is_one_instant_of_all_connections_and_never_changes() {
    let seed = seed();
    for stage in all_stages() {
        let volume = create(&stage, "vol");
        let attachment = stage.server.attach(&volume, false);
        let (history, is_over) = (History::default(), AtomicBool::new(false));
        let mut kept: Vec<(Uuid, Vec<u8>)> = Vec::new();
        std::thread::scope(|scope| {
            let (history, is_over, stage) = (&history, &is_over, &stage);
            for slot in 0..CONNECTIONS {
                let mut client = stage.server.open(&attachment, 1, slot);
                scope.spawn(move || {
                    let mut random = Random::new(seed + u64::from(slot));
                    while !is_over.load(Ordering::Relaxed) {
                        // Blocks of its own; half of the time a few, which are overwritten again and again.
                        let range = if random.below(2) == 0 { 4 } else { BLOCKS / u64::from(CONNECTIONS) };
                        let block = random.below(range) * u64::from(CONNECTIONS) + u64::from(slot);
                        history.write(&mut client, 0, block);
                    }
                });
            }
            for _ in 0..4 {
                std::thread::sleep(Duration::from_millis(100));
                let snapshot_uid = Uuid::new_v4();
                let called = history.event();
                let handle = stage.begin(&[snapshot_of(&volume, snapshot_uid)]).unwrap();
                let returned = history.event();
                assert_eq!(handle.wait(DEADLINE), Some(Ok(())));
                let bytes = stage.bytes_of(snapshot_uid);
                assert_eq!(bytes.len() as u64, volume.capacity_bytes);
                history.check(std::slice::from_ref(&bytes), called, returned);
                kept.push((snapshot_uid, bytes));
            }
            is_over.store(true, Ordering::Relaxed);
        });
        for (snapshot_uid, bytes) in kept {
            assert!(stage.bytes_of(snapshot_uid) == bytes, "a snapshot has changed");
        }
    }
}

/// What is written to one volume, and answered, before something is written to another is in, if that is.
#[test]
fn snapshots_of_a_group_are_of_one_instant() {
    for stage in all_stages() {
        let volumes = [create(&stage, "a"), create(&stage, "b")];
        let (history, is_over) = (History::default(), AtomicBool::new(false));
        let mut clients: Vec<Client> = volumes
            .iter()
            .map(|volume| stage.server.open(&stage.server.attach(volume, false), 1, 0))
            .collect();
        std::thread::scope(|scope| {
            let (history, is_over) = (&history, &is_over);
            scope.spawn(move || {
                for number in 0.. {
                    let (volume, block) = (number % 2, (number as u64 * 7919) % BLOCKS);
                    history.write(&mut clients[volume], volume, block);
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            for _ in 0..8 {
                std::thread::sleep(Duration::from_millis(60));
                let uids = [Uuid::new_v4(), Uuid::new_v4()];
                let wanted = [snapshot_of(&volumes[0], uids[0]), snapshot_of(&volumes[1], uids[1])];
                let called = history.event();
                let handle = stage.begin(&wanted).unwrap();
                let returned = history.event();
                assert_eq!(handle.wait(DEADLINE), Some(Ok(())));
                history.check(&uids.map(|uid| stage.bytes_of(uid)), called, returned);
            }
            is_over.store(true, Ordering::Relaxed);
        });
    }
}

/// Changes of every sort wait for the pieces that they change, a large one for all of them.
#[test]
fn a_change_of_any_size_waits_until_what_it_changes_is_copied() {
    for stage in all_stages() {
        let volume = stage.fragmented("vol", 6000);
        let before = std::fs::read(stage.volume_path(&volume)).unwrap();
        let attachment = stage.server.attach(&volume, false);
        let mut client = stage.server.open(&attachment, 1, 0);
        let snapshot_uid = Uuid::new_v4();
        let handle = stage.begin(&[snapshot_of(&volume, snapshot_uid)]).unwrap();
        let (none, half) = (CommandFlags::NONE, volume.capacity_bytes / 2);
        client.call(Command::Write, none, volume.capacity_bytes - 4096, 4096, &[0xee; 4096]).unwrap();
        client.call(Command::WriteZeroes, CommandFlags::NO_HOLE, half, 1 << 20, &[]).unwrap();
        client.call(Command::Trim, none, 0, half as u32, &[]).unwrap();
        client.flush().unwrap();
        assert_eq!(handle.wait(DEADLINE), Some(Ok(())));
        assert!(stage.bytes_of(snapshot_uid) == before);
        assert_eq!(client.read(0, 1 << 20), Ok(vec![0; 1 << 20]));
        assert_eq!(client.read(half, 1 << 20), Ok(vec![0; 1 << 20]));
        assert_eq!(client.read(volume.capacity_bytes - 4096, 4096), Ok(vec![0xee; 4096]));
    }
}

/// A reading of nothing that is copied is in no relation to how much there is of it.
#[test]
fn holes_are_copied_at_once() {
    for kind in ["xfs", "btrfs"] {
        let Some(stage) = Stage::new(kind, 1 << 30, |_| {}) else { return };
        let volume = stage.server.create_with("vol", 1 << 40, |new| new.block_size_bytes = 4096);
        let began = Instant::now();
        let snapshot_uid = stage.snapshot(&volume);
        println!("{kind}: a tebibyte of nothing in {:?}", began.elapsed());
        assert!(stage.server.data.copy_files().allocated_bytes(snapshot_uid) < 1 << 20);
    }
}
