//! The storage node of volnode: volumes, the NBD sessions that serve them, and the API that manages them.
//!
//! - [`catalog`]: what volumes and attachments there are, durable in SQLite.
//! - [`lifecycle`]: the order of steps in which they are made and ended.
//! - [`management`]: the gRPC API over it; [`advertised`] says which addresses it tells.
//! - [`data`]: the data side: connections, the gate, NBD sessions, and the rings that carry them.
//! - [`volume`]: a volume that is served, and one request's way through it; [`backend`]: where its bytes are.
//! - [`limits`], [`machine_memory`], [`descriptors`]: every bound, how much memory there is, and of open files.
//! - [`tls`]: handshakes, and what a certificate allows; [`config`]: options; [`serve`]: the program.
//!
//! Control (catalog, management API, on tokio) and data (sessions and volumes, on one ring thread for each core) meet only
//! where the catalog is asked about a connection that opens, and where the management side has an attachment fenced.

pub mod advertised;
pub mod backend;
mod buffer_classes;
pub mod catalog;
pub mod config;
pub mod data;
mod data_side;
pub mod descriptors;
pub mod ids;
pub mod lifecycle;
pub mod limits;
pub mod machine_memory;
pub mod management;
mod region;
pub mod scope;
pub mod serve;
mod status;
pub mod tls;
pub mod volume;
