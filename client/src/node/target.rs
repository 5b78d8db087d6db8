//! What can be attached: a volume's name or an NBD URI; and how a detach names it.
//!
//! Owns: the syntax of both, and the name of the stable link below the device directory. Never: looks anything up.
//! A URI is `nbd://host[:port]/export`, or `nbds://` for the same over TLS: port 10809 unless given, one `/` after the authority removed, the rest
//! percent-decoded; an empty export name is the server's default export. Two spellings of one URI are one target.
//! Link names: a volume's is its name; an NBD URI's is `nbd@<host>@<port>@<export>` (or `nbds@`…), percent-encoded but for letters,
//! digits, `-`, `_` and `.`. `@` is in no volume's name, so that no two targets share a link.
//! Called by: `supervisor`.
//! Source: the NBD project's doc/uri.md.

use std::fmt;
use std::path::PathBuf;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use uuid::Uuid;

use super::error::NodeError;

/// Longest volume name, in characters (all ASCII): the server's rule.
const VOLUME_NAME_LEN_MAX: usize = 128;
/// Longest export name, in bytes: `NBD_MAX_STRING`.
const EXPORT_NAME_BYTES_MAX: usize = 4096;
/// Port of an NBD server, as registered with IANA.
const NBD_PORT: u16 = 10809;
/// Longest link name, in bytes; `NAME_MAX` is 255.
const LINK_NAME_BYTES_MAX: usize = 200;

const LINK_NAME_ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');
const URI_PATH_ESCAPED: &AsciiSet = &LINK_NAME_ESCAPED.remove(b'~').remove(b'/');

/// What can be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A volume of the configured storage server.
    Volume(String),
    /// An export of any NBD server.
    Nbd(NbdUri),
}

/// `nbd://host[:port]/export` or `nbds://host[:port]/export`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// `nbds`: over TLS.
    pub tls: bool,
    /// Name or address; an IPv6 address without its brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// As the server knows it; may be empty.
    pub export_name: String,
}

impl Target {
    /// Reads what the user gave.
    ///
    /// # Errors
    /// [`NodeError::InvalidField`]: neither a volume's name nor an NBD URI that is supported.
    pub fn parse(text: &str) -> Result<Self, NodeError> {
        match text.split_once("://") {
            Some((scheme, _)) => NbdUri::parse(text, scheme).map(Self::Nbd),
            None => volume_name(text).map(Self::Volume),
        }
        .map_err(|message| NodeError::InvalidField { field: "target", message })
    }

    /// Name of the stable link below the device directory.
    pub fn link_name(&self, attachment_id: Uuid) -> String {
        match self {
            Self::Volume(name) => name.clone(),
            Self::Nbd(uri) => {
                let escaped = |text| utf8_percent_encode(text, LINK_NAME_ESCAPED).to_string();
                let scheme = uri.scheme();
                let name =
                    format!("{scheme}@{}@{}@{}", escaped(&uri.host), uri.port, escaped(&uri.export_name));
                // No file could be named so; the attachment's id is as unique.
                if name.len() <= LINK_NAME_BYTES_MAX { name } else { format!("{scheme}@{attachment_id}") }
            }
        }
    }
}

impl fmt::Display for Target {
    /// The one canonical spelling.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(name) => f.write_str(name),
            Self::Nbd(uri) => uri.fmt(f),
        }
    }
}

fn volume_name(text: &str) -> Result<String, String> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let begins_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins_well && text.len() <= VOLUME_NAME_LEN_MAX && text.chars().all(is_allowed) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "{text:?} is neither a volume's name (1 to {VOLUME_NAME_LEN_MAX} letters, digits, '-', '_' and '.', \
         beginning with a letter or digit) nor an NBD URI (nbd://host[:port]/export, or nbds:// for TLS)"
    ))
}

impl NbdUri {
    fn parse(text: &str, scheme: &str) -> Result<Self, String> {
        let scheme = scheme.to_ascii_lowercase();
        match scheme.as_str() {
            "nbd" | "nbds" => {}
            "nbd+unix" | "nbds+unix" | "nbd+vsock" | "nbds+vsock" => {
                return Err(format!("{scheme}:// is not supported yet; nbd://host[:port]/export is"));
            }
            _ => return Err(format!("{scheme}:// is not an NBD URI; write nbd://host[:port]/export")),
        }
        let off = |what: &str| format!("{text:?} {what}");
        if text.contains('#') {
            return Err(off("has a fragment ('#'), which NBD URIs do not; write %23 for the character"));
        }
        let uri: http::Uri = text.parse().map_err(|e| off(&format!("is not a valid URI: {e}")))?;
        let authority = uri.authority().ok_or_else(|| off("names no host"))?;
        if authority.as_str().contains('@') {
            return Err(off("names a user, which plain NBD has no use for"));
        }
        if uri.query().is_some() {
            return Err(off("has a query ('?'), which is not supported; write %3F for the character"));
        }
        let port_text =
            authority.as_str().rsplit_once(':').map(|(_, port)| port).filter(|p| !p.contains(']'));
        let port = match port_text {
            Some(text_of_port) => text_of_port.parse().ok().filter(|port| *port != 0),
            None => Some(NBD_PORT),
        };
        let port = port.ok_or_else(|| off("has a port that is not 1 to 65535"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        if host.is_empty() {
            return Err(off("names no host"));
        }
        let path = uri.path().strip_prefix('/').unwrap_or_default();
        let export_name = percent_decode_str(path).decode_utf8().map_err(|_| off("is not UTF-8"))?;
        if export_name.len() > EXPORT_NAME_BYTES_MAX || export_name.contains('\0') {
            return Err(off("has an export name that NBD does not allow"));
        }
        Ok(Self { tls: scheme == "nbds", host, port, export_name: export_name.into_owned() })
    }

    /// `nbd` or `nbds`.
    pub fn scheme(&self) -> &'static str {
        if self.tls { "nbds" } else { "nbd" }
    }

    /// `host:port`, with the brackets of an IPv6 address.
    pub fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export_name = utf8_percent_encode(&self.export_name, URI_PATH_ESCAPED);
        write!(f, "{}://{}/{export_name}", self.scheme(), self.address())
    }
}

/// How a detach names what it wants gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DetachSelector {
    /// `/dev/ublkbN`
    DevId(u32),
    /// Any other absolute path: the stable link, or a link to the device.
    Path(PathBuf),
    /// As given to attach; a UUID is tried as an attachment's id first, for a volume may be named so.
    Name {
        /// Attachment id, if the text is one.
        attachment_id: Option<Uuid>,
        /// What was attached.
        target: Target,
    },
}

impl DetachSelector {
    /// Reads what the user gave.
    ///
    /// # Errors
    /// [`NodeError::InvalidField`]: nothing that could ever be attached.
    pub fn parse(text: &str) -> Result<Self, NodeError> {
        let dev_id = |path: &str| path.strip_prefix("/dev/ublkb")?.parse().ok();
        if let Some(dev_id) = dev_id(text) {
            return Ok(Self::DevId(dev_id));
        }
        if text.starts_with('/') {
            return Ok(Self::Path(PathBuf::from(text)));
        }
        Ok(Self::Name { attachment_id: text.parse().ok(), target: Target::parse(text)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nbd(text: &str) -> NbdUri {
        match Target::parse(text) {
            Ok(Target::Nbd(uri)) => uri,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn refusal(text: &str) -> String {
        Target::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn volume_names_are_taken_by_the_servers_rule() {
        assert_eq!(Target::parse("vol-123").unwrap(), Target::Volume("vol-123".into()));
        assert!(Target::parse(&"a".repeat(128)).is_ok());
        for bad in ["", "-a", ".a", "a/b", "a b", "ä", &"a".repeat(129)] {
            assert!(refusal(bad).contains("neither a volume's name"), "{bad}");
        }
    }

    #[test]
    fn host_port_and_export_are_read() {
        let uri = nbd("nbd://storage.example:10810/disk%201/a");
        assert_eq!((uri.host.as_str(), uri.port), ("storage.example", 10810));
        assert_eq!(uri.export_name, "disk 1/a");
        assert_eq!(uri.address(), "storage.example:10810");
        assert_eq!(nbd("nbd://h").export_name, "");
        assert_eq!(nbd("nbd://h/").port, 10809);
        assert_eq!(nbd("nbd://h//a").export_name, "/a");
    }

    #[test]
    fn ipv6_addresses_keep_their_brackets_in_addresses_only() {
        let uri = nbd("nbd://[::1]/x");
        assert_eq!((uri.host.as_str(), uri.port), ("::1", 10809));
        assert_eq!(uri.address(), "[::1]:10809");
        assert_eq!(nbd("nbd://[fe80::2]:99/x").address(), "[fe80::2]:99");
    }

    #[test]
    fn two_spellings_are_one_target() {
        assert_eq!(nbd("nbd://H/a%62c"), nbd("NBD://h:10809/abc"));
        let canonical = nbd("nbd://h/a b%2".replace(' ', "%20").replace("%2", "%25").as_str());
        assert_eq!(nbd(&canonical.to_string()), canonical);
    }

    #[test]
    fn the_same_export_over_tls_is_another_target() {
        let (plain, tls) = (nbd("nbd://h/x"), nbd("NBDS://h/x"));
        assert_ne!(plain, tls);
        assert_eq!((tls.port, tls.to_string().as_str()), (10809, "nbds://h:10809/x"));
        assert_eq!(Target::Nbd(tls).link_name(Uuid::from_u128(7)), "nbds@h@10809@x");
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        assert!(refusal("nbds+unix:///x?socket=/s").contains("not supported yet"));
        assert!(refusal("nbd+unix:///x?socket=/s").contains("not supported yet"));
        assert!(refusal("http://h/x").contains("not an NBD URI"));
        assert!(refusal("nbd://me@h/x").contains("names a user"));
        assert!(refusal("nbd://h/x?tls=1").contains("query"));
        assert!(refusal("nbd://h/x#y").contains("fragment"));
        assert!(refusal("nbd://h:0/x").contains("port"));
        assert!(refusal("nbd://h:99999/x").contains("port"));
        assert!(refusal("nbd://h/%ff").contains("UTF-8"));
        assert!(refusal("nbd://h/%00").contains("export name"));
        assert!(Target::parse("nbd:///x").is_err());
    }

    #[test]
    fn link_names_of_different_targets_differ() {
        let id = Uuid::from_u128(7);
        let link = |text: &str| Target::parse(text).unwrap().link_name(id);
        assert_eq!(link("vol-123"), "vol-123");
        assert_eq!(link("nbd://h/a/b"), "nbd@h@10809@a%2Fb");
        assert_ne!(link("nbd://h/a%2540"), link("nbd://h/a@"));
        assert_eq!(link(&format!("nbd://h/{}", "x".repeat(300))), format!("nbd@{id}"));
    }

    #[test]
    fn a_detach_names_a_device_a_link_an_id_or_a_target() {
        let parse = |text: &str| DetachSelector::parse(text).unwrap();
        assert_eq!(parse("/dev/ublkb12"), DetachSelector::DevId(12));
        assert_eq!(parse("/dev/volnode/vol-1"), DetachSelector::Path("/dev/volnode/vol-1".into()));
        let id = Uuid::from_u128(7);
        let DetachSelector::Name { attachment_id, target } = parse(&id.to_string()) else { panic!() };
        assert_eq!((attachment_id, target), (Some(id), Target::Volume(id.to_string())));
        let DetachSelector::Name { attachment_id, .. } = parse("vol-1") else { panic!() };
        assert_eq!(attachment_id, None);
        assert!(DetachSelector::parse("a/b").is_err());
    }
}
