//! Formats other than raw, by qemu-nbd: another process that reads or writes the file, and is spoken to over a Unix socket.
//!
//! Owns: the process, its limits (`sandbox.rs`), and the private directory in which its socket is. QEMU never finds out a format
//! by itself: it is always told. It ends when its only connection does, and with volctl.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::changes::{CLUSTER_BYTES, Changes};
use super::format::Format;
use super::nbd::{NbdClient, Opening};
use super::sandbox::NOBODY;

/// The program that serves images.
const QEMU_NBD: &str = "qemu-nbd";
/// The program that makes them.
const QEMU_IMG: &str = "qemu-img";
/// For opening an image; one with large tables on a slow disk takes seconds.
const START_DEADLINE: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// The image, in the process whose stdin it is.
const STDIN_PATH: &str = "/proc/self/fd/0";

/// volctl's command that becomes another program, with less rights: hidden, its own affair.
pub const SANDBOX_COMMAND: &str = "image-program";

/// QEMU cannot be used, or not for this image.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// It is not installed.
    #[error("{0} is not installed, and reads and writes all formats but raw")]
    Missing(&'static str),
    /// The user without rights may not read the file.
    #[error("{0} belongs to root and is readable for nobody else, and {QEMU_NBD} does not run as root")]
    Unreadable(PathBuf),
    /// It did not start, or did not understand the image.
    #[error("{program} failed: {why}")]
    Failed {
        /// Which.
        program: &'static str,
        /// In its own words.
        why: String,
    },
    /// A system call of ours.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was done.
        what: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },
}

/// A qcow2 with nothing but its own clusters: QEMU does not look for the backing file that it names.
const STDIN_ALONE: &str =
    r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"/proc/self/fd/0"}}"#;
/// Tells of each byte how many images below lie between it and whoever has it: 0 where nobody has.
const DEPTH_CONTEXT: &str = "qemu:allocation-depth";
/// Longest question about that, in bytes: clusters divide it.
const DEPTH_BYTES_MAX: u64 = 1 << 31;

/// How an image is served.
#[derive(Debug, Clone, Copy)]
pub struct Serving<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// The same, open.
    pub file: &'a File,
    /// How it is stored.
    pub format: Format,
    /// It is written to; else it is only read.
    pub writes: bool,
    /// It may name other files, which are opened as well.
    pub is_trusted: bool,
    /// It is a qcow2 of which only its own clusters are meant: the rest reads as zeroes, and its backing file is not looked for.
    pub is_alone: bool,
    /// What its extents tell of: `base:allocation`.
    pub context: &'a str,
}

/// An image that qemu-nbd serves; ended when dropped.
#[derive(Debug)]
pub struct QemuNbd {
    process: Child,
    /// Removed with the value.
    _directory: tempfile::TempDir,
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        // It may have ended, or be about to; in either case it is not to stay.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl QemuNbd {
    /// Waits until it has ended by itself, as it does when its connection is closed: the file is whole then.
    ///
    /// # Errors
    /// [`QemuError`], by cause.
    pub fn finish(mut self) -> Result<(), QemuError> {
        let io_error = |source| QemuError::Io { what: "wait for qemu-nbd", source };
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            match self.process.try_wait().map_err(io_error)? {
                Some(status) if status.success() => return Ok(()),
                Some(_) => return Err(self.failure()),
                None if Instant::now() > deadline => return Err(io_error(io::ErrorKind::TimedOut.into())),
                None => std::thread::sleep(LOOK_INTERVAL),
            }
        }
    }

    fn failure(&mut self) -> QemuError {
        let mut told = String::new();
        if let Some(stderr) = &mut self.process.stderr {
            // What it said, as far as it can be had.
            let _ = stderr.take(4096).read_to_string(&mut told);
        }
        let why = told
            .lines()
            .next()
            .unwrap_or("it did not say why")
            .replace(STDIN_ALONE, "the image")
            .replace(STDIN_PATH, "the image");
        QemuError::Failed { program: QEMU_NBD, why }
    }
}

/// Serves an image, and opens it.
///
/// # Errors
/// [`QemuError`], by cause.
pub async fn serve(serving: &Serving<'_>) -> Result<(QemuNbd, NbdClient), QemuError> {
    let program = find(QEMU_NBD)?;
    let io_error = |what| move |source| QemuError::Io { what, source };
    let uid = user_for(serving)?;
    let directory = tempfile::tempdir().map_err(io_error("make a private directory"))?;
    if let Some(uid) = uid {
        std::os::unix::fs::chown(directory.path(), Some(uid), Some(NOBODY))
            .map_err(io_error("make a private directory"))?;
    }
    let socket = directory.path().join("nbd");
    let mut command = sandboxed(serving, uid)?;
    command.arg(program).arg("--socket").arg(&socket);
    if !serving.is_alone {
        command.arg(format!("--format={}", serving.format));
    }
    command.args(["--shared=1", "--cache=writeback", "--discard=unmap"]);
    if !serving.writes {
        command.arg("--read-only");
    }
    if serving.context != proto::nbd::block_status::ALLOCATION_CONTEXT {
        command.arg("--allocation-depth");
    }
    // A name that begins with a letter may be a protocol's to QEMU.
    let path = match (serving.is_alone, serving.is_trusted) {
        (true, _) => Path::new(STDIN_ALONE),
        (false, true) => serving.path,
        (false, false) => Path::new(STDIN_PATH),
    };
    command.arg("--").arg(path);
    let stdin = reopened(serving).map_err(io_error("open the image"))?;
    command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::piped()).current_dir(directory.path());
    let process = command.spawn().map_err(io_error("start qemu-nbd"))?;
    let mut server = QemuNbd { process, _directory: directory };
    let client = connect(&mut server, &socket, serving.context).await?;
    Ok((server, client))
}

/// Which bytes a qcow2 has of its own, whatever it is based on.
///
/// # Errors
/// [`QemuError`], by cause.
pub async fn own_bytes(serving: &Serving<'_>) -> Result<Changes, QemuError> {
    let failed = |why: String| QemuError::Failed { program: QEMU_NBD, why };
    let (server, client) = serve(&Serving { is_alone: true, context: DEPTH_CONTEXT, ..*serving }).await?;
    if !client.tells_extents() {
        return Err(failed(format!("it does not know {DEPTH_CONTEXT}, as QEMU does from 5.2 on")));
    }
    let (mut own, mut at) = (Changes::default(), 0);
    let size_bytes = client.export.size_bytes;
    while at < size_bytes {
        let asked = (size_bytes - at).min(DEPTH_BYTES_MAX);
        let extents = client.extents(at, asked as u32).await.map_err(|error| failed(error.to_string()))?;
        let begun = at;
        for extent in extents {
            let end = at.saturating_add(extent.length_bytes).min(size_bytes);
            // They follow each other.
            let _ = extent.state.0 != 0 && own.push(at..end);
            at = end;
        }
        if at == begun {
            return Err(failed("it does not tell what the image has".to_owned()));
        }
    }
    client.disconnect().await;
    server.finish()?;
    Ok(own)
}

/// The image with a position, and with rights, of the process's own.
fn reopened(serving: &Serving<'_>) -> io::Result<File> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(serving.writes);
    use std::os::fd::AsRawFd as _;
    options.open(format!("/proc/self/fd/{}", serving.file.as_raw_fd()))
}

async fn connect(server: &mut QemuNbd, socket: &Path, context: &str) -> Result<NbdClient, QemuError> {
    let opening = Opening {
        addresses: vec![format!("{}{}", crate::data_address::UNIX, socket.display())],
        export_name: String::new(),
        context: context.to_owned(),
        tls: None,
    };
    let deadline = Instant::now() + START_DEADLINE;
    loop {
        let error = match NbdClient::open(opening.clone()).await {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        let ended = server.process.try_wait();
        if ended.map_err(|source| QemuError::Io { what: "wait for qemu-nbd", source })?.is_some() {
            return Err(server.failure());
        }
        if Instant::now() > deadline {
            return Err(QemuError::Failed { program: QEMU_NBD, why: error.to_string() });
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Whose rights the process has: root's never, unless the image is trusted or is our own.
fn user_for(serving: &Serving<'_>) -> Result<Option<u32>, QemuError> {
    if !rustix::process::geteuid().is_root() || serving.is_trusted || serving.writes {
        return Ok(None);
    }
    let metadata =
        serving.file.metadata().map_err(|source| QemuError::Io { what: "look at the image", source })?;
    match (metadata.permissions().mode() & 0o004 != 0, metadata.uid()) {
        (true, _) => Ok(Some(NOBODY)),
        (false, 0) => Err(QemuError::Unreadable(serving.path.to_owned())),
        (false, owner) => Ok(Some(owner)),
    }
}

fn sandboxed(serving: &Serving<'_>, uid: Option<u32>) -> Result<Command, QemuError> {
    let own =
        std::env::current_exe().map_err(|source| QemuError::Io { what: "find volctl's program", source })?;
    let mut command = Command::new(own);
    command.arg(SANDBOX_COMMAND).arg("--parent").arg(std::process::id().to_string());
    if let Some(uid) = uid {
        command.arg("--uid").arg(uid.to_string());
    }
    if serving.writes {
        command.arg("--writes");
    }
    if serving.is_trusted {
        command.arg("--opens-files");
    }
    command.arg("--");
    Ok(command)
}

/// Makes an image without data in an open file, over whatever is there.
///
/// # Errors
/// [`QemuError`], by cause.
pub fn make_empty(file: &File, name: &Path, format: Format, size_bytes: u64) -> Result<(), QemuError> {
    let io_error = |source| QemuError::Io { what: "make the image", source };
    let program = find(QEMU_IMG)?;
    // Some formats have the file's name in themselves: it is made under its last one.
    let directory = tempfile::tempdir().map_err(io_error)?;
    let made = directory.path().join(name.file_name().unwrap_or_default());
    let mut command = Command::new(program);
    command.args(["create", "-q", "-f", format.as_str()]);
    if format == Format::Qcow2 {
        // What QEMU takes of itself, said for differences, which go by clusters.
        command.args(["-o", &format!("compat=1.1,cluster_size={CLUSTER_BYTES}")]);
    }
    command.arg(&made).arg(size_bytes.to_string());
    run_qemu_img(command.stdin(Stdio::null()), "make the image")?;
    let copied = (|| {
        let mut into = file;
        into.set_len(0)?;
        into.seek(SeekFrom::Start(0))?;
        io::copy(&mut File::open(&made)?, &mut into)?;
        file.sync_all()
    })();
    copied.map_err(io_error)
}

/// Gives back what a process that was killed had set aside in an image of our own and never used: the data is whole all the same.
///
/// # Errors
/// [`QemuError`], by cause.
pub fn give_back_leaks(serving: &Serving<'_>) -> Result<(), QemuError> {
    let io_error = |source| QemuError::Io { what: "repair the image", source };
    let mut command = Command::new(find(QEMU_IMG)?);
    command.args(["check", "-q", "-r", "leaks"]);
    match serving.is_alone {
        true => command.arg(STDIN_ALONE),
        false => command.args(["-f", serving.format.as_str(), STDIN_PATH]),
    };
    command.stdin(reopened(serving).map_err(io_error)?).stdout(Stdio::null());
    run_qemu_img(&mut command, "repair the image")
}

/// Runs qemu-img to its end, which is to do `what`.
fn run_qemu_img(command: &mut Command, what: &'static str) -> Result<(), QemuError> {
    let output = command.output().map_err(|source| QemuError::Io { what, source })?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned();
        return Err(QemuError::Failed { program: QEMU_IMG, why });
    }
    Ok(())
}

/// A program on PATH, or where root's programs are.
fn find(program: &'static str) -> Result<PathBuf, QemuError> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    let mut places = std::env::split_paths(&path).map(|directory| directory.join(program));
    let is_program = |path: &PathBuf| {
        path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 != 0)
    };
    places.find(is_program).ok_or(QemuError::Missing(program))
}
