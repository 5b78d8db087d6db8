//! Two machines that call themselves by one name: which of them has the volume.
//!
//! A pure decision: who asks is known by its node and its boot, who holds by the same and by its connections. Cloned machines have
//! one node id, and so has one machine before and after a reboot. A boot that still has connections keeps what it holds; one that
//! had none for [`HOLDER_TIMEOUT`] is over, or as good as that, and what it still sends is fenced. Called by `attachments.rs`.

use std::time::Duration;

/// So long a holder may be without a connection before another boot of its node takes its place: it may be on its way back, from
/// an outage of the network or of this server. At the server's start it begins anew. Its dead connections are noticed within
/// a minute (`data/address.rs`).
pub const HOLDER_TIMEOUT: Duration = Duration::from_secs(30);

/// How the holder of an attachment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Connections that are served.
    pub connections: u32,
    /// Since when there are none, or since the server's start.
    pub gone_for: Duration,
}

/// What becomes of the node's attachment when the node asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is the asker's.
    Keep,
    /// It is the node's, and from now on this boot's.
    Bind,
    /// It is told of, but not handed out: who asks does not say which boot it is, and a boot has it.
    Show,
    /// Another boot's, which is over: it ends, by force.
    Take,
    /// Another boot's, which may come back within this time.
    Wait(Duration),
    /// Another boot's, which is there.
    Refuse,
}

/// Decides; an empty boot id is one that was not told (a controller, or a node before boot ids were).
pub(super) fn claim(held_by_boot: &str, asked_by_boot: &str, holder: Holder) -> Claim {
    match (held_by_boot.is_empty(), asked_by_boot.is_empty()) {
        (true, true) => Claim::Keep,
        (true, false) => Claim::Bind,
        (false, true) => Claim::Show,
        (false, false) if held_by_boot == asked_by_boot => Claim::Keep,
        (false, false) if holder.connections > 0 => Claim::Refuse,
        (false, false) => match HOLDER_TIMEOUT.checked_sub(holder.gone_for) {
            Some(left) if !left.is_zero() => Claim::Wait(left),
            _ => Claim::Take,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVE: Holder = Holder { connections: 1, gone_for: Duration::ZERO };

    fn gone_for(seconds: u64) -> Holder {
        Holder { connections: 0, gone_for: Duration::from_secs(seconds) }
    }

    #[test]
    fn a_boot_keeps_what_it_holds_whether_it_is_connected_or_not() {
        for holder in [LIVE, gone_for(0), gone_for(1000)] {
            assert_eq!(claim("a", "a", holder), Claim::Keep);
        }
    }

    #[test]
    fn another_boot_is_refused_by_a_live_holder_and_waits_for_one_that_may_come_back() {
        assert_eq!(claim("a", "b", LIVE), Claim::Refuse);
        assert_eq!(claim("a", "b", Holder { gone_for: Duration::MAX, ..LIVE }), Claim::Refuse);
        assert_eq!(claim("a", "b", gone_for(0)), Claim::Wait(HOLDER_TIMEOUT));
        assert_eq!(claim("a", "b", gone_for(29)), Claim::Wait(Duration::from_secs(1)));
        assert_eq!(claim("a", "b", gone_for(30)), Claim::Take);
        assert_eq!(claim("a", "b", gone_for(u64::MAX)), Claim::Take);
    }

    #[test]
    fn who_does_not_say_which_boot_it_is_displaces_nobody_that_did() {
        for holder in [LIVE, gone_for(1000)] {
            assert_eq!(claim("a", "", holder), Claim::Show);
            assert_eq!(claim("", "a", holder), Claim::Bind, "a controller's grant");
            assert_eq!(claim("", "", holder), Claim::Keep);
        }
    }
}
