//! The data side: who may connect, who is served, and what the bytes mean.
//!
//! - [`server`]: starts it and ends it; [`config`] is what it is started with.
//! - [`acceptor`], [`address`], [`admission`], [`socket_memory`]: connections as they come, and how many there may be.
//! - [`copies`]: snapshots and clones that are being made; [`maps`]: what is compared.
//! - [`gate`]: who may open which export, and who is fenced.
//! - [`session`]: NBD, without I/O; [`block_status`]: extents, on a thread that may wait; [`dirty_bitmaps`]: those that changed.
//! - [`io`]: the ring threads that move the bytes; [`mailbox`]: how other threads reach them.

pub mod acceptor;
pub mod address;
pub mod admission;
pub mod block_status;
pub mod config;
pub mod copies;
pub mod dirty_bitmaps;
pub mod gate;
pub mod io;
pub mod mailbox;
pub mod maps;
pub mod server;
pub mod session;
pub mod socket_memory;
