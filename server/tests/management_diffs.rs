//! What changed between snapshots, through the management API of the real volserver, on file systems of the test's own: against a comparison
//! byte by byte, on histories that follow from a seed.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

#[path = "choices/mod.rs"]
mod choices;
#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests, as the next one; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;
mod volserver;

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use proto::nbd::transmission::{Command, CommandFlags};
use proto::v1::{self, management_client::ManagementClient};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use choices::Choices;
use client::Client;
use support::LoopFs;
use volserver::{DEADLINE, Volserver, command, create_request};

/// Both file systems allocate by this, in bytes.
const UNIT: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Of a reader that is slow: a part of a comparison fills it.
const WINDOW_BYTES: u32 = 4096;

/// A server on a file system, and a client of it.
struct Bench {
    // In this order: the server ends before its storage.
    server: Volserver,
    client: ManagementClient<Channel>,
    log_dir: tempfile::TempDir,
    fs: LoopFs,
}

impl Bench {
    /// `None`, with the reason said, where the file system cannot be made.
    async fn on(kind: &str, fs_bytes: u64) -> Option<Self> {
        let fs = LoopFs::new_in_one_piece(kind, fs_bytes)?;
        let log_dir = tempfile::tempdir().unwrap();
        let server = Self::start(&fs, &log_dir);
        let client = server.client().await;
        Some(Self { server, client, log_dir, fs })
    }

    fn start(fs: &LoopFs, log_dir: &tempfile::TempDir) -> Volserver {
        let mut command = command(&fs.mount.join("data"));
        command.env("VOLSERVER_RUNTIME_DIR", log_dir.path().join("run")).arg("--export-by-name");
        Volserver::start_with(command, &log_dir.path().join("log"))
    }

    /// The server is killed, and another started.
    async fn restart(self) -> Self {
        let Self { server, log_dir, fs, .. } = self;
        server.kill();
        let server = Self::start(&fs, &log_dir);
        let client = server.client().await;
        Self { server, client, log_dir, fs }
    }

    async fn create(&mut self, name: &str, capacity_bytes: u64, block_size_bytes: u32) -> v1::Volume {
        let request = v1::CreateVolumeRequest { capacity_bytes, block_size_bytes, ..create_request(name) };
        self.client.create_volume(request).await.unwrap().into_inner()
    }

    /// To its end.
    async fn snapshot(&mut self, volume: &str, name: &str) -> v1::Snapshot {
        let request = v1::CreateSnapshotRequest {
            volume_names: vec![volume.to_owned()],
            name: name.to_owned(),
            ..Default::default()
        };
        let answer = self.client.create_snapshot(request.clone()).await.unwrap().into_inner();
        if let Some(operation) = answer.operation {
            self.finish(operation).await;
        }
        self.client.create_snapshot(request).await.unwrap().into_inner().snapshots.remove(0)
    }

    async fn finish(&mut self, mut operation: v1::Operation) {
        let deadline = Instant::now() + DEADLINE;
        while operation.state() == v1::OperationState::Running {
            assert!(Instant::now() < deadline, "{operation:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
            let request = v1::GetOperationRequest { operation_id: operation.operation_id };
            operation = self.client.get_operation(request).await.unwrap().into_inner();
        }
        assert_eq!(operation.state(), v1::OperationState::Succeeded, "{operation:?}");
    }

    async fn diff(&mut self, request: v1::DiffSnapshotsRequest) -> Result<Diff, Status> {
        let mut stream = self.client.diff_snapshots(request).await?.into_inner();
        Diff::of(&mut stream).await
    }

    async fn delete_snapshot(&mut self, uid: &str) -> Result<bool, Status> {
        let request = v1::DeleteSnapshotRequest { snapshot_uid: uid.to_owned(), ..Default::default() };
        Ok(self.client.delete_snapshot(request).await?.into_inner().existed)
    }

    /// Opens the volume for writing, when nobody has it any more.
    fn open(&self, name: &str) -> Client {
        Client::open(self.server.data[0], name).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn path(&self, directory: &str, uid: &str) -> PathBuf {
        self.fs.mount.join("data").join(directory).join(uid)
    }

    fn snapshot_files(&self) -> usize {
        std::fs::read_dir(self.fs.mount.join("data/snapshots")).unwrap().count()
    }
}

/// What was told of a comparison.
#[derive(Debug, PartialEq)]
struct Diff {
    ranges: Vec<v1::ChangedRange>,
    total: v1::DiffTotal,
}

impl Diff {
    async fn of(stream: &mut Streaming<v1::DiffSnapshotsResponse>) -> Result<Self, Status> {
        let mut ranges: Vec<v1::ChangedRange> = Vec::new();
        let mut told_bytes = 0;
        while let Some(part) = stream.message().await? {
            ranges.extend(part.ranges);
            assert!(part.next_offset_bytes >= told_bytes);
            told_bytes = part.next_offset_bytes;
            assert!(ranges.last().is_none_or(|last| end(last) <= told_bytes), "told before it is said");
            if let Some(total) = part.total {
                assert!(stream.message().await?.is_none(), "the total is last");
                return Ok(Self { ranges, total }.checked());
            }
        }
        panic!("it ended without its total");
    }

    /// In order, inside of the target, and as the total says.
    fn checked(self) -> Self {
        let ranges = &self.ranges;
        assert!(ranges.windows(2).all(|pair| end(&pair[0]) <= pair[1].offset_bytes), "{ranges:?}");
        assert!(ranges.iter().all(|range| range.length_bytes > 0));
        assert!(ranges.last().is_none_or(|last| end(last) <= self.total.target_capacity_bytes));
        let bytes = |kind| {
            let of_kind = ranges.iter().filter(|range| range.kind() == kind);
            of_kind.map(|range| range.length_bytes).sum::<u64>()
        };
        assert_eq!(bytes(v1::RangeKind::Data), self.total.data_bytes);
        assert_eq!(bytes(v1::RangeKind::Zero), self.total.zero_bytes);
        assert_eq!(ranges.len() as u64, self.total.ranges);
        self
    }

    /// Against the bytes of both sides: every byte that differs is told, what is told as zeroes is that, and what was told is inside of the
    /// units that were touched, if those are known.
    fn check(&self, base: &[u8], target: &[u8], touched: Option<&BTreeSet<u64>>, what: &str) {
        let mut told = vec![None; target.len()];
        for range in &self.ranges {
            told[range.offset_bytes as usize..end(range) as usize].fill(Some(range.kind()));
        }
        for (at, byte) in target.iter().enumerate() {
            let before = base.get(at).copied().unwrap_or(0);
            assert!(*byte == before || told[at].is_some(), "{what}: byte {at} is not told");
            assert!(told[at] != Some(v1::RangeKind::Zero) || *byte == 0, "{what}: byte {at} is no zero");
            let is_touched = touched.is_none_or(|touched| touched.contains(&(at as u64 / UNIT)));
            assert!(is_touched || told[at].is_none(), "{what}: byte {at} is told and was not touched");
        }
    }
}

fn end(range: &v1::ChangedRange) -> u64 {
    range.offset_bytes + range.length_bytes
}

fn snapshot_side(snapshot: &v1::Snapshot) -> v1::DiffSide {
    v1::DiffSide { snapshot_uid: snapshot.snapshot_uid.clone(), ..Default::default() }
}

fn volume_side(name: &str) -> v1::DiffSide {
    v1::DiffSide { volume_name: name.to_owned(), ..Default::default() }
}

fn between(base: v1::DiffSide, target: v1::DiffSide) -> v1::DiffSnapshotsRequest {
    v1::DiffSnapshotsRequest { base: Some(base), target: Some(target), offset_bytes: 0 }
}

fn reason_of(status: &Status) -> (Code, String) {
    (status.code(), status.get_details_error_info().map(|info| info.reason).unwrap_or_default())
}

/// Changes a volume, and writes down which units it touches.
fn change(
    choices: &mut Choices,
    client: &mut Client,
    capacity_bytes: u64,
    block: u64,
    touched: &mut BTreeSet<u64>,
) {
    let blocks = capacity_bytes / block;
    for _ in 0..1 + choices.below(12) {
        let first = choices.below(blocks);
        let count = (1 + choices.below(64)).min(blocks - first);
        let (offset, length) = (first * block, count * block);
        touched.extend(offset / UNIT..(offset + length).div_ceil(UNIT));
        let call =
            |client: &mut Client, command, flags| client.call(command, flags, offset, length as u32, &[]);
        match choices.below(6) {
            0 => drop(call(client, Command::Trim, CommandFlags::NONE).unwrap()),
            1 => drop(call(client, Command::WriteZeroes, CommandFlags::NONE).unwrap()),
            2 => drop(call(client, Command::WriteZeroes, CommandFlags::NO_HOLE).unwrap()),
            // The very bytes that are there.
            3 => {
                let bytes = client.read(offset, length as u32).unwrap();
                client.write(offset, &bytes).unwrap();
            }
            value => client.write(offset, &vec![value as u8; length as usize]).unwrap(),
        }
    }
    client.flush().unwrap();
}

async fn history(kind: &str, seed: u64) -> Option<()> {
    println!("{kind}: seed {seed}");
    let mut bench = Bench::on(kind, 512 * MIB).await?;
    let mut choices = Choices(seed);
    let block = [512, 4096][choices.below(2) as usize];
    let mut capacity_bytes = 4 * MIB;
    let volume = bench.create("vol", capacity_bytes, block as u32).await;
    let mut snapshots = vec![bench.snapshot("vol", "s0").await];
    let mut bytes = vec![vec![0; capacity_bytes as usize]];
    // Of which snapshot the volume is, but for what was touched since.
    let (mut base, mut touched) = (0, BTreeSet::new());
    for round in 1..8 {
        change(&mut choices, &mut bench.open("vol"), capacity_bytes, block, &mut touched);
        let what = format!("{kind}, seed {seed}, round {round}");
        match choices.below(4) {
            0 => {
                capacity_bytes += MIB / 2;
                let request =
                    v1::ResizeVolumeRequest { name: "vol".to_owned(), capacity_bytes, ..Default::default() };
                bench.client.resize_volume(request).await.unwrap();
                change(&mut choices, &mut bench.open("vol"), capacity_bytes, block, &mut touched);
            }
            1 => {
                let index = choices.below(snapshots.len() as u64) as usize;
                let name = snapshots[index].name.clone();
                let request = v1::RestoreVolumeRequest {
                    volume_name: "vol".to_owned(),
                    snapshot_name: name,
                    ..Default::default()
                };
                let restored = loop {
                    // Until the server has noticed that the client is gone.
                    match bench.client.restore_volume(request.clone()).await {
                        Err(status) if status.code() == Code::FailedPrecondition => {
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                        answer => break answer.unwrap().into_inner(),
                    }
                };
                if let Some(operation) = restored.operation {
                    bench.finish(operation).await;
                }
                (base, touched) = (index, BTreeSet::new());
                change(&mut choices, &mut bench.open("vol"), capacity_bytes, block, &mut touched);
            }
            _ => {}
        }
        let live = std::fs::read(bench.path("volumes", &volume.volume_uid)).unwrap();
        let of_base = snapshot_side(&snapshots[base]);
        let diff = bench.diff(between(of_base.clone(), volume_side("vol"))).await.unwrap();
        diff.check(&bytes[base], &live, Some(&touched), &format!("{what}, as it is"));
        let snapshot = bench.snapshot("vol", &format!("s{round}")).await;
        let of_snapshot = std::fs::read(bench.path("snapshots", &snapshot.snapshot_uid)).unwrap();
        assert!(of_snapshot == live, "{what}");
        let same = bench.diff(between(of_base, snapshot_side(&snapshot))).await.unwrap();
        assert_eq!(same, diff, "{what}: as the volume at that instant");
        for (index, other) in snapshots.iter().enumerate() {
            let (one, two) = (snapshot_side(other), snapshot_side(&snapshot));
            let forth = bench.diff(between(one.clone(), two.clone())).await.unwrap();
            forth.check(&bytes[index], &of_snapshot, None, &format!("{what}, from {index}"));
            let back = bench.diff(between(two, one)).await.unwrap();
            back.check(&of_snapshot, &bytes[index], None, &format!("{what}, back to {index}"));
        }
        snapshots.push(snapshot);
        bytes.push(of_snapshot);
        (base, touched) = (round, BTreeSet::new());
    }
    let last = snapshots.last().unwrap();
    let all = v1::DiffSnapshotsRequest { target: Some(snapshot_side(last)), ..Default::default() };
    bench.diff(all).await.unwrap().check(&[], bytes.last().unwrap(), None, "without a base");
    of_clone(&mut bench, &mut choices, last, bytes.last().unwrap()).await;
    assert_eq!(bench.snapshot_files(), snapshots.len() + 1, "of the volume's instants nothing is left");
    Some(())
}

/// A clone is compared with the snapshot that it was made of.
async fn of_clone(bench: &mut Bench, choices: &mut Choices, snapshot: &v1::Snapshot, bytes: &[u8]) {
    let request = v1::CloneVolumeRequest {
        name: "clone".to_owned(),
        source_snapshot_uid: snapshot.snapshot_uid.clone(),
        capacity_bytes: snapshot.capacity_bytes + MIB,
        ..Default::default()
    };
    if let Some(operation) = bench.client.clone_volume(request).await.unwrap().into_inner().operation {
        bench.finish(operation).await;
    }
    let (capacity_bytes, block) = (snapshot.capacity_bytes + MIB, u64::from(snapshot.block_size_bytes));
    let mut touched = BTreeSet::new();
    change(choices, &mut bench.open("clone"), capacity_bytes, block, &mut touched);
    let of_clone = bench.snapshot("clone", "s").await;
    let cloned = std::fs::read(bench.path("snapshots", &of_clone.snapshot_uid)).unwrap();
    let diff = bench.diff(between(snapshot_side(snapshot), snapshot_side(&of_clone))).await.unwrap();
    assert_eq!(diff.total.target_capacity_bytes, capacity_bytes);
    diff.check(bytes, &cloned, Some(&touched), "a clone");
}

/// Repeats with the seed of a failure: `VOLNODE_SEED`.
fn seeds(default: Range<u64>) -> Vec<u64> {
    match std::env::var("VOLNODE_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => default.collect(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_that_differs_is_told_and_nothing_beyond_the_units_that_were_touched() {
    for seed in seeds(0..4) {
        for kind in ["xfs", "btrfs"] {
            if history(kind, seed).await.is_none() {
                return;
            }
        }
    }
}

/// A volume whose file has so many extents, each with a byte of its own, and holes as long between them.
async fn fragmented(bench: &mut Bench, extents: u64) -> v1::Volume {
    let volume = bench.create("vol", extents * 2 * UNIT, 4096).await;
    fill(&bench.path("volumes", &volume.volume_uid), (0..extents).map(|extent| extent * 2 * UNIT));
    volume
}

fn fill(path: &std::path::Path, offsets: impl Iterator<Item = u64>) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    for offset in offsets {
        file.write_all_at(&[(offset / UNIT % 255) as u8 + 1; UNIT as usize], offset).unwrap();
    }
    file.sync_all().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_where_another_ended() {
    let Some(mut bench) = Bench::on("xfs", 512 * MIB).await else { return };
    let volume = fragmented(&mut bench, 4000).await;
    let first = bench.snapshot("vol", "a").await;
    // Every other extent once more, at another address.
    let again = (0..2000).map(|extent| extent * 4 * UNIT);
    fill(&bench.path("volumes", &volume.volume_uid), again);
    let second = bench.snapshot("vol", "b").await;
    let request = between(snapshot_side(&first), snapshot_side(&second));
    let whole = bench.diff(request.clone()).await.unwrap();
    assert_eq!((whole.total.data_bytes, whole.total.ranges), (2000 * UNIT, 2000));
    let mut stream = bench.client.diff_snapshots(request.clone()).await.unwrap().into_inner();
    let part = stream.message().await.unwrap().unwrap();
    assert!(part.total.is_none(), "there is more than a part");
    drop(stream);
    let rest = v1::DiffSnapshotsRequest { offset_bytes: part.next_offset_bytes, ..request.clone() };
    let rest = bench.diff(rest).await.unwrap();
    assert_eq!([part.ranges, rest.ranges].concat(), whole.ranges);
    let inside = v1::DiffSnapshotsRequest { offset_bytes: 1024, ..request.clone() };
    assert_eq!(bench.diff(inside).await.unwrap().total.data_bytes, 2000 * UNIT - 1024);
    for (base, target, offset_bytes, field) in [
        (snapshot_side(&first), snapshot_side(&second), 4000 * 2 * UNIT + 1, "offset_bytes"),
        (snapshot_side(&first), volume_side("vol"), 4096, "offset_bytes"),
        (volume_side("vol"), snapshot_side(&second), 0, "base.snapshot_name"),
        (snapshot_side(&first), v1::DiffSide::default(), 0, "target.volume_name"),
    ] {
        let request = v1::DiffSnapshotsRequest { offset_bytes, ..between(base, target) };
        let refused = bench.diff(request).await.unwrap_err();
        assert_eq!(reason_of(&refused), (Code::InvalidArgument, reason::INVALID_FIELD.to_owned()));
        let violations = refused.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
    }
    let none = v1::DiffSide { snapshot_uid: volume.volume_uid, ..Default::default() };
    let refused = bench.diff(between(none, volume_side("vol"))).await.unwrap_err();
    assert_eq!(reason_of(&refused), (Code::NotFound, reason::SNAPSHOT_NOT_FOUND.to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_compared_stays_until_its_reader_leaves_and_a_kill_leaves_nothing() {
    let Some(mut bench) = Bench::on("xfs", 512 * MIB).await else { return };
    // More parts than wait anywhere on the way to a reader that does not read.
    let endpoint = Endpoint::from_shared(format!("http://{}", bench.server.management)).unwrap();
    let endpoint = endpoint.initial_stream_window_size(WINDOW_BYTES);
    bench.client = ManagementClient::new(endpoint.connect().await.unwrap());
    let volume = fragmented(&mut bench, 16_000).await;
    let all = |target| v1::DiffSnapshotsRequest { target: Some(target), ..Default::default() };
    let snapshot = bench.snapshot("vol", "s").await;
    let uid = snapshot.snapshot_uid.clone();
    let mut stream = bench.client.diff_snapshots(all(snapshot_side(&snapshot))).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let refused = bench.delete_snapshot(&uid).await.unwrap_err();
    assert_eq!(reason_of(&refused), (Code::FailedPrecondition, reason::COPY_IN_PROGRESS.to_owned()));
    let operations = bench.client.list_operations(v1::ListOperationsRequest {}).await.unwrap().into_inner();
    let diff = operations.operations.iter().find(|one| one.kind == "diff").unwrap();
    assert_eq!(
        (diff.targets.as_slice(), diff.total_bytes),
        (&["vol@s".to_owned()][..], volume.capacity_bytes)
    );
    // Cancelled: its reader is told.
    let cancel = v1::CancelOperationRequest { operation_id: diff.operation_id.clone() };
    bench.client.cancel_operation(cancel).await.unwrap();
    let ended = Diff::of(&mut stream).await.unwrap_err();
    assert_eq!(reason_of(&ended), (Code::Aborted, reason::COPY_CANCELLED.to_owned()));
    // Left: nobody is told, and nothing is kept.
    let mut stream = bench.client.diff_snapshots(all(snapshot_side(&snapshot))).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    let deadline = Instant::now() + DEADLINE;
    while bench.delete_snapshot(&uid).await.is_err() {
        assert!(Instant::now() < deadline, "its reader has left");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Killed with an instant that is being read.
    let mut stream = bench.client.diff_snapshots(all(volume_side("vol"))).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    assert_eq!(bench.snapshot_files(), 0, "it has no name");
    let mut bench = bench.restart().await;
    assert!(stream.message().await.is_err() || Diff::of(&mut stream).await.is_err());
    let listed = bench.client.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    assert_eq!((listed.snapshots, bench.snapshot_files()), (Vec::new(), 0));
    let request = v1::DeleteVolumeRequest { name: "vol".to_owned(), ..Default::default() };
    assert!(bench.client.delete_volume(request).await.unwrap().into_inner().existed);
}

/// It costs by extents: 100,000 of them, and a tenth of those changed.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_extents_are_compared_in_seconds() {
    const EXTENTS: u64 = 100_000;
    for kind in ["xfs", "btrfs"] {
        let Some(mut bench) = Bench::on(kind, 1280 * MIB).await else { return };
        let volume = fragmented(&mut bench, EXTENTS).await;
        let first = bench.snapshot("vol", "a").await;
        let tenth = (0..EXTENTS / 10).map(|extent| extent * 20 * UNIT);
        fill(&bench.path("volumes", &volume.volume_uid), tenth);
        let second = bench.snapshot("vol", "b").await;
        let began = Instant::now();
        let diff = bench.diff(between(snapshot_side(&first), snapshot_side(&second))).await.unwrap();
        let took = began.elapsed();
        assert_eq!(diff.total.ranges, EXTENTS / 10);
        println!("{kind}: {EXTENTS} extents, {} changed: {took:?}", EXTENTS / 10);
        assert!(took < DEADLINE, "{kind}: {took:?}");
    }
}

/// What a stranger's client is told of a bitmap: runs of bytes, and whether they are dirty.
fn nbdinfo_map(address: SocketAddr, export: &str, context: &str) -> Vec<(u64, u64, bool)> {
    let uri = format!("nbd://{address}/{export}");
    let told = support::run("nbdinfo", &["--json", &format!("--map={context}"), &uri]);
    let runs: Vec<serde_json::Value> = serde_json::from_str(&told).unwrap();
    runs.iter()
        .map(|run| {
            (
                run["offset"].as_u64().unwrap(),
                run["length"].as_u64().unwrap(),
                run["type"].as_u64() == Some(1),
            )
        })
        .collect()
}

fn dirty_ranges(runs: &[(u64, u64, bool)]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for (offset, length, _) in runs.iter().filter(|(.., is_dirty)| *is_dirty) {
        match ranges.last_mut() {
            Some((last, bytes)) if *last + *bytes == *offset => *bytes += length,
            _ => ranges.push((*offset, *length)),
        }
    }
    ranges
}

/// Of a comparison, whatever the target has there.
fn changed_ranges(diff: &Diff) -> Vec<(u64, u64)> {
    let runs = diff.ranges.iter().map(|range| (range.offset_bytes, range.length_bytes, true));
    dirty_ranges(&runs.collect::<Vec<_>>())
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_read_what_changed_as_a_dirty_bitmap() {
    for tool in ["nbdinfo", "qemu-img"] {
        if !support::is_installed(tool) {
            return support::skip_without_tool(&format!("no {tool}"));
        }
    }
    for kind in ["xfs", "btrfs"] {
        let Some(mut bench) = Bench::on(kind, 512 * MIB).await else { return };
        // More extents than fit into one answer.
        let volume = fragmented(&mut bench, 6000).await;
        let first = bench.snapshot("vol", "mon").await;
        fill(&bench.path("volumes", &volume.volume_uid), (0..5000).map(|extent| extent * 2 * UNIT));
        let second = bench.snapshot("vol", "tue").await;
        let mut client = bench.open("vol");
        client.call(Command::Trim, CommandFlags::NONE, MIB, 4 << 20, &[]).unwrap();
        client.write(MIB, &[1; 8192]).unwrap();
        drop(client);
        let third = bench.snapshot("vol", "wed").await;
        let address = bench.server.data[0];
        let listed = support::run("nbdinfo", &["--list", "--json", &format!("nbd://{address}")]);
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
        let of = |name: &str| {
            let exports = listed["exports"].as_array().unwrap();
            exports.iter().find(|export| export["export-name"] == name).unwrap()["contexts"].clone()
        };
        let all = ["base:allocation", "qemu:dirty-bitmap:wed", "qemu:dirty-bitmap:tue"];
        assert_eq!(of("vol@mon"), serde_json::json!(all));
        assert_eq!(of("vol"), serde_json::json!(["base:allocation"]), "it is written to");
        for (base, target, export) in
            [(&first, &third, "vol@wed"), (&second, &third, "vol@wed"), (&third, &first, "vol@mon")]
        {
            let diff = bench.diff(between(snapshot_side(base), snapshot_side(target))).await.unwrap();
            assert!(!diff.ranges.is_empty());
            let context = format!("qemu:dirty-bitmap:{}", base.name);
            let runs = nbdinfo_map(address, export, &context);
            let told: u64 = runs.iter().map(|(_, length, _)| length).sum();
            assert_eq!(told, volume.capacity_bytes, "{kind}: all of it");
            assert_eq!(dirty_ranges(&runs), changed_ranges(&diff), "{kind}: {export} from {}", base.name);
        }
        let diff = bench.diff(between(snapshot_side(&first), snapshot_side(&third))).await.unwrap();
        assert_eq!(dirty_ranges(&qemu_map(address, "vol@wed", "mon")), changed_ranges(&diff), "{kind}");
        let uri = format!("nbd://{address}/vol");
        let refused =
            std::process::Command::new("nbdinfo").args(["--map=qemu:dirty-bitmap:mon", &uri]).output();
        assert!(!refused.unwrap().status.success(), "of a volume that is written to there is none");
    }
}

/// QEMU takes a bitmap for the allocation: what is dirty, bit 0, is no data.
fn qemu_map(address: SocketAddr, export: &str, bitmap: &str) -> Vec<(u64, u64, bool)> {
    let (host, port) = (address.ip(), address.port());
    let options = format!(
        "driver=nbd,server.type=inet,server.host={host},server.port={port},export={export},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
    );
    let told = support::run("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    let runs: Vec<serde_json::Value> = serde_json::from_str(&told).unwrap();
    let run = |run: &serde_json::Value| {
        (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap(), run["data"] == false)
    };
    runs.iter().map(run).collect()
}

/// The system's own, which libnbd's module is installed for.
const PYTHON: &str = "/usr/bin/python3";

/// Several contexts in one answer.
const SEVERAL_CONTEXTS: &str = r"
import sys, nbd
h = nbd.NBD()
for context in ['base:allocation', 'qemu:dirty-bitmap:mon', 'qemu:dirty-bitmap:tue']:
    h.add_meta_context(context)
h.connect_uri(sys.argv[1])
size = h.get_size()
def told(call):
    found = {}
    def note(context, offset, entries, error):
        found[context] = (offset, list(entries))
        return 0
    call(note)
    return found
for offset in (0, 4096, 40 * 8192):
    found = told(lambda note: h.block_status(size - offset, offset, note))
    assert sorted(found) == ['base:allocation', 'qemu:dirty-bitmap:mon', 'qemu:dirty-bitmap:tue'], found
    assert all(at == offset for at, _ in found.values()), found
    one = told(lambda note: h.block_status(size - offset, offset, note, flags=nbd.CMD_FLAG_REQ_ONE))
    assert {context: entries[:2] for context, (_, entries) in found.items()} == {c: e for c, (_, e) in one.items()}, one
dirty = {c: [length for length, flags in zip(e[::2], e[1::2]) if flags & 1] for c, (_, e) in told(lambda note: h.block_status(size, 0, note)).items()}
assert dirty['qemu:dirty-bitmap:mon'] and not dirty['qemu:dirty-bitmap:tue'], dirty
print('done')
";

#[tokio::test(flavor = "multi_thread")]
async fn several_contexts_are_told_in_one_answer_and_a_base_may_be_deleted_meanwhile() {
    let has_nbd = support::tool(PYTHON).args(["-c", "import nbd"]).output();
    if !has_nbd.is_ok_and(|output| output.status.success()) {
        return support::skip_without_tool("no python3-libnbd");
    }
    let Some(mut bench) = Bench::on("xfs", 512 * MIB).await else { return };
    let volume = fragmented(&mut bench, 100).await;
    let first = bench.snapshot("vol", "mon").await;
    fill(&bench.path("volumes", &volume.volume_uid), (0..50).map(|extent| extent * 4 * UNIT));
    bench.snapshot("vol", "tue").await;
    bench.snapshot("vol", "wed").await;
    let uri = format!("nbd://{}/vol@wed", bench.server.data[0]);
    assert_eq!(support::run(PYTHON, &["-c", SEVERAL_CONTEXTS, &uri]), "done\n");
    // Whoever has asked once is told the same without the snapshot.
    let told = support::tool(PYTHON)
        .args(["-c", DELETED_MEANWHILE, &uri])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut told = told.unwrap();
    let mut lines = BufReader::new(told.stdout.take().unwrap()).lines();
    let before = lines.next().unwrap().unwrap();
    assert!(bench.delete_snapshot(&first.snapshot_uid).await.unwrap());
    drop(told.stdin.take());
    assert_eq!(lines.next().unwrap().unwrap(), before);
    assert!(told.wait().unwrap().success());
}

const DELETED_MEANWHILE: &str = r"
import sys, nbd
h = nbd.NBD()
h.add_meta_context('qemu:dirty-bitmap:mon')
h.connect_uri(sys.argv[1])
def told():
    all = []
    h.block_status(h.get_size(), 0, lambda context, offset, entries, error: all.extend(entries) or 0)
    print(all, flush=True)
told()
sys.stdin.read()
told()
";
