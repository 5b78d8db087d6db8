//! Another program has the catalog's lock, such as `sqlite3` with a transaction that was begun and not ended: how long that is waited
//! for, and which program it is.
//!
//! Owns the busy handler of the connection. The first call that meets the lock waits for what lasts seconds, such as a backup; those
//! that come while it was given up a moment ago wait next to nothing, so that they do not queue up behind one another: each of them
//! keeps the others from the catalog, and the gate is among them.
//! Called by [`super::Catalog`].

use std::cell::Cell;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// The first wait.
const PATIENCE: Duration = Duration::from_secs(5);
/// The waits of those that come when it was given up not long ago.
const SHORT_PATIENCE: Duration = Duration::from_millis(100);
const NOT_LONG: Duration = Duration::from_secs(10);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(10);

/// When a wait was given up last, in this process.
static GIVEN_UP: Mutex<Option<Instant>> = Mutex::new(None);

thread_local! {
    /// Until when the call of this thread waits.
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// How long a call waits for the lock, if the last wait was given up so long ago.
fn patience(given_up_for: Option<Duration>) -> Duration {
    match given_up_for {
        Some(given_up_for) if given_up_for < NOT_LONG => SHORT_PATIENCE,
        _ => PATIENCE,
    }
}

/// The busy handler: whether to try again, of a call that was refused the lock so often.
pub(super) fn wait(times_refused: i32) -> bool {
    let now = Instant::now();
    let mut given_up = GIVEN_UP.lock().unwrap_or_else(PoisonError::into_inner);
    let deadline = match DEADLINE.get() {
        Some(deadline) if times_refused > 0 => deadline,
        _ => now + patience(given_up.map(|at| now.saturating_duration_since(at))),
    };
    DEADLINE.set(Some(deadline));
    if now >= deadline {
        *given_up = Some(now);
        return false;
    }
    drop(given_up);
    std::thread::sleep(PAUSE);
    true
}

/// Which other process has a lock for writing on the database, as a text to be put behind "another program"; empty: it is not known.
pub(super) fn holder(database: &Path) -> String {
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let files = ["", "-wal", "-shm"].into_iter().filter_map(|suffix| {
        let mut path = database.as_os_str().to_owned();
        path.push(suffix);
        FileId::of(&path.into())
    });
    let files: Vec<FileId> = files.collect();
    let own = std::process::id();
    let is_holder =
        |writer: &Writer| writer.pid != own && (writer.is_certain || has_open(writer.pid, &files));
    let Some(Writer { pid, .. }) = writers(&locks, &files).find(is_holder) else { return String::new() };
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    match name.trim() {
        "" => format!(" (pid {pid})"),
        name => format!(" ({name}, pid {pid})"),
    }
}

/// Which file it is, as stat(2) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(path: &PathBuf) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self { device: metadata.dev(), inode: metadata.ino() })
    }
}

/// A process with a lock for writing.
#[derive(Debug, PartialEq, Eq)]
struct Writer {
    pid: u32,
    /// It is on one of the files; else on one with such an inode number.
    is_certain: bool,
}

/// The processes that have POSIX locks for writing on one of the files, by /proc/locks. Some file systems (btrfs, overlayfs) have
/// another device there than stat(2) tells; then only the inode's number is the same.
fn writers<'a>(locks: &'a str, files: &'a [FileId]) -> impl Iterator<Item = Writer> + 'a {
    locks.lines().filter_map(|line| {
        // "12: POSIX  ADVISORY  WRITE 4711 fe:00:123456 120 120"; who waits for one has "->" behind the number.
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "POSIX", _, "WRITE", pid, file, ..] = fields[..] else { return None };
        let (device, inode) = file.rsplit_once(':')?;
        let inode: u64 = inode.parse().ok()?;
        let mut same_inode = files.iter().filter(|id| id.inode == inode).peekable();
        same_inode.peek()?;
        let is_certain = same_inode.any(|id| {
            device == format!("{:02x}:{:02x}", rustix::fs::major(id.device), rustix::fs::minor(id.device))
        });
        Some(Writer { pid: pid.parse().ok()?, is_certain })
    })
}

/// Whether the process has one of the files open, as far as this one may see that.
fn has_open(pid: u32, files: &[FileId]) -> bool {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors.flatten().any(|entry| FileId::of(&entry.path()).is_some_and(|id| files.contains(&id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_waits_and_those_behind_it_do_not_queue_up() {
        assert_eq!(patience(None), PATIENCE);
        assert_eq!(patience(Some(Duration::ZERO)), SHORT_PATIENCE);
        assert_eq!(patience(Some(NOT_LONG)), PATIENCE);
    }

    #[test]
    fn only_who_has_a_lock_for_writing_on_the_files_is_named() {
        let locks = "1: FLOCK  ADVISORY  WRITE 1 fe:00:7 0 EOF\n\
            2: POSIX  ADVISORY  READ 2 fe:00:7 128 128\n\
            3: POSIX  ADVISORY  WRITE 3 fe:00:77 120 120\n\
            4: POSIX  ADVISORY  WRITE 4 fe:00:7 120 120\n\
            4: -> POSIX  ADVISORY  WRITE 5 fe:00:7 120 120\n\
            5: POSIX  ADVISORY  WRITE -1 fe:00:7 120 120\n";
        let file = |major, minor| FileId { device: rustix::fs::makedev(major, minor), inode: 7 };
        let named = |file| -> Vec<(u32, bool)> {
            writers(locks, &[file]).map(|writer| (writer.pid, writer.is_certain)).collect()
        };
        assert_eq!(named(file(0xfe, 0)), [(4, true)]);
        // As on btrfs: it has to be looked at.
        assert_eq!(named(file(0, 0x2a)), [(4, false)]);
        assert_eq!(named(FileId { inode: 8, ..file(0xfe, 0) }), []);
        assert_eq!(writers("nothing of the kind\n", &[]).count(), 0);
    }

    #[test]
    fn a_process_has_a_file_open_until_it_closes_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let id = FileId::of(&file.path().to_owned()).unwrap();
        assert!(has_open(std::process::id(), &[id]));
        let (open, path) = file.into_parts();
        drop(open);
        assert!(!has_open(std::process::id(), &[id]));
        assert!(!has_open(u32::MAX, &[id]));
        drop(path);
    }
}
