//! What a heartbeat tells: this node's disks of the server's volumes, and what is wrong here.
//!
//! Owns: which are told, in which words, and the bounds that `proto/volnode/v1/management.proto` sets. Never: does I/O.
//! Called by the parent module.

use proto::v1;
use ublk_core::ControlError;

use crate::causes::with_sources;
use crate::contract::ExportSpec;
use crate::contract::state_word::state_word;
use crate::node::attachment_record::AttachmentRecord;
use crate::node::error::NodeError;

/// Disks in one heartbeat.
pub(super) const DISKS_MAX: usize = 256;
/// Bytes of a reason, and of what is wrong.
const REASON_BYTES_MAX: usize = 512;
/// Nothing can be attached here.
const ERROR: &str = "error";
/// The state in which a disk is well.
const LIVE: &str = "live";

/// The disks of the server's volumes. Where there are too many, those that do not work are told first.
pub(super) fn disks(records: &[AttachmentRecord], server_id: &str) -> Vec<v1::NodeDisk> {
    let is_of_server = |record: &&AttachmentRecord| match &record.spec.export {
        ExportSpec::Attachment { server_id: of, .. } => of.to_string() == server_id,
        ExportSpec::Nbd { .. } => false,
    };
    let mut told: Vec<v1::NodeDisk> = records.iter().filter(is_of_server).map(disk).collect();
    told.sort_by_cached_key(|disk| (disk.state == LIVE, disk.attachment_id.clone()));
    told.truncate(DISKS_MAX);
    told
}

fn disk(record: &AttachmentRecord) -> v1::NodeDisk {
    let attachment = record.to_proto();
    v1::NodeDisk {
        state: state_word(attachment.state()).to_owned(),
        state_reason: words(&attachment.state_reason),
        attachment_id: attachment.attachment_id,
        state_since_ms: attachment.state_since_ms,
    }
}

/// Whether the disks are in other states than were told, or others.
pub(super) fn differ(told: &[v1::NodeDisk], now: &[v1::NodeDisk]) -> bool {
    let states = |disks: &[v1::NodeDisk]| -> Vec<(String, String)> {
        disks.iter().map(|disk| (disk.attachment_id.clone(), disk.state.clone())).collect()
    };
    states(told) != states(now)
}

/// What is wrong here: whether the daemon is root, and why no data path can be used, if none can.
pub(super) fn conditions(is_root: bool, data_paths: Result<(), NodeError>) -> Vec<v1::NodeCondition> {
    let error = |id: &str, text: &str| v1::NodeCondition {
        id: id.to_owned(),
        severity: ERROR.to_owned(),
        text: words(text),
    };
    let mut conditions = Vec::new();
    if !is_root {
        conditions.push(error("root", "volclient serve does not run as root: start it as root"));
    }
    match data_paths {
        Ok(()) => {}
        Err(NodeError::Ublk(cause @ ControlError::NoDriver)) => {
            let text =
                format!("{}; load it with `modprobe ublk_drv` (Linux 6.0 or later)", with_sources(&cause));
            conditions.push(error("ublk_driver", &text));
        }
        Err(NodeError::Ublk(cause)) => conditions.push(error("ublk_driver", &with_sources(&cause))),
        Err(cause) => conditions.push(error("data_paths", &with_sources(&cause))),
    }
    conditions
}

/// Cut to what the server takes, on a character boundary, and without what is no text.
pub(super) fn words(text: &str) -> String {
    let end =
        (0..=text.len().min(REASON_BYTES_MAX)).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::io;

    use rustix::process::Pid;
    use uuid::Uuid;

    use super::*;
    use crate::contract::{AttachmentDir, DeviceState};
    use crate::node::attachment_record::tests::{spec, status};

    const SERVER: Uuid = Uuid::from_u128(9);

    fn record(id: u128, state: Option<DeviceState>, server_id: Option<Uuid>) -> AttachmentRecord {
        let mut spec = spec(Uuid::from_u128(id), &format!("vol-{id}"));
        if let Some(server_id) = server_id {
            spec.export = ExportSpec::Attachment {
                secret: "s".to_owned(),
                session_epoch: 1,
                server_id,
                volume_uid: Uuid::from_u128(10),
            };
        }
        let pid = state.and_then(|_| Pid::from_raw(1));
        let status = state.map(|state| status(&spec, state, "boot"));
        AttachmentRecord { dir: AttachmentDir::from_path("/nowhere"), spec, status, pid }
    }

    #[test]
    fn only_disks_of_the_servers_own_volumes_are_told() {
        let records = [
            record(1, Some(DeviceState::Live), Some(SERVER)),
            record(2, Some(DeviceState::Live), Some(Uuid::from_u128(8))),
            record(3, Some(DeviceState::Live), None),
            record(4, None, Some(SERVER)),
        ];
        let told: Vec<(String, String)> = disks(&records, &SERVER.to_string())
            .into_iter()
            .map(|disk| (disk.attachment_id, disk.state))
            .collect();
        let id = |id| Uuid::from_u128(id).to_string();
        assert_eq!(told, [(id(4), "dead".to_owned()), (id(1), "live".to_owned())]);
        assert!(disks(&records, "").is_empty());
    }

    #[test]
    fn of_too_many_disks_those_that_do_not_work_are_told() {
        let mut records: Vec<_> =
            (1..=300).map(|id| record(id, Some(DeviceState::Live), Some(SERVER))).collect();
        records.push(record(999, Some(DeviceState::Stalled), Some(SERVER)));
        let told = disks(&records, &SERVER.to_string());
        assert_eq!((told.len(), told[0].state.as_str()), (256, "stalled"));
    }

    #[test]
    fn a_reason_is_cut_on_a_character_and_is_one_line() {
        assert_eq!(words("a\nb\u{1b}c"), "a b c");
        assert_eq!(words(&"x".repeat(513)).len(), 512);
        // Each has two bytes, and the first byte shifts them.
        let cut = words(&format!("x{}", "ä".repeat(300)));
        assert_eq!((cut.len(), cut.chars().last()), (511, Some('ä')));
        // C1 controls have two bytes, which a blank has not: no longer than before.
        assert!(words(&"\u{85}".repeat(300)).len() <= REASON_BYTES_MAX);
    }

    #[test]
    fn a_change_is_another_state_or_another_disk_and_no_other_words() {
        let told = disks(&[record(1, Some(DeviceState::Live), Some(SERVER))], &SERVER.to_string());
        let mut other_words = told.clone();
        other_words[0].state_reason = "as before".to_owned();
        assert!(!differ(&told, &other_words));
        let stalled = disks(&[record(1, Some(DeviceState::Stalled), Some(SERVER))], &SERVER.to_string());
        assert!(differ(&told, &stalled) && differ(&told, &[]) && differ(&[], &told));
    }

    #[test]
    fn what_is_wrong_is_told_with_what_to_do() {
        assert!(conditions(true, Ok(())).is_empty());
        let told = conditions(false, Err(NodeError::Ublk(ControlError::NoDriver)));
        let ids: Vec<&str> = told.iter().map(|condition| condition.id.as_str()).collect();
        assert_eq!(ids, ["root", "ublk_driver"]);
        assert!(told[1].text.contains("modprobe ublk_drv") && told[1].severity == "error", "{told:?}");
        let broken = NodeError::Io { what: "no ring".to_owned(), source: io::Error::other("seccomp") };
        assert_eq!(conditions(true, Err(broken))[0].id, "data_paths");
    }
}
