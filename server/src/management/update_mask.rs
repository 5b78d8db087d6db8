//! Which of a volume's properties an update changes, by its mask (AIP-134).
//!
//! Without a mask what is there is changed; with one what it names, to nothing where nothing is there. Pure; used by `volumes.rs`.

use proto::v1;
use tonic::Status;

use super::fields::Fields;
use super::settings_fields::{description, labels, limits, new_labels};
use crate::lifecycle::PropertiesWanted;

/// What may be named; `*` is all of them.
const PATHS: [&str; 11] = [
    "labels",
    "description",
    "is_protected",
    "is_read_only",
    "limits",
    "limits.read_iops",
    "limits.write_iops",
    "limits.read_bytes_per_second",
    "limits.write_bytes_per_second",
    "limits.burst_seconds",
    "*",
];

/// The volume, and what UpdateVolume wants of it.
pub(super) fn properties_wanted(
    mut request: v1::UpdateVolumeRequest,
) -> Result<(String, PropertiesWanted), Status> {
    let mut fields = Fields::default();
    let name = fields.volume("name", std::mem::take(&mut request.name));
    let wanted = wanted(&mut fields, request);
    fields.finish()?;
    Ok((name, wanted))
}

fn wanted(fields: &mut Fields, request: v1::UpdateVolumeRequest) -> PropertiesWanted {
    let paths = request.update_mask.as_ref().map(|mask| mask.paths.clone()).unwrap_or_default();
    if paths.is_empty() { all_there(fields, request) } else { named(fields, &paths, request) }
}

fn all_there(fields: &mut Fields, request: v1::UpdateVolumeRequest) -> PropertiesWanted {
    PropertiesWanted {
        labels: labels(fields, request.labels, true),
        replaces_labels: false,
        description: request.description.map(|text| description(fields, text)),
        is_protected: request.is_protected,
        is_read_only: request.is_read_only,
        limits: request.limits.map(|wanted| limits(fields, &wanted).into()).unwrap_or_default(),
    }
}

fn named(fields: &mut Fields, paths: &[String], request: v1::UpdateVolumeRequest) -> PropertiesWanted {
    let mut wanted = PropertiesWanted::default();
    let has = |path: &str| paths.iter().any(|named| named == path || named == "*");
    if has("labels") {
        wanted.labels = new_labels(fields, request.labels);
        wanted.replaces_labels = true;
    }
    if has("description") {
        wanted.description = Some(description(fields, request.description.unwrap_or_default()));
    }
    if has("is_protected") {
        wanted.is_protected = Some(request.is_protected.unwrap_or_default());
    }
    if has("is_read_only") {
        wanted.is_read_only = Some(request.is_read_only.unwrap_or_default());
    }
    if has("limits") || paths.iter().any(|path| path.starts_with("limits.")) {
        let limits = limits(fields, &request.limits.unwrap_or_default());
        let of = |name: &str| has("limits") || has(name);
        wanted.limits.read_iops = of("limits.read_iops").then_some(limits.read_iops);
        wanted.limits.write_iops = of("limits.write_iops").then_some(limits.write_iops);
        wanted.limits.read_bytes_per_second =
            of("limits.read_bytes_per_second").then_some(limits.read_bytes_per_second);
        wanted.limits.write_bytes_per_second =
            of("limits.write_bytes_per_second").then_some(limits.write_bytes_per_second);
        wanted.limits.burst_seconds = of("limits.burst_seconds").then_some(limits.burst_seconds);
    }
    for unknown in paths.iter().filter(|path| !PATHS.contains(&path.as_str())) {
        fields.require(false, "update_mask", || format!("{unknown:.60?} is none of {}", PATHS.join(", ")));
    }
    wanted
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use super::*;
    use crate::catalog::VolumeLimits;
    use crate::lifecycle::LimitsWanted;

    fn of(paths: &[&str], request: v1::UpdateVolumeRequest) -> Result<PropertiesWanted, tonic::Code> {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        let mut fields = Fields::default();
        let update_mask = Some(prost_types::FieldMask { paths });
        let wanted = wanted(&mut fields, v1::UpdateVolumeRequest { update_mask, ..request });
        fields.finish().map(|()| wanted).map_err(|refused| refused.code())
    }

    fn request() -> v1::UpdateVolumeRequest {
        v1::UpdateVolumeRequest {
            labels: HashMap::from([("a".to_owned(), "b".to_owned())]),
            description: Some("d".to_owned()),
            is_protected: Some(true),
            limits: Some(v1::VolumeLimits { read_iops: 5, write_iops: 6, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn without_a_mask_what_is_there_is_changed() {
        let wanted = of(&[], request()).unwrap();
        assert!(!wanted.replaces_labels && wanted.labels.len() == 1);
        assert_eq!((wanted.description.as_deref(), wanted.is_protected), (Some("d"), Some(true)));
        assert_eq!(wanted.is_read_only, None);
        let limits = VolumeLimits { read_iops: 5, write_iops: 6, ..Default::default() };
        assert_eq!(wanted.limits, limits.into());
        assert_eq!(of(&[], v1::UpdateVolumeRequest::default()), Ok(PropertiesWanted::default()));
    }

    #[test]
    fn with_a_mask_what_it_names_is_changed_and_nothing_else() {
        let wanted = of(&["limits.write_iops"], request()).unwrap();
        let limits = LimitsWanted { write_iops: Some(6), ..Default::default() };
        assert_eq!(wanted, PropertiesWanted { limits, ..Default::default() });
        let wanted = of(&["labels", "is_read_only"], request()).unwrap();
        assert_eq!(wanted.labels, BTreeMap::from([("a".to_owned(), "b".to_owned())]));
        assert_eq!(
            (wanted.replaces_labels, wanted.is_read_only, wanted.is_protected),
            (true, Some(false), None)
        );
        let nothing = of(&["*"], v1::UpdateVolumeRequest::default()).unwrap();
        assert_eq!((nothing.description.as_deref(), nothing.is_protected), (Some(""), Some(false)));
        assert_eq!((nothing.limits, nothing.replaces_labels), (VolumeLimits::default().into(), true));
    }

    #[test]
    fn what_cannot_be_changed_is_no_path() {
        for unknown in ["name", "capacity_bytes", "limits.iops", "", "labels.a", "Labels", " *", "limits.*"] {
            assert_eq!(of(&["labels", unknown], request()), Err(tonic::Code::InvalidArgument), "{unknown}");
        }
        let taken_away = HashMap::from([("a".to_owned(), String::new())]);
        let request = v1::UpdateVolumeRequest { labels: taken_away, ..Default::default() };
        assert_eq!(
            of(&["labels"], request.clone()),
            Err(tonic::Code::InvalidArgument),
            "they are all that it is to have"
        );
        assert!(of(&["description"], request).is_ok(), "what is not named is not looked at");
    }
}
