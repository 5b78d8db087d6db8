//! Which data addresses a caller of the management API is told.
//!
//! Owns the rule: what `--advertise` says, else where the data side listens. A wildcard is no address to connect to: instead the
//! caller is told the one at which it has reached the API, which it can reach; one on this machine is told loopback of the family that is
//! listened on. The number of an interface is told to nobody: it means nothing elsewhere. A Unix socket is told only to callers of this
//! machine, and only where there is nothing else. Pure: opens and looks up nothing.
//! Called by: `serve.rs` (makes it), `management/` (each answer).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use crate::data::address::{DataAddress, takes_ipv4};

/// What clients may be told.
#[derive(Debug, Clone, Default)]
pub struct Advertised {
    /// Of `--advertise`; each is `host:port`.
    configured: Vec<String>,
    listening: Vec<DataAddress>,
    /// Of those, wildcards at which another program has IPv4.
    ipv6_only: Vec<DataAddress>,
}

/// Where a caller has reached the management API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReachedAt {
    /// At this address of this machine.
    Address(IpAddr),
    /// At a Unix socket, so from this machine.
    Socket,
}

impl Advertised {
    /// `configured` goes before where the data side is `listening`.
    pub fn new(configured: Vec<String>, listening: Vec<DataAddress>) -> Self {
        Self { configured, listening, ipv6_only: Vec::new() }
    }

    /// These of the listeners do not take IPv4, though nothing that is configured keeps them from it.
    #[must_use]
    pub fn with_ipv6_only(self, ipv6_only: Vec<DataAddress>) -> Self {
        Self { ipv6_only, ..self }
    }

    /// Whether what callers are told depends on how they reach the API.
    pub fn depends_on_caller(&self) -> bool {
        let is_wildcard = |address: &DataAddress| address.tcp().is_some_and(|tcp| tcp.ip().is_unspecified());
        self.configured.is_empty() && self.listening.iter().any(is_wildcard)
    }

    /// What the caller is told, in order; empty: it can reach none.
    pub fn to_caller(&self, reached_at: ReachedAt) -> Vec<String> {
        if !self.configured.is_empty() {
            return self.configured.clone();
        }
        let mut told = Vec::new();
        for address in self.listening.iter().filter_map(DataAddress::tcp) {
            let reachable = self.reachable(address, reached_at).map(|address| address.to_string());
            told.extend(reachable.filter(|address| !told.contains(address)));
        }
        if told.is_empty() && reached_at == ReachedAt::Socket {
            let is_socket = |address: &&DataAddress| address.tcp().is_none();
            told.extend(self.listening.iter().filter(is_socket).map(DataAddress::to_string));
        }
        told
    }

    fn reachable(&self, listening: SocketAddr, reached_at: ReachedAt) -> Option<SocketAddr> {
        if !listening.ip().is_unspecified() {
            return Some(match listening {
                SocketAddr::V6(v6) => SocketAddrV6::new(*v6.ip(), v6.port(), 0, 0).into(),
                SocketAddr::V4(_) => listening,
            });
        }
        let is_ipv6_only = self.ipv6_only.contains(&listening.into());
        let takes_ipv4 = listening.is_ipv4() || takes_ipv4(listening, &self.listening) && !is_ipv6_only;
        let loopback: IpAddr =
            if takes_ipv4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        let ip = match reached_at {
            ReachedAt::Socket => loopback,
            ReachedAt::Address(ip) => match ip.to_canonical() {
                // From this machine, which has both.
                ip if ip.is_loopback() && ip.is_ipv4() && !takes_ipv4 => loopback,
                ip if ip.is_loopback() && ip.is_ipv6() && listening.is_ipv4() => loopback,
                ip => ip,
            },
        };
        let is_taken = if ip.is_ipv4() { takes_ipv4 } else { listening.is_ipv6() };
        is_taken.then(|| SocketAddr::new(ip, listening.port()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(listening: &[&str], reached_at: &str) -> Vec<String> {
        let listening = listening.iter().map(|address| address.parse().unwrap()).collect();
        let reached_at = reached_at.parse().map_or(ReachedAt::Socket, |ip: IpAddr| ReachedAt::Address(ip));
        Advertised::new(Vec::new(), listening).to_caller(reached_at)
    }

    #[test]
    fn a_wildcard_is_told_as_the_address_that_the_caller_has_reached() {
        assert_eq!(told(&["0.0.0.0:10809"], "192.0.2.7"), ["192.0.2.7:10809"]);
        assert_eq!(told(&["[::]:10809"], "2001:db8::7"), ["[2001:db8::7]:10809"]);
        // As a socket for both families tells it.
        assert_eq!(told(&["[::]:10809"], "::ffff:192.0.2.7"), ["192.0.2.7:10809"]);
        assert_eq!(told(&["[::]:10809"], "the socket"), ["127.0.0.1:10809"]);
        assert_eq!(told(&["0.0.0.0:10809"], "the socket"), ["127.0.0.1:10809"]);
    }

    #[test]
    fn no_family_is_told_that_is_not_listened_on() {
        assert_eq!(told(&["0.0.0.0:10809"], "2001:db8::7"), [""; 0]);
        let both = ["0.0.0.0:10809", "[::]:10809"];
        assert_eq!(told(&both, "192.0.2.7"), ["192.0.2.7:10809"]);
        assert_eq!(told(&both, "2001:db8::7"), ["[2001:db8::7]:10809"]);
        assert_eq!(told(&both, "the socket"), ["127.0.0.1:10809", "[::1]:10809"]);
    }

    #[test]
    fn a_caller_on_this_machine_is_told_loopback_of_the_family_that_is_listened_on() {
        assert_eq!(told(&["0.0.0.0:10809"], "::1"), ["127.0.0.1:10809"]);
        assert_eq!(told(&["[::]:10809"], "::1"), ["[::1]:10809"]);
        assert_eq!(told(&["[::]:10809"], "127.0.0.1"), ["127.0.0.1:10809"]);
    }

    #[test]
    fn where_another_program_has_ipv4_it_is_not_told() {
        let wildcard: DataAddress = "[::]:10809".parse().unwrap();
        let advertised = Advertised::new(Vec::new(), vec![wildcard.clone()]).with_ipv6_only(vec![wildcard]);
        let told = |ip: &str| advertised.to_caller(ReachedAt::Address(ip.parse().unwrap()));
        assert_eq!(told("192.0.2.7"), [""; 0]);
        assert_eq!(told("127.0.0.1"), ["[::1]:10809"]);
        assert_eq!(told("2001:db8::7"), ["[2001:db8::7]:10809"]);
        assert_eq!(advertised.to_caller(ReachedAt::Socket), ["[::1]:10809"]);
    }

    #[test]
    fn the_number_of_an_interface_of_this_machine_is_told_to_nobody() {
        assert_eq!(told(&["[fe80::1%3]:10809"], "fe80::1"), ["[fe80::1]:10809"]);
    }

    #[test]
    fn an_address_that_is_one_is_told_as_it_is() {
        let listening = ["192.0.2.1:10809", "0.0.0.0:10808"];
        assert_eq!(told(&listening, "192.0.2.7"), ["192.0.2.1:10809", "192.0.2.7:10808"]);
        let advertised = Advertised::new(vec!["nas:1".to_owned()], vec!["0.0.0.0:2".parse().unwrap()]);
        assert_eq!(advertised.to_caller(ReachedAt::Socket), ["nas:1"]);
        assert!(!advertised.depends_on_caller());
    }

    #[test]
    fn a_unix_socket_is_for_callers_of_this_machine_where_there_is_nothing_else() {
        let socket = "unix:/run/volserver/nbd.sock";
        assert_eq!(told(&[socket], "the socket"), [socket]);
        assert_eq!(told(&[socket, "127.0.0.1:1"], "the socket"), ["127.0.0.1:1"]);
        assert_eq!(told(&[socket], "192.0.2.7"), [""; 0]);
    }
}
