//! Attach, detach and list: the order of steps, and what is undone when one fails.
//!
//! ```text
//! attach:  server grants ──▶ spec written ──▶ device process started ──▶ live
//!             │ any failure: process killed, device and link removed, grant given back, folder removed
//! detach:  device process stops ──▶ server told ──▶ folder removed
//! death:   process ends unasked ──▶ another one takes its device on (`recovery.rs`)
//! ```
//!
//! Invariants: calls on one target run one after the other. A folder is removed last, so that whatever was left half
//! done by a crash is found again. The session epoch in a spec is higher than any that the server or an earlier spec
//! has told. A secret goes into the spec and nowhere else.
//! Called by: `node_service`.

use std::fmt::Display;
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use proto::volume_name::partition_of;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tonic::Code;
use ublk_core::abi::UBLK_MAX_QUEUE_DEPTH;
use ublk_core::{ControlDevice, DataPath, ProbeReport};
use uuid::Uuid;

use super::attachment_record::{AttachmentRecord, stall_policy};
use super::device_process::{self, Started};
use super::error::NodeError;
use super::leftovers;
use super::management_client::ManagementClient;
use super::recover_spec::recover_spec;
use super::target::{self, DetachSelector, NbdUri, Target};
use super::target_locks::TargetLocks;
use crate::api_channel;
use crate::contract::{
    AttachmentDir, CONTRACT_VERSION, CONTRACT_VERSION_TLS, ControlCommand, ControlResponse, DeviceSpec,
    DeviceState, DeviceStatus, ExportSpec, StallPolicy, now_ms, write_file,
};
use crate::data_address::{self, Place, on_the_link_of};
use crate::tls_spec::{ClientFiles, TlsSpec};

/// Most connections of one attachment, and so most queues: a server that is asked for more by mistake should not have
/// to refuse them one by one.
const NR_CONNECTIONS_MAX: u16 = 256;
const QUEUE_DEPTH_DEFAULT: u16 = 128;
/// Longer is not waiting for an answer any more.
const BUSY_POLL_US_MAX: u16 = 10_000;
/// Lets the device process choose the data path.
const DATA_PATH_AUTO: &str = "auto";
/// For a connection that only shows whether somebody is there.
const DIAGNOSIS_DEADLINE: Duration = Duration::from_secs(2);

/// What the daemon was started with.
#[derive(Debug, Clone)]
pub struct SupervisorConfig {
    /// Attachment folders lie below it.
    pub run_dir: PathBuf,
    /// Stable links are made in it.
    pub device_dir: PathBuf,
    /// This machine, to the server.
    pub node_id: String,
    /// What device processes log.
    pub log_filter: String,
    /// The files of TLS, where there is TLS.
    pub tls_files: Option<ClientFiles>,
    /// The kernel may not encrypt, even if it could.
    pub tls_user_space_only: bool,
    /// How much the kernel may encrypt under one key, in bytes.
    pub tls_key_bytes_max: u64,
}

/// The attachments of this node.
#[derive(Debug)]
pub struct Supervisor {
    config: SupervisorConfig,
    pub(super) management: ManagementClient,
    pub(super) locks: TargetLocks,
}

/// How a target is to be attached; `None` where any will do.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wishes {
    read_only: bool,
    data_path: Option<DataPath>,
    nr_hw_queues: Option<u16>,
    nr_connections: Option<u16>,
    queue_depth: Option<u16>,
    on_stall: StallPolicy,
    busy_poll_us: Option<u16>,
    send_zc: bool,
}

impl Wishes {
    fn of(request: &v1::AttachRequest) -> Result<Self, NodeError> {
        let data_path = match request.data_path.as_str() {
            "" | DATA_PATH_AUTO => None,
            name => Some(name.parse().map_err(|error| NodeError::InvalidField {
                field: "data_path",
                message: format!("{error}; auto chooses"),
            })?),
        };
        let nr_hw_queues = limited("nr_hw_queues", request.nr_hw_queues, NR_CONNECTIONS_MAX)?;
        let nr_connections = limited("nr_connections", request.nr_connections, NR_CONNECTIONS_MAX)?;
        if let (Some(queues), Some(connections)) = (nr_hw_queues, nr_connections)
            && connections < queues
        {
            return Err(NodeError::InvalidField {
                field: "nr_connections",
                message: format!(
                    "{connections} are too few for {queues} queues: ask for at least {queues} connections, or fewer queues"
                ),
            });
        }
        Ok(Self {
            read_only: request.read_only,
            data_path,
            nr_hw_queues,
            nr_connections,
            queue_depth: limited("queue_depth", request.queue_depth, UBLK_MAX_QUEUE_DEPTH)?,
            on_stall: stall_policy(request.on_stall(), request.stall_fail_after_ms),
            busy_poll_us: limited("busy_poll_us", request.busy_poll_us, BUSY_POLL_US_MAX)?,
            send_zc: request.send_zc,
        })
    }

    /// In what an attachment is otherwise than wished, for people. What was asked for and could not be had in full, such
    /// as more queues than there are processors, may be asked for again.
    fn differences(&self, spec: &DeviceSpec, in_use: &DeviceStatus) -> Vec<String> {
        let mut differences = Vec::new();
        let mut differ = |name: &str, is: &dyn Display, wished: &dyn Display| {
            differences.push(format!("{name} {is} instead of {wished}"));
        };
        if spec.read_only != self.read_only {
            differ("read_only", &spec.read_only, &self.read_only);
        }
        // Not to ask for it leaves the choice.
        if self.send_zc && !spec.send_zc {
            differ("send_zc", &spec.send_zc, &self.send_zc);
        }
        if let Some(wished) = self.data_path.filter(|path| path.as_str() != in_use.data_path) {
            differ("data_path", &in_use.data_path, &wished);
        }
        let numbers = [
            ("nr_hw_queues", in_use.nr_hw_queues, spec.nr_hw_queues, self.nr_hw_queues),
            ("nr_connections", in_use.connections(), spec.nr_connections, self.nr_connections),
            ("queue_depth", in_use.queue_depth, spec.queue_depth, self.queue_depth),
            ("busy_poll_us", spec.busy_poll_us, spec.busy_poll_us, self.busy_poll_us),
        ];
        for (name, is, asked, wished) in numbers {
            if let Some(wished) = wished.filter(|wished| ![is, asked].contains(wished)) {
                differ(name, &is, &wished);
            }
        }
        differences
    }
}

/// 0 leaves the choice; anything else must be within what the driver takes.
fn limited(field: &'static str, value: u32, max: u16) -> Result<Option<u16>, NodeError> {
    match u16::try_from(value) {
        Ok(0) => Ok(None),
        Ok(value) if value <= max => Ok(Some(value)),
        _ => Err(NodeError::InvalidField { field, message: format!("{value} is more than {max}") }),
    }
}

/// An attachment on its way: its spec, and what its failure has to give back.
#[derive(Debug)]
struct NewAttachment {
    spec: DeviceSpec,
    /// The server's grant came with this call.
    is_granted_now: bool,
}

impl Supervisor {
    /// A supervisor for the attachments below `config.run_dir`.
    pub fn new(config: SupervisorConfig, management: ManagementClient) -> Self {
        Self { config, management, locks: TargetLocks::default() }
    }

    /// What the daemon was started with.
    pub fn config(&self) -> &SupervisorConfig {
        &self.config
    }

    /// The storage server's URI.
    pub fn server(&self) -> &str {
        self.management.server()
    }

    /// Every attachment, in order of target.
    ///
    /// # Errors
    /// [`NodeError::Io`]
    pub fn list(&self) -> Result<Vec<v1::NodeAttachment>, NodeError> {
        let records = AttachmentRecord::read_all(&self.config.run_dir)?;
        Ok(records.iter().map(AttachmentRecord::to_proto).collect())
    }

    /// Tells the log what was found at the start of the daemon, and takes it on: what runs is watched, what died is
    /// recovered where it can be.
    ///
    /// # Errors
    /// [`NodeError::Io`]
    pub fn adopt_found_attachments(self: &Arc<Self>) -> Result<(), NodeError> {
        for record in AttachmentRecord::read_all(&self.config.run_dir)? {
            let attachment = record.to_proto();
            let (target, state) = (&attachment.target, record.state());
            if record.pid.is_some() {
                tracing::info!(target, pid = attachment.pid, ?state, "attachment found running");
            } else {
                tracing::warn!(target, reason = attachment.state_reason, "attachment found dead");
            }
            self.watch(&record.dir);
        }
        Ok(())
    }

    /// Makes a target a local disk; tells whether it was one before.
    ///
    /// # Errors
    /// [`NodeError`], by cause; nothing of a new attachment is left then.
    pub async fn attach(
        self: &Arc<Self>,
        request: v1::AttachRequest,
    ) -> Result<v1::AttachResponse, NodeError> {
        let target = Target::parse(&request.target)?;
        let wishes = Wishes::of(&request)?;
        let _guard = self.locks.lock(&target.to_string()).await;
        let (found, attached): (Vec<_>, Vec<_>) = AttachmentRecord::read_all(&self.config.run_dir)?
            .into_iter()
            .partition(|record| record.target().as_ref() == Some(&target));
        let found = found.into_iter().next();
        if let Some(record) = &found {
            if let Some(attachment) = self.reuse(record, &wishes).await? {
                return Ok(v1::AttachResponse { attachment: Some(attachment), existed: true });
            }
            remove_device_and_link(&record.spec, false).await?;
        }
        check_link(&target, &attached, has_partition)?;
        let tls = self.tls_for(&target)?;
        check_machine(wishes.data_path).await?;
        let mut new = match &target {
            Target::Volume(name) => self.prepare_volume(name, &wishes, request.force, found.as_ref()).await?,
            Target::Nbd(uri) => {
                self.prepare_nbd(uri, &target::unescaped(&request.target), &wishes, found.as_ref())
            }
        };
        if tls.is_some() {
            new.spec.format_version = CONTRACT_VERSION_TLS;
            new.spec.tls = tls;
        }
        if let Some(old) = found.filter(|old| old.spec.attachment_id != new.spec.attachment_id) {
            remove_folder(&old.dir)?;
        }
        let attachment = self.start(new).await?;
        Ok(v1::AttachResponse { attachment: Some(attachment), existed: false })
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
            v1::DeviceState::Stalled => return Ok(Some(record.to_proto())),
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

    /// Asks the server for the volume. The epoch is higher than that of any device process before.
    async fn prepare_volume(
        &self,
        name: &str,
        wishes: &Wishes,
        force: bool,
        previous: Option<&AttachmentRecord>,
    ) -> Result<NewAttachment, NodeError> {
        let granted =
            self.management.attach_volume(name, &self.config.node_id, wishes.read_only, force).await?;
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
        let target = Target::Volume(name.to_owned());
        let mut spec = self.spec(granted.attachment_id, &target, export, wishes);
        spec.addresses = self.as_seen_from_here(granted.data_addresses);
        spec.block_size_bytes = granted.block_size_bytes;
        spec.is_volatile = granted.is_volatile;
        Ok(NewAttachment { spec, is_granted_now: !granted.existed })
    }

    /// Data addresses that the server tells, with the zone of those that are of the link on which its API is.
    pub(super) fn as_seen_from_here(&self, told: Vec<String>) -> Vec<String> {
        let zone = api_channel::zone(self.management.server());
        told.into_iter().map(|address| on_the_link_of(zone.as_deref(), address)).collect()
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
            Target::Volume(_) => api_channel::host(server).filter(|_| api_channel::is_https(server)),
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
        DeviceSpec {
            format_version: CONTRACT_VERSION,
            attachment_id,
            target: target.to_string(),
            addresses: Vec::new(),
            export,
            read_only: wishes.read_only,
            data_path: wishes.data_path.map_or(DATA_PATH_AUTO, DataPath::as_str).to_owned(),
            nr_hw_queues: wishes.nr_hw_queues.unwrap_or(0),
            nr_connections: wishes.nr_connections.unwrap_or(0),
            queue_depth: wishes.queue_depth.unwrap_or(QUEUE_DEPTH_DEFAULT),
            block_size_bytes: 0,
            device_link: self.config.device_dir.join(target.link_name(attachment_id)),
            is_volatile: false,
            on_stall: wishes.on_stall,
            on_stall_is_told: false,
            busy_poll_us: wishes.busy_poll_us.unwrap_or(0),
            send_zc: wishes.send_zc,
            recover: None,
            tls: None,
        }
    }

    /// Writes the spec, starts the device process and waits for its device; undoes all of it on failure.
    async fn start(self: &Arc<Self>, new: NewAttachment) -> Result<v1::NodeAttachment, NodeError> {
        let dir = AttachmentDir::new(&self.config.run_dir, new.spec.attachment_id);
        match self.start_device(&dir, &new.spec).await {
            Ok(attachment) => Ok(attachment),
            // The folder is a newer program's: not ours to undo.
            Err(error @ NodeError::StateFile(_)) => Err(error),
            Err(error) => {
                self.undo(&dir, &new).await;
                Err(error)
            }
        }
    }

    pub(super) async fn start_device(
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
        let mut child = device_process::spawn(dir, &self.config.log_filter)?;
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

    /// Takes a disk away; tells whether there was one.
    ///
    /// # Errors
    /// [`NodeError`], by cause; repeating the call goes on where it stopped.
    pub async fn detach(&self, request: &v1::DetachRequest) -> Result<bool, NodeError> {
        let selector = DetachSelector::parse(&request.target)?;
        let named_target = match &selector {
            DetachSelector::Name { target, .. } => Some(target.clone()),
            DetachSelector::DevId(_) | DetachSelector::Path(_) => None,
        };
        let found = self.find(&selector)?.and_then(|record| record.target()).or(named_target.clone());
        let Some(target) = found else { return Ok(false) };
        let _guard = self.locks.lock(&target.to_string()).await;
        // Another call may have ended it meanwhile.
        match (self.find(&selector)?, named_target) {
            (Some(record), _) => {
                self.stop_device(&record, request.force).await?;
                self.release(&record).await?;
                remove_folder(&record.dir)?;
                tracing::info!(target = record.spec.target, "detached");
                Ok(true)
            }
            (None, Some(Target::Volume(name))) => self.release_forgotten(&name).await,
            (None, _) => Ok(false),
        }
    }

    pub(super) fn find(&self, selector: &DetachSelector) -> Result<Option<AttachmentRecord>, NodeError> {
        let records = AttachmentRecord::read_all(&self.config.run_dir)?;
        Ok(records.into_iter().find(|record| record.is_meant_by(selector)))
    }

    /// Has the device process take its device away, or removes what a dead one left.
    async fn stop_device(&self, record: &AttachmentRecord, by_force: bool) -> Result<(), NodeError> {
        let target = &record.spec.target;
        if record.pid.is_some() && by_force {
            let asked = device_process::ask(&record.dir, target, ControlCommand::ForceStop).await;
            if !matches!(asked, Ok(Some(ControlResponse::Ok(_)) | None)) {
                tracing::warn!(
                    target,
                    ?asked,
                    "the device process does not take its device away: it is killed"
                );
            }
            device_process::kill(&record.dir, target).await?;
        } else if record.pid.is_some() {
            match device_process::ask(&record.dir, target, ControlCommand::Stop).await? {
                Some(ControlResponse::Busy { holders }) => {
                    let holders =
                        if holders.is_empty() { vec!["somebody has it open".to_owned()] } else { holders };
                    return Err(NodeError::DeviceOpen { target: target.clone(), holders });
                }
                Some(ControlResponse::Error { message }) => {
                    return Err(NodeError::StopFailed { target: target.clone(), why: message });
                }
                // It ends after its answer; without an answer, it must have been ending.
                Some(ControlResponse::Ok(_)) | None => {}
            }
            device_process::wait_until_gone(&record.dir, target).await?;
        }
        remove_device_and_link(&record.spec, by_force).await
    }

    /// Changes what an attachment's I/O does while its server cannot be reached.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub async fn set_stall_policy(
        &self,
        request: &v1::SetStallPolicyRequest,
    ) -> Result<v1::NodeAttachment, NodeError> {
        let policy = match request.on_stall() {
            v1::StallAction::Unspecified => {
                let message = "say what I/O is to do: wait or fail".to_owned();
                return Err(NodeError::InvalidField { field: "on_stall", message });
            }
            action => stall_policy(action, request.stall_fail_after_ms),
        };
        let selector = DetachSelector::parse(&request.target)?;
        let target = request.target.clone();
        let Some(record) = self.find(&selector)? else { return Err(NodeError::NotAttached { target }) };
        if record.pid.is_none() {
            let why = record.to_proto().state_reason;
            return Err(NodeError::DeviceFailed { target, why });
        }
        match device_process::ask(&record.dir, &target, ControlCommand::SetStallPolicy(policy)).await? {
            Some(ControlResponse::Ok(_)) => {}
            Some(ControlResponse::Error { message: why }) => {
                return Err(NodeError::PolicyRefused { target, why });
            }
            Some(ControlResponse::Busy { .. }) | None => {
                let why = "the device process did not answer".to_owned();
                return Err(NodeError::PolicyRefused { target, why });
            }
        }
        let record = AttachmentRecord::read(record.dir.clone())?;
        record.map(|record| record.to_proto()).ok_or(NodeError::NotAttached { target })
    }

    /// Tells the server that the volume is no longer used here.
    async fn release(&self, record: &AttachmentRecord) -> Result<(), NodeError> {
        let ExportSpec::Attachment { server_id, .. } = &record.spec.export else { return Ok(()) };
        let told = async {
            self.management.expect_server(*server_id).await?;
            self.management.detach_volume(&record.spec.attachment_id.to_string()).await
        };
        match told.await {
            Ok(_) => Ok(()),
            Err(NodeError::Refused(status)) if status.code() == Code::NotFound => Ok(()),
            Err(NodeError::ServerUnreachable { cause, server }) => {
                let cause = format!("cannot reach {server}: {cause}");
                note_unfinished_detach(record, &cause)?;
                Err(NodeError::DetachUnfinished { target: record.spec.target.clone(), cause })
            }
            Err(error) => Err(error),
        }
    }

    /// Gives back an attachment that the server holds for this node and no folder knows: an attach was cut short. One
    /// that has connections is in use by another daemon of the same node id.
    async fn release_forgotten(&self, volume_name: &str) -> Result<bool, NodeError> {
        let idle = match self.management.idle_attachments(volume_name, &self.config.node_id).await {
            Ok(idle) => idle,
            Err(NodeError::Refused(status)) if status.code() == Code::NotFound => Vec::new(),
            // It is not attached here, and that is all a detach promises.
            Err(error @ NodeError::ServerUnreachable { .. }) => {
                tracing::warn!(target = volume_name, %error, "not attached here; the server was not asked");
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        let mut existed = false;
        for attachment_id in idle {
            existed |= self.management.detach_volume(&attachment_id).await?;
        }
        Ok(existed)
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

/// Tries every data path on this machine.
///
/// # Errors
/// [`NodeError::Ublk`]: no driver, or no right to use it.
pub async fn probe_data_paths() -> Result<ProbeReport, NodeError> {
    blocking(|| Ok(ublk_core::probe_driver(&ControlDevice::open()?)?)).await
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
) -> Result<T, NodeError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| NodeError::Panicked)?
}

/// Removes what a dead device process left in the kernel and in /dev. Of an earlier boot there is nothing.
async fn remove_device_and_link(spec: &DeviceSpec, by_force: bool) -> Result<(), NodeError> {
    let (attachment_id, target, link) = (spec.attachment_id, spec.target.clone(), spec.device_link.clone());
    blocking(move || {
        leftovers::remove_devices(attachment_id, &target, by_force)?;
        leftovers::remove_link(&link)
    })
    .await
}

/// The device process is gone, so the status is the daemon's to write: it says what is left to do.
fn note_unfinished_detach(record: &AttachmentRecord, cause: &str) -> Result<(), NodeError> {
    let Some(mut status) = record.status.clone() else { return Ok(()) };
    status.state = DeviceState::Stopping;
    status.state_reason = format!("the storage server still holds the attachment ({cause}); detach again");
    status.state_since_ms = now_ms();
    status.dev_id = None;
    Ok(write_file(&record.dir.status(), &status)?)
}

fn remove_folder(dir: &AttachmentDir) -> Result<(), NodeError> {
    match fs::remove_dir_all(dir.path()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(NodeError::Io { what: format!("cannot remove {}", dir.path().display()), source: error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::attachment_record::tests::{spec, status};

    fn request() -> v1::AttachRequest {
        v1::AttachRequest { target: "vol-1".to_owned(), ..Default::default() }
    }

    /// An attachment that was asked for 4 queues and got 2, with a connection each, over `mapped`.
    fn attached() -> (DeviceSpec, DeviceStatus) {
        let mut spec = spec(Uuid::from_u128(7), "vol-1");
        (spec.nr_hw_queues, spec.nr_connections) = (4, 0);
        let mut status = status(&spec, DeviceState::Live, "boot");
        (status.nr_hw_queues, status.nr_connections) = (2, 2);
        (spec, status)
    }

    #[test]
    fn a_name_that_a_partition_has_is_not_given_to_a_disk() {
        let (spec, status) = attached();
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

    #[test]
    fn what_is_not_asked_for_differs_from_nothing() {
        let (spec, status) = attached();
        let wishes = Wishes::of(&v1::AttachRequest { data_path: "auto".into(), ..request() }).unwrap();
        assert!(wishes.differences(&spec, &status).is_empty());
    }

    #[test]
    fn what_was_asked_for_and_what_was_had_may_be_asked_for_again() {
        let (spec, status) = attached();
        for nr_hw_queues in [2, 4] {
            let wishes = Wishes::of(&v1::AttachRequest { nr_hw_queues, ..request() }).unwrap();
            assert!(wishes.differences(&spec, &status).is_empty(), "{nr_hw_queues}");
        }
    }

    #[test]
    fn every_difference_is_told() {
        let (spec, status) = attached();
        let asked = v1::AttachRequest {
            data_path: "fused".into(),
            read_only: true,
            nr_hw_queues: 3,
            nr_connections: 6,
            queue_depth: 64,
            busy_poll_us: 50,
            send_zc: true,
            ..request()
        };
        let differences = Wishes::of(&asked).unwrap().differences(&spec, &status);
        let expected = [
            "read_only false instead of true",
            "send_zc false instead of true",
            "data_path mapped instead of fused",
            "nr_hw_queues 2 instead of 3",
            "nr_connections 2 instead of 6",
            "queue_depth 128 instead of 64",
            "busy_poll_us 0 instead of 50",
        ];
        assert_eq!(differences, expected);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for bad in [
            v1::AttachRequest { data_path: "fast".into(), ..request() },
            v1::AttachRequest { nr_hw_queues: 257, ..request() },
            v1::AttachRequest { nr_connections: 257, ..request() },
            v1::AttachRequest { nr_hw_queues: 4, nr_connections: 3, ..request() },
            v1::AttachRequest { queue_depth: 70_000, ..request() },
            v1::AttachRequest { busy_poll_us: 10_001, ..request() },
        ] {
            assert!(matches!(Wishes::of(&bad), Err(NodeError::InvalidField { .. })), "{bad:?}");
        }
    }
}
