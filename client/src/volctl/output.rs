//! In which of its formats a result is printed: for people, or as a value for programs.
//!
//! YAML is the JSON value written in another way. What comes piece by piece (`watch`, `events`) is a line for each piece as JSON, and a
//! document for each as YAML.

use clap::ValueEnum;
use serde_json::Value;

use crate::failure::Failure;

/// How a result is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people
    Table,
    /// For people, with further columns
    Wide,
    /// For programs
    Json,
    /// The same values as JSON has, as YAML
    Yaml,
}

impl OutputFormat {
    /// Whether there are words instead of a value.
    pub(crate) fn is_for_people(self) -> bool {
        matches!(self, Self::Table | Self::Wide)
    }

    /// The word for it on the command line.
    pub(crate) fn word(self) -> String {
        self.to_possible_value().map_or_else(String::new, |word| word.get_name().to_owned())
    }

    /// The whole result, as a value; ends with a line feed.
    pub(crate) fn whole(self, value: &Value) -> Result<String, Failure> {
        if self == Self::Yaml { yaml(value) } else { Ok(format!("{value:#}\n")) }
    }

    /// One of many values that are printed one after another, without the last line feed.
    pub(crate) fn piece(self, value: &Value) -> Result<String, Failure> {
        match self {
            Self::Yaml => Ok(format!("---\n{}", yaml(value)?.trim_end())),
            _ => Ok(value.to_string()),
        }
    }
}

fn yaml(value: &Value) -> Result<String, Failure> {
    yaml_serde::to_string(value).map_err(|error| Failure::other(format!("cannot write YAML: {error}")))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize as _;
    use serde_json::json;

    use super::*;

    /// With words that YAML might take for something else.
    fn value() -> Value {
        let words =
            ["on", "no", "null", "~", "12", "1e3", "0x1f", "a: b", "- a", "", " a", "two\nlines", "#a", "ü"];
        json!({ "words": words, "bytes": u64::MAX, "time": -1, "none": null, "yes": true, "empty": {}, "list": [] })
    }

    #[test]
    fn yaml_is_the_value_that_json_is() {
        let text = OutputFormat::Yaml.whole(&value()).unwrap();
        assert_eq!(yaml_serde::from_str::<Value>(&text).unwrap(), value(), "{text}");
        let text = OutputFormat::Json.whole(&value()).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value());
    }

    #[test]
    fn pieces_are_lines_of_json_or_documents_of_yaml() {
        let pieces = [json!({ "a": 1 }), json!({ "b": [2, 3] })];
        let printed = |output: OutputFormat| -> String {
            pieces.iter().map(|piece| format!("{}\n", output.piece(piece).unwrap())).collect()
        };
        assert_eq!(printed(OutputFormat::Json), "{\"a\":1}\n{\"b\":[2,3]}\n");
        let yaml = printed(OutputFormat::Yaml);
        assert_eq!(yaml, "---\na: 1\n---\nb:\n- 2\n- 3\n");
        let documents = yaml_serde::Deserializer::from_str(&yaml);
        let read: Vec<Value> = documents.map(|document| Value::deserialize(document).unwrap()).collect();
        assert_eq!(read, pieces);
    }
}
