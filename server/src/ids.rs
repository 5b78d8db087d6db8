//! Names of things that several parts of the server speak of.

/// A connection's identity, unique in the life of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// Which in-flight request of a connection: an index below [`crate::limits::IN_FLIGHT_REQUESTS_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestSlot(pub u8);
