//! An image that comes through a pipe: once, from its beginning to its end, which nobody knows before it is there.
//!
//! Chunks are asked for in any order and given in theirs: whoever is too early waits. Behind the end all is zeroes.
//! Owned by `store.rs`.

use std::fs::File;
use std::io::{self, Read as _};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::sync::Notify;

use super::plan::Run;

/// A pipe, or whatever else is read from.
#[derive(Debug)]
pub struct InputStream {
    state: Arc<Mutex<State>>,
    /// Where it ends, once that is known. Not within the state, which whoever reads holds for as long as the pipe is silent.
    end_bytes: Arc<OnceLock<u64>>,
    moved: Notify,
}

#[derive(Debug)]
struct State {
    file: File,
    /// Read already, and not given yet.
    begin: Vec<u8>,
    position_bytes: u64,
    end_bytes: Arc<OnceLock<u64>>,
}

impl InputStream {
    /// Of a file that was not read from before. Blocks until there are so many bytes, or the end.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn open(file: File, begin_bytes: usize) -> io::Result<Self> {
        let mut begin = Vec::new();
        (&file).take(begin_bytes as u64).read_to_end(&mut begin)?;
        let end_bytes = Arc::new(OnceLock::new());
        let state = State { file, begin, position_bytes: 0, end_bytes: Arc::clone(&end_bytes) };
        Ok(Self { state: Arc::new(Mutex::new(state)), end_bytes, moved: Notify::new() })
    }

    /// What it begins with: as much as was asked for, or all of it.
    pub fn begin(&self) -> Vec<u8> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).begin.clone()
    }

    /// The next bytes, once those before them were taken. What is behind the end needs no turn: others before it may never be asked for.
    ///
    /// # Errors
    /// Those of read(2).
    pub async fn read(&self, offset_bytes: u64, length_bytes: usize) -> io::Result<Vec<u8>> {
        loop {
            let moved = self.moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            if self.is_behind_the_end(offset_bytes) {
                return Ok(vec![0; length_bytes]);
            }
            let state = Arc::clone(&self.state);
            let read = move || {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.position_bytes != offset_bytes {
                    return Ok(None);
                }
                state.next(length_bytes).map(Some)
            };
            if let Some(bytes) = tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?? {
                self.moved.notify_waiters();
                return Ok(bytes);
            }
            moved.await;
        }
    }

    /// What is known of what comes: nothing, before the end.
    pub fn look(&self, offset_bytes: u64, length_bytes: u64, chunk_bytes: u64) -> Vec<Run> {
        match self.is_behind_the_end(offset_bytes) {
            true => vec![Run { length_bytes, is_zero: true }],
            false => vec![Run { length_bytes: length_bytes.min(chunk_bytes), is_zero: false }],
        }
    }

    /// False also where the end is not known yet.
    fn is_behind_the_end(&self, offset_bytes: u64) -> bool {
        self.end_bytes.get().is_some_and(|end| *end <= offset_bytes)
    }

    /// Whether there is nothing behind what was read.
    ///
    /// # Errors
    /// Those of read(2).
    pub async fn is_at_end(&self) -> io::Result<bool> {
        let state = Arc::clone(&self.state);
        let look = move || {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.next(1)?;
            Ok(state.end_bytes.get().is_some())
        };
        tokio::task::spawn_blocking(look).await.map_err(io::Error::other).flatten()
    }
}

impl State {
    fn next(&mut self, length_bytes: usize) -> io::Result<Vec<u8>> {
        let from_begin = self.begin.len().min(length_bytes);
        let mut bytes: Vec<u8> = self.begin.drain(..from_begin).collect();
        (&self.file).take((length_bytes - from_begin) as u64).read_to_end(&mut bytes)?;
        if bytes.len() < length_bytes {
            // The first time counts.
            self.end_bytes.get_or_init(|| self.position_bytes + bytes.len() as u64);
        }
        bytes.resize(length_bytes, 0);
        self.position_bytes += length_bytes as u64;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, SeekFrom, Write as _};

    use super::*;

    #[tokio::test]
    async fn bytes_come_in_their_order_whoever_asks_first_and_zeroes_behind_them() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let stream = InputStream::open(file, 3).unwrap();
        assert_eq!(stream.begin(), b"012");
        let data = Run { length_bytes: 4, is_zero: false };
        assert_eq!(stream.look(0, 100, 4), [data]);
        let (third, second, first) = tokio::join!(stream.read(8, 4), stream.read(4, 4), stream.read(0, 4));
        assert_eq!((first.unwrap(), second.unwrap()), (b"0123".to_vec(), b"4567".to_vec()));
        assert_eq!(third.unwrap(), b"89\0\0");
        assert_eq!(stream.look(12, 100, 4), [Run { length_bytes: 100, is_zero: true }]);
        assert!(stream.is_at_end().await.unwrap());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"01234").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let stream = InputStream::open(file, 3).unwrap();
        stream.read(0, 4).await.unwrap();
        assert!(!stream.is_at_end().await.unwrap(), "a byte is left");
    }

    #[tokio::test]
    async fn what_is_behind_the_end_is_known_at_once_and_waits_for_nobody() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"01234").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let stream = InputStream::open(file, 3).unwrap();
        let patience = std::time::Duration::from_secs(60);
        // What is between them was taken for zeroes, and is never read.
        let both = async { tokio::join!(stream.read(400, 4), stream.read(0, 8)) };
        let (far, first) = tokio::time::timeout(patience, both).await.unwrap();
        assert_eq!((far.unwrap(), first.unwrap()), (vec![0; 4], b"01234\0\0\0".to_vec()));
        let _reading = stream.state.lock().unwrap();
        assert_eq!(stream.look(8, 100, 4), [Run { length_bytes: 100, is_zero: true }]);
    }
}
