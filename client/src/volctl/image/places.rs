//! Where an image comes from or goes to: a file, or an export of an NBD server.
//!
//! Owns: what the user gave, opened; and all that it is recognised by when a copy goes on after an interruption.

use std::fs::{File, Metadata};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::UNIX_EPOCH;

use client::image::changes::Changes;
use client::image::format::{self, Format, FormatError};
use client::image::input_stream::InputStream;
use client::image::nbd::{NbdClient, Opening};
use client::image::own_file;
use client::image::partition_table;
use client::image::qcow2_header::{self, Difference};
use client::image::qemu::{self, QemuNbd, Serving};
use client::image::store::{Store, StoreError};
use client::node::target::{NbdUri, Target};
use client::tls_spec::{ClientFiles, TlsSpec};
use proto::nbd::TransmissionFlags;
use proto::nbd::block_status::ALLOCATION_CONTEXT;

use super::{ImportArgs, qemu_failure};
use crate::exit_code::ExitCode;
use crate::failure::Failure;

/// Stands for a pipe.
pub(super) const STDIN: &str = "-";

/// What is imported.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) store: Arc<Store>,
    /// It holds a difference only.
    pub(super) difference: Option<OwnBytes>,
    pub(super) size_bytes: u64,
    pub(super) format: Format,
    /// Where it is: one image at a time.
    pub(super) location: String,
    /// All that shows that it is the same image as before.
    pub(super) identity: String,
    file: Option<(PathBuf, Arc<File>)>,
    /// Ends with the value.
    _server: Option<QemuNbd>,
}

/// What an image of a difference has of its own.
#[derive(Debug)]
pub(super) struct OwnBytes {
    pub(super) changes: Changes,
    /// What it says of its base and of the whole; nothing, if it comes from elsewhere.
    pub(super) said: Option<Difference>,
}

impl Source {
    /// `size_bytes`: of the volume, for a pipe, which does not tell.
    pub(super) async fn open(
        args: &ImportArgs,
        text: &str,
        size_bytes: u64,
        tls: Option<&ClientFiles>,
    ) -> Result<Self, Failure> {
        let said = args.format.map(Format::from);
        if text == STDIN {
            return Self::open_stdin(said, size_bytes);
        }
        if let Some(uri) = nbd_uri(text)? {
            if said.is_some_and(|said| said != Format::Raw) {
                let next = "an export is a disk already: leave --format out";
                return Err(Failure::new(ExitCode::Usage, "--format is for files", next));
            }
            let client = open_uri(&uri, tls).await?;
            let size_bytes = client.export.size_bytes;
            let location = uri.to_string();
            let identity = format!("{location} {size_bytes}");
            let store = Arc::new(Store::Nbd(Box::new(client)));
            return Ok(Self {
                store,
                difference: None,
                size_bytes,
                format: Format::Raw,
                location,
                identity,
                file: None,
                _server: None,
            });
        }
        Self::open_file(Path::new(text), said, args).await
    }

    async fn open_file(path: &Path, said: Option<Format>, args: &ImportArgs) -> Result<Self, Failure> {
        let (is_trusted, is_difference) = (args.trusted, args.apply || args.base.is_some());
        let cannot = |error| Failure::other(format!("cannot read {}: {error}", path.display()));
        let file = File::open(path).map_err(cannot)?;
        let metadata = file.metadata().map_err(cannot)?;
        if !metadata.is_file() {
            let what = format!("{} is no file", path.display());
            return Err(Failure::new(ExitCode::Usage, what, "give an image's file, or an NBD URI"));
        }
        let begin = read_begin(&file, metadata.len()).map_err(cannot)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let format = format::settle(&begin, &name, said).map_err(|error| format_failure(path, &error))?;
        if let Some(why) = format::names_other_files(&begin, format, is_difference).filter(|_| !is_trusted) {
            let next = "if it holds a difference (export --since), give the volume that has its base's content, and --apply; \
                 or, if you know where it comes from, and that it names no secrets of this machine: --trusted";
            let what = format!("{} does not stand for itself: {why}", path.display());
            return Err(Failure::new(ExitCode::Precondition, what, next));
        }
        let full = std::fs::canonicalize(path).map_err(cannot)?;
        let location = full.display().to_string();
        let applied = if is_difference { "applied " } else { "" };
        let identity = format!("{location} {applied}{format} {}", signature(&metadata));
        let file = Arc::new(file);
        if format == Format::Raw && !is_difference {
            let (store, size_bytes) = (Arc::new(Store::File(Arc::clone(&file))), metadata.len());
            let (file, difference) = (Some((full, file)), None);
            return Ok(Self {
                store,
                difference,
                size_bytes,
                format,
                location,
                identity,
                file,
                _server: None,
            });
        }
        let (context, is_alone) = (ALLOCATION_CONTEXT, is_difference);
        let serving =
            Serving { path: &full, file: &file, format, writes: false, is_trusted, is_alone, context };
        let difference = if is_difference { Some(look_at_difference(&begin, &serving).await?) } else { None };
        let (server, client) = qemu::serve(&serving).await.map_err(|error| qemu_failure(&error))?;
        let size_bytes = client.export.size_bytes;
        let (store, file) = (Arc::new(Store::Nbd(Box::new(client))), Some((full, file)));
        Ok(Self { store, difference, size_bytes, format, location, identity, file, _server: Some(server) })
    }

    /// As many bytes as the volume has; what does not come is zeroes.
    fn open_stdin(said: Option<Format>, size_bytes: u64) -> Result<Self, Failure> {
        let cannot = |error| Failure::other(format!("cannot read stdin: {error}"));
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().map_err(cannot)?;
        let stream = InputStream::open(stdin.into(), format::LOOK_BYTES).map_err(cannot)?;
        let format = format::settle(&stream.begin(), "", said);
        match format.map_err(|error| format_failure(Path::new("stdin"), &error))? {
            Format::Raw => {}
            format => {
                let what = format!("{format} cannot be read from a pipe");
                return Err(Failure::new(ExitCode::Usage, what, "import it from a file"));
            }
        }
        // No two pipes are the same.
        let (location, identity) = ("stdin".to_owned(), format!("stdin {}", uuid::Uuid::new_v4()));
        let (store, difference, format) = (Arc::new(Store::Stream(stream)), None, Format::Raw);
        Ok(Self { store, difference, size_bytes, format, location, identity, file: None, _server: None })
    }

    /// Whether a server has it that may come back, or a pipe that does not.
    pub(super) fn is_remote(&self) -> bool {
        self.file.is_none()
    }

    /// What it begins with, as far as it matters for partitions.
    pub(super) async fn begin(&self) -> Result<Vec<u8>, StoreError> {
        match &*self.store {
            Store::Stream(stream) => Ok(stream.begin()),
            store => store.read(0, self.size_bytes.min(partition_table::LOOK_BYTES as u64)).await,
        }
    }

    /// Whether all of it was read.
    pub(super) async fn check_end(&self) -> Result<(), Failure> {
        let Store::Stream(stream) = &*self.store else { return Ok(()) };
        match stream.is_at_end().await {
            Ok(true) => Ok(()),
            Ok(false) => {
                let what = format!("stdin has more than the {} bytes of the volume", self.size_bytes);
                Err(Failure::new(ExitCode::Usage, what, "import it into a larger volume"))
            }
            Err(error) => Err(Failure::other(format!("cannot read stdin: {error}"))),
        }
    }

    /// Whether a file is as it was when it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), Failure> {
        let Some((path, file)) = &self.file else { return Ok(()) };
        let metadata = file.metadata().map_err(|error| Failure::other(error.to_string()))?;
        if self.identity.ends_with(&signature(&metadata)) {
            return Ok(());
        }
        let what = format!("{} was changed while it was read", path.display());
        Err(Failure::new(ExitCode::Precondition, what, "repeat the command when nobody writes to it"))
    }
}

/// What is applied of an image, and to what.
async fn look_at_difference(begin: &[u8], serving: &Serving<'_>) -> Result<OwnBytes, Failure> {
    let path = serving.path.display();
    if serving.format != Format::Qcow2 {
        let what = format!("{path} is {}, and only a qcow2 holds a difference", serving.format);
        return Err(Failure::new(
            ExitCode::Usage,
            what,
            "leave --apply and --base out, for an image that is whole",
        ));
    }
    let (backing_name, said) = qcow2_header::read(begin)?;
    if backing_name.is_none() && said.is_none() {
        let what = format!("{path} names no base: it is whole");
        return Err(Failure::new(ExitCode::Usage, what, "leave --apply and --base out"));
    }
    let changes = qemu::own_bytes(serving).await.map_err(|error| qemu_failure(&error))?;
    Ok(OwnBytes { changes, said })
}

/// What changes when a file is written to.
fn signature(metadata: &Metadata) -> String {
    let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
    format!("{}:{} {} {seconds}.{nanoseconds:09}", metadata.dev(), metadata.ino(), metadata.len())
}

fn read_begin(file: &File, size_bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut begin = vec![0; size_bytes.min(format::LOOK_BYTES as u64) as usize];
    file.read_exact_at(&mut begin, 0)?;
    Ok(begin)
}

fn format_failure(path: &Path, error: &FormatError) -> Failure {
    let next = match error {
        FormatError::Ambiguous { .. } => {
            "say what it is: --format qcow2 (or vmdk, vhdx, vdi); or --format raw for a disk whose user has written that"
        }
        FormatError::Misnamed { .. } => "say what it is: --format raw imports it byte by byte",
        FormatError::NotThat { .. } => "look at it with qemu-img info, or leave --format out",
        FormatError::Compressed { .. } => {
            "decompress it first; --format raw imports it byte by byte, as it is"
        }
    };
    Failure::new(ExitCode::Usage, format!("{}: {error}", path.display()), next)
}

/// What the user gave, if it is a URI.
pub(super) fn nbd_uri(text: &str) -> Result<Option<NbdUri>, Failure> {
    if !text.contains("://") {
        return Ok(None);
    }
    match Target::parse(text) {
        Ok(Target::Nbd(uri)) => Ok(Some(uri)),
        Ok(Target::Volume(_) | Target::Snapshot(_)) => Ok(None),
        Err(error) => Err(Failure::new(ExitCode::Usage, error.to_string(), "")),
    }
}

pub(super) async fn open_uri(uri: &NbdUri, files: Option<&ClientFiles>) -> Result<NbdClient, Failure> {
    let tls = uri.certificate_name().map(|name| {
        let files = files.cloned().ok_or_else(|| {
            let next = "give the file with --tls-ca (or VOLNODE_TLS_CA)";
            Failure::new(ExitCode::Usage, "TLS needs the certificate of the server's authority", next)
        })?;
        let server_name = name.to_owned();
        let key_bytes_max = tls::kernel::KEY_BYTES_MAX;
        Ok::<_, Failure>(TlsSpec { files, server_name, user_space_only: true, key_bytes_max })
    });
    let opening = Opening {
        addresses: vec![uri.address()],
        export_name: uri.export_name.clone(),
        context: ALLOCATION_CONTEXT.to_owned(),
        tls: tls.transpose()?,
    };
    NbdClient::open(opening).await.map_err(|error| {
        let next = "check that the NBD server runs, and has the export; then repeat the command";
        Failure::new(ExitCode::Unreachable, format!("cannot open {uri}: {error}"), next)
    })
}

/// A file that an image is written to: beside the place where it will be, until it is whole. There is none before it is opened.
#[derive(Debug)]
pub(super) struct PartFile {
    target: PathBuf,
    pub(super) path: PathBuf,
    is_forced: bool,
    opened: OnceLock<Opened>,
}

#[derive(Debug)]
struct Opened {
    file: Arc<File>,
    /// There was none of that name before.
    is_new: bool,
}

impl PartFile {
    /// Looks whether an image may be there; makes nothing.
    pub(super) fn place(target: &Path, is_forced: bool) -> Result<Self, Failure> {
        let already = std::fs::symlink_metadata(target);
        if let Ok(there) = already {
            if !is_forced {
                let what = format!("{} is there already", target.display());
                return Err(Failure::new(
                    ExitCode::AlreadyExists,
                    what,
                    "choose another name, or replace it: --force",
                ));
            }
            if !there.is_file() {
                let what = format!("{} is no file", target.display());
                return Err(Failure::new(ExitCode::Usage, what, "give a file's name, or an NBD URI"));
            }
        }
        let (target, path) = (target.to_owned(), beside(target, ".part"));
        Ok(Self { target, path, is_forced, opened: OnceLock::new() })
    }

    pub(super) fn journal(&self) -> PathBuf {
        beside(&self.target, ".part.journal")
    }

    /// The target's full name, by whatever way it was given.
    pub(super) fn location(&self) -> Result<String, Failure> {
        let Some(name) = self.target.file_name() else {
            let what = format!("{} is no file's name", self.target.display());
            return Err(Failure::new(ExitCode::Usage, what, "give a file's name, or an NBD URI"));
        };
        let folder = std::fs::canonicalize(self.folder()).map_err(|error| self.failure(&error))?;
        Ok(folder.join(name).display().to_string())
    }

    fn folder(&self) -> &Path {
        let folder = self.target.parent().filter(|folder| !folder.as_os_str().is_empty());
        folder.unwrap_or(Path::new("."))
    }

    /// Makes the file, or opens what an earlier run has left: `is_known` says that there was one. It holds nothing of anybody else's then.
    pub(super) fn open(&self, is_known: bool) -> Result<(), Failure> {
        let cannot = |error: std::io::Error| {
            let next = match error.kind() {
                std::io::ErrorKind::PermissionDenied => "choose another name, or remove what is there",
                _ => "",
            };
            Failure::new(ExitCode::Other, format!("cannot write {}: {error}", self.path.display()), next)
        };
        let (file, is_new) = match own_file::make(&self.path, 0o666) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                (own_file::open(&self.path).map_err(cannot)?, false)
            }
            made => (made.map_err(cannot)?, true),
        };
        let length_bytes = file.metadata().map_err(cannot)?.len();
        if !is_new && !is_known && !self.is_forced && length_bytes > 0 {
            let path = self.path.display();
            let what = format!("{path} is there already, and of no export that is known here");
            let next = "choose another name, or overwrite it: --force";
            return Err(Failure::new(ExitCode::AlreadyExists, what, next));
        }
        self.opened.get_or_init(|| Opened { file: Arc::new(file), is_new });
        Ok(())
    }

    /// The open file.
    pub(super) fn file(&self) -> Result<&Arc<File>, Failure> {
        let opened = self.opened.get().map(|opened| &opened.file);
        opened.ok_or_else(|| Failure::other(format!("{} was not opened", self.path.display())))
    }

    /// All that shows that it is the same file as before: a file that is made later may get the number of one that was deleted.
    pub(super) fn identity(&self) -> Result<String, Failure> {
        let metadata = self.file()?.metadata().map_err(|error| self.failure(&error))?;
        // Not every file system has it.
        let born = metadata.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        let born = born.map(|born| format!(" {}.{:09}", born.as_secs(), born.subsec_nanos()));
        Ok(format!("file {}:{}{}", metadata.dev(), metadata.ino(), born.unwrap_or_default()))
    }

    /// Whether it is as long as an export makes it when it begins.
    pub(super) fn is_begun(&self, format: Format, size_bytes: u64) -> Result<bool, Failure> {
        let length_bytes = self.file()?.metadata().map_err(|error| self.failure(&error))?.len();
        Ok(if format == Format::Raw { length_bytes == size_bytes } else { length_bytes > 0 })
    }

    /// Takes away what was made by opening it, and nothing else.
    pub(super) fn remove_if_new(&self) {
        if self.opened.get().is_some_and(|opened| opened.is_new) {
            // It is in nobody's way.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Puts other bytes where the file begins.
    pub(super) fn write_begin(&self, bytes: &[u8]) -> Result<(), Failure> {
        self.file()?.write_all_at(bytes, 0).map_err(|error| self.failure(&error))
    }

    /// The file's first bytes, at most so many.
    pub(super) fn read_begin(&self, bytes_max: usize) -> Result<Vec<u8>, Failure> {
        let file = self.file()?;
        let length_bytes = file.metadata().map_err(|error| self.failure(&error))?.len();
        let mut begin = vec![0; length_bytes.min(bytes_max as u64) as usize];
        file.read_exact_at(&mut begin, 0).map_err(|error| self.failure(&error))?;
        Ok(begin)
    }

    /// The name that it will have.
    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Nothing but zeroes, so many.
    pub(super) fn clear(&self, size_bytes: u64) -> Result<(), Failure> {
        let file = self.file()?;
        let cleared = file.set_len(0).and_then(|()| file.set_len(size_bytes));
        cleared.map_err(|error| self.failure(&error))
    }

    /// The image is whole: gives it its name.
    pub(super) fn finish(&self) -> Result<(), Failure> {
        self.file()?.sync_all().map_err(|error| self.failure(&error))?;
        let flags = if self.is_forced {
            rustix::fs::RenameFlags::empty()
        } else {
            rustix::fs::RenameFlags::NOREPLACE
        };
        let cwd = rustix::fs::CWD;
        match rustix::fs::renameat_with(cwd, &self.path, cwd, &self.target, flags) {
            // A file system that cannot look and rename at once.
            Err(rustix::io::Errno::INVAL) if !self.target.exists() => {
                std::fs::rename(&self.path, &self.target).map_err(|error| self.failure(&error))?;
            }
            renamed => renamed.map_err(|error| self.failure(&error.into()))?,
        }
        let synced = File::open(self.folder()).and_then(|folder| folder.sync_all());
        synced.map_err(|error| self.failure(&error))
    }

    fn failure(&self, error: &std::io::Error) -> Failure {
        let no_space = rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::NOSPC);
        let code = if no_space { ExitCode::NoSpace } else { ExitCode::Other };
        Failure::new(code, format!("cannot write {}: {error}", self.target.display()), "")
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Why an export cannot be written to.
pub(super) fn check_writable(uri: &NbdUri, client: &NbdClient, size_bytes: u64) -> Result<(), Failure> {
    let flags = client.export.flags;
    if flags.contains(TransmissionFlags::READ_ONLY) {
        return Err(Failure::new(ExitCode::Precondition, format!("{uri} is read-only"), ""));
    }
    let there = client.export.size_bytes;
    if there < size_bytes {
        let what = format!("{uri} has {there} bytes, and the volume {size_bytes}");
        return Err(Failure::new(ExitCode::Usage, what, "make the export larger"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn nothing_of_anybody_elses_becomes_an_image() {
        let folder = tempfile::tempdir().unwrap();
        let (target, other) = (folder.path().join("a.img"), folder.path().join("other"));
        fs::write(&other, "other").unwrap();
        let open = |is_forced, is_known| {
            let part = PartFile::place(&target, is_forced).unwrap();
            part.open(is_known).map(|()| part)
        };
        let path = PartFile::place(&target, false).unwrap().path;
        assert!(!path.exists(), "nothing is made before it is opened");
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(open(true, true).unwrap_err().to_string().contains("symbolic link"));
        fs::remove_file(&path).unwrap();
        fs::hard_link(&other, &path).unwrap();
        assert!(open(true, true).unwrap_err().to_string().contains("2 names"));
        assert_eq!(fs::read(&other).unwrap(), b"other");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        assert_eq!(open(false, false).unwrap_err().exit_code, ExitCode::AlreadyExists);
        // Neither is it made here, nor taken away.
        open(false, true).unwrap().remove_if_new();
        open(true, false).unwrap().remove_if_new();
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        open(false, false).unwrap().remove_if_new();
        assert!(!path.exists());
    }

    #[test]
    fn a_part_that_is_not_as_it_was_left_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let part = PartFile::place(&folder.path().join("a.img"), false).unwrap();
        part.open(false).unwrap();
        let is_begun = |format| part.is_begun(format, 5).unwrap();
        assert!(!is_begun(Format::Raw) && !is_begun(Format::Qcow2));
        part.clear(5).unwrap();
        assert!(is_begun(Format::Raw) && is_begun(Format::Qcow2));
        part.clear(4).unwrap();
        assert!(!is_begun(Format::Raw) && is_begun(Format::Qcow2));
        let full = fs::canonicalize(folder.path()).unwrap().join("a.img");
        assert_eq!(part.location().unwrap(), full.display().to_string());
    }
}
