//! What a connection is sending: replies as vectors of memory, and pages of a file between them.
//!
//! Owns: the headers, and the order of what is sent. Never: waits for the socket to take more; that is an operation of the ring.
//! Called by: `ring.rs`.
#![allow(unsafe_code)] // sendmsg(2) takes addresses.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use proto::nbd::replies::REPLY_HEAD_BYTES_MAX;
use rustix::fs::sendfile;

use crate::data::io::page_pipes::PagePipes;
use crate::limits::IN_FLIGHT_REQUESTS_MAX;
use crate::region::Region;

/// Pages that are sent as they are.
#[derive(Debug, Clone, Copy)]
struct Pages {
    /// How many of the message's vectors come before them.
    after_vectors: usize,
    place: PagesPlace,
    length_bytes: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum PagesPlace {
    /// In the memory volume's file, from this byte.
    Volume(u64),
    /// In the pipe of this index.
    Pipe(u16),
}

/// What is being sent, in this order: vectors, and pages between them.
pub(super) struct SendArea {
    pub(super) headers: Region,
    pub(super) headers_used_bytes: usize,
    pub(super) text: Vec<u8>,
    vectors: Vec<libc::iovec>,
    first_vector: usize,
    pages: VecDeque<Pages>,
    pub(super) waits_for_room: bool,
}

impl SendArea {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            headers: Region::new(IN_FLIGHT_REQUESTS_MAX * REPLY_HEAD_BYTES_MAX)?,
            headers_used_bytes: 0,
            text: Vec::new(),
            // A header and a payload for each request, and the text; below IOV_MAX (1024).
            vectors: Vec::with_capacity(2 * IN_FLIGHT_REQUESTS_MAX + 1),
            first_vector: 0,
            pages: VecDeque::with_capacity(IN_FLIGHT_REQUESTS_MAX),
            waits_for_room: false,
        })
    }

    /// Adds a range; one that follows the last directly only makes that longer.
    pub(super) fn add(&mut self, start: *mut u8, length_bytes: usize) {
        let follows_pages = self.pages.back().is_some_and(|pages| pages.after_vectors == self.vectors.len());
        if let Some(last) = self.vectors.last_mut()
            && !follows_pages
            && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == start
        {
            last.iov_len += length_bytes;
            return;
        }
        self.vectors.push(libc::iovec { iov_base: start.cast(), iov_len: length_bytes });
    }

    /// Adds pages.
    pub(super) fn add_pages(&mut self, place: PagesPlace, length_bytes: usize) {
        self.pages.push_back(Pages { after_vectors: self.vectors.len(), place, length_bytes });
    }

    /// Sends as much as the socket takes. True: all.
    pub(super) fn send(
        &mut self,
        socket: &OwnedFd,
        file: Option<&File>,
        pipes: &mut PagePipes,
    ) -> io::Result<bool> {
        loop {
            let vectors_end = self.pages.front().map_or(self.vectors.len(), |pages| pages.after_vectors);
            let has_more = self.pages.len() > 1 || self.first_vector < self.vectors.len();
            let sent = if self.first_vector < vectors_end {
                self.send_vectors(socket, vectors_end)
            } else if let Some(pages) = self.pages.front_mut() {
                pages.send(socket, file, pipes, has_more)
            } else {
                break;
            };
            match sent {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
            self.pages.pop_front_if(|pages| pages.length_bytes == 0);
        }
        self.vectors.clear();
        self.first_vector = 0;
        self.headers_used_bytes = 0;
        self.text.clear();
        Ok(true)
    }

    fn send_vectors(&mut self, socket: &OwnedFd, end: usize) -> io::Result<()> {
        let vectors = &mut self.vectors[self.first_vector..end];
        // SAFETY: all zeroes is a valid `msghdr`: null pointers with zero lengths.
        let mut message = unsafe { std::mem::zeroed::<libc::msghdr>() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.len() as _;
        let more = if self.pages.is_empty() { 0 } else { libc::MSG_MORE };
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | more;
        // SAFETY: the vectors name memory of the ring, of this connection or of its volume, which is mapped as long as they
        // are there; the kernel only reads it.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        let sent_bytes = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        self.advance(sent_bytes, end);
        Ok(())
    }

    fn advance(&mut self, mut sent_bytes: usize, end: usize) {
        for vector in &mut self.vectors[self.first_vector..end] {
            let taken_bytes = sent_bytes.min(vector.iov_len);
            vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(taken_bytes).cast();
            vector.iov_len -= taken_bytes;
            sent_bytes -= taken_bytes;
            if vector.iov_len > 0 {
                return;
            }
            self.first_vector += 1;
        }
    }
}

impl Pages {
    /// Hands the socket references to the pages. What is written to them before the peer has taken them arrives there: the
    /// READ is not over for the peer until then, and so may see it.
    fn send(
        &mut self,
        socket: &OwnedFd,
        file: Option<&File>,
        pipes: &mut PagePipes,
        has_more: bool,
    ) -> io::Result<()> {
        let sent_bytes = match (&mut self.place, file) {
            (PagesPlace::Volume(offset_bytes), Some(file)) => {
                sendfile(socket, file, Some(offset_bytes), self.length_bytes)?
            }
            (PagesPlace::Volume(_), None) => panic!("the connection's volume is not in memory"),
            (PagesPlace::Pipe(index), _) => pipes.send(*index, socket, has_more)?,
        };
        if sent_bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.length_bytes -= sent_bytes;
        Ok(())
    }
}
