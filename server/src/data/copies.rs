//! Copies of volumes, begun and ended: the gate opens what is to be copied, a thread copies it, and rings hear who may go on.
//!
//! Owns: the threads of copies that are being made. Never: copies itself (`volume/snapshot/copier.rs` does), or decides which request
//! waits (`volume/snapshot/copy_before_write.rs` does).
//! Called by: `data/server.rs`. What holds for copies that LVM makes is [`HeldVolumes`]. Invariant: everything that may fail or take long is done before the instant, so that no request waits
//! for it.

use std::fs::File;
use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use uuid::Uuid;

use crate::backend::extent_map::FileMap;
use crate::catalog::{BackendKind, VolumeRecord};
use crate::data::gate::GateMessage;
use crate::data::mailbox::{Mailbox, RingMessage};
use crate::data::maps::{Compared, Maps};
use crate::descriptors::{Descriptors, Taken};
use crate::volume::Volume;
use crate::volume::copying::{self, CopyError, CopyHandle, CopySource, CopyTarget, CopyWanted};
use crate::volume::snapshot::copier::{Copier, HeldVolume, LetGo, Source, remove};
use crate::volume::snapshot::copy_before_write::{CopyPlan, HeldRequest, PIECE_BYTES, PieceMap};
use crate::volume::snapshot::files::{CopyFiles, failed};

/// Of a copy: its source and itself.
const DESCRIPTORS_OF_COPY: u64 = 2;
/// How often it is looked whether the threads have ended. Once in a process's life.
const END_PAUSE: Duration = Duration::from_millis(2);

/// The copies of a server.
pub struct Copies {
    files: CopyFiles,
    gate: Sender<GateMessage>,
    let_go: LetGo,
    descriptors: Arc<Descriptors>,
    maps: Maps,
    /// The volumes' bytes are in no files.
    is_elsewhere: bool,
    running: Mutex<Running>,
}

/// Volumes that are open, so that they can [hold](Copies::hold_all) at once.
pub struct OpenedVolumes(Vec<HeldVolume>);

/// Volumes that hold every change, until this is dropped: then what waited goes on. They stay open until then.
#[must_use = "they hold as long as this is there"]
pub struct HeldVolumes(Vec<HeldVolume>);

impl HeldVolumes {
    /// Whether a sync of one of them failed since it was opened.
    pub fn have_lost_writes(&self) -> bool {
        self.0.iter().filter_map(HeldVolume::volume).any(|volume| volume.has_lost_writes())
    }

    /// Nothing waits any more.
    pub fn release(&self) {
        self.0.iter().for_each(HeldVolume::release);
    }
}

impl std::fmt::Debug for OpenedVolumes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OpenedVolumes").field(&self.0.len()).finish()
    }
}

impl std::fmt::Debug for HeldVolumes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("HeldVolumes").field(&self.0.len()).finish()
    }
}

#[derive(Default)]
struct Running {
    copies: Vec<(CopyHandle, JoinHandle<()>)>,
    is_ending: bool,
}

impl std::fmt::Debug for Copies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copies").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Copies {
    /// Of a server whose rings and gate these are; none is being made yet.
    pub fn new(
        files: CopyFiles,
        gate: Sender<GateMessage>,
        rings: Vec<Arc<Mailbox>>,
        descriptors: Arc<Descriptors>,
        is_elsewhere: bool,
    ) -> Self {
        let let_go: LetGo = Arc::new(move |requests| let_go(&rings, requests));
        let maps = Maps::new(files.clone(), Arc::clone(&descriptors));
        Self { files, gate, let_go, descriptors, maps, is_elsewhere, running: Mutex::default() }
    }

    /// Where copies are.
    pub fn files(&self) -> &CopyFiles {
        &self.files
    }

    /// Whether volumes in files can be copied.
    ///
    /// # Errors
    /// [`CopyError`]: why not, and what to do.
    pub fn can_copy(&self) -> Result<(), CopyError> {
        if self.is_elsewhere {
            let words = "this server's volumes are not in files, and only files can be copied";
            return Err(CopyError::Unsupported(words.to_owned()));
        }
        self.files.can_copy()
    }

    /// Begins copies of one instant; `open` has the gate open a volume to be copied.
    ///
    /// # Errors
    /// [`CopyError`]; nothing is left.
    pub fn begin(
        &self,
        wanted: &[CopyWanted],
        open: impl Fn(Uuid) -> Result<Arc<Volume>, CopyError>,
    ) -> Result<CopyHandle, CopyError> {
        let (sources, descriptors) = self.prepare(wanted, open)?;
        self.go(sources, descriptors)
    }

    /// Opens volumes that are to hold: that may take its time, and calls of their backend.
    ///
    /// # Errors
    /// [`CopyError`]
    pub fn open_all(
        &self,
        volumes: &[VolumeRecord],
        open: impl Fn(Uuid) -> Result<Arc<Volume>, CopyError>,
    ) -> Result<OpenedVolumes, CopyError> {
        let opened = volumes.iter().map(|record| self.hold_open(record, &open));
        opened.collect::<Result<_, _>>().map(OpenedVolumes)
    }

    /// Has volumes hold every change until what this gives is dropped: the instant of copies that somebody else makes. Calls no backend.
    ///
    /// # Errors
    /// [`CopyError`]; none of them holds any more.
    pub fn hold_all(&self, OpenedVolumes(held): OpenedVolumes) -> Result<HeldVolumes, CopyError> {
        let sources: Vec<_> =
            held.iter().map(|held| (held.volume().map(Arc::clone), Arc::clone(held.map()))).collect();
        self.begin_plan(&sources)?;
        Ok(HeldVolumes(held))
    }

    /// Begins a copy of a volume that has no name: what is compared while the volume is written to. Its map tells all when the copy
    /// has ended.
    ///
    /// # Errors
    /// [`CopyError`]; nothing is left.
    pub fn begin_nameless(
        &self,
        volume: &VolumeRecord,
        open: impl Fn(Uuid) -> Result<Arc<Volume>, CopyError>,
    ) -> Result<(CopyHandle, FileMap<Compared>), CopyError> {
        let wanted = CopyWanted {
            source: CopySource::Volume(volume.clone()),
            target: CopyTarget::Nameless(Uuid::new_v4()),
            capacity_bytes: volume.capacity_bytes,
        };
        let (sources, descriptors) = self.prepare(std::slice::from_ref(&wanted), open)?;
        let copy = sources.first().map(|source| source.to.try_clone());
        let copy = copy.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()));
        let map = copy
            .map_err(|error| failed("open the copy once more", &error))
            .and_then(|file| self.maps.of_file(file, volume.capacity_bytes))?;
        Ok((self.go(sources, descriptors)?, map))
    }

    /// What opens extent maps.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Opens and makes all files.
    fn prepare(
        &self,
        wanted: &[CopyWanted],
        open: impl Fn(Uuid) -> Result<Arc<Volume>, CopyError>,
    ) -> Result<(Vec<Source>, Taken), CopyError> {
        wanted.iter().try_for_each(check)?;
        self.can_copy()?;
        let taken = self.descriptors.take(DESCRIPTORS_OF_COPY * wanted.len() as u64);
        let descriptors = taken.map_err(|error| CopyError::Busy(error.to_string()))?;
        // Opening may take its time, and fail; the files that copies need are made after that.
        let held = wanted.iter().map(|wanted| self.hold(wanted, &open)).collect::<Result<Vec<_>, _>>()?;
        let (mut sources, mut made) = (Vec::new(), Vec::new());
        for (wanted, held) in wanted.iter().zip(held) {
            made.push(wanted.target);
            match self.source(wanted, held) {
                Ok(source) => sources.push(source),
                Err(error) => {
                    drop(sources);
                    remove(&self.files, &made);
                    return Err(error);
                }
            }
        }
        Ok((sources, descriptors))
    }

    fn go(&self, sources: Vec<Source>, descriptors: Taken) -> Result<CopyHandle, CopyError> {
        let (handle, report) = copying::begin();
        report.set_total(sources.iter().map(|source| source.capacity_bytes).sum());
        let (files, let_go) = (self.files.clone(), Arc::clone(&self.let_go));
        self.start(Copier { sources, files, report, let_go, descriptors }, handle)
    }

    /// Starts the thread, and then the copies.
    fn start(&self, copier: Copier, handle: CopyHandle) -> Result<CopyHandle, CopyError> {
        let sources: Vec<(Option<Arc<Volume>>, Arc<PieceMap>)> = copier.sources.iter().map(to_hold).collect();
        let targets: Vec<CopyTarget> = copier.sources.iter().map(|source| source.target).collect();
        let (sender, plans) = mpsc::channel::<CopyPlan>();
        let spawned = std::thread::Builder::new().name("copier".into()).spawn(move || match plans.recv() {
            Ok(plan) => copier.run(plan),
            Err(_) => drop(copier),
        });
        let thread = spawned.map_err(|error| {
            remove(&self.files, &targets);
            CopyError::Failed(format!("cannot start a thread: {error}; {}", daemon_log::THREAD_LIMITS))
        })?;
        let began = Instant::now();
        let begun = self.begin_plan(&sources);
        let instant = began.elapsed();
        drop(sources);
        let mut running = self.running();
        running.copies.retain(|(_, thread)| !thread.is_finished());
        match begun {
            // Who ends them all has not seen this one.
            Ok(plan) if !running.is_ending => {
                info!(?targets, ?instant, "copies begin");
                // It waits for this.
                let _ = sender.send(plan);
                running.copies.push((handle.clone(), thread));
                Ok(handle)
            }
            begun => {
                drop(running);
                drop(sender);
                // It lets go of what it holds, and who waited goes on.
                let _ = thread.join();
                remove(&self.files, &targets);
                Err(begun.err().unwrap_or_else(|| CopyError::Busy("the server is about to end".to_owned())))
            }
        }
    }

    fn begin_plan(&self, sources: &[(Option<Arc<Volume>>, Arc<PieceMap>)]) -> Result<CopyPlan, CopyError> {
        let to_hold = sources
            .iter()
            .map(|(volume, map)| (volume.as_deref().map(Volume::copy_before_write), Arc::clone(map)));
        CopyPlan::begin(&to_hold.collect::<Vec<_>>()).map_err(|refused| {
            (self.let_go)(refused.free);
            let (volume, _) = &sources[refused.source];
            let uid = volume.as_ref().map_or(Uuid::nil(), |volume| volume.volume_uid);
            CopyError::Busy(format!("volume {uid} is being copied; try again when that is done"))
        })
    }

    /// Has the volume of a source open as long as it is copied.
    fn hold(
        &self,
        wanted: &CopyWanted,
        open: &impl Fn(Uuid) -> Result<Arc<Volume>, CopyError>,
    ) -> Result<Option<HeldVolume>, CopyError> {
        match &wanted.source {
            CopySource::Volume(record) => self.hold_open(record, open).map(Some),
            CopySource::Snapshot { .. } => Ok(None),
        }
    }

    fn hold_open(
        &self,
        record: &VolumeRecord,
        open: &impl Fn(Uuid) -> Result<Arc<Volume>, CopyError>,
    ) -> Result<HeldVolume, CopyError> {
        let volume = open(record.volume_uid)?;
        let gate = self.gate.clone();
        let on_end = move |volume_uid| {
            // Without a gate the server has ended.
            let _ = gate.send(GateMessage::CopyEnded { volume_uid });
        };
        Ok(HeldVolume::new(volume, record.capacity_bytes, Arc::clone(&self.let_go), on_end))
    }

    fn source(&self, wanted: &CopyWanted, volume: Option<HeldVolume>) -> Result<Source, CopyError> {
        let (path, capacity_bytes) = match &wanted.source {
            CopySource::Volume(record) => (self.files.volume(record.volume_uid), record.capacity_bytes),
            CopySource::Snapshot { snapshot_uid, capacity_bytes } => {
                (self.files.path(CopyTarget::Snapshot(*snapshot_uid)), *capacity_bytes)
            }
        };
        let (target, target_bytes) = (wanted.target, wanted.capacity_bytes);
        // Opened while the volume's is: it hears of every write-back that fails from now on.
        let from = File::open(&path).map_err(|error| failed(&format!("open {}", path.display()), &error))?;
        let made = self.files.create(target).and_then(|to| to.set_len(capacity_bytes).map(|()| to));
        let to =
            made.map_err(|error| failed(&format!("make {}", self.files.path(target).display()), &error))?;
        Ok(Source { volume, from, capacity_bytes, to, target, target_bytes })
    }

    /// Has all copies end, and waits for that. False: some have not until the deadline.
    pub fn end(&self, deadline: Instant) -> bool {
        let copies = {
            let mut running = self.running();
            running.is_ending = true;
            std::mem::take(&mut running.copies)
        };
        copies.iter().for_each(|(handle, _)| handle.cancel());
        let mut in_time = true;
        for (_, thread) in copies {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(END_PAUSE);
            }
            if thread.is_finished() {
                let _ = thread.join();
            } else {
                warn!("a copy does not end");
                in_time = false;
            }
        }
        in_time
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn to_hold(source: &Source) -> (Option<Arc<Volume>>, Arc<PieceMap>) {
    match &source.volume {
        Some(held) => (held.volume().map(Arc::clone), Arc::clone(held.map())),
        None => (None, Arc::new(PieceMap::new(source.capacity_bytes, PIECE_BYTES))),
    }
}

fn check(wanted: &CopyWanted) -> Result<(), CopyError> {
    let source_bytes = match &wanted.source {
        CopySource::Volume(record) if record.backend != BackendKind::File => {
            let (name, backend) = (&record.name, record.backend.as_str());
            let words =
                format!("volume {name} has the backend {backend}, and only volumes in files can be copied");
            return Err(CopyError::Unsupported(words));
        }
        CopySource::Volume(record) => record.capacity_bytes,
        CopySource::Snapshot { capacity_bytes, .. } => *capacity_bytes,
    };
    if wanted.capacity_bytes < source_bytes {
        let words = format!("a copy of {source_bytes} bytes cannot have {}", wanted.capacity_bytes);
        return Err(CopyError::Failed(words));
    }
    Ok(())
}

fn let_go(rings: &[Arc<Mailbox>], requests: Vec<HeldRequest>) {
    if requests.is_empty() {
        return;
    }
    for (number, ring) in rings.iter().enumerate() {
        let of_ring = |request: &&HeldRequest| request.ring == number;
        let requests: Vec<HeldRequest> = requests.iter().filter(of_ring).copied().collect();
        if !requests.is_empty() {
            ring.post(RingMessage::GoOn { requests });
        }
    }
}
