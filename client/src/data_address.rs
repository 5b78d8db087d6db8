//! Where an NBD server is connected to, as specs and the server's answers write it.
//!
//! Owns: the three forms (`host:port`, `[ADDRESS%ZONE]:port` and `unix:/path`), and what each stands for on this machine. A zone
//! is looked up each time: the number of an interface is another after a reboot, and one that is plugged in comes late.
//! Never: connects. Called by `device/connect/dial.rs` (each dial), `node/supervisor/attach.rs` and `api_channel.rs`.
//! Source: RFC 4007, section 11 (zones), RFC 6874 (zones in URIs).

use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, ToSocketAddrs as _};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

/// Begins the address of a Unix socket.
pub const UNIX: &str = "unix:";

/// One place to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Over TCP.
    Tcp(SocketAddr),
    /// A Unix socket of this machine.
    Unix(PathBuf),
}

/// An address stands for no place.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The zone of an IPv6 address is no interface.
    #[error(
        "this machine has no network interface {0:?}: behind the % of an IPv6 address stands one of those that `ip link` lists"
    )]
    NoInterface(String),
    /// A name without an address, or no address at all.
    #[error(transparent)]
    Name(#[from] io::Error),
}

/// Every place that an address stands for: one, or as many as a name has addresses. Blocks while a name is looked up.
///
/// # Errors
/// [`ResolveError`], by cause.
pub fn resolve(address: &str) -> Result<Vec<Place>, ResolveError> {
    if let Some(path) = unix_path(address) {
        return Ok(vec![Place::Unix(path)]);
    }
    let Some(zoned) = Zoned::parse(address) else {
        return Ok(address.to_socket_addrs()?.map(Place::Tcp).collect());
    };
    let scope_id = zoned.scope_id(interface_index)?;
    Ok(vec![Place::Tcp(SocketAddrV6::new(zoned.ip, zoned.port, 0, scope_id).into())])
}

/// The path of a Unix socket's address.
pub fn unix_path(address: &str) -> Option<PathBuf> {
    address.strip_prefix(UNIX).map(PathBuf::from)
}

/// The host of a URI, without the brackets of an IPv6 address, and the address's zone. Names of interfaces are as they are written;
/// all else is the same in small letters.
///
/// # Errors
/// What is wrong with the URI, to be said behind it.
pub fn host_and_zone(host: &str) -> Result<(String, Option<String>), &'static str> {
    let Some(address) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) else {
        return if host.is_empty() { Err("names no host") } else { Ok((host.to_ascii_lowercase(), None)) };
    };
    let (ip, zone) = address.split_once('%').map_or((address, None), |(ip, zone)| (ip, Some(zone)));
    if ip.parse::<Ipv6Addr>().is_err() {
        return Err("has something else than an IPv6 address in brackets");
    }
    // "%25" is the URI's way to write "%" (RFC 6874).
    let zone = zone.map(|zone| zone.strip_prefix("25").filter(|rest| !rest.is_empty()).unwrap_or(zone));
    let decode = |zone: &str| percent_decode_str(zone).decode_utf8().map(String::from);
    let zone = zone.map(decode).transpose().map_err(|_| "is not UTF-8")?;
    if zone.as_ref().is_some_and(|zone| zone.is_empty() || zone.contains(['/', '%', ']', '\0'])) {
        return Err("has no name of an interface behind the '%' of its address, as in [fe80::1%eth0]");
    }
    Ok((ip.to_ascii_lowercase(), zone))
}

/// The port of a URI's authority, or else the default; `None`: it is not 1 to 65535.
pub fn port(authority: &str, default: u16) -> Option<u16> {
    let port = authority.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.contains(']'));
    port.map_or(Some(default), |port| port.parse().ok().filter(|port| *port != 0))
}

/// `host:port`, with brackets around an IPv6 address; `percent` is what stands before its zone: `%25` in a URI, else `%`.
pub fn authority(host: &str, zone: Option<&str>, percent: &str, port: u16) -> String {
    match zone {
        Some(zone) => format!("[{host}{percent}{zone}]:{port}"),
        None if host.contains(':') => format!("[{host}]:{port}"),
        None => format!("{host}:{port}"),
    }
}

/// A link-local address that was told by a server which was reached by another one of that kind: it is on the same link, which
/// the server has no name for that would mean anything here, nor a number: one that it tells is of its own interface. Any other address
/// is as it was.
pub fn on_the_link_of(zone: Option<&str>, address: String) -> String {
    let told = address.parse::<SocketAddrV6>().ok().filter(|told| told.ip().is_unicast_link_local());
    match (told, zone) {
        (Some(told), Some(zone)) => format!("[{}%{zone}]:{}", told.ip(), told.port()),
        _ => address,
    }
}

/// `[ADDRESS%ZONE]:port`
#[derive(Debug, PartialEq, Eq)]
struct Zoned<'a> {
    ip: Ipv6Addr,
    zone: &'a str,
    port: u16,
}

impl<'a> Zoned<'a> {
    fn parse(address: &'a str) -> Option<Self> {
        let (host, port) = address.strip_prefix('[')?.split_once("]:")?;
        let (ip, zone) = host.split_once('%')?;
        Some(Self { ip: ip.parse().ok()?, zone, port: port.parse().ok()? })
    }

    /// By the interface's name; or by its number, where none is named so.
    fn scope_id(&self, index_of: impl Fn(&str) -> Option<u32>) -> Result<u32, ResolveError> {
        let number = || self.zone.parse().ok().filter(|number| *number != 0);
        let found = index_of(self.zone).or_else(number);
        found.ok_or_else(|| ResolveError::NoInterface(self.zone.to_owned()))
    }
}

fn interface_index(name: &str) -> Option<u32> {
    // Any socket can be asked.
    let socket = UnixDatagram::unbound().ok()?;
    rustix::net::netdevice::name_to_index(socket, name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_is_an_interface_by_name_or_number() {
        let only_eth0 = |name: &str| (name == "eth0").then_some(7);
        let scope_id = |address: &str| Zoned::parse(address).unwrap().scope_id(only_eth0);
        assert_eq!(scope_id("[fe80::1%eth0]:10809").unwrap(), 7);
        assert_eq!(scope_id("[fe80::1%3]:10809").unwrap(), 3);
        for nowhere in ["[fe80::1%eth9]:1", "[fe80::1%]:1", "[fe80::1%0]:1"] {
            let told = scope_id(nowhere).unwrap_err().to_string();
            assert!(told.contains("no network interface") && told.contains("ip link"), "{told}");
        }
        for other in ["[fe80::1]:1", "192.0.2.1:1", "h:1", "[fe80::1%eth0]", "[x%eth0]:1", "unix:/x"] {
            assert_eq!(Zoned::parse(other), None, "{other}");
        }
    }

    #[test]
    fn every_form_is_resolved() {
        let loopback = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 9, 0, interface_index("lo").unwrap());
        assert_eq!(resolve("[::1%lo]:9").unwrap(), [Place::Tcp(loopback.into())]);
        assert_eq!(resolve("127.0.0.1:9").unwrap(), [Place::Tcp("127.0.0.1:9".parse().unwrap())]);
        assert_eq!(resolve("unix:/run/nbd.sock").unwrap(), [Place::Unix("/run/nbd.sock".into())]);
        let missing = resolve("[fe80::1%no-such-if0]:9").unwrap_err();
        assert!(matches!(missing, ResolveError::NoInterface(zone) if zone == "no-such-if0"));
    }

    #[test]
    fn a_link_local_address_that_is_told_is_on_the_link_it_was_told_over() {
        let told = |zone, address: &str| on_the_link_of(zone, address.to_owned());
        assert_eq!(told(Some("eth0"), "[fe80::2]:10809"), "[fe80::2%eth0]:10809");
        assert_eq!(told(None, "[fe80::2]:10809"), "[fe80::2]:10809");
        // The number is the server's.
        assert_eq!(told(Some("eth0"), "[fe80::2%3]:10809"), "[fe80::2%eth0]:10809");
        assert_eq!(told(None, "[fe80::2%3]:10809"), "[fe80::2%3]:10809");
        for other in [
            "[2001:db8::1]:10809",
            "[2001:db8::1%3]:10809",
            "[fe80::2%eth1]:10809",
            "192.0.2.1:10809",
            "storage-1:10809",
        ] {
            assert_eq!(told(Some("eth0"), other), other);
        }
    }
}
