//! A thread for what a ring may not wait for and io_uring cannot do: one for each volume that has such work, from its first on.
//!
//! Owns the thread. Never: knows what the work is. Called by `file.rs`. Invariant: what is handed over is run, or dropped if there can be no
//! thread; the thread ends when this is dropped and all was run.

use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use tracing::warn;

/// What is to be done.
pub(super) type Work = Box<dyn FnOnce() + Send>;

/// The thread, once there is one.
#[derive(Debug, Default)]
pub(super) struct Background(OnceLock<Option<Sender<Work>>>);

impl Background {
    /// Has it done, behind what was handed over before.
    pub(super) fn run(&self, work: Work) {
        if let Some(sender) = self.0.get_or_init(start) {
            // The thread ends only after this sender.
            let _ = sender.send(work);
        }
    }
}

fn start() -> Option<Sender<Work>> {
    let (sender, works) = channel::<Work>();
    let spawned = std::thread::Builder::new().name("discards".into()).spawn(move || {
        for work in works {
            work();
        }
    });
    let spawned =
        spawned.inspect_err(|error| warn!(%error, "cannot start a thread; {}", daemon_log::THREAD_LIMITS));
    spawned.ok().map(|_| sender)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn what_is_handed_over_is_done_in_order_and_to_the_end() {
        let (done, all) = channel();
        let background = Background::default();
        for number in 0..3 {
            let done = done.clone();
            background.run(Box::new(move || done.send(number).unwrap()));
        }
        drop((background, done));
        assert_eq!(all.iter().collect::<Vec<_>>(), [0, 1, 2]);
    }
}
