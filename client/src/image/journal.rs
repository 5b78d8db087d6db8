//! How far a copy has come, on disk: what a run that was interrupted leaves for the next one.
//!
//! A line of JSON says what is copied ([`JournalHead`]); behind it come records of 40 bytes: how many chunks (4, big-endian), the BLAKE3
//! digest of each (32), and the first 4 bytes of the BLAKE3 of those and of the record's number. Records are in the image's order, and are appended
//! once the destination has made their chunks durable. A record that is torn, or was never written, ends what counts.
//! While a run is at it, it holds a lock on the file.
//! Format: listed in `docs/formats.md`; a newer version is refused.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use file_lock::lock_alone;
use serde::{Deserialize, Serialize};

use super::content::ImageDigest;
use super::own_file;
use super::plan::Piece;

/// Version of the format.
pub const JOURNAL_VERSION: u32 = 1;
/// Longest first line, in bytes.
const HEAD_BYTES_MAX: u64 = 1 << 16;
const RECORD_BYTES: usize = 40;

/// What is copied, and what that was like when the copy began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalHead {
    /// [`JOURNAL_VERSION`]
    pub format_version: u32,
    /// All that the source is recognised by.
    pub source: String,
    /// All that the destination is recognised by.
    pub destination: String,
    /// Of the image.
    pub size_bytes: u64,
    /// The destination was known to be all zeroes when the copy began.
    pub was_zero: bool,
}

/// The journal of a copy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another run has it.
    #[error("another volctl is at this copy: it holds {0}")]
    Busy(PathBuf),
    /// A newer program's.
    #[error("{0} was written by a newer volctl (format {1}; this one knows {JOURNAL_VERSION})")]
    Newer(PathBuf, u32),
    /// The file system.
    #[error("cannot keep the journal {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
}

/// A copy's journal, locked.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    head: Option<JournalHead>,
    pieces: Vec<Piece>,
    records: u64,
}

impl Journal {
    /// Opens the journal at `path`, or makes an empty one, which has no head yet. Its directory may be one that others may write to, too.
    ///
    /// # Errors
    /// [`JournalError`], by cause.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let io_error = |source| JournalError::Io { path: path.to_owned(), source };
        let file = loop {
            let file = match own_file::make(path, 0o600) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match own_file::open(path) {
                    // It was taken away meanwhile.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    opened => opened.map_err(io_error)?,
                },
                made => made.map_err(io_error)?,
            };
            if !lock_alone(&file).map_err(io_error)? {
                return Err(JournalError::Busy(path.to_owned()));
            }
            // Who had it before may have ended, and taken the file away.
            if is_same_file(&file, path).map_err(io_error)? {
                break file;
            }
        };
        let mut journal = Self { path: path.to_owned(), file, head: None, pieces: Vec::new(), records: 0 };
        journal.load()?;
        Ok(journal)
    }

    fn load(&mut self) -> Result<(), JournalError> {
        let io_error = |path: &Path, source| JournalError::Io { path: path.to_owned(), source };
        let mut reader = BufReader::new(&self.file);
        let mut line = Vec::new();
        reader
            .by_ref()
            .take(HEAD_BYTES_MAX)
            .read_until(b'\n', &mut line)
            .map_err(|error| io_error(&self.path, error))?;
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        if let Ok(Version { format_version }) = serde_json::from_slice(&line)
            && format_version > JOURNAL_VERSION
        {
            return Err(JournalError::Newer(self.path.clone(), format_version));
        }
        // One that was torn at its first line is as good as none.
        let head = if line.ends_with(b"\n") { serde_json::from_slice(&line).ok() } else { None };
        if head.is_some() {
            let mut record = [0; RECORD_BYTES];
            while reader.read_exact(&mut record).is_ok() {
                let Some(piece) = decode(&record, self.records) else { break };
                self.records += 1;
                push(&mut self.pieces, piece);
            }
            // What is appended goes over what is torn.
            let end = line.len() as u64 + self.records * RECORD_BYTES as u64;
            self.file.set_len(end).map_err(|error| io_error(&self.path, error))?;
            self.file.seek(SeekFrom::Start(end)).map_err(|error| io_error(&self.path, error))?;
        }
        self.head = head;
        Ok(())
    }

    /// What is copied; none in a journal that was just made.
    pub fn head(&self) -> Option<&JournalHead> {
        self.head.as_ref()
    }

    /// Chunks that are copied, in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// How many chunks are copied.
    pub fn chunks(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.count).sum()
    }

    /// The digest of all chunks that are copied.
    pub fn digest(&self) -> String {
        let mut digest = ImageDigest::default();
        for piece in &self.pieces {
            digest.add(piece.count, &piece.digest);
        }
        digest.finish()
    }

    /// Begins anew: nothing is copied. Durable when it returns, for a run that dies later must find that it has begun.
    ///
    /// # Errors
    /// [`JournalError::Io`]
    pub fn begin(&mut self, head: JournalHead) -> Result<(), JournalError> {
        let written = (|| {
            self.file.set_len(0)?;
            self.file.seek(SeekFrom::Start(0))?;
            let mut line = serde_json::to_vec(&head)?;
            line.push(b'\n');
            self.file.write_all(&line)?;
            self.file.sync_all()?;
            let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
        })();
        written.map_err(|source| self.io_error(source))?;
        (self.head, self.pieces, self.records) = (Some(head), Vec::new(), 0);
        Ok(())
    }

    /// These chunks are copied and durable, too. A record that is lost is copied once more: nothing here waits for the disk.
    ///
    /// # Errors
    /// [`JournalError::Io`]
    pub fn append(&mut self, pieces: &[Piece]) -> Result<(), JournalError> {
        let mut bytes = Vec::with_capacity(pieces.len() * RECORD_BYTES);
        let mut records = self.records;
        for piece in pieces {
            let mut left = piece.count;
            while left > 0 {
                let count = left.min(u64::from(u32::MAX));
                bytes.extend_from_slice(&encode(&Piece { count, ..*piece }, records));
                left -= count;
                records += 1;
            }
        }
        self.file.write_all(&bytes).map_err(|source| self.io_error(source))?;
        self.records = records;
        for piece in pieces {
            push(&mut self.pieces, *piece);
        }
        Ok(())
    }

    /// The copy has ended, or is given up.
    ///
    /// # Errors
    /// [`JournalError::Io`]
    pub fn remove(self) -> Result<(), JournalError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.io_error(error)),
            _ => Ok(()),
        }
    }

    fn io_error(&self, source: io::Error) -> JournalError {
        JournalError::Io { path: self.path.clone(), source }
    }
}

fn is_same_file(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last) if last.digest == piece.digest => last.count += piece.count,
        _ => pieces.push(piece),
    }
}

fn check(record: &[u8], number: u64) -> [u8; 4] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(record).update(&number.to_be_bytes());
    let [a, b, c, d, ..] = *hasher.finalize().as_bytes();
    [a, b, c, d]
}

fn encode(piece: &Piece, number: u64) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..4].copy_from_slice(&(piece.count as u32).to_be_bytes());
    record[4..36].copy_from_slice(&piece.digest);
    let check = check(&record[..36], number);
    record[36..].copy_from_slice(&check);
    record
}

fn decode(record: &[u8; RECORD_BYTES], number: u64) -> Option<Piece> {
    if check(&record[..36], number) != record[36..] {
        return None;
    }
    let (count, rest) = record.split_first_chunk::<4>()?;
    let (digest, _) = rest.split_first_chunk::<32>()?;
    let count = u64::from(u32::from_be_bytes(*count));
    (count > 0).then_some(Piece { count, digest: *digest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> JournalHead {
        JournalHead {
            format_version: JOURNAL_VERSION,
            source: "/images/a.img 10 7".into(),
            destination: "volume u".into(),
            size_bytes: 10,
            was_zero: true,
        }
    }

    const A: Piece = Piece { count: 3, digest: [1; 32] };
    const B: Piece = Piece { count: 1, digest: [2; 32] };

    #[test]
    fn what_was_appended_is_there_for_the_next_run_and_two_runs_are_not_at_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j");
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!((journal.head(), journal.chunks()), (None, 0));
        journal.begin(head()).unwrap();
        journal.append(&[A]).unwrap();
        journal.append(&[A, B]).unwrap();
        assert!(matches!(Journal::open(&path), Err(JournalError::Busy(_))));
        let digest = journal.digest();
        drop(journal);
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.head(), Some(&head()));
        assert_eq!((journal.pieces(), journal.chunks()), (&[Piece { count: 6, ..A }, B][..], 7));
        assert_eq!(journal.digest(), digest);
        journal.begin(head()).unwrap();
        assert_eq!(journal.chunks(), 0, "begun anew");
        journal.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_torn_journal_counts_as_far_as_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j");
        let mut journal = Journal::open(&path).unwrap();
        journal.begin(head()).unwrap();
        journal.append(&[A, B]).unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        let head_bytes = whole.len() - 2 * RECORD_BYTES;
        for end in 0..whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            let mut journal = Journal::open(&path).unwrap();
            let chunks = if end < head_bytes + RECORD_BYTES { 0 } else { 3 };
            assert_eq!((journal.head().is_some(), journal.chunks()), (end >= head_bytes, chunks), "{end}");
            if journal.head().is_some() {
                journal.append(&[B]).unwrap();
                drop(journal);
                assert_eq!(Journal::open(&path).unwrap().chunks(), chunks + 1, "{end}");
            }
        }
        // Blocks that a file system had not written when the power went.
        let mut zeroed = whole.clone();
        zeroed[head_bytes + RECORD_BYTES..].fill(0);
        fs::write(&path, &zeroed).unwrap();
        assert_eq!(Journal::open(&path).unwrap().chunks(), 3);
        fs::write(&path, whole[head_bytes..].repeat(3000)).unwrap();
        assert_eq!(Journal::open(&path).unwrap().head(), None, "no journal at all");
    }

    #[test]
    fn a_newer_programs_journal_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j");
        fs::write(&path, "{\"format_version\":2,\"more\":1}\n").unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(matches!(error, JournalError::Newer(_, 2)), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"{\"format_version\":2,\"more\":1}\n");
    }

    #[test]
    fn a_name_that_somebody_else_has_put_there_leads_to_no_other_file() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("j"), folder.path().join("other"));
        let there = serde_json::to_vec(&head()).unwrap();
        fs::write(&other, [&there[..], b"\nmore than a journal has"].concat()).unwrap();
        let before = fs::read(&other).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(error.to_string().ends_with("it is a symbolic link"), "{error}");
        fs::remove_file(&path).unwrap();
        fs::hard_link(&other, &path).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(error.to_string().contains("2 names"), "{error}");
        assert_eq!(fs::read(&other).unwrap(), before, "not cut off");
    }
}
