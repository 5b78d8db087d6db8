//! NodeStageVolume: the volume becomes a disk, and its file system is mounted at the staging path. Of an encrypted volume it is the clear disk
//! that is looked at, formatted and mounted; the node daemon makes the header of LUKS and opens it, in the attach.
//!
//! Owns: carrying out one step after the other, as `plan` says. Never: decides what is next, or remembers it. Called by: `service`.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use proto::error_reason as reason;
use proto::v1::{NodeAttachment, Passphrase};
use tonic::{Code, Status};

use super::daemon::{disk_of, fails_by_us, is_of_failed_device, is_refused_for};
use super::device::{HeldDevice, Identity, is_file_system_read_only, place_of, shown};
use super::inner::{Inner, blocking, look, mark_of};
use super::plan::{self, Disk, Place, Shown, StageStep, StageView, Use};
use super::request::{Usage, VolumeId, no_passphrase};
use super::{programs, status};
use crate::contract::content::Content;
use crate::csi::blank::Ends;
use crate::csi::mount_options::{FsType, MountOptions};
use crate::csi::mounts::mount_file_system;
use crate::csi::probe;
use crate::csi::targets::{Target, TargetKind};

/// More steps than any way to the end has; one that goes round comes to an end as well.
const STEPS_MAX: usize = 24;

/// A stage on its way.
struct Stage<'a> {
    inner: &'a Inner,
    volume: VolumeId,
    path: &'a str,
    usage: &'a Usage,
    passphrase: Option<Passphrase>,
    view: StageView,
    attachment: Option<NodeAttachment>,
    /// Once there is a disk whose file system it is for.
    target: Option<Arc<Target>>,
    device: Option<Arc<HeldDevice>>,
}

impl Inner {
    /// Stages a volume.
    ///
    /// # Errors
    /// By cause; the repeat goes on where this ended.
    pub async fn stage(
        &self,
        volume: VolumeId,
        path: &str,
        usage: &Usage,
        passphrase: Option<Passphrase>,
    ) -> Result<(), Status> {
        self.settled(volume).await?;
        let view = StageView {
            used_as: usage.used_as(),
            is_read_only: usage.attach_as.read_only,
            disk: Disk::Absent,
            is_granted: false,
            place: Place::Free,
            is_file_system_read_only: false,
            shown: Shown::default(),
            fails_by_us: false,
            content: None,
            found: None,
            has_taken_over: false,
            is_checked: false,
            is_grown: false,
        };
        let (attachment, target, device) = (None, None, None);
        let mut stage =
            Stage { inner: self, volume, path, usage, passphrase, view, attachment, target, device };
        stage.look().await?;
        for _ in 0..STEPS_MAX {
            match plan::stage(&stage.view) {
                StageStep::Done => return Ok(()),
                StageStep::Refuse(why) => return Err(status::of_refusal(&why)),
                step => {
                    tracing::debug!(%volume, ?step, "stages");
                    stage.carry_out(step).await?;
                }
            }
        }
        Err(Status::aborted("the volume's disk comes and goes; see volctl attachments, and repeat the call"))
    }
}

impl Stage<'_> {
    async fn look(&mut self) -> Result<(), Status> {
        self.attachment = self.inner.daemon.attachment(self.volume).await?;
        self.see_disk().await
    }

    /// What the attachment makes of the view.
    async fn see_disk(&mut self) -> Result<(), Status> {
        self.view.disk = disk_of(self.attachment.as_ref());
        self.view.fails_by_us = self.attachment.as_ref().is_some_and(fails_by_us);
        self.device = None;
        match self.view.disk {
            Disk::Serving | Disk::Stalled | Disk::Failed => self.see_place().await,
            // Its device is another one soon, or is not to be used.
            Disk::Absent | Disk::Locked | Disk::Leaving | Disk::Dead => Ok(()),
        }
    }

    async fn see_place(&mut self) -> Result<(), Status> {
        let Some(attachment) = self.attachment.clone() else { return Ok(()) };
        if attachment.is_encrypted && attachment.clear_device_path.is_empty() {
            // Nothing can be mounted or shown of it.
            (self.view.place, self.view.shown) = (Place::Free, Shown::default());
            return Ok(());
        }
        let identity = Identity::of(&attachment).map_err(|error| status::of_device(&error))?;
        let disk = identity.clone();
        self.view.shown = blocking(move || shown(&disk).map_err(|error| status::of_mount(&error))).await?;
        if self.usage.used_as() == Use::Block {
            return Ok(());
        }
        let target = match &self.target {
            Some(target) => Arc::clone(target),
            None => {
                let target = self.inner.target_to_mount(self.path)?;
                target.create(TargetKind::Directory).map_err(|error| status::of_target(&error))?;
                Arc::clone(self.target.insert(Arc::new(target)))
            }
        };
        let seen = look(&target, move |target| {
            Ok((place_of(target, &identity)?, is_file_system_read_only(target)?))
        });
        (self.view.place, self.view.is_file_system_read_only) = seen.await?;
        Ok(())
    }

    fn attachment_id(&self) -> Result<String, Status> {
        let attachment = self.attachment.as_ref();
        let id = attachment.map(|attachment| attachment.attachment_id.clone());
        id.ok_or_else(|| Status::internal("a step needs an attachment, and there is none"))
    }

    async fn carry_out(&mut self, step: StageStep) -> Result<(), Status> {
        match step {
            StageStep::Attach => self.attach().await,
            StageStep::WaitOnStall => {
                self.inner.daemon.wait_on_stall(&self.attachment_id()?).await?;
                self.view.fails_by_us = false;
                Ok(())
            }
            StageStep::Replace => {
                tracing::warn!(volume = %self.volume, "takes a disk away that answers with errors for good, and is not mounted");
                self.inner.daemon.detach(&self.attachment_id()?, true).await?;
                self.look().await
            }
            StageStep::AskContent => {
                let content = self.inner.content.content(self.volume, &self.attachment_id()?).await?;
                self.view.content = Some(content);
                Ok(())
            }
            StageStep::LookAtDevice => self.look_at_device().await,
            StageStep::SetInitialising => self.set_initialising().await,
            StageStep::Erase => self.erase().await,
            StageStep::Make => self.make().await,
            StageStep::SetWritten => self.set_written().await,
            StageStep::Check => self.check().await,
            StageStep::Mount => self.mount().await,
            StageStep::Grow => {
                let (device, fs_type) = (self.held().await?, self.fs_type()?);
                let Some(target) = self.target.clone() else { return Err(no_target()) };
                self.inner.grow(self.volume, fs_type, device, target).await?;
                self.view.is_grown = true;
                Ok(())
            }
            StageStep::Done | StageStep::Refuse(_) => Ok(()),
        }
    }

    async fn attach(&mut self) -> Result<(), Status> {
        let passphrase = self.passphrase.clone();
        match self.inner.daemon.attach(self.volume, self.usage.attach_as, passphrase).await {
            Ok(attached) => {
                self.is_as_encrypted_as_asked(&attached)?;
                self.attachment = Some(attached);
                self.view.is_granted = true;
                self.see_disk().await
            }
            Err(why) if is_of_failed_device(&why) => {
                self.look().await?;
                if self.view.disk != Disk::Failed {
                    return Err(why);
                }
                // The grant was asked for first, and is there.
                self.view.is_granted = true;
                Ok(())
            }
            Err(why) => Err(self.in_kubelets_words(why)),
        }
    }

    /// Nothing is written in the clear that was to be encrypted, and no volume's header is taken for what it holds.
    fn is_as_encrypted_as_asked(&self, attached: &NodeAttachment) -> Result<(), Status> {
        let is_told = self.usage.is_encrypted || self.passphrase.is_some();
        if is_told && !attached.is_encrypted {
            return Err(Status::failed_precondition(
                "the volume is to be encrypted, and the node daemon has attached it as any other: it is of a version that knows no encryption; upgrade volclient on this node",
            ));
        }
        if attached.is_encrypted && attached.clear_device_path.is_empty() {
            return Err(Status::aborted(
                "the encrypted volume's disk was closed in this moment; repeat the call",
            ));
        }
        Ok(())
    }

    /// What the daemon says of passphrases is for who types volctl.
    fn in_kubelets_words(&self, refused: Status) -> Status {
        if is_refused_for(&refused, reason::PASSPHRASE_MISSING) {
            return no_passphrase();
        }
        let is_useless = refused.code() == Code::InvalidArgument && !self.usage.is_encrypted;
        if is_useless && self.passphrase.is_some() {
            return Status::invalid_argument(format!(
                "{}; its StorageClass has a node-stage secret with a passphrase: take that out, or make volumes with encrypted: \"true\"",
                refused.message()
            ));
        }
        refused
    }

    fn options(&self) -> Result<&MountOptions, Status> {
        let options = self.usage.options.as_ref();
        options.ok_or_else(|| Status::internal("a block volume has no file system"))
    }

    fn fs_type(&self) -> Result<FsType, Status> {
        Ok(self.options()?.fs_type)
    }

    /// The disk, opened and proved to be the attachment's.
    async fn held(&mut self) -> Result<Arc<HeldDevice>, Status> {
        if let Some(device) = &self.device {
            return Ok(Arc::clone(device));
        }
        let Some(attachment) = self.attachment.clone() else { return Err(Status::internal("no attachment")) };
        let device = self.inner.hold(self.volume, &attachment).await?;
        Ok(Arc::clone(self.device.insert(device)))
    }

    /// What a job is called: a repeat for another attachment is another job.
    fn job(&self, what: &str) -> Result<String, Status> {
        Ok(format!("{what} for attachment {}", self.attachment_id()?))
    }

    async fn look_at_device(&mut self) -> Result<(), Status> {
        let device = self.held().await?;
        // No job: it changes nothing, and its result is of this moment alone.
        let seen = blocking(move || {
            let failed =
                |error: io::Error| Status::internal(format!("cannot read the volume's disk: {error}"));
            let blkid = |error: io::Error| Status::internal(format!("cannot run blkid: {error}"));
            let output =
                probe::blkid_command(&*device).and_then(|mut blkid| blkid.output()).map_err(blkid)?;
            let found = probe::with_unfinished(&*device, probe::found(&output)).map_err(failed)?;
            Ok((found, probe::ends(&*device).map_err(failed)?))
        });
        self.view.found = Some(seen.await?);
        Ok(())
    }

    async fn set_initialising(&mut self) -> Result<(), Status> {
        let answer = self.inner.content.set_initialising(self.volume, &self.attachment_id()?).await?;
        match (answer, self.view.content) {
            (Ok(()), _) => self.view.content = Some(Content::InitialisingHere),
            (Err(_), Some(Content::InitialisingElsewhere)) => self.view.has_taken_over = true,
            (Err(why), _) => {
                return Err(Status::failed_precondition(format!(
                    "the storage server does not let this attachment make a file system: {why}"
                )));
            }
        }
        Ok(())
    }

    async fn erase(&mut self) -> Result<(), Status> {
        let device = self.held().await?;
        let what = self.job("the erasing of what a killed mkfs left")?;
        tracing::info!(volume = %self.volume, "erases what a killed mkfs left");
        let call = move || {
            let file: File = device.open_to_write().map_err(io::Error::other)?;
            probe::erase_ends(&file)
        };
        self.inner.run_call(self.volume, &what, call).await?;
        self.view.found = None;
        Ok(())
    }

    async fn make(&mut self) -> Result<(), Status> {
        let (device, fs_type) = (self.held().await?, self.fs_type()?);
        // Zeros that nobody wrote are noise when they are decrypted: behind the ends of a clear disk there are none.
        let is_encrypted = self.attachment.as_ref().is_some_and(|attachment| attachment.is_encrypted);
        let has_zero_ends = self.view.found.as_ref().is_some_and(|(_, ends)| *ends == Ends::Zeros);
        let is_zeros = has_zero_ends && !is_encrypted;
        let program = format!("mkfs.{}", fs_type.name());
        let what = self.job(&program)?;
        tracing::info!(volume = %self.volume, program, "makes a file system");
        let command = || programs::make(fs_type, &*device, is_zeros);
        let output = self.inner.run_program(self.volume, &what, command).await?;
        programs::succeeded(&program, &output)?;
        self.view.found = None;
        Ok(())
    }

    async fn set_written(&mut self) -> Result<(), Status> {
        // What mkfs wrote is to be there for whoever believes this.
        let device = self.held().await?;
        let what = self.job("the flush after mkfs")?;
        let call = move || Ok(rustix::fs::fsync(device.as_fd())?);
        self.inner.run_call(self.volume, &what, call).await?;
        self.inner.content.set_written(self.volume, &self.attachment_id()?).await?;
        self.view.content = Some(Content::Written);
        Ok(())
    }

    async fn check(&mut self) -> Result<(), Status> {
        let device = self.held().await?;
        let what = self.job("e2fsck")?;
        let output = self.inner.run_program(self.volume, &what, || programs::check_ext4(&*device)).await?;
        programs::is_sound(&output)?;
        self.view.is_checked = true;
        Ok(())
    }

    async fn mount(&mut self) -> Result<(), Status> {
        let device = self.held().await?;
        let Some(target) = self.target.clone() else { return Err(no_target()) };
        let mut options = self.options()?.clone();
        if self.view.is_read_only {
            options.attributes |= rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        // With all that matters: a repeat that asks for something else is another job.
        let asked = mark_of(&(options.attributes.bits(), &options.parameters));
        let what = self.job(&format!("the mount at {:?} with the options {asked}", target.path()))?;
        let call = move || {
            let path = device.identity.path.clone();
            Ok(mount_file_system(&*device, &path, &options, &target)?)
        };
        self.inner.run_call(self.volume, &what, call).await?;
        self.see_place().await
    }
}

fn no_target() -> Status {
    Status::internal("a file system is to be mounted, and there is no path for it")
}

impl Inner {
    /// Opens the attachment's disk, and looks at the attachment once more: from then on the disk is its own.
    ///
    /// # Errors
    /// See [`status::of_device`].
    pub async fn hold(
        &self,
        volume: VolumeId,
        attachment: &NodeAttachment,
    ) -> Result<Arc<HeldDevice>, Status> {
        let before = attachment.clone();
        let open = move || HeldDevice::open(&before).map_err(|error| status::of_device(&error));
        let device = Arc::new(blocking(open).await?);
        let (held, before) = (Arc::clone(&device), attachment.clone());
        let now = self.daemon.attachment(volume).await?;
        let is_same = move || held.is_still_of(&before, now.as_ref());
        blocking(move || is_same().map_err(|error| status::of_device(&error))).await?;
        Ok(device)
    }

    /// Grows the mounted file system to its device, if there is at least one block more.
    ///
    /// # Errors
    /// ABORTED: it goes on. INTERNAL: the program's.
    pub async fn grow(
        &self,
        volume: VolumeId,
        fs_type: FsType,
        device: Arc<HeldDevice>,
        target: Arc<Target>,
    ) -> Result<(), Status> {
        let held = Arc::clone(&device);
        let is_smaller = blocking(move || {
            let of_device = held.bytes().map_err(|error| status::of_device(&error))?;
            let by_superblock = probe::file_system_bytes(&*held, fs_type);
            let failed =
                |error: io::Error| Status::internal(format!("cannot read the volume's disk: {error}"));
            let by_superblock = by_superblock.map_err(failed)?;
            // Where it cannot be told the program knows better.
            Ok(by_superblock.is_none_or(|(bytes, block)| of_device.saturating_sub(bytes) >= block))
        });
        if !is_smaller.await? {
            return Ok(());
        }
        let program = match fs_type {
            FsType::Ext4 => "resize2fs",
            FsType::Xfs => "xfs_growfs",
        };
        let what = format!("{program} of {}", device.identity.path.display());
        let mount_point = target.kernel_path().map_err(|error| status::of_target(&error))?;
        let command = || programs::grow(fs_type, &*device, &mount_point);
        let output = self.run_program(volume, &what, command).await?;
        programs::succeeded(program, &output)
    }
}
