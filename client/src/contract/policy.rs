//! What I/O does while a disk's server cannot be reached.

use serde::{Deserialize, Serialize};

/// What requests do while there is no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StallPolicy {
    /// They wait, however long it takes.
    #[default]
    Wait,
    /// They fail with EIO once an outage has lasted this long, and work again when the server is back.
    FailAfterMs(u64),
}
