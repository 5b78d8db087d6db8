//! What kubelet asks for, read once: which volume, used as what, by whom.
//!
//! Owns: the checks that need no look at anything; what is off is named by its field. Never: shows a secret, a value of a context, or more
//! of a text than a message needs. Called by: `service`.

use std::collections::HashMap;
use std::fmt;

use proto::csi::v1::VolumeCapability;
use proto::csi::v1::volume_capability::AccessType;
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::v1::Passphrase;
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
/// In volume_context: whether the volume is encrypted. (`true`, `false`; without it that is not known.)
const ENCRYPTED_KEY: &str = "encrypted";
/// In the secrets of NodeStageVolume: what opens an encrypted volume.
const PASSPHRASE_KEY: &str = "passphrase";

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
    /// The plugin makes a file system where there is none, and says then that there is data.
    pub makes_file_system: bool,
}

/// Reads what opens an encrypted volume. Of all secrets the memory is erased; of the passphrase once it has been used.
///
/// # Errors
/// INVALID_ARGUMENT: the volume is encrypted, and there is no passphrase; or it can be none.
pub fn passphrase(
    is_encrypted: bool,
    mut secrets: HashMap<String, String>,
) -> Result<Option<Passphrase>, Status> {
    let mut passphrase = secrets.remove(PASSPHRASE_KEY).map(String::into_bytes);
    for (_, other) in secrets {
        drop(Passphrase::new(other.into_bytes()));
    }
    // As volctl takes one from a file: both open the volume with the same one.
    if let Some(bytes) = passphrase.as_mut().filter(|bytes| bytes.ends_with(b"\n")) {
        bytes.pop();
    }
    let passphrase = passphrase.map(Passphrase::new).filter(|passphrase| !passphrase.value.is_empty());
    match &passphrase {
        None if is_encrypted => return Err(no_passphrase()),
        None => {}
        Some(passphrase) => passphrase.check().map_err(Status::invalid_argument)?,
    }
    Ok(passphrase)
}

/// What to do where a volume needs a passphrase and none came with the call.
pub fn no_passphrase() -> Status {
    Status::invalid_argument(format!(
        "the volume is encrypted, and no passphrase is in the node-stage secrets: name a Secret with the key {PASSPHRASE_KEY} in the StorageClass, by csi.storage.k8s.io/node-stage-secret-name and csi.storage.k8s.io/node-stage-secret-namespace"
    ))
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
    /// By its class. Of others the node daemon knows.
    pub is_encrypted: bool,
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
    ) -> Result<Self, Status> {
        let off = |what: &str| Status::invalid_argument(what.to_owned());
        let is_encrypted = match volume_context.get(ENCRYPTED_KEY).map(String::as_str) {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => return Err(off("volume_context: encrypted is neither true nor false")),
        };
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
        let makes_file_system = options.is_some();
        let attach_as = AttachAs { read_only, shared, makes_file_system };
        Ok(Self { options, attach_as, is_single, is_encrypted })
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
        Usage::read(Some(capability), &HashMap::new(), &HashMap::new())
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
        assert_eq!(usage.attach_as, AttachAs { read_only: false, shared: true, makes_file_system: false });
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

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_the_context_says_is_used_where_the_capability_says_nothing() {
        let capability = capability(mount("", &[]), Mode::SingleNodeWriter);
        let nothing = HashMap::new();
        let of_class = Usage::read(Some(&capability), &nothing, &map(&[(FS_TYPE_KEY, "xfs")])).unwrap();
        assert_eq!(of_class.used_as(), Use::FileSystem(FsType::Xfs));
        let usage = Usage::read(Some(&capability), &map(&[(READ_ONLY_KEY, "true")]), &nothing).unwrap();
        assert!(usage.attach_as.read_only && usage.attach_as.makes_file_system);
        assert_eq!(Usage::read(None, &nothing, &nothing).unwrap_err().code(), Code::InvalidArgument);
    }

    #[test]
    fn an_encrypted_volume_needs_a_passphrase_and_shows_nothing_of_it() {
        let read = |secrets: &[(&str, &str)]| passphrase(true, map(secrets));
        for none in [&[][..], &[("passphrase", "")], &[("passphrase", "\n")], &[("Passphrase", "hunter2")]] {
            let status = read(none).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            for told in ["node-stage-secret-name", "node-stage-secret-namespace", "key passphrase"] {
                assert!(status.message().contains(told), "{status}");
            }
            assert!(!status.message().contains("hunter2"), "{status}");
        }
        let long = "hunter2".repeat(1000);
        let status = read(&[("passphrase", &long)]).unwrap_err();
        assert!(status.code() == Code::InvalidArgument && !status.message().contains("hunter2"), "{status}");
        // With the line feed of a file, and without it.
        for told in ["hunter2", "hunter2\n"] {
            let read = read(&[("passphrase", told), ("other", "swordfish")]).unwrap().unwrap();
            assert_eq!(read.value, b"hunter2");
            assert!(!format!("{read:?}").contains("hunter2"));
        }
        assert_eq!(read(&[("passphrase", "hunter2\n\n")]).unwrap().unwrap().value, b"hunter2\n");
    }

    #[test]
    fn of_other_volumes_the_node_daemon_says_whether_they_need_one() {
        assert!(passphrase(false, HashMap::new()).unwrap().is_none());
        assert!(passphrase(false, map(&[("passphrase", "hunter2")])).unwrap().is_some());
        let capability = capability(mount("", &[]), Mode::SingleNodeWriter);
        let is_encrypted = |context: &[(&str, &str)]| {
            Usage::read(Some(&capability), &HashMap::new(), &map(context)).map(|usage| usage.is_encrypted)
        };
        assert!(!is_encrypted(&[]).unwrap() && !is_encrypted(&[(ENCRYPTED_KEY, "false")]).unwrap());
        assert!(is_encrypted(&[(ENCRYPTED_KEY, "true")]).unwrap());
        assert_eq!(is_encrypted(&[(ENCRYPTED_KEY, "yes")]).unwrap_err().code(), Code::InvalidArgument);
    }
}
