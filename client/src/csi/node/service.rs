//! The calls of the Node service.
//!
//! Owns: reading what is asked, one operation at a time for each volume, and that a call which has begun is finished whether or not its
//! caller waits. Never: logs a request; of a call its name, its volume and its outcome are logged. Called by: tonic, for kubelet.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::csi::v1;
use proto::csi::v1::node_service_capability::rpc::Type as Rpc;
use proto::csi::v1::node_service_capability::{self as capability};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::content::ContentApi;
use super::daemon::Daemon;
use super::inner::Inner;
use super::operations::Operations;
use super::publish::Publish;
use super::request::{Usage, VolumeId, no_such_volume, passphrase, require};
use crate::csi::jobs::Jobs;
use crate::csi::mounts::{MountError, is_seen_outside};
use crate::csi::services::logged;
use crate::csi::targets::{KubeletDir, TargetError};
use crate::csi::usage::UsageQueries;

/// The label of a node, and the key of its topology.
pub const ZONE_KEY: &str = "topology.volnode.io/zone";
/// What kubelet lets the plugin mount in, below its directory. In a container each may be a mount of its own.
const MOUNTED_IN: [&str; 2] = ["pods", "plugins/kubernetes.io/csi"];
/// All that there is; each is answered below.
const CAPABILITIES: [Rpc; 6] = [
    Rpc::StageUnstageVolume,
    Rpc::GetVolumeStats,
    Rpc::ExpandVolume,
    Rpc::SingleNodeMultiWriter,
    Rpc::GetVolumeHealth,
    Rpc::GetStorageHealth,
];

/// What the Node service is told at its start.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Kubelet's directory.
    pub kubelet_dir: PathBuf,
    /// Nobody else need see what is mounted.
    pub may_be_private: bool,
    /// Where the locks of jobs are: the same for every plugin of this machine.
    pub job_locks: PathBuf,
    /// Kubelet is told no more; 0: what the node daemon says.
    pub max_volumes: u32,
}

/// Why there can be no Node service.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Kubelet's directory.
    #[error("--kubelet-dir: {0}")]
    KubeletDir(#[from] TargetError),
    /// What is mounted cannot be read.
    #[error("--kubelet-dir: {0}")]
    Mounts(#[from] MountError),
    /// No workload would see a volume.
    #[error(
        "--kubelet-dir: {0}: what is mounted there is seen by volcsi alone, and neither by kubelet nor by any workload; mount it into the container with mountPropagation: Bidirectional, or make it shared (mount --make-rshared)"
    )]
    Private(String),
}

/// The Node service.
#[derive(Debug, Clone)]
pub struct NodeService {
    inner: Arc<Inner>,
}

impl NodeService {
    /// Over channels to the node daemon and the storage server, neither of which need be there yet.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub fn new(options: NodeOptions, daemon: Channel, server: Channel) -> Result<Self, NodeError> {
        let kubelet = KubeletDir::open(&options.kubelet_dir)?;
        if !options.may_be_private {
            refuse_private(&kubelet)?;
        }
        let inner = Inner {
            daemon: Daemon::new(daemon),
            content: ContentApi::new(server),
            kubelet,
            may_be_private: options.may_be_private,
            jobs: Jobs::new(options.job_locks),
            usage: UsageQueries::default(),
            operations: Operations::default(),
            max_volumes: options.max_volumes,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Waits for what still runs for volumes (mkfs, fsck, a mount), for `at_most`, and logs it: in a container a program ends with the plugin,
    /// wherever it was. No call may come any more.
    pub async fn end(&self, at_most: Duration) {
        let jobs = &self.inner.jobs;
        for (volume, what, since) in jobs.all_running() {
            tracing::warn!(
                volume,
                what,
                since_s = since.as_secs(),
                at_most_s = at_most.as_secs(),
                "waits for it before the end"
            );
        }
        if tokio::time::timeout(at_most, jobs.all_ended()).await.is_ok() {
            return;
        }
        for (volume, what, since) in jobs.all_running() {
            tracing::error!(
                volume,
                what,
                since_s = since.as_secs(),
                "ends while it runs; the next volcsi looks what came of it"
            );
        }
    }

    /// Runs a call of a volume to its end, alone.
    async fn alone<T, F>(
        &self,
        call: &'static str,
        volume: VolumeId,
        work: impl FnOnce(Arc<Inner>) -> F,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let operation = self.inner.operations.begin(&volume.to_string(), call)?;
        let work = work(Arc::clone(&self.inner));
        let finished = tokio::spawn(async move {
            let outcome = work.await;
            drop(operation);
            outcome
        });
        finished.await.unwrap_or_else(|_| Err(Status::internal("the call has ended early; see volcsi's log")))
    }
}

/// Of two limits the smaller one; 0 is none.
fn smaller_limit(one: u32, other: u32) -> u32 {
    match (one, other) {
        (0, limit) | (limit, 0) => limit,
        (one, other) => one.min(other),
    }
}

/// Makes sure that what is mounted below kubelet's directory is seen outside of this process's mount namespace.
fn refuse_private(kubelet: &KubeletDir) -> Result<(), NodeError> {
    let mut found = Vec::new();
    for below in MOUNTED_IN {
        found.extend(kubelet.directory(below)?.map(|directory| (below, directory)));
    }
    if found.is_empty() {
        found.extend(kubelet.directory(".")?.map(|directory| ("", directory)));
    }
    for (below, directory) in found {
        if !is_seen_outside(directory)? {
            return Err(NodeError::Private(kubelet.path().join(below).display().to_string()));
        }
    }
    Ok(())
}

#[tonic::async_trait]
impl v1::node_server::Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<v1::NodeStageVolumeRequest>,
    ) -> Result<Response<v1::NodeStageVolumeResponse>, Status> {
        logged("NodeStageVolume", async {
            let mut asked = request.into_inner();
            let secrets = std::mem::take(&mut asked.secrets);
            let volume = VolumeId::read(&asked.volume_id)?;
            require("staging_target_path", &asked.staging_target_path)?;
            let capability = asked.volume_capability.as_ref();
            let usage = Usage::read(capability, &asked.publish_context, &asked.volume_context)?;
            let passphrase = passphrase(usage.is_encrypted, secrets)?;
            let volume = volume.ok_or_else(|| no_such_volume(&asked.volume_id))?;
            let path = asked.staging_target_path;
            let work =
                |inner: Arc<Inner>| async move { inner.stage(volume, &path, &usage, passphrase).await };
            self.alone("NodeStageVolume", volume, work).await?;
            Ok(v1::NodeStageVolumeResponse {})
        })
        .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<v1::NodeUnstageVolumeRequest>,
    ) -> Result<Response<v1::NodeUnstageVolumeResponse>, Status> {
        logged("NodeUnstageVolume", async {
            let asked = request.into_inner();
            let volume = VolumeId::read(&asked.volume_id)?;
            require("staging_target_path", &asked.staging_target_path)?;
            // Nothing of an id that no volume has can be staged.
            let Some(volume) = volume else { return Ok(v1::NodeUnstageVolumeResponse {}) };
            let path = asked.staging_target_path;
            let work = |inner: Arc<Inner>| async move { inner.unstage(volume, &path).await };
            self.alone("NodeUnstageVolume", volume, work).await?;
            Ok(v1::NodeUnstageVolumeResponse {})
        })
        .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<v1::NodePublishVolumeRequest>,
    ) -> Result<Response<v1::NodePublishVolumeResponse>, Status> {
        logged("NodePublishVolume", async {
            let asked = request.into_inner();
            let volume = VolumeId::read(&asked.volume_id)?;
            require("target_path", &asked.target_path)?;
            let capability = asked.volume_capability.as_ref();
            let usage = Usage::read(capability, &asked.publish_context, &asked.volume_context)?;
            let volume = volume.ok_or_else(|| no_such_volume(&asked.volume_id))?;
            if asked.staging_target_path.is_empty() {
                return Err(Status::failed_precondition(
                    "staging_target_path is missing; the volume is staged first",
                ));
            }
            let publish = Publish {
                volume,
                staging: asked.staging_target_path,
                target: asked.target_path,
                is_read_only: asked.readonly,
                usage,
            };
            let work = |inner: Arc<Inner>| async move { inner.publish(&publish).await };
            self.alone("NodePublishVolume", volume, work).await?;
            Ok(v1::NodePublishVolumeResponse {})
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<v1::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<v1::NodeUnpublishVolumeResponse>, Status> {
        logged("NodeUnpublishVolume", async {
            let asked = request.into_inner();
            let volume = VolumeId::read(&asked.volume_id)?;
            require("target_path", &asked.target_path)?;
            let path = asked.target_path;
            match volume {
                Some(volume) => {
                    let work = |inner: Arc<Inner>| async move { inner.unpublish(volume, &path).await };
                    self.alone("NodeUnpublishVolume", volume, work).await?;
                }
                None => self.inner.remove_target(&path).await?,
            }
            Ok(v1::NodeUnpublishVolumeResponse {})
        })
        .await
    }

    /// Waits for nobody else's call: kubelet asks all the time.
    async fn node_get_volume_stats(
        &self,
        request: Request<v1::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<v1::NodeGetVolumeStatsResponse>, Status> {
        logged("NodeGetVolumeStats", async {
            let asked = request.into_inner();
            let volume = VolumeId::read(&asked.volume_id)?;
            require("volume_path", &asked.volume_path)?;
            let volume = volume.ok_or_else(|| no_such_volume(&asked.volume_id))?;
            let usage = self.inner.stats(volume, &asked.volume_path).await?;
            Ok(v1::NodeGetVolumeStatsResponse { usage })
        })
        .await
    }

    async fn node_get_volume_health(
        &self,
        request: Request<v1::NodeGetVolumeHealthRequest>,
    ) -> Result<Response<v1::NodeGetVolumeHealthResponse>, Status> {
        logged("NodeGetVolumeHealth", async {
            let asked = request.into_inner();
            let volume = VolumeId::read(&asked.volume_id)?;
            let volume = volume.ok_or_else(|| no_such_volume(&asked.volume_id))?;
            let health = self.inner.volume_health(volume).await?;
            Ok(v1::NodeGetVolumeHealthResponse { volume_health: Some(health) })
        })
        .await
    }

    async fn node_get_storage_health(
        &self,
        _: Request<v1::NodeGetStorageHealthRequest>,
    ) -> Result<Response<v1::NodeGetStorageHealthResponse>, Status> {
        logged("NodeGetStorageHealth", async {
            let backend_health = self.inner.storage_health().await?;
            Ok(v1::NodeGetStorageHealthResponse { backend_health })
        })
        .await
    }

    async fn node_expand_volume(
        &self,
        request: Request<v1::NodeExpandVolumeRequest>,
    ) -> Result<Response<v1::NodeExpandVolumeResponse>, Status> {
        logged("NodeExpandVolume", async {
            let asked = request.into_inner();
            let volume = VolumeId::read(&asked.volume_id)?;
            require("volume_path", &asked.volume_path)?;
            let volume = volume.ok_or_else(|| no_such_volume(&asked.volume_id))?;
            let (path, range) = (asked.volume_path, asked.capacity_range);
            let work = |inner: Arc<Inner>| async move { inner.expand(volume, &path, range.as_ref()).await };
            let capacity_bytes = self.alone("NodeExpandVolume", volume, work).await?;
            Ok(v1::NodeExpandVolumeResponse { capacity_bytes })
        })
        .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<v1::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<v1::NodeGetCapabilitiesResponse>, Status> {
        logged("NodeGetCapabilities", async {
            let declared = |rpc: Rpc| v1::NodeServiceCapability {
                r#type: Some(capability::Type::Rpc(capability::Rpc { r#type: rpc.into() })),
            };
            Ok(v1::NodeGetCapabilitiesResponse { capabilities: CAPABILITIES.map(declared).into() })
        })
        .await
    }

    /// The name under which the node daemon attaches volumes at the server, and where it is.
    async fn node_get_info(
        &self,
        _: Request<v1::NodeGetInfoRequest>,
    ) -> Result<Response<v1::NodeGetInfoResponse>, Status> {
        logged("NodeGetInfo", async {
            let info = self.inner.daemon.info().await?;
            let zone = info.labels.get(ZONE_KEY);
            let accessible_topology =
                zone.map(|zone| v1::Topology { segments: [(ZONE_KEY.to_owned(), zone.clone())].into() });
            Ok(v1::NodeGetInfoResponse {
                node_id: info.node_id,
                max_volumes_per_node: smaller_limit(info.max_volumes, self.inner.max_volumes).into(),
                accessible_topology,
            })
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_limits_the_smaller_one_is_told_and_none_is_no_number() {
        for (one, other, expected) in [(0, 0, 0), (0, 5, 5), (5, 0, 5), (5, 3, 3), (3, 5, 3)] {
            assert_eq!(smaller_limit(one, other), expected);
        }
    }

    #[test]
    fn a_private_directory_is_refused_by_name() {
        // Where there are no mounts of its own, its mount is the one that /tmp is on; made by hand it is neither or either.
        let dir = tempfile::tempdir().unwrap();
        let kubelet = KubeletDir::open(dir.path()).unwrap();
        let is_shared = is_seen_outside(kubelet.directory(".").unwrap().unwrap()).unwrap();
        std::fs::create_dir_all(dir.path().join("pods")).unwrap();
        match refuse_private(&kubelet) {
            Ok(()) => assert!(is_shared),
            Err(error) => {
                assert!(!is_shared);
                assert!(
                    error.to_string().contains("/pods: what is mounted there is seen by volcsi alone"),
                    "{error}"
                );
            }
        }
    }
}
