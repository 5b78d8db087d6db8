//! What keeps a device process from needing its own disk: set before any thread starts, and checked.
//!
//! A process that serves a disk must never wait for that disk, not even through the kernel: writing back dirty pages
//! to make memory free may need the very device this process serves. Hence `PR_SET_IO_FLUSHER` (allocations in the
//! kernel do no I/O), memory locked as it is touched (nothing of ours is paged out), and an OOM score that spares us.
//! Sources: prctl(2), mlock(2), proc(5).
#![allow(unsafe_code)] // prctl, for which there is no safe binding.

use std::io;

use rustix::mm::MlockAllFlags;

/// `PR_SET_IO_FLUSHER` and `PR_GET_IO_FLUSHER` of `include/uapi/linux/prctl.h`, Linux 5.6; not in the libc crate.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
const PR_GET_IO_FLUSHER: libc::c_int = 58;
/// The score that the OOM killer never picks.
const OOM_SCORE_NEVER: &str = "-1000";
const OOM_SCORE_PATH: &str = "/proc/self/oom_score_adj";

/// Why the process is not safe to serve a disk.
#[derive(Debug, thiserror::Error)]
pub enum ProtectionError {
    /// `PR_SET_IO_FLUSHER` was refused or had no effect: CAP_SYS_RESOURCE is missing.
    #[error("cannot become an I/O flusher (PR_SET_IO_FLUSHER; needs root or CAP_SYS_RESOURCE): {0}")]
    IoFlusher(io::Error),
    /// Memory cannot be locked.
    #[error("cannot lock memory (mlockall; needs root, CAP_IPC_LOCK or a higher RLIMIT_MEMLOCK): {0}")]
    LockMemory(io::Error),
    /// The OOM score cannot be set or did not stay.
    #[error("cannot set the OOM score ({OOM_SCORE_PATH}; needs root or CAP_SYS_RESOURCE): {0}")]
    OomScore(io::Error),
}

/// Protects this process; threads started afterwards inherit it.
///
/// # Errors
/// [`ProtectionError`], by cause. A process that could not be protected must not serve a disk.
pub fn protect_process() -> Result<(), ProtectionError> {
    set_io_flusher().map_err(ProtectionError::IoFlusher)?;
    // ONFAULT: otherwise every thread's whole stack would become resident.
    rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
        .map_err(|errno| ProtectionError::LockMemory(errno.into()))?;
    set_oom_score().map_err(ProtectionError::OomScore)
}

fn set_io_flusher() -> io::Result<()> {
    // SAFETY: this prctl takes integers and touches no memory of ours.
    let set = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let is_set = unsafe { libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) };
    if is_set == 1 { Ok(()) } else { Err(io::Error::other("it was set but is not in effect")) }
}

fn set_oom_score() -> io::Result<()> {
    std::fs::write(OOM_SCORE_PATH, OOM_SCORE_NEVER)?;
    let kept = std::fs::read_to_string(OOM_SCORE_PATH)?;
    if kept.trim() == OOM_SCORE_NEVER {
        Ok(())
    } else {
        Err(io::Error::other(format!("it is {}", kept.trim())))
    }
}
