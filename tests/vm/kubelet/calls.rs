//! A claim's volume, and the calls that kubelet and the sidecars make for it.
//!
//! Owns the paths, which are kubelet's own, and the requests. Never: decides, or looks at what came of a call.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use proto::csi::v1 as csi;
use proto::csi::v1::controller_client::ControllerClient;
use proto::csi::v1::node_client::NodeClient;
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use testlab::kubelet::{Life, Step};
use tonic::Status;
use tonic::transport::Channel;

/// Of the lab's node daemon.
pub(super) const NODE_ID: &str = "node-1";
/// Found by nobody but cryptsetup.
pub(super) const PASSPHRASE: &str = "correct-horse-battery-staple";
const MIB: i64 = 1 << 20;
/// What an encrypted volume has on the server besides its size.
const HEADER_BYTES: i64 = 16 * MIB;
/// A volume grows by so much.
const GROWTH_BYTES: i64 = 64 * MIB;

/// What a volume is used as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ext4,
    Xfs,
    Block,
    /// An ext4 on a clear disk.
    Encrypted,
}

/// A claim, its volume, and what was written to it.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    pub(super) kind: Kind,
    pub(super) life: Life,
    pub(super) name: String,
    /// Once the driver has told it.
    pub(super) volume_id: String,
    pub(super) bytes: i64,
    /// How many times pods wrote to it.
    pub(super) writes: u64,
    /// In the node-stage secret of an encrypted one's class.
    pub(super) passphrase: String,
}

impl Claim {
    pub(super) fn new(number: usize, kind: Kind) -> Self {
        let mut claim = Self {
            kind,
            life: Life::new(kind == Kind::Block),
            name: format!("pvc-{number}"),
            volume_id: String::new(),
            bytes: 0,
            writes: 0,
            passphrase: PASSPHRASE.to_owned(),
        };
        claim.forget();
        claim
    }

    /// The volume is gone.
    pub(super) fn forget(&mut self) {
        self.volume_id.clear();
        self.writes = 0;
        self.bytes = match self.kind {
            Kind::Ext4 | Kind::Block | Kind::Encrypted => 64 * MIB,
            // Smaller ones mkfs.xfs refuses.
            Kind::Xfs => 320 * MIB,
        };
    }

    pub(super) fn grown_bytes(&self) -> i64 {
        self.bytes + GROWTH_BYTES
    }

    /// What the server has of it: encrypted, the header as well.
    pub(super) fn bytes_on_server(&self) -> i64 {
        let header = if self.kind == Kind::Encrypted { HEADER_BYTES } else { 0 };
        self.bytes + header
    }

    /// The same when it has grown.
    pub(super) fn grown_bytes_on_server(&self) -> i64 {
        self.bytes_on_server() + GROWTH_BYTES
    }

    /// The parameter of its class, which is in the PersistentVolume as well.
    fn context(&self) -> HashMap<String, String> {
        let encrypted = (self.kind == Kind::Encrypted).then(|| ("encrypted".to_owned(), "true".to_owned()));
        encrypted.into_iter().collect()
    }

    fn capability(&self) -> csi::VolumeCapability {
        let mount = |fs_type: &str| {
            AccessType::Mount(MountVolume { fs_type: fs_type.to_owned(), ..Default::default() })
        };
        let access_type = match self.kind {
            Kind::Ext4 | Kind::Encrypted => mount("ext4"),
            Kind::Xfs => mount("xfs"),
            Kind::Block => AccessType::Block(BlockVolume {}),
        };
        // Several pods of one node.
        let access_mode = Some(AccessMode { mode: Mode::SingleNodeMultiWriter.into() });
        csi::VolumeCapability { access_type: Some(access_type), access_mode }
    }

    /// Where it is staged, in kubelet's directory.
    pub(super) fn staging(&self, kubelet: &Path) -> PathBuf {
        let plugins = kubelet.join("plugins/kubernetes.io/csi");
        match self.kind {
            Kind::Block => plugins.join("volumeDevices/staging").join(&self.name),
            _ => plugins.join("csi.volnode.io").join(&self.name).join("globalmount"),
        }
    }

    /// Where a pod has it.
    pub(super) fn target(&self, kubelet: &Path, pod: usize) -> PathBuf {
        match self.kind {
            Kind::Block => {
                let published = kubelet.join("plugins/kubernetes.io/csi/volumeDevices/publish");
                published.join(&self.name).join(format!("pod-{pod}"))
            }
            _ => {
                let volumes = kubelet.join(format!("pods/pod-{pod}/volumes/kubernetes.io~csi"));
                volumes.join(&self.name).join("mount")
            }
        }
    }

    /// Makes a call; gives the volume's id where it is CreateVolume.
    pub(super) async fn call(
        &self,
        kubelet: &Path,
        channel: Channel,
        step: Step,
    ) -> Result<Option<String>, Status> {
        match step {
            Step::Create => return self.create(ControllerClient::new(channel)).await.map(Some),
            Step::ControllerPublish | Step::ControllerExpand | Step::ControllerUnpublish | Step::Delete => {
                self.controller_call(ControllerClient::new(channel), step).await?;
            }
            Step::Stage | Step::LateStage | Step::Unstage => {
                self.staging_call(kubelet, NodeClient::new(channel), step).await?;
            }
            Step::Publish(pod) | Step::Look(pod) | Step::NodeExpand(pod) | Step::Unpublish(pod) => {
                self.target_call(kubelet, NodeClient::new(channel), step, pod).await?;
            }
            // No call: a pod's own work, which `world` does.
            Step::Use(_) => {}
        }
        Ok(None)
    }

    async fn create(&self, mut controller: ControllerClient<Channel>) -> Result<String, Status> {
        let request = csi::CreateVolumeRequest {
            name: self.name.clone(),
            capacity_range: range(self.bytes),
            volume_capabilities: vec![self.capability()],
            parameters: self.context(),
            ..Default::default()
        };
        let made = controller.create_volume(request).await?.into_inner().volume;
        let made = made.ok_or_else(|| Status::data_loss("no volume is told"))?;
        if made.capacity_bytes != self.bytes || made.volume_context != self.context() {
            return Err(Status::data_loss(format!("another volume is told: {made:?}")));
        }
        Ok(made.volume_id)
    }

    async fn controller_call(
        &self,
        mut controller: ControllerClient<Channel>,
        step: Step,
    ) -> Result<(), Status> {
        let (volume_id, node_id) = (self.volume_id.clone(), NODE_ID.to_owned());
        match step {
            Step::ControllerPublish => {
                let volume_capability = Some(self.capability());
                let request = csi::ControllerPublishVolumeRequest {
                    volume_id,
                    node_id,
                    volume_capability,
                    ..Default::default()
                };
                controller.controller_publish_volume(request).await?;
            }
            Step::ControllerExpand => {
                let capacity_range = range(self.grown_bytes());
                let request =
                    csi::ControllerExpandVolumeRequest { volume_id, capacity_range, ..Default::default() };
                controller.controller_expand_volume(request).await?;
            }
            Step::ControllerUnpublish => {
                let request =
                    csi::ControllerUnpublishVolumeRequest { volume_id, node_id, ..Default::default() };
                controller.controller_unpublish_volume(request).await?;
            }
            _ => {
                let request = csi::DeleteVolumeRequest { volume_id, ..Default::default() };
                controller.delete_volume(request).await?;
            }
        }
        Ok(())
    }

    async fn staging_call(
        &self,
        kubelet: &Path,
        mut node: NodeClient<Channel>,
        step: Step,
    ) -> Result<(), Status> {
        let (volume_id, staging_target_path) = (self.volume_id.clone(), text(&self.staging(kubelet)));
        if step == Step::Unstage {
            let request = csi::NodeUnstageVolumeRequest { volume_id, staging_target_path };
            return node.node_unstage_volume(request).await.map(drop);
        }
        let volume_capability = Some(self.capability());
        let request = csi::NodeStageVolumeRequest {
            volume_id,
            staging_target_path,
            volume_capability,
            volume_context: self.context(),
            secrets: self.secrets(),
            ..Default::default()
        };
        node.node_stage_volume(request).await.map(drop)
    }

    fn secrets(&self) -> HashMap<String, String> {
        let is_told = self.kind == Kind::Encrypted;
        is_told.then(|| ("passphrase".to_owned(), self.passphrase.clone())).into_iter().collect()
    }

    async fn target_call(
        &self,
        kubelet: &Path,
        mut node: NodeClient<Channel>,
        step: Step,
        pod: usize,
    ) -> Result<(), Status> {
        let volume_id = self.volume_id.clone();
        let (staging_target_path, target_path) =
            (text(&self.staging(kubelet)), text(&self.target(kubelet, pod)));
        match step {
            Step::Publish(_) => {
                let request = csi::NodePublishVolumeRequest {
                    volume_id,
                    staging_target_path,
                    target_path,
                    volume_capability: Some(self.capability()),
                    volume_context: self.context(),
                    ..Default::default()
                };
                node.node_publish_volume(request).await?;
            }
            Step::Look(_) => {
                let stats = csi::NodeGetVolumeStatsRequest {
                    volume_id: volume_id.clone(),
                    volume_path: target_path,
                    ..Default::default()
                };
                node.node_get_volume_stats(stats).await?;
                let health = csi::NodeGetVolumeHealthRequest { volume_id, ..Default::default() };
                let health = node.node_get_volume_health(health).await?.into_inner().volume_health;
                if !health.as_ref().is_some_and(|health| health.health_statuses.is_empty()) {
                    return Err(Status::data_loss(format!("it is not well: {health:?}")));
                }
            }
            Step::NodeExpand(_) => {
                let request = csi::NodeExpandVolumeRequest {
                    volume_id,
                    volume_path: target_path,
                    staging_target_path,
                    capacity_range: range(self.bytes),
                    ..Default::default()
                };
                node.node_expand_volume(request).await?;
            }
            _ => {
                let request = csi::NodeUnpublishVolumeRequest { volume_id, target_path };
                node.node_unpublish_volume(request).await?;
            }
        }
        Ok(())
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Exactly so much.
fn range(bytes: i64) -> Option<csi::CapacityRange> {
    Some(csi::CapacityRange { required_bytes: bytes, limit_bytes: bytes })
}
