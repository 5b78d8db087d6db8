//! The fields of a request, checked before anything is done.
//!
//! Owns the rules for names, sizes and identities of the API. Every field that is off is collected, so that a caller is told
//! of all of them at once. Looks at nothing but the request. Called by the service.

use proto::v1;
use tonic::Status;
use uuid::Uuid;

use super::page_token::PageToken;
use crate::catalog::{AttachmentFilter, BackendKind, NewVolume};
use crate::lifecycle::DetachWanted;
use crate::status::{self, InvalidField};

/// Characters of a volume's name at most.
const VOLUME_NAME_CHARS_MAX: usize = 128;
/// Bytes of a node's name at most: the limit that CSI sets for `node_id`.
const NODE_ID_BYTES_MAX: usize = 256;
/// A UUID's text has 36.
const BOOT_ID_BYTES_MAX: usize = 64;
/// Block size where the caller asks for none.
const BLOCK_SIZE_BYTES_DEFAULT: u32 = 4096;
/// Capacity at most: the kernel's and the catalog's offsets are signed 64 bits.
const CAPACITY_BYTES_MAX: u64 = i64::MAX as u64;

/// The rule for names of volumes: 1 to 128 letters, digits, '-', '_' and '.', beginning with a letter or digit.
pub(super) fn is_volume_name(name: &str) -> bool {
    let is_first = |byte: &u8| byte.is_ascii_alphanumeric();
    let is_other = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    name.len() <= VOLUME_NAME_CHARS_MAX
        && name.as_bytes().first().is_some_and(is_first)
        && name.bytes().all(is_other)
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

    fn require(&mut self, holds: bool, field: &'static str, description: impl FnOnce() -> String) {
        if !holds {
            self.invalid.push(InvalidField { field, description: description() });
        }
    }

    pub(super) fn volume_name(&mut self, field: &'static str, name: String) -> String {
        self.require(is_volume_name(&name), field, || {
            format!(
                "must be 1 to {VOLUME_NAME_CHARS_MAX} letters, digits, '-', '_' or '.', beginning with a letter or digit"
            )
        });
        name
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

    pub(super) fn read_only(&mut self, field: &'static str, access_mode: i32) -> bool {
        let mode = v1::AccessMode::try_from(access_mode);
        self.require(mode.is_ok(), field, || format!("unknown access mode {access_mode}"));
        mode == Ok(v1::AccessMode::SingleNodeReaderOnly)
    }

    pub(super) fn page_token(&mut self, field: &'static str, token: &PageToken, text: &str) -> String {
        let after = token.read(text);
        self.require(after.is_some(), field, || "is not a token of this list and server".to_owned());
        after.unwrap_or_default()
    }

    pub(super) fn attachment_filter(&mut self, volume_name: String, node_id: String) -> AttachmentFilter {
        AttachmentFilter {
            volume_name: (!volume_name.is_empty()).then(|| self.volume_name("volume_name", volume_name)),
            node_id: (!node_id.is_empty()).then(|| self.node_id("node_id", node_id)),
        }
    }

    fn attachment_id(&mut self, field: &'static str, text: &str) -> Uuid {
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

/// The volume that CreateVolume asks for.
pub(super) fn new_volume(request: v1::CreateVolumeRequest) -> Result<NewVolume, Status> {
    let mut fields = Fields::default();
    let name = fields.volume_name("name", request.name);
    let block_size_bytes = fields.block_size_bytes(request.block_size_bytes);
    let capacity_bytes = fields.capacity_bytes(request.capacity_bytes, block_size_bytes);
    let backend = v1::Backend::try_from(request.backend);
    fields.require(backend.is_ok(), "backend", || format!("unknown backend {}", request.backend));
    let write_cache = v1::WriteCache::try_from(request.write_cache);
    fields.require(write_cache.is_ok(), "write_cache", || {
        format!("unknown write cache mode {}", request.write_cache)
    });
    fields.finish()?;
    Ok(NewVolume {
        name,
        capacity_bytes,
        block_size_bytes,
        backend: if backend == Ok(v1::Backend::Memory) { BackendKind::Memory } else { BackendKind::File },
        write_cache_on: write_cache != Ok(v1::WriteCache::Off),
    })
}

/// The volume and the size that ResizeVolume asks for.
pub(super) fn resize_wanted(request: v1::ResizeVolumeRequest) -> Result<(String, u64), Status> {
    let mut fields = Fields::default();
    let name = fields.volume_name("name", request.name);
    // The volume's own block size is looked at when the volume is.
    let capacity_bytes = fields.capacity_bytes(request.capacity_bytes, 512);
    fields.finish()?;
    Ok((name, capacity_bytes))
}

/// The volume's name, where it is given, and the attachment that DetachVolume asks for.
pub(super) fn detach_wanted(
    request: v1::DetachVolumeRequest,
) -> Result<(Option<String>, DetachWanted), Status> {
    let mut fields = Fields::default();
    let named = !request.volume_name.is_empty() || !request.attachment_id.is_empty();
    fields.require(named, "attachment_id", || "give the attachment_id, or the volume_name".to_owned());
    let attachment_id = (!request.attachment_id.is_empty())
        .then(|| fields.attachment_id("attachment_id", &request.attachment_id));
    let filter = fields.attachment_filter(request.volume_name, request.node_id);
    fields.finish()?;
    Ok((filter.volume_name, DetachWanted { attachment_id, node_id: filter.node_id }))
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt as _;

    use super::*;

    #[test]
    fn names_follow_the_rule() {
        let longest = "x".repeat(128);
        for good in ["a", "7", "vol-123", "A_b.c-9", &longest] {
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
