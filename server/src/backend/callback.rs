//! Backends without a descriptor that a ring could work on: their operations complete on threads of their own.
//!
//! Owns: the interface to such a backend, and the life of one operation in it. Never: knows a ring or a mailbox; how an
//! operation that has ended comes back to its ring is behind [`CompletionSink`].
//! Called by: `ring.rs` (submits), `block_status.rs` (asks for extents), `volume/request.rs` (what is announced).
//!
//! ```text
//!   ring thread ─ submit(Operation) ─► backend … its own thread ─ Operation::finish ─► CompletionSink ─ mailbox ─► ring thread
//! ```
//! `volume/request.rs` decides the order of a request's operations, as for a file: a FLUSH is a `Sync` after the writes that were
//! answered before, a FUA write is a `Write` and then a `Sync`, and only one `Sync` of a volume runs on a ring at a time.
//! Snapshots have their place beside [`CallbackBackend::submit`]: an operation that is asked for by the control side
//! between two requests, with the `Sync` before it as its barrier. There is none before a backend can take them.
//! Invariants: an operation ends exactly once, with `EIO` if the backend drops it or gives it a result that it cannot have; its memory is the backend's until then and
//! nobody else's; it counts as in flight for its connection until then, so the connection, its volume and the ring's
//! memory outlive it, whatever happens to the client.
#![allow(unsafe_code)] // An operation names a part of the ring's memory.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use proto::nbd::block_status::ExtentState;
use tracing::error;
use uuid::Uuid;

use super::VolumeOp;

/// The highest errno that there can be, as the kernel's `MAX_ERRNO`.
const ERRNO_MAX: i32 = 4095;

/// A volume's storage that completes by call-back.
///
/// Every ring submits to the same one, so that several [`VolumeOp::Sync`] may run at once, and a failure belongs to all of them:
/// where storage loses what was written, each `Sync` that overlaps that has to fail, whichever ring's it is and whichever began
/// first. One that succeeds says that all that had ended before it was submitted is durable.
///
/// It is dropped once no operation of its volume is in flight, mostly on the gate's thread, for which every client waits that
/// opens a volume or leaves: dropping it must not wait. What takes time belongs on a thread of its own; the opener waits for it,
/// where it has to be over before the volume is opened anew.
pub trait CallbackBackend: Send + Sync + std::fmt::Debug {
    /// Begins an operation. On a ring's thread: must not wait. [`Operation::finish`] may be called at once, from any thread, and
    /// in any order.
    fn submit(&self, operation: Operation);

    /// Tells the extents of a range in their order, without gaps, until `tell` gives false. What is told as a hole or as zeroes has
    /// to have been so at some moment of the call. On a thread that may wait; others who ask wait behind it.
    ///
    /// # Errors
    /// The extents are not known: the rest is taken for data.
    fn extents(&self, range: Range<u64>, tell: &mut dyn FnMut(u64, ExtentState) -> bool) -> io::Result<()>;

    /// What offsets and lengths of requests have to be multiples of, in bytes.
    fn alignment_bytes(&self) -> u32 {
        1
    }

    /// What it is, for the log.
    fn describe(&self) -> &'static str;
}

/// Opens a volume, by its identity and size in bytes, in a backend that completes by call-back. On a thread that may wait.
///
/// It returns only when no operation of a predecessor can land any more, be that an earlier backend of this process, a process
/// that was killed, or another machine: a new session is let in then, and what it reads and writes must not be overwritten by an
/// old one's. The lock of a volume's file, which is taken before, says that of this machine's processes and of the file, not of
/// what they have given to a storage elsewhere.
#[derive(Clone)]
pub struct CallbackOpener(Arc<Open>);

type Open = dyn Fn(Uuid, u64) -> io::Result<Box<dyn CallbackBackend>> + Send + Sync;

impl CallbackOpener {
    /// One that does this.
    pub fn new(
        open: impl Fn(Uuid, u64) -> io::Result<Box<dyn CallbackBackend>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(open))
    }

    /// Opens a volume.
    ///
    /// # Errors
    /// The backend's.
    pub fn open(&self, volume_uid: Uuid, capacity_bytes: u64) -> io::Result<Box<dyn CallbackBackend>> {
        (self.0)(volume_uid, capacity_bytes)
    }
}

impl std::fmt::Debug for CallbackOpener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CallbackOpener")
    }
}

/// An operation that has ended, on its way to the ring that submitted it.
#[derive(Debug)]
pub struct Ended {
    token: u64,
    result: i32,
}

impl Ended {
    /// What the ring gave it to be known by.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Bytes or 0, or a negative errno.
    pub fn result(&self) -> i32 {
        self.result
    }
}

/// Where operations go that have ended.
pub trait CompletionSink: Send + Sync + std::fmt::Debug {
    /// Takes one, from any thread.
    fn ended(&self, ended: Ended);
}

/// An operation that a backend has to do, with the memory that it is about.
#[derive(Debug)]
pub struct Operation {
    op: VolumeOp,
    memory: NonNull<u8>,
    memory_bytes: usize,
    token: u64,
    /// `None` once it has ended.
    sink: Option<Arc<dyn CompletionSink>>,
}

// SAFETY: the memory is valid on every thread, and nobody else's until the operation has ended: see `new`.
unsafe impl Send for Operation {}

impl Operation {
    /// An operation that `sink` will get back as `token`. `memory` is what a READ fills or a WRITE brings, as long as that, and
    /// empty for the others.
    ///
    /// # Safety
    /// The memory is mapped, initialised, and used by nobody else until `sink` was given the token.
    pub(crate) unsafe fn new(
        op: VolumeOp,
        memory: NonNull<[u8]>,
        token: u64,
        sink: Arc<dyn CompletionSink>,
    ) -> Self {
        Self { op, memory: memory.cast(), memory_bytes: memory.len(), token, sink: Some(sink) }
    }

    /// What is to be done. `Allocate` and `Prefetch` may be refused with `EOPNOTSUPP`: zeroes are then written, and the others are
    /// advice.
    pub fn op(&self) -> VolumeOp {
        self.op
    }

    /// The data of a WRITE.
    pub fn data(&self) -> &[u8] {
        // SAFETY: see `new`; it has not ended while it can be borrowed.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.memory_bytes) }
    }

    /// Where the data of a READ belongs.
    pub fn data_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `data`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.memory_bytes) }
    }

    /// It has ended: bytes that were read or written, 0 for the others, or a negative errno. Fewer bytes than were asked for are
    /// continued, and may then be mixed with a write that overlaps them: no less than a block that has to be whole. Anything else,
    /// as more bytes than were asked for, is the backend's fault and counts as `EIO`.
    pub fn finish(mut self, result: i32) {
        self.end(result);
    }

    fn end(&mut self, result: i32) {
        if let Some(sink) = self.sink.take() {
            sink.ended(Ended { token: self.token, result: self.possible(result) });
        }
    }

    /// A result that it can have.
    fn possible(&self, result: i32) -> i32 {
        let bytes_max = match self.op {
            VolumeOp::Read { length_bytes, .. }
            | VolumeOp::Write { length_bytes, .. }
            | VolumeOp::WriteZeroes { length_bytes, .. } => i32::try_from(length_bytes).unwrap_or(i32::MAX),
            VolumeOp::Sync { .. } | VolumeOp::Allocate { .. } | VolumeOp::Prefetch { .. } => 0,
        };
        if (-ERRNO_MAX..=bytes_max).contains(&result) {
            return result;
        }
        error!(op = ?self.op, result, "a backend's fault: its operation ended with what it cannot have done");
        -libc::EIO
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.end(-libc::EIO);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Results(Mutex<Vec<(u64, i32)>>);

    impl CompletionSink for Results {
        fn ended(&self, ended: Ended) {
            self.0.lock().unwrap().push((ended.token(), ended.result()));
        }
    }

    fn operation(memory: &mut [u8], token: u64, results: &Arc<Results>) -> Operation {
        let op =
            VolumeOp::Read { offset_bytes: 0, length_bytes: memory.len() as u32, buffer_offset_bytes: 0 };
        let sink = Arc::clone(results);
        // SAFETY: the tests keep the memory, and use it only when the operation has ended.
        unsafe { Operation::new(op, NonNull::from(memory), token, sink) }
    }

    #[test]
    fn an_operation_ends_once_and_with_an_error_if_it_is_dropped() {
        let results = Arc::<Results>::default();
        let (mut first, mut second) = ([0; 8], [0; 8]);
        let mut read = operation(&mut first, 1, &results);
        read.data_mut().fill(7);
        drop(operation(&mut second, 2, &results));
        std::thread::spawn(move || read.finish(8)).join().unwrap();
        assert_eq!((first, second), ([7; 8], [0; 8]));
        assert_eq!(*results.0.lock().unwrap(), [(2, -libc::EIO), (1, 8)]);
    }

    #[test]
    fn a_result_that_cannot_be_is_an_error() {
        let results = Arc::<Results>::default();
        let mut bytes = [0; 8];
        for (token, result) in [8, 0, -1, -4095, 9, i32::MAX, -4096, i32::MIN].into_iter().enumerate() {
            operation(&mut bytes, token as u64, &results).finish(result);
        }
        let sink = Arc::clone(&results);
        let nothing = NonNull::from(&mut [][..]);
        // SAFETY: it has no memory.
        let sync = unsafe { Operation::new(VolumeOp::Sync { metadata: false }, nothing, 8, sink) };
        sync.finish(1);
        let results: Vec<i32> = results.0.lock().unwrap().iter().map(|(_, result)| *result).collect();
        let eio = -libc::EIO;
        assert_eq!(results, [8, 0, -1, -4095, eio, eio, eio, eio, eio]);
    }
}
