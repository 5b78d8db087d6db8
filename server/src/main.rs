//! volserver: the storage node's one process.
//!
//! Reads the options, starts the log and the runtime, and turns the outcome into one line on stderr and an exit code. All
//! else is in the library: `serve.rs` has the order of start and stop.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;
use server::config::Config;
use server::serve::{ServeError, serve};
use tracing_subscriber::EnvFilter;

/// Threads for blocking calls: each does one catalog commit or one fence at a time.
const BLOCKING_THREADS_MAX: usize = 64;
/// One is there from the start, and none goes: where the process may have no more threads, calls find one, and wait for it.
const BLOCKING_THREADS_KEPT: Duration = Duration::from_secs(365 * 24 * 3600);
/// Of tokio, for the management API.
const WORKERS: usize = 2;

fn main() -> ExitCode {
    let config = Config::parse();
    let exit_code = match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            daemon_log::say(&format!("volserver: {error:#}"));
            ExitCode::from(error.downcast_ref::<ServeError>().map_or(1, ServeError::exit_code))
        }
    };
    daemon_log::finish();
    exit_code
}

fn run(config: Config) -> anyhow::Result<()> {
    start_log(&config.log)?;
    keep_secrets_out_of_core_dumps();
    daemon_log::try_threads(WORKERS + 1).context("cannot start the management API's threads")?;
    // The management API is light work; the cores belong to the data side.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_keep_alive(BLOCKING_THREADS_KEPT)
        .thread_name("management")
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.spawn_blocking(|| ());
    let outcome = runtime.block_on(serve(config));
    // What did not end in time was reported; it must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(outcome?)
}

/// Secrets of attachments and private keys are in this process's memory.
fn keep_secrets_out_of_core_dumps() {
    let behavior = rustix::process::DumpableBehavior::NotDumpable;
    if let Err(error) = rustix::process::set_dumpable_behavior(behavior) {
        tracing::warn!(%error, "cannot switch off core dumps: one of this process would hold secrets");
    }
}

fn start_log(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("--log {filter:?}"))?;
    daemon_log::start(filter);
    daemon_log::start_writer().context("cannot start a thread for the log")
}
