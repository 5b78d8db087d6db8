//! The ring threads: completions in, submissions out.
//!
//! - [`run`]: one thread, its connections and its passes.
//! - [`session_io`]: moves bytes between one socket, its session and its volume; [`in_flight`]: what a request holds.
//! - [`ring`]: every operation that is submitted, and what each is for.
//! - [`throttle`], [`timers`]: who waits for its turn under a volume's limits, and until when.
//! - [`buffers`], [`page_pipes`]: where payloads are; [`sync_groups`]: who waits for which sync.

pub mod buffers;
pub mod in_flight;
pub mod page_pipes;
pub mod ring;
pub mod run;
pub mod session_io;
pub mod sync_groups;
pub mod throttle;
pub mod timers;
