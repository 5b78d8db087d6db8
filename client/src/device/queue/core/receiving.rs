//! Where replies and a READ's payload come in: what a queue receives next, on a connection that is there.

use proto::nbd::transmission::SIMPLE_REPLY_BYTES;

use super::{QueueCore, assert_ours};
use crate::device::queue::io::QueueIo;

impl QueueCore {
    /// Receives what the stream holds next, or the rest of what stopped short.
    pub(super) fn receive<Io: QueueIo>(&mut self, io: &mut Io, connection: u16) {
        let is_up = self.is_up();
        let lane = &mut self.lanes[usize::from(connection)];
        if lane.incoming.operations_out() > 0 || !is_up {
            return;
        }
        let inbox_end = match lane.connection.expects_large_payload() {
            true => SIMPLE_REPLY_BYTES,
            false => io.inbox_bytes(),
        };
        let (payload, part) = lane.incoming.push(inbox_end);
        let is_idle = lane.connection.in_flight() == u16::from(payload.is_some());
        if let Some((tag, rest)) = payload {
            let pages = self.pages(tag, rest);
            assert_ours(self.tags.operation_submitted(tag));
            io.receive_payload(connection, pages);
        }
        io.receive_inbox(connection, part, is_idle);
    }
}
