//! Who is let in, and whose socket may hold much: counts connections, overall and by address, from the accept to the last byte.
//!
//! Owns the counts. Never: decides anything else about a connection that is in. Called by `acceptor.rs`, which
//! asks for a [`Place`] before a connection is given to a ring; the connection holds it, and giving it back is dropping it.
//! Invariants: there are never more places, nor more wide ones, than the limits say; an address without a connection is not
//! remembered, so the table is no larger than the number of connections.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use crate::limits::{Limits, MemoryPlan};
use crate::socket_memory::WideSockets;

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
    wide: u32,
    by_address: HashMap<IpAddr, OfAddress>,
}

#[derive(Debug, Default, Clone, Copy)]
struct OfAddress {
    connections: u32,
    wide: u32,
}

/// Counts connections.
#[derive(Debug)]
pub struct Admission {
    connections_max: u32,
    connections_per_address_max: u32,
    wide_max: u32,
    wide_sockets: WideSockets,
    counts: Mutex<Counts>,
}

impl Admission {
    /// Lets in as many as `limits` say, and has as many wide as are planned.
    pub fn new(limits: &Limits, plan: &MemoryPlan, wide_sockets: WideSockets) -> Arc<Self> {
        Arc::new(Self {
            connections_max: limits.connections_max,
            connections_per_address_max: limits.connections_per_address_max,
            wide_max: plan.wide_sockets_max,
            wide_sockets,
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
            let of_address = counts.by_address.get(&address).copied().unwrap_or_default();
            if of_address.connections >= self.connections_per_address_max {
                return Err(NotAdmitted::TooManyOfAddress(of_address.connections));
            }
            counts.by_address.entry(address).or_default().connections += 1;
        }
        counts.total += 1;
        drop(counts);
        Ok(Place { admission: Arc::clone(self), address, is_wide: false })
    }

    /// One address may have as many wide ones as it leaves to all others together, so none can take them all.
    fn take_wide(&self, address: IpAddr) -> bool {
        let mut counts = self.counts();
        let left = self.wide_max - counts.wide;
        let Some(of_address) = counts.by_address.get_mut(&address) else { return false };
        let may_take = of_address.wide < left;
        if may_take {
            of_address.wide += 1;
            counts.wide += 1;
        }
        may_take
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
    is_wide: bool,
}

impl Place {
    /// Lets the connection's TCP socket hold more of the kernel's memory, if some is left for its address. A Unix socket stays as
    /// it is.
    pub fn widen(&mut self, socket: BorrowedFd<'_>) {
        let Some(address) = self.address else { return };
        if self.is_wide || !self.admission.take_wide(address) {
            return;
        }
        // Also if it fails: one direction may be wide.
        self.is_wide = true;
        if let Err(error) = self.admission.wide_sockets.widen(socket) {
            warn!(%address, %error, "a connection's socket stays narrow");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.admission.counts();
        counts.total -= 1;
        counts.wide -= u32::from(self.is_wide);
        let Some(address) = self.address else { return };
        let Some(of_address) = counts.by_address.get_mut(&address) else { return };
        of_address.connections -= 1;
        of_address.wide -= u32::from(self.is_wide);
        if of_address.connections == 0 {
            counts.by_address.remove(&address);
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
    use std::os::fd::AsFd as _;

    use super::*;

    fn admission(connections_max: u32, connections_per_address_max: u32) -> Arc<Admission> {
        let limits = Limits { connections_max, connections_per_address_max, ..Limits::default() };
        let wide_sockets = WideSockets::of_this_machine();
        let plan = limits.plan(1, 1 << 40, 0, wide_sockets.bytes()).unwrap();
        Admission::new(&limits, &MemoryPlan { wide_sockets_max: 8, ..plan }, wide_sockets)
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

    #[test]
    fn no_address_takes_all_wide_sockets_and_they_come_back() {
        let admission = admission(100, 100);
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let wide_of = |address: &str| {
            let mut places: Vec<Place> = (0..20).map(|_| admission.admit(ip(address)).unwrap()).collect();
            places.iter_mut().for_each(|place| place.widen(near.as_fd()));
            let wide = places.iter().filter(|place| place.is_wide).count();
            (wide, places)
        };
        let first = wide_of("192.0.2.1");
        let second = wide_of("192.0.2.2");
        let third = wide_of("192.0.2.3");
        assert_eq!((first.0, second.0, third.0), (4, 2, 1), "each half of what is left");
        drop(first);
        assert_eq!(wide_of("192.0.2.4").0, 3, "of five that are left");
    }
}
