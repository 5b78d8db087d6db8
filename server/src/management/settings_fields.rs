//! What users set of a volume, checked: labels, descriptions, limits; and the requests that are about nothing else.
//!
//! Owns the rules for them. Looks at nothing but the request. Called by the service.

use std::collections::{BTreeMap, HashMap};

use prost::Message;
use proto::passphrase::LUKS_HEADER_BYTES;
use proto::{label, v1};
use tonic::Status;
use uuid::Uuid;

use super::fields::{self, Fields};
use crate::catalog::{Content, NewVolume, VolumeLimits, VolumeSettings};
use crate::lifecycle::{AdoptWanted, ContentWanted, LABELS_MAX};

/// Bytes of a description at most.
const DESCRIPTION_BYTES_MAX: usize = 1024;
/// Requests per second at most; more is more than anybody does.
const IOPS_MAX: u64 = 1_000_000_000;
/// Bytes per second at least: a client asks for a megabyte at a time, on several connections, and takes a server for lost that answers
/// nothing for long.
const BANDWIDTH_MIN: u64 = 1 << 20;
/// Bytes per second at most.
const BANDWIDTH_MAX: u64 = 1 << 40;
/// Seconds of unused limit at most.
const BURST_SECONDS_MAX: u32 = 3600;
/// What the volumes of one page may take, in bytes, with their labels, grants and attachments: a caller takes messages of 4 MiB.
const PAGE_BYTES_MAX: usize = 3 << 20;

/// Labels; with `may_be_empty`, of which the value is not there.
pub(super) fn labels(
    fields: &mut Fields,
    labels: HashMap<String, String>,
    may_be_empty: bool,
) -> BTreeMap<String, String> {
    for (key, value) in &labels {
        fields
            .require(label::is_key(key), "labels", || format!("the key {key:?} must be {}", label::KEY_RULE));
        let is_value = label::is_value(value) || (may_be_empty && value.is_empty());
        fields.require(is_value, "labels", || {
            format!("the value {value:?} of {key:?} must be {}", label::VALUE_RULE)
        });
    }
    labels.into_iter().collect()
}

/// The labels of a new volume.
pub(super) fn new_labels(fields: &mut Fields, wanted: HashMap<String, String>) -> BTreeMap<String, String> {
    let labels = labels(fields, wanted, false);
    fields.require(labels.len() <= LABELS_MAX, "labels", || format!("must be at most {LABELS_MAX}"));
    labels
}

pub(super) fn description(fields: &mut Fields, description: String) -> String {
    let holds = description.len() <= DESCRIPTION_BYTES_MAX
        && !description.chars().any(|c| c.is_control() && c != '\n');
    fields.require(holds, "description", || {
        format!("must be at most {DESCRIPTION_BYTES_MAX} bytes, without control characters but line feeds")
    });
    description
}

/// The volume that CreateVolume asks for: nobody has written to it.
pub(super) fn new_volume(mut request: v1::CreateVolumeRequest) -> Result<NewVolume, Status> {
    let mut fields = Fields::default();
    let settings = new_settings(&mut fields, &mut request, Content::NeverWritten);
    fields::new_volume(fields, settings, request)
}

/// The volume that CreateVolume asks for with something to adopt, which may be full of data.
pub(super) fn adopt_wanted(mut request: v1::CreateVolumeRequest) -> Result<AdoptWanted, Status> {
    let mut fields = Fields::default();
    let settings = new_settings(&mut fields, &mut request, Content::Written);
    fields::adopt_wanted(fields, settings, request)
}

fn new_settings(
    fields: &mut Fields,
    request: &mut v1::CreateVolumeRequest,
    content: Content,
) -> VolumeSettings {
    VolumeSettings {
        labels: new_labels(fields, std::mem::take(&mut request.labels)),
        description: description(fields, std::mem::take(&mut request.description)),
        is_protected: request.is_protected,
        is_read_only: false,
        is_shared: request.is_shared,
        is_encrypted: is_encrypted(fields, request),
        content,
        limits: limits(fields, &request.limits.unwrap_or_default()),
    }
}

/// Whether what is made is to be encrypted; how large it is was not looked at yet.
fn is_encrypted(fields: &mut Fields, request: &v1::CreateVolumeRequest) -> bool {
    let wanted = request.is_encrypted;
    let is_adopted = !request.adopt_path.is_empty();
    fields.require(!wanted || !request.is_shared, "is_encrypted", || {
        "a volume that several nodes write to at once cannot be encrypted".to_owned()
    });
    fields.require(!wanted || !is_adopted, "is_encrypted", || {
        "what is adopted is served as it is: it cannot be encrypted".to_owned()
    });
    fields.require(
        !wanted || is_adopted || request.capacity_bytes > LUKS_HEADER_BYTES,
        "capacity_bytes",
        || {
            format!(
                "an encrypted volume's first {LUKS_HEADER_BYTES} bytes are its header: must be more than that"
            )
        },
    );
    wanted
}

/// The limits as they are kept.
pub(super) fn limits(fields: &mut Fields, wanted: &v1::VolumeLimits) -> VolumeLimits {
    for iops in [wanted.read_iops, wanted.write_iops] {
        fields.require(iops <= IOPS_MAX, "limits", || {
            format!("{iops} requests per second: must be at most {IOPS_MAX}; 0 is no limit")
        });
    }
    for bytes in [wanted.read_bytes_per_second, wanted.write_bytes_per_second] {
        let holds = bytes == 0 || (BANDWIDTH_MIN..=BANDWIDTH_MAX).contains(&bytes);
        fields.require(holds, "limits", || {
            format!("{bytes} bytes per second: must be {BANDWIDTH_MIN} to {BANDWIDTH_MAX}; 0 is no limit")
        });
    }
    fields.require(wanted.burst_seconds <= BURST_SECONDS_MAX, "limits", || {
        format!("burst_seconds must be at most {BURST_SECONDS_MAX}")
    });
    VolumeLimits {
        read_iops: wanted.read_iops,
        write_iops: wanted.write_iops,
        read_bytes_per_second: wanted.read_bytes_per_second,
        write_bytes_per_second: wanted.write_bytes_per_second,
        burst_seconds: wanted.burst_seconds,
    }
}

/// The labels that listed volumes have.
pub(super) fn label_filter(fields: &mut Fields, wanted: HashMap<String, String>) -> BTreeMap<String, String> {
    labels(fields, wanted, true)
}

/// The messages of the first `limit` that were found, as far as they fit into one answer; of any the first.
pub(super) fn fit_on_page<T, M: Message, E>(
    found: &[T],
    limit: u32,
    mut message: impl FnMut(&T) -> Result<M, E>,
) -> Result<Vec<M>, E> {
    let (mut page, mut bytes) = (Vec::new(), 0);
    for one in found.iter().take(limit as usize) {
        let one = message(one)?;
        bytes += one.encoded_len();
        if bytes > PAGE_BYTES_MAX && !page.is_empty() {
            break;
        }
        page.push(one);
    }
    Ok(page)
}

/// The volume, and the limits that SetVolumeLimits wants of it.
pub(super) fn limits_wanted(request: v1::SetVolumeLimitsRequest) -> Result<(String, VolumeLimits), Status> {
    let mut fields = Fields::default();
    let name = fields.volume("name", request.name);
    let limits = limits(&mut fields, &request.limits.unwrap_or_default());
    fields.finish()?;
    Ok((name, limits))
}

/// The volume, the attachment that speaks, and what SetVolumeContent wants; `None`: to know what there is.
pub(super) fn content_wanted(
    request: v1::SetVolumeContentRequest,
) -> Result<(String, Uuid, Option<ContentWanted>), Status> {
    let mut fields = Fields::default();
    let (content, is_question) = (request.content(), request.content == 0);
    let name = fields.volume("name", request.name);
    let attachment_id = fields.attachment_id("attachment_id", &request.attachment_id);
    let wanted = match content {
        v1::VolumeContent::Initialising => Some(ContentWanted::Initialising),
        v1::VolumeContent::Written => Some(ContentWanted::Written),
        v1::VolumeContent::Unspecified | v1::VolumeContent::NeverWritten => None,
    };
    // A number that this version does not know is no question.
    fields.require(is_question || wanted.is_some(), "content", || {
        "must be INITIALISING or WRITTEN, or nothing to learn what it is".to_owned()
    });
    fields.finish()?;
    Ok((name, attachment_id, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_as_kubernetes_has_them() {
        let with = |value: &str, may_be_empty| {
            let mut fields = Fields::default();
            labels(&mut fields, HashMap::from([("k".to_owned(), value.to_owned())]), may_be_empty);
            fields.finish().is_ok()
        };
        assert!(with("v1.2", false) && with("", true));
        assert!(!with("", false) && !with("a/b", true) && !with("-", true));
    }

    #[test]
    fn limits_are_none_or_in_their_range() {
        let check = |wanted: v1::VolumeLimits| {
            let mut fields = Fields::default();
            limits(&mut fields, &wanted);
            fields.finish().is_ok()
        };
        assert!(check(v1::VolumeLimits::default()));
        assert!(check(v1::VolumeLimits {
            read_iops: 1,
            write_bytes_per_second: 1 << 20,
            ..Default::default()
        }));
        assert!(!check(v1::VolumeLimits { read_bytes_per_second: 1000, ..Default::default() }));
        assert!(!check(v1::VolumeLimits { write_iops: u64::MAX, ..Default::default() }));
        assert!(!check(v1::VolumeLimits { burst_seconds: 3601, ..Default::default() }));
    }

    #[test]
    fn what_a_volume_may_be_told_to_contain_is_known_and_only_nothing_is_a_question() {
        let wanted = |content: i32| {
            let attachment_id = Uuid::from_u128(7).to_string();
            let name = "vol-1".to_owned();
            content_wanted(v1::SetVolumeContentRequest { name, attachment_id, content })
                .map(|(_, _, wanted)| wanted)
                .map_err(|refused| refused.code())
        };
        assert_eq!(wanted(0), Ok(None));
        assert_eq!(wanted(v1::VolumeContent::Written.into()), Ok(Some(ContentWanted::Written)));
        for refused in [v1::VolumeContent::NeverWritten.into(), 99, -1] {
            assert_eq!(wanted(refused), Err(tonic::Code::InvalidArgument), "{refused}");
        }
    }

    #[test]
    fn a_page_has_what_fits_with_all_that_belongs_to_it() {
        let page = |grants: &[usize], limit| -> Vec<usize> {
            let message = |count: &usize| {
                let grant = v1::Grant { node_id: "n".repeat(256), ..Default::default() };
                Ok::<_, std::convert::Infallible>(v1::Volume {
                    grants: vec![grant; *count],
                    ..Default::default()
                })
            };
            let page = fit_on_page(grants, limit, message).unwrap();
            let bytes: usize = page.iter().map(Message::encoded_len).sum();
            assert!(page.len() == 1 || bytes < 4 << 20, "{bytes}");
            page.iter().map(|volume| volume.grants.len()).collect()
        };
        assert_eq!(page(&[1, 2, 3], 2), [1, 2]);
        assert_eq!(page(&[5000, 5000, 5000], 9), [5000, 5000]);
        assert_eq!(page(&[50_000, 1], 9), [50_000], "one at least, or no list would go on");
        assert_eq!(page(&[], 9), [0; 0]);
    }

    #[test]
    fn a_description_is_a_kilobyte_of_text() {
        let check = |text: String| {
            let mut fields = Fields::default();
            description(&mut fields, text);
            fields.finish().is_ok()
        };
        assert!(check("x".repeat(1024)) && check("zwei\nZeilen".to_owned()));
        assert!(!check("x".repeat(1025)) && !check("\u{1b}[31m".to_owned()));
    }
}
