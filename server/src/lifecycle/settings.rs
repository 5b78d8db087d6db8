//! What users set of a volume: properties, limits, and what is known of its content.
//!
//! The catalog first, then the data side, which holds clients to it: what was answered is durable, and what a crash leaves is what the
//! next start goes by. Called by `management/` with the volume's name locked.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{DataSide, Lifecycle, LifecycleError, NameLock};
use crate::catalog::{AttachmentRecord, Content, VolumeLimits, VolumeRecord, VolumeSettings};

/// Labels that a volume has at most.
pub const LABELS_MAX: usize = proto::label::LABELS_MAX;

/// Why a volume's settings do not allow something, or are not changed.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// It is not as the caller has seen it.
    #[error("volume {name} has been changed: its etag is {etag} now")]
    Changed {
        /// Its name.
        name: String,
        /// As it is now.
        etag: String,
    },
    /// It is protected.
    #[error("volume {0} is protected against deletion and restore")]
    Protected(String),
    /// It is read-only, and a writer wants it.
    #[error("volume {0} is read-only")]
    ReadOnly(String),
    /// It is to have a name that another volume has.
    #[error("there is a volume {0} already")]
    NameTaken(String),
    /// It was given another name while the call waited for the former one.
    #[error("volume {0} is called otherwise since a moment ago")]
    RenamedMeanwhile(String),
    /// It is to have another name, and is in memory, where closing it loses its bytes.
    #[error("volume {0} is in memory, and keeps its name")]
    NameFixed(String),
    /// It is to be read-only, and is being written to.
    #[error("volume {name} has a writer: {writer}")]
    HasWriter {
        /// Its name.
        name: String,
        /// Who.
        writer: String,
    },
    /// Several are to write to it, and it is not made for that.
    #[error("volume {0} is not shared: it has one writer at a time")]
    NotShared(String),
    /// Several may write to it, and what is wanted takes one writer for granted.
    #[error("volume {name} is shared by its writers: {what}")]
    Shared {
        /// Its name.
        name: String,
        /// What is not done then.
        what: &'static str,
    },
    /// It would have more labels than a volume has.
    #[error("volume {name} would have {labels} labels, of at most {LABELS_MAX}")]
    TooManyLabels {
        /// Its name.
        name: String,
        /// How many.
        labels: usize,
    },
    /// The volume has no such attachment.
    #[error("volume {name} has no attachment {attachment_id}")]
    NoSuchAttachment {
        /// Its name.
        name: String,
        /// Which.
        attachment_id: Uuid,
    },
    /// The content cannot become that, or it is not for the caller to say.
    #[error("the content of volume {name} is {content}{why}")]
    ContentRefused {
        /// Its name.
        name: String,
        /// What it is.
        content: &'static str,
        /// More of it, as it goes on.
        why: String,
    },
}

/// What is to be changed of a volume's limits; `None`: as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitsWanted {
    /// As in [`VolumeLimits`], and so are the others.
    pub read_iops: Option<u64>,
    /// WRITEs and their like per second.
    pub write_iops: Option<u64>,
    /// Bytes that are read per second.
    pub read_bytes_per_second: Option<u64>,
    /// Bytes that are written per second.
    pub write_bytes_per_second: Option<u64>,
    /// Seconds that may be saved up.
    pub burst_seconds: Option<u32>,
}

impl From<VolumeLimits> for LimitsWanted {
    fn from(limits: VolumeLimits) -> Self {
        Self {
            read_iops: Some(limits.read_iops),
            write_iops: Some(limits.write_iops),
            read_bytes_per_second: Some(limits.read_bytes_per_second),
            write_bytes_per_second: Some(limits.write_bytes_per_second),
            burst_seconds: Some(limits.burst_seconds),
        }
    }
}

impl LimitsWanted {
    fn applied_to(self, limits: VolumeLimits) -> VolumeLimits {
        VolumeLimits {
            read_iops: self.read_iops.unwrap_or(limits.read_iops),
            write_iops: self.write_iops.unwrap_or(limits.write_iops),
            read_bytes_per_second: self.read_bytes_per_second.unwrap_or(limits.read_bytes_per_second),
            write_bytes_per_second: self.write_bytes_per_second.unwrap_or(limits.write_bytes_per_second),
            burst_seconds: self.burst_seconds.unwrap_or(limits.burst_seconds),
        }
    }
}

/// What is to be changed of a volume's properties.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PropertiesWanted {
    /// Labels to set; those with an empty value are taken away.
    pub labels: BTreeMap<String, String>,
    /// Those are all that it is to have.
    pub replaces_labels: bool,
    /// Of its clients.
    pub limits: LimitsWanted,
    /// `None`: as it is.
    pub description: Option<String>,
    /// The same.
    pub is_protected: Option<bool>,
    /// The same.
    pub is_read_only: Option<bool>,
}

impl PropertiesWanted {
    fn applied_to(&self, settings: &VolumeSettings) -> VolumeSettings {
        let mut settings = settings.clone();
        if self.replaces_labels {
            settings.labels.clear();
        }
        for (key, value) in &self.labels {
            if value.is_empty() {
                settings.labels.remove(key);
            } else {
                settings.labels.insert(key.clone(), value.clone());
            }
        }
        let as_wanted = |wanted: Option<bool>, is: bool| wanted.unwrap_or(is);
        settings.description = self.description.clone().unwrap_or(settings.description);
        settings.is_protected = as_wanted(self.is_protected, settings.is_protected);
        settings.is_read_only = as_wanted(self.is_read_only, settings.is_read_only);
        settings.limits = self.limits.applied_to(settings.limits);
        settings
    }
}

/// What a volume's content is to be, by one of its attachments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentWanted {
    /// About to be formatted by it.
    Initialising,
    /// There may be data.
    Written,
}

/// Refuses what would lose the data of a protected volume.
pub(super) fn refuse_protected(volume: &VolumeRecord) -> Result<(), LifecycleError> {
    if volume.settings.is_protected {
        return Err(SettingsError::Protected(volume.name.clone()).into());
    }
    Ok(())
}

impl<D: DataSide> Lifecycle<D> {
    /// Changes what is wanted of the volume's properties.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`]; [`SettingsError::TooManyLabels`]; [`SettingsError::HasWriter`]; the catalog's failure.
    pub fn update_volume(
        &self,
        lock: &NameLock,
        wanted: &PropertiesWanted,
    ) -> Result<VolumeRecord, LifecycleError> {
        let volume = self.volume(lock.name())?;
        let settings = wanted.applied_to(&volume.settings);
        let labels = settings.labels.len();
        if labels > LABELS_MAX {
            return Err(SettingsError::TooManyLabels { name: volume.name, labels }.into());
        }
        if settings == volume.settings {
            return Ok(volume);
        }
        let becomes_read_only = settings.is_read_only && !volume.settings.is_read_only;
        if becomes_read_only || (settings.is_protected && !volume.settings.is_protected) {
            // A restore that goes on would change it all the same.
            self.refuse_while(lock.name(), |operation| operation.makes(volume.volume_uid))?;
        }
        if becomes_read_only {
            self.refuse_attached_writer(&volume)?;
        }
        self.catalog.set_properties(volume.volume_uid, &settings)?;
        if becomes_read_only {
            // From the commit on nobody opens it for writing; who had done so before is seen here.
            let connections = self.data_side.writers_of_volume(volume.volume_uid);
            if connections > 0 {
                self.catalog.put_properties_back(volume.volume_uid, &volume.settings)?;
                let writer = format!("{connections} connections opened it by name");
                return Err(SettingsError::HasWriter { name: volume.name, writer }.into());
            }
        }
        tracing::info!(name = %volume.name, volume_uid = %volume.volume_uid, "properties changed");
        let has_other_limits = settings.limits != volume.settings.limits;
        let changed = VolumeRecord { settings, ..volume };
        if has_other_limits {
            self.data_side.limits_changed(&changed);
        }
        Ok(changed)
    }

    fn refuse_attached_writer(&self, volume: &VolumeRecord) -> Result<(), LifecycleError> {
        let held = self.catalog.attachments_of_volume(volume.volume_uid)?;
        match held.into_iter().find(|(held, _)| !held.read_only) {
            Some((held, _)) => {
                let writer = format!("it is attached to node {}", held.node_id);
                Err(SettingsError::HasWriter { name: volume.name.clone(), writer }.into())
            }
            None => Ok(()),
        }
    }

    /// Sets the volume's limits, for those who have it as well.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`]; the catalog's failure.
    pub fn set_limits(&self, lock: &NameLock, limits: VolumeLimits) -> Result<VolumeRecord, LifecycleError> {
        let mut volume = self.volume(lock.name())?;
        if volume.settings.limits != limits {
            self.catalog.set_limits(volume.volume_uid, &limits)?;
            volume.settings.limits = limits;
            tracing::info!(name = %volume.name, volume_uid = %volume.volume_uid, ?limits, "limits changed");
        }
        self.data_side.limits_changed(&volume);
        Ok(volume)
    }

    /// Takes an attachment's word for what becomes of the volume's content.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`], [`SettingsError::NoSuchAttachment`], [`SettingsError::ContentRefused`]; the catalog's
    /// failure.
    pub fn set_content(
        &self,
        lock: &NameLock,
        attachment_id: Uuid,
        wanted: ContentWanted,
    ) -> Result<VolumeRecord, LifecycleError> {
        loop {
            let mut volume = self.volume(lock.name())?;
            let content = self.next_content(&volume, attachment_id, wanted)?;
            let before = volume.settings.content;
            // It may become written at any moment.
            if content != before && !self.catalog.change_content(volume.volume_uid, before, content)? {
                continue;
            }
            volume.settings.content = content;
            self.data_side.content_changed(&volume);
            if content != before {
                tracing::info!(name = %volume.name, volume_uid = %volume.volume_uid, content = content.as_str(), "content changed");
            }
            return Ok(volume);
        }
    }

    /// The volume, for one of its attachments, which nothing is changed by.
    ///
    /// # Errors
    /// [`LifecycleError::VolumeNotFound`], [`SettingsError::NoSuchAttachment`]; the catalog's failure.
    pub fn volume_of_attachment(
        &self,
        lock: &NameLock,
        attachment_id: Uuid,
    ) -> Result<VolumeRecord, LifecycleError> {
        let volume = self.volume(lock.name())?;
        self.attachment_of(&volume, attachment_id)?;
        Ok(volume)
    }

    fn attachment_of(
        &self,
        volume: &VolumeRecord,
        attachment_id: Uuid,
    ) -> Result<AttachmentRecord, LifecycleError> {
        let found = self.catalog.attachment(attachment_id)?;
        let name = volume.name.clone();
        found
            .filter(|found| found.volume_uid == volume.volume_uid)
            .ok_or_else(|| SettingsError::NoSuchAttachment { name, attachment_id }.into())
    }

    fn next_content(
        &self,
        volume: &VolumeRecord,
        attachment_id: Uuid,
        wanted: ContentWanted,
    ) -> Result<Content, LifecycleError> {
        let name = volume.name.clone();
        let attachment = self.attachment_of(volume, attachment_id)?;
        let content = volume.settings.content;
        let refused =
            |why: String| Err(SettingsError::ContentRefused { name, content: content.as_str(), why }.into());
        if attachment.read_only {
            return refused(", and this attachment only reads".to_owned());
        }
        if volume.settings.is_shared && wanted == ContentWanted::Initialising {
            return refused(
                ", and the volume is shared: who writes to it makes its own file system".to_owned(),
            );
        }
        match (wanted, content) {
            (_, Content::Initialising { attachment_id: by }) if by != attachment_id => {
                // Nobody but its holder wrote to it; one that has ended, and is drained, writes no more.
                let is_over = self.catalog.attachment_in_any_state(by)?.is_none();
                if is_over && wanted == ContentWanted::Initialising {
                    Ok(Content::Initialising { attachment_id })
                } else {
                    refused(format!(" by attachment {by}"))
                }
            }
            (ContentWanted::Initialising, Content::Written) => refused(" already".to_owned()),
            (ContentWanted::Initialising, _) => Ok(Content::Initialising { attachment_id }),
            (ContentWanted::Written, _) => Ok(Content::Written),
        }
    }
}
