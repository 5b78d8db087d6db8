//! Connections of nobody's device: they ask for volumes by their names, for what is not there, and with secrets that are wrong.
//!
//! They do no I/O: what matters is what they are answered (`answers.rs`), and that they are in the way of others.

use proto::export_name::{AttachmentExportName, SECRET_BYTES, Secret};
use proto::nbd::handshake::server::OpenKind;
use server::ids::ConnectionId;
use uuid::Uuid;

use super::gate::{Gate, STRANGERS_RING};
use super::storage::{NAME, OTHER_NAME, OTHER_UID, Surroundings};

/// Their identities are above all others.
const FIRST: u64 = 1 << 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Asked,
    HasVolume,
    Closing,
}

/// Who comes to one process of the server.
pub(super) struct Strangers {
    strangers: Vec<(ConnectionId, State)>,
    connections: u64,
}

impl Strangers {
    pub(super) fn new() -> Self {
        let strangers = (0..2).map(|number| (ConnectionId(FIRST + number), State::Idle)).collect();
        Self { strangers, connections: 2 }
    }

    /// What the gate has told them.
    pub(super) fn hear(&mut self, gate: &mut Gate) {
        for (connection, granted) in gate.to_strangers.drain(..) {
            let Some((_, state)) = self.strangers.iter_mut().find(|(id, _)| *id == connection) else {
                continue;
            };
            *state = match (*state, granted) {
                (State::Asked, Some(granted)) if granted.kind != OpenKind::Info => State::HasVolume,
                (State::Asked, Some(_) | None) => State::Idle,
                (State::HasVolume, None) => State::Closing,
                (other, _) => other,
            };
        }
    }

    /// One of them does something.
    pub(super) fn step(&mut self, gate: &mut Gate, world: &mut Surroundings<'_>) {
        let index = world.rng.usize(..self.strangers.len());
        let (connection, state) = self.strangers[index];
        match state {
            State::Idle if world.may_fail && world.rng.u8(..4) == 0 => {
                let kind = if world.rng.u8(..4) > 0 { OpenKind::Go } else { OpenKind::Info };
                gate.open(connection, STRANGERS_RING, kind, wish(world));
                self.strangers[index].1 = State::Asked;
            }
            State::Idle => {}
            State::Asked if world.may_fail && world.rng.u8(..8) > 0 => {}
            State::HasVolume if world.may_fail && world.rng.u8(..4) > 0 => {}
            State::Asked | State::HasVolume | State::Closing => {
                gate.closed(connection);
                self.strangers[index] = (ConnectionId(FIRST + self.connections), State::Idle);
                self.connections += 1;
            }
        }
        if world.may_fail {
            match world.rng.u8(..64) {
                0 => gate.fence_named_writers(OTHER_UID),
                1 => gate.release(OTHER_UID),
                2 if world.rng.u8(..8) == 0 => {
                    world.coverage.count("the holder of a volume is to come again");
                    gate.reopen_attachments(world.catalog.volume_uid);
                }
                _ => {}
            }
        }
    }
}

fn wish(world: &mut Surroundings<'_>) -> String {
    match world.rng.u8(..16) {
        0 => "c".to_owned(),
        1 => NAME.to_owned(),
        2..=4 => {
            let held = world.catalog.attachment.as_ref().filter(|_| world.rng.u8(..4) > 0);
            let name = AttachmentExportName {
                attachment_id: held.map_or_else(|| Uuid::from_u128(99), |held| held.attachment_id),
                secret: Secret::parse(&"a5".repeat(SECRET_BYTES)).expect("it is one"),
                epoch: held.map_or(1, |held| held.session_epoch + 1),
                slot: world.rng.u32(..2),
            };
            name.expose()
        }
        _ => OTHER_NAME.to_owned(),
    }
}
