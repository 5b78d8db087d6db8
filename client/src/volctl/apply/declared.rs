//! Volumes as a file declares them.
//!
//! Owns the file's form: YAML, in which a document is a volume, or a list of volumes. What the form does not have is an error that names
//! it and its line. Looks at nothing but the text.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::marker::PhantomData;

use clap::ValueEnum;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::cli::{Backend, Switch};
use crate::settings::{LimitArgs, parse_bandwidth, parse_rate};
use crate::size::parse_size;

/// A declared volume. `None` and what is missing is not declared: it stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Declared {
    pub(super) name: String,
    #[serde(default, deserialize_with = "size")]
    pub(super) size: Option<u64>,
    #[serde(default)]
    pub(super) block_size: Option<u32>,
    #[serde(default, deserialize_with = "word")]
    pub(super) backend: Option<Backend>,
    /// What it adopts: a path on the server.
    #[serde(default)]
    pub(super) adopt: Option<String>,
    /// What it is a clone of: VOLUME, VOLUME@SNAPSHOT or @UID.
    #[serde(default)]
    pub(super) source: Option<String>,
    #[serde(default, deserialize_with = "word")]
    pub(super) write_cache: Option<Switch>,
    /// By key; `None` is no label.
    #[serde(default, deserialize_with = "labels")]
    pub(super) labels: BTreeMap<String, Option<String>>,
    #[serde(default)]
    pub(super) description: Option<String>,
    #[serde(default)]
    pub(super) protected: Option<bool>,
    #[serde(default)]
    pub(super) read_only: Option<bool>,
    #[serde(default)]
    pub(super) shared: Option<bool>,
    #[serde(default)]
    pub(super) encrypted: Option<bool>,
    #[serde(default, deserialize_with = "limits")]
    pub(super) limits: Limits,
}

/// Declared limits; 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Limits {
    #[serde(default, deserialize_with = "rate")]
    pub(super) read_iops: Option<u64>,
    #[serde(default, deserialize_with = "rate")]
    pub(super) write_iops: Option<u64>,
    /// Bytes per second.
    #[serde(default, deserialize_with = "bandwidth")]
    pub(super) read_bandwidth: Option<u64>,
    /// The same.
    #[serde(default, deserialize_with = "bandwidth")]
    pub(super) write_bandwidth: Option<u64>,
    /// Seconds.
    #[serde(default)]
    pub(super) burst: Option<u32>,
}

impl From<Limits> for LimitArgs {
    fn from(limits: Limits) -> Self {
        let Limits { read_iops, write_iops, read_bandwidth, write_bandwidth, burst } = limits;
        Self { read_iops, write_iops, read_bandwidth, write_bandwidth, burst }
    }
}

impl Declared {
    /// What does not go together, by the rules of `create` and `clone`.
    fn check(self) -> Result<Self, String> {
        let name = &self.name;
        if name.is_empty() || name.starts_with("uid:") {
            return Err(format!("`name: {name}` is no name"));
        }
        let keys = [
            ("size", self.size.is_some()),
            ("block_size", self.block_size.is_some()),
            ("backend", self.backend.is_some()),
            ("adopt", self.adopt.is_some()),
            ("write_cache", self.write_cache.is_some()),
            ("shared", self.shared.is_some()),
            ("encrypted", self.encrypted.is_some()),
        ];
        let (key, excluded, why): (_, &[&str], _) = if self.source.is_some() {
            let excluded = &["block_size", "backend", "adopt", "write_cache", "shared", "encrypted"];
            ("source", excluded, "a clone takes it from its source")
        } else if self.adopt.is_some() {
            ("adopt", &["size", "backend", "encrypted"], "what is adopted has its own")
        } else {
            ("", &[], "")
        };
        match keys.into_iter().find(|(other, is_there)| *is_there && excluded.contains(other)) {
            Some((other, _)) => Err(format!("volume {name} has `{key}` and `{other}`: {why}")),
            None => Ok(self),
        }
    }
}

/// Reads what a file declares, in its order.
///
/// # Errors
/// What is wrong and in which line, for people.
pub(super) fn read(text: &str) -> Result<Vec<Declared>, String> {
    let mut declared: Vec<Declared> = Vec::new();
    for document in yaml_serde::Deserializer::from_str(text) {
        let Document(volumes) = Document::deserialize(document).map_err(|error| with_line(&error))?;
        declared.extend(volumes.into_iter().map(|Entry(volume)| volume));
    }
    for document in yaml_serde::Deserializer::from_str(text) {
        Document::<LabelTexts>::deserialize(document).map_err(|error| with_line(&error))?;
    }
    let mut names = BTreeSet::new();
    match declared.iter().find(|volume| !names.insert(&volume.name)) {
        Some(twice) => Err(format!("volume {} is declared twice", twice.name)),
        None => Ok(declared),
    }
}

/// The error and where it is, which it does not say of the very beginning. Its path begins with a dot for the whole.
fn with_line(error: &yaml_serde::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix('.').unwrap_or(&text);
    match error.location() {
        Some(at) if !text.contains(&format!("line {} ", at.line())) => {
            format!("{text} at line {} column {}", at.line(), at.column())
        }
        _ => text.to_owned(),
    }
}

/// One volume, a list of them, or none.
struct Document<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Document<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DocumentVisitor(PhantomData))
    }
}

struct DocumentVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for DocumentVisitor<T> {
    type Value = Document<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a volume (name: ...), or a list of them")
    }

    fn visit_none<E: Error>(self) -> Result<Document<T>, E> {
        Ok(Document(Vec::new()))
    }

    fn visit_unit<E: Error>(self) -> Result<Document<T>, E> {
        self.visit_none()
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Document<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(|volume| Document(vec![volume]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Document<T>, A::Error> {
        let mut volumes = Vec::new();
        while let Some(volume) = list.next_element()? {
            volumes.push(volume);
        }
        Ok(Document(volumes))
    }
}

/// One volume, checked where its line is known.
struct Entry(Declared);

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a volume (name: ...)")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Entry, A::Error> {
        Declared::deserialize(MapAccessDeserializer::new(map))?.check().map(Entry).map_err(Error::custom)
    }
}

/// A scalar that is written in some way of its own. It is read within the visit, so that an error has its line.
struct Scalar<T, P> {
    parse: P,
    parsed: PhantomData<T>,
}

impl<'de, T, P: Fn(&str) -> Result<T, String>> Visitor<'de> for Scalar<T, P> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a single value")
    }

    fn visit_none<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_unit<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_str(self)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Option<T>, E> {
        (self.parse)(text).map(Some).map_err(|why| E::custom(format_args!("`{text}`: {why}")))
    }
}

/// `None` where the value is empty.
fn scalar<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, D::Error> {
    deserializer.deserialize_option(Scalar { parse, parsed: PhantomData })
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    scalar(deserializer, parse_size)
}

fn rate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    scalar(deserializer, parse_rate)
}

fn bandwidth<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    scalar(deserializer, parse_bandwidth)
}

/// One of an option's words.
fn word<'de, D: Deserializer<'de>, T: ValueEnum>(deserializer: D) -> Result<Option<T>, D::Error> {
    scalar(deserializer, |text| {
        T::from_str(text, false).map_err(|_| {
            let words = T::value_variants().iter().filter_map(ValueEnum::to_possible_value);
            let words: Vec<String> = words.map(|word| word.get_name().to_owned()).collect();
            format!("write one of {}", words.join(", "))
        })
    })
}

fn limits<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Limits, D::Error> {
    Option::<Limits>::deserialize(deserializer).map(Option::unwrap_or_default)
}

fn labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Option<String>>, D::Error> {
    deserializer.deserialize_option(LabelsVisitor)
}

struct LabelsVisitor;

impl<'de> Visitor<'de> for LabelsVisitor {
    type Value = BTreeMap<String, Option<String>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("labels, as KEY: VALUE")
    }

    fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
        Ok(BTreeMap::new())
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        self.visit_none()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut labels = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let LabelValue(value) = map.next_value()?;
            if labels.insert(key.clone(), value).is_some() {
                return Err(Error::custom(format_args!("duplicate label `{key}`")));
            }
        }
        Ok(labels)
    }
}

/// The labels of a volume, with their values as they are written: nothing at all, which a variable that is not set leaves behind, is the
/// same as null to whoever reads an option, and takes no label away.
#[derive(serde::Deserialize)]
struct LabelTexts {
    #[serde(default, rename = "labels")]
    _labels: Option<BTreeMap<String, LabelText>>,
}

struct LabelText;

impl<'de> Deserialize<'de> for LabelText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(LabelText)
    }
}

impl Visitor<'_> for LabelText {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the value of a label")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self, E> {
        if text.is_empty() { Err(E::custom(NO_VALUE)) } else { Ok(self) }
    }
}

const NO_VALUE: &str = "write a value, or ~ to take the label away";

/// Of a label; `None` takes the label away.
struct LabelValue(Option<String>);

impl<'de> Deserialize<'de> for LabelValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = scalar(deserializer, |text| match text {
            "" => Err(NO_VALUE.to_owned()),
            text => Ok(text.to_owned()),
        });
        text.map(LabelValue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Declared {
        let [declared] = <[Declared; 1]>::try_from(read(text).unwrap()).unwrap();
        declared
    }

    #[test]
    fn every_key_is_read_as_its_option_is() {
        let text = "
            name: db
            size: 10G
            block_size: 512
            backend: lvm
            write_cache: off
            labels: { app: shop, tier: 1, old: ~ }
            description: orders
            protected: true
            read_only: false
            shared: false
            encrypted: true
            limits: { read_iops: 500, write_iops: none, read_bandwidth: 100M, write_bandwidth: 0, burst: 3 }
        ";
        let label = |key: &str, value: Option<&str>| (key.to_owned(), value.map(str::to_owned));
        let declared = Declared {
            name: "db".to_owned(),
            size: Some(10 << 30),
            block_size: Some(512),
            backend: Some(Backend::Lvm),
            adopt: None,
            source: None,
            write_cache: Some(Switch::Off),
            labels: [label("app", Some("shop")), label("tier", Some("1")), label("old", None)].into(),
            description: Some("orders".to_owned()),
            protected: Some(true),
            read_only: Some(false),
            shared: Some(false),
            encrypted: Some(true),
            limits: Limits {
                read_iops: Some(500),
                write_iops: Some(0),
                read_bandwidth: Some(100 << 20),
                write_bandwidth: Some(0),
                burst: Some(3),
            },
        };
        assert_eq!(one(text), declared);
        let bytes =
            one("{name: db, size: 4096, backend: ~, description: ~, labels: ~, limits: ~, source: a@b}");
        assert_eq!((bytes.size, bytes.backend, bytes.description), (Some(4096), None, None));
        assert_eq!((bytes.source.as_deref(), bytes.labels.len()), (Some("a@b"), 0));
        assert_eq!(one("{name: d, adopt: /dev/sdb}").adopt.as_deref(), Some("/dev/sdb"));
    }

    #[test]
    fn only_null_takes_a_label_away() {
        let labels = one("{name: a, labels: {w: ~, x: null, y: 'null', z: '~'}}").labels;
        assert_eq!((&labels["w"], &labels["x"]), (&None, &None));
        let quoted = (labels["y"].as_deref(), labels["z"].as_deref());
        assert_eq!(quoted, (Some("null"), Some("~")));
    }

    #[test]
    fn a_document_is_a_volume_or_a_list_or_nothing() {
        let names =
            |text: &str| -> Vec<String> { read(text).unwrap().into_iter().map(|one| one.name).collect() };
        assert_eq!(
            names("name: a\n---\n- name: b\n- name: c\n---\n# nothing\n---\nname: d\n"),
            ["a", "b", "c", "d"]
        );
        assert_eq!(names(""), [""; 0]);
        assert_eq!(names("[]"), [""; 0]);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, what, line) in [
            ("- name: a\n- name: b\n  sizee: 1G\n", "unknown field `sizee`", 3),
            ("name: a\nlimits:\n  read_iops: 5\n  iops: 5\n", "unknown field `iops`", 4),
            ("name: a\n---\nname: b\nblock-size: 512\n", "unknown field `block-size`", 4),
            ("name: a\nsize: 1G\nsize: 2G\n", "duplicate field `size`", 1),
            ("name: a\nlabels:\n  x: 1\n  x: 2\n", "duplicate label `x`", 3),
            ("- name: a\n  size: 2GB\n", "`2GB`: powers of 1000", 2),
            ("name: a\n\nbackend: disk\n", "`disk`: write one of file, memory, lvm", 3),
            ("name: a\nwrite_cache: true\n", "`true`: write one of on, off", 2),
            ("name: a\nprotected: yes\n", "expected a boolean", 2),
            ("name: a\nlimits:\n  read_iops: many\n", "`many`: write a whole number", 3),
            ("name: a\nlabels:\n  x: ''\n", "``: write a value", 3),
            ("name: a\nlabels:\n  w: ~\n  x:\n  y: 1\n", "write a value", 4),
            ("- name: a\n- name: b\n  labels: {x: }\n", "write a value", 3),
            ("- name: a\n- size: 1G\n", "missing field `name`", 2),
            ("- name: a\n- name: b\n  source: a\n  backend: lvm\n", "`source` and `backend`", 2),
            ("name: a\nadopt: /dev/sdb\nsize: 1G\n", "`adopt` and `size`", 1),
            ("name: 'uid:7'\n", "is no name", 1),
            ("- 7\n", "expected a volume", 1),
            ("name: a\n  size: 1G\n", "mapping values are not allowed", 2),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(what) && error.contains(&format!("line {line} ")), "{text}: {error}");
        }
        assert_eq!(read("- name: a\n- name: a\n").unwrap_err(), "volume a is declared twice");
        let told = read("- name: a\n  protected: 1\n").unwrap_err();
        assert!(
            told.starts_with("[0].protected: invalid type: ") && told.ends_with(" at line 2 column 14"),
            "{told}"
        );
        assert!(read("volumes").unwrap_err().contains("expected a volume"));
    }
}
