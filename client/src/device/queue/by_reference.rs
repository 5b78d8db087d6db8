//! Which payloads a connection sends by reference (SEND_ZC), and what its notifications say of that. I/O-free; `ring.rs` asks.
//!
//! The kernel's report that it copied ends it, on this connection: a way that copies does so each time, and a copy of ours costs less. One kind
//! of report is not to be believed. A payload that lies, whole, in one buffer of the socket with the end of another that was sent by
//! reference is reported as copied whether it was or not, because only the other one's notification hears of the buffer
//! (`io_link_skb`, `io_tx_ubuf_complete` in `io_uring/notif.c`). A payload that is larger than such a buffer has one of its own,
//! and so has the first of a connection.

/// What one buffer of a socket holds at most, in bytes (`GSO_LEGACY_MAX_SIZE`).
const SOCKET_BUFFER_BYTES: u32 = 64 << 10;

/// One connection's sends by reference.
#[derive(Debug, Clone, Copy, Default)]
pub struct ByReference {
    bytes_min: Option<u32>,
    has_been_told: bool,
}

impl ByReference {
    /// Of a connection that sends payloads of at least so many bytes by reference; `None`: none.
    pub fn new(bytes_min: Option<u32>) -> Self {
        Self { bytes_min, has_been_told: false }
    }

    /// Whether a payload of so many bytes is sent by reference.
    pub fn takes(self, payload_bytes: u32) -> bool {
        self.bytes_min.is_some_and(|bytes_min| payload_bytes >= bytes_min)
    }

    /// Whether a report about a payload of so many bytes is to be believed, whatever was sent before it.
    pub fn is_sure_of(payload_bytes: u32) -> bool {
        payload_bytes > SOCKET_BUFFER_BYTES
    }

    /// From now on nothing is.
    pub fn end(&mut self) {
        self.bytes_min = None;
    }

    /// The socket does not refer to a payload any more, or never did, if it `was_copied`; `is_sure` as told by
    /// [`ByReference::is_sure_of`]. Whether that is news: the connection's first notification, or the one that ends it.
    pub fn notified(&mut self, was_copied: bool, is_sure: bool) -> bool {
        let is_first = !std::mem::replace(&mut self.has_been_told, true);
        let is_over = was_copied && (is_first || is_sure) && self.bytes_min.take().is_some();
        is_first || is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_report_of_what_auto_sends_is_sure() {
        assert!(ByReference::is_sure_of(crate::contract::SEND_ZC_BYTES_MIN));
    }

    #[test]
    fn the_size_decides() {
        let from_128k = ByReference::new(Some(128 << 10));
        assert!(from_128k.takes(128 << 10) && !from_128k.takes((128 << 10) - 1));
        assert!(ByReference::new(Some(0)).takes(1) && !ByReference::new(None).takes(u32::MAX));
    }

    #[test]
    fn the_first_report_of_a_copy_ends_it() {
        let mut connection = ByReference::new(Some(0));
        assert!(connection.notified(true, false), "the first has a buffer of its own");
        assert!(!connection.takes(u32::MAX));
        assert!(!connection.notified(true, true), "of what was under way, no news");
    }

    #[test]
    fn a_way_that_begins_to_copy_is_left_and_told_of() {
        let mut connection = ByReference::new(Some(0));
        assert!(connection.notified(false, true));
        assert!(!connection.notified(false, true));
        assert!(connection.notified(true, ByReference::is_sure_of(SOCKET_BUFFER_BYTES + 1)));
        assert!(!connection.takes(u32::MAX));
    }

    #[test]
    fn what_shares_a_buffer_says_nothing_of_copies() {
        let mut connection = ByReference::new(Some(0));
        assert!(connection.notified(false, false));
        assert!(!connection.notified(true, ByReference::is_sure_of(SOCKET_BUFFER_BYTES)));
        assert!(connection.takes(1));
    }
}
