//! One hardware queue of the device: from the kernel's request to the socket and back.
//!
//! Reading path: [`run`] (the thread) → [`core`] (the rules) → [`block_request`] (ublk's words become NBD's) → [`requests`] (how far each
//! is) → [`connection`] (NBD, without I/O) → [`stream`] (how far its bytes got) → [`ring`] (the operations, without decisions) →
//! [`payload`] and `staging` (where the data lies). Beside it: [`link`] (are the connections there, and why not), [`balance`] (which
//! connection), [`quiet`] (does anything come?), [`unflushed`] (what could be forgotten) with `begun_after` (which losses a FLUSH
//! tells of), [`parts`] (what the main thread gives and hears). [`io`] is what the rules have done for them.

pub mod balance;
mod begun_after;
pub mod block_request;
pub mod by_reference;
pub mod connection;
pub mod core;
pub mod io;
pub mod link;
pub mod operation;
pub mod parts;
pub mod payload;
pub mod quiet;
pub mod requests;
mod restricted_ring;
pub mod ring;
pub mod run;
mod staging;
pub mod stream;
pub mod unflushed;
