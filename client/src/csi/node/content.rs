//! What the storage server knows of a volume's content, and what this node tells it.
//!
//! Owns: the calls to the management API, each about a volume by its uid and an attachment of this node's. Never: decides. With a node's
//! certificate GetVolume is refused; SetVolumeContent without a content changes nothing, and tells it.
//! Called by: `stage`, `health`.

use std::future::Future;
use std::time::Duration;

use proto::v1;
use proto::v1::management_client::ManagementClient;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

use super::request::VolumeId;
use crate::contract::content::Content;

/// The server looks into its catalog, and writes there.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// For whether it is there at all.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

/// A client of the management API.
#[derive(Debug, Clone)]
pub struct ContentApi {
    stub: ManagementClient<Channel>,
}

impl ContentApi {
    /// Over a channel to the server, which need not be there yet.
    pub fn new(channel: Channel) -> Self {
        Self { stub: ManagementClient::new(channel) }
    }

    /// What is known of the volume's content, seen from the attachment.
    ///
    /// # Errors
    /// UNAVAILABLE; the server's.
    pub async fn content(&self, volume: VolumeId, attachment_id: &str) -> Result<Content, Status> {
        match self.set(volume, attachment_id, v1::VolumeContent::Unspecified).await {
            Ok(volume) => Ok(Content::seen_from(&volume, attachment_id)),
            // A server that cannot be asked so.
            Err(status) if matches!(status.code(), Code::InvalidArgument | Code::Unimplemented) => {
                Ok(Content::Unknown)
            }
            Err(status) => Err(status),
        }
    }

    /// Says that the attachment is about to make a file system; or why the server does not let it, for people.
    ///
    /// # Errors
    /// UNAVAILABLE; the server's.
    pub async fn set_initialising(
        &self,
        volume: VolumeId,
        attachment_id: &str,
    ) -> Result<Result<(), String>, Status> {
        match self.set(volume, attachment_id, v1::VolumeContent::Initialising).await {
            Ok(_) => Ok(Ok(())),
            Err(status) if is_content_refused(&status) => Ok(Err(status.message().to_owned())),
            Err(status) => Err(status),
        }
    }

    /// Says that there is data from now on.
    ///
    /// # Errors
    /// UNAVAILABLE; the server's.
    pub async fn set_written(&self, volume: VolumeId, attachment_id: &str) -> Result<(), Status> {
        self.set(volume, attachment_id, v1::VolumeContent::Written).await.map(drop)
    }

    /// Whether the server answers.
    ///
    /// # Errors
    /// Why not, for people.
    pub async fn reached(&self) -> Result<(), String> {
        let mut stub = self.stub.clone();
        let asked = stub.get_server_info(v1::GetServerInfoRequest {});
        match tokio::time::timeout(LOOK_DEADLINE, asked).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err(format!("no answer within {} s", LOOK_DEADLINE.as_secs())),
        }
    }

    async fn set(
        &self,
        volume: VolumeId,
        attachment_id: &str,
        content: v1::VolumeContent,
    ) -> Result<v1::Volume, Status> {
        let request = v1::SetVolumeContentRequest {
            name: volume.as_name(),
            attachment_id: attachment_id.to_owned(),
            content: content.into(),
        };
        let mut stub = self.stub.clone();
        call(stub.set_volume_content(request)).await
    }
}

fn is_content_refused(status: &Status) -> bool {
    let info = status.get_details_error_info();
    info.is_some_and(|info| info.reason == proto::error_reason::CONTENT_REFUSED)
}

async fn call<T>(answer: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    let unreachable = |why: &str| {
        Status::unavailable(format!(
            "the storage server cannot be asked about the volume's content: {why}; check --server, and repeat the call"
        ))
    };
    match tokio::time::timeout(CALL_DEADLINE, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status))
            if status.get_details_error_info().is_none() && status.code() != Code::Unimplemented =>
        {
            Err(unreachable(status.message()))
        }
        Ok(Err(status)) => Err(status),
        Err(_) => Err(unreachable(&format!("no answer within {} s", CALL_DEADLINE.as_secs()))),
    }
}
