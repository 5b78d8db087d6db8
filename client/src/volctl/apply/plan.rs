//! What has to be done so that a volume is as it is declared.
//!
//! Owns the decision: declared × there → steps in their order, or everything that cannot be changed. Asks nobody and changes nothing.
//!
//! | declared | there | then |
//! | --- | --- | --- |
//! | anything | no volume | made, or cloned; what only a volume that is there can be told follows |
//! | nothing, or the same | the volume | nothing |
//! | a larger size | the volume, in a file or in LVM | it grows |
//! | other limits, labels, description, protection, read-only | the volume | they are set |
//! | a smaller size; another block size, backend, write cache, sharing, path or source | the volume | a conflict |
//! | a larger size | the volume, in memory or adopted | a conflict |
//! | a source that is gone | the volume, a clone | nothing: of what, nobody can tell any more |
//! | a source that is gone | no volume | a conflict |

use clap::ValueEnum;
use proto::v1;
use serde_json::Value;

use super::change::Change;
use super::declared::{Declared, Limits};
use crate::cli::{Backend, Switch};
use crate::exit_code::ExitCode;
use crate::report::{backend_word, disk_bytes, header_bytes, write_cache_word};
use crate::settings::LimitArgs;
use crate::size::exact_size;
use crate::snapshots::Named;
use crate::volumes::new_volume;

/// One call to the server, and what it makes of the volume.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Step {
    pub(super) action: Action,
    /// At least one.
    pub(super) changes: Vec<Change>,
}

/// What a call asks for. The volume is not named in those about one that is there: whoever makes the call knows its uid.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Action {
    Create(v1::CreateVolumeRequest),
    Clone(v1::CloneVolumeRequest),
    /// To so many bytes, with a header where it has one.
    Resize(u64),
    /// To these, and for the rest to what there is by then: the server's call sets all of them.
    Limit(Limits),
    Set(v1::UpdateVolumeRequest),
}

/// What a declared volume is to be a clone of.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) named: Named,
    pub(super) found: Found,
    /// Its clone is encrypted as well.
    pub(super) is_encrypted: bool,
}

/// What there is of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    There {
        uid: String,
        /// Without a header.
        capacity_bytes: u64,
    },
    /// Not yet: the file declares it before.
    ToBeMade,
    Gone,
}

/// Why a volume cannot become what is declared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Conflict {
    pub(super) exit_code: ExitCode,
    pub(super) what: String,
}

/// The steps from what is there to what is declared; none where that is the same.
///
/// # Errors
/// Everything that cannot be changed.
pub(super) fn plan(
    declared: &Declared,
    there: Option<&v1::Volume>,
    source: Option<&Source>,
) -> Result<Vec<Step>, Vec<Conflict>> {
    match there {
        None => made(declared, source).map_err(|conflict| vec![conflict]),
        Some(there) => {
            let conflicts = conflicts(declared, there, source);
            if conflicts.is_empty() { Ok(changed(declared, there)) } else { Err(conflicts) }
        }
    }
}

/// Of a volume that is not there.
fn made(declared: &Declared, source: Option<&Source>) -> Result<Vec<Step>, Conflict> {
    let conflict = |exit_code, why: String| {
        let what = format!("volume {} is not there, and {why}", declared.name);
        Conflict { exit_code, what }
    };
    let (step, made) = match source {
        None if declared.size.is_none() && declared.adopt.is_none() => {
            return Err(conflict(ExitCode::Usage, "no size is declared to make it with".to_owned()));
        }
        None => created(declared),
        Some(source) => {
            let from = declared.source.as_deref().unwrap_or_default();
            match source.found {
                Found::Gone => {
                    return Err(conflict(ExitCode::NotFound, format!("neither is its source {from}")));
                }
                Found::There { capacity_bytes, .. }
                    if declared.size.is_some_and(|size| size < capacity_bytes) =>
                {
                    let (wanted, has) =
                        (exact_size(declared.size.unwrap_or_default()), exact_size(capacity_bytes));
                    let why =
                        format!("its source {from} has {has}, which is more than the declared {wanted}");
                    return Err(conflict(ExitCode::Usage, why));
                }
                _ => cloned(declared, source),
            }
        }
    };
    let mut steps = vec![step];
    steps.extend(changed(declared, &made));
    Ok(steps)
}

/// The labels that a new volume gets.
fn new_labels(declared: &Declared) -> Vec<(String, String)> {
    let labels = declared.labels.iter();
    labels.filter_map(|(key, value)| Some((key.clone(), value.clone()?))).collect()
}

fn label_changes(labels: &[(String, String)]) -> impl Iterator<Item = Change> {
    labels.iter().map(|(key, value)| Change::label(key, None, Some(value)).of_new())
}

/// The step that makes a volume, and the volume that it makes.
fn created(declared: &Declared) -> (Step, v1::Volume) {
    let limits = LimitArgs::from(declared.limits).applied_to(v1::VolumeLimits::default());
    let is_encrypted = declared.encrypted.unwrap_or_default();
    let request = v1::CreateVolumeRequest {
        labels: new_labels(declared).into_iter().collect(),
        description: declared.description.clone().unwrap_or_default(),
        is_protected: declared.protected.unwrap_or_default(),
        is_shared: declared.shared.unwrap_or_default(),
        is_encrypted,
        limits: Some(limits),
        ..new_volume(
            declared.name.clone(),
            declared.size.map(|size| size.saturating_add(header_bytes(is_encrypted))),
            declared.block_size,
            declared.backend.unwrap_or(Backend::File),
            declared.adopt.clone(),
            declared.write_cache.unwrap_or(Switch::On),
        )
    };
    let mut changes = match &declared.adopt {
        Some(path) => vec![Change::word("adopted_path", "adopted path", "", path)],
        None => vec![
            Change::size(0, declared.size.unwrap_or_default()),
            Change::word("backend", "backend", "", backend_word(request.backend())),
        ],
    };
    if request.block_size_bytes != 0 {
        changes.push(Change::number("block_size_bytes", "block size", 0, request.block_size_bytes.into()));
    }
    changes.push(Change::word("write_cache", "write cache", "", write_cache_word(request.write_cache())));
    changes.extend(label_changes(&new_labels(declared)));
    if !request.description.is_empty() {
        changes.push(Change::description("", &request.description));
    }
    for (field, word, is_set) in [
        ("is_protected", "protected", request.is_protected),
        ("is_shared", "shared", request.is_shared),
        ("is_encrypted", "encrypted", request.is_encrypted),
    ] {
        changes.extend(is_set.then(|| Change::flag(field, word, false, true)));
    }
    changes.extend(Change::limits(&v1::VolumeLimits::default(), &limits));
    let made = v1::Volume {
        capacity_bytes: request.capacity_bytes,
        is_encrypted: request.is_encrypted,
        labels: request.labels.clone(),
        description: request.description.clone(),
        is_protected: request.is_protected,
        limits: request.limits,
        ..Default::default()
    };
    (
        Step { action: Action::Create(request), changes: changes.into_iter().map(Change::of_new).collect() },
        made,
    )
}

/// The step that clones, and the volume that it makes.
fn cloned(declared: &Declared, source: &Source) -> (Step, v1::Volume) {
    let labels = new_labels(declared);
    let Named { volume_name, name: snapshot_name, snapshot_uid } = source.by_uid();
    let request = v1::CloneVolumeRequest {
        name: declared.name.clone(),
        source_volume_name: volume_name,
        source_snapshot_name: snapshot_name,
        source_snapshot_uid: snapshot_uid,
        // 0 is the source's.
        capacity_bytes: declared
            .size
            .map_or(0, |size| size.saturating_add(header_bytes(source.is_encrypted))),
        labels: labels.iter().cloned().collect(),
        description: declared.description.clone().unwrap_or_default(),
        ..Default::default()
    };
    let is_encrypted = source.is_encrypted;
    let source = declared.source.as_deref().unwrap_or_default();
    let mut changes = vec![Change::word("source", "source", "", source).of_new()];
    changes.extend(declared.size.map(|size| Change::size(0, size).of_new()));
    changes.extend(label_changes(&labels));
    if !request.description.is_empty() {
        changes.push(Change::description("", &request.description).of_new());
    }
    let made = v1::Volume {
        capacity_bytes: request.capacity_bytes,
        is_encrypted,
        labels: request.labels.clone(),
        description: request.description.clone(),
        ..Default::default()
    };
    (Step { action: Action::Clone(request), changes }, made)
}

/// Of a volume that is there, and can become what is declared.
fn changed(declared: &Declared, there: &v1::Volume) -> Vec<Step> {
    let mut steps = Vec::new();
    if let Some(size) = declared.size.filter(|size| *size != disk_bytes(there)) {
        let changes = vec![Change::size(disk_bytes(there), size)];
        let whole = size.saturating_add(header_bytes(there.is_encrypted));
        steps.push(Step { action: Action::Resize(whole), changes });
    }
    let limits_there = there.limits.unwrap_or_default();
    let limits = LimitArgs::from(declared.limits).applied_to(limits_there);
    if limits != limits_there {
        let changes = Change::limits(&limits_there, &limits);
        steps.push(Step { action: Action::Limit(declared.limits), changes });
    }
    let (mut update, mut changes) = (v1::UpdateVolumeRequest::default(), Vec::new());
    for (key, value) in &declared.labels {
        let found = there.labels.get(key);
        if found != value.as_ref() {
            // An empty value takes it away.
            update.labels.insert(key.clone(), value.clone().unwrap_or_default());
            changes.push(Change::label(key, found.map(String::as_str), value.as_deref()));
        }
    }
    if let Some(text) = declared.description.as_ref().filter(|text| **text != there.description) {
        update.description = Some(text.clone());
        changes.push(Change::description(&there.description, text));
    }
    let differs = |wanted: Option<bool>, is: bool| wanted.filter(|wanted| *wanted != is);
    update.is_protected = differs(declared.protected, there.is_protected);
    update.is_read_only = differs(declared.read_only, there.is_read_only);
    for (field, word, wanted) in [
        ("is_protected", "protected", update.is_protected),
        ("is_read_only", "read-only", update.is_read_only),
    ] {
        changes.extend(wanted.map(|wanted| Change::flag(field, word, !wanted, wanted)));
    }
    if !changes.is_empty() {
        steps.push(Step { action: Action::Set(update), changes });
    }
    steps
}

/// What of a volume that is there cannot become what is declared.
fn conflicts(declared: &Declared, there: &v1::Volume, source: Option<&Source>) -> Vec<Conflict> {
    let mut found = Vec::new();
    let mut conflict = |property: &str, is: &str, wanted: &str, why: &str| {
        let what = format!("volume {}: its {property} is {is}, and {wanted} is declared{why}", declared.name);
        found.push(Conflict { exit_code: ExitCode::AlreadyExists, what });
    };
    let there_bytes = disk_bytes(there);
    if let Some(size) = declared.size.filter(|size| *size != there_bytes) {
        let why = match there.backend() {
            v1::Backend::Memory => Some(", but a volume in memory keeps its size"),
            v1::Backend::Device => Some(", but it is that of what it adopted"),
            _ if size < there_bytes => Some(", but no volume gets smaller"),
            _ => None,
        };
        if let Some(why) = why {
            conflict("size", &exact_size(there_bytes), &exact_size(size), why);
        }
    }
    if let Some(bytes) = declared.block_size.filter(|bytes| *bytes != there.block_size_bytes) {
        conflict("block size", &there.block_size_bytes.to_string(), &bytes.to_string(), "");
    }
    let words = [
        ("backend", declared.backend.as_ref().map(word_of), backend_word(there.backend())),
        ("write cache", declared.write_cache.as_ref().map(word_of), write_cache_word(there.write_cache())),
        (
            "number of writers",
            declared.shared.map(|shared| writers(shared).to_owned()),
            writers(there.is_shared),
        ),
        ("encryption", declared.encrypted.map(|on| on_or_off(on).to_owned()), on_or_off(there.is_encrypted)),
    ];
    for (property, wanted, is) in words {
        if let Some(wanted) = wanted.filter(|wanted| wanted != is) {
            conflict(property, is, &wanted, "");
        }
    }
    let or_none = |text: &str| if text.is_empty() { "none".to_owned() } else { text.to_owned() };
    if let Some(path) = declared.adopt.as_ref().filter(|path| **path != there.adopted_path) {
        conflict("adopted path", &or_none(&there.adopted_path), path, "");
    }
    if let Some(source) = source {
        let from = declared.source.as_deref().unwrap_or_default();
        let wanted = match &source.found {
            Found::There { uid, .. } if *uid == there.source_uid => None,
            Found::There { uid, .. } => Some(format!("{from} (uid {uid})")),
            Found::Gone if !there.source_uid.is_empty() => None,
            Found::Gone => Some(format!("{from}, which is not there")),
            Found::ToBeMade => Some(format!("{from}, which is not there yet")),
        };
        if let Some(wanted) = wanted {
            conflict("source", &or_none(&there.source_uid), &wanted, "");
        }
    }
    found
}

/// The word for it on the command line.
fn word_of(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |word| word.get_name().to_owned())
}

fn on_or_off(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}

fn writers(is_shared: bool) -> &'static str {
    if is_shared { "several" } else { "one" }
}

impl Action {
    /// `create`, `clone`, `resize`, `limit` or `set`: the command that does the same.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Clone(_) => "clone",
            Self::Resize(_) => "resize",
            Self::Limit(_) => "limit",
            Self::Set(_) => "set",
        }
    }
}

impl Source {
    /// What a clone is asked for of: what is there by its uid, since another may get its name before the clone is made.
    fn by_uid(&self) -> Named {
        let is_volume = self.named.name.is_empty() && self.named.snapshot_uid.is_empty();
        match &self.found {
            Found::There { uid, .. } if is_volume => {
                Named { volume_name: format!("uid:{uid}"), ..Named::default() }
            }
            Found::There { uid, .. } => Named { snapshot_uid: uid.clone(), ..Named::default() },
            Found::ToBeMade | Found::Gone => self.named.clone(),
        }
    }
}

impl Step {
    /// What it does, a line for each change; without the line feeds. `is_done`: or else it would be.
    pub(super) fn lines(&self, name: &str, is_done: bool) -> Vec<String> {
        let verb = match self.action {
            Action::Create(_) => "created",
            Action::Clone(_) => "cloned",
            _ => "changed",
        };
        let begin = format!("volume {name} {}{verb}", if is_done { "" } else { "would be " });
        let told: Vec<String> = self.changes.iter().map(Change::text).collect();
        match self.action {
            Action::Create(_) | Action::Clone(_) => vec![format!("{begin}: {}", told.join(", "))],
            _ => told.into_iter().map(|change| format!("{begin}: {change}")).collect(),
        }
    }

    /// The changes, for programs.
    pub(super) fn changes_json(&self) -> Value {
        self.changes.iter().map(Change::json).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::declared;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn there() -> v1::Volume {
        v1::Volume {
            name: "db".to_owned(),
            volume_uid: "u".to_owned(),
            capacity_bytes: 2 * GIB,
            block_size_bytes: 4096,
            backend: v1::Backend::File.into(),
            write_cache: v1::WriteCache::On.into(),
            labels: [("app".to_owned(), "shop".to_owned()), ("of".to_owned(), "others".to_owned())].into(),
            description: "orders".to_owned(),
            limits: Some(v1::VolumeLimits { read_iops: 100, burst_seconds: 2, ..Default::default() }),
            ..Default::default()
        }
    }

    fn source(found: Found) -> Source {
        Source {
            named: Named { volume_name: "golden".into(), name: "v1".into(), ..Named::default() },
            found,
            is_encrypted: false,
        }
    }

    fn found(uid: &str) -> Found {
        Found::There { uid: uid.to_owned(), capacity_bytes: 2 * GIB }
    }

    fn planned(
        keys: &str,
        there: Option<&v1::Volume>,
        found: Option<Found>,
    ) -> Result<Vec<Step>, Vec<Conflict>> {
        let declared = declared::read(&format!("{{name: db, {keys}}}")).unwrap().remove(0);
        plan(&declared, there, found.map(source).as_ref())
    }

    /// What is to be done with [`there`], in words.
    fn lines(keys: &str) -> Vec<String> {
        let steps = planned(keys, Some(&there()), None).unwrap();
        steps.iter().flat_map(|step| step.lines("db", true)).collect()
    }

    fn refused(keys: &str, there: Option<&v1::Volume>, found: Option<Found>) -> (ExitCode, String) {
        let conflicts = planned(keys, there, found).unwrap_err();
        let told: Vec<&str> = conflicts.iter().map(|conflict| conflict.what.as_str()).collect();
        (conflicts[0].exit_code, told.join("; "))
    }

    #[test]
    fn what_is_the_same_or_not_declared_is_left_alone() {
        for same in [
            "",
            "size: 2G",
            "block_size: 4096, backend: file, write_cache: on, shared: false",
            "labels: {app: shop, none: ~}",
            "description: orders, protected: false, read_only: false",
            "limits: {read_iops: 100, write_iops: none, burst: 2}",
        ] {
            assert_eq!(planned(same, Some(&there()), None), Ok(Vec::new()), "{same}");
        }
        let clone = v1::Volume { source_uid: "s".to_owned(), ..there() };
        assert_eq!(planned("source: golden@v1", Some(&clone), Some(found("s"))), Ok(Vec::new()));
        assert_eq!(planned("source: golden@v1", Some(&clone), Some(Found::Gone)), Ok(Vec::new()));
        let adopted = v1::Volume {
            backend: v1::Backend::Device.into(),
            adopted_path: "/dev/sdb".to_owned(),
            ..there()
        };
        assert_eq!(planned("adopt: /dev/sdb", Some(&adopted), None), Ok(Vec::new()));
    }

    #[test]
    fn each_change_is_a_line_with_both_values() {
        for (keys, line) in [
            ("size: 4G", "size from 2G to 4G"),
            ("size: 2147487744", "size from 2G to 2147487744 bytes"),
            ("labels: {app: bar}", "label app from shop to bar"),
            ("labels: {tier: 1}", "label tier from none to 1"),
            ("labels: {app: ~}", "label app from shop to none"),
            ("description: more", "description from \"orders\" to \"more\""),
            ("description: ''", "description from \"orders\" to \"\""),
            ("protected: true", "protected from no to yes"),
            ("read_only: true", "read-only from no to yes"),
            ("limits: {read_iops: none}", "read IOPS from 100 to none"),
            ("limits: {write_iops: 5}", "write IOPS from none to 5"),
            ("limits: {read_bandwidth: 20M}", "read bandwidth from none to 20M/s"),
            ("limits: {write_bandwidth: 1M}", "write bandwidth from none to 1M/s"),
            ("limits: {burst: 0}", "burst from 2 s to 0 s"),
        ] {
            assert_eq!(lines(keys), [format!("volume db changed: {line}")], "{keys}");
        }
    }

    #[test]
    fn a_volume_grows_first_and_is_read_only_last_with_one_call_for_what_goes_together() {
        let keys =
            "size: 4G, labels: {app: ~, tier: 1}, protected: true, read_only: true, limits: {burst: 1}";
        let steps = planned(keys, Some(&there()), None).unwrap();
        let [resize, limit, set] = &steps[..] else { panic!("{steps:?}") };
        assert_eq!(resize.action, Action::Resize(4 * GIB));
        let limits = Limits { burst: Some(1), ..Limits::default() };
        assert_eq!(limit.action, Action::Limit(limits), "what is not declared is not sent");
        let labels = [("app".to_owned(), String::new()), ("tier".to_owned(), "1".to_owned())];
        let update = v1::UpdateVolumeRequest {
            labels: labels.into(),
            is_protected: Some(true),
            is_read_only: Some(true),
            ..Default::default()
        };
        assert_eq!((&set.action, set.changes.len()), (&Action::Set(update), 4));
    }

    #[test]
    fn a_volume_that_is_not_there_is_made_as_declared() {
        let keys = "size: 1G, block_size: 512, backend: memory, write_cache: off, labels: {a: b, c: ~}, protected: true, \
                    read_only: true, shared: true, description: x, limits: {read_iops: 7}";
        let steps = planned(keys, None, None).unwrap();
        let [create, set] = &steps[..] else { panic!("{steps:?}") };
        let request = v1::CreateVolumeRequest {
            name: "db".to_owned(),
            capacity_bytes: GIB,
            block_size_bytes: 512,
            backend: v1::Backend::Memory.into(),
            write_cache: v1::WriteCache::Off.into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            description: "x".to_owned(),
            is_protected: true,
            limits: Some(v1::VolumeLimits { read_iops: 7, ..Default::default() }),
            is_shared: true,
            ..Default::default()
        };
        assert_eq!(create.action, Action::Create(request));
        let told = "volume db would be created: size 1G, backend memory, block size 512, write cache off, label a b, \
                    description \"x\", protected yes, shared yes, read IOPS 7";
        assert_eq!(create.lines("db", false), [told]);
        assert_eq!(set.lines("db", true), ["volume db changed: read-only from no to yes"]);
        assert!(matches!(&set.action, Action::Set(update) if update.is_protected.is_none()));

        let steps = planned("size: 1G", None, None).unwrap();
        let told = "volume db created: size 1G, backend file, block size 4096, write cache on";
        assert_eq!((steps.len(), steps[0].lines("db", true)), (1, vec![told.to_owned()]));
        let json = steps[0].changes_json();
        let size = serde_json::json!({ "field": "capacity_bytes", "from": null, "to": GIB });
        assert_eq!(json[0], size);

        let steps = planned("adopt: /dev/sdb", None, None).unwrap();
        assert_eq!(steps[0].lines("db", true), ["volume db created: adopted path /dev/sdb, write cache on"]);
        let Action::Create(request) = &steps[0].action else { panic!("{steps:?}") };
        assert_eq!((request.backend(), request.block_size_bytes), (v1::Backend::Device, 0));
    }

    #[test]
    fn a_declared_size_is_without_the_header_of_an_encrypted_volume() {
        let whole = |bytes: u64| bytes + (16 << 20);
        let steps = planned("size: 1G, encrypted: true", None, None).unwrap();
        let Action::Create(request) = &steps[0].action else { panic!("{steps:?}") };
        assert!(request.is_encrypted && request.capacity_bytes == whole(GIB) && steps.len() == 1);
        let told = steps[0].lines("db", true);
        assert!(told[0].contains("size 1G") && told[0].ends_with("encrypted yes"), "{told:?}");
        let there = v1::Volume { is_encrypted: true, capacity_bytes: whole(2 * GIB), ..there() };
        assert_eq!(planned("size: 2G, encrypted: true", Some(&there), None).unwrap(), []);
        let steps = planned("size: 3G", Some(&there), None).unwrap();
        assert_eq!(steps[0].action, Action::Resize(whole(3 * GIB)));
        assert_eq!(steps[0].lines("db", true), ["volume db changed: size from 2G to 3G"]);
        assert!(planned("size: 1G", Some(&there), None).is_err(), "smaller");
        let source = Source { is_encrypted: true, ..source(found("u")) };
        let clone = declared::read("{name: c, source: golden@v1, size: 3G}").unwrap().remove(0);
        let steps = plan(&clone, None, Some(&source)).unwrap();
        assert!(
            matches!(&steps[..], [Step { action: Action::Clone(request), .. }] if request.capacity_bytes == whole(3 * GIB))
        );
    }

    #[test]
    fn a_clone_is_made_and_then_set_as_declared() {
        let keys = "source: golden@v1, size: 4G, labels: {a: b}, limits: {read_iops: 7}, protected: true";
        let by_uid = v1::CloneVolumeRequest { source_snapshot_uid: "s".to_owned(), ..Default::default() };
        let by_name = v1::CloneVolumeRequest {
            source_volume_name: "golden".to_owned(),
            source_snapshot_name: "v1".to_owned(),
            ..Default::default()
        };
        for (found, source) in [(found("s"), by_uid), (Found::ToBeMade, by_name)] {
            let steps = planned(keys, None, Some(found)).unwrap();
            let [clone, limit, set] = &steps[..] else { panic!("{steps:?}") };
            let request = v1::CloneVolumeRequest {
                name: "db".to_owned(),
                capacity_bytes: 4 * GIB,
                labels: [("a".to_owned(), "b".to_owned())].into(),
                ..source
            };
            assert_eq!(clone.action, Action::Clone(request));
            assert_eq!(clone.lines("db", true), ["volume db cloned: source golden@v1, size 4G, label a b"]);
            assert_eq!((limit.action.word(), set.action.word()), ("limit", "set"));
        }
        let steps = planned("source: golden@v1", None, Some(found("s"))).unwrap();
        assert_eq!(steps.len(), 1, "with the source's size: {steps:?}");
        let of_volume = Source {
            named: Named { volume_name: "golden".into(), ..Named::default() },
            found: found("s"),
            is_encrypted: false,
        };
        assert_eq!(of_volume.by_uid().volume_name, "uid:s");
    }

    #[test]
    fn what_cannot_be_changed_is_told_with_both_values() {
        let clone = v1::Volume { source_uid: "s".to_owned(), ..there() };
        let memory = v1::Volume { backend: v1::Backend::Memory.into(), ..there() };
        let device = v1::Volume {
            backend: v1::Backend::Device.into(),
            adopted_path: "/dev/sda".to_owned(),
            is_shared: true,
            ..there()
        };
        for (keys, there, source, told) in [
            ("size: 1G", there(), None, "size is 2G, and 1G is declared, but no volume gets smaller"),
            ("size: 4G", memory.clone(), None, "size is 2G, and 4G is declared, but a volume in memory"),
            (
                "size: 4G",
                device.clone(),
                None,
                "size is 2G, and 4G is declared, but it is that of what it adopted",
            ),
            ("block_size: 512", there(), None, "block size is 4096, and 512 is declared"),
            ("backend: lvm", there(), None, "backend is file, and lvm is declared"),
            ("write_cache: off", there(), None, "write cache is on, and off is declared"),
            ("shared: true", there(), None, "number of writers is one, and several is declared"),
            ("shared: false", device.clone(), None, "number of writers is several, and one is declared"),
            ("encrypted: true", there(), None, "encryption is off, and on is declared"),
            ("adopt: /dev/sdb", device, None, "adopted path is /dev/sda, and /dev/sdb is declared"),
            ("adopt: /dev/sdb", there(), None, "adopted path is none, and /dev/sdb is declared"),
            ("source: g@v", clone.clone(), Some(found("t")), "source is s, and g@v (uid t) is declared"),
            ("source: g@v", there(), Some(found("t")), "source is none, and g@v (uid t) is declared"),
            (
                "source: g@v",
                there(),
                Some(Found::Gone),
                "source is none, and g@v, which is not there is declared",
            ),
            (
                "source: g",
                clone,
                Some(Found::ToBeMade),
                "source is s, and g, which is not there yet is declared",
            ),
        ] {
            let (code, what) = refused(keys, Some(&there), source);
            assert_eq!(code, ExitCode::AlreadyExists);
            assert!(what.starts_with("volume db: its ") && what.contains(told), "{keys}: {what}");
        }
        let (_, all) = refused("size: 1G, block_size: 512, labels: {a: b}", Some(&there()), None);
        assert_eq!(all.matches(" is declared").count(), 2, "{all}");
    }

    #[test]
    fn what_cannot_be_made_is_told() {
        for (keys, source, code, told) in [
            ("protected: true", None, ExitCode::Usage, "no size is declared"),
            ("source: g@v", Some(Found::Gone), ExitCode::NotFound, "neither is its source g@v"),
            (
                "source: g@v, size: 1G",
                Some(found("s")),
                ExitCode::Usage,
                "g@v has 2G, which is more than the declared 1G",
            ),
        ] {
            let (found, what) = refused(keys, None, source);
            assert_eq!(found, code);
            assert!(
                what.starts_with("volume db is not there, and ") && what.contains(told),
                "{keys}: {what}"
            );
        }
    }
}
