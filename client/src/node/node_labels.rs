//! Labels of this node, as `volclient serve --label` takes them.
//!
//! Owns: that what the server would refuse is told at the start. Called by: the command line of volclient.

use std::collections::BTreeMap;

use proto::label;

/// Labels that were given in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelList(Vec<(String, String)>);

/// Reads `KEY=VALUE[,KEY=VALUE…]`. Empty pieces are nothing: an environment file may set the variable to nothing, or end it with a
/// comma.
///
/// # Errors
/// Why one of them is no label, for people.
pub fn parse_labels(text: &str) -> Result<LabelList, String> {
    text.split(',')
        .filter(|piece| !piece.is_empty())
        .map(parse_label)
        .collect::<Result<_, _>>()
        .map(LabelList)
}

/// Reads `KEY=VALUE`, by the rules for labels of volumes.
fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE, such as topology.volnode.io/zone=z1")?;
    if !label::is_key(key) {
        return Err(format!("the key {key:?} must be {}", label::KEY_RULE));
    }
    if !label::is_value(value) {
        return Err(format!("the value {value:?} must be {}", label::VALUE_RULE));
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// All labels by their keys.
///
/// # Errors
/// Why they cannot be those of one node, for people.
pub fn labels_of(lists: Vec<LabelList>) -> Result<BTreeMap<String, String>, String> {
    let mut labels = BTreeMap::new();
    for (key, value) in lists.into_iter().flat_map(|list| list.0) {
        match labels.insert(key.clone(), value.clone()) {
            Some(other) if other != value => {
                return Err(format!("{key} cannot be {other} and {value}: give it once"));
            }
            _ => {}
        }
    }
    if labels.len() > label::LABELS_MAX {
        return Err(format!("{} are too many: at most {}", labels.len(), label::LABELS_MAX));
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_looked_at_before_the_server_is_asked() {
        let zone = parse_label("topology.volnode.io/zone=z1").unwrap();
        assert_eq!(zone, ("topology.volnode.io/zone".to_owned(), "z1".to_owned()));
        for (bad, why) in
            [("zone", "write KEY=VALUE"), ("=z", "the key"), ("a b=z", "the key"), ("zone=", "the value")]
        {
            let error = parse_label(bad).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn empty_pieces_are_no_labels() {
        let pair = |key: &str| (key.to_owned(), "1".to_owned());
        for (text, labels) in [
            ("", vec![]),
            (",", vec![]),
            ("a=1,", vec![pair("a")]),
            (",a=1,,b=1", vec![pair("a"), pair("b")]),
        ] {
            assert_eq!(parse_labels(text), Ok(LabelList(labels)), "{text:?}");
        }
        for bad in ["a=1,b", " ", "a=1, b=1", "="] {
            assert!(parse_labels(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_node_has_one_value_for_a_key() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let of = |pairs| labels_of(vec![LabelList(pairs)]);
        assert_eq!(of(vec![pair("a", "b"), pair("a", "b"), pair("c", "d")]).unwrap().len(), 2);
        assert!(of(vec![pair("a", "b"), pair("a", "c")]).unwrap_err().contains("give it once"));
        let many = (0..=label::LABELS_MAX).map(|number| pair(&format!("k{number}"), "v")).collect();
        assert!(of(many).unwrap_err().contains("at most 64"));
    }
}
