//! The volume that CreateVolume asks for, and whether one that is there is that volume.
//!
//! Owns the translation of the request, and the comparison that makes the call idempotent. Limits may have been changed since, and the
//! mutable parameters with them: they make no other volume. Never: does I/O.

use std::collections::HashMap;

use proto::csi::v1 as csi;
use proto::csi::v1::volume_content_source::Type as SourceType;
use proto::v1::{Backend, Volume, VolumeLimits};
use uuid::Uuid;

use super::access::{Capability, Nature};
use super::names;
use super::parameters::{Class, Limits};
use super::refusal::{Refusal, given, shown};
use super::sizes::{SizeRange, clear};

/// Bytes of a description at most, as the server has it.
const DESCRIPTION_BYTES_MAX: usize = 1024;

/// What a volume begins as a copy of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// A snapshot, by its uid.
    Snapshot(Uuid),
    /// A volume, by its uid.
    Volume(Uuid),
}

impl Source {
    /// As CSI has it.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: nothing is named; NOT_FOUND: nothing can have such an id.
    pub(super) fn of(source: &csi::VolumeContentSource) -> Result<Self, Refusal> {
        match &source.r#type {
            None => Err(Refusal::invalid("volume_content_source: neither a snapshot nor a volume")),
            Some(SourceType::Volume(volume)) => Ok(Self::Volume(names::volume_uid(&volume.volume_id)?)),
            Some(SourceType::Snapshot(snapshot)) => {
                let id = given("snapshot_id", &snapshot.snapshot_id)?;
                let uid = names::uid(id);
                uid.map(Self::Snapshot)
                    .ok_or_else(|| Refusal::not_found(format!("there is no snapshot {}", shown(id))))
            }
        }
    }

    /// Its uid.
    pub(super) fn uid(self) -> Uuid {
        let (Self::Snapshot(uid) | Self::Volume(uid)) = self;
        uid
    }

    fn label(self) -> &'static str {
        match self {
            Self::Snapshot(_) => names::SOURCE_SNAPSHOT,
            Self::Volume(_) => names::SOURCE_VOLUME,
        }
    }

    /// As CSI has it.
    pub(super) fn to_csi(self) -> csi::VolumeContentSource {
        let r#type = match self {
            Self::Snapshot(uid) => SourceType::Snapshot(csi::volume_content_source::SnapshotSource {
                snapshot_id: uid.to_string(),
            }),
            Self::Volume(uid) => {
                SourceType::Volume(csi::volume_content_source::VolumeSource { volume_id: uid.to_string() })
            }
        };
        csi::VolumeContentSource { r#type: Some(r#type) }
    }
}

/// The volume that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// By CSI's name.
    csi_name: String,
    /// In bytes.
    pub(super) size: SizeRange,
    /// What its StorageClass says.
    pub(super) class: Class,
    /// Of the StorageClass, and over them of the VolumeAttributesClass.
    pub(super) limits: VolumeLimits,
    /// `None`: it is empty.
    pub(super) source: Option<Source>,
}

impl Wanted {
    /// # Errors
    /// INVALID_ARGUMENT: a field is missing or off; NOT_FOUND: the source cannot be.
    pub(super) fn of(request: &csi::CreateVolumeRequest) -> Result<Self, Refusal> {
        let csi_name = names::csi_name(&request.name)?.to_owned();
        let capabilities = Capability::all_of(&request.volume_capabilities)?;
        let size = SizeRange::of(request.capacity_range.as_ref())?;
        let class = Class::of(&request.parameters)?;
        let changeable = Limits::of(&request.mutable_parameters)?;
        let source = request.volume_content_source.as_ref().map(Source::of).transpose()?;
        if class.is_shared && source.is_some() {
            return Err(Refusal::invalid("shared: a copy cannot be shared yet; make an empty volume"));
        }
        let nature = Nature { is_shared: class.is_shared, is_read_only: false, is_clone: source.is_some() };
        for capability in &capabilities {
            if let Some(why) = capability.refused_by(nature) {
                return Err(Refusal::invalid(why));
            }
            let other = capability.fs_type.zip(class.fs_type).filter(|(asked, of_class)| asked != of_class);
            if let Some((asked, of_class)) = other {
                let (asked, of_class) = (asked.name(), of_class.name());
                return Err(Refusal::invalid(format!(
                    "fs_type {asked} is not the StorageClass's, {of_class}"
                )));
            }
        }
        let limits = changeable.over(class.limits.over(VolumeLimits::default()));
        Ok(Self { csi_name, size, class, limits, source })
    }

    /// Its name on the server, when it is made.
    pub(super) fn name(&self) -> String {
        names::of_csi_volume(self.class.tenant.as_deref(), &self.csi_name)
    }

    /// The label that it is found by.
    pub(super) fn name_label(&self) -> (String, String) {
        (names::LABEL_NAME.to_owned(), names::hash(&self.csi_name))
    }

    /// The labels that it bears when it is made.
    pub(super) fn labels(&self) -> HashMap<String, String> {
        let owned = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let mut labels =
            HashMap::from([self.name_label(), owned(names::LABEL_PARAMETERS, &self.class.fingerprint)]);
        labels.extend(self.class.fs_type.map(|fs_type| owned(names::LABEL_FS_TYPE, fs_type.name())));
        if let Some(source) = self.source {
            labels.extend([owned(names::LABEL_SOURCE, source.label())]);
            let has_limits = self.limits != VolumeLimits::default();
            labels.extend(has_limits.then(|| owned(names::LABEL_UNFINISHED, names::UNFINISHED_LIMITS)));
        }
        labels
    }

    /// For people.
    pub(super) fn description(&self) -> String {
        let claim = self.class.claim.as_ref().map(|claim| format!(" for claim {}", claim.escape_debug()));
        let mut text = format!("CSI volume {}{}", self.csi_name.escape_debug(), claim.unwrap_or_default());
        let end = (0..=text.len().min(DESCRIPTION_BYTES_MAX)).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
        text
    }

    /// In what a volume that is there differs from the one that is wanted, for people; empty where it is that one.
    pub(super) fn differences(&self, there: &Volume) -> Vec<String> {
        let mut differences = Vec::new();
        let bytes = clear(there.capacity_bytes, there.is_encrypted);
        if !self.size.has(bytes) {
            differences.push(format!("it has {bytes} bytes, and wanted are {}", self.size));
        }
        // Also what a server made of the call that knows no encryption.
        if self.class.is_encrypted != there.is_encrypted {
            let (is, wanted) = (of_encryption(there.is_encrypted), of_encryption(self.class.is_encrypted));
            differences.push(format!("it is {is}, and wanted is one that is {wanted}"));
        }
        let source_uid = self.source.map(|source| source.uid().to_string()).unwrap_or_default();
        if source_uid != there.source_uid {
            let told = |uid: &str| if uid.is_empty() { "nothing".to_owned() } else { uid.to_owned() };
            let (is, wanted) = (told(&there.source_uid), told(&source_uid));
            differences.push(format!("it is a copy of {is}, and wanted is one of {wanted}"));
        }
        // A copy is where its source is, and the class may leave it there.
        let backend = self.class.backend.or(self.source.is_none().then_some(Backend::File));
        if let Some(backend) = backend.filter(|backend| *backend != there.backend()) {
            let (is, wanted) = (there.backend().as_str_name(), backend.as_str_name());
            differences.push(format!("it is kept in {is}, and wanted is {wanted}"));
        }
        if self.class.is_shared != there.is_shared {
            differences.push("one of both is shared, and the other is not".to_owned());
        }
        let parameters = there.labels.get(names::LABEL_PARAMETERS);
        if parameters.is_some_and(|parameters| *parameters != self.class.fingerprint) {
            differences.push("it was made with other parameters of its StorageClass".to_owned());
        }
        differences
    }
}

/// For people.
pub(super) fn of_encryption(is_encrypted: bool) -> &'static str {
    if is_encrypted { "encrypted" } else { "not encrypted" }
}

#[cfg(test)]
mod tests {
    use proto::csi::v1::volume_capability::access_mode::Mode;
    use proto::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
    use tonic::Code;

    use super::super::sizes::on_server;
    use super::*;

    const UID: &str = "0f0e0d0c-0b0a-4908-8706-050403020100";

    fn capability(fs_type: Option<&str>, mode: Mode) -> csi::VolumeCapability {
        let access_type = match fs_type {
            None => AccessType::Block(BlockVolume {}),
            Some(fs_type) => {
                AccessType::Mount(MountVolume { fs_type: fs_type.to_owned(), ..Default::default() })
            }
        };
        csi::VolumeCapability {
            access_type: Some(access_type),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }

    fn request(parameters: &[(&str, &str)]) -> csi::CreateVolumeRequest {
        csi::CreateVolumeRequest {
            name: "pvc-1".to_owned(),
            capacity_range: Some(csi::CapacityRange { required_bytes: 1 << 20, limit_bytes: 1 << 21 }),
            volume_capabilities: vec![capability(Some(""), Mode::SingleNodeWriter)],
            parameters: parameters.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ..Default::default()
        }
    }

    fn of_snapshot(id: &str) -> Option<csi::VolumeContentSource> {
        let snapshot = csi::volume_content_source::SnapshotSource { snapshot_id: id.to_owned() };
        Some(csi::VolumeContentSource { r#type: Some(SourceType::Snapshot(snapshot)) })
    }

    /// As the server has it once it is made.
    fn made(wanted: &Wanted) -> Volume {
        Volume {
            name: wanted.name(),
            capacity_bytes: on_server(wanted.size.choose(0).unwrap(), wanted.class.is_encrypted).unwrap(),
            is_encrypted: wanted.class.is_encrypted,
            backend: wanted.class.backend.unwrap_or(Backend::File).into(),
            labels: wanted.labels(),
            is_shared: wanted.class.is_shared,
            source_uid: wanted.source.map(|source| source.uid().to_string()).unwrap_or_default(),
            ..Default::default()
        }
    }

    #[test]
    fn a_request_is_translated() {
        let mut asked =
            request(&[("readIops", "5"), ("writeIops", "6"), ("csi.storage.k8s.io/fstype", "xfs")]);
        asked.mutable_parameters.insert("writeIops".to_owned(), "60".to_owned());
        let wanted = Wanted::of(&asked).unwrap();
        assert_eq!(wanted.limits, VolumeLimits { read_iops: 5, write_iops: 60, ..Default::default() });
        assert_eq!(wanted.labels()[names::LABEL_FS_TYPE], "xfs");
        assert!(!wanted.labels().contains_key(names::LABEL_UNFINISHED), "they are set at once");
        asked.volume_content_source = of_snapshot(UID);
        let copy = Wanted::of(&asked).unwrap();
        assert_eq!(copy.source, Some(Source::Snapshot(UID.parse().unwrap())));
        assert_eq!(copy.labels()[names::LABEL_UNFINISHED], names::UNFINISHED_LIMITS);
        assert_eq!(copy.source.map(Source::to_csi), of_snapshot(UID));
        assert!(
            copy.labels()
                .iter()
                .all(|(key, value)| proto::label::is_key(key) && proto::label::is_value(value))
        );
    }

    #[test]
    fn the_same_request_wants_the_volume_that_it_made_and_another_one_does_not() {
        let wanted = Wanted::of(&request(&[("readIops", "5")])).unwrap();
        let mut there = made(&wanted);
        assert_eq!(wanted.differences(&there), Vec::<String>::new());
        // Limits are changed, labels taken away, the volume renamed.
        there.limits = Some(VolumeLimits { read_iops: 9, ..Default::default() });
        there.labels.clear();
        there.name = "other".to_owned();
        assert_eq!(wanted.differences(&there), Vec::<String>::new());
        let there = made(&wanted);
        let mut of_other_size = request(&[("readIops", "5")]);
        of_other_size.capacity_range = Some(csi::CapacityRange { required_bytes: 1 << 22, limit_bytes: 0 });
        let mut of_source = request(&[("readIops", "5")]);
        of_source.volume_content_source = of_snapshot(UID);
        let mut shared = request(&[("readIops", "5"), ("shared", "true")]);
        shared.volume_capabilities = vec![capability(None, Mode::SingleNodeWriter)];
        for (other, what) in [
            (of_other_size, "bytes"),
            (of_source, "a copy of nothing"),
            (shared, "shared"),
            (request(&[("readIops", "6")]), "parameters"),
            (request(&[("readIops", "5"), ("backend", "memory")]), "BACKEND_MEMORY"),
            (request(&[("readIops", "5"), ("encrypted", "true")]), "wanted is one that is encrypted"),
        ] {
            let differences = Wanted::of(&other).unwrap().differences(&there);
            assert!(
                differences.iter().any(|difference| difference.contains(what)),
                "{what}: {differences:?}"
            );
        }
    }

    #[test]
    fn an_encrypted_volume_is_found_again_by_its_clear_size_and_one_in_the_clear_is_not_it() {
        let wanted = Wanted::of(&request(&[("encrypted", "true")])).unwrap();
        let there = made(&wanted);
        assert_eq!(there.capacity_bytes, (1 << 20) + (16 << 20));
        assert_eq!(wanted.differences(&there), Vec::<String>::new());
        // Of a server that knows no encryption.
        let plain = Volume { is_encrypted: false, ..there };
        assert!(
            wanted.differences(&plain)[1].contains("it is not encrypted"),
            "{:?}",
            wanted.differences(&plain)
        );
    }

    #[test]
    fn a_copy_is_where_the_class_says_if_it_says_so() {
        for (parameters, is_other) in
            [(&[][..], false), (&[("backend", "lvm")][..], false), (&[("backend", "file")][..], true)]
        {
            let mut asked = request(parameters);
            asked.volume_content_source = of_snapshot(UID);
            let wanted = Wanted::of(&asked).unwrap();
            let there = Volume { backend: Backend::Lvm.into(), ..made(&wanted) };
            let differences = wanted.differences(&there);
            assert_eq!(!differences.is_empty(), is_other, "{parameters:?}: {differences:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let with = |change: &dyn Fn(&mut csi::CreateVolumeRequest)| {
            let mut asked = request(&[]);
            change(&mut asked);
            Wanted::of(&asked).unwrap_err()
        };
        let invalid = Code::InvalidArgument;
        assert_eq!(with(&|asked| asked.name.clear()).code, invalid);
        assert_eq!(with(&|asked| asked.volume_capabilities.clear()).code, invalid);
        assert_eq!(with(&|asked| asked.capacity_range.as_mut().unwrap().limit_bytes = -1).code, invalid);
        assert_eq!(with(&|asked| asked.volume_content_source = Some(Default::default())).code, invalid);
        assert_eq!(with(&|asked| asked.volume_content_source = of_snapshot("")).code, invalid);
        assert_eq!(with(&|asked| asked.volume_content_source = of_snapshot("no-such")).code, Code::NotFound);
        let readers = vec![capability(Some(""), Mode::MultiNodeReaderOnly)];
        let refusal = with(&|asked| asked.volume_capabilities.clone_from(&readers));
        assert!(refusal.code == invalid && refusal.message.contains("MULTI_NODE_READER_ONLY"));
        let refusal = with(&|asked| {
            asked.parameters.insert("csi.storage.k8s.io/fstype".to_owned(), "xfs".to_owned());
            asked.volume_capabilities = vec![capability(Some("ext4"), Mode::SingleNodeWriter)];
        });
        assert!(refusal.code == invalid && refusal.message.contains("ext4"));
        let refusal = with(&|asked| {
            asked.parameters.insert("shared".to_owned(), "true".to_owned());
        });
        assert!(refusal.message.contains("block device"), "{refusal:?}");
        let refusal = with(&|asked| {
            asked.mutable_parameters.insert("backend".to_owned(), "file".to_owned());
        });
        assert!(refusal.code == invalid && refusal.message.contains("backend"));
    }

    #[test]
    fn a_description_is_what_the_server_takes() {
        let mut asked = request(&[
            ("csi.storage.k8s.io/pvc/name", &"ä".repeat(900)),
            ("csi.storage.k8s.io/pvc/namespace", "n\n"),
        ]);
        asked.name = "tab\t and \u{202e}".to_owned();
        let description = Wanted::of(&asked).unwrap().description();
        assert!(description.len() <= DESCRIPTION_BYTES_MAX && !description.chars().any(char::is_control));
        assert!(description.starts_with("CSI volume tab\\t and"), "{description}");
    }
}
