//! The first write to a volume that nobody has written to: it waits until the catalog has the volume as written.
//!
//! Owns: who is let go on, and when. Never: knows whether a volume wants the mark; a ring asks where it does (`volume/controls.rs`),
//! with the request held back. Invariant: nobody is let go on before the catalog has answered that the mark is durable; a server that
//! dies in between has a volume that counts as written, with nothing in it.

use std::collections::VecDeque;

use uuid::Uuid;

use super::core::Core;
use super::events::Output;
use crate::ids::ConnectionId;

impl Core {
    /// A connection is about to write. One that is closing, or was not served, needs no answer.
    pub(super) fn wants_mark(&mut self, connection: ConnectionId, outputs: &mut VecDeque<Output>) {
        let known = self.connections.get(&connection).filter(|known| known.is_served() && !known.is_closing);
        if let Some(known) = known {
            outputs.push_back(Output::Mark { volume_uid: known.volume_uid, connection });
        }
    }

    /// The catalog has answered.
    pub(super) fn marked(
        &mut self,
        volume_uid: Uuid,
        connection: ConnectionId,
        is_marked: bool,
        outputs: &mut VecDeque<Output>,
    ) {
        let known = self.connections.get(&connection);
        if let Some(known) = known.filter(|known| known.volume_uid == volume_uid && !known.is_closing) {
            outputs.push_back(Output::GoOn { connection, ring: known.ring, is_marked });
        }
    }
}
