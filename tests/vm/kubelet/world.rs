//! The storage node, volcsi and kubelet's directory, and what has to be true after each step.
//!
//! Owns the processes, what pods write and read, and the oracle. Which step is next, and which fault, comes from outside.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use client::csi::mountinfo;
use fastrand::Rng;
use proto::v1;
use proto::v1::management_client::ManagementClient;
use proto::v1::node_client::NodeClient;
use testlab::harness::Env;
use testlab::kubelet::{Fault, Step};
use testlab::shell::{path_with, sh, wait_for};
use testlab::storage_node::StorageNode;
use testlab::volcsi::Volcsi;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::calls::{Claim, Kind, NODE_ID};
use crate::ride_through::BOUND;

/// What a pod writes at once, in bytes.
const WRITE_BYTES: usize = 64 << 10;
/// The places that it writes to, one after the other.
const PLACES: u64 = 16;
/// How much of the plugin's log is shown where something failed, in lines.
const LOG_LINES: usize = 120;

/// Where disks have names.
const NAMED: [&str; 2] = ["/dev/mapper", "/dev/volnode"];

type Answer = Result<Option<String>, Status>;

/// Everything that there is.
pub(super) struct World {
    pub(super) claims: Vec<Claim>,
    pub(super) storage: StorageNode,
    /// Where volcsi finds programs before others.
    programs: Option<PathBuf>,
    /// There, but for the moment between its death and the next one's start.
    volcsi: Option<Volcsi>,
    directory: PathBuf,
    kubelet: PathBuf,
    runtime: Runtime,
    /// What [`NAMED`] had before the first call.
    named_before: BTreeSet<PathBuf>,
}

impl World {
    /// Starts the plugin once the server knows the node.
    pub(super) fn new(
        env: &Env,
        storage: StorageNode,
        claims: Vec<Claim>,
        programs: Option<&Path>,
    ) -> Result<Self> {
        let (directory, kubelet) = (env.directory.clone(), env.directory.join("kubelet"));
        fs::create_dir(&kubelet)?;
        sh(&format!("mount --bind {0} {0}; mount --make-shared {0}", kubelet.display()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let named_before = named();
        let programs = programs.map(Path::to_owned);
        let mut world =
            Self { claims, storage, programs, volcsi: None, directory, kubelet, runtime, named_before };
        wait_for("the server to know the node", BOUND, || {
            let nodes = world.ask(async |mut api| api.list_nodes(v1::ListNodesRequest::default()).await)?;
            Ok(nodes.nodes.iter().any(|node| node.node_id == NODE_ID).then_some(()))
        })?;
        world.restart()?;
        Ok(world)
    }

    /// Kills the plugin, if there is one, and starts the next.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.volcsi = None;
        let mut command = self.storage.program("volcsi");
        command.arg("--kubelet-dir").arg(&self.kubelet).args(["--log", "info,client=debug"]);
        if let Some(programs) = &self.programs {
            command.env("PATH", path_with(programs));
        }
        let (socket, log) = (self.directory.join("csi.sock"), self.directory.join("volcsi.log"));
        self.volcsi = Some(Volcsi::start(&mut command, &socket, &log)?);
        Ok(())
    }

    /// The end of what the plugins said.
    pub(super) fn logged(&self) -> String {
        let log = fs::read_to_string(self.directory.join("volcsi.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// The directory's own mount goes before the harness looks for what was left.
    pub(super) fn end(mut self) -> Result<()> {
        self.volcsi = None;
        sh(&format!("umount {}", self.kubelet.display())).map(drop)
    }

    fn channel(&self) -> Result<Channel> {
        self.runtime.block_on(self.volcsi.as_ref().context("no plugin")?.channel())
    }

    fn ask<T>(
        &self,
        call: impl AsyncFnOnce(ManagementClient<Channel>) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T> {
        let uri = self.storage.management_uri.clone();
        let asked = async { anyhow::Ok(call(ManagementClient::connect(uri).await?).await?.into_inner()) };
        self.runtime.block_on(asked)
    }

    fn attachments(&self) -> Result<Vec<v1::NodeAttachment>> {
        let socket = self.storage.run_dir.join("volclient.sock");
        self.runtime.block_on(async {
            let channel = Endpoint::from_shared(format!("unix://{}", socket.display()))?.connect().await?;
            let request = v1::ListNodeAttachmentsRequest {};
            Ok(NodeClient::new(channel).list_node_attachments(request).await?.into_inner().attachments)
        })
    }

    /// What kubelet makes before a call.
    fn make_directories(&self, number: usize, step: Step) -> Result<()> {
        let claim = &self.claims[number];
        match step {
            Step::Stage | Step::LateStage => fs::create_dir_all(claim.staging(&self.kubelet))?,
            Step::Publish(pod) => {
                let target = claim.target(&self.kubelet, pod);
                fs::create_dir_all(target.parent().context("a target without a parent")?)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Makes the calls of a round at once, with a fault; gives what came of each.
    pub(super) fn begin(
        &mut self,
        chosen: &[(usize, Step)],
        fault: Fault,
    ) -> Result<Vec<Result<(), Status>>> {
        let channel = self.channel()?;
        let mut begun: Vec<Vec<JoinHandle<Answer>>> = Vec::new();
        for (number, step) in chosen {
            self.make_directories(*number, *step)?;
            let copies = match (step, fault) {
                (Step::Use(_), _) => 0,
                (_, Fault::Twice) => 2,
                _ => 1,
            };
            begun.push((0..copies).map(|_| self.spawn(*number, *step, fault, channel.clone())).collect());
        }
        // Pods go on meanwhile.
        let mut worked = Vec::with_capacity(chosen.len());
        for (number, step) in chosen {
            let Step::Use(pod) = step else {
                worked.push(None);
                continue;
            };
            worked.push(Some(self.work(*number, *pod)));
        }
        if let Fault::KilledDuring(after) = fault {
            std::thread::sleep(after);
            self.volcsi = None;
        }
        let mut outcomes = Vec::with_capacity(chosen.len());
        for (((number, _), copies), worked) in chosen.iter().zip(begun).zip(worked) {
            let mut outcome = worked.unwrap_or_else(|| Err(Status::internal("nobody was asked")));
            for copy in copies {
                let answer = self.runtime.block_on(copy)?.and_then(|told| self.note(*number, told));
                let is_wrong = answer.as_ref().is_err_and(|error| error.code() == Code::DataLoss);
                // One of two may have found the other at work.
                if outcome.is_err() || is_wrong {
                    outcome = answer;
                }
                if is_wrong {
                    break;
                }
            }
            outcomes.push(outcome);
        }
        if self.volcsi.is_none() {
            self.restart()?;
        }
        Ok(outcomes)
    }

    /// Begins a call, and has whoever `killer` kills die in the middle of it: the call fails then.
    pub(super) fn cut_off(
        &mut self,
        number: usize,
        step: Step,
        killer: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<Status> {
        self.make_directories(number, step)?;
        let call = self.spawn(number, step, Fault::None, self.channel()?);
        killer(self)?;
        match self.runtime.block_on(call)? {
            Err(status) => Ok(status),
            Ok(_) => bail!("{step:?} came to its end without those that make it"),
        }
    }

    fn spawn(&self, number: usize, step: Step, fault: Fault, channel: Channel) -> JoinHandle<Answer> {
        let (claim, kubelet) = (self.claims[number].clone(), self.kubelet.clone());
        self.runtime.spawn(async move {
            let call = claim.call(&kubelet, channel, step);
            match fault {
                Fault::GivenUp(after) => tokio::time::timeout(after, call)
                    .await
                    .unwrap_or_else(|_| Err(Status::cancelled("the caller has hung up"))),
                _ => call.await,
            }
        })
    }

    /// Makes one call, by itself.
    pub(super) fn call(&mut self, number: usize, step: Step) -> Result<(), Status> {
        if let Step::Use(pod) = step {
            return self.work(number, pod);
        }
        let in_words = |error: anyhow::Error| Status::data_loss(format!("{error:#}"));
        self.make_directories(number, step).map_err(in_words)?;
        let channel = self.channel().map_err(in_words)?;
        let told = self.runtime.block_on(self.claims[number].call(&self.kubelet, channel, step))?;
        self.note(number, told)
    }

    /// Keeps the id that CreateVolume told: always the same one.
    fn note(&mut self, number: usize, told: Option<String>) -> Result<(), Status> {
        let Some(volume_id) = told else { return Ok(()) };
        let known = &mut self.claims[number].volume_id;
        if !known.is_empty() && *known != volume_id {
            return Err(Status::data_loss(format!("two volumes of one name: {known} and {volume_id}")));
        }
        *known = volume_id;
        Ok(())
    }

    /// A pod reads all that was written, and writes more.
    fn work(&mut self, number: usize, pod: usize) -> Result<(), Status> {
        let worked = self.read_all(number, pod).and_then(|()| self.write_more(number, pod));
        worked.map_err(|error| Status::data_loss(format!("pod {pod} of claim {number}: {error:#}")))
    }

    fn read_all(&self, number: usize, pod: usize) -> Result<()> {
        let claim = &self.claims[number];
        for write in claim.writes.saturating_sub(PLACES)..claim.writes {
            let mut found = vec![0; WRITE_BYTES];
            self.open(claim, pod, write, false)?.read_exact(&mut found)?;
            ensure!(found == contents(number, write), "what was written as number {write} is not there");
        }
        Ok(())
    }

    fn write_more(&mut self, number: usize, pod: usize) -> Result<()> {
        let claim = &self.claims[number];
        let mut file = self.open(claim, pod, claim.writes, true)?;
        file.write_all(&contents(number, claim.writes))?;
        file.sync_all()?;
        if claim.kind != Kind::Block {
            File::open(claim.target(&self.kubelet, pod))?.sync_all()?;
        }
        self.claims[number].writes += 1;
        Ok(())
    }

    /// The place of a write: a file of its own, or a piece of the device.
    fn open(&self, claim: &Claim, pod: usize, write: u64, to_write: bool) -> Result<File> {
        let (target, place) = (claim.target(&self.kubelet, pod), write % PLACES);
        let mut options = File::options();
        options.read(true).write(to_write);
        if claim.kind == Kind::Block {
            let mut device = options.open(&target).with_context(|| target.display().to_string())?;
            device.seek(SeekFrom::Start(place * WRITE_BYTES as u64))?;
            return Ok(device);
        }
        let file = target.join(format!("place-{place}"));
        options.create(to_write).open(&file).with_context(|| file.display().to_string())
    }

    /// What a step has made, or left.
    pub(super) fn look(&mut self, number: usize, step: Step) -> Result<()> {
        let claim = self.claims[number].clone();
        let (staging, name) = (claim.staging(&self.kubelet), format!("uid:{}", claim.volume_id));
        let volume = || {
            self.ask(async |mut api| {
                api.get_volume(v1::GetVolumeRequest { name, ..Default::default() }).await
            })
        };
        match step {
            Step::Create => {
                ensure!(volume()?.capacity_bytes == claim.bytes_on_server() as u64, "another size")
            }
            Step::ControllerPublish => {
                let nodes: Vec<String> = volume()?.grants.into_iter().map(|grant| grant.node_id).collect();
                ensure!(nodes == [NODE_ID], "granted to {nodes:?}");
            }
            Step::Stage => {
                ensure!(self.has_disk(&claim)?, "nothing is attached");
                ensure!(claim.kind == Kind::Block || is_mounted(&staging)?, "nothing is staged");
            }
            Step::Publish(pod) => self.read_all(number, pod)?,
            Step::Use(_) | Step::Look(_) => {}
            Step::ControllerExpand => {
                ensure!(volume()?.capacity_bytes == claim.grown_bytes_on_server() as u64, "it has not grown");
                self.claims[number].bytes = claim.grown_bytes();
                if claim.kind == Kind::Block {
                    self.device_has_grown(number)?;
                }
            }
            Step::NodeExpand(pod) => {
                let space = rustix::fs::statvfs(claim.target(&self.kubelet, pod))?;
                let bytes = space.f_blocks * space.f_frsize;
                ensure!(bytes > claim.bytes as u64 * 3 / 4, "the file system has {bytes} bytes");
            }
            Step::Unpublish(pod) => {
                let target = claim.target(&self.kubelet, pod);
                ensure!(!target.exists() && !is_mounted(&target)?, "the target is there yet");
                // As kubelet does: it is empty.
                if claim.kind != Kind::Block {
                    fs::remove_dir(target.parent().context("a target without a parent")?)?;
                }
            }
            Step::Unstage | Step::LateStage => {
                ensure!(!is_mounted(&staging)?, "something is mounted where it was staged");
                ensure!(!self.has_disk(&claim)?, "its disk is there yet");
                if staging.exists() {
                    fs::remove_dir(&staging)?;
                }
            }
            Step::ControllerUnpublish => {
                let volume = volume()?;
                ensure!(volume.grants.is_empty() && volume.attachments.is_empty(), "{volume:?}");
            }
            Step::Delete => {
                let why = volume().err().context("the volume is there yet")?;
                let status = why.downcast::<Status>()?;
                ensure!(status.code() == Code::NotFound, "{status}");
                self.claims[number].forget();
            }
        }
        Ok(())
    }

    fn has_disk(&self, claim: &Claim) -> Result<bool> {
        Ok(self.attachments()?.iter().any(|one| one.volume_uid == claim.volume_id))
    }

    /// Where a pod has the device: the node learns of the new size by itself.
    fn device_has_grown(&self, number: usize) -> Result<()> {
        let claim = &self.claims[number];
        for pod in 0..testlab::kubelet::PODS {
            let target = claim.target(&self.kubelet, pod);
            if target.exists() {
                wait_for("the device to grow", Duration::from_secs(60), || {
                    Ok((File::open(&target)?.seek(SeekFrom::End(0))? == claim.bytes as u64).then_some(()))
                })?;
            }
        }
        Ok(())
    }

    /// After the last volume is deleted.
    pub(super) fn nothing_is_left(&self) -> Result<()> {
        let mounts = mountinfo::read()?;
        let below: Vec<_> =
            mounts.iter().filter(|mount| mount.mount_point.starts_with(&self.kubelet)).collect();
        ensure!(below.len() == 1, "mounts are left: {below:?}");
        let attachments = self.attachments()?;
        ensure!(attachments.is_empty(), "disks are left: {attachments:?}");
        let volumes = self.ask(async |mut api| api.list_volumes(v1::ListVolumesRequest::default()).await)?;
        ensure!(volumes.volumes.is_empty(), "volumes are left: {volumes:?}");
        let grants = self.ask(async |mut api| api.list_grants(v1::ListGrantsRequest::default()).await)?;
        ensure!(grants.grants.is_empty(), "grants are left: {grants:?}");
        let named: Vec<_> = named().difference(&self.named_before).cloned().collect();
        ensure!(named.is_empty(), "names of disks are left: {named:?}");
        holds_directories_alone(&self.kubelet)
    }
}

/// What [`NAMED`] has now.
fn named() -> BTreeSet<PathBuf> {
    let entries = NAMED.into_iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// What a claim's write of this number holds.
fn contents(number: usize, write: u64) -> Vec<u8> {
    let mut bytes = vec![0; WRITE_BYTES];
    Rng::with_seed(write * 1000 + number as u64).fill(&mut bytes);
    bytes
}

fn is_mounted(path: &Path) -> Result<bool> {
    Ok(!mountinfo::at(path)?.is_empty())
}

/// Kubelet's own are left, but no target.
fn holds_directories_alone(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if !path.is_dir() {
            bail!("{} is left", path.display());
        }
        holds_directories_alone(&path)?;
    }
    Ok(())
}
