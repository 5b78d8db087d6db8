//! The management API as a test calls it: blocking, with a deadline on every call, and with the attachment's secret, which
//! volctl never shows.
//!
//! Owns one gRPC channel and the small runtime that drives it. Used by tests that open an attachment's export themselves or
//! need to know exactly which call was answered; tests of what users see run volctl (`storage_node.rs`).

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use proto::export_name::{AttachmentExportName, Secret};
use proto::v1::management_client::ManagementClient;
use proto::v1::{
    AttachVolumeRequest, AttachVolumeResponse, Attachment, CreateVolumeRequest, DeleteVolumeRequest,
    DetachVolumeRequest, GetVolumeRequest, ListAttachmentsRequest, ListVolumesRequest, Volume, WriteCache,
};
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// A call that takes longer is not coming back.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// Small, so that the tests with a few volumes get several pages.
const PAGE_SIZE: u32 = 3;

/// A connection to one server's management API.
pub struct ManagementApi {
    runtime: Runtime,
    client: ManagementClient<Channel>,
}

impl ManagementApi {
    /// Connects to `http://host:port`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(uri: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(uri.to_owned())?.timeout(CALL_DEADLINE);
        let channel =
            runtime.block_on(endpoint.connect()).with_context(|| format!("the management API at {uri}"))?;
        Ok(Self { runtime, client: ManagementClient::new(channel) })
    }

    /// Makes a volume in a file.
    ///
    /// # Errors
    /// The server's answer.
    pub fn create_volume(
        &mut self,
        name: &str,
        capacity_bytes: u64,
        write_cache: WriteCache,
    ) -> Result<Volume, Status> {
        let request = CreateVolumeRequest {
            name: name.to_owned(),
            capacity_bytes,
            write_cache: write_cache.into(),
            ..CreateVolumeRequest::default()
        };
        Ok(self.runtime.block_on(self.client.create_volume(request))?.into_inner())
    }

    /// Deletes a volume; false where there was none.
    ///
    /// # Errors
    /// The server's answer.
    pub fn delete_volume(&mut self, name: &str) -> Result<bool, Status> {
        let request = DeleteVolumeRequest { name: name.to_owned(), ..Default::default() };
        Ok(self.runtime.block_on(self.client.delete_volume(request))?.into_inner().existed)
    }

    /// Attaches a volume for reading and writing.
    ///
    /// # Errors
    /// The server's answer.
    pub fn attach_volume(&mut self, name: &str, node_id: &str) -> Result<AttachVolumeResponse, Status> {
        self.attach(name, node_id, false)
    }

    /// The same by force: whoever has it loses it.
    ///
    /// # Errors
    /// The server's answer.
    pub fn take_volume(&mut self, name: &str, node_id: &str) -> Result<AttachVolumeResponse, Status> {
        self.attach(name, node_id, true)
    }

    fn attach(&mut self, name: &str, node_id: &str, force: bool) -> Result<AttachVolumeResponse, Status> {
        let request = AttachVolumeRequest {
            volume_name: name.to_owned(),
            node_id: node_id.to_owned(),
            force,
            ..AttachVolumeRequest::default()
        };
        Ok(self.runtime.block_on(self.client.attach_volume(request))?.into_inner())
    }

    /// Detaches a volume from whichever node has it; false where none has.
    ///
    /// # Errors
    /// The server's answer.
    pub fn detach_volume(&mut self, name: &str) -> Result<bool, Status> {
        let request = DetachVolumeRequest { volume_name: name.to_owned(), ..DetachVolumeRequest::default() };
        Ok(self.runtime.block_on(self.client.detach_volume(request))?.into_inner().existed)
    }

    /// One volume.
    ///
    /// # Errors
    /// The server's answer.
    pub fn volume(&mut self, name: &str) -> Result<Volume, Status> {
        let request = GetVolumeRequest { name: name.to_owned(), ..Default::default() };
        Ok(self.runtime.block_on(self.client.get_volume(request))?.into_inner())
    }

    /// Every volume, over all pages.
    ///
    /// # Errors
    /// The server's answer.
    pub fn volumes(&mut self) -> Result<Vec<Volume>, Status> {
        let mut volumes = Vec::new();
        let mut request =
            ListVolumesRequest { page_size: PAGE_SIZE, page_token: String::new(), ..Default::default() };
        loop {
            let page = self.runtime.block_on(self.client.list_volumes(request))?.into_inner();
            volumes.extend(page.volumes);
            if page.next_page_token.is_empty() {
                return Ok(volumes);
            }
            request = ListVolumesRequest {
                page_size: PAGE_SIZE,
                page_token: page.next_page_token,
                ..Default::default()
            };
        }
    }

    /// Every attachment, over all pages.
    ///
    /// # Errors
    /// The server's answer.
    pub fn attachments(&mut self) -> Result<Vec<Attachment>, Status> {
        let mut attachments = Vec::new();
        let mut request =
            ListAttachmentsRequest { page_size: PAGE_SIZE, ..ListAttachmentsRequest::default() };
        loop {
            let page = self.runtime.block_on(self.client.list_attachments(request.clone()))?.into_inner();
            attachments.extend(page.attachments);
            if page.next_page_token.is_empty() {
                return Ok(attachments);
            }
            request.page_token = page.next_page_token;
        }
    }
}

/// Where and under which name the export of an attachment is opened, for one connection of a session.
///
/// # Errors
/// The answer lacks what it has to tell.
pub fn export_of(
    attached: &AttachVolumeResponse,
    session_epoch: u64,
    slot: u32,
) -> Result<(SocketAddr, String)> {
    let address = attached.data_addresses.first().context("AttachVolume told no data address")?;
    let attachment = attached.attachment.as_ref().context("AttachVolume told no attachment")?;
    let name = AttachmentExportName {
        attachment_id: attachment.attachment_id.parse().context("the attachment's id")?,
        secret: Secret::parse(&attached.secret).context("the attachment's secret")?,
        epoch: session_epoch,
        slot,
    };
    Ok((address.parse().with_context(|| address.clone())?, name.expose()))
}
