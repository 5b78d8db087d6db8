//! Copies of the volume in a simulation: called for at any time, and looked at when they are ready.

use super::World;
use crate::simulator::Failure;

impl World<'_> {
    /// Once in so many chances somebody calls for a copy.
    pub(super) fn perhaps_copy(&mut self, chances: u64) {
        if self.has_faults && self.rng.u64(..chances) == 0 {
            let call = self.history.call_copy();
            self.with_server(|server, world| server.call_copy(call, world));
        }
    }

    /// The call for a copy returns as soon as the server has begun with it.
    pub(super) fn hear_of_copy(&mut self) {
        let now = self.history.now();
        self.with_server(|server, world| server.hear_of_copy(now, world));
    }

    /// A copy that is ready is of one instant of its call.
    pub(super) fn look_at_copy(&mut self) -> Result<(), Failure> {
        let copied = self.server.as_mut().and_then(|server| server.copied.take());
        let Some(copied) = copied else { return Ok(()) };
        self.coverage.count("a copy is ready");
        Ok(self.history.check_copy(copied.call, copied.returned_at, &copied.contents)?)
    }
}
