//! TLS below the NBD protocol, for both sides: certificates, the handshake on a blocking socket, and afterwards the
//! records, which the kernel does where it can (kTLS) and a relay in user space where it cannot.
//!
//! - [`certificates`]: the files an administrator names, and the rustls configurations made of them.
//! - [`explain`]: what a handshake failed for, in words that say what to change.
//! - [`stream`]: a connection from the handshake until its records are handed over.
//! - [`kernel`]: kTLS: what this kernel can do, the hand-over of keys, and records that are not data.
//! - [`relay`]: a socket pair whose far end is copied through rustls, so that a ring still sees a plain stream socket.
//!
//! - `test_authority` (a feature): certificates for tests.
//!
//! Called by the server (`server/src/tls`) and the client's device process. Never knows NBD. rustls has the protocol and
//! `ring` the ciphers; there is no cryptography here.

pub mod certificates;
pub mod explain;
pub mod kernel;
pub mod relay;
pub mod stream;
#[cfg(feature = "test-authority")]
pub mod test_authority;
