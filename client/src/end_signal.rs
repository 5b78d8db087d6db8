//! SIGTERM and SIGINT, by which a daemon is told to end.

use tokio::signal::unix::{SignalKind, signal};

/// Returns once one of them has come.
pub(crate) async fn ended_by_signal() {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers, the signals' own effect ends the process.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
