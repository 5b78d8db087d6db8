//! The gate: who gets which volume. See `run.rs` for its thread.

mod answers;
mod fencing;
mod messages;
mod opener;
mod opening;
mod run;
#[cfg(test)]
mod tests;

pub use answers::{FenceError, VolumeBusy};
pub use messages::{GateMessage, OpenError};
pub use run::Gate;
