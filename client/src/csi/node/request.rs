//! What kubelet asks for, read once: which volume, used as what, by whom.
//!
//! Owns: the checks that need no look at anything; what is off is named by its field. Never: shows a secret, a value of a context, or more
//! of a text than a message needs. Called by: `service`.

use std::collections::HashMap;
use std::fmt;

use proto::csi::v1::VolumeCapability;
use proto::csi::v1::volume_capability::AccessType;
use proto::csi::v1::volume_capability::access_mode::Mode;
use tonic::Status;
use uuid::Uuid;

use super::plan::Use;
use crate::csi::mount_options::{FsType, MountOptions};

/// How much of an id a message shows, in characters.
const SHOWN_CHARACTERS_MAX: usize = 100;
/// In publish_context: the controller has granted the volume to this node to read only. (`true`.) Nothing secret is in there.
pub const READ_ONLY_KEY: &str = "readonly";
/// In volume_context: the file system that the StorageClass asks for.
const FS_TYPE_KEY: &str = "csi.storage.k8s.io/fstype";
/// In volume_context: the volume is to be encrypted, which this plugin does not do yet. (`true`.)
const ENCRYPTED_KEY: &str = "encrypted";

/// A volume, by its uid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VolumeId(Uuid);

impl From<Uuid> for VolumeId {
    fn from(uid: Uuid) -> Self {
        Self(uid)
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl VolumeId {
    /// As the server and the node daemon take it in place of a name.
    pub fn as_name(self) -> String {
        format!("uid:{}", self.0)
    }

    /// Reads an id that must be there; `None`: no volume has such a one.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: it is missing.
    pub fn read(volume_id: &str) -> Result<Option<Self>, Status> {
        require("volume_id", volume_id)?;
        // In the spelling that the plugin gives out alone: two ids of one volume would be two volumes to kubelet.
        let uid = Uuid::try_parse(volume_id).ok().filter(|uid| uid.to_string() == volume_id);
        Ok(uid.map(Self))
    }
}

/// There is no volume of this id.
pub fn no_such_volume(volume_id: &str) -> Status {
    let shown: String = volume_id.chars().take(SHOWN_CHARACTERS_MAX).collect();
    Status::not_found(format!("there is no volume {shown:?}"))
}

/// A text that must be there.
///
/// # Errors
/// INVALID_ARGUMENT
pub fn require(field: &'static str, text: &str) -> Result<(), Status> {
    if text.is_empty() { Err(Status::invalid_argument(format!("{field} is missing"))) } else { Ok(()) }
}

/// How a volume is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttachAs {
    /// Nothing is written.
    pub read_only: bool,
    /// Other nodes may have it as well.
    pub shared: bool,
}

/// How a volume is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// As a device, or with a file system; the options of that.
    pub options: Option<MountOptions>,
    /// As its access mode says.
    pub attach_as: AttachAs,
    /// One target at a time.
    pub is_single: bool,
}

impl Usage {
    /// As a device, or with which file system.
    pub fn used_as(&self) -> Use {
        self.options.as_ref().map_or(Use::Block, |options| Use::FileSystem(options.fs_type))
    }

    /// Reads a capability and what goes with it.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, with what is missing, off or not supported.
    pub fn read(
        capability: Option<&VolumeCapability>,
        publish_context: &HashMap<String, String>,
        volume_context: &HashMap<String, String>,
        secrets: &HashMap<String, String>,
    ) -> Result<Self, Status> {
        let off = |what: &str| Status::invalid_argument(what.to_owned());
        if !secrets.is_empty() || is_true(volume_context, ENCRYPTED_KEY) {
            return Err(off(
                "encrypted volumes are not supported yet: no secrets are used; take them, and the parameter `encrypted`, out of the StorageClass",
            ));
        }
        let capability = capability.ok_or_else(|| off("volume_capability is missing"))?;
        let options = match &capability.access_type {
            None => return Err(off("volume_capability.access_type is missing")),
            Some(AccessType::Block(_)) => None,
            Some(AccessType::Mount(mount)) => {
                if !mount.volume_mount_group.is_empty() {
                    return Err(off("volume_mount_group is not supported; kubelet sets the group by itself"));
                }
                let refused = |error: crate::csi::mount_options::OptionError| {
                    Status::invalid_argument(error.to_string())
                };
                // Where kubelet says nothing, the StorageClass may have.
                let of_class = volume_context.get(FS_TYPE_KEY).map_or("", String::as_str);
                let fs_type = if mount.fs_type.is_empty() { of_class } else { &mount.fs_type };
                let fs_type = FsType::parse(fs_type).map_err(refused)?;
                Some(MountOptions::parse(fs_type, &mount.mount_flags).map_err(refused)?)
            }
        };
        let mode = capability.access_mode.as_ref().map(|access| access.mode()).unwrap_or_default();
        let (read_only, shared, is_single) = match mode {
            Mode::SingleNodeWriter | Mode::SingleNodeMultiWriter => (false, false, false),
            Mode::SingleNodeSingleWriter => (false, false, true),
            Mode::SingleNodeReaderOnly => (true, false, false),
            Mode::MultiNodeReaderOnly => (true, true, false),
            Mode::MultiNodeMultiWriter if options.is_none() => (false, true, false),
            Mode::MultiNodeMultiWriter => {
                return Err(off(
                    "access mode MULTI_NODE_MULTI_WRITER is for block volumes alone: a file system that two nodes write to is lost",
                ));
            }
            Mode::MultiNodeSingleWriter => {
                return Err(off("access mode MULTI_NODE_SINGLE_WRITER is not supported"));
            }
            Mode::Unknown => return Err(off("volume_capability.access_mode is missing")),
        };
        let read_only = read_only || is_true(publish_context, READ_ONLY_KEY);
        Ok(Self { options, attach_as: AttachAs { read_only, shared }, is_single })
    }
}

fn is_true(context: &HashMap<String, String>, key: &str) -> bool {
    context.get(key).is_some_and(|value| value == "true")
}

#[cfg(test)]
mod tests {
    use proto::csi::v1::volume_capability::{AccessMode, BlockVolume, MountVolume};
    use tonic::Code;

    use super::*;

    fn capability(access_type: AccessType, mode: Mode) -> VolumeCapability {
        VolumeCapability {
            access_type: Some(access_type),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }

    fn mount(fs_type: &str, flags: &[&str]) -> AccessType {
        AccessType::Mount(MountVolume {
            fs_type: fs_type.to_owned(),
            mount_flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            volume_mount_group: String::new(),
        })
    }

    fn read(capability: &VolumeCapability) -> Result<Usage, Status> {
        Usage::read(Some(capability), &HashMap::new(), &HashMap::new(), &HashMap::new())
    }

    #[track_caller]
    fn refused(capability: &VolumeCapability, what: &str) {
        let status = read(capability).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(what), "{status}");
    }

    #[test]
    fn an_id_is_a_uid_in_the_spelling_that_is_given_out() {
        let uid = "0a9c3186-7725-43ec-9e11-8be9a559724c";
        let read = VolumeId::read(uid).unwrap().unwrap();
        assert_eq!((read.to_string().as_str(), read.as_name().as_str()), (uid, &*format!("uid:{uid}")));
        for nonsense in ["x", "../../etc", &uid.to_uppercase(), &uid.replace('-', ""), &"x".repeat(10_000)] {
            assert_eq!(VolumeId::read(nonsense).unwrap(), None, "{nonsense}");
            let told = no_such_volume(nonsense);
            assert!(told.code() == Code::NotFound && told.message().len() < 300, "{told}");
        }
        assert_eq!(VolumeId::read("").unwrap_err().code(), Code::InvalidArgument);
        assert!(!no_such_volume("a\u{7}b\nc").message().chars().any(char::is_control));
    }

    #[test]
    fn every_access_mode_is_taken_or_refused_by_name() {
        for (mode, expected) in [
            (Mode::SingleNodeWriter, (false, false, false)),
            (Mode::SingleNodeMultiWriter, (false, false, false)),
            (Mode::SingleNodeSingleWriter, (false, false, true)),
            (Mode::SingleNodeReaderOnly, (true, false, false)),
            (Mode::MultiNodeReaderOnly, (true, true, false)),
        ] {
            for access_type in [mount("", &[]), AccessType::Block(BlockVolume {})] {
                let usage = read(&capability(access_type, mode)).unwrap();
                let told = (usage.attach_as.read_only, usage.attach_as.shared, usage.is_single);
                assert_eq!(told, expected, "{mode:?}");
            }
        }
        let many = Mode::MultiNodeMultiWriter;
        let usage = read(&capability(AccessType::Block(BlockVolume {}), many)).unwrap();
        assert_eq!(usage.attach_as, AttachAs { read_only: false, shared: true });
        refused(&capability(mount("", &[]), many), "MULTI_NODE_MULTI_WRITER is for block volumes");
        refused(&capability(mount("", &[]), Mode::MultiNodeSingleWriter), "MULTI_NODE_SINGLE_WRITER");
        refused(&capability(mount("", &[]), Mode::Unknown), "access_mode is missing");
        let no_mode = VolumeCapability { access_type: Some(mount("", &[])), access_mode: None };
        refused(&no_mode, "access_mode is missing");
        refused(&VolumeCapability { access_type: None, ..no_mode }, "access_type is missing");
    }

    #[test]
    fn a_file_system_and_its_flags_are_read_and_no_value_is_shown() {
        let mode = Mode::SingleNodeWriter;
        assert_eq!(
            read(&capability(mount("xfs", &["noatime"]), mode)).unwrap().used_as(),
            Use::FileSystem(FsType::Xfs)
        );
        assert_eq!(read(&capability(AccessType::Block(BlockVolume {}), mode)).unwrap().used_as(), Use::Block);
        refused(&capability(mount("ext4 ", &[]), mode), "not supported");
        let confidential = capability(mount("", &["password=hunter2"]), mode);
        refused(&confidential, "\"password\" is not allowed");
        assert!(!read(&confidential).unwrap_err().message().contains("hunter2"));
    }

    #[test]
    fn secrets_are_refused_and_not_shown() {
        let capability = capability(mount("", &[]), Mode::SingleNodeWriter);
        let nothing = HashMap::new();
        let some = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
        let secrets = some("passphrase", "hunter2");
        for refused in [
            Usage::read(Some(&capability), &nothing, &nothing, &secrets),
            Usage::read(Some(&capability), &nothing, &some(ENCRYPTED_KEY, "true"), &nothing),
        ] {
            let status = refused.unwrap_err();
            assert!(status.message().contains("not supported yet"), "{status}");
            assert!(!status.message().contains("hunter2"));
        }
        let of_class = Usage::read(Some(&capability), &nothing, &some(FS_TYPE_KEY, "xfs"), &nothing).unwrap();
        assert_eq!(of_class.used_as(), Use::FileSystem(FsType::Xfs));
        let usage = Usage::read(Some(&capability), &some(READ_ONLY_KEY, "true"), &nothing, &nothing).unwrap();
        assert!(usage.attach_as.read_only);
        assert_eq!(
            Usage::read(None, &nothing, &nothing, &nothing).unwrap_err().code(),
            Code::InvalidArgument
        );
    }
}
