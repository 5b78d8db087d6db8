//! The node API (`volnode.v1.Node`) in terms of the supervisor.
//!
//! Invariant: a call that has begun is finished, whether or not its caller waits for it: it runs as a task of its own,
//! so that a client that hangs up cannot leave an attachment half made.
//! Called by: tonic, for `volctl` and other users of the node socket.

use std::future::Future;
use std::sync::Arc;

use proto::v1;
use proto::v1::node_server::Node;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use ublk_core::DataPath;

use super::attachment_events;
use super::error::NodeError;
use super::freeze::Freezes;
use super::registration::NodeProfile;
use super::supervisor::{Supervisor, probe_data_paths};
use crate::causes::with_sources;

/// The service.
#[derive(Debug, Clone)]
pub struct NodeService {
    supervisor: Arc<Supervisor>,
    freezes: Arc<Freezes>,
    ended: watch::Receiver<bool>,
    profile: NodeProfile,
}

impl NodeService {
    /// Over this supervisor, of a node that says this of itself; whoever watches does so until `ended` turns true.
    pub(super) fn new(
        supervisor: Arc<Supervisor>,
        freezes: Arc<Freezes>,
        ended: watch::Receiver<bool>,
        profile: NodeProfile,
    ) -> Self {
        Self { supervisor, freezes, ended, profile }
    }
}

/// Runs a call to its end, and logs its failure.
async fn finish<T: Send + 'static>(
    call: &'static str,
    target: String,
    work: impl Future<Output = Result<T, NodeError>> + Send + 'static,
) -> Result<Response<T>, Status> {
    let outcome = tokio::spawn(work).await.unwrap_or(Err(NodeError::Panicked));
    outcome.map(Response::new).map_err(|error| {
        tracing::warn!(call, target, error = with_sources(&error), "call failed");
        Status::from(error)
    })
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn get_node_info(
        &self,
        _: Request<v1::GetNodeInfoRequest>,
    ) -> Result<Response<v1::GetNodeInfoResponse>, Status> {
        let supported = |data_path: DataPath, reason: String| v1::DataPathSupport {
            data_path: data_path.to_string(),
            supported: reason.is_empty(),
            reason,
        };
        let data_paths = match probe_data_paths().await {
            Ok(report) => report
                .rungs
                .iter()
                .map(|rung| {
                    let why_not = rung.usable.as_ref().err().map(|error| with_sources(error));
                    supported(rung.data_path, why_not.unwrap_or_default())
                })
                .collect(),
            Err(error) => DataPath::LADDER.map(|path| supported(path, error.to_string())).into(),
        };
        Ok(Response::new(v1::GetNodeInfoResponse {
            node_id: self.supervisor.config().node_id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            server: self.supervisor.server().to_owned(),
            data_paths,
            labels: self.profile.labels.clone().into_iter().collect(),
            max_volumes: self.profile.max_volumes,
        }))
    }

    async fn attach(
        &self,
        request: Request<v1::AttachRequest>,
    ) -> Result<Response<v1::AttachResponse>, Status> {
        let (supervisor, request) = (Arc::clone(&self.supervisor), request.into_inner());
        finish("Attach", request.target.clone(), async move { supervisor.attach(request).await }).await
    }

    async fn detach(
        &self,
        request: Request<v1::DetachRequest>,
    ) -> Result<Response<v1::DetachResponse>, Status> {
        let (supervisor, request) = (Arc::clone(&self.supervisor), request.into_inner());
        finish("Detach", request.target.clone(), async move {
            supervisor.detach(&request).await.map(|existed| v1::DetachResponse { existed })
        })
        .await
    }

    async fn set_stall_policy(
        &self,
        request: Request<v1::SetStallPolicyRequest>,
    ) -> Result<Response<v1::SetStallPolicyResponse>, Status> {
        let (supervisor, request) = (Arc::clone(&self.supervisor), request.into_inner());
        finish("SetStallPolicy", request.target.clone(), async move {
            let attachment = supervisor.set_stall_policy(&request).await?;
            Ok(v1::SetStallPolicyResponse { attachment: Some(attachment) })
        })
        .await
    }

    async fn upgrade(
        &self,
        request: Request<v1::UpgradeRequest>,
    ) -> Result<Response<v1::UpgradeResponse>, Status> {
        let (supervisor, request) = (Arc::clone(&self.supervisor), request.into_inner());
        finish("Upgrade", request.target.clone(), async move { supervisor.upgrade(&request).await }).await
    }

    async fn change_passphrase(
        &self,
        request: Request<v1::ChangePassphraseRequest>,
    ) -> Result<Response<v1::ChangePassphraseResponse>, Status> {
        let (supervisor, request) = (Arc::clone(&self.supervisor), request.into_inner());
        finish("ChangePassphrase", request.target.clone(), async move {
            let attachment = supervisor.change_passphrase(request).await?;
            Ok(v1::ChangePassphraseResponse { attachment: Some(attachment) })
        })
        .await
    }

    async fn freeze(
        &self,
        request: Request<v1::FreezeRequest>,
    ) -> Result<Response<v1::FreezeResponse>, Status> {
        let (freezes, request) = (Arc::clone(&self.freezes), request.into_inner());
        finish("Freeze", request.targets.join(","), async move { freezes.freeze(request).await }).await
    }

    async fn thaw(&self, request: Request<v1::ThawRequest>) -> Result<Response<v1::ThawResponse>, Status> {
        let (freezes, request) = (Arc::clone(&self.freezes), request.into_inner());
        finish("Thaw", request.freeze_id.clone(), async move { freezes.thaw(&request).await }).await
    }

    type WatchAttachmentsStream = ReceiverStream<Result<v1::AttachmentEvent, Status>>;

    async fn watch_attachments(
        &self,
        _: Request<v1::WatchAttachmentsRequest>,
    ) -> Result<Response<Self::WatchAttachmentsStream>, Status> {
        let events = attachment_events::watch(self.supervisor.config().run_dir.clone(), self.ended.clone());
        Ok(Response::new(ReceiverStream::new(events)))
    }

    async fn list_node_attachments(
        &self,
        _: Request<v1::ListNodeAttachmentsRequest>,
    ) -> Result<Response<v1::ListNodeAttachmentsResponse>, Status> {
        let attachments = self.supervisor.list()?;
        Ok(Response::new(v1::ListNodeAttachmentsResponse { attachments }))
    }
}
