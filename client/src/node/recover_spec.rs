//! What another process has to know to take the device of a dead one on.
//!
//! Pure, but for the boot id. Called by `recover.rs`, and by `attach.rs` for an attach that finds such a device.

use super::attachment_record::AttachmentRecord;
use crate::contract::{DeviceSpec, DeviceState, ExportSpec, RecoverSpec, boot_id};

/// With what another process can take the device of a dead one on; `None`: it cannot, or is not to.
pub(super) fn recover_spec(record: &AttachmentRecord) -> Option<DeviceSpec> {
    if record.pid.is_some() {
        return None;
    }
    let former = record.spec.recover.clone();
    let status = record.status.clone().filter(|status| boot_id().is_ok_and(|now| now == status.boot_id));
    let recover = match status {
        Some(status) if status.state == DeviceState::Stopping => return None,
        Some(status) => match (status.dev_id, status.session) {
            (Some(dev_id), Some(session)) => {
                Some(RecoverSpec { dev_id, data_path: status.data_path, session })
            }
            _ => former,
        },
        // It died before it said anything; a status of another boot is none, and so is what was to be recovered then.
        None => former.filter(|_| record.status.is_none()),
    }?;
    let mut spec = record.spec.clone();
    if let ExportSpec::Attachment { session_epoch, .. } = &mut spec.export {
        *session_epoch += 1;
    }
    if let Some(status) = &record.status {
        (spec.on_stall, spec.on_stall_is_told) = (status.on_stall, status.on_stall_is_told);
    }
    spec.recover = Some(recover);
    Some(spec)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::contract::{AttachmentDir, DeviceStatus, Encryption, SessionRecord};
    use crate::node::attachment_record::tests as records;

    fn session() -> SessionRecord {
        SessionRecord {
            incarnation: "boot.1".to_owned(),
            encryption: Encryption::None,
            export_bytes: 1 << 30,
            export_flags: 1,
            export_block_bytes: None,
            capacity_bytes: 1 << 30,
            block_size_bytes: 4096,
            max_io_bytes: 1 << 20,
            volatile_cache: true,
            read_only: false,
        }
    }

    /// An attachment of a volume whose process has died, with this of its status changed.
    fn dead(change: impl FnOnce(&mut DeviceStatus)) -> AttachmentRecord {
        let mut spec = records::spec(Uuid::from_u128(7), "vol-1");
        spec.export = ExportSpec::Attachment {
            secret: "0".repeat(64),
            session_epoch: 3,
            server_id: Uuid::from_u128(1),
            volume_uid: Uuid::from_u128(2),
        };
        let mut status = records::status(&spec, DeviceState::Live, &boot_id().unwrap());
        status.session = Some(session());
        change(&mut status);
        AttachmentRecord { dir: AttachmentDir::from_path("/nowhere"), spec, status: Some(status), pid: None }
    }

    #[test]
    fn the_next_process_begins_a_higher_epoch_on_the_same_device() {
        let spec = recover_spec(&dead(|_| {})).unwrap();
        assert!(matches!(spec.export, ExportSpec::Attachment { session_epoch: 4, .. }));
        let recover = spec.recover.unwrap();
        assert_eq!((recover.dev_id, recover.session), (4_000_000, session()));
    }

    #[test]
    fn what_was_being_taken_away_is_not_recovered() {
        assert!(recover_spec(&dead(|status| status.state = DeviceState::Stopping)).is_none());
        assert!(recover_spec(&dead(|status| status.boot_id = "another".to_owned())).is_none());
        assert!(recover_spec(&dead(|status| status.session = None)).is_none());
    }

    #[test]
    fn a_process_that_died_before_it_said_anything_leaves_what_it_was_told() {
        let mut record = dead(|_| {});
        record.spec = recover_spec(&record).unwrap();
        record.status = None;
        let told = record.spec.recover.clone();
        let again = recover_spec(&record).unwrap();
        assert_eq!(again.recover, told);
        assert!(matches!(again.export, ExportSpec::Attachment { session_epoch: 5, .. }));
    }
}
