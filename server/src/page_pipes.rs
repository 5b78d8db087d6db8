//! Pages of a file on their way from the page cache into a socket, by reference.
//!
//! ```text
//!   page cache ─ splice, if all of the range is there ─► pipe ─ splice, as the socket takes them ─► socket
//! ```
//! A READ that is copied out of the page cache is copied twice, into a buffer and into the socket; here it is not at all. The
//! pipe is what makes it safe to begin a reply: what it holds cannot be pushed out of memory any more, nor fail to be read.
//!
//! Owns: the pipes of one ring, a fixed number of them, and whether this kernel can tell what is in the page cache. Never:
//! waits for a disk, but for one case: a page that is being read while those at both ends of the range were read already.
//! Called by: `ring.rs`. Invariants: a pipe is free, or holds the pages of one request; one that may hold some of a reply that
//! will not be sent is closed, not used again. What a READ holds is in the memory limit (`limits.rs`).
//! Source: splice(2), pipe(7); cachestat(2) is Linux 6.5, `include/uapi/linux/mman.h`.
#![allow(unsafe_code)] // One system call that no library of ours has.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use rustix::io::{Errno, ReadWriteFlags};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// The most that one READ may hold in this way, in bytes: a pipe that needs no privileges (`fs.pipe-max-size`).
pub const HELD_BYTES_MAX: u32 = 1 << 20;

/// Below, copying costs less than the way there.
const HELD_BYTES_MIN: u32 = 32 << 10;

/// `cachestat(2)`, the same on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

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
    is_supported: bool,
}

impl PagePipes {
    /// At most `count` READs hold pages at once; 0 where there is no memory for it.
    pub fn new(count: u16) -> Self {
        let pipes = (0..count).map(|_| None).collect();
        Self { pipes, free: (0..count).rev().collect(), is_supported: count > 0 }
    }

    /// Takes hold of a range of the file's pages, if all of them are in the page cache, and if it is worth it. `None`: read it.
    pub fn hold(&mut self, file: &File, offset_bytes: u64, length_bytes: u32) -> Option<PipeId> {
        let is_of_use = (HELD_BYTES_MIN..=HELD_BYTES_MAX).contains(&length_bytes);
        if !self.is_supported || !is_of_use || self.free.is_empty() {
            return None;
        }
        let last_bytes = offset_bytes + u64::from(length_bytes) - 1;
        match is_cached(file, offset_bytes, length_bytes) {
            Ok(true) if is_read(file, offset_bytes) && is_read(file, last_bytes) => {}
            Err(Errno::NOSYS | Errno::PERM | Errno::ACCESS) => {
                self.is_supported = false;
                return None;
            }
            _ => return None,
        }
        let index = self.free.pop()?;
        let place = &mut self.pipes[usize::from(index)];
        if place.is_none() {
            // Where there are no more descriptors, or not for this user (`fs.pipe-user-pages-soft`), it is done without.
            *place = Some(Pipe::new().ok()?);
        }
        let pipe = PipeId(index);
        let filled = place.as_mut().map(|pipe| pipe.fill(file, offset_bytes, length_bytes as usize));
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
    /// For [`PagePipes::send`].
    pub fn index(&self) -> u16 {
        self.0
    }
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&write_end, HELD_BYTES_MAX as usize)?;
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

/// Whether all pages of the range are in the page cache, read or being read.
fn is_cached(file: &File, offset_bytes: u64, length_bytes: u32) -> Result<bool, Errno> {
    let page_bytes = rustix::param::page_size() as u64;
    let range = [offset_bytes, u64::from(length_bytes)];
    // Pages cached, dirty, in writeback, evicted, recently evicted.
    let mut pages = [0u64; 5];
    let (fd, flags) = (file.as_fd().as_raw_fd(), 0);
    // SAFETY: the kernel reads the range, two numbers of 64 bits, and writes five of them; both are borrowed for the call.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd, range.as_ptr(), pages.as_mut_ptr(), flags) };
    if result != 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    let last_page = (offset_bytes + u64::from(length_bytes) - 1) / page_bytes;
    Ok(pages[0] == last_page - offset_bytes / page_bytes + 1)
}

/// Whether the page of this byte can be read without waiting.
fn is_read(file: &File, offset_bytes: u64) -> bool {
    let mut byte = [0];
    let buffers = &mut [io::IoSliceMut::new(&mut byte)];
    rustix::io::preadv2(file, buffers, offset_bytes, ReadWriteFlags::NOWAIT) == Ok(1)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::FileExt as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn file_of(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|position| (position % 251) as u8).collect()
    }

    #[test]
    fn what_is_held_is_what_was_there_and_comes_out_in_pieces() {
        let bytes = pattern(2 << 20);
        let file = file_of(&bytes);
        let mut pipes = PagePipes::new(2);
        for (offset, length) in [(0, 1 << 20), (4096, 256 << 10), (1000, 100_000)] {
            let pipe = pipes.hold(&file, offset, length).expect("it was just written");
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
        let file = file_of(&pattern(1 << 20));
        file.sync_all().unwrap();
        let mut pipes = PagePipes::new(2);
        let advice = rustix::fs::Advice::DontNeed;
        rustix::fs::fadvise(&file, 512 << 10, None, advice).unwrap();
        // On a file system in memory there is nothing to be evicted.
        let is_evicted = !is_cached(&file, 0, 1 << 20).unwrap();
        assert_eq!(pipes.hold(&file, 0, 1 << 20).is_none(), is_evicted);
        assert!(pipes.hold(&file, 0, 256 << 10).is_some(), "the first half is there");
    }

    #[test]
    fn a_range_past_the_end_too_small_too_large_or_one_too_many_is_not_held() {
        let file = file_of(&pattern(2 << 20));
        let mut pipes = PagePipes::new(1);
        assert!(pipes.hold(&file, (2 << 20) - 4096, 64 << 10).is_none());
        assert!(pipes.hold(&file, 0, 4096).is_none());
        assert!(pipes.hold(&file, 0, (1 << 20) + 4096).is_none());
        assert!(pipes.hold(&file, 2048, 1 << 20).is_none(), "a page more than a pipe has room for");
        let held = pipes.hold(&file, 0, 1 << 20).unwrap();
        assert!(pipes.hold(&file, 0, 64 << 10).is_none());
        pipes.release(held);
        assert!(pipes.hold(&file, 0, 64 << 10).is_some(), "nothing of the former is left in it");
    }
}
