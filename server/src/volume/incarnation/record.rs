//! The form of a record in its file: one JSON object, filled up so that it is changed in its place.
//!
//! Plain bytes: no I/O, no clock; `files.rs` reads and writes them, and so does the simulator. What a record means says `history.rs`,
//! what becomes of one that is found `core.rs`.
//! Source: `docs/formats.md`.

use serde::{Deserialize, Serialize};

use super::history::Record;

/// Version of the records' form. What is added with a default does not raise it.
const FORMAT_VERSION: u32 = 1;
/// A record is filled up to so many bytes, so that it is changed in its place: that takes no space, even where none is left.
pub const RECORD_BYTES: usize = 1024;

/// A record as it is in its file.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    version: u32,
    boot_id: String,
    #[serde(flatten)]
    record: Record,
}

/// The file's content for a record of this boot.
///
/// # Errors
/// It cannot be said in JSON, which does not happen.
pub fn encode(boot_id: &str, record: &Record) -> Result<Vec<u8>, serde_json::Error> {
    let stored = Stored { version: FORMAT_VERSION, boot_id: boot_id.to_owned(), record: record.clone() };
    let mut text = serde_json::to_vec(&stored)?;
    text.resize(text.len().max(RECORD_BYTES - 1), b' ');
    text.push(b'\n');
    Ok(text)
}

/// The record that a file has of this boot; `None`: it says nothing of this boot.
///
/// # Errors
/// It is no record: what was in it is not known.
pub fn decode(boot_id: &str, text: &[u8]) -> Result<Option<Record>, serde_json::Error> {
    if text.is_empty() {
        // Its server was killed before it had written it.
        return Ok(None);
    }
    let stored: Stored = serde_json::from_slice(text)?;
    // Of another boot, or of a newer program: nothing is known.
    let is_of_this_boot = stored.boot_id == boot_id && stored.version == FORMAT_VERSION;
    Ok(is_of_this_boot.then_some(stored.record))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by 0.1.0's successor; what later versions add, and this one does not know, is passed over.
    const FIRST_FORM: &[u8] = br#"{"version":1,"boot_id":"6f1d","incarnation":7,"attach_generation":2,"superblock":null,
                    "file":"8:1:131:1700000000.000000001","modified":null,"lost_writes":true,"of_a_later_version":1}"#;

    #[test]
    fn the_first_form_of_a_record_can_be_read() {
        let record = decode("6f1d", FIRST_FORM).unwrap().unwrap();
        assert_eq!((record.incarnation, record.attach_generation, record.lost_writes), (7, 2, true));
        let text = encode("6f1d", &record).unwrap();
        assert_eq!(text.len(), RECORD_BYTES);
        assert_eq!(decode("6f1d", &text).unwrap(), Some(record));
    }

    #[test]
    fn a_record_says_nothing_of_another_boot_nor_in_a_newer_form() {
        assert_eq!(decode("7a2e", FIRST_FORM).unwrap(), None);
        let newer = String::from_utf8_lossy(FIRST_FORM).replace("\"version\":1", "\"version\":2");
        assert_eq!(decode("6f1d", newer.as_bytes()).unwrap(), None);
        assert_eq!(decode("6f1d", b"").unwrap(), None, "it was never written");
        assert!(decode("6f1d", b"{").is_err());
    }
}
