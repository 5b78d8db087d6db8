//! What is mounted, as the kernel tells it.
//!
//! Owns: reading `mountinfo`, of which every mount point, source and label may hold any byte. Never: keeps anything; the file is read
//! anew for each question. Called by: `mounts`.
//! Source: proc_pid_mountinfo(5), proc_pid_fdinfo(5).

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// Of the calling thread: its mount namespace is the one in which it mounts.
const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// What the kernel tells of this thread's descriptors.
const FDINFO: &str = "/proc/thread-self/fdinfo";

/// Options of a file system that lets nobody write. An ext4 that found itself damaged is `emergency_ro` since Linux 6.15, and `ro` before;
/// one that was shut down says so (fs/ext4/super.c).
const NO_WRITES: [&[u8]; 3] = [b"ro", b"emergency_ro", b"shutdown"];

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Of all mounts that there are now it is the only one with it.
    pub mount_id: u64,
    /// Device number of the file system, major and minor.
    pub device: (u32, u32),
    /// What of the file system is seen at the mount point.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// Whether the mount is read-only.
    pub is_read_only: bool,
    /// Whether the file system lets nobody write, whatever the mount says.
    pub is_file_system_read_only: bool,
    /// The kernel's name of the file system.
    pub fs_type: String,
    /// Whether what is mounted below it is seen in other mount namespaces as well: its propagation is `shared`.
    pub is_shared: bool,
}

/// All mounts of this thread's namespace.
///
/// # Errors
/// The system's. `InvalidData`: a line cannot be read, which is no reason to take a mount for gone.
pub fn read() -> io::Result<Vec<MountEntry>> {
    parse(&std::fs::read(MOUNTINFO)?)
}

/// The mounts at this path, in the kernel's order, which says nothing of which one is the uppermost.
///
/// # Errors
/// As for [`read`].
pub fn at(path: &Path) -> io::Result<Vec<MountEntry>> {
    let mut entries = read()?;
    entries.retain(|entry| entry.mount_point == path);
    Ok(entries)
}

/// The id of the mount that an open file or directory is on; it may be open by its path alone. The file system is not asked: one that
/// does not answer, or answers with errors alone, has mounts that are to be unmounted all the same.
///
/// # Errors
/// The system's. `InvalidData`: the kernel tells no id.
pub fn mount_id(descriptor: impl AsFd) -> io::Result<u64> {
    let told = std::fs::read_to_string(format!("{FDINFO}/{}", descriptor.as_fd().as_raw_fd()))?;
    let id = told.lines().find_map(|line| line.strip_prefix("mnt_id:")).and_then(|id| id.trim().parse().ok());
    id.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{FDINFO}: no mnt_id")))
}

/// The mount that an open file or directory is on.
///
/// # Errors
/// As for [`read`] and [`mount_id`]; `NotFound`: it is no mount of this thread's namespace.
pub fn containing(descriptor: impl AsFd) -> io::Result<MountEntry> {
    let id = mount_id(descriptor)?;
    let found = read()?.into_iter().find(|entry| entry.mount_id == id);
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn parse(text: &[u8]) -> io::Result<Vec<MountEntry>> {
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let entry = |line: &[u8]| {
        let shown =
            || io::Error::new(io::ErrorKind::InvalidData, format!("{MOUNTINFO}: {}", line.escape_ascii()));
        parse_line(line).ok_or_else(shown)
    };
    lines.map(entry).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime shared:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let text = |at: usize| std::str::from_utf8(fields.get(at)?).ok();
    let (major, minor) = text(2)?.split_once(':')?;
    // After optional fields, any number of them.
    let dash = 6 + fields.get(6..)?.iter().position(|field| *field == b"-")?;
    let is_shared = fields.get(6..dash)?.iter().any(|field| field.starts_with(b"shared:"));
    let has = |options: &[u8], wanted: &[&[u8]]| {
        options.split(|byte| *byte == b',').any(|option| wanted.contains(&option))
    };
    Some(MountEntry {
        mount_id: text(0)?.parse().ok()?,
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: unescape(fields.get(3)?),
        mount_point: unescape(fields.get(4)?),
        is_read_only: has(fields.get(5)?, &[b"ro"]),
        is_file_system_read_only: has(fields.get(dash + 3)?, &NO_WRITES),
        // A user may mount by FUSE, and calls that what they like: no reason to know nothing of all other mounts.
        fs_type: String::from_utf8_lossy(fields.get(dash + 1)?).into_owned(),
        is_shared,
    })
}

/// Undoes the kernel's escapes of white space, backslash and number sign: three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.filter(|_| *byte == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        (bytes, rest) = match code {
            Some(code) => ([&bytes[..], &[code]].concat(), &after[3..]),
            None => ([&bytes[..], &[*byte]].concat(), after),
        };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    #[test]
    fn a_line_is_read_whatever_its_names_hold() {
        let text = b"36 35 259:3 /a\\040b /mnt/\\134x\\012\xff rw,noatime shared:1 master:2 - ext4 /dev/ublkb0 ro,seclabel\n\
                     37 36 0:44 / /mnt ro - tmpfs a\\040-\\040b rw\n\
                     38 36 0:45 / /home/x rw - fuse.\xff x rw\n";
        let entries = parse(text).unwrap();
        assert_eq!((entries.len(), entries[2].mount_id), (3, 38));
        let first = &entries[0];
        assert_eq!((first.mount_id, first.device, first.fs_type.as_str()), (36, (259, 3), "ext4"));
        assert_eq!(first.root, Path::new("/a b"));
        assert_eq!(first.mount_point, Path::new(OsStr::from_bytes(b"/mnt/\\x\n\xff")));
        assert!(!first.is_read_only && first.is_file_system_read_only);
        assert_eq!(entries.iter().map(|entry| entry.is_shared).collect::<Vec<_>>(), [true, false, false]);
        assert!(entries[1].is_read_only && !entries[1].is_file_system_read_only);
    }

    #[test]
    fn a_file_system_that_gave_up_is_read_only_in_whichever_words() {
        for (options, expected) in [
            ("rw,errors=remount-ro", false),
            ("ro,errors=remount-ro", true),
            ("rw,errors=remount-ro,emergency_ro", true),
            ("rw,shutdown,data=ordered", true),
            ("rw,seclabel", false),
        ] {
            let line = format!("36 35 259:3 / /mnt rw,noatime - ext4 /dev/ublkb0 {options}");
            let entry = &parse(line.as_bytes()).unwrap()[0];
            assert_eq!((entry.is_file_system_read_only, entry.is_read_only), (expected, false), "{options}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_not_nothing() {
        for wrong in [
            "x",
            "36 35 259:3 / /mnt rw - ext4",
            "36 35 2593 / /mnt rw - ext4 /dev/x rw",
            "36 35 1:2 / /mnt rw ext4 /dev/x rw",
        ] {
            assert_eq!(parse(wrong.as_bytes()).unwrap_err().kind(), io::ErrorKind::InvalidData, "{wrong}");
        }
    }

    #[test]
    fn what_is_mounted_here_is_found() {
        // Where this file is; a root that was changed into is no mount.
        assert!(at(Path::new("/proc")).unwrap().last().is_some_and(|mount| mount.fs_type == "proc"));
        assert_eq!(at(Path::new("/no/such/mount")).unwrap(), []);
        let proc = containing(std::fs::File::open("/proc/self").unwrap()).unwrap();
        assert_eq!((proc.fs_type.as_str(), proc.mount_point.as_path()), ("proc", Path::new("/proc")));
        let by_path_alone = rustix::fs::OFlags::PATH;
        let by_path = rustix::fs::open("/proc/self", by_path_alone, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(mount_id(by_path).unwrap(), proc.mount_id);
    }
}
