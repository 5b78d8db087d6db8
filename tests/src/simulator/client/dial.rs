//! What stands for the threads that dial and probe: handshakes over simulated connections. Which slot is dialled when, and what an answer
//! is worth, the product's `Redial` says.

use std::io;
use std::time::{Duration, Instant};

use client::contract::{DeviceSpec, Encryption, SessionRecord};
use client::device::connect::dial::{DialError, Dialled};
use client::device::connect::redial::{Attempt, DiskFit, Next, Redial};
use client::device::connect::slots::{self, SlotError};
use proto::export_name::PROBE_SLOT;
use proto::nbd::handshake::client::{ClientHandshake, ClientNegotiated};
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES};

use super::bio::Surroundings;
use super::ring::abandon;
use super::spec::Spec;
use crate::block_history::BLOCK_BYTES;
use crate::simulator::network::{Link, LinkId};

/// As in the product: how long a dial may take without an answer.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// As in `client/src/device/connect/probe.rs`.
pub(super) struct Probe {
    pub(super) link: LinkId,
    handshake: Option<Box<ClientHandshake>>,
    received_bytes: usize,
    gives_up_at: Instant,
}

/// As in `client/src/device/connect/redial_thread.rs`.
pub(super) struct Dial {
    redial: Redial<LinkId>,
    resumes_at: Instant,
    gives_up_at: Instant,
    pub(super) handshake: Option<(LinkId, Box<ClientHandshake>)>,
    /// Of the attempt.
    pub(super) opened: Vec<LinkId>,
}

impl Probe {
    /// Of a server that is there.
    pub(super) fn new(spec: &DeviceSpec, world: &mut Surroundings<'_>) -> Self {
        let (link, handshake) = begin_dial(spec, PROBE_SLOT, world);
        let gives_up_at = world.now + DIAL_TIMEOUT;
        Self { link, handshake: Some(handshake), received_bytes: 0, gives_up_at }
    }

    /// Whether there was something to do; and whether it is answered, once that is known.
    pub(super) fn step(&mut self, world: &mut Surroundings<'_>) -> (bool, Option<bool>) {
        let pipe = &mut world.links[self.link].to_client;
        let readable = pipe.readable();
        let is_over = readable.is_empty() && pipe.end().is_some();
        let has_failed = is_over || world.now >= self.gives_up_at;
        let mut outcome = has_failed.then_some(false);
        match &mut self.handshake {
            Some(handshake) if !readable.is_empty() && !has_failed => {
                let mut out = Vec::new();
                let answer = handshake.handle_bytes(readable, &mut out);
                let bytes = readable.len();
                pipe.consume(bytes);
                match answer {
                    Ok(opened) if opened.is_some() => {
                        let request = Request {
                            flags: CommandFlags::NONE,
                            command: Command::Read,
                            cookie: 7,
                            offset_bytes: 0,
                            length_bytes: BLOCK_BYTES as u64,
                        };
                        out.extend(request.encode());
                        self.handshake = None;
                    }
                    Ok(_) => {}
                    Err(_) => outcome = Some(false),
                }
                world.links[self.link].to_server.write(&out);
            }
            None if !readable.is_empty() && !has_failed => {
                let bytes = readable.len();
                pipe.consume(bytes);
                self.received_bytes += bytes;
                outcome = (self.received_bytes >= SIMPLE_REPLY_BYTES + BLOCK_BYTES).then_some(true);
            }
            _ if has_failed => {}
            _ => return (false, None),
        }
        if outcome.is_some() {
            abandon(&mut world.links[self.link], world.rng);
        }
        (true, outcome)
    }
}

/// What all dials of a process have in common.
pub(super) struct Way<'a> {
    pub(super) spec: &'a Spec,
    pub(super) device_spec: &'a DeviceSpec,
    pub(super) session: &'a SessionRecord,
    /// As of a rule that is broken.
    pub(super) changes_slots: bool,
}

impl Dial {
    pub(super) fn new(slots: impl Iterator<Item = u32>, times_in_vain: u32, now: Instant) -> Self {
        Self {
            redial: Redial::new(slots.collect(), times_in_vain),
            resumes_at: now,
            gives_up_at: now,
            handshake: None,
            opened: Vec::new(),
        }
    }

    /// What it has begun or opened.
    pub(super) fn links(&self) -> impl Iterator<Item = LinkId> {
        self.opened.iter().copied().chain(self.handshake.iter().map(|(link, _)| *link))
    }

    /// Whether there was something to do; and what an attempt came to that is over.
    pub(super) fn step(
        &mut self,
        way: &Way<'_>,
        world: &mut Surroundings<'_>,
    ) -> (bool, Option<Attempt<LinkId>>) {
        if world.now < self.resumes_at {
            return (false, None);
        }
        let Some((link, handshake)) = &mut self.handshake else {
            let mut slot = match self.redial.next(world.rng.f64()) {
                Next::Rest(pause) => {
                    self.resumes_at = world.now + pause;
                    return (true, None);
                }
                Next::Dial(slot) => slot,
            };
            if !world.is_server_up {
                return (true, self.dialled(way, Err(broken()), world));
            }
            if way.changes_slots {
                slot += u32::from(way.spec.nr_connections) * world.rng.u32(..2);
            }
            self.handshake = Some(begin_dial(way.device_spec, slot, world));
            self.gives_up_at = world.now + DIAL_TIMEOUT;
            return (true, None);
        };
        let (link, address) = (*link, "simulated".to_owned());
        let pipe = &mut world.links[link].to_client;
        let mut out = Vec::new();
        let readable = pipe.readable();
        if readable.is_empty() {
            if pipe.end().is_some() || world.now >= self.gives_up_at {
                return (true, self.dialled(way, Err(broken()), world));
            }
            return (false, None);
        }
        let answer = handshake.handle_bytes(readable, &mut out);
        let bytes = readable.len();
        pipe.consume(bytes);
        world.links[link].to_server.write(&out);
        let outcome = match answer {
            Ok(None) => return (true, None),
            Ok(Some(export)) => {
                Ok(Dialled { socket: link, export, negotiated: ClientNegotiated::default(), address })
            }
            Err(source) => {
                world.coverage.count("a dial that is refused");
                Err(DialError::Handshake { address, source })
            }
        };
        (true, self.dialled(way, outcome, world))
    }

    /// A handshake is over: what the rules make of it.
    fn dialled(
        &mut self,
        way: &Way<'_>,
        outcome: Result<Dialled<LinkId>, DialError>,
        world: &mut Surroundings<'_>,
    ) -> Option<Attempt<LinkId>> {
        let tried = self.handshake.take().map(|(link, _)| link);
        let outcome = match slots::judge(way.device_spec, outcome) {
            Ok(judged) => judged.map_err(|passed_over| SlotError::PassedOver(vec![passed_over])),
            Err(error) => Err(error),
        };
        let fit = DiskFit {
            spec: way.device_spec,
            session: way.session,
            export_bytes: way.spec.capacity_bytes,
            nr_connections: way.spec.nr_connections,
        };
        self.opened.extend(tried);
        let attempt = self.redial.dialled(outcome, &fit, |_| Encryption::None)?;
        let dropped = !matches!(attempt, Attempt::Opened { .. });
        for link in self.opened.drain(..).filter(|_| dropped) {
            abandon(&mut world.links[link], world.rng);
        }
        Some(attempt)
    }
}

/// A connection to the server is begun, in a slot.
fn begin_dial(spec: &DeviceSpec, slot: u32, world: &mut Surroundings<'_>) -> (LinkId, Box<ClientHandshake>) {
    let name = slots::export_name(spec, slot).expect("the secret is one");
    let handshake = ClientHandshake::new(&name).expect("the name is short");
    world.links.push(Link::default());
    let link = world.links.len() - 1;
    world.dialled.push(link);
    (link, Box::new(handshake))
}

/// The connection broke, or never was.
fn broken() -> DialError {
    DialError::Io { address: "simulated".to_owned(), source: io::ErrorKind::ConnectionReset.into() }
}
