//! Errors for people: what went wrong, and why, in one line.

/// An error and what caused it, in one line.
pub fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some libraries print their source themselves; it is not said twice.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read x: {0}")]
    struct Said(#[source] io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read x")]
    struct Unsaid(#[source] io::Error);

    #[test]
    fn sources_are_told_once() {
        assert_eq!(with_sources(&Said(io::Error::other("broken"))), "cannot read x: broken");
        assert_eq!(with_sources(&Unsaid(io::Error::other("broken"))), "cannot read x: broken");
    }
}
