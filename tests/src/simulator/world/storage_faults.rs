//! What the storage machine and its kernel do to the volume: the power goes, and the cache lets go of what it takes for clean.

use super::World;
use crate::simulator::storage::lock;

impl World<'_> {
    /// The cache lets go of what it takes for clean. Not between a failure and the sync that tells of it: what is read then through a
    /// page cache, no server can know. Nor of a volume that is known to have lost writes, until it is opened anew.
    pub(super) fn evict(&mut self) {
        let is_known = self.server.as_ref().is_some_and(|server| server.gate.has_lost_volume());
        if !is_known && self.disk.is_told() && self.disk.evict() {
            self.coverage.count("what could not be written back is evicted");
        }
    }

    pub(super) fn cut_power(&mut self) {
        if let Some(mut server) = self.server.take() {
            if self.rng.bool() {
                server.die(&mut self.links, &mut self.rng, self.coverage);
            } else {
                (0..self.links.len()).for_each(|link| self.stall(link));
            }
        }
        self.coverage.count("a power cut");
        self.disk.power_cut(&mut self.rng);
        self.abandon_settling(self.processes);
        self.catalog.boot += 1;
        lock(&self.catalog.record).lose_power(self.rng.bool());
        self.storage_lost();
    }
}
