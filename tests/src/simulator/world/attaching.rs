//! How the volume changes hands: a holder detaches it, or loses it; what was written is made durable; the next one has it.
//!
//! Stands for `server/src/lifecycle/attachments.rs`, and for the end of a device in `client/src/device/attachment.rs`: a last FLUSH, the
//! fence, and the sync before an attachment is answered. Who was fenced, the gate's core says; what a failed sync means, it and the
//! incarnations' core.

use proto::export_name::{SECRET_BYTES, Secret};
use uuid::Uuid;

use super::{BLOCKS, World};
use crate::block_history::Blocks;
use crate::simulator::client::{self, Client, Note, Origins, Spec};
use crate::simulator::device::Device;
use crate::simulator::disk::{CONTROL, Ended, Owner};
use crate::simulator::storage::Attachment;
use crate::simulator::{Failure, Mutant};
use ::client::contract::StallPolicy;
use ::client::device::queue::connection::Origin;
use ::client::device::reconnect::Condition;
use server::ids::RequestSlot;

/// What an attachment waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settling {
    /// A server that syncs.
    Wanted,
    /// The sync; `is_alone`: nothing else was under way as it began.
    Syncing { is_alone: bool },
    /// A failed sync to be recorded, after which the caller asks again.
    Recording,
    /// Nothing any more; `is_alone` as above.
    Durable { is_alone: bool },
}

impl World<'_> {
    /// A device for an attachment that is new.
    pub(super) fn attach(&mut self) {
        self.attachments += 1;
        self.catalog.attach_generation += 1;
        let secret = Secret::parse(&"5a".repeat(SECRET_BYTES)).expect("it is one");
        let attachment = Attachment {
            attachment_id: Uuid::from_u128(u128::from(100 + self.attachments)),
            secret: secret.clone(),
            generation: self.catalog.attach_generation,
            session_epoch: 0,
            is_ending: false,
        };
        // Who breaks the protocol promises nothing of what it had taken, while another queue goes on.
        let nr_queues = if self.lies { 1 } else { self.rng.u16(1..=2) };
        let spec = Spec {
            attachment_id: attachment.attachment_id,
            secret,
            session_epoch: 0,
            server_id: self.catalog.server_id,
            volume_uid: self.catalog.volume_uid,
            capacity_bytes: self.catalog.capacity_bytes as u64,
            nr_queues,
            nr_connections: nr_queues,
            queue_depth: self.rng.u16(1..=5),
            small_bytes_max: [0, 4096, 8192][self.rng.usize(..3)],
            origins: [Origins::One(Origin::Pages), Origins::One(Origin::Staging), Origins::Both]
                [self.rng.usize(..3)],
            is_volatile_cache: self.catalog.write_cache_on,
            policy: if self.is_slow {
                StallPolicy::FailAfterMs(self.rng.u64(2_000..6_000))
            } else {
                StallPolicy::Wait
            },
            is_foreign: false,
        };
        self.catalog.attachment = Some(attachment);
        let tags = || (0..spec.queue_depth).map(|_| None).collect();
        let device = Device {
            bios: (0..spec.nr_queues).map(|_| tags()).collect(),
            spec,
            client: None,
            incarnation: None,
            may_be_lost: false,
            may_fail: false,
            given_up_after: None,
        };
        self.devices.push(device);
    }

    pub(super) fn start_process(&mut self) {
        let now_told = self.catalog.incarnation();
        let Some(device) = self.devices.last_mut() else { return };
        device.spec.session_epoch += 1;
        // Another process may have another number of connections: the slots that it lacks are nobody's.
        device.spec.nr_connections = device.spec.nr_queues * self.rng.u16(1..=2);
        let mut world = client::Surroundings {
            links: &mut self.links,
            bios: &mut device.bios,
            ended: &mut Vec::new(),
            rng: &mut self.rng,
            coverage: self.coverage,
            now: self.now,
            room_bytes: self.room_bytes,
            dialled: &mut Vec::new(),
            is_server_up: true,
        };
        let former = device.incarnation.clone();
        device.client = Some(Client::new(device.spec.clone(), former, now_told, self.mutant, &mut world));
    }

    /// The former holder has lost the volume; the next one begins.
    pub(super) fn give_away(&mut self) {
        for device in &mut self.devices {
            for bio in device.bios.iter_mut().flatten().flatten() {
                if let Note::Write { write, .. } = std::mem::replace(&mut bio.note, Note::Gone) {
                    self.history.write_failed(write);
                }
            }
        }
        // Whose disk it was is told by EIO; the next holder finds what a power cut left.
        if self.device().may_be_lost {
            self.history.forgot();
        }
        self.history.handed_over();
        self.attach();
        self.is_detaching = false;
        self.settling = Some(Settling::Wanted);
    }

    /// Who lost the volume is detached once its requests have ended; what a server forgot is told to the users.
    pub(super) fn look_after_devices(&mut self) -> Result<(), Failure> {
        let is_lost = |device: &Device| {
            device.client.as_ref().is_some_and(|client| matches!(client.condition(), Condition::Lost(_)))
        };
        let last = self.devices.len() - 1;
        if !self.is_taking && is_lost(&self.devices[last]) && !self.devices[last].has_bios() {
            if !self.devices[last].may_be_lost {
                return Err(Failure::Error("the disk was lost although its storage was not".to_owned()));
            }
            self.coverage.count("a server that forgot is noticed");
            self.history.forgot();
            self.is_taking = true;
        }
        // Its machine goes: what it has sent may still arrive.
        for index in 0..last {
            if self.rng.u8(..16) == 0 || !self.has_faults {
                let mut device = self.devices.remove(index);
                if let Some(mut client) = device.client.take() {
                    client.die(&mut self.links, &mut self.rng);
                }
                break;
            }
        }
        Ok(())
    }

    /// Goes on with what a change of hands waits for.
    pub(super) fn change_hands(&mut self) -> Result<(), Failure> {
        if self.is_detaching {
            self.detach();
        }
        let Some(process) = self.server.as_ref().map(|server| server.process) else { return Ok(()) };
        match self.settling {
            Some(Settling::Wanted) => {
                let owner = Owner { process: CONTROL + process, connection: 0, slot: RequestSlot(0) };
                let is_alone = self.disk.operations() == 0;
                self.disk.opened(owner.process);
                if self.is_looked_for(&[Mutant::ControlSyncUntold]) && self.rng.bool() {
                    self.disk.fails_next_sync = self.may_fail_syncs;
                }
                self.disk.begin_sync(owner, &mut self.rng);
                self.settling = Some(Settling::Syncing { is_alone });
            }
            Some(Settling::Recording) => {
                if self.with_server(|server, _| server.gate.has_recorded_failed_sync()) == Some(true) {
                    self.settling = Some(Settling::Wanted);
                }
            }
            Some(Settling::Durable { is_alone }) => {
                self.settling = None;
                self.coverage.count("what was written is durable before the next holder comes");
                if is_alone
                    && self.disk.is_whole()
                    && (self.is_looked_for(&[Mutant::ControlSyncUntold]) || self.rng.u8(..4) == 0)
                {
                    // What it reads, no power cut takes back; but for what a killed server had under way.
                    let found = self.disk.contents();
                    self.history.check_and_adopt(Blocks { first: 0, count: BLOCKS }, &found)?;
                }
            }
            Some(Settling::Syncing { .. }) | None => {}
        }
        Ok(())
    }

    /// The sync before an attachment is answered has ended.
    pub(super) fn settled(&mut self, ended: &Ended) {
        self.disk.closed(ended.owner.process);
        let process = self.server.as_ref().map(|server| CONTROL + server.process);
        let Some(Settling::Syncing { is_alone }) = self.settling else { return };
        if process != Some(ended.owner.process) {
            return;
        }
        if ended.result >= 0 {
            self.settling = Some(Settling::Durable { is_alone });
            return;
        }
        self.coverage.count("a sync of the control side fails");
        // As the product advises the kernel, which need not follow.
        if self.rng.bool() {
            self.disk.evict();
        }
        self.settling = Some(Settling::Recording);
        if self.mutant != Some(Mutant::ControlSyncUntold) {
            self.with_server(|server, world| server.gate.sync_failed(world.catalog.volume_uid));
        }
    }

    /// Who waited for an attachment asks again.
    pub(super) fn abandon_settling(&mut self, process: u64) {
        self.disk.process_died(CONTROL + process, &mut self.rng);
        if self.settling.is_some() {
            self.settling = Some(Settling::Wanted);
        }
    }

    /// The device is about to go: what was not flushed is, if its server is there.
    fn detach(&mut self) {
        let Some(device) = self.devices.last_mut() else { return };
        let Some(client) =
            device.client.as_mut().filter(|client| !matches!(client.condition(), Condition::Lost(_)))
        else {
            return;
        };
        if device.bios.iter().flatten().any(Option::is_some) || self.is_taking || self.settling.is_some() {
            return;
        }
        if !client.has_begun_final_flush() {
            self.last_flush = Some(self.history.send_flush());
        }
        let mut world = client::Surroundings {
            links: &mut self.links,
            bios: &mut device.bios,
            ended: &mut Vec::new(),
            rng: &mut self.rng,
            coverage: self.coverage,
            now: self.now,
            room_bytes: self.room_bytes,
            dialled: &mut Vec::new(),
            is_server_up: self.server.is_some(),
        };
        let Some(is_flushed) = client.final_flush(&mut world) else { return };
        if let Some(flush) = self.last_flush.take().filter(|_| is_flushed) {
            self.coverage.count("a device is detached with everything flushed");
            self.history.flush_answered(flush);
        } else {
            self.coverage.count("a device is detached without its last FLUSH");
        }
        (self.is_detaching, self.is_taking) = (false, true);
    }
}
