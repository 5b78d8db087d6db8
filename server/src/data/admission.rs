//! Who is let in, and whose socket may hold much: counts connections, overall and by address, from the accept to the last byte.
//!
//! Owns the counts. Never: decides anything else about a connection that is in. Called by `acceptor.rs`, which
//! asks for a [`Place`] before a connection is given to a ring; the connection holds it, and giving it back is dropping it.
//! Invariants: there are never more places, nor more memory for wide sockets, than the limits say; an address without a
//! connection is not remembered, so the table is no larger than the number of connections.
//!
//! Beyond the limits a few come in as guests. They have a place for as long as a handshake may take: a client whose connections
//! died with its network needs one to take the slot of a dead one, which ends that; and one that asks whether the server lives gets
//! its answer. What a guest is for is known only when it opens an export; the gate then says whether it stays.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use crate::data::socket_memory::{WIDTHS, WideSockets, Width};
use crate::limits::{GUESTS_PER_ADDRESS_MAX, Limits, MemoryPlan};

/// As many sockets of a width have to find room before one gets it.
const CONNECTIONS_IN_ROOM: u64 = 16;

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
    /// Guests not counted.
    total: u32,
    guests: u32,
    /// What the kernel may keep in all sockets beyond what narrow ones hold.
    wide_bytes: u64,
    by_address: HashMap<IpAddr, OfAddress>,
}

#[derive(Debug, Default, Clone, Copy)]
struct OfAddress {
    connections: u32,
    guests: u32,
    wide_bytes: u64,
}

/// Counts connections.
#[derive(Debug)]
pub struct Admission {
    connections_max: u32,
    connections_per_address_max: u32,
    guests_max: u32,
    wide_bytes_max: u64,
    wide_sockets: WideSockets,
    counts: Mutex<Counts>,
}

impl Admission {
    /// Lets in as many as `limits` say, and lets their sockets be as wide as is planned.
    pub fn new(limits: &Limits, plan: &MemoryPlan, wide_sockets: WideSockets) -> Arc<Self> {
        Arc::new(Self {
            connections_max: limits.connections_max,
            connections_per_address_max: limits.connections_per_address_max,
            guests_max: plan.guests_max,
            wide_bytes_max: plan.wide_sockets_bytes,
            wide_sockets,
            counts: Mutex::default(),
        })
    }

    /// A place for a connection from this address, a guest's where a limit is reached; `None` is a peer on this machine that has
    /// none.
    ///
    /// # Errors
    /// [`NotAdmitted`]
    pub fn admit(self: &Arc<Self>, peer: Option<IpAddr>) -> Result<Place, NotAdmitted> {
        let address = peer.map(accountable);
        let mut counts = self.counts();
        let of_address = address.and_then(|address| counts.by_address.get(&address).copied());
        let of_address = of_address.unwrap_or_default();
        let limit = if counts.total >= self.connections_max {
            Some(NotAdmitted::TooMany(counts.total))
        } else {
            let is_full = of_address.connections >= self.connections_per_address_max;
            is_full.then_some(NotAdmitted::TooManyOfAddress(of_address.connections))
        };
        if let Some(limit) = limit
            && (counts.guests >= self.guests_max || of_address.guests >= GUESTS_PER_ADDRESS_MAX)
        {
            return Err(limit);
        }
        counts.count(address, limit.is_some(), 1);
        drop(counts);
        Ok(Place { admission: Arc::clone(self), address, wide_bytes: 0, beyond: limit })
    }

    /// Takes memory for a wider socket: how wide, and how many bytes. One address gets no more than it leaves to all others
    /// together, so none can take it all; and one connection no more than a part of what its address may still get, so that one which has
    /// many loses width, but none of them all of it.
    fn take_wide(&self, address: IpAddr) -> Option<(Width, u64)> {
        let mut counts = self.counts();
        let left_bytes = self.wide_bytes_max - counts.wide_bytes;
        let of_address = counts.by_address.get_mut(&address)?;
        let room_bytes = left_bytes.saturating_sub(of_address.wide_bytes);
        let mut widths = WIDTHS.into_iter().map(|width| (width, self.wide_sockets.more_bytes(width)));
        let taken = widths.find(|(_, bytes)| bytes * CONNECTIONS_IN_ROOM <= room_bytes)?;
        of_address.wide_bytes += taken.1;
        counts.wide_bytes += taken.1;
        Some(taken)
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
    /// Taken for the socket to be wider than narrow.
    wide_bytes: u64,
    /// The limit that was reached, of a guest's.
    beyond: Option<NotAdmitted>,
}

impl Counts {
    /// One connection more (1) or less (-1).
    fn count(&mut self, address: Option<IpAddr>, is_guest: bool, change: i32) {
        let total = if is_guest { &mut self.guests } else { &mut self.total };
        *total = total.saturating_add_signed(change);
        let Some(address) = address else { return };
        let of_address = self.by_address.entry(address).or_default();
        let total = if is_guest { &mut of_address.guests } else { &mut of_address.connections };
        *total = total.saturating_add_signed(change);
        if of_address.connections == 0 && of_address.guests == 0 {
            self.by_address.remove(&address);
        }
    }
}

impl Place {
    /// The limit that was reached when a guest came; `None` for whoever is no guest.
    pub fn beyond(&self) -> Option<NotAdmitted> {
        self.beyond
    }

    /// The guest has taken the slot of another connection, which is gone: it stays.
    pub fn settle(&mut self) {
        if self.beyond.take().is_some() {
            let mut counts = self.admission.counts();
            counts.count(self.address, false, 1);
            counts.count(self.address, true, -1);
        }
    }

    /// Lets the connection's TCP socket hold more of the kernel's memory, if some is left for its address. A Unix socket stays as
    /// it is.
    pub fn widen(&mut self, socket: BorrowedFd<'_>) {
        let Some(address) = self.address else { return };
        if self.wide_bytes > 0 {
            return;
        }
        let Some((width, bytes)) = self.admission.take_wide(address) else { return };
        // Also if it fails: one direction may be wide.
        self.wide_bytes = bytes;
        if let Err(error) = self.admission.wide_sockets.widen(socket, width) {
            warn!(%address, %error, "a connection's socket stays narrow");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.admission.counts();
        counts.wide_bytes -= self.wide_bytes;
        if let Some(of_address) = self.address.and_then(|address| counts.by_address.get_mut(&address)) {
            of_address.wide_bytes -= self.wide_bytes;
        }
        counts.count(self.address, self.beyond.is_some(), -1);
    }
}

/// Who answers for an address: with IPv6 the /64, of which one machine may use every address.
pub fn accountable(address: IpAddr) -> IpAddr {
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
    use crate::limits::GUESTS_MAX;

    /// About what a machine with 2 GiB has.
    const WIDE_BYTES: u64 = 256 << 20;

    fn admission(connections_max: u32, connections_per_address_max: u32) -> Arc<Admission> {
        let limits = Limits { connections_max, connections_per_address_max, ..Limits::default() };
        let wide_sockets = WideSockets::with_maxima(4 << 20, 32 << 20);
        let plan = limits.plan(1, 1 << 40, 0, wide_sockets.more_bytes(WIDTHS[0])).unwrap();
        Admission::new(&limits, &MemoryPlan { wide_sockets_bytes: WIDE_BYTES, ..plan }, wide_sockets)
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn the_last_place_is_given_and_one_more_is_not() {
        let admission = admission(3, 100);
        let mut places: Vec<Place> = (0..3).map(|_| admission.admit(ip("192.0.2.1")).unwrap()).collect();
        assert!(places.iter().all(|place| place.beyond().is_none()));
        let guest = admission.admit(ip("192.0.2.2")).unwrap();
        assert_eq!(guest.beyond(), Some(NotAdmitted::TooMany(3)));
        places.pop();
        assert_eq!(admission.admit(None).unwrap().beyond(), None);
    }

    #[test]
    fn a_few_come_beyond_the_limits_as_guests_and_count_when_they_stay() {
        let admission = admission(2, 1);
        let mut places = vec![admission.admit(ip("192.0.2.1")).unwrap()];
        let guests_of = |address: &str| -> Vec<Place> {
            let admitted = std::iter::from_fn(|| admission.admit(ip(address)).ok());
            admitted.take(1_000).collect()
        };
        let mut guests = guests_of("192.0.2.1");
        assert_eq!(guests.len() as u32, GUESTS_PER_ADDRESS_MAX);
        assert!(guests.iter().all(|guest| guest.beyond() == Some(NotAdmitted::TooManyOfAddress(1))));
        // One stays, in the place of another that goes.
        let mut stays = guests.pop().unwrap();
        places.clear();
        stays.settle();
        assert_eq!(stays.beyond(), None);
        let others: Vec<Place> = (2..99).flat_map(|last| guests_of(&format!("192.0.2.{last}"))).collect();
        assert_eq!(admission.counts().total, 2);
        assert_eq!((guests.len() + others.len()) as u32, GUESTS_MAX + 1, "one of them found a place");
        assert_eq!(admission.admit(ip("198.51.100.1")).unwrap_err(), NotAdmitted::TooMany(2));
        drop((stays, guests, others));
        let counts = admission.counts();
        assert_eq!((counts.total, counts.guests, counts.by_address.len()), (0, 0, 0));
    }

    #[test]
    fn without_memory_for_guests_there_are_none() {
        let limits = Limits { connections_max: 1, ..Limits::default() };
        let wide_sockets = WideSockets::with_maxima(4 << 20, 32 << 20);
        let plan = limits.plan(1, 1 << 40, 0, 0).unwrap();
        let admission = Admission::new(&limits, &MemoryPlan { guests_max: 0, ..plan }, wide_sockets);
        let _place = admission.admit(ip("192.0.2.1")).unwrap();
        assert_eq!(admission.admit(ip("192.0.2.2")).unwrap_err(), NotAdmitted::TooMany(1));
    }

    #[test]
    fn one_address_has_its_own_limit_and_others_are_let_in() {
        let admission = admission(100, 2);
        let places = [admission.admit(ip("192.0.2.1")).unwrap(), admission.admit(ip("192.0.2.1")).unwrap()];
        let beyond = |address: &str| admission.admit(ip(address)).unwrap().beyond();
        assert_eq!(beyond("192.0.2.1"), Some(NotAdmitted::TooManyOfAddress(2)));
        // The same machine in IPv6's clothes.
        assert!(beyond("::ffff:192.0.2.1").is_some());
        assert_eq!(beyond("192.0.2.2"), None);
        drop(places);
        assert!(admission.counts().by_address.is_empty(), "who has left is not remembered");
        assert_eq!(beyond("192.0.2.1"), None);
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_address() {
        let admission = admission(100, 1);
        let _place = admission.admit(ip("2001:db8:0:1::1")).unwrap();
        assert!(admission.admit(ip("2001:db8:0:1:ffff::2")).unwrap().beyond().is_some());
        assert!(admission.admit(ip("2001:db8:0:2::1")).is_ok());
    }

    #[test]
    fn no_address_takes_all_the_width_and_it_comes_back() {
        let admission = admission(1000, 1000);
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let wide_bytes_of = |address: &str| {
            let mut places: Vec<Place> = (0..200).map(|_| admission.admit(ip(address)).unwrap()).collect();
            places.iter_mut().for_each(|place| place.widen(near.as_fd()));
            (places.iter().map(|place| place.wide_bytes).sum::<u64>(), places)
        };
        let first = wide_bytes_of("192.0.2.1");
        let second = wide_bytes_of("192.0.2.2");
        let halves = [WIDE_BYTES / 2, (WIDE_BYTES - first.0) / 2];
        for (taken_bytes, half_bytes) in [first.0, second.0].into_iter().zip(halves) {
            assert!(
                (half_bytes * 9 / 10..=half_bytes).contains(&taken_bytes),
                "{taken_bytes} of {half_bytes}"
            );
        }
        drop((first, second));
        assert_eq!(admission.counts().wide_bytes, 0);
    }

    #[test]
    fn an_address_with_many_connections_loses_width_by_and_by() {
        let admission = admission(1000, 1000);
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut places: Vec<Place> = (0..64).map(|_| admission.admit(ip("192.0.2.1")).unwrap()).collect();
        places.iter_mut().for_each(|place| place.widen(near.as_fd()));
        let taken: Vec<u64> = places.iter().map(|place| place.wide_bytes).collect();
        assert!(taken.is_sorted_by(|one, next| one >= next), "{taken:?}");
        for width in WIDTHS {
            assert!(taken.contains(&admission.wide_sockets.more_bytes(width)), "{taken:?}");
        }
        assert!(taken[63] > 0, "a node with so many disks has none that is narrow");
    }
}
