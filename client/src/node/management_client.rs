//! The storage server's management API, as the node daemon uses it.
//!
//! Owns: the channel, the deadline of each call, and the difference between a refusal (passed on) and a server that
//! cannot be reached. Never: retries; every call of the node API may be repeated by its caller.
//! Called by: `supervisor`, `registration`.

use std::error::Error;
use std::future::Future;
use std::str::FromStr as _;
use std::time::Duration;

use proto::export_name::Secret;
use proto::v1::management_client::ManagementClient as Stub;
use proto::v1::{
    AccessMode, AttachVolumeRequest, Attachment, Backend, DetachVolumeRequest, GetServerInfoRequest,
    GetServerInfoResponse, Grant, HeartbeatRequest, HeartbeatResponse, ListAttachmentsRequest,
    ListGrantsRequest, RegisterNodeRequest, SetVolumeContentRequest, Volume, VolumeContent,
};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::error::NodeError;
use crate::tls_spec::ClientFiles;
use crate::{api_channel, contract};

/// A call: a detach waits there for the I/O of fenced connections.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// A volume that this node may open.
#[derive(Debug)]
pub struct GrantedAttachment {
    /// Public id.
    pub attachment_id: Uuid,
    /// Opens the export.
    pub secret: Secret,
    /// Highest epoch that has opened the export.
    pub session_epoch: u64,
    /// Who serves the volume.
    pub server_id: Uuid,
    /// The volume.
    pub volume_uid: Uuid,
    /// Where to open the export, `host:port` or `unix:/path`.
    pub data_addresses: Vec<String>,
    /// Logical block size in bytes.
    pub block_size_bytes: u32,
    /// A restart of the server's process loses all of it, flushed or not.
    pub is_volatile: bool,
    /// This node held it before the call.
    pub existed: bool,
    /// What is written to it is to be encrypted.
    pub is_encrypted: bool,
}

/// A connection to one storage server, made when first used and again when lost.
#[derive(Debug, Clone)]
pub struct ManagementClient {
    server: String,
    stub: Stub<Channel>,
}

impl ManagementClient {
    /// For the server at this URI, such as `unix:/run/volserver/management.sock`, `http://127.0.0.1:10810`, or `https://…` with the files of TLS. Does not connect
    /// yet; within a tokio runtime.
    ///
    /// # Errors
    /// [`NodeError::InvalidField`]: not such a URI, or no files.
    pub fn new(server: &str, files: Option<&ClientFiles>) -> Result<Self, NodeError> {
        let off = |message: String| NodeError::InvalidField { field: "server", message };
        let channel = api_channel::connect_lazy(server, files).map_err(|error| off(error.to_string()))?;
        Ok(Self { server: api_channel::with_port(server), stub: Stub::new(channel) })
    }

    /// The server's URI.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Lets this node open the volume.
    ///
    /// # Errors
    /// [`NodeError::Refused`], [`NodeError::ServerUnreachable`], [`NodeError::ServerAnswer`]
    pub async fn attach_volume(
        &self,
        volume_name: &str,
        node_id: &str,
        access_mode: AccessMode,
        force: bool,
        only_if_granted: bool,
    ) -> Result<GrantedAttachment, NodeError> {
        let request = AttachVolumeRequest {
            volume_name: volume_name.to_owned(),
            node_id: node_id.to_owned(),
            access_mode: access_mode.into(),
            force,
            boot_id: contract::boot_id().unwrap_or_default(),
            only_if_granted,
            ..Default::default()
        };
        let mut stub = self.stub.clone();
        let answer = self.call(stub.attach_volume(request)).await?;
        let off = |what| NodeError::ServerAnswer { server: self.server.clone(), what };
        let uuid = |text: &str, what| Uuid::from_str(text).map_err(|_| off(what));
        let is_volatile = answer.backend() == Backend::Memory;
        let attachment = answer.attachment.ok_or_else(|| off("no attachment"))?;
        if answer.data_addresses.is_empty() {
            return Err(off(
                "no data address that this machine can reach: start it with --listen or --advertise for it",
            ));
        }
        Ok(GrantedAttachment {
            attachment_id: uuid(&attachment.attachment_id, "an attachment_id that is no UUID")?,
            secret: Secret::parse(&answer.secret).ok_or_else(|| off("a secret of another form"))?,
            session_epoch: attachment.session_epoch,
            server_id: uuid(&answer.server_id, "a server_id that is no UUID")?,
            volume_uid: uuid(&attachment.volume_uid, "a volume_uid that is no UUID")?,
            block_size_bytes: answer.block_size_bytes,
            is_volatile,
            data_addresses: answer.data_addresses,
            existed: answer.existed,
            is_encrypted: answer.is_encrypted,
        })
    }

    /// The node's grant of a volume; `None`: there is none.
    ///
    /// # Errors
    /// [`NodeError::Refused`] (UNIMPLEMENTED: the server knows no grants), [`NodeError::ServerUnreachable`]
    pub async fn grant_of(&self, volume_name: &str, node_id: &str) -> Result<Option<Grant>, NodeError> {
        let request = ListGrantsRequest {
            volume_name: volume_name.to_owned(),
            node_id: node_id.to_owned(),
            ..Default::default()
        };
        let mut stub = self.stub.clone();
        Ok(self.call(stub.list_grants(request)).await?.grants.pop())
    }

    /// Ends an attachment; tells whether there was one.
    ///
    /// # Errors
    /// [`NodeError::Refused`], [`NodeError::ServerUnreachable`]
    pub async fn detach_volume(&self, attachment_id: &str) -> Result<bool, NodeError> {
        let request = DetachVolumeRequest { attachment_id: attachment_id.to_owned(), ..Default::default() };
        let mut stub = self.stub.clone();
        Ok(self.call(stub.detach_volume(request)).await?.existed)
    }

    /// Says what is known of a volume's content, by an attachment of this node's; unspecified changes nothing. The volume, with its content.
    ///
    /// # Errors
    /// [`NodeError::Refused`], [`NodeError::ServerUnreachable`]
    pub async fn set_volume_content(
        &self,
        volume_name: &str,
        attachment_id: &str,
        content: VolumeContent,
    ) -> Result<Volume, NodeError> {
        let request = SetVolumeContentRequest {
            name: volume_name.to_owned(),
            attachment_id: attachment_id.to_owned(),
            content: content.into(),
        };
        let mut stub = self.stub.clone();
        self.call(stub.set_volume_content(request)).await
    }

    /// Who the server is, and where it serves data now.
    ///
    /// # Errors
    /// [`NodeError::Refused`], [`NodeError::ServerUnreachable`]
    pub async fn server_info(&self) -> Result<GetServerInfoResponse, NodeError> {
        let mut stub = self.stub.clone();
        self.call(stub.get_server_info(GetServerInfoRequest {})).await
    }

    /// Makes this node known.
    ///
    /// # Errors
    /// [`NodeError::Refused`], [`NodeError::ServerUnreachable`]
    pub async fn register_node(&self, request: RegisterNodeRequest) -> Result<(), NodeError> {
        let mut stub = self.stub.clone();
        self.call(stub.register_node(request)).await.map(drop)
    }

    /// Says how this node is.
    ///
    /// # Errors
    /// [`NodeError::Refused`], [`NodeError::ServerUnreachable`]
    pub async fn heartbeat(&self, request: HeartbeatRequest) -> Result<HeartbeatResponse, NodeError> {
        let mut stub = self.stub.clone();
        self.call(stub.heartbeat(request)).await
    }

    /// Makes sure that the server is the one that gave an attachment out.
    ///
    /// # Errors
    /// [`NodeError::ServerAnswer`]: it is another. [`NodeError::Refused`], [`NodeError::ServerUnreachable`].
    pub async fn expect_server(&self, server_id: Uuid) -> Result<(), NodeError> {
        let info = self.server_info().await?;
        if info.server_id == server_id.to_string() {
            return Ok(());
        }
        let what = "another server_id than the one that gave the attachment out";
        Err(NodeError::ServerAnswer { server: self.server.clone(), what })
    }

    /// Ids of this node's attachments of a volume that no connection uses.
    ///
    /// # Errors
    /// [`NodeError::Refused`], [`NodeError::ServerUnreachable`]
    pub async fn idle_attachments(&self, volume_name: &str, node_id: &str) -> Result<Vec<String>, NodeError> {
        let held = self.attachments_of(volume_name, node_id).await?;
        let idle = held.into_iter().filter(|attachment| attachment.connections == 0);
        Ok(idle.map(|attachment| attachment.attachment_id).collect())
    }

    /// This node's attachments of a volume: one, or none.
    ///
    /// # Errors
    /// [`NodeError::Refused`], [`NodeError::ServerUnreachable`]
    pub async fn attachments_of(
        &self,
        volume_name: &str,
        node_id: &str,
    ) -> Result<Vec<Attachment>, NodeError> {
        let request = ListAttachmentsRequest {
            volume_name: volume_name.to_owned(),
            node_id: node_id.to_owned(),
            ..Default::default()
        };
        let mut stub = self.stub.clone();
        Ok(self.call(stub.list_attachments(request)).await?.attachments)
    }

    async fn call<T>(
        &self,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, NodeError> {
        let unreachable = |cause| NodeError::ServerUnreachable { server: self.server.clone(), cause };
        match tokio::time::timeout(CALL_DEADLINE, answer).await {
            Err(_) => Err(unreachable(format!("no answer within {} s", CALL_DEADLINE.as_secs()))),
            Ok(Ok(response)) => Ok(response.into_inner()),
            // A status that the server did not make (it would say why) is the channel's.
            Ok(Err(status))
                if matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown)
                    && status.get_details_error_info().is_none() =>
            {
                Err(unreachable(innermost_cause(&status)))
            }
            Ok(Err(status)) => Err(NodeError::Refused(Box::new(status))),
        }
    }
}

fn innermost_cause(status: &Status) -> String {
    status.source().map_or_else(|| status.message().to_owned(), api_channel::innermost_cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named() {
        // Taken, and nobody listens there.
        let taken = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        taken.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let uri = format!("http://{}", taken.local_addr().unwrap().as_socket().unwrap());
        let client = ManagementClient::new(&uri, None).unwrap();
        let error = client.detach_volume("x").await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, NodeError::ServerUnreachable { .. }), "{error:?}");
        assert!(
            text.starts_with(&format!("cannot reach the storage server at {uri}: Connection refused")),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_uri_of_another_form_is_refused() {
        for bad in ["127.0.0.1:10810", "https://h:1", "http://", "unix:x"] {
            assert!(ManagementClient::new(bad, None).is_err(), "{bad}");
        }
    }
}
