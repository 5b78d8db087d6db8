//! Takes a disk away unless somebody uses it, as the kernel says.
//!
//! ```text
//!   device process, node daemon ──▶ volclient stop-disk DEV_ID ──▶ one line: Outcome
//!
//!   stop-disk:  TRY_STOP_DEV ─ the kernel has it ──────────────────────────────────────▶ stopped, or in use
//!                  └ before Linux 6.18 ─▶ named? ─▶ claimed (O_EXCL)? ─▶ STOP_DEV ─────▶ stopped
//!                                            └ yes: in use  └ cannot be: in use
//! ```
//! An exclusive open is refused for as long as anybody has claimed the disk or one of its partitions: a mount, a further disk of
//! a file system, an external journal, device mapper, md, a swap area. It is kept until the disk is gone, so nobody claims it
//! meanwhile. It does not see who opens without a claim: processes, loop devices and the NVMe target are found by name
//! (`holders`).
//!
//! Invariant: the process that serves the disk and the node daemon never open it, and never stop it where that may wait for its
//! I/O. A partition scan or a last close that waits for a lost server keeps everybody out, in uninterruptible sleep; a process
//! with such a thread does not end, and nobody could take its disk on. So a process of its own does it, which owns nothing.
//! Called by: the device process when it is asked to stop, and `leftovers`; `volclient stop-disk` is the process.
//! Source: open(2) `O_EXCL`; block/bdev.c `bd_may_claim`, drivers/block/ublk_drv.c `ublk_ctrl_try_stop_dev`, Linux 7.3.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ublk_core::control::block_device_path;
use ublk_core::{ControlDevice, ControlError};

use crate::causes::with_sources;
use crate::holders::holders;

/// The subcommand of `volclient` that is the process.
pub const SUBCOMMAND: &str = "stop-disk";
/// Device managers open a device for a moment now and then: busy for less than this is not busy.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
const BUSY_RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// An open that takes longer waits for somebody else's I/O.
const CLAIM_PATIENCE: Duration = Duration::from_secs(5);
/// Of a thread that reads one line.
const READER_STACK_BYTES: usize = 128 << 10;

/// Who is meant when nobody is named.
const UNNAMED: &str = "held by the kernel, or by a program that /proc does not show";
/// Who keeps others from opening it.
const WAITING: &str = "somebody reads its partition table, or closes it, and waits for its I/O";

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The disk is gone.
    Stopped,
    /// It is as it was: somebody uses it.
    InUse {
        /// Who, for people, such as "mounted on /mnt/data"; never empty.
        holders: Vec<String>,
    },
    /// Nobody knows whether it is used, or the driver refused.
    Failed {
        /// Why, for people.
        message: String,
    },
}

/// Has another process take `/dev/ublkb<dev_id>` away; `on_outcome` is called once, on a thread of its own.
///
/// # Errors
/// The process or the thread cannot be started; then nothing is called.
pub fn begin(dev_id: u32, on_outcome: impl FnOnce(Outcome) + Send + 'static) -> io::Result<()> {
    // Of this very program, even if another is installed by now: both ends of the line are of one version.
    let mut command = Command::new("/proc/self/exe");
    command.arg(SUBCOMMAND).arg(dev_id.to_string());
    begin_with(command, on_outcome)
}

fn begin_with(mut command: Command, on_outcome: impl FnOnce(Outcome) + Send + 'static) -> io::Result<()> {
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0);
    // The thread first: a process that nobody listens to would take the disk away all the same.
    let (sender, started) = mpsc::channel();
    let read = move || {
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return drop(sender.send(Err(error))),
        };
        let _ = sender.send(Ok(()));
        let mut line = String::new();
        let told = child.stdout.take().map(|stdout| BufReader::new(stdout).read_line(&mut line));
        let outcome = match (told, serde_json::from_str(&line)) {
            (_, Ok(outcome)) => outcome,
            (Some(Err(error)), _) => Outcome::Failed { message: format!("no word of {SUBCOMMAND}: {error}") },
            _ => Outcome::Failed { message: format!("{SUBCOMMAND} ended without a word") },
        };
        on_outcome(outcome);
        // Its exit status says no more; it may take as long as the I/O that it waits for.
        let _ = child.wait();
    };
    thread::Builder::new().name("safe-stop".into()).stack_size(READER_STACK_BYTES).spawn(read)?;
    started.recv().unwrap_or_else(|_| Err(io::Error::other("the thread ended")))
}

/// [`begin`], and waits for what comes of it.
pub fn run(dev_id: u32) -> Outcome {
    let (sender, outcome) = mpsc::channel();
    let begun = begin(dev_id, move |outcome| drop(sender.send(outcome)));
    match begun {
        Ok(()) => outcome.recv().unwrap_or_else(|error| Outcome::Failed { message: error.to_string() }),
        Err(error) => Outcome::Failed { message: format!("cannot start {SUBCOMMAND}: {error}") },
    }
}

/// The work of `volclient stop-disk`: to be called in a process that serves nothing, and ends with its answer.
pub fn stop_disk(dev_id: u32) -> Outcome {
    match ControlDevice::open() {
        Ok(control) => stop_unless_used(&mut UblkDisk { control, dev_id }, BUSY_PATIENCE),
        Err(error) => Outcome::Failed { message: with_sources(&error) },
    }
}

/// Why an exclusive open did not succeed.
#[derive(Debug)]
enum NotClaimed {
    /// Somebody has claimed it.
    Held,
    /// There is no disk: it was never started, or is gone already.
    NoDisk,
    /// The open has not returned.
    Waits,
    Failed(io::Error),
}

/// What can be asked of a disk and done to it.
trait Disk {
    /// The right to be the only one; nobody else has it until this is dropped.
    type Claim;
    /// [`ControlDevice::try_stop_dev`]
    fn try_stop(&mut self) -> Result<(), ControlError>;
    /// [`ControlDevice::stop_dev`]
    fn stop(&mut self) -> Result<(), ControlError>;
    fn claim(&mut self) -> Result<Self::Claim, NotClaimed>;
    /// Who is seen to use it.
    fn holders(&mut self) -> Vec<String>;
}

/// Why one attempt did not take the disk away.
enum NotStopped {
    /// Said where nobody is named.
    InUse(&'static str),
    Failed(String),
}

fn stop_unless_used(disk: &mut impl Disk, patience: Duration) -> Outcome {
    let deadline = Instant::now() + patience;
    loop {
        let why = match attempt(disk) {
            Ok(()) => return Outcome::Stopped,
            Err(NotStopped::Failed(message)) => return Outcome::Failed { message },
            Err(NotStopped::InUse(why)) => why,
        };
        if Instant::now() >= deadline {
            let mut holders = disk.holders();
            if holders.is_empty() {
                holders.push(why.to_owned());
            }
            return Outcome::InUse { holders };
        }
        thread::sleep(BUSY_RETRY_INTERVAL);
    }
}

fn attempt<D: Disk>(disk: &mut D) -> Result<(), NotStopped> {
    let failed = |error: ControlError| NotStopped::Failed(with_sources(&error));
    match disk.try_stop() {
        Ok(()) => return Ok(()),
        Err(ControlError::Busy { .. }) => return Err(NotStopped::InUse(UNNAMED)),
        // An older kernel, or no disk: it was never started, or the driver has removed it.
        Err(ControlError::Unsupported { .. } | ControlError::NoSuchDevice { .. }) => {}
        Err(error) => return Err(failed(error)),
    }
    // Before the claim, which is an open file, too. What is opened without a claim between this look and the stop gets an I/O
    // error, never a wrong byte.
    if !disk.holders().is_empty() {
        return Err(NotStopped::InUse(UNNAMED));
    }
    let claim = match disk.claim() {
        Ok(claim) => Some(claim),
        Err(NotClaimed::NoDisk) => None,
        Err(NotClaimed::Held) => return Err(NotStopped::InUse(UNNAMED)),
        Err(NotClaimed::Waits) => return Err(NotStopped::InUse(WAITING)),
        Err(NotClaimed::Failed(error)) => {
            return Err(NotStopped::Failed(format!(
                "cannot ask the kernel whether the disk is in use: {error}"
            )));
        }
    };
    let stopped = disk.stop().map_err(failed);
    // The end of this process closes it: a disk that was not stopped might keep a close waiting.
    std::mem::forget(claim);
    stopped
}

struct UblkDisk {
    control: ControlDevice,
    dev_id: u32,
}

impl Disk for UblkDisk {
    type Claim = File;

    fn try_stop(&mut self) -> Result<(), ControlError> {
        self.control.try_stop_dev(self.dev_id)
    }

    fn stop(&mut self) -> Result<(), ControlError> {
        self.control.stop_dev(self.dev_id)
    }

    /// On a thread that may be left behind.
    fn claim(&mut self) -> Result<File, NotClaimed> {
        let path = block_device_path(self.dev_id);
        let (sender, opened) = mpsc::channel();
        let open = move || {
            // Not for writing: udev probes anew what was open for writing.
            let file = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
            // Too late: it is closed again.
            let _ = sender.send(file);
        };
        thread::Builder::new().name("claim".into()).spawn(open).map_err(NotClaimed::Failed)?;
        match opened.recv_timeout(CLAIM_PATIENCE) {
            Ok(Ok(file)) => Ok(file),
            Ok(Err(error)) => Err(not_claimed(error, has_disk(self.dev_id))),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(NotClaimed::Waits),
        }
    }

    fn holders(&mut self) -> Vec<String> {
        holders(self.dev_id)
    }
}

fn has_disk(dev_id: u32) -> bool {
    Path::new(&format!("/sys/block/ublkb{dev_id}")).exists()
}

/// What the error of an exclusive open means.
fn not_claimed(error: io::Error, has_disk: bool) -> NotClaimed {
    match error.raw_os_error() {
        Some(libc::EBUSY) => NotClaimed::Held,
        Some(libc::ENXIO | libc::ENODEV) => NotClaimed::NoDisk,
        Some(libc::ENOENT) if !has_disk => NotClaimed::NoDisk,
        _ => NotClaimed::Failed(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that answers as it is told, and what was done to it.
    struct FakeDisk {
        /// What TRY_STOP_DEV answers, as an errno; 0: it stops.
        try_stop: i32,
        holders: Vec<String>,
        claim: fn() -> Result<(), NotClaimed>,
        calls: Vec<&'static str>,
    }

    impl FakeDisk {
        fn new(try_stop: i32, holders: &[&str], claim: fn() -> Result<(), NotClaimed>) -> Self {
            let holders = holders.iter().map(|&holder| holder.to_owned()).collect();
            Self { try_stop, holders, claim, calls: Vec::new() }
        }

        fn stop_unless_used(&mut self) -> Outcome {
            stop_unless_used(self, Duration::ZERO)
        }
    }

    impl Disk for FakeDisk {
        type Claim = ();

        fn try_stop(&mut self) -> Result<(), ControlError> {
            let (command, dev_id) = ("TRY_STOP_DEV", 7);
            match self.try_stop {
                0 => Ok(()),
                libc::EBUSY => Err(ControlError::Busy { command, dev_id }),
                libc::EOPNOTSUPP => Err(ControlError::Unsupported { command, dev_id }),
                libc::ENODEV => Err(ControlError::NoSuchDevice { command, dev_id }),
                errno => {
                    let source = io::Error::from_raw_os_error(errno);
                    Err(ControlError::Failed { command, dev_id, source })
                }
            }
        }

        fn stop(&mut self) -> Result<(), ControlError> {
            self.calls.push("stop");
            Ok(())
        }

        fn claim(&mut self) -> Result<(), NotClaimed> {
            self.calls.push("claim");
            (self.claim)()
        }

        fn holders(&mut self) -> Vec<String> {
            self.holders.clone()
        }
    }

    fn in_use(holders: &[&str]) -> Outcome {
        Outcome::InUse { holders: holders.iter().map(|&holder| holder.to_owned()).collect() }
    }

    #[test]
    fn where_the_kernel_decides_nothing_else_does() {
        let mut unused = FakeDisk::new(0, &["named"], || Err(NotClaimed::Held));
        assert_eq!(unused.stop_unless_used(), Outcome::Stopped);
        let mut named = FakeDisk::new(libc::EBUSY, &["mounted on /mnt"], || Ok(()));
        assert_eq!(named.stop_unless_used(), in_use(&["mounted on /mnt"]));
        let mut unnamed = FakeDisk::new(libc::EBUSY, &[], || Ok(()));
        assert_eq!(unnamed.stop_unless_used(), in_use(&[UNNAMED]));
        for disk in [unused, named, unnamed] {
            assert!(disk.calls.is_empty(), "{:?}", disk.calls);
        }
    }

    #[test]
    fn an_older_kernel_stops_what_is_neither_named_nor_claimed() {
        let mut unused = FakeDisk::new(libc::EOPNOTSUPP, &[], || Ok(()));
        assert_eq!(unused.stop_unless_used(), Outcome::Stopped);
        assert_eq!(unused.calls, ["claim", "stop"]);
        let mut named = FakeDisk::new(libc::EOPNOTSUPP, &["open by pid 5 (dd)"], || Ok(()));
        assert_eq!(named.stop_unless_used(), in_use(&["open by pid 5 (dd)"]));
        assert!(named.calls.is_empty());
        let mut claimed = FakeDisk::new(libc::EOPNOTSUPP, &[], || Err(NotClaimed::Held));
        assert_eq!(claimed.stop_unless_used(), in_use(&[UNNAMED]));
        assert_eq!(claimed.calls, ["claim"]);
        let mut waiting = FakeDisk::new(libc::EOPNOTSUPP, &[], || Err(NotClaimed::Waits));
        assert_eq!(waiting.stop_unless_used(), in_use(&[WAITING]));
        assert_eq!(waiting.calls, ["claim"]);
    }

    #[test]
    fn a_device_without_a_disk_is_nobodys() {
        let mut disk = FakeDisk::new(libc::ENODEV, &[], || Err(NotClaimed::NoDisk));
        assert_eq!(disk.stop_unless_used(), Outcome::Stopped);
        assert_eq!(disk.calls, ["claim", "stop"]);
    }

    #[test]
    fn what_cannot_be_asked_is_not_stopped() {
        let refuse = || Err(NotClaimed::Failed(io::Error::from_raw_os_error(libc::EACCES)));
        let mut disk = FakeDisk::new(libc::EOPNOTSUPP, &[], refuse);
        let outcome = disk.stop_unless_used();
        assert!(matches!(&outcome, Outcome::Failed { message } if message.contains("denied")), "{outcome:?}");
        let mut broken = FakeDisk::new(libc::EIO, &[], || Ok(()));
        assert!(matches!(broken.stop_unless_used(), Outcome::Failed { .. }));
        assert_eq!((disk.calls, broken.calls.len()), (vec!["claim"], 0));
    }

    #[test]
    fn an_open_that_failed_says_whether_somebody_is_there() {
        let of = |errno, has_disk| not_claimed(io::Error::from_raw_os_error(errno), has_disk);
        assert!(matches!(of(libc::EBUSY, true), NotClaimed::Held));
        assert!(matches!(of(libc::ENXIO, true), NotClaimed::NoDisk));
        assert!(matches!(of(libc::ENOENT, false), NotClaimed::NoDisk));
        // A /dev that lacks the node says nothing about the disk.
        assert!(matches!(of(libc::ENOENT, true), NotClaimed::Failed(_)));
        assert!(matches!(of(libc::EPERM, true), NotClaimed::Failed(_)));
    }

    /// What is told of a process that does this.
    fn outcome_of(script: &str) -> Outcome {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let (sender, outcome) = mpsc::channel();
        begin_with(command, move |outcome| sender.send(outcome).unwrap()).unwrap();
        outcome.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    #[test]
    fn the_process_says_one_line_and_its_end_is_not_waited_for() {
        assert_eq!(outcome_of(r#"echo '"stopped"'; exec sleep 120"#), Outcome::Stopped);
        assert_eq!(outcome_of(r#"echo '{"in_use":{"holders":["you"]}}'"#), in_use(&["you"]));
        assert!(matches!(outcome_of("exit 3"), Outcome::Failed { .. }));
        assert!(matches!(outcome_of("echo nonsense"), Outcome::Failed { .. }));
    }
}
