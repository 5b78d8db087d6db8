//! What the gate answers to the control side when it is no plain yes.

use std::time::Duration;

use uuid::Uuid;

/// Why connections are not known to be gone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FenceError {
    /// Their submitted I/O has not finished in time; the call may be repeated, and they stay refused meanwhile.
    #[error("their I/O has not finished within {0:?}")]
    NotDrained(Duration),
    /// The catalog cannot be read.
    #[error("the catalog failed: {0}")]
    Catalog(String),
    /// The data side is shutting down, or its gate does not answer.
    #[error("the data side does not answer")]
    NoAnswer,
}

/// A volume that somebody has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("volume {volume_uid} is open on {connections} connections")]
pub struct VolumeBusy {
    /// Which.
    pub volume_uid: Uuid,
    /// On how many connections; 0 while it is being opened.
    pub connections: u32,
}
