//! The clear disk of an encrypted volume: opened behind its disk, closed before it, and made larger with it.
//!
//! ```text
//!   attach:  disk is live ─▶ as `luks_plan.rs` says: header, clear disk ─▶ stable name leads to the clear disk
//!   detach:  clear disk closed (used: refused) ─▶ disk goes       by force: disk goes ─▶ clear disk goes with its last user
//! ```
//! Invariants: the target's lock is held, but for growth of a moment's look. A device process that ends meanwhile ends the call: the disk
//! waits for another one, which needs the lock. Nothing of a passphrase is kept.
//! Called by: `attach`, `detach`, `serve`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::passphrase::LUKS_HEADER_BYTES;
use proto::v1;
use proto::v1::Passphrase;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::{Supervisor, blocking};
use crate::causes::with_sources;
use crate::contract::content::Content;
use crate::contract::{AttachmentDir, DeviceSpec, ExportSpec};
use crate::disk_ends;
use crate::holders;
use crate::mapper::{self, Mapper};
use crate::node::attachment_record::AttachmentRecord;
use crate::node::error::NodeError;
use crate::node::leftovers;
use crate::node::luks::cryptsetup::{self, Subject};
use crate::node::luks_plan::{self, ClearDisk, Header, Refusal, Step, View};
use crate::node::target::DetachSelector;

/// More steps than any way to the end has.
const STEPS_MAX: usize = 16;
/// Between two looks at whether disks have grown.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What a caller of attach says of an encrypted volume.
#[derive(Debug, Clone, Default)]
pub(super) struct Unlock {
    /// What opens it.
    pub(super) passphrase: Option<Passphrase>,
    /// The caller makes a file system, and says then that there is data.
    pub(super) keeps_initialising: bool,
}

impl Unlock {
    /// Of a request.
    ///
    /// # Errors
    /// [`NodeError::InvalidField`]: it is no passphrase.
    pub(super) fn of(request: &mut v1::AttachRequest) -> Result<Self, NodeError> {
        let passphrase = request.passphrase.take();
        checked("passphrase", passphrase.as_ref())?;
        Ok(Self { passphrase, keeps_initialising: request.keep_initialising })
    }

    /// Makes sure that there is a passphrase where one is of use, and none elsewhere.
    ///
    /// # Errors
    /// [`NodeError::EncryptionRefused`], [`NodeError::InvalidField`]
    pub(super) fn fits(&self, target: &str, is_encrypted: bool) -> Result<(), NodeError> {
        match (is_encrypted, &self.passphrase) {
            (true, None) => Err(refused(target, Refusal::NoPassphrase)),
            (false, Some(_)) => Err(NodeError::InvalidField {
                field: "passphrase",
                message: format!("{target} is not encrypted; attach it without a passphrase"),
            }),
            _ => Ok(()),
        }
    }
}

fn checked(field: &'static str, passphrase: Option<&Passphrase>) -> Result<(), NodeError> {
    let checked = passphrase.map_or(Ok(()), Passphrase::check);
    checked.map_err(|message| NodeError::InvalidField { field, message })
}

fn refused(target: &str, why: Refusal) -> NodeError {
    NodeError::EncryptionRefused { target: target.to_owned(), why }
}

fn subject(record: &AttachmentRecord) -> Subject<'_> {
    Subject { dir: &record.dir, attachment_id: record.spec.attachment_id, target: &record.spec.target }
}

/// The clear disk that the kernel has for an attachment, on the disk of the number or on one that is gone.
fn clear_disk(attachment_id: Uuid, dev_id: Option<u32>) -> ClearDisk {
    match (mapper::find(attachment_id), dev_id) {
        (None, _) => ClearDisk::Absent,
        (Some(found), Some(dev_id)) if found.is_on(dev_id) => ClearDisk::Open,
        (Some(_), _) => ClearDisk::Stale,
    }
}

impl Supervisor {
    /// Opens what a live disk holds encrypted, and gives the clear disk the stable name; nothing, where it is not encrypted.
    ///
    /// # Errors
    /// [`NodeError`], by cause; repeating the call goes on where it stopped.
    pub(super) async fn open_clear_disk(
        &self,
        dir: &AttachmentDir,
        target: &str,
        unlock: &Unlock,
    ) -> Result<v1::NodeAttachment, NodeError> {
        let not_attached = || NodeError::NotAttached { target: target.to_owned() };
        let record = AttachmentRecord::read(dir.clone())?.ok_or_else(not_attached)?;
        let Some(encrypted) = &record.spec.encrypted else {
            unlock.fits(target, false)?;
            return Ok(record.to_proto());
        };
        let dev_id = record.status.as_ref().and_then(|status| status.dev_id);
        let is_stalled = record.state() == v1::DeviceState::Stalled;
        if is_stalled && clear_disk(record.spec.attachment_id, dev_id) != ClearDisk::Open {
            let why = "its disk waits for the server, and the encrypted disk is not open yet".to_owned();
            let (target, addresses) = (target.to_owned(), record.spec.addresses.clone());
            return Err(NodeError::DataUnreachable { target, addresses, why });
        }
        self.carry_steps_out(&record, unlock).await?;
        make_link(&encrypted.clear_link, record.spec.attachment_id)?;
        Ok(record.to_proto())
    }

    async fn carry_steps_out(&self, record: &AttachmentRecord, unlock: &Unlock) -> Result<(), NodeError> {
        let target = &record.spec.target;
        let status = record.status.as_ref();
        let (dev_id, disk) = (status.and_then(|status| status.dev_id), record.device_path());
        let disk = disk.ok_or_else(|| NodeError::NotAttached { target: target.clone() })?;
        if !cryptsetup::is_installed() {
            return Err(NodeError::NoCryptsetup);
        }
        let subject = subject(record);
        // A former call's erasing, which outlives the daemon, must not find what the disk's user writes after this.
        subject.settled().await?;
        let mut view = View {
            is_read_only: record.spec.read_only,
            has_passphrase: unlock.passphrase.is_some(),
            keeps_initialising: unlock.keeps_initialising,
            clear_disk: clear_disk(record.spec.attachment_id, dev_id),
            content: None,
            header: None,
            is_formatted: false,
            is_erased: false,
        };
        for _ in 0..STEPS_MAX {
            let step = luks_plan::attach(&view);
            tracing::debug!(target, ?step, "opens an encrypted disk");
            let needed = || unlock.passphrase.as_ref().ok_or_else(|| refused(target, Refusal::NoPassphrase));
            match step {
                Step::Done => return Ok(()),
                Step::Refuse(why) => return Err(refused(target, why)),
                Step::CloseStale => self.close(record).await?,
                Step::AskContent => view.content = Some(self.content(record).await?),
                Step::LookAtDisk => view.header = Some(header(subject.look(&disk).await?)),
                Step::SetInitialising => {
                    self.set_content(record, v1::VolumeContent::Initialising).await?;
                    view.content = Some(Content::InitialisingHere);
                }
                Step::Format => {
                    let block_bytes = status.map_or(0, |status| status.block_size_bytes);
                    tracing::info!(target, "makes the LUKS header");
                    subject.format(&disk, block_bytes, needed()?).await?;
                    view.is_formatted = true;
                }
                Step::Open => subject.open(&disk, record.spec.read_only, needed()?).await?,
                Step::Erase => {
                    subject.erase().await?;
                    view.is_erased = true;
                }
                Step::SetWritten => {
                    self.set_content(record, v1::VolumeContent::Written).await?;
                    view.content = Some(Content::Written);
                }
            }
            view.clear_disk = clear_disk(record.spec.attachment_id, dev_id);
            if step == Step::Open && view.clear_disk != ClearDisk::Open {
                let why = format!("cryptsetup has opened another disk than {}", disk.display());
                return Err(NodeError::EncryptionFailed { target: target.clone(), why });
            }
        }
        let why = "its clear disk comes and goes".to_owned();
        Err(NodeError::EncryptionFailed { target: target.clone(), why })
    }

    /// Closes the clear disk, unless somebody uses it; none is a success.
    ///
    /// # Errors
    /// [`NodeError::DeviceOpen`]: who; others by cause.
    pub(super) async fn close(&self, record: &AttachmentRecord) -> Result<(), NodeError> {
        let attachment_id = record.spec.attachment_id;
        let Some(found) = mapper::find(attachment_id) else { return Ok(()) };
        let Err(error) = subject(record).close(false).await else { return Ok(()) };
        // Another call may have closed it.
        let Some(Mapper { kernel_name, .. }) = mapper::find(attachment_id).filter(|is| *is == found) else {
            return Ok(());
        };
        let holders = blocking(move || Ok(holders::holders_of_disk(&kernel_name))).await?;
        match (error, holders.is_empty()) {
            (NodeError::EncryptionFailed { target, .. }, false) => {
                Err(NodeError::DeviceOpen { target, holders })
            }
            (error, _) => Err(error),
        }
    }

    /// Has the clear disk go with its last user, and takes its names away. Its disk is gone, so that all I/O on it fails.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub(super) async fn close_by_force(&self, record: &AttachmentRecord) -> Result<(), NodeError> {
        let Some(encrypted) = &record.spec.encrypted else { return Ok(()) };
        let attachment_id = record.spec.attachment_id;
        if mapper::find(attachment_id).is_some() {
            subject(record).close(true).await?;
            // Where it is open still, nobody would take its name away later.
            remove_file(&mapper::path_of(attachment_id))?;
        }
        leftovers::remove_link(&encrypted.clear_link)
    }

    /// Closes a clear disk that no folder knows; tells whether there was one.
    ///
    /// # Errors
    /// As of [`Self::close`].
    pub(super) async fn close_forgotten(&self, attachment_id: Uuid) -> Result<bool, NodeError> {
        let dir = AttachmentDir::new(&self.config.run_dir, attachment_id);
        // One that has a specification is an attachment, even if this program cannot read it. Without one the folder is where a lock can
        // lie; it goes with the call.
        if mapper::find(attachment_id).is_none() || dir.spec().exists() {
            return Ok(false);
        }
        let export = ExportSpec::Nbd { export_name: String::new() };
        let name = mapper::name_of(attachment_id);
        let spec = DeviceSpec::new(attachment_id, name.clone(), export, mapper::path_of(attachment_id));
        let record = AttachmentRecord { dir, spec, status: None, pid: None };
        let io_error =
            |source| NodeError::Io { what: "cannot make an attachment's folder".to_owned(), source };
        fs::create_dir_all(record.dir.path()).map_err(io_error)?;
        let closed = self.close(&record).await;
        super::remove_folder(&record.dir)?;
        closed?;
        tracing::info!(name, "a clear disk that no attachment had was closed");
        Ok(true)
    }

    /// Puts a passphrase in the place of another.
    ///
    /// # Errors
    /// [`NodeError`], by cause.
    pub async fn change_passphrase(
        &self,
        request: v1::ChangePassphraseRequest,
    ) -> Result<v1::NodeAttachment, NodeError> {
        let target = request.target.clone();
        let not_attached = || NodeError::NotAttached { target: target.clone() };
        let missing =
            |field: &'static str| NodeError::InvalidField { field, message: "is missing".to_owned() };
        let old = request.old_passphrase.as_ref().ok_or_else(|| missing("old_passphrase"))?;
        let new = request.new_passphrase.as_ref().ok_or_else(|| missing("new_passphrase"))?;
        checked("old_passphrase", Some(old))?;
        checked("new_passphrase", Some(new))?;
        let found = self.find(&DetachSelector::parse(&target)?)?.ok_or_else(not_attached)?;
        let _guard = self.locks.lock(&found.lock_name()).await;
        let record = AttachmentRecord::read(found.dir.clone())?.ok_or_else(not_attached)?;
        let off = |message: &str| NodeError::InvalidField { field: "target", message: message.to_owned() };
        if record.spec.encrypted.is_none() {
            return Err(off(&format!("{target} is not encrypted")));
        }
        if record.spec.read_only {
            return Err(off(&format!("{target} is attached for reading alone: attach it for writing")));
        }
        let disk = record.device_path().filter(|_| record.state() == v1::DeviceState::Live);
        let disk = disk.ok_or_else(|| NodeError::DeviceFailed {
            target: target.clone(),
            why: "it does not serve now".to_owned(),
        })?;
        subject(&record).change_passphrase(&disk, old, new).await?;
        tracing::info!(target, "passphrase changed");
        Ok(record.to_proto())
    }

    /// Tells the log of clear disks that no attachment has.
    pub(in crate::node) fn tell_forgotten_clear_disks(&self) -> Result<(), NodeError> {
        let records = AttachmentRecord::read_all(&self.config.run_dir)?;
        for mapper in mapper::all() {
            let has_folder = AttachmentDir::new(&self.config.run_dir, mapper.attachment_id).spec().exists();
            if !has_folder && records.iter().all(|record| record.spec.attachment_id != mapper.attachment_id) {
                let path = mapper::path_of(mapper.attachment_id);
                tracing::warn!(
                    path = %path.display(),
                    "a clear disk is open that no attachment has; `volctl detach {}` closes it",
                    mapper.attachment_id
                );
            }
        }
        Ok(())
    }

    /// Gives clear disks the size that their disks have grown to, for as long as the daemon lives.
    pub(in crate::node) async fn follow_grown_disks(self: Arc<Self>) {
        // What a disk's size was at the last try: a header of another size is tried once.
        let mut tried: HashMap<Uuid, u64> = HashMap::new();
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let mappers = mapper::all();
            tried.retain(|id, _| mappers.iter().any(|mapper| mapper.attachment_id == *id));
            if mappers.is_empty() {
                continue;
            }
            let Ok(records) = AttachmentRecord::read_all_quietly(&self.config.run_dir) else { continue };
            for record in records.iter().filter(|record| record.state() == v1::DeviceState::Live) {
                let Some(bytes) = grown_to(record, &mappers) else { continue };
                if tried.insert(record.spec.attachment_id, bytes) == Some(bytes) {
                    continue;
                }
                let _guard = self.locks.lock(&record.lock_name()).await;
                let target = &record.spec.target;
                match subject(record).grow().await {
                    Ok(()) => tracing::info!(target, bytes, "the clear disk has grown with its disk"),
                    Err(error) => {
                        tracing::error!(
                            target,
                            error = with_sources(&error),
                            "the clear disk has not grown; it does when it is detached and attached again"
                        );
                    }
                }
            }
        }
    }

    async fn content(&self, record: &AttachmentRecord) -> Result<Content, NodeError> {
        let asked = self.set_content_of(record, v1::VolumeContent::Unspecified).await;
        Ok(Content::seen_from(&asked?, &record.spec.attachment_id.to_string()))
    }

    async fn set_content(&self, record: &AttachmentRecord, to: v1::VolumeContent) -> Result<(), NodeError> {
        match self.set_content_of(record, to).await {
            Err(NodeError::Refused(status)) if is_content_refused(&status) => {
                Err(refused(&record.spec.target, Refusal::InitialisedElsewhere))
            }
            told => told.map(drop),
        }
    }

    async fn set_content_of(
        &self,
        record: &AttachmentRecord,
        content: v1::VolumeContent,
    ) -> Result<v1::Volume, NodeError> {
        let ExportSpec::Attachment { volume_uid, .. } = &record.spec.export else {
            let what = "an encrypted export of another server";
            return Err(NodeError::ServerAnswer { server: self.server().to_owned(), what });
        };
        let id = record.spec.attachment_id.to_string();
        self.management.set_volume_content(&format!("uid:{volume_uid}"), &id, content).await
    }
}

fn is_content_refused(status: &tonic::Status) -> bool {
    let info = status.get_details_error_info();
    info.is_some_and(|info| info.reason == proto::error_reason::CONTENT_REFUSED)
}

fn header(found: disk_ends::Found) -> Header {
    match found {
        disk_ends::Found::Luks => Header::Luks,
        disk_ends::Found::Zeros => Header::Zeros,
        disk_ends::Found::Other => Header::Other,
    }
}

/// How large the attachment's disk is, if its clear disk should be larger.
fn grown_to(record: &AttachmentRecord, mappers: &[Mapper]) -> Option<u64> {
    let dev_id = record.status.as_ref()?.dev_id?;
    let of_attachment = |mapper: &&Mapper| mapper.attachment_id == record.spec.attachment_id;
    let clear = mappers.iter().find(of_attachment).filter(|mapper| mapper.is_on(dev_id))?;
    let disk_bytes = mapper::disk_bytes(&format!("ublkb{dev_id}"))?;
    (clear.bytes + LUKS_HEADER_BYTES < disk_bytes).then_some(disk_bytes)
}

/// Has the stable name lead to the clear disk. Made beside and renamed over, as those of other disks.
fn make_link(link: &Path, attachment_id: Uuid) -> Result<(), NodeError> {
    let to = mapper::path_of(attachment_id);
    if fs::read_link(link).is_ok_and(|is| is == to) {
        return Ok(());
    }
    let new_link = link.with_file_name(format!(".{attachment_id}.new"));
    remove_file(&new_link)?;
    let made = symlink(&to, &new_link).and_then(|()| fs::rename(&new_link, link));
    made.map_err(|source| NodeError::Io { what: format!("cannot make {}", link.display()), source })
}

fn remove_file(path: &Path) -> Result<(), NodeError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NodeError::Io { what: format!("cannot remove {}", path.display()), source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passphrase_is_needed_where_there_is_something_to_open_and_refused_elsewhere() {
        let none = Unlock::default();
        let some = Unlock { passphrase: Some(Passphrase::new(b"x".to_vec())), keeps_initialising: false };
        assert!(none.fits("vol-1", false).is_ok() && some.fits("vol-1", true).is_ok());
        let missing = none.fits("vol-1", true).unwrap_err();
        assert!(matches!(missing, NodeError::EncryptionRefused { why: Refusal::NoPassphrase, .. }));
        let useless = some.fits("vol-1", false).unwrap_err();
        assert!(matches!(useless, NodeError::InvalidField { field: "passphrase", .. }));
        let mut empty =
            v1::AttachRequest { passphrase: Some(Passphrase::new(Vec::new())), ..Default::default() };
        assert!(matches!(Unlock::of(&mut empty), Err(NodeError::InvalidField { .. })));
    }

    #[test]
    fn the_stable_name_leads_to_the_clear_disk_whatever_it_led_to() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("vol-1");
        symlink("/dev/ublkb7", &link).unwrap();
        for _ in 0..2 {
            make_link(&link, Uuid::from_u128(7)).unwrap();
            assert_eq!(fs::read_link(&link).unwrap(), mapper::path_of(Uuid::from_u128(7)));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
