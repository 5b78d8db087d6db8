//! What can be attached: a volume's name, a snapshot or an NBD URI; and how a detach names it.
//!
//! Owns: the syntax of both, and the name of the stable link below the device directory. Never: looks anything up.
//! A URI is `nbd://host[:port]/export`, `nbds://` for the same over TLS, or `nbd+unix:///export?socket=/path`: port 10809 unless
//! given, one `/` after the authority removed, the rest percent-decoded; an empty export name is the server's default export. A
//! link-local host has a zone: `[fe80::1%25eth0]`, or `%eth0` as people write it. Two spellings of one URI are one target.
//! A volume is its name, or `uid:UUID`: never another one that got the name later. A snapshot is `VOLUME@SNAPSHOT`, or `@UID` of one
//! whose volume is gone; it has one `@`.
//! Link names: a volume's is its name or `uid:UUID`, as it was attached; a snapshot's `VOLUME@SNAPSHOT` or `@UID`; an NBD URI's is
//! `nbd@<host>@<port>@<export>` (or `nbds@`…), or `nbd+unix@<path>@<export>`, percent-encoded but for letters, digits, `-`, `_` and
//! `.`. `@` is in no volume's name, so that no two targets share a link (of snapshots of volumes called `nbd` and `nbds` it is
//! encoded); nor does an export or a snapshot share one with another's partition: the `-` of a `-part1` at its end is encoded, too.
//! In the name of a systemd unit a URI is written as systemd-escape(1) writes it: `nbd:--host-export`.
//! Called by: `supervisor`.
//! Source: the NBD project's doc/uri.md; RFC 6874 (zones).

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use proto::volume_name::{VOLUME_NAME_CHARS_MAX, is_plain_name, is_volume_name, partition_of};
use uuid::Uuid;

use super::error::NodeError;
use crate::data_address::{self, host_and_zone};

/// Longest name of a snapshot, in characters: the server's rule.
const SNAPSHOT_NAME_LEN_MAX: usize = 64;
/// Longest export name, in bytes: `NBD_MAX_STRING`.
const EXPORT_NAME_BYTES_MAX: usize = 4096;
/// Port of an NBD server, as registered with IANA.
const NBD_PORT: u16 = 10809;
/// Longest path of a Unix socket, in bytes: `sun_path` has 108, the last of which is 0.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest link name, in bytes; `NAME_MAX` is 255.
const LINK_NAME_BYTES_MAX: usize = 200;

/// Before the uid of a volume that is named by it.
const UID_PREFIX: &str = "uid:";
/// Of a URI's query.
const SOCKET_PARAMETER: &str = "socket=";

const LINK_NAME_ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');
const URI_PATH_ESCAPED: &AsciiSet = &LINK_NAME_ESCAPED.remove(b'~').remove(b'/');

/// What can be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A volume of the configured storage server, by its name or as `uid:UUID`.
    Volume(String),
    /// A snapshot of the configured storage server, as that names it: `VOLUME@SNAPSHOT` or `@UID`.
    Snapshot(String),
    /// An export of any NBD server.
    Nbd(NbdUri),
}

/// An export of an NBD server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server is, and how it is spoken to.
    pub server: NbdServer,
    /// As the server knows it; may be empty.
    pub export_name: String,
}

/// An NBD server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdServer {
    /// `nbd://host[:port]`, `nbds://host[:port]`
    Tcp {
        /// `nbds`: over TLS.
        tls: bool,
        /// Name or address; an IPv6 address without its brackets.
        host: String,
        /// The interface that an IPv6 address is reached through, by name or number.
        zone: Option<String>,
        /// TCP port.
        port: u16,
    },
    /// `nbd+unix://`
    Unix {
        /// Absolute path of its socket.
        socket: String,
    },
}

impl Target {
    /// Reads what the user gave.
    ///
    /// # Errors
    /// [`NodeError::InvalidField`]: neither a volume's name nor an NBD URI that is supported.
    pub fn parse(text: &str) -> Result<Self, NodeError> {
        let text = &unescaped(text);
        match text.split_once("://") {
            Some((scheme, _)) => NbdUri::parse(text, scheme).map(Self::Nbd),
            None if text.contains('@') => snapshot_name(text).map(Self::Snapshot),
            None => volume_name(text).map(Self::Volume),
        }
        .map_err(|message| NodeError::InvalidField { field: "target", message })
    }

    /// Name of the stable link below the device directory.
    pub fn link_name(&self, attachment_id: Uuid) -> String {
        match self {
            Self::Volume(name) => name.clone(),
            Self::Snapshot(name) => {
                // As long names of exports are.
                let is_as_of_an_export = name.starts_with("nbd@") || name.starts_with("nbds@");
                let name = if is_as_of_an_export { name.replace('@', "%40") } else { name.clone() };
                beside_partitions(name)
            }
            Self::Nbd(uri) => {
                let escaped = |text: &str| utf8_percent_encode(text, LINK_NAME_ESCAPED).to_string();
                let (scheme, export_name) = (uri.scheme(), escaped(&uri.export_name));
                let name = match &uri.server {
                    NbdServer::Tcp { host, zone, port, .. } => {
                        let host = escaped(&with_zone(host, zone.as_deref()));
                        format!("{scheme}@{host}@{port}@{export_name}")
                    }
                    NbdServer::Unix { socket } => format!("{scheme}@{}@{export_name}", escaped(socket)),
                };
                let name = beside_partitions(name);
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
            Self::Volume(name) | Self::Snapshot(name) => f.write_str(name),
            Self::Nbd(uri) => uri.fmt(f),
        }
    }
}

/// A URI that was written as systemd-escape(1) writes it, for the instance of a unit; anything else as it is, which has no `:`
/// without `//` behind it.
pub fn unescaped(text: &str) -> Cow<'_, str> {
    let is_escaped = ["nbd:--", "nbds:--", r"nbd\x2bunix:--"].iter().any(|scheme| text.starts_with(scheme));
    if !is_escaped {
        return Cow::Borrowed(text);
    }
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text);
    while let Some(first) = rest.chars().next() {
        let code = rest.strip_prefix("\\x").and_then(|code| u8::from_str_radix(code.get(..2)?, 16).ok());
        let taken = match (code, first) {
            (Some(code), _) => {
                bytes.push(code);
                4
            }
            (None, '-') => {
                bytes.push(b'/');
                1
            }
            (None, other) => {
                bytes.extend_from_slice(&rest.as_bytes()[..other.len_utf8()]);
                other.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    String::from_utf8(bytes).map_or(Cow::Borrowed(text), Cow::Owned)
}

/// A link name that is not the one of another's partition.
fn beside_partitions(name: String) -> String {
    match partition_of(&name) {
        Some((disk, partition)) => format!("{disk}%2Dpart{partition}"),
        None => name,
    }
}

fn snapshot_name(text: &str) -> Result<String, String> {
    match text.split_once('@') {
        // In the one spelling that the server has.
        Some(("", uid)) => {
            if let Ok(uid) = Uuid::try_parse(uid) {
                return Ok(format!("@{uid}"));
            }
        }
        Some((volume, name)) if is_volume_name(volume) && is_plain_name(name, SNAPSHOT_NAME_LEN_MAX) => {
            return Ok(text.to_owned());
        }
        _ => {}
    }
    Err(format!("{text:?} is no snapshot, which is named VOLUME@SNAPSHOT, or @UID"))
}

fn volume_name(text: &str) -> Result<String, String> {
    if let Some(uid) = text.strip_prefix(UID_PREFIX) {
        // In the one spelling that the server has.
        let uid =
            Uuid::try_parse(uid).map_err(|_| format!("{text:?} is no volume's uid, which is uid:UUID"))?;
        return Ok(format!("{UID_PREFIX}{uid}"));
    }
    if is_volume_name(text) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "{text:?} is neither a volume's name (1 to {VOLUME_NAME_CHARS_MAX} letters, digits, '-', '_' and '.', \
         beginning with a letter or digit; or TENANT+NAME), nor a snapshot (VOLUME@SNAPSHOT), nor an NBD URI (nbd://host[:port]/export, \
         nbds:// for TLS, or nbd+unix:///export?socket=/path)"
    ))
}

impl NbdUri {
    fn parse(text: &str, scheme: &str) -> Result<Self, String> {
        let scheme = scheme.to_ascii_lowercase();
        if text.contains('#') {
            return Err(off(
                text,
                "has a fragment ('#'), which NBD URIs do not; write %23 for the character",
            ));
        }
        match scheme.as_str() {
            "nbd" | "nbds" => Self::parse_tcp(text, scheme == "nbds"),
            "nbd+unix" => Self::parse_unix(text),
            "nbds+unix" => Err("TLS over a Unix socket is not supported, and has nothing to protect there: no other machine \
                                reaches the socket; write nbd+unix:///export?socket=/path, or nbds://host[:port]/export"
                .to_owned()),
            "nbd+vsock" | "nbds+vsock" => Err(format!(
                "{scheme}:// is not supported; have the server listen on TCP (nbd://host[:port]/export) or on a Unix socket \
                 (nbd+unix:///export?socket=/path)"
            )),
            _ => Err(format!(
                "{scheme}:// is not an NBD URI; write nbd://host[:port]/export, nbds:// for TLS, or \
                 nbd+unix:///export?socket=/path"
            )),
        }
    }

    fn parse_tcp(text: &str, tls: bool) -> Result<Self, String> {
        let uri: http::Uri = text.parse().map_err(|e| off(text, &format!("is not a valid URI: {e}")))?;
        let authority = uri.authority().ok_or_else(|| off(text, "names no host"))?;
        if authority.as_str().contains('@') {
            return Err(off(text, "names a user, which plain NBD has no use for"));
        }
        if uri.query().is_some_and(|query| query.starts_with(SOCKET_PARAMETER)) {
            return Err(off(text, "names a socket: write nbd+unix:///export?socket=/path, without a host"));
        }
        if uri.query().is_some() {
            return Err(off(text, "has a query ('?'), which is not supported; write %3F for the character"));
        }
        let port = data_address::port(authority.as_str(), NBD_PORT);
        let port = port.ok_or_else(|| off(text, "has a port that is not 1 to 65535"))?;
        let (host, zone) = host_and_zone(authority.host()).map_err(|what| off(text, what))?;
        let export_name = export_name(text, uri.path())?;
        Ok(Self { server: NbdServer::Tcp { tls, host, zone, port }, export_name })
    }

    fn parse_unix(text: &str) -> Result<Self, String> {
        let usage = "write nbd+unix:///export?socket=/path";
        let rest = text.split_once("://").map_or("", |(_, rest)| rest);
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        if !path.is_empty() && !path.starts_with('/') {
            return Err(off(text, &format!("names a host, which a Unix socket has none of; {usage}")));
        }
        let socket = query.strip_prefix(SOCKET_PARAMETER).filter(|socket| !socket.contains('&'));
        let socket = socket.ok_or_else(|| {
            off(text, &format!("has to name the server's socket, and nothing else, behind the '?': {usage}"))
        })?;
        let socket = percent_decode_str(socket).decode_utf8().map_err(|_| off(text, "is not UTF-8"))?;
        if !socket.starts_with('/') || socket.contains('\0') || socket.len() > SOCKET_PATH_BYTES_MAX {
            let what =
                format!("names a socket that is no absolute path of at most {SOCKET_PATH_BYTES_MAX} bytes");
            return Err(off(text, &what));
        }
        let server = NbdServer::Unix { socket: socket.into_owned() };
        Ok(Self { server, export_name: export_name(text, path)? })
    }

    /// `nbd`, `nbds` or `nbd+unix`.
    pub fn scheme(&self) -> &'static str {
        match self.server {
            NbdServer::Tcp { tls: false, .. } => "nbd",
            NbdServer::Tcp { tls: true, .. } => "nbds",
            NbdServer::Unix { .. } => "nbd+unix",
        }
    }

    /// The name, or IP address, that the server's certificate has to bear; `None`: without TLS. A zone is this machine's own
    /// affair, and in no certificate.
    pub fn certificate_name(&self) -> Option<&str> {
        match &self.server {
            NbdServer::Tcp { tls: true, host, .. } => Some(host),
            NbdServer::Tcp { tls: false, .. } | NbdServer::Unix { .. } => None,
        }
    }

    /// `host:port`, with the brackets and the zone of an IPv6 address, or `unix:/path`.
    pub fn address(&self) -> String {
        match &self.server {
            NbdServer::Tcp { host, zone, port, .. } => {
                data_address::authority(host, zone.as_deref(), "%", *port)
            }
            NbdServer::Unix { socket } => format!("{}{socket}", data_address::UNIX),
        }
    }
}

/// What is wrong with a URI.
fn off(text: &str, what: &str) -> String {
    format!("{text:?} {what}")
}

fn with_zone(host: &str, zone: Option<&str>) -> String {
    zone.map_or_else(|| host.to_owned(), |zone| format!("{host}%{zone}"))
}

fn export_name(text: &str, path: &str) -> Result<String, String> {
    let path = path.strip_prefix('/').unwrap_or_default();
    let export_name = percent_decode_str(path).decode_utf8().map_err(|_| off(text, "is not UTF-8"))?;
    if export_name.len() > EXPORT_NAME_BYTES_MAX || export_name.contains('\0') {
        return Err(off(text, "has an export name that NBD does not allow"));
    }
    Ok(export_name.into_owned())
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escaped = |text| utf8_percent_encode(text, URI_PATH_ESCAPED);
        let (scheme, export_name) = (self.scheme(), escaped(&self.export_name));
        match &self.server {
            NbdServer::Tcp { host, zone, port, .. } => {
                let zone = zone.as_deref().map(|zone| escaped(zone).to_string());
                let authority = data_address::authority(host, zone.as_deref(), "%25", *port);
                write!(f, "{scheme}://{authority}/{export_name}")
            }
            NbdServer::Unix { socket } => {
                write!(f, "{scheme}:///{export_name}?{SOCKET_PARAMETER}{}", escaped(socket))
            }
        }
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
        let of_tenant = Target::parse("acme+db").unwrap();
        assert_eq!(of_tenant, Target::Volume("acme+db".into()));
        assert_eq!(of_tenant.link_name(Uuid::from_u128(7)), "acme+db");
        assert_eq!(Target::parse("acme+db@s").unwrap().link_name(Uuid::from_u128(7)), "acme+db@s");
        for bad in ["", "-a", ".a", "a/b", "a b", "ä", "a+", "+a", "a+b+c", &"a".repeat(129)] {
            assert!(refusal(bad).contains("neither a volume's name"), "{bad}");
        }
    }

    #[test]
    fn a_volume_may_be_named_by_its_uid() {
        let uid = "0a9c3186-7725-43ec-9e11-8be9a559724c";
        let named = format!("uid:{uid}");
        for spelling in [named.clone(), format!("uid:{}", uid.to_uppercase())] {
            assert_eq!(Target::parse(&spelling).unwrap(), Target::Volume(named.clone()));
        }
        assert_eq!(Target::parse(&named).unwrap().link_name(Uuid::from_u128(7)), named);
        for bad in ["uid:", "uid:x", "uid:x@s", "UID:0a9c3186-7725-43ec-9e11-8be9a559724c"] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_snapshot_is_named_as_the_server_names_it() {
        let uid = "0a9c3186-7725-43ec-9e11-8be9a559724c";
        let parsed = |text: &str| Target::parse(text).unwrap();
        assert_eq!(parsed("db-1@monday"), Target::Snapshot("db-1@monday".into()));
        assert_eq!(parsed(&format!("@{}", uid.to_uppercase())), Target::Snapshot(format!("@{uid}")));
        assert_eq!(parsed("db-1@monday").to_string(), "db-1@monday");
        let long = format!("v@{}", "s".repeat(65));
        for bad in ["@", "@x", "v@", "v@-s", "v@s@t", "a/b@s", &long] {
            assert!(refusal(bad).contains("VOLUME@SNAPSHOT"), "{bad}");
        }
        assert!(matches!(Target::parse("nbd://h/a@b").unwrap(), Target::Nbd(_)));
    }

    #[test]
    fn a_snapshot_has_a_link_of_its_own() {
        let id = Uuid::from_u128(7);
        let link = |text: &str| Target::parse(text).unwrap().link_name(id);
        assert_eq!(link("db-1@monday"), "db-1@monday");
        assert_eq!(link("db-1@monday-part1"), "db-1@monday%2Dpart1", "that is a partition's");
        let long_export = link(&format!("nbd://h/{}", "x".repeat(300)));
        assert_ne!(link(&format!("nbd@{id}")), long_export);
        assert_eq!(link(&format!("@{id}")), format!("@{id}"));
        let longest = link(&format!("{}@{}-part1", "v".repeat(128), "s".repeat(58)));
        assert!(longest.len() <= LINK_NAME_BYTES_MAX, "{longest}");
    }

    #[test]
    fn host_port_and_export_are_read() {
        let uri = nbd("nbd://storage.example:10810/disk%201/a");
        assert_eq!(uri.export_name, "disk 1/a");
        assert_eq!(uri.address(), "storage.example:10810");
        assert_eq!(nbd("nbd://h").export_name, "");
        assert_eq!(nbd("nbd://h/").address(), "h:10809");
        assert_eq!(nbd("nbd://h//a").export_name, "/a");
    }

    #[test]
    fn ipv6_addresses_keep_their_brackets_in_addresses_only() {
        let uri = nbd("nbds://[::1]/x");
        assert_eq!((uri.certificate_name(), uri.address().as_str()), (Some("::1"), "[::1]:10809"));
        assert_eq!(nbd("nbd://[fe80::2]:99/x").address(), "[fe80::2]:99");
    }

    #[test]
    fn a_zone_is_kept_all_the_way() {
        for text in ["nbds://[FE80::1%25Eth0]/x", "nbds://[fe80::1%Eth0]/x"] {
            let uri = nbd(text);
            assert_eq!(uri.address(), "[fe80::1%Eth0]:10809");
            assert_eq!(uri.certificate_name(), Some("fe80::1"));
            assert_eq!(uri.to_string(), "nbds://[fe80::1%25Eth0]:10809/x");
            assert_eq!(nbd(&uri.to_string()), uri);
            let link = Target::Nbd(uri).link_name(Uuid::from_u128(7));
            assert_eq!(link, "nbds@fe80%3A%3A1%25Eth0@10809@x");
        }
        assert_eq!(nbd("nbd://[fe80::1%3]:1/x").address(), "[fe80::1%3]:1");
        // The number 25, not an empty zone behind a "%25".
        assert_eq!(nbd("nbd://[fe80::1%25]:1/x").address(), "[fe80::1%25]:1");
        assert_ne!(nbd("nbd://[fe80::1%eth0]/x"), nbd("nbd://[fe80::1%eth1]/x"));
        for nameless in ["nbd://[fe80::1%]/x", "nbd://[fe80::1%25%2F]/x"] {
            assert!(refusal(nameless).contains("no name of an interface"), "{nameless}");
        }
        assert!(refusal("nbd://[h]/x").contains("IPv6 address in brackets"));
    }

    #[test]
    fn a_unix_socket_is_a_place_as_well() {
        let uri = nbd("nbd+unix:///disk%201?socket=/run/my%20nbd.sock");
        assert_eq!((uri.export_name.as_str(), uri.address().as_str()), ("disk 1", "unix:/run/my nbd.sock"));
        assert_eq!(uri.certificate_name(), None);
        assert_eq!(nbd(&uri.to_string()), uri);
        assert_eq!(nbd("nbd+unix://?socket=/s"), nbd("NBD+UNIX:///?socket=/s"));
        let link = Target::Nbd(uri).link_name(Uuid::from_u128(7));
        assert_eq!(link, "nbd+unix@%2Frun%2Fmy%20nbd.sock@disk%201");
        let longest = format!("nbd+unix:///x?socket=/{}", "s".repeat(106));
        assert_eq!(nbd(&longest).export_name, "x");
        assert!(refusal(&format!("{longest}s")).contains("at most 107 bytes"));
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
        assert_eq!(tls.to_string(), "nbds://h:10809/x");
        assert_eq!(Target::Nbd(tls).link_name(Uuid::from_u128(7)), "nbds@h@10809@x");
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        assert!(refusal("nbds+unix:///x?socket=/s").contains("write nbd+unix:///export?socket=/path"));
        assert!(refusal("nbd+vsock://2/x").contains("have the server listen on TCP"));
        for no_socket in ["nbd+unix:///x", "nbd+unix:///x?path=/s", "nbd+unix:///x?socket=/s&tls=1"] {
            assert!(refusal(no_socket).contains("has to name the server's socket"), "{no_socket}");
        }
        assert!(refusal("nbd+unix:///x?socket=s").contains("absolute path"));
        assert!(refusal("nbd+unix://h/x?socket=/s").contains("names a host"));
        assert!(refusal("nbd://h/x?socket=/s").contains("write nbd+unix:///export?socket=/path"));
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
    fn an_export_has_another_link_than_the_partition_of_another() {
        let link = |text: &str| Target::parse(text).unwrap().link_name(Uuid::from_u128(7));
        assert_eq!(link("nbd://h/x-part1"), "nbd@h@10809@x%2Dpart1");
        assert_ne!(link("nbd://h/x-part1"), format!("{}-part1", link("nbd://h/x")));
        assert_ne!(link("nbd://h/x-part1"), link("nbd://h/x%252Dpart1"));
        assert_eq!(link("nbd://h/x-parts"), "nbd@h@10809@x-parts");
    }

    /// As `systemd-escape` wrote them.
    #[test]
    fn a_uri_is_read_as_a_unit_is_named_by_it() {
        for (escaped, uri) in [
            ("nbd:--10.0.2.2:10809-disk", "nbd://10.0.2.2:10809/disk"),
            (r"nbd:--storage\x2d1-a\x2dpart1", "nbd://storage-1/a-part1"),
            (r"nbds:--\x5bfe80::1\x2525eth0\x5d-x", "nbds://[fe80::1%25eth0]/x"),
            (r"nbd\x2bunix:---x\x3fsocket\x3d-run-nbd.sock", "nbd+unix:///x?socket=/run/nbd.sock"),
        ] {
            assert_eq!(Target::parse(escaped).unwrap(), Target::parse(uri).unwrap(), "{escaped}");
        }
        for other in ["vol-1", r"vol\x2d1", "nbd://h-1/x-y"] {
            assert_eq!(unescaped(other), other);
        }
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
