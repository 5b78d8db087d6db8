//! One property of a volume that becomes another, in words and for programs.
//!
//! Owns the words. For programs a property has the name of its field in the API (`limits.read_iops`, `labels.KEY`), and its values are
//! bytes and numbers.

use proto::v1;
use serde_json::{Value, json};

use crate::size::exact_size;

/// From what to what.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Change {
    field: String,
    word: String,
    /// `None`: of a volume that is new.
    from: Option<Told>,
    to: Told,
}

/// A value, for people and for programs.
#[derive(Debug, Clone, PartialEq)]
struct Told {
    text: String,
    json: Value,
}

impl Change {
    fn new(field: impl Into<String>, word: impl Into<String>, from: Told, to: Told) -> Self {
        Self { field: field.into(), word: word.into(), from: Some(from), to }
    }

    /// The same of a volume that is new: from nothing.
    pub(super) fn of_new(self) -> Self {
        Self { from: None, ..self }
    }

    /// Of the capacity, in bytes.
    pub(super) fn size(from: u64, to: u64) -> Self {
        let told = |bytes: u64| Told { text: exact_size(bytes), json: bytes.into() };
        Self::new("capacity_bytes", "size", told(from), told(to))
    }

    /// Of what is a number for people as well.
    pub(super) fn number(field: &str, word: &str, from: u64, to: u64) -> Self {
        let told = |number: u64| Told { text: number.to_string(), json: number.into() };
        Self::new(field, word, told(from), told(to))
    }

    /// Of what is a word for people as well.
    pub(super) fn word(field: &str, word: &str, from: &str, to: &str) -> Self {
        let told = |text: &str| Told { text: text.to_owned(), json: text.into() };
        Self::new(field, word, told(from), told(to))
    }

    /// Of what is or is not.
    pub(super) fn flag(field: &str, word: &str, from: bool, to: bool) -> Self {
        let told = |is: bool| Told { text: if is { "yes" } else { "no" }.to_owned(), json: is.into() };
        Self::new(field, word, told(from), told(to))
    }

    /// Of a free text.
    pub(super) fn description(from: &str, to: &str) -> Self {
        let told = |text: &str| Told { text: format!("{text:?}"), json: text.into() };
        Self::new("description", "description", told(from), told(to))
    }

    /// Of one label; `None` is none.
    pub(super) fn label(key: &str, from: Option<&str>, to: Option<&str>) -> Self {
        let told =
            |value: Option<&str>| Told { text: value.unwrap_or("none").to_owned(), json: value.into() };
        Self::new(format!("labels.{key}"), format!("label {key}"), told(from), told(to))
    }

    /// Of each limit that becomes another.
    pub(super) fn limits(from: &v1::VolumeLimits, to: &v1::VolumeLimits) -> Vec<Self> {
        let iops = [
            ("read_iops", "read IOPS", from.read_iops, to.read_iops),
            ("write_iops", "write IOPS", from.write_iops, to.write_iops),
        ];
        let (read, write) = ("read_bytes_per_second", "write_bytes_per_second");
        let bandwidths = [
            (read, "read bandwidth", from.read_bytes_per_second, to.read_bytes_per_second),
            (write, "write bandwidth", from.write_bytes_per_second, to.write_bytes_per_second),
        ];
        let iops = iops.map(|rate| (rate, false)).into_iter();
        let mut changes = Vec::new();
        for ((field, word, from, to), is_bytes) in iops.chain(bandwidths.map(|rate| (rate, true))) {
            let text = |rate: u64| match rate {
                0 => "none".to_owned(),
                bytes if is_bytes => format!("{}/s", exact_size(bytes)),
                number => number.to_string(),
            };
            let told = |rate: u64| Told { text: text(rate), json: rate.into() };
            if from != to {
                changes.push(Self::new(format!("limits.{field}"), word, told(from), told(to)));
            }
        }
        if from.burst_seconds != to.burst_seconds {
            let told = |seconds: u32| Told { text: format!("{seconds} s"), json: seconds.into() };
            let (from, to) = (told(from.burst_seconds), told(to.burst_seconds));
            changes.push(Self::new("limits.burst_seconds", "burst", from, to));
        }
        changes
    }

    /// `size from 2G to 4G`; of a new volume `size 4G`.
    pub(super) fn text(&self) -> String {
        let Self { word, from, to, .. } = self;
        match from {
            Some(from) => format!("{word} from {} to {}", from.text, to.text),
            None => format!("{word} {}", to.text),
        }
    }

    /// Its field, and both values; `from` is null of a new volume.
    pub(super) fn json(&self) -> Value {
        json!({ "field": self.field, "from": self.from.as_ref().map(|from| &from.json), "to": self.to.json })
    }
}
