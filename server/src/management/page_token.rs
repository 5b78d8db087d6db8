//! Page tokens: where the next page of a list begins.
//!
//! A token is the last name of the page before it, with the list and the server it is of, so that a token of another list
//! or server is refused rather than misread. Callers must not look into it; nothing secret is in it. No state is kept:
//! a list that changes between two pages shows each volume that was there all the time exactly once.

use proto::volume_name::is_volume_name;
use uuid::Uuid;

/// Entries of a page where the caller asks for no number.
const PAGE_SIZE_DEFAULT: u32 = 100;
/// Entries of a page at most: some 500 kB of a message, whose limit is 4 MB.
const PAGE_SIZE_MAX: u32 = 1000;

/// Makes and reads the tokens of one list of one server.
#[derive(Debug, Clone)]
pub(super) struct PageToken {
    prefix: String,
}

impl PageToken {
    /// For the list named `list`.
    pub(super) fn new(list: &str, server_id: Uuid) -> Self {
        Self { prefix: format!("1.{list}.{server_id}.") }
    }

    /// The name after which the page begins: of the text that a caller gave; empty for the first page. `None` for a text
    /// that is not a token of this list.
    pub(super) fn read(&self, text: &str) -> Option<String> {
        if text.is_empty() {
            return Some(String::new());
        }
        self.key(text).filter(|name| is_volume_name(name)).map(str::to_owned)
    }

    /// What is behind the list and the server in a text that a caller gave, unchecked.
    pub(super) fn key<'text>(&self, text: &'text str) -> Option<&'text str> {
        text.strip_prefix(&self.prefix)
    }

    /// The same of a list in which a name may come several times, in the order of another word: both of them.
    pub(super) fn read_pair(&self, text: &str) -> Option<(String, String)> {
        if text.is_empty() {
            return Some(Default::default());
        }
        // A former program's had each name once: they go on after all of its words.
        let (token, word) = text.split_once('/').unwrap_or((text, "~"));
        let name = self.key(token).filter(|name| super::fields::is_attachable(name) && !word.is_empty())?;
        Some((name.to_owned(), word.to_owned()))
    }

    /// Cuts what was found down to one page, and gives the token of the next one; empty where there is none.
    pub(super) fn next<T>(&self, found: &mut Vec<T>, limit: u32, name: impl Fn(&T) -> &String) -> String {
        self.next_pair(found, limit, |last| name(last).clone())
    }

    /// The same of such a list, with both as `NAME/WORD`.
    pub(super) fn next_pair<T>(&self, found: &mut Vec<T>, limit: u32, name: impl Fn(&T) -> String) -> String {
        let limit = limit as usize;
        if found.len() <= limit {
            return String::new();
        }
        found.truncate(limit);
        found.last().map(|last| format!("{}{}", self.prefix, name(last))).unwrap_or_default()
    }
}

/// How many entries a page has.
pub(super) fn page_limit(page_size: u32) -> u32 {
    match page_size {
        0 => PAGE_SIZE_DEFAULT,
        asked => asked.min(PAGE_SIZE_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_by_its_own_list_and_server_only() {
        let token = PageToken::new("volumes", Uuid::from_u128(1));
        let mut found = vec!["a".to_owned(), "b.c".to_owned(), "d".to_owned()];
        let text = token.next(&mut found, 2, |name| name);
        assert_eq!(found, ["a", "b.c"]);
        assert_eq!(token.read(&text), Some("b.c".to_owned()));
        assert_eq!(PageToken::new("attachments", Uuid::from_u128(1)).read(&text), None);
        assert_eq!(PageToken::new("volumes", Uuid::from_u128(2)).read(&text), None);
        assert_eq!(token.read("b.c"), None);
        assert_eq!(token.read(&format!("{text}/x")), None);
        assert_eq!(token.read(""), Some(String::new()));
        assert_eq!(token.read_pair(&format!("{text}/x")), Some(("b.c".to_owned(), "x".to_owned())));
        assert_eq!(token.read_pair(&text), Some(("b.c".to_owned(), "~".to_owned())), "of a former program");
        assert_eq!(token.read_pair(""), Some((String::new(), String::new())));
        assert_eq!((token.read_pair("/x"), token.read_pair("/")), (None, None));
    }

    #[test]
    fn the_last_page_has_no_token() {
        let token = PageToken::new("volumes", Uuid::from_u128(1));
        assert_eq!(token.next(&mut vec!["a".to_owned(), "b".to_owned()], 2, |name| name), "");
        assert_eq!(token.next(&mut Vec::<String>::new(), 2, |name| name), "");
    }

    #[test]
    fn page_sizes_are_bounded() {
        assert_eq!([0, 1, 1000, 1001, u32::MAX].map(page_limit), [100, 1, 1000, 1000, 1000]);
    }
}
