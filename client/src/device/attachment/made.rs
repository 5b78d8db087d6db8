//! A device that is made or taken on, not started: its data path, its parameters, its connections.
//!
//! Called once by `attachment.rs`. Owns the order: what the driver can, then the first connection, then ADD_DEV, then the others.

use ublk_core::abi::{UBLK_F_UPDATE_SIZE, UBLK_F_USER_RECOVERY, UBLK_F_USER_RECOVERY_REISSUE};
use ublk_core::{
    ControlDevice, DataPath, Device, DeviceError, DeviceParams, DeviceSpec as UblkSpec, Transfer,
};

use super::error::AttachmentError;
use crate::contract::{
    self, DeviceSpec, DeviceStatus, Encryption, ExportSpec, RecoverSpec, SendZc, SessionRecord,
};
use crate::device::connect::data_socket::DataSocket;
use crate::device::connect::dial::OPEN_TIMEOUT;
use crate::device::connect::slots::{self, Layout};
use crate::device::ladder::{Chosen, Ladder};
use crate::device::{affinity, geometry};

/// A device, not started, and what it is made for.
pub(super) struct Made {
    pub(super) device: Device,
    pub(super) chosen: Chosen,
    pub(super) session: SessionRecord,
    pub(super) nr_connections: u16,
    /// By queue.
    pub(super) sockets: Vec<Vec<DataSocket>>,
    /// Of the server.
    pub(super) address: String,
}

impl Made {
    pub(super) fn describe(&self, spec: &DeviceSpec, status: &mut DeviceStatus) {
        let (info, session) = (self.device.info(), &self.session);
        status.dev_id = Some(self.device.dev_id());
        status.capacity_bytes = session.capacity_bytes;
        status.block_size_bytes = session.block_size_bytes;
        status.read_only = session.read_only;
        status.data_path = self.chosen.data_path.to_string();
        status.data_path_reason.clone_from(&self.chosen.reason);
        status.server_address.clone_from(&self.address);
        status.encryption = session.encryption.as_str().to_owned();
        status.send_zc = match send_zc_bytes_min(spec, &self.chosen, session.encryption) {
            Some(_) => SendZc::Untried,
            None if spec.send_zc_mode().bytes_min().is_some() => SendZc::Unsupported,
            None => SendZc::Off,
        };
        status.nr_hw_queues = info.nr_hw_queues;
        status.nr_connections = self.nr_connections;
        status.queue_depth = info.queue_depth;
        status.session = Some(session.clone());
    }

    /// A new device for an export that is there.
    pub(super) fn anew(control: &ControlDevice, spec: &DeviceSpec) -> Result<Self, AttachmentError> {
        let ladder = Ladder::new(&ublk_core::probe_driver(control)?, &spec.data_path)?;
        let first = slots::dial_slot(spec, 0, None, OPEN_TIMEOUT)?;
        let params = geometry::device_params(&first.export, spec.block_size_bytes, spec.read_only)?;
        let layout = Layout::choose(spec, first.export.flags, affinity::nr_cpus())?;
        let session = SessionRecord {
            incarnation: slots::incarnation(spec, &first),
            encryption: first.socket.encryption(),
            export_bytes: first.export.size_bytes,
            export_flags: first.export.flags.0,
            export_block_bytes: slots::block_bytes(&first.export),
            capacity_bytes: params.capacity_bytes,
            block_size_bytes: params.logical_block_bytes,
            max_io_bytes: params.max_io_bytes,
            volatile_cache: params.volatile_cache,
            read_only: params.read_only,
        };
        if session.tail_bytes() > 0 {
            tracing::warn!(
                target = spec.target,
                tail_bytes = session.tail_bytes(),
                block_size_bytes = session.block_size_bytes,
                "the end of the export is no whole block, and is not on the disk"
            );
        }
        let address = first.address.clone();
        // Before there is a device: every queue needs a connection.
        let mut sockets = slots::dial_others(spec, first, layout.wanted_connections())?;
        let opened = sockets.len() as u16;
        let wanted_queues = layout.nr_hw_queues.min(opened);
        let add = |data_path| add_device(control, spec, &params, data_path, wanted_queues);
        let (device, chosen) = ladder.add_device(add)?;
        let nr_hw_queues = device.info().nr_hw_queues;
        let nr_connections = layout.nr_connections(nr_hw_queues, opened);
        sockets.truncate(usize::from(nr_connections));
        let sockets = slots::deal(sockets, nr_hw_queues);
        Ok(Self { device, chosen, session, nr_connections, sockets, address })
    }

    /// The device of a process that died. Its connections are made as after any loss: the server need not be there.
    pub(super) fn again(
        control: &ControlDevice,
        spec: &DeviceSpec,
        recover: &RecoverSpec,
    ) -> Result<Self, AttachmentError> {
        let report = ublk_core::probe_driver(control)?;
        let no_new_device = |_| Ok(());
        let ((), mut chosen) = Ladder::new(&report, &recover.data_path)?.add_device(no_new_device)?;
        chosen.reason = "the device was made for it".to_owned();
        let device = Device::recover(control, recover.dev_id)?;
        if device.info().ublksrv_flags != contract::attachment_hash(spec.attachment_id) {
            return Err(AttachmentError::Spec("recover.dev_id: the device is another attachment's"));
        }
        let nr_hw_queues = device.info().nr_hw_queues;
        let nr_connections = spec.nr_connections.max(nr_hw_queues);
        let mut sockets: Vec<Vec<DataSocket>> = (0..nr_hw_queues).map(|_| Vec::new()).collect();
        for slot in 0..nr_connections {
            let socket = DataSocket::disconnected().map_err(AttachmentError::Setup)?;
            sockets[usize::from(slot % nr_hw_queues)].push(socket);
        }
        let address = spec.addresses.first().cloned().unwrap_or_default();
        Ok(Self { device, chosen, session: recover.session.clone(), nr_connections, sockets, address })
    }
}

/// From how many bytes on a WRITE's pages leave by reference; `None`: none do. It takes a SEND that names registered buffers, and nothing on
/// the way that has to see the bytes.
pub(super) fn send_zc_bytes_min(spec: &DeviceSpec, chosen: &Chosen, encryption: Encryption) -> Option<u32> {
    let can = chosen.transfer == Transfer::RecvSendFixed && encryption == Encryption::None;
    spec.send_zc_mode().bytes_min().filter(|_| can)
}

/// Has the driver keep a device for another process; where it cannot, the device ends with its process.
///
/// What was in flight is issued again: our server opens the next process's connections only when nothing of the former one's can land any
/// more. A foreign server promises nothing of the kind. A WRITE that it still has could land after a later one, so what was in flight fails,
/// and users hear of it; but not on a disk that can only be read.
fn recovery_flags(export: &ExportSpec, is_read_only: bool) -> u64 {
    match export {
        ExportSpec::Nbd { .. } if !is_read_only => UBLK_F_USER_RECOVERY,
        ExportSpec::Nbd { .. } | ExportSpec::Attachment { .. } => {
            UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE
        }
    }
}

fn add_device(
    control: &ControlDevice,
    spec: &DeviceSpec,
    params: &DeviceParams,
    data_path: DataPath,
    nr_hw_queues: u16,
) -> Result<Device, DeviceError> {
    let recovery = recovery_flags(&spec.export, params.read_only);
    let ublk_spec = UblkSpec {
        dev_id: None,
        nr_hw_queues,
        queue_depth: spec.queue_depth,
        max_io_buf_bytes: params.max_io_bytes,
        flags: data_path.device_flags(),
        wished_flags: data_path.wished_device_flags() | recovery | UBLK_F_UPDATE_SIZE,
        ublksrv_flags: contract::attachment_hash(spec.attachment_id),
    };
    Device::add(control, &ublk_spec, params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_still_land_is_not_issued_again() {
        let foreign = ExportSpec::Nbd { export_name: String::new() };
        let (server_id, volume_uid) = (uuid::Uuid::nil(), uuid::Uuid::nil());
        let ours = ExportSpec::Attachment { secret: String::new(), session_epoch: 1, server_id, volume_uid };
        assert_eq!(recovery_flags(&foreign, false), UBLK_F_USER_RECOVERY);
        for flags in [recovery_flags(&foreign, true), recovery_flags(&ours, false)] {
            assert_eq!(flags, UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE);
        }
    }
}
