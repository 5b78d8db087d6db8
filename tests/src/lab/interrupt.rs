//! Whether somebody asked the lab to stop (Ctrl-C, SIGTERM, SIGHUP).
//!
//! The handlers only set a flag; every wait in the lab looks at it at least ten times a second and leaves with
//! an error, so that destructors kill the virtual machine and remove its files on the way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Installs the handlers; called once, first thing.
pub(crate) fn install() -> Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // A second signal finds the flag set and ends the process at once: a way out of a stuck clean-up.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(flag))
            .context("installing a signal handler")?;
        signal_hook::flag::register(signal, Arc::clone(flag)).context("installing a signal handler")?;
    }
    Ok(())
}

/// Fails if a signal asked us to stop.
pub(crate) fn check() -> Result<()> {
    if INTERRUPTED.get().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
        bail!("interrupted");
    }
    Ok(())
}
