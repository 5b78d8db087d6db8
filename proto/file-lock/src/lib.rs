//! A lock on a file that one process is to have alone: of a data directory, of a daemon's folder, of the journal of a copy.
//!
//! Owns: how long somebody else may have it before that is believed. The kernel drops the lock with the last descriptor of the open file,
//! and a program that a thread is just starting has copies of all descriptors until it is executed: so a lock that was dropped a moment
//! ago may still be there. Never: locks of volumes' files, which are waited for in another way (`server/src/backend/file.rs`). Called by
//! both daemons and `volctl`.

use std::fs::File;
use std::io;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// Takes the lock; false where somebody else has it, and still has after a second.
///
/// # Errors
/// The file system's own.
pub fn lock_alone(file: &File) -> io::Result<bool> {
    for attempt in 1..=TRIES {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if attempt == TRIES => {}
            Err(Errno::WOULDBLOCK) => std::thread::sleep(PAUSE),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(false)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test that cannot go on has failed.
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_lock_that_goes_in_a_moment_is_waited_for_and_one_that_stays_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let former = File::create(&path).unwrap();
        assert!(lock_alone(&former).unwrap());
        let next = File::open(&path).unwrap();
        let begun = Instant::now();
        assert!(!lock_alone(&next).unwrap());
        assert!(begun.elapsed() >= PAUSE * (TRIES - 1));
        // As of a program that is being started.
        let copy = former.try_clone().unwrap();
        drop(former);
        let executed = std::thread::spawn(move || {
            std::thread::sleep(PAUSE * 5);
            drop(copy);
        });
        assert!(lock_alone(&next).unwrap());
        executed.join().unwrap();
    }
}
