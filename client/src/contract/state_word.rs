//! The words for the states of a disk: of the node API, in what a node tells the server, and in CSI's health.
//!
//! Owns: them alone.

use proto::v1;

/// `starting`, `live`, `stalled`, `failed`, `stopping` or `dead`.
pub fn state_word(state: v1::DeviceState) -> &'static str {
    match state {
        v1::DeviceState::Unspecified => "unknown",
        v1::DeviceState::Starting => "starting",
        v1::DeviceState::Live => "live",
        v1::DeviceState::Stalled => "stalled",
        v1::DeviceState::Failed => "failed",
        v1::DeviceState::Stopping => "stopping",
        v1::DeviceState::Dead => "dead",
    }
}
