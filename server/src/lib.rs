//! The storage node of volnode: volumes, the NBD sessions that serve them, and the API that manages them.
//!
//! - [`catalog`]: what volumes and attachments there are, durable in SQLite.
//! - [`lifecycle`]: the order of steps in which they are made and ended.
//! - [`management`]: the gRPC API over it.
//!
//! Control (catalog, management API, on tokio) and data (sessions and volumes, on one ring thread for each core) meet only
//! where the catalog is asked about a connection that opens, and where the management side has an attachment fenced.

pub mod catalog;
pub mod lifecycle;
pub mod management;
mod status;
