//! The contracts of volnode, and nothing that does I/O.
//!
//! - [`v1`]: the gRPC API (`volnode/v1/*.proto`): management of a storage server, and of a client machine.
//! - [`csi`]: the Container Storage Interface, and kubelet's plugin registration.
//! - [`nbd`]: the NBD wire protocol: codec, request validation, and the handshake of both sides as state machines that
//!   take bytes and give bytes.
//! - [`error_reason`]: the stable reasons that gRPC errors carry.
//! - [`label`]: what a label of a volume or node may be.
//! - [`passphrase`]: of encrypted volumes: how large their header is, and a message that shows nothing of what it carries.
//! - [`volume_name`]: names of volumes that look like those of partitions.
//! - [`export_name`]: the name under which an attachment's export is opened; it carries identity, secret, epoch and slot.
//!
//! Never here: sockets, clocks, unsafe code.

pub mod csi;
pub mod error_reason;
pub mod export_name;
pub mod label;
pub mod nbd;
pub mod passphrase;
pub mod volume_name;

/// The gRPC API `volnode.v1`, generated from `proto/volnode/v1/*.proto`.
pub mod v1 {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::too_many_lines)]
    tonic::include_proto!("volnode.v1");

    /// The compiled descriptors, for gRPC reflection (`google.protobuf.FileDescriptorSet`).
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/volnode.v1.bin"));
}
