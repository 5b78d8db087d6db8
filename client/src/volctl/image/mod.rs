//! `import`, `export`: images are copied into volumes and out of them, from where volctl runs.
//!
//! Owns the options of both. `volumes.rs` attaches a volume to volctl itself, and gives its bytes as an NBD client has them; `import.rs`
//! and `export.rs` are the two ways, and `since.rs` is what an export of a difference does besides. What copies is `client/src/image/`.

mod export;
mod import;
mod places;
mod progress;
mod since;
mod volumes;

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use client::image::copy::CopyError;
use client::image::format::Format;
use client::image::journal::JournalError;
use client::image::qcow2_header::HeaderError;
use client::image::qemu::QemuError;
use client::image::sandbox::{self, Limits};
use client::image::store::Store;

pub(crate) use self::export::export;
pub(crate) use self::import::import;
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::report::Report;
use crate::size::parse_size;

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// An image's file; an export as nbd://host:port/export, nbds:// or nbd+unix:///export?socket=/path; or - for stdin
    #[arg(value_name = "FILE|URI|-", required_unless_present = "drop")]
    pub(crate) source: Option<String>,
    /// The volume's name
    #[arg(required_unless_present = "drop")]
    pub(crate) volume: Option<String>,
    /// Make the volume: as large as the image, with the block size that its partition table is made for
    #[arg(long)]
    pub(crate) create: bool,
    /// With --create: another capacity than the image's, as for create
    #[arg(long, value_parser = parse_size, requires = "create")]
    pub(crate) size: Option<u64>,
    /// With --create: another block size than the partition table's, or than 4096 where there is none
    #[arg(long, value_name = "BYTES", requires = "create")]
    pub(crate) block_size: Option<u32>,
    /// Import into a volume that was written to: all that is in it is lost
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// The image's format [default: raw, or another where the file's beginning and its name agree on it]
    #[arg(long, value_enum)]
    pub(crate) format: Option<FormatArg>,
    /// The image holds a difference (export --since), and the volume has the content of its base: write the difference onto that. The backing
    /// file that the image names is not looked for
    #[arg(long, conflicts_with_all = ["trusted", "overwrite", "create"])]
    pub(crate) apply: bool,
    /// With --create: make the volume as a clone of this, which has the content of the image's base, and apply the image to it
    #[arg(long, value_name = "VOLUME[@SNAPSHOT]", requires = "create", conflicts_with_all = ["trusted", "size", "block_size"])]
    pub(crate) base: Option<String>,
    /// With --apply or --base: do not compare the volume with what the image says of its base
    #[arg(long)]
    pub(crate) unchecked_base: bool,
    /// Import an image that names other files: they become part of the volume, whatever they are
    #[arg(long)]
    pub(crate) trusted: bool,
    /// Import although the partition table is made for other sectors than the volume has
    #[arg(long)]
    pub(crate) ignore_sector_size: bool,
    /// Do not read the volume back to compare it with the image
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// What a copy that is interrupted does once more, at most
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "512M", hide = true)]
    pub(crate) checkpoint_bytes: u64,
    /// Instead of all that: give up what interrupted imports and exports have left of this volume, its attachments first of all
    #[arg(long, value_name = "VOLUME", conflicts_with_all = ["source", "volume", "create", "overwrite", "format"])]
    pub(crate) drop: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// The volume's name, which nobody has attached for writing; or VOLUME@SNAPSHOT, or @UID, for a snapshot
    #[arg(value_name = "VOLUME[@SNAPSHOT]")]
    pub(crate) source: String,
    /// A file that is not there yet; or an export, as for import
    #[arg(value_name = "FILE|URI")]
    pub(crate) destination: String,
    /// Replace a file that is there, or write to an export that has other bytes
    #[arg(long)]
    pub(crate) force: bool,
    /// Only what is different since this snapshot, as a qcow2 with a backing file: its name in the same volume, VOLUME@SNAPSHOT or @UID
    #[arg(long, value_name = "SNAPSHOT", requires = "base_image")]
    pub(crate) since: Option<String>,
    /// With --since: the image of that snapshot, as a path from the folder of FILE; it need not be there
    #[arg(long, value_name = "FILE", requires = "since")]
    pub(crate) base_image: Option<String>,
    /// With --since: the format of that image [default: what its name says, or raw]
    #[arg(long, value_enum, requires = "since")]
    pub(crate) base_format: Option<FormatArg>,
    /// The image's format [default: what the file's name says, or raw]
    #[arg(long, value_enum)]
    pub(crate) format: Option<FormatArg>,
    /// Do not read the image back to compare it with the volume. With --since only what is different is read then, and the image does not
    /// say what its base has to be
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// What a copy that is interrupted does once more, at most
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "512M", hide = true)]
    pub(crate) checkpoint_bytes: u64,
}

/// What another program may do; see `client::image::sandbox`.
#[derive(Debug, Args)]
pub(crate) struct ImageProgramArgs {
    #[arg(long)]
    parent: i32,
    #[arg(long)]
    uid: Option<u32>,
    #[arg(long)]
    writes: bool,
    #[arg(long)]
    opens_files: bool,
    #[arg(last = true, required = true)]
    program: Vec<std::ffi::OsString>,
}

/// Becomes a program that has to do with an image; returns only if that fails.
pub(crate) fn become_program(args: ImageProgramArgs) -> std::process::ExitCode {
    let ImageProgramArgs { parent, uid, writes, opens_files, program } = args;
    let failed = match sandbox::enter(Limits { uid, writes, opens_files, parent }) {
        Err(error) => error.to_string(),
        Ok(()) => match program.split_first() {
            Some((program, words)) => std::process::Command::new(program).args(words).exec().to_string(),
            None => "no program is named".to_owned(),
        },
    };
    // Whoever closed stderr does not want to know.
    std::io::stderr().write_all(format!("{failed}\n").as_bytes()).ok();
    ExitCode::Other.into()
}

/// What is wrong with QEMU, or with the image as QEMU sees it.
fn qemu_failure(error: &QemuError) -> Failure {
    let (code, next) = match error {
        QemuError::Missing(_) => (
            ExitCode::MachineCannot,
            "install it (Debian, Ubuntu: qemu-utils; Fedora, SUSE: qemu-img and qemu-tools); or convert the image to raw elsewhere",
        ),
        QemuError::Unreadable(_) => (
            ExitCode::MachineCannot,
            "make it readable (chmod o+r), or run volctl as another user who may read it",
        ),
        QemuError::Failed { .. } => (ExitCode::Other, "look at the image with qemu-img check"),
        QemuError::Io { .. } => (ExitCode::Other, ""),
    };
    Failure::new(code, error.to_string(), next)
}

/// Formats of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// The disk's bytes
    Raw,
    /// QEMU's, through qemu-nbd
    Qcow2,
    /// VMware's, through qemu-nbd
    Vmdk,
    /// Hyper-V's, through qemu-nbd
    Vhdx,
    /// VirtualBox's, through qemu-nbd
    Vdi,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Raw => Self::Raw,
            FormatArg::Qcow2 => Self::Qcow2,
            FormatArg::Vmdk => Self::Vmdk,
            FormatArg::Vhdx => Self::Vhdx,
            FormatArg::Vdi => Self::Vdi,
        }
    }
}

/// Where journals are that no file lies beside: the XDG Base Directory Specification's state directory, `~/.local/state`.
fn state_directory() -> Result<PathBuf, Failure> {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")));
    let Some(state) = state else {
        return Err(Failure::new(
            ExitCode::Usage,
            "neither XDG_STATE_HOME nor HOME names a directory for what an interrupted copy leaves",
            "set one of them",
        ));
    };
    let directory = state.join("volnode/images");
    std::fs::create_dir_all(&directory)
        .map_err(|error| Failure::other(format!("cannot make {}: {error}", directory.display())))?;
    Ok(directory)
}

/// A short name for all of these words, the same each time.
fn short_hash(words: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for word in words {
        hasher.update(&(word.len() as u64).to_be_bytes()).update(word.as_bytes());
    }
    hasher.finalize().to_hex().chars().take(16).collect()
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        let (code, next) = match &error {
            JournalError::Busy(_) => (ExitCode::Precondition, "wait until it has ended"),
            JournalError::Newer(..) => (ExitCode::Other, "use that volctl, or remove the file to begin anew"),
            JournalError::Io { .. } => (ExitCode::Other, ""),
        };
        Self::new(code, error.to_string(), next)
    }
}

impl From<HeaderError> for Failure {
    fn from(error: HeaderError) -> Self {
        let (code, next) = match &error {
            HeaderError::Odd(_) => (ExitCode::Other, "look at the image with qemu-img info"),
            HeaderError::Full => (ExitCode::Usage, "give the base's image a shorter name"),
            HeaderError::Newer(_) => (ExitCode::Other, "use that volctl"),
        };
        Self::new(code, error.to_string(), next)
    }
}

/// Whether nothing but zeroes is there, as far as it can be told without reading data.
async fn is_all_zeroes(store: &Store, size_bytes: u64) -> Result<bool, Failure> {
    is_all_zeroes_from(store, 0, size_bytes).await
}

/// The same from an offset on.
async fn is_all_zeroes_from(store: &Store, mut at: u64, size_bytes: u64) -> Result<bool, Failure> {
    while at < size_bytes {
        let runs =
            store.look(at, size_bytes - at).await.map_err(|error| Failure::other(error.to_string()))?;
        if runs.is_empty() || runs.iter().any(|run| !run.is_zero) {
            return Ok(false);
        }
        at += runs.iter().map(|run| run.length_bytes).sum::<u64>();
    }
    Ok(true)
}

/// Which sides of a copy may come back when their connection was lost: a server does, and a program that we have started does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Returning {
    source: bool,
    destination: bool,
}

/// Of a failure: the connection was lost after the copy had begun, and the same command goes on. No reason of the server's.
const CONNECTION_LOST: &str = "CONNECTION_LOST";
/// How long a server may be away, before its connection counts as lost for good. A restart takes seconds, a reboot minutes.
const RETURN_PATIENCE: Duration = Duration::from_secs(300);
/// Between two attempts.
const RETURN_INTERVAL: Duration = Duration::from_secs(1);

/// Repeats a copy for as long as nothing but its connections fails, each time where it was.
async fn through_losses(
    mut attempt: impl AsyncFnMut() -> Result<Report, Failure>,
) -> Result<Report, Failure> {
    let mut lost_at: Option<Instant> = None;
    loop {
        let failure = match attempt().await {
            Err(failure) if failure.exit_code == ExitCode::Unreachable => failure,
            ended => return ended,
        };
        if failure.reason == CONNECTION_LOST {
            lost_at = Some(Instant::now());
            let line =
                format!("{}; trying again for {} minutes\n", failure.what, RETURN_PATIENCE.as_secs() / 60);
            // Whoever closed stderr does not want to know.
            std::io::stderr().write_all(line.as_bytes()).ok();
        }
        if lost_at.is_none_or(|lost_at| lost_at.elapsed() >= RETURN_PATIENCE) {
            return Err(failure);
        }
        tokio::select! {
            () = tokio::time::sleep(RETURN_INTERVAL) => {}
            _ = tokio::signal::ctrl_c() => {
                let next = "repeat the command: it goes on where it stopped";
                return Err(Failure::new(ExitCode::Other, "interrupted", next));
            }
        }
    }
}

/// Of a call behind a copy: where the server is not there, all of it is repeated, and finds what was copied.
fn lost_behind_a_copy(failure: Failure) -> Failure {
    match failure.exit_code {
        ExitCode::Unreachable => Failure { reason: CONNECTION_LOST.to_owned(), ..failure },
        _ => failure,
    }
}

/// A copy that failed; `next` is how it goes on.
fn copy_failure(error: CopyError, next: &str, returning: Returning) -> Failure {
    let code = match &error {
        CopyError::Source(cause) | CopyError::Destination(cause) if cause.is_no_space() => ExitCode::NoSpace,
        CopyError::Source(cause) | CopyError::Destination(cause) if cause.is_lost_connection() => {
            ExitCode::Unreachable
        }
        _ => ExitCode::Other,
    };
    let next = match &error {
        CopyError::Differs(_) => {
            "the storage, or who else writes there, is not to be trusted; repeat the command with other storage"
        }
        _ => next,
    };
    let comes_back = match &error {
        CopyError::Source(_) => returning.source,
        CopyError::Destination(_) => returning.destination,
        _ => false,
    };
    let mut failure = Failure::new(code, error.to_string(), next);
    if comes_back && code == ExitCode::Unreachable {
        failure.reason = CONNECTION_LOST.to_owned();
    }
    failure
}
