//! LIST_META_CONTEXT and SET_META_CONTEXT: what their data says, and which of our contexts a query matches.
//!
//! Owned by `server.rs`, which answers. Pure functions over bytes whose total length was bounded before. There is
//! `base:allocation`, and of some exports `qemu:dirty-bitmap:NAME`; queries of other namespaces, or of leaf names that do not exist,
//! match nothing and are no error. Sources: NBD `doc/proto.md`, "Metadata querying" and the two options; QEMU `docs/interop/nbd.rst`.

use super::super::block_status::{ALLOCATION_CONTEXT, DIRTY_BITMAP_PREFIX};
use super::super::wire::be_u32;
use super::super::{STRING_BYTES_MAX, reply};

/// Matches every context of the `base` namespace, in LIST_META_CONTEXT only.
const BASE_WILDCARD: &[u8] = b"base:";

/// The same of the `qemu` namespace, and of its bitmaps.
const QEMU_WILDCARD: &[u8] = b"qemu:";

/// What one of the two options asks for.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct MetaContextRequest {
    /// About which export; may carry a secret.
    pub(super) export: String,
    /// Whether `base:allocation` is listed, or selected.
    pub(super) matches_allocation: bool,
    /// Whether every bitmap is.
    matches_all_bitmaps: bool,
    /// Which bitmaps are, if there are such.
    bitmaps: Vec<Vec<u8>>,
}

impl MetaContextRequest {
    /// Whether the bitmap of that name is listed, or selected.
    pub(super) fn matches_bitmap(&self, name: &str) -> bool {
        self.matches_all_bitmaps || self.bitmaps.iter().any(|wanted| wanted == name.as_bytes())
    }
}

/// Which option it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueryKind {
    List,
    Set,
}

/// Reads an option's data.
///
/// # Errors
/// The error reply and its words: lengths that do not add up, strings that are none.
pub(super) fn parse(data: &[u8], kind: QueryKind) -> Result<MetaContextRequest, (u32, &'static str)> {
    let mut rest = data;
    let export = super::server::export_name(take_string(&mut rest)?)
        .ok_or((reply::ERR_INVALID, "the export name is not a string"))?;
    let count = take_u32(&mut rest)?;
    let is_list = kind == QueryKind::List;
    let mut matches_allocation = is_list && count == 0;
    let (mut matches_all_bitmaps, mut bitmaps) = (matches_allocation, Vec::new());
    for _ in 0..count {
        let query = take_string(&mut rest)?;
        let is_name = query == ALLOCATION_CONTEXT.as_bytes();
        matches_allocation |= is_name || (is_list && query == BASE_WILDCARD);
        match query.strip_prefix(DIRTY_BITMAP_PREFIX.as_bytes()) {
            Some([]) => matches_all_bitmaps |= is_list,
            Some(name) => bitmaps.push(name.to_owned()),
            None => matches_all_bitmaps |= is_list && query == QEMU_WILDCARD,
        }
    }
    if !rest.is_empty() {
        return Err((reply::ERR_INVALID, "more data than the queries need"));
    }
    Ok(MetaContextRequest { export, matches_allocation, matches_all_bitmaps, bitmaps })
}

const SHORT: (u32, &str) = (reply::ERR_INVALID, "the option's data is too short");

fn take_u32(rest: &mut &[u8]) -> Result<u32, (u32, &'static str)> {
    let (number, after) = rest.split_at_checked(4).ok_or(SHORT)?;
    *rest = after;
    Ok(be_u32(number, 0))
}

fn take_string<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], (u32, &'static str)> {
    let length_bytes = take_u32(rest)? as usize;
    let (string, after) = rest.split_at_checked(length_bytes).ok_or(SHORT)?;
    if length_bytes > STRING_BYTES_MAX {
        return Err((reply::ERR_TOO_BIG, "a string has at most 4096 bytes"));
    }
    *rest = after;
    Ok(string)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(queries: &[&str]) -> Vec<u8> {
        let mut data = b"\0\0\0\x03vol".to_vec();
        data.extend((queries.len() as u32).to_be_bytes());
        for query in queries {
            data.extend((query.len() as u32).to_be_bytes());
            data.extend(query.as_bytes());
        }
        data
    }

    fn matches(kind: QueryKind, queries: &[&str]) -> bool {
        let request = parse(&data(queries), kind).map_err(|(_, words)| words).unwrap();
        assert_eq!(request.export, "vol");
        request.matches_allocation
    }

    #[test]
    fn the_wildcard_lists_and_does_not_select() {
        assert!(matches(QueryKind::List, &["base:"]));
        assert!(!matches(QueryKind::Set, &["base:"]));
        assert!(matches(QueryKind::Set, &["base:", "base:allocation"]));
    }

    #[test]
    fn no_query_lists_all_and_selects_none() {
        assert!(matches(QueryKind::List, &[]));
        assert!(!matches(QueryKind::Set, &[]));
    }

    #[test]
    fn queries_of_others_are_passed_over() {
        let others = ["qemu:dirty-bitmap:x", "base:unknown", "x-y:z", "no colon", "", "BASE:ALLOCATION"];
        for kind in [QueryKind::List, QueryKind::Set] {
            for other in others {
                assert!(!matches(kind, &[other]), "{other:?}");
                assert!(matches(kind, &[other, "base:allocation"]), "{other:?}");
            }
        }
    }

    #[test]
    fn bitmaps_are_matched_by_name_and_listed_by_wildcard() {
        let matched = |kind, queries: &[&str]| {
            let request = parse(&data(queries), kind).map_err(|(_, words)| words).unwrap();
            ["x", "y"].map(|name| request.matches_bitmap(name))
        };
        for wildcard in ["qemu:", "qemu:dirty-bitmap:"] {
            assert_eq!(matched(QueryKind::List, &[wildcard]), [true, true], "{wildcard}");
            assert_eq!(matched(QueryKind::Set, &[wildcard]), [false, false], "{wildcard}");
        }
        assert_eq!(matched(QueryKind::List, &[]), [true, true]);
        assert_eq!(matched(QueryKind::Set, &[]), [false, false]);
        for kind in [QueryKind::List, QueryKind::Set] {
            assert_eq!(matched(kind, &["qemu:dirty-bitmap:y", "base:allocation"]), [false, true]);
            for other in [
                "base:",
                "qemu:allocation-depth",
                "qemu:dirty-bitmap",
                "qemu:dirty-bitmap:X",
                "dirty-bitmap:x",
            ] {
                assert_eq!(matched(kind, &[other]), [false, false], "{other}");
            }
        }
    }

    #[test]
    fn lengths_that_do_not_add_up_are_invalid() {
        let whole = data(&["base:allocation", "x:y"]);
        for end in 0..whole.len() {
            let error = parse(&whole[..end], QueryKind::Set).map(|_| ()).unwrap_err();
            assert_eq!(error.0, reply::ERR_INVALID, "{end} bytes");
        }
        let longer = [&whole[..], b"\0"].concat();
        assert!(parse(&longer, QueryKind::Set).is_err());
        let mut many = whole;
        many[7..11].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(parse(&many, QueryKind::Set).is_err());
    }

    #[test]
    fn strings_that_are_none_are_refused() {
        for name in [&b"\0\0\0\x01\xff"[..], b"\0\0\0\x02a\0"] {
            let data = [name, b"\0\0\0\0"].concat();
            assert_eq!(parse(&data, QueryKind::List).map(|_| ()).unwrap_err().0, reply::ERR_INVALID);
        }
        let long = "x".repeat(STRING_BYTES_MAX + 1);
        assert_eq!(parse(&data(&[&long]), QueryKind::Set).map(|_| ()).unwrap_err().0, reply::ERR_TOO_BIG);
    }
}
