//! The thread that accepts connections and gives each to the ring that has the fewest.
//!
//! Owns: the listeners. Never: reads or writes a connection, or knows what kind of socket it is (`data/address.rs` does).
//! Called by: `data/server.rs`.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use socket2::Socket;
use tracing::warn;

use crate::data::address::{Listener, Peer};
use crate::data::admission::Admission;
use crate::data::mailbox::{Mailbox, RingMessage};
use crate::ids::ConnectionId;

/// What the accepting thread works on.
#[derive(Debug)]
pub struct Acceptor {
    /// Where connections come in; not blocking.
    pub listeners: Vec<Listener>,
    /// Where they go.
    pub rings: Vec<Arc<Mailbox>>,
    /// How many there may be.
    pub admission: Arc<Admission>,
}

/// Source of connection identities.
static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

/// How long nothing is accepted when the process or the system has run out of descriptors.
const ACCEPT_PAUSE: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

impl Acceptor {
    /// Accepts until `stop` (an eventfd) is written.
    pub fn run(self, stop: &OwnedFd) {
        loop {
            let mut waits: Vec<PollFd<'_>> = vec![PollFd::new(stop, PollFlags::IN)];
            waits.extend(self.listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
            if poll(&mut waits, None).is_err() {
                continue; // Interrupted.
            }
            if !waits[0].revents().is_empty() {
                return;
            }
            let ready: Vec<bool> = waits[1..].iter().map(|wait| !wait.revents().is_empty()).collect();
            for (listener, _) in self.listeners.iter().zip(ready).filter(|(_, is_ready)| *is_ready) {
                self.accept(listener, stop);
            }
        }
    }

    fn accept(&self, listener: &Listener, stop: &OwnedFd) {
        match listener.accept() {
            Ok((socket, peer)) => self.hand_over(socket, peer),
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) =>
            {
                warn!(%error, "cannot accept connections");
                let _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&ACCEPT_PAUSE));
            }
            // The peer has gone again, or another wake-up took it.
            Err(_) => {}
        }
    }

    fn hand_over(&self, socket: Socket, peer: Peer) {
        let place = match self.admission.admit(peer.ip()) {
            Ok(place) => place,
            Err(reason) => {
                warn!(%peer, %reason, "a connection is refused");
                return;
            }
        };
        let Some(ring) = self.rings.iter().min_by_key(|ring| ring.connections()) else { return };
        let connection = ConnectionId(NEXT_CONNECTION.fetch_add(1, Ordering::Relaxed));
        ring.connection_added();
        ring.post(RingMessage::Accept { connection, socket: socket.into(), peer, place });
    }
}
