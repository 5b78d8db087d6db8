//! Freezing the file systems on this machine's disks for the instant of a snapshot.
//!
//! ```text
//!   Freeze ─▶ what is mounted of the disks ─▶ a process for each file system (`freezer`) ─▶ written down ─▶ all frozen ─▶ answer
//!   Thaw   ─▶ all thawed ─▶ answer: whether all of them were frozen until then
//! ```
//! Owns: those processes, and what is written down of them below the run directory. Never: decides (`core.rs` does), or touches a file
//! system: whoever does may have to wait for a disk that does not answer.
//!
//! Invariants: what is frozen is written down before it is, so that a daemon that comes after a kill thaws it. That file and every freeze
//! end with the boot, so it needs no more than to be renamed into its place. A freeze ends by itself ([`HOLD_MAX`]), whoever does not ask.
//! Called by: `node_service`, `registration` (what the server asks for), and `serve` at the start.

mod core;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::v1;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use uuid::Uuid;

use self::core::{Core, Input, Output};
use super::device_process::program;
use super::error::NodeError;
use super::supervisor::{Supervisor, blocking};
use super::target::DetachSelector;
use crate::contract::{CONTRACT_VERSION, ExportSpec, now_ms, read_file, write_file};
use crate::freezer::{HOLD_MAX, HOLD_SUBCOMMAND, Mount, THAW_SUBCOMMAND, Word, is_on};
use crate::holders::file_systems_on;

/// How it ended is told for so long after its end.
const TOLD_FOR: Duration = Duration::from_secs(60);
/// Inputs that wait for the freeze's task at most; each file system gives a handful.
const INPUTS_MAX: usize = 64;

/// A file system that is to be frozen.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct FileSystem {
    /// Whose disk it is on.
    target: String,
    /// For people: where it is mounted.
    mount_point: String,
    mounts: Vec<Mount>,
    /// Its device in `mountinfo`.
    #[serde(default)]
    device: String,
    /// Of the process that holds it; 0: none yet.
    pid: u32,
}

/// What is written down of a freeze: `<run-dir>/freezes/<freeze-id>.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    format_version: u32,
    freeze_id: Uuid,
    began_at_ms: i64,
    file_systems: Vec<FileSystem>,
}

/// What a freeze's task hears.
enum Heard {
    Input(Input),
    Thaw(oneshot::Sender<Result<(), String>>),
}

/// The freezes of this daemon.
#[derive(Debug)]
pub(super) struct Freezes {
    supervisor: Arc<Supervisor>,
    running: Mutex<HashMap<Uuid, mpsc::Sender<Heard>>>,
}

fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("freezes")
}

/// At the daemon's start: thaws what a killed one left, as far as it is frozen. Does not wait for it.
///
/// # Errors
/// [`NodeError::Io`]: the folder cannot be read.
pub(super) fn thaw_what_was_left(run_dir: &Path) -> Result<(), NodeError> {
    let folder = folder(run_dir);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(NodeError::Io { what: format!("cannot read {}", folder.display()), source });
        }
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        match read_file::<Record>(&path) {
            Ok(record) => {
                tracing::warn!(freeze_id = %record.freeze_id, "thawing what a former daemon had frozen");
                tokio::spawn(rescue_all(record, path));
            }
            Err(error) => tracing::error!(file = %path.display(), %error, "cannot read what was frozen"),
        }
    }
    Ok(())
}

impl Freezes {
    /// Of what this supervisor has attached.
    pub(super) fn new(supervisor: Arc<Supervisor>) -> Self {
        Self { supervisor, running: Mutex::default() }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, mpsc::Sender<Heard>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False: there is one of that id.
    fn insert(&self, freeze_id: Uuid, inputs: mpsc::Sender<Heard>) -> bool {
        let mut running = self.running();
        let is_new = !running.contains_key(&freeze_id);
        running.entry(freeze_id).or_insert(inputs);
        is_new
    }

    /// Freezes everything that is mounted of these volumes' disks here, whoever has it mounted; all or nothing.
    ///
    /// # Errors
    /// [`NodeError::InvalidField`], [`NodeError::NotMounted`], [`NodeError::FreezeFailed`]; what the system refuses.
    pub(super) async fn freeze(
        self: &Arc<Self>,
        request: v1::FreezeRequest,
    ) -> Result<v1::FreezeResponse, NodeError> {
        let off = |field, message: &str| NodeError::InvalidField { field, message: message.to_owned() };
        let freeze_id =
            Uuid::try_parse(&request.freeze_id).map_err(|_| off("freeze_id", "must be a UUID"))?;
        if request.targets.is_empty() {
            return Err(off("targets", "names no volume"));
        }
        let this = Arc::clone(self);
        let targets = request.targets.clone();
        let (volume_uids, file_systems) = blocking(move || this.mounted_of(&targets)).await?;
        let (sender, heard) = mpsc::channel(INPUTS_MAX);
        if !self.insert(freeze_id, sender.clone()) {
            return Err(off("freeze_id", "is that of a freeze that goes on: take another"));
        }
        let (begun, has_begun) = oneshot::channel();
        let answer = v1::FreezeResponse {
            file_systems: file_systems.iter().map(FileSystem::to_proto).collect(),
            volume_uids,
            thaws_after_ms: u64::try_from(HOLD_MAX.as_millis()).unwrap_or(u64::MAX),
        };
        let record =
            Record { format_version: CONTRACT_VERSION, freeze_id, began_at_ms: now_ms(), file_systems };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let freeze = Freeze::start(record, &this.supervisor.config().run_dir, begun, &sender);
            drop(sender);
            match freeze {
                Ok(freeze) => freeze.run(heard).await,
                Err((begun, why)) => drop(begun.send(Err(why))),
            }
            this.running().remove(&freeze_id);
        });
        match has_begun.await {
            Ok(Ok(())) => Ok(answer),
            Ok(Err(why)) => Err(NodeError::FreezeFailed { why }),
            Err(_) => Err(NodeError::Panicked),
        }
    }

    /// Ends a freeze, and tells whether all of it was frozen until now.
    ///
    /// # Errors
    /// [`NodeError::InvalidField`]
    pub(super) async fn thaw(&self, request: &v1::ThawRequest) -> Result<v1::ThawResponse, NodeError> {
        let freeze_id = Uuid::try_parse(&request.freeze_id).map_err(|_| NodeError::InvalidField {
            field: "freeze_id",
            message: "must be a UUID".to_owned(),
        })?;
        let unknown = || "the node daemon was started anew since, or it is long ago: it is thawed".to_owned();
        let running = self.running().get(&freeze_id).cloned();
        let outcome = match running {
            None => Err(unknown()),
            Some(running) => {
                let (sender, ended) = oneshot::channel();
                match running.send(Heard::Thaw(sender)).await {
                    Ok(()) => ended.await.unwrap_or_else(|_| Err(unknown())),
                    Err(_) => Err(unknown()),
                }
            }
        };
        Ok(v1::ThawResponse { was_frozen: outcome.is_ok(), reason: outcome.err().unwrap_or_default() })
    }

    /// The file systems on the disks of these volumes, each once, with the uids of those volumes.
    fn mounted_of(&self, targets: &[String]) -> Result<(Vec<String>, Vec<FileSystem>), NodeError> {
        let (mut volume_uids, mut found) = (Vec::new(), Vec::<FileSystem>::new());
        for target in targets {
            let not_mounted = |why: &'static str| NodeError::NotMounted { target: target.clone(), why };
            let record = self.supervisor.find(&DetachSelector::parse(target)?)?;
            let record = record.ok_or_else(|| not_mounted("is not attached to this machine"))?;
            // For people, also where the server asks, which knows it by its attachment.
            let name = record.spec.target.clone();
            let not_mounted = |why: &'static str| NodeError::NotMounted { target: name.clone(), why };
            let ExportSpec::Attachment { volume_uid, .. } = &record.spec.export else {
                return Err(not_mounted("is no volume of the storage server"));
            };
            if record.spec.read_only {
                return Err(not_mounted("is attached read-only: nothing of it changes here"));
            }
            volume_uids.push(volume_uid.to_string());
            let dev_id = record.status.as_ref().and_then(|status| status.dev_id);
            let mounted = dev_id.map(file_systems_on).unwrap_or_default();
            if mounted.is_empty() {
                return Err(not_mounted("has no file system that is mounted on this machine"));
            }
            for one in mounted {
                if is_on(&self.supervisor.config().run_dir, &one.device) {
                    let why = "holds the node daemon's run directory, which is written to meanwhile";
                    return Err(not_mounted(why));
                }
                // Of several disks.
                if found.iter().all(|other| other.device != one.device) {
                    let (target, mount_point, mounts) = (target.clone(), one.mount_point, one.mounts);
                    found.push(FileSystem { target, mount_point, mounts, device: one.device, pid: 0 });
                }
            }
        }
        Ok((volume_uids, found))
    }
}

impl FileSystem {
    fn to_proto(&self) -> v1::FrozenFileSystem {
        v1::FrozenFileSystem { target: self.target.clone(), mount_point: self.mount_point.clone() }
    }
}

/// A freeze that goes on: its core, and its processes.
struct Freeze {
    core: Core,
    record: Record,
    path: PathBuf,
    /// Each process's stdin, until it is let go.
    holders: Vec<Option<ChildStdin>>,
    begun: Option<oneshot::Sender<Result<(), String>>>,
    ended: Vec<oneshot::Sender<Result<(), String>>>,
    rescues: JoinSet<bool>,
}

type NotStarted = (oneshot::Sender<Result<(), String>>, String);

impl Freeze {
    /// Starts the processes, which sync.
    fn start(
        mut record: Record,
        run_dir: &Path,
        begun: oneshot::Sender<Result<(), String>>,
        inputs: &mpsc::Sender<Heard>,
    ) -> Result<Self, NotStarted> {
        let path = folder(run_dir).join(format!("{}.json", record.freeze_id));
        let mut holders = Vec::new();
        for (index, one) in record.file_systems.iter_mut().enumerate() {
            let mut child = match start_holder(record.freeze_id, &one.mounts) {
                Ok(child) => child,
                // Those that were started see the end of their stdin.
                Err(error) => return Err((begun, format!("cannot start a process: {error}"))),
            };
            one.pid = child.id().unwrap_or_default();
            holders.push(child.stdin.take());
            tokio::spawn(listen(index, child, inputs.clone()));
        }
        let names = record.file_systems.iter().map(|one| one.mount_point.clone()).collect();
        let core = Core::new(names, Instant::now());
        let (begun, ended, rescues) = (Some(begun), Vec::new(), JoinSet::new());
        Ok(Self { core, record, path, holders, begun, ended, rescues })
    }

    /// To its end, and for a while after it, so that it can be told.
    async fn run(mut self, mut heard: mpsc::Receiver<Heard>) {
        let mut told_until = None;
        loop {
            if self.core.is_over() && told_until.is_none() {
                if have_all_succeeded(&mut self.rescues).await {
                    remove(&self.path);
                }
                told_until = Some(Instant::now() + TOLD_FOR);
            }
            let input = match told_until.or(self.core.deadline()) {
                Some(deadline) => match tokio::time::timeout_at(deadline.into(), heard.recv()).await {
                    Ok(heard) => heard,
                    Err(_) if told_until.is_some() => return,
                    Err(_) => Some(Heard::Input(Input::TooLate)),
                },
                None => heard.recv().await,
            };
            match input {
                Some(Heard::Input(input)) => self.handle(input).await,
                Some(Heard::Thaw(asker)) => {
                    self.ended.push(asker);
                    self.handle(Input::Thaw).await;
                }
                None => return,
            }
        }
    }

    async fn handle(&mut self, input: Input) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            let mut outputs = Vec::new();
            self.core.handle(Instant::now(), input, &mut outputs);
            for output in outputs {
                match output {
                    Output::Note => inputs.push(Input::Noted(self.note())),
                    Output::Freeze(index) => self.say(index).await,
                    Output::Thaw(index) => {
                        self.say(index).await;
                        self.let_go(index);
                    }
                    Output::LetGo(index) => self.let_go(index),
                    Output::Rescue(index) => {
                        if let Some(one) = self.record.file_systems.get(index).cloned() {
                            self.rescues.spawn(rescue(self.record.freeze_id, one));
                        }
                    }
                    Output::Begun(result) => self.begun(result),
                    Output::Ended(result) => {
                        for asker in self.ended.drain(..) {
                            // Whoever asked may have hung up.
                            let _ = asker.send(result.clone());
                        }
                    }
                }
            }
        }
    }

    fn begun(&mut self, result: Result<(), String>) {
        let mount_points: Vec<&str> =
            self.record.file_systems.iter().map(|one| one.mount_point.as_str()).collect();
        match &result {
            Ok(()) => tracing::info!(freeze_id = %self.record.freeze_id, ?mount_points, "frozen"),
            Err(why) => tracing::warn!(freeze_id = %self.record.freeze_id, ?mount_points, why, "not frozen"),
        }
        for asker in self.begun.take().into_iter() {
            let _ = asker.send(result.clone());
        }
        // Whoever asked for the thaw before it began has its answer, too.
        if let Err(why) = result {
            for asker in self.ended.drain(..) {
                let _ = asker.send(Err(why.clone()));
            }
        }
    }

    fn note(&self) -> Result<(), String> {
        let parent = self.path.parent().unwrap_or(&self.path);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(|error| format!("cannot make {}: {error}", parent.display()))?;
        write_file(&self.path, &self.record).map_err(|error| error.to_string())
    }

    /// What it waits for. One that has ended is heard of otherwise.
    async fn say(&mut self, index: usize) {
        if let Some(Some(stdin)) = self.holders.get_mut(index) {
            let _ = stdin.write_all(b"\n").await;
        }
    }

    fn let_go(&mut self, index: usize) {
        if let Some(stdin) = self.holders.get_mut(index) {
            *stdin = None;
        }
    }
}

/// Its working directory keeps nothing busy, and no signal to the daemon's group reaches it.
fn command(subcommand: &str, freeze_id: Uuid) -> Command {
    let mut command = Command::new(program());
    command.arg(subcommand).arg(freeze_id.to_string()).current_dir("/").process_group(0);
    command
}

fn start_holder(freeze_id: Uuid, mounts: &[Mount]) -> std::io::Result<Child> {
    let mut command = command(HOLD_SUBCOMMAND, freeze_id);
    command.args(mounts.iter().map(Mount::to_string)).stdin(Stdio::piped()).stdout(Stdio::piped());
    command.spawn()
}

/// Passes on what the process says, and its end.
async fn listen(index: usize, mut child: Child, inputs: mpsc::Sender<Heard>) {
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let input = match serde_json::from_str(&line) {
                Ok(Word::Ready) => Input::Ready(index),
                Ok(Word::Frozen) => Input::Frozen(index),
                Ok(Word::Thawed) => Input::Thawed(index),
                Ok(Word::NotFrozen(why)) => Input::NotFrozen(index, why),
                Err(_) => continue,
            };
            if inputs.send(Heard::Input(input)).await.is_err() {
                break;
            }
        }
    }
    // Not before it is gone: a killed one may be in the kernel still, about to freeze.
    let _ = child.wait().await;
    let _ = inputs.send(Heard::Input(Input::Gone(index))).await;
}

/// Thaws it by another process, to whose end it waits. False: it may still be frozen.
async fn rescue(freeze_id: Uuid, one: FileSystem) -> bool {
    let mut command = command(THAW_SUBCOMMAND, freeze_id);
    command.arg("--pid").arg(one.pid.to_string()).args(one.mounts.iter().map(Mount::to_string));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    match command.status().await {
        Ok(status) if status.success() => {
            tracing::info!(mount_point = one.mount_point, "no longer frozen by us");
            true
        }
        outcome => {
            tracing::error!(
                mount_point = one.mount_point,
                ?outcome,
                "may still be frozen: thaw it with `fsfreeze --unfreeze`; the next start of the daemon tries it again"
            );
            false
        }
    }
}

async fn have_all_succeeded(rescues: &mut JoinSet<bool>) -> bool {
    let mut have_all = true;
    while let Some(rescued) = rescues.join_next().await {
        have_all &= rescued.unwrap_or(false);
    }
    have_all
}

async fn rescue_all(record: Record, path: PathBuf) {
    let mut rescues = JoinSet::new();
    for one in record.file_systems {
        rescues.spawn(rescue(record.freeze_id, one));
    }
    if have_all_succeeded(&mut rescues).await {
        remove(&path);
    }
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(file = %path.display(), %error, "what was frozen is still written down");
        }
        _ => {}
    }
}
