//! The names under which exports of a volnode server are opened, and what the server says of them.
//!
//! - [`AttachmentExportName`]: `<attachment-id>.<secret>/<epoch>/<slot>`, the export of one attachment. The epoch and the
//!   slot are what fencing works on: see `server/src/data/gate/fence.rs`.
//! - [`ExportDescription`]: what GO answers in `NBD_INFO_DESCRIPTION`: who serves which volume, and its storage
//!   incarnation, so that a client can tell a server that forgot from one that did not.
//! - [`ExportRefusal`]: what an error to GO says: why, and which server says so, so that a client can tell the server that
//!   has to know its attachment from one that cannot.
//!
//! All are spoken across versions. Description and refusal carry their version; a name of another form is simply not an
//! attachment's (plain volume names have no `/`). Nothing here prints a secret: `Debug` hides it.

use std::fmt;
use std::str::FromStr;

use subtle::ConstantTimeEq as _;
use uuid::Uuid;

/// Bytes of randomness in a secret; its text is twice as many hexadecimal digits.
pub const SECRET_BYTES: usize = 32;

/// The slot of a connection that only asks whether the server lives: it has no other's I/O to wait for, and the server opens it
/// beside its limits of connections, for a short time.
pub const PROBE_SLOT: u32 = u32::MAX;

/// The word an attachment's holder proves itself with. Compared in constant time; never printed by `Debug`.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// A new secret from the operating system's random source.
    ///
    /// # Errors
    /// The random source's own error.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0u8; SECRET_BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// Takes the text form; `None` unless it is 64 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let is_hex = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        (text.len() == SECRET_BYTES * 2 && is_hex).then(|| Self(text.to_owned()))
    }

    /// The text itself, for the export name, the catalog and AttachVolumeResponse only.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

/// An attachment's export: `<attachment-id>.<secret>/<epoch>/<slot>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachmentExportName {
    /// Public id of the attachment.
    pub attachment_id: Uuid,
    /// Proves that the peer was given the attachment.
    pub secret: Secret,
    /// Session epoch: a higher one fences every lower one.
    pub epoch: u64,
    /// Which connection of the session this is, from 0.
    pub slot: u32,
}

impl AttachmentExportName {
    /// The text to open. It holds the secret: it may go to the server and nowhere else (hence no `Display`).
    pub fn expose(&self) -> String {
        format!("{}.{}/{}/{}", self.attachment_id, self.secret.expose(), self.epoch, self.slot)
    }

    /// Reads a name; `None` if it is not of an attachment's form. Only the one canonical spelling is taken.
    pub fn parse(name: &str) -> Option<Self> {
        let (identity, rest) = name.split_once('/')?;
        let (epoch, slot) = rest.split_once('/')?;
        let (attachment_id, secret) = identity.split_once('.')?;
        let parsed = Self {
            attachment_id: Uuid::from_str(attachment_id).ok()?,
            secret: Secret::parse(secret)?,
            epoch: epoch.parse().ok()?,
            slot: slot.parse().ok()?,
        };
        (parsed.expose() == name).then_some(parsed)
    }
}

/// Version of [`ExportDescription`]'s text.
pub const EXPORT_DESCRIPTION_VERSION: u32 = 1;

/// What a volnode server says of an attachment's export in `NBD_INFO_DESCRIPTION`:
/// `volnode/1 server_id=<uuid> volume_uid=<uuid> incarnation=<word>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportDescription {
    /// The server's identity.
    pub server_id: Uuid,
    /// The volume's identity.
    pub volume_uid: Uuid,
    /// Changes whenever acknowledged, unflushed writes may have been lost. No white space in it.
    pub incarnation: String,
}

impl fmt::Display for ExportDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "volnode/{EXPORT_DESCRIPTION_VERSION} server_id={} volume_uid={} incarnation={}",
            self.server_id, self.volume_uid, self.incarnation
        )
    }
}

/// Why a text is not an export description of ours.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DescriptionError {
    /// The text is something else: the server is not a volnode server.
    #[error("the server's export description is not volnode's")]
    Foreign,
    /// A version that this program does not know.
    #[error(
        "the server speaks export description version {0}; this program knows {EXPORT_DESCRIPTION_VERSION}: upgrade the client"
    )]
    UnknownVersion(u32),
    /// The version is known but a field is missing or off.
    #[error("the server's export description lacks a valid {0}")]
    Field(&'static str),
}

impl FromStr for ExportDescription {
    type Err = DescriptionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split_ascii_whitespace();
        let version = words
            .next()
            .and_then(|word| word.strip_prefix("volnode/"))
            .and_then(|version| version.parse::<u32>().ok())
            .ok_or(DescriptionError::Foreign)?;
        if version != EXPORT_DESCRIPTION_VERSION {
            return Err(DescriptionError::UnknownVersion(version));
        }
        // Fields that this version does not know are passed over: a newer minor form may add some.
        let fields: Vec<(&str, &str)> = words.filter_map(|word| word.split_once('=')).collect();
        let field = |name: &'static str| {
            fields
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| *value)
                .ok_or(DescriptionError::Field(name))
        };
        let uuid = |name: &'static str| {
            field(name).and_then(|value| Uuid::from_str(value).map_err(|_| DescriptionError::Field(name)))
        };
        let incarnation = field("incarnation")?.to_owned();
        Ok(Self { server_id: uuid("server_id")?, volume_uid: uuid("volume_uid")?, incarnation })
    }
}

/// Version of [`ExportRefusal`]'s text.
pub const EXPORT_REFUSAL_VERSION: u32 = 1;

/// The text of an error with which a volnode server refuses an export: `<reason> (volnode/1 server_id=<uuid>)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRefusal<'a> {
    /// For people.
    pub reason: &'a str,
    /// Who refuses.
    pub server_id: Uuid,
}

impl fmt::Display for ExportRefusal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (volnode/{EXPORT_REFUSAL_VERSION} server_id={})", self.reason, self.server_id)
    }
}

impl<'a> ExportRefusal<'a> {
    /// Reads what a server says; `None` if that does not name a volnode server in a version that this program knows. Any
    /// server may say anything.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (reason, who) = text.strip_suffix(')')?.rsplit_once(" (volnode/")?;
        let mut words = who.split_ascii_whitespace();
        if words.next()?.parse() != Ok(EXPORT_REFUSAL_VERSION) {
            return None;
        }
        let server_id = words.find_map(|word| word.strip_prefix("server_id="))?;
        Some(Self { reason, server_id: Uuid::from_str(server_id).ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> AttachmentExportName {
        AttachmentExportName {
            attachment_id: Uuid::from_u128(7),
            secret: Secret::generate().unwrap(),
            epoch: 3,
            slot: 1,
        }
    }

    #[test]
    fn name_survives_a_round_trip() {
        let name = name();
        assert_eq!(AttachmentExportName::parse(&name.expose()), Some(name));
    }

    #[test]
    fn only_the_canonical_spelling_is_a_name() {
        let text = name().expose();
        assert_eq!(AttachmentExportName::parse(&text.to_uppercase()), None);
        assert_eq!(AttachmentExportName::parse(&text.replace("/3/1", "/03/1")), None);
        assert_eq!(AttachmentExportName::parse(&text.replace("/3/1", "/+3/1")), None);
        assert_eq!(AttachmentExportName::parse(&text.replace("/3/1", "/3")), None);
        assert_eq!(AttachmentExportName::parse(&text.replace("/3/1", "/3/4294967296")), None);
        assert_eq!(AttachmentExportName::parse("vol-123"), None);
        assert_eq!(AttachmentExportName::parse(""), None);
    }

    #[test]
    fn debug_hides_the_secret() {
        let name = name();
        assert!(!format!("{name:?}").contains(name.secret.expose()));
    }

    #[test]
    fn description_of_version_1_is_read() {
        // A fixture of the format as it was first released: it must be readable for ever.
        let text = "volnode/1 server_id=00000000-0000-0000-0000-000000000001 \
                    volume_uid=00000000-0000-0000-0000-000000000002 incarnation=b.3";
        let description: ExportDescription = text.parse().unwrap();
        assert_eq!(description.volume_uid, Uuid::from_u128(2));
        assert_eq!(description.incarnation, "b.3");
        assert_eq!(description.to_string(), text);
    }

    #[test]
    fn other_descriptions_are_told_apart() {
        assert_eq!("a nice disk".parse::<ExportDescription>(), Err(DescriptionError::Foreign));
        assert_eq!("volnode/2 x=1".parse::<ExportDescription>(), Err(DescriptionError::UnknownVersion(2)));
        assert_eq!("volnode/1".parse::<ExportDescription>(), Err(DescriptionError::Field("incarnation")));
    }
    #[test]
    fn refusal_of_version_1_is_read() {
        // A fixture of the format as it was first released: it must be readable for ever.
        let text =
            "the attachment has been fenced (volnode/1 server_id=00000000-0000-0000-0000-000000000001)";
        let refusal = ExportRefusal::parse(text).unwrap();
        let server_id = Uuid::from_u128(1);
        assert_eq!(refusal, ExportRefusal { reason: "the attachment has been fenced", server_id });
        assert_eq!(refusal.to_string(), text);
        // Words that a later program adds are passed over.
        let longer = text.replace(")", " node_id=a)");
        assert_eq!(ExportRefusal::parse(&longer), Some(refusal));
    }

    #[test]
    fn refusals_of_other_servers_name_nobody() {
        let others = [
            "",
            ")",
            "export not found",
            "no such export (volnode/1)",
            "no such export (volnode/1 server_id=x)",
            "no such export (volnode/2 server_id=00000000-0000-0000-0000-000000000001)",
            "no such export (volnode/1 server_id=00000000-0000-0000-0000-000000000001), or so",
        ];
        for text in others {
            assert_eq!(ExportRefusal::parse(text), None, "{text:?}");
        }
    }
}
