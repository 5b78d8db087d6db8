//! Images: their bytes are copied into volumes and out of them, over NBD and without a block device.
//!
//! - [`plan`]: what is copied next and how far everything is copied; [`content`]: digests and zeroes. Neither does I/O.
//! - [`copy`]: the loop that does what the plan says; [`journal`]: how far a copy was durable, for the next run; [`own_file`]: where that
//!   and an image that is not whole yet may be.
//! - [`store`]: what is read and written, a file or an export, or what comes through a pipe ([`input_stream`]); [`nbd`]: a client that has many requests on their way.
//! - [`mod@format`]: what a file looks like; [`partition_table`]: for which sector size it was made.
//! - [`changes`]: where an image differs from its base; [`overlay`]: a base with such an image above it; [`qcow2_header`]: what an image
//!   says of its base.
//! - [`qemu`]: formats other than raw, by qemu-nbd; [`sandbox`]: what that may do.
//!
//! Used by volctl. Knows nothing of volumes, nor of the management API.

pub mod changes;
pub mod content;
pub mod copy;
pub mod format;
pub mod input_stream;
pub mod journal;
pub mod nbd;
pub mod overlay;
pub mod own_file;
pub mod partition_table;
pub mod plan;
pub mod qcow2_header;
pub mod qemu;
pub mod sandbox;
pub mod store;

/// Images are copied, and their digests taken, in chunks of so many bytes: a read that is no burden anywhere, and enough for a network
/// to be busy with few of them.
pub const CHUNK_BYTES: u64 = 1 << 20;
