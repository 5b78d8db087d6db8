//! The end of a queue whose device is gone: its last FLUSH, and its connections.

use super::QueueCore;
use crate::device::queue::block_request::BlockRequest;
use crate::device::queue::io::QueueIo;
use crate::device::queue::link::Loss;

impl QueueCore {
    /// Before the device's end: whether a FLUSH of the queue's own was begun, which [`QueueCore::take_final_flush`] tells of. None is
    /// where nothing was written since the last, and where requests were given up: their users were told by EIO. To be
    /// followed by passes.
    ///
    /// # Errors
    /// The server may have forgotten writes already, for this reason.
    pub fn begin_final_flush(&mut self) -> Result<bool, &'static str> {
        if !self.volatile_cache || !self.unflushed.any() || self.link.gives_up() {
            return Ok(false);
        }
        let tag = self.flush_tag();
        self.unflushed.flush_begins(self.requests.covered_mut(tag));
        // It begins here and now, after every loss that was noticed.
        if self.unflushed.fails_flush(self.unflushed.losses()) {
            return Err("the connection was lost meanwhile");
        }
        self.put_on_connection(tag, BlockRequest::FLUSH);
        Ok(true)
    }

    /// How that FLUSH ended, by a positive errno, once it has.
    pub fn take_final_flush(&mut self) -> Option<Result<(), i32>> {
        let outcome = self.final_flush.take()?;
        let is_believed =
            outcome.is_err() || self.unflushed.flush_succeeded(self.requests.covered(self.flush_tag()));
        Some(if is_believed { outcome } else { Err(libc::EIO) })
    }

    /// The device is gone: shuts down what is there, so that every operation ends, and tells nobody.
    pub fn close<Io: QueueIo>(&mut self, io: &mut Io) {
        self.is_closed = true;
        if self.link.fail(0, Loss::Told("the device is gone".to_owned())) {
            for connection in self.connections() {
                io.shut_down(connection);
            }
        }
    }
}
