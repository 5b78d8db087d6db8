//! Pages of a file on their way from the page cache into a socket, by reference.
//!
//! ```text
//!   page cache ─ splice, if all of the range is there ─► pipe ─ splice, as the socket takes them ─► socket
//! ```
//! A READ that is copied out of the page cache is copied twice, into a buffer and into the socket; here it is not at all. The
//! pipe is what makes it safe to begin a reply: what it holds cannot be pushed out of memory any more, nor fail to be read.
//!
//! Owns: the pipes of one ring, a fixed number of them. Never: waits for a disk, unless a page is pushed out of memory between the
//! look at the page cache and the splice that follows it; nor for a writer, because only volumes on file systems that take no
//! lock for a splice have a view (`backend/page_cache.rs`).
//! Called by: `ring.rs`. Invariants: a pipe is free, or holds the pages of one request; one that may hold some of a reply that
//! will not be sent is closed, not used again. What a READ holds is in the memory limit (`limits.rs`).
//! Source: splice(2), pipe(7).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::backend::file::FileVolume;
use crate::limits::PAGES_BYTES_MIN;
use crate::limits::PIPE_BYTES_MAX;

/// Whose pages: to be given back with [`PagePipes::release`].
#[derive(Debug, PartialEq, Eq)]
pub struct PipeId(u16);

#[derive(Debug)]
struct Pipe {
    read_end: OwnedFd,
    write_end: OwnedFd,
    held_bytes: usize,
}

/// The pipes of one ring.
#[derive(Debug)]
pub struct PagePipes {
    /// Made when they are first needed, or after one was closed.
    pipes: Vec<Option<Pipe>>,
    /// The last is taken first: of a pipe that was used before, the kernel has the memory at hand.
    free: Vec<u16>,
}

impl PagePipes {
    /// At most `count` READs hold pages at once; 0 where there is no memory for it.
    pub fn new(count: u16) -> Self {
        let pipes = (0..count).map(|_| None).collect();
        Self { pipes, free: (0..count).rev().collect() }
    }

    /// Takes hold of a range of the volume's pages, if all of them are in the page cache, and if it is worth it. `None`: read it.
    pub fn hold(&mut self, volume: &FileVolume, offset_bytes: u64, length_bytes: u32) -> Option<PipeId> {
        // A pipe has room for so many pages, and a range that begins inside one touches a page more.
        let first_page_bytes = offset_bytes % rustix::param::page_size() as u64;
        let has_room = first_page_bytes + u64::from(length_bytes) <= u64::from(PIPE_BYTES_MAX);
        if length_bytes < PAGES_BYTES_MIN
            || !has_room
            || self.free.is_empty()
            || !volume.is_cached(offset_bytes, length_bytes)
        {
            return None;
        }
        let index = self.free.pop()?;
        let place = &mut self.pipes[usize::from(index)];
        if place.is_none() {
            // Where there are no more descriptors, or not for this user (`fs.pipe-user-pages-soft`), it is done without.
            let Ok(pipe) = Pipe::new() else {
                self.free.push(index);
                return None;
            };
            *place = Some(pipe);
        }
        let pipe = PipeId(index);
        let filled = place.as_mut().map(|pipe| pipe.fill(volume.file(), offset_bytes, length_bytes as usize));
        if let Some(Ok(true)) = filled {
            return Some(pipe);
        }
        // Reading it tells what is the matter, if anything is.
        self.release(pipe);
        None
    }

    /// Hands the socket what it takes of what is held: how many bytes. `has_more`: something else follows at once.
    ///
    /// # Errors
    /// splice's; `EAGAIN` when the socket takes none.
    ///
    /// # Panics
    /// When nothing is held.
    pub fn send(&mut self, index: u16, socket: &OwnedFd, has_more: bool) -> io::Result<usize> {
        let Some(pipe) = &mut self.pipes[usize::from(index)] else { panic!("pipe {index} holds nothing") };
        let more = if has_more { SpliceFlags::MORE } else { SpliceFlags::empty() };
        let flags = SpliceFlags::NONBLOCK | more;
        let sent_bytes = splice(&pipe.read_end, None, socket, None, pipe.held_bytes, flags)?;
        pipe.held_bytes -= sent_bytes;
        Ok(sent_bytes)
    }

    /// The reply was sent, or will not be.
    pub fn release(&mut self, pipe: PipeId) {
        let place = &mut self.pipes[usize::from(pipe.0)];
        if place.as_ref().is_some_and(|pipe| pipe.held_bytes > 0) {
            *place = None;
        }
        self.free.push(pipe.0);
    }
}

impl PipeId {
    /// Which pipe it is, as [`PagePipes::send`] wants it.
    pub fn index(&self) -> u16 {
        self.0
    }
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&write_end, PIPE_BYTES_MAX as usize)?;
        Ok(Self { read_end, write_end, held_bytes: 0 })
    }

    /// True: it holds the whole range. False: there is no room for so many pages, or the file ends.
    fn fill(&mut self, file: &File, mut offset_bytes: u64, length_bytes: usize) -> io::Result<bool> {
        while self.held_bytes < length_bytes {
            let rest_bytes = length_bytes - self.held_bytes;
            let offset = Some(&mut offset_bytes);
            match splice(file, offset, &self.write_end, None, rest_bytes, SpliceFlags::NONBLOCK) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(false),
                Ok(held_bytes) => self.held_bytes += held_bytes,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::FileExt as _;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use uuid::Uuid;

    use super::*;
    use crate::backend::file::{self, CacheMode};
    use crate::backend::page_cache::PageCacheView;

    /// A volume that is served through the page cache, of a file system whose pages may be held: where temporary files lie on
    /// another one, in memory. `None`, with the reason said, where this user may have no such pipes.
    fn volume_of(bytes: &[u8]) -> Option<FileVolume> {
        if let Err(error) = Pipe::new() {
            let is_promised = std::env::var_os("VOLNODE_LAB_TOOLS").is_some_and(|value| value == "1");
            assert!(!is_promised, "no pipe of {PIPE_BYTES_MAX} bytes: {error}");
            println!("SKIP no pipe of {PIPE_BYTES_MAX} bytes: {error}");
            return None;
        }
        let in_directory = |dir: &Path| {
            let dir = tempfile::tempdir_in(dir).unwrap();
            let (uid, capacity_bytes) = (Uuid::new_v4(), bytes.len() as u64);
            file::create(dir.path(), uid, capacity_bytes).unwrap();
            let volume = file::open(dir.path(), uid, capacity_bytes, 4096, CacheMode::Buffered, 1).unwrap();
            volume.file().write_all_at(bytes, 0).unwrap();
            volume
        };
        let volume = in_directory(&std::env::temp_dir());
        let is_known = PageCacheView::new(volume.file(), 4096).is_ok();
        Some(if is_known { volume } else { in_directory(Path::new("/dev/shm")) })
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|position| (position % 251) as u8).collect()
    }

    #[test]
    fn what_is_held_is_what_was_there_and_comes_out_in_pieces() {
        let bytes = pattern(2 << 20);
        let Some(volume) = volume_of(&bytes) else { return };
        let mut pipes = PagePipes::new(2);
        for (offset, length) in [(0, 1 << 20), (4096, 256 << 10), (1000, 100_000)] {
            let pipe = pipes.hold(&volume, offset, length).expect("it was just written");
            let (near, mut far) = UnixStream::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            let near = OwnedFd::from(near);
            let (mut arrived, mut piece, mut sent_bytes) = (Vec::new(), vec![0; 64 << 10], 0);
            while arrived.len() < length as usize {
                while sent_bytes < length as usize {
                    match pipes.send(pipe.index(), &near, false) {
                        Ok(more_bytes) => sent_bytes += more_bytes,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        Err(error) => panic!("{error}"),
                    }
                }
                let count = far.read(&mut piece).unwrap();
                arrived.extend_from_slice(&piece[..count]);
            }
            assert!(arrived == bytes[offset as usize..][..length as usize]);
            pipes.release(pipe);
        }
    }

    #[test]
    fn what_is_not_in_the_page_cache_is_left_to_be_read() {
        let Some(volume) = volume_of(&pattern(1 << 20)) else { return };
        volume.file().sync_all().unwrap();
        let mut pipes = PagePipes::new(2);
        rustix::fs::fadvise(volume.file(), 512 << 10, None, rustix::fs::Advice::DontNeed).unwrap();
        // On a file system in memory there is nothing to be evicted.
        let is_cached = volume.is_cached(0, 1 << 20);
        assert_eq!(pipes.hold(&volume, 0, 1 << 20).is_some(), is_cached);
        assert!(pipes.hold(&volume, 0, 256 << 10).is_some(), "the first half is there");
    }

    #[test]
    fn a_range_past_the_end_too_small_too_large_or_one_too_many_is_not_held() {
        let Some(volume) = volume_of(&pattern(2 << 20)) else { return };
        let mut pipes = PagePipes::new(1);
        assert!(pipes.hold(&volume, (2 << 20) - 4096, 64 << 10).is_none());
        assert!(pipes.hold(&volume, 0, 4096).is_none());
        assert!(pipes.hold(&volume, 0, (1 << 20) + 4096).is_none());
        assert!(pipes.hold(&volume, 2048, 1 << 20).is_none(), "a page more than a pipe has room for");
        let held = pipes.hold(&volume, 0, 1 << 20).unwrap();
        assert!(pipes.hold(&volume, 0, 64 << 10).is_none());
        pipes.release(held);
        assert!(pipes.hold(&volume, 0, 64 << 10).is_some(), "nothing of the former is left in it");
    }
}
