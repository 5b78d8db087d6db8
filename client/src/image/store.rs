//! What an image is read from or written to: a file, or an export of an NBD server.
//!
//! Owns: positions and alignment, holes both ways, and durability. A file is read and written on tokio's threads for it. The last block of
//! an export may hold more than the image: what is written there is filled up with zeroes, and what is read is cut off.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use proto::nbd::block_status::ExtentState;
use proto::nbd::{PAYLOAD_BYTES_MAX_DEFAULT, TransmissionFlags};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::CHUNK_BYTES;
use super::input_stream::InputStream;
use super::nbd::{NbdClient, NbdClientError};
use super::plan::Run;

/// Longest request for zeroes or extents, in bytes: a compact header has 32 bits, and every server's blocks divide it.
const REQUEST_BYTES_MAX: u64 = 1 << 31;

/// Reading or writing failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file.
    #[error("cannot {what} the file: {source}")]
    File {
        /// `read`, `write` and so on.
        what: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The export.
    #[error(transparent)]
    Nbd(#[from] NbdClientError),
    /// The export cannot take or give an image like this.
    #[error("{0}")]
    Unfit(String),
}

impl StoreError {
    /// Whether no space is left there.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::File { source, .. } => {
                matches!(Errno::from_io_error(source), Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG))
            }
            Self::Nbd(NbdClientError::Refused { errno, .. }) => *errno == Errno::NOSPC.raw_os_error(),
            _ => false,
        }
    }

    /// Whether a connection was lost, so that another attempt may go better.
    pub fn is_lost_connection(&self) -> bool {
        matches!(self, Self::Nbd(NbdClientError::Lost(_)))
    }
}

/// A file or an export.
#[derive(Debug)]
pub enum Store {
    /// A raw image.
    File(Arc<File>),
    /// An open export.
    Nbd(Box<NbdClient>),
    /// A pipe, which is only read.
    Stream(InputStream),
}

impl Store {
    /// Reads bytes; what is behind the end reads as zeroes.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn read(&self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<u8>, StoreError> {
        match self {
            Self::File(file) => {
                let file = Arc::clone(file);
                blocking("read", move || read_file(&file, offset_bytes, length_bytes as usize)).await
            }
            Self::Nbd(client) => {
                let asked =
                    self.aligned(offset_bytes, length_bytes)?.min(client.export.size_bytes - offset_bytes);
                let mut bytes = Vec::with_capacity(length_bytes as usize);
                while (bytes.len() as u64) < asked {
                    let left = asked - bytes.len() as u64;
                    let part = left.min(self.payload_bytes_max() as u64) as u32;
                    let part = client.read(offset_bytes + bytes.len() as u64, part).await?;
                    if bytes.is_empty() {
                        // The one that there is, as a rule.
                        bytes = part;
                    } else {
                        bytes.extend_from_slice(&part);
                    }
                }
                bytes.resize(length_bytes as usize, 0);
                Ok(bytes)
            }
            Self::Stream(stream) => {
                let read = stream.read(offset_bytes, length_bytes as usize).await;
                read.map_err(|source| StoreError::File { what: "read", source })
            }
        }
    }

    /// Writes some of `bytes`, whose first byte belongs to `offset_bytes`.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn write(
        &self,
        offset_bytes: u64,
        bytes: &Arc<Vec<u8>>,
        range: Range<usize>,
    ) -> Result<(), StoreError> {
        let at = offset_bytes + range.start as u64;
        match self {
            Self::File(file) => {
                let (file, bytes) = (Arc::clone(file), Arc::clone(bytes));
                blocking("write", move || file.write_all_at(&bytes[range], at)).await
            }
            Self::Nbd(client) => {
                let aligned = self.aligned(at, range.len() as u64)? as usize;
                if aligned != range.len() {
                    let mut padded = bytes[range].to_vec();
                    padded.resize(aligned, 0);
                    return Ok(client.write(at, &padded).await?);
                }
                let mut part_at = at;
                for part in bytes[range].chunks(self.payload_bytes_max()) {
                    client.write(part_at, part).await?;
                    part_at += part.len() as u64;
                }
                Ok(())
            }
            Self::Stream(_) => Err(only_read()),
        }
    }

    /// Makes bytes read as zeroes, with holes where that is possible.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn zero(&self, offset_bytes: u64, length_bytes: u64) -> Result<(), StoreError> {
        match self {
            Self::File(file) => {
                let file = Arc::clone(file);
                blocking("write zeroes to", move || zero_file(&file, offset_bytes, length_bytes)).await
            }
            Self::Nbd(client) => {
                let end = offset_bytes + self.aligned(offset_bytes, length_bytes)?;
                let mut at = offset_bytes;
                if client.export.flags.contains(TransmissionFlags::SEND_WRITE_ZEROES) {
                    while at < end {
                        let length = (end - at).min(REQUEST_BYTES_MAX);
                        client.write_zeroes(at, length as u32).await?;
                        at += length;
                    }
                    return Ok(());
                }
                let zeroes = vec![0; CHUNK_BYTES as usize];
                while at < end {
                    let length = (end - at).min(self.payload_bytes_max() as u64).min(CHUNK_BYTES);
                    client.write(at, &zeroes[..length as usize]).await?;
                    at += length;
                }
                Ok(())
            }
            Self::Stream(_) => Err(only_read()),
        }
    }

    /// What is there: at least one run, from `offset_bytes` on.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn look(&self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<Run>, StoreError> {
        match self {
            Self::File(file) => {
                let file = Arc::clone(file);
                blocking("look for holes in", move || look_at_file(&file, offset_bytes, length_bytes)).await
            }
            Self::Stream(stream) => Ok(stream.look(offset_bytes, length_bytes, CHUNK_BYTES)),
            Self::Nbd(client) if !client.tells_extents() => Ok(vec![Run { length_bytes, is_zero: false }]),
            Self::Nbd(client) => {
                let asked = self.aligned(offset_bytes, length_bytes.min(REQUEST_BYTES_MAX))?;
                let asked = asked.min(client.export.size_bytes - offset_bytes);
                let extents = client.extents(offset_bytes, asked as u32).await?;
                let zero = ExtentState::ALLOCATED_ZEROES.0;
                let run = |extent: proto::nbd::block_status::Extent| Run {
                    length_bytes: extent.length_bytes,
                    is_zero: extent.state.0 & zero != 0,
                };
                Ok(extents.into_iter().map(run).collect())
            }
        }
    }

    /// Makes durable what was written before.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn flush(&self) -> Result<(), StoreError> {
        match self {
            Self::File(file) => {
                let file = Arc::clone(file);
                blocking("flush", move || file.sync_data()).await
            }
            Self::Nbd(client) if client.export.flags.contains(TransmissionFlags::SEND_FLUSH) => {
                Ok(client.flush().await?)
            }
            // It says that nothing waits there.
            Self::Nbd(_) | Self::Stream(_) => Ok(()),
        }
    }

    /// What is read from now on comes from the storage, as far as that can be asked for.
    pub async fn forget_cache(&self) {
        if let Self::File(file) = self {
            let file = Arc::clone(file);
            let forget = move || Ok(rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed)?);
            // A check from memory is a check as well.
            let _ = blocking("read", forget).await;
        }
    }

    /// Ends a connection in good order.
    pub async fn close(self) {
        if let Self::Nbd(client) = self {
            client.disconnect().await;
        }
    }

    /// What offsets are multiples of.
    pub fn block_bytes(&self) -> u64 {
        let Self::Nbd(client) = self else { return 1 };
        client.export.block_sizes.map_or(1, |sizes| u64::from(sizes.minimum_bytes))
    }

    fn payload_bytes_max(&self) -> usize {
        let Self::Nbd(client) = self else { return usize::MAX };
        let told = client.export.block_sizes.map(|sizes| sizes.maximum_bytes);
        told.unwrap_or(PAYLOAD_BYTES_MAX_DEFAULT) as usize
    }

    /// A length as the export's blocks ask for it: only the last of an image is no multiple of them.
    fn aligned(&self, offset_bytes: u64, length_bytes: u64) -> Result<u64, StoreError> {
        let Self::Nbd(client) = self else { return Ok(length_bytes) };
        let block = self.block_bytes();
        let aligned = length_bytes.next_multiple_of(block);
        let end = offset_bytes.checked_add(aligned).filter(|end| *end <= client.export.size_bytes);
        match end {
            Some(_) => Ok(aligned),
            None => Err(StoreError::Unfit(format!(
                "the export has {} bytes, and cannot have {length_bytes} at {offset_bytes} in blocks of {block}",
                client.export.size_bytes
            ))),
        }
    }
}

fn only_read() -> StoreError {
    StoreError::Unfit("a pipe is only read".to_owned())
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    act: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(act).await.map_err(io::Error::other).flatten();
    done.map_err(|source| StoreError::File { what, source })
}

fn read_file(file: &File, offset_bytes: u64, length_bytes: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length_bytes];
    let mut filled = 0;
    while filled < length_bytes {
        match file.read_at(&mut bytes[filled..], offset_bytes + filled as u64) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has become shorter")),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

fn zero_file(file: &File, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset_bytes, length_bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {}
        done => return Ok(done?),
    }
    let zeroes = vec![0; CHUNK_BYTES as usize];
    let (mut at, end) = (offset_bytes, offset_bytes + length_bytes);
    while at < end {
        let length = (end - at).min(CHUNK_BYTES);
        file.write_all_at(&zeroes[..length as usize], at)?;
        at += length;
    }
    Ok(())
}

/// The first run of data or hole there. A file system that knows no holes says that all is data.
fn look_at_file(file: &File, offset_bytes: u64, length_bytes: u64) -> io::Result<Vec<Run>> {
    let end = offset_bytes + length_bytes;
    let data = match rustix::fs::seek(file, SeekFrom::Data(offset_bytes)) {
        // No data up to the end.
        Err(Errno::NXIO) => end,
        Err(Errno::INVAL) => return Ok(vec![Run { length_bytes, is_zero: false }]),
        data => data?.min(end),
    };
    if data > offset_bytes {
        return Ok(vec![Run { length_bytes: data - offset_bytes, is_zero: true }]);
    }
    let hole = rustix::fs::seek(file, SeekFrom::Hole(offset_bytes))?.min(end);
    Ok(vec![Run { length_bytes: (hole - offset_bytes).max(1), is_zero: false }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_files_holes_are_found_and_made() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(4 << 20).unwrap();
        file.write_all_at(&vec![7; 1 << 20], 1 << 20).unwrap();
        let store = Store::File(Arc::clone(&file));
        let mut runs: Vec<Run> = Vec::new();
        let mut at = 0;
        while at < 4 << 20 {
            for run in store.look(at, (4 << 20) - at).await.unwrap() {
                at += run.length_bytes;
                match runs.last_mut() {
                    Some(last) if last.is_zero == run.is_zero => last.length_bytes += run.length_bytes,
                    _ => runs.push(run),
                }
            }
        }
        let run = |length_bytes, is_zero| Run { length_bytes, is_zero };
        let holes = [run(1 << 20, true), run(1 << 20, false), run(2 << 20, true)];
        let none = [run(4 << 20, false)];
        assert!(runs == holes || runs == none, "{runs:?}");
        store.zero(1 << 20, 1 << 19).await.unwrap();
        let expected = [vec![0; 1 << 19], vec![7; 1 << 19]].concat();
        assert_eq!(store.read(1 << 20, 1 << 20).await.unwrap(), expected);
        assert!(store.read((4 << 20) - 1, 2).await.is_err(), "it ends before");
    }
}
