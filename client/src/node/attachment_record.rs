//! An attachment as its folder tells it: the spec, the status, and whether its device process lives.
//!
//! Reads folders, never writes them. A folder without a spec is one that was being made when the daemon was killed: it
//! is no attachment. A folder whose spec cannot be read is an attachment nobody can work on: it is logged and passed
//! over, and found again by its id when the server gives the same attachment out.
//! Called by: `supervisor`, and whoever tells of attachments.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use proto::passphrase::LUKS_HEADER_BYTES;
use proto::v1;
use rustix::process::Pid;
use ublk_core::control::block_device_path;

use super::device_process;
use super::error::NodeError;
use super::target::{DetachSelector, Target};
use crate::contract::{
    self, AttachmentDir, ContractError, DeviceSpec, DeviceState, DeviceStatus, ExportSpec, SendZcMode,
    SessionRecord, StallPolicy,
};
use crate::mapper;

/// One attachment of this node.
#[derive(Debug)]
pub struct AttachmentRecord {
    /// Its folder.
    pub dir: AttachmentDir,
    /// What its device process was told.
    pub spec: DeviceSpec,
    /// What it says; `None` before its first word, and of an earlier boot.
    pub status: Option<DeviceStatus>,
    /// Its device process; `None`: dead.
    pub pid: Option<Pid>,
}

impl AttachmentRecord {
    /// Reads a folder; `None` if it holds no spec.
    ///
    /// # Errors
    /// [`NodeError::StateFile`], [`NodeError::Io`]
    pub fn read(dir: AttachmentDir) -> Result<Option<Self>, NodeError> {
        let spec = match contract::read_file(&dir.spec()) {
            Ok(spec) => spec,
            Err(ContractError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let pid = device_process::running_pid(&dir)?;
        let boot_id = contract::boot_id()?;
        let status = device_process::status(&dir)?.filter(|status| status.boot_id == boot_id);
        Ok(Some(Self { dir, spec, status, pid }))
    }

    /// What `/dev/ublkb<dev_id>` is called below the device directory, in lines that udev imports; `None`: nothing that is attached here.
    ///
    /// # Errors
    /// [`NodeError::Io`]
    pub fn name_of_device(run_dir: &Path, dev_id: u32) -> Result<Option<String>, NodeError> {
        for record in Self::read_all(run_dir)? {
            let Some(status) = record.status else { continue };
            let name = record.spec.device_link.file_name().and_then(|name| name.to_str());
            if let Some(name) = name.filter(|_| status.dev_id == Some(dev_id)) {
                let stalled = if status.state == DeviceState::Stalled { "VOLNODE_STALLED=1\n" } else { "" };
                return Ok(Some(format!("VOLNODE_NAME={name}\n{stalled}")));
            }
        }
        Ok(None)
    }

    /// Every attachment of a run directory, in order of target. What cannot be read is told in the log.
    ///
    /// # Errors
    /// [`NodeError::Io`]: the run directory cannot be read.
    pub fn read_all(run_dir: &Path) -> Result<Vec<Self>, NodeError> {
        Self::read_each(
            run_dir,
            |folder, error| tracing::error!(folder = %folder.display(), %error, "cannot read an attachment"),
        )
    }

    /// The same for who looks all the time: what cannot be read is told by the others.
    ///
    /// # Errors
    /// As of [`Self::read_all`].
    pub fn read_all_quietly(run_dir: &Path) -> Result<Vec<Self>, NodeError> {
        Self::read_each(run_dir, |_, _| ())
    }

    fn read_each(run_dir: &Path, cannot_read: impl Fn(&Path, &NodeError)) -> Result<Vec<Self>, NodeError> {
        let parent = AttachmentDir::parent(run_dir);
        let io_error = |source| NodeError::Io { what: format!("cannot read {}", parent.display()), source };
        let entries = match fs::read_dir(&parent) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error(error)),
        };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry.map_err(io_error)?.path();
            match Self::read(AttachmentDir::from_path(&path)) {
                Ok(record) => records.extend(record),
                Err(error) => cannot_read(&path, &error),
            }
        }
        records.sort_by(|a: &Self, b| a.spec.target.cmp(&b.spec.target));
        Ok(records)
    }

    /// Under which calls on the target wait for each other.
    pub fn lock_name(&self) -> String {
        self.target().map_or_else(|| self.spec.target.clone(), |target| target.to_string())
    }

    /// The target, if its spelling is one that this program knows.
    pub fn target(&self) -> Option<Target> {
        Target::parse(&self.spec.target).ok()
    }

    /// The attachment's state: a process that is gone leaves a dead device, whatever its status says.
    pub fn state(&self) -> v1::DeviceState {
        if self.pid.is_some() && self.status.as_ref().is_some_and(|status| status.is_stopping) {
            return v1::DeviceState::Stopping;
        }
        match (self.pid, self.status.as_ref().map(|status| status.state)) {
            (None, _) => v1::DeviceState::Dead,
            (Some(_), None | Some(DeviceState::Starting)) => v1::DeviceState::Starting,
            (Some(_), Some(DeviceState::Live)) => v1::DeviceState::Live,
            (Some(_), Some(DeviceState::Stalled)) => v1::DeviceState::Stalled,
            (Some(_), Some(DeviceState::Failed)) => v1::DeviceState::Failed,
            (Some(_), Some(DeviceState::Stopping)) => v1::DeviceState::Stopping,
        }
    }

    /// `/dev/ublkbN`, once the device exists.
    pub fn device_path(&self) -> Option<PathBuf> {
        self.status.as_ref().and_then(|status| status.dev_id).map(block_device_path)
    }

    /// Whether a detach means this attachment.
    pub fn is_meant_by(&self, selector: &DetachSelector) -> bool {
        match selector {
            DetachSelector::DevId(dev_id) => {
                self.status.as_ref().and_then(|status| status.dev_id) == Some(*dev_id)
            }
            DetachSelector::Path(path) => {
                let leads_to = fs::canonicalize(path).ok();
                let clear_link = self.spec.encrypted.as_ref().map(|encrypted| &encrypted.clear_link);
                let is_clear_disk =
                    || clear_link.is_some() && *path == mapper::path_of(self.spec.attachment_id);
                self.spec.device_link == *path
                    || clear_link == Some(path)
                    || (leads_to.is_some() && leads_to == self.device_path())
                    || is_clear_disk()
            }
            DetachSelector::Name { attachment_id, target } => {
                *attachment_id == Some(self.spec.attachment_id) || self.target().as_ref() == Some(target)
            }
        }
    }

    /// As the node API tells it.
    pub fn to_proto(&self) -> v1::NodeAttachment {
        let spec = &self.spec;
        let mut attachment = v1::NodeAttachment {
            attachment_id: spec.attachment_id.to_string(),
            target: spec.target.clone(),
            device_path: self.device_path().map(|path| path.display().to_string()).unwrap_or_default(),
            device_link: spec.device_link.display().to_string(),
            block_size_bytes: spec.block_size_bytes,
            read_only: spec.read_only,
            state: self.state().into(),
            data_path: spec.data_path.clone(),
            nr_hw_queues: spec.nr_hw_queues.into(),
            nr_connections: spec.nr_connections.into(),
            queue_depth: spec.queue_depth.into(),
            server_address: spec.addresses.first().cloned().unwrap_or_default(),
            busy_poll_us: spec.busy_poll_us.into(),
            send_zc_mode: told_send_zc_mode(spec.send_zc_mode()).into(),
            on_stall: stall_action(spec.on_stall).0.into(),
            stall_fail_after_ms: stall_action(spec.on_stall).1,
            volume_uid: match &spec.export {
                ExportSpec::Attachment { volume_uid, .. } => volume_uid.to_string(),
                ExportSpec::Nbd { .. } => String::new(),
            },
            pid: self.pid.map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs()),
            only_if_granted: spec.only_if_granted,
            ..Default::default()
        };
        if let Some(status) = &self.status {
            attachment.capacity_bytes = status.capacity_bytes;
            attachment.block_size_bytes = status.block_size_bytes;
            attachment.state_reason.clone_from(&status.state_reason);
            attachment.state_since_ms = status.state_since_ms;
            attachment.data_path.clone_from(&status.data_path);
            attachment.data_path_reason.clone_from(&status.data_path_reason);
            attachment.nr_hw_queues = status.nr_hw_queues.into();
            attachment.nr_connections = status.connections().into();
            attachment.queue_depth = status.queue_depth.into();
            attachment.server_address.clone_from(&status.server_address);
            attachment.encryption.clone_from(&status.encryption);
            status.send_zc.as_str().clone_into(&mut attachment.send_zc);
            attachment.session_epoch = status.session_epoch;
            let (on_stall, fail_after_ms) = stall_action(status.on_stall);
            attachment.set_on_stall(on_stall);
            attachment.stall_fail_after_ms = fail_after_ms;
            attachment.reconnects = status.reconnects;
            attachment.program_version.clone_from(&status.program_version);
            attachment.tail_bytes = status.session.as_ref().map_or(0, SessionRecord::tail_bytes);
        }
        if self.pid.is_none() && attachment.state_reason.is_empty() {
            let why =
                if self.status.is_some() { "the device process died" } else { "left by an earlier boot" };
            attachment.state_reason = format!("{why}; detach cleans up");
        }
        self.tell_clear_disk(&mut attachment);
        attachment
    }

    /// Of an encrypted volume it is the clear disk that is used.
    fn tell_clear_disk(&self, attachment: &mut v1::NodeAttachment) {
        let Some(encrypted) = &self.spec.encrypted else { return };
        attachment.is_encrypted = true;
        attachment.device_link = encrypted.clear_link.display().to_string();
        attachment.capacity_bytes = attachment.capacity_bytes.saturating_sub(LUKS_HEADER_BYTES);
        match mapper::find(self.spec.attachment_id) {
            Some(mapper) => {
                attachment.capacity_bytes = mapper.bytes;
                attachment.clear_device_path = mapper::path_of(self.spec.attachment_id).display().to_string();
            }
            None if attachment.state() == v1::DeviceState::Live && attachment.state_reason.is_empty() => {
                attachment.state_reason =
                    "its clear disk is not open; attach it again, with its passphrase".to_owned();
            }
            None => {}
        }
    }
}

/// A policy as the node API tells it.
fn stall_action(policy: StallPolicy) -> (v1::StallAction, u64) {
    match policy {
        StallPolicy::Wait => (v1::StallAction::Wait, 0),
        StallPolicy::FailAfterMs(after_ms) => (v1::StallAction::Fail, after_ms),
    }
}

/// A policy as the node API asks for it.
pub(crate) fn stall_policy(action: v1::StallAction, fail_after_ms: u64) -> StallPolicy {
    match action {
        v1::StallAction::Unspecified | v1::StallAction::Wait => StallPolicy::Wait,
        v1::StallAction::Fail => StallPolicy::FailAfterMs(fail_after_ms),
    }
}

/// A mode of SEND_ZC as the node API tells it.
fn told_send_zc_mode(mode: SendZcMode) -> v1::SendZcMode {
    match mode {
        SendZcMode::Auto => v1::SendZcMode::Auto,
        SendZcMode::On => v1::SendZcMode::On,
        SendZcMode::Off => v1::SendZcMode::Off,
    }
}

/// A mode of SEND_ZC as the node API asks for it. Who does not know modes says with `send_zc` whether it is to be on.
pub(crate) fn send_zc_mode(request: &v1::AttachRequest) -> SendZcMode {
    match request.send_zc_mode() {
        v1::SendZcMode::Unspecified if request.send_zc => SendZcMode::On,
        v1::SendZcMode::Unspecified | v1::SendZcMode::Auto => SendZcMode::Auto,
        v1::SendZcMode::On => SendZcMode::On,
        v1::SendZcMode::Off => SendZcMode::Off,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::contract::{CONTRACT_VERSION, EncryptedSpec, Encryption, SendZc, write_file};

    /// A spec for a volume, as the supervisor would write it.
    pub(crate) fn spec(attachment_id: Uuid, target: &str) -> DeviceSpec {
        let export = ExportSpec::Nbd { export_name: String::new() };
        DeviceSpec {
            addresses: vec!["127.0.0.1:10809".to_owned()],
            nr_hw_queues: 1,
            nr_connections: 1,
            block_size_bytes: 4096,
            ..DeviceSpec::new(
                attachment_id,
                target.to_owned(),
                export,
                PathBuf::from("/dev/volnode").join(target),
            )
        }
    }

    /// A status of that spec's device process.
    pub(crate) fn status(spec: &DeviceSpec, state: DeviceState, boot_id: &str) -> DeviceStatus {
        DeviceStatus {
            format_version: CONTRACT_VERSION,
            boot_id: boot_id.to_owned(),
            pid: 1,
            attachment_id: spec.attachment_id,
            target: spec.target.clone(),
            state,
            state_reason: String::new(),
            state_since_ms: 1,
            dev_id: Some(4_000_000),
            device_link: spec.device_link.clone(),
            capacity_bytes: 1 << 30,
            block_size_bytes: 4096,
            read_only: false,
            data_path: "mapped".to_owned(),
            data_path_reason: "asked for".to_owned(),
            nr_hw_queues: 1,
            nr_connections: 1,
            queue_depth: 128,
            server_address: "127.0.0.1:10809".to_owned(),
            encryption: "none".to_owned(),
            send_zc: SendZc::Off,
            session_epoch: 3,
            on_stall: StallPolicy::Wait,
            on_stall_is_told: false,
            reconnects: 0,
            is_stopping: false,
            session: None,
            program_version: String::new(),
        }
    }

    fn write(run_dir: &Path, id: u128, target: &str, boot_id: &str) -> DeviceSpec {
        let dir = AttachmentDir::new(run_dir, Uuid::from_u128(id));
        fs::create_dir_all(dir.path()).unwrap();
        let spec = spec(Uuid::from_u128(id), target);
        write_file(&dir.spec(), &spec).unwrap();
        write_file(&dir.status(), &status(&spec, DeviceState::Live, boot_id)).unwrap();
        spec
    }

    #[test]
    fn an_attachment_without_its_process_is_dead_whatever_its_status_says() {
        let run_dir = tempfile::tempdir().unwrap();
        write(run_dir.path(), 7, "vol-7", &contract::boot_id().unwrap());
        let records = AttachmentRecord::read_all(run_dir.path()).unwrap();
        let attachment = records[0].to_proto();
        assert_eq!(attachment.state(), v1::DeviceState::Dead);
        assert_eq!(attachment.state_reason, "the device process died; detach cleans up");
        assert_eq!(attachment.device_path, "/dev/ublkb4000000");
    }

    #[test]
    fn of_an_encrypted_volume_the_clear_disk_is_told() {
        let run_dir = tempfile::tempdir().unwrap();
        let id = Uuid::from_u128(0xe11c);
        let dir = AttachmentDir::new(run_dir.path(), id);
        fs::create_dir_all(dir.path()).unwrap();
        let clear_link = PathBuf::from("/dev/volnode/vault");
        let encrypted = Some(EncryptedSpec { clear_link: clear_link.clone() });
        let device_link = PathBuf::from("/dev/volnode/.encrypted.vault");
        let spec = DeviceSpec { encrypted, device_link, ..spec(id, "vault") };
        write_file(&dir.spec(), &spec).unwrap();
        let boot_id = contract::boot_id().unwrap();
        write_file(&dir.status(), &status(&spec, DeviceState::Live, &boot_id)).unwrap();
        let record = AttachmentRecord::read(dir).unwrap().unwrap();
        assert_eq!(record.spec, spec);
        let told = record.to_proto();
        assert!(told.is_encrypted && told.clear_device_path.is_empty(), "{told:?}");
        assert_eq!(
            (told.device_link.as_str(), told.capacity_bytes),
            ("/dev/volnode/vault", (1 << 30) - (16 << 20))
        );
        for text in ["vault", "/dev/volnode/vault", &format!("/dev/mapper/volnode-{id}")] {
            assert!(record.is_meant_by(&DetachSelector::parse(text).unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_not_on_the_disk_is_told() {
        let run_dir = tempfile::tempdir().unwrap();
        let boot_id = contract::boot_id().unwrap();
        let spec = write(run_dir.path(), 7, "nbd://h/iso", &boot_id);
        let dir = AttachmentDir::new(run_dir.path(), spec.attachment_id);
        let told = |session| {
            write_file(
                &dir.status(),
                &DeviceStatus { session, ..status(&spec, DeviceState::Live, &boot_id) },
            )
            .unwrap();
            AttachmentRecord::read(dir.clone()).unwrap().unwrap().to_proto().tail_bytes
        };
        let session = SessionRecord {
            incarnation: String::new(),
            encryption: Encryption::None,
            export_bytes: (1 << 20) + 2048,
            export_flags: 0,
            export_block_bytes: None,
            capacity_bytes: 1 << 20,
            block_size_bytes: 4096,
            max_io_bytes: 1 << 20,
            volatile_cache: false,
            read_only: true,
        };
        assert_eq!((told(None), told(Some(session))), (0, 2048));
    }

    #[test]
    fn the_status_of_another_boot_means_nothing() {
        let run_dir = tempfile::tempdir().unwrap();
        write(run_dir.path(), 7, "vol-7", "another");
        let attachment = AttachmentRecord::read_all(run_dir.path()).unwrap()[0].to_proto();
        assert_eq!(attachment.device_path, "");
        assert_eq!(attachment.state_reason, "left by an earlier boot; detach cleans up");
    }

    #[test]
    fn folders_that_are_no_attachments_are_passed_over() {
        let run_dir = tempfile::tempdir().unwrap();
        let parent = AttachmentDir::parent(run_dir.path());
        fs::create_dir_all(parent.join("half-made")).unwrap();
        fs::create_dir_all(parent.join("newer")).unwrap();
        fs::write(parent.join("newer/spec.json"), r#"{"format_version": 99}"#).unwrap();
        write(run_dir.path(), 2, "vol-b", "x");
        write(run_dir.path(), 1, "vol-a", "x");
        let records = AttachmentRecord::read_all(run_dir.path()).unwrap();
        let targets: Vec<&str> = records.iter().map(|record| record.spec.target.as_str()).collect();
        assert_eq!(targets, ["vol-a", "vol-b"]);
    }

    #[test]
    fn every_name_of_an_attachment_means_it() {
        let run_dir = tempfile::tempdir().unwrap();
        let spec = write(run_dir.path(), 7, "vol-7", &contract::boot_id().unwrap());
        let record = AttachmentRecord::read_all(run_dir.path()).unwrap().remove(0);
        for text in ["vol-7", "/dev/ublkb4000000", "/dev/volnode/vol-7", &spec.attachment_id.to_string()] {
            assert!(record.is_meant_by(&DetachSelector::parse(text).unwrap()), "{text}");
        }
        for text in ["vol-8", "/dev/ublkb1", "/dev/volnode/vol-8", "nbd://h/vol-7"] {
            assert!(!record.is_meant_by(&DetachSelector::parse(text).unwrap()), "{text}");
        }
    }
}
