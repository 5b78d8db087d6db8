//! SIGTERM and SIGINT, by which a daemon is told to end.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals, taken: they no longer end the process by themselves.
#[derive(Debug)]
pub(crate) struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    /// Takes them; what comes from now on is not lost, whenever it is waited for.
    ///
    /// Within a tokio runtime.
    pub(crate) fn take() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Returns once one of them has come.
    pub(crate) async fn come(mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Returns once one of them has come; taken only now.
pub(crate) async fn ended_by_signal() {
    match EndSignals::take() {
        Ok(signals) => signals.come().await,
        // Without handlers, the signals' own effect ends the process.
        Err(_) => std::future::pending().await,
    }
}
