//! A volume that is attached to volctl itself, while it is imported into or exported.
//!
//! Owns the attachment, and the connection through which volctl has its bytes. Nobody else writes to the volume meanwhile. The
//! attachment's node is named after this copy, so that the next run of the same copy, and no other one, takes it over.

use std::str::FromStr as _;
use std::sync::Arc;

use client::api_channel;
use client::data_address::on_the_link_of;
use client::image::nbd::{NbdClient, Opening};
use client::image::store::Store;
use client::tls_spec::TlsSpec;
use proto::export_name::{AttachmentExportName, Secret};
use proto::nbd::block_status::ALLOCATION_CONTEXT;
use proto::v1;
use proto::v1::management_client::ManagementClient;
use tonic::transport::Channel;
use uuid::Uuid;

use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;

/// Begins the node of every attachment of volctl's own.
pub(super) const NODE_PREFIX: &str = "volctl@";
/// Of a machine's name that becomes part of a node's, in bytes; a node's name has 256.
const HOST_BYTES_MAX: usize = 64;

/// The storage server.
#[derive(Debug)]
pub(super) struct Server<'a> {
    address: &'a ServerAddress,
    pub(super) client: ManagementClient<Channel>,
}

/// A volume that is ours for now.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) attachment_id: String,
    /// It was attached by an earlier run of this copy.
    pub(super) existed: bool,
    pub(super) store: Arc<Store>,
}

impl Attached {
    /// Ends the connection in good order, and says what is to be detached.
    pub(super) async fn close(self) -> String {
        if let Some(store) = Arc::into_inner(self.store) {
            store.close().await;
        }
        self.attachment_id
    }
}

/// The node whose attachments a copy has.
pub(super) fn node_id(copy_id: &str) -> String {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy();
    let name: String = name.chars().filter(char::is_ascii_graphic).take(HOST_BYTES_MAX).collect();
    format!("{NODE_PREFIX}{name}#{copy_id}")
}

/// What tells this machine from others of its name.
pub(super) fn machine_id() -> String {
    let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    format!("{} {}", rustix::system::uname().nodename().to_string_lossy(), id.trim())
}

impl<'a> Server<'a> {
    pub(super) async fn connect(address: &'a ServerAddress) -> Result<Self, Failure> {
        Ok(Self { address, client: connect::server(address).await? })
    }

    pub(super) async fn volume(&mut self, name: &str) -> Result<v1::Volume, Failure> {
        call(self.client.get_volume(v1::GetVolumeRequest { name: name.to_owned(), ..Default::default() }))
            .await
    }

    /// Attaches a volume to this copy, and opens it.
    pub(super) async fn attach(
        &mut self,
        volume: &v1::Volume,
        copy_id: &str,
        access_mode: v1::AccessMode,
    ) -> Result<Attached, Failure> {
        let node_id = node_id(copy_id);
        check_holders(volume, &node_id, access_mode)?;
        let request = v1::AttachVolumeRequest {
            volume_name: volume.name.clone(),
            node_id,
            access_mode: access_mode.into(),
            force: false,
            // Whoever goes on with the copy is the same to the server, also after this machine's reboot.
            boot_id: copy_id.to_owned(),
            ..Default::default()
        };
        let answer = call(self.client.attach_volume(request)).await?;
        let existed = answer.existed;
        let attachment = answer.attachment.clone().ok_or_else(|| Failure::incomplete_answer("attachment"))?;
        let attachment_id = attachment.attachment_id.clone();
        match self.open(&attachment, answer).await {
            Ok(store) => Ok(Attached { attachment_id, existed, store: Arc::new(store) }),
            Err(failure) => {
                if !existed {
                    // What the opening failed for is told.
                    let _ = self.detach(&attachment_id).await;
                }
                Err(failure)
            }
        }
    }

    async fn open(
        &self,
        attachment: &v1::Attachment,
        answer: v1::AttachVolumeResponse,
    ) -> Result<Store, Failure> {
        let secret =
            Secret::parse(&answer.secret).ok_or_else(|| Failure::incomplete_answer("valid secret"))?;
        let id = Uuid::from_str(&attachment.attachment_id);
        let attachment_id = id.map_err(|_| Failure::incomplete_answer("valid attachment_id"))?;
        if answer.data_addresses.is_empty() {
            return Err(Failure::new(
                ExitCode::Unreachable,
                "the storage server has no data address that this machine can reach",
                "start it with --listen or --advertise for it",
            ));
        }
        let zone = api_channel::zone(&self.address.uri);
        let addresses = answer.data_addresses.into_iter();
        let addresses = addresses.map(|address| on_the_link_of(zone.as_deref(), address)).collect();
        // The epoch is higher than that of any run before, whose connections end with it.
        let name =
            AttachmentExportName { attachment_id, secret, epoch: attachment.session_epoch + 1, slot: 0 };
        let opening = Opening {
            addresses,
            export_name: name.expose(),
            context: ALLOCATION_CONTEXT.to_owned(),
            tls: self.tls(),
        };
        let client = NbdClient::open(opening).await.map_err(|error| {
            let next = "check that volserver listens there for data, and that this machine reaches it; then repeat the command";
            Failure::new(ExitCode::Unreachable, format!("cannot open the volume: {error}"), next)
        })?;
        Ok(Store::Nbd(Box::new(client)))
    }

    /// The data is reached as the API is: whoever answers for it has to be the same server.
    fn tls(&self) -> Option<TlsSpec> {
        let host = api_channel::host(&self.address.uri).filter(|_| api_channel::is_https(&self.address.uri));
        let (server_name, files) = (host?, self.address.tls_files.clone()?);
        Some(TlsSpec {
            files,
            server_name,
            // Keys are renewed there without making the connection anew.
            user_space_only: true,
            key_bytes_max: tls::kernel::KEY_BYTES_MAX,
        })
    }

    pub(super) async fn detach(&mut self, attachment_id: &str) -> Result<(), Failure> {
        let attachment_id = attachment_id.to_owned();
        let request = v1::DetachVolumeRequest { attachment_id, ..Default::default() };
        call(self.client.detach_volume(request)).await?;
        Ok(())
    }
}

/// Says who has a volume where the server would only say that somebody has.
fn check_holders(volume: &v1::Volume, node_id: &str, access_mode: v1::AccessMode) -> Result<(), Failure> {
    let is_in_the_way = |attachment: &&v1::Attachment| {
        let both_read = attachment.access_mode() == v1::AccessMode::MultiNodeReaderOnly
            && access_mode == v1::AccessMode::MultiNodeReaderOnly;
        attachment.node_id != node_id && !both_read
    };
    let Some(holder) = volume.attachments.iter().find(is_in_the_way) else { return Ok(()) };
    let (name, holder) = (&volume.name, &holder.node_id);
    let next = if holder.starts_with(NODE_PREFIX) {
        format!(
            "an import or export has it: wait for it; if it was interrupted, repeat it where it ran, or give it up: volctl import --drop {name}"
        )
    } else if access_mode == v1::AccessMode::MultiNodeReaderOnly {
        format!("detach it there; or take a snapshot (volctl snapshot create {name} NAME) and export that")
    } else {
        "detach it there".to_owned()
    };
    Err(Failure::new(ExitCode::Precondition, format!("volume {name} is attached to {holder}"), next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_a_volume_is_named_with_what_to_do() {
        let held = |node_id: &str, mode: v1::AccessMode| {
            let attachment =
                v1::Attachment { node_id: node_id.into(), access_mode: mode.into(), ..Default::default() };
            v1::Volume { name: "v".into(), attachments: vec![attachment], ..Default::default() }
        };
        let (writer, readers) = (v1::AccessMode::SingleNodeWriter, v1::AccessMode::MultiNodeReaderOnly);
        let ours = node_id("0123");
        assert_eq!(check_holders(&held(&ours, writer), &ours, writer), Ok(()), "an earlier run");
        assert_eq!(check_holders(&held("n1", readers), &ours, readers), Ok(()));
        let refused =
            |node: &str, held_as, wanted| check_holders(&held(node, held_as), &ours, wanted).unwrap_err();
        assert!(refused("n1", writer, writer).next.starts_with("detach it there"));
        assert!(refused("n1", writer, readers).next.contains("snapshot create v"));
        let other = refused(&node_id("4567"), writer, writer);
        assert!(other.next.contains("import --drop v"), "{other}");
        assert_eq!(other.exit_code, ExitCode::Precondition);
    }

    #[test]
    fn a_node_of_ours_has_a_name_that_the_server_takes() {
        let node_id = node_id("0123456789abcdef");
        assert!(node_id.starts_with(NODE_PREFIX) && node_id.ends_with("#0123456789abcdef"));
        assert!(node_id.bytes().all(|byte| byte.is_ascii_graphic()) && node_id.len() < 100);
    }
}
