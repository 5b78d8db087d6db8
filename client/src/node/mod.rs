//! The node daemon, `volclient serve`: the node API on a Unix socket, over one device process for each attachment.
//!
//! - [`holders`]: who has a block device open.

pub mod holders;
