//! How a device is made, for all of its processes, in the simulator's words and in the product's.

use std::time::Duration;

use client::contract::{DeviceSpec, Encryption, ExportSpec, SessionRecord, StallPolicy};
use client::device::queue::connection::Origin;
use client::device::queue::requests::Resend;
use proto::export_name::Secret;
use uuid::Uuid;

use crate::block_history::BLOCK_BYTES;

/// Where WRITEs' data is sent from: its pages, by operations that are linked, or copies, at once.
#[derive(Debug, Clone, Copy)]
pub(in crate::simulator) enum Origins {
    /// All from there.
    One(Origin),
    /// Some from here and some from there, as where the size decides.
    Both,
}

impl Origins {
    pub(super) fn of(self, tag: u16) -> Origin {
        match self {
            Self::One(origin) => origin,
            Self::Both if tag.is_multiple_of(2) => Origin::Pages,
            Self::Both => Origin::Staging,
        }
    }
}

/// How the connections are made, for all processes of a device.
#[derive(Debug, Clone)]
pub(in crate::simulator) struct Spec {
    pub(in crate::simulator) attachment_id: Uuid,
    pub(in crate::simulator) secret: Secret,
    pub(in crate::simulator) session_epoch: u64,
    pub(in crate::simulator) server_id: Uuid,
    pub(in crate::simulator) volume_uid: Uuid,
    pub(in crate::simulator) capacity_bytes: u64,
    pub(in crate::simulator) nr_queues: u16,
    pub(in crate::simulator) nr_connections: u16,
    pub(in crate::simulator) queue_depth: u16,
    pub(in crate::simulator) small_bytes_max: u32,
    /// Where WRITEs' data is sent from.
    pub(in crate::simulator) origins: Origins,
    pub(in crate::simulator) is_volatile_cache: bool,
    pub(in crate::simulator) policy: StallPolicy,
    /// The server is somebody else's, and tells nothing of itself.
    pub(in crate::simulator) is_foreign: bool,
}

/// As in the product (`client/src/device/attachment/links.rs`): how long replies may be due without a byte.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);
const REPLY_TIMEOUT_FOREIGN: Duration = Duration::from_secs(120);

impl Spec {
    /// As in the product: what becomes of requests on lost connections, and how long replies may be due.
    pub(super) fn ways(&self) -> (Resend, Duration) {
        match self.is_foreign {
            false => (Resend::Everything, REPLY_TIMEOUT),
            true => (Resend::ReadsOnly, REPLY_TIMEOUT_FOREIGN),
        }
    }

    /// The slots that a queue has.
    pub(super) fn slots_of(&self, queue_id: u16) -> impl Iterator<Item = u32> {
        (queue_id..self.nr_connections).step_by(usize::from(self.nr_queues)).map(u32::from)
    }

    /// As the product has it.
    pub(super) fn device_spec(&self) -> DeviceSpec {
        let export = match self.is_foreign {
            true => ExportSpec::Nbd { export_name: "disk".to_owned() },
            false => ExportSpec::Attachment {
                server_id: self.server_id,
                volume_uid: self.volume_uid,
                secret: self.secret.expose().to_owned(),
                session_epoch: self.session_epoch,
            },
        };
        DeviceSpec {
            addresses: vec!["simulated:1".to_owned()],
            nr_hw_queues: self.nr_queues,
            nr_connections: self.nr_connections,
            queue_depth: self.queue_depth,
            on_stall: self.policy,
            ..DeviceSpec::new(self.attachment_id, "vol".to_owned(), export, "vol".into())
        }
    }

    pub(super) fn session(&self) -> SessionRecord {
        SessionRecord {
            incarnation: String::new(),
            encryption: Encryption::None,
            export_bytes: self.capacity_bytes,
            export_flags: 0,
            export_block_bytes: None,
            capacity_bytes: self.capacity_bytes,
            block_size_bytes: BLOCK_BYTES as u32,
            max_io_bytes: BLOCK_BYTES as u32,
            volatile_cache: self.is_volatile_cache,
            read_only: false,
        }
    }
}
