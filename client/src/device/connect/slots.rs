//! The connections of an attachment: how many there are, that all of them lead to the right volume, and which queue
//! serves which.
//!
//! Called by `attachment.rs` before the queue threads start and by `redial.rs`; `dial.rs` opens each connection. The addresses of an
//! attachment are tried in turn. Whoever answers as another server, for another volume, not at all, or does not know the
//! export, is passed over: an address may have been given to another machine. Only the attachment's own server ends the search,
//! by saying that the attachment is no more. Slot `i` of the attachment's
//! export is connection `i`, served by queue `i % nr_hw_queues`, so that every queue has nearly as many as the others.
//! Invariant: there is more than one connection only where the server says that a FLUSH on any of them covers all
//! (`NBD_FLAG_CAN_MULTI_CONN`; NBD `doc/proto.md`).

use std::time::Duration;

use proto::export_name::{AttachmentExportName, DescriptionError, ExportDescription, ExportRefusal};
use proto::nbd::handshake::client::ClientHandshakeError;
use proto::nbd::reply::ERR_UNKNOWN;
use proto::nbd::{ExportInfo, TransmissionFlags};
use uuid::Uuid;

use super::data_socket::DataSocket;
use super::dial::{self, DialError, Dialled, OPEN_TIMEOUT};
use crate::causes::with_sources;
use crate::contract::{DeviceSpec, ExportSpec};

/// Most queues that are made unasked: at some hundred thousand requests per second and queue, more wait for the network,
/// not for a processor, and each costs the idle attachment a thread, a ring and a connection.
pub const NR_HW_QUEUES_DEFAULT_MAX: u16 = 4;

/// Why the connections could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Nothing can be dialled with this spec.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The spec names no address at all.
    #[error("there is no server address to try")]
    NoAddress,
    /// None of the addresses leads to the export now.
    #[error("{}", told(.0))]
    PassedOver(Vec<PassedOver>),
    /// The attachment's own server says that the attachment is no more: it was taken by force, ended, or succeeded by a
    /// newer session. No other address will know better.
    #[error("the server at {address} says: {reason}")]
    Ended {
        /// `host:port`
        address: String,
        /// Its words.
        reason: String,
    },
    /// The spec's secret is not one.
    #[error("the device spec has an invalid secret")]
    Secret,
    /// A queue would have none.
    #[error("{nr_connections} connections are too few for {nr_hw_queues} queues: each needs at least one")]
    TooFewConnections {
        /// Asked for.
        nr_hw_queues: u16,
        /// Asked for.
        nr_connections: u16,
    },
    /// More than one connection was asked for.
    #[error(
        "the server does not allow several connections to one export: attach with one queue and one connection"
    )]
    NoMultiConn,
    /// As many connections as were asked for are not to be had.
    #[error(
        "the server grants {granted} of the {wanted} connections that were asked for ({why}): leave --connections away, or ask for \
         fewer"
    )]
    TooFewGranted {
        /// Asked for.
        wanted: u16,
        /// Had.
        granted: u16,
        /// Why no more.
        why: String,
    },
    /// The export is not the same on every connection.
    #[error("the server at {address} tells another size or other flags than on the first connection")]
    Differs {
        /// `host:port`
        address: String,
    },
}

/// Why an address was passed over.
#[derive(Debug, thiserror::Error)]
pub enum PassedOver {
    /// The export does not open there.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// Another server, or another volume, answers there.
    #[error(
        "the server at {address} does not serve this attachment's volume: it is server {server_id} with volume {volume_uid}"
    )]
    WrongServer {
        /// `host:port`
        address: String,
        /// Who it is.
        server_id: Uuid,
        /// What it serves.
        volume_uid: Uuid,
    },
    /// The server's description of the export cannot be understood.
    #[error("the server at {address} does not serve this attachment's volume: {source}")]
    Description {
        /// `host:port`
        address: String,
        /// What is off.
        source: DescriptionError,
    },
}

fn told(passed_over: &[PassedOver]) -> String {
    let reasons: Vec<String> = passed_over.iter().map(|reason| with_sources(reason)).collect();
    match &reasons[..] {
        [only] => only.clone(),
        all => format!("none of the server's addresses can be used: {}", all.join("; ")),
    }
}

/// How many queues and connections an attachment gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Hardware queues to ask the driver for, which may give fewer.
    pub nr_hw_queues: u16,
    /// Connections; `None`: as many as there are queues.
    nr_connections: Option<u16>,
}

impl Layout {
    /// What the spec asks for; where it leaves the choice, a queue for each of `nr_cpus`, up to
    /// [`NR_HW_QUEUES_DEFAULT_MAX`], with a connection each, or one of each where the server allows no more.
    ///
    /// # Errors
    /// [`SlotError::TooFewConnections`], [`SlotError::NoMultiConn`]: it asks for what cannot be.
    pub fn choose(spec: &DeviceSpec, flags: TransmissionFlags, nr_cpus: u16) -> Result<Self, SlotError> {
        let default_queues = nr_cpus.clamp(1, NR_HW_QUEUES_DEFAULT_MAX);
        let can_multi_conn = flags.contains(TransmissionFlags::CAN_MULTI_CONN);
        let layout = match (spec.nr_hw_queues, spec.nr_connections) {
            (0, 0) if !can_multi_conn => Self { nr_hw_queues: 1, nr_connections: None },
            (0, 0) => Self { nr_hw_queues: default_queues, nr_connections: None },
            (0, connections) => {
                // Every queue gets the same number.
                let divides = |queues: &u16| connections.is_multiple_of(*queues);
                let nr_hw_queues = (1..=default_queues.min(connections)).rev().find(divides).unwrap_or(1);
                Self { nr_hw_queues, nr_connections: Some(connections) }
            }
            (nr_hw_queues, 0) => Self { nr_hw_queues, nr_connections: None },
            (nr_hw_queues, nr_connections) if nr_connections < nr_hw_queues => {
                return Err(SlotError::TooFewConnections { nr_hw_queues, nr_connections });
            }
            (nr_hw_queues, connections) => Self { nr_hw_queues, nr_connections: Some(connections) },
        };
        let wants_several = layout.nr_hw_queues > 1 || layout.nr_connections > Some(1);
        if wants_several && !can_multi_conn {
            return Err(SlotError::NoMultiConn);
        }
        Ok(layout)
    }

    /// Connections to open.
    pub fn wanted_connections(&self) -> u16 {
        self.nr_connections.unwrap_or(self.nr_hw_queues)
    }

    /// Connections of a device that the driver gave so many queues, of so many that were opened.
    pub fn nr_connections(&self, nr_hw_queues: u16, opened: u16) -> u16 {
        self.nr_connections.unwrap_or(nr_hw_queues).min(opened)
    }
}

/// Opens a slot of the attachment's export, at the address that worked last if it still does. Once it was asked for, the export may
/// take `open_timeout`.
///
/// # Errors
/// [`SlotError::Ended`] is final; of the others [`SlotError::PassedOver`] tells of every address that was tried.
pub fn dial_slot(
    spec: &DeviceSpec,
    slot: u32,
    worked_last: Option<&str>,
    open_timeout: Duration,
) -> Result<Dialled, SlotError> {
    let mut addresses = spec.addresses.clone();
    // Stable: the others stay in their order.
    addresses.sort_by_key(|address| Some(address.as_str()) != worked_last);
    let mut passed_over = Vec::new();
    let export_name = export_name(spec, slot)?;
    for attempt in dial::attempts(&addresses, &export_name, spec.tls.as_ref(), open_timeout)? {
        match judge(spec, attempt)? {
            Ok(dialled) => return Ok(dialled),
            Err(reason) => {
                tracing::debug!(slot, reason = with_sources(&reason), "skipping an address");
                passed_over.push(reason);
            }
        }
    }
    Err(if passed_over.is_empty() { SlotError::NoAddress } else { SlotError::PassedOver(passed_over) })
}

/// Opens the slots after the first, up to `wanted` connections in all; the sockets, by slot. Where the spec leaves their number open and the
/// server is a foreign one, there are as many as it grants: many allow fewer than they say, or serve one after the other.
///
/// # Errors
/// [`SlotError`]: one cannot be opened, or tells another size or other flags than the first.
pub fn dial_others(spec: &DeviceSpec, first: Dialled, wanted: u16) -> Result<Vec<DataSocket>, SlotError> {
    let takes_fewer = spec.nr_connections == 0 && matches!(spec.export, ExportSpec::Nbd { .. });
    let mut sockets = vec![first.socket];
    for slot in 1..wanted {
        let next = match dial_slot(spec, slot.into(), Some(&first.address), OPEN_TIMEOUT) {
            Ok(next) => next,
            Err(error @ SlotError::PassedOver(_)) if takes_fewer => {
                let granted = sockets.len();
                let error = with_sources(&error);
                tracing::warn!(
                    wanted,
                    granted,
                    error,
                    "the server grants fewer connections: the disk has as many queues"
                );
                break;
            }
            Err(error @ SlotError::PassedOver(_)) if spec.nr_connections > 1 => {
                return Err(SlotError::TooFewGranted { wanted, granted: slot, why: with_sources(&error) });
            }
            Err(error) => return Err(error),
        };
        if !is_same_export(&first.export, &next.export) {
            return Err(SlotError::Differs { address: next.address });
        }
        sockets.push(next.socket);
    }
    Ok(sockets)
}

/// Deals sockets out to queues, as slots belong to them.
pub fn deal(sockets: Vec<DataSocket>, nr_hw_queues: u16) -> Vec<Vec<DataSocket>> {
    let mut by_queue: Vec<Vec<DataSocket>> = (0..nr_hw_queues).map(|_| Vec::new()).collect();
    for (slot, socket) in sockets.into_iter().enumerate() {
        by_queue[slot % usize::from(nr_hw_queues)].push(socket);
    }
    by_queue
}

/// Minimum, preferred and maximum block size of an export, in bytes.
pub fn block_bytes(export: &ExportInfo) -> Option<[u32; 3]> {
    export.block_sizes.map(|sizes| [sizes.minimum_bytes, sizes.preferred_bytes, sizes.maximum_bytes])
}

/// The storage incarnation that a server of ours told; empty for a foreign one, which tells none.
pub fn incarnation<S>(spec: &DeviceSpec, dialled: &Dialled<S>) -> String {
    let is_ours = matches!(spec.export, ExportSpec::Attachment { .. });
    let text = dialled.export.description.as_deref().filter(|_| is_ours);
    text.and_then(|text| text.parse::<ExportDescription>().ok())
        .map(|told| told.incarnation)
        .unwrap_or_default()
}

/// Under what name the slot is asked for.
///
/// # Errors
/// [`SlotError::Secret`].
pub fn export_name(spec: &DeviceSpec, slot: u32) -> Result<String, SlotError> {
    match &spec.export {
        ExportSpec::Nbd { export_name } => Ok(export_name.clone()),
        ExportSpec::Attachment { session_epoch, .. } => {
            let secret = spec.secret().ok_or(SlotError::Secret)?;
            let attachment_id = spec.attachment_id;
            let name = AttachmentExportName { attachment_id, secret, epoch: *session_epoch, slot };
            Ok(name.expose())
        }
    }
}

/// What an attempt means: the connection, why to try the next address, or (the outer error) that there is nothing to try.
///
/// # Errors
/// [`SlotError::Ended`].
pub fn judge<S>(
    spec: &DeviceSpec,
    attempt: Result<Dialled<S>, DialError>,
) -> Result<Result<Dialled<S>, PassedOver>, SlotError> {
    let ExportSpec::Attachment { server_id, volume_uid, .. } = &spec.export else {
        return Ok(attempt.map_err(PassedOver::from));
    };
    let dialled = match attempt {
        Ok(dialled) => dialled,
        Err(DialError::Handshake {
            address,
            source: ClientHandshakeError::Refused { reply: ERR_UNKNOWN, text },
        }) if ExportRefusal::parse(&text).is_some_and(|refusal| refusal.server_id == *server_id) => {
            return Err(SlotError::Ended { address, reason: text });
        }
        Err(error) => return Ok(Err(error.into())),
    };
    let address = dialled.address.clone();
    let text = dialled.export.description.as_deref().unwrap_or_default();
    Ok(match text.parse::<ExportDescription>() {
        Ok(told) if told.server_id == *server_id && told.volume_uid == *volume_uid => Ok(dialled),
        Ok(ExportDescription { server_id, volume_uid, .. }) => {
            Err(PassedOver::WrongServer { address, server_id, volume_uid })
        }
        Err(source) => Err(PassedOver::Description { address, source }),
    })
}

fn is_same_export(one: &ExportInfo, other: &ExportInfo) -> bool {
    one.size_bytes == other.size_bytes && one.flags == other.flags && one.block_sizes == other.block_sizes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::attachment_record::tests::spec;

    const SEVERAL: TransmissionFlags = TransmissionFlags::CAN_MULTI_CONN;
    const ONE: TransmissionFlags = TransmissionFlags::HAS_FLAGS;

    fn choose(queues: u16, connections: u16, flags: TransmissionFlags) -> Result<(u16, u16), SlotError> {
        let mut spec = spec(Uuid::from_u128(7), "vol-1");
        (spec.nr_hw_queues, spec.nr_connections) = (queues, connections);
        Layout::choose(&spec, flags, 16).map(|l| (l.nr_hw_queues, l.nr_connections(l.nr_hw_queues, u16::MAX)))
    }

    #[test]
    fn what_is_asked_for_is_had() {
        for (asked, had) in [((1, 1), (1, 1)), ((2, 4), (2, 4)), ((3, 0), (3, 3)), ((2, 3), (2, 3))] {
            assert_eq!(choose(asked.0, asked.1, SEVERAL).unwrap(), had);
        }
        assert!(matches!(choose(4, 2, SEVERAL), Err(SlotError::TooFewConnections { .. })));
    }

    #[test]
    fn a_default_follows_the_processors_the_connections_and_the_server() {
        assert_eq!(choose(0, 0, SEVERAL).unwrap(), (4, 4));
        assert_eq!(choose(0, 6, SEVERAL).unwrap(), (3, 6));
        assert_eq!(choose(0, 1, SEVERAL).unwrap(), (1, 1));
        let mut alone = spec(Uuid::from_u128(7), "vol-1");
        (alone.nr_hw_queues, alone.nr_connections) = (0, 0);
        assert_eq!(Layout::choose(&alone, SEVERAL, 1).unwrap().nr_hw_queues, 1);
        assert_eq!(choose(0, 0, ONE).unwrap(), (1, 1));
    }

    #[test]
    fn several_connections_are_refused_where_the_server_allows_one() {
        assert_eq!(choose(1, 1, ONE).unwrap(), (1, 1));
        for (queues, connections) in [(2, 0), (0, 2), (1, 2), (2, 2)] {
            assert!(matches!(choose(queues, connections, ONE), Err(SlotError::NoMultiConn)));
        }
    }

    #[test]
    fn a_driver_that_gives_fewer_queues_gets_fewer_connections_unless_they_were_asked_for() {
        let mut spec = spec(Uuid::from_u128(7), "vol-1");
        (spec.nr_hw_queues, spec.nr_connections) = (8, 0);
        assert_eq!(Layout::choose(&spec, SEVERAL, 2).unwrap().nr_connections(2, 9), 2);
        spec.nr_connections = 8;
        assert_eq!(Layout::choose(&spec, SEVERAL, 2).unwrap().nr_connections(2, 9), 8);
    }
}
