//! A connection's socket, with the memory of what is received and sent through it, and its hold on the volume.
//!
//! Owns: the socket, the receive memory, the send area, and the count of operations in flight. Never: decides what to receive or
//! send; `session_io.rs` does, which has the one record of the connection, and this in it.
//! Called by: `ring.rs` (builds operations on it), `session_io.rs`.
//! Invariants, which with those of `ring.rs` make the safe methods sound:
//! - operations in flight are counted, and nothing that they name is freed before their number is 0: a wire that is dropped
//!   earlier leaks it;
//! - an operation is counted off by its [`Completion`] alone, which there is once; an index is given to a new wire only when the
//!   one before it is drained (`io/run.rs`), so no completion is another's;
//! - receive memory is lent out as a slice only while no receive into it is in flight.
#![allow(unsafe_code)] // Receive memory is written by the kernel; see the invariants above.

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::types;
use tls::kernel::{self, ControlRecord};
use tls::stream::Carrier;

use super::completion::{Completion, OpKind, Outcome};
use super::send_area::SendArea;
use crate::backend::memory::MemoryVolume;
use crate::limits::BULK_BYTES;
use crate::region::Region;
use crate::volume::Volume;

/// What operations name.
struct Memory {
    socket: OwnedFd,
    /// The kernel encrypts what goes through the socket.
    is_ktls: bool,
    bulk: Region,
    bulk_is_lent_to_kernel: bool,
    send: SendArea,
    volume: Option<Arc<Volume>>,
}

/// A connection's socket and memory. It is used with one ring only.
pub struct Wire {
    index: u32,
    memory: ManuallyDrop<Memory>,
    ops_in_flight: u32,
}

impl Wire {
    /// Takes a socket, for the connection of this index in its ring. Allocates.
    ///
    /// # Errors
    /// `ENOMEM`
    pub fn new(index: u32, socket: OwnedFd) -> io::Result<Self> {
        // For sendfile, which has no flag for it; operations of the ring wait all the same.
        rustix::io::ioctl_fionbio(&socket, true)?;
        let memory = Memory {
            socket,
            is_ktls: false,
            bulk: Region::new(BULK_BYTES)?,
            bulk_is_lent_to_kernel: false,
            send: SendArea::new()?,
            volume: None,
        };
        Ok(Self { index, memory: ManuallyDrop::new(memory), ops_in_flight: 0 })
    }

    /// Which connection of its ring it is.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Whether nothing of it is in flight.
    pub fn is_drained(&self) -> bool {
        self.ops_in_flight == 0
    }

    /// The volume that its requests are for.
    pub fn volume(&self) -> Option<&Arc<Volume>> {
        self.memory.volume.as_ref()
    }

    /// Its requests are for this volume from now on.
    pub fn set_volume(&mut self, volume: Arc<Volume>) {
        self.memory.volume = Some(volume);
    }

    /// One of its operations has ended.
    ///
    /// # Panics
    /// When it is another wire's.
    pub fn ended(&mut self, completion: Completion) -> Outcome {
        assert_eq!(completion.index(), self.index, "another wire's completion");
        self.end_op();
        match completion.kind() {
            OpKind::ReceiveBulk => self.memory.bulk_is_lent_to_kernel = false,
            OpKind::RoomToSend => self.memory.send.waits_for_room = false,
            _ => {}
        }
        completion.into_outcome()
    }

    pub(super) fn begin_op(&mut self) {
        self.ops_in_flight += 1;
    }

    pub(super) fn end_op(&mut self) {
        assert!(self.ops_in_flight > 0, "nothing is in flight");
        self.ops_in_flight -= 1;
    }

    pub(super) fn fd(&self) -> types::Fd {
        types::Fd(self.memory.socket.as_raw_fd())
    }

    /// Shuts the socket down. An error means that it is not connected any more, which is what is wanted.
    pub(super) fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.memory.socket, rustix::net::Shutdown::Both);
    }

    /// The memory to receive into, which is the kernel's from now on.
    pub(super) fn lend_bulk(&mut self, range: &Range<usize>) -> *mut u8 {
        self.memory.bulk_is_lent_to_kernel = true;
        self.memory.bulk.address(range.start, range.len())
    }

    /// What is being sent, and where to: the socket, and the memory volume.
    pub(super) fn sending(&mut self) -> (&mut SendArea, &OwnedFd, Option<&MemoryVolume>) {
        let Memory { send, socket, volume, .. } = &mut *self.memory;
        (send, socket, volume.as_deref().and_then(Volume::memory))
    }

    pub(super) fn idle_send(&mut self) -> &mut SendArea {
        let send = &mut self.memory.send;
        assert!(!send.waits_for_room, "the replies before are not sent");
        send
    }

    pub(super) fn volume_memory(&self) -> &MemoryVolume {
        match self.memory.volume.as_deref().and_then(Volume::memory) {
            Some(memory) => memory,
            None => panic!("the connection's volume is not in memory"),
        }
    }

    /// The connection's socket once more, for a TLS handshake.
    ///
    /// # Errors
    /// `EMFILE` and the like.
    pub fn clone_socket(&self) -> io::Result<OwnedFd> {
        self.memory.socket.try_clone()
    }

    /// The connection's socket, for its options.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.memory.socket.as_fd()
    }

    /// The connection's bytes are carried by TLS from now on.
    ///
    /// # Errors
    /// The socket is not one any more.
    ///
    /// # Panics
    /// While operations of it are in flight: they would bring bytes from before.
    pub fn set_carrier(&mut self, carrier: Carrier) -> io::Result<()> {
        assert_eq!(self.ops_in_flight, 0, "operations are in flight");
        match carrier {
            Carrier::Kernel(_same_socket) => self.memory.is_ktls = true,
            Carrier::Relay(near_end) => self.memory.socket = near_end,
        }
        // As in `new`; the handshake has waited on it.
        rustix::io::ioctl_fionbio(&self.memory.socket, true)?;
        Ok(())
    }

    /// After EIO: the TLS record that is not data, if that was the cause.
    pub fn take_control_record(&self) -> Option<ControlRecord> {
        self.memory.is_ktls.then(|| kernel::take_control_record(&self.memory.socket)).flatten()
    }

    /// What was received in bulk.
    ///
    /// # Panics
    /// While a bulk receive is in flight.
    pub fn bulk(&self, range: Range<usize>) -> &[u8] {
        assert!(!self.memory.bulk_is_lent_to_kernel, "a receive is in flight");
        let start = self.memory.bulk.address(range.start, range.len());
        // SAFETY: `address` checked the range; the region outlives the borrow of `self`; no receive into it is in flight
        // and every Rust access goes through this method or `bulk_mut`, under the borrow of `self`.
        unsafe { std::slice::from_raw_parts(start, range.len()) }
    }

    /// The receive memory, to be written.
    ///
    /// # Panics
    /// While a bulk receive is in flight.
    pub fn bulk_mut(&mut self) -> &mut [u8] {
        assert!(!self.memory.bulk_is_lent_to_kernel, "a receive is in flight");
        let start = self.memory.bulk.address(0, BULK_BYTES);
        // SAFETY: as in `bulk`, and the borrow of `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(start, BULK_BYTES) }
    }

    /// Adds bytes to what the next [`Ring::send`](super::Ring::send) sends, before any reply.
    ///
    /// # Panics
    /// While what was added before is not sent, as in the next.
    pub fn add_text(&mut self, text: Vec<u8>) {
        let send = self.idle_send();
        send.text = text;
        let (start, length) = (send.text.as_mut_ptr(), send.text.len());
        send.add(start, length);
    }

    /// Adds a reply's header.
    pub fn add_header(&mut self, header: &[u8]) {
        let send = self.idle_send();
        let target = send.headers.address(send.headers_used_bytes, header.len());
        send.headers_used_bytes += header.len();
        // SAFETY: `address` checked the target's range; what was sent from the headers has left, so nobody else uses them.
        unsafe { std::ptr::copy_nonoverlapping(header.as_ptr(), target, header.len()) };
        send.add(target, header.len());
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.ops_in_flight > 0 {
            let (wire, ops_in_flight) = (self.index, self.ops_in_flight);
            tracing::warn!(
                wire,
                ops_in_flight,
                "a connection ends with operations in flight; its memory stays"
            );
            return;
        }
        // SAFETY: dropped once, here; `memory` is not used again.
        unsafe { ManuallyDrop::drop(&mut self.memory) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::ids::RequestSlot;

    fn wire() -> (Wire, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        (Wire::new(7, near.into()).unwrap(), far)
    }

    #[test]
    fn what_operations_name_stays_when_a_wire_is_dropped_before_they_have_ended() {
        let (mut wire, mut far) = wire();
        wire.begin_op();
        assert!(!wire.is_drained());
        drop(wire);
        let read = far.read(&mut [0]).unwrap_err();
        assert_eq!(read.kind(), io::ErrorKind::WouldBlock, "the socket is open");
        let (mut wire, mut far) = self::wire();
        wire.begin_op();
        wire.ended(Completion::new(OpKind::Cancel, 7, RequestSlot(0), 0));
        assert!(wire.is_drained());
        drop(wire);
        assert_eq!(far.read(&mut [0]).unwrap(), 0, "the socket is closed");
    }

    #[test]
    #[should_panic(expected = "a receive is in flight")]
    fn memory_that_is_received_into_is_not_lent() {
        let (mut wire, _far) = wire();
        wire.lend_bulk(&(0..8));
        wire.bulk(0..8);
    }

    #[test]
    fn memory_is_lent_again_when_the_receive_has_ended() {
        let (mut wire, _far) = wire();
        wire.begin_op();
        wire.lend_bulk(&(0..8));
        wire.ended(Completion::new(OpKind::ReceiveBulk, 7, RequestSlot(0), 8));
        assert_eq!(wire.bulk(0..8), [0; 8]);
    }

    #[test]
    #[should_panic(expected = "another wire's completion")]
    fn the_completion_of_another_is_refused() {
        let (mut wire, _far) = wire();
        wire.begin_op();
        wire.ended(Completion::new(OpKind::ReceiveBulk, 8, RequestSlot(0), 8));
    }
}
