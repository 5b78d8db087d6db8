//! The fields of a request, checked before anything is done.
//!
//! Owns the rules for names, sizes and identities of the API. Every field that is off is collected, so that a caller is told
//! of all of them at once. Looks at nothing but the request. Called by the service.

use proto::v1;
use proto::volume_name::{
    TENANT_NAME_CHARS_MAX, VOLUME_NAME_CHARS_MAX, is_plain_name, is_tenant_name, is_volume_name,
};
use tonic::Status;
use uuid::Uuid;

use super::named::UID_PREFIX;
use super::page_token::PageToken;
use crate::catalog::{AttachmentFilter, BackendKind, NewVolume, VolumeSettings};
use crate::lifecycle::{AdoptWanted, DetachWanted, SnapshotNamed};
use crate::status::{self, InvalidField};

/// Characters of a snapshot's name at most.
const SNAPSHOT_NAME_CHARS_MAX: usize = 64;
/// Bytes of a node's name at most: the limit that CSI sets for `node_id`.
const NODE_ID_BYTES_MAX: usize = 256;
/// The kernel's `PATH_MAX`.
const ADOPT_PATH_BYTES_MAX: usize = 4096;
/// A UUID's text has 36.
const BOOT_ID_BYTES_MAX: usize = 64;
/// Block size where the caller asks for none.
const BLOCK_SIZE_BYTES_DEFAULT: u32 = 4096;
/// Capacity at most: the kernel's and the catalog's offsets are signed 64 bits.
pub(super) const CAPACITY_BYTES_MAX: u64 = i64::MAX as u64;

/// What can be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Attachable {
    Volume(String),
    Snapshot(SnapshotNamed),
}

/// Whether it can be the name of something that is attached.
pub(super) fn is_attachable(text: &str) -> bool {
    let mut fields = Fields::default();
    fields.attachable("", text.to_owned());
    fields.finish().is_ok()
}

/// Collects what is off while fields are read; [`Fields::finish`] decides. A field that is off is given back as something
/// valid-looking, which nobody uses.
#[derive(Debug, Default)]
pub(super) struct Fields {
    invalid: Vec<InvalidField>,
}

impl Fields {
    /// # Errors
    /// INVALID_ARGUMENT with every field that was off.
    pub(super) fn finish(self) -> Result<(), Status> {
        if self.invalid.is_empty() { Ok(()) } else { Err(status::invalid_fields(self.invalid)) }
    }

    pub(super) fn require(&mut self, holds: bool, field: &'static str, description: impl FnOnce() -> String) {
        if !holds {
            self.invalid.push(InvalidField { field, description: description() });
        }
    }

    pub(super) fn volume_name(&mut self, field: &'static str, name: String) -> String {
        self.require(is_volume_name(&name), field, || {
            format!(
                "must be 1 to {VOLUME_NAME_CHARS_MAX} letters, digits, '-', '_' or '.', beginning with a letter or digit; or TENANT+NAME \
                 of two such names"
            )
        });
        name
    }

    pub(super) fn tenant(&mut self, field: &'static str, name: String) -> String {
        self.require(is_tenant_name(&name), field, || {
            format!(
                "must be 1 to {TENANT_NAME_CHARS_MAX} letters, digits, '-', '_' or '.', beginning with a letter or digit"
            )
        });
        name
    }

    /// A volume that is there: by its name, or as `uid:UUID`, which is given back in the one spelling of UUIDs.
    pub(super) fn volume(&mut self, field: &'static str, asked: String) -> String {
        match asked.strip_prefix(UID_PREFIX) {
            Some(uid) => format!("{UID_PREFIX}{}", self.uuid(field, uid)),
            None => self.volume_name(field, asked),
        }
    }

    pub(super) fn snapshot_name(&mut self, field: &'static str, name: String) -> String {
        self.require(is_plain_name(&name, SNAPSHOT_NAME_CHARS_MAX), field, || {
            format!(
                "must be 1 to {SNAPSHOT_NAME_CHARS_MAX} letters, digits, '-', '_' or '.', beginning with a letter or digit"
            )
        });
        name
    }

    /// A volume; or a snapshot as it is opened, `VOLUME@SNAPSHOT` or `@UID`.
    pub(super) fn attachable(&mut self, field: &'static str, text: String) -> Attachable {
        match text.split_once('@') {
            None => Attachable::Volume(self.volume(field, text)),
            Some(("", uid)) => Attachable::Snapshot(SnapshotNamed::Uid(self.uuid(field, uid))),
            Some((volume_name, name)) => Attachable::Snapshot(SnapshotNamed::Name {
                volume_name: self.volume(field, volume_name.to_owned()),
                name: self.snapshot_name(field, name.to_owned()),
            }),
        }
    }

    pub(super) fn node_id(&mut self, field: &'static str, node_id: String) -> String {
        let holds =
            (1..=NODE_ID_BYTES_MAX).contains(&node_id.len()) && node_id.bytes().all(|b| b.is_ascii_graphic());
        self.require(holds, field, || {
            format!("must be 1 to {NODE_ID_BYTES_MAX} printable ASCII characters without spaces")
        });
        node_id
    }

    pub(super) fn boot_id(&mut self, field: &'static str, boot_id: String) -> String {
        let holds = boot_id.len() <= BOOT_ID_BYTES_MAX && boot_id.bytes().all(|b| b.is_ascii_graphic());
        self.require(holds, field, || {
            format!("must be empty, or at most {BOOT_ID_BYTES_MAX} printable ASCII characters without spaces")
        });
        boot_id
    }

    pub(super) fn access_mode(&mut self, field: &'static str, access_mode: i32) -> v1::AccessMode {
        let mode = v1::AccessMode::try_from(access_mode);
        self.require(mode.is_ok(), field, || format!("unknown access mode {access_mode}"));
        mode.unwrap_or_default()
    }

    pub(super) fn page_token(&mut self, field: &'static str, token: &PageToken, text: &str) -> String {
        let after = token.read(text);
        self.require(after.is_some(), field, || "is not a token of this list and server".to_owned());
        after.unwrap_or_default()
    }

    pub(super) fn attachment_filter(&mut self, volume_name: String, node_id: String) -> AttachmentFilter {
        AttachmentFilter {
            volume_name: (!volume_name.is_empty()).then(|| {
                // In the one spelling that lists have.
                match self.attachable("volume_name", volume_name.clone()) {
                    Attachable::Volume(asked) => asked,
                    Attachable::Snapshot(SnapshotNamed::Uid(uid)) => format!("@{uid}"),
                    Attachable::Snapshot(named @ SnapshotNamed::Name { .. }) => named.to_string(),
                }
            }),
            node_id: (!node_id.is_empty()).then(|| self.node_id("node_id", node_id)),
            ..AttachmentFilter::default()
        }
    }

    pub(super) fn attachment_id(&mut self, field: &'static str, text: &str) -> Uuid {
        self.uuid(field, text)
    }

    pub(super) fn uuid(&mut self, field: &'static str, text: &str) -> Uuid {
        let id = Uuid::try_parse(text);
        self.require(id.is_ok(), field, || "must be a UUID".to_owned());
        id.unwrap_or_default()
    }

    fn block_size_bytes(&mut self, asked: u32) -> u32 {
        self.require(matches!(asked, 0 | 512 | 4096), "block_size_bytes", || {
            format!("must be 512 or 4096 (0 is {BLOCK_SIZE_BYTES_DEFAULT}), not {asked}")
        });
        if asked == 512 { 512 } else { BLOCK_SIZE_BYTES_DEFAULT }
    }

    fn capacity_bytes(&mut self, capacity_bytes: u64, block_size_bytes: u32) -> u64 {
        let field = "capacity_bytes";
        self.require(capacity_bytes > 0, field, || "must be more than zero".to_owned());
        self.require(capacity_bytes <= CAPACITY_BYTES_MAX, field, || {
            format!("must be at most {CAPACITY_BYTES_MAX}")
        });
        self.require(capacity_bytes.is_multiple_of(u64::from(block_size_bytes)), field, || {
            format!("must be a multiple of the block size, {block_size_bytes} bytes")
        });
        capacity_bytes
    }
}

/// The volume that CreateVolume asks for; its settings are looked at already.
pub(super) fn new_volume(
    mut fields: Fields,
    settings: VolumeSettings,
    request: v1::CreateVolumeRequest,
) -> Result<NewVolume, Status> {
    let name = fields.volume_name("name", request.name);
    let block_size_bytes = fields.block_size_bytes(request.block_size_bytes);
    let capacity_bytes = fields.capacity_bytes(request.capacity_bytes, block_size_bytes);
    let backend = v1::Backend::try_from(request.backend);
    fields.require(backend.is_ok(), "backend", || format!("unknown backend {}", request.backend));
    fields.require(backend != Ok(v1::Backend::Device), "adopt_path", || {
        "must be the path of the block device or raw file that the volume is to adopt".to_owned()
    });
    let write_cache = v1::WriteCache::try_from(request.write_cache);
    fields.require(write_cache.is_ok(), "write_cache", || {
        format!("unknown write cache mode {}", request.write_cache)
    });
    fields.finish()?;
    Ok(NewVolume {
        name,
        capacity_bytes,
        block_size_bytes,
        backend: match backend {
            Ok(v1::Backend::Memory) => BackendKind::Memory,
            Ok(v1::Backend::Lvm) => BackendKind::Lvm,
            _ => BackendKind::File,
        },
        write_cache_on: write_cache != Ok(v1::WriteCache::Off),
        settings,
    })
}

/// The volume that CreateVolume asks for with something to adopt; its settings are looked at already.
pub(super) fn adopt_wanted(
    mut fields: Fields,
    settings: VolumeSettings,
    request: v1::CreateVolumeRequest,
) -> Result<AdoptWanted, Status> {
    let (asked, path) = (request.block_size_bytes, request.adopt_path.clone());
    fields.require(path.len() <= ADOPT_PATH_BYTES_MAX && !path.contains('\0'), "adopt_path", || {
        format!("must be a path of at most {ADOPT_PATH_BYTES_MAX} bytes")
    });
    fields.require(request.capacity_bytes == 0, "capacity_bytes", || {
        "must be 0 with adopt_path: the volume has the size of what it adopts".to_owned()
    });
    let backend = v1::Backend::try_from(request.backend);
    fields.require(matches!(backend, Ok(v1::Backend::Unspecified | v1::Backend::Device)), "backend", || {
        "must be DEVICE or unspecified with adopt_path".to_owned()
    });
    // All other fields as of any volume. The size is looked at when the device is.
    let capacity_bytes = u64::from(BLOCK_SIZE_BYTES_DEFAULT);
    let request = v1::CreateVolumeRequest { capacity_bytes, backend: 0, ..request };
    let new = new_volume(fields, settings, request)?;
    let new = NewVolume { capacity_bytes: 0, backend: BackendKind::Device, ..new };
    Ok(AdoptWanted { block_size_bytes: (asked != 0).then_some(new.block_size_bytes), new, path })
}

/// The volume and the size that ResizeVolume asks for.
pub(super) fn resize_wanted(request: v1::ResizeVolumeRequest) -> Result<(String, u64), Status> {
    let mut fields = Fields::default();
    let name = fields.volume("name", request.name);
    // The volume's own block size is looked at when the volume is.
    let capacity_bytes = fields.capacity_bytes(request.capacity_bytes, 512);
    fields.finish()?;
    Ok((name, capacity_bytes))
}

/// The volume or snapshot, where it is given, and the attachment that DetachVolume asks for.
pub(super) fn detach_wanted(
    request: v1::DetachVolumeRequest,
) -> Result<(Option<Attachable>, DetachWanted), Status> {
    let mut fields = Fields::default();
    let named = !request.volume_name.is_empty() || !request.attachment_id.is_empty();
    fields.require(named, "attachment_id", || "give the attachment_id, or the volume_name".to_owned());
    let attachment_id =
        (!request.attachment_id.is_empty()).then(|| fields.uuid("attachment_id", &request.attachment_id));
    let name = request.volume_name;
    let attachable = (!name.is_empty()).then(|| fields.attachable("volume_name", name));
    let node_id = (!request.node_id.is_empty()).then(|| fields.node_id("node_id", request.node_id));
    fields.finish()?;
    Ok((attachable, DetachWanted { attachment_id, node_id }))
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt as _;

    use super::*;

    fn new_volume(request: v1::CreateVolumeRequest) -> Result<NewVolume, Status> {
        super::new_volume(Fields::default(), VolumeSettings::default(), request)
    }

    fn adopt_wanted(request: v1::CreateVolumeRequest) -> Result<AdoptWanted, Status> {
        super::adopt_wanted(Fields::default(), VolumeSettings::default(), request)
    }

    #[test]
    fn names_follow_the_rule() {
        let longest = "x".repeat(128);
        for good in ["a", "7", "vol-123", "A_b.c-9", "acme+db", &longest] {
            assert!(is_volume_name(good), "{good}");
        }
        let too_long = "x".repeat(129);
        for bad in ["", "-a", ".a", "_a", "a/b", "a b", "ä", "a\n", "a\0", &too_long] {
            assert!(!is_volume_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn every_field_that_is_off_is_named() {
        let request = v1::CreateVolumeRequest {
            name: "a/b".to_owned(),
            capacity_bytes: 1000,
            block_size_bytes: 1000,
            backend: 9,
            write_cache: 9,
            ..Default::default()
        };
        let status = new_volume(request).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        let fields: Vec<&str> = violations.iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(fields, ["name", "block_size_bytes", "capacity_bytes", "backend", "write_cache"]);
    }

    #[test]
    fn unspecified_fields_have_the_documented_defaults() {
        let request =
            v1::CreateVolumeRequest { name: "a".to_owned(), capacity_bytes: 4096, ..Default::default() };
        let new = new_volume(request).unwrap();
        assert_eq!((new.block_size_bytes, new.backend, new.write_cache_on), (4096, BackendKind::File, true));
    }

    #[test]
    fn what_is_adopted_brings_its_own_size() {
        let request = v1::CreateVolumeRequest {
            name: "a".to_owned(),
            adopt_path: "/dev/sdb".to_owned(),
            block_size_bytes: 512,
            ..Default::default()
        };
        let wanted = adopt_wanted(request.clone()).unwrap();
        assert_eq!((wanted.path.as_str(), wanted.block_size_bytes), ("/dev/sdb", Some(512)));
        assert_eq!(wanted.new.backend, BackendKind::Device);
        let own = adopt_wanted(v1::CreateVolumeRequest { block_size_bytes: 0, ..request.clone() });
        assert_eq!(own.unwrap().block_size_bytes, None);
        for off in [
            v1::CreateVolumeRequest { capacity_bytes: 4096, ..request.clone() },
            v1::CreateVolumeRequest { backend: v1::Backend::File.into(), ..request.clone() },
            v1::CreateVolumeRequest { name: String::new(), ..request.clone() },
            v1::CreateVolumeRequest { block_size_bytes: 7, ..request.clone() },
        ] {
            assert!(adopt_wanted(off.clone()).is_err(), "{off:?}");
        }
        let nothing = v1::CreateVolumeRequest {
            adopt_path: String::new(),
            capacity_bytes: 4096,
            backend: v1::Backend::Device.into(),
            ..request
        };
        assert!(new_volume(nothing).unwrap_err().message().contains("adopt_path"));
    }

    #[test]
    fn sizes_are_positive_aligned_and_bounded() {
        let check = |capacity_bytes, block_size_bytes| {
            let name = "a".to_owned();
            new_volume(v1::CreateVolumeRequest {
                name,
                capacity_bytes,
                block_size_bytes,
                ..Default::default()
            })
            .is_ok()
        };
        assert!(check(512, 512) && check(4096, 0) && check((i64::MAX as u64 + 1) - 4096, 4096));
        assert!(!check(0, 512) && !check(512, 0) && !check(513, 512) && !check(1 << 63, 4096));
    }

    #[test]
    fn a_detach_names_something() {
        assert!(detach_wanted(v1::DetachVolumeRequest::default()).is_err());
        let by_node = v1::DetachVolumeRequest { node_id: "n".to_owned(), ..Default::default() };
        assert!(detach_wanted(by_node).is_err(), "a node alone names no attachment");
        let by_id = v1::DetachVolumeRequest { attachment_id: "7".to_owned(), ..Default::default() };
        assert!(detach_wanted(by_id).is_err());
    }
}
