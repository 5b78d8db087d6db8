//! What the product is measured against: block devices of the kernel's own network clients.
//!
//! Called by `subjects`. Owns how each peer is set up, with its defaults, one connection
//! or queue, and that it is taken down again. It measures nothing, and knows nothing of volnode:
//! the kernel's NBD client takes any server's address.

mod kernel_nbd;
mod nvme_tcp;

pub(crate) use kernel_nbd::{KernelNbd, Nbdkit};
pub(crate) use nvme_tcp::{NvmeTcp, NvmeTcpTarget};
