//! What the simulated server does to copy its volume, and to have requests wait for that: see `copier.rs`.

use server::backend::VolumeOp;
use server::data::gate::Input;
use server::ids::{ConnectionId, RequestSlot};
use server::volume::request::Next;
use server::volume::snapshot::copy_before_write::HeldRequest;

use super::{Connection, Phase, RING, Server};
use crate::block_history::CopyCall;
use crate::simulator::copier::Copier;
use crate::simulator::storage::Surroundings;
use crate::simulator::{Failure, Mutant};

impl Server {
    /// As [`Gate::take_fault`]; nothing waits for a copy that is not being made.
    pub(in crate::simulator) fn take_fault(&mut self) -> Result<(), Failure> {
        let waits = |connection: &Connection| connection.held.iter().any(Option::is_some);
        if self.copier.is_none() && self.connections.values().any(waits) {
            return Err(Failure::Error("a request waits for a copy that has ended".to_owned()));
        }
        if let Some(words) = self.begun.fault.take() {
            return Err(Failure::Error(words));
        }
        self.gate.take_fault()
    }

    /// A copy of the volume is called for; false: one is being made.
    pub(in crate::simulator) fn call_copy(&mut self, call: CopyCall, world: &mut Surroundings<'_>) -> bool {
        if self.copy_call.is_some() || self.copier.is_some() {
            return false;
        }
        let half = 0..world.catalog.capacity_bytes / 2;
        let is_early = self.is(Mutant::CopiedBeforeHeld);
        let early = if is_early { vec![(0, world.disk.share(half))] } else { Vec::new() };
        self.copy_call = Some((call, early));
        self.gate.copy(world.catalog.volume_uid);
        true
    }

    /// The gate has answered: the copy begins, or does not. `now` is an event of the history.
    pub(in crate::simulator) fn hear_of_copy(&mut self, now: u64, world: &mut Surroundings<'_>) {
        let is_late = self.is(Mutant::CopiedBeforeHeld) && world.rng.u8(..64) > 0;
        let Some(answer) = self.gate.to_copiers.pop_if(|_| !is_late) else { return };
        let Some((call, early)) = self.copy_call.take() else { return };
        let Some(volume) = answer else {
            world.coverage.count("a volume that lost writes is not copied");
            return;
        };
        world.coverage.count("a volume is copied");
        let copier = Copier::begin(volume, call, now, self.process, self.mutant, world);
        self.copier = Some(copier.copied_before(&early));
    }

    pub(super) fn copy_step(&mut self, world: &mut Surroundings<'_>) -> bool {
        let Some(copier) = self.copier.as_mut() else { return false };
        if copier.has_lost() && !copier.is_syncing() {
            world.coverage.count("a copy ends because its source lost writes");
            let free = copier.give_up();
            self.copy_ended(world);
            self.go_on(free, world);
            return true;
        }
        if copier.is_syncing() {
            return false;
        }
        let free = copier.step(self.process, world);
        self.go_on(free, world);
        true
    }

    fn copy_ended(&mut self, world: &mut Surroundings<'_>) {
        self.copier = None;
        world.disk.closed_copied(self.process);
        self.gate.post(Input::CopyEnded { volume_uid: world.catalog.volume_uid });
    }

    fn go_on(&mut self, requests: Vec<HeldRequest>, world: &mut Surroundings<'_>) {
        if self.is(Mutant::HeldForgotten) {
            return;
        }
        for HeldRequest { connection, slot, .. } in requests {
            let id = connection.0 as u32;
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let held = connection.held[usize::from(slot.0)].take();
            if let Some(op) = held.filter(|_| connection.phase != Phase::Closing) {
                self.follow(id, slot, Next::Submit(op), world);
            }
        }
    }

    /// As in the server: whether an operation has to wait for a copy.
    pub(super) fn holds(
        &mut self,
        id: u32,
        slot: RequestSlot,
        op: VolumeOp,
        world: &mut Surroundings<'_>,
    ) -> bool {
        let is_ignored = match self.mutant {
            Some(Mutant::HoldIgnored) => true,
            Some(Mutant::ZeroesNotHeld) => matches!(op, VolumeOp::Allocate { .. }),
            _ => false,
        };
        let request = HeldRequest { ring: RING, connection: ConnectionId(u64::from(id)), slot };
        let connection = self.connections.get_mut(&id).expect("it exists");
        let Some(volume) = connection.volume.as_ref().filter(|_| !is_ignored) else { return false };
        let holds = volume.copy_before_write().holds(&op, request);
        if holds {
            world.coverage.count("a change waits for a copy");
            connection.held[usize::from(slot.0)] = Some(op);
        }
        holds
    }

    /// The sync of the copy's source has ended.
    pub(super) fn copy_synced(&mut self, result: i32, world: &mut Surroundings<'_>) {
        if let Some(copier) = self.copier.take() {
            self.copied = copier.synced(result);
            self.copy_ended(world);
        }
    }
}
