//! How a volume may be used: access modes and access types.
//!
//! Owns: which there are, and which a volume allows. Never: does I/O.
//!
//! | access mode | allowed for |
//! | --- | --- |
//! | SINGLE_NODE_WRITER, SINGLE_NODE_SINGLE_WRITER, SINGLE_NODE_MULTI_WRITER | every volume that is not read-only |
//! | SINGLE_NODE_READER_ONLY | every volume |
//! | MULTI_NODE_READER_ONLY | clones, and volumes that are read-only: of others a reader would see a writer's half |
//! | MULTI_NODE_MULTI_WRITER | shared volumes, as block devices |
//! | MULTI_NODE_SINGLE_WRITER | none |
//!
//! A shared volume is only a block device, in every mode: a second node's file system on it would be its end.

use proto::csi::v1;
use proto::csi::v1::volume_capability::AccessType;
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::v1::Volume;

use super::refusal::Refusal;
use crate::csi::mount_options::FsType;

/// One way to use a volume, looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capability {
    /// As CSI has it; never `Unknown` or `MultiNodeSingleWriter`.
    pub(super) mode: Mode,
    /// A block device; a file system otherwise.
    pub(super) is_block: bool,
    /// Which file system; `None` is for the StorageClass, or the default.
    pub(super) fs_type: Option<FsType>,
}

/// What of a volume matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Nature {
    /// Several nodes may write to it at once.
    pub(super) is_shared: bool,
    /// Nobody writes to it.
    pub(super) is_read_only: bool,
    /// It began as a copy.
    pub(super) is_clone: bool,
}

impl Nature {
    /// Of a volume that is there.
    pub(super) fn of(volume: &Volume) -> Self {
        Self {
            is_shared: volume.is_shared,
            is_read_only: volume.is_read_only,
            is_clone: !volume.source_uid.is_empty(),
        }
    }
}

impl Capability {
    /// # Errors
    /// INVALID_ARGUMENT: something is missing, or no volume of ours can be used so.
    pub(super) fn of(capability: &v1::VolumeCapability) -> Result<Self, Refusal> {
        let (is_block, fs_type) = match &capability.access_type {
            None => return Err(Refusal::invalid("volume_capability: access_type is missing")),
            Some(AccessType::Block(_)) => (true, None),
            Some(AccessType::Mount(mount)) => (false, file_system(mount)?),
        };
        let number = capability.access_mode.as_ref().map_or(0, |access| access.mode);
        let mode = Mode::try_from(number)
            .map_err(|_| Refusal::invalid(format!("volume_capability: there is no access mode {number}")))?;
        match mode {
            Mode::Unknown => Err(Refusal::invalid("volume_capability: access_mode is missing")),
            Mode::MultiNodeSingleWriter => Err(Refusal::invalid(format!(
                "access mode {} is not supported: who reads beside a writer sees half of what it does",
                mode.as_str_name()
            ))),
            mode => Ok(Self { mode, is_block, fs_type }),
        }
    }

    /// All that a request names.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: there is none; the same as of one.
    pub(super) fn all_of(capabilities: &[v1::VolumeCapability]) -> Result<Vec<Self>, Refusal> {
        if capabilities.is_empty() {
            return Err(Refusal::invalid("volume_capabilities are missing"));
        }
        capabilities.iter().map(Self::of).collect()
    }

    /// Why a volume cannot be used in this way, for people; `None` where it can.
    pub(super) fn refused_by(self, nature: Nature) -> Option<String> {
        let mode = self.mode.as_str_name();
        let Nature { is_shared, is_read_only, is_clone } = nature;
        if is_shared && !self.is_block {
            return Some("a shared volume is a block device only: two nodes' file systems on it would destroy each other".to_owned());
        }
        match self.mode {
            Mode::MultiNodeMultiWriter if !self.is_block => Some(format!(
                "access mode {mode} is for block devices, of a StorageClass with shared: \"true\""
            )),
            Mode::MultiNodeMultiWriter if !is_shared => {
                Some(format!("access mode {mode} needs a volume of a StorageClass with shared: \"true\""))
            }
            Mode::MultiNodeReaderOnly if !is_read_only && !is_clone => Some(format!(
                "access mode {mode} is for copies of snapshots or volumes, and for volumes that are read-only"
            )),
            _ => None,
        }
    }

    /// Whether it is used on one node at a time.
    pub(super) fn is_single_node(self) -> bool {
        !matches!(self.mode, Mode::MultiNodeReaderOnly | Mode::MultiNodeMultiWriter)
    }

    /// Whether nobody writes in this mode.
    pub(super) fn is_read_only(self) -> bool {
        matches!(self.mode, Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly)
    }
}

/// The file system that is asked for.
fn file_system(mount: &v1::volume_capability::MountVolume) -> Result<Option<FsType>, Refusal> {
    if !mount.volume_mount_group.is_empty() {
        let why = "ext4 and XFS have no such option; the orchestrator sets the group itself (fsGroup)";
        return Err(Refusal::invalid(format!("volume_mount_group is not supported: {why}")));
    }
    match mount.fs_type.as_str() {
        "" => Ok(None),
        name => FsType::parse(name).map(Some).map_err(|error| Refusal::invalid(format!("fs_type: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use proto::csi::v1::volume_capability::{AccessMode, BlockVolume, MountVolume};
    use tonic::Code;

    use super::*;

    fn capability(access_type: Option<AccessType>, mode: i32) -> v1::VolumeCapability {
        v1::VolumeCapability { access_type, access_mode: Some(AccessMode { mode }) }
    }

    fn block(mode: Mode) -> v1::VolumeCapability {
        capability(Some(AccessType::Block(BlockVolume {})), mode.into())
    }

    fn mount(fs_type: &str, group: &str, mode: Mode) -> v1::VolumeCapability {
        let mount = MountVolume {
            fs_type: fs_type.to_owned(),
            volume_mount_group: group.to_owned(),
            ..Default::default()
        };
        capability(Some(AccessType::Mount(mount)), mode.into())
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (bad, what) in [
            (v1::VolumeCapability::default(), "access_type"),
            (capability(None, 1), "access_type"),
            (block(Mode::Unknown), "access_mode"),
            (v1::VolumeCapability { access_mode: None, ..block(Mode::SingleNodeWriter) }, "access_mode"),
            (capability(Some(AccessType::Block(BlockVolume {})), 99), "99"),
            (block(Mode::MultiNodeSingleWriter), "MULTI_NODE_SINGLE_WRITER"),
            (mount("btrfs", "", Mode::SingleNodeWriter), "btrfs"),
            (mount("ext4 -F", "", Mode::SingleNodeWriter), "ext4 -F"),
            (mount("", "1000", Mode::SingleNodeWriter), "volume_mount_group"),
        ] {
            let refusal = Capability::of(&bad).unwrap_err();
            assert!(refusal.code == Code::InvalidArgument && refusal.message.contains(what), "{refusal:?}");
        }
        assert!(Capability::all_of(&[]).is_err());
        assert!(Capability::all_of(&[block(Mode::SingleNodeWriter), block(Mode::Unknown)]).is_err());
        assert_eq!(
            Capability::of(&mount("xfs", "", Mode::SingleNodeWriter)).unwrap().fs_type,
            Some(FsType::Xfs)
        );
    }

    #[test]
    fn each_mode_is_for_the_volumes_that_bear_it() {
        let plain = Nature::default();
        let shared = Nature { is_shared: true, ..plain };
        let read_only = Nature { is_read_only: true, ..plain };
        let clone = Nature { is_clone: true, ..plain };
        let single = [
            Mode::SingleNodeWriter,
            Mode::SingleNodeReaderOnly,
            Mode::SingleNodeSingleWriter,
            Mode::SingleNodeMultiWriter,
        ];
        let refusal = |capability: v1::VolumeCapability, nature| {
            Capability::of(&capability).unwrap().refused_by(nature)
        };
        for mode in single {
            for nature in [plain, read_only, clone] {
                assert_eq!(refusal(block(mode), nature), None);
                assert_eq!(refusal(mount("", "", mode), nature), None);
            }
            assert_eq!(refusal(block(mode), shared), None);
            assert!(
                refusal(mount("", "", mode), shared).is_some_and(|why| why.contains("block device only"))
            );
            assert!(Capability::of(&block(mode)).unwrap().is_single_node());
        }
        let readers = Mode::MultiNodeReaderOnly;
        assert_eq!(refusal(mount("", "", readers), clone), None);
        assert_eq!(refusal(mount("", "", readers), read_only), None);
        assert!(
            refusal(mount("", "", readers), plain).is_some_and(|why| why.contains("MULTI_NODE_READER_ONLY"))
        );
        let writers = Mode::MultiNodeMultiWriter;
        assert_eq!(refusal(block(writers), shared), None);
        assert!(refusal(block(writers), plain).is_some_and(|why| why.contains("shared")));
        assert!(refusal(mount("", "", writers), plain).is_some_and(|why| why.contains("block devices")));
    }
}
