//! Who is let in: counts connections, overall and by address, from the accept to the last byte.
//!
//! Owns the counts. Never: touches a socket or decides anything about a connection that is in. Called by `acceptor.rs`, which
//! asks for a [`Place`] before a connection is given to a ring; the connection holds it, and giving it back is dropping it.
//! Invariants: there are never more places than the limits say; an address without a connection is not remembered, so the
//! table is no larger than the number of connections.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::limits::Limits;

/// Why a connection is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// The server has as many as it may have.
    #[error("there are {0} connections, which is the limit (--connections-max)")]
    TooMany(u32),
    /// This address has as many as it may have.
    #[error("its address has {0} connections, which is the limit (--connections-per-address-max)")]
    TooManyOfAddress(u32),
}

#[derive(Debug, Default)]
struct Counts {
    total: u32,
    by_address: HashMap<IpAddr, u32>,
}

/// Counts connections.
#[derive(Debug)]
pub struct Admission {
    connections_max: u32,
    connections_per_address_max: u32,
    counts: Mutex<Counts>,
}

impl Admission {
    /// Lets in as many as `limits` say.
    pub fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            connections_max: limits.connections_max,
            connections_per_address_max: limits.connections_per_address_max,
            counts: Mutex::default(),
        })
    }

    /// A place for a connection from this address; `None` is a peer on this machine that has none.
    ///
    /// # Errors
    /// [`NotAdmitted`]
    pub fn admit(self: &Arc<Self>, peer: Option<IpAddr>) -> Result<Place, NotAdmitted> {
        let address = peer.map(accountable);
        let mut counts = self.counts();
        if counts.total >= self.connections_max {
            return Err(NotAdmitted::TooMany(counts.total));
        }
        if let Some(address) = address {
            let of_address = counts.by_address.get(&address).copied().unwrap_or(0);
            if of_address >= self.connections_per_address_max {
                return Err(NotAdmitted::TooManyOfAddress(of_address));
            }
            counts.by_address.insert(address, of_address + 1);
        }
        counts.total += 1;
        drop(counts);
        Ok(Place { admission: Arc::clone(self), address })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    address: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.admission.counts();
        counts.total -= 1;
        let Some(address) = self.address else { return };
        match counts.by_address.get_mut(&address) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                counts.by_address.remove(&address);
            }
        }
    }
}

/// Who answers for an address: with IPv6 the /64, of which one machine may use every address.
fn accountable(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(connections_max: u32, connections_per_address_max: u32) -> Arc<Admission> {
        Admission::new(&Limits { connections_max, connections_per_address_max, ..Limits::default() })
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn the_last_place_is_given_and_one_more_is_not() {
        let admission = admission(3, 100);
        let mut places: Vec<Place> = (0..3).map(|_| admission.admit(ip("192.0.2.1")).unwrap()).collect();
        assert_eq!(admission.admit(ip("192.0.2.2")).unwrap_err(), NotAdmitted::TooMany(3));
        places.pop();
        assert!(admission.admit(None).is_ok());
    }

    #[test]
    fn one_address_has_its_own_limit_and_others_are_let_in() {
        let admission = admission(100, 2);
        let places = [admission.admit(ip("192.0.2.1")).unwrap(), admission.admit(ip("192.0.2.1")).unwrap()];
        assert_eq!(admission.admit(ip("192.0.2.1")).unwrap_err(), NotAdmitted::TooManyOfAddress(2));
        // The same machine in IPv6's clothes.
        assert!(admission.admit(ip("::ffff:192.0.2.1")).is_err());
        assert!(admission.admit(ip("192.0.2.2")).is_ok());
        drop(places);
        assert!(admission.counts().by_address.is_empty(), "who has left is not remembered");
        assert!(admission.admit(ip("192.0.2.1")).is_ok());
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_address() {
        let admission = admission(100, 1);
        let _place = admission.admit(ip("2001:db8:0:1::1")).unwrap();
        assert!(admission.admit(ip("2001:db8:0:1:ffff::2")).is_err());
        assert!(admission.admit(ip("2001:db8:0:2::1")).is_ok());
    }
}
