//! The storage node of volnode: volumes, the NBD sessions that serve them, and the API that manages them.
//!
//! - [`catalog`]: what volumes and attachments there are, durable in SQLite.
//! - [`lifecycle`]: the order of steps in which they are made and ended.
//! - [`management`]: the gRPC API over it.
//! - [`data_server`]: the data side: [`io_loop`] and [`connection`] move bytes, [`session`] speaks NBD, [`volume`] and
//!   [`backend`] know what a request needs, [`gate`] decides who is served; [`admission`] and
//!   [`limits`] say how much, [`socket_memory`] of the kernel's, [`machine_memory`] of how much there is, [`descriptors`] of open files; [`ring`], [`buffers`],
//!   [`page_pipes`], [`sync_groups`] and [`mailbox`] carry it; [`tls`] has its handshakes.
//!
//! Control (catalog, management API, on tokio) and data (sessions and volumes, on one ring thread for each core) meet only
//! where the catalog is asked about a connection that opens, and where the management side has an attachment fenced.

pub mod acceptor;
pub mod admission;
pub mod advertised;
pub mod backend;
pub mod block_status;
pub mod buffers;
pub mod catalog;
pub mod config;
pub mod connection;
pub mod data_address;
pub mod data_config;
pub mod data_server;
mod data_side;
pub mod descriptors;
pub mod gate;
pub mod ids;
pub mod in_flight;
pub mod incarnation;
pub mod io_loop;
pub mod lifecycle;
pub mod limits;
pub mod machine_memory;
pub mod mailbox;
pub mod management;
pub mod page_pipes;
pub mod ring;
pub mod serve;
pub mod session;
pub mod socket_memory;
mod status;
pub mod sync_groups;
pub mod tls;
pub mod volume;
