//! The simulated copier: the product's own plan of a copy, with the disk of the simulation.
//!
//! Stands for `server/src/data/copies.rs` and `server/src/volume/snapshot/copier.rs`. Sharing a piece and marking it are two steps: in
//! between, requests come and find that they have to wait.

use std::rc::Rc;
use std::sync::Arc;

use server::ids::RequestSlot;
use server::volume::Volume;
use server::volume::snapshot::copy_before_write::{CopyPlan, HeldRequest, PieceMap, Step};

use super::Mutant;
use super::disk::{COPIER, Owner};
use super::storage::Surroundings;
use crate::block_history::{BLOCK_BYTES, CopyCall};

/// The unit of a copy: less than many requests have.
const PIECE_BYTES: u64 = BLOCK_BYTES as u64;

/// A copy that is ready.
pub(super) struct Copied {
    pub(super) call: CopyCall,
    /// As the history had it when the call returned.
    pub(super) returned_at: u64,
    pub(super) contents: Vec<u8>,
}

/// A copy that is being made.
pub(super) struct Copier {
    volume: Rc<Volume>,
    map: Arc<PieceMap>,
    plan: CopyPlan,
    /// Shared, or with a rule broken marked, and not yet the other.
    begun: Option<Step>,
    is_synced: Option<bool>,
    copied: Copied,
    mutant: Option<Mutant>,
}

impl Copier {
    /// The volume is open, and the copy begins.
    pub(super) fn begin(
        volume: Rc<Volume>,
        call: CopyCall,
        returned_at: u64,
        process: u64,
        mutant: Option<Mutant>,
        world: &mut Surroundings<'_>,
    ) -> Self {
        world.disk.opened_to_copy(process);
        let map = Arc::new(PieceMap::new(volume.capacity_bytes, PIECE_BYTES));
        let plan = CopyPlan::begin(&[(Some(volume.copy_before_write()), Arc::clone(&map))]);
        let contents = vec![0; world.catalog.capacity_bytes];
        let copied = Copied { call, returned_at, contents };
        Self { volume, map, plan: plan.expect("one at a time"), begun: None, is_synced: None, copied, mutant }
    }

    /// With a rule broken: copies these before it begins.
    pub(super) fn copied_before(mut self, early: &[(usize, Vec<u8>)]) -> Self {
        for (offset_bytes, bytes) in early {
            self.copied.contents[*offset_bytes..*offset_bytes + bytes.len()].copy_from_slice(bytes);
            let start = *offset_bytes as u64;
            let _ = self.plan.copied(&Step { source: 0, bytes: start..start + bytes.len() as u64 });
        }
        self
    }

    /// Goes on. Gives the requests that may be tried again.
    pub(super) fn step(&mut self, process: u64, world: &mut Surroundings<'_>) -> Vec<HeldRequest> {
        let marks_early = self.mutant == Some(Mutant::MarkedEarly);
        if let Some(step) = self.begun.take() {
            if marks_early {
                self.share(&step, world);
                return Vec::new();
            }
            return self.plan.copied(&step);
        }
        let reach = if world.rng.bool() { PIECE_BYTES } else { 3 * PIECE_BYTES };
        let Some(step) = self.plan.next(|_, _| reach) else {
            let owner = Owner { process, connection: COPIER, slot: RequestSlot(0) };
            if self.is_synced.is_none() {
                self.is_synced = Some(false);
                world.disk.begin_sync(owner, world.rng);
            }
            return self.volume.copy_before_write().end(&self.map);
        };
        let free = if marks_early {
            self.plan.copied(&step)
        } else {
            self.share(&step, world);
            Vec::new()
        };
        self.begun = Some(step);
        free
    }

    fn share(&mut self, step: &Step, world: &Surroundings<'_>) {
        let bytes = step.bytes.start as usize..step.bytes.end as usize;
        self.copied.contents[bytes.clone()].copy_from_slice(&world.disk.share(bytes));
    }

    /// Whether it has nothing to do but to wait for its sync.
    pub(super) fn is_syncing(&self) -> bool {
        self.is_synced == Some(false) && self.begun.is_none()
    }

    /// Its source's sync has ended. Gives the copy, if it is one.
    pub(super) fn synced(self, result: i32) -> Option<Copied> {
        if result < 0 {
            self.volume.report_failed_sync(-result);
        }
        (!self.has_lost()).then_some(self.copied)
    }

    /// Its source lost writes: there is no copy.
    pub(super) fn has_lost(&self) -> bool {
        self.volume.has_lost_writes()
    }

    /// It is given up. Gives the requests that waited.
    pub(super) fn give_up(&self) -> Vec<HeldRequest> {
        self.volume.copy_before_write().end(&self.map)
    }
}
