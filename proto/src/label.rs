//! Labels of volumes and nodes, as in Kubernetes: what a key and a value may be.
//!
//! Owns the rule. Never: says what a label means. Called by the server (it refuses others) and the client (which tells of them before
//! it asks).

/// Characters of a label's name and of its value at most.
pub const CHARS_MAX: usize = 63;
/// Characters of the domain before a label's name at most.
const PREFIX_CHARS_MAX: usize = 253;
/// Labels of one volume or node at most.
pub const LABELS_MAX: usize = 64;

/// What a key must be, for people.
pub const KEY_RULE: &str = "[DOMAIN/]NAME: a NAME of 1 to 63 letters, digits, '-', '_' or '.', beginning and ending with a letter or \
                            digit, and a DOMAIN in lower case";
/// What a value must be, for people.
pub const VALUE_RULE: &str =
    "1 to 63 letters, digits, '-', '_' or '.', beginning and ending with a letter or digit";

/// Whether it is `[DOMAIN/]NAME`.
pub fn is_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_prefix(prefix) && is_word(name),
        None => is_word(key),
    }
}

/// Whether it is a value that is there.
pub fn is_value(value: &str) -> bool {
    is_word(value)
}

/// 1 to 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit.
fn is_word(word: &str) -> bool {
    let bytes = word.as_bytes();
    let is_alphanumeric = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    bytes.len() <= CHARS_MAX
        && is_alphanumeric(bytes.first())
        && is_alphanumeric(bytes.last())
        && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// A DNS name in lower case.
fn is_prefix(prefix: &str) -> bool {
    let is_part = |part: &str| {
        is_word(part) && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    prefix.len() <= PREFIX_CHARS_MAX && prefix.split('.').all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_are_as_in_kubernetes() {
        for key in ["a", "topology.volnode.io/zone", "Tier_1", "a.b/c-d", &"x".repeat(CHARS_MAX)] {
            assert!(is_key(key), "{key}");
        }
        let too_long = "x".repeat(CHARS_MAX + 1);
        for key in ["", "/a", "a/", "a/b/c", "-a", "a-", "A.b/c", "a b", "ä", "a..b/c", &too_long] {
            assert!(!is_key(key), "{key:?}");
        }
        let long = format!("{}/x", ["a".repeat(CHARS_MAX).as_str(); 4].join("."));
        assert!(!is_key(&long), "a domain of more than {PREFIX_CHARS_MAX}");
        assert!(is_value("z-1") && !is_value("") && !is_value("a,b") && !is_value("a=b"));
        assert!(KEY_RULE.contains(&CHARS_MAX.to_string()) && VALUE_RULE.contains(&CHARS_MAX.to_string()));
    }
}
