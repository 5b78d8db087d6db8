//! The gate: who gets which volume. One thread that everything slow about opening an export happens on or behind.
//!
//! `core.rs` decides, with `opening.rs`, `fencing.rs`, `retiring.rs` and `copying.rs`, and has no I/O; `run.rs` is the thread that does what it
//! says, and `opener.rs` what takes longer. `messages.rs` is what others tell that thread, `events.rs` what passes between it and
//! the core, `answers.rs` what the control side is answered.

mod answers;
mod copying;
mod core;
mod events;
pub mod fence;
mod fencing;
mod marking;
mod messages;
mod opener;
mod opening;
mod retiring;
mod run;
#[cfg(test)]
mod tests;

pub use self::core::{Bounds, Core};
pub use answers::{FenceError, VolumeBusy};
pub use events::{
    AfterLoss, Asked, CallId, CatalogFailed, Claim, Found, Granted, Input, NamedVolume, NotCopied, NotServed,
    Output,
};
pub use messages::{GateMessage, OpenError};
pub use run::Gate;
