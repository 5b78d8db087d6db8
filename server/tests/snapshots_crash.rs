//! Kills the real volserver in the middle of snapshots, groups, clones, restores and deletions, again and again: what was answered
//! is there afterwards, and a call that was cut off was made or not, and nothing in between.
//!
//! Each worker has two volumes and makes one call at a time. What it knows is a plain value, with the byte that each volume and
//! snapshot begins with; a server that has come back has to be as that value, or as the call that was cut off would have made it.
//! The seed is printed; `VOLNODE_TEST_SEED=<seed>` plays the same choices again (the kernel's timing is not replayed).
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

mod choices;
#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests, as the next one; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;
mod volserver;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto::nbd::transmission::{Command, CommandFlags};
use proto::v1::{self, management_client::ManagementClient};
use tonic::transport::Channel;
use tonic::{Code, Status};

use choices::Choices;
use client::Client;
use support::LoopFs;
use volserver::{DEADLINE, Volserver};

const ROUNDS: u32 = 24;
const WORKERS: u32 = 3;
/// A round is cut off at a random moment before this.
const ROUND_MS_MAX: u64 = 300;
const XFS_BYTES: u64 = 400 << 20;
const CAPACITY_BYTES: u64 = 8 << 20;
/// So many pieces has each volume at first: a copy takes its time.
const EXTENTS: u64 = 1000;
const BLOCK: u32 = 4096;

/// What a worker knows: the first byte of each volume and snapshot (`VOLUME@NAME`) that is there.
type Known = BTreeMap<String, u8>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    Write { volume: String, byte: u8 },
    Snapshot { volumes: Vec<String>, name: &'static str },
    DeleteSnapshot { volume: String, name: &'static str },
    Clone { name: String, source: String },
    DeleteVolume { name: String },
    Restore { volume: String, name: &'static str },
}

impl Call {
    /// What there is once it was made.
    fn made(&self, known: &Known) -> Known {
        let mut after = known.clone();
        match self {
            Self::Write { volume, byte } => drop(after.insert(volume.clone(), *byte)),
            Self::Snapshot { volumes, name } => {
                after.extend(volumes.iter().map(|volume| (format!("{volume}@{name}"), known[volume])));
            }
            Self::DeleteSnapshot { volume, name } => drop(after.remove(&format!("{volume}@{name}"))),
            Self::Clone { name, source } => drop(after.insert(name.clone(), known[source])),
            Self::DeleteVolume { name } => drop(after.remove(name)),
            Self::Restore { volume, name } => {
                after.insert(volume.clone(), known[&format!("{volume}@{name}")]);
            }
        }
        after
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Write { .. } => "write",
            Self::Snapshot { volumes, .. } if volumes.len() > 1 => "group",
            Self::Snapshot { .. } => "snapshot",
            Self::DeleteSnapshot { .. } => "delete snapshot",
            Self::Clone { .. } => "clone",
            Self::DeleteVolume { .. } => "delete volume",
            Self::Restore { .. } => "restore",
        }
    }
}

struct Worker {
    /// Its volumes, and the name of its clone.
    volumes: [String; 2],
    clone: String,
    choices: Choices,
    known: Known,
    cut_off: Option<Call>,
    answered: BTreeMap<&'static str, u32>,
}

const NAMES: [&str; 2] = ["s", "t"];

impl Worker {
    fn new(number: u32, seed: u64) -> Self {
        let volumes = ["a", "b"].map(|letter| format!("v{number}{letter}"));
        let known = volumes.iter().map(|volume| (volume.clone(), 1)).collect();
        let (clone, answered) = (format!("c{number}"), BTreeMap::new());
        Self { volumes, clone, choices: Choices(seed), known, cut_off: None, answered }
    }

    /// One that is possible.
    fn choose(&mut self) -> Call {
        let volume = self.volumes[self.choices.below(2) as usize].clone();
        let name = NAMES[self.choices.below(2) as usize];
        let has = |volume: &str| self.known.contains_key(&format!("{volume}@{name}"));
        let has_clone = self.known.contains_key(&self.clone);
        match self.choices.below(8) {
            0 | 1 => Call::Write { volume, byte: 2 + self.choices.below(250) as u8 },
            2 | 3 if !self.volumes.iter().any(|volume| has(volume)) => {
                Call::Snapshot { volumes: self.volumes.to_vec(), name }
            }
            _ if !has(&volume) => Call::Snapshot { volumes: vec![volume], name },
            2..=4 => Call::DeleteSnapshot { volume, name },
            5 if has_clone => Call::DeleteVolume { name: self.clone.clone() },
            5 => Call::Clone { name: self.clone.clone(), source: volume },
            6 if !has_clone => Call::Clone { name: self.clone.clone(), source: format!("{volume}@{name}") },
            _ => Call::Restore { volume, name },
        }
    }

    /// Makes calls until one is cut off or the round is over.
    async fn work(
        mut self,
        mut client: ManagementClient<Channel>,
        data: std::net::SocketAddr,
        is_over: Arc<AtomicBool>,
    ) -> Self {
        while !is_over.load(Ordering::Relaxed) {
            let call = self.choose();
            match make(&mut client, data, &call).await {
                Ok(()) => {
                    self.known = call.made(&self.known);
                    *self.answered.entry(call.kind()).or_default() += 1;
                }
                // A connection that has just been closed may still have it open; that changes nothing.
                Err(status) if status.code() == Code::FailedPrecondition => {}
                Err(status) => {
                    let expected =
                        [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::Internal, Code::NotFound];
                    assert!(expected.contains(&status.code()), "{call:?}: {status}");
                    self.cut_off = Some(call);
                    break;
                }
            }
        }
        self
    }

    /// A server that has come back is as it was answered, or as the call that was cut off would have made it.
    fn check(&mut self, found: &Known) -> Option<&'static str> {
        let is_own = |name: &str| {
            let volume = name.split('@').next().unwrap();
            self.volumes.iter().any(|own| own == volume) || volume == self.clone
        };
        let found: Known =
            found.iter().filter(|(name, _)| is_own(name)).map(|(name, byte)| (name.clone(), *byte)).collect();
        let cut_off = self.cut_off.take();
        let may_be = |call: &Call| call.made(&self.known) == found;
        assert!(
            found == self.known || cut_off.as_ref().is_some_and(may_be),
            "{:?} was answered, {cut_off:?} cut off, and {found:?} is there",
            self.known
        );
        self.known = found;
        cut_off.map(|call| call.kind())
    }
}

/// Makes a call to its end, its operation's end included.
async fn make(
    client: &mut ManagementClient<Channel>,
    data: std::net::SocketAddr,
    call: &Call,
) -> Result<(), Status> {
    let operation = match call.clone() {
        Call::Write { volume, byte } => return write(data, &volume, byte),
        Call::Snapshot { volumes, name } => {
            let request = v1::CreateSnapshotRequest {
                volume_names: volumes,
                name: name.to_owned(),
                ..Default::default()
            };
            client.create_snapshot(request).await?.into_inner().operation
        }
        Call::DeleteSnapshot { volume, name } => {
            let (volume_name, name) = (volume, name.to_owned());
            let request = v1::DeleteSnapshotRequest { volume_name, name, ..Default::default() };
            client.delete_snapshot(request).await?;
            None
        }
        Call::Clone { name, source } => {
            let (volume, snapshot) = source.split_once('@').unwrap_or((&source, ""));
            let request = v1::CloneVolumeRequest {
                name,
                source_volume_name: volume.to_owned(),
                source_snapshot_name: snapshot.to_owned(),
                ..Default::default()
            };
            client.clone_volume(request).await?.into_inner().operation
        }
        Call::DeleteVolume { name } => {
            client.delete_volume(v1::DeleteVolumeRequest { name, ..Default::default() }).await?;
            None
        }
        Call::Restore { volume, name } => {
            let (volume_name, snapshot_name) = (volume, name.to_owned());
            let request = v1::RestoreVolumeRequest { volume_name, snapshot_name, ..Default::default() };
            client.restore_volume(request).await?.into_inner().operation
        }
    };
    let Some(mut operation) = operation else { return Ok(()) };
    let deadline = Instant::now() + DEADLINE;
    while operation.state() == v1::OperationState::Running {
        assert!(Instant::now() < deadline, "{operation:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
        let request = v1::GetOperationRequest { operation_id: operation.operation_id };
        operation = client.get_operation(request).await?.into_inner();
    }
    assert_eq!(operation.state(), v1::OperationState::Succeeded, "{operation:?}");
    Ok(())
}

/// A server that is killed closes the connection, in whatever the client was about to do.
fn write(data: std::net::SocketAddr, volume: &str, byte: u8) -> Result<(), Status> {
    let cut_off = |why: String| Status::unavailable(why);
    let mut client = Client::open(data, volume).map_err(|error| cut_off(error.to_string()))?;
    let block = [byte; BLOCK as usize];
    for (command, payload) in [(Command::Write, &block[..]), (Command::Flush, &[])] {
        let thrown = client.throw(command, CommandFlags::NONE, 0, payload.len() as u32, payload);
        let answer = thrown.and_then(|()| client.receive()).map_err(|error| cut_off(error.to_string()))?;
        assert_eq!(answer.error, 0, "{command:?}");
    }
    Ok(())
}

/// The first byte of everything that the server has.
async fn look(client: &mut ManagementClient<Channel>, data: std::net::SocketAddr) -> Known {
    let volumes = client.list_volumes(v1::ListVolumesRequest::default()).await.unwrap().into_inner().volumes;
    let listed = client.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    assert!(listed.snapshots.iter().all(|one| one.state() == v1::SnapshotState::Ready));
    let snapshots = listed.snapshots.into_iter().map(|one| format!("{}@{}", one.volume_name, one.name));
    let names = volumes.into_iter().map(|volume| volume.name).chain(snapshots);
    let first_byte = |name: String| {
        let block = Client::open(data, &name).unwrap().read(0, BLOCK).unwrap();
        assert!(block.iter().all(|byte| *byte == block[0]), "{name}: of one write");
        (name, block[0])
    };
    names.map(first_byte).collect()
}

/// The files are those of the rows, and no row is half-way.
fn check_storage(data_dir: &Path) {
    let db = rusqlite::Connection::open(data_dir.join("catalog.sqlite")).unwrap();
    for table in ["volumes", "snapshots"] {
        let count = format!("SELECT count(*) FROM {table} WHERE state <> 'ready'");
        assert_eq!(db.query_row(&count, [], |row| row.get::<_, u32>(0)).unwrap(), 0, "{table}");
        let column = if table == "volumes" { "volume_uid" } else { "snapshot_uid" };
        let mut query = db.prepare(&format!("SELECT {column} FROM {table}")).unwrap();
        let rows: BTreeSet<String> =
            query.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
        let entries = std::fs::read_dir(data_dir.join(table)).into_iter().flatten();
        let files: BTreeSet<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(files, rows, "{table}");
    }
}

fn start(fs: &LoopFs, dir: &tempfile::TempDir) -> Volserver {
    let mut command = volserver::command(&fs.mount.join("data"));
    command.env("VOLSERVER_RUNTIME_DIR", dir.path().join("run")).arg("--export-by-name");
    Volserver::start_with(command, &dir.path().join("log"))
}

async fn make_volumes(server: &Volserver, data_dir: &Path, workers: &[Worker]) {
    let mut client = server.client().await;
    for volume in workers.iter().flat_map(|worker| &worker.volumes) {
        let request = v1::CreateVolumeRequest {
            name: volume.clone(),
            capacity_bytes: CAPACITY_BYTES,
            ..Default::default()
        };
        let made = client.create_volume(request).await.unwrap().into_inner();
        // Nobody has opened it yet.
        let path = data_dir.join("volumes").join(made.volume_uid);
        let file = std::fs::File::options().write(true).open(path).unwrap();
        for extent in 0..EXTENTS {
            file.write_all_at(&[1; BLOCK as usize], extent * 2 * u64::from(BLOCK)).unwrap();
        }
        file.sync_all().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_at_any_moment_of_a_copy_is_before_or_after_it() {
    let Some(fs) = LoopFs::new("xfs", XFS_BYTES) else { return };
    let seed = match std::env::var("VOLNODE_TEST_SEED") {
        Ok(text) => text.parse().expect("VOLNODE_TEST_SEED is a number"),
        Err(_) => uuid::Uuid::new_v4().as_u64_pair().0,
    };
    println!("VOLNODE_TEST_SEED={seed}");
    let mut choices = Choices(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut workers: Vec<Worker> =
        (0..WORKERS).map(|number| Worker::new(number, choices.below(u64::MAX))).collect();
    let server = start(&fs, &dir);
    make_volumes(&server, &fs.mount.join("data"), &workers).await;
    server.kill();
    let mut cut_off: BTreeMap<&'static str, u32> = BTreeMap::new();
    for round in 0..=ROUNDS {
        let server = start(&fs, &dir);
        let mut client = server.client().await;
        let found = look(&mut client, server.data[0]).await;
        for kind in workers.iter_mut().filter_map(|worker| worker.check(&found)) {
            *cut_off.entry(kind).or_default() += 1;
        }
        check_storage(&fs.mount.join("data"));
        if round == ROUNDS {
            break;
        }
        let is_over = Arc::new(AtomicBool::new(false));
        let at_work: Vec<_> = workers
            .drain(..)
            .map(|worker| {
                let work = worker.work(client.clone(), server.data[0], Arc::clone(&is_over));
                tokio::spawn(work)
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(choices.below(ROUND_MS_MAX))).await;
        server.kill();
        is_over.store(true, Ordering::Relaxed);
        for worker in at_work {
            workers.push(worker.await.unwrap());
        }
    }
    let mut answered: BTreeMap<&'static str, u32> = BTreeMap::new();
    for (kind, count) in workers.iter().flat_map(|worker| &worker.answered) {
        *answered.entry(kind).or_default() += count;
    }
    println!("answered: {answered:?}; cut off in {ROUNDS} kills: {cut_off:?}");
    assert!(answered.values().sum::<u32>() > ROUNDS && !cut_off.is_empty(), "the kills hit nothing");
}
