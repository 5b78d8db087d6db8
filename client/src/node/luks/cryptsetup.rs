//! One run of cryptsetup, of dmsetup, or of this program on an encrypted disk: a passphrase goes to it through a pipe.
//!
//! Owns: the lines of arguments, what keeps two of them apart, and what their end means. Never: puts a passphrase into an argument, a
//! variable, a file or a message; opens the disk itself, which may wait for the server (see `safe_stop.rs`).
//!
//! A program that waits in the kernel outlives the call that has started it, and the daemon as well. So it holds the lock of the
//! attachment's folder by its stderr, which is the lock's file: whoever comes next waits for its end.
//! Source: cryptsetup(8) 2.6 (exit code 2: no key available with this passphrase; 5: exists or busy), dmsetup(8) 1.02.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsRawFd as _, IntoRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use proto::v1::Passphrase;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use uuid::Uuid;

use crate::contract::AttachmentDir;
use crate::disk_ends;
use crate::mapper;
use crate::node::device_process;
use crate::node::error::NodeError;

/// One run: deriving a key takes seconds, on a slow machine some more; the rest is I/O.
const RUN_DEADLINE: Duration = Duration::from_secs(120);
/// How long the run of a former call is waited for.
const LOCK_DEADLINE: Duration = Duration::from_secs(60);
/// The same of a clear disk whose disk is gone: nothing waits for I/O any more.
const DEFERRED_DEADLINE: Duration = Duration::from_secs(5);
/// What [`Subject::close`] takes at most where it is deferred.
pub const FORCE_CLOSE_DEADLINE: Duration = DEFERRED_DEADLINE.saturating_mul(2);
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of what a program says that a message shows.
const SAID_BYTES_MAX: u64 = 1024;
/// Where the data begins, in sectors of 512 bytes: behind the 16 MiB that a volume has more than it was asked for.
const DATA_OFFSET_SECTORS: u64 = proto::passphrase::LUKS_HEADER_BYTES / 512;
const CRYPTSETUP: &str = "cryptsetup";
/// Of `cryptsetup`: no key slot opens with this passphrase.
const NO_KEY: i32 = 2;
/// A core of one byte: none is written, and none is piped to a program either (core(5)).
const NO_CORE: u64 = 1;

/// Whether cryptsetup is where this process looks for programs: asked before anything is begun that needs it.
pub fn is_installed() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(CRYPTSETUP).is_file())
}

/// What runs are about.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The attachment's folder.
    pub dir: &'a AttachmentDir,
    /// The attachment.
    pub attachment_id: Uuid,
    /// What is attached, for people.
    pub target: &'a str,
}

/// How a program has ended.
#[derive(Debug)]
struct Ended {
    status: ExitStatus,
    /// On stderr, shortened.
    said: String,
}

/// A program, and what it is told.
struct Run<'a> {
    command: Command,
    what: &'static str,
    passphrase: Option<&'a Passphrase>,
    deadlines: Deadlines,
}

/// For a former run to end, and for this one.
#[derive(Debug, Clone, Copy)]
struct Deadlines {
    lock: Duration,
    run: Duration,
}

impl<'a> Run<'a> {
    fn new(command: Command, what: &'static str, passphrase: Option<&'a Passphrase>) -> Self {
        let deadlines = Deadlines { lock: LOCK_DEADLINE, run: RUN_DEADLINE };
        Self { command, what, passphrase, deadlines }
    }
}

impl Subject<'_> {
    /// Makes a LUKS2 header on the disk, over whatever there is.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub async fn format(
        &self,
        disk: &Path,
        block_bytes: u32,
        passphrase: &Passphrase,
    ) -> Result<(), NodeError> {
        let mut command = cryptsetup("luksFormat");
        command.args(["--batch-mode", "--type", "luks2", "--key-file", "-"]);
        command.args(["--offset", &DATA_OFFSET_SECTORS.to_string()]);
        // The clear disk's blocks are the volume's.
        command.args(["--sector-size", &block_bytes.to_string()]).arg(disk);
        self.succeed(Run::new(command, "making the LUKS header", Some(passphrase))).await
    }

    /// Has the kernel open the disk.
    ///
    /// # Errors
    /// [`NodeError::PassphraseWrong`], and others by cause.
    pub async fn open(
        &self,
        disk: &Path,
        is_read_only: bool,
        passphrase: &Passphrase,
    ) -> Result<(), NodeError> {
        let mut command = cryptsetup("open");
        // The key goes to the kernel with the table, and not into a keyring, which would end with the process: without it the clear
        // disk could not be made larger without the passphrase.
        command.args(["--type", "luks", "--disable-keyring", "--key-file", "-"]);
        if is_read_only {
            command.arg("--readonly");
        }
        command.arg(disk).arg(mapper::name_of(self.attachment_id));
        self.succeed(Run::new(command, "opening the encrypted disk", Some(passphrase))).await
    }

    /// Gives the clear disk the size that its disk has now.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub async fn grow(&self) -> Result<(), NodeError> {
        let mut command = cryptsetup("resize");
        command.arg(mapper::name_of(self.attachment_id));
        self.succeed(Run::new(command, "growing the clear disk", None)).await
    }

    /// Puts a passphrase in the place of another.
    ///
    /// # Errors
    /// [`NodeError::PassphraseWrong`]: of the old one. Others by cause.
    pub async fn change_passphrase(
        &self,
        disk: &Path,
        old: &Passphrase,
        new: &Passphrase,
    ) -> Result<(), NodeError> {
        let io_error = |source| NodeError::Io { what: "cannot pass a passphrase on".to_owned(), source };
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| io_error(errno.into()))?;
        // It is less than a pipe holds, so that nobody has to read meanwhile.
        let mut left = new.value.as_slice();
        while !left.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::write(&writer, left));
            left = &left[written.map_err(|errno| io_error(errno.into()))?..];
        }
        drop(writer);
        let place = format!("/proc/{}/fd/{}", std::process::id(), reader.as_raw_fd());
        let mut command = cryptsetup("luksChangeKey");
        command.args(["--batch-mode", "--key-file", "-"]).arg(disk).arg(place);
        let run = Run::new(command, "changing the passphrase", Some(old));
        let changed = self.succeed(run).await;
        if !matches!(changed, Ok(()) | Err(NodeError::PassphraseWrong { .. })) {
            // The program may go on, and look there later: the number must never lead to something else.
            let _ = reader.into_raw_fd();
        }
        changed
    }

    /// Takes the clear disk away; deferred, it goes with the last that has it open.
    ///
    /// # Errors
    /// [`NodeError::EncryptionFailed`]: somebody has it open, or the kernel refuses.
    pub async fn close(&self, is_deferred: bool) -> Result<(), NodeError> {
        let mut command = program("dmsetup");
        // Whoever looks at a new disk for a moment is no user.
        command.args(["remove", if is_deferred { "--deferred" } else { "--retry" }]);
        command.arg(mapper::name_of(self.attachment_id));
        let mut run = Run::new(command, "closing the clear disk", None);
        if is_deferred {
            run.deadlines = Deadlines { lock: DEFERRED_DEADLINE, run: DEFERRED_DEADLINE };
        }
        self.succeed(run).await
    }

    /// What lies at both ends of a disk.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub async fn look(&self, disk: &Path) -> Result<disk_ends::Found, NodeError> {
        let mut command = own_program();
        command.arg(disk_ends::LOOK_SUBCOMMAND).arg(disk);
        let ended = self.run(Run::new(command, "reading the disk", None)).await?;
        match ended.status.code().and_then(disk_ends::Found::of_exit_code) {
            Some(found) => Ok(found),
            None => Err(self.failed("reading the disk", &ended)),
        }
    }

    /// Writes zeros over both ends of the clear disk.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub async fn erase(&self) -> Result<(), NodeError> {
        let mut command = own_program();
        command.arg(disk_ends::ERASE_SUBCOMMAND).arg(mapper::path_of(self.attachment_id));
        self.succeed(Run::new(command, "erasing the ends of the clear disk", None)).await
    }

    async fn succeed(&self, run: Run<'_>) -> Result<(), NodeError> {
        let what = run.what;
        let is_told = run.passphrase.is_some();
        let ended = self.run(run).await?;
        match ended.status.code() {
            Some(0) => Ok(()),
            Some(NO_KEY) if is_told => Err(NodeError::PassphraseWrong { target: self.target.to_owned() }),
            _ => Err(self.failed(what, &ended)),
        }
    }

    fn failed(&self, what: &'static str, ended: &Ended) -> NodeError {
        let why = format!("{what} failed ({}): {}", ended.status, ended.said);
        NodeError::EncryptionFailed { target: self.target.to_owned(), why }
    }

    /// Runs a program to its end, unless the disk's process ends before it: then the call has to end, so that another process takes the
    /// disk on, for which the program waits.
    async fn run(&self, run: Run<'_>) -> Result<Ended, NodeError> {
        let Run { mut command, what, passphrase, deadlines } = run;
        let mut lock = self.lock(deadlines.lock).await?;
        let io_error = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => NodeError::NoCryptsetup,
            _ => NodeError::Io { what: what.to_owned(), source },
        };
        let stderr = lock.try_clone().map_err(io_error)?;
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr);
        let mut child = command.spawn().map_err(io_error)?;
        let id = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let (Some(passphrase), Some(mut stdin)) = (passphrase, child.stdin.take()) {
            let limit = Rlimit { current: Some(NO_CORE), maximum: Some(NO_CORE) };
            match prlimit(id, Resource::Core, limit) {
                // Refused to who is not root: the limit is lower already, then.
                Ok(_) | Err(Errno::PERM) => {}
                Err(errno) => return Err(io_error(errno.into())),
            }
            // A program that has ended already says why by its exit code.
            stdin.write_all(&passphrase.value).await.ok();
        }
        drop(child.stdin.take());
        let status = tokio::select! {
            status = child.wait() => status.map_err(io_error)?,
            () = self.disk_process_ends() => {
                let why = format!("its device process ended during {what}");
                return Err(NodeError::EncryptionFailed { target: self.target.to_owned(), why });
            }
            () = tokio::time::sleep(deadlines.run) => {
                let target = self.target.to_owned();
                return Err(NodeError::TimedOut { target, what, after: deadlines.run });
            }
        };
        lock.seek(SeekFrom::Start(0)).map_err(io_error)?;
        let mut shown = Vec::new();
        lock.take(SAID_BYTES_MAX).read_to_end(&mut shown).map_err(io_error)?;
        Ok(Ended { status, said: String::from_utf8_lossy(&shown).trim().to_owned() })
    }

    /// Waits for the end of the process that serves the disk; for ever where there is none.
    async fn disk_process_ends(&self) {
        if let Ok(Some(pid)) = device_process::running_pid(self.dir)
            && device_process::wait_until_ended(pid).await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }

    /// Waits until nothing that a former call began is at work on the disk any more.
    ///
    /// # Errors
    /// [`NodeError::TimedOut`]
    pub async fn settled(&self) -> Result<(), NodeError> {
        self.lock(LOCK_DEADLINE).await.map(drop)
    }

    /// The lock's file, empty.
    async fn lock(&self, deadline: Duration) -> Result<File, NodeError> {
        let path = lock_path(self.dir);
        let io_error = |source| NodeError::Io { what: format!("cannot lock {}", path.display()), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(io_error)?;
        let begun = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if begun.elapsed() < deadline => {
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                Err(Errno::WOULDBLOCK) => {
                    let what = "a former call's work on the encrypted disk";
                    let target = self.target.to_owned();
                    return Err(NodeError::TimedOut { target, what, after: deadline });
                }
                Err(errno) => return Err(io_error(errno.into())),
            }
        }
        file.set_len(0).map_err(io_error)?;
        Ok(file)
    }
}

fn lock_path(dir: &AttachmentDir) -> PathBuf {
    dir.path().join("cryptsetup.lock")
}

fn cryptsetup(action: &str) -> Command {
    let mut command = program(CRYPTSETUP);
    command.arg(action);
    command
}

fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    // In a container nobody answers udev's cookies, and the program would wait for ever; it makes the names in /dev/mapper itself.
    command.env("DM_DISABLE_UDEV", "1").env("LC_ALL", "C").current_dir("/");
    command
}

/// This very program, even if another is installed by now.
fn own_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.current_dir("/");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = program("sh");
        command.args(["-c", script]);
        command
    }

    async fn run(folder: &Path, script: &str, passphrase: Option<&Passphrase>) -> Result<(), NodeError> {
        let dir = AttachmentDir::from_path(folder);
        let subject = Subject { dir: &dir, attachment_id: Uuid::nil(), target: "vol-1" };
        subject.succeed(Run::new(shell(script), "a trial", passphrase)).await
    }

    #[tokio::test]
    async fn a_passphrase_is_on_stdin_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let secret = Passphrase::new(b"correct horse".to_vec());
        let script = "test \"$(cat)\" = 'correct horse' || exit 7; ! grep -q horse /proc/$$/environ; ulimit -c | grep -qx 0";
        run(folder.path(), script, Some(&secret)).await.unwrap();
        let kept = std::fs::read_to_string(folder.path().join("cryptsetup.lock")).unwrap();
        assert_eq!(kept, "");
    }

    #[tokio::test]
    async fn a_wrong_passphrase_is_told_from_other_failures() {
        let folder = tempfile::tempdir().unwrap();
        let secret = Passphrase::new(b"x".to_vec());
        let wrong = run(folder.path(), "exit 2", Some(&secret)).await;
        assert!(matches!(wrong, Err(NodeError::PassphraseWrong { .. })), "{wrong:?}");
        let other = run(folder.path(), "echo no device >&2; exit 4", Some(&secret)).await.unwrap_err();
        assert!(other.to_string().ends_with("a trial failed (exit status: 4): no device"), "{other}");
        assert!(matches!(run(folder.path(), "exit 2", None).await, Err(NodeError::EncryptionFailed { .. })));
    }

    #[tokio::test]
    async fn a_program_that_outlives_its_call_is_waited_for_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cryptsetup.lock");
        let file = File::create(&path).unwrap();
        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        // As of a daemon that was killed: the child alone has it.
        let mut orphan = std::process::Command::new("sleep").arg("1").stderr(file).spawn().unwrap();
        let begun = Instant::now();
        run(folder.path(), "true", None).await.unwrap();
        assert!(begun.elapsed() > Duration::from_millis(500));
        orphan.wait().unwrap();
    }
}
