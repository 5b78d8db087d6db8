//! Attach: what is asked of the server, the spec that a device process gets, and what is undone when a step fails.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use proto::volume_name::partition_of;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tonic::Code;
use ublk_core::DataPath;
use uuid::Uuid;

use super::clear_disk::Unlock;
use super::wishes::Wishes;
use super::{Supervisor, probe_data_paths, remove_device_and_link, remove_folder};
use crate::api_channel;
use crate::contract::{
    AttachmentDir, CONTRACT_VERSION_TLS, DeviceSpec, EncryptedSpec, ExportSpec, SendZcMode, write_file,
};
use crate::data_address::{self, Place};
use crate::node::attachment_record::AttachmentRecord;
use crate::node::device_process::{self, Started};
use crate::node::error::NodeError;
use crate::node::recover_spec::recover_spec;
use crate::node::target::{self, NbdUri, Target};
use crate::tls_spec::TlsSpec;

/// For a connection that only shows whether somebody is there.
const DIAGNOSIS_DEADLINE: Duration = Duration::from_secs(2);

/// An attachment on its way: its spec, and what its failure has to give back.
#[derive(Debug)]
struct NewAttachment {
    spec: DeviceSpec,
    /// The server's grant came with this call.
    is_granted_now: bool,
}

impl Supervisor {
    /// Makes a target a local disk; tells whether it was one before.
    ///
    /// # Errors
    /// [`NodeError`], by cause; nothing of a new attachment is left then.
    pub async fn attach(
        self: &Arc<Self>,
        mut request: v1::AttachRequest,
    ) -> Result<v1::AttachResponse, NodeError> {
        let target = Target::parse(&request.target)?;
        let mut wishes = Wishes::of(&request, &target)?;
        let unlock = Unlock::of(&mut request)?;
        let _guard = self.locks.lock(&target.to_string()).await;
        let (found, attached): (Vec<_>, Vec<_>) = AttachmentRecord::read_all(&self.config.run_dir)?
            .into_iter()
            .partition(|record| record.target().as_ref() == Some(&target));
        let found = found.into_iter().next();
        // What was made under a grant is not made anew without one, whoever asks.
        wishes.only_if_granted |= found.as_ref().is_some_and(|record| record.spec.only_if_granted);
        if wishes.only_if_granted {
            self.require_grant(&target, &wishes).await?;
        }
        if let Some(record) = &found {
            if self.reuse(record, &wishes).await?.is_some() {
                if wishes.only_if_granted {
                    self.hold_under_grant(&target, record).await?;
                }
                let attachment = self.open_clear_disk(&record.dir, &record.spec.target, &unlock).await?;
                return Ok(v1::AttachResponse { attachment: Some(attachment), existed: true });
            }
            self.close(record).await?;
            remove_device_and_link(&record.spec, false).await?;
        }
        check_link(&target, &attached, has_partition)?;
        let tls = self.tls_for(&target)?;
        check_machine(wishes.data_path).await?;
        let mut new = match &target {
            Target::Volume(_) | Target::Snapshot(_) => {
                self.prepare_volume(&target, &wishes, &unlock, request.force, found.as_ref()).await?
            }
            Target::Nbd(uri) => {
                unlock.fits(&request.target, false)?;
                self.prepare_nbd(uri, &target::unescaped(&request.target), &wishes, found.as_ref())
            }
        };
        // A snapshot goes by two names: what serves it under the other one is left alone.
        let _of_attachment = self.locks.lock(&new.spec.attachment_id.to_string()).await;
        let there = AttachmentRecord::read(AttachmentDir::new(&self.config.run_dir, new.spec.attachment_id))?;
        if let Some(other) = there.filter(|record| record.spec.target != new.spec.target) {
            return Err(NodeError::AttachedAs { target: new.spec.target, other: other.spec.target });
        }
        if tls.is_some() {
            new.spec.format_version = CONTRACT_VERSION_TLS;
            new.spec.tls = tls;
        }
        if let Some(old) = found.filter(|old| old.spec.attachment_id != new.spec.attachment_id) {
            remove_folder(&old.dir)?;
        }
        let attachment = self.start(new, &unlock).await?;
        Ok(v1::AttachResponse { attachment: Some(attachment), existed: false })
    }

    /// Makes sure that the volume is granted to this node. The server looks again when it is attached; but what is a disk here already
    /// is not attached again, and a server that knows no grants would attach without one.
    async fn require_grant(&self, target: &Target, wishes: &Wishes) -> Result<(), NodeError> {
        let name = target.to_string();
        let (why, next) = match self.management.grant_of(&name, &self.config.node_id).await {
            Ok(None) => ("is not granted to this node", "grant it to this node first (volctl grant create)"),
            Ok(Some(grant)) if grant.read_only && !wishes.read_only => {
                let next = "attach it read-only, or take the grant away and make another (volctl grant)";
                ("is granted to this node read-only", next)
            }
            Ok(Some(_)) => return Ok(()),
            Err(NodeError::Refused(status)) if status.code() == Code::Unimplemented => {
                let why = "cannot be granted: the storage server is of a version that knows no grants";
                (why, "upgrade volserver, or attach it without asking for a grant")
            }
            Err(error) => return Err(error),
        };
        Err(NodeError::NotGranted { target: name, why, next })
    }

    /// Makes sure that the server has not ended the attachment of a disk that is there, which may not have noticed yet; and notes
    /// that whoever asks for it has a grant.
    async fn hold_under_grant(&self, target: &Target, found: &AttachmentRecord) -> Result<(), NodeError> {
        let target = target.to_string();
        let held = self.management.attachments_of(&target, &self.config.node_id).await?;
        let attachment_id = found.spec.attachment_id.to_string();
        let is_held = |attachment: &v1::Attachment| attachment.attachment_id == attachment_id;
        if !held.iter().any(|attachment| is_held(attachment) && !attachment.is_ending) {
            let why = "the storage server has ended its attachment".to_owned();
            return Err(NodeError::DeviceFailed { target, why });
        }
        // Another process may have taken the device on, by another spec.
        let record = AttachmentRecord::read(found.dir.clone())?;
        let mut record = record.ok_or(NodeError::NotAttached { target })?;
        if !record.spec.only_if_granted {
            record.spec.only_if_granted = true;
            write_file(&record.dir.spec(), &record.spec)?;
        }
        Ok(())
    }

    /// The attachment that is there, if it serves; `None` if it is dead.
    async fn reuse(
        self: &Arc<Self>,
        record: &AttachmentRecord,
        wishes: &Wishes,
    ) -> Result<Option<v1::NodeAttachment>, NodeError> {
        let target = &record.spec.target;
        match record.state() {
            v1::DeviceState::Dead | v1::DeviceState::Unspecified => {
                let Some(spec) = recover_spec(record) else { return Ok(None) };
                return self.recover(record, spec).await.map(Some);
            }
            v1::DeviceState::Stopping => {
                device_process::wait_until_gone(&record.dir, target).await?;
                return Ok(None);
            }
            v1::DeviceState::Failed => {
                let why = record.to_proto().state_reason;
                return Err(NodeError::DeviceFailed { target: target.clone(), why });
            }
            // It is there, and its I/O waits or fails as it was asked to.
            v1::DeviceState::Stalled => {
                return match wishes.other_access(&record.spec) {
                    None => Ok(Some(record.to_proto())),
                    Some(difference) => {
                        let (target, differences) = (target.clone(), vec![difference]);
                        Err(NodeError::AttachedDifferently { target, differences })
                    }
                };
            }
            v1::DeviceState::Starting | v1::DeviceState::Live => {}
        }
        let status = match device_process::wait_until_live(&record.dir, target, None).await? {
            Started::Live(status) => status,
            Started::Failed(why) => return Err(NodeError::StartFailed { target: target.clone(), why }),
        };
        let differences = wishes.differences(&record.spec, &status);
        if !differences.is_empty() {
            return Err(NodeError::AttachedDifferently { target: target.clone(), differences });
        }
        Ok(AttachmentRecord::read(record.dir.clone())?.map(|record| record.to_proto()))
    }

    /// Asks the server for the volume or snapshot. The epoch is higher than that of any device process before.
    async fn prepare_volume(
        &self,
        target: &Target,
        wishes: &Wishes,
        unlock: &Unlock,
        force: bool,
        previous: Option<&AttachmentRecord>,
    ) -> Result<NewAttachment, NodeError> {
        let name = &target.to_string();
        let (node_id, mode) = (&self.config.node_id, wishes.access_mode());
        let granted =
            self.management.attach_volume(name, node_id, mode, force, wishes.only_if_granted).await?;
        if let Err(error) = unlock.fits(name, granted.is_encrypted) {
            if !granted.existed {
                self.management.detach_volume(&granted.attachment_id.to_string()).await?;
            }
            return Err(error);
        }
        let previous_epoch = previous.map_or(0, |record| match record.spec.export {
            ExportSpec::Attachment { session_epoch, .. } => session_epoch,
            ExportSpec::Nbd { .. } => 0,
        });
        let export = ExportSpec::Attachment {
            secret: granted.secret.expose().to_owned(),
            session_epoch: granted.session_epoch.max(previous_epoch) + 1,
            server_id: granted.server_id,
            volume_uid: granted.volume_uid,
        };
        let mut spec = self.spec(granted.attachment_id, target, export, wishes);
        spec.addresses = self.as_seen_from_here(granted.data_addresses);
        spec.block_size_bytes = granted.block_size_bytes;
        spec.is_volatile = granted.is_volatile;
        if granted.is_encrypted {
            // No volume's name, and no other link's, begins so.
            let disk_link = format!(".encrypted.{}", target.link_name(granted.attachment_id));
            let disk_link = self.config.device_dir.join(disk_link);
            let clear_link = std::mem::replace(&mut spec.device_link, disk_link);
            spec.encrypted = Some(EncryptedSpec { clear_link });
        }
        Ok(NewAttachment { spec, is_granted_now: !granted.existed })
    }

    /// An NBD server grants nothing: the attachment is this node's own, under an id that it keeps.
    fn prepare_nbd(
        &self,
        uri: &NbdUri,
        as_given: &str,
        wishes: &Wishes,
        previous: Option<&AttachmentRecord>,
    ) -> NewAttachment {
        let attachment_id = previous.map_or_else(Uuid::new_v4, |record| record.spec.attachment_id);
        let export = ExportSpec::Nbd { export_name: uri.export_name.clone() };
        let mut spec = self.spec(attachment_id, &Target::Nbd(uri.clone()), export, wishes);
        spec.target = as_given.to_owned();
        spec.addresses = vec![uri.address()];
        NewAttachment { spec, is_granted_now: false }
    }

    /// How TLS is spoken for a target; `None`: it is not. Whoever answers for a volume, at whichever address, has to be the
    /// server that is managed.
    fn tls_for(&self, target: &Target) -> Result<Option<TlsSpec>, NodeError> {
        let server = self.management.server();
        let server_name = match target {
            Target::Volume(_) | Target::Snapshot(_) => {
                api_channel::host(server).filter(|_| api_channel::is_https(server))
            }
            Target::Nbd(uri) => uri.certificate_name().map(str::to_owned),
        };
        let Some(server_name) = server_name else { return Ok(None) };
        let Some(files) = self.config.tls_files.clone() else {
            let message =
                "TLS needs the certificate of the server's authority: start volclient with --tls-ca";
            return Err(NodeError::InvalidField { field: "target", message: message.to_owned() });
        };
        Ok(Some(TlsSpec {
            files,
            server_name,
            user_space_only: self.config.tls_user_space_only,
            key_bytes_max: self.config.tls_key_bytes_max,
        }))
    }

    fn spec(&self, attachment_id: Uuid, target: &Target, export: ExportSpec, wishes: &Wishes) -> DeviceSpec {
        let device_link = self.config.device_dir.join(target.link_name(attachment_id));
        let unasked = DeviceSpec::new(attachment_id, target.to_string(), export, device_link);
        DeviceSpec {
            read_only: wishes.read_only,
            data_path: wishes.data_path.map_or(unasked.data_path, |path| path.as_str().to_owned()),
            nr_hw_queues: wishes.nr_hw_queues.unwrap_or(unasked.nr_hw_queues),
            nr_connections: wishes.nr_connections.unwrap_or(unasked.nr_connections),
            queue_depth: wishes.queue_depth.unwrap_or(unasked.queue_depth),
            on_stall: wishes.on_stall,
            busy_poll_us: wishes.busy_poll_us.unwrap_or(unasked.busy_poll_us),
            send_zc: wishes.send_zc_mode == SendZcMode::On,
            send_zc_mode: Some(wishes.send_zc_mode),
            only_if_granted: wishes.only_if_granted,
            ..unasked
        }
    }

    /// Writes the spec, starts the device process and waits for its device; undoes all of it on failure.
    async fn start(
        self: &Arc<Self>,
        new: NewAttachment,
        unlock: &Unlock,
    ) -> Result<v1::NodeAttachment, NodeError> {
        let dir = AttachmentDir::new(&self.config.run_dir, new.spec.attachment_id);
        let started = match self.start_device(&dir, &new.spec).await {
            Ok(_) => self.open_clear_disk(&dir, &new.spec.target, unlock).await,
            Err(error) => Err(error),
        };
        match started {
            Ok(attachment) => Ok(attachment),
            // The folder is a newer program's: not ours to undo.
            Err(error @ NodeError::StateFile(_)) => Err(error),
            Err(error) => {
                self.undo(&dir, &new).await;
                Err(error)
            }
        }
    }

    pub(in crate::node) async fn start_device(
        self: &Arc<Self>,
        dir: &AttachmentDir,
        spec: &DeviceSpec,
    ) -> Result<v1::NodeAttachment, NodeError> {
        // Fails if a newer program wrote what is there.
        AttachmentRecord::read(dir.clone())?;
        let io_error =
            |source| NodeError::Io { what: format!("cannot make {}", dir.path().display()), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir.path()).map_err(io_error)?;
        // First: with neither this nor the status nobody would know whose the device is.
        write_file(&dir.spec(), spec)?;
        // What the process before said must not be taken for this one's word.
        for path in [dir.status(), dir.control_socket()] {
            if path.exists() {
                fs::remove_file(path).map_err(io_error)?;
            }
        }
        let mut child = device_process::spawn(dir, &self.config.log_filter, self.config.pod_exit.as_ref())?;
        let pid = child.id();
        match device_process::wait_until_live(dir, &spec.target, Some(&mut child)).await? {
            Started::Failed(why) => Err(start_failure(spec, why).await),
            Started::Live(status) => {
                tracing::info!(target = spec.target, pid, dev_id = status.dev_id, "attached");
                // Takes the exit status, so that no zombie stays.
                tokio::spawn(async move { drop(child.wait().await) });
                self.watch(dir);
                let record = AttachmentRecord::read(dir.clone())?;
                record.map(|record| record.to_proto()).ok_or(NodeError::StartFailed {
                    target: spec.target.clone(),
                    why: "its folder was removed".to_owned(),
                })
            }
        }
    }

    /// Takes back a failed attach. What cannot be taken back stays in its folder, for a detach to finish.
    async fn undo(&self, dir: &AttachmentDir, new: &NewAttachment) {
        let spec = &new.spec;
        let undone = async {
            if let Some(record) = AttachmentRecord::read(dir.clone())? {
                self.close(&record).await?;
            }
            device_process::kill(dir, &spec.target).await?;
            remove_device_and_link(spec, false).await?;
            if new.is_granted_now {
                self.management.detach_volume(&spec.attachment_id.to_string()).await?;
            }
            remove_folder(dir)
        };
        if let Err(error) = undone.await {
            tracing::error!(target = spec.target, %error, "a failed attach could not be undone; detach cleans up");
        }
    }
}

/// Makes sure that a volume's stable name is not the one of a partition that is there (of which disk, and which); volumes of such
/// names are no longer made.
fn check_link(
    target: &Target,
    attached: &[AttachmentRecord],
    is_there: impl Fn(u32, u32) -> bool,
) -> Result<(), NodeError> {
    let Target::Volume(name) = target else { return Ok(()) };
    let Some((disk, partition)) = partition_of(name) else { return Ok(()) };
    let is_disk = |record: &&AttachmentRecord| record.target() == Some(Target::Volume(disk.to_owned()));
    let dev_id = attached.iter().find(is_disk).and_then(|record| record.status.as_ref()?.dev_id);
    match dev_id.filter(|dev_id| is_there(*dev_id, partition)) {
        Some(_) => Err(NodeError::NameTaken { target: name.clone(), disk: disk.to_owned(), partition }),
        None => Ok(()),
    }
}

fn has_partition(dev_id: u32, partition: u32) -> bool {
    Path::new(&format!("/sys/class/block/ublkb{dev_id}p{partition}")).exists()
}

/// Tells a server that is not there from any other reason of a device process to give up.
async fn start_failure(spec: &DeviceSpec, why: String) -> NodeError {
    let target = spec.target.clone();
    for address in &spec.addresses {
        if let Ok(true) = timeout(DIAGNOSIS_DEADLINE, accepts_connections(address.clone())).await {
            return NodeError::StartFailed { target, why };
        }
    }
    NodeError::DataUnreachable { target, addresses: spec.addresses.clone(), why }
}

async fn accepts_connections(address: String) -> bool {
    let places = tokio::task::spawn_blocking(move || data_address::resolve(&address)).await;
    for place in places.into_iter().flatten().flatten() {
        let accepts = match place {
            Place::Tcp(address) => TcpStream::connect(address).await.is_ok(),
            Place::Unix(path) => UnixStream::connect(path).await.is_ok(),
        };
        if accepts {
            return true;
        }
    }
    false
}

/// Finds out whether this machine can do what is asked, before the server is asked for anything.
async fn check_machine(data_path: Option<DataPath>) -> Result<(), NodeError> {
    let report = probe_data_paths().await?;
    let Some(data_path) = data_path else { return Ok(()) };
    report.check(data_path).map_err(|why| NodeError::DataPathUnsupported {
        data_path: data_path.to_string(),
        why: crate::causes::with_sources(why),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::DeviceState;
    use crate::node::attachment_record::tests::{spec, status};

    #[test]
    fn a_name_that_a_partition_has_is_not_given_to_a_disk() {
        let spec = spec(Uuid::from_u128(7), "vol-1");
        let status = status(&spec, DeviceState::Live, "boot");
        let dir = AttachmentDir::from_path("/nowhere");
        let attached = [AttachmentRecord { dir, spec, status: Some(status), pid: None }];
        let check = |name: &str| {
            let is_there = |dev_id, partition| (dev_id, partition) == (4_000_000, 2);
            check_link(&Target::parse(name).unwrap(), &attached, is_there)
        };
        let taken = check("vol-1-part2").unwrap_err();
        assert_eq!(
            taken.to_string(),
            "partition 2 of vol-1, which is attached to this machine, has the name that the disk of vol-1-part2 would have"
        );
        for free in ["vol-1-part1", "vol-2-part2", "vol-2", "nbd://h/vol-1-part2"] {
            check(free).unwrap();
        }
    }
}
