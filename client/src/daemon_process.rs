//! How a daemon's process begins and ends, before and after it does anything: its log, and no core dump of its secrets.
//!
//! Never: reads a command line. Called by the `main` of `volclient` and `volcsi`.

use std::process::ExitCode;

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

use crate::causes::with_sources;

/// Begins the log with the filter that `--log` gave, and keeps the process, which has secrets in its memory, out of core dumps.
///
/// # Errors
/// The filter is none.
pub fn begin(log: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(log).with_context(|| format!("--log {log:?}"))?;
    daemon_log::start(filter);
    let behavior = rustix::process::DumpableBehavior::NotDumpable;
    if let Err(error) = rustix::process::set_dumpable_behavior(behavior) {
        tracing::warn!(%error, "cannot switch off core dumps: one of this process would hold secrets");
    }
    Ok(())
}

/// Says why the program `name` failed, if it did, and lets the last lines be taken.
pub fn end(name: &str, outcome: anyhow::Result<()>) -> ExitCode {
    if let Err(error) = &outcome {
        daemon_log::say(&format!("{name}: {}", with_sources(error.as_ref())));
    }
    daemon_log::finish();
    outcome.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}
