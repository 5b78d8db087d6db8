//! What the header of a qcow2 says of a base: its file's name, and what shows that it is the right one.
//!
//! I/O-free: works on the first cluster. The name and its format are QEMU's; what the base's content has to be stands in a header extension of our
//! own, which QEMU ignores and keeps. An image from elsewhere has none. Nothing that is read here is believed before it was compared with bytes.
//! Source: QEMU's docs/interop/qcow2.rst, "Header", "Header extensions", "Backing file name". Our extension: `docs/formats.md`.

use serde::{Deserialize, Serialize};

use super::format::{Format, QCOW2_EXTENSION_BACKING_FORMAT};

/// Ours: `VOLN`, and then a [`Difference`] in JSON.
const EXTENSION_DIFFERENCE: u32 = 0x564f_4c4e;
const EXTENSION_END: u32 = 0;
/// Version of our extension.
pub const DIFFERENCE_VERSION: u32 = 1;
/// Longest name of a backing file, in bytes.
pub const BACKING_NAME_BYTES_MAX: usize = 1023;
/// Bytes of a header that has the fields of version 3.
const HEADER_BYTES_MIN: usize = 104;
/// A QEMU that writes headers makes clusters of 64 KiB; the largest that there are have 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// What an image of a difference says of itself and its base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// [`DIFFERENCE_VERSION`]
    pub format_version: u32,
    /// The base, as whoever exported it called it: for messages.
    pub base: String,
    /// Of the base's content, with zeroes behind its end as far as the image goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_digest: Option<String>,
    /// Of what the base and the difference are together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// A header cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It is cut off, or something in it points out of it.
    #[error("the qcow2's header makes no sense: {0}")]
    Odd(&'static str),
    /// It says more than fits.
    #[error("the base's name and digests do not fit into the qcow2's header")]
    Full,
    /// A newer program's.
    #[error("the image was written by a newer volctl (format {0}; this one knows {DIFFERENCE_VERSION})")]
    Newer(u32),
}

/// The parts of a header, as long as what it was read from.
struct Parts<'a> {
    fields: &'a [u8],
    cluster_bytes: usize,
    backing_name: Option<&'a [u8]>,
    /// Kinds and contents, without the end.
    extensions: Vec<(u32, &'a [u8])>,
}

/// How many bytes of an image's beginning have to be looked at, by its first 24.
///
/// # Errors
/// [`HeaderError::Odd`]
pub fn cluster_bytes(begin: &[u8]) -> Result<usize, HeaderError> {
    let bits = number(begin, 20).filter(|bits| CLUSTER_BITS.contains(bits));
    bits.map(|bits| 1 << bits).ok_or(HeaderError::Odd("the size of its clusters"))
}

/// The name of the backing file, and what we have said of the base, if it was us.
///
/// # Errors
/// [`HeaderError`], by cause.
pub fn read(begin: &[u8]) -> Result<(Option<String>, Option<Difference>), HeaderError> {
    let parts = parts(begin)?;
    let name = parts.backing_name.map(|name| String::from_utf8_lossy(name).into_owned());
    let ours = parts.extensions.iter().find(|(kind, _)| *kind == EXTENSION_DIFFERENCE);
    let Some((_, ours)) = ours else { return Ok((name, None)) };
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let odd = |_| HeaderError::Odd("what it says of its base");
    let Version { format_version } = serde_json::from_slice(ours).map_err(odd)?;
    if format_version > DIFFERENCE_VERSION {
        return Err(HeaderError::Newer(format_version));
    }
    Ok((name, Some(serde_json::from_slice(ours).map_err(odd)?)))
}

/// The first cluster of an image of version 3, with another base than it had, or with one.
///
/// # Errors
/// [`HeaderError`], by cause.
pub fn with_base(
    begin: &[u8],
    backing_name: &str,
    backing_format: Format,
    difference: &Difference,
) -> Result<Vec<u8>, HeaderError> {
    let parts = parts(begin)?;
    if number(begin, 4) != Some(3) {
        return Err(HeaderError::Odd("it is not of version 3"));
    }
    if backing_name.len() > BACKING_NAME_BYTES_MAX {
        return Err(HeaderError::Full);
    }
    let ours = serde_json::to_vec(difference).map_err(|_| HeaderError::Odd("what it is to say"))?;
    let format = backing_format.as_str().as_bytes();
    let replaced = [QCOW2_EXTENSION_BACKING_FORMAT, EXTENSION_DIFFERENCE];
    let kept = parts.extensions.iter().filter(|(kind, _)| !replaced.contains(kind)).copied();
    let own =
        [(QCOW2_EXTENSION_BACKING_FORMAT, format), (EXTENSION_DIFFERENCE, &ours[..]), (EXTENSION_END, &[])];
    let mut bytes = parts.fields.to_vec();
    for (kind, content) in kept.chain(own) {
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&(content.len() as u32).to_be_bytes());
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    let name_at = bytes.len() as u64;
    bytes.extend_from_slice(backing_name.as_bytes());
    if bytes.len() > parts.cluster_bytes {
        return Err(HeaderError::Full);
    }
    bytes[8..16].copy_from_slice(&name_at.to_be_bytes());
    bytes[16..20].copy_from_slice(&(backing_name.len() as u32).to_be_bytes());
    bytes.resize(parts.cluster_bytes, 0);
    Ok(bytes)
}

fn parts(begin: &[u8]) -> Result<Parts<'_>, HeaderError> {
    let cluster_bytes = cluster_bytes(begin)?;
    let cut_off = || HeaderError::Odd("it is cut off");
    let begin = &begin[..begin.len().min(cluster_bytes)];
    let header_bytes = match number(begin, 4) {
        // Version 2 has no field for it.
        Some(2) => 72,
        _ => number(begin, 100).ok_or_else(cut_off)? as usize,
    };
    if header_bytes != 72 && header_bytes < HEADER_BYTES_MIN {
        return Err(HeaderError::Odd("its length"));
    }
    let fields = begin.get(..header_bytes).ok_or_else(cut_off)?;
    let backing_name = match (long(begin, 8).ok_or_else(cut_off)?, number(begin, 16)) {
        (0, _) => None,
        (at, length) => {
            let at = usize::try_from(at).map_err(|_| cut_off())?;
            let end = at.checked_add(length.unwrap_or_default() as usize).ok_or_else(cut_off)?;
            Some(begin.get(at..end).ok_or(HeaderError::Odd("the name of its backing file"))?)
        }
    };
    let (mut at, mut extensions) = (header_bytes, Vec::new());
    loop {
        let kind = number(begin, at).ok_or_else(cut_off)?;
        let length = number(begin, at + 4).ok_or_else(cut_off)? as usize;
        if kind == EXTENSION_END {
            return Ok(Parts { fields, cluster_bytes, backing_name, extensions });
        }
        let content = begin.get(at + 8..).and_then(|rest| rest.get(..length)).ok_or_else(cut_off)?;
        extensions.push((kind, content));
        at += 8 + length.next_multiple_of(8);
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(cluster_bits: u8) -> Vec<u8> {
        let mut bytes = vec![0; 1 << cluster_bits];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        (bytes[7], bytes[23], bytes[103]) = (3, cluster_bits, 112);
        bytes[111] = 9;
        // An extension that we do not know, of an odd length.
        bytes[112..116].copy_from_slice(&0x6803_f857_u32.to_be_bytes());
        bytes[119] = 5;
        bytes[120..125].copy_from_slice(b"names");
        bytes
    }

    type Change = fn(&mut Vec<u8>);

    fn difference(base_digest: &str) -> Difference {
        Difference {
            format_version: DIFFERENCE_VERSION,
            base: "web-1@monday".into(),
            base_digest: Some(base_digest.into()),
            digest: None,
        }
    }

    #[test]
    fn a_base_is_named_and_named_anew_and_everything_else_stays() {
        let begin = header(16);
        assert_eq!(read(&begin), Ok((None, None)));
        let first = with_base(&begin, "monday.qcow2", Format::Qcow2, &difference("first")).unwrap();
        assert_eq!(read(&first), Ok((Some("monday.qcow2".into()), Some(difference("first")))));
        let second = with_base(&first, "m.img", Format::Raw, &difference("second")).unwrap();
        assert_eq!(read(&second), Ok((Some("m.img".into()), Some(difference("second")))));
        assert_eq!(second.len(), begin.len());
        assert_eq!(second, with_base(&begin, "m.img", Format::Raw, &difference("second")).unwrap());
        assert_eq!(&second[20..125], &begin[20..125], "the fields and the other extension");
    }

    #[test]
    fn what_does_not_fit_or_makes_no_sense_is_told() {
        let full = with_base(&header(9), &"x".repeat(400), Format::Raw, &difference("d"));
        assert_eq!(full, Err(HeaderError::Full));
        let long = with_base(&header(16), &"x".repeat(1024), Format::Raw, &difference("d"));
        assert_eq!(long, Err(HeaderError::Full));
        let whole = with_base(&header(16), "m", Format::Raw, &difference("d")).unwrap();
        let odd = |change: Change| {
            let mut bytes = whole.clone();
            change(&mut bytes);
            read(&bytes)
        };
        let ways: [Change; 8] = [
            |bytes| bytes.truncate(100),
            |bytes| bytes.truncate(130),
            |bytes| bytes[23] = 64,
            |bytes| bytes[103] = 80,
            |bytes| bytes[100] = 0xff,
            |bytes| bytes[8..16].fill(0xff),
            |bytes| bytes[16..20].fill(0xff),
            |bytes| bytes[116..120].fill(0xff),
        ];
        for (number, way) in ways.into_iter().enumerate() {
            assert!(matches!(odd(way), Err(HeaderError::Odd(_))), "{number}");
        }
        let newer = Difference { format_version: 2, ..difference("d") };
        let newer = with_base(&header(16), "m", Format::Raw, &newer).unwrap();
        assert_eq!(read(&newer), Err(HeaderError::Newer(2)));
    }
}
