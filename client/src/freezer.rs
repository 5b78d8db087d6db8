//! Holds one mounted file system frozen, as a process of its own; and thaws what another one left.
//!
//! ```text
//!   node daemon ──▶ volclient hold-frozen ID MOUNT…            node daemon ──▶ volclient thaw ID MOUNT…
//!
//!   syncfs ─▶ "ready" ─ stdin: a byte ─▶ FIFREEZE ─▶ "frozen" ─ stdin: a byte, its end, or 10 s ─▶ FITHAW ─▶ "thawed", or why not
//! ```
//! A freeze waits for everything that is being written, and a thaw may write, too: on a disk whose server is lost both wait in
//! uninterruptible sleep. So it is no thread of the daemon's, which could not end then. And what holds the file system frozen ends with
//! the daemon, however that ends: it reads the end of its stdin, and thaws.
//!
//! Invariants: a file system is frozen for [`HOLD_MAX`] at most, unless this process is killed; signals that ask it to end do not.
//! Nothing is written while it is frozen, but to the pipe. The mount is the one that was looked up, not one that has taken its place.
//! Called by: `node/freeze`; `volclient hold-frozen` and `volclient thaw` are the process.
//! Source: fs/ioctl.c `ioctl_fsfreeze`, fs/super.c `freeze_super`, Linux 7.3.

#![allow(unsafe_code)] // Two ioctls that take no argument.

use std::collections::BTreeSet;
use std::ffi::c_int;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, ioctl, opcode};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

/// The subcommand of `volclient` that holds a file system frozen.
pub const HOLD_SUBCOMMAND: &str = "hold-frozen";
/// The one that thaws what such a process left.
pub const THAW_SUBCOMMAND: &str = "thaw-left";
/// A file system is frozen for so long at most: who writes to it waits meanwhile. A snapshot's instant takes milliseconds.
pub const HOLD_MAX: Duration = Duration::from_secs(10);

/// Between two looks whether a former process is gone, which may have been about to freeze.
const GONE_INTERVAL: Duration = Duration::from_millis(100);

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)`; the kernel looks at no argument.
const FIFREEZE: Opcode = opcode::read_write::<c_int>(b'X', 119);
const FITHAW: Opcode = opcode::read_write::<c_int>(b'X', 120);

/// A mount, as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The mount's number in `mountinfo`: of all mounts that there are now it is the only one with it.
    pub mount_id: u64,
    /// The file system's device there, `259:3`.
    pub device: String,
    /// How it is reached from here: for another mount namespace through a process's `root`.
    pub path: PathBuf,
}

impl std::fmt::Display for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{},{},{}", self.mount_id, self.device, self.path.display())
    }
}

impl FromStr for Mount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.splitn(3, ',');
        let (Some(mount_id), Some(device), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(format!("{text:?} is not MOUNT_ID,DEVICE,PATH"));
        };
        let mount_id = mount_id.parse().map_err(|_| format!("{mount_id:?} is no number of a mount"))?;
        Ok(Self { mount_id, device: device.to_owned(), path: path.into() })
    }
}

/// What the process says, a line each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// What was dirty is written: a freeze will be short.
    Ready,
    /// It is frozen.
    Frozen,
    /// It was still frozen, and is no more.
    Thawed,
    /// It is not frozen by this process: why.
    NotFrozen(String),
}

/// Syncs, freezes when it is told to, and thaws; see the module's text.
///
/// # Errors
/// The pipes', or the signals' handlers.
pub fn hold_frozen(mounts: &[Mount]) -> io::Result<()> {
    // For as long as it lives, signals that ask a process to end do nothing here.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _entered = runtime.enter();
    let asked = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    let _asked = asked.into_iter().collect::<io::Result<Vec<_>>>()?;
    let file = match open_first(mounts) {
        Ok(file) => file,
        Err(why) => return say(&Word::NotFrozen(why)),
    };
    // Without it all that is dirty would be written while everybody waits.
    if let Err(errno) = rustix::fs::syncfs(&file) {
        return say(&Word::NotFrozen(format!("its sync failed: {errno}")));
    }
    say(&Word::Ready)?;
    // Nothing is frozen yet, so there is no hurry; the daemon has its deadlines.
    if !is_told(None)? {
        return Ok(());
    }
    if let Err(errno) = freeze(&file) {
        return say(&Word::NotFrozen(freeze_error(errno)));
    }
    let said = say(&Word::Frozen);
    let is_in_time = said.and_then(|()| is_told(Some(HOLD_MAX)));
    let thawed = thaw(&file);
    if let Err(errno) = thawed
        && errno != Errno::INVAL
    {
        // Without a word: another process is to try it again.
        return Err(io::Error::other(thaw_error(errno)));
    }
    say(&match (is_in_time, thawed) {
        (Ok(true), Ok(())) => Word::Thawed,
        (_, Err(errno)) => Word::NotFrozen(thaw_error(errno)),
        (_, Ok(())) => Word::NotFrozen(format!("it was thawed after {} s", HOLD_MAX.as_secs())),
    })
}

/// Thaws what a process left that was killed: at once, and again when those that may still have been about to freeze are gone. What is not
/// frozen, or not mounted anywhere any more, is a success.
///
/// `find` tells where the file system of a device is mounted now.
///
/// # Errors
/// It may still be frozen: why.
pub fn thaw_left(
    id: &str,
    pids: &[u32],
    mounts: &[Mount],
    find: impl Fn(&str) -> Vec<Mount>,
) -> io::Result<()> {
    loop {
        // Before the thaw: whoever is gone then freezes nothing any more.
        let is_last = !pids.iter().any(|pid| is_holder(*pid, id));
        let thawed = thaw_wherever(mounts, &find);
        if is_last {
            return thawed;
        }
        std::thread::sleep(GONE_INTERVAL);
    }
}

/// By the mounts that are known, or else by those that there are now: the process by which another namespace was reached may be gone.
fn thaw_wherever(mounts: &[Mount], find: &impl Fn(&str) -> Vec<Mount>) -> io::Result<()> {
    let file = match open_first(mounts) {
        Ok(file) => file,
        Err(why) => {
            let devices = mounts.iter().map(|mount| mount.device.as_str()).collect::<BTreeSet<_>>();
            let now: Vec<Mount> = devices.into_iter().flat_map(find).collect();
            if now.is_empty() {
                return Ok(());
            }
            open_first(&now).map_err(|_| io::Error::other(why))?
        }
    };
    match thaw(&file) {
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(io::Error::other(thaw_error(errno))),
    }
}

/// Whether the process is still the one that was to hold that freeze; a killed one that waits in the kernel is.
fn is_holder(pid: u32, id: &str) -> bool {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = command.split(|byte| *byte == 0);
    words.any(|word| word == HOLD_SUBCOMMAND.as_bytes()) && words.any(|word| word == id.as_bytes())
}

/// The first of several mounts of one file system that is still there.
fn open_first(mounts: &[Mount]) -> Result<File, String> {
    let mut why = "it is not mounted any more".to_owned();
    for mount in mounts {
        match open(mount) {
            Ok(Some(file)) => return Ok(file),
            Ok(None) => {}
            Err(error) => why = format!("cannot open {}: {error}", mount.path.display()),
        }
    }
    Err(why)
}

/// `None`: another mount is there now.
fn open(mount: &Mount) -> io::Result<Option<File>> {
    // A mount point that somebody has made a FIFO of keeps nobody waiting.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&mount.path)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let mount_id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    let number = file.metadata()?.dev();
    let device = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    // A btrfs gives its files other numbers, all of which begin like this.
    let is_device = device == mount.device || mount.device.starts_with("0:");
    Ok((mount_id == Some(mount.mount_id) && is_device).then_some(file))
}

fn freeze(file: &File) -> Result<(), Errno> {
    // SAFETY: FIFREEZE is such a number, and the kernel looks at no argument of it.
    let request = unsafe { NoArg::<FIFREEZE>::new() };
    // SAFETY: it writes nothing to this process.
    unsafe { ioctl(file, request) }
}

fn thaw(file: &File) -> Result<(), Errno> {
    // SAFETY: as for FIFREEZE.
    let request = unsafe { NoArg::<FITHAW>::new() };
    // SAFETY: the same.
    unsafe { ioctl(file, request) }
}

fn freeze_error(errno: Errno) -> String {
    match errno {
        Errno::BUSY => "another program has it frozen already".to_owned(),
        Errno::OPNOTSUPP => "a file system of this kind cannot be frozen".to_owned(),
        errno => format!("it cannot be frozen: {errno}"),
    }
}

fn thaw_error(errno: Errno) -> String {
    match errno {
        Errno::INVAL => "another program has thawed it meanwhile".to_owned(),
        errno => format!("its thaw failed: {errno}"),
    }
}

/// Waits for a byte; false: the other side has gone, or it took too long.
fn is_told(at_most: Option<Duration>) -> io::Result<bool> {
    let stdin = io::stdin();
    let deadline = at_most.map(|at_most| Instant::now() + at_most);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.map(|left| rustix::event::Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut [PollFd::new(&stdin, PollFlags::IN)], left.as_ref()) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(rustix::io::read(stdin.as_fd(), &mut [0; 1])? == 1),
        }
    }
}

/// Whoever asked may be gone: then nobody is to be told.
fn say(word: &Word) -> io::Result<()> {
    let mut line = serde_json::to_string(word).map_err(io::Error::other)?;
    line.push('\n');
    let mut stdout = io::stdout();
    match stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        said => said,
    }
}

/// Whether a path is on the file system of that device number, `259:3`.
pub fn is_on(path: &Path, device: &str) -> bool {
    fs::metadata(path).is_ok_and(|found| {
        format!("{}:{}", rustix::fs::major(found.dev()), rustix::fs::minor(found.dev())) == device
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This process's own root, as the kernel tells of it.
    fn root() -> Mount {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mountinfo.lines().rfind(|line| line.split(' ').nth(4) == Some("/")).unwrap();
        let fields: Vec<&str> = line.split(' ').collect();
        Mount { mount_id: fields[0].parse().unwrap(), device: fields[2].to_owned(), path: "/".into() }
    }

    #[test]
    fn a_mount_is_read_as_it_is_written() {
        let mount = Mount { mount_id: 31, device: "259:3".to_owned(), path: "/mnt/a, b".into() };
        assert_eq!(mount.to_string().parse::<Mount>().unwrap(), mount);
        for wrong in ["", "31", "31,259:3", "x,259:3,/mnt"] {
            assert!(wrong.parse::<Mount>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_mounted_in_the_place_of_another_is_not_taken_for_it() {
        let there = root();
        let gone = Mount { mount_id: u64::MAX, ..there.clone() };
        let other = Mount { device: "4095:1048575".to_owned(), ..there.clone() };
        assert!(open(&gone).unwrap().is_none() && open(&other).unwrap().is_none());
        assert!(open_first(&[gone.clone(), there]).is_ok());
        assert_eq!(open_first(&[gone]).unwrap_err(), "it is not mounted any more");
        let nowhere = Mount { path: "/no/such/place".into(), ..root() };
        assert!(open_first(&[nowhere]).unwrap_err().starts_with("cannot open /no/such/place"));
    }

    #[test]
    fn what_is_mounted_elsewhere_by_now_is_looked_for() {
        let gone = Mount { mount_id: u64::MAX, ..root() };
        // None has it any more.
        thaw_wherever(std::slice::from_ref(&gone), &|_| Vec::new()).unwrap();
        let nowhere = Mount { path: "/no/such/place".into(), ..root() };
        let error = thaw_wherever(std::slice::from_ref(&gone), &|_| vec![nowhere.clone()]).unwrap_err();
        assert_eq!(error.to_string(), "it is not mounted any more");
    }

    #[test]
    fn a_process_of_another_name_is_no_holder() {
        assert!(!is_holder(std::process::id(), "some-id"));
        assert!(!is_holder(u32::MAX, "some-id"));
    }
}
